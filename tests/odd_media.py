"""Odd images and videos, each with what has to come of it, written by hand: `python -m tests.odd_media FOLDER` makes them.

A case trains, trains and something of it is said (a fact of vision.Grid), or is refused in one line that holds the
words given. `LATE` is a refusal that only decoding can tell.
"""

import base64
import io
import struct
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageCms

TRAINS, SAID, REFUSED, LATE = "trains", "trains, and it is said", "refused", "refused once it is decoded"


class Case(NamedTuple):
    name: str
    make: Callable[[Path], dict]  # writes the case's files into a folder and returns the item
    outcome: str = TRAINS
    words: str = ""  # of the refusal, or the name of the fact that is said


def waves(height: int = 60, width: int = 90) -> np.ndarray:
    """uint8 (height, width, 3), from 0 to 255 in each colour."""
    rows, columns = np.mgrid[:height, :width]
    planes = [np.sin(rows / 5 + number) + np.cos(columns / (4 + number)) for number in range(3)]
    pixels = np.stack(planes, axis=2)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return (pixels * 255).round().astype(np.uint8)


def image(path: Path) -> dict:
    return {"type": "image", "image": str(path)}


def video(path: Path | list[str], **keys) -> dict:
    return {"type": "video", "video": path if isinstance(path, list) else str(path), **keys}


# ---- how a case's files are made -------------------------------------------------------------------------------------


def saved(name: str, mode: str = "RGB", size: tuple[int, int] = (60, 90), **options) -> Callable:
    """An image of `waves` in a mode, saved by Pillow."""

    def make(folder: Path) -> dict:
        Image.fromarray(waves(*size)).convert(mode).save(folder / name, **options)
        return image(folder / name)

    return make


def array(name: str, values: Callable[[], np.ndarray], **options) -> Callable:
    """An image of an array, in the mode that Pillow gives it."""

    def make(folder: Path) -> dict:
        Image.fromarray(values()).save(folder / name, **options)
        return image(folder / name)

    return make


def content(name: str, data: bytes, kind: Callable = image) -> Callable:
    """A file of these bytes."""

    def make(folder: Path) -> dict:
        (folder / name).write_bytes(data)
        return kind(folder / name)

    return make


def grey(low: float, high: float, dtype: type) -> Callable:
    """Values from `low` to `high`, as a ramp (60, 90)."""
    return lambda: np.linspace(low, high, 60 * 90).reshape(60, 90).astype(dtype)


def renamed(make: Callable, name: str, kind: Callable | None = None) -> Callable:
    """The file of another case under another name."""

    def make_renamed(folder: Path) -> dict:
        item = make(folder)
        path = Path(item[item["type"]])
        path.rename(folder / name)
        return (kind or (image if item["type"] == "image" else video))(folder / name)

    return make_renamed


def cut(make: Callable, share: float) -> Callable:
    """The file of another case without its end."""

    def make_cut(folder: Path) -> dict:
        item = make(folder)
        path = Path(item[item["type"]])
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return item

    return make_cut


def several(name: str, **options) -> Callable:
    """Three pictures in one file."""

    def make(folder: Path) -> dict:
        pictures = [Image.fromarray(np.roll(waves(), shift, 1)) for shift in (0, 20, 40)]
        pictures[0].save(folder / name, save_all=True, append_images=pictures[1:], **options)
        return image(folder / name)

    return make


