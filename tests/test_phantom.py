"""CUDA's host code without a GPU: PHANTOM_GPU names a folder whose `run` starts Python with stand-ins for CUDA's libraries,
in which every call succeeds, computes nothing and is counted. Nothing is asserted on values, which are meaningless there.

It shows what a CPU cannot: arguments, dtypes and devices that a kernel refuses, host syncs, copies from memory that is
not pinned, and the allocator's peak of a real-size step against the forecast.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.official import official_config

ROOT = Path(__file__).resolve().parent.parent
MOST_RESIDENT = 8.0  # GiB; a run of tiny stays near 1, but sizes made of values that mean nothing took it to 4.2 once
LIMIT = 900  # seconds, for what hangs

EVALUATED = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2, "eval_samples": 2}
SAVED = {"save_every": 2}
LORA = {"lora_rank": 4}
# Script, settings, the step to resume at: in every run of the suite, the rest with --slow. finetune_distributed.py comes
# first in its process, as it starts gloo too; NCCL alone, which finetune.py starts, knows no stand-in.
SHORT = {
    "distributed": ("finetune_distributed", {**EVALUATED, **SAVED}, 2),
    "everything": ("finetune", {**EVALUATED, **SAVED, "activation_checkpointing": "full"}, 2),
    "eight bits": ("finetune", {**SAVED, "optimizer": "adamw_8bit"}, 2),
    "qlora": ("finetune", {**SAVED, **EVALUATED, **LORA, "quantize": "nf4", "lora_vision": True}, 2),
}
LONG = {
    "distributed lora": ("finetune_distributed", {**EVALUATED, **SAVED, **LORA}, 2),
    "full": ("finetune", {**EVALUATED, **SAVED, "num_workers": 2}, 2),
    "float32": ("finetune", {**EVALUATED, **SAVED, "dtype": "float32"}, 2),
    "eight bits, float32": ("finetune", {**SAVED, "dtype": "float32", "optimizer": "adamw_8bit"}, 2),
    "eight bits, lora": ("finetune", {**SAVED, **EVALUATED, **LORA, "optimizer": "adamw_8bit"}, 2),
    "flash": ("finetune", {**EVALUATED, **SAVED, "optimizer": "adamw_flash"}, 2),
    "flash, float32": ("finetune", {**SAVED, "dtype": "float32", "optimizer": "adamw_flash"}, 2),
    "lora": ("finetune", {**EVALUATED, **SAVED, **LORA, "lora_dropout": 0.1}, 2),
    "lora, vision": ("finetune", {**EVALUATED, **SAVED, **LORA, "lora_vision": True}, 2),
    "dora": ("finetune", {**EVALUATED, **SAVED, **LORA, "lora_dora": True}, 2),
    "qlora, recomputed": ("finetune", {**LORA, "quantize": "nf4", "activation_checkpointing": "full"}, None),
    "frozen tower": ("finetune", {**EVALUATED, **SAVED, "freeze": ["vision"]}, 2),
    "frozen merger": ("finetune", {**SAVED, "freeze": ["merger"]}, None),
    "frozen language model": ("finetune", {**EVALUATED, **SAVED, "freeze": ["language_model"]}, 2),
    "one sample a pass": ("finetune", {**SAVED, "micro_batch_size": 1, "global_batch_size": 4}, None),
}


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A function (words, environment) that runs Python so, and returns what tests/phantom_runs.py counted."""
    folder = Path(os.environ.get("PHANTOM_GPU", ROOT.parent / "shared" / "phantom_gpu"))
    if not (folder / "run").is_file():
        pytest.skip("the stand-ins for CUDA's libraries are not here; name their folder in PHANTOM_GPU")
    if not (shutil.which("cc") and shutil.which("nm") and torch.version.cuda):
        pytest.skip("needs cc, nm and a torch that is built for CUDA")

    def run(words: list[str], **environment: str) -> list[dict]:
        log = tmp_path_factory.mktemp("phantom") / "log"
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        environment["PYTHONPATH"] = str(ROOT)
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):  # the stand-in has no virtual memory to expand
            environment.pop(name, None)
        with open(log, "w") as file:
            job = subprocess.Popen([folder / "run", *words], cwd=ROOT, env=environment, stdout=file, stderr=file)
        watch(job)
        printed = log.read_text(errors="replace")
        assert job.returncode == 0, printed[-6000:]
        return [json.loads(line[8:]) for line in printed.splitlines() if line.startswith("COUNTED ")]

    return run


