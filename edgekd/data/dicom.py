"""DICOM bytes -> the 8-bit picture that a viewer shows, and whose it is as an opaque token.

Only the elements that make the picture are read; a patient's name never enters memory. No value of
a file is ever put into a message, as it may be a name.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from edgekd.data import dicom_elements, dicom_grey, dicom_pixels, limits
from edgekd.data.dicom_elements import broken, numbers, text, whole
from edgekd.data.dicom_pixels import Layout
from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
_KEY = secrets.token_bytes(32)  # of this process: a token cannot be guessed back to a patient id
_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
           "BitsStored", "PixelRepresentation")  # fmt: skip
_DIRECTORY = "1.2.840.10008.1.3.10"  # media storage directory, a DICOMDIR
_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_TABLES = [
    f"{segmented}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
_SQUARE = 0.01  # pixels that are longer than wide by less are square
_LONGEST = 10  # times as long as wide: more is no image
_TAGS = ("SOPClassUID", *_NEEDED, *_FRAMES, *_TABLES, *_SPACINGS,
         "HighBit", "PlanarConfiguration", "NumberOfFrames", "PixelData", "FloatPixelData",
         "DoubleFloatPixelData", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
         "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue",
         "PixelPaddingRangeLimit")  # fmt: skip


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
    Pixels that are longer than wide are made square. EdgeKDError with the reason alone: not one
    frame of 8-bit colour or of grey, more than `most_pixels`, without a decoder, or broken.
    """
    ds = _read(data, _TAGS)
    try:
        _check(ds)
        stated = dicom_pixels.layout(ds, most_pixels)
        size = _square(ds, stated, most_pixels)
        if stated.photometric in dicom_pixels.GREY:
            pixels = dicom_grey.grey(ds, stated, dicom_pixels.cells(ds, stated))
        elif stated.photometric == dicom_pixels.PALETTE:
            pixels = dicom_grey.colour(ds, stated, dicom_pixels.cells(ds, stated))
        else:
            pixels = dicom_pixels.colours(ds, stated)
    except broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None
    image = Image.fromarray(pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def facts(data: bytes) -> Facts:
    """Patient, window and burned-in text of a DICOM file; EdgeKDError as `decode`."""
    tags = ["PatientID", "IssuerOfPatientID", "BurnedInAnnotation", "BitsStored", "WindowCenter",
            "WindowWidth", "VOILUTSequence", "PhotometricInterpretation", "RescaleSlope",
            "RescaleIntercept", "ModalityLUTSequence"]  # fmt: skip
    ds = _read(data, tags, stop_before_pixels=True)
    try:
        patient, issuer = (
            "\\".join(str(v).strip() for v in dicom_elements.held(ds, k))
            for k in ("PatientID", "IssuerOfPatientID")
        )
        burned_in = text(ds, "BurnedInAnnotation")
        token = hashlib.blake2b(f"{issuer}\0{patient}".encode("utf-8", "replace"), key=_KEY)
        return Facts(
            patient=token.hexdigest() if patient else "",
            has_window=text(ds, "PhotometricInterpretation") not in dicom_pixels.GREY
            or dicom_grey.is_display_ready(ds, whole(ds, "BitsStored"))
            or dicom_grey.is_windowed(ds),
            burned_in=burned_in if burned_in in ("YES", "NO") else "",
        )
    except broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None


def elements(data: bytes, keywords: Sequence[str]) -> dict[str, Any]:
    """Values of a DICOM file by keyword, text decoded; what it lacks is left out.

    EdgeKDError as `decode`, and for what is neither text nor a number.
    """
    ds = _read(data, ["SpecificCharacterSet", *keywords], stop_before_pixels=True)
    try:
        return {k: _copied(ds, k) for k in keywords if k in ds}
    except broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None


def syntaxes() -> list[str]:
    """UIDs of the transfer syntaxes whose pixels can be decoded here."""
    dicom_elements.pydicom()
    from pydicom import uid
    from pydicom.pixels import get_decoder

    plain = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian,
             uid.DeflatedExplicitVRLittleEndian]  # fmt: skip
    packed = [uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless,
              uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless,
              uid.JPEG2000]  # fmt: skip
    usable = [s for s in packed if dicom_pixels.plugin(s) in get_decoder(s).available_plugins]
    return [str(s) for s in (*plain, *usable)]


