"""One rank of a job of up to 1,024, simulated in one process on a CPU: what it holds and what it sends, untimed.

    python benchmarks/simulate.py --out benchmarks/results/simulate.json
    python benchmarks/simulate.py --cases 2b_8 7b_context --layers 2

What runs is the training itself: util/parallel builds and shards the model, lays out the ranks and deals a row of
samples to them, PackedLoss runs forward and backward in EvenPasses, gradients are clipped and AdamW updates. But
tensors are shapes without numbers (torch's FakeTensorMode), and the other ranks are a group that answers every call at
once (torch's fake process group). So 72B on 1,024 ranks takes as little memory as `tiny`, and every collective and
every byte can be counted:

    collectives   what the rank hands in, by kind and by the ranks that take part, against the formulas (`expected`)
    parameters    those that lie on the rank, against the formulas
    peak          the most bytes of living tensors within a step, against util/cost/memory.forecast

Where the training cannot run on shapes alone, `simulated_world` goes around it, and says how.
"""

# ruff: noqa: E402

import argparse
import copy
import math
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import _state_dict_utils
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from benchmarks import scaling
from benchmarks.memory_table import PixelsOfHalf
from benchmarks.report import origin, processor_name, write_result
from tests.count_bytes import OPERATIONS
from tests.official import official_config
from util import model as model_module
from util.collator import Batch, Collator, total_counts
from util.command_line import UserError, run_command
from util.config import Config
from util.conversation import Encoded
from util.cost import memory
from util.cost.memory import GIB
from util.dataset import Sample
from util.kernels import rule
from util.log import versions
from util.loss import PackedLoss
from util.optimizer import build_optimizer, clip_gradient, set_learning_rate
from util.parallel import distributed, rows
from util.parallel.layout import Layout, Place
from util.tensors import run_parameters
from util.vision import Grid, Medium

CPU = torch.device("cpu")

# ---- what is simulated ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A micro-batch: so many samples, each a picture and some text."""

    samples: int
    grid: Grid
    text: int
    supervised: int


IMAGES = Row(4, scaling.SAMPLE.grids[0], text=200, supervised=100)  # of scaling.py's sample
HOUR = Row(1, Grid(512, 32, 32), text=200, supervised=100)  # a video of 131,072 tokens, as of an hour


@dataclass(frozen=True)
class Case:
    """One rank of one job."""

    size: str
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)
    row: Row = IMAGES
    micro_batches: int = 1
    rank: int = 0
    layers: int | None = None  # of the tower and of the language model; None: all of them

    @property
    def config(self) -> Config:
        return Config(model=self.size, device="cpu", dtype="bfloat16", **self.settings)

    def model_config(self):
        made = official_config(self.size)
        if self.layers is not None:
            made.vision_config.depth = min(self.layers, made.vision_config.depth)
            text = made.text_config
            text.num_hidden_layers = min(self.layers, text.num_hidden_layers)
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        return made


SHARDINGS = {
    "full": {},
    "gradients": {"sharding": "gradients"},
    "optimizer": {"sharding": "optimizer"},
    "none": {"sharding": "none"},
    "groups": {"shard_group_size": 8},
}
RECOMPUTED = {"activation_checkpointing": "full"}


