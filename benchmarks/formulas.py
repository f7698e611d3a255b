"""What one rank of a job should hold and send, by formula: benchmarks/simulate.py counts it.

Each way in which ranks share work has a function of its own, `of_...`, that says what it hands to collectives in the
passes of a step. What FSDP2 sends of weights is in benchmarks/scaling.py, which weights a rank has in
util/cost/layouts.py, and memory in util/cost/memory.py: what `python -m util check --gpus` computes with is thereby
compared with the simulation, too.

All of this is independent of what is checked, the training: util/parallel, util/model.py, util/loss.py and FSDP2. Taken
from there are the layout of ranks (layout.py: which ranks make a group), the share of a batch that a rank gets, and the
names of its settings; of the data a stage is cut by, util/cost/stages.py says for both how many layers it has.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import scaling
from util.collator import Batch
from util.config import Config
from util.cost import layouts, memory
from util.cost.work import Rows
from util.parallel.context import RowPart
from util.parallel.layout import Layout, Place

PASSES, AROUND = "passes", "around them"  # the phases of a step
BF16, FP32 = 2, 4  # bytes


class Kind(NamedTuple):
    """What collectives are told apart by."""

    phase: str
    name: str
    members: int  # ranks that take part
    stride: int  # how far neighbours among them are apart


@dataclass
class Job:
    """What the formulas go by."""

    model_config: Any
    config: Config
    layout: Layout
    place: Place
    group: int  # ranks that share one copy of the weights
    micro_batches: int
    batch: Batch  # of all ranks that share a row
    share: Batch  # of this rank
    layers: range  # of the language model, on this rank
    cut: tuple[int, ...]  # the layers of each stage

    @property
    def sums_again(self) -> int:
        """How often what a layer's forward pass adds up over ranks is added up once more: `selective` keeps it."""
        return int(self.config.activation_checkpointing == "full")

    @property
    def rows_again(self) -> int:
        """The same of what it gathers and exchanges, which `selective` does not keep (layers are not compiled here)."""
        return int(self.config.activation_checkpointing != "none")


def expected(job: Job) -> dict[str, Any]:
    """Parameters, collectives of the passes, and memory of this rank, as docs/scaling.md and util/cost have them."""
    units = list(stage_of(job).units())
    calls: Counter[Kind] = Counter()
    sizes: Counter[Kind] = Counter()
    for formula in (of_weights(units, job), of_context(job), of_tensor(job), of_pipeline(job)):
        for kind, number, size in formula:
            calls[kind] += number
            sizes[kind] += size
    found = {
        "parameters": sum(elements_of_shard(shape, job) for unit in units for shape in unit.shapes),
        "collectives": [{**kind._asdict(), "calls": calls[kind], "bytes": sizes[kind]} for kind in sorted(calls)],
    }
    parts = forecast_of(job)
    return {
        **found,
        "peak_bytes": round(sum(parts.values())),
        "peak_at": parts.moment,
        "parts_bytes": {name: round(size) for name, size in parts.items()},
    }


def forecast_of(job: Job) -> memory.Forecast:
    """Memory of this rank, as `check --gpus` forecasts it for a stage: of this code nothing is independent."""
    tokens = len(job.batch.input_ids)
    supervised, patches = len(job.batch.target_ids), len(job.batch.vision_position_ids)
    picture = int(job.batch.grid_thw[:, 1:].prod(dim=1).max())
    many = (1, job.micro_batches)
    rows = Rows(
        np.full(many, tokens), np.full(many, supervised), np.full(many, patches), np.full(many, picture), {},
        np.zeros(many), np.zeros(many), np.array([[tokens, patches, supervised]]),
    )  # fmt: skip
    layout = job.layout
    shape = layouts.Shape(
        layout.data, layout.pipeline, layout.context, layout.tensor, job.config.sharding, job.group,
        job.config.activation_checkpointing, job.micro_batches, job.config.sequence_parallel,
    )  # fmt: skip
    return layouts.stage_forecast(
        job.model_config, job.config, torch.bfloat16, shape, job.place.pipeline, job.cut,
        layouts.Weights.of(job.model_config), rows,
    )  # fmt: skip


def stage_of(job: Job) -> layouts.Stage:
    """What this rank has of the model before FSDP2 shards it."""
    return layouts.Weights.of(job.model_config).stage(job.place.pipeline, job.cut, job.layout.tensor)


