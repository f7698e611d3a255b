"""Results of a session that may be cut at any moment: a line of JSON for each, written as soon as it is measured.

python benchmarks/rows.py OUT/rows.jsonl                    the rows of a session as a table
python benchmarks/rows.py OUT/rows.jsonl --tests tests.xml  first adds a row with what pytest found
"""

# ruff: noqa: E402

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import origin

COLUMNS = {  # of the table: key, heading, format
    "seconds": ("s/step", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "samples_per_second": ("samples/s", ".2f"),
    "tflops": ("TFLOP/s", ".1f"),
    "mfu": ("MFU", ".1%"),
    "peak_allocated_gib": ("allocated", ".2f"),
    "peak_reserved_gib": ("reserved", ".2f"),
    "forecast_gib": ("forecast", ".2f"),
}


def write_row(file: Path | None, row: dict) -> None:
    """Print a row and append it to a file, on the disk before this returns."""
    print(in_words(row), flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")


def in_words(row: dict) -> str:
    """`2b compiled text x 4 x 16384: 1.234 s/step, ...`; of a row that failed, why."""
    told = [f"{row[key]:{form}} {heading}" for key, (heading, form) in COLUMNS.items() if row.get(key) is not None]
    if row.get("error"):
        told.append(row["error"].strip().splitlines()[-1][:300])
    told += [f"{key} {value}" for key, value in row.get("found", {}).items()]
    return f"{row['row']}: {', '.join(told)}"


def read_rows(file: Path) -> list[dict]:
    """All rows; the last line may be cut."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{file}: a line that was cut: {line[:80]}")
    return rows


def row_of_tests(file: Path) -> dict:
    """What pytest wrote with --junitxml: how many tests passed and were skipped, and which failed, with the last words
    of each."""
    found: dict = {"passed": 0, "skipped": 0, "failed": {}}
    if not file.exists():
        return {"row": "tests", "error": "pytest wrote no result", "found": found}
    for case in ElementTree.parse(file).iter("testcase"):
        wrong = case.find("failure")
        wrong = case.find("error") if wrong is None else wrong
        if wrong is not None:
            found["failed"][f"{case.get('classname')}::{case.get('name')}"] = (wrong.get("message") or "")[-400:]
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return {"row": "tests", "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the rows")
    parser.add_argument("--tests", type=Path, help="a result of pytest --junitxml, to be added as a row")
    arguments = parser.parse_args()
    if arguments.tests:
        write_row(arguments.file, {**row_of_tests(arguments.tests), **origin("gpu_session.sh", ["tests"])})
        return
    for row in read_rows(arguments.file):
        print(in_words(row))


if __name__ == "__main__":
    main()
