"""Bytes -> pixels -> what a model sees: the only preprocessing, on the workstation and the device.

numpy and Pillow, pydicom where a file is DICOM; no torch.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from edgekd.data import dicom, limits
from edgekd.records import EdgeKDError, Spec

MIN_SIDE = 16  # pixels
MAX_PIXELS = 64_000_000
_LEVELS, _OUTLIERS = 8, 0.01  # of 256; share of the pixels that may be darker, or brighter
FLAT = f"almost no contrast: {1 - 2 * _OUTLIERS:.0%} of the pixels lie within {_LEVELS} grey levels"
_WINDOW = "convert it to 8 bit with the window you want, 16 bits are not scaled by guess"
_DEEP = ("I", "F")  # Pillow's modes of more than 8 bits a channel start so
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError)
# Of compressed text Pillow unpacks 1 MB, of all text 64: a slide scanner's profile is larger. No
# more than 64 MB of either, which are let go of with the image.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_TEXT = ("MAX_TEXT", "text chunks")  # what Pillow says then
_UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Quiet:
    """No warnings while any thread is inside: Python's warning filters belong to all of them."""

    def __init__(self) -> None:
        self._turn, self._inside = threading.Lock(), 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._turn:
            self._inside += 1
            if self._inside == 1:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._inside -= 1
            if self._inside == 0:
                self._before.__exit__(None, None, None)


quiet = _Quiet()  # EXIF entries may be broken in a good image, and pydicom's warnings quote values


def prepare(image: Path | bytes | BinaryIO | Image.Image, spec: Spec) -> np.ndarray:
    """(3, H, W) float32: the image as a model of `spec` takes it. The only preprocessing."""
    return normalise(pixels(image, spec)[None], spec)[0]


def pixels(
    image: Path | bytes | BinaryIO | Image.Image, spec: Spec, most_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """(H, W, 3) uint8: decoded, upright, in the colours and the size of `spec`.

    EdgeKDError if it is not an 8-bit JPEG or PNG image, a DICOM image, or a Pillow image, that can
    be read whole, or if it has more than `most_pixels`.
    """
    return fitted(decoded(image, most_pixels), spec)


def fitted(image: Image.Image, spec: Spec) -> np.ndarray:
    """(H, W, 3) uint8: a decoded image in the colours and the size of `spec`."""
    seen = image.convert("L" if spec.channels == "grey" else "RGB")
    return np.asarray(_fit(seen, spec, Image.Resampling.BILINEAR).convert("RGB"))


def is_flat(image: Image.Image) -> bool:
    """Whether a decoded image is nearly of one grey level: `FLAT` says it in words."""
    few = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST)).reshape(256, -1)
    levels = np.sort(few, axis=0).astype(int)
    if (levels[-26] - levels[25] >= 4 * _LEVELS).any():  # far from it: most images, in no time
        return False
    counts = np.reshape(image.histogram(), (-1, 256))  # a channel each
    shares = counts.cumsum(1) / counts.sum(1, keepdims=True)
    low, high = (shares <= _OUTLIERS).sum(1), (shares < 1 - _OUTLIERS).sum(1)
    return bool((high - low < _LEVELS).all())


def mask(path: Path, spec: Spec) -> np.ndarray:
    """(H, W) bool, cut and scaled as `pixels` does with the image: half a pixel's area decides.

    In a PNG file all that is not black is inside; in a JPEG, which blurs edges, 128 and above.
    """
    whole = Image.fromarray(inside(path).astype(np.uint8) * 255)
    return np.asarray(_fit(whole, spec, Image.Resampling.BOX)) >= 128


def inside(path: Path) -> np.ndarray:
    """(H, W) bool: a mask file at its own size."""
    image = np.asarray(decoded(path).convert("L"))
    with path.open("rb") as f:
        least = 128 if f.read(2) == b"\xff\xd8" else 1
    return image >= least


def normalise(pixels: np.ndarray, spec: Spec) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, contiguous: (x / 255 - mean) / std."""
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
    images /= 255
    images -= np.array(spec.mean, np.float32)[:, None, None]
    images /= np.array(spec.std, np.float32)[:, None, None]
    return images


def decoded(
    source: Path | bytes | BinaryIO | Image.Image, most_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The decoded image, mode L or RGB; EdgeKDError naming the file (a DICOM one by its hash)."""
    try:
        if isinstance(source, Image.Image):
            return _plain(source)
        if isinstance(source, Path):
            return decode(read(source), most_pixels)
        return decode(source if isinstance(source, bytes) else source.read(), most_pixels)
    except EdgeKDError as e:
        raise EdgeKDError(f"{_named(source)}: {e}") from None


