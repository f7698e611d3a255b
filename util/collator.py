"""Samples -> one packed batch: no padding, and every index that the forward pass needs, made on the CPU.

Letters in shapes: B samples in the batch, T tokens in the packed row, P patches, V visual tokens (= P / 4),
S supervised tokens, N images and videos.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain
from typing import Any

import torch

from util.attention import Segments
from util.conversation import Encoded
from util.data.features import Unkept
from util.dataset import Sample
from util.family import FAMILIES, QWEN2_VL, Family, window_order
from util.vision import MERGE, TEMPORAL, Grid, Medium


@dataclass
class Batch:
    """One micro-batch. Visual things stand images first, then videos, each in the order of the samples.

    Those whose features were kept (data/features.py) stand before all others, and the vision tower does not see them:
    P counts the patches of the others alone.
    """

    input_ids: torch.Tensor  # (T,) int64; a visual token is its placeholder's id
    position_ids: torch.Tensor  # (3, T) int64: temporal, height, width
    segments: Segments  # where each of the B samples begins and ends in the row
    supervised_index: torch.Tensor  # (S,) int64: rows of the hidden states whose next token is supervised
    target_ids: torch.Tensor  # (S,) int64: those next tokens
    target_weights: torch.Tensor  # (S,) float32: how much each counts in the loss
    visual_index: torch.Tensor  # (V,) int64: rows that are visual tokens
    image_patches: torch.Tensor  # (P of images, 3 * patch * patch) uint8
    video_patches: torch.Tensor  # (P of videos, 2 * 3 * patch * patch) uint8
    grid_thw: torch.Tensor  # (N, 3) int64: what transformers' own forward takes; ours needs what stands below alone
    vision_position_ids: torch.Tensor  # (P, 2) int64: row and column of each patch
    vision_segments: Segments  # each image, each pair of video frames attends within itself
    window_segments: Segments  # each window of these, where most of the tower's blocks see no further (Qwen2.5-VL)
    where: list[str]  # the samples' names, for error messages
    counts: dict[str, float]  # for the log: samples, tokens ...; skipped samples are added by data/bad_samples.py
    # What a frozen tower once gave: (P, its width), or (V, D) behind the merger; (0, 0) where nothing was kept.
    kept_features: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    kept_grids: list[Grid] = field(default_factory=list)  # of the images and videos that these are of
    unkept: list[Unkept] = field(default_factory=list)  # the images and videos that the tower sees

    def _map(self, method: str, *args, **kwargs) -> "Batch":
        """This batch, a method called on each of its tensors and segments."""
        changed = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if hasattr(value, method):
                changed[item.name] = getattr(value, method)(*args, **kwargs)
        return replace(self, **changed)

    def to(self, device: torch.device) -> "Batch":
        return self._map("to", device, non_blocking=True)

    def pin_memory(self) -> "Batch":
        return self._map("pin_memory")

    def halves(self) -> list["Batch"]:
        """The same samples in two batches that each have about half of the tokens; none where there is one sample.

        Made of views of this batch's tensors, on the CPU: nothing is read or decoded again.
        """
        lengths = self.segments.lengths
        if len(lengths) <= 1:
            return []
        ends = torch.tensor(lengths).cumsum(0)[:-1]  # where the row may be cut
        first = int((ends - len(self.input_ids) / 2).abs().argmin()) + 1  # samples of the first half
        return [self._part(0, first), self._part(first, len(lengths))]

    def _part(self, first: int, last: int) -> "Batch":
        """The batch of the samples [first, last)."""
        lengths = self.segments.lengths
        begin, end = sum(lengths[:first]), sum(lengths[:last])
        targets = slice(*torch.searchsorted(self.supervised_index, torch.tensor([begin, end])).tolist())
        # Visual tokens stand kept ones first, then images, then videos, each in the order of the samples: of each kind
        # a sample's neighbours are neighbours. A token is MERGE**2 patches, wherever it stands.
        kept = sum(grid.tokens for grid in self.kept_grids)
        images = len(self.image_patches) // MERGE**2
        of_kept, of_images, of_videos = self.visual_index.tensor_split([kept, kept + images])
        kept_tokens = of_rows(of_kept, begin, end)
        image_tokens = of_rows(of_images, begin, end)
        video_tokens = of_rows(of_videos, begin, end)
        image_patches, video_patches = patches_of(image_tokens), patches_of(video_tokens)
        grids = [Grid(*sizes) for sizes in self.grid_thw.tolist()]
        kept_ones = between(grids, kept_tokens, 0)
        seen = between(grids, image_tokens, kept) + between(grids, video_tokens, kept + images)
        before = len(self.image_patches)
        patches = [image_patches, slice(before + video_patches.start, before + video_patches.stop)]
        visual_index = torch.cat([of_kept[kept_tokens], of_images[image_tokens], of_videos[video_tokens]])
        return Batch(
            input_ids=self.input_ids[begin:end],
            position_ids=self.position_ids[:, begin:end],
            segments=Segments.of(lengths[first:last]),
            supervised_index=self.supervised_index[targets] - begin,
            target_ids=self.target_ids[targets],
            target_weights=self.target_weights[targets],
            visual_index=visual_index - begin,
            image_patches=self.image_patches[image_patches],
            video_patches=self.video_patches[video_patches],
            vision_position_ids=torch.cat([self.vision_position_ids[some] for some in patches]),
            grid_thw=joined([torch.tensor([grids[number][:3]]) for number in kept_ones + seen], torch.int64, 3),
            vision_segments=pieces_of(self.vision_segments, patches),
            window_segments=pieces_of(self.window_segments, patches),
            where=self.where[first:last],
            counts=count(last - first, end - begin, len(visual_index), self.target_weights[targets]),
            kept_features=self._features_of(kept_tokens),
            kept_grids=[self.kept_grids[number] for number in kept_ones],
            unkept=[self.unkept[number - len(self.kept_grids)] for number in seen],
        )

    def _features_of(self, tokens: slice) -> torch.Tensor:
        """The kept features of visual tokens: one row of each, or those of its patches."""
        rows = len(self.kept_features) // max(1, sum(grid.tokens for grid in self.kept_grids))
        return self.kept_features[tokens.start * rows : tokens.stop * rows]


def between(grids: list[Grid], tokens: slice, before: int) -> list[int]:
    """The numbers of the media whose visual tokens are `tokens`, counted after the first `before` ones of all."""
    ends = accumulate(grid.tokens for grid in grids)
    return [number for number, end in enumerate(ends) if before + tokens.start < end <= before + tokens.stop]


def of_rows(visual_index: torch.Tensor, begin: int, end: int) -> slice:
    """Which of these visual tokens, whose samples follow each other, stand in the rows [begin, end) of some samples."""
    return slice(int((visual_index < begin).sum()), int((visual_index < end).sum()))


def patches_of(tokens: slice) -> slice:
    """The patches of visual tokens."""
    return slice(tokens.start * MERGE**2, tokens.stop * MERGE**2)


def pieces_of(segments: Segments, ranges: Iterable[slice]) -> Segments:
    """The pieces of a row that lie in ranges of it, one range after the other."""
    lengths = segments.lengths
    found = []
    for wanted in ranges:
        first, last = torch.searchsorted(segments.host_starts, torch.tensor([wanted.start, wanted.stop])).tolist()
        found += lengths[first:last]
    return Segments.of(found)


def total_counts(batches: Sequence[Batch]) -> dict[str, float]:
    """The counts of several batches, added up."""
    totals: Counter = Counter()
    for batch in batches:
        totals.update(batch.counts)
    return dict(totals)


@dataclass
class Visual:
    """What a batch gathers of its images, or of its videos, or of what was kept: a list entry for each of them."""

    family: Family
    rows: list[torch.Tensor] = field(default_factory=list)  # places of its visual tokens in the packed row
    patches: list[torch.Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)  # row and column of each patch
    features: list[torch.Tensor] = field(default_factory=list)  # of what was kept
    unkept: list[Unkept] = field(default_factory=list)  # of all others

    def add(self, medium: Medium, rows: torch.Tensor) -> None:
        """One more, whose visual tokens take these rows. All that is of it stands as the tower reads it: where that has
        windows, window after window."""
        order, _ = windows_of(medium.grid, self.family)
        self.rows.append(rows[order])
        self.grids.append(medium.grid)
        if medium.features is not None:  # which the tower gave in its own order
            self.features.append(medium.features)
            return
        self.patches.append(in_order(medium.patches, order))
        self.positions.append(in_order(patch_positions(medium.grid), order))
        self.unkept.append(Unkept(medium.key, medium.grid, medium.is_video))


class Visuals:
    """All that a batch gathers of its images and videos."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.kept = Visual(family)
        self.images = Visual(family)  # apart from videos, since their patches have other sizes
        self.videos = Visual(family)

    def add(self, medium: Medium, rows: torch.Tensor) -> None:
        """One more, whose visual tokens take these rows."""
        kind = self.videos if medium.is_video else self.images
        if medium.features is not None:
            kind = self.kept
        kind.add(medium, rows)

    def of_batch(self) -> dict[str, Any]:
        """The fields of a Batch that come of them."""
        kept = self.kept
        images = self.images
        videos = self.videos
        grids = images.grids + videos.grids  # that the tower sees, images first
        patch_bytes = 3 * self.family.patch**2
        return {
            "visual_index": joined(kept.rows + images.rows + videos.rows, torch.int64),
            "image_patches": joined(images.patches, torch.uint8, patch_bytes),
            "video_patches": joined(videos.patches, torch.uint8, TEMPORAL * patch_bytes),
            "grid_thw": joined([torch.tensor([grid[:3]]) for grid in kept.grids + grids], torch.int64, 3),
            "vision_position_ids": joined(images.positions + videos.positions, torch.int64, 2),
            **tower_segments(grids, self.family),
            "kept_features": torch.cat(kept.features) if kept.features else torch.zeros(0, 0),
            "kept_grids": kept.grids,
            "unkept": images.unkept + videos.unkept,
        }


