"""data.json or data.jsonl -> checked examples, each encoded and with its pixels; the order of an epoch.

Four stages: an entry of a data file -> an Example (checked messages) -> a Sample (token ids and pixels), or a Size
(what it costs, from file headers alone). Which samples share an optimizer step is decided in steps.py.

A data file holds conversations: `{"messages": [{"role": ..., "content": "text" or [item, ...]}, ...]}` with items
`{"type": "image", "image": PATH}`, `{"type": "video", "video": PATH or [FRAME, ...]}`, `{"type": "text", "text": ...}`,
and boxes (data/boxes.py); tools, their calls and answers are rewritten to such messages first (data/tools.py).
data/entries.py checks each of them. Samples and messages are counted from 0.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from util import conversation, vision
from util.data import boxes, entries, fetch, weights
from util.data.lines import DataError, open_entries, shortened, split_weight, stop_on
from util.data.media import MediaReader
from util.family import window_squares
from util.formats import advice


@dataclass
class Example:
    """One checked conversation: every content is a list of items, every media path exists."""

    messages: list[dict]
    where: str  # "train_data/data.json, sample 3"
    kind: str | None = None  # free-form name of the kind of sample, if the file gives one
    unused: frozenset[str] = frozenset()  # keys of the file that have no effect on training
    budget: vision.Budget | None = None  # set only by evaluation, for a question about a sample that is shrunk

    @property
    def media(self) -> list[dict]:
        items = itertools.chain.from_iterable(message["content"] for message in self.messages)
        return [item for item in items if item["type"] in ("image", "video")]


@dataclass
class Sample:
    """One example ready for the collator: ids with one placeholder per medium, and the media's pixels."""

    encoded: conversation.Encoded
    media: list[vision.Medium]
    where: str


@dataclass
class Size:
    """What a sample costs, known from file headers alone."""

    tokens: int  # after every placeholder is expanded
    supervised: int
    grids: list[vision.Grid]
    unlearned: int = 0  # tokens of answers that are not supervised
    weighted: int = 0  # supervised tokens that count less or more than 1

    @property
    def patches(self) -> int:
        return sum(grid.patches for grid in self.grids)

    @property
    def squares(self) -> int:
        """The squares of the patches that attend to each other: those of an image, or of a pair of frames."""
        return sum(grid.t * (grid.h * grid.w) ** 2 for grid in self.grids)

    @property
    def window_squares(self) -> int:
        """The same where only those of one window do, as in most blocks of Qwen2.5-VL's tower."""
        return sum(grid.t * window_squares(grid.h, grid.w) for grid in self.grids)


