"""Data files of other formats as one of this project's: `python -m util convert a.json b.parquet my_data/data.jsonl`.

Reads .json and .jsonl files, .parquet (pip install pyarrow) and folders that `datasets` saved with save_to_disk (pip
install datasets). The formats are recognised sample by sample (importers.py) and named in the summary. A .jsonl or
.parquet file is read and written sample by sample, so that it may be of any size.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from util.command_line import MOST_TOLD, UserError, command_parser
from util.conversation import GROUNDING_PREFIXES, MARK
from util.data import entries, fetch
from util.data.lines import DataError, JsonLines, first_of, open_entries
from util.formats.importers import KINDS, below, import_entry
from util.run_folder import written_whole
from util.tiny_model import SPECIAL_TOKENS

ROWS = 64  # of a table, read at a time; each may hold images
# Tokens of the published tokenizer that no text may contain; training asks the tokenizer of its own model.
FORBIDDEN = (MARK, *(token for token in SPECIAL_TOKENS if not token.startswith(GROUNDING_PREFIXES)))


# ---- reading --------------------------------------------------------------------------------------------------------


def open_source(file: str) -> tuple[int, Iterator[object]]:
    """How many entries a file or folder has, and an iterator over them; one that cannot be read is its DataError."""
    if os.path.isdir(file):
        return open_saved_dataset(file)
    if file.endswith(".parquet"):
        return open_parquet(file)
    if not file.endswith((".json", ".jsonl")):
        raise DataError(f"{file}: must be .json, .jsonl, .parquet or a folder of datasets' save_to_disk; export it so")
    is_misnamed = file.endswith(".json") and holds_lines(file)
    held = JsonLines(file) if is_misnamed else open_entries(file)
    return len(held), each_or_error(held)


def holds_lines(file: str) -> bool:
    """Whether a file holds one sample per line: `datasets` and others give such files the name .json, too."""
    try:
        with open(file, encoding="utf-8-sig") as handle:
            if handle.read(1) != "{":  # a list; its first line may be gigabytes long, and is not read here
                return False
            handle.seek(0)
            return isinstance(json.loads(handle.readline()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def each_or_error(held: Sequence) -> Iterator[object]:
    """The entries of a sequence one by one; in place of one that is no JSON comes its DataError."""
    for index in range(len(held)):
        try:
            yield held[index]
        except DataError as error:
            yield error


def open_parquet(file: str) -> tuple[int, Iterator[object]]:
    """The rows of a .parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{file}: reading .parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        table = ParquetFile(file)
    except FileNotFoundError:
        raise DataError(f"{file}: no such data file (looked in {os.getcwd()})") from None
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    return table.metadata.num_rows, rows_of(table.iter_batches(ROWS))


def open_saved_dataset(folder: str) -> tuple[int, Iterator[object]]:
    """The rows of a folder that `datasets` wrote; images as their bytes, undecoded."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = json.loads(Path(folder, "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}; name one, such as {folder}/{splits[0]}")
    if not os.path.isfile(os.path.join(folder, "state.json")):
        raise DataError(f"{folder}: a folder, but none that save_to_disk wrote; name the data file in it")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{folder}: reading this folder needs the package datasets: pip install datasets") from None
    rows = datasets.load_from_disk(folder).with_format("arrow")
    return len(rows), rows_of(rows.iter(ROWS))


def rows_of(batches: Iterable) -> Iterator[dict]:
    """The rows of batches of an Arrow table."""
    for batch in batches:
        yield from batch.to_pylist()


# ---- media ----------------------------------------------------------------------------------------------------------


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
                item[kind] = [self._place(medium, kind, source, where) for medium in item[kind]]
            else:
                item[kind] = self._place(item[kind], kind, source, where)

    def count(self, sample: dict) -> None:
        """Count the media of a sample that is written."""
        for _, _, kind in media_of(sample):
            self.counts[kind] += 1

    def _place(self, medium: object, kind: str, source: Path, where: str) -> str:
        """The path of a medium: a path, an image of Pillow, or Arrow's {"path": ..., "bytes": ...}."""
        name = None
        if isinstance(medium, dict):
            name = medium.get("path")
            content = medium.get("bytes")
            if isinstance(content, (bytes, bytearray, memoryview)):
                return self._write(bytes(content), kind, name, where)
            if content is not None:
                raise DataError(f"{where}'bytes' must be bytes, is {type(content).__name__}; save the data as .parquet")
            medium = name
        elif hasattr(medium, "save") and hasattr(medium, "mode"):  # a PIL image
            buffer = io.BytesIO()
            medium.save(buffer, "PNG")
            return self._write(buffer.getvalue(), kind, name, where)
        if not isinstance(medium, str) or not medium or "\0" in medium:
            raise DataError(f"{where}{kind} must be a path, is {str(medium)[:80]!r}; name the file")
        return self._relative(medium, source, where)

    def _relative(self, path: str, source: Path, where: str) -> str:
        """A path as the output file names it: relative to its folder if the file is found or --media_root is given."""
        placed = below(self.root, path) if self.root else path
        if fetch.is_remote(placed):
            return placed
        local = fetch.local_path(placed)
        tried = [local]
        if not self.root and not os.path.isabs(local):
            tried = [os.path.join(source, local), local]
        found = next((candidate for candidate in tried if os.path.isfile(candidate)), None)
        if found is None:
            entries.refuse_base64(path, where)
            if mistaken := entries.mistaken(path, tried):
                raise DataError(f"{where}no such file {path!r:.200}{mistaken}")
            self.missing_count += 1
            if len(self.missing) < 3:
                self.missing.append(path)
        if os.path.isabs(path) or fetch.scheme_of(path) or (found is None and not self.root):
            return path
        # Links in the folder's path are resolved, as the system does for `..`; a file that is a link keeps its name.
        parent, name = os.path.split(found or local)
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


