"""SIGTERM, SIGINT and SIGUSR1 at any moment of a run, to one process or to all of a job: a start ends at once and leaves
nothing, a step is saved, a run that is complete is finished; and no process outlives it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests import runs, warm
from util import checkpoint
from util.data.loader import Loader

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 1, "eval_samples": 8}
STARTING = ("start", "headers", "first batch")
MOMENTS = {
    "start": {},
    "headers": {"num_workers": 2},
    "first batch": {},
    "data": {},
    "step": {},
    "loss": HELD_OUT,
    "answers": HELD_OUT,
    "best": HELD_OUT,
    "save": {"save_every": 1},
    "final save": {"max_steps": 1},
}
PATIENCE = 90  # seconds for what takes less than one on a quiet machine


@pytest.fixture
def start(tiny_path, tmp_path):
    """A function that starts a run and returns when it has reached its moment; what is left of it is killed."""
    started = []

    def begin(moment: str, folder: Path = tmp_path, **changes) -> "Signalled":
        started.append(Signalled(moment, folder, tiny_path, **changes))
        started[-1].reach()
        return started[-1]

    yield begin
    for signalled in started:
        for process in [signalled.job.pid, *signalled.processes]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


class Signalled:
    """A run that waits at a moment."""

    def __init__(self, moment: str, folder: Path, tiny_path: Path, ranks: int = 1, **changes) -> None:
        self.folder, self.run, self.ranks, self.moment = folder, folder / "run", ranks, moment
        own = {"max_steps": 500, "epochs": 999, "num_workers": 1, **MOMENTS[moment], **changes}
        words = ["tests/signalled_runs.py", moment, str(folder), json.dumps(runs.settings(tiny_path, self.run, **own))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if ranks == 1:
            self.job = warm.Job([sys.executable, *words], env=environment)
        else:
            launch = [
                sys.executable,
                "-m",
                "util.parallel.launch",
                "--nproc_per_node",
                str(ranks),
                "--max_restarts",
                "1",
            ]
            self.job = subprocess.Popen([*launch, *words], cwd=ROOT, env=environment, start_new_session=True,
                                        stdout=open(folder / "out", "w"), stderr=open(folder / "err", "w"))  # fmt: skip
        self.processes: list[int] = []

    def reach(self) -> None:
        self.wait_until((self.folder / "reached").exists, f"it never came to the moment {self.moment!r}")
        self.processes = [self.job.pid, *descendants(self.job.pid)]

    def printed(self) -> tuple[str, str]:
        files = self.job.files if self.ranks == 1 else [self.folder / "out", self.folder / "err"]
        return tuple(Path(file).read_text(encoding="utf-8", errors="replace") for file in files)

    def wait_until(self, happened, otherwise: str) -> None:
        deadline = time.time() + PATIENCE
        while not happened():
            assert self.job.poll() is None, f"it ended with {self.job.poll()}: {self.printed()}"
            assert time.time() < deadline, f"{otherwise}: {self.printed()}"
            time.sleep(0.02)

    def send(self, name: str, to_all: bool) -> None:
        """To the first process, or to each of the job, as a terminal does with a group, a scheduler with all."""
        number = getattr(signal, name)
        if to_all and self.ranks == 1:
            os.killpg(self.job.pid, number)
        else:
            for process in self.processes if to_all else [self.job.pid]:
                os.kill(process, number)

    def let_go(self, name: str) -> None:
        """Let it go on when it has heard of the signal."""
        self.wait_until(lambda: f"{name}: finishing this step" in self.printed()[0], "it did not hear the signal")
        (self.folder / "go_on").touch()

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and error, when no process of it is left."""
        deadline = time.time() + PATIENCE
        while self.job.poll() is None:
            assert time.time() < deadline, f"it does not end: {self.printed()}"
            time.sleep(0.02)
        while left := [process for process in self.processes if is_alive(process)]:
            assert time.time() < deadline, f"processes outlive it: {left}"
            time.sleep(0.05)
        return self.job.poll(), *self.printed()


