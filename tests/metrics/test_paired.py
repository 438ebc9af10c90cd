"""One model against another on the same images."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from edgekd.metrics import paired
from edgekd.metrics.calibration import log_softmax
from edgekd.records import Artifact, EdgeKDError, Spec

OTHER = Artifact(kind="teacher", model="big", role="teacher", files={"m": "cafe"}, params=1, macs=1,
                 spec=Spec(classes=("a", "b"), size=(8, 8)))  # fmt: skip


def right(both, this, other, neither):
    first = [True] * (both + this) + [False] * (other + neither)
    second = [True] * both + [False] * this + [True] * other + [False] * neither
    return np.array(first), np.array(second)


def test_mcnemar_by_hand():
    """1 against 5: two-sided exact p = 2 (1 + 6) / 64, less the point probability 6 / 64."""
    assert paired.mcnemar(*right(10, 1, 5, 3)) == (1, 5, pytest.approx(8 / 64))
    assert paired.mcnemar(*right(3, 5, 1, 0))[2] == pytest.approx(8 / 64)


def test_mcnemar_published():
    """Fagerland et al. 2013, table 1: 1 and 7 discordant of 21 pairs, mid-p 0.039, exact 0.070."""
    assert paired.mcnemar(*right(1, 1, 7, 12))[2] == pytest.approx(0.039, abs=5e-4)
    assert binomtest(1, 8).pvalue == pytest.approx(0.070, abs=5e-4)


@pytest.mark.parametrize("n", [2, 4, 10])
def test_as_many_each_way_is_no_evidence(n):
    """All splits are at least as uneven; the observed one counts half."""
    same = (
        binomtest(n // 2, n).pvalue
        - 0.5 * np.prod([(n - i) / (i + 1) for i in range(n // 2)]) / 2**n
    )
    assert paired.mcnemar(*right(0, n // 2, n // 2, 0))[2] == pytest.approx(same)


def test_no_discordant_image_is_no_evidence():
    assert paired.mcnemar(*right(4, 0, 0, 2)) == (0, 0, 1)


def test_a_pair_has_both_answers():
    with pytest.raises(EdgeKDError, match="needs both answers of every image, got 3 and 2"):
        paired.mcnemar(np.ones(3, bool), np.ones(2, bool))


@pytest.fixture
def two():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=200)
    logits = rng.standard_normal((200, 2))
    logits[np.arange(200), labels] += 1.5
    worse = logits + rng.standard_normal((200, 2))
    return log_softmax(logits), log_softmax(worse), labels


def test_differences_are_of_the_figures_and_drawn_in_pairs(two):
    good, worse, labels = two
    groups = [str(i) for i in range(200)]
    found = paired.compare(good, worse, labels, groups, OTHER)
    d = found.differences
    assert d["accuracy"].value == pytest.approx(
        sk.accuracy_score(labels, good.argmax(1)) - sk.accuracy_score(labels, worse.argmax(1))
    )
    assert d["nll"].value == pytest.approx(
        sk.log_loss(labels, np.exp(good)) - sk.log_loss(labels, np.exp(worse))
    )
    share = (found.only_this_right - found.only_other_right) / 200
    assert d["accuracy"].value == pytest.approx(share)
    assert (found.against, found.sha256, found.images, found.groups) == ("big", "cafe", 200, 200)
    # each image's own difference, in a plain bootstrap with the same draws
    own = (good.argmax(1) == labels).astype(float) - (worse.argmax(1) == labels)
    place = {g: i for i, g in enumerate(sorted(groups))}
    order = np.array([own[int(g)] for g in place])
    rng = np.random.default_rng(0)
    means = [order[rng.integers(200, size=200)].mean() for _ in range(1000)]
    expected = np.percentile(means, [2.5, 97.5]).tolist()
    assert (d["accuracy"].low, d["accuracy"].high) == pytest.approx(expected)


def test_a_model_beside_itself_differs_in_nothing(two):
    good, _, labels = two
    found = paired.compare(good, good, labels, [str(i % 20) for i in range(200)], OTHER)
    assert found.mcnemar_p == 1
    assert {(m.value, m.low, m.high) for m in found.differences.values()} == {(0, 0, 0)}
