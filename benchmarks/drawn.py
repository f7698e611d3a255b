"""Packed batches drawn in memory: no file is read and no picture decoded, so that what is timed is the device's work.

Lengths, sides and pixels are random, from a seed; the collator is the one that training uses. What a batch is made of
has a name (KINDS), or is a load: `load_4096_8192` is one row of 4,096 tokens, with images of 8,192 patches in it.
"""

import math
import random
import re
from dataclasses import dataclass, field

import numpy as np
import torch

from util.collator import Batch, Collator
from util.conversation import Encoded
from util.dataset import Sample, Size
from util.family import FAMILIES, QWEN2_VL
from util.vision import MERGE, TEMPORAL, Grid, Medium

PATCH = FAMILIES[QWEN2_VL].patch
KINDS = ("text", "images_448", "images_896", "mixed")
TEXT_BESIDE_AN_IMAGE = 150  # tokens, with the template's
SUPERVISED_BESIDE_AN_IMAGE = 100
MIX = {"image": 0.5, "two images": 0.1, "video": 0.1, "text": 0.3}  # that of train_step.py
LARGEST_IMAGE = 64  # patches along a side, of a load: 4,096 patches


@dataclass
class Drawn:
    """One step: its micro-batches, and what each of its samples costs."""

    batches: list[Batch]
    sizes: list[Size]
    loads: list[tuple[int, int, int]] = field(default_factory=list)  # tokens, patches, supervised of each micro-batch


class Drawer:
    """Draws samples of a kind, ids uniform in the vocabulary.

    `shrink` divides lengths of texts and sides of images, for models that are tiny.
    """

    def __init__(self, kind: str, seed: int, vocabulary: int, shrink: int = 1) -> None:
        self.kind = kind
        self.shrink = shrink
        self.random = random.Random(seed)
        self.pixels = np.random.default_rng(seed)
        self.ordinary = vocabulary * 9 // 10  # special tokens are the last ones

    def step(self, micro_batches: int, max_tokens: int, pinned: bool) -> Drawn:
        """One step of packed rows, each as full as the samples that are drawn let it be."""
        drawn = Drawn([], [])
        for _ in range(micro_batches):
            samples = sorted(self.row(max_tokens), key=lambda sample: -size_of(sample).tokens)
            sizes = [size_of(sample) for sample in samples]
            batch = Collator()(samples)
            drawn.batches.append(batch.pin_memory() if pinned else batch)
            drawn.sizes += sizes
            totals = [sum(getattr(size, name) for size in sizes) for name in ("tokens", "patches", "supervised")]
            drawn.loads.append((totals[0], totals[1], totals[2]))
        return drawn

    def row(self, max_tokens: int) -> list[Sample]:
        """Samples that fit one micro-batch; the first one that does not fit ends it."""
        if load := re.fullmatch(r"load_(\d+)_(\d+)", self.kind):
            return [self.load(*map(int, load.groups()))]
        samples: list[Sample] = []
        used = 0
        while True:
            sample = self.sample()
            used += size_of(sample).tokens
            if samples and used > max_tokens:
                return samples
            samples.append(sample)

    def sample(self) -> Sample:
        if self.kind == "text":
            length = self.random.randint(256, 2048) // self.shrink
            return self.conversation([], length, length // 2)
        if self.kind in ("images_448", "images_896"):
            side = MERGE * max(1, int(self.kind[-3:]) // (PATCH * MERGE) // self.shrink)
            text = TEXT_BESIDE_AN_IMAGE // self.shrink
            return self.conversation([Grid(1, side, side)], text, SUPERVISED_BESIDE_AN_IMAGE // self.shrink)
        if self.kind == "mixed":
            return self.mixed()
        raise ValueError(f"{self.kind}: not one of {', '.join(KINDS)} or load_TOKENS_PATCHES")

    def mixed(self) -> Sample:
        """Short texts are as frequent as long ones: the logarithm of the length is uniform."""
        kind = self.random.choices(list(MIX), list(MIX.values()))[0]
        images = {"image": 1, "two images": 2}.get(kind, 0)
        grids = [Grid(1, self.side(224, 1120), self.side(224, 1120)) for _ in range(images)]
        if kind == "video":
            grids = [Grid(self.random.randint(1, 6), self.side(224, 420), self.side(224, 420))]
        question, answer = self.length(100), self.length(400)
        return self.conversation(grids, question + answer + 16, answer)

    def side(self, least: int, most: int) -> int:
        """Patches along a side of so many pixels, a multiple of MERGE."""
        return MERGE * max(1, round(self.random.uniform(least, most) / (PATCH * MERGE) / self.shrink))

    def length(self, most: int) -> int:
        return max(1, round(math.exp(self.random.uniform(math.log(2), math.log(most))) / self.shrink))

    def load(self, tokens: int, patches: int) -> Sample:
        """One sample of so many tokens and patches; half of its text is supervised."""
        grids = []
        left = patches
        while left > 0:
            side = LARGEST_IMAGE if left >= LARGEST_IMAGE**2 else MERGE * (math.isqrt(left) // MERGE)
            grids.append(Grid(1, side, side))
            left -= side * side
            if left < MERGE**2:
                break
        text = tokens - sum(grid.tokens for grid in grids)
        if text < len(grids) + 2:
            raise ValueError(f"load_{tokens}_{patches}: {patches} patches leave no room for text in {tokens} tokens")
        return self.conversation(grids, text, text // 2)

    def conversation(self, grids: list[Grid], text: int, supervised: int) -> Sample:
        """Media, then `text` tokens, the last `supervised` of which are the answer."""
        text = max(text, 2)
        supervised = max(1, min(supervised, text - 1))
        ids = self.pixels.integers(0, self.ordinary, len(grids) + text).tolist()
        weights = [0.0] * (len(ids) - supervised) + [1.0] * supervised
        encoded = Encoded(ids, weights, list(range(len(grids))))
        return Sample(encoded, [self.medium(grid) for grid in grids], self.kind)

    def medium(self, grid: Grid) -> Medium:
        is_video = grid.t > 1
        width = 3 * PATCH**2 * (TEMPORAL if is_video else 1)
        patches = torch.from_numpy(self.pixels.integers(0, 256, (grid.patches, width), np.uint8))
        return Medium(patches, grid, is_video)


def size_of(sample: Sample) -> Size:
    grids = [medium.grid for medium in sample.media]
    tokens = len(sample.encoded.input_ids) + sum(grid.tokens - 1 for grid in grids)
    return Size(tokens, sum(sample.encoded.supervised), grids)
