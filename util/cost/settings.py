"""The flags of this room: how much memory a run may take, and what may be changed so that it fits.

Only the standard library is imported here, because settings are part of the command line.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TypeVar

from util.command_line import setting

GIB = 2**30
UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": 2**20, "mb": 2**20, "mib": 2**20}


@dataclass
class MemorySettings:
    """How a run is made to fit a device."""

    memory_budget: str = setting(
        "auto",
        "memory that the run may take, such as 24GiB; what was not typed (max_tokens, activation_checkpointing, "
        "logit_rows) is chosen so that it fits, fastest first; auto: what is free on a GPU; none: nothing is chosen",
        group="memory and speed",
        harmless=True,
    )
    memory_budget_may_change_optimizer: bool = setting(
        False,
        "where nothing else fits the memory budget, an optimizer with smaller moments may be chosen too",
        group="memory and speed",
        harmless=True,
    )
    logit_rows: int | None = setting(
        None,
        "at most this many supervised tokens at a time get their logits, which are then made again in the backward "
        "pass (memory only); default: 4096",
        group="memory and speed",
        least=1,
        harmless=True,
    )

    # No settings, but what is known of them; each is set on an object and never changed there.
    given = frozenset[str]()  # the names of those that were typed (command_line.parse)
    asked = dict[str, object]()  # noqa: RUF012  (those that util/cost/budget.py changed, as they were before)


Settings = TypeVar("Settings", bound=MemorySettings)


def changed(config: Settings, **changes) -> Settings:
    """A copy with other values that still knows which settings were typed. Raises UserError as the settings do."""
    made = dataclasses.replace(config, **changes)
    made.given = config.given
    made.asked = config.asked
    return made


def as_asked(config: MemorySettings) -> dict:
    """The settings as the user has them, for a checkpoint: a resumed run chooses anew what fits its own device.

    "given": those that were typed. An optimizer that was chosen stays, since the moments are its own.
    """
    asked = {name: value for name, value in config.asked.items() if name != "optimizer"}
    return {**dataclasses.asdict(config), **asked, "given": sorted(config.given)}


def budget_in_bytes(text: str) -> float | None:
    """`24GiB`, `24G`, `24GB` and `24` all are 24 x 2^30 bytes, as cards are named; None where it is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in UNITS:
        return None
    return float(found[1]) * UNITS[found[2]]


def invalid_memory_settings(config: MemorySettings) -> list[str]:
    """A message where the memory budget is no size."""
    text = config.memory_budget
    if text in ("auto", "none"):
        return []
    size = budget_in_bytes(text)
    if not size or math.isinf(size):
        return [f"--memory_budget {text}: must be auto, none, or a size above 0 such as 24GiB"]
    return []
