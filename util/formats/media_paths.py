"""The media of converted samples: each gets a path relative to the file that is written.

What is no file yet (bytes in a table, an image of Pillow) is written into one. What training would refuse of frames is
refused here, too.
"""

import base64
import binascii
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from util.data import entries, fetch
from util.data.lines import DataError
from util.formats.importers import KINDS, below
from util.run_folder import written_whole


class Media:
    """Gives the media of samples paths relative to the output file; what is no file yet is written into one."""

    def __init__(self, output: Path, root: str | None) -> None:
        self.folder = os.path.realpath(output.parent)
        self.bytes_folder = output.with_name(f"{output.stem}_media")
        self.root = root
        self.written: list[Path] = []
        self.counts: Counter = Counter()
        self.missing: list[str] = []  # the first few
        self.missing_count = 0

    def place(self, sample: dict, source: Path) -> None:
        """Replace every medium of a sample by a path; `source` is the folder that its paths are relative to."""
        for number, item, kind in media_of(sample):
            where = f", message {number}: "
            if isinstance(item[kind], list):
                # of several frames each is an image; one alone may be the folder of them all
                part = "image" if len(item[kind]) > 1 else kind
                item[kind] = [self._place(medium, part, source, where) for medium in item[kind]]
            else:
                item[kind] = self._place(item[kind], kind, source, where)
            if kind == "video":
                self._check_frames(item, where)

    def count(self, sample: dict) -> None:
        """Count the media of a sample that is written."""
        for _, _, kind in media_of(sample):
            self.counts[kind] += 1

    def _place(self, medium: object, kind: str, source: Path, where: str) -> str:
        """The path of a medium: a path, an image of Pillow, or Arrow's {"path": ..., "bytes": ...}."""
        name = None
        if isinstance(medium, dict):
            name = medium.get("path")
            if medium.get("bytes") is not None:
                return self._write(content_of(medium["bytes"], where), kind, name, where)
            medium = name
        elif hasattr(medium, "save") and hasattr(medium, "mode"):  # a PIL image
            buffer = io.BytesIO()
            medium.save(buffer, "PNG")
            return self._write(buffer.getvalue(), kind, name, where)
        if not isinstance(medium, str) or not medium or "\0" in medium:
            raise DataError(f"{where}{kind} must be a path, is {str(medium)[:80]!r}; name the file")
        return self._relative(medium, kind, source, where)

    def _relative(self, path: str, kind: str, source: Path, where: str) -> str:
        """A path as the output file names it: relative to its folder if the file is found or --media_root is given."""
        placed = below(self.root, path) if self.root else path
        if fetch.is_remote(placed):
            return placed
        local = fetch.local_path(placed)
        tried = []
        for spelling in entries.spellings(local):
            if not self.root and not os.path.isabs(local):
                tried.append(os.path.join(source, spelling))
            tried.append(spelling)
        is_found = os.path.exists if kind == "video" else os.path.isfile  # a folder stands for its images as frames
        found = next((candidate for candidate in tried if is_found(candidate)), None)
        if found is None:
            entries.refuse_base64(path, where)
            if mistaken := entries.mistaken(path, tried):
                raise DataError(f"{where}no such file {path!r:.200}{mistaken}")
            self.missing_count += 1
            if len(self.missing) < 3:
                self.missing.append(path)
        if os.path.isabs(path):
            return found or path
        if fetch.scheme_of(path) or (found is None and not self.root):
            return path
        # Links in the folder's path are resolved, as the system does for `..`; a file that is a link keeps its name.
        parent, name = os.path.split((found or local).rstrip(os.sep))
        resolved = os.path.join(os.path.realpath(parent), name)
        return Path(os.path.relpath(resolved, self.folder)).as_posix()

    def _write(self, content: bytes, kind: str, name: object, where: str) -> str:
        """Write a file named by its content, unless it is there, and give its path."""
        suffix = os.path.splitext(name)[1].lower() if isinstance(name, str) else ""
        if kind == "image":
            suffix = image_suffix(content, where)
        path, is_new = write_by_content(self.bytes_folder, content, suffix or ".mp4")
        if is_new:
            self.written.append(path)
        return f"{self.bytes_folder.name}/{path.name}"

    def _check_frames(self, item: dict, where: str) -> None:
        """DataError for frames that training would refuse: of several shapes, damaged, or none in a folder."""
        value = item["video"]
        paths = [value] if isinstance(value, str) else value
        if any(fetch.is_remote(path) for path in paths):
            return
        paths = [os.path.normpath(os.path.join(self.folder, fetch.local_path(path))) for path in paths]
        if len(paths) == 1 and os.path.isdir(paths[0]):
            paths = entries.with_frames({"type": "video", **item}, paths[0], where, set())["video"]
        elif isinstance(value, str):
            return
        if all(map(os.path.isfile, paths)):
            from util.vision import FrameList  # takes seconds to import, and only frames need it

            try:
                FrameList(paths).check()
            except ValueError as error:
                raise DataError(f"{where}{error}") from None

    def take_back(self) -> None:
        """Remove the files that were written, as the file that would name them is not written after all."""
        for path in self.written:
            path.unlink(missing_ok=True)
        if self.written and not any(self.bytes_folder.iterdir()):
            self.bytes_folder.rmdir()


def media_of(sample: dict) -> Iterator[tuple[int, dict, str]]:
    """(number of the message, content item, "image" or "video") for each medium of a sample."""
    for number, message in enumerate(sample["messages"]):
        if isinstance(message["content"], list):
            for item in message["content"]:
                for kind in KINDS:
                    if kind in item:
                        yield number, item, kind


def content_of(content: object, where: str) -> bytes:
    """The bytes of a medium: Arrow's, or as JSON holds them, in base64 or as a list of numbers."""
    if isinstance(content, (bytes, bytearray, memoryview)):
        return bytes(content)
    try:
        if isinstance(content, str):
            return base64.b64decode(content, validate=True)
        if isinstance(content, list):
            return bytes(content)
    except (binascii.Error, ValueError, TypeError):
        pass
    raise DataError(
        f"{where}'bytes' must be bytes, base64 or a list of numbers below 256, is {str(content)[:40]!r}; repair it"
    )


def write_by_content(folder: Path, content: bytes, suffix: str) -> tuple[Path, bool]:
    """Write a file named by a hash of its content into a folder, unless it is there; its path, and whether it is new.

    The file is complete or absent.
    """
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    if path.exists():
        return path, False
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path, "wb") as file:
        file.write(content)
    return path, True


def image_suffix(content: bytes, where: str) -> str:
    """The suffix of an image's file format, read from its first bytes."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = str(image.format).lower()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise DataError(f"{where}{len(content):,} bytes that are no image; repair the sample") from None
    return {"jpeg": ".jpg", "mpo": ".jpg"}.get(kind, f".{kind}")
