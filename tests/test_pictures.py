"""docs/make_pictures.py draws what a run holds; the pictures themselves are looked at by people."""

import dataclasses
import json
import runpy
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.pages import ROOT
from util.command_line import UserError
from util.config import Config

GREEN = (0x1A, 0x7F, 0x37)  # supervised text
BLUE = (0x2F, 0x6A, 0xE0)  # the mean of the loss
STEPS = 60


@pytest.fixture(scope="module")
def draw() -> dict:
    """The functions of the script by name."""
    return runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    """What a run leaves, as far as the pictures read it: model, settings, and a loss that falls."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(tiny_path, folder)
    settings = Config(data=[str(ROOT / "train_data" / "data.json")], global_batch_size=6, max_pixels=50176)
    (folder / "training_config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    lines = [json.dumps({"step": step, "loss": 5 / step}) for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels have a colour."""
    return int((np.asarray(picture.convert("RGB")) == colour).all(axis=2).sum())


def test_every_token_of_the_batch_is_drawn_in_its_colour(draw, run):
    batch = draw["first_batch"](run)
    samples = draw["kinds_of_tokens"](batch)
    tokens = [colour for sample in samples for colour in sample]
    assert len(samples) == 6
    assert len(tokens) == batch.counts["tokens"]
    assert tokens.count(draw["SUPERVISED"]) == batch.counts["supervised_tokens"] > 0
    assert tokens.count(draw["VISUAL"]) == batch.counts["visual_tokens"] > 0
    for sample in samples:
        assert sample[0] == draw["TEXT"], "the first token of a sample is nobody's target"
        assert sample[-1] == draw["SUPERVISED"], "a conversation ends with an answer"


def test_the_sample_is_coloured_as_in_a_terminal(draw, run):
    assert count(draw["coloured_sample"](run), GREEN) > 100


def test_the_loss_curve_falls(draw, run):
    curve = np.asarray(draw["loss_curve"](run).convert("RGB"))
    rows, columns = np.nonzero((curve == BLUE).all(axis=2)[100:])  # below the legend
    middle = (columns.min() + columns.max()) // 2
    assert rows[columns < middle].mean() < rows[columns >= middle].mean(), "a row further down is a lower loss"


def test_a_picture_that_is_too_large_is_refused(draw, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="make it smaller"):
        draw["save"](Image.fromarray(noise), tmp_path / "noise.png")
