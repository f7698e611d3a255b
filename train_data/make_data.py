"""Draws all the data of this project: every picture, video, question and answer in train_data/ and test_data/.

    python train_data/make_data.py                    the showcase: a few large samples, kept in the repository
    python train_data/make_data.py --demonstration    thousands of small ones, from which a tiny model learns, not kept

The same seed gives the same files, bit for bit, with the same versions of Pillow, PyAV and numpy. No picture or video
occurs twice, neither as bytes nor as pixels, so nothing of the test data is ever trained on.
"""

import argparse
import hashlib
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SHOWCASE_DIRS = (HERE, HERE.parent / "test_data")
DEMONSTRATION_DIRS = tuple(directory / "demonstration" for directory in SHOWCASE_DIRS)

SEED = 307  # with it, the few samples of the showcase differ well in their answers
SHOWCASE = {  # kind: number of samples for training and for testing
    "colour": (2, 1), "shape": (1, 1), "place": (2, 1), "chart": (3, 2), "box": (2, 1),
    "motion": (3, 2), "motion colour": (1, 1), "several images": (2, 1), "image and video": (1, 1),
    "turns": (2, 1), "system": (1, 1), "text": (2, 1), "chinese": (2, 1), "newline": (1, 1),
    "rotated": (1, 1), "transparent": (1, 1), "boxes": (1, 1), "region": (1, 1), "agent": (1, 1), "tool call": (1, 1),
}  # fmt: skip
TEST_SHARES = {"colour": 12, "shape": 12, "place": 12, "bars": 9, "motion": 10, "motion colour": 5}  # of 60 questions
RARE_KINDS = ("text", "system", "several images", "chinese")  # 1 % each of the demonstration's training data

COLOURS = {
    "red": (221, 41, 41), "green": (34, 160, 62), "blue": (38, 82, 224),
    "yellow": (246, 200, 0), "purple": (158, 46, 196), "black": (24, 24, 28),
}  # fmt: skip
PLACES = {  # centre as a fraction of width and height
    "top left": (0.27, 0.27), "top right": (0.73, 0.27), "centre": (0.5, 0.5),
    "bottom left": (0.27, 0.73), "bottom right": (0.73, 0.73),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y grows downwards
ANGLES = np.linspace(0, 2 * np.pi, 72, endpoint=False)
ARM = 0.34  # half the width of the arms of a cross
OUTLINES = {  # corners (x, y) of each shape, for radius 1 and centre (0, 0)
    "circle": np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1),
    "square": np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)]),
    "cross": np.array([(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
                       (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)]),
}  # fmt: skip
CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字形",
}  # fmt: skip
CHARTS = {  # title: labels of the bars
    "Fruit sold today": ("apples", "pears", "plums", "figs"),
    "Books read this year": ("Anna", "Ben", "Carla", "David"),
    "Rainy days": ("March", "April", "May", "June"),
    "Birds in the garden": ("robins", "sparrows", "crows", "finches"),
    "Letters received": ("Monday", "Tuesday", "Friday", "Saturday"),
}


class Look(NamedTuple):
    """How large and how plain the media of a data set are."""

    image_size: tuple[int, int]  # width and height in pixels
    video_size: tuple[int, int]
    video_frames: int
    video_rate: int  # frames per second
    things: int  # shapes in a picture
    radius: float  # of a shape, as a fraction of the shorter side
    noise: float  # standard deviation of the background's brightness, of 255 levels


LARGE = Look((448, 336), (320, 240), 36, 12, things=3, radius=0.14, noise=0)
SMALL = Look((56, 56), (56, 56), 16, 8, things=1, radius=0.19, noise=3)


class Thing(NamedTuple):
    """One coloured shape in a picture; centre and radius in pixels."""

    shape: str
    colour: str
    place: str
    centre: tuple[float, float]
    radius: float

    @property
    def corners(self) -> np.ndarray:
        return np.array(self.centre) + self.radius * OUTLINES[self.shape]  # (corners, 2)


class Medium(NamedTuple):
    """An encoded image or video. Until it is written to a file it stands in the message, where the path will stand."""

    suffix: str  # .png, .jpg or .mp4
    data: bytes

    @property
    def type(self) -> str:
        return "video" if self.suffix == ".mp4" else "image"

    def fingerprints(self) -> set[bytes]:
        """SHA-256 of the bytes and of the decoded pixels: both must differ between any two media."""
        if self.type == "image":
            pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(self.data))).convert("RGB"))
        else:
            with av.open(io.BytesIO(self.data)) as container:
                pixels = np.stack([frame.to_ndarray() for frame in container.decode(video=0)])
        decoded = str(pixels.shape).encode() + pixels.tobytes()
        return {hashlib.sha256(self.data).digest(), hashlib.sha256(decoded).digest()}


