"""Pipeline, data, context and tensor parallelism, any two at once on 4 real processes (gloo, CPU), one alone on 3, and
with --slow all of them on 8: the same losses and weights as finetune.py."""

# ruff: noqa: F811  # data is a fixture of another file

from pathlib import Path

import pytest
import torch

import finetune
from tests.runs import metrics, weights
from tests.test_distributed import data, settings, torchrun  # noqa: F401
from util.config import Config
from util.model import load_weights
from util.parallel.layout import Layout
from util.parallel.settings import ParallelSettings

ROOT = Path(__file__).resolve().parent.parent
EVALUATED = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2, "save_every": 2, "final": "last"}
PIPELINE = {"pipeline_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
TENSOR = {"tensor_parallel_size": 2}
# five samples, of which one has a picture: in the third step one of two groups of ranks has nothing
FEW = {"data": "texts", "global_batch_size": 2, "max_steps": 3}
THREE = {
    "a row over three": {"context_parallel_size": 3, "max_steps": 2},
    "three stages": {"pipeline_parallel_size": 3, "max_steps": 2},
}
FOUR = {
    "stages of matrices in parts": {
        **PIPELINE,
        **TENSOR,
        "sequence_parallel": True,
        "sharding": "optimizer",
        "max_steps": 2,
    },
    "rows in parts through stages": {**PIPELINE, **CONTEXT, "activation_checkpointing": "full", "max_steps": 2},
    "rows and matrices in parts": {**CONTEXT, **TENSOR, **EVALUATED, "sharding": "gradients"},
    "samples and stages": {**PIPELINE, **FEW},
    "samples and rows in parts": {**CONTEXT, **FEW},
    "samples and matrices in parts": {**TENSOR, **FEW, "sequence_parallel": True},
}
EIGHT = {
    "all at once": {**PIPELINE, **CONTEXT, **TENSOR},
    "stages, samples and matrices": {**PIPELINE, **TENSOR, "activation_checkpointing": "selective", **EVALUATED},
    "frozen tower": {**PIPELINE, **CONTEXT, **TENSOR, "freeze": ["vision", "merger"], "sequence_parallel": True},
    "accumulation": {**PIPELINE, **TENSOR, "micro_batch_size": 1, "sharding": "none"},
}
ROUNDED = {**PIPELINE, **CONTEXT, **TENSOR, **EVALUATED, "dtype": "bfloat16", "keep": 9}
# what matters to one process, too
ALONE = ("data", "global_batch_size", "max_steps", "dtype", "freeze", "eval_data", "eval_every", "save_every", "final",
         "micro_batch_size")  # fmt: skip


def run(tiny_path: Path, data: dict[str, Path], directory: Path, changes: dict) -> dict:
    changes = {"max_steps": 4, **changes}
    return settings(tiny_path, data[changes.pop("data", "showcase")], directory, **changes)


@pytest.fixture(scope="module")
def trained_together(tiny_path, data, tmp_path_factory):
    """A function (cases, number of processes): each case on one process and on several, in folders of its name."""
    made: dict[str, str] = {}  # what was trained on one process, by its settings

    def train(cases: dict[str, dict], processes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"on_{processes}")
        for name, changes in cases.items():
            own = {key: value for key, value in changes.items() if key in ALONE}
            directory = folder / f"one {name}"
            if str(own) in made:
                directory.symlink_to(made[str(own)])
            else:
                made[str(own)] = finetune.train(Config(**run(tiny_path, data, directory, own)))
        together = [run(tiny_path, data, folder / name, changes) for name, changes in cases.items()]
        torchrun(processes, together, folder)
        return folder

    return train


@pytest.fixture(scope="module")
def three(trained_together) -> Path:
    return trained_together(THREE, 3)


@pytest.fixture(scope="module")
def four(trained_together) -> Path:
    return trained_together(FOUR, 4)


@pytest.fixture(scope="module")
def eight(trained_together) -> Path:
    return trained_together(EIGHT, 8)


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


@pytest.mark.parametrize("name", THREE)
def test_three_ranks_are_one_process(name, three):
    check_same(three / name, three / f"one {name}")


@pytest.mark.parametrize("name", FOUR)
def test_two_axes_at_once_are_one_process(name, four):
    check_same(four / name, four / f"one {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_all_axes_at_once_are_one_process(name, eight):
    check_same(eight / name, eight / f"one {name}")


@pytest.mark.slow
def test_all_axes_at_once_in_bfloat16(trained_together, tiny_path, data, tmp_path):
    """Parts of a sum are rounded one by one, so it is near one process; resumed it is itself, bit by bit."""
    folder = trained_together({"rounded": ROUNDED}, 8)
    whole, alone = folder / "rounded", folder / "one rounded"
    for key in ("loss", "eval_loss"):
        assert metrics(whole, key) == pytest.approx(metrics(alone, key), rel=2e-2), key
    assert {tensor.dtype for tensor in weights(whole).values()} == {torch.bfloat16}
    resumed = {**ROUNDED, "resume": str(whole / "checkpoints" / "step_000002")}
    torchrun(8, [run(tiny_path, data, tmp_path / "on", resumed)], tmp_path)
    assert metrics(tmp_path / "on") == metrics(whole)[2:]
    ours, theirs = weights(tmp_path / "on"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_knows_no_layout(four, tiny_path, data, tmp_path):
    """One of rows and matrices in parts goes on in one process, to where the run went that was never stopped."""
    own = {**EVALUATED, "resume": str(four / "rows and matrices in parts" / "checkpoints" / "step_000002")}
    gone_on = Path(finetune.train(Config(**run(tiny_path, data, tmp_path / "gone on", own))))
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
