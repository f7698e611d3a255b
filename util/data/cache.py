"""Decoded, resized frames kept on disk (`--cache_dir`), so that from the second epoch on nothing is decoded again.

An entry is one file: a header, then the uint8 patches as `vision.load` gives them, which are mapped into memory, not
read. Its name is a hash of everything that decides the pixels, so an entry is never out of date: where something
changes, another name is asked for. What a frozen tower makes of the pixels (features.py) lies in the same `Folder`.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from util.command_line import UserError

if TYPE_CHECKING:
    from util.vision import Budget, Grid, Medium

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where the folder is refused
    fcntl = None  # type: ignore[assignment]

VERSION = 4  # raise it when vision.py or video_reader.py make other pixels of the same file and settings
MAGIC = b"patches\0"
# CRC-32 of the rest and the key; magic; the numbers of a vision.Grid, bytes per patch; CRC-32 of what follows (the
# patches and, as float64, the times of the grid); the step of the grid, how many times; whether it is of a video
HEADER = struct.Struct("<I8s9IdII")
# Only files with names of these two forms are ever deleted: the folder may hold other files, too.
ENTRY = re.compile(r"[0-9a-f]{64}\.(patches|features)")
UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.unfinished")
TOUCH_SECONDS = 60  # an entry's time of last use is exact to so many seconds
PAUSE_SECONDS = 60  # after a failure nothing is stored for so many seconds
COUNTS = ("hits", "misses", "stored", "not_stored", "damaged", "evicted")
FEATURES = "features"  # the sub-folder of data/features.py, and how its entries' names end
ROWS = 1021  # of counts: a process uses the row that its process number gives


class Counts:
    """Numbers by name, added up over this process and all that this object was sent to."""

    def __init__(self, names: tuple[str, ...]) -> None:
        import torch

        self.names = names
        # Shared with the workers, without a lock, which a killed worker would never give back: each has its own row.
        self._rows = torch.zeros(ROWS, len(names), dtype=torch.int64).share_memory_()

    def add(self, name: str, number: int = 1) -> None:
        self._rows[os.getpid() % ROWS, self.names.index(name)] += number

    def totals(self) -> dict[str, int]:
        return dict(zip(self.names, self._rows.sum(0).tolist(), strict=True))


class Folder:
    """A folder of entries, each a file that is complete or absent; may be sent to data workers.

    `max_gib`: all entries, those being written included, take at most so many GiB. Any number of processes may share
    the folder, and be killed. It belongs on a local disk: Linux keeps the pages of a deleted file while they are
    mapped, but not over a network if another machine deletes it. `is_tidy`: what dead writers left is gone already.
    UserError: a folder or size that cannot be used.
    """

    without = "decodes what is not cached"  # what training does where an entry cannot be had

    def __init__(self, directory: str | Path, max_gib: float, is_tidy: bool = False) -> None:
        if fcntl is None:
            raise UserError(f"--cache_dir {directory}: needs locks on files that Windows lacks; leave it out there")
        if not max_gib > 0:
            raise UserError(f"--cache_max_gib {max_gib}: must be above 0")
        self.directory = Path(os.path.abspath(os.path.expanduser(directory)))
        self.max_bytes = max_gib * 2**30
        self.counts = Counts(COUNTS)
        self._has_warned = False
        self._paused_until = 0.0  # seconds of time.monotonic
        try:
            os.makedirs(self.directory, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()
            if not is_tidy:
                with self._lock() as lock:
                    os.pwrite(lock, self._tidy(self.max_bytes).to_bytes(8, "little"), 0)
        except OSError as error:
            raise UserError(
                f"--cache_dir {directory}: must be a folder that can be made and written to ({error.strerror}); "
                "name another one, or leave it out to decode in every epoch"
            ) from None

    def try_to_write(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether the entry is there now. A disk that is full or cannot be written to does not end training."""
        if os.path.exists(path):  # another process was faster
            return True
        if time.monotonic() < self._paused_until:
            return False
        try:
            write()
        except OSError as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            self._warn(error)
            return False
        return True

    def write(self, path: Path, header: bytes, content, spared_since: float = math.inf) -> None:
        """Write an entry under another name, then rename it: it is complete or absent, whoever else writes it.

        `content`: a buffer. `spared_since`: see `_tidy`. It is not flushed to the disk, which would take time;
        checksums show the damage that a power failure does.
        """
        unfinished = path.parent / f".{path.stem}.{secrets.token_hex(8)}.unfinished"
        os.makedirs(path.parent, exist_ok=True)
        try:
            with self._create(unfinished, len(header) + content.nbytes, spared_since) as file:
                file.write(header)
                file.write(content)
                file.flush()
                os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise

    def bytes_in_use(self) -> int:
        """How many bytes the entries take, by the estimate of `_create`."""
        with self._lock() as lock:
            return int.from_bytes(os.pread(lock, 8, 0), "little")

    def _create(self, unfinished: Path, size: int, spared_since: float) -> BinaryIO:
        """A new file of `size` bytes, opened, locked and within the cap. OSError where there is no room for it.

        The lock file holds an estimate of the bytes in use. It is never too low (a file that is never finished, or is
        deleted as damaged, stays counted), so all entries are looked at only where the estimate would pass the cap.
        Then a tenth of the cap is freed, so that this seldom happens.
        """
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"an entry of {size / 2**30:.2f} GiB is above --cache_max_gib")
        with self._lock() as lock:
            estimate = os.pread(lock, 8, 0)
            total = int.from_bytes(estimate, "little")
            if len(estimate) < 8 or total + size > self.max_bytes:
                total = self._tidy(min(self.max_bytes - size, 0.9 * self.max_bytes), spared_since)
            if total + size > self.max_bytes:
                raise OSError(errno.ENOSPC, "--cache_max_gib is reached by what cannot be deleted or is being written")
            os.pwrite(lock, (total + size).to_bytes(8, "little"), 0)
            file = open(unfinished, "xb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # shows that its writer lives: a kill, too, closes and unlocks it
                file.truncate(size)  # so that _tidy counts the size that it will have
            except OSError:
                file.close()
                raise
            return file

    @contextmanager
    def _lock(self) -> Iterator[int]:
        """The open lock file: only one process or thread at a time creates, counts and deletes."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where another thread has forked
            os.close(descriptor)

    def _tidy(self, room: float, spared_since: float = math.inf) -> int:
        """Delete what dead writers left, then the least recently used entries until at most `room` bytes are in use.

        `spared_since`: features that were used since then (nanoseconds) stay all the same. Returns the bytes in use.
        """
        entries = []
        total = 0
        names = "[0-9a-f][0-9a-f]/*"
        for path in chain(self.directory.glob(names), self.directory.glob(f"{FEATURES}/{names}")):
            with suppress(OSError):  # deleted meanwhile, or its writer lives
                status = path.stat()
                size = status.st_size
                if ENTRY.fullmatch(path.name):
                    entries.append((status.st_atime_ns, size, path))
                    total += size
                elif UNFINISHED.fullmatch(path.name):
                    total += size
                    with open(path, "rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    total -= size
        for used, size, path in sorted(entries):
            if total <= room:
                break
            if used >= spared_since and path.suffix == f".{FEATURES}":
                continue
            with suppress(OSError):
                path.unlink()
                total -= size
                self.counts.add("evicted")
        return total

    def _warn(self, error: OSError) -> None:
        """Say once per process that the cache does not work; the statistics tell how often."""
        if not self._has_warned:
            self._has_warned = True
            problem = f"--cache_dir {self.directory}: {error.strerror or error}"
            warnings.warn(f"{problem}. Training goes on and {self.without}", RuntimeWarning, stacklevel=2)


class FrameCache(Folder):
    """Answers as `load` and `read_grid` of util.vision do, from a folder where it can; may be sent to data workers.

    `url_identity`: the function that `identity` calls for a path with "://" in it; without one such paths are not
    cached.
    """

    def __init__(self, directory: str | Path, max_gib: float, url_identity: Callable | None = None) -> None:
        super().__init__(directory, max_gib)
        self.url_identity = url_identity

    def load(self, item: dict, budget: "Budget", read: Callable | None = None, stores: bool = True) -> "Medium":
        """What `read(item, budget)` gives (default: vision.load); its errors are the only ones that are raised.

        The patches of an entry are mapped into memory, not read. `stores`: whether what was read becomes an entry.
        """
        from util import vision

        key = self.key(item, budget)
        medium = self._find(key, with_pixels=True)
        if medium is not None:
            self.counts.add("hits")
            medium.key = key
            return medium
        self.counts.add("misses")
        medium = (read or vision.load)(item, budget)
        # The key is made again, so that a file which changed meanwhile is not stored under its former identity.
        is_unchanged = key is not None and key == self.key(item, budget)
        if is_unchanged:
            medium.key = key
        is_stored = stores and is_unchanged and self._try_to_store(key, medium)
        self.counts.add("stored" if is_stored else "not_stored")
        return medium

    def read_grid(self, item: dict, budget: "Budget", read: Callable | None = None) -> "Grid":
        """What `read(item, budget)` gives (default: vision.read_grid); of an entry only the header is read."""
        from util import vision

        grid = self._find(self.key(item, budget), with_pixels=False)
        if grid is None:
            grid = (read or vision.read_grid)(item, budget)
        return grid

    def statistics(self) -> dict[str, int | float]:
        """COUNTS so far, of this process and of all that this object was sent to; and `hit_ratio`, 0 before any use."""
        counts = self.counts.totals()
        return {**counts, "hit_ratio": counts["hits"] / max(1, counts["hits"] + counts["misses"])}

    def identity(self, path: str) -> str | None:
        """A text that changes when a file's content does; None: not to be cached. OSError where there is no file."""
        if "://" in path:
            return self.url_identity(path) if self.url_identity else None
        status = os.stat(path)
        return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"

    def key(self, item: dict, budget: "Budget") -> str | None:
        """64 hexadecimal digits from everything that decides the pixels; None where a file's identity is unknown."""
        import av
        import PIL
        import torch
        import torchvision

        from util import vision

        kind = item["type"]
        source = item[kind]
        is_video = kind == "video"
        is_list = isinstance(source, list)
        try:
            identities = [self.identity(path) for path in (source if is_list else [source])]
        except OSError:  # reading the file will say what is wrong with it, and name the sample
            return None
        if None in identities:
            return None
        decoder = av.__version__ if is_video and not is_list else PIL.__version__
        constants = [VERSION, torch.__version__, torchvision.__version__, decoder, asdict(budget.family), vision.MERGE,
                     vision.TEMPORAL, vision.IMAGE_TOKENS, vision.FRAME_TOKENS, vision.TOTAL_TOKENS]  # fmt: skip
        # All settings and keys count but those that are known not to matter, so that a new one counts from the start.
        without_effect = settings_without_effect(is_video, is_list)
        limits = {name: value for name, value in asdict(budget).items() if not name.startswith(without_effect)}
        own = {name: value for name, value in item.items() if name not in (kind, "text")}
        text = json.dumps([constants, is_list, identities, own, limits], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.patches"

    def _find(self, key: str | None, with_pixels: bool) -> "Medium | Grid | None":
        """An entry, or its grid alone; None where there is none. A damaged one is deleted."""
        try:
            return read_entry(self._path(key), key, with_pixels) if key else None
        except OSError as error:
            if error.errno == errno.EIO:
                self.counts.add("damaged")
                with suppress(OSError):
                    os.unlink(self._path(key))
            elif error.errno != errno.ENOENT:
                self._warn(error)
        return None

    def _try_to_store(self, key: str, medium: "Medium") -> bool:
        return self.try_to_write(self._path(key), lambda: self._store(key, medium))

    def _store(self, key: str, medium: "Medium") -> None:
        import torch

        grid = medium.grid
        pixels = medium.patches.contiguous().flatten()
        if grid.times:
            pixels = torch.cat([pixels, torch.tensor(grid.times, dtype=torch.float64).view(torch.uint8)])
        content = pixels.numpy()
        in_time = grid.step, len(grid.times), medium.is_video
        fields = MAGIC, *grid.numbers, medium.patches.shape[1], zlib.crc32(content), *in_time
        rest = HEADER.pack(0, *fields)[4:]  # the header without its own checksum
        header = HEADER.pack(zlib.crc32(rest + key.encode()), *fields)
        self.write(self._path(key), header, content)


def settings_without_effect(is_video: bool, is_list: bool) -> tuple[str, ...]:
    """Beginnings of the names of budget settings that never change the pixels of such a medium."""
    if is_list:  # of a list of frames every one is taken
        return ("video_fps", "video_max_frames")
    if is_video:
        return ()
    return ("video_",)


def mark_as_used(file, status: os.stat_result) -> None:
    """Note the time of last use of an entry, which `Folder` goes by when it needs room."""
    with suppress(OSError):
        os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))


