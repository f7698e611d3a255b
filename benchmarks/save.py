"""How long does training wait for a checkpoint, against how long it takes to write one?

    python benchmarks/save.py --out benchmarks/results/save.json

`finetune.py` trains a widened `tiny` in float32 and saves after every second step. Training waits in `Saver.save`
(which begins the save) and in `Saver.wait_for_copy` (before the next update); writing lasts from the call of `save`
until the checkpoint has its name: copied, written, flushed to disk, summed, renamed. The aim is a share below 5 %.
"""

# ruff: noqa: E402

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import Qwen2VLForConditionalGeneration

import finetune
from benchmarks.report import origin, write_result
from util.checkpoint import Saver
from util.config import Config
from util.log import versions
from util.model import load_config, load_processor
from util.tiny_model import make_tiny_model


def make_wide_model(folder: Path, layers: int) -> int:
    """Write tiny with a wider and deeper language model; return its number of parameters."""
    tiny = make_tiny_model(folder / "tiny")
    config = load_config(str(tiny))
    text = config.text_config
    text.hidden_size = config.vision_config.hidden_size = 1024
    text.intermediate_size, text.num_hidden_layers = 4096, layers
    text.num_attention_heads, text.num_key_value_heads = 1024 // 32, 1024 // 32
    text.layer_types = [text.layer_types[0]] * layers
    model = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder / "wide")
    load_processor(str(tiny)).save_pretrained(folder / "wide")
    return sum(parameter.numel() for parameter in model.parameters())


def time_saves() -> list[dict[str, float]]:
    """Have every Saver note its saves, one after another, in the list returned."""
    saves, save, wait, complete = [], Saver.save, Saver.wait_for_copy, Saver._complete

    def timed_save(self, *arguments):
        self.wait()  # the last one must not be counted as this one's
        saves.append({"began": time.perf_counter(), "waited": 0.0})
        save(self, *arguments)
        saves[-1]["waited"] += time.perf_counter() - saves[-1]["began"]

    def timed_wait(self):
        began = time.perf_counter()
        wait(self)
        if saves:
            saves[-1]["waited"] += time.perf_counter() - began

    def timed_complete(self, *arguments):
        complete(self, *arguments)
        saves[-1]["written"] = time.perf_counter() - saves[-1].pop("began")

    Saver.save, Saver.wait_for_copy, Saver._complete = timed_save, timed_wait, timed_complete
    return saves


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the language model, 17 million parameters each")
    parser.add_argument("--saves", type=int, default=5, help="that count; one more comes first and is left out")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    own = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_wide_model(Path(folder), own.layers)
        saves = time_saves()
        finetune.train(Config(
            model=f"{folder}/wide", device="cuda" if torch.cuda.is_available() else "cpu", dtype="float32", epochs=99,
            max_steps=2 * (own.saves + 1), save_every=2, keep=1, global_batch_size=4, max_pixels=28 * 28 * 16,
            min_pixels=3136, video_max_frames=4, num_workers=0, learning_rate=1e-5, output_dir=f"{folder}/run",
        ))  # fmt: skip
    rows = [{key: round(value, 4) for key, value in save.items()} for save in saves[1:]]
    share = statistics.median(row["waited"] / row["written"] for row in rows)
    for row in rows:
        print(f"waited {row['waited']:.3f} s of {row['written']:.2f} s: {row['waited'] / row['written']:.1%}")
    print(f"{12 * parameters / 1e9:.2f} GB each; the median share is {share:.1%}")
    result = {
        **origin("save.py", arguments),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "bytes": 12 * parameters,
        "share": round(share, 4),
        "first": {key: round(value, 4) for key, value in saves[0].items()},
        "saves": rows,
    }
    write_result(result, own.out)


if __name__ == "__main__":
    main(sys.argv[1:])
