"""Files that were cut: what is seen of them before training, what is refused, and what is said and counted."""

import base64
import json
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.samples import assistant, entry, text, user
from util import vision
from util.command_line import UserError
from util.cost import check_data
from util.cost.measure import measure
from util.data import whole
from util.data.media import MediaReader
from util.data.video_reader import VideoReader
from util.dataset import Examples, Samples
from util.vision import Budget

FORMATS = {"JPEG": "a.jpg", "PNG": "a.png", "WEBP": "a.webp", "GIF": "a.gif"}


def image_item(path) -> dict:
    return {"type": "image", "image": str(path)}


def grid_or_error(path) -> str:
    try:
        vision.read_grid(image_item(path), Budget())
    except ValueError as error:
        return str(error)
    return ""


def pil_decodes(path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # whatever Pillow stumbles on
        return False
    return True


@pytest.fixture
def decodings(monkeypatch) -> list[str]:
    """The paths of images that are decoded."""
    found, decode = [], vision.to_tensor
    monkeypatch.setattr(vision, "to_tensor", lambda image, path: (found.append(path), decode(image, path))[1])
    return found


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_cut_anywhere_is_refused_unless_it_decodes(kind, picture, tmp_path, decodings):
    path = tmp_path / FORMATS[kind]
    Image.fromarray(picture(200, 300)).save(path)
    content = path.read_bytes()
    assert grid_or_error(path) == ""
    assert not decodings, "a whole file is decoded in the pass over the headers"
    refused = 0
    for share in (0.5, 0.8, 0.95, 0.99, 1):
        path.write_bytes(content[: int(len(content) * share) - (share == 1)])
        said = grid_or_error(path)
        assert (said == "") == pil_decodes(path), f"{share} of the file: {said}"
        assert said == "" or f"{path}: not a readable image" in said
        refused += said != ""
    assert refused >= 3


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    "behind", [b"\0" * 5000, b"trailing", b"\xff\xd8 no end", b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40]
)
def test_what_stands_behind_a_jpegs_end_needs_no_decoding(behind, progressive, picture, tmp_path, decodings):
    """Padding, notes of a camera, a motion photo's film."""
    path = tmp_path / "a.jpg"
    thumbnail = tmp_path / "small.jpg"
    Image.fromarray(picture(40, 60)).save(thumbnail)
    exif = b"Exif\0\0" + thumbnail.read_bytes()  # its own end stands before the picture's
    Image.fromarray(picture(200, 300)).save(path, progressive=progressive, exif=exif)
    content = path.read_bytes()
    assert content.count(b"\xff\xd9") == 2
    path.write_bytes(content + behind)
    assert grid_or_error(path) == ""
    assert not decodings
    path.write_bytes(content[: len(content) // 2])
    assert "not a readable image" in grid_or_error(path), "the thumbnail's end is taken for the picture's"


def test_a_jpeg_without_its_mark_that_decodes_is_taken(picture, tmp_path, decodings):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-2] + bytes(64))
    assert pil_decodes(path)
    assert grid_or_error(path) == ""
    assert decodings == [str(path)]


def test_two_pictures_in_a_file_and_a_png_with_something_behind(picture, tmp_path, decodings):
    first, second = (Image.fromarray(picture(100, 150, seed)) for seed in (1, 2))
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "a.mpo").format == "MPO"
    first.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "ab") as file:
        file.write(b"something behind the end")
    for name in ("a.mpo", "a.png"):
        assert grid_or_error(tmp_path / name) == ""
    assert not decodings


def test_a_png_whose_data_was_cut_and_closed_again_is_only_found_by_decoding(tmp_path, picture):
    """A whole end says nothing of the middle: that is what `check_data --decode` is for."""
    path = tmp_path / "a.png"
    Image.fromarray(picture(200, 300)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + content[-12:])
    assert not pil_decodes(path)
    assert grid_or_error(path) == ""


