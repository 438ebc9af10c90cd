"""Stored values -> grey levels or colours, as PS3.3 C.7.6.3, C.11.1 and C.11.2 say.

Each step is a function of a value alone, but for the range of an image that states no window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgekd.data import dicom_pixels
from edgekd.data.dicom_elements import held, number, numbers, text, whole
from edgekd.data.dicom_pixels import Cells, Layout
from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Range = tuple[float, float]  # the least and the greatest value that can be
_COLOURS = ("Red", "Green", "Blue")
_PALE = 1 << 12  # a palette in words up to here holds neither 8 bits nor 16


class Table(NamedTuple):
    """A lookup table: PS3.3 C.11.1.1.1."""

    entries: np.ndarray  # (n,) int64
    first: int  # value that the first entry is for
    bits: int  # of an entry, as stated

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The entry for each value; beyond its ends, the first and the last."""
        # pydicom's `apply_voi` and `apply_color_lut` keep the index in the entries' type, so that a
        # table from 12 to 8 bits wraps.
        index = np.rint(values).astype(np.int64) - self.first
        return np.asarray(self.entries[np.clip(index, 0, len(self.entries) - 1)])


def grey(ds: Dataset, stated: Layout, cells: Cells) -> np.ndarray:
    """(H, W) uint8: what is to be seen, black the background."""
    stored = dicom_pixels.values(*cells)
    values, domain = _modality(ds, stated, stored)
    padding = _padding(ds, stated, cells, stored)
    shown = _shown(ds, stated, values, domain, padding)  # (H, W) float, 0 to 1
    if stated.photometric == "MONOCHROME1":
        shown = 1 - shown
    if padding is not None:
        shown = np.where(padding, 0, shown)
    return np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)


def colour(ds: Dataset, stated: Layout, cells: Cells) -> np.ndarray:
    """(H, W, 3) uint8: the colours of indices."""
    index = dicom_pixels.values(*cells)
    tables = [_palette(ds, stated, name) for name in _COLOURS]
    top = max(int(t.entries.max()) for t in tables)
    if 255 < top < _PALE:
        raise EdgeKDError(
            f"DICOM whose palette holds {top.bit_length()} bits a colour, 8 or 16 are read: "
            "export it again"
        )
    found = np.stack([t(index) for t in tables], axis=-1)
    return (found if top <= 255 else found >> 8).astype(np.uint8)


def is_windowed(ds: Dataset) -> bool:
    """Whether the file says which values to show."""
    stated = all(held(ds, k) for k in ("WindowCenter", "WindowWidth"))
    return stated or bool(ds.get("VOILUTSequence"))


def is_display_ready(ds: Dataset, stored: int) -> bool:
    """Whether values of `stored` bits are grey levels: 8 at most, and nothing maps them."""
    return stored <= 8 and not ds.get("ModalityLUTSequence") and _rescale(ds) == (1, 0)


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


def _modality(ds: Dataset, stated: Layout, stored: np.ndarray) -> tuple[np.ndarray, Range]:
    """(H, W) values by modality LUT or rescale, and their range."""
    low, high = stated.range
    if ds.get("ModalityLUTSequence"):
        table = _table(ds.ModalityLUTSequence[0], "LUTDescriptor", "LUTData", (low, high), ds)
        if (holds := int(table.entries.max()).bit_length()) > table.bits:
            raise _other_bits(table.bits, holds)
        return table(stored), (0, float(table.entries.max()))
    slope, intercept = _rescale(ds)
    if (slope, intercept) == (1, 0):
        return stored, (low, high)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return stored * slope + intercept, (ends[0], ends[1])


def _rescale(ds: Dataset) -> tuple[float, float]:
    """Slope and intercept."""
    slope = number(ds, "RescaleSlope", 1)
    if slope == 0:
        raise EdgeKDError("DICOM with RescaleSlope 0: export it again")
    return slope, number(ds, "RescaleIntercept", 0)


def _shown(
    ds: Dataset, stated: Layout, values: np.ndarray, domain: Range, padding: np.ndarray | None
) -> np.ndarray:
    """(H, W) float in 0 to 1: values by VOI LUT, window, their own range or the image's."""
    if ds.get("VOILUTSequence"):
        table = _table(ds.VOILUTSequence[0], "LUTDescriptor", "LUTData", domain, ds)
        # Viewers differ: some take the bits that are stated for white, others those that are held.
        if (holds := int(table.entries.max()).bit_length()) != table.bits:
            raise _other_bits(table.bits, holds)
        return table(values) / (2.0**table.bits - 1)
    if is_windowed(ds):
        (center,), (width,) = numbers(ds, "WindowCenter", 1), numbers(ds, "WindowWidth", 1)
        return window(values, center, width, text(ds, "VOILUTFunction") or "LINEAR")
    if is_display_ready(ds, stated.stored):
        low, high = stated.range
        return (values - float(low)) / (high - low)
    seen = values if padding is None or padding.all() else values[~padding]
    darkest, brightest = float(seen.min()), float(seen.max())
    if brightest == darkest:
        return np.zeros(values.shape)
    return (values - darkest) / (brightest - darkest)