class Collator:
    """Packs samples into one row; nothing is padded or truncated. An empty list gives a batch of one dummy token."""

    def __init__(self, model_type: str = QWEN2_VL) -> None:
        self.family = FAMILIES[model_type]

    def __call__(self, samples: list[Sample]) -> Batch:
        ids, positions, supervised_index, targets, weights, lengths = [], [], [], [], [], []
        visuals = Visuals(self.family)
        start = 0  # of the sample in the packed row
        for sample in samples or [NO_SAMPLE]:
            places = [*chain.from_iterable(medium.grid.places for medium in sample.media)]
            row_ids, row_weights, spans = expand(sample.encoded, places)
            ids.append(row_ids)
            positions.append(mrope_positions(len(row_ids), spans, places))
            # Shift once, here: row i predicts token i + 1. A sample's first token is nobody's target.
            predicts = torch.nonzero(row_weights[1:]).flatten()
            supervised_index.append(predicts + start)
            targets.append(row_ids[1:][predicts])
            weights.append(row_weights[1:][predicts])
            visual_rows = joined([torch.arange(begin, end) + start for begin, end in spans], torch.int64)
            rows_of_media = visual_rows.split([medium.grid.tokens for medium in sample.media])
            for medium, rows in zip(sample.media, rows_of_media, strict=True):
                visuals.add(medium, rows)
            lengths.append(len(row_ids))
            start += len(row_ids)
        target_weights = torch.cat(weights)
        of_visuals = visuals.of_batch()
        return Batch(
            input_ids=torch.cat(ids),
            position_ids=torch.cat(positions, dim=1),
            segments=Segments.of(lengths),
            supervised_index=torch.cat(supervised_index),
            target_ids=torch.cat(targets),
            target_weights=target_weights,
            where=[sample.where for sample in samples],
            counts=count(len(samples), start, len(of_visuals["visual_index"]), target_weights),
            **of_visuals,
        )


