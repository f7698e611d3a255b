"""Many processes, the same mathematics: start-up, sharding, and which rank trains which sample.

Everything here is PyTorch's own: torchrun starts the processes, `fully_shard` (FSDP2) shards weights, gradients and
moments over a DeviceMesh, and four settings of it are ZeRO 3, 2, 1 and plain data parallelism.
"""

import atexit
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Qwen2VLForConditionalGeneration

from util import compilation, model, ranks
from util.adapters import lora
from util.attention import Segments
from util.collator import Batch, Collator, patch_positions
from util.command_line import Ended, UserError
from util.config import Config
from util.cost.flops import training_flops
from util.cost.sizes import Sizes
from util.dataset import Sample
from util.log import Run, SilentRun
from util.loss import PackedLoss
from util.model import choose_device, choose_dtype, layers, load_trainable, shard
from util.passes import Passes
from util.steps import Dealing, Steps
from util.tensors import part_of, run_parameters, trained_parameters
from util.vision import PATCH, Grid

Number = TypeVar("Number", int, float)


@dataclass
class World:
    """This process among all processes of the job."""

    rank: int
    size: int
    device: torch.device

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
    world = World(dist.get_rank(), dist.get_world_size(), device)
    if config.optimizer != "adamw" and world.size > 1:
        raise UserError(
            f"--optimizer {config.optimizer}: its moments are quantised in blocks, which cannot be handed to another "
            f"number of processes; with {world.size} processes use --optimizer adamw, whose moments are sharded among "
            "them"
        )
    return world


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
            name, _, values = task.read_text().partition("(")[2].rpartition(")")
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
    directory = from_first_rank(lambda: str(run.directory))
    return run or SilentRun(Path(directory))


# ---- which rank trains which sample ---------------------------------------------------------------------------------


def dealing(sizes: Sizes, config: Config, model_config, world: World) -> Dealing:
    """Deals the samples of each global batch to the ranks by their FLOPs.

    A global batch holds the same samples on any number of ranks.
    """
    return Dealing(training_flops(model_config, [sizes.columns()], config), world.rank, world.size)


def refuse_idle_ranks(steps: Steps, config: Config, world: World) -> None:
    """Raise UserError where a process would never have a sample: it would cost a GPU and give nothing."""
    if not (idle := steps.survey.idle_ranks):
        return
    ways = [f"start at most {world.size - idle}"]
    if config.global_batch_size < world.size <= steps.epoch_samples:
        ways.insert(0, f"give at least --global_batch_size {world.size}")
    raise UserError(
        f"{idle} of the {world.size} processes would never have a sample: no step has more than {world.size - idle} "
        f"(--global_batch_size {config.global_batch_size}, {steps.epoch_samples:,} samples an epoch); "
        + ", or ".join(ways)
    )


class EvenCollator(Collator):
    """Gives a rank that has no picture four blank patches, which no token sees and whose gradient is zero.

    Gradients are summed layer by layer over all ranks, and the tower's weights are gathered so: a rank that left out
    the vision tower would stop them all. It sees the blank patches also where the features of all pictures were kept,
    as those of another rank may not be.
    """

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = super().__call__(samples)
        if len(batch.vision_position_ids):
            return batch
        grid = Grid(1, 2, 2)
        return replace(
            batch,
            image_patches=torch.zeros(grid.patches, 3 * PATCH**2, dtype=torch.uint8),
            grid_thw=torch.cat([batch.grid_thw, torch.tensor([grid[:3]])]),
            vision_position_ids=patch_positions(grid),
            vision_segments=Segments.of([grid.patches]),
        )


# ---- sharding -------------------------------------------------------------------------------------------------------


def shard_group(config: Config, world: World) -> int:
    """How many ranks share one copy of the weights. Raises UserError where that does not divide the ranks."""
    group = config.shard_group_size or world.size
    if config.sharding == "none":
        group = 1
    if world.size % group:
        raise UserError(f"--shard_group_size {group} does not divide the {world.size} processes")
    return group


