"""Where the device's time of one training step goes: its kernels, the costliest first, and their shares by kind."""

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MOST_TOLD = 25  # kernels

# The first pattern that is found in a kernel's name says its kind. Names are those of cuBLAS, cuDNN, FlashAttention,
# torch, and of Inductor, whose generated kernels are named after the operations that they fuse.
GROUPS = {
    "attention backward": r"flash.*bwd|bwd.*flash|fmha.*bwd|sdpa.*bprop|bprop.*sdpa|mha.*bwd|dot_do_o|convert_dq",
    "attention forward": r"flash.*fwd|flash_fwd|fmha|sdpa.*fprop|sdpa|mha.*fwd|flash::",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|splitk|gemv|triton_(tem|mm)|addmm",
    "cross-entropy": r"softmax|nll_loss|cross_entropy",
    "optimizer": r"adam|multi_tensor|lpnorm|l2norm|foreach_(mul|add|norm)|koptimizer|flashoptim",
    "norms": r"norm|rsqrt|var_mean",
    "copies": r"memcpy|memset|copy|catarray|chunk_cat|split_with_sizes|\bfill|fillfunctor",
    "gather and scatter": r"index|embedding|gather|scatter|sort|radix",
    "pointwise": r"elementwise|triton_|vectorized|reduce_kernel",
}


def group_of(kernel: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel.lower())), "other")


def profiled(step: Callable[[], object], device: torch.device) -> dict:
    """Run a step under torch's profiler. On a CPU its operators stand for kernels, so that the path is walked there.

    Times are in milliseconds. "idle" is what is left of the time from the first kernel's begin to the last one's end:
    the device waited for the host. Kernels that overlap count twice, so it can come out too small.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels: dict[str, list[float]] = {}
    begins, ends = [], []
    for event in record.events():
        of_device = event.device_type == torch.autograd.DeviceType.CUDA
        if of_device != on_gpu or event.is_user_annotation or event.name.startswith("Optimizer.step"):
            continue  # of a range that someone named, the kernels within count
        microseconds = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        kernels.setdefault(event.name, []).append(microseconds / 1000)
        begins.append(event.time_range.start)
        ends.append(event.time_range.end)
    return summary(kernels, (max(ends) - min(begins)) / 1000 if ends else 0.0)


def summary(kernels: dict[str, list[float]], wall: float) -> dict:
    """Of each kernel's times, in milliseconds, and those from the first begin to the last end: what is told of them."""
    total = sum(map(sum, kernels.values()))
    groups: dict[str, float] = {}
    for name, times in kernels.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + sum(times)
    costliest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:MOST_TOLD]
    return {
        "wall_ms": round(wall, 2),
        "kernels_ms": round(total, 2),
        "idle_ms": round(max(0.0, wall - total), 2),
        "launches": sum(map(len, kernels.values())),
        "shares": {name: round(time / (total or 1), 4) for name, time in sorted(groups.items(), key=lambda g: -g[1])},
        "costliest": [
            {"kernel": name[:160], "group": group_of(name), "calls": len(times), "ms": round(sum(times), 2)}
            for name, times in costliest
        ],
    }


def table(found: dict) -> str:
    """The same to read."""
    lines = [
        f"{found['launches']} kernels, {found['kernels_ms']} ms of {found['wall_ms']} ms, idle {found['idle_ms']} ms",
        "  ".join(f"{name} {share:.1%}" for name, share in found["shares"].items()),
    ]
    for entry in found["costliest"]:
        lines.append(f"{entry['ms']:>10.2f} ms {entry['calls']:>6} x  {entry['group']:20} {entry['kernel'][:90]}")
    return "\n".join(lines)
