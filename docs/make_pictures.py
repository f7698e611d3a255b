"""The pictures of the README, made from a finished demonstration (`./finetune.sh` on a machine without a GPU).

    python docs/make_pictures.py train_output/demonstration --report test_output/report.html

Writes packed_batch.png, sample.png, loss.png and report.png into docs/pictures/. The report is opened in a Chromium,
which must be on PATH together with chromedriver (and `pip install selenium`).
"""

import argparse
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import font_manager  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from util.collator import Batch, Collator  # noqa: E402
from util.command_line import UserError, run_command  # noqa: E402
from util.dataset import Examples, Samples  # noqa: E402
from util.model import load_processor  # noqa: E402
from util.vision import Budget  # noqa: E402

matplotlib.use("Agg")  # draws into files; no window is needed
from matplotlib import pyplot  # noqa: E402

MOST_BYTES = 100_000  # of a picture, so that a clone stays small
COLOURS = 64  # in the palette of a picture; drawings need no more
WIDTH = 1200  # pixels; a README shows it at about 850

TEXT, VISUAL, SUPERVISED, PADDING = "#c3c8d1", "#5b8def", "#2da44e", "#f7e3e3"
INK, SOFT = "#1f2328", "#656d76"  # of letters

SAMPLE = ("train_data/data.json", 17)  # a conversation of several turns about a picture
REPORT_SIZE = (1200, 760)


def main() -> None:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run directory of a finished demonstration")
    parser.add_argument("--report", type=Path, default=ROOT / "test_output" / "report.html", help="its report")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder to write the pictures to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(packed_batch(arguments.run), arguments.out / "packed_batch.png")
    save(coloured_sample(arguments.run), arguments.out / "sample.png")
    save(loss_curve(arguments.run), arguments.out / "loss.png")
    save(report(arguments.report), arguments.out / "report.png")


def save(picture: Image.Image, file: Path) -> None:
    """Write a picture with a small palette. Raises UserError where it is too large to be kept in a repository."""
    small = picture.convert("RGB").quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(file, optimize=True)
    size = file.stat().st_size
    print(f"{file}: {picture.width}x{picture.height}, {size:,} bytes")
    if size > MOST_BYTES:
        raise UserError(f"{file} has {size:,} bytes, above {MOST_BYTES:,}; make it smaller")


def font(size: int, name: str = "DejaVu Sans", weight: str = "normal") -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings along, so that every machine draws the same letters."""
    properties = font_manager.FontProperties(family=name, weight=weight)
    return ImageFont.truetype(font_manager.findfont(properties), size)


# ---- a packed batch -------------------------------------------------------------------------------------------------

CELL_WIDTH, CELL_HEIGHT, LINE_GAP = 7, 8, 3  # pixels: a token, and what lies between two lines
MARGIN, HEADING_HEIGHT, LEGEND_HEIGHT = 24, 62, 56


def packed_batch(run: Path) -> Image.Image:
    """The first global batch of a run, token by token: packed as it was trained, and as padding would have it."""
    batch = first_batch(run)
    samples = kinds_of_tokens(batch)
    longest = max(len(sample) for sample in samples)
    padded_height = len(samples) * (CELL_HEIGHT + LINE_GAP)
    picture = Image.new("RGB", (WIDTH, MARGIN + HEADING_HEIGHT + padded_height + LEGEND_HEIGHT), "white")
    pen = ImageDraw.Draw(picture)

    tokens = len(batch.input_ids)
    wasted = 1 - tokens / (longest * len(samples))
    top = MARGIN + HEADING_HEIGHT
    right = WIDTH - MARGIN - longest * CELL_WIDTH  # both panels are as wide, so that their heights can be compared
    write_heading(pen, MARGIN, f"Packed: {len(samples)} samples in one row", f"{tokens:,} tokens, no padding")
    padded = f"{longest * len(samples):,} tokens, {wasted:.0%} of them padding"
    write_heading(pen, right, f"Padded: {len(samples)} rows", padded)
    draw_packed(pen, samples, MARGIN, top, longest)
    draw_padded(pen, samples, right, top, longest)
    draw_legend(pen, MARGIN, picture.height - 38)
    return picture


def first_batch(run: Path) -> Batch:
    """The samples of a run's first optimizer step as one packed batch."""
    settings = json.loads((run / "training_config.json").read_text(encoding="utf-8"))
    processor = load_processor(str(run))
    examples = Examples(settings["data"], processor)
    samples = Samples(examples, processor, Budget.of(settings, "qwen2_vl"))
    numbers = examples.order(settings["seed"], epoch=0)[: settings["global_batch_size"]]
    return Collator()([samples[number] for number in numbers.tolist()])


def kinds_of_tokens(batch: Batch) -> list[list[str]]:
    """The colour of each token, sample by sample."""
    colours = np.full(len(batch.input_ids), TEXT)
    colours[batch.visual_index] = VISUAL
    colours[batch.supervised_index + 1] = SUPERVISED  # an index is that of the token before, which predicts it
    ends = torch.tensor(batch.segments.lengths).cumsum(0)
    return [part.tolist() for part in np.split(colours, ends[:-1])]


def write_heading(pen: ImageDraw.ImageDraw, left: int, title: str, subtitle: str) -> None:
    pen.text((left, MARGIN - 8), title, font=font(20, weight="bold"), fill=INK)
    pen.text((left, MARGIN + 20), subtitle, font=font(17), fill=SOFT)


