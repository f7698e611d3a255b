"""The matrix of settings (matrix.py): a short form of it here, all pairs with --slow, and that it finds faults."""

import time
from pathlib import Path

import pytest

from tests import matrix
from tests.matrix import (
    DEFAULTS,
    SETTINGS,
    Workshop,
    all_pairs,
    covered,
    is_allowed,
    name_of,
    possible_pairs,
    problem_of,
)
from util.config import Config

pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes (pip install bitsandbytes)")

BF16 = {"dtype": "bfloat16"}
# What users run most, and where most has been found: bf16, evaluated, saved, stopped, resumed, on one rank and on many.
SHORT = [
    {**BF16, "evaluation": "loss", "saves": "steps", "stopped": "alone"},
    {**BF16, "ranks": 2, "sharding": "gradients", "evaluation": "loss", "saves": "steps", "stopped": "alone"},
    {**BF16, "ranks": 2, "trains": "LoRA and vision", "evaluation": "loss", "data": "images"},
    {"trains": "DoRA", "evaluation": "loss", "stopped": "with its workers", "data": "a bad sample", "num_workers": 2},
    {**BF16, "ranks": 2, "trains": "QLoRA", "evaluation": "answers", "saves": "minutes", "data": "text"},
    {"freeze": "language_model", "data": "text"},
    {**BF16, "ranks": 2, "sharding": "optimizer", "freeze": "language_model", "data": "images",
     "activation_checkpointing": "selective"},
    {"freeze": "vision", "activation_checkpointing": "full", "compile": "on", "data": "a bad sample"},
    {**BF16, "ranks": 2, "sharding": "none", "trains": "LoRA", "num_workers": 2},
]  # fmt: skip
# The same with what ranks that work on the same samples share.
SHORT += [{**BF16, "ranks": 2, "split": split, "evaluation": "loss", "saves": "steps", "stopped": "alone"}
          for split in ("rows", "matrices", "layers")]  # fmt: skip
# And the other families on the same road.
SHORT += [{**BF16, "family": family, "ranks": 2, "evaluation": "answers", "saves": "steps", "stopped": "alone"}
          for family in ("qwen2_5_vl", "qwen3_vl")]  # fmt: skip
# Beside the pairs: an optimizer of another package, and a sample that breaks while the run is stopped.
BESIDE = [
    {**BF16, "optimizer": "adamw_8bit", "no_number": True},
    {**BF16, "optimizer": "adamw_8bit", "stopped": "alone"},
    {"data": "a bad sample", "stopped": "alone", "breaks": True},
]
# A fault of matrix_faults.py, a run that meets it, and the check that sees it.
FAULTS = {
    # with the loss alone: answering ends with the weights sharded again, which hides it
    "1": ("working_copies", {**BF16, "ranks": 2, "sharding": "gradients", "evaluation": "loss", "saves": "steps",
                             "stopped": "alone"}, "it_ended"),
    "1, silently": ("working_copies", {**BF16, "ranks": 2, "trains": "LoRA and vision", "evaluation": "loss",
                                       "data": "images"}, "plain_libraries_know_every_name"),
    "2": ("narrow_rotation", {**BF16, "ranks": 2, "trains": "LoRA and vision", "data": "images"},
          "it_follows_one_process"),
    "3": ("workers_that_signals_kill",
          {"trains": "DoRA", "evaluation": "loss", "stopped": "with its workers", "data": "a bad sample", "num_workers": 2}, "it_ended"),
    "5": ("backward_without_gradient", {"freeze": "language_model", "data": "text"}, "it_ended"),
    "6, cleared": ("gradients_that_stay", {**BF16, "optimizer": "adamw_8bit", "no_number": True}, "it_ended"),
    "6, resumed": ("bits_that_are_lost", {**BF16, "optimizer": "adamw_8bit", "stopped": "alone"},
                   "stopping_changed_nothing"),
    "7": ("order_that_moves", {"data": "a bad sample", "stopped": "alone", "breaks": True},
          "a_sample_that_breaks_moves_no_other"),
    "rotation": ("wrong_rotation", {**BF16, "data": "images"}, "it_follows_one_process"),
    "mask": ("wrong_mask", BF16, "it_follows_the_plain_run"),
    "scale": ("wrong_scale", BF16, "it_follows_the_plain_run"),
}  # fmt: skip


