"""Nothing is lost: signals, kills, full disks, damaged and hostile checkpoints, steps that are no numbers."""

import json
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from tests import runs, warm
from tests.runs import losses, same_run
from util import checkpoint
from util.command_line import Ended, UserError
from util.config import Config
from util.cost.sizes import Finding, Sizes
from util.data.loader import told_of_dead_workers
from util.dataset import Size
from util.steps import Steps

ROOT = Path(__file__).resolve().parent.parent


def settings(tiny_path: Path, directory: Path, **changes) -> dict:
    return runs.settings(tiny_path, directory, **{"max_steps": 6, "keep": 99, **changes})


def command(config: dict) -> list[str]:
    return [sys.executable, "finetune.py", *runs.flags(config)]


def start(config: dict) -> warm.Job:
    """finetune.py in a process of its own."""
    return warm.Job(command(config), env={**os.environ, "OMP_NUM_THREADS": "1"})


def start_cold(config: dict) -> subprocess.Popen:
    """The same from the start of Python on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(config), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


def wait_for(run: Path, step: int, job: subprocess.Popen) -> None:
    """Until a run has logged so many steps."""
    deadline = time.time() + 120
    while time.time() < deadline and job.poll() is None:
        log = run / "metrics.jsonl"
        if log.exists() and log.read_text().count('"loss"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {job.communicate()}")


@pytest.fixture(scope="module")
def whole(tiny_path, tmp_path_factory) -> Path:
    """An uninterrupted run of 6 steps."""
    torch.set_num_threads(1)  # as the processes that are compared with it
    return Path(finetune.train(Config(**settings(tiny_path, tmp_path_factory.mktemp("whole") / "run"))))


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1"))]
)
def test_a_signal_finishes_the_step_saves_and_exits_with_3(name, whole, tiny_path, tmp_path):
    config = settings(tiny_path, tmp_path / "run", num_workers=1)
    job = start(config)
    wait_for(tmp_path / "run", 2, job)
    job.send_signal(getattr(signal, name))
    out, err = job.communicate(timeout=200)
    assert job.returncode == 3, err
    assert f"{name}: finishing this step, then saving" in out
    last = err.strip().splitlines()[-1]
    told = rf"stopped by {name} after step \d, which is saved; go on with: .* finetune.py --resume .*/run"
    assert re.fullmatch(told, last), err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    job = start({**config, "resume": "auto"})
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    same_run(tmp_path / "run", whole)


def test_files_deleted_while_training_are_named_and_the_run_goes_on_when_they_are_back(tiny_path, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "train_data", data, ignore=shutil.ignore_patterns("demonstration"))
    job = start(settings(tiny_path, tmp_path / "run", data=data / "data.json", max_steps=40, epochs=40, num_workers=1))
    wait_for(tmp_path / "run", 2, job)
    (data / "media").rename(data / "gone")
    _, err = job.communicate(timeout=200)
    assert job.returncode == 2, err
    assert "Traceback" not in err
    named, helps, stopped = err.strip().splitlines()[-3:]
    # It may go between the look for it and the reading of it.
    assert re.search(r"data\.json, sample \d+.*[Nn]o such file.*media/", named), err
    assert helps == "mend that, or leave such samples out with --on_bad_sample skip"
    step = int(re.match(r"stopped after step (\d+), which is saved; go on with: ", stopped)[1])
    (saved,) = checkpoint.complete_checkpoints(tmp_path / "run")
    assert checkpoint.verify(saved)["step"] == step == len(losses(tmp_path / "run"))
    (data / "gone").rename(data / "media")
    done = warm.run([sys.executable, *shlex.split(stopped.partition(": ")[2])[1:]])
    assert done.returncode == 0, done.stderr
    assert [number for number, _ in losses(tmp_path / "run")] == list(range(1, 41))


@pytest.mark.slow
def test_many_processes_stop_together(tiny_path, tmp_path):
    """torchrun's launcher hands the signal on; all ranks stop after the same step; the exit code is 3."""
    config = settings(tiny_path, tmp_path / "run", max_steps=40, epochs=40, dtype="float64")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "util.parallel.launch", "--nproc_per_node", "2", "--max_restarts", "2",
               "finetune_distributed.py", *runs.flags(config)]  # fmt: skip
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "run", 2, job)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 3, f"{out[-1000:]}\n{err[-3000:]}"
    (saved,) = checkpoint.complete_checkpoints(tmp_path / "run")
    last = err.strip().splitlines()[-1]
    assert f"after step {int(saved.name[5:])}, which is saved" in last
    assert checkpoint.verify(saved)["step"] == len(losses(tmp_path / "run"))
    told = last.partition("go on with: ")[2]
    assert "-m util.parallel.launch --nproc_per_node 2 --max_restarts 2 finetune_distributed.py --resume " in told
    done = subprocess.run(["bash", "-c", told], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [number for number, _ in losses(tmp_path / "run")] == list(range(1, 41))


# ---- kills ----------------------------------------------------------------------------------------------------------


def kill_and_resume(tiny_path: Path, run: Path, whole: Path, kills: int, seed: int) -> dict[str, int]:
    """kill -9 at random moments: four in five while it trains and saves (every step makes a checkpoint), else while it
    starts. A run that was done sooner begins anew. In the end it is let through."""
    generator = random.Random(seed)
    config = settings(tiny_path, run, save_every=1, resume="auto")
    count = {"kills": 0, "while starting": 0, "while saving": 0, "resumes": 0, "steps computed twice": 0}
    while count["kills"] < kills:
        resumable = bool(checkpoint.complete_checkpoints(run))
        job, opened = start_cold(config), opened_at(run)
        if generator.random() < 0.8:
            while opened_at(run) == opened and job.poll() is None:
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 1.5))
        else:
            time.sleep(generator.uniform(0, 3))
        job.kill()
        _, err = job.communicate()
        assert job.returncode in (0, -signal.SIGKILL), err
        if job.returncode == 0:
            same_run(run, whole)
            shutil.rmtree(run)
            continue
        count["kills"] += 1
        count["while starting"] += opened_at(run) == opened
        count["resumes"] += resumable and opened_at(run) != opened
        count["while saving"] += bool(list(run.glob("checkpoints/.unfinished_*")))
        found = checkpoint.complete_checkpoints(run)
        for path in found:
            assert checkpoint.verify(path)["step"] == int(path.name[5:]), "complete or absent"
        logged = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        count["steps computed twice"] += max(0, logged - (int(found[-1].name[5:]) if found else 0))
    _, err = (job := start_cold(config)).communicate(timeout=300)
    assert job.returncode == 0, err
    same_run(run, whole)
    return count


