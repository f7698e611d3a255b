"""The memory forecast against what autograd really keeps for the backward pass."""

import copy
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.official import official_config
from util.collator import Collator
from util.command_line import UserError
from util.config import Config
from util.conversation import Encoded
from util.cost import allocator, memory
from util.cost.activations import kept_by
from util.dataset import Sample, Samples, load_examples
from util.family import new_model
from util.model import build_model, load_config, prepare_model
from util.optimizer import build_optimizer, clip_gradient
from util.steps import Survey
from util.vision import Budget, Grid, Medium

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def kept_for_backward(config: Config, model_config, processor, samples: list[Sample]) -> int:
    """Bytes of the distinct tensors that the forward pass saves, weights and their copies apart."""
    model = prepare_model(new_model(copy.deepcopy(model_config)), config, processor, CPU)
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    saved = {}

    def keep(tensor: torch.Tensor) -> None:
        """There is no backward pass: nothing is handed back. The tensor itself would keep its graph alive for good."""
        if tuple(tensor.shape) not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        model(Collator(model_config.model_type)(samples))
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [[], ["vision", "merger"], ["language_model"]])
def test_activations_are_forecast_within_15_percent(dtype, frozen, processor):
    model_config = official_config("2b")
    text, tower = model_config.text_config, model_config.vision_config
    text.num_hidden_layers = tower.depth = 2
    text.layer_types, text.vocab_size = text.layer_types[:2], 2048
    text.intermediate_size = 4000  # the widths' proportions matter, their size does not
    grid = Grid(1, 24, 36)
    patches = Medium(torch.zeros(grid.patches, 588, dtype=torch.uint8), grid, is_video=False)
    samples = [Sample(Encoded([5] * 400, [False] * 350 + [True] * 50, [10]), [patches], "a sample")] * 2
    config = Config(device="cpu", dtype=dtype, freeze=frozen, attention="sdpa")
    measured = kept_for_backward(config, model_config, processor, samples)
    load = (2 * (399 + grid.tokens), 2 * grid.patches, 2 * 50)
    kept = kept_by(model_config, config, getattr(torch, dtype), load)
    # of a logit's three numbers at the loss the forward pass keeps one; attention on a CPU is torch's dense one
    forecast = kept.total + kept.logits / 3
    if dtype == "bfloat16" and "language_model" not in frozen:
        # on a CPU an RMSNorm is several operations, which keep its input in fp32; on a GPU it is one
        forecast += 2 * 2 * load[0] * 4 * text.hidden_size
    assert forecast == pytest.approx(measured, rel=0.15)


