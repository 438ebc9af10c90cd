"""DICOM files made up around their values, and an independent reading of each in float64.

A file is written byte by byte (PS3.5), so that an element can have any VR, any text and any bits.
The picture is computed from what was meant, by the formulas of PS3.3, and not from the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXPLICIT, IMPLICIT, BIG, RLE, J2K, JLS = (
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80",
)  # fmt: skip
LONG = ("OB", "OW", "SQ", "UN")
FORMATS = {"US": "H", "SS": "h"}
TAGS = {
    "SOPClassUID": (0x0008, 0x0016, "UI"), "SamplesPerPixel": (0x0028, 0x0002, "US"),
    "PhotometricInterpretation": (0x0028, 0x0004, "CS"),
    "PlanarConfiguration": (0x0028, 0x0006, "US"), "NumberOfFrames": (0x0028, 0x0008, "IS"),
    "Rows": (0x0028, 0x0010, "US"), "Columns": (0x0028, 0x0011, "US"),
    "PixelSpacing": (0x0028, 0x0030, "DS"), "PixelAspectRatio": (0x0028, 0x0034, "IS"),
    "ImagerPixelSpacing": (0x0018, 0x1164, "DS"),
    "BitsAllocated": (0x0028, 0x0100, "US"), "BitsStored": (0x0028, 0x0101, "US"),
    "HighBit": (0x0028, 0x0102, "US"), "PixelRepresentation": (0x0028, 0x0103, "US"),
    "SmallestImagePixelValue": (0x0028, 0x0106, "US"),
    "LargestImagePixelValue": (0x0028, 0x0107, "US"),
    "PixelPaddingValue": (0x0028, 0x0120, "US"), "PixelPaddingRangeLimit": (0x0028, 0x0121, "US"),
    "WindowCenter": (0x0028, 0x1050, "DS"), "WindowWidth": (0x0028, 0x1051, "DS"),
    "RescaleIntercept": (0x0028, 0x1052, "DS"), "RescaleSlope": (0x0028, 0x1053, "DS"),
    "VOILUTFunction": (0x0028, 0x1056, "CS"), "ModalityLUTSequence": (0x0028, 0x3000, "SQ"),
    "LUTDescriptor": (0x0028, 0x3002, "US"), "LUTData": (0x0028, 0x3006, "OW"),
    "VOILUTSequence": (0x0028, 0x3010, "SQ"), "PixelData": (0x7FE0, 0x0010, "OW"),
}  # fmt: skip
for _i, _c in enumerate(("Red", "Green", "Blue")):
    TAGS[f"{_c}PaletteColorLookupTableDescriptor"] = (0x0028, 0x1101 + _i, "US")
    TAGS[f"{_c}PaletteColorLookupTableData"] = (0x0028, 0x1201 + _i, "OW")

Value = Any  # str, int, ints, bytes, or a dict of elements: a sequence of one item


@dataclass
class Case:
    """A file, and what is to be seen in it."""

    what: list[str]  # what is odd or wrong about it, in words
    data: bytes = b""
    picture: np.ndarray | None = None  # (H, W) or (H, W, 3) float64 grey levels; None: no picture
    optional: bool = False  # a line in the place of the picture is as right
    elements: dict[str, tuple[Value, str]] = field(default_factory=dict)  # keyword -> (value, VR)
    syntax: str = EXPLICIT


# ---- a file, byte by byte


def encoded(elements: dict[str, tuple[Value, str]], syntax: str) -> bytes:
    """Elements in the order of their tags."""
    order, explicit = (">" if syntax == BIG else "<"), syntax != IMPLICIT
    out = []
    for keyword in sorted(elements, key=lambda k: TAGS[k][:2]):
        group, number, own = TAGS[keyword]
        value, vr = elements[keyword]
        vr = vr or own
        body = _bytes(value, vr, order, syntax)
        length = len(body)
        if keyword == "PixelData" and syntax in (RLE, J2K, JLS):
            vr, length = "OB", 0xFFFFFFFF
        out.append(struct.pack(f"{order}HH", group, number))
        if not explicit:
            out.append(struct.pack("<I", length))
        elif vr in LONG:
            out.append(vr.encode() + struct.pack(f"{order}HI", 0, length))
        else:
            out.append(vr.encode() + struct.pack(f"{order}H", length))
        out.append(body)
    return b"".join(out)


def _bytes(value: Value, vr: str, order: str, syntax: str) -> bytes:
    if isinstance(value, dict):
        inside = encoded(value, syntax)
        return struct.pack(f"{order}HHI", 0xFFFE, 0xE000, len(inside)) + inside
    if isinstance(value, str):
        return (value + (" " if vr != "UI" else "\0") * (len(value) % 2)).encode()
    if isinstance(value, bytes):
        return value + b"\0" * (len(value) % 2)
    many = value if isinstance(value, (list, tuple)) else [value]
    return b"".join(struct.pack(f"{order}H", v & 0xFFFF) for v in many)


def file_of(case: Case) -> bytes:
    """PS3.10, 7.1."""
    syntax = case.syntax.encode() + b"\0" * (len(case.syntax) % 2)
    meta = b"".join(
        struct.pack("<HH2sH", 2, tag, b"UI", len(text)) + text
        for tag, text in ((2, b"1.2.840.10008.5.1.4.1.1.7\0"), (3, b"1.2.3\0"), (16, syntax))
    )
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    return bytes(128) + b"DICM" + length + meta + encoded(case.elements, case.syntax)


def encapsulated(stream: bytes) -> bytes:
    """One frame in one fragment (PS3.5, A.4)."""
    stream += b"\0" * (len(stream) % 2)
    empty, item = struct.pack("<HHI", 0xFFFE, 0xE000, 0), struct.pack("<HHI", 0xFFFE, 0xE000,
                                                                     len(stream))  # fmt: skip
    return empty + item + stream + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def run_length(cells: np.ndarray) -> bytes:
    """PS3.5, G: a segment for each byte of each sample, the highest first; literal runs alone."""
    planes = cells[..., None] if cells.ndim == 2 else cells
    size, segments = cells.dtype.itemsize, []
    for sample in range(planes.shape[2]):
        raw = planes[..., sample].astype(f"<u{size}").tobytes()
        for byte in reversed(range(size)):
            plane = raw[byte::size]
            runs = [plane[i : i + 128] for i in range(0, len(plane), 128)]
            segment = b"".join(bytes([len(r) - 1]) + r for r in runs)
            segments.append(segment + b"\x80" * (len(segment) % 2))
    starts = np.cumsum([64, *map(len, segments[:-1])])
    head = struct.pack("<I15I", len(segments), *starts, *[0] * (15 - len(segments)))
    return head + b"".join(segments)


def jpeg_2000(cells: np.ndarray, bits: int, mct: bool = False) -> bytes:
    from openjpeg.utils import encode_array

    photometric = 1 if cells.ndim == 3 else 2
    return encode_array(
        np.ascontiguousarray(cells), bits_stored=bits, photometric_interpretation=photometric,
        use_mct=mct,
    )  # fmt: skip


def jpeg_ls(cells: np.ndarray) -> bytes:
    """Of as many bits as the cells need."""
    import jpeg_ls as charls

    return bytes(charls.encode_array(np.ascontiguousarray(cells, np.min_scalar_type(cells.max()))))


# ---- what a file means


def made(seed: int) -> Case:
    """The case of a seed: of grey, of a palette, or of colour."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["grey", "palette", "colour"], p=[0.8, 0.1, 0.1])
    case = {"grey": _grey, "palette": _palette, "colour": _colour}[kind](rng)
    _shape(case, rng)
    if rng.random() < 0.3:
        _spoil(case, rng)
    case.data = file_of(case)
    return case


