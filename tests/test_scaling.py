"""benchmarks/scaling.py: its bytes against those that real processes hand to their collectives, its times against what
must hold of them, and docs/scaling.md against what it prints."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import Qwen2VLForConditionalGeneration

from benchmarks import scaling
from benchmarks.scaling import bytes_per_step, step_time
from tests.official import official_config
from util.cost.layouts import Unit, state_bytes, units_of
from util.cost.links import Hardware, collective_time, duration
from util.model import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
WIDTHS = {"float32": (4, 4), "bfloat16": (2, 4), "float64": (8, 8)}  # bytes of an element gathered and reduced

# Each as finetune_distributed.py runs it, with one and with two micro-batches
CASES = {
    2: [
        {"sharding": "full", "dtype": "float32"},
        {"sharding": "gradients", "dtype": "float32"},
        {"sharding": "optimizer", "dtype": "float32"},
        {"sharding": "none", "dtype": "float32"},
        {"sharding": "full", "dtype": "bfloat16"},
        {"sharding": "gradients", "dtype": "bfloat16"},
        {"sharding": "optimizer", "dtype": "bfloat16"},
        {"sharding": "none", "dtype": "bfloat16"},
        {"sharding": "full", "dtype": "float64", "activation_checkpointing": "full"},
        {"sharding": "full", "dtype": "float32", "freeze": ["vision"]},
        {"sharding": "full", "dtype": "float32", "freeze": ["language_model"]},
    ],
    4: [
        {"sharding": "full", "dtype": "bfloat16"},
        {"sharding": "none", "dtype": "float32"},
        {"sharding": "full", "dtype": "bfloat16", "shard_group_size": 2},
        {"sharding": "gradients", "dtype": "float32", "shard_group_size": 2},
        {"sharding": "optimizer", "dtype": "bfloat16", "shard_group_size": 2},
    ],
}


@pytest.fixture(scope="module")
def uneven_path(tiny_path, tmp_path_factory) -> Path:
    """The tiny checkpoint with few layers, and widths that neither 2 nor 4 ranks divide, so that shards are padded."""
    folder = tmp_path_factory.mktemp("uneven") / "model"
    shutil.copytree(tiny_path, folder)
    config = load_config(str(folder))
    text, tower = config.text_config, config.vision_config
    text.num_hidden_layers = tower.depth = 2
    text.layer_types, text.intermediate_size, text.vocab_size = text.layer_types[:2], 381, text.vocab_size + 1
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def count(ranks: int, path: Path, folder: Path) -> list[list[list[dict]]]:
    """What each rank found: for every case, its two steps."""
    common = {"model": str(path), "data": [str(ROOT / "train_data" / "data.json")], "device": "cpu",
              "max_pixels": 28 * 28 * 4, "min_pixels": 3136, "video_max_frames": 4}  # fmt: skip
    file = folder / "cases.json"
    file.write_text(json.dumps([{**common, **case} for case in CASES[ranks]]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port",
               str(29500 + random.SystemRandom().randrange(2000)), "tests/count_bytes.py", str(file), str(folder)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_are_those_of_real_processes(ranks, uneven_path, tmp_path):
    model_config, found = load_config(str(uneven_path)), count(ranks, uneven_path, tmp_path)
    for number, case in enumerate(CASES[ranks]):
        units = units_of(model_config, tuple(case.get("freeze", ())))
        group = 1 if case["sharding"] == "none" else case.get("shard_group_size", ranks)
        assert group == 1 or sum(unit.padded(group) for unit in units) > sum(unit.padded(1) for unit in units)
        compute_bytes, reduce_bytes = WIDTHS[case["dtype"]]
        for step, micro_batches in enumerate((2, 1)):
            totals = bytes_per_step(units, case["sharding"], ranks, group, micro_batches, compute_bytes, reduce_bytes)
            for rank in range(ranks):
                real, where = found[rank][number][step], f"{case}, {micro_batches} micro-batches, rank {rank}"
                for name, total in totals.items():
                    assert real["calls"].get(name, 0) == total["calls"], f"{where}: calls of {name}"
                    assert real["bytes"].get(name, 0) == total["input_bytes"], f"{where}: bytes of {name}"
                assert sum(real["calls"].values()) == real["numbered"], f"{where}: a collective escaped the count"
                # Around the passes: twelve counts (samples, tokens, visual, supervised, their weight, unread, skipped,
                # and that by its five reasons) and the loss in float64, and, where gradients are shards, the norms of all parameters in one
                # vector. Nothing else.
                assert {key for key in real["calls"] if key.startswith("scalar_")} == {"scalar_all_reduce"}, where
                norms = sum(sum(unit.trained) for unit in units) * reduce_bytes if group > 1 else 0
                assert real["calls"]["scalar_all_reduce"] == (3 if group > 1 else 2), where
                assert real["bytes"]["scalar_all_reduce"] == (12 + 1) * 8 + norms, where


def test_parameters_of_the_units_are_those_of_the_model():
    for size, parameters in (("2b", 2_208_985_600), ("7b", 8_291_375_616)):
        units = units_of(official_config(size))
        assert len(units) == 32 + 28 + 1
        assert sum(unit.padded(1) for unit in units) == parameters
        assert state_bytes(units, 1) == 16 * parameters


def test_padding_by_hand():
    unit = Unit([(5, 3), (4,)], [True, False], True)
    assert unit.padded(1) == 19
    assert unit.padded(4) == 8 * 3 + 4
    assert unit.padded(4, trained_only=True) == 8 * 3


@cache
def official_units(size: str) -> tuple[Unit, ...]:
    return units_of(official_config(size))


def test_none_is_one_all_reduce_of_fp32_gradients():
    for ranks in (8, 1024):
        for micro_batches in (1, 4):
            totals = bytes_per_step(official_units("2b"), "none", ranks, 1, micro_batches, 2, 4)
            assert totals["all_gather"]["calls"] == totals["reduce_scatter"]["calls"] == 0
            assert totals["all_reduce"]["calls"] == 61
            assert totals["all_reduce"]["input_bytes"] == 4 * 2_208_985_600
            by_hand = 2 * (ranks - 1) / ranks * 4 * 2_208_985_600
            assert totals["all_reduce"]["ring_bytes"] == pytest.approx(by_hand, rel=1e-12)


def test_accumulation_multiplies_what_the_sharding_says():
    def totals(sharding: str, micro_batches: int, group: int = 64) -> dict:
        return bytes_per_step(official_units("7b"), sharding, 64, group, micro_batches, 2, 4)

    for sharding in ("full", "gradients"):
        one, three = totals(sharding, 1), totals(sharding, 3)
        assert all(three[name]["input_bytes"] == 3 * one[name]["input_bytes"] for name in one)
    assert totals("optimizer", 1) == totals("optimizer", 3) == totals("gradients", 1)
    one, three = totals("full", 1, 8), totals("full", 3, 8)
    assert three["all_reduce"] == one["all_reduce"], "replicas add up once a step"
    assert three["reduce_scatter"]["input_bytes"] == 3 * one["reduce_scatter"]["input_bytes"]


# ---- times ----------------------------------------------------------------------------------------------------------


def seconds(
    sharding: str = "full", ranks: int = 64, group: int | None = None, micro_batches: int = 1, **others
) -> dict:
    hardware = replace(Hardware(), **{key: others.pop(key) for key in list(others) if hasattr(Hardware, key)})
    others = {"flops": 360e12, **others}
    return step_time(
        official_units("2b"), others.pop("flops"), sharding, ranks, group or ranks, micro_batches, hardware, **others
    )


def test_a_step_takes_no_less_than_its_parts():
    for sharding, group in (("full", None), ("full", 8), ("none", 1)):
        for ranks in (8, 64, 1024):
            parts = seconds(sharding, ranks, group)
            assert parts["compute"] == pytest.approx(360e12 / 989e12 / 0.4)
            assert parts["step"] >= max(parts["compute"], parts["communication"]), (sharding, ranks)
            assert parts["step"] <= sum(parts[key] for key in ("compute", "communication", "update", "scalars")) + 1e-12
            assert 0 < parts["exposed"] <= parts["communication"]


def test_times_grow_and_shrink_with_what_they_depend_on():
    def growing(values: list[float]) -> bool:
        return all(a <= b for a, b in pairwise(values))

    steps = (8, 64, 512)
    for sharding, group in (("full", None), ("full", 8), ("none", 1)):
        assert growing([seconds(sharding, ranks, group)["communication"] for ranks in steps])
    assert growing([seconds(flops=flops)["step"] for flops in (1e12, 1e14, 1e15)])
    assert growing([seconds(imbalance=value)["step"] for value in (1.0, 1.2, 2.0)])
    assert growing([seconds(mfu=value)["step"] for value in (0.6, 0.4, 0.2)])
    assert growing([seconds(link_efficiency=value, flops=1e12)["step"] for value in (0.9, 0.5, 0.1)])
    assert growing([seconds(micro_batches=count)["communication"] for count in (1, 2, 8)])
    assert growing([seconds("optimizer", micro_batches=count)["communication"] for count in (8, 2, 1)])
    for name in ("all_gather", "all_reduce"):
        assert growing([duration(collective_time(Hardware(), name, size, 64)) for size in (1e3, 1e6, 1e9)])
        assert growing([duration(collective_time(Hardware(), name, 1e8, ranks)) for ranks in (1, 2, 8, 16, 1024)])


def test_groups_of_all_ranks_are_full_sharding_and_groups_of_one_are_none():
    units = official_units("2b")
    assert seconds("full", 64, 64) == seconds("full", 64)
    for micro_batches in (1, 3):
        of_one = bytes_per_step(units, "full", 64, 1, micro_batches, 2, 4)
        assert of_one == bytes_per_step(units, "none", 64, 1, micro_batches, 2, 4)
    assert seconds("full", 64, 1) == seconds("none", 64, 1)


def test_a_collective_by_hand():
    """1 GB, Simple protocol (slow links make its latency small beside its bandwidth)."""
    hardware = replace(Hardware(), nvlink=450e7, network=50e7)
    within = duration(collective_time(hardware, "all_gather", 1e9, 8))
    assert within == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 1e9 * 7 / 8 / (450e7 * 0.8))
    two_machines = duration(collective_time(hardware, "reduce_scatter", 1e9, 16))
    assert two_machines == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6 + 1e9 * 15 / 16 / (450e7 * 0.8))
    one_of_each = duration(collective_time(hardware, "all_reduce", 1e9, 4, stride=8))
    assert one_of_each == pytest.approx(8.4e-6 + 6 * 14e-6 + 2 * 1e9 * 3 / 4 / (50e7 * 0.8))


def test_the_imbalance_is_that_of_the_benchmark():
    rows = json.loads((ROOT / "benchmarks" / "results" / "balance.json").read_text())["rows"]
    for row in rows:
        assert scaling.imbalance(row["ranks"], row["samples_per_rank"]) == row["dealt_mean"]
    assert scaling.imbalance(8, 8) < scaling.imbalance(16, 8) < scaling.imbalance(64, 8)


def test_what_fits():
    units, config, hardware = official_units("7b"), official_config("7b"), Hardware()
    arguments = (units, config, scaling.SAMPLE, 8)
    assert scaling.fewest_micro_batches(*arguments, "none", 1, hardware) is None
    assert scaling.fewest_micro_batches(*arguments, "full", 8, hardware) > 1
    assert scaling.fewest_micro_batches(*arguments, "full", 8, replace(hardware, memory=1e15)) == 1


# ---- the document ---------------------------------------------------------------------------------------------------


def test_the_document_holds_what_the_command_prints():
    lines, _ = scaling.tables(scaling.parser().parse_args([]))
    printed = [line for line in lines if line.startswith("|")]
    text = DOCUMENT.read_text()
    tables = text.split("<!-- printed -->")[1::2]
    assert [line for part in tables for line in part.splitlines() if line.startswith("|")] == printed


def test_figures_in_the_text_are_computed():
    text = " ".join(DOCUMENT.read_text().split())
    gathered = duration(collective_time(Hardware(), "all_gather", 2 * 2**30, 256))
    assert f"computes {2 * 2**30 * 255 / 256 / gathered / 1e9:.0f} GB/s" in text
    layer = max(unit.padded(1024) for unit in official_units("2b")[:-1])
    each = collective_time(Hardware(), "all_gather", 2 * layer, 1024)
    assert f"{1000 * each['latency']:.1f} ms of latency beside {1000 * each['network']:.2f} ms on the network" in text
    _, rows = scaling.tables(scaling.parser().parse_args([]))
    last = {row["model"]: row for row in rows["fixed_global_batch"] if (row["sharding"], row["ranks"]) == ("full", 256)}
    falls = [f"{last[size]['even']['efficiency']:.0%}" for size in ("2b", "7b")]
    assert f"2B falls to {falls[0]} and 7B to {falls[1]} on 256 GPUs" in text
    assert f"as much as {last['2b']['imbalance']:.2f} mean samples" in text
    sent = [sum(value for key, value in row.items() if key.endswith("_sent")) for row in rows["bytes"]]
    assert f"({sent[0] / 1e9:.1f} against {sent[3] / 1e9:.1f})" in text
    for size in ("2b", "7b"):
        frozen = bytes_per_step(units_of(official_config(size), ("vision",)), "full", 64, 64, 1, 2, 4)
        whole = bytes_per_step(official_units(size), "full", 64, 64, 1, 2, 4)
        saved = 1 - sum(t["ring_bytes"] for t in frozen.values()) / sum(t["ring_bytes"] for t in whole.values())
        assert f"{saved:.0%} ({size.upper()})" in text


def test_the_result_file_holds_the_same_rows():
    result = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    assert {"command", "device", "commit", "rows"} <= result.keys()
    assert result["device"].startswith("computed, not measured")
    _, rows = scaling.tables(scaling.parser().parse_args([]))
    layouts = result["rows"].pop("layouts")
    assert result["rows"] == scaling.significant(rows)
    assert [(row["model"], row["samples"], row["gpus"]) for row in layouts] == scaling.LAYOUTS
    in_the_page = DOCUMENT.read_text().split("<!-- layouts -->")[1]
    assert in_the_page.split("\n")[1:-1] == scaling.layout_table(layouts)
