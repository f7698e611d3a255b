"""For a file that training refuses: which other format it is in, and the command that converts it."""

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from util.data.entries import check_messages
from util.data.lines import DataError
from util.formats.importers import OWN, detect, import_entry, unread


def advice(entry: object, file: str, forbidden: Collection[str]) -> str:
    """Which other format a refused entry of a file is in, and what to do; "" where nothing is known of it."""
    name = detect(entry)
    if name is None:
        content = unread(entry)
        return f"holds {content}" if content else ""
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
    """DataError, one line for the whole file, if the first, middle and last entry are in another format."""
    if len(rows) < 2:  # the message about its one entry will do
        return
    found = []
    for index in {0, len(rows) // 2, len(rows) - 1}:
        try:
            entry = rows[index]
        except DataError:  # no JSON; it is refused when its turn comes
            return
        try:
            check_messages(entry, forbidden, Path(file).parent)
            return
        except DataError:
            found.append(advice(entry, file, forbidden))
    if all(found):
        raise DataError(f"{file}: {found[0]}")
