"""Metrics in trackers: read back by each tracker's own reader and compared with metrics.jsonl; trackers that fail."""

import importlib.util
import json
import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tests import runs, warm
from util.command_line import UserError
from util.config import Config
from util.publish import trackers
from util.publish.settings import TrackerSettings

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = str(ROOT / "test_data" / "data.json")


def train(tiny_path: Path, folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    """finetune.py in a process of its own; 3 steps with an evaluation after the second and third."""
    values = runs.settings(tiny_path, folder, max_steps=3, epochs=1, eval_data=TEST_DATA, eval_every=2)
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return warm.run([sys.executable, "finetune.py", *runs.flags(values), *more], env=own)


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number in metrics.jsonl, by its key."""
    found = {}
    for line in runs.log(run):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                found.setdefault(key, []).append((line["step"], value))
    assert {"loss", "eval_loss", "tokens", "learning_rate"} <= set(found)
    return found


def tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def single(values: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """In the precision of event files."""
    return {key: [(step, float(np.float32(value))) for step, value in pairs] for key, pairs in values.items()}


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory) -> Path:
    """A run with a checkpoint after the second step that reports to all trackers that are installed."""
    folder = tmp_path_factory.mktemp("trackers")
    installed = [name for name in get_args(trackers.Tracker) if importlib.util.find_spec(name)]
    done = train(tiny_path, folder / "run", "--save_every", "2", "--report_to", *installed, "--project", "charts",
                 TRACKIO_DIR=str(folder / "trackio"), WANDB_MODE="offline")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said").write_text(done.stdout)
    return folder / "run"


def test_tensorboard_has_what_metrics_jsonl_has_also_after_resuming(run, tiny_path, tmp_path):
    """As if the run had been stopped after its checkpoint at step 2: of its third step there is something in both."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert f"tensorboard --logdir {run}/trackers/tensorboard" in (run.parent / "said").read_text()
    assert tensorboard(run) == single(expected(run))
    again = tmp_path / "run"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("step_000003", "model.safetensors", "wandb", "trackio"))
    done = train(
        tiny_path, again, "--report_to", "tensorboard", "--resume", "auto", "--max_steps", "4", "--resume_anyway"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step for step, _ in expected(again)["loss"]] == [1, 2, 3, 4]
    assert tensorboard(again) == single(expected(again)), "the third step once, as the resumed run computed it"
    assert len(list((again / "trackers" / "tensorboard").iterdir())) == 2


