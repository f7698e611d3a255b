"""What a frozen vision tower makes of each image and video, kept on disk, so that it runs in the first epoch alone.

An entry is one file in a sub-folder of `--cache_dir`: a header, then the rows that the tower gave. Its name is a hash
of everything that decides the pixels and of the frozen weights, their precision and the attention backend: where any of
these changes, another name is asked for. Data workers read entries, and then decode nothing; the training process
writes them, in a thread, so that no step waits for the disk.

Letters in shapes: P patches, V visual tokens (= P / 4), D hidden size.
"""

import errno
import hashlib
import math
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from util.data.cache import FEATURES, Counts, Folder, FrameCache, mark_as_used
from util.vision import Budget, Grid, Medium

MAGIC = b"feature2"
# CRC-32 of the rest and the name; magic; the numbers of a vision.Grid, whether it is a video, rows, columns, their
# dtype; CRC-32 of the rows; the grid's step in float32, in which positions are computed
HEADER = struct.Struct("<I8s12If")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
COUNTS = ("hits", "misses", "stored", "not_stored", "damaged")
CLOCK_TICK = 20_000_000  # nanoseconds by which the times that a file system notes may lag
MOST_WAITING = 2**30  # bytes that wait to be written; what comes on top of them is kept in a later epoch


class Unkept(NamedTuple):
    """A medium that the tower sees in a batch."""

    key: str  # FrameCache.key; "": what the tower makes of it cannot be kept
    grid: Grid
    is_video: bool


class FeatureCache(Folder):
    """Features by item and budget; may be sent to data workers.

    It finds and keeps nothing until `open` says what computes them, in this process and in all that it was sent to.
    """

    without = "computes what is not kept"

    def __init__(self, frames: FrameCache) -> None:
        super().__init__(frames.directory, frames.max_bytes / 2**30, is_tidy=True)
        self.frames = frames
        self.uses = Counts(COUNTS)
        # Shared with data workers, which start before the model is there: a flag, and 32 bytes that stand for it.
        self._model = torch.zeros(33, dtype=torch.uint8).share_memory_()
        self.opened_at: float = math.inf  # nanoseconds

    def open(self, model: str) -> None:
        """From now on features are kept. `model`: 64 hexadecimal digits, other ones for whatever gives other rows."""
        self._model[1:] = torch.tensor(list(bytes.fromhex(model)), dtype=torch.uint8)
        self._model[0] = 1
        self.opened_at = time.time_ns() - CLOCK_TICK

    @property
    def is_open(self) -> bool:
        return bool(self._model[0])

    def load(self, item: dict, budget: Budget, read: Callable) -> Medium:
        """The features of an item, or its pixels as the cache of frames gives them, whose `read` is the third."""
        if not self.is_open:
            return self.frames.load(item, budget, read)
        key = self.frames.key(item, budget)
        medium = self._find(key) if key else None
        if medium is not None:
            self.uses.add("hits")
            return medium
        self.uses.add("misses")
        # The frames are not kept as well: with the features there nobody would read them again.
        return self.frames.load(item, budget, read, stores=False)

    def path(self, key: str) -> Path:
        """The entry of the pixels that a key of FrameCache names, of the model that is open."""
        name = hashlib.sha256(key.encode() + bytes(self._model[1:].tolist())).hexdigest()
        return self.directory / FEATURES / name[:2] / f"{name}.{FEATURES}"

    def store(self, medium: Unkept, rows: torch.Tensor) -> bool:
        """Whether the entry of a medium is there now; rows (P, width) or (V, D) on the CPU."""
        assert not medium.grid.times, "an entry has no room for them; towers of models that need them are not kept"
        path = self.path(medium.key)
        is_stored = self.try_to_write(path, lambda: self._write(path, medium, rows))
        self.uses.add("stored" if is_stored else "not_stored")
        return is_stored

    def statistics(self) -> dict[str, int | float]:
        """COUNTS so far, of this process and of all that this object was sent to; and `hit_ratio`, 0 before any use."""
        counts = self.uses.totals()
        return {**counts, "hit_ratio": counts["hits"] / max(1, counts["hits"] + counts["misses"])}

    def _write(self, path: Path, medium: Unkept, rows: torch.Tensor) -> None:
        content = rows.contiguous().view(torch.uint8).flatten().numpy()
        facts = *medium.grid.numbers, medium.is_video, *rows.shape, DTYPES.index(rows.dtype)
        fields = MAGIC, *facts, zlib.crc32(content), medium.grid.step
        rest = HEADER.pack(0, *fields)[4:]  # the header without its own checksum
        header = zlib.crc32(rest + path.stem.encode()).to_bytes(4, "little") + rest
        # What this run has used stays: epoch by epoch everything is asked for once, and if each new entry pushed out
        # the oldest one, none would be there when its turn comes. So as many are kept as there is room for.
        self.write(path, header, content, spared_since=self.opened_at)

    def _find(self, key: str) -> Medium | None:
        """An entry; None where there is none. A damaged one is deleted."""
        path = self.path(key)
        try:
            return read_features(path)
        except OSError as error:
            if error.errno == errno.EIO:
                self.uses.add("damaged")
                with suppress(OSError):
                    os.unlink(path)
            if error.errno != errno.ENOENT:
                self._warn(error)
        return None


