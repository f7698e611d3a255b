"""Token ids and labels, against the published processor and against lists written by hand."""

import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from util import conversation, vision
from util.collator import expand
from util.data.entries import text_of
from util.dataset import DataError, Samples, load_examples

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
DEFAULT_SYSTEM = "You are a helpful assistant."
BUDGET = vision.Budget(min_pixels=4 * 784, max_pixels=1280 * 784)


def message(role: str, *parts: str | dict) -> dict:
    """A message of texts and media items; a single text stays a string, as in most data files."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": role, "content": parts[0]}
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """User and assistant taking turns, the user first."""
    first = [] if system is None else [message(SYSTEM, system)]
    return first + [message((USER, ASSISTANT)[number % 2], text) for number, text in enumerate(texts)]


def encode(messages: list[dict], processor) -> conversation.Encoded:
    return conversation.encode(conversation.render(messages, processor), processor)


def supervised_ids(encoded: conversation.Encoded) -> list[int]:
    assert len(encoded.supervised) == len(encoded.input_ids), "one supervision mark per token"
    return [token for token, marked in zip(encoded.input_ids, encoded.supervised, strict=True) if marked]


# ---- input ids against the official processor's call -----------------------------------------------------------------


@pytest.fixture(scope="module")
def media(tmp_path_factory, picture, write_video, decode_all):
    """Three images and two videos, of sizes that need no resizing: items for a data file, and their pixels."""
    folder = tmp_path_factory.mktemp("media")
    items, pixels = {}, {}
    for name, height, width in (("a", 56, 84), ("b", 112, 56), ("c", 140, 168)):
        pixels[name] = picture(height, width, seed=ord(name))
        Image.fromarray(pixels[name]).save(folder / f"{name}.png")
        items[name] = {"type": "image", "image": str(folder / f"{name}.png")}
    frames = [picture(84, 56, seed) for seed in range(6)]
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    items["v"] = {"type": "video", "video": [str(folder / f"frame{number}.png") for number in range(6)]}
    pixels["v"] = np.stack(frames)
    path = write_video(folder / "w.mp4", [picture(56, 112, seed) for seed in range(8)], fps=2)
    items["w"], pixels["w"] = {"type": "video", "video": path}, decode_all(path)
    assert len(pixels["w"]) == 8, "the test's own video has 8 frames"
    return items, pixels


CONVERSATIONS = {
    "text only": [(USER, "What is 2 + 2?"), (ASSISTANT, "4")],
    "text only, several turns": [(USER, "Hi"), (ASSISTANT, "Hello!"), (USER, "Bye\n\n"), (ASSISTANT, "So long.\n")],
    "one image": [(USER, "@a", "What is it?"), (ASSISTANT, "A wave.")],
    "image after text": [(USER, "What is this? ", "@a"), (ASSISTANT, "A wave.")],
    "image between texts": [(USER, "\nLook:", "@b", "\nWell?"), (ASSISTANT, "Tall.")],
    "several images": [(USER, "@a", "@b", " and ", "@c", "Which is largest?"), (ASSISTANT, "The third.")],
    "frames as video": [(USER, "@v", "What moves?"), (ASSISTANT, "Nothing.")],
    "video file": [(USER, "@w", "What moves?"), (ASSISTANT, "Nothing.")],
    "image and videos": [(USER, "@w", "then", "@a", "and", "@v", "?"), (ASSISTANT, "Yes.")],
    "media in several turns": [
        (USER, "@a", "First?"),
        (ASSISTANT, "One."),
        (USER, "@v", "Second?"),
        (ASSISTANT, "Two."),
        (USER, "@b"),
        (ASSISTANT, "Three."),
    ],
    "system prompt": [(SYSTEM, "Answer in one word."), (USER, "@a", "Colour?"), (ASSISTANT, "Grey.")],
    "system prompt as items": [(SYSTEM, "Answer ", "in one word."), (USER, "Colour?"), (ASSISTANT, "Grey.")],
    "empty system prompt": [(SYSTEM, ""), (USER, "Hi"), (ASSISTANT, "Hello.")],
    "answer in several items": [(USER, "Hi"), (ASSISTANT, "Hel", "lo", ".")],
    "user text is empty": [(USER, ""), (ASSISTANT, "Hello.")],
    "unicode": [(USER, "@a", "Это 猫? 🦜🏽 \u200d e\u0301"), (ASSISTANT, "是的，一只猫。🐈‍⬛ e\u0301")],
    "grounding": [
        (USER, "@c", "Find <|object_ref_start|>the box<|object_ref_end|>"),
        (ASSISTANT, "<|box_start|>(250,250),(500,500)<|box_end|> <|quad_start|>(1,2)<|quad_end|>"),
    ],
    "answer with spaces": [(USER, "Hi"), (ASSISTANT, "  indented\n\tcode  ")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_the_official_processors_call(name, any_processor, media, tmp_path):
    items, pixels = media
    used = [part[1:] for _, *parts in CONVERSATIONS[name] for part in parts if part.startswith("@")]
    messages = [
        message(role, *(items[part[1:]] if part.startswith("@") else part for part in parts))
        for role, *parts in CONVERSATIONS[name]
    ]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages}]))
    samples = Samples(load_examples([str(tmp_path / "data.json")], any_processor), any_processor, BUDGET)
    sample = samples[0]
    grids = [medium.grid for medium in sample.media]
    ids, supervised, spans = expand(sample.encoded, grids)

    reference = any_processor(
        text=[any_processor.apply_chat_template(messages, tokenize=False)],
        images=[Image.fromarray(pixels[m]) for m in used if items[m]["type"] == "image"] or None,
        videos=[torch.from_numpy(pixels[m]).permute(0, 3, 1, 2) for m in used if items[m]["type"] == "video"] or None,
        return_tensors="pt",
    )
    assert ids.tolist() == reference["input_ids"][0].tolist()
    assert len(supervised) == len(ids)
    for kind, key in ((False, "image_grid_thw"), (True, "video_grid_thw")):
        ours = [list(medium.grid[:3]) for medium in sample.media if medium.is_video == kind]
        assert ours == (reference[key].tolist() if key in reference else []), key
    visual_ids = {any_processor.image_token_id, any_processor.video_token_id}
    visual = [number for number, token in enumerate(reference["input_ids"][0].tolist()) if token in visual_ids]
    assert [number for begin, end in spans for number in range(begin, end)] == visual, "spans are the visual tokens"
    assert not supervised[visual].any(), "a visual token is supervised"


TEXTS = ["a", "Hello there", "assistant", "\nassistant\n", "user\n", "1 234,5", "猫", "🦜", "x\n", "\n\n", " ", "\t"]


def test_ids_and_labels_of_random_conversations(any_processor):
    """The whole text, tokenised at once with character offsets, gives the same ids and the same supervised ones."""
    rng = random.Random(0)
    for _ in range(150):
        messages, text, answers = [], "", []
        if rng.random() < 0.5:
            messages.append(message(SYSTEM, "".join(rng.choices(TEXTS, k=rng.randint(0, 3)))))
        else:
            text = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        for _ in range(rng.randint(1, 4)):
            question, answer = ("".join(rng.choices(TEXTS, k=rng.randint(1, 4))) for _ in range(2))
            # What an answer begins with is tokenised by itself, so here it must not be able to join the header's "\n".
            messages += turns(question, rng.choice(["I", "是", "7", "🦜"]) + answer)
        for each in messages:
            text += f"<|im_start|>{each['role']}\n"
            begin = len(text)
            text += each["content"] + "<|im_end|>\n"
            if each["role"] == ASSISTANT:
                answers.append((begin, len(text)))
        whole = any_processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        wanted = [any(a <= begin and end <= b for a, b in answers) for begin, end in whole["offset_mapping"]]
        encoded = encode(messages, any_processor)
        assert encoded.input_ids == whole["input_ids"], text
        assert encoded.supervised == wanted, text
        assert encoded.placeholders == []


# ---- supervised ids, written by hand ---------------------------------------------------------------------------------

# The published vocabulary: 151645 is <|im_end|>, 198 is "\n", 271 is "\n\n", 624 is ".\n".
WRITTEN_BY_HAND = {
    "one word": (turns("Hi", "Red."), [6033, 13, 151645, 198], ["Red.<|im_end|>\n"]),
    "answer begins with a newline": (turns("Hi", "\nYes"), [198, 9454, 151645, 198], ["\nYes<|im_end|>\n"]),
    "answer begins and ends with newlines": (
        turns("Hi", "\n\nNo.\n"),
        [271, 2753, 624, 151645, 198],
        ["\n\nNo.\n<|im_end|>\n"],
    ),
    "user text has the word assistant": (
        turns("You are my assistant, assistant", "A cat."),
        [32, 8251, 13, 151645, 198],
        ["A cat.<|im_end|>\n"],
    ),
    "user text looks like a header": (
        turns("assistant\nassistant\n", "A cat."),
        [32, 8251, 13, 151645, 198],
        ["A cat.<|im_end|>\n"],
    ),
    "answer looks like a header": (turns("Hi", "assistant"), [77091, 151645, 198], ["assistant<|im_end|>\n"]),
    "answer holds a header": (
        turns("Hi", "The word is assistant\nreally."),
        [785, 3409, 374, 17847, 198, 53660, 13, 151645, 198],
        ["The word is assistant\nreally.<|im_end|>\n"],
    ),
    "empty system prompt": (turns("Hi", "Red.", system=""), [6033, 13, 151645, 198], ["Red.<|im_end|>\n"]),
    "system prompt": (
        turns("Hi", "Red.", system="You are an assistant\nRed."),
        [6033, 13, 151645, 198],
        ["Red.<|im_end|>\n"],
    ),
    "emoji": (
        turns("🦜", "🦜🏽 parrot"),
        [123918, 250, 145375, 1346, 4640, 151645, 198],
        ["🦜🏽 parrot<|im_end|>\n"],
    ),
    "Chinese": (
        turns("这是猫吗？", "是的，一只猫。"),
        [20412, 9370, 3837, 102292, 100472, 1773, 151645, 198],
        ["是的，一只猫。<|im_end|>\n"],
    ),
    "two assistant turns": (
        turns("Colour?", "Red.", "Sure? Red.", "Blue, I think."),
        [6033, 13, 151645, 198, 10331, 11, 358, 1744, 13, 151645, 198],
        ["Red.<|im_end|>\n", "Blue, I think.<|im_end|>\n"],
    ),
    "the same answer twice": (
        turns("Red.", "Red.", "Red.", "Red."),
        [6033, 13, 151645, 198, 6033, 13, 151645, 198],
        ["Red.<|im_end|>\n", "Red.<|im_end|>\n"],
    ),
    "empty answer": (turns("Hi", ""), [151645, 198], ["<|im_end|>\n"]),
    "spaces before": (turns("Hi", "  two spaces"), [220, 1378, 12621, 151645, 198], ["  two spaces<|im_end|>\n"]),
    "grounding": (
        turns("Where?", "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(10,20)<|box_end|>"),
        [151646, 1782, 8251, 151647, 151648, 7, 16, 15, 11, 17, 15, 8, 151649, 151645, 198],
        ["<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(10,20)<|box_end|><|im_end|>\n"],
    ),
    "answer in items": (
        [message(USER, "Hi"), message(ASSISTANT, "Blue,", " I think.")],
        [10331, 11, 358, 1744, 13, 151645, 198],
        ["Blue, I think.<|im_end|>\n"],
    ),
}


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_supervised_ids_of_the_published_tokenizer(name, official_processor):
    messages, ids, _ = WRITTEN_BY_HAND[name]
    assert supervised_ids(encode(messages, official_processor)) == ids


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_supervised_text(name, any_processor):
    messages, _, texts = WRITTEN_BY_HAND[name]
    encoded = encode(messages, any_processor)
    runs, previous = [], False
    for token, marked in zip(encoded.input_ids, encoded.supervised, strict=True):
        if marked:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = marked
    assert [any_processor.tokenizer.decode(run) for run in runs] == texts


def test_every_id_of_one_conversation(official_processor):
    """<|im_start|>system ... one user message with an image, an answer that begins with a newline: all 30 ids."""
    image = {"type": "image", "image": "unread.png"}
    encoded = encode([message(USER, image, "What is it?"), message(ASSISTANT, "\nYes")], official_processor)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [151644, 872, 198, 151652, 151655, 151653, 3838, 374, 432, 30, 151645, 198]
    header, answer = [151644, 77091, 198], [198, 9454, 151645, 198]
    assert encoded.input_ids == system + user + header + answer
    assert encoded.supervised == [False] * 26 + [True] * 4
    assert encoded.placeholders == [15]


def test_newline_joins_the_header_of_a_user_and_not_of_an_assistant(official_processor):
    """As the published processor does for a prompt; what the assistant writes comes after its header."""
    encoded = encode(turns("\nCompare.", "\nYes", system=""), official_processor)
    system, user = [151644, 8948, 198, 151645, 198], [151644, 872, 271, 27374, 13, 151645, 198]
    assert encoded.input_ids == system + user + [151644, 77091, 198] + [198, 9454, 151645, 198]


# ---- the prompt that generation sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_prompt_and_answer_are_the_training_row(name, any_processor):
    messages = WRITTEN_BY_HAND[name][0]
    answers = [number for number, each in enumerate(messages) if each["role"] == ASSISTANT]
    assert answers
    for number in answers:
        pieces = conversation.render_prompt(messages[:number], any_processor)
        answer = text_of(messages[number]["content"]) + "<|im_end|>\n"
        prompt = conversation.encode(pieces, any_processor).input_ids
        reply = any_processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        row = encode(messages, any_processor)
        assert row.input_ids[: len(prompt) + len(reply)] == prompt + reply
        begin, end = len(prompt), len(prompt) + len(reply)
        assert row.supervised[begin:end] == [True] * len(reply)
        assert not row.supervised[begin - 1]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_is_the_templates_generation_prompt(name, any_processor, media):
    items, _ = media
    messages = [
        message(role, *(items[part[1:]] if part.startswith("@") else part for part in parts))
        for role, *parts in CONVERSATIONS[name]
    ][:-1]
    pieces = conversation.render_prompt(messages, any_processor)
    text = "".join(piece.text for piece in pieces)
    assert text == any_processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert not pieces[-1].supervised, "a prompt ends with the header of the answer"


# ---- tiny's chat template against the published one ------------------------------------------------------------------

IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}
FOR_TEMPLATES = {
    "text": turns("Hi", "Hello"),
    "ends with a user": turns("Hi", "Hello", "And?"),
    "system": turns("Hi", "Hello", system="Be brief."),
    "empty system": turns("Hi", "Hello", system=""),
    "system as items": [message(SYSTEM, "Be ", "brief."), message(USER, "Hi")],
    "only a system message": [message(SYSTEM, "Be brief.")],
    "system in the middle": [message(USER, "Hi"), message(SYSTEM, "Be brief."), message(USER, "Hi")],
    "assistant first": [message(ASSISTANT, "Hello"), message(USER, "Hi")],
    "images": [message(USER, IMAGE, "and", IMAGE), message(ASSISTANT, "Two."), message(USER, IMAGE)],
    "videos": [message(USER, VIDEO, "and", VIDEO), message(ASSISTANT, "Two."), message(USER, VIDEO)],
    "images and videos": [message(USER, VIDEO, IMAGE, VIDEO, "?", IMAGE), message(ASSISTANT, "Four.")],
    "items without type": [{"role": USER, "content": [{"image": "a.png"}, {"video": "a.mp4"}, {"text": "Hi"}]}],
    "image_url": [{"role": USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"image_url": "x"}]}],
    "type alone": [{"role": USER, "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Hi"}]}],
    "text beside an image": [{"role": USER, "content": [{"type": "image", "image": "a.png", "text": "unseen"}]}],
    "unknown item": [{"role": USER, "content": [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "Hi"}]}],
    "no items": [{"role": USER, "content": []}, message(ASSISTANT, "Hm.")],
    "spaces and newlines": turns("\n  Hi \n", "\n\nHello\t\n ", system="\n"),
    "looks like a template": turns("{{ messages }} {% if x %}", "{# no #} <b>&amp;</b> \\n", system="{%- -%}"),
    "unicode": turns("Это 猫? 🦜🏽 e\u0301", "是的，一只猫。"),
}


@pytest.mark.parametrize("add_vision_id", [False, True])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", FOR_TEMPLATES)
def test_tiny_renders_as_the_published_template(
    name, add_generation_prompt, add_vision_id, processor, official_processor
):
    options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
    tiny, published = (
        each.tokenizer.apply_chat_template(
            FOR_TEMPLATES[name], chat_template=each.chat_template, tokenize=False, **options
        )
        for each in (processor, official_processor)
    )
    assert tiny == published


def test_a_rendering_written_by_hand(any_processor):
    messages = [message(USER, IMAGE, "One?"), message(ASSISTANT, "Yes."), message(USER, VIDEO, IMAGE, "Two?")]
    text = any_processor.tokenizer.apply_chat_template(
        messages,
        chat_template=any_processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        add_vision_id=True,
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>One?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nVideo 1: <|vision_start|><|video_pad|><|vision_end|>"
        "Picture 2: <|vision_start|><|image_pad|><|vision_end|>Two?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_that_ends_turns_differently_is_refused(processor):
    class Other:
        tokenizer = processor.tokenizer
        chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"

    with pytest.raises(ValueError, match=r"does not end every assistant turn with <\|im_end\|> and newline"):
        conversation.render(turns("Hi", "Hello"), Other)


# ---- control tokens and grounding tokens -----------------------------------------------------------------------------

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
GROUNDING = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
             "<|quad_end|>"]  # fmt: skip


def load(messages: list[dict], processor, folder) -> list:
    (folder / "data.json").write_text(json.dumps([{"messages": messages}]))
    return load_examples([str(folder / "data.json")], processor)


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("role", [SYSTEM, USER, ASSISTANT])
def test_control_tokens_are_refused(role, token, any_processor, tmp_path):
    messages = turns("Hi", "Hello", system="Be brief.")
    number = [SYSTEM, USER, ASSISTANT].index(role)
    messages[number] = message(role, f"a{token}b")
    with pytest.raises(DataError) as error:
        load(messages, any_processor, tmp_path)
    assert f"sample 0, message {number}: text contains the control token {token!r}" in str(error.value)


def test_the_mark_of_the_template_is_refused(processor, tmp_path):
    with pytest.raises(DataError, match="message 0: text contains the control token"):
        load(turns(f"a{conversation.MARK}b", "Hello"), processor, tmp_path)


@pytest.mark.parametrize("parts", [("<|im_", "end|>\n<|im_sta", "rt|>assistant\n"), tuple(conversation.MARK)])
@pytest.mark.parametrize("role", [USER, ASSISTANT])
def test_a_control_token_cut_into_several_items_is_refused(role, parts, processor, tmp_path):
    """The template joins text items without anything between them."""
    messages = turns("Hi", "Hello")
    messages[(USER, ASSISTANT).index(role)] = message(role, *parts)
    with pytest.raises(DataError, match="control token"):
        load(messages, processor, tmp_path)


def test_grounding_tokens_are_legal(any_processor, tmp_path):
    text = " ".join(GROUNDING)
    (example,) = load(turns(text, text, system=text), any_processor, tmp_path)
    encoded = encode(example.messages, any_processor)
    for token in GROUNDING:
        token_id = any_processor.tokenizer.convert_tokens_to_ids(token)
        assert encoded.input_ids.count(token_id) == 3, f"{token} is one token in each of the three messages"
        assert supervised_ids(encoded).count(token_id) == 1


def test_no_token_id_is_written_into_the_code():
    files = [*(ROOT / "util").glob("*.py"), *ROOT.glob("*.py")]
    assert {"conversation.py", "collator.py", "tiny_model.py", "finetune.py"} <= {file.name for file in files}
    found = [f"{file.name}: {number}" for file in files for number in re.findall(r"\b151[6-9]\d\d\b", file.read_text())]
    assert found == [], "ids are read from the tokenizer"
