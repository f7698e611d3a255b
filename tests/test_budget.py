"""--memory_budget: which settings it chooses at which size, and what it must leave alone."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

import finetune
from tests import runs
from tests.official import official_config
from util import ranks
from util.command_line import UserError
from util.config import Config, parse_arguments
from util.cost import memory, stages
from util.cost.budget import fit_memory
from util.cost.settings import as_asked, budget_in_bytes, changed
from util.cost.sizes import Finding, Sizes
from util.dataset import Size
from util.steps import Dealing, Steps
from util.vision import Grid

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GIB = 2**30
MIB = 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24gib", 24 * GIB), ("24G", 24 * GIB), ("24GB", 24 * GIB), ("80", 80 * GIB), ("0.5", GIB / 2),
     ("24.5 GiB", 24.5 * GIB), ("512MiB", 512 * MIB), ("512m", 512 * MIB)],
)  # fmt: skip
def test_sizes_as_people_write_them(text, size):
    assert budget_in_bytes(text) == size
    assert Config(memory_budget=text).memory_budget == text


@pytest.mark.parametrize("text", ["0", "-4", "24XB", "much", "", "nan", "1e9", "24 GiB free", "0GiB"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(UserError, match=r"^--memory_budget .*: must be auto, none, or a size above 0 such as 24GiB$"):
        Config(memory_budget=text)


# ---- rungs ----------------------------------------------------------------------------------------------------------

KEPT = {"none": 2.0, "selective": 1.0, "full": 0.2}  # GiB of 1,000 tokens


def by_hand(model_config, counts, config, dtype, loads, *others) -> memory.Forecast:
    """A forecast of round numbers: 10 GiB, what the layers keep, and 1.5 GiB of logits for 1,000 rows."""
    tokens, _, supervised = np.asarray(loads).max(axis=0)
    rows = min(supervised, config.logit_rows or 4096)
    states = {"adamw": 10, "adamw_flash": 4, "adamw_8bit": 5}[config.optimizer]
    kept = tokens * KEPT[config.activation_checkpointing]
    return memory.Forecast(states=states * GIB, layers=kept * GIB / 1000, logits=1.5 * rows * GIB / 1000)


@pytest.fixture
def fit(monkeypatch):
    """A function (budget, config) -> what was changed and the words for it. Each step has 40 samples of 1,000 tokens, of
    which 100 are supervised; by default 20 of them share a pass."""
    monkeypatch.setattr(memory, "forecast", by_hand)
    monkeypatch.setattr(memory, "reserved_margin", lambda parts, device: 0)
    model_config = official_config("2b")
    counts = memory.count_parameters(model_config, Config())

    def fit_it(budget: str, config: Config | None = None, device=CPU, resumed=None, longest: int = 1000):
        config = changed(config or Config(), memory_budget=budget, global_batch_size=40, compile="off")
        sizes = [Size(1000, 100, [Grid(1, 40, 80)])] * 79 + [Size(longest, 100, [Grid(1, 40, 80)])]
        of_all = Sizes.of([Finding(size) for size in sizes])
        steps = Steps(of_all, lambda epoch: np.arange(80), 80, 3, None, config)
        chosen, planned, needs = fit_memory(config, steps, model_config, counts, torch.bfloat16, device, resumed)
        words = needs.chosen
        names = ("max_tokens", "activation_checkpointing", "logit_rows", "optimizer")
        changes = {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(config, name)}
        assert chosen.asked == {name: getattr(config, name) for name in changes}
        assert planned.config.max_tokens == chosen.max_tokens
        assert planned.survey.samples == steps.survey.samples == 240
        assert planned.survey.heaviest[:, 0].max() <= max(chosen.max_tokens, longest)
        assert needs == by_hand(None, None, chosen, None, planned.survey.heaviest)
        return changes, words

    return fit_it


@pytest.mark.parametrize(
    ("budget", "changes", "needed"),
    [
        ("53", {}, "53.0"),
        ("52", {"logit_rows": 1024}, "51.5"),  # the head once more: 0.2 % of the work
        ("51", {"logit_rows": 512}, "50.8"),
        ("40", {"max_tokens": 10240}, "31.5"),  # twice as many passes, each adding up 2.2e9 gradients: 0.6 %
        ("31", {"max_tokens": 10240, "logit_rows": 512}, "30.8"),
        ("25", {"max_tokens": 5120}, "20.8"),
        ("19", {"max_tokens": 4096}, "18.6"),
        ("16", {"max_tokens": 5120, "activation_checkpointing": "selective"}, "15.8"),  # 5 % and the passes
        ("15", {"max_tokens": 4096, "activation_checkpointing": "selective"}, "14.6"),
        ("14", {"max_tokens": 10240, "activation_checkpointing": "full"}, "13.5"),  # a third, and fewer passes
        ("12", {"max_tokens": 5120, "activation_checkpointing": "full"}, "11.8"),
        ("11.5", {"max_tokens": 4096, "activation_checkpointing": "full"}, "11.4"),
    ],
)
def test_the_fastest_rung_that_fits(budget, changes, needed, fit):
    """20 samples a pass need 10 + 40 + 3 GiB, 10 of them 10 + 20 + 1.5, 5 of them 10 + 10 + 0.75, and so on."""
    found, words = fit(budget)
    assert found == changes
    assert f"{needed} GiB of the {float(budget):.1f} GiB that it may take" in words
    if changes:
        assert "53.0 -> " in words


def test_what_a_rung_costs_is_said(fit):
    """Recomputing all layers is one of four forward passes' worth: a third more; selective by the estimate 5 %."""
    assert "full activation checkpointing: about 33% slower (an estimate)" in fit("14")[1]
    assert "selective activation checkpointing: about 7% slower" in fit("16")[1]
    assert "micro-batches of at most 10,240 tokens instead of 20,480: about 1% slower" in fit("40")[1]


