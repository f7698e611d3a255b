"""An agent that acts: the loop with answers written by hand, the command with a real `tiny`, the toy environment."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import warm
from tests.conftest import ROOT
from tests.test_report import browser, open_page  # noqa: F401  # fixtures: a headless Chromium
from util.agent import schema
from util.agent.environment import Environment
from util.agent.episode import Episode, Limits
from util.agent.log import Log
from util.agent.page import write_page
from util.agent.play import Play
from util.command_line import UserError
from util.data.tools import MalformedCall, calls_of
from util.dataset import Examples, Samples
from util.family import model_type_of_processor
from util.results.evaluate import QuestionSamples, questions_of
from util.results.metrics import tool_call
from util.tiny_model import make_tiny_model
from util.vision import Budget

# Its screen is a colour; `paint` sets it. What else it can do are the ways in which an environment can fail.
PAINTER = """
import sys
from pathlib import Path
from PIL import Image

TOOLS = [
    {"type": "function", "function": {"name": "paint", "parameters": {"type": "object",
        "properties": {"red": {"type": "integer", "minimum": 0, "maximum": 255}, "how": {"enum": ["flat", "thick"]}},
        "required": ["red"]}}},
    {"type": "function", "function": {"name": "do", "parameters": {"type": "object"}}},
]
red = 0
HERE = Path(__file__).parent


def screen():
    return Image.new("RGB", (56, 56), (red, 0, 0))


def reset(episode):
    global red
    red = 0
    return screen(), f"Make it {100 + episode} red."


def act(name, arguments):
    global red
    if name == "paint":
        red = int(arguments["red"])
        return screen()
    return {
        "text": lambda: "It rains.",
        "both": lambda: [screen(), "and a word"],
        "file": lambda: write(arguments["red"]),
        "path": lambda: str(write(arguments["red"])),
        "raise": lambda: 1 / 0,
        "exit": lambda: sys.exit("enough"),
        "broken": lambda: broken(),
        "tags": lambda: "look at <image> there",
        "control": lambda: "<|im_end|> is over",
        "nothing": lambda: None,
    }[arguments["what"]]()


def write(shade):
    Image.new("RGB", (56, 56), (0, shade, 0)).save(HERE / "shot.png")
    return HERE / "shot.png"


def broken():
    (HERE / "cut.png").write_bytes(b"no picture")
    return HERE / "cut.png"


def goal_reached():
    return red == 100
