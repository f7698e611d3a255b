"""Low-rank adapters (LoRA, DoRA) through peft, over weights of 4 bits if asked (QLoRA, NF4 through bitsandbytes).

The model's weights stay as they are; each chosen linear layer W gets two small matrices and computes
W x + (alpha / rank) B A x (arXiv 2106.09685), under --lora_rslora W x + (alpha / sqrt(rank)) B A x (arXiv 2312.03732).
A and B alone are trained, saved and exported, in peft's own format.
"""

import logging
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from util import family, run_folder
from util.adapters import new_tokens
from util.adapters.settings import VISION_TARGETS, Target, targets
from util.command_line import UserError

NF4_BLOCK = 64  # weights that share a scale
NF4_GROUP = 256  # scales that share a scale of their own, as the scales are quantised, too

# How the names of a part's linear layers begin, and how they may end. The mergers' begin as the blocks' beside them do.
PLACES = {"vision": "model.visual.blocks.", "merger": "model.visual.", "language_model": "model.language_model.layers."}
ENDS: dict[str, tuple[str, ...]] = {**VISION_TARGETS, "language_model": Target.__args__}


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A linear layer that can have an adapter."""

    name: str  # of the module in the model of transformers
    part: str
    end: str  # of its name, by which it is chosen within its part
    inputs: int
    outputs: int


def linear_modules(model) -> list[Linear]:
    """The linear layers of a model that can have adapters, in its order; the head has none."""
    import torch

    found = []
    for name, module in model.named_modules():
        part = next((part for part, place in PLACES.items() if name.startswith(place)), None)
        if part and isinstance(module, torch.nn.Linear):
            end = next(end for end in ENDS[part] if name.endswith(f".{end}"))
            found.append(Linear(name, part, end, module.in_features, module.out_features))
    return found


def linear_layers(model_config) -> dict[str, dict[str, tuple[int, int, int]]]:
    """(inputs, outputs, how many) of the linear layers that can have adapters, by part and by the end of their names.

    Layers of one end in one part have one shape: of Qwen3-VL's mergers there are several.
    """
    found: dict[str, dict[str, tuple[int, int, int]]] = {part: {} for part in PLACES}
    for linear in linear_modules(family.known_model(model_config)):
        _, _, before = found[linear.part].get(linear.end, (0, 0, 0))
        found[linear.part][linear.end] = (linear.inputs, linear.outputs, before + 1)
    return found


def adapted_layers(model_config, config) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Of these the ones that get adapters."""
    chosen = targets(config)
    adapted = {}
    for part, layers in linear_layers(model_config).items():
        adapted[part] = {end: shape for end, shape in layers.items() if end in chosen[part]}
    return adapted


def count_adapters(model_config, config) -> dict[str, int]:
    """Parameters of the adapters, by part: rank x (inputs + outputs) for each layer, and its outputs under DoRA."""
    parameters = {}
    for part, layers in adapted_layers(model_config, config).items():
        parameters[part] = 0
        for inputs, outputs, count in layers.values():
            of_a_layer = config.lora_rank * (inputs + outputs)
            if config.lora_dora:
                of_a_layer += outputs
            parameters[part] += count * of_a_layer
    return parameters


def count_trained(model_config, config) -> dict[str, int]:
    """Parameters trained beside frozen weights, by part: those of adapters and the rows of new tokens."""
    parameters = count_adapters(model_config, config)
    parameters["language_model"] += new_tokens.count_rows(model_config, config)
    return parameters


def frozen_bytes(model_config, config, total: int, itemsize: int) -> float:
    """Bytes of the model's `total` frozen weights, in the precision of compute or, with --quantize nf4, in NF4."""
    if config.quantize == "none":
        return total * itemsize
    layers = linear_layers(model_config)["language_model"].values()
    quantised = sum(inputs * outputs * count for inputs, outputs, count in layers)
    # 4 bits, a scale of one byte for each block, and a scale of four bytes for each group of blocks
    bytes_per_weight = 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_GROUP)
    return (total - quantised) * itemsize + quantised * bytes_per_weight


# ---- a model with adapters ------------------------------------------------------------------------------------------


def import_peft():
    """The module peft. Raises UserError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and its warnings help no user here
    try:
        import peft
    except ImportError:
        raise UserError("adapters need peft: pip install peft") from None
    return peft


def import_bitsandbytes():
    """The module bitsandbytes. Raises UserError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that it can do without
    try:
        import bitsandbytes
    except ImportError:
        raise UserError("--quantize nf4 needs bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes


def add_adapters(model, config) -> None:
    """Freeze the weights and put adapters beside the chosen layers; B is zero, so that nothing changes yet.

    The adapters are kept in fp32 (fp64 on request), like everything that is trained. Paths of modules stay as they
    were, but an adapted layer's weight is now at `base_layer.weight`.
    """
    peft = import_peft()
    target_modules = names_for_peft(linear_modules(model), targets(config))
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        use_rslora=config.lora_rslora,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules,
        use_dora=config.lora_dora,
        base_model_name_or_path=model.config._name_or_path,
        task_type="CAUSAL_LM",
    )
    inject(model, settings)
    settings.target_modules = set(target_modules)  # peft shortens a long list in a way of its own


def names_for_peft(layers: list[Linear], chosen: dict[str, list[str]]) -> list[str]:
    """The `target_modules` of the chosen ones of a model's linear layers. `chosen`: ends of names by part.

    peft takes every layer whose name has one of these ends. Where one that is to have no adapter has it, too, whole
    names are told: the MLPs of Qwen2.5-VL's tower are named like those of its language model.
    """
    adapted = [layer for layer in layers if layer.end in chosen[layer.part]]
    others = [layer.name for layer in layers if layer.end not in chosen[layer.part]]
    names = {}
    for layer in adapted:
        is_clear = not any(name.endswith(f".{layer.end}") for name in others)
        names[layer.end if is_clear else layer.name] = True
    return list(names)


