"""An image or a video -> uint8 patches within its pixel and token budget, and the grid they lie on.

Sizes and frame choices follow qwen-vl-utils (vision_process.py: smart_resize, smart_nframes, fetch_video), so that
training sees what inference sees. Each frame is resized once and stays uint8 until it is on the device.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as transforms

from util.data import depth, jpeg, looks_like, whole
from util.data.boxes import Scale
from util.data.video_reader import VideoReader
from util.family import FAMILIES, QWEN2_VL, Family

MERGE = 2  # MERGE x MERGE patches become one token
TEMPORAL = 2  # frames per temporal patch
# In tokens, whose size in pixels is the family's:
IMAGE_TOKENS = (4, 1280)  # default budget of an image
FRAME_TOKENS = (128, 768)  # default budget of a video frame
TOTAL_TOKENS = 0.9 * 128000  # default budget of a video, before video_max_tokens
RESIZED_TOKENS = (4, 16384)  # what an item may ask for by resized_*
MOST_ASPECT = 200
MOST_IMAGE_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # 178,956,970: above it Pillow refuses, here and at inference
# These hold several pictures in one file as a rule, and the first one is seen. (A phone's MPO holds a photo and what
# belongs to it.)
SEVERAL_PICTURES = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
SAME_SHAPE = 0.02  # by how much the shapes of a video's frames may differ: what scaling by whole pixels rounds


class Grid(NamedTuple):
    """Patches along time, height and width; time counts pairs of frames, and is 1 for an image."""

    t: int
    h: int
    w: int
    capped: bool = False  # a video that --video_max_tokens made smaller or shorter
    cut: bool = False  # a video whose file ends before its time: what is there is read
    deep: bool = False  # an image that is not of 8 bits (data/depth.py)
    first: bool = False  # an image whose file holds several: the first one is seen
    step: float = 1.0  # of the time axis, from one pair of frames to the next (Qwen2.5-VL: in half seconds)
    times: tuple[float, ...] = ()  # seconds, the middle of each pair of frames, where the text names them (Qwen3-VL)

    @property
    def numbers(self) -> tuple:
        """What a table of sizes keeps of it: all but where its frames stand in time."""
        return self[:NUMBERS]

    @property
    def places(self) -> list["Grid"]:
        """What stands together in the text: the medium, or each of its pairs of frames by itself, after its time."""
        return [Grid(1, self.h, self.w)] * self.t if self.times else [self]

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    @property
    def tokens(self) -> int:
        return self.patches // MERGE**2


NUMBERS = Grid._fields.index("step")  # of a grid, that come before where its frames stand in time


@dataclass
class Medium:
    """The pixels of one image or video, or what a frozen tower once made of them (data/features.py)."""

    # uint8: (P, 3 channels x patch x patch) of an image, or twice as wide of a video, whose patches span 2 frames
    patches: torch.Tensor  # none of them, (0, 0), where there are features
    grid: Grid
    is_video: bool
    features: torch.Tensor | None = None  # (P, width of the tower), or (V, D) behind the merger
    key: str = ""  # FrameCache.key, by which what the tower makes of the pixels may be kept; "": it must not be


@dataclass(frozen=True)
class Budget:
    """How many pixels, frames and tokens a medium may cost; an item's own keys come before these."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_fps: float = 2.0
    video_max_frames: int = 768
    video_max_tokens: int = 16384
    cap_pixels: int = 2**53  # a hard cap per image or frame, which --on_long_sample shrink sets per sample
    model_type: str = QWEN2_VL  # a key of FAMILIES

    @classmethod
    def of(cls, config, model_type: str) -> "Budget":
        """The budget in a Config or in the training_config.json of a run, for a model of that `model_type`."""
        values = config if isinstance(config, dict) else vars(config)
        names = [field.name for field in fields(cls) if field.name not in ("cap_pixels", "model_type")]
        return cls(**{name: values[name] for name in names}, model_type=model_type)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def factor(self) -> int:
        """Sides of images are multiples of this many pixels, the side of a token."""
        return self.family.patch * MERGE

    @property
    def token_pixels(self) -> int:
        return self.factor**2

    def pixels(self, default: tuple[int, int]) -> tuple[int, int]:
        """(fewest, most) pixels of an image or frame, `default` in tokens. A limit that is given pushes the other one's
        default aside."""
        least = self.min_pixels or default[0] * self.token_pixels
        most = self.max_pixels or default[1] * self.token_pixels
        if self.max_pixels is None:
            return least, max(least, most)
        return min(least, most), most


