"""The raw entries of data files: a JSON list read whole, or the lines of a `.jsonl` file of any size when asked for."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from util.command_line import MOST_TOLD, UserError

CHUNK = 2**24  # bytes read at a time while looking for line ends
CONVERTED = (".csv", ".tsv", ".parquet")  # not read here, but by `python -m util convert`
MOST_WEIGHT = 1000
MOST_TEXT = 1_000_000  # characters of a sample; ten times as many take gigabytes to tokenise, or end the tokenizer


class DataError(UserError):
    """Data that cannot be trained on. The message names file, sample, rule and fix.

    `reason` is one of the few of bad_samples.REASONS, by which samples that are left out are counted.
    """

    def __init__(self, message: str, reason: str = "bad conversation") -> None:
        super().__init__(message)
        self.reason = reason


def shortened(message: object, most: int = 600) -> str:
    """A message, without its middle if it is long: a name in the data may have a million characters."""
    text = str(message)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def stop_on(problems: list[str], count: int | None = None) -> None:
    """Raise one DataError that shows the problems (20 in full), if there are any.

    `count`: the number of all problems, where `problems` holds only the first of them.
    """
    if problems:
        raise DataError("\n".join(first_of(problems, count)))


def first_of(lines: list[str], count: int | None = None, hint: str = "") -> list[str]:
    """The first 20 lines and, where there are more, one that says how many and gives the hint.

    `count`: the number of all lines, where `lines` holds only the first of them.
    """
    first = lines[:MOST_TOLD]
    more = (count or len(lines)) - len(first)
    if more > 0:
        first.append(f"... and {more:,} more{hint}")
    return first


def json_of(sample: dict) -> str:
    """A sample as one line of JSON. DataError for text that no file can hold."""
    text = json.dumps(sample, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(": text holds half of a surrogate pair, which is no character; repair the file") from None
    return text


def split_weight(file: str) -> tuple[str, float]:
    """`a.jsonl*2` as file and weight."""
    name, star, weight = file.rpartition("*")
    if not star or os.path.exists(file):
        return file, 1.0
    try:
        if 0 < float(weight) <= MOST_WEIGHT:
            return name, float(weight)
    except ValueError:
        pass
    raise DataError(
        f"{file}: after the * stands how often its samples come in an epoch, a number above 0 and up to {MOST_WEIGHT}"
    )


def open_entries(file: str) -> Sequence:
    """The entries of one data file. Raises DataError for a file that is not there or holds something else."""
    if os.path.isdir(file) or (file.endswith(CONVERTED) and os.path.exists(file)):
        what = "a folder" if os.path.isdir(file) else "neither .json nor .jsonl"
        raise DataError(
            f"{file}: {what}; name a data file, or make one: python -m util convert {shlex.quote(file)} out.jsonl"
        )
    try:
        if file.endswith(".jsonl"):
            return JsonLines(file)
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: no such data file (looked in {os.getcwd()})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        entries = parse(text, file) if text.strip() else []
    except DataError:
        if not holds_lines(file):
            raise
        new = shlex.quote(f"{os.path.splitext(file)[0]}.jsonl")
        raise DataError(f"{file}: each line is a sample; name it .jsonl: mv {shlex.quote(file)} {new}") from None
    if isinstance(entries, list):
        return entries
    if isinstance(entries, dict) and "messages" in entries:
        raise DataError(f"{file}: holds one sample; write a list of samples, [{{'messages': ...}}]")
    held = type(entries).__name__
    if isinstance(entries, dict):
        held = f"a dictionary with {', '.join(sorted(map(str, entries))):.200}"
    raise DataError(f"{file}: must hold a list of samples, holds {held}; write the list")


def holds_lines(file: str) -> bool:
    """Whether a file holds one sample per line: `datasets` and others give such files the name .json, too.

    Only its first line is read, and of a list, whose first line may be gigabytes long, one character.
    """
    try:
        with open(file, encoding="utf-8-sig") as handle:
            if handle.read(1) != "{":
                return False
            handle.seek(0)
            return isinstance(json.loads(handle.readline()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def parse(text: str, file: str, line: int | None = None):
    """The value of JSON text. DataError with file, line and what is wrong."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        if isinstance(error, RecursionError):
            problem = "nested too deeply"
        else:
            problem = getattr(error, "msg", str(error).split(";")[0])
        where = line or getattr(error, "lineno", 1)
        raise DataError(f"{file}, line {where}: not valid JSON ({problem})", "not valid JSON") from None


