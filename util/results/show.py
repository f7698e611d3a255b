"""See samples as the model sees them: `python -m util show train_data/data.json --sample 3`.

Or those of one optimizer step of a run: `python -m util show --run train_output/latest --step 812`, with `--losses`
each one's own loss and its share of the step's gradient, by the weights of the newest checkpoint before the step. With
`--pixels FOLDER` its images and video frames are written as the model sees them.

Supervised text is green (and marked with a bar), everything else grey; an answer that counts less than 1 is yellow, one
that counts more is blue, with its weight at the bar. Visual tokens are collapsed to `<image 24x36>`, the grid in
patches; each piece begins with its position (temporal, height, width).
"""

import argparse
import os
import sys
from pathlib import Path

from util.command_line import UserError, command_parser
from util.config import Config

GREEN, YELLOW, BLUE, GREY, PLAIN = "\033[32m", "\033[33m", "\033[34m", "\033[90m", "\033[0m"


def describe(samples, index: int) -> str:
    """Several lines about sample `index` of a `dataset.Samples`: counts, then its pieces."""
    from util.collator import expand, mrope_positions

    sample = samples[index]
    grids = []
    videos = []  # of each grid whether it is a video's
    for medium in sample.media:
        grids += medium.grid.places
        videos += [medium.is_video] * len(medium.grid.places)
    ids, weights, spans = expand(sample.encoded, grids)
    positions = mrope_positions(len(ids), spans, grids)
    places = zip(spans, grids, videos, strict=True)
    media_at = {begin: (end, grid, is_video) for (begin, end), grid, is_video in places}
    visual, patches = sum(grid.tokens for grid in grids), sum(grid.patches for grid in grids)
    lines = [
        f"{sample.where}: {len(ids):,} tokens = {len(ids) - visual:,} text + {visual:,} visual "
        f"({patches:,} patches); {int((weights > 0).sum()):,} supervised"
    ]
    if sample.encoded.unlearned:
        lines[0] += f", {sample.encoded.unlearned:,} of answers not learned"
    for item in samples.examples[index].media:
        lines.append(f"{'':>16}  {item['type']}: {media_in_words(item)}")
    token = 0
    while token < len(ids):
        if token in media_at:
            end, grid, is_video = media_at[token]
            text = medium_in_words(grid, is_video)
        else:
            end = token + 1
            while end < len(ids) and end not in media_at and weights[end] == weights[token]:
                end += 1
            text = samples.processor.tokenizer.decode(ids[token:end])
        lines.append(one_piece(text, weights[token].item(), positions[:, token].tolist()))
        token = end
    return "\n".join(lines)


def medium_in_words(grid, is_video: bool) -> str:
    """`<image 24x36>`, `<video 4x24x36>`, and of a video whose time axis goes on in other steps than 1 their size."""
    if not is_video:
        return f"<image {grid.h}x{grid.w}>"
    step = "" if grid.step == 1 else f", {grid.step:.2f} steps of time a pair of frames"
    return f"<video {grid.t}x{grid.h}x{grid.w}{step}>"


def media_in_words(item: dict) -> str:
    """The path of an image or video, or of the first of a list of frames."""
    from util.data.fetch import printable

    value = item[item["type"]]
    if isinstance(value, list):
        return f"{printable(value[0])} and {len(value) - 1} more frames"
    return printable(value)


def describe_first(samples, on_bad_sample: str) -> str:
    """`describe` of the first sample that can be shown. Raises DataError; with "skip", where there is none."""
    from util.data.lines import DataError

    for index in range(len(samples)):
        if index not in samples.examples.left_out:
            try:
                return describe(samples, index)
            except DataError:  # its pixels: headers were read
                if on_bad_sample == "stop":
                    raise
    raise DataError("no sample can be read")


def one_piece(text: str, weight: float, position: list[int]) -> str:
    """One piece, its position before it, its further lines indented under the first."""
    on, off = "", ""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        on, off = colour_of(weight), PLAIN
    bar = "┃" if weight else " "
    if weight not in (0.0, 1.0):
        bar += f" {weight:g} "
    head = f"{' '.join(map(str, position)):>14}  "
    lines = []
    for line in text.replace("\n", "⏎\n").removesuffix("\n").split("\n"):
        lines.append(f"{head}{bar} {on}{line}{off}")
        head = " " * len(head)
    return "\n".join(lines)


def colour_of(weight: float) -> str:
    """Of a piece that counts as much in the loss."""
    if weight == 0:
        return GREY
    if weight == 1:
        return GREEN
    return YELLOW if weight < 1 else BLUE


