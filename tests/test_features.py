"""What a frozen tower gives, kept on disk: the same training, whoever writes, dies, fills the disk or changes a weight."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

import finetune
from tests.runs import log, metrics, settings, weights
from tests.samples import assistant, entry, text, user
from tests.test_cache import small_disk  # noqa: F401
from tests.test_passes import assert_equal
from util import frozen
from util.collator import Batch, Collator
from util.config import Config
from util.cost import flops
from util.data.cache import FrameCache
from util.data.features import FeatureCache, FeatureWriter, Unkept
from util.data.media import MediaReader
from util.dataset import Examples, Sample, Samples, Size
from util.loss import PackedLoss
from util.model import build_model, load_config, load_processor
from util.tiny_model import make_tiny_model
from util.vision import Budget, Grid, Medium

BUDGET = Budget()
FORK = multiprocessing.get_context("fork")
CPU = torch.device("cpu")
# What is trained beside the frozen tower, and whether visual tokens are kept: else it is what the merger takes.
FROZEN = {
    "tower": ({"freeze": ["vision"]}, False),
    "tower and merger": ({"freeze": ["vision", "merger"]}, True),
    "adapters": ({"lora_rank": 4}, True),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, picture, write_video) -> Path:
    """One image, several with text between, the same one again, a video, a list of frames, and text alone."""
    folder = tmp_path_factory.mktemp("data")
    for number, (height, width) in enumerate([(112, 84), (56, 140), (84, 84), (84, 84)]):
        Image.fromarray(picture(height, width, number)).save(folder / f"{number}.png")
    write_video(folder / "clip.mp4", [picture(96, 128, number) for number in range(8)], 4)

    def image(number: int) -> dict:
        return {"type": "image", "image": f"{number}.png"}

    frames = {"type": "video", "video": ["2.png", "3.png"]}
    samples = [
        entry(user([image(0), text("What is it?")]), assistant("a wave")),
        entry(
            user([image(1), text("and"), image(2), text("?")]), assistant("two"), user([image(3)]), assistant("three")
        ),
        entry(user([text("Again:"), image(0)]), assistant("the same wave")),
        entry(user([{"type": "video", "video": "clip.mp4"}, text("Describe it.")]), assistant("it moves")),
        entry(user([frames, image(1)]), assistant("frames and an image")),
        entry(user("Say yes."), assistant("yes")),
    ]
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


MEDIA = 6  # different ones in it
HEADER = 64  # bytes of an entry before its rows
BOTH = {"freeze": ["vision", "merger"]}


def of_run(model: Path, data: Path, directory: Path, **changes) -> dict:
    """Two epochs of two steps in float64, whose micro-batches hold other samples in each epoch."""
    common = {"epochs": 2, "global_batch_size": 3, "max_tokens": 90, "dtype": "float64", "data": [str(data)]}
    return settings(model, directory, **{**common, **changes})


def run(model: Path, data: Path, directory: Path, **changes) -> str:
    return finetune.train(Config(**of_run(model, data, directory, **changes)))


def assert_same(ours: str, theirs: str) -> None:
    """Losses and weights in float64; how samples are packed and ordered changes the last bits alone."""
    assert metrics(ours) == pytest.approx(metrics(theirs), abs=1e-12)
    for key in ("samples", "tokens", "visual_tokens", "supervised_tokens"):
        assert metrics(ours, key) == metrics(theirs, key)
    trained, expected = weights(ours), weights(theirs)
    gap = max((trained[name] - expected[name]).abs().max().item() for name in expected)
    assert gap < 1e-12, f"weights differ by {gap}"


@pytest.fixture
def written_at_once(monkeypatch):
    """Each step ends after what it gave is on the disk, so that a test knows what the next one finds there."""
    take = FeatureWriter.take
    monkeypatch.setattr(FeatureWriter, "take", lambda self, *given: (take(self, *given), self.wait()))


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The patches that the tower sees in each pass in which it runs."""
    tower = PackedLoss.tower
    passes: list[int] = []
    monkeypatch.setattr(
        PackedLoss, "tower", lambda self, batch: (passes.append(len(batch.vision_position_ids)), tower(self, batch))[1]
    )
    return passes


