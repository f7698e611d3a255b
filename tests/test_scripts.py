"""The commands a user types, as a user types them: the demonstration, the two test scripts, the model opened elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import warm

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


run_cold = partial(subprocess.run, capture_output=True, text=True)


def command(*words: str, expect: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command; return all it printed. Another exit code than expected fails with that text."""
    run = warm.run if words[0] == sys.executable else run_cold
    done = run(words, cwd=cwd, env={**ENVIRONMENT, **environment}, timeout=1200)
    assert done.returncode == expect, (
        f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def demonstration() -> str:
    """`./finetune.sh` without arguments on a machine without a GPU, from start to end."""
    return command("./finetune.sh")


def scores(printed: str) -> dict[str, list[float]]:
    table = re.findall(r"^ +(exact match|token F1) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    return {name: [float(before), float(after)] for name, before, after in table}


def test_the_demonstration_learns(demonstration):
    """At least 90 % exact match on at least 500 held-out image and video questions; under 10 % before."""
    before, after = scores(demonstration)["exact match"]
    assert before < 10
    assert after >= 90
    questions = int(re.search(r"^ +questions +(\d+) +\d+$", demonstration, re.MULTILINE)[1])
    assert questions >= 500
    assert "No GPU here" in demonstration
    asked = re.search(r"^ask it yourself: (.*)$", demonstration, re.MULTILINE)[1]
    assert command("bash", "-c", asked).strip() in ("top left", "top right", "bottom left", "bottom right", "centre")
    assert "reached" in demonstration


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_the_demonstration_of_another_family_learns(model):
    """The same mark: at least 90 % exact match on the same held-out questions; under 10 % before."""
    printed = command("./finetune.sh", "--model", model)
    before, after = scores(printed)["exact match"]
    assert before < 10
    assert after >= 90
    assert "reached" in printed


def test_the_demonstration_is_scored_on_media_it_never_saw(demonstration):
    import hashlib

    def hashes(folder: str) -> set[str]:
        return {
            hashlib.sha256(f.read_bytes()).hexdigest() for f in (ROOT / folder / "demonstration" / "media").iterdir()
        }

    train, test = hashes("train_data"), hashes("test_data")
    assert len(train) > 3000
    assert len(test) >= 500
    assert not train & test


def test_showcase_is_small_and_its_test_media_are_not_in_train():
    import hashlib

    import av
    from PIL import Image

    def contents(folder: str) -> dict[str, str]:
        found = {}
        for path in sorted((ROOT / folder / "media").iterdir()):
            if path.suffix == ".mp4":
                with av.open(str(path)) as video:
                    pixels = b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in video.decode(video=0))
            else:
                pixels = Image.open(path).convert("RGB").tobytes()
            found[path.name] = hashlib.sha256(pixels).hexdigest()
        return found

    train, test = contents("train_data"), contents("test_data")
    assert train
    assert test
    assert len(train) + len(test) <= 60
    assert not set(train.values()) & set(test.values())
    size = sum(f.stat().st_size for folder in ("train_data", "test_data") for f in (ROOT / folder / "media").iterdir())
    assert size <= 6e6


def test_showcase_holds_every_kind_of_conversation():
    kinds = {
        entry["kind"]
        for file in ("train_data", "test_data")
        for entry in json.loads((ROOT / file / "data.json").read_text())
    }
    wanted = {
        "colour",
        "shape",
        "place",
        "chart",
        "motion",
        "several images",
        "turns",
        "system",
        "text",
        "box",
        "chinese",
        "newline",
        "boxes",
        "region",
        "agent",
        "tool call",
    }
    assert wanted <= kinds
    videos = list((ROOT / "train_data" / "media").glob("*.mp4"))
    import av
    from av.video.frame import PictureType

    assert videos
    for path in videos:
        with av.open(str(path)) as video:
            assert video.streams.video[0].codec_context.name.startswith("h264")
            assert any(PictureType(frame.pict_type) == PictureType.B for frame in video.decode(video=0)), (
                f"{path.name} has no B-frames"
            )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run on the showcase, with small pictures."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    command(sys.executable, "finetune.py", "--model", "tiny", "--max_steps", "6", "--epochs", "9", "--learning_rate", "1e-3",
            "--max_pixels", "50176", "--video_max_frames", "4", "--output_dir", str(directory))  # fmt: skip
    return directory


def test_a_short_run_prints_plan_sample_and_summary(tmp_path):
    printed = command("./finetune.sh", "--model", "tiny", "--max_steps", "2", "--max_pixels", "12544",
                      "--output_dir", str(tmp_path / "run"))  # fmt: skip
    for words in ("device", "precision", "float32 (no GPU)", "steps", "memory", "output", "supervised", "<image ", "┃",
                  "done: 2 steps", "peak memory", "python test_on_trained_model.py"):  # fmt: skip
        assert words in printed, words


