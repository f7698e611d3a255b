"""The flags of this room: what is sharded, and over how many ranks a row, the layers and their matrices are split.

Only the standard library is imported here, because settings are part of the command line.
"""

from dataclasses import dataclass
from typing import Any, Literal

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


def invalid_parallel_settings(config: Any) -> list[str]:
    """A message for each setting that what several ranks share cannot be used with. `config`: a Config."""
    found = []
    stages = config.pipeline_parallel_size
    if stages > 1 and config.lora_rank:
        found.append(
            f"--lora_rank {config.lora_rank} with --pipeline_parallel_size {stages}: adapters are not cut into stages. "
            "Frozen weights need little memory on each rank with --sharding full; leave --pipeline_parallel_size out"
        )
    if stages > 1 and config.eval_samples:
        found.append(
            f"--eval_samples {config.eval_samples} with --pipeline_parallel_size {stages}: a rank answers with all "
            "layers, of which each has some. Give --eval_samples 0, and test the model when it is trained"
        )
    return found
