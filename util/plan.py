"""The plan of a run, printed before any weight is loaded: nothing that follows should surprise."""

import unicodedata
from pathlib import Path

import torch

from util import compilation, frozen, ranks
from util.adapters import new_tokens
from util.adapters.settings import ADAPTER_LEARNING_RATE
from util.config import Config
from util.cost import disk, flops, stages
from util.cost.allocator import segments_expand
from util.cost.measure import CUT, DEEP, FIRST, unlearned_in_words, unused_in_words, weighted_in_words
from util.cost.memory import GIB, Forecast, free_bytes, parts_in_words, peak_bytes, reserved_margin
from util.cost.sizes import Sizes
from util.data import bad_samples
from util.data.entries import text_of
from util.data.loader import worker_count
from util.dataset import Samples
from util.kernels import rule
from util.log import Run
from util.results import show
from util.results.evaluate import scoring_in_words
from util.run_folder import relative
from util.steps import Steps, Survey
from util.tensors import PARTS

MOST_LOOKED = 1000  # samples in which new tokens are looked for


def print_plan(
    config: Config,
    run: Run,
    path: str,
    dtype: torch.dtype,
    counts: dict,
    needs: Forecast,
    samples: Samples,
    sizes: Sizes,
    steps: Steps,
    held_out: Samples | None,
    evaluation: Steps | None,
    model_config,
) -> None:
    """Print device, precision, parts, data, steps as arithmetic, memory and output path, a line each, and a sample.

    Raises DataError where the pixels of the sample that is shown cannot be read.
    """
    of_evaluation = [evaluation.sizes] if evaluation else []
    facts = {
        **of_the_model(config, path, run.device, dtype, counts),
        **of_the_vocabulary(config, path, samples, sizes),
        **of_the_data(config, sizes, worker_count(config, run.device)),
        **of_the_steps(config, steps),
        **({"processes": run.layout} if run.layout else {}),
        "work": work_in_words(config, sizes, steps, model_config),
        **stages.in_words(model_config, config, sizes, steps),
        "memory": memory_in_words(needs, run.device),
        **({"memory budget": needs.chosen} if needs.chosen else {}),
        **frozen.features_in_words(samples.reader, path, config, dtype, [steps.sizes, *of_evaluation]),
        **({"answers": scoring_in_words(held_out, config)} if held_out and config.eval_samples else {}),
        "output": str(relative(run.directory)),
        "final model": final_model_in_words(config),
        "disk": disk.room_in_words(run.directory, counts, config, dtype),
        **what_is_unusual(config, sizes, steps, evaluation),
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:>{width}}  {fact}" for name, fact in facts.items()), flush=True)
    print(show.describe_first(samples, config.on_bad_sample), flush=True)


def of_the_model(config: Config, path: str, device: torch.device, dtype: torch.dtype, counts: dict) -> dict[str, str]:
    total = sum(counts[part] for part in PARTS)
    return {
        "model": f"{relative(Path(path)) if Path(path).exists() else path}, {total / 1e6:,.2f} M parameters",
        "parts": ", ".join(part_in_words(part, config, counts) for part in PARTS),
        "device": f"{device_in_words(device)}, {free_bytes(device) / GIB:.1f} GiB free",
        "precision": precision_in_words(config, device, dtype),
        "attention": rule.known.words,
        "compile": compilation.in_words(config.compile, device),
    }


def of_the_vocabulary(config: Config, path: str, samples: Samples, sizes: Sizes) -> dict[str, str]:
    """What --new_tokens came to, and which of them the data may have been written without."""
    found = new_tokens.of(config, path)
    if not found:
        return {}
    text = found.in_words()
    looked = sizes.usable[:MOST_LOOKED].tolist()
    unseen = set(found.texts)
    for index in looked:
        texts = [text_of(message["content"]) for message in samples.examples[index].messages]
        words = unicodedata.normalize("NFC", "\n".join(texts))
        unseen = {token for token in unseen if token not in words}
    if unseen:
        text += f"; NOT IN THE DATA (the first {len(looked):,} samples): {new_tokens.listed(tuple(sorted(unseen)))}"
    return {"vocabulary": text}


