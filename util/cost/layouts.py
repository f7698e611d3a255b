"""Where the model lies when ranks are laid out along several axes: the weights of each stage and rank, what is gathered
and reduced of them, and the memory of a rank.

The axes are those of util/parallel/layout.py, outermost first: pipeline (each rank has some of the layers), data (each
has samples of its own), context (each has a part of every row), tensor (each has a part of every matrix):

                 first stage       middle stages      last stage         on each of t tensor ranks
    tower        all blocks                                              1 / t of it, but its fused qkv, norms, biases
    merger       all                                                     1 / t
    layers       some              some               some               1 / t, but norms and biases after a sum
    embedding    all                                  (where it is tied) 1 / t of the vocabulary
    norm, head                                        all                1 / t of the vocabulary; the norm whole

The ranks of one stage and tensor place, data x context of them, shard these weights as --sharding says.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from util import compilation
from util.adapters import lora
from util.config import Config
from util.cost import memory
from util.cost.activations import Divided, kept_by
from util.cost.links import GATHER, REDUCE, SCATTER
from util.cost.shapes import number_of_deeper, one_of_each
from util.cost.work import Rows
from util.model import layers
from util.steps import heaviest
from util.tensors import PARTS, part_of

# Linear layers whose outputs tensor parallelism cuts, and those whose inputs it cuts. The tower's fused qkv stays whole
# under its name, as a cut through it would part queries from keys; so do norms, and biases that are added to a sum.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "merger.mlp.0", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj", "attn.proj", "fc2", "merger.mlp.2")


@dataclass(frozen=True)
class Shape:
    """A way to lay out ranks, and the settings that go with it."""

    data: int = 1
    pipeline: int = 1
    context: int = 1
    tensor: int = 1
    sharding: Literal["full", "gradients", "optimizer", "none"] = "full"
    group: int = 1  # ranks that share one copy of the weights of their stage and tensor place
    checkpointing: Literal["none", "selective", "full"] = "none"
    rows: int = 1  # micro-batches of a step on each place of the data axis
    sequence: bool = True  # --sequence_parallel, of tensor ranks

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def of_a_weight(self) -> int:
        """Ranks that compute with the same weights, over which these are sharded or replicated."""
        return self.data * self.context

    @property
    def divided(self) -> Divided:
        """In sequence parallelism norms and residual are divided along the row: as many bytes sent, less kept."""
        return Divided(self.tensor, self.tensor if self.sequence else 1)

    def settings(self, config: Config) -> Config:
        """`config` with what this layout sets; the sizes of tensor and pipeline are no part of it."""
        made = copy.copy(config)  # not dataclasses.replace: thousands are made, and none needs to be checked
        made.sharding = self.sharding
        made.context_parallel_size = self.context
        made.activation_checkpointing = self.checkpointing
        for axis in ("tensor", "pipeline"):  # of these the forecast is told by what a stage has
            setattr(made, f"{axis}_parallel_size", 1)
        return made


# ---- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """What FSDP2 gathers and reduces at once: one layer, or what is left (the root)."""

    shapes: list[tuple[int, ...]]  # of its parameters
    trained: list[bool]  # which of them have gradients
    in_backward: bool  # gradients flow through it, so its weights are needed again
    is_root: bool = False

    @cache  # noqa: B019  (units are few, and live as long as the program)
    def padded(self, group: int, trained_only: bool = False) -> int:
        """Elements after each parameter's first dimension is padded to a multiple of `group`, as FSDP2 does."""
        chosen = (shape for shape, trains in zip(self.shapes, self.trained, strict=True) if trains or not trained_only)
        return sum(-(-shape[0] // group) * group * math.prod(shape[1:]) for shape in chosen)


class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]

    def of_tensor_rank(self, tensor: int) -> tuple[int, ...]:
        """Its shape on each of so many tensor ranks."""
        layer, _, kind = self.name.rpartition(".")
        if layer.endswith(COLUMNS):
            return (-(-self.shape[0] // tensor), *self.shape[1:])
        if layer.endswith(ROWS) and kind == "weight":
            return (self.shape[0], -(-self.shape[1] // tensor))
        return self.shape


@dataclass(eq=False)
class Weights:
    """The parameters of a model from its config: all layers of a kind are alike, so one of each is looked at."""

    block: list[Weight]  # of the tower
    blocks: int
    layer: list[Weight]  # of the language model
    layers: int
    first: list[Weight]  # what is left, on the first stage: patch embedding, merger, embedding
    last: list[Weight]  # and on the last one: norm and head
    tied: list[Weight]  # the embedding, where it is the head too

    @classmethod
    def of(cls, model_config) -> "Weights":
        model = one_of_each(model_config)
        of_layers = [set(layer.parameters()) for layer in layers(model)]
        found = []
        root = []
        for own in of_layers:
            found.append([Weight(name, tuple(p.shape)) for name, p in model.named_parameters() if p in own])
        inside = set().union(*of_layers)
        root = [Weight(name, tuple(p.shape)) for name, p in model.named_parameters() if p not in inside]
        last = [weight for weight in root if "lm_head" in weight.name or "language_model.norm" in weight.name]
        tied = [weight for weight in root if "embed_tokens" in weight.name and model_config.tie_word_embeddings]
        depths = model_config.vision_config.depth, model_config.text_config.num_hidden_layers
        first = [weight for weight in root if weight not in last]
        return cls(found[0], depths[0], found[1], depths[1], first, last, tied)

    @cache  # noqa: B019
    def stage(self, number: int, cut: tuple[int, ...], tensor: int = 1) -> "Stage":
        """One of the stages into which `cut` deals the layers, on one tensor rank."""
        is_first = number == 0
        is_last = number == len(cut) - 1
        root = self.first * is_first + self.last * is_last + self.tied * (is_last and not is_first)
        return Stage(self.block, self.blocks * is_first, self.layer, cut[number], root, tensor)


@dataclass(eq=False)
class Stage:
    """The parameters of a stage: those of its blocks, of its layers, and what is left."""

    block: list[Weight]
    blocks: int
    layer: list[Weight]
    layers: int
    root: list[Weight]
    tensor: int

    @cache  # noqa: B019
    def units(self, frozen: tuple[str, ...] = ()) -> tuple[Unit, ...]:
        """The units of `util.model.shard`: every layer in the order of the forward pass, then the root."""
        # a tower that is not trained has no backward pass: nothing before it is trained either
        block = self.unit(self.block, frozen, in_backward="vision" not in frozen)
        layer = self.unit(self.layer, frozen)
        return (*[block] * self.blocks, *[layer] * self.layers, self.unit(self.root, frozen, is_root=True))

    def unit(self, weights: list[Weight], frozen: tuple[str, ...], in_backward=True, is_root=False) -> Unit:
        shapes = [weight.of_tensor_rank(self.tensor) for weight in weights]
        return Unit(shapes, [part_of(weight.name) not in frozen for weight in weights], in_backward, is_root)

    @cache  # noqa: B019
    def counts(self) -> dict[str, int]:
        """Parameters by part, as memory.count_parameters has them of a whole model."""
        found = dict.fromkeys(PARTS, 0)
        sizes = {"block": 0, "layer": 0}
        for name, weights, times in (
            ("block", self.block, self.blocks),
            ("layer", self.layer, self.layers),
            ("root", self.root, 1),
        ):
            for weight in weights:
                elements = math.prod(weight.of_tensor_rank(self.tensor))
                found[part_of(weight.name)] += times * elements
                if name in sizes and times:
                    sizes[name] += elements
        of_all = self.blocks * sizes["block"] + self.layers * sizes["layer"]
        return {**found, **sizes, "all_layers": of_all}


def units_of(model_config, frozen: tuple[str, ...] = ()) -> tuple[Unit, ...]:
    """The units of a whole model, each on all ranks."""
    return Weights.of(model_config).stage(0, (model_config.text_config.num_hidden_layers,)).units(frozen)


def layers_with_the_tower(model_config) -> int:
    """How many layers the first stage must have: Qwen3-VL adds visual tokens after each of its first layers, which the
    other stages do not have."""
    return max(1, number_of_deeper(model_config))


def cut_stages(
    layer_count: int, stages: int, before: float, layer: float, after: float, of_first: int = 1
) -> tuple[int, ...]:
    """How many layers each stage gets, at least one, so that the costliest stage costs least.

    `before`: the cost of the tower and the merger, which the first stage has too; `layer`: of one layer; `after`: of
    the head, on the last stage; `of_first`: the fewest layers of the first one. Of equals the last one gets a layer, as
    earlier stages hold more rows at a time. Raises ValueError where there are too few layers.
    """
    if stages == 1:
        return (layer_count,)
    counts = [of_first] + [1] * (stages - 1)
    if sum(counts) > layer_count:
        raise ValueError(f"{layer_count} layers cannot be cut into {stages} stages, the first of at least {of_first}")
    costs = [count * layer for count in counts]
    costs[0] += before
    costs[-1] += after
    for _ in range(layer_count - sum(counts)):
        least = min(reversed(range(stages)), key=costs.__getitem__)
        counts[least] += 1
        costs[least] += layer
    return tuple(counts)


# ---- what is communicated of them -----------------------------------------------------------------------------------


def collectives(units: Sequence[Unit], sharding: str, ranks: int, group: int, micro_batch: int, micro_batches: int):
    """What one rank takes part in during one micro-batch (counted from 0): (forward, backward), each a list of
    (collective, unit, elements of the whole tensor, ranks that take part).

    `ranks` compute with these weights and `group` of them share one copy. Rules, with where they come from:
    - weights are gathered for the forward pass, unless they still are (ZeRO-1, `before_backward`);
    - only `full` frees a layer after its forward pass and gathers it again for the backward pass; the root never;
    - gradients are scattered in every micro-batch; ZeRO-1 does so in the last one alone;
    - copies add up their gradients in the last micro-batch (`before_backward`);
    - one rank alone gathers and scatters nothing, and one copy alone adds up nothing (FSDP2).
    """
    is_last = micro_batch == micro_batches - 1
    forward, backward = [], []
    if group > 1 and (sharding != "optimizer" or micro_batch == 0):
        # the root's forward begins first
        gathered = [(GATHER, unit, unit.padded(group), group) for unit in [units[-1], *units[:-1]]]
        forward = [call for call in gathered if call[2]]  # a stage in the middle has no root
    for number, unit in reversed(list(enumerate(units))):
        # While a layer's backward runs, FSDP2 already gathers the layer before it, even one that has none.
        wanted = unit.in_backward or units[number + 1].in_backward
        if group > 1 and sharding == "full" and wanted and not unit.is_root:
            backward.append((GATHER, unit, unit.padded(group), group))
    for unit in units:
        elements = unit.padded(group, trained_only=True)
        if elements and group > 1 and (sharding != "optimizer" or is_last):
            backward.append((SCATTER, unit, elements, group))
        if elements and ranks > group and is_last:
            backward.append((REDUCE, unit, elements // group, ranks // group))
    return forward, backward


def state_bytes(units: Sequence[Unit], group: int) -> float:
    """Weights, gradients and two moments of one rank in fp32, padding included."""
    weights = sum(unit.padded(group) for unit in units)
    return 4 * (weights + 3 * sum(unit.padded(group, trained_only=True) for unit in units)) / group


def update_bytes(units: Sequence[Unit], group: int) -> float:
    """Bytes through HBM of clipping and AdamW: the norm reads gradients (4), scaling reads and writes them (8), the
    fused update reads weights, gradients and both moments (16) and writes all but the gradients (12)."""
    return 40 * sum(unit.padded(group, trained_only=True) for unit in units) / group


# ---- memory ---------------------------------------------------------------------------------------------------------


def in_flight(stage: int, stages: int, rows: int) -> int:
    """Rows of which a stage keeps activations at most: in 1F1B it is so many ahead of its first backward pass."""
    return min(stages - stage, rows)


def config_of_stage(model_config, layer_count: int, is_last: bool, tensor: int):
    """What the forecast asks of a config, for what one rank of a stage has of the model: so many layers, and a part of
    the head's vocabulary, or none."""
    vocabulary = -(-model_config.text_config.vocab_size // tensor) if is_last else 0
    text = changed_copy(model_config.text_config, num_hidden_layers=layer_count, vocab_size=vocabulary)
    return changed_copy(model_config, text_config=text)


def changed_copy(config, **changes):
    """A config of transformers with some values changed, and none of them checked: thousands are made."""
    made = object.__new__(type(config))
    vars(made).update(vars(config) | changes)
    return made


def stage_forecast(
    model_config, config: Config, dtype: torch.dtype, shape: Shape, number: int, cut: tuple[int, ...],
    weights: Weights, rows: Rows, device: torch.device | None = None,
) -> memory.Forecast:  # fmt: skip
    """Bytes by part on a rank of one stage, at the moment of a step that needs most: memory.forecast, for a layout.

    `cut`: the layers of each stage. `rows`: those of the ranks along the data axis.
    """
    is_last = number == len(cut) - 1
    own = config_of_stage(model_config, cut[number], is_last, shape.tensor)
    own.tie_word_embeddings &= number == 0  # on other stages than the first a tied embedding is the head alone
    settings = shape.settings(config)
    counts = {**weights.stage(number, cut, shape.tensor).counts(), "adapters": lora.count_trained(model_config, config)}
    patches = rows.patches * (number == 0)
    loads = np.stack([rows.tokens, rows.patches, rows.supervised], axis=-1).reshape(-1, 3)
    loads = np.concatenate([loads, rows.heaviest]) * [1, number == 0, is_last]

    def kept(tokens: int, patches: int) -> float:
        """Bytes per token, and per patch, that stay of a row until its backward pass."""
        load = (tokens, patches, 0)
        is_compiled = device is not None and compilation.is_on(config.compile, device)
        return kept_by(own, settings, dtype, load, is_compiled, shape.divided).total

    # A row's activations stay until its backward pass; of several rows the heaviest of one rank may come together.
    per_token, with_patch = kept(1, 0), kept(0, 1)
    of_rows = np.sort((per_token * rows.tokens + with_patch * patches) / shape.context, axis=1)[:, ::-1]
    others = of_rows[:, 1 : in_flight(number, len(cut), shape.rows)].sum(axis=1)
    among = memory.Among(shape.ranks > 1, shape.divided, float(others.max()))
    loads = heaviest(loads.astype(np.int64))
    largest = int(rows.largest.max()) if number == 0 else 0
    return memory.forecast(own, counts, settings, dtype, loads, shape.group, shape.rows, device, largest, among)


def run_forecast(
    model_config, config: Config, dtype: torch.dtype, shape: Shape, cut: tuple[int, ...], loads: np.ndarray,
    device: torch.device | None = None, largest_picture: int = 0,
) -> tuple[int, memory.Forecast]:  # fmt: skip
    """The stage that needs most, and its forecast, in a run whose heaviest micro-batches are `loads` (k, 3)
    (steps.Survey.heaviest). As many of the heaviest as a stage has in flight are taken to come one after another."""
    tokens, patches, supervised = np.repeat(loads, len(cut), axis=0).T[:, None]
    unused = np.zeros_like(patches)
    largest = np.full_like(patches, largest_picture)
    rows = Rows(tokens, supervised, patches, largest, {}, unused, unused, loads)
    weights = Weights.of(model_config)
    found = []
    for stage in range(len(cut)):
        found.append(stage_forecast(model_config, config, dtype, shape, stage, cut, weights, rows, device))
    return max(enumerate(found), key=lambda one: sum(one[1].values()))
