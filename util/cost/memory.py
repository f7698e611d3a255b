"""The memory a run will need, part by part, before any weight is loaded."""

import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration

from util import ranks
from util.adapters import lora
from util.adapters.settings import untrained_parts
from util.command_line import UserError
from util.config import Config
from util.loss import LOGIT_ROWS
from util.model import layers
from util.steps import Load, Survey
from util.tensors import PARTS, part_of

GIB = 2**30


def count_parameters(model_config, config: Config) -> dict:
    """Parameters by part from the model's config alone, those of adapters and of new tokens' rows that are
    trained beside them under "adapters".

    Besides the parts: those of the "largest_layer" and of "all_layers".
    """
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(model_config)
    counts = dict.fromkeys(PARTS, 0)
    counts["adapters"] = lora.count_trained(model_config, config)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    per_layer = []
    for layer in layers(model):
        per_layer.append(sum(parameter.numel() for parameter in layer.parameters()))
    counts["largest_layer"] = max(per_layer)
    counts["all_layers"] = sum(per_layer)
    return counts


def forecast(
    model_config, counts: dict, config: Config, dtype: torch.dtype, micro_batches: Iterable[Load] | np.ndarray, shards=1
) -> dict[str, float]:
    """Bytes by part: a dict whose values add up to the peak within a training step.

    Activations are what each layer of transformers' modules keeps for its backward pass, for the one of `micro_batches`
    that needs most. Weights, gradients and moments are divided among `shards` devices; less than full sharding also
    keeps whole copies on each.
    """
    total = sum(counts[part] for part in PARTS)
    trained = sum(counts[part] for part in PARTS if part not in config.freeze)
    width = 8 if dtype == torch.float64 else 4
    weights = width * total
    if config.lora_rank:
        # not counts["adapters"]: where remedies are tried, `counts` were made for a config without them
        adapters = trained = sum(lora.count_trained(model_config, config).values())
        weights = lora.frozen_bytes(model_config, config, total, dtype.itemsize) + width * adapters
    parts = {
        "weights": weights / (shards if config.quantize == "none" else 1),
        "gradients": width * trained / shards,
        "moments": trained * (2 if config.optimizer == "adamw_8bit" else 2 * width) / shards,
    }
    if config.quantize != "none":  # while a layer computes with its 4-bit weight there is a copy in full precision
        text = model_config.text_config
        parts["copies at work"] = dtype.itemsize * text.hidden_size * text.intermediate_size
    elif (shards > 1 or ranks.are_several()) and config.sharding != "full":
        parts["whole weights"] = dtype.itemsize * total
        parts["whole gradients"] = width * trained if config.sharding == "optimizer" else 0
    elif shards > 1 or (dtype == torch.bfloat16 and not config.lora_rank):
        # the root's copies stay for the whole step, a layer's while it or its neighbour works
        parts["copies at work"] = dtype.itemsize * (total - counts["all_layers"] + 2 * counts["largest_layer"])
    needs = [activations(model_config, config, dtype, load) for load in micro_batches]
    parts["activations"], parts["logits"], parts["working memory"] = max(needs, key=sum, default=(0, 0, 0))
    return parts


