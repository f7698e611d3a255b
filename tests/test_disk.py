"""Disks that are full, slow, away or not shared: what was trained is not lost, and what is said is what helps."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import finetune
from tests import runs
from tests.test_distributed import torchrun
from util import checkpoint, log
from util.command_line import UserError
from util.config import Config
from util.cost import disk, memory
from util.model import build_model, load_config, load_processor, load_weights
from util.optimizer import build_optimizer
from util.publish import save_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
MB = 10**6


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 24 MB: `tiny` takes 5, a checkpoint of it 14."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves `leave` bytes free."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, disk.free_bytes(folder) - leave)))
    return ballast


def settings(tiny_path: Path, directory: Path, **changes) -> Config:
    return Config(**runs.settings(tiny_path, directory, **{"max_steps": 2, **changes}))


def when_it_waits(monkeypatch, action) -> list:
    """Do `action` instead of the wait before the next attempt; the list counts the waits."""
    waits = []

    def instead(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 10, "it goes on failing"
        action(len(waits))

    monkeypatch.setattr(disk, "time", SimpleNamespace(sleep=instead))
    return waits


def after_last_step(monkeypatch, last: int, action) -> None:
    logged = log.Run.log_step

    def then(self, step, values, work):
        logged(self, step, values, work)
        if step.number == last:
            action()

    monkeypatch.setattr(log.Run, "log_step", then)


def opens(run: Path, reference: Path) -> None:
    """Plain transformers opens it, and it is what an undisturbed run leaves."""
    load_weights(str(run), torch.float32, CPU)
    ours, theirs = runs.weights(run), runs.weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def undisturbed(tiny_path, tmp_path_factory) -> Path:
    return Path(finetune.train(settings(tiny_path, tmp_path_factory.mktemp("undisturbed") / "run")))


# ---- the final model ------------------------------------------------------------------------------------------------


def test_the_final_model_waits_for_room(small_disk, tiny_path, undisturbed, monkeypatch, capsys):
    after_last_step(monkeypatch, 2, lambda: fill(small_disk, 2 * MB))
    waits = when_it_waits(monkeypatch, lambda number: number < 3 or (small_disk / "ballast").unlink())
    run = Path(finetune.train(settings(tiny_path, small_disk / "run")))
    said = capsys.readouterr().out
    assert len(waits) == 3
    assert said.count("NOT SAVED YET") == 1, "what has not changed is not said again"
    assert "the disk is full: 4.7 MB are to be written" in said
    assert "2.0 MB are free" in said
    opens(run, undisturbed)
    assert not list(run.glob(".*")), "nothing half-written is left"


def test_a_folder_that_was_removed_is_made_again(tiny_path, undisturbed, tmp_path, monkeypatch, capsys):
    after_last_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    run = Path(finetune.train(settings(tiny_path, tmp_path / "run")))
    opens(run, undisturbed)
    assert "loss.png is not drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EDQUOT, "quota"), (errno.EROFS, "Read-only"), (errno.EIO, "Input/output"), (errno.ESTALE, "Stale")],
)
def test_a_quota_a_mount_a_server(number, words, tiny_path, undisturbed, tmp_path, monkeypatch, capsys):
    """What the kernel says of them: the file cannot be opened, until somebody mends it."""
    write, fails = save_model.write_published, [True, True]

    def failing(*arguments):
        if fails:
            raise OSError(number, os.strerror(number), "model.safetensors")
        return write(*arguments)

    monkeypatch.setattr(save_model, "write_published", failing)
    when_it_waits(monkeypatch, lambda _: fails.pop())
    run = Path(finetune.train(settings(tiny_path, tmp_path / "run")))
    assert words in capsys.readouterr().out
    opens(run, undisturbed)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tiny_path):
    """A function (folder, **changes) -> (Saver, model, optimizer, what it said)."""

    def make(folder: Path, **changes):
        config = settings(tiny_path, folder, **changes)
        (folder / "checkpoints").mkdir(parents=True)
        trained = build_model(config, str(tiny_path), load_processor(str(tiny_path)), CPU)
        said = []
        optimizer = build_optimizer(trained, config)
        for parameter in trained.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return checkpoint.Saver(folder, config, 10**7, said.append, {}), trained, optimizer, said

    return make


def test_a_checkpoint_that_does_not_fit_says_how_much_is_missing(small_disk, parts):
    saver, trained, optimizer, said = parts(small_disk / "run")
    fill(small_disk, 6 * MB)
    saver.save(trained, optimizer, {"step": 1})
    saver.wait()
    assert "the disk is full: 14.2 MB are to be written" in said[0]
    assert "6.0 MB are free" in said[0]
    assert not list((small_disk / "run" / "checkpoints").iterdir())


def test_the_last_checkpoint_waits_for_room(small_disk, parts, monkeypatch):
    """As a signal makes it: the run ends with it, so it must be there."""
    saver, trained, optimizer, said = parts(small_disk / "run")
    fill(small_disk, 6 * MB)
    when_it_waits(monkeypatch, lambda _: (small_disk / "ballast").unlink())
    saver.save(trained, optimizer, {"step": 1}, is_last=True)
    assert ["NOT SAVED YET" in said[0], "saved" in said[1]] == [True, True], said
    (found,) = checkpoint.complete_checkpoints(small_disk / "run")
    assert checkpoint.verify(found)["step"] == 1


def test_every_save_succeeds_where_torch_closes_its_stager(parts, tmp_path, monkeypatch):
    """As torch 2.11 does after each save."""
    stage = checkpoint.DefaultStager._stage

    def stage_and_close(self, *arguments, **keywords):
        staged = stage(self, *arguments, **keywords)
        self._state_dict_stager.close()
        return staged

    monkeypatch.setattr(checkpoint.DefaultStager, "_stage", stage_and_close)
    saver, trained, optimizer, said = parts(tmp_path / "run", dtype="bfloat16")
    for step in (1, 2):
        saver.save(trained, optimizer, {"step": step})
        saver.wait()
    assert len(checkpoint.complete_checkpoints(tmp_path / "run")) == 2, said


def test_checkpoints_are_ordered_by_number(parts, tmp_path):
    """As text, step_1000000 stands before step_999900."""
    saver, trained, optimizer, _ = parts(tmp_path / "run", keep=1)
    for step in (999_900, 1_000_000):
        saver.save(trained, optimizer, {"step": step})
        saver.wait()
    (tmp_path / "run" / "checkpoints" / "step_1000000_copy").mkdir()
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path / "run")] == ["step_1000000"]


@pytest.mark.parametrize("losses", [[float("nan"), 3.0, 2.0, 4.0, 5.0], [2.0, float("nan"), 3.0, 4.0, 5.0]])
def test_a_loss_that_is_no_number_is_not_the_best(losses, parts, tmp_path):
    saver, trained, optimizer, _ = parts(tmp_path / "run", keep=1)
    for step, loss in enumerate(losses, 1):
        saver.save(trained, optimizer, {"step": step, "eval_loss": loss})
        saver.wait()
    best = losses.index(2.0) + 1
    found = [path.name for path in checkpoint.complete_checkpoints(tmp_path / "run")]
    assert found == [f"step_{best:06d}", "step_000005"]


def test_what_another_machine_has_written_elsewhere_is_missed(parts, tmp_path, monkeypatch):
    """rank 0's disk looks complete to rank 0; the index names a file that never came."""
    saver, trained, optimizer, said = parts(tmp_path / "run")
    publish = checkpoint.Saver._publish

    def without_a_file(self, unfinished, *rest):
        next(unfinished.glob("*.distcp")).unlink()
        publish(self, unfinished, *rest)

    monkeypatch.setattr(checkpoint.Saver, "_publish", without_a_file)
    saver.save(trained, optimizer, {"step": 1})
    saver.wait()
    assert "NOT SAVED" in said[0]
    assert ".distcp, which another rank has written, is not in this folder" in said[0]
    assert not checkpoint.complete_checkpoints(tmp_path / "run")


