"""What a LoRA of default settings learns beside a full run of default settings: how far the held-out loss falls.

    python benchmarks/lora_gain.py --out benchmarks/results/lora_gain.json

A `tiny` with random weights first learns bar and pie charts: the base model, which can read charts, but has met no line
chart. From it each row learns line charts, with the same samples in the same steps. The gain of a row is by how much
the loss on held-out line charts falls. Rows without a learning rate train with the default one; all runs go through
finetune.py.
"""

# ruff: noqa: E402

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chartqa_tiny import BUDGET, run
from benchmarks.report import origin, write_result

ROWS = {  # flags of finetune.py
    "untrained": ["--learning_rate", "0", "--max_steps", "1"],
    "full": [],
    "lora": ["--lora_rank", "16"],
    "lora_64": ["--lora_rank", "64"],
    "rslora_64": ["--lora_rank", "64", "--lora_rslora"],
    "lora_1e-5": ["--lora_rank", "16", "--learning_rate", "1e-5"],
    "full_1e-4": ["--learning_rate", "1e-4"],
}


def draw(folder: Path, charts: list[str], count: int) -> Path:
    """Draw charts with questions; `folder` then has train.jsonl and val.jsonl, which share no chart."""
    run("-m", "util", "chartqa", "--from", "drawn", "--count", str(count), "--charts", *charts, "--no_system_message",
        "--splits", "train", "val", "--output_dir", str(folder))  # fmt: skip
    return folder


def train(name: str, model: str, data: Path, steps: int, folder: Path, flags: list[str]) -> dict:
    """Train `folder/name` on the charts in `data` and evaluate it at the end."""
    print(f"training {name}", flush=True)
    seconds = run("finetune.py", "--model", model, "--data", str(data / "train.jsonl"), "--eval_data",
                  str(data / "val.jsonl"), "--eval_every", "0", "--output_dir", str(folder / name), "--epochs", "999",
                  "--max_steps", str(steps), "--global_batch_size", "16", "--device", "cpu", *BUDGET,
                  *flags)  # fmt: skip
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((folder / name / "training_config.json").read_text(encoding="utf-8"))
    return {"flags": flags, "learning_rate": settings["learning_rate"], "seconds": round(seconds, 1),
            "loss": round(next(line["eval_loss"] for line in lines if "eval_loss" in line), 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_steps", type=int, default=400, help="of the base model, on bar and pie charts")
    parser.add_argument("--steps", type=int, default=200, help="of each row, on line charts")
    parser.add_argument("--charts", type=int, default=2000, help="of each kind to train on; a tenth more are held out")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = draw(folder / "first", ["bars", "pies"], arguments.charts)
        then = draw(folder / "then", ["lines"], arguments.charts)
        base = train("base", "tiny", first, arguments.base_steps, folder, ["--learning_rate", "2e-3"])
        rows = {}
        for row in dict.fromkeys(["untrained", "full", *arguments.rows]):
            rows[row] = train(row, str(folder / "base"), then, arguments.steps, folder, ROWS[row])
    for row in rows.values():
        row["gain"] = round(rows["untrained"]["loss"] - row["loss"], 4)
        row["share_of_full"] = round(row["gain"] / (rows["untrained"]["loss"] - rows["full"]["loss"]), 3)
    print(f"{'row':>12} {'learning rate':>14} {'held-out loss':>14} {'gain':>8} {'of full':>8}")
    for name, row in rows.items():
        losses = f"{row['loss']:>14.4f} {row['gain']:>8.4f} {row['share_of_full']:>8.1%}"
        print(f"{name:>12} {row['learning_rate']:>14g} {losses}")
    minutes = round((time.perf_counter() - began) / 60, 2)
    result = {
        **origin("lora_gain.py", sys.argv[1:]),
        "minutes": minutes,
        "base": base,
        "steps": arguments.steps,
        "rows": rows,
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
