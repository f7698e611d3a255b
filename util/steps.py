"""The optimizer steps of a run: which samples each one takes, in which packed micro-batches, and on which rank.

A step follows from the order of its epoch alone: it is planned when it comes, many steps at a time, as arrays. What all
of them have in common (`Survey`) is found at the start in the same way, without keeping any.
Letters in shapes: N steps, G samples of a global batch.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from util import ranks
from util.command_line import UserError
from util.config import Config
from util.cost.sizes import Sizes
from util.dataset import Examples
from util.parallel.settings import SPLITS

BLOCK = 2**16  # samples planned at a time

Load = tuple[int, int, int]  # tokens, patches and supervised tokens of a micro-batch


class Step(NamedTuple):
    """One optimizer step."""

    number: int  # counted from 1
    epoch: int
    micro_batches: list[list[int]]  # numbers of the samples of this rank
    samples: list[int]  # of all ranks: fewer than a global batch where some are left out, and at an epoch's end

    @property
    def own_samples(self) -> list[int]:
        """The samples of this rank."""
        return list(chain.from_iterable(self.micro_batches))

    def check(self, totals: dict[str, float]) -> None:
        """Every sample of the step was there: trained on, or skipped and counted."""
        assert totals["samples"] + totals["skipped"] == len(self.samples)


@dataclass
class Dealing:
    """How the samples of a step are dealt to ranks: by what each costs (n,). Without costs: all to one process."""

    costs: np.ndarray | None = None
    rank: int = 0
    ranks: int = 1
    rows: int = 1  # micro-batches that a step is dealt to at least, where it has as many samples; from 2 on by cost


@dataclass
class Block:
    """Consecutive steps of an epoch: of each of their samples, (N, G), where it goes."""

    samples: np.ndarray  # longest first in each step
    there: np.ndarray  # bool: it is no gap of a left-out sample, nor of the shorter batch at the end of an epoch
    hands: np.ndarray  # the rank that trains it
    rows: np.ndarray  # the micro-batch of that rank

    def passes(self) -> np.ndarray:
        """(N,) micro-batches of each step on every rank; a step without samples has one that is empty."""
        return np.where(self.there, self.rows + 1, 1).max(axis=1)

    def of_rank(self, rank: int) -> Iterator[list[list[int]]]:
        """Of each step the micro-batches of a rank. Every rank has equally many, the last ones may be empty: forward
        passes of several ranks talk to each other."""
        mine = self.there & (self.hands == rank)
        for number, passes in enumerate(self.passes().tolist()):
            micro_batches: list[list[int]] = [[] for _ in range(passes)]
            samples = self.samples[number, mine[number]]
            rows = self.rows[number, mine[number]]
            for sample, row in zip(samples.tolist(), rows.tolist(), strict=True):
                micro_batches[row].append(sample)
            yield micro_batches


class Steps:
    """All optimizer steps of a run. All ranks make this together.

    `order`: a function epoch -> its samples in order, always `epoch_samples` of them. A sample that is left out leaves
    its place in its global batch empty: nothing moves into it, so that one more of them changes no other batch. The
    last, shorter global batch of an epoch is a step like the others.
    """

    def __init__(
        self,
        sizes: Sizes,
        order: Callable[[int], np.ndarray],
        epoch_samples: int,
        epochs: int,
        most: int | None,
        config: Config,
        dealing: Dealing | None = None,
    ) -> None:
        self.sizes = sizes
        self.order = order
        self.epoch_samples = epoch_samples
        self.config = config
        self.dealing = dealing or Dealing()
        self.per_epoch = -(-epoch_samples // config.global_batch_size)
        self.count = min(epochs * self.per_epoch, most or epochs * self.per_epoch)
        self.survey = self._survey()

    def __len__(self) -> int:
        return self.count

    def after(self, done: int) -> Iterator[Step]:
        """The steps that follow the first `done` ones."""
        for epoch, first, block in self._blocks(done):
            for place, micro_batches in enumerate(block.of_rank(self.dealing.rank)):
                samples = block.samples[place, block.there[place]]
                yield Step(first + place + 1, epoch, micro_batches, samples.tolist())

    def repacked(self, config: Config) -> "Steps":
        """The same steps with the same samples, in micro-batches of other settings. All ranks call together."""
        other = copy.copy(self)
        other.config = config
        other.survey = other._survey()
        return other

    def micro_batches(self, done: int = 0) -> Iterator[list[int]]:
        """This rank's micro-batches of the same steps, one after another."""
        for step in self.after(done):
            yield from step.micro_batches

    def _blocks(self, done: int, part: int = 0, parts: int = 1) -> Iterator[tuple[int, int, Block]]:
        """(epoch, first step, block) from a step on; of several parts, one: every so many blocks."""
        most = max(1, BLOCK // self.config.global_batch_size)
        number = 0  # of the block
        epoch_of_order = -1
        order = np.zeros(0, dtype=np.int64)
        while done < self.count:
            epoch, begin = divmod(done, self.per_epoch)
            end = min(begin + most, self.per_epoch, begin + self.count - done)
            if number % parts == part:
                if epoch != epoch_of_order:  # an order of millions takes long to draw: once an epoch
                    order = self.order(epoch)
                    epoch_of_order = epoch
                yield epoch, done, self._plan(order, begin, end)
            number += 1
            done += end - begin

    def _plan(self, order: np.ndarray, begin: int, end: int) -> Block:
        """The steps from `begin` to `end` of an epoch."""
        config = self.config
        dealing = self.dealing
        size = config.global_batch_size
        places = np.full((end - begin) * size, -1, dtype=np.int64)
        taken = order[begin * size : end * size]
        places[: len(taken)] = taken
        samples = places.reshape(-1, size)
        there = (samples >= 0) & self.sizes.is_usable[samples]
        tokens = np.where(there, self.sizes.tokens[samples], 0)
        hands = np.zeros_like(samples)
        if dealing.costs is not None and dealing.ranks > 1:
            hands = deal(np.where(there, dealing.costs[samples], 0.0), dealing.ranks)
        longest_first = np.lexsort((samples, -tokens), axis=1)
        samples, there, tokens, hands = (
            np.take_along_axis(column, longest_first, axis=1) for column in (samples, there, tokens, hands)
        )
        limits = config.max_tokens, config.micro_batch_size
        if dealing.costs is not None and dealing.rows > 1:
            costs = np.where(there, dealing.costs[samples], 0.0)
            rows = even_rows(costs, tokens, there, hands, dealing.ranks, dealing.rows, *limits)
        else:
            rows = first_fit(tokens, there, hands, dealing.ranks, *limits)
        return Block(samples, there, hands, rows)

    def _survey(self) -> "Survey":
        """What is to be known of all steps before the first. Of several processes each plans its share of them and all
        get the whole, so all must call."""
        part, parts = ranks.rank_and_size()
        survey = Survey(self.dealing.ranks)
        for _, _, block in self._blocks(0, part, parts):
            survey.add(block, self.sizes)
        whole = Survey.joined(ranks.gather_on_all(survey))
        usable = self.sizes.usable
        columns = (self.sizes.tokens, self.sizes.patches, self.sizes.supervised)
        whole.heaviest_samples = heaviest(np.stack([column[usable] for column in columns], axis=1))
        whole.largest_picture = int(self.sizes.usable_grids[:, 1:3].prod(axis=1).max(initial=0))
        return whole


def training_steps(sizes: Sizes, examples: Examples, config: Config, dealing: Dealing | None = None) -> Steps:
    """Every epoch in its order, up to `--max_steps`."""

    if dealing is None:
        refuse_several_ranks(config)

    def order(epoch: int) -> np.ndarray:
        return examples.order(config.seed, epoch)

    return Steps(sizes, order, examples.epoch_samples, config.epochs, config.max_steps, config, dealing)


def refuse_several_ranks(config: Config) -> None:
    """Raise UserError for settings that split over several processes what this one alone is to train."""
    for name in SPLITS:
        if (size := getattr(config, name)) > 1:
            raise UserError(
                f"--{name} {size} needs {size} processes or a multiple of them, and finetune.py is one: "
                f"NPROC_PER_NODE={size} ./finetune_distributed.sh --{name} {size}"
            )


def held_out_steps(sizes: Sizes, config: Config, dealing: Dealing | None = None) -> Steps:
    """Every sample once, in the order of the files."""
    return Steps(sizes, lambda _: np.arange(len(sizes)), len(sizes), 1, None, config, dealing)


# ---- which rank, which micro-batch ----------------------------------------------------------------------------------


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Deal the samples of each step, costs (N, G), to ranks (N, G) so that the slowest has as little as can be: the
    costliest first, each to the rank with least so far (Graham's LPT rule, 1969). The same answer on every rank."""
    steps = np.arange(len(costs))
    loads = np.zeros((len(costs), ranks))
    hands = np.zeros(costs.shape, dtype=np.int64)
    for column in np.argsort(-costs, axis=1, kind="stable").T:  # of equals, the first stays first
        hand = loads.argmin(axis=1)
        hands[steps, column] = hand
        loads[steps, hand] += costs[steps, column]
    return hands


def first_fit(
    tokens: np.ndarray, there: np.ndarray, hands: np.ndarray, ranks: int, max_tokens: int, micro_batch_size: int | None
) -> np.ndarray:
    """Pack the samples of each step, tokens (N, G) longest first, into micro-batches (N, G) of their ranks: each into
    the first that has room.

    Which samples share a forward pass changes memory and speed, never the mathematics.
    """
    steps = np.arange(len(tokens))
    used = np.zeros((len(tokens), ranks, 1), dtype=np.int64)  # tokens of each micro-batch; the last ones are empty
    members = np.zeros_like(used)
    rows = np.zeros(tokens.shape, dtype=np.int64)
    for column in range(tokens.shape[1]):
        hand = hands[:, column]
        beside = members[steps, hand]  # (N, micro-batches)
        fits = used[steps, hand] + tokens[:, column, None] <= max_tokens
        fits &= beside < (micro_batch_size or tokens.shape[1])
        row = (fits | (beside == 0)).argmax(axis=1)
        rows[:, column] = row
        used[steps, hand, row] += tokens[:, column]
        members[steps, hand, row] += there[:, column]
        if row.max() == used.shape[2] - 1:
            wider = ((0, 0), (0, 0), (0, used.shape[2]))
            used = np.pad(used, wider)
            members = np.pad(members, wider)
    return rows


def even_rows(
    costs: np.ndarray,
    tokens: np.ndarray,
    there: np.ndarray,
    hands: np.ndarray,
    ranks: int,
    least: int,
    max_tokens: int,
    micro_batch_size: int | None,
) -> np.ndarray:
    """Deal the samples of each step, costs and tokens (N, G), to micro-batches (N, G) of equal cost of their ranks.

    The costliest first, each to that of `least` micro-batches which costs least so far and has room; where none has,
    to a further one. First-fit fills the first ones and leaves little for the last, behind which stages of a pipeline
    would wait.
    """
    steps = np.arange(len(tokens))
    loads = np.zeros((len(tokens), ranks, least))
    used = np.zeros(loads.shape, dtype=np.int64)  # tokens of each micro-batch
    members = np.zeros_like(used)
    rows = np.zeros(tokens.shape, dtype=np.int64)
    for column in np.argsort(-costs, axis=1, kind="stable").T:
        if members[:, :, -1].any():  # a further one may be needed
            wider = ((0, 0), (0, 0), (0, 1))
            loads = np.pad(loads, wider)
            used = np.pad(used, wider)
            members = np.pad(members, wider)
        hand = hands[steps, column]
        beside = members[steps, hand]  # (N, micro-batches)
        own_tokens = tokens[steps, column]
        fits = used[steps, hand] + own_tokens[:, None] <= max_tokens
        fits &= beside < (micro_batch_size or tokens.shape[1])
        further = (np.arange(fits.shape[1]) >= least) & (beside == 0)
        key = np.where(fits | (beside == 0), loads[steps, hand], np.inf)
        row = np.where(further, np.finfo(float).max, key).argmin(axis=1)
        rows[steps, column] = row
        loads[steps, hand, row] += costs[steps, column]
        used[steps, hand, row] += own_tokens
        members[steps, hand, row] += there[steps, column]
    return rows


# ---- all steps at a glance ------------------------------------------------------------------------------------------


class Survey:
    """What all steps of a run have in common, and the heaviest of them."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.steps = 0
        self.passes = 0  # micro-batches of all steps, on each rank
        self.samples = 0
        self.fewest = 2**62  # micro-batches of a step
        self.most = 0
        self.empty_steps = 0  # steps of which every sample is left out
        self.samples_of_rank = np.zeros(ranks, dtype=np.int64)
        self.idle_turns = 0  # of all ranks in all steps: how often one has no sample
        self.heaviest = np.zeros((0, 3), dtype=np.int64)  # Loads: no micro-batch is above all of them
        self.heaviest_samples = self.heaviest  # the same of micro-batches of one sample
        self.largest_picture = 0  # patches of an image, or of a pair of frames

    @property
    def idle_ranks(self) -> int:
        """Ranks that have no sample in any step."""
        return int((self.samples_of_rank == 0).sum())

    def add(self, block: Block, sizes: Sizes) -> None:
        there = block.there
        passes = block.passes()
        # A turn is a rank in a step; how many samples has each?
        turns = np.arange(len(there))[:, None] * self.ranks + block.hands
        of_turns = np.bincount(turns[there], minlength=len(there) * self.ranks).reshape(-1, self.ranks)
        self.steps += len(there)
        self.passes += int(passes.sum())
        self.samples += int(there.sum())
        self.fewest = min(self.fewest, int(passes.min()))
        self.most = max(self.most, int(passes.max()))
        self.empty_steps += int((~there.any(axis=1)).sum())
        self.samples_of_rank += of_turns.sum(axis=0)
        self.idle_turns += int((of_turns == 0).sum())
        micro_batches = (turns * self.most + block.rows)[there]
        samples = block.samples[there]
        columns = (sizes.tokens, sizes.patches, sizes.supervised)
        loads = np.stack([np.bincount(micro_batches, column[samples]) for column in columns], axis=1)
        self.heaviest = heaviest(np.concatenate([self.heaviest, loads.astype(np.int64)]))

    @staticmethod
    def joined(parts: list["Survey"]) -> "Survey":
        """The survey of all steps from those of parts of them."""
        whole = Survey(parts[0].ranks)
        for name in ("steps", "passes", "samples", "empty_steps", "samples_of_rank", "idle_turns"):
            setattr(whole, name, sum(getattr(part, name) for part in parts))
        whole.fewest = min(part.fewest for part in parts)
        whole.most = max(part.most for part in parts)
        whole.heaviest = heaviest(np.concatenate([part.heaviest for part in parts]))
        return whole


def heaviest(loads: np.ndarray) -> np.ndarray:
    """Of loads (M, 3) those that no other one exceeds in every number or equals: whatever grows with the three numbers
    is largest for one of them."""
    kept = []
    loads = loads[loads.any(axis=1)]
    while len(loads):
        most = loads[loads.sum(axis=1).argmax()]
        kept.append(most)
        loads = loads[(loads > most).any(axis=1)]
    return np.array(kept, dtype=np.int64).reshape(-1, 3)
