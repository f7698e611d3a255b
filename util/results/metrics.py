"""Scores of an answer against its reference, both as text: each from 0 to 1, or None where it says nothing."""

import math
import re
from collections import Counter

from util.data.boxes import CORNERS, Box


def exact_match(answer: str, reference: str) -> float:
    """Equal up to white space at the ends."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words (as SQuAD, arXiv 1606.05250); a CJK character is a word."""
    got, wanted = words(answer), words(reference)
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


def words(text: str) -> list[str]:
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+", text.lower()
    )


# ---- charts ---------------------------------------------------------------------------------------------------------


def relaxed_accuracy(answer: str, reference: str) -> float:
    """ChartQA's measure (arXiv 2203.10244, section 5.1): a number within 5 % of the reference's, other text exactly.

    As the evaluation in common use has it (google-research/pix2struct, metrics.py): "12%" is the number 0.12, a
    thousands separator makes "1,234" text, a reference of zero is compared as text, and case does not matter.
    """
    number, target = number_of(answer.strip()), number_of(reference.strip())
    if number is None or not target:
        return float(answer.strip().lower() == reference.strip().lower())
    return float(abs(number - target) / abs(target) <= 0.05)


def number_of(text: str) -> float | None:
    """A decimal number, a percentage as a share of 1; None for anything else."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?%?", text.lower(), re.ASCII):
        return None
    number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    return number if math.isfinite(number) else None


# ---- documents ------------------------------------------------------------------------------------------------------


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity (Biten et al., arXiv 1905.13648, section 5): 1 - distance / longer length, and
    0 where the distance is half that length or more. Case and runs of white space do not matter."""
    one, other = (" ".join(text.lower().split()) for text in (answer, reference))
    if one == other:
        return 1.0
    distance = edit_distance(one, other) / max(len(one), len(other))
    return 1 - distance if distance < 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements of single characters that make one text the other (Levenshtein, 1966)."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for column, wanted in enumerate(other, 1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (character != wanted)),
            )
    return row[-1]


# ---- boxes ----------------------------------------------------------------------------------------------------------


def box_iou(answer: str, reference: str) -> float | None:
    """Mean intersection over union of the boxes of both, matched one to one, best pairs first; a box without a partner
    counts 0. None where the reference has no box."""
    got, wanted = boxes_of(answer), boxes_of(reference)
    if not wanted:
        return None
    pairs = sorted(((-iou(a, b), i, j) for i, a in enumerate(got) for j, b in enumerate(wanted)))
    total, used, matched = 0.0, set(), set()
    for overlap, i, j in pairs:
        if i not in used and j not in matched:
            total, used, matched = total - overlap, used | {i}, matched | {j}
    return total / max(len(got), len(wanted))


def boxes_of(text: str) -> list[Box]:
    """The boxes that Qwen2-VL writes: (x1,y1),(x2,y2), in thousandths of the image's width and height."""
    return [tuple(float(value) for value in corners) for corners in re.findall(CORNERS, text, re.ASCII)]


def iou(one: Box, other: Box) -> float:
    """Area of the intersection / area of the union; 0 for a box without an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (one, other)]
    common = max(0.0, width) * max(0.0, height) if all(areas) else 0.0
    return common / (sum(areas) - common) if common else 0.0


# ---- by name --------------------------------------------------------------------------------------------------------

METRICS = {"exact_match": exact_match, "token_f1": token_f1, "relaxed_accuracy": relaxed_accuracy, "anls": anls,
           "box_iou": box_iou}  # fmt: skip
LABELS = {"exact_match": "exact match", "token_f1": "token F1", "relaxed_accuracy": "relaxed accuracy", "anls": "ANLS",
          "box_iou": "box IoU"}  # fmt: skip


def share(value: float | None) -> str:
    """A score as people read it."""
    return "-" if value is None else f"{value:.1%}"


def mean(values: list[float | None]) -> float | None:
    """Of the values that there are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


# ---- how sure a mean is ---------------------------------------------------------------------------------------------

RESAMPLES = 2000


def confidence_interval(scores: list[float | None]) -> tuple[float, float] | None:
    """The 95 % confidence interval (low, high) of the mean of scores, each of another question; None does not count.

    Of right and wrong alone: Wilson's (E. B. Wilson, Journal of the American Statistical Association 22, 1927), which
    also holds for few questions and for shares near 0 and 1. Else the percentile bootstrap over questions (B. Efron,
    The Annals of Statistics 7, 1979), always with the same 2,000 resamples. None for no scores.
    """
    found = [score for score in scores if score is not None]
    if not found:
        return None
    if {*found} <= {0.0, 1.0}:
        z, number, right = 1.959964, len(found), sum(found) / len(found)
        middle = right + z * z / (2 * number)
        half = z * math.sqrt(right * (1 - right) / number + z * z / (4 * number * number))
        low, high = ((middle + sign * half) / (1 + z * z / number) for sign in (-1, 1))
        return max(low, 0.0), min(high, 1.0)
    import numpy as np

    dice, values = np.random.default_rng(0), np.array(found)
    means = [values[dice.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def interval_of_changes(changes: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean change. Of right and wrong answers to the same questions: by A. Agresti
    and Y. Min, Statistics in Medicine 24, 2005, which adds half a question to each of the four cases, and so also holds
    where nothing changed. Else the bootstrap."""
    if not {*changes} <= {-1.0, 0.0, 1.0}:
        return confidence_interval(changes)
    number, better, worse = len(changes) + 2, changes.count(1.0) + 0.5, changes.count(-1.0) + 0.5
    middle = (better - worse) / number
    half = 1.959964 * math.sqrt(better + worse - (better - worse) ** 2 / number) / number
    return max(middle - half, -1.0), min(middle + half, 1.0)


def share_with_interval(scores: list[float | None]) -> str:
    """A mean as people read it, with its 95 % confidence interval: `62.4% (60.1 to 64.7)`."""
    value = mean(scores)
    if value is None:
        return "-"
    low, high = confidence_interval(scores)
    return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


# ---- several answers ------------------------------------------------------------------------------------------------


def better_worse_same(before: list, after: list, metric: str) -> tuple[int, int, int]:
    """How many answers became better, worse, and stayed as they were; what a metric says nothing of stayed."""
    pairs = [(old.score(metric) or 0.0, new.score(metric) or 0.0) for old, new in zip(before, after, strict=True)]
    better, worse = sum(new > old for old, new in pairs), sum(new < old for old, new in pairs)
    return better, worse, len(pairs) - better - worse


def right_of_kind(scores: list[float | None]) -> str:
    """The scores of one kind of question: how many of how many are right, else their mean."""
    found = [score for score in scores if score is not None]
    return f"{sum(found):g} / {len(found)}" if {*found} <= {0.0, 1.0} else share(mean(found))
