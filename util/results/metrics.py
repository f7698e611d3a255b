"""Scores of an answer against its reference, both as text: each from 0 to 1, or None where it does not apply."""

import math
import re
from collections import Counter
from collections.abc import Iterable

from util.data.boxes import Box, boxes_in
from util.data.tools import MalformedCall, calls_of, same_json


def exact_match(answer: str, reference: str) -> float:
    """1 where both are equal but for white space at the ends, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words (as SQuAD, arXiv 1606.05250); a CJK character is a word."""
    got = words(answer)
    wanted = words(reference)
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


def words(text: str) -> list[str]:
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+", text.lower()
    )


CHARACTERS = 6  # longest n-gram of chrF
RECALL_WEIGHT = 2  # how much more it gives to recall than to precision


def chrf(answer: str, reference: str) -> float:
    """chrF (M. Popović, WMT 2015), for long answers in any language: a weighted harmonic mean of precision and recall
    over runs of 1 to 6 characters, white space left out, as sacrebleu computes it for one sentence."""
    got = "".join(answer.split())
    wanted = "".join(reference.split())
    if got == wanted:
        return 1.0
    precisions = []
    recalls = []
    for length in range(1, min(CHARACTERS, len(got), len(wanted)) + 1):
        ours = runs_of(got, length)
        theirs = runs_of(wanted, length)
        common = (ours & theirs).total()
        precisions.append(common / ours.total())
        recalls.append(common / theirs.total())
    precision = mean(precisions) or 0.0
    recall = mean(recalls) or 0.0
    weighted = RECALL_WEIGHT**2 * precision + recall
    return (1 + RECALL_WEIGHT**2) * precision * recall / weighted if weighted else 0.0


def runs_of(text: str, length: int) -> Counter:
    """How often each run of so many characters comes in a text."""
    return Counter(text[begin : begin + length] for begin in range(len(text) - length + 1))


# ---- charts ---------------------------------------------------------------------------------------------------------


def relaxed_accuracy(answer: str, reference: str) -> float:
    """ChartQA's measure (arXiv 2203.10244, section 5.1): a number within 5 % of the reference's, other text exactly.

    As the evaluation in common use has it (google-research/pix2struct, metrics.py): "12%" is the number 0.12, a
    thousands separator makes "1,234" text, a reference of zero is compared as text, and case does not matter.
    """
    number = number_of(answer.strip())
    target = number_of(reference.strip())
    if number is None or not target:
        return float(answer.strip().lower() == reference.strip().lower())
    return float(abs(number - target) / abs(target) <= 0.05)


def number_of(text: str) -> float | None:
    """A decimal number, a percentage as a share of 1; None for anything else."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?%?", text.lower(), re.ASCII):
        return None
    number = float(text.rstrip("%"))
    if text.endswith("%"):
        number /= 100
    return number if math.isfinite(number) else None


# ---- documents ------------------------------------------------------------------------------------------------------


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity (Biten et al., arXiv 1905.13648, section 5): 1 - distance / longer length, and
    0 where the distance is half that length or more. Case and runs of white space do not matter."""
    one = " ".join(answer.lower().split())
    other = " ".join(reference.lower().split())
    if one == other:
        return 1.0
    distance = edit_distance(one, other) / max(len(one), len(other))
    return 1 - distance if distance < 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements of single characters that make one text the other (Levenshtein, 1966)."""
    row = list(range(len(other) + 1))  # the distances from the first characters of `one` to all beginnings of `other`
    for number, character in enumerate(one, 1):
        diagonal = row[0]  # of the row before, one column to the left
        row[0] = number
        for column, wanted in enumerate(other, 1):
            replaced = diagonal + (character != wanted)
            diagonal = row[column]
            row[column] = min(row[column] + 1, row[column - 1] + 1, replaced)
    return row[-1]


# ---- boxes ----------------------------------------------------------------------------------------------------------


def box_iou(answer: str, reference: str) -> float | None:
    """Mean intersection over union of the boxes of both, matched one to one, best pairs first.

    A box without a partner counts 0. None where the reference has no box.
    """
    got = boxes_of(answer)
    wanted = boxes_of(reference)
    if not wanted:
        return None
    pairs = []  # (minus overlap, number in `got`, number in `wanted`), so that the best comes first when sorted
    for number, box in enumerate(got):
        for place, other in enumerate(wanted):
            pairs.append((-iou(box, other), number, place))
    total = 0.0
    used = set()
    matched = set()
    for minus_overlap, number, place in sorted(pairs):
        if number not in used and place not in matched:
            total -= minus_overlap
            used.add(number)
            matched.add(place)
    return total / max(len(got), len(wanted))


def boxes_of(text: str) -> list[Box]:
    """The boxes that a text holds, in the numbers that stand there: overlaps of two are the same in every unit."""
    return [box.bbox for box in boxes_in(text)]


def say_the_same(one: str, other: str) -> bool:
    """Whether texts that two models were given for one of a data file are of the same one: boxes in it each model reads
    in the form of its family, and some count them by its budget."""
    return one == other or bool(boxes_of(one) and boxes_of(other))


def iou(one: Box, other: Box) -> float:
    """Area of the intersection / area of the union; 0 for a box without an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0 or not area(one) or not area(other):
        return 0.0
    common = width * height
    return common / (area(one) + area(other) - common)


