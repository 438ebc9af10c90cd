"""DICOM values in the wrong type, bits or unit: each element right, odd, missing and wrong."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pip install 'edgekd[dicom]'")

import pydicom
from data.test_dicom import LEVELS, lut, made, shown
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian
from typer.testing import CliRunner

from edgekd import data
from edgekd.cli.main import app
from edgekd.data import deidentify, dicom, preprocess, streams
from edgekd.records import EdgeKDError

BASELINE, LOSSLESS_J2K = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"
FULL = {"WindowCenter": 2048, "WindowWidth": 4096}  # of 12 bits


def linear(values, center=2048.0, width=4096.0):
    """Grey levels by PS3.3 C.11.2.1.2.1, in float64."""
    x = np.asarray(values, np.float64)
    return 255 * ((x - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def near(content: bytes, expected: np.ndarray) -> None:
    np.testing.assert_allclose(shown(content), expected, atol=1)


def with_value(content: bytes, number: int, body: bytes | str = b"", vr: str = "") -> bytes:
    """The file with another text, or VR, in its first element (0028, number)."""
    at = content.index(struct.pack("<HH", 0x28, number))
    (size,) = struct.unpack_from("<H", content, at + 6)
    body = body.encode() if isinstance(body, str) else body or content[at + 8 : at + 8 + size]
    body += b" " * (len(body) % 2)
    head = content[: at + 4] + (vr.encode() or content[at + 4 : at + 6])
    return head + struct.pack("<H", len(body)) + body + content[at + 8 + size :]


def compressed(content: bytes, stream: bytes, syntax: str = LOSSLESS_J2K, **elements) -> bytes:
    """The file with a stream in the place of its pixels."""
    ds = pydicom.dcmread(io.BytesIO(content))
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    with io.BytesIO() as out:
        ds.save_as(out, enforce_file_format=True)
        return out.getvalue()


def j2k(pixels: np.ndarray, bits: int, mct: bool = False) -> bytes:
    encode = pytest.importorskip("openjpeg.utils", reason="pip install 'edgekd[dicom]'")
    return encode.encode_array(pixels, bits_stored=bits, use_mct=mct,
                               photometric_interpretation=1 if pixels.ndim == 3 else 2)  # fmt: skip


BIG = np.tile(LEVELS, (3, 3))  # as JPEG 2000's resolutions need


def test_made_up_headers():
    """A small one of benchmarks/dicom_headers.py: an independent reading, and no traceback."""
    pytest.importorskip("openjpeg", reason="pip install 'edgekd[dicom]'")
    pytest.importorskip("jpeg_ls", reason="pip install 'edgekd[dicom]'")
    pytest.importorskip("libjpeg", reason="pip install 'edgekd[dicom-jpeg]'")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import dicom_headers
    finally:
        sys.path.pop(0)
    for seed in range(60):
        case = dicom_headers.made(seed)
        came, off, line = dicom_headers.judged(case)
        assert came in ("shown", "refused"), (seed, came, off, line, case.what)


# --- bits ---


@pytest.mark.parametrize("syntax", ["native", "RLE", "JPEG 2000"])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_high_bit_says_where_a_value_lies(high, syntax):
    """With noise in the bits beside it, as overlays are."""
    noise = np.random.default_rng(0).integers(0, 2**16, BIG.shape, dtype=np.uint16)
    shift = high - 11
    mask = np.uint16(4095 << shift)
    cells = (BIG << shift).astype(np.uint16) | (noise & ~mask)
    content = made(cells, HighBit=high, **FULL)
    if syntax == "RLE":
        ds = pydicom.dcmread(io.BytesIO(content))
        ds.compress("1.2.840.10008.1.2.5")
        with io.BytesIO() as out:
            ds.save_as(out)
            content = out.getvalue()
    elif syntax == "JPEG 2000":
        content = compressed(content, j2k(cells, 16))
    near(content, linear(BIG))


@pytest.mark.parametrize("unused", [0, 0xF000])
def test_signed_values_whatever_is_in_their_unused_bits(unused):
    meant = BIG.astype(np.int64) - 2048
    cells = ((meant & 0xFFF) | unused).astype(np.uint16)
    content = made(cells, PixelRepresentation=1, WindowCenter=0, WindowWidth=4096)
    near(content, linear(meant, 0))


def test_a_stream_of_the_values_alone():
    """A stream of 12 bits in a file whose cells have them elsewhere, and of another sign."""
    content = made((BIG << 4).astype(np.uint16), HighBit=15, **FULL)
    near(compressed(content, j2k(BIG.astype(np.uint16), 12)), linear(BIG))
    meant = BIG.astype(np.int16) - 2048
    signed = made(meant, WindowCenter=0, WindowWidth=4096)
    near(compressed(signed, j2k((meant & 0xFFF).astype(np.uint16), 12)), linear(meant, 0))
    doubtful = compressed(signed, j2k((meant & 0xFFF).astype(np.uint16), 12), BitsStored=16,
                          HighBit=15)  # fmt: skip
    with pytest.raises(EdgeKDError, match="stream holds 12 bits of the other sign"):
        shown(doubtful)
    positive = compressed(signed, j2k((BIG // 2).astype(np.uint16), 12), BitsStored=16, HighBit=15)
    near(positive, linear(BIG // 2, 0))


def test_eight_bits_in_cells_of_sixteen_and_a_stream_of_eight():
    pytest.importorskip("libjpeg", reason="pip install 'edgekd[dicom-jpeg]'")
    eight = np.arange(48 * 48, dtype=np.uint8).reshape(48, 48) // 16 * 16
    wide = made(eight.astype(np.uint16), BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(shown(wide), eight)
    np.testing.assert_array_equal(shown(compressed(wide, j2k(eight, 8))), eight)
    with io.BytesIO() as out:
        Image.fromarray(eight).save(out, "JPEG", quality=100)
        stream = out.getvalue()
    seen = shown(compressed(wide, stream, BASELINE))
    np.testing.assert_allclose(seen, np.asarray(Image.open(io.BytesIO(stream))), atol=1)


BITS = {  # elements, words
    "no HighBit": ({"HighBit": None}, ""),
    "HighBit as text": ({}, ""),
    "HighBit under BitsStored": ({"HighBit": 7}, "HighBit 7.*export it with HighBit 11"),
    "HighBit beyond the cell": ({"HighBit": 16}, "HighBit 16.*export it with HighBit 11"),
    "HighBit of other pixels": ({"HighBit": 15}, "HighBit 15 whose pixels lie in the lowest 12"),
    "BitsStored 0": ({"BitsStored": 0}, "BitsStored 0 of BitsAllocated 16"),
    "BitsStored 17": ({"BitsStored": 17}, "BitsStored 17 of BitsAllocated 16"),
    "BitsAllocated 12": ({"BitsAllocated": 12}, "BitsAllocated 12: 1, 8, 16 and 32 are read"),
    "BitsAllocated twice": ({"BitsAllocated": [16, 8]}, "2 values of BitsAllocated"),
    "PixelRepresentation 2": ({"PixelRepresentation": 2}, "PixelRepresentation 2, 0 or 1"),
    "no PixelRepresentation": ({"PixelRepresentation": None}, "without PixelRepresentation"),
    "Rows 0": ({"Rows": 0}, "0 Rows"),
    "Rows twice alike": ({"Rows": [16, 16]}, ""),
    "NumberOfFrames 0": ({"NumberOfFrames": 0}, ""),
    "photometric in small letters": ({"PhotometricInterpretation": "monochrome2"}, ""),
}


@pytest.mark.parametrize("kind", BITS)
def test_what_a_file_states_of_its_pixels(kind):
    elements, words = BITS[kind]
    pixels = LEVELS // 16 * 16 + 1 if kind == "HighBit of other pixels" else LEVELS
    content = made(pixels, **FULL, **elements)
    if kind == "HighBit as text":
        content = with_value(content, 0x0102, "11", "IS")
    if words:
        with pytest.raises(EdgeKDError, match=words):
            shown(content)
    else:
        near(content, linear(pixels))


def test_thirty_two_bits_and_one():
    wide = LEVELS.astype(np.int32) * 70_000 - 100_000_000
    got = shown(made(wide, BitsStored=32, HighBit=31))
    np.testing.assert_allclose(got, 255.0 * (wide - wide.min()) / np.ptp(wide), atol=1)
    bits = np.unpackbits(np.arange(32, dtype=np.uint8), bitorder="little").reshape(16, 16)
    one = made(np.zeros((16, 16), np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0)
    ds = pydicom.dcmread(io.BytesIO(one))
    ds.PixelData = bytes(range(32))
    with io.BytesIO() as out:
        ds.save_as(out)
        np.testing.assert_array_equal(shown(out.getvalue()), bits * 255)


# --- numbers ---


@pytest.mark.parametrize(
    ("written", "center"),
    [("1024.5", 1024.5), ("1024,5", 1024.5), ("1024.\0", 1024.0), ("1.03E3", 1030.0),
     ("+1,5e3", 1500.0), (" 1024 ", 1024.0), ("1024\\1", 1024.0), ("1024\\x", 1024.0),
     ("1,5\\30", 1.5), ("[1024]", None), ("1024HU", None), ("1_024 ", None), ("1,024 ", None),
     ("40,400", None), ("nan   ", None), ("1e999 ", None), ("1,02.4", None), ("--1024", None),
     ("x\\1024", None), ("      ", 2048.0)],
)  # fmt: skip
def test_a_number_is_read_whole_or_not_at_all(written, center):
    content = with_value(made(WindowCenter=1, WindowWidth=2048), 0x1050, written)
    if center is None:
        with pytest.raises(EdgeKDError, match="WindowCenter that is no number such as"):
            shown(content)
    elif written.strip():
        near(content, linear(LEVELS, center, 2048))
    else:  # there is none, so there is no window
        near(content, LEVELS / 4080 * 255)
        assert not dicom.facts(content).has_window


@pytest.mark.parametrize(
    ("slope", "intercept", "factor", "offset"),
    [("0,125", "0", 0.125, 0), ("0.125", None, 0.125, 0), (None, "-1024", 1, -1024),
     ("2", "-0,5", 2, -0.5), ("-1", "4095", -1, 4095), ("1", "  ", 1, 0), ("1\\1", "0", 1, 0)],
)  # fmt: skip
def test_rescale(slope, intercept, factor, offset):
    stated = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    numbers = {"RescaleSlope": 0x1053, "RescaleIntercept": 0x1052}
    content = made(**dict.fromkeys([k for k, v in stated.items() if v], 1), WindowCenter=300,
                   WindowWidth=2048)  # fmt: skip
    for keyword in filter(stated.get, stated):
        content = with_value(content, numbers[keyword], stated[keyword])
    near(content, linear(LEVELS * float(factor) + offset, 300, 2048))


@pytest.mark.parametrize(
    ("elements", "words"),
    [({"RescaleSlope": 0, "RescaleIntercept": 1}, "RescaleSlope 0"),
     ({"RescaleSlope": [1, 2]}, "2 values of RescaleSlope where one belongs"),
     ({"WindowCenter": 5, "WindowWidth": -1}, "WindowWidth that is too small"),
     ({"PixelPaddingValue": [1, 2]}, "2 values of PixelPaddingValue where one belongs"),
     ({"NumberOfFrames": 2}, "DICOM of 2 frames")],
)  # fmt: skip
def test_numbers_that_cannot_be(elements, words):
    with pytest.raises(EdgeKDError, match=words):
        shown(made(**elements))


def test_a_rescale_of_nothing_leaves_grey_levels_alone():
    eight = np.arange(50, 306, dtype=np.uint16).clip(0, 200).astype(np.uint8).reshape(16, 16)
    for elements in ({"RescaleSlope": "", "RescaleIntercept": ""}, {"RescaleIntercept": "0"}):
        np.testing.assert_array_equal(shown(made(eight, **elements)), eight)
        assert dicom.facts(made(eight, **elements)).has_window


def test_decimals_that_are_copied_into_results():
    """A number with a comma was the end of a C-STORE."""
    content = with_value(made(LossyImageCompressionRatio=1), 0x2112, "10,5\\2")
    assert dicom.elements(content, ["LossyImageCompressionRatio", "PatientID"]) == {
        "LossyImageCompressionRatio": [10.5, 2], "PatientID": "4711-Secret",
    }  # fmt: skip
    with pytest.raises(EdgeKDError, match="LossyImageCompressionRatio that is no number"):
        dicom.elements(with_value(content, 0x2112, "10:1"), ["LossyImageCompressionRatio"])


@pytest.mark.parametrize(("said", "meant"), [("yes", "YES"), ("NO ", "NO"), ("Y", ""), ("", "")])
def test_burned_in_text_is_yes_or_no_or_not_known(said, meant):
    assert dicom.facts(made(BurnedInAnnotation=said)).burned_in == meant


# --- words that may be signed or not ---


@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("implicit", [False, True])
def test_padding_is_of_the_pixels_representation(vr, implicit):
    meant = np.tile(np.arange(-2000, -1744, dtype=np.int16).reshape(16, 16), (1, 2))
    meant[0] = -2000
    content = made(meant, BitsStored=16, HighBit=15, PixelPaddingValue=-2000,
                   SmallestImagePixelValue=-2000, LargestImagePixelValue=3)  # fmt: skip
    content = with_value(content, 0x0120, vr=vr)
    if implicit:
        ds = pydicom.dcmread(io.BytesIO(content))
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        with io.BytesIO() as out:
            ds.save_as(out, implicit_vr=True, little_endian=True)
            content = out.getvalue()
    image = meant[1:].astype(float)
    low, high = image.min(), image.max()
    got = shown(content)
    assert (got[0] == 0).all()
    np.testing.assert_allclose(got[1:], 255 * (image - low) / (high - low), atol=1)


def test_padding_up_to_nought_and_beyond_the_bits():
    meant = np.arange(-128, 128, dtype=np.int16).reshape(16, 16)
    got = shown(made(meant, PixelPaddingValue=-2000, PixelPaddingRangeLimit=0))
    expected = np.where(meant <= 0, 0, 255.0 * (meant - 1.0) / 126)
    np.testing.assert_allclose(got, expected, atol=1)
    pixels = LEVELS.copy()
    pixels[0] = 0xFFFF  # more than 12 bits: no value, and not that of a white pixel
    pixels[1] = 4095
    got = shown(made(pixels, PixelPaddingValue=0xFFFF, **FULL))
    np.testing.assert_allclose(got, np.where(pixels == 0xFFFF, 0, linear(pixels)), atol=1)
    zero = made(LEVELS + 8, PixelPaddingValue=0)  # 0 is a value: nothing is it here
    near(zero, LEVELS / 4080 * 255)


@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize(
    ("first", "elements", "offset"),
    [(0, {}, 0), (3000, {}, 0), (-500, {"PixelRepresentation": 1}, 0),
     (-1024, {"RescaleSlope": 1, "RescaleIntercept": -1024}, -1024),
     (60000, {"BitsStored": 16, "HighBit": 15}, 0), (-5, {}, 0)],
)  # fmt: skip
def test_where_a_table_begins_is_of_what_it_maps(vr, first, elements, offset):
    count = 1000
    entries = (np.arange(count) * 4095 // (count - 1)).astype(np.uint16)
    item = lut(entries, 0, 12)
    cells = LEVELS * 16 if first == 60000 else LEVELS
    content = made(cells, VOILUTSequence=item, **elements)
    content = with_value(content, 0x3002, struct.pack("<3H", count, first & 0xFFFF, 12), vr)
    meant = cells.astype(np.int64)
    if "PixelRepresentation" in elements:
        meant = np.where(meant >= 2048, meant - 4096, meant)
    index = (meant + offset - first).clip(0, count - 1)
    near(content, entries[index] / 4095 * 255)


# --- tables and palettes ---

RAMP = np.arange(4096, dtype=np.uint16)


@pytest.mark.parametrize(
    ("keyword", "entries", "states", "words"),
    [("VOILUTSequence", RAMP, 12, ""), ("VOILUTSequence", RAMP, 16, "16 bits.*holds 12"),
     ("VOILUTSequence", RAMP, 8, "8 bits.*holds 12"), ("VOILUTSequence", RAMP // 64, 8, "holds 6"),
     ("ModalityLUTSequence", RAMP, 16, ""), ("ModalityLUTSequence", RAMP, 8, "8 bits.*holds 12"),
     ("VOILUTSequence", RAMP, 0, "0 bits an entry"), ("VOILUTSequence", RAMP, 32, "32 bits"),
     ("VOILUTSequence", RAMP[:4000], 12, "")],
)  # fmt: skip
def test_a_table_that_states_other_bits_than_it_holds(keyword, entries, states, words):
    content = made(**{keyword: lut(entries, 0, states)})
    if words:
        with pytest.raises(EdgeKDError, match=words):
            shown(content)
    else:
        seen = entries[LEVELS.clip(0, len(entries) - 1)]
        white = seen.max() if keyword == "ModalityLUTSequence" else 4095
        near(content, seen / white * 255)


def test_a_table_of_three_values_with_data():
    item = lut(RAMP, 0, 12)
    item[0].LUTDescriptor = [4096, 0]
    with pytest.raises(EdgeKDError, match="2 values of LUTDescriptor where 3 belong"):
        shown(made(VOILUTSequence=item))
    item = lut(RAMP, 0, 12)
    del item[0].LUTData
    with pytest.raises(EdgeKDError, match="without LUTData"):
        shown(made(VOILUTSequence=item))
    whole = (np.arange(2**16) >> 4).astype(np.uint16)  # 65,536 entries are stated as 0
    near(made(VOILUTSequence=lut(whole, 0, 12)), whole[LEVELS] / 4095 * 255)


def palette(index, colours, how, states, syntax=None, segmented=False):
    """(n, 3) uint8 colours, kept in bytes, in words or as 16 bits."""
    elements = {"PhotometricInterpretation": "PALETTE COLOR", "BitsStored": 8 * index.itemsize,
                "HighBit": 8 * index.itemsize - 1}  # fmt: skip
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    for name, column in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        key = f"{name}PaletteColorLookupTable"
        elements[f"{key}Descriptor"] = [len(column) % 2**16, 0, states]
        entries = column.astype(np.uint16) * (257 if how == "wide" else 1)
        kind = "u1" if how == "bytes" else f"{order}u2"
        if segmented:  # one segment, discrete
            entries = np.concatenate([[0, len(column)], entries])
        elements[f"{'Segmented' if segmented else ''}{key}Data"] = entries.astype(kind).tobytes()
    return made(index, **({} if syntax is None else {"syntax": syntax}), **elements)


@pytest.mark.parametrize("states", [8, 16])
@pytest.mark.parametrize("how", ["bytes", "words", "wide"])
def test_a_palette_by_what_it_holds(how, states):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4096, 3)).astype(np.uint8)
    index = rng.integers(0, 4096, (20, 20)).astype(np.uint16)  # more than fit into a byte
    np.testing.assert_array_equal(shown(palette(index, colours, how, states)), colours[index])
    if how != "bytes":
        big = palette(index, colours, how, states, ExplicitVRBigEndian)
        np.testing.assert_array_equal(shown(big), colours[index])


def test_palettes_that_are_none():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (256, 3)).astype(np.uint16)
    index = rng.integers(0, 256, (20, 20)).astype(np.uint8)
    np.testing.assert_array_equal(
        shown(palette(index, colours, "words", 16, segmented=True)), colours[index]
    )
    with pytest.raises(EdgeKDError, match="palette holds 12 bits a colour"):
        shown(palette(index, colours * 16, "words", 16))
    content = palette(index, colours, "words", 16)
    ds = pydicom.dcmread(io.BytesIO(content))
    del ds.GreenPaletteColorLookupTableData
    with io.BytesIO() as out:
        ds.save_as(out)
        with pytest.raises(EdgeKDError, match="without GreenPaletteColorLookupTableData"):
            shown(out.getvalue())


# --- colours ---


def blocks() -> np.ndarray:
    """(48, 48, 3) uint8: blocks of JPEG, each of one colour."""
    coarse = np.random.default_rng(1).integers(30, 220, (3, 3, 3)).astype(np.uint8)
    return coarse.repeat(16, 0).repeat(16, 1)


def jpeg(space: str, mark: str) -> bytes:
    """A stream whose components are RGB or YCbCr, marked by ids, Adobe's segment, JFIF or not."""
    pixels = Image.fromarray(blocks())
    with io.BytesIO() as out:
        subsampling = 2 if mark == "subsampled" else 0
        pixels.save(out, "JPEG", quality=100, subsampling=subsampling, keep_rgb=space == "RGB")
        stream = out.getvalue()
    for name in (b"\xff\xe0", b"\xff\xee"):  # Pillow's own mark
        while name in stream[:64]:
            at = stream.index(name)
            size = int.from_bytes(stream[at + 2 : at + 4], "big")
            stream = stream[:at] + stream[at + 2 + size :]
    at = next(i for i in range(len(stream)) if stream[i : i + 2] == b"\xff\xc0")
    ids = b"RGB" if mark == "ids" else b"\1\2\3"
    head, scan = bytearray(stream), stream.index(b"\xff\xda")
    for i in range(3):
        head[at + 10 + 3 * i] = head[scan + 5 + 2 * i] = ids[i]
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + (b"\0" if space == "RGB" else b"\1")
    jfif = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    segment = {"Adobe": adobe, "JFIF": jfif}.get(mark, b"")
    return bytes(head[:2]) + segment + bytes(head[2:])


