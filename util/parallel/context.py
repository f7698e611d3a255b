"""Sequence parallelism: one packed row over several ranks, for samples that a single one cannot hold.

Each of C ranks has T / C neighbouring tokens of the row, and computes all that treats tokens one by one (norms, MLPs,
the head and its loss) for these alone. Three things need more than that:

    the vision tower     no patch sees beyond its image or pair of frames, so whole ones are dealt to the ranks
    its visual tokens    each is sent to the one rank in whose part of the row it stands
    attention            rank:   0      1      2      3          0      1      2      3
      (Ulysses,                tokens of all heads      --->   all tokens of some heads
      arXiv 2309.14509)       [ 0-9 ][10-19][20-29][30-39]    [head 0][head 1][head 2][head 3]

    Before attention each rank gives away the heads that are not its own, and after it the tokens. Where the heads
    cannot be dealt evenly, keys and values of all tokens are gathered instead, and queries stay where they are.

Letters in shapes: C ranks, T tokens of the row, V visual tokens, H heads, H_kv key-value heads, W a head's width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from util.attention import BACKENDS, NAME, Segments
from util.collator import Batch, patch_positions, tower_segments
from util.loss import PackedLoss
from util.vision import MERGE, PATCH, Grid

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

    medium: int
    is_video: bool
    patches: slice  # of the batch's image patches, or of its video patches
    tokens: range  # in the order of the batch's visual tokens
    grid: Grid


def parts_of(batch: Batch, ranks: int) -> list[Batch]:
    """Of a batch what each rank of a context group gets."""
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
    hands = deal_units(units, ranks)
    dealt = [[unit for unit, hand in zip(units, hands, strict=True) if hand == rank] for rank in range(ranks)]
    orders = [order_of(own, batch.visual_index // size, ranks) for own in dealt]
    return [part_of(whole, rank, size, dealt[rank], orders) for rank in range(ranks)]


def units_of(batch: Batch) -> list[Unit]:
    """The images, then the pairs of frames, of a batch in the order of its patches."""
    grids = [Grid(*sizes) for sizes in batch.grid_thw.tolist()]
    units = []
    token = 0
    seen = 0  # patches of images, then of videos
    is_video = False
    for medium, grid in enumerate(grids):
        if not is_video and seen == len(batch.image_patches):
            is_video = True
            seen = 0
        patches = grid.h * grid.w
        tokens = patches // MERGE**2
        for _ in range(grid.t):
            place = slice(seen, seen + patches)
            units.append(Unit(medium, is_video, place, range(token, token + tokens), Grid(1, grid.h, grid.w)))
            seen += patches
            token += tokens
    return units


def deal_units(units: list[Unit], ranks: int) -> list[int]:
    """A rank for each unit, so that the tower's work is even: the largest first, each to the rank with least so far.

    A patch costs what its matrix products do, and some for each patch that it sees; the two are equal at about 7,700
    patches in a picture (docs/figures.md: 1.2613 GF, and 163,840 for each).
    """
    costs = [patches * (1 + patches / 7700) for patches in (unit.grid.h * unit.grid.w for unit in units)]
    loads = np.zeros(ranks)
    hands = [0] * len(units)
    for number in sorted(range(len(units)), key=lambda number: -costs[number]):
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
    own = torch.tensor([token for unit in units for token in unit.tokens], dtype=torch.int64)
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
        "input_ids": whole.input_ids[begin : begin + size],
        "position_ids": whole.position_ids[:, begin : begin + size],
        "supervised_index": whole.supervised_index[targets] - begin,
        "target_ids": whole.target_ids[targets],
        "target_weights": whole.target_weights[targets],
        "visual_index": whole.visual_index[torch.cat(arriving)] - begin,
    }
    fields |= pictures_of(whole, units)
    return RowPart(
        **fields, sent_index=orders[rank].index, sent=orders[rank].sent, received=[len(some) for some in arriving]
    )


def pictures_of(whole: Batch, units: list[Unit]) -> dict[str, Any]:
    """The fields of a batch for some of its pictures; for none of them four blank patches, as the towers of all ranks
    run together (EvenCollator in distributed.py)."""
    images = [whole.image_patches[unit.patches] for unit in units if not unit.is_video]
    videos = [whole.video_patches[unit.patches] for unit in units if unit.is_video]
    grids = [unit.grid for unit in units]
    if not grids:
        grids = [Grid(1, MERGE, MERGE)]
        images = [torch.zeros(MERGE**2, 3 * PATCH**2, dtype=torch.uint8)]
    return {
        "image_patches": torch.cat([*images, whole.image_patches[:0]]),
        "video_patches": torch.cat([*videos, whole.video_patches[:0]]),
        "vision_position_ids": torch.cat([patch_positions(grid) for grid in grids]),
        "vision_segments": tower_segments(grids),
        "grid_thw": torch.tensor([grid[:3] for grid in grids]),
    }


# ---- the model ------------------------------------------------------------------------------------------------------


class ContextLoss(PackedLoss):
    """A PackedLoss that also takes parts of rows (RowPart), and then gives the sum of its part's cross-entropies."""

    group: dist.ProcessGroup

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """Those that stand in this rank's part of the row, in the order of its `visual_index`."""
        tokens = super().visual_tokens(batch)
        if not isinstance(batch, RowPart):
            return tokens
        outgoing = tokens.index_select(0, batch.sent_index)
        return exchange(outgoing, batch.received, batch.sent, self.group)


