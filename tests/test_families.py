"""Each family's loss, gradients, ids, labels and positions against transformers' own forward, one sample at a time."""

import json
import random
from types import SimpleNamespace

import av
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from qwen_vl_utils import vision_process
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_window_index

from tests import families
from tests.families import KINDS, MODEL_TYPES
from tests.test_passes import assert_equal
from util import collator, loss
from util.collator import Collator, patch_positions, tower_segments
from util.config import Config
from util.conversation import Encoded
from util.data.cache import FrameCache
from util.dataset import Sample, Samples, load_examples
from util.family import FAMILIES, stretched, window_order
from util.model import build_model, load_processor, set_budget
from util.parallel import context
from util.parallel.rows import with_blank_patches
from util.vision import (
    FRAME_TOKENS,
    Budget,
    Grid,
    Medium,
    frame_count,
    frame_size,
    frames_of,
    load,
    plain_image_grid,
    read_grid,
)

CPU = torch.device("cpu")
WHOLE = [[*range(len(KINDS))]]
TWO_ROWS = [[0, 3, 5], [1, 2, 4, 6]]
ALONE = [[number] for number in range(len(KINDS))]
UNTIED = [0, 1, 4]  # some of them will do, as the vocabulary is large
EXACT = 1e-5  # by how much, relative to its size, a loss or gradient in float32 may differ


@pytest.fixture(scope="module")
def tokenizer(request):
    """The published one where it is, else that of the tiny model."""
    try:
        return request.getfixturevalue("official_processor").tokenizer
    except pytest.skip.Exception:
        return request.getfixturevalue("processor").tokenizer


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory, picture, write_video, decode_all):
    """A function (model_type, tied) -> a checkpoint, its samples and what transformers makes of them; made once."""
    known: dict = {}
    media: dict = {}

    def make(model_type: str, tied: bool = True) -> SimpleNamespace:
        if (model_type, tied) not in known:
            patch = families.PATCH[model_type]
            if patch not in media:
                media[patch] = families.conversations(tmp_path_factory.mktemp("media"), patch, picture, write_video)
            folder = tmp_path_factory.mktemp(model_type)
            known[model_type, tied] = make_family(folder, model_type, tied, tokenizer, *media[patch], decode_all)
        return known[model_type, tied]

    return make


def make_family(folder, model_type, tied, tokenizer, talks, rates, decode_all) -> SimpleNamespace:
    path = families.make_checkpoint(folder / "model", model_type, tokenizer, tied)
    data = folder / "data.json"
    data.write_text(json.dumps([{"messages": messages} for messages in talks]))
    processor = load_processor(str(path))
    token = (2 * families.PATCH[model_type]) ** 2
    budget = Budget(min_pixels=token, max_pixels=100 * token, model_type=model_type)
    samples = Samples(load_examples([str(data)], processor), processor, budget)
    theirs = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == tied
    references = []
    for number, messages in enumerate(talks):
        if not tied and number not in UNTIED:
            references.append(None)
            continue
        inputs, positions = families.reference_sample(messages, processor, model_type, rates, decode_all)
        outputs = theirs(**inputs, use_cache=False)
        learned = int((inputs["labels"][0, 1:] != -100).sum())
        (outputs.loss * learned).backward()
        references.append(
            SimpleNamespace(inputs=inputs, positions=positions, loss=outputs.loss.item() * learned, learned=learned)
        )
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    return SimpleNamespace(
        path=path, model_type=model_type, processor=processor, samples=samples, model=theirs, references=references,
        gradients=gradients, batches=[Collator(model_type)([samples[number]]) for number in range(len(talks))],
    )  # fmt: skip


def model_of(family: SimpleNamespace):
    config = Config(device="cpu", dtype="float32", model=str(family.path))
    return build_model(config, str(family.path), family.processor, CPU)


def differences(family: SimpleNamespace, groups: list[list[int]]) -> list[str]:
    """Where our losses and gradients, each group of samples packed into a row, are not those of transformers."""
    model = model_of(family)
    found = []
    for group in groups:
        ours = model(Collator(family.model_type)([family.samples[number] for number in group]))
        ours.backward()
        wanted = sum(family.references[number].loss for number in group)
        if abs(ours.item() - wanted) > EXACT * abs(wanted):
            found.append(f"loss of {[KINDS[number] for number in group]} is {ours.item()}, not {wanted}")
    gradients = {name: weight.grad for name, weight in model.model.named_parameters()}
    assert gradients.keys() == family.gradients.keys()
    for name, wanted in family.gradients.items():
        if wanted is None or gradients[name] is None:
            found += [f"gradient of {name} is there in one of the two"] * (wanted is not gradients[name])
            continue
        gap = (gradients[name] - wanted).norm() / wanted.norm().clamp(min=1e-20)
        if not gap < EXACT:
            found.append(f"gradient of {name} is off by {gap.item():.1e} of its size")
    return found


