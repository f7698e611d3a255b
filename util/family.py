"""What differs between the families of Qwen's vision-language models before weights are used, and what is refused.

All of them read patches of frames, merge four into a token, and give each token three positions. How large a patch is,
how a video's time is told, how a box is written and in what order the tower wants its patches, stands here. What the
tower and the layers do with them, their own modules say (loss.py, packed_layers.py).

    Qwen2-VL     patches of 14 pixels; the time axis counts pairs of frames                       arXiv 2409.12191
    Qwen2.5-VL   the time axis counts half seconds; most blocks see windows of 4 x 4 tokens       arXiv 2502.13923
    Qwen3-VL     patches of 16 pixels; each pair of frames has its time in words before it        arXiv 2511.21631
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    name: str
    processor: str  # the class of its processor in transformers
    patch: int = 14  # pixels, the side of a patch
    tokens_per_second: float = 0.0  # steps of a video's time axis in a second; 0: one for each pair of frames
    timestamps: bool = False  # whether each pair of frames stands by itself, its time in words before it
    window: int = 0  # side, in tokens, of the windows that most of the tower's blocks see; 0: none
    boxes: str = "marks"  # how a box is written: data/boxes.py
    default_system: str = "You are a helpful assistant."  # what the template writes where there is no system message
    counts_all_frames: bool = False  # whether the released video budget is one of all frames together
    nested_files: bool = False  # whether its config.json has `text_config`, and the video processor a file of its own
    # Patches of a picture at which the released tower's attention costs as much as its matrix products, which work is
    # dealt by. 7,680 is 6 times the width of a tower whose MLP is 4 times as wide.
    even_patches: int = 7700

    @property
    def has_clock(self) -> bool:
        """Whether the model is told when a video's frames were taken, and not only in which order."""
        return bool(self.tokens_per_second or self.timestamps)


FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", "Qwen2VLProcessor"),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLProcessor",
        tokens_per_second=2.0,
        window=4,
        boxes="pixels",
        even_patches=62_000,  # 4 of 32 blocks see whole pictures
    ),
    "qwen3_vl": Family(
        "Qwen3-VL",
        "Qwen3VLProcessor",
        patch=16,
        timestamps=True,
        boxes="thousandths",
        default_system="",
        counts_all_frames=True,
        nested_files=True,
        even_patches=6400,  # widths of 1024 (2B, 4B) and 1152 (8B)
    ),
}
QWEN2_VL = "qwen2_vl"
KNOWN: dict[str, Any] = {}  # by what they are made from: see known_model
WINDOW = max(family.window for family in FAMILIES.values())  # of those that have windows all are of one side

# What people may try instead, and why it is not trained here.
REFUSED = {
    "qwen2_5_omni": "it hears and speaks, which this loop does not train",
    "qwen3_omni_moe": "it hears and speaks, which this loop does not train",
    "qwen3_vl_moe": "its layers are mixtures of experts, which this loop does not train",
    "qwen3_5": "its layers have gated DeltaNet, whose state would run from one packed sample into the next",
    "qwen3_5_moe": "its layers have gated DeltaNet, whose state would run from one packed sample into the next",
}


def model_type_of_processor(name: str) -> str:
    """The family whose processor has this class, by its key; "" for none."""
    return next((key for key, one in FAMILIES.items() if one.processor == name), "")


def trained_here() -> str:
    """What this project trains, as the end of a message."""
    return "this project trains " + ", ".join(f"{one.name} ({key})" for key, one in FAMILIES.items())