@pytest.fixture(scope="module")
def first_run(data, tiny_path, tmp_path_factory) -> Path:
    """A folder with a run that keeps nothing, and one that keeps all in `cache`."""
    folder = tmp_path_factory.mktemp("first")
    run(tiny_path, data, folder / "plain", **BOTH)
    run(tiny_path, data, folder / "kept", cache_dir=str(folder / "cache"), **BOTH)
    return folder


@pytest.fixture
def cache(first_run, tmp_path) -> Path:
    """A copy of its cache."""
    return shutil.copytree(first_run / "cache", tmp_path / "cache")


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("features/??/*.features"))


# ---- the same training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROZEN)
def test_from_the_second_epoch_on_the_tower_does_not_run(name, data, tiny_path, tmp_path, written_at_once, seen):
    changes, are_tokens = FROZEN[name]
    plain = run(tiny_path, data, tmp_path / "plain", **changes)
    patches_of_epoch = sum(metrics(plain, "visual_tokens")[:2]) * 4
    assert sum(seen) == 2 * patches_of_epoch
    seen.clear()
    kept = run(tiny_path, data, tmp_path / "kept", cache_dir=str(tmp_path / "cache"), **changes)
    assert_same(kept, plain)
    # The image that two samples share may have been computed for both before it was there.
    assert sum(seen) <= patches_of_epoch
    files = entries(tmp_path / "cache")
    assert len(files) == MEDIA
    config = load_config(str(tiny_path))
    width = config.text_config.hidden_size if are_tokens else config.vision_config.embed_dim * 4
    once = patches_of_epoch // 4 - 12 - 10  # tokens without the second look at images 0 and 1
    assert sum(path.stat().st_size - HEADER for path in files) == once * width * 8


@pytest.mark.parametrize("workers", [0, 2])
def test_another_run_finds_what_the_first_one_kept(workers, first_run, cache, data, tiny_path, tmp_path, seen):
    """What was asked for before the model was there is computed: the first batch, and with workers those made ahead."""
    again = run(tiny_path, data, tmp_path / "run", cache_dir=str(cache), num_workers=workers, **BOTH)
    assert_same(again, first_run / "plain")
    patches_of_epoch = sum(metrics(again, "visual_tokens")[:2]) * 4
    assert sum(seen) <= patches_of_epoch if workers else len(seen) == 1
    assert metrics(again, "feature_hit_ratio")[-1] > 0.5
    assert len(entries(cache)) == MEDIA


def test_a_resumed_run_goes_on_with_them(first_run, data, tiny_path, tmp_path, written_at_once, seen):
    folder = str(tmp_path / "cache")
    directory = tmp_path / "run"
    run(tiny_path, data, directory, cache_dir=folder, save_every=2, **BOTH)
    for path in directory.glob("checkpoints/step_*4"):
        shutil.rmtree(path)
    seen.clear()
    resumed = run(tiny_path, data, directory, cache_dir=folder, save_every=2, resume="auto", **BOTH)
    assert_same(resumed, first_run / "plain")
    assert len(seen) == 1, "the first batch alone is made before the model is there"


def test_evaluations_keep_them_too(data, tiny_path, tmp_path, written_at_once, seen):
    """The second evaluation sees no patch, neither for its loss nor for answers; both are what they were."""
    other = data.parent / "held_out.json"
    shown = [{"type": "image", "image": "3.png"}, {"type": "video", "video": ["0.png", "0.png"]}, text("?")]
    other.write_text(json.dumps([entry(user(shown), assistant("a wave")), entry(user("Say no."), assistant("no"))]))
    changes = {"eval_data": [str(other)], "eval_every": 2, "eval_samples": 2, **BOTH}
    plain = run(tiny_path, data, tmp_path / "plain", **changes)
    seen.clear()
    kept = run(tiny_path, data, tmp_path / "kept", cache_dir=str(tmp_path / "cache"), **changes)
    assert_same(kept, plain)
    for key in ("eval_loss", "eval_token_f1"):
        assert metrics(kept, key) == pytest.approx(metrics(plain, key), abs=1e-12)
    # The loss is computed first, so answers find all of it. Image 3 is in the training data, too.
    of_training = sum(metrics(kept, "visual_tokens")[:2]) * 4
    assert sum(seen) <= of_training + 2 * 8 * 6 / 2
    assert len(entries(tmp_path / "cache")) == MEDIA + 1


