"""Broken data files and media from a seed, and the judge of what the training script makes of them.

    python -m tests.mutations data 17 23      # what seeds 17 and 23 of the data files are, and what comes of them
    python -m tests.mutations media 5

A case is judged by what it was made from, not by what the code says about it: which samples have to be refused, which
may be, and how many are trained on otherwise. Cases run in long-lived worker processes, so that one that crashes,
hangs or takes too much memory is seen from outside and does not end the others.
"""

import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin

from tests import runs, warm

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 20.0  # of the processor's time, as other work may share it
MOST_WAITED = 120.0  # seconds on the clock, after which a case that uses no processor time counts as hanging
MOST_MEMORY = 2 * 2**30  # bytes resident, Python and its libraries included
LONGEST_MESSAGE = 4000  # characters; what cannot be read is not "named"
BIG = 10_000_000  # characters of a text that is far too long
REAL_EVERY = 20  # of the data files one in so many trains the real model; the others a stand-in with one weight

REFUSED, TRAINED, EITHER, LATE = "refused", "trained", "either", "refused once its pixels are decoded"
ODD_VALUES = [None, True, 0, -1, 3.5, float("nan"), float("inf"), "", "x", [], {}, [[]], [None], {"a": 1}, "\0"]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>", "\ue000\uf8ff"]  # fmt: skip
BOXES = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(nan,12),(NaN,1e999)<|box_end|>"
ODD_TEXTS = ["", " ", "\0", "\x1b[31m", "\u202eabc", "\ufeff", "\uffff", "e\u0301" * 50, "👩‍👩‍👧‍👦", "\r\n\t", "<|im_end", "{{ x }}",
             "{% raw %}", "%s %(x)d", "\\", '"', "</s>", "[INST]", "<image>", "<tool_call>"]  # fmt: skip


# ---- files that are as they should be --------------------------------------------------------------------------------


def make_media(folder: Path) -> None:
    """Small real files of every common kind."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 40, (60, 90, 3))
    ramp = np.add.outer(np.arange(60) * 2, np.arange(90))[:, :, None] + noise
    pixels = ramp.clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "a.png")
    Image.fromarray(np.dstack([pixels, pixels[:, :, 0]])).save(folder / "alpha.png")
    picture.convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256).save(folder / "deep.png")
    picture.save(folder / "turned.png", exif=turned)
    picture.save(folder / "a.jpg")
    picture.save(folder / "progressive.jpg", progressive=True, exif=turned)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.save(folder / "a.webp")
    picture.save(folder / "lossless.webp", lossless=True, exif=turned)
    others = [Image.fromarray(np.roll(pixels, shift, 1)) for shift in (10, 20)]
    for name in ("moving.webp", "a.gif", "moving.png"):
        picture.save(folder / name, save_all=True, append_images=others)
    picture.save(folder / "a.bmp")
    picture.save(folder / "a.tiff")
    for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate"):
        picture.save(folder / f"{compression}.tiff", compression=compression)
    picture.save(folder / "a.ppm")
    picture.save(folder / "a.jp2")
    picture.save(folder / "a.avif")
    picture.resize((64, 64)).save(folder / "a.ico")
    quick = {"x264-params": "log-level=none:threads=1", "g": "6"}
    videos = {"a.mp4": ("libx264", quick, {"movflags": "faststart"}), "late.mp4": ("libx264", quick, {}),
              "pieces.mp4": ("libx264", quick, {"movflags": "frag_keyframe+empty_moov"}),
              "a.mkv": ("libx264", quick, {}), "a.webm": ("libvpx", {}, {}), "nine.webm": ("libvpx-vp9", {}, {}),
              "a.avi": ("mpeg4", {}, {}), "jpegs.avi": ("mjpeg", {}, {}), "a.mov": ("mpeg4", {}, {}),
              "a.ts": ("libx264", quick, {}), "a.mpg": ("mpeg2video", {}, {}), "a.flv": ("flv", {}, {})}  # fmt: skip
    for name, (codec, options, container_options) in videos.items():
        if codec not in av.codecs_available:
            continue
        with av.open(str(folder / name), "w", container_options=container_options) as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height = 96, 64
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.thread_count = 1
            for shift in range(18):
                moved = np.roll(pixels, shift * 3, 1)[:64, :96]
                frame = np.pad(moved, ((0, 64 - moved.shape[0]), (0, 96 - moved.shape[1]), (0, 0)))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def good_sample(choose: random.Random, media: Path) -> dict:
    """A conversation that trains: a text message, one with pictures or a video, several turns."""
    question = {
        "type": "text",
        "text": choose.choice(["What is this?", "描述一下这个图片", "Which way? 🙂", "1 + 1 = ?"]),
    }
    picture = {
        "type": "image",
        "image": str(media / choose.choice(["a.png", "alpha.png", "a.jpg", "a.webp", "turned.png"])),
    }
    content = [
        lambda: question["text"],
        lambda: [picture, question],
        lambda: [question, picture, {**picture, "max_pixels": 6272}],
        lambda: [
            {"type": "video", "video": str(media / "a.mp4"), **choose.choice([{}, {"nframes": 2}, {"fps": 4.0}])},
            question,
        ],
        lambda: [{"type": "video", "video": [str(media / "a.png")] * 3}, question],
    ]
    messages = [
        user(choose.choice(content)()),
        assistant(choose.choice(["Yes.", [{"type": "text", "text": "A wave."}]])),
    ]
    if choose.random() < 0.3:
        messages += [user(choose.choice(["Sure?", [picture, question]])), assistant("I am.")]
    if choose.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "You are helpful."})
    return {"messages": messages, **choose.choice([{}, {"kind": "picture"}, {"id": 7}])}


# ---- one sample made wrong -------------------------------------------------------------------------------------------


@dataclass
class Workshop:
    """What a mutation of a sample may use."""

    choose: random.Random
    media: Path  # good files
    folder: Path  # of this case, to write into
    raw: list[str] = field(default_factory=list)  # texts of JSON that `json.dumps` cannot write

    def as_written(self, text: str) -> str:
        """A value that will stand in the file as `text`."""
        self.raw.append(text)
        return f"@raw{len(self.raw) - 1}@"

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / f"{len(list(self.folder.iterdir()))}_{name}"
        path.write_bytes(content)
        return str(path)


def turn(shop: Workshop, sample: dict, role: str) -> dict:
    """One of the sample's messages of a role."""
    return shop.choose.choice([message for message in sample["messages"] if message["role"] == role])


