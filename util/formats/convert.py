"""Data files of other formats as one of this project's: `python -m util convert a.json b.parquet my_data/data.jsonl`.

What is read:
  .json, .jsonl        ShareGPT, LLaVA, LLaMA-Factory, Qwen-VL, OpenAI chat, TRL, Alpaca, ms-swift, rows of datasets
  .csv, .tsv           a header, then a picture and its text in each row
  .parquet             the same rows and formats (pip install pyarrow)
  a folder             pictures with a .txt or .json beside each, with a metadata.jsonl or .csv, or in a folder for each
                       class; or what save_to_disk of datasets wrote (pip install datasets)

The formats are recognised sample by sample and named in the summary. A .jsonl, .csv or .parquet file is read and
written sample by sample, so that it may be of any size.

  python -m util convert captions.csv my_data/train.json --hold_out 0.1
  python -m util convert photos/ my_data/train.json --question "Which bird is this?"
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from util.command_line import MOST_TOLD, UserError, command_parser
from util.conversation import GROUNDING_PREFIXES, MARK
from util.data import entries, fetch
from util.data.lines import DataError, first_of, json_of
from util.formats import rows
from util.formats.hold_out import HoldOut, held_out_path
from util.formats.importers import KINDS, import_entry
from util.formats.media_paths import Media
from util.formats.rows import PICTURE_ROWS, Columns
from util.formats.sources import open_source
from util.formats.tables import Placed
from util.run_folder import written_whole
from util.tiny_model import SPECIAL_TOKENS

# Tokens of the published tokenizer that no text may contain; training asks the tokenizer of its own model.
FORBIDDEN = (MARK, *(token for token in SPECIAL_TOKENS if not token.startswith(GROUNDING_PREFIXES)))


# ---- converting -----------------------------------------------------------------------------------------------------


class Writer:
    """Samples written one by one as a JSON list or as lines."""

    def __init__(self, handle: TextIO, lines: bool) -> None:
        self.handle = handle
        self.lines = lines
        self.count = 0  # samples written

    def write(self, sample: dict) -> None:
        """Append one sample. Raises DataError for text that no file can hold."""
        text = json_of(sample)
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


@dataclass
class Converting:
    """What is to be converted and how: the arguments of the command."""

    inputs: list[str]
    output: str
    media_root: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    question_column: str | None = None
    question: str | None = None
    hold_out: float | None = None
    seed: int = 0
    skip_bad: bool = False
    join_turns: bool = False
    overwrite: bool = False

    @property
    def path(self) -> Path:
        return Path(self.output)

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.text_column, self.question_column, self.question)


def convert(inputs: list[str], output: str, **options) -> str:
    """Convert files into one and give the summary. Raises UserError, and then nothing is written.

    `options`: the other fields of Converting. With `skip_bad`, bad samples are named on the error stream, counted and
    left out; else all are named in the error.
    """
    asked = Converting(inputs, output, **options)
    paths = [asked.path]
    if asked.hold_out is not None:
        if not 0 < asked.hold_out < 1:
            raise UserError(f"--hold_out {asked.hold_out}: the share to hold out is above 0 and below 1, such as 0.1")
        paths.append(held_out_path(asked.path))
    for path in paths:
        check_output(path, inputs, asked.overwrite)
    notes: list[str] = []
    sources = [(file, *open_source(file, asked.columns, notes)) for file in inputs]
    media = Media(asked.path, asked.media_root)
    try:
        with ExitStack() as files:
            writers = [files.enter_context(whole_file(path)) for path in paths]
            lines = write_all(asked, sources, media, writers)
    except BaseException:
        media.take_back()
        raise
    return "\n".join([*notes, *lines])


def write_all(asked: Converting, sources: list, media: Media, writers: list["Writer"]) -> list[str]:
    """Convert all entries of the sources into one file or two; the lines of the summary."""
    with ExitStack() as kept:
        divided = kept.enter_context(closing(HoldOut(asked.path.parent))) if len(writers) > 1 else None
        writer = divided or writers[0]
        converter = Converter(writer, media, Refused(asked.skip_bad), asked.columns, asked.join_turns)
        lines = []
        total = sum(count for _, count, _ in sources)
        with tqdm(total=total, unit=" samples", leave=False, disable=None) as progress:
            for file, _, found in sources:
                lines.append(converter.convert_file(file, found, progress))
        converter.check(asked)
        lines += converter.said()
        if divided:
            held = divided.deal(asked.hold_out, asked.seed, *writers)
            lines.append(
                f"held out {held:,} of {counted(divided.count, 'sample')} ({held / divided.count:.1%}), which share no "
                f"picture with the others: {held_out_path(asked.path)}"
            )
        return [*lines, *summary(asked, writers, media)]


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

    writer: "Writer | HoldOut"
    media: Media
    refused: Refused
    columns: Columns
    join_turns: bool
    dropped: Counter = field(default_factory=Counter)  # keys that have no effect on training
    asked: Counter = field(default_factory=Counter)  # questions put to rows that have none
    has_rows: bool = False  # whether any sample was a row of a picture and its text

    def convert_file(self, file: str, rows: Iterator[object], progress: tqdm) -> str:
        """Write the samples of one file; a line that says what it held."""
        formats: Counter = Counter()
        refused_before = self.refused.count
        folder = Path(file) if os.path.isdir(file) else Path(file).parent
        for index, entry in enumerate(rows):
            progress.update()
            place = f"{file}, sample {index}"
            if isinstance(entry, Placed):
                place, entry = entry
            # Qwen's pack_data.py makes lists of samples; here they are taken apart, as training packs samples itself.
            is_list = isinstance(entry, list) and bool(entry)
            for number, part in enumerate(entry if is_list else [entry]):
                where = f"{place}, part {number}" if is_list else place
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
        name, sample = import_entry(entry, self.dropped, self.join_turns, self.columns)
        entries.check_messages(sample, FORBIDDEN, folder=None)  # so that training takes what is written here
        self.media.place(sample, folder)
        self.writer.write(sample)
        self.media.count(sample)
        if name == PICTURE_ROWS:
            self.has_rows = True
            if question := rows.question_asked(entry, self.columns):
                self.asked[question] += 1
        return name

    def check(self, asked: Converting) -> None:
        """DataError where samples are refused, none is there, or a flag had nothing to do with any."""
        self.refused.stop(
            f"{self.refused.count:,} of {self.refused.count + self.writer.count:,} samples cannot be converted, so "
            "nothing is written; --skip_bad leaves them out"
        )
        if not self.writer.count:
            left = " left" if self.refused.count else ""
            raise DataError(f"{', '.join(asked.inputs)}: no samples{left}, so nothing is written")
        flags = ("image_column", "text_column", "question_column", "question")
        given = [f"--{flag}" for flag in flags if getattr(asked, flag)]
        if given and not self.has_rows:
            raise DataError(f"{', '.join(given)}: no sample is a row of a picture and its text; leave this out")
        if asked.question and not self.asked:
            raise DataError("--question: every row has a question of its own; leave this out")

    def said(self) -> list[str]:
        """Lines about what was added to samples and what was left out of them."""
        lines = []
        for question, times in self.asked.most_common():
            lines.append(
                f"asked in {counted(times, 'sample')}: {question!r} (--question asks another; ask the same later)"
            )
        if self.dropped:
            keys = ", ".join(f"{key} ({times:,})" for key, times in self.dropped.most_common())
            lines.append(f"left out, as training does not use it: {keys}")
        return lines


def file_in_words(file: str, formats: Counter, skipped: int) -> str:
    """What a file held: `a.json: 1,204 samples, ShareGPT / LLaVA`."""
    parts = [counted(formats.total(), "sample")]
    parts += [name if len(formats) == 1 else f"{count:,} {name}" for name, count in formats.most_common()]
    if skipped:
        parts.append(f"{skipped:,} skipped")
    return f"{file}: {', '.join(parts)}"


def summary(asked: Converting, writers: list["Writer"], media: Media) -> list[str]:
    """The lines about what was written, and what was not found."""
    lines = []
    if media.missing_count:
        few = ", ".join(map(fetch.printable, media.missing))
        if media.missing_count > len(media.missing):
            few += ", ..."
        files = counted(media.missing_count, "media file")
        lines.append(f"not found: {files} ({few}); --media_root names the folder they lie in")
    parts = [counted(sum(writer.count for writer in writers), "sample")]
    parts += [counted(media.counts[kind], kind) for kind in KINDS if media.counts[kind]]
    if media.written:
        parts.append(f"{counted(len(media.written), 'new file')} in {media.bytes_folder}")
    path = asked.path
    names = " and ".join([str(path), str(held_out_path(path))][: len(writers)])
    lines += [f"wrote {names}: {', '.join(parts)}", f"look at one: python -m util show {path}"]
    if len(writers) > 1:
        lines.append(f"train: python finetune.py --data {path} --eval_data {held_out_path(path)}")
    return lines


def counted(count: int, noun: str) -> str:
    """`1 sample`, `1,204 samples`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def parser() -> argparse.ArgumentParser:
    made = command_parser("convert", __doc__)
    made.add_argument("inputs", nargs="+", metavar="IN", help="files or folders, see below")
    made.add_argument("output", metavar="OUT", help="the .json or .jsonl file to write")
    made.add_argument(
        "--media_root", metavar="FOLDER", help="the folder, or s3://..., that relative media paths are in"
    )
    made.add_argument("--image_column", metavar="NAME", help="of a table: the column of pictures or videos")
    made.add_argument("--text_column", metavar="NAME", help="of a table: the column of the answer")
    made.add_argument("--question_column", metavar="NAME", help="of a table: the column of the question")
    made.add_argument(
        "--question", metavar="TEXT", help="what is asked about a picture that has no question of its own"
    )
    made.add_argument(
        "--hold_out", type=float, metavar="SHARE",
        help="write this share of the samples into a second file, OUT_held_out, that shares no picture with OUT",
    )  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="which samples --hold_out takes (default: 0)")
    made.add_argument("--skip_bad", action="store_true", help="list bad samples and leave them out")
    made.add_argument("--join_turns", action="store_true", help="join turns of the same role in a row by a newline")
    made.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return made


def main(arguments: list[str]) -> None:
    print(convert(**vars(parser().parse_args(arguments))))
