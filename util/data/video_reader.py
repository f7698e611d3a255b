"""`VideoReader`: decodes only the frames that are wanted, bit-identical to decoding everything and picking.

Opening reads every packet without decoding it, which tells the number of frames, their times and the key frames. For
the wanted frames the reader seeks once per needed group of pictures, and inside a group FFmpeg drops the frames that
are not wanted and that no other frame refers to. Where a seek does not lead to the wanted frame, decoding starts again
from further back, and at last from the start of the file.

A remote file (util/data/fetch.py) is read by ranges. Of an MP4 or MOV file only the index and the media data to be
decoded are fetched: the demuxer finds times and sizes of the packets in the index, so while it reads all packets it
gets zeros in place of media data. Other formats keep times and sizes beside each packet, and are fetched in full.
"""

import os
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import BinaryIO, Literal, NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer
from av.stream import Discard, Disposition
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from util.data import looks_like, whole

# In these codecs a frame that no other refers to can be dropped without effect; in others any frame may leave state.
CODECS_THAT_MAY_SKIP = {"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video"}

# For these codecs the index of an MP4 or MOV file tells everything about the packets (the tests compare). For others,
# such as VP8, FFmpeg looks into the packets.
CODECS_THAT_MAY_BE_SKIMMED = {"h264", "hevc", "vp9", "av1", "mpeg4"}
MOST_PIXELS = 2**26  # of a frame, twice those of 8K; a few more copies of a larger one would take gigabytes
READ_BEYOND = 2**15  # bytes that FFmpeg reads past what it needs: the size of PyAV's buffer

# A title that is not UTF-8 must not stop PyAV 18; PyAV 19 has no such option and needs none.
OPEN_OPTIONS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(ValueError):
    """A video that cannot be read; the message says which and why."""


class Packet(NamedTuple):
    """What is known of a packet before it is decoded; times are in ticks of the stream's time base."""

    pts: int | None
    dts: int | None
    duration: int | None
    is_key: bool
    is_shown: bool
    is_cut: bool  # the file ends within it
    span: tuple[int, int] | None  # its first byte in the file and the one after its last; None where not needed


