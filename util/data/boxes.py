"""Boxes in pixels <-> the text in which a family of models writes them, in data files and in answers.

A content item `{"type": "box", "label": "dog", "bbox": [x1, y1, x2, y2]}` gives two corners in pixels of an image as
people see it (EXIF orientation applied), the origin at the top left. `bbox` may be a list of boxes that share one
label; without `bbox` the item is the label alone, without `label` the box alone. `Family.boxes` says how it is written:

    marks        Qwen2-VL: `<|object_ref_start|>dog<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, with
                 coordinates in [0, 1000) of the image's width and height (arXiv 2409.12191, section 2.2)
    thousandths  Qwen3-VL: JSON, `[{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}]`, with coordinates in [0, 1000) of the
                 image's width and height (cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL)
    pixels       Qwen2.5-VL: the same JSON, with coordinates in pixels of the image as it is resized for the model, so
                 that they depend on the pixel budget (qwen-vl-finetune/tools/process_bbox.ipynb of QwenLM/Qwen2.5-VL)

In marks a coordinate is the cell it lies in, floor(1000 x / width), and is read back as the middle of the cell: the
error is at most half a cell, width / 2000. In JSON it is the nearest whole number, but at most the last one (999, or
the last pixel), as the released tool has it: the error is at most half a unit, at the right and lower edge a whole one.

In JSON boxes that are neighbours in a message, but for white space or a comma between them, become one list. An answer
of boxes alone is written as the released models answer, between "```json" and "```", an object in each line.

The item's `image_index` says which image of the conversation is meant, counted from 0; without it, it is the image of
the nearest message at or before the box's own that holds one.
"""

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain, groupby
from typing import NamedTuple

from util.data.lines import MOST_TEXT, DataError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, all four in the same unit
NUMBER = r"\s*(?P<{}>-?\d{{1,6}})\s*"
CORNERS = rf"\({NUMBER.format('x1')},{NUMBER.format('y1')}\)\s*,\s*\({NUMBER.format('x2')},{NUMBER.format('y2')}\)"
CELLS = 1000  # along each side of an image, unless its pixels are counted
LABEL = "<|object_ref_start|>", "<|object_ref_end|>"
BOX = "<|box_start|>", "<|box_end|>"
KEYS = ("type", "label", "bbox", "image_index")
RULE = "'bbox' is [x1, y1, x2, y2] or a list of such, in pixels of the image, with 0 <= x1 < x2 and 0 <= y1 < y2"
SOUGHT = re.compile(
    rf"<\|object_ref_start\|>(?P<label>(?:(?!<\|).)*)<\|object_ref_end\|>|{CORNERS}", re.ASCII | re.DOTALL
)
# What is sought in JSON, one by one: an answer may be cut off or malformed, and no parser would read it.
DECIMAL = r"\s*-?\d{1,6}(?:\.\d{0,9})?\s*"
IN_JSON = re.compile(
    rf"""(?P<brace>[{{}}])|["']bbox(?:_2d)?["']\s*:\s*\[(?P<bbox>{DECIMAL},{DECIMAL},{DECIMAL},{DECIMAL})\]"""
    r"""|["']label["']\s*:\s*(?P<label>"(?:[^"\\]|\\.){0,999}"|'(?:[^'\\]|\\.){0,999}')""",
    re.ASCII | re.DOTALL,
)
SEPARATORS = " \t\n,;、，；"  # what may stand between two boxes of one list
COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080")


class LabelledBox(NamedTuple):
    """A box and what it is said to hold."""

    label: str | None
    bbox: Box  # x1, y1, x2, y2: in pixels of an image, or in the numbers of a text


