"""DICOM bytes -> the 8-bit picture that a viewer shows, and whose it is as an opaque token.

Only the elements that make the picture are read; a patient's name never enters memory. No value of
a file is ever put into a message, as it may be a name.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import secrets
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from edgekd.data import limits
from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
INSTALL = "pip install 'edgekd[dicom]'"
DECODERS = "pip install 'edgekd[dicom-jpeg]'"
_KEY = secrets.token_bytes(32)  # of this process: a token cannot be guessed back to a patient id
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
           "BitsStored", "PixelRepresentation")  # fmt: skip
_DIRECTORY = "1.2.840.10008.1.3.10"  # media storage directory, a DICOMDIR
_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_TABLES = [
    f"{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue", "Alpha")
    for part in ("Descriptor", "Data")
]
_TAGS = ("SOPClassUID", *_NEEDED, *_FRAMES, *_TABLES,
         *(f"Segmented{t}" for t in _TABLES if t.endswith("Data")),
         "HighBit", "PlanarConfiguration", "NumberOfFrames", "PixelData", "FloatPixelData",
         "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
         "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence",
         "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue",
         "PixelPaddingRangeLimit")  # fmt: skip
# pydicom and its decoders have no base class of errors: a malformed file raises whatever the
# parser stumbles on, and `_broken` what is pydicom's own.
_BROKEN = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError,
           ArithmeticError, struct.error, zlib.error)  # fmt: skip


class Facts(NamedTuple):
    """What a file says about its image besides the pixels."""

    patient: str  # opaque, of this process alone; "": no patient id
    has_window: bool  # grey levels are the file's own, not stretched from darkest to brightest
    burned_in: str  # BurnedInAnnotation: "YES", "NO", or "" where the file does not say


def is_dicom(data: bytes) -> bool:
    """Whether the bytes have the mark of a DICOM file (PS3.10, 7.1)."""
    return data[128:132] == b"DICM"


def looks_like(path: Path) -> bool:
    """Whether a file's suffix or first bytes say DICOM; many archives give no suffix at all."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not path.is_file():  # opening a pipe waits for its other end
            return False
        with path.open("rb") as f:
            return is_dicom(f.read(132))
    except OSError:
        return False


def decode(data: bytes, most_pixels: int) -> Image.Image:
    """The picture in a DICOM file, 8 bit, mode L or RGB, as PS3.3 C.7.6.3, C.11.1 and C.11.2 say.

    Grey: modality LUT or rescale, then VOI LUT, else the first window, else 8-bit values as they
    are, else from the image's darkest to its brightest value; MONOCHROME1 inverted, padding black.
    EdgeKDError with the reason alone: not one frame of 8-bit colour or of grey, more than
    `most_pixels`, without a decoder, or broken.
    """
    ds = _read(data, _TAGS)
    try:
        _check(ds, most_pixels)
        pixels = _stored(ds)
        photometric = ds.PhotometricInterpretation
        if photometric in _MONOCHROME:
            return Image.fromarray(_grey(ds, pixels))
        if photometric == "PALETTE COLOR":
            pixels = _palette(ds, pixels)
        return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    except _broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None


def facts(data: bytes) -> Facts:
    """Patient, window and burned-in text of a DICOM file; EdgeKDError as `decode`."""
    tags = ["PatientID", "IssuerOfPatientID", "BurnedInAnnotation", "BitsStored", "WindowCenter",
            "WindowWidth", "VOILUTSequence", "PhotometricInterpretation", "RescaleSlope",
            "RescaleIntercept", "ModalityLUTSequence"]  # fmt: skip
    ds = _read(data, tags, stop_before_pixels=True)
    try:
        patient = str(ds.get("PatientID") or "").strip()
        issuer = str(ds.get("IssuerOfPatientID") or "").strip()
        token = hashlib.blake2b(f"{issuer}\0{patient}".encode("utf-8", "replace"), key=_KEY)
        return Facts(
            patient=token.hexdigest() if patient else "",
            has_window=ds.get("PhotometricInterpretation") not in _MONOCHROME
            or _display_ready(ds)
            or _is_windowed(ds),
            burned_in=str(ds.get("BurnedInAnnotation") or "").strip().upper(),
        )
    except _broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None


def elements(data: bytes, keywords: Sequence[str]) -> dict[str, Any]:
    """Values of a DICOM file by keyword, text decoded; what it lacks is left out.

    EdgeKDError as `decode`, and for what is neither text nor a number.
    """
    ds = _read(data, ["SpecificCharacterSet", *keywords], stop_before_pixels=True)
    try:
        return {k: _plain(ds[k].value, k) for k in keywords if k in ds}
    except _broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None