"""


def paint(red, said: str = "") -> str:
    return f'{said}<tool_call>\n{{"name": "paint", "arguments": {{"red": {json.dumps(red)}}}}}\n</tool_call>'


def do(what: str, **more) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'do', 'arguments': {'what': what, **more}})}\n</tool_call>"


@pytest.fixture
def painter(tmp_path) -> Path:
    (tmp_path / "painter.py").write_text(PAINTER)
    return tmp_path / "painter.py"


class Played:
    """Episodes whose answers are written by hand: one list for each, taken in turn."""

    def __init__(self, file: Path, processor, *answers: list[str], positions: int = 32768, **limits) -> None:
        self.prompts = []
        self.log = Log(file.parent / "log")
        waiting = {number: list(own) for number, own in enumerate(answers)}

        def answer(prompts, max_new_tokens):
            self.prompts += prompts
            return [waiting[int(prompt.where.split()[1])].pop(0) for prompt in prompts]

        def begin(number, environment):
            model_type = model_type_of_processor(type(processor).__name__)
            episode = Episode(number, environment, self.log, processor, Budget(3136, model_type=model_type))
            episode.begin(None, None, None)
            return episode

        bounds = Limits(**{"steps": 20, "repeats": 3, "new_tokens": 16, "positions": positions, **limits})
        self.play = Play(answer, [Environment(file) for _ in answers[:2]], begin, bounds, 20480, self.log)
        self.numbers = range(len(answers))

    def run(self) -> "Played":
        self.play.run(self.numbers)
        return self

    @property
    def episode(self) -> Episode:
        return self.play.ended[0]

    @property
    def told(self) -> list:
        """What the model was told by each tool message: text, or `picture`."""
        found = []
        for message in self.episode.messages:
            if message["role"] == "tool":
                content = message["content"]
                items = [{"type": "text", "text": content}] if isinstance(content, str) else content
                found.append(" ".join(item.get("text", "picture") for item in items))
        return found

    def samples(self) -> list[dict]:
        return [json.loads(line) for line in self.log.file.read_text().splitlines()]


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_an_episode_that_reaches_its_goal(painter, processor):
    played = Played(painter, processor, [paint(7, "Darker first.\n"), paint(100)]).run()
    assert (played.episode.end, played.episode.reached, played.episode.steps) == ("goal reached", True, 2)
    (sample,) = played.samples()
    roles = [message["role"] for message in sample["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"], "up to the last answer: nothing is learned after it"
    assert sample["messages"][1]["content"] == "Darker first."
    call = {"type": "function", "function": {"name": "paint", "arguments": {"red": 7}}}
    assert sample["messages"][1]["tool_calls"] == [call]
    # What the model saw is kept beside the log, pixel for pixel, and what was seen last is there too.
    seen = [
        sample["messages"][0]["content"][0],
        sample["messages"][2]["content"][0],
        sample["episode"]["seen_last"][0][0],
    ]
    for item, red in zip(seen, (0, 7, 100), strict=True):
        with Image.open(played.log.folder / item["image"]) as image:
            assert np.asarray(image)[0, 0].tolist() == [red, 0, 0]
    assert sample["episode"]["goal_reached"] is True
    assert sample["episode"]["failures"] == {}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor_of_a_family(request, tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("family") / "model"
    return AutoProcessor.from_pretrained(make_tiny_model(folder, model_type=request.param))


def test_the_prompts_are_those_that_training_reads(painter, any_processor):
    """At every step, whatever white space, order of keys or mistakes the model wrote: the same ids, the same pixels."""
    check_prompts(painter, any_processor)


def test_the_prompts_of_each_family_are_those_that_training_reads(painter, processor_of_a_family):
    """With patches of another size, windows, and a template that has no system message."""
    check_prompts(painter, processor_of_a_family)


def check_prompts(painter: Path, processor) -> None:
    odd = '  Hm. \n\n<tool_call>{"arguments":{"how" : "flat","red":  3},"name":"paint"}</tool_call>  '
    answers = [odd, do("text"), "<tool_call>oh</tool_call>", do("both"), do("raise"), paint(4) + paint(5), "Done. "]
    played = Played(painter, processor, answers).run()
    assert played.episode.end == "answered"
    (row,) = [json.loads(line) for line in played.log.file.read_text().splitlines()]
    marked = [
        answer for answer in row["messages"] if answer["role"] == "assistant" and answer.pop("train", True) is False
    ]
    assert len(marked) == 3, "no JSON, an exception, two calls: their answers are not to be learned"
    played.log.file.write_text(json.dumps(row) + "\n")
    examples = Examples([str(played.log.file)], processor)
    budget = Budget(3136, model_type=model_type_of_processor(type(processor).__name__))
    questions = QuestionSamples(questions_of(examples), processor, budget)
    whole = Samples(examples, processor, budget)[0]
    assert len(played.prompts) == len(questions) == 7
    for number, prompt in enumerate(played.prompts):
        trained, _ = questions[number]
        ids = prompt.encoded.input_ids
        assert ids == trained.encoded.input_ids, f"prompt {number}"
        assert ids == whole.encoded.input_ids[: len(ids)], f"prompt {number}"
        assert prompt.encoded.placeholders == whole.encoded.placeholders[: len(prompt.media)]
        for medium, other in zip(prompt.media, whole.media, strict=False):
            assert medium.grid == other.grid
            assert (medium.patches == other.patches).all()
    assert processor.tokenizer.decode(ids).count("<tool_response>") == 6


def test_observations_of_every_kind(painter, processor):
    """Text, picture and text, a file that the environment writes over, and its path as text."""
    answers = [do("text"), do("both"), do("file", red=20), do("file", red=90), do("path", red=20), "Enough."]
    played = Played(painter, processor, answers).run()
    assert played.told == ["It rains.", "picture and a word", "picture", "picture", "picture"]
    paths = [message["content"][0]["image"] for message in played.episode.messages[5:11] if message["role"] == "tool"]
    greens = []
    for path in paths:
        with Image.open(played.log.folder / path) as image:
            greens.append(np.asarray(image)[0, 0].tolist())
    assert greens == [[0, 0, 0], [0, 20, 0], [0, 90, 0], [0, 20, 0]][-len(greens) :]
    assert paths[-1] == paths[-3] != paths[-2], "kept by content, and each as it was seen"


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        ("<tool_call>oh</tool_call>", "malformed call", "no JSON"),
        ("<tool_call>\n" + '{"name": "paint"', "malformed call", "a <tool_call> without its </tool_call>"),
        ('{"name": "paint"}</tool_call>', "malformed call", "a </tool_call> without its <tool_call>"),
        ('<tool_call>{"name": "paint", "red": 3}</tool_call>', "malformed call", "red stand beside them"),
        ('<tool_call>{"name": "paint", "arguments": [3]}</tool_call>', "malformed call", "no JSON object"),
        ('<tool_call>{"name": "paint", "arguments": {"red": NaN}}</tool_call>', "malformed call", "NaN"),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', "malformed call", 'a call is {"name"'),
        (f"<tool_call>{'[' * 5000}</tool_call>", "malformed call", "no JSON"),
        (paint(1) + "\n" + paint(2), "several calls", "2 calls in one answer"),
        ('<tool_call>{"name": "fly", "arguments": {}}</tool_call>', "unknown tool", "there are paint, do"),
        ('<tool_call>{"name": "<image>", "arguments": {}}</tool_call>', "unknown tool", "Error: unknown tool"),
        ('<tool_call>{"name": "paint", "arguments": {}}</tool_call>', "wrong arguments", "arguments.red is missing"),
        (paint("3"), "wrong arguments", "arguments.red must be of type integer, is '3'"),
        (paint(True), "wrong arguments", "must be of type integer, is True"),
        (paint(2.5), "wrong arguments", "must be of type integer, is 2.5"),
        (paint(256), "wrong arguments", "arguments.red must be at most 255, is 256"),
        ('<tool_call>{"name": "paint", "arguments": {"red": 1, "x": 2}}</tool_call>', "wrong arguments", "arguments.x"),
        (
            '<tool_call>{"name": "paint", "arguments": {"red": 1, "how": "wet"}}</tool_call>',
            "wrong arguments",
            "'flat'",
        ),
        (do("raise"), "act failed", "Error: ZeroDivisionError: division by zero"),
        (do("exit"), "act failed", "Error: SystemExit: enough"),
        (do("unheard of"), "act failed", "Error: KeyError: 'unheard of'"),
        (do("broken"), "act failed", "cannot be shown"),
        (do("tags"), "act failed", "cannot be shown"),
        (do("control"), "act failed", "cannot be shown"),
    ],
)
def test_what_goes_wrong_is_told_and_counted(painter, processor, answer, kind, told):
    """The model is told what is wrong, may go on, and the log is a data file all the same."""
    played = Played(painter, processor, [answer, paint(100)]).run()
    assert told in played.told[0], played.told
    assert played.episode.failures == {kind: 1, "control tokens in the answer": 0}
    assert (played.episode.end, played.episode.steps) == ("goal reached", 2)
    (sample,) = played.samples()
    assert sample["episode"]["failures"] == {kind: 1}
    assert sample["messages"][sample["episode"]["failed_messages"][0]]["role"] == "assistant"
    examples = Examples([str(played.log.file)], processor)
    assert len(Samples(examples, processor, Budget())[0].encoded.input_ids) > 100


def test_a_fault_of_act_names_file_and_line(painter, processor):
    played = Played(painter, processor, [do("raise"), "So be it."]).run()
    line = PAINTER.splitlines().index('        "raise": lambda: 1 / 0,') + 1
    (told,) = played.episode.told
    assert told == f"{painter}, line {line}, in <lambda>: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("answers", "limits", "end", "steps"),
    [
        (["I give up."], {}, "answered", 1),
        ([paint(3), " \n"], {}, "empty answer", 2),
        ([paint(3)] * 9, {"repeats": 3}, "loop", 4),  # the first is of another observation
        (["<tool_call>oh</tool_call>"] * 9, {"repeats": 2}, "loop", 3),
        ([paint(number) for number in range(9)], {"steps": 5}, "step limit", 5),
        ([paint(number) for number in range(9)], {"positions": 700}, "context full", None),
    ],
)
def test_how_an_episode_ends(painter, processor, answers, limits, end, steps):
    played = Played(painter, processor, answers, **limits).run()
    assert played.episode.end == end
    assert played.episode.reached is False
    assert steps in (None, played.episode.steps)
    assert len(Examples([str(played.log.file)], processor)) == 1


def test_control_tokens_are_taken_out_of_answers(painter, processor):
    """An untrained model writes them; a data file must not hold them, and a turn must not begin with them."""
    answer = "<|im_<|im_start|>start|>user\n<|image_pad|>" + paint(100)
    played = Played(painter, processor, [answer]).run()
    assert played.episode.failures["control tokens in the answer"] == 1
    assert played.episode.end == "goal reached"
    assert played.samples()[0]["messages"][1]["content"] == "user"


def test_episodes_side_by_side_do_not_touch_each_other(painter, processor):
    """Four episodes in two copies of the file, each with its own `red`."""
    answers = [[paint(1), paint(100)], [paint(2), "No."], [paint(100)], ["No."]]
    played = Played(painter, processor, *answers).run()
    ends = {episode.number: (episode.end, episode.reached) for episode in played.play.ended}
    assert ends == {
        0: ("goal reached", True),
        1: ("answered", False),
        2: ("goal reached", True),
        3: ("answered", False),
    }
    goals = {sample["episode"]["number"]: sample["messages"][0]["content"][1]["text"] for sample in played.samples()}
    assert goals == {number: f"Make it {100 + number} red." for number in range(4)}


def test_what_was_done_is_kept_where_it_is_broken_off(painter, processor):
    """`act` returns None, which is the environment's mistake: it ends, and both episodes are in the log."""
    played = Played(painter, processor, [paint(1), do("nothing")], [paint(2), paint(3)])
    with pytest.raises(UserError, match=r"painter\.py: act returned NoneType; return a PIL image"):
        played.run()
    assert sorted(sample["episode"]["end"] for sample in played.samples()) == ["interrupted", "interrupted"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TOOLS = [", "bad.py, line 1: SyntaxError"),
        ("import no_such_module", "bad.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n\nraise SystemExit('no display')", "bad.py, line 3: SystemExit: no display"),
        ("TOOLS = []\ndef act(name, arguments): pass", "bad.py: has no TOOLS"),
        ("TOOLS = [{'type': 'function'}]\ndef act(name, arguments): pass", "bad.py, TOOLS: tool 0 has no function"),
        ("TOOLS = [{'name': 'a'}]", "bad.py: has no function act"),
        ("TOOLS = [{'name': 'a'}]\nact = 5", "bad.py: has no function act"),
    ],
)
def test_an_environment_that_is_none(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError) as error:
        Environment(tmp_path / "bad.py")
    assert message in str(error.value)


