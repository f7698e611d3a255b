"""What --memory_budget auto chooses on cards of several sizes, and whether the run then fits.

    python benchmarks/budget_table.py --phantom ../phantom_gpu/run --out benchmarks/results/budget.json
    python benchmarks/budget_table.py --row 7b_qlora              on the GPU of this machine, whatever its size

A typical data set: each sample an image of 1,024 tokens and a question and an answer of 96, 32 samples a step, all
settings as they are by default. Each row is chosen as a training script chooses it, before any weight is there, and
then two whole steps are run: forward, backward, clipping and update of a model of the published size. A row whose
settings were run on a smaller card already is not run again. With `--phantom` the card is a stand-in (see
tests/test_phantom.py) of as many GiB as the row says; its allocator counts as a GPU's does, its numbers mean nothing.
"""
# ruff: noqa: E402

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.memory_table import GRID, Case, untouched_model
from benchmarks.report import origin, write_result
from tests.official import official_config
from tests.test_phantom import watch
from util.collator import Batch, Collator
from util.command_line import UserError, run_command
from util.config import Config
from util.conversation import Encoded
from util.cost import memory
from util.cost.budget import fit_memory
from util.cost.memory import GIB
from util.cost.sizes import Finding, Sizes
from util.dataset import Sample, Size
from util.log import versions
from util.model import choose_device, choose_dtype
from util.optimizer import build_optimizer, clip_gradient
from util.passes import Passes
from util.steps import Steps
from util.vision import Medium

CARDS = (16, 24, 40, 48, 80, 141)  # GiB
TRAINED = {"full": {}, "lora": {"lora_rank": 16}, "qlora": {"lora_rank": 16, "quantize": "nf4"}}
SAMPLES = 32  # of a step
TEXT = 96  # tokens of a sample beside those of its image
SUPERVISED = 40
MOST_RESIDENT = 16.0  # GiB of this machine: two steps of 7B in full, whose update is compiled, take 14.7
DIALS = ("max_tokens", "activation_checkpointing", "logit_rows")


def one_sample() -> Sample:
    patches = torch.zeros(GRID.patches, 588, dtype=torch.uint8)
    weights = [0.0] * (TEXT + 1 - SUPERVISED) + [1.0] * SUPERVISED
    return Sample(Encoded([5] * len(weights), weights, [10]), [Medium(patches, GRID, is_video=False)], "one image")


def planned_steps(config: Config) -> Steps:
    size = Size(GRID.tokens + TEXT, SUPERVISED, [GRID])
    sizes = Sizes.of([Finding(size) for _ in range(SAMPLES)])
    return Steps(sizes, lambda epoch: np.arange(SAMPLES), SAMPLES, 1, None, config)


class Loud:
    """What Passes asks of a StopSignal and its run: to say what ran out of memory."""

    def __init__(self) -> None:
        self.run = self
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)
        print(text, flush=True)

    def end_out_of_memory(self, why: str, *unused) -> None:
        raise UserError(why)


def row(name: str, changes: dict, already_run: list[dict]) -> dict:
    """Choose for the card that is here, and run two steps with what was chosen."""
    size, trained = name.split("_", 1)
    device = choose_device("cuda")
    asked = Config(**{**TRAINED[trained], **changes, "global_batch_size": SAMPLES})
    dtype = choose_dtype(asked.dtype, device)
    model_config = official_config(size)
    counts = memory.count_parameters(model_config, asked)
    config, steps, needs = fit_memory(asked, planned_steps(asked), model_config, counts, dtype, device)
    words = needs.chosen
    found = {"free_gib": round(memory.free_bytes(device) / GIB, 2), "chosen": words}
    try:
        memory.check(model_config, config, dtype, device, steps.survey, needs)
    except UserError as refused:
        return {**found, "refused": str(refused)}
    found["settings"] = {dial: getattr(config, dial) for dial in DIALS}
    found["forecast_gib"] = round(sum(needs.values()) / GIB, 2)
    found["with_margin_gib"] = round((sum(needs.values()) + memory.reserved_margin(needs, device)) / GIB, 2)
    if found["settings"] in already_run:
        return {**found, "run": "on a smaller card"}
    return {**found, **two_steps(size, config, steps, device)}