# ---------------------------------------------------------------------------------------------- pictures and videos


def choose(random: np.random.Generator, options: Iterable, number: int) -> list:
    """`number` different options in random order."""
    options = list(options)
    return [options[index] for index in random.permutation(len(options))[:number]]


def scene(random: np.random.Generator, look: Look, number: int) -> list[Thing]:
    """Things that differ in shape, in colour and in place."""
    size, things = np.array(look.image_size), []
    names = [choose(random, options, number) for options in (OUTLINES, COLOURS, PLACES)]
    for shape, colour, place in zip(*names, strict=True):
        centre = size * (PLACES[place] + random.uniform(-0.03, 0.03, 2))
        things.append(Thing(shape, colour, place, tuple(centre), size.min() * look.radius * random.uniform(0.9, 1.1)))
    return things


def backdrop(random: np.random.Generator, size: tuple[int, int], noise: float) -> Image.Image:
    """A picture of width and height `size` that fades from one light tone at the top into another."""
    width, height = size
    fade = np.linspace(*random.uniform(222, 255, (2, 3)), height)[:, None].repeat(width, axis=1)  # (height, width, 3)
    fade += random.normal(0, noise, (height, width, 1))
    return Image.fromarray(fade.round().clip(0, 255).astype(np.uint8))


def paint(picture: Image.Image, things: Iterable[Thing]) -> Image.Image:
    """Paints things onto a picture, in place. Edges are smooth: the mask is drawn four times as large, then reduced."""
    for thing in things:
        mask = Image.new("L", (4 * picture.width, 4 * picture.height))
        ImageDraw.Draw(mask).polygon((4 * thing.corners).ravel().tolist(), fill=255)
        picture.paste(COLOURS[thing.colour], mask=mask.reduce(4))
    return picture


def encode_image(picture: Image.Image, suffix: str = ".png", **options) -> Medium:
    buffer = io.BytesIO()
    picture.save(buffer, {".png": "PNG", ".jpg": "JPEG"}[suffix], **options)
    return Medium(suffix, buffer.getvalue())


def image_of(random: np.random.Generator, look: Look, things: Iterable[Thing]) -> Medium:
    return encode_image(paint(backdrop(random, look.image_size, look.noise), things))


def video_of(random: np.random.Generator, look: Look, thing: Thing, direction: str) -> Medium:
    """A thing that crosses the picture once, at constant speed: H.264 with B-frames, a key frame every second."""
    size, way = np.array(look.video_size), np.array(DIRECTIONS[direction])
    middle = np.where(way == 0, random.uniform(0.3, 0.7, 2), 0.5)  # of the path, as a fraction of width and height
    reach = random.uniform(0.24, 0.3)  # half the path
    still = backdrop(random, look.video_size, look.noise)
    radius = thing.radius * size.min() / min(look.image_size)
    buffer = io.BytesIO()
    # Two settings keep the bits the same: threads=1, on any number of cores; mbtree=0, from run to run, as x264's
    # macroblock tree reads memory that nobody wrote. b-adapt=0 asks for B-frames also where x264 sees no gain.
    options = {"preset": "veryfast", "crf": "16", "bf": "2", "g": str(look.video_rate), "threads": "1"}
    options["x264-params"] = "b-adapt=0:mbtree=0"
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=look.video_rate, options=options)
        stream.width, stream.height = look.video_size
        stream.pix_fmt = "yuv420p"
        for progress in np.linspace(-reach, reach, look.video_frames):
            moved = thing._replace(centre=tuple(size * (middle + way * progress)), radius=radius)
            container.mux(stream.encode(av.VideoFrame.from_image(paint(still.copy(), [moved]))))
        container.mux(stream.encode(None))
    return Medium(".mp4", buffer.getvalue())


# ----------------------------------------------------------------------------------------------------- conversations


def conversation(media: Iterable[Medium], *turns: tuple[str, str | list[dict]], system: str = "") -> list[dict]:
    """Messages of questions and their answers; the media stand before the first question."""
    messages = [{"role": "system", "content": system}] if system else []
    shown = [{"type": medium.type, medium.type: medium} for medium in media]
    for question, answer in turns:
        content = [*shown, {"type": "text", "text": question}] if shown else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        shown = []
    return messages