def read_features(path: Path) -> Medium:
    """The Medium of an entry, which is marked as used. OSError: ENOENT where there is none, EIO where it is damaged."""
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        header = file.read(HEADER.size).ljust(HEADER.size, b"\0")
        *first, is_video, rows, columns, dtype, checksum, step = HEADER.unpack(header)
        own_checksum, magic, t, h, w, *facts = first
        damaged = OSError(errno.EIO, "a damaged entry, which is made anew")
        if magic != MAGIC or own_checksum != zlib.crc32(header[4:] + path.stem.encode()):
            raise damaged
        features = torch.empty(rows, columns, dtype=DTYPES[dtype])
        if status.st_size != HEADER.size + features.nbytes:
            raise damaged
        content = memoryview(features.view(torch.uint8).flatten().numpy())
        done = 0
        while done < len(content) and (count := file.readinto(content[done:])):
            done += count
        if zlib.crc32(content) != checksum:
            raise damaged
        mark_as_used(file, status)
    grid = Grid(t, h, w, *map(bool, facts), step=step)
    return Medium(torch.empty(0, 0, dtype=torch.uint8), grid, bool(is_video), features)


class FeatureWriter:
    """Takes features as a step computes them, and writes them beside the training.

    `after_merger`: they are visual tokens (V, D) and not what the merger takes (P, width).
    """

    def __init__(self, features: FeatureCache, after_merger: bool) -> None:
        self.features = features
        self.after_merger = after_merger
        # It ends when the process does, after what waits is written.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._waiting: deque[tuple[Future, int]] = deque()  # and how many bytes each of them holds
        self._taken: set[str] = set()  # keys of media that wait

    def take(self, media: list[Unkept], features: torch.Tensor) -> None:
        """Keep the features of media, whose rows stand in `features` one after another; what follows them is dropped.

        Neither the disk nor the device is waited for.
        """
        while self._waiting and self._waiting[0][0].done():
            self._waiting.popleft()[0].result()  # raises what went wrong, but for a disk, of which `Folder` tells
        wanted = {medium.key for medium in media if self._is_wanted(medium.key)}
        if not wanted:
            return
        if sum(size for _, size in self._waiting) + features.nbytes > MOST_WAITING:
            self.features.uses.add("not_stored", len(wanted))
            return
        self._taken |= wanted
        on_cpu, copied = copy_to_cpu(features.detach())
        job = self._thread.submit(self._write, media, wanted, on_cpu, copied)
        self._waiting.append((job, features.nbytes))

    def wait(self) -> None:
        """Return when all that was taken is written."""
        while self._waiting:
            self._waiting.popleft()[0].result()

    def _is_wanted(self, key: str) -> bool:
        return bool(key) and key not in self._taken and not os.path.exists(self.features.path(key))

    def _write(
        self, media: list[Unkept], wanted: set[str], features: torch.Tensor, copied: torch.cuda.Event | None
    ) -> None:
        while copied is not None and not copied.query():
            time.sleep(0.001)  # only this thread waits; it asks now and then, as waiting for an event keeps a core busy
        lengths = [grid.tokens if self.after_merger else grid.patches for _, grid, _ in media]
        for medium, rows in zip(media, features[: sum(lengths)].split(lengths), strict=True):
            if medium.key in wanted:
                wanted.discard(medium.key)  # the same image may stand in a batch twice
                self.features.store(medium, rows)
                self._taken.discard(medium.key)


def copy_to_cpu(features: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A tensor on the CPU, and an event after which its values are there (None: they are)."""
    if features.device.type != "cuda":
        return features, None
    # Pinned, so that the copy is one of the device's queue and the host need not wait for it.
    on_cpu = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    on_cpu.copy_(features, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return on_cpu, copied
