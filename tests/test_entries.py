"""What people bring: keys that say something and keys that do not, tags, media beside the messages, other formats.

Every sample here is given to training and to util.formats.convert, and both must say the same: what convert writes, training
takes, and what training refuses is refused in one line that says what to do.
"""

import base64
import json
import os
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.samples import assistant, entry, text, user
from util.cost.measure import measure
from util.dataset import DataError, Examples, Samples, load_examples
from util.formats.convert import convert
from util.vision import Budget

PICTURE = {"type": "image", "image": "a.png"}
QUESTION = user("What is it?")
ANSWER = assistant("A wave.")
CASES = ROOT.parent / "shared" / "cases"


@pytest.fixture
def folder(tmp_path, monkeypatch, picture) -> Path:
    """A folder with a picture, a video's name and a folder of frames; the current folder is another one."""
    for name in ("a.png", "b.png", "frames/0.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "empty").mkdir(exist_ok=True)
        Image.fromarray(picture(56, 84)).save(tmp_path / "data" / name)
    (tmp_path / "data" / "clip.mp4").write_bytes(b"looked at later")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return tmp_path / "data"


def write(folder: Path, rows: list, name: str = "data.json") -> str:
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / name)


def loaded(file: str, processor) -> tuple[list, str]:
    """The examples of a file, or why they are refused."""
    try:
        return list(load_examples([file], processor)), ""
    except DataError as error:
        return [], str(error)


def converted(file: str, processor) -> tuple[list, str]:
    """The examples of a file that convert made of it, or why it made none."""
    output = str(Path(file).parent / "converted.jsonl")
    try:
        convert([file], output, overwrite=True)
    except DataError as error:
        return [], str(error).splitlines()[0]
    examples, said = loaded(output, processor)
    assert not said, f"convert wrote what training refuses: {said}"
    return examples, ""


def content(example) -> list[list[dict]]:
    """The items of an example's messages, media by their file's name alone."""
    return [
        [{**item, item["type"]: os.path.basename(item[item["type"]])} if isinstance(item[item["type"]], str) and
         item["type"] != "text" else item for item in message["content"]]
        for message in example.messages
    ]  # fmt: skip


# ---- taken by both ---------------------------------------------------------------------------------------------------