def questions_about(thing: Thing, look: Look) -> dict[str, tuple[str, str]]:
    """Question and answer by kind. In company, a thing is named by its colour or by its shape."""
    alone = look.things == 1
    name, full_name = "shape" if alone else thing.shape, f"the {thing.colour} {thing.shape}"
    # Qwen2-VL's own format of a box: two corners in thousandths of the picture's width and height.
    ends = np.stack([thing.corners.min(axis=0), thing.corners.max(axis=0)]) / look.image_size
    (left, top), (right, bottom) = (1000 * ends).astype(int).clip(0, 999).tolist()
    box = f"<|object_ref_start|>{full_name}<|object_ref_end|><|box_start|>({left},{top}),({right},{bottom})<|box_end|>"
    return {
        "colour": (f"What colour is the {name}?", thing.colour),
        "shape": ("Which shape is it?" if alone else f"Which shape is {thing.colour}?", thing.shape),
        "place": (f"Where is the {name}?", thing.place),
        "box": (f"Detect the bounding box of {full_name}.", box),
        "system": (f"What colour is the {name}?", thing.colour.upper()),
        "newline": (f"What colour is the {name}? Begin with a new line.", f"\n{thing.colour}"),
        "chinese": (f"{'图形' if alone else CHINESE[thing.shape]}是什么颜色？", CHINESE[thing.colour]),
    }


def picture(random: np.random.Generator, look: Look, kinds: tuple[str, ...], system: str = "") -> list[dict]:
    """One question of each kind about one picture, in random order."""
    things = scene(random, look, look.things)
    asked = questions_about(things[0], look)
    turns = [asked[kind] for kind in choose(random, kinds, len(kinds))]
    return conversation([image_of(random, look, things)], *turns, system=system)


def frame(thing: Thing, size: tuple[int, int]) -> list[int]:
    """The box around a thing in pixels: left, top, right, bottom."""
    ends = np.stack([np.floor(thing.corners.min(axis=0)), np.ceil(thing.corners.max(axis=0))])
    return ends.clip(0, size).astype(int).ravel().tolist()


def boxes(random: np.random.Generator, look: Look) -> list[dict]:
    """The answer holds a box item for each thing, in pixels: the loader writes them as the model's text."""
    things = sorted(scene(random, look, look.things), key=lambda thing: thing.corners[:, 0].min())
    answer: list[dict] = []
    for thing in things:
        answer += [{"type": "text", "text": ", "}] if answer else []
        answer.append({"type": "box", "label": f"{thing.colour} {thing.shape}", "bbox": frame(thing, look.image_size)})
    return conversation([image_of(random, look, things)], ("Detect all shapes, from left to right.", answer))


def region(random: np.random.Generator, look: Look) -> list[dict]:
    """The question holds a box item: what is there?"""
    things = scene(random, look, look.things)
    thing = things[random.integers(len(things))]
    messages = conversation([image_of(random, look, things)], ("Which shape is in ", thing.shape))
    messages[0]["content"] += [{"type": "box", "bbox": frame(thing, look.image_size)}, {"type": "text", "text": "?"}]
    return messages


def tool(name: str, description: str, **arguments: str) -> dict:
    """What an agent may call, as OpenAI's API describes it; `arguments`: their JSON types by name."""
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(said: str, name: str, **arguments) -> dict:
    """An assistant's message that calls a tool."""
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": said, "tool_calls": calls}


