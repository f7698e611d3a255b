"""Every format that convert reads: what it writes is the same conversation, and trains.

The reference is a list of messages written by hand, rendered by the processor's own chat template, and measured by
transformers' own processor from the pictures.
"""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.runs import flags, losses, settings
from tests.samples import assistant, system, text, user
from util import conversation
from util.dataset import Samples, load_examples
from util.formats.convert import convert
from util.formats.importers import HUGGING_FACE, IMPORTERS, LLAVA, OPENAI, OWN, QWEN_VL
from util.formats.rows import ALPACA, LLAMA_FACTORY, PICTURE_ROWS, PROMPT, SWIFT
from util.vision import Budget

A = {"type": "image", "image": "a.png"}
B = {"type": "image", "image": "b.jpg"}
ASK = user([A, text("What is it?")])
# qwen-vl-utils makes frames of 84 x 56 larger, to at least 128 tokens: both sides times sqrt(128 * 28 * 28 / (84 * 56)),
# then up to the next multiple of 28.
FRAME_SIZE = (392, 280)
FRAMES = {"type": "video", "video": ["frames/f_2.png", "frames/f_10.png"]}


def turn(role: str, value: str) -> dict:
    return {"from": role, "value": value}


def encoded(path: str) -> str:
    """The bytes of a picture in base64; a mark, which the test replaces."""
    return f"BASE64:{path}"


