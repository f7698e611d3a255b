"""Positions and every index of a packed batch, against transformers and against lists written by hand."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2VLModel, Qwen3VLProcessor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from util.collator import Batch, Collator, expand, mrope_positions, patch_positions
from util.conversation import Encoded
from util.dataset import Sample
from util.family import FAMILIES
from util.vision import Grid, Medium, in_time, patchify

IMAGE, VIDEO = 7, 8  # placeholder ids of the samples made here


def sample(ids: list[int], supervised: list[int], *media: tuple[Grid, int], where: str = "here") -> Sample:
    """A sample of given ids (`IMAGE` and `VIDEO` are placeholders) and media: (grid, value of every pixel)."""
    placeholders = [number for number, token in enumerate(ids) if token in (IMAGE, VIDEO)]
    assert len(media) == len(placeholders)
    made = []
    for placeholder, (grid, value) in zip(placeholders, media, strict=True):
        is_video = ids[placeholder] == VIDEO
        width = 1176 if is_video else 588
        made.append(Medium(torch.full((grid.patches, width), value, dtype=torch.uint8), grid, is_video))
    return Sample(Encoded(ids, [bool(mark) for mark in supervised], placeholders), made, where)


def positions_of(ids: list[int], *grids: Grid) -> torch.Tensor:
    """Our positions (3, T) of one sample with these media."""
    placeholders = [number for number, token in enumerate(ids) if token in (IMAGE, VIDEO)]
    row, _, spans = expand(Encoded(ids, [False] * len(ids), placeholders), list(grids))
    return mrope_positions(len(row), spans, list(grids))


# ---- positions against transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tiny_path) -> Qwen2VLModel:
    with torch.device("meta"):  # its rule for positions needs no weights
        return Qwen2VLModel(AutoConfig.from_pretrained(tiny_path))


def transformers_positions(qwen: Qwen2VLModel, ids: list[int], grids: list[Grid]) -> torch.Tensor:
    """get_rope_index on the row that transformers' processor would make: placeholders repeated here, independently."""
    row, waiting, images, videos = [], iter(grids), [], []
    for token in ids:
        if token not in (IMAGE, VIDEO):
            row.append(token)
            continue
        t, h, w = next(waiting)[:3]
        row += [token] * (t * h * w // 4)
        (images if token == IMAGE else videos).append([t, h, w])
    types = [1 if token == IMAGE else 2 if token == VIDEO else 0 for token in row]
    positions, _ = qwen.get_rope_index(
        input_ids=torch.tensor([row]),
        mm_token_type_ids=torch.tensor([types]),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    return positions[:, 0]


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([1, 2, 3], []),
        ([1, IMAGE, 2], [Grid(1, 4, 6)]),
        ([1, 2, IMAGE, 3, 4, IMAGE, 5], [Grid(1, 8, 2), Grid(1, 2, 2)]),
        ([1, VIDEO, 2], [Grid(2, 4, 6)]),
        ([1, VIDEO, 2, 3], [Grid(3, 6, 2)]),
        ([1, IMAGE, 2, VIDEO, 3, IMAGE, 4, VIDEO, 5], [Grid(1, 4, 4), Grid(2, 4, 8), Grid(1, 2, 10), Grid(1, 2, 2)]),
        ([1, IMAGE, 2, 3, 4, 5, 6, 17, VIDEO, 2, 3, IMAGE, 4], [Grid(1, 6, 4), Grid(5, 10, 8), Grid(1, 36, 24)]),
    ],
    ids=["text", "image", "images", "video", "tall video", "mixed", "several turns"],
)
def test_positions_equal_transformers(ids, grids, qwen):
    assert positions_of(ids, *grids).tolist() == transformers_positions(qwen, ids, grids).tolist()


