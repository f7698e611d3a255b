"""Faults in a job of several processes: it ends quickly, says why, and starts again where it was."""

import ctypes
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import runs
from tests.runs import same_run
from util.checkpoint import complete_checkpoints, verify
from util.parallel import distributed
from util.parallel.faults import name_slow_ranks

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = str(ROOT / "test_data" / "data.json")


def settings(tiny_path: Path, directory: Path, **changes) -> dict:
    own = {"dtype": "float64", "max_steps": 8, "keep": 99, "num_workers": 1}
    return runs.settings(tiny_path, directory, **{**own, **changes})


def launch(fault: str, config: dict, restarts: int = 0, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "util.parallel.launch", "--nproc_per_node", "2", "--max_restarts", str(restarts),
               "tests/faulty_runs.py", fault, json.dumps(config)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(job: subprocess.Popen, expect: int) -> tuple[str, str]:
    """Standard output, and the last 20 lines of standard error, of a job that must end by itself."""
    out, err = job.communicate(timeout=400)
    assert job.returncode == expect, f"{out[-2000:]}\n{err[-4000:]}"
    return out, "\n".join(err.strip().splitlines()[-20:])


@pytest.mark.parametrize(
    ("fault", "last_line"),
    [
        ("raises", r"RuntimeError: a bug on rank 1"),
        # the others wait within a pass, so the step cannot be tried again
        ("out of memory", r"out of memory on the device. What helps: a smaller --memory_budget.*"),
        ("dies", r"rank 1 was killed by signal 9 \(SIGKILL\).*"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_the_first_cause_last(fault, last_line, tiny_path, tmp_path):
    _, printed = finish(launch(fault, settings(tiny_path, tmp_path / "run")), expect=1)
    assert re.fullmatch(last_line, printed.splitlines()[-1]), printed


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["context_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize(
    ("fault", "last_line"),
    [
        ("dies", r"rank 1 was killed by signal 9 \(SIGKILL\).*"),
        ("raises", r"RuntimeError: a bug on rank 1"),
    ],
)
def test_a_rank_that_fails_among_those_that_share_its_rows_ends_the_job_with_the_first_cause(
    fault, last_line, shared, tiny_path, tmp_path
):
    """The other rank waits for tokens, for a part of a sum, or for hidden states and gradients, and hears of it at once:
    torchrun, which waits 30 seconds for ranks that hang, has not to kill it. The seconds are printed (pytest -rP)."""
    config = settings(tiny_path, tmp_path / "run", **{shared: 2})
    out, printed = finish(launch(fault, config), expect=1)
    seconds = time.time() - float(re.search(r"FAULT AT ([\d.]+)", out)[1])
    print(f"--{shared} 2, a rank {fault}: the job ended {seconds:.1f} s after it")
    assert re.fullmatch(last_line, printed.splitlines()[-1]), printed
    assert "forcefully exiting" not in printed


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("raises in data worker", 1, r"RuntimeError: the disk of this machine is on fire"),
        pytest.param("bad data", 2, r"faulty_runs.py: rank 1: the photo is gone", marks=pytest.mark.slow),
        pytest.param("bad held-out data", 2, r"faulty_runs.py: rank 1: the photo is gone", marks=pytest.mark.slow),
    ],
)
def test_data_that_one_rank_cannot_read_stop_all_after_the_same_step(
    fault, code, said, uninterrupted, tiny_path, tmp_path
):
    """They are saved, the command that is told goes on, and the run is the one that was not stopped."""
    config = settings(tiny_path, tmp_path / "run", eval_data=[HELD_OUT] if "held" in fault else [], eval_every=2)
    _, printed = finish(launch(fault, config), expect=code)
    assert re.search(f"^{said}$", printed, re.MULTILINE), printed
    step = int(re.search(r"stopped after step (\d), which is saved; go on with: .*util.parallel.launch", printed)[1])
    (saved,) = complete_checkpoints(tmp_path / "run")
    assert verify(saved)["step"] == step == len(runs.losses(tmp_path / "run"))
    finish(launch("none", {**config, "resume": "auto", "eval_data": []}), expect=0)
    same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_job_that_hangs_ends_and_says_where_every_rank_is(tiny_path, tmp_path):
    job = launch("hangs", settings(tiny_path, tmp_path / "run"), COLLECTIVE_TIMEOUT="8")
    _, printed = finish(job, expect=1)
    assert "no progress for 8 s" in printed
    for rank in (0, 1):
        assert re.search(rf"rank {rank} \(.*, step 3, training on train_data/data.json, sample \d+", printed), printed


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_no_lack_of_memory(tiny_path, tmp_path):
    """It hears nothing, so torchrun kills it 30 s after the other one's watchdog ended the job."""
    _, printed = finish(launch("freezes", settings(tiny_path, tmp_path / "run"), COLLECTIVE_TIMEOUT="8"), expect=1)
    assert "no progress for 8 s" in printed
    assert "memory" not in printed


STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
TELL = "time.sleep(1); command_line.record_failure({!r}); os._exit(1)"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ([TELL.format("the table of the watchdog"), STOP], ("the table of the watchdog", 1)),
        ([STOP, TELL.format("the table of the watchdog")], ("the table of the watchdog", 1)),
        (["time.sleep(1); os._exit(7)", STOP], ("rank 0 ended with exit code 7", 7)),
        ([TELL.format("connection closed"), "time.sleep(1);" + KILL], ("rank 1 was killed by signal 9 (SIGKILL)", 1)),
        ([TELL.format("Traceback\nbug"), "time.sleep(9)"], ("rank 0 failed first:\nTraceback\nbug", 1)),
    ],
)
def test_the_first_cause_of_real_processes(does, said, tmp_path, monkeypatch):
    """What torchrun's own class tells of processes that it had to kill: after 3 seconds here, not 30."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    from util.parallel import launch

    close = SubprocessContext._close
    monkeypatch.setattr(SubprocessContext, "_close", lambda self, death_sig, timeout=30: close(self, death_sig, 3))
    monkeypatch.setattr(launch, "TOGETHER", 1.5)
    start = f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r}); from util import command_line; "
    words = {rank: ("-c", start + text) for rank, text in enumerate(does)}
    environment = {rank: {"RANK": str(rank)} for rank in words}
    ranks = start_processes("ranks", sys.executable, words, environment, DefaultLogsSpecs(str(tmp_path)))
    text, code = launch.first_cause(ranks.wait().failures)
    assert (text.partition(", which")[0], code) == said


@pytest.mark.slow
def test_a_slow_rank_is_named(tiny_path, tmp_path):
    config = settings(tiny_path, tmp_path / "run", max_steps=20, dtype="float32")
    printed, _ = finish(launch("slow", config), expect=0)
    named = re.findall(r"step 20: (rank \d) is slow: ([\d.]+) s of computing", printed)
    assert [rank for rank, _ in named] == ["rank 1"], printed[-2000:]
    assert float(named[0][1]) > 0.1 * 2 * 5, "2 layers slept 0.1 s in each of 5 steps"
    lines = runs.log(tmp_path / "run")
    (compared,) = [line for line in lines if "compute_seconds_by_rank" in line]
    assert compared["step"] == 20
    assert len(compared["compute_seconds_by_rank"]) == len(compared["data_seconds_by_rank"]) == 2


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_is_named(tiny_path, tmp_path):
    config = settings(tiny_path, tmp_path / "run", max_steps=20, dtype="float32", num_workers=0)
    printed, _ = finish(launch("slow data", config), expect=0)
    assert re.findall(r"step 20: (rank \d) waits for its data", printed) == ["rank 1"], printed[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_the_end_of_a_process_waits_for_the_threads_of_gloo(monkeypatch):
    """A thread with their name that computes without Python's lock, as they do."""
    begun = threading.Event()
    done = []

    def work() -> None:
        ctypes.CDLL(None).prctl(15, b"pt_gloo_runloop", 0, 0, 0)  # PR_SET_NAME
        begun.set()
        done.append(hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2_000_000))

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)  # the group of other tests stays
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    distributed.leave_group()
    assert done, "the process would have ended in the midst of it"
    thread.join()
    assert not distributed.gloo_is_at_work()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only there a thread can be starved")
