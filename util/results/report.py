"""Answers before and after with their pictures and scores, as one page that needs no network: test_output/report.html.

    python -m util report test_output/before.jsonl test_output/after.jsonl --run train_output/latest

It takes any number of files of answers to the same questions; the last one is compared with each of the others.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from util import vision
from util.command_line import UserError, command_parser
from util.config import Config
from util.data import fetch
from util.data.boxes import CELLS, Box
from util.data.fetch import FetchSettings
from util.data.lines import shortened
from util.results.answer_files import Answer, read_file
from util.results.metrics import (
    LABELS,
    METRICS,
    better_worse_same,
    boxes_of,
    changes_between,
    confidence_interval,
    interval_of_changes,
    mean,
    right_of_kind,
    say_the_same,
    share,
)
from util.results.settings import metrics_problems
from util.results.suited import Choice, choose, label_of
from util.run_folder import ROOT, final_in_words, read_final, read_metrics, read_settings, relative, written_whole
from util.vision import Budget

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_BYTES = 60_000_000  # of the page; the more pictures there are, the smaller each is
SIDES = (640, 512, 400, 320, 256, 200, 160, 128, 96, 64)  # pixels that the longer side of a stored picture may have
FRAMES = 6  # of a video, at most
PICTURES_PER_BLOCK = 64  # in one element of the page, which is decoded only when one of them comes into view
MOST_POINTS = 1000  # of the loss curve


def write_report(files: list[Path], output: Path, metrics: list[str], run: str | None) -> Path:
    """Make the page from files of answers; `run`: the run directory whose loss and settings it shows.

    Raises UserError where a file cannot be read, or the files answer different questions.
    """
    columns, made_from = read_columns(files)
    *others, judged = columns.values()
    first = next(iter(columns.values()))
    choice = choose(metrics, [(answer.kind, answer.reference) for answer in first])
    metrics = choice.metrics
    facts = {
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "data": sorted({plain(answer.where.rpartition(", sample ")[0]) for answer in first}),
        "columns": [{"name": name, "madeFrom": as_shown(made_from[name])} for name in columns],
        "metrics": [{"name": name, "label": LABELS[name]} for name in metrics],
        "scores": score_rows(columns, choice),
        "suits": choice.reason,
        "changes": [better_worse_same(answers, judged, metrics[0]) for answers in others],
        "run": run_facts(run),
        "rows": [row_of(answers, metrics) for answers in zip(*columns.values(), strict=True)],
    }
    media = {}
    for answer in first:
        media |= {key_of(item): item for item in answer.media}
    budgets = [Budget(**known.get("budget", {})) for known in made_from.values()]
    room = (MOST_BYTES - len(as_json(facts))) * 3 // 4  # base64 writes 3 bytes as 4 characters
    bytes_each = max(1000, room // max(1, len(media)))
    pictures = Pictures(draw_all(list(media.values()), budgets[-1], bytes_each))
    number = dict(zip(media, pictures.numbers, strict=True))
    for row, answer in zip(facts["rows"], first, strict=True):
        row["media"] = [number[key_of(item)] for item in answer.media]
        row["names"] = [name_of(item) for item in answer.media]
        if "boxes" in row:
            drawn_on = [pictures.facts[place] for place in row["media"]]
            row["boxes"] = in_thousandths(row["boxes"], answer.media, drawn_on, budgets)
    facts["pictures"] = pictures.facts
    facts["note"] = pictures.note()
    return write_page(output, facts, pictures.pixels)


def read_columns(files: list[Path]) -> tuple[dict[str, list[Answer]], dict[str, dict]]:
    """The answers in each file, and what they were made from, by the file's name.

    Raises UserError for a file without answers, for two files of one name, and where the questions differ.
    """
    columns: dict[str, list[Answer]] = {}
    made_from: dict[str, dict] = {}
    for file in map(Path, files):
        try:
            known, answers = read_file(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file of answers; the test scripts write them to test_output/") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: no answers that this version wrote ({error}); answer again") from None
        if file.stem in columns:
            raise UserError(f"{file}: two files are named {file.stem}; each column needs its own name, rename one")
        columns[file.stem] = answers
        made_from[file.stem] = known
    check_same_questions(columns)
    if not next(iter(columns.values())):
        raise UserError(f"{files[0]}: holds no answers")
    return columns, made_from


def check_same_questions(columns: dict[str, list[Answer]]) -> None:
    """Raise UserError where the columns answer different questions."""
    name, first = next(iter(columns.items()))
    for other, answers in columns.items():
        for number, (one, two) in enumerate(zip(first, answers, strict=False)):
            if one.where != two.where or not say_the_same(one.reference, two.reference):
                raise UserError(
                    f"answer {number} of {name} is to {one.where} ({one.reference!r:.40}), that of {other} to "
                    f"{two.where} ({two.reference!r:.40}); answer the same --data with both"
                )
        if len(answers) != len(first):
            raise UserError(
                f"{name} has {len(first)} answers, {other} {len(answers)}; answer the same --data with both"
            )


def as_shown(made_from: dict) -> dict:
    """What answers were made from, for a reader: the settings of the budget one by one, no marks of files."""
    facts = {**made_from, **made_from.get("budget", {})}
    for key in ("budget", "weights", "cap_pixels", "model_type"):  # no cap is ever set for test data
        facts.pop(key, None)
    return {key: plain(value) for key, value in facts.items()}


# ---- scores ---------------------------------------------------------------------------------------------------------


def score_rows(columns: dict[str, list[Answer]], choice: Choice) -> list[dict]:
    """The lines of the table of scores: each metric, the loss, and one metric by kind where there are several.

    A line has a cell for each column, and the difference of the last column to each of the others.
    """
    rows = []
    for metric in choice.metrics:
        scores = [scores_of(answers, metric) for answers in columns.values()]
        texts = [share(mean(column)) for column in scores]
        rows.append(score_row("metric", LABELS[metric], texts, scores))
    losses = []
    for answers in columns.values():
        losses.append({"text": f"{mean([answer.loss for answer in answers]):.3f}"})
    rows.append({"section": "loss", "label": "loss", "cells": losses, "differences": []})
    first = next(iter(columns.values()))
    for kind, metric in choice.of_kind.items():
        # by number, because only the first column's kinds count
        numbers = [number for number, answer in enumerate(first) if answer.kind == kind]
        scores = []
        for answers in columns.values():
            scores.append(scores_of([answers[number] for number in numbers], metric))
        row = score_row("kind", kind, list(map(right_of_kind, scores)), scores)
        rows.append({**row, "shownAs": label_of(kind, choice)})
    return rows


def scores_of(answers: list[Answer], metric: str) -> list[float | None]:
    return [answer.score(metric) for answer in answers]


def score_row(section: str, label: str, texts: list[str], scores: list[list[float | None]]) -> dict:
    """One line of the table; `texts`: of its cells, as the terminal prints them; `scores`: by column."""
    cells = []
    for text, column in zip(texts, scores, strict=True):
        interval = confidence_interval(column)
        cells.append({"text": text, "value": mean(column), "interval": interval, "span": span(interval)})
    differences = [difference(column, scores[-1]) for column in scores[:-1]]
    count = sum(score is not None for score in scores[0])
    return {"section": section, "label": label, "count": count, "cells": cells, "differences": differences}


def difference(before: list[float | None], after: list[float | None]) -> dict:
    """Mean of after - before over the questions that have both scores, and its 95 % interval."""
    changes = changes_between(before, after)
    if not changes:
        return {"value": None}
    value = mean(changes)
    low, high = interval_of_changes(changes)
    return {"value": value, "text": points(value), "span": f"{points(low)} to {points(high)}"}


def span(interval: tuple[float, float] | None) -> str | None:
    """An interval of shares in percent: `60.1 to 64.7`."""
    if interval is None:
        return None
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def points(value: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * value:+.1f}"


def row_of(answers: tuple[Answer, ...], metrics: list[str]) -> dict:
    """One question, and what each column answered."""
    asked = answers[0]
    row = {
        "where": plain(asked.where),
        "kind": asked.kind,
        "earlier": asked.earlier,
        "question": asked.question,
        "reference": asked.reference,
        "answers": [answer.answer for answer in answers],
        "scores": [list(map(answer.score, metrics)) for answer in answers],
        "losses": [round(answer.loss, 4) if math.isfinite(answer.loss) else None for answer in answers],
    }
    boxes = [boxes_of(text) for text in (asked.reference, *row["answers"])]
    if any(boxes):
        row["boxes"] = boxes
    return row


def in_thousandths(
    texts: list[list[Box]], media: list[dict], pictures: list[dict], budgets: list[Budget]
) -> list[list[Box]]:
    """Boxes in the numbers of a question's reference and answers -> thousandths of its image, as the page draws them.

    `pictures`: the facts of its media; where it has several, or its image is lost, the page draws no box. `budgets`:
    those of the columns; the reference is the first one's.
    """
    if len(pictures) != 1 or "size" not in pictures[0]:
        return texts
    found = []
    for boxes, budget in zip(texts, [budgets[0], *budgets], strict=True):
        scale = vision.box_scale(media[0], *pictures[0]["size"], budget)
        across, down = CELLS / scale.columns, CELLS / scale.rows
        found.append([(x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in boxes])
    return found


# ---- the run --------------------------------------------------------------------------------------------------------


def run_facts(run: str | None) -> dict | None:
    """Loss curve and settings of a run directory; None for a model that was not trained here."""
    settings = read_settings(run)
    if not settings:
        return None
    shown = {key: plain(value) for key, value in settings.items() if key != "launched_by"}
    if final := read_final(Path(run)):
        shown["final_model"] = final_in_words(final)
    return {"name": relative(run), "settings": shown, "curve": loss_curve(run)}


def loss_curve(run: str) -> dict | None:
    """Training loss by step (in long runs the means of several steps in a row), and the loss on held-out data."""
    lines = read_metrics(run)
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    if not steps:
        return None
    width = math.ceil(len(steps) / MOST_POINTS)
    means = []  # [last step of a group, mean loss of the group]
    for begin in range(0, len(steps), width):
        group = steps[begin : begin + width]
        last_step = group[-1][0]
        means.append([last_step, round(sum(loss for _, loss in group) / len(group), 5)])
    every = max(1, math.ceil(len(held_out) / MOST_POINTS))
    return {"training": means, "stepsPerPoint": width, "heldOut": held_out[::every]}


# ---- pictures -------------------------------------------------------------------------------------------------------


class Pictures:
    """Pictures for the page, equal ones kept once."""

    def __init__(self, drawn: Iterator[dict]) -> None:
        """`drawn`: what `draw_picture` makes of each medium."""
        self.facts: list[dict] = []  # what the page knows of each without its pixels
        self.pixels: list[bytes] = []  # WebP; empty for one that cannot be read
        self.numbers: list[int] = []  # of each medium drawn, its picture
        known: dict = {}
        for picture in drawn:
            key = json.dumps(picture, default=lambda pixels: hashlib.sha256(pixels).hexdigest())
            if key not in known:
                known[key] = len(self.pixels)
                self.pixels.append(picture.pop("pixels", b""))
                self.facts.append(picture)
            self.numbers.append(known[key])

    def note(self) -> str | None:
        """A note for the reader where pictures were made smaller or could not be read; else None."""
        notes = []
        if smaller := sum(picture.get("reduced", False) for picture in self.facts):
            notes.append(
                f"{smaller:,} of {len(self.facts):,} pictures are stored smaller than {SIDES[0]} pixels, so that this "
                f"page stays below {MOST_BYTES // 1_000_000} MB"
            )
        if lost := sum("problem" in picture for picture in self.facts):
            notes.append(
                f"{lost:,} of {len(self.facts):,} pictures could not be read; the reason stands in their place"
            )
        return "; ".join(notes) + "." if notes else None


def draw_all(items: list[dict], budget: Budget, most_bytes: int) -> Iterator[dict]:
    """`draw_picture` for every item, in order, several at a time."""
    bar_options = {"desc": "report", "unit": " pictures", "dynamic_ncols": True, "leave": False, "disable": not items}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "draw") as pool:  # decoding and encoding run side by side
        pictures = pool.map(lambda item: draw_picture(item, budget, most_bytes), items)
        yield from tqdm(pictures, total=len(items), **bar_options)


def draw_picture(item: dict, budget: Budget, most_bytes: int) -> dict:
    """One image, or frames of one video, as WebP of about `most_bytes` at most; else why it cannot be read."""
    kind = item["type"]
    try:
        (there,) = fetch.localise([item], FetchSettings())
        facts = {"type": kind}
        if kind == "image":
            image, facts["size"] = draw_image(there)
            facts["caption"] = "{} × {}".format(*facts["size"])
        else:
            image, facts["caption"] = draw_video(there, budget)
        (facts["width"], facts["height"]), facts["pixels"] = compress(image, most_bytes)
    except Exception as error:  # a picture is an illustration: whatever is wrong with it, the answers can be shown
        return {"type": kind, "problem": shortened(plain(str(error) or type(error).__name__), 200)}
    if max(facts["width"], facts["height"]) < min(SIDES[0], max(image.size)):
        facts["reduced"] = True
    return facts


def draw_image(item: dict) -> tuple[Image.Image, tuple[int, int]]:
    """The image upright and on white, and its own width and height."""
    image = vision.open_image(item["image"])
    pixels = vision.to_tensor(image, item["image"])
    height, width = pixels.shape[1:]
    return as_image(pixels, SIDES[0]), (width, height)


def draw_video(item: dict, budget: Budget) -> tuple[Image.Image, str]:
    """A few of the frames that the model saw, side by side in rows, and words that say which."""
    with vision.open_video(item) as video:
        seen = sorted({*vision.plan_video(item, video, budget)[0]})
        count = min(FRAMES, len(seen))
        last = len(seen) - 1
        gaps = max(1, count - 1)
        chosen = [seen[round(number * last / gaps)] for number in range(count)]
        frames = [as_image(frame, SIDES[0] // 2) for frame in video.frames_at(chosen)]
        seconds = [index / video.average_fps for index in (chosen[0], chosen[-1])]
    when = "" if isinstance(item["video"], list) else f", {seconds[0]:.1f} to {seconds[1]:.1f} s"
    which = f"all {count}" if count == len(seen) else f"{count} of the {len(seen)}"
    return sheet_of(frames), f"{which} frames that the model saw{when}"


def sheet_of(frames: list[Image.Image]) -> Image.Image:
    """Frames side by side in rows, 2 pixels between them, so that the whole is about 1.4 times as wide as high."""
    count = len(frames)
    width, height = frames[0].size

    def distance(across: int) -> float:
        """From the wanted shape, with so many frames in a row."""
        rows = math.ceil(count / across)
        return abs(math.log(width * across / (height * rows) / 1.4))

    across = min(range(1, count + 1), key=distance)
    rows = math.ceil(count / across)
    sheet = Image.new("RGB", (across * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for number, frame in enumerate(frames):
        row, column = divmod(number, across)
        sheet.paste(frame.resize((width, height)), (column * (width + 2), row * (height + 2)))
    return sheet


def as_image(pixels, side: int) -> Image.Image:
    """uint8 (3, H, W) as an image whose longer side has at most `side` pixels."""
    height, width = pixels.shape[1:]
    if (scale := side / max(height, width)) < 1:
        smaller = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = vision.resize(pixels, smaller)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def compress(image: Image.Image, most_bytes: int) -> tuple[tuple[int, int], bytes]:
    """Size and WebP of an image in the largest of `SIDES` that takes at most `most_bytes`, else in the smallest."""
    sides = [side for side in SIDES if side < max(image.size)]
    side = max(image.size)
    while True:
        small = image.copy()
        small.thumbnail((side, side))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=80, method=2)
        pixels = file.getvalue()
        likely = side * math.sqrt(most_bytes / len(pixels)) * 1.1
        sides = [smaller for smaller in sides if smaller < side]
        if len(pixels) <= most_bytes or not sides:
            return small.size, pixels
        side = next((smaller for smaller in sides if smaller <= likely), sides[-1])


def key_of(item: dict) -> str:
    """A key that is the same for media that look the same: an image's path, or all keys of a video."""
    return item["image"] if item["type"] == "image" else json.dumps(item, sort_keys=True)


