"""torchrun, with the first cause of a failure as the last thing it says.

    python -m util.launch --nproc_per_node 8 finetune_distributed.py --data my_data/data.json

Its arguments are torchrun's. A wrong flag of finetune_distributed.py is answered before any process is started.
"""

import os
import signal
import sys

from util.config import parse_arguments

SCRIPT = "finetune_distributed.py"


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
        own = sys.argv[0]
        sys.argv[0] = SCRIPT
        parse_arguments("", arguments[arguments.index(SCRIPT) + 1 :])
        sys.argv[0] = own
    # Else processes that are started again find the addresses of the dead ones (pytorch#135712, seen with 2.15 too).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        text, code = first_cause(error.failures)
        print(f"\n{text}", file=sys.stderr)
        sys.exit(code)
    except SignalException as error:
        print(f"\nended by signal {error.sigval}", file=sys.stderr)
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
