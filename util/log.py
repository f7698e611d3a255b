"""What a run says: a line per step, metrics.jsonl, samples.jsonl, the summary and the loss curve."""

import dataclasses
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from util import compilation, run_folder
from util.command_line import UserError
from util.config import Config
from util.cost import flops, memory
from util.cost.memory import GIB
from util.data import bad_samples
from util.publish import hub, trackers
from util.publish.beside import Beside
from util.results.metrics import LABELS, share
from util.run_folder import METRICS, SAMPLES, SETTINGS, command, read_lines, read_metrics, relative
from util.steps import Step


class Run:
    """A run directory and the clock of its steps."""

    def __init__(self, config: Config, device: torch.device, resumed: Path | None = None) -> None:
        self.config, self.device = config, device
        self.bar: Any = None  # tqdm's, once the run is open
        self.beside: list[Beside] = []
        self.directory = self.choose_directory(config, resumed)
        if config.resume == "none" and (self.directory / METRICS).exists():
            raise UserError(
                f"--output_dir {self.directory} holds a run already; name another folder, or go on with it: "
                f"{command(self.directory)}"
            )
        hub.check_token(config, self.say)
        self.peak_flops = flops.peak_flops(device)
        self.layout = ""  # how several processes share the work, in words, where some work on the same samples
        self.tally = bad_samples.Tally()
        self.began = self.last = time.perf_counter()
        self.trained_seconds = 0.0

    @staticmethod
    def choose_directory(config: Config, resumed: Path | None) -> Path:
        if config.output_dir:
            return Path(config.output_dir)
        if resumed:
            return resumed.parent.parent
        name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        taken = [run_folder.RUNS / name, *(run_folder.RUNS / f"{name}_{number}" for number in range(2, 100))]
        return next(path for path in taken if not path.exists())

    def open(self, first_step: int, total_steps: int, model: str, dtype: torch.dtype) -> None:
        """Create the directory, write the settings, and start the progress bar.

        `model` and `dtype`: what `--model` and `--dtype` came to.
        """
        settings = dataclasses.asdict(self.config)
        settings |= {"model": model, "dtype": str(dtype).removeprefix("torch."), "device": str(self.device)}
        settings["output_dir"] = str(self.directory)
        if self.config.asked:  # what the memory budget changed, as it was before
            settings["asked"] = self.config.asked
        settings["versions"] = versions()
        settings["commit"] = commit()
        settings["launched_by"] = [socket.gethostname(), os.getppid()]  # a process that is started again finds its run
        try:
            (self.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            self.metrics = self.open_lines(METRICS, first_step)
            self.samples = self.open_lines(SAMPLES, first_step)
        except OSError as error:
            raise UserError(f"--output_dir {self.directory}: cannot be written ({error.strerror})") from None
        if self.directory.resolve().parent == run_folder.RUNS:
            point_latest_at(self.directory)
        self.bar = tqdm(total=total_steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True)
        self.beside = trackers.start_trackers(self.config, self.directory, first_step, self.say)
        self.beside += hub.start(self.config, self.directory, self.say)
        compilation.CLOCK.restart()
        self.last = time.perf_counter()

    def open_lines(self, name: str, first_step: int) -> IO:
        """Open a file with a line for each step, to add lines.

        A run resumed at a checkpoint repeats the steps after it: their lines are dropped. A fresh run starts empty.
        """
        path = self.directory / name
        known = read_lines(path) if first_step else []
        kept = [line for line in known if line["step"] <= first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return open(path, "a", buffering=1, encoding="utf-8")

    def log_step(self, step: Step, values: dict, work: dict[str, float]) -> None:
        """One optimizer step: a line in metrics.jsonl, its samples in samples.jsonl, and the bar.

        `work`: its floating-point operations by part.
        """
        seconds = time.perf_counter() - self.last
        compile_seconds = compilation.CLOCK.take()
        at_work = max(seconds - compile_seconds, 1e-9)  # compiling is not the speed of what is compiled
        values = self.tally.take(values)
        self.trained_seconds += seconds
        line = {
            "step": step.number,
            "epoch": step.epoch,
            **values,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(values["tokens"] / at_work, 1),
            "peak_memory_gib": round(memory.peak_bytes(self.device) / GIB, 3),
        }
        if compile_seconds:
            line["compile_seconds"] = round(compile_seconds, 4)
        if self.peak_flops:
            line["mfu"] = round(sum(work.values()) / at_work / self.peak_flops, 4)
        line |= {f"flops_{part}": round(share, 4) for part, share in flops.shares(work).items()}  # of the step's
        self.write(self.metrics, line)
        self.write(self.samples, {"step": step.number, "samples": step.samples})
        beside = {
            "loss": f"{values['loss']:.4f}",
            "lr": f"{values['learning_rate']:.1e}",
            "tok/s": f"{line['tokens_per_second']:.0f}",
        }
        self.bar.set_postfix(beside, refresh=False)
        self.bar.update()
        if news := compilation.CLOCK.news():
            self.say(f"step {step.number}: {news}")
        self.restart_clock()

    def log_evaluation(self, step: int, totals: dict[str, float], scores: dict[str, float | None]) -> float:
        """Log the loss on held-out data, and the scores of what the model answered there, if asked; return the loss.

        `totals`: of `evaluate_loss`. NaN where no held-out token is supervised.
        """
        left_out = bad_samples.Tally()
        skipped = {key: value for key, value in left_out.take(totals).items() if key.startswith("skipped")}
        loss = mean_loss(totals)
        accuracy = totals["likeliest_tokens"] / (totals["supervised_tokens"] or math.nan)
        values = {"loss": loss, "token_accuracy": accuracy, **skipped, **scores}
        self.write(self.metrics, {"step": step, **{f"eval_{key}": value for key, value in values.items()}})
        text = f"step {step}: loss on held-out data {loss:.4f}, {accuracy:.1%} of its tokens the likeliest"
        if scores:
            shown = ", ".join(f"{LABELS[name]} {share(scores[name])}" for name in scores if name in LABELS)
            text += f"; {scores['questions']} answers: {shown}"
        if skipped:
            text += f"; held-out samples left out: {bad_samples.reasons_in_words(left_out.reasons)}"
        self.say(text)
        return loss

    def log_ranks(self, line: dict) -> None:
        """A line of what several ranks compared: faults.Watch."""
        self.write(self.metrics, line)

    def write(self, file: IO, line: dict) -> None:
        """A line of JSON, which knows no NaN: what is no number is null."""
        known = {}
        for key, value in line.items():
            is_no_number = isinstance(value, float) and not math.isfinite(value)
            known[key] = None if is_no_number else value
        try:
            file.write(json.dumps(known) + "\n")
        except OSError as error:  # a full disk must not end the training; the next line may fit again
            self.say(f"NOT LOGGED: step {line['step']} in {file.name} ({error.strerror})")

    def say(self, text: str) -> None:
        """A line that does not break the progress bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)
            sys.stdout.flush()  # else it waits in a buffer where output goes to a file

    def restart_clock(self) -> None:
        """Begin the next step's time now; what lies between (evaluation, saving) is nobody's step."""
        self.last = time.perf_counter()
        compilation.CLOCK.take()

    def close(self) -> None:
        """Close the files and the bar, and end what runs beside the training."""
        self.bar.close()
        for file in (self.metrics, self.samples):
            with suppress(OSError):  # a full disk: which lines are missing was said when they were written
                file.close()
        for program in self.beside:
            program.end()

    def finish(self, steps: int, left_out: Counter, updates_left_out: int, model: str) -> None:
        """Close the files, draw loss.png, and say what was done and how to try it.

        `left_out`: samples left out of every epoch, by reason. `updates_left_out`: steps whose loss was no number.
        `model`: of which step the run's model is.
        """
        self.close()
        try:
            draw_loss(self.directory)
        except (OSError, ValueError) as error:  # a full disk, or half a line that one left: the model is there
            print(f"loss.png is not drawn ({error})")
        total = time.perf_counter() - self.began
        compiling = f", {clock(compilation.CLOCK.seconds)} of them compiling" if compilation.CLOCK.seconds else ""
        print(
            f"\ndone: {steps} steps in {clock(self.trained_seconds)} of training, "
            f"{clock(total)} altogether{compiling}; "
            f"peak memory {memory.peak_bytes(self.device) / GIB:.2f} GiB\n"
            f"  {relative(self.directory)}: model, processor, metrics.jsonl, loss.png\n"
            f"final model: {model}\n"
            f"try it: {relative(sys.executable)} test_on_trained_model.py {relative(self.directory)}"
        )
        if self.config.lora_rank:
            print(how_to_merge(self.config, relative(self.directory)))
        if text := self.tally.summary(left_out):
            print(text)
        if updates_left_out:
            print(f"updates left out: {updates_left_out}, whose loss or gradient was no number (see above)")
        hub.push_at_end(self.config, self.directory, self.say)


class SilentRun:
    """The twin of Run on all ranks but the first: it knows the run directory, and says and writes nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self, first_step: int, total_steps: int, model: str, dtype: torch.dtype) -> None: ...

    def log_step(self, step: Step, values: dict, work: dict[str, float]) -> None: ...

    def log_evaluation(self, step: int, totals: dict[str, float], scores: dict[str, float | None]) -> float:
        return mean_loss(totals)

    def log_ranks(self, line: dict) -> None: ...

    def say(self, text: str) -> None: ...

    def restart_clock(self) -> None: ...

    def close(self) -> None: ...

    def finish(self, steps: int, left_out: Counter, updates_left_out: int, model: str) -> None: ...


def how_to_merge(config: Config, folder: str) -> str:
    """The last word of a run of adapters: a plain model is one command away."""
    needed = "which opens without peft"
    if config.new_tokens or config.lora_dora:
        needed = f"which vLLM needs because of the {'new tokens' if config.new_tokens else 'DoRA'}"
    return f"as one model, {needed}: {relative(sys.executable)} -m util merge {folder} {folder}_merged"


def mean_loss(totals: dict[str, float]) -> float:
    """Loss per supervised token, each counted by its weight; NaN of none."""
    return totals["loss_sum"] / (totals["supervised_weight"] or math.nan)


def point_latest_at(directory: Path) -> None:
    """train_output/latest -> this run, switched in one step."""
    new = directory.parent / f".latest_{os.getpid()}"
    new.symlink_to(directory.name, target_is_directory=True)
    os.replace(new, directory.parent / "latest")


def draw_loss(directory: Path) -> None:
    """loss.png from metrics.jsonl: every step, their running mean, and the evaluation loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(directory)
    steps = [line["step"] for line in lines if line.get("loss") is not None]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if not steps:
        raise ValueError(f"{METRICS} has no step")
    evaluated = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    window = max(1, len(losses) // 50)
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", label="held-out data")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token", title=directory.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
    plt.close(figure)


def commit() -> str:
    """The commit of this checkout, with a word where files were changed since; else why there is none to name."""
    try:
        asked = [
            "git",
            "-C",
            str(run_folder.ROOT),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty=, and changes",
            "--exclude=*",
        ]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not known: git cannot be asked"
    return done.stdout.strip() if done.returncode == 0 else "not a git checkout"


def versions() -> dict[str, str]:
    import torchvision
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
    }


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
