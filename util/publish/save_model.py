"""The model that a run leaves, in the published format: plain transformers opens it, and peft the adapters."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from util import ranks, vision
from util.adapters import lora
from util.cost import disk
from util.loss import PackedLoss
from util.mixed_adamw import exact_value
from util.model import set_budget
from util.publish.published_files import write_as_published
from util.tensors import trained_parameters

UNFINISHED = ".unfinished_model"


def save_model(
    packed: PackedLoss, processor, budget: vision.Budget, directory: Path, say: Callable[[str], None] = print
) -> None:
    """Write the model that is being trained in the published format; of a model with adapters, the adapters alone.

    bf16 compute saves bf16 weights, as the official checkpoints are. All ranks must call this, because sharded weights
    are gathered one at a time; the first rank writes. Where writing fails (a full disk, a server that is away), it is
    tried again as long as the process lives, because there may be no other copy of what was trained.
    """
    weights = gather_weights(packed)
    set_budget(processor, budget)
    disk.until_saved(lambda: write_or_say_why(packed.whole_form(), weights, processor, directory), say)


def try_to_save(packed: PackedLoss, processor, budget: vision.Budget, directory: Path) -> str:
    """The same, tried once: on the first rank why it failed, or "". On the others always ""."""
    weights = gather_weights(packed)
    set_budget(processor, budget)
    return write_or_say_why(packed.whole_form(), weights, processor, directory)


def gather_weights(packed: PackedLoss) -> dict:
    """What is trained, whole and as it is saved, by the names of transformers and peft; None for each tensor on all
    ranks but the first. All must call."""
    weights = {}
    own = trained_parameters(packed)  # a tied head is not named twice
    for name, (holder, shape) in holders_of(own).items():
        tensor = None
        if name in own:
            tensor = exact_value(own[name])
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            dtype = tensor.dtype if lora.has_adapters(packed.model) else packed.dtype
            tensor = tensor.to("cpu", dtype) if ranks.rank_and_size()[0] in (0, holder) else None
        if holder:
            tensor = ranks.sent_to_first(tensor, holder, shape, packed.dtype)
        weights[name.removeprefix("model.")] = tensor  # as transformers and peft know it
    return weights


def holders_of(own: dict[str, nn.Parameter]) -> dict[str, tuple[int, torch.Size]]:
    """Of every tensor of the model the first rank that has it, whole or a shard, and its whole shape. In a pipeline no
    rank has all of them. All ranks must call."""
    found: dict[str, tuple[int, torch.Size]] = {}
    for rank, share in enumerate(ranks.gather_on_all({name: tensor.shape for name, tensor in own.items()})):
        for name, shape in share.items():
            found.setdefault(name, (rank, shape))
    return found


def write_or_say_why(model: nn.Module, weights: dict, processor, directory: Path) -> str:
    """Why writing failed; an empty text where it did not, and on all ranks but the first."""
    if not ranks.is_first():
        return ""
    try:
        write_published(model, weights, processor, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
        return disk.failure(error, directory, sum(tensor.nbytes for tensor in weights.values()))
    return ""


def write_published(model: nn.Module, weights: dict[str, torch.Tensor], processor, directory: Path) -> None:
    """Write weights, config and processor in the published format, which plain transformers opens; adapters in peft's.

    Of `model` only the config and the names of the parameters are used. `weights`: the tensors to write by those names,
    all in one precision. The config is moved to `directory` last: where it is, all other files are, too.
    """
    unfinished = directory / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)  # the folder may have been removed during the run
    if lora.has_adapters(model):
        lora.write_adapters(model, weights, unfinished)
    else:
        model.save_pretrained(unfinished, state_dict=dict(weights))  # out of which it takes what it has written
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config.dtype = next(iter(weights.values())).dtype  # save_pretrained wrote that of the model in training
        model.config.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    write_as_published(unfinished, processor)
    move_files(unfinished, directory)
    unfinished.rmdir()


def move_files(source: Path, target: Path, but: tuple[str, ...] = ()) -> None:
    """Move a model's files into another folder of the same disk, the config last: where it is, all other files are.

    `but`: names of files that stay.
    """
    files = [file for file in source.iterdir() if file.name not in but]
    for file in sorted(files, key=lambda file: file.name in ("config.json", "adapter_config.json")):
        file.replace(target / file.name)