def all_cases() -> dict[str, Case]:
    """Another way to lay out ranks is one more line here, and its formula one more in `expected`."""
    cases = {}
    for name, settings in SHARDINGS.items():
        for ranks in (8, 1024):
            if name != "groups" or ranks > 8:
                cases[f"2b_{ranks}_{name}"] = Case("2b", ranks, settings)
        cases[f"2b_64_{name}_twice"] = Case("2b", 64, settings, micro_batches=2)
    for size, ranks in (("7b", 8), ("7b", 64), ("7b", 1024), ("72b", 64), ("72b", 1024)):
        cases[f"{size}_{ranks}_full"] = Case(size, ranks, row=replace(IMAGES, samples=1) if size == "72b" else IMAGES)
    cases["7b_1024_groups"] = Case("7b", 1024, SHARDINGS["groups"])
    cases["7b_8_full_recomputed"] = Case("7b", 8, RECOMPUTED)
    cases["72b_1024_full_recomputed"] = Case("72b", 1024, RECOMPUTED)
    # a video of an hour, its layers run again; heads of 2B (12, and 2 of keys) are dealt to 8 ranks unevenly
    for size, ranks, of_a_row in (("2b", 8, 2), ("2b", 8, 4), ("7b", 8, 4), ("7b", 1024, 4), ("72b", 1024, 8)):
        settings = {"context_parallel_size": of_a_row, **RECOMPUTED}
        cases[f"{size}_{ranks}_context_{of_a_row}"] = Case(size, ranks, settings, row=HOUR)
    cases["2b_8_context_8"] = Case("2b", 8, {"context_parallel_size": 8, **RECOMPUTED})
    for size, ranks, of_a_row in (("2b", 8, 2), ("7b", 64, 4), ("72b", 1024, 8)):
        settings = {"tensor_parallel_size": of_a_row}
        cases[f"{size}_{ranks}_tensor_{of_a_row}"] = Case(size, ranks, settings)
        settings = {**settings, **RECOMPUTED, "sequence_parallel": True}
        cases[f"{size}_{ranks}_tensor_{of_a_row}_by_rows"] = Case(size, ranks, settings)
    cases["7b_8_context_4_kept"] = Case("7b", 8, {"context_parallel_size": 4}, row=IMAGES)
    return cases


def micro_batch(row: Row, mode: FakeTensorMode) -> Batch:
    """Its patches have no numbers; all else is a batch as of real samples, whose indices the training reads."""
    with mode:
        patches = torch.empty(row.grid.patches, 588 * (1 + (row.grid.t > 1)), dtype=torch.uint8)
    learned = [0.0] * (row.text + 1 - row.supervised) + [1.0] * row.supervised  # one token stands for the picture
    medium = Medium(patches, row.grid)
    samples = [Sample(Encoded([5] * len(learned), learned, [10]), [medium], "drawn")] * row.samples
    return Collator()(samples)


# ---- what is counted ------------------------------------------------------------------------------------------------

PASSES, AROUND = "passes", "around them"  # the phases of a step

# operation -> its name here, and which of its arguments the rank hands in
HANDED_IN = {
    **OPERATIONS,
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional.all_to_all_single": ("all_to_all", 0),
    "c10d.alltoall_base_": ("all_to_all", 1),
    "c10d.broadcast_": ("broadcast", 0),
    "_c10d_functional.broadcast": ("broadcast", 0),
    "c10d.send": ("send", 0),
    "c10d.recv_": ("receive", 0),
}
SILENT = {"_c10d_functional.wait_tensor", "c10d.barrier"}  # nothing is handed in


class Kind(NamedTuple):
    """What collectives are told apart by."""

    phase: str
    name: str
    members: int  # ranks that take part
    stride: int  # how far neighbours among them are apart