TAKEN = {
    # name: (entry, the items of its first message or None: as they are, keys that are counted)
    "keys of a sample that say nothing": ({**entry(QUESTION, ANSWER), "id": 7, "source": "web"}, None, {"id", "source"}),
    "empty keys": (
        {**entry({**QUESTION, "loss": None, "reasoning_content": ""}, ANSWER), "images": [], "system": ""}, None, set(),
    ),
    "a name": (entry({**QUESTION, "name": "ada"}, ANSWER), None, {"messages[].name"}),
    "loss that says what is so": (
        entry({**QUESTION, "loss": False}, {**ANSWER, "loss": True, "weight": 1.0}), None,
        {"messages[].loss"},
    ),
    "a sample that counts as any": ({**entry(QUESTION, ANSWER), "weight": 1, "loss_weight": 1.0}, None, {"loss_weight"}),
    "a sample that counts for half": ({**entry(QUESTION, ANSWER), "weight": 0.5}, None, set()),
    "an answer that is not learned beside one that is": (
        entry(QUESTION, {**ANSWER, "train": False}, QUESTION, ANSWER), None, set(),
    ),
    "an answer that counts for half": (entry(QUESTION, {**ANSWER, "weight": 0.5}), None, set()),
    "detail": (entry(user([{**PICTURE, "detail": "high"}]), ANSWER), [PICTURE], {"content[].detail"}),
    "cache_control": (
        entry(user([PICTURE, {**text("What?"), "cache_control": {"type": "ephemeral"}}]), ANSWER),
        [PICTURE, text("What?")], {"content[].cache_control"},
    ),
    "one image in a list": (entry(user([{"type": "image", "image": ["a.png"]}]), ANSWER), [PICTURE], set()),
    "one video in a list": (
        entry(user([{"type": "video", "video": ["clip.mp4"], "fps": 1}]), ANSWER),
        [{"type": "video", "video": "clip.mp4", "fps": 1}], set(),
    ),
    "numbers as text": (
        entry(user([{**PICTURE, "max_pixels": "50176"}]), ANSWER), [{**PICTURE, "max_pixels": 50176}], set(),
    ),
    "a tag before its image": (
        entry(user([PICTURE, text("<image>\nWhat is it?")]), ANSWER), [PICTURE, text("What is it?")], set(),
    ),
    "tags between texts": (
        entry(user([PICTURE, {"type": "image", "image": "b.png"}, text("Is <image>\nlike <image>?")]), ANSWER),
        [text("Is "), PICTURE, text("like "), {"type": "image", "image": "b.png"}, text("?")], set(),
    ),
    "a tag in an answer is text": (entry(QUESTION, assistant("Write <video> into the page.")), None, set()),
    "media beside that the messages show": (
        {**entry(user([PICTURE]), ANSWER), "image_path": "a.png"}, [PICTURE], {"image_path"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_both_take(name, folder, processor):
    sample, first, unused = TAKEN[name]
    file = write(folder, [sample])
    (example,), said = loaded(file, processor)
    assert not said
    wanted = [text(sample["messages"][0]["content"])] if first is None else first
    assert content(example)[0] == wanted
    assert example.unused == unused
    (again,), said = converted(file, processor)
    assert not said
    assert content(again) == content(example)


def test_a_list_of_frames_with_fps_is_that_of_the_readme_of_qwen2_vl(folder, processor):
    """`fps` has no effect; `sample_fps` says when they were taken, which a model with a clock is told (test_families)."""
    item = {"type": "video", "video": ["a.png", "b.png"], "fps": 1.0, "sample_fps": "2"}
    file = write(folder, [entry(user([item, text("What?")]), ANSWER)])
    (example,), _ = loaded(file, processor)
    (again,), _ = converted(file, processor)
    for one in (example, again):
        (video,) = one.media
        assert video.keys() == {"type", "video", "sample_fps"}
        assert video["sample_fps"] == 2
        assert [os.path.basename(path) for path in video["video"]] == ["a.png", "b.png"]
    assert example.unused == {"content[].fps"}


def test_a_clock_that_the_model_does_not_read_is_said(folder, processor):
    """Of Qwen2-VL it is counted with what has no effect; the other families read it."""
    clip = {"type": "video", "video": ["a.png", "b.png"], "sample_fps": 2, "raw_fps": 24.0}
    file = write(folder, [entry(user([clip, text("What?")]), ANSWER)])
    examples = Examples([file], processor)
    for model_type, unread in (("qwen2_vl", 1), ("qwen2_5_vl", 0), ("qwen3_vl", 0)):
        found = measure(Samples(examples, processor, Budget(model_type=model_type)), 10_000).unused
        assert found == {f"content[].{key}": 1 for key in ("sample_fps", "raw_fps") if unread}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"video": "clip.mp4", "sample_fps": 2}, "sample_fps is of a list or a folder of frames; take it out"),
        ({"video": ["clip.mp4"], "raw_fps": 2}, "raw_fps is of a list or a folder of frames; take it out"),
        ({"video": ["a.png", "b.png"], "sample_fps": 0}, "sample_fps must be above 0, is 0"),
        ({"video": ["a.png", "b.png"], "raw_fps": "quick"}, "raw_fps must be a number, is 'quick'"),
        ({"image": "a.png", "sample_fps": 2}, "unknown key 'sample_fps' in an item of type image"),
    ],
    ids=str,
)
def test_a_clock_where_there_is_none_is_refused_by_name(item, message, folder, processor):
    (folder / "clip.mp4").write_bytes(b"never read")
    kind = "video" if "video" in item else "image"
    sample = entry(user([{"type": kind, **item}, text("What?")]), ANSWER)
    for said in (loaded(write(folder, [sample]), processor)[1], converted(write(folder, [sample]), processor)[1]):
        assert message in said


# ---- refused by both -------------------------------------------------------------------------------------------------

