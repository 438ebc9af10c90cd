"""The pixels of a DICOM file as they are stored: bits, sign and colour, whatever compressed them.

pydicom and its decoders give the cells alone. What a cell means is told here, for all of them
alike, by BitsStored, HighBit and PixelRepresentation (PS3.5, 8.1.1), and by what a compressed
stream says of itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgekd.data import limits
from edgekd.data.dicom_elements import text, whole
from edgekd.data.streams import Stream
from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DECODERS = "pip install 'edgekd[dicom-jpeg]'"
GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
_COLOUR = {  # what the components are; MCT: what JPEG 2000 makes of RGB, and a decoder undoes
    "RGB": "RGB", "YBR_FULL": "YBR", "YBR_FULL_422": "YBR", "YBR_ICT": "MCT", "YBR_RCT": "MCT",
}  # fmt: skip
_CELLS = (1, 8, 16, 32)  # bits


class Layout(NamedTuple):
    """What a file states of its pixels."""

    rows: int
    columns: int
    samples: int  # a pixel
    photometric: str
    planar: int
    allocated: int  # bits of a cell
    stored: int  # bits of a value
    shift: int  # bits below a value
    signed: bool

    @property
    def range(self) -> tuple[int, int]:
        """The least and the greatest value that can be."""
        low = -(2 ** (self.stored - 1)) if self.signed else 0
        return low, low + 2**self.stored - 1


class Bits(NamedTuple):
    """Where in a decoded cell its value lies."""

    width: int
    shift: int
    signed: bool
    doubtful: bool = False  # stream and file disagree on what the highest of them means


class Cells(NamedTuple):
    """Decoded pixels and how to read them: `values(cells.stored, cells.bits)`."""

    stored: np.ndarray  # (H, W) unsigned integers
    bits: Bits


def layout(ds: Dataset, most_pixels: int) -> Layout:
    """What a file states of its pixels; EdgeKDError for what cannot be, or is not read here."""
    photometric, samples = text(ds, "PhotometricInterpretation"), whole(ds, "SamplesPerPixel")
    known = (*GREY, *_COLOUR, PALETTE)
    if photometric not in known:
        raise EdgeKDError(f"DICOM of a photometric interpretation other than {', '.join(known)}")
    colour = photometric in _COLOUR
    if samples != (3 if colour else 1):
        raise EdgeKDError(f"DICOM of {samples} samples a pixel, which is not {photometric}")
    rows, columns = whole(ds, "Rows"), whole(ds, "Columns")
    if min(rows, columns) < 1:
        raise EdgeKDError(f"DICOM of {rows} Rows and {columns} Columns: export it again")
    if rows * columns > most_pixels:
        limit = most_pixels // 1_000_000
        size = rows * columns / 1e6
        raise EdgeKDError(f"{size:.0f} megapixels, more than {limit}; scale it down")
    allocated, stored = whole(ds, "BitsAllocated"), whole(ds, "BitsStored")
    high, signed = whole(ds, "HighBit", stored - 1), whole(ds, "PixelRepresentation")
    if colour and allocated != 8:
        raise EdgeKDError(f"DICOM colour of {allocated} bits a sample, 8 are read")
    if allocated not in _CELLS:
        raise EdgeKDError(f"DICOM with BitsAllocated {allocated}: 1, 8, 16 and 32 are read")
    if not 1 <= stored <= allocated or (colour and stored != 8):
        raise EdgeKDError(
            f"DICOM with BitsStored {stored} of BitsAllocated {allocated}: export it again"
        )
    if not stored - 1 <= high < allocated:
        raise EdgeKDError(
            f"DICOM with HighBit {high}, which is not possible with BitsStored {stored} of "
            f"BitsAllocated {allocated}: export it with HighBit {stored - 1}"
        )
    if signed not in (0, 1):
        raise EdgeKDError(f"DICOM with PixelRepresentation {signed}, 0 or 1 are read")
    return Layout(
        rows=rows, columns=columns, samples=samples, photometric=photometric,
        planar=whole(ds, "PlanarConfiguration", -1), allocated=allocated, stored=stored,
        shift=high + 1 - stored, signed=bool(signed),
    )  # fmt: skip


def plugin(syntax: str) -> str:
    """The package that decodes a compressed transfer syntax: always the same one."""
    return "pydicom" if syntax == "1.2.840.10008.1.2.5" else "pylibjpeg"  # RLE


def cells(ds: Dataset, stated: Layout) -> Cells:
    """(H, W) cells of grey levels or of indices of a palette."""
    found, stream = _decoded(ds, stated)
    if stream is not None and stream.bits > stated.allocated:
        raise EdgeKDError(
            f"DICOM with BitsAllocated {stated.allocated} whose {stream.kind} stream holds "
            f"{stream.bits} bits: export it again"
        )
    made = Cells(found.astype(found.dtype.newbyteorder("="), copy=False), _bits(stated, stream))
    _check_bits(made, stated)
    return made


def values(stored: np.ndarray, bits: Bits) -> np.ndarray:
    """Of the shape of `stored`, integers: what its cells mean, other bits of them left out."""
    size = 8 * stored.dtype.itemsize
    if bits.signed:
        up = (stored << (size - bits.width - bits.shift)).view(f"i{size // 8}")
        return up >> (size - bits.width)
    down = stored >> bits.shift if bits.shift else stored
    return down & (2**bits.width - 1) if bits.width + bits.shift < size else down


def colours(ds: Dataset, stated: Layout) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a colour image."""
    native = not ds.file_meta.TransferSyntaxUID.is_encapsulated
    full = stated.rows * stated.columns * 3
    if native and stated.photometric == "YBR_FULL_422" and len(ds.PixelData or b"") >= full:
        raise EdgeKDError(
            "DICOM of PhotometricInterpretation YBR_FULL_422 whose pixels have three bytes each: "
            "state YBR_FULL or RGB, whichever they are"
        )
    if native and stated.planar not in (0, 1):
        raise EdgeKDError("DICOM colour without PlanarConfiguration 0 or 1: export it again")
    found, stream = _decoded(ds, stated)
    if stream is not None and (stream.bits != 8 or stream.signed):
        raise EdgeKDError(
            f"DICOM colour whose {stream.kind} stream is not of 8 unsigned bits: export it again"
        )
    if _components(stated.photometric, stream) == "YBR":
        from pydicom.pixels import convert_color_space

        found = convert_color_space(found, "YBR_FULL", "RGB")
    return np.ascontiguousarray(found)


