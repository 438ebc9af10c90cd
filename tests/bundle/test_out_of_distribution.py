"""What is unusual is said to be, and what is usual is not."""

import numpy as np
import pytest

from edgekd.bundle import out_of_distribution
from edgekd.records import EdgeKDError

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(6, 40)) * np.array([9, 7, 5, 3, 2, 1])[:, None]


def pooled(n, seed):
    """(n, 40) features that differ along six directions, and a little along all."""
    rng = np.random.default_rng(seed)
    return 3 + rng.normal(size=(n, 6)) @ TRUTH + rng.normal(size=(n, 40)) * 0.1


def films(n, seed=0):
    return np.random.default_rng(seed).integers(20, 200, (n, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def usual():
    return out_of_distribution.learnt(pooled(400, 1), pooled(200, 2), films(20))


def test_the_distance_is_that_of_the_covariance(usual):
    """Mahalanobis' distance under the model's own covariance, by its definition."""
    x = pooled(5, 3)
    axes, spread = usual.axes.astype(float), usual.spread.astype(float)
    outside = np.eye(40) - axes.T @ axes
    covariance = axes.T @ np.diag(spread**2) @ axes + usual.rest**2 * outside
    apart = x - usual.mean
    expected = np.sqrt(np.einsum("ni,ij,nj->n", apart, np.linalg.inv(covariance), apart) / 40)
    np.testing.assert_allclose(out_of_distribution.score(usual, x), expected, rtol=2e-3)


def test_what_is_usual_is_not_called_unusual(usual):
    flagged = out_of_distribution.score(usual, pooled(2000, 4)) > usual.limit
    assert 0.001 < flagged.mean() < 0.03  # of 0.01


def test_a_step_off_the_usual_directions_is_seen(usual):
    """As far as a usual image may be along them, and seen, since it is beside them."""
    off = RNG.normal(size=40)
    off -= usual.axes.T @ (usual.axes @ off)
    length = np.linalg.norm(TRUTH[5])
    beside = usual.mean + off / np.linalg.norm(off) * length
    along = usual.mean + usual.axes[0] * length
    assert out_of_distribution.score(usual, np.stack([beside, along])).tolist() == pytest.approx(
        [length / usual.rest / 40**0.5, length / usual.spread[0] / 40**0.5], rel=1e-2
    )
    told = out_of_distribution.warnings(usual, films(2), np.stack([beside, along]))
    assert told[0][0].startswith("unlike what the model learnt from")
    assert told[1] == ()


@pytest.mark.parametrize(
    ("change", "word"),
    [(lambda x: x * 0, "blank"), (lambda x: x // 16 + 90, "blank"),
     (lambda x: np.where(x > 110, 255, 0).astype(np.uint8), "saturated")],
)  # fmt: skip
def test_what_is_wrong_with_the_pixels_is_said(usual, change, word):
    whole = np.tile(usual.mean, (2, 1))
    assert out_of_distribution.warnings(usual, films(2, 5), whole) == [(), ()]
    for told in out_of_distribution.warnings(usual, change(films(2, 5)), whole):
        assert any(t.startswith(word) for t in told)


@pytest.mark.parametrize("n", [20, 400])
@pytest.mark.parametrize(("odd", "word"), [(90, "blank"), (0, "saturated"), (255, "saturated")])
def test_one_odd_image_among_them_is_still_warned_of(n, odd, word):
    seen = films(n)
    seen[3] = odd
    usual = out_of_distribution.learnt(pooled(400, 1), pooled(200, 2), seen)
    told = out_of_distribution.warnings(usual, seen, np.tile(usual.mean, (n, 1)))
    assert any(t.startswith(word) for t in told[3])
    assert [i for i, t in enumerate(told) if t] == [3]


def test_what_is_often_blank_is_usual():
    """No more than one in a hundred of what it was learnt from is called blank or saturated."""
    seen = films(400)
    seen[:12] //= 32
    usual = out_of_distribution.learnt(pooled(400, 1), pooled(200, 2), seen)
    assert not any(out_of_distribution.warnings(usual, seen, np.tile(usual.mean, (400, 1))))


def test_a_direction_that_never_differed_is_no_endless_distance():
    flat = pooled(100, 1)
    flat[:, 7] = 0
    usual = out_of_distribution.learnt(flat, flat, films(4))
    moved = flat[:1].copy()
    moved[0, 7] = 1e-3
    assert np.isfinite(out_of_distribution.score(usual, moved)).all()


def test_it_is_kept_and_read(usual, tmp_path):
    (tmp_path / "x.npz").write_bytes(out_of_distribution.packed(usual))
    kept = out_of_distribution.read(tmp_path / "x.npz")
    np.testing.assert_array_equal(
        out_of_distribution.score(kept, pooled(3, 6)),
        out_of_distribution.score(usual, pooled(3, 6)),
    )
    assert kept[3:] == usual[3:]
    assert out_of_distribution.packed(usual) == out_of_distribution.packed(usual)


@pytest.mark.parametrize("bad", ["mean", "axes", "limit"])
def test_a_broken_file_is_one_line(usual, tmp_path, bad):
    odd = {"mean": usual.mean[:3], "axes": usual.mean, "limit": usual.mean}
    (tmp_path / "x.npz").write_bytes(out_of_distribution.packed(usual._replace(**{bad: odd[bad]})))
    with pytest.raises(EdgeKDError, match=r"x\.npz"):
        out_of_distribution.read(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(EdgeKDError, match=r"x\.npz"):
        out_of_distribution.read(tmp_path / "x.npz")


def test_too_few_images_tell_nothing():
    with pytest.raises(EdgeKDError, match="10 of each are needed"):
        out_of_distribution.learnt(pooled(9, 1), pooled(50, 2), films(4))
