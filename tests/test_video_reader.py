"""VideoReader against a plain decode of everything, on files encoded here and on real footage where there is some.

Real footage: the folder named by the environment variable QWEN2_VL_MEDIA.
"""

import os
import random
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType

from util.data.video_reader import VideoError, VideoReader

QUIET_H264 = "log-level=none:threads=1"
QUIET_H265 = "log-level=none:pools=1:frame-threads=1"


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A moving pattern with noise, every number another one, hard cuts now and then: uint8 (H, W, 3)."""
    rows, columns = np.mgrid[:height, :width]
    scene = number // 50 * 37
    rgb = np.stack([columns * 3 + number * 5, rows * 2 + scene, rows + columns + number * 7], axis=-1)
    noise = np.random.default_rng(number).integers(0, 16, (height, width, 3))
    return ((rgb + noise) % 256).astype(np.uint8)


def encode(
    path: Path, count: int, codec: str, gop: int, *, size=(96, 64), options=None, pts=None, time_base=Fraction(1, 30),
    format=None, pixels="yuv420p", b_frames=None, audio=False, flipped=None, container_options=None, title="",
    plain_start=0,
):  # fmt: skip
    """Write `count` pictures; frame i is shown at tick `pts(i)`. Skips the test where the build lacks the encoder."""
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.gop_size = gop
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = time_base
        if b_frames is not None:
            stream.max_b_frames = b_frames
        if flipped is not None:
            stream.set_display_rotation(flipped[0], hflip=flipped[1], vflip=flipped[2])
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if i < plain_start:
                frame.pict_type = PictureType.P
            frame.pts, frame.time_base = (pts(i) if pts else i), time_base
            container.mux(stream.encode(frame))
            if sound:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 266), np.float32), format="fltp", layout="mono")
                samples.rate, samples.pts = 8000, i * 266
                container.mux(sound.encode(samples))
        container.mux(stream.encode())
        if sound:
            container.mux(sound.encode())
    return path


def h264(options: str = "") -> dict:
    return {"preset": "veryfast", "x264-params": f"{QUIET_H264}:{options}"}


def h265(options: str = "") -> dict:
    return {"preset": "ultrafast", "x265-params": f"{QUIET_H265}:{options}"}


def remux(source: Path, target: Path, change) -> Path:
    """Copy packets; `change(number, packet)` gives the packets to write in the place of one."""
    with av.open(str(source)) as reading, av.open(str(target), "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        writing.start_encoding()
        for number, packet in enumerate(packet for packet in reading.demux(stream) if packet.size):
            for changed in change(number, packet):
                changed.stream = copy
                writing.mux(changed)
    return target


def decode_everything(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """All frames as FFmpeg gives them, uint8 (H, W, 3), not rotated, and their times in seconds."""
    images, times = [], []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            images += [frame.to_ndarray(format="rgb24") for frame in frames]
            times += [frame.time for frame in frames]
    return images, times


def index_sets(count: int, random_sets: int = 5) -> list[list[int]]:
    choose = random.Random(count)
    chosen = [sorted(choose.choices(range(count), k=choose.choice([1, 2, 3, 8, 16]))) for _ in range(random_sets)]
    return [list(range(count)), [0], [count - 1], [0, 0, count - 1, count - 1, count - 1], *chosen]


def assert_same_as_decoding_everything(path: Path, orient=lambda image: image) -> VideoReader:
    images, _ = decode_everything(path)
    reader = VideoReader(path)
    assert len(reader) == len(images) > 0
    for indices in index_sets(len(images)):
        frames = list(reader.frames_at(indices))
        assert len(frames) == len(indices)
        for index, frame in zip(indices, frames, strict=True):
            assert frame.dtype == torch.uint8
            assert frame.shape == (3, reader.height, reader.width)
            assert frame.permute(1, 2, 0).is_contiguous()
            assert np.array_equal(frame.permute(1, 2, 0).numpy(), orient(images[index])), f"{path.name}, frame {index}"
    assert reader.warnings == []
    return reader


TICKS = Fraction(1, 1000)
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
OPEN = "open-gop=1:bframes=4:b-adapt=0:scenecut=0"
FILES = {
    "gop_30.mp4": ("libx264", 30, {"options": h264("bframes=3")}),
    "gop_250.mp4": ("libx264", 250, {"options": h264("bframes=3:scenecut=0")}),
    "gop_250.mkv": ("libx264", 250, {"options": h264("bframes=8:b-pyramid=normal:ref=5")}),
    "gop_1.mp4": ("libx264", 1, {"options": h264()}),
    "gop_3.mp4": ("libx264", 3, {"options": h264("bframes=2:b-adapt=0:b-pyramid=normal:scenecut=0")}),
    "open.mp4": ("libx264", 20, {"options": h264(OPEN)}),
    "open.mkv": ("libx264", 20, {"options": h264(OPEN)}),
    "open.ts": ("libx264", 20, {"options": h264(OPEN)}),
    "gradual_refresh.mp4": ("libx264", 30, {"options": h264("intra-refresh=1:scenecut=0")}),
    "gradual_refresh.ts": ("libx264", 30, {"options": h264("intra-refresh=1:scenecut=0")}),
    "interlaced.ts": ("libx264", 30, {"options": h264("interlaced=1:tff=1")}),
    "fragments.mp4": ("libx264", 30, {"options": h264(), "container_options": FRAGMENTS}),
    "start_not_zero.mkv": ("libx264", 30, {"options": h264(), "pts": lambda i: i + 1000}),
    "start_not_zero.ts": ("libx264", 30, {"options": h264(), "pts": lambda i: i + 1000}),
    "negative.mkv": ("libx264", 30, {"options": h264(), "pts": lambda i: i - 20, "b_frames": 0}),
    "edit_list.mp4": ("libx264", 30, {"options": h264(), "pts": lambda i: i - 20}),
    "variable_rate.mp4": ("libx264", 30, {"options": h264(), "pts": lambda i: 7 * i + i % 4, "time_base": TICKS}),
    "variable_rate.mkv": ("libx264", 30, {"options": h264(), "pts": lambda i: i * i + 3 * i, "time_base": TICKS}),
    "audio.mp4": ("libx264", 30, {"options": h264(), "audio": True}),
    "audio.mkv": ("libx264", 30, {"options": h264(), "audio": True}),
    "odd_size.mp4": ("libx264", 30, {"options": h264(), "size": (97, 65), "pixels": "yuv444p"}),
    "rgb.mkv": ("libx264rgb", 30, {"options": h264(), "size": (97, 65), "pixels": "rgb24"}),
    "10_bit.mp4": ("libx264", 30, {"options": h264(), "pixels": "yuv420p10le"}),
    "b_frames.avi": ("libx264", 30, {"options": h264()}),  # AVI stores no presentation times
    "late_b_frames.avi": ("libx264", 30, {"options": h264("b-adapt=0:scenecut=0"), "plain_start": 10}),
    "no_times.h264": ("libx264", 30, {"options": h264(), "format": "h264"}),
    "hevc.mp4": ("libx265", 25, {"options": h265("bframes=4:open-gop=0")}),
    "hevc_open.mp4": ("libx265", 25, {"options": h265("bframes=4:open-gop=1:min-keyint=25")}),
    "hevc_open.ts": ("libx265", 25, {"options": h265("bframes=4:open-gop=1:min-keyint=25")}),
    "hevc_leading.mp4": ("libx265", 25, {"options": h265("bframes=4:open-gop=0:radl=2:min-keyint=25:b-adapt=0")}),
    "hevc_layers.mp4": ("libx265", 50, {"options": h265("bframes=4:temporal-layers=3:b-adapt=0")}),
    "vp9.webm": ("libvpx-vp9", 30, {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp9_hidden.webm": ("libvpx-vp9", 30, {"options": {"cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "vp8.webm": ("libvpx", 30, {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mpeg4.mp4": ("mpeg4", 15, {"b_frames": 2}),
    "mpeg4.avi": ("mpeg4", 15, {"b_frames": 2}),
    "mpeg4_plain.avi": ("mpeg4", 15, {"b_frames": 0}),
    "mpeg2.ts": ("mpeg2video", 15, {"b_frames": 2}),
    "mpeg2.mpg": ("mpeg2video", 15, {"b_frames": 2, "format": "mpeg"}),
    "av1.mp4": ("libsvtav1", 30, {"options": {"preset": "12", "svtav1-params": "lp=1"}}),
    "av1.mkv": ("libsvtav1", 30, {"options": {"preset": "12", "svtav1-params": "lp=1"}}),
    "animation.gif": ("gif", 10, {"pixels": "rgb8"}),
    "png.mov": ("png", 10, {"pixels": "rgb24", "size": (97, 65)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_same_as_decoding_everything(tmp_path, name):
    codec, gop, settings = FILES[name]
    assert_same_as_decoding_everything(encode(tmp_path / name, 130, codec, gop, **settings))


@pytest.mark.parametrize("count", [1, 2])
def test_very_short_files(tmp_path, count):
    reader = assert_same_as_decoding_everything(encode(tmp_path / "short.mp4", count, "libx264", 30, options=h264()))
    assert len(reader) == count
    assert reader.duration == pytest.approx(count / 30)
    assert reader.average_fps == pytest.approx(30)


ORIENTATIONS = {  # (degrees counter-clockwise, mirrored left-right, mirrored top-bottom) -> what numpy calls it
    (90, False, False): lambda image: np.rot90(image, 1),
    (180, False, False): lambda image: np.rot90(image, 2),
    (270, False, False): lambda image: np.rot90(image, 3),
    (0, True, False): lambda image: image[:, ::-1],
    (0, False, True): lambda image: image[::-1],
    (90, True, False): lambda image: np.rot90(image, 1)[:, ::-1],
    (270, False, True): lambda image: np.rot90(image, 3)[::-1],
}


@pytest.mark.parametrize("flipped", ORIENTATIONS, ids=str)
@pytest.mark.parametrize("name", ["turned.mp4", "turned.mkv"])
def test_orientation(tmp_path, name, flipped):
    path = encode(tmp_path / name, 40, "libx264", 10, options=h264(), flipped=flipped)
    reader = assert_same_as_decoding_everything(path, ORIENTATIONS[flipped])
    assert (reader.height, reader.width) == ((96, 64) if flipped[0] in (90, 270) else (64, 96))


def test_recording_that_starts_inside_a_group(tmp_path):
    whole = encode(tmp_path / "whole.ts", 100, "libx264", 20, options=h264("scenecut=0"))
    path = remux(whole, tmp_path / "cut.ts", lambda number, packet: [packet] if number >= 7 else [])
    reader = assert_same_as_decoding_everything(path)
    assert len(reader) < 93


def test_packets_that_show_nothing(tmp_path):
    """As in interlaced video that stores its two fields apart: half of the packets bring no frame of their own."""

    def with_an_empty_one(number, packet):
        packet.pts, packet.dts = packet.pts * 2, packet.dts * 2
        delimiter = av.Packet(b"\0\0\0\x02\x09\xf0")  # an access unit delimiter and nothing else
        delimiter.pts, delimiter.dts, delimiter.time_base = packet.pts + 512, packet.dts + 512, packet.time_base
        return [packet, delimiter]

    whole = encode(tmp_path / "whole.mp4", 60, "libx264", 20, options=h264())
    assert len(assert_same_as_decoding_everything(remux(whole, tmp_path / "fields.mp4", with_an_empty_one))) == 60


def test_vp8_frames_that_are_only_referred_to(tmp_path):
    def hide_some(number, packet):
        content = bytearray(bytes(packet))
        if number % 20 == 13:
            content[0] &= ~0x10
        changed = av.Packet(bytes(content))
        changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
        changed.is_keyframe = packet.is_keyframe
        return [changed]

    whole = encode(tmp_path / "whole.webm", 60, "libvpx", 30, options={"deadline": "realtime", "cpu-used": "8"})
    reader = assert_same_as_decoding_everything(remux(whole, tmp_path / "hidden.webm", hide_some))
    assert len(reader) == 57


@pytest.mark.parametrize(("codec", "options"), [("libx265", h265("scenecut=0")), ("mpeg4", {})])
def test_key_flags_that_lie(tmp_path, codec, options):
    """An MP4 without its table of key frames: all frames pass for key frames."""
    path = encode(tmp_path / "unmarked.mp4", 60, codec, 20, options=options)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    with av.open(str(path)) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    assert_same_as_decoding_everything(path)


def test_several_streams_and_audio_first(tmp_path):
    path = tmp_path / "streams.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        streams = [container.add_stream("libx264", rate=30) for _ in range(2)]
        for stream, size in zip(streams, [(64, 48), (96, 64)], strict=True):
            (stream.width, stream.height), stream.pix_fmt, stream.options = size, "yuv420p", h264()
        for i in range(60):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 266), np.float32), format="fltp", layout="mono")
            samples.rate, samples.pts = 8000, i * 266
            container.mux(sound.encode(samples))
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(i, stream.width, stream.height), format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
        for stream in (sound, *streams):
            container.mux(stream.encode())
    assert_same_as_decoding_everything(path)


def test_title_that_is_not_utf_8(tmp_path):
    path = encode(tmp_path / "title.mkv", 5, "libx264", 30, options=h264(), title="TITLE")
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"\xff\xfe\xfd\xfc\xfb"))
    assert len(VideoReader(path)) == 5


@pytest.fixture(scope="module")
def gop_30(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "gop_30.mp4"
    return encode(path, 900, "libx264", 30, options=h264("bframes=3"), size=(64, 48))


@pytest.fixture(scope="module")
def faststart(tmp_path_factory) -> Path:
    """The index before the frames, so that a file that breaks off still has it."""
    path = tmp_path_factory.mktemp("video") / "faststart.mp4"
    return encode(path, 90, "libx264", 30, options=h264(), container_options={"movflags": "faststart"})


def decoded_for(path: Path, indices: list[int]) -> int:
    reader = VideoReader(path)
    before = reader.frames_decoded
    assert len(list(reader.frames_at(indices))) == len(indices)
    return reader.frames_decoded - before


def test_seeking_saves_work(gop_30, tmp_path):
    assert decoded_for(gop_30, [0, 450, 899]) < 50
    assert decoded_for(gop_30, list(range(900))) == 900
    assert decoded_for(gop_30, list(range(440, 470))) < 70
    for name in ("seek.ts", "seek.mkv", "seek.flv"):
        path = encode(tmp_path / name, 300, "libx264", 30, options=h264("bframes=3"))
        assert decoded_for(path, [0, 150, 299]) < 50, name
    dropped = encode(tmp_path / "dropped.mp4", 240, "libx264", 250, options=h264("bframes=3:b-adapt=0:scenecut=0"))
    assert decoded_for(dropped, [239]) < 150  # one seek is not possible here; FFmpeg drops what nobody refers to
    cut = remux(tmp_path / "seek.ts", tmp_path / "cut.ts", lambda number, packet: [packet] if number >= 7 else [])
    assert decoded_for(cut, [200]) < 50
    plain = encode(tmp_path / "plain.webm", 120, "libvpx-vp9", 30, options={"deadline": "realtime", "cpu-used": "8"})
    assert decoded_for(plain, [100]) <= 30


def test_opening_decodes_next_to_nothing(gop_30):
    assert VideoReader(gop_30).frames_decoded <= 4


def test_facts(gop_30, tmp_path):
    reader = VideoReader(gop_30)
    assert len(reader) == 900
    assert reader.average_fps == pytest.approx(30)
    assert reader.duration == pytest.approx(30)
    assert (reader.height, reader.width) == (48, 64)
    assert reader.get_metadata() == {"video": {"duration": [reader.duration], "fps": [reader.average_fps]}}
    late = encode(tmp_path / "late.mkv", 60, "libx264", 30, options=h264(), pts=lambda i: i + 1000)
    for clock in (reader, VideoReader(late)):
        assert [clock.index_at(i / 30) for i in range(60)] == list(range(60))
        assert clock.index_at(1.05 / 30) == clock.index_at(1.9 / 30) == 1
        assert clock.index_at(-5) == 0
        assert clock.index_at(1e9) == len(clock) - 1
    _, times = decode_everything(late)
    assert [item["pts"] for item in VideoReader(late)] == times
    assert times[0] == pytest.approx(1000 / 30, abs=1e-3)


def test_variable_rate_average(tmp_path):
    path = tmp_path / "slow.mkv"
    encode(path, 50, "libx264", 30, options=h264(), pts=lambda i: 100 * i + i % 2, time_base=Fraction(1, 1000))
    assert VideoReader(path).average_fps == pytest.approx(10, rel=0.03)
    assert VideoReader(path).duration == pytest.approx(5, rel=0.03)


def test_iterator_interface(gop_30):
    images, times = decode_everything(gop_30)
    with VideoReader(gop_30, "video") as reader:
        first = next(reader)
        assert first["pts"] == 0.0
        assert np.array_equal(first["data"].permute(1, 2, 0), images[0])
        assert next(reader)["pts"] == times[1]
        assert next(reader.seek(10))["pts"] == times[300]
        assert next(reader.seek(10.001))["pts"] == times[301]
        assert next(reader.seek(10.4, keyframes_only=True))["pts"] == key_time_at_or_before(gop_30, 10.4)
        assert len(list(reader.frames_at([7, 8]))) == 2  # beside the running iteration, which goes on undisturbed
        frames = list(reader.seek(29.5))
        assert [frame["pts"] for frame in frames] == times[885:]
        assert all(np.array_equal(f["data"].permute(1, 2, 0), i) for f, i in zip(frames, images[885:], strict=True))
        assert list(reader) == []
        assert list(reader.seek(1000)) == []
        assert next(iter(reader.seek(-3)))["pts"] == 0.0


def key_time_at_or_before(path: Path, seconds: float) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size and packet.is_keyframe]
        return max(float(p.pts * stream.time_base) for p in packets if p.pts * stream.time_base <= seconds)


def open_files(path: Path) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.path.samefile(link, path) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_nothing_stays_open(gop_30):
    with VideoReader(gop_30) as reader:
        assert open_files(gop_30) == 0
        frames = reader.frames_at(range(900))
        next(frames)
        assert open_files(gop_30) == 1
        frames.close()
        assert open_files(gop_30) == 0
        next(reader)
        assert open_files(gop_30) == 1
    assert open_files(gop_30) == 0


def test_repeated_frames_do_not_share_memory(gop_30):
    first, second = VideoReader(gop_30).frames_at([5, 5])
    assert torch.equal(first, second)
    first.zero_()
    assert second.any()
    assert second.permute(1, 2, 0).is_contiguous()


def test_indices(gop_30):
    reader = VideoReader(gop_30)
    assert list(reader.frames_at([])) == []
    assert len(list(reader.frames_at(torch.tensor([3, 4])))) == 2
    assert len(list(reader.frames_at(np.linspace(0, 899, 4).round()))) == 4
    for wrong in ([3, 2], [-1, 2]):
        with pytest.raises(ValueError, match="non-decreasing"):
            reader.frames_at(wrong)
    with pytest.raises(ValueError, match="on_missing"):
        reader.frames_at([1], on_missing="skip")
    with pytest.raises(ValueError, match="audio"):
        VideoReader(gop_30, "audio")
    with pytest.raises(VideoError, match=r"gop_30\.mp4: frame 905 does not exist"):
        reader.frames_at([1, 905])
    last, beyond = reader.frames_at([899, 905], on_missing="nearest")
    assert torch.equal(last, beyond)
    assert ["905" in warning for warning in reader.warnings] == [True]


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return path


def no_frames(path: Path) -> Path:
    whole = encode(path.parent / "whole.mp4", 5, "libx264", 30, options=h264())
    return remux(whole, path, lambda number, packet: [])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path, "no such file"),
        (lambda path: path.parent, "no such file"),
        (lambda path: write_bytes(path, b""), "not a video"),
        (lambda path: write_bytes(path, b"Once upon a time there was a text file.\n" * 50), "not a video"),
        (lambda path: write_bytes(path, bytes(100_000)), "not a video"),
        (audio_only, "no video stream"),
        (no_frames, "no video stream|not one frame"),
    ],
)
def test_files_that_are_no_video(tmp_path, capfd, make, reason):
    path = make(tmp_path / "wrong.mp4")
    capfd.readouterr()
    started = time.process_time()
    with pytest.raises(VideoError, match=reason) as error:
        VideoReader(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 10
    assert capfd.readouterr().err == ""


def read_or_refuse(path: Path) -> tuple[VideoReader | None, str]:
    """The reader, or what its error says."""
    try:
        return VideoReader(path), ""
    except VideoError as error:
        return None, str(error)


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("suffix", ["mp4", "faststart.mp4", "mkv", "ts"])
def test_truncated(tmp_path, capfd, faststart, suffix, tenth):
    whole = faststart
    if suffix != "faststart.mp4":
        whole = encode(tmp_path / f"whole.{suffix}", 60, "libx264", 30, options=h264())
    content = whole.read_bytes()
    path = write_bytes(tmp_path / f"broken.{suffix}", content[: len(content) * (2 * tenth + 1) // 20])
    capfd.readouterr()
    started = time.process_time()
    reader, refusal = read_or_refuse(path)
    if refusal:
        assert str(path) in refusal
    else:
        assert 0 < len(reader) < 90
        if suffix == "faststart.mp4":
            assert "promises 90 frames" in reader.warnings[0]
        frames = list(reader.frames_at(range(len(reader)), on_missing="nearest"))
        assert len(frames) == len(reader)
        images, _ = decode_everything(path)
        for frame, image in list(zip(frames, images, strict=False))[:-4]:  # the last ones may be half a picture
            assert np.array_equal(frame.permute(1, 2, 0), image)
    assert time.process_time() - started < 10
    assert capfd.readouterr().err == ""


def test_damaged_frame(tmp_path):
    """A frame whose packet is rubbish: an error that names it, or the last frame before it and a warning."""

    def spoil(number, packet):
        if number not in (30, 31):
            return [packet]
        rubbish = av.Packet(b"\0\0\0\x06\x41\xff\xff\xff\xff\xff")
        rubbish.pts, rubbish.dts, rubbish.time_base = packet.pts, packet.dts, packet.time_base
        return [rubbish]

    whole = encode(tmp_path / "whole.mp4", 60, "libx264", 20, options=h264("bframes=0:scenecut=0"))
    path = remux(whole, tmp_path / "damaged.mp4", spoil)
    images, times = decode_everything(path)
    shown = [round(seconds * 30) for seconds in times]
    assert [number in shown for number in (29, 30, 31, 59)] == [True, False, False, True]
    reader = VideoReader(path)
    assert len(reader) == 60
    with pytest.raises(VideoError, match=r"damaged\.mp4: frame 30 cannot be decoded"):
        list(reader.frames_at([10, 30, 50]))
    for indices in ([10, 30, 50], [30], [31, 31, 59], list(range(60))):
        frames = list(reader.frames_at(indices, on_missing="nearest"))
        for index, frame in zip(indices, frames, strict=True):
            nearest = shown.index(max(number for number in shown if number <= index))
            assert np.array_equal(frame.permute(1, 2, 0), images[nearest])
    assert ["cannot be decoded" in warning for warning in reader.warnings] == [True, True]


def test_random_damage_is_never_a_surprise(tmp_path, faststart):
    content = faststart.read_bytes()
    for seed in range(20):
        choose = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(30):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        path = write_bytes(tmp_path / "damaged.mp4", bytes(damaged))
        started = time.process_time()
        reader, refusal = read_or_refuse(path)
        if refusal:
            assert str(path) in refusal
        else:
            indices = sorted(choose.choices(range(len(reader)), k=8))
            assert len(list(reader.frames_at(indices, on_missing="nearest"))) == 8
        assert time.process_time() - started < 10


MEDIA = Path(os.environ.get("QWEN2_VL_MEDIA", "/nonexistent"))
FOOTAGE = sorted(path for path in MEDIA.glob("*") if path.suffix in (".mp4", ".mkv", ".webm", ".mov", ".ts"))


@pytest.mark.skipif(not FOOTAGE, reason="QWEN2_VL_MEDIA names no folder with videos")
@pytest.mark.parametrize("path", FOOTAGE, ids=lambda path: path.name)
def test_real_footage(path):
    assert_same_as_decoding_everything(path)
