"""Who works on what: the axes along which ranks are counted, and which ranks work on the same samples.

Outermost first: pipeline (each rank has some of the layers), data (each has samples of its own), context (each has a
part of every row of samples), tensor (each has a part of every matrix). 8 ranks with --context_parallel_size 2 are

              context 0   context 1
    data 0         0           1       ranks 0 and 1 work on the same samples, each on half of every row
    data 1         2           3
    data 2         4           5
    data 3         6           7

Neighbours along the innermost axis are on one machine, where ranks talk fastest. Along data and context weights are
sharded; what differs along pipeline and tensor are the weights themselves.
"""

from dataclasses import dataclass, replace

from util.command_line import UserError
from util.parallel.settings import SPLITS, ParallelSettings


@dataclass(frozen=True)
class Place:
    """Where a rank stands on each axis."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has."""

    data: int
    pipeline: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, config: ParallelSettings, ranks: int) -> "Layout":
        """Raises UserError where the sizes that were asked for do not divide the ranks."""
        sizes = {name: getattr(config, name) for name in SPLITS}
        asked = [f"--{name} {size}" for name, size in sizes.items() if size > 1]
        together = config.ranks_of_a_row
        if ranks % together:
            do = "does" if len(asked) == 1 else "do"
            raise UserError(
                f"{' times '.join(asked)} {do} not divide the {ranks} processes: start a multiple of {together} with "
                "./finetune_distributed.sh, or give another size"
            )
        return cls(ranks // together, *sizes.values())  # in the order of the fields

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def of_a_row(self) -> int:
        """Ranks that work on the same samples."""
        return self.ranks // self.data

    @property
    def of_a_weight(self) -> int:
        """Ranks that compute with the same weights, over which these are sharded or replicated."""
        return self.data * self.context

    def place(self, rank: int) -> Place:
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Place(pipeline, data, context, tensor)

    def row_groups(self) -> list[list[int]]:
        """The ranks that work on the same samples, for each place on the data axis."""
        return self.groups_along("pipeline", "context", "tensor")

    def context_groups(self) -> list[list[int]]:
        """The ranks that have the parts of the same rows."""
        return self.groups_along("context")

    def pipelines(self) -> list[list[int]]:
        """The ranks of all stages, the first one first, through which the same part of the same rows passes."""
        return self.groups_along("pipeline")

    def weight_groups(self) -> list[list[int]]:
        """The ranks that compute with the same weights."""
        return self.groups_along("data", "context")

    def groups_along(self, *axes: str) -> list[list[int]]:
        """The ranks that stand alike on all other axes, in their order, for each place on those."""
        groups: dict[Place, list[int]] = {}
        for rank in range(self.ranks):
            elsewhere = replace(self.place(rank), **dict.fromkeys(axes, 0))
            groups.setdefault(elsewhere, []).append(rank)
        return list(groups.values())

    def in_words(self) -> str:
        """`8: groups of 2 work on the same samples, each row of them in 2 parts`; "" where each has its own."""
        if self.of_a_row == 1:
            return ""
        words = ["all work on the same samples"]
        if self.data > 1:
            words = [f"groups of {self.of_a_row} work on the same samples"]
        if self.pipeline > 1:
            words.append(f"each row of them through {self.pipeline} stages")
        if self.context > 1:
            words.append(f"each row of them in {self.context} parts")
        if self.tensor > 1:
            words.append(f"each matrix in {self.tensor} parts")
        return f"{self.ranks}: {', '.join(words)}"
