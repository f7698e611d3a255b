"""A frozen tower with and without `--cache_dir`: seconds of each epoch of `tiny` on the CPU; the work that is saved.

    python benchmarks/features.py --out benchmarks/results/features.json
    python benchmarks/features.py --model MODEL --device cuda --data DATA --max_steps 100     (any flags of finetune.py)

Runs alternate, each with a fresh folder: `nothing kept`, and `features kept` of two frozen parts. The work of a 2B is
computed from its published config, if that is in the folder that QWEN2_VL_REFERENCE names: a sample of one image of
448 x 448 pixels (1,024 patches, 256 tokens) and 100 tokens of text, of which 20 are supervised.
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

WAYS = {"nothing kept": [], "features kept": ["--cache_dir"]}
SETTINGS = ["--model", "tiny", "--device", "cpu", "--freeze", "vision", "merger", "--num_workers", "1"]
TRAINED = {
    "tower frozen": {"freeze": ["vision"]},
    "tower and merger frozen": {"freeze": ["vision", "merger"]},
    "adapters in the language model": {"lora_rank": 16},
}


def epochs_of(words: list[str], epochs: int, folder: Path, more: list[str]) -> list[float]:
    """Seconds of each epoch of a run, the sum over its steps; `more`: flags that count instead of those in SETTINGS."""
    command = [sys.executable, "finetune.py", *SETTINGS, "--epochs", str(epochs), "--output_dir", str(folder / "run")]
    command += [*words, str(folder / "cache")] if words else []
    command += more
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds = [0.0] * epochs
    for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        if "step_seconds" in step:
            seconds[step["epoch"]] += step["step_seconds"]
    return [round(number, 3) for number in seconds]


def computed() -> dict[str, dict[str, float]]:
    """TFLOP of a 2B on one sample in the first epoch and in the others, and their ratio; {} without its config."""
    from dataclasses import replace

    from transformers import Qwen2VLConfig

    from util.collator import Collator
    from util.config import Config
    from util.cost import flops
    from util.dataset import Size
    from util.vision import Grid

    folder = Path(os.environ.get("QWEN2_VL_REFERENCE", ROOT.parent / "shared" / "qwen2_vl_reference"))
    if not (folder / "config.json").is_file():
        return {}
    config = Qwen2VLConfig.from_pretrained(folder)
    image = Grid(1, 32, 32)
    found = {}
    for name, changes in TRAINED.items():
        settings = Config(**changes)
        size = Size(100 + image.tokens, 20, [image])
        whole = flops.training_flops(config, [size], settings)
        work = flops.work_by_part(config, [size], settings)
        batch = replace(Collator()([]), kept_grids=[image])
        kept = sum(work.values()) - sum(flops.without_kept(work, config, [batch], settings).values())
        found[name] = {
            "first_epoch_tflop": round(whole / 1e12, 3),
            "other_epochs_tflop": round((whole - kept) / 1e12, 3),
            "ratio": round(whole / (whole - kept), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=3, help="times that all run")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments, more = parser.parse_known_args()
    runs: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for _ in range(arguments.blocks):
        for name, words in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(epochs_of(words, arguments.epochs, Path(folder), more))
            print(f"{name}: {runs[name][-1]} s an epoch", flush=True)
    medians = {}
    for name, measured in runs.items():
        medians[name] = [statistics.median(epoch) for epoch in zip(*measured, strict=True)]
    ratios = [plain / kept for plain, kept in zip(*medians.values(), strict=True)]
    result = {
        **origin("features.py", sys.argv[1:]),
        "seconds_of_epochs": medians,
        "times_as_fast": [round(ratio, 3) for ratio in ratios],
        "runs": runs,
        "computed_for_2b": computed(),
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