SIZES = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "video_max_tokens")


def parser() -> argparse.ArgumentParser:
    made = command_parser("show", __doc__)
    made.add_argument("data", nargs="?", help="a .json or .jsonl data file")
    made.add_argument("--sample", type=int, help="its number, counted from 0; default: 0")
    made.add_argument("--model", help="whose processor: checkpoint directory, hub name or a tiny model; default: tiny")
    for name in SIZES:
        made.add_argument(f"--{name}", type=float if name == "video_fps" else int, help="as in finetune.py")
    made.add_argument("--new_tokens", metavar="FILE", help="as in finetune.py")
    made.add_argument("--run", type=Path, help="a run directory, of which a step is shown instead of a data file")
    made.add_argument("--step", type=int, help="the optimizer step of --run whose samples are shown")
    made.add_argument("--losses", action="store_true", help="with --run: each sample's own loss and share of the "
                      "gradient, largest first, which takes two passes over the step")  # fmt: skip
    made.add_argument("--device", help="of --losses: cuda, cuda:1, cpu; default: the GPU where there is one")
    made.add_argument("--pixels", type=Path, metavar="FOLDER", help="write images and video frames as the model sees "
                      "them into this folder")  # fmt: skip
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    of_a_step = {"--run": given.run, "--step": given.step}
    of_a_file = {"a data file": given.data, "--sample": given.sample, "--model": given.model}
    of_a_file["--new_tokens"] = given.new_tokens
    of_a_file |= {f"--{name}": getattr(given, name) for name in SIZES}
    beside = [name for name, value in of_a_file.items() if value is not None]
    if any(value is not None for value in of_a_step.values()):
        if None in of_a_step.values() or beside:
            stray = f" ({beside[0]} has no use with it)" if beside else ""
            raise UserError(f"a step is named by --run RUN --step NUMBER{stray}")
        show_step(given)
    elif given.data is None:
        raise UserError("name a data file, or a step by --run RUN --step NUMBER")
    elif given.losses or given.device:
        raise UserError("--losses and --device go with --run RUN --step NUMBER")
    else:
        show_sample(given)


def show_sample(given: argparse.Namespace) -> None:
    """Print one sample of a data file."""
    import torch

    from util.dataset import Samples, load_examples
    from util.model import find_model, load_processor, model_type_of
    from util.vision import Budget

    limits = {name: getattr(given, name) for name in SIZES if getattr(given, name) is not None}
    config = Config(**limits, new_tokens=given.new_tokens)
    path = find_model(given.model or "tiny", torch.device("cpu"))
    processor = load_processor(path, config)
    samples = Samples(load_examples([given.data], processor), processor, Budget.of(config, model_type_of(path)))
    number = given.sample or 0
    if not 0 <= number < len(samples):
        raise UserError(f"--sample {number}: {given.data} has samples 0 to {len(samples) - 1}")
    print(describe(samples, number))
    if given.pixels:
        write_pixels(samples, number, given.pixels)


def show_step(given: argparse.Namespace) -> None:
    """Print the samples of one step of a run; with `--losses` what each gave to it, the largest share first."""
    from util.data.lines import DataError
    from util.results.step import RunStep

    step = RunStep(given.run, given.step)
    print(step.in_words())
    shares = {}
    if given.losses:
        shares, whole = step.shares(given.device or "auto")
        weights = step.checkpoint or f"{step.model_path}, with which the run began"
        print(f"with the weights of {weights}: gradient norm {whole:.4f}")
    order = sorted(step.sample_numbers, key=lambda number: -shares[number].share if number in shares else 0.0)
    for number in order:
        print()
        if own := shares.get(number):
            print(f"loss {own.loss:.4f}, gradient norm {own.grad_norm:.4f}, {own.share:.1%} of the step's gradient")
        try:
            print(describe(step.samples, number))
            if given.pixels:
                write_pixels(step.samples, number, given.pixels)
        except DataError as error:  # the step may have gone without it, by --on_bad_sample skip
            print(f"not read: {error}")


def write_pixels(samples, number: int, folder: Path) -> None:
    """Write each image and video frame of a sample as the model sees it, `SAMPLE_MEDIUM_FRAME.png`, into a folder."""
    from PIL import Image

    from util.vision import frames_of

    folder.mkdir(parents=True, exist_ok=True)
    for place, medium in enumerate(samples[number].media):
        frames = frames_of(medium) if medium.is_video else frames_of(medium)[:1]
        for time, frame in enumerate(frames):
            file = folder / f"{number:06d}_{place}_{time:03d}.png"
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file)
            print(f"{'':>16}  written: {file}")
