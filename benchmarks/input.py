"""How fast does a file become pixels ready for the trainer, against qwen-vl-utils and transformers' processor?

    python benchmarks/input.py
    python benchmarks/input.py --photos FILE ... --footage FILE ... --out benchmarks/results/input.json

All of it on one thread of one core, from opening the file on. Ours is what a data worker does, `util.vision.load`:
uint8 patches. Theirs is `process_vision_info` of qwen-vl-utils, with each video backend that works, and the image or
video processor of transformers: float32 `pixel_values` (the text and its tokens are left out). Both give the same
grid. The videos are those of benchmarks/video.py, the photos are drawn here and saved as JPEG; contenders alternate.
"""
# ruff: noqa: E402

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# qwen-vl-utils would start eight threads in torchcodec.
os.environ["TORCHCODEC_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info, vision_process
from transformers import AutoProcessor

from benchmarks.report import origin, write_result
from benchmarks.video import (
    FULL,
    QUICK,
    find_contenders,
    make_short_videos,
    measure,
    milliseconds,
    natural_texture,
    print_targets,
    say,
    say_ratios,
    speed_target,
    target,
    times_as_fast,
    use_one_core,
)
from util.command_line import run_command
from util.family import FAMILIES, QWEN2_VL
from util.log import versions
from util.tiny_model import make_tiny_model
from util.vision import Budget, Medium, load, read_grid

BACKENDS = ("torchcodec", "decord", "torchvision")  # of qwen-vl-utils, for videos
VIDEO_TARGET, VIDEO_BYTES_TARGET, IMAGE_BYTES_TARGET = 2.8, 3.9, 8
PHOTO_TARGETS = {1: 1.3, 12: 2.5}  # megapixels: times as fast
PHOTO_SIZES = {1: (864, 1152), 12: (3000, 4000)}  # height, width
QUICK_PHOTO_SIZES = {1: (216, 288), 12: (480, 640)}
PATCH = FAMILIES[QWEN2_VL].patch
UNLIMITED_TOKENS = 10**6  # leaves the budget of qwen-vl-utils in force: 768 tokens a frame


# ---- what is read ----------------------------------------------------------------------------------------------------


def make_photos(directory: Path, sizes: dict[int, tuple[int, int]]) -> dict[int, Path]:
    """Drawn photos by megapixels: coloured texture with sensor noise, JPEG of quality 90 as cameras save it (4:2:0)."""
    generator, photos = np.random.default_rng(0), {}
    for megapixels, (height, width) in sizes.items():
        path = photos[megapixels] = directory / f"photo_{width}x{height}.jpg"
        if not path.exists():
            say(f"drawing a photo of {height * width / 1e6:.1f} megapixels")
            grey = natural_texture(generator, height, width, 45, 1.3).astype(np.float32)
            tint = [natural_texture(generator, height, width, 20, 1.6) - np.float32(128) for _ in range(3)]
            noise = generator.normal(0, 3, (height, width, 3)).astype(np.float32)
            pixels = np.stack([grey + colour for colour in tint], axis=-1) + noise
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90, subsampling="4:2:0")
    return photos


# ---- theirs ----------------------------------------------------------------------------------------------------------


