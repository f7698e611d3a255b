"""Many processes, the same mathematics: start-up, sharding, and which rank trains which sample.

Everything here is PyTorch's own: torchrun starts the processes, `fully_shard` (FSDP2) shards weights, gradients and
moments over a DeviceMesh, and four settings of it are ZeRO 3, 2, 1 and plain data parallelism.
"""

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from util import compilation, model, ranks
from util.adapters import lora
from util.adapters.settings import untrained_parts
from util.collator import Batch
from util.command_line import Ended, UserError
from util.config import Config
from util.cost import stages
from util.cost.flops import training_flops
from util.cost.sizes import Sizes
from util.family import new_model
from util.log import Run, SilentRun
from util.loss import PackedLoss
from util.model import choose_attention, choose_device, choose_dtype, layers, load_trainable, shard
from util.parallel import context, pipeline, tensor
from util.parallel.layout import Layout, Place
from util.passes import Passes
from util.steps import Dealing, Steps
from util.tensors import part_of, run_parameters, trained_parameters

Number = TypeVar("Number", int, float)


@dataclass
class World:
    """This process among all processes of the job."""

    rank: int
    size: int
    device: torch.device
    layout: Layout = None  # type: ignore[assignment]  # of its own data on every rank
    row_ranks: list[int] = None  # type: ignore[assignment]  # that work on the same samples, this one among them
    row_group: dist.ProcessGroup | None = None  # theirs, where there are others; on the CPU
    context_group: dist.ProcessGroup | None = None  # of the ranks that have the parts of the same rows
    pipe: pipeline.Pipe | None = None  # its stage among others, where there are several

    def __post_init__(self) -> None:
        self.layout = self.layout or Layout(self.size)
        self.row_ranks = self.row_ranks or [self.rank]

    @property
    def place(self) -> Place:
        return self.layout.place(self.rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: dict[str, Number]) -> dict[str, Number]:
        """The sums of numbers over all ranks; whole numbers stay whole."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        sums = zip(values.items(), total.tolist(), strict=True)
        return {key: type(value)(number) for (key, value), number in sums}


def join_group(config: Config, timeout: float) -> World:
    """Join the process group that torchrun set up. Without torchrun: a group of this process alone.

    A collective that waits for longer than `timeout` seconds fails.
    """
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    else:
        device = choose_device(config.device)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and config.device not in ("auto", "cuda") and on_this_machine > 1:
        raise UserError(
            f"--device {config.device} names one GPU for the {on_this_machine} processes of this machine, each of "
            "which needs its own: leave --device out, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # 30 seconds later than asked for, so that faults.Watch comes first: it can say where every rank is.
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout + 30), **alone)
        atexit.register(leave_group)
    world = make_world(config, device, timedelta(seconds=timeout + 30))
    if config.optimizer != "adamw" and world.size > 1:
        raise UserError(
            f"--optimizer {config.optimizer}: its moments are quantised in blocks, which cannot be handed to another "
            f"number of processes; with {world.size} processes use --optimizer adamw, whose moments are sharded among "
            "them"
        )
    return world


def make_world(config: Config, device: torch.device, timeout: timedelta | None = None) -> World:
    """This process in the layout that the settings ask for. All ranks call, as they make groups together."""
    rank, size = ranks.rank_and_size()
    layout = Layout.of(config, size)
    refuse_what_rows_cannot_share(config, layout)
    row_ranks = next(group for group in layout.row_groups() if rank in group)
    world = World(rank, size, device, layout, row_ranks)
    if layout.of_a_row > 1:
        world.row_group, _ = dist.new_subgroups_by_enumeration(layout.row_groups(), timeout, backend="gloo")
    if layout.context > 1:
        world.context_group, _ = dist.new_subgroups_by_enumeration(layout.context_groups(), timeout)
    world.pipe = pipeline.Pipe.of(layout, rank, timeout)
    return world


def refuse_what_rows_cannot_share(config: Config, layout: Layout) -> None:
    """Raise UserError for settings that go by one rank for each row of samples."""
    if layout.of_a_row > 1 and config.cache_dir and "vision" in untrained_parts(config):
        raise UserError(
            "--cache_dir keeps what a frozen vision tower gives for whole pictures of one rank, and of "
            f"{layout.in_words()} several share them: leave --cache_dir out"
        )


def leave_group() -> None:
    """Destroy the process group as this process ends, and wait until its threads have nothing left to do.

    A thread of gloo's lets go of a collective's tensors some time after the collective has returned here, on a busy
    machine long after, and needs Python's lock for that. Nobody gets it any more while Python is taken apart: the
    thread is ended in a place where C++ allows no such end, and the process is aborted, with nothing wrong
    (pytorch#179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    deadline = time.monotonic() + 10
    looks = 0
    while looks < 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # without Python's lock
        looks = 0 if gloo_is_at_work() else looks + 1


def gloo_is_at_work() -> bool:
    """Whether a thread of gloo's runs, or would if there was a core for it. Told on Linux alone; False elsewhere."""
    for task in Path("/proc/self/task").glob("*/stat"):
        try:
            name, _, values = task.read_text(encoding="utf-8").partition("(")[2].rpartition(")")
        except OSError:  # it has just ended
            continue
        if name.startswith("pt_gloo") and values.split()[0] != "S":  # S: it sleeps
            return True
    return False


def wait_for_all() -> None:
    """Wait for all ranks, so that none ends while another still needs it."""
    dist.barrier()


def first_rank_first(make: Callable, *arguments):
    """The result of `make`, called on rank 0 first and then on the others: they find what it made or downloaded."""
    if dist.get_rank() == 0:
        made = make(*arguments)
    dist.barrier()
    return made if dist.get_rank() == 0 else make(*arguments)


def from_first_rank(decide: Callable, *arguments):
    """The result of `decide`, called on rank 0 alone, on all ranks; so is Ended, with which all end alike."""
    decided = None
    if ranks.is_first():
        try:
            decided = decide(*arguments)
        except Ended as ended:
            decided = ended
    decided = ranks.from_first(decided)
    if isinstance(decided, Ended):
        raise decided
    return decided


def open_run(config: Config, resumed: Path | None, world: World):
    """The Run on rank 0; on the other ranks a SilentRun that writes and prints nothing, with the same directory."""
    run = Run(config, world.device, resumed) if world.is_first else None
    if run:
        run.layout = world.layout.in_words()
        if run.peak_flops:  # what is logged as this rank's work is that of all who share its rows
            run.peak_flops *= world.layout.of_a_row
    directory = from_first_rank(lambda: str(run.directory))
    return run or SilentRun(Path(directory))


def check_model(model_config, world: World) -> None:
    """Raise UserError where the model cannot be split as the layout has it."""
    if world.layout.context > 1:
        context.check_sizes(model_config, world.layout.context, world.layout.tensor)
    if world.layout.tensor > 1:
        tensor.check_sizes(model_config, world.layout.tensor)
    stages.refuse_too_few_layers(model_config, world.layout.pipeline)


# ---- which rank trains which sample ---------------------------------------------------------------------------------


def dealing(sizes: Sizes, config: Config, model_config, world: World) -> Dealing:
    """Deals the samples of each global batch to the ranks by their FLOPs; those that share a row are one.

    A global batch holds the same samples on any number of ranks. A pipeline gets at least twice as many rows as it has
    stages: with fewer, its stages wait for each other most of the time.
    """
    costs = training_flops(model_config, [sizes.columns()], config)
    rows = 2 * world.layout.pipeline if world.pipe else 1
    return Dealing(costs, world.place.data, world.layout.data, rows)


def refuse_idle_ranks(steps: Steps, config: Config, world: World) -> None:
    """Raise UserError where a process would never have a sample: it would cost a GPU and give nothing."""
    if not (idle := steps.survey.idle_ranks):
        return
    shared = world.layout.of_a_row
    hands = world.layout.data  # each has samples of its own
    ways = [f"start at most {(hands - idle) * shared}"]
    if config.global_batch_size < hands <= steps.epoch_samples:
        ways.insert(0, f"give at least --global_batch_size {hands}")
    raise UserError(
        f"{idle * shared} of the {world.size} processes would never have a sample: no step has more than "
        f"{hands - idle} (--global_batch_size {config.global_batch_size}, {steps.epoch_samples:,} samples an epoch); "
        + ", or ".join(ways)
    )


# ---- sharding -------------------------------------------------------------------------------------------------------


def shard_group(config: Config, world: World) -> int:
    """How many ranks share one copy of the weights. Raises UserError where that does not divide the ranks."""
    ranks = world.layout.of_a_weight
    group = config.shard_group_size or ranks
    if config.sharding == "none":
        group = 1
    if ranks % group:
        which = "" if ranks == world.size else " that have the same weights"
        raise UserError(f"--shard_group_size {group} does not divide the {ranks} processes{which}")
    return group


def make_mesh(config: Config, world: World) -> DeviceMesh:
    """All ranks by axes: `shard`, over which weights are sharded, and around it those that have more than one rank:
    outside `pipeline` and, of groups of `--shard_group_size` ranks, `replicate`; inside `tensor`."""
    group = shard_group(config, world)
    layout = world.layout
    sizes = {"pipeline": layout.pipeline, "replicate": layout.of_a_weight // group, "shard": group}
    sizes[tensor.AXIS] = layout.tensor
    axes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(world.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def build_model(
    config: Config, path: str, model_config, processor, world: World, sizes: Sizes | None = None
) -> PackedLoss:
    """As model.build_model does, but sharded over the ranks. `sizes`: of the training data, by whose work a model is
    cut into stages."""
    if world.size == 1:
        return model.build_model(config, path, processor, world.device)
    if config.quantize != "none":
        packed = build_quantised(config, path, model_config, processor, world)
    else:
        packed = build_sharded(config, path, model_config, processor, world, sizes)
    if world.context_group:
        dtype = choose_dtype(config.dtype, world.device)
        context.split_attention(packed, choose_attention(config.attention, world.device, dtype), world.context_group)
    if compilation.is_on(config.compile, world.device):
        compilation.compile_loss(packed)
    torch.manual_seed(config.seed + world.rank)  # dropout draws anew on every rank
    return packed.train()


def build_sharded(
    config: Config, path: str, model_config, processor, world: World, sizes: Sizes | None = None
) -> PackedLoss:
    """Rank 0 alone reads the weights; the others begin without memory for them."""
    dtype = choose_dtype(config.dtype, world.device)
    kind = kind_of_loss(world)
    whole = None
    if world.is_first:
        read = load_trainable(config, path, torch.device("cpu"))
        whole = model.pack_loss(read, config, processor, world.device, kind)
    with torch.device("meta"):
        bare = new_model(model_config)
        packed = model.pack_loss(bare, config, processor, world.device, kind)
    take_precision(packed, from_first_rank(lambda: precision_of(whole)))
    mesh = make_mesh(config, world)
    if isinstance(packed, tensor.TensorLoss):
        tensor.split(packed, mesh[tensor.AXIS], config.sequence_parallel)
    if world.pipe:
        assert isinstance(packed, pipeline.StageLoss)
        assert sizes is not None
        pipeline.cut(packed, world.pipe, stages.stages_of(model_config, config, sizes)[world.pipe.index].layers)
    shard(packed, dtype=dtype, **sharding_of(config, mesh))
    gather_ahead(packed)
    packed.to_empty(device=world.device)
    if world.pipe:
        pipeline.hand_out(packed, whole, world.device)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(packed, whole.state_dict() if whole else {}, options=options)
    for name, buffer in packed.named_buffers():  # constants that no checkpoint holds, such as the rotary frequencies
        if whole:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, src=0)
    if whole:  # the first rank writes it with the model that is trained
        packed.model.generation_config = whole.model.generation_config
    return packed


def kind_of_loss(world: World) -> type[PackedLoss]:
    """The forward pass of ranks that share a row: each way of sharing adds what it needs."""
    kinds: list[type[PackedLoss]] = []
    if world.layout.pipeline > 1:
        kinds.append(pipeline.StageLoss)
    if world.layout.tensor > 1:
        kinds.append(tensor.TensorLoss)
    if world.layout.context > 1:
        kinds.append(context.ContextLoss)
    return type("SharedLoss", tuple(kinds), {}) if len(kinds) > 1 else [*kinds, PackedLoss][0]


def precision_of(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer, by name."""
    return {name: tensor.dtype for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def take_precision(bare: torch.nn.Module, precision: dict[str, torch.dtype]) -> None:
    """Give each tensor of a module without memory the precision that it has on rank 0.

    `module.to(dtype)` would cast the buffers, too: with rotary frequencies in bf16 the angles of a long row are wrong
    by whole radians.
    """
    for name, held in [*bare.named_parameters(), *bare.named_buffers()]:
        held.data = held.data.to(precision[name])


def build_quantised(config: Config, path: str, model_config, processor, world: World) -> PackedLoss:
    """Every rank reads and keeps all weights, as 4 bits cannot be sharded; the adapters are sharded."""
    dtype = choose_dtype(config.dtype, world.device)
    quantised = load_trainable(config, path, world.device)
    packed = model.pack_loss(quantised, config, processor, world.device, kind_of_loss(world)).to(world.device)
    for parameter in trained_parameters(packed).values():
        dist.broadcast(parameter.data, src=0)
    mesh = make_mesh(config, world)
    shard(packed, dtype=dtype, kept_whole=lora.frozen_parameters(packed), **sharding_of(config, mesh))
    gather_ahead(packed)
    return packed


def gather_ahead(packed: PackedLoss) -> None:
    """Let the weights of each layer be gathered while the one before it computes, and those of the first layer while
    patches and tokens are embedded.

    The backward pass needs no such word: there FSDP2 gathers the layer before, in the order of the forward pass, by
    itself (_backward_prefetch), and reduces gradients on a stream of their own. In the forward pass it does not know
    what comes next.
    """
    for unit, following in pairwise([packed, *layers(packed.model)]):
        unit.set_modules_to_forward_prefetch([following])


def sharding_of(config: Config, mesh: DeviceMesh) -> dict:
    """Over which axes to shard, and whether a layer's weights are freed between its passes, which only ZeRO-3 does."""
    assert mesh.mesh_dim_names
    axes = tuple(name for name in mesh.mesh_dim_names if name not in ("pipeline", tensor.AXIS))
    return {"mesh": mesh[axes], "reshard_after_forward": config.sharding == "full"}


def drop_blank_gradients(packed: PackedLoss, visual_tokens: float) -> None:
    """Drop the vision gradients of a step in which no rank had a picture; they are zeros, from blank patches.

    On one device the tower has no gradients in such a step, and AdamW leaves weights without gradients alone; with
    gradients of zero it would still move them by their momentum.
    """
    if not visual_tokens:
        for name, parameter in run_parameters(packed).items():
            if part_of(name) != "language_model":
                parameter.grad = None


class EvenPasses(Passes):
    """The passes of all ranks: each has equally many, and gradients are averaged over them."""

    def __init__(self, run_pass, model, optimizer, device, steps: Steps, stop, saver, config: Config) -> None:
        super().__init__(run_pass, model, optimizer, device, steps, stop, saver)
        self.config = config
        layout = Layout.of(config, dist.get_world_size())
        self.averaged = layout.of_a_weight  # ranks whose gradients become their mean
        self.counts = layout.place(dist.get_rank()).tensor == 0  # the ranks of a tensor group have the same loss

    def run(self, step: int, micro_batches: Sequence[Batch], divisor: float) -> torch.Tensor:
        """As Passes has it; where several ranks have the same loss, one gives it, since all are added up."""
        loss_sum = super().run(step, micro_batches, divisor)
        if isinstance(self.model, tensor.TensorLoss):
            tensor.agree(self.model)
        return loss_sum if self.counts else torch.zeros_like(loss_sum)

    def attempt(self, micro_batches: Sequence[Batch], divisor: float) -> torch.Tensor | None:
        """As Passes has it, one micro-batch after the other; in a pipeline several are under way."""
        if not isinstance(self.model, pipeline.StageLoss):
            return super().attempt(micro_batches, divisor)
        prepare = partial(before_backward, self.model, self.config)
        loss_sum = pipeline.one_forward_one_backward(self.model, micro_batches, divisor / self.averaged, prepare)
        self.model.add_tied_gradients()
        return loss_sum

    def run_one(self, batch: Batch, divisor: float, is_last: bool) -> torch.Tensor:
        before_backward(self.model, self.config, is_last)
        return super().run_one(batch, divisor / self.averaged, is_last)


def before_backward(packed: PackedLoss, config: Config, is_last: bool) -> None:
    """Let ZeRO-1 and replicas sum their gradients once a step, in the last backward pass, not in each of them."""
    if dist.get_world_size() == 1:
        return
    if config.sharding == "optimizer":
        packed.set_requires_gradient_sync(is_last)
        packed.set_reshard_after_backward(is_last)
    elif config.sharding == "none" or config.shard_group_size:
        packed.set_requires_all_reduce(is_last)