def screen(look: Look, ground: tuple[int, int, int], title: str, buttons: dict[str, tuple[int, int]]) -> Medium:
    """A screenshot: a title and buttons, each with its centre in pixels."""
    image = Image.new("RGB", look.image_size, ground)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, look.image_size[0], 44), (52, 58, 70))
    draw.text((look.image_size[0] // 2, 22), title, "white", ImageFont.load_default(20), anchor="mm")
    for label, (x, y) in buttons.items():
        draw.rounded_rectangle((x - 56, y - 20, x + 56, y + 20), 8, (70, 110, 200))
        draw.text((x, y), label, "white", ImageFont.load_default(16), anchor="mm")
    return encode_image(image)


AGENT_TOOLS = (tool("click", "Click at a point of the screen, in thousandths of its width and height.",
                    x="integer", y="integer"),)  # fmt: skip
TABLE_TOOLS = (tool("add", "Add numbers.", numbers="array"),)


def agent(random: np.random.Generator, look: Look) -> list[dict]:
    """An episode: each screenshot is answered by a click, which gives the next screenshot, until the answer is seen."""
    ground = tuple(int(level) for level in random.integers(225, 256, 3))
    first, second = choose(random, ("Photos", "Music", "Files", "Mail", "Maps"), 2)
    people, places = (
        choose(random, ("Anna", "Ben", "Carla", "David"), 2),
        [(112, 130), (336, 130), (112, 240), (336, 240)],
    )
    where = [places[number] for number in random.permutation(4)]
    unread = int(random.integers(2, 60))
    shots = [
        screen(look, ground, "Home", dict(zip((first, second), where[:2], strict=True))),
        screen(look, ground, first, dict(zip(people, where[2:], strict=True))),
        screen(look, ground, f"{people[0]}: {unread} items", {"Back": where[0]}),
    ]
    width, height = look.image_size
    points = [{"x": 1000 * x // width, "y": 1000 * y // height} for x, y in (where[0], where[2])]
    shown = [{"type": "image", "image": shot} for shot in shots]
    question = f"How many items does {people[0]} have in {first}?"
    return [
        {"role": "user", "content": [shown[0], {"type": "text", "text": question}]},
        call(f"I open {first}.", "click", **points[0]),
        {"role": "tool", "content": [shown[1]]},
        call(f"I open {people[0]}.", "click", **points[1]),
        {"role": "tool", "content": [shown[2]]},
        {"role": "assistant", "content": str(unread)},
    ]


def tool_call(random: np.random.Generator, look: Look) -> list[dict]:
    """A chart whose values are read, then added by a tool."""
    values = [int(value) for value in random.integers(3, 20, 4)]
    messages = chart(random, look, values)
    messages[0]["content"][-1]["text"] = "What is the sum of all bars?"
    return [
        messages[0],
        call("", "add", numbers=values),
        {"role": "tool", "content": str(sum(values))},
        {"role": "assistant", "content": f"The sum is {sum(values)}."},
    ]


def motion(random: np.random.Generator, look: Look, kinds: tuple[str, ...]) -> list[dict]:
    """One question of each kind about one video, in random order."""
    thing, direction = scene(random, look, 1)[0], choose(random, DIRECTIONS, 1)[0]
    asked = {
        "motion": ("Which way does it move?", direction),
        "motion colour": ("What colour is the moving thing?", thing.colour),
    }
    turns = [asked[kind] for kind in choose(random, kinds, len(kinds))]
    return conversation([video_of(random, look, thing, direction)], *turns)


def several_images(random: np.random.Generator, look: Look) -> list[dict]:
    things, answer = scene(random, look, 2), int(random.integers(2))
    question = f"Which picture shows a {things[answer].shape}, the first or the second?"
    return conversation([image_of(random, look, [thing]) for thing in things], (question, ("first", "second")[answer]))


def image_and_video(random: np.random.Generator, look: Look) -> list[dict]:
    shown, other = scene(random, look, 2)
    same = bool(random.integers(2))
    video = video_of(random, look, shown if same else other, choose(random, DIRECTIONS, 1)[0])
    question = "Does the shape in the picture move in the video, yes or no?"
    return conversation([image_of(random, look, [shown]), video], (question, "yes" if same else "no"))


def text(random: np.random.Generator, look: Look) -> list[dict]:
    words = ", ".join(choose(random, [f"{colour} {shape}" for colour in COLOURS for shape in OUTLINES], 3))
    return conversation([], (f"Repeat: {words}", words))


def rotated(random: np.random.Generator, look: Look) -> list[dict]:
    """A photo from a camera held on its side: the answer is right only where the EXIF orientation is applied."""
    things = scene(random, look, look.things)
    photo = paint(backdrop(random, look.image_size, look.noise), things).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to view
    return conversation([encode_image(photo, ".jpg", quality=90, exif=exif)], questions_about(things[0], look)["place"])


def transparent(random: np.random.Generator, look: Look) -> list[dict]:
    """A shape on transparent ground of the same colour: where the transparency is not laid on white, nothing shows."""
    thing = scene(random, look, 1)[0]
    image = paint(Image.new("RGBA", look.image_size, (*COLOURS[thing.colour], 0)), [thing])
    return conversation([encode_image(image)], questions_about(thing, look)["shape"])


def bars(random: np.random.Generator, look: Look) -> list[dict]:
    """A chart for tiny models, 84x56 pixels: a bar per column of visual tokens, the tallest alone in the upper row."""
    image = backdrop(random, (84, 56), look.noise)
    colours, tallest = choose(random, COLOURS, 3), random.integers(3)
    for column, colour in enumerate(colours):
        height = random.integers(36, 49) if column == tallest else random.integers(6, 24)
        middle, half_width = 28 * column + 14 + random.integers(-2, 3), random.integers(7, 11)
        ImageDraw.Draw(image).rectangle((middle - half_width, 52 - height, middle + half_width, 52), COLOURS[colour])
    return conversation([encode_image(image)], ("Which bar is the tallest?", colours[tallest]))


def chart(random: np.random.Generator, look: Look, values: list[int] | None = None) -> list[dict]:
    """A bar chart with title, scale and labels; asked is its tallest bar, its shortest, or a value."""
    title, values = choose(random, CHARTS, 1)[0], values or choose(random, range(3, 20), 4)
    labels, ink, font = CHARTS[title], (40, 40, 52), ImageFont.load_default(16)
    image = Image.new("RGB", look.image_size, (252, 252, 250))
    draw = ImageDraw.Draw(image)
    draw.text((236, 26), title, ink, ImageFont.load_default(24), anchor="mm")
    for level in range(0, 21, 5):
        draw.line((48, 300 - 12 * level, 424, 300 - 12 * level), (205, 205, 212))
        draw.text((40, 300 - 12 * level), str(level), ink, font, anchor="rm")
    for column, (label, value, colour) in enumerate(zip(labels, values, choose(random, COLOURS, 4), strict=True)):
        middle, top = 95 + 94 * column, 300 - 12 * value
        draw.rectangle((middle - 28, top, middle + 28, 300), COLOURS[colour])
        draw.text((middle, top - 10), str(value), ink, font, anchor="mm")
        draw.text((middle, 316), label, ink, font, anchor="mm")
    asked = [
        ("Which bar is the tallest?", labels[values.index(max(values))]),
        ("Which bar is the shortest?", labels[values.index(min(values))]),
        (f"What is the value of {labels[0]}?", str(values[0])),
    ]
    return conversation([encode_image(image)], *choose(random, asked, 1))


CONVERSATIONS: dict[str, Callable[[np.random.Generator, Look], list[dict]]] = {
    **{kind: partial(picture, kinds=(kind,)) for kind in ("colour", "shape", "place", "box", "newline", "chinese")},
    "system": partial(picture, kinds=("system",), system="You answer in capital letters."),
    "turns": partial(picture, kinds=("colour", "shape", "place")),
    "motion": partial(motion, kinds=("motion",)),
    "motion colour": partial(motion, kinds=("motion colour",)),
    "motion turns": partial(motion, kinds=("motion", "motion colour")),
    "several images": several_images,
    "image and video": image_and_video,
    "text": text,
    "rotated": rotated,
    "transparent": transparent,
    "bars": bars,
    "chart": chart,
    "boxes": boxes,
    "region": region,
    "agent": agent,
    "tool call": tool_call,
}
TOOLS = {"agent": AGENT_TOOLS, "tool call": TABLE_TOOLS}  # kinds whose samples name tools


# --------------------------------------------------------------------------------------------------------- data sets


def interleave(numbers: dict[str, int]) -> list[str]:
    """Each kind as often as its number says, evenly spread: every beginning of the list is a fair mixture."""
    spread = [((index + 0.5) / number, kind) for kind, number in numbers.items() for index in range(number)]
    return [kind for _, kind in sorted(spread)]


def media_parts(messages: list[dict]) -> list[dict]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] in ("image", "video")]


def make_samples(kinds: list[str], look: Look, seed: tuple[int, int], seen: set[bytes]) -> Iterator[dict]:
    """One sample per kind, in order. A medium with a fingerprint in `seen` is drawn again; new ones are added to it."""
    for index, kind in enumerate(kinds):
        for attempt in itertools.count():
            messages = CONVERSATIONS[kind](np.random.default_rng([*seed, index, attempt]), look)
            fingerprints = set().union(*(part[part["type"]].fingerprints() for part in media_parts(messages)))
            if seen.isdisjoint(fingerprints):
                break
        seen |= fingerprints
        yield {"kind": kind, "messages": messages, **({"tools": [*TOOLS[kind]]} if kind in TOOLS else {})}


def write(samples: Iterable[dict], file: Path) -> None:
    """Writes the media into media/ beside `file`, then the samples, with paths in place of media, into `file`."""
    (file.parent / "media").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, sample in enumerate(samples):
        for number, part in enumerate(media_parts(sample["messages"])):
            medium = part[part["type"]]
            path = f"media/{index:04}_{sample['kind'].replace(' ', '_')}_{number}{medium.suffix}"
            (file.parent / path).write_bytes(medium.data)
            part[part["type"]] = path
        lines.append(sample)
    if file.suffix == ".jsonl":
        content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    else:
        content = json.dumps(lines, ensure_ascii=False, indent=1)
    file.write_text(content + "\n", encoding="utf-8")


def make_showcase(train_dir: Path, test_dir: Path, *, seed: int = SEED) -> None:
    """Writes data.json and media/ into both directories, over what an earlier call wrote there."""
    seen: set[bytes] = set()
    for split, directory in enumerate((train_dir, test_dir)):
        kinds = [kind for kind, numbers in SHOWCASE.items() for _ in range(numbers[split])]
        write(make_samples(kinds, LARGE, (seed, split), seen), directory / "data.json")


def make_demonstration(
    train_dir: Path,
    test_dir: Path,
    *,
    shapes: int = 2400,
    charts: int = 1000,
    videos: int = 800,
    test_questions: int = 600,
    seed: int = SEED,
) -> bool:
    """Makes both directories (data.jsonl, media/, stamp.txt), or returns False at once where they are made already.

    `shapes`, `charts` and `videos` count training media; about each of them all its questions are asked. Each test
    question has a medium of its own. A directory is complete or absent: it is built beside its place, then renamed.
    Raises ValueError for a negative number and for a directory that holds something this function did not make.
    """
    settings = [shapes, charts, videos, test_questions, seed]
    if min(settings) < 0:
        raise ValueError(f"shapes, charts, videos, test_questions and seed must not be negative, but are {settings}")
    for directory in (train_dir, test_dir):
        if directory.exists() and any(directory.iterdir()) and not (directory / "stamp.txt").exists():
            raise ValueError(f"{directory} holds files of another origin: choose another directory, or empty it")
    versions = [np.__version__, PIL.__version__, av.__version__]
    stamp = hashlib.sha256(Path(__file__).read_bytes() + json.dumps([settings, versions]).encode()).hexdigest() + "\n"
    stamps = [directory / "stamp.txt" for directory in (train_dir, test_dir)]
    if all(file.exists() and file.read_text(encoding="utf-8") == stamp for file in stamps):
        return False

    rare = dict.fromkeys(RARE_KINDS, (shapes + charts + videos) // 100)
    train_kinds = interleave({"turns": shapes, "bars": charts, "motion turns": videos} | rare)
    mixture = interleave(TEST_SHARES)
    test_kinds = [mixture[index % len(mixture)] for index in range(test_questions)]
    seen: set[bytes] = set()
    for split, (directory, kinds) in enumerate([(train_dir, train_kinds), (test_dir, test_kinds)]):
        samples = make_samples(kinds, SMALL, (seed, split), seen)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{directory.name}_partial_", dir=directory.parent) as temporary:
            made = Path(temporary, "new")
            write(tqdm(samples, str(directory), len(kinds), unit=" samples"), made / "data.jsonl")
            (made / "stamp.txt").write_text(stamp, encoding="utf-8")
            if directory.exists():
                directory.rename(Path(temporary, "old"))
            made.rename(directory)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--showcase", action="store_true", help="the few large samples of the repository (default)")
    mode.add_argument("--demonstration", action="store_true", help="the thousands of small samples")
    parser.add_argument("--train_dir", type=Path, help="instead of train_data/ or train_data/demonstration/")
    parser.add_argument("--test_dir", type=Path, help="instead of test_data/ or test_data/demonstration/")
    parser.add_argument("--seed", type=int, default=SEED, help="a number from 0 up; default %(default)s")
    arguments = parser.parse_args()
    defaults = DEMONSTRATION_DIRS if arguments.demonstration else SHOWCASE_DIRS
    train_dir, test_dir = arguments.train_dir or defaults[0], arguments.test_dir or defaults[1]
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, but is {arguments.seed}")
    if train_dir.resolve() == test_dir.resolve():
        parser.error(f"--train_dir and --test_dir must differ, but both are {train_dir}")
    try:
        make = make_demonstration if arguments.demonstration else make_showcase
        made = make(train_dir, test_dir, seed=arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{train_dir} and {test_dir} are " + ("up to date" if made is False else "made"))


if __name__ == "__main__":
    main()
