"""Pipeline, data, context and tensor parallelism at once, on 4 real processes (gloo, CPU), with --slow on 8: the same
losses and weights as finetune.py."""

from pathlib import Path

import pytest

import finetune
from tests.runs import metrics, weights
from tests.test_distributed import ROOT, settings, torchrun
from util.config import Config
from util.model import load_weights
from util.parallel.layout import Layout
from util.parallel.settings import ParallelSettings

SHOWCASE = ROOT / "train_data" / "data.json"
EVALUATED = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2, "save_every": 2, "final": "last"}
PIPELINE = {"pipeline_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
TENSOR = {"tensor_parallel_size": 2}
FOUR = {
    "stages of matrices in parts": {**PIPELINE, **TENSOR, "sequence_parallel": True, "sharding": "optimizer"},
    "rows in parts through stages": {**PIPELINE, **CONTEXT, "activation_checkpointing": "full"},
    "rows and matrices in parts": {**CONTEXT, **TENSOR, **EVALUATED, "sharding": "gradients"},
}
EIGHT = {
    "all at once": {**PIPELINE, **CONTEXT, **TENSOR},
    "stages, samples and matrices": {**PIPELINE, **TENSOR, "activation_checkpointing": "selective", **EVALUATED},
    "frozen tower": {**PIPELINE, **CONTEXT, **TENSOR, "freeze": ["vision", "merger"], "sequence_parallel": True},
    "accumulation": {**PIPELINE, **TENSOR, "micro_batch_size": 1, "sharding": "none"},
}
ALONE = ("freeze", "eval_data", "eval_every", "save_every", "final", "micro_batch_size")  # what matters there, too


def run(tiny_path: Path, directory: Path, changes: dict) -> dict:
    return settings(tiny_path, SHOWCASE, directory, **{"max_steps": 4, **changes})


def trained_together(cases: dict[str, dict], processes: int, tiny_path: Path, folder: Path) -> Path:
    """Each case on one process and on several, in folders of its name."""
    made: dict[str, str] = {}  # what was trained on one process, by its settings
    for name, changes in cases.items():
        own = {key: value for key, value in changes.items() if key in ALONE}
        directory = folder / f"one {name}"
        if str(own) in made:
            directory.symlink_to(made[str(own)])
        else:
            made[str(own)] = finetune.train(Config(**run(tiny_path, directory, own)))
    together = [run(tiny_path, folder / name, changes) for name, changes in cases.items()]
    torchrun(processes, together, folder)
    return folder


@pytest.fixture(scope="module")
def four(tiny_path, tmp_path_factory) -> Path:
    return trained_together(FOUR, 4, tiny_path, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def eight(tiny_path, tmp_path_factory) -> Path:
    return trained_together(EIGHT, 8, tiny_path, tmp_path_factory.mktemp("eight"))


def check_same(together: Path, alone: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        found, expected = metrics(together, key), metrics(alone, key)
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-12), key
    for key in ("samples", "tokens", "visual_tokens", "supervised_tokens"):
        assert metrics(together, key) == metrics(alone, key), key
    found, expected = weights(together), weights(alone)
    assert found.keys() == expected.keys()
    worst = max(expected, key=lambda name: (found[name] - expected[name]).abs().max().item())
    gap = (found[worst] - expected[worst]).abs().max().item()
    assert gap < 1e-11, f"{worst} differs by {gap:.1e}"


@pytest.mark.parametrize("name", FOUR)
def test_two_axes_at_once_are_one_process(name, four):
    check_same(four / name, four / f"one {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_all_axes_at_once_are_one_process(name, eight):
    check_same(eight / name, eight / f"one {name}")


def test_a_checkpoint_knows_no_layout(four, tiny_path, tmp_path):
    """One of rows and matrices in parts goes on in one process, to where the run went that was never stopped."""
    own = {**EVALUATED, "resume": str(four / "rows and matrices in parts" / "checkpoints" / "step_000002")}
    gone_on = Path(finetune.train(Config(**run(tiny_path, tmp_path / "gone on", own))))
    found, expected = weights(gone_on), weights(four / "one rows and matrices in parts")
    worst = max(expected, key=lambda name: (found[name] - expected[name]).abs().max().item())
    gap = (found[worst] - expected[worst]).abs().max().item()
    assert gap < 1e-11, f"{worst} differs by {gap:.1e}"


def test_the_model_opens_in_transformers(four):
    for name in FOUR:
        load_weights(str(four / name), dtype=None, device="cpu")  # which raises for a weight too few or too many


def test_every_rank_has_a_place_of_its_own():
    """2 x 2 x 2 x 2, written by hand: outermost pipeline, then data, context, and innermost tensor."""
    layout = Layout.of(ParallelSettings(pipeline_parallel_size=2, context_parallel_size=2, tensor_parallel_size=2), 16)
    places = [layout.place(rank) for rank in range(16)]
    axes = [(place.pipeline, place.data, place.context, place.tensor) for place in places]
    expected = [tuple(int(digit) for digit in f"{rank:04b}") for rank in range(16)]
    assert axes == expected
    assert layout.row_groups() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert layout.context_groups()[:3] == [[0, 2], [1, 3], [4, 6]]
    assert layout.of_a_weight == 4
