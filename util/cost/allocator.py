"""How torch's allocator cuts up the memory of a GPU, and what of it lies idle between tensors.

Only the standard library is imported here, as the allocator reads its settings before it gives out the first byte.
"""

import ctypes
import os
import sys

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch 2.9 and newer read the second one, too
EXPANDABLE = "expandable_segments:True"
VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED of CUDA's driver

GIB = 2**30
# The share of what is allocated that lies idle between tensors at the peak. Of segments that cannot grow: the middle of
# what steps needed to end at all, 1.04 to 1.10 times what they allocated. Of those that can: not measured.
IDLE = 0.07
IDLE_EXPANDABLE = 0.02
KERNELS = 0.4 * GIB  # CUDA's own: code, which is loaded as it is first used; not measured


def use_expandable_segments(number: int = 0) -> None:
    """Let segments grow, so that what is free of them does not lie in pieces that are all too small.

    Micro-batches of other lengths leave such pieces behind in every step. To be called before anything is allocated on
    a GPU, of which `number` says which; what the user has set stays.
    """
    if any(variable in os.environ for variable in VARIABLES) or not has_virtual_memory(number):
        return
    os.environ[VARIABLES[0]] = EXPANDABLE


def has_virtual_memory(number: int) -> bool:
    """Whether the driver maps memory into a range of addresses piece by piece, which segments need to grow.

    Some virtual machines and stand-ins cannot; AMD's driver is not asked.
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return False
    device = ctypes.c_int()
    answer = ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number)
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(answer), VIRTUAL_MEMORY, device)
    return not failed and bool(answer.value)


def segments_expand() -> bool:
    """Whether the allocator was told so, by `use_expandable_segments` or by the user."""
    return any(EXPANDABLE.lower() in os.environ.get(variable, "").lower() for variable in VARIABLES)
