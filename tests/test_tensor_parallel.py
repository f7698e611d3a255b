"""--tensor_parallel_size and --sequence_parallel on 2 and 4 real processes (gloo): the same as one process."""

import json
from pathlib import Path

import pytest
import torch

import finetune
from tests import runs
from tests.runs import metrics, weights
from tests.test_distributed import gap, same, torchrun
from util.command_line import UserError
from util.config import Config

ROOT = Path(__file__).resolve().parent.parent
SHOWCASE = ROOT / "train_data" / "data.json"
HELD_OUT = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2}


# ---- single steps of two ranks --------------------------------------------------------------------------------------

EXCHANGED = {
    "none": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "rows": {"sequence_parallel": True},
}
LAYERS = 4 + 3  # tiny's decoder layers and tower blocks


@pytest.fixture(scope="module")
def checked(tiny_path, tmp_path_factory) -> list[dict]:
    """What each of two ranks found: tests/tensor_checks.py."""
    folder = tmp_path_factory.mktemp("checks")
    plain = {"data": [str(SHOWCASE)], "dtype": "float64", "tensor_parallel_size": 2}
    plain = runs.settings(tiny_path, folder / "unused", **plain)
    cases = {"plain": plain, "samples": [0, 7, 30], "exchanged": EXCHANGED}
    torchrun(2, cases, folder, "tests/tensor_checks.py", str(folder))
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_a_layer_has_two_all_reduces_in_each_pass(checked):
    """Beside them: the merger and the embedding have one, the loss two for numbers of each token, the head one."""
    for found in checked:
        calls = found["exchanged"]["none"]["calls"]
        assert calls["forward_all_reduce"] == 2 * LAYERS + 2 + 2
        assert calls["backward_all_reduce"] == 2 * LAYERS + 1 + 1


def test_bytes_are_those_of_the_rows(checked):
    """8 a number in float64: a decoder row is 128 wide, a tower row 64; the merger's are 256 wide before and 128 after."""
    found = checked[0]
    rows, patches, supervised = found["rows"], found["patches"], found["supervised"]
    layers = 8 * (2 * 4 * 128 * rows + 2 * 3 * 64 * patches)
    counted = found["exchanged"]["none"]["bytes"]
    ends = 8 * (128 * rows + 128 * patches // 4 + 3 * supervised)  # embedding, merger, largest and sums of the loss
    assert counted["forward_all_reduce"] == layers + ends
    assert counted["backward_all_reduce"] == layers + 8 * (256 * patches // 4 + 128 * supervised)


def test_recomputing_exchanges_only_what_it_must(checked):
    """Before its second half a recomputed layer needs the sum of its first; kept products keep it."""
    full = checked[0]["exchanged"]["full"]["calls"]
    assert full["backward_all_reduce"] == 2 * LAYERS + 2 + LAYERS
    assert checked[0]["exchanged"]["selective"]["calls"]["backward_all_reduce"] == 2 * LAYERS + 2


def test_rows_are_gathered_and_scattered_instead(checked):
    """At the ends of the tower and of the language model each rank takes its rows, and gets all of them back."""
    calls = checked[0]["exchanged"]["rows"]["calls"]
    assert calls["forward_gather_rows"] == 2 * LAYERS + 2
    assert calls["forward_scatter_rows"] == 2 * LAYERS
    assert calls["forward_all_reduce"] == 2 + 2
    assert calls["backward_scatter_rows"] == 2 * LAYERS
    assert calls["backward_gather_rows"] == 2 * LAYERS + 2
    assert calls["backward_all_reduce"] == 1 + 1


def test_one_step_equals_one_process(checked):
    for found in checked:
        assert max(found["faults"]["none"].values()) < 1e-12, found["faults"]["none"]


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        ("a key-value head is cut wrongly", "loss"),
        ("the tied gradient counts twice", "gradient"),
        ("the gradient of qkv is not summed", "gradient"),
        ("the norm counts copies twice", "norm"),
    ],
)
def test_planted_faults_are_seen(fault, seen_in, checked):
    assert checked[0]["faults"][fault][seen_in] > 1e-6, checked[0]["faults"][fault]


def test_copies_stay_equal_bit_by_bit(checked):
    """One rank's gradients of what both have whole were off by a billionth."""
    assert checked[0]["drifted"]["unequal"] > 10, "the drift changes no weight, so that its end shows nothing"
    assert checked[0]["agreed"]["unequal"] == 0


def test_the_loss_of_two_ranks_counts_once(checked):
    """Both compute it, and sums go over all ranks."""
    assert checked[0]["agreed"]["loss"] > 0
    assert checked[1]["agreed"]["loss"] == 0