B64 = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 2).decode()
REFUSED = {
    "no answer to be learned": (entry(QUESTION, {**ANSWER, "train": False}), ": none of its answers is to be learned; take"),
    "an answer of weight 0": (entry(QUESTION, {**ANSWER, "weight": 0}), ": none of its answers is to be learned; take"),
    "a weight below 0": (entry(QUESTION, {**ANSWER, "weight": -1}), ", message 1: weight must be a number, 0 or from"),
    "a weight that is no number": (
        entry(QUESTION, {**ANSWER, "weight": "high"}), ", message 1: weight must be a number, 0 or from 1e-06 to 1,000,000",
    ),
    "a share to be trained": (
        entry(QUESTION, {**ANSWER, "train": 0.5}), ", message 1: train must be true or false, is 0.5; a number is a 'weight'",
    ),
    "a question to be learned": (
        entry({**QUESTION, "loss": True}, ANSWER), ", message 0: loss True, but only assistant messages are learned",
    ),
    "a sample of weight 0": ({**entry(QUESTION, ANSWER), "weight": 0}, ": no"),
    "thoughts": (
        entry(QUESTION, {**ANSWER, "reasoning_content": "2+2"}),
        ", message 1: has 'reasoning_content': Qwen2-VL's chat template writes no thoughts",
    ),
    "a refusal": (entry(QUESTION, {**ANSWER, "refusal": "No."}), ", message 1: has 'refusal': an answer stands in"),
    "a key of a message that nobody knows": (
        entry(QUESTION, {**ANSWER, "importance": 3}), ", message 1: unknown key importance of a message; known are",
    ),
    "a misspelt key of an item": (
        entry(user([{**PICTURE, "max_pixel": 9}]), ANSWER), ", message 0: unknown key 'max_pixel' in an item of type image",
    ),
    "preferences": (
        {**entry(QUESTION, ANSWER), "chosen": ANSWER, "rejected": ANSWER}, ": has 'chosen' beside its messages: preferences",
    ),
    "sounds": ({**entry(QUESTION, ANSWER), "audios": ["a.wav"]}, ": has 'audios' beside its messages: the model does not"),
    "objects": (
        {**entry(user([PICTURE]), ANSWER), "objects": {"ref": ["dog"]}}, ": has 'objects' beside its messages: it says",
    ),
    "a picture under any name": (
        {**entry(QUESTION, ANSWER), "picture_file": "data/1.PNG"},
        ": has a key picture_file with 'data/1.PNG', but its messages show no image or video",
    ),
    "pictures under any name": (
        {**entry(QUESTION, ANSWER), "frames": [{"path": "x/1.jpg", "bytes": None}]},
        ": has a key frames with 'x/1.jpg', but its messages show no image or video",
    ),
    "images beside items that hold theirs": (
        {**entry(user([PICTURE]), ANSWER), "images": ["a.png"]}, ": has 'images' beside its messages: media are items",
    ),
    "a tag without its image": (entry(user("<image>\nWhat?"), ANSWER), ", message 0: 1 <image> marker for 0 images"),
    "a tag in an item without its image": (
        entry(user([text("<image>\nWhat?")]), ANSWER), ", message 0: 1 <image> marker for 0 images of the message; put",
    ),
    "a tag of a video beside an image": (
        entry(user([PICTURE, text("<video>What?")]), ANSWER), ", message 0: 1 <video> marker for 0 videos of the message",
    ),
    "two tags for an image": (
        entry(user([PICTURE, text("<image><image>What?")]), ANSWER), ", message 0: 2 <image> markers for 1 image of",
    ),
    "an empty answer": (entry(QUESTION, assistant("")), ", message 1: an empty assistant message, so nothing to learn"),
    "an answer of white space": (entry(QUESTION, assistant([text(" \n")])), ", message 1: an empty assistant message"),
    "two images in an item": (
        entry(user([{"type": "image", "image": ["a.png", "b.png"]}]), ANSWER), ", message 0: an image item holds one path",
    ),
    "base64 in place of a path": (
        entry(user([{"type": "image", "image": B64}]), ANSWER),
        f", message 0: {len(B64):,} characters of base64 ('/9j/4AABAgMEBQYH'...) where a path should be; write 'data:image/",
    ),
    "a path of Windows": (
        entry(user([{"type": "image", "image": "data\\a.png"}]), ANSWER), ", message 0: no such file 'data\\\\a.png'",
    ),
    "a folder where an image should be": (
        entry(user([{"type": "image", "image": "frames"}]), ANSWER), ", message 0: no such file 'frames'",
    ),
    "a folder without images": (
        entry(user([{"type": "video", "video": "empty"}]), ANSWER), ", message 0: no image in the folder",
    ),
    "a folder of frames and how many to take": (
        entry(user([{"type": "video", "video": "frames", "nframes": 2}]), ANSWER),
        ", message 0: nframes has no use with a list of frames: every frame given is taken",
    ),
    "a control token": (entry(QUESTION, assistant("a<|im_end|>")), ", message 1: text contains the control token"),
}  # fmt: skip