def watch(job: subprocess.Popen, most_resident: float = MOST_RESIDENT) -> None:
    """Wait for its end; it is made to end where its resident set grows without bound: beyond so many GiB.

    A size that the device tells (of masked_select, nonzero, a printed tensor) is whatever was copied last, up to any
    number: one such result brought to the CPU took 4.6 GiB. An error that prints parameters does so.
    """
    deadline = time.monotonic() + LIMIT
    while job.poll() is None:
        try:
            status = Path(f"/proc/{job.pid}/status").read_text()
        except OSError:  # it has just ended
            continue
        resident = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0) / 2**20
        if resident > most_resident or time.monotonic() > deadline:
            job.kill()
            job.wait()
            raise AssertionError(f"resident set {resident:.1f} GiB, {deadline - time.monotonic():.0f} s were left")
        time.sleep(0.1)


def train(phantom, chosen: dict, tiny_path: Path, folder: Path) -> dict[str, dict]:
    """The runs of `chosen`, one after the other in one process; what was counted in each."""
    wanted = []
    for number, (script, changes, resume_at) in enumerate(chosen.values()):
        own = {"device": "auto", "dtype": "auto", "max_steps": 3, "global_batch_size": 2, "learning_rate": 1e-5}
        wanted.append([script, runs.settings(tiny_path, folder / str(number), **{**own, **changes}), resume_at])
    (folder / "runs.json").write_text(json.dumps(wanted))
    found = phantom(["tests/phantom_runs.py", str(folder / "runs.json")])
    return dict(zip(chosen, found, strict=True))


def check(name: str, found: dict, changes: dict, resume_at: int | None) -> None:
    assert found["steps"] == 3, name
    assert found["resumed"] == (3 - resume_at if resume_at else 0), name
    model = "adapter_model.safetensors" if "lora_rank" in changes else "model.safetensors"
    assert {model, "metrics.jsonl", "loss.png"} <= {*found["files"]}, name
    assert found["resident_gib"] < MOST_RESIDENT, name
    # the first step makes buffers, and beside the third one's passes a save copies to the CPU
    check_step(name, found["counted"][1], reads_by_optimizer="optimizer" in changes)


def check_step(name: str, step: dict, reads_by_optimizer: bool = False) -> None:
    """No word from the device in the passes, two numbers after them, and no copy that waits for memory to be pinned."""
    passes, after = step["passes"], step["after"]
    assert passes["launches"] > 100, f"{name}: nothing ran on the device"
    assert passes["matmuls"] > 10, name
    for kind in ("stream_synchronise", "device_synchronise", "event_synchronise", "device_to_host"):
        assert passes[kind] == 0, f"{name}: {passes[kind]} x {kind} in the passes"
    assert after["device_to_host"] <= 2, f"{name}: {after['device_to_host']} numbers read"
    for part in (passes, after):
        assert part["pageable_host_to_device"] == 0, f"{name}: {part['pageable_host_to_device']} pageable copies"
    if not reads_by_optimizer:  # bitsandbytes waits for each parameter
        assert after["stream_synchronise"] + after["device_synchronise"] <= 2, f"{name}: {after}"


def test_trainings_end_with_evaluation_saving_resuming_and_answers(phantom, tiny_path, tmp_path):
    for name, found in train(phantom, SHORT, tiny_path, tmp_path).items():
        check(name, found, *SHORT[name][1:])


@pytest.mark.slow
def test_every_kind_of_training_ends(phantom, tiny_path, tmp_path):
    here = {name: run for name, run in LONG.items() if find_spec("flashoptim") or "flash" not in name}
    for name, found in train(phantom, here, tiny_path, tmp_path).items():
        check(name, found, *LONG[name][1:])