def test_embedded_images_are_looked_at_and_remote_ones_where_they_are_here(picture, tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(200, 300)).save(path)
    address = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()[:3000]).decode()
    with pytest.raises(ValueError, match="not a readable image"):
        MediaReader().each(vision.read_grid, [image_item(address)], Budget())

    class Remote:
        """A file of which only the beginning was fetched."""

        def __init__(self, here: bool) -> None:
            self.file, self.here = open(path, "rb"), here

        def is_here(self) -> bool:
            return self.here

        def __getattr__(self, name):
            return getattr(self.file, name)

    path.write_bytes(path.read_bytes()[:-500])
    assert vision.open_whole_image(Remote(here=False)).size == (300, 200)
    with pytest.raises(ValueError, match="not a readable image"):
        vision.open_whole_image(Remote(here=True))


def test_frames_of_a_video_are_looked_at_one_by_one(picture, tmp_path):
    for number in range(3):
        Image.fromarray(picture(56, 84, number)).save(tmp_path / f"{number}.png")
    Image.fromarray(picture(112, 168)).save(tmp_path / "twice.png")
    Image.fromarray(picture(84, 56)).save(tmp_path / "tall.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-3000])

    def read(*names: str):
        frames = [str(tmp_path / name) for name in names]
        return vision.read_grid({"type": "video", "video": frames}, Budget())

    assert read("0.png", "1.png", "twice.png").t == 2
    with pytest.raises(ValueError, match=r"tall\.png: 56x84 pixels, and the first .*0\.png, is 84x56"):
        read("0.png", "tall.png")
    with pytest.raises(ValueError, match=r"cut\.png: not a readable image"):
        read("0.png", "1.png", "cut.png")


# ---- videos ----------------------------------------------------------------------------------------------------------


def write_clip(path, picture, seconds: float = 2.0) -> bytes:
    frames = [picture(64, 96, seed) for seed in range(int(15 * seconds))]
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        codec = "mpeg4" if path.suffix == ".avi" else "libx264"
        stream = container.add_stream(codec, rate=Fraction(15), options={"threads": "1"})  # several: other bytes
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["mkv", "webm.mkv", "ts", "avi", "mp4"])
def test_a_video_that_was_cut_is_read_to_its_end_and_told_apart(suffix, picture, tmp_path):
    path = tmp_path / f"clip.{suffix}"
    content = write_clip(path, picture)
    item = {"type": "video", "video": str(path)}
    assert VideoReader(str(path)).missing == ""
    assert not vision.read_grid(item, Budget()).cut
    path.write_bytes(content[: len(content) * 3 // 4 | 1])  # no whole number of packets
    with VideoReader(str(path)) as video:
        assert video.missing
        assert 5 < len(video) < 30
        assert any(str(path) in line for line in video.warnings)
    grid = vision.read_grid(item, Budget())
    assert grid.cut
    assert vision.load(item, Budget()).grid == grid
    assert grid._replace(cut=False) == vision.Grid(*grid[:3]), "the same numbers as of a whole file"


def test_a_cut_video_stays_one_in_the_cache(picture, tmp_path):
    from util.data.cache import FrameCache

    path = tmp_path / "clip.mkv"
    path.write_bytes(write_clip(path, picture)[:-900])
    cache, item = FrameCache(tmp_path / "cache", 1), {"type": "video", "video": str(path)}
    first = cache.load(item, Budget()).grid
    again = cache.read_grid(item, Budget(), lambda *_: pytest.fail("not from the cache"))
    assert first.cut
    assert again.cut
    assert first == again


def test_what_is_said_of_an_image_is_said_from_the_cache(tmp_path):
    from util.data.cache import FrameCache

    pages = [Image.fromarray(np.linspace(0, 65535, 3136).astype(np.uint16).reshape(56, 56)) for _ in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    cache = FrameCache(tmp_path / "cache", 1)
    item = {"type": "image", "image": str(tmp_path / "pages.tif")}
    wanted = vision.Grid(1, 4, 4, deep=True, first=True)
    for _ in range(2):
        assert cache.load(item, Budget()).grid == cache.read_grid(item, Budget()) == wanted
    assert cache.statistics()["hits"] == 1


def test_lengths_that_are_left_open_or_odd_say_nothing():
    """A live recording's segment has no length (RFC 8794: all ones); a file that grew is not cut."""
    header = b"\x1a\x45\xdf\xa3\x84abcd"
    open_ended = header + b"\x18\x53\x80\x67\x01" + b"\xff" * 7
    known = header + b"\x18\x53\x80\x67\x08" + b"\0" * 2 + b"\x10\0"
    assert whole.missing_of_video(open_ended, 100) == ""
    for content in (known, header, b"", b"\x47" * 3, b"RIFF"):
        assert whole.missing_of_video(content, 10**9) == ""
    assert whole.matroska_end(header + b"\x18\x53\x80\x67\x40\x64") == len(header) + 6 + 100
    packets = (b"\x47" + b"\0" * 187) * 10
    assert whole.missing_of_video(packets, 1880) == ""
    assert whole.missing_of_video(packets, 1881) == "at least 187 bytes"
    m2ts = (b"\0\0\0\0\x47" + b"\0" * 187) * 10
    assert whole.missing_of_video(m2ts, 1920) == ""
    assert whole.missing_of_video(m2ts, 1919) == "at least 1 bytes"


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, picture):
    Image.fromarray(picture(56, 84)).save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "hollow.png").write_bytes(content[: len(content) // 2] + content[-12:])
    write_clip(tmp_path / "good.mkv", picture)
    whole_clip = write_clip(tmp_path / "clip.mkv", picture)
    (tmp_path / "cut.mkv").write_bytes(whole_clip[: len(whole_clip) // 2])
    return tmp_path


def write(folder, *media: dict) -> str:
    rows = [{**entry(user([item, text("What?")]), assistant("It.")), "id": 1} for item in media]
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder / "data.json")


def test_cut_videos_and_keys_that_are_not_used_are_counted(folder, processor):
    videos = [{"type": "video", "video": name, "detail": "low"} for name in ("good.mkv", "cut.mkv")]
    data = write(folder, *videos, {"type": "image", "image": "good.png"})
    sizes = measure(Samples(Examples([data], processor), processor, Budget()), 100_000)
    assert sizes.cut_videos == 1
    assert sizes.unused == {"id": 3, "content[].detail": 2}


def test_check_data_names_cut_videos_and_decode_names_all_that_fails(folder, tiny_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    media = [{"type": "image", "image": "good.png"}, {"type": "image", "image": "hollow.png"},
             {"type": "video", "video": "cut.mkv"}, {"type": "video", "video": ["good.png", "hollow.png"]}]  # fmt: skip
    data = write(folder, *media)
    words = ["--data", data, "--model", str(tiny_path), "--device", "cpu", "--num_workers", "2"]
    check_data.check(check_data.parse(check_data.CheckSettings, "", words))
    said = capsys.readouterr().out
    assert f"{data}, sample 2: {folder / 'cut.mkv'}" in said
    assert "cut videos  1 end before their time" in said
    assert "keys        not used: id (4)" in said
    assert "hollow.png" not in said
    with pytest.raises(UserError, match="1 files cannot be decoded in full"):
        check_data.check(check_data.parse(check_data.CheckSettings, "", [*words, "--decode"]))
    said = capsys.readouterr().out
    assert "files  3 in " in said, "each file is decoded once"
    assert f"{data}, sample 1: {folder / 'hollow.png'}: not a readable image" in said
    assert said.count("hollow.png") == 1


def test_decode_counts_the_frames_of_a_video_that_do_not_come_out(folder, tmp_path):
    path = folder / "good.mkv"
    content = bytearray(path.read_bytes())
    assert check_data.Decoding([("video", str(path))], MediaReader().settings)[0].problem == ""
    with av.open(str(path)) as container:
        start = [packet.pos for packet in container.demux(video=0) if packet.size][15]
    content[start + 10 : start + 110] = bytes(100)  # within one packet: the structure of the file stays whole
    damaged = folder / "damaged.mkv"
    damaged.write_bytes(content)
    said = check_data.Decoding([("video", str(damaged))], MediaReader().settings)[0].problem
    assert said.startswith(f"{damaged}: "), "frames are damaged, and nothing is said"
    assert "of 30 frames cannot be decoded whole" in said