class Observer(TorchDispatchMode):
    """Sees every operation on tensors: counts collectives, and the bytes of the tensors that live."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.calls: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()
        self.sizes: dict[int, int] = {}  # bytes of each storage that lives
        self.live = self.peak = 0
        self.peak_at = ""
        self.moment = ""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # look at what it does with its local tensors
        name = f"{operation.namespace}.{operation._schema.name.split('::')[1]}"
        if "c10d" in operation.namespace and name not in SILENT:
            self.count(name, arguments)
        if name == "_c10d_functional.wait_tensor":
            return arguments[0]  # under fake tensors it would be a copy
        found = operation(*arguments, **(keywords or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return found

    # collectives

    def count(self, name: str, arguments: tuple) -> None:
        if name not in HANDED_IN:
            raise NotImplementedError(f"a collective that nothing here counts: {name}")
        collective, position = HANDED_IN[name]
        members = dist.get_process_group_ranks(group_of(arguments))
        stride = members[1] - members[0] if len(members) > 1 else 1
        kind = Kind(self.phase, collective, len(members), stride)
        handed_in = arguments[position]
        for tensor in handed_in if isinstance(handed_in, list) else [handed_in]:
            self.bytes[kind] += tensor.numel() * tensor.itemsize
        self.calls[kind] += 1

    # memory

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the memory under a tensor as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            self.resize(key, storage.nbytes())
            weakref.finalize(storage, self.release, key).atexit = False

    def resize(self, key: int, size: int) -> None:
        self.live += size - self.sizes[key]
        self.sizes[key] = size
        if self.live > self.peak:
            self.peak = self.live
            self.peak_at = self.moment

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what frees or regrows a tensor's memory in its place, as FSDP2 does, is seen as well."""
        resize_storage = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            resize_storage(storage, size)
            if storage._cdata in self.sizes:
                self.resize(storage._cdata, storage.nbytes())

        with mock.patch.object(torch.UntypedStorage, "resize_", resize), self:
            yield


def group_of(arguments: tuple) -> dist.ProcessGroup:
    """The process group among the arguments of a collective: itself, or its name, which stands last of all texts."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
    return _resolve_process_group([argument for argument in arguments if isinstance(argument, str)][-1])


# ---- a world of shapes ----------------------------------------------------------------------------------------------


def outside(function: Callable) -> Callable:
    """The same function on real tensors: for what the training reads as numbers, which shapes do not have."""

    def call(*arguments, **named):
        with unset_fake_temporarily():
            return function(*arguments, **named)

    return call


class Said:
    """What the first rank says to all others while the model is built: noted there, and given to another rank later."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.heard = 0

    def broadcast(self, box: list, src: int | None = None, **unused: Any) -> None:
        if dist.get_rank() == (src or 0):
            self.objects.append(copy.deepcopy(box))
        else:
            box[:] = self.objects[self.heard]
            self.heard += 1


