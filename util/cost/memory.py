"""The memory a run will need, part by part, before any weight is loaded."""

import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from util import compilation, ranks
from util.adapters import lora
from util.command_line import UserError, choices_of
from util.config import Config
from util.cost import allocator
from util.cost.activations import FP32, Divided, kept_by
from util.cost.moments import Gradients, Units, moments, moments_among_several
from util.cost.settings import GIB, budget_in_bytes
from util.cost.shapes import shapes_of
from util.family import known_model
from util.model import layers
from util.steps import Load, Survey
from util.tensors import PARTS, part_of


def count_parameters(model_config, config: Config) -> dict:
    """Parameters by part from the model's config alone, those of adapters and of new tokens' rows that are
    trained beside them under "adapters".

    Besides the parts: those of one "block" of the tower, of one "layer" of the language model, and of "all_layers".
    """
    model = known_model(model_config)
    counts = dict.fromkeys(PARTS, 0)
    counts["adapters"] = lora.count_trained(model_config, config)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    per_layer = []
    for layer in layers(model):
        per_layer.append(sum(parameter.numel() for parameter in layer.parameters()))
    counts["block"], counts["layer"] = per_layer[0], per_layer[-1]  # the tower comes first; all of a kind are alike
    counts["all_layers"] = sum(per_layer)
    return counts


class Forecast(dict[str, float]):
    """Bytes by part at the moment of a training step that needs most; the values add up to what is allocated then."""

    moment: str = ""
    chosen: str = ""  # what a memory budget chose for it, in words (budget.fit_memory)

    @classmethod
    def at(cls, moment: str, parts: dict[str, float]) -> Self:
        found = cls(parts)
        found.moment = moment
        return found


class Among(NamedTuple):
    """How a process stands among others that train together."""

    several: bool  # whether there are others
    divided: Divided = Divided()  # among how many of them a layer's activations are
    waiting: float = 0  # bytes of activations that a pipeline's stage keeps of its other rows


def forecast(
    model_config,
    counts: dict,
    config: Config,
    dtype: torch.dtype,
    micro_batches: Iterable[Load] | np.ndarray,
    shards: int = 1,
    passes: int = 1,
    device: torch.device | None = None,
    largest_picture: int = 0,
    among: Among | None = None,
) -> Forecast:
    """Bytes by part: a dict whose values add up to the peak within a training step.

    The peak is that of the `micro_batches` and of the moments of a step (`moments`) which need most. `passes`: the most
    micro-batches that a step has; from the second one on the gradients of all are there. `device`: where the run will
    be, None: where nothing is compiled. Weights, gradients and moments are divided among `shards` devices; less than
    full sharding also keeps whole copies on each. `largest_picture`: see `load_of_rank`. `among`: which processes
    train, where they are others than those of this run. What lies beside what is allocated: `reserved_margin`.
    """
    is_compiled = device is not None and compilation.is_on(config.compile, device)
    counts = counts_of_rank(model_config, counts, config)
    loads = [load_of_rank(load, config, largest_picture) for load in micro_batches]
    among = among or Among(shards > 1 or ranks.are_several(), divided_by(config))
    states = kept_states(model_config, counts, config, dtype, shards, among.several)
    # Of parts that no gradient ever reaches, as the tower's where there is text alone, neither gradients nor moments
    # are made. A rank among several has dummy patches.
    with_patches = among.several or not loads or any(int(patches) for _, patches, _ in loads)
    gradients = Gradients.of(model_config, counts, config, dtype, with_patches, passes, among.several)
    states["moments"] = bytes_of_moments(config, dtype) * gradients.parameters / shards
    units = Units.of(model_config, counts, config, dtype, shards, passes)
    found = []
    for load in loads or [(0, 0, 0)]:
        kept = kept_by(model_config, config, dtype, load, is_compiled, among.divided)
        in_a_step: Iterable = moments(kept, gradients, is_compiled).items()
        if among.several and config.quantize == "none":
            in_a_step = moments_among_several(kept, gradients, units, is_compiled, among.waiting)
        for name, parts in in_a_step:
            found.append(Forecast.at(name, {**states, **parts, "gradients": parts["gradients"] / shards}))
    return max(found, key=lambda parts: sum(parts.values()))


def bytes_of_moments(config: Config, dtype: torch.dtype) -> int:
    """Of a parameter; small ones keep each of the two in 8 bits."""
    return 2 * max(FP32, dtype.itemsize) if config.optimizer == "adamw" else 2


def divided_by(config: Config) -> Divided:
    """Among how many tensor ranks what lies between two matrices is divided, and what lies between layers."""
    size = config.tensor_parallel_size
    return Divided(size, size if config.sequence_parallel else 1)


