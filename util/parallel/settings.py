"""The flags of this room: what is sharded, and over how many ranks a row, the layers and their matrices are split.

Only the standard library is imported here, because settings are part of the command line.
"""

from dataclasses import dataclass
from typing import Literal

from util.command_line import setting


@dataclass
class ParallelSettings:
    """How several ranks share the work. None of it changes what is computed."""

    sharding: Literal["full", "gradients", "optimizer", "none"] = setting(
        "full", "what is sharded: ZeRO 3, 2, 1 or plain data parallelism", group="many GPUs", harmless=True
    )
    shard_group_size: int | None = setting(
        None,
        "shard inside groups of this many, replicate between; default: over all",
        group="many GPUs",
        least=1,
        harmless=True,
    )
    context_parallel_size: int = setting(
        1,
        "split each packed row over this many ranks (sequence parallelism), for samples that one GPU cannot hold",
        group="many GPUs",
        least=1,
        harmless=True,
    )