# ---- calls in text, schemas, the metric -----------------------------------------------------------------------------


def test_calls_of_an_answer():
    assert calls_of("Just text. ") == ("Just text.", [])
    assert calls_of(paint(3, "I paint.\n")) == ("I paint.", [{"name": "paint", "arguments": {"red": 3}}])
    assert [call["arguments"]["red"] for call in calls_of(paint(1) + "\n" + paint(2))[1]] == [1, 2]
    with pytest.raises(MalformedCall):
        calls_of(paint(1) + "<tool_call>")


def test_nested_schemas():
    box = {"type": "object", "properties": {"at": {"type": "array", "items": {"type": ["integer", "null"]}}}}
    assert not list(schema.problems_of({"at": [1, None, 2.0]}, box, "arguments"))
    assert list(schema.problems_of({"at": [1, "2"]}, box, "arguments")) == [
        "arguments.at[1] must be of type integer or null, is '2'"
    ]
    assert list(schema.problems_of({"to": 1}, box, "arguments")) == ["arguments.to is unknown; known: at"]
    assert not list(schema.problems_of({"to": 1}, {**box, "additionalProperties": True}, "arguments"))
    assert not list(schema.problems_of({"anything": 1}, {"type": "object"}, "arguments"))
    assert not list(schema.problems_of({"anything": 1}, None, "arguments"))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (paint(1), paint(1), 1.0),
        (paint(1.0, "Look: "), paint(1), 1.0),
        ('<tool_call>{"arguments":{"b":[1,{"d":2}],"a":"x"},"name":"f"}</tool_call>',
         '<tool_call>\n{"name": "f", "arguments": {"a": "x", "b": [1.0, {"d": 2}]}}\n</tool_call>', 1.0),
        (paint(2), paint(1), 0.0),
        (paint(True), paint(1), 0.0),  # Python holds them for equal
        (paint("1"), paint(1), 0.0),
        (paint(1) + paint(2), paint(1) + paint(2), 1.0),
        (paint(2) + paint(1), paint(1) + paint(2), 0.0),  # their order matters
        (paint(1), paint(1) + paint(2), 0.0),
        (paint(1) + paint(2), paint(1), 0.0),
        ("", paint(1), 0.0),
        ("<tool_call>" + paint(1), paint(1), 0.0),
        (f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 400}{"]" * 400}}}}}</tool_call>', paint(1), 0.0),
        (paint(1), "Done.", None),
        ("Done.", "Done.", None),
    ],
)  # fmt: skip
def test_the_metric(answer, reference, score):
    assert tool_call(answer, reference) == score