def _table(item: Dataset, descriptor: str, data: str, domain: Range, of: Dataset) -> Table:
    """A table that values within `domain` are looked up in, in a file or a sequence of it."""
    count, first, bits = _descriptor(item, descriptor)
    entries = _entries(item, data, count, little=of.original_encoding[1] is not False)
    return Table(entries, _first(first, len(entries), domain), bits)


def _descriptor(item: Dataset, keyword: str) -> tuple[int, int, int]:
    """Entries, the value that the first is for in 16 bits, bits of an entry (C.11.1.1.1)."""
    states = numbers(item, keyword)
    if len(states) != 3:
        raise EdgeKDError(
            f"DICOM with {len(states)} values of {keyword} where 3 belong: export it again"
        )
    # Two of the three are always unsigned; the one VR of all says nothing of the other.
    count, first, bits = (int(v) & 0xFFFF for v in states)
    if not 8 <= bits <= 16:
        raise EdgeKDError(
            f"DICOM whose {keyword} states {bits} bits an entry, 8 to 16 are read: export it again"
        )
    return count or 2**16, first, bits


def _entries(item: Dataset, data: str, count: int, *, little: bool) -> np.ndarray:
    """(count,) int64: what a table holds, in bytes or in words."""
    if not held(item, data):
        raise EdgeKDError(f"DICOM without {data}: export it again")
    table: Any = item[data].value
    if isinstance(table, bytes):
        packed = len(table) in (count, count + count % 2) and len(table) != 2 * count
        swapped = packed and not little and item[data].VR == "OW"
        if len(table) % 2 and not packed:
            raise EdgeKDError(f"corrupt DICOM file: a {data} of half a word")
        table = np.frombuffer(table, ("u1" if packed else "<u2") if little or packed else ">u2")
        table = table.reshape(-1, 2)[:, ::-1].ravel() if swapped else table
    entries = np.atleast_1d(np.asarray(table))[:count].astype(np.int64) & 0xFFFF
    if len(entries) < count:
        raise EdgeKDError(f"corrupt DICOM file: a table of {len(entries)} entries states {count}")
    return entries


def _first(word: int, count: int, domain: Range) -> int:
    """The value that a table begins with, of its 16 bits: signed where values may be negative.

    PS3.3 C.11.2.1.1. A table that no value falls into was written in the other representation.
    """
    signed = word - 2**16 if word >= 2**15 else word
    meant, other = (signed, word) if domain[0] < 0 else (word, signed)

    def meets(first: int) -> bool:
        return first <= domain[1] and first + count > domain[0]

    return other if meets(other) and not meets(meant) else meant


def _other_bits(stated: int, holds: int) -> EdgeKDError:
    return EdgeKDError(
        f"DICOM whose LUTDescriptor states {stated} bits an entry and whose LUTData holds {holds}: "
        "export it again"
    )


def _palette(ds: Dataset, stated: Layout, name: str) -> Table:
    """The table of a colour."""
    descriptor, data = (f"{name}PaletteColorLookupTable{part}" for part in ("Descriptor", "Data"))
    if held(ds, data) or not held(ds, f"Segmented{data}"):
        return _table(ds, descriptor, data, stated.range, ds)
    from pydicom.pixels import apply_color_lut

    count, first, bits = _descriptor(ds, descriptor)
    if bits == 8 and count > 256:  # pydicom's index would wrap
        raise EdgeKDError(f"DICOM with a segmented palette of {count} colours: export it again")
    begins = int(ds.RedPaletteColorLookupTableDescriptor[1])
    entries = apply_color_lut(np.arange(count) + begins, ds)[:, _COLOURS.index(name)]
    return Table(entries.astype(np.int64), _first(first, count, stated.range), bits)


def _padding(ds: Dataset, stated: Layout, cells: Cells, stored: np.ndarray) -> np.ndarray | None:
    """(H, W) bool: what is not image (PS3.3 C.7.5.1.1.2); None: all is."""
    if not held(ds, "PixelPaddingValue"):
        return None
    value = whole(ds, "PixelPaddingValue")
    limit = whole(ds, "PixelPaddingRangeLimit", value)
    low, high = sorted(_as_stored(v, stated) for v in (value, limit))
    if not stated.signed and high > stated.range[1]:  # marked by bits that no value has
        stored = cells.stored >> cells.bits.shift
    return np.asarray((stored >= low) & (stored <= high))


def _as_stored(word: int, stated: Layout) -> int:
    """A word in the pixels' representation, whatever VR it was written with."""
    size = 16 if -(2**15) <= word < 2**16 else 32
    word %= 2**size
    if not stated.signed:
        return word
    size = stated.stored if word < 2**stated.stored else size  # unused bits may be 0
    return word - 2**size if word >= 2 ** (size - 1) else word