def name_of(item: dict) -> str:
    """A medium as messages show it: without secrets of a URL, and without folders that only this machine has."""
    value = item[item["type"]]
    paths = value if isinstance(value, list) else [value]
    name = plain(fetch.printable(paths[0]))
    return f"{name} and {len(paths) - 1} more frames" if len(paths) > 1 else name


def plain(value):
    """A value, the current folder taken out of the paths in it, as a user would type them there."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, str):
        return value.replace(os.getcwd() + os.sep, "")
    return value


# ---- the page -------------------------------------------------------------------------------------------------------


def as_json(value) -> str:
    """JSON that can stand in a page: it holds no "<", so no text in it can end the element around it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def write_page(output: Path, facts: dict, pixels: list[bytes]) -> Path:
    """Write the page, complete or absent: the template with the facts and blocks of pictures put into it."""
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!-- pictures -->")
    (script,) = re.findall(r"<script>(.*?)</script>", head, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = head.replace("SCRIPT_HASH", f"'sha256-{allowed}'")  # a browser runs this script and no other
    before, after = head.split("<!-- facts -->")
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output, errors="replace") as file:  # half a surrogate pair becomes "?"
        file.write(before)
        file.write(f'<script type="application/json" id="facts">{as_json(facts)}</script>')
        file.write(after)
        for begin in range(0, len(pixels), PICTURES_PER_BLOCK):
            block = pixels[begin : begin + PICTURES_PER_BLOCK]
            lines = "\n".join(base64.b64encode(picture).decode() for picture in block)
            file.write(f'<script type="text/plain" class="pictures">{lines}</script>\n')
        file.write(tail)
    return output


def parser() -> argparse.ArgumentParser:
    made = command_parser("report", __doc__)
    made.add_argument("files", nargs="+", type=Path, help="files of answers, the one to judge last")
    made.add_argument("--run", help="the run directory whose loss curve and settings are shown")
    made.add_argument("--metrics", nargs="+", choices=("auto", *METRICS), metavar="METRIC",
                      help=f"{', '.join(METRICS)}; auto: those that suit the reference answers; default: what the run "
                      "was evaluated by, else auto")  # fmt: skip
    made.add_argument("--out", type=Path, default=ROOT / "test_output" / "report.html", help="the page to write")
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    report(given.files, given.out, given.metrics, given.run)


def report(files: list[Path], output: Path, metrics: list[str] | None, run: str | None) -> None:
    """Write the page and say where it is."""
    if run is not None and not read_settings(run):
        raise UserError(f"--run {run}: no run of finetune.py, it has no training_config.json")
    metrics = metrics or read_settings(run).get("eval_metrics") or Config().eval_metrics
    for problem in metrics_problems("--metrics", metrics):
        raise UserError(problem)
    written = write_report(files, output, metrics, run)
    print(f"report: {relative(written)} ({written.stat().st_size / 1e6:.1f} MB)")