# ---- the command ----------------------------------------------------------------------------------------------------


def agent(*words: object) -> subprocess.CompletedProcess:
    return warm.run([sys.executable, "-m", "util", "agent", *map(str, words)])


@pytest.fixture(scope="module")
def toy(tiny_path, tmp_path_factory) -> tuple[Path, str]:
    """The folder of 12 episodes of the toy by an untrained `tiny`, and what the command printed."""
    folder = tmp_path_factory.mktemp("toy") / "episodes"
    done = agent(tiny_path, "--environment", "recipes/buttons.py", "--episodes", 12, "--batch_size", 5,
                 "--max_steps", 2, "--max_new_tokens", 8, "--output_dir", folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_command(toy):
    folder, printed = toy
    assert re.search(r"episodes  12\n", printed)
    assert "goals reached  0 of 12: 0.0% (0.0 to 24.2)" in printed, "Wilson's interval, computed by hand"
    samples = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert sorted(sample["episode"]["number"] for sample in samples) == list(range(12))
    assert (folder / "episodes.html").is_file()


def test_the_log_is_checked(toy, tiny_path):
    folder, _ = toy
    data = str(folder / "episodes.jsonl")
    done = warm.run([sys.executable, "-m", "util", "check", data, "--model", str(tiny_path), "--device", "cpu"])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "2"]], ids=["whole", "adapter"])