def test_before_and_after(run, tmp_path):
    """Both scripts answer every question of test_data; before.jsonl is reused, and made anew for another budget."""
    common = ["--max_new_tokens", "12", "--output_dir", str(tmp_path)]
    before = command(
        sys.executable, "test_on_official_model.py", "--max_pixels", "50176", "--video_max_frames", "4", *common
    )
    assert "exact match" in before
    asked = [json.loads(line) for line in (tmp_path / "before.jsonl").read_text().splitlines()][1:]
    entries = json.loads((ROOT / "test_data" / "data.json").read_text())
    answers = [m for entry in entries for m in entry["messages"] if m["role"] == "assistant"]
    plain = {i: m["content"] for i, m in enumerate(answers) if isinstance(m["content"], str) and "tool_calls" not in m}
    assert len(asked) == len(answers) > len(plain) > 20
    assert {number: asked[number]["reference"] for number in plain} == plain
    assert sum("<|box_start|>" in answer["reference"] for answer in asked) >= 1
    assert sum("<tool_call>" in answer["reference"] for answer in asked) >= 2
    assert all(answer["loss"] > 0 for answer in asked)

    after = command(sys.executable, "test_on_trained_model.py", str(run), *common)
    assert f"before: {len(answers)} answers" in after, "made with the same base, data and budget: read, not made again"
    assert "answers became better" in after
    assert f"report: {tmp_path / 'report.html'} (" in after
    rows = json.loads(re.search('id="facts">(.*?)</script>', (tmp_path / "report.html").read_text())[1])["rows"]
    assert [row["reference"] for row in rows] == [answer["reference"] for answer in asked]
    trained = [json.loads(line) for line in (tmp_path / "after.jsonl").read_text().splitlines()]
    assert trained[0]["made_from"]["budget"]["max_pixels"] == 50176, "the budget of training is that of testing"
    assert sum(a["loss"] for a in trained[1:]) < sum(a["loss"] for a in asked), "six steps must lower the loss"

    again = command(sys.executable, "test_on_trained_model.py", str(run), "--max_pixels", "25088", "--at_least", "0.99",
                    *common, expect=1)  # fmt: skip
    assert "before: 2" not in again, "another budget: before must be answered anew"
    assert "MISSED" in again
    assert "report: " in again, "the report is written whatever was reached"


def test_one_question(run):
    from util.model import load_processor
    from util.results.evaluate import Answerer, ask
    from util.vision import Budget

    image = str(
        ROOT / "test_data" / "media" / next(f for f in os.listdir(ROOT / "test_data" / "media") if f.endswith("png"))
    )
    video = str(
        ROOT / "test_data" / "media" / next(f for f in os.listdir(ROOT / "test_data" / "media") if f.endswith("mp4"))
    )
    words = ["--question", "What is this?", "--max_new_tokens", "5"]
    tiny = ROOT / "train_output" / "tiny_model"
    for model, kind, path, script in ((run, "image", image, ["test_on_trained_model.py", str(run)]),
                                      (tiny, "video", video, ["test_on_official_model.py", "--model", "tiny"])):  # fmt: skip
        budget = (
            Budget.of(json.loads((run / "training_config.json").read_text()), "qwen2_vl") if model == run else Budget()
        )
        answerer = Answerer.load(str(model), load_processor(str(model)), torch.device("cpu"), torch.float32)
        asked = [{"role": "user", "content": [{"type": kind, kind: path}, {"type": "text", "text": "What is this?"}]}]
        printed = command(sys.executable, *script, f"--{kind}", path, *words)
        assert printed.strip() == ask(answerer, asked, budget, 5).strip(), script
    message = command(sys.executable, "test_on_official_model.py", "--image", "gone.png", *words, expect=2)
    assert "no such file 'gone.png'" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("arguments", [["no_such_run"], ["train_data"], ["--data", "gone.json"], ["--batch_size", "0"]])
def test_a_wrong_test_command_is_one_message(arguments, run):
    target = [] if arguments[0] in ("no_such_run", "train_data") else [str(run)]
    message = command(sys.executable, "test_on_trained_model.py", *target, *arguments, expect=2)
    assert "Traceback" not in message
    assert arguments[-1] in message


OPENED_ELSEWHERE = """
import json, sys
import numpy, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
run, out = sys.argv[1:3]
model = AutoModelForImageTextToText.from_pretrained(run, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(run)
texts = []
for kind, paths, question in json.loads(sys.argv[3]):
    pictures = [Image.open(path).convert("RGB") for path in paths]
    messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    media = {"images": pictures} if kind == "image" else {"videos": [torch.from_numpy(numpy.stack([numpy.asarray(p) for p in pictures])).permute(0, 3, 1, 2)]}
    inputs = processor(text=[prompt], return_tensors="pt", **media)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        logits = model(**inputs).logits[0, -1]
    texts.append([processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:]).split("<|im_end|>")[0], logits.tolist()])
assert not any(name.startswith("util") for name in sys.modules), "something of this project was imported"
json.dump(texts, open(out, "w"))
"""


