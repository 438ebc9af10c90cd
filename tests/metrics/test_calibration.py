"""Probabilities that mean what they say, and never another answer."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from edgekd.metrics import calibration
from edgekd.records import Artifact, Calibration, EdgeKDError, Spec, Threshold


def drawn(temperature, n=4000, k=3, seed=0):
    """Logits whose true temperature is known: labels are drawn from softmax(logits / T)."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n, k)) * 3).astype(np.float32)
    p = softmax(logits / temperature, 1)
    return logits, (p.cumsum(1) < rng.random((n, 1))).sum(1)


def artifact(temperature):
    at = Threshold(probability=0.5, val_sensitivity=1, val_specificity=1)
    calibration = temperature and Calibration(
        temperature=temperature, method="nll", thresholds={"a": at, "b": at}
    )
    spec = Spec(classes=("a", "b"), size=(8, 8))
    return Artifact(
        kind="onnx", model="m", files={"m": ""}, params=1, macs=1, spec=spec,
        calibration=calibration,
    )  # fmt: skip


def test_softmax_is_scipys():
    logits = np.random.default_rng(0).standard_normal((5, 4)) * 30
    np.testing.assert_allclose(calibration.softmax(logits, 2.5), softmax(logits / 2.5, 1))
    np.testing.assert_allclose(calibration.log_softmax(logits, 2.5), log_softmax(logits / 2.5, 1))
    extreme = calibration.log_softmax(np.array([1e4, 0, -1e4], np.float32), 0.01)
    assert np.isfinite(extreme).all()


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_drawn_from_is_found(true):
    logits, labels = drawn(true)
    found, method = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(true, rel=0.1)
    assert method == "nll"


def test_the_temperature_is_that_of_torch_lbfgs():
    """The search of Guo et al.'s own code, in double precision."""
    logits, labels = drawn(1.7, n=300, seed=1)
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    t = torch.ones(1, dtype=torch.double, requires_grad=True)
    search = torch.optim.LBFGS([t], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        search.zero_grad()
        loss = torch.nn.functional.cross_entropy(z / t, y)
        loss.backward()
        return loss

    search.step(closure)
    assert calibration.fit_temperature(logits, labels)[0] == pytest.approx(t.item(), rel=1e-5)


def test_all_right_has_a_temperature_too():
    """N images, margin a, all right: sigmoid(a / T) = (N + 1) / (N + 2), so T = a / log(N + 1)."""
    logits = np.array([[6.0, 0], [0, 6], [6, 0], [0, 6]], np.float32)
    found, method = calibration.fit_temperature(logits, np.array([0, 1, 0, 1]))
    assert found == pytest.approx(6 / np.log(5), rel=1e-5)
    assert method == "nll-smoothed"


def test_worse_than_chance_ends_at_the_bound():
    logits = np.array([[6.0, 0], [0, 6]], np.float32)
    found, _ = calibration.fit_temperature(logits, np.array([1, 0]))
    assert found == pytest.approx(calibration.HOTTEST, rel=1e-3)


def test_nothing_to_fit_on_is_said():
    with pytest.raises(EdgeKDError, match="fitted on validation images, got none"):
        calibration.fit_temperature(np.zeros((0, 2), np.float32), np.zeros(0, int))


@pytest.mark.parametrize("temperature", [calibration.COOLEST, 0.3, 1, 7.7, calibration.HOTTEST])
def test_the_answer_stays_what_it_was(temperature):
    logits = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    logits[:2000, 1] = np.nextafter(logits[:2000, 0], np.float32(9))  # the closest there can be
    p = calibration.probabilities(logits, artifact(temperature))
    np.testing.assert_array_equal(p.argmax(1), logits.argmax(1))
    np.testing.assert_allclose(p.sum(1), 1)


def test_probabilities_are_at_the_artifacts_temperature():
    logits = np.array([[np.log(9), 0]], np.float32)
    np.testing.assert_allclose(calibration.probabilities(logits, artifact(2)), [[0.75, 0.25]])
    np.testing.assert_allclose(calibration.probabilities(logits, artifact(None)), [[0.9, 0.1]])


def test_a_bin_holds_its_upper_edge():
    at = np.array([0.0, 0.01, 1 / 15, 0.0667, 0.2, 0.2001, 14 / 15, 0.9999, 1.0])
    assert calibration.bins_of(at).tolist() == [0, 0, 0, 1, 2, 3, 13, 14, 14]
