"""Score-CAM on models whose answer is known: a Session is a function, so a fake is a function."""

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from pytorch_grad_cam import ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from squares import CORNERS, Net, fit, session, squares, trained
from torchcam.methods import ScoreCAM as TorchcamScoreCAM

from edgekd.explain import score_cam as explain
from edgekd.explain.score_cam import (
    ALIKE,
    VARIANTS,
    Heat,
    ask,
    blur,
    class_maps,
    drawn,
    fast_share,
    fewer,
    interpolation,
    magma,
    overlay,
    resize,
    score_cam,
    spread,
    telling,
    unit,
    veil,
)
from edgekd.records import EdgeKDError
from edgekd.runtimes import Outputs


def parts(scale=1.0, elsewhere=0.0):
    """Channel 0 is 2 on the left part, channel 1 is 4 on the right one; classes are their light."""
    features = np.full((1, 2, 20, 20), elsewhere, np.float32)
    features[0, 0, :, :6], features[0, 1, :, 6:] = 2, 4

    def run(images):
        light = [images[:, 0, :, :6].mean((1, 2)), images[:, 0, :, 6:].mean((1, 2))]
        return Outputs(scale * np.stack(light, 1), np.repeat(features, len(images), 0))

    image = np.full((3, 20, 20), 3, np.float32)
    image[:, :, 6:] = 1
    return run, image


@pytest.mark.parametrize("scale", [1, 4])
def test_by_hand(scale):
    run, image = parts(scale)
    # published: the masked images are (3, 0) and (0, 1); p_0 = sigmoid(3) and sigmoid(-1)
    w = 1 / (1 + np.exp([-3.0 * scale, scale]))  # so the map is another one if the logits are * 4
    heat = score_cam(run, image, 0, variant="published")
    np.testing.assert_allclose(heat.map[7, [0, 19]], [2 * w[0], 4 * w[1]], rtol=1e-6)
    np.testing.assert_array_equal(heat.logits, [3 * scale, scale])
    # grad-cam: weights softmax(3, 0) over the channels
    w = np.exp([3.0 * scale, 0]) / (np.exp(3.0 * scale) + 1)
    heat = score_cam(run, image, 0, variant="grad-cam")
    np.testing.assert_allclose(heat.map[7, [0, 19]], [2 * w[0], 4 * w[1]], rtol=1e-5)
    # evidence, seen before a blurred image (l, r): (3, r) and (l, 1). Less the mean of the classes:
    # (3 - r) / 2 and (l - 1) / 2; less the mean of the channels: d and -d. Only channel 0 stays.
    soft = blur(image)[0]
    left, right = soft[:, :6].mean(), soft[:, 6:].mean()
    assert 1 < right < left < 3
    d = scale * ((3 - right) / 2 - (left - 1) / 2) / 2
    assert d > 0.01
    heat = score_cam(run, image, 0)
    np.testing.assert_allclose(heat.map[7, [0, 19]], [2 * d, 0], rtol=1e-4)
    assert score_cam(run, image, 1).map[7, 0] == 0


def test_evidence_ignores_what_is_below_zero():
    """h-swish and linear layers have features below 0, which no ReLU network has."""
    (run, image), (signed, _) = parts(), parts(elsewhere=-5)
    np.testing.assert_array_equal(score_cam(signed, image, 0).map, score_cam(run, image, 0).map)
    published = [score_cam(r, image, 0, variant="published").map for r in (run, signed)]
    assert (published[0] != published[1]).any()


@pytest.mark.parametrize("variant", ["evidence", "published"])
def test_what_the_model_is_shown(variant):
    """The image where the channel is high; else a blurred image, or the grey of the mean."""
    run, image = parts()
    seen = []

    def spy(images):
        seen.append(images.copy())
        return run(images)

    score_cam(spy, image, 0, variant=variant)
    base = blur(image) if variant == "evidence" else np.zeros_like(image)
    left = np.arange(20) < 6
    expected = [np.where(left, image, base), np.where(left, base, image)]
    np.testing.assert_array_equal(seen[0], image[None])
    np.testing.assert_allclose(seen[1], expected, atol=1e-6)


