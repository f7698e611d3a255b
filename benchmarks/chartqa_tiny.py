"""Drawn charts on `tiny`: all of it trained, a LoRA, and the vision tower frozen; held-out relaxed accuracy of each.

    python benchmarks/chartqa_tiny.py --out benchmarks/results/chartqa_tiny.json

First a `tiny` with random weights learns the demonstration of ./finetune.sh: the base model, which can see, but has
met none of these charts. From it the three start, with the same samples in the same steps. Each is asked the same
questions about charts that none has trained on. Everything runs through the commands that users type.
"""

# ruff: noqa: E402

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import origin, write_result
from util.results.compare import compare

BASE = ["--learning_rate", "2e-3"]
ROWS = {  # what is trained: flags of finetune.py
    "full": ["--learning_rate", "1e-3"],
    "lora": ["--learning_rate", "5e-3", "--lora_rank", "16", "--lora_alpha", "32", "--lora_vision"],
    "frozen_tower": ["--learning_rate", "1e-3", "--freeze", "vision"],
}  # fmt: skip
BUDGET = ["--min_pixels", "3136"]  # charts of 112x84 pixels keep their size


def run(*command: str) -> float:
    """Run a command of the project; its seconds. One that fails ends the benchmark with what it said."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def train(name: str, model: str, data: Path, steps: int, folder: Path, flags: list[str]) -> dict:
    """Train `folder/name` for `steps` steps."""
    print(f"training {name}: {steps} steps", flush=True)
    seconds = run("finetune.py", "--model", model, "--data", str(data), "--output_dir", str(folder / name),
                  "--epochs", "999", "--max_steps", str(steps), "--global_batch_size", "32", *BUDGET,
                  *flags)  # fmt: skip
    last = json.loads((folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"steps": steps, "seconds": round(seconds, 1), "loss": round(last["loss"], 4), "flags": flags}


def ask(name: str, base: Path, data: Path, folder: Path) -> Path:
    """The answers of `folder/name` to the held-out questions, as a file of its own."""
    flags = ["--data", str(data), "--output_dir", str(folder / "answers"), "--metrics", "relaxed_accuracy",
             "--max_new_tokens", "8", "--show", "0", *BUDGET]  # fmt: skip
    file = folder / "answers" / "before.jsonl"
    if name == "base":
        run("test_on_official_model.py", "--model", str(base), *flags)
        return file
    run("test_on_trained_model.py", str(folder / name), "--model", str(base), *flags)
    return file.with_name("after.jsonl").rename(file.with_name(f"{name}.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--base", type=Path, help="a finished run; default: the demonstration, trained now")
    parser.add_argument("--base_steps", type=int, default=600, help="as many as the demonstration has")
    parser.add_argument("--steps", type=int, default=400, help="of each row")
    parser.add_argument("--charts", type=int, default=4000, help="to train on; a tenth more are held out")
    parser.add_argument("--questions", type=int, default=600, help="asked, at most, drawn at random")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, test = folder / "data" / "train.jsonl", folder / "data" / "asked.jsonl"
        run("-m", "util", "chartqa", "--from", "drawn", "--count", str(arguments.charts), "--no_system_message",
            "--splits", "train", "test", "--output_dir", str(data.parent))  # fmt: skip
        lines = data.with_name("test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        number = min(arguments.questions, len(lines))
        test.write_text("".join(random.Random(0).sample(lines, number)), encoding="utf-8")
        rows = len(data.read_text(encoding="utf-8").splitlines())
        base, runs = arguments.base or folder / "base", {}
        if not arguments.base:
            run("train_data/make_data.py", "--demonstration")
            shapes = ROOT / "train_data" / "demonstration" / "data.jsonl"
            runs["base"] = train("base", "tiny", shapes, arguments.base_steps, folder, BASE)
        for row in arguments.rows:
            runs[row] = train(row, str(base), data, arguments.steps, folder, ROWS[row])
        files = {row: ask(row, base, test, folder) for row in ("base", *arguments.rows)}
        table = compare([f"{row}={file}" for row, file in files.items()], "relaxed_accuracy", str(folder / "scores"))
        scores = json.loads((folder / "scores").read_text(encoding="utf-8"))
    print(table)
    result = {
        **origin("chartqa_tiny.py", sys.argv[1:]),
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "rows": {"train": rows, "asked": number},
        "runs": runs,
        **{group: value for group, value in scores.items() if isinstance(value, dict)},
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
