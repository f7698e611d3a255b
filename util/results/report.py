"""Answers before and after with their pictures and scores, as one page that needs no network: test_output/report.html.

    python -m util report test_output/before.jsonl test_output/after.jsonl --run train_output/latest

takes any number of files of answers to the same questions; the last one is compared with each of the others.
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
from util.data.fetch import FetchSettings
from util.data.lines import shortened
from util.results.evaluate import Answer, read_file, summarise
from util.results.metrics import (
    LABELS,
    METRICS,
    better_worse_same,
    boxes_of,
    confidence_interval,
    interval_of_changes,
    right_of_kind,
    share,
)
from util.run_folder import ROOT, read_metrics, read_settings, relative, written_whole
from util.vision import Budget

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_BYTES = 60_000_000  # of the page; the more pictures there are, the smaller each is
SIDES = (640, 512, 400, 320, 256, 200, 160, 128, 96, 64)  # pixels, the longer side of a stored picture
FRAMES = 6  # of a video, at most
PICTURES_PER_BLOCK = 64  # the page takes them apart only when one of them comes into view
MOST_POINTS = 1000  # of the loss curve


def write_report(files: list[Path], output: Path, metrics: list[str], run: str | None) -> Path:
    """Make the page from files of `evaluate.write_answers`; `run`: the run directory whose loss and settings it shows.

    Raises UserError where a file cannot be read, or the files answer different questions.
    """
    columns, made_from = read_columns(files)
    *others, judged = columns.values()
    first = next(iter(columns.values()))
    facts = {
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "data": sorted({plain(answer.where.rpartition(", sample ")[0]) for answer in first}),
        "columns": [{"name": name, "madeFrom": as_shown(made_from[name])} for name in columns],
        "metrics": [{"name": name, "label": LABELS[name]} for name in metrics],
        "scores": score_rows(columns, metrics),
        "changes": [better_worse_same(answers, judged, metrics[0]) for answers in others],
        "run": run_facts(run),
        "rows": [row_of(answers, metrics) for answers in zip(*columns.values(), strict=True)],
    }
    media = {key_of(item): item for answer in first for item in answer.media}
    budget = Budget(**next(reversed(made_from.values())).get("budget", {}))
    room = (MOST_BYTES - len(as_json(facts))) * 3 // 4  # base64 writes 3 bytes as 4
    pictures = Pictures(draw_all(list(media.values()), budget, max(1000, room // max(1, len(media)))))
    number = dict(zip(media, pictures.numbers, strict=True))
    for row, answer in zip(facts["rows"], first, strict=True):
        row["media"] = [number[key_of(item)] for item in answer.media]
        row["names"] = [name_of(item) for item in answer.media]
    facts["pictures"], facts["note"] = pictures.facts, pictures.note()
    return write_page(output, facts, pictures.pixels)


def read_columns(files: list[Path]) -> tuple[dict[str, list[Answer]], dict[str, dict]]:
    """The answers in each file, and what they were made from, by the file's name."""
    columns, made_from = {}, {}
    for file in map(Path, files):
        try:
            known, answers = read_file(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file of answers; the test scripts write them to test_output/") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: no answers that this version wrote ({error}); answer again") from None
        if file.stem in columns:
            raise UserError(f"{file}: two files are named {file.stem}; each column needs its own name, rename one")
        columns[file.stem], made_from[file.stem] = answers, known
    name, first = next(iter(columns.items()))
    for other, answers in columns.items():
        for number, (one, two) in enumerate(zip(first, answers, strict=False)):
            if (one.where, one.reference) != (two.where, two.reference):
                raise UserError(
                    f"answer {number} of {name} is to {one.where} ({one.reference!r:.40}), that of {other} to "
                    f"{two.where} ({two.reference!r:.40}); answer the same --data with both"
                )
        if len(answers) != len(first):
            raise UserError(
                f"{name} has {len(first)} answers, {other} {len(answers)}; answer the same --data with both"
            )
    if not first:
        raise UserError(f"{files[0]}: holds no answers")
    return columns, made_from


def as_shown(made_from: dict) -> dict:
    """What answers were made from, in a reader's words: no pixel limit that limits nothing, no marks of files."""
    budget = {key: value for key, value in made_from.get("budget", {}).items() if key != "cap_pixels"}
    return {key: plain(value) for key, value in {**made_from, **budget}.items() if key not in ("budget", "weights")}


