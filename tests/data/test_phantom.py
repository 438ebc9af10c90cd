"""The phantoms: the same bytes each time, lesions where they are said to be."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from edgekd import data
from edgekd.data import phantom
from edgekd.records import EdgeKDError


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_byte_identical_and_independent_of_how_many(tmp_path):
    small = phantom.make(tmp_path / "a", per_class=4, size=32)
    again = phantom.make(tmp_path / "b", per_class=4, size=32)
    more = contents(phantom.make(tmp_path / "c", per_class=6, size=32))
    other = contents(phantom.make(tmp_path / "d", per_class=4, size=32, seed=1))
    assert contents(small) == contents(again)
    for path, content in contents(small).items():
        if path.suffix == ".png":
            assert more[path] == content
            assert other[path] != content


def test_layout_counts_and_manifest(phantoms):
    with (phantoms / "manifest.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 72
    for row in rows:
        assert row["file"].startswith(f"{row['split']}/{row['class']}/")
        with Image.open(phantoms / row["file"]) as image:
            assert (image.mode, image.size) == ("L", (64, 64))
        assert (phantoms / "masks" / row["file"]).exists() == (row["class"] != "normal")
    assert len({row["group"] for row in rows}) == 72
    dataset = data.open_dataset(phantoms)
    assert dataset.classes == phantom.CLASSES
    assert {s: len(v) for s, v in dataset.splits.items()} == {"train": 42, "val": 12, "test": 18}
    assert dataset.grey
    assert dataset.notes == ("masks: 48 of 72 images have one",)


def test_shares_of_a_hundred():
    counts = [(phantom._DEAL * 5).count(s) for s in "TVS"]
    assert counts == [60, 15, 25]


def test_finished_is_kept_unfinished_is_redone_other_is_refused(tmp_path):
    out = phantom.make(tmp_path / "p", per_class=3, size=32)
    image = out / "train/normal/0000.png"
    image.write_bytes(b"x")
    assert phantom.make(out, per_class=3, size=32) == out
    assert image.read_bytes() == b"x"  # complete: not touched
    (out / "manifest.csv").unlink()
    phantom.make(out, per_class=3, size=32)
    assert image.read_bytes() != b"x"
    with pytest.raises(EdgeKDError, match=r"holds phantoms of other settings .*another folder"):
        phantom.make(out, per_class=3, size=32, marker=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(EdgeKDError, match="is not empty and holds no phantoms"):
        phantom.make(tmp_path / "mine")


@pytest.mark.parametrize("bad", [{"per_class": 2}, {"size": 31}, {"marker": 1.1}, {"marker": -1}])
def test_settings_out_of_range(tmp_path, bad):
    with pytest.raises(EdgeKDError, match=r"phantoms need per_class >= 3, size >= 32, marker in"):
        phantom.make(tmp_path / "p", **bad)


def test_marker_is_in_the_corner_of_its_share_of_opacity_only():
    marked = 0
    for label in phantom.CLASSES:
        for i in range(40):
            plain, _ = phantom.film(label, i, size=64)
            planted, _ = phantom.film(label, i, size=64, marker=0.5)
            rows, columns = np.nonzero(plain != planted)
            if len(rows):
                assert label == "opacity"
                assert rows.max() < 12
                assert columns.min() > 50
                assert (planted[rows, columns] == 255).all()
                marked += 1
    assert 10 <= marked <= 30  # 20 expected of 40
    always = [phantom.film("opacity", i, size=64, marker=1)[0].max() for i in range(10)]
    assert always == [255] * 10
    assert max(phantom.film("opacity", i, size=64)[0].max() for i in range(10)) <= 250


@pytest.mark.parametrize("label", ["nodule", "opacity"])
def test_lesion_is_in_a_lung_and_brightens_it_there_only(label):
    for i in range(12):
        key = (0, phantom.CLASSES.index(label), i)
        chest = phantom.draw_chest(np.random.default_rng((*key, 0)), 64)
        added, lesion = phantom.draw_lesion(np.random.default_rng((*key, 1)), chest, label)
        image, mask = phantom.film(label, i, size=64)
        np.testing.assert_array_equal(mask, lesion)
        assert (chest.lungs[mask] >= 0.5).all()
        healthy = phantom.expose(np.random.default_rng((*key, 2)), chest.tissue)
        gain = image.astype(int) - healthy
        assert gain.min() >= 0
        assert gain[mask].mean() > 12
        assert abs(gain[added < 0.002]).max() <= 1
        share = mask.mean()
        assert (0.001 < share < 0.03) if label == "nodule" else (0.005 < share < 0.15)


def test_a_nodule_is_one_round_thing():
    for i in range(12):
        _, mask = phantom.film("nodule", i, size=96)
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1


def test_normal_has_no_lesion():
    assert phantom.film("normal", 0, size=64)[1] is None


def test_mean_brightness_does_not_tell_the_class():
    """Exposure varies more than a lesion adds: the rank statistic (AUC) stays near chance."""
    means = {
        c: np.array([phantom.film(c, i, size=32)[0].mean() for i in range(60)])
        for c in phantom.CLASSES
    }
    for label in ("nodule", "opacity"):
        auc = (means[label][:, None] > means["normal"]).mean()
        assert 0.3 < auc < 0.7