def opened_at(run: Path) -> float:
    """When a process last began to train in this folder; 0 for never."""
    return (run / "training_config.json").stat().st_mtime if (run / "training_config.json").exists() else 0.0


@pytest.mark.slow
def test_kill_9_at_random_moments(whole, tiny_path, tmp_path):
    print(kill_and_resume(tiny_path, tmp_path / "run", whole, kills=3, seed=0))


@pytest.mark.slow
def test_kill_9_at_50_random_moments(whole, tiny_path, tmp_path):
    count = kill_and_resume(tiny_path, tmp_path / "run", whole, kills=50, seed=1)
    print(count)
    assert min(count.values()) > 0, "some moment was never met"


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_path, tmp_path) -> Path:
    """A run of 4 steps with checkpoints after 2 and 4."""
    return Path(finetune.train(Config(**settings(tiny_path, tmp_path / "saved", max_steps=4, save_every=2))))


def resume(run: Path, tiny_path: Path, **changes) -> Path:
    config = settings(tiny_path, run, max_steps=4, save_every=2, resume="auto")
    return Path(finetune.train(Config(**{**config, **changes})))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, saved, tiny_path, capsys):
    before = load_file(saved / "model.safetensors")
    newest = saved / "checkpoints" / "step_000004"
    victim = newest / "state.json" if damage == "state" else next(newest.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        victim.write_bytes(content)
    again = resume(saved, tiny_path)
    printed = capsys.readouterr().out
    assert "step_000004: not used" in printed
    assert [step for step, _ in losses(again)] == [1, 2, 3, 4]
    after = load_file(again / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_when_all_are_damaged_it_stops(saved, tiny_path):
    for state in saved.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    with pytest.raises(UserError, match="every checkpoint there is damaged"):
        resume(saved, tiny_path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile pickle was executed",)


def test_no_file_of_a_checkpoint_can_run_code(saved, tiny_path, tmp_path, monkeypatch):
    """A hostile pickle in the place of each file in turn, the checksums made to fit."""
    monkeypatch.chdir(tmp_path)
    newest = saved / "checkpoints" / "step_000004"
    kept = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert {".metadata", "state.json"} < set(kept)
    for name in kept:
        for protocol in (0, 2, 5):
            (newest / name).write_bytes(pickle.dumps(Hostile(), protocol=protocol))
            if name != "state.json":
                body = json.loads(kept["state.json"].decode().rstrip("\n").rpartition("\n")[0])
                body["files"][name] = checkpoint.checksum(newest / name)
                text = json.dumps(body)
                import zlib

                (newest / "state.json").write_text(f"{text}\n{zlib.crc32(text.encode()):08x}\n")
            try:
                resume(saved, ROOT and tiny_path, resume=str(newest), data=[str(ROOT / "train_data" / "data.json")],
                       resume_anyway=True, output_dir=str(tmp_path / f"out {name} {protocol}"))  # fmt: skip
                refused = False
            except BaseException:
                refused = True
            assert refused, f"{name} was read"
            assert not (tmp_path / "hostile pickle was executed").exists(), name
            for other, content in kept.items():
                (newest / other).write_bytes(content)


def test_changed_settings_are_listed_and_those_that_matter_refused(saved, tiny_path, capsys, tmp_path):
    with pytest.raises(UserError) as error:
        resume(saved, tiny_path, max_steps=6, learning_rate=2e-3, micro_batch_size=2)
    said = str(error.value)
    assert "--learning_rate: 0.001 -> 0.002" in said
    assert "--max_steps: 4 -> 6" in said
    assert "micro_batch_size" not in said
    assert "--resume_anyway" in said
    resume(saved, tiny_path, max_steps=6, learning_rate=2e-3, micro_batch_size=2, resume_anyway=True)
    printed = capsys.readouterr().out
    assert "--micro_batch_size: None -> 2" in printed
    assert "--learning_rate: 0.001 -> 0.002" in printed
    assert [step for step, _ in losses(saved)] == [1, 2, 3, 4, 5, 6]


def fields_of(state: dict) -> dict:
    """The settings of a checkpoint, without what it says of where they came from."""
    return {name: value for name, value in state["settings"].items() if name in Config.__dataclass_fields__}


def test_a_setting_that_is_younger_than_the_checkpoint_had_its_default(saved, tiny_path, tmp_path):
    """A checkpoint written before there was a --schedule: another than the default changes what is computed."""
    checkpoint_now = checkpoint.complete_checkpoints(saved)[-1]
    state = checkpoint.read_state(checkpoint_now)
    del state["settings"]["schedule"]
    now = Config(**{**fields_of(state), "resume": "auto", "output_dir": str(saved)})
    checkpoint.compare_settings(now, state, checkpoint_now)
    with pytest.raises(UserError, match="--schedule: cosine -> linear"):
        checkpoint.compare_settings(replace(now, schedule="linear"), state, checkpoint_now)


def test_another_fall_of_the_learning_rate_is_refused(saved):
    checkpoint_now = checkpoint.complete_checkpoints(saved)[-1]
    state = checkpoint.read_state(checkpoint_now)
    now = Config(**{**fields_of(state), "resume": "auto", "output_dir": str(saved)})
    for changes, said in (
        ({"min_learning_rate_ratio": 0.1}, "--min_learning_rate_ratio: 0.0 -> 0.1"),
        ({"schedule": "wsd", "decay_ratio": 0.2}, "--decay_ratio: 0.1 -> 0.2"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.compare_settings(replace(now, **changes), state, checkpoint_now)


def test_other_data_under_the_same_name_is_noticed(tiny_path, tmp_path):
    data = tmp_path / "data.jsonl"

    def write(first: str) -> None:
        lines = [
            [{"role": "user", "content": f"{first}{n}?"}, {"role": "assistant", "content": "yes"}] for n in range(16)
        ]
        data.write_text("\n".join(json.dumps({"messages": line}) for line in lines))

    write("Is it ")
    config = settings(tiny_path, tmp_path / "run", data=[str(data)], max_steps=2, save_every=1)
    finetune.train(Config(**config))
    write("Was it ")
    with pytest.raises(UserError, match="files with other content"):
        finetune.train(Config(**{**config, "resume": "auto"}))


def test_the_newest_and_the_best_are_kept(tiny_path, tmp_path):
    run = Path(finetune.train(Config(**settings(
        tiny_path, tmp_path / "run", max_steps=5, save_every=1, keep=2, eval_every=1, learning_rate=0.3,
        eval_data=[str(ROOT / "test_data" / "data.json")],
    ))))  # fmt: skip
    lines = runs.log(run)
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(evaluated, key=evaluated.get)
    kept = {int(path.name[5:]) for path in checkpoint.complete_checkpoints(run)}
    assert kept == {best, 4, 5}, f"{evaluated}"


def test_checkpoints_by_the_minute(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("util.checkpoint.split_interval", lambda text: (0, 1e-6))
    run = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "run", max_steps=3, save_every="1min"))))
    assert len(checkpoint.complete_checkpoints(run)) == 3
    assert checkpoint.split_interval is not None


def test_intervals():
    assert checkpoint.split_interval("100") == checkpoint.split_interval(100) == (100, 0)
    assert checkpoint.split_interval("15min") == (0, 15)
    with pytest.raises(UserError, match="--save_every often"):
        Config(save_every="often")


def test_what_is_saved_is_what_was_there_when_saving_began(tiny_path, tmp_path, monkeypatch):
    """Training goes on while a slow disk takes the files: the copy must be a copy."""
    from torch.distributed.checkpoint import FileSystemWriter

    write = FileSystemWriter.write_data

    waits = []

    def slow_write(self, plan, planner):
        """Writes only after the next step, which must not wait for it, is in the log."""
        log = tmp_path / "slow" / "metrics.jsonl"
        step, deadline = log.read_text().count('"loss"'), time.time() + 60
        while step < 6 and log.read_text().count('"loss"') == step and time.time() < deadline:
            time.sleep(0.01)
        waits.append((step, time.time() < deadline))
        return write(self, plan, planner)

    plain = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "plain", max_steps=2, save_every=2))))
    monkeypatch.setattr(FileSystemWriter, "write_data", slow_write)
    run = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "slow", max_steps=6, save_every=2))))
    monkeypatch.undo()
    assert waits == [(2, True), (4, True), (6, True)], "a step waited for the disk"
    shutil.rmtree(run / "checkpoints" / "step_000006")
    shutil.rmtree(run / "checkpoints" / "step_000004")
    other = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "on", max_steps=6, resume=str(run)))))
    assert losses(other) == losses(run)[2:]
    assert losses(run)[:2] == losses(plain)