def test_the_run_opens_in_plain_transformers_and_answers_the_same(run, tmp_path):
    """In a process that knows nothing of this project: images, and a short video sampled before."""
    from util.model import load_processor
    from util.results.evaluate import Answerer
    from util.vision import Budget

    media = ROOT / "test_data" / "media"
    pictures = sorted(str(path) for path in media.glob("*.png"))[:3]
    frames = [str(path) for path in sorted(media.glob("*.png")) if "motion" not in path.name][3:4] * 4
    asked = [("image", [path], "What colour is the shape?") for path in pictures] + [("video", frames, "What moves?")]
    (tmp_path / "elsewhere.py").write_text(OPENED_ELSEWHERE)
    command(
        sys.executable,
        str(tmp_path / "elsewhere.py"),
        str(run),
        str(tmp_path / "out.json"),
        json.dumps(asked),
        cwd=tmp_path,
    )
    theirs = json.loads((tmp_path / "out.json").read_text())

    from util.collator import Collator
    from util.conversation import encode, render_prompt
    from util.dataset import Sample
    from util.vision import load

    settings = json.loads((run / "training_config.json").read_text())
    budget, processor = Budget.of(settings, "qwen2_vl"), load_processor(str(run))
    answerer = Answerer.load(str(run), processor, torch.device("cpu"), torch.float32)
    for (kind, paths, question), (text, logits) in zip(asked, theirs, strict=True):
        item = {"type": kind, kind: paths if kind == "video" else paths[0]}
        messages = [{"role": "user", "content": [item, {"type": "text", "text": question}]}]
        prompt = Sample(encode(render_prompt(messages, processor), processor), [load(item, budget)], "asked")
        assert answerer.answers([prompt], 12)[0] == text
        batch = Collator()([prompt])
        batch.supervised_index = torch.tensor([len(batch.input_ids) - 1])
        packed = answerer.packed
        with torch.no_grad():
            ours = packed.model.lm_head(packed.supervised_rows(batch, *packed.embed(batch)))[0]
        torch.testing.assert_close(ours, torch.tensor(logits), atol=2e-3, rtol=0)


def test_batched_answers_equal_answers_one_by_one(run):
    from util.dataset import load_examples
    from util.model import load_processor
    from util.results.evaluate import Answerer, QuestionSamples, answer_all, questions_of
    from util.vision import Budget

    processor = load_processor(str(run))
    examples = questions_of(load_examples([str(ROOT / "test_data" / "data.json")], processor))
    questions = QuestionSamples(examples, processor, Budget(max_pixels=50176, video_max_frames=4))
    answerer = Answerer.load(str(run), processor, torch.device("cpu"), torch.float32)
    together = answer_all(answerer, questions, 16, 12, "together")
    alone = answer_all(answerer, questions, 1, 12, "alone")
    assert [a.answer for a in together] == [a.answer for a in alone]
    assert [a.loss for a in together] == pytest.approx([a.loss for a in alone], abs=1e-4)


def test_a_reference_that_is_the_answer_is_not_generated_again(run, monkeypatch):
    """Every second question gets what `generate` answers as its reference: that is read off, the rest is generated."""
    from dataclasses import replace

    from util.dataset import load_examples
    from util.model import load_processor
    from util.results.evaluate import Answerer, QuestionSamples, answer_all, questions_of
    from util.vision import Budget

    processor = load_processor(str(run))
    examples = questions_of(load_examples([str(ROOT / "test_data" / "data.json")], processor))
    budget = Budget(max_pixels=50176, video_max_frames=4)
    answerer = Answerer.load(str(run), processor, torch.device("cpu"), torch.float32)
    samples = QuestionSamples(examples, processor, budget)
    generated = [answerer.answers([samples[index][0]], 12)[0] for index in range(len(samples))]
    assert len(set(generated)) > 1
    known = range(0, len(examples), 2)
    for index in known:
        reference = {"role": "assistant", "content": [{"type": "text", "text": generated[index]}]}
        examples[index] = replace(examples[index], messages=[*examples[index].messages[:-1], reference])
    sizes, generate = [], Answerer.generate
    monkeypatch.setattr(
        Answerer, "generate", lambda self, prompts, most: sizes.append(len(prompts)) or generate(self, prompts, most)
    )
    answers = answer_all(answerer, QuestionSamples(examples, processor, budget), 4, 12, None)
    assert [answer.answer for answer in answers] == generated
    assert sum(sizes) == len(examples) - len(known), "only what is not known is generated"
    assert all(size == 4 for size in sizes[:-1]), "in full batches"


def test_tiny_is_made_deterministically(tmp_path, tiny_path):
    from util.tiny_model import make_tiny_model

    again = make_tiny_model(tmp_path / "again")
    files = sorted(path.name for path in tiny_path.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        assert (tiny_path / name).read_bytes() == (again / name).read_bytes(), f"{name} differs"
    shutil.rmtree(again)
