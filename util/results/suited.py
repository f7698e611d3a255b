"""Which metrics suit reference answers: what `auto` chooses, and what is said of a named one that does not suit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from util.results.metrics import LABELS, METRICS, boxes_of, number_of, several_kinds, words

# Kinds of reference answers, in words, and the metrics for each: the first one is its headline.
METRICS_FOR = {
    "calls of tools": ["tool_call", "exact_match"],
    "boxes": ["box_iou"],
    "single numbers": ["relaxed_accuracy", "exact_match"],
    "short answers": ["exact_match", "token_f1"],
    "long answers": ["token_f1", "chrf"],
}
# What else a metric suits, though it is not chosen for it.
ALSO_SUITS = {"exact_match": {"single numbers"}, "relaxed_accuracy": {"short answers"},
              "anls": {"short answers", "single numbers"}}  # fmt: skip
MOST_WORDS = 5  # of a short answer
MOST_CHARACTERS = 12  # or of one in a language that writes no spaces
LEAST_SHARE = 0.1  # of the answers, for which `auto` takes their metrics


@dataclass
class Choice:
    """Metrics, and why."""

    metrics: list[str]  # the first one is the headline
    of_kind: dict[str, str]  # the metric by which each kind of question is shown, where there are several
    reason: str  # one sentence


def kind_of_answer(reference: str) -> str:
    """Which of METRICS_FOR a reference answer is."""
    text = reference.strip()
    if "<tool_call>" in text:
        return "calls of tools"
    if boxes_of(text):
        return "boxes"
    if number_of(text) is not None:
        return "single numbers"
    is_short = len(words(text)) <= MOST_WORDS or len(text) <= MOST_CHARACTERS
    return "short answers" if is_short else "long answers"


def choose(asked: list[str], questions: Sequence[tuple[str | None, str]]) -> Choice:
    """The metrics for questions, given as (kind of question or None, reference answer).

    `asked`: names of metrics, which are taken as they are, or "auto" alone: then the metrics of each kind of answer
    that is at least a tenth of them, the most frequent first.
    """
    kinds = Counter(kind_of_answer(reference) for _, reference in questions)
    if asked != ["auto"]:
        named = several_kinds(kind for kind, _ in questions)
        return Choice(asked, dict.fromkeys(named, asked[0]), what_does_not_suit(asked, kinds))
    found = metrics_for(kinds)
    of_kind = {}
    for kind in several_kinds(kind for kind, _ in questions):
        of_kind[kind] = metrics_for(Counter(kind_of_answer(text) for other, text in questions if other == kind))[0]
    return Choice(found, of_kind, f"Scored by {in_words(found)}: {shares_in_words(kinds)}.")


def label_of(kind: str, choice: Choice) -> str:
    """A kind of question, and by what it is scored where that is not the headline: `box (box IoU)`."""
    metric = choice.of_kind[kind]
    return kind if metric == choice.metrics[0] else f"{kind} ({LABELS[metric]})"


def metrics_for(kinds: Counter) -> list[str]:
    """The metrics of the kinds of answers, the most frequent first; those of short answers where there are none."""
    total = kinds.total()
    frequent = [kind for kind, count in kinds.most_common() if count >= LEAST_SHARE * total]
    found: dict[str, None] = {}  # in order, each once
    for kind in frequent or ["short answers"]:
        found |= dict.fromkeys(METRICS_FOR[kind])
    return [metric for metric in found if metric in METRICS]


def what_does_not_suit(asked: list[str], kinds: Counter) -> str:
    """Of named metrics those that suit less than half of the answers, and which would suit; "" where all do."""
    unsuited = []
    for metric in asked:
        suits = {kind for kind, metrics in METRICS_FOR.items() if metric in metrics} | ALSO_SUITS.get(metric, set())
        if sum(kinds[kind] for kind in suits) < kinds.total() / 2:
            unsuited.append(metric)
    if not unsuited:
        return ""
    verb = "does" if len(unsuited) == 1 else "do"
    return (
        f"{in_words(unsuited)} {verb} not suit most of these answers ({shares_in_words(kinds)}); what suits: "
        f"{in_words(metrics_for(kinds))} (--metrics auto)."
    )


def shares_in_words(kinds: Counter) -> str:
    """`80% of the reference answers are short answers, 20% boxes`."""
    total = kinds.total() or 1
    parts = [f"{count / total:.0%} {kind}" for kind, count in kinds.most_common()]
    if not parts:
        return "there are no reference answers"
    return ", ".join(parts).replace("% ", "% of the reference answers are ", 1)


def in_words(metrics: list[str]) -> str:
    """`exact match, token F1 and box IoU`."""
    names = [LABELS[metric] for metric in metrics]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
