"""Data files, what is refused and how it is said; the order of an epoch and its batches; the sample shown."""

import itertools
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import warm
from tests.conftest import ROOT
from tests.samples import assistant, entry, system, text, user
from util import dataset
from util.__main__ import main as command
from util.collator import Collator
from util.command_line import UserError
from util.config import Config
from util.cost.measure import measure
from util.cost.sizes import Finding, Sizes
from util.data.settings import SampleSettings
from util.dataset import DataError, Samples, Size, load_examples
from util.steps import Dealing, Steps, heaviest
from util.vision import Budget, Grid

SMALL = Budget(min_pixels=3136, max_pixels=50176)


GOOD = entry(user("Hi"), assistant("Hello"))


def asking(*items) -> dict:
    """A sample whose user message has these items."""
    return entry(user([*items, text("What is it?")]), assistant("A wave."))


@pytest.fixture
def folder(tmp_path, monkeypatch, picture) -> Path:
    """The data file's folder, with picture.png in it; the current folder is another one, which has elsewhere.png."""
    here, there = tmp_path / "current", tmp_path / "data"
    for place, name in ((here, "elsewhere.png"), (there, "picture.png")):
        place.mkdir()
        Image.fromarray(picture(56, 84)).save(place / name)
    monkeypatch.chdir(here)
    return there


def write(folder: Path, data, name: str = "data.json") -> str:
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(folder / name)


def refusal(file, processor) -> str:
    with pytest.raises(DataError) as error:
        load_examples([file], processor)
    return str(error.value)


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_json_and_jsonl_and_several_files(folder, processor):
    one = write(folder, [entry(user("1"), assistant("one")), {**entry(user("2"), assistant("two")), "kind": "number"}])
    lines = [json.dumps(entry(user(str(number)), assistant("more"))) for number in (3, 4)]
    two = write(folder, "\n".join([lines[0], "", lines[1], ""]), "data.jsonl")
    three = write(folder, "\r\n".join(lines) + "\r\n", "windows.jsonl")
    examples = load_examples([one, two, three], processor)
    assert [example.messages[0]["content"][0]["text"] for example in examples] == ["1", "2", "3", "4", "3", "4"]
    assert [example.kind for example in examples] == [None, "number", None, None, None, None]
    assert [example.where for example in examples] == [
        f"{one}, sample 0",
        f"{one}, sample 1",
        f"{two}, sample 0",
        f"{two}, sample 1",
        f"{three}, sample 0",
        f"{three}, sample 1",
    ]


def test_a_byte_order_mark_is_fine(folder, processor):
    for name, content in (("a.json", json.dumps([GOOD])), ("a.jsonl", json.dumps(GOOD) + "\n")):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert len(load_examples([str(folder / name)], processor)) == 1


def test_the_predecessors_format_loads_unchanged(folder, processor):
    """zhangfaen/finetune-Qwen2-VL: paths from the current folder, items with a type, several turns."""
    data = [
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "elsewhere.png"},
                        {"type": "text", "text": "描述一下这个图片"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A wave."}]},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
    ]
    (example,) = load_examples([write(folder, data)], processor)
    assert example.messages == [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(Path.cwd() / "elsewhere.png")},
                {"type": "text", "text": "描述一下这个图片"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A wave."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    assert example.media == [{"type": "image", "image": str(Path.cwd() / "elsewhere.png")}]


def test_the_projects_own_data_loads(processor):
    for file in ("train_data/data.json", "test_data/data.json"):
        assert len(load_examples([str(ROOT / file)], processor)) >= 10


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("picture.png", "{data}/picture.png"),
        ("elsewhere.png", "{current}/elsewhere.png"),
        ("{data}/picture.png", "{data}/picture.png"),
        ("file://{data}/picture.png", "{data}/picture.png"),
        ("../current/elsewhere.png", "{data}/../current/elsewhere.png"),
        ("both.png", "{data}/both.png"),
    ],
)
def test_where_media_are_looked_for(written, wanted, folder, processor):
    places = {"data": folder, "current": Path.cwd()}
    for place in places.values():
        Image.new("RGB", (56, 56)).save(place / "both.png")
    item = {"type": "image", "image": written.format(**places)}
    (example,) = load_examples([write(folder, [asking(item)])], processor)
    assert example.media == [{"type": "image", "image": wanted.format(**places)}]
    frames = {"type": "video", "video": [written.format(**places)] * 2}
    (example,) = load_examples([write(folder, [asking(frames)])], processor)
    assert example.media == [{"type": "video", "video": [wanted.format(**places)] * 2}]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": "picture.png", "video": None, "text": None, "max_pixels": None},
        {"image": "picture.png"},
        {"type": None, "image": "picture.png"},
        {"type": None, "image": "picture.png", "video": None, "text": None},
    ],
)
def test_null_keys_and_a_missing_type(item, folder, processor):
    """As tables with one column per key write them."""
    (example,) = load_examples([write(folder, [asking(item, {"text": "And?", "image": None})])], processor)
    content = [{"type": "image", "image": str(folder / "picture.png")}, text("And?"), text("What is it?")]
    assert example.messages[0]["content"] == content
    assert Samples([example], processor, SMALL)[0].media[0].grid == Grid(1, 4, 6, False)