# ---- scores ---------------------------------------------------------------------------------------------------------


def score_rows(columns: dict[str, list[Answer]], metrics: list[str]) -> list[dict]:
    """The lines of the table of scores: each metric, then the first one by kind of question where there are several.

    A line has a cell for each column, and the difference of the last column to each of the others.
    """
    rows = []
    summaries = [summarise(answers, metrics) for answers in columns.values()]
    scores = {m: [[answer.score(m) for answer in answers] for answers in columns.values()] for m in metrics}
    for metric in metrics:
        shown = [share(summary[metric]) for summary in summaries]
        rows.append(score_row("metric", LABELS[metric], shown, scores[metric]))
    first = next(iter(columns.values()))
    kinds = sorted({answer.kind for answer in first if answer.kind})
    for kind in kinds if len(kinds) > 1 else []:
        chosen = [number for number, answer in enumerate(first) if answer.kind == kind]
        of_this = [[column[number] for number in chosen] for column in scores[metrics[0]]]
        rows.append(score_row("kind", kind, [right_of_kind(column) for column in of_this], of_this))
    losses = [{"text": f"{summary['loss']:.3f}"} for summary in summaries]
    rows.insert(len(metrics), {"section": "loss", "label": "loss", "cells": losses, "differences": []})
    return rows


def score_row(section: str, label: str, shown: list[str], scores: list[list[float | None]]) -> dict:
    """One line of the table; `shown`: the text of each cell, as the terminal prints it."""
    cells = []
    for text, column in zip(shown, scores, strict=True):
        found = [score for score in column if score is not None]
        value = sum(found) / len(found) if found else None
        interval = confidence_interval(column)
        cells.append({"text": text, "value": value, "interval": interval, "span": span(interval)})
    differences = [difference(column, scores[-1]) for column in scores[:-1]]
    count = sum(score is not None for score in scores[0])
    return {"section": section, "label": label, "count": count, "cells": cells, "differences": differences}


def difference(before: list[float | None], after: list[float | None]) -> dict:
    """Mean of after - before over the questions that both have a score of, and its 95 % interval."""
    changes = [new - old for old, new in zip(before, after, strict=True) if None not in (old, new)]
    if not changes:
        return {"value": None}
    value = sum(changes) / len(changes)
    return {"value": value, "text": points(value), "span": span(interval_of_changes(changes), points)}


def span(interval: tuple[float, float] | None, shown=lambda value: f"{100 * value:.1f}") -> str | None:
    return interval and " to ".join(map(shown, interval))


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
        "scores": [[answer.score(metric) for metric in metrics] for answer in answers],
        "losses": [round(answer.loss, 4) if math.isfinite(answer.loss) else None for answer in answers],
    }
    boxes = [boxes_of(asked.reference), *(boxes_of(answer.answer) for answer in answers)]
    return {**row, "boxes": boxes} if any(boxes) else row


# ---- the run --------------------------------------------------------------------------------------------------------


def run_facts(run: str | None) -> dict | None:
    """Loss curve and settings of a run directory; None for a model that was not trained here."""
    settings = read_settings(run)
    if not settings:
        return None
    shown = {key: plain(value) for key, value in settings.items() if key != "launched_by"}
    return {"name": relative(run), "settings": shown, "curve": loss_curve(run)}


def loss_curve(run: str) -> dict | None:
    """Training loss by step, of long runs the means of several steps in a row, and the loss on held-out data."""
    lines = read_metrics(run)
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    if not steps:
        return None
    width = math.ceil(len(steps) / MOST_POINTS)
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    means = [[group[-1][0], round(sum(loss for _, loss in group) / len(group), 5)] for group in groups]
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
        """What a reader should know of these pictures."""
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
    shown = {"desc": "report", "unit": " pictures", "dynamic_ncols": True, "leave": False, "disable": not items}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "draw") as pool:  # decoding and encoding run side by side
        yield from tqdm(pool.map(lambda item: draw_picture(item, budget, most_bytes), items), total=len(items), **shown)


