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
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.balance import draw, hands_of, unevenness
from benchmarks.report import origin, processor_name, write_result
from tests.official import official_config
from util.config import Config
from util.cost.activations import kept_by
from util.cost.flops import training_flops
from util.dataset import Size
from util.model import freeze, layers
from util.vision import Budget, Grid

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
GATHER, SCATTER, REDUCE = "all_gather", "reduce_scatter", "all_reduce"
SCALAR_ALL_REDUCES = 3  # a few numbers each: a step's counts, its loss, and the norms of its gradients


# ---- what is communicated -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers and reduces at once: one layer, or what is left (the root)."""

    shapes: list[tuple[int, ...]]  # of its parameters
    trained: list[bool]  # which of them have gradients
    in_backward: bool  # gradients flow through it, so its weights are needed again
    is_root: bool = False

    def padded(self, group: int, trained_only: bool = False) -> int:
        """Elements after each parameter's first dimension is padded to a multiple of `group`, as FSDP2 does."""
        chosen = (shape for shape, trains in zip(self.shapes, self.trained, strict=True) if trains or not trained_only)
        return sum(-(-shape[0] // group) * group * math.prod(shape[1:]) for shape in chosen)


def units_of(model_config, frozen: tuple[str, ...] = ()) -> list[Unit]:
    """The units of `util.model.shard`: every layer in the order of the forward pass, then the root."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(model_config)
    freeze(model, list(frozen))
    units, in_layers = [], set()
    blocks = len(model.model.visual.blocks)
    for number, layer in enumerate(layers(model)):
        parameters = list(layer.parameters())
        in_layers.update(map(id, parameters))
        # a tower that is not trained has no backward pass: nothing before it is trained either
        in_backward = number >= blocks or "vision" not in frozen
        units.append(Unit(*shapes_and_trained(parameters), in_backward))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_layers]
    return [*units, Unit(*shapes_and_trained(rest), in_backward=True, is_root=True)]


def shapes_and_trained(parameters: list[torch.nn.Parameter]) -> tuple[list[tuple[int, ...]], list[bool]]:
    return [tuple(parameter.shape) for parameter in parameters], [p.requires_grad for p in parameters]


def collectives(units: list[Unit], sharding: str, ranks: int, group: int, micro_batch: int, micro_batches: int):
    """What one rank takes part in during one micro-batch (counted from 0): (forward, backward), each a list of
    (collective, unit, elements of the whole tensor, ranks that take part).

    `group` ranks share one copy of the weights. Rules, with where they come from:
    - weights are gathered for the forward pass, unless they still are (ZeRO-1, `before_backward`);
    - only `full` frees a layer after its forward pass and gathers it again for the backward pass; the root never;
    - gradients are scattered in every micro-batch; ZeRO-1 does so in the last one alone;
    - copies add up their gradients in the last micro-batch (`before_backward`);
    - one rank alone gathers and scatters nothing, and one copy alone adds up nothing (FSDP2).
    """
    is_last = micro_batch == micro_batches - 1
    forward, backward = [], []
    if group > 1 and (sharding != "optimizer" or micro_batch == 0):
        # the root's forward begins first
        forward = [(GATHER, unit, unit.padded(group), group) for unit in [units[-1], *units[:-1]]]
    for number, unit in reversed(list(enumerate(units))):
        # While a layer's backward runs, FSDP2 already gathers the layer before it, even one that has none.
        wanted = unit.in_backward or units[number + 1].in_backward
        if group > 1 and sharding == "full" and wanted and not unit.is_root:
            backward.append((GATHER, unit, unit.padded(group), group))
    for unit in units:
        elements = unit.padded(group, trained_only=True)
        if elements and group > 1 and (sharding != "optimizer" or is_last):
            backward.append((SCATTER, unit, elements, group))
        if elements and ranks > group and is_last:
            backward.append((REDUCE, unit, elements // group, ranks // group))
    return forward, backward


def bytes_per_step(
    units: list[Unit], sharding: str, ranks: int, group: int, micro_batches: int, compute_bytes: int, reduce_bytes: int
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


@dataclass(frozen=True)
class Hardware:
    """Machines of 8 H100 SXM. Datasheet figures carry no efficiency; the rest is assumed. Bytes, seconds, FLOP/s."""

    peak: float = 989e12  # dense bf16 (datasheet)
    mfu: float = 0.4  # assumed: model FLOPs utilisation of the compute alone
    memory_bandwidth: float = 3.35e12  # HBM3 (datasheet)
    memory_efficiency: float = 0.8  # assumed
    memory: float = 80e9  # (datasheet)
    memory_usable: float = 0.9  # assumed: the rest is for CUDA, NCCL and fragmentation
    machine: int = 8  # GPUs
    nvlink: float = 450e9  # each direction (datasheet: 900 GB/s both)
    network: float = 50e9  # 400 Gb/s InfiniBand for each GPU, each direction (ConnectX-7 datasheet)
    link_efficiency: float = 0.8  # assumed; 350 and 360 of 450 GB/s are reported on H100 in NVIDIA/nccl issue 1281


@dataclass(frozen=True)
class Protocol:
    """How NCCL runs a collective: seconds once and for every hop, and the share of the links' bandwidth it reaches."""

    base: float
    nvlink_hop: float
    network_hop: float
    bandwidth: float


# NCCL's own model of rings and trees over NVLink and a network: its protocols LL128 and Simple (NVIDIA/nccl at b647562,
# src/graph/tuning.cc)
RING = (Protocol(14.0e-6, 1.9e-6, 4.0e-6, 0.92), Protocol(8.4e-6, 3.4e-6, 14.0e-6, 1.0))
TREE = (Protocol(14.0e-6, 1.25e-6, 8.5e-6, 0.92 * 120 / 128), Protocol(0.0, 28e-6, 28e-6, 0.92))


def collective_time(hardware: Hardware, name: str, whole: float, members: int, stride: int = 1) -> dict[str, float]:
    """Seconds of one collective over `whole` bytes among `members` ranks, every `stride`-th of them: latency, and what
    NVLink and the network need. A machine's members share its traffic, each with a network link of its own."""
    if members == 1:
        return {"latency": 0.0, "nvlink": 0.0, "network": 0.0}
    local = max(1, min(members, hardware.machine // stride))
    machines = -(-members // local)
    passes = 2 if name == REDUCE else 1
    nvlink = passes * whole * (members - 1) / members / (hardware.nvlink * hardware.link_efficiency)
    entering = passes * whole * (machines - 1) / machines  # each machine
    network = entering / local / (hardware.network * hardware.link_efficiency)
    ways = []
    for protocol in RING:
        hops = (members - machines) * protocol.nvlink_hop + (machines - 1) * protocol.network_hop
        ways.append((protocol, passes * hops))
    for protocol in TREE if name == REDUCE else ():  # NCCL has no tree for the other two
        hops = (local - 1) * protocol.nvlink_hop + math.log2(machines) * protocol.network_hop
        ways.append((protocol, passes * hops))
    options = [
        {
            "latency": protocol.base + hops,
            "nvlink": nvlink / protocol.bandwidth if local > 1 else 0.0,
            "network": network / protocol.bandwidth,
        }
        for protocol, hops in ways
    ]
    return min(options, key=duration)  # as NCCL chooses


def duration(seconds: dict[str, float]) -> float:
    """NVLink and network work at the same time on different pieces of a collective; the slower one counts."""
    return seconds["latency"] + max(seconds["nvlink"], seconds["network"])


def step_time(
    units: list[Unit], flops: float, sharding: str, ranks: int, group: int, micro_batches: int,
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
    communication = exposed = 0.0
    for micro_batch in range(micro_batches):
        both = collectives(units, sharding, ranks, group, micro_batch, micro_batches)
        for work, calls, is_forward in zip(passes, both, (True, False), strict=True):
            hidden = bare = 0.0
            for name, unit, elements, members in calls:
                whole = elements * (2 if name == GATHER else 4)
                seconds = collective_time(hardware, name, whole, members, group if name == REDUCE else 1)
                parts = {key: parts[key] + seconds[key] for key in parts}
                if unit.is_root or (is_forward and unit is units[0]):
                    bare += duration(seconds)
                else:
                    hidden += duration(seconds)
            communication += hidden + bare
            exposed += bare + max(0.0, hidden - work)
    update = update_bytes(units, group) / (hardware.memory_bandwidth * hardware.memory_efficiency)
    scalars = SCALAR_ALL_REDUCES * collective_time(hardware, REDUCE, 8, ranks, 1)["latency"]
    bound = "compute" if imbalance < 2 else "imbalance"  # the slowest rank computes more than twice the mean
    if communication > imbalance * compute:
        bound = max(parts, key=parts.get)
    return {
        "step": imbalance * compute + exposed + update + scalars, "compute": compute,
        "waiting": (imbalance - 1) * compute, "communication": communication, "exposed": exposed,
        "update": update, "scalars": scalars, **parts, "bound": bound,
    }  # fmt: skip


def update_bytes(units: list[Unit], group: int) -> float:
    """Bytes through HBM of clipping and AdamW: the norm reads gradients (4), scaling reads and writes them (8), the
    fused update reads weights, gradients and both moments (16) and writes all but the gradients (12)."""
    return 40 * sum(unit.padded(group, trained_only=True) for unit in units) / group


# ---- what fits ------------------------------------------------------------------------------------------------------


def state_bytes(units: list[Unit], group: int) -> float:
    """Weights, gradients and two moments of one rank in fp32, padding included."""
    weights = sum(unit.padded(group) for unit in units)
    return 4 * (weights + 3 * sum(unit.padded(group, trained_only=True) for unit in units)) / group


def copy_bytes(units: list[Unit], sharding: str, group: int) -> float:
    """The bf16 copies that compute works on: the root and two layers under `full`, else all of them."""
    sizes = [unit.padded(group) for unit in units]
    return 2 * (sizes[-1] + 2 * max(sizes[:-1]) if sharding == "full" else sum(sizes))


def fewest_micro_batches(
    units: list[Unit], model_config, sample: Size, samples: int, sharding: str, group: int, hardware: Hardware
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
    print("\n".join(lines))
    result = {
        **origin("scaling.py", sys.argv[1:], device=f"computed, not measured, on {processor_name()}"),
        "rows": significant(rows),
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