# ---- converting -----------------------------------------------------------------------------------------------------


class Writer:
    """Samples written one by one as a JSON list or as lines."""

    def __init__(self, handle: TextIO, lines: bool) -> None:
        self.handle = handle
        self.lines = lines
        self.count = 0  # samples written

    def write(self, sample: dict) -> None:
        """Append one sample. Raises DataError for text that no file can hold."""
        text = json.dumps(sample, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(": text holds half of a surrogate pair, which is no character; repair the file") from None
        if self.lines:
            self.handle.write(f"{text}\n")
        else:
            begin = "," if self.count else "["
            self.handle.write(f"{begin}\n{text}")
        self.count += 1

    def close(self) -> None:
        """End a list."""
        if not self.lines:
            self.handle.write("\n]\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Writer]:
    """A Writer of a file that is complete or absent: it gets its name when the block ends without an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, newline="\n") as handle:
            writer = Writer(handle, path.suffix == ".jsonl")
            yield writer
            writer.close()
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read or written ({error.strerror})") from None


@dataclass
class Refused:
    """Samples that cannot be used. With `skip` each is named on the error stream and left out."""

    skip: bool
    count: int = 0
    first: list[str] = field(default_factory=list)  # messages of the first few, without `skip`

    def add(self, message: str) -> None:
        self.count += 1
        if self.skip:
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        elif len(self.first) < MOST_TOLD:
            self.first.append(message)

    def stop(self, last_line: str) -> None:
        """Raise one DataError that names the samples, if there are any and they may not be skipped."""
        if self.first:
            raise DataError("\n".join([*first_of(self.first, self.count), last_line]))


def convert(
    inputs: list[str],
    output: str,
    media_root: str | None = None,
    skip_bad: bool = False,
    join_turns: bool = False,
    overwrite: bool = False,
) -> str:
    """Convert files into one and give the summary. Raises UserError, and then nothing is written.

    With `skip_bad`, bad samples are named on the error stream, counted and left out; else all are named in the error.
    """
    path = Path(output)
    check_output(path, inputs, overwrite)
    sources = [(file, *open_source(file)) for file in inputs]
    total = sum(count for _, count, _ in sources)
    media = Media(path, media_root)
    refused = Refused(skip_bad)
    dropped: Counter = Counter()
    lines = []
    try:
        with whole_file(path) as writer, tqdm(total=total, unit=" samples", leave=False, disable=None) as progress:
            converter = Converter(writer, media, refused, dropped, join_turns)
            for file, _, rows in sources:
                lines.append(converter.convert_file(file, rows, progress))
            refused.stop(
                f"{refused.count:,} of {refused.count + writer.count:,} samples cannot be converted, so nothing is "
                "written; --skip_bad leaves them out"
            )
            if not writer.count:
                left = " left" if refused.count else ""
                raise DataError(f"{', '.join(inputs)}: no samples{left}, so nothing is written")
    except BaseException:
        media.take_back()
        raise
    return "\n".join([*lines, *summary(path, writer.count, media, dropped)])


def check_output(path: Path, inputs: list[str], overwrite: bool) -> None:
    """Raise UserError for a file that cannot be written or that would be lost."""
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: the last name is the file to write, a .json or .jsonl (the latter at any size)")
    if path.is_dir():
        raise UserError(f"{path}: the last name is the file to write, and this is a folder; name another")
    if any(path.exists() and os.path.exists(file) and path.samefile(file) for file in inputs):
        raise UserError(f"{path}: is read and would be written; name another file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists, and the last name is the file to write; name another, or give --overwrite")


@dataclass
class Converter:
    """Converts entries one by one into one file."""

    writer: Writer
    media: Media
    refused: Refused
    dropped: Counter  # keys that have no effect on training
    join_turns: bool

    def convert_file(self, file: str, rows: Iterator[object], progress: tqdm) -> str:
        """Write the samples of one file; a line that says what it held."""
        formats: Counter = Counter()
        refused_before = self.refused.count
        folder = Path(file) if os.path.isdir(file) else Path(file).parent
        for index, entry in enumerate(rows):
            progress.update()
            # Qwen's pack_data.py makes lists of samples; here they are taken apart, as training packs samples itself.
            is_list = isinstance(entry, list) and bool(entry)
            for number, part in enumerate(entry if is_list else [entry]):
                where = f"{file}, sample {index}"
                if is_list:
                    where += f", part {number}"
                try:
                    formats[self._convert(part, folder)] += 1
                except DataError as error:
                    # the error of a line that is no JSON names file and line itself
                    self.refused.add(str(error) if isinstance(part, DataError) else f"{where}{error}")
        return file_in_words(file, formats, self.refused.count - refused_before)

    def _convert(self, entry: object, folder: Path) -> str:
        """Write one sample; the name of the format it came in."""
        if isinstance(entry, DataError):
            raise entry
        name, sample = import_entry(entry, self.dropped, self.join_turns)
        entries.check_messages(sample, FORBIDDEN, folder=None)  # so that training takes what is written here
        self.media.place(sample, folder)
        self.writer.write(sample)
        self.media.count(sample)
        return name


def file_in_words(file: str, formats: Counter, skipped: int) -> str:
    """What a file held: `a.json: 1,204 samples, ShareGPT / LLaVA`."""
    parts = [counted(formats.total(), "sample")]
    parts += [name if len(formats) == 1 else f"{count:,} {name}" for name, count in formats.most_common()]
    if skipped:
        parts.append(f"{skipped:,} skipped")
    return f"{file}: {', '.join(parts)}"


def summary(path: Path, count: int, media: Media, dropped: Counter) -> list[str]:
    """The lines about what was written, and what was not."""
    lines = []
    if dropped:
        keys = ", ".join(f"{key} ({times:,})" for key, times in dropped.most_common())
        lines.append(f"left out, as training does not use it: {keys}")
    if media.missing_count:
        few = ", ".join(map(fetch.printable, media.missing))
        if media.missing_count > len(media.missing):
            few += ", ..."
        files = counted(media.missing_count, "media file")
        lines.append(f"not found: {files} ({few}); --media_root names the folder they lie in")
    parts = [counted(count, "sample")]
    parts += [counted(media.counts[kind], kind) for kind in KINDS if media.counts[kind]]
    if media.written:
        parts.append(f"{counted(len(media.written), 'new file')} in {media.bytes_folder}")
    return [*lines, f"wrote {path}: {', '.join(parts)}", f"look at one: python -m util show {path}"]


def counted(count: int, noun: str) -> str:
    """`1 sample`, `1,204 samples`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def parser() -> argparse.ArgumentParser:
    made = command_parser("convert", __doc__)
    made.add_argument("inputs", nargs="+", metavar="IN", help=".json, .jsonl, .parquet, or a folder of save_to_disk")
    made.add_argument("output", metavar="OUT", help="the .json or .jsonl file to write")
    made.add_argument(
        "--media_root", metavar="FOLDER", help="the folder, or s3://..., that relative media paths are in"
    )
    made.add_argument("--skip_bad", action="store_true", help="list bad samples and leave them out")
    made.add_argument("--join_turns", action="store_true", help="join turns of the same role in a row by a newline")
    made.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return made


def main(arguments: list[str]) -> None:
    print(convert(**vars(parser().parse_args(arguments))))
