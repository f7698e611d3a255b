"""Whoever asks for a run's tensors gets those that are trained, in any state that a run can be in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from tests import runs
from util import checkpoint
from util.collator import Collator
from util.config import Config
from util.dataset import Samples, load_examples
from util.model import build_model, load_processor
from util.optimizer import build_optimizer, clip_gradient
from util.publish.save_model import save_model
from util.results.evaluate import evaluate_answers, evaluate_loss
from util.tensors import run_parameters, trained_parameters
from util.vision import Budget

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = str(ROOT / "test_data" / "data.json")
KINDS = {"full": {}, "frozen tower": {"freeze": ["vision", "merger"]}, "LoRA": {"lora_rank": 4, "lora_vision": True}}
CPU = torch.device("cpu")


class Broken(Exception):
    pass


class Trained:
    """A small bf16 run, taken apart: model, optimizer, and what the loop does with them."""

    def __init__(self, tiny_path: Path, folder: Path, changes: dict) -> None:
        own = {"dtype": "bfloat16", "eval_data": [HELD_OUT], "eval_samples": 2}
        self.config = Config(**runs.settings(tiny_path, folder, **own, **changes))
        torch.manual_seed(0)
        processor = load_processor(str(tiny_path))
        self.budget, self.folder, self.processor = Budget.of(self.config, "qwen2_vl"), folder, processor
        self.model = build_model(self.config, str(tiny_path), processor, CPU)
        self.optimizer = build_optimizer(self.model, self.config)
        # the optimizer's own, asked before anything was computed
        self.own = {p for group in self.optimizer.param_groups for p in group["params"]}
        self.samples = Samples(load_examples([HELD_OUT], processor), processor, self.budget)

    def batches(self, breaks: bool = False):
        for indices in ([0, 1, 2], [3, 4]):
            yield Collator()([self.samples[index] for index in indices])
            if breaks:
                raise Broken

    def step(self) -> None:
        for batch in self.batches():
            self.model(batch).backward()
        clip_gradient(self.model, self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        evaluate_loss(self.model, self.batches(), CPU)

    def answer(self) -> None:
        evaluate_answers(self.model, self.samples, CPU, self.config)

    def interrupted(self) -> None:
        with pytest.raises(Broken):
            evaluate_loss(self.model, self.batches(breaks=True), CPU)

    def resumed(self) -> None:
        """From a checkpoint that was written after an evaluation."""
        self.step()
        self.evaluate()
        saver = checkpoint.Saver(self.folder, self.config, 9, print, {})
        saver.save(self.model, self.optimizer, {"step": 1})
        saver.wait()
        checkpoint.load_checkpoint(self.folder / "checkpoints" / "step_000001", self.model, self.optimizer)
        self.evaluate()


STATES = {
    "built": [],
    "after a step": ["step"],
    "after an evaluation of the loss": ["step", "evaluate"],
    "after answers": ["step", "answer"],
    "after both": ["step", "evaluate", "answer"],
    "after an interrupted evaluation": ["step", "interrupted"],
    "resumed": ["resumed"],
    "a step after an evaluation": ["evaluate", "step"],
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("state", STATES)
def test_the_tensors_of_a_run(state, kind, tiny_path, tmp_path):
    run = Trained(tiny_path, tmp_path, KINDS[kind])
    for action in STATES[state]:
        getattr(run, action)()

    def again() -> None:
        """Whoever asks leaves the model as it should be: each must meet the state as it was."""
        for action in STATES[state][-1:]:
            getattr(run, action)()

    tensors, _ = checkpoint.tensors_and_scalars(run.model, run.optimizer)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, f"a checkpoint would hold {name} in {tensor.dtype}"
    again()
    save_model(run.model, run.processor, run.budget, tmp_path)
    if kind == "LoRA":
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
            assert tensor.dtype == torch.float32, f"the export holds {name} in {tensor.dtype}"
    again()
    found = trained_parameters(run.model)
    trained = {parameter for parameter in found.values() if parameter.requires_grad}
    assert trained == run.own, "these are not the tensors that the optimizer changes"
    assert {id(p) for p in run_parameters(run.model).values()} >= {id(p) for p in run.own}


def test_a_step_after_a_forward_pass_alone_uses_the_new_weights(tiny_path, tmp_path):
    """Working copies that an evaluation left behind must not serve the step after an update."""
    run, other = (Trained(tiny_path, tmp_path, {}) for _ in range(2))
    for one in (run, other):
        one.step()
    run.evaluate()
    for one in (run, other):
        with torch.no_grad():
            for parameter in trained_parameters(one.model).values():
                parameter.mul_(1.5)
    ours, theirs = (evaluate_loss(one.model, one.batches(), CPU)["loss_sum"] for one in (run, other))
    assert ours == theirs


def test_bf16_evaluated_and_saved_and_resumed(tiny_path, tmp_path):
    """The road of every run on a GPU, its last two steps resumed: bit for bit the run that was not stopped."""
    own = {"dtype": "bfloat16", "eval_data": [HELD_OUT], "eval_every": 2, "save_every": 2, "keep": 9}
    whole = finetune.train(Config(**runs.settings(tiny_path, tmp_path / "whole", max_steps=4, **own)))
    stopped = runs.settings(tiny_path, tmp_path / "stopped", max_steps=4, **own)
    resume = str(Path(whole, "checkpoints", "step_000002"))
    finetune.train(Config(**{**stopped, "resume": resume}))
    ours, theirs = runs.weights(tmp_path / "stopped"), runs.weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert runs.metrics(tmp_path / "stopped", "eval_loss") == runs.metrics(whole, "eval_loss")[-1:]
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
