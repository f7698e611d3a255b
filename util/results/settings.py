"""The flag of this room: by which metrics answers are scored.

Only the standard library is imported here, because settings are part of the command line.
"""

from dataclasses import dataclass
from typing import Literal

from util.command_line import setting

Metric = Literal["exact_match", "token_f1", "relaxed_accuracy", "anls", "box_iou"]


@dataclass
class MetricSettings:
    """How answers are scored."""

    eval_metrics: list[Metric] = setting(
        ["exact_match", "token_f1"],
        "scores of answers; the first one is the headline",
        group="evaluation",
        harmless=True,
    )


def invalid_metric_settings(config: MetricSettings) -> list[str]:
    """A message for each metric setting of a Config that is impossible."""
    return [] if config.eval_metrics else ["--eval_metrics: name at least one"]