def counts_of_rank(model_config, counts: dict, config: Config) -> dict:
    """Of the parameters as many as one tensor rank computes with: a part of every matrix, but the tower's qkv and its
    patch embedding whole (util/parallel/tensor.py). What else is whole, norms and biases, is too little to count."""
    ranks_of_matrix = config.tensor_parallel_size
    if ranks_of_matrix == 1:
        return counts
    shapes = shapes_of(model_config)
    found = {**counts, **{name: count / ranks_of_matrix for name, count in counts.items() if name != "adapters"}}
    of_others = 1 - 1 / ranks_of_matrix
    of_a_block = of_others * math.prod(shapes.block.matrices["attn.qkv"])
    qkv = model_config.vision_config.depth * of_a_block
    patches = of_others * shapes.pixels * shapes.block.width
    found["block"] += of_a_block
    return {**found, "vision": found["vision"] + qkv + patches, "all_layers": found["all_layers"] + qkv}


def load_of_rank(load: Load, config: Config, largest_picture: int = 0) -> Load:
    """Of a micro-batch what the fullest of the ranks has that share its row.

    Of the tokens an equal part; what is supervised may stand together in one of the parts. Pictures are dealt whole,
    each to the rank with least so far: none has more than the mean when it gets its last one (Graham's bound).
    `largest_picture`: patches of an image, or of a pair of frames of a video.
    """
    tokens, patches, supervised = (int(number) for number in load)
    ranks_of_row = config.context_parallel_size
    tokens = -(-tokens // ranks_of_row)
    dealt = -(-(patches + largest_picture * (ranks_of_row - 1)) // ranks_of_row)
    return tokens, min(patches, dealt), min(supervised, tokens)


def kept_states(
    model_config, counts: dict, config: Config, dtype: torch.dtype, shards: int, several: bool
) -> dict[str, float]:
    """Bytes of the weights as they are trained; and of a copy of those in 4 bits."""
    total = sum(counts[part] for part in PARTS)
    wide = max(FP32, dtype.itemsize)
    if config.lora_rank:
        # not counts["adapters"]: where remedies are tried, `counts` were made for a config without them
        adapters = sum(lora.count_trained(model_config, config).values())
        weights = lora.frozen_bytes(model_config, config, total, dtype.itemsize) + wide * adapters
    elif dtype == torch.bfloat16 and not several:
        # of what is trained the 16 bits that bf16 lacks lie beside it (util/mixed_adamw.py), or 8 of them
        missing = 1 if config.optimizer == "adamw_flash" else 2
        weights = dtype.itemsize * total + missing * sum(counts[part] for part in PARTS if part not in config.freeze)
    else:
        weights = wide * total
    states = {"weights": weights / (shards if config.quantize == "none" else 1)}
    if config.quantize != "none":  # while a layer computes with its 4-bit weight there is a copy in full precision
        text = model_config.text_config
        states["copies at work"] = dtype.itemsize * text.hidden_size * text.intermediate_size
    return states


def reserved_margin(parts: dict[str, float], device: torch.device | None = None) -> float:
    """Bytes of a GPU that are taken beside what is allocated: what lies idle between tensors, and CUDA's kernels. On a
    CPU there are none.
    """
    if device is not None and device.type == "cpu":
        return 0
    share = allocator.IDLE_EXPANDABLE if allocator.segments_expand() else allocator.IDLE
    return share * sum(parts.values()) + allocator.KERNELS


def check(
    model_config, config: Config, dtype: torch.dtype, device: torch.device, survey: Survey, parts: dict, shards: int = 1
) -> None:
    """Raise UserError where the forecast does not fit the device, naming the settings with which it would."""
    needed = sum(parts.values())
    margin = reserved_margin(parts, device)
    free = free_bytes(device)
    where = "are free"
    budget = budget_of(config, device) or math.inf
    if budget < free:
        free, where = budget, f"are allowed by --memory_budget {config.memory_budget}"
    if needed + margin <= free or not config.check_memory:
        return
    ways = ways_to_fit(model_config, config, dtype, device, survey, free, shards)
    remedy = "No setting fits; use a smaller model, or several GPUs (./finetune_distributed.sh)"
    if ways:
        remedy = "Settings that fit:\n" + "\n".join(ways)
    beside = f" and {margin / GIB:.1f} GiB between tensors and for kernels" if margin else ""
    raise UserError(
        f"not enough memory on {device}: the run needs {needed / GIB:.1f} GiB ({parts_in_words(parts)}){beside}, "
        f"{free / GIB:.1f} GiB {where}.\n{remedy}\n{what_else_helps(config, survey)}. "
        "--no-check_memory goes ahead all the same."
    )


def ways_to_fit(
    model_config, config: Config, dtype: torch.dtype, device: torch.device, survey: Survey, free: float, shards: int
) -> list[str]:
    """Flags with which a run would fit into `free` bytes, one line for each of the `remedies` that can help."""
    counts = count_parameters(model_config, config)
    # With --micro_batch_size 1 the longest sample alone decides: less is not possible.
    batch_choices = [([], survey.heaviest), (["--micro_batch_size 1"], survey.heaviest_samples)]
    ways = []
    for choices in remedies(config, device):
        for (changes, changed), (batch_flags, batches) in itertools.product(choices, batch_choices):
            # with one sample a micro-batch, a step of several samples has several
            passes = survey.most if not batch_flags else max(survey.most, min(2, config.global_batch_size))
            parts = forecast(
                model_config, counts, changed, dtype, batches, shards, passes, device, survey.largest_picture
            )
            total = sum(parts.values())
            if total + reserved_margin(parts, device) <= free:
                flags = [flag_in_words(name, value) for name, value in changes.items()]
                ways.append(f"  {' '.join(flags + batch_flags)}: {total / GIB:.1f} GiB")
                break  # the other choices change more
    return ways


def what_else_helps(config: Config, survey: Survey) -> str:
    """Beside the settings that are tried."""
    has_patches = any(patches for _, patches, _ in survey.heaviest)
    helps = "Smaller images help too (--max_pixels)" if has_patches else "Shorter conversations help too"
    twice = 2 * config.context_parallel_size
    if ranks.rank_and_size()[1] % twice == 0:
        helps += f", and more processes for each row (--context_parallel_size {twice})"
    return helps


def flag_in_words(name: str, value: object) -> str:
    """A setting as it is typed: `--freeze vision merger`."""
    return f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def remedies(config: Config, device: torch.device) -> Iterator[list[tuple[dict, Config]]]:
    """Ways to need less memory, those that change least first: the whole model as asked for, less of it, then adapters.

    Each is a list of changes with the changed settings: those to memory and speed alone, then to the optimizer, too.
    """
    optimizers = ("adamw",)
    if device.type == "cuda" and not ranks.are_several():  # where the others work
        optimizers = choices_of(Config, "optimizer")
    yield list(with_dials({}, config, optimizers))
    for part in ("vision", "language_model"):
        if part not in config.freeze:
            yield list(with_dials({"freeze": [*config.freeze, part]}, config, optimizers))
    if not config.lora_rank:
        yield list(with_dials({"lora_rank": 16}, config, ("adamw",)))
    yield list(with_dials({"lora_rank": config.lora_rank or 16, "quantize": "nf4"}, config, ("adamw",)))


def with_dials(changes: dict, config: Config, optimizers: Sequence[str]) -> Iterator[tuple[dict, Config]]:
    """`changes` with each optimizer and activation checkpointing, as far as no other setting contradicts them."""
    for optimizer, checkpointing in itertools.product(optimizers, choices_of(Config, "activation_checkpointing")):
        all_changes = {**changes, "optimizer": optimizer, "activation_checkpointing": checkpointing}
        new = {name: value for name, value in all_changes.items() if value != getattr(config, name)}
        unused = {f"{part}_learning_rate": None for part in new.get("freeze", []) if part != "language_model"}
        try:
            yield new, dataclasses.replace(config, **new, **unused)
        except UserError:
            continue


def parts_in_words(parts: dict[str, float]) -> str:
    """`weights 8.24, gradients 8.24`, in GiB."""
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def budget_of(config: Config, device: torch.device) -> float | None:
    """Bytes that `--memory_budget` lets this process take; None where nothing is to be chosen by it: `none`, and `auto`
    without a GPU."""
    if config.memory_budget == "auto":
        return free_bytes(device) if device.type == "cuda" else None
    return budget_in_bytes(config.memory_budget)


def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still allocate on the device; processes on one CPU machine share what is free.

    Infinite on Windows, where Python does not tell and nothing is trained.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: all memory that the machine has
        if not hasattr(os, "sysconf"):
            return math.inf
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_bytes(device: torch.device) -> int:
    """The most bytes this process has held: on a GPU by torch's count, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The kernel's VmHWM counts this program alone; ru_maxrss may be the peak of a larger process that started it.
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE):
        return int(found[1]) * 1024
    import resource  # not at the top: Windows has none, and asks for no peak

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
