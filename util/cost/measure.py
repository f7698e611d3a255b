"""What every sample costs, known before training from file headers alone; what cannot be trained on is found here.

The numbers are those of `Samples.size`, found several times as fast: the chat template is run once for each structure
of a conversation (roles and kinds of content), and the texts of each conversation are put into the places found so.
"""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from util import conversation, ranks, vision
from util.command_line import MOST_TOLD
from util.cost.kept_sizes import KeptSizes, folder_of, media_files, state_of
from util.cost.sizes import TOO_LONG, Finding, Problem, Sizes, Table
from util.data import bad_samples, keys
from util.data.boxes import are_in
from util.data.lines import DataError, first_of, stop_on
from util.data.loader import Loader, usable_cpus
from util.data.media import MediaReader
from util.data.settings import SampleSettings
from util.dataset import Example, Samples, Size

CHUNK = 32  # samples that a worker looks at before it answers
WORTH_WORKERS = 1.0  # seconds; starting worker processes pays only for more work than this
MOST_WORKERS = 16
MOST_STRUCTURES = 4096  # of conversations, remembered at a time
MOST_KEYS = 8  # unused keys that are told by name
CUT = "end before their time, as their files are cut: what is there is trained on"  # after a number of videos
# After a number of images:
DEEP = "are not of 8 bits: of 16 the upper 8 are seen, where other programs show greys as white; save them as 8 bits"
FIRST = "are the first of several in their files: the others are not seen (a moving GIF may be given as a video)"
# Marks a text's place. It holds spaces, quotes and the like, which a template that edits texts would change.
SLOT_TEXT = " \n\ue001aZ<&' {}\ue001\n "
SLOT = re.compile(SLOT_TEXT.format("([0-9]+)"))


def unused_in_words(unused: Counter) -> str:
    """`not used: id (31), source (31)`: keys of samples, messages and items that have no effect on training."""
    parts = [f"{key} ({number:,})" for key, number in unused.most_common(MOST_KEYS)]
    if len(unused) > MOST_KEYS:
        parts.append(f"and {len(unused) - MOST_KEYS:,} more")
    return f"not used: {', '.join(parts)}"


def unlearned_in_words(tokens: int, samples: int) -> str:
    return f"{tokens:,} tokens of answers in {samples:,} samples (train false, weight 0 or --train_on last)"


def weighted_in_words(tokens: int, samples: int) -> str:
    return f"{tokens:,} supervised tokens of {samples:,} samples count less or more than 1"


def measure_all(samples: Samples, config) -> Sizes:
    """`measure` as a run does it: sizes that an earlier run found and kept are used, and new ones are kept."""
    return measure(samples, config.max_tokens, config, config.num_workers, folder_of(config))


def measure(
    samples: Samples,
    max_tokens: int,
    settings: SampleSettings | None = None,
    num_workers: int | None = 0,
    keep_in: Path | None = None,
) -> Sizes:
    """The size of every sample. Bad and long samples are refused, left out or shrunk in `samples` as `settings` say.

    DataError names the samples that are refused: they break a rule, cannot be read or exceed `max_tokens`. Those that
    are left out are printed. `num_workers`: processes that read headers, where that takes long enough; None: as many as
    there are CPUs. `keep_in`: a folder with the sizes that were found before; those that are found now go there, too.
    """
    settings = settings or SampleSettings()
    sizes = find_sizes(samples, max_tokens, settings.on_long_sample, num_workers, keep_in)
    skips_bad = settings.on_bad_sample == "skip"
    skips_long = settings.on_long_sample == "skip" or (settings.on_long_sample == "shrink" and skips_bad)
    left_out = sizes.left_out
    refused = [reason for reason in left_out if not (skips_long if reason == "too long" else skips_bad)]
    stop_on(sizes.refusals(refused), sum(left_out[reason] for reason in refused))
    if left_out:
        told = sizes.refusals(left_out)
        if not len(sizes.usable):
            raise DataError(f"no sample is left: {bad_samples.reasons_in_words(left_out)}; the first: {told[0]}")
        samples.examples.left_out = frozenset(np.flatnonzero(~sizes.is_usable).tolist())
        if ranks.is_first():
            print(f"left out: {bad_samples.reasons_in_words(left_out)}")
            for line in first_of(told, left_out.total(), "; python -m util check lists them all"):
                print(f"  {line}")
    budget_of = cache(lambda cap: replace(samples.budget, cap_pixels=cap))  # one object for all samples of a cap
    caps = sizes.table.numbers["cap"][sizes.shrunk].tolist()
    samples.shrunk = dict(zip(sizes.shrunk.tolist(), map(budget_of, caps), strict=True))
    return sizes


