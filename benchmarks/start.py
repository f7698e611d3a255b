"""How long does a run take until its first step is done, and how much memory, by number of samples?

    python benchmarks/start.py --samples 1000 100000 300000 1000000 --out benchmarks/results/start.json

`finetune.py` trains `tiny` for 3 epochs on so many rows of a text and an image (one small file, so that what is timed
is this program and not a disk), each number in processes of its own: a first start, which reads the header of every
row's image, and a second one, which finds the sizes kept. Above `--read_up_to` rows the header of the first row stands
for those of all, since reading them is not what is asked; then nothing is taken off for it.

Time counts from the call of `train`, after the imports, to the end of the first step; reading headers is counted apart.
Beside the clock stands the training process's own CPU time: on a machine that others use the clock tells of them, too.
Headers are read in two other processes, so that it holds none of them. Memory is the most that the training process,
and that its data worker, has held. Of all, the figures of the smallest number are what a start costs anyway.
"""

# ruff: noqa: E402

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import origin, write_result

EPOCHS = 3


def write_data(folder: Path, count: int) -> Path:
    """A .jsonl file of `count` rows of unequal length about one image."""
    from PIL import Image

    Image.new("RGB", (168, 112), "navy").save(folder / "image.png")
    file = folder / f"{count}.jsonl"
    with open(file, "w", encoding="utf-8") as rows:
        for number in range(count):
            question = [
                {"type": "image", "image": "image.png"},
                {"type": "text", "text": f"What is in picture {number}?"},
            ]
            answer = f"It is number {number}. " + "It is blue. " * (number % 7)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return file


class FirstStepDone(Exception):
    """Raised where the measured part of a run ends."""


def peak_megabytes(process: int | str) -> float:
    """The most memory a process has held."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def start(data: str, output_dir: str, read: bool) -> None:
    """One start, in this process; prints its figures as a line of JSON. Without `read` all headers are as the first."""
    import finetune
    from util import log
    from util.config import Config
    from util.cost import measure

    figures = {"headers_seconds": 0.0, "headers": 0}
    findings_of = measure.findings_of

    def timed(chunks, num_workers):
        # the consumer's own work between two findings is part of it: it is a few microseconds of some hundred
        began = time.perf_counter()
        for finding in findings_of(chunks, num_workers):
            figures["headers"] += 1
            yield finding
        figures["headers_seconds"] += time.perf_counter() - began

    def end(run, step, values, work):
        figures["seconds"] = time.perf_counter() - began
        figures["cpu_seconds"] = time.process_time() - cpu_began
        figures["peak_megabytes"] = peak_megabytes("self")
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
        figures["worker_peak_megabytes"] = max(map(peak_megabytes, children), default=None)
        raise FirstStepDone

    if not read:
        one = lru_cache(measure.Chunks.one)
        measure.Chunks.one = lambda chunks, index: one(chunks, 0)
        figures["headers"] = None
    measure.findings_of, log.Run.log_step = timed if read else findings_of, end
    config = Config(
        model="tiny", data=[data], device="cpu", epochs=EPOCHS, output_dir=output_dir, num_workers=2, max_tokens=2048
    )
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        finetune.train(config)
    except FirstStepDone:
        print(json.dumps(figures), flush=True)
        os._exit(0)  # without what tidies up


def measured_start(data: Path, output_dir: Path, read: bool) -> dict:
    command = [sys.executable, __file__, "--start", str(data), str(output_dir), "read" if read else ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(count: int, folder: Path, repetitions: int, read: bool) -> dict:
    """A first and a few second starts on `count` samples; of the second ones the median."""
    data = write_data(folder, count)
    first = measured_start(data, folder / "first", read)
    seconds = [measured_start(data, folder / f"second_{number}", True) for number in range(repetitions)]
    assert all(second["headers"] == 0 for second in seconds), "a second start has read headers"
    row = {
        "samples": count,
        "first_start_seconds": first["seconds"],
        "headers": "read" if read else "as the first",
        "headers_seconds": first["headers_seconds"],
        "first_start_beyond_headers_seconds": first["seconds"] - first["headers_seconds"],
        "first_start_cpu_seconds": first["cpu_seconds"],
        "second_start_seconds": statistics.median(second["seconds"] for second in seconds),
        "second_start_cpu_seconds": statistics.median(second["cpu_seconds"] for second in seconds),
        "first_peak_megabytes": first["peak_megabytes"],
        "first_worker_peak_megabytes": first["worker_peak_megabytes"],
        "second_peak_megabytes": max(second["peak_megabytes"] for second in seconds),
        "second_worker_peak_megabytes": max(second["worker_peak_megabytes"] for second in seconds),
    }
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def fit(rows: list[dict], key: str, count: int) -> dict:
    """The line by least squares through a figure's growth beyond the smallest number of samples, per million; what it
    says of `count` samples; and how far the largest measured number lies from it, as a share of its growth."""
    base = rows[0]
    points = [(row["samples"] - base["samples"], row[key] - base[key]) for row in rows[1:]]
    slope = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    x, y = points[-1]
    return {
        "per_million": round(1e6 * slope, 2),
        "of_ten_million": round(slope * count, 1),
        "last_off_line": round(y / (slope * x) - 1, 3) if slope * x else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 100_000, 300_000, 1_000_000], help="numbers")
    parser.add_argument("--repetitions", type=int, default=3, help="second starts of each number")
    parser.add_argument("--read_up_to", type=int, default=100_000, help="samples of which every header is read")
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    if arguments.start:
        data, output_dir, read = arguments.start
        return start(data, output_dir, bool(read))
    rows = []
    for count in sorted(arguments.samples):
        with tempfile.TemporaryDirectory() as folder:
            read = count <= arguments.read_up_to
            rows.append(measured(count, Path(folder), arguments.repetitions, read))
        row, base = rows[-1], rows[0]
        print(
            f"{count:>10,} samples: first step after {row['first_start_seconds']:.1f} s, of which headers "
            f"{row['headers_seconds']:.1f}; second start {row['second_start_seconds']:.1f} s; CPU time "
            f"{row['first_start_cpu_seconds']:.1f} and {row['second_start_cpu_seconds']:.1f} s; peak "
            f"{row['first_peak_megabytes']:.0f} and {row['second_peak_megabytes']:.0f} MB, "
            f"{row['second_peak_megabytes'] - base['second_peak_megabytes']:+.0f}",
            flush=True,
        )
    keys = ("first_start_beyond_headers_seconds", "first_start_cpu_seconds", "second_start_seconds",
            "second_start_cpu_seconds", "first_peak_megabytes", "second_peak_megabytes",
            "second_worker_peak_megabytes")  # fmt: skip
    fits = {key: fit(rows, key, 10_000_000) for key in keys} if len(rows) > 1 else {}
    result = {**origin("start.py", sys.argv[1:]), "cores": os.cpu_count(), "epochs": EPOCHS, "rows": rows, "fits": fits}
    write_result(result, arguments.out)
    return None


if __name__ == "__main__":
    main()