class VideoReader:
    """Frames of the best video stream (FFmpeg's choice) of a file, upright, decoded on one thread.

    The file is a local path, or a file object of `fetch.open_media`; then FetchError may come out of any call.

    `pts` are seconds on the file's own clock, which need not start at 0. Non-square pixels are left as stored. The file
    is open only while frames are being read, so several iterators may run side by side.

    Attributes: `average_fps` (frames per second), `duration` (seconds), `height` and `width` (pixels, upright),
    `warnings` (what was wrong but did not stop reading), `missing` (what the file's end lacks, as far as can be known
    without decoding; else ""), `frames_decoded` (so far; a measure of work, for tests).
    """

    def __init__(self, path: str | os.PathLike | BinaryIO, stream: Literal["video"] = "video"):
        if stream != "video":
            raise ValueError(f"VideoReader reads the stream 'video', not {stream!r}")
        self._file = path if hasattr(path, "read") else None
        self.path = os.fspath(path) if self._file is None else str(path)
        self.warnings: list[str] = []
        self.missing = ""
        self.frames_decoded = 0
        self._packet_times: list[tuple[int | None, int | None]] = []  # (pts, dts) of each packet
        self._packet_bytes: list[tuple[int, int]] = []  # (first, end) of each packet, if media data was left out
        self._next_index = 0
        self._iterator: Iterator | None = None
        self._read_index()

    def __len__(self) -> int:
        return len(self._pts)

    def index_at(self, seconds: float) -> int:
        """Index of the frame on screen `seconds` after the first frame appeared (first or last frame where outside)."""
        ticks = (seconds + 0.001) / self._time_base  # Matroska rounds times to milliseconds: 2/30 s becomes 0.067
        return max(bisect_right(self._pts, self._pts[0] + ticks) - 1, 0)

    def frames_at(self, indices: Iterable[int], on_missing: Literal["error", "nearest"] = "error") -> Iterator:
        """Iterate over the frames with these non-decreasing indices, decoding each when it is asked for.

        Yields uint8 RGB tensors of shape (3, H, W) in channels-last memory, that is (H, W, 3). A frame that cannot be
        decoded or lies past the end raises VideoError; with `on_missing="nearest"` the last frame decoded before it
        takes its place and `warnings` says so. ValueError: negative or decreasing indices.
        """
        indices = [int(index) for index in indices]
        if indices != sorted(indices) or min(indices, default=0) < 0:
            raise ValueError(f"{self.path}: frame indices must be non-negative and non-decreasing, got {indices}")
        if on_missing not in ("error", "nearest"):
            raise ValueError(f"on_missing must be 'error' or 'nearest', not {on_missing!r}")
        if indices and indices[-1] >= len(self):
            self._miss(indices[-1], f"does not exist, there are {len(self)}", on_missing)
        return self._images([min(index, len(self) - 1) for index in indices], on_missing)

    # The iterator interface of torchvision's former VideoReader.

    def __iter__(self) -> "VideoReader":
        return self

    def __next__(self) -> dict:
        """The next frame: {"data": uint8 tensor (3, H, W), "pts": seconds}."""
        if self._iterator is None:
            indices = range(self._next_index, len(self))
            self._iterator = zip(self._pts[self._next_index :], self.frames_at(indices), strict=True)
        pts, image = next(self._iterator)
        return {"data": image, "pts": float(pts * self._time_base)}

    def seek(self, seconds: float, keyframes_only: bool = False) -> "VideoReader":
        """Go on at the first frame with pts >= `seconds`, or at the key frame from which that one is decoded."""
        self.close()
        self._next_index = bisect_left(self._pts, (seconds - 1e-6) / self._time_base)
        if keyframes_only and self._can_seek and self._next_index < len(self):
            self._next_index = bisect_left(self._pts, self._packet_times[self._key_packet(self._next_index)][0])
        return self

    def get_metadata(self) -> dict:
        """{"video": {"duration": [seconds], "fps": [frames per second]}}."""
        return {"video": {"duration": [self.duration], "fps": [self.average_fps]}}

    def close(self) -> None:
        """End a running iteration, which closes the file."""
        self._iterator = None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # Index, plan and decoding. Packets are numbered as they stand in the file, frames as they are shown (the indices);
    # the presentation timestamp (pts, in ticks of the time base) connects the two.

    def _source(self) -> str | BinaryIO:
        """What PyAV opens: several containers over one file object need a cursor each."""
        if self._file is None:
            return f"file:{self.path}"
        source = self._file.reopen()
        # Only the suffix, as FFmpeg weighs it: for a name with a scheme of a network it reads megabytes at a time.
        source.name = f"video{os.path.splitext(self.path.removesuffix('?...'))[1]}"
        return source

    @contextmanager
    def _open(self, source: str | BinaryIO | None = None) -> Iterator[VideoStream]:
        """The video stream of the newly opened file (or of `source`), ready to decode on one thread."""
        if self._file is None and not os.path.isfile(self.path):
            raise VideoError(f"{self.path}: no such file")
        try:
            container = av.open(source or self._source(), **OPEN_OPTIONS)
        except av.FFmpegError as error:
            self._stop_on_failed_fetch()
            known = looks_like.hint(self.path if self._file is None else self._file.reopen())
            why = known if known and known != looks_like.A_VIDEO else error.strerror
            raise VideoError(f"{self.path}: not a video, or damaged beyond use ({why})") from error
        with container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic or stream.codec_context is None:
                raise VideoError(f"{self.path}: no video stream in it that FFmpeg can decode")
            for other in container.streams:
                other.discard = Discard.default if other.index == stream.index else Discard.all
            stream.codec_context.thread_count = 1
            self._check_size(stream.codec_context)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # headers may lie, or sizes change midway
            yield stream

    def _read_index(self) -> None:
        """Read all packets; decode the first two frames, which tell the size and whether packets match frames."""
        source = self._source()
        with self._open(source) as stream:
            packets, frames, is_skimmed = self._read_packets(stream, source)
            if not frames:
                raise VideoError(f"{self.path}: not one frame can be decoded from {len(packets)} packets of video")
            if is_skimmed:
                packets = with_keys_of_index(packets, stream)
            self.height, self.width = to_image(frames[0], VideoReformatter()).shape[1:]
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self._time_base = stream.time_base
            packets = self._without_cut_packet(packets, stream)
            self._skip = frames_to_skip(stream.codec_context)
            # AVI files have no pts: where frames are reordered, those that FFmpeg gives are made up
            has_pts = not (stream.container.format.name == "avi" and stream.codec_context.has_b_frames)
        if not self.missing and (missing := self._missing_end()):
            self.missing = missing
            self._warn(f"cut: {missing} missing at its end")
        if is_skimmed:
            self._packet_bytes = [packet.span for packet in packets]
        self._packet_times = [(packet.pts, packet.dts) for packet in packets]
        self._key_packets = [number for number, packet in enumerate(packets) if packet.is_key]
        self._packet_number = {packet.pts: number for number, packet in enumerate(packets)}
        self._find_frame_times(packets, [frame.pts for frame in frames[:2]], has_pts, rate)

    def _read_packets(self, stream: VideoStream, source) -> tuple[list[Packet], list[VideoFrame], bool]:
        """All packets, the first frames (two, if there are), and whether media data was left out while reading."""
        codec = stream.codec_context
        is_remote_mp4 = self._file is not None and stream.container.format.name.startswith("mov,")
        may_be_skimmed = is_remote_mp4 and codec.codec.canonical_name in CODECS_THAT_MAY_BE_SKIMMED
        is_vp8 = codec.name == "vp8"
        packets = []
        frames = []
        is_skimmed = False
        for packet in chain(self._demux(stream), [None]):
            if packet is not None:
                # Edit lists hide packets; so does VP8 (bit unset: a frame only to refer to, RFC 6386, 9.1).
                is_hidden = packet.is_discard or (is_vp8 and not memoryview(packet)[0] & 0x10)
                span = (packet.pos, packet.pos + packet.size) if may_be_skimmed else None
                packets.append(
                    Packet(
                        packet.pts,
                        packet.dts,
                        packet.duration,
                        packet.is_keyframe,
                        not is_hidden,
                        packet.is_corrupt,
                        span,
                    )
                )
            if len(frames) < 2:
                frames += self._decode(stream, packet)
                is_skimmed = may_be_skimmed and len(frames) >= 2 and source.skim_media_data()
        return packets, frames, is_skimmed

    def _without_cut_packet(self, packets: list[Packet], stream: VideoStream) -> list[Packet]:
        """The packets that are whole; `missing` and a warning say how many the header promises beyond them."""
        promised = min(stream.frames, len(stream.index_entries))  # the index lacks what edit lists cut away
        last_is_cut = packets[-1].is_cut
        whole_packets = packets[:-1] if last_is_cut else packets
        if promised < len(packets) or promised == len(whole_packets):
            return packets
        self.missing = f"{promised - len(whole_packets):,} frames"
        self._warn(f"the header promises {promised} frames, the file holds {len(whole_packets)}")
        return whole_packets  # no frame refers to the one that is dropped, as it is the last one to decode

    def _find_frame_times(self, packets: list[Packet], first_pts: list, has_pts: bool, rate: Fraction) -> None:
        """The pts of all frames, from the packets where these match the first frames; else by counting frames.

        Sets `duration` and `average_fps`, too. `rate`: frames per second by the header.
        """
        self._pts = []
        has_pts = has_pts and None not in self._packet_number and None not in first_pts
        if has_pts and len(self._packet_number) == len(packets):
            # A frame before the first one lacks those it refers to, as in a recording cut from a broadcast.
            self._pts = sorted(packet.pts for packet in packets if packet.is_shown and packet.pts >= first_pts[0])
        self._can_seek = self._pts[:2] == first_pts
        if self._can_seek:
            shown = set(self._pts)
            span = self._pts[-1] - self._pts[0]
            mean_gap = Fraction(span, len(self) - 1) if span else 1 / (rate * self._time_base)
            # Where frames are reordered and come at a variable rate, a frame before the last one may be said to end
            # after it: FFmpeg takes durations from the order of decoding. torchcodec goes by the latest end, and so
            # does qwen-vl-utils for the number of frames.
            ends = [packet.pts + (packet.duration or 0) for packet in packets if packet.pts in shown]
            last_gap = max(ends) - self._pts[-1] or mean_gap
        else:  # timestamps are absent, repeated or misleading: count the frames that come out, trust the frame rate
            self._pts = [number for number, _ in self._decode_everything()]
            self._time_base = 1 / rate
            span = len(self) - 1
            last_gap = 1
        self.duration = float((span + last_gap) * self._time_base)
        self.average_fps = len(self) / self.duration

    def _missing_end(self) -> str:
        """What is missing at the end, where the file itself says how long it is; else ""."""
        if self._file is None:
            with open(self.path, "rb", buffering=0) as file:
                return whole.missing_of_video(file.read(whole.FIRST_BYTES), os.fstat(file.fileno()).st_size)
        file = self._file.reopen()
        return whole.missing_of_video(file.read(whole.FIRST_BYTES), file.seek(0, os.SEEK_END))

    def count_decodable(self) -> int:
        """How many of the frames are undamaged when everything is decoded."""
        shown = set(self._pts)
        return len({pts for pts, frame in self._decode_everything() if pts in shown and not frame.is_corrupt})

    def _images(self, indices: list[int], on_missing: str) -> Iterator[torch.Tensor]:
        repeats = Counter(indices)
        reformatter = VideoReformatter()
        for index, frame, is_found in self._find(deque(repeats)):
            if not is_found:
                self._miss(index, "cannot be decoded", on_missing if frame else "error")
            image = to_image(frame, reformatter)
            for _ in range(repeats[index] - 1):
                yield image.clone()
            yield image

    def _find(self, wanted: deque[int]) -> Iterator[tuple[int, VideoFrame | None, bool]]:
        """For each wanted index: (index, its frame, True), or (index, the last frame decoded before it, False)."""
        wanted_pts = {self._pts[index] for index in wanted}
        # 0: decode from the nearest key frame; 1: from the one before it; 2: decode everything
        retreat = 0 if self._can_seek else 2
        with self._open() as stream:
            while wanted and retreat < 2:
                count = len(wanted)
                for frame in self._decode_run(stream, *self._plan_run(wanted, retreat), wanted_pts):
                    if frame.pts == self._pts[wanted[0]]:
                        yield wanted.popleft(), frame, True
                    if not wanted or frame.pts > self._pts[wanted[0]]:
                        break
                retreat = 0 if len(wanted) < count else retreat + 1
        last = None
        for pts, frame in self._decode_everything() if wanted else ():
            while wanted and self._pts[wanted[0]] < pts:
                yield wanted.popleft(), last, False
            last = frame
            if wanted and self._pts[wanted[0]] == pts:
                yield wanted.popleft(), frame, True
            if not wanted:
                return
        yield from ((index, last, False) for index in wanted)

    def _key_packet(self, index: int, retreat: int = 0) -> int:
        """Number of the key packet from which a frame can be decoded, or of the one `retreat` key packets before."""
        pts = self._pts[index]
        key = bisect_right(self._key_packets, self._packet_number[pts]) - 1
        # Open group: what stands after the key frame but is shown before it also refers to the group before.
        while key >= 0 and self._packet_times[self._key_packets[key]][0] > pts:
            key -= 1
        return self._key_packets[key - retreat] if key >= retreat else 0

    def _plan_run(self, wanted: deque[int], retreat: int) -> tuple[int, int]:
        """First and last packet to decode in one go, up to where a seek to a later wanted frame skips packets."""
        end = self._packet_number[self._pts[wanted[0]]]
        for index in wanted:
            if self._key_packet(index) > end + 1:
                break
            end = max(end, self._packet_number[self._pts[index]])
        return self._key_packet(wanted[0], retreat), end

    def _decode_run(self, stream: VideoStream, start: int, end: int, wanted_pts: set[int]) -> Iterator[VideoFrame]:
        """Frames of the packets `start` to `end`, but for those that FFmpeg can drop; none where the seek failed."""
        start_pts = self._packet_times[start][0]
        is_confirmed = start == 0
        if self._packet_bytes:
            stretch = self._packet_bytes[start : end + 2]  # the packet after the last tells that the run is over
            self._file.prefetch(min(first for first, _ in stretch), max(last for _, last in stretch) + READ_BEYOND)
        for packet in chain(self._packets_from(stream, start), [None]):
            number = end + 1 if packet is None else self._packet_number.get(packet.pts, end + 1)
            is_wanted = number > end or number == start or packet.pts in wanted_pts
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else self._skip
            for frame in self._decode(stream, packet if number <= end else None):
                if not is_confirmed and frame.pts >= start_pts:
                    # Key flags can be wrong (MP4 without their table, H.264 with gradual refresh): look at the frame.
                    if frame.pts != start_pts or frame.pict_type != PictureType.I or frame.is_corrupt:
                        return
                    is_confirmed = True
                if is_confirmed:
                    yield frame
            if number > end:
                return

    def _packets_from(self, stream: VideoStream, start: int) -> Iterator[av.Packet]:
        """The packets from number `start` on; none where no seek leads to it."""
        for time in self._packet_times[start]:  # MP4 and Matroska find a key frame by its pts, MPEG-TS by its dts
            try:
                stream.container.seek(time, stream=stream)
            except (av.FFmpegError, TypeError):  # TypeError: there is no dts
                continue
            packets = self._demux(stream)
            for packet in packets:
                number = self._packet_number.get(packet.pts, len(self._packet_number))
                if number == start:
                    if self._packet_bytes and start and not packet.is_keyframe:
                        break  # the mark of the index was wrong, as the packet itself tells
                    yield packet
                    yield from packets
                    return
                if number > start:
                    break

    def _decode_everything(self) -> Iterator[tuple[int, VideoFrame]]:
        """(pts, frame) of every frame from the start of the file; (0, 1, ..., frame) where pts are of no use."""
        count = 0
        with self._open() as stream:
            for packet in chain(self._demux(stream), [None]):
                for frame in self._decode(stream, packet):
                    yield (frame.pts if self._can_seek else count), frame
                    count += 1

    def _demux(self, stream: VideoStream) -> Iterator[av.Packet]:
        """Packets that carry data, as far as the file can be read."""
        try:
            for packet in stream.container.demux(stream):
                self._stop_on_failed_fetch()
                if packet.size:  # an empty one would tell the decoder that the stream has ended
                    yield packet
        except av.FFmpegError as error:
            self._stop_on_failed_fetch()
            self._warn(f"reading stops early ({error.strerror})")
        except IndexError:  # PyAV trips at the end over a stream that appeared late (MPEG-TS); all packets were read
            pass
        self._stop_on_failed_fetch()

    def _stop_on_failed_fetch(self) -> None:
        """Raise the FetchError of a failed read, which FFmpeg would take for damage or the end of the file."""
        if self._file is not None and self._file.failure:
            raise self._file.failure

    def _decode(self, stream: VideoStream, packet: av.Packet | None) -> list[VideoFrame]:
        """Frames that come out when a packet goes in (None: all that the decoder still holds back)."""
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError:  # a damaged packet: its frame will be missed where it is wanted
            return []
        self.frames_decoded += len(frames)
        return frames

    def _check_size(self, picture) -> None:
        """VideoError where a codec or frame is so large that no frame of it should be made."""
        if picture.width * picture.height > MOST_PIXELS:
            size = f"{picture.width}x{picture.height}"
            raise VideoError(f"{self.path}: frames of {size} pixels, above {MOST_PIXELS:,}; make it smaller")

    def _miss(self, index: int, problem: str, on_missing: str) -> None:
        """Raise VideoError for a frame that cannot be had or, with "nearest", warn of it."""
        if on_missing == "error":
            raise VideoError(f"{self.path}: frame {index} {problem}")
        self._warn(f"frame {index} {problem}; the last one decoded before it takes its place")

    def _warn(self, problem: str) -> None:
        message = f"{self.path}: {problem}"
        if message not in self.warnings:
            self.warnings.append(message)


