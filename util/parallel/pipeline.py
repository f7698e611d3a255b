"""Pipeline parallelism: each rank has some of the layers, its stage, and every row of samples passes through all.

    stage 0     vision tower, mergers, embedding, the first layers   reads pixels
    stage 1     as much of the layers as makes its work equal
    the last    the last layers, norm, head                          knows the loss

Hidden states (T, D) of a row travel from stage to stage, and their gradients back. The schedule is 1F1B (one forward,
one backward; PipeDream-Flush, arXiv 2104.04473, section 2.2.1). Three stages and six rows, a backward pass taking twice
as long as a forward pass:

    stage 0   F0 F1 F2 .. .. .. .. B0 B0 F3 B1 B1 F4 B2 B2 F5 B3 B3 .. B4 B4 .. B5 B5
    stage 1   .. F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 F4 B3 B3 F5 B4 B4 .. B5 B5 .. ..
    stage 2   .. .. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 F5 B5 B5 .. .. .. ..

A stage holds the activations of at most as many rows as there are stages from it to the last, however many rows a step
has. Rows differ in length: every rank knows all lengths from its own batches. What travels down and what travels up has
a process group of its own, so that within each all goes one way, in the order of the rows, and no send waits behind a
receive. A row travels while the one before it is worked on.

Letters in shapes: T tokens of a row, D the hidden size, S supervised tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from util import ranks
from util.collator import Batch
from util.family import bare_model
from util.loss import PackedLoss
from util.optimizer import total_norm
from util.parallel.layout import Layout
from util.tensors import run_parameters

EMBEDDING = "model.model.language_model.embed_tokens.weight"  # its name in a PackedLoss; a tied head is not named

# ---- who talks to whom ----------------------------------------------------------------------------------------------


@dataclass
class Pipe:
    """This rank's place in a pipeline, and how it reaches the stages beside its own."""

    ranks: list[int]  # of all stages, the first one first
    index: int  # of this rank's stage
    down: Any  # process group in which hidden states travel
    up: Any  # in which their gradients do
    ends: Any  # of the first and the last stage; None on others
    under_way: deque = field(default_factory=deque)  # of Sent, the oldest first

    @classmethod
    def of(cls, layout: Layout, rank: int, timeout: timedelta) -> "Pipe | None":
        """None where there is one stage. All ranks call, as they make groups together."""
        if layout.pipeline == 1:
            return None
        pipelines = layout.pipelines()
        down, _ = dist.new_subgroups_by_enumeration(pipelines, timeout)
        up, _ = dist.new_subgroups_by_enumeration(pipelines, timeout)
        ends, _ = dist.new_subgroups_by_enumeration([[ranks[0], ranks[-1]] for ranks in pipelines], timeout)
        own = next(ranks for ranks in pipelines if rank in ranks)
        return cls(own, own.index(rank), down, up, ends)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == len(self.ranks) - 1

    def send_down(self, hidden: torch.Tensor) -> "Sent":
        return Sent(hidden, self.ranks[self.index + 1], self.down)

    def send_up(self, gradient: torch.Tensor) -> "Sent":
        return Sent(gradient, self.ranks[self.index - 1], self.up)

    def keep(self, sent: "Sent") -> None:
        """Let it be under way while this rank goes on, with one that was sent before it."""
        self.under_way.append(sent)
        self.settle(2)

    def settle(self, most: int = 0) -> None:
        """Wait until at most so many of those that are kept are under way."""
        while len(self.under_way) > most:
            self.under_way.popleft().wait()

    def from_before(self, rows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | None]:
        """The hidden states of the stage before, in the order of the rows; None for each on the first stage. `rows`:
        room for what arrives, made when it is needed."""
        return repeat(None) if self.is_first else arriving(rows, self.ranks[self.index - 1], self.down)

    def from_after(self, rows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | None]:
        """The gradients of what left this stage; None on the last one."""
        return repeat(None) if self.is_last else arriving(rows, self.ranks[self.index + 1], self.up)


class Sent:
    """A tensor that is under way to another rank, and kept until it has arrived."""

    def __init__(self, tensor: torch.Tensor, rank: int, group: Any) -> None:
        self.tensor = tensor.contiguous()
        self.work: Any = dist.isend(self.tensor, rank, group=group)  # returns at once

    def wait(self) -> None:
        self.work.wait()


