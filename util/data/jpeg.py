"""Photos, faster than PIL hands them over: torchvision's decoder writes the pixels where they are needed.

Both use libjpeg-turbo and give the same pixels (tested), but PIL copies them twice afterwards. torchvision 0.29 calls
its decoder deprecated: where it is gone, or in any doubt, PIL decodes.
"""

import warnings

import torch
from PIL import Image

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


def decode(image: Image.Image) -> torch.Tensor | None:
    """Pixels (3, H, W), uint8 in channels-last memory, of an opened, untouched RGB JPEG; None: let PIL decode it.

    A file without its end marker is left to PIL: libjpeg would fill what is missing with grey and say nothing.
    """
    if decode_jpeg is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    if content.rstrip(b"\0")[-2:] != b"\xff\xd9":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None
    return pixels if pixels.shape[1:] == (image.height, image.width) else None
