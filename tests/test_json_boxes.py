"""Boxes as Qwen2.5-VL and Qwen3-VL write them: JSON, in pixels of the resized image or in thousandths.

Texts and numbers are written by hand; sizes of resized images are those that the released processors make
(transformers' `smart_resize`). What the released models answer is copied from their cookbooks.
"""

import json
import random
import sys

import pytest
from PIL import Image, ImageDraw
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import finetune
from tests import runs, warm
from tests.samples import assistant, entry, text, user
from tests.test_boxes import SIDEWAYS, TALL, WIDE, box, with_images
from util.collator import Collator
from util.command_line import UserError
from util.config import Config
from util.cost.measure import QuickSize, look, measure
from util.data import boxes
from util.data.settings import SampleSettings
from util.dataset import DataError, Examples, Samples, load_examples
from util.results.evaluate import QuestionSamples, answer_of, questions_of
from util.results.metrics import box_iou, boxes_of
from util.results.suited import kind_of_answer
from util.tiny_model import make_tiny_model
from util.vision import Budget, box_scale

# Of the images of test_boxes.py Qwen2.5-VL sees WIDE as 392 x 196 and TALL as 112 x 308.
LARGE = {"type": "image", "image": "large.png"}  # 2000 x 1000
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of each family's tiny model."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(folder / family, model_type=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def processors(models):
    return {family: AutoProcessor.from_pretrained(path) for family, path in models.items()}


@pytest.fixture
def folder(tmp_path):
    return with_images(tmp_path)


@pytest.fixture
def samples_of(folder, processors):
    """A function (entries, model_type, limits of the budget) -> Samples."""

    def make(entries: list[dict], family: str, **budget) -> Samples:
        file = folder / "data.json"
        file.write_text(json.dumps(entries))
        examples = Examples([str(file)], processors[family])
        return Samples(examples, processors[family], Budget(model_type=family, **budget))

    return make


def said(samples: Samples, index: int = 0) -> list[str]:
    """The text of every message."""
    messages = samples.example(index).messages
    return ["".join(item.get("text", "") for item in message["content"]) for message in messages]


# ---- to text --------------------------------------------------------------------------------------------------------


def fenced(*lines: str) -> str:
    return "```json\n[\n\t" + ",\n\t".join(lines) + "\n]\n```"


