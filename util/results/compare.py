"""Answers of several models to the same questions in one table: `python -m util compare base=FILE tuned=FILE ...`.

The files are those that the test scripts write (before.jsonl, after.jsonl). The table gives the score of each over all
questions and by kind, with 95 % confidence intervals, and its difference to the first, question by question.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util.command_line import UserError, command_parser
from util.results.answer_files import read_lines
from util.results.metrics import (
    LABELS,
    METRICS,
    changes_between,
    confidence_interval,
    interval_of_changes,
    mean,
    say_the_same,
    several_kinds,
    share_with_interval,
)


@dataclass
class Column:
    """One file of answers."""

    name: str
    questions: list[dict]  # what was asked: question, reference, media, kind
    scores: list[float | None]

    def scores_of(self, members: Sequence[int]) -> list[float | None]:
        """The scores of the questions with these numbers."""
        return [self.scores[number] for number in members]


def read_column(named: str, metric: str) -> Column:
    """The answers of `NAME=FILE`, or of a file that gives its own name. Raises UserError for a file without answers."""
    name, equals, file = named.partition("=")
    if not equals:
        name = Path(named).stem
        file = named
    try:
        _, lines = read_lines(file)
        scores = [METRICS[metric](line["answer"], line["reference"]) for line in lines]
        asked = [question_of(line) for line in lines]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a file that a test script wrote") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: holds no answers; name a before.jsonl or after.jsonl of a test script") from None
    if not lines:
        raise UserError(f"{file}: holds no answers; run the test script again")
    return Column(name, asked, scores)


def question_of(line: dict) -> dict:
    """What was asked, from a line of a file of answers."""
    return {key: line[key] for key in ("question", "reference", "media", "kind")}


def same_questions(some: list[dict], others: list[dict]) -> bool:
    """Whether two models were asked the same, each in its own words for boxes."""
    if len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        if (one["media"], one["kind"]) != (other["media"], other["kind"]):
            return False
        if not all(say_the_same(one[key], other[key]) for key in ("question", "reference")):
            return False
    return True


def difference(scores: list[float | None], others: list[float | None]) -> str:
    """How much higher the mean of `scores` is than that of `others`, in percentage points with the 95 % interval.

    Only questions that have both scores count.
    """
    changes = changes_between(others, scores)
    if not changes:
        return "-"
    low, high = interval_of_changes(changes)
    return f"{100 * mean(changes):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def compare(files: list[str], metric: str, out: str | None) -> str:
    """The table as text; its figures go into the file `out` as JSON. Raises UserError as `read_columns` does."""
    columns = read_columns(files, metric)
    first, *rest = columns
    kind_of = [question["kind"] for question in first.questions]
    groups: dict[str, Sequence[int]] = {"all questions": range(len(kind_of))}  # numbers of questions
    for kind in several_kinds(kind_of):
        groups[kind] = [number for number, other in enumerate(kind_of) if other == kind]
    rows = [[LABELS[metric], *(column.name for column in columns), "questions"]]
    figures = {}
    for group, members in groups.items():
        scores = [column.scores_of(members) for column in columns]
        rows.append([group, *map(share_with_interval, scores), f"{len(members):,}"])
        if rest:
            differences = [difference(own, scores[0]) for own in scores[1:]]
            rows.append([f"  against {first.name}", "", *differences, ""])
        figures[group] = {"questions": len(members)}
        for column, own in zip(columns, scores, strict=True):
            figures[group][column.name] = {"score": mean(own), "interval": confidence_interval(own)}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"metric": metric, "files": files, **figures}, indent=1) + "\n"
        Path(out).write_text(text, encoding="utf-8")
    return "\n".join([table(rows), "In brackets: 95 % confidence intervals of the mean over questions."])


def read_columns(files: list[str], metric: str) -> list[Column]:
    """One column for each file. Raises UserError where they have not the same questions, or two have the same name."""
    columns = [read_column(file, metric) for file in files]
    first = columns[0]
    for column, file in zip(columns, files, strict=True):
        if not same_questions(column.questions, first.questions):
            raise UserError(
                f"{file}: answers other questions than {files[0]} ({len(column.questions):,} and "
                f"{len(first.questions):,}); compare answers to the same data"
            )
    if len({column.name for column in columns}) < len(columns):
        raise UserError(f"{' '.join(files)}: two have the same name; give each one as NAME=FILE")
    return columns


def table(rows: list[list[str]]) -> str:
    """Rows of cells as lines of text: the first column begins at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = command_parser("compare", __doc__)
    made.add_argument("files", nargs="+", metavar="NAME=FILE", help="answers, as the test scripts write them")
    made.add_argument("--metric", choices=tuple(METRICS), default="relaxed_accuracy", metavar="METRIC",
                      help=f"{', '.join(METRICS)}; default: %(default)s")  # fmt: skip
    made.add_argument("--out", metavar="FILE", help="write the table's figures as JSON, too")
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    print(compare(given.files, given.metric, given.out))
