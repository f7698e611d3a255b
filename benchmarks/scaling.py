"""How would fine-tuning scale from 8 to 1,024 H100s? On paper: bytes are counted, times computed, none measured.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

`bytes_per_step` is what util/parallel/distributed.py makes FSDP2 communicate; tests/test_scaling.py holds it against
the collectives of real processes, byte by byte. `step_time` turns bytes and FLOPs into seconds by the datasheet and the
assumptions of `Hardware`. docs/scaling.md explains both and holds the tables.
"""

# ruff: noqa: E402

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from benchmarks.balance import hands_of, unevenness
from benchmarks.report import origin, processor_name, write_result
from tests.official import official_config
from util.config import Config
from util.cost.activations import kept_by
from util.cost.choose_layout import Search, layout_in_words
from util.cost.flops import training_flops
from util.cost.layouts import Unit, collectives, state_bytes, units_of, update_bytes
from util.cost.links import GATHER, REDUCE, SCATTER, Hardware, collective_time
from util.cost.settings import GIB
from util.cost.step_time import SCALAR_ALL_REDUCES, exposed, pass_times
from util.cost.work import Workload, draw, typical
from util.dataset import Size
from util.vision import Budget, Grid, frame_count, frame_size

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


# ---- what is communicated -------------------------------------------------------------------------------------------


def bytes_per_step(
    units: Sequence[Unit],
    sharding: str,
    ranks: int,
    group: int,
    micro_batches: int,
    compute_bytes: int,
    reduce_bytes: int,
) -> dict[str, dict[str, float]]:
    """What one rank communicates in one optimizer step, by collective: `calls`, `input_bytes` and `ring_bytes`.

    `input_bytes` is the size of the tensors that the rank hands in: its shard to an all-gather, whole gradients to a
    reduce-scatter, its shard's gradients to an all-reduce. `ring_bytes` is what it sends in a ring: of a whole tensor
    of S bytes among n ranks (n - 1) / n S, for an all-reduce twice that (nccl-tests, doc/PERFORMANCE.md).
    `compute_bytes` and `reduce_bytes` are those of an element gathered and reduced: 2 and 4 with bfloat16, 4 and 4
    with float32, 8 and 8 with float64. The few numbers summed around the passes (SCALAR_ALL_REDUCES) are left out.
    """
    totals = {name: {"calls": 0, "input_bytes": 0, "ring_bytes": 0.0} for name in (GATHER, SCATTER, REDUCE)}
    for micro_batch in range(micro_batches):
        forward, backward = collectives(units, sharding, ranks, group, micro_batch, micro_batches)
        for name, _, elements, members in forward + backward:
            whole = elements * (compute_bytes if name == GATHER else reduce_bytes)
            totals[name]["calls"] += 1
            totals[name]["input_bytes"] += whole // members if name == GATHER else whole
            totals[name]["ring_bytes"] += (2 if name == REDUCE else 1) * whole * (members - 1) / members
    return totals


# ---- how long it takes ----------------------------------------------------------------------------------------------


def step_time(
    units: Sequence[Unit], flops: float, sharding: str, ranks: int, group: int, micro_batches: int,
    hardware: Hardware = Hardware(), imbalance: float = 1.0,
) -> dict[str, float | str]:  # fmt: skip
    """Seconds of one optimizer step in bfloat16, by part, and what bounds it, where a mean rank computes `flops` and
    the slowest `imbalance` times that.

    A third of the compute is the forward pass. Communication hides behind the compute of its own pass, except what
    exceeds it, and except what nothing can hide: the gathers of the root and of the first layer before the forward
    pass, and the reduction of the root's gradients after the backward pass.
    """
    compute = flops / (hardware.peak * hardware.mfu)
    passes = [imbalance * compute / 3 / micro_batches, imbalance * compute * 2 / 3 / micro_batches]
    parts = {"latency": 0.0, "nvlink": 0.0, "network": 0.0}
    communication = bare_or_late = 0.0
    for micro_batch in range(micro_batches):
        both = collectives(units, sharding, ranks, group, micro_batch, micro_batches)
        for work, calls, is_forward in zip(passes, both, (True, False), strict=True):
            hidden, bare, links = pass_times(calls, hardware, group, 1, is_forward)
            parts = {key: parts[key] + links[key] for key in parts}
            communication += hidden + bare
            bare_or_late += float(exposed(hidden, bare, work))
    update = update_bytes(units, group) / (hardware.memory_bandwidth * hardware.memory_efficiency)
    scalars = SCALAR_ALL_REDUCES * collective_time(hardware, REDUCE, 8, ranks, 1)["latency"]
    bound = "compute" if imbalance < 2 else "imbalance"  # the slowest rank computes more than twice the mean
    if communication > imbalance * compute:
        bound = max(parts, key=parts.get)
    return {
        "step": imbalance * compute + bare_or_late + update + scalars, "compute": compute,
        "waiting": (imbalance - 1) * compute, "communication": communication, "exposed": bare_or_late,
        "update": update, "scalars": scalars, **parts, "bound": bound,
    }  # fmt: skip


