"""See samples as the model sees them: `python -m util show train_data/data.json --sample 3`.

Or those of one optimizer step of a run: `python -m util show --run train_output/latest --step 812`, with `--losses`
each one's own loss and its share of the step's gradient.

Supervised text is green (and marked with a bar), everything else grey; visual tokens are collapsed to
`<image 24x36>`, the grid in patches; each piece begins with its position (temporal, height, width).
"""

import argparse
import os
import sys
from pathlib import Path

from util.command_line import UserError, command_parser
from util.config import Config

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def describe(samples, index: int) -> str:
    """Several lines about sample `index` of a `dataset.Samples`: counts, then its pieces."""
    from util.collator import expand, mrope_positions

    sample = samples[index]
    grids = [medium.grid for medium in sample.media]
    ids, supervised, spans = expand(sample.encoded, grids)
    positions = mrope_positions(len(ids), spans, grids)
    media_at = {begin: (end, medium) for (begin, end), medium in zip(spans, sample.media, strict=True)}
    visual, patches = sum(grid.tokens for grid in grids), sum(grid.patches for grid in grids)
    lines = [
        f"{sample.where}: {len(ids):,} tokens = {len(ids) - visual:,} text + {visual:,} visual "
        f"({patches:,} patches); {int(supervised.sum()):,} supervised"
    ]
    token = 0
    while token < len(ids):
        if token in media_at:
            end, medium = media_at[token]
            t, h, w = medium.grid[:3]
            text = f"<video {t}x{h}x{w}>" if medium.is_video else f"<image {h}x{w}>"
        else:
            end = token + 1
            while end < len(ids) and end not in media_at and supervised[end] == supervised[token]:
                end += 1
            text = samples.processor.tokenizer.decode(ids[token:end])
        lines.append(one_piece(text, bool(supervised[token]), positions[:, token].tolist()))
        token = end
    return "\n".join(lines)


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


def one_piece(text: str, supervised: bool, position: list[int]) -> str:
    """One piece, its position before it, its further lines indented under the first."""
    on, off = "", ""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        on, off = GREEN if supervised else GREY, PLAIN
    bar = "┃" if supervised else " "
    head = f"{' '.join(map(str, position)):>14}  "
    lines = []
    for line in text.replace("\n", "⏎\n").removesuffix("\n").split("\n"):
        lines.append(f"{head}{bar} {on}{line}{off}")
        head = " " * len(head)
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = command_parser("show", __doc__)
    made.add_argument("data", nargs="?", help="a .json or .jsonl data file")
    made.add_argument("--sample", type=int, default=0, help="its number, counted from 0")
    made.add_argument("--model", default="tiny", help="whose processor: checkpoint directory, hub name or tiny")
    for name in ("min_pixels", "max_pixels", "video_max_frames", "video_max_tokens"):
        made.add_argument(f"--{name}", type=int, help="as in finetune.py")
    made.add_argument("--video_fps", type=float, help="as in finetune.py")
    made.add_argument("--run", type=Path, help="a run directory, of which a step is shown instead of a data file")
    made.add_argument("--step", type=int, help="the optimizer step of --run whose samples are shown")
    made.add_argument("--losses", action="store_true", help="with --run: each sample's own loss and share of the "
                      "gradient, which takes two passes over the step")  # fmt: skip
    made.add_argument("--device", default="auto", help="of --losses: cuda, cuda:1, cpu")
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    if given.run or given.step is not None:
        if given.data or not given.run or given.step is None:
            raise UserError("name a data file, or a step by --run RUN --step NUMBER")
        show_step(given.run, given.step, given.losses, given.device)
    elif given.data:
        show_sample(given)
    else:
        raise UserError("name a data file, or a step by --run RUN --step NUMBER")


def show_sample(given: argparse.Namespace) -> None:
    """Print one sample of a data file."""
    import torch

    from util.dataset import Samples, load_examples
    from util.model import find_model, load_processor
    from util.vision import Budget

    names = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "video_max_tokens")
    limits = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    processor = load_processor(find_model(given.model, torch.device("cpu")))
    samples = Samples(load_examples([given.data], processor), processor, Budget.of(Config(**limits)))
    if not 0 <= given.sample < len(samples):
        raise UserError(f"--sample {given.sample}: {given.data} has samples 0 to {len(samples) - 1}")
    print(describe(samples, given.sample))


def show_step(run: Path, number: int, with_losses: bool, device: str) -> None:
    """Print the samples of one step of a run, with each one's loss and share of the gradient where asked for."""
    from util.results.step import RunStep

    step = RunStep(run, number)
    print(step.in_words())
    lines = [""] * len(step.sample_numbers)
    if with_losses:
        shares, whole = step.shares(device)
        weights = step.checkpoint or f"{step.model_path}, with which the run began"
        print(f"with the weights of {weights}: gradient norm {whole:.4f}")
        lines = [
            f"loss {own.loss:.4f}, gradient norm {own.grad_norm:.4f}, {own.share:.1%} of the step's gradient\n"
            for own in shares
        ]
    for line, sample in zip(lines, step.sample_numbers, strict=True):
        print(f"\n{line}{describe(step.samples, sample)}")