def syntaxes() -> list[str]:
    """UIDs of the transfer syntaxes whose pixels can be decoded here."""
    _pydicom()
    from pydicom import uid
    from pydicom.pixels import get_decoder

    plain = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian,
             uid.DeflatedExplicitVRLittleEndian]  # fmt: skip
    packed = [uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless,
              uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless,
              uid.JPEG2000]  # fmt: skip
    usable = [s for s in packed if _plugin(s) in get_decoder(s).available_plugins]
    return [str(s) for s in (*plain, *usable)]


def _plugin(syntax: str) -> str:
    """The package that decodes a compressed transfer syntax: always the same one."""
    return "pydicom" if syntax == "1.2.840.10008.1.2.5" else "pylibjpeg"  # RLE


def _plain(value: Any, keyword: str) -> Any:
    """A value without the character set that it came in."""
    from pydicom.multival import MultiValue
    from pydicom.valuerep import PersonName

    if isinstance(value, MultiValue):
        return [_plain(v, keyword) for v in value]
    if isinstance(value, (str, PersonName)):
        return str(value)
    if value is None or isinstance(value, (int, float)):
        return value
    raise EdgeKDError(f"DICOM with a {keyword} that is no text: export it again")


@functools.cache
def _pydicom() -> Any:
    """The package, told not to speak: its warnings quote values."""
    try:
        import pydicom
    except ModuleNotFoundError:
        raise EdgeKDError(f"a DICOM file needs pydicom: {INSTALL}") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


@functools.cache
def _broken() -> tuple[type[Exception], ...]:
    """What a malformed file may raise."""
    _pydicom()
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return *_BROKEN, BytesLengthException, InvalidDicomError


def _read(data: bytes, tags: Sequence[str], *, stop_before_pixels: bool = False) -> Dataset:
    """The elements `tags` of a file."""
    if not data:
        raise EdgeKDError("empty file")
    if not is_dicom(data):
        raise EdgeKDError("not a DICOM file (no DICM mark at byte 128): export it again")
    limits.check_inflated(data)
    try:
        return _pydicom().dcmread(
            io.BytesIO(data), specific_tags=list(tags), stop_before_pixels=stop_before_pixels
        )
    except _broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None


def _check(ds: Dataset, most_pixels: int) -> None:
    """EdgeKDError for what is no single image of a kind that is read here."""
    if "FloatPixelData" in ds or "DoubleFloatPixelData" in ds:
        raise EdgeKDError("DICOM with floating-point pixels: export it as integers with a rescale")
    if "PixelData" not in ds:
        kind = ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY
        if not kind:  # pydicom drops every element of a file whose pixels do not end
            raise EdgeKDError("corrupt or truncated DICOM file (no SOPClassUID)")
        raise EdgeKDError("DICOM without pixel data (a report, plan or directory): leave it out")
    if missing := [k for k in _NEEDED if ds.get(k) is None]:
        raise EdgeKDError(f"DICOM without {', '.join(missing)}: export it again")
    if not getattr(ds.file_meta, "TransferSyntaxUID", None):
        raise EdgeKDError("DICOM without a transfer syntax: export it again")
    if (frames := int(ds.get("NumberOfFrames") or 1)) != 1:
        raise EdgeKDError(f"DICOM of {frames} frames, one is expected: split it, or leave it out")
    if any(k in ds for k in _FRAMES):  # their windows and rescales lie in sequences of their own
        raise EdgeKDError("enhanced DICOM (functional groups): convert it to a classic image")
    if (size := int(ds.Rows) * int(ds.Columns)) > most_pixels:
        limit = most_pixels // 1_000_000
        raise EdgeKDError(f"{size / 1e6:.0f} megapixels, more than {limit}; scale it down")
    photometric, samples = ds.PhotometricInterpretation, int(ds.SamplesPerPixel)
    known = (*_MONOCHROME, *_COLOUR, "PALETTE COLOR")
    if photometric not in known:
        raise EdgeKDError(f"DICOM of a photometric interpretation other than {', '.join(known)}")
    if samples != (3 if photometric in _COLOUR else 1):
        raise EdgeKDError(f"DICOM of {samples} samples a pixel, which is not {photometric}")
    if photometric in _COLOUR and ds.BitsAllocated != 8:
        raise EdgeKDError(f"DICOM colour of {ds.BitsAllocated} bits a sample, 8 are read")


def _stored(ds: Dataset) -> np.ndarray:
    """(H, W) integers, or (H, W, 3) RGB: decoded always by the same package, so the same."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = ds.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise EdgeKDError(
            f"DICOM in {syntax.name}, which no decoder reads: export it again"
        ) from None
    plugin = ""
    if syntax.is_encapsulated:
        plugin = _plugin(syntax)
        if plugin not in decoder.available_plugins:
            raise EdgeKDError(f"DICOM in {syntax.name} needs pylibjpeg: {DECODERS}")
        if plugin == "pylibjpeg":
            limits.check_frame(_frame(ds), int(ds.Rows), int(ds.Columns))
    pixels = pixel_array(ds, decoding_plugin=plugin)
    if pixels.shape[:2] != (ds.Rows, ds.Columns):
        raise EdgeKDError("corrupt DICOM file: its pixels are not of the size that it states")
    return pixels


def _frame(ds: Dataset) -> bytes:
    """The compressed stream of the one frame."""
    from pydicom.encaps import get_frame

    return get_frame(ds.PixelData, 0, number_of_frames=1)


def _palette(ds: Dataset, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 4) uint8: the colours of indices."""
    from pydicom.pixels import apply_color_lut

    colours = apply_color_lut(pixels, ds)
    return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)