def read_entry(path: Path, key: str, with_pixels: bool) -> "Medium | Grid":
    """The Medium of an entry, mapped into memory, which marks the entry as used; or only its grid.

    OSError: ENOENT where there is no entry, EIO where it is damaged.
    """
    import torch

    from util.vision import Grid, Medium

    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        header = file.read(HEADER.size).ljust(HEADER.size, b"\0")
        own_checksum, magic, t, h, w, *facts, columns, checksum, step, times, is_video = HEADER.unpack(header)
        grid = Grid(t, h, w, *map(bool, facts), step=step)
        end = HEADER.size + grid.patches * columns  # of the patches
        is_whole = magic == MAGIC and status.st_size == end + 8 * times
        is_whole = is_whole and own_checksum == zlib.crc32(header[4:] + key.encode())
        if is_whole and times:
            grid = grid._replace(times=struct.unpack(f"<{times}d", os.pread(file.fileno(), 8 * times, end)))
        if is_whole and not with_pixels:
            return grid
        # The checksum is made by reading, not over the mapping: the process does not grow, and a bad disk raises here
        # instead of killing the process by a signal later.
        buffer = memoryview(bytearray(2**20))
        found = 0
        while is_whole and (count := file.readinto(buffer)):
            found = zlib.crc32(buffer[:count], found)
        if not is_whole or found != checksum:
            raise OSError(errno.EIO, "damaged entry")
        if time.time() - status.st_atime > TOUCH_SECONDS:
            mark_as_used(file, status)
    try:
        # Not shared: whoever writes into the tensor changes a copy. And unlike mmap, torch keeps no file open for it.
        mapped = torch.from_file(str(path), shared=False, size=status.st_size, dtype=torch.uint8)
    except RuntimeError:  # deleted since it was opened
        raise FileNotFoundError(errno.ENOENT, "gone") from None
    # Through NumPy, because a tensor that torch knows to be a mapping cannot be sent from a data worker.
    patches = mapped[HEADER.size : end].view(grid.patches, columns)
    return Medium(torch.from_numpy(patches.numpy()), grid, is_video=bool(is_video))
