"""Everything that two splits of answers say, kept, and asked again."""

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from edgekd.data.dataset import Sample
from edgekd.metrics import evaluation
from edgekd.metrics.calibration import softmax
from edgekd.records import Artifact, EdgeKDError, Spec

CLASSES = ("cyst", "nodule", "normal")


def split(n, seed, too_sure=3.0, shift=0.0):
    """Logits that are `too_sure` times too large, and the samples they are of."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal((n, 3)) * 1.5
    p = softmax(true)
    labels = (p.cumsum(1) < rng.random((n, 1))).sum(1)
    samples = [
        Sample(
            Path(f"{i}.png"),
            int(c),
            f"patient {seed} {i // 2}",
            None,
            f"{seed:08}{i:024}",
            subgroup="FM"[i % 2],
        )
        for i, c in enumerate(labels)
    ]
    noise = shift * rng.standard_normal((n, 3))
    return (too_sure * (true + noise)).astype(np.float32), samples


def judged(out, shift=0.0, role="student", samples=None, **given):
    out.mkdir(exist_ok=True)
    logits, known = {}, {}
    for name, n, seed in (("val", 240, 1), ("test", 200, 2)):
        logits[name], own = split(n, seed, shift=shift)
        known[name] = evaluation.truth(own if samples is None else samples(own))
    found = evaluation.judge(out, logits, known, CLASSES, **given)
    digest = {"student": "5" * 64, "teacher": "7" * 64}[role]
    made = Artifact(
        kind="student", model=role, role=role, files={"m": digest}, params=1, macs=1,
        spec=Spec(classes=CLASSES, size=(8, 8)), folder=out, **found,
    )  # fmt: skip
    return made, logits, known


def test_the_test_split_is_judged_as_the_device_will_see_it(tmp_path):
    made, logits, known = judged(tmp_path)
    m, labels = made.metrics, known["test"].labels
    assert made.temperature == pytest.approx(3, rel=0.25)
    p = softmax(logits["test"], made.temperature)
    assert m["test_macro_auroc"].value == pytest.approx(
        sk.roc_auc_score(labels, p, multi_class="ovr")
    )
    assert m["test_nll"].value == pytest.approx(sk.log_loss(labels, p))
    assert m["test_nll_uncalibrated"].value == pytest.approx(
        sk.log_loss(labels, softmax(logits["test"])), rel=1e-5
    )
    assert m["test_ece"].value < 0.5 * m["test_ece_uncalibrated"].value
    for name in ("ece", "ece_uncalibrated", "macro_sensitivity", "macro_f1", "balanced_accuracy"):
        assert m[f"test_{name}"].low <= m[f"test_{name}"].value <= m[f"test_{name}"].high
    found = made.evaluation
    assert (found.images, found.groups) == (200, 100)
    for name, bars in (
        ("ece", found.reliability),
        ("ece_uncalibrated", found.reliability_uncalibrated),
    ):
        ece = sum(b.images * abs(b.accuracy - b.confidence) for b in bars) / 200
        assert m[f"test_{name}"].value == pytest.approx(ece)


def test_each_class_is_called_at_the_threshold_of_validation(tmp_path):
    made, logits, known = judged(tmp_path, sensitivity=0.9)
    p = {s: softmax(x, made.temperature) for s, x in logits.items()}
    assert made.calibration.sensitivity == 0.9
    for c, name in enumerate(CLASSES):
        at = made.calibration.thresholds[name]
        val, test = (known[s].labels == c for s in evaluation.SPLITS)
        assert (p["val"][val, c] >= at.probability).mean() == at.val_sensitivity >= 0.9
        own = made.evaluation.classes[name]
        assert own.images == test.sum()
        assert own.metrics["sensitivity"].value == pytest.approx(
            (p["test"][test, c] >= at.probability).mean()
        )
        assert own.metrics["specificity"].value == pytest.approx(
            (p["test"][~test, c] < at.probability).mean()
        )
        assert own.metrics["recall"].value == pytest.approx(made.per_class[name]["recall"])


def test_subgroups_are_judged_alone(tmp_path):
    made, logits, known = judged(tmp_path)
    parts = made.evaluation.subgroups
    assert set(parts) == {"F", "M"}
    labels, guess = known["test"].labels, logits["test"].argmax(1)
    for name, first in (("F", 0), ("M", 1)):
        expected = sk.balanced_accuracy_score(labels[first::2], guess[first::2])
        assert parts[name].metrics["balanced_accuracy"].value == pytest.approx(expected)
        assert parts[name].images == parts[name].groups == 100


def test_no_subgroup_no_table_and_a_missing_one_is_counted(tmp_path):
    plain, *_ = judged(tmp_path, samples=lambda own: [s._replace(subgroup="") for s in own])
    assert plain.evaluation.subgroups == {}
    some, *_ = judged(
        tmp_path, samples=lambda own: [s._replace(subgroup="") if i < 30 else s
                                       for i, s in enumerate(own)],
    )  # fmt: skip
    assert some.evaluation.subgroups[evaluation.NO_SUBGROUP].images == 30


def test_a_student_stands_beside_its_teacher(tmp_path):
    teacher, strong, known = judged(tmp_path / "t", role="teacher")
    student, weak, _ = judged(tmp_path / "s", shift=1.0, rivals=[teacher])
    found = student.evaluation.paired["teacher fp32"]
    labels = known["test"].labels
    theirs, own = (x["test"].argmax(1) == labels for x in (strong, weak))
    assert found.only_this_right == (own & ~theirs).sum()
    assert found.only_other_right == (theirs & ~own).sum()
    d = found.differences["balanced_accuracy"]
    both = [a.metrics["test_balanced_accuracy"].value for a in (student, teacher)]
    assert d.value == pytest.approx(both[0] - both[1])
    assert d.high < 0
    assert found.mcnemar_p < 0.05
    other, *_ = judged(tmp_path / "o", rivals=[teacher], samples=lambda own: [
        s._replace(digest="other" + s.digest) for s in own])  # fmt: skip
    assert other.evaluation.paired == {}


def test_asked_again_without_the_model(tmp_path):
    made, _, known = judged(tmp_path)
    strict = evaluation.again(made, known, sensitivity=0.95)
    assert strict.calibration.sensitivity == 0.95
    assert strict.temperature == made.temperature
    assert all(t.val_sensitivity >= 0.95 for t in strict.calibration.thresholds.values())
    assert evaluation.again(strict, known, sensitivity=None) == made
    assert Artifact.parse(made.model_dump(mode="json"), "a").evaluation == made.evaluation


def test_the_same_answers_give_the_same_record_and_bytes(tmp_path):
    one, two = (judged(tmp_path / name)[0] for name in "ab")
    assert one.model_copy(update={"folder": two.folder}) == two


def test_no_patient_is_in_what_is_kept(tmp_path):
    made, *_ = judged(tmp_path)
    made.save(tmp_path)
    for file in tmp_path.iterdir():
        assert b"patient" not in file.read_bytes()


def test_answers_that_were_changed_are_refused(tmp_path):
    made, _, known = judged(tmp_path)
    (tmp_path / evaluation.ANSWERS).write_bytes(b"other")
    with pytest.raises(EdgeKDError, match="is not the file that was saved: run the stage"):
        evaluation.answers(made, "test", known["test"].images)
    with pytest.raises(EdgeKDError, match="is not the file that was saved"):
        evaluation.again(made, known, sensitivity=0.5)