def problem_of(config: Any) -> str:
    """What a model's config has that this project was not proved for, as the end of a sentence; "" for none."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = f": {REFUSED[config.model_type]}" if config.model_type in REFUSED else ""
        return f"is a {config.model_type} model{reason}; {trained_here()}"
    if quantised := getattr(config, "quantization_config", None):
        kind = quantised.get("quant_method", "unknown")
        return (
            f"is quantised already ({kind}), and what is rounded cannot be trained; take the release that is not, with "
            "--quantize nf4 for 4 bits under adapters"
        )
    tower = config.vision_config
    found = {
        "patch_size": tower.patch_size,
        "spatial_merge_size": tower.spatial_merge_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "window_size": getattr(tower, "window_size", 0),
        "tokens_per_second": getattr(tower, "tokens_per_second", 0),
    }
    proved = {
        "patch_size": family.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": family.window * 2 * family.patch,
        "tokens_per_second": family.tokens_per_second,
    }
    wrong = [f"{name} {found[name]} (not {proved[name]:g})" for name in proved if found[name] != proved[name]]
    return f"is a {family.name} whose vision tower has {', '.join(wrong)}" if wrong else ""


def new_model(config: Any) -> Any:
    """A model of a config, its weights random.

    It has a config of its own. `config` may be that of a model which is prepared for training, whose attention
    (util/attention.py) transformers would look for on the hub.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # takes seconds, which data workers need not spend

    own = copy.deepcopy(config)
    for part in (own, own.text_config, own.vision_config):
        part._attn_implementation = "sdpa"
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(own)](own)


def bare_model(config: Any) -> Any:
    """The same without memory for weights."""
    with torch.device("meta"):
        return new_model(config)


def known_model(config: Any) -> Any:
    """The same, made once for all who only look at it: its modules and parameters are not to be changed."""
    # All that its modules are made from. A config cannot be a key: it has no hash, and may change.
    parts = config.text_config, config.vision_config
    key = f"{config.model_type} {config.tie_word_embeddings} {[vars(part) for part in parts]}"
    if key not in KNOWN:
        KNOWN[key] = bare_model(config)
    return KNOWN[key]


def window_order(t: int, h: int, w: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """The tokens (t * h * w,) of t frames of h x w tokens, window after window, and how many each window has.

    Within a window they stand row by row; frames stay in their order, so that a frame's tokens stay together. Windows
    are `side` tokens wide and high; those at the right and lower edge are cut. Source: Qwen2.5-VL report, arXiv
    2502.13923, section 2.1.1; `get_window_index` of the released model.
    """
    row = torch.arange(h)[:, None]
    column = torch.arange(w)
    windows_in_a_row = -(-w // side)
    window = row // side * windows_in_a_row + column // side  # (h, w): the window that each token lies in
    order = window.flatten().argsort(stable=True)
    sizes = torch.bincount(window.flatten()).tolist()
    return (torch.arange(t)[:, None] * h * w + order).flatten(), sizes * t


def window_squares(h: Any, w: Any) -> Any:
    """The squares of the patches in each window, summed up over a frame of h x w patches: numbers, or arrays of them.

    Windows that are cut at an edge count for what is left of them. (The square of a window's patches is that of its
    rows times that of its columns, so that the sums over rows and over columns can be made apart.)
    """
    side = 2 * WINDOW  # patches
    return (h // side * side**2 + (h % side) ** 2) * (w // side * side**2 + (w % side) ** 2)


def stretched(table: nn.Embedding, place: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """A learned square of embeddings stretched over each picture: (P, D), bilinear, corner on corner.

    `place` (P, 2): row and column of each patch; `size` (P, 2): rows and columns of the picture that it lies in.
    Source: the released Qwen3-VL, `fast_pos_embed_interpolate`.
    """
    side = round(table.num_embeddings**0.5)
    wide = torch.promote_types(table.weight.dtype, torch.float32)
    exact = place.to(wide) * (side - 1) / (size - 1).clamp(min=1)  # (P, 2), in rows and columns of the square
    low = exact.floor().long()
    high = (low + 1).clamp(max=side - 1)
    of_high = exact - low
    of_low = 1 - of_high
    embedded = torch.zeros((), dtype=wide, device=place.device)
    for rows, of_rows in ((low[:, 0], of_low[:, 0]), (high[:, 0], of_high[:, 0])):
        for columns, of_columns in ((low[:, 1], of_low[:, 1]), (high[:, 1], of_high[:, 1])):
            embedded = embedded + table(rows * side + columns) * (of_rows * of_columns)[:, None]
    return embedded
