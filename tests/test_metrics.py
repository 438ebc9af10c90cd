"""Our weighted metrics against scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics as sk

from edgekd import metrics
from edgekd.runtimes import Outputs

CLASSES = ("a", "b", "c")


@pytest.fixture
def answered():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=90)
    logits = rng.standard_normal((90, 3)).astype(np.float32)
    logits[np.arange(90), labels] += 1.2
    return logits, labels


def test_the_figures_are_scikit_learns(answered):
    logits, labels = answered
    groups = [str(i) for i in range(90)]
    found, per_class = metrics.classification(logits, labels, groups, CLASSES)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    guess = logits.argmax(1)
    expected = {
        "test_balanced_accuracy": sk.balanced_accuracy_score(labels, guess),
        "test_accuracy": sk.accuracy_score(labels, guess),
        "test_macro_f1": sk.f1_score(labels, guess, average="macro"),
        "test_macro_auroc": sk.roc_auc_score(labels, p, multi_class="ovr"),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-6), name
        assert found[name].low < value < found[name].high
    recall = sk.recall_score(labels, guess, average=None)
    np.testing.assert_allclose([per_class[c]["recall"] for c in CLASSES], recall)
    assert sum(c["images"] for c in per_class.values()) == 90


def test_auroc_with_ties_and_weights_is_scikit_learns():
    rng = np.random.default_rng(1)
    score, positive = rng.integers(5, size=60) / 5.0, rng.random(60) < 0.4
    weight = rng.integers(0, 3, size=60).astype(float)
    expected = sk.roc_auc_score(positive, score, sample_weight=weight)
    assert metrics._auroc(score, positive, weight[None]) == pytest.approx(expected)


def test_intervals_draw_whole_patients(answered):
    """The same images ten times over are no more evidence if they are of the same patients."""
    logits, labels = (np.concatenate([x] * 10) for x in answered)
    one = [str(i % 90) for i in range(900)]
    own = [str(i) for i in range(900)]
    wide = metrics.classification(logits, labels, one, CLASSES)[0]["test_accuracy"]
    narrow = metrics.classification(logits, labels, own, CLASSES)[0]["test_accuracy"]
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_a_class_nobody_answers_scores_zero():
    logits = np.array([[3.0, 0, 0], [3, 0, 0], [0, 3, 0], [3, 0, 0]], np.float32)
    labels = np.array([0, 0, 1, 2])
    found, per_class = metrics.classification(logits, labels, list("abcd"), CLASSES)
    assert found["test_balanced_accuracy"].value == pytest.approx(2 / 3)
    assert per_class["c"] == {"recall": 0, "precision": 0, "f1": 0, "images": 1}


def test_answers_come_in_order_whatever_the_batch():
    def session(images):
        return Outputs(images.sum((2, 3)), np.empty(0))

    images = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
    whole = metrics.answers(session, images, batch=7)
    np.testing.assert_allclose(metrics.answers(session, images, batch=3), whole)