def _named(source: Path | bytes | BinaryIO | Image.Image) -> str:
    """What an error calls a source; a DICOM file's own name may hold a patient's."""
    if not isinstance(source, Path):
        return "image"
    if not dicom.looks_like(source):
        return str(source)
    try:
        return nickname(source.read_bytes())
    except OSError:
        return "DICOM file"


def _fit(image: Image.Image, spec: Spec, how: Image.Resampling) -> Image.Image:
    """The image at `spec.size`, by its resize rule; one resampling, nothing cut at whole pixels."""
    height, width = spec.size
    if spec.resize == "stretch":
        return image.resize((width, height), how)
    scales = width / image.width, height / image.height
    if spec.resize == "crop":
        w, h = width / max(scales), height / max(scales)  # what is kept, in source pixels
        left, top = (image.width - w) / 2, (image.height - h) / 2
        # Rounding may put an edge 1e-14 outside, which Pillow refuses.
        box = max(left, 0), max(top, 0), min(left + w, image.width), min(top + h, image.height)
        return image.resize((width, height), how, box=box)
    w, h = (max(1, round(side * min(scales))) for side in image.size)
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image.resize((w, h), how), ((width - w) // 2, (height - h) // 2))
    return canvas


def nickname(data: bytes) -> str:
    """'DICOM file 3fa29c1b04de': the sha256 of its bytes; `sha256sum * | grep 3fa29c1b04de`."""
    return f"DICOM file {hashlib.sha256(data).hexdigest()[:12]}"


def describe(image: Image.Image) -> str:
    """'640 x 480': width x height."""
    return f"{image.width} x {image.height}"


def read(path: Path) -> bytes:
    """A file's bytes; EdgeKDError with the reason alone (the caller knows how to name it)."""
    if path.is_symlink() and not path.exists():
        raise EdgeKDError("broken link")
    if path.exists() and not path.is_file():
        raise EdgeKDError("not a file")
    try:
        return path.read_bytes()
    except OSError as e:
        raise EdgeKDError(f"cannot be read: {e.strerror}") from None


def decode(data: bytes, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright image in mode L or RGB; EdgeKDError with the reason alone.

    DICOM goes to pydicom (`dicom.decode`). Pillow's JPEG and PNG readers are called directly: no
    other format is tried, and the header's size is judged here, before decoding, instead of by
    Pillow's warnings.
    """
    if not data:
        raise EdgeKDError("empty file")
    if dicom.is_dicom(data):
        with quiet:
            return dicom.decode(data, most_pixels)
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    if not is_png and not data.startswith(b"\xff\xd8"):
        raise EdgeKDError("not a JPEG, PNG or DICOM image, whatever its name; convert it")
    if is_png and data[24:25] == b"\x10":  # Pillow halves 16-bit colour without a word
        raise EdgeKDError(f"16-bit image: {_WINDOW}")
    if not is_png:
        limits.check_scans(data)
    open_file = PngImagePlugin.PngImageFile if is_png else JpegImagePlugin.JpegImageFile
    try:
        with quiet:
            image = open_file(io.BytesIO(data))
        if image.width * image.height > most_pixels:
            limit = most_pixels // 1_000_000
            raise EdgeKDError(
                f"{describe(image)} pixels, more than {limit} megapixels; scale it down"
            )
        return _plain(image)
    except _BROKEN as e:
        if any(words in str(e) for words in _TEXT):
            most = PngImagePlugin.MAX_TEXT_MEMORY >> 20
            raise EdgeKDError(f"PNG of more than {most} MB of text: save it without") from None
        raise EdgeKDError(f"corrupt or truncated image: {e}") from None


def _plain(image: Image.Image) -> Image.Image:
    """The image upright and in mode L or RGB; what is transparent becomes black."""
    if image.mode.startswith(_DEEP):
        raise EdgeKDError(f"image of mode {image.mode}, more than 8 bits a channel: {_WINDOW}")
    image.load()
    with quiet:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.new("RGBA", over.size, (0, 0, 0, 255))
        image.alpha_composite(over)
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image if turn is None else image.transpose(turn)
