"""How near does a training step come to what the device can do? Speed, model FLOPs utilisation (MFU) and peak memory.

    python benchmarks/mfu.py --size 2b --cases text:4 images_448:4 --compiled yes --rows rows.jsonl --profile time.json
    python benchmarks/mfu.py --size 2b --cases load_20480_40960:1 --fresh --rows memory.jsonl --lora_rank 16
    python benchmarks/mfu.py --size tiny --cases text:2 mixed:1 --device cpu

A case is KIND:MICRO_BATCHES or KIND:MICRO_BATCHES:MAX_TOKENS; kinds are those of drawn.py. Weights are random, made on
the device, and prepared by the functions that finetune.py calls; batches are drawn and pinned before the clock starts.
Every flag of finetune.py works too (--attention, --activation_checkpointing, --optimizer, --lora_rank, --freeze ...).
FLOPs are those of cost/flops.py: the vision tower counts, what is computed twice does not. Each case is a row of JSON,
written as soon as it is measured; one that fails is a row that says why, and the next one goes on with a new model.
"""
# ruff: noqa: E402

import argparse
import dataclasses
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import json

import torch

from benchmarks import device_time, drawn
from benchmarks.report import origin
from benchmarks.rows import write_row
from benchmarks.train_step import (
    SCALES,
    describe_model,
    random_model,
    release,
    training_step,
)
from util.adapters import lora
from util.adapters.settings import untrained_parts
from util.command_line import run_command
from util.config import Config, parse_arguments
from util.cost import flops, memory
from util.log import versions
from util.model import choose_device, choose_dtype, prepare_model
from util.optimizer import build_optimizer

GIB = memory.GIB
SHRINK = {"tiny": 16}  # of texts and images, for models that are not of a published size
MAX_TOKENS = {"tiny": 512}
PARTS = ("tower", "language_model", "head")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SCALES, required=True, help="sizes of the model and of its data")
    parser.add_argument("--cases", nargs="+", type=Case.of, required=True, help="KIND:MICRO_BATCHES[:MAX_TOKENS]")
    parser.add_argument("--compiled", choices=("yes", "no"), help="default: what --compile says")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a case")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that are not measured")
    parser.add_argument("--layers", type=int, help="only this many layers in the tower and in the language model")
    parser.add_argument("--vocabulary", choices=("own", "official"), default="own", help="of the tiny model")
    parser.add_argument("--fresh", action="store_true", help="a new model and optimizer for each case")
    parser.add_argument("--seconds", type=float, help="begin no case later than this after the start")
    parser.add_argument("--rows", type=Path, help="append each row here")
    parser.add_argument("--profile", type=Path, help="write where the time of a step of each case goes here")
    own, others = parser.parse_known_args(arguments)
    defaults = ["--max_tokens", str(MAX_TOKENS.get(own.size, 16384)), "--schedule", "constant", "--warmup_ratio", "0"]
    return own, parse_arguments(summary, defaults + compile_flags(own.compiled) + others)


def compile_flags(compiled: str | None) -> list[str]:
    """The flag that compiles or does not; none where nothing was said."""
    return ["--compile", "on" if compiled == "yes" else "off"] if compiled else []


@dataclasses.dataclass
class Case:
    """What is measured together: a kind of data, micro-batches a step, the size of each."""

    kind: str
    micro_batches: int
    max_tokens: int | None = None  # None: the setting's

    @classmethod
    def of(cls, text: str) -> "Case":
        kind, *numbers = text.split(":")
        if kind not in drawn.KINDS and not kind.startswith("load_"):
            raise argparse.ArgumentTypeError(f"{kind} is none of {', '.join(drawn.KINDS)} or load_TOKENS_PATCHES")
        try:
            return cls(kind, *map(int, numbers or ["1"]))
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"{text} is not KIND:MICRO_BATCHES[:MAX_TOKENS]") from None

    def __str__(self) -> str:
        return f"{self.kind} x {self.micro_batches}" + (f" x {self.max_tokens}" if self.max_tokens else "")


# ---- the clock -------------------------------------------------------------------------------------------------------


