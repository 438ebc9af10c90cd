"""DICOM: the grey levels that the standard says, real files, malformed ones, and nobody's name."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian
from typer.testing import CliRunner

from edgekd import data
from edgekd.cli.main import app
from edgekd.data import dicom, dicom_elements, dicom_grey, preprocess
from edgekd.records import EdgeKDError

NAMES = ("Roentgen", "4711-Secret", "Wilhelm")  # patient's name and id, in files and their names
LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 12 bit: 0, 16, ..., 4080


def made(pixels: np.ndarray = LEVELS, syntax=ExplicitVRLittleEndian, **elements) -> bytes:
    """A DICOM file of grey (H, W) or colour (H, W, 3) pixels; an element of None is left out."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.PatientName, ds.PatientID = "Roentgen^Wilhelm", "4711-Secret"
    ds.Rows, ds.Columns = pixels.shape[:2]
    bits = 8 * pixels.dtype.itemsize
    colour = pixels.ndim == 3
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored = bits, 12 if bits == 16 else bits
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    if colour:
        ds.PlanarConfiguration = 0
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    out = io.BytesIO()
    ds.save_as(out, implicit_vr=False, little_endian=order == "<", enforce_file_format=True)
    return out.getvalue()


def shown(content: bytes) -> np.ndarray:
    return np.asarray(preprocess.decode(content))


def real(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path, name
    return Path(path).read_bytes()


# --- grey levels, by hand ---


def test_without_a_window_darkest_to_brightest():
    expected = np.rint(LEVELS / 4080 * 255)
    np.testing.assert_array_equal(shown(made()), expected)
    np.testing.assert_array_equal(
        shown(made(PhotometricInterpretation="MONOCHROME1")), np.rint((1 - LEVELS / 4080) * 255)
    )


def test_eight_bits_are_grey_levels_already():
    eight = np.arange(100, 356, dtype=np.uint16).clip(0, 200).astype(np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(shown(made(eight)), eight)
    np.testing.assert_array_equal(
        shown(made(eight, PhotometricInterpretation="MONOCHROME1")), 255 - eight
    )
    signed = (eight.astype(np.int16) - 128).astype(np.int8)
    np.testing.assert_array_equal(shown(made(signed)), eight)


@pytest.mark.parametrize(
    ("function", "width", "values", "expected"),
    [  # PS3.3 C.11.2.1.2: center 100; the ends and quarters by hand
        ("LINEAR", 101, [49.5, 74.5, 99.5, 149.5, 900], [0, 0.25, 0.5, 1, 1]),
        ("LINEAR", 1, [99, 99.5, 100, 101], [0, 0, 1, 1]),
        ("LINEAR_EXACT", 100, [50, 75, 100, 150, -9], [0, 0.25, 0.5, 1, 0]),
        ("SIGMOID", 100, [100, 125, 75], [0.5, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]),
    ],
)
def test_windows(function, width, values, expected):
    np.testing.assert_allclose(dicom_grey.window(np.array(values), 100, width, function), expected)


def test_rescale_then_window():
    # slope 2, intercept -1000: stored 500 is 0; window 0 +- 100 over 200 values
    got = shown(made(LEVELS, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[0.5, 9],
                     WindowWidth=[201, 9]))  # fmt: skip
    expected = np.rint(255 * np.clip((LEVELS * 2.0 - 1000) / 200 + 0.5, 0, 1))
    np.testing.assert_array_equal(got, expected)
    assert 0 < expected[1, 15] < 255  # 496 -> -8


@pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "examples_overlay.dcm"])
def test_windows_agree_with_pydicom(name):
    from pydicom.pixels import apply_modality_lut, apply_windowing, pixel_array

    ds = pydicom.dcmread(io.BytesIO(real(name)))
    values = apply_windowing(apply_modality_lut(pixel_array(ds), ds), ds, index=0)
    signed, bits = ds.PixelRepresentation, ds.BitsStored
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    low, high = low * slope + intercept, high * slope + intercept
    expected = (values - low) / (high - low) * 255
    np.testing.assert_allclose(shown(real(name)), expected, atol=0.51)


