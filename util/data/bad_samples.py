"""Samples that cannot be trained on: they are left out, counted, and named on the error stream."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from util.command_line import MOST_TOLD
from util.data.lines import DataError

REASONS = ("bad conversation", "not valid JSON", "no such file", "not fetched", "not readable", "too long")


@dataclass
class Skipped:
    """What a data worker returns in place of a sample that it could not read."""

    message: str  # names file, sample, rule and fix
    reason: str  # one of REASONS


class Lenient:
    """Samples by index, as a DataLoader asks for them; one that cannot be read raises or, with "skip", gives a Skipped.

    The error stream names each skipped sample (the first 20 of each process), so that none leaves its batch unseen.
    """

    def __init__(self, samples, on_bad_sample: str) -> None:
        self.samples = samples
        self.on_bad_sample = on_bad_sample
        self.said = 0  # skipped samples of this process

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        """A dataset.Sample or a Skipped; raises DataError."""
        try:
            return self.samples[index]
        except DataError as error:
            if self.on_bad_sample == "stop":
                raise
            self.said += 1
            if self.said <= MOST_TOLD:
                more = " (of further ones this process only keeps count)" if self.said == MOST_TOLD else ""
                print(f"\nskipped: {error}{more}", file=sys.stderr, flush=True)
            return Skipped(str(error), error.reason)


class LenientCollator:
    """Makes a batch of the samples that could be read, and counts the others in it."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: list):
        """A Batch of the samples that could be read; its counts hold the number of Skipped, in all and by reason."""
        read = [sample for sample in samples if not isinstance(sample, Skipped)]
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        batch = self.collate(read)
        batch.counts |= count_skipped(skipped)
        return batch


def count_skipped(skipped: list[Skipped]) -> dict[str, int]:
    """How many were skipped, in all and by reason, for the log. The keys are always the same, so that ranks can sum."""
    reasons = Counter(sample.reason for sample in skipped)
    by_reason = {metric_of(reason): reasons[reason] for reason in REASONS if reason != "too long"}
    return {"skipped": len(skipped), **by_reason, "unread": 0}  # "unread": see guard.unread_batch


def metric_of(reason: str) -> str:
    """The key of a reason in metrics.jsonl: `skipped_no_such_file`."""
    return f"skipped_{reason.lower().replace(' ', '_')}"


def reasons_in_words(reasons: Counter) -> str:
    """`2 no such file, 1 too long`, the most frequent first."""
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common() if number)


class Tally:
    """Adds up what was skipped in the steps of a run: `Run` shows it in each step's line and at the end."""

    def __init__(self) -> None:
        self.reasons: Counter = Counter()

    def take(self, values: dict) -> dict:
        """Add up the counts of a step; the values for its line, without the counts that are 0."""
        for reason in REASONS:
            self.reasons[reason] += values.get(metric_of(reason), 0)
        return {key: value for key, value in values.items() if value or not key.startswith("skipped")}

    def summary(self, at_start: Counter | None = None) -> str:
        """A line for the end of a run, or "". `at_start`: samples left out of every epoch, by reason."""
        parts = [f"{reasons_in_words(at_start)} from the start"] if at_start else []
        if any(self.reasons.values()):
            parts.append(f"{reasons_in_words(self.reasons)} while training, counted each time")
        return f"samples left out: {'; '.join(parts)}" if parts else ""
