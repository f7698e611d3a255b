"""Decoded, resized frames kept on disk (`--cache_dir`), so that from the second epoch on nothing is decoded again.

An entry is one file: a header, then the uint8 patches as `vision.load` gives them, which are mapped into memory, not
read. Its name is a hash of all that decides the pixels, so an entry is never out of date, only no longer asked for.
"""

import errno
import fcntl
import hashlib
import json
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
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from util.command_line import UserError

if TYPE_CHECKING:
    from util.vision import Budget, Grid, Medium

VERSION = 2  # raise it when vision.py or video_reader.py make other pixels of the same file and settings
MAGIC = b"patches\0"
# CRC-32 of the rest and the key; magic; t, h, w, capped, cut, bytes per patch; CRC-32 of the patches
HEADER = struct.Struct("<I8s7I24x")
ENTRY = re.compile(r"[0-9a-f]{64}\.patches")  # nothing in the folder but what is named like these is ever deleted
UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.unfinished")
TOUCH_SECONDS = 60  # an entry's time of last use is this exact
PAUSE_SECONDS = 60  # after a failure nothing is stored for so long
COUNTS = ("hits", "misses", "stored", "not_stored", "damaged", "evicted")
ROWS = 1021  # of counts, dealt to processes by their id


class FrameCache:
    """`load` and `read_grid` of util.vision, out of a folder where they can be; may be sent to data workers.

    `max_gib`: all entries, those being written included, take at most so many GiB. `url_identity`: what `identity`
    calls for a path with "://" in it; without the function such paths are not cached. Any number of processes may
    share the folder, and be killed. It belongs on a local disk: Linux keeps the pages of a deleted file while they are
    mapped, but not over a network if another machine deletes it. UserError: a folder or size that cannot be used.
    """

    def __init__(self, directory: str | Path, max_gib: float, url_identity: Callable | None = None) -> None:
        import torch

        if not max_gib > 0:
            raise UserError(f"--cache_max_gib {max_gib}: must be above 0")
        self.directory = Path(os.path.abspath(os.path.expanduser(directory)))
        self.max_bytes, self.url_identity = max_gib * 2**30, url_identity
        # Shared with the workers, without a lock, which a killed worker would never give back: each has its own row.
        self._counts = torch.zeros(ROWS, len(COUNTS), dtype=torch.int64).share_memory_()
        self._has_warned, self._paused_until = False, 0.0  # seconds of time.monotonic
        try:
            os.makedirs(self.directory, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()
            with self._lock() as lock:
                os.pwrite(lock, self._tidy(self.max_bytes).to_bytes(8, "little"), 0)
        except OSError as error:
            raise UserError(
                f"--cache_dir {directory}: must be a folder that can be made and written to ({error.strerror}); "
                "name another one, or leave it out to decode in every epoch"
            ) from None

    def load(self, item: dict, budget: "Budget", read: Callable | None = None) -> "Medium":
        """What `read(item, budget)` gives (default: vision.load), and only its errors; patches of a hit are mapped."""
        from util import vision

        key = self.key(item, budget)
        medium = self._find(key, with_pixels=True)
        self._count("misses" if medium is None else "hits")
        if medium is None:
            medium = (read or vision.load)(item, budget)
            # Asked again, so that a file which changed meanwhile is not stored under its former identity.
            is_stored = key is not None and key == self.key(item, budget) and self._try_to_store(key, medium)
            self._count("stored" if is_stored else "not_stored")
        return medium

    def read_grid(self, item: dict, budget: "Budget", read: Callable | None = None) -> "Grid":
        """What `read(item, budget)` gives (default: vision.read_grid); of an entry only the header is read."""
        from util import vision

        grid = self._find(self.key(item, budget), with_pixels=False)
        return (read or vision.read_grid)(item, budget) if grid is None else grid

    def statistics(self) -> dict[str, int | float]:
        """COUNTS so far, of this process and of all that this object was sent to; `hit_ratio`, 0 before any use."""
        counts = dict(zip(COUNTS, self._counts.sum(0).tolist(), strict=True))
        return {**counts, "hit_ratio": counts["hits"] / max(1, counts["hits"] + counts["misses"])}

    def identity(self, path: str) -> str | None:
        """Text that changes when a file's content does; None: not to be cached. OSError where there is no file."""
        if "://" in path:
            return self.url_identity(path) if self.url_identity else None
        status = os.stat(path)
        return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"

    def key(self, item: dict, budget: "Budget") -> str | None:
        """64 hexadecimal digits from all that decides the pixels; None where a file's identity cannot be known."""
        import av
        import PIL
        import torch
        import torchvision

        from util import vision

        kind, source = item["type"], item[item["type"]]
        is_video, is_list = kind == "video", isinstance(source, list)
        try:
            identities = [self.identity(path) for path in (source if is_list else [source])]
        except OSError:  # reading it will say what is wrong, with the name of the sample
            return None
        if None in identities:
            return None
        decoder = av.__version__ if is_video and not is_list else PIL.__version__
        constants = [VERSION, torch.__version__, torchvision.__version__, decoder, vision.PATCH, vision.MERGE,
                     vision.TEMPORAL, vision.IMAGE_PIXELS, vision.FRAME_PIXELS, vision.TOTAL_PIXELS]  # fmt: skip
        # Left out is what is known not to matter: a key or a setting that is new some day counts.
        useless = ("video_fps", "video_max_frames") if is_list else () if is_video else ("video_",)
        limits = {name: value for name, value in asdict(budget).items() if not name.startswith(useless)}
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
                self._count("damaged")
                with suppress(OSError):
                    os.unlink(self._path(key))
            elif error.errno != errno.ENOENT:
                self._warn(error)
        return None

    def _try_to_store(self, key: str, medium: "Medium") -> bool:
        """Whether an entry is there now. Where the disk is full or cannot be written to, training goes on without."""
        if os.path.exists(self._path(key)):  # another process was faster
            return True
        if time.monotonic() < self._paused_until:
            return False
        try:
            self._store(key, medium)
        except OSError as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            self._warn(error)
            return False
        return True

    def _store(self, key: str, medium: "Medium") -> None:
        """Write an entry under another name, then rename it: it is complete or absent, whoever else writes it.

        It is not flushed to disk, which takes time: what a power failure makes of it, the checksums show.
        """
        pixels = medium.patches.contiguous().flatten().numpy()
        fields = MAGIC, *medium.grid, medium.patches.shape[1], zlib.crc32(pixels)
        header = HEADER.pack(zlib.crc32(HEADER.pack(0, *fields)[4:] + key.encode()), *fields)
        path = self._path(key)
        unfinished = path.parent / f".{key}.{secrets.token_hex(8)}.unfinished"
        os.makedirs(path.parent, exist_ok=True)
        try:
            with self._create(unfinished, len(header) + pixels.nbytes) as file:
                file.write(header)
                file.write(pixels)
                file.flush()
                os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise

    def _create(self, unfinished: Path, size: int) -> BinaryIO:
        """A new file of `size` bytes, opened, locked and within the cap. OSError where there is no room for it.

        The lock file holds the bytes in use, an estimate that errs upwards only (what is never finished, or is deleted
        as damaged, stays counted), so all entries are looked at only where it would pass the cap. Then a tenth of the
        cap becomes free, so that the next look is far off.
        """
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"an entry of {size / 2**30:.2f} GiB is above --cache_max_gib")
        with self._lock() as lock:
            estimate = os.pread(lock, 8, 0)
            total = int.from_bytes(estimate, "little")
            if len(estimate) < 8 or total + size > self.max_bytes:
                total = self._tidy(min(self.max_bytes - size, 0.9 * self.max_bytes))
            if total + size > self.max_bytes:
                raise OSError(errno.ENOSPC, "--cache_max_gib is reached by what cannot be deleted or is being written")
            os.pwrite(lock, (total + size).to_bytes(8, "little"), 0)
            file = open(unfinished, "xb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # held until it is closed, by a kill too: its writer lives
                file.truncate(size)  # _tidy counts it as large as it will be
            except OSError:
                file.close()
                raise
            return file

    @contextmanager
    def _lock(self) -> Iterator[int]:
        """Only one process or thread at a time creates, counts and deletes."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where another thread has forked
            os.close(descriptor)

    def _tidy(self, room: float) -> int:
        """Delete what dead writers left, then the least recently used entries above `room` bytes; the bytes in use."""
        entries, total = [], 0
        for path in self.directory.glob("[0-9a-f][0-9a-f]/*"):
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
        for _, size, path in sorted(entries):
            if total <= room:
                break
            with suppress(OSError):
                path.unlink()
                total -= size
                self._count("evicted")
        return total

    def _count(self, name: str) -> None:
        self._counts[os.getpid() % ROWS, COUNTS.index(name)] += 1

    def _warn(self, error: OSError) -> None:
        """Say once per process that the cache does not do its work; the statistics say how often."""
        if not self._has_warned:
            self._has_warned = True
            reason = f"--cache_dir {self.directory}: {error.strerror or error}"
            warnings.warn(f"{reason}. Training goes on and decodes what is not cached", RuntimeWarning, stacklevel=2)


def read_entry(path: Path, key: str, with_pixels: bool) -> "Medium | Grid":
    """The Medium of an entry, mapped, which marks it as used; or its grid. OSError: ENOENT without, EIO if damaged."""
    import torch

    from util.vision import Grid, Medium

    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        header = file.read(HEADER.size).ljust(HEADER.size, b"\0")
        own_checksum, magic, t, h, w, capped, cut, columns, checksum = HEADER.unpack(header)
        grid = Grid(t, h, w, bool(capped), bool(cut))
        is_whole = magic == MAGIC and status.st_size == HEADER.size + grid.patches * columns
        is_whole = is_whole and own_checksum == zlib.crc32(header[4:] + key.encode())
        if is_whole and not with_pixels:
            return grid
        # Read, not mapped: the process does not grow, and a bad disk is an error here, not a signal that kills later.
        buffer, found = memoryview(bytearray(2**20)), 0
        while is_whole and (count := file.readinto(buffer)):
            found = zlib.crc32(buffer[:count], found)
        if not is_whole or found != checksum:
            raise OSError(errno.EIO, "damaged entry")
        if time.time() - status.st_atime > TOUCH_SECONDS:
            with suppress(OSError):
                os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
    try:
        # Private: whoever writes into the tensor changes a copy. torch keeps no open file per mapping, mmap does.
        mapped = torch.from_file(str(path), shared=False, size=status.st_size, dtype=torch.uint8)
    except RuntimeError:  # deleted since it was opened
        raise FileNotFoundError(errno.ENOENT, "gone") from None
    # By way of NumPy, because a tensor that torch knows to be a mapping cannot be sent from a data worker.
    return Medium(torch.from_numpy(mapped[HEADER.size :].view(grid.patches, columns).numpy()), grid)