def lut(entries, first, bits, states=0) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [states or len(entries) % 2**16, first, bits]
    item.LUTData = np.asarray(entries, np.uint16).tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return [item]


def test_a_voi_table_from_12_to_8_bit_goes_before_the_window():
    """pydicom's own wraps here: 4,096 entries of 8 bits."""
    curve = (255 * (np.arange(4096) / 4095) ** 2).astype(np.uint16)
    got = shown(made(VOILUTSequence=lut(curve, 0, 8), WindowCenter=5, WindowWidth=2))
    np.testing.assert_array_equal(got, curve[LEVELS])


def test_a_modality_table_and_where_it_begins():
    table = [10, 20, 30, 40]  # for 16, 17, 18, 19; below the first, above the last
    got = shown(made(ModalityLUTSequence=lut(table, 16, 12), WindowCenter=25.5, WindowWidth=51))
    expected = np.rint(255 * np.array([10, 10, 40, 40]) / 50)
    np.testing.assert_array_equal(got[0, :4], expected)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_range(photometric):
    pixels = LEVELS // 16 + 1000
    pixels[0, :8] = 0
    pixels[0, 8:12] = 3
    got = shown(made(pixels, PhotometricInterpretation=photometric, PixelPaddingValue=0,
                     PixelPaddingRangeLimit=5))  # fmt: skip
    assert (got[0, :12] == 0).all()
    share = (pixels[1] - 1012.0) / (1255 - 1012)
    np.testing.assert_array_equal(
        got[1], np.rint(255 * (1 - share if photometric == "MONOCHROME1" else share))
    )


def test_byte_orders_and_syntaxes_show_the_same():
    first = shown(real("MR_small.dcm"))
    for other in ("RLE", "bigendian", "implicit", "jp2klossless", "jpeg_ls_lossless"):
        np.testing.assert_array_equal(shown(real(f"MR_small_{other}.dcm")), first)
    np.testing.assert_array_equal(shown(made(syntax=ExplicitVRBigEndian)), shown(made()))


def test_colour():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    np.testing.assert_array_equal(shown(made(red)), red)
    plain = shown(real("SC_rgb_jpeg_gdcm.dcm")).astype(int)  # lossless
    for name in ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle.dcm", "SC_rgb_jpeg_dcmtk.dcm",
                 "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_gdcm_KY.dcm"):  # fmt: skip
        assert abs(shown(real(name)) - plain).mean() < 3, name
    ds = pydicom.dcmread(io.BytesIO(real("examples_palette.dcm")))
    red_of = np.frombuffer(ds.RedPaletteColorLookupTableData, "<u2")
    index = ds.pixel_array
    np.testing.assert_array_equal(shown(real("examples_palette.dcm"))[..., 0], red_of[index] >> 8)


# --- what is not an image of the kind ---

