"""Small files that hold much: refused by what their headers state, before anything is decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from edgekd.data import limits, preprocess, streams
from edgekd.records import EdgeKDError


def saved(kind, size=(48, 32), **more):
    with io.BytesIO() as buffer:
        Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[::-1])).save(
            buffer, kind, **more
        )
        return buffer.getvalue()


def test_what_streams_state():
    assert streams.header(saved("JPEG"))[:2] == (32, 48)
    assert streams.header(saved("JPEG", progressive=True))[:2] == (32, 48)
    assert streams.header(saved("JPEG2000", no_jp2=True))[:2] == (32, 48)
    whole = saved("JPEG2000")  # a JP2 file, which scanners write where the stream should be
    assert streams.header(whole)[:2] == (32, 48)
    decoy = b"\xff\x4f\xff\x51" + bytes(40)
    boxed = struct.pack(">I4s", 8 + len(decoy), b"uuid") + decoy
    assert streams.header(whole[:12] + boxed + whole[12:])[:2] == (32, 48)  # no decoder looks there
    long = struct.pack(">I4sQ", 1, b"uuid", 16 + len(decoy)) + decoy
    assert streams.header(whole[:12] + long + whole[12:])[:2] == (32, 48)
    assert streams.header(whole[:12] + bytes(4) + b"uuid" + whole[12:]) is None
    exif = saved("JPEG", exif=b"Exif\0\0" + bytes(300))
    assert streams.header(exif[:2] + b"\xff" + exif[2:])[:2] == (32, 48)  # with filling
    for torn in (b"", b"\xff\xd8", saved("JPEG")[:30], b"\xff\x4f\xff\x51", saved("PNG")):
        assert streams.header(torn) is None


def test_a_jpeg_of_many_scans():
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    assert preprocess.decode(data[:-2] + scan * 20 + data[-2:]).size == (48, 32)
    with pytest.raises(EdgeKDError, match=r"JPEG of 20\d scans, 100 at most are read"):
        preprocess.decode(data[:-2] + scan * 200 + data[-2:])


@pytest.fixture
def dicom_file():
    pytest.importorskip("pydicom", reason="pip install 'edgekd[dicom]'")
    from data.test_dicom import made

    return made(np.full((32, 48), 90, np.uint8))


def deflated(data, extra):
    """The same file deflated, with `extra` bytes of zeros in a private element at its end."""
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    ds = pydicom.dcmread(io.BytesIO(data))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with io.BytesIO() as buffer:
        ds.save_as(buffer, enforce_file_format=True)
        made = buffer.getvalue()
    at = 144 + struct.unpack_from("<I", made, 140)[0]
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = pack.compress(zlib.decompress(made[at:], -15))
    body += pack.compress(struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"OB", 0, extra) + bytes(extra))
    return made[:at] + body + pack.flush()


def test_a_deflated_dicom_file(dicom_file, monkeypatch):
    assert preprocess.decode(deflated(dicom_file, 1000)).size == (48, 32)
    monkeypatch.setattr(limits, "INFLATED", 1 << 20)
    monkeypatch.setattr(limits, "_PIECE", 1 << 18)
    with pytest.raises(EdgeKDError, match="DICOM of more than 1 MB inflated"):
        preprocess.decode(deflated(dicom_file, 2 << 20))
    torn = deflated(dicom_file, 1000)
    with pytest.raises(EdgeKDError, match="corrupt or truncated DICOM file"):
        preprocess.decode(torn[:-40] + bytes(40))
    at = torn.index(limits.DEFLATED) - 4
    with pytest.raises(EdgeKDError, match="not explicit"):  # pydicom would guess
        preprocess.decode(torn[:at] + b"\0\0" + torn[at + 2 :])


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_a_frame_that_is_larger_than_its_file_says(dicom_file, kind, monkeypatch):
    pytest.importorskip("openjpeg" if kind == "JPEG2000" else "libjpeg",
                        reason="pip install 'edgekd[dicom-jpeg]'")  # fmt: skip
    import pydicom
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import Decoder

    more = {"no_jp2": True} if kind == "JPEG2000" else {}
    ds = pydicom.dcmread(io.BytesIO(dicom_file))
    ds.file_meta.TransferSyntaxUID = {
        "JPEG": "1.2.840.10008.1.2.4.50", "JPEG2000": "1.2.840.10008.1.2.4.90",
    }[kind]  # fmt: skip
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    decoded = []
    real = Decoder.as_array
    monkeypatch.setattr(Decoder, "as_array", lambda *a, **k: decoded.append(1) or real(*a, **k))
    for size, fits in (((48, 32), True), ((480, 320), False)):
        ds.PixelData = encapsulate([saved(kind, size, **more)])
        with io.BytesIO() as buffer:
            ds.save_as(buffer, enforce_file_format=True)
            data = buffer.getvalue()
        if fits:
            assert preprocess.decode(data).size == (48, 32)
        else:
            with pytest.raises(EdgeKDError, match="pixels are not of the size"):
                preprocess.decode(data)
    assert len(decoded) == 1
