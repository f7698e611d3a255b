"""A command line made from a dataclass of settings; a user's mistake as one message.

Only the standard library is imported here, so that `--help` and a wrong flag answer at once.
"""

import argparse
import dataclasses
import difflib
import errno
import inspect
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import field
from functools import partial
from typing import Any, Literal, NoReturn, get_args, get_origin

from util import run_folder, signals

NOT_GIVEN = object()
USAGE = "%(prog)s [--model MODEL] [--data FILE ...] [any of the flags below]"
# The groups of `--help`, in their order: what everybody sets comes first.
GROUPS = (
    "essentials",
    "data",
    "model",
    "run",
    "optimizer",
    "memory and speed",
    "evaluation",
    "saving",
    "adapters",
    "many GPUs",
    "remote media",
    "tracking and hub",
)
# What other training scripts call a flag of ours: nothing in the spelling leads there.
COMMON_NAMES = {
    "--lr": "--learning_rate",
    "--batch_size": "--global_batch_size",
    "--per_device_train_batch_size": "--micro_batch_size",
    "--num_train_epochs": "--epochs",
    "--model_name_or_path": "--model",
    "--train_data": "--data",
    "--data_path": "--data",
    "--save_steps": "--save_every",
    "--eval_steps": "--eval_every",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--bf16": "--dtype",
    "--max_length": "--max_tokens",
    "--model_max_length": "--max_tokens",
    "--lr_scheduler_type": "--schedule",
    "--load_best_model_at_end": "--final",
    "--early_stopping_patience": "--stop_after",
    "--min_lr_ratio": "--min_learning_rate_ratio",
    "--optim": "--optimizer",
    "--resume_from_checkpoint": "--resume",
    "--use_lora": "--lora_rank",
    "--dataloader_num_workers": "--num_workers",
    "--save_total_limit": "--keep",
    "--attn_implementation": "--attention",
}
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

    def __reduce__(self) -> tuple:
        """As it is sent from the first rank to the others."""
        return type(self), (str(self), self.code)


# ---- settings -------------------------------------------------------------------------------------------------------


def setting(
    default,
    help: str,
    *,
    group: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    harmless: bool = False,
):
    """A dataclass field with all that is known of it: its line in `--help`, and the group in which it stands there.

    `least`, `above`, `most`, `below`: the range of its numbers; None as a value is in every range.
    `harmless`: a resumed run may change it, since it says where and how is computed, not what.
    """
    known = {
        "help": help,
        "group": group,
        "least": least,
        "above": above,
        "most": most,
        "below": below,
        "harmless": harmless,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=known)
    return field(default=default, metadata=known)


def out_of_range(settings) -> list[str]:
    """A message for each setting of a dataclass whose number is outside the range that its field names."""
    found = []
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if value is not None and not is_in_range(value, item.metadata):
            found.append(f"--{item.name} {value}: must be {range_in_words(item.metadata)}")
    return found


def is_in_range(value: float, known: Mapping) -> bool:
    """NaN is in no range."""
    if known["least"] is not None and not value >= known["least"]:
        return False
    if known["above"] is not None and not value > known["above"]:
        return False
    if known["most"] is not None and not value <= known["most"]:
        return False
    return known["below"] is None or value < known["below"]


def range_in_words(known: Mapping) -> str:
    """`at least 1`, `between 0 and 1`, `at least 0 and below 1`."""
    if known["least"] is not None and known["most"] is not None:
        return f"between {known['least']} and {known['most']}"
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    return " and ".join(f"{text} {known[name]}" for name, text in words.items() if known[name] is not None)


def choices_of(settings: type, name: str) -> tuple[str, ...]:
    """The words that a setting may be: those of its Literal."""
    return next(get_args(item.type) for item in dataclasses.fields(settings) if item.name == name)


def harmless_settings(settings: type) -> set[str]:
    """The names of the settings that a resumed run may change."""
    return {item.name for item in dataclasses.fields(settings) if item.metadata["harmless"]}


# ---- parsing --------------------------------------------------------------------------------------------------------