def make_mesh(config: Config, world: World) -> DeviceMesh:
    """(ranks,) to shard over all; (replicas, group) to shard inside groups of `--shard_group_size` ranks."""
    group = shard_group(config, world)
    if group == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // group, group)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def build_model(config: Config, path: str, model_config, processor, world: World) -> PackedLoss:
    """As model.build_model does, but sharded over the ranks."""
    if world.size == 1:
        return model.build_model(config, path, processor, world.device)
    build = build_sharded if config.quantize == "none" else build_quantised
    packed = build(config, path, model_config, processor, world)
    if compilation.is_on(config.compile, world.device):
        compilation.compile_loss(packed)
    torch.manual_seed(config.seed + world.rank)  # dropout draws anew on every rank
    return packed.train()


def build_sharded(config: Config, path: str, model_config, processor, world: World) -> PackedLoss:
    """Rank 0 alone reads the weights; the others begin without memory for them."""
    dtype = choose_dtype(config.dtype, world.device)
    if world.is_first:
        read = load_trainable(config, path, torch.device("cpu"))
        whole = model.pack_loss(read, config, processor, world.device)
    with torch.device("meta"):
        bare = Qwen2VLForConditionalGeneration(model_config)
        packed = model.pack_loss(bare, config, processor, world.device)
    take_precision(packed, from_first_rank(lambda: precision_of(whole)))
    shard(packed, dtype=dtype, **sharding_of(config, world))
    for layer, following in pairwise(layers(packed.model)):
        layer.set_modules_to_forward_prefetch([following])
    packed.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(packed, whole.state_dict() if world.is_first else {}, options=options)
    for name, buffer in packed.named_buffers():  # constants that no checkpoint holds, such as the rotary frequencies
        if world.is_first:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, src=0)
    return packed


def precision_of(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer, by name."""
    return {name: tensor.dtype for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def take_precision(bare: torch.nn.Module, precision: dict[str, torch.dtype]) -> None:
    """Give each tensor of a module without memory the precision that it has on rank 0.

    `module.to(dtype)` would cast the buffers, too: with rotary frequencies in bf16 the angles of a long row are wrong
    by whole radians.
    """
    for name, tensor in [*bare.named_parameters(), *bare.named_buffers()]:
        tensor.data = tensor.data.to(precision[name])


def build_quantised(config: Config, path: str, model_config, processor, world: World) -> PackedLoss:
    """Every rank reads and keeps all weights, as 4 bits cannot be sharded; the adapters are sharded."""
    dtype = choose_dtype(config.dtype, world.device)
    quantised = load_trainable(config, path, world.device)
    packed = model.pack_loss(quantised, config, processor, world.device).to(world.device)
    for parameter in trained_parameters(packed).values():
        dist.broadcast(parameter.data, src=0)
    shard(packed, dtype=dtype, kept_whole=lora.frozen_parameters(packed), **sharding_of(config, world))
    return packed


def sharding_of(config: Config, world: World) -> dict:
    """Over which ranks to shard, and whether a layer's weights are freed between its passes, which only ZeRO-3 does."""
    return {"mesh": make_mesh(config, world), "reshard_after_forward": config.sharding == "full"}


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

    def run_one(self, batch: Batch, divisor: float, is_last: bool) -> torch.Tensor:
        before_backward(self.model, self.config, is_last)
        return super().run_one(batch, divisor / dist.get_world_size(), is_last)


def before_backward(packed: PackedLoss, config: Config, is_last: bool) -> None:
    """Let ZeRO-1 and replicas sum their gradients once a step, in the last backward pass, not in each of them."""
    if dist.get_world_size() == 1:
        return
    if config.sharding == "optimizer":
        packed.set_requires_gradient_sync(is_last)
        packed.set_reshard_after_backward(is_last)
    elif config.sharding == "none" or config.shard_group_size:
        packed.set_requires_all_reduce(is_last)