def test_ranks_whose_gloo_threads_are_starved_end_in_order():
    """Without the wait of `distributed.leave_group` 4 of 6 such jobs were aborted: "terminate called without an active
    exception", exit code -6."""
    for _ in range(6):
        port = str(29500 + random.SystemRandom().randrange(2000))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        done = subprocess.run(
            [*command, "tests/starved_runs.py"], cwd=ROOT, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_slow_ranks_by_hand():
    even = [1.0, 1.1, 0.9, 1.0]
    assert name_slow_ranks(even, [1e9] * 4, [0.0] * 4, 5.0) == []
    assert name_slow_ranks([1.0, 2.0, 1.0, 4.0], [1e9, 2e9, 1e9, 4e9], [0.0] * 4, 5.0) == [], "more work, not slow"
    (line,) = name_slow_ranks([1.0, 1.0, 3.0, 1.0], [1e9] * 4, [0.0] * 4, 5.0)
    assert line == "rank 2 is slow: 3.00 s of computing for what takes the others 1.00 s"
    (line,) = name_slow_ranks(even, [1e9] * 4, [0.1, 0.1, 0.1, 2.0], 5.0)
    assert line.startswith("rank 3 waits for its data: 2.00 s")
    assert name_slow_ranks([0.0, 1.0], [0.0, 1e9], [0.0, 0.0], 5.0) == [], "a rank without samples"


def test_a_wrong_flag_is_answered_once_before_any_process_starts():
    command = [sys.executable, "-X", "importtime", "-m", "util.parallel.launch", "--nproc_per_node", "2",
               "finetune_distributed.py", "--epoch", "3"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert said == ["finetune_distributed.py: unknown flag --epoch; did you mean --epochs?"]
    assert "argparse" in imported
    assert "torch" not in imported, "a wrong flag is answered at once"


@pytest.fixture(scope="module")
def uninterrupted(tiny_path, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(launch("none", settings(tiny_path, directory)), expect=0)
    return directory


def test_restarts_go_on_at_the_newest_checkpoint_of_the_same_run(uninterrupted, tiny_path, tmp_path):
    """Rank 1 is killed in the fifth step of every attempt. Without --output_dir the run directory's name is a time of
    day, and a restart must not make another."""
    config = settings(tiny_path, tmp_path, save_every=1, output_dir=None)
    out, _ = finish(launch("dies", config, restarts=4, RUNS=str(tmp_path)), expect=0)
    assert 1 <= out.count("FAULT AT") <= 4
    (run,) = tmp_path.glob("2*")
    assert (tmp_path / "latest").resolve() == run
    same_run(run, uninterrupted)


@pytest.mark.slow
def test_two_machines_start_again_together(uninterrupted, tiny_path, tmp_path):
    """Two launchers that meet at one address, as finetune_distributed.sh starts them with NNODES=2."""
    config = settings(tiny_path, tmp_path / "run", save_every=1)
    port = 29500 + random.SystemRandom().randrange(2000)
    jobs = []
    for machine in (0, 1):
        command = [sys.executable, "-m", "util.parallel.launch", "--nproc_per_node", "1", "--max_restarts", "4", "--nnodes", "2",
                   "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "job",
                   "--rdzv_conf", f"is_host={1 - machine}", "tests/faulty_runs.py", "dies", json.dumps(config)]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True))  # fmt: skip
    outs = [finish(job, expect=0)[0] for job in jobs]
    assert "FAULT AT" in outs[0] + outs[1]
    same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments(uninterrupted, tiny_path, tmp_path):
    """One rank, at any moment of an attempt: while it starts, trains or saves."""
    generator = random.Random(0)
    job = launch("none", settings(tiny_path, tmp_path / "run", save_every=1, num_workers=0), restarts=10)
    kills = []
    while job.poll() is None and len(kills) < 10:
        time.sleep(generator.uniform(0, 10))
        ranks = [int(pid) for pid in children(job.pid) if "faulty_runs.py" in command_of(pid)]
        if ranks:
            victim = generator.choice(ranks)
            kills.append(victim)
            os.kill(victim, 9)
            while job.poll() is None and victim in map(int, children(job.pid)):
                time.sleep(0.05)
    finish(job, expect=0)
    print(f"{len(kills)} kills")
    same_run(tmp_path / "run", uninterrupted)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if Path(f"/proc/{pid}").exists() else []


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
