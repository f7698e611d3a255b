"""The flags of this room: how bad samples are met, how remote media are fetched, and what is kept on disk.

Only the standard library is imported here, because settings are part of the command line.
"""

from dataclasses import dataclass
from typing import Literal

from util.command_line import setting


@dataclass
class SampleSettings:
    """What happens to samples that cannot be trained on."""

    train_on: Literal["all", "last"] = setting(
        "all", "answers of a conversation that are learned: all of them, or the last one alone", group="data"
    )
    on_bad_sample: Literal["stop", "skip"] = setting(
        "stop",
        "when a sample breaks a rule or cannot be read: stop, or leave it out and count it",
        group="data",
        harmless=True,
    )
    on_long_sample: Literal["stop", "skip", "shrink"] = setting(
        "stop",
        "when a sample is above --max_tokens: stop, leave it out, or shrink its images and frames until it fits",
        group="data",
    )


@dataclass
class FetchSettings:
    """How remote files are fetched."""

    fetch_concurrency: int = setting(
        8, "remote files that a data worker fetches at the same time", group="remote media", least=1, harmless=True
    )
    fetch_retries: int = setting(
        5,
        "how often a failed request for a remote file is repeated, waiting ever longer",
        group="remote media",
        least=0,
        harmless=True,
    )
    fetch_timeout: float = setting(
        60.0,
        "seconds that a request for (at most 8 MiB of) a remote file may take",
        group="remote media",
        above=0,
        harmless=True,
    )


@dataclass
class CacheSettings:
    """Where decoded frames are kept, and what a frozen tower makes of them."""

    cache_dir: str | None = setting(
        None, "keep decoded, resized frames in this folder (a local disk); default: do not", group="data", harmless=True
    )
    cache_max_gib: float = setting(
        100.0, "largest size of --cache_dir; what was used longest ago goes first", group="data", above=0, harmless=True
    )
    keep_features: Literal["auto", "off"] = setting(
        "auto",
        "auto: with --cache_dir and an untrained vision tower, what it makes of each image is kept there, too",
        group="data",
        harmless=True,
    )
