"""Which kernel a call of packed attention runs on: a pure function of what is known of the call.

What was measured on this very device (fastest.py) goes before the rule. Letters as in packed.py.
"""

import importlib
import importlib.util
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from util.command_line import UserError

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
AUTO = "auto"
DEFAULT = "varlen"  # on an NVIDIA GPU: takes any lengths, any width, causal or not
# Every kernel of the operator, in words for plans and pages.
WORDS = {
    "varlen": "torch's FlashAttention-2 over pieces of any length",
    "dense": "cuDNN over stacks of same-length pieces",
    "dense_flash": "torch's FlashAttention-2 over stacks of same-length pieces",
    "cudnn": "cuDNN over pieces of any length",
    "flash_3": "FlashAttention-3",
    "flash_4": "FlashAttention-4",
}
HOPPER = 9  # the major number of a capability
BLACKWELL = 10  # of data centres; the consumers' is 12, for which cuDNN and FlashAttention-4 have other kernels
# cuDNN builds a plan for every new shape. One stack of equal pieces comes back (images of one size); a single piece
# comes back only by chance, so it must be long for the plan to be worth it.
SHORTEST_STACKED = 512
SHORTEST_ALONE = 8192
# Pieces of 1 to 4 rows failed on an H200 (torch 2.11), those of 5 and more did not.
SHORTEST_DENSE = 16
# Below, torch itself keeps cuDNN's kernels for any length away (torch.nn.attention.varlen).
SHORTEST_CUDNN = 129


@dataclass(frozen=True)
class Call:
    """What the choice may depend on."""

    capability: tuple[int, int]  # of an NVIDIA GPU; (0, 0) of anything else
    dtype: torch.dtype
    heads: int
    shared: int  # key-value heads
    width: int
    causal: bool
    pieces: int
    longest: int
    tokens: int
    runs: int  # of neighbours that have one length: 1 where all pieces are equal
    shortest: int | None = None  # None: not known

    @property
    def bucket(self) -> str:
        """Calls that one measurement speaks for: the same heads, and lengths within a factor of two."""
        spread = "equal" if self.runs == 1 else f"mean {power_above(self.tokens / max(1, self.pieces))}"
        heads = f"{self.heads}/{self.shared} x {self.width}"
        return f"{heads}{' causal' if self.causal else ''}, longest {power_above(self.longest)}, {spread}"


def power_above(number: float) -> int:
    """The smallest power of two that is not below a number; 1 at least."""
    return 1 << max(0, int(-(-number // 1)) - 1).bit_length()


def choose(call: Call, available: frozenset[str]) -> str:
    """The kernel of a call, of those that are available and serve it."""
    if call.capability[0] not in (HOPPER, BLACKWELL):
        return DEFAULT  # elsewhere nothing is known to be quicker than FlashAttention-2
    newest = "flash_3" if call.capability[0] == HOPPER else "flash_4"
    is_stack = call.runs == 1 and call.longest >= (SHORTEST_STACKED if call.pieces > 1 else SHORTEST_ALONE)
    wanted = [newest, *(["dense"] if is_stack else []), "cudnn"]
    return next((name for name in wanted if name in available and serves(name, call)), DEFAULT)


def serves(name: str, call: Call) -> bool:
    """Whether a kernel computes such a call, and rightly."""
    if call.capability == (0, 0) or call.dtype not in (torch.bfloat16, torch.float16):
        return False
    if name == "dense":
        is_long = min(call.longest, call.shortest or call.longest) >= SHORTEST_DENSE
        return call.capability >= (8, 0) and call.width % 8 == 0 and call.width <= 128 and is_long
    if name == "cudnn":
        # Where torch's own varlen_attn calls it: not with grouped heads, and causal only from 2.15 on (pytorch#193630).
        plain = call.heads == call.shared and (not call.causal or VERSION >= (2, 15))
        on_newest = call.capability[0] in (HOPPER, BLACKWELL)
        return plain and on_newest and call.width % 8 == 0 and call.longest >= SHORTEST_CUDNN
    if name == "flash_3":
        return call.capability[0] == HOPPER
    if name == "flash_4":
        return call.capability[0] in (HOPPER, BLACKWELL)
    return True


# ---- what is installed ----------------------------------------------------------------------------------------------

MODULES = {"flash_3": "flash_attn_interface", "flash_4": "flash_attn.cute", "flash_attn": "flash_attn"}
INSTALL = {
    "flash_3": "FlashAttention-3 (flash_attn_interface), which is built from the folder hopper/ of flash-attention",
    "flash_4": "FlashAttention-4 (`pip install flash-attn-4`)",
    "flash_attn": "the flash-attn package (`pip install flash-attn --no-build-isolation`, with a compiler)",
}


def why_absent(name: str) -> str:
    """Why a kernel cannot be used with this installation, as the end of a message; "" where it can."""
    if name in ("varlen", "dense_flash") and VERSION < (2, 10):
        return "needs torch 2.10 or newer; update torch or use --attention sdpa"
    if name in ("flash_3", "flash_4") and VERSION < (2, 11):
        return "needs torch 2.11 or newer; update torch or use --attention varlen"
    if name in ("dense", "cudnn") and not (torch.backends.cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled()):
        return "cuDNN's attention is switched off in this process; use --attention varlen"
    if name == "cudnn" and VERSION < (2, 14):
        # The backward pass of older versions takes the width of a head for the longest piece and writes past its
        # buffers (pytorch#186142).
        return "needs torch 2.14 or newer, older ones corrupt memory; update torch or use --attention varlen"
    if name in MODULES and not is_importable(MODULES[name]):
        return f"needs {INSTALL[name]}, which is not installed; install it, or use --attention varlen"
    return ""


def is_importable(module: str) -> bool:
    """Whether a module can be found; what stands above it is imported for that, and may fail in its own ways."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:
        return False


def check(name: str) -> None:
    """Raise UserError with the remedy where a chosen kernel is not installed, or cannot be loaded."""
    if reason := why_absent(name):
        raise UserError(f"--attention {name}: {reason}")
    if name in MODULES:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # built for another torch, another CUDA ...
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"--attention {name}: {MODULES[name]} is installed and cannot be loaded ({told[0]}); install the one "
                "that fits this torch, or use --attention varlen"
            ) from None


@lru_cache(1)
def installed() -> frozenset[str]:
    return frozenset(name for name in WORDS if not why_absent(name))


# ---- what was found in this process ---------------------------------------------------------------------------------


@dataclass
class Known:
    """What measurements and failures say; it goes before the rule."""

    fastest: dict[str, str] = field(default_factory=dict)  # bucket -> kernel
    proved: dict[tuple, bool] = field(default_factory=dict)  # (kernel, heads ...) -> whether it computes what it should
    refused: set[tuple[str, Call]] = field(default_factory=set)  # calls that a kernel raised an error for
    words: str = ""  # for the plan: what a run uses


known = Known()


def chosen(call: Call) -> str:
    """The kernel of a call in this process."""
    usable = frozenset(name for name in installed() if (name, call) not in known.refused)
    measured = known.fastest.get(call.bucket)
    name = measured if measured in usable else choose(call, usable)
    return name if known.proved.get(proof_of(name, call), True) else DEFAULT


def proof_of(name: str, call: Call) -> tuple:
    """Of which calls it is enough to look once at what a kernel computes."""
    return name, call.heads, call.shared, call.width, call.causal, call.dtype
