"""How much memory does a training step need, and how much was forecast? Steps of the published sizes.

    python benchmarks/memory_table.py --cases 2b 7b_lora --out benchmarks/results/memory_h200.json
    python benchmarks/memory_table.py --compile on --cases 2b_short_full

Each case is some steps of util's own model, loss and optimizer, of one micro-batch or two, and prints one line as soon
as it is measured: the allocator's peak against the forecast, and what the allocator had reserved of the device by then.
`--cases` chooses those whose names begin so. The numbers of a step mean nothing: its weights are what the memory held.
Without a GPU it runs on stand-ins for CUDA's libraries (see tests/test_phantom.py), which count allocations like a
GPU's.
"""
# ruff: noqa: E402

import argparse
import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.report import origin, write_result
from tests.official import official_config
from util import compilation
from util.adapters import lora
from util.collator import Batch, Collator
from util.command_line import run_command
from util.config import Config
from util.conversation import Encoded
from util.cost import memory
from util.cost.memory import GIB
from util.dataset import Sample
from util.family import FAMILIES, QWEN2_VL, new_model
from util.log import versions
from util.loss import PackedLoss
from util.model import choose_device, choose_dtype, prepare_model
from util.optimizer import build_optimizer, clip_gradient
from util.steps import Load
from util.vision import Grid, Medium

SIZES = ("2b", "7b")
GRID = Grid(1, 64, 64)  # of each image: 4,096 patches, 1,024 tokens
SETTINGS = {
    "full": {},
    "recomputed": {"activation_checkpointing": "full"},
    "frozen_tower": {"freeze": ["vision"]},
    "lora": {"lora_rank": 16},
    "qlora": {"lora_rank": 16, "quantize": "nf4"},
}
OTHERS = {
    "frozen_language_model": {"freeze": ["language_model"]},
    "lora_vision": {"lora_rank": 16, "lora_vision": True},
    "lora_dropout": {"lora_rank": 16, "lora_dropout": 0.1},
    "dora": {"lora_rank": 16, "lora_dora": True},
    "sdpa": {"attention": "sdpa"},
    "float32": {"dtype": "float32"},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
}
OTHER_FAMILIES = ("qwen2.5_3b", "qwen2.5_7b", "qwen3_2b", "qwen3_4b", "qwen3_8b")
LOADS = {"short": (4096, 4096), "long": (20480, 40960)}  # tokens and patches of a micro-batch


class Case(NamedTuple):
    size: str
    settings: dict
    tokens: int
    patches: int
    passes: int = 1  # micro-batches of a step


def all_cases() -> dict[str, Case]:
    """Sizes x settings x loads, some with two micro-batches, and what else changes what is there at the peak."""
    cases = {}
    selective = {"activation_checkpointing": "selective"}
    for size in SIZES:
        for name, settings in SETTINGS.items():
            for load, (tokens, patches) in LOADS.items():
                cases[f"{size}_{load}_{name}"] = Case(size, settings, tokens, patches)
        for name in ("full", "recomputed", "frozen_tower"):
            cases[f"{size}_short_{name}_twice"] = Case(size, SETTINGS[name], *LOADS["short"], passes=2)
        cases[f"{size}_short_selective"] = Case(size, selective, *LOADS["short"])
        cases[f"{size}_long_selective"] = Case(size, selective, *LOADS["long"])
        cases[f"{size}_text_full"] = Case(size, {}, 4096, 0)
        least = {"optimizer": "adamw_flash", **SETTINGS["recomputed"]}
        cases[f"{size}_short_flash_recomputed"] = Case(size, least, *LOADS["short"])
        cases[f"{size}_long_lora_recomputed"] = Case(size, SETTINGS["lora"] | SETTINGS["recomputed"], *LOADS["long"])
    for name, settings in OTHERS.items():
        cases[f"2b_short_{name}"] = Case("2b", settings, *LOADS["short"])
    for size in OTHER_FAMILIES:
        for name in ("full", "recomputed", "frozen_tower", "lora"):
            cases[f"{size}_short_{name}"] = Case(size, SETTINGS[name], *LOADS["short"])
        cases[f"{size}_short_selective"] = Case(size, selective, *LOADS["short"])
    return cases


