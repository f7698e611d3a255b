"""Chat templates of the three families: how they are cut, what they say of tools, and which are refused."""

import json
import sys

import pytest
from PIL import Image

from tests import families, warm
from tests.conftest import ROOT
from tests.families import MODEL_TYPES, TEMPLATE_OF_2_5, TEMPLATE_OF_3
from tests.samples import assistant, entry, system, text, user
from tests.test_tools import CLICK, EPISODE, SHOT, call, calling, tool
from util import conversation
from util.command_line import UserError
from util.dataset import Examples, Samples
from util.model import load_processor
from util.vision import Budget

# As the Thinking models' templates do: an answer begins with thoughts, which are asked for by an open mark, and of one
# that is there the marks are closed.
THINKING = TEMPLATE_OF_3.replace(
    "{{ '<|im_start|>assistant\\n' + written(message.content or '') }}",
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + written(message.content or '') }}",
).replace(
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}",
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}",
)


class Processor:
    """A tokenizer with another template; what the walk asks of a processor."""

    def __init__(self, processor, template: str) -> None:
        self.tokenizer = processor.tokenizer
        self.chat_template = template
        self.image_token_id = processor.image_token_id
        self.video_token_id = processor.video_token_id


@pytest.fixture
def of_family(any_processor):
    return lambda model_type: Processor(any_processor, TEMPLATE_OF_3 if model_type == "qwen3_vl" else TEMPLATE_OF_2_5)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (128, 64), "white").save(tmp_path / "shot.png")
    return tmp_path


def samples_of(folder, sample: dict, processor, model_type: str) -> Samples:
    (folder / "data.json").write_text(json.dumps([sample]))
    budget = Budget(min_pixels=1024, model_type=model_type)
    return Samples(Examples([str(folder / "data.json")], processor), processor, budget)