def count(samples: int, tokens: int, visual_tokens: int, target_weights: torch.Tensor) -> dict[str, float]:
    """What the log counts of a batch; the dummy token of an empty one is not counted."""
    return {
        "samples": samples,
        "tokens": tokens if samples else 0,
        "visual_tokens": visual_tokens,
        "supervised_tokens": len(target_weights),
        "supervised_weight": target_weights.sum(dtype=torch.float64).item(),  # what the sum of losses is divided by
    }


# A rank whose share of a step is used up still runs forward passes: FSDP gathers each weight on all ranks together.
NO_SAMPLE = Sample(Encoded([0], [0.0], []), [], "")


def joined(parts: list[torch.Tensor], dtype: torch.dtype, *width: int) -> torch.Tensor:
    """Tensors (n, *width) one after another; (0, *width) of none."""
    return torch.cat([*parts, torch.zeros(0, *width, dtype=dtype)])


def tower_segments(grids: list[Grid], family: Family) -> dict[str, Segments]:
    """The two fields of a Batch that say who sees whom in the vision tower."""
    whole = []
    windows = []
    for grid in grids:
        whole += [grid.h * grid.w] * grid.t
        windows += windows_of(grid, family)[1]
    return {"vision_segments": Segments.of(whole), "window_segments": Segments.of(windows)}


