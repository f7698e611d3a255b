"""torchrun, with the first cause of a failure as the last thing it says.

    python -m util.launch --nproc_per_node 8 finetune_distributed.py --data my_data/data.json

Its arguments are torchrun's. A wrong flag of finetune_distributed.py is answered before any process is started.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from util.config import parse_arguments

SCRIPT = "finetune_distributed.py"
interrupted = False


def first_cause(failures: dict) -> tuple[str, int]:
    """What to say of the ranks that failed, and the exit code.

    A rank killed from outside comes first: it leaves no word of its own, only broken connections in the others. Else
    the earliest. torchrun counts whole seconds, and a rank's end breaks the others' connections within milliseconds.
    """
    told = {rank: failure for rank, failure in failures.items() if failure.error_file_data.get("seconds")}
    usual = (0, -signal.SIGTERM, *([-signal.SIGABRT] if told else []))  # torchrun's own, and a broken connection's
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
    return (f"rank {rank} failed first:\n{text}" if "\n" in text else text), max(1, told[rank].exitcode)


def main() -> None:
    """Start the processes and wait for them."""
    arguments = sys.argv[1:]
    if SCRIPT in arguments:
        sys.argv[0] = SCRIPT  # it is this script's flags that are checked, and its name that a message bears
        parse_arguments("", arguments[arguments.index(SCRIPT) + 1 :])
    # Else processes that are started again find the addresses of the dead ones (pytorch#135712, seen with 2.15 too).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = run.parse_args(arguments)
    if hasattr(settings, "signals_to_handle"):  # torch 2.12 and newer; older ones give the ranks 30 seconds
        settings.signals_to_handle = "SIGHUP,SIGQUIT"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, pass_on)
    with tempfile.TemporaryDirectory() as folder:
        # Ranks that were asked to stop leave word here and exit with 0, as torchrun would start others again.
        os.environ["STOPPED_FILE"] = stopped = os.path.join(folder, "stopped")
        try:
            run.run(settings)
        except ChildFailedError as error:
            text, code = first_cause(error.failures)
        except SignalException as error:
            text, code = f"ended by signal {error.sigval}", 128 + error.sigval
        except KeyboardInterrupt:
            text, code = "interrupted", 130
        else:
            text, code = (Path(stopped).read_text(), 3) if os.path.exists(stopped) else ("", 0)
    if text:
        print(f"\n{text.strip()}", file=sys.stderr)
    sys.exit(code)


def pass_on(number: int, frame) -> None:
    """Hand a signal to the ranks and wait for what they make of it; a second SIGINT ends them."""
    global interrupted
    if number == signal.SIGINT and interrupted:
        raise KeyboardInterrupt
    interrupted |= number == signal.SIGINT
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), number)


if __name__ == "__main__":
    main()
