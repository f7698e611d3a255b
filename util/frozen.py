"""A frozen vision tower gives the same for an image in every epoch: what is kept of it, under which name, how much.

Kept is what the frozen part gives: visual tokens (V, D) where the merger is not trained either, else the rows that the
merger takes (P, width), which are several times as many bytes. Letters in shapes are those of collator.py, and D is
the language model's hidden size.
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
import transformers
from torch.distributed.tensor import DTensor

from util import ranks
from util.adapters.settings import untrained_parts
from util.config import Config
from util.cost import disk
from util.cost.shapes import number_of_deeper, shapes_of
from util.cost.sizes import Sizes
from util.data.features import FeatureWriter
from util.data.media import MediaReader
from util.loss import PackedLoss
from util.model import load_config
from util.tensors import part_of, run_parameters
from util.vision import MERGE

VERSION = 1  # raise it when the code of the tower in loss.py gives other rows for the same weights


def kept_part(config: Config, model_config) -> list[str]:
    """The frozen parts that need not run again: vision, or vision and merger; [] where nothing is kept."""
    untrained = untrained_parts(config)
    if not is_asked_for(config) or has_deepstack(model_config):
        return []
    return [part for part in ("vision", "merger") if part in untrained]


def is_asked_for(config: Config) -> bool:
    """Whether what a tower gives is to be kept, and is the same in every epoch."""
    return bool(config.cache_dir) and config.keep_features != "off" and "vision" in untrained_parts(config)


def has_deepstack(model_config) -> bool:
    """Whether layers of the language model take what several blocks of the tower give (Qwen3-VL). That is several times
    as much as what one gives, and it is not kept."""
    return number_of_deeper(model_config) > 0


def keep_features(model: PackedLoss, reader: MediaReader, config: Config) -> None:
    """From now on what a frozen tower gives is kept in `--cache_dir`, and taken from there. All ranks must call."""
    if reader.features is None or not (parts := kept_part(config, model.model.config)):
        return
    reader.features.open(identity(model, parts))
    model.kept = FeatureWriter(reader.features, after_merger="merger" in parts)


def identity(model: PackedLoss, parts: list[str]) -> str:
    """64 hexadecimal digits from everything but the pixels that decides what the frozen parts give.

    The weights are hashed as they compute, whatever precision they are kept in. Of the settings those count that change
    a last bit, so that a run equals one that keeps nothing as far as two runs can be equal.
    """
    tower = model.model.config.vision_config
    settings = {name: value for name, value in tower.to_dict().items() if name not in ("dtype", "torch_dtype")}
    scale = model.pixel_scale.tolist(), model.pixel_shift.tolist()
    facts = [VERSION, torch.__version__, transformers.__version__, str(model.dtype), model.pixel_scale.device.type,
             tower._attn_implementation, parts, scale, settings]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in sorted(run_parameters(model).items()):
        if part_of(name) not in parts:
            continue
        # Of several ranks each has a share, and all gather it together; one of them hashes.
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if ranks.is_first():
            digest.update(f"{name.rpartition('.visual.')[2]} {list(whole.shape)}".encode())
            values = whole.detach().to(model.dtype).cpu().contiguous().flatten()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return str(ranks.from_first(digest.hexdigest()))


# ---- how much that is -----------------------------------------------------------------------------------------------


def feature_bytes(model_config, sizes: Iterable[Sizes], parts: list[str], dtype: torch.dtype) -> int:
    """Bytes of the features of all images and videos of some data, each counted as often as samples show it."""
    patches = sum(int(of_data.usable_grids[:, :3].prod(axis=1, dtype=np.int64).sum()) for of_data in sizes)
    numbers = patches * shapes_of(model_config).block.width
    if "merger" in parts:
        numbers = patches // MERGE**2 * model_config.text_config.hidden_size
    return numbers * dtype.itemsize


def features_in_words(
    reader: MediaReader, path: str, config: Config, dtype: torch.dtype, sizes: Iterable[Sizes]
) -> dict[str, str]:
    """A line of the plan: what is kept of a frozen tower, and whether there is room for it."""
    if not is_asked_for(config):
        return {}
    model_config = load_config(path, config)
    if has_deepstack(model_config):
        return {"features": "the output of the frozen tower is not kept, as layers of this model take that of several "
                "of its blocks: it is computed in every epoch"}  # fmt: skip
    parts = kept_part(config, model_config)
    needed = feature_bytes(model_config, sizes, parts, dtype)
    if not needed:
        return {}
    folder = reader.features
    assert folder is not None
    frozen = "tower and merger" if "merger" in parts else "tower"
    text = (
        f"the output of the frozen {frozen}, up to {disk.gigabytes(needed)}, is kept in {config.cache_dir}: from the "
        "second epoch on it is read and not computed"
    )
    # What lies there already may be these very features, or goes to make room for them.
    room = min(folder.max_bytes, folder.bytes_in_use() + disk.free_bytes(folder.directory))
    if needed > room:
        text += (
            f"; there is room for {disk.gigabytes(room)} (--cache_max_gib {config.cache_max_gib:g}, or the disk): "
            "what does not fit is computed each time"
        )
    return {"features": text}