J2K = real("MR_small_jp2klossless.dcm")
CODE = J2K.index(b"\xff\x4f\xff\x51") + 4  # of the code stream, after its mark
MALFORMED = {
    "no mark": (b"\0" * 400, "not a JPEG, PNG or DICOM image"),
    "empty": (b"", "empty file"),
    "cut": (made()[:-200], r"truncated DICOM file \(PixelData of 312 bytes, 512 by Rows"),
    "cut in the header": (made()[:200], "DICOM"),
    "a report": (real("test-SR.dcm"), "without pixel data"),
    "no rows": (made(Rows=None), "DICOM without Rows: export it again"),
    "frames": (real("rtdose.dcm"), "DICOM of 15 frames, one is expected"),
    "photometric": (made(PhotometricInterpretation="HSV"), "other than MONOCHROME1"),
    "samples": (made(SamplesPerPixel=4), "DICOM of 4 samples a pixel, which is not MONOCHROME2"),
    "16-bit colour": (real("SC_rgb_rle_16bit.dcm"), "DICOM colour of 16 bits"),
    "huge": (made(Rows=60000, Columns=60000), "3600 megapixels, more than 64"),
    "width": (made(WindowCenter=1, WindowWidth=0), "WindowWidth that is too small"),
    "window": (made(WindowCenter=1, WindowWidth=9, VOILUTFunction="X"), "VOILUTFunction other"),
    "slope": (made(RescaleSlope=0, RescaleIntercept=1), "RescaleSlope 0"),
    "cut stream": (J2K[:-200], r"corrupt or truncated DICOM file \(no SOPClassUID\)"),
    "broken stream": (
        J2K[:CODE] + b"\7" * 99 + J2K[CODE + 99 :],
        "corrupt or truncated DICOM file",
    ),
    "JPIP": (J2K.replace(b"1.2.4.90", b"1.2.4.94"), "which no decoder reads"),
    "functional groups": (real("liver_1frame.dcm"), "enhanced DICOM"),
    "short table": (made(VOILUTSequence=lut([1, 2], 0, 8, states=9)), "of 2 entries states 9"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_one_clear_line_that_names_nobody(kind, tmp_path):
    content, reason = MALFORMED[kind]
    for split in ("train", "test"):
        for label in "ab":
            place(tmp_path, split, label, 3)
    (tmp_path / "train/a/Roentgen_4711-Secret.dcm").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()[:12]
    problems = [p for p in data.inspect(tmp_path).problems if digest in p]
    assert len(problems) == 1, data.inspect(tmp_path).problems
    assert problems[0].startswith(f"train/a DICOM file {digest}: ")
    with pytest.raises(EdgeKDError, match=reason) as e:
        preprocess.decoded(tmp_path / "train/a/Roentgen_4711-Secret.dcm")
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--json"])
    assert done.exit_code == 1
    assert digest in json.loads(done.stdout)["problems"][0]
    for text in (str(e.value), done.stdout, done.stderr, *problems):
        assert "\n" not in text or text == done.stdout
        assert not any(n in text for n in NAMES)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    dicom_elements.pydicom.cache_clear()
    try:
        with pytest.raises(EdgeKDError, match=r"needs pydicom: pip install 'edgekd\[dicom\]'"):
            preprocess.decode(made())
    finally:
        monkeypatch.undo()
        dicom_elements.pydicom.cache_clear()


# --- whose it is ---


def place(root: Path, split: str, label: str, number: int, patient: str = "") -> None:
    """A DICOM file of random pixels, of a patient of its own unless one is named."""
    folder = root / split / label
    folder.mkdir(parents=True, exist_ok=True)
    seed = int(hashlib.sha256(f"{split}{label}{number}".encode()).hexdigest()[:8], 16)
    pixels = np.random.default_rng(seed).integers(0, 4096, (20, 20)).astype(np.uint16)
    owner = patient or f"{split}{label}{number}"
    content = made(pixels, PatientID=f"4711-Secret-{owner}")
    (folder / f"Roentgen^Wilhelm-{number}.dcm").write_bytes(content)


def test_a_token_is_of_the_patient_and_issuer():
    ours = dicom.facts(made()).patient
    assert dicom.facts(made(LEVELS // 2)).patient == ours
    assert dicom.facts(made(PatientID="4711-SecreT")).patient != ours
    assert dicom.facts(made(IssuerOfPatientID="B")).patient != ours
    assert dicom.facts(made(PatientID=None)).patient == ""
    assert hashlib.sha256(b"4711-Secret").hexdigest() not in ours
    assert dicom.facts(made(BurnedInAnnotation="YES")).burned_in == "YES"
    assert not dicom.facts(made()).has_window
    assert dicom.facts(made(WindowCenter=5, WindowWidth=2)).has_window


def test_patients_group_images_and_are_not_named(tmp_path):
    for n in range(30):
        place(tmp_path, "a", "", n, patient=f"p{n // 3}")
        place(tmp_path, "b", "", n, patient=f"p{n // 3 + 5}")
    opened = data.open_dataset(tmp_path)
    homes: dict[str, set[str]] = {}
    for split, samples in opened.splits.items():
        for s in samples:
            homes.setdefault(s.group, set()).add(split)
    assert len(homes) == 15
    assert all(len(h) == 1 for h in homes.values())
    assert "groups: patients of the DICOM files" in opened.split_rule
    digests = {s.digest for v in opened.splits.values() for s in v}
    assert set(homes) <= digests  # a group is called by an image's hash, not by its patient
    again = data.open_dataset(tmp_path)
    assert again == opened


def test_a_patient_in_two_splits_is_a_leak_without_a_name(tmp_path):
    for split in ("train", "val", "test"):
        for label in "ab":
            for n in range(2):
                place(tmp_path, split, label, n)
    place(tmp_path, "test", "b", 1, patient="traina0")
    found = data.inspect(tmp_path)
    assert found.leaks == {"same group": 1}
    assert not any(n in found.problems[0] for n in NAMES)
    assert "same patient or group as" in found.problems[0]
    allowed = data.open_dataset(tmp_path, allow_leakage=True)
    assert allowed.split_rule.endswith(
        " LEAKAGE between splits, allowed as asked for: 1 same group."
    )


def test_folders_of_patients_are_not_taken_for_classes(tmp_path):
    for patient in ("Roentgen_Wilhelm", "Roentgen_Anna"):
        for n in range(4):
            place(tmp_path, patient, "", n, patient=patient)
    with pytest.raises(EdgeKDError, match="are they patients' folders") as e:
        data.open_dataset(tmp_path)
    assert "Roentgen" not in str(e.value)


def test_trees_of_studies_and_files_without_suffix(tmp_path):
    for split in ("train", "val", "test"):
        for label in "ab":
            for n in range(2):
                place(tmp_path / "flat", split, label, n)
                tree = tmp_path / "tree" / split / label / f"Roentgen{n}/study/series"
                tree.mkdir(parents=True)
                shutil.copy(
                    tmp_path / f"flat/{split}/{label}/Roentgen^Wilhelm-{n}.dcm", tree / "1.2.3"
                )
    (tmp_path / "tree/train/a/Roentgen0/DICOMDIR").write_bytes(real("test-SR.dcm"))
    flat, tree = (data.open_dataset(tmp_path / k) for k in ("flat", "tree"))
    assert [s.digest for s in flat.splits["train"]] == [s.digest for s in tree.splits["train"]]
    assert tree.notes == (
        "12 DICOM images state no window: shown from their darkest to their brightest value",
        "12 DICOM images do not say whether text is burned in: look before you share them",
    )


def test_a_broken_length_of_the_files_meta_information_is_one_line():
    data = made()
    with pytest.raises(EdgeKDError, match="corrupt or truncated DICOM file"):
        dicom.decode(data[:138] + b"\x03\0" + data[140:], 10**6)  # a number of 3 bytes


def test_a_slow_file_keeps_no_other_waiting_and_all_are_quiet(monkeypatch):
    at_it, may, decode = threading.Event(), threading.Event(), dicom.decode

    def slowly(content, most_pixels):
        at_it.set()
        assert may.wait(20)
        warnings.warn("Roentgen^Wilhelm", stacklevel=1)  # an error here, were it not quiet
        return decode(content, most_pixels)

    monkeypatch.setattr(dicom, "decode", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(shown, made())
        assert at_it.wait(20)
        monkeypatch.setattr(dicom, "decode", decode)
        try:
            quick = pool.submit(shown, made()).result(10)
        finally:
            may.set()
        np.testing.assert_array_equal(slow.result(20), quick)
    assert warnings.filters == before
