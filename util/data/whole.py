"""Whether a media file is all there, seen from its length and its first and last bytes, nothing decoded.

A file whose upload or download was cut short keeps its header: its size in pixels can be read, and only decoding it
fails, in the middle of a run. So the file's end is looked at when its header is read. A file that looks cut may still
decode (cameras append data to a JPEG, some programs omit the last marker): `vision.open_whole_image` then decodes it.
"""

import os
from typing import BinaryIO

FIRST_BYTES = 2**12  # enough for the header of any container
TAIL = 64  # bytes at the end that are looked at first; behind more zeros than these the whole file is searched
PACKETS = {188: 0, 192: 4}  # bytes of a packet of MPEG-TS, and where its mark stands; the second is M2TS


# ---- images ---------------------------------------------------------------------------------------------------------


def image_looks_whole(file: BinaryIO, kind: str) -> bool:
    """Whether the end of an image file of Pillow's format `kind` is there; True for formats whose end tells nothing.

    Usually a few bytes tell; else the whole file is walked through. The position of `file` does not change.
    """
    looks_whole = {
        "JPEG": jpeg_looks_whole, "MPO": jpeg_looks_whole, "PNG": png_looks_whole, "WEBP": webp_looks_whole,
        "GIF": gif_looks_whole,
    }.get(kind)  # fmt: skip
    if looks_whole is None:
        return True
    position = file.tell()
    try:
        size = file.seek(0, os.SEEK_END)
        return looks_whole(file, size)
    finally:
        file.seek(position)


def part(file: BinaryIO, start: int, count: int) -> bytes:
    """Up to `count` bytes of a file from `start` on."""
    file.seek(max(0, start))
    return file.read(count)


def jpeg_looks_whole(file: BinaryIO, size: int) -> bool:
    """Whether the marker EOI stands at the end (zeros may follow), or anywhere after the start of the first scan.

    Before the scan a thumbnail may hold an EOI of its own, so segments are skipped by their lengths. Within a scan the
    byte 0xff is always followed by 0x00 or is part of a marker.
    """
    if part(file, size - TAIL, TAIL).rstrip(b"\0").endswith(b"\xff\xd9"):
        return True
    content = part(file, 0, size)
    place = 2
    while place + 4 <= size and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xDA:  # the first scan begins
            return content.find(b"\xff\xd9", place) >= 0
    return False


def png_looks_whole(file: BinaryIO, size: int) -> bool:
    """Whether the chunk IEND stands at the end, or behind complete chunks with other data after it."""
    if part(file, size - 8, 4) == b"IEND":
        return True
    place = 8
    while place + 12 <= size:
        head = part(file, place, 8)
        if head[4:] == b"IEND":
            return True
        place += 12 + int.from_bytes(head[:4], "big")
    return False


def webp_looks_whole(file: BinaryIO, size: int) -> bool:
    """Whether the file is as long as its RIFF header says."""
    return int.from_bytes(part(file, 4, 4), "little") + 8 <= size


def gif_looks_whole(file: BinaryIO, size: int) -> bool:
    """Whether the trailer stands at the end."""
    return part(file, size - TAIL, TAIL).rstrip(b"\0").endswith(b"\x3b")


# ---- videos ---------------------------------------------------------------------------------------------------------


def missing_of_video(first: bytes, size: int) -> str:
    """What is missing at the end of a video file, from its first bytes and its length in bytes; "": nothing known.

    Matroska, WebM and AVI files say how long they are; MPEG-TS consists of packets of one length. (MP4 and MOV cannot
    be read without their index, and VideoReader compares what the index promises with what is there.)
    """
    if first[:4] == b"\x1a\x45\xdf\xa3":
        end = matroska_end(first)
        return f"{end - size:,} bytes" if end is not None and end > size else ""
    if first[:4] == b"RIFF" and first[8:12] == b"AVI ":
        end = int.from_bytes(first[4:8], "little") + 8
        return f"{end - size:,} bytes" if end > size else ""
    for length, place in PACKETS.items():
        marks = first[place : place + 3 * length + 1 : length]
        if marks == b"\x47" * 4 and size % length:
            return f"at least {length - size % length:,} bytes"
    return ""


def matroska_end(first: bytes) -> int | None:
    """Where the segment, and so the file, ends; None where its length is left open, as in a live recording."""
    place = 4
    length, width = ebml_number(first, place)
    if length is None:
        return None
    place += width + length  # past the EBML header
    if first[place : place + 4] != b"\x18\x53\x80\x67":
        return None
    length, width = ebml_number(first, place + 4)
    return None if length is None else place + 4 + width + length


def ebml_number(content: bytes, place: int) -> tuple[int | None, int]:
    """A length (None: left open) and the number of bytes that it is written in (RFC 8794, section 4)."""
    if place >= len(content) or not content[place]:
        return None, 1
    width = 9 - content[place].bit_length()  # as many zero bits as stand before the first one, and one more
    all_ones = (1 << 7 * width) - 1
    number = int.from_bytes(content[place : place + width], "big") & all_ones
    return (None if number == all_ones else number), width
