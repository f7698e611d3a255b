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

from dataclasses import dataclass

from util.command_line import UserError
from util.parallel.settings import ParallelSettings


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
        context = config.context_parallel_size
        if ranks % context:
            raise UserError(
                f"--context_parallel_size {context} does not divide the {ranks} processes: start a multiple of "
                f"{context} with ./finetune_distributed.sh, or give another size"
            )
        return cls(ranks // context, context=context)

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
        groups: list[list[int]] = [[] for _ in range(self.data)]
        for rank in range(self.ranks):
            groups[self.place(rank).data].append(rank)
        return groups

    def context_groups(self) -> list[list[int]]:
        """The ranks that have the parts of the same rows."""
        groups: dict[tuple, list[int]] = {}
        for rank in range(self.ranks):
            place = self.place(rank)
            groups.setdefault((place.pipeline, place.data, place.tensor), []).append(rank)
        return list(groups.values())

    def in_words(self) -> str:
        """`8: groups of 2 work on the same samples, each row of them in 2 parts`; "" where each has its own."""
        if self.of_a_row == 1:
            return ""
        words = ["all work on the same samples"]
        if self.data > 1:
            words = [f"groups of {self.of_a_row} work on the same samples"]
        if self.context > 1:
            words.append(f"each row of them in {self.context} parts")
        return f"{self.ranks}: {', '.join(words)}"