@pytest.fixture(scope="module", params=[F.relu, F.hardswish, F.relu6], ids=lambda f: f.__name__)
def one_of_three(request):
    """Trained: with weights as at the start all channels weigh the same, and all variants agree."""
    return trained(request.param)


class Layer(torch.nn.Module):
    """The libraries want a layer to hook: what it lets through is the explained map."""

    def forward(self, x):
        return x


class Hooked(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.layer = net, Layer()

    def forward(self, x):
        features = self.layer(self.net.features(x))
        return self.net.head(F.avg_pool2d(features, 2).flatten(1))


def test_grad_cam_equals_the_library(one_of_three):
    """pytorch-grad-cam 1.5.7's map before it is resized."""
    net = copy.deepcopy(one_of_three)
    with torch.no_grad():
        net.body.bias[1] = -4  # flat but not 0, the library's mask is rounding error / 1e-8
        net.body.bias[0] = -4
    images, labels = squares(3, seed=5)
    hooked = Hooked(net).eval()
    with ScoreCAM(model=hooked, target_layers=[hooked.layer]) as oracle:
        for image, label in zip(images, labels, strict=True):
            x = torch.from_numpy(image[None])
            targets = [ClassifierOutputTarget(int(label))]
            features = net.features(x).detach().numpy()
            weights = oracle.get_cam_weights(x, None, targets, features, None)
            expected = np.maximum((weights[:, :, None, None] * features).sum(1), 0)[0]
            ours = score_cam(session(net), image, int(label), variant="grad-cam").map
            np.testing.assert_allclose(ours, expected, atol=1e-5)
            assert expected.max() > 0.1


def test_torchcam_equals_the_library(one_of_three):
    """torchcam 0.5.0's map, not normalised."""
    images, labels = squares(3, seed=5)
    hooked = Hooked(one_of_three).eval()
    with TorchcamScoreCAM(hooked, hooked.layer, input_shape=(3, 24, 24)) as oracle:
        for image, label in zip(images, labels, strict=True):
            x = torch.from_numpy(image[None])
            with torch.no_grad():
                scores = hooked(x)
            (expected,) = oracle(int(label), scores, normalized=False)
            ours = score_cam(session(one_of_three), image, int(label), variant="torchcam").map
            np.testing.assert_allclose(ours, expected[0].numpy(), atol=1e-5)
            assert ours.max() > 0.1


def test_the_variants_differ_on_a_trained_network(net):
    """So that to equal one library is not to equal the other."""
    images, labels = squares(1, seed=5)
    maps = [score_cam(session(net), images[0], int(labels[0]), variant=v).map for v in VARIANTS]
    for i, a in enumerate(maps):
        for b in maps[:i]:
            assert np.abs(unit(a) - unit(b)).max() > 1e-3


def test_memory_does_not_grow(net):
    """Nothing of the masked passes is kept: 4 MB of masked images a call."""
    images, labels = squares(1, seed=5)
    big = np.tile(images[0], (1, 8, 8))  # 192 x 192
    pooled = lambda x: session(net)(np.ascontiguousarray(x[:, :, ::8, ::8]))  # noqa: E731

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(3):
        score_cam(pooled, big, int(labels[0]))
    before = resident()
    for _ in range(20):
        score_cam(pooled, big, int(labels[0]))
    assert resident() < 1.05 * before


@pytest.mark.parametrize("batch", [1, 5, 7, 22, 64])
def test_chunks_change_nothing(net, batch):
    image, label = (a[0] for a in squares(1, seed=6))
    sizes = []

    def spy(images):
        sizes.append(len(images))
        return session(net)(images)

    for variant in VARIANTS:
        one = score_cam(session(net), image, label, variant=variant)
        cut = score_cam(spy, image, label, variant=variant, batch=batch)
        np.testing.assert_allclose(cut.map, one.map, rtol=2e-5, atol=1e-6)
    assert max(sizes) <= batch


def test_masks_go_from_0_to_1():
    """Also where no pixel lies at the middle of a cell, and where the map is the finer one."""
    rng = np.random.default_rng(0)
    for side, cells in ((24, 6), (25, 7), (50, 14), (5, 9), (7, 1)):
        features = rng.normal(size=(1, 5, cells, cells + 1)).astype(np.float32)
        seen = []

        def run(images, features=features, seen=seen):
            seen.append(images.copy())
            return Outputs(images.mean((2, 3)), np.repeat(features, len(images), 0))

        for variant in ("published", "grad-cam"):
            seen.clear()
            score_cam(run, np.ones((3, side, side + 3), np.float32), 0, variant=variant)
            shown = np.concatenate(seen[1:])
            np.testing.assert_allclose(shown.min((1, 2, 3)), 0, atol=2e-6)
            np.testing.assert_allclose(shown.max((1, 2, 3)), 1, atol=2e-6)


def test_the_next_masks_are_made_while_the_session_looks(net):
    """And what it looks at is left alone until it has answered."""
    image, label = (a[0] for a in squares(1, seed=6))
    went_on = threading.Event()
    calls = []

    def slow(images):
        calls.append(len(images))
        if len(calls) == 2:  # the first masks: answered only when more were made
            assert went_on.wait(10)
        return session(net)(images)

    multiply = np.multiply

    def noticed(a, b, out):
        multiply(a, b, out=out)
        if len(calls) == 2:
            went_on.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "multiply", noticed)
        cut = score_cam(slow, image, label, batch=7)
    np.testing.assert_array_equal(cut.map, score_cam(session(net), image, label, batch=7).map)


