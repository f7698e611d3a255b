"""How much of the time in which ranks talk to each other lies under computation, by kind of collective.

    torchrun --nproc_per_node 8 benchmarks/overlap.py --steps 3 --model MODEL --data DATA.json --sharding full

Trains on this job's ranks as finetune_distributed.py does with the same flags, and looks at the passes of some steps
with torch's profiler. On a GPU kernels are looked at. On a CPU, where nothing of it says how fast anything is, gloo's
threads and torch's operators stand for them. Nothing of the run is kept.
"""

# ruff: noqa: E402

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.profiler import ProfilerActivity, profile

import finetune_distributed
from benchmarks.report import origin, write_result
from util import ranks
from util.command_line import run_command
from util.config import parse_arguments
from util.parallel import distributed

Span = tuple[float, float]  # microseconds: begin, end

# operators that compute on a CPU
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")

# A part of a collective's name, in NCCL's kernels, in torch's records beside these, or in gloo's threads -> its kind
KINDS = {
    "alltoall": "all_to_all",
    "alltoallv": "all_to_all",
    "reducescatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "send",
}


def kind_of(event: dict) -> str:
    """Which collective an event of a trace is; "" for one that is none.

    NCCL sends the parts of an all-to-all as it sends single messages; torch says beside the kernel which one it was.
    """
    name = event["name"]
    if not name.startswith(("nccl", "gloo:")):
        return ""
    told = event.get("args", {}).get("Collective name") or name
    plain = told.lower().replace("_", "")
    return next((kind for part, kind in KINDS.items() if part in plain), "other")


def computes(event: dict) -> bool:
    if event.get("cat") == "kernel":
        return not kind_of(event)
    return event.get("cat") == "cpu_op" and event["name"].startswith(PRODUCTS)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not touch, in their order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def in_common(one: list[Span], other: list[Span]) -> float:
    """Microseconds that two lists of spans have in common, each as `merged` gives it."""
    total = 0.0
    first = 0
    for begin, end in one:
        while first < len(other) and other[first][1] <= begin:
            first += 1
        number = first
        while number < len(other) and other[number][0] < end:
            total += min(end, other[number][1]) - max(begin, other[number][0])
            number += 1
    return total


def read(events: list[dict], on_gpu: bool) -> dict[str, dict[str, float]]:
    """By kind of collective: how many there are in a trace, their microseconds, and those under computation."""
    where = ("kernel",) if on_gpu else ("cpu_op", "user_annotation")
    spans: dict[str, list[Span]] = {}
    computation = []
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in where:
            continue
        span = (event["ts"], event["ts"] + event["dur"])
        if kind := kind_of(event):
            spans.setdefault(kind, []).append(span)
        elif computes(event):
            computation.append(span)
    beside = merged(computation)
    found = {}
    for kind, of_kind in spans.items():
        time = merged(of_kind)
        found[kind] = {
            "calls": len(of_kind),
            "microseconds": sum(end - begin for begin, end in time),
            "hidden": in_common(time, beside),
        }
    return found


class Looked(Exception):
    """All steps were looked at: the run ends here."""


def train(config, warmup: int, traces: Path) -> list[dict]:
    """Train until the last step; what was read of the passes of each that follows `warmup`."""
    found = []
    run = distributed.EvenPasses.run

    def looked_at(passes, step: int, *arguments):
        if step <= warmup:
            return run(passes, step, *arguments)
        on_gpu = passes.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities) as record:
            loss = run(passes, step, *arguments)
            if on_gpu:
                torch.cuda.synchronize(passes.device)
        file = traces / f"step_{step}_rank_{ranks.rank_and_size()[0]}.json"
        record.export_chrome_trace(str(file))
        found.append(read(json.loads(file.read_text(encoding="utf-8"))["traceEvents"], on_gpu))
        if step == config.max_steps:
            raise Looked
        return loss

    with patch.object(distributed.EvenPasses, "run", looked_at):
        try:
            finetune_distributed.train(config)
        except Looked:
            return found
    raise AssertionError(f"the run ended before step {config.max_steps}")


def summary(of_steps: list[dict]) -> dict[str, dict[str, float]]:
    """Of steps of all ranks: for each kind the mean of a step and rank."""
    found = {}
    for kind in sorted(set().union(*of_steps)):
        rows = [of_step.get(kind, {"calls": 0, "microseconds": 0.0, "hidden": 0.0}) for of_step in of_steps]
        calls, time, hidden = (sum(row[key] for row in rows) / len(rows) for key in ("calls", "microseconds", "hidden"))
        found[kind] = {
            "calls": round(calls, 1),
            "ms": round(time / 1000, 3),
            "hidden_ms": round(hidden / 1000, 3),
            "hidden": round(hidden / (time or 1), 4),
        }
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=3, help="that are looked at")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--traces", type=Path, help="keep the traces in this folder (chrome://tracing, Perfetto)")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    own, flags = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        traces = own.traces or Path(folder)
        traces.mkdir(parents=True, exist_ok=True)
        steps = ["--max_steps", str(own.warmup + own.steps)]
        # all ranks of a job need the same folder, though only the first writes into it
        run = Path(tempfile.gettempdir()) / f"overlap_{os.environ.get('MASTER_PORT', os.getpid())}"
        config = parse_arguments(parser.description or "", [*flags, *steps, "--output_dir", str(run)])
        found = train(config, own.warmup, traces)
        shares = summary([step for of_rank in ranks.gather_on_all(found) for step in of_rank])
    if not ranks.is_first():
        return
    shutil.rmtree(run, ignore_errors=True)
    for kind, row in shares.items():
        print(f"{kind:>15} {row['calls']:8} calls {row['ms']:10.3f} ms, {row['hidden']:.0%} of it under computation")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {**origin("overlap.py", arguments, device=device), "ranks": ranks.rank_and_size()[1], "kinds": shares}
    write_result(result, own.out)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
