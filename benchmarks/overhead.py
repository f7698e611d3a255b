"""What does finetune_distributed.py cost on one process, against finetune.py? The same run with both, in turn.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

The figure is the median over blocks of the ratio of their median step times; below 1.03 is the aim.
"""

# ruff: noqa: E402

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import origin, write_result

SCRIPTS = ("finetune.py", "finetune_distributed.py")


def train(script: str, steps: int, settings: list[str], folder: Path, **variables: str) -> float:
    """Seconds of the median step of a run, the first fifth left out. `variables`: of its environment."""
    command = [sys.executable, script, "--model", "tiny", "--epochs", "999", "--max_steps", str(steps),
               "--output_dir", str(folder / script), *settings]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / script / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["step_seconds"] for line in lines if "loss" in line]
    return statistics.median(seconds[len(seconds) // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="of each run")
    parser.add_argument("--blocks", type=int, default=5, help="times that both run")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments, settings = parser.parse_known_args()
    rows = []
    for block in range(arguments.blocks):
        order = SCRIPTS if block % 2 == 0 else SCRIPTS[::-1]
        with tempfile.TemporaryDirectory() as folder:
            row = {script: train(script, arguments.steps, settings, Path(folder)) for script in order}
        row["ratio"] = row[SCRIPTS[1]] / row[SCRIPTS[0]]
        rows.append({key: round(value, 4) for key, value in row.items()})
        print("  ".join(f"{key} {value:.4f}" for key, value in rows[-1].items()), flush=True)
    result = {
        **origin("overhead.py", sys.argv[1:]),
        "ratio": round(statistics.median(row["ratio"] for row in rows), 4),
        "blocks": rows,
    }
    print(f"median ratio {result['ratio']:.3f}")
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