class JsonLines(Sequence):
    """The lines of a `.jsonl` file that are not blank, found by an index of offsets and parsed when asked for.

    The index takes 16 bytes a line. Lines are read at their offset and not mapped into memory: the touched pages of a
    mapping would count as memory of every process that touches them, and so of each data worker.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.descriptor = None
        ends = []
        position = 0
        with open(file, "rb", buffering=0) as handle:
            while chunk := handle.read(CHUNK):
                ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + position)
                position += len(chunk)
        ends = np.concatenate([*ends, [position]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        if self._read(0, 3) == b"\xef\xbb\xbf":  # a byte order mark
            starts[0] = 3
        blank = ends <= starts
        for line in np.flatnonzero(~blank & (ends - starts < 16)):
            blank[line] = not self._read(starts[line], ends[line]).strip()
        self.starts, self.ends = starts[~blank], ends[~blank]
        if len(self.starts) > 1:
            # A whole sample in one line neither begins nor ends like the first line of JSON written over many lines.
            start = self.starts[0]
            end = self.ends[0]
            first = self._read(start, min(end, start + 64)).strip()
            last = self._read(max(start, end - 64), end).strip()
            if first.startswith(b"[") and last.endswith((b"[", b"{", b",")):
                raise DataError(f"{file}: one JSON list over many lines; name the file .json, or write a sample a line")
            if first.startswith(b"{") and last.endswith((b"[", b"{", b",")):
                raise DataError(f"{file}: samples over many lines each; write a sample a line: jq -c . {file}")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int):
        content = self._read(self.starts[index], self.ends[index])
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = int(self.starts[index]) + error.start
            message = f"{self.file}: not UTF-8 text (byte {byte}); save the file as UTF-8"
            raise DataError(message, "not valid JSON") from None
        try:
            return parse(text, self.file, 1)
        except DataError:  # only a message needs the line's number, so lines are counted only here
            before = self._read(0, self.starts[index]).count(b"\n")
            return parse(text, self.file, before + 1)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "descriptor": None}  # a spawned data worker opens the file itself

    def raw_lines(self) -> Iterator[memoryview]:
        """The bytes of every line; CHUNK bytes of the file are read at a time."""
        begin = 0
        while begin < len(self):
            end = max(begin + 1, int(np.searchsorted(self.ends, self.starts[begin] + CHUNK)))
            first = int(self.starts[begin])
            text = memoryview(self._read(first, self.ends[end - 1]))
            starts = (self.starts[begin:end] - first).tolist()
            ends = (self.ends[begin:end] - first).tolist()
            for start, stop in zip(starts, ends, strict=True):
                yield text[start:stop]
            begin = end

    def _read(self, start: int, end: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows: opened for each read, as threads would move a shared position
            with open(self.file, "rb") as file:
                file.seek(int(start))
                return file.read(int(end - start))
        if self.descriptor is None:
            self.descriptor = os.open(self.file, os.O_RDONLY)
        return os.pread(self.descriptor, int(end - start), int(start))


def digests(entries: Sequence) -> np.ndarray:
    """A hash of each entry's text, (n,) uint64: equal texts have equal hashes, and others (nearly always) do not."""
    if isinstance(entries, JsonLines):
        found = [digest(line) for line in entries.raw_lines()]
    else:
        found = [digest(json.dumps(entry).encode()) for entry in entries]
    return np.frombuffer(b"".join(found), dtype=np.uint64)


def digest(text: bytes | memoryview) -> bytes:
    """8 bytes of BLAKE2b."""
    return hashlib.blake2b(text, digest_size=8).digest()