def test_weights_do_not_change_before_they_are_copied(tiny_path, tmp_path, monkeypatch):
    """A slow copy, which the next step's passes need not wait for, but its update must."""
    from torch.distributed.checkpoint.staging import DefaultStager

    stage = DefaultStager._stage

    def slow_stage(self, *args, **kwargs):
        time.sleep(1.0)
        return stage(self, *args, **kwargs)

    run = settings(tiny_path, tmp_path / "plain", max_steps=3, save_every=1)
    plain = Path(finetune.train(Config(**run)))
    monkeypatch.setattr(DefaultStager, "_stage", slow_stage)
    slow = Path(finetune.train(Config(**{**run, "output_dir": str(tmp_path / "slow")})))
    same_run(slow, plain)
    for step in (1, 2, 3):
        assert stored(slow, step) == stored(plain, step), f"step {step}"


def stored(run: Path, step: int) -> dict[str, list[int]]:
    """Checksums of the files with the tensors of a checkpoint."""
    files = checkpoint.verify(run / "checkpoints" / f"step_{step:06d}")["files"]
    return {name: sums for name, sums in files.items() if name.endswith(".distcp")}


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(small_disk, whole, tiny_path, tmp_path):
    """A checkpoint takes 14 MB: the first fits, the second does not. Training goes on and its end says what to do."""
    config = settings(tiny_path, small_disk / "run", save_every=2)
    job = start(config)
    out, err = job.communicate(timeout=300)
    assert out.count("NOT SAVED") == 2, out[-1500:]
    assert "step_000002" in out.split("NOT SAVED")[1], "the newest complete one is named"
    (first,) = checkpoint.complete_checkpoints(small_disk / "run")
    assert checkpoint.verify(first)["step"] == 2
    assert not list((small_disk / "run" / "checkpoints").glob(".*")), "no half of a checkpoint is left"
    assert "Traceback" not in err
    assert job.returncode in (0, 1)