def test_the_log_is_trained_on_and_the_run_acts(toy, tiny_path, tmp_path, flags):
    """The road of the recipe in short: episodes, one step of training, and the run directory acts as a model does."""
    folder, _ = toy
    run = tmp_path / "run"
    done = warm.run([
        sys.executable, "finetune.py", "--model", str(tiny_path), "--device", "cpu", "--data",
        str(folder / "episodes.jsonl"), "--max_steps", "1", "--num_workers", "0", "--max_pixels", "3136",
        "--output_dir", str(run), *flags,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = agent(run, "--environment", "recipes/buttons.py", "--max_steps", 1, "--max_new_tokens", 4,
                 "--output_dir", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 1: " in done.stderr + done.stdout, "who watches one episode sees its steps"
    assert "goals reached  0 of 1" in done.stdout


def test_the_model_answers_as_plain_transformers(tiny_path, toy):
    """The first answer of an episode, from the published processor and `generate`, given the log's first message."""
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    folder, _ = toy
    sample = json.loads((folder / "episodes.jsonl").read_text().splitlines()[0])
    processor = AutoProcessor.from_pretrained(tiny_path)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path, dtype=torch.float32).eval()
    from util.data.entries import check_messages

    messages = check_messages(sample, [], folder, default_system="You are a helpful assistant.")[:2]
    prompt = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    with Image.open(messages[1]["content"][0]["image"]) as image:
        inputs = processor(text=[prompt], images=[image.convert("RGB")], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    plain = processor.tokenizer.decode(written, skip_special_tokens=True)
    assert sample["messages"][1]["content"] == plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--environment", "nowhere.py"], "--environment nowhere.py: no such file"),
        (["--environment", "recipes/buttons.py", "--episodes", "0"], "--episodes 0: must be at least 1"),
        (["--environment", "recipes/buttons.py", "--at_least", "80"], "--at_least 80.0: must be from 0 to 1"),
        (["--environment", "recipes/buttons.py", "--image", "no.png"], "--image no.png: no such file"),
        (
            ["--environment", "{plain}", "--episodes", "2", "--goal", "Go."],
            "has no reset(episode), which begins another",
        ),
        (["--environment", "{plain}"], "has no reset(episode), which gives a goal; name one by --goal"),
        (["--environment", "{plain}", "--goal", "Go.", "--at_least", "1"], "has no goal_reached()"),
        (["--environment", "{raises}"], "raises.py, line 6, in reset: ValueError: no window"),
        (["--environment", "recipes/buttons.py", "--output_dir", "{used}"], "holds episodes.jsonl already"),
    ],
)
def test_mistakes_are_one_message(tiny_path, tmp_path, words, message):
    plain = "TOOLS = [{'name': 'wait'}]\n\n\ndef act(name, arguments):\n    return 'Still nothing.'\n"
    (tmp_path / "plain.py").write_text(plain)
    raises = "TOOLS = [{'name': 'wait'}]\nact = print\n\n\ndef reset(episode):\n    raise ValueError('no window')\n"
    (tmp_path / "raises.py").write_text(raises)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "episodes.jsonl").write_text("precious\n")
    places = {"plain": tmp_path / "plain.py", "raises": tmp_path / "raises.py", "used": tmp_path / "used"}
    done = agent(tiny_path, "--output_dir", tmp_path / "out", *(word.format(**places) for word in words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "used" / "episodes.jsonl").read_text() == "precious\n"


def test_one_episode_without_reset(tiny_path, tmp_path):
    """A goal and a picture of the command line, and a success that nobody judges."""
    (tmp_path / "plain.py").write_text("TOOLS = [{'name': 'wait'}]\n\n\ndef act(name, arguments):\n    return 'No.'\n")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "first.png")
    done = agent(tiny_path, "--environment", tmp_path / "plain.py", "--goal", "Wait.", "--image", tmp_path / "first.png",
                 "--system", "You wait.", "--max_new_tokens", 4, "--output_dir", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "goals reached" not in done.stdout
    (sample,) = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert [message["role"] for message in sample["messages"]][:2] == ["system", "user"]
    assert [item["type"] for item in sample["messages"][1]["content"]] == ["image", "text"]
    assert sample["episode"]["goal_reached"] is None


def test_at_least_decides_the_exit_code(tiny_path, tmp_path):
    done = agent(tiny_path, "--environment", "recipes/buttons.py", "--max_new_tokens", 2, "--at_least", 0.5,
                 "--output_dir", tmp_path / "out")  # fmt: skip
    assert done.returncode == 1
    assert "goals reached 0.0%, asked for at least 50.0%: MISSED" in done.stdout


def test_interrupting_keeps_what_was_done(tiny_path, tmp_path):
    """Ctrl-C while `act` waits: the episode is in the log and on the page, the exit code is that of an interrupt."""
    slow = PAINTER.replace("def act(", "def act_at_once(") + (
        "\n\ndef act(name, arguments):\n    import time\n    (HERE / 'here').touch()\n    time.sleep(300)\n"
        # whoever runs the tests in the background has Ctrl-C ignored, and so would this process
        "\n\nimport signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import util.results.evaluate as model\nmodel.Answerer.answers = lambda self, prompts, length: ["
        """'<tool_call>\\n{"name": "paint", "arguments": {"red": 1}}\\n</tool_call>'] * len(prompts)\n"""
    )
    (tmp_path / "slow.py").write_text(slow)
    job = warm.Job([sys.executable, "-m", "util", "agent", tiny_path, "--environment", tmp_path / "slow.py",
                    "--output_dir", tmp_path / "out"])  # fmt: skip
    while not (tmp_path / "here").exists() and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    printed, errors = job.communicate(120)
    assert job.returncode == 130, errors
    assert "end: interrupted  1" in printed
    (sample,) = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert sample["messages"][-1]["tool_calls"][0]["function"]["arguments"] == {"red": 1}
    assert (tmp_path / "out" / "episodes.html").is_file()


# ---- the page -------------------------------------------------------------------------------------------------------

HOSTILE = "</p></details><script>document.title = 'taken'</script><img src=http://evil.invalid/x onerror=\"document.title = 'taken'\"><!--"


def test_the_page_shows_the_episode_and_nothing_else(painter, processor, open_page):  # noqa: F811
    """Opened in a real browser: pictures, texts, calls and ends; what a model or an environment writes is text."""
    painter.write_text(PAINTER.replace("It rains.", HOSTILE.replace("\\", "\\\\").replace('"', '\\"')))
    answers = [[HOSTILE + do("text"), f'<tool_call>{{"name": "{HOSTILE[:9]}"}}</tool_call>', HOSTILE], [paint(100)]]
    played = Played(painter, processor, *answers).run()
    facts = [("model", HOSTILE)]
    page = write_page(painter.parent / "page.html", facts, [e.sample() for e in played.play.ended], played.log)
    opened = open_page(page)
    wait = "const done = arguments[0]; Promise.all([...document.images].map(i => i.decode())).then(() => done(null), e => done(String(e)))"
    assert opened.execute_async_script(wait) is None, "a picture of the page cannot be decoded"
    assert "taken" not in opened.title
    sources = opened.execute_script("return [...document.images].map(i => [i.src.slice(0, 16), i.naturalWidth])")
    assert sources == [["data:image/webp;", 56]] * 3, "two first screens, and the one that was painted"
    of = "return [...document.querySelectorAll('details')[arguments[0]].querySelectorAll(arguments[1])].map(e => e.innerText)"
    ended = [episode.number for episode in played.play.ended]
    first, second = ended.index(0), ended.index(1)
    texts = opened.execute_script(of, first, ".text")
    assert texts == ["Make it 100 red.", HOSTILE, HOSTILE, answers[0][1], texts[4], HOSTILE]
    assert texts[4].startswith("Error: ")
    assert opened.execute_script(of, first, "pre") == ['do {"what": "text"}']
    assert opened.execute_script(of, second, "pre") == ['paint {"red": 100}']
    assert len(opened.execute_script(of, first, ".failed")) == 1
    assert "goal reached after 1 step" in opened.execute_script(of, second, "summary")[0]
    assert "answered after 3 steps, 1 × malformed call" in opened.execute_script(of, first, "summary")[0]
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()], "nothing else is requested"


