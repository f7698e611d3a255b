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
    peak          the most bytes of living tensors within the passes, against util/cost/memory.forecast

Where the training cannot run on shapes alone, `simulated_world` goes around it, and says how.
"""

# ruff: noqa: E402

import argparse
import copy
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
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
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from benchmarks import scaling
from benchmarks.formulas import AROUND, PASSES, Job, Kind, expected
from benchmarks.memory_table import PixelsOfHalf
from benchmarks.report import origin, processor_name, write_result
from tests.count_bytes import OPERATIONS
from tests.official import official_config
from util import model as model_module
from util.collator import Batch, Collator, total_counts
from util.command_line import UserError, run_command
from util.config import Config
from util.conversation import Encoded
from util.cost.memory import GIB
from util.cost.sizes import Finding, Sizes
from util.cost.stages import cut_of
from util.dataset import Sample, Size
from util.kernels import rule
from util.log import versions
from util.loss import PackedLoss
from util.optimizer import build_optimizer, clip_gradient, set_learning_rate
from util.parallel import distributed, rows
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

    def with_layers(self, layers: int) -> "Case":
        """With fewer layers, at least one for each stage of a pipeline."""
        return replace(self, layers=max(layers, self.settings.get("pipeline_parallel_size", 1)))

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
# All that is counted grows by as much with each layer, so a few show it; these are run with all of them.
WHOLE = ("2b_8_full", "7b_1024_full", "72b_64_full_recomputed", "72b_1024_context_8")
FEW = 2  # layers of the tower and of the language model


def all_cases() -> dict[str, Case]:
    """Another way to lay out ranks is one more line here, and its formula one more in `expected`."""
    cases = {}
    for name, settings in SHARDINGS.items():
        for ranks in (8, 1024):
            if name != "groups" or ranks > 8:
                cases[f"2b_{ranks}_{name}"] = Case("2b", ranks, settings)
        cases[f"2b_64_{name}_twice"] = Case("2b", 64, settings, micro_batches=2)
    for size, ranks in (("7b", 8), ("7b", 1024), ("72b", 64), ("72b", 1024)):
        cases[f"{size}_{ranks}_full"] = Case(size, ranks)
    cases["7b_1024_groups"] = Case("7b", 1024, SHARDINGS["groups"])
    for ranks in (64, 1024):
        cases[f"72b_{ranks}_full_recomputed"] = Case("72b", ranks, RECOMPUTED)
    # a video of an hour, its layers run again; and heads of 2B (12, and 2 of keys), which are dealt to 8 unevenly
    for size, ranks, of_a_row in (("2b", 8, 2), ("7b", 8, 4), ("72b", 1024, 8)):
        settings = {"context_parallel_size": of_a_row, **RECOMPUTED}
        cases[f"{size}_{ranks}_context_{of_a_row}"] = Case(size, ranks, settings, row=HOUR)
    cases["2b_8_context_8"] = Case("2b", 8, {"context_parallel_size": 8}, rank=5)
    for size, ranks, of_a_row in (("2b", 8, 2), ("7b", 64, 4), ("72b", 1024, 8)):
        settings = {"tensor_parallel_size": of_a_row}
        cases[f"{size}_{ranks}_tensor_{of_a_row}"] = Case(size, ranks, settings)
        settings = {**settings, **RECOMPUTED, "sequence_parallel": True}
        cases[f"{size}_{ranks}_tensor_{of_a_row}_by_rows"] = Case(size, ranks, settings)
    # the first stage has the tower and the embedding, the last one the head
    for size, ranks, stages, rank in (("2b", 8, 2, 0), ("2b", 8, 2, 4), ("7b", 64, 4, 16), ("72b", 1024, 8, 896)):
        settings = {"pipeline_parallel_size": stages, "sharding": "optimizer"}
        name = f"{size}_{ranks}_pipeline_{stages}_rank_{rank}"
        cases[name] = Case(size, ranks, settings, row=replace(IMAGES, samples=1), micro_batches=2 * stages, rank=rank)
    cases |= combined_cases()
    return {name: case if name in WHOLE else case.with_layers(FEW) for name, case in cases.items()}


def combined_cases() -> dict[str, Case]:
    """Several axes at once, by what has to be told apart: the first stage and the last, and how layers are kept."""
    cases = {}
    image = replace(IMAGES, samples=1)
    for rank, checkpointing in ((1, "none"), (5, "selective")):
        settings = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "activation_checkpointing": checkpointing}
        cases[f"2b_8_tensor_2_pipeline_2_rank_{rank}"] = Case("2b", 8, settings, image, 4, rank)
    for checkpointing in ("none", "selective", "full"):
        settings = {"context_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True}
        settings["activation_checkpointing"] = checkpointing
        cases[f"7b_8_tensor_2_context_2_{checkpointing}"] = Case("7b", 8, settings, rank=2)
    for rank in (0, 7):
        settings = {name: 2 for name in ("pipeline_parallel_size", "context_parallel_size", "tensor_parallel_size")}
        cases[f"2b_8_2_2_2_rank_{rank}"] = Case("2b", 8, {**settings, "sequence_parallel": True}, image, 4, rank)
    settings = {"tensor_parallel_size": 8, "pipeline_parallel_size": 4, "sequence_parallel": True, **RECOMPUTED}
    settings["sharding"] = "optimizer"
    cases["72b_64_tensor_8_pipeline_4"] = Case("72b", 64, settings, micro_batches=8)
    settings = {**settings, "context_parallel_size": 2}
    cases["72b_1024_tensor_8_pipeline_4_context_2"] = Case("72b", 1024, settings, micro_batches=8)
    return cases


def micro_batch(row: Row, mode: FakeTensorMode) -> Batch:
    """Its patches have no numbers; all else is a batch as of real samples, whose indices the training reads."""
    with mode:
        patches = torch.empty(row.grid.patches, 588 * (1 + (row.grid.t > 1)), dtype=torch.uint8)
    learned = [0.0] * (row.text + 1 - row.supervised) + [1.0] * row.supervised  # one token stands for the picture
    medium = Medium(patches, row.grid, is_video=row.grid.t > 1)
    samples = [Sample(Encoded([5] * len(learned), learned, [10]), [medium], "drawn")] * row.samples
    return Collator()(samples)


# ---- what is counted ------------------------------------------------------------------------------------------------

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
        self.tries_rules = False  # DTensor does, on whole shapes, which nobody holds

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # look at what it does with its local tensors
        name = f"{operation.namespace}.{operation._schema.name.split('::')[1]}"
        if "c10d" in operation.namespace and name not in SILENT:
            self.count(name, arguments)
        if name == "_c10d_functional.wait_tensor":
            return arguments[0]  # under fake tensors it would be a copy
        found = operation(*arguments, **(keywords or {}))
        if self.phase != PASSES or self.tries_rules:
            return found
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
        try_rules = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            resize_storage(storage, size)
            if storage._cdata in self.sizes:
                self.resize(storage._cdata, storage.nbytes())

        def unseen(*arguments: Any) -> Any:
            self.tries_rules = True
            try:
                return try_rules(*arguments)
            finally:
                self.tries_rules = False

        with (
            mock.patch.object(torch.UntypedStorage, "resize_", resize),
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
            self,
        ):
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


@cache
def norm_of_shapes() -> Callable:
    """RMSNorm in one kernel, of shapes alone: (T, D) -> (T, D), and a number of each row in fp32 for the backward pass.

    Made when it is first needed: where this file is read a second time, as a script beside the module, an operator of
    the same name takes the place of the first one, and a call of that one ends the process.
    """

    @torch.library.custom_op("simulation::fused_norm", mutates_args=())
    def fused_norm(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("it has no numbers")

    @torch.library.custom_op("simulation::fused_norm_backward", mutates_args=())
    def fused_norm_backward(
        gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, of_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("it has no numbers")

    @fused_norm.register_fake
    def _(hidden, weight):
        return torch.empty_like(hidden), hidden.new_empty(len(hidden), 1, dtype=torch.float32)

    @fused_norm_backward.register_fake
    def _(gradient, hidden, weight, of_rows):
        return torch.empty_like(hidden), torch.empty_like(weight)

    def keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.set_materialize_grads(False)  # what was kept of the rows has no gradient

    def backward(ctx: Any, gradient: torch.Tensor, unused: None) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_norm_backward(gradient, *ctx.saved_tensors)

    fused_norm.register_autograd(backward, setup_context=keep_for_backward)
    return fused_norm


@contextmanager
def simulated_world(case: Case, rank: int, model_config, mode: FakeTensorMode, said: Said) -> Iterator[None]:
    """Inside, this process is one of `case.ranks`, and what is built is made of shapes.

    What the training does is left as it is, but for this:
    - Groups that talk over the CPU (gloo) are fake ones, too.
    - Nothing is read from a checkpoint: the first rank's weights are shapes, which it hands to the others as ever. What
      it says to them in objects is noted, and given to whoever else is simulated.
    - Tensors are fake from the moment on at which the sharded model gets memory. What comes before has none anyway.
    - Numbers that all ranks add up (`World.sum`), the mesh, and the places of shards are computed on real tensors.
    - Attention is the operator that a GPU runs (util/kernels), of which the shapes of its outputs are known, and
      RMSNorm a stand-in for a GPU's kernel: on a CPU torch writes it out, and keeps four tensors in fp32.
    """
    made = dist.new_subgroups_by_enumeration
    norm = norm_of_shapes()

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
            (dist, "new_subgroups_by_enumeration", lambda groups, *timeout, **backend: made(groups)),
            (dist, "broadcast_object_list", said.broadcast),
            (torch.nn.functional, "rms_norm", lambda hidden, shape, weight, epsilon: norm(hidden, weight)[0]),
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
        # DTensor remembers meshes, and with them the groups of a world that is gone.
        _clear_sharding_prop_cache()
        stack.callback(_clear_sharding_prop_cache)
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


def observe(case: Case) -> tuple[dict[str, Any], Job]:
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
        layers = [int(name) for name in packed.model.model.language_model.layers._modules]
    job = Job(
        case.model_config(), case.config, world.layout, world.place, group, case.micro_batches, batch, share,
        range(layers[0], layers[-1] + 1), cut_of(model_config, case.config, sizes_of(case)),
    )  # fmt: skip
    return {**described(case, observer), "parameters": parameters}, job


def join(case: Case) -> distributed.World:
    return distributed.join_group(case.config, 600)


def build(case: Case, model_config, world: distributed.World) -> PackedLoss:
    return distributed.build_model(case.config, case.size, model_config, PixelsOfHalf(), world, sizes_of(case))


def sizes_of(case: Case) -> Sizes:
    """Of the samples, by whose work the layers are cut into stages."""
    return Sizes.of([Finding(Size(case.row.text + case.row.grid.tokens, case.row.supervised, [case.row.grid]))])


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
        observer.moment = "the passes"
        passes.run(2, micro_batches, totals["supervised_weight"])
        observer.phase = AROUND
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


# ---- against the formulas -------------------------------------------------------------------------------------------


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


COLUMNS_OF_TABLE = (
    "case", "layers", "parameters", "all-gather GB", "reduce-scatter GB", "all-reduce GB", "all-to-all GB", "sent GB",
    "collectives", "formulas", "peak GiB", "forecast GiB", "forecast / peak",
)  # fmt: skip


def table(found: dict[str, dict]) -> list[str]:
    """The cases as a Markdown table."""
    lines = [list(COLUMNS_OF_TABLE), ["---"] * len(COLUMNS_OF_TABLE)]
    for name, row in found.items():
        passes = [collective for collective in row["collectives"] if collective["phase"] == PASSES]
        sizes: Counter[str] = Counter()
        for collective in passes:
            sizes[collective["name"]] += collective["bytes"]
        kinds = (scaling.GATHER, scaling.SCATTER, scaling.REDUCE, "all_to_all", "send")
        calls = sum(collective["calls"] for collective in passes)
        forecast = row["expected"].get("peak_bytes")
        lines.append([
            name,
            str(row["layers"] or "all"),
            f"{row['parameters']:,}",
            *(f"{sizes[kind] / 1e9:.2f}" for kind in kinds),
            f"{calls:,}",
            "differ" if row["wrong"] else "equal",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{forecast / GIB:.2f}" if forecast else "none",
            f"{forecast / row['peak_bytes']:.2f}" if forecast else "",
        ])  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


def main(arguments: list[str]) -> None:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", nargs="*", default=[""], help="those whose names begin so; default: all")
    parser.add_argument("--layers", type=int, help="in all cases so many of the tower and of the language model")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a case at a time")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    own = parser.parse_args(arguments)
    cases = {}
    for name, case in all_cases().items():
        if name.startswith(tuple(own.cases)):
            cases[name] = case.with_layers(own.layers) if own.layers else case
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
