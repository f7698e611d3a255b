"""The plan of a run, printed before any weight is loaded: nothing that follows should surprise."""

from pathlib import Path

import torch

from util import bad_samples, disk
from util.config import Config
from util.log import relative
from util.measure import CUT, Sizes, describe_unused, usable_cpus
from util.memory import GIB, describe, free_bytes, peak_bytes
from util.model import choose_attention
from util.tensors import PARTS


def worker_count(config: Config, device: torch.device) -> int:
    """Data worker processes: as asked, else up to 8 with a GPU, and 1 beside a CPU that is busy training."""
    if config.num_workers is not None:
        return config.num_workers
    return min(8, usable_cpus()) if device.type == "cuda" else 1


def print_plan(
    config: Config, directory: Path, path: str, device: torch.device, dtype: torch.dtype, counts: dict,
    needs: dict[str, float], sizes: Sizes, epoch_samples: int, steps: list[tuple[int, list[list[int]]]], workers: int,
) -> None:  # fmt: skip
    """Print device, precision, parts, data, steps as arithmetic, memory and output path, a line each."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        precision += f" compute, {'adapters' if config.lora_rank else 'weights'}, gradients and moments in float32"
    elif config.dtype == "auto":
        precision += " (no bfloat16 on this device)" if device.type == "cuda" else " (no GPU)"
    parts = []
    for part in PARTS:
        frozen = ["frozen"] if config.lora_rank or part in config.freeze else []
        added = counts["adapters"][part]
        beside = [f"{added / 1e6:,.2f} M in adapters"] if added else []
        notes = f" ({', '.join(frozen + beside)})" if frozen else ""
        parts.append(f"{part} {counts[part] / 1e6:,.2f} M{notes}")
    total = sum(counts[part] for part in PARTS)
    micro = [len(step) for _, step in steps]
    usable = [sizes[index] for index in sizes.usable]
    per_epoch = -(-epoch_samples // config.global_batch_size)
    arithmetic = (
        f"{config.epochs} epochs x {per_epoch} steps ({epoch_samples:,} / {config.global_batch_size}, rounded up)"
    )
    if len(steps) < config.epochs * per_epoch:
        arithmetic = f"the first {len(steps) / per_epoch:.1f} of {arithmetic}: --max_steps {config.max_steps}"
    tokens = [size.tokens for size in usable]
    patches = [grid.patches for size in usable for grid in size.grids]
    capped = sum(grid.capped for size in usable for grid in size.grids)
    beside = f", beside {peak_bytes(device) / GIB:.2f} for Python and its libraries" if device.type == "cpu" else ""
    facts = {
        "model": f"{relative(Path(path)) if Path(path).exists() else path}, {total / 1e6:,.2f} M parameters",
        "parts": ", ".join(parts),
        "device": f"{name}, {free_bytes(device) / GIB:.1f} GiB free",
        "precision": f"{precision}; attention {choose_attention(config.attention, device, dtype)}",
        "data": f"{len(usable):,} samples of {', '.join(config.data)}; {workers} data worker(s)",
        "tokens": f"{sum(tokens):,} an epoch, {min(tokens):,} to {max(tokens):,} a sample, "
        f"{sum(size.supervised for size in usable):,} supervised",
        "vision": f"{len(patches):,} images and videos, {sum(patches):,} patches an epoch",
        "steps": f"{len(steps):,} of {config.global_batch_size} samples = {arithmetic}",
        "each step": f"{min(micro)} to {max(micro)} packed micro-batches of at most {config.max_tokens:,} tokens",
        "memory": f"{sum(needs.values()) / GIB:.2f} GiB forecast{beside}: {describe(needs)}",
        "output": str(relative(directory)),
        "disk": disk.describe(directory, counts, config, dtype),
    }
    if sizes.problems:
        facts["left out"] = f"{len(sizes.problems):,} of {len(sizes):,} samples: {bad_samples.describe(sizes.left_out)}"
    if sizes.shrunk:
        before = sum(finding.tokens_before for finding in sizes.shrunk.values())
        after = sum(finding.size.tokens for finding in sizes.shrunk.values())
        facts["shrunk"] = (
            f"{len(sizes.shrunk):,} samples to fit --max_tokens {config.max_tokens:,}, {before:,} to {after:,} tokens"
        )
    if capped:
        facts["videos"] = (
            f"{capped:,} made smaller or shorter to cost at most --video_max_tokens {config.video_max_tokens:,}"
        )
    if sizes.cut_videos:
        facts["cut videos"] = f"{sizes.cut_videos:,} {CUT}; python -m util.check_data names them"
    if sizes.unused:
        facts["keys"] = describe_unused(sizes.unused)
    width = max(map(len, facts))
    print("\n".join(f"{name:>{width}}  {fact}" for name, fact in facts.items()), flush=True)