def micro_batch(tokens: int, patches: int, model_type: str = QWEN2_VL) -> tuple[Batch, Load]:
    """Samples of one image each, half of whose text is supervised; without patches one text."""
    samples = []
    numbers = 3 * FAMILIES[model_type].patch ** 2
    count = max(1, patches // GRID.patches)
    for _ in range(count):
        length = tokens // count
        media = []
        starts = []
        if patches:
            length -= GRID.tokens - 1  # one token stands for the image's
            media = [Medium(torch.zeros(GRID.patches, numbers, dtype=torch.uint8), GRID, is_video=False)]
            starts = [10]
        half = length // 2
        samples.append(Sample(Encoded([5] * length, [False] * (length - half) + [True] * half, starts), media, ""))
    return Collator(model_type)(samples), (count * (tokens // count), patches, count * half)


class PixelsOfHalf:
    """A processor, as far as the loss asks it."""

    class image_processor:
        image_mean = [0.5] * 3
        image_std = [0.5] * 3


def untouched_model(case: Case, config: Config, device: torch.device) -> PackedLoss:
    """A model whose weights are memory that nobody has written to."""
    with torch.device("meta"):
        bare = new_model(official_config(case.size)).to(choose_dtype(config.dtype, device))
    if config.quantize != "none":
        # layer by layer, as they would be from a file: a GPU never holds all weights unquantised
        bare = bare.to_empty(device="cpu")
        bare.tie_weights()
        lora.quantise(bare, device)
        bare = bare.to(device)
    else:
        bare = bare.to_empty(device=device)
        bare.tie_weights()
    return prepare_model(bare, config, PixelsOfHalf(), device)


def measure(case: Case, changes: dict, device: torch.device, steps: int, updates: bool = True) -> dict:
    """Some steps of a case: what was forecast, allocated and reserved. The first step makes the optimizer's moments.

    `updates`: whether weights are updated; else their moments are made and stay as they are.
    """
    config = Config(**{**case.settings, **changes})
    dtype = choose_dtype(config.dtype, device)
    model_config = official_config(case.size)
    batch, load = micro_batch(case.tokens, case.patches, model_config.model_type)
    counts = memory.count_parameters(model_config, config)
    parts = memory.forecast(model_config, counts, config, dtype, [load], passes=case.passes, device=device)
    model = untouched_model(case, config, device)
    optimizer = build_optimizer(model, config, case.passes)
    if not updates and hasattr(optimizer, "update"):
        optimizer.update = lambda *tensors: None
    batch = batch.pin_memory()
    began = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        for _ in range(case.passes):
            model(batch.to(device)).backward()
        clip_gradient(model, optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device)
    forecast = sum(parts.values())
    return {
        "tokens": load[0],
        "patches": load[1],
        "supervised": load[2],
        "micro_batches": case.passes,
        "settings": {**case.settings, **changes},
        "compiled": compilation.is_on(config.compile, device),
        "allocated_gib": round(peak / GIB, 3),
        "forecast_gib": round(forecast / GIB, 3),
        "ratio": round(forecast / peak, 4),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 3),
        "reserved_forecast_gib": round((forecast + memory.reserved_margin(parts)) / GIB, 3),
        "peak_at": parts.moment,
        "parts_gib": {name: round(size / GIB, 3) for name, size in parts.items()},
        "seconds": round(time.perf_counter() - began, 2),
    }


def main(arguments: list[str]) -> None:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", nargs="*", default=[""], help="those whose names begin so; default: all")
    parser.add_argument("--exact", action="store_true", help="--cases are whole names")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as in finetune.py")
    parser.add_argument("--steps", type=int, default=2, help="steps of each case; the first one makes the moments")
    parser.add_argument("--no-updates", action="store_true", help="leave the weights as they are")
    parser.add_argument("--most", type=float, help="leave out cases whose forecast is above so many GiB")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--add", action="store_true", help="to the cases that --out holds already")
    own = parser.parse_args(arguments)
    if own.add and not (own.out and own.out.is_file()):
        parser.error("--add: --out names no file that is there")
    device = choose_device("cuda")
    limit = own.most or memory.free_bytes(device) / GIB
    found = {}
    for name, case in all_cases().items():
        if not any(name == chosen if own.exact else name.startswith(chosen) for chosen in own.cases):
            continue
        if case.settings.get("optimizer") == "adamw_flash" and not importlib.util.find_spec("flashoptim"):
            print(f"{name:>28}  left out: flashoptim is not installed", flush=True)
            continue
        changes = {"compile": own.compile}
        forecast = forecast_of(case, changes, device)
        if forecast / GIB > limit:
            print(f"{name:>28}  forecast {forecast / GIB:.1f} GiB: left out", flush=True)
            continue
        found[name] = measure(case, changes, device, own.steps, not own.no_updates)
        row = found[name]
        print(
            f"{name:>28}  allocated {row['allocated_gib']:7.2f} GiB, forecast {row['forecast_gib']:7.2f} "
            f"({row['ratio'] - 1:+.1%}), reserved {row['reserved_gib']:7.2f}; {row['peak_at']}",
            flush=True,
        )
        torch._dynamo.reset()  # a case's graphs would count among the 8 that the next case may have
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    is_there = "PHANTOM_LIBRARY" not in os.environ
    name = torch.cuda.get_device_name(device) if is_there else "no GPU: counted on stand-ins for CUDA's libraries"
    result = {**origin("memory_table.py", arguments, device=name), "versions": versions(), "cases": found}
    if own.add:
        before = json.loads(own.out.read_text(encoding="utf-8"))
        measured_now = {key: result[key] for key in ("command", "commit")}
        added = {case: {**row, **measured_now} for case, row in found.items()}
        result = {**before, "cases": {**before["cases"], **added}}
    write_result(result, own.out)


def forecast_of(case: Case, changes: dict, device: torch.device) -> float:
    """Bytes, before anything is made."""
    config = Config(**{**case.settings, **changes})
    model_config = official_config(case.size)
    _, load = micro_batch(case.tokens, case.patches, model_config.model_type)
    counts = memory.count_parameters(model_config, config)
    dtype = choose_dtype(config.dtype, device)
    parts = memory.forecast(model_config, counts, config, dtype, [load], passes=case.passes, device=device)
    return sum(parts.values())


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