class Clock:
    """Marks in the device's own queue: they cost it nothing, and nothing waits for them until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def intervals(self) -> list[tuple[str, str, float]]:
        """(mark, next mark, seconds between them), all of them; call `wait` before."""
        found = []
        for (name, begin), (following, end) in pairwise(self.marks):
            seconds = begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin
            found.append((name, following, seconds))
        return found


# By the mark at which an interval ends: what the device has done in it. Looking up words, and its gradient, count to
# the tower, as both stand between the same marks.
INTERVALS = {
    "embedded": "tower",
    "rows ready": "language_model",
    "forward ends": "head",
    "head's gradients": "head",
    "language model's gradients": "language_model",
    "pass ends": "tower",
    "step ends": "optimizer",
}


def watch_parts(model, mark: Callable[[str], None]) -> None:
    """Let a PackedLoss mark where its parts end, forward and backward. Its own methods do the work."""
    embed, supervised_rows = model.embed, model.supervised_rows

    def marked(name: str, name_backward: str, work: Callable, *arguments, **named):
        result = work(*arguments, **named)
        mark(name)
        rows = result[0] if isinstance(result, tuple) else result  # embed also gives what layers add to them
        if rows.requires_grad:
            rows.register_hook(lambda gradient: mark(name_backward))
        return result

    model.embed = partial(marked, "embedded", "language model's gradients", embed)
    model.supervised_rows = partial(marked, "rows ready", "head's gradients", supervised_rows)


def seconds_of_parts(clock: Clock, steps: int) -> dict[str, float]:
    """Of a step, by what was done; time between steps, and copying the batch to the device, belong to none."""
    found = dict.fromkeys((*PARTS, "optimizer"), 0.0)
    for name, following, seconds in clock.intervals():
        part = INTERVALS.get(following)
        if following == "pass ends" and name != "language model's gradients":
            part = "language_model"  # nothing below it is trained, so its backward pass is the last
        if part:
            found[part] += seconds / steps
    return found


# ---- the model -------------------------------------------------------------------------------------------------------


class Trained:
    """A model with random weights, made on the device, and its optimizer, prepared by the functions of finetune.py."""

    def __init__(self, config: Config, described: tuple, device: torch.device, micro_batches: int) -> None:
        model_config, processor = described
        model = random_model(model_config, config.seed, device, choose_dtype(config.dtype, device))
        if config.quantize != "none":
            lora.quantise(model.to("cpu"), device)
        self.model = prepare_model(model.to(device), config, processor, device)
        self.optimizer = build_optimizer(self.model, config, micro_batches)
        self.has_several = micro_batches > 1
        self.clock = Clock(device)
        watch_parts(self.model, lambda name: self.clock.mark(name))
        self.done = 0

    def step(self, batches: list, config: Config, device: torch.device) -> dict[str, float]:
        self.done += 1
        mark = self.clock.mark
        return training_step(self.model, self.optimizer, batches, self.done, 10**6, config, device, mark)


# ---- a row -----------------------------------------------------------------------------------------------------------


def measure(trained: Trained, case: Case, own, config: Config, model_config, device: torch.device, begin: dict) -> dict:
    """Draw, warm up, time. The row so far is in `begin`, and stays of use if this fails."""
    on_gpu = device.type == "cuda"
    drawer = drawn.Drawer(case.kind, config.seed, model_config.text_config.vocab_size, SHRINK.get(own.size, 1))
    tokens = case.max_tokens or config.max_tokens
    steps = [drawer.step(case.micro_batches, tokens, on_gpu) for _ in range(max(1, min(3, own.steps)))]
    begin["data"] = {"loads": steps[0].loads, "samples": len(steps[0].sizes)}  # tokens, patches, supervised of each
    begin["forecast_gib"] = round(forecast_gib(model_config, config, device, steps), 3)
    began = time.perf_counter()
    warm = []
    for number in range(own.warmup):
        trained.step(steps[number % len(steps)].batches, config, device)
        warm.append(round(time.perf_counter() - began, 3))
    begin["warm_up_seconds"] = warm  # from the first step's begin to the end of each
    trained.clock.wait()
    trained.clock.marks.clear()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    ends, told = [], []
    for number in range(own.steps):
        told.append(trained.step(steps[number % len(steps)].batches, config, device))
        ends.append(time.perf_counter() - began)
    trained.clock.wait()
    seconds = time.perf_counter() - began
    measured = [steps[number % len(steps)] for number in range(own.steps)]
    row = {**figures(measured, seconds, seconds_of_parts(trained.clock, own.steps), config, model_config, device)}
    row["step_ends"] = [round(end, 4) for end in ends]
    row["host_wait_seconds"] = round(statistics.mean(step["host_wait_seconds"] for step in told), 4)
    row["losses"] = [round(step["loss"], 4) for step in told]
    row["grad_norm"] = told[-1]["grad_norm"]
    if on_gpu:
        row["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 3)
        row["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
    row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if own.profile:
        row["profile"] = device_time.profiled(lambda: trained.step(steps[0].batches, config, device), device)
    return row


def figures(measured: list, seconds: float, parts: dict, config: Config, model_config, device: torch.device) -> dict:
    """Of the measured steps: speed, FLOP/s and MFU, all of it and by part."""
    sizes = [size for step in measured for size in step.sizes]
    work = float(flops.training_flops(model_config, sizes, config))
    peak = flops.peak_flops(device)
    row = {
        "seconds": round(seconds / len(measured), 4),
        "tokens_per_second": round(sum(size.tokens for size in sizes) / max(seconds, 1e-9), 1),
        "samples_per_second": round(len(sizes) / max(seconds, 1e-9), 3),
        "tflops": round(work / max(seconds, 1e-9) / 1e12, 3),
        "mfu": round(work / max(seconds, 1e-9) / peak, 4) if peak else None,
        "parts": {},
    }
    of_parts = flops_of_parts(model_config, sizes, config)
    for part, spent in parts.items():
        row["parts"][part] = {"seconds": round(spent, 4)}
        if part in of_parts and peak and spent > 0:
            row["parts"][part]["mfu"] = round(of_parts[part] / len(measured) / spent / peak, 4)
    return row


def flops_of_parts(model_config, sizes: list, config: Config) -> dict[str, float]:
    """Forward and backward FLOPs by part where all of the model is trained, else of none."""
    if config.lora_rank or untrained_parts(config):
        return {}
    work = flops.work_by_part(model_config, sizes, config)
    tower = work["vision"] + work["merger"]
    return {"tower": tower, "language_model": work["language_model"], "head": work["head"]}


def forecast_gib(model_config, config: Config, device: torch.device, steps: list) -> float:
    """What the plan of a run on these micro-batches would say."""
    dtype = choose_dtype(config.dtype, device)
    counts = memory.count_parameters(model_config, config)
    loads = [load for step in steps for load in step.loads]
    passes = len(steps[0].loads)
    return sum(memory.forecast(model_config, counts, config, dtype, loads, passes=passes, device=device).values()) / GIB


def changed_settings(config: Config) -> dict:
    """The settings that are not at their default."""
    plain = dataclasses.asdict(Config())
    return {name: value for name, value in dataclasses.asdict(config).items() if value != plain[name]}


def main(arguments: list[str]) -> None:
    own, config = parse(arguments)
    device = choose_device(config.device)
    described = describe_model(own)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    common = {
        **origin("mfu.py", arguments, device=gpu),
        "versions": versions(),
        "dtype": str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        "size": own.size,
        "layers": own.layers,
        "settings": changed_settings(config),
    }
    profiles: dict[str, dict] = {}
    trained = None
    for case in own.cases:
        row: dict = {"row": name_of_row(own, config, case), "kind": case.kind, "micro_batches": case.micro_batches}
        row["max_tokens"] = case.max_tokens or config.max_tokens
        if own.seconds and time.monotonic() - STARTED > own.seconds:
            write_row(own.rows, {**row, "error": "not measured: no time was left", **common})
            continue
        # gradients of several micro-batches are added up in another precision than those of one
        if trained and (own.fresh or trained.has_several != (case.micro_batches > 1)):
            trained = None
            forget(device)
        try:
            trained = trained or Trained(config, described, device, case.micro_batches)
            row |= measure(trained, case, own, config, described[0], device, row)
        except Exception as error:  # whatever it is, the rows after it are worth having
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
            row["traceback"] = traceback.format_exc()[-2000:]
            if device.type == "cuda":
                row["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
        if "error" in row:  # out here, where the error no longer holds the frames that hold the tensors
            trained = None
            forget(device)
        if found := row.get("profile"):
            profiles[row["row"]] = found
            print(device_time.table(found))
            row["profile"] = {key: value for key, value in found.items() if key != "costliest"}
            own.profile.parent.mkdir(parents=True, exist_ok=True)
            own.profile.write_text(json.dumps({**common, "profiles": profiles}, indent=1) + "\n", encoding="utf-8")
        write_row(own.rows, {**row, **common})


def name_of_row(own: argparse.Namespace, config: Config, case: Case) -> str:
    """`2b compiled text x 4`, with the settings that change speed or memory."""
    words = [own.size]
    if own.compiled:
        words.append("compiled" if own.compiled == "yes" else "eager")
    shown = ("attention", "activation_checkpointing", "optimizer", "lora_rank", "quantize", "freeze", "dtype")
    plain = Config()
    for name in shown:
        value = getattr(config, name)
        if value != getattr(plain, name):
            words.append(memory.flag_in_words(name, value).removeprefix("--"))
    return f"{' '.join(words)}, {case}"


def forget(device: torch.device) -> None:
    """Free what the last model held, compiled code and all."""
    torch._dynamo.reset()
    release(device)
    gc.collect()


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
