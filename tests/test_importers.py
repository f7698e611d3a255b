"""Every importer against a sample written by hand and back; what is refused; converted files load."""

import base64
import copy
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.samples import assistant, system, text, user
from util.command_line import UserError
from util.data.lines import DataError
from util.formats.convert import convert
from util.formats.importers import HUGGING_FACE, IMPORTERS, LLAVA, OPENAI, OWN, QWEN_VL, detect, import_entry, simplest


def image(path) -> dict:
    return {"type": "image", "image": path}


def video(path) -> dict:
    return {"type": "video", "video": path}


def turn(role, value) -> dict:
    return {"from": role, "value": value}


def part(url, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def png(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(buffer, kind)
    return buffer.getvalue()


ANSWER = assistant("Yes.")

# ---- by hand: name, entry, messages, dropped keys --------------------------------------------------------------------

SAMPLES = {
    "llava": (
        LLAVA,
        {
            "id": "000000033471",
            "image": "coco/bus.jpg",
            "conversations": [
                turn("human", "<image>\nWhat colour is the bus?"),
                turn("gpt", "White and red."),
                turn("human", "Is it moving?\nSay yes or no."),
                turn("gpt", "Yes."),
            ],
        },
        [
            user([image("coco/bus.jpg"), text("What colour is the bus?")]),
            assistant("White and red."),
            user("Is it moving?\nSay yes or no."),
            ANSWER,
        ],
        {"id": 1},
    ),
    "llava, marker at the end": (
        LLAVA,
        {"image": "a.jpg", "conversations": [turn("human", "What is it?\n<image>"), turn("gpt", "A bus.\n")]},
        [user([text("What is it?"), image("a.jpg")]), assistant("A bus.\n")],
        {},
    ),
    "llava, text only, as its files write it": (
        LLAVA,
        {"image": None, "conversations": [turn("human", "Hi"), turn("gpt", "Hello")], "data_source": "sharegpt"},
        [user("Hi"), assistant("Hello")],
        {"data_source": 1},
    ),
    "llava, several images in several turns": (
        LLAVA,
        {
            "image": ["1.jpg", "2.jpg", "3.jpg"],
            "conversations": [
                turn("system", "Be brief."),
                turn("human", "<image>\n<image>\n\nCompare."),
                turn("gpt", "Same."),
                turn("human", "And <image> here?"),
                turn("gpt", "Another."),
            ],
        },
        [
            system("Be brief."),
            user([image("1.jpg"), image("2.jpg"), text("\nCompare.")]),
            assistant("Same."),
            user([text("And "), image("3.jpg"), text(" here?")]),
            assistant("Another."),
        ],
        {},
    ),
    "sharegpt, roles named after sites": (
        LLAVA,
        {"conversations": [turn("user", "Hi"), turn("chatgpt", "Hello"), turn("human", "Bye"), turn("bard", "Bye.")]},
        [user("Hi"), assistant("Hello"), user("Bye"), assistant("Bye.")],
        {},
    ),
    "llama-factory": (
        LLAVA,
        {
            "messages": [user("<video><image>What happens?"), assistant("It falls.")],
            "images": ["a.jpg"],
            "videos": ["fall.mp4"],
            "system": "You watch.",
            "tools": "[]",
        },
        [
            system("You watch."),
            user([video("fall.mp4"), image("a.jpg"), text("What happens?")]),
            assistant("It falls."),
        ],
        {},
    ),
    "llama-factory, messages with from and value": (
        LLAVA,
        {"messages": [turn("human", "<image>Which?"), turn("gpt", "Red.")], "images": ["a.jpg"]},
        [user([image("a.jpg"), text("Which?")]), assistant("Red.")],
        {},
    ),
    "llama-factory, a video as frames": (
        LLAVA,
        {
            "conversations": [turn("human", "<video>\nWhat?"), turn("gpt", "A fall.")],
            "videos": [["1.jpg", "2.jpg"]],
            "system": "",
        },
        [user([video(["1.jpg", "2.jpg"]), text("What?")]), assistant("A fall.")],
        {},
    ),
    "qwen2.5-vl, a video": (
        LLAVA,
        {"video": "v/5.mp4", "conversations": [turn("human", "<video>\nWhy?\nOptions:\n(A)"), turn("gpt", "(A)")]},
        [user([video("v/5.mp4"), text("Why?\nOptions:\n(A)")]), assistant("(A)")],
        {},
    ),
    "qwen2.5-vl, data_path": (
        LLAVA,
        {
            "images": ["cats/1.jpg", "https://example.org/2.jpg"],
            "data_path": "all/",
            "conversations": [turn("human", "<image>\n<image>\nDiffer?"), turn("gpt", '{"bbox_2d": [1, 2, 3, 4]}')],
        },
        [
            user([image("all/cats/1.jpg"), image("https://example.org/2.jpg"), text("Differ?")]),
            assistant('{"bbox_2d": [1, 2, 3, 4]}'),
        ],
        {},
    ),
    "qwen-vl": (
        QWEN_VL,
        {
            "id": "identity_1",
            "conversations": [
                turn("user", "Picture 1: <img>dogs/1.jpg</img>\n图中的狗是什么品种？"),
                turn("assistant", "拉布拉多。"),
                turn("user", "框出格子衬衫"),
                turn("assistant", "<ref>格子衬衫</ref><box>(588,499),(725,789)</box>"),
            ],
        },
        [
            user([image("dogs/1.jpg"), text("图中的狗是什么品种？")]),
            assistant("拉布拉多。"),
            user("框出格子衬衫"),
            assistant(
                "<|object_ref_start|>格子衬衫<|object_ref_end|><|box_start|>(588,499),(725,789)<|box_end|>",
            ),
        ],
        {"id": 1, "the label 'Picture 1:' of the only picture": 1},
    ),
    "qwen-vl, numbered pictures": (
        QWEN_VL,
        {
            "conversations": [
                turn("user", "Picture 1: <img>a.jpg</img>\nPicture 2: <img>http://x.org/b.jpg</img>\nWhich?"),
                turn("assistant", "Picture 2."),
            ]
        },
        [
            user(
                [text("Picture 1: "), image("a.jpg"), text("Picture 2: "), image("http://x.org/b.jpg"), text("Which?")]
            ),
            assistant("Picture 2."),
        ],
        {},
    ),
    "trl": (
        HUGGING_FACE,
        {
            "messages": [
                system([text("Look.")]),
                user([{"type": "image"}, {"type": "image", "text": None}, text("Which is red?")]),
                assistant([{"type": "text", "text": "The first.", "index": None}]),
            ],
            "images": ["a.png", {"bytes": b"..", "path": "b.png"}],
        },
        [
            system("Look."),
            user([image("a.png"), image({"bytes": b"..", "path": "b.png"}), text("Which is red?")]),
            assistant("The first."),
        ],
        {},
    ),
    "trl, contents of text": (
        HUGGING_FACE,
        {"messages": [user("What?"), assistant("A bus.")], "images": ["a.png", "b.png"], "source": "web"},
        [user([image("a.png"), image("b.png"), text("What?")]), assistant("A bus.")],
        {"source": 1},
    ),
    "huggingface, an index": (
        HUGGING_FACE,
        {
            "messages": [
                user(
                    [
                        {"index": 1, "text": None, "type": "image"},
                        {"index": None, "text": "Or", "type": "text"},
                        {"index": 0, "text": None, "type": "image"},
                    ]
                ),
                ANSWER,
            ],
            "images": ["a.png", "b.png"],
        },
        [user([image("b.png"), text("Or"), image("a.png")]), ANSWER],
        {},
    ),
    "transformers, images inside": (
        HUGGING_FACE,
        {
            "messages": [
                user([{"type": "image", "url": "http://x.org/a.png"}, {"type": "video", "path": "v.mp4"}]),
                ANSWER,
            ]
        },
        [user([image("http://x.org/a.png"), video("v.mp4")]), ANSWER],
        {},
    ),
    "openai": (
        OPENAI,
        {
            "messages": [
                {"role": "developer", "content": "You know cheeses."},
                {
                    "role": "user",
                    "content": [text("What is this cheese?"), part("https://example.org/danbo.jpg", detail="low")],
                    "name": "ada",
                },
                {"role": "assistant", "content": "Danbo", "weight": 1, "refusal": None},
            ],
            "parallel_tool_calls": False,
        },
        [
            system("You know cheeses."),
            user([text("What is this cheese?"), image("https://example.org/danbo.jpg")]),
            assistant("Danbo"),
        ],
        {"image_url.detail": 1, "messages[].name": 1, "parallel_tool_calls": 1},
    ),
    "openai, embedded": (
        OPENAI,
        {"messages": [user([part("data:image/png;base64,iVBORw0KGgo="), text("What?")]), assistant([text("A dot.")])]},
        [user([image("data:image/png;base64,iVBORw0KGgo="), text("What?")]), assistant("A dot.")],
        {},
    ),
    "ours": (
        OWN,
        {
            "messages": [
                user([{"type": "image", "image": "a.png", "max_pixels": 9000, "text": None}, text("A")]),
                ANSWER,
            ],
            "kind": "colour",
        },
        [user([{"type": "image", "image": "a.png", "max_pixels": 9000}, text("A")]), ANSWER],
        {},
    ),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_a_sample_written_by_hand(case):
    name, entry, messages, dropped = SAMPLES[case]
    assert detect(entry) == name
    counted, before = Counter(), copy.deepcopy(entry)
    found, sample = import_entry(entry, counted)
    assert found == name
    assert sample.pop("kind", None) == entry.get("kind")
    assert sample == {"messages": messages}
    assert counted == dropped
    assert entry == before, "an importer changes nothing of what it reads"
    if name != OWN:
        assert IMPORTERS[name](entry, Counter()) == {"messages": messages}


def test_our_format_is_not_taken_for_another():
    for entry in (
        {"messages": [user("Hi"), assistant("Hello")]},
        {"messages": [user([{"image": "a.png"}, {"text": "What?"}]), ANSWER]},
        {"messages": [user([video(["1.png", "2.png"]), text("What of <image>?")]), ANSWER], "name": "a set", "id": 3},
    ):
        assert detect(entry) == OWN
        assert import_entry(entry, Counter())[1] == {"messages": entry["messages"]}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "text",
        [],
        [1],
        {},
        {"messages": "Hi"},
        {"messages": ["Hi"]},
        {"conversations": None},
        {"conversations": [{"text": "Hi"}]},
        {"image": "a.png"},
        {"caption": "A wave."},
        {"image": "a.png", "chosen": "A wave.", "rejected": "A cat."},
        [{"messages": [user("Hi"), ANSWER]}, {"conversations": [turn("human", "Hi")]}],
    ],
)
def test_what_is_in_no_known_format(entry):
    assert detect(entry) is None
    with pytest.raises(DataError, match=r"in none of the known formats \(python -m util convert --help lists them\), "):
        import_entry(entry, Counter())


# ---- back ------------------------------------------------------------------------------------------------------------


def contents(message: dict) -> list[dict]:
    return [text(message["content"])] if isinstance(message["content"], str) else message["content"]


def media_of(sample: dict, kind: str) -> list:
    return [item[kind] for message in sample["messages"] for item in contents(message) if kind in item]


def to_llava(sample: dict, chance: random.Random | None = None) -> dict:
    """LLaVA's way of writing: every marker has a line of its own."""
    messages, entry = list(sample["messages"]), {}
    if chance and chance.random() < 0.5 and messages[0]["role"] == "system":
        entry["system"] = messages.pop(0)["content"]
    turns = []
    for message in messages:
        value, after_text = "", False
        for item in contents(message):
            if "text" in item:
                value, after_text = value + item["text"], True
            else:
                value, after_text = value + "\n" * after_text + f"<{item['type']}>\n", False
        turns.append((message["role"], value))
    for kind in ("image", "video"):
        if found := media_of(sample, kind):
            single = len(found) == 1 and isinstance(found[0], str)
            entry |= {kind: found[0]} if single else {f"{kind}s": found}
    if chance and chance.random() < 0.5 and (entry.keys() & {"image", "images", "video", "videos"}):
        return {**entry, "messages": [{"role": role, "content": value} for role, value in turns]}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {**entry, "conversations": [turn(names[role], value) for role, value in turns]}


def to_qwen_vl(sample: dict) -> dict:
    turns = []
    for message in sample["messages"]:
        value = "".join(
            item["text"] if "text" in item else f"\n<img>{item['image']}</img>\n" for item in contents(message)
        )
        for name, mark in (("object_ref", "ref"), ("box", "box"), ("quad", "quad")):
            value = value.replace(f"<|{name}_start|>", f"<{mark}>").replace(f"<|{name}_end|>", f"</{mark}>")
        turns.append(turn(message["role"], value))
    return {"conversations": turns}


def to_hugging_face(sample: dict) -> dict:
    """As Arrow gives rows back: every item has the keys of all."""
    messages = [
        {
            "role": message["role"],
            "content": [{"type": item["type"], "text": item.get("text")} for item in contents(message)],
        }
        for message in sample["messages"]
    ]
    return {"messages": messages, "images": media_of(sample, "image"), "videos": media_of(sample, "video")}


def to_openai(sample: dict) -> dict:
    def item_of(item: dict) -> dict:
        kind = item["type"]
        return item if kind == "text" else {"type": f"{kind}_url", f"{kind}_url": {"url": item[kind]}}

    messages = [
        {"role": message["role"], "content": [item_of(item) for item in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in sample["messages"]
    ]
    return {"messages": messages}


def test_back_to_the_entries_written_by_hand():
    """Exported again, each sample means what its entry meant: the same entry, where the format leaves one way only."""

    def entry_of(case: str) -> dict:
        return {key: value for key, value in SAMPLES[case][1].items() if value is not None and key != "id"}

    for case in ("llava", "qwen2.5-vl, a video", "llama-factory, a video as frames"):
        _, sample = import_entry(SAMPLES[case][1], Counter())
        assert to_llava(sample) == {key: value for key, value in entry_of(case).items() if value != ""}, case
    _, sample = import_entry(SAMPLES["openai, embedded"][1], Counter())
    exported = to_openai(sample)["messages"]
    assert exported[0] == SAMPLES["openai, embedded"][1]["messages"][0]
    assert exported[1]["content"] == "A dot."
    _, sample = import_entry(SAMPLES["trl"][1], Counter())
    exported = to_hugging_face(sample)
    assert exported["images"] == SAMPLES["trl"][1]["images"]
    assert [[item["type"] for item in message["content"]] for message in exported["messages"]] == [
        [item["type"] for item in message["content"]] for message in SAMPLES["trl"][1]["messages"]
    ]
    _, sample = import_entry(SAMPLES["qwen-vl"][1], Counter())
    answers = [turn["value"] for turn in to_qwen_vl(sample)["conversations"]][1::2]
    assert answers == [turn["value"] for turn in SAMPLES["qwen-vl"][1]["conversations"]][1::2]


WORDS = [
    "What",
    " is",
    "\n",
    "\n\n",
    " ",
    "图",
    "é",
    "<",
    ">",
    "<b>",
    "</b",
    "{}",
    "\t",
    "&amp;",
    '"',
    "\\n",
    "Picture 1",
]


def random_text(chance: random.Random) -> str:
    return "".join(chance.choices(WORDS, k=chance.randint(1, 6)))


def random_sample(chance: random.Random, kinds: list[str], frames: bool) -> dict:
    """A conversation in the simplest form: no two texts in a row, a lone text as a string."""
    messages = [system(random_text(chance))] if chance.random() < 0.3 else []
    for _ in range(chance.randint(1, 3)):
        items: list[dict] = []
        for _ in range(chance.randint(1, 5)):
            kind = chance.choice(kinds)
            if kind == "text" and not (items and "text" in items[-1]):
                items.append(text(random_text(chance)))
            elif kind != "text":
                path = f"{chance.randint(0, 99)}.{'png' if kind == 'image' else 'mp4'}"
                as_frames = kind == "video" and frames and chance.random() < 0.3
                items.append({"type": kind, kind: ["1.png", path] if as_frames else path})
        box = "<|object_ref_start|>a bus<|object_ref_end|><|box_start|>(0,12),(345,999)<|box_end|>"
        lone = len(items) == 1 and "text" in items[0]
        messages.append(user(items[0]["text"] if lone else items))
        messages.append(assistant("It" + random_text(chance) + box * (chance.random() < 0.3)))
    return {"messages": messages}


def test_there_and_back():
    chance = random.Random(0)
    kinds = ["text", "image", "video"]
    exports = {
        LLAVA: (lambda sample: to_llava(sample, chance), kinds, True),
        QWEN_VL: (to_qwen_vl, ["text", "image"], False),
        HUGGING_FACE: (to_hugging_face, kinds, True),
        OPENAI: (to_openai, kinds, False),
        OWN: (lambda sample: sample, kinds, True),
    }
    for name, (export, allowed, frames) in [*exports.items()] * 300:
        sample = random_sample(chance, allowed, frames)
        entry = json.loads(json.dumps(export(sample)))
        found, again = import_entry(entry, Counter())
        if found == OWN:  # there are no media to tell by; contents stay as they are written
            again = {"messages": [{**m, "content": simplest(contents(m))} for m in again["messages"]]}
        assert again == sample, name
        if media_of(sample, "image") + media_of(sample, "video"):
            assert found == name


# ---- what is refused -------------------------------------------------------------------------------------------------

TOOL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HELLO = [turn("human", "Hi"), turn("gpt", "Hello")]
REFUSALS = [
    ({"conversations": []}, ": 'conversations' must be a list of at least one turn"),
    ({"messages": []}, ": 'messages' must be a list of at least one turn"),
    ({"conversations": [turn("human", "Hi")]}, ": ends with a user message, so nothing is supervised; add the answer"),
    (
        {"conversations": HELLO[1:]},
        ", message 0: an assistant message must follow a user message, follows nothing; add",
    ),
    (
        {"conversations": [turn("system", "S"), HELLO[1]]},
        ", message 1: an assistant message must follow a user message, follows system",
    ),
    (
        {"system": "S", "conversations": [HELLO[0], HELLO[0], HELLO[1]]},
        ", message 1: two user messages in a row; join them (--join_turns does)",
    ),
    ({"conversations": [*HELLO, HELLO[1]]}, ", message 2: two assistant messages in a row"),
    ({"conversations": [HELLO[0], turn("gpt", " \n")]}, ", message 1: an empty assistant message"),
    ({"messages": [user("Hi"), assistant([])]}, ", message 1: an empty assistant message"),
    ({"conversations": [*HELLO, turn("system", "S")]}, ", message 2: a system message can only be the first one; move"),
    ({"conversations": [turn("alien", "Hi"), HELLO[1]]}, ", message 0: unknown role 'alien'; known are system, "),
    ({"conversations": [turn(None, "Hi"), turn("gpt", "A")]}, ", message 0: unknown role None"),
    ({"conversations": [*HELLO, turn("observation", "42")]}, ": ends with a tool message, so nothing is supervised"),
    (
        {"conversations": [turn("human", "Hi"), turn("function_call", "f(1)"), turn("observation", "4"), HELLO[1]]},
        ", message 1: a turn of calls is JSON {'name': ..., 'arguments': ...}; repair it",
    ),
    ({"conversations": [turn("human", 3), HELLO[1]]}, ", message 0: 'value' must be text, is int; write"),
    ({"conversations": HELLO, "image": "a.jpg"}, ": 0 <image> markers for 1 image; each image needs its place"),
    ({"conversations": [turn("human", "<image>"), HELLO[1]]}, ": 1 <image> marker for 0 images"),
    ({"messages": [user("<video>What?"), ANSWER]}, ": 1 <video> marker for 0 videos"),
    (
        {"conversations": [turn("human", "<image>\n<image>"), HELLO[1]], "images": ["a.jpg"]},
        ": 2 <image> markers for 1 image",
    ),
    (
        {"conversations": [turn("human", "<image>"), HELLO[1]], "image": "a.jpg", "images": ["a.jpg"]},
        ": has both 'image' and 'images'",
    ),
    (
        {"conversations": [HELLO[0], turn("gpt", "<image>")], "image": "a.jpg"},
        ", message 1: only a user message can hold an image or a video; move the image into one",
    ),
    ({"conversations": HELLO, "tools": '[{"title": "f"}]'}, ": tool 0 has no function with a name; 'tools' is a list"),
    ({"conversations": HELLO, "audios": ["a.wav"]}, ": has 'audios': the model does not hear"),
    ({"conversations": HELLO[:1], "chosen": HELLO[1], "rejected": HELLO[1]}, ": has 'chosen': preferences cannot"),
    ({"conversations": HELLO, "system": ["S"]}, ": 'system' must be text, is list"),
    ({"conversations": [turn("system", "S"), *HELLO], "system": "T"}, ": has a key 'system' and a system message"),
    (
        {"conversations": [turn("user", "Hi"), turn("assistant", "<box>(1,2)</box>")]},
        ", message 1: a <box> that is not",
    ),
    (
        {"conversations": [turn("user", "Hi"), turn("assistant", "<ref>a</ref><box>(1,2),(3,1000)</box>")]},
        ", message 1: a <box> that is not <box>(x1,y1),(x2,y2)</box> with coordinates in [0, 1000); repair it",
    ),
    ({"conversations": [turn("user", "<ref>a"), turn("assistant", "A")]}, ", message 0: a <ref> that is not"),
    (
        {"conversations": [turn("user", "Hi"), turn("assistant", "<img>a.jpg</img>")]},
        ", message 1: only a user message can hold an image",
    ),
    (
        {"messages": [user([{"type": "image"}, text("A")]), ANSWER], "images": ["a", "b"]},
        ": 1 {'type': 'image'} item for 2 images",
    ),
    ({"messages": [user([{"type": "image"}]), ANSWER]}, ": 1 {'type': 'image'} item for 0 images"),
    ({"messages": [user([text("A")]), ANSWER], "images": ["a"]}, ": 0 {'type': 'image'} items for 1 image"),
    (
        {"messages": [user([{"type": "image", "index": 2}]), ANSWER], "images": ["a"]},
        ", message 0: index 2, but the sample has 1 images",
    ),
    (
        {"messages": [user([{"type": "image"}, {"type": "sound"}]), ANSWER], "images": ["a"]},
        ", message 0: an item has a",
    ),
    (
        {"messages": [user([{"type": "image"}, {"type": "text"}]), ANSWER], "images": ["a"]},
        ", message 0: an item of type",
    ),
    (
        {"messages": [user(None), ANSWER], "images": ["a"]},
        ", message 0: content must be text or a list of items, is None",
    ),
    (
        {"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        ", message 1: a call without a function's name; a tool call is {'type': 'function',",
    ),
    (
        {"messages": [user("Hi"), {"role": "tool", "content": "42"}, ANSWER]},
        ", message 1: a tool's message must follow",
    ),
    (
        {"messages": [user([{"type": "image"}]), {**ANSWER, "tool_calls": [TOOL]}], "images": ["a"]},
        ", message 1: has 'tool_calls': of this format no tools are read; write the sample as OpenAI chat does",
    ),
    (
        {"messages": [user("Hi"), ANSWER], "tools": [TOOL], "functions": [TOOL]},
        ": has both 'tools' and 'functions'; keep one of them",
    ),
    ({"messages": [user("Hi"), {**ANSWER, "weight": -1}]}, ", message 1: weight must be a number, 0 or from"),
    ({"messages": [user("Hi"), {**ANSWER, "refusal": "No."}]}, ", message 1: has 'refusal': an answer stands in"),
    ({"messages": [user([part("")]), ANSWER]}, ", message 0: image_url holds no url"),
    (
        {"messages": [user([part("a"), {"type": "input_audio"}]), ANSWER]},
        ", message 0: an item is text or image_url, is",
    ),
    ({"messages": [user("Hi"), assistant([part("a")])]}, ", message 1: only a user message can hold an image"),
    (
        {"messages": [user([image("a"), {"type": "sound"}]), ANSWER]},
        ", message 0: an item has a key text, image or video",
    ),
]


@pytest.mark.parametrize(("entry", "message"), REFUSALS)
def test_a_refusal_names_message_rule_and_fix(entry, message):
    dropped: Counter = Counter()
    with pytest.raises(DataError) as error:
        import_entry({"id": 1, **entry}, dropped)
    assert message in str(error.value)
    assert ";" in str(error.value) or "Rename" in str(error.value), "the fix"
    assert not dropped, "nothing of it is written, so nothing of it is dropped"


F = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOL_SAMPLES = {
    "openai": (
        {"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [TOOL]},
                      {"role": "tool", "tool_call_id": "1", "content": "4"}, ANSWER], "tools": [F]},
        [user("Hi"), {"role": "assistant", "content": "", "tool_calls": [TOOL]},
         {"role": "tool", "content": "4", "tool_call_id": "1"}, ANSWER],
    ),
    "openai, the older names": (
        {"messages": [user("Hi"), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"x": 1}}},
                      {"role": "function", "content": "4"}, ANSWER], "functions": [F["function"]]},
        [user("Hi"), CALLING, {"role": "tool", "content": "4"}, ANSWER],
    ),
    "sharegpt of llama-factory": (
        {"conversations": [turn("human", "<image>Hi"), turn("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                           turn("observation", "<image>4"), turn("gpt", "Yes.")],
         "images": ["a.png", "b.png"], "tools": json.dumps([F["function"]])},
        [user([image("a.png"), text("Hi")]), CALLING, {"role": "tool", "content": [image("b.png"), text("4")]}, ANSWER],
    ),
    "ours": (
        {"messages": [user([image("a.png"), text("Hi")]), CALLING, {"role": "tool", "content": [image("b.png")]},
                      {"role": "tool", "content": "4"}, ANSWER], "tools": [F]},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOOL_SAMPLES)
def test_tools_are_kept(case):
    entry, messages = TOOL_SAMPLES[case]
    if case == "ours":
        entry["messages"][1] = {**CALLING, "tool_calls": CALLING["tool_calls"] * 2}
    _, sample = import_entry(copy.deepcopy(entry), Counter(), join_turns=case == "ours")
    assert sample == {"messages": messages or entry["messages"], "tools": [F]}


def test_messages_with_calls_are_not_joined():
    with pytest.raises(DataError, match="message 2: two assistant messages in a row"):
        import_entry({"messages": [user("Hi"), CALLING, ANSWER]}, Counter(), join_turns=True)


def test_boxes_of_our_own_format_are_kept():
    box = {"type": "box", "label": "dog", "bbox": [1, 2, 3, 4]}
    entry = {"messages": [user([image("a.png"), text("Where?")]), assistant([box])]}
    assert import_entry(entry, Counter()) == (OWN, entry)


def test_turns_of_the_same_role_are_joined_when_asked_for():
    """The sample of OpenAI's own guide puts the question and the image into two user messages."""
    entry = {
        "messages": [user("What is it?"), user([part("https://example.org/a.jpg")]), assistant("A"), assistant("bus.")]
    }
    with pytest.raises(DataError, match="message 1: two user messages in a row; join them"):
        import_entry(entry, Counter())
    _, sample = import_entry(entry, Counter(), join_turns=True)
    assert sample["messages"] == [user([text("What is it?"), image("https://example.org/a.jpg")]), assistant("A\nbus.")]
    entry = {"messages": [user([image("a"), text("One")]), user("Two"), user([image("b")]), ANSWER]}
    _, sample = import_entry(entry, Counter(), join_turns=True)
    assert sample["messages"][0] == user([image("a"), text("One"), text("\n"), text("Two"), image("b")])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of the files to convert, with in/photos/*.png; the current folder is another one."""
    here, there = tmp_path / "current", tmp_path / "in"
    (there / "photos").mkdir(parents=True)
    here.mkdir()
    for name, colour in (("red", "red"), ("blue", "blue")):
        (there / "photos" / f"{name}.png").write_bytes(png(colour))
    monkeypatch.chdir(here)
    return there


def write(path: Path, entries: list) -> str:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in entries) if lines else json.dumps(entries), encoding="utf-8")
    return str(path)


def read(path: Path) -> list:
    content = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)


def asking(path: str) -> dict:
    return {"id": 1, "image": path, "conversations": [turn("human", "<image>\nWhich colour?"), turn("gpt", "Red.")]}


def test_converted_files_load(folder, tmp_path, processor):
    from util.dataset import load_examples

    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    mixed = [
        asking("photos/red.png"),
        {"conversations": [turn("user", "<img>photos/red.png</img>\n颜色？"), turn("assistant", "<ref>红</ref>")]},
        {"messages": [user([{"type": "image"}, text("Which?")]), ANSWER], "images": ["photos/blue.png"]},
        {"messages": [user([text("Which?"), part(data)]), ANSWER]},
        {"messages": [user([image("photos/blue.png"), text("Which?")]), ANSWER], "kind": "colour"},
    ]
    one, two = write(folder / "a.json", mixed), write(folder / "b.jsonl", mixed[:1])
    for name in ("data.json", "data.jsonl"):
        output = tmp_path / "out" / "deep" / name
        printed = convert([one, two], str(output))
        assert printed.splitlines() == [
            f"{one}: 5 samples, 1 ShareGPT / LLaVA, 1 Qwen-VL, 1 Hugging Face datasets, 1 OpenAI chat, "
            "1 already in this project's format",
            f"{two}: 1 sample, ShareGPT / LLaVA",
            "left out, as training does not use it: id (2)",
            f"wrote {output}: 6 samples, 6 images",
            f"look at one: python -m util show {output}",
        ]
        assert read(output)[0]["messages"][0]["content"] == [image("../../in/photos/red.png"), text("Which colour?")]
        examples = load_examples([str(output)], processor)
        assert [os.path.basename(example.media[0]["image"]) for example in examples][:3] == ["red.png"] * 2 + [
            "blue.png"
        ]
        assert examples[3].media[0]["image"] == data
        assert examples[4].kind == "colour"
        assert sorted(path.name for path in output.parent.iterdir()) == [name]
        output.unlink()


def test_paths(folder, tmp_path):
    """Relative to the output's folder where a file is found, below --media_root where one is named, else as written."""
    absolute, output = str(folder / "photos" / "red.png"), tmp_path / "out.json"
    Path("here.png").write_bytes(png())
    paths = [
        "photos/red.png",
        absolute,
        f"file://{absolute}",
        "https://x.org/a.png",
        "s3://b/a.png",
        "here.png",
        "gone.png",
    ]
    source = write(folder / "a.json", [asking(path) for path in paths])
    printed = convert([source], str(output))
    found = [sample["messages"][0]["content"][0]["image"] for sample in read(output)]
    assert found == ["in/photos/red.png", *paths[1:5], "current/here.png", "gone.png"]
    assert "not found: 1 media file (gone.png); --media_root names the folder they lie in" in printed

    source = write(folder / "b.json", [asking("red.png"), asking("gone.png"), asking("https://x.org/a.png")])
    printed = convert([source], str(output), media_root=str(folder / "photos"), overwrite=True)
    found = [sample["messages"][0]["content"][0]["image"] for sample in read(output)]
    assert found == ["in/photos/red.png", "in/photos/gone.png", "https://x.org/a.png"]
    assert "not found: 1 media file (gone.png)" in printed
    convert([source], str(output), media_root="s3://bucket/all/", overwrite=True)
    found = [sample["messages"][0]["content"][0]["image"] for sample in read(output)]
    assert found == ["s3://bucket/all/red.png", "s3://bucket/all/gone.png", "https://x.org/a.png"]


def test_links(folder, tmp_path):
    """A relative path holds where the folders are links; a linked file keeps its own name."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "blob").write_bytes(png())
    (tmp_path / "linked").symlink_to(tmp_path / "disk" / "deep")
    (folder / "photos" / "link.png").symlink_to(tmp_path / "disk" / "deep" / "blob")
    convert([write(folder / "a.json", [asking("photos/link.png")])], str(tmp_path / "linked" / "out.json"))
    path = read(tmp_path / "linked" / "out.json")[0]["messages"][0]["content"][0]["image"]
    assert path == "../../in/photos/link.png"
    assert (tmp_path / "linked" / path).read_bytes() == png()


def rows() -> list[dict]:
    """Rows as Arrow gives them: two that share an image, one JPEG."""
    red, blue = png("red"), png("blue", "JPEG")
    return [
        {"messages": [user([{"type": "image", "text": None}, text("A?")]), assistant([text("Red.")])], "images": [held]}
        for held in ({"bytes": red, "path": "x.png"}, {"bytes": blue, "path": None}, {"bytes": red, "path": None})
    ]


def check_rows(output: Path, printed: str) -> None:
    names = [f"{hashlib.sha256(content).hexdigest()[:32]}" for content in (png("red"), png("blue", "JPEG"))]
    red, blue = f"out_media/{names[0]}.png", f"out_media/{names[1]}.jpg"
    found = [sample["messages"] for sample in read(output)]
    assert found == [[user([image(path), text("A?")]), assistant("Red.")] for path in (red, blue, red)]
    assert (output.parent / red).read_bytes() == png("red")
    assert (output.parent / blue).read_bytes() == png("blue", "JPEG")
    assert sorted(path.name for path in (output.parent / "out_media").iterdir()) == sorted([red[10:], blue[10:]])
    assert f"wrote {output}: 3 samples, 3 images, 2 new files in {output.parent / 'out_media'}" in printed


def test_images_given_as_bytes_become_files(tmp_path, monkeypatch):
    monkeypatch.setattr("util.formats.convert.open_source", lambda *given: (3, iter(rows())))
    output = tmp_path / "out.jsonl"
    check_rows(output, convert(["rows"], str(output)))
    red = next((tmp_path / "out_media").glob("*.png"))
    red.write_bytes(b"another's")
    printed = convert(["rows"], str(output), overwrite=True)
    assert red.read_bytes() == b"another's", "a file that is there is not written again"
    assert "new files" not in printed

    picture = Image.new("RGB", (30, 30), "green")
    held = [{"messages": [user("A?"), ANSWER], "images": [picture]}]
    monkeypatch.setattr("util.formats.convert.open_source", lambda *given: (1, iter(held)))
    convert(["rows"], str(tmp_path / "pil.json"))
    path = tmp_path / read(tmp_path / "pil.json")[0]["messages"][0]["content"][0]["image"]
    assert Image.open(path).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        ({"bytes": b"no image", "path": None}, ", message 0: 8 bytes that are no image; repair the sample"),
        ({"bytes": "iVBO", "path": None}, ", message 0: 3 bytes that are no image; repair the sample"),
        (
            {"bytes": "no base64!", "path": None},
            ", message 0: 'bytes' must be bytes, base64 or a list of numbers below",
        ),
        (
            {"bytes": [1, 256], "path": None},
            ", message 0: 'bytes' must be bytes, base64 or a list of numbers below 256",
        ),
        (
            {"bytes": 7, "path": None},
            ", message 0: 'bytes' must be bytes, base64 or a list of numbers below 256, is '7'",
        ),
        ({"bytes": None, "path": None}, ", message 0: image must be a path, is 'None'; name the file"),
        (7, ", message 0: image must be a path, is '7'"),
        ("a\0b", ", message 0: image must be a path"),
    ],
)
def test_media_that_are_none(tmp_path, monkeypatch, medium, message):
    """What was written before the mistake was found is taken back."""
    entries = [*rows(), {"messages": [user("A?"), ANSWER], "images": [medium]}]
    monkeypatch.setattr("util.formats.convert.open_source", lambda *given: (4, iter(entries)))
    with pytest.raises(DataError) as error:
        convert(["rows"], str(tmp_path / "out.json"))
    assert str(error.value).startswith(f"rows, sample 3{message}")
    assert not list(tmp_path.iterdir())


def test_parquet(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / "rows.parquet")
    printed = convert([str(folder / "rows.parquet")], str(tmp_path / "out.json"))
    assert printed.startswith(f"{folder / 'rows.parquet'}: 3 samples, Hugging Face datasets\n")
    check_rows(tmp_path / "out.json", printed)
    (folder / "bad.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        convert([str(folder / "bad.parquet")], str(tmp_path / "none.json"))


def test_a_folder_of_save_to_disk(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows_of = datasets.Dataset.from_list(rows()).cast_column("images", datasets.Sequence(datasets.Image()))
    datasets.DatasetDict({"train": rows_of}).save_to_disk(folder / "saved")
    printed = convert([str(folder / "saved" / "train")], str(tmp_path / "out.json"))
    check_rows(tmp_path / "out.json", printed)
    with pytest.raises(DataError, match=r"saved: holds the splits train; name one, such as .*saved/train"):
        convert([str(folder / "saved")], str(tmp_path / "none.json"))


def test_packages_that_are_missing_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (folder / "rows.parquet").write_bytes(b"")
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("{}")
    for name, package in (("rows.parquet", "pyarrow"), ("saved", "datasets")):
        with pytest.raises(UserError, match=f"needs the package {package}: pip install {package}"):
            convert([str(folder / name)], str(tmp_path / "out.json"))
    (folder / "empty").mkdir()
    with pytest.raises(
        DataError, match="empty: a folder without pictures, videos or a dataset of save_to_disk; name the"
    ):
        convert([str(folder / "empty")], str(tmp_path / "out.json"))


def test_bad_samples_stop_it_all_or_are_listed(folder, tmp_path, capsys):
    good, bad = asking("photos/red.png"), {"conversations": HELLO[1:]}
    source, output = write(folder / "a.jsonl", [good, bad, good, {"messages": "?"}]), tmp_path / "out.jsonl"
    with open(source, "a", encoding="utf-8") as handle:
        handle.write(
            "{broken\n" + '{"conversations": [{"from": "human", "value": "\\ud800"}, ' + json.dumps(HELLO[1]) + "]}"
        )
    reasons = [
        f"{source}, sample 1, message 0: an assistant message must follow a user message, follows nothing; "
        "add the question or take the answer out",
        f"{source}, sample 3: in none of the known formats (python -m util convert --help lists them), "
        "is a dictionary with ['messages']; write it as {'messages': [...]}",
        f"{source}, line 5: not valid JSON (Expecting property name enclosed in double quotes)",
        f"{source}, sample 5, message 0: text holds half of a surrogate pair, which is no character; repair the file",
    ]
    with pytest.raises(DataError) as error:
        convert([source], str(output))
    last = "4 of 6 samples cannot be converted, so nothing is written; --skip_bad leaves them out"
    assert str(error.value).splitlines() == [*reasons, last]
    assert not list(tmp_path.glob("*out*"))

    printed = convert([source], str(output), skip_bad=True)
    assert printed.startswith(f"{source}: 2 samples, ShareGPT / LLaVA, 4 skipped\n")
    assert capsys.readouterr().err.splitlines() == [f"skipped: {reason}" for reason in reasons]
    assert len(read(output)) == 2

    many = write(folder / "many.json", [bad] * 25)
    with pytest.raises(DataError, match=r"sample 19.*\n\.\.\. and 5 more\n25 of 25 samples"):
        convert([many], str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="no samples left, so nothing is written"):
        convert([many], str(tmp_path / "none.json"), skip_bad=True)
    with pytest.raises(DataError, match="no samples, so nothing is written"):
        convert([write(folder / "empty.json", [])], str(tmp_path / "none.json"))
    assert not (tmp_path / "none.json").exists()


def test_files_of_other_shapes(folder, tmp_path):
    """Lines in a file named .json; samples that Qwen's pack_data.py put into lists."""
    good = asking("photos/red.png")
    (folder / "lines.json").write_text(f"{json.dumps(good)}\n{json.dumps(good)}\n")
    packed = write(folder / "packed.json", [[good, good], [good], [good, {"conversations": HELLO[1:]}]])
    output = tmp_path / "out.json"
    printed = convert([str(folder / "lines.json")], str(output))
    assert printed.startswith(f"{folder / 'lines.json'}: 2 samples, ShareGPT / LLaVA\n")
    assert detect([good, good]) == LLAVA
    with pytest.raises(DataError, match=r"packed\.json, sample 2, part 1, message 0: an assistant message"):
        convert([packed], str(output), overwrite=True)
    assert len(read(output)) == 2, "the file that was there stays"
    assert "packed.json: 4 samples, ShareGPT / LLaVA, 1 skipped" in convert(
        [packed], str(output), skip_bad=True, overwrite=True
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.json", r"a\.json: exists, and the last name is the file to write; name another, or give --overwrite"),
        ("data.txt", r"data\.txt: the last name is the file to write, a \.json or \.jsonl"),
        ("photos.json", r"photos\.json: the last name is the file to write, and this is a folder"),
    ],
)
def test_a_file_that_cannot_be_written(folder, name, message):
    (folder / "photos.json").mkdir()
    source, other = (write(folder / name, [asking("photos/red.png")]) for name in ("b.json", "a.json"))
    with pytest.raises(UserError, match=message):
        convert([source], str(folder / name))
    assert read(Path(other)) == [asking("photos/red.png")]
    with pytest.raises(UserError, match=r"a\.json.*: cannot be read or written \("):
        convert([source], str(folder / "a.json" / "out.json"))
    with pytest.raises(UserError, match=r"b\.json: is read and would be written"):
        convert([source, other], source, overwrite=True)


@pytest.mark.parametrize("name", ["a.csv", "none.json", "none.jsonl", "none"])
def test_a_file_that_cannot_be_read(folder, tmp_path, name):
    (folder / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=re.escape(name)):
        convert([str(folder / name)], str(tmp_path / "out.json"))


def test_a_large_file_takes_little_memory(tmp_path):
    entry = {"conversations": [turn("human", "Why? " * 4000), turn("gpt", "So. " * 1000)]}
    line = json.dumps(entry) + "\n"
    source = tmp_path / "large.jsonl"
    with open(source, "w") as handle:
        for _ in range(4000):
            handle.write(line)
    assert source.stat().st_size > 90e6
    tracemalloc.start()
    try:
        convert([str(source)], str(tmp_path / "out.jsonl"))
        assert tracemalloc.get_traced_memory()[1] < 45e6
    finally:
        tracemalloc.stop()
    with open(tmp_path / "out.jsonl") as handle:
        assert sum(1 for _ in handle) == 4000


def command(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "util", "convert", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(folder, tmp_path):
    source, output = write(folder / "a.json", [asking("red.png"), {"messages": 1}]), str(tmp_path / "out.jsonl")
    code, out, error = command(source, output)
    assert (code, out) == (2, "")
    assert error.startswith(f"python -m util convert: {source}, sample 1: in none of the known formats")
    assert "Traceback" not in error

    words = (source, output, "--skip_bad", "--media_root", str(folder / "photos"))
    code, out, error = command(*words)
    assert code == 0
    assert out.startswith(f"{source}: 1 sample, ShareGPT / LLaVA, 1 skipped\n")
    assert f"skipped: {source}, sample 1" in error
    assert read(Path(output)) == [
        {"messages": [user([image("in/photos/red.png"), text("Which colour?")]), assistant("Red.")]}
    ]

    code, out, error = command(source, output, "--skip")
    assert (code, out) == (2, "")
    assert error == "python -m util convert: unrecognized arguments: --skip\n"


def test_detecting_imports_nothing_heavy():
    """util/dataset.py can ask what a file looks like at no cost."""
    code = (
        "import sys, util.formats.importers; print(sorted({'torch', 'PIL', 'transformers', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