def load(item: dict, budget: Budget) -> Medium:
    """Decode, resize and cut into patches one image or video item. Raises ValueError that names the file."""
    if item["type"] == "image":
        image = open_image(item["image"])
        grid = image_grid(item, image, budget)
        pixels = resize(to_tensor(image, item["image"]), size_of(grid, budget))
        return patchify([pixels], grid, budget.family.patch, frames_per_patch=1)
    with open_video(item) as video:
        indices, grid = plan_video(item, video, budget)
        # One frame at a time: a full one is gone before the next is decoded.
        frames = (resize(frame, size_of(grid, budget)) for frame in video.frames_at(indices))
        return patchify(frames, grid, budget.family.patch, frames_per_patch=TEMPORAL)


def read_grid(item: dict, budget: Budget) -> Grid:
    """The grid that `load` will give, from the file's header and its end alone.

    Raises ValueError that names the file, also for an image whose end is missing, one that would be seen nearly black,
    and for frames of several shapes.
    """
    if item["type"] == "image":
        return image_grid(item, open_whole_image(item["image"]), budget)
    with open_video(item) as video:
        _, grid = plan_video(item, video, budget)
        if isinstance(video, FrameList):
            video.check()
    return grid


def image_grid(item: dict, image: Image.Image, budget: Budget) -> Grid:
    """The grid of an opened image, and what is to be said of its file."""
    grid = named(plain_image_grid, item, image.height, image.width, budget)
    is_first = image.format in SEVERAL_PICTURES and getattr(image, "is_animated", False)
    return grid._replace(deep=bool(image.info["depth"]), first=is_first)


