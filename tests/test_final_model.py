"""The model that a run leaves: the best of its evaluations bit for bit, whatever came in between; and an early end."""

import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import finetune
from tests import runs, warm
from tests.runs import losses, metrics, same_run, weights
from tests.test_signals import start  # noqa: F401  a fixture
from util import checkpoint, log
from util.command_line import Ended, UserError
from util.config import Config
from util.cost import disk
from util.publish import final_model, save_model
from util.results import evaluate
from util.run_folder import final_in_words, read_final

ROOT = Path(__file__).resolve().parent.parent


def write_texts(file: Path, answers: list[str]) -> str:
    lines = []
    for number, answer in enumerate(answers):
        messages = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture
def settings(tiny_path, tmp_path, monkeypatch):
    """A function (name of a run, changes) -> its settings: 8 steps on texts, whose held-out answers are others. What is
    learned first, how answers end, helps there; what is learned later, the answers themselves, does not."""
    monkeypatch.chdir(ROOT)
    data = write_texts(tmp_path / "train.jsonl", [f"red {number} circle" for number in range(8)])
    held_out = write_texts(tmp_path / "held_out.jsonl", ["blue 9 square", "one green cross", "a yellow star"])

    def make(name: str, **changes) -> dict:
        own = {"data": [data], "eval_data": [held_out], "eval_every": 1, "max_steps": 8, "epochs": 99,
               "schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-2}  # fmt: skip
        return runs.settings(tiny_path, tmp_path / name, **{**own, **changes})

    return make


@pytest.fixture
def train(settings):
    """A function that trains with these settings and returns the run directory."""
    return lambda name, **changes: Path(finetune.train(Config(**settings(name, **changes))))


@pytest.fixture
def planned(monkeypatch):
    """A function that lets the evaluations of the runs that follow have these losses, the last one from then on."""

    def plan(*planned_losses: float) -> None:
        coming = list(planned_losses)
        real = evaluate.evaluate_loss

        def instead(*arguments):
            totals = real(*arguments)
            loss = coming.pop(0) if len(coming) > 1 else coming[0]
            return {**totals, "loss_sum": loss * totals["supervised_tokens"]}

        monkeypatch.setattr(evaluate, "evaluate_loss", instead)

    return plan


def best_step(run: Path) -> int:
    """Of the evaluation with the lowest loss, by the log."""
    evaluated = {line["step"]: line["eval_loss"] for line in runs.log(run) if line.get("eval_loss") is not None}
    return min(evaluated, key=evaluated.get)


def same_weights(run: Path, other: Path) -> bool:
    ours, theirs = weights(run), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(BaseException):
    """Stands for kill -9 in the process of the test: nothing of the run handles it."""


def killed_after(monkeypatch, step: int, train, *arguments, **changes) -> None:
    """Train until this step is logged, and no further. A save under way is let through."""
    logged, made = log.Run.log_step, checkpoint.Saver.__init__
    savers = []

    def noted(self, *settings, **others):
        savers.append(self)
        made(self, *settings, **others)

    def then(self, planned, values, work):
        logged(self, planned, values, work)
        if planned.number == step:
            savers[-1].wait()  # its folder tells nothing: the thread that makes it may not have begun
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Saver, "__init__", noted)
        patched.setattr(log.Run, "log_step", then)
        with pytest.raises(Killed):
            train(*arguments, **changes)