def activations(model_config, config: Config, dtype: torch.dtype, load: Load) -> tuple[float, float, float]:
    """(bytes of activations, of logits, of working memory) of one packed micro-batch at the peak of its backward pass.

    The first two are kept from the forward pass; working memory is the gradients of activations in the largest layer.
    """
    text, tower = model_config.text_config, model_config.vision_config
    compute = dtype.itemsize
    wide = max(4, dtype.itemsize)  # of what is computed in fp32 at least
    tokens, patches, supervised = map(int, load)
    supervised = min(supervised, LOGIT_ROWS)
    width, inner = text.hidden_size, text.intermediate_size
    key_value = width // text.num_attention_heads * text.num_key_value_heads
    # two RMSNorms (an fp32 copy of the input and the normalised one), q, k, v and the attention's output, the MLP
    norms = 2 * (width * (wide if dtype != torch.float32 else 0) + 2 * compute * width)
    layer = norms + compute * (4 * width + 3 * key_value + 4 * inner)
    # two LayerNorms and residuals, q, k, v before and after the rotation, the output, the MLP and its sigmoid
    block = compute * tower.embed_dim * (10 + 3 * tower.mlp_ratio)
    depth, blocks = text.num_hidden_layers, tower.depth
    blocks_kept = 0 if "vision" in untrained_parts(config) else blocks  # a frozen tower keeps nothing
    patch = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    # memory peaks at the MLP's product: the gradients of it, its factors and the residual, less what is freed by then
    working = compute * tokens * (2 * inner + 4 * width)
    if config.activation_checkpointing == "full":  # each layer's input, and all of the one that is being recomputed
        kept = compute * (width * depth * tokens + tower.embed_dim * blocks_kept * patches)
        block_working = compute * patches * tower.embed_dim * (tower.mlp_ratio + 1)
        recomputed = [(layer * tokens, working)]
        if blocks_kept:
            recomputed.append((block * patches, block_working))
        most, working = max(recomputed, key=sum)
        kept += most
    else:
        kept = layer * depth * tokens + block * blocks_kept * patches
    kept += compute * patch * patches if blocks_kept else 0  # what the patch embedding has read
    return kept, supervised * text.vocab_size * (compute + 2 * wide), working


def check(
    model_config, config: Config, dtype: torch.dtype, device: torch.device, survey: Survey, parts: dict, shards: int = 1
) -> None:
    """Raise UserError where the forecast does not fit the device, naming the settings with which it would."""
    needed = sum(parts.values())
    free = free_bytes(device)
    if needed <= free or not config.check_memory:
        return
    counts = count_parameters(model_config, config)
    # With --micro_batch_size 1 the longest sample alone decides: less is not possible.
    batch_choices = [([], survey.heaviest), (["--micro_batch_size 1"], survey.heaviest_samples)]
    ways = []
    for changes, changed in remedies(config, device):
        for batch_flags, batches in batch_choices:
            total = sum(forecast(model_config, counts, changed, dtype, batches, shards).values())
            if total <= free:
                flags = [flag_in_words(name, value) for name, value in changes.items()]
                ways.append(f"  {' '.join(flags + batch_flags)}: {total / GIB:.1f} GiB")
                break
    remedy = "No setting fits; use a smaller model, or several GPUs (./finetune_distributed.sh)"
    if ways:
        remedy = "Settings that fit:\n" + "\n".join(ways[:4])
    has_patches = any(patches for _, patches, _ in survey.heaviest)
    smaller = "Smaller images help too (--max_pixels)" if has_patches else "Shorter conversations help too"
    raise UserError(
        f"not enough memory on {device}: the run needs {needed / GIB:.1f} GiB ({parts_in_words(parts)}), "
        f"{free / GIB:.1f} GiB are free.\n{remedy}\n{smaller}. "
        "--no-check_memory goes ahead all the same."
    )


def flag_in_words(name: str, value: object) -> str:
    """A setting as it is typed: `--freeze vision merger`."""
    return f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def remedies(config: Config, device: torch.device) -> Iterator[tuple[dict, Config]]:
    """Changes that need less memory, each with the changed settings.

    First those that leave the mathematics as it is, then the optimizer, then training less of the model, then adapters.
    """
    parts = ({}, {"freeze": ["vision"]}, {"freeze": ["language_model"]})
    adapters = [{"quantize": "nf4"}]
    if not config.lora_rank:
        adapters = [{"lora_rank": 16}, {"lora_rank": 16, "quantize": "nf4"}]
    optimizers = ("adamw", "adamw_8bit") if device.type == "cuda" else ("adamw",)
    choices = [*itertools.product(parts, optimizers), *itertools.product(adapters, ("adamw",))]
    for (part, optimizer), checkpointing in itertools.product(choices, ("none", "full")):
        changes = {**part, "optimizer": optimizer, "activation_checkpointing": checkpointing}
        changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
        unused = {f"{part}_learning_rate": None for part in changes.get("freeze", []) if part != "language_model"}
        try:
            yield changes, dataclasses.replace(config, **changes, **unused)
        except UserError:  # the change contradicts another setting
            continue


def parts_in_words(parts: dict[str, float]) -> str:
    """`weights 8.24, gradients 8.24`, in GiB."""
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


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
