"""Boxes in pixels <-> Qwen2-VL's text for them, in data files and in answers.

A content item `{"type": "box", "label": "dog", "bbox": [x1, y1, x2, y2]}` gives two corners in pixels of an image as
people see it (EXIF orientation applied), the origin at the top left. It becomes the text of the Qwen2-VL report (arXiv
2409.12191, section 2.2): `<|object_ref_start|>dog<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, its
coordinates in [0, 1000) of the image's width and height, so that no pixel budget changes it. `bbox` may be a list of
boxes that share one label; without `bbox` the item is the marked label alone, without `label` the box alone.

A coordinate x is written as floor(1000 x / width), the cell it lies in (the right edge in the last one), and read back
as the middle of its cell: the error is at most half a cell, width / 2000. The item's `image_index` says which image of
the conversation is meant, counted from 0; without it, it is the image of the nearest message at or before the box's own
that holds one.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from util.data.lines import MOST_TEXT, DataError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, in any one unit
NUMBER = r"\s*(?P<{}>-?\d{{1,6}})\s*"
CORNERS = rf"\({NUMBER.format('x1')},{NUMBER.format('y1')}\)\s*,\s*\({NUMBER.format('x2')},{NUMBER.format('y2')}\)"
CELLS = 1000
LABEL = "<|object_ref_start|>", "<|object_ref_end|>"
BOX = "<|box_start|>", "<|box_end|>"
KEYS = ("type", "label", "bbox", "image_index")
RULE = "'bbox' is [x1, y1, x2, y2] or a list of such, in pixels of the image, with 0 <= x1 < x2 and 0 <= y1 < y2"
SOUGHT = re.compile(
    rf"<\|object_ref_start\|>(?P<label>(?:(?!<\|).)*)<\|object_ref_end\|>|{CORNERS}", re.ASCII | re.DOTALL
)
COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080")


class LabelledBox(NamedTuple):
    """A box of an answer, in pixels."""

    label: str | None
    bbox: Box  # x1, y1, x2, y2


# ---- from pixels to text --------------------------------------------------------------------------------------------


def to_text(label: str | None, boxes: Iterable[Box], width: int, height: int) -> str:
    """The text of boxes in pixels of an image, which are inside of it, after their label."""
    text = "" if label is None else label.join(LABEL)
    for x1, y1, x2, y2 in boxes:
        corners = f"({cell(x1, width)},{cell(y1, height)}),({cell(x2, width)},{cell(y2, height)})"
        text += corners.join(BOX)
    return text


def cell(position: float, length: int) -> int:
    """Which of the 1,000 equal cells of a side a position lies in, both in pixels."""
    return min(math.floor(CELLS * position / length), CELLS - 1)


def check_item(item: dict, where: str) -> dict:
    """A box item with `bbox` as a list of boxes, or the text item of a label alone; or DataError."""
    if unknown := sorted(set(item) - set(KEYS)):
        raise DataError(f"{where}unknown key {unknown[0]!r} in an item of type box; known are {', '.join(KEYS)}")
    label, boxes = item.get("label"), item.get("bbox")
    if label is not None and (not isinstance(label, str) or not label.strip() or "<|" in label):
        raise DataError(f"{where}the label of a box is text without '<|', which begins the model's marks, is {label!r}")
    if boxes is None:
        if label is None or "image_index" in item:
            raise DataError(f"{where}a box has no 'bbox'; {RULE}")
        return {"type": "text", "text": to_text(label, [], 1, 1)}
    boxes = boxes if isinstance(boxes, list) and boxes and isinstance(boxes[0], list) else [boxes]
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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15  # NaN is not below


def choose_images(items: list[dict], before: list[dict], where: str) -> list[dict]:
    """The items of one message, each box with the `image_index` of its image; `before`: the checked messages before.
    DataError where it could be several images or none."""
    if not any(item["type"] == "box" for item in items):
        return items
    messages = [[item for item in message["content"] if item["type"] == "image"] for message in before]
    messages.append([item for item in items if item["type"] == "image"])
    total = sum(map(len, messages))
    nearest = next((number for number in reversed(range(len(messages))) if messages[number]), None)

    def chosen(box: dict) -> int:
        if nearest is None:
            raise DataError(
                f"{where}a box with no image at or before it; it lies in an image (of a video: give the frame as one)"
            )
        index, known = box.get("image_index"), f"images 0 to {total - 1} stand at or before this message"
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < total:
                raise DataError(f"{where}image_index {index!r:.40} of a box names no image; {known}")
            return index
        first = sum(map(len, messages[:nearest]))
        if len(messages[nearest]) > 1:
            raise DataError(
                f"{where}a box could lie in any of images {first} to {first + len(messages[nearest]) - 1}; say which "
                "by its key 'image_index', counted from 0 over the conversation"
            )
        return first

    return [{**item, "image_index": chosen(item)} if item["type"] == "box" else item for item in items]


def labels_of(items: list[dict]) -> list[str]:
    """The labels of box items, which are text of the data file."""
    return [item["label"] for item in items if item["type"] == "box" and "label" in item]


def images_of(messages: list[dict]) -> dict[int, dict]:
    """The image items that boxes of checked messages lie in, by their number in the conversation."""
    wanted = {item["image_index"] for message in messages for item in message["content"] if item["type"] == "box"}
    images = [item for message in messages for item in message["content"] if item["type"] == "image"] if wanted else []
    return {number: images[number] for number in sorted(wanted)}


def written(messages: list[dict], sizes: dict[int, tuple[int, int]], where: str) -> list[dict]:
    """Checked messages with every box as text; `sizes`: (width, height) of the images of `images_of`. DataError for a
    box that is not inside of its image."""

    def as_text(item: dict) -> dict:
        if item["type"] != "box":
            return item
        width, height = sizes[item["image_index"]]
        for box in item["bbox"]:
            if box[2] > width or box[3] > height:
                raise DataError(
                    f"{where}{item['where']}bbox {box} lies outside of image {item['image_index']}, which is {width} "
                    f"pixels wide and {height} high as people see it; {RULE}, x2 <= width and y2 <= height"
                )
        return {"type": "text", "text": to_text(item.get("label"), item["bbox"], width, height)}

    messages = [{**message, "content": [as_text(item) for item in message["content"]]} for message in messages]
    length = sum(len(item.get("text", "")) for message in messages for item in message["content"])
    if length > MOST_TEXT:
        raise DataError(f"{where}: {length:,} characters of text with its boxes, above {MOST_TEXT:,}; make several "
                        "samples of it", "too long")  # fmt: skip
    return messages


# ---- from text to pixels --------------------------------------------------------------------------------------------


def from_text(text: str, width: int, height: int) -> list[LabelledBox]:
    """The boxes of an answer in pixels of an image, in their order; [] where it has none. Never raises.

    A box has the label that it follows with nothing but marks, other boxes of it, spaces and signs between. What lies
    outside of the image is brought to its edge, and reversed corners are put in order.
    """
    found, label, end = [], None, 0
    for match in SOUGHT.finditer(text):
        if match["label"] is not None:
            label = match["label"].strip() or None
        else:
            if re.search(r"\w", re.sub(r"<\|\w+\|>", "", text[end : match.start()])):
                label = None
            xs, ys = (sorted(middle(int(match[name]), side) for name in names)
                      for names, side in ((("x1", "x2"), width), (("y1", "y2"), height)))  # fmt: skip
            found.append(LabelledBox(label, (xs[0], ys[0], xs[1], ys[1])))
        end = match.end()
    return found


def middle(number: int, length: int) -> float:
    """The middle of a cell, in pixels; the inverse of `cell`, to half a cell."""
    return (min(max(number, 0), CELLS - 1) + 0.5) * length / CELLS


def draw_boxes(image, boxes: list[LabelledBox]):
    """A copy of a PIL image with boxes and their labels drawn on it, a colour per label."""
    from PIL import ImageDraw, ImageFont

    picture = image.convert("RGB")
    canvas, labels = ImageDraw.Draw(picture), list(dict.fromkeys(box.label for box in boxes))
    line = max(2, min(picture.size) // 150)
    font = ImageFont.load_default(max(12, min(picture.size) // 25))
    for label, (x1, y1, x2, y2) in boxes:
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        if label:
            place = canvas.textbbox((0, 0), label, font)
            top = y1 - place[3] - line if y1 > place[3] + line else y1 + line
            canvas.rectangle((x1, top, x1 + place[2] + 2 * line, top + place[3] + line), fill=colour)
            canvas.text((x1 + line, top), label, "white", font)
    return picture
