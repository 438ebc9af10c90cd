"""Our weighted metrics against scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics as sk

from edgekd.metrics import calibration, classification
from edgekd.records import EdgeKDError
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
    found, per_class = classification.classification(logits, labels, groups, CLASSES)
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
    assert classification._auroc(score, positive, weight[None]) == pytest.approx(expected)


def test_intervals_draw_whole_patients(answered):
    """The same images ten times over are no more evidence if they are of the same patients."""
    logits, labels = (np.concatenate([x] * 10) for x in answered)
    one = [str(i % 90) for i in range(900)]
    own = [str(i) for i in range(900)]
    wide = classification.classification(logits, labels, one, CLASSES)[0]["test_accuracy"]
    narrow = classification.classification(logits, labels, own, CLASSES)[0]["test_accuracy"]
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_a_class_nobody_answers_scores_zero():
    logits = np.array([[3.0, 0, 0], [3, 0, 0], [0, 3, 0], [3, 0, 0]], np.float32)
    labels = np.array([0, 0, 1, 2])
    found, per_class = classification.classification(logits, labels, list("abcd"), CLASSES)
    assert found["test_balanced_accuracy"].value == pytest.approx(2 / 3)
    assert per_class["c"] == {"recall": 0, "precision": 0, "f1": 0, "images": 1}


def test_answers_come_in_order_whatever_the_batch():
    def session(images):
        return Outputs(images.sum((2, 3)), np.empty(0))

    images = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
    whole = classification.answers(session, images, batch=7)
    np.testing.assert_allclose(classification.answers(session, images, batch=3), whole)


def test_each_class_against_the_rest_is_scikit_learns(answered):
    logits, labels = answered
    rng = np.random.default_rng(2)
    weight = rng.integers(0, 3, size=(4, 90)).astype(float)
    at = np.array([0.2, 0.5, 0.7])
    log_p = calibration.log_softmax(logits)
    found = classification.figures(log_p, labels, weight, at)
    p, guess = np.exp(log_p), logits.argmax(1)
    for r, w in enumerate(weight):
        for name, score in (("precision", sk.precision_score), ("f1", sk.f1_score)):
            expected = score(labels, guess, average=None, sample_weight=w)
            np.testing.assert_allclose(found.classes[name][r], expected, err_msg=name)
        for c in range(3):
            area = sk.roc_auc_score(labels == c, p[:, c], sample_weight=w)
            assert found.classes["auroc"][r, c] == pytest.approx(area)
            calls = p[:, c] >= at[c]
            recalls = sk.recall_score(labels == c, calls, average=None, sample_weight=w)
            own = found.classes["specificity"][r, c], found.classes["sensitivity"][r, c]
            assert own == pytest.approx(recalls.tolist())
        for name in ("sensitivity", "specificity"):
            mean = found.classes[name][r].mean()
            assert found.overall[f"macro_{name}"][r] == pytest.approx(mean)


def test_ece_and_nll_by_hand():
    """Confidences 0.9 and 0.9 in one bin, one right; 0.6 in another, right."""
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    labels = np.array([0, 1, 1])
    found = classification.calibration_figures(
        np.log(p), labels, np.array([[1.0, 1, 1], [0, 1, 2]])
    )
    ece = 2 / 3 * abs(0.5 - 0.9) + 1 / 3 * abs(1 - 0.6)
    np.testing.assert_allclose(found["ece"], [ece, 1 / 3 * 0.9 + 2 / 3 * 0.4])
    nll = -np.log([0.9 * 0.1 * 0.6, 0.1 * 0.6 * 0.6]) / 3
    np.testing.assert_allclose(found["nll"], nll)
    assert found["nll"][0] == pytest.approx(sk.log_loss(labels, p))
    bins = calibration.reliability(p, labels)
    assert sum(b.images * abs(b.accuracy - b.confidence) for b in bins) / 3 == pytest.approx(ece)


def test_the_confusion_matrix_is_scikit_learns(answered):
    logits, labels = answered
    expected = sk.confusion_matrix(labels, logits.argmax(1))
    np.testing.assert_array_equal(classification.confusion(logits, labels), expected)


def test_draws_in_pieces_are_the_same_draws(answered, monkeypatch):
    logits, labels = answered
    whole = classification.classification(logits, labels, [str(i) for i in range(90)], CLASSES)
    monkeypatch.setattr(classification, "AT_ONCE", 90 * 7)
    assert (
        classification.classification(logits, labels, [str(i) for i in range(90)], CLASSES) == whole
    )


def test_an_interval_is_that_of_a_plain_bootstrap():
    """Of a mean, drawn group by group in a loop with the same generator."""
    rng = np.random.default_rng(3)
    x, groups = rng.random(40), np.array([f"p{i % 8}" for i in range(40)])
    found = classification.bootstrap(lambda w: {"mean": w @ x / w.sum(1)}, groups.tolist(), seed=5)[
        "mean"
    ]
    draws, means = np.random.default_rng(5), []
    names = np.unique(groups)
    for _ in range(classification.RESAMPLES):
        chosen = names[draws.integers(8, size=8)]
        means.append(np.concatenate([x[groups == g] for g in chosen]).mean())
    assert found.value == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


def test_one_patient_has_no_interval_and_one_class_no_auroc(answered):
    logits, _ = answered
    found, _ = classification.classification(logits, np.zeros(90, int), ["one"] * 90, CLASSES)
    assert found["test_accuracy"].low is found["test_accuracy"].high is None
    assert "test_macro_auroc" not in found
    assert found["test_balanced_accuracy"].value == found["test_accuracy"].value


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((3, 2)), r"need logits of shape \(2, 3\) and at least one image, got \(3, 2\)"),
        (np.array([[0, 0, np.nan], [0, 0, 1]]), "answers 1 of 2 images with NaN or infinity"),
    ],
)
def test_bad_logits_are_said_to_be(logits, message):
    with pytest.raises(EdgeKDError, match=message):
        classification.classification(logits, np.array([0, 1]), ["a", "b"], CLASSES)


def test_what_resampling_biases_upwards_is_centred():
    """|mean| of numbers whose mean is 0: every resample's is above, its interval is not."""
    x, groups = np.array([-1.0, 1, -1, 1, -1, 1]), list("abcdef")

    def measure(weight):
        return {"ece": np.abs(weight @ x) / weight.sum(1), "plain": np.abs(weight @ x) / 6}

    found = classification.bootstrap(measure, groups, 0, centred=["ece"])
    draws = np.random.default_rng(0).integers(6, size=(classification.RESAMPLES, 6))
    drawn = np.abs(x[draws].mean(1))
    assert (found["ece"].value, found["ece"].low) == (0, 0)
    assert found["ece"].high == pytest.approx(np.percentile(drawn, 97.5) - drawn.mean())
    assert found["plain"].high == pytest.approx(np.percentile(drawn, 97.5))


def test_no_interval_where_every_resample_says_the_same():
    logits = np.array([[3.0, 0.0], [0.0, 3.0]])
    found, _ = classification.classification(logits, np.array([0, 1]), ["a", "b"], ("x", "y"))
    for name in ("test_macro_auroc", "test_accuracy", "test_balanced_accuracy"):
        assert (found[name].value, found[name].low, found[name].high) == (1, None, None)
    logits = np.array([[3.0, 0.0], [3.0, 0.0]])
    found, _ = classification.classification(logits, np.array([0, 1]), ["a", "b"], ("x", "y"))
    assert (found["test_accuracy"].low, found["test_accuracy"].high) == (0, 1)
