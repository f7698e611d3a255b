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

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, all four in the same unit
NUMBER = r"\s*(?P<{}>-?\d{{1,6}})\s*"
CORNERS = rf"\({NUMBER.format('x1')},{NUMBER.format('y1')}\)\s*,\s*\({NUMBER.format('x2')},{NUMBER.format('y2')}\)"
CELLS = 1000  # along each side of an image
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
    label = item.get("label")
    boxes = item.get("bbox")
    if label is not None and (not isinstance(label, str) or not label.strip() or "<|" in label):
        raise DataError(f"{where}the label of a box is text without '<|', which begins the model's marks, is {label!r}")
    if boxes is None:
        if label is None or "image_index" in item:
            raise DataError(f"{where}a box has no 'bbox'; {RULE}")
        return {"type": "text", "text": to_text(label, [], 1, 1)}
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


def image_items(items: list[dict]) -> list[dict]:
    return [item for item in items if item["type"] == "image"]


def choose_images(items: list[dict], before: list[dict], where: str) -> list[dict]:
    """The items of one message, each box with the `image_index` of its image; `before`: the checked messages before.
    DataError where it could be several images or none."""
    if not any(item["type"] == "box" for item in items):
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

    return [{**item, "image_index": choose(item)} if item["type"] == "box" else item for item in items]


def labels_of(items: list[dict]) -> list[str]:
    """The labels of box items, which are text of the data file."""
    return [item["label"] for item in items if item["type"] == "box" and "label" in item]


def images_of(messages: list[dict]) -> dict[int, dict]:
    """The image items that boxes of checked messages lie in, by their number in the conversation."""
    wanted = set()
    images = []
    for message in messages:
        for item in message["content"]:
            if item["type"] == "box":
                wanted.add(item["image_index"])
            elif item["type"] == "image":
                images.append(item)
    return {number: images[number] for number in sorted(wanted)}


def with_boxes_as_text(messages: list[dict], sizes: dict[int, tuple[int, int]], where: str) -> list[dict]:
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

    written = []
    length = 0  # characters
    for message in messages:
        items = [as_text(item) for item in message["content"]]
        length += sum(len(item.get("text", "")) for item in items)
        written.append({**message, "content": items})
    if length > MOST_TEXT:
        raise DataError(f"{where}: {length:,} characters of text with its boxes, above {MOST_TEXT:,}; make several "
                        "samples of it", "too long")  # fmt: skip
    return written


# ---- from text to pixels --------------------------------------------------------------------------------------------


def from_text(text: str, width: int, height: int) -> list[LabelledBox]:
    """The boxes of an answer in pixels of an image, in their order; [] where it has none. Never raises.

    A box belongs to the label before it, unless a word stands between the two. Corners outside of the image are moved
    to its edge, and reversed corners are put in order.
    """
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
            x1, x2 = sorted([middle(int(match["x1"]), width), middle(int(match["x2"]), width)])
            y1, y2 = sorted([middle(int(match["y1"]), height), middle(int(match["y2"]), height)])
            found.append(LabelledBox(label, (x1, y1, x2, y2)))
        end = match.end()
    return found


def middle(number: int, length: int) -> float:
    """The middle of a cell, in pixels; the inverse of `cell`, to half a cell."""
    return (min(max(number, 0), CELLS - 1) + 0.5) * length / CELLS


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
