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


def invalid_parallel_settings(config: Any) -> list[str]:
    """A message for each setting that what several ranks share cannot be used with. `config`: a Config."""
    found = []
    size = config.tensor_parallel_size
    if config.sequence_parallel and size == 1:
        found.append("--sequence_parallel needs --tensor_parallel_size: it is about the rows between parts of matrices")
    if size == 1:
        return found
    if config.lora_rank:
        found.append(
            f"--lora_rank {config.lora_rank} with --tensor_parallel_size {size}: adapters are not cut into parts; "
            "under --sharding full frozen weights need little memory on each rank without it"
        )
    if config.eval_samples:
        found.append(
            f"--eval_samples {config.eval_samples} with --tensor_parallel_size {size}: a rank answers with whole "
            "weights, of which each has a part. Give --eval_samples 0, and test the model when it is trained"
        )
    return found
