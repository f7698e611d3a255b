"""Data that cannot be read in the middle of a run: all until there is saved, and the run goes on from it."""

import errno
import gc
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

import finetune
from tests import runs
from tests.runs import losses, same_run
from util import checkpoint, dataset
from util.command_line import Ended
from util.config import Config
from util.data.lines import DataError
from util.dataset import Examples
from util.loss import PackedLoss
from util.results import evaluate

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = str(ROOT / "test_data" / "data.json")
MISTAKE = "\nmend that, or leave such samples out with --on_bad_sample skip"


def settings(tiny_path: Path, directory: Path, **changes) -> dict:
    return runs.settings(tiny_path, directory, **{"max_steps": 4, "keep": 99, **changes})


@pytest.fixture
def break_sample(monkeypatch):
    """A function (index, file, error): from now on that sample cannot be read."""
    read = dataset.Samples.__getitem__

    def break_it(index: int, file: str, error: Exception) -> None:
        def broken(samples, asked: int):
            if asked == index and file in samples.examples.files[0]:
                raise error
            return read(samples, asked)

        monkeypatch.setattr(dataset.Samples, "__getitem__", broken)

    return break_it


def sample_of_step(step: int, processor) -> int:
    """A sample that is read for that step of the first epoch and for none before it."""
    return Examples(["train_data/data.json"], processor).order(0, 0)[(step - 1) * 8 + 3]


@pytest.mark.parametrize(("workers", "save_every"), [(0, 0), (1, 1)])
def test_it_is_saved_and_goes_on_without_the_bad_sample(
    workers, save_every, break_sample, processor, tiny_path, tmp_path, capsys
):
    bad = sample_of_step(3, processor)
    break_sample(bad, "train_data", DataError(f"sample {bad}: its tail is missing", "not readable"))
    config = settings(tiny_path, tmp_path / "run", num_workers=workers, save_every=save_every)
    with pytest.raises(Ended) as ended:
        finetune.train(Config(**config))
    assert ended.value.code == 2
    said = str(ended.value).splitlines()
    assert said[0] == f"sample {bad}: its tail is missing"
    assert said[1:-1] == [MISTAKE.strip()]
    assert re.fullmatch(r"stopped after step 2, which is saved; go on with: .* --resume .*/run", said[-1])
    newest = checkpoint.complete_checkpoints(tmp_path / "run")[-1]
    assert checkpoint.verify(newest)["step"] == 2 == len(losses(tmp_path / "run"))
    assert "Exception ignored" not in capsys.readouterr().err
    finetune.train(Config(**{**config, "resume": "auto", "on_bad_sample": "skip"}))
    whole = finetune.train(Config(**{**config, "output_dir": str(tmp_path / "whole"), "on_bad_sample": "skip"}))
    same_run(tmp_path / "run", Path(whole))


def test_signals_do_again_what_they_did_before(tiny_path, tmp_path, monkeypatch):
    """Also where the training ended by an exception that knows nothing of them."""
    heard = []

    def listen(number: int, frame: object) -> None:
        heard.append(number)

    monkeypatch.setattr(PackedLoss, "forward", lambda *_: heard.clear() or 1 / 0)
    before = signal.signal(signal.SIGUSR1, listen)
    try:
        with suppress(ZeroDivisionError):
            finetune.train(Config(**settings(tiny_path, tmp_path / "run")))
        gc.collect()
        signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is listen
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_disk_that_fails_in_the_first_step_leaves_a_run_that_can_go_on(tiny_path, tmp_path, monkeypatch):
    """The first micro-batch is made before anything is written, the second is not."""
    config = settings(tiny_path, tmp_path / "run", micro_batch_size=1, max_steps=2)
    whole = finetune.train(Config(**{**config, "output_dir": str(tmp_path / "whole")}))
    failed = OSError(errno.EIO, "Input/output error", "photo.jpg")
    read, calls = dataset.Samples.__getitem__, []

    def broken(samples, index: int):
        calls.append(index)
        if len(calls) == 4:
            raise failed
        return read(samples, index)

    monkeypatch.setattr(dataset.Samples, "__getitem__", broken)
    with pytest.raises(Ended, match="stopped before the first step; the start is saved") as ended:
        finetune.train(Config(**config))
    assert ended.value.code == 1
    assert "Traceback" in str(ended.value), "no mistake of the user: where it came from is told"
    monkeypatch.undo()
    finetune.train(Config(**{**config, "resume": "auto"}))
    same_run(tmp_path / "run", Path(whole))


@pytest.mark.parametrize("by", ["loss", "answers"])
def test_held_out_data_that_cannot_be_read_lose_no_step(by, break_sample, tiny_path, tmp_path, monkeypatch):
    """In the middle the run stops, saved; at its end the model is saved all the same."""
    if by == "loss":
        break_sample(2, "test_data", DataError("a held-out sample is gone"))
    else:
        monkeypatch.setattr(evaluate.QuestionSamples, "__getitem__", gone)
    config = settings(tiny_path, tmp_path / "run", eval_data=[HELD_OUT], eval_every=2, eval_samples=8)
    with pytest.raises(Ended, match=r"gone\nmend that.*\nstopped after step 2, which is saved") as ended:
        finetune.train(Config(**config))
    assert ended.value.code == 2
    assert not runs.metrics(tmp_path / "run", "eval_loss")
    with pytest.raises(Ended, match=r"gone\nmend that.*\nstopped after step 2, which is saved"):
        finetune.train(Config(**{**config, "resume": "auto"}))  # the evaluation that is missing comes first
    with pytest.raises(Ended, match="the model is saved, but not evaluated after its last step") as ended:
        finetune.train(Config(**{**config, "resume": "auto", "eval_every": 0}))
    assert ended.value.code == 2
    assert (tmp_path / "run" / "model.safetensors").exists()


def gone(samples, index: int):
    raise DataError("a question's picture is gone")
