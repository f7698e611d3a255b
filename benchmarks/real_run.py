"""finetune.py as a user starts it, on a checkpoint of published size: trained, stopped by a signal, and gone on with.

    python benchmarks/real_run.py --size 2b --rows rows.jsonl
    python benchmarks/real_run.py --size tiny --device cpu

The checkpoint has random weights in the published format (bf16 safetensors, and the processor's files), the data is
drawn as real files. One run goes through; another is sent SIGTERM after its first steps, saves, and goes on with
--resume. Both evaluate. It is an error if one does not end, or if a loss of the second is not that of the first. Other
flags are those of finetune.py. `--no_comparison` is for a GPU whose numbers mean nothing.
"""
# ruff: noqa: E402

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.report import origin
from benchmarks.rows import write_row
from benchmarks.train_step import REFERENCE, SCALES, describe_model, make_data, random_model
from util.command_line import run_command
from util.model import choose_device
from util.run_folder import read_metrics
from util.tiny_model import make_tiny_model

PROCESSOR_FILES = ["chat_template.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]
PROCESSOR_FILES += ["tokenizer_config.json"]
BATCH = 8
STOPPED_AND_SAVED = 3  # the exit code of such a run
STOP_AFTER = 3  # steps of the run that is stopped
TOLERANCE = 0.02  # of a loss, relative: on a GPU the same sums are added up in another order each time
LIMIT = 400  # seconds of one run


class Failed(Exception):
    """What a row says that did not come out as it must."""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SCALES, required=True, help="of the model and of its data")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--layers", type=int, help="only this many layers in the tower and in the language model")
    parser.add_argument("--device", default="auto", help="as finetune.py has it")
    parser.add_argument("--rows", type=Path, help="append each row here")
    parser.add_argument("--no_comparison", action="store_true", help="do not compare losses")
    own, others = parser.parse_known_args(arguments)
    own.vocabulary, own.data, own.seed = "own", "mixed", 0
    return own, others


def make_checkpoint(own: argparse.Namespace, folder: Path) -> Path:
    """A model in the published format, with random weights in bf16."""
    if own.size == "tiny":
        return make_tiny_model()
    model_config, _ = describe_model(own)
    model = random_model(model_config, own.seed, choose_device(own.device), torch.bfloat16)
    model.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if (REFERENCE / name).exists():
            shutil.copy(REFERENCE / name, folder / name)
    return folder


class Run:
    """One training as a process of its own."""

    def __init__(self, settings: list[str], directory: Path, steps: int) -> None:
        self.directory = directory
        self.log = directory.with_suffix(".log")
        self.began = time.monotonic()
        runner = os.environ.get("RUNNER") or sys.executable
        words = [runner, "finetune.py", *settings, "--output_dir", str(directory)]
        with open(self.log, "a", encoding="utf-8") as file:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file)
        self.steps = steps

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines() if line.get("loss") is not None}

    def lines(self) -> list[dict]:
        return read_metrics(self.directory)

    def stop_after(self, step: int) -> None:
        """SIGTERM as soon as a step is in the log."""
        while step not in self.losses():
            if self.process.poll() is not None or time.monotonic() - self.began > LIMIT:
                raise Failed(f"it never came to step {step}: {self.last_words()}")
            time.sleep(0.02)
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        try:
            return self.process.wait(max(1.0, LIMIT - (time.monotonic() - self.began)))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Failed(f"not done after {LIMIT} s: {self.last_words()}") from None

    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def last_words(self) -> str:
        return self.printed()[-1500:]

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def expect_the_end(self) -> None:
        status = self.wait()
        if status:
            raise Failed(f"exit code {status}: {self.last_words()}")
        losses = self.losses()
        if sorted(losses) != list(range(1, self.steps + 1)):
            raise Failed(f"steps in the log: {sorted(losses)}, not 1 to {self.steps}")
        if not [*self.directory.glob("*.safetensors")]:
            raise Failed(f"no model was left in {self.directory.name}")
        if not any(line.get("eval_loss") is not None for line in self.lines()):
            raise Failed("nothing was evaluated")


