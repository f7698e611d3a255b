"""Sequence parallelism: one packed row over several ranks, for samples that a single one cannot hold.

Each of C ranks has T / C neighbouring tokens of the row, and computes all that treats tokens one by one (norms, MLPs,
the head and its loss) for these alone. Three things need more than that:

    the vision tower     no patch sees beyond its image or pair of frames, so whole ones are dealt to the ranks
    its visual tokens    each is sent to the one rank in whose part of the row it stands
    attention            rank:   0      1      2      3          0       1       2       3
      (Ulysses,                tokens of all heads      --->    all tokens of some heads
      arXiv 2309.14509)       [ 0-9 ][10-19][20-29][30-39]    [heads 0, 1][2, 3][4, 5][6, 7]

    Before attention each rank gives away the heads that are not its own, and after it the tokens. Where C does not
    divide the heads, some ranks have one more than others.

    What travels, in three all-to-alls a layer and pass, and what is computed meanwhile:

    compute, forward     norm, q   |  k, v   |   |   attention   |        |  o, MLP
    on the way                     [ queries ][k, v]             [ mixed ]
    compute, backward    MLP, o |         |  attention  |    |  v, k  |         |  q, norm
    on the way                  [ mixed  ]              [k, v][queries          ]

Letters in shapes: C ranks, T tokens of the row, V visual tokens, H heads, H_kv key-value heads, W a head's width.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from util.attention import BACKENDS, Segments
from util.collator import Batch, pieces_of
from util.command_line import UserError
from util.family import FAMILIES, QWEN2_VL, Family
from util.loss import PackedLoss
from util.packed_layers import Kind
from util.vision import MERGE, Grid

# ---- a rank's part of a batch ---------------------------------------------------------------------------------------


@dataclass
class RowSegments(Segments):
    """The segments of the whole row, of which a rank has a part."""


@dataclass
class RowPart(Batch):
    """A rank's part of a batch: T / C of its tokens, with what is supervised of them, and some of its pictures.

    `segments` are those of the whole row. What is short of a multiple of C is filled up by a segment of tokens that
    nobody sees. `visual_index` (V of these tokens) is in the order in which visual tokens arrive.
    """

    sent_index: Any = None  # (V,) int64: of the visual tokens that the tower makes here, in the order they are sent
    sent: Any = None  # how many of them each rank gets
    received: Any = None  # how many each rank sends here


@dataclass
class Unit:
    """What a tower sees by itself: an image, or a pair of frames of a video."""

    is_video: bool
    patches: slice  # of the batch's image patches, or of its video patches
    tokens: range  # in the order of the batch's visual tokens
    grid: Grid


def parts_of(batch: Batch, ranks: int, family: Family = FAMILIES[QWEN2_VL]) -> list[Batch]:
    """Of a batch what each rank of a context group gets. `family`: of the model, whose tower's work is dealt."""
    if ranks == 1:
        return [batch]
    length = len(batch.input_ids)
    size = -(-length // ranks)
    missing = size * ranks - length
    lengths = batch.segments.lengths + [missing] * (missing > 0)
    whole = replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, missing)),
        position_ids=F.pad(batch.position_ids, (0, missing)),
        segments=RowSegments.of(lengths),
    )
    units = units_of(batch)
    hands = deal_units([unit.grid for unit in units], ranks, family)
    dealt: list[list[Unit]] = [[] for _ in range(ranks)]
    for unit, hand in zip(units, hands, strict=True):
        dealt[hand].append(unit)
    orders = [order_of(own, batch.visual_index // size, ranks) for own in dealt]
    return [part_of(whole, rank, size, dealt[rank], orders) for rank in range(ranks)]


def units_of(batch: Batch) -> list[Unit]:
    """The images, then the pairs of frames, of a batch in the order of its patches."""
    units = []
    token = 0
    seen = 0  # patches of images, then of videos
    is_video = False
    for grid in [Grid(*sizes) for sizes in batch.grid_thw.tolist()]:
        if not is_video and seen == len(batch.image_patches):
            is_video = True
            seen = 0
        patches = grid.h * grid.w
        tokens = patches // MERGE**2
        for _ in range(grid.t):
            place = slice(seen, seen + patches)
            units.append(Unit(is_video, place, range(token, token + tokens), Grid(1, grid.h, grid.w)))
            seen += patches
            token += tokens
    return units


def deal_units(grids: list[Grid], ranks: int, family: Family = FAMILIES[QWEN2_VL]) -> list[int]:
    """A rank for each unit (their grids), so that the tower's work is even: the largest first, each to the rank with
    least so far.

    A patch costs what its matrix products do, and some for each patch that it sees; the two are equal at about 7,700
    patches in a picture (docs/figures.md: 1.2613 GF, and 163,840 for each), or where the family has it.
    """
    patches = np.array([grid.h * grid.w for grid in grids], dtype=np.float64)
    costs = patches * (1 + patches / family.even_patches)
    loads = np.zeros(ranks)
    hands = [0] * len(grids)
    for number in np.argsort(-costs, kind="stable").tolist():
        hand = int(loads.argmin())
        hands[number] = hand
        loads[hand] += costs[number]
    return hands


@dataclass
class Order:
    """How a rank's visual tokens travel."""

    index: torch.Tensor  # its own ones in the order they are sent: by rank that gets them
    sent: list[int]  # how many each rank gets
    tokens: torch.Tensor  # the same, as numbers among the batch's visual tokens


def order_of(units: list[Unit], ranks_of_tokens: torch.Tensor, ranks: int) -> Order:
    """`ranks_of_tokens` (V,): the rank in whose part of the row each visual token of the batch stands."""
    own = torch.tensor([*chain.from_iterable(unit.tokens for unit in units)], dtype=torch.int64)
    goes_to = ranks_of_tokens[own]
    index = goes_to.argsort(stable=True)
    return Order(index, goes_to.bincount(minlength=ranks).tolist(), own[index])


def part_of(whole: Batch, rank: int, size: int, units: list[Unit], orders: list[Order]) -> RowPart:
    """The part of the batch, filled up to a multiple, that a rank gets: `size` tokens, and the pictures in `units`."""
    begin = rank * size
    targets = slice(*torch.searchsorted(whole.supervised_index, torch.tensor([begin, begin + size])).tolist())
    arriving = []
    for order in orders:
        first = sum(order.sent[:rank])
        arriving.append(order.tokens[first : first + order.sent[rank]])
    fields = {name: getattr(whole, name) for name in Batch.__dataclass_fields__}
    fields |= {
        # copies, as a view would be sent with all of what it is a view of
        "input_ids": whole.input_ids[begin : begin + size].clone(),
        "position_ids": whole.position_ids[:, begin : begin + size].clone(),
        "supervised_index": whole.supervised_index[targets] - begin,
        "target_ids": whole.target_ids[targets].clone(),
        "target_weights": whole.target_weights[targets].clone(),
        "visual_index": whole.visual_index[torch.cat(arriving)] - begin,
    }
    fields |= pictures_of(whole, units)
    return RowPart(
        **fields, sent_index=orders[rank].index, sent=orders[rank].sent, received=[len(some) for some in arriving]
    )


def pictures_of(whole: Batch, units: list[Unit]) -> dict[str, Any]:
    """The fields of a batch for some of its pictures."""
    images = [whole.image_patches[unit.patches] for unit in units if not unit.is_video]
    videos = [whole.video_patches[unit.patches] for unit in units if unit.is_video]
    grids = [unit.grid for unit in units]
    before = len(whole.image_patches)
    seen = [unit.patches for unit in units if not unit.is_video]  # of all patches, images first
    seen += [slice(before + unit.patches.start, before + unit.patches.stop) for unit in units if unit.is_video]
    positions = [whole.vision_position_ids[patches] for patches in seen]
    return {
        "image_patches": torch.cat([*images, whole.image_patches[:0]]),
        "video_patches": torch.cat([*videos, whole.video_patches[:0]]),
        "vision_position_ids": torch.cat([*positions, whole.vision_position_ids[:0]]),
        "vision_segments": pieces_of(whole.vision_segments, seen),
        "window_segments": pieces_of(whole.window_segments, seen),
        "grid_thw": torch.tensor([grid[:3] for grid in grids], dtype=torch.int64).reshape(-1, 3),
    }


# ---- the model ------------------------------------------------------------------------------------------------------


class ContextLoss(PackedLoss):
    """A PackedLoss that also takes parts of rows (RowPart), and then gives the sum of its part's cross-entropies."""

    row_attention: "RowAttention"  # of the language model's layers

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """Those that stand in this rank's part of the row, in the order of its `visual_index`."""
        tokens = super().visual_tokens(batch)
        if not isinstance(batch, RowPart):
            return tokens
        outgoing = tokens.index_select(0, batch.sent_index)
        return begin(outgoing, batch.received, batch.sent, self.row_attention.group).arrived()


@dataclass
class RowAttention:
    """Lets the layers of a model attend over whole rows of which each rank has a part."""

    attend: Callable  # one of attention.BACKENDS
    group: dist.ProcessGroup
    around: Callable = nullcontext  # entered while this rank attends, for which it waits for the others

    def is_for(self, segments: Segments) -> bool:
        """Not for rows that this rank has whole."""
        return isinstance(segments, RowSegments)

    def __call__(self, layer: Any, kind: Kind, hidden: torch.Tensor, rotation: Any, segments: Segments) -> torch.Tensor:
        """A layer's rows (T / C, D) -> what attention makes of them (T / C, D)."""
        assert kind.queries
        assert kind.keys_and_values
        normed, query = kind.queries(layer, hidden, *rotation)
        queries = send_queries(query, self.group)  # they travel while keys and values are made
        key, value = kind.keys_and_values(layer, normed, *rotation)
        scale = getattr(layer, kind.attention).scaling
        with self.around():
            mixed = attend_by_heads(queries, query.shape[1], key, value, segments, scale, self.attend, self.group)
        return mixed.flatten(1)


def split_attention(packed: ContextLoss, backend: str, group: dist.ProcessGroup) -> None:
    """Let the layers of a model attend over whole rows of which each rank has a part."""
    packed.row_attention = RowAttention(BACKENDS[backend], group)
    for layer in packed.model.model.language_model.layers:
        layer.row_attention = packed.row_attention


# ---- what ranks send each other -------------------------------------------------------------------------------------

# Those that return before anything has arrived. torch's function with gradients waits in its backward pass at once.
collectives = torch.ops._c10d_functional


@dataclass(eq=False)
class Way:
    """Between the ranks of a group, for rows, and for their gradients back: what is under way on it."""

    received: list[int]  # how many rows each rank sends here
    sent: list[int]  # how many each gets
    group: dist.ProcessGroup
    rows: Any = None  # not to be read before they have arrived

    def begin(self, rows: torch.Tensor, received: list[int], sent: list[int]) -> None:
        self.rows = collectives.all_to_all_single(rows.contiguous(), received, sent, self.group.group_name)

    def arrived(self) -> torch.Tensor:
        rows, self.rows = self.rows, None
        return collectives.wait_tensor(rows)


class Begin(torch.autograd.Function):
    """Rows begin to travel. Backward: waits for their gradients, which Arrive has sent.

    Autograd knows the two as neighbours by a tensor without numbers, since a gradient under way is of another shape
    than the rows that have arrived.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, way: Way) -> torch.Tensor:
        ctx.way = way
        way.begin(rows, way.received, way.sent)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, nothing: torch.Tensor):
        return ctx.way.arrived(), None


class Arrive(torch.autograd.Function):
    """Rows have arrived. Backward: their gradients begin to travel back."""

    @staticmethod
    def forward(ctx: Any, nothing: torch.Tensor, way: Way) -> torch.Tensor:
        ctx.way = way
        return way.arrived()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        ctx.way.begin(gradient, ctx.way.sent, ctx.way.received)
        return gradient.new_empty(0), None


@dataclass
class UnderWay:
    """Rows that ranks send each other while they compute.

    Autograd runs last what was run first. So gradients begin to travel where rows were waited for, and are waited for
    where these were sent off: what was computed in between has its backward pass meanwhile.
    """

    begun: torch.Tensor  # (0,), of Begin
    way: Way

    def arrived(self) -> torch.Tensor:
        return Arrive.apply(self.begun, self.way)


def begin(rows: torch.Tensor, received: list[int], sent: list[int], group: Any) -> UnderWay:
    """Rows (sum of `sent`, ...) to all ranks of a group, for theirs (sum of `received`, ...); gradients travel back."""
    way = Way(received, sent, group)
    return UnderWay(Begin.apply(rows, way), way)


Shape = tuple[int, ...]


@dataclass
class Pieces:
    """Tensors that ranks send each other: some from each rank."""

    numbers: UnderWay
    shapes: list[list[Shape]]  # of those of each rank

    def arrived(self) -> list[list[torch.Tensor]]:
        found = []
        for of_rank, shapes in zip(self.numbers.arrived().split(self.numbers.way.received), self.shapes, strict=True):
            tensors = of_rank.split([math.prod(shape) for shape in shapes])
            found.append([tensor.view(shape) for tensor, shape in zip(tensors, shapes, strict=True)])
        return found


def send(pieces: list[list[torch.Tensor]], shapes: list[list[Shape]], group: Any) -> Pieces:
    """Some tensors to each rank of a group, for those of these shapes that each rank sends; gradients travel back."""
    sent = [sum(map(torch.numel, of_rank)) for of_rank in pieces]
    received = [sum(map(math.prod, of_rank)) for of_rank in shapes]
    numbers = torch.cat([tensor.flatten() for tensor in chain(*pieces)])
    return Pieces(begin(numbers, received, sent, group), shapes)


# ---- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The heads for which a rank attends."""

    queries: slice
    keys: slice  # the key-value heads that these read; a neighbour may read the same ones
    readers: list[int]  # for each of its queries the key-value head that it reads, counted from the first of `keys`

    def spread(self, heads: torch.Tensor) -> torch.Tensor:
        """Keys or values (T, its key-value heads, W), one for each query head where not all are read equally often."""
        times = {self.readers.count(number) for number in self.readers}
        return heads if len(times) == 1 else torch.stack([heads[:, number] for number in self.readers], dim=1)


def deal_queries(heads: int, ranks: int) -> list[slice]:
    """The query heads of each rank: neighbours, as many as another has or one more."""
    cuts = [heads * rank // ranks for rank in range(ranks + 1)]
    return [slice(first, end) for first, end in pairwise(cuts)]


def deal_heads(heads: int, key_value_heads: int, ranks: int) -> list[Heads]:
    """The heads of each rank: its queries, and the keys and values that these read."""
    group = heads // key_value_heads  # query heads that read the same key-value head
    found = []
    for queries in deal_queries(heads, ranks):
        first = queries.start // group
        readers = [head // group - first for head in range(queries.start, queries.stop)]
        found.append(Heads(queries, slice(first, first + readers[-1] + 1), readers))
    return found


def send_queries(query: torch.Tensor, group: dist.ProcessGroup) -> Pieces:
    """Of this rank's tokens (T / C, H, W) each rank gets its heads, and this one its heads of all tokens."""
    tokens, heads, width = query.shape
    dealt = deal_queries(heads, dist.get_world_size(group))
    own = dealt[dist.get_rank(group)]
    arriving = [(tokens, own.stop - own.start, width)]
    return send([[query[:, of_rank]] for of_rank in dealt], [arriving] * len(dealt), group)


def attend_by_heads(
    queries: Pieces,
    heads: int,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    attend: Callable,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Ulysses: queries on their way, of H `heads`, k and v (T / C, H_kv, W) -> (T / C, H, W), attention over all T
    tokens."""
    ranks = dist.get_world_size(group)
    dealt = deal_heads(heads, k.shape[1], ranks)
    own = dealt[dist.get_rank(group)]
    tokens, _, width = k.shape
    arriving = [(tokens, own.keys.stop - own.keys.start, width)] * 2
    keys_and_values = send([[k[:, some.keys], v[:, some.keys]] for some in dealt], [arriving] * ranks, group)
    q = torch.cat([part for (part,) in queries.arrived()])
    k, v = (torch.cat(parts) for parts in zip(*keys_and_values.arrived(), strict=True))
    mixed = attend(q, own.spread(k), own.spread(v), segments, causal=True, scale=scale)
    # And back: of its tokens a rank gets all heads.
    returning = [[(tokens, len(some.readers), width)] for some in dealt]
    parts = send([[part] for part in mixed.chunk(ranks)], returning, group).arrived()
    return torch.cat([part for (part,) in parts], dim=1)


def check_sizes(model_config, ranks: int, of_a_matrix: int = 1) -> None:
    """Raise UserError where there are more ranks for a row than heads, which `of_a_matrix` tensor ranks have shared out
    before."""
    all_heads = model_config.text_config.num_attention_heads
    heads = all_heads // of_a_matrix
    if ranks > heads:
        shared = f", {heads} on each rank of --tensor_parallel_size {of_a_matrix}" if of_a_matrix > 1 else ""
        raise UserError(
            f"--context_parallel_size {ranks}: each rank attends for heads of its own, and this model has {all_heads}"
            f"{shared}; use at most {heads}"
        )