def test_keys_of_an_item_survive(folder, processor):
    keys = {"min_pixels": 3136, "max_pixels": 6272.0, "fps": 0.5, "nframes": 2, "min_frames": 2, "max_frames": 8,
            "video_start": 0, "video_end": 1.5, "total_pixels": 1e9, "resized_height": 56, "resized_width": 56}  # fmt: skip
    item = {"type": "video", "video": "picture.png", **keys}
    (example,) = load_examples([write(folder, [asking(item)])], processor)
    assert example.media == [{**item, "video": str(folder / "picture.png")}]


# ---- what is refused -------------------------------------------------------------------------------------------------

PICTURE = {"type": "image", "image": "picture.png"}
CLIP = {"type": "video", "video": "picture.png"}
A_SAMPLE = ": a sample is {'messages': [...]} with at least one message"
A_MESSAGE = ", message {}: a message is {{'role': one of system, user, assistant, 'content': ...}}"
AN_ITEM = "an item has a type image, video or text and its key, or type box; has "

REFUSED = {
    # name: (entry, what the message says after "FILE, sample 1")
    "not an object": ([1], A_SAMPLE),
    "null": (None, A_SAMPLE),
    "no messages": ({"conversations": []}, A_SAMPLE),
    "messages not a list": ({"messages": "Hi"}, A_SAMPLE),
    "empty messages": (entry(), A_SAMPLE),
    "message not an object": (entry("Hi"), A_MESSAGE.format(0)),
    "wrong role": (entry(user("Hi"), {"role": "gpt", "content": "Hello"}), A_MESSAGE.format(1)),
    "role in capitals": (entry({"role": "User", "content": "Hi"}, assistant("Hello")), A_MESSAGE.format(0)),
    "role a list": (entry({"role": ["user"], "content": "Hi"}), A_MESSAGE.format(0)),
    "no role": (entry({"content": "Hi"}), A_MESSAGE.format(0)),
    "no content": (entry(user("Hi"), {"role": "assistant"}), A_MESSAGE.format(1)),
    "system in the middle": (
        entry(user("Hi"), assistant("Hello"), system("Be brief."), user("Hi"), assistant("Hello")),
        ", message 2: a system message can only be the first one",
    ),
    "two system messages": (
        entry(system("Be brief."), system("Be kind."), user("Hi"), assistant("Hello")),
        ", message 1: a system message can only be the first one",
    ),
    "assistant first": (
        entry(assistant("Hello"), user("Hi")),
        ", message 0: an assistant message must follow a user message, follows nothing",
    ),
    "assistant after system": (
        entry(system("Be brief."), assistant("Hello")),
        ", message 1: an assistant message must follow a user message, follows system",
    ),
    "two assistants": (
        entry(user("Hi"), assistant("Hello"), assistant("Hello")),
        ", message 2: an assistant message must follow a user message, follows assistant",
    ),
    "two users": (
        entry(user("Hi"), user("Hi?"), assistant("Hello")),
        ", message 1: two user messages in a row; join them or put the answer between them",
    ),
    "ends with a user": (
        entry(user("Hi"), assistant("Hello"), user("Bye")),
        ": ends with a user message, so nothing is supervised; add the answer",
    ),
    "only a system message": (
        entry(system("Be brief.")),
        ": ends with a system message, so nothing is supervised; add the answer",
    ),
    "content a number": (entry(user(3), assistant("Hello")), ", message 0: content must be text or a list of items, is int"),
    "content null": (
        entry(user("Hi"), assistant(None)),
        ", message 1: content must be text or a list of items, is NoneType",
    ),
    "content one item": (entry(user(PICTURE), assistant("Hello")), ", message 0: content must be text or a list of items, is dict"),
    "content a list of texts": (
        entry(user(["Hi"]), assistant("Hello")),
        ", message 0: content must be text or a list of items, is list",
    ),
    "item of no kind": (asking({}), f", message 0: {AN_ITEM}"),
    "item of another kind": (asking({"type": "audio", "audio": "a.wav"}), f", message 0: {AN_ITEM}['audio', 'type']"),
    "item without its key": (asking({"type": "image", "text": "x"}), f", message 0: {AN_ITEM}['text', 'type']"),
    "item whose key is null": (asking({"type": "image", "image": None}), f", message 0: {AN_ITEM}['type']"),
    "image_url": (asking({"type": "image_url", "image_url": {}}), f", message 0: {AN_ITEM}['image_url', 'type']"),
    "type a list": (asking({"type": [], "image": "picture.png"}), f", message 0: {AN_ITEM}['image', 'type']"),
    "text a number": (asking(text(3)), ", message 0: text must be a string, is int"),
    "control token": (
        entry(user("Hi"), assistant("Hello<|im_end|>")),
        ", message 1: text contains the control token '<|im_end|>'; take it out",
    ),
    "surrogate half": (
        entry(user("Hi \ud83d"), assistant("Hello")),
        ", message 0: text holds half of a surrogate pair, which is no character; repair the file",
    ),
    "image in an assistant turn": (
        entry(user("Hi"), assistant([PICTURE])),
        ", message 1: only a user message can hold an image or a video; move the image into one",
    ),
    "image in a system message": (
        entry(system([PICTURE]), user("Hi"), assistant("Hello")),
        ", message 0: only a user message can hold an image or a video; move the image into one",
    ),
    "unknown key": (
        asking({**PICTURE, "quality": "high"}),
        ", message 0: unknown key 'quality' in an item of type image; known are image, max_pixels, min_pixels, resized_height, "
        "resized_width, type",
    ),
    "key of a video on an image": (asking({**PICTURE, "fps": 2}), ", message 0: unknown key 'fps' in an item of type image"),
    "image and video": (asking({**PICTURE, "video": "a.mp4"}), ", message 0: unknown key 'video' in an item of type image"),
    "fps negative": (asking({**CLIP, "fps": -1}), ", message 0: fps must be above 0, is -1"),
    "fps 0": (asking({**CLIP, "fps": 0}), ", message 0: fps must be above 0, is 0"),
    "fps NaN": (asking({**CLIP, "fps": float("nan")}), ", message 0: fps must be a number, is nan"),
    "fps infinite": (asking({**CLIP, "fps": float("inf")}), ", message 0: fps must be a number, is inf"),
    "fps true": (asking({**CLIP, "fps": True}), ", message 0: fps must be a number, is True"),
    "fps a text": (asking({**CLIP, "fps": "two"}), ", message 0: fps must be a number, is 'two'"),
    "video_start negative": (asking({**CLIP, "video_start": -0.5}), ", message 0: video_start must be "),
    "half a size": (
        asking({**PICTURE, "resized_height": 56}),
        ", message 0: resized_height and resized_width come together",
    ),
    "several paths of an image": (
        asking({"type": "image", "image": ["picture.png", "picture.png"]}),
        ", message 0: an image item holds one path; use several items for several images",
    ),
    "video of no frames": (
        asking({"type": "video", "video": []}),
        ", message 0: a video given as a list of frames needs at least one frame",
    ),
    "path a number": (asking({**PICTURE, "image": 3}), ", message 0: a media path must be a non-empty string, is 3"),
    "path empty": (asking({**PICTURE, "image": ""}), ", message 0: a media path must be a non-empty string, is ''"),
    "frame a number": (
        asking({**CLIP, "video": ["picture.png", 3]}),
        ", message 0: a media path must be a non-empty string, is 3",
    ),
    "missing image": (
        asking({**PICTURE, "image": "gone.png"}),
        ", message 0: no such file 'gone.png' (tried {data}/gone.png, {current}/gone.png)",
    ),
    "missing image, absolute": (
        asking({**PICTURE, "image": "/nowhere/gone.png"}),
        ", message 0: no such file '/nowhere/gone.png' (tried /nowhere/gone.png)",
    ),
    "a folder as image": (asking({**PICTURE, "image": "."}), ", message 0: no such file '.' (tried {data}, {current})"),
    "missing frame of a later turn": (
        entry(user("Hi"), assistant("Hello"), user([{"type": "video", "video": ["picture.png", "gone.png"]}]), assistant("!")),
        ", message 2: no such file 'gone.png' (tried {data}/gone.png, {current}/gone.png)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_samples_are_named(name, folder, processor):
    bad, said = REFUSED[name]
    file = write(folder, [GOOD, bad, GOOD])
    said = said.replace("{data}", str(folder)).replace("{current}", str(Path.cwd()))
    lines = refusal(file, processor).splitlines()
    assert len(lines) == 1, "one problem, one line"
    assert lines[0].startswith(f"{file}, sample 1{said}"), lines[0]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": "x" * 5000 + ".png"},
        {"type": "image", "image": "x\0.png"},
        {"type": "image", "image": "x\ud83d.png"},
        {"type": "image", "image": "picture.png", "max_pixels": 10**400},
    ],
    ids=["a path too long", "a zero byte", "half a surrogate pair", "a number too large"],
)
def test_what_the_machine_cannot_take_is_refused_by_name(item, folder, processor):
    file = write(folder, [asking(item)])
    assert refusal(file, processor).startswith(f"{file}, sample 0, message 0: ")


