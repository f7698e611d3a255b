"""torchrun, with the first cause of a failure as the last thing it says.

    python -m util.parallel.launch --nproc_per_node 8 finetune_distributed.py --data my_data/data.json

Its arguments are torchrun's. A wrong flag of finetune_distributed.py is answered before any process is started.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from util import signals
from util.command_line import refuse_windows
from util.config import parse_arguments
from util.run_folder import relative

SCRIPT = "finetune_distributed.py"
TOGETHER = 5.0  # seconds after the first failure in which another one counts as a cause, not as a consequence of it

asked = ""  # the signal that this process got


def first_cause(failures: dict) -> tuple[str, int]:
    """What to say of the ranks that failed, and the exit code.

    A rank that failed seconds after the first one was ended by torchrun and is no cause. Among the others, a rank that
    was killed from outside is the cause: it leaves no message of its own, but its end breaks the connections of the
    others within milliseconds, and they do leave messages. Without such a rank it is the earliest failure. Ranks note
    the time themselves where they can, as torchrun counts whole seconds.
    """
    noticed = {rank: failure.error_file_data.get("seconds") or failure.timestamp for rank, failure in failures.items()}
    began = min(noticed.values())
    failures = {rank: failure for rank, failure in failures.items() if noticed[rank] <= began + TOGETHER}
    told = {rank: failure for rank, failure in failures.items() if failure.error_file_data.get("seconds")}
    usual = [0, -signal.SIGTERM]  # torchrun ends ranks by SIGTERM
    if told:
        usual.append(-signal.SIGABRT)  # a broken connection to another rank ends a rank so
    silent = {rank: failure for rank, failure in failures.items() if rank not in told and failure.exitcode < 0}
    killed = [(rank, failure) for rank, failure in silent.items() if failure.exitcode not in usual]
    if killed:
        rank, failure = killed[0]
        text = f"rank {rank} was killed by signal {-failure.exitcode} ({failure.signal_name()})"
        if failure.exitcode == -9:
            text += ", which the kernel sends where memory runs out: fewer --num_workers, or see dmesg"
        return text, 1
    if not told:
        rank, failure = next(iter(failures.items()))
        return f"rank {rank} ended with exit code {failure.exitcode}", max(1, failure.exitcode)
    rank = min(told, key=lambda rank: told[rank].error_file_data["seconds"])
    text = told[rank].error_file_data["message"]["extraInfo"]["py_callstack"].rstrip()
    if text.startswith("Traceback"):
        text = f"rank {rank} failed first:\n{text}"
    return text, max(1, told[rank].exitcode)


def main() -> None:
    """Start the processes and wait for them."""
    arguments = sys.argv[1:]
    if SCRIPT in arguments:
        sys.argv[0] = SCRIPT  # the flags are those of the script, so a message about them bears its name
        parse_arguments("", arguments[arguments.index(SCRIPT) + 1 :])
    refuse_windows(SCRIPT)
    folder = os.environ["LAUNCH_FOLDER"] = tempfile.mkdtemp(prefix="launch_")
    for number in signals.SIGNALS:
        signal.signal(number, pass_on)
    try:
        text, code = run(arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if text:
        print(f"\n{text.strip()}", file=sys.stderr)
    sys.exit(code)


def run(arguments: list[str]) -> tuple[str, int]:
    """What to say at the end, and the exit code."""
    # Without this, processes that are started again find the addresses of the dead ones (pytorch#135712; in 2.15, too).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = run.parse_args(arguments)
    own = arguments[: arguments.index(settings.training_script) + 1]
    os.environ["STARTED_AS"] = json.dumps([relative(sys.executable), "-m", "util.parallel.launch", *own])
    if hasattr(settings, "signals_to_handle"):  # torch 2.12 and newer; older ones give the ranks 30 seconds
        settings.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        run.run(settings)
    except ChildFailedError as error:
        told = any(failure.error_file_data.get("seconds") for failure in error.failures.values())
        if asked and not told:  # the ranks did not handle signals yet, or got theirs before this process did
            return ended_at_start(asked)
        return first_cause(error.failures)
    except SignalException as error:
        return f"ended by signal {error.sigval}", 128 + error.sigval
    # Ranks that stopped on a signal exited with 0, else torchrun would start them again; a file says what happened.
    stopped = signals.launch_folder() / "stopped"
    if not stopped.exists():
        return "", 0
    text, code = json.loads(stopped.read_text(encoding="utf-8"))
    return text, code


def ended_at_start(name: str) -> tuple[str, int]:
    return f"stopped by {name} {signals.STARTING}", 128 + signal.Signals[name]


def pass_on(number: int, frame: object) -> None:
    """Hand a signal to the ranks, which then save and end; a second SIGINT kills them."""
    global asked
    name = signal.Signals(number).name
    ranks = children()
    if name == asked == "SIGINT":
        for rank in ranks:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank, signal.SIGKILL)  # each has a session of its own, with its data workers
        end_now("stopped by SIGINT for the second time; what was not saved is lost", 130)
    if not asked:
        asked = name
        (signals.launch_folder() / "asked").write_text(name, encoding="utf-8")  # for ranks that are only being started
    if not ranks:
        end_now(*ended_at_start(name))
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number)


def children() -> list[int]:
    """The processes that this one has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += map(int, (task / "children").read_text(encoding="utf-8").split())
    return found


def end_now(text: str, code: int) -> None:
    shutil.rmtree(signals.launch_folder(), ignore_errors=True)
    os.write(2, f"\n{text}\n".encode())
    os._exit(code)


if __name__ == "__main__":
    main()
