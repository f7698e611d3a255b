"""Out of memory in a step: it runs again in smaller micro-batches and gives what it would have given, or says why not."""

import dataclasses
from itertools import chain
from pathlib import Path

import pytest
import torch

import finetune
import finetune_distributed
from tests import runs
from util.attention import Segments
from util.collator import Batch, Collator
from util.command_line import Ended, known, run_command
from util.config import Config
from util.cost.measure import measure_all
from util.dataset import Examples, Samples
from util.loss import PackedLoss
from util.model import build_model
from util.optimizer import build_optimizer
from util.passes import Passes, halves_of, in_parts
from util.results.evaluate import evaluate_loss
from util.steps import training_steps
from util.vision import Budget

CPU = torch.device("cpu")
DATA = str(Path(__file__).resolve().parent.parent / "train_data" / "data.json")
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
SMALL = Budget(min_pixels=3136, max_pixels=28 * 28 * 16, video_max_frames=4)


@pytest.fixture(scope="module")
def samples(processor):
    return Samples(Examples([DATA], processor), processor, SMALL)


@pytest.fixture(scope="module")
def mixed(samples):
    """Ten samples: text alone, one image and several, videos; one of them weighs less than the others."""
    chosen = [samples[index] for index in range(len(samples.examples))]
    kinds = {(len(sample.media), any(medium.is_video for medium in sample.media)): sample for sample in chosen}
    found = list(kinds.values())
    assert {(0, False), (1, False), (1, True), (2, False)} <= kinds.keys()
    found = [*found, *chosen[:10]][:10]
    encoded = found[3].encoded
    lighter = dataclasses.replace(encoded, weights=[weight / 3 for weight in encoded.weights])
    return [*found[:3], dataclasses.replace(found[3], encoded=lighter), *found[4:]]


def assert_equal(ours: Batch, theirs: Batch) -> None:
    """Every field, to the last bit."""
    for item in dataclasses.fields(Batch):
        ours_there, there = getattr(ours, item.name), getattr(theirs, item.name)
        if isinstance(there, torch.Tensor):
            assert ours_there.dtype == there.dtype, item.name
            assert torch.equal(ours_there, there), item.name
        elif isinstance(there, Segments):
            assert torch.equal(ours_there.cu_seqlens, there.cu_seqlens), item.name
            assert (ours_there.max_seqlen, ours_there.runs) == (there.max_seqlen, there.runs), item.name
        else:
            assert ours_there == there, item.name


def test_halves_are_what_the_collator_makes_of_the_halves_of_the_samples(mixed):
    waiting = [(Collator()(mixed), mixed)]
    seen = 0
    while waiting:
        batch, of = waiting.pop()
        halves = batch.halves()
        assert len(halves) == (2 if len(of) > 1 else 0)
        first = len(halves[0].where) if halves else 0
        for half, part in zip(halves, (of[:first], of[first:]), strict=False):
            assert_equal(half, Collator()(part))
            waiting.append((half, part))
        seen += 1
    assert seen == 2 * len(mixed) - 1  # down to each sample


def test_halves_have_about_half_of_the_tokens(mixed):
    """The longest sample may be in the way: no half is larger by more than that one."""
    batch = Collator()(mixed)
    first, second = (len(half.input_ids) for half in batch.halves())
    assert abs(first - second) <= max(batch.segments.lengths)
    assert first + second == len(batch.input_ids)


# ---- a step ---------------------------------------------------------------------------------------------------------


class Fault:
    """Raises torch's own exception in some of the passes, counted from 1; `where`: in the forward or the backward."""

    def __init__(self, monkeypatch, where: str, fails) -> None:
        self.passes = 0
        self.tokens: list[int] = []
        inner = PackedLoss.supervised_rows

        def no_memory(*unused) -> None:
            raise torch.OutOfMemoryError(FULL)

        def rows(model, batch, *embedded):
            if not torch.is_grad_enabled():
                return inner(model, batch, *embedded)
            self.passes += 1
            self.tokens.append(len(batch.input_ids))
            hidden = inner(model, batch, *embedded)
            if fails(self.passes, len(batch.input_ids)):
                hidden.register_hook(no_memory) if where == "backward" else no_memory()
            return hidden

        monkeypatch.setattr(PackedLoss, "supervised_rows", rows)


class Quiet:
    """What Passes needs of StopSignal."""

    def __init__(self) -> None:
        self.run = self
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)

    def end_out_of_memory(self, why: str, *unused) -> None:
        raise Ended(why, 1)


def passes_of(model):
    """What the scripts give to Passes."""

    def run_pass(batch, divisor):
        loss_sum = model(batch)
        (loss_sum / divisor).backward()
        return loss_sum.detach()

    return run_pass


