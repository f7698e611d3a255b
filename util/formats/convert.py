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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from util.command_line import MOST_TOLD, UserError, command_parser
from util.conversation import GROUNDING_PREFIXES, MARK
from util.data import entries, fetch
from util.data.lines import DataError, JsonLines, open_entries
from util.formats.importers import KINDS, below, import_entry
from util.run_folder import written_whole
from util.tiny_model import SPECIAL_TOKENS

ROWS = 64  # of a table, read at a time; each may hold images
# What no text may hold under the published tokenizer; training asks the tokenizer of its own model.
FORBIDDEN = (MARK, *(token for token in SPECIAL_TOKENS if not token.startswith(GROUNDING_PREFIXES)))


# ---- reading --------------------------------------------------------------------------------------------------------


def open_source(file: str) -> tuple[int, Iterator[object]]:
    """How many entries a file or folder has, and each of them, or the DataError of one that cannot be read."""
    if os.path.isdir(file):
        return open_saved_dataset(file)
    if file.endswith(".parquet"):
        return open_parquet(file)
    if not file.endswith((".json", ".jsonl")):
        raise DataError(f"{file}: must be .json, .jsonl, .parquet or a folder of datasets' save_to_disk; export it so")
    held = JsonLines(file) if file.endswith(".json") and holds_lines(file) else open_entries(file)
    return len(held), each(held)