def theirs(item: dict, processor, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixel_values float32, grid_thw), by qwen-vl-utils and the processor."""
    use_backend(backend)
    images, videos, keywords = process_vision_info([{"role": "user", "content": [item]}], return_video_kwargs=True)
    if videos is None:
        made = processor.image_processor(images=images, return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]
    # The frames are sampled and resized; the cap per frame is of no use any more, and unset it warns.
    keywords = {"do_sample_frames": keywords["do_sample_frames"], "cap_pixels_per_frame": False}
    made = processor.video_processor(videos=videos, return_tensors="pt", **keywords)
    return made["pixel_values_videos"], made["video_grid_thw"]


def use_backend(name: str | None) -> None:
    """qwen-vl-utils chooses once and keeps its choice; choose for it."""
    vision_process.FORCE_QWENVL_VIDEO_READER = name
    vision_process.get_video_reader_backend = lambda: name


def find_backends(path: Path) -> dict[str, str | None]:
    """What each video backend of qwen-vl-utils answers: None where it reads a video, else the reason why not."""
    answers = {}
    for name in BACKENDS:
        try:
            vision_process.VIDEO_READER_BACKENDS[name]({"video": str(path), "nframes": 2})
            answers[name] = None
        except Exception as error:  # whatever a backend that is absent or broken raises
            answers[name] = type(error).__name__
    return answers


def at_size_of_ours(item: dict, budget: Budget) -> dict:
    """The item with our size spelled out, so that the other side cannot choose another one."""
    grid = read_grid(item, budget)
    return {**item, "resized_height": grid.h * PATCH, "resized_width": grid.w * PATCH}


def difference(medium: Medium, pixel_values: torch.Tensor, processor) -> dict[str, float]:
    """How far the two sides' pixels are apart, in levels of 255, once theirs are brought back to levels."""
    settings = processor.video_processor if medium.is_video else processor.image_processor
    per_channel = (1, 3, 1)
    mean, deviation = (torch.tensor(v).view(per_channel) for v in (settings.image_mean, settings.image_std))
    levels = (pixel_values.view(len(pixel_values), 3, -1) * deviation + mean) * 255
    ours = medium.patches.view(len(medium.patches), 3, -1)
    if not medium.is_video:  # the processor writes an image as two equal frames
        levels = levels[..., : PATCH**2]
    gap = (levels - ours).abs()
    return {"mean": round(gap.mean().item(), 4), "largest": round(gap.max().item(), 2)}


# ---- the run ---------------------------------------------------------------------------------------------------------


