"""How fast are wanted frames read from a video, against torchcodec, decord and decoding everything; and the memory?

    python benchmarks/video.py
    python benchmarks/video.py --footage FILE ... --work_dir DIRECTORY --out benchmarks/results/video.json

All of it on one thread of one core. The videos are made here: 900 frames of 720p H.264 with x264's usual B frames, one
with a keyframe every 30 frames and one with a keyframe every 250, drawn (a camera that moves over a textured ground,
objects that go their own ways, sensor noise) and, with --footage, from real footage; then 10 minutes and 1 hour of the
drawn one. Every contender opens the file anew in each repetition and ends with RGB frames in memory; contenders
alternate, so that what slows the machine slows all. A contender that cannot be imported is left out, and said to be.
"""
# ruff: noqa: E402

import argparse
import gc
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import av
import numpy as np
import torch

from benchmarks.report import origin, write_result
from util.command_line import UserError, run_command
from util.data.video_reader import VideoReader
from util.vision import Budget, load

RATE = 30  # frames per second of every video made here
MOST_EXTRA_MEMORY = 200  # MB on top of the resized frames
TARGETS = {"torchcodec": 1.1, "decord": 1.35}  # times as fast as these, frames of a short video
LONG_TARGET = 10  # times as fast as decoding everything, 16 frames of the long video


@dataclass(frozen=True)
class Scale:
    """What is made and measured."""

    width: int
    height: int
    frames: int  # of a short video
    intervals: tuple[int, ...]  # frames from one keyframe to the next; the last one also in the long videos
    wanted: tuple[int, ...]  # frames read from a short video; the first one also from the long one
    long_frames: int
    hour_frames: int
    repetitions: int
    preset: str  # of x264


FULL = Scale(1280, 720, 900, (30, 250), (16, 64), 600 * RATE, 3600 * RATE, 5, "medium")
QUICK = Scale(320, 192, 90, (10, 40), (4, 8), 240, 480, 2, "veryfast")


# ---- videos ---------------------------------------------------------------------------------------------------------


