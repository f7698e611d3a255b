"""See one sample as the model sees it: `python -m util show train_data/data.json --sample 3`.

Supervised text is green (and marked with a bar), everything else grey; visual tokens are collapsed to
`<image 24x36>`, the grid in patches; each piece begins with its position (temporal, height, width).
"""

import argparse
import os
import sys

from util.command_line import UserError, command_parser
from util.config import Config


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
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = (("\033[32m" if supervised else "\033[90m"), "\033[0m") if colour else ("", "")
    bar = "┃" if supervised else " "
    head = f"{' '.join(map(str, position)):>14}  "
    shown = text.replace("\n", "⏎\n").removesuffix("\n").split("\n")
    return "\n".join(f"{head if not i else ' ' * len(head)}{bar} {on}{line}{off}" for i, line in enumerate(shown))


def parser() -> argparse.ArgumentParser:
    made = command_parser("show", __doc__)
    made.add_argument("data", help="a .json or .jsonl data file")
    made.add_argument("--sample", type=int, default=0, help="its number, counted from 0")
    made.add_argument("--model", default="tiny", help="whose processor: checkpoint directory, hub name or tiny")
    for name in ("min_pixels", "max_pixels", "video_max_frames", "video_max_tokens"):
        made.add_argument(f"--{name}", type=int, help="as in finetune.py")
    made.add_argument("--video_fps", type=float, help="as in finetune.py")
    return made


def main(arguments: list[str]) -> None:
    show({name: value for name, value in vars(parser().parse_args(arguments)).items() if value is not None})


def show(arguments: dict) -> None:
    import torch

    from util.dataset import Samples, load_examples
    from util.model import find_model, load_processor
    from util.vision import Budget

    data, number = arguments.pop("data"), arguments.pop("sample")
    processor = load_processor(find_model(arguments.pop("model"), torch.device("cpu")))
    samples = Samples(load_examples([data], processor), processor, Budget.of(Config(**arguments)))
    if not 0 <= number < len(samples):
        raise UserError(f"--sample {number}: {data} has samples 0 to {len(samples) - 1}")
    print(describe(samples, number))