def with_keys_of_index(packets: list[Packet], stream: VideoStream) -> list[Packet]:
    """The packets, each a key packet if the file's index says so.

    FFmpeg looks into a packet to see whether it is one, and where media data was left out it saw zeros.
    """
    keys = {entry.pos for entry in stream.index_entries if entry.is_keyframe}
    return [packet._replace(is_key=packet.span[0] in keys) for packet in packets]


def frames_to_skip(codec) -> str:
    """Which frames that are not wanted FFmpeg may drop, as its option skip_frame names them."""
    # H.265 with temporal layers: a frame "without references" may have some from a higher layer. Their number less one
    # stands in the second byte of the video parameter set (7.3.2.1), after its header 0x40 0x01.
    parameters = (codec.extradata or b"").partition(b"\x40\x01")[2]
    has_layers = codec.name == "hevc" and parameters[1:2] > b"\x01"
    return "NONREF" if codec.name in CODECS_THAT_MAY_SKIP and not has_layers else "DEFAULT"


def to_image(frame: VideoFrame, reformatter: VideoReformatter) -> torch.Tensor:
    """A decoded frame as an upright uint8 RGB tensor (3, H, W) in channels-last memory."""
    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    # Not frame.side_data: it and the frame refer to each other, so no frame would be freed before the garbage collector
    # happens to run.
    try:
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV trips over kinds of side data that it has no name for, such as EXIF; mirroring is lost
        matrix = None
        rgb = np.rot90(rgb, round(frame.rotation / 90))
    if matrix is not None:  # x' = a x + c y, y' = b x + d y: which axis goes where, and which way round
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):  # a quarter turn: x and y change places
            rgb = rgb.transpose(1, 0, 2)
            a, d = c, b
        if d < 0:
            rgb = rgb[::-1]
        if a < 0:
            rgb = rgb[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
