"""What a file that training refuses holds, where it is in another format, and the command that converts it."""

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from util.data.entries import check_messages
from util.data.lines import DataError
from util.formats.importers import OWN, detect, import_entry, unread


def advice(entry: object, file: str, forbidden: Collection[str]) -> str:
    """What a refused entry of a file is where it is in another format, and what to do; else nothing."""
    name = detect(entry)
    if name is None:
        held = unread(entry)
        return f"holds {held}" if held else ""
    command = f"python -m util convert {shlex.quote(file)} out.jsonl"
    if name == OWN and isinstance(entry, list):
        return f"holds a list of samples in place of a sample: {command}"
    try:
        for part in entry if isinstance(entry, list) else [entry]:
            _, sample = import_entry(part, Counter())
            check_messages(sample, forbidden, folder=None)
    except DataError as error:
        if isinstance(entry, dict) and "messages" in entry:
            return ""  # what is wrong with its messages is said already
        return f"is in the format {name}, which {command} converts, but for this{error}"
    return f"is in the format {name}: {command}" if name != OWN else ""


def refuse_other_format(file: str, rows: Sequence, forbidden: Collection[str]) -> None:
    """DataError, one line for the whole file, where it is in another format: judged by three of its entries."""
    found = []
    if len(rows) < 2:  # one line anyway
        return
    for index in {0, len(rows) // 2, len(rows) - 1}:
        try:
            entry = rows[index]
        except DataError:  # no JSON: told in its turn
            return
        try:
            check_messages(entry, forbidden, Path(file).parent)
            return
        except DataError:
            found.append(advice(entry, file, forbidden))
    if all(found):
        raise DataError(f"{file}: {found[0]}")