# ---- the toy --------------------------------------------------------------------------------------------------------


@pytest.fixture
def buttons():
    """The toy environment, as the command imports it."""
    return Environment(ROOT / "recipes" / "buttons.py").module


def test_the_toy_is_solved_by_what_is_lit_alone(buttons):
    """Which button is lit is read from the pixels of the screen, and not from the environment's own list."""
    for episode in range(20):
        screen, goal = buttons.reset(episode)
        number = int(re.fullmatch(r"Put out (\d) lights\.", goal)[1])
        assert 2 <= number <= 4
        for done in range(number):
            assert not buttons.goal_reached(), f"after {done} of {number}"
            (lit,) = lit_in(screen, buttons.COLOURS)
            for other in buttons.COLOURS.keys() - {lit}:
                assert buttons.act("click", {"button": other}).tobytes() == screen.tobytes(), "only the lit one acts"
            screen = buttons.act("click", {"button": lit})
        assert buttons.goal_reached()
        assert not lit_in(screen, buttons.COLOURS)


def lit_in(screen: Image.Image, colours: dict[str, tuple[int, int, int]]) -> list[str]:
    """The names of the colours that a screen shows."""
    pixels = np.asarray(screen)
    return [name for name, colour in colours.items() if (pixels == colour).all(axis=2).any()]