TALKS = {
    "plain": [user("Hi"), assistant("Hello!\n"), user("Bye\n\n"), assistant("So long.")],
    "a system message": [system("Be brief."), user("Hi"), assistant("Hello")],
    "a picture": [user([SHOT, text("What?")]), assistant("White."), user([text("And "), SHOT]), assistant("White")],
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pieces_are_the_templates_own_text(model_type, name, of_family):
    """Joined they are what the template writes; each prompt is what it asks for an answer with."""
    processor = of_family(model_type)
    messages = TALKS[name]
    pieces = conversation.render(messages, processor)

    def written(some: list[dict], **keys) -> str:
        return processor.tokenizer.apply_chat_template(
            some, chat_template=processor.chat_template, tokenize=False, **keys
        )

    assert "".join(piece.text for piece in pieces) == written(messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert [piece.text for piece in pieces if piece.is_answer] == [
        f"{messages[number]['content']}<|im_end|>\n" for number in answers
    ]
    for count, number in enumerate(answers):
        asked = written(messages[:number], add_generation_prompt=True)
        assert "".join(piece.text for piece in pieces[: 2 * count + 1]) == asked
        assert "".join(piece.text for piece in conversation.render_prompt(messages[:number], processor)) == asked


def test_the_default_system_message_is_the_templates(of_family):
    assert conversation.default_system(of_family("qwen2_vl")) == "You are a helpful assistant."
    assert conversation.default_system(of_family("qwen2_5_vl")) == "You are a helpful assistant."
    assert conversation.default_system(of_family("qwen3_vl")) == ""
    other = Processor(of_family("qwen2_vl"), TEMPLATE_OF_2_5.replace("a helpful assistant", "Qwen"))
    assert conversation.default_system(other) == "You are Qwen."


EPISODES = {
    "an episode": {**EPISODE, "tools": [CLICK]},
    "a system message": {**entry(system("Be brief."), user("Hi"), assistant("Hello")), "tools": [CLICK, CLICK]},
    "no tools": entry(user("Hi"), assistant("Hello")),
    "two calls": {
        **entry(
            user("Open it."),
            calling("", call("click", {"x": 1.5, "é": None}), call("click", {})),
            tool("one"),
            tool("two"),
            assistant("Done."),
        ),
        "tools": [CLICK],
    },
}


@pytest.mark.parametrize("name", EPISODES)
def test_tools_are_written_as_qwen3_vls_own_template_writes_them(name, folder, of_family):
    """Character by character, and no default system message before them."""
    processor = of_family("qwen3_vl")
    sample = EPISODES[name]
    samples = samples_of(folder, sample, processor, "qwen3_vl")
    ours = "".join(piece.text for piece in conversation.render(samples.example(0).messages, processor))
    messages = json.loads(json.dumps(sample["messages"]))
    for message in messages:  # a template takes arguments as dictionaries
        for one in message.get("tool_calls") or []:
            if isinstance(one["function"]["arguments"], str):
                one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    theirs = processor.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE_OF_3, tools=sample.get("tools"), tokenize=False
    )
    assert ours == theirs
    assert "helpful" not in ours


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_tools_stand_after_the_default_system_message_where_there_is_one(model_type, folder, of_family):
    processor = of_family(model_type)
    samples = samples_of(folder, EPISODES["an episode"], processor, model_type)
    ours = conversation.render(samples.example(0).messages, processor)[0].text
    assert ours.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\nYou may call")


def test_words_that_are_added_and_not_special_are_text(any_processor, folder):
    """Of the published tokenizers of Qwen2.5-VL and Qwen3-VL: calls and thoughts are text, what is special is not."""
    processor = Processor(any_processor, TEMPLATE_OF_3)
    processor.tokenizer = type(any_processor.tokenizer).from_pretrained(any_processor.tokenizer.name_or_path)
    processor.tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>"])
    assert conversation.control_tokens(processor) == conversation.control_tokens(any_processor)
    samples = samples_of(folder, EPISODES["two calls"], processor, "qwen3_vl")
    ids = samples[0].encoded.input_ids
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<tool_call>")) == 4, "two in the system's words"


# ---- templates that ask otherwise than they write --------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking(tmp_path_factory, processor):
    """A whole checkpoint but for its template."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    families.make_checkpoint(folder, "qwen3_vl", processor.tokenizer, tied=True)
    other = load_processor(str(folder))
    other.chat_template = THINKING
    other.save_pretrained(folder)
    return folder


def test_a_thinking_template_is_refused_by_name(thinking, of_family):
    for model_type in MODEL_TYPES:
        assert conversation.problem_of_template(of_family(model_type)) == ""
    with pytest.raises(UserError) as refused:
        load_processor(str(thinking))
    for words in (f"--model {thinking} has a chat template", "<think>", "Thinking", "take the Instruct model"):
        assert words in str(refused.value)


def test_a_run_of_a_thinking_model_ends_before_anything_is_loaded(thinking, tmp_path):
    done = warm.run(
        [sys.executable, "finetune.py", "--model", str(thinking), "--device", "cpu", "--output_dir", str(tmp_path / "out")],
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "take the Instruct model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---- shown -----------------------------------------------------------------------------------------------------------


def test_show_names_times_and_pairs_of_frames(tmp_path, picture, write_video):
    """23 frames at 10 a second, of which 0, 7, 15 and 22 are taken: pairs at 0.35 and 1.85 seconds (halves are rounded
    as Python rounds them), 1.15 seconds or 2.3 half seconds a pair."""
    path = write_video(tmp_path / "clip.mp4", [picture(128, 160, seed=number) for number in range(23)], 10)
    sample = entry(user([{"type": "video", "video": path}, text("What?")]), assistant("It moves."))
    (tmp_path / "data.json").write_text(json.dumps([sample]))
    shown = {}
    for name in ("tiny", "tiny-qwen2.5-vl", "tiny-qwen3-vl"):
        command = [sys.executable, "-m", "util", "show", str(tmp_path / "data.json"), "--model", name,
                   "--min_pixels", "1024", "--max_pixels", "102400"]  # fmt: skip
        done = warm.run(command, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        shown[name] = done.stdout
    assert "<video 2x10x12>" in shown["tiny"]
    assert "<video 2x10x12, 2.30 steps of time a pair of frames>" in shown["tiny-qwen2.5-vl"]
    lines = [line.split(maxsplit=3)[-1] for line in shown["tiny-qwen3-vl"].splitlines()]
    assert [line for line in lines if line.startswith("<video")] == ["<video 1x8x10>"] * 2
    assert "<0.3 seconds><|vision_start|>" in shown["tiny-qwen3-vl"]
    assert "<|vision_end|><1.9 seconds><|vision_start|>" in shown["tiny-qwen3-vl"]
    assert "system" not in shown["tiny-qwen3-vl"]