# ---- a batch of which some is kept ----------------------------------------------------------------------------------


def built(tiny_path: Path, folder: Path, **changes):
    """(model, MediaReader, Config) of a run that keeps features in `folder`."""
    config = Config(**settings(tiny_path, folder / "none", dtype="float64", cache_dir=str(folder), **changes))
    reader = MediaReader(config)
    processor = load_processor(str(tiny_path))
    model = build_model(config, str(tiny_path), processor, CPU)
    frozen.keep_features(model, reader, config)
    return model, reader, config, processor


@pytest.fixture(scope="module")
def path_of(tiny_path, tmp_path_factory):
    """A function model_type -> the tiny model of that family."""
    with_windows = make_tiny_model(tmp_path_factory.mktemp("windows") / "model", model_type="qwen2_5_vl")
    return {"qwen2_vl": tiny_path, "qwen2_5_vl": with_windows}.__getitem__


WITH_WINDOWS = [("tower", "qwen2_5_vl"), ("tower and merger", "qwen2_5_vl")]


@pytest.mark.parametrize(("name", "model_type"), [*[(name, "qwen2_vl") for name in FROZEN], *WITH_WINDOWS])
def test_any_part_of_a_batch_may_be_kept(name, model_type, data, path_of, tmp_path):
    """Loss and gradients are the same whichever of the media are kept; with other features they are not."""
    larger = (
        {"min_pixels": 60 * 784, "max_pixels": 100 * 784} if model_type == "qwen2_5_vl" else {}
    )  # so that there are several windows
    model, reader, config, processor = built(path_of(model_type), tmp_path, **larger, **FROZEN[name][0])
    samples = Samples(Examples([str(data)], processor), processor, Budget.of(config, model_type), reader)
    computed = [samples[number] for number in range(6)]
    assert {medium.features for sample in computed for medium in sample.media} == {None}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss, gradients = backward(model, computed, trained, model_type)
    model.kept.wait()
    kept = [samples[number] for number in range(6)]
    assert [len(medium.patches) for sample in kept for medium in sample.media] == [0] * 8
    chance = random.Random(0)
    for share in (1.0, 0.5, 0.5, 0.3, 0.7):
        mixed = partly_kept(computed, kept, share, chance)
        found, found_gradients = backward(model, mixed, trained, model_type)
        assert found == pytest.approx(loss, abs=1e-12)
        for weight, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[weight], gradient, atol=1e-12, rtol=1e-9)
    stale = dataclasses.replace(kept[0].media[0], features=kept[0].media[0].features.flip(1))
    others = [dataclasses.replace(kept[0], media=[stale]), *kept[1:]]
    assert backward(model, others, trained, model_type)[0] != pytest.approx(loss, abs=1e-9)


def partly_kept(computed: list[Sample], kept: list[Sample], share: float, chance: random.Random) -> list[Sample]:
    """The samples with so large a share of their media as features, the others as patches."""
    mixed = []
    for one, other in zip(computed, kept, strict=True):
        media = [chance.choices(pair, (1 - share, share))[0] for pair in zip(one.media, other.media, strict=True)]
        mixed.append(dataclasses.replace(one, media=media))
    return mixed


def backward(model, samples: list, trained: dict, model_type: str = "qwen2_vl") -> tuple[float, dict]:
    return backward_of(model, [Collator(model_type)(samples)], trained)