# ---- what fits ------------------------------------------------------------------------------------------------------


def copy_bytes(units: Sequence[Unit], sharding: str, group: int) -> float:
    """The bf16 copies that compute works on: the root and two layers under `full`, else all of them."""
    sizes = [unit.padded(group) for unit in units]
    return 2 * (sizes[-1] + 2 * max(sizes[:-1]) if sharding == "full" else sum(sizes))


def fewest_micro_batches(
    units: Sequence[Unit], model_config, sample: Size, samples: int, sharding: str, group: int, hardware: Hardware
) -> int | None:
    """The fewest micro-batches in which `samples` of a rank fit its memory; None where not even one does."""
    free = hardware.memory * hardware.memory_usable - state_bytes(units, group) - copy_bytes(units, sharding, group)
    for micro_batches in range(1, samples + 1):
        together = -(-samples // micro_batches)
        patches = sum(grid.patches for grid in sample.grids)
        load = (together * sample.tokens, together * patches, together * sample.supervised)
        kept = kept_by(model_config, Config(), torch.bfloat16, load)
        if kept.total + kept.logits + kept.decoder.working <= free:
            return micro_batches
    return None


# ---- how even the work is -------------------------------------------------------------------------------------------


@cache
def dealt_imbalance() -> dict[tuple[int, int], float]:
    rows = json.loads((ROOT / "benchmarks" / "results" / "balance.json").read_text(encoding="utf-8"))["rows"]
    return {(row["ranks"], row["samples_per_rank"]): row["dealt_mean"] for row in rows}


def imbalance(ranks: int, samples_per_rank: int) -> float:
    """Slowest rank / mean rank on the mix of benchmarks/balance.py: from its results, between two numbers of ranks
    by their logarithm."""
    known = {count: value for (count, samples), value in dealt_imbalance().items() if samples == samples_per_rank}
    below, above = max(c for c in known if c <= ranks), min(c for c in known if c >= ranks)
    share = math.log2(ranks / below) / math.log2(above / below) if above > below else 0.0
    return known[below] + share * (known[above] - known[below])


def drawn_imbalance(ranks: int, samples_per_rank: int, steps: int = 20) -> float:
    """The same for numbers of samples that balance.json does not hold: drawn and dealt here."""
    generator, config, values = random.Random(0), official_config("2b"), []
    for _ in range(steps):
        costs = [training_flops(config, [draw(generator, Budget())], Config()) for _ in range(ranks * samples_per_rank)]
        values.append(unevenness(hands_of(costs, ranks), costs))
    return statistics.mean(values)


# ---- tables ---------------------------------------------------------------------------------------------------------

SAMPLE = Size(tokens=1480, supervised=100, grids=[Grid(1, 64, 80)])  # an image of 1,280 tokens, 200 tokens of text
SHARDINGS = {"full": ("full", None), "full, groups of 8": ("full", 8), "none": ("none", 1)}


def rows_of(size: str, samples_of: dict[int, int], imbalance_of, hardware: Hardware) -> list[dict]:
    """One row for each sharding and number of ranks: `samples_of` ranks, the samples of each. Efficiency is the
    throughput of a GPU against that of one of the 8 GPUs of a single machine, under the same sharding."""
    model_config = official_config(size)
    units, rows = units_of(model_config), []
    for label, (sharding, group_size) in SHARDINGS.items():
        for ranks, samples in samples_of.items():
            group = group_size or ranks
            if (group_size == ranks) or not samples:  # one group of 8 is `full` over 8
                continue
            micro_batches = fewest_micro_batches(units, model_config, SAMPLE, samples, sharding, group, hardware)
            if micro_batches is None:
                continue
            flops, uneven = samples * training_flops(model_config, [SAMPLE], Config()), imbalance_of(ranks, samples)
            arguments = (units, flops, sharding, ranks, group, micro_batches, hardware)
            row = {"model": size, "ranks": ranks, "sharding": label, "samples_per_rank": samples,
                   "micro_batches": micro_batches, "state_bytes": state_bytes(units, group),
                   "imbalance": uneven, "even": step_time(*arguments),
                   "mixed": step_time(*arguments, imbalance=uneven)}  # fmt: skip
            rows.append(row)
            first = next(r for r in rows if SHARDINGS[r["sharding"]][0] == sharding)
            for key in ("even", "mixed"):
                at_first = first[key]["step"] / first["samples_per_rank"]
                row[key]["efficiency"] = at_first / (row[key]["step"] / samples)
    return rows


def table(rows: list[dict]) -> list[str]:
    """The rows as a Markdown table."""
    head = ["model", "GPUs", "sharding", "samples / GPU", "micro-batches", "communication s", "even: step s",
            "efficiency", "bound by", "mixed: slowest / mean", "step s", "efficiency", "bound by",
            "states GB"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        even, mixed = ([f"{row[key]['step']:.3f}", f"{row[key]['efficiency']:.0%}", row[key]["bound"]]
                       for key in ("even", "mixed"))  # fmt: skip
        lines.append([
            row["model"].upper(), f"{row['ranks']:,}", row["sharding"], str(row["samples_per_rank"]),
            str(row["micro_batches"]), f"{row['even']['communication']:.3f}", *even, f"{row['imbalance']:.2f}", *mixed,
            f"{row['state_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


def byte_rows(sizes: tuple[str, ...] = ("2b", "7b")) -> list[dict]:
    """Bytes of one micro-batch in bfloat16 for every sharding, on 8 and 1,024 ranks."""
    rows = []
    for size in sizes:
        units = units_of(official_config(size))
        plain = sum(unit.padded(1) for unit in units)
        for ranks in (8, 1024):
            for sharding, group in [(name, ranks) for name in ("full", "gradients", "optimizer")] + [("none", 1)]:
                totals = bytes_per_step(units, sharding, ranks, group, 1, 2, 4)
                sent = {f"{name}_sent": total["ring_bytes"] for name, total in totals.items()}
                padding = sum(unit.padded(group) for unit in units) / plain - 1
                calls = sum(total["calls"] for total in totals.values())
                rows.append({"model": size, "ranks": ranks, "sharding": sharding, "calls": calls, **sent,
                             "padding": padding})  # fmt: skip
    return rows


def byte_table(rows: list[dict]) -> list[str]:
    head = ["model", "GPUs", "sharding", "collectives", "all-gather GB", "reduce-scatter GB", "all-reduce GB",
            "padding"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        sent = [f"{row[f'{name}_sent'] / 1e9:.2f}" for name in (GATHER, SCATTER, REDUCE)]
        lines.append([row["model"].upper(), f"{row['ranks']:,}", row["sharding"], str(row["calls"]), *sent,
                      f"{row['padding']:.1%}"])  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


# ---- layouts --------------------------------------------------------------------------------------------------------


KINDS = {"data alone": None, "with context": "context", "with tensor": "tensor", "with pipeline": "pipeline"}
HOUR = 3600  # seconds of a video
# size, samples, GPUs: of the mix so many for each GPU, or in all; or images, or videos of an hour
LAYOUTS = [
    *(("72b", "8 a GPU", gpus) for gpus in (64, 128, 256, 512, 1024)),
    *(("72b", "512 in all", gpus) for gpus in (64, 128, 256, 512, 1024)),
    *(("7b", "hour-long videos, 1 a GPU", gpus) for gpus in (8, 64)),
    *(("7b", "8 hour-long videos", gpus) for gpus in (8, 64)),
    *(("2b", "8 images a GPU", gpus) for gpus in (8, 64, 256)),
    *(("2b", "8 a GPU", gpus) for gpus in (8, 64, 256)),
]
LONG_VIDEO_TOKENS = 131_072  # --video_max_tokens of those of an hour


def work_of(model_config, samples: str, gpus: int) -> tuple[Config, Workload]:
    """The samples of a step as a row of LAYOUTS names them, and the settings that go with them."""
    number = int(next(word for word in samples.split() if word.isdigit()))
    number *= gpus if samples.endswith("a GPU") else 1
    tokens = LONG_VIDEO_TOKENS if "video" in samples else Config.video_max_tokens
    config = Config(global_batch_size=number, video_max_tokens=tokens)
    if "image" in samples:
        return config, Workload.of_sizes([SAMPLE] * number, config, model_config, samples)
    if "video" not in samples:
        return config, typical(config, model_config)
    budget = Budget.of(config, "qwen2_vl")
    frames = frame_count({}, HOUR * 30, 30, budget)
    (height, width), _ = frame_size({}, 720, 1280, frames, budget)
    grid = Grid(frames // 2, height // budget.family.patch, width // budget.family.patch)
    size = Size(tokens=grid.tokens + 200, supervised=100, grids=[grid])
    return config, Workload.of_sizes([size] * number, config, model_config, samples)


def layout_row(size: str, samples: str, gpus: int, hardware: Hardware) -> dict:
    """The best layout, and the step of the best of each kind: None where none of them fits."""
    model_config = official_config(size)
    config, work = work_of(model_config, samples, gpus)
    found = Search(model_config, config, work, gpus, replace(hardware, memory=80 * GIB)).run()
    best = found[0]
    assert best.time, f"{size} does not fit {gpus} GPUs"
    row = {
        "model": size, "samples": samples, "gpus": gpus, "layout": layout_in_words(best.shape),
        "step": best.time.step, "parts": best.time.parts,
        "mfu": work.work / (best.time.step * gpus * hardware.peak),
        "bytes": best.needed, "bound": best.time.bound,
    }  # fmt: skip
    for kind, axis in KINDS.items():
        row[kind] = None
        for one in found:
            is_of_kind = getattr(one.shape, axis) > 1 if axis else one.shape.data == gpus
            if one.time and is_of_kind and (row[kind] is None or one.time.step < row[kind]):
                row[kind] = one.time.step
    return row


def layout_table(rows: list[dict]) -> list[str]:
    """The rows as a Markdown table. Efficiency: the MFU against that of the fewest GPUs with the same samples."""
    head = ["model", "samples", "GPUs", "best layout", "step s", "MFU", "efficiency", "bound by", "GiB", *KINDS]
    lines = [head, ["---"] * len(head)]
    first: dict[tuple, dict] = {}
    for row in rows:
        start = first.setdefault((row["model"], row["samples"]), row)
        beside = max((name for name in row["parts"] if name != "computation"), key=row["parts"].get)
        bound = row["bound"] if row["bound"] != "computation" else f"computation, then {beside}"
        lines.append([
            row["model"].upper(), row["samples"], f"{row['gpus']:,}", row["layout"], f"{row['step']:.2f}",
            f"{row['mfu']:.1%}", f"{row['mfu'] / start['mfu']:.0%}", bound, f"{row['bytes'] / GIB:.0f}",
            *("does not fit" if row[kind] is None else f"{row[kind] / row['step']:.2f} x" for kind in KINDS),
        ])  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


def layout_rows(hardware: Hardware) -> list[dict]:
    cases = tqdm(LAYOUTS, desc="layouts", leave=False)
    return [layout_row(size, samples, gpus, hardware) for size, samples, gpus in cases]


def tables(arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[dict]]]:
    """The printed lines, and the rows behind them."""
    hardware = replace(Hardware(), mfu=arguments.mfu, link_efficiency=arguments.link_efficiency)
    per_rank, batch = arguments.samples_per_rank, arguments.global_batch
    weak = dict.fromkeys(RANKS, per_rank)
    strong = {ranks: batch // ranks for ranks in RANKS}
    drawn = cache(lambda ranks, samples: imbalance(ranks, samples) if samples >= 8 else drawn_imbalance(ranks, samples))
    rows = {"bytes": byte_rows(), "fixed_samples_per_rank": [], "fixed_global_batch": []}
    for size in ("2b", "7b"):
        rows["fixed_samples_per_rank"] += rows_of(size, weak, drawn, hardware)
        rows["fixed_global_batch"] += rows_of(size, strong, drawn, hardware)
    lines = ["Sent by one rank in a step of one micro-batch, bfloat16", "", *byte_table(rows["bytes"])]
    for name, title in (("fixed_samples_per_rank", f"{per_rank} samples on each GPU"),
                        ("fixed_global_batch", f"{batch} samples on all GPUs together")):  # fmt: skip
        lines += ["", title, "", *table(rows[name])]
    return lines, rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mfu", type=float, default=Hardware.mfu, help="assumed share of the peak FLOP/s")
    parser.add_argument("--link_efficiency", type=float, default=Hardware.link_efficiency, help="assumed, of all links")
    parser.add_argument("--samples_per_rank", type=int, default=8, help="8, 16 or 32 (what balance.json holds)")
    parser.add_argument("--global_batch", type=int, default=256, help="samples of a step in the second table")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser


def significant(value):
    """Numbers with 4 significant digits, wherever they stand."""
    if isinstance(value, dict):
        return {key: significant(part) for key, part in value.items()}
    if isinstance(value, list):
        return [significant(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    arguments = parser().parse_args()
    lines, rows = tables(arguments)
    print("\n".join(lines), flush=True)
    hardware = replace(Hardware(), mfu=arguments.mfu, link_efficiency=arguments.link_efficiency)
    rows["layouts"] = layout_rows(hardware)
    print("\n".join(["", "The best layouts", "", *layout_table(rows["layouts"])]))
    result = {
        **origin("scaling.py", sys.argv[1:], device=f"computed, not measured, on {processor_name()}"),
        "rows": significant(rows),
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