def figures(run: Run) -> dict:
    """Of a run that has ended: what the row tells."""
    lines = run.lines()
    steps = [line for line in lines if "step_seconds" in line]
    forecast = re.search(r"([\d.]+) GiB forecast", run.printed())
    return {
        "losses": list(run.losses().values()),
        "eval_losses": [line["eval_loss"] for line in lines if line.get("eval_loss") is not None],
        "step_seconds": [line["step_seconds"] for line in steps],
        "peak_allocated_gib": max((line["peak_memory_gib"] for line in steps), default=None),
        "forecast_gib": float(forecast[1]) if forecast else None,
        "mfu_by_step": [line.get("mfu") for line in steps],
    }


def whole_run(settings: list[str], folder: Path, steps: int) -> tuple[Run, dict]:
    run = Run(settings, folder / "whole", steps)
    run.expect_the_end()
    return run, {"wall_seconds": run.seconds(), **figures(run)}


def stopped_run(settings: list[str], folder: Path, steps: int) -> tuple[Run, dict]:
    """Stopped by a signal, then gone on with: the second process."""
    first = Run(settings, folder / "stopped", steps)
    first.stop_after(STOP_AFTER)
    status = first.wait()
    stopped_at = max(first.losses())
    checkpoints = [*(folder / "stopped" / "checkpoints").glob("step_*")]
    if status == 0:
        raise Failed(f"it had done all {steps} steps before the signal came; ask for more --steps")
    if status != STOPPED_AND_SAVED or stopped_at >= steps or not checkpoints:
        found = f"exit code {status} after step {stopped_at}, {len(checkpoints)} checkpoints"
        raise Failed(f"{found}: {first.last_words()}")
    size = sum(file.stat().st_size for file in checkpoints[0].rglob("*") if file.is_file())
    spent = first.seconds()
    second = Run([*settings, "--resume", str(folder / "stopped")], folder / "stopped", steps)
    second.expect_the_end()
    told = {"stopped_after": stopped_at, "checkpoint_gib": round(size / 2**30, 2)}
    return second, {**told, "wall_seconds": [spent, second.seconds()], **figures(second)}


def compare(whole: Run, gone_on: Run) -> float:
    """The largest relative difference of the losses; an error where it is above the tolerance."""
    first, second = whole.losses(), gone_on.losses()
    most = max(abs(first[step] - second[step]) / abs(first[step]) for step in first)
    if not math.isfinite(most) or most > TOLERANCE:
        raise Failed(f"the losses differ by {most:.2%}: {first} and, gone on with, {second}")
    return most


def main(arguments: list[str]) -> None:
    own, others = parse(arguments)
    failed = False
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and own.device != "cpu" else None
    common = {"size": own.size, "settings": others, **origin("real_run.py", arguments, device=gpu)}

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        began = time.monotonic()
        model = make_checkpoint(own, folder / "model")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the runs are processes of their own, and want it all
        files = {}
        for name, count, seed in (("train", BATCH * own.steps, 0), ("held_out", 2 * BATCH, 1)):
            (folder / name).mkdir()
            files[name] = make_data(folder / name, own, count, seed)
        settings = ["--model", str(model), "--data", str(files["train"]), "--eval_data", str(files["held_out"])]
        settings += ["--eval_every", str(own.steps // 2), "--max_steps", str(own.steps), "--final", "last"]
        settings += ["--global_batch_size", str(BATCH), "--device", own.device, *others]
        spent = {"seconds": round(time.monotonic() - began, 1)}
        write_row(own.rows, {"row": "real run, model and data made", "found": spent, **common})

        runs = {}
        for name, start in (("whole", whole_run), ("stopped and gone on with", stopped_run)):
            row: dict = {"row": f"real run, {name}"}
            try:
                runs[name], found = start(settings, folder, own.steps)
                row |= found
            except (Failed, OSError) as error:
                row["error"] = str(error)
                failed = True
            write_row(own.rows, {**row, **common})
        if len(runs) == 2 and not own.no_comparison:
            row = {"row": "real run, both compared"}
            try:
                row["found"] = {"largest difference of a loss": f"{compare(*runs.values()):.2e}"}
            except Failed as error:
                row["error"] = str(error)
                failed = True
            write_row(own.rows, {**row, **common})
    sys.exit(int(failed))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
