"""Which model a run leaves: the one with the lowest evaluation loss, or that of the last step (`--final`).

While the run trains, the best model so far lies in RUN/best/step_000120 in the published format, complete or absent. At
the end it is moved into the run directory, where final_model.json says of which step it is.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from util import ranks
from util.checkpoint import data_mark, discard, read_state, write_flushed
from util.config import Config
from util.cost import disk
from util.publish import save_model
from util.run_folder import BEST, FINAL, SETTINGS, final_in_words, read_final, relative
from util.steps import Step

EVALUATION = "evaluation.json"  # in the folder of a best model: the step and the loss of its evaluation


@dataclass
class Kept:
    """A model that lies on the disk, with what is known of its evaluation."""

    folder: Path
    step: int
    loss: float


class FinalModel:
    """Keeps a run's best model beside the training, knows when evaluations gain nothing any more, and in the end makes
    one model that of the run directory.

    All ranks call all of these; the first one decides and writes. The best model of the run is one of its own
    evaluations: what a resumed run finds of a step that it has not reached, or of other held-out data, does not count.
    """

    def __init__(self, run, config: Config, resumed: Path | None, model, processor, budget, steps: int) -> None:
        """`run`: a Run or SilentRun, which is open; `steps`: how many there are in all."""
        self.run, self.config, self.steps = run, config, steps
        self.model, self.processor, self.budget = model, processor, budget
        # Checkpoints hold them, in their order: {"step", "loss" (None where it is no number), "data" (a mark of it)}
        self.evaluations: list[dict]
        self.best: Kept | None
        known: Any = self._look(resumed) if ranks.is_first() else None
        self.evaluations, self.data, self.best = ranks.from_first(known)

    def _look(self, resumed: Path | None) -> tuple[list[dict], str, Kept | None]:
        """The evaluations up to the checkpoint gone on from, the mark of the held-out data, and the best model kept."""
        data = data_mark(self.config.eval_data)
        state = read_state(resumed) if resumed else {"evaluations": []}
        evaluations = state.get("evaluations", [])
        if "evaluations" not in state and state.get("eval_loss") is not None:  # by a version that kept this one alone
            evaluations = [{"step": state["step"], "loss": state["eval_loss"], "data": data}]
        folder = self.run.directory / BEST
        for leftover in folder.glob(".*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        kept = [*map(kept_in, folder.glob("step_*")), final_in(self.run.directory)]
        losses = {evaluation["step"]: evaluation["loss"] for evaluation in evaluations if evaluation["data"] == data}
        own = [model for model in kept if model and losses.get(model.step) == model.loss]
        return evaluations, data, min(own, key=lambda model: model.loss, default=None)

    # ---- while it trains ----

    def lacks_evaluation(self, first: int) -> bool:
        """Whether the step that is gone on from was to be evaluated and was not, as the run was stopped there.

        Else a run that was stopped could leave another model than one that was not.
        """
        is_due = first == self.steps or (self.config.eval_every > 0 and first % self.config.eval_every == 0)
        return first > 0 and is_due and all(evaluation["step"] != first for evaluation in self.evaluations)

    def note(self, step: int, loss: float | None, is_last: bool) -> None:
        """An evaluation was made; the model is kept where its loss is the lowest. None: it was left before its end."""
        if loss is None:
            return
        known = loss if math.isfinite(loss) else None
        self.evaluations.append({"step": step, "loss": known, "data": self.data})
        is_better = known is not None and (self.best is None or known < self.best.loss)
        # The model of the last step is written once, into the run directory.
        if ranks.from_first(is_better and self.config.leaves == "best" and not is_last and not self.is_settled):
            self._keep(step, loss)

    @property
    def is_settled(self) -> bool:
        """Whether the last `--stop_after` evaluations gained nothing; a loss that is no number is no gain."""
        own = self._own_evaluations()
        lowest = lowest_of(own)
        without_gain = len(own) - (own.index(lowest) + 1 if lowest else 0)
        return 0 < self.config.stop_after <= without_gain

    def until_settled(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The steps, to their end or until `--stop_after` ends them."""
        return takewhile(lambda step: not self.is_settled, steps)

    def _own_evaluations(self) -> list[dict]:
        """Those on the held-out data of now: other losses cannot be compared with theirs."""
        return [evaluation for evaluation in self.evaluations if evaluation["data"] == self.data]

    def _keep(self, step: int, loss: float) -> None:
        """Write the model of this step beside the training, and remove the one that was kept before."""
        folder = self.run.directory / BEST / f"step_{step:06d}"
        unfinished = folder.with_name(f".unfinished_{folder.name}")
        problem = save_model.try_to_save(self.model, self.processor, self.budget, unfinished)
        if not problem and ranks.is_first():
            problem = self._publish(unfinished, folder, {"step": step, "loss": loss})
        if problem := ranks.from_first(problem):
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = f"that of step {self.best.step} is" if self.best else "none is"
            self.run.say(f"NOT KEPT: the best model so far, of step {step} ({problem}); training goes on, {kept} kept")
        else:
            self.best = Kept(folder, step, loss)
            self.run.say(f"step {step}: the lowest loss so far; the model is kept in {relative(folder)}")

    def _publish(self, unfinished: Path, folder: Path, evaluation: dict) -> str:
        """Give the folder its name, in which it is complete; "" or why that failed. The first rank alone calls it."""
        try:
            shutil.copyfile(self.run.directory / SETTINGS, unfinished / SETTINGS)  # the test scripts go by them
            write_flushed(unfinished / EVALUATION, json.dumps(evaluation) + "\n")
            if folder.exists():
                discard(folder)
            os.rename(unfinished, folder)
            for other in folder.parent.glob("step_*"):
                if other != folder:
                    discard(other)
        except OSError as error:
            return disk.failure(error, folder.parent, 0)
        return ""

    # ---- at the end ----

    def write(self, step: int) -> str:
        """Make the best model, or that of now, after the last `step`, the model of the run directory; which, in words.

        Where that fails, it is tried again as long as the process lives.
        """
        last = self.evaluations[-1] if self.evaluations and self.evaluations[-1]["step"] == step else None
        last_loss = last["loss"] if last else None
        best = self._best_at_the_end(last_loss)
        if ranks.is_first():
            with suppress(OSError):  # while files are moved there it describes none; what follows waits for the disk
                (self.run.directory / FINAL).unlink(missing_ok=True)
        if best is None:
            save_model.save_model(self.model, self.processor, self.budget, self.run.directory, self.run.say)
        elif best.folder != self.run.directory:
            disk.until_saved(lambda: self._move(best.folder), self.run.say)
        record = {
            "final": self.config.leaves,
            "step": best.step if best else step,
            "eval_loss": best.loss if best else last_loss,
            "steps": self.steps,
            "last_step": step,
            "last_eval_loss": last_loss,
            "lowest": lowest_of(self._own_evaluations()),
            "stop_after": self.config.stop_after if self.is_settled else 0,
        }
        disk.until_saved(lambda: self._finish(record), self.run.say)
        return final_in_words(record)

    def _best_at_the_end(self, last_loss: float | None) -> Kept | None:
        """The kept model that becomes the final one; None: that of now does."""
        best = self.best if self.config.leaves == "best" else None
        if best and last_loss is not None and last_loss < best.loss:
            best = None
        if best and not best.folder.exists():  # somebody has removed it
            best = None
        return ranks.from_first(best)

    def _move(self, folder: Path) -> str:
        """Move the files of the best model into the run directory; "" or why that failed.

        A process that is killed meanwhile leaves each file in one of the two, and who goes on moves the others.
        """
        if ranks.is_first():
            try:
                save_model.move_files(folder, self.run.directory, but=(SETTINGS, EVALUATION))
            except OSError as error:
                return disk.failure(error, self.run.directory, 0)
        return ""

    def _finish(self, record: dict) -> str:
        """Say in a file which model it is, and remove what was kept beside it; "" or why that failed."""
        if ranks.is_first():
            try:
                write_flushed(self.run.directory / FINAL, json.dumps(record, indent=2) + "\n")
            except OSError as error:
                return disk.failure(error, self.run.directory, 0)
            shutil.rmtree(self.run.directory / BEST, ignore_errors=True)
        return ""


def kept_in(folder: Path) -> Kept | None:
    """The model in a folder of RUN/best; None where its file of the evaluation cannot be read."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        return Kept(folder, evaluation["step"], evaluation["loss"])
    return None


def final_in(run: Path) -> Kept | None:
    """The model that a finished run left in its directory, with its evaluation; None where there is none."""
    final = read_final(run)
    if not final or final["eval_loss"] is None or not any(run.glob("*.safetensors")):
        return None
    return Kept(run, final["step"], final["eval_loss"])


def lowest_of(evaluations: list[dict]) -> dict | None:
    """The first evaluation with the lowest loss; None where no loss is a number."""
    finite = [evaluation for evaluation in evaluations if evaluation["loss"] is not None]
    return min(finite, key=lambda evaluation: evaluation["loss"], default=None)
