"""Metrics in TensorBoard, trackio and Weights & Biases (`--report_to`), of a running or of a finished run:

    python -m util track train_output/my_run wandb     # sends what that tracker does not have yet

For each tracker a process follows metrics.jsonl. So a tracker that raises, is slow or hangs never touches the training,
and what could not be sent is sent later, from that file.
"""

import argparse
import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from util.command_line import UserError, command_parser
from util.publish.beside import Beside, Training
from util.publish.settings import Tracker, TrackerSettings, missing_trackers
from util.run_folder import METRICS, read_settings, written_whole

EVERY = 1.0  # seconds between two looks at metrics.jsonl
PATIENCE = float(os.environ.get("TRACKER_TIMEOUT", 60))  # seconds for one answer, and for the rest at the end
LONGEST_PAUSE = 300.0  # seconds between two attempts


def start_trackers(
    config: TrackerSettings, directory: Path, first_step: int, say: Callable[[str], None]
) -> list[Beside]:
    """A process for each chosen tracker, which sends the lines after `first_step` as they are written."""
    folder, programs = directory.resolve() / "trackers", []
    for name in dict.fromkeys(config.report_to):
        otherwise = f"{name}: NOT ALL SENT; {later(directory, name)}"
        try:
            folder.mkdir(exist_ok=True)
            programs.append(
                Beside("track", [str(directory.resolve()), name, "--since", str(first_step + 1)],
                       folder / f"{name}.log", say, PATIENCE + 5, otherwise)
            )  # fmt: skip
        except OSError as error:
            say(f"{otherwise} ({error})")
    return programs


def later(directory: Path, name: str) -> str:
    return f"later: python -m util track {directory} {name}"


# ---- in the process of a tracker ------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in `RUN/trackers/tensorboard`. Values are stored in float32."""

    def __init__(self, folder: Path, settings: dict, state: dict, since: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {folder / 'tensorboard'}"
        # What an earlier process wrote of this step and later ones is no longer shown.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=since)
        self.writer.add_text("settings", "\n".join(f"- {key}: `{value}`" for key, value in settings.items()), since)

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # another thread of it writes

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run in trackio's local database (or where its own environment variables say)."""

    def __init__(self, folder: Path, settings: dict, state: dict, since: int) -> None:
        import trackio

        self.where = f"trackio show --project {settings['project']}"
        resume = "allow" if state["opened"] else "never"
        self.run = trackio.init(settings["project"], settings["run_name"], config=settings, resume=resume, embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Wandb:
    """A run of Weights & Biases, online or as WANDB_MODE says; its files are in `RUN/trackers/wandb`."""

    def __init__(self, folder: Path, settings: dict, state: dict, since: int) -> None:
        import wandb

        self.run = wandb.init(
            project=settings["project"], name=settings["run_name"], id=state["id"], resume="allow", dir=str(folder),
            config=settings, settings=wandb.Settings(console="off", silent=True, x_stats_pid=os.getppid()),
        )  # fmt: skip
        self.where = self.run.url or f"wandb sync {Path(self.run.dir).parent}"
        # It refuses steps that it has seen, but a resumed run repeats those after its checkpoint: so they are values.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def send(directory: Path, name: str, since: int | None, training: Training) -> bool:
    """Send a run's lines from step `since` on (None: those not sent yet), until the training has ended and all are
    sent, or cannot be. Whether all are."""
    folder = directory / "trackers"
    folder.mkdir(exist_ok=True)
    state_file = folder / f"{name}.json"
    state = read_state(state_file) if since != 1 else new_state()  # a run from the start is another run
    since = since or state["sent"]  # of the last step sent, a line may have been missing
    settings = settings_to_show(directory)
    tracker, position, pause, is_opened, is_told = None, 0, 1.0, False, False
    while True:
        is_last = training.wait(EVERY if tracker else 0)  # asked before reading, so that no line comes in between
        try:
            if tracker is None:
                with within(PATIENCE):
                    tracker, position = TRACKERS[name](folder, settings, state, since), 0
                if not is_opened:
                    training.tell(f"{name}: {tracker.where}")
                state["opened"] = is_opened = True
            for line, end in new_lines(directory / METRICS, position):
                if line["step"] >= since:
                    with within(PATIENCE):
                        tracker.log(dict(scalars(line)), line["step"])
                    state["sent"] = line["step"]
                position = end
            write_state(state_file, state)
            if is_last:
                with within(PATIENCE):
                    tracker.close()
                return True
            if is_told:
                training.tell(f"{name}: goes on")
            pause, is_told = 1.0, False
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            if is_last:
                training.tell(f"{name}: NOT ALL SENT ({reason}); {later(directory, name)}")
                return False
            if not is_told:
                training.tell(f"{name}: {reason}; the training goes on without it, and it is tried again")
            is_told, since = True, max(since, state["sent"])
            with suppress(Exception), within(PATIENCE):
                if tracker:
                    tracker.close()
            tracker = None
            training.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer: waiting for a network, a lock or a disk is broken off."""

    def give_up(number, frame):
        raise TimeoutError(f"no answer within {seconds:g} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def new_lines(path: Path, position: int) -> Iterator[tuple[dict, int]]:
    """The complete lines of a growing file from byte `position` on, each with the position after it."""
    with open(path, "rb") as file:
        file.seek(position)
        for line in file:
            if line.endswith(b"\n"):
                position += len(line)
                yield json.loads(line), position


def scalars(line: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics.jsonl by their keys; those of a list or dict as `key/0`, `key/name`."""
    for key, value in line.items():
        if isinstance(value, int | float):
            if (prefix, key) != ("", "step"):
                yield f"{prefix}{key}", value
        elif isinstance(value, list | dict):
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            yield from scalars(inner, f"{prefix}{key}/")


def settings_to_show(directory: Path) -> dict:
    """What a run was trained with, as a tracker shows it."""
    settings = read_settings(directory)
    settings.pop("launched_by", None)
    settings["run_name"] = settings.get("run_name") or directory.name
    return {"project": TrackerSettings().project, **settings}


def new_state() -> dict:
    """`id`: of this run in the tracker; `sent`: the last step that it has; `opened`: whether it knows the run."""
    return {"id": uuid.uuid4().hex[:16], "sent": 0, "opened": False}


def read_state(path: Path) -> dict:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return new_state()


def write_state(path: Path, state: dict) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(state))


def parser() -> argparse.ArgumentParser:
    made = command_parser("track", __doc__)
    made.add_argument("run", type=Path, help="run directory")
    made.add_argument("tracker", choices=get_args(Tracker), help="the tracker to send its metrics to")
    made.add_argument("--since", type=int, help=argparse.SUPPRESS)  # the training is running, and says where it began
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    if not (given.run / METRICS).exists():
        raise UserError(f"{given.run}: not a run directory (there is no metrics.jsonl)")
    if found := missing_trackers(TrackerSettings(report_to=[given.tracker])):
        raise UserError(found[0])
    training = Training()
    if given.since is None:
        training.has_ended = True
    is_sent = send(given.run.resolve(), given.tracker, given.since, training)
    os._exit(not is_sent)  # at once: what a tracker wants to do at the end of its process may hang
