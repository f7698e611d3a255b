"""--context_parallel_size on 2, 3 and 4 real processes (gloo, CPU): the losses and weights of one process, and what each
rank gets of a batch."""

# ruff: noqa: F811  # data and start are fixtures of other files

import dataclasses
import json
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import finetune
from tests import runs
from tests.official import official_config
from tests.runs import metrics, weights
from tests.test_distributed import data, gap, same, settings, torchrun  # noqa: F401
from tests.test_faults import finish, launch
from tests.test_signals import check, start  # noqa: F401
from util.checkpoint import verify
from util.collator import Collator
from util.command_line import UserError
from util.config import Config, parse_arguments
from util.conversation import Encoded
from util.cost import memory
from util.data import loader
from util.dataset import Examples, Sample
from util.model import load_config
from util.parallel import context, rows
from util.parallel.distributed import World
from util.parallel.layout import Layout
from util.parallel.rows import with_blank_patches
from util.vision import Grid, Medium

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = [str(ROOT / "test_data" / "data.json")]
FREE = ("context_parallel_size", "sharding", "shard_group_size", "micro_batch_size", "activation_checkpointing")

CASES = {
    "full": {},
    "optimizer, accumulation of 8, a sample a row": {"sharding": "optimizer", "micro_batch_size": 1},
    "texts, one sample a step": {"data": "texts", "global_batch_size": 1, "max_steps": 6},
}
SLOW = {
    "full checkpointing": {"activation_checkpointing": "full"},
    "selective checkpointing": {"activation_checkpointing": "selective"},
    "frozen tower": {"freeze": ["vision", "merger"]},
    "frozen language model, text in some rows": {"data": "texts", "freeze": ["language_model"], "micro_batch_size": 1},
    "adapters, evaluated, saved": {
        "lora_rank": 4,
        "lora_vision": True,
        "sharding": "gradients",
        "eval_data": "texts",
        "eval_every": 2,
        "eval_samples": 2,
        "save_every": 2,
    },
    "gradients": {"sharding": "gradients"},
    "none": {"sharding": "none", "micro_batch_size": 2},
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
    "2 x 2, one group without samples": {
        "context_parallel_size": 2,
        "data": "texts",
        "global_batch_size": 3,
        "max_steps": 4,
    },
    "4": {"context_parallel_size": 4, "micro_batch_size": 1},
    "2 x 2, groups of 2": {"context_parallel_size": 2, "shard_group_size": 2, "micro_batch_size": 2},
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
FAULTS = ("wrong_key_value_heads", "positions_after_what_fills_up")
SLOW_FAULTS = (
    "visual_tokens_in_another_order",
    "positions_from_the_beginning",
    "targets_of_the_neighbour",
    "segments_of_the_part",
    "losses_of_a_rank_alone",
)
BROKEN = {
    "skips": {"on_bad_sample": "skip", "micro_batch_size": 2},
    "stops": {"micro_batch_size": 2},
}
SLOW_BROKEN = {
    "stops in evaluation": {"data": "showcase", "eval_data": "broken", "eval_every": 1, "micro_batch_size": 1},
}
SAVED = {"max_steps": 4, "save_every": 2, "keep": 9}


def case(name: str, model: Path, files: dict[str, Path], directory: Path, **more) -> dict:
    """Config fields of a case; `data` is a name of one of the files."""
    cases = {**CASES, **SLOW, **FOUR}
    changes = {"context_parallel_size": 2, "max_steps": 3, **cases.get(name, {}), **more}
    if changes.get("eval_data") == "texts":
        changes["eval_data"] = [str(files["texts"])]
    if "new_tokens" in changes:
        changes["new_tokens"] = str(files[changes["new_tokens"]])
    return settings(model, files[changes.pop("data", "showcase")], directory, **changes)


def broken_case(name: str, model: Path, broken: Path, directory: Path) -> dict:
    places = {"showcase": ROOT / "train_data" / "data.json", "broken": broken}
    changes = {"data": "broken", **{**BROKEN, **SLOW_BROKEN}[name]}
    if "eval_data" in changes:
        changes["eval_data"] = [str(places[changes["eval_data"]])]
    return case("", model, places, directory, **changes)


def faulty_case(name: str, model: Path, files: dict[str, Path], directory: Path) -> dict:
    """A step of one row, which has an even number of tokens; with a sample a row some have to be filled up."""
    micro_batch_size = 1 if name == "positions_after_what_fills_up" else None
    more = {"max_steps": 1, "micro_batch_size": micro_batch_size}
    return {**case("4" if name == "gradients_twice" else "", model, files, directory, **more), "fault": name}


@pytest.fixture(scope="module")
def wide_path(tiny_path, tmp_path_factory) -> Path:
    """tiny with 8 heads and 2 for keys and values: of 3 ranks the middle one's queries read both, unequally often."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_path, folder)
    config = load_config(str(folder))
    config.text_config.num_attention_heads = 8
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]  # of half of a head's width
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tiny_path, data, tmp_path_factory):
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
def broken(processor, tmp_path_factory) -> Path:
    """The showcase; of a sample of the second step the pixels cannot be decoded, which neither end of the file tells."""
    showcase = ROOT / "train_data" / "data.json"
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(showcase.parent / "media", folder / "media")
    entries = json.loads(showcase.read_text())
    second_step = Examples([str(showcase)], processor).order(0, 0)[8:16]
    pictures = []
    for index in second_step:
        content = entries[index]["messages"][-2]["content"]
        pictures += [item["image"] for item in content if isinstance(item, dict) and "image" in item]
    name = next(name for name in pictures if name.endswith(".png"))
    picture = bytearray((folder / name).read_bytes())
    middle = len(picture) // 2
    picture[middle : middle + 20] = bytes(20)
    (folder / name).write_bytes(picture)
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


@pytest.fixture(scope="module")
def saved(tiny_path, data, tmp_path_factory) -> Path:
    """One process, with checkpoints after 2 and 4 of 4 steps."""
    config = case("", tiny_path, data, tmp_path_factory.mktemp("saved") / "one", **SAVED, context_parallel_size=1)
    return Path(finetune.train(Config(**config)))


@pytest.fixture(scope="module")
def two_ranks(tiny_path, broken, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, [
        *(case(name, tiny_path, data, folder / name) for name in CASES),
        case("", tiny_path, data, folder / "float32", dtype="float32"),
        *(faulty_case(name, tiny_path, data, folder / name) for name in FAULTS),
        *(broken_case(name, tiny_path, broken, folder / name) for name in BROKEN),
        case("", tiny_path, data, folder / "refused 4", context_parallel_size=4),
        case("", tiny_path, data, folder / "refused cache", freeze=["vision"], cache_dir=str(folder / "cache")),
    ], folder, "tests/context_runs.py", "4/2", "12/2", "28/4", "5/5")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def slow_two_ranks(tiny_path, saved, broken, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slow_two")
    second = str(saved / "checkpoints" / "step_000002")
    torchrun(2, [
        *(case(name, tiny_path, data, folder / name) for name in SLOW),
        case("", tiny_path, data, folder / "float32", dtype="float32", max_steps=10),
        case("", tiny_path, data, folder / "bfloat16", dtype="bfloat16", eval_data="texts", eval_every=2, save_every=2),
        case("", tiny_path, data, folder / "saved", **SAVED),
        case("", tiny_path, data, folder / "1to2", **SAVED, resume=second),
        case("", tiny_path, data, folder / "2to1", **{**SAVED, "context_parallel_size": 1},
             resume=str(folder / "saved" / "checkpoints" / "step_000002")),
        *(faulty_case(name, tiny_path, data, folder / name) for name in SLOW_FAULTS),
        *(broken_case(name, tiny_path, broken, folder / name) for name in SLOW_BROKEN),
    ], folder, "tests/context_runs.py")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def three_ranks(wide_path, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    config = case("full", wide_path, data, folder / "full", context_parallel_size=3)
    torchrun(3, [config], folder, "tests/context_runs.py", "4/2", "8/2", "12/2", "28/4", "3/1")
    return folder


@pytest.fixture(scope="module")
def four_ranks(tiny_path, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    torchrun(4, [
        *(case(name, tiny_path, data, folder / name) for name in FOUR),
        faulty_case("gradients_twice", tiny_path, data, folder / "gradients_twice"),
        case("", tiny_path, data, folder / "refused 8", context_parallel_size=8),
    ], folder, "tests/context_runs.py", "4/2", "12/2", "28/4", "6/3", "4/4")  # fmt: skip
    return folder


def equal(run: Path, config: dict, one: Path) -> None:
    """Losses and weights of a run and of the same on one process, and what both logged."""
    assert metrics(run) == pytest.approx(metrics(one), abs=1e-12)
    same(run, one, 1e-12)
    if "eval_data" in config:
        assert len(metrics(one, "eval_loss")) > 1
        answered = ("eval_token_f1", "eval_exact_match", "eval_questions") if "eval_samples" in config else ()
        for key in ("eval_loss", "eval_token_accuracy", *answered):
            assert metrics(run, key) == pytest.approx(metrics(one, key), abs=1e-10), key
            assert metrics(one, key), key


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, two_ranks, one_process, tiny_path, data):
    config = case(name, tiny_path, data, two_ranks / name)
    equal(two_ranks / name, config, one_process(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_on_two_ranks_equals_one(name, slow_two_ranks, one_process, tiny_path, data):
    config = case(name, tiny_path, data, slow_two_ranks / name)
    equal(slow_two_ranks / name, config, one_process(config))


@pytest.mark.slow
def test_three_ranks_equal_one(three_ranks, one_process, wide_path, data):
    """Heads that 3 does not divide. No last bit is lost to fp32, as with transformers' own norms and rotation."""
    config = case("full", wide_path, data, three_ranks / "full", context_parallel_size=3)
    equal(three_ranks / "full", config, one_process(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(name, four_ranks, one_process, tiny_path, data):
    config = case(name, tiny_path, data, four_ranks / name)
    equal(four_ranks / name, config, one_process(config))


def is_seen(fault: str, folder: Path, one_process, tiny_path, data) -> bool:
    """What the comparisons above would say of it."""
    one = one_process(faulty_case(fault, tiny_path, data, folder / fault))
    norms = [metrics(run, "grad_norm")[0] for run in (folder / fault, one)]
    return norms[0] != pytest.approx(norms[1], rel=1e-7)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, two_ranks, one_process, tiny_path, data):
    assert is_seen(name, two_ranks, one_process, tiny_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_FAULTS)
def test_more_planted_faults_are_seen(name, slow_two_ranks, one_process, tiny_path, data):
    assert is_seen(name, slow_two_ranks, one_process, tiny_path, data)


@pytest.mark.slow
def test_a_planted_fault_of_four_ranks_is_seen(four_ranks, one_process, tiny_path, data):
    assert is_seen("gradients_twice", four_ranks, one_process, tiny_path, data)


def test_float32(two_ranks, one_process, tiny_path, data):
    one = one_process(case("", tiny_path, data, two_ranks / "float32", dtype="float32"))
    assert len(metrics(one)) == 3
    assert metrics(two_ranks / "float32") == pytest.approx(metrics(one), abs=1e-5)


@pytest.mark.slow
def test_ten_steps_in_float32_and_bfloat16(slow_two_ranks, one_process, tiny_path, data):
    one = one_process(case("", tiny_path, data, slow_two_ranks / "float32", dtype="float32", max_steps=10))
    assert len(metrics(one)) == 10
    assert metrics(slow_two_ranks / "float32") == pytest.approx(metrics(one), abs=1e-5)
    assert metrics(slow_two_ranks / "bfloat16") == pytest.approx(metrics(one)[:3], rel=1e-2)
    assert {tensor.dtype for tensor in weights(slow_two_ranks / "bfloat16").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_checkpoints_know_no_context(saved, slow_two_ranks):
    """Saved on one and resumed on two ranks of a row, saved so and resumed on two ranks with rows of their own."""
    same(slow_two_ranks / "saved", saved)
    for name in ("1to2", "2to1"):
        assert gap(slow_two_ranks / name, saved) < 1e-12, name
        assert [line["step"] for line in runs.log(slow_two_ranks / name) if "loss" in line] == [3, 4], name


def saved_with(settings: dict, directory: Path) -> list[str]:
    """Flags that resume from a checkpoint of which there are the settings alone."""
    step = directory / "checkpoints" / "step_000002"
    step.mkdir(parents=True)
    settings = {**dataclasses.asdict(Config()), **settings}
    (step / "state.json").write_text(json.dumps({"step": 2, "settings": settings}, indent=2) + "\n0\n")
    return ["--resume", str(step)]


def test_one_process_inherits_nothing_of_matrices_in_parts(tmp_path):
    """--sequence_parallel without --tensor_parallel_size would be refused."""
    found = parse_arguments("", saved_with({"tensor_parallel_size": 2, "sequence_parallel": True}, tmp_path))
    assert (found.tensor_parallel_size, found.sequence_parallel) == (1, False)


def test_one_process_inherits_no_split(tmp_path, monkeypatch):
    """What finetune.py goes on with; several processes go on as they were."""
    flags = saved_with({"context_parallel_size": 2}, tmp_path)
    assert parse_arguments("", flags).context_parallel_size == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_arguments("", flags).context_parallel_size == 2
    assert parse_arguments("", [*flags, "--context_parallel_size", "4"]).context_parallel_size == 4


@pytest.mark.slow
def test_a_checkpoint_resumes_in_one_process(saved, slow_two_ranks, tiny_path, data, tmp_path):
    third = str(slow_two_ranks / "saved" / "checkpoints" / "step_000002")
    config = case("", tiny_path, data, tmp_path / "one", **{**SAVED, "context_parallel_size": 1}, resume=third)
    assert gap(Path(finetune.train(Config(**config))), saved) < 1e-12


# ---- a sample that cannot be read -----------------------------------------------------------------------------------


def test_a_sample_that_is_skipped_is_counted_once(two_ranks, one_process, tiny_path, broken):
    config = broken_case("skips", tiny_path, broken, two_ranks / "skips")
    one = one_process(config)
    equal(two_ranks / "skips", config, one)
    for key in ("skipped", "skipped_not_readable"):
        assert metrics(two_ranks / "skips", key) == metrics(one, key) == [1], key


@pytest.mark.parametrize(
    ("name", "job"),
    [("stops", "two_ranks"), pytest.param("stops in evaluation", "slow_two_ranks", marks=pytest.mark.slow)],
)
def test_a_sample_that_cannot_be_read_ends_all_ranks_alike(name, job, request):
    """With one message, after the first step, which is saved."""
    run = request.getfixturevalue(job) / name
    said = [(run / f"ended_{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    lines = said[0].splitlines()
    assert "data.json, sample " in lines[0]
    assert said[0].count(".png") == 1, said[0]
    assert lines[-1].startswith("stopped after step 1, which is saved; go on with:")
    assert len(runs.losses(run)) == 1
    assert verify(run / "checkpoints" / "step_000001")["step"] == 1


# ---- what is read, and what is sent ---------------------------------------------------------------------------------


def noted(folder: Path, name: str, what: str, ranks: int) -> list[dict]:
    """What context_runs.py noted of a run on each rank."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text())[what] for rank in range(ranks)]


@pytest.mark.parametrize(
    ("job", "name", "ranks"),
    [
        ("two_ranks", "optimizer, accumulation of 8, a sample a row", 2),
        pytest.param("four_ranks", "4", 4, marks=pytest.mark.slow),
    ],
)
def test_a_sample_is_read_by_one_rank(job, name, ranks, request):
    """24 samples in rows of one: each once, by turns. The plan shows sample 0, which the first rank reads for it."""
    read = noted(request.getfixturevalue(job), name, "read", ranks)
    read[0]["0"] -= 1
    read = [Counter({index: times for index, times in own.items() if times}) for own in read]
    assert [own.total() for own in read] == [24 // ranks] * ranks
    together = sum(read, Counter())
    assert len(together) == together.total() == 24, "a sample was read on two ranks"


LAYERS, HEADS, WIDTH = 4, (4, 2), 32  # of tiny: decoder layers, heads and those of keys and values, numbers in a head


@pytest.mark.parametrize(
    ("name", "recomputed", "trains_tower"),
    [
        ("full", False, True),
        pytest.param("full checkpointing", True, True, marks=pytest.mark.slow),
        pytest.param("selective checkpointing", True, True, marks=pytest.mark.slow),
        pytest.param("frozen tower", False, False, marks=pytest.mark.slow),
    ],
)
def test_all_to_alls_are_three_a_layer_and_pass(name, recomputed, trains_tower, request):
    """And one for the visual tokens, with its way back where the tower is trained. 3 steps of a micro-batch each."""
    folder = request.getfixturevalue("two_ranks" if name == "full" else "slow_two_ranks")
    found = noted(folder, name, "calls", 2)
    in_layers = LAYERS * 3 * (3 if recomputed else 2)
    assert [calls["all_to_all"] for calls in found] == [3 * (in_layers + 1 + trains_tower)] * 2
    if name == "frozen tower":
        return
    # Forward a rank hands in all heads of its tokens, and the queries' half of all tokens; backward the same.
    tokens = [tokens + tokens % 2 for tokens in metrics(folder / name, "tokens")]
    heads, key_value_heads = HEADS
    in_layers = sum(tokens) // 2 * (heads + 2 * key_value_heads + heads) * WIDTH * 8 * LAYERS * (3 if recomputed else 2)
    visual = 2 * sum(metrics(folder / name, "visual_tokens")) * 128 * 8  # of both ranks: made, and come back
    blank = 0  # the four blank patches of a rank without a picture give one token, which is not sent
    handed = sum(sizes["all_to_all"] for sizes in noted(folder, name, "bytes", 2))
    assert handed == 2 * in_layers + visual + blank


# ---- parts of a batch -----------------------------------------------------------------------------------------------


def sample(text: int, *grids: tuple[int, int, int]) -> Sample:
    """`text` tokens, of which the last third is supervised; media stand behind the first. One frame: an image."""
    media = []
    for grid in [Grid(*sizes) for sizes in grids]:
        is_video = grid.t > 1
        size = (grid.t * grid.h * grid.w, 588 * (1 + is_video))
        media.append(Medium(torch.randint(256, size, dtype=torch.uint8), grid, is_video))
    ids = torch.randint(10, 90, (text,)).tolist()
    weights = [0.0] * (text - text // 3) + [0.5 * (number + 1) for number in range(text // 3)]
    return Sample(Encoded(ids, weights, list(range(1, 1 + len(media)))), media, "a sample")


BATCHES = {
    "no sample": [],
    "a token": [(1,)],
    "three tokens": [(3,)],
    "text": [(11,), (7,), (2,)],
    "an answer in the last part": [(30,)],
    "images": [(9, (1, 4, 6), (1, 2, 2)), (6, (1, 8, 8))],
    "videos": [(9, (4, 4, 6)), (5, (2, 2, 4))],
    "all of it": [(20, (1, 4, 6), (6, 2, 4)), (8,), (3, (1, 6, 6)), (12, (2, 4, 4), (1, 2, 2))],
}


def pixels_by_row(rows: list[int], patches: list[torch.Tensor]) -> dict[int, bytes]:
    """Of each row of visual tokens the bytes of its four patches."""
    found = {}
    numbers = [patch.numpy().tobytes() for of_kind in patches for patch in of_kind]
    for row, begin in zip(rows, range(0, len(numbers), 4), strict=False):
        found[row] = b"".join(numbers[begin : begin + 4])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", BATCHES)
def test_parts_make_the_whole(name, ranks):
    torch.manual_seed(0)
    whole = Collator()([sample(text, *grids) for text, *grids in BATCHES[name]])
    parts = context.parts_of(whole, ranks)
    length = len(whole.input_ids)
    size = len(parts[0].input_ids)
    assert [len(part.input_ids) for part in parts] == [size] * ranks
    assert 0 <= size * ranks - length < ranks
    assert torch.equal(torch.cat([part.input_ids for part in parts])[:length], whole.input_ids)
    assert torch.equal(torch.cat([part.position_ids for part in parts], 1)[:, :length], whole.position_ids)
    for field in ("target_ids", "target_weights"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    supervised = [part.supervised_index + rank * size for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(supervised), whole.supervised_index)
    assert all(((part.supervised_index >= 0) & (part.supervised_index < size)).all() for part in parts)
    for part in parts:
        lengths = part.segments.lengths
        assert lengths[: len(whole.segments.lengths)] == whole.segments.lengths
        assert sum(lengths) == size * ranks, "what is short of a multiple is a segment of its own"
        for field, value in vars(whole).items():
            if isinstance(value, torch.Tensor):
                assert getattr(part, field).dtype == value.dtype, f"{field} of a part without any"


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("name", BATCHES)
def test_visual_tokens_arrive_where_they_stand(name, ranks):
    """Each with the pixels that it has in the whole batch, by the exchange done by hand."""
    torch.manual_seed(0)
    whole = Collator()([sample(text, *grids) for text, *grids in BATCHES[name]])
    expected = pixels_by_row(whole.visual_index.tolist(), [whole.image_patches, whole.video_patches])
    parts = [with_blank_patches(part) for part in context.parts_of(whole, ranks)]
    size = len(parts[0].input_ids)
    sent = []  # by rank that sends: of each rank that gets them its tokens' pixels
    for part in parts:
        patches = len(part.image_patches) + len(part.video_patches)
        assert patches == len(part.vision_position_ids) == sum(part.vision_segments.lengths) > 0
        tokens = pixels_by_row(list(range(patches // 4)), [part.image_patches, part.video_patches])
        ordered = iter([tokens[number] for number in part.sent_index.tolist()])
        sent.append([[next(ordered) for _ in range(count)] for count in part.sent])
    found = {}
    for rank, part in enumerate(parts):
        assert part.received == [len(from_one[rank]) for from_one in sent]
        arrived = [pixels for from_one in sent for pixels in from_one[rank]]
        for row, pixels in zip(part.visual_index.tolist(), arrived, strict=True):
            found[rank * size + row] = pixels
    assert found == expected


def test_a_part_goes_to_the_device_as_a_part():
    """Else its attention would take the part for the row."""
    torch.manual_seed(0)
    part = context.parts_of(Collator()([sample(9, (1, 4, 4))]), 2)[1].to(torch.device("cpu"))
    assert isinstance(part, context.RowPart)
    assert isinstance(part.segments, context.RowSegments)


def test_a_share_travels_whole():
    """As it is made anew from what is sent; a view without the rest of its memory."""
    torch.manual_seed(0)
    part = context.parts_of(Collator()([sample(40, (1, 4, 4), (4, 2, 2)), sample(9)]), 2)[0]
    part.position_ids = torch.arange(3_000_000).reshape(3, -1)[:, : len(part.input_ids)]
    sent: list = []
    with patch.object(rows.dist, "send_object_list", lambda objects, *_: sent.append(pickle.dumps(objects))), \
         patch.object(rows.dist, "send", lambda memory, *_: sent.append(memory.clone())):  # fmt: skip
        rows.send(part, 1, None)
    assert sum(map(len, sent)) < 100_000
    arriving = iter(sent)

    def take(box: list, *_: object) -> None:
        box[:] = pickle.loads(next(arriving))

    with patch.object(rows.dist, "recv_object_list", take), \
         patch.object(rows.dist, "recv", lambda memory, *_: memory.copy_(next(arriving))):  # fmt: skip
        found = rows.received(0, None)
    assert isinstance(found, context.RowPart)
    assert isinstance(found.segments, context.RowSegments)
    for field in dataclasses.fields(part):
        ours, theirs = getattr(found, field.name), getattr(part, field.name)
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs), field.name
            assert ours.dtype == theirs.dtype
        elif "segments" in field.name:
            assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
            assert ours.runs == theirs.runs
        else:
            assert ours == theirs, field.name


def test_what_is_counted_is_counted_once():
    torch.manual_seed(0)
    whole = Collator()([sample(9, (1, 4, 4)), sample(6)])
    for rank in range(4):
        world = World(rank, 4, torch.device("cpu"), Layout(2, context=2), [rank // 2 * 2, rank // 2 * 2 + 1])
        counts = [share.counts for share in rows.shares_of(whole, world)]
        assert counts[0] == whole.counts
        assert set(counts[1].values()) == {0}
        assert [type(number) for number in counts[1].values()] == [type(number) for number in whole.counts.values()]


def test_heads_by_hand():
    def dealt(*sizes: int) -> list[tuple]:
        return [
            (own.queries.start, own.queries.stop, own.keys.start, own.keys.stop) for own in context.deal_heads(*sizes)
        ]

    assert dealt(12, 2, 2) == [(0, 6, 0, 1), (6, 12, 1, 2)]  # 2B
    assert dealt(12, 2, 4) == [(0, 3, 0, 1), (3, 6, 0, 1), (6, 9, 1, 2), (9, 12, 1, 2)]
    assert dealt(28, 4, 2) == [(0, 14, 0, 2), (14, 28, 2, 4)]  # 7B
    # on 8 ranks 4 and 3 of the 7 queries that read the same keys
    assert dealt(28, 4, 8)[:4] == [(0, 3, 0, 1), (3, 7, 0, 1), (7, 10, 1, 2), (10, 14, 1, 2)]
    assert dealt(64, 8, 16)[:3] == [(0, 4, 0, 1), (4, 8, 0, 1), (8, 12, 1, 2)]  # 72B
    assert dealt(8, 2, 3) == [(0, 2, 0, 1), (2, 5, 0, 2), (5, 8, 1, 2)]
    middle = context.deal_heads(8, 2, 3)[1]
    assert middle.spread(torch.tensor([[[1.0], [2.0]]])).flatten().tolist() == [1, 1, 2]  # queries 2, 3 and 4


@pytest.mark.parametrize(
    ("ranks", "name", "message"),
    [
        (2, "refused 4", "--context_parallel_size 4 does not divide the 2 processes"),
        (2, "refused cache", "--cache_dir keeps what a frozen vision tower gives"),
        pytest.param(
            4, "refused 8", "--context_parallel_size 8 does not divide the 4 processes", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(ranks, name, message, request):
    folder = request.getfixturevalue("two_ranks" if ranks == 2 else "four_ranks")
    for rank in range(ranks):
        assert (folder / name / f"ended_{rank}").read_text().startswith(message)
    assert not (folder / name / "metrics.jsonl").exists()


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(UserError, match=r"--context_parallel_size 14: .* this model has 12; use at most 12"):
        context.check_sizes(official_config("2b"), 14)
    context.check_sizes(official_config("7b"), 28)
    context.check_sizes(official_config("2b"), 6, of_a_matrix=2)
    with pytest.raises(UserError, match=r"has 12, 6 on each rank of --tensor_parallel_size 2; use at most 6"):
        context.check_sizes(official_config("2b"), 8, of_a_matrix=2)


def test_ranks_that_read_by_turns_share_the_data_workers(monkeypatch):
    """Of 8 beside a GPU; what is typed is for each rank."""
    monkeypatch.setattr(loader, "usable_cpus", lambda: 32)
    gpu = torch.device("cuda")
    assert loader.worker_count(Config(), gpu) == 8
    assert loader.worker_count(Config(context_parallel_size=2), gpu) == 4
    assert loader.worker_count(Config(context_parallel_size=2, tensor_parallel_size=2), gpu) == 2
    assert loader.worker_count(Config(pipeline_parallel_size=4), gpu) == 8, "the first stage reads alone"
    assert loader.worker_count(Config(tensor_parallel_size=2, num_workers=3), gpu) == 3


def test_one_process_refuses_it(tiny_path, data, tmp_path):
    with pytest.raises(UserError, match=r"NPROC_PER_NODE=2 ./finetune_distributed.sh --context_parallel_size 2"):
        finetune.train(Config(**case("", tiny_path, data, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# ---- the forecast ---------------------------------------------------------------------------------------------------


def test_an_hour_of_video_fits_8_gpus():
    """7B on 8 of 80 GiB: 16,384 visual tokens and 65,536 patches on each, with full checkpointing."""
    model_config = official_config("7b")
    hour = (131072 + 300, 4 * 131072, 100)

    def needed(context_size: int, checkpointing: str) -> float:
        config = Config(context_parallel_size=context_size, activation_checkpointing=checkpointing)
        counts = memory.count_parameters(model_config, config)
        parts = memory.forecast(
            model_config, counts, config, torch.bfloat16, [hour], shards=8, largest_picture=3072,
            device=torch.device("cuda"),
        )  # fmt: skip
        return (sum(parts.values()) + memory.reserved_margin(parts)) / memory.GIB

    assert needed(8, "full") < 40
    assert needed(4, "full") < 60
    assert needed(1, "full") > 100
    assert needed(8, "selective") > 100, "without full checkpointing it does not fit"


def test_the_fullest_rank_of_a_row():
    config = Config(context_parallel_size=4)
    assert memory.load_of_rank((1001, 4000, 90), config) == (251, 1000, 90)
    assert memory.load_of_rank((1001, 4000, 900), config) == (251, 1000, 251), "all that is supervised, in one part"
    assert memory.load_of_rank((1001, 4000, 90), config, largest_picture=4000) == (251, 4000, 90), "one picture"
    assert memory.load_of_rank((1001, 4000, 90), config, largest_picture=40) == (251, 1030, 90)
    assert memory.load_of_rank((1001, 4000, 90), Config(), largest_picture=400) == (1001, 4000, 90)


# ---- jobs that end early --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_data_worker_that_fails_ends_the_job_with_the_first_cause(tiny_path, tmp_path):
    """That of the rank that reads; the other, which waits for its part, ends alike, after a step that is saved."""
    config = case("", tiny_path, {"showcase": ROOT / "train_data" / "data.json"}, tmp_path / "run", max_steps=8)
    _, said = finish(launch("raises in data worker", {**config, "num_workers": 1}), expect=1)
    assert re.fullmatch(r"stopped after step \d, which is saved; .*", said.splitlines()[-1]), said
    assert said.count("RuntimeError: the disk of this machine is on fire") == 1, said


@pytest.mark.slow
def test_a_first_batch_that_cannot_be_read_leaves_nothing(tiny_path, tmp_path):
    """One message of the rank that reads; the other, which waits for its part, says nothing."""
    picture = bytearray((ROOT / "train_data" / "media" / "0000_colour_0.png").read_bytes())
    picture[len(picture) // 2 : len(picture) // 2 + 20] = bytes(20)
    (tmp_path / "half.png").write_bytes(picture)
    question = [{"type": "image", "image": "half.png"}, {"type": "text", "text": "What?"}]
    entry = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "half"}]}
    text = {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "what"}]}
    (tmp_path / "data.json").write_text(json.dumps([text, entry]))
    config = case("", tiny_path, {"showcase": tmp_path / "data.json"}, tmp_path / "run")
    _, said = finish(launch("none", config), expect=2)
    assert said.count("half.png") == 1, said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first batch", "data", "step", "loss", "answers", "save"])
def test_a_signal_to_all_saves_and_ends_the_job(moment, start):
    check(start(moment, ranks=2, context_parallel_size=2), "SIGTERM", to_all=True)


@pytest.mark.slow
def test_a_slow_rank_is_named_and_not_the_one_that_waits_for_it(tiny_path, tmp_path):
    """In every layer rank 0 waits in attention for rank 1, which sleeps 0.1 s."""
    showcase = {"showcase": ROOT / "train_data" / "data.json"}
    config = case("", tiny_path, showcase, tmp_path / "run", max_steps=20, dtype="float32")
    printed, _ = finish(launch("slow", config), expect=0)
    assert re.findall(r"step 20: (rank \d) is slow", printed) == ["rank 1"], printed[-2000:]


@pytest.mark.slow
def test_four_bits_and_compiled_layers(one_process, tiny_path, data, tmp_path):
    four_bits = case("", tiny_path, data, tmp_path / "four bits", lora_rank=4, quantize="nf4", dtype="float32")
    compiled = case("", tiny_path, data, tmp_path / "compiled", compile="on")
    torchrun(2, [four_bits, compiled], tmp_path, "tests/context_runs.py")
    assert metrics(tmp_path / "four bits") == pytest.approx(metrics(one_process(four_bits)), abs=1e-5)
    plain = one_process({**compiled, "compile": "off"})
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(plain), rel=1e-6)
