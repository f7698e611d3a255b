"""What ranks send each other while they compute: the order of events in a trace of two real processes (gloo, CPU), and
what benchmarks/overlap.py reads from traces. No clock is asked."""

import json
import os
import random
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

import pytest

from benchmarks import overlap

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, LAYERS = 3, 4  # of tiny's tower and language model

# operator -> what begins with it, or is waited for
EVENTS = {
    "_c10d_functional::all_to_all_single": ("begin", "all_to_all"),
    "_c10d_functional::wait_tensor": ("wait", "all_to_all"),
    "c10d::_allgather_base_": ("begin", "all_gather"),
    "fsdp::split_with_sizes_copy": ("wait", "all_gather"),  # FSDP2 copies weights out of what was gathered
    "c10d::_reduce_scatter_base_": ("begin", "reduce_scatter"),
}


@pytest.fixture(scope="module")
def traced(tiny_path, tmp_path_factory) -> tuple[list[list[tuple[str, str]]], dict]:
    """The second step of two context ranks with sharded weights: of each rank what happened in what order, a matrix
    product being ("product", ""); and the result of the benchmark."""
    folder = tmp_path_factory.mktemp("overlap")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               str(29500 + random.SystemRandom().randrange(2000)), "benchmarks/overlap.py", "--steps", "1", "--warmup",
               "1", "--traces", str(folder), "--out", str(folder / "result.json"), "--model", str(tiny_path),
               "--device", "cpu", "--context_parallel_size", "2", "--global_batch_size", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    orders = [order_of(folder / f"step_2_rank_{rank}.json") for rank in range(2)]
    return orders, json.loads((folder / "result.json").read_text())


def order_of(trace: Path) -> list[tuple[str, str]]:
    events = json.loads(trace.read_text())["traceEvents"]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    found = []
    for event in sorted(operators, key=lambda event: event["ts"]):
        if event["name"] in EVENTS:
            found.append(EVENTS[event["name"]])
        elif overlap.computes(event):
            found.append(("product", ""))
    return found


def products_meanwhile(order: list[tuple[str, str]], kind: str) -> Counter:
    """Between a collective's begin and its wait: how many products -> how many collectives have so many. What begins
    first is waited for first."""
    under_way: deque[int] = deque()
    counts: Counter = Counter()
    products = 0
    for what, which in order:
        if what == "product":
            products += 1
        elif which == kind and what == "begin":
            under_way.append(products)
        elif which == kind:
            counts[products - under_way.popleft()] += 1
    assert not under_way, f"{len(under_way)} of {kind} were never waited for"
    return counts


def test_queries_travel_while_keys_and_values_are_made(traced):
    """In each layer: on the way there beside two products, and their gradients beside the four of the way back. Beside
    keys and values, what was attended, and visual tokens nothing is computed."""
    for order in traced[0]:
        of_layers = 2 * LAYERS * 2 + 2
        assert products_meanwhile(order, "all_to_all") == {2: LAYERS, 4: LAYERS, 0: of_layers}


def test_weights_are_gathered_while_the_layer_before_computes(traced):
    """All of them, forward and backward, but the root's, with which a pass begins."""
    for order in traced[0]:
        counts = products_meanwhile(order, "all_gather")
        assert counts.total() == 1 + 2 * (BLOCKS + LAYERS)
        assert counts[0] == 1, f"{counts[0]} gathers have nothing beside them: {dict(counts)}"


def test_gradients_are_reduced_during_the_backward_pass(traced):
    """Those of each layer as soon as it is through, and after the last product those of the root alone."""
    for order in traced[0]:
        left = [order[number:].count(("product", "")) for number, event in enumerate(order)
                if event == ("begin", "reduce_scatter")]  # fmt: skip
        assert len(left) == 1 + BLOCKS + LAYERS
        assert left.count(0) == 1, f"products that follow after each reduction: {left}"
        assert len(set(left)) == len(left), f"several are reduced at one time: {left}"


def test_the_benchmark_says_how_often_ranks_talk(traced):
    kinds = traced[1]["kinds"]
    assert kinds["all_to_all"]["calls"] == 6 * LAYERS + 2
    assert kinds["all_gather"]["calls"] == 1 + 2 * (BLOCKS + LAYERS)
    for name, row in kinds.items():
        assert 0 <= row["hidden_ms"] <= row["ms"], name


def test_what_a_trace_of_a_gpu_says():
    """Two products from 0 to 20 and from 30 to 50; a gather from 10 to 40 has half of each beside it. An all-to-all
    runs as single messages do: its record tells what it is. What the host does counts for nothing."""

    def kernel(name: str, begin: float, end: float, **told) -> dict:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "args": told}

    events = [
        kernel("nvjet_gemm", 0, 20),
        kernel("ampere_bf16_gemm", 30, 50),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgs)", 10, 40),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgs)", 45, 60, **{"Collective name": "all_to_allv"}),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgs)", 70, 80),
        kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 48, 49, **{"Collective name": "_reduce_scatter_base"}),
        {**kernel("aten::mm", 60, 90), "cat": "cpu_op"},
    ]
    found = overlap.read(events, on_gpu=True)
    assert found == {
        "all_gather": {"calls": 1, "microseconds": 30, "hidden": 20},
        "all_to_all": {"calls": 1, "microseconds": 15, "hidden": 5},
        "send": {"calls": 1, "microseconds": 10, "hidden": 0},
        "reduce_scatter": {"calls": 1, "microseconds": 1, "hidden": 1},
    }
    assert overlap.summary([found, {}])["all_gather"] == {
        "calls": 0.5,
        "ms": 0.015,
        "hidden_ms": 0.01,
        "hidden": 0.6667,
    }
