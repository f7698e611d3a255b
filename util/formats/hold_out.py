"""Some samples held out for evaluation, chosen so that no picture and no conversation stands on both sides.

Samples that share a picture, by its path or by what is in its file, form a group, and a group is never divided: a model
that saw a picture in training would be asked about it again. Only exact copies are known; a picture that was saved anew
in another size is another picture here.
"""

import hashlib
import json
import os
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import IO, Protocol

from tqdm import tqdm

from util.data import fetch
from util.data.entries import text_of
from util.data.frames import images_in
from util.data.lines import DataError, json_of

NAME = "held_out"


class Writer(Protocol):
    """What samples are written to."""

    def write(self, sample: dict) -> None: ...


def held_out_path(output: Path) -> Path:
    """`train_held_out.json` beside `train.json`."""
    return output.with_name(f"{output.stem}_{NAME}{output.suffix}")


class HoldOut:
    """Samples kept in a temporary file, one a line, until all are known and can be dealt to two files.

    `folder`: what media paths in the samples are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.kept: IO = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n", dir=folder)
        self.group_of: list[int] = []  # a sample of the same group with a lower number, or itself
        self.first: dict[Hashable, int] = {}  # a picture or a conversation: the first sample that has it
        self.files: dict[str, int] = {}  # a local file: the first sample that shows it
        self.lengths: Counter = Counter()  # in bytes, of what stands in the samples themselves (`data:`)

    def write(self, sample: dict) -> None:
        """Append one sample. Raises DataError for text that no file can hold."""
        self.kept.write(f"{json_of(sample)}\n")
        number = self.count
        self.group_of.append(number)
        self.count += 1
        media = list(media_in(sample))
        for path in media:
            self._note(number, path)
        if not media:
            self._join(number, conversation_of(sample))

    def _note(self, number: int, path: str) -> None:
        """Note that a sample shows a medium: a file, a folder of frames, or a remote file."""
        if is_data(path):
            try:
                content = fetch.decode_data(path).read()
            except fetch.FetchError:  # no picture; training will say so
                content = path.encode("utf-8", "surrogatepass")
            self.lengths[len(content)] += 1
            self._join(number, digest(content))
        elif fetch.is_remote(path):
            self._join(number, path)
        else:
            file = os.path.realpath(os.path.join(self.folder, fetch.local_path(path)))
            for shown in images_in(file) if os.path.isdir(file) else [file]:
                self._join(number, shown)
                self.files.setdefault(shown, number)

    def deal(self, share: float, seed: int, train: Writer, held_out: Writer) -> int:
        """Write each sample to one of two files; how many are held out. DataError where not both can have one.

        As many groups are held out, in an order that the seed gives, as fit into `share` of the samples.
        """
        self._join_copies()
        groups = defaultdict(list)
        for number in range(self.count):
            groups[self._group(number)].append(number)
        chosen = choose(list(groups.values()), share * self.count, seed)
        self.kept.seek(0)
        for number, line in enumerate(self.kept):
            (held_out if number in chosen else train).write(json.loads(line))
        return len(chosen)

    def close(self) -> None:
        self.kept.close()

    def _group(self, number: int) -> int:
        """The lowest number of a sample's group."""
        while self.group_of[number] != number:
            self.group_of[number] = self.group_of[self.group_of[number]]  # half of the way is saved the next time
            number = self.group_of[number]
        return number

    def _join(self, number: int, shown: Hashable) -> None:
        """Put a sample into the group of the first one that has the same picture or conversation."""
        one, other = self._group(number), self._group(self.first.setdefault(shown, number))
        self.group_of[max(one, other)] = min(one, other)

    def _join_copies(self) -> None:
        """Join samples whose files have the same content. Only files of one length are read."""
        length = {path: os.path.getsize(path) for path in self.files if os.path.isfile(path)}
        self.lengths.update(length.values())
        alike = [path for path in length if self.lengths[length[path]] > 1]
        for path in tqdm(alike, "comparing files", unit=" files", leave=False, disable=None, delay=1):
            self._join(self.files[path], digest_of(path))


def choose(groups: list[list[int]], wanted: float, seed: int) -> set[int]:
    """The numbers of the samples to hold out: about `wanted`, at least one, and not all."""
    if len(groups) < 2:
        raise DataError(
            "--hold_out: all samples share a picture, or there is one alone, so none can be held out; leave it out"
        )
    most = min(max(1, round(wanted)), sum(map(len, groups)) - 1)
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= most:
            chosen.update(group)
    if not chosen:  # every group is larger than what is wanted
        chosen.update(min(groups, key=len))
    return chosen


def media_in(sample: dict) -> Iterator[str]:
    """The paths of all media of a sample, of a list of frames each one."""
    for message in sample["messages"]:
        items = message["content"] if isinstance(message["content"], list) else []
        for item in items:
            value = item.get("image", item.get("video"))
            if value is not None:
                yield from [value] if isinstance(value, str) else value


def conversation_of(sample: dict) -> bytes:
    """A hash of what is said in a sample, without regard to white space and case."""
    said = []
    for turn in sample["messages"]:
        words = text_of(turn["content"]).casefold().split()
        said.append([turn["role"], words, turn.get("tool_calls")])
    return digest(json.dumps(said).encode())


def is_data(path: str) -> bool:
    return fetch.scheme_of(path) == "data"


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def digest_of(path: str) -> bytes:
    """A hash of a file's content; DataError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
