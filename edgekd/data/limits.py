"""How much is in a compressed image, before it is decoded: a small file may hold gigabytes.

Only what a header states is read: the decoders allocate first and compare afterwards.
"""

from __future__ import annotations

import re
import struct
import zlib

from edgekd.data import streams
from edgekd.data.streams import Stream
from edgekd.records import EdgeKDError

SCANS = 100  # of a progressive JPEG; cameras write 10. Each goes over all pixels again
INFLATED = 256 << 20  # bytes of a deflated DICOM file
DEFLATED = b"1.2.840.10008.1.2.1.99"  # its transfer syntax
_PIECE = 16 << 20
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # of a segment, or of the end; in compressed
# data 0xFF is followed by 0 or by a restart marker
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")


def check_scans(jpeg: bytes) -> None:
    """EdgeKDError for a JPEG stream that goes over its pixels more often than any camera does."""
    # The same bytes may stand in metadata and after the image, where phones put a film: most files
    # have so few that it does not matter.
    if jpeg.count(b"\xff\xda") > SCANS and (scans := _scans(jpeg)) > SCANS:
        raise EdgeKDError(f"JPEG of {scans} scans, {SCANS} at most are read: save it again")


def _scans(jpeg: bytes) -> int:
    """Scans of a JPEG stream, marker by marker up to its end (ITU-T T.81, B.1)."""
    at, scans = 2, 0
    while (found := _MARKER.search(jpeg, at)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return scans


def check_frame(frame: bytes, rows: int, columns: int) -> Stream:
    """What a compressed DICOM frame states; EdgeKDError unless it is the size its file states."""
    stream = streams.header(frame)
    if stream is None or stream[:2] != (rows, columns):
        wrong = "its pixels are not of the size that it states"
        raise EdgeKDError(f"corrupt or truncated DICOM file ({wrong})")
    if stream.kind == "JPEG":
        check_scans(frame)
    return stream


def check_inflated(dicom: bytes) -> None:
    """EdgeKDError for a deflated DICOM file of more than INFLATED bytes."""
    if DEFLATED not in dicom:
        return
    syntax, at = _file_meta(dicom)
    if syntax != DEFLATED:  # the words stand elsewhere
        return
    inflate, whole, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, dicom[at:]
    try:
        while rest and not inflate.eof:
            whole += len(inflate.decompress(rest, _PIECE))
            rest = inflate.unconsumed_tail
            if whole > INFLATED:
                raise EdgeKDError(f"DICOM of more than {INFLATED >> 20} MB inflated: no image is")
    except zlib.error:
        raise EdgeKDError("corrupt or truncated DICOM file (deflated)") from None


def _file_meta(dicom: bytes) -> tuple[bytes, int]:
    """(transfer syntax, where the data set begins) by PS3.10, 7.1."""
    at, syntax = 132, b""
    try:
        while dicom[at : at + 2] == b"\x02\x00":
            kind = dicom[at + 4 : at + 6]
            if not kind.isalpha():
                raise EdgeKDError("corrupt DICOM file: its file meta information is not explicit")
            long = kind in _LONG
            (length,) = struct.unpack_from("<I" if long else "<H", dicom, at + (8 if long else 6))
            start = at + (12 if long else 8)
            if dicom[at + 2 : at + 4] == b"\x10\x00":
                syntax = dicom[start : start + length].rstrip(b"\0 ")
            at = start + length
    except struct.error:
        raise EdgeKDError("corrupt or truncated DICOM file (file meta information)") from None
    return syntax, at
