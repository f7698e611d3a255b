"""Answers to test questions, and the files that hold them: before.jsonl and after.jsonl of the test scripts.

The first line of a file says what the answers were made from; then follows one answer a line.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.results.metrics import METRICS
from util.run_folder import written_whole

if TYPE_CHECKING:
    from util.vision import Budget


@dataclass
class Answer:
    """One question of the test data, what the model answered, and its loss."""

    where: str
    kind: str | None
    question: str
    media: list[dict]  # the image and video items of the conversation so far, as in a data file
    reference: str
    answer: str
    loss: float  # mean cross-entropy of the reference's tokens
    earlier: list[list[str]]  # [role, text] of the messages before the question

    def score(self, metric: str) -> float | None:
        """From 0 to 1; None where `metric` does not apply to the reference."""
        return METRICS[metric](self.answer, self.reference)


# ---- what answers are made from -------------------------------------------------------------------------------------


def fingerprint(base: str, data_files: list[str], budget: "Budget", max_new_tokens: int) -> dict:
    """What a file of answers was made from; where the fingerprint differs, it is made anew."""
    content = b"".join(Path(file).read_bytes() for file in data_files)
    data = hashlib.sha256(content).hexdigest()[:16]
    return {
        "model": base,
        "weights": weights_mark(base),
        "data": data,
        "budget": asdict(budget),
        "max_new_tokens": max_new_tokens,
    }


def weights_mark(base: str) -> str | None:
    """Sizes and times of a local checkpoint's weights: they differ where it was trained again under the same name."""
    if not Path(base).is_dir():
        return None
    marks = []
    for file in sorted(Path(base).glob("*.safetensors")):
        status = file.stat()
        marks.append(f"{file.name}:{status.st_size}:{status.st_mtime_ns}")
    return " ".join(marks) or None


# ---- files ----------------------------------------------------------------------------------------------------------


def write_answers(path: Path, made_from: dict, answers: list[Answer]) -> None:
    """Write a file of answers, complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        for line in [{"made_from": made_from}, *map(asdict, answers)]:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_lines(path: str | Path) -> tuple[dict, list[dict]]:
    """What the answers in a file were made from, and each answer as it was written, by any version.

    Raises OSError, ValueError, KeyError or TypeError for a file that is not one of answers.
    """
    with open(path, encoding="utf-8") as file:  # its lines end with \n alone: an answer may hold other line ends
        made_from = json.loads(next(file, ""))["made_from"]
        return made_from, [json.loads(line) for line in file]


def read_file(path: Path) -> tuple[dict, list[Answer]]:
    """What the answers in a file were made from, and the answers. Raises as `read_lines` does, and TypeError for a file
    of another version."""
    made_from, lines = read_lines(path)
    return made_from, [Answer(**line) for line in lines]


def read_answers(path: Path, made_from: dict) -> list[Answer] | None:
    """The answers in a file; None where there is none or it was made from something else."""
    try:
        known, answers = read_file(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answers if known == made_from else None
