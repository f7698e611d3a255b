"""How large a model's matrices are, asked of its own modules: no formula of a family stands in this room.

All blocks of a tower are alike, and so are all layers of a language model. One of each, with everything that a model
has once, is made without memory for its weights; that takes some hundredths of a second and is done once.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from util.family import bare_model
from util.packed_layers import LAYER, Kind, kind_of_block

KNOWN: dict[tuple, "Shapes"] = {}  # by all that they follow from: see key_of
UNASKED = ("num_hidden_layers", "depth", "vocab_size")  # what a stage of a pipeline has of its own (layouts.py)


@dataclass(frozen=True)
class Repeated:
    """A block of the tower, or a layer of the language model."""

    matrices: dict[str, tuple[int, int]]  # (inputs, outputs) of its linear modules, by their names within it
    width: int  # of the rows that go in and come out
    queries: int  # how wide the queries of all heads are together: not always `width`
    keys: int  # and the keys, or the values
    inner: int  # between the MLP's matrices
    is_gated: bool  # whether its MLP has a factor beside what is activated
    has_head_norms: bool  # whether queries and keys are normalised

    @property
    def weights(self) -> int:
        """Of its matrices."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())


@dataclass(frozen=True)
class Shapes:
    """One of each of a model's modules."""

    block: Repeated
    layer: Repeated
    pixels: int  # numbers of a video's patch
    mergers: int  # the merger and, of Qwen3-VL, those of deepstack
    merger_weights: int  # of the matrices of all of them


def shapes_of(model_config: Any) -> Shapes:
    key = key_of(model_config)
    if key not in KNOWN:
        text = copy.copy(model_config.text_config)
        text.vocab_size, text.pad_token_id = 1, None  # of what is asked here nothing depends on it
        asked = copy.copy(model_config)
        asked.text_config = text
        KNOWN[key] = looked_at(one_of_each(asked))
    return KNOWN[key]


def key_of(model_config: Any) -> tuple:
    """All of a config that shapes follow from. The config itself cannot be a key: it may change, and has no hash."""
    found: list[object] = [model_config.model_type, number_of_deeper(model_config)]
    for part in (model_config.text_config, model_config.vision_config):
        facts = vars(part).items()
        found += [value for name, value in facts if isinstance(value, int | float | str) and name not in UNASKED]
    return tuple(found)


def number_of_deeper(model_config: Any) -> int:
    """How many of the language model's first layers are given visual tokens of their own (Qwen3-VL's deepstack)."""
    return len(getattr(model_config.vision_config, "deepstack_visual_indexes", ()))


def whole_blocks(tower: Any) -> int:
    """How many of the tower's blocks see a whole image or frame; the others see windows of it. `tower`: its config."""
    whole = getattr(tower, "fullatt_block_indexes", range(tower.depth))
    return sum(number in whole for number in range(tower.depth))


def head_width(text: Any) -> int:
    """Of a head of the language model; `text`: its config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def one_of_each(model_config: Any) -> Any:
    """A model of this config with one block and one layer, whose weights take no memory."""
    small = copy.deepcopy(model_config)
    small.text_config.num_hidden_layers = small.vision_config.depth = 1
    if hasattr(small.text_config, "layer_types"):
        small.text_config.layer_types = small.text_config.layer_types[:1]
    return bare_model(small)


def looked_at(model: Any) -> Shapes:
    tower = model.model.visual
    block = tower.blocks[0]
    layer = model.model.language_model.layers[0]
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    merging: list[tuple[int, int]] = []
    for merger in mergers:
        merging += matrices_of(merger).values()
    attention = layer.self_attn
    return Shapes(
        block=repeated(block, kind_of_block(block), block.attn.proj.in_features, block.attn.proj.in_features),
        layer=repeated(layer, LAYER, attention.q_proj.out_features, attention.k_proj.out_features),
        pixels=math.prod(tower.patch_embed.proj.weight.shape[1:]),
        mergers=len(mergers),
        merger_weights=sum(inputs * outputs for inputs, outputs in merging),
    )


def repeated(module: nn.Module, kind: Kind, queries: int, keys: int) -> Repeated:
    matrices = matrices_of(module)
    inner, width = matrices[kind.last_product]
    return Repeated(
        matrices=matrices,
        width=width,
        queries=queries,
        keys=keys,
        inner=inner,
        is_gated="mlp.gate_proj" in matrices,
        has_head_norms=hasattr(module.get_submodule(kind.attention), "q_norm"),
    )


def matrices_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear modules in a module, by name."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            found[name] = part.in_features, part.out_features
    return found
