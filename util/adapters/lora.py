"""Low-rank adapters (LoRA, DoRA) through peft, over weights of 4 bits if asked (QLoRA, NF4 through bitsandbytes).

The model's weights stay as they are; each chosen linear layer W gets two small matrices and computes
W x + (alpha / rank) B A x (arXiv 2106.09685). A and B alone are trained, saved and exported, in peft's own format.
"""

import logging
import warnings
from functools import cache
from pathlib import Path

from util import run_folder
from util.adapters.settings import VISION_TARGETS, Target, targets
from util.command_line import UserError

NF4_BLOCK, NF4_GROUP = 64, 256  # weights that share a scale, and scales that share one


# ---- counting -------------------------------------------------------------------------------------------------------


def linear_layers(model_config) -> dict[str, dict[str, tuple[int, int, int]]]:
    """(inputs, outputs, how many) of the linear layers that adapters know, by part and name."""
    text, tower = model_config.text_config, model_config.vision_config
    width, inner, depth = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    key_value = width // text.num_attention_heads * text.num_key_value_heads
    embed, wide = tower.embed_dim, int(tower.embed_dim * tower.mlp_ratio)
    merged = embed * tower.spatial_merge_size**2
    shapes = {
        "vision": [(embed, 3 * embed), (embed, embed), (embed, wide), (wide, embed)],
        "merger": [(merged, merged), (merged, width)],
        "language_model": [(width, width), (width, key_value), (width, key_value), (width, width),
                           (width, inner), (width, inner), (inner, width)],
    }  # fmt: skip
    names = {**VISION_TARGETS, "language_model": Target.__args__}
    count = {"vision": tower.depth, "merger": 1, "language_model": depth}
    return {
        part: {name: (*shape, count[part]) for name, shape in zip(names[part], shapes[part], strict=True)}
        for part in shapes
    }


def count_adapters(model_config, config) -> dict[str, int]:
    """Parameters of the adapters, by part: rank x (inputs + outputs) for each layer, and its outputs under DoRA."""
    shapes, chosen = linear_layers(model_config), targets(config)
    each = {part: [shapes[part][name] for name in names] for part, names in chosen.items()}
    return {
        part: sum(count * (config.lora_rank * (i + o) + (o if config.lora_dora else 0)) for i, o, count in layers)
        for part, layers in each.items()
    }


def frozen_bytes(model_config, config, total: int, itemsize: int) -> float:
    """What the model's `total` weights take beside adapters, in the precision of compute or, if so asked, in NF4."""
    if config.quantize == "none":
        return total * itemsize
    quantised = sum(i * o * count for i, o, count in linear_layers(model_config)["language_model"].values())
    return (total - quantised) * itemsize + quantised * (0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_GROUP))


# ---- a model with adapters ------------------------------------------------------------------------------------------


def import_peft():
    """peft, or UserError. What it imports on its way says things that are no concern of a user here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError:
        raise UserError("adapters need peft: pip install peft") from None
    return peft


def import_bitsandbytes():
    """bitsandbytes, or UserError."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that it can do without
    try:
        import bitsandbytes
    except ImportError:
        raise UserError("--quantize nf4 needs bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes


def add_adapters(model, config) -> None:
    """Freeze the weights and put adapters beside the chosen layers; B is zero, so that nothing changes yet.

    The adapters are kept in fp32 (fp64 on request) like all that is trained. Paths of modules stay as they were, but an
    adapted layer's weight is now at `base_layer.weight`.
    """
    peft = import_peft()
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=[name for names in targets(config).values() for name in names],
        use_dora=config.lora_dora,
        base_model_name_or_path=model.config._name_or_path,
        task_type="CAUSAL_LM",
    )
    inject(model, settings)