def test_text_of_the_data_cannot_cut_a_message_short(folder, processor):
    file = write(folder, [asking({"type": "image", "image": "DataError: gone.png"})])
    assert refusal(file, processor).startswith(f"{file}, sample 0, message 0: no such file 'DataError: gone.png'")


FILES = {
    # name: (file name, bytes, what the message says after the file's name)
    "not JSON": ("a.json", b'[\n{"messages": [}\n]', ", line 2: not valid JSON (Expecting value)"),
    "cut off": ("a.json", b'[\n{"messages":\n', ", line 3: not valid JSON (Expecting value)"),
    "jsonl with a bad line": ("a.jsonl", json.dumps(GOOD).encode() + b"\n\n{oops}\n", ", line 3: not valid JSON ("),
    "jsonl under the name .json": (
        "a.json",
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD)).encode(),
        ": each line is a sample; name it .jsonl: mv ",
    ),
    "one sample under the name .json": (
        "a.json",
        json.dumps(GOOD).encode(),
        ": holds one sample; write a list of samples, [{'messages': ...}]",
    ),
    "samples below a key": (
        "a.json",
        json.dumps({"data": [GOOD], "version": 1}).encode(),
        ": must hold a list of samples, holds a dictionary with data, version; write the list",
    ),
    "samples over many lines each": (
        "a.jsonl",
        f"{json.dumps(GOOD, indent=1)}\n{json.dumps(GOOD, indent=1)}\n".encode(),
        ": samples over many lines each; write a sample a line: jq -c . ",
    ),
    "a table": ("a.csv", b"image,text\na.png,A wave.\n", ": neither .json nor .jsonl; name a data file, or make one: py"),
    "null": ("a.json", b"null", ": must hold a list of samples, holds NoneType"),
    "nested too deeply": ("a.json", b"[" * 200000, ", line 1: not valid JSON (nested too deeply"),
    "a number of too many digits": ("a.json", b"[" + b"9" * 5000 + b"]", ", line 1: not valid JSON ("),
    "not UTF-8": ("a.json", '[{"messages": "é"}]'.encode("latin-1"), ": not UTF-8 text (byte 15); save the file as UTF-8"),
    "UTF-16": ("a.json", json.dumps([GOOD]).encode("utf-16"), ": not UTF-8 text (byte 0); save the file as UTF-8"),
    "empty list": ("a.json", b"[]", ": no samples. A data file is a JSON list of {'messages': [...]}."),
    "empty file": ("a.json", b"", ": no samples. A data file is a JSON list of {'messages': [...]}."),
    "blank file": ("a.jsonl", b"\n  \n", ": no samples. A data file is a JSON list of {'messages': [...]}."),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_refused_files_are_named(name, folder, processor):
    file_name, content, said = FILES[name]
    (folder / file_name).write_bytes(content)
    message = refusal(str(folder / file_name), processor)
    assert message.startswith(f"{folder / file_name}{said}"), message