def test_what_a_session_raises_comes_through(net):
    image, label = (a[0] for a in squares(1, seed=6))

    def fails(images):
        if len(images) > 1:
            raise EdgeKDError("the device is gone")
        return session(net)(images)

    with pytest.raises(EdgeKDError, match="the device is gone"):
        score_cam(fails, image, label, batch=7)


def test_the_image_is_left_alone(net):
    image, label = (a[0] for a in squares(1, seed=6))
    before = image.copy()
    score_cam(session(net), image, label)
    np.testing.assert_array_equal(image, before)


def test_evidence_ignores_scale_and_shift_of_the_logits(net):
    image, label = (a[0] for a in squares(1, seed=7))
    plain = score_cam(session(net), image, label).map
    scaled = score_cam(session(net, scale=4), image, label).map
    shifted = score_cam(session(net, shift=50), image, label).map
    np.testing.assert_allclose(scaled, 4 * plain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shifted, plain, rtol=1e-3, atol=1e-3)


def test_the_peak_is_in_the_square(net):
    images, labels = squares(20, seed=9)
    hits = []
    for image, label in zip(images, labels, strict=True):
        heat = resize(score_cam(session(net), image, label).map, (24, 24))
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        top, left = CORNERS[label]
        hits.append(top <= row < top + 12 and left <= column < left + 12)
    assert np.mean(hits) >= 0.9  # by chance 0.25


def test_dead_and_flat_channels_are_not_shown(net):
    """24 channels, of which one is all zeros and one all 0.5."""
    image, label = (a[0] for a in squares(1, seed=10))
    seen = []

    def spy(images):
        seen.append(len(images))
        return session(net)(images)

    live = (np.ptp(spy(image[None]).features[0], axis=(1, 2)) > 0).sum()
    assert live <= 22
    seen.clear()
    score_cam(spy, image, label)
    assert sum(seen) == 1 + live
    seen.clear()
    score_cam(spy, image, label, variant="grad-cam")
    assert sum(seen) == 1 + 24


@pytest.mark.parametrize("variant", ["evidence", "published"])
def test_nothing_to_say(variant):
    flat = Outputs(np.array([[1.0, 2.0]], np.float32), np.full((1, 3, 2, 2), 7, np.float32))
    heat = score_cam(lambda x: flat, np.zeros((3, 4, 4), np.float32), 0, variant=variant)
    assert heat.map is None
    assert heat.seconds >= 0


