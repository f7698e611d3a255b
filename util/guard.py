"""What may end a run before its time: a signal, data that cannot be read, steps whose loss or gradient is no number."""

import math
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from util import run_folder, signals
from util.collator import Batch, Collator
from util.command_line import Ended, UserError, known
from util.parallel import ranks

MOST_IN_A_ROW = 3


class Stopped(Exception):
    """An evaluation was left before its end, because the run is to be saved now."""


class Unread:
    """Stands for the batches of a step that could not be read."""

    def __init__(self) -> None:
        self.counts = {**Collator()([]).counts, "unread": 1}


class StopSignal:
    """Remembers what asked for an end, so that the run is saved: SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, or data that
    cannot be read.

    A step is finished, an evaluation is left. A second SIGINT ends at once. On several ranks all stop after the same
    step, whichever of them heard of it. Made just before the first file of a run is written: until then a signal ends
    the process at once (`signals.end_at_once`).
    """

    def __init__(self, run) -> None:
        self.run, self.name, self.interrupts = run, "", 0
        self.failure: tuple[str, int] | None = None  # what could not be read, and the exit code for it
        self.before: dict = {}
        run_folder.opened = run.directory
        if signals.is_main_thread():
            self._listen()
        self._end_with_ranks_that_ended()
        signals.moment = "for the second time; what was not saved is lost"

    def _listen(self) -> None:
        note = weakref.WeakMethod(self._note)

        def heard(number: int, frame: object) -> None:
            if listener := note():
                listener(number)
            else:  # the training has ended by an exception: signals do again what they did before
                signal.signal(number, before[number])
                signal.raise_signal(number)

        self.before = before = {}
        for number in signals.SIGNALS:
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, heard)

    def _end_with_ranks_that_ended(self) -> None:
        """A signal to a job may find one rank here, which notes it, and another still starting, which ends at once."""
        try:
            ended = ranks.any_of(self.requested)
        except RuntimeError:  # the connection to that rank broke
            time.sleep(0.5)  # a signal that came meanwhile is noted now
            if not self.name:
                raise
            ended = True
        if ended:
            signals.end_at_once(signal.Signals[self.name or "SIGTERM"], None)

    @property
    def requested(self) -> int:
        """1 or 0, so that ranks can add it up."""
        return int(bool(self.name or self.failure))

    def _note(self, number: int) -> None:
        name = signal.Signals(number).name
        self.interrupts += name == "SIGINT"
        # Under the launcher one Ctrl-C may come twice, from the scheduler and handed on; it ends the ranks itself.
        if name == "SIGINT" and self.interrupts == 2 and not signals.launch_folder():
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        if not self.name:
            self.name = name  # before saying so, which takes time
            again = " (again to stop at once)" if name == "SIGINT" else ""
            with suppress(RuntimeError):  # it came in the midst of another print
                self.run.say(f"{name}: finishing this step, then saving{again}")

    # ---- data ----

    def fetch(self, batches: Iterator[Batch], count: int) -> list[Batch] | list[Unread]:
        """The batches of a step. Where one cannot be read: `Unread`, by whose counts all ranks learn of it."""
        try:
            return [next(batches) for _ in range(count)]
        except Exception as error:  # of whatever kind: bad data, a disk, a killed data worker, a bug in it
            self._note_failure(error)
            return [Unread()]

    def watch(self, batches: Iterable) -> Iterator:
        """The batches of an evaluation that this rank makes alone. Raises Stopped on a signal, or over unread data."""
        batches = iter(batches)
        while True:
            batch = self._next(batches)
            if self.requested:
                raise Stopped
            if batch is None:
                return
            yield batch

    def watch_together(self, batches: Iterable) -> Iterator:
        """The same for one in which all ranks take every step together: Stopped on all where it is so on any."""
        batches = iter(batches)
        while True:
            batch = self._next(batches)
            if ranks.any_of(self.requested):
                raise Stopped
            if batch is None:
                return
            yield batch

    def _next(self, batches: Iterator):
        try:
            return next(batches, None)
        except Exception as error:
            self._note_failure(error)

    def unless_stopped(self, evaluate: Callable, *arguments):
        """What `evaluate` returns; None where it was left before its end."""
        try:
            return evaluate(*arguments)
        except Stopped:
            return None
        except (UserError, OSError) as error:  # held-out data that this process reads itself
            self._note_failure(error)
            return None

    def _note_failure(self, error: Exception) -> None:
        self.failure = known(error) or ("".join(traceback.format_exception(error)), 1)

    # ---- the end ----

    def restore(self) -> None:
        """All is saved: signals do again what they did before."""
        signals.moment = "when all was saved"
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def end(self, step: int, saver) -> Ended:
        """What to raise where the run ends after `step`, which is being saved; all ranks raise the same."""
        saver.wait()
        self.restore()
        self.run.close()
        saved = ranks.gather(step in map(run_folder.step_of, run_folder.complete_checkpoints(self.run.directory)))[0]
        where = f"after step {step}" if step else "before the first step"
        state = f"{where}, which is saved" if step else f"{where}; the start is saved"
        if not saved:
            state = f"{where}, which could not be saved"
        how = f"go on with: {run_folder.command(self.run.directory)}"
        shares = ranks.gather((self.name, self.failure))
        failed = {rank: failure for rank, (_, failure) in enumerate(shares) if failure}
        if not failed:
            name = next(name for name, _ in shares if name)
            return Ended(f"stopped by {name} {state}; {how}", 3 if saved else 1)
        return Ended(f"{told(failed)}\nstopped {state}; {how}", max(code for _, code in failed.values()))

    def check_last_evaluation(self) -> None:
        """Raises Ended where the run is complete but for its last evaluation, whose data could not be read."""
        if failed := {rank: failure for rank, failure in enumerate(ranks.gather(self.failure)) if failure}:
            code = max(code for _, code in failed.values())
            raise Ended(f"{told(failed)}\nthe model is saved, but not evaluated after its last step", code)


def told(failed: dict[int, tuple[str, int]]) -> str:
    """What could not be read, and what helps. `failed`: (text, exit code) by rank."""
    rank, (text, code) = next(iter(failed.items()))
    text = f"rank {rank}: {text}" if ranks.are_several() else text
    helps = "\nmend that, or leave such samples out with --on_bad_sample skip" if code == 2 else ""
    return text.rstrip() + helps


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