# (messages, what Qwen2.5-VL reads, what Qwen3-VL reads)
# 392 / 400 = 196 / 200 = 0.98: 40 -> 39.2, 50 -> 49, 199.9 -> 195.902, and 200 -> 196, of which the last is 195
# 112 / 100 = 1.12, 308 / 300 = 1.0267: 50 -> 56, 30 -> 30.8, 150 -> 154, 100 -> 112, 300 -> 308
# In thousandths: 40 / 400 -> 100, 50 / 200 -> 250, 199.9 / 400 -> 499.75, 200 / 200 -> 1000, of which the last is 999
WRITTEN = {
    "an answer": (
        [user([WIDE, text("Where?")]), assistant([box(40, 50, 199.9, 200, label="dog")])],
        ["Where?", fenced('{"bbox_2d": [39, 49, 196, 195], "label": "dog"}')],
        ["Where?", fenced('{"bbox_2d": [100, 250, 500, 999], "label": "dog"}')],
    ),
    "neighbours, of which two share a label": (
        [user([WIDE]), assistant([{"type": "box", "label": "dog", "bbox": [[0, 0, 4, 2], [8, 4, 40, 20]]},
                                  text(", "), box(0, 0, 8, 4, label="猫 \"x\""), text("\n"), box(0, 0, 40, 50)])],
        ["", fenced('{"bbox_2d": [0, 0, 4, 2], "label": "dog"}', '{"bbox_2d": [8, 4, 39, 20], "label": "dog"}',
                    '{"bbox_2d": [0, 0, 8, 4], "label": "猫 \\"x\\""}', '{"bbox_2d": [0, 0, 39, 49]}')],
        ["", fenced('{"bbox_2d": [0, 0, 10, 10], "label": "dog"}', '{"bbox_2d": [20, 20, 100, 100], "label": "dog"}',
                    '{"bbox_2d": [0, 0, 20, 20], "label": "猫 \\"x\\""}', '{"bbox_2d": [0, 0, 100, 250]}')],
    ),
    "amid text": (
        [user([WIDE]), assistant([text("A "), box(0, 0, 4, 2, label="dog"), text(" and "), box(0, 0, 8, 4), text(".")])],
        ["", 'A [{"bbox_2d": [0, 0, 4, 2], "label": "dog"}] and [{"bbox_2d": [0, 0, 8, 4]}].'],
        ["", 'A [{"bbox_2d": [0, 0, 10, 10], "label": "dog"}] and [{"bbox_2d": [0, 0, 20, 20]}].'],
    ),
    "in a question": (
        [user([WIDE, text("What is in "), box(0, 0, 400, 100), box(0, 0, 40, 50), text("?")]), assistant("A dog.")],
        ['What is in [{"bbox_2d": [0, 0, 391, 98]}, {"bbox_2d": [0, 0, 39, 49]}]?', "A dog."],
        ['What is in [{"bbox_2d": [0, 0, 999, 500]}, {"bbox_2d": [0, 0, 100, 250]}]?', "A dog."],
    ),
    "a label alone": (
        [user([text("Where is the "), {"type": "box", "label": "dog"}, text("?")]), assistant("Gone.")],
        ["Where is the dog?", "Gone."],
        ["Where is the dog?", "Gone."],
    ),
    "an answer of a label alone": (
        [user([WIDE, text("What?")]), assistant([{"type": "box", "label": "dog"}])],
        ["What?", "dog"],
        ["What?", "dog"],
    ),
    "as people see a photo": (
        [user([SIDEWAYS]), assistant([box(50, 30, 100, 300)])],
        ["", fenced('{"bbox_2d": [56, 31, 111, 307]}')],
        ["", fenced('{"bbox_2d": [500, 100, 999, 999]}')],
    ),
    "two images, each by its number": (
        [user([WIDE, TALL]), assistant([box(0, 0, 200, 100, image_index=0), box(0, 0, 50, 150, image_index=1)])],
        ["", fenced('{"bbox_2d": [0, 0, 196, 98]}', '{"bbox_2d": [0, 0, 56, 154]}')],
        ["", fenced('{"bbox_2d": [0, 0, 500, 500]}', '{"bbox_2d": [0, 0, 500, 500]}')],
    ),
    "the nearest message with an image": (
        [user([WIDE]), assistant("1"), user([TALL]), assistant("2"), user("And?"), assistant([box(0, 0, 50, 150)])],
        ["", "1", "", "2", "And?", fenced('{"bbox_2d": [0, 0, 56, 154]}')],
        ["", "1", "", "2", "And?", fenced('{"bbox_2d": [0, 0, 500, 500]}')],
    ),
    "a size of its own": (  # 56 x 56: 40 / 400 x 56 = 5.6, 50 / 200 x 56 = 14, and half of the width is 28
        [user([{**WIDE, "resized_height": 56, "resized_width": 56}]), assistant([box(40, 50, 200, 200)])],
        ["", fenced('{"bbox_2d": [6, 14, 28, 55]}')],
        ["", fenced('{"bbox_2d": [100, 250, 500, 999]}')],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_box_becomes_json(case, family, samples_of):
    messages, *wanted = WRITTEN[case]
    assert said(samples_of([entry(*messages)], family)) == wanted[FAMILIES.index(family)]


def test_at_the_smallest_budget(samples_of):
    """One token is 28 x 28 pixels: 40 / 400 x 28 = 2.8, 50 / 200 x 28 = 7, 199.9 / 400 x 28 = 13.99."""
    entries = [entry(user([WIDE]), assistant([box(40, 50, 199.9, 200)]))]
    assert said(samples_of(entries, "qwen2_5_vl", max_pixels=784))[1] == fenced('{"bbox_2d": [3, 7, 14, 27]}')
    assert said(samples_of(entries, "qwen3_vl", max_pixels=1024))[1] == fenced('{"bbox_2d": [100, 250, 500, 999]}')


@pytest.mark.parametrize("family", FAMILIES)
def test_a_box_outside_of_its_image_is_refused(family, samples_of, folder):
    samples = samples_of([entry(user([WIDE]), assistant([box(10, 10, 400.5, 20)]))], family)
    with pytest.raises(DataError) as error:
        samples.example(0)
    assert str(error.value).startswith(
        f"{folder / 'data.json'}, sample 0, message 1: bbox [10, 10, 400.5, 20] lies outside of image 0, which is 400 "
        "pixels wide and 200 high as people see it"
    )


def test_an_image_of_a_shape_that_no_size_fits_is_refused_by_name(samples_of, folder):
    Image.new("RGB", (2100, 10), "white").save(folder / "wide.png")
    samples = samples_of([entry(user([WIDE]), assistant([box(0, 0, 9, 9)]))], "qwen2_5_vl")
    with pytest.raises(DataError, match=r"sample 0: .*wide\.png.*2100x10 pixels: one side is more than 200 times"):
        samples.example(0)


def test_an_answers_list_is_supervised_and_a_questions_is_not(samples_of, processors):
    messages = user([WIDE, box(0, 0, 400, 100)]), assistant([box(0, 0, 4, 2)])
    for family, wanted in (("qwen2_5_vl", "[0, 0, 4, 2]"), ("qwen3_vl", "[0, 0, 10, 10]")):
        encoded = samples_of([entry(*messages)], family)[0].encoded
        ids = [token for token, marked in zip(encoded.input_ids, encoded.supervised, strict=True) if marked]
        text_of_ids = processors[family].tokenizer.decode(ids)
        assert text_of_ids == fenced(f'{{"bbox_2d": {wanted}}}') + "<|im_end|>\n"


# ---- the same everywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_training_and_showing_agree(family, samples_of):
    from util.results.show import describe

    samples = samples_of([entry(*messages) for messages, *_ in WRITTEN.values()], family, min_pixels=784)
    quick, found = QuickSize(samples), look(samples, 10_000, "stop")
    for index in range(len(samples)):
        sample, size = samples[index], samples.size(index)
        tokens = len(Collator(family)([sample]).input_ids)
        assert (size.tokens, size.supervised) == (tokens, sum(sample.encoded.supervised))
        assert found[index].size == size == quick(samples.example(index))
        shown = describe(samples, index)
        assert f": {tokens:,} tokens" in shown
        for line in "\n".join(said(samples, index)).splitlines():
            assert line in shown


def many_boxes(count: int, **keys) -> list[dict]:
    """Boxes over the whole of the large image, so that their numbers have fewer digits where it is made smaller."""
    return [box(9 * n + 100, 900, 9 * n + 1000, 1000, label="x", **keys) for n in range(count)]


@pytest.mark.parametrize("limit", [1000, 700, 560])
def test_a_shrunk_sample_has_the_boxes_of_its_own_grid(limit, samples_of):
    """The large image is shrunk, the numbers of its boxes with it, and no more than has to be."""
    entries = [
        entry(user([LARGE, WIDE, text("Where?")]), assistant([*many_boxes(6, image_index=0), box(0, 0, 40, 50, image_index=1)])),
        entry(user([WIDE]), assistant([box(40, 50, 199.9, 200)])),
    ]  # fmt: skip
    samples = samples_of(entries, "qwen2_5_vl")
    before = samples.size(0)
    (at_first,) = said(samples)[1:]
    sizes = measure(samples, limit, SampleSettings(on_long_sample="shrink"))
    assert list(samples.shrunk) == [0]
    sample = samples[0]
    batch = Collator("qwen2_5_vl")([sample])
    assert sizes[0] == samples.size(0)
    assert len(batch.input_ids) == sizes[0].tokens <= limit < before.tokens
    assert sizes[0].supervised == sum(sample.encoded.supervised)
    grid = sample.media[0].grid
    height, width = grid.h * 14, grid.w * 14
    assert width < 1400, "of 1,280 tokens at most, before"
    (answer,) = said(samples)[1:]
    # by hand from the grid: 2000 x 1000 pixels, the last row is 1000 -> height, of which the last is height - 1
    wanted = [[round((9 * n + 100) * width / 2000), round(900 * height / 1000), round((9 * n + 1000) * width / 2000), height - 1]
              for n in range(6)]  # fmt: skip
    listed = json.loads(answer.removeprefix("```json\n").removesuffix("\n```"))
    assert [one["bbox_2d"] for one in listed[:6]] == wanted
    assert len(answer) < len(at_first), "numbers of a smaller image have fewer digits"
    larger = dict(vars(samples.shrunk[0]))
    larger["cap_pixels"] += 784
    samples.shrunk[0] = Budget(**larger)
    assert samples.size(0).tokens > limit, "no more was taken away than had to be"


def test_a_shrunk_question_is_answered_in_its_own_grid(samples_of, processors, folder):
    entries = [entry(user([LARGE, text("Where?")]), assistant([box(0, 0, 1000, 500)]))]
    samples = samples_of(entries, "qwen2_5_vl")
    measure(samples, 300, SampleSettings(on_long_sample="shrink"))
    (one,) = questions_of(samples.examples, shrunk=samples.shrunk)
    questions = QuestionSamples([one], processors["qwen2_5_vl"], samples.budget)
    prompt, whole = questions[0]
    assert whole.encoded.input_ids == samples[0].encoded.input_ids
    assert prompt.media[0].grid == samples[0].media[0].grid
    assert answer_of(questions.example(0), "", 0.0).reference == said(samples)[1]


def test_a_run_trains_on_the_boxes_that_it_measured(samples_of, models, tmp_path):
    """Through finetune.py: the tokens of its step are those of samples measured before, all of them shrunk."""
    entries = [entry(user([LARGE, text("?")]), assistant(many_boxes(1 + number % 4))) for number in range(6)]
    samples = samples_of(entries, "qwen2_5_vl", min_pixels=784)
    sizes = measure(samples, 400, SampleSettings(on_long_sample="shrink"))
    assert len(samples.shrunk) == 6
    settings = {"data": samples.examples.files, "min_pixels": 784, "max_pixels": 1280 * 784, "max_tokens": 400,
                "on_long_sample": "shrink", "global_batch_size": 6, "max_steps": 1}  # fmt: skip
    run = finetune.train(Config(**runs.settings(models["qwen2_5_vl"], tmp_path / "run", **settings)))
    (line,) = runs.log(run)
    assert (line["samples"], line["tokens"]) == (6, sum(size.tokens for size in sizes))


# ---- back to pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_to_json_to_pixels(family):
    """Within half a pixel of the resized image, or half a thousandth; one at the right and lower edge."""
    choose = random.Random(5)
    for _ in range(1500):
        width, height = choose.randint(30, 4000), choose.randint(30, 4000)
        budget = Budget(model_type=family, max_pixels=choose.choice([784, 10_000, 1_000_000]))
        side = budget.factor
        resized = smart_resize(height, width, side, min(4 * side**2, budget.max_pixels), budget.max_pixels)
        scale = box_scale({}, width, height, budget)
        units = (resized[1], resized[0]) if family == "qwen2_5_vl" else (1000, 1000)
        if (
            min(resized) >= side and resized[0] * resized[1] <= budget.max_pixels
        ):  # else transformers breaks its own rule
            assert (scale.columns, scale.rows) == units
        wanted = []
        for _ in range(choose.randint(1, 4)):
            xs, ys = ([choose.uniform(0, length) for _ in range(2)] for length in (width, height))
            wanted.append((min(xs), min(ys), max(xs), max(ys)))
        written = boxes.as_json(
            [boxes.LabelledBox("a", scale.to_numbers(one)) for one in wanted], choose.random() < 0.5
        )
        read = boxes.from_text(written, scale)
        assert [label for label, _ in read] == ["a"] * len(wanted)
        for (_, got), one in zip(read, wanted, strict=True):
            sides = ((width, scale.columns), (height, scale.rows)) * 2
            for value, true, (length, count) in zip(got, one, sides, strict=True):
                unit = length / count
                most = unit if true > length - 1.5 * unit else unit / 2
                assert abs(value - true) <= most * (1 + 1e-9), (one, got, width, height)


# Answers of Qwen3-VL (cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL) and of Qwen2.5-VL in its own form
DISHES = """```json
[
\t{"bbox_2d": [74, 361, 324, 808], "label": "plate/dish"},
\t{"bbox_2d": [739, 440, 999, 901], "label": "plate/dish"},
\t{"bbox_2d": [162, 0, 303, 354], "label": "wine bottle"}
]
```"""
ANSWERS = {
    "a list between fences": (DISHES, [("plate/dish", (74, 361, 324, 808)), ("plate/dish", (739, 440, 999, 901)),
                                       ("wine bottle", (162, 0, 303, 354))]),
    "cut off within a box": (DISHES[: DISHES.index("901")], [("plate/dish", (74, 361, 324, 808))]),
    "cut off within a label": (DISHES[: DISHES.index("},") + 2] + '{"bbox_2d": [1, 2, 3, 4], "lab', [("plate/dish", (74, 361, 324, 808)), (None, (1, 2, 3, 4))]),
    "one object, its keys in another order": ('{"label": "dog", "bbox_2d": [1,2,3,4]}', [("dog", (1, 2, 3, 4))]),
    "without a label, on several lines": ('{\n"bbox_2d": [135, 114, 1016, 672]\n}', [(None, (135, 114, 1016, 672))]),
    "labels stay with their objects": (
        '[{"bbox_2d": [1, 2, 3, 4]}, {"label": "cat", "bbox_2d": [5, 6, 7, 8]}, {"bbox_2d": [9, 9, 9, 9]}]',
        [(None, (1, 2, 3, 4)), ("cat", (5, 6, 7, 8)), (None, (9, 9, 9, 9))],
    ),
    "as Python writes it": ("[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]", [("dog", (1, 2, 3, 4))]),
    "decimals and negative numbers": ('{"bbox_2d": [-1.5, 2.25, 3., 4]}', [(None, (-1.5, 2.25, 3, 4))]),
    "quotes and braces in a label": ('{"bbox_2d": [1, 2, 3, 4], "label": "a \\"}{ b\\u00e9"}', [('a "}{ bé', (1, 2, 3, 4))]),
    "an escape that JSON does not know": ('{"bbox_2d": [1, 2, 3, 4], "label": "a\\x"}', [("a\\x", (1, 2, 3, 4))]),
    "half of a surrogate pair": ('{"bbox_2d": [1, 2, 3, 4], "label": "a\\ud83d"}', [("a?", (1, 2, 3, 4))]),
    "a blank label": ('{"bbox_2d": [1, 2, 3, 4], "label": " "}', [(None, (1, 2, 3, 4))]),
    "amid prose": ('It is here: {"bbox_2d": [1, 2, 3, 4], "label": "dog"}, I think.', [("dog", (1, 2, 3, 4))]),
    "three numbers": ('{"bbox_2d": [1, 2, 3], "label": "dog"}', []),
    "words for numbers": ('{"bbox_2d": ["a", 2, 3, 4]}', []),
    "none": ("[]", []),
    "nothing": ("", []),
    "a mountain of braces": ("{" * 100_000 + '"label": "' * 1000, []),
    "Qwen2-VL's form": ("<|box_start|>(1,2),(3,4)<|box_end|>", [(None, (1, 2, 3, 4))]),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_are_read_however_broken(case):
    answer, wanted = ANSWERS[case]
    assert boxes.boxes_in(answer) == wanted
    assert boxes_of(answer) == [corners for _, corners in wanted]


def test_no_answer_raises():
    choose = random.Random(1)
    parts = ['{"bbox_2d": [', '"label": "', '"label":', "{", "}", "[", "]", '"', "'", "\\", "\\u", "\\ud83d", ",", "12",
             "-3", "4.5", "99999999", "a", "\n", "```json", "٣", "(1,2),(3,4)"]  # fmt: skip
    scales = [boxes.Scale(50, 7, "pixels", 28, 56), boxes.Scale(1, 1, "thousandths")]
    for _ in range(3000):
        answer = "".join(choose.choices(parts, k=choose.randint(0, 40)))
        for scale in scales:
            for _, corners in boxes.from_text(answer, scale):
                assert 0 <= corners[0] <= corners[2] <= scale.width
                assert 0 <= corners[1] <= corners[3] <= scale.height


def test_corners_outside_and_reversed():
    scale = boxes.Scale(400, 200, "pixels", 392, 196)
    read = boxes.from_text('{"bbox_2d": [500, 98, -7, 0]}', scale)
    assert read == [(None, (0, 0, 400, 100))]


# ---- scores, report and answers -------------------------------------------------------------------------------------


def test_the_overlap_is_the_same_in_every_unit():
    """Half of a box 10 wide: 100 of 200, in pixels as in thousandths."""
    for whole, half in (([0, 0, 10, 20], [0, 0, 5, 20]), ([0, 0, 500, 100], [0, 0, 250, 100])):
        reference, answer = fenced(json.dumps({"bbox_2d": whole})), json.dumps([{"bbox_2d": half, "label": "x"}])
        assert box_iou(answer, reference) == 0.5
        assert box_iou(reference, reference) == 1.0
        assert box_iou(reference[:-20], reference) == 0.0
        assert kind_of_answer(reference) == "boxes"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_box_question_is_evaluated(family, samples_of, processors, folder):
    samples_of([entry(user([WIDE]), assistant([box(0, 0, 400, 100)]))], family)
    examples = load_examples([str(folder / "data.json")], processors[family])
    questions = QuestionSamples(questions_of(examples), processors[family], Budget(model_type=family))
    right = {"qwen2_5_vl": [0, 0, 391, 98], "qwen3_vl": [0, 0, 999, 500]}[family]
    answer = answer_of(questions.example(0), json.dumps({"bbox_2d": right}), 0.0)
    assert answer.reference == fenced(f'{{"bbox_2d": {right}}}')
    assert answer.score("box_iou") == 1.0


def test_the_plan_knows_that_references_are_boxes(samples_of):
    """They are items until the sizes of images are known, and no text. An answer may be as long as they become."""
    from util.results.evaluate import chosen_questions, references_of, room_for, scoring_in_words

    samples = samples_of(
        [entry(user([WIDE]), assistant([box(n, 0, 40, 50, label="dog") for n in range(3)]))], "qwen3_vl"
    )
    config = Config(data=["data.json"], eval_data=["data.json"], eval_samples=1)
    assert "100% of the reference answers are boxes" in scoring_in_words(samples, config)
    ((_, reference),) = references_of(chosen_questions(samples, config), samples, "stop")
    ids = samples.processor.tokenizer(reference + "<|im_end|>\n")["input_ids"]
    assert room_for([reference], samples.processor) == len(ids) > 64


def test_an_answers_boxes_are_shown_in_pixels(folder, tmp_path, capsys):
    """Half of the width and the whole height, of an image of 100 x 300 that Qwen2.5-VL sees as 112 x 308."""
    from util.results.answer import show_boxes

    seen = [{"type": "image", "image": str(folder / "sideways.jpg")}]
    for family, corners in (("qwen2_5_vl", [0, 0, 56, 308]), ("qwen3_vl", [0, 0, 500, 1000])):
        answer = fenced(json.dumps({"bbox_2d": corners, "label": "dog"}))
        show_boxes(answer, seen, Budget(model_type=family), tmp_path / "out")
        assert "      0.0      0.0     50.0    300.0  dog\n" in capsys.readouterr().out
    drawn = Image.open(tmp_path / "out" / "boxes.png")
    assert drawn.size == (100, 300)
    assert drawn.getpixel((50, 150)) != (255, 255, 255), "the right side of the box"
    assert drawn.getpixel((25, 150)) == (255, 255, 255)


@pytest.fixture
def answered(folder):
    """Files of answers to one question of a data file, by models of both families: right half and whole of a box."""
    from dataclasses import asdict

    from util.results.answer_files import Answer, write_answers

    media = [{**WIDE, "image": str(folder / "wide.png")}]
    # 49 of 196 rows are 250 thousandths, 196 of 392 columns are 500
    written = {
        "qwen2_5_vl": ("[0, 49, 196, 98]", "[98, 49, 196, 98]"),
        "qwen3_vl": ("[0, 250, 500, 500]", "[0, 250, 500, 500]"),
    }
    files = []
    for family, (reference, answer) in written.items():
        answers = []
        for number in range(2):
            texts = [fenced(f'{{"bbox_2d": {numbers}}}') for numbers in (reference, answer)]
            answers.append(Answer(f"data.json, sample {number}", None, "Where?", media, *texts, 1.0, []))
        files.append(folder / f"{family}.jsonl")
        write_answers(files[-1], {"model": family, "budget": asdict(Budget(model_type=family))}, answers)
    return files


def test_the_report_draws_boxes_where_they_are(answered, tmp_path):
    """In thousandths of the image, whatever each column's model counts in."""
    import re

    from util.results.report import write_report

    page = write_report(answered, tmp_path / "report.html", ["box_iou"], None)
    facts = json.loads(re.search('id="facts">(.*?)</script>', page.read_text())[1])
    whole, half = [[0, 250, 500, 500]], [[250, 250, 500, 500]]
    assert [row["boxes"] for row in facts["rows"]] == [[whole, half, whole]] * 2
    assert facts["changes"] == [[2, 0, 0]]


def test_families_are_compared_on_the_same_boxes(answered):
    from util.results.compare import compare

    table = compare([str(file) for file in answered], "box_iou", None)
    assert "50.0" in table
    assert "100.0" in table
    lines = answered[1].read_text().splitlines()
    answered[1].write_text("\n".join([lines[0], lines[1].replace("wide.png", "tall.png"), lines[2]]) + "\n")
    with pytest.raises(UserError, match="answers other questions than"):
        compare([str(file) for file in answered], "box_iou", None)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_a_tiny_model_learns_boxes(model, tmp_path):
    """The two commands as a user types them: trained on 12 drawn rectangles, it gives them back. The pictures are made
    smaller than they are, so Qwen2.5-VL's numbers are not those of the data file."""
    choose = random.Random(3)
    entries = []
    for number in range(12):
        x, y = choose.randint(0, 250), choose.randint(0, 150)
        corners = [x, y, x + choose.randint(60, 150), y + choose.randint(60, 150)]
        colour = choose.choice(["red", "blue", "black"])
        picture = Image.new("RGB", (400, 300), "white")
        ImageDraw.Draw(picture).rectangle(corners, fill=colour)
        picture.save(tmp_path / f"{number}.png")
        question = user([{"type": "image", "image": f"{number}.png"}, text("Where is it?")])
        entries.append(entry(question, assistant([box(*corners, label=colour)])))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    run, data = str(tmp_path / "run"), str(tmp_path / "data.json")
    for words in (
        ["finetune.py", "--model", model, "--data", data, "--device", "cpu", "--max_pixels", str(24 * 28**2), "--epochs",
         "150", "--global_batch_size", "12", "--learning_rate", "2e-3", "--num_workers", "0", "--output_dir", run],
        ["test_on_trained_model.py", run, "--data", data, "--device", "cpu", "--metrics", "box_iou", "--at_least", "0.9",
         "--output_dir", str(tmp_path / "answers")],
    ):  # fmt: skip
        done = warm.run([sys.executable, *words])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first = json.loads((tmp_path / "answers" / "after.jsonl").read_text().splitlines()[1])
    columns = {"tiny-qwen2.5-vl": 140, "tiny-qwen3-vl": 1000}[model]  # of 400; 140 x 112 pixels are 20 of 24 tokens
    assert boxes_of(first["reference"])[0][0] == round(
        columns * entries[0]["messages"][1]["content"][0]["bbox"][0] / 400
    )