def test_a_model_that_does_not_look_has_no_evidence():
    rng = np.random.default_rng(0)
    features = rng.random((1, 6, 3, 3), np.float32)

    def blind(images):
        n = len(images)
        return Outputs(np.tile(np.float32([3.3, 0.1, -7]), (n, 1)), np.repeat(features, n, 0))

    image = rng.random((3, 9, 9), np.float32)
    assert score_cam(blind, image, 1).map is None
    assert score_cam(blind, image, 1, variant="published").map is not None


@pytest.fixture(scope="module")
def wide():
    """As `net`, but with 96 channels, of which many are alike; in evaluation mode."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net(width=96)
    fit(net)
    yield net.eval()
    torch.set_num_threads(threads)


def strongest(act, share):
    """Faster-Score-CAM's choice: the channels of the largest variance."""
    return np.sort(np.argsort(-act.var((1, 2)))[: max(2, round(share * len(act)))])


def test_a_fast_map_is_the_exact_one_at_fewer_passes(wide):
    images, labels = squares(8, seed=11)
    fast = fast_share(session(wide), images, labels)
    assert fast.share < 1
    assert ALIKE <= fast.worst <= fast.mean <= 1
    others, labels = squares(12, seed=12)  # not those it was certified on
    r = []
    for image, label in zip(others, labels, strict=True):
        exact, few = (ask(session(wide), image, share=s) for s in (1, fast.share))
        assert few.asked <= 0.41 * exact.asked
        a, b = class_maps(few)[label], class_maps(exact)[label]
        r.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert np.mean(r) >= ALIKE


def test_fewer_is_what_would_have_been_asked(wide):
    image = squares(1, seed=13)[0][0]
    asked = ask(session(wide), image, share=0.2, batch=7)
    found = fewer(ask(session(wide), image, batch=7), 0.2)
    assert asked.asked == found.asked == round(0.2 * len(found.act))
    np.testing.assert_allclose(asked.masked, found.masked, atol=1e-4)
    np.testing.assert_allclose(asked.pooled, found.pooled, atol=1e-4)


def test_the_strongest_channels_are_not_certified(wide, monkeypatch):
    images, labels = squares(8, seed=11)
    monkeypatch.setattr(explain, "telling", strongest)
    assert fast_share(session(wide), images, labels) == (1, 1, 1)


def test_what_cannot_be_certified_stays_exact(wide):
    """Answers that have nothing to do with what masks are like; an r that nothing reaches; and
    images of which there is nothing to say.
    """
    images, labels = squares(4, seed=11)

    def whim(shown):
        logits, features = session(wide)(shown)
        return Outputs(np.modf(logits * 1e3)[0].astype(np.float32), features)

    assert fast_share(whim, images, labels) == (1, 1, 1)
    assert fast_share(session(wide), images, labels, least=1.1).share == 1
    flat = Outputs(np.array([[1.0, 2, 3, 4]], np.float32), np.full((1, 3, 2, 2), 7, np.float32))
    assert fast_share(lambda x: flat, images, labels).share == 1


def test_the_channel_that_tells_most(wide):
    """The first one chosen leaves the least of the map's variance, by the formula as it stands."""
    image = squares(1, seed=14)[0][0]
    act = ask(session(wide), image).act[:12].astype(float)
    kernel = explain._kernel(act)
    shape = (act - act.mean((1, 2), keepdims=True)).reshape(12, -1)
    left = []
    for a in range(12):
        for b in range(12):
            few = [a, b]
            known = kernel[np.ix_(few, few)] + explain.NOISE * np.eye(2)
            rest = kernel - kernel[:, few] @ np.linalg.solve(known, kernel[few])
            left.append((np.trace(shape.T @ rest @ shape) if a < b else np.inf, few))
    alone = [np.trace(shape.T @ (kernel - np.outer(k, k) / (1 + explain.NOISE)) @ shape)
             for k in kernel]  # fmt: skip
    first = int(np.argmin(alone))
    expected = min(x for x in left if first in x[1])[1]
    np.testing.assert_array_equal(telling(act, 2 / 12), expected)