def find_sizes(
    samples: Samples, max_tokens: int, on_long_sample: str, num_workers: int | None, keep_in: Path | None
) -> Sizes:
    """The sizes of all samples: the first rank reads those that were kept, and samples without one are looked at.

    Each rank looks at its share of them, and all ranks get the results of all, so that they agree even about a file
    that only some of them can read.
    """
    kept = None
    known = np.zeros(0, dtype=np.int64)  # numbers of samples
    before = Table.of([])[0]  # their sizes
    if keep_in and ranks.is_first():
        kept = KeptSizes(keep_in, samples, max_tokens, on_long_sample)
        known, before = kept.find()
    # The names of media files are many, and only the first rank needs them, to keep them.
    known, before_on_all = ranks.from_first((known, before.without("files")))
    unknown = np.setdiff1d(np.arange(len(samples)), known, assume_unique=True)
    rank, count = ranks.rank_and_size()
    own = unknown[rank::count]

    found, told = Table.of(findings_of(Chunks(samples, own, max_tokens, on_long_sample), num_workers))
    told = [problem._replace(sample=int(own[problem.sample])) for problem in told]
    shares = ranks.gather_on_all((found.without("files"), told))
    # The rows stand rank by rank behind the known ones; `order` puts them in the order of the samples.
    by_rank = [unknown[number::count] for number in range(count)]
    order = np.argsort(np.concatenate([known, *by_rank]), kind="stable")
    table = Table.joined([before_on_all, *[share for share, _ in shares]]).take(order)
    if keep_in:
        found_by_rank = ranks.gather_on_first(found)
        if kept and len(unknown):
            keep(kept, Table.joined([before, *found_by_rank]).take(order), unknown)

    all_told = []
    for index in known[before_on_all.numbers["reason"] == TOO_LONG][:MOST_TOLD].tolist():
        text = too_long(samples.examples.where(index), table.size(index), max_tokens)
        all_told.append(Problem(index, "too long", text))
    for _, told_by_rank in shares:
        all_told += told_by_rank
    return Sizes(table, all_told)


def keep(kept: KeptSizes, table: Table, changed: np.ndarray) -> None:
    """Keep the sizes for the next start, or say that this is not possible."""
    try:
        kept.keep(table, changed)
    except OSError as error:
        print(f"sizes of samples are not kept in {kept.folder} ({error.strerror}): the next start reads headers again")


def look(
    samples: Samples, max_tokens: int, on_long_sample: str, num_workers: int | None = 0, note: Callable | None = None
) -> list[Finding]:
    """One finding for each sample, in order. `note`: called with each Example that can be read; its answer is kept."""
    chunks = Chunks(samples, np.arange(len(samples)), max_tokens, on_long_sample, note)
    return list(findings_of(chunks, num_workers))


def findings_of(chunks: "Chunks", num_workers: int | None) -> Iterator[Finding]:
    """The findings of all samples of `chunks`, in order."""
    bar = {"desc": "reading headers", "unit": " samples", "leave": False, "delay": 1, "disable": not ranks.is_first()}
    with tqdm(total=len(chunks.indices), **bar) as progress:
        for chunk in in_order(chunks, num_workers):
            yield from chunk
            progress.update(len(chunk))