# ---- equal to transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [WHOLE, TWO_ROWS, ALONE], ids=["one row", "two rows", "alone"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loss_and_every_gradient_equal_transformers(model_type, groups, made):
    family = made(model_type)
    assert not (found := differences(family, groups)), "\n".join(found)
    assert min(gradient.abs().max() for gradient in family.gradients.values() if gradient is not None) > 1e-5, (
        "a gradient too small to tell anything"
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_untied_head_too(model_type, made):
    assert not (found := differences(made(model_type, tied=False), [UNTIED])), "\n".join(found)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ids_labels_and_positions_are_those_of_the_release(model_type, number, made):
    family = made(model_type)
    batch, reference = family.batches[number], family.references[number]
    labels = reference.inputs["labels"][0]
    learned = torch.nonzero(labels[1:] != -100).flatten()
    assert batch.input_ids.tolist() == reference.inputs["input_ids"][0].tolist()
    assert batch.supervised_index.tolist() == learned.tolist()
    assert batch.target_ids.tolist() == labels[1:][learned].tolist()
    assert batch.position_ids.T.tolist() == reference.positions
    size = family.samples.size(number)
    assert (size.tokens, size.supervised) == (len(labels), reference.learned), "measured from headers alone"


def test_no_medium_of_these_is_resized_and_windows_are_cut(made):
    """Else the comparison above would compare resizing, and windows that are all whole."""
    for model_type in MODEL_TYPES:
        family = made(model_type)
        for batch, reference in zip(family.batches, family.references, strict=True):
            ours = [grid.tolist() for grid in batch.grid_thw]
            theirs = [reference.inputs[key] for key in ("image_grid_thw", "video_grid_thw") if key in reference.inputs]
            assert ours == [grid.tolist() for some in theirs for grid in some]
    batch = made("qwen2_5_vl").batches[1]
    assert batch.window_segments.lengths == [64, 64, 16, 32, 32, 8], "of 6 x 9 tokens, 4 patches each"
    assert batch.vision_segments.lengths == [216]


# ---- planted errors --------------------------------------------------------------------------------------------------


def without_windows(monkeypatch):
    inner = loss.PackedLoss.tower

    def tower(self, batch):
        batch.window_segments = batch.vision_segments
        return inner(self, batch)

    monkeypatch.setattr(loss.PackedLoss, "tower", tower)


def in_the_order_of_the_text(monkeypatch):
    """Windows are there, but what they hold is not in their order."""
    inner = collator.windows_of
    monkeypatch.setattr(collator, "windows_of", lambda grid, family: (slice(None), inner(grid, family)[1]))


def without_learned_positions(monkeypatch):
    monkeypatch.setattr("util.family.stretched", lambda table, place, size: torch.zeros(()))


def learned_positions_of_the_nearest(monkeypatch):
    def nearest(table, place, size):
        side = round(table.num_embeddings**0.5)
        whole = (place * (side - 1) / (size - 1).clamp(min=1)).round().long()
        return table(whole[:, 0] * side + whole[:, 1])

    monkeypatch.setattr("util.family.stretched", nearest)


def without_deepstack(monkeypatch):
    inner = loss.PackedLoss.embed

    def embed(self, batch, visual=None):
        hidden, deeper = inner(self, batch, visual)
        return hidden, deeper[:, :0]

    monkeypatch.setattr(loss.PackedLoss, "embed", embed)


def deepstack_one_layer_late(monkeypatch):
    inner = loss.PackedLoss.run_layers

    def run_layers(self, repeated, hidden, rotation, segments, after):
        if repeated is self.model.model.visual.blocks:
            return inner(self, repeated, hidden, rotation, segments, after)

        late = {number + 1: change for number, change in after.items()}
        return inner(self, repeated, hidden, rotation, segments, late)

    monkeypatch.setattr(loss.PackedLoss, "run_layers", run_layers)


def without_time(monkeypatch):
    monkeypatch.setattr("util.vision.in_time", lambda grid, *given: grid)


def deepstack_of_another_block(monkeypatch):
    inner = loss.PackedLoss.tower

    def tower(self, batch):
        first, second, *others = inner(self, batch)
        return [second, first, *others]

    monkeypatch.setattr(loss.PackedLoss, "tower", tower)


PLANTED = [  # and the sample whose loss has to show it
    ("qwen2_5_vl", without_windows, "one image"),
    ("qwen2_5_vl", in_the_order_of_the_text, "one image"),
    ("qwen2_5_vl", without_time, "video after text"),
    ("qwen3_vl", without_learned_positions, "one image"),
    ("qwen3_vl", learned_positions_of_the_nearest, "one image"),
    ("qwen3_vl", without_deepstack, "video after text"),
    ("qwen3_vl", deepstack_one_layer_late, "video after text"),
    ("qwen3_vl", deepstack_of_another_block, "video after text"),
    ("qwen3_vl", without_time, "video after text"),
]


@pytest.mark.parametrize(("model_type", "plant", "kind"), PLANTED, ids=[plant.__name__ for _, plant, _ in PLANTED])
def test_a_planted_error_is_seen(model_type, plant, kind, made, monkeypatch):
    family = made(model_type)
    plant(monkeypatch)
    found = differences(family, [[KINDS.index(kind)]])  # of one sample, as losses of several may hide it
    assert found, "loss and gradients are as if nothing were wrong"


# ---- windows of Qwen2.5-VL -------------------------------------------------------------------------------------------


def random_grids(count: int) -> list[Grid]:
    rng = random.Random(2)
    sizes = [(rng.randint(1, 3), rng.randint(1, 13), rng.randint(1, 13)) for _ in range(count - 4)]
    sizes += [(2, 4, 4), (1, 8, 8), (1, 4, 5), (2, 1, 12)]  # windows that are all whole, and some of one row
    return [Grid(t, 2 * rows, 2 * columns) for t, rows, columns in sizes]


def windows_by_hand(grid: Grid) -> list[list[int]]:
    """The tokens of each window of 4 x 4, by their place row by row and frame by frame."""
    rows, columns = grid.h // 2, grid.w // 2
    found = []
    for time in range(grid.t):
        for top in range(0, rows, 4):
            for left in range(0, columns, 4):
                window = []
                for row in range(top, min(top + 4, rows)):
                    for column in range(left, min(left + 4, columns)):
                        window.append(time * rows * columns + row * columns + column)
                found.append(window)
    return found


def test_windows_of_random_grids_by_hand_and_by_transformers():
    grids = random_grids(300)
    for grid in grids:
        order, sizes = window_order(grid.t, grid.h // 2, grid.w // 2, 4)
        windows = windows_by_hand(grid)
        assert order.tolist() == [token for window in windows for token in window], grid
        assert sizes == [len(window) for window in windows], grid
    theirs, ends = get_vision_window_index(torch.tensor([grid[:3] for grid in grids]), 2, 112, 14)
    ours = []
    begin = 0
    for grid in grids:
        ours.append(window_order(grid.t, grid.h // 2, grid.w // 2, 4)[0] + begin)
        begin += grid.tokens
    assert torch.equal(torch.cat(ours), theirs)
    segments = tower_segments(grids, FAMILIES["qwen2_5_vl"])
    assert segments["window_segments"].cu_seqlens.tolist() == ends.tolist()


def numbered(grid: Grid, is_video: bool, patch: int) -> Medium:
    """A medium of which each patch begins with its number, in two bytes."""
    patches = torch.zeros(grid.patches, 3 * patch**2 * (1 + is_video), dtype=torch.uint8)
    number = torch.arange(grid.patches)
    patches[:, 0], patches[:, 1] = number // 256, number % 256
    return Medium(patches, grid, is_video)


def sample_of(*media: Medium) -> Sample:
    ids = [1, *[token for _ in media for token in (7, 2)], 3]
    weights = [0.0] * (len(ids) - 1) + [1.0]
    places = [number for number, token in enumerate(ids) if token == 7]
    return Sample(Encoded(ids, weights, places), list(media), "here")


def random_samples(count: int, seed: int, patch: int = 14) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        media = []
        for _ in range(rng.randint(0, 3)):
            is_video = rng.random() < 0.5
            grid = Grid(rng.randint(1, 3) if is_video else 1, 2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
            media.append(numbered(grid, is_video, patch))
        samples.append(sample_of(*media))
    return samples


def test_all_that_is_of_a_patch_moves_with_it_into_its_window():
    """Rows of the text, pixels, places and windows of a batch are those of one order, medium by medium."""
    for seed in range(20):
        samples = random_samples(3, seed)
        batch = Collator("qwen2_5_vl")(samples)
        rows_of_media = visual_rows(batch, samples)
        seen = 0  # patches, images first
        windows = []
        pixels = [*batch.image_patches[:, :2].tolist(), *batch.video_patches[:, :2].tolist()]
        for is_video in (False, True):
            for medium, rows in rows_of_media:
                if medium.is_video != is_video:
                    continue
                by_hand = windows_by_hand(medium.grid)
                windows += [4 * len(window) for window in by_hand]
                for token in [token for window in by_hand for token in window]:
                    numbers = [4 * token + corner for corner in range(4)]
                    assert pixels[seen : seen + 4] == [[number // 256, number % 256] for number in numbers]
                    places = patch_positions(medium.grid)[numbers]
                    assert torch.equal(batch.vision_position_ids[seen : seen + 4], places)
                    assert batch.visual_index[seen // 4] == rows[token]
                    seen += 4
        assert seen == len(pixels)
        assert batch.window_segments.lengths == windows


def visual_rows(batch, samples: list[Sample]) -> list[tuple[Medium, list[int]]]:
    """Of each medium the rows of the packed row that are its tokens, in the order of the text."""
    rows = iter(torch.nonzero(batch.input_ids == 7).flatten().tolist())
    media = [medium for sample in samples for medium in sample.media]
    return [(medium, [next(rows) for _ in range(medium.grid.tokens)]) for medium in media]


def test_halves_of_a_batch_have_their_windows():
    """Down to single samples each is, to the last bit, what the collator makes of the same samples."""
    for seed in range(20):
        samples = random_samples(5, seed)
        waiting = [(Collator("qwen2_5_vl")(samples), samples)]
        while waiting:
            batch, of = waiting.pop()
            assert_equal(batch, Collator("qwen2_5_vl")(of))
            halves = batch.halves()
            first = len(halves[0].where) if halves else 0
            waiting += zip(halves, (of[:first], of[first:]), strict=False)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ranks_that_share_a_row_make_the_visual_tokens_of_the_whole(model_type, ranks, made):
    """Each rank's tower sees whole images and pairs of frames, windows in their order; its tokens, sent by hand, are
    those of one tower that sees all: what stands in the row, and what is added after layers (deepstack)."""
    family = made(model_type)
    model = model_of(family)
    whole = Collator(model_type)([family.samples[number] for number in range(len(KINDS))])
    parts = [with_blank_patches(part) for part in context.parts_of(whole, ranks)]
    with torch.no_grad():
        wanted = model.visual_tokens(whole)
        sent = []
        for part in parts:
            outgoing = model.visual_tokens(part).index_select(0, part.sent_index)
            sent.append(outgoing.split(part.sent))
    size = len(parts[0].input_ids)
    rows = []
    tokens = []
    for rank, part in enumerate(parts):
        tokens += [from_one[rank] for from_one in sent]
        rows.append(part.visual_index + rank * size)
    order = torch.cat(rows).argsort()
    torch.testing.assert_close(torch.cat(tokens)[order], wanted[whole.visual_index.argsort()], atol=1e-5, rtol=1e-5)
    if model_type == "qwen2_5_vl":
        windows = sorted(length for part in parts for length in part.window_segments.lengths)
        blank = [4] * sum(len(part.window_segments.lengths) == 1 for part in parts)
        assert windows == sorted([*whole.window_segments.lengths, *blank])


# ---- learned positions of Qwen3-VL -----------------------------------------------------------------------------------


def test_learned_positions_are_stretched_as_by_torch_and_transformers():
    torch.manual_seed(0)
    for side in (4, 16, 48):
        table = torch.nn.Embedding(side**2, 8, dtype=torch.float64)
        square = table.weight.detach().T.reshape(1, 8, side, side)
        for grid in random_grids(40):
            place = patch_positions(grid)
            size = torch.tensor([grid.h, grid.w]).expand(grid.patches, 2)
            ours = stretched(table, place, size).detach()
            whole = F.interpolate(square, size=(grid.h, grid.w), mode="bilinear", align_corners=True)[0]
            torch.testing.assert_close(ours, whole[:, place[:, 0], place[:, 1]].T, atol=1e-12, rtol=1e-12)
            indices, weights = get_vision_interpolation_indices_and_weights(
                torch.tensor([grid[:3]]), side, align_corners=True, spatial_merge_size=2
            )
            theirs = (table(indices) * weights[:, :, None]).sum(1).detach()
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # they weigh in float32


# ---- real videos, as qwen-vl-utils reads them ------------------------------------------------------------------------


@pytest.fixture
def read_by_pyav(monkeypatch, decode_all):
    """A reader for qwen-vl-utils, whose own need packages: PyAV decodes all, the frames are chosen as torchcodec's."""

    def read(item: dict):
        frames = decode_all(item["video"])
        with av.open(item["video"]) as container:
            rate = float(container.streams.video[0].average_rate)
        first, last, total = vision_process.calculate_video_frame_range(item, len(frames), rate)
        count = vision_process.smart_nframes(item, total_frames=total, video_fps=rate)
        indices = torch.linspace(first, last, count).round().long().tolist()
        about = {"fps": rate, "frames_indices": indices, "total_num_frames": total}
        return torch.from_numpy(frames[indices]).permute(0, 3, 1, 2), about, count / total * rate

    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "pyav")
    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "pyav", read)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, picture, write_video) -> str:
    """64 frames at 12 a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, [picture(360, 480, seed=number // 5) for number in range(64)], 12)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, picture) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.fromarray(picture(384, 448, seed=number)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(5)]


VIDEOS = {
    "as it is": {},
    "3 frames a second": {"fps": 3},
    "a stretch of it": {"video_start": 1.1, "video_end": 4.2},
    "12 frames": {"nframes": 12},
    "small": {"max_pixels": 160 * 1024},
}


@pytest.mark.parametrize("keys", VIDEOS.values(), ids=VIDEOS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_video_is_read_and_timed_as_by_qwen_vl_utils(model_type, keys, clip, read_by_pyav):
    patch = families.PATCH[model_type]
    item = {"type": "video", "video": clip, **keys}
    (theirs, about), rate = vision_process.fetch_video(
        item, image_patch_size=patch, return_video_sample_fps=True, return_video_metadata=True
    )
    medium = load(item, Budget(model_type=model_type))
    assert (medium.grid.t * 2, medium.grid.h * patch, medium.grid.w * patch) == (len(theirs), *theirs.shape[2:])
    assert ((frames_of(medium).int() - theirs.int()).abs() > 2).float().mean() < 0.001, "they resize in float32"
    check_time(medium.grid, model_type, about, rate)
    assert read_grid(item, Budget(model_type=model_type)) == medium.grid


def check_time(grid: Grid, model_type: str, about: dict, rate: float) -> None:
    """A grid's time by what qwen-vl-utils says of a video: its metadata, and frames a second of what is taken."""
    times = []
    if model_type == "qwen3_vl":
        times = Qwen3VLProcessor._calculate_timestamps(None, list(about["frames_indices"]), about["fps"])
    assert list(grid.times) == pytest.approx(times, rel=1e-6)
    assert grid.step == (pytest.approx(2 * 2 / rate, rel=1e-6) if model_type == "qwen2_5_vl" else 1.0)


CLOCKS = [{}, {"sample_fps": 1}, {"sample_fps": 0.5, "raw_fps": 24}, {"raw_fps": 5.0}]


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("clock", CLOCKS, ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_list_of_frames_has_the_time_that_its_keys_say(model_type, clock, frames, pictures):
    item = {"type": "video", "video": pictures[:frames], **clock}
    (theirs, about), rate = vision_process.fetch_video(
        item, image_patch_size=families.PATCH[model_type], return_video_sample_fps=True, return_video_metadata=True
    )
    grid = read_grid(item, Budget(model_type=model_type))
    assert grid == load(item, Budget(model_type=model_type)).grid
    assert grid.t * 2 == len(theirs)
    check_time(grid, model_type, about, rate)


# ---- kept on disk ----------------------------------------------------------------------------------------------------


def test_every_field_of_a_grid_comes_back_from_the_cache(tmp_path):
    """A field that is new some day, and is not stored, is seen here."""
    other = {"t": 2, "h": 4, "w": 6, "step": 1.44, "times": (0.25, 1.0 / 3)}
    grid = Grid(**{name: other.get(name, True) for name in Grid._fields})
    defaults = Grid(1, 1, 1)
    assert all(ours != default for ours, default in zip(grid, defaults, strict=True))
    (tmp_path / "clip.mp4").write_bytes(b"a file that is never read")
    frames = FrameCache(tmp_path / "cache", 1.0)
    item = {"type": "video", "video": str(tmp_path / "clip.mp4")}
    medium = numbered(grid, True, 16)
    budget = Budget(model_type="qwen3_vl")
    frames.load(item, budget, lambda *_: medium)
    assert frames.counts.totals()["stored"] == 1
    found = frames.load(item, budget, lambda *_: pytest.fail("it was to be in the cache"))
    assert found.grid == grid
    assert type(found.grid.times) is tuple
    assert found.is_video
    assert torch.equal(found.patches, medium.patches)
    assert frames.read_grid(item, budget, lambda *_: pytest.fail("it was to be in the cache")) == grid


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_video_from_the_cache_is_that_of_its_family(model_type, made, tmp_path):
    """One folder may serve the three: each finds its own entries, with their times."""
    item = made("qwen2_vl").samples.examples[4].media[0]
    frames = FrameCache(tmp_path / "cache", 1.0)
    for other in MODEL_TYPES:
        frames.load(item, Budget(model_type=other))
    found = frames.load(item, Budget(model_type=model_type))
    assert frames.counts.totals()["hits"] == 1
    assert frames.counts.totals()["stored"] == 3
    wanted = load(item, Budget(model_type=model_type))
    assert found.grid == wanted.grid
    assert torch.equal(found.patches, wanted.patches)
    assert bool(found.grid.times) == (model_type == "qwen3_vl")
    assert (found.grid.step != 1) == (model_type == "qwen2_5_vl")


# ---- the saved processor ---------------------------------------------------------------------------------------------

BUDGETS = {
    "default": {},
    "smaller": {"min_pixels": 32 * 1024, "max_pixels": 200 * 1024},
    "few tokens": {"video_max_tokens": 512},
    "few of small frames": {"min_pixels": 4096, "max_pixels": 102400, "video_max_tokens": 128},
}
RESIZED = {"do_resize": True, "do_rescale": False, "do_normalize": False}
PICTURES = [(480, 640), (64, 100), (1080, 1920), (333, 777), (1500, 400)]
CLIPS = [(4, 480, 640), (6, 360, 640), (2, 720, 1280), (12, 480, 360)]


@pytest.mark.parametrize("limits", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_plain_transformers_resizes_as_training_did(model_type, limits, tokenizer, tmp_path):
    """By the processors of a saved folder. Not equal, and said in docs/data.md: videos that --video_max_tokens cuts
    (Qwen2-VL, Qwen2.5-VL), and frames that are enlarged (Qwen3-VL), of which there is none here."""
    budget = Budget(**limits, model_type=model_type)
    processor = families.processor_of(model_type, tokenizer)
    set_budget(processor, budget)
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    patch = families.PATCH[model_type]
    for height, width in PICTURES:
        image = Image.new("RGB", (width, height))
        theirs = saved.image_processor([image], return_tensors="pt", **RESIZED)["image_grid_thw"][0].tolist()
        assert theirs == list(plain_image_grid({}, height, width, budget)[:3]), (height, width)
    fewest = budget.pixels(FRAME_TOKENS)[0]
    for frames, height, width in CLIPS:
        (new_height, new_width), is_cut = frame_size({}, height, width, frames, budget)
        video = torch.zeros(1, 3, height, width, dtype=torch.uint8).expand(frames, -1, -1, -1)
        theirs = saved.video_processor([video], return_tensors="pt", do_sample_frames=False, **RESIZED)
        t, h, w = theirs["video_grid_thw"][0].tolist()
        gap = max(abs(h - new_height // patch), abs(w - new_width // patch)) // 2  # in tokens
        assert t == frames // 2
        if model_type == "qwen3_vl" or not is_cut:
            assert gap == 0, (frames, height, width)
        elif budget.video_max_tokens * budget.token_pixels * 2 // frames >= 1.05 * fewest:
            assert gap <= 3, (frames, height, width)


def test_qwen3_vls_processor_chooses_as_many_frames_as_training_did(tokenizer, tmp_path):
    processor = families.processor_of("qwen3_vl", tokenizer)
    budget = Budget(video_fps=0.5, video_max_frames=12, model_type="qwen3_vl")
    set_budget(processor, budget)
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    for total, rate in ((320, 20.0), (96, 24.0), (2000, 25.0)):
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        theirs = saved.video_processor.sample_frames(metadata, fps=saved.video_processor.fps).tolist()
        count = frame_count({}, total, rate, budget)
        assert torch.linspace(0, total - 1, count).round().long().tolist() == theirs
