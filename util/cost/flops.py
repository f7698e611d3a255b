"""The work of a step: exact floating-point operations from the model's config, without what is computed twice."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from util.adapters import lora, new_tokens
from util.adapters.settings import untrained_parts
from util.collator import Batch
from util.config import Config
from util.cost.shapes import shapes_of, whole_blocks
from util.cost.sizes import Columns, Sizes
from util.dataset import Size
from util.vision import MERGE

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
IN_WORDS = {
    "vision": "vision tower",
    "merger": "merger",
    "language_model": "language model",
    "head": "head",
    "adapters": "adapters",
}


def forward_flops(config, size: Size | Columns) -> dict[str, float]:
    """Floating-point operations of one sample's forward pass, by part (a multiply-add counts as two): the language
    model's layers and its head apart, since the head sees supervised tokens alone.

    For the columns of n samples each value is an array (n,).
    """
    shapes = shapes_of(config)
    text, tower = config.text_config, config.vision_config
    language = 2 * shapes.layer.weights * text.num_hidden_layers * size.tokens
    language += attention_flops(config, size)
    head = 2 * text.hidden_size * text.vocab_size * size.supervised
    of_patch = shapes.pixels * shapes.block.width + shapes.block.weights * tower.depth
    whole = whole_blocks(tower)
    seen = whole * size.squares + (tower.depth - whole) * size.window_squares
    vision = 2 * of_patch * size.patches + 4 * shapes.block.queries * seen
    merger = 2 * shapes.merger_weights * (size.patches / MERGE**2)
    return {"vision": vision, "merger": merger, "language_model": language, "head": head}


def attention_flops(config, size: Size | Columns) -> Any:
    """Of the language model's forward pass what grows with the square of the tokens."""
    queries = shapes_of(config).layer.queries
    return 2 * queries * config.text_config.num_hidden_layers * size.tokens**2  # causal: half of 4 s^2 D


def training_flops(model_config, sizes: Iterable[Size | Columns], config: Config) -> float:
    """Floating-point operations of forward and backward passes; of columns of n samples an array (n,)."""
    return sum(work_by_part(model_config, sizes, config).values())


def work_by_part(model_config, sizes: Iterable[Size | Columns], config: Config) -> dict[str, float]:
    """Of forward and backward passes the floating-point operations of each part; of columns of n samples each value is
    an array (n,).

    A trained part counts 3 times its forward pass: once forward, and backward once each for the gradients of its inputs
    and of its weights. A frozen part counts once, or twice where gradients pass through it, to a part before it or to
    adapters within it. The adapters themselves, and rows of new tokens beside them, count 3 times, as a part of their
    own.
    """
    factors = part_factors(config)
    adapters = lora.count_adapters(model_config, config) if config.lora_rank else {}
    rows = new_tokens.count_rows(model_config, config) / (1 if model_config.tie_word_embeddings else 2)  # of the head
    work: dict[str, Any] = dict.fromkeys(factors, 0.0)
    if config.lora_rank:
        work["adapters"] = 0.0
    for size in sizes:
        for part, operations in forward_flops(model_config, size).items():
            work[part] = work[part] + factors[part] * operations
        of_part = {"vision": size.patches, "merger": size.patches / MERGE**2, "language_model": size.tokens}
        for part, number in adapters.items():
            work["adapters"] = work["adapters"] + 6 * number * of_part[part]
        if rows:
            work["adapters"] = work["adapters"] + 6 * rows * size.supervised
    return work


def part_factors(config: Config) -> dict[str, int]:
    """How many times its forward pass a part counts in training."""
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
    factors["head"] = factors["language_model"]  # it is frozen with it
    return factors


def shares(work: dict[str, float]) -> dict[str, float]:
    """What part of all operations each part is; of none, none."""
    total = sum(work.values())
    return {part: operations / total for part, operations in work.items()} if total else {}


def shares_in_words(work: dict[str, float]) -> str:
    """`71 % vision tower, 24 % language model, 5 % head`, the largest first; what rounds to nothing is left out."""
    found = sorted(shares(work).items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * share:.0f} % {IN_WORDS[part]}" for part, share in found if share >= 0.005)


def epoch_work(model_config, sizes: Sizes, samples: np.ndarray, config: Config) -> dict[str, float]:
    """The work of training once on these of all samples, by part."""
    work = work_by_part(model_config, [sizes.columns()], config)
    return {part: float(np.broadcast_to(of_samples, len(sizes))[samples].sum()) for part, of_samples in work.items()}


def without_kept(work: dict[str, float], model_config, batches: Iterable[Batch], config: Config) -> dict[str, float]:
    """Work by part, less what batches did not compute as the features of a frozen tower were kept."""
    left = dict(work)
    for batch in batches:
        forward = forward_flops(model_config, Size(0, 0, batch.kept_grids))
        for part in ("vision", "merger"):
            if part in untrained_parts(config):
                left[part] -= forward[part]
    return left


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    tflops = next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, name)), None)
    return tflops and tflops * 1e12