def _components(photometric: str, stream: Stream | None) -> str:
    """What decoded colours are, "RGB" or "YBR"; a stream knows better than the file around it."""
    label, held = _COLOUR[photometric], "" if stream is None else stream.colour
    if held == "MCT" and label != "YBR":
        return "RGB"
    if held in ("RGB", "YBR"):
        return held
    if held or label == "MCT":
        kind = "pixels have" if stream is None else f"{stream.kind} stream has"
        raise EdgeKDError(
            f"DICOM of PhotometricInterpretation {photometric} whose {kind} "
            f"{'a' if held else 'no'} colour transform: state what the components are"
        )
    return label


def _decoded(ds: Dataset, stated: Layout) -> tuple[np.ndarray, Stream | None]:
    """((H, W) or (H, W, 3) unsigned cells, what their stream says): always by the same package."""
    from pydicom.pixels import get_decoder

    syntax = ds.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise EdgeKDError(
            f"DICOM in {syntax.name}, which no decoder reads: export it again"
        ) from None
    chosen, stream = "", None
    allocated, planar = stated.allocated, max(stated.planar, 0)
    if syntax.is_encapsulated:
        chosen = plugin(syntax)
        if chosen not in decoder.available_plugins:
            raise EdgeKDError(f"DICOM in {syntax.name} needs pylibjpeg: {DECODERS}")
        if chosen == "pylibjpeg":
            stream = _stream(ds, stated)
            allocated = 8 if stream.bits <= 8 else 16 if stream.bits <= 16 else 32
            planar = 0  # whatever the file states: these decoders give pixel by pixel
    else:
        _check_length(len(ds.PixelData or b""), stated)
    options: dict[str, Any] = {
        "pixel_keyword": "PixelData", "pixel_vr": ds["PixelData"].VR, "number_of_frames": 1,
        "rows": stated.rows, "columns": stated.columns, "samples_per_pixel": stated.samples,
        "photometric_interpretation": stated.photometric, "planar_configuration": planar,
        "bits_allocated": allocated, "bits_stored": allocated, "pixel_representation": 0,
        "correct_unused_bits": False, "apply_j2k_sign_correction": False,
        "apply_jls_sign_correction": False,
    }  # fmt: skip
    index = 0 if syntax.is_encapsulated else None
    found, _ = decoder.as_array(
        ds.PixelData, raw=True, index=index, decoding_plugin=chosen, **options
    )
    if found.shape[:2] != (stated.rows, stated.columns):
        raise EdgeKDError("corrupt DICOM file: its pixels are not of the size that it states")
    return found, stream