@contextmanager
def simulated_world(case: Case, rank: int, model_config, mode: FakeTensorMode, said: Said) -> Iterator[None]:
    """Inside, this process is one of `case.ranks`, and what is built is made of shapes.

    What the training does is left as it is, but for this:
    - Groups that talk over the CPU (gloo) are fake ones, too.
    - Nothing is read from a checkpoint: the first rank's weights are shapes, which it hands to the others as ever. What
      it says to them in objects is noted, and given to whoever else is simulated.
    - Tensors are fake from the moment on at which the sharded model gets memory. What comes before has none anyway.
    - Numbers that all ranks add up (`World.sum`), the mesh, and the places of shards are computed on real tensors.
    - Attention is the operator that a GPU runs (util/kernels), of which the shapes of its outputs are known.
    """
    made = dist.new_subgroups_by_enumeration

    def load_shapes(config: Config, path: str, device: torch.device) -> Qwen2VLForConditionalGeneration:
        with torch.device("meta"):
            bare = Qwen2VLForConditionalGeneration(copy.deepcopy(model_config))
        with mode:
            bare = bare.to_empty(device=device)
            bare.tie_weights()
            return bare

    to_empty = PackedLoss.to_empty
    with ExitStack() as stack:

        def get_memory(packed: PackedLoss, *, device: torch.device) -> PackedLoss:
            stack.enter_context(mode)
            return to_empty(packed, device=device)

        changes = [
            (dist, "new_subgroups_by_enumeration", lambda groups, **backend: made(groups)),
            (dist, "broadcast_object_list", said.broadcast),
            (distributed, "load_trainable", load_shapes),
            (distributed, "choose_attention", lambda *asked: rule.AUTO),
            (model_module, "choose_attention", lambda *asked: rule.AUTO),
            (distributed.World, "sum", outside(distributed.World.sum)),
            (PackedLoss, "to_empty", get_memory),
            (_state_dict_utils, "compute_local_shape_and_global_offset",
             outside(_state_dict_utils.compute_local_shape_and_global_offset)),
            (DeviceMesh, "_concatenate", staticmethod(outside(DeviceMesh._concatenate))),
        ]  # fmt: skip
        for owner, name, instead in changes:
            stack.enter_context(mock.patch.object(owner, name, instead))
        dist.init_process_group("fake", rank=rank, world_size=case.ranks, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        yield


def simulate(case: Case) -> dict[str, Any]:
    """What one step of a case needs, as counted and as computed; `wrong` says where the two differ."""
    began = time.process_time()
    found, job = observe(case)
    found["expected"] = expected(job)
    found["wrong"] = differences(found)
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    return found


def observe(case: Case) -> tuple[dict[str, Any], "Job"]:
    """What was counted in one step of a case, and what the formulas need to know of it."""
    said = Said()
    if case.rank:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with simulated_world(case, 0, case.model_config(), mode, said):
            build(case, case.model_config(), join(case))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model_config = case.model_config()
    batch = micro_batch(case.row, mode)
    observer = Observer()
    with simulated_world(case, case.rank, model_config, mode, said):
        world = join(case)
        share = rows.shares_of(batch, world)[world.row_ranks.index(world.rank)]
        packed = build(case, model_config, world)
        parameters = sum(local(parameter).numel() for parameter in run_parameters(packed).values())
        micro_batches = [replace(share) for _ in range(case.micro_batches)]  # each is one of its own
        train_step(case, packed, world, micro_batches, observer)
        group = distributed.shard_group(case.config, world)
    job = Job(case.model_config(), case.config, world.layout, world.place, group, case.micro_batches, batch, share)
    return {**described(case, observer), "parameters": parameters}, job


def join(case: Case) -> distributed.World:
    return distributed.join_group(case.config, 600)


def build(case: Case, model_config, world: distributed.World) -> PackedLoss:
    return distributed.build_model(case.config, case.size, model_config, PixelsOfHalf(), world)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train_step(case: Case, packed: PackedLoss, world, micro_batches: list[Batch], observer: Observer) -> None:
    """The second step of a run, line by line as in finetune_distributed.py: the optimizer has its moments already."""
    config = case.config
    optimizer = build_optimizer(packed, config, case.micro_batches)
    for parameter in run_parameters(packed).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def run_pass(batch: Batch, supervised_weight: float) -> torch.Tensor:
        observer.moment = "the forward pass"
        batch_loss_sum = packed(batch.to(CPU))
        observer.moment = "the backward pass"
        (batch_loss_sum / supervised_weight).backward()
        return batch_loss_sum.detach()

    # Passes asks the steps of a run only how long its longest sample is, for when memory runs out.
    no_steps = SimpleNamespace(sizes=SimpleNamespace(tokens=np.zeros(1), usable=[0]))
    passes = distributed.EvenPasses(run_pass, packed, optimizer, CPU, no_steps, None, None, config)
    for tensor in held_in_a_step(packed, optimizer, micro_batches):
        observer.hold(tensor)
    with observer.watching():
        observer.phase = AROUND
        totals = world.sum(total_counts(micro_batches))
        observer.phase = PASSES
        passes.run(2, micro_batches, totals["supervised_weight"])
        observer.phase = AROUND
        observer.moment = "the update"
        distributed.drop_blank_gradients(packed, totals["visual_tokens"])
        clip_gradient(packed, optimizer, config.max_grad_norm)
        set_learning_rate(optimizer, 1, 10, config)
        world.sum({"loss": 0.0, "stop": 0, "due": 0})
        optimizer.step()
        optimizer.zero_grad()


def held_in_a_step(
    packed: PackedLoss, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]
) -> Iterator[torch.Tensor]:
    """Weights, buffers and moments on this rank, and its batch."""
    yield from map(local, [*run_parameters(packed).values(), *packed.buffers()])
    for state in optimizer.state.values():
        yield from map(local, state.values())
    for batch in micro_batches:
        yield from (value for value in vars(batch).values() if isinstance(value, torch.Tensor))


