"""Bar, line and pie charts with questions, drawn on the spot in the layout in which ChartQA is published.

`python -m util chartqa --from drawn` calls it: FOLDER/{train,val,test}/png/*.png, with {split}_human.json (comparing,
counting) and {split}_augmented.json (reading a value) beside them. At scale 1 a chart is 112x84 pixels, small enough
for `tiny`; at 4 its texts are easy to read.
"""

import hashlib
import io
import itertools
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from util.command_line import UserError

WIDTH, HEIGHT = 112, 84  # pixels at scale 1: 4 x 3 visual tokens
LEFT, TOP, RIGHT, BOTTOM = (
    28,
    15,
    112,
    73,
)  # edges of the plot, in the same pixels; its 3 columns are visual tokens wide
COLOURS = {
    "red": (221, 41, 41), "green": (34, 160, 62), "blue": (38, 82, 224),
    "yellow": (246, 200, 0), "purple": (158, 46, 196), "black": (24, 24, 28),
}  # fmt: skip
INK = (40, 40, 52)
GRID = (205, 205, 212)
TITLES = {  # title: what the parts of the chart may be called
    "Fruit sold": ("figs", "plums", "pears"),
    "Books read": ("Anna", "Ben", "Carla"),
    "Rainy days": ("May", "June", "July"),
    "Birds seen": ("tits", "crows", "owls"),
}
COLUMNS = [LEFT + (RIGHT - LEFT) * (column + 0.5) / 3 for column in range(3)]  # the middles of the plot's columns
HIGHEST = (40, 60, 80, 100)  # what the highest value of a chart may be
LARGEST = (50, 60, 70, 80)  # what the largest share of a pie may be, in percent
YEARS = ("2020", "2021", "2022")
HUMAN, AUGMENTED = "human", "augmented"
Question = tuple[str, str, str]  # kind, query, label


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


class Canvas:
    """A light picture with a title, drawn in the coordinates of scale 1.

    At scale 1 nothing is written on it, as letters would be too small to read.
    """

    def __init__(self, random: np.random.Generator, title: str, scale: int) -> None:
        self.scale = scale
        paper = tuple(random.integers(238, 256, 3).tolist())
        self.image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.write((WIDTH / 2, 6), title, 8)

    def points(self, *corners: tuple[float, float]) -> list[tuple[int, int]]:
        return [(round(x * self.scale), round(y * self.scale)) for x, y in corners]

    def write(self, middle: tuple[float, float], text: str, size: int = 7, anchor: str = "mm") -> None:
        if self.scale > 1:
            self.draw.text(self.points(middle)[0], text, INK, font(size * self.scale), anchor=anchor)

    def axes(self, names: tuple[str, ...], columns: list[float]) -> None:
        """Horizontal lines at 0, 20 ... 100 with their numbers, and a name below each column."""
        for level in (0, 20, 40, 60, 80, 100):
            y = y_of(level)
            self.draw.line(self.points((LEFT - 10, y), (RIGHT - 2, y)), GRID, self.scale)
            self.write((LEFT - 12, y), str(level), 6, "rm")
        for name, x in zip(names, columns, strict=True):
            self.write((x, 78), name)


def y_of(value: float) -> float:
    """The height of a value from 0 to 100."""
    return BOTTOM - (BOTTOM - TOP) * value / 100


