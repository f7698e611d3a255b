"""What lies in a run directory, how it is read, and the command that goes on with a run that ended before its time.

Only the standard library is imported here, because the settings of a run are part of the command line.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "train_output"
LATEST = RUNS / "latest"
SETTINGS = "training_config.json"  # the resolved settings and library versions
METRICS = "metrics.jsonl"  # a line for each optimizer step, and one for each evaluation
BEST = "best"  # the folder of the best model so far, while a run trains: best/step_000120
FINAL = "final_model.json"  # of a finished run: of which step its model is, and the losses of its evaluations
SAMPLES = "samples.jsonl"  # the samples of each optimizer step, by their numbers over all data files
NOT_INHERITED = ("resume", "resume_anyway", "output_dir")  # what is said of one start, not of the run

opened: Path | None = None  # the directory of the run that this process trains


# ---- files ----------------------------------------------------------------------------------------------------------


def read_settings(run: str | Path | None) -> dict:
    """What a run was trained with; {} for a model that was not trained here.

    Raises OSError or ValueError where its file is there and cannot be read.
    """
    path = Path(run or "") / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if run and path.exists() else {}


def read_final(run: Path) -> dict | None:
    """What a finished run says of its model; None for one that is not finished, or whose file cannot be read."""
    with suppress(OSError, ValueError):
        final = json.loads((run / FINAL).read_text(encoding="utf-8"))
        return final if isinstance(final, dict) and "step" in final else None
    return None


def final_in_words(final: dict) -> str:
    """Which model final_model.json says it is: `step 120 of 300, evaluation loss 0.812 (last: 0.901)`."""
    text = f"step {final['step']:,} of {final['steps']:,}"
    if final["eval_loss"] is not None:
        text += f", evaluation loss {final['eval_loss']:.4g}"
    beside = []
    if final["step"] != final["last_step"]:
        last = "not known" if final["last_eval_loss"] is None else f"{final['last_eval_loss']:.4g}"
        where = f" at step {final['last_step']:,}" if final["last_step"] != final["steps"] else ""
        beside.append(f"last: {last}{where}")
    lowest = final["lowest"]
    if lowest and lowest["loss"] != final["eval_loss"]:
        why = "not kept" if final["final"] == "best" else "--final last"
        beside.append(f"lowest: {lowest['loss']:.4g} at step {lowest['step']:,}, {why}")
    if beside:
        text += f" ({'; '.join(beside)})"
    if final["stop_after"]:
        text += f"; ended early by --stop_after {final['stop_after']}: so many evaluations in a row without a gain"
    return text


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run's metrics, in order; [] where it has none."""
    return read_lines(Path(run) / METRICS)


def read_lines(path: Path) -> list[dict]:
    """The objects in the lines of a file that a run writes; [] where there is none.

    A process that was killed, or a disk that was full, may leave half a line: it is passed over.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


@contextmanager
def written_whole(path: Path, mode: str = "w", **options) -> Iterator[IO]:
    """A file to write that is complete or absent: it gets its name when all is written, and is gone after a failure.

    `options`: of `open`; text is UTF-8.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, mode, **options) as file:
            yield file
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


# ---- going on -------------------------------------------------------------------------------------------------------


def relative(path: str | Path) -> str:
    """A path as a user would type it here."""
    path = os.path.abspath(path)  # links are left as they are: .venv/bin/python is one
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


def command(directory: str | Path) -> str:
    """The whole command that goes on with a run, as it can be pasted where this one was typed."""
    if "STARTED_AS" in os.environ:  # by util/parallel/launch.py
        words = json.loads(os.environ["STARTED_AS"])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], sys.argv[0]]
    else:
        words = [relative(sys.executable), sys.argv[0]]
    line = shlex.join([*words, "--resume", relative(directory)])
    started_in = os.environ.get("STARTED_IN", os.getcwd())  # finetune.sh goes to the project's folder
    return line if os.path.samefile(started_in, os.getcwd()) else f"cd {shlex.quote(os.getcwd())} && {line}"


def hint() -> str:
    """ "; go on with: COMMAND" where the run of this process has a checkpoint, else ""."""
    return f"; go on with: {command(opened)}" if opened and complete_checkpoints(opened) else ""


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    complete = [path for path in found if (path / "state.json").exists()]
    return sorted(complete, key=step_of)  # as text, step_1000000 stands before step_999900


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def is_inherited(name: str) -> bool:
    """Whether a run that goes on has this setting of its own again. One process alone (finetune.py) splits nothing."""
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    splits = name.endswith("_parallel_size") or name == "sequence_parallel"
    return name not in NOT_INHERITED and not (is_alone and splits)


def own_settings(given: dict) -> dict:
    """The settings of the run that `given`, the flags of a command line, go on with; {} where they begin a new one.

    Where there is no checkpoint, or none that can be read, this is for `checkpoint.resolve_resume` to tell.
    """
    resume = given.get("resume", "none")
    if resume == "none":
        return {}
    path = Path(resume)
    if resume == "auto":
        path = Path(given.get("output_dir") or LATEST)
    is_checkpoint = (path / "state.json").exists()
    for checkpoint in [path] if is_checkpoint else reversed(complete_checkpoints(path)):
        try:
            # after the settings stands a checksum, which resolve_resume compares
            state, _ = json.JSONDecoder().raw_decode((checkpoint / "state.json").read_text(encoding="utf-8"))
            return {name: value for name, value in state["settings"].items() if is_inherited(name)}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return {}