def step_of(samples, tiny_path, groups: list[list], **changes) -> tuple[float, dict, Quiet]:
    """Loss, gradients and what was said of the passes of one step in float64, divided by the weight of all samples."""
    config = Config(**{"data": [DATA], "device": "cpu", "dtype": "float64", "num_workers": 0, **changes})
    model = build_model(config, str(tiny_path), samples.processor, CPU)
    optimizer = build_optimizer(model, config)
    steps = training_steps(measure_all(samples, config), samples.examples, config)
    micro_batches = [Collator()(group) for group in groups]
    weight = sum(batch.counts["supervised_weight"] for batch in micro_batches)
    stop = Quiet()
    loss = Passes(passes_of(model), model, optimizer, CPU, steps, stop, None).run(7, micro_batches, weight)
    return loss.item() / weight, {name: p.grad for name, p in model.named_parameters()}, stop


@pytest.fixture(scope="module")
def undisturbed(samples, mixed, tiny_path):
    """Each sample alone: as many passes as there are."""
    return step_of(samples, tiny_path, [[sample] for sample in mixed])[:2]


def same_step(found: tuple, whole: tuple) -> None:
    loss, gradients = found[:2]
    assert loss == pytest.approx(whole[0], abs=1e-12)
    for name, gradient in whole[1].items():
        assert torch.allclose(gradients[name], gradient, rtol=0, atol=1e-12), name
    assert max(gradient.abs().max() for gradient in whole[1].values()) > 1e-2  # else equality says little


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_step_that_is_split_has_the_same_loss_and_gradients(
    where, at, samples, mixed, tiny_path, undisturbed, monkeypatch
):
    """In the first pass, and in the second, when the first has left gradients that must not count twice."""
    fault = Fault(monkeypatch, where, lambda number, tokens: number == at)
    found = step_of(samples, tiny_path, [mixed[:4], mixed[4:]])
    same_step(found, undisturbed)
    assert fault.passes > at + 2, "nothing was split"
    assert len(found[2].told) == 1
    assert found[2].told[0].startswith("step 7: out of memory in a micro-batch of ")


def test_it_is_split_down_to_single_samples(samples, mixed, tiny_path, undisturbed, monkeypatch):
    """Where any two samples are too much, whichever they are."""
    longest = max(len(Collator()([sample]).input_ids) for sample in mixed)
    fault = Fault(monkeypatch, "backward", lambda number, tokens: tokens > longest)
    found = step_of(samples, tiny_path, [mixed])
    same_step(found, undisturbed)
    assert max(fault.tokens[-3:]) <= longest


def test_later_steps_keep_the_smaller_limit(samples, mixed, tiny_path, monkeypatch):
    config = Config(data=[DATA], device="cpu", dtype="float64", num_workers=0)
    model = build_model(config, str(tiny_path), samples.processor, CPU)
    steps = training_steps(measure_all(samples, config), samples.examples, config)
    runner = Passes(passes_of(model), model, build_optimizer(model, config), CPU, steps, Quiet(), None)
    batch = Collator()(mixed)
    fault = Fault(monkeypatch, "forward", lambda number, tokens: tokens == len(batch.input_ids))
    runner.run(1, [batch], 1.0)
    tried = fault.passes
    runner.run(2, [batch], 1.0)
    assert fault.passes == 2 * tried - 1, "the second step tried once more what is known to be too large"
    assert f"--max_tokens {max(len(batch.input_ids) // 2, runner.longest)}" in runner.stop.told[0]
    assert len(runner.stop.told) == 1


def test_a_step_of_one_pass_in_bf16_is_summed_in_fp32_once_it_has_several(samples, mixed, tiny_path, monkeypatch):
    """The gradients of one pass stay in bf16; a sum in bf16 would lose what small ones add."""
    found = {}
    for name, at in (("one pass", 0), ("several", 1)):
        with monkeypatch.context() as patched:
            Fault(patched, "backward", lambda number, tokens, at=at: number == at)
            _, found[name], _ = step_of(samples, tiny_path, [mixed], dtype="bfloat16")
    assert {gradient.dtype for gradient in found["one pass"].values()} == {torch.bfloat16}
    assert {gradient.dtype for gradient in found["several"].values()} == {torch.float32}


def test_other_errors_are_not_taken_for_it(samples, mixed, tiny_path, monkeypatch):
    inner = PackedLoss.supervised_rows
    monkeypatch.setattr(PackedLoss, "supervised_rows", lambda *args: inner(*args)[:0] @ torch.ones(3))
    with pytest.raises(RuntimeError, match=r"size mismatch|dtype|shape"):
        step_of(samples, tiny_path, [mixed])


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
                                  "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"])  # fmt: skip