def draw_packed(pen: ImageDraw.ImageDraw, samples: list[list[str]], left: int, top: int, across: int) -> None:
    """One row of all samples, broken into lines of `across` tokens; a dark line stands where a sample begins."""
    token = 0
    for sample in samples:
        for place, colour in enumerate(sample):
            line, column = divmod(token, across)
            x, y = left + column * CELL_WIDTH, top + line * (CELL_HEIGHT + LINE_GAP)
            draw_token(pen, x, y, colour)
            if place == 0:
                pen.rectangle((x - 2, y - 1, x - 1, y + CELL_HEIGHT), fill=INK)
            token += 1


def draw_padded(pen: ImageDraw.ImageDraw, samples: list[list[str]], left: int, top: int, longest: int) -> None:
    """A row for each sample, filled up to the longest."""
    for number, sample in enumerate(samples):
        y = top + number * (CELL_HEIGHT + LINE_GAP)
        padded = sample + [PADDING] * (longest - len(sample))
        for place, colour in enumerate(padded):
            draw_token(pen, left + place * CELL_WIDTH, y, colour)


def draw_token(pen: ImageDraw.ImageDraw, x: int, y: int, colour: str) -> None:
    pen.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 1), fill=colour)


def draw_legend(pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
    labels = {
        TEXT: "text of the template and the question",
        VISUAL: "image and video tokens",
        SUPERVISED: "supervised: what the assistant says",
        PADDING: "padding",
    }
    for colour, label in labels.items():
        pen.rectangle((left, top + 3, left + 14, top + 17), fill=colour, outline=SOFT if colour == PADDING else None)
        pen.text((left + 22, top), label, font=font(16), fill=INK)
        left += 22 + int(pen.textlength(label, font=font(16))) + 36


# ---- the coloured sample --------------------------------------------------------------------------------------------

COLOUR_CODE = re.compile(r"\033\[(\d+)m")
TERMINAL_COLOURS = {"32": "#1a7f37", "90": "#6e7781", "0": INK}  # green, grey and none, on a light background


def coloured_sample(run: Path) -> Image.Image:
    """What `python -m util show` prints in a terminal."""
    data, number = SAMPLE
    command = ["-m", "util", "show", data, "--sample", str(number), "--model", str(run.resolve())]
    lines = printed_in_a_terminal([sys.executable, *command]).rstrip().split("\n")
    lines = [f"$ python -m util show {data} --sample {number}", "", *lines]
    letters, height = font(17, "DejaVu Sans Mono"), 25
    longest = max(letters.getlength(COLOUR_CODE.sub("", line)) for line in lines)
    picture = Image.new("RGB", (int(longest) + 2 * MARGIN, len(lines) * height + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    colour = INK
    for row, line in enumerate(lines):
        x = MARGIN
        for place, part in enumerate(COLOUR_CODE.split(line)):
            if place % 2:  # the number of a colour, which stands until the next one
                colour = TERMINAL_COLOURS[part]
                continue
            pen.text((x, MARGIN + row * height), part, font=letters, fill=colour)
            x += pen.textlength(part, font=letters)
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline="#d0d7de")
    return picture


def printed_in_a_terminal(command: list[str]) -> str:
    """What a command prints where its output is a terminal: colours are written only there."""
    ours, its = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=its, env=environment)
    os.close(its)
    printed = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux says so where the other end is closed
            break
        if not piece:
            break
        printed += piece
    os.close(ours)
    if process.wait() != 0:
        raise UserError(f"{' '.join(command)} failed")
    return printed.decode().replace("\r\n", "\n")


# ---- the loss curve -------------------------------------------------------------------------------------------------

SMOOTHED_OVER = 20  # steps


def loss_curve(run: Path) -> Image.Image:
    """The loss of each step in `metrics.jsonl`, and its running mean, on a logarithmic axis."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    steps = np.arange(1, len(losses) + 1)
    mean = np.convolve(losses, np.ones(SMOOTHED_OVER) / SMOOTHED_OVER, mode="valid")
    figure, axes = pyplot.subplots(figsize=(WIDTH / 100, 3.8), dpi=100)
    axes.plot(steps, losses, color="#b6cdf9", linewidth=1, label="each step")
    axes.plot(steps[SMOOTHED_OVER - 1 :], mean, color="#2f6ae0", linewidth=2, label=f"mean of {SMOOTHED_OVER} steps")
    axes.set_yscale("log")
    axes.set_xlim(0, len(losses))
    axes.set_xlabel("optimizer step", fontsize=13)
    axes.set_ylabel("loss per supervised token", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=13)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)
    return Image.open(drawn)


# ---- the report -----------------------------------------------------------------------------------------------------


def report(page: Path) -> Image.Image:
    """The top of a report, as a browser shows it. Raises UserError where there is no browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        raise UserError("the report needs a Chromium and its chromedriver on PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    width, height = REPORT_SIZE
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height + 200}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get(page.resolve().as_uri())
        shot = browser.get_screenshot_as_png()
    finally:
        browser.quit()
    return Image.open(io.BytesIO(shot)).crop((0, 0, width, height))


if __name__ == "__main__":
    run_command(main)