def exchange(rows: torch.Tensor, received: list[int], sent: list[int], group: Any) -> torch.Tensor:
    """Rows (sum of `sent`, ...) to all ranks of a group -> theirs (sum of `received`, ...); gradients travel back."""
    return wait(all_to_all_single_autograd(rows.contiguous(), received, sent, group))


def wait(tensor: Any) -> torch.Tensor:
    """A collective's result when it is there."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def split_attention(packed: ContextLoss, backend: str, group: dist.ProcessGroup) -> None:
    """Let the layers of a model attend over whole rows of which each rank has a part."""
    packed.group = group
    attend = BACKENDS[backend]

    def attention(module, query, key, value, attention_mask, scaling, segments, **unused):
        # transformers' shapes: (1, heads, T, W) in, (1, T, heads, W) out
        q, k, v = (rows.squeeze(0).transpose(0, 1) for rows in (query, key, value))
        if not isinstance(segments, RowSegments):
            return attend(q, k, v, segments, causal=module.is_causal, scale=scaling)[None], None
        spread = by_heads if heads_can_be_dealt(q.shape[1], k.shape[1], dist.get_world_size(group)) else by_queries
        return spread(q, k, v, segments, scaling, attend, group)[None], None

    name = f"{NAME}row_parts_{backend}"
    AttentionInterface.register(name, torch.compiler.disable(attention))
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    packed.model.config.text_config._attn_implementation = name


def heads_can_be_dealt(heads: int, key_value_heads: int, ranks: int) -> bool:
    """Whether each rank can have as many heads as another, and the key-value heads that these need."""
    return heads % ranks == 0 and (key_value_heads % ranks == 0 or ranks % key_value_heads == 0)


def by_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    attend: Callable,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Ulysses: q (T / C, H, W), k and v (T / C, H_kv, W) -> (T / C, H, W), attention over all T tokens."""
    ranks = dist.get_world_size(group)
    # with fewer key-value heads than ranks, several ranks get a copy of the same one
    copies = max(1, ranks // k.shape[1])
    k = k.repeat_interleave(copies, 1)
    v = v.repeat_interleave(copies, 1)
    q, k, v = (heads_to_ranks(heads, group) for heads in (q, k, v))
    mixed = attend(q, k, v, segments, causal=True, scale=scale)  # (T, H / C, W)
    # back: of each rank's tokens all heads
    parts = exchange(mixed, *[[len(mixed) // ranks] * ranks] * 2, group)
    return torch.cat(parts.chunk(ranks), dim=1)


def heads_to_ranks(heads: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(T / C, H, W) -> (T, H / C, W): all tokens of this rank's heads."""
    ranks = dist.get_world_size(group)
    dealt = torch.cat(heads.chunk(ranks, dim=1))  # the heads of the first rank for all tokens here, then the next's
    return exchange(dealt, *[[len(heads)] * ranks] * 2, group)


def by_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    attend: Callable,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The same where heads cannot be dealt: keys and values of all tokens are gathered, queries stay where they are.

    The last tokens of a segment see most of it, so ranks have unlike work.
    """
    k, v = (wait(all_gather_tensor_autograd(heads.contiguous(), 0, group)) for heads in (k, v))  # (T, H_kv, W)
    copies = q.shape[1] // k.shape[1]
    begin = dist.get_rank(group) * len(q)
    end = begin + len(q)
    found = []
    for first, last in pairwise(segments.host_starts.tolist()):
        own = range(max(first, begin), min(last, end))  # queries of this segment that are here
        if not own:
            continue
        queries = q[own.start - begin : own.stop - begin].transpose(0, 1)[None]
        keys, values = (heads[first : own.stop].repeat_interleave(copies, 1).transpose(0, 1)[None] for heads in (k, v))
        seen = causal_lower_right(len(own), own.stop - first)  # a query sees what stands before it in its segment
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale)
        found.append(mixed[0].transpose(0, 1))
    return torch.cat(found)
