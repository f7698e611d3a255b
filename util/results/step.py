"""One optimizer step of a run, looked at again: its samples, and what each gave to its loss and gradient."""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from util.checkpoint import data_fingerprint, load_checkpoint, read_state
from util.collator import Batch, Collator
from util.command_line import UserError
from util.config import Config
from util.cost.measure import measure_all
from util.data.lines import DataError, split_weight
from util.data.media import MediaReader
from util.dataset import Examples, Samples
from util.model import build_model, choose_device, load_processor, model_type_of
from util.optimizer import build_optimizer, sum_gradients_in_fp32
from util.run_folder import METRICS, SAMPLES, complete_checkpoints, read_lines, read_metrics, read_settings, step_of
from util.tensors import run_parameters
from util.vision import Budget


@dataclass
class Share:
    """What a sample gave to a step."""

    loss: float  # mean cross-entropy of its supervised tokens, each counted by its weight
    grad_norm: float  # of its own part of the step's gradient
    share: float  # own gradient x step's gradient / its square: may be below 0; those of a step add up to 1


class RunStep:
    """A step of a run, by what the run directory says of it. Raises UserError where it does not know the step."""

    def __init__(self, run: Path, number: int) -> None:
        settings = read_settings(run)
        if not settings:
            raise UserError(f"--run {run}: no run of finetune.py, it has no training_config.json")
        lines = {line["step"]: line["samples"] for line in read_lines(run / SAMPLES)}
        if number not in lines:
            known = f"it has steps {min(lines)} to {max(lines)}" if lines else f"it has no {SAMPLES}"
            raise UserError(f"--step {number}: {run} knows nothing of it; {known}")
        self.run = run
        self.number = number
        self.sample_numbers: list[int] = lines[number]
        self.config = config_of(settings)
        self.model_path: str = settings["model"]
        missing = [file for file in self.config.data if not Path(split_weight(file)[0]).exists()]
        if missing:
            raise UserError(f"--run {run}: {missing[0]} is not here; go to the folder that the training was started in")
        # A finished run has a processor of its own, so that its first model need not be there any more.
        is_finished = (run / "tokenizer_config.json").exists()
        self.processor = load_processor(str(run)) if is_finished else load_processor(self.model_path, self.config)
        examples = Examples(self.config.data, self.processor, self.config.train_on)
        if len(examples) <= max(self.sample_numbers, default=-1):
            raise UserError(
                f"{', '.join(self.config.data)}: fewer samples than {run} was trained on; restore the files"
            )
        budget = Budget.of(settings, model_type_of(self.model_path))
        self.samples = Samples(examples, self.processor, budget, MediaReader(self.config))
        if self.config.on_long_sample == "shrink":
            measure_all(self.samples, self.config)  # finds the budgets of those that were shrunk

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint of the run before the step."""
        before = [path for path in complete_checkpoints(self.run) if step_of(path) < self.number]
        return before[-1] if before else None

    def in_words(self) -> str:
        """A line with what the log says of the step, and one where the data are others than the run had."""
        logged = [line for line in read_metrics(self.run) if line["step"] == self.number and "loss" in line]
        text = f"step {self.number} of {self.run}: {len(self.sample_numbers)} samples"
        if logged:
            text += f", loss {logged[0]['loss']:.4f}, gradient norm {logged[0]['grad_norm']:.4f} (by {METRICS})"
        saved = complete_checkpoints(self.run)
        if saved and read_state(saved[-1])["data"] != data_fingerprint(self.config.data):
            text += "\nthe data files have changed since: a number may be another sample now"
        return text

    def shares(self, device_name: str) -> tuple[dict[int, Share], float]:
        """What each sample gave to the step, by its number, and the norm of the step's whole gradient, with the weights
        of `checkpoint`, or with those that the run began with. A sample that cannot be read is left out.

        Two passes over the samples, one by one: the first adds up the step's gradient, the second compares each
        sample's own with it. Dropout is off, so with --lora_dropout the numbers are not quite those of the training.
        """
        device = choose_device(device_name)
        config = dataclasses.replace(self.config, device=str(device))
        model = build_model(config, self.model_path, self.processor, device)
        if self.checkpoint:
            load_checkpoint(self.checkpoint, model, build_optimizer(model, config))
        sum_gradients_in_fp32(model)
        model.eval()
        batches = self.read()
        weight = sum(batch.counts["supervised_weight"] for batch in batches.values())
        parameters = [p for p in run_parameters(model).values() if p.requires_grad]
        for batch in tqdm(batches.values(), "the step's gradient", unit=" samples", leave=False, disable=None):
            add_gradient(model(batch.to(device)) / weight)
        whole = take_gradients(parameters)
        square = dot(whole, whole)
        found = {}
        for number, batch in tqdm(batches.items(), "each sample's own", unit=" samples", leave=False, disable=None):
            loss_sum = model(batch.to(device))
            add_gradient(loss_sum / weight)
            own = take_gradients(parameters)
            loss = loss_sum.item() / batch.counts["supervised_weight"]
            share = dot(own, whole) / square if square else 0.0  # a step of text alone moves nothing
            found[number] = Share(loss, dot(own, own) ** 0.5, share)
        return found, square**0.5

    def read(self) -> dict[int, Batch]:
        """A batch of each sample alone, by its number, of those that can be read."""
        batches = {}
        collate = Collator(self.samples.budget.model_type)
        for number in self.sample_numbers:
            with suppress(DataError):  # `--on_bad_sample skip` may have left it out of the step
                batches[number] = collate([self.samples[number]])
        return batches


def config_of(settings: dict) -> Config:
    """The Config of a run from its training_config.json, without what reaches beyond this machine."""
    names = {item.name for item in dataclasses.fields(Config)} - {"report_to", "push_to_hub", "push_every_save"}
    known = {name: value for name, value in settings.items() if name in names}
    return Config(**{**known, "device": "auto", "attention": "auto", "resume": "none", "compile": "off"})


def add_gradient(loss: torch.Tensor) -> None:
    """The backward pass, where there is one: text has no gradient where only the vision tower is trained."""
    if loss.requires_grad:
        loss.backward()


def take_gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of parameters, which have none afterwards; zeros of those that have none."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        found.append(gradient.to_local() if hasattr(gradient, "to_local") else gradient)
        parameter.grad = None
    return found


def dot(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The scalar product of two gradients, in fp64."""
    total = 0.0
    for one, other in zip(ones, others, strict=True):
        total += (one.double() * other.double()).sum().item()
    return total
