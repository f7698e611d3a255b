"""What may end a run before its time: a signal, and steps whose loss or gradient is no number."""

import math
import signal
import threading
import weakref
from collections.abc import Callable

from util import ranks
from util.command_line import Ended

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: the notice of preemption that schedulers send
MOST_IN_A_ROW = 3


class StopSignal:
    """Remembers that SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 asked for an end, so that the step can be finished and saved.

    A second SIGINT ends at once. Data workers, forked later, inherit this and go on serving.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.name = say, ""
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other one listen
            note = weakref.WeakMethod(self._note)
            self.before = {number: signal.signal(number, lambda *heard: note()(*heard)) for number in SIGNALS}
            weakref.finalize(self, restore, self.before)  # also where the training ends by an exception

    @property
    def requested(self) -> int:
        """1 or 0, so that ranks can add it up."""
        return int(bool(self.name))

    def _note(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if name == self.name == "SIGINT":
            raise KeyboardInterrupt
        if not self.name:
            self.name = name  # before saying so, which takes time
            self.say(f"{name}: finishing this step, then saving" + " (again to stop at once)" * (name == "SIGINT"))

    def restore(self) -> None:
        """Signals do again what they did before."""
        restore(self.before)

    def end(self, step: int, run) -> Ended:
        """What to raise when all is saved."""
        self.restore()
        run.close()
        name = self.name or "a signal to another process"
        return Ended(f"stopped by {name} after step {step}, which is saved; go on with --resume {run.directory}", 3)


def restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
    handlers.clear()


class FiniteGuard:
    """Leaves out updates that are no numbers, names their samples, and ends the run when three follow each other."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.left_out, self.in_a_row = say, 0, 0

    def allows(self, step: int, loss: float, grad_norm: float, samples: list[str]) -> bool:
        """Whether a step may be applied. `loss` and `grad_norm` are the same on all ranks, `samples` each one's own."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.left_out += 1
        self.in_a_row += 1
        samples = [name for share in ranks.gather(samples) for name in share]
        what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        self.say(f"step {step}: {what}: this update is left out. Its samples: {'; '.join(samples)}")
        if self.in_a_row == MOST_IN_A_ROW:
            raise Ended(
                f"{MOST_IN_A_ROW} steps in a row, up to step {step}, were no numbers ({what}), so nothing is learned "
                "any more: look at the samples named above, lower --learning_rate, or go on from an earlier checkpoint",
                1,
            )
        return False