def test_what_lies_between_the_tensors_counts(fit, monkeypatch):
    monkeypatch.setattr(memory, "reserved_margin", lambda parts, device: 2 * GIB)
    assert fit("32")[0] == {"max_tokens": 5120}  # 10,240 tokens need 31.5 and 2, 5,120 20.8 and 2


def test_nothing_fits(fit):
    """All stays as it was, for memory.check to refuse."""
    assert fit("11") == ({}, "")


def test_no_micro_batch_is_made_smaller_than_the_longest_sample(fit):
    """9,000 tokens in one sample: 10 + 18 + at most 1.35 GiB."""
    assert fit("29.5", longest=9000)[0] == {"max_tokens": 9000}
    assert fit("19.9", longest=9000)[0] == {
        "max_tokens": 9000,
        "activation_checkpointing": "selective",
        "logit_rows": 512,
    }


TYPED = {
    "max_tokens": ("--max_tokens 20480", "40", {"activation_checkpointing": "selective"}),
    "checkpointing": ("--activation_checkpointing none", "16", {}),
    "checkpointing that is not the default": ("--activation_checkpointing selective", "14.7", {"max_tokens": 4096}),
    "logit_rows": ("--logit_rows 4096", "52", {"max_tokens": 10240}),
    "micro_batch_size": ("--micro_batch_size 2", "15", {}),
}


@pytest.mark.parametrize("name", TYPED)
def test_what_was_typed_stays(name, fit):
    """Also where it is what it would be anyway."""
    typed, budget, changes = TYPED[name]
    assert fit(budget, parse_arguments("", typed.split()))[0] == changes


def test_what_was_typed_is_known_when_the_run_is_resumed(fit, tmp_path, monkeypatch):
    first = parse_arguments("", ["--max_tokens", "20480", "--epochs", "3"])
    folder = tmp_path / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"settings": as_asked(first)}))
    again = parse_arguments("", ["--resume", str(tmp_path)])
    assert again.given >= {"max_tokens", "epochs", "resume"}
    assert fit("40", again)[0] == {"activation_checkpointing": "selective"}


def test_the_optimizer_is_changed_only_where_that_was_allowed(fit, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes")
    allowed = Config(memory_budget_may_change_optimizer=True)
    assert fit("7", device=GPU) == ({}, "")
    smallest = {"max_tokens": 4096, "activation_checkpointing": "full", "optimizer": "adamw_8bit"}
    found, words = fit("6.5", allowed, device=GPU)
    assert found == smallest
    assert "--optimizer adamw_8bit, WHICH CHANGES THE MATHEMATICS" in words
    assert fit("20", allowed, device=GPU)[0] == {"max_tokens": 4096} | fit("20")[0]  # not where all else is enough
    typed = parse_arguments("", ["--optimizer", "adamw", "--memory_budget_may_change_optimizer"])
    assert fit("6.5", typed, device=GPU) == ({}, "")
    assert fit("6.5", allowed, device=GPU, resumed="checkpoint") == ({}, "")  # it holds the moments of AdamW
    assert fit("6.5", allowed, device=CPU) == ({}, "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fit("6.5", allowed, device=GPU) == ({}, "")


def test_auto_goes_by_what_is_free_on_a_gpu_alone(fit, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 25 * GIB)
    assert fit("auto", device=GPU)[0] == {"max_tokens": 5120}
    assert fit("auto", device=CPU) == ({}, "")
    assert fit("none", device=GPU) == ({}, "")
    assert fit("20", device=GPU)[0] == {"max_tokens": 4096}  # a budget beside what is free


def test_ranks_choose_by_the_smallest_of_their_budgets(fit, monkeypatch):
    def with_another_rank(value):
        return [value, 25 * GIB] if isinstance(value, float) else [value]

    monkeypatch.setattr(ranks, "gather_on_all", with_another_rank)
    assert fit("40")[0] == {"max_tokens": 5120}


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_within_a_budget_computes_the_same_and_a_resumed_one_chooses_anew(tiny_path, tmp_path, capsys):
    own = {"max_steps": 3, "save_every": 2, "learning_rate": 1e-5}

    def run(folder, **changes):
        return finetune.train(Config(**runs.settings(tiny_path, tmp_path / folder, **{**own, **changes})))

    plain = run("plain")
    capsys.readouterr()
    small = run("small", memory_budget="60MiB")
    told = capsys.readouterr().out
    assert "memory budget  full activation checkpointing: about " in told
    assert runs.losses(small) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in runs.losses(plain)]
    settings = json.loads((tmp_path / "small" / "training_config.json").read_text())
    assert settings["activation_checkpointing"] == "full"
    assert settings["asked"] == {"activation_checkpointing": "none"}
    shutil.rmtree(tmp_path / "small" / "checkpoints" / "step_000003")
    run("small", resume="auto")
    told = capsys.readouterr().out
    assert "activation_checkpointing" not in told  # what was asked for did not change
    assert json.loads((tmp_path / "small" / "training_config.json").read_text())["activation_checkpointing"] == "none"
    assert runs.losses(small) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in runs.losses(plain)]


