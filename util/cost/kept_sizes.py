"""Sizes of samples kept on disk, one file for each data file, so that a second start reads no media headers.

Everything that a size depends on is either part of the kept file's name (the budget, the processor, the code that reads
media, the folder that paths start from) or compared each time: the sample's text, and size and time of its local media.
Only a file or a sample that is new or has changed is looked at again. A remote medium is assumed not to have changed.
"""

import hashlib
import json
import os
import secrets
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from util import run_folder
from util.cost.sizes import FINE, TOO_LONG, Table
from util.data import fetch
from util.data.lines import digests
from util.dataset import Example, Samples

FOLDER = "sizes"
# The files whose code decides what a sample costs: after a change in any of them all sizes are found anew.
CODE = ("conversation", "dataset", "family", "vision", "cost/kept_sizes", "cost/measure", "cost/sizes", "data/boxes",
        "data/depth", "data/entries", "data/fetch", "data/jpeg", "data/keys", "data/lines", "data/looks_like",
        "data/media", "data/tools", "data/video_reader", "data/weights", "data/whole")  # fmt: skip
NO_FILE = (-2, -2)  # in place of size and time


def folder_of(config, kind: str = FOLDER) -> Path:
    """Where what a run finds before training is kept for the next one: in `--cache_dir`, else beside the run."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser() / kind
    runs = Path(config.output_dir).parent if config.output_dir else run_folder.RUNS
    return runs / f".{kind}"


# ---- the media files of a sample and their state --------------------------------------------------------------------


def media_files(example: Example, folder: Path) -> bytes:
    """Paths of a sample's local media, and of files that would be taken instead if they existed, between zero bytes."""
    here = os.getcwd() + os.sep
    found = []
    for item in example.media:
        value = item[item["type"]]
        for path in value if isinstance(value, list) else [value]:
            if fetch.is_remote(path):
                continue
            found.append(path)
            # a path is looked for in the data file's folder before the current one (entries.resolve_path)
            if path.startswith(here) and (before := str(folder / path[len(here) :])) != path:
                found.append(before)
        if isinstance(value, list):  # which may be all images of a folder: one more of them changes the folder's time
            local = [path for path in value if not fetch.is_remote(path)]
            found += sorted({os.path.dirname(path) for path in local})
    return b"\0".join([os.fsencode(path) for path in found])


def state_of(files: bytes) -> int:
    """A hash of the present sizes and times of `media_files`; 0 for none."""
    if not files:
        return 0
    return hash(tuple([size_and_time(path) for path in files.split(b"\0")]))


def size_and_time(path: bytes) -> tuple[int, int]:
    """Bytes of a file, and when it was last modified, in nanoseconds."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return NO_FILE
    return status.st_size, status.st_mtime_ns


# ---- keeping and finding --------------------------------------------------------------------------------------------


class KeptSizes:
    """The sizes of `samples` that are kept in `folder`, which need not be writable.

    Any number of processes may use it: a file in it is complete or absent, and a damaged one is not used.
    """

    def __init__(self, folder: Path, samples: Samples, max_tokens: int, on_long_sample: str) -> None:
        self.folder, self.examples, self.max_tokens = folder, samples.examples, max_tokens
        # only a sample that is made smaller has a size that depends on how long it may be
        self.limit = max_tokens if on_long_sample == "shrink" else None
        self.settings = [
            asdict(samples.budget),
            self.limit,
            self.examples.train_on,
            processor_mark(samples.processor),
            code_mark(),
            os.getcwd(),
        ]
        self.lines = [digests(entries) for entries in self.examples.entries]

    def find(self) -> tuple[np.ndarray, Table]:
        """The samples that are known, and their sizes."""
        found = []
        tables = []
        begin = 0  # number of a file's first sample
        for file, lines in zip(self.examples.files, self.lines, strict=True):
            kept = self._read(self._path(file))
            if kept is not None:
                known, rows = still_true(*kept, lines)
                found.append(known + begin)
                tables.append(kept[1].take(rows))
            begin += len(lines)
        if not found:
            return np.zeros(0, dtype=np.int64), Table.of([])[0]
        table = Table.joined(tables)
        if self.limit is None:
            is_too_long = table.numbers["tokens"] > self.max_tokens
            table.numbers["reason"] = np.where(is_too_long, TOO_LONG, FINE).astype(np.uint8)
        return np.concatenate(found), table

    def keep(self, table: Table, changed: np.ndarray) -> None:
        """Write the sizes of every data file in which a sample is among `changed`. `table`: the sizes of all samples.

        OSError where they cannot be written.
        """
        storable = np.isin(table.numbers["reason"], [FINE] if self.limit else [FINE, TOO_LONG])
        begin = 0
        for file, lines in zip(self.examples.files, self.lines, strict=True):
            rows = begin + np.flatnonzero(storable[begin : begin + len(lines)])
            if np.isin(changed[storable[changed]], rows).any():
                self._write(self._path(file), lines[rows - begin], table.take(rows))
            begin += len(lines)

    def _path(self, file: str) -> Path:
        text = json.dumps([os.path.abspath(file), str(Path(file).parent), *self.settings])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    @staticmethod
    def _read(path: Path) -> tuple[np.ndarray, Table] | None:
        """Digests of the lines, and their sizes; None where there is no file that can be used."""
        try:
            with np.load(path) as file:  # np.load verifies checksums and, as it is called here, unpickles nothing
                columns = {name: file[name] for name in file.files}
            lines = columns.pop("line")
            lists = {name: (columns.pop(f"{name}_ends"), columns.pop(name)) for name in ("grids", "files", "unused")}
            return lines, Table(columns, lists)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def _write(self, path: Path, lines: np.ndarray, table: Table) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lists = {}
        for name, (ends, flat) in table.lists.items():
            lists |= {f"{name}_ends": ends, name: flat}
        unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                np.savez(file, line=lines, **table.numbers, **lists)
            os.replace(unfinished, path)
        finally:
            with suppress(OSError):
                os.unlink(unfinished)


def still_true(kept_lines: np.ndarray, table: Table, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `lines` are kept, with media that have not changed since; and their rows in the table."""
    if not len(kept_lines):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if len(lines) == len(kept_lines) and (lines == kept_lines).all():
        rows = np.arange(len(lines))
    else:
        order = np.argsort(kept_lines, kind="stable")
        places = np.searchsorted(kept_lines[order], lines)
        rows = order[np.minimum(places, len(order) - 1)]
    known = np.flatnonzero(kept_lines[rows] == lines)
    rows = rows[known]
    ends, files = table.lists["files"]
    begins = np.concatenate([[0], ends[:-1]])
    text = memoryview(files)
    remembered_state = lru_cache(2**16)(state_of)  # many samples may share a medium
    spans = zip(begins[rows].tolist(), ends[rows].tolist(), strict=True)
    now = (remembered_state(bytes(text[begin:end])) for begin, end in spans)
    states = np.fromiter(now, dtype=np.int64, count=len(rows))
    same = states == table.numbers["state"][rows]
    return known[same], rows[same]


def processor_mark(processor) -> str:
    """A hash that changes with the tokenizer or the chat template."""
    tokenizer = processor.tokenizer
    text = json.dumps([tokenizer.backend_tokenizer.to_str(), processor.chat_template, tokenizer.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(1)
def code_mark() -> str:
    """A hash that changes with the code that reads data, and with the libraries that open media."""
    versions = [version(name) for name in ("av", "pillow", "transformers")]
    found = hashlib.sha256(json.dumps(versions).encode())
    for name in CODE:
        found.update((run_folder.ROOT / "util" / f"{name}.py").read_bytes())
    return found.hexdigest()