def area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)


# ---- tool calls -----------------------------------------------------------------------------------------------------


def tool_call(answer: str, reference: str) -> float | None:
    """1 where the answer makes the calls of the reference, in order and no other, else 0; text beside calls is free.

    Names and arguments are compared as JSON: white space and the order of keys do not matter, 1 and 1.0 are alike.
    None where the reference makes no call.
    """
    try:
        _, wanted = calls_of(reference)
    except MalformedCall:
        return None
    if not wanted:
        return None
    try:
        _, got = calls_of(answer)
        return float(same_json(got, wanted))
    except (MalformedCall, RecursionError):  # JSON as deep as no call of the reference is
        return 0.0


# ---- by name --------------------------------------------------------------------------------------------------------

METRICS = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "chrf": chrf,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "box_iou": box_iou,
    "tool_call": tool_call,
}
LABELS = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "chrf": "chrF",
    "relaxed_accuracy": "relaxed accuracy",
    "anls": "ANLS",
    "box_iou": "box IoU",
    "tool_call": "tool call",
}


def share(value: float | None) -> str:
    """A score as people read it: `62.4%`."""
    return "-" if value is None else f"{value:.1%}"


def mean(values: list[float | None]) -> float | None:
    """The mean of the values that are not None; None where all are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


# ---- how sure a mean is ---------------------------------------------------------------------------------------------

RESAMPLES = 2000
Z = 1.959964  # standard deviations of a normal distribution on either side of its mean that hold 95 % of it


def confidence_interval(scores: list[float | None]) -> tuple[float, float] | None:
    """The 95 % confidence interval (low, high) of the mean of scores, each of another question; None does not count.

    For scores of 0 and 1 alone: Wilson's (E. B. Wilson, Journal of the American Statistical Association 22, 1927),
    which also holds for few questions and for shares near 0 and 1. Otherwise the percentile bootstrap over questions
    (B. Efron, The Annals of Statistics 7, 1979), always with the same 2,000 resamples. None where there are no scores.
    """
    found = [score for score in scores if score is not None]
    if not found:
        return None
    if {*found} <= {0.0, 1.0}:
        number = len(found)
        right = sum(found) / number
        middle = right + Z * Z / (2 * number)
        half = Z * math.sqrt(right * (1 - right) / number + Z * Z / (4 * number * number))
        scale = 1 + Z * Z / number
        return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)
    import numpy as np

    dice = np.random.default_rng(0)
    values = np.array(found)
    means = [values[dice.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def interval_of_changes(changes: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean change between answers to the same questions.

    Where answers are right or wrong: by A. Agresti and Y. Min, Statistics in Medicine 24, 2005, which adds half a
    question to each of the four cases (right or wrong before, and after), so that it also holds where nothing changed.
    Otherwise the bootstrap.
    """
    if not {*changes} <= {-1.0, 0.0, 1.0}:
        return confidence_interval(changes)
    number = len(changes) + 2
    better = changes.count(1.0) + 0.5
    worse = changes.count(-1.0) + 0.5
    middle = (better - worse) / number
    half = Z * math.sqrt(better + worse - (better - worse) ** 2 / number) / number
    return max(middle - half, -1.0), min(middle + half, 1.0)


def share_with_interval(scores: list[float | None]) -> str:
    """A mean as people read it, with its 95 % confidence interval: `62.4% (60.1 to 64.7)`."""
    value = mean(scores)
    if value is None:
        return "-"
    low, high = confidence_interval(scores)
    return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


# ---- several answers ------------------------------------------------------------------------------------------------


def several_kinds(kinds: Iterable[str | None]) -> list[str]:
    """The different kinds of question, sorted; none where there is only one, as it is all questions."""
    found = sorted({kind for kind in kinds if kind})
    return found if len(found) > 1 else []


def summarise(answers: list, metrics: list[str]) -> dict[str, float | None]:
    """Number of questions, mean of each metric over the answers it applies to, and mean of the questions' losses."""
    summary: dict[str, float | None] = {"questions": len(answers)}
    for metric in metrics:
        summary[metric] = mean([answer.score(metric) for answer in answers])
    summary["loss"] = mean([answer.loss for answer in answers])
    return summary


def changes_between(before: list[float | None], after: list[float | None]) -> list[float]:
    """after - before for each question that has both scores."""
    return [new - old for old, new in zip(before, after, strict=True) if old is not None and new is not None]


def better_worse_same(before: list, after: list, metric: str) -> tuple[int, int, int]:
    """How many answers became better, became worse, and stayed as they were; a score of None counts as 0."""
    better = 0
    worse = 0
    for old, new in zip(before, after, strict=True):
        old_score = old.score(metric) or 0.0
        new_score = new.score(metric) or 0.0
        better += new_score > old_score
        worse += new_score < old_score
    return better, worse, len(before) - better - worse


def right_of_kind(scores: list[float | None]) -> str:
    """The scores of one kind of question: `3 / 4` where answers are right or wrong, else their mean."""
    found = [score for score in scores if score is not None]
    if {*found} <= {0.0, 1.0}:
        return f"{sum(found):g} / {len(found)}"
    return share(mean(found))