def test_spread_keeps_answers_and_finds_smooth_ones():
    """On masks that differ in one thing, answers that follow it are found in between."""
    level = np.linspace(0, 1, 21)
    act = np.zeros((21, 3, 3))
    act[:, 0, 0], act[:, 0, 1] = 1, level
    answers = np.stack([np.sin(3 * level), level**2], 1)
    few = np.array([0, 5, 10, 15, 20])
    found = spread(act, few, answers[few])
    np.testing.assert_array_equal(found[few], answers[few])
    np.testing.assert_allclose(found, answers, atol=0.04)


@pytest.mark.parametrize("label", [-1, 2])
def test_no_such_class(label):
    out = Outputs(np.zeros((1, 2), np.float32), np.zeros((1, 3, 2, 2), np.float32))
    with pytest.raises(EdgeKDError, match=f"no class {label} to explain: the model has 2"):
        score_cam(lambda x: out, np.zeros((3, 4, 4), np.float32), label)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (4, 4), (4, 14), (7, 96), (9, 4)])
@pytest.mark.parametrize("corners", [False, True])
def test_interpolation_is_torchs(n, m, corners):
    x = torch.randn(1, 2, n, generator=torch.manual_seed(n))
    expected = F.interpolate(x, size=m, mode="linear", align_corners=corners).numpy()
    np.testing.assert_allclose(x.numpy() @ interpolation(n, m, corners).T, expected, atol=1e-6)


def test_resize_is_torchs():
    x = torch.randn(5, 7, generator=torch.manual_seed(0))
    up = F.interpolate(x[None, None], size=(32, 48), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize(x.numpy(), (32, 48)), up[0, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (1, 2)])
def test_blur_is_scipys(size):
    x = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
    sigma = 0.1 * min(size)
    expected = scipy.ndimage.gaussian_filter(x, (0, sigma, sigma))
    np.testing.assert_allclose(blur(x), expected, atol=1e-5)


def test_unit():
    np.testing.assert_allclose(unit(np.array([[1.0, 3.0], [2.0, 1.0]])), [[0, 1], [0.5, 0]])
    np.testing.assert_array_equal(unit(np.full((2, 2), 5.0)), 0)


def test_overlay_colours_where_it_is_hot():
    picture = np.full((4, 8, 3), 100, np.uint8)
    out = overlay(picture, np.array([[0.0, 1.0]]), strength=0.5)
    assert (out.shape, out.dtype) == ((4, 8, 3), np.uint8)
    np.testing.assert_array_equal(out[:, :2], 100)  # cold: as it was
    # The other half, a cell, is as hot as it gets: (100 + fcfdbf) / 2.
    np.testing.assert_array_equal(out[:, 4:] - [(100 + 252) / 2, 176, 146], 0)
    np.testing.assert_array_equal(overlay(picture, np.ones((2, 2))), picture)


def test_a_coarse_map_is_drawn_as_its_cells():
    coarse = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(
        drawn(coarse, (4, 7)),  # of seven pixels the fourth, in the middle, is of the middle cell
        [[0, 0, 1, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 4, 5, 5]] * 2,
    )
    ramp = np.tile(np.arange(9, dtype=np.float32), (9, 1))
    assert len(np.unique(drawn(ramp, (90, 90)))) == 9
    assert len(np.unique(veil(ramp, (90, 90))[..., 3])) == 9
    fine = np.tile(np.arange(10, dtype=np.float32), (10, 1))
    np.testing.assert_array_equal(drawn(fine, (90, 90)), resize(fine, (90, 90)))
    np.testing.assert_array_equal(drawn(coarse, (2, 3)), coarse)


def test_magma_grows_ever_lighter():
    light = magma(np.linspace(0, 1, 64)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()


def test_no_such_variant():
    run, image = parts()
    with pytest.raises(EdgeKDError, match='no variant "evidense"; did you mean "evidence"'):
        score_cam(run, image, 0, variant="evidense")


def test_heat_is_what_the_docs_say():
    assert Heat._fields == ("map", "logits", "seconds")