def test_a_folder_and_a_missing_file_are_named(folder, processor):
    assert refusal(str(folder), processor) == (
        f"{folder}: a folder; name a data file, or make one: python -m util convert {folder} out.jsonl"
    )
    assert refusal("gone.json", processor) == f"gone.json: no such data file (looked in {os.getcwd()})"


def test_all_problems_of_all_files_in_one_message(folder, processor):
    bad = [value for value, _ in REFUSED.values()]
    one, two = write(folder, [GOOD, *bad[:5], GOOD], "one.json"), write(folder, [bad[5], GOOD, bad[6]], "two.json")
    with pytest.raises(DataError) as error:
        load_examples([one, two], processor)
    lines = str(error.value).splitlines()
    numbers = [f"{one}, sample {number}" for number in (1, 2, 3, 4, 5)] + [
        f"{two}, sample {number}" for number in (0, 2)
    ]
    assert [line[: len(wanted)] for line, wanted in zip(lines, numbers, strict=True)] == numbers


@pytest.mark.parametrize(("count", "last"), [(20, None), (21, "... and 1 more"), (57, "... and 37 more")])
def test_the_first_20_problems_are_shown(count, last, folder, processor):
    file = write(folder, [entry(user(str(number))) for number in range(count)])
    lines = refusal(file, processor).splitlines()
    said = [f"{file}, sample {number}: ends with a user message" for number in range(20)]
    assert [line[: len(wanted)] for line, wanted in zip(lines, said, strict=False)] == said
    assert lines[20:] == ([last] if last else [])


def test_a_data_error_is_the_users_mistake():
    assert issubclass(DataError, UserError), "which ends a script with exit code 2"


# ---- the order of an epoch and its batches ---------------------------------------------------------------------------


def epoch_order(counts: list[int], weights: list[float], seed: int, epoch: int) -> list[int]:
    """The order of an epoch over files of so many samples, without the files."""
    examples = dataset.Examples.__new__(dataset.Examples)
    examples.ends, examples.weights = list(itertools.accumulate(counts)), weights
    return examples.order(seed, epoch).tolist()