def bars(random: np.random.Generator, scale: int) -> tuple[Image.Image, list[Question]]:
    """2 or 3 bars of different colours, one at least twice as tall as the others."""
    number = int(random.integers(2, 4))
    title = str(random.choice(list(TITLES)))
    colours = random.permutation(list(COLOURS))[:number].tolist()
    highest = int(random.choice(HIGHEST))
    tallest = int(random.integers(number))
    values = random.integers(10, highest // 2 + 1, number)
    values[tallest] = highest
    canvas = Canvas(random, title, scale)
    columns = COLUMNS[:number]
    canvas.axes(TITLES[title][:number], columns)
    half_width = float(random.uniform(6, 11))
    for x, colour, value in zip(columns, colours, values, strict=True):
        corners = canvas.points((x - half_width, y_of(value)), (x + half_width, BOTTOM))
        canvas.draw.rectangle(corners, COLOURS[colour])
    human = [("Which bar is the tallest?", colours[tallest]), ("How many bars are there?", str(number))]
    return canvas.image, questions(human, [("What is the highest value?", str(highest))])


def lines(random: np.random.Generator, scale: int) -> tuple[Image.Image, list[Question]]:
    """A line of one colour that rises or falls over 3 years."""
    colour = str(random.choice(list(COLOURS)))
    highest = int(random.choice(HIGHEST))
    values = np.sort([*random.choice(np.arange(5, highest - 4), 2, replace=False), highest])
    rises = bool(random.integers(2))
    canvas = Canvas(random, str(random.choice(list(TITLES))), scale)
    canvas.axes(YEARS, COLUMNS)
    if not rises:
        values = values[::-1]
    points = canvas.points(*[(x, y_of(value)) for x, value in zip(COLUMNS, values, strict=True)])
    canvas.draw.line(points, COLOURS[colour], 2 * scale, joint="curve")
    radius = 2 * scale
    for x, y in points:
        canvas.draw.ellipse((x - radius, y - radius, x + radius, y + radius), COLOURS[colour])
    human = [("Does the line rise or fall?", "rise" if rises else "fall"), ("What colour is the line?", colour)]
    return canvas.image, questions(human, [("What is the highest value?", str(highest))])


def pies(random: np.random.Generator, scale: int) -> tuple[Image.Image, list[Question]]:
    """2 or 3 segments that make 100 %, one of them more than half, with a legend."""
    number = int(random.integers(2, 4))
    title = str(random.choice(list(TITLES)))
    colours = random.permutation(list(COLOURS))[:number].tolist()
    largest = int(random.choice(LARGEST))
    place = int(random.integers(number))
    others = number - 1
    # Each of the others has at least 5 %; what is left falls to them at random.
    shares = random.multinomial(100 - largest - 5 * others, [1 / others] * others) + 5
    shares = np.insert(shares, place, largest)
    canvas = Canvas(random, title, scale)
    angle = float(random.uniform(0, 360))
    names = TITLES[title][:number]
    circle = canvas.points((4, 16), (68, 80))
    for row, (colour, name, part) in enumerate(zip(colours, names, shares, strict=True)):
        end = angle + 3.6 * part
        canvas.draw.pieslice(circle, angle, end, COLOURS[colour])
        angle = end
        top = 22 + 14 * row  # of its line in the legend
        canvas.draw.rectangle(canvas.points((74, top), (80, top + 6)), COLOURS[colour])
        canvas.write((83, top + 3), name, 7, "lm")
    human = [("Which segment is the largest?", colours[place]), ("How many segments are there?", str(number))]
    return canvas.image, questions(human, [("What percentage is the largest segment?", str(largest))])


def questions(human: list, augmented: list) -> list[Question]:
    """Pairs of query and label, each after its kind."""
    found = [(HUMAN, query, label) for query, label in human]
    found += [(AUGMENTED, query, label) for query, label in augmented]
    return found


CHARTS = {"bars": bars, "lines": lines, "pies": pies}


def draw_dataset(
    folder: Path, counts: dict[str, int], seed: int = 0, scale: int = 1, kinds: tuple[str, ...] = ()
) -> bool:
    """Draw `counts[split]` charts for each split, of all `kinds` in turn; False where they are there already.

    No chart occurs twice, not even in two splits. The folder is complete or absent. Raises UserError for a folder that
    holds other files.
    """
    kinds = kinds or tuple(CHARTS)
    made_from = [counts, seed, scale, kinds, np.__version__, PIL.__version__]
    code = Path(__file__).read_bytes()
    stamp = hashlib.sha256(code + json.dumps(made_from).encode()).hexdigest() + "\n"
    stamp_file = folder / "stamp.txt"
    if stamp_file.exists() and stamp_file.read_text(encoding="utf-8") == stamp:
        return False
    if folder.exists() and any(folder.iterdir()) and not stamp_file.exists():
        raise UserError(f"{folder}: holds files of another origin, where charts would be drawn; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}_", dir=folder.parent) as temporary:
        made = Path(temporary, "new")
        for number, (split, count) in enumerate(counts.items()):
            draw_split(made / split, count, (seed, number), scale, kinds, seen)
        (made / "stamp.txt").write_text(stamp, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        made.rename(folder)
    return True


def draw_split(folder: Path, count: int, seed: tuple, scale: int, kinds: tuple[str, ...], seen: set[bytes]) -> None:
    """Draw the charts of one split and write its two files of questions.

    A chart whose digest is in `seen` is replaced by another one; the digests of the new ones are added.
    """
    (folder / "png").mkdir(parents=True)
    rows: dict[str, list[dict]] = {HUMAN: [], AUGMENTED: []}
    for index in tqdm(range(count), f"drawing {folder.name}", unit=" charts", leave=False, disable=None):
        for attempt in itertools.count():
            random = np.random.default_rng([*seed, index, attempt])
            image, asked = CHARTS[kinds[index % len(kinds)]](random, scale)
            digest = hashlib.sha256(image.tobytes()).digest()
            if digest not in seen:
                break
        seen.add(digest)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        (folder / "png" / f"{index:05}.png").write_bytes(buffer.getvalue())
        for kind, query, label in asked:
            rows[kind].append({"imgname": f"{index:05}.png", "query": query, "label": label})
    for kind, asked in rows.items():
        text = json.dumps(asked, indent=1) + "\n"
        (folder / f"{folder.name}_{kind}.json").write_text(text, encoding="utf-8")
