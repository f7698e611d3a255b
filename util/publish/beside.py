"""Programs that run beside the training, so that nothing they do can touch it: they may wait, fail, hang or print.

Each is a command of this project (`python -m util COMMAND`) in a process of its own. What it tells the user is said
above the progress bar; what its libraries print goes into a file. It ends by itself when the training ends, also when
the training is killed.
"""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from util.run_folder import ROOT
from util.signals import kept_from_children

# Beginnings of the environment variables by which a process knows that it is a rank of a job
OF_A_RANK = (
    "TORCHELASTIC_",
    "LAUNCH_FOLDER",
    "STARTED_AS",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
)


class Beside:
    """A running `python -m util COMMAND ARGUMENTS`.

    `log`: a path, or an open file, for what it prints. `patience`: how many seconds it has to end when it is asked to;
    None: as many as it takes. `otherwise`: said when it fails or is killed and its last line has not said so; a line
    says so with a NOT in it, such as NOT PUSHED.
    """

    def __init__(
        self,
        command: str,
        arguments: list[str],
        log: Path | IO,
        say: Callable[[str], None],
        patience: float | None,
        otherwise: str | None = None,
    ) -> None:
        self.say, self.patience, self.otherwise = say, patience, otherwise
        errors = open(log, "a", encoding="utf-8") if isinstance(log, Path) else log
        # It gets a session of its own, because a Ctrl-C is for the training, which tells it when to end, and because
        # a session can be killed with everything that was started in it.
        # It must not take itself for a rank of the job, which would end with it if it failed.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(OF_A_RANK)}
        with kept_from_children():  # a scheduler's signals reach other sessions, too
            self.process = subprocess.Popen(
                [sys.executable, "-m", "util", command, *arguments], cwd=ROOT, env=environment, text=True, bufsize=1,
                start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        if isinstance(log, Path):
            errors.close()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        line = ""
        for line in self.process.stdout:
            self.say(line.rstrip("\n"))
        if self.process.wait() and self.otherwise and "NOT " not in line:
            self.say(self.otherwise)

    def end(self) -> None:
        """Ask it to end, wait for as long as its patience says, and kill what is still running."""
        with suppress(OSError, ValueError):  # it may be gone already
            self.process.stdin.close()
        try:
            self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            pass
        finally:  # after a Ctrl-C while waiting, too: what it has started must not outlive it
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.listener.join(5)


class Training:
    """The training, as a program that runs beside it sees it: whether it has ended, and a line to its user."""

    def __init__(self) -> None:
        self._told = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to the log, and not to the user
        self.has_ended = False

    def tell(self, text: str) -> None:
        """Say one line to the user of the training."""
        with suppress(OSError):  # nobody listens any more
            self._told.write(" ".join(text.split()) + "\n")

    def wait(self, seconds: float) -> bool:
        """Wait for `seconds`, or until the training is over. Whether it is over."""
        if not self.has_ended:
            # Standard input is a pipe from the training: it is closed when the training ends, also by a kill
            self.has_ended = bool(select.select([0], [], [], seconds)[0])
        return self.has_ended
