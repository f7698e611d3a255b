"""Trains runs of tests/matrix.py one after another: in one process, or under torchrun in each of several.

    python tests/matrix_runs.py JOBS.json

A job is {"directory", "config": fields of Config, "stop": null or how it is stopped in its second step, "breaks": null
or a file that becomes unreadable before it goes on, "optimizer", "no_number": whether the loss of its second step is
none, "fault": null or one of matrix_faults.FAULTS}. Each process
leaves OUTCOME in the job's directory: null, or what ended it. Beside the run lie the gradients of its first and its
last step as they were before clipping, whole and by name.
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from tests import matrix_faults
from util import checkpoint, optimizer, ranks, small_adamw
from util.command_line import Ended, UserError
from util.config import Config
from util.parallel import faults
from util.results import evaluate

STEPS, STOPPED_AT, NO_NUMBER_AT = 4, 2, 2
GRADIENTS, REFUSED = "gradients.safetensors", "refused.txt"
BUILD = optimizer.build_optimizer
WAIT_FOR_WORKERS = 0.2  # seconds in which a data worker that a signal ends has ended


def outcome_file(directory: str | Path, rank: int) -> Path:
    return Path(directory) / f"outcome_{rank}.json"


class Bystander:
    """Sees the gradients of every step just before they are clipped, and sends the signal that stops a run."""

    def __init__(self, job: dict) -> None:
        self.job, self.step, self.seen = job, 0, {}
        self.clip = optimizer.clip_gradient

    def spoil(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a training pass, in one step no number."""
        return loss * float("nan") if self.step + 1 == NO_NUMBER_AT else loss

    def clip_gradient(self, model: nn.Module, *arguments):
        self.step += 1
        if self.step in (1, STEPS):
            self.remember(model)
        if self.step == STOPPED_AT and self.job["stop"] and "resume" not in self.job["config"]:
            send(**self.job["stop"])
        return self.clip(model, *arguments)

    def remember(self, model: nn.Module) -> None:
        """Every rank takes part, as sharded gradients are gathered; the first keeps them."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                self.seen[f"{self.step} {name}"] = gradient.detach().to("cpu", torch.float32, copy=True)

    def write(self) -> None:
        seen = [self.seen]
        if self.job["config"].get("pipeline_parallel_size", 1) > 1:  # each rank has seen those of its own layers
            seen = [None] * dist.get_world_size()
            dist.all_gather_object(seen, self.seen)
        if ranks.is_first():
            save_file(dict(ChainMap(*seen)), Path(self.job["directory"]) / GRADIENTS)


def send(name: str, to_group: bool) -> None:
    """A signal to this process, or as a terminal, Slurm or systemd sends it: to its data workers, too.

    It comes from another process, as torch's data workers do not mind one from their parent.
    """
    workers = multiprocessing.active_children() if to_group else []
    assert workers or not to_group, "a run without data workers has no group"
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    subprocess.run(["kill", f"-{name.removeprefix('SIG')}", *map(str, pids)], check=True)
    if workers:
        time.sleep(WAIT_FOR_WORKERS)  # and not join, which would take their end from those who watch for it


class AdamWOfPlainMemory(torch.optim.Optimizer):
    """Stands in for bitsandbytes' AdamW8bit, which needs a GPU: the same arithmetic as AdamW's, and as there the
    parameters, gradients and states are plain memory, never DTensors, and the number of steps is no tensor."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, place)
                    self.update_step(group, parameter, number, place)

    def init_state(self, group: dict, parameter: nn.Parameter, number: int, place: int) -> None:
        moments = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
        self.state[parameter].update(step=0, **moments)

    @torch.no_grad()
    def update_step(self, group: dict, parameter: nn.Parameter, number: int, place: int) -> None:
        state = self.state[parameter]
        lr, betas, eps, weight_decay = (group[key] for key in ("lr", "betas", "eps", "weight_decay"))
        for tensor in (parameter, parameter.grad, state["state1"], state["state2"]):
            assert not hasattr(tensor, "to_local"), "bitsandbytes works on plain memory and was given a DTensor"
        state["step"] += 1
        first, second = state["state1"], state["state2"]
        first.lerp_(parameter.grad, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(parameter.grad, parameter.grad, value=1 - betas[1])
        parameter.mul_(1 - lr * weight_decay)
        scale = (second / (1 - betas[1] ** state["step"])).sqrt_().add_(eps)
        parameter.addcdiv_(first, scale, value=-lr / (1 - betas[0] ** state["step"]))


def build_as_on_a_gpu(model: nn.Module, config: Config, micro_batches: int = 1) -> torch.optim.Optimizer:
    """What `--optimizer adamw_8bit` gives on a GPU, with the stand-in for bitsandbytes' class."""
    import bitsandbytes.optim

    usual = BUILD(model, replace(config, optimizer="adamw"), micro_batches)
    keys = ("params", "weight_decay", "peak", "lr")
    groups = [{key: group[key] for key in keys} for group in usual.param_groups]
    with patch.object(bitsandbytes.optim, "AdamW8bit", AdamWOfPlainMemory):
        return small_adamw.eight_bit_adamw(groups)


@contextmanager
def no_watch_survives() -> Iterator[None]:
    """The thread that ends a job which hangs ends with its run: other runs follow in these processes."""
    watches, begin = [], faults.Watch.__init__

    def note(self, *arguments) -> None:
        begin(self, *arguments)
        watches.append(self)

    with patch.object(faults.Watch, "__init__", note):
        try:
            yield
        finally:
            for watch in watches:
                watch.finished.set()


def quicken() -> None:
    """Shorter answers, `--save_every 1min` after every step, and compilation without a C++ compiler."""
    evaluate.MOST_NEW_TOKENS = 8
    split, compile_ = checkpoint.split_interval, torch.compile
    checkpoint.split_interval = lambda text: (0, 1e-9) if str(text).endswith("min") else split(text)
    torch.compile = lambda *arguments, **rest: compile_(*arguments, **{**rest, "backend": "aot_eager"})


def train(config: dict) -> str:
    import finetune
    import finetune_distributed

    script = finetune_distributed if "RANK" in os.environ else finetune
    return script.train(Config(**config))


def perform(job: dict) -> None:
    """One run, stopped and resumed where the job says so."""
    try:
        train(job["config"])
        assert not job["stop"], "the signal did not stop it"
    except Ended as end:
        if not job["stop"] or end.code != 3:
            raise
        job["config"]["resume"] = "auto"
        if job["breaks"]:
            Path(job["breaks"]).write_bytes(b"no picture any more")
        go_on(job)


def go_on(job: dict) -> None:
    """Where a run refuses to go on because its data have changed, keep its words and have it go on."""
    try:
        train(job["config"])
    except UserError as refused:
        if not job["breaks"]:
            raise
        (Path(job["directory"]) / REFUSED).write_text(str(refused))
        train({**job["config"], "resume_anyway": True})


def attempt(job: dict) -> str | None:
    """What went wrong with a run, or None."""
    bystander = Bystander(job)
    build: Callable = build_as_on_a_gpu if job["optimizer"] == "adamw_8bit" else BUILD
    with ExitStack() as stack:
        stack.enter_context(no_watch_survives())
        stack.enter_context(patch.object(optimizer, "build_optimizer", build))
        if job["fault"]:
            stack.enter_context(matrix_faults.FAULTS[job["fault"]]())
        stack.enter_context(patch.object(optimizer, "clip_gradient", bystander.clip_gradient))
        if job["no_number"]:
            stack.enter_context(matrix_faults.changed_loss(bystander.spoil))
        try:
            perform(job)
            bystander.write()
        except BaseException:
            return traceback.format_exc()
        finally:
            torch._dynamo.reset()
            gc.collect()
    return None


def main(file: str) -> None:
    torch.set_num_threads(1)
    quicken()
    rank = int(os.environ.get("RANK", 0))
    for job in json.loads(Path(file).read_text()):
        print(f"==== {job['directory']}", flush=True)
        Path(job["directory"]).mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        outcome = attempt(job)
        print(f"==== {time.process_time() - began:.1f} s of this processor", flush=True)
        outcome_file(job["directory"], rank).write_text(json.dumps(outcome))
        if outcome:
            print(outcome, flush=True)
            if "RANK" in os.environ:
                os._exit(1)  # the ranks may be at different places: what follows begins in new processes


if __name__ == "__main__":
    main(sys.argv[1])
