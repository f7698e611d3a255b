"""Which settings let a run fit the memory of its device: of those that change memory and speed alone, the fastest that
fit; and what to name where none does."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util import compilation, ranks
from util.adapters.settings import untrained_parts
from util.command_line import choices_of
from util.config import Config
from util.cost import flops, memory, stages
from util.cost.memory import GIB, Forecast
from util.cost.settings import changed
from util.loss import LOGIT_ROWS, most_logit_rows
from util.steps import Steps
from util.tensors import PARTS

FEWEST_TOKENS = 4096  # of a micro-batch that is made smaller: below, matrix products no longer fill a GPU
LOGIT_CHOICES = (None, LOGIT_ROWS, 1024, 512)  # rows of logits at a time; None: as many as util/loss.py takes
CHECKPOINTING = ("none", "selective", "full")
SMALL_OPTIMIZERS = {"adamw_flash": "flashoptim", "adamw_8bit": "bitsandbytes"}  # and the package that each needs

# What a rung costs is computed from round numbers of one H200; only their proportions decide, and those are alike on
# other cards. The launches are counted; no time is measured.
FLOPS_PER_SECOND = 400e12  # that bf16 matrix products of these sizes reach
BYTES_PER_SECOND = 3e12  # that memory-bound kernels reach
LAUNCH_SECONDS = 5e-6  # of the host for each kernel
EAGER_LAUNCHES = 77  # of a layer's forward and backward pass: 4,625 in the 60 layers of 2B (counted)
COMPILED_LAUNCHES = 30  # 1,825 there
LAUNCHES_AGAIN = {"none": 1.0, "selective": 1.15, "full": 1.33}  # with those of what is computed again
BYTES_PER_GRADIENT = 10  # a gradient is computed in bf16, and added to the fp32 sum of those before it
SELECTIVE = 0.05  # share of a step's time: norms, rotations and activations are computed again


@dataclass
class Rung:
    """One choice of the settings that a memory budget may change."""

    changes: dict[str, object]  # what is other than asked for
    config: Config
    steps: Steps
    seconds: float  # of all steps, by the estimate above
    needs: Forecast  # bytes by part
    needed: float  # bytes of them all, and of what lies between them


class Planner:
    """Estimates rungs: what each needs, and how long it takes."""

    def __init__(
        self,
        config: Config,
        steps: Steps,
        model_config,
        counts: dict,
        dtype: torch.dtype,
        device: torch.device,
        shards: int = 1,
    ) -> None:
        self.config, self.model_config, self.counts = config, model_config, counts
        self.dtype, self.device, self.shards = dtype, device, shards
        self.packed = {config.max_tokens: steps}
        columns = steps.sizes.columns()
        usable = steps.sizes.usable
        epochs = len(steps) / steps.per_epoch
        forward = flops.forward_flops(model_config, columns)
        self.forward = {part: float(forward[part][usable].sum()) * epochs for part in PARTS}
        self.training = float(np.sum(flops.training_flops(model_config, [columns], config)[usable])) * epochs
        head = 2 * model_config.text_config.hidden_size * model_config.text_config.vocab_size
        self.head = head * float(columns.supervised[usable].sum()) * epochs
        self.cut = stages.cut_of(model_config, config, steps.sizes)  # the same for all rungs
        self.longest = int(steps.sizes.tokens[usable].max(initial=0))

    def rungs(self, config: Config) -> list[Rung]:
        """Every choice that `config` leaves open, the fastest first; of equally fast ones that with fewer changes."""
        open_to = {
            "max_tokens": self.token_limits() if is_open(config, "max_tokens") else [config.max_tokens],
            "activation_checkpointing": checkpointing_choices(config),
            "logit_rows": LOGIT_CHOICES if is_open(config, "logit_rows") else [config.logit_rows],
        }
        found = []
        for values in itertools.product(*open_to.values()):
            wanted = dict(zip(open_to, values, strict=True))
            changes = {name: value for name, value in wanted.items() if value != getattr(config, name)}
            chosen = changed(config, **changes)
            found.append(self.rung(changes, chosen))
        return sorted(found, key=lambda rung: (rung.seconds, len(rung.changes)))

    def first_that_fits(self, config: Config, budget: float) -> Rung | None:
        return next((rung for rung in self.rungs(config) if rung.needed <= budget), None)

    def token_limits(self) -> list[int]:
        """--max_tokens as asked, then half of it and so on, down to `FEWEST_TOKENS` or the longest sample."""
        least = max(FEWEST_TOKENS, self.longest)
        limits = [self.config.max_tokens]
        while limits[-1] > least:
            limits.append(max(limits[-1] // 2, least))
        return limits

    def steps_of(self, config: Config) -> Steps:
        """The steps in micro-batches of these settings; all ranks ask for the same in the same order."""
        if config.max_tokens not in self.packed:
            self.packed[config.max_tokens] = self.packed[self.config.max_tokens].repacked(config)
        return self.packed[config.max_tokens]

    def rung(self, changes: dict[str, object], config: Config) -> Rung:
        steps = self.steps_of(config)
        needs = stages.forecast(
            self.model_config, self.counts, config, self.dtype, steps, self.shards, self.device, self.cut
        )
        needed = sum(needs.values()) + memory.reserved_margin(needs, self.device)
        return Rung(changes, config, steps, self.seconds(config, steps), needs, needed)

    def seconds(self, config: Config, steps: Steps) -> float:
        """What all steps take: the larger of the GPU's time and the host's for launching, and each pass's gradients."""
        passes = steps.survey.passes
        layers = self.model_config.text_config.num_hidden_layers + self.model_config.vision_config.depth
        ranks_at_work = steps.dealing.ranks * config.ranks_of_a_row
        work = (self.training + self.recomputed(config, steps)) / FLOPS_PER_SECOND / ranks_at_work
        trained = sum(self.counts[part] for part in PARTS if part not in config.freeze)
        if config.lora_rank:
            trained = sum(self.counts["adapters"].values())
        gradients = trained * BYTES_PER_GRADIENT / BYTES_PER_SECOND
        per_layer = COMPILED_LAUNCHES if self.is_compiled(config) else EAGER_LAUNCHES
        launches = passes * layers * per_layer * LAUNCHES_AGAIN[config.activation_checkpointing]
        return max(work, launches * LAUNCH_SECONDS) + passes * gradients

    def is_compiled(self, config: Config) -> bool:
        """Then layers launch fewer kernels, and what `selective` makes anew is made inside of them."""
        return compilation.is_on(config.compile, self.device)

    def recomputed(self, config: Config, steps: Steps) -> float:
        """Floating-point operations of what is computed a second time (in the backward pass), or worth as much."""
        total = 0.0
        if config.activation_checkpointing == "full":  # every layer that keeps anything
            total += self.forward["language_model"] - self.head
            total += 0 if "vision" in untrained_parts(config) else self.forward["vision"]
        elif config.activation_checkpointing == "selective" and not self.is_compiled(config):
            total += SELECTIVE * self.training
        most = max((supervised for _, _, supervised in steps.survey.heaviest.tolist()), default=0)
        if most > most_logit_rows(config.logit_rows, self.is_compiled(config)):
            total += self.head
        return total