def in_order(chunks: "Chunks", num_workers: int | None) -> Iterator[list[Finding]]:
    """The findings of all chunks. The first one is made here and timed: it tells whether the others need processes."""
    if not len(chunks):
        return
    began = time.perf_counter()
    yield chunks[0]
    expected = (time.perf_counter() - began) * (len(chunks) - 1)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(MOST_WORKERS, usable_cpus() // local_ranks) if num_workers is None else num_workers
    if workers <= 1 or expected <= WORTH_WORKERS:
        workers = 0
    workers = min(workers, len(chunks) - 1)
    yield from Loader(
        chunks, sampler=range(1, len(chunks)), batch_size=None, num_workers=workers, collate_fn=as_is,
        generator=torch.Generator(),  # of its own: it draws a seed, and training's must not move
    )  # fmt: skip


class Chunks:
    """The findings of each chunk of samples, made when asked for. May be sent to workers before its first use."""

    def __init__(
        self, samples: Samples, indices: np.ndarray, max_tokens: int, on_long_sample: str, note: Callable | None = None
    ) -> None:
        self.samples, self.indices, self.max_tokens = samples, indices, max_tokens
        self.on_long_sample, self.note = on_long_sample, note
        self.quick = QuickSize(samples)

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / CHUNK)

    def __getitem__(self, number: int) -> list[Finding]:
        own = self.indices[number * CHUNK : (number + 1) * CHUNK]
        return [self.one(index) for index in own.tolist()]

    def one(self, index: int) -> Finding:
        """What can be known of a sample without decoding any pixels."""
        try:
            read = self.samples.examples[index]
            files = media_files(read, self.samples.examples.folder(index))
            state = state_of(files)  # before they are read, so that a file that changes meanwhile is read again
            example = self.samples.with_boxes(read)
            finding = self.sized(read, self.quick(example))
            note = self.note(example) if self.note else None
            clocks = frozenset() if self.samples.budget.family.has_clock else keys.clocks_of(example.media)
            unused = example.unused | clocks
            return replace(finding, files=files, state=state, unused=unused, note=note)
        except DataError as error:
            return Finding(problem=str(error), reason=error.reason)

    def sized(self, example: Example, size: Size) -> Finding:
        """The finding for a sample that can be read, as it was read. Raises DataError where it cannot be shrunk."""
        if size.tokens <= self.max_tokens:
            return Finding(size)
        if self.on_long_sample == "shrink":
            budget, smaller = shrink(self.samples, example, size, self.max_tokens)
            return Finding(smaller, budget=budget, tokens_before=size.tokens)
        problem = too_long(example.where, size, self.max_tokens)
        return Finding(problem=problem, reason="too long", refused=size)


def too_long(where: str, size: Size, max_tokens: int) -> str:
    """The refusal of a sample with what helps: smaller pictures help only where its text leaves room for them."""
    text = size.tokens - sum(grid.tokens for grid in size.grids)
    of_text = f", {text:,} of them text" if size.grids else " of text"
    said = f"{where}: {size.tokens:,} tokens{of_text}, above --max_tokens {max_tokens:,}; raise it, or "
    if text >= max_tokens:
        return f"{said}make several samples of the conversation, or shorten it (smaller pictures cannot help)"
    # A video of two frames has one pair of them, as an image has; it is rare enough to be told of --max_pixels alone.
    flags = ["--max_pixels"] if any(grid.t == 1 for grid in size.grids) else []
    flags += ["--video_max_tokens"] if any(grid.t > 1 for grid in size.grids) else []
    return f"{said}lower {' or '.join(flags)}, or let --on_long_sample shrink do it for such samples alone"


def as_is(value: object) -> object:
    """The value itself, for a DataLoader that is not to make batches."""
    return value


# ---- samples that are too long --------------------------------------------------------------------------------------


