"""Whether a media file is all there, seen from its length and its first and last bytes, nothing decoded.

An upload or a download that was cut keeps its header, so that its size in pixels reads well and only decoding fails, in
the middle of a run. Here the end is looked at where headers are read. A file that looks cut may still decode (cameras
put things behind the end of a JPEG, some programs leave the last mark out): `vision.open_whole_image` then decodes it.
"""

import os
from typing import BinaryIO

FIRST_BYTES = 2**12  # enough for the header of any container
TAIL = 64  # bytes; padding with zeros may be longer, and is then looked at as the whole file
PACKETS = {188: 0, 192: 4}  # bytes of a packet of MPEG-TS, and where its mark stands; the second is M2TS


# ---- images ---------------------------------------------------------------------------------------------------------


def image_looks_whole(file: BinaryIO, kind: str) -> bool:
    """Whether the end of an image file of Pillow's format `kind` is there; True for formats whose end tells nothing.

    A few bytes are read, unless they do not tell: then the file is walked through. `file` stays where it stands.
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
    file.seek(max(0, start))
    return file.read(count)


def jpeg_looks_whole(file: BinaryIO, size: int) -> bool:
    """The mark EOI at the end, zeros after it apart, or somewhere after the start of the first scan.

    Before the scan a thumbnail may hold an EOI of its own, so segments are passed by their lengths; within a scan 0xff
    is always followed by 0x00 or a mark.
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
    """The chunk IEND at the end, or after chunks that are all there: things may follow it."""
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
    """As long as the RIFF header says."""
    return int.from_bytes(part(file, 4, 4), "little") + 8 <= size


def gif_looks_whole(file: BinaryIO, size: int) -> bool:
    """The trailer at the end."""
    return part(file, size - TAIL, TAIL).rstrip(b"\0").endswith(b"\x3b")


# ---- videos ---------------------------------------------------------------------------------------------------------


def missing_of_video(first: bytes, size: int) -> str:
    """What is missing at the end of a video file, from its first bytes and its length in bytes; empty: nothing known.

    Matroska and WebM say how long they are, AVI too; MPEG-TS is made of packets of one length. (MP4 and MOV keep an
    index: without it they cannot be read, and what it promises is compared with what is there by VideoReader.)
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
    """A length (None: left open) and how many bytes it takes (RFC 8794, section 4)."""
    if place >= len(content) or not content[place]:
        return None, 1
    width = 9 - content[place].bit_length()
    number = int.from_bytes(content[place : place + width], "big") & ((1 << 7 * width) - 1)
    return (None if number == (1 << 7 * width) - 1 else number), width