def test_weights_of_files_repeat_samples_or_take_a_share():
    for epoch in range(3):
        order = epoch_order([10, 20, 30], [2.0, 0.5, 1.0], 0, epoch)
        counts = Counter(order)
        assert [counts[index] for index in range(10)] == [2] * 10
        assert sum(counts[index] for index in range(10, 30)) == 10
        assert max(counts[index] for index in range(10, 30)) == 1
        assert [counts[index] for index in range(30, 60)] == [1] * 30
        assert len(order) == 60
    halves = [frozenset(i for i in epoch_order([20], [0.5], 0, epoch)) for epoch in range(4)]
    assert len(set(halves)) == 4, "another half in every epoch"
    assert Counter(epoch_order([8], [2.5], 3, 1)).most_common()[0][1] == 3
    assert epoch_order([5, 5], [1.0, 1.0], 1, 2) == epoch_order([10], [1.0], 1, 2), "files change nothing"


def test_a_weight_is_read_from_the_file_name(folder, processor):
    file = write(folder, [asking({"text": "A?"}), asking({"text": "B?"})])
    examples = load_examples([f"{file}*3", f"{file}*0.5"], processor)
    assert len(examples) == 4
    assert examples.weights == [3.0, 0.5]
    assert len(examples.order(0, 0)) == examples.epoch_samples == 7
    for wrong in ("0", "-1", "much", "inf"):
        with pytest.raises(DataError, match="how often its samples come"):
            load_examples([f"{file}*{wrong}"], processor)


def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone():
    orders, state = {}, torch.get_rng_state()
    for seed in (0, 1, 2):
        for epoch in (0, 1, 2):
            order = epoch_order([100], [1.0], seed, epoch)
            assert sorted(order) == list(range(100))
            orders[tuple(order)] = seed, epoch
    assert len(orders) == 9, f"different seeds and epochs give different orders: {sorted(orders.values())}"
    assert tuple(range(100)) not in orders
    assert (torch.get_rng_state() == state).all(), "the global random state is left alone"
    torch.rand(1)  # and has no say
    again = {tuple(epoch_order([100], [1.0], *seed_and_epoch)): seed_and_epoch for seed_and_epoch in orders.values()}
    assert again == orders


def steps_of(tokens: list[int | None], order: list[int], config, dealing: Dealing | None = None) -> Steps:
    """The steps of one epoch over samples of so many tokens; None is left out."""
    findings = [Finding(Size(n, 1, []) if n else None, reason="" if n else "not readable") for n in tokens]
    return Steps(Sizes.of(findings), lambda epoch: np.array(order), len(order), 1, None, config, dealing)


def plan_epoch(tokens: list[int | None], order: list[int], config) -> list[list[list[int]]]:
    return [step.micro_batches for step in steps_of(tokens, order, config).after(0)]


def test_every_sample_of_an_epoch_once_and_no_row_too_long():
    rng, steps_seen, shared, shorter = random.Random(0), 0, 0, 0
    for _ in range(150):
        count, most = rng.randint(1, 60), rng.randint(50, 400)
        tokens = [rng.randint(1, most) for _ in range(count)]
        config = SimpleNamespace(
            global_batch_size=rng.randint(1, 12), max_tokens=most, micro_batch_size=rng.choice([None, 1, 2, 3, 8])
        )
        seed, epoch = rng.randrange(1000), rng.randrange(10)
        order = epoch_order([count], [1.0], seed, epoch)
        steps = plan_epoch(tokens, order, config)
        samples = [[index for row in step for index in row] for step in steps]
        assert sorted(index for step in samples for index in step) == list(range(count)), "every sample exactly once"
        full, rest = divmod(count, config.global_batch_size)
        assert [len(step) for step in samples] == [config.global_batch_size] * full + [rest] * (rest > 0)
        for number, step in enumerate(samples):
            begin = number * config.global_batch_size
            assert set(step) == set(order[begin : begin + config.global_batch_size]), "a step takes the next in order"
        for row in (row for step in steps for row in step):
            assert row, "no empty micro-batch"
            assert sum(tokens[index] for index in row) <= most
            assert len(row) <= (config.micro_batch_size or count)
            shared += len(row) > 1
        assert plan_epoch(tokens, order, config) == steps, "the same plan again"
        steps_seen, shorter = steps_seen + len(steps), shorter + (rest > 0)
    assert steps_seen > 500
    assert shared > 500
    assert shorter > 50


def test_memory_settings_do_not_change_which_samples_a_step_has():
    tokens = [10 * (number % 7 + 1) for number in range(40)]
    plans = [
        plan_epoch(
            tokens,
            epoch_order([40], [1.0], 0, 0),
            Config(global_batch_size=8, micro_batch_size=micro, max_tokens=most),
        )
        for micro, most in ((None, 10000), (1, 10000), (3, 10000), (None, 80))
    ]
    assert len({len(step) for plan in plans for step in plan}) > 2, "the rows do differ"
    samples = [[sorted(index for row in step for index in row) for step in plan] for plan in plans]
    assert samples[1:] == samples[:1] * 3


