"""A command line made from a dataclass of settings; a user's mistake as one message.

Only the standard library is imported here, so that `--help` and a wrong flag answer at once.
"""

import argparse
import dataclasses
import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import field
from typing import Literal, get_args, get_origin

from util import going_on, signals

NOT_GIVEN = object()
MOST_TOLD = 20  # problems, samples or pairs that one message tells in full; of the others, how many they are


class UserError(ValueError):
    """A mistake in settings or data. Its message says what, where, the rule and the fix; no traceback is shown."""

    def __init__(self, message: str) -> None:
        # A data worker's exception arrives with the worker's traceback before its message.
        if message.startswith("Caught "):
            message = message.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)


class Ended(Exception):
    """A run that ended before its time in an orderly way; its message says where it stands. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def setting(default, description: str):
    """A dataclass field with its one-line description, which `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": description})
    return field(default=default, metadata={"help": description})


def parse(
    settings: type,
    description: str,
    arguments: list[str] | None = None,
    others: Callable[[dict], dict] = lambda given: {},
):
    """The command line as `settings`, a dataclass. A wrong one ends with exit code 2, every problem in one message.

    `others`: from the flags that are given, the values of those that are not, where these are not the defaults.
    """
    parser = CollectingParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    fields = dataclasses.fields(settings)
    for item in fields:
        add_flag(parser, item)
    # argparse puts a default only where there is nothing yet
    untouched = argparse.Namespace(**{item.name: NOT_GIVEN for item in fields})
    values, unknown = parser.parse_known_args(arguments, untouched)
    for previous, word in zip([None, *unknown], unknown, strict=False):
        if word.startswith("--"):
            parser.problems.append(f"unknown flag {word.split('=')[0]}; --help lists them all")
        elif previous is None or not previous.startswith("--"):  # else it is the value of an unknown flag
            parser.problems.append(f"{word!r} belongs to no flag")
    given = {name: value for name, value in vars(values).items() if value is not NOT_GIVEN}
    good = {name: value for name, value in given.items() if name not in parser.wrong}
    known_names = {item.name for item in fields}
    own = {name: value for name, value in others(good).items() if name in known_names - parser.wrong}
    try:
        made = settings(**{**own, **good})
    except UserError as error:
        parser.problems += str(error).splitlines()
    if parser.problems:
        parser.exit(2, "".join(f"{parser.prog}: {problem}\n" for problem in parser.problems))
    return made


def add_flag(parser: "CollectingParser", item: dataclasses.Field) -> None:
    """Add the flag of one Config field. A value of a wrong type is noted and parsing goes on."""
    options = [option for option in get_args(item.type) if option is not type(None)]
    many = get_origin(item.type) is list
    kind = options[0] if options and get_origin(item.type) is not Literal else item.type
    choices = get_args(kind) if get_origin(kind) is Literal else None
    choices = get_args(item.type) if get_origin(item.type) is Literal else choices
    default = item.default_factory() if many else item.default
    help_text = item.metadata["help"].replace("%", "%%")
    if item.type is bool:
        parser.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, default=default, help=help_text)
        return

    def convert(text: str):
        if choices and text not in choices:
            return parser.note(item.name, f"--{item.name} {text}: must be one of {', '.join(choices)}")
        try:
            return text if choices else kind(text)
        except ValueError:
            what = {int: "a whole number", float: "a number"}[kind]
            return parser.note(item.name, f"--{item.name} {text}: must be {what}")

    shown = "{" + ",".join(choices) + "}" if choices else item.name.rsplit("_", 1)[-1].upper()
    parser.add_argument(
        f"--{item.name}", type=convert, nargs="*" if many else None, default=default, metavar=shown, help=help_text
    )


class CollectingParser(argparse.ArgumentParser):
    """An argparse parser that collects problems, so that one run names them all."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.problems: list[str] = []
        self.wrong: set[str] = set()

    def note(self, name: str, problem: str) -> None:
        self.problems.append(problem)
        self.wrong.add(name)

    def error(self, message: str) -> None:
        """What argparse itself cannot read (a flag without its value) ends parsing: say it with what was found."""
        lines = [*self.problems, message]
        self.exit(2, "".join(f"{self.prog}: {line}\n" for line in lines))


def run_training(train: Callable, config) -> None:
    """Run a training script's main function, which a signal ends at once until it has something to save."""
    signals.listen_from_the_start()
    run_command(train, config)


def run_command(command: Callable, *arguments) -> None:
    """Run a script's main function; a user's mistake ends it with its message and exit code 2."""
    # Threads of torch that wait for each other spin for microseconds and then sleep. OpenMP's own 300,000 turns take
    # the cores from other programs and, where those are busy, from the very threads that are waited for (see
    # benchmarks/busy.py). It is read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    name = sys.argv[0].rpartition("/")[2]
    going_on.opened = None  # a command before this one may have trained in the same process
    try:
        command(*arguments)
    except UserError as error:
        end(f"{name}: {error}", 2)
    except Ended as error:
        told = f"{name}: {error}" if error.code == 2 else str(error)
        end(f"\n{told}", error.code, all_ranks=error.code != 1)
    except KeyboardInterrupt:
        end("\ninterrupted", 130)
    except Exception as error:
        if told := known(error):
            end(told[0] + going_on.hint(), told[1])
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        end(traceback.format_exc(), 1)


def known(error: Exception) -> tuple[str, int] | None:
    """What to say of an error whose cause is known, and the exit code; None for a bug."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}: make room, or name another --output_dir", 1
    if re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)):
        return (
            f"{str(error).splitlines()[0]}\na data worker was killed, most often because memory ran out: fewer "
            "--num_workers, a smaller --max_pixels or --video_max_tokens"
        ), 1  # fmt: skip
    # torch's, named so that this file need not import torch; on a CPU it is a RuntimeError like others
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return (
            f"{error}\nout of memory on the device. What helps: --micro_batch_size 1 or a smaller --max_tokens, "
            "--activation_checkpointing full, a smaller --max_pixels, --freeze vision"
        ), 1  # fmt: skip
    return None


def end(text: str, code: int, all_ranks: bool = False) -> None:
    """Say why this process ends, and end it. `all_ranks`: all end so, after the same step, and are not to be started
    again."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()  # else it would draw itself once more, below the last word
    signals.kill_workers()  # torch would wait 5 seconds for each
    if all_ranks and signals.launch_folder():  # util/launch.py says it
        if os.environ["LOCAL_RANK"] == "0":
            signals.leave_word(text, code)
        os._exit(0)
    if not record_failure(text):
        print(text, file=sys.stderr)
        sys.exit(code)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)  # at once: what would be tidied up at a usual end waits for other ranks, and they for this one


def record_failure(text: str) -> bool:
    """Under torchrun: leave `text` where it looks for the first cause (its error_handler.py).

    torchrun says it at the end of the job. Before a restart it does not, so it is printed here. False without torchrun.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    now = time.time()
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}}
    with open(file, "w", encoding="utf-8") as handle:
        json.dump({"message": message, "seconds": now}, handle)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        print(f"rank {os.environ['RANK']}: {text}", file=sys.stderr)
    return True
