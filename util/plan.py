"""The plan of a run, printed before any weight is loaded: nothing that follows should surprise."""

from pathlib import Path

import torch

from util.config import Config
from util.cost import disk
from util.cost.measure import CUT, describe_unused, usable_cpus
from util.cost.memory import GIB, describe, free_bytes, peak_bytes
from util.cost.sizes import Sizes
from util.data import bad_samples
from util.model import choose_attention
from util.run_folder import relative
from util.steps import Steps, Survey
from util.tensors import PARTS


def worker_count(config: Config, device: torch.device) -> int:
    """Data worker processes: as asked, else up to 8 with a GPU, and 1 beside a CPU that is busy training."""
    if config.num_workers is not None:
        return config.num_workers
    return min(8, usable_cpus()) if device.type == "cuda" else 1


def print_plan(
    config: Config, directory: Path, path: str, device: torch.device, dtype: torch.dtype, counts: dict,
    needs: dict[str, float], sizes: Sizes, steps: Steps, held_out: Steps | None, workers: int,
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
    survey, usable = steps.survey, sizes.usable
    arithmetic = (
        f"{config.epochs} epochs x {steps.per_epoch} steps "
        f"({steps.epoch_samples:,} / {config.global_batch_size}, rounded up)"
    )
    if len(steps) < config.epochs * steps.per_epoch:
        arithmetic = f"the first {len(steps) / steps.per_epoch:.1f} of {arithmetic}: --max_steps {config.max_steps}"
    tokens, grids = sizes.tokens[usable], sizes.usable_grids
    capped = int(grids[:, 3].sum())
    beside = f", beside {peak_bytes(device) / GIB:.2f} for Python and its libraries" if device.type == "cpu" else ""
    facts = {
        "model": f"{relative(Path(path)) if Path(path).exists() else path}, {total / 1e6:,.2f} M parameters",
        "parts": ", ".join(parts),
        "device": f"{name}, {free_bytes(device) / GIB:.1f} GiB free",
        "precision": f"{precision}; attention {choose_attention(config.attention, device, dtype)}",
        "data": f"{len(usable):,} samples of {', '.join(config.data)}; {workers} data worker(s)",
        "tokens": f"{tokens.sum():,} an epoch, {tokens.min():,} to {tokens.max():,} a sample, "
        f"{sizes.supervised[usable].sum():,} supervised",
        "vision": f"{len(grids):,} images and videos, {sizes.patches[usable].sum():,} patches an epoch",
        "steps": f"{len(steps):,} of {config.global_batch_size} samples = {arithmetic}",
        "each step": f"{survey.fewest} to {survey.most} packed micro-batches of at most {config.max_tokens:,} tokens",
        "memory": f"{sum(needs.values()) / GIB:.2f} GiB forecast{beside}: {describe(needs)}",
        "output": str(relative(directory)),
        "disk": disk.describe(directory, counts, config, dtype),
    }
    if left_out := sizes.left_out:
        facts["left out"] = (
            f"{left_out.total():,} of {len(sizes):,} samples: {bad_samples.describe(left_out)}; their places stay "
            f"empty: as many steps, of {survey.samples / len(steps):.1f} samples on average"
        )
        if survey.empty_steps:
            facts["left out"] += f"; {survey.empty_steps:,} steps have none and change nothing"
    if len(shrunk := sizes.shrunk):
        before, after = (int(column[shrunk].sum()) for column in (sizes.table.numbers["before"], sizes.tokens))
        facts["shrunk"] = (
            f"{len(shrunk):,} samples to fit --max_tokens {config.max_tokens:,}, {before:,} to {after:,} tokens"
        )
    if capped:
        facts["videos"] = (
            f"{capped:,} made smaller or shorter to cost at most --video_max_tokens {config.video_max_tokens:,}"
        )
    if cut := sizes.cut_videos:
        facts["cut videos"] = f"{cut:,} {CUT}; python -m util check names them"
    if unused := sizes.unused:
        facts["keys"] = describe_unused(unused)
    idle = [of_ranks(title, plan.survey) for title, plan in (("training", steps), ("evaluation", held_out)) if plan]
    if any(idle):
        facts["idle"] = "; ".join(filter(None, idle))
    width = max(map(len, facts))
    print("\n".join(f"{name:>{width}}  {fact}" for name, fact in facts.items()), flush=True)


def of_ranks(title: str, survey: Survey) -> str:
    """How often a process has no sample while others have, if it ever happens."""
    turns = survey.steps * survey.ranks
    if survey.ranks == 1 or not survey.idle_turns:
        return ""
    never = f", {survey.idle_ranks} of {survey.ranks} always" if survey.idle_ranks else ""
    return f"{title}: without a sample in {survey.idle_turns:,} of {turns:,} steps x processes{never}"