def test_an_output_folder_that_cannot_be_written_is_named(tiny_path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        finetune.train(Config(**settings(tiny_path, tmp_path / "file" / "run")))


# ---- numbers that are none, workers that are gone -------------------------------------------------------------------


def test_a_step_that_is_no_number_is_left_out_and_names_its_samples(tiny_path, tmp_path, monkeypatch, capsys):
    from util.loss import PackedLoss

    forward, calls = PackedLoss.forward, []

    def broken(self, batch, *args, **kwargs):
        calls.append(1)
        return forward(self, batch, *args, **kwargs) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(PackedLoss, "forward", broken)
    run = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "run", max_steps=4))))
    printed = capsys.readouterr().out
    assert re.search(
        r"step 2: loss nan, gradient norm nan: this update is left out. Its samples: train_data/data.json, sample",
        printed,
    )
    assert "updates left out: 1, whose loss" in printed
    found = losses(run)
    assert found[1] == (2, None)
    assert all(value is not None for step, value in found if step != 2)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run / "model.safetensors").values())


def test_three_steps_in_a_row_that_are_no_numbers_end_the_run(tiny_path, tmp_path, monkeypatch):
    from util.loss import PackedLoss

    forward = PackedLoss.forward
    monkeypatch.setattr(PackedLoss, "forward", lambda self, batch: forward(self, batch) * float("inf"))
    with pytest.raises(Ended, match="3 steps in a row, up to step 3") as ended:
        finetune.train(Config(**settings(tiny_path, tmp_path / "run")))
    assert ended.value.code == 1


