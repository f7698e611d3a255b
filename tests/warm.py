"""Commands of this project in a fork of a process that has imported torch and transformers already: a start takes 0.1 s
instead of 5 to 10, of which the tests would spend most of their time.

The fork is a process of its own with the command's arguments, folder, environment and output. Where the start itself is
tested (finetune.sh, --help, kills, launchers) the tests start Python as users do.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READ_AT_IMPORT = (
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_HUB_DISABLE_XET",
    "LD_PRELOAD",
    "PYTHONHASHSEED",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([  # nothing of this project: that the commands import it themselves is tested, too
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torchvision.transforms.v2", "av",
    "transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.qwen2_vl.processing_qwen2_vl",
])  # fmt: skip


class Job:
    """The part of subprocess.Popen that tests use, of `python FILE ...` or `python -m MODULE ...` in a fork."""

    def __init__(self, words: list, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
        assert words[0] == sys.executable
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [str(Path(self.folder.name, name)) for name in ("stdout", "stderr")]
        env = dict(os.environ if env is None else env)
        self.process = SERVER.Process(target=be, args=(self.words[1:], str(cwd), env, self.files))
        self.process.start()
        self.pid, self.kill, self.returncode = self.process.pid, self.process.kill, None

    def poll(self) -> int | None:
        self.returncode = self.process.exitcode
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, which is made after `timeout` seconds; all that it printed."""
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        return tuple(Path(file).read_text(encoding="utf-8", errors="replace") for file in self.files)


def run(
    words: list, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text; without a fork where the environment is another from the imports on."""
    if env and any(env.get(name) != os.environ.get(name) for name in READ_AT_IMPORT):
        words = [str(word) for word in words]
        return subprocess.run(words, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False)
    job = Job(words, cwd, env)
    printed = job.communicate(timeout)
    return subprocess.CompletedProcess(words, job.returncode, *printed)


def run_ranks(count: int, words: list, cwd: Path = ROOT, timeout: float = 600) -> None:
    """`count` forks that find each other as those of torchrun do on one machine; AssertionError where one fails."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which outlives any rank, as torchrun's
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count),
              "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    jobs = []
    for rank in range(count):
        jobs.append(Job(words, cwd, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    deadline = time.monotonic() + timeout
    running = {job.process.sentinel for job in jobs}
    while running:
        ended = connection.wait(running, max(0, deadline - time.monotonic()))
        running -= set(ended)
        if not ended:  # in time
            break
        if any(job.poll() for job in jobs):  # the others hear of it and say so, or wait for it for ever
            deadline = min(deadline, time.monotonic() + 10)
    for job in jobs:
        if job.poll() is None:
            job.kill()
    printed = [job.communicate() for job in jobs]
    if any(job.poll() for job in jobs):
        said = [f"rank {rank} ended with {job.returncode}: {out[-1000:]}\n{error[-3000:]}"
                for rank, (job, (out, error)) in enumerate(zip(jobs, printed, strict=True))]  # fmt: skip
        raise AssertionError("\n".join(said))


def be(words: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Become `python WORDS...` and end with it."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    folder = cwd if words[0] == "-m" else str(Path(cwd, words[0]).parent)
    sys.path[:0] = [folder, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