@pytest.mark.parametrize("label", ["RGB", "YBR_FULL_422", "YBR_FULL", "YBR_RCT"])
@pytest.mark.parametrize(
    ("space", "mark"),
    [("YBR", "Adobe"), ("YBR", "JFIF"), ("YBR", "subsampled"), ("RGB", "Adobe"), ("RGB", "ids")],
)
@pytest.mark.parametrize("planar", [0, 1])
def test_a_jpeg_of_colours_knows_better_than_its_label(label, space, mark, planar):
    pytest.importorskip("libjpeg", reason="pip install 'edgekd[dicom-jpeg]'")
    content = compressed(made(blocks()), jpeg(space, mark), BASELINE,
                         PhotometricInterpretation=label, PlanarConfiguration=planar)  # fmt: skip
    inner = np.ix_(*[np.arange(48)[np.arange(48) % 16 // 4 % 3 > 0]] * 2)  # chroma may bleed
    np.testing.assert_allclose(shown(content)[inner], blocks()[inner].astype(int), atol=3)


def test_a_jpeg_that_says_nothing_is_as_it_is_called():
    pytest.importorskip("libjpeg", reason="pip install 'edgekd[dicom-jpeg]'")
    for space, label in (("RGB", "RGB"), ("YBR", "YBR_FULL")):
        content = compressed(made(blocks()), jpeg(space, ""), BASELINE,
                             PhotometricInterpretation=label)  # fmt: skip
        np.testing.assert_allclose(shown(content), blocks().astype(int), atol=3)
    with pytest.raises(EdgeKDError, match="YBR_ICT whose JPEG stream has no colour transform"):
        shown(compressed(made(blocks()), jpeg("RGB", ""), BASELINE,
                         PhotometricInterpretation="YBR_ICT"))  # fmt: skip


@pytest.mark.parametrize(
    ("mct", "label", "words"),
    [(True, "YBR_RCT", ""), (True, "RGB", ""), (False, "RGB", ""),
     (False, "YBR_RCT", "no colour transform"), (True, "YBR_FULL", "a colour transform")],
)  # fmt: skip
def test_jpeg_2000_of_colours(mct, label, words):
    content = compressed(made(blocks()), j2k(blocks(), 8, mct), PhotometricInterpretation=label)
    assert streams.header(j2k(blocks(), 8, mct)).colour == ("MCT" if mct else "")
    if words:
        with pytest.raises(EdgeKDError, match=f"{label} whose JPEG 2000 stream has {words}"):
            shown(content)
    else:
        np.testing.assert_array_equal(shown(content), blocks())


@pytest.mark.parametrize(
    ("elements", "words"),
    [({"PhotometricInterpretation": "YBR_RCT"}, "YBR_RCT whose pixels have no colour transform"),
     ({"PhotometricInterpretation": "YBR_FULL_422"}, "pixels have three bytes each"),
     ({"PlanarConfiguration": None}, "without PlanarConfiguration 0 or 1"),
     ({"PlanarConfiguration": 2}, "without PlanarConfiguration 0 or 1"),
     ({"BitsStored": 7, "HighBit": 6}, "BitsStored 7 of BitsAllocated 8")],
)  # fmt: skip
def test_colours_that_are_called_otherwise(elements, words):
    with pytest.raises(EdgeKDError, match=words):
        shown(made(blocks(), **elements))


def test_colours_know_no_sign_and_as_many_samples_as_they_hold():
    np.testing.assert_array_equal(shown(made(blocks(), PixelRepresentation=1)), blocks())
    with pytest.raises(EdgeKDError, match="SamplesPerPixel 1 whose JPEG 2000 stream holds 3"):
        shown(compressed(made(np.zeros((48, 48), np.uint8)), j2k(blocks(), 8)))
    with pytest.raises(EdgeKDError, match="BitsAllocated 8 whose JPEG 2000 stream holds 12"):
        shown(compressed(made(np.zeros((48, 48), np.uint8)), j2k(BIG.astype(np.uint16), 12)))


# --- the shape of a pixel ---

EIGHT = np.linspace(0, 255, 24 * 30).reshape(24, 30).astype(np.uint8)


@pytest.mark.parametrize(
    ("elements", "size"),
    [({}, (24, 30)), ({"PixelSpacing": [0.2, 0.2]}, (24, 30)),
     ({"PixelSpacing": [0.4, 0.2]}, (48, 30)), ({"ImagerPixelSpacing": [1, 2]}, (24, 60)),
     ({"PixelAspectRatio": [2, 1]}, (48, 30)), ({"PixelSpacing": [0.2, 0.2001]}, (24, 30)),
     ({"PixelSpacing": [0.2, 0.2], "PixelAspectRatio": [2, 1]}, (24, 30)),
     ({"PixelSpacing": [0, 0], "PixelAspectRatio": [2, 1]}, (48, 30)),
     ({"NominalScannedPixelSpacing": [0.1, 0.15]}, (24, 45)), ({"PixelSpacing": ""}, (24, 30))],
)  # fmt: skip
def test_pixels_are_made_square(elements, size):
    got = shown(made(EIGHT, **elements))
    assert got.shape == size

    def along(old, new):  # linear between centres, constant beyond the outermost
        at = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        return np.array([np.interp(at, np.arange(old), np.eye(old)[i]) for i in range(old)]).T

    expected = along(24, size[0]) @ EIGHT.astype(float) @ along(30, size[1]).T
    np.testing.assert_allclose(got, expected, atol=1)
    colours = shown(made(np.dstack([EIGHT] * 3), **elements))
    np.testing.assert_array_equal(colours, np.dstack([got] * 3))


@pytest.mark.parametrize(
    ("text", "words"),
    [("0.2 ", "not two numbers above 0"), ("-1\\1", "not two numbers above 0"),
     ("0\\.2", "not two numbers above 0"), ("a\\.2", "PixelSpacing that is no number"),
     ("1\\20", "PixelSpacing of pixels over 10 times as long as wide"), ("2,\\2", "")],
)  # fmt: skip
def test_a_shape_that_cannot_be(text, words):
    content = with_value(made(EIGHT, PixelSpacing=[1, 1]), 0x0030, text)
    if words:
        with pytest.raises(EdgeKDError, match=words):
            shown(content)
    else:
        np.testing.assert_array_equal(shown(content), EIGHT)


def test_a_picture_made_square_is_no_larger_than_others():
    with pytest.raises(EdgeKDError, match=r"megapixels when its pixels are made square \(Pixel"):
        dicom.decode(made(EIGHT, PixelSpacing=[2, 1]), EIGHT.size)
    assert dicom.decode(made(EIGHT, PixelSpacing=[2, 1]), 2 * EIGHT.size).size == (30, 48)


# --- hardly any contrast ---


def test_what_is_flat():
    rng = np.random.default_rng(0)
    noise = rng.integers(100, 107, (64, 64)).astype(np.uint8)
    assert preprocess.is_flat(Image.fromarray(noise))
    noise[0, :20] = 255  # half a percent: a label
    assert preprocess.is_flat(Image.fromarray(noise))
    noise[:2] = 200
    assert not preprocess.is_flat(Image.fromarray(noise))
    assert preprocess.is_flat(Image.new("RGB", (20, 20), (90, 10, 200)))
    assert not preprocess.is_flat(Image.fromarray(rng.integers(90, 99, (64, 64)).astype(np.uint8)))


def test_hardly_any_contrast_is_said_everywhere(tmp_path):
    """By data check and data prepare; for predict and serve see tests/serve/test_model.py."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in "ab":
            for n in range(2):
                place = tmp_path / "in" / split / label / f"{n}.dcm"
                place.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 4096, (20, 20)).astype(np.uint16)
                window = FULL if (split, label, n) != ("val", "b", 1) else {
                    "WindowCenter": 300_000, "WindowWidth": 600_000}  # fmt: skip
                place.write_bytes(made(pixels, PatientID=f"{split}{label}{n}", **window))
    flat = [n for n in data.open_dataset(tmp_path / "in").notes if "contrast" in n]
    assert len(flat) == 1
    assert preprocess.FLAT in flat[0]
    assert flat[0].startswith("1 images have almost no contrast: 98% of the pixels lie within 8")
    assert "; the first is val/b DICOM file " in flat[0]
    for command in (["check", tmp_path / "in"], ["prepare", tmp_path / "in", tmp_path / "out"]):
        done = CliRunner().invoke(app, ["data", *map(str, command)])
        assert done.exit_code == 0, done.stderr
        said = " ".join((done.stdout + done.stderr).split())
        assert f"note: {flat[0]}" in said
    assert deidentify.Prepared.load(tmp_path / "out").images["val"] == 4


def test_a_mask_is_of_the_image_as_shown(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in "ab":
            for n in range(2):
                name = f"{split}/{label}/{n}"
                pixels = rng.integers(0, 256, (24, 30)).astype(np.uint8)
                for place in (tmp_path / name, tmp_path / "masks" / name):
                    place.parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / f"{name}.dcm").write_bytes(
                    made(pixels, PatientID=name, PixelSpacing=[2, 1])
                )
                size = (30, 24) if name == "val/a/1" else (30, 48)
                Image.new("L", size, 255).save(tmp_path / "masks" / f"{name}.png")
    found = data.inspect(tmp_path)
    assert [p.split(": ", 1)[1] for p in found.problems] == [
        "mask of 30 x 24 pixels for an image of 30 x 48 (as shown, its pixels square)"
    ]
