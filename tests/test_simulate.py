"""benchmarks/simulate.py: what one simulated rank holds and sends against numbers by hand, the formulas, and torch's own
memory tracker; and that a formula which forgets something is caught."""

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks import formulas, simulate
from util import ranks
from util.command_line import UserError
from util.cost import layouts, memory, moments
from util.loss import PackedLoss
from util.parallel import distributed

ROOT = Path(__file__).resolve().parent.parent
CASES = simulate.all_cases()
WITHIN = 0.1  # of the peak a forecast is to be
WITHIN_STAGES_OF_PARTS = 0.2  # few layers, beside which what they hold of DTensors weighs more

# Parameters of 2B, by hand from its config.
BLOCK = (3840 * 1280 + 3840) + (1280 * 1280 + 1280) + (5120 * 1280 + 5120) + (1280 * 5120 + 1280) + 4 * 1280
LAYER = (1536 * 1536 + 1536) + 2 * (256 * 1536 + 256) + 1536 * 1536 + 3 * 8960 * 1536 + 2 * 1536
MERGER = 2 * 1280 + (5120 * 5120 + 5120) + (1536 * 5120 + 1536)
REST = 151_936 * 1536 + 1536 + 1280 * 1176 + MERGER  # of the root: embedding, last norm, patch embedding


def few_layers(name: str, layers: int = 2, **changes) -> simulate.Case:
    return replace(CASES[name].with_layers(layers), **changes)