PEAKS = {
    "all trained": {},
    "checkpointing": {"activation_checkpointing": "full"},
    "frozen tower": {"freeze": ["vision"]},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_step_is_forecast_within_15_percent(name, tiny_path, processor):
    """Against every allocation of a whole step on the CPU, as PyTorch's profiler counts them."""
    config = Config(**{"device": "cpu", "dtype": "float32", **PEAKS[name]})
    model_config, budget = (
        load_config(str(tiny_path)),
        Budget(min_pixels=3136, max_pixels=28 * 28 * 64, video_max_frames=4),
    )
    samples = Samples(load_examples([str(ROOT / "train_data" / "data.json")], processor), processor, budget)
    batch, sizes = Collator()([samples[i] for i in range(16)]), [samples.size(i) for i in range(16)]
    model = build_model(config, str(tiny_path), processor, CPU)
    optimizer = build_optimizer(model, config)

    def step() -> None:
        (model(batch) / len(batch.target_ids)).backward()
        clip_gradient(model, optimizer, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    measured = max(held) + sum(tensor.nbytes for tensor in [*model.parameters(), *states])
    load = [sum(getattr(size, name) for size in sizes) for name in ("tokens", "patches", "supervised")]
    parts = memory.forecast(
        model_config, memory.count_parameters(model_config, Config()), config, getattr(torch, config.dtype), [load]
    )
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15), parts


TOTAL = 2_208_985_600  # parameters of 2B
BLOCK = 2 * 2 * 1280 + 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 2 * 1280 * 5120 + 5120 + 1280
TOWER = 32 * BLOCK + 1176 * 1280  # and the patch embedding
MERGER = 2 * 1280 + 5120 * 5120 + 5120 + 5120 * 1536 + 1536


def forecast_of(config: Config, load: tuple, size: str = "2b", **given) -> memory.Forecast:
    model_config = official_config(size)
    counts = memory.count_parameters(model_config, config)
    return memory.forecast(model_config, counts, config, torch.bfloat16, [load] if load else [], **given)


def test_states_are_14_bytes_per_parameter_and_16_of_several_micro_batches():
    """bf16 weight, the 16 bits that it lacks, two fp32 moments; the gradient in bf16, or in fp32 where it is a sum."""
    for passes, size in ((1, 14), (2, 16)):
        parts = forecast_of(Config(), (), passes=passes)
        assert parts["weights"] + parts["gradients"] + parts["moments"] == size * TOTAL
    frozen = forecast_of(Config(freeze=["vision"]), ())
    assert frozen["weights"] == 4 * TOTAL - 2 * TOWER
    assert frozen["gradients"] + frozen["moments"] == 10 * (TOTAL - TOWER)


def test_text_alone_makes_no_gradients_and_moments_of_the_tower():
    text = TOTAL - TOWER - MERGER
    parts = forecast_of(Config(), (4096, 0, 100))
    assert parts["moments"] == 8 * text
    assert forecast_of(Config(), (4096, 4, 100))["moments"] == 8 * TOTAL
    assert forecast_of(Config(), (4096, 0, 100), passes=2)["gradients"] >= 4 * text
    assert forecast_of(Config(), (4096, 0, 100), shards=8)["moments"] == TOTAL, "a rank of several has dummy patches"


def test_gradients_lie_beside_all_activations_only_where_a_step_has_several_micro_batches():
    """A long row: the peak is at the loss. In the only pass of a step no gradient but the head's can be there then."""
    load = (20480, 40960, 5000)
    one, two = forecast_of(Config(), load), forecast_of(Config(), load, passes=2)
    head = 151_936 * 1536
    assert one.moment == two.moment == "the loss"
    assert one["activations"] == two["activations"]
    assert one["gradients"] == 2 * head, "of the first chunks of logits"
    assert two["gradients"] == 4 * (TOTAL + head)


def test_few_activations_leave_the_peak_at_the_end_of_the_backward_pass():
    parts = forecast_of(Config(activation_checkpointing="full"), (300, 400, 20))
    assert parts.moment == "the end of the backward pass"
    assert parts["gradients"] == 2 * TOTAL


TABLES = [ROOT / "benchmarks" / "results" / f"memory_{name}.json" for name in ("eager", "compiled")]
WITHIN = 0.08


@cache
def counted(size: str) -> tuple:
    return official_config(size), memory.count_parameters(official_config(size), Config())


def size_of(case: str) -> tuple:
    """The config and the parameters of the size that a case's name begins with: `2b`, `qwen2.5_3b`."""
    return counted(re.split("_(?=short|long|text)", case)[0])


def errors_of_forecasts(table: Path) -> dict[str, float]:
    """By how much each case that was measured is forecast too high or too low."""
    found = {}
    for name, row in json.loads(table.read_text())["cases"].items():
        given = {"passes": row["micro_batches"], "device": torch.device("cuda")}
        config = Config(**row["settings"])
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        model_config, counts = size_of(name)
        load = (row["tokens"], row["patches"], row["supervised"])
        parts = memory.forecast(model_config, counts, config, dtype, [load], **given)
        found[name] = sum(parts.values()) / (row["allocated_gib"] * 2**30) - 1
    return found


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_what_was_measured_is_forecast_within_8_percent(table):
    """The allocator's peaks in real-size steps, as benchmarks/memory_table.py wrote them down."""
    errors = errors_of_forecasts(table)
    assert len(errors) >= 40
    wrong = {name: f"{error:+.1%}" for name, error in errors.items() if abs(error) > WITHIN}
    assert not wrong


def gradients_always(kept, gradients, is_compiled):
    return MOMENTS(kept, dataclasses.replace(gradients, all_at_once=True), is_compiled)


def tower_always(*arguments):
    return GRADIENTS(*arguments[:4], True, *arguments[5:])


def end_of_forward_alone(kept, gradients, is_compiled):
    return {"the loss": MOMENTS(kept, gradients, is_compiled)["the loss"]}


MOMENTS, GRADIENTS = memory.moments, memory.Gradients.of
PLANTED = {
    "gradients beside activations": (memory, "moments", gradients_always, "2b_short_full"),
    "the tower charged on text": (memory.Gradients, "of", tower_always, "2b_text_full"),
    "the end of the forward pass alone": (memory, "moments", end_of_forward_alone, "7b_short_recomputed"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_forecast_is_seen(name, monkeypatch):
    where, attribute, wrong, case = PLANTED[name]
    monkeypatch.setattr(where, attribute, wrong)
    assert abs(errors_of_forecasts(TABLES[0])[case]) > WITHIN


def test_what_lies_idle_between_tensors_counts_too(monkeypatch):
    """Refused where only the tensors themselves would fit; not where there is a tenth more."""
    parts = forecast_of(Config(), (4096, 4096, 1000))
    tensors = sum(parts.values())
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    survey = Survey(1)
    survey.most = 1

    def refuses(free: float, told: str) -> bool:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", told)
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        model_config, device = official_config("2b"), torch.device("cuda")
        try:
            memory.check(model_config, Config(), torch.bfloat16, device, survey, parts)
        except UserError:
            return True
        return False

    for told, least in (("expandable_segments:False", 1.07), ("expandable_segments:True", 1.02)):
        assert refuses(tensors * least, told)
        assert not refuses(tensors * least + 0.5 * 2**30, told)
    monkeypatch.setattr(allocator, "IDLE", 0)
    monkeypatch.setattr(allocator, "KERNELS", 0)
    assert not refuses(tensors * 1.07, "expandable_segments:False"), "the check above looks at the margin"


@pytest.mark.parametrize(
    ("set_already", "can", "left"),
    [
        ({}, True, "expandable_segments:True"),
        ({}, False, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, True, "max_split_size_mb:128"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, True, None),
    ],
)
def test_segments_grow_where_the_driver_can_and_the_user_has_set_nothing(set_already, can, left, monkeypatch):
    for variable in allocator.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in set_already.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(allocator, "has_virtual_memory", lambda number: can)
    allocator.use_expandable_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == left
    assert allocator.segments_expand() == (left == "expandable_segments:True")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


def test_sharding_divides_what_is_kept_once():
    """2B on 8 devices, without activations, by hand: weights and moments are an eighth of 12 bytes a parameter. `full`
    needs most when the root's whole gradients, in bf16, are copied to be reduced in fp32; where bf16 weights stay whole
    that is so for the last layer's, beside the head's; `optimizer` also adds up whole gradients in fp32, and there are
    the root's once more, and an embedding's that are added to the head's."""
    model_config = official_config("2b")
    counts, total = memory.count_parameters(model_config, Config()), 2_208_985_600
    layer = 2 * (1536 * 1536 + 1536) - 1536 + 2 * (256 * 1536 + 256) + 3 * 8960 * 1536 + 2 * 1536
    merger = 2 * 1280 + (5120 * 5120 + 5120) + (1536 * 5120 + 1536)
    head = 151_936 * 1536
    root = head + 1536 + 1280 * 1176 + merger
    states = {}
    for sharding, passes in (("full", 1), ("gradients", 1), ("optimizer", 1), ("optimizer", 2)):
        config = Config(sharding=sharding)
        parts = memory.forecast(model_config, counts, config, torch.bfloat16, [], shards=8, passes=passes)
        assert parts["weights"] + parts["moments"] == 12 * total / 8
        states[sharding, passes] = sum(parts.values()) - 12 * total / 8
    # (the last norm and the patch embedding are the root's, and not reduced earlier: too few to be told apart)
    assert states["full", 1] == pytest.approx(4 * (total - root) / 8 + (2 + 4) * root, rel=1e-3)
    assert states["gradients", 1] == states["optimizer", 1] == 2 * (total - layer) + 2 * head + (2 + 4) * layer
    assert states["optimizer", 2] == 2 * total + 4 * total + 2 * root + 2 * head


def test_the_peak_is_of_this_program_not_of_the_one_that_started_it():
    held = torch.ones(2**28)  # 1 GiB here, none of it in the child
    asked = "import torch; from util.cost.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30 < held.nbytes + int(done.stdout)