def _check_length(there: int, stated: Layout) -> None:
    """EdgeKDError for fewer bytes than uncompressed pixels have."""
    samples = 2 if stated.photometric == "YBR_FULL_422" else stated.samples
    needed = -(-stated.rows * stated.columns * samples * stated.allocated // 8)
    if there < needed:
        raise EdgeKDError(
            f"corrupt or truncated DICOM file (PixelData of {there} bytes, {needed} by Rows, "
            "Columns and BitsAllocated)"
        )


def _stream(ds: Dataset, stated: Layout) -> Stream:
    """What the compressed stream of the one frame says; EdgeKDError if the file says otherwise."""
    from pydicom.encaps import get_frame

    frame = get_frame(ds.PixelData, 0, number_of_frames=1)
    stream = limits.check_frame(frame, stated.rows, stated.columns)
    if stream.samples != stated.samples or not stream.bits:
        raise EdgeKDError(
            f"DICOM with SamplesPerPixel {stated.samples} whose {stream.kind} stream holds "
            f"{stream.samples}{'' if stream.bits else ' of several depths'}: export it again"
        )
    return stream


def _bits(stated: Layout, stream: Stream | None) -> Bits:
    """Where a value lies; a stream may hold the whole cells, or the values alone."""
    if stream is None or stream.bits >= stated.shift + stated.stored:
        return Bits(stated.stored, stated.shift, stated.signed)
    if stream.bits > stated.stored:
        raise EdgeKDError(
            f"DICOM with BitsStored {stated.stored} and HighBit {stated.shift + stated.stored - 1} "
            f"whose {stream.kind} stream holds {stream.bits} bits: export it again"
        )
    if stream.bits == stated.stored:
        return Bits(stated.stored, 0, stated.signed)
    if stream.kind == "JPEG":  # it knows no sign: shorter values are positive ones
        return Bits(stream.bits, 0, signed=False)
    return Bits(stream.bits, 0, stated.signed, doubtful=stream.signed != stated.signed)


def _check_bits(made: Cells, stated: Layout) -> None:
    """EdgeKDError for pixels that cannot lie in the bits that are stated."""
    bits = made.bits
    if bits.doubtful and (made.stored >> (bits.width - 1) & 1).any():
        raise EdgeKDError(
            f"DICOM with PixelRepresentation {stated.signed:d} and BitsStored {stated.stored} "
            f"whose stream holds {bits.width} bits of the other sign: export it again"
        )
    if bits.shift and (made.stored & (2**bits.shift - 1)).any():
        lowest = bits._replace(shift=0)
        if (values(made.stored, lowest).astype(made.stored.dtype) == made.stored).all():
            raise EdgeKDError(
                f"DICOM with HighBit {bits.shift + bits.width - 1} whose pixels lie in the "
                f"lowest {bits.width} bits: export it with HighBit {bits.width - 1}"
            )
