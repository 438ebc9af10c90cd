"""Layer by layer: what was kept becomes pictures in the right order."""

import numpy as np
import pytest

from edgekd.explain.score_cam import magma
from edgekd.report.layer_strips import SIDE, images_of, read


@pytest.fixture
def kept(tmp_path):
    arrays = {}
    for role, layers in (
        ("student", ["stage1 4x8x8"]),
        ("teacher", ["stage1 8x8x8", "head 9x2x2"]),
    ):
        for layer in layers:
            for image in ("aaa", "bbb"):
                key = f"{role}|{layer}|{image}"
                arrays[f"{key}|average"] = np.eye(8, dtype=np.float32)
                arrays[f"{key}|seconds"] = np.array(0.25 if image == "aaa" else 0.5)
                if layer != "head 9x2x2":
                    arrays[f"{key}|heat"] = np.ones((8, 8), np.float32) * np.arange(8)
    np.savez_compressed(tmp_path / "layers.npz", **arrays)
    return tmp_path / "layers.npz"


def test_image_by_image_teacher_first(kept):
    assert images_of(kept) == {"aaa", "bbb"}
    grey = np.full((32, 32, 3), 80, np.uint8)
    found = read(kept, {"bbb": grey, "aaa": grey})
    assert [(s.image, s.role) for s in found] == [
        ("aaa", "teacher"), ("aaa", "student"), ("bbb", "teacher"), ("bbb", "student"),
    ]  # fmt: skip
    assert [c.layer for c in found[0].cells] == ["stage1 8x8x8", "head 9x2x2"]
    assert [c.seconds for c in found[2].cells] == [0.5, 0.5]
    assert found[0].cells[1].heat is None
    assert {s.image for s in read(kept, {"bbb": grey})} == {"bbb"}


def test_pictures(kept):
    grey = np.full((32, 32, 3), 80, np.uint8)
    cell = read(kept, {"aaa": grey})[0].cells[0]
    assert cell.average.shape == cell.heat.shape == (SIDE, SIDE, 3)
    assert cell.average.dtype == cell.heat.dtype == np.uint8
    np.testing.assert_array_equal(cell.average[0, 0], magma(np.array(1.0)).round())  # the peak
    np.testing.assert_array_equal(cell.average[0, -1], magma(np.array(0.0)).round())
    np.testing.assert_array_equal(cell.heat[:, 0], 80)  # cold on the left: the picture itself
    assert (cell.heat[:, -1] > 80).any()