def test_errors_of_other_classes_that_say_it(text):
    message, code = known(RuntimeError(text))
    assert code == 1
    assert "out of memory" in message


# ---- a run, as a user starts it -------------------------------------------------------------------------------------


def settings(tiny_path: Path, directory: Path, **changes) -> dict:
    own = {"dtype": "float64", "max_steps": 3, "save_every": 0, "learning_rate": 1e-4}
    return runs.settings(tiny_path, directory, **{**own, **changes})


def weights_of(run: str) -> dict[str, torch.Tensor]:
    return runs.weights(run)


@pytest.mark.parametrize("script", [finetune, finetune_distributed])
def test_a_run_out_of_memory_ends_with_the_same_weights(script, tiny_path, tmp_path, monkeypatch, capsys):
    plain = script.train(Config(**settings(tiny_path, tmp_path / "plain")))
    with monkeypatch.context() as patched:
        fault = Fault(patched, "backward", lambda number, tokens: number == 2)
        disturbed = script.train(Config(**settings(tiny_path, tmp_path / "disturbed")))
    assert fault.passes >= 1 + 1 + 2 + 1  # the second step in one, then in two, and the third
    ours, theirs = weights_of(disturbed), weights_of(plain)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-7  # it is written in fp32
    assert runs.losses(disturbed) == [(step, pytest.approx(loss, abs=1e-12)) for step, loss in runs.losses(plain)]
    told = capsys.readouterr().out
    assert told.count("out of memory in a micro-batch of 8 samples") == 1
    assert "It runs again" in told


def test_a_sample_that_is_too_large_ends_the_run_saved(tiny_path, tmp_path, monkeypatch):
    """It fails in step 2 however small: the run is saved as step 1 left it, and goes on from there."""
    changed = settings(tiny_path, tmp_path / "run")
    with monkeypatch.context() as patched:
        Fault(patched, "forward", lambda number, tokens: number > 1)
        with pytest.raises(Ended) as ended:
            finetune.train(Config(**changed))
    text = str(ended.value)
    assert ended.value.code == 1
    assert "out of memory in the pass of a single sample, " in text
    assert FULL in text
    assert "--activation_checkpointing full" in text
    assert "stopped after step 1, which is saved; go on with: " in text
    assert (tmp_path / "run" / "checkpoints" / "step_000001" / "state.json").exists()
    finetune.train(Config(**{**changed, "resume": "auto"}))
    whole = finetune.train(Config(**settings(tiny_path, tmp_path / "whole")))
    runs.same_run(tmp_path / "run", Path(whole))


@pytest.mark.parametrize("moment", ["loading", "first update"])
def test_what_cannot_be_tried_again_is_said_without_a_traceback(moment, tiny_path, tmp_path, monkeypatch, capsys):
    def no_memory(*unused, **also_unused):
        raise torch.OutOfMemoryError(FULL)

    if moment == "loading":
        monkeypatch.setattr("util.model.load_trainable", no_memory)
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", no_memory)
    with pytest.raises(SystemExit) as ended:
        run_command(finetune.train, Config(**settings(tiny_path, tmp_path / "run")), name="finetune.py")
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert FULL in told
    assert "out of memory on the device. What helps: a smaller --memory_budget" in told
    assert "Traceback" not in told


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_an_evaluation_out_of_memory_has_the_same_loss(samples, mixed, tiny_path, monkeypatch):
    config = Config(device="cpu", dtype="float64")
    model = build_model(config, str(tiny_path), samples.processor, CPU)
    whole = evaluate_loss(model, [Collator()(mixed)], CPU)
    score = PackedLoss.score
    tried = []

    def small_alone(model, batch, *visual):
        tried.append(len(batch.where))
        if len(batch.where) > 2:
            raise torch.OutOfMemoryError(FULL)
        return score(model, batch, *visual)

    monkeypatch.setattr(PackedLoss, "score", small_alone)
    parts = evaluate_loss(model, [Collator()(mixed)], CPU)
    assert len(tried) > 5
    assert parts["loss_sum"] == pytest.approx(whole["loss_sum"], abs=1e-10)
    assert {**parts, "loss_sum": 0} == {**whole, "loss_sum": 0}


def test_work_in_parts_keeps_its_order_and_names_what_is_too_large():
    def double(items: list[int]) -> list[int]:
        if len(items) > 2 or 13 in items:
            raise torch.OutOfMemoryError(FULL)
        return [2 * item for item in items]

    found = in_parts(double, list(range(9)), halves_of)
    assert list(chain.from_iterable(found)) == list(range(0, 18, 2))
    assert all(len(part) <= 2 for part in found)
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(double, [12, 13], halves_of)
