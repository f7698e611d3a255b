"""Tools, tool calls and agents' episodes, against conversations written out by hand."""

import json
import re

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.samples import assistant, entry, system, text, user
from util.cost.measure import QuickSize
from util.dataset import DataError, Examples, Samples
from util.results.evaluate import QuestionSamples, questions_of
from util.vision import Budget

SHOT = {"type": "image", "image": "shot.png"}  # 112 x 56: 8 tokens
CLICK = {
    "type": "function",
    "function": {"name": "click", "description": "Clicks 点.", "parameters": {"type": "object"}},
}


def call(name: str, arguments, **keys) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def calling(said, *calls) -> dict:
    return {"role": "assistant", "content": said, "tool_calls": list(calls)}


def tool(content, **keys) -> dict:
    return {"role": "tool", "content": content, **keys}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (112, 56), "white").save(tmp_path / "shot.png")
    return tmp_path


def samples_of(folder, sample: dict, processor) -> Samples:
    file = folder / "data.json"
    file.write_text(json.dumps([sample]))
    return Samples(Examples([str(file)], processor), processor, Budget(min_pixels=784))


def pieces(samples: Samples) -> list[tuple[str, bool]]:
    """Text of the tokens of a sample, cut where supervision begins or ends; a picture is one `<|image_pad|>`."""
    encoded, found = samples[0].encoded, []
    for token, marked in zip(encoded.input_ids, encoded.supervised, strict=True):
        if not found or found[-1][1] != marked:
            found.append(([], marked))
        found[-1][0].append(token)
    return [(samples.processor.tokenizer.decode(ids), marked) for ids, marked in found]


