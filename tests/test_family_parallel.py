"""Qwen2.5-VL and Qwen3-VL on 2 and 4 real processes (gloo, CPU): with every kind of sharding and of parallelism the
losses and weights of one process.

What is checked of each is new in a family: windows, learned positions, visual tokens that are added to later layers,
norms within heads, MLPs by other names, and a video whose frames stand apart in the text.
"""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import finetune
from tests import runs, samples
from tests.official import official_config
from tests.runs import metrics, weights
from tests.test_distributed import gap, same, torchrun
from util.collator import Collator
from util.command_line import UserError
from util.config import Config
from util.conversation import Encoded
from util.cost import layouts, stages
from util.dataset import Sample
from util.family import FAMILIES, new_model
from util.parallel import context, tensor
from util.publish.export import export
from util.tiny_model import make_tiny_model
from util.vision import Grid, Medium

ROOT = Path(__file__).resolve().parent.parent
SHOWCASE = ROOT / "train_data" / "data.json"
NEW = ("qwen2_5_vl", "qwen3_vl")

# ---- whole runs -----------------------------------------------------------------------------------------------------

# One sample has pictures: one of two ranks has blank patches beside it, and in half of the steps both have.
SPARSE = {"data": "texts", "global_batch_size": 2, "max_steps": 4}
SHARDED = {
    "full": {},
    "gradients": {"sharding": "gradients"},
    "optimizer": {"sharding": "optimizer", "micro_batch_size": 1},
    "none": {"sharding": "none", "activation_checkpointing": "full"},
}
SPLIT = {
    "rows": {"context_parallel_size": 2},
    "matrices": {"tensor_parallel_size": 2},
    "matrices and rows between": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "stages": {"pipeline_parallel_size": 2},
}
ON_TEXTS = {name: {**SPARSE, **changes} for name, changes in SHARDED.items()}
# Of the kinds of sharding two with each family; with --slow all with both.
TWO = {
    "qwen2_5_vl": {**SPLIT, "full": ON_TEXTS["full"], "optimizer": ON_TEXTS["optimizer"]},
    "qwen3_vl": {**SPLIT, "gradients": ON_TEXTS["gradients"], "none": ON_TEXTS["none"]},
}
EVALUATED = {"eval_data": "mixed", "eval_every": 2, "final": "last"}
SLOW_TWO = {
    **ON_TEXTS,
    "rows, recomputed": {
        **EVALUATED,
        "eval_samples": 3,
        "context_parallel_size": 2,
        "activation_checkpointing": "selective",
        "micro_batch_size": 1,
    },
    "rows of texts": {**SPARSE, "context_parallel_size": 2, "sharding": "optimizer"},
    "matrices, texts": {**SPARSE, "tensor_parallel_size": 2, "activation_checkpointing": "full"},
    "matrices and rows between, recomputed": {
        **EVALUATED,
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
        "activation_checkpointing": "selective",
        "micro_batch_size": 1,
    },
    "matrices, frozen language model": {
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
        "freeze": ["language_model"],
    },
    "stages, texts": {**SPARSE, **EVALUATED, "pipeline_parallel_size": 2, "sharding": "optimizer"},
    "stages, frozen tower": {"pipeline_parallel_size": 2, "freeze": ["vision", "merger"], "micro_batch_size": 1},
    "frozen tower": {"freeze": ["vision"], "sharding": "gradients"},
}
SLOW_FOUR = {
    "data": {"global_batch_size": 6, "micro_batch_size": 1, "shard_group_size": 2},
    "rows and data": {"context_parallel_size": 2, "sharding": "none"},
    "four parts of a row": {"context_parallel_size": 4, "micro_batch_size": 1},
    "rows and matrices": {"context_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True},
    "stages and matrices": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True},
    "stages and rows": {"pipeline_parallel_size": 2, "context_parallel_size": 2, "micro_batch_size": 1},
}
SAVED = {"save_every": 2, "keep": 9}
# What users run most: bf16, evaluated, saved, and gone on from there.
USUAL = {**SAVED, "dtype": "bfloat16", "eval_data": "texts", "eval_every": 2, "max_steps": 4, "final": "last"}
OF_SEVERAL = (
    "context_parallel_size",
    "tensor_parallel_size",
    "sequence_parallel",
    "pipeline_parallel_size",
    "sharding",
    "shard_group_size",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A model of each family, Qwen2.5-VL's with a head of its own, as 7B has, and Qwen3-VL's tied, as 2B and 4B have;
    the other way about; one whose visual tokens go to all four layers. Data of all kinds, and of pictures in one sample
    among texts."""
    folder = tmp_path_factory.mktemp("places")
    found = {}
    for family in NEW:
        path = make_tiny_model(folder / family, model_type=family)
        found[f"{family} tied"] = str(path)
        found[f"{family} untied"] = varied(path, folder / f"{family} untied", tie_word_embeddings=False)
    found["qwen2_5_vl"] = found["qwen2_5_vl untied"]
    found["qwen3_vl"] = found["qwen3_vl tied"]
    found["deep"] = varied(Path(found["qwen3_vl"]), folder / "deep", deepstack_visual_indexes=[0, 1, 2, 3])
    entries = json.loads(SHOWCASE.read_text().replace('"media/', f'"{SHOWCASE.parent}/media/'))
    by_kind = {entry["kind"]: entry for entry in reversed(entries)}
    texts = [samples.entry(samples.user(f"Say {n}"), samples.assistant("x" * n)) for n in range(1, 5)]
    pictures = [by_kind[kind] for kind in ("shape", "several images", "motion", "image and video")]
    for name, chosen in (("texts", [pictures[3], *texts[:3]]), ("mixed", [*pictures, *texts[:2]])):
        found[name] = str(folder / f"{name}.json")
        Path(found[name]).write_text(json.dumps(chosen))
    return found


def varied(path: Path, folder: Path, **changes) -> str:
    """A model of random weights with another config, beside the processor of the one in `path`."""
    config = AutoConfig.from_pretrained(path)
    for name, value in changes.items():
        setattr(config if name == "tie_word_embeddings" else config.vision_config, name, value)
    torch.manual_seed(1)
    model = new_model(config)
    model.generation_config = GenerationConfig.from_pretrained(path)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(path).save_pretrained(folder)
    return str(folder)


def settings(places: dict[str, str], family: str, directory: Path, **changes) -> dict:
    """A run in pictures of 64 tokens and more: of windows of 16 there are several, whole ones and cut ones."""
    own = {"model": family, "data": "mixed", "global_batch_size": 3, "max_steps": 3, "dtype": "float64"}
    own |= {"max_pixels": 256 * 256, **changes}
    for name in {"data", "eval_data"} & own.keys():
        own[name] = [places[own[name]]]
    own["model"] = places[own["model"]]
    return {**runs.settings(Path(), directory), **own}


def train_alone(own: dict) -> Path:
    """In this process, with what settings say of several left out."""
    return Path(finetune.train(Config(**{name: own[name] for name in own if name not in OF_SEVERAL})))


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    """A function (family, settings) -> the run of one process, made once for all that differ in what several share."""
    made: dict[str, Path] = {}

    def run(family: str, changes: dict) -> Path:
        kept = {name: changes[name] for name in changes if name not in (*OF_SEVERAL, "micro_batch_size")}
        kept.pop("activation_checkpointing", None)
        key = json.dumps([family, kept], sort_keys=True)
        if key not in made:
            made[key] = train_alone(settings(places, family, tmp_path_factory.mktemp("one") / "run", **kept))
        return made[key]

    return run


@pytest.fixture(scope="module")
def two_ranks(places, tmp_path_factory) -> Path:
    """All runs on two ranks in one job."""
    folder = tmp_path_factory.mktemp("two")
    configs = []
    for family in NEW:
        for name, changes in TWO[family].items():
            configs.append(settings(places, family, folder / f"{family} {name}", **changes))
        usual = folder / f"{family} usual"
        goes_on = {**USUAL, "resume": str(usual / "checkpoints" / "step_000002")}
        configs += [settings(places, family, usual, **USUAL)]
        configs += [settings(places, family, folder / f"{family} gone on", **goes_on)]
    configs.append(settings(places, "deep", folder / "too deep", pipeline_parallel_size=2))
    torchrun(2, configs, folder)
    return folder


def several(ranks: int, cases: dict[str, dict], places: dict[str, str], folder: Path) -> Path:
    configs = []
    for family in NEW:
        configs += [settings(places, family, folder / f"{family} {name}", **changes) for name, changes in cases.items()]
    torchrun(ranks, configs, folder)
    return folder


@pytest.fixture(scope="module")
def slow_two(places, tmp_path_factory) -> Path:
    return several(2, SLOW_TWO, places, tmp_path_factory.mktemp("slow_two"))


@pytest.fixture(scope="module")
def slow_four(places, tmp_path_factory) -> Path:
    return several(4, SLOW_FOUR, places, tmp_path_factory.mktemp("slow_four"))


def equal(run: Path, one: Path) -> None:
    same(run, one)
    # AdamW hardly changes where all gradients are larger by one factor; their norm tells of it.
    assert metrics(run, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-11)
    for key in ("eval_loss", "eval_token_accuracy", "eval_token_f1"):
        assert metrics(run, key) == pytest.approx(metrics(one, key), abs=1e-12), key


def of_each(cases: dict) -> list[tuple[str, str]]:
    return [*product(NEW, cases)]


@pytest.mark.parametrize(("family", "name"), [*product(NEW[:1], TWO[NEW[0]]), *product(NEW[1:], TWO[NEW[1]])])
def test_two_ranks_equal_one(family, name, two_ranks, alone):
    equal(two_ranks / f"{family} {name}", alone(family, TWO[family][name]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), of_each(SLOW_TWO))
def test_more_on_two_ranks_equals_one(family, name, slow_two, alone):
    equal(slow_two / f"{family} {name}", alone(family, SLOW_TWO[name]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), of_each(SLOW_FOUR))
def test_four_ranks_equal_one(family, name, slow_four, alone):
    equal(slow_four / f"{family} {name}", alone(family, SLOW_FOUR[name]))


@pytest.mark.slow
def test_heads_of_their_own_and_tied_ones(places, alone, tmp_path):
    """Each family also as the tests above do not have it: Qwen2.5-VL tied, as 3B is, and Qwen3-VL untied, as 8B is."""
    models = ("qwen2_5_vl tied", "qwen3_vl untied")
    configs = []
    for model in models:
        configs += [settings(places, model, tmp_path / f"{model} {name}", **SPLIT[name]) for name in SPLIT]
    torchrun(2, configs, tmp_path)
    for model in models:
        for name in SPLIT:
            equal(tmp_path / f"{model} {name}", alone(model, SPLIT[name]))


@pytest.mark.parametrize("family", NEW)
def test_a_usual_run_in_bfloat16_goes_on_bit_by_bit(family, two_ranks, alone):
    """Evaluated by its loss, saved, resumed; near to the run of one process."""
    run, gone_on = two_ranks / f"{family} usual", two_ranks / f"{family} gone on"
    ours, theirs = weights(gone_on), weights(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(gone_on) == metrics(run)[2:]
    assert metrics(gone_on, "eval_loss") == metrics(run, "eval_loss")[1:]
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    one = alone(family, USUAL)
    for key in ("loss", "eval_loss"):
        assert metrics(run, key) == pytest.approx(metrics(one, key), rel=2e-2), key
    AutoModelForImageTextToText.from_pretrained(run)  # by transformers alone


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_checkpoints_go_from_two_ranks_to_one_and_back(family, places, tmp_path):
    """Saved under one kind of parallelism after 2 of 6 steps, then in one process after 4, then ended under another."""
    whole = {**SAVED, "max_steps": 6}
    first, second = {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}
    torchrun(2, [settings(places, family, tmp_path / "two", **whole, **first)], tmp_path)
    of_two = {**whole, "resume": str(tmp_path / "two" / "checkpoints" / "step_000002")}
    one = train_alone(settings(places, family, tmp_path / "one", **of_two))
    of_one = {**whole, "resume": str(one / "checkpoints" / "step_000004")}
    torchrun(2, [settings(places, family, tmp_path / "back", **of_one, **second),
                 settings(places, family, tmp_path / "rows", **of_one, context_parallel_size=2),
                 settings(places, family, tmp_path / "data", **of_one, sharding="optimizer")], tmp_path)  # fmt: skip
    for name in ("one", "back", "rows", "data"):
        assert gap(tmp_path / name, tmp_path / "two") < 1e-12, name
    export(tmp_path / "two" / "checkpoints" / "step_000006", tmp_path / "export")
    ours, theirs = weights(tmp_path / "export"), weights(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- what cannot be is refused --------------------------------------------------------------------------------------


def test_stages_that_leave_too_few_layers_with_the_tower_are_refused_by_name(two_ranks):
    for rank in range(2):
        said = (two_ranks / "too deep" / f"refused_{rank}").read_text()
        assert "--pipeline_parallel_size 2: the language model has 4 layers, and the first stage needs 4" in said
        assert "give at most --pipeline_parallel_size 1" in said
    assert not (two_ranks / "too deep" / "metrics.jsonl").exists()


def sizes(depth: int, deepstack: list[int] | None) -> SimpleNamespace:
    """What a config says of a model's depth."""
    tower = {} if deepstack is None else {"deepstack_visual_indexes": deepstack}
    return SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=depth), vision_config=SimpleNamespace(**tower))


