"""Pictures that are not of 8 bits: 16-bit greys and colours, 32-bit integers, floats.

Of 16 bits the upper 8 are taken, as Pillow itself does with colours. Integers of 32 bits and floats have no range of
their own, so nobody can say which value is white: they are taken where they lie within 0 to 255 already. A picture that
would be seen nearly black so is refused with its range. Guessing a scale from one picture would make two pictures of
different brightness the same, and whoever runs the model would have to guess likewise: qwen-vl-utils and transformers
call Pillow's `convert("RGB")`, which makes every grey above 255 white.
"""

import numpy as np
from PIL import Image

NEARLY_BLACK = 64  # of 255: no value of a picture is as bright
NEARLY_ONE_GREY = 16  # of 255: its darkest and its brightest value are less apart
HIGHEST_OF_16_BITS = 2**16 - 1


def depth_of(image: Image.Image) -> str:
    """How a picture that is opened, and not decoded yet, is stored, in words; "" for 8 bits or fewer."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return "16 bits"
    if image.mode in ("I", "F"):
        return "integers" if image.mode == "I" else "floats"
    # Of colours Pillow decodes the upper 8 bits alone: only the decoder's name for the layout still tells.
    layouts = [tile[3] if isinstance(tile[3], str) else str(tile[3][:1]) for tile in getattr(image, "tile", [])]
    return "16 bits" if any(";16" in layout for layout in layouts) else ""


def values_in_words(image: Image.Image, depth: str) -> str:
    """`16 bits, values from 0 to 4,095`, for which the picture is decoded."""
    low, high = value_range(image)
    return f"{depth}, values from {low:,.6g} to {high:,.6g}{' of 255' if is_colour(image) else ''}"


def problem_of(image: Image.Image, depth: str) -> str:
    """Why a picture that is not of 8 bits cannot be shown to the model; "" where it can. It is decoded for this."""
    low, high = value_range(image)
    why = problem_of_16_bits(low, high, is_colour(image)) if depth == "16 bits" else problem_of_any(low, high, depth)
    if not why:
        return ""
    return (
        f"its values are from {low:,.6g} to {high:,.6g}, {why}; save it as 8 bits, at training and at inference "
        "(docs/data.md, Pictures and videos that are not plain)"
    )


def problem_of_16_bits(low: float, high: float, is_colour: bool) -> str:
    """What would be lost with the lower 8 bits; "" for little, or where there is one value. Colours have lost them."""
    darkest = low if is_colour else int(low) >> 8
    brightest = high if is_colour else int(high) >> 8
    if low == high or (brightest >= NEARLY_BLACK and brightest - darkest >= NEARLY_ONE_GREY):
        return ""
    possible = "255 of the upper 8 bits" if is_colour else f"{HIGHEST_OF_16_BITS:,} of 16 bits"
    seen = "black" if brightest < NEARLY_BLACK else "one grey"
    return f"a small part of the {possible}, so it would be seen nearly {seen}"


def problem_of_any(low: float, high: float, depth: str) -> str:
    """Why integers or floats cannot be taken for brightness from 0 to 255; "" where they can."""
    if not np.isfinite([low, high]).all():
        return "and some are no numbers"
    if low >= 0 and (NEARLY_BLACK <= high <= 255 or high == 0):
        return ""
    return f"and nothing in {depth} says which value is white"


def is_colour(image: Image.Image) -> bool:
    return len(image.getbands()) > 1


def value_range(image: Image.Image) -> tuple[float, float]:
    """The lowest and highest value as Pillow decodes it, transparency left out; not finite where any value is not."""
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGB")
    values = np.asarray(image)
    return float(values.min()), float(values.max())


def eight_bits_of(strip: Image.Image) -> Image.Image:
    """A picture of 16-bit greys, or a strip of it, as 8-bit greys."""
    return Image.fromarray((np.asarray(strip).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
