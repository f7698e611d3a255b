"""The work of a step: exact floating-point operations from the model's config, without what is computed twice."""

import re
from collections.abc import Iterable

import torch

from util.adapters import lora, new_tokens
from util.adapters.settings import untrained_parts
from util.collator import Batch
from util.config import Config
from util.cost.sizes import Columns
from util.dataset import Size

# Dense bf16 peak by NVIDIA's datasheets, TFLOP/s, for names as torch.cuda.get_device_name gives them: the first pattern
# that is found counts. A card's other forms (PCIe, NVL) have other peaks, and a part of a card (MIG) has none of its
# own. What is not certain is left out: an mfu that is wrong is worse than none.
PEAK_TFLOPS = {
    r"\bMIG\b": None,
    r"\bH[18]00 PCIe\b": 756,
    r"\bH[12]00 NVL\b": 835,
    r"\bH100 .*HBM3\b": 989,  # SXM
    r"\b(H200|GH200)\b": 989,
    r"\bH800$": 989,
    r"\bB200\b": 2250,
    r"\bGB200\b": 2500,
    r"\bA[18]00\b": 312,  # SXM and PCIe alike
    r"\bL40S\b": 362,
}


def forward_flops(config, size: Size | Columns) -> dict[str, float]:
    """Floating-point operations of one sample's forward pass, by part (a multiply-add counts as two).

    For the columns of n samples each value is an array (n,).
    """
    text, tower = config.text_config, config.vision_config
    width, layers = text.hidden_size, text.num_hidden_layers
    key_value = width // text.num_attention_heads * text.num_key_value_heads
    layer_weights = 2 * width * width + 2 * width * key_value + 3 * width * text.intermediate_size
    language = 2 * layer_weights * layers * size.tokens
    language += 2 * width * layers * size.tokens**2  # causal: half of 4 s^2 D
    language += 2 * width * text.vocab_size * size.supervised
    patch_weights = 3 * tower.temporal_patch_size * tower.patch_size**2 * tower.embed_dim
    block_weights = (4 + 2 * tower.mlp_ratio) * tower.embed_dim**2
    vision = 2 * (patch_weights + block_weights * tower.depth) * size.patches
    vision += 4 * tower.embed_dim * tower.depth * size.squares
    merged = tower.embed_dim * tower.spatial_merge_size**2
    merger = 2 * (merged * merged + merged * width) * (size.patches / tower.spatial_merge_size**2)
    return {"vision": vision, "merger": merger, "language_model": language}


def training_flops(model_config, sizes: Iterable[Size | Columns], config: Config) -> float:
    """Floating-point operations of forward and backward passes; of columns of n samples an array (n,).

    A trained part counts 3 times its forward pass: once forward, and backward once each for the gradients of its inputs
    and of its weights. A frozen part counts once, or twice where gradients pass through it, to a part before it or to
    adapters within it. The adapters themselves count 3 times.
    """
    untrained = untrained_parts(config)
    factors = {}
    gradients_pass = False
    for part in ("vision", "merger", "language_model"):
        has_trained_weights = part not in untrained and not config.lora_rank
        gradients_pass = gradients_pass or part not in untrained
        if has_trained_weights:
            factors[part] = 3
        elif gradients_pass:
            factors[part] = 2
        else:
            factors[part] = 1
    adapters = lora.count_adapters(model_config, config) if config.lora_rank else {}
    rows = new_tokens.count_rows(model_config, config) / (1 if model_config.tie_word_embeddings else 2)  # of the head
    merge = model_config.vision_config.spatial_merge_size**2
    total = 0.0
    for size in sizes:
        forward = forward_flops(model_config, size)
        total = total + sum(factor * forward[part] for part, factor in factors.items())
        of_part = {"vision": size.patches, "merger": size.patches / merge, "language_model": size.tokens}
        total = total + sum(6 * number * of_part[part] for part, number in adapters.items())
        total = total + 6 * rows * size.supervised
    return total


def kept_flops(model_config, batches: Iterable[Batch], config: Config) -> float:
    """Of what `training_flops` counts, what batches did not compute as the features of a frozen tower were kept."""
    parts = [part for part in ("vision", "merger") if part in untrained_parts(config)]
    total = 0.0
    for batch in batches:
        forward = forward_flops(model_config, Size(0, 0, batch.kept_grids))
        total += sum(forward[part] for part in parts)
    return total


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    tflops = next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, name)), None)
    return tflops and tflops * 1e12
