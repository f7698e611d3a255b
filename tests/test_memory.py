"""The memory forecast against what autograd really keeps for the backward pass."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2VLForConditionalGeneration

from tests.official import official_config
from util.collator import Collator
from util.config import Config
from util.conversation import Encoded
from util.cost import memory
from util.dataset import Sample, Samples, load_examples
from util.model import build_model, load_config, prepare_model
from util.optimizer import build_optimizer, clip_gradient
from util.vision import Budget, Grid, Medium

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def kept_for_backward(config: Config, model_config, processor, samples: list[Sample]) -> int:
    """Bytes of the distinct tensors that the forward pass saves, weights and their copies apart."""
    model = prepare_model(Qwen2VLForConditionalGeneration(copy.deepcopy(model_config)), config, processor, CPU)
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    saved = {}

    def keep(tensor: torch.Tensor) -> None:
        """There is no backward pass: nothing is handed back. The tensor itself would keep its graph alive for good."""
        if tuple(tensor.shape) not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        model(Collator()(samples))
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
    patches = Medium(torch.zeros(grid.patches, 588, dtype=torch.uint8), grid)
    samples = [Sample(Encoded([5] * 400, [False] * 350 + [True] * 50, [10]), [patches], "a sample")] * 2
    config = Config(device="cpu", dtype=dtype, freeze=frozen)
    measured = kept_for_backward(config, model_config, processor, samples)
    load = (2 * (399 + grid.tokens), 2 * grid.patches, 2 * 50)
    forecast = sum(memory.activations(model_config, config, getattr(torch, dtype), load)[:2])
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


def test_states_are_16_bytes_per_parameter():
    model_config = official_config("2b")
    counts = memory.count_parameters(model_config, Config())
    parts = memory.forecast(model_config, counts, Config(), torch.bfloat16, [])
    assert parts["weights"] + parts["gradients"] + parts["moments"] == 16 * 2_208_985_600
    frozen = memory.forecast(model_config, counts, Config(freeze=["vision"]), torch.bfloat16, [])
    assert frozen["gradients"] + frozen["moments"] == 12 * (2_208_985_600 - counts["vision"])


def test_sharding_divides_what_is_kept_once():
    """8 devices: full sharding keeps an eighth; with `gradients` the bf16 weights stay whole, with `optimizer` gradients too."""
    model_config = official_config("2b")
    counts, total = memory.count_parameters(model_config, Config()), 2_208_985_600
    states = {}
    for sharding in ("full", "gradients", "optimizer"):
        parts = memory.forecast(model_config, counts, Config(sharding=sharding), torch.bfloat16, [], shards=8)
        assert parts["weights"] + parts["gradients"] + parts["moments"] == 2 * total
        states[sharding] = sum(parts.values())
    assert states["gradients"] == 2 * total + 2 * total
    assert states["optimizer"] == 2 * total + 2 * total + 4 * total
    assert states["full"] < states["gradients"]


def test_the_peak_is_of_this_program_not_of_the_one_that_started_it():
    held = torch.ones(2**28)  # 1 GiB here, none of it in the child
    asked = "import torch; from util.cost.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30 < held.nbytes + int(done.stdout)