def drawn_frames(count: int, width: int, height: int, seed: int = 0) -> Iterator[av.VideoFrame]:
    """A camera that sways over a textured ground, eight objects with paths of their own, noise in every frame.

    The ground is twice as fine as a frame, so that things also move by half pixels, as in footage.
    """
    generator = np.random.default_rng(seed)
    fine_height, fine_width = 2 * height + 1200, 2 * width + 1600
    brightness = natural_texture(generator, fine_height, fine_width, 45, 1.3)
    # Colour has half the resolution (4:2:0).
    blue, red = (natural_texture(generator, fine_height // 2, fine_width // 2, 14, 1.6) for _ in range(2))
    # Random cuts from one large plane of noise: as good as new noise in each frame, and many times faster.
    noise = generator.normal(0, 3, (height + 256, width + 256)).round().astype(np.int16)
    objects = [
        (generator.uniform(0.05, 0.15) * height, *generator.uniform(0, 1, 2), *generator.uniform(0.3, 1.7, 2), *phase)
        for phase in generator.uniform(0, 6.28, (8, 2))
    ]
    shake = np.cumsum(generator.normal(0, 1, (count, 2)), axis=0)
    shake -= np.linspace(0, 1, count)[:, None] * shake[-1]
    for number in range(count):
        seconds = number / RATE
        top = int(560 * (0.5 + 0.45 * np.sin(0.37 * seconds)) + 0.5 * shake[number, 0]) % 1100
        left = int(760 * (1 + 0.9 * np.sin(0.23 * seconds + 1)) + 0.5 * shake[number, 1]) % 1500
        picture = brightness[top : top + 2 * height : 2, left : left + 2 * width : 2].astype(np.int16)
        colours = [
            plane[top // 2 : top // 2 + height : 2, left // 2 : left // 2 + width : 2].copy() for plane in (blue, red)
        ]
        for radius, start_y, start_x, speed_y, speed_x, phase_y, phase_x in objects:
            middle_y = height * (0.5 + 0.4 * np.sin(speed_y * seconds + phase_y))
            middle_x = width * (0.5 + 0.4 * np.sin(speed_x * seconds + phase_x))
            draw_object(picture, colours, brightness, radius, middle_y, middle_x, start_y, start_x)
        row, column = generator.integers(0, 256, 2)
        picture += noise[row : row + height, column : column + width]
        planes = [picture.clip(16, 235).astype(np.uint8), *colours]
        packed = np.concatenate([plane.reshape(-1, width) for plane in planes])
        yield av.VideoFrame.from_ndarray(packed, format="yuv420p")


def draw_object(picture, colours, ground, radius, middle_y, middle_x, start_y, start_x) -> None:
    """Lay a disc, cut from another place of the ground, over the brightness and the colours of a picture."""
    radius = int(radius) // 2 * 2
    top, left = int(middle_y - radius) // 2 * 2, int(middle_x - radius) // 2 * 2
    top, left = max(0, min(top, len(picture) - 2 * radius)), max(0, min(left, picture.shape[1] - 2 * radius))
    rows, columns = np.ogrid[: 2 * radius, : 2 * radius]
    disc = (rows - radius) ** 2 + (columns - radius) ** 2 < radius**2
    cut_y, cut_x = int(start_y * (len(ground) - 2 * radius)), int(start_x * (ground.shape[1] - 2 * radius))
    cut = ground[cut_y : cut_y + 2 * radius, cut_x : cut_x + 2 * radius].astype(np.int16)
    np.copyto(picture[top : top + 2 * radius, left : left + 2 * radius], cut + int(60 * start_y - 30), where=disc)
    for plane, shade in zip(colours, (start_y, start_x), strict=True):
        place = plane[top // 2 : top // 2 + radius, left // 2 : left // 2 + radius]
        np.copyto(place, np.uint8(90 + 76 * shade), where=disc[::2, ::2])


def natural_texture(
    generator: np.random.Generator, height: int, width: int, contrast: float, steepness: float
) -> np.ndarray:
    """Noise whose amplitude falls with frequency, as that of photographs does: uint8 (height, width) around 128.

    It falls as frequency ** -steepness: 1 in sharp photographs, more behind a lens that is not perfect and for colours.
    """
    spectrum = np.fft.rfft2(generator.standard_normal((height, width), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    plane = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / max(height, width)) ** steepness, (height, width))
    return (128 + contrast * plane / plane.std()).clip(16, 235).astype(np.uint8)


def footage_frames(files: list[Path], count: int, width: int, height: int) -> Iterator[av.VideoFrame]:
    """Frames of real footage at the wanted size, one file after the other and over again."""
    for frame in islice(chain.from_iterable(map(decode_file, cycle(files))), count):
        yield frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")


def decode_file(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise UserError(f"{path}: no video in it; --footage takes videos")
        yield from container.decode(stream)


def encode(path: Path, frames: Iterable[av.VideoFrame], interval: int, scale: Scale) -> None:
    """Write frames as H.264, a keyframe exactly every `interval` frames."""
    with complete_or_absent(path) as unfinished, av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = scale.width, scale.height, "yuv420p"
        exactly = f"keyint={interval}:min-keyint={interval}:scenecut=0:log-level=none:threads=1"
        stream.options = {"preset": scale.preset, "x264-params": exactly}
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            frame.pict_type = av.video.frame.PictureType.NONE  # footage brings its own, which x264 would follow
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat(source: Path, target: Path, interval: int, count: int, scale: Scale) -> None:
    """A video of `count` frames: the whole groups of pictures of a short one over and over, its packets copied."""
    period = scale.frames // interval * interval
    with complete_or_absent(target) as unfinished, av.open(str(unfinished), "w") as writing:
        copy = None
        for start in range(0, count, period):
            with av.open(str(source)) as reading:
                stream = reading.streams.video[0]
                copy = copy or writing.add_stream_from_template(stream)
                ticks = int(Fraction(start, RATE) / stream.time_base)
                left = min(period, count - start)
                for packet in islice(reading.demux(stream), left):
                    packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, copy
                    writing.mux(packet)


class complete_or_absent:
    """A path to write to, renamed to the wanted one at the end: an interrupted run leaves no half file behind."""

    def __init__(self, path: Path) -> None:
        self.path, self.unfinished = path, path.with_name(f"unfinished_{path.name}")

    def __enter__(self) -> Path:
        return self.unfinished

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            os.replace(self.unfinished, self.path)


def make_short_videos(directory: Path, footage: list[Path], scale: Scale) -> dict[tuple[str, int], Path]:
    """The short videos by (content, keyframe interval), made where they are not there yet."""
    contents = {"drawn": lambda: drawn_frames(scale.frames, scale.width, scale.height)}
    if footage:
        contents["real footage"] = lambda: footage_frames(footage, scale.frames, scale.width, scale.height)
    videos = {}
    for content, frames in contents.items():
        for interval in scale.intervals:
            name = f"{content}_{scale.width}x{scale.height}_{scale.frames}_{interval}_{scale.preset}.mp4"
            path = videos[content, interval] = directory / name.replace(" ", "_")
            if not path.exists():
                say(f"encoding {scale.frames} frames, {content}, a keyframe every {interval}")
                encode(path, frames(), interval, scale)
    return videos


def make_long_video(directory: Path, source: Path, count: int, scale: Scale) -> Path:
    path = directory / f"drawn_{scale.width}x{scale.height}_{count}_long.mp4"
    if not path.exists():
        say(f"copying packets: {count:,} frames")
        repeat(source, path, scale.intervals[-1], count, scale)
    return path


def say(text: str) -> None:
    """Tell what is being done, apart from the table and the JSON line."""
    print(text, file=sys.stderr, flush=True)


# ---- contenders: (path, indices) -> RGB frames in memory ------------------------------------------------------------


def import_or_none(name: str):
    """An optional module; None where it is absent, or present and unable to load its libraries."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def find_contenders() -> tuple[dict[str, Callable], dict[str, str | None]]:
    """Ways to read frames, and the versions of what they need (None: left out)."""
    torchcodec = import_or_none("torchcodec.decoders") and importlib.import_module("torchcodec")
    decord = import_or_none("decord")
    contenders = {"ours": read_ours}
    if torchcodec:
        contenders["torchcodec exact"] = lambda path, indices: read_torchcodec(path, indices, "exact")
        contenders["torchcodec approximate"] = lambda path, indices: read_torchcodec(path, indices, "approximate")
    if decord:
        contenders["decord"] = read_decord
    contenders["everything"] = read_everything
    found = {"torchcodec": getattr(torchcodec, "__version__", None), "decord": getattr(decord, "__version__", None)}
    return contenders, {"av": av.__version__, **found}


def read_ours(path: str, indices: list[int]) -> list[torch.Tensor]:
    return list(VideoReader(path).frames_at(indices))


def read_torchcodec(path: str, indices: list[int], seek_mode: str) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path, seek_mode=seek_mode, num_ffmpeg_threads=1).get_frames_at(indices).data


def read_decord(path: str, indices: list[int]):
    import decord

    return decord.VideoReader(path, num_threads=1).get_batch(indices)


def read_everything(path: str, indices: list[int]) -> list[np.ndarray]:
    """The plain way: decode frame after frame, keep the wanted ones (the others are not even converted to RGB)."""
    wanted, kept = set(indices), []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                kept.append(frame.to_ndarray(format="rgb24"))
    return kept


def as_arrays(frames) -> Iterator[np.ndarray]:
    """Whatever a contender gives, frame by frame as uint8 (H, W, 3)."""
    if hasattr(frames, "asnumpy"):
        frames = frames.asnumpy()
    for frame in frames:
        yield frame.permute(1, 2, 0).numpy() if isinstance(frame, torch.Tensor) else frame


def compare_frames(contenders: dict[str, Callable], path: str, indices: list[int]) -> dict[str, dict[str, float]]:
    """For each contender how far its frames are from those of decoding everything, in levels of 255."""
    reference = contenders["everything"](path, indices)
    differences = {}
    for name, read in contenders.items():
        if name == "everything":
            continue
        pairs = zip(as_arrays(read(path, indices)), reference, strict=True)
        gaps = [np.abs(frame.astype(np.int16) - expected) for frame, expected in pairs]
        mean, largest = float(np.mean([gap.mean() for gap in gaps])), int(max(gap.max() for gap in gaps))
        differences[name] = {"mean": round(mean, 4), "largest": largest}
    assert differences["ours"]["largest"] == 0, f"{path}: our frames are not those of decoding everything"
    return differences


# ---- clock ----------------------------------------------------------------------------------------------------------


def use_one_core() -> bool:
    """Bind this process to one core, which some contenders' own threads then share; False where that cannot be done."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def measure(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by the wall clock and of this process's CPU time, for each call in turn, over and over."""
    seconds = {name: {"wall": [], "cpu": []} for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            result = call()
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["cpu"].append(time.process_time() - cpu)
            del result  # before the next one, which then finds as much memory free
    return seconds


def milliseconds(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median and fastest by the wall clock, and the median of the CPU time."""
    return {
        name: {
            "median": round(1000 * statistics.median(found["wall"]), 2),
            "fastest": round(1000 * min(found["wall"]), 2),
            "cpu_median": round(1000 * statistics.median(found["cpu"]), 2),
        }
        for name, found in seconds.items()
    }


def times_as_fast(seconds: dict[str, dict[str, list[float]]], prefix: str) -> dict | None:
    """How many times as fast ours is as the best contender whose name begins so; None where there is none.

    The repetitions are compared in pairs, so that drift cancels; by CPU time another contender may be the best.
    """
    names = [name for name in seconds if name.startswith(prefix)]
    if not names:
        return None
    best, ratios = {}, {}
    for clock in ("wall", "cpu"):
        best[clock] = min(names, key=lambda name: statistics.median(seconds[name][clock]))
        pairs = zip(seconds[best[clock]][clock], seconds["ours"][clock], strict=True)
        ratios[clock] = [theirs / ours for theirs, ours in pairs]
    return {
        "against": best["wall"],
        "median": round(statistics.median(ratios["wall"]), 3),
        "min": round(min(ratios["wall"]), 3),
        "cpu_against": best["cpu"],
        "cpu_median": round(statistics.median(ratios["cpu"]), 3),
    }


def say_ratios(ratios: dict[str, dict | None]) -> None:
    """What was just measured, for those who wait: by the wall clock, and by CPU time in brackets."""
    found = [ratio for ratio in ratios.values() if ratio]
    say("  " + ", ".join(f"{r['median']:.2f} ({r['cpu_median']:.2f}) times {r['against']}" for r in found))


def target(name: str, figure: float | None, bound: float, at_least: bool = True) -> dict:
    """One figure beside what is wanted; `met` is None where it was not measured."""
    met = None if figure is None else bool(figure >= bound if at_least else figure <= bound)
    return {"name": name, "figure": figure, "target": bound, "at_least": at_least, "met": met}


def speed_target(name: str, ratio: dict | None, bound: float) -> dict:
    """How many times as fast, by the wall clock; and by CPU time, which other work on the machine disturbs less."""
    row = target(name, ratio and ratio["median"], bound)
    return {**row, "cpu_figure": ratio and ratio["cpu_median"]}


def print_targets(targets: list[dict]) -> None:
    print(f"\n{'target':64}{'wanted':>15}{'figure':>9}{'CPU time':>10}")
    for row in targets:
        shown = ["-" if figure is None else f"{figure:.2f}" for figure in (row["figure"], row.get("cpu_figure"))]
        verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        sign = "at least" if row["at_least"] else "at most"
        print(f"{row['name']:64}{sign:>9}{row['target']:>6g}{shown[0]:>9}{shown[1]:>10}  {verdict}")


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_of_sampling(path: str) -> dict | None:
    """Load a video as a data worker does, in a process of its own: the peak above what the imports took, in MB.

    None where the system does not tell (it is read from Linux's /proc).
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    torch.set_num_threads(1)
    before = resident(status, "VmRSS")
    reset.write_text("5", encoding="utf-8")  # the peak starts again from here
    began = time.perf_counter()
    medium = load({"type": "video", "video": path}, Budget())
    seconds = time.perf_counter() - began
    resized = medium.patches.nbytes / 1e6
    above = resident(status, "VmHWM") - before
    return {
        "frames": 2 * medium.grid.t,
        "resized_mb": round(resized, 1),
        "peak_above_imports_mb": round(above, 1),
        "extra_mb": round(above - resized, 1),
        "seconds": round(seconds, 1),
    }


def resident(status: Path, name: str) -> float:
    """A size from /proc/self/status in MB (of a million bytes)."""
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def in_own_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- the run --------------------------------------------------------------------------------------------------------


def evenly(count: int, total: int) -> list[int]:
    """Indices as the trainer samples them (util/vision.py: plan_video)."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


def measure_video(
    contenders: dict, path: Path, content: str, interval: int, wanted: int, total: int, times: int
) -> dict:
    """All contenders on one video: `wanted` of its `total` frames."""
    say(f"{content}, a keyframe every {interval}: {wanted} of {total:,} frames")
    indices = evenly(wanted, total)
    differences = compare_frames(contenders, str(path), indices)  # which also warms the file up
    calls = {name: lambda read=read: read(str(path), indices) for name, read in contenders.items()}
    seconds = measure(calls, times)
    ratios = {name: times_as_fast(seconds, name) for name in ("torchcodec", "decord", "everything")}
    say_ratios(ratios)
    return {
        "content": content,
        "keyframe_interval": interval,
        "frames": wanted,
        "of": total,
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "milliseconds": milliseconds(seconds),
        "times_as_fast": ratios,
        "difference": differences,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--footage", type=Path, nargs="+", default=[], help="real videos to measure on as well")
    parser.add_argument("--work_dir", type=Path, help="keep the videos made here (default: a temporary folder)")
    parser.add_argument("--repetitions", type=int, help="of each contender")
    parser.add_argument("--quick", action="store_true", help="small and few: does it run at all")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    from util.log import versions  # slow to import, and of no use to memory_of_sampling

    own = parse(arguments)
    scale = QUICK if own.quick else FULL
    repetitions = own.repetitions or scale.repetitions
    is_bound = use_one_core()
    contenders, packages = find_contenders()
    with tempfile.TemporaryDirectory() as temporary:
        directory = own.work_dir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        videos = make_short_videos(directory, own.footage, scale)
        source = videos["drawn", scale.intervals[-1]]
        long_video = make_long_video(directory, source, scale.long_frames, scale)
        hour_video = make_long_video(directory, source, scale.hour_frames, scale)
        rows = [
            measure_video(contenders, path, content, interval, wanted, scale.frames, repetitions)
            for (content, interval), path in videos.items()
            for wanted in scale.wanted
        ]
        long_row = measure_video(
            contenders, long_video, "drawn", scale.intervals[-1], scale.wanted[0], scale.long_frames, repetitions
        )
        say(f"memory: the default budget's frames of {scale.hour_frames:,}")
        memory = in_own_process(memory_of_sampling, str(hour_video))

    targets = [
        speed_target(
            f"{row['frames']} of {row['of']} frames, key every {row['keyframe_interval']}, {row['content']}: {name}",
            row["times_as_fast"][name],
            bound,
        )
        for row in rows
        for name, bound in TARGETS.items()
    ]
    name = f"{long_row['frames']} of {long_row['of']:,} frames: decoding everything"
    targets.append(speed_target(name, long_row["times_as_fast"]["everything"], LONG_TARGET))
    extra = memory and memory["extra_mb"]
    name = f"MB above the resized frames, {scale.hour_frames:,} frames"
    targets.append(target(name, extra, MOST_EXTRA_MEMORY, at_least=False))
    result = {
        **origin("video.py", arguments, own.footage),
        "versions": versions(),
        "contenders": packages,
        "threads": 1,
        "bound_to_one_core": is_bound,
        "repetitions": repetitions,
        "size": [scale.width, scale.height],
        "short": rows,
        "long": long_row,
        "memory": memory,
        "targets": targets,
    }
    print_table(result)
    write_result(result, own.out)


def print_table(result: dict) -> None:
    print(f"{result['device']}, one thread; median of {result['repetitions']} in ms, opening the file included")
    for name in ("torchcodec", "decord"):
        version = result["contenders"][name]
        print(f"{name} {version}" if version else f"{name} cannot be imported and is left out")
    names = list(result["long"]["milliseconds"])
    print(f"{'content':14}{'keyframe every':>15}{'frames':>14}" + "".join(f"{name:>24}" for name in names))
    for row in [*result["short"], result["long"]]:
        print(
            f"{row['content']:14}{row['keyframe_interval']:>15}{row['frames']:>5} of{row['of']:>6,}"
            + "".join(f"{row['milliseconds'][name]['median']:>24,.0f}" for name in names)
        )
    gaps = {
        name: max(row["difference"][name]["mean"] for row in [*result["short"], result["long"]])
        for name in names
        if name != "everything"
    }
    print("mean difference of a pixel from decoding everything: " + ", ".join(f"{n} {g:g}" for n, g in gaps.items()))
    if memory := result["memory"]:
        print(
            f"{memory['frames']} frames of the longest video: {memory['resized_mb']:.1f} MB resized, "
            f"{memory['peak_above_imports_mb']:.1f} MB at the peak, in {memory['seconds']:.1f} s"
        )
    print_targets(result["targets"])


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
