import numpy as np
import pytest

from edgekd.explain.shortcuts import marked, markers, moved


def test_markers_are_where_they_say():
    found = {m.name: m for m in markers(96, 96)}
    assert list(found) == ["L upper left", "L upper right", "R upper left", "R upper right",
                           "box lower left", "strip left"]  # fmt: skip
    pixels = np.full((96, 96, 3), 60, np.uint8)
    shown = marked(pixels)
    assert shown.shape == (12, 96, 96, 3)
    for i, m in enumerate(found.values()):
        changed = (shown[i] != pixels).any(-1)
        rows, columns = np.nonzero(changed)
        assert changed.sum() == m.ink.sum()
        assert (shown[i][changed] == 255).all()
        left, top = columns.mean() < 48, rows.mean() < 48
        assert ("left" in m.name) == left
        assert ("upper" in m.name) == top or m.name == "strip left"
    np.testing.assert_array_equal(shown[6:], np.repeat(pixels[None], 6, 0))  # flat on flat


def test_an_l_is_an_l():
    ink = markers(96, 96)[0].ink
    assert ink.shape == (8, 6)
    assert ink[:, 0].all()
    assert ink[-1].all()
    assert not ink[:6, 2:].any()


def test_a_flat_patch_has_the_mean_of_what_it_covers():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (64, 48, 3), np.uint8)
    shown = marked(pixels)
    for i, m in enumerate(markers(64, 48)):
        covered = pixels[m.box][m.ink]
        patch = shown[6 + i][m.box]
        np.testing.assert_array_equal(
            patch[m.ink], np.tile(covered.mean(0).round(), (m.ink.sum(), 1))
        )
        np.testing.assert_array_equal(patch[~m.ink], pixels[m.box][~m.ink])
    assert pixels.max() < 200  # left alone


def test_moved_by_hand():
    logits = np.log([[3.0, 1.0], [1.0, 1.5]])
    other = np.log([[[3.0, 1.0], [1.0, 3.0]], [[1.5, 1.0], [1.0, 1.5]]])
    tv, flips = moved(logits, other, 1.0)
    np.testing.assert_allclose(tv, [[0, 0.5], [0.2, 0]], atol=1e-12)
    np.testing.assert_array_equal(flips, [[0, 1], [1, 0]])
    cold, _ = moved(logits, other, 100.0)
    assert cold.max() == pytest.approx(0.25 * np.log(9) / 100, rel=1e-3)