def test_a_folder_that_machines_do_not_share_is_refused(tiny_path, tmp_path):
    """Two ranks, the second with a folder of its own under the same flag."""
    own = runs.settings(tiny_path, tmp_path / "run", max_steps=1)
    torchrun(2, [own], tmp_path, "tests/unshared_runs.py")
    for rank in (0, 1):
        refused = (tmp_path / f"refused_{rank}").read_text()
        assert "is not seen on" in refused
        assert "a folder that all machines share" in refused


# ---- before the first step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"freeze": ["vision"]}, {"lora_rank": 8, "lora_vision": True}, {"dtype": "float64"}],
)
def test_what_is_forecast_is_what_is_written(changes, tiny_path, tmp_path):
    """But for what each tensor's name and header take: less than 2 kB in a checkpoint."""
    config = settings(tiny_path, tmp_path / "run", save_every=2, **changes)
    model_config = load_config(str(tiny_path))
    counts = memory.count_parameters(model_config, config)
    dtype = getattr(torch, config.dtype)
    finetune.train(config)
    written = {path.name: path.stat().st_size for path in (tmp_path / "run").glob("*.safetensors")}
    assert disk.model_bytes(counts, config, dtype) == pytest.approx(sum(written.values()), rel=0.03)
    held = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "step_000002").glob("*.distcp"))
    tensors = len(checkpoint.TensorReader(tmp_path / "run/checkpoints/step_000002").read_metadata().state_dict_metadata)
    assert 0 <= held - disk.checkpoint_bytes(counts, config, dtype) < 2000 * tensors


@pytest.mark.parametrize(("free", "save_every", "refused"), [(3, 0, True), (9, 0, False), (9, 1, True), (22, 1, False)])
def test_room_is_looked_at_before_the_first_step(free, save_every, refused, small_disk, tiny_path, capsys):
    fill(small_disk, free * MB)
    config = settings(tiny_path, small_disk / "run", save_every=save_every)
    if refused:
        with pytest.raises(UserError, match=r"will not fit, .* MB are free.*--no-check_disk"):
            finetune.train(config)
        assert not (small_disk / "run").exists()
        return
    finetune.train(config)
    said = capsys.readouterr().out
    assert ("TOO LITTLE" in said) == bool(save_every), "three checkpoints would take 43 MB"


def test_the_plan_says_what_will_be_written(tiny_path, tmp_path, capsys):
    finetune.train(settings(tiny_path, tmp_path / "run", save_every="1min", keep=2))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("disk "))
    assert "model 4.7 MB, and up to 3 checkpoints of 14.2 MB" in line
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["check_disk"] is True


def test_room_for_the_best_model_is_forecast(small_disk, tiny_path, capsys):
    """Two models of 4.7 MB: the best so far lies there while the next is written."""
    held_out = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 1}
    fill(small_disk, 7 * MB)
    with pytest.raises(
        UserError, match=r"the model and the best so far \(9.5 MB; --final last keeps none\) will not fit"
    ):
        finetune.train(settings(tiny_path, small_disk / "run", **held_out))
    finetune.train(settings(tiny_path, small_disk / "run", **held_out, final="last"))
    assert "model 4.7 MB" in capsys.readouterr().out