def put(shop: Workshop, sample: dict, item: dict) -> None:
    """Give a user message one more item, anywhere."""
    message = turn(shop, sample, "user")
    if isinstance(message["content"], str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    message["content"] = list(message["content"])
    message["content"].insert(shop.choose.randrange(len(message["content"]) + 1), item)


def medium(shop: Workshop) -> dict:
    name = shop.choose.choice(["image", "video", "frames"])
    if name == "frames":
        return {"type": "video", "video": [str(shop.media / "a.png"), str(shop.media / "a.jpg")]}
    return {"type": name, name: str(shop.media / {"image": "a.png", "video": "a.mp4"}[name])}


def with_path(shop: Workshop, path: object, kind: str | None = None) -> dict:
    """An image, a video or a list of frames that has this path in it."""
    kind = kind or shop.choose.choice(["image", "video", "frames"])
    if kind == "frames":
        frames = [str(shop.media / "a.png")] * shop.choose.randrange(3)
        frames.insert(shop.choose.randrange(len(frames) + 1), path)
        return {"type": "video", "video": frames}
    return {"type": kind, kind: path}


def not_an_object(shop, sample):
    return shop.choose.choice([value for value in ODD_VALUES if value != {"a": 1}] + [[sample]]), REFUSED


def messages_of_another_kind(shop, sample):
    sample["messages"] = shop.choose.choice([*ODD_VALUES, sample["messages"][0], json.dumps(sample["messages"])])
    return sample, REFUSED


def messages_under_another_name(shop, sample):
    sample[shop.choose.choice(["conversations", "message", "Messages", ""])] = sample.pop("messages")
    return sample, REFUSED


def message_of_another_kind(shop, sample):
    sample["messages"][shop.choose.randrange(len(sample["messages"]))] = shop.choose.choice(ODD_VALUES)
    return sample, REFUSED


def wrong_role(shop, sample):
    roles = [*ODD_VALUES, "User", "gpt", "human", "tool", "user ", "usеr", ["user"], {"user": 1}]
    shop.choose.choice(sample["messages"])["role"] = shop.choose.choice(roles)
    return sample, REFUSED


def missing_key(shop, sample):
    del shop.choose.choice(sample["messages"])[shop.choose.choice(["role", "content"])]
    return sample, REFUSED


def wrong_order(shop, sample):
    messages = sample["messages"]
    place = shop.choose.randrange(len(messages))
    change = shop.choose.choice(["twice", "no answer", "system last", "no question"])
    if change == "twice":
        messages.insert(place, messages[place])
    elif change == "no answer":
        messages.pop()
    elif change == "system last":
        messages.append({"role": "system", "content": "Be brief."})
    else:
        del messages[next(n for n, message in enumerate(messages) if message["role"] == "user")]
    return sample, REFUSED


def content_of_another_kind(shop, sample):
    odd = [value for value in ODD_VALUES if not isinstance(value, str) and value != []]
    shop.choose.choice(sample["messages"])["content"] = shop.choose.choice(
        [*odd, ["text"], [["text"]], [3], medium(shop)]
    )
    return sample, REFUSED


def item_of_another_kind(shop, sample):
    put(shop, sample, shop.choose.choice([{}, {"type": "audio", "audio": "a.wav"}, {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "image"}, {"type": "text"}, {"type": "video", "image": "a.png"}, {"type": 3}, {"type": []}, {"type": {}},
        {"type": "text", "text": 3}, {"type": "text", "text": ["x"]}, {"text": {}}, {**medium(shop), "type": "Image"},
        {"": ""}, {"type": "image", "image": None}, {"type": "text", "text": "x", "bbox": [float("nan")] * 4}]))  # fmt: skip
    return sample, REFUSED


def medium_where_none_may_be(shop, sample):
    others = [message for message in sample["messages"] if message["role"] != "user"]
    shop.choose.choice(others)["content"] = [medium(shop), {"type": "text", "text": "x"}]
    return sample, REFUSED


def unknown_key(shop, sample):
    name = shop.choose.choice(
        ["quality", "bbox", "boxes", "max_pixel", "MAX_PIXELS", "", "content", "\ud83d", "k" * 100_000]
    )
    put(shop, sample, {**medium(shop), name: shop.choose.choice([1, [float("nan"), 2], {"x": float("inf")}, "x"])})
    return sample, REFUSED


def number_that_is_none(shop, sample):
    name = shop.choose.choice(
        ["min_pixels", "max_pixels", "fps", "nframes", "video_start", "total_pixels", "resized_height"]
    )
    numbers = [
        True,
        -1,
        float("nan"),
        float("inf"),
        -float("inf"),
        "two",
        [],
        {},
        "",
        [float("nan")],
        10**400,
        1e300,
        "9" * 100_000,
    ]
    item = {"type": "video", "video": str(shop.media / "a.mp4"), name: shop.choose.choice(numbers)}
    put(shop, sample, {**item, "resized_width": 56} if name == "resized_height" else item)
    return sample, REFUSED


def numbers_far_out(shop, sample):
    """Numbers above 0 that nobody would write. They may be obeyed or refused."""
    item = shop.choose.choice([medium(shop), {"type": "video", "video": str(shop.media / "a.mp4")}])
    names = ["min_pixels", "max_pixels"]
    if item["type"] == "video":
        names += ["total_pixels"]
        if isinstance(item["video"], str):
            names += ["fps", "nframes", "min_frames", "max_frames", "video_start", "video_end"]
    extremes = [5e-324, 1e-300, 1e-160, 1e-9, 0.1, 0.5, 1, 1.5, 3, 1e3, 123456.789, 1e9, 10**14, 9.9e14]
    for name in shop.choose.sample(names, shop.choose.randint(1, min(3, len(names)))):
        item[name] = shop.choose.choice(extremes)
    if shop.choose.random() < 0.4:
        item |= {"resized_height": shop.choose.choice(extremes), "resized_width": shop.choose.choice(extremes)}
    put(shop, sample, item)
    return sample, EITHER


def path_that_leads_nowhere(shop, sample):
    folder = shop.folder / "a folder.png"
    folder.mkdir(exist_ok=True)
    fifo, loop, gone = (shop.folder / name for name in ("fifo.png", "loop.png", "gone.png"))
    if not fifo.exists():
        os.mkfifo(fifo)
        loop.symlink_to(loop)
        gone.symlink_to("nowhere")
    path = shop.choose.choice([str(folder), str(fifo), str(loop), str(gone), "", ".", "/", "~", "gone.jpg", "x" * 5000, "\0", "a\0.png",
        "\ud83d.png", "../" * 2000, "/dev/null", "/dev/zero", "/proc/self", 3, True, {}, [], [["a.png"]], {"path": "a.png"},
        "foo://bar/a.png", "data:", "data:image/png;base64,@@@", "data:image/png;base64,", "data:,hello", "http://[", "http://",
        "file://", "file:///nowhere/a.png", "file://%00", "line\nbreak.png", "x" * 1_000_000, "nul", "s3://"])  # fmt: skip
    put(shop, sample, with_path(shop, path))
    return sample, REFUSED


def file_that_is_none(shop, sample):
    """Nothing in its first bytes is an image or a video."""
    content = shop.choose.choice([b"", b"\0" * 1000, b"Once upon a time.\n" * 50, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF",
                                  b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", b"%PDF-1.4\n", b"\x1aE\xdf\xa3", b"<svg/>", b"PK\x03\x04"])  # fmt: skip
    path = shop.file(shop.choose.choice(["a.png", "a.jpg", "a.mp4", "a.webm", "a"]), content)
    kind = shop.choose.choice(["image", "video"])
    put(shop, sample, with_path(shop, path, kind))
    return sample, REFUSED


def picture_cut_off(shop, sample):
    """The size can be read, the pixels cannot."""
    name = shop.choose.choice(["a.png", "a.jpg", "alpha.png"])
    content = (shop.media / name).read_bytes()
    path = shop.file(name, content[: len(content) // 2])
    put(shop, sample, with_path(shop, path, shop.choose.choice(["image", "frames"])))
    return sample, LATE


def other_medium(shop, sample):
    """A video as an image is refused; an image as a video is one of a single frame."""
    if shop.choose.random() < 0.5:
        put(
            shop, sample, {"type": "image", "image": str(shop.media / shop.choose.choice(["a.mp4", "a.webm", "a.mkv"]))}
        )
        return sample, REFUSED
    put(shop, sample, {"type": "video", "video": str(shop.media / shop.choose.choice(["a.png", "a.jpg", "a.gif"]))})
    return sample, EITHER


def picture_of_odd_size(shop, sample):
    sizes = {
        (1, 1): TRAINED,
        (1, 200): TRAINED,
        (1, 201): REFUSED,
        (5000, 20): REFUSED,
        (27, 29): TRAINED,
        (4000, 4000): TRAINED,
    }
    size = shop.choose.choice(list(sizes))
    target = io.BytesIO()
    Image.new(shop.choose.choice(["1", "L", "RGB", "RGBA"]), size).save(target, "PNG")
    kind = shop.choose.choice(["image", "frames"])
    path = shop.file("size.png", target.getvalue())
    put(shop, sample, {"type": "video", "video": [path]} if kind == "frames" else with_path(shop, path, "image"))
    return sample, sizes[size]


def picture_too_large(shop, sample):
    """Of a few bytes, and far more pixels than Pillow opens."""
    path = shop.file("bomb.png", bomb_png(50_000, 50_000, "L", rows=50))
    put(shop, sample, with_path(shop, path, "image"))
    return sample, REFUSED


def control_token(shop, sample):
    token = shop.choose.choice(CONTROL)
    message = turn(shop, sample, shop.choose.choice(["user", "assistant"]))
    cut = shop.choose.randrange(len(token))
    message["content"] = shop.choose.choice([token, f"a {token} b", [{"type": "text", "text": token[:cut]}, {"type": "text", "text": token[cut:]}]])  # fmt: skip
    return sample, REFUSED


def half_a_character(shop, sample):
    shop.choose.choice(sample["messages"])["content"] = shop.choose.choice(["\ud83d", "a\udfff", "\udead\ud83d" * 100])
    return sample, REFUSED


def text_beside_a_medium(shop, sample):
    """In one item. It would be lost, as the chat template shows the medium alone."""
    text = shop.choose.choice([value for value in ODD_VALUES if value is not None] + ["What is this?", CONTROL[6]])
    put(shop, sample, {**medium(shop), "text": text})
    return sample, REFUSED


def odd_text(shop, sample):
    text = shop.choose.choice(
        [*ODD_TEXTS, BOXES, "".join(shop.choose.choices(ODD_TEXTS, k=20)), "".join(map(chr, range(1, 0x2FF)))]
    )
    message = shop.choose.choice(sample["messages"])
    message["content"] = shop.choose.choice(
        [text, [{"type": "text", "text": text}], [], [{"text": text, "type": None}]]
    )
    said = "".join(item["text"] for item in message["content"]) if message["content"] != text else text
    if message["role"] == "assistant":
        return sample, TRAINED if said.strip() else REFUSED
    return sample, REFUSED if "<image>" in said else TRAINED  # its media, if it had any, are gone


def far_too_much_text(shop, sample):
    unit = shop.choose.choice([" ", "a", "word ", "\n", "😀", "語", "1", "\0", "e\u0301", "<|box_start|>", "aB3$ "])
    shop.choose.choice(sample["messages"])["content"] = unit * (BIG // len(unit.encode()))
    return sample, REFUSED


def keys_to_be_left_alone(shop, sample):
    where = shop.choose.choice([sample, *sample["messages"]])
    names = ["id", "bbox", "", "kind_of"] if where is sample else ["id", "name"]
    where[shop.choose.choice(names)] = shop.choose.choice(ODD_VALUES)
    if shop.choose.random() < 0.5:
        sample["kind"] = shop.choose.choice(ODD_VALUES)
    return sample, TRAINED


def key_that_changes_training(shop, sample):
    """Of a message every key that is not known; of a sample what says how much is learned, and media beside."""
    value = shop.choose.choice([-1, 3.5, float("nan"), float("inf"), "x", [[]], {"a": 1}, "no"])
    where = shop.choose.choice([sample, *sample["messages"]])
    names = ["weight", "loss", "train", "images"] if where is sample else ["weight", "loss", "reasoning", "bbox", "k"]
    name = shop.choose.choice(names)
    where[name] = "heavy" if name == "weight" and value == 3.5 else value  # a weight may be 3.5
    return sample, REFUSED


def nested(shop, sample):
    """Brackets in brackets, around what Python's parser and printer can follow, and far beyond."""
    depth = shop.choose.choice([3, 100, 400, *range(880, 1000, 4), 1100, 100_000])
    left, right = shop.choose.choice([("[", "]"), ('{"a":', "}")])
    value = shop.as_written(left * depth + (right and "null" * (left != "[")) + right * depth)
    place = shop.choose.choice(["kind", "messages", "content", "role", "text", "image", "fps", "unknown", "item"])
    if place in ("kind", "messages"):
        sample[place] = value
    elif place in ("content", "role"):
        shop.choose.choice(sample["messages"])[place] = value
    elif place == "text":
        put(shop, sample, {"type": "text", "text": value})
    elif place == "image":
        put(shop, sample, {"type": "image", "image": value})
    elif place == "item":
        put(shop, sample, value)
    else:
        put(shop, sample, {**medium(shop), place: value})
    return sample, "unparsed" if depth >= 880 else (TRAINED if place == "kind" else REFUSED)


def key_given_twice(shop, sample):
    """The last one counts, for Python and so for us."""
    sample[shop.as_written('"kind": "a", "kind": null, "id"')] = 1
    return sample, TRAINED


def long_number(shop, sample):
    sample["id"] = shop.as_written("9" * shop.choose.choice([400, 4300, 4301, 50_000]))
    return sample, "unparsed" if len(shop.raw[-1]) > 4300 else TRAINED


def many_turns(shop, sample):
    sample["messages"] += [user("Again?"), assistant("Yes.")] * shop.choose.choice([10, 300])
    return sample, TRAINED


def many_pictures(shop, sample):
    for _ in range(shop.choose.choice([10, 100])):
        put(shop, sample, {"type": "image", "image": str(shop.media / "a.png")})
    return sample, TRAINED


SAMPLE_MUTATIONS = [
    not_an_object, messages_of_another_kind, messages_under_another_name, message_of_another_kind, wrong_role, missing_key,
    wrong_order, content_of_another_kind, item_of_another_kind, medium_where_none_may_be, unknown_key, number_that_is_none,
    numbers_far_out, numbers_far_out, numbers_far_out, path_that_leads_nowhere, path_that_leads_nowhere, file_that_is_none,
    file_that_is_none, picture_cut_off, other_medium, picture_of_odd_size, picture_too_large, control_token, text_beside_a_medium, half_a_character,
    odd_text, odd_text, far_too_much_text, keys_to_be_left_alone, keys_to_be_left_alone, key_that_changes_training, odd_text, numbers_far_out, picture_of_odd_size, nested, nested, key_given_twice, long_number, many_turns,
    many_pictures,
]  # fmt: skip


# ---- a data file made wrong as a whole -------------------------------------------------------------------------------


def place_in(choose: random.Random, content: bytes) -> int:
    return choose.randrange(len(content) + 1)


def cut_off(choose, content, lines):
    return content[: place_in(choose, content)], "maybe"


def bytes_changed(choose, content, lines):
    changed = bytearray(content)
    for _ in range(choose.choice([1, 1, 5, 50])):
        changed[choose.randrange(len(changed))] = choose.choice([choose.randrange(256), *b'{}[]",:\\'])
    return bytes(changed), "maybe"


def bytes_missing(choose, content, lines):
    start = place_in(choose, content)
    return content[:start] + content[start + choose.choice([1, 1, 10, 1000]) :], "maybe"


def punctuation_missing(choose, content, lines):
    places = [number for number, byte in enumerate(content) if byte in b'{}[]",:']
    start = choose.choice(places)
    return content[:start] + content[start + 1 :], "maybe"


def bytes_put_in(choose, content, lines):
    start = place_in(choose, content)
    extra = choose.choice(
        [b"\0", b"{", b"]", b'"', b"\n", b"NaN", b"\\u12", b"\\", b"// why\n", b"'", b",", b"\x1a", b"[" * 100_000]
    )
    return content[:start] + extra + content[start:], "maybe"


def not_utf_8(choose, content, lines):
    start = place_in(choose, content)
    if not lines or content[start : start + 1] not in (b"", b"\n"):  # beside a line of .jsonl it is a line of its own
        return content[:start] + choose.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88", b"\x80"]) + content[
            start:
        ], "yes"
    return content + b"\xff", "yes"


def another_encoding(choose, content, lines):
    return content.decode().encode(choose.choice(["utf-16", "utf-32", "utf-16-le"])), "yes"


def not_json(choose, content, lines):
    change = choose.choice([lambda c: c.replace(b'"', b"'"), lambda c: b"data = " + c, lambda c: c + b"}", lambda c: b"{" + c,
                            lambda c: b"[" * 200_000, lambda c: b"\0" * 1000, lambda c: b"null", lambda c: b'"text"', lambda c: b"3",
                            lambda c: zlib.compress(c), lambda c: b"<html></html>", lambda c: b'{"data": ' + c, lambda c: b"-",
                            lambda c: bytes(choose.randrange(256) for _ in range(2000)) + b"\xff"])  # fmt: skip
    return change(content), "yes"


def nothing_in_it(choose, content, lines):
    return choose.choice([b"", b"\n\n", b" \t ", b"\xef\xbb\xbf"]), "yes"


def byte_order_mark(choose, content, lines):
    return b"\xef\xbb\xbf" + content, "no"


def white_space(choose, content, lines):
    space = choose.choice([b"\n", b"\r\n"] if lines else [b"\n", b" ", b"\t\r\n"]) * choose.choice([1, 50, BIG // 10])
    return choose.choice([space + content, content + space]), "no"


FILE_MUTATIONS = [
    cut_off, cut_off, bytes_changed, bytes_changed, bytes_missing, punctuation_missing, bytes_put_in, bytes_put_in, not_utf_8,
    not_utf_8, another_encoding, not_json, not_json, nothing_in_it, byte_order_mark, white_space,
]  # fmt: skip


@dataclass
class Case:
    """A data file, and what has to come of it."""

    argument: str  # what --data gets
    file: str
    description: list[str]
    refused: set[int] = field(default_factory=set)  # samples that the message has to name
    unsure: set[int] = field(default_factory=set)  # samples that it may name
    late: set[int] = field(default_factory=set)  # samples of which one is named when its pixels are decoded
    broken: str = "no"  # whether the file as a whole has to be refused: yes, maybe, no
    trained: int | None = None  # samples of the step, where known


def data_case(seed: int, media: Path, folder: Path) -> Case:
    """The data file of a seed: 1 to 5 conversations with 1 to 3 mutations."""
    choose = random.Random(seed)
    folder.mkdir(parents=True)
    lines = choose.random() < 0.5
    path = folder / ("data.jsonl" if lines else "data.json")
    count = choose.randint(1, 5)
    samples = [good_sample(choose, media) for _ in range(count)]
    shop = Workshop(choose, media, folder)
    case = Case(str(path), str(path), [], trained=count)
    wrong = choose.choice(["sample", "sample", "sample", "samples", "file", "both"])
    numbers = choose.sample(range(count), min(count, {"sample": 1, "samples": 3, "file": 0, "both": 1}[wrong]))
    for number in numbers:
        change = choose.choice(SAMPLE_MUTATIONS)
        samples[number], verdict = change(shop, json.loads(json.dumps(samples[number])))
        case.description.append(f"sample {number}: {change.__name__} ({verdict})")
        if verdict == "unparsed":  # what stands in the file is no JSON for Python: the file, or its line, is named
            case.broken = "maybe"
            case.unsure.add(number)
        else:
            groups = {REFUSED: case.refused, EITHER: case.unsure, LATE: case.late, TRAINED: set()}
            groups[verdict].add(number)
    ascii_only = choose.random() < 0.5 or bool(case.refused)  # half a character can only be written as an escape
    texts = [json.dumps(sample, ensure_ascii=ascii_only) for sample in samples]
    if lines:
        text = choose.choice(["\n", "\n", "\r\n", "\n\n"]).join(texts) + choose.choice(["", "\n"])
    else:
        text = "[" + choose.choice([", ", ",\n"]).join(texts) + "]"
    for number, raw in enumerate(shop.raw):
        text = text.replace(f'"@raw{number}@"', raw)
    content = text.encode()
    if wrong in ("file", "both"):
        change = choose.choice(FILE_MUTATIONS)
        content, broken = change(choose, content, lines)
        case.description.append(f"file: {change.__name__} (broken: {broken})")
        if broken != "no":
            case.broken, case.trained = broken, None
    if case.broken == "no" and choose.random() < 0.05:
        weight, broken = choose.choice([("*2", "no"), ("*0", "yes"), ("*-1", "yes"), ("*nan", "yes"), ("*x", "yes"), ("*1e-9", "maybe"),
                                        ("*1e300", "maybe"), ("*1e12", "maybe"), ("*5e-324", "maybe"), ("*3.0", "no")])  # fmt: skip
        case.argument, case.broken = case.argument + weight, broken
        case.trained = None if broken != "no" else count * int(float(weight[1:]))
        case.description.append(f"weight {weight}")
    elif choose.random() < 0.02:
        case.description.append("no file there, but a folder, a loop, or nothing")
        case.broken = "yes"
        choose.choice([path.mkdir, lambda: path.symlink_to(path), lambda: None])()
        return case
    path.write_bytes(content)
    return case


# ---- a media file made wrong -----------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def bomb_png(width: int, height: int, mode: str, rows: int | None = None) -> bytes:
    """A PNG of one colour: a thousandth of its pixels in bytes. `rows`: it ends after so many."""
    colour, size = {"L": (0, 1), "RGB": (2, 3), "LA": (4, 2), "RGBA": (6, 4), "I;16": (0, 2), "P": (3, 1)}[mode]
    packer, row = zlib.compressobj(1), bytes(1 + width * size)
    body = b"".join([packer.compress(row) for _ in range(height if rows is None else rows)] + [packer.flush()])
    depth = 16 if mode == "I;16" else 8
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([depth, colour, 0, 0, 0])
    palette = chunk(b"PLTE", bytes(30)) + chunk(b"tRNS", bytes(5)) if mode == "P" else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def untouched(choose, content, others):
    return content


def media_cut(choose, content, others):
    return content[
        : choose.choice([choose.randrange(len(content)), choose.randrange(min(len(content), 100)), len(content) - 1])
    ]


def media_flipped(choose, content, others):
    changed = bytearray(content)
    for _ in range(choose.choice([1, 3, 30, 300])):
        changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def media_header_flipped(choose, content, others):
    changed = bytearray(content)
    for _ in range(choose.choice([1, 2, 5])):
        changed[choose.randrange(min(len(changed), 300))] = choose.randrange(256)
    return bytes(changed)


def media_zeroed(choose, content, others):
    start, length = choose.randrange(len(content)), choose.choice([4, 64, 1000])
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def media_part_gone(choose, content, others):
    start = choose.randrange(len(content))
    return content[:start] + content[start + choose.choice([1, 4, 100]) :]


def media_part_twice(choose, content, others):
    start = choose.randrange(len(content))
    end = start + choose.choice([1, 100, 5000])
    return content[:end] + content[start:end] * choose.choice([1, 5]) + content[end:]


def media_spliced(choose, content, others):
    other = choose.choice(others).read_bytes()
    return content[: choose.randrange(len(content))] + other[choose.randrange(len(other)) :]


def media_swapped_header(choose, content, others):
    other, length = choose.choice(others).read_bytes(), choose.choice([4, 8, 12, 32, 200])
    return other[:length] + content[length:]


def media_far_out_numbers(choose, content, others):
    """Sizes, counts and offsets that cannot be: near the start, and in the boxes of an MP4's index."""
    changed = bytearray(content)
    boxes = [found.start() for found in re.finditer(rb"stsz|stts|stco|stsc|ctts|mvhd|tkhd|mdhd|avc1|avcC|elst|stss|trun|tfdt|moov|mdat|strf|strh|avih", content)]  # fmt: skip
    for _ in range(choose.choice([1, 2, 4])):
        start = (
            choose.choice(boxes) + choose.randrange(-4, 40)
            if boxes and choose.random() < 0.8
            else choose.randrange(min(len(content), 400))
        )
        number = choose.choice(
            [0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, 30000, 10**6, 10**9]
        )
        start = max(0, min(start, len(changed) - 4))
        changed[start : start + 4] = number.to_bytes(4, choose.choice(["big", "little"]))
    return bytes(changed)


def media_size_in_header(choose, content, others):
    """Width and height of another order of magnitude where the format keeps them."""
    width, height = (
        choose.choice([0, 1, 7, 3000, 9000, 13000, 16383, 50_000, 65535, 2**31 - 1, 2**31, 2**32 - 1]) for _ in range(2)
    )
    changed = bytearray(content)

    def write(start: int, size: int, order: str, first: int = height, second: int = width) -> None:
        for number, value in enumerate((first, second)):
            changed[start + number * size : start + (number + 1) * size] = (value % 256**size).to_bytes(size, order)

    if content.startswith(b"\x89PNG"):
        write(16, 4, "big", width, height)
        changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4)
    elif content.startswith(b"\xff\xd8"):
        write(re.search(rb"\xff[\xc0\xc2]", content).start() + 5, 2, "big")
    elif content.startswith(b"BM"):
        write(18, 4, "little", width, height)
    elif content.startswith(b"GIF"):
        write(6, 2, "little", width, height)
        if (start := content.find(b"\x2c")) > 0:
            write(start + 5, 2, "little", width, height)
    elif content.startswith(b"P6"):
        return content.replace(b"90 60", f"{width} {height}".encode(), 1)
    elif content[8:12] == b"WEBP":
        write(24, 3, "little", width, height)
    elif content.startswith(b"II*\0"):
        for tag, value in ((0x100, width), (0x101, height)):
            if (start := content.find(tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0")) >= 0:
                changed[start + 8 : start + 12] = (value % 2**32).to_bytes(4, "little")
    elif (start := content.find(b"avc1")) >= 0:
        write(start + 28, 2, "big", width, height)
    else:
        return media_far_out_numbers(choose, content, others)
    return bytes(changed)


def media_bomb(choose, content, others):
    """Few bytes, many pixels, and all of them are there."""
    side = choose.choice([3000, 9000, 13000])
    mode = choose.choice(["L", "RGB", "LA", "RGBA", "I;16", "P"])
    kind = choose.choice(["PNG", "PNG", "PNG", "GIF", "TIFF", "WEBP", "JPEG", "text"])
    if kind == "PNG":
        return bomb_png(side, side, mode)
    target = io.BytesIO()
    if kind == "text":  # a comment that unpacks to 300 MB
        Image.new("RGB", (56, 56)).save(target, "PNG")
        content = target.getvalue()
        comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(300_000_000), 1))
        return content[:33] + comment + content[33:]
    options = {
        "TIFF": {"compression": "tiff_adobe_deflate"},
        "WEBP": {"lossless": True, "method": 0, "quality": 0},
    }.get(kind, {})
    image = Image.new("L" if kind in ("GIF", "JPEG", "TIFF") else "RGB", (side, side))
    image.save(target, kind, **options)
    return target.getvalue()


def media_animation_bomb(choose, content, others):
    """A moving PNG or GIF of which the header promises more pictures than there are."""
    image = Image.new("L", (28, 28))
    target = io.BytesIO()
    pictures = [Image.new("L", (28, 28), shade % 256) for shade in range(200)]
    image.save(target, choose.choice(["GIF", "PNG"]), save_all=True, append_images=pictures)
    changed = target.getvalue()
    if (start := changed.find(b"acTL")) >= 0:
        many = chunk(b"acTL", (2**31 - 1).to_bytes(4) + bytes(4))
        changed = changed[: start - 4] + many + changed[start + 16 :]
    return changed


def media_with_odd_facts(choose, content, others):
    """EXIF and comments that are not what they say."""
    target, facts = io.BytesIO(), PngImagePlugin.PngInfo()
    kind = choose.choice(["PNG", "JPEG", "WEBP", "TIFF"])
    exif = Image.Exif()
    exif[0x0112] = choose.choice([0, 1, 3, 6, 8, 9, 255, 65535])
    exif[0x010E] = "é" * choose.choice([1, 20_000])
    rubbish = bytearray(exif.tobytes())
    for _ in range(choose.choice([0, 1, 3, 10])):
        rubbish[choose.randrange(len(rubbish))] = choose.randrange(256)
    facts.add_text(
        choose.choice(["XML:com.adobe.xmp", "Raw profile type exif"]),
        choose.choice(["<x/>", "exif\n  8\n00", "\nexif\n 4\n49492a00", "x" * 1000]),
    )
    options = {"pnginfo": facts} if kind == "PNG" and choose.random() < 0.5 else {}
    options |= {"exif": bytes(rubbish)} if kind != "TIFF" else {}
    Image.open(choose.choice([other for other in others if other.name in ("a.png", "a.jpg")])).save(
        target, kind, **options
    )
    return target.getvalue()


def media_of_nothing(choose, content, others):
    return choose.choice([b"", b"\0", bytes(100_000), b"Once upon a time there was a text file.\n" * 50, content[:4], content[:16],
        bytes(choose.randrange(256) for _ in range(3000)), content[::-1], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
        b"P6 100000 100000 255\n", b"P6 13000 13000 255\n", b"P3 99999999999 1 255\n", b"#EXTM3U\n/dev/zero\n", b"ffconcat version 1.0\nfile /dev/zero\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n",
        b"RIFF\xff\xff\xff\xffWEBPVP8X", b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08" ])  # fmt: skip


MEDIA_MUTATIONS = [
    untouched, media_cut, media_cut, media_flipped, media_flipped, media_header_flipped, media_header_flipped, media_header_flipped,
    media_zeroed, media_part_gone, media_part_twice, media_spliced, media_swapped_header, media_far_out_numbers,
    media_far_out_numbers, media_far_out_numbers, media_size_in_header, media_size_in_header, media_bomb,
    media_animation_bomb, media_with_odd_facts, media_of_nothing,
]  # fmt: skip
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".ts", ".mpg", ".flv"}


def media_case(seed: int, media: Path, folder: Path) -> Case:
    """A data file with one sample that has the broken medium of a seed."""
    choose = random.Random(seed)
    folder.mkdir(parents=True)
    everything = sorted(media.iterdir())
    is_video = choose.random() < 0.5
    alike = [path for path in everything if (path.suffix in VIDEO_SUFFIXES) == is_video]
    origin = choose.choice(alike)
    content, done = origin.read_bytes(), []
    for _ in range(choose.choice([1, 1, 1, 2])):
        change = choose.choice(MEDIA_MUTATIONS)
        if len(content) >= 200 or change is media_of_nothing:
            content = change(
                choose,
                content,
                choose.choice([alike, everything]) if change is not media_with_odd_facts else everything,
            )
            done.append(change)
    suffix = origin.suffix if choose.random() < 0.8 else choose.choice(everything).suffix
    path = folder / f"medium{suffix}"
    special = choose.random()
    if special < 0.03:
        done = ["a folder, a pipe or a loop"]
        choose.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)])()
    else:
        path.write_bytes(content)
    kind = ("video" if is_video else "image") if choose.random() < 0.9 else choose.choice(["video", "image"])
    item = {"type": kind, kind: str(path)}
    if kind == "image" and choose.random() < 0.2:
        frames = [str(media / "a.png"), str(path)]
        item = {"type": "video", "video": choose.choice([frames, frames[::-1], frames[1:]])}
    if kind == "video" and choose.random() < 0.2:
        item |= choose.choice([{"fps": 30.0}, {"nframes": 2}, {"video_start": 0.2}, {"video_end": 0.4}])
    file = folder / "data.json"
    file.write_text(json.dumps([{"messages": [user([item]), assistant("A wave.")]}]))
    names = [change if isinstance(change, str) else change.__name__ for change in done]
    case = Case(
        str(file), str(file), [f"{origin.name} as {json.dumps(item)}, {len(content):,} bytes", *names], unsure={0}
    )
    if names == ["untouched"] and kind == ("video" if is_video else "image"):
        case.trained = 1
    if special < 0.03:
        case.refused = {0}
    return case


# ---- the judge -------------------------------------------------------------------------------------------------------

SETTINGS = {"device": "cpu", "dtype": "float32", "max_steps": 1, "epochs": 1, "global_batch_size": 4096, "min_pixels": 3136,
            "max_pixels": 28 * 28 * 16, "video_max_frames": 4, "fetch_retries": 0, "learning_rate": 1e-4}  # fmt: skip


def check_refusal(case: Case, message: str) -> None:
    """Whether a message names what is wrong, in few words, and nothing else."""
    assert case.file in message, f"the message does not name {case.file}: {message[:500]}"
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message):,} characters: {message[:500]}"
    named = {int(number) for number in re.findall(re.escape(case.file) + r", sample (\d+)", message)}
    if case.broken == "no":
        assert named, f"no sample is named: {message[:500]}"
        assert named <= case.refused | case.unsure | case.late, f"good samples are named: {message[:500]}"
        assert case.refused <= named, f"samples {case.refused - named} are not named: {message[:500]}"


def check_training(case: Case, output: Path) -> None:
    """Whether a run that ended well had the right to, and is complete."""
    assert case.broken != "yes", "a broken file was trained on"
    assert case.broken == "maybe" or not case.refused | case.late, f"samples {case.refused | case.late} were trained on"
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert case.trained in (None, line["samples"]), f"{line['samples']} samples instead of {case.trained}"
    assert math.isfinite(line["loss"])
    assert (output / "model.safetensors").exists()


def run_data(case: Case, output: Path, train: Callable) -> str:
    """Train on the file in this process. Returns the outcome; AssertionError where it is none that may be."""
    from util.command_line import UserError
    from util.config import Config

    refusal = None
    try:
        train(Config(data=[case.argument], output_dir=str(output), num_workers=0, **SETTINGS))
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        check_training(case, output)
        return "trained"
    check_refusal(case, refusal)
    assert not output.exists(), "something was written"
    return "refused"


def run_media(case: Case, processor) -> str:
    """Size, pixels and batch of the one sample."""
    from util.collator import Collator
    from util.dataset import DataError, Examples, Samples
    from util.vision import Budget

    samples, outcome, refusal = Samples(Examples([case.argument], processor), processor, Budget()), "header", None
    try:
        size = samples.size(0)
        outcome = "pixels"
        sample = samples[0]
    except DataError as error:
        refusal = str(error)
    if refusal is not None:
        assert case.trained is None, f"a good file was refused: {refusal}"
        check_refusal(case, refusal)
        assert "medium" in refusal, f"the medium is not named: {refusal}"
        return f"refused by its {outcome}"
    assert not case.refused, "it was read"
    (medium,), (grid,) = sample.media, size.grids
    assert medium.grid[:3] == grid[:3], f"{medium.grid} decoded, {grid} by its header"
    assert medium.patches.shape == (grid.patches, 1176 if medium.is_video else 588)
    most_tokens = 16384 if medium.is_video else 1280
    assert grid.tokens <= most_tokens
    assert grid.patches * 14 * 14 <= most_tokens * 28 * 28
    assert len(Collator()([sample]).input_ids) == size.tokens
    return "read"


def run_command_line(case: Case, output: Path, model: str) -> str:
    """The same through `python finetune.py`, with its data worker: exit codes, and what stands on the error stream."""
    flags = {**SETTINGS, "model": model, "output_dir": output}
    command = [sys.executable, "finetune.py", "--data", case.argument, *runs.flags(flags)]
    done = warm.run(command, timeout=MOST_WAITED)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    if done.returncode == 0:
        check_training(case, output)
        return "trained"
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    said = [line for line in done.stderr.splitlines() if line.startswith("finetune.py: ")]
    assert len(said) == 1, f"{len(said)} messages: {done.stderr[-3000:]}"
    check_refusal(case, done.stderr[done.stderr.index("finetune.py: ") :])
    assert not output.exists(), "something was written"
    return "refused"


def stand_ins(model: str) -> tuple[Callable, Callable]:
    """The training script twice: as it is, and with what costs seconds and no data replaced."""
    import torch

    import finetune
    from util import log
    from util import model as models
    from util.config import Config
    from util.cost import memory
    from util.publish import save_model

    config, processor = models.load_config(model), models.load_processor(model)
    counts = memory.count_parameters(config, Config())

    class OneWeight(torch.nn.Module):
        """A model that reads its batch and has a loss."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

        def forward(self, batch):
            assert len(batch.input_ids) == batch.position_ids.shape[1]
            assert len(batch.visual_index) * 4 == len(batch.image_patches) + len(batch.video_patches)
            return self.weight.sum() * len(batch.target_ids)

    def save(packed, processor, budget, directory: Path, say) -> None:
        (directory / "model.safetensors").touch()

    quick = {(models, "load_config"): lambda *_: config, (models, "load_processor"): lambda *_: processor,
             (models, "build_model"): lambda *arguments: OneWeight(), (save_model, "save_model"): save,
             (memory, "count_parameters"): lambda *_: counts, (log, "draw_loss"): lambda directory: None}  # fmt: skip

    def train_quickly(settings):
        real = {place: getattr(*place) for place in quick}
        for (module, name), function in quick.items():
            setattr(module, name, function)
        try:
            return finetune.train(settings)
        finally:
            for (module, name), function in real.items():
                setattr(module, name, function)

    return finetune.train, train_quickly


def serve(connection: Connection, model: str, media: str, scratch: str) -> None:
    """A worker process: gets (kind, seed), answers (outcome, description, seconds, bytes, what went wrong)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from util.cost.memory import peak_bytes
    from util.model import load_processor

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    said = open(os.path.join(scratch, f"said_{os.getpid()}"), "w+")
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    SETTINGS["model"] = model
    train, train_quickly = stand_ins(model)
    processor = load_processor(model)
    connection.send("ready")
    while (job := connection.recv()) is not None:
        kind, seed = job
        folder, case, wrong, outcome = Path(scratch) / f"{kind}{seed}", None, None, None
        try:
            case = {"data": data_case, "media": media_case}[kind](seed, Path(media), folder)
            began = time.process_time()
            if kind == "media":
                outcome = run_media(case, processor)
            else:
                outcome = run_data(case, folder / "run", train if seed % REAL_EVERY == 0 else train_quickly)
        except BaseException:  # a panic of the tokenizer's is no Exception
            wrong = traceback.format_exc()[-3000:]
        seconds = time.process_time() - began if case else 0.0
        peak = peak_bytes(torch.device("cpu"))
        if wrong is None and seconds > MOST_SECONDS:
            wrong = f"took {seconds:.1f} s"
        if peak > MOST_MEMORY:
            wrong = f"{wrong or ''} took {peak / 2**30:.2f} GiB"
        if wrong is None:
            shutil.rmtree(folder, ignore_errors=True)
        connection.send((outcome, case.description if case else [], seconds, peak, wrong))
        if peak > MOST_MEMORY:  # the peak of a process never falls: let another one go on
            return


class Worker:
    """A process that judges cases, and is replaced when one ends it."""

    def __init__(self, *places: str) -> None:
        self.places, self.process = places, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.places), daemon=True)
        self.process.start()
        theirs.close()
        assert self.connection.poll(300), "the worker does not start"
        self.connection.recv()

    def judge(self, kind: str, seed: int) -> tuple:
        """(outcome, description, seconds, bytes, what went wrong or None)."""
        if self.process is None or not self.process.is_alive():
            self.start()
        self.connection.send((kind, seed))
        try:
            if self.connection.poll(MOST_WAITED):
                answer = self.connection.recv()
                if answer[3] > MOST_MEMORY:
                    self.stop()
                return answer
            wrong = f"hangs for more than {MOST_WAITED:.0f} s"
        except EOFError:
            self.process.join()
            wrong = f"ended the process with exit code {self.process.exitcode}"
        self.stop()
        return None, [], 0.0, 0, wrong

    def stop(self) -> None:
        """End the process, by force where it does not listen."""
        if self.process and self.process.is_alive():
            with suppress(BrokenPipeError):  # it may be ending
                self.connection.send(None)
            self.process.join(1)
            self.process.kill()
            self.process.join()
        self.process = None