class Examples(Sequence):
    """The conversations of data files, each read and checked when it is asked for, so that files may be of any size.

    `FILE*2` gives each of a file's samples twice in an epoch, `FILE*0.5` half of them, another half each time.
    """

    def __init__(self, files: list[str], processor, train_on: str = "all") -> None:
        self.train_on = train_on  # which answers of a conversation are learned: "all", or the "last" one alone
        self.forbidden = conversation.control_tokens(processor)
        self.default_system = conversation.default_system(processor)
        self.files: list[str] = []
        self.weights: list[float] = []  # how often an epoch takes each sample of a file
        self.entries: list[Sequence] = []
        for named in files:
            file, weight = split_weight(named)
            rows = open_entries(file)
            advice.refuse_other_format(file, rows, self.forbidden)
            self.files.append(file)
            self.weights.append(weight)
            self.entries.append(rows)
        self.ends = list(itertools.accumulate(map(len, self.entries)))  # of each file, in numbers over all files
        self.left_out: frozenset[int] = frozenset()  # what --on_bad_sample skip keeps out of every step
        if not any(len(rows) * weight > 0.5 for rows, weight in zip(self.entries, self.weights, strict=True)):
            raise DataError(f"{', '.join(files)}: no samples. A data file is a JSON list of {{'messages': [...]}}.")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        """Raises DataError that names the sample, the message, the rule and the fix."""
        file, row = self._place(index)
        name = self.files[file]
        entry = self.entries[file][row]
        where = f"{name}, sample {row}"
        unused: set[str] = set()
        try:
            folder = Path(name).parent
            messages = entries.check_messages(entry, self.forbidden, folder, unused, self.default_system)
            if self.train_on == "last":
                messages = weights.last_alone(messages)
        except DataError as error:
            # Most of what breaks a rule at once is in another format: say which, and what converts it.
            hint = advice.advice(entry, name, self.forbidden)
            message = f"{error}; it {hint}" if hint else str(error)
            raise DataError(f"{where}{shortened(message)}", error.reason) from None
        return Example(messages, where, entry.get("kind"), frozenset(unused))

    def where(self, index: int) -> str:
        """The name of a sample, its file unread."""
        file, row = self._place(index)
        return f"{self.files[file]}, sample {row}"

    def folder(self, index: int) -> Path:
        """The folder of a sample's data file, in which its media are looked for first."""
        return Path(self.files[self._place(index)[0]]).parent

    def _place(self, index: int) -> tuple[int, int]:
        """Which file, and which of its samples, a number over all files is."""
        index = range(len(self))[index]  # -1 is the last; IndexError beyond it
        file = bisect_right(self.ends, index)
        begin = self.ends[file - 1] if file else 0
        return file, index - begin

    @property
    def epoch_samples(self) -> int:
        """How many samples an epoch has, those included that are left out."""
        total = 0
        for rows, weight in zip(self.entries, self.weights, strict=True):
            total += int(weight) * len(rows) + round(weight % 1 * len(rows))
        return total

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch (`epoch_samples`,) in order: a function of (seed, epoch) alone, so that resuming
        needs no replay. A sample that is left out keeps its place in it, so that leaving it out shifts no other."""
        # A generator of its own: nothing else that draws random numbers can move the order.
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        parts = [torch.zeros(0, dtype=torch.int64)]
        begin = 0
        for end, weight in zip(self.ends, self.weights, strict=True):
            parts += [torch.arange(begin, end)] * int(weight)
            if share := round(weight % 1 * (end - begin)):  # of a weight of 2.5 the half, another one in each epoch
                parts.append(begin + torch.randperm(end - begin, generator=generator)[:share])
            begin = end
        chosen = torch.cat(parts)
        return chosen[torch.randperm(len(chosen), generator=generator)].numpy()


def load_examples(files: list[str], processor) -> Examples:
    """Data files, all of their samples checked now. Raises DataError that names every bad one (20 in full)."""
    examples = Examples(files, processor)
    problems = []
    for index in range(len(examples)):
        try:
            examples[index]
        except DataError as error:
            problems.append(str(error))
    stop_on(problems)
    return examples


class Samples(Dataset):
    """A Dataset: index -> Sample, the example encoded and with its pixels. Data workers call it."""

    def __init__(self, examples: Sequence[Example], processor, budget: vision.Budget, reader=MediaReader()):
        self.examples = examples
        self.processor = processor
        self.budget = budget
        self.reader = reader
        self.shrunk: dict[int, vision.Budget] = {}  # what --on_long_sample shrink found for samples that were too long

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample:
        # Text and pixels meet in the collator; here a medium is one placeholder in the text.
        example = self.example(index)
        media = self._media(example, vision.load, self.shrunk.get(index))
        return Sample(self._encode(example, [medium.grid for medium in media]), media, example.where)

    def size(self, index: int) -> Size:
        """The cost of one sample from its text and its media's headers, without decoding a pixel."""
        return self.size_of(self.example(index), self.shrunk.get(index))

    def size_of(self, example: Example, budget: vision.Budget | None = None) -> Size:
        """The same of an example whose boxes are text; `budget`: of one that is shrunk."""
        return self.size_with(example, self._media(example, vision.read_grid, budget))

    def size_with(self, example: Example, grids: list[vision.Grid]) -> Size:
        """The same with the grids of its media, which are known first, as the text may name the times of frames."""
        encoded = self._encode(example, grids)
        tokens = len(encoded.input_ids) + sum(grid.tokens - len(grid.places) for grid in grids)  # each is one already
        weighted = sum(weight not in (0.0, 1.0) for weight in encoded.weights)
        return Size(tokens, sum(encoded.supervised), grids, encoded.unlearned, weighted)

    def example(self, index: int) -> Example:
        """A sample with its boxes written as text."""
        return self.with_boxes(self.examples[index], self.shrunk.get(index))

    def with_boxes(self, example: Example, budget: vision.Budget | None = None) -> Example:
        """The same of an example, for which the sizes of the images they lie in are read; `budget`: as in `size_of`."""
        if not boxes.are_in(example.messages):
            return example
        budget = self._budget(example, budget)
        scales = self._reading(example, self._box_scales, boxes.images_of(example.messages), budget)
        messages = boxes.with_boxes_as_text(example.messages, budget.family.boxes, scales, example.where)
        return replace(example, messages=messages)

    def _box_scales(self, images: dict[int, dict], budget: vision.Budget) -> dict[int, boxes.Scale]:
        """In what boxes in each image are counted: thousandths of it, or pixels of what the budget makes of it."""
        scales = {}
        sizes = self.reader.image_sizes(list(images.values()))
        for (number, item), (width, height) in zip(images.items(), sizes, strict=True):
            scales[number] = vision.box_scale(item, width, height, budget)
        return scales

    def _budget(self, example: Example, budget: vision.Budget | None) -> vision.Budget:
        """That of a sample; `budget`: of one that is shrunk."""
        return budget or example.budget or self.budget

    def _encode(self, example: Example, grids: list[vision.Grid]) -> conversation.Encoded:
        return conversation.encode(conversation.render(example.messages, self.processor), self.processor, grids)

    def _media(self, example: Example, read: Callable, budget: vision.Budget | None = None) -> list:
        return self._reading(example, self.reader.each, read, example.media, self._budget(example, budget))

    def _reading(self, example: Example, read: Callable, *arguments) -> Any:
        """What `read` gives, or the DataError of media that cannot be read, with the sample's name."""
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            is_lost = fetch.FetchError in (type(error), type(error.__context__))
            reason = "not fetched" if is_lost else "not readable"
            raise DataError(f"{example.where}: {shortened(error)}", reason) from None
        except Exception as error:  # a fault of ours or of a library: which sample was it?
            error.add_note(f"while reading {example.where}")
            raise