def elements_of_shard(shape: tuple[int, ...], job: Job) -> int:
    """Elements of a parameter on this rank: the first dimension is dealt in equal parts, of which the last may lack."""
    place = (job.place.data * job.layout.context + job.place.context) % job.group
    part = -(-shape[0] // job.group)
    return max(0, min(part, shape[0] - place * part)) * math.prod(shape[1:])


def of_weights(units: list[scaling.Unit], job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What FSDP2 gathers and reduces of weights: benchmarks/scaling.py."""
    sharing = job.layout.of_a_weight
    group = job.group
    totals = scaling.bytes_per_step(units, job.config.sharding, sharing, group, job.micro_batches, BF16, FP32)
    for name, total in totals.items():
        members, stride = (sharing // group, group) if name == scaling.REDUCE else (group, 1)
        if total["calls"]:
            yield Kind(PASSES, name, members, stride * job.layout.tensor), total["calls"], total["input_bytes"]


def of_context(job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What context parallelism sends (util/parallel/context.py): three all-to-alls in each layer's forward pass, and
    three in its backward pass.

    With t tokens on each of C ranks and heads of width W: queries, keys and values of this rank's tokens, for all ranks
    on the way there; the mixed values of this rank's heads, of all tokens, on the way back. The backward pass hands in
    as many gradients as the forward pass has received.
    """
    ranks = job.layout.context
    if ranks == 1:
        return
    text = job.model_config.text_config
    width = text.hidden_size // text.num_attention_heads
    tokens = len(job.share.input_ids)
    heads = text.num_attention_heads // job.layout.tensor
    cuts = [heads * rank // ranks for rank in range(ranks + 1)]
    shared = text.num_attention_heads // text.num_key_value_heads  # query heads that read one key-value head
    keys = [(end - 1) // shared - begin // shared + 1 for begin, end in pairwise(cuts)]
    place = job.place.context
    queries = cuts[place + 1] - cuts[place]
    there = tokens * (heads + 2 * sum(keys))
    arrived = ranks * tokens * (queries + 2 * keys[place])
    mixed = ranks * tokens * queries
    returned = tokens * heads
    backward = job.micro_batches * len(job.layers)
    forward = backward * (1 + job.rows_again)
    exchange = Kind(PASSES, "all_to_all", ranks, job.layout.tensor)
    yield exchange, 3 * forward, forward * BF16 * width * (there + mixed)
    yield exchange, 3 * backward, backward * BF16 * width * (arrived + returned)
    if job.place.pipeline:
        return
    # visual tokens: those made here, and on the way back the gradients of those that stand here
    assert isinstance(job.share, RowPart)
    visual = len(job.share.sent_index) + len(job.share.visual_index)
    yield exchange, 2 * job.micro_batches, job.micro_batches * visual * BF16 * text.hidden_size


def of_tensor(job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What tensor parallelism sends (util/parallel/tensor.py): sums of rows, twice in a layer and pass."""
    ranks = job.layout.tensor
    if ranks == 1:
        return
    text = job.model_config.text_config
    tower = job.model_config.vision_config
    reduce, gather, scatter = (
        Kind(PASSES, name, ranks, 1) for name in (scaling.REDUCE, scaling.GATHER, scaling.SCATTER)
    )
    times = job.micro_batches
    is_first = job.place.pipeline == 0
    is_last = job.place.pipeline == job.layout.pipeline - 1
    supervised = len(job.share.target_ids)
    token = BF16 * text.hidden_size
    tokens = len(job.share.input_ids)
    patches = len(job.share.vision_position_ids)
    visual = patches // tower.spatial_merge_size**2
    repeated = [(len(job.layers), tokens, token)]
    if is_first:
        repeated.append((tower.depth, patches, BF16 * tower.embed_dim))
    for depth, length, row in repeated:
        # A layer that is run again ends before its last product's sum, which nothing needs.
        if job.config.sequence_parallel:
            length = -(-length // ranks) * ranks
            gathers = times * (depth * (4 + 2 * job.rows_again) + 2)  # and before the first layer, and after the last
            scatters = times * depth * (4 + job.sums_again)
            yield gather, gathers, gathers * length // ranks * row
            yield scatter, scatters, scatters * length * row
        else:
            sums = times * depth * (4 + job.sums_again)
            yield reduce, sums, sums * length * row
    if is_first:
        yield reduce, times, times * tokens * token  # the embedding
        # the merger: sum, and its gradient
        yield reduce, 2 * times, times * visual * (token + BF16 * 4 * tower.embed_dim)
    if is_last:
        yield reduce, times, times * supervised * token  # the gradient of what the head reads
        # of the loss: the largest logit; the sum, and the target's
        yield reduce, 2 * times, times * supervised * FP32 * 3
    yield reduce, 1, FP32 * whole_elements(job)  # equal copies (`agree`)


def of_pipeline(job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What pipeline parallelism sends (util/parallel/pipeline.py): of each row hidden states, and their gradients."""
    stages = job.layout.pipeline
    if stages == 1:
        return
    stage = job.place.pipeline
    stride = job.layout.ranks // stages
    row = len(job.share.input_ids) * BF16 * job.model_config.text_config.hidden_size
    neighbours = (stage > 0) + (stage < stages - 1)
    for name in ("send", "receive"):
        yield Kind(PASSES, name, stages, stride), neighbours * job.micro_batches, neighbours * job.micro_batches * row
    if job.model_config.tie_word_embeddings and stage in (0, stages - 1):
        shape = (job.model_config.text_config.vocab_size // job.layout.tensor, job.model_config.text_config.hidden_size)
        ends = Kind(PASSES, scaling.REDUCE, 2, stride * (stages - 1))
        yield ends, 1, FP32 * elements_of_shard(shape, job)


def whole_elements(job: Job) -> int:
    """Elements on this rank of what every tensor rank has whole."""
    stage = stage_of(job)
    weights = [*stage.block * stage.blocks, *stage.layer * stage.layers, *stage.root]
    whole = [weight.shape for weight in weights if weight.of_tensor_rank(job.layout.tensor) == weight.shape]
    return sum(elements_of_shard(shape, job) for shape in whole)
