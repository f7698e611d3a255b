"""finetune_distributed.py on 2 and 4 real processes (gloo, CPU): the same losses and weights as finetune.py."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
from tests import runs, warm
from tests.runs import metrics, weights
from util.config import Config
from util.model import load_weights
from util.publish.export import export
from util.run_folder import read_final

ROOT = Path(__file__).resolve().parent.parent


def settings(tiny_path: Path, data: Path, directory: Path, **changes) -> dict:
    """A run of tiny on the CPU in float64, where equality is exact to rounding."""
    own = {"data": [str(data)], "dtype": "float64", "max_steps": 5}
    return runs.settings(tiny_path, directory, **{**own, **changes})


def torchrun(
    processes: int, configs: list[dict], folder: Path, script: str = "tests/distributed_runs.py", *more: str
) -> None:
    """Train several runs, one after another, in one process group as torchrun makes it; or what else `script` does with
    them."""
    file = folder / f"runs_{processes}.json"
    file.write_text(json.dumps(configs))
    warm.run_ranks(processes, [sys.executable, script, file, *more])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """The showcase; and one picture among texts of unequal weights, so that one of two ranks never sees a picture, and
    in the last, shorter global batch one has nothing at all."""
    folder = tmp_path_factory.mktemp("data")
    showcase = ROOT / "train_data" / "data.json"
    entries = json.loads(showcase.read_text())
    picture = next(entry for entry in entries if entry["kind"] == "shape")
    item = next(item for item in picture["messages"][-2]["content"] if item["type"] == "image")
    item["image"] = str(showcase.parent / item["image"])
    texts = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "x" * n}],
         "weight": n / 2}
        for n in range(1, 5)
    ]  # fmt: skip
    (folder / "texts.json").write_text(json.dumps([picture, *texts]))
    # more than tiny has unused rows; the first ones are in the answers
    (folder / "tokens.txt").write_text("\n".join(["xx", "xxx", *(f"<place_{number}>" for number in range(40))]))
    return {"showcase": showcase, "texts": folder / "texts.json", "tokens": folder / "tokens.txt"}


CASES = {
    "full": {},
    "gradients": {"sharding": "gradients"},
    "optimizer": {"sharding": "optimizer", "micro_batch_size": 1},
    "none": {"sharding": "none", "micro_batch_size": 2},
    "accumulation of 4": {"micro_batch_size": 1},
    "frozen tower": {"freeze": ["vision", "merger"]},
    "frozen language model": {"freeze": ["language_model"]},
    "frozen language model, text alone": {
        "data": "texts",
        "freeze": ["language_model"],
        "micro_batch_size": 1,
        "max_steps": 6,
    },
    "adapters in the tower alone": {"data": "texts", "lora_rank": 4, "lora_vision": True, "freeze": ["language_model"]},
    "checkpointing": {"activation_checkpointing": "full"},
    "selective checkpointing": {"activation_checkpointing": "selective"},
    "text on one rank, then nothing": {"data": "texts", "global_batch_size": 2, "max_steps": 6},
    "text on one rank, gradients": {"data": "texts", "global_batch_size": 2, "max_steps": 6, "sharding": "optimizer"},
    "adapters": {"lora_rank": 4, "lora_vision": True, "micro_batch_size": 2},
    "adapters, gradients": {"lora_rank": 4, "lora_dora": True, "sharding": "gradients"},
    "new tokens": {"data": "texts", "new_tokens": "tokens", "max_steps": 6},
    "new tokens beside adapters": {
        "data": "texts",
        "new_tokens": "tokens",
        "lora_rank": 4,
        "micro_batch_size": 1,
        "sharding": "gradients",
        "eval_data": "texts",
        "eval_every": 2,
        "eval_samples": 2,
    },
    # One question: one rank answers, and the other has other forward passes behind it when training goes on.
    "an answer of one rank": {"data": "texts", "eval_data": "texts", "eval_every": 2, "eval_samples": 1},
    "evaluation": {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2, "eval_samples": 7},
    "evaluation of the loss, saved": {
        "eval_data": [str(ROOT / "test_data" / "data.json")],
        "eval_every": 2,
        "save_every": 2,
    },
    "evaluation of the loss, saved, optimizer": {
        "eval_data": [str(ROOT / "test_data" / "data.json")],
        "eval_every": 2,
        "save_every": 2,
        "sharding": "optimizer",
        "lora_rank": 4,
        "lora_vision": True,
    },
    "the best of six, ended early": {
        "eval_data": [str(ROOT / "test_data" / "data.json")],
        "eval_every": 1,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "max_steps": 7,
        "stop_after": 1,
    },
    "evaluation, frozen tower": {
        "eval_data": [str(ROOT / "test_data" / "data.json")],
        "eval_every": 2,
        "eval_samples": 1,
        "freeze": ["vision", "merger"],
        "sharding": "gradients",
        "activation_checkpointing": "full",
    },
    # A rank without a picture, or whose pictures are all kept, must not leave the other one waiting in the tower.
    "frozen tower, kept": {"freeze": ["vision"], "micro_batch_size": 2, "max_steps": 8, "cache_dir": "cache"},
    "frozen tower, kept, one picture": {"data": "texts", "freeze": ["vision"], "max_steps": 6, "cache_dir": "cache"},
    "frozen tower and merger, kept": {
        "eval_data": [str(ROOT / "test_data" / "data.json")],
        "eval_every": 2,
        "eval_samples": 2,
        "freeze": ["vision", "merger"],
        "sharding": "gradients",
        "cache_dir": "cache",
    },
}


FOUR = {
    "full": {},
    "hybrid": {"shard_group_size": 2, "micro_batch_size": 1},
    "replicas": {"sharding": "none"},
    "groups of 2, gradients": {"shard_group_size": 2, "sharding": "gradients"},
}


def case(name: str, tiny_path: Path, data: dict[str, Path], directory: Path) -> dict:
    changes = dict(CASES[name])
    if "new_tokens" in changes:
        changes["new_tokens"] = str(data[changes["new_tokens"]])
    if "cache_dir" in changes:
        changes["cache_dir"] = str(directory.parent / f"cache of {directory.name}")
    if changes.get("eval_data") == "texts":
        changes["eval_data"] = [str(data["texts"])]
    return settings(tiny_path, data[changes.pop("data", "showcase")], directory, **changes)


REFUSED = {
    "eight bits": {"optimizer": "adamw_8bit", "device": "auto"},
    "groups of 3": {"shard_group_size": 3},
}
FOUR_BITS = {"dtype": "float32", "lora_rank": 4, "quantize": "nf4", "learning_rate": 1e-2, "save_every": 5}
SAVED = {"max_steps": 6, "save_every": 3, "keep": 9}


@pytest.fixture(scope="module")
def parts(tiny_path, tmp_path_factory) -> Path:
    """tiny, its weights in several files with an index, as the official 7B comes."""
    model, parts = load_weights(str(tiny_path), torch.float32, torch.device("cpu")), tmp_path_factory.mktemp("parts")
    shutil.copytree(tiny_path, parts, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    model.save_pretrained(parts, max_shard_size="1MB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    return parts


@pytest.fixture(scope="module")
def saved(tiny_path, data, tmp_path_factory) -> Path:
    """One process, with checkpoints after 3 and 6 of 6 steps."""
    directory = tmp_path_factory.mktemp("saved") / "one"
    return Path(finetune.train(Config(**settings(tiny_path, data["showcase"], directory, **SAVED))))


@pytest.fixture(scope="module")
def two_ranks(tiny_path, parts, saved, data, tmp_path_factory) -> Path:
    """All runs on two ranks, in one job, as starting one takes longer than training."""
    folder = tmp_path_factory.mktemp("two")

    def own(name: str, model: Path = tiny_path, **changes) -> dict:
        return settings(model, data["showcase"], folder / name, **changes)

    third = str(saved / "checkpoints" / "step_000003")
    torchrun(2, [
        *(case(name, tiny_path, data, folder / name) for name in CASES),
        own("float32", dtype="float32", max_steps=10),
        own("bfloat16", dtype="bfloat16"),
        own("four bits", **FOUR_BITS),
        own("saved", **SAVED),
        own("several files", parts),
        own("1to2", **SAVED, resume=third, sharding="optimizer"),
        *(own(name, **changes) for name, changes in REFUSED.items()),
    ], folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def four_ranks(tiny_path, two_ranks, data, tmp_path_factory) -> Path:
    """All runs on four ranks."""
    folder, third = tmp_path_factory.mktemp("four"), two_ranks / "saved" / "checkpoints" / "step_000003"
    cases = [settings(tiny_path, data["showcase"], folder / name, **changes) for name, changes in FOUR.items()]
    resumed = {**SAVED, "resume": str(third), "shard_group_size": 2}
    torchrun(4, [*cases, settings(tiny_path, data["showcase"], folder / "2to4", **resumed)], folder)
    return folder


def same(run: Path, reference: Path, most: float = 1e-12) -> None:
    """`most`: by how much weights may differ: AdamW makes as much of a last bit as its learning rate is high."""
    assert metrics(run) == pytest.approx(metrics(reference), abs=1e-10)
    # AdamW hardly changes where all gradients are larger by one factor; their norm tells of it.
    norms = metrics(run, "grad_norm"), metrics(reference, "grad_norm")
    assert norms[0] == pytest.approx(norms[1], rel=1e-11), "the norm of the gradient before clipping"
    for key in ("samples", "tokens", "visual_tokens", "supervised_tokens", "learning_rate"):
        assert metrics(run, key) == metrics(reference, key), key
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    gap = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert gap < most, f"weights differ by {gap}"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, two_ranks, tiny_path, data, tmp_path):
    one = Path(finetune.train(Config(**case(name, tiny_path, data, tmp_path / "one"))))
    same(two_ranks / name, one, 1e-12 * max(1, CASES[name].get("learning_rate", 1e-3) / 1e-3))
    if name.startswith("the best"):
        assert (read_final(one)["step"], read_final(one)["last_step"]) == (5, 6), metrics(one, "eval_loss")
        assert read_final(two_ranks / name)["step"] == 5
    if "eval_data" in CASES[name]:
        answered = ("eval_token_f1", "eval_exact_match", "eval_questions") if "eval_samples" in CASES[name] else ()
        for key in ("eval_loss", *answered):
            assert metrics(two_ranks / name, key) == pytest.approx(metrics(one, key), abs=1e-10), key
        assert len(metrics(one, "eval_loss")) == (6 if name.startswith("the best") else 3)
    if "cache_dir" in CASES[name]:
        assert metrics(two_ranks / name, "feature_hit_ratio")[-1] > 0.2, "nothing was kept"


def test_two_ranks_in_float32_and_bfloat16(two_ranks, tiny_path, data, tmp_path):
    one = Path(
        finetune.train(Config(**settings(tiny_path, data["showcase"], tmp_path / "one", dtype="float32", max_steps=10)))
    )
    assert len(metrics(one)) == 10
    assert metrics(two_ranks / "float32") == pytest.approx(metrics(one), abs=1e-5)
    assert metrics(two_ranks / "bfloat16")[0] == pytest.approx(metrics(one)[0], rel=1e-2)
    assert {tensor.dtype for tensor in weights(two_ranks / "bfloat16").values()} == {torch.bfloat16}


def test_adapters_over_four_bits_on_two_ranks(two_ranks, tiny_path, data, tmp_path):
    """Every rank keeps all of the 4 bits and its shard of the adapters."""
    one = finetune.train(Config(**settings(tiny_path, data["showcase"], tmp_path / "one", **FOUR_BITS)))
    assert metrics(one)[-1] < metrics(one)[0] - 0.1
    assert metrics(two_ranks / "four bits") == pytest.approx(metrics(one), abs=1e-5)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_and_hybrid_sharding_equal_one(name, four_ranks, two_ranks):
    same(four_ranks / name, two_ranks / "full")  # which is one process's, as above


def test_checkpoints_resume_on_another_number_of_ranks(saved, two_ranks, four_ranks, tiny_path, data, tmp_path):
    """2 -> 1, 1 -> 2 and 2 -> 4, across shardings: all end where the uninterrupted run ends."""
    same(two_ranks / "saved", saved)
    from_two = {**SAVED, "resume": str(two_ranks / "saved" / "checkpoints" / "step_000003")}
    to_one = finetune.train(Config(**settings(tiny_path, data["showcase"], tmp_path / "2to1", **from_two)))
    for run in (Path(to_one), two_ranks / "1to2", four_ranks / "2to4"):
        assert gap(run, saved) < 1e-12, run.name
        assert [line["step"] for line in runs.log(run) if "loss" in line] == [4, 5, 6], run.name


def test_a_sharded_checkpoint_is_exported_as_the_final_model(saved, two_ranks, tmp_path):
    """Bit for bit the final model of its own run, and one process's to rounding."""
    export(two_ranks / "saved" / "checkpoints" / "step_000006", tmp_path / "six")
    export(two_ranks / "saved" / "checkpoints" / "step_000003", tmp_path / "three")
    export(saved / "checkpoints" / "step_000003", tmp_path / "three of one")
    ours, theirs = weights(tmp_path / "six"), weights(two_ranks / "saved")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert gap(tmp_path / "three", tmp_path / "three of one") < 1e-12
    assert gap(tmp_path / "three", saved) > 1e-6, "the third step is not the sixth"


