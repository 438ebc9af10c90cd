"""Thresholds by hand."""

import numpy as np
import pytest

from edgekd.metrics import operating
from edgekd.records import EdgeKDError

SCORE = np.array([0.9, 0.8, 0.6, 0.4, 0.3, 0.1])
POSITIVE = np.array([1, 1, 0, 1, 0, 0], bool)


def test_youden_takes_the_most_sensitive_of_the_best():
    """J is 2/3 at >= 0.8 (sensitivity 2/3) and at >= 0.4 (sensitivity 1, specificity 2/3)."""
    found = operating.threshold(SCORE, POSITIVE)
    assert found.probability == pytest.approx((0.4 + 0.3) / 2)
    assert found.val_sensitivity == 1
    assert found.val_specificity == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("wanted", "at", "sensitivity", "specificity"),
    [(0.3, 0.85, 1 / 3, 1), (0.5, 0.7, 2 / 3, 1), (2 / 3, 0.7, 2 / 3, 1), (0.95, 0.35, 1, 2 / 3)],
)
def test_a_wanted_sensitivity_is_reached_as_high_up_as_can_be(wanted, at, sensitivity, specificity):
    found = operating.threshold(SCORE, POSITIVE, wanted)
    assert found.probability == pytest.approx(at)
    assert found.val_sensitivity == pytest.approx(sensitivity)
    assert found.val_specificity == pytest.approx(specificity)


def test_every_sensitivity_is_reached_at_the_chosen_threshold():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(20, size=200) / 19, rng.random(200) < 0.3
    for wanted in (0.1, 0.5, 0.8, 0.95, 1):
        found = operating.threshold(score, positive, wanted)
        assert (score >= found.probability)[positive].mean() == found.val_sensitivity >= wanted
        higher = score > score[score >= found.probability].min()
        assert higher[positive].mean() < wanted


def test_scores_that_touch_are_not_parted():
    low = 0.5
    score = np.array([low, np.nextafter(low, 1)])
    found = operating.threshold(score, np.array([False, True]))
    assert found.probability == score[1]
    assert found.val_specificity == 1


@pytest.mark.parametrize("wanted", [0, -0.1, 1.01, 95])
def test_a_sensitivity_that_none_can_have_is_refused(wanted):
    with pytest.raises(EdgeKDError, match=r"above 0 and at most 1, such as 0\.95; got"):
        operating.threshold(SCORE, POSITIVE, wanted)


def test_a_class_that_validation_lacks_is_named():
    p = np.full((3, 2), 0.5)
    with pytest.raises(EdgeKDError, match="0 of 3 validation images are of class nodule: add"):
        operating.thresholds(p, np.ones(3, int), ("nodule", "normal"))