class Scale(NamedTuple):
    """In what a text counts boxes in an image."""

    width: int  # of the image as people see it, in pixels
    height: int
    form: str = "marks"  # Family.boxes
    columns: int = CELLS  # of the text's units in the width
    rows: int = CELLS

    def to_numbers(self, box: Box) -> Box:
        """The text's four whole numbers for a box in pixels that is inside of the image."""
        x1, x2 = [self._number(x, self.width, self.columns) for x in (box[0], box[2])]
        y1, y2 = [self._number(y, self.height, self.rows) for y in (box[1], box[3])]
        return x1, y1, x2, y2

    def to_pixels(self, numbers: Box) -> Box:
        """A box in pixels for four numbers of a text: outside ones are moved to the edge, reversed corners turned."""
        x1, x2 = sorted([self._pixel(x, self.width, self.columns) for x in (numbers[0], numbers[2])])
        y1, y2 = sorted([self._pixel(y, self.height, self.rows) for y in (numbers[1], numbers[3])])
        return x1, y1, x2, y2

    def _number(self, position: float, length: int, units: int) -> int:
        exact = units * position / length
        return min(math.floor(exact) if self.form == "marks" else round(exact), units - 1)

    def _pixel(self, number: float, length: int, units: int) -> float:
        if self.form == "marks":  # a number is a cell: its middle
            return (min(max(number, 0), units - 1) + 0.5) * length / units
        return min(max(number, 0), units) * length / units


# ---- box items of data files ----------------------------------------------------------------------------------------


def check_item(item: dict, where: str) -> dict:
    """A box item with `bbox` as a list of boxes, which a label alone has not; or DataError."""
    if unknown := sorted(set(item) - set(KEYS)):
        raise DataError(f"{where}unknown key {unknown[0]!r} in an item of type box; known are {', '.join(KEYS)}")
    label = item.get("label")
    boxes = item.get("bbox")
    if label is not None and (not isinstance(label, str) or not label.strip() or "<|" in label):
        raise DataError(f"{where}the label of a box is text without '<|', which begins the model's marks, is {label!r}")
    if boxes is None:
        if label is None or "image_index" in item:
            raise DataError(f"{where}a box has no 'bbox'; {RULE}")
        return item
    is_list_of_boxes = isinstance(boxes, list) and boxes and isinstance(boxes[0], list)
    if not is_list_of_boxes:
        boxes = [boxes]
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_position, box)):
            raise DataError(f"{where}bbox {box!r:.80} is not 4 numbers; {RULE}")
        x1, y1, x2, y2 = box
        if x1 < 0 or y1 < 0:
            raise DataError(f"{where}bbox {box} lies outside of its image; {RULE}")
        if x1 >= x2 or y1 >= y2:
            empty = x1 == x2 or y1 == y2
            raise DataError(f"{where}bbox {box} {'is empty' if empty else 'has its corners reversed'}; {RULE}")
    return {**item, "bbox": boxes, "where": where}


