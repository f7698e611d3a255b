"""The flag of this room: by which metrics answers are scored.

Only the standard library is imported here, because settings are part of the command line.
"""

from dataclasses import dataclass
from typing import Literal

from util.command_line import setting

Metric = Literal["exact_match", "token_f1", "chrf", "relaxed_accuracy", "anls", "box_iou", "tool_call"]


@dataclass
class MetricSettings:
    """How answers are scored."""

    eval_metrics: list[Literal["auto", Metric]] = setting(
        ["auto"],
        "scores of answers, the first one is the headline; auto: those that suit the reference answers",
        group="evaluation",
        harmless=True,
    )


def invalid_metric_settings(config: MetricSettings) -> list[str]:
    """A message for each metric setting of a Config that is impossible."""
    return metrics_problems("--eval_metrics", config.eval_metrics)


def metrics_problems(flag: str, metrics: list) -> list[str]:
    """What is wrong with the metrics that a flag names, as a list of at most one message."""
    if not metrics:
        return [f"{flag}: name at least one"]
    if "auto" in metrics and len(metrics) > 1:
        return [f"{flag} {' '.join(metrics)}: auto chooses all of them; leave it out, or the others"]
    return []
