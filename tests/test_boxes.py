"""Boxes in pixels -> Qwen2-VL's text -> boxes in pixels, against texts and numbers written by hand.

Those of the other families, which write JSON, are in test_json_boxes.py.
"""

import json
import random
import sys

import pytest
from PIL import Image

from tests import warm
from tests.conftest import ROOT
from tests.samples import assistant, entry, system, text, user
from util.__main__ import main as command
from util.cost.measure import QuickSize, look
from util.data import boxes
from util.dataset import DataError, Examples, Samples, load_examples
from util.results.evaluate import QuestionSamples, answer_of, questions_of
from util.results.metrics import box_iou, boxes_of
from util.vision import Budget

WIDE = {"type": "image", "image": "wide.png"}  # 400 x 200
TALL = {"type": "image", "image": "tall.png"}  # 100 x 300
SIDEWAYS = {"type": "image", "image": "sideways.jpg"}  # stored 300 x 100, seen 100 x 300
CLIP = {"type": "video", "video": ["wide.png", "wide.png"]}


def box(*bbox, **keys) -> dict:
    return {"type": "box", "bbox": list(bbox), **keys}


@pytest.fixture
def folder(tmp_path):
    return with_images(tmp_path)


def with_images(tmp_path):
    """A folder, in which there are now images of several shapes."""
    Image.new("RGB", (400, 200), "white").save(tmp_path / "wide.png")
    Image.new("RGB", (100, 300), "white").save(tmp_path / "tall.png")
    Image.new("RGB", (2000, 1000), "white").save(tmp_path / "large.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to be seen
    Image.new("RGB", (300, 100), "white").save(tmp_path / "sideways.jpg", exif=exif)
    return tmp_path


def samples_of(folder, entries: list[dict], processor, **budget) -> Samples:
    file = folder / "data.json"
    file.write_text(json.dumps(entries))
    return Samples(Examples([str(file)], processor), processor, Budget(**budget))


def marked(label: str | None, wanted: list, width: int, height: int) -> str:
    """The text of boxes in pixels of an image of that size."""
    scale = boxes.Scale(width, height)
    return boxes.as_marks(label, [boxes.LabelledBox(label, scale.to_numbers(box)) for box in wanted])


def said(samples: Samples, index: int = 0) -> list[str]:
    """The text of every message."""
    messages = samples.example(index).messages
    return ["".join(item.get("text", "") for item in message["content"]) for message in messages]


# ---- to text --------------------------------------------------------------------------------------------------------

# 40/400 = 0.1, 199.9/400 = 0.49975, 50/200 = 0.25, 200/200: the last cell
DOG = "<|object_ref_start|>dog<|object_ref_end|>"
WRITTEN = {
    "in an answer": (
        [user([WIDE, text("Where?")]), assistant([box(40, 50, 199.9, 200, label="dog")])],
        ["Where?", f"{DOG}<|box_start|>(100,250),(499,999)<|box_end|>"],
    ),
    "in a question, among text": (
        [user([WIDE, text("What is in "), box(0, 0, 400, 100), text("?")]), assistant("A dog.")],
        ["What is in <|box_start|>(0,0),(999,500)<|box_end|>?", "A dog."],
    ),
    "several boxes of one label": (
        [user([WIDE]), assistant([{"type": "box", "label": "dog", "bbox": [[0, 0, 4, 2], [8, 4, 40, 20]]}])],
        ["", f"{DOG}<|box_start|>(0,0),(10,10)<|box_end|><|box_start|>(20,20),(100,100)<|box_end|>"],
    ),
    "several labels": (
        [user([WIDE]), assistant([box(0, 0, 4, 2, label="dog"), text(" and "), box(0, 0, 8, 4, label="猫")])],
        ["", f"{DOG}<|box_start|>(0,0),(10,10)<|box_end|> and "
         "<|object_ref_start|>猫<|object_ref_end|><|box_start|>(0,0),(20,20)<|box_end|>"],
    ),
    "a label alone": (
        [user([text("Where is the "), {"type": "box", "label": "dog"}, text("?")]), assistant("Gone.")],
        [f"Where is the {DOG}?", "Gone."],
    ),
    "as people see a photo": (
        [user([SIDEWAYS]), assistant([box(50, 30, 100, 300)])],
        ["", "<|box_start|>(500,100),(999,999)<|box_end|>"],
    ),
    "the image after the box": (
        [user([box(0, 0, 200, 100), text(" of "), WIDE]), assistant("Yes.")],
        ["<|box_start|>(0,0),(500,500)<|box_end|> of ", "Yes."],
    ),
    "the nearest message with an image": (
        [user([WIDE]), assistant("1"), user([TALL]), assistant("2"), user("And?"), assistant([box(0, 0, 50, 150)])],
        ["", "1", "", "2", "And?", "<|box_start|>(0,0),(500,500)<|box_end|>"],
    ),
    "an earlier image by number": (
        [user([WIDE, TALL]), assistant([box(0, 0, 200, 100, image_index=0), box(0, 0, 50, 150, image_index=1)])],
        ["", "<|box_start|>(0,0),(500,500)<|box_end|>" * 2],
    ),
    "videos do not count": (
        [user([CLIP, TALL, CLIP]), assistant([box(0, 0, 50, 150)])],
        ["", "<|box_start|>(0,0),(500,500)<|box_end|>"],
    ),
    "its own pixel budget does not matter": (
        [user([{**WIDE, "resized_height": 56, "resized_width": 56}]), assistant([box(40, 50, 200, 200)])],
        ["", "<|box_start|>(100,250),(500,999)<|box_end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_a_box_becomes_text(case, folder, processor):
    messages, wanted = WRITTEN[case]
    assert said(samples_of(folder, [entry(*messages)], processor)) == wanted


def test_the_marks_are_one_token_each(official_processor):
    """Ids from the published tokenizer_config.json; 220-odd digits and signs are ordinary text."""
    written = marked("dog", [(40, 50, 200, 200)], 400, 200)
    ids = official_processor.tokenizer(written)["input_ids"]
    assert ids[:1] + ids[2:4] + ids[-1:] == [151646, 151647, 151648, 151649]
    assert official_processor.tokenizer.decode(ids[1:2]) == "dog"
    assert official_processor.tokenizer.decode(ids[4:-1]) == "(100,250),(500,999)"


# ---- refused --------------------------------------------------------------------------------------------------------

ONE = "bbox {} lies outside of image 0, which is 400 pixels wide and 200 high as people see it"
REFUSED = {
    "outside, right": (box(10, 10, 400.5, 20), ONE.format("[10, 10, 400.5, 20]")),
    "outside, below": (box(10, 10, 20, 201), ONE.format("[10, 10, 20, 201]")),
    "outside, left": (box(-1, 10, 20, 20), "bbox [-1, 10, 20, 20] lies outside of its image"),
    "empty": (box(10, 10, 10, 20), "bbox [10, 10, 10, 20] is empty"),
    "reversed": (box(20, 10, 10, 20), "bbox [20, 10, 10, 20] has its corners reversed"),
    "one of several": ({"type": "box", "bbox": [[0, 0, 1, 1], [0, 5, 1, 5]]}, "bbox [0, 5, 1, 5] is empty"),
    "three numbers": (box(1, 2, 3), "bbox [1, 2, 3] is not 4 numbers"),
    "not a number": (box(1, 2, float("nan"), 4), "bbox [1, 2, nan, 4] is not 4 numbers"),
    "infinite": (box(1, 2, float("inf"), 4), "bbox [1, 2, inf, 4] is not 4 numbers"),
    "true": (box(0, 0, True, True), "bbox [0, 0, True, True] is not 4 numbers"),
    "text": (box("1", "2", "3", "4"), "bbox ['1', '2', '3', '4'] is not 4 numbers"),
    "no list": ({"type": "box", "bbox": "1,2,3,4"}, "bbox '1,2,3,4' is not 4 numbers"),
    "an empty list": ({"type": "box", "bbox": []}, "bbox [] is not 4 numbers"),
    "a list of nothing": ({"type": "box", "bbox": [[]]}, "bbox [] is not 4 numbers"),
    "nothing": ({"type": "box"}, "a box has no 'bbox'"),
    "an unknown key": (
        box(1, 2, 3, 4, colour="red"),
        "unknown key 'colour' in an item of type box; known are type, label",
    ),
    "an empty label": (box(1, 2, 3, 4, label=" "), "the label of a box is text without '<|'"),
    "a label with a mark": (box(1, 2, 3, 4, label="a<|box_end|>"), "the label of a box is text without '<|'"),
    "a label with a control token": (box(1, 2, 3, 4, label="<|im_end|>"), "the label of a box is text without '<|'"),
    "a label that is no text": (box(1, 2, 3, 4, label=7), "the label of a box is text without '<|'"),
    "half a character": (box(1, 2, 3, 4, label="\ud83d"), "text holds half of a surrogate pair"),
    "no such image": (box(1, 2, 3, 4, image_index=1), "image_index 1 of a box names no image; images 0 to 0"),
    "an image by name": (box(1, 2, 3, 4, image_index="wide.png"), "image_index 'wide.png' of a box names no image"),
    "true as a number": (box(1, 2, 3, 4, image_index=True), "image_index True of a box names no image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_box_is_refused_by_name(case, folder, processor):
    item, message = REFUSED[case]
    samples = samples_of(folder, [entry(user("Hi"), assistant("Hi"), user([WIDE]), assistant([item]))], processor)
    with pytest.raises(DataError) as error:
        samples.example(0)
    assert str(error.value).startswith(f"{folder / 'data.json'}, sample 0, message 3: {message}")
    if "bbox" in item and "label" not in item and "image_index" not in item and "colour" not in item:
        assert "'bbox' is [x1, y1, x2, y2] or a list of such, in pixels" in str(error.value)


def test_which_image_must_be_clear(folder, processor):
    two = entry(user([TALL]), assistant("1"), user([WIDE, text("or"), TALL]), assistant([box(0, 0, 9, 9)]))
    with pytest.raises(
        DataError, match=r"message 3: a box could lie in any of images 1 to 2; say which by its key 'image_index'"
    ):
        samples_of(folder, [two], processor).example(0)
    for messages in (
        [user([CLIP]), assistant([box(0, 0, 9, 9)])],
        [system([box(0, 0, 9, 9)]), user([WIDE]), assistant("x")],
    ):
        with pytest.raises(DataError, match="a box with no image at or before it"):
            samples_of(folder, [entry(*messages)], processor).example(0)
    later = entry(user([WIDE]), assistant([box(0, 0, 9, 9, image_index=1)]), user([TALL]), assistant("x"))
    with pytest.raises(DataError, match="image_index 1 of a box names no image; images 0 to 0 stand at or before"):
        samples_of(folder, [later], processor).example(0)


def test_check_data_names_bad_boxes_and_unreadable_images(folder, processor, monkeypatch, tmp_path, capsys, tiny_path):
    (folder / "broken.png").write_bytes(b"no image")
    good = entry(user([WIDE]), assistant([box(0, 0, 400, 200)]))
    bad = [entry(user([WIDE]), assistant([box(0, 0, 401, 200)])),
           entry(user([{"type": "image", "image": "broken.png"}]), assistant([box(0, 0, 4, 2)]))]  # fmt: skip
    samples_of(folder, [good, *bad], processor)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(["check", str(folder / "data.json"), "--model", str(tiny_path), "--device", "cpu"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert "3 samples, 1 can be trained on" in printed.out
    assert "2: 1 bad conversation, 1 not readable" in printed.out
    assert "sample 1, message 1: bbox [0, 0, 401, 200] lies outside of image 0" in printed.out
    assert "broken.png: not a readable image" in printed.out


# ---- the same everywhere --------------------------------------------------------------------------------------------


def test_measuring_training_and_showing_agree(folder, any_processor):
    from util.results.show import describe

    samples = samples_of(folder, [entry(*messages) for messages, _ in WRITTEN.values()], any_processor, min_pixels=784)
    quick, found = QuickSize(samples), look(samples, 10_000, "stop")
    for index in range(len(samples)):
        sample, size = samples[index], samples.size(index)
        tokens = len(sample.encoded.input_ids) + sum(medium.grid.tokens - 1 for medium in sample.media)
        assert (size.tokens, size.supervised) == (tokens, sum(sample.encoded.supervised))
        assert found[index].size == size == quick(samples.example(index))
        shown = describe(samples, index)
        assert f": {tokens:,} tokens" in shown
        assert all(line in shown for line in said(samples, index))


def test_an_answers_box_is_supervised_and_a_questions_is_not(folder, official_processor):
    samples = samples_of(
        folder, [entry(user([WIDE, box(0, 0, 400, 100)]), assistant([box(0, 0, 4, 2)]))], official_processor
    )
    encoded = samples[0].encoded
    ids = [token for token, marked in zip(encoded.input_ids, encoded.supervised, strict=True) if marked]
    assert official_processor.tokenizer.decode(ids) == "<|box_start|>(0,0),(10,10)<|box_end|><|im_end|>\n"
    assert encoded.input_ids.count(151648) == 2


def test_a_box_question_is_evaluated(folder, processor):
    """The reference is the box as text; an answer that covers half of it scores 0.5."""
    samples_of(
        folder, [entry(user([WIDE, TALL]), assistant("1"), user([WIDE]), assistant([box(0, 0, 400, 100)]))], processor
    )
    questions = QuestionSamples(
        questions_of(load_examples([str(folder / "data.json")], processor)), processor, Budget()
    )
    assert len(questions) == 2
    prompt, whole = questions[1]
    assert len(whole.encoded.input_ids) > len(prompt.encoded.input_ids)
    answer = answer_of(questions.example(1), "(0,0),(499,500)", 0.0)
    assert answer.reference == "<|box_start|>(0,0),(999,500)<|box_end|>"
    assert answer.score("box_iou") == pytest.approx(499 / 999)


# ---- back to pixels -------------------------------------------------------------------------------------------------


def test_pixels_to_text_to_pixels_within_half_a_cell():
    choose = random.Random(5)
    for _ in range(3000):
        width, height = choose.randint(1, 9000), choose.randint(1, 9000)
        whole = choose.random() < 0.5
        wanted = []
        for _ in range(choose.randint(1, 4)):
            xs, ys = (
                [choose.randint(0, side) if whole else choose.uniform(0, side) for _ in range(2)]
                for side in (width, height)
            )
            wanted.append((min(xs), min(ys), max(xs), max(ys)))
        read = boxes.from_text(marked("a b", wanted, width, height), boxes.Scale(width, height))
        assert [label for label, _ in read] == ["a b"] * len(wanted)
        for (_, got), box in zip(read, wanted, strict=True):
            for value, true, side in zip(got, box, (width, height) * 2, strict=True):
                assert abs(value - true) <= side / 2000 * (1 + 1e-9), (box, got, width, height)


PARSED = [
    (f"{DOG}<|box_start|>(100,250),(499,999)<|box_end|>", [("dog", (40.2, 50.1, 199.8, 199.9))]),
    ("(0,0),(9,9)", [(None, (0.2, 0.1, 3.8, 1.9))]),
    (
        f"{DOG}<|box_start|>(0,0),(9,9)<|box_end|>, <|box_start|>(9,9),(0,0)<|box_end|>",
        [("dog", (0.2, 0.1, 3.8, 1.9))] * 2,
    ),
    (f"{DOG} (0,0),(9,9) and then (0,0),(9,9)", [("dog", (0.2, 0.1, 3.8, 1.9)), (None, (0.2, 0.1, 3.8, 1.9))]),
    (f"A {DOG} here: {DOG.replace('dog', 'cat')}(0,0),(9,9)", [("cat", (0.2, 0.1, 3.8, 1.9))]),
    ("(-5,0),(2000,9)", [(None, (0.2, 0.1, 399.8, 1.9))]),
    ("", []),
    ("<|object_ref_start|>dog<|box_start|>(1,2),(3", []),
    ("(1,2)(3,4)", []),
    ("<|object_ref_start|>" * 2000, []),
    ("(((((" * 2000, []),
]


@pytest.mark.parametrize(("answer", "wanted"), PARSED)
def test_answers_are_read_however_broken(answer, wanted):
    read = boxes.from_text(answer, boxes.Scale(400, 200))
    assert [label for label, _ in read] == [label for label, _ in wanted]
    for (_, got), (_, corners) in zip(read, wanted, strict=True):
        assert got == pytest.approx(corners)
    assert len(read) == len(boxes_of(answer))


def test_no_answer_raises():
    choose, parts = random.Random(1), ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "(", ")", ",",
                                       "12", "-3", "99999999", "a", "\n", "٣", "<|"]  # fmt: skip
    for _ in range(3000):
        boxes.from_text("".join(choose.choices(parts, k=choose.randint(0, 40))), boxes.Scale(choose.randint(1, 50), 7))


def test_a_perfect_answer_scores_one():
    written = marked("dog", [(40, 50, 200, 200), (3, 3, 90, 90)], 400, 200)
    assert box_iou(written, written) == 1.0


def test_boxes_are_drawn(folder):
    picture = Image.open(folder / "wide.png")
    drawn = boxes.draw_boxes(
        picture, [boxes.LabelledBox("dog", (100.0, 60.0, 300.0, 160.0)), boxes.LabelledBox(None, (0, 0, 400, 200))]
    )
    assert picture.getpixel((100, 100)) == (255, 255, 255), "the picture itself stays"
    assert drawn.size == (400, 200)
    assert drawn.getpixel((100, 100)) == drawn.getpixel((200, 160)) != (255, 255, 255)
    assert drawn.getpixel((200, 100)) == (255, 255, 255), "nothing is drawn inside"


def test_an_answers_boxes_are_shown_in_pixels(folder, tmp_path, capsys):
    from util.results.answer import show_boxes

    show_boxes("No box.", [WIDE], Budget(), tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()
    seen = [{"type": "image", "image": str(folder / "sideways.jpg")}]
    show_boxes(f"{DOG}<|box_start|>(0,0),(499,999)<|box_end|>", seen, Budget(), tmp_path / "out")
    file = tmp_path / "out" / "boxes.png"
    assert capsys.readouterr().out == (
        f"\nboxes in pixels of {folder / 'sideways.jpg'} (100 x 300), drawn in {file}:\n"
        "      0.1      0.1     50.0    299.9  dog\n"
    )  # fmt: skip
    assert Image.open(file).size == (100, 300)
    show_boxes("(0,0),(499,999)", seen * 2, Budget(), tmp_path / "out")
    assert "does not say in which image" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["boxes.png", "boxes_0.png", "boxes_1.png"]


def test_show_prints_the_showcases_boxes(tmp_path):
    """The box item of train_data/ around the drawn shape, as the script prints it: colours of the picture say so."""
    entries = json.loads((ROOT / "train_data" / "data.json").read_text())
    number = next(number for number, sample in enumerate(entries) if sample["kind"] == "boxes")
    command = [sys.executable, "-m", "util", "show", "train_data/data.json", "--sample", str(number)]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    image = Image.open(ROOT / "train_data" / entries[number]["messages"][0]["content"][0]["image"]).convert("RGB")
    colours = {"red": (221, 41, 41), "green": (34, 160, 62), "blue": (38, 82, 224),
               "yellow": (246, 200, 0), "purple": (158, 46, 196), "black": (24, 24, 28)}  # fmt: skip
    read = boxes.from_text(printed, boxes.Scale(*image.size))
    assert len(read) == 3
    for label, (x1, y1, x2, y2) in read:
        wanted = colours[label.split()[0]]
        points = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == wanted]
        xs, ys = zip(*points, strict=True)
        assert (min(xs), min(ys), max(xs), max(ys)) == pytest.approx((x1, y1, x2, y2), abs=3), label
