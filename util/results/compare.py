"""Answers of several models to the same questions in one table: `python -m util compare base=FILE tuned=FILE ...`.

The files are those that the test scripts write (before.jsonl, after.jsonl). The table gives each one's score over all
questions and by kind, with 95 % confidence intervals, and what each changed against the first, question by question.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from util.command_line import UserError, command_parser
from util.results.metrics import LABELS, METRICS, confidence_interval, interval_of_changes, mean, share_with_interval


@dataclass
class Column:
    """One file of answers."""

    name: str
    questions: list[dict]  # what was asked: question, reference, media, kind
    scores: list[float | None]


def read_column(named: str, metric: str) -> Column:
    """`NAME=FILE`, or a file that is named by itself. Raises UserError for one that holds no answers."""
    name, equals, file = named.partition("=")
    name, file = (name, file) if equals else (Path(named).stem, named)
    try:
        with open(file, encoding="utf-8") as opened:
            _, *lines = map(json.loads, opened)
        scores = [METRICS[metric](line["answer"], line["reference"]) for line in lines]
        asked = [{key: line[key] for key in ("question", "reference", "media", "kind")} for line in lines]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a file that a test script wrote") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: holds no answers; name a before.jsonl or after.jsonl of a test script") from None
    if not lines:
        raise UserError(f"{file}: holds no answers; run the test script again")
    return Column(name, asked, scores)


def difference(scores: list[float | None], others: list[float | None]) -> str:
    """How much higher the mean of `scores` is, in points, over the questions that both have a score of."""
    pairs = [(one, other) for one, other in zip(scores, others, strict=True) if None not in (one, other)]
    changes = [one - other for one, other in pairs]
    if not changes:
        return "-"
    low, high = interval_of_changes(changes)
    return f"{100 * mean(changes):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def compare(files: list[str], metric: str, out: str | None) -> str:
    """The table. Raises UserError for files that do not answer the same questions."""
    columns = [read_column(file, metric) for file in files]
    first, *rest = columns
    for column, file in zip(rest, files[1:], strict=True):
        if column.questions != first.questions:
            raise UserError(
                f"{file}: answers other questions than {files[0]} ({len(column.questions):,} and "
                f"{len(first.questions):,}); compare answers to the same data"
            )
    if len({column.name for column in columns}) < len(columns):
        raise UserError(f"{' '.join(files)}: two have the same name; give each one as NAME=FILE")
    kinds = sorted({question["kind"] for question in first.questions if question["kind"]})
    groups = {"all questions": [True] * len(first.questions)}
    if len(kinds) > 1:
        groups |= {kind: [question["kind"] == kind for question in first.questions] for kind in kinds}
    header, rows, result = [LABELS[metric], *(column.name for column in columns), "questions"], [], {}
    for group, members in groups.items():
        chosen = [[s for s, here in zip(c.scores, members, strict=True) if here] for c in columns]
        rows.append([group, *map(share_with_interval, chosen), f"{sum(members):,}"])
        if rest:
            changes = [difference(scores, chosen[0]) for scores in chosen[1:]]
            rows.append([f"  against {first.name}", "", *changes, ""])
        result[group] = {"questions": sum(members)} | {
            column.name: {"score": mean(scores), "interval": confidence_interval(scores)}
            for column, scores in zip(columns, chosen, strict=True)
        }
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({"metric": metric, "files": files, **result}, indent=1) + "\n")
    return "\n".join([table([header, *rows]), "In brackets: 95 % confidence intervals of the mean over questions."])


def table(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(width) for c, width in zip(others, widths[1:], strict=True))]
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
