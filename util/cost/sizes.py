"""The sizes of many samples as columns of numbers: a million take tens of megabytes, where objects take gigabytes."""

import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from util import vision
from util.command_line import MOST_TOLD
from util.data.bad_samples import REASONS
from util.dataset import Size
from util.family import window_squares

FINE = 0  # in the column "reason": the sample is trained on; of others it holds 1 + the place in REASONS
TOO_LONG = 1 + REASONS.index("too long")
GRID_COLUMNS = vision.NUMBERS  # of a grid; where frames stand in time costs nothing
NUMBERS = {
    "tokens": np.int32,
    "supervised": np.int32,
    "unlearned": np.int32,  # tokens of answers that are not supervised
    "weighted": np.int32,  # supervised tokens that count less or more than 1
    "reason": np.uint8,
    "cap": np.int64,  # pixels of an image or frame at most, of a sample that is shrunk; else 0
    "before": np.int32,  # tokens before it was shrunk; else 0
    "state": np.int64,  # of its media files (kept_sizes.state_of)
}
MOST_NAMED = 100  # left-out samples that a checkpoint lists one by one, so that another one can be named


@dataclass
class Finding:
    """What a look at one sample gave."""

    size: Size | None = None  # None: it cannot be trained on
    problem: str = ""  # file, sample, message, rule, fix
    reason: str = ""  # one of bad_samples.REASONS
    budget: vision.Budget | None = None  # of a sample that is shrunk
    tokens_before: int = 0  # of a sample that is shrunk
    refused: Size | None = None  # of a sample that is too long
    files: bytes = b""  # its local media (kept_sizes.media_files)
    state: int = 0  # and what they were like (kept_sizes.state_of)
    note: object = None  # what `look` was asked to bring along
    unused: frozenset[str] = frozenset()  # keys of the sample that have no effect on training


class Problem(NamedTuple):
    """Why a sample is left out or refused."""

    sample: int
    reason: str
    text: str