def fit_memory(
    config: Config,
    steps: Steps,
    model_config,
    counts: dict,
    dtype: torch.dtype,
    device: torch.device,
    resumed: Path | None = None,
    shards: int = 1,
) -> tuple[Config, Steps, Forecast]:
    """The settings and steps with which the run fits its memory budget, and what it needs in bytes by part, with
    what was chosen and what that costs in words (`chosen`).

    What was typed stays as it is, and so does the mathematics, unless `--memory_budget_may_change_optimizer`. Where
    nothing fits, or nothing is to be chosen, all comes back as it was: `memory.check` refuses what is too large. On
    several ranks all call, and choose the same by the smallest of their budgets.
    """
    budget = memory.budget_of(config, device)
    if budget is None:
        return config, steps, stages.forecast(model_config, counts, config, dtype, steps, shards, device)
    budget = min(ranks.gather_on_all(budget))
    planner = Planner(config, steps, model_config, counts, dtype, device, shards)
    asked = planner.rung({}, config)
    if asked.needed <= budget:  # most runs: no steps are planned anew
        asked.needs.chosen = rung_in_words(asked, asked, budget)
        return config, steps, asked.needs
    for changes in [{}, *optimizers_allowed(config, device, resumed)]:
        chosen = planner.first_that_fits(changed(config, **changes), budget)
        if chosen:
            chosen.changes |= changes
            chosen.config.asked = {name: getattr(config, name) for name in chosen.changes}
            chosen.needs.chosen = rung_in_words(chosen, asked, budget)
            return chosen.config, chosen.steps, chosen.needs
    return config, steps, asked.needs


def is_open(config: Config, name: str) -> bool:
    """Whether a setting may be chosen: nobody typed it, and it is what it is by default."""
    return name not in config.given and getattr(config, name) == getattr(Config, name)


def checkpointing_choices(config: Config) -> list[str]:
    if not is_open(config, "activation_checkpointing"):
        return [config.activation_checkpointing]
    return [name for name in CHECKPOINTING if name in choices_of(Config, "activation_checkpointing")]


def optimizers_allowed(config: Config, device: torch.device, resumed: Path | None) -> Iterator[dict]:
    """Optimizers with smaller moments that may be taken, of those that are installed: where that was allowed, and no
    checkpoint holds the moments of another one. They work on one GPU alone."""
    is_allowed = config.memory_budget_may_change_optimizer and not resumed and is_open(config, "optimizer")
    if not is_allowed or device.type != "cuda" or ranks.are_several():
        return
    for name, package in SMALL_OPTIMIZERS.items():
        if name in choices_of(Config, "optimizer") and importlib.util.find_spec(package):
            yield {"optimizer": name}


def rung_in_words(chosen: Rung, asked: Rung, budget: float) -> str:
    """`selective checkpointing: about 5 % slower, 44.7 -> 31.2 GiB of 40.0`."""
    room = f"of the {budget / GIB:.1f} GiB that it may take"
    if not chosen.changes:
        return f"as asked: {asked.needed / GIB:.1f} GiB {room}"
    names = []
    for name, value in chosen.changes.items():
        if name == "max_tokens":
            names.append(f"micro-batches of at most {value:,} tokens instead of {asked.config.max_tokens:,}")
        elif name == "activation_checkpointing":
            names.append(f"{value} activation checkpointing")
        elif name == "logit_rows":
            names.append(f"logits of {value:,} tokens at a time")
        else:
            names.append(f"--{name} {value}, WHICH CHANGES THE MATHEMATICS")
    slower = max(0.0, chosen.seconds / asked.seconds - 1)
    return (
        f"{', '.join(names)}: about {slower:.0%} slower (an estimate), "
        f"{asked.needed / GIB:.1f} -> {chosen.needed / GIB:.1f} GiB {room}"
    )
