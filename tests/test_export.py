"""A checkpoint as a model in the published format: the same files as the run's own final model."""

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from tests import runs, warm
from util.command_line import UserError
from util.config import Config
from util.publish.export import export

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory) -> Path:
    """4 steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return Path(finetune.train(Config(**runs.settings(tiny_path, folder, max_steps=4, save_every=2, epochs=1))))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:06d}"


def test_the_last_checkpoint_is_the_final_model_file_by_file(run, tmp_path):
    export(step(run, 4), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in run.iterdir()} - {
        "checkpoints",
        "metrics.jsonl",
        "samples.jsonl",
        "loss.png",
        "final_model.json",
    }
    for name in files:
        assert filecmp.cmp(run / name, tmp_path / "out" / name, shallow=False), name


def test_an_earlier_checkpoint_is_the_model_of_a_run_that_ended_there(run, tiny_path, tmp_path):
    """The learning rate is the same at every step, so that the length of the run changes nothing."""
    same = {"schedule": "constant", "warmup_ratio": 0, "epochs": 1, "save_every": 2}
    long, short = (
        Path(finetune.train(Config(**runs.settings(tiny_path, tmp_path / f"{steps}", max_steps=steps, **same))))
        for steps in (4, 2)
    )
    export(step(long, 2), tmp_path / "out")
    ours, theirs, later = (load_file(path / "model.safetensors") for path in (tmp_path / "out", short, long))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], later[name]) for name in theirs), "the checkpoint is not the final model"


def test_a_run_in_bfloat16_is_exported_in_bfloat16(tiny_path, tmp_path):
    settings = runs.settings(tiny_path, tmp_path / "run", max_steps=1, save_every=1, epochs=1, dtype="bfloat16")
    run = Path(finetune.train(Config(**settings)))
    export(step(run, 1), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(run / name, tmp_path / "out" / name, shallow=False), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config["dtype"], config["torch_dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}


def test_weights_that_are_read_in_several_parts_are_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr("util.checkpoint.MOST_BYTES", 100_000)
    export(step(run, 4), tmp_path / "out")
    assert filecmp.cmp(run / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_the_command_and_plain_transformers(run, tmp_path):
    """The model is opened in a process that cannot import this project."""
    command = [sys.executable, "-m", "util", "export", str(step(run, 4)), str(tmp_path / "out")]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    again = warm.run(command)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].endswith("out: exists already; name a folder that does not")
    program = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model, report = AutoModelForImageTextToText.from_pretrained("out", dtype="auto", output_loading_info=True)
assert not any(report.values()), report
processor = AutoProcessor.from_pretrained("out")
chat = processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
                                     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
print(model.generate(**chat, max_new_tokens=4, do_sample=False).shape[1] - chat["input_ids"].shape[1])
print(processor.image_processor.size["longest_edge"])
assert not [name for name in sys.modules if name.split(".")[0] == "util"]
"""
    opened = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert opened.returncode == 0, opened.stderr[-3000:]
    new_tokens, longest_edge = opened.stdout.split()
    assert 1 <= int(new_tokens) <= 4
    assert int(longest_edge) == 28 * 28 * 16, "the pixel budget of training"


def damaged(run: Path, folder: Path) -> Path:
    """A copy of a run whose checkpoint has one bit flipped."""
    shutil.copytree(run, folder)
    victim = next(step(folder, 4).glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return step(folder, 4)


def test_what_is_no_checkpoint_or_a_damaged_one_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"no_such: no checkpoint there"):
        export(tmp_path / "no_such", tmp_path / "out")
    with pytest.raises(UserError, match=r"step_000004: damaged \(.*distcp is damaged\)"):
        export(damaged(run, tmp_path / "damaged"), tmp_path / "out")
    shutil.copytree(step(run, 4), tmp_path / "alone" / "checkpoints" / "step_000004")
    with pytest.raises(UserError, match=r"alone/training_config.json is not there"):
        export(tmp_path / "alone" / "checkpoints" / "step_000004", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_named(run, tiny_path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_path, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (other / "config.json").write_text(json.dumps(config))
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "training_config.json").read_text())
    (tmp_path / "run" / "training_config.json").write_text(json.dumps({**settings, "model": str(other)}))
    with pytest.raises(UserError, match=r"not the weights of .*other.*mlp\.down_proj\.weight"):
        export(step(tmp_path / "run", 4), tmp_path / "out")


def test_the_test_scripts_answer_with_a_checkpoint(run, tmp_path):
    """As they do with the run's final model, which is the same; nothing is left in the run directory."""
    before = sorted(path.name for path in run.iterdir())
    data = tmp_path / "data.json"
    question = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "It is red."}]
    data.write_text(json.dumps([{"messages": question}]))
    answers = {}
    for name, path in (("run", run), ("checkpoint", step(run, 4))):
        command = [sys.executable, "test_on_trained_model.py", str(path), "--device", "cpu", "--data", str(data),
                   "--max_new_tokens", "8", "--output_dir", str(tmp_path / name)]  # fmt: skip
        done = warm.run(command)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / name / "after.jsonl").read_text().splitlines()]
        answers[name] = lines[1:]
        assert lines[0]["made_from"]["budget"]["max_pixels"] == 28 * 28 * 16
    assert answers["run"] == answers["checkpoint"]
    assert sorted(path.name for path in run.iterdir()) == before