def arriving(rows: Iterable[torch.Tensor], rank: int, group: Any) -> Iterator[torch.Tensor]:
    """What another rank sends, in its order. While one row is worked on, the next one may travel."""
    posted: deque = deque()
    for room in rows:
        posted.append((dist.irecv(room, rank, group=group), room))
        if len(posted) == 2:
            yield arrived(*posted.popleft())
    while posted:
        yield arrived(*posted.popleft())


def arrived(work: Any, room: torch.Tensor) -> torch.Tensor:
    work.wait()
    return room


# ---- the schedule ---------------------------------------------------------------------------------------------------


def one_forward_one_backward(
    model: "StageLoss", batches: Sequence[Batch], divisor: float, before_backward: Callable[[bool], None]
) -> torch.Tensor:
    """The passes of a step's rows through this rank's stage; the sum of losses (fp64) on the last stage, 0 elsewhere.

    `before_backward` (whether it is the last one of the step) is called before each backward pass.
    """
    passes = StagePasses(model, batches, divisor)
    # The first gradient comes back when the first row has passed all stages: until then forward passes alone.
    ahead = min(len(model.pipe.ranks) - 1 - model.pipe.index, len(batches))
    for batch in batches[:ahead]:
        passes.forward(batch)
    for number in range(len(batches)):
        if number + ahead < len(batches):
            passes.forward(batches[number + ahead])
        is_last = number == len(batches) - 1
        model.set_is_last_backward(is_last)  # rows whose backward pass is to come still need what FSDP2 noted of them
        before_backward(is_last)
        passes.backward()
    model.pipe.settle()
    return passes.loss_sum


class StagePasses:
    """Forward and backward passes of rows through one stage, each in the order of the rows."""

    def __init__(self, model: "StageLoss", batches: Sequence[Batch], divisor: float) -> None:
        self.model, self.pipe, self.divisor = model, model.pipe, divisor
        self.arrivals = self.pipe.from_before(map(model.room_for, batches))
        self.gradients = self.pipe.from_after(map(model.room_for, batches))
        # Of each row whose backward pass is to come: what arrived, what was made of it, and that on its way
        self.rows: deque = deque()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.pixel_scale.device)

    def forward(self, batch: Batch) -> None:
        """What the scripts' run_pass does up to the loss, on this stage's layers."""
        arrived = next(self.arrivals)
        if arrived is not None:
            arrived.requires_grad_()
        left = self.model(batch.to(self.loss_sum.device), arrived)
        sent = None
        if self.pipe.is_last:
            self.loss_sum += left.detach()
            left = left / self.divisor
        else:
            sent = self.pipe.send_down(left.detach())
        self.rows.append((arrived, left, sent))

    def backward(self) -> None:
        """And from there on, for the oldest row."""
        arrived, left, sent = self.rows.popleft()
        left.backward(next(self.gradients))
        if sent:
            sent.wait()  # not for long: its gradient was there
        if arrived is not None:
            self.pipe.keep(self.pipe.send_up(arrived.grad))


# ---- the model of a stage -------------------------------------------------------------------------------------------