def test_the_first_stage_keeps_the_layers_that_visual_tokens_are_added_to():
    """The published Qwen3-VL has 28 or 36 layers, and adds visual tokens after 3 of them."""
    published = sizes(28, [5, 11, 17])
    assert layouts.layers_with_the_tower(published) == 3
    assert layouts.cut_stages(28, 4, before=74, layer=1, after=0, of_first=3) == (3, 8, 8, 9)
    assert layouts.cut_stages(28, 4, before=0, layer=1, after=0, of_first=3) == (7, 7, 7, 7)
    stages.refuse_too_few_layers(published, 26)
    with pytest.raises(UserError, match=r"the first stage needs 3.*at most --pipeline_parallel_size 26"):
        stages.refuse_too_few_layers(published, 27)
    with pytest.raises(UserError, match="each stage needs one; give at most --pipeline_parallel_size 28"):
        stages.refuse_too_few_layers(sizes(28, None), 29)


@pytest.mark.parametrize(
    ("size", "heads", "most", "inner", "of_tower", "vocabulary"),
    [
        ("qwen2.5_3b", 16, 2, 11008, 3420, 151936),
        ("qwen2.5_7b", 28, 4, 18944, 3420, 152064),
        ("qwen3_2b", 16, 8, 6144, 4096, 151936),
        ("qwen3_4b", 32, 8, 9728, 4096, 151936),
        ("qwen3_8b", 32, 8, 12288, 4304, 151936),
    ],
)
def test_published_models_are_cut_as_far_as_their_key_value_heads(size, heads, most, inner, of_tower, vocabulary):
    """Numbers of their config.json."""
    published = official_config(size)
    text = published.text_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.intermediate_size) == (heads, most, inner)
    assert (published.vision_config.intermediate_size, text.vocab_size) == (of_tower, vocabulary)
    tensor.check_sizes(published, most)
    with pytest.raises(UserError, match=f"--tensor_parallel_size {2 * most} .* {most} key-value heads"):
        tensor.check_sizes(published, 2 * most)
    published.vision_config.intermediate_size = 3421
    with pytest.raises(UserError, match="3,421 columns in the vision tower's MLP"):
        tensor.check_sizes(published, 2)