def test_what_cannot_fit_is_refused_with_what_would(tiny_path, tmp_path):
    with pytest.raises(UserError) as refused:
        finetune.train(Config(**runs.settings(tiny_path, tmp_path / "run", memory_budget="22MiB")))
    text = str(refused.value)
    assert text.startswith("not enough memory on cpu: the run needs ")
    assert "are allowed by --memory_budget 22MiB" in text
    assert "Settings that fit:\n" in text or "No setting fits" in text
    assert not (tmp_path / "run").exists()


def ways(gib: float, config: Config, monkeypatch) -> list[str]:
    """What the refusal of 2B names: 40 samples a step, each of 1,120 tokens with an image of 4,096 patches."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: gib * GIB)
    model_config = official_config("2b")
    sizes = Sizes.of([Finding(Size(1120, 40, [Grid(1, 64, 64)]))] * 40)
    steps = Steps(sizes, lambda epoch: np.arange(40), 40, 1, None, config)
    counts = memory.count_parameters(model_config, config)
    config, steps, needs = fit_memory(config, steps, model_config, counts, torch.bfloat16, GPU)
    with pytest.raises(UserError) as refused:
        memory.check(model_config, config, torch.bfloat16, GPU, steps.survey, needs)
    return [line.strip() for line in str(refused.value).splitlines() if line.startswith("  --")]


def test_what_would_fit_is_told_with_the_least_change_first(monkeypatch):
    """All of 2B is trained in 24 GiB with small moments: 9 bytes for each of 2.2e9 weights. Then less of it, then adapters."""
    own = {"global_batch_size": 40, "compile": "off"}
    told = ways(23.4, Config(**own), monkeypatch)
    first = ["--optimizer adamw_flash --activation_checkpointing full", "--freeze vision ", "--freeze language_model ",
             "--lora_rank 16 --", "--lora_rank 16 --quantize nf4 "]  # fmt: skip
    assert len(told) == len(first), told
    for line, begin in zip(told, first, strict=True):
        assert line.startswith(begin), told
    assert all("adamw" not in line for line in told if line.startswith("--freeze language_model")), "AdamW itself fits"
    assert ways(20, Config(**own, freeze=["merger"]), monkeypatch)[0].startswith("--freeze merger vision ")


def test_ranks_are_not_told_of_what_works_on_one_gpu_alone(monkeypatch):
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(ranks, "gather_on_all", lambda value: [value, value])
    told = ways(30, Config(global_batch_size=40, compile="off"), monkeypatch)
    assert told
    assert not any("--optimizer" in line for line in told), told


def test_of_a_pipeline_a_rank_needs_what_its_stage_has(monkeypatch):
    """7B on four ranks, in four stages with all samples and in one stage each with a quarter of them, nothing sharded.
    The first stage has most: a quarter of the layers, one embedding of two, the tower and the merger, by hand."""
    model_config = official_config("7b")
    sizes = Sizes.of([Finding(Size(500, 40, []))] * 40)
    needed = {}
    for stages_asked in (1, 4):
        config = Config(sharding="none", pipeline_parallel_size=stages_asked, global_batch_size=40, compile="off")
        dealing = Dealing(np.ones(40), 0, 4 // stages_asked, 2 * stages_asked)
        steps = Steps(sizes, lambda epoch: np.arange(40), 40, 1, None, config, dealing)
        counts = memory.count_parameters(model_config, config)
        needed[stages_asked] = stages.forecast(model_config, counts, config, torch.bfloat16, steps, 1, GPU)
    layer = 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944  # of 7B, without norms and biases
    block = 4 * 1280**2 + 2 * 1280 * 5120  # of the tower, which has 32
    of_first_stage = 7 * layer + 152064 * 3584 + 32 * block + 5120**2 + 5120 * 3584
    assert needed[4]["weights"] == pytest.approx(4 * of_first_stage, rel=0.01), "in fp32"
    assert sum(needed[4].values()) < 0.5 * sum(needed[1].values()), "a quarter of the states, and four rows in flight"