def described(case: Case, observer: Observer) -> dict[str, Any]:
    collectives = []
    for kind, calls in sorted(observer.calls.items()):
        collectives.append({**kind._asdict(), "calls": calls, "bytes": observer.bytes[kind]})
    described = {key: value for key, value in asdict(case).items() if key != "row"}
    described["grid"] = list(case.row.grid[:3])
    described["samples"] = case.row.samples
    return {
        **described,
        "collectives": collectives,
        "peak_bytes": observer.peak,
        "peak_at": observer.peak_at,
    }


# ---- what the formulas say ------------------------------------------------------------------------------------------

BF16, FP32 = 2, 4  # bytes
# Linear layers of which a tensor rank has some outputs, and those of which it has some inputs; all else it has whole.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "merger.mlp.0", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj", "attn.proj", "fc2", "merger.mlp.2")


@dataclass
class Job:
    """What the formulas go by."""

    model_config: Any
    config: Config
    layout: Layout
    place: Place
    group: int  # ranks that share one copy of the weights
    micro_batches: int
    batch: Batch  # of all ranks that share a row
    share: Batch  # of this rank

    @property
    def again(self) -> int:
        """How often a layer's forward pass is run once more."""
        return int(self.config.activation_checkpointing == "full")


def expected(job: Job) -> dict[str, Any]:
    """Parameters, collectives of the passes, and memory of this rank, as docs/scaling.md and util/cost have them."""
    units = units_of_rank(job)
    calls: Counter[Kind] = Counter()
    sizes: Counter[Kind] = Counter()
    for formula in (of_weights(units, job), of_context(job), of_tensor(units, job)):
        for kind, number, size in formula:
            calls[kind] += number
            sizes[kind] += size
    found = {
        "parameters": sum(elements_of_shard(shape, job) for unit in units for shape in unit.shapes),
        "collectives": [{**kind._asdict(), "calls": calls[kind], "bytes": sizes[kind]} for kind in sorted(calls)],
    }
    if job.layout.tensor > 1:
        return found  # util/cost forecasts no memory of it
    counts = memory.count_parameters(job.model_config, job.config)
    load = (len(job.batch.input_ids), len(job.batch.vision_position_ids), len(job.batch.target_ids))
    parts = memory.forecast(job.model_config, counts, job.config, torch.bfloat16, [load], job.group, job.micro_batches)
    return {
        **found,
        "peak_bytes": round(sum(parts.values())),
        "peak_at": parts.moment,
        "parts_bytes": {name: round(size) for name, size in parts.items()},
    }


def units_of_rank(job: Job) -> list[scaling.Unit]:
    """The units of FSDP2 with the shapes that one tensor rank has; the root last."""
    ranks = job.layout.tensor
    if ranks == 1:
        return scaling.units_of(job.model_config)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(job.model_config)
    names = {parameter: name for name, parameter in model.named_parameters()}

    def unit(parameters: list[torch.nn.Parameter], is_root: bool = False) -> scaling.Unit:
        shapes = [shape_on_rank(names[parameter], tuple(parameter.shape), ranks) for parameter in parameters]
        return scaling.Unit(shapes, [True] * len(shapes), True, is_root)

    repeated = [list(layer.parameters()) for layer in model_module.layers(model)]
    inside = set(chain.from_iterable(repeated))
    rest = [parameter for parameter in names if parameter not in inside]
    return [*map(unit, repeated), unit(rest, is_root=True)]


