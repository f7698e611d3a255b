"""What a file is that no program can read as a picture or a video, from its first bytes, and what helps."""

import os
from contextlib import suppress
from typing import BinaryIO

FIRST_BYTES = 1024
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands of ISO 23008-12
A_VIDEO = "it is a video: write {'type': 'video', 'video': PATH}"


def hint(file: str | os.PathLike | BinaryIO) -> str:
    """What the file is and what to do, as a part of a message; "" where nothing is known or it cannot be read."""
    with suppress(OSError, ValueError):
        if not hasattr(file, "read"):
            with open(file, "rb") as opened:
                return what_it_is(opened.read(FIRST_BYTES))
        file.seek(0)
        return what_it_is(file.read(FIRST_BYTES))
    return ""


def what_it_is(content: bytes) -> str:
    """The same from the first bytes of a file."""
    if not content.strip(b"\0"):
        return "it holds nothing but zeros: copy or download it again" if content else "it is empty: copy it again"
    text = content.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the file: run git lfs pull"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "it is a web page, as a download gives that failed: fetch the file itself"
    if text.startswith(b"<") and b"<svg" in text:
        return "it is an SVG drawing: save it as PNG"
    if text.startswith((b"{", b"[")):
        return "it is JSON, as a server answers with an error: fetch the file itself"
    return what_container(content)


def what_container(content: bytes) -> str:
    """The same for files that are no text."""
    if content.startswith(b"%PDF"):
        return "it is a PDF: save its pages as PNG, one item each (pdftoppm -png FILE PAGE)"
    if content[4:8] == b"ftyp":
        return "it is a HEIC photo: save it as JPEG" if content[8:12] in HEIC else A_VIDEO
    if content.startswith(b"\x1a\x45\xdf\xa3") or (content.startswith(b"RIFF") and content[8:12] == b"AVI "):
        return A_VIDEO
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf")):
        return "it is an archive: unpack it"
    if content[128:132] == b"DICM":
        return "it is a DICOM file: save its picture as PNG of 8 bits"
    return ""