def settings_of(size: int, most: int, micro: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(global_batch_size=size, max_tokens=most, micro_batch_size=micro)


def test_first_fit_written_by_hand():
    """Longest first, each into the first row that has room: 60 + 40, 50 + 30 + 20, 10."""
    tokens, order = [10, 20, 30, 40, 50, 60], [0, 1, 2, 3, 4, 5]
    assert plan_epoch(tokens, order, settings_of(6, 100)) == [[[5, 3], [4, 2, 1], [0]]]
    assert plan_epoch(tokens, order, settings_of(6, 100, 2)) == [[[5, 3], [4, 2], [1, 0]]]
    assert plan_epoch(tokens, [2, 0], settings_of(2, 100, 1)) == [[[2], [0]]]


def one_sample_at_a_time(tokens, costs, batch, ranks, config) -> list[list[list[int]]]:
    """Of each rank the micro-batches of one global batch, with the rules as they read: costliest first to the rank with
    least so far; of a rank's samples the longest first into the first row with room; equally many rows on all."""
    batch = [index for index in batch if tokens[index]]
    loads, hands = [0.0] * ranks, [[] for _ in range(ranks)]
    for index in sorted(batch, key=lambda index: -costs[index]):
        hand = loads.index(min(loads))
        hands[hand].append(index)
        loads[hand] += costs[index]
    plans = []
    for hand in hands:
        rows: list[list[int]] = []
        for index in sorted(hand, key=lambda index: (-tokens[index], index)):
            room = [r for r in rows if sum(tokens[i] for i in r) + tokens[index] <= config.max_tokens]
            room = [r for r in room if len(r) < (config.micro_batch_size or 10**9)]
            if not room:
                rows.append([])
            (room or rows[-1:])[0].append(index)
        plans.append(rows)
    passes = max(1, *map(len, plans))
    return [rows + [[]] * (passes - len(rows)) for rows in plans]


def test_steps_are_those_of_the_rules_on_any_number_of_ranks():
    rng, gaps = random.Random(1), 0
    for _ in range(120):
        count, most, ranks = rng.randint(1, 90), rng.randint(20, 300), rng.choice([1, 1, 2, 3, 8])
        tokens = [None if rng.random() < 0.2 else rng.randint(1, most) for _ in range(count)]
        costs = np.array([0.0 if n is None else float(rng.choice([n, 50, n * n])) for n in tokens])
        config = settings_of(rng.randint(1, 20), most, rng.choice([None, 1, 2, 5]))
        order = epoch_order([count], [rng.choice([1.0, 2.0, 2.5])], rng.randrange(99), rng.randrange(9))
        batches = [order[i : i + config.global_batch_size] for i in range(0, len(order), config.global_batch_size)]
        wanted = [one_sample_at_a_time(tokens, costs, batch, ranks, config) for batch in batches]
        for rank in range(ranks):
            steps = steps_of(tokens, order, config, Dealing(costs, rank, ranks))
            found = list(steps.after(0))
            assert [step.micro_batches for step in found] == [plan[rank] for plan in wanted]
            usable = [[i for i in batch if tokens[i] is not None] for batch in batches]
            assert [sorted(step.samples) for step in found] == [sorted(batch) for batch in usable]
            assert len(steps) == len(batches)
            done = rng.randrange(len(batches) + 1)
            assert list(steps.after(done)) == found[done:], "resuming is going on at a place"
            rest = [micro for step in found[done:] for micro in step.micro_batches]
            assert list(steps.micro_batches(done)) == rest
        survey = steps.survey
        passes = [len(plan[0]) for plan in wanted]
        assert (survey.steps, survey.fewest, survey.most) == (len(batches), min(passes), max(passes))
        micro_batches = [rows for plan in wanted for hand in plan for rows in hand if rows]
        longest = max((sum(tokens[i] for i in rows) for rows in micro_batches), default=0)
        assert max(survey.heaviest[:, 0], default=0) == longest
        turns = [any(rows for rows in hand) for plan in wanted for hand in plan]
        assert survey.idle_turns == turns.count(False)
        never = [rank for rank in range(ranks) if not any(rows for plan in wanted for rows in plan[rank])]
        assert survey.idle_ranks == len(never)
        assert survey.empty_steps == sum(all(tokens[i] is None for i in batch) for batch in batches)
        gaps += sum(n is None for n in tokens)
    assert gaps > 500


def test_one_more_sample_left_out_moves_no_other():
    tokens, order, config = [10 + n % 7 for n in range(40)], epoch_order([40], [1.0], 0, 0), settings_of(8, 100)
    before = plan_epoch(tokens, order, config)
    for gone in (order[0], order[9], order[39]):
        after = plan_epoch([None if n == gone else t for n, t in enumerate(tokens)], order, config)
        members = [[sorted(i for row in step for i in row if i != gone) for step in plan] for plan in (before, after)]
        assert members[0] == members[1], "every other sample is trained in the step it was in"
        assert len(after) == len(before)


def test_the_heaviest_loads_are_those_that_none_exceeds():
    rng = np.random.default_rng(0)
    for size in (1, 5, 300):
        loads = rng.integers(1, 20, (size, 3))
        kept = {tuple(load) for load in heaviest(loads).tolist()}
        wanted = {tuple(a) for a in loads.tolist() if not any((b >= a).all() and (b > a).any() for b in loads)}
        assert kept == wanted


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(folder, processor, picture, write_video) -> Samples:
    """Five samples: text, an image, an image that is resized, a video file, frames and an image over two turns."""
    Image.fromarray(picture(300, 500)).save(folder / "large.jpg")
    Image.fromarray(picture(112, 168)).save(folder / "twice.png")  # a frame of the same shape, twice as large
    write_video(folder / "clip.mp4", [picture(60, 90, seed) for seed in range(21)], 10)
    frames = {"type": "video", "video": ["picture.png", "twice.png", "picture.png"]}
    large = {"type": "image", "image": "large.jpg"}
    data = [
        entry(user("Hi"), assistant("Hello")),
        asking(PICTURE),
        entry(user([large, large, text("Same?")]), assistant("\nYes.")),
        asking({"type": "video", "video": "clip.mp4"}),
        entry(user([frames]), assistant("A wave."), user([PICTURE, text("And?")]), assistant("Another.")),
    ]
    return Samples(load_examples([write(folder, data)], processor), processor, SMALL)


def test_measured_sizes_are_what_the_collator_builds(samples):
    sizes = measure(samples, 10000)
    assert len(sizes) == len(samples) == 5
    for index, size in enumerate(sizes):
        batch = Collator()([samples[index]])
        assert size.tokens == len(batch.input_ids)
        assert size.supervised == len(batch.target_ids) > 0
        kinds = [item["type"] for item in samples.examples[index].media]
        ordered = [grid for kind in ("image", "video") for grid, k in zip(size.grids, kinds, strict=True) if k == kind]
        assert [list(grid[:3]) for grid in ordered] == batch.grid_thw.tolist()
    assert [len(size.grids) for size in sizes] == [0, 1, 2, 1, 2]
    batch = Collator()([samples[index] for index in range(5)])
    assert {key: number for key, number in batch.counts.items() if number} == {
        "samples": 5,
        "tokens": sum(size.tokens for size in sizes),
        "visual_tokens": sum(grid.t * grid.h * grid.w // 4 for size in sizes for grid in size.grids),
        "supervised_tokens": sum(size.supervised for size in sizes),
        "supervised_weight": sum(size.supervised for size in sizes),
    }
    assert sizes[1].grids == [Grid(1, 4, 6, False)]
    assert sizes[4].grids == [Grid(2, 4, 6, False), Grid(1, 4, 6, False)]


def test_samples_that_are_too_long_are_named(samples):
    sizes = measure(samples, 10000)
    longest = max(size.tokens for size in sizes)
    limit = sorted(size.tokens for size in sizes)[2]
    assert longest > limit
    assert list(measure(samples, longest)) == list(sizes), "as many as allowed are allowed"
    with pytest.raises(DataError) as error:
        measure(samples, limit)
    said = str(error.value).splitlines()
    too_long = [(index, size) for index, size in enumerate(sizes) if size.tokens > limit]
    assert len(said) == len(too_long) == 2
    for (index, size), line in zip(too_long, said, strict=True):
        text = size.tokens - sum(grid.t * grid.h * grid.w // 4 for grid in size.grids)
        named = f"{samples.examples[index].where}: {size.tokens:,} tokens, {text:,} of them text, above"
        assert line.startswith(f"{named} --max_tokens {limit:,}; raise it, or ")


def test_a_text_too_long_is_not_told_to_make_pictures_smaller(folder, processor):
    """What is told helps: of text alone, of text beside a small picture, of a picture, of a video."""
    Image.fromarray(np.zeros((280, 280, 3), np.uint8)).save(folder / "dark.png")
    dark = {"type": "image", "image": "dark.png"}  # 100 visual tokens
    moving = {"type": "video", "video": ["dark.png", "dark.png"] * 2}  # 200
    words = "word " * 400
    data = [
        entry(user(words), assistant("Yes.")),
        entry(user([PICTURE, text(words)]), assistant("Yes.")),
        asking(dark),
        asking(moving),
        entry(user([dark, moving]), assistant("Both.")),
    ]
    samples = Samples(load_examples([write(folder, data)], processor), processor, Budget())
    with pytest.raises(DataError) as error:
        measure(samples, 100)
    said = str(error.value).splitlines()
    assert len(said) == len(data)
    for line in said[:2]:
        assert "raise it, or make several samples of the conversation" in line
        assert "pixels" not in line
    assert "tokens of text, above --max_tokens 100" in said[0]
    assert said[2].endswith("lower --max_pixels, or let --on_long_sample shrink do it for such samples alone")
    assert "lower --video_max_tokens, or" in said[3]
    assert "lower --max_pixels or --video_max_tokens, or" in said[4]
    with pytest.raises(DataError, match="make several samples of the conversation") as error:
        measure(samples, 100, SampleSettings(on_long_sample="shrink"))
    assert len(str(error.value).splitlines()) == 2, "the others are shrunk"


def test_media_that_cannot_be_read_are_named(samples, folder):
    (folder / "picture.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as error:
        measure(samples, 10000)
    lines = str(error.value).splitlines()
    names = [f"{samples.examples[index].where}: {folder}/picture.png: not a readable image" for index in (1, 4)]
    assert [line[: len(name)] for line, name in zip(lines, names, strict=True)] == names
    with pytest.raises(DataError, match=r"sample 1: .*picture\.png: not a readable image"):
        samples[1]


# ---- python -m util show --------------------------------------------------------------------------------------------


@pytest.fixture
def show(monkeypatch, capsys):
    """`python -m util show`, run here: arguments -> (exit code, printed, said on the error stream)."""

    def run(*arguments) -> tuple[int, str, str]:
        try:
            command(["show", *map(str, arguments)])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_show_prints_the_sample(samples, folder, tiny_path, show):
    """Sample 4 of the file: 3 frames (as 4) of 56 x 84, and an image; positions counted by hand."""
    arguments = ("--model", tiny_path, "--min_pixels", 3136, "--max_pixels", 50176)
    code, printed, said = show(folder / "data.json", "--sample", 4, *arguments)
    assert code == 0, said
    size = samples.size(4)
    first, *lines = printed.splitlines()
    assert first == (
        f"{folder}/data.json, sample 4: {size.tokens} tokens = {size.tokens - 18} text + 18 visual (72 patches); "
        f"{size.supervised} supervised"
    )

    def length(text: str) -> int:
        return len(samples.processor.tokenizer(text)["input_ids"])

    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    video = length(system + "<|im_start|>user\n<|vision_start|>")
    after_video = video + 3  # 2 pairs of frames of 2 x 3 tokens: the width is the longest axis
    answer = after_video + length("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    question = answer + length("A wave.<|im_end|>\n")
    image = question + length("<|im_start|>user\n<|vision_start|>")
    after_image = image + 3  # 2 x 3 tokens
    last = after_image + length("<|vision_end|>And?<|im_end|>\n<|im_start|>assistant\n")
    wanted = [
        (0, " ", "<|im_start|>system⏎"),
        (video, " ", "<video 2x4x6>"),
        (after_video, " ", "<|vision_end|><|im_end|>⏎"),
        (answer, "┃", "A wave.<|im_end|>⏎"),
        (question, " ", "<|im_start|>user⏎"),
        (image, " ", "<image 4x6>"),
        (after_image, " ", "<|vision_end|>And?<|im_end|>⏎"),
        (last, "┃", "Another.<|im_end|>⏎"),
    ]
    pieces = [line for line in lines if line[:14].strip()]
    assert pieces == [f"{f'{at} {at} {at}':>14}  {bar} {text}" for at, bar, text in wanted]
    assert [line for line in lines if "┃" in line] == [pieces[3], pieces[7]], "only answers are marked"
    assert "\033" not in printed, "no colours into a pipe"


@pytest.mark.parametrize("number", [5, -1])
def test_show_names_the_samples_there_are(number, samples, folder, tiny_path, show):
    code, printed, said = show(folder / "data.json", "--sample", number, "--model", tiny_path)
    assert (code, printed) == (2, "")
    assert said.splitlines()[-1] == f"python -m util show: --sample {number}: {folder}/data.json has samples 0 to 4"


def test_show_refuses_bad_data_and_bad_settings(folder, tiny_path, show):
    file = write(folder, [entry(user("Hi"))])
    code, printed, said = show(file, "--model", tiny_path)
    assert (code, printed) == (2, "")
    assert f"{file}, sample 0: ends with a user message" in said
    code, printed, said = show(write(folder, [GOOD]), "--model", tiny_path, "--max_pixels", 0)
    assert (code, printed) == (2, "")
    assert "--max_pixels 0: must be at least 1" in said


def test_show_is_a_command(folder, tiny_path):
    file = write(folder, [GOOD])
    command = [sys.executable, "-m", "util", "show", file, "--model", str(tiny_path)]
    answer = warm.run(command)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"{file}, sample 0: ")