def test_trackio_has_what_metrics_jsonl_has(run):
    pytest.importorskip("trackio", reason="trackio is not installed")
    assert "trackio show --project charts" in (run.parent / "said").read_text()
    (database,) = (run.parent / "trackio").glob("charts*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"run"}
    found = {}
    for _, step, values in rows:
        for key, value in json.loads(values).items():
            found.setdefault(key, []).append((step, value))
    wanted = expected(run)
    assert {key: found[key] for key in wanted} == wanted


def records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is LevelDB's log format after 7 bytes: blocks of 32 KiB with parts of records,
    each part behind a checksum, its length, and whether it is a whole one (1), the first, a middle or the last."""
    position, record = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_has_what_metrics_jsonl_has(run):
    """Offline, by the file that `wandb sync` would send."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    assert f"wandb sync {run}/trackers/wandb/offline-run-" in (run.parent / "said").read_text()
    identity = json.loads((run / "trackers" / "wandb.json").read_text())["id"]
    (file,) = run.glob(f"trackers/wandb/offline-run-*/run-{identity}.wandb")
    from wandb.proto import wandb_internal_pb2

    found, name = {}, None
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        name = record.run.display_name or name
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            if not key.startswith("_") and key != "step":
                found.setdefault(key, []).append((row["step"], value))
    assert name == "run"
    assert found == expected(run)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_resumed_run_goes_on_in_the_tracker_and_a_fresh_one_is_another(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, told, identities = tmp_path / "run", [], []
    run.mkdir()
    (run / "training_config.json").write_text("{}")
    for first_step, last_step in ((0, 2), (2, 3), (0, 1)):
        lines = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, last_step + 1))
        (run / "metrics.jsonl").write_text(lines)
        (program,) = trackers.start_trackers(TrackerSettings(report_to=[name]), run, first_step, told.append)
        program.end()
        if name == "wandb":
            newest = max(run.glob("trackers/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
            identities.append(newest.stem.removeprefix("run-"))
    assert len(told) == 3, told
    if name == "trackio":
        (database,) = (tmp_path / "trackio").glob("*.db")
        with sqlite3.connect(database) as connection:
            rows = connection.execute("select run_id, step from metrics order by id").fetchall()
        assert [step for _, step in rows] == [1, 2, 3, 1]
        identities = [rows[0][0], rows[2][0], rows[3][0]]
    assert identities[0] == identities[1] != identities[2]


# ---- trackers that fail, as packages that stand where the real ones would --------------------------------------------

FAKE = """
import json, os, time
class Settings:
    def __init__(self, **settings): pass
class Run:
    url = "https://example.org/run"
    def define_metric(self, *arguments, **settings): pass
    def log(self, values):
        print("chatter of a library", flush=True)
        {log}
        with open(os.environ["SEEN"], "a") as file:
            file.write(json.dumps(values) + "\\n")
    def finish(self): {finish}
def init(**settings):
    {init}
    return Run()
"""

FAULTS = {
    "raises at first": ("n = len(open(os.environ['SEEN'] + '.n', 'a').write('x') and open(os.environ['SEEN'] + '.n').read())\n"
                        "    if n < 3: raise OSError('no network')", "pass", "pass"),
    "always raises": ("raise OSError('no network')", "pass", "pass"),
    "raises in the middle": ("pass", "values['step'] == 2 and not os.path.exists(os.environ['SEEN'] + '.2') and "
                             "(open(os.environ['SEEN'] + '.2', 'w'), 1 / 0)", "pass"),
    "hangs at first": ("time.sleep(999)", "pass", "pass"),
    "hangs in the middle": ("pass", "time.sleep(999 if values['step'] == 2 else 0)", "pass"),
    "hangs at the end": ("pass", "pass", "time.sleep(999)"),
    "is slow": ("pass", "time.sleep(1)", "pass"),
    "dies": ("os._exit(7)", "pass", "pass"),
}  # fmt: skip


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function (init, log, finish) that puts a package `wandb` with this code before all others, for processes that
    are started from here; it returns a function that gives what was logged."""
    package, seen = tmp_path / "packages" / "wandb", tmp_path / "seen"
    package.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("TRACKER_TIMEOUT", "2")
    monkeypatch.setattr(trackers, "PATIENCE", 2.0)
    monkeypatch.setattr(trackers, "missing_trackers", lambda config: [])

    def make(init: str, log: str, finish: str):
        (package / "__init__.py").write_text(FAKE.format(init=init, log=log, finish=finish))
        return lambda: [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []

    return make


LINES = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"step": 3, "loss": 1.0}]


@pytest.mark.parametrize("name", FAULTS)
def test_a_tracker_that_fails(name, fake, tmp_path):
    """The lines are written as a training would, which here is this test: it must not have to wait for anything."""
    seen, run, told = fake(*FAULTS[name]), tmp_path / "run", []
    run.mkdir()
    (run / "training_config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (program,) = trackers.start_trackers(TrackerSettings(report_to=["wandb"]), run, 0, told.append)
    for line in LINES:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(0.7)
    deadline, enough = time.time() + 60, 3 if name in ("raises at first", "raises in the middle") else 1
    while len(told) < enough:
        assert time.time() < deadline, told
        time.sleep(0.1)
    program.end()  # which waits for a bounded time
    assert program.process.poll() is not None
    later = f"later: python -m util track {run} wandb"
    if name in ("raises at first", "raises in the middle"):
        assert [line for n, line in enumerate(seen()) if line not in seen()[:n]] == LINES
        assert len(seen()) <= len(LINES) + 1, "only of the step that failed a line may come twice"
        assert len(told) == 3, told
        assert told[-1] == "wandb: goes on"
    elif name == "dies":
        assert told == [f"wandb: NOT ALL SENT; {later}"]
    elif name == "is slow":
        assert told[0] == "wandb: https://example.org/run"
    else:
        assert re.fullmatch(rf"wandb: NOT ALL SENT \((no network|no answer within 2 s)\); {re.escape(later)}", told[-1])
        assert len(told) <= 3, f"said once when it begins, and at the end: {told}"
    assert "chatter" not in "".join(told)


def test_what_was_not_sent_is_sent_later(fake, tmp_path):
    run = tmp_path / "run"
    (run / "trackers").mkdir(parents=True)
    (run / "training_config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    seen = fake("pass", "pass", "pass")
    (run / "trackers" / "wandb.json").write_text(json.dumps({"id": "one", "sent": 2, "opened": True}))
    command = [sys.executable, "-m", "util", "track", str(run), "wandb"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert seen() == LINES[1:], "from the last step on that was sent, of which a line may have been missing"
    fake("raise OSError('no network')", "pass", "pass")
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.strip() == f"wandb: NOT ALL SENT (no network); later: python -m util track {run} wandb"
    done = subprocess.run([*command[:4], str(tmp_path), "wandb"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert "not a run directory" in done.stderr


def test_training_is_what_it_is_without_a_tracker(fake, run, tiny_path, tmp_path):
    fake(*FAULTS["hangs in the middle"])
    done = train(tiny_path, tmp_path / "run", "--report_to", "wandb")
    assert done.returncode == 0, done.stderr[-3000:]
    plain = train(tiny_path, tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr[-3000:]
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "plain")
    assert "NOT ALL SENT" in done.stdout
    assert "chatter" not in done.stdout + done.stderr, "what a library prints is for its log"
    assert "chatter" in (tmp_path / "run" / "trackers" / "wandb.log").read_text()


def test_a_training_that_is_killed_leaves_no_tracker_behind(tiny_path, tmp_path):
    """And all that it wrote to metrics.jsonl is still sent."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tests.test_survival import start, wait_for

    run = tmp_path / "run"
    job = start(runs.settings(tiny_path, run, max_steps=500, epochs=999, report_to="tensorboard"))
    wait_for(run, 3, job)
    deadline = time.time() + 60
    while not list(run.glob("trackers/tensorboard/events*")):
        assert time.time() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (child,) = [n for n in children if b"util\0track" in Path(f"/proc/{n}/cmdline").read_bytes()]
    job.kill()
    job.communicate(timeout=30)
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.time() < deadline + 60, "it is still there"
        time.sleep(0.1)
    assert tensorboard(run)["loss"] == single({"loss": runs.losses(run)})["loss"]


def test_what_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--report_to wandb: it is not installed; run: pip install wandb$"):
        Config(report_to=["wandb"])


def test_the_numbers_of_a_line():
    line = {
        "step": 3,
        "loss": 0.5,
        "nothing": None,
        "skipped_by_reason": {"too long": 2},
        "seconds": [1.0, 2],
        "text": "x",
    }
    assert dict(trackers.scalars(line)) == {
        "loss": 0.5,
        "skipped_by_reason/too long": 2,
        "seconds/0": 1.0,
        "seconds/1": 2,
    }


def test_only_whole_lines_are_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    read = list(trackers.new_lines(file, 0))
    assert [line["step"] for line, _ in read] == [1, 2]
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert [line["step"] for line, _ in trackers.new_lines(file, read[-1][1])] == [3]
