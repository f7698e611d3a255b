"""The work of a step as it falls on ranks and rows: what a layout of ranks is chosen for.

Letters in shapes: N steps that are looked at, G samples of a global batch, R ranks with samples of their own in all of
these steps, M rows (micro-batches) of each.
"""

import random
from dataclasses import dataclass, field

import numpy as np

from util.config import Config
from util.cost.flops import attention_flops, forward_flops, training_flops
from util.cost.sizes import Columns, Sizes
from util.dataset import Size
from util.steps import deal, heaviest
from util.vision import TEMPORAL, Budget, Grid, frame_count, frame_size, plain_image_grid

MOST_LOOKED = 1024  # samples, where a global batch has fewer
MOST_STEPS = 4


@dataclass
class Rows:
    """What the rows of the ranks hold: arrays (R, M)."""

    tokens: np.ndarray
    supervised: np.ndarray
    patches: np.ndarray
    largest: np.ndarray  # patches of the largest image or frame, which no two ranks can share
    forward: dict[str, np.ndarray]  # FLOPs of the forward pass by part (flops.forward_flops)
    attention: np.ndarray  # of the language model's those of attention
    training: np.ndarray  # FLOPs of forward and backward passes
    heaviest: np.ndarray  # (k, 3) Loads: no sample of the data is above all of them, drawn or not


@dataclass
class Workload:
    """The samples of some global batches: arrays (N, G). A sample that is not there has zeros."""

    columns: Columns
    largest: np.ndarray
    forward: dict[str, np.ndarray]
    attention: np.ndarray
    training: np.ndarray
    heaviest: np.ndarray  # as Rows has them
    words: str  # what samples they are
    dealt: dict = field(default_factory=dict)  # what `rows` has given, by its arguments

    @classmethod
    def of(cls, sizes: Sizes, order: np.ndarray, config: Config, model_config, words: str) -> "Workload":
        """The first global batches of samples in this order."""
        batch = min(config.global_batch_size, len(order))
        steps = max(1, min(MOST_STEPS, len(order) // batch, MOST_LOOKED // batch))
        chosen = order[: steps * batch].reshape(steps, batch)
        columns = Columns(*(column[chosen] for column in sizes.columns()))
        largest = np.zeros(len(sizes))
        owners = np.repeat(np.arange(len(sizes)), np.diff(sizes.grid_ends, prepend=0))
        np.maximum.at(largest, owners, sizes.grids[:, 1].astype(float) * sizes.grids[:, 2])
        forward = {}
        for part, operations in forward_flops(model_config, columns).items():
            forward[part] = np.broadcast_to(operations, chosen.shape)
        training = training_flops(model_config, [columns], config)
        loads = np.stack([column[order] for column in (sizes.tokens, sizes.patches, sizes.supervised)], axis=1)
        attention = attention_flops(model_config, columns)
        return cls(columns, largest[chosen], forward, attention, training, heaviest(loads), words)

    @classmethod
    def of_sizes(cls, drawn: list[Size], config: Config, model_config, words: str) -> "Workload":
        """Samples of these sizes, a global batch after the other."""
        from util.cost.sizes import Finding

        sizes = Sizes.of(Finding(size) for size in drawn)
        return cls.of(sizes, np.arange(len(drawn)), config, model_config, words)

    @property
    def samples(self) -> int:
        """Of a global batch."""
        return self.training.shape[1]

    @property
    def work(self) -> float:
        """FLOPs of a step, its mean."""
        return float(self.training.sum(axis=1).mean())

    @property
    def tokens(self) -> float:
        """Of a step, their mean."""
        return float(self.columns.tokens.sum(axis=1).mean())

    def own(self, data: int) -> np.ndarray:
        """The samples of each of `data` ranks in each step, as the loop deals them: their numbers (R, most of one), or
        -1 where a rank has fewer."""
        if ("own", data) not in self.dealt:
            steps = len(self.training)
            hands = deal(self.training, data)
            owners = (np.arange(steps)[:, None] * data + hands).ravel()
            counts = np.bincount(owners, minlength=steps * data)
            own = np.full((steps * data, counts.max()), -1)
            by_owner = np.argsort(owners, kind="stable")
            own[np.arange(counts.max()) < counts[:, None]] = by_owner
            self.dealt["own", data] = own
        return self.dealt["own", data]

    def rows(self, data: int, count: int) -> Rows:
        """The rows of each of `data` ranks: `count` of equal cost, as near as its samples allow."""
        if (data, count) in self.dealt:
            return self.dealt[data, count]
        own = self.own(data)
        costs = np.where(own >= 0, self.training.ravel()[own], 0.0)
        places = np.arange(len(own))[:, None] * count + deal(costs, count)
        samples, places = own[own >= 0], places[own >= 0]

        def total(column: np.ndarray) -> np.ndarray:
            return np.bincount(places, column.ravel()[samples], len(own) * count).reshape(len(own), count)

        largest = np.zeros(len(own) * count)
        np.maximum.at(largest, places, self.largest.ravel()[samples])
        forward = {part: total(operations) for part, operations in self.forward.items()}
        made = Rows(
            tokens=total(self.columns.tokens),
            supervised=total(self.columns.supervised),
            patches=total(self.columns.patches),
            largest=largest.reshape(len(own), count),
            forward=forward,
            attention=total(self.attention),
            training=total(self.training),
            heaviest=self.heaviest,
        )
        self.dealt[data, count] = made
        return made


# ---- a mix where there are no data yet ------------------------------------------------------------------------------


def draw(generator: random.Random, budget: Budget) -> Size:
    """One sample of the mix: 30 % text, 50 % images from 0.1 to 8.3 megapixels, 20 % videos from 2 s to 1 h."""
    text, kind = round(generator.lognormvariate(4.5, 1)) + 30, generator.random()
    grids = []
    if 0.3 <= kind < 0.8:
        height, width = ((336, 448), (1080, 1920), (2160, 3840))[generator.choices(range(3), (5, 3, 2))[0]]
        grids = [plain_image_grid({}, height, width, Budget(model_type=budget.model_type))]
    elif kind >= 0.8:
        seconds = 2 * (1800 ** generator.random())  # 2 s to 1 h, evenly on a logarithmic scale
        frames = frame_count({}, round(seconds * 30), 30, budget)
        (height, width), _ = frame_size({}, 720, 1280, frames, budget)
        patch = budget.family.patch
        grids = [Grid(frames // TEMPORAL, height // patch, width // patch)]
    return Size(text + sum(grid.tokens for grid in grids), max(1, text // 4), grids)


def typical(config: Config, model_config, seed: int = 0) -> Workload:
    """Global batches of the mix under the budget of `config` for videos."""
    steps = max(1, min(MOST_STEPS, MOST_LOOKED // config.global_batch_size))
    generator = random.Random(seed)
    budget = Budget.of(config, model_config.model_type)
    drawn = [draw(generator, budget) for _ in range(steps * config.global_batch_size)]
    words = "a mix of 30 % texts, 50 % images up to 4K and 20 % videos of 2 s to 1 h"
    return Workload.of_sizes(drawn, config, model_config, words)