def two_steps(size: str, config: Config, steps: Steps, device: torch.device) -> dict:
    began = time.perf_counter()
    # A loaded file and the model beside it are not imitated; see util/model.py for how weights come to the device.
    model = untouched_model(Case(size, {}, 0, 0), config, device)
    optimizer = build_optimizer(model, config, steps.survey.most)
    stop = Loud()

    def run_pass(batch: Batch, divisor: float) -> torch.Tensor:
        loss_sum = model(batch.to(device))
        (loss_sum / divisor).backward()
        return loss_sum.detach()

    passes = Passes(run_pass, model, optimizer, device, steps, stop, None)  # type: ignore[arg-type]
    (step,) = steps.after(0)
    sample = one_sample()
    micro_batches = [Collator()([sample] * len(group)).pin_memory() for group in step.micro_batches]
    for number in (1, 2):  # the first one makes the moments, which lie beside the activations of the second
        passes.run(number, micro_batches, float(SAMPLES * SUPERVISED))
        clip_gradient(model, optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return {
        "run": "out of memory, and again in smaller micro-batches" if stop.told else "to its end",
        "micro_batches": len(micro_batches),
        "allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def row_on_phantom(phantom: Path, name: str, gib: int, compile_choice: str, already_run: list[dict]) -> dict:
    environment = {**os.environ, "PHANTOM_GIB": str(gib), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    words = [str(phantom), "benchmarks/budget_table.py", "--row", name, "--compile", compile_choice]
    words += ["--already-run", json.dumps(already_run)]
    with tempfile.TemporaryFile("w+") as printed:
        job = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=printed, stderr=printed, text=True)
        try:
            watch(job, MOST_RESIDENT)  # ends it where it takes too long, or too much of this machine's memory
        except AssertionError as error:
            return {"failed": str(error)}
        printed.seek(0)
        told = printed.read()
    lines = [line for line in told.splitlines() if line.startswith("{")]
    if job.returncode or not lines:
        return {"failed": told.strip()[-1500:]}
    return json.loads(lines[-1])["row"]


def in_words(name: str, gib: int, found: dict) -> str:
    if "failed" in found:
        return f"{name:>9} {gib:>4} GiB  FAILED: {found['failed'].splitlines()[-1]}"
    if "refused" in found:
        return f"{name:>9} {gib:>4} GiB  refused: {'; '.join(found['refused'].splitlines()[:4])}"
    ran = found["run"]
    if "allocated_gib" in found:
        ran += f": allocated {found['allocated_gib']}, reserved {found['reserved_gib']} GiB"
    return f"{name:>9} {gib:>4} GiB  {found['chosen']}; run {ran}"


def main(arguments: list[str]) -> None:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [f"{size}_{trained}" for size in ("2b", "7b") for trained in TRAINED]
    parser.add_argument("--row", choices=names, help="one row, on the GPU that is here")
    parser.add_argument("--already-run", type=json.loads, default=[], help=argparse.SUPPRESS)
    parser.add_argument("--phantom", type=Path, help="its `run`: all rows, each on a stand-in of its size")
    parser.add_argument("--names", nargs="*", default=names, choices=names, help="which rows; default: all")
    parser.add_argument("--cards", nargs="*", type=int, default=list(CARDS), help="of how many GiB")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as in finetune.py")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    own = parser.parse_args(arguments)
    if own.row:
        found = {"row": row(own.row, {"compile": own.compile}, own.already_run)}
        write_result({**origin("budget_table.py", arguments, device=torch.cuda.get_device_name()), **found}, own.out)
        return
    if not own.phantom:
        parser.error("give --row, or --phantom")
    table: dict[str, dict] = {}
    for name in own.names:
        already_run: list[dict] = []
        for gib in own.cards:
            found = row_on_phantom(own.phantom.resolve(), name, gib, own.compile, already_run)
            table[f"{name}_{gib}"] = found
            if "allocated_gib" in found:
                already_run.append(found["settings"])
            print(in_words(name, gib, found), flush=True)
            if own.out:  # each row is kept as it is known
                result = {**origin("budget_table.py", arguments, device="a stand-in for a GPU"), "rows": table}
                own.out.write_text(json.dumps({**result, "versions": versions()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