def _copied(ds: Dataset, keyword: str) -> Any:
    """An element's value; of decimals the numbers, as they are written anew."""
    if ds[keyword].VR == "DS":
        found = numbers(ds, keyword)
        return found[0] if len(found) == 1 else found
    return dicom_elements.plain(ds[keyword].value, keyword)


def _read(data: bytes, tags: Sequence[str], *, stop_before_pixels: bool = False) -> Dataset:
    """The elements `tags` of a file."""
    if not data:
        raise EdgeKDError("empty file")
    if not is_dicom(data):
        raise EdgeKDError("not a DICOM file (no DICM mark at byte 128): export it again")
    limits.check_inflated(data)
    try:
        ds: Dataset = dicom_elements.pydicom().dcmread(
            io.BytesIO(data), specific_tags=list(tags), stop_before_pixels=stop_before_pixels
        )
    except broken() as e:
        raise EdgeKDError(f"corrupt or truncated DICOM file ({type(e).__name__})") from None
    return ds


def _check(ds: Dataset) -> None:
    """EdgeKDError for what is no single image of a kind that is read here."""
    if "FloatPixelData" in ds or "DoubleFloatPixelData" in ds:
        raise EdgeKDError("DICOM with floating-point pixels: export it as integers with a rescale")
    if "PixelData" not in ds:
        kind = ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY
        if not kind:  # pydicom drops every element of a file whose pixels do not end
            raise EdgeKDError("corrupt or truncated DICOM file (no SOPClassUID)")
        raise EdgeKDError("DICOM without pixel data (a report, plan or directory): leave it out")
    if missing := [k for k in _NEEDED if not dicom_elements.held(ds, k)]:
        raise EdgeKDError(f"DICOM without {', '.join(missing)}: export it again")
    if not getattr(ds.file_meta, "TransferSyntaxUID", None):
        raise EdgeKDError("DICOM without a transfer syntax: export it again")
    if (frames := whole(ds, "NumberOfFrames", 1)) not in (0, 1):  # 0 is written of one
        raise EdgeKDError(f"DICOM of {frames} frames, one is expected: split it, or leave it out")
    if any(k in ds for k in _FRAMES):  # their windows and rescales lie in sequences of their own
        raise EdgeKDError("enhanced DICOM (functional groups): convert it to a classic image")


def _square(ds: Dataset, stated: Layout, most_pixels: int) -> tuple[int, int]:
    """(width, height) at which pixels are square: the finer side of them is kept.

    Of PS3.3 10.7.1.3 and C.7.6.3.1.7: the first of two numbers is of the vertical. A spacing of 0
    is that of an image without one.
    """
    size = stated.columns, stated.rows
    for keyword in _SPACINGS:
        found = numbers(ds, keyword)
        if not any(found):
            continue
        if len(found) != 2 or min(found) <= 0:
            raise EdgeKDError(
                f"DICOM with a {keyword} that is not two numbers above 0: export it again"
            )
        longer = found[0] / found[1]
        if abs(longer - 1) < _SQUARE:
            return size
        if not 1 / _LONGEST <= longer <= _LONGEST:
            raise EdgeKDError(
                f"DICOM with a {keyword} of pixels over {_LONGEST} times as long as wide: export "
                "it again"
            )
        width = round(size[0] * max(1, 1 / longer))
        height = round(size[1] * max(1, longer))
        if width * height > most_pixels:
            limit = most_pixels // 1_000_000
            made = width * height / 1e6
            raise EdgeKDError(
                f"{made:.0f} megapixels when its pixels are made square ({keyword}), more than "
                f"{limit}; scale it down"
            )
        return width, height
    return size