def parse(
    settings: type,
    description: str,
    arguments: list[str] | None = None,
    others: Callable[[dict], dict] = lambda given: {},
    parser: "CollectingParser | None" = None,
):
    """The command line as `settings`, a dataclass. A wrong one ends with exit code 2, every problem in one message.

    `others`: from the flags that are given, the values of those that are not, where these are not the defaults.
    `parser`: one that `settings_parser` made; None: made here.
    """
    tell_in_any_encoding()
    parser = parser or settings_parser(settings, description)
    fields = dataclasses.fields(settings)
    # argparse puts a default only where there is nothing yet
    untouched = argparse.Namespace(**{item.name: NOT_GIVEN for item in fields})
    values, unknown = parser.parse_known_args(arguments, untouched)
    parser.note_unknown(unknown)
    given = {name: value for name, value in vars(values).items() if value is not NOT_GIVEN}
    good = {name: value for name, value in given.items() if name not in parser.wrong}
    known_names = {item.name for item in fields}
    of_others = others(good)
    own = {name: value for name, value in of_others.items() if name in known_names - parser.wrong}
    try:
        made = settings(**{**own, **good})
        made.given = frozenset([*of_others.get("given", []), *good])  # what is typed is never changed unasked
    except UserError as error:
        parser.problems += str(error).splitlines()
    if parser.problems:
        parser.exit(2, "".join(f"{parser.prog}: {problem}\n" for problem in parser.problems))
    return made


def settings_parser(settings: type, description: str, usage: str = USAGE) -> "CollectingParser":
    """The parser of a dataclass: a flag for each field, in the groups that the fields name, `GROUPS` first."""
    parser = CollectingParser(
        description=description,
        usage=usage,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    own = inspect.get_annotations(settings)  # not those that it inherits
    # a dataclass has the fields that it inherits before its own
    fields = sorted(dataclasses.fields(settings), key=lambda item: item.name not in own)
    used = {item.metadata["group"] for item in fields}
    for group in [name for name in (*GROUPS, *sorted(used - set(GROUPS))) if name in used]:
        section = parser.add_argument_group(group)
        for item in fields:
            if item.metadata["group"] == group:
                add_flag(parser, section, item)
    return parser


def add_flag(parser: "CollectingParser", section, item: dataclasses.Field) -> None:
    """Add the flag of one field to a section of the help. A value of a wrong type is noted and parsing goes on."""
    options = [option for option in get_args(item.type) if option is not type(None)]
    many = get_origin(item.type) is list
    kind: Any = options[0] if options and get_origin(item.type) is not Literal else item.type
    choices = get_args(kind) if get_origin(kind) is Literal else None
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    help_text = help_of(item, default).replace("%", "%%")
    if item.type is bool:
        section.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, default=default, help=help_text)
        return

    def convert(text: str):
        if choices and text not in choices:
            return parser.note(item.name, f"--{item.name} {text}: must be one of {', '.join(choices)}")
        try:
            return text if choices else kind(text)
        except ValueError:
            what = {int: "a whole number", float: "a number"}[kind]
            return parser.note(item.name, f"--{item.name} {text}: must be {what}")

    metavar = "{" + ",".join(choices) + "}" if choices else item.name.rsplit("_", 1)[-1].upper()
    is_switch = {"on", "off"} <= set(choices or ())
    given = {"type": convert, "default": default, "metavar": metavar, "help": help_text}
    if is_switch:  # `--compile` and `--no-compile` say on and off, too
        section.add_argument(f"--{item.name}", nargs="?", const="on", **given)
        negation = {"action": "store_const", "const": "off", "dest": item.name, "help": argparse.SUPPRESS}
        section.add_argument(f"--no-{item.name}", **negation)
        return
    section.add_argument(f"--{item.name}", nargs="*" if many else None, **given)


def help_of(item: dataclasses.Field, default) -> str:
    """The description of a setting, and its default where the description does not say it."""
    text = item.metadata["help"]
    if default in (None, []) or "default:" in text:
        return text
    return f"{text} (default: {' '.join(default) if isinstance(default, list) else default})"