# ---- a row in parts -------------------------------------------------------------------------------------------------


def medium(grid: Grid, family: str, seed: int) -> Medium:
    patch = 3 * FAMILIES[family].patch ** 2 * (2 if grid.t > 1 else 1)
    pixels = torch.randint(0, 256, (grid.patches, patch), generator=torch.Generator().manual_seed(seed))
    return Medium(pixels.to(torch.uint8), grid, is_video=grid.t > 1)


@pytest.mark.parametrize("family", NEW)
def test_a_rank_sees_its_pictures_as_if_they_were_alone(family):
    """An image of 5 x 6 tokens, a video of three pairs of frames and a small image: patches, their places, who sees
    whom, and the size of each picture, beside a batch of each alone."""
    collate = Collator(family)
    times = (0.0, 1.0, 2.0) if FAMILIES[family].timestamps else ()
    grids = [Grid(1, 10, 12), Grid(3, 8, 12, times=times), Grid(1, 4, 4)]
    media = [medium(grid, family, seed) for seed, grid in enumerate(grids)]
    places = len([place for grid in grids for place in grid.places])
    ids = [1, *[7] * places, 2]
    encoded = Encoded(ids, [0.0] * (places + 1) + [1.0], list(range(1, places + 1)))
    batch = collate([Sample(encoded, media, "here")])
    alone = [collate([Sample(Encoded([1, 7, 2], [0.0, 0.0, 1.0], [1]), [some], "")]) for some in [media[0], media[2]]]
    for number in range(3):
        frame = Medium(media[1].patches[number * 96 : (number + 1) * 96], Grid(1, 8, 12), is_video=True)
        alone.append(collate([Sample(Encoded([1, 7, 2], [0.0, 0.0, 1.0], [1]), [frame], "")]))
    parts = context.parts_of(batch, 2, FAMILIES[family])
    seen = 0
    for part in parts:
        patches = [*part.image_patches, *part.video_patches]
        begin = 0
        windows = []
        for grid in part.grid_thw.tolist():
            count = grid[1] * grid[2]
            (one,) = [some for some in alone if is_same(patches[begin : begin + count], some)]
            assert part.vision_position_ids[begin : begin + count].equal(one.vision_position_ids)
            assert grid == one.grid_thw.tolist()[0]
            windows += one.window_segments.lengths
            begin += count
            seen += 1
        assert begin == len(patches) == len(part.vision_position_ids)
        assert part.window_segments.lengths == windows
    assert seen == 5
    if family == "qwen2_5_vl":  # 5 x 6 tokens: windows of 16 + 8, then 4 + 2
        assert alone[0].window_segments.lengths == [64, 32, 16, 8]


def is_same(patches: list[torch.Tensor], one) -> bool:
    theirs = [*one.image_patches, *one.video_patches]
    return len(theirs) == len(patches) and all(map(torch.equal, patches, theirs))


def test_pictures_are_dealt_by_the_work_of_their_family():
    """A picture of 16,384 patches beside 32 of 1,024: in Qwen2-VL its attention is twice as much work as its matrix
    products, so that all others go to the other rank. Most blocks of Qwen2.5-VL see windows, and the products are nearly
    all of the work: 16,384 * 1.26 = 20,700 is what 20 of the others cost, so that 6 of 32 are dealt to its rank."""
    grids = [Grid(1, 128, 128)] + [Grid(1, 32, 32)] * 32
    for family, beside in (("qwen2_vl", 0), ("qwen2_5_vl", 6), ("qwen3_vl", 0)):
        hands = context.deal_units(grids, 2, FAMILIES[family])
        assert hands.count(hands[0]) - 1 == beside, family