def inject(model, settings) -> None:
    """Put peft's adapters into the model, in place and in fp32 (or fp64).

    A's values are random, drawn from torch's global generator.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied heads, which no adapter touches here
        import_peft().inject_adapter_in_model(settings, model)
    wide = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(wide)


def has_adapters(model) -> bool:
    """Whether a model of transformers has adapters, or the one in a PackedLoss."""
    return hasattr(model, "peft_config") or hasattr(getattr(model, "model", None), "peft_config")


def frozen_parameters(model) -> list:
    """The weights that lie under adapters; an empty list for a model without adapters."""
    adapted = has_adapters(model)
    return [parameter for parameter in model.parameters() if adapted and not parameter.requires_grad]


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


def quantise(model, device) -> None:
    """Quantise the linear layers of the language model to NF4 with doubly quantised scales (QLoRA, arXiv 2305.14314).

    In place: one layer at a time is moved to `device`. Embedding, head, norms, tower and merger stay as they are.
    """
    bitsandbytes = import_bitsandbytes()
    for owner, name, linear in quantisable(model):
        four_bit = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        four_bit.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        if linear.bias is not None:
            four_bit.bias = linear.bias
        # Its kernel for CPUs with AVX512-BF16 rounds to bf16 in evaluation, and repacks the weights for good.
        four_bit.support_avx512bf16_for_cpu = False
        setattr(owner, name, four_bit.to(device))
    model.is_loaded_in_4bit = True  # by this peft knows that the model is quantised


def round_to_nf4(model) -> None:
    """Round the weights of the same linear layers to what NF4 can hold, and keep them in their own precision."""
    functional = import_bitsandbytes().functional
    for _, _, linear in quantisable(model):
        packed, state = functional.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
        linear.weight.data = functional.dequantize_4bit(packed, state).to(linear.weight.dtype)


def quantisable(model) -> list[tuple]:
    """(module, name of its linear layer, the layer) of the language model's layers."""
    import torch

    found = []
    for owner in model.model.language_model.layers.modules():
        for name, child in owner.named_children():
            if isinstance(child, torch.nn.Linear):
                found.append((owner, name, child))
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def is_adapter(path: str) -> bool:
    """Whether this folder or hub name is an adapter in peft's format."""
    return (Path(path) / "adapter_config.json").is_file() if Path(path).is_dir() else is_adapter_on_hub(path)


@cache
def is_adapter_on_hub(name: str) -> bool:
    """Whether a hub name is an adapter. The hub is asked once for each name, as the answer may cost a request."""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # the hub could not have such a name
        return False


def base_of(path: str) -> str:
    """The model that an adapter was trained on; anything else is its own base."""
    return read_settings(path).base_model_name_or_path if is_adapter(path) else path


def read_settings(path: str):
    """An adapter's LoraConfig. Raises UserError where the file cannot be read or is of another kind of adapter."""
    peft = import_peft()
    try:
        settings = peft.PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its adapter_config.json cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"{path}: an adapter of type {settings.peft_type}; LoRA and DoRA can be opened here")
    return settings


def quantised_in_training(path: str) -> bool:
    """Whether the base of this adapter was kept in NF4 while it was trained, by its training_config.json."""
    return run_folder.read_settings(path).get("quantize") == "nf4"


def load_adapters(model, path: str) -> None:
    """Put the adapters in `path` beside the layers of their base model, as they were trained. Raises UserError."""
    from safetensors import SafetensorError

    peft = import_peft()
    settings = read_settings(path)
    settings.inference_mode = True
    try:
        saved = peft.utils.load_peft_weights(path, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: its adapter weights cannot be read ({str(error).splitlines()[0]})") from None
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    unfit = f"{path}: its adapters do not fit {settings.base_model_name_or_path}"
    try:
        new_tokens.take_rows(model, settings, weights)
    except (AttributeError, LookupError, RuntimeError) as error:
        raise UserError(f"{unfit} ({str(error).splitlines()[0]})") from None
    inject(model, settings)
    expected = peft.get_peft_model_state_dict(model)
    wrong = sorted(set(weights) ^ set(expected))
    wrong += [key for key in set(weights) & set(expected) if weights[key].shape != expected[key].shape]
    if wrong:
        raise UserError(f"{unfit} ({wrong[0]})")
    peft.set_peft_model_state_dict(model, weights)


def write_adapters(model, weights: dict, directory: Path) -> None:
    """adapter_model.safetensors and adapter_config.json from whole adapter tensors by name, for plain peft."""
    from safetensors.torch import save_file

    # never the embedding, which peft would add where it has other rows than the base's: the new rows are enough
    saved = import_peft().get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    settings = model.peft_config["default"]
    rows, settings.trainable_token_indices = new_tokens.rows_for_peft(model, weights)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in {**saved, **rows}.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.inference_mode = True  # whoever opens the adapter wants answers
    settings.target_modules = sorted(settings.target_modules)  # a set has no order of its own
    settings.save_pretrained(directory)


def merge(model) -> None:
    """Add the adapters to the weights beside them, in fp32, and remove them: what is left is a plain model."""
    import torch
    from peft.tuners.lora import LoraLayer

    # A list, because the loop changes what it walks over.
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in adapted:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        layer.merge(safe_merge=True)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, base.to(dtype))
    del model.peft_config