def windows_of(grid: Grid, family: Family) -> tuple[slice | torch.Tensor, list[int]]:
    """An index that brings a medium's tokens into the order in which the tower reads them, window after window, and how
    many patches each window has. Without windows that is the order of the text, and all of a frame."""
    if not family.window:
        return slice(None), [grid.h * grid.w] * grid.t
    order, sizes = window_order(grid.t, grid.h // MERGE, grid.w // MERGE, family.window)
    return order, [MERGE**2 * tokens for tokens in sizes]


def in_order(patches: torch.Tensor, order: slice | torch.Tensor) -> torch.Tensor:
    """Patches (P, ...) of a medium with its tokens, four patches each, in another order."""
    return patches.unflatten(0, (-1, MERGE**2))[order].flatten(0, 1)


def expand(encoded: Encoded, grids: list[Grid]) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Repeat each placeholder as often as its medium has tokens.

    `grids`: of the placeholders. Returns ids (T,), weights (T,) float32, and for each the [begin, end) of its visual
    tokens.
    """
    ids = torch.tensor(encoded.input_ids)
    repeats = torch.ones(len(ids), dtype=torch.int64)
    for placeholder, grid in zip(encoded.placeholders, grids, strict=True):
        repeats[placeholder] = grid.tokens
    # A placeholder becomes as many tokens as its medium has; every other token stays one.
    ends = repeats.cumsum(0)
    begins = ends - repeats
    spans = [(int(begins[place]), int(ends[place])) for place in encoded.placeholders]
    weights = torch.tensor(encoded.weights, dtype=torch.float32)
    return ids.repeat_interleave(repeats), weights.repeat_interleave(repeats), spans


def mrope_positions(length: int, spans: list[tuple[int, int]], grids: list[Grid]) -> torch.Tensor:
    """Positions (3, T) of one sample: temporal, height, width (Qwen2-VL report, arXiv 2409.12191, section 2.1).

    `spans` and `grids`: of what stands together in the text, an image, a video or a pair of frames.

    Text counts up on all three axes; a medium spreads over its merged grid; what follows it continues at 1 + the
    largest position so far on any axis. That is the released model's rule (transformers 4.57); transformers 5.3 to
    5.23 leave out the temporal axis and go back in time after a long video. Qwen2.5-VL's time axis goes on by
    `grid.step`, whose multiples are cut to whole numbers (its released code, transformers 4.49).
    """
    positions = torch.empty(3, length, dtype=torch.int64)
    token, position = 0, 0
    for (begin, end), grid in zip(spans, grids, strict=True):
        # text: one position after another, the same on all three axes
        positions[:, token:begin] = torch.arange(position, position + begin - token)
        position += begin - token
        # a medium: each token has its place on the merged grid, counted from where the text ended
        time = (torch.arange(grid.t) * grid.step).long()
        axes = [time, torch.arange(grid.h // MERGE), torch.arange(grid.w // MERGE)]
        positions[:, begin:end] = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + position
        position += 1 + max(int(axis[-1]) for axis in axes)  # what follows comes after the longest axis
        token = end
    positions[:, token:] = torch.arange(position, position + length - token)
    return positions


def patch_positions(grid: Grid) -> torch.Tensor:
    """Row and column (P, 2) of each patch, in the order of `vision.patchify`, the same for every pair of frames."""
    shape = (grid.h // MERGE, MERGE, grid.w // MERGE, MERGE)
    row = torch.arange(grid.h)[:, None].expand(grid.h, grid.w).reshape(shape).transpose(1, 2).flatten()
    column = torch.arange(grid.w).expand(grid.h, grid.w).reshape(shape).transpose(1, 2).flatten()
    # The tower rotates by place in the frame alone: every pair of frames has the same angles.
    return torch.stack([row, column], dim=1).repeat(grid.t, 1)