class StageLoss(PackedLoss):
    """A PackedLoss of which this rank has some layers: batch, hidden states of the stage before -> hidden states (T, D)
    for the next stage, or on the last one the sum of cross-entropies."""

    pipe: Pipe
    arrived: torch.Tensor | None = None  # while a forward pass runs: what the stage before has made of the row

    @property
    def rows_at_once(self) -> int:
        """Rows of an evaluation that are read before the first is computed, so that all stages have work."""
        return 2 * len(self.pipe.ranks)

    def room_for(self, batch: Batch) -> torch.Tensor:
        """For the hidden states (T, D) of a row, or their gradient."""
        shape = len(batch.input_ids), self.model.config.text_config.hidden_size
        return torch.empty(shape, dtype=self.dtype, device=self.pixel_scale.device)

    def embed(self, batch: Batch, visual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.arrived is None:
            return super().embed(batch, visual)
        return self.arrived, self.arrived.new_zeros(0, 0, self.arrived.shape[1])  # the first stage has added the others

    def forward(self, batch: Batch, arrived: torch.Tensor | None = None) -> torch.Tensor:
        self.arrived = arrived
        found = super().forward(batch) if self.pipe.is_last else self.decode(batch, *self.embed(batch))
        self.arrived = None
        return found

    def score(self, batch: Batch, visual: torch.Tensor | None = None) -> torch.Tensor:
        """As PackedLoss.score on the last stage, and zeros on the others, as ranks add up what they find.

        Rows pass through as in the schedule: this rank begins the next one while the others work on this one.
        """
        self.arrived = next(self.pipe.from_before([self.room_for(batch)]))
        if self.pipe.is_last:
            found = super().score(batch, visual)
        else:
            self.pipe.keep(self.pipe.send_down(self.decode(batch, *self.embed(batch, visual))))
            found = torch.zeros(2, len(batch.target_ids), device=self.pixel_scale.device)
        self.arrived = None
        return found

    # ---- one model over several stages ----

    def add_tied_gradients(self) -> None:
        """Once a step: the gradients of the embedding on the first stage and of the head on the last are those of one
        weight. Both get the sum, so that both copies are updated alike."""
        tied = self.model.config.tie_word_embeddings and (self.pipe.is_first or self.pipe.is_last)
        gradient = run_parameters(self)[EMBEDDING].grad if tied else None
        if gradient is not None:  # None: frozen
            dist.all_reduce(local(gradient), group=self.pipe.ends)

    def norm_over_stages(self, trained: dict[str, nn.Parameter]) -> torch.Tensor:
        """Of the gradients of all stages, where `trained` are those of this one; what two stages have counts once."""
        counted = []
        for name, parameter in trained.items():
            if name != EMBEDDING or self.pipe.is_first:
                counted.append(parameter)
        square = total_norm(counted).to(self.pixel_scale.device, torch.float64) ** 2
        dist.all_reduce(square, group=self.pipe.down)
        return square.sqrt()

    def whole_form(self) -> Any:
        """The modules of all stages, without memory for weights."""
        whole = bare_model(self.model.config)
        whole.generation_config = self.model.generation_config
        return whole


def local(tensor: Any) -> torch.Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- the cut --------------------------------------------------------------------------------------------------------


def cut(packed: StageLoss, pipe: Pipe, layers: range) -> None:
    """Leave of a whole model what the stage of this rank has. Layers keep their numbers, and all its name: checkpoints
    and models that are saved know nothing of stages."""
    packed.pipe = pipe
    model = packed.model
    tower, language_model = model.model.visual, model.model.language_model
    for number in range(len(language_model.layers)):
        if number not in layers:
            del language_model.layers._modules[str(number)]
    if not pipe.is_first:
        tower.blocks = nn.ModuleList()
        for name in ("patch_embed", "pos_embed", "merger", "deepstack_merger_list"):
            if hasattr(tower, name):
                setattr(tower, name, None)
    is_tied = model.config.tie_word_embeddings
    if not pipe.is_first and not (pipe.is_last and is_tied):  # a tied embedding is the head, too
        language_model.embed_tokens = None
    if not pipe.is_last:
        language_model.norm = model.lm_head = None


@torch.no_grad()
def hand_out(packed: StageLoss, whole: PackedLoss | None, device: torch.device) -> None:
    """Give every rank its shards of its stage's weights, one tensor after the other. `whole`: on the first rank, which
    has read them, all weights in CPU memory."""
    read = dict(whole.named_parameters()) if whole else {}
    described = [(name, tensor.shape, tensor.dtype) for name, tensor in read.items()]
    own = dict(packed.named_parameters())
    for name, shape, dtype in ranks.from_first(described):
        tensor = read[name].to(device) if whole else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=0)
        if name in own:
            own[name].to_local().copy_(own_shard(tensor, own[name]))


def own_shard(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Of a whole weight what this rank has of `parameter`, a DTensor. The innermost axis of its mesh cuts first: where
    matrices are in parts, FSDP2 shards these parts."""
    part = whole
    mesh = parameter.device_mesh
    places = mesh.get_coordinate()
    for axis in reversed(range(mesh.ndim)):
        # A shard of a part is of another class, whose is_shard() says no (torch 2.14). Both have a dimension.
        dimension = getattr(parameter.placements[axis], "dim", None)
        if dimension is not None:
            pieces = part.chunk(mesh.size(axis), dimension)
            is_there = places[axis] < len(pieces)  # of fewer rows than ranks the last ranks have none
            part = pieces[places[axis]] if is_there else part[:0]
    return part