class Table:
    """Columns over n samples.

    `numbers`: arrays (n,). `lists`: columns of which each sample has any number of rows, as (ends (n,), flat): those of
    sample i are flat[ends[i - 1] : ends[i]].
    """

    def __init__(self, numbers: dict[str, np.ndarray], lists: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.numbers, self.lists = numbers, lists

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> tuple["Table", list[Problem]]:
        """The columns of findings, and the first problems of each reason; a problem's `sample` counts the findings.

        The findings may come from a generator: none of them is kept.
        """
        rows = array("q")  # len(NUMBERS) for each sample
        grid_ends = array("q")
        grids = array("i")
        file_ends = array("q")
        files = bytearray()
        unused_ends = array("q")
        unused = bytearray()
        told: list[Problem] = []
        counts: Counter = Counter()
        for number, finding in enumerate(findings):
            size = finding.size or finding.refused or Size(0, 0, [])
            rows.extend(numbers_of(finding, size))
            for grid in size.grids:
                grids.extend(grid.numbers)
            grid_ends.append(len(grids) // GRID_COLUMNS)
            files += finding.files
            file_ends.append(len(files))
            unused += "".join([f"{key}\n" for key in finding.unused]).encode()
            unused_ends.append(len(unused))
            if finding.reason:
                counts[finding.reason] += 1
                if counts[finding.reason] <= MOST_TOLD:
                    told.append(Problem(number, finding.reason, finding.problem))
        columns = np.array(rows, dtype=np.int64).reshape(-1, len(NUMBERS)).T
        numbers = {name: column.astype(NUMBERS[name]) for name, column in zip(NUMBERS, columns, strict=True)}
        lists = {
            "grids": (np.array(grid_ends, dtype=np.int64), np.array(grids, dtype=np.int32).reshape(-1, GRID_COLUMNS)),
            "files": (np.array(file_ends, dtype=np.int64), np.frombuffer(bytes(files), dtype=np.uint8)),
            "unused": (np.array(unused_ends, dtype=np.int64), np.frombuffer(bytes(unused), dtype=np.uint8)),
        }
        return cls(numbers, lists), told

    def __len__(self) -> int:
        return len(self.numbers["tokens"])

    def size(self, row: int) -> Size:
        """The size of one sample, also of one that is left out."""
        ends, flat = self.lists["grids"]
        begin = ends[row - 1] if row else 0
        grids = [vision.Grid(t, h, w, *map(bool, facts)) for t, h, w, *facts in flat[begin : ends[row]].tolist()]
        counts = {name: int(self.numbers[name][row]) for name in ("tokens", "supervised", "unlearned", "weighted")}
        return Size(grids=grids, **counts)

    def take(self, rows: np.ndarray) -> "Table":
        """The table of these rows, in this order."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        numbers = {name: column[rows] for name, column in self.numbers.items()}
        return Table(numbers, {name: take_lists(*column, rows) for name, column in self.lists.items()})

    @staticmethod
    def joined(tables: Sequence["Table"]) -> "Table":
        """One table after the other."""
        tables = [table for table in tables if len(table)] or tables[:1]
        if len(tables) == 1:
            return tables[0]
        numbers = {}
        for name in tables[0].numbers:
            numbers[name] = np.concatenate([table.numbers[name] for table in tables])
        lists = {}
        for name in tables[0].lists:
            flats = [table.lists[name][1] for table in tables]
            begins = np.cumsum([0, *map(len, flats)])[:-1]
            ends = [table.lists[name][0] + begin for table, begin in zip(tables, begins, strict=True)]
            lists[name] = np.concatenate(ends), np.concatenate(flats)
        return Table(numbers, lists)

    def without(self, name: str) -> "Table":
        """The same table without one of its lists."""
        return Table(self.numbers, {other: column for other, column in self.lists.items() if other != name})


def numbers_of(finding: Finding, size: Size) -> tuple[int, ...]:
    """A finding's row of the columns NUMBERS."""
    reason = 1 + REASONS.index(finding.reason) if finding.reason else FINE
    cap = finding.budget.cap_pixels if finding.budget else 0
    of_size = size.tokens, size.supervised, size.unlearned, size.weighted
    return *of_size, reason, cap, finding.tokens_before, finding.state


def take_lists(ends: np.ndarray, flat: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lists of these rows, as (ends, flat)."""
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    lengths = (ends - begins)[rows]
    new_ends = np.cumsum(lengths)
    new_begins = new_ends - lengths
    moved_by = np.repeat(begins[rows] - new_begins, lengths)  # from each place in the new flat array to the old one
    places = np.arange(new_ends[-1] if len(rows) else 0) + moved_by
    return new_ends, flat[places]


class Columns(NamedTuple):
    """What the cost of n samples is computed from, as Size has it for one sample: arrays (n,) of float64."""

    tokens: np.ndarray
    supervised: np.ndarray
    patches: np.ndarray
    squares: np.ndarray
    window_squares: np.ndarray


@dataclass(eq=False)
class Sizes(Sequence):
    """A sequence of each sample's Size, or None where it is left out, made from columns of numbers when asked for."""

    table: Table
    told: list[Problem] = field(default_factory=list)  # the first of each reason

    def __post_init__(self) -> None:
        self.is_usable = self.table.numbers["reason"] == FINE
        self.tokens = self.table.numbers["tokens"]  # (n,)
        self.supervised = self.table.numbers["supervised"]  # (n,)
        self.grid_ends, self.grids = self.table.lists["grids"]  # (n,), (G, GRID_COLUMNS)
        self.patches = self._sums(self.grids[:, :3].prod(axis=1, dtype=np.int64))  # (n,)

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> "Sizes":
        return cls(*Table.of(findings))

    def __len__(self) -> int:
        return len(self.tokens)

    def trained(self, samples: Iterable[int]) -> list[Size]:
        """The sizes of samples that are trained on."""
        found = [self[sample] for sample in samples]
        return [size for size in found if size is not None]

    def __getitem__(self, index: int) -> Size | None:
        index = range(len(self))[index]
        return self.table.size(index) if self.is_usable[index] else None

    @property
    def usable(self) -> np.ndarray:
        """The samples to train on, in the order of the files."""
        return np.flatnonzero(self.is_usable)

    @property
    def usable_grids(self) -> np.ndarray:
        """The grids of all images and videos to train on, (G, GRID_COLUMNS)."""
        return self.grids[np.repeat(self.is_usable, np.diff(self.grid_ends, prepend=0))]

    @property
    def left_out(self) -> Counter:
        """How many samples are left out, by reason."""
        codes, first, counts = np.unique(self.table.numbers["reason"], return_index=True, return_counts=True)
        by_place = np.argsort(first)  # the order in which the reasons are met, for those that are equally frequent
        pairs = zip(codes[by_place].tolist(), counts[by_place].tolist(), strict=True)
        return Counter({REASONS[code - 1]: count for code, count in pairs if code != FINE})

    @property
    def cut_videos(self) -> int:
        """How many videos to train on end early because their files are cut."""
        return self.count("cut")

    def count(self, fact: str) -> int:
        """Of how many images and videos to train on a fact of vision.Grid is true: `capped`, `cut`, `deep`, `first`."""
        return int(self.usable_grids[:, vision.Grid._fields.index(fact)].sum())

    @property
    def unused(self) -> Counter:
        """The keys that have no effect on training, and how many samples have each."""
        names = self.table.lists["unused"][1].tobytes().decode().split("\n")
        return Counter(filter(None, names))

    @property
    def shrunk(self) -> np.ndarray:
        """The samples that are shrunk, in the order of the files."""
        return np.flatnonzero(self.table.numbers["cap"])

    def refusals(self, reasons: Container[str]) -> list[str]:
        """The first problems of some reasons, in the order of the files; at most `MOST_TOLD`."""
        found = sorted(problem for problem in self.told if problem.reason in reasons)
        return [problem.text for problem in found[:MOST_TOLD]]

    def columns(self) -> Columns:
        """The columns over all samples, those that are left out included."""
        times, rows, columns = self.grids[:, :3].T.astype(float)
        squares = self._sums(times * (rows * columns) ** 2)
        of_windows = self._sums(times * window_squares(rows, columns))
        numbers = (self.tokens, self.supervised, self.patches, squares, of_windows)
        return Columns(*(column.astype(float) for column in numbers))

    def _sums(self, of_grids: np.ndarray) -> np.ndarray:
        """From a number for each grid (G,) the sums over each sample's grids (n,)."""
        counts = np.diff(self.grid_ends, prepend=0)
        owners = np.repeat(np.arange(len(self)), counts)
        return np.bincount(owners, weights=of_grids, minlength=len(self)).astype(of_grids.dtype)

    def mark(self) -> dict:
        """A few numbers that change with the samples that a run trains on, leaves out and shrinks.

        A checkpoint holds them: resumed with other samples, the run would compute something else.
        """
        left_out = np.flatnonzero(~self.is_usable)
        shrunk = self.shrunk
        numbers = self.table.numbers
        return {
            "left_out": {"count": len(left_out), "checksum": zlib.crc32(left_out.astype("<i8").tobytes()),
                         "first": left_out[:MOST_NAMED].tolist()},
            "shrunk": {"count": len(shrunk), "checksum": checksum_of(shrunk, numbers["cap"][shrunk])},
            "sizes": checksum_of(*(numbers[name][self.is_usable] for name in ("tokens", "supervised"))),
        }  # fmt: skip


def checksum_of(*columns: np.ndarray) -> int:
    return zlib.crc32(b"".join([column.astype("<i8").tobytes() for column in columns]))