def backward_of(model, batches: list[Batch], trained: dict) -> tuple[float, dict]:
    """The sum of the losses of some batches, and what their passes add to the gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(batch)
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in trained.items() if weight.grad is not None}


@pytest.mark.parametrize("name", ["tower", "tower and merger"])  # features before the merger, and behind it
def test_halves_of_a_batch_of_which_some_is_kept_add_up_to_it(name, data, tiny_path, tmp_path):
    model, reader, config, processor = built(tiny_path, tmp_path, **FROZEN[name][0])
    samples = Samples(Examples([str(data)], processor), processor, Budget.of(config, "qwen2_vl"), reader)
    computed = [samples[number] for number in range(6)]
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss, gradients = backward(model, computed, trained)
    model.kept.wait()
    kept = [samples[number] for number in range(6)]
    chance = random.Random(0)
    for share in (1.0, 0.6, 0.5, 0.4):
        mixed = partly_kept(computed, kept, share, chance)
        whole = Collator()(mixed)
        assert len(whole.kept_grids) > 1
        halves = whole.halves()
        first = len(halves[0].where)
        for half, part in zip(halves, (mixed[:first], mixed[first:]), strict=True):
            assert_equal(half, Collator()(part))
        for parts in (halves, single_samples(whole)):
            found, found_gradients = backward_of(model, parts, trained)
            assert found == pytest.approx(loss, abs=1e-12)
            for weight, gradient in gradients.items():
                torch.testing.assert_close(found_gradients[weight], gradient, atol=1e-12, rtol=1e-9)


def single_samples(batch: Batch) -> list[Batch]:
    """Halves of halves, down to each sample."""
    halves = batch.halves()
    return [*single_samples(halves[0]), *single_samples(halves[1])] if halves else [batch]


@pytest.mark.parametrize("name", ["tower", "tower and merger"])
def test_out_of_memory_with_kept_features_runs_again_in_smaller_batches(name, data, tiny_path, tmp_path, monkeypatch):
    """Every pass of several samples of which something was kept fails: those of the second epoch."""
    rows = PackedLoss.supervised_rows
    failed = []

    def small_alone(model, batch, *embedded):
        if torch.is_grad_enabled() and batch.kept_grids and len(batch.where) > 1:
            failed.append(len(batch.where))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows(model, batch, *embedded)

    changes = {**FROZEN[name][0], "max_tokens": 4096}
    plain = run(tiny_path, data, tmp_path / "plain", **changes)
    monkeypatch.setattr(PackedLoss, "supervised_rows", small_alone)
    kept = run(tiny_path, data, tmp_path / "kept", cache_dir=str(tmp_path / "cache"), **changes)
    assert failed, "nothing was kept, or no pass had several samples"
    assert_same(kept, plain)


# ---- what they depend on --------------------------------------------------------------------------------------------


def test_another_weight_of_the_tower_finds_nothing(first_run, cache, data, tiny_path, tmp_path, seen):
    changed = shutil.copytree(tiny_path, tmp_path / "model")
    tensors = load_file(changed / "model.safetensors")
    [name] = [name for name in tensors if name.endswith("visual.blocks.1.mlp.fc2.bias")]
    tensors[name][3] += 0.01
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    plain = run(changed, data, tmp_path / "plain", **BOTH)
    seen.clear()
    kept = run(changed, data, tmp_path / "kept", cache_dir=str(cache), **BOTH)
    assert_same(kept, plain)
    assert metrics(kept) != pytest.approx(metrics(first_run / "plain"), abs=1e-9)
    assert len(entries(cache)) == 2 * MEDIA


def test_features_that_are_not_those_of_the_model_are_seen(first_run, cache, data, tiny_path, tmp_path):
    """A planted fault: zeros under the names of the right entries. What compares runs above would find it."""
    for path in entries(cache):
        content = bytearray(path.read_bytes())
        content[HEADER:] = bytes(len(content) - HEADER)
        put_right(path, content)
    stale = run(tiny_path, data, tmp_path / "run", cache_dir=str(cache), **BOTH)
    with pytest.raises(AssertionError):
        assert_same(stale, first_run / "plain")


def put_right(path: Path, content: bytearray) -> None:
    """Write an entry with its checksums made anew: of the rows in bytes 56 to 59, of the header in the first four."""
    content[56:60] = zlib.crc32(content[HEADER:]).to_bytes(4, "little")
    content[:4] = zlib.crc32(content[4:HEADER] + path.stem.encode()).to_bytes(4, "little")
    path.write_bytes(content)


def test_what_the_name_of_an_entry_depends_on(tiny_path, tmp_path):
    model, *_ = built(tiny_path, tmp_path, **BOTH)
    both = ["vision", "merger"]
    first = frozen.identity(model, both)
    assert frozen.identity(built(tiny_path, tmp_path, **BOTH)[0], both) == first
    assert frozen.identity(built(tiny_path, tmp_path, lora_rank=4)[0], both) == first, (
        "adapters beside it change nothing"
    )
    found = {first, frozen.identity(model, ["vision"])}
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] += 1
        assert frozen.identity(model, both) == first, "the language model does not matter"
        model.model.model.visual.merger.mlp[0].bias[0] += 1e-9
        found.add(frozen.identity(model, both))
        model.pixel_shift[0] += 0.1
        found.add(frozen.identity(model, both))
    model.model.config.vision_config._attn_implementation = "another"
    found.add(frozen.identity(model, both))
    model.dtype = torch.float32
    found.add(frozen.identity(model, both))
    assert len(found) == 6


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path):
    def blank() -> Medium:
        return Medium(torch.zeros(4, 588, dtype=torch.uint8), Grid(1, 2, 2), is_video=False)

    frames = FrameCache(tmp_path / "cache", 1.0)
    path = tmp_path / "image"
    path.write_bytes(b"1")

    def read(item: dict, budget: Budget) -> Medium:
        path.write_bytes(b"22")
        return blank()

    item = {"type": "image", "image": str(path)}
    features = FeatureCache(frames)
    features.open("0" * 64)
    assert features.load(item, BUDGET, read).key == ""
    assert features.load(item, BUDGET, lambda *given: blank()).key
    assert not entries(tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, []),
        ({"freeze": ["merger"]}, []),
        ({"freeze": ["language_model"]}, []),
        ({"freeze": ["vision"]}, ["vision"]),
        ({"freeze": ["merger", "vision"]}, ["vision", "merger"]),
        ({"freeze": ["vision"], "keep_features": "off"}, []),
        ({"lora_rank": 4}, ["vision", "merger"]),
        ({"lora_rank": 4, "lora_vision": True}, []),
        ({"lora_rank": 4, "lora_vision": True, "freeze": ["vision"]}, ["vision"]),
    ],
)
def test_what_is_kept_is_what_is_not_trained(changes, parts):
    for model_type in ("qwen2_vl", "qwen2_5_vl"):
        model = CONFIG_MAPPING[model_type]()
        assert frozen.kept_part(Config(cache_dir="cache", **changes), model) == parts
        assert frozen.kept_part(Config(**changes), model) == []
    # Its layers take what four of the tower's blocks give.
    assert frozen.kept_part(Config(cache_dir="cache", **changes), CONFIG_MAPPING["qwen3_vl"]()) == []


# ---- a disk, and processes that die ---------------------------------------------------------------------------------


def opened(folder: Path, max_gib: float = 1.0, after_merger: bool = True) -> FeatureWriter:
    features = FeatureCache(FrameCache(folder, max_gib))
    features.open("1" * 64)
    return FeatureWriter(features, after_merger)


def medium_of(number: int, tokens: int = 400) -> tuple[Unkept, torch.Tensor]:
    """A medium and its features, 64 numbers a token: 100 kB."""
    rows = torch.full((tokens, 64), float(number))
    return Unkept(f"key {number}", Grid(1, 2, 2 * tokens), False), rows


def found(writer: FeatureWriter, number: int) -> bool:
    """Whether the features of a medium are there; they must be right then."""
    medium, rows = medium_of(number)
    there = writer.features._find(medium.key)
    if there is None:
        return False
    assert there.grid == medium.grid
    assert there.patches.shape == (0, 0)
    assert torch.equal(there.features, rows)
    return True


def take(writer: FeatureWriter, numbers) -> None:
    for number in numbers:
        medium, rows = medium_of(number)
        writer.take([medium], rows)
    writer.wait()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_come_back_as_they_were(dtype, tmp_path):
    """Of several media in one tensor, one of them without a key; what follows them is dropped."""
    for after_merger in (True, False):
        writer = opened(tmp_path / str(after_merger), after_merger=after_merger)
        media = [Unkept("a", Grid(1, 4, 6, deep=True), False), Unkept("", Grid(1, 2, 2), False),
                 Unkept("b", Grid(2, 4, 4, capped=True), True)]  # fmt: skip
        patches = [24, 4, 32]
        lengths = [count // 4 for count in patches] if after_merger else patches
        rows = torch.randn(sum(lengths) + 3, 10).to(dtype)
        writer.take(media, rows)
        writer.wait()
        for medium, expected in zip(media, rows[:-3].split(lengths), strict=True):
            if not medium.key:
                continue
            there = writer.features._find(medium.key)
            assert torch.equal(there.features, expected)
            assert there.features.dtype == dtype
            assert there.grid == medium.grid
            assert there.is_video == medium.is_video
        assert len(entries(writer.features.directory)) == 2


def test_a_damaged_entry_is_said_and_made_anew(first_run, cache, data, tiny_path, tmp_path):
    for number, path in enumerate(entries(cache)):
        content = bytearray(path.read_bytes())
        content[(5, 40, HEADER, -1, 300, HEADER - 1)[number]] ^= 1
        path.write_bytes(content[: len(content) - number // 4])
    with pytest.warns(RuntimeWarning, match="damaged entry.*goes on and computes what is not kept"):
        kept = run(tiny_path, data, tmp_path / "run", cache_dir=str(cache), **BOTH)
    assert_same(kept, first_run / "plain")
    assert len(entries(cache)) == MEDIA


def test_without_room_training_goes_on(first_run, data, tiny_path, tmp_path):
    """--cache_max_gib holds some of the features: these are used, the rest is computed, and it is said once."""
    folder = tmp_path / "cache"
    size = sum(path.stat().st_size for path in (first_run / "cache").rglob("*.features"))
    with pytest.warns(RuntimeWarning, match="goes on and computes what is not kept") as caught:
        kept = run(tiny_path, data, tmp_path / "run", cache_dir=str(folder), cache_max_gib=0.6 * size / 2**30, **BOTH)
    assert len([one for one in caught if "what is not kept" in str(one.message)]) == 1
    assert_same(kept, first_run / "plain")
    assert 0 < len(entries(folder)) < MEDIA
    assert sum(path.stat().st_size for path in folder.rglob("*.features")) <= 0.6 * size


def test_what_this_run_uses_is_not_pushed_out(tmp_path):
    """Of a folder that holds ten, five are of an earlier run: they go, and then as many stay as there is room for."""
    size = (400 * 64 * 4 + HEADER) * 10.01 / 2**30
    take(opened(tmp_path, size), range(5))
    for path in entries(tmp_path):
        os.utime(path, (0, 0))
    writer = opened(tmp_path, size)
    with pytest.warns(RuntimeWarning, match="--cache_max_gib is reached"):
        take(writer, range(100, 120))
    assert [found(writer, number) for number in range(100, 120)] == [True] * 10 + [False] * 10
    assert not any(found(writer, number) for number in range(5))


def test_a_full_disk_is_said_once(small_disk, monkeypatch):  # noqa: F811
    writer = opened(small_disk)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take(writer, range(20))
    assert ["No space left on device" in str(one.message) for one in caught] == [True]
    there = [found(writer, number) for number in range(20)]
    assert 5 < sum(there) < 11
    assert writer.features.statistics()["not_stored"] == 20 - sum(there)
    assert not list(small_disk.glob("features/??/.*"))


def test_a_slow_disk_holds_nobody_up(tmp_path, monkeypatch):
    """What would wait beyond the limit is left for a later epoch."""
    monkeypatch.setattr("util.data.features.MOST_WAITING", 250_000)
    writer = opened(tmp_path)
    write = FeatureCache.store
    held = FORK.Event()
    monkeypatch.setattr(FeatureCache, "store", lambda self, *given: (held.wait(), write(self, *given))[1])
    for number in range(5):
        medium, rows = medium_of(number)
        writer.take([medium], rows)
        writer.take([medium], rows)  # once more: it waits already
    held.set()
    writer.wait()
    assert [found(writer, number) for number in range(5)] == [True, True, False, False, False]
    for number in range(5):  # the next epoch
        take(writer, [number])
    assert all(found(writer, number) for number in range(5))


def store_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    writer = opened(folder)
    while True:
        medium, rows = medium_of(random.randrange(10))
        writer.features._write(writer.features.path(medium.key), medium, rows)


def test_writers_killed_at_any_moment(tmp_path):
    left = rounds = 0
    while rounds < 5 or (left == 0 and rounds < 100):
        rounds += 1
        writers = [FORK.Process(target=store_for_ever, args=(tmp_path,)) for _ in range(2)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 30
        while not entries(tmp_path) or (rounds > 5 and not list(tmp_path.glob("features/??/.*"))):
            assert time.monotonic() < deadline, f"round {rounds}: nobody writes"
        time.sleep(random.uniform(0, 0.02))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        left += len(list(tmp_path.glob("features/??/.*")))
        reader = opened(tmp_path)
        assert not list(tmp_path.glob("features/??/.*"))
        assert any(found(reader, number) for number in range(10))
        assert reader.features.statistics()["damaged"] == 0
    assert left > 0


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_the_plan_says_how_much_is_kept(first_run, data, tiny_path, tmp_path, capsys):
    folder = tmp_path / "cache"
    run(tiny_path, data, tmp_path / "run", cache_dir=str(folder), cache_max_gib=1e-5, max_steps=1, **BOTH)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("features ")]
    tokens = sum(metrics(first_run / "plain", "visual_tokens")[:2])
    size = tokens * load_config(str(tiny_path)).text_config.hidden_size * 8
    assert f"the output of the frozen tower and merger, up to {size / 1e6:,.1f} MB, is kept in {folder}: from" in line
    assert "there is room for 0.0 MB (--cache_max_gib 1e-05, or the disk)" in line
    run(tiny_path, data, tmp_path / "trained", cache_dir=str(folder), max_steps=1)
    assert "features " not in capsys.readouterr().out
    assert "feature_hit_ratio" not in log(tmp_path / "trained")[0]


def test_work_that_was_not_done_is_not_counted(tiny_path):
    """An image of 8 x 12 patches of which the tower's part is kept, and a video: what is left is the rest's work."""
    config = load_config(str(tiny_path))
    grids = [Grid(1, 8, 12), Grid(2, 4, 6)]
    samples = [Size(60, 10, grids), Size(30, 5, [Grid(1, 4, 4)])]
    kept = [dataclasses.replace(Collator()([]), kept_grids=grids), Collator()([])]
    tower = config.vision_config
    for changes, parts in (({"freeze": ["vision"]}, 1), (BOTH, 2)):
        settings = Config(**changes)
        patches, squares = 96 + 48, 96**2 + 2 * 24**2
        weights = 3 * 2 * 14 * 14 * tower.embed_dim + tower.depth * (4 + 2 * tower.mlp_ratio) * tower.embed_dim**2
        expected = 2 * weights * patches + 4 * tower.embed_dim * tower.depth * squares
        if parts == 2:
            merged = 4 * tower.embed_dim
            expected += 2 * (merged**2 + merged * config.text_config.hidden_size) * patches / 4
        whole = dict.fromkeys(("vision", "merger", "language_model"), 1e18)
        left = flops.without_kept(whole, config, kept, settings)
        assert 3e18 - sum(left.values()) == pytest.approx(expected, abs=1e6)
        assert 0 < expected < flops.training_flops(config, samples, settings)
