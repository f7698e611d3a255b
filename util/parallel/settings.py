"""The flags of this room: what is sharded, and over how many ranks a row, the layers and their matrices are split.

Only the standard library is imported here, because settings are part of the command line.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from util.command_line import setting

# those that say over how many ranks something is split, in the order of the axes (util/parallel/layout.py)
SPLITS = ("pipeline_parallel_size", "context_parallel_size", "tensor_parallel_size")


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
    pipeline_parallel_size: int = setting(
        1,
        "cut the layers into this many stages, one a rank, through which all rows pass (1F1B)",
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
    tensor_parallel_size: int = setting(
        1,
        "keep a part of every matrix on each of this many ranks, for layers that one GPU cannot hold; must divide the "
        "key-value heads",
        group="many GPUs",
        least=1,
        harmless=True,
    )
    sequence_parallel: bool = setting(
        False,
        "between the matrices of --tensor_parallel_size, keep a part of the rows on each rank, too: less memory",
        group="many GPUs",
        harmless=True,
    )

    @property
    def ranks_of_a_row(self) -> int:
        """Ranks that work on the same samples."""
        return math.prod(getattr(self, name) for name in SPLITS)


# what of a model is cut by which setting, so that a rank has not all of it
CUTS = {
    "pipeline_parallel_size": ("stages", "all layers, of which each has some"),
    "tensor_parallel_size": ("parts", "whole weights, of which each has a part"),
}


def invalid_parallel_settings(config: Any) -> list[str]:
    """A message for each setting that what several ranks share cannot be used with. `config`: a Config."""
    found = []
    if config.sequence_parallel and config.tensor_parallel_size == 1:
        found.append("--sequence_parallel needs --tensor_parallel_size: it is about the rows between parts of matrices")
    for name, (pieces, needed) in CUTS.items():
        size = getattr(config, name)
        if size > 1 and config.lora_rank:
            found.append(
                f"--lora_rank {config.lora_rank} with --{name} {size}: adapters are not cut into {pieces}; "
                "under --sharding full frozen weights need little memory on each rank without it"
            )
        if size > 1 and config.eval_samples:
            found.append(
                f"--eval_samples {config.eval_samples} with --{name} {size}: a rank answers with {needed}. "
                "Give --eval_samples 0, and test the model when it is trained"
            )
    return found
