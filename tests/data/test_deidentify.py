"""A prepared folder holds the same pixels and nothing else, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data.test_dicom import NAMES, made
from PIL import Image
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from edgekd import data
from edgekd.cli.main import app
from edgekd.data import deidentify, preprocess
from edgekd.records import EdgeKDError

REAL = {  # of pydicom's own test files: windows, palettes, five compressions, no suffix
    "train/mr": ("MR_small.dcm", "693_J2KI.dcm", "JPGExtended.dcm"),
    "train/other": (
        "examples_palette.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
        "SC_jpeg_no_color_transform.dcm",
    ),
    "val/mr": ("examples_overlay.dcm",),
    "val/other": ("examples_rgb_color.dcm", "GDCMJ2K_TextGBR.dcm"),
    "test/mr": ("J2K_pixelrep_mismatch.dcm", "CT_small.dcm"),
    "test/other": ("ExplVR_BigEnd.dcm", "image_dfl.dcm"),
}
OWNERS = ("CompressedSamples", "4MR1", "8NM1", "1CT1", "13US1", "CQ500", "JXD191021006", "Lestrade",
          "Anonymized", "021234567", "Sssssss", "11-05-25", "^")  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def real(tmp_path):
    root = tmp_path / "source-of-Roentgen"
    for folder, names in REAL.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            path = get_testdata_file(name, download=False)
            shutil.copy(path, root / folder / f"Roentgen^{Path(name).stem}")
    return root


def test_real_dicom_through_check_and_prepare_and_nobody_is_in_what_is_written(real, tmp_path):
    checked = run("data", "check", real, "--json")
    assert checked.exit_code == 0, checked.stdout
    found = json.loads(checked.stdout)
    assert found["classes"] == ["mr", "other"]
    assert found["groups"] == {"train": 6, "val": 3, "test": 4}
    done = run("data", "prepare", real, tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["images"] == {"train": 6, "val": 3, "test": 4}
    names = [p.stem for folder in real.glob("*/*") for p in folder.iterdir()]
    secrets = [s.encode().lower() for s in (*OWNERS[:-1], *NAMES, *names)]
    texts = [checked.stdout, done.stdout, done.stderr]
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(written) == 13 + 2
    for content in (*(p.read_bytes() for p in written), *(t.encode() for t in texts)):
        assert not [s for s in secrets if s in content.lower()]
    for path in written:
        assert not [s for s in secrets if s.decode() in str(path.relative_to(tmp_path)).lower()]


def test_the_same_pixels_groups_and_splits(real, tmp_path):
    source = data.open_dataset(real)
    deidentify.prepare(source, tmp_path / "out")
    out = data.open_dataset(tmp_path / "out")

    def pixels(d):
        return {
            (split, s.label, preprocess.decoded(s.path).tobytes())
            for split, samples in d.splits.items()
            for s in samples
        }

    assert pixels(out) == pixels(source)
    path = out.splits["test"][0].path
    with Image.open(path) as image:
        assert image.info == {}
        content = f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes()
    assert path.stem == hashlib.sha256(content).hexdigest()[:32]


def test_masks_organs_groups_and_subgroups_travel(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["file,group,subgroup"]
    for split in ("train", "val", "test"):
        for label in "ab":
            for i in range(2):
                name = f"{split}/{label}/{i}.jpg"
                for kind in ("", "masks/", "organs/"):
                    path = tmp_path / "in" / (kind + name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
                lines.append(f"{name},Roentgen-{split},{label}x")
    (tmp_path / "in/manifest.csv").write_text("\n".join(lines))
    source = data.open_dataset(tmp_path / "in")
    made = deidentify.prepare(source, tmp_path / "out")
    assert made.groups == 3
    out = data.open_dataset(tmp_path / "out")
    assert {s.subgroup for s in out.splits["test"]} == {"ax", "bx"}
    assert [len({s.group for s in v}) for v in out.splits.values()] == [1, 1, 1]
    assert "Roentgen" not in (tmp_path / "out/manifest.csv").read_text()
    by_pixels = {preprocess.decoded(s.path).tobytes(): s for s in out.splits["val"]}
    for s in source.splits["val"]:
        twin = by_pixels[preprocess.decoded(s.path).tobytes()]
        np.testing.assert_array_equal(preprocess.inside(twin.mask), preprocess.inside(s.mask))
        np.testing.assert_array_equal(preprocess.inside(twin.organ), preprocess.inside(s.organ))


def test_interrupted_it_goes_on_and_done_it_is_kept(phantoms, tmp_path, monkeypatch):
    source = data.open_dataset(phantoms)

    def stops(items, what, total=None):
        for n, item in enumerate(items):
            if n == 20:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        deidentify.prepare(source, tmp_path / "out", track=stops)
    assert not (tmp_path / "out").exists()
    there = {p: p.stat().st_ino for p in (tmp_path / "out.part").rglob("*.png")}
    assert len(there) >= 20
    made = deidentify.prepare(source, tmp_path / "out")
    assert not (tmp_path / "out.part").exists()
    for path, inode in there.items():
        kept = tmp_path / "out" / path.relative_to(tmp_path / "out.part")
        assert kept.stat().st_ino == inode
    whole = deidentify.prepare(source, tmp_path / "whole")
    assert whole == made
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*"))
             for f in (tmp_path / "out", tmp_path / "whole")]  # fmt: skip
    assert names[0] == names[1]
    monkeypatch.setattr(deidentify, "_write", None)
    assert deidentify.prepare(source, tmp_path / "out") == made


def test_folders_of_something_else_are_left_alone(phantoms, tmp_path):
    source = data.open_dataset(phantoms)
    other = data.open_dataset(phantoms, split="grouped", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    with pytest.raises(EdgeKDError, match="full is not empty: choose a new folder"):
        deidentify.prepare(source, tmp_path / "full")
    deidentify.prepare(source, tmp_path / "out")
    with pytest.raises(EdgeKDError, match="prepared from other data or splits"):
        deidentify.prepare(other, tmp_path / "out")
    (tmp_path / "half.part").mkdir()
    (tmp_path / "half.part/.source").write_text("else")
    with pytest.raises(EdgeKDError, match=r"half\.part was begun from other data"):
        deidentify.prepare(source, tmp_path / "half")


def test_burned_in_text_is_not_passed_on(real, tmp_path):
    (real / "train/mr/x.dcm").write_bytes(made(BurnedInAnnotation="YES"))
    assert "1 DICOM images have text burned into" in str(data.open_dataset(real).notes)
    done = run("data", "prepare", real, tmp_path / "out")
    assert done.exit_code == 1
    assert "1 DICOM images have text burned in (BurnedInAnnotation YES)" in done.stderr
    assert not (tmp_path / "out").exists()
