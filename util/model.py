"""Load model and processor, choose device and precision, freeze parts, set attention and checkpointing."""

import math
import os
from collections.abc import Collection
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from util import attention, compilation, conversation, family, ranks, recompute, vision
from util.adapters import lora, new_tokens
from util.command_line import UserError
from util.config import OFFICIAL_MODEL, Config
from util.cost import allocator
from util.loss import PackedLoss, most_logit_rows
from util.mixed_adamw import keep_as_halves
from util.packed_layers import LAYER, kind_of_block, pack
from util.run_folder import complete_checkpoints
from util.tensors import part_of
from util.tiny_model import TINY_MODELS, make_tiny_model


def choose_device(name: str) -> torch.device:
    """The device of a run. Raises UserError where the chosen one is not there.

    A GPU also becomes the current one, which is what all that is told no device means: pinned memory, random states,
    `torch.cuda.synchronize`, NCCL and kernels of others. Else these would be the first GPU's, with a context there.
    """
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cuda, cuda:1 or cpu") from None
    if device.type == "mps":
        raise UserError(
            f"--device {name}: Apple's GPU has no float64, in which the loss of a step is added up, and no kernel for "
            "packed attention; use --device cpu, or a machine with an NVIDIA GPU"
        )
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: not tested here; use cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        tool = "rocm-smi" if torch.version.hip else "nvidia-smi"
        raise UserError(f"--device {name}: torch {torch.__version__} sees no GPU (`{tool}` shows the driver)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        allocator.use_expandable_segments(device.index)
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of compute: `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, name)


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The packed attention backend: `auto`, a kernel for each call, on an NVIDIA GPU in 16 bits, else sdpa.

    Raises UserError.
    """
    fits = device.type == "cuda" and dtype == torch.bfloat16
    if name == "auto":
        # sdpa is exact everywhere; what the kernels give on AMD's GPUs was never compared with it
        name = "auto" if fits and not torch.version.hip else "sdpa"
    elif name != "sdpa" and not fits:
        raise UserError(f"--attention {name} needs a GPU and --dtype bfloat16; use --attention sdpa")
    attention.check_backend(name)
    return name


def find_model(name: str | None, device: torch.device) -> str:
    """The checkpoint directory or hub name that `--model` means."""
    if name is None:
        name = OFFICIAL_MODEL if device.type == "cuda" else "tiny"
    if name in TINY_MODELS:
        return str(make_tiny_model(model_type=TINY_MODELS[name]))
    name = os.path.expanduser(name)  # a shell leaves the ~ of --model=~/a as it is
    check_folder(name)
    return name


def check_folder(name: str) -> None:
    """UserError for a name that can only be a folder's and is none, and for a file or folder that holds no model.

    The hub is not asked for such a name. What may be a hub name (`owner/model`) and is no folder passes.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"--model {name}: a file; name the folder that holds config.json and the weights")
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"--model {name}: no model in this folder (config.json is missing){what_else(path)}")
    elif "\\" in name:
        raise UserError(
            f"--model {name}: no such folder; '\\' is the separator of Windows, and '/' the one of this system"
        )
    elif name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1:
        there = next(parent for parent in Path(os.path.abspath(name)).parents if parent.exists())
        raise UserError(f"--model {name}: no such folder; what there is of its path is {there}")


def what_else(folder: Path) -> str:
    """What a folder without a model is, and what helps, as the end of a message; "" where nothing is known."""
    checkpoints = [folder] if (folder / "state.json").is_file() else complete_checkpoints(folder)
    if checkpoints:
        kind = "a checkpoint" if checkpoints == [folder] else "a run that did not end"
        return (
            f"; it is {kind}: go on with it by --resume {folder}, or make a model of it: "
            f"python -m util export {checkpoints[-1]} OUT"
        )
    # A model that was downloaded may lie deeper; in the hub's cache it does.
    inner = next(chain(folder.glob("*/config.json"), folder.glob("snapshots/*/config.json")), None)
    return f"; there is one in {inner.parent}" if inner else ""


def load_config(path: str, settings: Config | None = None):
    """The config of a model of one of the families; another one, an adapter, or nothing there, is refused by name.

    `settings`: of a run, whose `--new_tokens` may need more rows than the model has.
    """
    check_folder(path)
    if lora.is_adapter(path):
        raise UserError(f"--model {path} is an adapter; first make a model of it: python -m util merge {path} OUT")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        if Path(path).exists():
            problem = f"its config.json is of no known model ({first_line}); {family.trained_here()}"
        else:
            problem = f"no such folder, and the hub did not answer for it ({first_line})"
        raise UserError(f"--model {path}: {problem}") from None
    if problem := family.problem_of(config):
        raise UserError(f"--model {path} {problem}")
    if settings and (found := new_tokens.of(settings, path)):
        config.text_config.vocab_size = found.rows
    return config


def model_type_of(path: str) -> str:
    """The family of a model, by its key in FAMILIES; of an adapter that of its base."""
    return load_config(lora.base_of(path) if lora.is_adapter(path) else path).model_type


def load_processor(path: str, settings: Config | None = None):
    """The processor of a checkpoint directory or hub name, which also knows the `--new_tokens` of a run's settings."""
    check_folder(path)
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"--model {path}: its processor cannot be loaded ({first_line})") from None
    if processor.chat_template and (problem := conversation.problem_of_template(processor)):
        raise UserError(f"--model {path} {problem}")
    if settings and (found := new_tokens.of(settings, path)):
        new_tokens.add(processor.tokenizer, found.texts)
    return processor


def load_weights(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in `dtype` on `device`, under sdpa. Weights that are missing or left over are an error.

    An adapter gives its base model with the adapter beside, in 4 bits where it was trained so.
    """
    if lora.is_adapter(path):
        model = load_weights(lora.base_of(path), dtype, torch.device("cpu"))
        if lora.quantised_in_training(path):
            lora.quantise(model, device)
        lora.load_adapters(model, path)
        return model.to(device)
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except OSError as error:
        raise UserError(f"--model {path}: {str(error).strip().splitlines()[0]}") from None
    wrong = {
        key: sorted(report[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
    }
    if wrong:
        raise UserError(f"--model {path}: its weights are not those of its config: {wrong}")
    return model.to(device)


def build_model(config: Config, path: str, processor, device: torch.device) -> PackedLoss:
    """The model of a checkpoint, ready to train: `loss_sum = model(batch)`."""
    return prepare_model(load_trainable(config, path, device), config, processor, device)


def load_trainable(config: Config, path: str, device: torch.device) -> PreTrainedModel:
    """The weights as training keeps them: what lies under adapters in the precision of compute or in 4 bits, all else
    in fp32 (fp64 on request). In bf16 on one process an fp32 weight is kept as two halves (util/mixed_adamw.py)."""
    dtype = choose_dtype(config.dtype, device)
    in_halves = dtype == torch.bfloat16 and not ranks.are_several()
    found = new_tokens.of(config, path)
    kept = dtype if config.lora_rank else torch.promote_types(dtype, torch.float32)
    if in_halves and not found and is_stored_in_bf16(path):
        kept = dtype  # every remainder is zero; rows of new tokens, which are means of others, have one
    # What is quantised or cut in two is so before it is moved: a GPU never holds all weights in fp32.
    model = load_weights(path, kept, torch.device("cpu") if in_halves or config.quantize != "none" else device)
    if found:
        new_tokens.grow(model, found)
    if config.quantize != "none":
        lora.quantise(model, device)
    if in_halves and kept == torch.float32:
        keep_all_as_halves(model)
    return model.to(device)


def keep_all_as_halves(module: nn.Module) -> None:
    for parameter in module.parameters():
        keep_as_halves(parameter)


def is_stored_in_bf16(path: str) -> bool:
    """Whether the files of a model hold all its weights in bf16; of a name on the hub its config is believed."""
    files = list(Path(path).glob("*.safetensors"))
    if not files:
        return AutoConfig.from_pretrained(path).dtype == torch.bfloat16
    precisions = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            precisions |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return precisions == {"BF16"}


def prepare_model(model: PreTrainedModel, config: Config, processor, device: torch.device) -> PackedLoss:
    """A loaded model on one process, ready to train.

    For bfloat16 compute the weights lie in the model as bf16, and what is trained has the bits beside it that make each
    an exact fp32. What lies under adapters is in the precision of compute already and needs none.
    """
    dtype = choose_dtype(config.dtype, device)
    packed = pack_loss(model, config, processor, device).to(device)
    if compilation.is_on(config.compile, device):
        compilation.compile_loss(packed)
    if dtype == torch.bfloat16:
        keep_all_as_halves(packed)
    return packed.train()


def pack_loss(
    model: PreTrainedModel,
    config: Config,
    processor,
    device: torch.device,
    kind: type[PackedLoss] = PackedLoss,
) -> PackedLoss:
    """The forward pass of util/loss.py, or that of a class which several ranks need, over a model whose layers are
    prepared."""
    rows = most_logit_rows(config.logit_rows, compilation.is_on(config.compile, device))
    return kind(prepare_layers(model, config, device), processor, choose_dtype(config.dtype, device), rows)


def prepare_layers(model: PreTrainedModel, config: Config, device: torch.device):
    """Set attention, frozen parts, adapters, activation checkpointing and compilation."""
    model.config.use_cache = False
    set_attention(model, choose_attention(config.attention, device, choose_dtype(config.dtype, device)))
    if config.lora_rank:
        lora.add_adapters(model, config)
        if found := new_tokens.of(config, model.config._name_or_path):
            new_tokens.train_rows(model, found)
    else:
        freeze(model, config.freeze)
    set_embedding_gradient(model, choose_dtype(config.dtype, device), device)
    pack_layers(model, compilation.is_on(config.compile, device), config.activation_checkpointing)
    return model


def set_embedding_gradient(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """On a CPU, let the gradient of a tied embedding be the rows of the tokens that occur, added to that of the head.

    Else it is a whole matrix of zeros but for these, to be made, and added to the other. Where the head has a matrix of
    its own nothing is saved: the optimizer wants a whole gradient.
    """
    embedding = model.get_input_embeddings()
    is_tied = embedding.weight is model.lm_head.weight
    # One row after the other is added, which in bf16 would lose small ones; and FSDP2 reduces whole gradients.
    embedding.sparse = device.type == "cpu" and dtype != torch.bfloat16 and is_tied and not ranks.are_several()


def pack_layers(model: PreTrainedModel, is_compiled: bool = False, recomputing: str = "none") -> None:
    """Let the layers run packed rows by util/packed_layers.py, and all norms be fused.

    `recomputing`: a value of `--activation_checkpointing`.
    """
    run = recompute.running(recomputing, is_compiled)
    if is_compiled:
        compilation.keep_less(recomputing == "selective")
    blocks = model.model.visual.blocks
    for kind, repeated in ((kind_of_block(blocks[0]), blocks), (LAYER, model.model.language_model.layers)):
        if is_compiled:
            kind = compilation.compiled_kind(kind, is_recomputed=recomputing == "full")
        for layer in repeated:
            pack(layer, kind, run)


def shard(
    packed: PackedLoss, mesh, dtype: torch.dtype, reshard_after_forward: bool = True, kept_whole: Collection = ()
) -> None:
    """Shard over a mesh: each layer its own unit, what is left (embedding, tied head, merger, norms) the root's.

    Weights, gradients and reduction stay in their own precision; with bfloat16, a layer computes on bf16 copies that
    live while it works. `reshard_after_forward` frees the gathered weights between forward and backward pass.
    Parameters in `kept_whole` stay as they are, whole on every rank.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Said in so many words: defaults changed between versions of torch. Casting inputs is left to the modules, since
    # the rotary angles must stay in fp32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    packed.reshard_after_forward = reshard_after_forward
    same = {"mesh": mesh, "mp_policy": policy, "ignored_params": set(kept_whole)}
    for layer in layers(packed.model):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **same)
    fully_shard(packed, reshard_after_forward=False, **same)  # needed again at once
    register_fsdp_forward_method(packed, "score")  # the other way in, which gathers weights as `forward` does


@contextmanager
def whole_weights(packed: PackedLoss):
    """Inside, this process holds all weights in the precision of compute, and runs layers one by one as it likes.

    No forward pass then needs another rank, so ranks may generate answers of different lengths. Every rank must enter
    and leave.
    """
    units = [module for module in packed.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            is_root = isinstance(unit, PackedLoss)
            unit.set_reshard_after_forward(packed.reshard_after_forward and not is_root, recurse=False)
        forget_forward_passes(packed)


def forget_forward_passes(packed: nn.Module) -> None:
    """Let the next backward pass gather weights ahead by its own forward pass alone.

    FSDP2 notes the order in which layers run, to gather the one before while one has its backward pass, and forgets it
    when a backward pass is through. Forward passes that have none, as those of an evaluation, stay noted. Where they
    differ between ranks, as the answers do that each one writes, the ranks would then gather different layers at the
    same time and wait for each other without end. Torch has no function for it (2.11 to 2.14).
    """
    for unit in packed.modules():
        if not isinstance(unit, FSDPModule):
            continue
        state: Any = unit._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in filter(None, groups):
            group._post_forward_indices.clear()


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers: the tower's blocks, then the language model's."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def set_attention(model: PreTrainedModel, backend: str) -> None:
    """Use a packed backend in all layers. For training; generation runs under sdpa."""
    name = attention.register(backend)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = name


def freeze(model: nn.Module, parts: Collection[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)


def set_budget(processor, budget: vision.Budget) -> None:
    """Write the budget into a processor, so that who loads the saved model gets the pixels it was trained on.

    They are other ones where a processor cannot be told: docs/data.md says where.
    """
    image, video = processor.image_processor, processor.video_processor
    least, most = budget.pixels(vision.IMAGE_TOKENS)
    image.size = {"shortest_edge": least, "longest_edge": most}
    least, most = budget.pixels(vision.FRAME_TOKENS)
    # Its cap of a frame is 1.05 times the fewest pixels at least, which must not be above the most.
    video.size = {"shortest_edge": min(least, math.floor(most / 1.05)), "longest_edge": most}
    video.cap_pixels_per_frame = True  # by what the frames of a video may cost together
    if budget.family.counts_all_frames:
        count_all_frames(video, budget)
    else:
        # Of which Qwen2VLVideoProcessor takes nine tenths.
        video.max_video_tokens = math.ceil(budget.video_max_tokens / 0.9)


def count_all_frames(video_processor, budget: vision.Budget) -> None:
    """The same for Qwen3VLVideoProcessor, whose size is that of all frames together, and which chooses frames itself.

    Only it has no fewest pixels of a frame: where --min_pixels enlarges frames, it leaves them small.
    """
    most = budget.video_max_tokens * budget.token_pixels * vision.TEMPORAL
    # Its shortest edge, times 1.05, is also what no cap of a frame goes below: larger, and long videos would cost more.
    video_processor.size = {"shortest_edge": budget.token_pixels, "longest_edge": max(budget.token_pixels, most)}
    video_processor.max_video_tokens = budget.pixels(vision.FRAME_TOKENS)[1] // budget.token_pixels  # of a frame
    video_processor.fps = budget.video_fps
    video_processor.max_frames = budget.video_max_frames