def _grey(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of stored values: what is to be seen, black the background."""
    values = stored
    if ds.get("ModalityLUTSequence"):
        values, _ = _lookup(ds, ds.ModalityLUTSequence[0], stored)
    elif ds.get("RescaleSlope") is not None:
        slope = _number(ds, "RescaleSlope")
        if slope == 0:
            raise EdgeKDError("DICOM with RescaleSlope 0: export it again")
        values = stored * slope + _number(ds, "RescaleIntercept", 0.0)
    padding = _padding(ds, stored)
    shown = _shown(ds, values, padding)  # (H, W) float, 0 to 1
    if ds.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    shown = np.where(padding, 0, shown)
    return np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)


def _shown(ds: Dataset, values: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """(H, W) float in 0 to 1: values by VOI LUT, window, their own range or the image's."""
    if ds.get("VOILUTSequence"):
        levels, bits = _lookup(ds, ds.VOILUTSequence[0], values)
        return levels / (2.0**bits - 1)
    if _is_windowed(ds):
        function = str(ds.get("VOILUTFunction") or "LINEAR")
        return window(values, _number(ds, "WindowCenter"), _number(ds, "WindowWidth"), function)
    if _display_ready(ds):
        lowest = -(2.0 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0.0
        return (values - lowest) / (2.0**ds.BitsStored - 1)
    seen = values[~padding] if (~padding).any() else values
    low, high = float(seen.min()), float(seen.max())
    return (values - low) / (high - low) if high > low else np.zeros(values.shape)


def window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Of the shape of `values`, float in 0 to 1: PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if not width > 0 or (function == "LINEAR" and width < 1):
        raise EdgeKDError("DICOM with a WindowWidth that is too small: export it with its window")
    x = np.asarray(values, np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((x - center) / width + 0.5, 0, 1)
    if function != "LINEAR":
        raise EdgeKDError("DICOM with a VOILUTFunction other than LINEAR, LINEAR_EXACT, SIGMOID")
    if width == 1:
        return (x > center - 0.5).astype(np.float64)
    return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _lookup(ds: Dataset, item: Dataset, values: np.ndarray) -> tuple[np.ndarray, int]:
    """(table's entry for each value, bits of an entry): PS3.3 C.11.1.1.1.

    pydicom 3's `apply_voi` keeps the index in the entries' type, so a table from 12 to 8 bit wraps.
    """
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = count or 2**16
    table: Any = item.LUTData
    if isinstance(table, bytes):
        order = "<" if ds.original_encoding[1] else ">"
        packed = bits == 8 and len(table) in (count, count + 1)  # a byte an entry, padded to even
        table = np.frombuffer(table, "u1" if packed else f"{order}u2")
    entries = np.atleast_1d(np.asarray(table))[:count].astype(np.int64) & (2**bits - 1)
    if len(entries) < count:
        raise EdgeKDError(f"corrupt DICOM file: a table of {len(entries)} entries states {count}")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return entries[index], bits


def _padding(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: what is not image (PS3.3 C.7.5.1.1.2)."""
    if ds.get("PixelPaddingValue") is None:
        return np.zeros(stored.shape, bool)
    ends = [
        int(ds.PixelPaddingValue),
        int(ds.get("PixelPaddingRangeLimit") or ds.PixelPaddingValue),
    ]
    return (stored >= min(ends)) & (stored <= max(ends))


def _is_windowed(ds: Dataset) -> bool:
    """Whether the file says which values to show."""
    stated = all(ds.get(k) not in (None, "", []) for k in ("WindowCenter", "WindowWidth"))
    return stated or bool(ds.get("VOILUTSequence"))


def _display_ready(ds: Dataset) -> bool:
    """Whether stored values are grey levels already: 8 bit at most, and nothing maps them."""
    mapped = ds.get("ModalityLUTSequence") or ds.get("RescaleSlope", 1) != 1
    return ds.BitsStored <= 8 and not mapped and not ds.get("RescaleIntercept")


def _number(ds: Dataset, keyword: str, default: float | None = None) -> float:
    """The first value of an element; EdgeKDError if it is no finite number."""
    value = ds.get(keyword)
    if value is None and default is not None:
        return default
    try:
        number = float(value[0] if isinstance(value, (list, Sequence)) else value)
    except (TypeError, ValueError, LookupError):
        number = float("nan")
    if not np.isfinite(number):
        raise EdgeKDError(f"DICOM with a {keyword} that is no number: export it again")
    return number
