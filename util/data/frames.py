"""A video that is given as a folder: its images, in the order in which people number them."""

import os
import re

IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic",
))  # fmt: skip
DIGITS = re.compile(r"(\d+)", re.ASCII)


def natural_key(name: str) -> list:
    """A key by which names sort as people count: `frame_2.jpg` before `frame_10.jpg`; also within paths."""
    # Every second part is a run of digits, so that numbers are only compared with numbers. The name itself decides
    # between names that are otherwise equal (`1.jpg`, `01.jpg`), so that the order is the same on every machine.
    parts = DIGITS.split(name.casefold())
    return [[int(part) if number % 2 else part for number, part in enumerate(parts)], name]


def is_image_file(name: str) -> bool:
    """Whether a file is an image by its name. Hidden files are none: macOS leaves `._1.jpg` beside each `1.jpg`."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


def images_in(folder: str) -> list[str]:
    """The paths of the images right in a folder, in natural order; other files and hidden ones are passed over."""
    names = [name for name in os.listdir(folder) if is_image_file(name)]
    paths = [os.path.join(folder, name) for name in sorted(names, key=natural_key)]
    return [path for path in paths if os.path.isfile(path)]