def elements_of_shard(shape: tuple[int, ...], job: Job) -> int:
    """Elements of a parameter on this rank: the first dimension is dealt in equal parts, of which the last may lack."""
    place = (job.place.data * job.layout.context + job.place.context) % job.group
    part = -(-shape[0] // job.group)
    return max(0, min(part, shape[0] - place * part)) * math.prod(shape[1:])


def shape_on_rank(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    layer, _, kind = name.rpartition(".")
    if layer.endswith(COLUMNS):
        return (shape[0] // ranks, *shape[1:])
    if layer.endswith(ROWS) and kind == "weight":
        return (shape[0], shape[1] // ranks)
    return shape


def of_weights(units: list[scaling.Unit], job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What FSDP2 gathers and reduces of weights: benchmarks/scaling.py."""
    sharing = job.layout.of_a_weight
    group = job.group
    totals = scaling.bytes_per_step(units, job.config.sharding, sharing, group, job.micro_batches, BF16, FP32)
    for name, total in totals.items():
        members, stride = (sharing // group, group) if name == scaling.REDUCE else (group, 1)
        if total["calls"]:
            yield Kind(PASSES, name, members, stride * job.layout.tensor), total["calls"], total["input_bytes"]


def of_context(job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What context parallelism sends (util/parallel/context.py): two all-to-alls in each layer's forward pass, and two
    in its backward pass.

    With t tokens on each of C ranks and heads of width W: queries, keys and values of this rank's tokens, for all ranks
    on the way there; the mixed values of this rank's heads, of all tokens, on the way back. The backward pass hands in
    as many gradients as the forward pass has received.
    """
    ranks = job.layout.context
    if ranks == 1:
        return
    text = job.model_config.text_config
    width = text.hidden_size // text.num_attention_heads
    tokens = len(job.share.input_ids)
    cuts = [text.num_attention_heads * rank // ranks for rank in range(ranks + 1)]
    shared = text.num_attention_heads // text.num_key_value_heads  # query heads that read one key-value head
    keys = [(end - 1) // shared - begin // shared + 1 for begin, end in pairwise(cuts)]
    place = job.place.context
    queries = cuts[place + 1] - cuts[place]
    there = tokens * (text.num_attention_heads + 2 * sum(keys))
    arrived = ranks * tokens * (queries + 2 * keys[place])
    mixed = ranks * tokens * queries
    returned = tokens * text.num_attention_heads
    forward = job.micro_batches * text.num_hidden_layers * (1 + job.again)
    backward = job.micro_batches * text.num_hidden_layers
    exchange = Kind(PASSES, "all_to_all", ranks, job.layout.tensor)
    yield exchange, 2 * forward, forward * BF16 * width * (there + mixed)
    yield exchange, 2 * backward, backward * BF16 * width * (arrived + returned)
    # visual tokens: those made here, and on the way back the gradients of those that stand here
    visual = len(job.share.sent_index) + len(job.share.visual_index)
    yield exchange, 2 * job.micro_batches, job.micro_batches * visual * BF16 * text.hidden_size


def of_tensor(units: list[scaling.Unit], job: Job) -> Iterator[tuple[Kind, int, int]]:
    """What tensor parallelism sends (util/parallel/tensor.py): sums of rows, twice in a layer and pass."""
    ranks = job.layout.tensor
    if ranks == 1:
        return
    text = job.model_config.text_config
    tower = job.model_config.vision_config
    reduce, gather, scatter = (
        Kind(PASSES, name, ranks, 1) for name in (scaling.REDUCE, scaling.GATHER, scaling.SCATTER)
    )
    times = job.micro_batches
    supervised = len(job.share.target_ids)
    visual = len(job.share.visual_index)
    token = BF16 * text.hidden_size
    tokens = len(job.share.input_ids)
    patches = len(job.share.vision_position_ids)
    of_layers = (text.num_hidden_layers, tokens, token)
    of_blocks = (tower.depth, patches, BF16 * tower.embed_dim)
    for layers, length, row in (of_layers, of_blocks):
        # A layer that is run again ends before its last product's sum, which nothing needs.
        if job.config.sequence_parallel:
            length = -(-length // ranks) * ranks
            gathers = times * (layers * (4 + 2 * job.again) + 2)  # and before the first layer, and after the last
            scatters = times * layers * (4 + job.again)
            yield gather, gathers, gathers * length // ranks * row
            yield scatter, scatters, scatters * length * row
        else:
            sums = times * layers * (4 + job.again)
            yield reduce, sums, sums * length * row
    yield reduce, times, times * tokens * token  # the embedding
    yield reduce, 2 * times, times * visual * (token + BF16 * 4 * tower.embed_dim)  # the merger: sum, and its gradient
    yield reduce, times, times * supervised * token  # the gradient of what the head reads
    yield reduce, 2 * times, times * supervised * FP32 * 3  # of the loss: the largest logit; the sum, and the target's
    yield reduce, 1, FP32 * whole_elements(job)  # equal copies (`agree`)


def whole_elements(job: Job) -> int:
    """Elements on this rank of what every tensor rank has whole."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(job.model_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    whole = [shape for name, shape in shapes.items() if shape_on_rank(name, shape, job.layout.tensor) == shape]
    return sum(elements_of_shard(shape, job) for shape in whole)


def differences(found: dict[str, Any]) -> list[str]:
    """In which lines the simulated rank and the formulas differ; memory is no formula but a forecast, and not here."""
    lines = []
    computed = found["expected"]
    if found["parameters"] != computed["parameters"]:
        lines.append(f"parameters: {found['parameters']:,}, and {computed['parameters']:,} by formula")
    counted = by_kind(found["collectives"])
    by_formula = by_kind(computed["collectives"])
    for kind in sorted(counted.keys() | by_formula.keys()):
        if kind.phase == PASSES and counted.get(kind) != by_formula.get(kind):
            lines.append(f"{kind.name} of {kind.members} ranks: (calls, bytes) {counted.get(kind)}, and "
                         f"{by_formula.get(kind)} by formula")  # fmt: skip
    return lines


def by_kind(collectives: list[dict]) -> dict[Kind, tuple[int, int]]:
    return {Kind(*(row[name] for name in Kind._fields)): (row["calls"], row["bytes"]) for row in collectives}


# ---- the command ----------------------------------------------------------------------------------------------------


def table(found: dict[str, dict]) -> list[str]:
    """The cases as a Markdown table."""
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    head = ["case", "parameters", *(f"{kind.replace('_', '-')} GB" for kind in kinds), "collectives", "formulas",
            "peak GiB", "forecast GiB", "ratio"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name, row in found.items():
        sizes: Counter[str] = Counter()
        calls = 0
        for collective in row["collectives"]:
            if collective["phase"] == PASSES:
                sizes[collective["name"]] += collective["bytes"]
                calls += collective["calls"]
        peak = row["peak_bytes"] / GIB
        forecast = row["expected"].get("peak_bytes", math.nan) / GIB
        lines.append([
            name, f"{row['parameters']:,}", *(f"{sizes[kind] / 1e9:.2f}" for kind in kinds), f"{calls:,}",
            "differ" if row["wrong"] else "equal", f"{peak:.2f}", f"{forecast:.2f}", f"{forecast / peak:.2f}",
        ])  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


def main(arguments: list[str]) -> None:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", nargs="*", default=[""], help="those whose names begin so; default: all")
    parser.add_argument("--layers", type=int, help="only so many of the tower and of the language model")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a case at a time")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    own = parser.parse_args(arguments)
    cases = {}
    for name, case in all_cases().items():
        if name.startswith(tuple(own.cases)):
            cases[name] = replace(case, layers=own.layers) if own.layers else case
    if not cases:
        raise UserError(f"--cases {' '.join(own.cases)}: none begins so; there are {', '.join(all_cases())}")
    with ExitStack() as stack:
        run = map
        if own.workers > 1:
            run = stack.enter_context(ProcessPoolExecutor(own.workers, get_context("spawn"))).map
        done = tqdm(run(simulate, cases.values()), total=len(cases), unit="case")
        found = dict(zip(cases, done, strict=True))
    print("\n".join(table(found)))
    wrong = [f"{name}: {line}" for name, row in found.items() for line in row["wrong"]]
    print("\n".join(wrong))
    device = f"simulated, nothing timed, on {processor_name()}"
    write_result({**origin("simulate.py", arguments, device=device), "versions": versions(), "cases": found}, own.out)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