# ---- the best -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"dtype": "bfloat16"}, {"lora_rank": 4, "learning_rate": 0.1}])
def test_the_model_is_that_of_the_best_step(kind, train, tiny_path, capsys):
    """Bit for bit what a run of so many steps leaves, which is never evaluated."""
    run = train("run", **kind)
    said = capsys.readouterr().out
    best = best_step(run)
    assert 1 < best < 8, f"the planted data gives no best in the middle: {metrics(run, 'eval_loss')}"
    alone = train("alone", **kind, eval_data=[], max_steps=best)
    assert same_weights(run, alone)
    assert losses(run)[:best] == losses(alone), "keeping the best changed what was trained"
    whole = train("whole", **kind, eval_data=[])
    assert losses(run) == losses(whole), "keeping the best changed what was trained after it"
    assert not same_weights(run, whole)
    assert not (run / "best").exists(), "no second copy is left"
    assert {path.name for path in alone.iterdir()} == {path.name for path in run.iterdir()}
    lowest, last = min(metrics(run, "eval_loss")), metrics(run, "eval_loss")[-1]
    assert f"final model: step {best} of 8, evaluation loss {lowest:.4g} (last: {last:.4g})" in said
    assert "final model  the one with the lowest evaluation loss, of every 1 steps and the last one" in said


def test_final_last_leaves_the_last_and_keeps_no_other(train, monkeypatch, capsys):
    monkeypatch.setattr(save_model, "try_to_save", lambda *arguments: pytest.fail("a best model is written"))
    run = train("run", final="last")
    assert same_weights(run, train("plain", eval_data=[]))
    lowest = min(metrics(run, "eval_loss"))
    assert f"(lowest: {lowest:.4g} at step {best_step(run)}, --final last)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "step", "written"),
    [
        ([4, 3, 2, 1], 4, [1, 2, 3]),  # the last is the best, and is written once
        ([1, 2, 3, 4], 1, [1]),
        ([4, 2, 3, 2], 2, [1, 2]),  # of equal ones the first
        ([float("nan"), 3, float("nan"), 4], 2, [2]),
        ([float("nan")], 4, []),
        ([float("inf"), 5, 6, float("nan")], 2, [2]),
    ],
)
def test_which_is_the_best_and_what_is_written(losses, step, written, planned, train, monkeypatch):
    planned(*losses)
    publish, kept = final_model.FinalModel._publish, []

    def noted(self, unfinished, folder, evaluation):
        kept.append(evaluation["step"])
        return publish(self, unfinished, folder, evaluation)

    monkeypatch.setattr(final_model.FinalModel, "_publish", noted)
    run = train("run", max_steps=4)
    assert kept == written
    assert read_final(run)["step"] == step
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert same_weights(run, train("alone", eval_data=[], max_steps=step))