def descendants(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for child in " ".join((task / "children").read_text() for task in tasks).split()]
    return children + [below for child in children for below in descendants(child)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check(signalled: Signalled, name: str, to_all: bool) -> None:
    """Send it, and see that the run ends as it should at this moment."""
    signalled.send(name, to_all)
    run, moment = signalled.run, signalled.moment
    if moment in STARTING:
        code, _, err = signalled.end()
        assert code == 128 + getattr(signal, name), err
        said = [line for line in err.splitlines() if line.strip() and "samples/s]" not in line]
        assert said[-1] == f"stopped by {name} before training began; nothing was written"
        assert "Traceback" not in err
        assert not run.exists()
        return
    signalled.let_go(name)
    code, out, err = signalled.end()
    assert "Traceback" not in err
    if moment == "final save":
        assert (code, "done: 1 steps" in out) == (0, True), err
        assert (run / "model.safetensors").exists()
        return
    assert code == 3, err
    saved = checkpoint.complete_checkpoints(run)[-1]
    step = checkpoint.verify(saved)["step"]
    assert step == len(runs.losses(run)), "the last step that was trained is saved"
    assert not list((run / "checkpoints").glob(".*")), "no half of a checkpoint is left"
    assert f"stopped by {name} after step {step}, which is saved; go on with: " in err.strip().splitlines()[-1]
    if moment == "best":
        kept = [path.name for path in (run / "best").iterdir()]
        assert kept == ["step_000001"], "it is written to its end"
    if moment in ("loss", "answers"):
        assert step == 1, "the evaluation is left, and no further step begun"
        assert not runs.metrics(run, "eval_loss"), "half of an evaluation is no result"


EACH_ONCE = [(moment, ("SIGINT", "SIGTERM", "SIGUSR1")[(number + 1) % 3]) for number, moment in enumerate(MOMENTS)]


@pytest.mark.parametrize(("moment", "name"), EACH_ONCE)
def test_a_signal_to_the_group(moment, name, start):
    check(start(moment), name, to_all=True)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_data_workers_that_were_not_forked(start_method, start):
    check(start("data", start_method=start_method), "SIGTERM", to_all=True)


@pytest.mark.parametrize(("moment", "name"), [("start", "SIGINT"), ("data", "SIGINT")])
def test_two_ranks(moment, name, start):
    check(start(moment, ranks=2, dtype="float64"), name, to_all=True)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment(moment, name, start_method, to_all, start):
    check(start(moment, start_method=start_method), name, to_all)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment_of_two_ranks(moment, name, to_all, start):
    check(start(moment, ranks=2, dtype="float64"), name, to_all)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "data", "save", "best"])
def test_two_stages_of_a_pipeline(moment, start):
    stages = {"pipeline_parallel_size": 2, "eval_samples": 0, "dtype": "float64"}
    check(start(moment, ranks=2, **stages), "SIGTERM", to_all=True)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_at_once(ranks, start):
    signalled = start("step", ranks=ranks)
    signalled.send("SIGINT", to_all=True)
    signalled.wait_until(lambda: "SIGINT: finishing this step" in signalled.printed()[0], "it did not hear the signal")
    signalled.send("SIGINT", to_all=True)
    code, _, err = signalled.end()
    assert code == 130, err
    assert err.strip().splitlines()[-1] == "stopped by SIGINT for the second time; what was not saved is lost"
    assert "Traceback" not in err
    assert not checkpoint.complete_checkpoints(signalled.run)


def test_workers_end_with_a_process_that_is_killed(start):
    signalled = start("step")
    assert len(signalled.processes) > 1
    os.kill(signalled.job.pid, signal.SIGKILL)
    assert signalled.end()[0] == -signal.SIGKILL


def test_what_is_said_can_be_pasted(start, tmp_path):
    """The whole command, with a space and a quote in a path; it finishes the run, with no other flag."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    signalled = start("step", folder, max_steps=3)
    signalled.send("SIGTERM", to_all=False)
    signalled.let_go("SIGTERM")
    code, _, err = signalled.end()
    assert code == 3, err
    command = err.strip().splitlines()[-1].partition("go on with: ")[2]
    words = shlex.split(command)
    assert words[1:] == ["tests/signalled_runs.py", "--resume", str(signalled.run)]
    done = warm.run([sys.executable, "finetune.py", *words[2:]])
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in runs.losses(signalled.run)] == [1, 2, 3]
    assert re.search(r"done: 1 steps", done.stdout)


class BlockedSignals:
    """A data set of the signals that are blocked in the process that reads it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[int]:
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_no_signal_reaches_a_data_worker_and_the_process_itself_hears_all(start_method):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for found in Loader(BlockedSignals(), batch_size=None, num_workers=1, multiprocessing_context=start_method):
        assert set(found) >= {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