def _size(rng: np.random.Generator) -> np.ndarray:
    """Rows and columns: whole when stretched by half, and enough for JPEG 2000's resolutions."""
    return 6 * rng.integers(6, 9, 2)


def _stated(case: Case, pixels: np.ndarray, photometric: str, allocated: int, stored: int,
            high: int | None, signed: int) -> None:  # fmt: skip
    """The elements that every file has."""
    samples = 3 if pixels.ndim == 3 else 1
    for keyword, value in {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "SamplesPerPixel": samples,
        "PhotometricInterpretation": photometric, "Rows": pixels.shape[0],
        "Columns": pixels.shape[1], "BitsAllocated": allocated, "BitsStored": stored,
        "HighBit": high, "PixelRepresentation": signed,
    }.items():  # fmt: skip
        if value is not None:
            case.elements[keyword] = value, ""


def _grey(rng: np.random.Generator) -> Case:
    case = Case([])
    allocated = int(rng.choice([8, 16], p=[0.2, 0.8]))
    stored = int(rng.integers(min(allocated, 6), allocated + 1))
    shift = int(rng.integers(0, allocated - stored + 1)) if rng.random() < 0.3 else 0
    signed = int(rng.random() < 0.4)
    low = -(2 ** (stored - 1)) if signed else 0
    range_ = low, low + 2**stored - 1
    ends = np.sort(rng.integers(range_[0], range_[1] + 1, 2))
    # The highest bits are in use, so that a picture does not fit into others by chance.
    meant = rng.integers(ends[0], ends[1] + 1, _size(rng))
    meant.flat[0], meant.flat[1] = range_
    high: int | None = shift + stored - 1
    if not shift and rng.random() < 0.1:
        high, _ = None, case.what.append("no HighBit")
    photometric = str(rng.choice(["MONOCHROME1", "MONOCHROME2"]))
    _stated(case, meant, photometric, allocated, stored, high, signed)
    padding = _padded(case, meant, range_, stored, signed, rng)
    cells = _stored(case, meant, allocated, stored, shift, rng)
    _compressed(case, meant, cells, allocated, stored, signed, rng)
    values, domain = _modality(case, meant.astype(np.float64), range_, rng)
    shown = _voi(case, values, domain, range_, padding, rng)
    if photometric == "MONOCHROME1":
        shown = 1 - shown
    case.picture = 255 * np.where(padding, 0, shown.clip(0, 1))
    return case


