"""--context_parallel_size on 2, 3 and 4 real processes (gloo, CPU): the losses and weights of one process, and what each
rank gets of a batch."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import finetune
from tests import runs
from tests.runs import metrics, weights
from tests.test_distributed import data, gap, same, settings, torchrun  # noqa: F401  # data is a fixture
from util.config import Config
from util.model import load_config

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = [str(ROOT / "test_data" / "data.json")]
FREE = ("context_parallel_size", "sharding", "shard_group_size", "micro_batch_size", "activation_checkpointing")

CASES = {
    "full": {},
    "optimizer, accumulation of 8, a sample a row": {"sharding": "optimizer", "micro_batch_size": 1},
    "none": {"sharding": "none", "micro_batch_size": 2},
    "full checkpointing": {"activation_checkpointing": "full"},
    "selective checkpointing": {"activation_checkpointing": "selective"},
    "texts, one sample a step": {"data": "texts", "global_batch_size": 1, "max_steps": 6},
    "frozen tower": {"freeze": ["vision", "merger"]},
    "frozen language model, text in some rows": {"data": "texts", "freeze": ["language_model"], "micro_batch_size": 1},
    "adapters, evaluated, saved": {
        "lora_rank": 4,
        "lora_vision": True,
        "sharding": "gradients",
        "eval_data": HELD_OUT,
        "eval_every": 2,
        "eval_samples": 5,
        "save_every": 2,
    },
}
SLOW = {
    "gradients": {"sharding": "gradients"},
    "groups of 1": {"shard_group_size": 1},
    "frozen language model": {"freeze": ["language_model"], "activation_checkpointing": "full"},
    "adapters in the tower alone": {"data": "texts", "lora_rank": 4, "lora_vision": True, "freeze": ["language_model"]},
    "adapters, dora": {"lora_rank": 4, "lora_dora": True, "activation_checkpointing": "selective"},
    "new tokens": {"data": "texts", "new_tokens": "tokens", "max_steps": 6},
    "evaluation": {"eval_data": HELD_OUT, "eval_every": 2, "eval_samples": 7, "micro_batch_size": 2},
    "the loss in chunks": {"logit_rows": 16},
}
FOUR = {
    "2 x 2": {"context_parallel_size": 2, "micro_batch_size": 2},
    "2 x 2, one group without samples": {"context_parallel_size": 2, "data": "texts", "global_batch_size": 3, "max_steps": 4},
    "4": {"context_parallel_size": 4, "micro_batch_size": 1},
    "2 x 2, groups of 2": {"context_parallel_size": 2, "shard_group_size": 2, "micro_batch_size": 2},
}  # fmt: skip
SLOW_FOUR = {
    "2 x 2, replicas": {"context_parallel_size": 2, "sharding": "none"},
    "2 x 2, optimizer, evaluated": {
        "context_parallel_size": 2,
        "sharding": "optimizer",
        "eval_data": HELD_OUT,
        "eval_every": 2,
        "eval_samples": 7,
    },
    "4, checkpointing": {"context_parallel_size": 4, "activation_checkpointing": "full", "data": "texts"},
    "4, texts, one sample a step": {"context_parallel_size": 4, "data": "texts", "global_batch_size": 1},
}
FAULTS = {
    "wrong_key_value_heads": 2,
    "visual_tokens_in_another_order": 2,
    "positions_from_the_beginning": 2,
    "targets_of_the_neighbour": 2,
    "segments_of_the_part": 2,
    "gradients_twice": 4,
    "losses_of_a_rank_alone": 2,
}  # and the number of ranks
SAVED = {"max_steps": 4, "save_every": 2, "keep": 9}


def case(name: str, model: Path, data: dict[str, Path], directory: Path, **more) -> dict:  # noqa: F811
    """Config fields of a case."""
    cases = {**CASES, **SLOW, **FOUR, **SLOW_FOUR}
    changes = {"context_parallel_size": 2, "max_steps": 3, **cases.get(name, {}), **more}
    if "new_tokens" in changes:
        changes["new_tokens"] = str(data[changes["new_tokens"]])
    return settings(model, data[changes.pop("data", "showcase")], directory, **changes)


@pytest.fixture(scope="module")
def wide_path(tiny_path, tmp_path_factory) -> Path:
    """tiny with 8 heads and 2 for keys and values: of 3 ranks the middle one's queries read both, unequally often."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_path, folder)
    config = load_config(str(folder))
    config.text_config.num_attention_heads = 8
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tiny_path, data, tmp_path_factory):  # noqa: F811
    """A function (settings of a run on several) -> the same run on one, made once for all that differ in what changes
    memory and speed alone."""
    made: dict[str, Path] = {}

    def run(config: dict) -> Path:
        kept = {key: value for key, value in config.items() if key not in (*FREE, "output_dir", "fault")}
        key = json.dumps(kept, sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp("one") / "run"
            made[key] = Path(finetune.train(Config(**kept, output_dir=str(directory))))
        return made[key]

    return run


@pytest.fixture(scope="module")
def saved(tiny_path, data, tmp_path_factory) -> Path:  # noqa: F811
    """One process, with checkpoints after 2 and 4 of 4 steps."""
    config = case("", tiny_path, data, tmp_path_factory.mktemp("saved") / "one", **SAVED, context_parallel_size=1)
    return Path(finetune.train(Config(**config)))


@pytest.fixture(scope="module")
def two_ranks(tiny_path, saved, data, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("two")
    second = str(saved / "checkpoints" / "step_000002")
    faults = [name for name, ranks in FAULTS.items() if ranks == 2]
    torchrun(2, [
        *(case(name, tiny_path, data, folder / name) for name in CASES),
        case("", tiny_path, data, folder / "float32", dtype="float32", max_steps=10),
        case("", tiny_path, data, folder / "bfloat16", dtype="bfloat16", eval_data=HELD_OUT, eval_every=2, save_every=2),
        case("", tiny_path, data, folder / "saved", **SAVED),
        case("", tiny_path, data, folder / "1to2", **SAVED, resume=second),
        case("", tiny_path, data, folder / "2to1", **{**SAVED, "context_parallel_size": 1},
             resume=str(folder / "saved" / "checkpoints" / "step_000002")),
        *({**case("", tiny_path, data, folder / name, max_steps=1), "fault": name} for name in faults),
        case("", tiny_path, data, folder / "refused 4", context_parallel_size=4),
        case("", tiny_path, data, folder / "refused cache", freeze=["vision"], cache_dir=str(folder / "cache")),
    ], folder, "tests/context_runs.py", "4/2", "12/2", "28/4", "5/5")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def three_ranks(wide_path, data, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("three")
    config = case("full", wide_path, data, folder / "full", context_parallel_size=3)
    torchrun(3, [config], folder, "tests/context_runs.py", "4/2", "8/2", "12/2", "28/4", "3/1")
    return folder


@pytest.fixture(scope="module")
def four_ranks(tiny_path, data, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("four")
    faults = [name for name, ranks in FAULTS.items() if ranks == 4]
    torchrun(4, [
        *(case(name, tiny_path, data, folder / name) for name in FOUR),
        *({**case("4", tiny_path, data, folder / name, max_steps=1), "fault": name} for name in faults),
        case("", tiny_path, data, folder / "refused 8", context_parallel_size=8),
    ], folder, "tests/context_runs.py", "4/2", "12/2", "28/4", "6/3", "4/4")  # fmt: skip
    return folder


def equal(run: Path, config: dict, one: Path) -> None:
    """Losses and weights of a run and of the same on one process, and what both logged."""
    assert metrics(run) == pytest.approx(metrics(one), abs=1e-12)
    # AdamW hardly changes where all gradients are larger by one factor; their norm tells of it.
    assert metrics(run, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-11)
    same(run, one, 1e-12)
    if "eval_data" in config:
        assert len(metrics(one, "eval_loss")) > 1
        answered = ("eval_token_f1", "eval_exact_match", "eval_questions") if "eval_samples" in config else ()
        for key in ("eval_loss", "eval_token_accuracy", *answered):
            assert metrics(run, key) == pytest.approx(metrics(one, key), abs=1e-10), key
            assert metrics(one, key), key


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, two_ranks, one_process, tiny_path, data):  # noqa: F811
    config = case(name, tiny_path, data, two_ranks / name)
    equal(two_ranks / name, config, one_process(config))


def test_three_ranks_equal_one(three_ranks, one_process, wide_path, data):  # noqa: F811
    """Heads that 3 does not divide. No last bit is lost to fp32, as with transformers' own norms and rotation."""
    config = case("full", wide_path, data, three_ranks / "full", context_parallel_size=3)
    equal(three_ranks / "full", config, one_process(config))


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(name, four_ranks, one_process, tiny_path, data):  # noqa: F811
    config = case(name, tiny_path, data, four_ranks / name)
    equal(four_ranks / name, config, one_process(config))


@pytest.mark.slow
def test_more_cases_equal_one(one_process, tiny_path, data, tmp_path):  # noqa: F811
    for ranks, cases in ((2, SLOW), (4, SLOW_FOUR)):
        configs = [case(name, tiny_path, data, tmp_path / name) for name in cases]
        torchrun(ranks, configs, tmp_path, "tests/context_runs.py")
        for config in configs:
            equal(Path(config["output_dir"]), config, one_process(config))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, two_ranks, four_ranks, one_process, tiny_path, data):  # noqa: F811
    """What the comparisons above would say of it."""
    folder = two_ranks if FAULTS[name] == 2 else four_ranks
    one = one_process(case("", tiny_path, data, folder / name, max_steps=1))
    assert gap(folder / name, one) > 1e-7


def test_float32_and_bfloat16(two_ranks, one_process, tiny_path, data):  # noqa: F811
    one = one_process(case("", tiny_path, data, two_ranks / "float32", dtype="float32", max_steps=10))
    assert len(metrics(one)) == 10
    assert metrics(two_ranks / "float32") == pytest.approx(metrics(one), abs=1e-5)
    assert metrics(two_ranks / "bfloat16") == pytest.approx(metrics(one)[:3], rel=1e-2)
    assert {tensor.dtype for tensor in weights(two_ranks / "bfloat16").values()} == {torch.bfloat16}


def test_checkpoints_know_no_context(saved, two_ranks):
    """Saved on one and resumed on two ranks of a row, saved so and resumed on two ranks with rows of their own."""
    same(two_ranks / "saved", saved)
    for name in ("1to2", "2to1"):
        assert gap(two_ranks / name, saved) < 1e-12, name
        assert [line["step"] for line in runs.log(two_ranks / name) if "loss" in line] == [3, 4], name


@pytest.mark.slow
def test_a_checkpoint_resumes_in_one_process(saved, two_ranks, tiny_path, data, tmp_path):  # noqa: F811
    third = str(two_ranks / "saved" / "checkpoints" / "step_000002")
    config = case("", tiny_path, data, tmp_path / "one", **{**SAVED, "context_parallel_size": 1}, resume=third)
    assert gap(Path(finetune.train(Config(**config))), saved) < 1e-12


# ---- what is read, and what is sent ---------------------------------------------------------------------------------


def noted(folder: Path, name: str, what: str, ranks: int) -> list[dict]:
    """What context_runs.py noted of a run on each rank."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text())[what] for rank in range(ranks)]


def test_a_sample_is_read_by_one_rank(two_ranks, four_ranks):
    """24 samples in rows of one: each once, by turns. The plan shows sample 0, which the first rank reads for it."""
    for folder, name, ranks in ((two_ranks, "optimizer, accumulation of 8, a sample a row", 2), (four_ranks, "4", 4)):
        read = noted(folder, name, "read", ranks)
        shown = read[0].pop("0") - 1
        assert [sum(own.values()) + (rank == 0) * shown for rank, own in enumerate(read)] == [24 // ranks] * ranks
        read[0] |= {"0": shown} if shown else {}
        everything = [index for own in read for index in own]
        assert len(set(everything)) == len(everything) == 24