def measure_item(name: str, item: dict, budget: Budget, processor, backends: list[str], repetitions: int) -> dict:
    """One image or video, by ours and by each of theirs."""
    say(name)
    their_item = at_size_of_ours(item, budget)
    is_video = item["type"] == "video"
    calls: dict[str, Callable] = {"ours": lambda: load(item, budget)}
    for backend in backends if is_video else [None]:
        label = f"theirs, {backend}" if backend else "theirs"
        calls[label] = lambda backend=backend: theirs(their_item, processor, backend)

    medium, differences, their_bytes = calls["ours"](), {}, None
    for label, call in calls.items():
        if label == "ours":
            continue
        pixel_values, grid = call()
        assert grid.tolist() == [list(medium.grid[:3])], f"{name}: grid {medium.grid}, theirs {grid.tolist()}"
        differences[label] = difference(medium, pixel_values, processor)
        their_bytes = pixel_values.nbytes
        del pixel_values
    seconds = measure(calls, repetitions)
    ratio = times_as_fast(seconds, "theirs")
    say_ratios({"theirs": ratio})
    return {
        "name": name,
        "grid": list(medium.grid[:3]),
        "tokens": medium.grid.tokens,
        "milliseconds": milliseconds(seconds),
        "times_as_fast": ratio,
        "bytes": {"ours": medium.patches.nbytes, "theirs": their_bytes},
        "fewer_bytes": round(their_bytes / medium.patches.nbytes, 3) if their_bytes else None,
        "difference": differences,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--photos", type=Path, nargs="+", default=[], help="real photos to measure on as well")
    parser.add_argument("--footage", type=Path, nargs="+", default=[], help="real videos to measure on as well")
    parser.add_argument("--work_dir", type=Path, help="keep what is made here (default: a temporary folder)")
    parser.add_argument("--repetitions", type=int, help="of each contender")
    parser.add_argument("--quick", action="store_true", help="small and few: does it run at all")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    own = parse(arguments)
    scale = QUICK if own.quick else FULL
    repetitions = own.repetitions or scale.repetitions
    is_bound = use_one_core()
    _, packages = find_contenders()
    processor = AutoProcessor.from_pretrained(make_tiny_model())
    budget = Budget()
    with tempfile.TemporaryDirectory() as temporary:
        directory = own.work_dir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        videos = make_short_videos(directory, own.footage, scale)
        answers = find_backends(next(iter(videos.values())))
        backends = [name for name, reason in answers.items() if reason is None]
        rows, targets = [], []
        for (content, interval), path in videos.items():
            item = {"type": "video", "video": str(path), "nframes": scale.wanted[-1]}
            name = f"video, {scale.wanted[-1]} frames, key every {interval}, {content}"
            rows.append(measure_item(name, item, budget, processor, backends, repetitions))
            targets += make_targets(rows[-1], VIDEO_TARGET, VIDEO_BYTES_TARGET)
        # Without our cap of 16,384 tokens a video, frames are as large as qwen-vl-utils makes them by itself.
        wide = Budget(video_max_tokens=UNLIMITED_TOKENS)
        item = {"type": "video", "video": str(videos["drawn", scale.intervals[-1]]), "nframes": scale.wanted[-1]}
        name = f"video, {scale.wanted[-1]} frames, key every {scale.intervals[-1]}, drawn, uncapped"
        rows.append(measure_item(name, item, wide, processor, backends, repetitions))
        for megapixels, path in make_photos(directory, QUICK_PHOTO_SIZES if own.quick else PHOTO_SIZES).items():
            item = {"type": "image", "image": str(path)}
            rows.append(measure_item(f"photo, {megapixels} MP, drawn", item, budget, processor, [], 4 * repetitions))
            targets += make_targets(rows[-1], PHOTO_TARGETS[megapixels], IMAGE_BYTES_TARGET)
        for path in own.photos:
            with Image.open(path) as photo:
                name = f"photo, {math.prod(photo.size) / 1e6:.1f} MP, real"
            item = {"type": "image", "image": str(path)}
            rows.append(measure_item(name, item, budget, processor, [], 4 * repetitions))

    result = {
        **origin("input.py", arguments, [*own.photos, *own.footage]),
        "versions": versions(),
        "contenders": packages,
        "backends_that_fail": {name: reason for name, reason in answers.items() if reason},
        "processors": [type(processor.image_processor).__name__, type(processor.video_processor).__name__],
        "threads": torch.get_num_threads(),
        "bound_to_one_core": is_bound,
        "repetitions": repetitions,
        "rows": rows,
        "targets": targets,
    }
    print_table(result)
    write_result(result, own.out)


def make_targets(row: dict, speed: float, fewer_bytes: float) -> list[dict]:
    return [
        speed_target(f"{row['name']}: times as fast", row["times_as_fast"], speed),
        target(f"{row['name']}: times fewer bytes", row["fewer_bytes"], fewer_bytes),
    ]


def print_table(result: dict) -> None:
    print(f"{result['device']}, one thread; median in ms, from opening the file to patches")
    for name, reason in result["backends_that_fail"].items():
        print(f"qwen-vl-utils cannot read videos with {name} here ({reason}): left out")
    print(f"{'':52}{'grid':>15}{'ours':>8}{'theirs':>9}{'ratio':>8}{'CPU time':>10}{'difference':>12}  best of theirs")
    for row in result["rows"]:
        ratio, grid = row["times_as_fast"], "x".join(map(str, row["grid"]))
        line = f"{row['name']:52}{grid:>15}{row['milliseconds']['ours']['median']:>8,.0f}"
        if ratio:
            best = ratio["against"]
            median, gap = row["milliseconds"][best]["median"], row["difference"][best]["mean"]
            line += f"{median:>9,.0f}{ratio['median']:>8.2f}{ratio['cpu_median']:>10.2f}{gap:>12.2f}  {best}"
        print(line)
    print("difference: mean of a pixel, in levels of 255")
    print_targets(result["targets"])


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
