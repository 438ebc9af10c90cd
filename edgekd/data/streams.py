"""What the header of a compressed image says: size, samples, bits, sign and colour.

Read by hand, before anything is decoded: the decoders allocate first and compare afterwards, and
do not tell how a stream keeps its colours.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

JP2 = b"\0\0\0\x0cjP  "  # a JP2 file begins with it
_J2K = b"\xff\x4f\xff\x51"  # start of codestream, and SIZ, which comes first
_COD = b"\xff\x52"


class Stream(NamedTuple):
    """A header of JPEG (ISO 10918-1, B.2), JPEG-LS (14495-1, C.2) or JPEG 2000 (15444-1, A)."""

    height: int  # pixels
    width: int
    kind: str  # "JPEG", "JPEG-LS" or "JPEG 2000"
    samples: int  # a pixel
    bits: int  # of a sample
    signed: bool
    colour: (
        str  # "RGB" or "YBR" as the components lie in it; "MCT": a decoder makes RGB; "": unsaid
    )


def header(frame: bytes) -> Stream | None:
    """What a stream states; None: it is none of these three, or torn."""
    try:
        if frame.startswith(JP2):  # a file where the stream alone should be: scanners write it
            frame = _codestream(frame)
        if frame.startswith(_J2K):
            return _jpeg_2000(frame)
        return _jpeg(frame) if frame.startswith(b"\xff\xd8") else None
    except (IndexError, struct.error):
        return None


def _jpeg_2000(frame: bytes) -> Stream:
    """Of SIZ and COD (A.5.1, A.6.1)."""
    width, height, left, top = struct.unpack_from(">4I", frame, 8)
    (samples,) = struct.unpack_from(">H", frame, 40)
    depth = frame[42]
    mixed = any(frame[42 + 3 * i] != depth for i in range(samples))
    at = 2
    while frame[at : at + 2] != _COD:
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return Stream(
        height - top, width - left, "JPEG 2000", samples, 0 if mixed else (depth & 0x7F) + 1,
        bool(depth & 0x80), "MCT" if frame[at + 8] else "",
    )  # fmt: skip


def _jpeg(frame: bytes) -> Stream | None:
    """Of the frame header, and of the application's segments before it."""
    at, jfif, adobe = 2, False, -1
    while frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        length, bits, height, width, samples = struct.unpack_from(">HBHHB", frame, at + 2)
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            parts = [frame[at + 10 + 3 * i : at + 12 + 3 * i] for i in range(samples)]
            kind = "JPEG-LS" if marker == 0xF7 else "JPEG"
            colour = _colour(parts, jfif, adobe) if samples == 3 else ""
            return Stream(height, width, kind, samples, bits, False, colour)
        body = frame[at + 4 : at + 2 + length]
        jfif = jfif or (marker == 0xE0 and body.startswith(b"JFIF\0"))
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) > 11:
            adobe = body[11]
        at += 2 + length
    return None


def _colour(parts: list[bytes], jfif: bool, adobe: int) -> str:
    """What three components are, as libjpeg and pydicom find out: ids, JFIF, Adobe's transform.

    parts: id and sampling factors of each. RGB is never subsampled.
    """
    if bytes(p[0] for p in parts) in (b"RGB", b"rgb"):
        return "RGB"
    if jfif or len({p[1] for p in parts}) > 1 or adobe == 1:
        return "YBR"
    return "RGB" if adobe == 0 else ""


def _codestream(jp2: bytes) -> bytes:
    """The JPEG 2000 stream in a JP2 file, found as decoders do: box by box (ISO 15444-1, I.4)."""
    at = 0
    while True:
        length, kind = struct.unpack_from(">I4s", jp2, at)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", jp2, at + 8)
            head = 16
        if kind == b"jp2c":
            return jp2[at + head :]
        if length < head:  # 0: to the end of the file
            return b""
        at += length
