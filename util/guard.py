"""What may end a run before its time: a signal, data that cannot be read, steps whose loss or gradient is no number."""

import math
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any, NoReturn

from util import ranks, run_folder, signals
from util.collator import Batch, Collator
from util.command_line import Ended, UserError, known
from util.data.bad_samples import LenientCollator
from util.steps import Step

MOST_IN_A_ROW = 3


class Stopped(Exception):
    """An evaluation was left before its end, because the run is to be saved now."""


def unread_batch() -> Batch:
    """Stands for the batches of a step that could not be read: all ranks learn of it by its counts."""
    batch = LenientCollator(Collator())([])
    return replace(batch, counts={**batch.counts, "unread": 1})


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
        self.before: dict[int, Any] = {}  # how each signal was handled, to be handled so again
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

        before: dict[int, Any] = {}
        self.before = before
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

    def fetch(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The batches of a step. Where one cannot be read, a stand-in, over which `end_if_unread` ends the run."""
        found: list[Batch] = []
        try:
            while len(found) < count and not any(batch.counts["unread"] for batch in found):
                found.append(next(batches))  # which may say that a rank with the same samples could not read it
            return found
        except Exception as error:  # of whatever kind: bad data, a disk, a killed data worker, a bug in it
            self._note_failure(error)
            return [unread_batch()]

    def end_if_unread(self, totals: dict[str, float], step: int, saver, model, optimizer) -> None:
        """Save the run as the step before left it, and end it, where a batch of `step` was not read on any rank."""
        if totals.pop("unread"):
            saver.save_unless_there(model, optimizer, step - 1)
            self.end(step - 1, saver)

    def end_out_of_memory(self, why: str, step: int, saver, model, optimizer) -> NoReturn:
        """Save the run as the step before left it, and end it, where a single sample of `step` is too large."""
        self.failure = why, 1
        saver.save_unless_there(model, optimizer, step - 1)
        self.end(step - 1, saver)

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

    def end(self, step: int, saver) -> NoReturn:
        """End the run after `step`, which is being saved: raises Ended, the same on all ranks."""
        saver.wait()
        self.restore()
        self.run.close()
        steps = [run_folder.step_of(path) for path in run_folder.complete_checkpoints(self.run.directory)]
        is_saved = ranks.gather_on_all(step in steps)[0]
        where = self._where(step, is_saved)
        how = f"go on with: {run_folder.command(self.run.directory)}"
        shares = ranks.gather_on_all((self.name, self.failure))
        failed = {rank: failure for rank, (_, failure) in enumerate(shares) if failure}
        if failed:
            raise Ended(f"{told(failed)}\nstopped {where}; {how}", max(code for _, code in failed.values()))
        name = next(name for name, _ in shares if name)
        raise Ended(f"stopped by {name} {where}; {how}", 3 if is_saved else 1)

    @staticmethod
    def _where(step: int, is_saved: bool) -> str:
        """After which step the run ends, and whether that is saved, in words."""
        moment = f"after step {step}" if step else "before the first step"
        if not is_saved:
            return f"{moment}, which could not be saved"
        return f"{moment}, which is saved" if step else f"{moment}; the start is saved"

    def check_last_evaluation(self) -> None:
        """Raises Ended where the run is complete but for its last evaluation, whose data could not be read."""
        if failed := {rank: failure for rank, failure in enumerate(ranks.gather_on_all(self.failure)) if failure}:
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

    def allows(self, step: Step, loss: float, grad_norm: float, batches: list[Batch]) -> bool:
        """Whether a step may be applied: not where its loss or gradient is no number, nor where it has no sample.

        `loss` and `grad_norm` are the same on all ranks, `batches` each one's own. Raises Ended after three in a row.
        """
        if not step.samples:
            return False
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.left_out += 1
        self.in_a_row += 1
        names: dict[str, None] = {}  # each once: several ranks may have parts of the same sample
        for share in ranks.gather_on_all([batch.where for batch in batches]):
            names |= dict.fromkeys(chain.from_iterable(share))
        what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        self.say(f"step {step.number}: {what}: this update is left out. Its samples: {'; '.join(names)}")
        if self.in_a_row == MOST_IN_A_ROW:
            raise Ended(
                f"{MOST_IN_A_ROW} steps in a row, up to step {step.number}, were no numbers ({what}), so nothing is "
                "learned any more: look at the samples named above, lower --learning_rate, or go on from an earlier "
                "checkpoint",
                1,
            )
        return False
