"""What is known before training, of each family: parameters, work, windows, memory, kernels, and the plan in words.

Against numbers that do not come from util/cost: torch's counter of operations, windows patch by patch, autograd's own
tensors, and the parameters that the hub tells of the published models.
"""

import copy
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import finetune
from tests import runs
from tests.official import official_config
from tests.test_memory import kept_for_backward
from util import log
from util.__main__ import main as command
from util.collator import Collator
from util.config import Config
from util.conversation import Encoded
from util.cost import fastest, flops, layouts
from util.cost.activations import kept_by
from util.cost.sizes import Finding, Sizes
from util.dataset import Sample, Samples, Size, load_examples
from util.family import FAMILIES, new_model, window_squares
from util.frozen import feature_bytes
from util.model import load_config, load_processor, prepare_model
from util.tiny_model import make_tiny_model
from util.vision import Budget, Grid, Medium

CPU = torch.device("cpu")
IMAGE = Grid(1, 10, 28)  # 5 x 14 tokens: windows of 4 x 4 are cut at both edges
VIDEO = Grid(2, 6, 18)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function: model_type -> the folder of its tiny checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    return lambda model_type: make_tiny_model(folder / model_type, model_type=model_type)


# ---- parameters -----------------------------------------------------------------------------------------------------

# model.safetensors' totals, as the hub tells them of Qwen/<name>-Instruct
PUBLISHED = {
    "2b": 2_208_985_600,
    "qwen2.5_3b": 3_754_622_976,
    "qwen2.5_7b": 8_292_166_656,
    "qwen3_2b": 2_127_532_032,
    "qwen3_4b": 4_437_815_808,
    "qwen3_8b": 8_767_123_696,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_those_published(size):
    config = official_config(size)
    counts = layouts.Weights.of(config).stage(0, (config.text_config.num_hidden_layers,)).counts()
    assert sum(counts[part] for part in ("vision", "merger", "language_model")) == PUBLISHED[size]


# ---- work -----------------------------------------------------------------------------------------------------------


def sample_of(model_type: str, grids: list[tuple[Grid, bool]]) -> tuple[Sample, Size]:
    """20 tokens of text, of which 7 are supervised, and blank images and videos; and its Size."""
    media = []
    for grid, is_video in grids:
        numbers = (1 + is_video) * 3 * FAMILIES[model_type].patch ** 2
        media.append(Medium(torch.zeros(grid.patches, numbers, dtype=torch.uint8), grid, is_video))
    encoded = Encoded([5] * 20, [0.0] * 13 + [1.0] * 7, list(range(1, 1 + len(grids))))
    tokens = 20 + sum(grid.tokens - 1 for grid, _ in grids)
    return Sample(encoded, media, "a sample"), Size(tokens, 7, [grid for grid, _ in grids])


MEDIA = {"text": [], "image": [(IMAGE, False)], "video": [(VIDEO, True)]}


def counted_and_forecast(model_type: str, path: str) -> dict[str, tuple[int, float]]:
    """Operations of a forward pass over each of MEDIA, as torch counts them and as cost/flops.py does.

    torch counts causal attention as if each token saw all: twice what is counted here. Of an image's patches one frame
    is multiplied, where a video's two are counted for both. transformers 5.17 makes angles of positions by products,
    later ones do not: those are left out.
    """
    processor = load_processor(path)
    settings = Config(device="cpu", dtype="float32")
    model = prepare_model(new_model(load_config(path)), settings, processor, CPU).eval()
    config = load_config(path)
    width = config.vision_config.embed_dim if model_type == "qwen2_vl" else config.vision_config.hidden_size
    found = {}
    for name, media in MEDIA.items():
        sample, size = sample_of(model_type, media)
        # of a CPU's own attention torch counts nothing, of the one that is written out its two products
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(Collator(model_type)([sample]))
        work = sum(flops.forward_flops(config, size).values()) + flops.attention_flops(config, size)
        if name == "image":
            work -= 2 * 3 * config.vision_config.patch_size**2 * width * IMAGE.patches
        angles = [
            sum(done.values()) for module, done in counter.get_flop_counts().items() if module.endswith("rotary_emb")
        ]
        found[name] = (counter.get_total_flops() - sum(angles), work)
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_work_is_what_torch_counts(model_type, tiny):
    """Every product of text alone, of an image and of a video, windows that are cut at both edges included."""
    found = counted_and_forecast(model_type, str(tiny(model_type)))
    wrong = {name: pair for name, pair in found.items() if pair[0] != pair[1]}
    assert not wrong, "(counted by torch, by cost/flops.py)"


def test_blocks_that_are_said_to_see_more_than_their_windows_would_be_seen(tiny, monkeypatch):
    monkeypatch.setattr(flops, "whole_blocks", lambda tower: tower.depth)
    found = counted_and_forecast("qwen2_5_vl", str(tiny("qwen2_5_vl")))
    assert found["text"][0] == found["text"][1]
    assert found["image"][0] < found["image"][1]
    assert found["video"][0] < found["video"][1]


def test_work_of_the_published_ones_by_hand():
    """A forward pass over one image of 64 x 64 patches and 1,000 tokens: the parts that no other family has."""
    size = Size(1000, 10, [Grid(1, 64, 64)])
    work = flops.forward_flops(official_config("qwen2.5_7b"), size)
    block = 1280 * (3 * 1280 + 1280 + 3 * 3420)  # qkv, proj, and the three matrices of a gated MLP
    seen = 4 * 4096**2 + 28 * 64 * 64**2  # 4 blocks see all, 28 see windows of 8 x 8 patches
    assert work["vision"] == 2 * (1176 * 1280 + 32 * block) * 4096 + 4 * 1280 * seen
    work = flops.forward_flops(official_config("qwen3_4b"), size)
    merger = 4096 * 4096 + 4096 * 2560
    assert work["merger"] == 2 * 4 * merger * 1024, "the merger and three of deepstack"
    layer = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728  # 32 heads of 128 are wider than 2560
    assert work["language_model"] == 2 * 36 * layer * 1000 + 2 * 4096 * 36 * 1000**2


def test_windows_are_counted_patch_by_patch():
    for rows in range(2, 40, 2):
        for columns in (2, 8, 14, 16, 18, 26):
            places = [(row // 8, column // 8) for row in range(rows) for column in range(columns)]
            assert window_squares(rows, columns) == sum(n**2 for n in Counter(places).values()), (rows, columns)


def test_columns_have_what_sizes_have():
    sizes = [Size(9, 1, []), Size(100, 5, [IMAGE, VIDEO]), Size(50, 5, [VIDEO])]
    columns = Sizes.of(Finding(size) for size in sizes).columns()
    for name in columns._fields:
        np.testing.assert_array_equal(getattr(columns, name), [getattr(size, name) for size in sizes], name)


# ---- memory ---------------------------------------------------------------------------------------------------------


def two_of_each(size: str):
    """A published config with two blocks, two layers and few tokens: widths alone are its own."""
    config = copy.deepcopy(official_config(size))
    text, tower = config.text_config, config.vision_config
    text.num_hidden_layers = tower.depth = 2
    text.vocab_size = 2048
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[:2]
    if hasattr(tower, "fullatt_block_indexes"):
        tower.fullatt_block_indexes = [1]
    if hasattr(tower, "deepstack_visual_indexes"):
        tower.deepstack_visual_indexes = [0, 1]
    return config


@pytest.mark.parametrize("frozen", [[], ["vision", "merger"], ["language_model"]], ids=["none", "tower", "language"])
@pytest.mark.parametrize("size", ["qwen2.5_3b", "qwen3_4b"])
def test_activations_are_forecast_within_15_percent(size, frozen, processor):
    config = two_of_each(size)
    grid = Grid(1, 24, 36)
    numbers = 3 * FAMILIES[config.model_type].patch ** 2
    patches = Medium(torch.zeros(grid.patches, numbers, dtype=torch.uint8), grid, is_video=False)
    samples = [Sample(Encoded([5] * 400, [0.0] * 350 + [1.0] * 50, [10]), [patches], "a sample")] * 2
    settings = Config(device="cpu", dtype="float32", freeze=frozen, attention="sdpa")
    measured = kept_for_backward(settings, config, processor, samples)
    load = (2 * (399 + grid.tokens), 2 * grid.patches, 2 * 50)
    kept = kept_by(config, settings, torch.float32, load)
    # of a logit's three numbers at the loss the forward pass keeps one; attention on a CPU is torch's dense one
    assert kept.total + kept.logits / 3 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])  # Qwen3-VL's are not kept
def test_features_of_a_frozen_tower_are_as_many_bytes_as_it_gives(model_type, tiny):
    config = load_config(str(tiny(model_type)))
    sizes = [Sizes.of([Finding(Size(100, 5, [IMAGE, VIDEO]))])]
    patches = IMAGE.patches + VIDEO.patches
    assert feature_bytes(config, sizes, ["vision"], torch.bfloat16) == 2 * 64 * patches
    assert feature_bytes(config, sizes, ["vision", "merger"], torch.bfloat16) == 2 * 128 * patches // 4


# ---- kernels --------------------------------------------------------------------------------------------------------


def test_windows_choose_a_kernel_of_their_own():
    """28 of 32 blocks of Qwen2.5-VL see many short pieces."""
    parts = fastest.parts_of(official_config("qwen2.5_7b"), Config())
    assert [(part.name, part.layers, part.width) for part in parts] == [
        ("tower", 4, 80),
        ("tower's windows", 28, 80),
        ("language model", 28, 128),
    ]
    table = SimpleNamespace(size=lambda sample: Size(100, 5, [IMAGE, VIDEO]))
    of_windows = parts[1].lengths(SimpleNamespace(table=table), [0])
    assert sum(of_windows) == IMAGE.patches + VIDEO.patches
    assert Counter(of_windows) == Counter({64: 3, 32: 1, 16: 3, 8: 1, 48: 4, 12: 2})
    assert [part.name for part in fastest.parts_of(official_config("qwen3_4b"), Config())] == [
        "tower",
        "language model",
    ]
    assert fastest.parts_of(official_config("qwen3_4b"), Config())[1].width == 128


# ---- through the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_picture(tmp_path_factory) -> str:
    """A data file with one sample of one image, 10 x 14 tokens of any family after resizing."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (14 * 32, 10 * 32), "red").save(folder / "red.png")
    content = [{"type": "image", "image": "red.png", "resized_height": 320, "resized_width": 448}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red square"}]
    (folder / "data.json").write_text(json.dumps([{"messages": messages}]))
    return str(folder / "data.json")


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_a_run_says_and_logs_the_work_of_its_parts(model_type, tiny, one_picture, tmp_path, capsys, monkeypatch):
    """Four times the same sample in each step: its work is known, and what part of the time it took, too."""
    monkeypatch.setattr(log.flops, "peak_flops", lambda device: 1e9)
    path = str(tiny(model_type))
    own = {"data": [f"{one_picture}*8"], "max_steps": 2, "global_batch_size": 4, "max_pixels": None}
    config = Config(**runs.settings(path, tmp_path / "run", memory_budget="4GiB", **own))
    finetune.train(config)
    said = capsys.readouterr().out
    budget = Budget.of(config, model_type)
    samples = Samples(load_examples([one_picture], load_processor(path)), load_processor(path), budget)
    forward = flops.forward_flops(load_config(path), samples.size(0))
    total = sum(forward.values())
    (told,) = re.findall(r"^ *work  (.*)$", said, re.MULTILINE)
    assert f"{100 * forward['merger'] / total:.0f} % merger" in told
    for line in runs.log(tmp_path / "run"):
        if "loss" not in line:
            continue
        for part in forward:
            assert line[f"flops_{part}"] == pytest.approx(forward[part] / total, abs=1e-3), part
        assert line["mfu"] == pytest.approx(4 * 3 * total / line["step_seconds"] / 1e9, rel=0.02)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_check_forecasts_and_lays_out(model_type, tiny, one_picture, capsys):
    command(["check", f"{one_picture}*8", "--model", str(tiny(model_type)), "--gpus", "2", "--global_batch_size", "8"])
    said = capsys.readouterr().out
    assert "training data" in said
    assert re.search(r"^  layout +\w+ 2, ", said, re.MULTILINE), said