def device_in_words(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3`, `CPU, 2 threads`; and where a reader would expect something else, what is so."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name} by ROCm {torch.version.hip}, which is not tested" if torch.version.hip else name
    threads = f"CPU, {torch.get_num_threads()} threads"
    return f"{threads} (Apple's GPU is not used)" if torch.backends.mps.is_available() else threads


def part_in_words(part: str, config: Config, counts: dict) -> str:
    """`vision 665.35 M (frozen, 4.20 M in adapters)`."""
    text = f"{part} {counts[part] / 1e6:,.2f} M"
    if not config.lora_rank and part not in config.freeze:
        return text
    adapters = counts["adapters"][part]
    where = "adapters and new rows" if config.new_tokens and part == "language_model" else "adapters"
    return f"{text} (frozen, {adapters / 1e6:,.2f} M in {where})" if adapters else f"{text} (frozen)"


def states_in_words(config: Config) -> str:
    """How what is trained is kept where bf16 computes (util/mixed_adamw.py, util/small_adamw.py)."""
    kept = "adapters" if config.lora_rank else "weights"
    if ranks.are_several():
        return f"{kept}, gradients and moments in float32"
    apart = 8 if config.optimizer == "adamw_flash" else 16
    moments = "float32" if config.optimizer == "adamw" else "8 bits"
    return f"{kept} in bfloat16 and {apart} more bits, moments in {moments}"


def precision_in_words(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    text = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        return f"{text} compute; {states_in_words(config)}"
    if config.dtype == "auto":
        text += " (no bfloat16 on this device)" if device.type == "cuda" else " (no GPU)"
    return text


def of_the_data(config: Config, sizes: Sizes, workers: int) -> dict[str, str]:
    usable = sizes.usable
    tokens = sizes.tokens[usable]
    return {
        "data": f"{len(usable):,} samples of {', '.join(config.data)}; {workers} data worker(s)",
        "tokens": f"{tokens.sum():,} an epoch, {tokens.min():,} to {tokens.max():,} a sample, "
        f"{sizes.supervised[usable].sum():,} supervised",
        "vision": f"{len(sizes.usable_grids):,} images and videos, {sizes.patches[usable].sum():,} patches an epoch",
    }


def of_the_steps(config: Config, steps: Steps) -> dict[str, str]:
    survey = steps.survey
    arithmetic = (
        f"{config.epochs} epochs x {steps.per_epoch} steps "
        f"({steps.epoch_samples:,} / {config.global_batch_size}, rounded up)"
    )
    if len(steps) < config.epochs * steps.per_epoch:
        arithmetic = f"the first {len(steps) / steps.per_epoch:.1f} of {arithmetic}: --max_steps {config.max_steps}"
    return {
        "steps": f"{len(steps):,} of {config.global_batch_size} samples = {arithmetic}",
        "each step": f"{survey.fewest} to {survey.most} packed micro-batches of at most {config.max_tokens:,} tokens",
        "learning rate": learning_rate_in_words(config),
    }


def work_in_words(config: Config, sizes: Sizes, steps: Steps, model_config) -> str:
    """Where the floating-point operations of the first epoch lie, which says what to freeze or to make smaller."""
    epoch = steps.order(0)
    work = flops.epoch_work(model_config, sizes, epoch[sizes.is_usable[epoch]], config)
    return f"{flops.shares_in_words(work)} ({sum(work.values()) / 1e12:,.3g} TFLOPs an epoch)"


def learning_rate_in_words(config: Config) -> str:
    """`0.0001, the default of adapters; vision 1e-05`."""
    text = f"{config.learning_rate:g}"
    if config.lora_rank and config.learning_rate == ADAPTER_LEARNING_RATE:
        text += ", the default of adapters"
    for part in ("vision", "merger"):
        own = getattr(config, f"{part}_learning_rate")
        if own is not None:
            text += f"; {part} {own:g}"
    return text


def memory_in_words(needs: dict[str, float], device: torch.device) -> str:
    beside = f", beside {peak_bytes(device) / GIB:.2f} for Python and its libraries" if device.type == "cpu" else ""
    text = f"{sum(needs.values()) / GIB:.2f} GiB forecast{beside}: {parts_in_words(needs)}"
    if moment := getattr(needs, "moment", ""):
        text += f"; most at {moment}"
    if margin := reserved_margin(needs, device):
        kind = "expandable segments" if segments_expand() else "segments that do not expand"
        text += f"; {margin / GIB:.2f} GiB idle between tensors and for kernels ({kind})"
    return text


def final_model_in_words(config: Config) -> str:
    """Which of its models the run will leave, and what may end it early."""
    if config.leaves == "last":
        text = "that of the last step"
    elif config.eval_every:
        text = f"the one with the lowest evaluation loss, of every {config.eval_every:,} steps and the last one"
    else:
        text = "that of the last step, which alone is evaluated (--eval_every 0)"
    if config.stop_after:
        text += f"; the run ends early after {config.stop_after} evaluations in a row without a gain (--stop_after)"
    return text


def what_is_unusual(config: Config, sizes: Sizes, steps: Steps, evaluation: Steps | None) -> dict[str, str]:
    """What most runs have nothing of: samples left out or shrunk, cut videos, keys without use, idle ranks."""
    facts = {}
    survey = steps.survey
    if left_out := sizes.left_out:
        facts["left out"] = (
            f"{left_out.total():,} of {len(sizes):,} samples: {bad_samples.reasons_in_words(left_out)}; their places "
            f"stay empty: as many steps, of {survey.samples / len(steps):.1f} samples on average"
        )
        if survey.empty_steps:
            facts["left out"] += f"; {survey.empty_steps:,} steps have none and change nothing"
    if len(shrunk := sizes.shrunk):
        before = int(sizes.table.numbers["before"][shrunk].sum())
        after = int(sizes.tokens[shrunk].sum())
        limit = config.asked.get("max_tokens", config.max_tokens)  # a memory budget lowers that of a pass alone
        facts["shrunk"] = f"{len(shrunk):,} samples to fit --max_tokens {limit:,}, {before:,} to {after:,} tokens"
    if capped := sizes.count("capped"):
        facts["videos"] = (
            f"{capped:,} made smaller or shorter to cost at most --video_max_tokens {config.video_max_tokens:,}"
        )
    unlearned = sizes.table.numbers["unlearned"][sizes.usable]
    if unlearned.any():
        facts["not learned"] = unlearned_in_words(int(unlearned.sum()), int((unlearned > 0).sum()))
    weighted = sizes.table.numbers["weighted"][sizes.usable]
    if weighted.any():
        facts["weights"] = weighted_in_words(int(weighted.sum()), int((weighted > 0).sum()))
    if cut := sizes.cut_videos:
        facts["cut videos"] = f"{cut:,} {CUT}; python -m util check names them"
    if deep := sizes.count("deep"):
        facts["deep images"] = f"{deep:,} {DEEP}; python -m util check names them"
    if first := sizes.count("first"):
        facts["first images"] = f"{first:,} {FIRST}"
    if unused := sizes.unused:
        facts["keys"] = unused_in_words(unused)
    idle = [of_ranks("training", survey), of_ranks("evaluation", evaluation.survey) if evaluation else ""]
    if any(idle):
        facts["idle"] = "; ".join(filter(None, idle))
    return facts


def of_ranks(title: str, survey: Survey) -> str:
    """How often a process has no sample while others have, if it ever happens."""
    turns = survey.steps * survey.ranks
    if survey.ranks == 1 or not survey.idle_turns:
        return ""
    never = f", {survey.idle_ranks} of {survey.ranks} always" if survey.idle_ranks else ""
    return f"{title}: without a sample in {survey.idle_turns:,} of {turns:,} steps x processes{never}"