def is_position(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e15  # False for NaN, too


def lies_in_an_image(item: dict) -> bool:
    """Whether a checked item is of boxes: not so a label alone."""
    return item["type"] == "box" and "bbox" in item


def image_items(items: list[dict]) -> list[dict]:
    return [item for item in items if item["type"] == "image"]


def choose_images(items: list[dict], before: list[dict], where: str) -> list[dict]:
    """The items of one message, each box with the `image_index` of its image; `before`: the checked messages before.
    DataError where it could be several images or none."""
    if not any(map(lies_in_an_image, items)):
        return items
    images = [image_items(message["content"]) for message in before]
    images.append(image_items(items))  # by message
    total = sum(map(len, images))
    with_images = [number for number, of_message in enumerate(images) if of_message]

    def choose(box: dict) -> int:
        if not with_images:
            raise DataError(
                f"{where}a box with no image at or before it; it lies in an image (of a video: give the frame as one)"
            )
        index = box.get("image_index")
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < total:
                raise DataError(
                    f"{where}image_index {index!r:.40} of a box names no image; images 0 to {total - 1} stand at or "
                    "before this message"
                )
            return index
        nearest = with_images[-1]
        first = sum(map(len, images[:nearest]))
        if len(images[nearest]) > 1:
            raise DataError(
                f"{where}a box could lie in any of images {first} to {first + len(images[nearest]) - 1}; say which "
                "by its key 'image_index', counted from 0 over the conversation"
            )
        return first

    return [{**item, "image_index": choose(item)} if lies_in_an_image(item) else item for item in items]


def labels_of(items: list[dict]) -> list[str]:
    """The labels of box items, which are text of the data file."""
    return [item["label"] for item in items if item["type"] == "box" and "label" in item]


def are_in(messages: list[dict]) -> bool:
    """Whether checked messages hold box items."""
    items = chain.from_iterable(message["content"] for message in messages)
    return any(item["type"] == "box" for item in items)


def images_of(messages: list[dict]) -> dict[int, dict]:
    """The image items that boxes of checked messages lie in, by their number in the conversation."""
    wanted = set()
    images = []
    for message in messages:
        for item in message["content"]:
            if lies_in_an_image(item):
                wanted.add(item["image_index"])
            elif item["type"] == "image":
                images.append(item)
    return {number: images[number] for number in sorted(wanted)}


# ---- from pixels to text --------------------------------------------------------------------------------------------


def with_boxes_as_text(messages: list[dict], form: str, scales: dict[int, Scale], where: str) -> list[dict]:
    """Checked messages with every box as text in a form of `Family.boxes`; `scales`: of the images of `images_of`.

    DataError for a box that is not inside of its image.
    """
    written = []
    length = 0  # characters
    for message in messages:
        for item in filter(lies_in_an_image, message["content"]):
            check_inside(item, scales[item["image_index"]], where)
        items = marked_items(message, scales) if form == "marks" else json_items(message, scales)
        length += sum(len(item.get("text", "")) for item in items)
        written.append({**message, "content": items})
    if length > MOST_TEXT:
        raise DataError(f"{where}: {length:,} characters of text with its boxes, above {MOST_TEXT:,}; make several "
                        "samples of it", "too long")  # fmt: skip
    return written


def check_inside(item: dict, scale: Scale, where: str) -> None:
    """DataError for a box item that is not inside of its image."""
    for box in item["bbox"]:
        if box[2] > scale.width or box[3] > scale.height:
            raise DataError(
                f"{where}{item['where']}bbox {box} lies outside of image {item['image_index']}, which is {scale.width} "
                f"pixels wide and {scale.height} high as people see it; {RULE}, x2 <= width and y2 <= height"
            )


def boxes_of_item(item: dict, scales: dict[int, Scale]) -> list[LabelledBox]:
    """The boxes of a checked item in the numbers of the text; none of a label alone."""
    found = []
    for box in item.get("bbox", []):
        found.append(LabelledBox(item.get("label"), scales[item["image_index"]].to_numbers(box)))
    return found


def marked_items(message: dict, scales: dict[int, Scale]) -> list[dict]:
    """The items of a message, its boxes as text with Qwen2-VL's marks."""
    items = []
    for item in message["content"]:
        if item["type"] == "box":
            item = {"type": "text", "text": as_marks(item.get("label"), boxes_of_item(item, scales))}
        items.append(item)
    return items


def as_marks(label: str | None, boxes: Iterable[LabelledBox]) -> str:
    """Boxes, whose corners are numbers of the text, after the label that they share."""
    text = "" if label is None else label.join(LABEL)
    for box in boxes:
        x1, y1, x2, y2 = box.bbox
        text += f"({x1},{y1}),({x2},{y2})".join(BOX)
    return text


def json_items(message: dict, scales: dict[int, Scale]) -> list[dict]:
    """The items of a message, its boxes as JSON and a label alone as plain text."""
    content = without_separators(message["content"])
    is_alone = message["role"] == "assistant" and all(map(lies_in_an_image, content))
    items: list[dict] = []
    for are_boxes, together in groupby(content, lies_in_an_image):
        if are_boxes:
            found = []
            for item in together:
                found += boxes_of_item(item, scales)
            items.append({"type": "text", "text": as_json(found, is_alone)})
            continue
        for item in together:
            items.append({"type": "text", "text": item["label"]} if item["type"] == "box" else item)
    return items


def without_separators(items: list[dict]) -> list[dict]:
    """Items without the texts that only set one box apart from the next: a list has commas of its own."""
    kept = []
    for number, item in enumerate(items):
        is_between = 0 < number < len(items) - 1 and all(map(lies_in_an_image, (items[number - 1], items[number + 1])))
        if not (is_between and item["type"] == "text" and not item["text"].strip(SEPARATORS)):
            kept.append(item)
    return kept


def as_json(boxes: Iterable[LabelledBox], is_alone: bool) -> str:
    """Boxes, whose corners are numbers of the text, as one list; `is_alone`: as an answer that is nothing else."""
    objects = []
    for label, corners in boxes:
        named = {} if label is None else {"label": label}
        objects.append(json.dumps({"bbox_2d": corners, **named}, ensure_ascii=False))
    if is_alone:
        lines = ",\n\t".join(objects)
        return f"```json\n[\n\t{lines}\n]\n```"
    return f"[{', '.join(objects)}]"


# ---- from text to pixels --------------------------------------------------------------------------------------------


def from_text(text: str, scale: Scale) -> list[LabelledBox]:
    """The boxes of an answer in pixels of an image, in their order; [] where it has none. Never raises.

    Corners outside of the image are moved to its edge, and reversed corners are put in order.
    """
    return [LabelledBox(label, scale.to_pixels(numbers)) for label, numbers in boxes_in(text)]


def boxes_in(text: str) -> list[LabelledBox]:
    """The boxes of a text in the numbers that stand there, whichever family wrote it. Never raises."""
    return boxes_in_json(text) or boxes_in_marks(text)


def boxes_in_marks(text: str) -> list[LabelledBox]:
    """Those in Qwen2-VL's form. A box belongs to the label before it, unless a word stands between the two."""
    found = []
    label = None
    end = 0  # of the match before
    for match in SOUGHT.finditer(text):
        if match["label"] is not None:
            label = match["label"].strip() or None
        else:
            between = re.sub(r"<\|\w+\|>", "", text[end : match.start()])  # the model's marks are no words
            if re.search(r"\w", between):
                label = None
            x1, y1, x2, y2 = [float(match[name]) for name in ("x1", "y1", "x2", "y2")]
            found.append(LabelledBox(label, (x1, y1, x2, y2)))
        end = match.end()
    return found


def boxes_in_json(text: str) -> list[LabelledBox]:
    """Those in JSON, whole or cut off. A box has the label of the object that it stands in."""
    found = []
    boxes: list[Box] = []  # of the object that is being read
    label = None
    for match in IN_JSON.finditer(text + "}"):  # the last one may not have its own
        if match["bbox"]:
            x1, y1, x2, y2 = map(float, match["bbox"].split(","))
            boxes.append((x1, y1, x2, y2))
        elif match["label"]:
            label = unquoted(match["label"])
        else:
            found += [LabelledBox(label, box) for box in boxes]
            boxes = []
            label = None
    return found


def unquoted(quoted: str) -> str | None:
    """The text of a string of JSON; None for white space alone."""
    text = quoted[1:-1]
    if quoted.startswith('"'):
        with suppress(ValueError):  # "\x", which JSON does not know
            text = json.loads(quoted, strict=False)
    return text.encode(errors="replace").decode().strip() or None  # half of a surrogate pair cannot be printed


def draw_boxes(image, boxes: list[LabelledBox]):
    """A copy of a PIL image with boxes and their labels drawn on it, a colour per label."""
    from PIL import ImageDraw, ImageFont

    picture = image.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    labels = list(dict.fromkeys(box.label for box in boxes))  # each once, in the order of the boxes
    line = max(2, min(picture.size) // 150)
    font = ImageFont.load_default(max(12, min(picture.size) // 25))
    for label, (x1, y1, x2, y2) in boxes:
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        if label:
            _, _, width, height = canvas.textbbox((0, 0), label, font)
            top = y1 - height - line if y1 > height + line else y1 + line  # above the box, else inside of it
            canvas.rectangle((x1, top, x1 + width + 2 * line, top + height + line), fill=colour)
            canvas.text((x1 + line, top), label, "white", font)
    return picture