def gap(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_weights_in_several_files_are_read(two_ranks):
    """Rank 0 alone reads them."""
    same(two_ranks / "several files", two_ranks / "full")


@pytest.mark.slow
def test_compiled_layers_give_the_same(two_ranks, tiny_path, data, tmp_path):
    torchrun(2, [settings(tiny_path, data["showcase"], tmp_path / "run", compile="on")], tmp_path)
    # the norms of transformers' modules compute in float32, and fused code rounds there in another order
    assert metrics(tmp_path / "run") == pytest.approx(metrics(two_ranks / "full"), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eight bits", "--optimizer adamw_8bit.*with 2 processes use --optimizer adamw"),
        ("groups of 3", "--shard_group_size 3 does not divide the 2 processes"),
    ],
)
def test_what_cannot_be_on_several_ranks_is_refused_by_name(name, message, two_ranks):
    for rank in (0, 1):
        assert re.search(message, (two_ranks / name / f"refused_{rank}").read_text())
    assert not (two_ranks / name / "metrics.jsonl").exists()


def test_a_user_mistake_ends_all_ranks_with_its_message(tiny_path, tmp_path):
    command = [sys.executable, "-m", "util.parallel.launch", "--nproc_per_node", "2", "finetune_distributed.py", "--device", "cpu",
               "--model", str(tiny_path), "--data", str(tmp_path / "gone.json"), "--output_dir", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(r"gone\.json: no such data file", done.stderr.strip().splitlines()[-1])
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
    from benchmarks.balance import hands_of

    generator = random.Random(0)
    for ranks in (2, 8, 64):
        costs = [generator.paretovariate(1.5) for _ in range(ranks * 16)]
        hands = hands_of(costs, ranks)
        assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
        assert hands == hands_of(costs, ranks)
        loads = [sum(costs[i] for i in hand) for hand in hands]
        assert max(loads) <= max(1.05 * sum(loads) / ranks, max(costs)), (
            "the slowest rank has at most its one big sample"
        )


def test_no_dealing_beats_the_bound_of_the_benchmark():
    """Every way to deal a few samples, against benchmarks/balance.py's bound; ours is at most a third worse (Graham)."""
    from benchmarks.balance import hands_of, lower_bound

    generator, reached = random.Random(0), 0
    for _ in range(100):
        costs = [generator.choice([1.0, 2.0, 5.0, 9.0, 10.0]) for _ in range(generator.randrange(3, 8))]
        ranks = generator.randrange(2, 4)
        ways = itertools.product(range(ranks), repeat=len(costs))
        best = min(
            max(sum(c for c, r in zip(costs, way, strict=True) if r == rank) for rank in range(ranks)) for way in ways
        )
        assert lower_bound(costs, ranks) <= best
        assert best <= max(sum(costs[i] for i in hand) for hand in hands_of(costs, ranks)) <= best * 4 / 3
        reached += lower_bound(costs, ranks) == best
    assert reached > 50, "a bound that is never reached says little"


def test_the_two_scripts_differ_in_few_lines():
    """What several processes add, and nothing else."""
    done = subprocess.run(["diff", "finetune.py", "finetune_distributed.py"], cwd=ROOT, capture_output=True, text=True)
    changed = [line for line in done.stdout.splitlines() if line[:1] in "<>"]
    assert 0 < len(changed) <= 80, "\n".join(changed)
