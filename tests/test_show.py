"""`python -m util show --run RUN --step N`: the samples of a step, and what each gave to its loss and gradient."""

import json
import re
from itertools import chain

import pytest
from PIL import Image

import finetune
from tests.samples import assistant, entry, user
from util.__main__ import main as command
from util.config import Config
from util.run_folder import read_metrics


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    """Two epochs of 31 samples, 4 steps each, in float32, a checkpoint after every second step."""
    folder = tmp_path_factory.mktemp("shown") / "run"
    config = Config(model=str(tiny_path), device="cpu", dtype="float32", epochs=2, save_every=2, keep=10, num_workers=0,
                    output_dir=str(folder), learning_rate=1e-3)  # fmt: skip
    finetune.train(config)
    return folder


def samples_of(run) -> list[list[int]]:
    """The samples of each step, by their numbers."""
    return [json.loads(line)["samples"] for line in (run / "samples.jsonl").read_text().splitlines()]


def shown(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, what is printed, and what is said on the error stream."""
    code = 0
    try:
        command(["show", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_run_keeps_the_samples_of_every_step(run):
    """Each epoch has every sample once, in another order. Beside them stands the commit."""
    steps = samples_of(run)
    assert [len(samples) for samples in steps] == [8, 8, 8, 7] * 2
    first, second = list(chain(*steps[:4])), list(chain(*steps[4:]))
    assert sorted(first) == sorted(second) == list(range(31))
    assert first != second
    settings = json.loads((run / "training_config.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(, and changes)?|not a git checkout|not known: .*", settings["commit"])


@pytest.mark.parametrize("number", [1, 7])
def test_a_step_is_taken_apart(number, run, capsys):
    """Its weights are known: those that the run began with, or a checkpoint made right before it. Its loss and gradient
    norm are then those that the training logged, which computed them in packed micro-batches."""
    code, printed, said = shown(capsys, "--run", run, "--step", number, "--losses", "--device", "cpu")
    assert code == 0, said
    logged = next(line for line in read_metrics(run) if line["step"] == number)
    losses = [float(text) for text in re.findall(r"^loss (\S+),", printed, re.MULTILINE)]
    counts = [int(text) for text in re.findall(r"; (\d+) supervised$", printed, re.MULTILINE)]
    shares = [float(text) for text in re.findall(r"(\S+)% of the step's gradient", printed)]
    assert len(losses) == len(counts) == len(shares) == logged["samples"]
    assert sum(counts) == logged["supervised_tokens"]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(logged["loss"], abs=2e-4)
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares)), "the parts make the whole"
    whole = float(re.search(r": gradient norm (\S+)$", printed, re.MULTILINE)[1])
    assert whole == pytest.approx(logged["grad_norm"], abs=1e-3)


def test_a_step_of_weighted_answers_is_taken_apart(tiny_path, tmp_path, capsys):
    """Each sample's loss counts by the sum of its answers' weights, as it did in the training."""
    texts = ["one", "two and a half", "three"]
    rows = [entry(user(f"Say {text}."), assistant(text)) | {"weight": 2**n} for n, text in enumerate(texts)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    run = tmp_path / "run"
    finetune.train(Config(model=str(tiny_path), device="cpu", dtype="float32", data=[str(tmp_path / "data.json")],
                          max_steps=1, num_workers=0, output_dir=str(run)))  # fmt: skip
    code, printed, said = shown(capsys, "--run", run, "--step", 1, "--losses", "--device", "cpu")
    assert code == 0, said
    parts = re.findall(r"^loss (\S+), .*\n.*sample (\d): .* (\d+) supervised$", printed, re.MULTILINE)
    weighed = [(float(loss), 2 ** int(sample) * int(tokens)) for loss, sample, tokens in parts]
    mean = sum(loss * weight for loss, weight in weighed) / sum(weight for _, weight in weighed)
    (logged,) = [line for line in read_metrics(run) if "loss" in line]
    assert len(parts) == 3
    assert mean == pytest.approx(logged["loss"], abs=2e-4)


def test_without_losses_no_weights_are_loaded(run, capsys, monkeypatch):
    from util.results import step

    monkeypatch.setattr(step, "build_model", lambda *arguments: pytest.fail("weights were loaded"))
    code, printed, said = shown(capsys, "--run", run, "--step", 8)
    assert code == 0, said
    names = re.findall(r"^train_data/data.json, sample (\d+): ", printed, re.MULTILINE)
    assert [int(name) for name in names] == samples_of(run)[7]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "RUN", "--step", 99], "--step 99: RUN knows nothing of it; it has steps 1 to 8"),
        (["--run", "RUN"], "a step is named by --run"),
        (["--run", "RUN", "--step", 3, "--sample", 1], "--sample has no use with it"),
        (["--run", "RUN", "--step", 3, "--max_pixels", 9000], "--max_pixels has no use with it"),
        (["train_data/data.json", "--losses"], "--losses and --device go with --run"),
        ([], "name a data file, or a step by --run"),
        (["--run", "nowhere", "--step", 1], "--run nowhere: no run of finetune.py"),
    ],
)
def test_what_is_not_there_is_named(arguments, words, run, capsys):
    arguments = [str(run) if argument == "RUN" else argument for argument in arguments]
    code, printed, said = shown(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert words.replace("RUN", str(run)) in said
    assert "Traceback" not in said


def test_a_text_beside_a_tower_that_alone_is_trained_has_no_share(tiny_path, tmp_path, capsys):
    """Its loss has no gradient, which the training loop passes over, too."""
    Image.effect_noise((56, 56), 90).convert("RGB").save(tmp_path / "a.png")
    text = {"type": "text", "text": "?"}
    entries = []
    for content in ([text], [{"type": "image", "image": "a.png"}, text]):
        entries.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    config = Config(model=str(tiny_path), device="cpu", data=[str(tmp_path / "data.json")], epochs=1, num_workers=0,
                    freeze=["language_model"], output_dir=str(tmp_path / "run"))  # fmt: skip
    finetune.train(config)
    capsys.readouterr()
    code, printed, said = shown(capsys, "--run", tmp_path / "run", "--step", 1, "--losses", "--device", "cpu")
    assert code == 0, said
    assert re.findall(r"gradient norm (\S+), (\S+)% of the step's gradient", printed)[1] == ("0.0000", "0.0")
    assert printed.count(" supervised\n") == 2


def test_the_largest_share_comes_first(run, capsys):
    _, printed, _ = shown(capsys, "--run", run, "--step", 3, "--losses", "--device", "cpu")
    shares = [float(text) for text in re.findall(r"(\S+)% of the step's gradient", printed)]
    assert shares == sorted(shares, reverse=True)
    names = re.findall(r"^train_data/data.json, sample (\d+): ", printed, re.MULTILINE)
    assert sorted(map(int, names)) == sorted(samples_of(run)[2])


def test_pixels_are_written_as_the_model_sees_them(capsys, tmp_path):
    """Sample 0 has one image, of 24 x 32 patches."""
    code, printed, said = shown(capsys, "train_data/data.json", "--pixels", tmp_path / "seen")
    assert code == 0, said
    assert "image: train_data/media/0000_colour_0.png" in printed
    (file,) = (tmp_path / "seen").iterdir()
    assert Image.open(file).size == (32 * 14, 24 * 14)
    assert f"written: {file}" in printed


def test_a_sample_that_was_skipped_is_named_and_the_others_shown(tiny_path, tmp_path, capsys):
    """Its pixels cannot be read, which only the data worker found out: the step went without it."""
    data, folder = tmp_path / "data.json", tmp_path / "run"
    Image.effect_noise((84, 84), 90).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes())
    entries = []
    for file in ("whole.jpg", "cut.jpg"):
        content = [{"type": "image", "image": file}, {"type": "text", "text": "?"}]
        entries.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]})
    data.write_text(json.dumps(entries))
    config = Config(model=str(tiny_path), device="cpu", data=[str(data)], epochs=1, num_workers=0,
                    on_bad_sample="skip", output_dir=str(folder))  # fmt: skip
    finetune.train(config)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    capsys.readouterr()
    code, printed, said = shown(capsys, "--run", folder, "--step", 1, "--losses", "--device", "cpu")
    assert code == 0, said
    assert "sample 0: " in printed
    assert re.search(r"not read: \S+data.json, sample 1: \S*cut.jpg", printed)
    assert printed.count("% of the step's gradient") == 1


def test_another_folder_is_named(run, capsys, tmp_path, monkeypatch):
    """Paths of a run are those of the folder that it was started in."""
    monkeypatch.chdir(tmp_path)
    code, _, said = shown(capsys, "--run", run, "--step", 1)
    assert code == 2
    assert "train_data/data.json is not here; go to the folder that the training was started in" in said


def test_data_that_changed_is_said(tiny_path, tmp_path, capsys):
    data, folder = tmp_path / "data.json", tmp_path / "run"
    entries = [{"messages": [{"role": "user", "content": i}, {"role": "assistant", "content": "x"}]} for i in "abc"]
    data.write_text(json.dumps(entries))
    config = Config(model=str(tiny_path), device="cpu", data=[str(data)], epochs=1, save_every=1, num_workers=0,
                    output_dir=str(folder))  # fmt: skip
    finetune.train(config)
    assert "have changed since" not in shown(capsys, "--run", folder, "--step", 1)[1]
    data.write_text(json.dumps(entries[::-1]))
    assert "the data files have changed since" in shown(capsys, "--run", folder, "--step", 1)[1]
    data.write_text(json.dumps(entries[:1]))
    code, _, said = shown(capsys, "--run", folder, "--step", 1)
    assert code == 2
    assert "fewer samples than" in said