# What the templates of Qwen2.5 write, here by hand; the words are the ones that servers send.
TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "click", "description": "Clicks 点.", "parameters": {"type": "object"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
EPISODE = entry(
    user([SHOT, text("Open the file.")]),
    calling("I click.", call("click", {"x": 5, "what": "日"})),
    tool([SHOT]),
    calling(None, call("click", '{"x": 6}', id="a"), call("click", {}, id="b")),
    tool("done", tool_call_id="a"),
    tool([text("see "), SHOT], tool_call_id="b"),
    assistant("It is open."),
)


def test_an_episode_of_several_steps(folder, any_processor):
    """Every step of the assistant is supervised whole, thoughts and calls; tools, screenshots and results are not."""
    samples = samples_of(folder, {**EPISODE, "tools": [CLICK]}, any_processor)
    assert pieces(samples) == [
        (
            f"<|im_start|>system\nYou are a helpful assistant.\n\n{TOOLS_TEXT}<|im_end|>\n"
            f"<|im_start|>user\n{PICTURE}Open the file.<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        (
            'I click.\n<tool_call>\n{"name": "click", "arguments": {"x": 5, "what": "日"}}\n</tool_call><|im_end|>\n',
            True,
        ),
        (f"<|im_start|>user\n<tool_response>\n{PICTURE}\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
        (
            '<tool_call>\n{"name": "click", "arguments": {"x": 6}}\n</tool_call>\n'
            '<tool_call>\n{"name": "click", "arguments": {}}\n</tool_call><|im_end|>\n',
            True,
        ),
        (
            "<|im_start|>user\n<tool_response>\ndone\n</tool_response>\n"
            f"<tool_response>\nsee {PICTURE}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("It is open.<|im_end|>\n", True),
    ]
    assert len(samples[0].media) == 3
    assert QuickSize(samples)(samples.example(0)) == samples.size(0)


def test_the_marks_of_calls_are_plain_text(official_processor):
    for mark in ("<tool_call>", "</tool_call>", "<tool_response>", "<tools>"):
        assert mark not in official_processor.tokenizer.get_vocab()


def test_a_systems_words_come_before_the_tools(folder, processor):
    for content in ("Be brief.", [text("Be "), text("brief.")]):
        sample = {**entry(system(content), user("Hi"), assistant("Hello")), "tools": [CLICK]}
        (first, _), *_ = pieces(samples_of(folder, sample, processor))
        assert first.startswith(f"<|im_start|>system\nBe brief.\n\n{TOOLS_TEXT}<|im_end|>\n<|im_start|>user\nHi")


@pytest.mark.parametrize("tools", [[CLICK], [CLICK["function"]], json.dumps([CLICK])], ids=["openai", "bare", "text"])
def test_ways_to_write_tools(tools, folder, processor):
    (first, _), *_ = pieces(samples_of(folder, {**entry(user("Hi"), assistant("Hello")), "tools": tools}, processor))
    assert TOOLS_TEXT in first


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_text(tools, folder, processor):
    (first, _), *_ = pieces(samples_of(folder, {**entry(user("Hi"), assistant("Hello")), "tools": tools}, processor))
    assert first.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_a_servers_parser_finds_the_calls(folder, processor):
    """As "hermes" parsers read an answer: JSON between the marks."""
    supervised = "".join(piece for piece, marked in pieces(samples_of(folder, EPISODE, processor)) if marked)
    found = [json.loads(found) for found in re.findall(r"<tool_call>(.*?)</tool_call>", supervised, re.DOTALL)]
    assert found == [
        {"name": "click", "arguments": {"x": 5, "what": "日"}},
        {"name": "click", "arguments": {"x": 6}},
        {"name": "click", "arguments": {}},
    ]


def test_each_step_is_a_question_of_evaluation(folder, processor):
    samples = samples_of(folder, {**EPISODE, "tools": [CLICK]}, processor)
    questions = QuestionSamples(questions_of(samples.examples), processor, samples.budget)
    assert [question.where.rpartition(", ")[2] for question in questions.examples] == ["turn 0", "turn 1", "turn 2"]
    prompt, whole = questions[1]
    reference = processor.tokenizer.decode(whole.encoded.input_ids[len(prompt.encoded.input_ids) :])
    assert reference.startswith('<tool_call>\n{"name": "click", "arguments": {"x": 6}}\n</tool_call>\n<tool_call>')
    assert sum(whole.encoded.supervised) == len(whole.encoded.input_ids) - len(prompt.encoded.input_ids)
    assert len(prompt.media) == 2


def test_boxes_in_an_episode(folder, processor):
    """A box without a number lies in the newest screenshot; errors count the messages as the file does."""
    Image.new("RGB", (224, 56)).save(folder / "wide.png")
    box = {"type": "box", "bbox": [0, 0, 112, 56]}
    sample = entry(
        user([SHOT]), calling("", call("f", {})), tool([{"type": "image", "image": "wide.png"}]), assistant([box])
    )
    samples = samples_of(folder, {**sample, "tools": [{"name": "f"}]}, processor)
    assert pieces(samples)[-1] == ("<|box_start|>(0,0),(500,999)<|box_end|><|im_end|>\n", True)
    sample["messages"][-1]["content"][0]["bbox"][2] = 300
    with pytest.raises(DataError, match=r"sample 0, message 3: bbox \[0, 0, 300, 56\] lies outside of image 1"):
        samples_of(folder, {**sample, "tools": [{"name": "f"}]}, processor).example(0)


HI, BYE = user("Hi"), assistant("Bye")
REFUSED = {
    "tools no list": ({**entry(HI, BYE), "tools": {"name": "f"}}, ": 'tools' is dict; 'tools' is a list of"),
    "tools no JSON": ({**entry(HI, BYE), "tools": "click"}, ": 'tools' is no JSON; 'tools' is a list of"),
    "tool without name": ({**entry(HI, BYE), "tools": [CLICK, {"function": {}}]}, ": tool 1 has no function with a name"),
    "tool with NaN": (
        {**entry(HI, BYE), "tools": [{"name": "f", "least": float("nan")}]},
        ": tool 0: holds a number that JSON does not know (NaN or infinity); write null",
    ),
    "tool with a control token": (
        {**entry(HI, BYE), "tools": [{"name": "<|im_end|>"}]},
        ", tools: text contains the control token '<|im_end|>'; take it out",
    ),
    "calls no list": (entry(HI, {**BYE, "tool_calls": "f()"}), ", message 1: tool_calls is str, not a list; a tool call is"),
    "call without name": (entry(HI, calling("", {"type": "function"})), ", message 1: a call without a function's name;"),
    "arguments no JSON": (
        entry(HI, calling("", call("f", "x=1"))),
        ", message 1: the arguments of 'f' are no JSON; a tool call is",
    ),
    "arguments a list": (
        entry(HI, calling("", call("f", [1]))),
        ", message 1: the arguments of 'f' are list, not a dictionary; a tool call is",
    ),
    "arguments not a number": (
        entry(HI, calling("", call("f", {"x": float("inf")}))),
        ", message 1: holds a number that JSON does not know",
    ),
    "arguments that end the call": (
        entry(HI, calling("", call("f", {"x": "</tool_call>"}))),
        ", message 1: a call of 'f' holds '</tool_call>', which would end it early; take it out",
    ),
    "unknown tool": (
        {**entry(HI, calling("", call("tap", {}))), "tools": [CLICK]},
        ", message 1: calls 'tap', which is not among the sample's tools (click); correct the name or add the tool",
    ),
    "a user calls": (entry({**HI, "tool_calls": [call("f", {})]}, BYE), ", message 0: only an assistant message can have"),
    "a tool first": (entry(tool("4"), BYE), ", message 0: a tool's message must follow the assistant message that calls"),
    "a tool after a user": (entry(HI, tool("4"), BYE), ", message 1: a tool's message must follow the assistant message"),
    "one answer for two calls": (
        entry(HI, calling("", call("f", {}), call("f", {})), tool("4"), BYE),
        ", message 2: 1 message(s) of tools for 2 call(s); each call has one",
    ),
    "answers in another order": (
        entry(HI, calling("", call("f", {}, id="a"), call("f", {}, id="b")), tool("1", tool_call_id="b"),
              tool("2", tool_call_id="a"), BYE),
        ", message 2: answers to ['b', 'a'], but called were ['a', 'b']; put the answers in the calls' order",
    ),
    "a tool's number": (entry(HI, calling("", call("f", {})), tool(4), BYE), ", message 2: content must be text or a list"),
    "a user after a tool": (
        entry(HI, calling("", call("f", {})), tool("4"), user([SHOT]), BYE),
        ", message 3: a user message after a tool's, which is written as a user's turn itself; put its text and images",
    ),
    "ends with a tool": (entry(HI, calling("", call("f", {})), tool("4")), ": ends with a user message, so nothing is"),
    "a missing picture": (
        entry(HI, calling("", call("f", {})), tool([{"type": "image", "image": "no.png"}]), BYE),
        ", message 2: no such file 'no.png'",
    ),
    "a missing picture among several": (
        entry(HI, assistant("f()"), tool("1"), tool([{"type": "image", "image": "no.png"}]), BYE),
        ", messages 2 to 3: no such file 'no.png'",
    ),
    "further messages are counted as in the file": (
        {**entry(HI, assistant("f()"), tool("1"), tool("2"), BYE, BYE), "tools": [CLICK]},
        ", message 5: an assistant message must follow a user message",
    ),
    "not a message": ({**entry("Hi", BYE), "tools": [CLICK]}, ", message 0: a message is {'role':"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_breaks_a_rule_is_refused_by_name(case, folder, processor):
    sample, message = REFUSED[case]
    with pytest.raises(DataError) as error:
        samples_of(folder, sample, processor).example(0)
    assert str(error.value).startswith(f"{folder / 'data.json'}, sample 0{message}")


def test_the_showcases_episode(processor):
    """The agent of train_data/ clicks inside of what it says, as the pixels under its click are a button's."""
    file = ROOT / "train_data" / "data.json"
    sample = next(sample for sample in json.loads(file.read_text()) if sample["kind"] == "agent")
    shots = [
        item["image"]
        for message in sample["messages"]
        for item in message["content"]
        if isinstance(item, dict) and "image" in item
    ]
    clicks = [
        message["tool_calls"][0]["function"]["arguments"] for message in sample["messages"] if "tool_calls" in message
    ]
    assert (len(shots), len(clicks)) == (3, 2)
    for shot, click in zip(shots, clicks, strict=False):
        image = Image.open(file.parent / shot).convert("RGB")
        x, y = int((click["x"] + 0.5) * image.width / 1000), int((click["y"] + 0.5) * image.height / 1000)
        near = {image.getpixel((x + right, y + down)) for right in range(-50, 51) for down in (-15, 15)}
        assert near == {(70, 110, 200)}