def test_a_killed_data_worker_is_a_clear_message(tiny_path, tmp_path):
    job = start(settings(tiny_path, tmp_path / "run", max_steps=500, epochs=999, num_workers=2))
    wait_for(tmp_path / "run", 2, job)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = job.communicate(timeout=200)
    assert job.returncode == 1, err
    died, killed, stopped = err.strip().splitlines()[-3:]
    assert "DataLoader worker" in died
    assert "a data worker was killed" in killed
    (saved,) = checkpoint.complete_checkpoints(tmp_path / "run")
    assert f"stopped after step {checkpoint.verify(saved)['step']}, which is saved; go on with: " in stopped
    assert checkpoint.verify(saved)["step"] == len(losses(tmp_path / "run"))
    assert "Traceback" not in err, err


class Batches:
    """Stands for torch's iterator, which takes a batch out of the memory of a worker that dies just then."""

    def __init__(self, error: Exception, dies: bool) -> None:
        self.error = error
        self._workers = [multiprocessing.Process(target=os._exit if dies else time.sleep, args=(9,), daemon=True)]
        self._workers[0].start()

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), FileNotFoundError("gone"), EOFError()])
def test_a_worker_that_dies_while_its_batch_is_taken_is_named(error):
    """torch lets the broken connection through, which says nothing of a worker."""
    batches = Batches(error, dies=True)
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid {batches._workers[0].pid}\) exited"):
        next(told_of_dead_workers(batches))
    alive = Batches(error, dies=False)
    with pytest.raises(type(error)):
        next(told_of_dead_workers(alive))
    alive._workers[0].kill()


def test_a_million_samples_are_skipped_without_planning_them(monkeypatch):
    """Resuming at position 1,000,000 looks at no sample before it: one order is drawn, of the epoch gone on with."""
    size = Size(100, 10, [])
    sizes, orders = Sizes.of(Finding(size) for _ in range(1_000_008)), []

    def order(epoch: int) -> np.ndarray:
        orders.append(epoch)
        return np.arange(len(sizes))

    steps = Steps(sizes, order, len(sizes), 3, None, Config(global_batch_size=8))
    assert len(steps) == 3 * 125_001
    orders.clear()
    taken, plan = [], Steps._plan

    def noted(self, order: np.ndarray, begin: int, end: int):
        taken.append(begin)
        return plan(self, order, begin, end)

    monkeypatch.setattr(Steps, "_plan", noted)
    step = next(steps.after(125_001 + 125_000))
    assert (step.epoch, sorted(step.micro_batches[0])) == (1, list(range(1_000_000, 1_000_008)))
    assert (orders, taken) == ([1], [125_000])