def shrink(samples: Samples, example: Example, size: Size, max_tokens: int) -> tuple[vision.Budget, Size]:
    """The budget with which a sample that is too long fits `max_tokens`, and its size with it.

    `example`: as it was read, since boxes in pixels of smaller images have smaller numbers. The budget caps the pixels
    of an image or frame, as high as the sample fits. Small ones stay as they are, no frame is left out, and no visual
    token is cut. The cap overrules --min_pixels and the keys of items. DataError where not even one token for each
    image and pair of frames fits.
    """
    # without the cache of frames, whose entries have the size before shrinking
    plain = Samples(samples.examples, samples.processor, samples.budget, MediaReader(samples.reader.settings))
    grids_of = plain._media(example, read_header)
    text = size.tokens - sum(grid.tokens for grid in size.grids)
    is_text_of_budget = samples.budget.family.boxes == "pixels" and are_in(example.messages)

    def with_cap(tokens: int) -> tuple[vision.Budget, Size]:
        budget = replace(samples.budget, cap_pixels=tokens * samples.budget.token_pixels)
        grids = [grid_of(budget) for grid_of in grids_of]
        if is_text_of_budget:
            return budget, plain.size_with(plain.with_boxes(example, budget), grids)
        return budget, replace(size, tokens=text + sum(grid.tokens for grid in grids), grids=grids)

    low = 1  # tokens of an image or pair of frames
    high = max((grid.tokens // grid.t for grid in size.grids), default=1)
    if (least := with_cap(low)[1].tokens) > max_tokens:
        raise DataError(
            f"{example.where}: {size.tokens:,} tokens, {text:,} of them text, above --max_tokens {max_tokens:,}, and "
            f"still {least:,} with one token for each image and pair of frames; raise --max_tokens, or "
            f"{'make several samples of the conversation' if text >= max_tokens else 'take frames or text out'}",
            "too long",
        )
    while high - low > 1:  # the sample fits with `low`, and does not with `high`
        middle = (low + high) // 2
        if with_cap(middle)[1].tokens <= max_tokens:
            low = middle
        else:
            high = middle
    return with_cap(low)


def read_header(item: dict, budget: vision.Budget) -> Callable[[vision.Budget], vision.Grid]:
    """A function from a budget to the grid that `vision.load` will give; the file's header is read once, now."""
    if item["type"] == "image":
        image = vision.open_image(item["image"])
        height, width = image.height, image.width

        def grid_of(budget: vision.Budget) -> vision.Grid:
            return vision.named(vision.plain_image_grid, item, height, width, budget)

        return grid_of
    with vision.open_video(item) as video:
        header = VideoHeader(len(video), video.height, video.width, video.average_fps, video.missing)

    def grid_of(budget: vision.Budget) -> vision.Grid:
        return vision.plan_video(item, header, budget)[1]

    return grid_of


@dataclass
class VideoHeader:
    """The part of a VideoReader that `vision.plan_video` needs."""

    frames: int
    height: int
    width: int
    average_fps: float
    missing: str  # at its end, as VideoReader says

    def __len__(self) -> int:
        return self.frames


# ---- the same sizes, faster -----------------------------------------------------------------------------------------


class QuickSize:
    """`Samples.size` of an example; the chat template is not run where it was for the same structure."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.structures: dict[tuple, list | None] = {}
        self.tokenizer = samples.processor.tokenizer
        self.tokenizer("", add_special_tokens=False)  # leaves the tokenizer's engine without padding and truncation
        self.count = lru_cache(2**14)(self._count)

    def __getstate__(self) -> dict:
        return {"samples": self.samples}  # a spawned worker begins anew

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __call__(self, example: Example) -> Size:
        """Raises DataError as `Samples.size` does."""
        size = self.text_size(example)
        if size is None:
            return self.samples.size_of(example)
        grids = self.samples._media(example, vision.read_grid)
        if any(grid.times for grid in grids):  # the text names them
            return self.samples.size_of(example)
        return replace(size, tokens=size.tokens + sum(grid.tokens - 1 for grid in grids), grids=grids)

    def text_size(self, example: Example) -> Size | None:
        """The size of the text, with one token for each medium; None where only rendering can tell."""
        roles_and_kinds = []
        texts = []
        for message in example.messages:
            items = message["content"]
            roles_and_kinds.append((message["role"], *[(item["type"], *sorted(item)) for item in items]))
            texts += [item["text"] for item in items if "text" in item]
        key = tuple(roles_and_kinds)
        if key not in self.structures:
            if len(self.structures) == MOST_STRUCTURES:
                self.structures.clear()
            self.structures[key] = find_structure(example, self.samples.processor)
        structure = self.structures[key]
        if structure is None or not all(texts):  # a template may leave out what is empty
            return None
        answers = iter([message for message in example.messages if message["role"] == "assistant"])
        size = Size(0, 0, [])
        for parts, is_answer in structure:
            count = self.count("".join([texts[part] if isinstance(part, int) else part for part in parts]))
            size.tokens += count
            if is_answer:
                weight = next(answers).get("weight", 1.0)
                size.supervised += count * (weight > 0)
                size.unlearned += count * (weight == 0)
                size.weighted += count * (weight not in (0.0, 1.0))
        return size

    def _count(self, text: str) -> int:
        return len(self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])


def find_structure(example: Example, processor) -> list[tuple[list[str | int], bool]] | None:
    """The pieces of a conversation as (parts, is an answer); a part is literal text or the number of a text.

    None where the template does not put every text, unchanged and in order, in its place.
    """
    count = 0  # texts that were replaced by marks
    messages = []
    for message in example.messages:
        items = []
        for item in message["content"]:
            item = dict(item)
            if item["type"] != "text":
                item[item["type"]] = "\ue001"  # a template that writes a medium's path is noticed by this
            if "text" in item:
                item["text"] = SLOT_TEXT.format(count)
                count += 1
            items.append(item)
        messages.append({**message, "content": items})

    structure = []
    order = []
    for piece in conversation.render(messages, processor):
        literals_and_slots = SLOT.split(piece.text)
        parts = [int(part) if number % 2 else part for number, part in enumerate(literals_and_slots)]
        if any("\ue001" in part for part in literals_and_slots):
            return None
        order += parts[1::2]
        structure.append((parts, piece.is_answer))
    return structure if order == list(range(count)) else None
