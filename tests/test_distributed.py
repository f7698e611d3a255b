"""finetune_distributed.py on 2 and 4 real processes (gloo, CPU): the same losses and weights as finetune.py."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
from tests import runs
from tests.runs import metrics, weights
from util.config import Config

ROOT = Path(__file__).resolve().parent.parent


def settings(tiny_path: Path, data: Path, directory: Path, **changes) -> dict:
    """A run of tiny on the CPU in float64, where equality is exact to rounding."""
    own = {"data": [str(data)], "dtype": "float64", "max_steps": 5}
    return runs.settings(tiny_path, directory, **{**own, **changes})


def torchrun(processes: int, runs: list[dict], folder: Path, expect: int = 0) -> str:
    """Train several runs, one after another, in one process group."""
    file = folder / f"runs_{processes}.json"
    file.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port",
               str(29500 + random.SystemRandom().randrange(2000)), "tests/distributed_runs.py", str(file)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """The showcase; and one picture among texts, so that one of two ranks never sees a picture, and in the last,
    shorter global batch one has nothing at all."""
    folder = tmp_path_factory.mktemp("data")
    showcase = ROOT / "train_data" / "data.json"
    entries = json.loads(showcase.read_text())
    picture = next(entry for entry in entries if entry["kind"] == "shape")
    item = next(item for item in picture["messages"][-2]["content"] if item["type"] == "image")
    item["image"] = str(showcase.parent / item["image"])
    texts = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "x" * n}]}
        for n in range(1, 5)
    ]
    (folder / "texts.json").write_text(json.dumps([picture, *texts]))
    return {"showcase": showcase, "texts": folder / "texts.json"}


CASES = {
    "full": {},
    "gradients": {"sharding": "gradients"},
    "optimizer": {"sharding": "optimizer", "micro_batch_size": 1},
    "none": {"sharding": "none", "micro_batch_size": 2},
    "accumulation of 4": {"micro_batch_size": 1},
    "frozen tower": {"freeze": ["vision", "merger"]},
    "frozen language model": {"freeze": ["language_model"]},
    "checkpointing": {"activation_checkpointing": "full"},
    "text on one rank, then nothing": {"data": "texts", "global_batch_size": 2, "max_steps": 6},
    "text on one rank, gradients": {"data": "texts", "global_batch_size": 2, "max_steps": 6, "sharding": "optimizer"},
    "evaluation": {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2, "eval_samples": 7},
    "evaluation, frozen tower": {
        "eval_data": [str(ROOT / "test_data" / "data.json")],
        "eval_every": 2,
        "eval_samples": 1,
        "freeze": ["vision", "merger"],
        "sharding": "gradients",
        "activation_checkpointing": "full",
    },
}


def case(name: str, tiny_path: Path, data: dict[str, Path], directory: Path) -> dict:
    changes = dict(CASES[name])
    return settings(tiny_path, data[changes.pop("data", "showcase")], directory, **changes)


@pytest.fixture(scope="module")
def two_ranks(tiny_path, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs = [case(name, tiny_path, data, folder / name) for name in CASES]
    runs.append(settings(tiny_path, data["showcase"], folder / "float32", dtype="float32", max_steps=10))
    runs.append(settings(tiny_path, data["showcase"], folder / "bfloat16", dtype="bfloat16"))
    runs.append(settings(tiny_path, data["showcase"], folder / "saved", max_steps=6, save_every=3, keep=9))
    torchrun(2, runs, folder)
    return folder


def same(run: Path, reference: Path) -> None:
    assert metrics(run) == pytest.approx(metrics(reference), abs=1e-10)
    for key in ("samples", "tokens", "visual_tokens", "supervised_tokens", "learning_rate"):
        assert metrics(run, key) == metrics(reference, key), key
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    gap = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert gap < 1e-12, f"weights differ by {gap}"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, two_ranks, tiny_path, data, tmp_path):
    one = Path(finetune.train(Config(**case(name, tiny_path, data, tmp_path / "one"))))
    same(two_ranks / name, one)
    if name.startswith("evaluation"):
        for key in ("eval_loss", "eval_token_f1", "eval_exact_match", "eval_questions"):
            assert metrics(two_ranks / name, key) == pytest.approx(metrics(one, key), abs=1e-10), key
        assert len(metrics(one, "eval_loss")) == 3


def test_two_ranks_in_float32_and_bfloat16(two_ranks, tiny_path, data, tmp_path):
    one = Path(
        finetune.train(Config(**settings(tiny_path, data["showcase"], tmp_path / "one", dtype="float32", max_steps=10)))
    )
    assert len(metrics(one)) == 10
    assert metrics(two_ranks / "float32") == pytest.approx(metrics(one), abs=1e-5)
    assert metrics(two_ranks / "bfloat16")[0] == pytest.approx(metrics(one)[0], rel=1e-2)
    assert {tensor.dtype for tensor in weights(two_ranks / "bfloat16").values()} == {torch.bfloat16}


def test_four_ranks_and_hybrid_sharding_equal_one(tiny_path, data, tmp_path):
    cases = {"full": {}, "hybrid": {"shard_group_size": 2, "micro_batch_size": 1}, "replicas": {"sharding": "none"},
             "groups of 2, gradients": {"shard_group_size": 2, "sharding": "gradients"}}  # fmt: skip
    torchrun(
        4,
        [settings(tiny_path, data["showcase"], tmp_path / name, **changes) for name, changes in cases.items()],
        tmp_path,
    )
    one = Path(finetune.train(Config(**settings(tiny_path, data["showcase"], tmp_path / "one"))))
    for name in cases:
        same(tmp_path / name, one)


def test_checkpoints_resume_on_another_number_of_ranks(two_ranks, tiny_path, data, tmp_path):
    """2 -> 1, 1 -> 2 and 2 -> 4, across shardings: all end where the uninterrupted run ends."""
    whole = settings(tiny_path, data["showcase"], tmp_path / "whole", max_steps=6, save_every=3, keep=9)
    one = Path(finetune.train(Config(**whole)))
    same(two_ranks / "saved", one)
    from_two = {**whole, "resume": str(two_ranks / "saved" / "checkpoints" / "step_000003")}
    from_one = {**whole, "resume": str(one / "checkpoints" / "step_000003")}
    to_one = Path(finetune.train(Config(**{**from_two, "output_dir": str(tmp_path / "2to1")})))
    torchrun(2, [{**from_one, "output_dir": str(tmp_path / "1to2"), "sharding": "optimizer"}], tmp_path)
    torchrun(4, [{**from_two, "output_dir": str(tmp_path / "2to4"), "shard_group_size": 2}], tmp_path)
    for name in (to_one.name, "1to2", "2to4"):
        assert gap(tmp_path / name, one) < 1e-12, name


def gap(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_weights_in_several_files_are_read(two_ranks, tiny_path, data, tmp_path):
    """The official 7B comes as several safetensors files with an index; rank 0 alone reads them."""
    from util.model import load_weights

    model, parts = load_weights(str(tiny_path), torch.float32, torch.device("cpu")), tmp_path / "parts"
    shutil.copytree(tiny_path, parts, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(parts, max_shard_size="1MB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    torchrun(2, [settings(parts, data["showcase"], tmp_path / "run")], tmp_path)
    same(tmp_path / "run", two_ranks / "full")


@pytest.mark.slow
def test_compiled_layers_give_the_same(two_ranks, tiny_path, data, tmp_path):
    torchrun(2, [settings(tiny_path, data["showcase"], tmp_path / "run", compile=True)], tmp_path)
    assert metrics(tmp_path / "run") == pytest.approx(metrics(two_ranks / "full"), abs=1e-9)


def test_an_optimizer_that_cannot_be_sharded_is_refused_by_name(tiny_path, data, tmp_path):
    wrong = settings(tiny_path, data["showcase"], tmp_path / "run", optimizer="adamw_8bit", device="auto")
    printed = torchrun(2, [wrong], tmp_path, expect=1)
    assert "--optimizer adamw_8bit" in printed
    assert "with 2 processes use --optimizer adamw" in printed


def test_a_user_mistake_ends_all_ranks_with_its_message(tiny_path, data, tmp_path):
    wrong = settings(tiny_path, tmp_path / "gone.json", tmp_path / "run")
    printed = torchrun(2, [wrong], tmp_path, expect=1)
    assert "gone.json: no such data file" in printed
    assert not (tmp_path / "run").exists()


def test_the_shell_script_trains_on_two_processes_without_a_gpu(tmp_path):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_PORT": "29477",
    }
    command = [
        "./finetune_distributed.sh",
        "--max_steps",
        "2",
        "--max_pixels",
        "12544",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No GPU here: 2 processes" in done.stdout
    assert done.stdout.count("done: 2 steps") == 1, "one rank speaks"
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_dealing_is_balanced_complete_and_the_same_everywhere():
    from util.distributed import deal

    generator = random.Random(0)
    for ranks in (2, 8, 64):
        costs = [generator.paretovariate(1.5) for _ in range(ranks * 16)]
        hands = deal(costs, ranks)
        assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
        assert hands == deal(costs, ranks)
        loads = [sum(costs[i] for i in hand) for hand in hands]
        assert max(loads) <= max(1.05 * sum(loads) / ranks, max(costs)), (
            "the slowest rank has at most its one big sample"
        )


def test_the_two_scripts_differ_in_few_lines():
    """What several processes add, and nothing else."""
    done = subprocess.run(["diff", "finetune.py", "finetune_distributed.py"], cwd=ROOT, capture_output=True, text=True)
    changed = [line for line in done.stdout.splitlines() if line[:1] in "<>"]
    assert 0 < len(changed) <= 64, "\n".join(changed)


def test_settings_of_several_gpus_are_refused_where_they_cannot_be(tiny_path, data, tmp_path):
    assert {"sharding", "shard_group_size"} <= {item.name for item in dataclasses.fields(Config)}
    wrong = settings(tiny_path, data["showcase"], tmp_path / "run", shard_group_size=3)
    assert "--shard_group_size 3 does not divide the 2 processes" in torchrun(2, [wrong], tmp_path, expect=1)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