def plain_image_grid(item: dict, height: int, width: int, budget: Budget) -> Grid:
    """The grid of an image of which the size is known alone."""
    height, width = image_size(item, height, width, budget)
    return Grid(1, height // budget.family.patch, width // budget.family.patch)


def size_of(grid: Grid, budget: Budget) -> tuple[int, int]:
    """Height and width, in pixels, of the images or frames that a grid is of."""
    return grid.h * budget.family.patch, grid.w * budget.family.patch


def box_scale(item: dict, width: int, height: int, budget: Budget) -> Scale:
    """In what the text counts boxes in an image item, which is that wide and high as people see it, in pixels."""
    if budget.family.boxes != "pixels":
        return Scale(width, height, budget.family.boxes)
    rows, columns = size_of(named(plain_image_grid, item, height, width, budget), budget)
    return Scale(width, height, budget.family.boxes, columns, rows)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def smart_resize(height: float, width: float, factor: int, least: float, most: float) -> tuple[int, int]:
    """Height and width in multiples of `factor`, the product within [least, most] pixels, the aspect ratio kept.

    The rule of qwen-vl-utils, with two fixes: no side becomes 0, and `most` holds for narrow pictures, too.
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MOST_ASPECT} times the other; crop it")
    # The nearest multiples, and only where these are too many or too few pixels is the picture scaled.
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > most:
        scale = math.sqrt(height * width / most)
        # Downwards, so that `most` holds; a side of a narrow picture stays `factor` all the same.
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
        # Where one side could not become smaller, the other has to: qwen-vl-utils goes above `most` here.
        longest = max(factor, math.floor(most / factor / factor) * factor)
        if new_height * new_width > most:
            new_height = min(new_height, longest)
            new_width = min(new_width, longest)
    elif new_height * new_width < least:
        scale = math.sqrt(least / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def image_size(item: dict, height: int, width: int, budget: Budget) -> tuple[int, int]:
    """The size an image is resized to: its item's `resized_*`, else its item's or the budget's pixel limits."""
    if "resized_height" in item:
        height = item["resized_height"]
        width = item["resized_width"]
        least, most = resized_pixels(budget)
    else:
        least, most = budget.pixels(IMAGE_TOKENS)
        least = item.get("min_pixels", least)
        # An item that asks for more pixels than the budget's most, and names no most of its own, moves it.
        most = item.get("max_pixels", max(most, item.get("min_pixels", 0)))
    most = min(most, budget.cap_pixels)
    return smart_resize(height, width, budget.factor, min(least, most), most)


def resized_pixels(budget: Budget) -> tuple[int, int]:
    """(fewest, most) pixels that an item may ask for by resized_*."""
    return RESIZED_TOKENS[0] * budget.token_pixels, RESIZED_TOKENS[1] * budget.token_pixels


def frame_size(item: dict, height: int, width: int, frames: int, budget: Budget) -> tuple[tuple[int, int], bool]:
    """The size of a video's frames, and whether --video_max_tokens made it smaller. `frames` is even."""
    asked = height, width
    if "resized_height" in item:
        asked = item["resized_height"], item["resized_width"]
        height, width = smart_resize(*asked, budget.factor, *resized_pixels(budget))
    else:
        least, most = frame_limits(item, frames, budget)
        height, width = smart_resize(*asked, budget.factor, min(least, most), most)
    # All pairs of frames together may cost `video_max_tokens`; this cap beats whatever was asked for.
    cap = budget.video_max_tokens * budget.token_pixels * TEMPORAL // frames
    is_capped = height * width > cap
    cap = min(cap, budget.cap_pixels)
    if height * width > cap:
        # Qwen3-VL's processor resizes once, and a size that is rounded twice would often be another one.
        asked = asked if budget.family.counts_all_frames else (height, width)
        height, width = smart_resize(*asked, budget.factor, 0, cap)
    return (height, width), is_capped


def frame_limits(item: dict, frames: int, budget: Budget) -> tuple[float, float]:
    """(fewest, most) pixels of each of a video's frames, by qwen-vl-utils' rule (fetch_video).

    The video's total is shared by its pairs of frames; the limit of a frame is never below 1.05 times its fewest.
    """
    least = item.get("min_pixels", budget.pixels(FRAME_TOKENS)[0])
    share = item.get("total_pixels", TOTAL_TOKENS * budget.token_pixels) / frames * TEMPORAL
    limit = max(min(FRAME_TOKENS[1] * budget.token_pixels, share), int(least * 1.05))
    wanted = item.get("max_pixels", max(budget.max_pixels or limit, item.get("min_pixels", 0)))
    return least, min(wanted, limit)


def plan_video(item: dict, video, budget: Budget) -> tuple[list[int], Grid]:
    """Which frames of a video (or of what stands for its header) are read, and their grid."""
    first, last = frame_range(item, len(video), video.average_fps)
    is_list = isinstance(item["video"], list)
    if is_list:  # chosen by hand: every one is wanted, the last twice where their number is odd
        frames = math.ceil(len(video) / TEMPORAL) * TEMPORAL
    else:
        frames = frame_count(item, last - first + 1, video.average_fps, budget)
    most_frames = max(1, budget.video_max_tokens) * TEMPORAL  # a pair of frames costs a token at least
    taken = min(frames, most_frames)
    size, is_capped = named(frame_size, item, video.height, video.width, taken, budget)
    if is_list and frames <= most_frames:
        indices = list(range(len(video))) + [len(video) - 1] * (frames - len(video))
    else:
        indices = torch.linspace(first, last, taken).round().long().tolist()
    patch = budget.family.patch
    grid = Grid(
        taken // TEMPORAL,
        size[0] // patch,
        size[1] // patch,
        capped=is_capped or frames > most_frames,
        cut=bool(video.missing),
        deep=getattr(video, "is_deep", False),  # of a list of frames
    )
    # The last one of an odd list stands for the one after it, as qwen-vl-utils has it.
    moments = list(range(frames)) if is_list and frames <= most_frames else indices
    span = max(last - first + 1, taken)  # a single frame is taken twice
    clock = item.get("raw_fps", video.average_fps)  # `raw_fps` stands beside a list of frames alone
    return indices, in_time(grid, moments, span / video.average_fps, clock, budget.family)


def in_time(grid: Grid, moments: list[int], seconds: float, fps: float, family: Family) -> Grid:
    """A video's grid with what its family says of time. `moments`: the frames that are taken, by their place in the
    file, of which there are `fps` in a second; `seconds`: how long that is of which they are taken.

    Qwen2.5-VL's time axis goes on by the mean distance of two pairs of frames (qwen-vl-utils' `fps` of a video, and
    `second_per_grid_ts` of its processor). Qwen3-VL is told the middle of each pair (`_calculate_timestamps` of its
    processor).
    """
    if family.tokens_per_second:
        return grid._replace(step=family.tokens_per_second * seconds * TEMPORAL / len(moments))
    if family.timestamps:
        pairs = zip(moments[::TEMPORAL], moments[1::TEMPORAL], strict=True)
        # Each divided by itself, as the release does: times are written with one digit, and halves of it would be
        # rounded otherwise.
        return grid._replace(times=tuple([(one / fps + other / fps) / 2 for one, other in pairs]))
    return grid


def named(size_of: Callable, item: dict, *arguments):
    """A size, or the ValueError of one that cannot be, with the file's name."""
    try:
        return size_of(item, *arguments)
    except ValueError as error:
        raise ValueError(f"{item[item['type']]}: {error}") from None


def frame_range(item: dict, total: int, fps: float) -> tuple[int, int]:
    """First and last frame between `video_start` and `video_end` (seconds), both included."""
    first = 0
    last = total - 1
    if "video_start" in item:
        first = math.ceil(min(item["video_start"], total / fps) * fps)
    if "video_end" in item:
        last = min(math.floor(item["video_end"] * fps), last)
    if first > last or (first == last and total > 1):
        raise ValueError(
            f"{item['video']}: video_start {item.get('video_start', 0)} to video_end {item.get('video_end', 'end')} "
            f"holds no two frames of its {total / fps:.2f} seconds"
        )
    return first, last


def frame_count(item: dict, total: int, fps: float, budget: Budget) -> int:
    """How many of `total` frames are sampled: an even number. `nframes` comes before `fps`; one frame counts twice."""
    if total == 1:
        return TEMPORAL
    if "nframes" in item:
        wanted = round(item["nframes"] / TEMPORAL) * TEMPORAL
    else:
        least = math.ceil(item.get("min_frames", 4) / TEMPORAL) * TEMPORAL
        most = item.get("max_frames", min(budget.video_max_frames, total))
        most = math.floor(most / TEMPORAL) * TEMPORAL
        by_time = total / fps * item.get("fps", budget.video_fps)
        wanted = min(max(by_time, least), most)
    return max(TEMPORAL, math.floor(min(wanted, total) / TEMPORAL) * TEMPORAL)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def open_image(path: str) -> Image.Image:
    """An image whose header is read and whose EXIF orientation is applied (its pixels are decoded when needed).

    Its `info["depth"]` says in words how it is stored, "" for 8 bits.
    """
    try:
        with warnings.catch_warnings():
            # From half of its limit on Pillow warns of each image, without its name; a photo of 100 megapixels is fine.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(path)
        image.info["depth"] = depth.depth_of(image)  # after turning it, or decoding, nothing tells it any more
        # Asking a PNG without EXIF for it would decode all its pixels.
        exif_keys = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
        may_be_turned = image.format != "PNG" or image.info.keys() & exif_keys
        if may_be_turned and image.getexif().get(0x0112, 1) != 1:  # 0x0112: orientation; turning decodes the pixels
            image = ImageOps.exif_transpose(image)
        return image
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+", str(error))
        raise ValueError(
            f"{path}: {int(size[0]) if size else 'too many':,} pixels, above the {MOST_IMAGE_PIXELS:,} that Pillow "
            "reads, here and at inference; save a smaller copy (no flag helps: the model sees at most --max_pixels)"
        ) from None
    except Exception as error:  # over a damaged file Pillow's formats raise whatever they stumble on
        known = looks_like.hint(path) if isinstance(error, UnidentifiedImageError) else ""
        raise ValueError(f"{path}: not a readable image ({known or error})") from None


def open_whole_image(path: str) -> Image.Image:
    """An image as `open_image` gives it, or the ValueError of one whose pixels are not all there, or nearly black.

    Only the end of the file is looked at. Where it is missing, the pixels are decoded, and an image that decodes is
    taken; so are those of an image that is not of 8 bits, for their range. A remote file is not fetched any further for
    its end.
    """
    image = open_image(path)
    file = getattr(image, "fp", None)  # None: decoded already, as it had to be turned
    if image.info["depth"]:
        to_tensor(image, path)
        return image
    if file is None or not getattr(file, "is_here", lambda: True)():
        return image
    try:
        looks_whole = whole.image_looks_whole(file, image.format or "")
    except Exception as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    if not looks_whole:
        to_tensor(image, path)
    return image


def to_tensor(image: Image.Image, path: str) -> torch.Tensor:
    """RGB pixels, uint8 (3, H, W) in channels-last memory, of an image that `open_image` opened."""
    try:
        if (decoded := jpeg.decode(image)) is not None:
            return decoded
        stored = image.info.get("depth", depth.depth_of(image))  # a turned one has lost it
        problem = depth.problem_of(image, stored) if stored else ""
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, 0 if problem else image.height, 256):  # copies of all of a large image would take gigabytes
            strip = image.crop((0, top, image.width, min(top + 256, image.height)))
            if stored == "16 bits" and not depth.is_colour(strip):
                strip = depth.eight_bits_of(strip)
            pixels[top : top + 256] = np.asarray(to_rgb(strip))
    except Exception as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    if problem:
        raise ValueError(f"{path}: {problem}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB as qwen-vl-utils makes it (vision_process.py: to_rgb), so as inference sees it.

    RGBA is laid on white. A palette, grey or RGB image that has transparency beside it loses that: the colours below
    show.
    """
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    image.info.pop("transparency", None)  # of which Pillow only makes a warning for each image
    return image if image.mode == "RGB" else image.convert("RGB")


def open_video(item: dict):
    """A VideoReader for a file, or the same interface for a list of frame images."""
    frames = item["video"]
    if isinstance(frames, list):
        return nullcontext(FrameList(frames, item.get("sample_fps", FrameList.average_fps)))
    return VideoReader(frames, "video")


class FrameList:
    """A video given as a list of images; frames are as large as the first one."""

    average_fps = 2.0  # where the item has no `sample_fps`
    missing = ""

    def __init__(self, paths: list[str], average_fps: float = 2.0) -> None:
        self.paths = paths
        self.average_fps = average_fps
        first = open_image(paths[0])
        self.width, self.height = first.size
        self.is_deep = bool(first.info["depth"])

    def check(self) -> None:
        """ValueError for a frame that is not whole, or of another shape: the model would see it stretched."""
        for path in dict.fromkeys(self.paths):
            width, height = open_whole_image(path).size
            if abs(width * self.height - height * self.width) > SAME_SHAPE * width * self.height:
                raise ValueError(
                    f"{path}: {width}x{height} pixels, and the first frame of its video, {self.paths[0]}, is "
                    f"{self.width}x{self.height}; the frames of a video have one shape, so crop them"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def frames_at(self, indices: list[int]) -> Iterator[torch.Tensor]:
        for index in indices:
            yield to_tensor(open_image(self.paths[index]), self.paths[index])


def resize(frame: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialiased, on uint8 (3, H, W): within 2 levels of PIL's, and many times faster."""
    return transforms.resize(frame, list(size), transforms.InterpolationMode.BICUBIC, antialias=True)


def frames_of(medium: Medium) -> torch.Tensor:
    """The pixels that the model sees, uint8 (frames, 3, H, W): the inverse of `patchify`."""
    t, h, w = medium.grid[:3]
    frames = TEMPORAL if medium.is_video else 1
    patch = math.isqrt(medium.patches.shape[1] // (3 * frames))
    patches = medium.patches.reshape(t, h // MERGE, w // MERGE, MERGE, MERGE, 3, frames, patch, patch)
    pixels = patches.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # time, frame, channel, then rows of pixels, then columns
    return pixels.reshape(t * frames, 3, h * patch, w * patch)


def patchify(frames: Iterable[torch.Tensor], grid: Grid, patch: int, frames_per_patch: int) -> Medium:
    """Frames (3, H, W) one by one -> patches (P, 3 * frames_per_patch * patch * patch), the four of a token together.

    `patch`: the side of a patch in pixels. The order is the official processor's (image_processing_qwen2_vl.py:
    patchify).
    """
    rows = grid.h // MERGE
    columns = grid.w // MERGE
    shape = (grid.t, rows, columns, MERGE, MERGE, 3, frames_per_patch, patch, patch)
    # Written frame by frame into one tensor: a list of frames would take the memory of a video twice.
    patches = torch.empty(shape, dtype=torch.uint8)
    for number, frame in enumerate(frames):
        blocks = frame.unflatten(2, (columns, MERGE, patch)).unflatten(1, (rows, MERGE, patch))
        place = patches[number // frames_per_patch, ..., number % frames_per_patch, :, :]
        place.copy_(blocks.permute(1, 4, 2, 5, 0, 3, 6))  # block row, block column, row, column, channel, y, x
    return Medium(patches.reshape(grid.patches, -1), grid, is_video=frames_per_patch > 1)