def _stored(case: Case, meant: np.ndarray, allocated: int, stored: int, shift: int,
            rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Cells of values, and something in the bits beside them."""
    unused = ~(((1 << stored) - 1) << shift) & ((1 << allocated) - 1)
    beside = rng.choice(["zero", "sign", "noise"])
    cells = (meant & ((1 << stored) - 1)) << shift
    if beside == "sign":
        cells = (meant << shift) & ((1 << allocated) - 1)
    elif beside == "noise" and unused:
        case.what.append("noise in unused bits")
        cells |= rng.integers(0, 1 << allocated, meant.shape) & unused
    return cells.astype(f"u{allocated // 8}")


def _compressed(case: Case, meant: np.ndarray, cells: np.ndarray, allocated: int, stored: int,
                signed: int, rng: np.random.Generator) -> None:  # fmt: skip
    """PixelData in one of the transfer syntaxes."""
    case.syntax = str(rng.choice([EXPLICIT, IMPLICIT, BIG, RLE, J2K, JLS],
                                 p=[0.3, 0.15, 0.1, 0.15, 0.2, 0.1]))  # fmt: skip
    vr = "OW" if allocated > 8 or case.syntax == IMPLICIT else "OB"
    if case.syntax in (EXPLICIT, IMPLICIT, BIG):
        order = ">" if case.syntax == BIG else "<"
        case.elements["PixelData"] = cells.astype(cells.dtype.newbyteorder(order)).tobytes(), vr
        return
    alone = rng.random() < 0.5  # the values without the bits beside them, right-aligned
    if case.syntax == RLE:
        stream = run_length(cells)
    elif case.syntax == JLS:
        stream = jpeg_ls(cells)
    elif not alone:
        stream = jpeg_2000(cells, allocated)
    elif rng.random() < 0.5:
        case.what.append("a stream of the values alone, without a sign")
        low = (meant & ((1 << stored) - 1)).astype(cells.dtype)
        stream = jpeg_2000(low, stored)
    else:
        case.what.append("a stream of the values alone")
        stream = jpeg_2000(meant.astype(f"{'i' if signed else 'u'}{allocated // 8}"), stored)
    case.elements["PixelData"] = encapsulated(stream), "OB"


def _padded(case: Case, meant: np.ndarray, range_: tuple[int, int], stored: int, signed: int,
            rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """(H, W) bool: what is no image; VR and unused bits of the element as chance has it."""
    if rng.random() < 0.55:
        return np.zeros(meant.shape, bool)
    value = int(rng.choice([range_[0], 0, int(rng.integers(range_[0], range_[1] + 1))]))
    limit = value
    meant[2:5, :] = value
    if rng.random() < 0.4:
        limit = int(rng.choice([0, int(rng.integers(range_[0], range_[1] + 1))]))
        meant[5, :] = limit
        _word(case, "PixelPaddingRangeLimit", limit, stored, signed, rng)
        case.what.append(f"padding from {value} to {limit}")
    _word(case, "PixelPaddingValue", value, stored, signed, rng)
    for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue"):  # nobody reads them
        _word(case, keyword, int(rng.integers(0, 2**16)), 16, 0, rng)
    return (meant >= min(value, limit)) & (meant <= max(value, limit))


def _word(case: Case, keyword: str, value: int, stored: int, signed: int,
          rng: np.random.Generator) -> None:  # fmt: skip
    """A value that is US or SS, written as either."""
    vr = str(rng.choice(["US", "SS"]))
    if vr != ("SS" if signed else "US"):
        case.what.append(f"{keyword} as {vr}")
    if signed and rng.random() < 0.2:
        value &= (1 << stored) - 1  # unused bits are 0, as in the pixels
    case.elements[keyword] = value, vr


def _number(value: float, rng: np.random.Generator, case: Case) -> str:
    """A number as it is written, by the standard and otherwise."""
    plain = f"{value:g}"
    how = rng.choice(["plain", "plain", "exponent", "comma", "spaces", "plus", "nul"])
    if how == "exponent":
        return f"{value:.8E}"
    if how == "comma" and "." in plain and len(plain.split(".")[1]) != 3:
        case.what.append("a decimal comma")
        return plain.replace(".", ",")
    if how == "plus" and value > 0:
        return f"+{plain}"
    return {"spaces": f" {plain} ", "nul": plain + "\0"}.get(how, plain)


def _modality(case: Case, values: np.ndarray, range_: tuple[int, int],
              rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, float]]:  # fmt: skip
    """Values by rescale or modality LUT, and what range they may have (PS3.3 C.11.1)."""
    how = rng.choice(["none", "rescale", "slope", "intercept", "lut"], p=[0.3, 0.4, 0.1, 0.1, 0.1])
    if how == "none":
        return values, range_
    if how == "lut":
        return _lut(case, "ModalityLUTSequence", values, range_, int(rng.integers(9, 17)), rng)
    slope, intercept = 1.0, 0.0
    if how != "intercept":
        slope = float(rng.choice([0.125, 0.5, 1, 1.25, 2, -1]))
        case.elements["RescaleSlope"] = _number(slope, rng, case), ""
    if how != "slope":
        intercept = float(rng.choice([0, -1024, -1000.5, 100.25]))
        case.elements["RescaleIntercept"] = _number(intercept, rng, case), ""
    low, high = sorted(slope * r + intercept for r in range_)
    return slope * values + intercept, (low, high)


def _lut(case: Case, keyword: str, values: np.ndarray, domain: tuple[float, float], bits: int,
         rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, float]]:  # fmt: skip
    """Values by a table of a sequence; PS3.3 C.11.1.1.1: the ends go on for ever."""
    count = int(rng.choice([64, 256, 1000, 4096]))
    inside = max(domain[0], -(2**15)), min(domain[1], (2**15 if domain[0] < 0 else 2**16) - 1)
    first = int(rng.integers(int(inside[0]), int(inside[1]) + 1))
    entries = np.sort(rng.integers(0, 2**bits, count))
    entries[-1] = 2**bits - 1
    words = entries.astype(">u2" if case.syntax == BIG else "<u2").tobytes()
    if bits == 8 and rng.random() < 0.5 and case.syntax != BIG:
        words = entries.astype(np.uint8).tobytes()
    vr = str(rng.choice(["US", "SS"]))
    case.elements[keyword] = (
        {"LUTDescriptor": ([count, first, bits], vr), "LUTData": (words, "OW")}, ""
    )  # fmt: skip
    case.what.append(f"{keyword} of {count} entries of {bits} bits from {first}, {vr}")
    seen = np.empty(values.shape)
    for at, x in np.ndenumerate(np.rint(values)):
        index = 0 if x < first else count - 1 if x > first + count - 1 else int(x) - first
        seen[at] = entries[index]
    return seen, (0.0, float(entries[-1]))


def _voi(case: Case, values: np.ndarray, domain: tuple[float, float], range_: tuple[int, int],
         padding: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """0 to 1 by VOI LUT, window, or range (PS3.3 C.11.2)."""
    how = rng.choice(["none", "window", "lut"], p=[0.3, 0.5, 0.2])
    if how == "lut":
        bits = int(rng.choice([8, 10, 12, 16]))
        found, _ = _lut(case, "VOILUTSequence", values, domain, bits, rng)
        return found / (2**bits - 1)
    if how == "window":
        width = float(rng.choice([1, 2.5, 100, 1024.5, max(domain[1] - domain[0], 2)]))
        center = float(np.round(rng.uniform(values.min(), values.max() + 1), 1))
        function = str(rng.choice(["", "LINEAR", "LINEAR_EXACT", "SIGMOID"]))
        more = rng.choice(["", "\\300", "\\rubbish"])  # the first is shown
        for keyword, value in (("WindowCenter", center), ("WindowWidth", width)):
            case.elements[keyword] = _number(value, rng, case) + str(more), ""
        if function:
            case.elements["VOILUTFunction"] = function, ""
        written = float(f"{center:g}"), float(f"{width:g}")
        return np.vectorize(lambda x: _window(x, *written, function))(values)
    mapped = {"RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"} & set(case.elements)
    same = "ModalityLUTSequence" not in mapped and (values == values.astype(int)).all()
    if case.elements["BitsStored"][0] <= 8 and same and domain == range_:
        return (values - range_[0]) / (range_[1] - range_[0])
    seen = values if padding.all() else values[~padding]
    low, high = seen.min(), seen.max()
    return (values - low) / (high - low) if high > low else np.zeros(values.shape)


def _window(x: float, c: float, w: float, function: str) -> float:
    """C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2, with 0 to 1 as the output."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return float(1 / (1 + np.exp(np.float64(-4 * (x - c) / w))))
    if function == "LINEAR_EXACT":
        return 0.0 if x <= c - w / 2 else 1.0 if x > c + w / 2 else (x - c) / w + 0.5
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    if x > c - 0.5 + (w - 1) / 2:
        return 1.0
    return (x - (c - 0.5)) / (w - 1) + 0.5


def _palette(rng: np.random.Generator) -> Case:
    """Indices of a palette: 8 or 16 bits an entry, in bytes or in words, whatever it states."""
    case = Case([])
    allocated = int(rng.choice([8, 16]))
    count = int(rng.choice([16, 200, 256] if allocated == 8 else [256, 1000, 4096]))
    first = int(rng.choice([0, 0, 7]))
    index = rng.integers(0, min(count + first + 5, 2**allocated), _size(rng))
    _stated(case, index, "PALETTE COLOR", allocated, allocated, allocated - 1, 0)
    case.syntax = str(rng.choice([EXPLICIT, IMPLICIT, BIG]))
    order = ">" if case.syntax == BIG else "<"
    vr = "OB" if allocated == 8 and case.syntax != IMPLICIT else "OW"
    case.elements["PixelData"] = index.astype(f"{order}u{allocated // 8}").tobytes(), vr
    colours = rng.integers(0, 256, (count, 3))
    colours[0] = 255
    how = str(rng.choice(["bytes", "words", "wide"])) if case.syntax != BIG else "words"
    states = int(rng.choice([8, 16]))
    for i, name in enumerate(("Red", "Green", "Blue")):
        entries = colours[:, i] * (257 if how == "wide" else 1)
        kind = "u1" if how == "bytes" else f"{order}u2"
        key = f"{name}PaletteColorLookupTable"
        case.elements[f"{key}Descriptor"] = [count, first, states], str(rng.choice(["US", "SS"]))
        case.elements[f"{key}Data"] = entries.astype(kind).tobytes(), "OW"
    case.what.append(f"a palette in {how} that states {states} bits")
    case.picture = colours[np.clip(index - first, 0, count - 1)].astype(np.float64)
    return case


def _colour(rng: np.random.Generator) -> Case:
    """RGB or YBR_FULL, interleaved or in planes; JPEG 2000 with a label that its stream corrects.

    A stream that was transformed and is called YBR_FULL, or was not and is called YBR_RCT, may be
    refused: the first is RGB to whoever follows the stream.
    """
    case = Case([])
    stored = rng.integers(0, 256, (*_size(rng), 3))
    case.syntax = str(rng.choice([EXPLICIT, IMPLICIT, RLE, J2K, JLS]))
    label = str(rng.choice(["RGB", "YBR_FULL"]))
    meaning = label
    pixels = stored.astype(np.uint8)
    _stated(case, stored, label, 8, 8, 7, 0)
    planar = int(rng.integers(0, 2))
    case.elements["PlanarConfiguration"] = planar, ""
    if case.syntax == J2K:
        mct = bool(rng.integers(0, 2))
        label = str(rng.choice(["RGB", "YBR_RCT", "YBR_FULL"]))
        meaning = "YBR_FULL" if label == "YBR_FULL" and not mct else "RGB"
        case.optional = mct != (label == "YBR_RCT") and label != "RGB"
        case.what.append(f"JPEG 2000 {'with' if mct else 'without'} a transform, called {label}")
        body = encapsulated(jpeg_2000(pixels, 8, mct))
    elif case.syntax == JLS:
        body = encapsulated(jpeg_ls(pixels))
    elif case.syntax == RLE:
        body = encapsulated(run_length(pixels))
    else:
        body = (pixels.transpose(2, 0, 1) if planar else pixels).tobytes()
    if case.syntax in (J2K, JLS):
        case.what.append(f"PlanarConfiguration {planar}, which a stream does not have")
    case.elements["PhotometricInterpretation"] = label, ""
    case.elements["PixelData"] = body, "OW" if case.syntax == IMPLICIT else "OB"
    case.picture = stored.astype(np.float64)
    if meaning == "YBR_FULL":  # C.7.6.3.1.2
        y, b, r = np.moveaxis(case.picture, -1, 0)
        b, r = b - 128, r - 128
        rgb = [y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b]
        case.picture = np.stack(rgb, -1).clip(0, 255)
    return case


def _shape(case: Case, rng: np.random.Generator) -> None:
    """Sides of a pixel, some of which are not equal."""
    if rng.random() < 0.7:
        return
    keyword = str(rng.choice(["PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"]))
    tall, wide = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    text = f"{tall}\\{wide}"
    if keyword != "PixelAspectRatio":
        text = str(rng.choice([f"{tall * 0.2:g}\\{wide * 0.2:g}", f"{tall}\\{wide}"]))
        if rng.random() < 0.2:  # nought says nothing, and the next is asked
            case.elements["PixelAspectRatio"] = text, ""
            text = "0\\0"
    case.elements[keyword] = text, ""
    if tall == wide or case.picture is None:
        return
    case.what.append(f"{keyword} of {tall} to {wide}")
    height, width = case.picture.shape[:2]
    size = (round(height * max(1, tall / wide)), round(width * max(1, wide / tall)))
    seen = np.rint(case.picture)
    for axis in (0, 1):
        seen = _stretched(seen, size[axis], axis)
    case.picture = seen


def _stretched(pixels: np.ndarray, side: int, axis: int) -> np.ndarray:
    """Linear between the centres of pixels, constant beyond the outermost."""
    old = pixels.shape[axis]
    at = ((np.arange(side) + 0.5) * old / side - 0.5).clip(0, old - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, old - 1)
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(pixels.ndim)])
    return np.take(pixels, low, axis) * (1 - share) + np.take(pixels, high, axis) * share