@pytest.fixture(scope="module", autouse=True)
def no_group_of_other_tests() -> None:
    """Other files of tests train in this process, in a group of their own that stays."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(no_group_of_other_tests) -> tuple[dict, formulas.Job]:
    """2B with two layers of each kind on 8 ranks."""
    return simulate.observe(few_layers("2b_8_full"))


def passes(found: dict) -> dict[str, tuple[int, int]]:
    """(calls, bytes) by collective."""
    rows = [row for row in found["collectives"] if row["phase"] == formulas.PASSES]
    return {row["name"]: (row["calls"], row["bytes"]) for row in rows}


def wrong(found: dict, job: formulas.Job) -> list[str]:
    return simulate.differences({**found, "expected": formulas.expected(job)})


def test_a_rank_holds_and_sends_what_is_computed_by_hand(sharded):
    found, job = sharded
    layers = 2 * BLOCK + 2 * LAYER
    assert found["parameters"] == (layers + REST) // 8
    # bf16 shards of the layers before each pass and of the root once; whole gradients in fp32
    assert passes(found) == {
        "all_gather": (4 + 4 + 1, 2 * (2 * layers + REST) // 8),
        "reduce_scatter": (5, 4 * (layers + REST)),
    }
    # weights and two moments in fp32 lie there in any case, and a bf16 copy of the root while it works
    assert found["peak_bytes"] > 12 * found["parameters"] + 2 * REST
    assert not wrong(found, job)


def test_a_formula_that_forgets_something_is_caught(sharded, monkeypatch):
    found, job = sharded
    units_of = layouts.Stage.units

    def without_the_root(*arguments):
        *units, root = units_of(*arguments)
        return [*units, replace(root, shapes=[], trained=[])]

    monkeypatch.setattr(layouts.Stage, "units", without_the_root)
    lines = "\n".join(wrong(found, job))
    assert re.search(r"^parameters: 50,239,872, and 16,618,816 by formula", lines, re.MULTILINE), lines
    assert re.search(r"^all_gather of 8 ranks: .*\(9, 133717376\)", lines, re.MULTILINE), lines
    assert re.search(r"^reduce_scatter of 8 ranks: .*\(5, 1607675904\)", lines, re.MULTILINE), lines
    monkeypatch.setattr(layouts.Stage, "units", units_of)
    assert not wrong(found, job)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("2b_1024_groups", {}),
        ("2b_64_optimizer_twice", {}),
        ("2b_64_none_twice", {}),
        ("2b_8_context_8", {"layers": 1}),
        ("2b_8_2_2_2_rank_7", {}),
        ("7b_8_tensor_2_context_2_selective", {"layers": 1}),
    ],
)
def test_formulas_hold(name, changes):
    found = simulate.simulate(replace(few_layers(name), **changes))
    assert found["wrong"] == []


def test_the_forecast_is_near_the_peak(sharded):
    """Of 2 layers, where what lies beside activations counts most."""
    found, job = sharded
    assert formulas.expected(job)["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.02)


def test_a_forecast_without_what_fsdp2_holds_is_caught(monkeypatch):
    """72B, of whose two layers each is 1.6 GiB where it works, and 3.3 where its gradients are reduced."""
    found, job = simulate.observe(few_layers("72b_1024_full"))
    assert formulas.expected(job)["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=WITHIN)

    def of_one_process(kept, gradients, units, is_compiled, waiting):
        return moments.moments(kept, gradients, is_compiled).items()

    monkeypatch.setattr(memory, "moments_among_several", of_one_process)
    assert formulas.expected(job)["peak_bytes"] < (1 - WITHIN) * found["peak_bytes"]


def test_forecasts_are_near_the_peaks_that_were_simulated():
    """All stored cases, of every way to share work and of whole models."""
    result = json.loads((ROOT / "benchmarks" / "results" / "simulate.json").read_text())
    for name, row in result["cases"].items():
        within = WITHIN_STAGES_OF_PARTS if is_of_stages_and_parts(name) else WITHIN
        assert row["expected"]["peak_bytes"] == pytest.approx(row["peak_bytes"], rel=within), name


def is_of_stages_and_parts(name: str) -> bool:
    """Whether its ranks have stages, and of these parts of matrices."""
    return "2_2_2" in name or ("tensor" in name and "pipeline" in name)


def test_the_peak_is_that_of_torchs_own_tracker(monkeypatch):
    trackers = []
    there = []
    held = simulate.held_in_a_step
    run = distributed.EvenPasses.run

    def told(*arguments):
        there.extend(held(*arguments))
        return there

    def tracked(*arguments):
        tracker = MemTracker()  # here: it replaces what sees memory being freed in its place, and calls what was there
        tracker.track_external(*there)
        trackers.append(tracker)
        with tracker:
            return run(*arguments)

    monkeypatch.setattr(simulate, "held_in_a_step", told)
    monkeypatch.setattr(distributed.EvenPasses, "run", tracked)
    found, _ = simulate.observe(few_layers("2b_8_full", 1))
    by_torch = trackers[0].get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert found["peak_bytes"] == pytest.approx(by_torch, rel=1e-3)


def test_the_file_may_be_read_again_as_a_script(monkeypatch):
    """As tests/test_pages.py does for its flags. An operator made then takes the place of this module's, whose calls go to
    whatever lies in its memory by then: another operator, or the end of the process."""
    made = []
    monkeypatch.setattr(torch.library, "custom_op", lambda name, **rest: made.append(name) or MagicMock())
    runpy.run_path(str(ROOT / "benchmarks" / "simulate.py"), run_name="read again")
    assert not made, f"made while the file is read: {made}"


def test_nothing_is_left_of_a_simulated_world(sharded, monkeypatch):
    monkeypatch.setattr(simulate, "train_step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulate.observe(few_layers("2b_8_full", 1))
    assert not dist.is_initialized()
    assert not ranks.are_several()
    assert PackedLoss.to_empty is torch.nn.Module.to_empty
    assert type(torch.zeros(1)) is torch.Tensor


def test_the_command(tmp_path, capsys):
    file = tmp_path / "simulate.json"
    simulate.main(["--cases", "2b_8_none", "--layers", "1", "--workers", "1", "--out", str(file)])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result == json.loads(file.read_text())
    assert result["device"].startswith("simulated, nothing timed")
    assert list(result["cases"]) == ["2b_8_none"]
    assert re.match(
        r"\| 2b_8_none \| 1 \| 335,443,712 \| 0.00 \| 0.00 \| 1.34 \| 0.00 \| 0.00 \| 3 \| equal \|", printed[2]
    ), printed[2]
    with pytest.raises(UserError, match="--cases 3b: none begins so; there are 2b_8_full"):
        simulate.main(["--cases", "3b"])


def test_the_document_holds_what_was_simulated():
    result = json.loads((ROOT / "benchmarks" / "results" / "simulate.json").read_text())
    assert list(result["cases"]) == list(CASES)
    assert not [line for row in result["cases"].values() for line in row["wrong"]]
    tables = (ROOT / "docs" / "scaling.md").read_text().split("<!-- simulated -->")[1::2]
    rows = [line for part in tables for line in part.splitlines() if line.startswith("|")]
    assert rows == simulate.table(result["cases"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_formulas_hold_of_every_case(name):
    """With few layers: what whole models give is in benchmarks/results/simulate.json."""
    assert simulate.simulate(few_layers(name))["wrong"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2b_8_full", "2b_1024_none"])
def test_formulas_hold_of_whole_models(name):
    assert simulate.simulate(CASES[name])["wrong"] == []