def png(values: np.ndarray, colour: int, depth: int = 16, interlaced: bool = False, *chunks: tuple) -> bytes:
    """A PNG file. `colour`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA. Adam7's passes where it is interlaced."""
    height, width = values.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:  # first row, first column, rows apart, columns apart
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for row, column, down, right in passes:
        for line in values[row::down, column::right]:
            rows += b"\0" + line.astype(f">u{depth // 8}").tobytes()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is of so many pixels, and holds none."""
    return png(np.zeros((0, width), np.uint8), 0, 8).replace(
        struct.pack(">II", width, 0), struct.pack(">II", width, height), 1
    )


def with_crc(data: bytes) -> bytes:
    """The same with the checksum of its header made right."""
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]


def turned(folder: Path) -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(waves()).save(folder / "turned.jpg", exif=exif)
    return image(folder / "turned.jpg")


def with_profile(folder: Path) -> dict:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(waves()).save(folder / "profile.png", icc_profile=profile)
    return image(folder / "profile.png")


def transparent_palette(folder: Path) -> dict:
    Image.fromarray(waves()).quantize(16).save(folder / "palette.png", transparency=3)
    return image(folder / "palette.png")


def embedded(folder: Path) -> dict:
    file = io.BytesIO()
    Image.fromarray(waves()).save(file, "PNG")
    return {"type": "image", "image": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}


def clip(
    name: str,
    times: list[int] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 96),
    rate: int = 10,
    container: dict | None = None,
    options: dict | None = None,
    rotation: int = 0,
) -> Callable:
    """A video whose frames come at `times`, in tenths of a second; default: 20 of them, evenly."""

    def make(folder: Path) -> dict:
        quick = {"x264-params": "log-level=none:threads=1", "g": "5"} if codec == "libx264" else {}
        with av.open(str(folder / name), "w", container_options=container or {}) as file:
            stream = file.add_stream(codec, rate=rate, options={**quick, **(options or {})})
            stream.height, stream.width = size
            stream.pix_fmt = pixels
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, 10)
            for number, time in enumerate(range(20) if times is None else times):
                frame = av.VideoFrame.from_ndarray(np.roll(waves(*size), number * 4, 1), format="rgb24")
                frame.pts = time
                frame.time_base = Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        if rotation:
            turn(folder / name)
        return video(folder / name)

    return make


def turn(path: Path) -> None:
    """Write a quarter turn into the matrix of an MP4 file's track header (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, place, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def sound(name: str) -> Callable:
    def make(folder: Path) -> dict:
        with av.open(str(folder / name), "w") as file:
            stream = file.add_stream("pcm_s16le", rate=8000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.sample_rate = 8000
            file.mux(stream.encode(silence))
            file.mux(stream.encode())
        return video(folder / name)

    return make


def frames(*sizes: tuple[int, int], mode: str = "RGB") -> Callable:
    """A list of frames of these sizes."""

    def make(folder: Path) -> dict:
        paths = [folder / f"{number}.png" for number in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            Image.fromarray(waves(*size)).convert(mode).save(path)
        return video([str(path) for path in paths])

    return make


def deep_frames(folder: Path) -> dict:
    paths = [folder / f"{number}.png" for number in range(2)]
    for path in paths:
        Image.fromarray(grey(0, 4095, np.uint16)()).save(path)
    return video([str(path) for path in paths])


def cut_frames(folder: Path) -> dict:
    item = frames((60, 90), (60, 90))(folder)
    path = Path(item["video"][1])
    path.write_bytes(path.read_bytes()[:2000])
    return item


def with_keys(make: Callable, **keys) -> Callable:
    return lambda folder: {**make(folder), **keys}


def all_modes(values: np.ndarray) -> np.ndarray:
    """uint16 RGBA (60, 90, 4) with these RGB values."""
    return np.dstack([values, np.full(values.shape[:2], 65535, np.uint16)])


BRIGHT = waves().astype(np.uint16) * 257
DARK = waves().astype(np.uint16) * 16
GAP = [0, 1, 2, 3, 4, 5, 15, 25, 35, 45]  # a second between the last frames
EVEN = list(range(20))

CASES = [
    # images that are what they seem
    Case("plain", saved("plain.png")),
    Case("JPEG, progressive", saved("a.jpg", progressive=True)),
    Case("JPEG, CMYK", saved("cmyk.jpg", "CMYK")),
    Case("JPEG, grey", saved("grey.jpg", "L")),
    Case("JPEG, turned by EXIF", turned),
    Case("JPEG, called .png", renamed(saved("a.jpg"), "b.png")),
    Case("JPEG without a suffix", renamed(saved("a.jpg"), "photo")),
    Case("JPEG, called .HEIC", renamed(saved("a.jpg"), "IMG_0001.HEIC")),
    Case("JPEG with bytes behind its end", lambda folder: behind(saved("a.jpg")(folder))),
    Case("PNG, interlaced", content("adam7.png", png(waves(), 2, 8, True))),
    Case("PNG, 1 bit", saved("one.png", "1")),
    Case("PNG, palette", saved("p.png", "P")),
    Case("PNG, transparent palette", transparent_palette),
    Case("PNG, grey and alpha", saved("la.png", "LA")),
    Case("PNG, RGBA", saved("rgba.png", "RGBA")),
    Case("PNG with a transparent colour", saved("key.png", transparency=(0, 0, 0))),
    Case("PNG with a colour profile", with_profile),
    Case("BMP", saved("a.bmp")),
    Case("TIFF, LZW", saved("a.tif", compression="tiff_lzw")),
    Case("TIFF, CMYK", saved("cmyk.tif", "CMYK")),
    Case("PPM", saved("a.ppm")),
    Case("WebP without loss", saved("a.webp", lossless=True)),
    Case("ICO", saved("a.ico", size=(64, 64))),
    Case("in the data file itself", embedded),
    Case("a name with spaces, quotes and signs", renamed(saved("a.png"), "it's 50% \"done\" #1 ünï 图.png")),
    Case("all black, 8 bits", array("black.png", lambda: np.zeros((60, 90, 3), np.uint8))),
    # sizes
    Case("1 x 1", saved("dot.png", size=(1, 1))),
    Case("1 x 200", saved("line.png", size=(1, 200))),
    Case("1 x 4000", saved("long.png", size=(1, 4000)), REFUSED, "one side is more than 200 times the other; crop it"),
    Case("no height", content("flat.png", with_crc(header_of(90, 0))), REFUSED, "not a readable image"),
    Case("400 megapixels", content("bomb.png", with_crc(header_of(20000, 20000))), REFUSED,
         "400,000,000 pixels, above the 178,956,970 that Pillow reads, here and at inference; save a smaller copy"),
    # not of 8 bits
    Case("16 bits", array("deep.png", grey(0, 65535, np.uint16)), SAID, "deep"),
    Case("16 bits, TIFF", array("deep.tif", grey(0, 65535, np.uint16)), SAID, "deep"),
    Case("16 bits, TIFF of the other byte order", array("deep.tif", grey(0, 65535, np.dtype(">u2"))), SAID, "deep"),
    Case("16 bits, RGB", content("rgb.png", png(BRIGHT, 2)), SAID, "deep"),
    Case("16 bits, RGBA", content("rgba.png", png(all_modes(BRIGHT), 6)), SAID, "deep"),
    Case("16 bits, PGM", content("deep.pgm", b"P5 90 60 65535 " + grey(0, 65535, np.dtype(">u2"))().tobytes()), SAID, "deep"),
    Case("12 bits of 4095, PGM", content("deep.pgm", b"P5 90 60 4095 " + grey(0, 4095, np.dtype(">u2"))().tobytes()), SAID, "deep"),
    Case("12 bits in 16", array("dark.png", grey(0, 4095, np.uint16)), REFUSED,
         "values are from 0 to 4,095, a small part of the 65,535 of 16 bits, so it would be seen nearly black"),
    Case("12 bits in 16, TIFF", array("dark.tif", grey(0, 4095, np.uint16)), REFUSED, "from 0 to 4,095"),
    Case("8 bits in 16", array("dark.png", grey(0, 255, np.uint16)), REFUSED, "from 0 to 255, a small part"),
    Case("heat: 30,000 to 31,000", array("heat.png", grey(30000, 31000, np.uint16)), REFUSED, "nearly one grey"),
    Case("12 bits in 16, RGB", content("rgb.png", png(DARK, 2)), REFUSED, "from 0 to 15, a small part of the 255 of the upper 8 bits"),
    Case("12 bits in 16, RGBA", content("rgba.png", png(all_modes(DARK), 6)), REFUSED, "nearly black"),
    Case("16 bits, one value", array("one.png", grey(65535, 65535, np.uint16)), SAID, "deep"),
    Case("floats of 0 to 1", array("float.tif", grey(0, 1, np.float32)), REFUSED,
         "values are from 0 to 1, and nothing in floats says which value is white; save it as 8 bits"),
    Case("floats of -1 to 1", array("float.tif", grey(-1, 1, np.float32)), REFUSED, "values are from -1 to 1"),
    Case("floats of 0 to 255", array("float.tif", grey(0, 255, np.float32)), SAID, "deep"),
    Case("floats of 0 to 65,535", array("float.tif", grey(0, 65535, np.float32)), REFUSED, "from 0 to 65,535"),
    Case("floats, some no numbers", array("nan.tif", lambda: np.where(np.eye(60), np.nan, 200).astype(np.float32)),
         REFUSED, "some are no numbers"),
    Case("integers of 32 bits", array("int.tif", grey(0, 100_000, np.int32)), REFUSED, "from 0 to 100,000, and nothing in integers"),
    Case("signed integers of 16 bits", array("ct.tif", grey(-1000, 3000, np.int32)), REFUSED, "from -1,000 to 3,000"),
    Case("frames of 12 bits in 16", deep_frames, REFUSED, "nearly black"),
    # several pictures in a file
    Case("GIF that moves", several("a.gif"), SAID, "first"),
    Case("GIF that moves, as a video", renamed(several("a.gif", duration=200), "b.gif", video)),
    Case("WebP that moves", several("a.webp"), SAID, "first"),
    Case("PNG that moves", several("a.png"), SAID, "first"),
    Case("TIFF of several pages", several("a.tif"), SAID, "first"),
    # no images
    Case("empty", content("empty.jpg", b""), REFUSED, "it is empty: copy it again"),
    Case("zeros", content("zeros.png", b"\0" * 5000), REFUSED, "nothing but zeros"),
    Case("text", content("text.jpg", b"Once upon a time.\n" * 50), REFUSED, "not a readable image"),
    Case("web page", content("page.png", b"\n<!DOCTYPE html><html><body>404</body></html>"), REFUSED, "it is a web page"),
    Case("JSON of a server", content("a.jpg", b'{"error": "not found"}'), REFUSED, "it is JSON"),
    Case("SVG", content("a.svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'), REFUSED, "save it as PNG"),
    Case("PDF, called .jpg", content("a.jpg", b"%PDF-1.7\n" + b"x" * 500), REFUSED, "save its pages as PNG"),
    Case("HEIC", content("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 400), REFUSED, "save it as JPEG"),
    Case("ZIP", content("a.png", b"PK\x03\x04" + b"\0" * 400), REFUSED, "unpack it"),
    Case("DICOM", content("a.dcm", b"\0" * 128 + b"DICM" + b"\1" * 400), REFUSED, "DICOM"),
    Case("Git LFS", content("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), REFUSED, "git lfs pull"),
    Case("a video as an image", renamed(clip("a.mp4"), "b.jpg", image), REFUSED, "write {'type': 'video', 'video': PATH}"),
    # cut images
    Case("PNG, cut", cut(saved("a.png"), 0.6), REFUSED, "not a readable image"),
    Case("JPEG, cut", cut(saved("a.jpg", size=(300, 400)), 0.6), REFUSED, "not a readable image"),
    Case("WebP, cut", cut(saved("a.webp", lossless=True), 0.6), REFUSED, "not a readable image"),
    Case("GIF, cut", cut(saved("a.gif"), 0.6), REFUSED, "not a readable image"),
    Case("BMP, cut", cut(saved("a.bmp"), 0.6), LATE, "not a readable image"),
    Case("a header alone", cut(saved("a.png"), 0.005), REFUSED, "not a readable image"),
    # videos
    Case("MP4", clip("a.mp4")),
    Case("MP4, index first", clip("a.mp4", container={"movflags": "faststart"})),
    Case("MP4 in fragments", clip("a.mp4", container={"movflags": "frag_keyframe+empty_moov"})),
    Case("MKV", clip("a.mkv")),
    Case("TS", clip("a.ts")),
    Case("AVI", clip("a.avi", codec="mpeg4")),
    Case("motion JPEG", clip("a.avi", codec="mjpeg", pixels="yuvj420p")),
    Case("a video called .jpg", renamed(clip("a.mp4"), "b.jpg", video)),
    Case("a photo as a video", renamed(saved("a.jpg"), "b.jpg", video)),
    Case("one frame", clip("a.mp4", [0])),
    Case("two frames", clip("a.mp4", [0, 1])),
    Case("variable rate", clip("a.mp4", GAP)),
    Case("variable rate, MKV", clip("a.mkv", GAP)),
    Case("begins at 60 s", clip("a.mkv", [600 + time for time in EVEN])),
    Case("begins before 0", clip("a.mp4", [time - 5 for time in EVEN])),
    Case("turned by its header", clip("a.mp4", rotation=90)),
    Case("odd sides", clip("a.mkv", pixels="yuv444p", size=(61, 91))),
    Case("10 bits", clip("a.mp4", pixels="yuv420p10le")),
    Case("interlaced", clip("a.mp4", options={"x264-params": "log-level=none:threads=1:interlaced=1"})),
    Case("raw H.264, without times", clip("a.h264")),
    Case("a frame a second", clip("a.mp4", [time * 10 for time in range(5)])),
    Case("narrow", clip("a.mkv", codec="mpeg4", size=(16, 3600)), REFUSED, "one side is more than 200 times"),
    Case("sound alone", sound("a.wav"), REFUSED, "no video stream"),
    Case("MP4, cut", cut(clip("a.mp4"), 0.5), REFUSED, "not a video, or damaged beyond use"),
    Case("MP4, index first, cut", cut(clip("a.mp4", container={"movflags": "faststart"}), 0.8), SAID, "cut"),
    Case("MKV, cut", cut(clip("a.mkv"), 0.7), SAID, "cut"),
    Case("TS, cut", cut(clip("a.ts"), 0.7003), SAID, "cut"),
    Case("AVI, cut", cut(clip("a.avi", codec="mpeg4"), 0.7), SAID, "cut"),
    Case("no frames", content("a.mp4", b"\0\0\0\x14ftypisom\0\0\0\0isom" + b"\0\0\0\x08mdat", video), REFUSED, "not a video"),
    Case("empty video", content("a.mp4", b"", video), REFUSED, "it is empty: copy it again"),
    Case("web page as a video", content("a.mp4", b"<html>404</html>", video), REFUSED, "it is a web page"),
    Case("a stretch beyond its end", with_keys(clip("a.mp4"), video_start=50), REFUSED, "holds no two frames"),
    # lists of frames
    Case("frames", frames((60, 90), (60, 90), (60, 90))),
    Case("one frame in a list", frames((60, 90))),
    Case("frames twice as large", frames((60, 90), (120, 180))),
    Case("frames of another shape", frames((60, 90), (90, 60)), REFUSED, "the frames of a video have one shape, so crop them"),
    Case("frames of grey", frames((60, 90), (60, 90), mode="L")),
    Case("frames, one cut", cut_frames, REFUSED, "not a readable image"),
]  # fmt: skip


def behind(item: dict) -> dict:
    """The same file with something after its end, as some phones leave it."""
    with open(item["image"], "ab") as file:
        file.write(b"phone's notes" * 20)
    return item


if __name__ == "__main__":
    for case in CASES:
        where = Path(sys.argv[1]) / case.name.replace(" ", "_").replace("/", "_")
        where.mkdir(parents=True, exist_ok=True)
        print(f"{case.outcome:<26} {case.make(where)}")
