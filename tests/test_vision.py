"""Sizes, frames and pixels, against qwen-vl-utils, the published processor and Pillow."""

import json
import math
import random
import sys
import types
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from qwen_vl_utils import vision_process

from tests import odd_media
from util import vision
from util.config import Config
from util.model import set_budget
from util.vision import Budget, Grid

FACTOR, TOKEN = 28, 28 * 28
# Of the published preprocessor_config.json.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
UNCAPPED = Budget(video_max_tokens=10**9)


class Clip:
    """As much of a VideoReader as the choice of frames needs."""

    missing = ""

    def __init__(self, frames: int, fps: float, height: int = 360, width: int = 640) -> None:
        self.frames, self.average_fps, self.height, self.width = frames, fps, height, width

    def __len__(self) -> int:
        return self.frames


def write_png(path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def image_item(path, **keys) -> dict:
    return {"type": "image", "image": str(path), **keys}


def video_item(path="clip.mp4", **keys) -> dict:
    return {"type": "video", "video": path, **keys}


def normalised(patches: torch.Tensor, frames: int) -> torch.Tensor:
    """Our uint8 patches as the official processor's pixel_values: an image's frame is there twice."""
    pixels = patches.reshape(len(patches), 3, frames, 14, 14).float()
    pixels = (pixels / 255 - MEAN[:, None, None, None]) / STD[:, None, None, None]
    return pixels.expand(-1, -1, 2, -1, -1).reshape(len(patches), 3 * 2 * 14 * 14)


def unnormalised(pixel_values: torch.Tensor) -> list[int]:
    """The official processor's pixel_values as the integers 0 to 255 that they were made from, in a row."""
    pixels = pixel_values.reshape(len(pixel_values), 3, -1) * STD[:, None] + MEAN[:, None]
    return (pixels * 255).round().flatten().tolist()


def unpatchify(medium: vision.Medium) -> np.ndarray:
    """Frames (F, H, W, 3) of an image or video, put together patch by patch."""
    t, h, w = medium.grid[:3]
    frames = medium.patches.shape[1] // (3 * 14 * 14)
    patches = iter(medium.patches.reshape(-1, 3, frames, 14, 14).numpy())
    out = np.zeros((t * frames, h * 14, w * 14, 3), np.uint8)
    for time in range(t):
        for row in range(0, h, 2):
            for column in range(0, w, 2):
                for y, x in ((row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)):
                    for frame, pixels in enumerate(next(patches).transpose(1, 2, 3, 0)):
                        out[time * frames + frame, y * 14 : y * 14 + 14, x * 14 : x * 14 + 14] = pixels
    assert next(patches, None) is None, "patches are left over"
    return out


def assert_close(ours, reference, levels: int = 1, share: float = 0.01) -> None:
    """At most so many levels of 255 apart, and apart at all in at most `share` of the values."""
    difference = (torch.tensor(ours).int() - torch.tensor(reference).int()).abs()
    assert difference.numel() > 0
    most, differing = int(difference.max()), (difference > 0).float().mean().item()
    assert most <= levels, f"{most} levels apart"
    assert differing <= share, f"{differing:.2%} of the values differ"


# ---- pixels against the official processors --------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(56, 56), (56, 140), (308, 224)])
def test_image_at_its_size_is_the_official_processors(height, width, any_processor, picture, tmp_path):
    pixels = picture(height, width)
    medium = vision.load(image_item(write_png(tmp_path / "a.png", pixels)), Budget())
    official = any_processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert [list(medium.grid[:3])] == official["image_grid_thw"].tolist()
    assert medium.patches.dtype == torch.uint8
    assert medium.patches.shape == (height // 14 * (width // 14), 588)
    torch.testing.assert_close(normalised(medium.patches, 1), official["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(100, 75), (481, 640), (37, 300), (33, 33)])
def test_resized_image_is_the_official_processors(height, width, any_processor, picture, tmp_path):
    pixels = picture(height, width)
    medium = vision.load(image_item(write_png(tmp_path / "a.png", pixels)), Budget(min_pixels=3136, max_pixels=200704))
    size = {"shortest_edge": 3136, "longest_edge": 200704}
    official = any_processor.image_processor(images=[Image.fromarray(pixels)], size=size, return_tensors="pt")
    assert [list(medium.grid[:3])] == official["image_grid_thw"].tolist()
    twice = medium.patches.reshape(-1, 3, 1, 196).expand(-1, -1, 2, -1)
    assert_close(twice.flatten().tolist(), unnormalised(official["pixel_values"]))


@pytest.mark.parametrize(
    ("height", "width", "share"),
    # Pillow and torchvision round between two passes, first along the rows or first along the columns: where the two
    # sides scale differently, a fifth of the values is a level apart.
    [(100, 75, 0.01), (481, 640, 0.01), (1080, 1440, 0.01), (37, 300, 0.25)],
)
def test_resized_image_is_close_to_qwen_vl_utils(height, width, share, picture, tmp_path):
    """Which resizes with Pillow: one level apart, at a hard edge two."""
    pixels = picture(height, width)
    medium = vision.load(image_item(write_png(tmp_path / "a.png", pixels)), Budget(min_pixels=3136, max_pixels=200704))
    pillow = vision_process.fetch_image({"image": Image.fromarray(pixels), "min_pixels": 3136, "max_pixels": 200704})
    ours = unpatchify(medium)[0]
    assert ours.shape[:2] != (height, width), "a resize is needed"
    assert ours.shape[:2] == pillow.size[::-1]
    assert_close(ours, np.array(pillow), levels=2, share=share)
    assert np.mean(np.abs(ours.astype(int) - np.array(pillow)) > 1) < 1e-4


def test_pixels_come_out_of_patches_as_they_went_in(picture, write_video, tmp_path):
    """`frames_of`, which `python -m util show --pixels` writes, against the patches put together one by one."""
    Image.fromarray(picture(70, 98, 0)).save(tmp_path / "a.png")
    path = write_video(tmp_path / "a.mp4", [picture(84, 112, seed) for seed in range(6)], fps=2)
    for item in (image_item(tmp_path / "a.png"), video_item(path)):
        medium = vision.load(item, Budget(min_pixels=3136))
        assert np.array_equal(vision.frames_of(medium).permute(0, 2, 3, 1).numpy(), unpatchify(medium))


def test_video_frames_are_the_official_processors(any_processor, picture, write_video, decode_all, tmp_path):
    """A file whose every frame is wanted, then one whose frames must be chosen and resized."""
    frames = [picture(84, 112, seed) for seed in range(6)]
    path = write_video(tmp_path / "a.mp4", frames, fps=2)
    decoded = torch.from_numpy(decode_all(path)).permute(0, 3, 1, 2)
    medium = vision.load(video_item(path), Budget(min_pixels=3136))
    official = any_processor.video_processor(videos=[decoded], return_tensors="pt", do_sample_frames=False)
    assert medium.grid == Grid(3, 6, 8, False)
    assert [list(medium.grid[:3])] == official["video_grid_thw"].tolist()
    assert medium.patches.shape == (3 * 6 * 8, 1176)
    torch.testing.assert_close(normalised(medium.patches, 2), official["pixel_values_videos"], atol=1e-5, rtol=0)

    path = write_video(tmp_path / "b.mp4", [picture(90, 150, seed) for seed in range(25)], fps=10)
    # 2.5 seconds at 2 frames per second are 5, made even: 4 of the 25, linspace(0, 24, 4)
    chosen = torch.from_numpy(decode_all(path)[[0, 8, 16, 24]]).permute(0, 3, 1, 2)
    medium = vision.load(video_item(path), Budget(min_pixels=3136, max_pixels=7840))
    official = any_processor.video_processor(
        videos=[chosen],
        size={"shortest_edge": 3136, "longest_edge": 7840},
        return_tensors="pt",
        do_sample_frames=False,
    )
    assert medium.grid[0] == 2
    assert [list(medium.grid[:3])] == official["video_grid_thw"].tolist()
    assert_close(medium.patches.flatten().tolist(), unnormalised(official["pixel_values_videos"]))


def test_list_of_frames_is_the_official_processors(any_processor, picture, tmp_path):
    """All frames of a list are used; an odd one is doubled, as the official processor doubles it."""
    frames = [picture(56, 84, seed) for seed in range(5)]
    paths = [write_png(tmp_path / f"{number}.png", frame) for number, frame in enumerate(frames)]
    medium = vision.load(video_item(paths), Budget(min_pixels=3136))
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    official = any_processor.video_processor(videos=[stacked], return_tensors="pt", do_sample_frames=False)
    assert medium.grid == Grid(3, 4, 6, False)
    torch.testing.assert_close(normalised(medium.patches, 2), official["pixel_values_videos"], atol=1e-5, rtol=0)
    assert (unpatchify(medium) == np.stack([*frames, frames[-1]])).all()


def test_frames_of_another_size_become_like_the_first(picture, tmp_path):
    paths = [write_png(tmp_path / "a.png", picture(56, 84)), write_png(tmp_path / "b.png", picture(100, 100))]
    medium = vision.load(video_item(paths), Budget(min_pixels=3136))
    assert medium.grid == Grid(1, 4, 6, False)
    pillow = np.array(Image.fromarray(picture(100, 100)).resize((84, 56), Image.Resampling.BICUBIC))
    first, second = unpatchify(medium)
    assert (first == picture(56, 84)).all()
    assert_close(second, pillow, share=0.25)


def test_patches_of_a_counting_image_written_by_hand(tmp_path):
    """A 56 x 28 image whose pixel values count along the rows: the first pixels of its 8 patches."""
    pixels = (np.arange(56)[:, None] + 100 * (np.arange(28)[None] // 14)).astype(np.uint8)
    medium = vision.load(image_item(write_png(tmp_path / "a.png", pixels)), Budget(min_pixels=784))
    assert medium.grid == Grid(1, 4, 2, False)
    assert medium.patches[:, 0].tolist() == [0, 100, 14, 114, 28, 128, 42, 142]
    assert medium.patches[0, :30].tolist() == [0] * 14 + [1] * 14 + [2] * 2
    assert (medium.patches[:, :196] == medium.patches[:, 392:]).all(), "grey is three equal channels"


def test_224_pixels_are_66_tokens(tmp_path, picture):
    """The check in the Qwen2-VL report (arXiv 2409.12191, section 2.1): 64 visual tokens and the two vision marks."""
    item = image_item(write_png(tmp_path / "a.png", picture(224, 224)))
    assert vision.read_grid(item, Budget()).tokens + 2 == 66


# ---- kinds of image files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, extension, picture, tmp_path):
    path = tmp_path / f"a.{extension}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(56, 112)).save(path, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape == ((56, 112, 3) if orientation <= 4 else (112, 56, 3)), "the test's own file is as meant"
    medium = vision.load(image_item(path), Budget())
    assert medium.grid == vision.read_grid(image_item(path), Budget())
    assert (unpatchify(medium)[0] == upright).all()


def on_white(colour: tuple[int, ...], alpha: int) -> list[int]:
    return [round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour]


def transparent_files(folder):
    """Files of 56 x 56 pixels, of one colour below a clear row of another, with the colours expected of both.

    qwen-vl-utils lays RGBA on white. Of every other mode it shows the colours below the transparency.
    """
    clear = np.zeros((56, 56), np.uint8)
    rgba = np.full((56, 56, 4), (200, 40, 90, 128), np.uint8)
    rgba[0] = (7, 7, 7, 0)
    Image.fromarray(rgba).save(folder / "rgba.png")
    yield "rgba.png", [255, 255, 255], on_white((200, 40, 90), 128)
    Image.fromarray(rgba).save(folder / "rgba.webp", lossless=True)
    yield "rgba.webp", [255, 255, 255], on_white((200, 40, 90), 128)
    Image.fromarray(rgba).save(folder / "rgba.tif")
    yield "rgba.tif", [255, 255, 255], on_white((200, 40, 90), 128)
    grey = np.full((56, 56, 2), (60, 128), np.uint8)
    grey[0] = (7, 0)
    Image.fromarray(grey, mode=None).save(folder / "la.png")
    yield "la.png", [7, 7, 7], [60, 60, 60]
    clear[1:] = 1
    palette = Image.fromarray(clear).convert("P")
    palette.putpalette([9, 9, 9, 200, 40, 90])
    palette.save(folder / "p.png", transparency=0)
    yield "p.png", [9, 9, 9], [200, 40, 90]
    palette.save(folder / "p_alphas.png", transparency=bytes([0, 128]))
    yield "p_alphas.png", [9, 9, 9], [200, 40, 90]
    palette.save(folder / "p.gif", transparency=0)
    yield "p.gif", [9, 9, 9], [200, 40, 90]
    rgb = np.full((56, 56, 3), (200, 40, 90), np.uint8)
    rgb[0] = (1, 2, 3)
    Image.fromarray(rgb).save(folder / "rgb.png", transparency=(1, 2, 3))
    yield "rgb.png", [1, 2, 3], [200, 40, 90]
    Image.fromarray(clear * 60).save(folder / "l.png", transparency=0)
    yield "l.png", [0, 0, 0], [60, 60, 60]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # which qwen-vl-utils lets through
def test_transparency_is_seen_as_qwen_vl_utils_shows_it(tmp_path):
    seen = 0
    for name, above, below in transparent_files(tmp_path):
        frame = unpatchify(vision.load(image_item(tmp_path / name), Budget()))[0]
        theirs = np.array(vision_process.fetch_image({"image": str(tmp_path / name)}))
        assert np.array_equal(frame, theirs), f"{name}: {frame[0, 0]} and {frame[1, 0]} at inference {theirs[:2, 0]}"
        assert (frame[0] == above).all(), f"{name}: a transparent row is {frame[0, 0]}"
        assert np.abs(frame[1:].astype(int) - below).max() <= 1, f"{name}: {frame[1, 0]} instead of {below}"
        seen += 1
    assert seen == 9


def test_16_bit_grey_keeps_its_upper_byte(tmp_path):
    values = np.linspace(0, 65535, 56 * 56).round().astype(np.uint16).reshape(56, 56)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        medium = vision.load(image_item(tmp_path / name), Budget())
        assert (unpatchify(medium)[0] == (values // 256)[:, :, None]).all(), name
        assert medium.grid.deep, f"{name}: nothing says that it is not of 8 bits"


def test_16_bit_grey_with_a_transparent_value(tmp_path):
    """A PNG can name one 16-bit grey as transparent (tRNS): it shows, as a transparent grey of 8 bits does."""
    values = np.full((56, 56), 0x80FF, np.uint16)
    values[0] = 0x1234
    Image.fromarray(values).save(tmp_path / "a.png", transparency=0x1234)
    frame = unpatchify(vision.load(image_item(tmp_path / "a.png"), Budget()))[0]
    assert (frame[1:] == 0x80).all(), f"0x80ff became {frame[1, 0, 0]}"
    assert (frame[0] == 0x12).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_what_pillow_makes_of_them(mode, picture, tmp_path):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(picture(56, 84)).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == ("RGB" if mode == "YCbCr" else mode), "the test's own file is as meant"
        wanted = np.asarray(image.convert("RGB"))
    assert wanted.std() > 10
    assert (unpatchify(vision.load(image_item(path), Budget()))[0] == wanted).all()


@pytest.mark.parametrize(
    ("name", "content"), [("text.png", b"not an image"), ("empty.jpg", b""), ("cut.png", None), ("missing.png", False)]
)
def test_unreadable_images_are_named(name, content, picture, tmp_path):
    path = tmp_path / name
    if content is None:
        write_png(path, picture(280, 280))
        path.write_bytes(path.read_bytes()[:5000])
    elif content is not False:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a readable image"):
        vision.load(image_item(path), Budget())
    with pytest.raises(ValueError, match=name):
        vision.load(video_item([str(path)]), Budget())


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_reading_a_grid_decodes_no_pixel(extension, picture, tmp_path, monkeypatch):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(picture(280, 420)).save(path)

    def decode(image):
        raise AssertionError("pixels are decoded to learn the size")

    with monkeypatch.context() as patch:
        patch.setattr(type(Image.open(path)), "load", decode)
        assert vision.read_grid(image_item(path), Budget()) == Grid(1, 20, 30, False)


# ---- smart_resize ----------------------------------------------------------------------------------------------------


def log_uniform(rng: random.Random, least: float, most: float) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def test_smart_resize_is_that_of_qwen_vl_utils():
    """Over random sizes and budgets wherever its answer is one; elsewhere ours is within the budget all the same."""
    rng, valid, broken, refused = random.Random(0), 0, 0, 0
    for _ in range(6000):
        height, width = log_uniform(rng, 1, 8000), log_uniform(rng, 1, 8000)
        least = TOKEN * log_uniform(rng, 1, 300)
        most = least * rng.uniform(1, 50)
        try:
            theirs = vision_process.smart_resize(height, width, FACTOR, least, most)
        except ValueError:
            assert max(height, width) > 200 * min(height, width)
            with pytest.raises(ValueError, match="more than 200 times the other"):
                vision.smart_resize(height, width, FACTOR, least, most)
            refused += 1
            continue
        ours = vision.smart_resize(height, width, FACTOR, least, most)
        case = f"{height}x{width} within {least} to {most}"
        if min(theirs) >= FACTOR:
            assert ours == theirs, case
            valid += 1
        else:  # a side of it rounded to nothing
            assert min(ours) == FACTOR, case
            assert max(ours) % FACTOR == 0, case
            assert math.prod(ours) <= most, case
            assert ours[0] == ours[1] or (ours[0] > ours[1]) == (height > width), case
            broken += 1
    assert valid > 4000
    assert broken > 100
    assert refused > 100


def test_smart_resize_written_by_hand():
    assert vision.smart_resize(224, 224, FACTOR, 3136, 1003520) == (224, 224)
    assert vision.smart_resize(1080, 1920, FACTOR, 3136, 1003520) == (728, 1316)  # 1.3 of 1.0035 megapixels, 16:9
    assert vision.smart_resize(10, 10, FACTOR, 3136, 1003520) == (56, 56)
    assert vision.smart_resize(42, 70, FACTOR, 784, 1003520) == (56, 56)  # 1.5 and 2.5 round to even numbers
    assert vision.smart_resize(28, 5600, FACTOR, 784, 3136) == (28, 112)  # qwen-vl-utils: (0, 784)


# ---- pixel budgets ---------------------------------------------------------------------------------------------------


def test_image_sizes_equal_fetch_image():
    """Random items under a budget given to both."""
    rng, seen = random.Random(1), 0
    while seen < 400:
        height, width = log_uniform(rng, 30, 4000), log_uniform(rng, 30, 4000)
        item = image_item("a.png")
        least = TOKEN * log_uniform(rng, 1, 300)
        if rng.random() < 0.8:
            item["min_pixels"], item["max_pixels"] = least, TOKEN * 1 + least * rng.randint(1, 20)
        if rng.random() < 0.3:
            item["resized_height"], item["resized_width"] = log_uniform(rng, 20, 3000), log_uniform(rng, 20, 3000)
        theirs = {k: v for k, v in item.items() if k != "type"}
        theirs.setdefault("min_pixels", 3136)
        theirs.setdefault("max_pixels", 1003520)
        size = fetched_image_size(theirs, height, width)
        if size is None or min(size) < FACTOR:
            continue
        assert vision.image_size(item, height, width, Budget()) == size, f"{item} of {height}x{width}"
        seen += 1


def fetched_image_size(item: dict, height: int, width: int) -> tuple[int, int] | None:
    """The size that qwen-vl-utils gives an image: its fetch_image on a picture that is resized in name only."""

    class Picture(Image.Image):
        def __init__(self) -> None:
            super().__init__()
            self._size = (width, height)

        def convert(self, mode):
            return self

        def resize(self, size):
            return size

    try:
        size = vision_process.fetch_image({**item, "image": Picture()})
    except ValueError:  # an aspect ratio above 200
        return None
    return size[::-1]


def test_budget_of_images_written_by_hand():
    """(height, width) of a 1000 x 1000 image under each way to set its pixels; what is closer to the item wins."""

    def size(budget: Budget = Budget(), **keys) -> tuple[int, int]:
        return vision.image_size(image_item("a.png", **keys), 1000, 1000, budget)

    assert size() == (980, 980)  # at most 1,003,520 pixels by default: 1001 is the side
    assert size(Budget(max_pixels=200704)) == (448, 448)
    assert size(Budget(max_pixels=200704), max_pixels=50176) == (224, 224)
    assert size(Budget(max_pixels=50176), max_pixels=200704) == (448, 448)
    assert size(Budget(min_pixels=2007040)) == (1428, 1428), "more than the default most, which makes way"
    assert size(min_pixels=2007040) == (1428, 1428)
    assert size(Budget(min_pixels=2007040), max_pixels=50176) == (224, 224), "an item's most beats the budget's least"
    assert size(Budget(max_pixels=50176), min_pixels=200704) == (448, 448), "an item's least beats the budget's most"
    assert size(Budget(max_pixels=784)) == (28, 28), "below the default least, which makes way"
    assert size(resized_height=100, resized_width=300) == (112, 308)
    assert size(Budget(max_pixels=784), resized_height=100, resized_width=300) == (112, 308)
    assert vision.image_size(image_item("a.png"), 20, 20, Budget()) == (56, 56), "3,136 pixels at least by default"
    assert vision.image_size(image_item("a.png"), 20, 20, Budget(min_pixels=784)) == (28, 28)


def test_budget_of_frames_written_by_hand():
    """(height, width) of the frames of a 1000 x 1000 video with 4 frames."""

    def size(budget: Budget = UNCAPPED, frames: int = 4, **keys) -> tuple[int, int]:
        return vision.frame_size(video_item(**keys), 1000, 1000, frames, budget)[0]

    def given(**settings) -> Budget:
        return Budget(video_max_tokens=10**9, **settings)

    assert size() == (756, 756), "602,112 pixels at most by default: 775 is the side"
    assert size(given(max_pixels=200704)) == (448, 448)
    assert size(given(max_pixels=200704), max_pixels=50176) == (224, 224)
    assert size(given(max_pixels=50176), max_pixels=200704) == (448, 448)
    assert size(total_pixels=2 * 200704) == (448, 448), "4 frames share it two by two"
    assert size(frames=768) == (476, 476), "0.9 x 128,000 tokens for 768 frames: 235,200 pixels each, 484 is the side"
    assert size(resized_height=100, resized_width=300) == (112, 308)
    small = vision.frame_size(video_item(), 20, 20, 4, UNCAPPED)[0]
    assert small == (336, 336), "100,352 pixels at least by default: 316 is the side"
    assert vision.frame_size(video_item(), 20, 20, 4, given(min_pixels=3136))[0] == (56, 56)
    assert vision.frame_size(video_item(min_pixels=3136), 20, 20, 4, UNCAPPED)[0] == (56, 56)


def test_budget_is_written_into_the_processor(tiny_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_path)
    set_budget(processor, Budget(min_pixels=50176, max_pixels=200704))
    processor.save_pretrained(tiny_path.parent / "budget")
    loaded = AutoProcessor.from_pretrained(tiny_path.parent / "budget")
    for part in (loaded.image_processor, loaded.video_processor):
        assert (part.size["shortest_edge"], part.size["longest_edge"]) == (50176, 200704)
    set_budget(processor, Budget())
    assert (processor.image_processor.size["shortest_edge"], processor.image_processor.size["longest_edge"]) == (
        3136,
        1003520,
    )
    assert (processor.video_processor.size["shortest_edge"], processor.video_processor.size["longest_edge"]) == (
        100352,
        602112,
    )


def test_budget_comes_from_a_config_or_its_file():
    config = Config(min_pixels=784, max_pixels=3136, video_fps=1.5, video_max_frames=10, video_max_tokens=99)
    wanted = Budget(784, 3136, 1.5, 10, 99)
    assert Budget.of(config, "qwen2_vl") == wanted
    assert Budget.of(json.loads(json.dumps(vars(config))), "qwen2_vl") == wanted


# ---- which frames ----------------------------------------------------------------------------------------------------


def their_plan(monkeypatch, item: dict, clip: Clip) -> tuple[list[int], tuple[int, int]] | None:
    """Frame indices and frame size by qwen-vl-utils' own fetch_video; None where it refuses.

    Only reading and resizing are replaced: the reader picks frames as its torchcodec and decord readers do.
    """
    indices = []

    def read(ele: dict) -> tuple[torch.Tensor, dict, float]:
        first, last, total = vision_process.calculate_video_frame_range(ele, len(clip), clip.average_fps)
        frames = vision_process.smart_nframes(ele, total_frames=total, video_fps=clip.average_fps)
        indices.extend(torch.linspace(first, last, frames).round().long().tolist())
        return torch.zeros(1, 1, 1, 1).expand(frames, 3, clip.height, clip.width), {}, 2.0

    class Readers(dict):
        def __missing__(self, name):
            raise KeyError(name)

    with monkeypatch.context() as patch:
        patch.setattr(vision_process, "get_video_reader_backend", lambda: "test")
        patch.setattr(vision_process, "VIDEO_READER_BACKENDS", Readers(test=read, torchvision=read))
        patch.setattr(vision_process.logger, "warning", lambda *_: None)
        patch.setattr(
            vision_process.transforms.functional, "resize", lambda video, size, **_: torch.empty(size, device="meta")
        )
        try:
            size = tuple(vision_process.fetch_video(item).shape)
        except (ValueError, AssertionError):
            return None
    return indices, size


def sizes_of(item: dict, clip: Clip, budget: Budget) -> tuple[list[int], tuple[int, int], bool]:
    """The frames that plan_video chooses, their height and width, and whether the budget cut them down."""
    indices, grid = vision.plan_video(item, clip, budget)
    return indices, vision.size_of(grid, budget), grid.capped


def our_plan(item: dict, clip: Clip, budget: Budget) -> tuple[tuple | None, str]:
    """What plan_video answers, or why it refuses."""
    try:
        return sizes_of(item, clip, budget), ""
    except ValueError as error:
        return None, str(error)


def random_item(rng: random.Random, clip: Clip) -> dict:
    item, seconds = video_item(), len(clip) / clip.average_fps
    if rng.random() < 0.3:
        item["nframes"] = rng.choice([rng.randint(1, len(clip) + 4), rng.uniform(1, len(clip))])
    elif rng.random() < 0.5:
        item["fps"] = rng.choice([0.1, 0.5, 1, 2, 3.7, 30, 100])
    for key, most in (("min_frames", 20), ("max_frames", 200)):
        if rng.random() < 0.25:
            item[key] = rng.randint(1, most)
    if rng.random() < 0.3:
        item["video_start"] = rng.choice([0, 0.5, rng.uniform(0, seconds)])
    if rng.random() < 0.3:
        item["video_end"] = rng.choice([seconds, rng.uniform(0, seconds), seconds + 1])
    return item


def test_frames_are_those_of_qwen_vl_utils(monkeypatch):
    """Random clips and keys, wherever qwen-vl-utils has an answer; where it has none, ours is sane or a refusal."""
    rng, equal, ours_alone, refused = random.Random(2), 0, 0, 0
    for _ in range(2500):
        clip = Clip(log_uniform(rng, 1, 3000), rng.choice([1, 10, 24, 25, 30, 60, float(Fraction(30000, 1001)), 7.3]))
        item = random_item(rng, clip)
        case = f"{item} of {len(clip)} frames at {clip.average_fps}"
        theirs = their_plan(monkeypatch, item, clip)
        plan, refusal = our_plan(item, clip, UNCAPPED)
        if refusal:
            assert theirs is None, f"{case}: refused"
            assert "holds no two frames" in refusal, case
            refused += 1
            continue
        indices, size, capped = plan
        if theirs is None:
            assert len(indices) % 2 == 0, case
            assert len(indices) >= 2, case
            assert indices == sorted(indices), case
            assert 0 <= indices[0] <= indices[-1] < len(clip), case
            ours_alone += 1
            continue
        assert indices == theirs[0], case
        assert size == theirs[1], case
        assert not capped, case
        equal += 1
    assert equal > 1500
    assert ours_alone > 100
    assert refused > 20


class Decoder:
    """Stands in for torchcodec.decoders.VideoDecoder, with which qwen-vl-utils reads a video: PyAV decodes it whole.

    Frames per second are torchcodec's: all frames over the time from the first one's begin to the last one's end. (For
    the files here and six real ones torchcodec 0.17 itself gave the same over the FFmpeg of PyAV.)
    """

    def __init__(self, path: str, num_ffmpeg_threads: int = 1) -> None:
        with av.open(path) as container:
            decoded = sorted(container.decode(video=0), key=lambda frame: frame.pts)
            self.frames = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded])
        with av.open(path) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            end = max(packet.pts + packet.duration for packet in packets)
            seconds = float((end - decoded[0].pts) * packets[0].time_base)
        self.metadata = SimpleNamespace(num_frames=len(decoded), average_fps=len(decoded) / seconds)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=self.frames[indices].permute(0, 3, 1, 2))


CLIPS = {  # and when their frames come, in tenths of a second
    "even.mp4": odd_media.EVEN,
    "gap.mp4": odd_media.GAP,
    "gap.mkv": odd_media.GAP,
    "slow_then_quick.mp4": [0, 10, 20, 30, 31, 32, 33, 34, 35],
    "at_60_s.mkv": [600 + time for time in odd_media.GAP],
}


@pytest.mark.parametrize("name", [*CLIPS, "vfr.mp4"])
def test_frames_of_files_are_those_of_qwen_vl_utils(name, tmp_path, monkeypatch):
    """Of a variable rate, too: its own fetch_video, with the reader that it prefers."""
    path = Path(__file__).resolve().parents[2] / "shared" / "cases" / "media" / name
    if name in CLIPS:
        path = odd_media.clip(name, CLIPS[name])(tmp_path)["video"]
    elif not path.exists():
        pytest.skip("the case is not here")
    module = types.ModuleType("torchcodec.decoders")
    module.VideoDecoder = Decoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "torchcodec")
    theirs, metadata = vision_process.fetch_video({"type": "video", "video": str(path)}, return_video_metadata=True)
    item = video_item(str(path))
    with vision.open_video(item) as video:
        indices = vision.plan_video(item, video, UNCAPPED)[0]
        rate = video.average_fps
        assert indices == metadata["frames_indices"]
        assert rate == pytest.approx(metadata["fps"])
        assert (rate < 6) == (name != "even.mp4"), "most come at 10 a second or more, and some a second apart"
        frames = torch.stack(list(video.frames_at(indices)))
    whole, _, _ = vision_process._read_video_torchcodec({"video": str(path)})
    assert torch.equal(frames, whole), "before they are resized, bit for bit"
    ours = vision.frames_of(vision.load(item, UNCAPPED))
    assert ours.shape == theirs.shape
    # They resize in float32, we in uint8, which is rounded between rows and columns: hard edges are a few levels apart.
    assert ((ours.int() - theirs.int()).abs() > 2).float().mean() < 0.001


def test_frame_sizes_are_those_of_qwen_vl_utils(monkeypatch):
    rng, equal = random.Random(3), 0
    for _ in range(1500):
        clip = Clip(log_uniform(rng, 4, 5000), 25.0, log_uniform(rng, 30, 3000), log_uniform(rng, 30, 3000))
        item = video_item()
        if rng.random() < 0.3:
            item["min_pixels"] = TOKEN * log_uniform(rng, 4, 760)
        if rng.random() < 0.3:
            item["max_pixels"] = max(item.get("min_pixels", 100352), TOKEN * log_uniform(rng, 16, 2000))
        if rng.random() < 0.3:
            item["total_pixels"] = TOKEN * log_uniform(rng, 100, 200000)
        if rng.random() < 0.15:
            item["resized_height"], item["resized_width"] = log_uniform(rng, 20, 3000), log_uniform(rng, 20, 3000)
        theirs = their_plan(monkeypatch, item, clip)
        if theirs is None or min(theirs[1]) < FACTOR:
            continue
        indices, size, capped = sizes_of(item, clip, UNCAPPED)
        case = f"{item} of {len(clip)} frames {clip.height}x{clip.width}"
        assert (indices, size) == theirs, case
        assert not capped, case
        equal += 1
    assert equal > 1000


def test_min_pixels_of_a_video_above_the_default_most(monkeypatch):
    """qwen-vl-utils then allows 1.05 times as many."""
    item, clip = video_item(min_pixels=700000), Clip(100, 25.0, 1080, 1920)
    assert their_plan(monkeypatch, item, clip)[1] == (616, 1120)
    assert sizes_of(item, clip, UNCAPPED)[1] == (616, 1120)


def test_min_pixels_of_a_video_above_the_budgets_most():
    """The item's own key comes before the budget, as with an image."""
    budget = Budget(max_pixels=50176, video_max_tokens=10**9)
    size, capped = vision.frame_size(video_item(min_pixels=200704), 1000, 1000, 4, budget)
    assert vision.image_size(image_item("a.png", min_pixels=200704), 1000, 1000, budget) == (448, 448)
    assert (size, capped) == ((448, 448), False)


def test_frames_written_by_hand():
    def indices(frames: int, rate: float, budget: Budget = UNCAPPED, **keys) -> list[int]:
        return vision.plan_video(video_item(**keys), Clip(frames, rate), budget)[0]

    def given(**settings) -> Budget:
        return Budget(video_max_tokens=10**9, **settings)

    assert indices(25, 10) == [0, 8, 16, 24], "2.5 s at 2 per second are 5 frames, 4 in an even number"
    assert indices(25, 10, nframes=2) == [0, 24]
    assert indices(25, 10, fps=4) == [0, 3, 5, 8, 11, 13, 16, 19, 21, 24]
    assert indices(25, 10, given(video_fps=4)) == indices(25, 10, fps=4)
    assert indices(25, 10, given(video_fps=4), fps=2) == indices(25, 10)
    assert indices(100, 10, min_frames=30)[:4] == [0, 3, 7, 10], "3.41 apart"
    assert len(indices(100, 10, max_frames=7)) == 6
    assert len(indices(100, 10, given(video_max_frames=8))) == 8
    assert len(indices(100, 10, given(video_max_frames=8), max_frames=12)) == 12
    assert indices(100, 10, video_start=2, video_end=3.05) == [20, 23, 27, 30]
    assert len(indices(100000, 25)) == 768, "at most, by default"
    # where qwen-vl-utils raises
    assert indices(1, 25) == [0, 0], "one frame counts twice"
    assert indices(1, 25, nframes=8) == [0, 0]
    assert indices(3, 25) == [0, 2], "an even number of 3 frames"
    assert indices(25, 10, nframes=4, fps=10) == [0, 8, 16, 24], "nframes comes before fps"
    assert indices(6, 25, nframes=100) == [0, 1, 2, 3, 4, 5], "more than there are"
    assert indices(6, 25, nframes=1) == [0, 5]
    assert indices(6, 25, max_frames=1) == [0, 5]


@pytest.mark.parametrize("keys", [{"video_start": 5}, {"video_start": 2, "video_end": 1}, {"video_end": 0}])
def test_a_stretch_without_frames_is_refused_by_name(keys):
    with pytest.raises(
        ValueError, match=r"clip\.mp4: video_start .* to video_end .* holds no two frames of its 2\.50 "
    ):
        vision.plan_video(video_item(**keys), Clip(25, 10), UNCAPPED)


def test_no_video_costs_more_than_video_max_tokens():
    """Whatever its size, length and keys; and one that was cut down says so, and only such a one."""
    rng, cut, whole = random.Random(4), 0, 0
    for _ in range(3000):
        clip = Clip(log_uniform(rng, 1, 20000), rng.choice([1, 25, 60.0]), *(log_uniform(rng, 40, 4000) for _ in "hw"))
        item = random_item(rng, clip)
        for key, most in (("min_pixels", 4e6), ("max_pixels", 4e6), ("total_pixels", 1e9)):
            if rng.random() < 0.2:
                item[key] = log_uniform(rng, 100, most)
        if rng.random() < 0.1:
            item["resized_height"], item["resized_width"] = log_uniform(rng, 20, 3000), log_uniform(rng, 20, 3000)
        if rng.random() < 0.1:
            item["video"] = [f"{number}.png" for number in range(len(clip))]
        tokens = rng.choice([1, 3, 17, 100, 1000, 16384])
        case = f"{item if len(item['video']) < 20 else 'frames'} of {len(clip)} {clip.height}x{clip.width}, {tokens=}"
        plan, refusal = our_plan(item, clip, Budget(video_max_tokens=tokens))
        if refusal:
            assert "holds no two frames" in refusal or "times the other" in refusal, case
            continue
        (indices, size, capped), wanted = plan, sizes_of(item, clip, UNCAPPED)
        assert len(indices) % 2 == 0, case
        assert min(size) >= FACTOR, case
        assert size[0] % FACTOR == size[1] % FACTOR == 0, case
        assert len(indices) // 2 * math.prod(size) // TOKEN <= tokens, case
        assert capped == ((indices, size) != wanted[:2]), case
        cut, whole = cut + capped, whole + (not capped)
    assert cut > 500
    assert whole > 500


# ---- from the file's header alone ------------------------------------------------------------------------------------


def test_read_grid_is_the_grid_of_load(picture, write_video, tmp_path):
    photo = Image.fromarray(picture(333, 500))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=turned)
    photo.save(tmp_path / "photo.jpg")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    photo.convert("P").save(tmp_path / "palette.gif")
    photo.save(tmp_path / "photo.webp")
    clip = write_video(tmp_path / "clip.mp4", [picture(90, 120, seed) for seed in range(31)], Fraction(30000, 1001))
    still = write_video(tmp_path / "still.mp4", [picture(90, 120)], 25)
    mkv = write_video(tmp_path / "clip.mkv", [picture(64, 48, seed) for seed in range(13)], 5)
    frames = [str(tmp_path / "photo.jpg"), str(tmp_path / "photo.jpg"), str(tmp_path / "photo.webp")]
    small = Budget(max_pixels=50176)
    cases = [
        *((image_item(tmp_path / name), budget) for name in ("turned.jpg", "photo.jpg", "alpha.png", "palette.gif",
          "photo.webp") for budget in (Budget(), small)),
        (image_item(tmp_path / "photo.jpg", resized_height=60, resized_width=90), small),
        (image_item(tmp_path / "photo.jpg", max_pixels=6000), small),
        (video_item(clip), small),
        (video_item(clip, nframes=6, max_pixels=6000), small),
        (video_item(clip, video_start=0.2, video_end=0.8, fps=20), small),
        (video_item(clip, fps=30), Budget(video_max_tokens=20)),
        (video_item(still), small),
        (video_item(mkv), small),
        (video_item(frames), small),
        (video_item(frames), Budget(video_max_tokens=1)),
    ]  # fmt: skip
    seen = set()
    for item, budget in cases:
        medium = vision.load(item, budget)
        assert vision.read_grid(item, budget) == medium.grid, item
        assert len(medium.patches) == medium.grid.patches, item
        assert medium.is_video == (item["type"] == "video"), item
        seen.add(medium.grid)
    assert len(seen) > 8, "the cases differ"
    assert vision.read_grid(video_item(still), small).t == 1
    assert vision.read_grid(video_item(clip, fps=30), Budget(video_max_tokens=20)).capped
    assert vision.read_grid(video_item(clip, fps=30), Budget(video_max_tokens=20)).tokens <= 20


def test_each_key_changes_the_frames_that_are_loaded(picture, write_video, decode_all, tmp_path):
    """The frames themselves, not only their number: from the file against the frames PyAV decodes."""
    path = write_video(tmp_path / "a.mp4", [picture(56, 84, seed) for seed in range(40)], 10)
    decoded = decode_all(path)
    budget = Budget(min_pixels=3136)
    for keys, wanted in (
        ({}, [0, 6, 11, 17, 22, 28, 33, 39]),
        ({"nframes": 4}, [0, 13, 26, 39]),
        ({"fps": 1}, [0, 13, 26, 39]),
        ({"fps": 1, "min_frames": 6}, [0, 8, 16, 23, 31, 39]),
        ({"max_frames": 2}, [0, 39]),
        ({"video_start": 3}, [30, 33, 36, 39]),
        ({"video_end": 1}, [0, 3, 7, 10]),
    ):
        assert (unpatchify(vision.load(video_item(path, **keys), budget)) == decoded[wanted]).all(), keys


def test_not_a_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    for function in (vision.load, vision.read_grid):
        with pytest.raises(ValueError, match=r"a\.mp4"):
            function(video_item(str(tmp_path / "a.mp4")), Budget())


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_shape_that_cannot_be_resized_is_named(kind, tmp_path):
    path = write_png(tmp_path / "long.png", np.zeros((2, 500, 3), np.uint8))
    item = image_item(path) if kind == "image" else video_item([path])
    for function in (vision.load, vision.read_grid):
        with pytest.raises(ValueError, match="one side is more than 200 times the other") as error:
            function(item, Budget())
        assert "long.png" in str(error.value), "which file?"


# ---- photos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(64, 48), (333, 501), (1, 7)])
def test_a_photo_is_what_pil_makes_of_it(size, subsampling, progressive, picture, tmp_path):
    from util.data import jpeg

    path = tmp_path / "a.jpg"
    Image.fromarray(picture(*size)).save(path, quality=87, subsampling=subsampling, progressive=progressive)
    with Image.open(path) as image:
        pixels = jpeg.decode(image)
        assert pixels is not None, "torchvision's decoder is not used"
        assert (pixels.permute(1, 2, 0).numpy() == np.asarray(image.convert("RGB"))).all()


def test_what_torchvision_would_read_otherwise_is_left_to_pil(picture, tmp_path):
    from util.data import jpeg

    pixels = picture(96, 64)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.jpg")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("cut.jpg", "grey.jpg", "cmyk.jpg", "a.png"):
        with Image.open(tmp_path / name) as image:
            assert jpeg.decode(image) is None, name
    with pytest.raises(ValueError, match=r"cut\.jpg: not a readable image"):
        vision.load(image_item(tmp_path / "cut.jpg"), Budget())