def holds_lines(file: str) -> bool:
    """Whether a file holds one sample per line: `datasets` and others give such files the name .json, too."""
    try:
        with open(file, encoding="utf-8-sig") as handle:
            if handle.read(1) != "{":  # a list may be one line of gigabytes
                return False
            handle.seek(0)
            return isinstance(json.loads(handle.readline()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def each(held: Sequence) -> Iterator[object]:
    """The entries of a sequence one by one; one that is no JSON is given as its error, and the next follows."""
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
    return table.metadata.num_rows, (row for batch in table.iter_batches(ROWS) for row in batch.to_pylist())


def open_saved_dataset(folder: str) -> tuple[int, Iterator[object]]:
    """The rows of a folder that `datasets` wrote; images as their bytes, undecoded."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = json.loads(Path(folder, "dataset_dict.json").read_text())["splits"]
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}; name one, such as {folder}/{splits[0]}")
    if not os.path.isfile(os.path.join(folder, "state.json")):
        raise DataError(f"{folder}: a folder, but none that save_to_disk wrote; name the data file in it")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{folder}: reading this folder needs the package datasets: pip install datasets") from None
    rows = datasets.load_from_disk(folder).with_format("arrow")
    return len(rows), (row for batch in rows.iter(ROWS) for row in batch.to_pylist())


# ---- media ----------------------------------------------------------------------------------------------------------


class Media:
    """Puts the media of samples where the output file can name them: relative paths, and files for bare bytes."""

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
        for number, message in enumerate(sample["messages"]):
            for item in message["content"] if isinstance(message["content"], list) else []:
                for kind in KINDS:
                    if kind in item:
                        where = f", message {number}: "
                        several = isinstance(item[kind], list)
                        media = item[kind] if several else [item[kind]]
                        paths = [self._place(medium, kind, source, where) for medium in media]
                        item[kind] = paths if several else paths[0]

    def count(self, sample: dict) -> None:
        """Count the media of a sample that is written."""
        for message in sample["messages"]:
            for item in message["content"] if isinstance(message["content"], list) else []:
                self.counts.update(kind for kind in KINDS if kind in item)

    def _place(self, medium: object, kind: str, source: Path, where: str) -> str:
        name = None
        if isinstance(medium, dict):
            name, content = medium.get("path"), medium.get("bytes")
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
        tried = [local] if self.root or os.path.isabs(local) else [os.path.join(source, local), local]
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
        # The folder's own links are followed, as the system does for `..`; a link in the file's place keeps its name.
        parent, name = os.path.split(found or local)
        return Path(os.path.relpath(os.path.join(os.path.realpath(parent), name), self.folder)).as_posix()

    def _write(self, content: bytes, kind: str, name: object, where: str) -> str:
        """Write a file named by its content, unless it is there, and give its path."""
        suffix = os.path.splitext(name)[1].lower() if isinstance(name, str) else ""
        suffix = image_suffix(content, where) if kind == "image" else suffix or ".mp4"
        path, is_new = write_by_content(self.bytes_folder, content, suffix)
        if is_new:
            self.written.append(path)
        return f"{self.bytes_folder.name}/{path.name}"

    def take_back(self) -> None:
        """Remove the files written, as the file that names them does not come to be."""
        for path in self.written:
            path.unlink(missing_ok=True)
        if self.written and not any(self.bytes_folder.iterdir()):
            self.bytes_folder.rmdir()


def write_by_content(folder: Path, content: bytes, suffix: str) -> tuple[Path, bool]:
    """Write a file named by its content into a folder, complete or absent, unless it is there: its path, and whether
    it is new."""
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
        self.handle, self.lines, self.count = handle, lines, 0

    def write(self, sample: dict) -> None:
        """Append one sample. Raises DataError for text that no file can hold."""
        text = json.dumps(sample, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(": text holds half of a surrogate pair, which is no character; repair the file") from None
        self.handle.write(f"{text}\n" if self.lines else f"{',' if self.count else '['}\n{text}")
        self.count += 1

    def close(self) -> None:
        """End a list."""
        if not self.lines:
            self.handle.write("\n]\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Writer]:
    """A Writer of a file that is complete or absent."""
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


def convert(
    inputs: list[str],
    output: str,
    media_root: str | None = None,
    skip_bad: bool = False,
    join_turns: bool = False,
    overwrite: bool = False,
) -> str:
    """Convert files into one and give the summary. Raises UserError, and then nothing is written.

    With `skip_bad`, bad samples are said on stderr, counted and left out; otherwise all are named (20 in full).
    """
    path = Path(output)
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{output}: the last name is the file to write, a .json or .jsonl (the latter at any size)")
    if path.is_dir():
        raise UserError(f"{output}: the last name is the file to write, and this is a folder; name another")
    if any(path.exists() and os.path.exists(file) and path.samefile(file) for file in inputs):
        raise UserError(f"{output}: is read and would be written; name another file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{output}: exists, and the last name is the file to write; name another, or give --overwrite")
    sources = [(file, *open_source(file)) for file in inputs]
    media = Media(path, media_root)
    dropped, problems, bad, lines = Counter(), [], 0, []
    try:
        with (
            whole_file(path) as writer,
            tqdm(total=sum(source[1] for source in sources), unit=" samples", leave=False, disable=None) as progress,
        ):
            for file, _, rows in sources:
                formats, skipped = Counter(), 0
                folder = Path(file) if os.path.isdir(file) else Path(file).parent
                for index, entry in enumerate(rows):
                    progress.update()
                    # Qwen's pack_data.py makes lists of samples of one length; here the loader packs.
                    packed = isinstance(entry, list) and bool(entry)
                    for number, part in enumerate(entry if packed else [entry]):
                        where = f"{file}, sample {index}" + (f", part {number}" if packed else "")
                        try:
                            formats[convert_one(part, dropped, join_turns, media, folder, writer)] += 1
                        except DataError as error:
                            skipped += 1
                            # an error of its line names the file and the line itself
                            said = str(error) if isinstance(part, DataError) else f"{where}{error}"
                            if skip_bad:
                                tqdm.write(f"skipped: {said}", file=sys.stderr)
                            elif len(problems) < MOST_TOLD:
                                problems.append(said)
                bad += skipped
                lines.append(file_in_words(file, formats, skipped))
            if bad and not skip_bad:
                more = [f"... and {bad - len(problems):,} more"] if bad > len(problems) else []
                last = f"{bad:,} of {bad + writer.count:,} samples cannot be converted, so nothing is written; "
                raise DataError("\n".join([*problems, *more, last + "--skip_bad leaves them out"]))
            if not writer.count:
                raise DataError(f"{', '.join(inputs)}: no samples{' left' if bad else ''}, so nothing is written")
    except BaseException:
        media.take_back()
        raise
    return "\n".join([*lines, *summary(path, writer.count, media, dropped)])


def convert_one(entry: object, dropped: Counter, join_turns: bool, media: Media, folder: Path, writer: Writer) -> str:
    """Write one sample and give the name of the format it came in."""
    if isinstance(entry, DataError):
        raise entry
    name, sample = import_entry(entry, dropped, join_turns)
    entries.check_messages(sample, FORBIDDEN, folder=None)  # what is written, training takes
    media.place(sample, folder)
    writer.write(sample)
    media.count(sample)
    return name


def file_in_words(file: str, formats: Counter, skipped: int) -> str:
    """What a file held: `a.json: 1,204 samples, ShareGPT / LLaVA`."""
    named = [name if len(formats) == 1 else f"{count:,} {name}" for name, count in formats.most_common()]
    left_out = [f"{skipped:,} skipped"] if skipped else []
    return f"{file}: {', '.join([counted(sum(formats.values()), 'sample'), *named, *left_out])}"


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
    parts = [counted(count, "sample"), *(counted(media.counts[kind], kind) for kind in KINDS if media.counts[kind])]
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
