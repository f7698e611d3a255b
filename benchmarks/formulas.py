"""What one rank of a job should hold and send, by formula: benchmarks/simulate.py counts it.

Each way in which ranks share work has a function of its own, `of_...`, that says what it hands to collectives in the
passes of a step. What FSDP2 sends of weights is in benchmarks/scaling.py.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from transformers import Qwen2VLForConditionalGeneration

from benchmarks import scaling
from util.collator import Batch
from util.config import Config
from util.cost import memory
from util.model import layers
from util.parallel.context import RowPart
from util.parallel.layout import Layout, Place

PASSES, AROUND = "passes", "around them"  # the phases of a step
BF16, FP32 = 2, 4  # bytes
# Linear layers of which a tensor rank has some outputs, and those of which it has some inputs; all else it has whole.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "merger.mlp.0", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj", "attn.proj", "fc2", "merger.mlp.2")


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

    @property
    def again(self) -> int:
        """How often a layer's forward pass is run once more."""
        return int(self.config.activation_checkpointing == "full")


def expected(job: Job) -> dict[str, Any]:
    """Parameters, collectives of the passes, and memory of this rank, as docs/scaling.md and util/cost have them."""
    units = units_of_rank(job)
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
    if job.layout.tensor > 1 or job.layout.pipeline > 1:
        return found  # memory.forecast knows neither
    counts = memory.count_parameters(job.model_config, job.config)
    load = (len(job.batch.input_ids), len(job.batch.vision_position_ids), len(job.batch.target_ids))
    parts = memory.forecast(job.model_config, counts, job.config, torch.bfloat16, [load], job.group, job.micro_batches)
    return {
        **found,
        "peak_bytes": round(sum(parts.values())),
        "peak_at": parts.moment,
        "parts_bytes": {name: round(size) for name, size in parts.items()},
    }


def units_of_rank(job: Job) -> list[scaling.Unit]:
    """The units of FSDP2 that this rank has, each layer and then the root, with the shapes of its tensor place."""
    if job.layout.tensor == job.layout.pipeline == 1:
        return scaling.units_of(job.model_config)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(job.model_config)
    names = {parameter: name for name, parameter in model.named_parameters() if is_on_stage(name, job)}

    def unit(parameters: list[torch.nn.Parameter], is_root: bool = False) -> scaling.Unit:
        shapes = [shape_on_rank(names[parameter], tuple(parameter.shape), job) for parameter in parameters]
        return scaling.Unit(shapes, [True] * len(shapes), True, is_root)

    repeated = [list(layer.parameters()) for layer in layers(model)]
    repeated = [parameters for parameters in repeated if parameters[0] in names]
    inside = set(chain.from_iterable(repeated))
    rest = [parameter for parameter in names if parameter not in inside]
    return [*map(unit, repeated), unit(rest, is_root=True)]


def is_on_stage(name: str, job: Job) -> bool:
    """Tower, merger and embedding are on the first stage, norm and head on the last one, and each layer on one."""
    is_first = job.place.pipeline == 0
    is_last = job.place.pipeline == job.layout.pipeline - 1
    if ".language_model.layers." in name:
        return int(name.split(".layers.")[1].split(".")[0]) in job.layers
    if "embed_tokens" in name:
        return is_first or (is_last and job.model_config.tie_word_embeddings)
    if ".language_model.norm." in name or name.startswith("lm_head."):
        return is_last
    return is_first


def elements_of_shard(shape: tuple[int, ...], job: Job) -> int:
    """Elements of a parameter on this rank: the first dimension is dealt in equal parts, of which the last may lack."""
    place = (job.place.data * job.layout.context + job.place.context) % job.group
    part = -(-shape[0] // job.group)
    return max(0, min(part, shape[0] - place * part)) * math.prod(shape[1:])


def shape_on_rank(name: str, shape: tuple[int, ...], job: Job) -> tuple[int, ...]:
    ranks = job.layout.tensor
    layer, _, kind = name.rpartition(".")
    if layer.endswith(COLUMNS):
        return (shape[0] // ranks, *shape[1:])
    if layer.endswith(ROWS) and kind == "weight":
        return (shape[0], shape[1] // ranks)
    return shape


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
    cuts = [text.num_attention_heads * rank // ranks for rank in range(ranks + 1)]
    shared = text.num_attention_heads // text.num_key_value_heads  # query heads that read one key-value head
    keys = [(end - 1) // shared - begin // shared + 1 for begin, end in pairwise(cuts)]
    place = job.place.context
    queries = cuts[place + 1] - cuts[place]
    there = tokens * (text.num_attention_heads + 2 * sum(keys))
    arrived = ranks * tokens * (queries + 2 * keys[place])
    mixed = ranks * tokens * queries
    returned = tokens * text.num_attention_heads
    backward = job.micro_batches * len(job.layers)
    forward = backward * (1 + job.again)
    exchange = Kind(PASSES, "all_to_all", ranks, job.layout.tensor)
    yield exchange, 3 * forward, forward * BF16 * width * (there + mixed)
    yield exchange, 3 * backward, backward * BF16 * width * (arrived + returned)
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
    supervised = len(job.share.target_ids)
    visual = len(job.share.visual_index)
    token = BF16 * text.hidden_size
    tokens = len(job.share.input_ids)
    patches = len(job.share.vision_position_ids)
    of_layers = (len(job.layers), tokens, token)
    of_blocks = (tower.depth, patches, BF16 * tower.embed_dim)
    for depth, length, row in (of_layers, of_blocks):
        # A layer that is run again ends before its last product's sum, which nothing needs.
        if job.config.sequence_parallel:
            length = -(-length // ranks) * ranks
            gathers = times * (depth * (4 + 2 * job.again) + 2)  # and before the first layer, and after the last
            scatters = times * depth * (4 + job.again)
            yield gather, gathers, gathers * length // ranks * row
            yield scatter, scatters, scatters * length * row
        else:
            sums = times * depth * (4 + job.again)
            yield reduce, sums, sums * length * row
    yield reduce, times, times * tokens * token  # the embedding
    yield reduce, 2 * times, times * visual * (token + BF16 * 4 * tower.embed_dim)  # the merger: sum, and its gradient
    yield reduce, times, times * supervised * token  # the gradient of what the head reads
    yield reduce, 2 * times, times * supervised * FP32 * 3  # of the loss: the largest logit; the sum, and the target's
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
        text = job.model_config.text_config
        shape = shape_on_rank("embed_tokens.weight", (text.vocab_size, text.hidden_size), job)
        ends = Kind(PASSES, scaling.REDUCE, 2, stride * (stages - 1))
        yield ends, 1, FP32 * elements_of_shard(shape, job)


def whole_elements(job: Job) -> int:
    """Elements on this rank of what every tensor rank has whole."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(job.model_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if is_on_stage(name, job)}
    whole = [shape for name, shape in shapes.items() if shape_on_rank(name, shape, job) == shape]
    return sum(elements_of_shard(shape, job) for shape in whole)