def inject(model, settings) -> None:
    """peft's adapters into the model, in place and in fp32 (fp64); random numbers come from torch's generator."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied heads, which no adapter touches here
        import_peft().inject_adapter_in_model(settings, model)
    wide = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(wide)


def has_adapters(model) -> bool:
    return hasattr(model, "peft_config")


def frozen_parameters(model) -> list:
    """What lies under adapters; nothing of a model without them."""
    adapted = has_adapters(getattr(model, "model", model))
    return [parameter for parameter in model.parameters() if adapted and not parameter.requires_grad]


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


def quantise(model, device) -> None:
    """The linear layers of the language model in NF4 with doubly quantised scales (QLoRA, arXiv 2305.14314), in place
    and on `device`; the embedding, head, norms, tower and merger stay as they are. A layer at a time is moved."""
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
    model.is_loaded_in_4bit = True  # what peft goes by


def round_to_nf4(model) -> None:
    """Give the same linear layers the values that NF4 keeps of them, in plain form."""
    functional = import_bitsandbytes().functional
    for _, _, linear in quantisable(model):
        packed, state = functional.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
        linear.weight.data = functional.dequantize_4bit(packed, state).to(linear.weight.dtype)


def quantisable(model) -> list[tuple]:
    """(module, name of its linear layer, the layer) of the language model's layers."""
    import torch

    layers = model.model.language_model.layers
    return [
        (owner, name, child)
        for owner in layers.modules()
        for name, child in owner.named_children()
        if isinstance(child, torch.nn.Linear)
    ]


# ---- files ----------------------------------------------------------------------------------------------------------


def is_adapter(path: str) -> bool:
    """Is this folder or hub name an adapter in peft's format?"""
    return (Path(path) / "adapter_config.json").is_file() if Path(path).is_dir() else is_adapter_on_hub(path)


@cache
def is_adapter_on_hub(name: str) -> bool:
    """Asked once: the answer may cost a request."""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # no name that a hub could have
        return False


def base_of(path: str) -> str:
    """The model that an adapter was trained on; anything else is its own base."""
    return read_settings(path).base_model_name_or_path if is_adapter(path) else path


def read_settings(path: str):
    """An adapter's LoraConfig. Raises UserError for a file that is none."""
    peft = import_peft()
    try:
        settings = peft.PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its adapter_config.json cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"{path}: an adapter of type {settings.peft_type}; LoRA and DoRA can be opened here")
    return settings


def quantised_in_training(path: str) -> bool:
    """Was the base of this adapter kept in NF4 while it was trained, as its training_config.json says?"""
    return run_folder.read_settings(path).get("quantize") == "nf4"


def load_adapters(model, path: str) -> None:
    """Put the adapters in `path` beside the layers of their base model, as they were trained. Raises UserError."""
    from safetensors import SafetensorError

    peft = import_peft()
    settings = read_settings(path)
    settings.inference_mode = True
    inject(model, settings)
    try:
        saved = peft.utils.load_peft_weights(path, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: its adapter weights cannot be read ({str(error).splitlines()[0]})") from None
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    expected = peft.get_peft_model_state_dict(model)
    wrong = sorted(set(weights) ^ set(expected))
    wrong += [key for key in set(weights) & set(expected) if weights[key].shape != expected[key].shape]
    if wrong:
        raise UserError(f"{path}: its adapters do not fit {settings.base_model_name_or_path} ({wrong[0]})")
    peft.set_peft_model_state_dict(model, weights)


def write_adapters(model, weights: dict, directory: Path) -> None:
    """adapter_model.safetensors and adapter_config.json from whole adapter tensors by name, for plain peft."""
    from safetensors.torch import save_file

    saved = import_peft().get_peft_model_state_dict(model, state_dict=weights)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in saved.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = model.peft_config["default"]
    settings.inference_mode = True  # who opens it wants answers
    settings.target_modules = sorted(settings.target_modules)  # a set has no order of its own
    settings.save_pretrained(directory)


def merge(model) -> None:
    """Add the adapters to the weights beside them, in fp32, and take them out: a plain model is left, in its dtype."""
    import torch
    from peft.tuners.lora import LoraLayer

    for name, layer in [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        layer.merge(safe_merge=True)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, base.to(dtype))
    del model.peft_config
