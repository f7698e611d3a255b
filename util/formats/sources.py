"""What is to be converted, whatever it lies in -> its entries one by one.

Data files (.json, .jsonl), tables (.csv, .tsv, .parquet), folders that `datasets` saved, and folders of pictures.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from util.command_line import UserError
from util.data.lines import DataError, JsonLines, holds_lines, open_entries
from util.formats import photos, tables
from util.formats.rows import Columns

ROWS = 64  # of a table, read at a time; each may hold images


def open_source(file: str, columns: Columns, notes: list[str]) -> tuple[int, Iterator[object]]:
    """How many entries a file or folder has, and an iterator over them; one that cannot be read is its DataError.

    `columns`: what the user says of tables. What the user is to know besides is added to `notes`.
    """
    if os.path.isdir(file):
        return open_folder(file, columns, notes)
    if file.endswith(".parquet"):
        return open_parquet(file)
    if file.endswith(tables.SUFFIXES):
        return tables.open_table(file, columns, notes)
    if not file.endswith((".json", ".jsonl")):
        known = ".json, .jsonl, .csv, .tsv, .parquet, or a folder of pictures or of datasets' save_to_disk"
        raise DataError(f"{file}: must be {known}; export it so")
    is_misnamed = file.endswith(".json") and holds_lines(file)
    held = JsonLines(file) if is_misnamed else open_entries(file)
    return len(held), each_or_error(held)


def open_folder(folder: str, columns: Columns, notes: list[str]) -> tuple[int, Iterator[object]]:
    """The rows of a folder that `datasets` wrote, or of one of pictures."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")) or os.path.isfile(os.path.join(folder, "state.json")):
        return open_saved_dataset(folder)
    table = photos.metadata_of(folder)
    if table is not None:
        return open_source(table, columns, notes)
    return photos.open_photos(folder, notes)


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
    try:
        import datasets
    except ImportError:
        raise UserError(f"{folder}: reading this folder needs the package datasets: pip install datasets") from None
    rows = datasets.load_from_disk(folder).with_format("arrow")
    return len(rows), rows_of(rows.iter(ROWS))


def rows_of(batches: Iterable) -> Iterator[dict]:
    """The rows of batches of an Arrow table; in columns that `datasets` marks as classes their names, not numbers."""
    for batch in batches:
        classes = class_names(batch.schema)
        for row in batch.to_pylist():
            for column, names in classes.items():
                number = row.get(column)
                if isinstance(number, int) and 0 <= number < len(names):
                    row[column] = names[number]
            yield row


def class_names(schema) -> dict[str, list[str]]:
    """The names of the classes in each column that `datasets` wrote as a ClassLabel, from the table's own metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {column: found["names"] for column, found in features.items() if is_class(found)}


def is_class(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