def faulty(number: str) -> dict:
    fault, run, _ = FAULTS[number]
    return {**run, "fault": fault}


def in_short(number: str) -> bool:
    """The others need runs of their own to be compared with, or only show how wide a bound is."""
    return number in ("1", "1, silently", "2", "5")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, request) -> Workshop:
    """All runs of this file, trained together, as starting the processes takes longer than most."""
    made = Workshop(tmp_path_factory.mktemp("matrix"))
    slow = request.config.getoption("--slow")
    numbers = [number for number in FAULTS if slow or in_short(number)]
    without = [FAULTS[number][1] for number in numbers]
    made.train([*SHORT, *BESIDE, *without, *map(faulty, numbers)])
    return made


@pytest.mark.parametrize("run", SHORT + BESIDE, ids=name_of)
def test_a_run_leaves_what_it_must(run, workshop):
    assert not (problem := problem_of(workshop, run)), problem


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[] if in_short(number) else pytest.mark.slow) for number in FAULTS]
)
def test_a_fault_that_is_put_back_is_found(number, workshop):
    """By the check that is meant to, and the same run without it has nothing wrong."""
    fault, run, check = FAULTS[number]
    assert not (problem := problem_of(workshop, run)), f"without the fault: {problem}"
    found = problem_of(workshop, faulty(number))
    assert found, f"{fault} is not seen"
    assert found.startswith(f"{check}: "), f"{fault} is seen by another check: {found}"


def test_every_pair_that_can_be_is_in_the_matrix():
    found = all_pairs()
    assert all(is_allowed(run) for run in found)
    assert not possible_pairs() - covered(found)
    assert len(found) < 40, "more runs than needed"
    every = {(name, value) for name, values in SETTINGS.items() for value in values}
    assert {setting for pair in covered(found) for setting in pair} == every
    assert {tuple(run) for run in found} == {tuple(SETTINGS)}, "in the order of SETTINGS"


def test_what_config_refuses_is_left_out():
    """By Config alone: here two pairs of settings that it is known to refuse."""
    assert not is_allowed({"trains": "LoRA", "freeze": "language_model"})
    assert is_allowed({"trains": "LoRA and vision", "freeze": "language_model"})
    assert Config(**matrix.config_of(DEFAULTS))


@pytest.mark.slow
def test_every_pair(workshop, capsys):
    began, found = time.monotonic(), all_pairs()
    workshop.train(found)
    problems = {name_of(run): problem for run in found if (problem := problem_of(workshop, run))}
    minutes = (time.monotonic() - began) / 60
    with capsys.disabled():
        print(
            f"\n{len(found)} runs cover {len(covered(found))} pairs: {minutes:.1f} minutes, {len(problems)} with problems"
        )
    assert not problems, "\n\n".join(f"{name}\n{problem}" for name, problem in problems.items())


def test_the_workshop_tells_of_a_run_that_ends_its_processes(tmp_path, monkeypatch):
    """The runs after it are trained all the same."""
    shop, calls = Workshop(tmp_path), []

    def start(jobs: list[dict], ranks: int, folder: Path) -> tuple[int, str]:
        calls.append([job["name"] for job in jobs])
        for job in jobs:
            Path(job["directory"]).mkdir()
            if job["name"] == "second":
                return 137, "killed"
            for rank in range(ranks):
                matrix.outcome_file(job["directory"], rank).write_text("null")
        return 0, ""

    monkeypatch.setattr(matrix, "start", start)
    shop.perform([{"name": name, "directory": str(tmp_path / name)} for name in ("first", "second", "third")], 2)
    assert calls == [["first", "second", "third"], ["third"]]
    assert shop.outcomes == {"first": None, "second": "the processes ended (137): killed", "third": None}
