"""What is kept of a model, and that each check can fail."""

import hashlib

import numpy as np
import pytest
from squares import CORNERS, session, squares

from edgekd.data.preprocess import normalise
from edgekd.explain import examine
from edgekd.explain.examine import Asked
from edgekd.explain.fidelity import Cases, localisation
from edgekd.explain.score_cam import ask, class_maps, fast_share, random_head
from edgekd.records import Artifact, Calibration, Profile, Spec
from edgekd.runtimes import Outputs

SPEC = Spec(classes=("a", "b", "c", "d"), size=(24, 24), mean=(0.5,) * 3, std=(0.16,) * 3)
CPU = Profile(name="cpu", runtime="torch", device="cpu")


def pictures(n, seed=0):
    """`squares` as (n, 24, 24, 3) uint8: prepared by SPEC they are nearly what they were."""
    images, labels = squares(n, seed)
    seen = np.clip((images * 0.16 + 0.5) * 255, 0, 255).round().astype(np.uint8)
    return seen.transpose(0, 2, 3, 1), labels


def artifact(folder, name="m", temperature=None):
    fitted = temperature and Calibration(temperature=temperature, method="nll", thresholds={})
    return Artifact(kind="onnx", model=name, files={"m.onnx": name * 64}, spec=SPEC, params=1,
                    macs=1, calibration=fitted).model_copy(update={"folder": folder})  # fmt: skip


def digests(n):
    return [hashlib.sha256(bytes([i])).hexdigest() for i in range(n)]


def examined(run, folder, n=12, seed=5, asked=Asked(), **change):  # noqa: B008 (it is frozen)
    pixels, _ = pictures(n, seed)
    return examine.examine(run, artifact(folder, **change), CPU, pixels, digests(n), asked)


def cases(n, labels=None):
    names = [f"{i}" for i in range(n)]
    return Cases(names, names, [str(x) for x in (labels if labels is not None else [0] * n)], names)


def counted(run):
    seen = []

    def spy(images):
        seen.append(len(images))
        return run(images)

    return spy, seen


def test_all_is_of_the_same_images(net, tmp_path):
    run = session(net)
    found = examined(run, tmp_path)
    pixels, _ = pictures(12, 5)
    prepared = normalise(pixels, SPEC)
    np.testing.assert_allclose(found.logits, run(prepared).logits, rtol=1e-5)
    assert found.maps.shape == found.head.shape == found.repeated.shape == (12, 4, 14, 14)
    assert found.marked.shape == (12, 12, 4)
    assert (found.asked <= 22).all()
    assert (found.asked >= 10).all()
    # maps of all classes, on the grid
    from edgekd.explain.fidelity import to_grid

    passes = ask(run, prepared[3])
    for label in range(4):
        np.testing.assert_allclose(
            found.maps[3, label], to_grid(class_maps(passes)[label]), rtol=1e-4, atol=1e-5
        )
    answers = found.logits.argmax(1)
    np.testing.assert_array_equal(found.of(answers).maps, found.maps[np.arange(12), answers])


def test_what_was_found_is_not_asked_again(net, tmp_path):
    run, seen = counted(session(net))
    first = examined(run, tmp_path, n=4)
    before = sum(seen)
    again = examined(run, tmp_path, n=4)
    assert sum(seen) == before
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    # killed before the third image: the rest alone is asked
    for path in sorted((tmp_path / "maps").glob("*/*.npz"))[2:]:
        path.unlink()
    seen.clear()
    examined(run, tmp_path, n=4)
    assert 0 < sum(seen) < 0.7 * before


@pytest.mark.parametrize(
    "change",
    [{"name": "n"}, {"temperature": 2.0}, {"asked": Asked(variant="published")},
     {"asked": Asked(share=0.5)}],
)  # fmt: skip
def test_another_question_is_asked(net, tmp_path, change):
    run, seen = counted(session(net))
    examined(run, tmp_path, n=2)
    before = sum(seen)
    examined(run, tmp_path, n=2, **change)
    assert sum(seen) > before + 100


def test_a_share_of_channels_is_certified_once(net, tmp_path, monkeypatch):
    run, seen = counted(session(net))
    images = normalise(pictures(3, 5)[0], SPEC)

    def certified(images=images, **change):
        return examine.certified(run, artifact(tmp_path, **change), CPU, images, "evidence")

    first = certified()
    assert first == fast_share(session(net), images, run(images).logits.argmax(1))
    before = sum(seen)
    assert certified() == first
    assert sum(seen) == before
    certified(name="n")
    certified(images[:2])
    monkeypatch.setattr("edgekd.explain.score_cam.ALIKE", 0.5)
    certified()
    assert sum(seen) > before + 8 * 10  # each of them anew


