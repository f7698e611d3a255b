"""The flags of this room: which model a run leaves, the trackers that get its metrics, and the repository on the hub.

Only the standard library is imported here, because settings are part of the command line.
"""

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal

from util.command_line import setting

Tracker = Literal["tensorboard", "trackio", "wandb"]


@dataclass
class FinalSettings:
    """Which model a run leaves, and what may end it early."""

    stop_after: int = setting(
        0,
        "end the run after this many evaluations in a row without a lower loss; 0: never",
        group="evaluation",
        least=0,
        harmless=True,
    )

    final: Literal["best", "last"] | None = setting(
        None,
        "the model that the run leaves: that with the lowest evaluation loss, or that of the last step; "
        "default: best with --eval_data, else last",
        group="saving",
        harmless=True,
    )


@dataclass
class TrackerSettings:
    """Where the metrics go besides `metrics.jsonl`."""

    report_to: list[Tracker] = setting(
        [], "trackers that get the metrics too; each is a package of its own", group="tracking and hub", harmless=True
    )
    project: str = setting(
        "qwen2-vl", "name of the project in trackio and wandb", group="tracking and hub", harmless=True
    )
    run_name: str | None = setting(
        None,
        "name of the run in trackio and wandb; default: that of the run directory",
        group="tracking and hub",
        harmless=True,
    )


@dataclass
class HubSettings:
    """Where the model goes besides the run directory."""

    push_to_hub: str | None = setting(
        None, "send the final model to this repository of the Hugging Face hub", group="tracking and hub", harmless=True
    )
    push_every_save: bool = setting(
        False,
        "send the model of the newest checkpoint there, too, while training",
        group="tracking and hub",
        harmless=True,
    )
    hub_private: bool = setting(
        True, "a repository that is made for it is private", group="tracking and hub", harmless=True
    )


def invalid_final_settings(config) -> list[str]:
    """A message for each of them that needs an evaluation which there is not. `config`: a Config."""
    found = []
    if config.final == "best" and not config.eval_data:
        found.append("--final best needs --eval_data, by whose loss the best is known")
    if config.stop_after and not (config.eval_data and config.eval_every):
        found.append(f"--stop_after {config.stop_after} needs --eval_data, and an --eval_every that is not 0")
    return found


def missing_trackers(config: TrackerSettings) -> list[str]:
    """A message for each chosen tracker that is not installed."""
    return [
        f"--report_to {name}: it is not installed; run: pip install {name}"
        for name in dict.fromkeys(config.report_to)
        if importlib.util.find_spec(name) is None
    ]


def invalid_hub_settings(config) -> list[str]:
    """A message for each setting of the hub that is invalid, alone or together with others. `config`: a Config."""
    found = []
    name = config.push_to_hub
    # A name on the hub: letters, digits and _, with . and - between them; neither -- nor .. occurs in it.
    part = r"[A-Za-z0-9_](?!.*(--|\.\.))[A-Za-z0-9._-]{0,95}(?<![.-])"
    if name is not None and not re.fullmatch(rf"({part}/)?{part}", name):
        found.append(f"--push_to_hub {name}: must be NAME or OWNER/NAME of letters, digits, and . _ - inside of them")
    if config.push_every_save and not name:
        found.append("--push_every_save needs --push_to_hub")
    if config.push_every_save and str(config.save_every) in ("0", "0min"):
        found.append("--push_every_save needs --save_every")
    return found
