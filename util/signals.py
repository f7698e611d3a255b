"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, at any moment and in whatever process they arrive.

They come to one process, or to all of a job at once: from a terminal, Slurm, systemd. While a run starts, nothing is
written yet: it ends at once. Once it trains, `guard.StopSignal` listens. What helps the run (data workers, programs
beside it) must go on serving it, so no signal reaches these: it is the run that ends them.

Only the standard library is imported here.
"""

import json
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.run_folder import written_whole

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGUSR1"):  # the notice of preemption that schedulers send; Windows has none
    SIGNALS.append(signal.SIGUSR1)
STARTING = "before training began; nothing was written"

workers: weakref.WeakSet = weakref.WeakSet()  # the data workers of this process
moment = STARTING  # where the run is, for the line that a signal ends it with


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started meanwhile never get one of these signals: they inherit the mask, forked, spawned or by a fork
    server, before a line of theirs runs. What arrives here meanwhile is delivered at the end.

    Windows has no such mask: a Ctrl-C there reaches all processes of the console.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if "multiprocessing.context" in sys.modules:
        from multiprocessing import get_start_method, resource_tracker

        if get_start_method() != "fork":
            resource_tracker.ensure_running()  # it would unblock the signals when it is started on the way
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_workers() -> None:
    """End the data workers of this process, which hear no other signal than SIGKILL."""
    for worker in list(workers):
        worker.kill()


def end_at_once(number: int, frame: object) -> None:
    """The handler while nothing is there to be saved: one line, exit code 128 + signal, as shells count them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise over the killed workers
    kill_workers()
    text = f"stopped by {signal.Signals(number).name} {moment}"
    code = 128 + number
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        os.write(2, f"\n{text}\n".encode())  # unlike print also safe in the midst of another print
    elif was_asked():
        leave_word(text, code)
        code = 0  # else torchrun would start other ranks
    os._exit(code)


def listen_from_the_start() -> None:
    """From now on a signal ends this process at once, until `guard.StopSignal` listens."""
    global moment
    moment = STARTING
    for number in SIGNALS:
        signal.signal(number, end_at_once)
    if asked := was_asked():  # before this rank was there to hear it
        end_at_once(signal.Signals[asked], None)


def is_main_thread() -> bool:
    """Python lets no other one listen."""
    return threading.current_thread() is threading.main_thread()


# ---- between the ranks of a machine and util/parallel/launch.py, which started them ----------------------------------


def launch_folder() -> Path | None:
    """Where the launcher and its ranks leave each other word; None without the launcher."""
    return Path(os.environ["LAUNCH_FOLDER"]) if "LAUNCH_FOLDER" in os.environ else None


def was_asked() -> str:
    """The name of the signal that the launcher got, or ""."""
    folder = launch_folder()
    if folder is None or not (folder / "asked").exists():
        return ""
    return (folder / "asked").read_text(encoding="utf-8")


def leave_word(text: str, code: int) -> None:
    """What the launcher says at the end, and its exit code; the ranks themselves then end with 0."""
    folder = launch_folder()
    assert folder is not None  # only ranks that the launcher started leave word
    with written_whole(folder / "stopped") as file:
        file.write(json.dumps([text, code]))