def test_a_healthy_model(net, tmp_path):
    found = examined(session(net), tmp_path, n=32)
    answers = found.logits.argmax(1)
    got = examine.checks(found, cases(32, answers), artifact(tmp_path), 0)
    assert set(examine.CHECKS) <= set(got)
    assert got["random_head"].high < got["random_head"].null
    assert got["other_class"].high < got["other_class"].null
    assert got["above_random"].low > 0
    assert got["faithful"].value - got["faithful"].null == pytest.approx(got["above_random"].value)
    assert got["repeatable"].low > 0.9
    assert got["undefined"].value == 0
    assert {k for k in got if k.startswith("shortcut: ")} == {
        f"shortcut: {m}" for m in examine.names_of_markers(artifact(tmp_path))
    }


def test_a_random_head_says_nothing_of_the_class(net):
    images, labels = squares(12, 3)
    for image, label in zip(images, labels, strict=True):
        passes = ask(session(net), image)
        other = random_head(passes)
        assert other.masked.shape == passes.masked.shape
        assert other.masked.std() == pytest.approx(passes.masked.std())
        np.testing.assert_array_equal(other.act, passes.act)
        np.testing.assert_array_equal(random_head(passes).masked, other.masked)
        assert (random_head(passes, 1).masked != other.masked).any()
        assert label < 4


def test_maps_that_noise_makes_are_not_repeatable(net, tmp_path):
    """Features that hang on the last bit of the image."""
    rng_of = lambda x: np.random.default_rng(abs(int(float(x.sum()) * 1e4)))  # noqa: E731

    def noisy(images):
        out = session(net)(images)
        shaken = [
            rng_of(x).random(f.shape, np.float32) for x, f in zip(images, out.features, strict=True)
        ]
        return Outputs(out.logits, np.stack(shaken))

    found = examined(noisy, tmp_path, n=16)
    got = examine.checks(found, cases(16), artifact(tmp_path), 0)
    assert got["repeatable"].high < 0.5
    assert got["above_random"].low < 0.05


def test_a_model_that_does_not_look(tmp_path):
    def blind(images):
        n = len(images)
        return Outputs(np.tile(np.float32([1, 0, 0, 0]), (n, 1)), np.ones((n, 3, 6, 6), np.float32))

    found = examined(blind, tmp_path, n=6)
    got = examine.checks(found, cases(6), artifact(tmp_path), 0)
    assert got["undefined"].value == 1
    assert "faithful" not in got
    assert "random_head" not in got


def test_a_model_that_answers_to_a_marker(net, tmp_path):
    """Class 3 wherever the upper left corner is white; the corner's mean moves nothing.

    The maps do not tell: their energy is where that of the honest model is.
    """
    inside = []

    def marked(images):
        out = session(net)(images)
        white = (images[:, 0, 1:6, 1] > 3).all(1)  # the L's upright stroke
        return Outputs(out.logits + np.float32([0, 0, 0, 40]) * white[:, None], out.features)

    for run, moved in ((session(net), False), (marked, True)):
        found = examined(run, tmp_path / str(moved), n=24, name="m" if moved else "n")
        got = examine.checks(found, cases(24), artifact(tmp_path), 0)
        own, patch = got["shortcut: L upper left"], got["flips: L upper left"]
        assert (own.low > 0.4) == moved
        assert (patch.value > 0.5) == moved
        assert got["shortcut: box lower left"].value < 0.4
        inside.append(in_squares(found, 24))
    excess = examine.excess(found, 1.0)
    assert excess.shape == (24, 6)
    assert excess[:, 0].mean() == pytest.approx(own.value)
    assert inside[0] == pytest.approx(inside[1], abs=0.02)  # so nobody may gate on it


def in_squares(found, n):
    """Mean share of the energy of the answers' maps that is in the squares."""
    _, labels = pictures(n, 5)
    masks = np.zeros((n, 24, 24), bool)
    for mask, label in zip(masks, labels, strict=True):
        top, left = CORNERS[label]
        mask[top : top + 12, left : left + 12] = True
    maps = found.of(found.logits.argmax(1)).maps
    return np.nanmean(np.diag(localisation(maps, masks)["energy"]))


def test_rounding_moves_no_pixel_by_more_than_half_a_level():
    image = np.zeros((3, 16, 16), np.float32)
    moved = examine.rounded(image, (0.25, 0.5, 1.0), 3) * 255
    assert np.abs(moved[0]).max() <= 0.5 / 0.25
    assert np.abs(moved[0]).max() > 1.8
    np.testing.assert_allclose(moved[0] * 0.25, moved[2], atol=1e-5)  # grey stays grey
    np.testing.assert_array_equal(
        examine.rounded(image, (1.0,) * 3, 3), examine.rounded(image, (1.0,) * 3, 3)
    )


def test_the_published_map_is_blind_where_weights_are_alike(net):
    """Logits so small that softmax gives every channel the same weight: the sum of activations."""
    pixels, labels = pictures(16, 5)
    images = normalise(pixels, SPEC)
    found = examine.blindness(session(net, scale=0.01), images, cases(16, labels))
    assert found.value > 0.99
    assert found.low > found.null
    sharp = examine.blindness(session(net, scale=3), images, cases(16, labels))
    assert sharp.value < found.value - 0.1