def command_parser(command: str, description: str) -> "CollectingParser":
    """The parser of `python -m util COMMAND`; `description`: its module's docstring, whose first line sums it up."""
    summary, _, rest = description.strip().partition("\n")
    return CollectingParser(
        prog=f"python -m util {command}",
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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

    def note_unknown(self, words: list[str]) -> None:
        """Note what is left of a command line when all known flags and their values are taken out."""
        for previous, word in zip([None, *words], words, strict=False):
            if word.startswith("--"):
                self.problems.append(f"unknown flag {word.split('=')[0]}; {self.advice(word.split('=')[0])}")
            elif previous is None or not previous.startswith("--"):  # else it is the value of an unknown flag
                self.problems.append(f"{word!r} belongs to no flag")

    def advice(self, flag: str) -> str:
        """Which flag may have been meant."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        flag = flag.replace("-", "_").replace("__", "--", 1)
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
        meant = COMMON_NAMES.get(flag) or (near[0] if near else None)
        return f"did you mean {meant}?" if meant in known else "--help lists them all"

    def error(self, message: str) -> NoReturn:
        """What argparse itself cannot read (a flag without its value) ends parsing: say it with what was found."""
        lines = [*self.problems, message]
        self.exit(2, "".join(f"{self.prog}: {line}\n" for line in lines))


def run_training(train: Callable, config) -> None:
    """Run a training script's main function, which a signal ends at once until it has something to save."""
    refuse_windows(sys.argv[0])
    signals.listen_from_the_start()
    run_command(train, config)


def refuse_windows(script: str) -> None:
    """End a training on Windows with one line and exit code 2: it lacks the signals, locks and links of a run."""
    if os.name == "nt":
        name = os.path.basename(script)
        end(f"{name}: does not train on Windows itself, but in its Linux: run `wsl --install`, then this there", 2)


def tell_in_any_encoding() -> None:
    """Let what is printed to a file or a terminal that is not UTF-8 never end the program: escapes take the place of
    letters that the encoding lacks. Windows gives its old code pages to files and pipes, Linux ASCII to LC_ALL=C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(command: Callable, *arguments, name: str = "") -> None:
    """Run a script's main function; a user's mistake ends it with its message and exit code 2.

    `name`: what the message begins with; that of the script, if none is given.
    """
    tell_in_any_encoding()
    # Threads of torch that wait for each other spin for microseconds and then sleep. OpenMP's own 300,000 turns take
    # the cores from other programs and, where those are busy, from the very threads that are waited for (see
    # benchmarks/busy.py). It is read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # A large tensor in memory given anew costs a fault for every 4 KB of it on a CPU; Linux has pages of 2 MB for who
    # asks for them, and torch asks where this is set.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    name = name or sys.argv[0].rpartition("/")[2]
    run_folder.opened = None  # a command before this one may have trained in the same process
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
        if cause := known(error):
            text, code = cause
            end(text + run_folder.hint(), code)
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
    if is_out_of_memory(error):
        return (
            f"{error}\nout of memory on the device. What helps: a smaller --memory_budget, by which settings that need "
            "less are chosen; --micro_batch_size 1 or a smaller --max_tokens; --activation_checkpointing full; "
            "a smaller --max_pixels; --freeze vision"
        ), 1  # fmt: skip
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left. torch's class is named so that this file need not import torch; a CPU, a
    library of NVIDIA's and a GPU that another program fills raise a RuntimeError like others."""
    told = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in told)


def end(text: str, code: int, all_ranks: bool = False) -> None:
    """Say why this process ends, and end it. `all_ranks`: all end so, after the same step, and are not to be started
    again."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()  # else it would draw itself once more, below the last word
    signals.kill_workers()  # torch would wait 5 seconds for each
    if all_ranks and signals.launch_folder():  # util/parallel/launch.py says it
        if os.environ["LOCAL_RANK"] == "0":
            signals.leave_word(text, code)
        os._exit(0)
    if code == 0:
        if os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr)
        sys.exit(0)
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