def test_no_screen_of_the_tests_is_trained_on(buttons, tmp_path):
    """Nor is any episode of the solver wrong: each is accepted as data, and its calls reach the goal."""
    done = subprocess.run([sys.executable, "recipes/buttons.py", tmp_path, "--episodes", "150"], cwd=ROOT, check=False)
    assert done.returncode == 0
    trained = {Image.open(path).tobytes() for path in (tmp_path / "media").iterdir()}
    assert len(trained) > 300
    tests = {buttons.reset(episode)[0].tobytes() for episode in range(200)}
    assert len(tests) > 100, "200 episodes of hardly as many screens"
    assert not trained & tests
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 150
    for number, line in enumerate(lines[:20]):
        buttons.reset(buttons.FIRST_FOR_TRAINING + number)
        for message in json.loads(line)["messages"]:
            for call in message.get("tool_calls", []):
                assert not buttons.goal_reached()
                buttons.act("click", call["function"]["arguments"])
        assert buttons.goal_reached()


def recipe(folder: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess:
    settings |= {name: str(folder / name.lower()) for name in ("DATA", "RUN", "OUTPUT")}
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **settings}
    return subprocess.run(
        ["./recipes/agent.sh", *flags], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=3600
    )


def reached(printed: str) -> list[float]:
    """The shares of goals reached that a recipe printed: before, after."""
    found = re.findall(r"goals reached  (\d+) of (\d+): ", printed)
    return [int(goals) / int(episodes) for goals, episodes in found]


@pytest.mark.slow
def test_the_recipe(tiny_path, tmp_path):
    """Cut to 2 steps: from the solver's episodes to the rate after."""
    done = recipe(tmp_path, "--max_steps", "2", EPISODES="8", SOLVED="32", MODEL=str(tiny_path), AT_LEAST="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(reached(done.stdout)) == 2
    for name in ("before", "after"):
        assert (tmp_path / "output" / name / "episodes.html").is_file()


@pytest.mark.slow
def test_the_recipe_learns_to_act(tmp_path):
    """As it is: 200 episodes on screens that were not trained on, under 10 % before and at least 80 % after."""
    done = recipe(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before, after = reached(done.stdout)
    assert before < 0.1
    assert after >= 0.8
