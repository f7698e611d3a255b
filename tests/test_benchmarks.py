"""The benchmark runs, and measures equal work: it asserts that both loops see the same tokens and give the same loss."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HAS_TRL = importlib.util.find_spec("trl") is not None


def run(*arguments: str, script: str = "train_step.py", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_train_step_compares_both_loops(tmp_path):
    file = tmp_path / "results" / "step.json"
    done = run(
        "--size", "tiny", "--compare", "--blocks", "2", "--steps", "1", "--warmup", "1",
        "--global_batch_size", "4", "--device", "cpu", "--out", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert result["data"]["samples"] == 4
    assert result["ratio"]["median"] > 0
    assert set(result["work"]["shares"]) == {"vision", "merger", "language_model", "head"}
    assert sum(result["work"]["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert abs(result["first_loss"]["ours"] - result["first_loss"]["plain"]) < 1e-3
    # one padded micro-batch a step: the mean of the plain loop is over the same tokens, so training stays the same
    ours, plain = (result["loops"][name]["losses"] for name in ("ours", "plain"))
    assert all(abs(a - b) < 1e-3 for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    "peer", ["plain", pytest.param("trl", marks=pytest.mark.skipif(not HAS_TRL, reason="TRL is not installed"))]
)
def test_peers_train_the_same_and_take_turns(peer, tmp_path):
    file = tmp_path / "peers.json"
    done = run(
        "--size", "tiny", "--loops", "ours", peer, "--steps", "2", "--global_batch_size", "4", "--blocks", "2", "--warmup", "1",
        "--device", "cpu", "--out", str(file), script="peers.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert result["samples"] == 8
    assert [len(clocks["wall"]) for clocks in result["seconds"].values()] == [2, 2]
    assert result["ours_is_times_as_fast_as"][peer]["min"] > 0
    assert result["first_loss"][peer] == pytest.approx(result["first_loss"]["ours"], abs=1e-3)


def test_peers_that_would_not_do_equal_work_end_with_an_error():
    """A peer whose second step gives another loss: it was shown other samples, or trained at another rate."""
    from types import SimpleNamespace

    from benchmarks import peers

    work = SimpleNamespace(plain_steps=[[[0]], [[1]]], dtype=torch.float32)
    peers.check_losses({"ours": [2.0, 1.5], "plain": [2.0, 1.5]}, work)
    with pytest.raises(AssertionError, match="step 2"):
        peers.check_losses({"ours": [2.0, 1.5], "plain": [2.0, 1.7]}, work)


def test_peers_without_trl_say_how_to_get_it():
    if HAS_TRL:
        pytest.skip("TRL is installed")
    done = run("--size", "tiny", "--loops", "ours", "trl", script="peers.py")
    assert done.returncode == 2
    assert "requirements-peers.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_real_size_without_its_config_is_a_clear_error(tmp_path):
    done = run("--size", "2b", QWEN2_VL_REFERENCE=str(tmp_path))
    assert done.returncode == 2
    assert "QWEN2_VL_REFERENCE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_default_adapters_gain_nine_tenths_of_a_full_run_and_at_its_rate_do_not():
    """A short form of benchmarks/lora_gain.py, through the command line."""
    arguments = ["--base_steps", "200", "--steps", "100", "--charts", "600", "--rows", "lora", "lora_1e-5"]
    command = [sys.executable, "benchmarks/lora_gain.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows["full"]["gain"] > 0.3, "nothing was learned: no share of it says anything"
    assert rows["full"]["learning_rate"] == 1e-5
    assert rows["lora"]["learning_rate"] == 1e-4
    assert rows["lora"]["share_of_full"] >= 0.9
    assert rows["lora_1e-5"]["share_of_full"] < 0.9


# What is run by nothing else, as short as it can be, on a CPU.
SHORTEST = {
    "attention.py": ["--smoke"],
    "balance.py": ["--ranks", "8", "--samples_per_rank", "8", "--steps", "1"],
    "compile_check.py": ["--device", "cpu"],
    "features.py": ["--epochs", "2", "--blocks", "1", "--max_steps", "4"],
    "optimizer.py": ["--device", "cpu", "--layers", "1", "--steps", "1", "--warmup", "1"],
    "overhead.py": ["--steps", "2", "--blocks", "1", "--device", "cpu"],
    "save.py": ["--layers", "1", "--saves", "1"],
    "start.py": ["--samples", "20", "40", "--repetitions", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORTEST)
def test_the_shortest_form_of_a_benchmark_ends_with_its_result(script, tmp_path, request):
    """It calls what is there: figures of a run as short as this mean nothing, and nothing is asserted on them."""
    if script == "optimizer.py":
        request.getfixturevalue("official_processor")  # its folder holds the published config
    file = tmp_path / "result.json"
    done = run(*SHORTEST[script], "--out", str(file), script=script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads(file.read_text())["command"].startswith(f"python benchmarks/{script} ")
