"""--tensor_parallel_size and --sequence_parallel on 2 and 4 real processes (gloo): the same as one process."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

import finetune
from tests import runs, samples
from tests.official import official_config
from tests.runs import metrics, weights
from tests.test_distributed import gap, same, torchrun
from util.command_line import UserError
from util.config import Config
from util.cost import layouts, memory, step_time
from util.cost.links import GATHER, REDUCE, SCATTER, Hardware
from util.cost.step_time import Course
from util.model import load_config
from util.parallel import tensor
from util.parallel.layout import Layout
from util.publish.export import export

ROOT = Path(__file__).resolve().parent.parent
SHOWCASE = ROOT / "train_data" / "data.json"

# ---- whole runs -----------------------------------------------------------------------------------------------------

SAVED = {"eval_data": "texts", "eval_every": 2, "max_steps": 4, "save_every": 2, "final": "last"}
TEXTS = {
    "data": "texts",
    "global_batch_size": 2,
    "max_steps": 3,
}  # one picture; in the last step one of two has nothing
ROWS = {"sequence_parallel": True}
TWO = {
    "saved": SAVED,
    "untied": {**TEXTS, **ROWS, "model": "untied", "activation_checkpointing": "full"},
}
SLOW_TWO = {
    "rows": {
        **SAVED,
        **ROWS,
        "micro_batch_size": 1,
        "sharding": "optimizer",
        "activation_checkpointing": "selective",
        "logit_rows": 16,
    },
    "frozen language model": {**TEXTS, "freeze": ["language_model"]},
    "frozen tower": {**ROWS, "freeze": ["vision", "merger"], "max_steps": 2},
    "new tokens": {**TEXTS, "new_tokens": "tokens"},
}
FOUR = {
    "untied": {**TEXTS, "model": "untied", "sharding": "none"},
    "saved": {**SAVED, "sharding": "gradients", "micro_batch_size": 1},
    "a row over two": {**SAVED, **ROWS, "context_parallel_size": 2},
    "frozen language model": {**TEXTS, **ROWS, "freeze": ["language_model"], "activation_checkpointing": "full"},
    "four heads": {**TEXTS, "model": "four heads", "tensor_parallel_size": 4},
    "four heads in rows": {**TEXTS, **ROWS, "model": "four heads", "tensor_parallel_size": 4},
    "the showcase": {"data": "showcase", "global_batch_size": 8, "max_steps": 5},
    "the showcase in rows": {"data": "showcase", "global_batch_size": 8, "max_steps": 5, **ROWS, "shard_group_size": 1},
}
STANDING = {**SAVED, "eval_data": "none", "max_steps": 3, "learning_rate": 0.0, "resume_anyway": True}
OF_SEVERAL = ("tensor_parallel_size", "sequence_parallel", "context_parallel_size", "sharding", "shard_group_size")


@pytest.fixture(scope="module")
def places(tiny_path, processor, tmp_path_factory) -> dict[str, str]:
    """Models beside tiny; data of all kinds, and of one picture among texts."""
    folder = tmp_path_factory.mktemp("places")
    found = {"tiny": str(tiny_path), "showcase": str(SHOWCASE)}
    for name, heads in (("untied", 2), ("four heads", 4)):
        config = AutoConfig.from_pretrained(tiny_path)
        config.tie_word_embeddings = False
        config.text_config.num_key_value_heads = heads
        torch.manual_seed(1)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        found[name] = str(folder / name)
    entries = json.loads(SHOWCASE.read_text().replace('"media/', f'"{SHOWCASE.parent}/media/'))
    by_kind = {entry["kind"]: entry for entry in reversed(entries)}
    texts = [samples.entry(samples.user(f"Say {n}"), samples.assistant("x" * n)) for n in range(1, 5)]
    pictures = [by_kind[kind] for kind in ("shape", "several images", "motion", "image and video")]
    for name, chosen in (("texts", [pictures[0], *texts]), ("mixed", [*pictures, *texts[:2]])):
        found[name] = str(folder / f"{name}.json")
        Path(found[name]).write_text(json.dumps(chosen))
    # more than tiny has unused rows; the first ones are in the answers
    found["tokens"] = str(folder / "tokens.txt")
    Path(found["tokens"]).write_text("\n".join(["xx", "xxx", *(f"<place_{number}>" for number in range(40))]))
    return found


def settings(places: dict[str, str], directory: Path, **changes) -> dict:
    own = {"model": "tiny", "data": "mixed", "global_batch_size": 3, "dtype": "float64", "tensor_parallel_size": 2}
    own |= changes
    for name in {"data", "eval_data"} & own.keys():
        own[name] = [places[own[name]]] if own[name] in places else []
    own |= {name: places[own[name]] for name in {"model", "new_tokens"} & own.keys()}
    return {**runs.settings(Path(), directory), **own}


def train_alone(own: dict) -> Path:
    """In this process, with what settings say of several left out."""
    return Path(finetune.train(Config(**{name: own[name] for name in own if name not in OF_SEVERAL})))


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one")
    return {name: train_alone(settings(places, folder / name, **changes)) for name, changes in TWO.items()}


@pytest.fixture(scope="module")
def two_ranks(places, alone, tmp_path_factory) -> Path:
    """All runs, and what single steps show, on two ranks in one job."""
    folder = tmp_path_factory.mktemp("two")
    second = str(alone["saved"] / "checkpoints" / "step_000002")
    trained = [
        *(settings(places, folder / name, **changes) for name, changes in TWO.items()),
        settings(places, folder / "1to2 standing", **STANDING, resume=second),
    ]
    of_steps = settings(places, folder / "unused", data="showcase")
    cases = {"plain": of_steps, "samples": [2, 7, 30], "exchanged": EXCHANGED, "runs": trained}
    torchrun(2, cases, folder, "tests/tensor_checks.py", str(folder))
    return folder


@pytest.fixture(scope="module")
def slow_two(places, alone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slow_two")
    bfloat16 = {**SAVED, **ROWS, **TEXTS, "dtype": "bfloat16"}
    torchrun(2, [
        *(settings(places, folder / name, **changes) for name, changes in SLOW_TWO.items()),
        settings(places, folder / "float32", **{**TEXTS, **ROWS, "dtype": "float32"}),
        settings(places, folder / "1to2", **SAVED, resume=str(alone["saved"] / "checkpoints" / "step_000002")),
        settings(places, folder / "bfloat16", **bfloat16),
        settings(places, folder / "bfloat16 on", **bfloat16, resume=str(folder / "bfloat16/checkpoints/step_000002")),
    ], folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def four_ranks(places, two_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    second = str(two_ranks / "saved" / "checkpoints" / "step_000002")
    torchrun(4, [
        *(settings(places, folder / name, **changes) for name, changes in FOUR.items()),
        settings(places, folder / "2to4", **SAVED, resume=second),
        settings(places, folder / "too many", tensor_parallel_size=4),
    ], folder)  # fmt: skip
    return folder


def equal(run: Path, one: Path) -> None:
    same(run, one)
    for key in ("eval_loss", "eval_token_accuracy"):
        assert metrics(run, key) == pytest.approx(metrics(one, key), abs=1e-12), key


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one(name, two_ranks, alone):
    assert len(metrics(two_ranks / "saved", "eval_loss")) == 2
    equal(two_ranks / name, alone[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TWO)
def test_more_on_two_ranks_equals_one(name, slow_two, places, tmp_path):
    equal(slow_two / name, train_alone(settings(places, tmp_path / "one", **SLOW_TWO[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(name, four_ranks, places, tmp_path):
    equal(four_ranks / name, train_alone(settings(places, tmp_path / "one", **FOUR[name])))


@pytest.mark.slow
def test_in_float32(slow_two, places, tmp_path):
    one = train_alone(settings(places, tmp_path / "one", **{**TEXTS, "dtype": "float32"}))
    assert metrics(slow_two / "float32") == pytest.approx(metrics(one), abs=1e-5)


@pytest.mark.slow
def test_parts_are_sharded_over_ranks_that_do_not_divide_them(places, tmp_path):
    """Six ranks: three shard parts of 448 rows of the vocabulary, and of 32 of a bias. At a learning rate of 0 the model
    that is left is the one that was read; else its losses are those of one process."""
    standing = {"model": "untied", "learning_rate": 0.0, "max_steps": 1}
    torchrun(6, [settings(places, tmp_path / "six", max_steps=2, save_every=1),
                 settings(places, tmp_path / "standing", **standing)], tmp_path)  # fmt: skip
    read = load_file(Path(places["untied"]) / "model.safetensors")
    left = weights(tmp_path / "standing")
    assert all(torch.equal(left[name], read[name].double()) for name in read)
    one = train_alone(settings(places, tmp_path / "one", max_steps=2))
    assert metrics(tmp_path / "six") == pytest.approx(metrics(one), abs=1e-10)
    export(tmp_path / "six" / "checkpoints" / "step_000002", tmp_path / "export")
    ours, theirs = weights(tmp_path / "export"), weights(tmp_path / "six")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_compiled_parts_give_the_same(places, tmp_path):
    cases = {"copies": {}, "rows": {**ROWS, "activation_checkpointing": "selective"}}
    torchrun(
        2, [settings(places, tmp_path / name, compile="on", **changes) for name, changes in cases.items()], tmp_path
    )
    one = train_alone(settings(places, tmp_path / "one"))
    for name in cases:
        assert metrics(tmp_path / name) == pytest.approx(metrics(one), rel=1e-6)
        assert sum(metrics(tmp_path / name, "compile_seconds")) > 0, "nothing was compiled"


def test_ranks_are_compared_while_they_train(two_ranks):
    (compared,) = [line for line in runs.log(two_ranks / "saved") if "compute_seconds_by_rank" in line]
    assert compared["step"] == 3
    assert len(compared["compute_seconds_by_rank"]) == len(compared["data_seconds_by_rank"]) == 2


@pytest.mark.slow
def test_in_bfloat16(slow_two, places, tmp_path):
    one = train_alone(settings(places, tmp_path / "one", **{**TEXTS, "dtype": "bfloat16"}))
    assert metrics(slow_two / "bfloat16") == pytest.approx(metrics(one), rel=2e-2)
    assert {tensor.dtype for tensor in weights(slow_two / "bfloat16").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(slow_two):
    ours, theirs = weights(slow_two / "bfloat16 on"), weights(slow_two / "bfloat16")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(slow_two / "bfloat16 on") == metrics(slow_two / "bfloat16")[2:]


def goes_on_as(run: Path, whole: Path) -> None:
    assert gap(run, whole) < 1e-12, run.name
    assert [line["step"] for line in runs.log(run) if "loss" in line] == [3, 4], run.name


def test_a_checkpoint_resumes_in_one_process(two_ranks, alone, places, tmp_path):
    """2 -> 1 ends where the uninterrupted run ends."""
    second = str(two_ranks / "saved" / "checkpoints" / "step_000002")
    goes_on_as(train_alone(settings(places, tmp_path / "2to1", **SAVED, resume=second)), alone["saved"])


@pytest.mark.slow
def test_a_checkpoint_resumes_on_more_ranks(four_ranks, alone):
    """2 -> 2 x 2."""
    goes_on_as(four_ranks / "2to4", alone["saved"])


@pytest.mark.slow
def test_a_checkpoint_of_one_process_resumes_on_two_ranks(slow_two, alone):
    goes_on_as(slow_two / "1to2", alone["saved"])


def test_checkpoints_and_exports_hold_whole_weights_bit_by_bit(two_ranks, alone, places, tmp_path):
    """Read by parts and by one process, at a learning rate of 0; and exported."""
    second = str(two_ranks / "saved" / "checkpoints" / "step_000002")
    to_one = train_alone(settings(places, tmp_path / "2to1", **STANDING, resume=second))
    pairs = {to_one: Path(second), two_ranks / "1to2 standing": alone["saved"] / "checkpoints" / "step_000002"}
    pairs[two_ranks / "saved"] = two_ranks / "saved" / "checkpoints" / "step_000004"
    for run, checkpoint in pairs.items():
        export(checkpoint, tmp_path / f"export of {run.name}")
        ours, theirs = weights(run), weights(tmp_path / f"export of {run.name}")
        assert ours.keys() == theirs.keys() == weights(alone["saved"]).keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), run.name


@pytest.mark.slow
def test_a_size_that_does_not_divide_the_heads_is_refused_by_name(four_ranks):
    for rank in range(4):
        said = (four_ranks / "too many" / f"refused_{rank}").read_text()
        assert "--tensor_parallel_size 4 cannot divide this model's 2 key-value heads" in said
        assert "Sizes that can: 1, 2." in said
    assert not (four_ranks / "too many" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"sequence_parallel": True}, "--sequence_parallel needs --tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "lora_rank": 4}, "--lora_rank 4 with --tensor_parallel_size 2"),
        (
            {"tensor_parallel_size": 2, "eval_data": ["held_out.json"], "eval_samples": 4},
            "--eval_samples 4 with --tensor_parallel_size 2",
        ),
        ({"tensor_parallel_size": 3}, "--tensor_parallel_size 3 does not divide the 4 processes"),
        (
            {"tensor_parallel_size": 2, "context_parallel_size": 4},
            "--context_parallel_size 4 times --tensor_parallel_size 2 do not divide the 4 processes: start a multiple of 8",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags, said):
    with pytest.raises(UserError, match=said):
        Layout.of(Config(**flags), 4)


def test_published_models_are_cut_as_far_as_their_key_value_heads():
    """2B has 2, 7B has 4 and 72B has 8 of them (their config.json), a tower of 16 heads, and MLPs that 8 divides."""
    for size, most in {"2b": 2, "7b": 4, "72b": 8}.items():
        published = official_config(size)
        tensor.check_sizes(published, most)
        with pytest.raises(UserError, match=f"--tensor_parallel_size {2 * most} .* {most} key-value heads"):
            tensor.check_sizes(published, 2 * most)


# ---- single steps of two ranks --------------------------------------------------------------------------------------

EXCHANGED = {
    "none": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "rows": {"sequence_parallel": True},
    "rows, selective": {"sequence_parallel": True, "activation_checkpointing": "selective"},
    "rows, full": {"sequence_parallel": True, "activation_checkpointing": "full"},
}
LAYERS = 4 + 3  # tiny's decoder layers and tower blocks


@pytest.fixture(scope="module")
def checked(two_ranks) -> list[dict]:
    """What each of two ranks found: tests/tensor_checks.py."""
    return [json.loads((two_ranks / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_a_layer_has_two_all_reduces_in_each_pass(checked):
    """Beside them: the merger and the embedding have one, the loss two for numbers of each token, the head one."""
    for found in checked:
        calls = found["exchanged"]["none"]["calls"]
        assert calls["forward_all_reduce"] == 2 * LAYERS + 2 + 2
        assert calls["backward_all_reduce"] == 2 * LAYERS + 1 + 1


def test_bytes_are_those_of_the_rows(checked):
    """8 a number in float64: a decoder row is 128 wide, a tower row 64; the merger's are 256 wide before and 128 after."""
    found = checked[0]
    rows, patches, supervised = found["rows"], found["patches"], found["supervised"]
    layers = 8 * (2 * 4 * 128 * rows + 2 * 3 * 64 * patches)
    counted = found["exchanged"]["none"]["bytes"]
    ends = 8 * (128 * rows + 128 * patches // 4 + 3 * supervised)  # embedding, merger, largest and sums of the loss
    assert counted["forward_all_reduce"] == layers + ends
    assert counted["backward_all_reduce"] == layers + 8 * (256 * patches // 4 + 128 * supervised)


def test_recomputing_exchanges_only_what_it_must(checked):
    """Before its second half a recomputed layer needs the sum of its first; kept products keep it."""
    full = checked[0]["exchanged"]["full"]["calls"]
    assert full["backward_all_reduce"] == 2 * LAYERS + 2 + LAYERS
    assert checked[0]["exchanged"]["selective"]["calls"]["backward_all_reduce"] == 2 * LAYERS + 2


def test_rows_are_gathered_and_scattered_instead(checked):
    """At the ends of the tower and of the language model each rank takes its rows, and gets all of them back."""
    calls = checked[0]["exchanged"]["rows"]["calls"]
    assert checked[0]["rows"] % 2, "no row has to be filled up"
    assert calls["forward_gather_rows"] == 2 * LAYERS + 2
    assert calls["forward_scatter_rows"] == 2 * LAYERS
    assert calls["forward_all_reduce"] == 2 + 2
    assert calls["backward_scatter_rows"] == 2 * LAYERS
    assert calls["backward_gather_rows"] == 2 * LAYERS + 2
    assert calls["backward_all_reduce"] == 1 + 1


def test_recomputing_gathers_rows_anew(checked):
    """Twice in a layer, before its products. Of its two sums the first is made anew where it was not kept, and the
    second, which nothing needs, never."""
    for name, sums in (("rows, selective", 0), ("rows, full", LAYERS)):
        calls = checked[0]["exchanged"][name]["calls"]
        assert calls["backward_gather_rows"] == 2 * LAYERS + 2 + 2 * LAYERS, name
        assert calls["backward_scatter_rows"] == 2 * LAYERS + sums, name


def one_for_each(kind: str, hardware: Hardware, asked: str, whole: np.ndarray, ranks: int) -> float:
    return float(asked == kind)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_seconds_of_a_step_are_those_of_what_is_exchanged(checkpointing, checked, tiny_path, monkeypatch):
    """What `check --gpus` computes with, one call after the other, against the calls and bytes of two processes."""
    found = checked[0]
    name = "rows" if checkpointing == "none" else f"rows, {checkpointing}"
    model_config = load_config(tiny_path)
    shape = layouts.Shape(tensor=2, checkpointing=checkpointing)
    weights = layouts.Weights.of(model_config)
    course = Course(shape, (4,), weights, model_config, Config(), Hardware(), is_compiled=False)
    counts = [np.array([found[of]]) for of in ("rows", "patches", "supervised")]
    names = {GATHER: "gather_rows", SCATTER: "scatter_rows", REDUCE: "all_reduce"}
    for kind, counted in names.items():
        monkeypatch.setattr(step_time, "seconds_of", partial(one_for_each, kind))
        calls = course.tensor_messages(0, *counts)
        exchanged = found["exchanged"][name]["calls"]
        assert [int(number) for (number,) in calls] == [
            exchanged[f"{way}_{counted}"] for way in ("forward", "backward")
        ]
    # Bytes of whole tensors in bf16, of which the rank hands in half to a gather; the processes ran in float64, 4 times
    # as wide, and one of them may have filled up its rows.
    monkeypatch.setattr(step_time, "seconds_of", lambda hardware, asked, whole, *ranks: whole * (asked == GATHER))
    sizes = found["exchanged"][name]["bytes"]
    for (seconds,), way in zip(course.tensor_messages(0, *counts), ("forward", "backward"), strict=True):
        assert seconds == pytest.approx(sizes[f"{way}_gather_rows"] * 2 / 4, rel=0.01)


def test_one_step_equals_one_process(checked):
    for found in checked:
        for name in ("none", "none, in rows"):
            assert max(found["faults"][name].values()) < 1e-12, (name, found["faults"][name])


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        ("a key-value head is cut wrongly", "loss"),
        ("the tied gradient counts twice", "gradient"),
        ("the gradient of qkv is not summed", "gradient"),
        ("the norm counts copies twice", "norm"),
        ("rows are filled up in front, in rows", "loss"),
    ],
)
def test_planted_faults_are_seen(fault, seen_in, checked):
    assert checked[0]["faults"][fault][seen_in] > 1e-6, checked[0]["faults"][fault]


def test_copies_stay_equal_bit_by_bit(checked):
    """One rank's gradients of what both have whole were off by a billionth."""
    assert checked[0]["drifted"]["unequal"] > 10, "the drift changes no weight, so that its end shows nothing"
    assert checked[0]["agreed"]["unequal"] == 0


def test_the_loss_of_two_ranks_counts_once(checked):
    """Both compute it, and sums go over all ranks."""
    assert checked[0]["agreed"]["loss"] > 0
    assert checked[1]["agreed"]["loss"] == 0


def test_the_forecast_counts_what_a_rank_has(checked, tiny_path):
    """A half of every matrix, but whole the tower's qkv, 3 blocks of 3 x 64 x 64, and 1,176 x 64 of its embedding."""
    config = Config(tensor_parallel_size=2)
    model_config = load_config(str(tiny_path))
    counted = memory.count_parameters(model_config, Config())
    forecast = memory.counts_of_rank(model_config, counted, config)
    for part, numbers in checked[0]["held"].items():
        assert forecast[part] == pytest.approx(numbers, rel=0.02), part
    assert forecast["vision"] == counted["vision"] / 2 + (3 * 3 * 64 * 64 + 1176 * 64) / 2
