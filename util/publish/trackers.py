"""Metrics in TensorBoard, trackio and Weights & Biases (`--report_to`), of a running or of a finished run:

    python -m util track train_output/my_run wandb     # sends what that tracker does not have yet

For each tracker a process follows metrics.jsonl. So a tracker that raises, is slow or hangs never touches the training,
and what could not be sent can be sent later from that file.
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
    """The command that sends the rest later."""
    return f"later: python -m util track {directory} {name}"


# ---- in the process of a tracker ------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in `RUN/trackers/tensorboard`. Values are stored in float32."""

    def __init__(self, folder: Path, settings: dict, state: dict, since: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {folder / 'tensorboard'}"
        # A resumed run repeats steps: what was written earlier from this step on is no longer shown.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=since)
        self.writer.add_text("settings", "\n".join(f"- {key}: `{value}`" for key, value in settings.items()), since)

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # values wait in a queue until a thread writes them

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
        # wandb refuses steps that it has seen, but a resumed run repeats the steps after its checkpoint. So the step is
        # logged as a value like others, and all charts are drawn over it.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


class Sender:
    """What one tracker has of a run's metrics, and what it still lacks.

    `since`: the first step to send; None: go on after what the tracker has.
    """

    def __init__(self, directory: Path, name: str, since: int | None, training: Training) -> None:
        self.metrics = directory / METRICS
        self.settings = settings_to_show(directory)
        self.name = name
        self.training = training
        self.folder = directory / "trackers"
        self.folder.mkdir(exist_ok=True)
        self.state_file = self.folder / f"{name}.json"
        self.state = new_state() if since == 1 else read_state(self.state_file)  # from step 1 on it is a new run there
        # The last step that it has is sent again, because its second line, of an evaluation, may be missing.
        self.since = since or self.state["sent"]
        self.tracker: Any = None
        self.position = 0  # in the file of metrics
        self.is_announced = False

    def open(self) -> None:
        """Begin with the tracker, or begin again after it failed."""
        with within(PATIENCE):
            self.tracker = TRACKERS[self.name](self.folder, self.settings, self.state, self.since)
        self.position = 0
        if not self.is_announced:
            self.training.tell(f"{self.name}: {self.tracker.where}")
        self.state["opened"] = self.is_announced = True

    def send_new_lines(self) -> None:
        """Send the lines that were written since the last call. Raises whatever the tracker raises."""
        if self.tracker is None:
            self.open()
        for line, end in new_lines(self.metrics, self.position):
            if line["step"] >= self.since:
                with within(PATIENCE):
                    self.tracker.log(dict(scalars(line)), line["step"])
                self.state["sent"] = line["step"]
            self.position = end
        write_state(self.state_file, self.state)

    def close(self) -> None:
        with within(PATIENCE):
            self.tracker.close()

    def let_go(self) -> None:
        """Forget a tracker that failed, so that the next attempt begins with a new one."""
        self.since = max(self.since, self.state["sent"])
        with suppress(Exception):
            if self.tracker:
                self.close()
        self.tracker = None


def send(directory: Path, name: str, since: int | None, training: Training) -> bool:
    """Send the lines of a run's metrics to a tracker as they come, until the training ends. Whether all were sent.

    `since`: the first step to send; None: go on after what the tracker has.
    """
    sender = Sender(directory, name, since, training)
    pause = 1.0
    has_failed = False
    while True:
        is_last = training.wait(EVERY if sender.tracker else 0)  # asked before reading: no line comes in between
        try:
            sender.send_new_lines()
            if is_last:
                sender.close()
                return True
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            if is_last:
                training.tell(f"{name}: NOT ALL SENT ({reason}); {later(directory, name)}")
                return False
            if not has_failed:
                training.tell(f"{name}: {reason}; the training goes on without it, and it is tried again")
            has_failed = True
            sender.let_go()
            training.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            if has_failed:
                training.tell(f"{name}: goes on")
            has_failed = False
            pause = 1.0


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A block that raises TimeoutError when it takes longer, also while it waits for a network, a lock or a disk."""

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
    """What is remembered of a run in a tracker between two processes.

    `id`: the run's name there. `sent`: the last step that was sent. `opened`: whether the run was begun there.
    """
    return {"id": uuid.uuid4().hex[:16], "sent": 0, "opened": False}


def read_state(path: Path) -> dict:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
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