PAIR = [ASK, assistant("A wave.")]
THREE = [system("Be brief."), ASK, assistant("A wave."), user("Sure?"), assistant("Yes.")]
CASES = {
    # name: (format, row, messages by hand)
    "llava": (
        LLAVA,
        {"image": "a.png", "conversations": [turn("human", "<image>\nWhat is it?"), turn("gpt", "A wave.")]},
        PAIR,
    ),
    "llama-factory": (
        LLAVA,
        {"messages": [user("Is <image>like <image>?"), assistant("No.")], "images": ["a.png", "b.jpg"], "system": "S"},
        [system("S"), user([text("Is "), A, text("like "), B, text("?")]), assistant("No.")],
    ),
    "qwen-vl": (
        QWEN_VL,
        {"conversations": [turn("user", "Picture 1: <img>a.png</img>\nWhat is it?"), turn("assistant", "<ref>it</ref>")]},
        [ASK, assistant("<|object_ref_start|>it<|object_ref_end|>")],
    ),
    "rows of datasets": (
        HUGGING_FACE,
        {"messages": [user([{"type": "image"}, text("What is it?")]), assistant([text("A wave.")])], "images": ["a.png"]},
        PAIR,
    ),
    "bytes in base64 beside a null": (
        HUGGING_FACE,
        {
            "messages": [user([{"type": "image"}, {"type": "image"}, text("Alike?")]), assistant("No.")],
            "images": [{"bytes": encoded("a.png"), "path": None}, {"bytes": None, "path": "b.jpg"}],
        },
        [user([A, B, text("Alike?")]), assistant("No.")],
    ),
    "openai": (
        OPENAI,
        {"messages": [user([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("What is it?")]),
                      assistant("A wave.")]},
        PAIR,
    ),
    "alpaca": (
        ALPACA,
        {"instruction": "Look: <image>", "input": "What is it?", "output": "A wave.", "images": ["a.png"]},
        [user([text("Look: "), A, text("What is it?")]), assistant("A wave.")],
    ),
    "alpaca, with a system message and history, without tags": (
        ALPACA,
        {"instruction": "Sure?", "input": "", "output": "Yes.", "system": "Be brief.", "images": "a.png",
         "history": [["What is it?", "A wave."]]},
        THREE,
    ),
    "alpaca, text alone": (
        ALPACA, {"instruction": "Say hi", "input": None, "output": "Hi."}, [user("Say hi"), assistant("Hi.")],
    ),
    "ms-swift": (SWIFT, {"query": "<image>What is it?", "response": "A wave.", "images": ["a.png"]}, PAIR),
    "ms-swift, with history": (
        SWIFT,
        {"system": "Be brief.", "query": "Sure?", "response": "Yes.", "history": [["<image>What is it?", "A wave."]],
         "images": [{"bytes": None, "path": "a.png"}]},
        THREE,
    ),
    "ms-swift, rounds and a video": (
        SWIFT,
        {"conversation": [{"human": "<video>What happens?", "assistant": "It waves."}, {"human": "So?", "assistant": "So."}],
         "videos": [["frames/f_2.png", "frames/f_10.png"]]},
        [user([FRAMES, text("What happens?")]), assistant("It waves."), user("So?"), assistant("So.")],
    ),
    "trl, messages": (
        PROMPT,
        {"prompt": [system("Be brief."), user("What is it?")], "completion": [assistant("A wave.")], "images": ["a.png"]},
        [system("Be brief."), ASK, assistant("A wave.")],
    ),
    "trl, texts": (PROMPT, {"prompt": "What is it?", "completion": "A wave.", "image": "a.png"}, PAIR),
    "llama-factory v1": (
        LLAMA_FACTORY,
        {"messages": [
            {"role": "user", "content": [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What is it?"}],
             "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "A wave."}], "loss_weight": 1.0},
        ], "_dataset_name": "demo"},
        PAIR,
    ),
    "a picture and its caption": (
        PICTURE_ROWS, {"file_name": "a.png", "text": "A wave."}, [user([A, text("Describe the image.")]), assistant("A wave.")],
    ),
    "a picture, a question and a number": (
        PICTURE_ROWS, {"image": "b.jpg", "question": "How many?", "answer": 2}, [user([B, text("How many?")]), assistant("2")],
    ),
    "a folder of frames": (
        PICTURE_ROWS, {"video": "frames", "caption": "It waves."},
        [user([FRAMES, text("Describe the video.")]), assistant("It waves.")],
    ),
    "ours, as people write it": (
        OWN,
        {"id": 3, "messages": [
            user([{"image": ["a.png"], "max_pixels": "1003520", "detail": "high"}, text("<image>What is it?")]),
            assistant([text("A wave.")]),
        ]},
        PAIR,
    ),
    "ours, a folder of frames with their rate": (
        OWN,
        {"messages": [user([{"type": "video", "video": "frames", "fps": "1.0"}, text("So?")]), assistant("So.")]},
        [user([FRAMES, text("So?")]), assistant("So.")],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, picture) -> Path:
    """A folder with a.png and b.jpg of different sizes, two frames, and all rows in one file."""
    made = tmp_path_factory.mktemp("round")
    for number, name in enumerate(("a.png", "b.jpg", "frames/f_2.png", "frames/f_10.png")):
        (made / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(56 + 28 * (number == 1), 84, number)).save(made / name)
    (made / "rows.jsonl").write_text("".join(f"{json.dumps(row(name, made))}\n" for name in CASES))
    return made


def row(name: str, folder: Path) -> dict:
    """The row of a case, with its pictures in place of the marks for them."""
    written = json.dumps(CASES[name][1])
    for path in ("a.png", "b.jpg"):
        content = base64.b64encode((folder / path).read_bytes()).decode()
        written = written.replace(encoded(path), content)
    return json.loads(written)


def reference(name: str, folder: Path, processor) -> tuple[str, int]:
    """The conversation written by hand, rendered by transformers, and how many tokens it has with its pictures."""
    messages = CASES[name][2]
    # The template wants answers as text items or text; it is the processor's own.
    rendered = processor.apply_chat_template(messages, tokenize=False)
    images = []
    videos = []
    for message in messages:
        for item in message["content"] if isinstance(message["content"], list) else []:
            if item["type"] == "image":
                images.append(Image.open(folder / item["image"]))
            if item["type"] == "video":
                videos.append([Image.open(folder / path).resize(FRAME_SIZE) for path in item["video"]])
    more = {"videos": videos, "do_sample_frames": False, "do_resize": False} if videos else {}
    tokens = processor(text=[rendered], images=images or None, return_tensors="pt", **more)
    return rendered, tokens["input_ids"].shape[1]


def test_every_format_has_a_case():
    assert {case[0] for case in CASES.values()} == set(IMPORTERS)


@pytest.mark.parametrize("name", CASES)
def test_the_conversation_is_the_one_written_by_hand(name, folder, processor, tmp_path):
    source = folder / f"{list(CASES).index(name)}.json"
    source.write_text(json.dumps([row(name, folder)]))
    said = convert([str(source)], str(tmp_path / "out.json"))
    assert said.startswith(f"{source}: 1 sample, {CASES[name][0]}\n")
    examples = load_examples([str(tmp_path / "out.json")], processor)
    samples = Samples(examples, processor, Budget())
    rendered, tokens = reference(name, folder, processor)
    pieces = conversation.render(samples.example(0).messages, processor)
    assert "".join(piece.text for piece in pieces) == rendered
    answers = [message["content"] for message in CASES[name][2] if message["role"] == "assistant"]
    assert [piece.text for piece in pieces if piece.supervised] == [f"{answer}<|im_end|>\n" for answer in answers]
    assert samples.size(0).tokens == tokens
    assert len(samples[0].media) == rendered.count("<|vision_start|>")


def test_a_file_that_mixes_all_formats_trains(folder, tiny_path, tmp_path):
    """As a user would: convert through the command line, with some held out, then train a step on all of it."""
    words = ["convert", str(folder / "rows.jsonl"), str(tmp_path / "all.jsonl"), "--hold_out", "0.2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "util", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert f"{folder / 'rows.jsonl'}: {len(CASES)} samples, " in done.stdout
    files = ["--data", str(tmp_path / "all.jsonl"), "--eval_data", str(tmp_path / "all_held_out.jsonl")]
    config = settings(tiny_path, tmp_path / "run", global_batch_size=len(CASES), max_steps=1)
    done = subprocess.run(
        [sys.executable, "finetune.py", *flags(config), *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((step, loss),) = losses(tmp_path / "run")
    assert step == 1
    assert 0 < loss < 20