STEPS = {"full": {}, "lora": {"lora_rank": 16}, "recomputed": {"activation_checkpointing": "full"}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "full" else pytest.mark.slow) for name in STEPS]
)
def test_a_real_size_step_asks_the_device_for_nothing(name, phantom, request):
    request.getfixturevalue("official_processor")  # its folder holds the published config
    folder = Path(os.environ.get("QWEN2_VL_REFERENCE", ROOT.parent / "shared" / "qwen2_vl_reference"))
    (found,) = phantom(["tests/phantom_runs.py", "step", str(folder / "config.json"), json.dumps(STEPS[name])])
    for step in found["counted"][1:]:
        check_step(name, step)
        assert step["passes"]["matmuls"] > 500
    gib = 2**30
    assert found["free"] / gib < 79
    told = f"peak {found['peak'] / gib:.1f} GiB, reserved {found['reserved'] / gib:.1f}, forecast {found['forecast'] / gib:.1f}"
    print(told)
    assert abs(found["forecast"] / found["peak"] - 1) < 0.08, told
    assert found["resident_gib"] < MOST_RESIDENT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("full", "lora", "recomputed")]
)
def test_few_graphs_are_compiled_for_a_gpu(name, phantom, request):
    """Inductor adds conditions of its own to those of dynamo, which tests/test_compile.py counts."""
    request.getfixturevalue("official_processor")
    folder = Path(os.environ.get("QWEN2_VL_REFERENCE", ROOT.parent / "shared" / "qwen2_vl_reference"))
    (found,) = phantom(["tests/phantom_runs.py", "graphs", str(folder / "config.json"), json.dumps(STEPS[name])])
    assert not found["cannot"]
    assert found["shapes"] == 50
    assert 0 < found["graphs"] <= 8, f"{found['graphs']} graphs"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["qwen2.5_3b", "qwen3_4b"])
def test_few_graphs_are_compiled_of_other_families(size, phantom, tmp_path):
    official_config(size).save_pretrained(tmp_path)
    (found,) = phantom(["tests/phantom_runs.py", "graphs", str(tmp_path / "config.json"), "{}"])
    assert not found["cannot"]
    assert found["shapes"] == 50
    assert 0 < found["graphs"] <= 8, f"{found['graphs']} graphs"


FEW = ["2b_short_recomputed", "2b_short_full_twice", "2b_text_full"]


def measured(phantom, folder: Path, *words: str) -> dict[str, dict]:
    """The cases of benchmarks/memory_table.py, by name, on a device of 400 GiB."""
    out = folder / "table.json"
    arguments = ["--no-updates", "--most", "395", "--out", str(out), *words]
    phantom(["benchmarks/memory_table.py", *arguments], PHANTOM_GIB="400")
    return json.loads(out.read_text())["cases"]


def check_forecasts(rows: dict[str, dict]) -> None:
    wrong = {}
    for name, row in rows.items():
        print(f"{name}: allocated {row['allocated_gib']} GiB, forecast {row['forecast_gib']}, {row['peak_at']}")
        if abs(row["ratio"] - 1) > 0.08:
            wrong[name] = row
    assert not wrong, "forecasts that are more than 8 % beside what was allocated"


def test_the_peak_of_real_size_steps_is_forecast_within_8_percent(phantom, tmp_path):
    rows = measured(phantom, tmp_path, "--compile", "off", "--exact", "--cases", *FEW)
    assert set(rows) == set(FEW)
    check_forecasts(rows)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_every_peak_is_forecast_within_8_percent(compiled, phantom, tmp_path):
    """Sizes x settings x loads: 41 cases."""
    rows = measured(phantom, tmp_path, "--compile", compiled)
    assert len(rows) >= 40
    check_forecasts(rows)


@pytest.mark.slow
def test_a_row_of_the_budget_table_runs_to_its_end(phantom, tmp_path):
    """2B with weights of 4 bits on a card of 16 GiB: the smallest of benchmarks/budget_table.py."""
    out = tmp_path / "row.json"
    phantom(["benchmarks/budget_table.py", "--row", "2b_qlora", "--out", str(out)], PHANTOM_GIB="16")
    row = json.loads(out.read_text())["row"]
    assert row["run"] == "to its end", row
    assert row["allocated_gib"] <= row["reserved_gib"] <= row["free_gib"], row
