"""The batches of ranks that work on the same samples: one of them reads a batch, and hands each its share.

So each file is decoded once, and whether a sample is skipped is decided once. Reading takes turns: of the batches of a
row group its first rank reads the first, the second rank the second, and so on, each ahead of time in data workers of
its own. Of a pipeline the ranks of the first stage alone read, as only these need pixels.
"""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice, tee

import numpy as np
import torch
import torch.distributed as dist

from util.attention import Segments
from util.collator import Batch, Collator, patch_positions
from util.data import loader
from util.dataset import Sample
from util.family import FAMILIES, QWEN2_VL, Family
from util.guard import unread_batch
from util.parallel import context
from util.vision import MERGE, Grid


def packed_batches(samples, micro_batches: Iterable[list[int]], collate: Callable, config, world):
    """As loader.packed_batches, for a rank of `world`: the batches, or this rank's shares of them."""
    if world.layout.of_a_row == 1:
        return loader.packed_batches(samples, micro_batches, collate, config, world.device)
    return SharedBatches(samples, micro_batches, config, world)


class EvenCollator(Collator):
    """Gives a rank that has no picture four blank patches, which no token sees and whose gradient is zero.

    Gradients are summed layer by layer over all ranks, and the tower's weights are gathered so: a rank that left out
    the vision tower would stop them all. It sees the blank patches also where the features of all pictures were kept,
    as those of another rank may not be.
    """

    def __call__(self, samples: list[Sample]) -> Batch:
        return with_blank_patches(super().__call__(samples))


def with_blank_patches(batch: Batch) -> Batch:
    """The batch, or of one without patches the same with four blank ones."""
    if len(batch.vision_position_ids):
        return batch
    grid = Grid(1, MERGE, MERGE)
    return replace(
        batch,
        image_patches=torch.zeros(grid.patches, batch.image_patches.shape[1], dtype=torch.uint8),
        grid_thw=torch.cat([batch.grid_thw, torch.tensor([grid[:3]])]),
        vision_position_ids=patch_positions(grid),
        vision_segments=Segments.of([grid.patches]),
        window_segments=Segments.of([grid.patches]),
    )


class SharedBatches:
    """Iterates over this rank's shares of its group's batches. All ranks of the group must iterate together."""

    def __init__(self, samples, micro_batches: Iterable[list[int]], config, world) -> None:
        self.world = world
        self.family = samples.budget.family
        self.readers = [rank for rank in world.row_ranks if world.layout.place(rank).pipeline == 0]
        # Two of the same list: one that the loader reads ahead of time, one that says how many batches there are.
        self.planned, ahead = tee(micro_batches)
        self.own: Iterable[Batch] = ()
        if world.rank in self.readers:
            mine = islice(ahead, self.readers.index(world.rank), None, len(self.readers))
            # Blank patches are for shares, and so is pinned memory: what is read here is only handed on.
            self.own = loader.packed_batches(
                samples, mine, Collator(samples.budget.model_type), config, world.device, is_pinned=False
            )

    def __iter__(self) -> Iterator[Batch]:
        ranks = self.readers
        own = iter(self.own)
        for number, _ in enumerate(self.planned):
            yield self.hand_on(own, ranks[number % len(ranks)])

    def begin(self) -> Iterator[Batch]:
        """An iterator over the shares. The first one is made at once, so that what is wrong with it is raised here."""
        batches = iter(self)
        for first in batches:
            return chain([first], batches)
        return batches

    def hand_on(self, own: Iterator[Batch], reader: int) -> Batch:
        """This rank's share of the next batch, which rank `reader` reads.

        Raises there what reading it raises. The others get a share that says it was not read (guard.unread_batch).
        """
        shares: list[Batch] | None = None
        failure = None
        if reader == self.world.rank:
            try:
                shares = shares_of(next(own), self.world, self.family)
            except Exception as error:  # of whatever kind: the others wait for this rank and must be told
                failure = error
                shares = [unread_batch()] * len(self.world.row_ranks)
        share = self.hand_out(shares) if shares else received(reader, self.world.row_group)
        if failure:
            raise failure
        return share.pin_memory() if self.world.device.type == "cuda" else share

    def hand_out(self, shares: list[Batch]) -> Batch:
        """Send each rank of the group its share; this rank's own is returned."""
        for rank, share in zip(self.world.row_ranks, shares, strict=True):
            if rank == self.world.rank:
                own = share
            else:
                send(share, rank, self.world.row_group)
        return own


def shares_of(batch: Batch, world, family: Family = FAMILIES[QWEN2_VL]) -> list[Batch]:
    """Of a batch what each rank of a row group gets; what the log counts is counted by the first one alone."""
    shares = context.parts_of(batch, world.layout.context, family)
    uncounted = {name: type(number)(0) for name, number in batch.counts.items()}  # World.sum goes by their types
    found = []
    for place in map(world.layout.place, world.row_ranks):
        share = shares[place.context]
        share = with_blank_patches(share) if place.pipeline == 0 else without_pictures(share)
        is_first = not found
        found.append(replace(share, counts=batch.counts if is_first else uncounted))
    return found


def without_pictures(batch: Batch) -> Batch:
    """A share for a later stage of a pipeline, which the visual tokens reach as hidden states."""
    return replace(
        batch,
        image_patches=batch.image_patches[:0],
        video_patches=batch.video_patches[:0],
        grid_thw=batch.grid_thw[:0],
        vision_position_ids=batch.vision_position_ids[:0],
        vision_segments=Segments.of([]),
        window_segments=Segments.of([]),
        visual_index=batch.visual_index[:0],
    )


# ---- from one process to another ------------------------------------------------------------------------------------
# torch.distributed sends objects too, but copies their tensors several times: the half of an hour of video that one of
# two ranks gets, 300 MB, took it 7 to 10 s on a busy machine, and this 1.5 to 1.9 s.


class TensorsApart(pickle.Pickler):
    """Pickles tensors as arrays, whose memory protocol 5 leaves out of the pickle and names in order."""

    def reducer_override(self, value: object):
        if isinstance(value, torch.Tensor):
            return tensor_of, (value.numpy(),)
        return NotImplemented


def tensor_of(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def send(share: Batch, rank: int, group) -> None:
    """All but the tensors as an object, then the memory of each tensor."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    TensorsApart(stream, protocol=5, buffer_callback=buffers.append).dump(share)
    memories = [buffer.raw() for buffer in buffers]
    dist.send_object_list([stream.getvalue(), [len(memory) for memory in memories]], rank, group)
    for memory in filter(None, memories):
        dist.send(torch.frombuffer(memory, dtype=torch.uint8), rank, group)


def received(rank: int, group) -> Batch:
    """What that rank sends."""
    box: list = [None, None]
    dist.recv_object_list(box, rank, group)
    pickled, sizes = box
    memories = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for memory in filter(len, memories):
        dist.recv(memory, rank, group)
    return pickle.loads(pickled, buffers=[memory.numpy() for memory in memories])