def test_a_best_model_can_be_tried_while_the_run_trains(train, planned, monkeypatch, tmp_path):
    """Plain transformers opens its folder, and the test scripts find its settings there."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from util.results.answer import find_run

    planned(2, 1, 3)
    killed_after(monkeypatch, 3, train, "run")
    folder = tmp_path / "run" / "best" / "step_000002"
    assert [path.name for path in folder.parent.iterdir()] == ["step_000002"], "the one before is gone"
    AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    assert find_run(str(folder)) == str(folder)
    with pytest.raises(
        UserError, match=r"run: no model in it; .*; the best so far of this run: .*/run/best/step_000002"
    ):
        find_run(str(folder.parent.parent))
    assert (folder / "training_config.json").exists()


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("killed", "save_every", "dtype"),
    [
        (3, 1, "float32"),  # before the best is known
        (6, 1, "float32"),  # in its step, before it is evaluated
        (7, 5, "float32"),  # gone on from a checkpoint older than the best
        (7, 5, "float64"),
        (8, 5, "bfloat16"),  # in the last step
    ],
)
def test_an_interrupted_run_leaves_what_the_straight_one_leaves(killed, save_every, dtype, train, planned, monkeypatch):
    script = [5.0, 4.0, 4.5, 3.0, 3.5, 2.0, 2.5, 2.25]
    planned(*script)
    straight = train("straight", dtype=dtype)
    assert read_final(straight)["step"] == 6
    planned(*script)
    killed_after(monkeypatch, killed, train, "run", dtype=dtype, save_every=save_every)
    found = checkpoint.complete_checkpoints(straight.with_name("run"))
    saved = int(found[-1].name[5:]) if found else 0
    planned(*script[saved:])
    run = train("run", dtype=dtype, save_every=save_every, resume="auto")
    same_run(run, straight)
    assert read_final(run) == read_final(straight)


def test_an_evaluation_that_a_signal_broke_off_is_made_when_the_run_goes_on(train, planned, monkeypatch):
    """Else the best, which is there, would never be known."""
    planned(5.0, 3.0, 4.0, 4.5)
    straight = train("straight", max_steps=4)
    real, calls = evaluate.evaluate_loss, []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    planned(5.0)
    with monkeypatch.context() as patched:
        real = evaluate.evaluate_loss
        patched.setattr(evaluate, "evaluate_loss", signalled)
        with pytest.raises(Ended, match="stopped by SIGTERM after step 2, which is saved"):
            train("run", max_steps=4)
    planned(3.0, 4.0, 4.5)
    run = train("run", max_steps=4, resume="auto")
    same_run(run, straight)
    assert metrics(run, "eval_loss") == [5.0, 3.0, 4.0, 4.5]
    assert read_final(run) == read_final(straight)


def test_the_best_of_a_step_that_is_not_reached_again_does_not_win(train, planned, monkeypatch, tmp_path):
    """Gone on from step 2 with other losses: that of step 3, which the log has dropped, is no result of this run."""
    planned(5.0, 4.0, 1.0)
    killed_after(monkeypatch, 4, train, "run", save_every=2)
    assert (tmp_path / "run" / "best" / "step_000003").exists()
    planned(4.5, 3.5, 3.75)
    run = train("run", save_every=2, resume="auto")
    assert read_final(run)["step"] == 4
    assert best_step(run) == 4
    alone = train("alone", eval_data=[], max_steps=4)
    assert same_weights(run, alone)


def test_losses_on_other_held_out_data_are_not_compared(train, planned, monkeypatch, tmp_path):
    planned(1.0, 2.0)
    killed_after(monkeypatch, 3, train, "run", save_every=2)
    other = write_texts(tmp_path / "other.jsonl", ["violet", "brown"])
    planned(7.0, 6.0, 6.5)
    run = train("run", save_every=2, resume="auto", eval_data=[other])
    assert read_final(run)["step"] == 4
    moved = tmp_path / "moved.jsonl"
    shutil.copyfile(other, moved)
    assert checkpoint.data_mark([str(moved)]) == checkpoint.data_mark([other]), "where it lies says nothing"
    assert checkpoint.data_mark([f"{moved}*2"]) != checkpoint.data_mark([other])


def test_a_finished_run_that_goes_on_keeps_its_best_until_there_is_a_better(train, planned):
    planned(3.0, 1.0, 2.0)
    run = train("run", max_steps=3, save_every=1)
    assert read_final(run)["step"] == 2
    planned(1.5, 1.25)
    assert train("run", max_steps=5, save_every=1, resume="auto", resume_anyway=True) == run
    assert (read_final(run)["step"], read_final(run)["steps"]) == (2, 5)
    assert same_weights(run, train("alone", eval_data=[], max_steps=2))
    planned(0.5, 0.75)
    train("run", max_steps=7, save_every=1, resume="auto", resume_anyway=True)
    assert read_final(run)["step"] == 6
    assert same_weights(run, train("alone 6", eval_data=[], max_steps=6))


def test_killed_while_files_are_moved(train, planned, monkeypatch):
    """At the end, between any two of them: who goes on moves the others."""
    planned(3.0, 1.0, 2.0)
    straight = train("straight", max_steps=3)
    for moved in (1, 4):
        name = f"run {moved}"
        planned(3.0, 1.0, 2.0)
        move, count = Path.replace, []

        def interrupted(self, target, move=move, count=count, most=moved):
            if self.parent.name == "step_000002" and self.parent.parent.name == "best":
                count.append(self.name)
                if len(count) > most:
                    raise Killed
            return move(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", interrupted)
            with pytest.raises(Killed):
                train(name, max_steps=3, save_every=1)
        run = train(name, max_steps=3, save_every=1, resume="auto")
        assert same_weights(run, straight)
        assert {path.name for path in run.iterdir()} == {path.name for path in straight.iterdir()}


@pytest.mark.slow
def test_kill_9_while_the_best_is_written(start, tiny_path, tmp_path):  # noqa: F811  the fixture
    changes = {"max_steps": 3, "epochs": 3, "save_every": 1, "eval_every": 1, "dtype": "float32", "eval_samples": 0}
    signalled = start("best", **changes)
    os.kill(signalled.job.pid, signal.SIGKILL)
    assert signalled.end()[0] == -signal.SIGKILL
    held_out = {"eval_data": str(ROOT / "test_data" / "data.json")}
    config = {**runs.settings(tiny_path, signalled.run, **changes), **held_out, "resume": "auto"}
    done = warm.run([sys.executable, "finetune.py", *runs.flags(config)])
    assert done.returncode == 0, done.stderr
    config |= {"output_dir": str(tmp_path / "straight"), "resume": "none"}
    done = warm.run([sys.executable, "finetune.py", *runs.flags(config)])
    assert done.returncode == 0, done.stderr
    same_run(signalled.run, tmp_path / "straight")
    assert not (signalled.run / "best").exists()


# ---- an early end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "patience", "last", "step"),
    [
        ([3, 2, 2.5, 2.25, 1], 2, 4, 2),
        ([3, 2, 2.5, 1, 2, 3], 2, 6, 4),  # a gain begins anew
        ([3, 3, 3], 2, 3, 1),  # an equal loss is no gain
        ([3, float("nan"), float("nan"), 1], 2, 3, 1),
        ([float("nan")], 3, 3, 3),  # nothing is learned: the last
        ([3, 2, 1], 0, 8, 3),
    ],
)
def test_the_run_ends_after_so_many_evaluations_without_a_gain(losses, patience, last, step, planned, train, capsys):
    planned(*losses)
    run = train("run", stop_after=patience, save_every=3, num_workers=1)
    assert metrics(run, "step")[-1] == last
    assert read_final(run)["step"] == step
    kept = [path.name for path in checkpoint.complete_checkpoints(run)]
    assert kept[-1] == f"step_{last:06d}", "the last step makes a checkpoint, too"
    said = capsys.readouterr().out
    assert f"done: {last} steps" in said
    assert ("ended early by --stop_after" in said) == (last < 8)


def test_a_run_that_ended_early_is_finished(settings, train, planned, capsys, tmp_path):
    """And says so when it is resumed, until it is told to go on."""
    planned(3.0, 2.0, 2.5, 2.75)
    run = train("run", stop_after=2, save_every=3)
    before = (run / "metrics.jsonl").read_text()
    for resume in ("auto", str(run)):
        with pytest.raises(Ended, match="is finished: its model is that of step 2 of 8") as ended:
            train("run", stop_after=2, save_every=3, resume=resume)
        assert ended.value.code == 0
    assert (run / "metrics.jsonl").read_text() == before
    train("run", stop_after=2, save_every=3, resume="auto", final="last")
    assert (metrics(run, "step")[-1], read_final(run)["step"]) == (4, 4), "it is asked for the other model"
    planned(2.25, 1.0, 1.5)
    train("run", stop_after=0, save_every=3, resume="auto")
    assert metrics(run, "step")[-1] == 8
    assert read_final(run)["step"] == 6
    assert pickle.loads(pickle.dumps(Ended("over", 3))).code == 3, "as the first rank sends it to the others"


def test_without_a_checkpoint_a_finished_run_is_not_trained_again(settings, train, planned):
    planned(3.0, 2.0, 2.5, 2.75)
    run = train("run", stop_after=2)
    done = warm.run([sys.executable, "finetune.py", "--resume", str(run)])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "is finished: its model is that of step 2 of 8" in done.stderr
    assert "it has no checkpoint to go on from; another --output_dir begins a new run" in done.stderr
    with pytest.raises(Ended, match="is finished"):
        train("run", resume="auto")


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_best_that_finds_no_room_is_said_and_the_run_goes_on(train, planned, monkeypatch, capsys):
    """The one before stays; a later one that is better than that is kept, though it is not the lowest."""
    planned(5.0, 2.0, 3.0, 4.0)
    write, said = save_model.write_published, []

    def failing(model, weights, processor, directory):
        if directory.name == ".unfinished_step_000002":
            raise OSError(28, os.strerror(28), "model.safetensors")
        return write(model, weights, processor, directory)

    monkeypatch.setattr(save_model, "write_published", failing)
    monkeypatch.setattr(disk, "until_saved", lambda save, say, *rest: said.append(save()))
    run = train("run", max_steps=4)
    printed = capsys.readouterr().out
    assert "NOT KEPT: the best model so far, of step 2 (the disk is full" in printed
    assert "training goes on, that of step 1 is kept" in printed
    assert read_final(run)["step"] == 3
    assert "step 3 of 4, evaluation loss 3 (last: 4; lowest: 2 at step 2, not kept)" in printed
    assert set(said) == {""}
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert same_weights(run, train("alone", eval_data=[], max_steps=3))


def test_a_run_directory_that_is_removed_leaves_the_last_model(train, planned, monkeypatch):
    planned(1.0, 2.0)
    logged = log.Run.log_step

    def then(self, step, values, work):
        logged(self, step, values, work)
        if step.number == 4:
            shutil.rmtree(self.directory)

    monkeypatch.setattr(log.Run, "log_step", then)
    run = train("run", max_steps=4)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert same_weights(run, train("alone", eval_data=[], max_steps=4))


# ---- words ----------------------------------------------------------------------------------------------------------

FINAL = {"final": "best", "step": 120, "eval_loss": 0.812, "steps": 300, "last_step": 300, "last_eval_loss": 0.901,
         "lowest": {"step": 120, "loss": 0.812}, "stop_after": 0}  # fmt: skip


def test_the_model_card_says_of_which_step_it_is(tmp_path):
    from util.publish.hub_files import stage

    run, folder = tmp_path / "run", tmp_path / "staged"
    run.mkdir()
    folder.mkdir()
    (run / "config.json").write_text("{}")
    (run / "training_config.json").write_text(json.dumps({"model": "tiny", "dtype": "float32"}))
    (run / "final_model.json").write_text(json.dumps(FINAL))
    stage(run, run, None, "me/mine", folder)
    card = (folder / "README.md").read_text()
    assert "compute: float32. Its weights are those of step 120 of 300, evaluation loss 0.812 (last: 0.901)." in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "step 120 of 300, evaluation loss 0.812 (last: 0.901)"),
        ({"step": 300, "eval_loss": 0.812}, "step 300 of 300, evaluation loss 0.812"),
        ({"final": "last", "step": 300, "eval_loss": 0.901},
         "step 300 of 300, evaluation loss 0.901 (lowest: 0.812 at step 120, --final last)"),
        ({"step": 300, "eval_loss": None, "last_eval_loss": None, "lowest": None}, "step 300 of 300"),
        ({"last_eval_loss": None}, "step 120 of 300, evaluation loss 0.812 (last: not known)"),
        ({"last_step": 180, "stop_after": 3},
         "step 120 of 300, evaluation loss 0.812 (last: 0.901 at step 180); ended early by --stop_after 3: so many "
         "evaluations in a row without a gain"),
    ],
)  # fmt: skip
def test_the_last_words(changes, words):
    assert final_in_words({**FINAL, **changes}) == words