def test_positions_of_random_samples_equal_transformers(qwen):
    """Images, and videos short enough for transformers' rule to be the released model's: T <= max(H, W) / 2."""
    rng, media = random.Random(0), 0
    for _ in range(200):
        ids, grids = [1], []
        for _ in range(rng.randint(0, 5)):
            h, w = 2 * rng.randint(1, 9), 2 * rng.randint(1, 9)
            is_video = rng.random() < 0.5
            grids.append(Grid(rng.randint(1, max(h, w) // 2) if is_video else 1, h, w))
            ids += [VIDEO if is_video else IMAGE, *[1] * rng.randint(1, 12)]
        assert positions_of(ids, *grids).tolist() == transformers_positions(qwen, ids, grids).tolist(), (ids, grids)
        media += len(grids)
    assert media > 300


# ---- the released model's rule, written by hand ----------------------------------------------------------------------


def test_next_position_after_a_long_video():
    """1 + the largest position on any axis: the temporal one after a long video, where transformers 5 goes back."""
    positions = positions_of([1] * 7 + [VIDEO] + [1] * 3, Grid(32, 20, 20))
    assert positions.shape == (3, 7 + 32 * 10 * 10 + 3)
    assert positions[:, 6].tolist() == [6, 6, 6]
    assert positions[:, 7].tolist() == [7, 7, 7]
    assert positions[:, 3206].tolist() == [38, 16, 16], "last visual token: frame pair 31, row 9, column 9"
    assert positions[:, 3207:].tolist() == [[39, 40, 41]] * 3


@pytest.mark.parametrize(
    ("grid", "following"),
    [
        (Grid(1, 2, 2), 1),
        (Grid(1, 20, 8), 10),
        (Grid(1, 8, 20), 10),
        (Grid(10, 20, 20), 10),
        (Grid(11, 20, 20), 11),
        (Grid(384, 4, 6), 384),
    ],
)
def test_what_follows_a_medium_continues_after_its_longest_axis(grid, following):
    start = 5
    positions = positions_of([1] * start + [VIDEO, 1, 1], grid)
    assert positions[:, -2:].tolist() == [[start + following, start + following + 1]] * 3


def test_text_after_a_clip_of_qwen2_5_vl_goes_on_after_its_time():
    """10 seconds at 2 frames a second are 10 pairs, a second or 2 steps apart: the last one is at 7 + 18, and text goes
    on at 26. So `get_rope_index` of the released model (transformers 4.49); that of 5.24 goes on at 17, in the middle
    of the clip."""
    positions = positions_of([1] * 7 + [VIDEO] + [1] * 3, Grid(10, 20, 20, step=2.0))
    assert positions[:, 7 : 7 + 1000 : 100].tolist() == [[*range(7, 26, 2)], [7] * 10, [7] * 10]
    assert positions[:, -3:].tolist() == [[26, 27, 28]] * 3


def test_fractions_of_seconds_count():
    """4/3 of a second a pair are 8/3 steps, whose multiples are cut: 0, 2.67, 5.33, 8, 10.67. transformers before 5.23
    cut the seconds first, and made 0, 2, 4, 6, 8 of them."""
    positions = positions_of([1, VIDEO, 1], Grid(5, 2, 2, step=2 * 4 / 3))
    assert positions[0].tolist() == [0, 1, 3, 6, 9, 11, 12]
    assert positions[1].tolist() == [0, 1, 1, 1, 1, 1, 12]
    dense = positions_of([1, VIDEO, 1], Grid(5, 2, 2, step=2 * 0.25))
    assert dense[0].tolist() == [0, 1, 1, 2, 2, 3, 4], "half a second is a step, also in the middle of a pair"


def test_steps_of_time_are_those_of_the_release():
    """Of many clips and choices of frames, bit for bit as transformers 4.49 multiplies: float32, seconds of a pair by
    qwen-vl-utils' `sample_fps`."""
    compared = 0
    family = FAMILIES["qwen2_5_vl"]
    for rate in (2.0, 5.0, 10.0, 12.5, 24.0, 25.0, 30.0, 60.0, 23.976, 30000 / 1001):
        for total in range(4, 1200, 53):
            for frames in {4, 6, 20, 50, total // 2 * 2, int(total / rate * 2) // 2 * 2} & {*range(2, total + 1)}:
                moments = torch.linspace(0, total - 1, frames).round().long().tolist()
                grid = in_time(Grid(frames // 2, 2, 2), moments, total / rate, rate, family)
                seconds = torch.tensor(2 / (frames / total * rate))
                released = (torch.arange(frames // 2) * seconds * 2).long()
                assert positions_of([VIDEO], grid)[0].tolist() == released.tolist(), (rate, total, frames)
                compared += 1
    assert compared > 800


def test_times_of_qwen3_vl_are_rounded_as_in_the_release():
    """Frames 6 and 21 of 30 a second: 0.2 and 0.7 make 0.44999999999999996, written as 0.4. (6 + 21) / 2 / 30 is 0.45,
    which would be 0.5. Source: `_calculate_timestamps` of Qwen3-VL's processor."""
    grid = in_time(Grid(2, 2, 2), [6, 21, 31, 32], 1.0, 30.0, FAMILIES["qwen3_vl"])
    assert [f"{seconds:.1f}" for seconds in grid.times] == ["0.4", "1.1"]
    assert grid.step == 1.0
    assert [place.tokens for place in grid.places] == [1, 1]


@pytest.mark.parametrize("is_list", [False, True])
def test_times_of_random_clips_are_those_of_qwen3_vls_processor(is_list):
    rng = random.Random(4)
    for _ in range(300):
        rate = rng.choice([1.0, 2.0, 10.0, 24.0, 25.0, 29.97, 30.0, 60.0])
        frames = 2 * rng.randint(1, 30)
        moments = [*range(frames)] if is_list else sorted(rng.randrange(2000) for _ in range(frames))
        theirs = Qwen3VLProcessor._calculate_timestamps(None, list(moments), rate)
        assert list(in_time(Grid(frames // 2, 2, 2), moments, 1.0, rate, FAMILIES["qwen3_vl"]).times) == theirs


def test_every_position_of_a_long_video_and_an_image():
    """Grid (3, 4, 2) is 3 x 2 x 1 tokens and longest in time; the image of grid (1, 4, 6) is 2 x 3 tokens."""
    positions = positions_of([1, 1, VIDEO, 1, IMAGE, 1, 1], Grid(3, 4, 2), Grid(1, 4, 6))
    assert positions.tolist() == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 6, 6, 6, 6, 9, 10],
        [0, 1, 2, 3, 2, 3, 2, 3, 5, 6, 6, 6, 7, 7, 7, 9, 10],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 6, 7, 8, 9, 10],
    ]


def test_text_counts_up_on_all_axes():
    assert positions_of([1] * 5).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_expand_repeats_placeholders_and_moves_nothing_else():
    encoded = Encoded([10, IMAGE, 11, VIDEO, 12, 13], [False, False, False, False, True, True], [1, 3])
    ids, supervised, spans = expand(encoded, [Grid(1, 2, 6), Grid(2, 2, 2)])
    assert ids.tolist() == [10, IMAGE, IMAGE, IMAGE, 11, VIDEO, VIDEO, 12, 13]
    assert supervised.tolist() == [False] * 7 + [True] * 2
    assert spans == [(1, 4), (5, 7)]


# ---- positions of patches --------------------------------------------------------------------------------------------

GRIDS = [Grid(1, 2, 2), Grid(1, 4, 6), Grid(3, 6, 4), Grid(2, 2, 10), Grid(1, 36, 24), Grid(5, 10, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patch_positions_equal_transformers(grid):
    wanted = get_vision_position_ids(torch.tensor([grid[:3]]), 2)
    assert patch_positions(grid).tolist() == wanted.tolist()


def test_patch_positions_written_by_hand():
    assert patch_positions(Grid(1, 4, 4)).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
        [2, 0], [2, 1], [3, 0], [3, 1], [2, 2], [2, 3], [3, 2], [3, 3],
    ]  # fmt: skip
    assert patch_positions(Grid(2, 2, 2)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] * 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patch_positions_say_where_a_patch_was_cut(grid):
    """Each frame's pixels hold the row and the column of their patch; so must the patches, in this order."""
    rows, columns = np.mgrid[0 : grid.h * 14, 0 : grid.w * 14] // 14
    frame = torch.from_numpy(np.stack([rows, columns, rows * 0]).astype(np.uint8))
    medium = patchify([frame] * 2 * grid.t, grid, patch=14, frames_per_patch=2)
    assert medium.grid == grid
    channels = medium.patches.reshape(-1, 3, 2 * 14 * 14)
    assert (channels[:, :2].amin(2) == channels[:, :2].amax(2)).all(), "a patch mixes pixels of several"
    assert channels[:, :2, 0].tolist() == patch_positions(grid).tolist()


# ---- the packed batch ------------------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> Batch:
    """Four samples: text; a video and an image; one whose first token is supervised; an image."""
    return Collator()(
        [
            sample([10, 11, 12, 13], [0, 0, 1, 1], where="a"),
            sample([20, VIDEO, 21, IMAGE, 22, 23], [0, 0, 0, 0, 1, 1], (Grid(2, 2, 2), 3), (Grid(1, 4, 2), 1), where="b"),
            sample([30, 31], [1, 1], where="c"),
            sample([40, IMAGE, 41], [0, 0, 1], (Grid(1, 2, 2), 2), where="d"),
        ]
    )  # fmt: skip


def test_packed_row_written_by_hand(batch):
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 20, 8, 8, 21, 7, 7, 22, 23, 30, 31, 40, 7, 41]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 4, 6, 7, 0, 1, 0, 1, 2],
        [0, 1, 2, 3, 0, 1, 1, 3, 4, 5, 6, 7, 0, 1, 0, 1, 2],
        [0, 1, 2, 3, 0, 1, 1, 3, 4, 4, 6, 7, 0, 1, 0, 1, 2],
    ]
    assert batch.segments.cu_seqlens.tolist() == [0, 4, 12, 14, 17]
    assert batch.segments.max_seqlen == 8
    assert batch.where == ["a", "b", "c", "d"]
    assert {key: n for key, n in batch.counts.items() if n} == {
        "samples": 4,
        "tokens": 17,
        "visual_tokens": 5,
        "supervised_tokens": 6,
        "supervised_weight": 6.0,
    }


def test_targets_written_by_hand(batch):
    """Row i predicts token i + 1. 30 is supervised, but as the first token of its sample it is nobody's target."""
    assert batch.supervised_index.tolist() == [1, 2, 9, 10, 12, 15]
    assert batch.target_ids.tolist() == [12, 13, 22, 23, 31, 41]


def test_visual_things_stand_images_first(batch):
    assert batch.visual_index.tolist() == [8, 9, 15, 5, 6]
    assert batch.grid_thw.tolist() == [[1, 4, 2], [1, 2, 2], [2, 2, 2]]
    assert batch.image_patches.shape == (12, 588)
    assert batch.image_patches[:, 0].tolist() == [1] * 8 + [2] * 4
    assert batch.video_patches.shape == (8, 1176)
    assert (batch.video_patches == 3).all()
    assert batch.image_patches.dtype == batch.video_patches.dtype == torch.uint8
    block = [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert batch.vision_position_ids.tolist() == block + [[2, 0], [2, 1], [3, 0], [3, 1]] + block + block + block
    assert batch.vision_segments.cu_seqlens.tolist() == [0, 8, 12, 16, 20], "each pair of frames by itself"
    assert batch.vision_segments.max_seqlen == 8


def test_vision_indices_of_random_batches_equal_transformers():
    rng = random.Random(1)
    for _ in range(50):
        samples = []
        for _ in range(rng.randint(1, 4)):
            ids, media = [1], []
            for _ in range(rng.randint(1, 3)):
                is_video = rng.random() < 0.5
                grid = Grid(rng.randint(1, 4) if is_video else 1, 2 * rng.randint(1, 4), 2 * rng.randint(1, 4))
                media.append((grid, rng.randrange(256)))
                ids += [VIDEO if is_video else IMAGE, 1]
            samples.append(sample(ids, [0] * (len(ids) - 1) + [1], *media))
        batch = Collator()(samples)
        order = [m.grid[:3] for s in samples for m in s.media if not m.is_video]
        order += [m.grid[:3] for s in samples for m in s.media if m.is_video]
        assert batch.grid_thw.tolist() == [list(grid) for grid in order]
        assert batch.vision_position_ids.tolist() == get_vision_position_ids(batch.grid_thw, 2).tolist()
        assert batch.vision_segments.cu_seqlens.tolist() == get_vision_cu_seqlens(batch.grid_thw).tolist()
        rows = torch.isin(batch.input_ids, torch.tensor([IMAGE, VIDEO])).nonzero().flatten().tolist()
        assert sorted(batch.visual_index.tolist()) == rows
        kinds = batch.input_ids[batch.visual_index].tolist()
        assert kinds == sorted(kinds), "images (7) first, then videos (8)"


def test_a_batch_of_text_has_empty_visual_tensors():
    batch = Collator()([sample([1, 2, 3], [0, 1, 1])])
    assert batch.visual_index.shape == (0,)
    assert batch.visual_index.dtype == torch.int64
    assert batch.image_patches.shape == (0, 588)
    assert batch.video_patches.shape == (0, 1176)
    assert batch.grid_thw.shape == (0, 3)
    assert batch.vision_position_ids.shape == (0, 2)
    assert batch.vision_segments.cu_seqlens.tolist() == [0]
    assert batch.supervised_index.tolist() == [0, 1]
    assert batch.target_ids.tolist() == [2, 3]


def test_moving_a_batch_moves_every_tensor(batch):
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    tensors += [moved.segments.cu_seqlens, moved.vision_segments.cu_seqlens]
    assert len(tensors) > 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.where == batch.where