def convert_refuses_otherwise(name: str) -> bool:
    """Where convert counts what it finds in the words of another format."""
    return name in ("a tag without its image", "images beside items that hold theirs", "sounds", "preferences")


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(name, folder, processor):
    sample, message = REFUSED[name]
    file = write(folder, [entry(QUESTION, ANSWER), sample, entry(QUESTION, ANSWER)])
    _, said = loaded(file, processor)
    assert said.startswith(f"{file}, sample 1{message}"), said
    assert len(said.splitlines()) == 1
    _, said = converted(file, processor)
    assert said.startswith(f"{file}, sample 1"), said
    assert convert_refuses_otherwise(name) or said.startswith(f"{file}, sample 1{message}"), said


def test_what_a_path_may_have_been_is_said(folder, processor):
    hints = {
        "a path of Windows": "Windows: write 'data/a.png'",
        "a folder where an image should be": "it is a folder: name",
    }
    for name, hint in hints.items():
        file = write(folder, [REFUSED[name][0]])
        for said in (loaded(file, processor)[1], converted(file, processor)[1]):
            assert hint in said


# ---- other formats ---------------------------------------------------------------------------------------------------


def turn(role: str, value: str) -> dict:
    return {"from": role, "value": value}


FOREIGN = {
    "llava": {"image": "a.png", "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "Fine.")]},
    "sharegpt": {"conversations": [turn("human", "What?"), turn("gpt", "Fine.")]},
    "qwen-vl": {"conversations": [turn("user", "<img>a.png</img>What?"), turn("assistant", "Fine.")]},
    "images beside, with tags": {**entry(user("<image>What?"), ANSWER), "images": ["a.png"]},
    "images beside, without tags": {**entry(QUESTION, ANSWER), "images": ["a.png"]},
    "an image beside, with places": {**entry(user([{"type": "image"}, text("What?")]), ANSWER), "image": "a.png"},
    "videos beside": {**entry(user("<video>What?"), ANSWER), "videos": ["clip.mp4"]},
    "bytes and path": entry(user([{"type": "image", "image": {"bytes": None, "path": "a.png"}}]), ANSWER),
    "openai": entry(user([{"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")]), ANSWER),
    "a system message beside": {**entry(QUESTION, ANSWER), "system": "Be brief."},
    "alpaca": {"instruction": "Say hi", "input": "", "output": "Hi"},
    "ms-swift": {"query": "<image>What?", "response": "Fine.", "images": ["a.png"]},
    "trl": {"prompt": [QUESTION], "completion": [ANSWER], "images": ["a.png"]},
    "a picture and its caption": {"image": "a.png", "caption": "A wave."},
    "llama-factory v1": entry(
        user([{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What?"}]),
        assistant([{"type": "text", "value": "Fine."}]),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_format_is_one_line_with_the_command(name, folder, processor):
    """One line for the file, however many samples it has, and the command in it works."""
    file = write(folder, [FOREIGN[name]] * 30, "my data.json")
    _, said = loaded(file, processor)
    assert len(said.splitlines()) == 1, said
    assert said.startswith(f"{file}: is in the format "), said
    assert said.endswith(f": python -m util convert {shlex.quote(file)} out.jsonl"), said
    examples, refused = converted(file, processor)
    assert (len(examples), refused) == (30, "")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_sample_of_another_format_among_others_is_named(name, folder, processor):
    file = write(folder, [entry(QUESTION, ANSWER), FOREIGN[name], entry(QUESTION, ANSWER)])
    _, said = loaded(file, processor)
    assert said.startswith(f"{file}, sample 1"), said
    assert said.endswith(f": python -m util convert {shlex.quote(file)} out.jsonl"), said


UNREAD = {
    "preferences": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preferences, which cannot be trained on"),
    "text": ({"text": "Once upon a time"}, "plain text"),
    "questions": ({"question": "Hi", "answer": "Hello"}, "questions and answers without a picture"),
    "messages as text": ({"messages": json.dumps([QUESTION, ANSWER])}, "'messages' as text, JSON inside of JSON"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_format_that_is_not_read_is_named_by_both(name, folder, processor):
    row, message = UNREAD[name]
    file = write(folder, [row] * 3)
    _, said = loaded(file, processor)
    assert said.startswith(f"{file}: holds {message}"), said
    assert len(said.splitlines()) == 1, said
    _, said = converted(file, processor)
    assert f"holds {message}" in said


def test_a_mixed_file_is_not_taken_for_another_format(folder, processor):
    """Tools in our own format are OpenAI's keys; what training takes is nobody else's."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    calling = entry(QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": "4", "tool_call_id": "1"}, ANSWER)  # fmt: skip
    examples, said = loaded(write(folder, [{**calling, "tools": tools}] * 3), processor)
    assert (len(examples), said) == (3, "")


def test_files_named_otherwise_than_they_are(folder, processor):
    one = json.dumps(entry(QUESTION, ANSWER))
    (folder / "lines.json").write_text(f"{one}\n{one}\n")
    _, said = loaded(str(folder / "lines.json"), processor)
    assert (
        said
        == f"{folder}/lines.json: each line is a sample; name it .jsonl: mv {folder}/lines.json {folder}/lines.jsonl"
    )
    for number, content in enumerate((json.dumps([json.loads(one)] * 2, indent=1), f"[{one},\n{one}]\n")):
        file = folder / f"list{number}.jsonl"
        file.write_text(content)
        for said in (loaded(str(file), processor)[1], converted(str(file), processor)[1]):
            assert said == f"{file}: one JSON list over many lines; name the file .json, or write a sample a line"


# ---- the cases that were brought -------------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
def test_each_case_ends_in_training_or_in_one_line(processor, tmp_path):
    refused = {}
    for file in sorted(CASES.glob("*.json*")):
        examples, said = loaded(str(file), processor)
        lines = said.splitlines()
        assert len(lines) == (0 if examples else 1), f"{file.name}: {said}"
        refused[file.name] = said
        output = str(tmp_path / f"{file.stem}.jsonl")
        if said and "python -m util convert" not in said and "name it .jsonl" not in said:
            with pytest.raises(DataError):
                convert([str(file)], output)
            continue
        if file.name == "vid_dir.json":  # among the frames of its folder is one of another shape
            with pytest.raises(DataError, match=r"frames/tall\.jpg: 120x160 pixels, and the first frame of its video"):
                convert([str(file)], output)
            frames = [os.path.basename(path) for path in examples[0].media[0]["video"]]
            assert frames == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "tall.jpg"]
            continue
        if file.name == "vid_frames_mixed.json":
            with pytest.raises(DataError, match=r"frames/tall\.jpg: 120x160 pixels, and the first frame of its video"):
                convert([str(file)], output)
            continue
        convert([str(file)], output)
        again, problem = loaded(output, processor)
        assert again, f"{file.name}: convert wrote what training refuses: {problem}"
    taken = {name.split(".")[0] for name, said in refused.items() if not said}
    wanted = {"fmt_image_list1", "fmt_video_list1", "fmt_item_extra_key", "fmt_item_cache_control",
              "fmt_number_string_keys", "vid_frames_fps", "vid_frames_sample_fps", "fmt_image_tag_and_item",
              "vid_dir"}  # fmt: skip
    assert wanted <= taken
    assert not taken & {"fmt_image_literal_tag", "fmt_image_literal_tag_noimg", "fmt_loss_false", "fmt_reasoning"}


# ---- tokens that were added ------------------------------------------------------------------------------------------


def test_tokens_that_are_not_special_are_text(tiny_path, folder):
    from transformers import AutoProcessor

    from util.conversation import control_tokens

    own = AutoProcessor.from_pretrained(tiny_path)
    before = control_tokens(own)
    own.tokenizer.add_tokens(["<loc_1>", "<tool_call>", "<think>"])
    own.tokenizer.add_tokens(["<steer>"], special_tokens=True)
    assert set(control_tokens(own)) == {*before, "<steer>"}
    sample = entry(user("Where?"), assistant("<think>There.</think> <loc_1> <|box_start|>(1,2),(3,4)<|box_end|>"))
    examples, said = loaded(write(folder, [sample]), own)
    assert (len(examples), said) == (1, "")
    _, said = loaded(write(folder, [entry(user("Where?"), assistant("<steer>"))]), own)
    assert "text contains the control token '<steer>'" in said


def test_the_published_tokens_that_control_stay_refused(any_processor):
    from util.conversation import control_tokens

    control = set(control_tokens(any_processor))
    assert control >= {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                       "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"}  # fmt: skip
    assert not any(token.startswith(("<|box", "<|object_ref", "<|quad")) for token in control)