# ---- what cannot be read for certain


def _spoil(case: Case, rng: np.random.Generator) -> None:
    """One thing that is wrong: no picture, or (`optional`) one if it is the right one."""
    e = case.elements
    stored, allocated = e["BitsStored"][0], e["BitsAllocated"][0]
    spoilt: dict[str, tuple[Value, str, bool]] = {  # value, VR, whether the picture may be shown
        "BitsStored 0": (0, "", False),
        "BitsStored more than BitsAllocated": (allocated + 1, "", False),
        "BitsAllocated 12": (12, "", False),
        "HighBit too low": (stored - 2 & 0xFFFF, "", False),
        "HighBit too high": (allocated, "", False),
        "PixelRepresentation 2": (2, "", False),
        "PixelRepresentation twice": ([0, 1], "", False),
        "Rows of nothing": ("", "US", False),
        "Rows 0": (0, "", False),
        "Columns as text": ("16 px", "LO", False),
        "NumberOfFrames of rubbish": ("1 frame", "", False),
        "NumberOfFrames 0": ("0", "", True),
        "RescaleSlope of rubbish": ("[1", "", False),
        "RescaleSlope 0": ("0", "", False),
        "RescaleSlope twice": ("1\\2", "", False),
        "RescaleIntercept of thousands": ("1,024", "", False),
        "RescaleIntercept with a low line": ("1_024", "", False),
        "PixelSpacing of rubbish": ("0.2mm\\0.2", "", False),
        "PixelSpacing of one number": ("0.2", "", False),
        "PixelSpacing below 0": ("-1\\1", "", False),
        "PixelPaddingValue twice": ([1, 2], "", False),
        "WindowCenter of rubbish": ("4O", "", False),
        "WindowWidth 0": ("0", "", False),
        "WindowWidth nan": ("nan", "", False),
    }
    what = str(rng.choice(list(spoilt)))
    keyword = what.split()[0]
    value, vr, shown = spoilt[what]
    grey = "MONOCHROME" in e["PhotometricInterpretation"][0]
    if keyword.startswith(("Rescale", "Window", "PixelPadding")):
        if not grey or (keyword.startswith("Rescale") and "ModalityLUTSequence" in e):
            return
        if keyword.startswith("Window") and ("VOILUTSequence" in e or "WindowCenter" not in e):
            return
    e[keyword] = value, vr
    case.what.append(what)
    if not shown:
        case.picture = None