def draw_picture(item: dict, budget: Budget, most_bytes: int) -> dict:
    """One image, or frames of one video, as WebP of at most about `most_bytes`; what cannot be read, as the reason."""
    kind = item["type"]
    try:
        (there,) = fetch.localise([item], FetchSettings())
        image, caption = draw_image(there) if kind == "image" else draw_video(there, budget)
        small, pixels = compress(image, most_bytes)
    except Exception as error:  # a picture is an illustration: whatever is wrong with it, the answers can be shown
        return {"type": kind, "problem": shortened(plain(str(error) or type(error).__name__), 200)}
    facts = {"type": kind, "caption": caption, "width": small[0], "height": small[1], "pixels": pixels}
    return {**facts, "reduced": True} if max(small) < min(SIDES[0], max(image.size)) else facts


def draw_image(item: dict) -> tuple[Image.Image, str]:
    """The image as the model saw it, upright and on white, and its size in words."""
    image = vision.open_image(item["image"])
    pixels = vision.to_tensor(image, item["image"])
    height, width = pixels.shape[1:]
    return as_image(pixels, SIDES[0]), f"{width} × {height}"


def draw_video(item: dict, budget: Budget) -> tuple[Image.Image, str]:
    """Frames of those that the model saw, side by side in rows, and which they are in words."""
    with vision.open_video(item) as video:
        seen = sorted({*vision.plan_video(item, video, budget)[0]})
        count = min(FRAMES, len(seen))
        chosen = [seen[round(i * (len(seen) - 1) / max(1, count - 1))] for i in range(count)]
        frames = [as_image(frame, SIDES[0] // 2) for frame in video.frames_at(chosen)]
        seconds = [index / video.average_fps for index in (chosen[0], chosen[-1])]
    width, height = frames[0].size
    across = min(range(1, count + 1), key=lambda n: abs(math.log(width * n / (height * math.ceil(count / n)) / 1.4)))
    sheet = Image.new("RGB", (across * (width + 2) - 2, math.ceil(count / across) * (height + 2) - 2), "white")
    for number, frame in enumerate(frames):
        sheet.paste(frame.resize((width, height)), (number % across * (width + 2), number // across * (height + 2)))
    when = "" if isinstance(item["video"], list) else f", {seconds[0]:.1f} to {seconds[1]:.1f} s"
    share_shown = f"all {count}" if count == len(seen) else f"{count} of the {len(seen)}"
    return sheet, f"{share_shown} frames that the model saw{when}"


def as_image(pixels, side: int) -> Image.Image:
    """uint8 (3, H, W) as an image whose longer side has at most `side` pixels."""
    height, width = pixels.shape[1:]
    if (scale := side / max(height, width)) < 1:
        pixels = vision.resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))
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
    """Media with the same key look the same: of an image the path says it all, of a video its other keys count, too."""
    return item["image"] if item["type"] == "image" else json.dumps(item, sort_keys=True)


def name_of(item: dict) -> str:
    """A medium as messages show it: no secrets of a URL, and nothing of a folder that only this machine has."""
    value = item[item["type"]]
    paths = value if isinstance(value, list) else [value]
    shown = plain(fetch.printable(paths[0]))
    return f"{shown} and {len(paths) - 1} more frames" if len(paths) > 1 else shown


def plain(value):
    """Paths below the current folder, alone or in a text, as a user would type them there."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.replace(os.getcwd() + os.sep, "") if isinstance(value, str) else value


# ---- the page -------------------------------------------------------------------------------------------------------


def as_json(value) -> str:
    """JSON that can stand in a page: no text in it can end the element that holds it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def write_page(output: Path, facts: dict, pixels: list[bytes]) -> Path:
    """Fill the template; complete or absent."""
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
        for i in range(0, len(pixels), PICTURES_PER_BLOCK):
            lines = "\n".join(base64.b64encode(one).decode() for one in pixels[i : i + PICTURES_PER_BLOCK])
            file.write(f'<script type="text/plain" class="pictures">{lines}</script>\n')
        file.write(tail)
    return output


def parser() -> argparse.ArgumentParser:
    made = command_parser("report", __doc__)
    made.add_argument("files", nargs="+", type=Path, help="files of answers, the one to judge last")
    made.add_argument("--run", help="the run directory whose loss curve and settings are shown")
    made.add_argument("--metrics", nargs="+", choices=tuple(METRICS), metavar="METRIC",
                      help=f"{', '.join(METRICS)}; default: what the run was evaluated by")  # fmt: skip
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
    written = write_report(files, output, metrics, run)
    print(f"report: {relative(written)} ({written.stat().st_size / 1e6:.1f} MB)")
