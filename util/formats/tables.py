"""Tables of text, .csv and .tsv, row by row: a header that names the columns, then a sample in each row.

Read as spreadsheets write them: with a byte order mark or without, separated by commas, semicolons (Excel, where the
comma is the decimal sign) or tabs, with line breaks within quotes.
"""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

from util.data import keys
from util.data.lines import DataError
from util.formats.rows import PICTURE_ROWS, Columns, Found, detect_row, find_columns

SUFFIXES = (".csv", ".tsv", ".txt")
DELIMITERS = ",;\t|"
LONGEST_FIELD = 2**30  # characters; csv's own limit of 131,072 is less than an image in base64


class Placed(NamedTuple):
    """An entry of a file, and the words that name it in an error."""

    where: str
    entry: object


def open_table(file: str, columns: Columns, notes: list[str]) -> tuple[int, Iterator[object]]:
    """How many rows a table has below its header, and an iterator over them, each Placed or a DataError.

    Which columns are read is added to `notes`.
    """
    with reading(file) as lines:
        header = read_header(lines, file)
        if found := find_in(header, file, columns):
            used = [f"image from {found.image!r}", f"text from {found.text!r}"]
            used += [f"question from {found.question!r}"] if found.question else []
            notes.append(f"{file}: {', '.join(used)}")
        count = sum(1 for _ in fields_of(lines, file))
    return count, rows_of(file)


def find_in(header: list[str], file: str, columns: Columns) -> Found | None:
    """The columns of pictures and texts; None where the rows are of another kind. DataError for what is no header."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{file}: {len(header)} columns, of which several are named {twice[0]!r}; rename them")
    if detect_row(dict.fromkeys(header, ""), columns) not in (None, PICTURE_ROWS):
        return None
    if any(keys.media_file_in(name) for name in header):
        names = ",".join(["image", "text", "column_3", "column_4"][: len(header)])
        raise DataError(
            f"{file}: its first line must name the columns, and is {', '.join(header)!r:.200}; write a line before it, "
            f"such as {names}"
        )
    try:
        return find_columns(tuple(header), columns)
    except DataError as error:
        raise DataError(f"{file}{error}") from None


def rows_of(file: str) -> Iterator[object]:
    """Each row as Placed with a dictionary; a DataError in place of a row that has more fields than the header."""
    with reading(file) as lines:
        header = read_header(lines, file)
        for row in fields_of(lines, file):
            where = f"{file}, line {lines.line_num}"
            if isinstance(row, DataError):
                yield row
            elif len(row) > len(header) and any(row[len(header) :]):
                yield DataError(
                    f"{where}: {len(row)} fields, and the header has {len(header)}; put the field that holds the "
                    "delimiter into double quotes"
                )
            else:
                yield Placed(where, dict(zip_longest(header, row[: len(header)], fillvalue="")))


def fields_of(lines, file: str) -> Iterator[list[str] | DataError]:
    """The fields of each row that is not blank; a DataError in place of one that is not quoted right."""
    while True:
        try:
            row = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            row = DataError(f"{file}, line {lines.line_num}: not a row of a table ({error}); see to its double quotes")
        if isinstance(row, DataError) or any(row):
            yield row


@contextmanager
def reading(file: str) -> Iterator:
    """A reader of a table's rows, its delimiter found from the first line. DataError for a file that is no text."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with open(file, encoding=encoding_of(file), newline="") as handle:
            first = handle.readline()
            delimiter = delimiter_of(first, file)
            if not first.lower().startswith("sep="):  # Excel's own way to name it, on a line before the header
                handle.seek(0)
            yield csv.reader(handle, delimiter=delimiter, skipinitialspace=True, strict=True)
    except FileNotFoundError:
        raise DataError(f"{file}: no such data file (looked in {os.getcwd()})") from None
    except UnicodeError as error:
        place = f" (byte {error.start} of a part)" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(f"{file}: not UTF-8 text{place}; save it as 'CSV UTF-8'") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def encoding_of(file: str) -> str:
    """UTF-8, its byte order mark left out, or the UTF-16 that Excel's "Unicode text" is, known by its mark."""
    with open(file, "rb") as handle:
        mark = handle.read(2)
    return "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def delimiter_of(line: str, file: str) -> str:
    """The delimiter that cuts a header into most fields; where several do, what the file's suffix says comes first.

    csv.Sniffer would guess from the texts, too, which hold commas and semicolons of their own.
    """
    if line.lower().startswith("sep=") and len(line.rstrip("\r\n")) == len("sep=") + 1:
        return line[len("sep=")]
    likely = "\t" + DELIMITERS if file.endswith(".tsv") else DELIMITERS
    return max(likely, key=lambda delimiter: fields_in(line, delimiter))


def fields_in(line: str, delimiter: str) -> int:
    """How many fields a delimiter cuts a line into, as far as the line can be read."""
    try:
        return len(next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []))
    except csv.Error:
        return 0


def read_header(lines, file: str) -> list[str]:
    """The names of the columns; a last one without a name, which a delimiter at the line's end makes, left out."""
    for row in fields_of(lines, file):
        if isinstance(row, DataError):
            raise row
        header = [name.strip() for name in row]
        while header and not header[-1]:
            header.pop()
        return header
    raise DataError(f"{file}: is empty; a table has a line with the names of its columns, and a sample in each row")