@dataclass
class Report:
    outcomes: Counter
    failures: list[str]
    slowest: tuple[float, int]  # (seconds, seed)
    peak: int  # bytes

    def __str__(self) -> str:
        return (f"{dict(self.outcomes)}, slowest {self.slowest[0]:.1f} s (seed {self.slowest[1]}), "
                f"peak {self.peak / 2**30:.2f} GiB, {len(self.failures)} failures")  # fmt: skip


def judge_all(kind: str, seeds: list[int], model: str, media: str, scratch: str, workers: int = 2) -> Report:
    """Every seed judged by one of the workers."""
    report = Report(Counter(), [], (0.0, -1), 0)
    waiting = list(seeds)[::-1]

    def work() -> None:
        worker = Worker(model, media, scratch)
        while waiting:
            seed = waiting.pop()
            outcome, description, seconds, peak, wrong = worker.judge(kind, seed)
            report.slowest, report.peak = max(report.slowest, (seconds, seed)), max(report.peak, peak)
            report.outcomes["failed" if wrong else outcome] += 1
            if wrong:
                report.failures.append(f"seed {seed} of {kind}: {'; '.join(description)}\n{wrong}")
        worker.stop()

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return report


def main() -> None:
    from util.tiny_model import make_tiny_model

    kind, *seeds = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_tiny_model(place / "model")
        make_media(place / "media")
        (place / "scratch").mkdir()
        bounds = [range(int(a), int(b or a) + 1) for a, _, b in (seed.partition("-") for seed in seeds)]
        numbers = [number for bound in bounds for number in bound]
        began = time.time()
        report = judge_all(kind, numbers, str(model), str(place / "media"), str(place / "scratch"))
        print(*report.failures, report, f"{time.time() - began:.0f} s", sep="\n\n")
        if len(numbers) == 1:
            case = {"data": data_case, "media": media_case}[kind](numbers[0], place / "media", place / "case")
            print(*case.description, sep="\n")


if __name__ == "__main__":
    main()
