"""What models answer without the organ: networks done by hand, with known shares."""

from pathlib import Path

import numpy as np
import pytest
from explain.test_examine import CPU, artifact
from explain.test_verdict import comparison
from PIL import Image

from edgekd.data.dataset import Sample
from edgekd.explain import occlusion
from edgekd.explain.occlusion import Hidden, Regions
from edgekd.explain.verdict import ELSEWHERE, REMEDIES, judge
from edgekd.records import Calibration, Fidelity, Margins, Spec, Survived
from edgekd.records.margins import LATER
from edgekd.runtimes import Outputs, machine

N = 40
SPEC = Spec(classes=("a", "b", "c", "d"), size=(48, 48), mean=(0.5,) * 3, std=(0.5,) * 3)
GREYS = np.array([40, 100, 160, 220])  # of each class
LEVELS = (GREYS / 255 - 0.5) / 0.5
MADE = artifact(Path()).model_copy(update={"spec": SPEC})
ORGAN = np.zeros((48, 48), bool)
ORGAN[16:32, 16:32] = True
GROUPS = [f"patient {i}" for i in range(N)]


def films(inside, outside):
    """(N, 48, 48, 3) uint8: the organ in the grey of class `inside`, all else in `outside`'s."""
    grey = np.where(ORGAN, GREYS[inside][:, None, None], GREYS[outside][:, None, None])
    return np.repeat(grey[..., None], 3, -1).astype(np.uint8)


def reader(row, column):
    """Answers by the grey of one pixel: the class whose grey is nearest."""

    def run(images):
        seen = images[:, 0, row, column]
        return Outputs((-((seen[:, None] - LEVELS) ** 2) * 40).astype(np.float32), np.zeros(0))

    return run


def asked(run, pixels, folder, masks=None, groups=GROUPS):
    masks = np.repeat(ORGAN[None], len(pixels), 0) if masks is None else masks
    made = MADE.model_copy(update={"folder": folder})
    kinds = ["organ" if m.any() else "" for m in masks]
    return occlusion.examine(run, made, CPU, pixels, Regions(masks, kinds), groups)


def whole(run, pixels):
    from edgekd.data.preprocess import normalise

    return run(normalise(pixels, SPEC)).logits


RNG = np.random.default_rng(0)
CLASS = RNG.integers(4, size=N)
SAME = np.full(N, 2)


def test_a_model_that_reads_only_outside(tmp_path):
    """All answers survive without the organ, and none of it is chance: the excess is 1."""
    run, pixels = reader(0, 0), films(SAME, CLASS)
    found = asked(run, pixels, tmp_path)
    got = occlusion.checks(found, whole(run, pixels), MADE, GROUPS, 0)
    assert got["survive_without"].value == 1
    assert 0.15 < got["survive_without"].null < 0.35  # four classes
    assert got["elsewhere"].value == pytest.approx(1)
    assert got["elsewhere"].high == pytest.approx(1)
    # 40 of 40 patients: Clopper and Pearson have 0.912 as the lower end
    chance = got["survive_without"].null
    assert got["elsewhere"].low == pytest.approx((0.9119 - chance) / (1 - chance), abs=1e-3)
    assert got["drop_without"].value == pytest.approx(0, abs=1e-6)
    # with the organ alone all are grey as it is: class 2 for everybody
    assert got["survive_only"].value == pytest.approx((CLASS == 2).mean())
    assert state(got) == "fail"


def test_a_model_that_reads_only_inside(tmp_path):
    """Without the organ it answers the same for everybody: what survives is chance."""
    run, pixels = reader(24, 24), films(CLASS, SAME)
    found = asked(run, pixels, tmp_path)
    got = occlusion.checks(found, whole(run, pixels), MADE, GROUPS, 0)
    assert got["survive_without"].value == pytest.approx((CLASS == 2).mean())
    assert got["survive_without"].null == pytest.approx((CLASS == 2).mean())
    assert got["elsewhere"].value == pytest.approx(0, abs=1e-9)
    assert got["survive_only"].value == 1
    assert got["drop_only"].value == pytest.approx(0, abs=1e-6)
    assert got["drop_without"].value > 0.5
    assert state(got) == "pass"


def test_a_gap_that_is_taken_for_a_lesion(tmp_path):
    """Half of the films have a flat lesion, the others none and no mask. Who answers to any flat
    place answers to the gap, too, in whoever's film it is: that is chance. Who answers to the
    border does not.
    """
    ill = np.arange(N) % 2 == 1
    texture = 120 + 60 * ((np.arange(48) % 2) ^ (np.arange(48)[:, None] % 2))
    grey = np.where(ill[:, None, None] & ORGAN, 150, texture)
    grey[:, 0, 0] = GREYS[ill.astype(int)]
    pixels = np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    masks = ill[:, None, None] & ORGAN

    def flat(images):
        detail = np.abs(np.diff(images[:, 0, 20:28, 20:28], axis=-1)).mean((1, 2))
        return Outputs(np.stack([detail, 0.2 - detail], 1).astype(np.float32), np.zeros(0))

    for run, excess, chance in ((flat, 0, 1), (reader(0, 0), 1, 0.5)):
        answers = whole(run, pixels)
        assert (answers.argmax(1) == ill).all()
        found = asked(run, pixels, tmp_path / run.__name__ / str(excess), masks)
        got = occlusion.checks(found, answers, MADE, GROUPS, 0)
        assert got["survive_without"].value == 1
        assert got["survive_without"].null == pytest.approx(chance, abs=0.15)
        assert got["elsewhere"].value == pytest.approx(excess)
        assert got["elsewhere"].n == N // 2
        assert -1 <= got["elsewhere"].low <= got["elsewhere"].high <= 1


def state(checks, region="organ"):
    """Of a file that is flawless but for `checks`."""
    one = comparison().model_copy(update={"region": region})
    one = one.model_copy(update={"checks": one.checks | checks})
    before = comparison("student fp32")
    return judge("quantisation", before, one, Margins(), None).state


def test_the_figures_by_hand():
    """5 images of 5 patients; the fourth has no organ."""
    eye = np.eye(2, dtype=np.float32) * 2
    logits = eye[[0, 0, 1, 1, 0]]
    at = np.array([0, 1, 2, 4])
    others = eye[np.array([[0, 1], [0, 0], [0, 0], [1, 1]])]
    found = Hidden(at, ["organ"] * 4, eye[[0, 1, 1, 0]], eye[[1, 1, 0, 1]], others, others)
    got = occlusion.checks(found, logits, MADE, [f"{i}" for i in range(5)], 0)
    sure = 1 / (1 + np.exp(-2))
    assert got["survive_without"].value == 0.75
    assert got["survive_without"].null == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert got["elsewhere"].value == pytest.approx((0.75 - 0.375) / (1 - 0.375))
    assert got["drop_without"].value == pytest.approx((sure - (1 - sure)) / 4)
    assert got["survive_only"].value == 0
    assert got["survive_only"].low == 0
    assert got["survive_only"].high == pytest.approx(0.6024, abs=1e-3)  # Clopper-Pearson, 0 of 4
    assert got["drop_only"].value == pytest.approx(2 * sure - 1)
    assert got["drop_only"].n == 4
    fitted = Calibration(temperature=4.0, method="nll", thresholds={})
    warm = MADE.model_copy(update={"calibration": fitted})
    hot = occlusion.checks(found, logits, warm, [f"{i}" for i in range(5)], 0)
    cool = 1 / (1 + np.exp(-0.5))
    assert hot["drop_only"].value == pytest.approx(2 * cool - 1)
    by_class = {k: a for k, a in got.items() if k.startswith("survive_without: ")}
    assert {k: a.value for k, a in by_class.items()} == {
        "survive_without: a": pytest.approx(2 / 3)
    }  # the others are of one patient
    assert by_class["survive_without: a"].null == pytest.approx(0.5)
    assert set(got) - set(by_class) == set(occlusion.CHECKS)


def test_one_patient_says_nothing():
    eye = np.eye(2, dtype=np.float32)
    none = np.zeros((3, 0, 2), np.float32)
    found = Hidden(np.arange(3), ["organ"] * 3, eye[[0, 1, 1]], eye[[0, 1, 1]], none, none)
    assert occlusion.checks(found, eye[[0, 1, 1]], MADE, ["p"] * 3, 0) == {}


# --- what is shown


def test_nothing_of_what_is_hidden_is_left():
    rng = np.random.default_rng(1)
    image = rng.normal(size=(3, 48, 48)).astype(np.float32)
    hidden = occlusion.soft(ORGAN)
    other = np.where(ORGAN, image + 100, image)
    np.testing.assert_array_equal(hidden[ORGAN], 1)
    assert hidden[0, 0] == hidden[24, 2] == 0
    assert 0 < hidden[24, 14] < 1  # the edge is soft, and outside
    shown = occlusion.hide(image, hidden)
    np.testing.assert_allclose(occlusion.hide(other, hidden), shown, atol=1e-3)
    np.testing.assert_array_equal(shown[:, :10], image[:, :10])
    # where nothing but one colour is left, all is of it; and with nothing left, the mean colour
    flat = np.where(ORGAN, 5, np.full((3, 48, 48), 0.3)).astype(np.float32)
    np.testing.assert_allclose(occlusion.hide(flat, hidden), 0.3, atol=1e-5)
    np.testing.assert_array_equal(occlusion.hide(image, np.ones((48, 48), np.float32)), 0)
    # nothing but the inside, and its mean at the far corner
    only = occlusion.hide(np.where(ORGAN, 0.7, 9).astype(np.float32) * np.ones((3, 1, 1)),
                          1 - ORGAN.astype(np.float32))  # fmt: skip
    np.testing.assert_allclose(only, 0.7, atol=1e-5)


def test_an_organ_comes_before_a_lesion(tmp_path):
    def png(name, inside):
        path = tmp_path / name
        Image.fromarray(np.uint8(inside) * 255).save(path)
        return path

    organ, lesion = np.zeros((48, 48)), np.zeros((48, 48))
    organ[8:40, 8:40] = 1
    lesion[20:24, 20:24] = 1
    organ, lesion = png("organ.png", organ), png("lesion.png", lesion)
    none = png("none.png", np.zeros((48, 48)))

    def sample(mask, organ):
        return Sample(tmp_path / "i.png", 0, "g", mask, "0" * 64, organ)

    samples = [sample(lesion, organ), sample(lesion, None), sample(lesion, none),
               sample(none, None), sample(None, None)]  # fmt: skip
    found = occlusion.regions(samples, SPEC)
    assert found.kinds == ["organ", "lesion", "lesion", "", ""]
    assert found.masks.sum((1, 2)).tolist() == [32 * 32, 16, 16, 0, 0]
    assert occlusion.regions(samples[3:], SPEC) is None
    both = Hidden(np.arange(2), ["lesion", "organ"], *[np.zeros(0)] * 4)
    assert both.region == "organ or lesion"
    assert both._replace(kinds=["lesion"] * 2).region == "lesion"


def test_strangers_are_other_patients():
    groups = ["a", "a", "b", "c", "d", "e", "f"]
    found = occlusion.strangers(groups, np.array([0, 1, 4]), 3)
    assert found.shape == (3, 4)
    assert not (found[:2] < 2).any()
    assert 4 not in found[2]
    assert all(len(set(row)) == 4 for row in found.tolist())
    np.testing.assert_array_equal(found, occlusion.strangers(groups, np.array([0, 1, 4]), 3))
    assert occlusion.strangers(["a", "b", "b"], np.arange(3), 0).shape == (3, 1)
    assert occlusion.strangers(["a", "a"], np.arange(2), 0).shape == (2, 0)


def test_a_strangers_own_region_is_hidden_too():
    images = np.stack([np.zeros((3, 48, 48)), np.where(ORGAN.T, 7, 1) * np.ones((3, 1, 1))])
    corner = np.zeros((48, 48), bool)
    corner[:6, :6] = True
    masks = np.stack([corner, ORGAN])
    shown = occlusion._shown(images.astype(np.float32), masks, 0, np.array([1]))
    assert shown.shape == (4, 3, 48, 48)
    np.testing.assert_allclose(shown[1], 1, atol=1e-4)  # neither its own nor the other's


def test_what_was_answered_is_not_asked_again(tmp_path):
    pixels, seen = films(CLASS, SAME), []

    def spy(images):
        seen.append(len(images))
        return reader(24, 24)(images)

    masks = np.repeat(ORGAN[None], N, 0)
    masks[5] = False
    first = asked(spy, pixels, tmp_path, masks)
    assert first.at.tolist() == [i for i in range(N) if i != 5]
    assert first.others_without.shape == (N - 1, occlusion.STRANGERS, 4)
    assert sum(seen) == (N - 1) * 2 * (1 + occlusion.STRANGERS)
    again = asked(spy, pixels, tmp_path, masks)
    assert sum(seen) == (N - 1) * 2 * (1 + occlusion.STRANGERS)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    masks[0, 0, 0] = True
    asked(spy, pixels, tmp_path, masks)
    assert sum(seen) == 2 * (N - 1) * 2 * (1 + occlusion.STRANGERS)


def test_the_surest_without_the_organ(tmp_path):
    logits = np.float32([[1, 0], [2, 0], [3, 0], [0, 4], [0, 1], [5, 0]])
    without = np.float32([[1, 0], [4, 0], [0, 3], [0, 2], [0, 9]])  # the third answers otherwise
    at = np.array([0, 1, 2, 3, 4])
    found = Hidden(at, ["organ", "lesion", "organ", "organ", "organ"], without, without,
                   *[np.zeros((5, 1, 2))] * 2)  # fmt: skip
    digests = [f"{i}" * 64 for i in range(6)]
    got = occlusion.survived(found, logits, artifact(tmp_path), "student fp32", digests)
    assert [s.image for s in got] == ["4" * 12, "1" * 12, "3" * 12]
    assert [s.answer for s in got] == ["b", "a", "b"]
    assert [s.region for s in got] == ["organ", "lesion", "organ"]
    assert got[1].before == pytest.approx(1 / (1 + np.exp(-2)))
    assert got[1].after == pytest.approx(1 / (1 + np.exp(-4)))
    assert set(Survived.model_fields) == {"image", "model", "region", "answer", "before", "after"}


# --- the verdict


def looking(name, value, half=0.05, region="organ", share=0.71):
    from explain.test_verdict import of

    one = comparison(name)
    checks = {"elsewhere": of(value, half), "survive_without": of(share, null=0.4)}
    return one.model_copy(update={"region": region, "checks": one.checks | checks})


def given(reference, other, step="distillation"):
    return judge(step, reference, other, Margins(), None)


def test_a_student_that_looks_elsewhere():
    found = given(looking("teacher fp32", 0.1), looking("student fp32", 0.52))
    assert found.state == "fail"
    assert [g.name for g in found.missed] == ["elsewhere"]
    assert found.sentence == (
        "student fp32 looks elsewhere: answers that survive without the organ, beyond chance "
        "(student fp32: 71 % survive, 40 % by chance): 0.52 [0.47, 0.57], at most 0.4 asked."
    )
    assert found.remedies == ELSEWHERE


def test_a_teacher_that_looks_elsewhere_fails_its_students_step():
    teacher = looking("teacher fp32", 0.52)
    found = given(teacher, looking("student fp32", 0.1))
    assert found.state == "fail"
    assert [g.name for g in found.missed] == ["elsewhere of teacher fp32"]
    assert found.sentence.startswith("teacher fp32 looks elsewhere: answers that survive")
    # of a student that a step has judged it is not asked twice
    student = looking("student fp32", 0.52).model_copy(update={"verdict": found})
    step = given(student, looking("student int8", 0.1), "quantisation")
    assert [g.name for g in step.gates if g.name.startswith("elsewhere")] == ["elsewhere"]
    assert step.state == "pass"


def test_what_else_failed_is_told_too():
    other = looking("student int8", 0.7)
    lost = other.aggregate["kappa"].model_copy(update={"value": 0.1, "low": 0.0, "high": 0.2})
    other = other.model_copy(update={"aggregate": other.aggregate | {"kappa": lost}})
    found = given(looking("student fp32", 0.1), other, "quantisation")
    assert "student int8 looks elsewhere: " in found.sentence
    assert "student int8 does not keep what student fp32 has: agreement of maps" in found.sentence
    assert found.sentence.count("survive without") == 1
    assert found.remedies == (*ELSEWHERE, *REMEDIES["quantisation"])


def test_where_the_method_is_invalid_it_is_told_all_the_same():
    bad = (
        comparison("teacher fp32")
        .checks["repeatable"]
        .model_copy(update={"value": 0.1, "low": 0.0, "high": 0.2})
    )
    teacher = looking("teacher fp32", 0.7)
    teacher = teacher.model_copy(update={"checks": teacher.checks | {"repeatable": bad}})
    found = given(teacher, looking("student fp32", 0.1))
    assert found.state == "invalid"
    assert "Maps cannot be used to judge student fp32" in found.sentence
    assert "teacher fp32 looks elsewhere" in found.sentence


def test_few_images_do_not_decide():
    found = given(looking("teacher fp32", 0.1), looking("student fp32", 0.35, 0.2))
    assert found.state == "inconclusive"
    assert "looks elsewhere" not in found.sentence


def test_without_a_lesion_the_organ_is_left():
    """Another margin: what is around a lesion may tell something of it."""
    teacher = looking("teacher fp32", 0.1, region="lesion")
    assert given(teacher, looking("student fp32", 0.66, 0.1, "lesion")).state == "pass"
    assert given(teacher, looking("student fp32", 0.95, 0.04, "lesion")).state == "fail"


def test_without_masks_nothing_is_asked():
    found = given(comparison("teacher fp32"), comparison("student fp32"))
    assert found.state == "pass"
    assert not [g for g in found.gates if g.name.startswith("elsewhere")]


def test_records_from_before(tmp_path):
    """They load, and the hash of margins that were declared without this one still counts."""
    import hashlib

    record = Fidelity(reference="r", reference_sha256="0", variant="evidence", grid=14,
                      data_fingerprint="f", split="test", machine=machine.this(),
                      comparisons=(comparison("student fp32"),))  # fmt: skip
    old = record.model_dump(mode="json")
    for key in ("hidden", "survived"):
        del old[key]
    later = set().union(*LATER)
    assert {"elsewhere", "elsewhere_lesion"} < later
    for key in later:
        del old["margins"][key]
    del old["comparisons"][0]["region"]
    found = Fidelity.parse(old, "old")
    assert found == record
    before = Margins().model_dump_json(exclude=later)
    said = hashlib.sha256(before.encode()).hexdigest()
    assert found.margins.declared_as(said)
    assert found.margins.declared_as(Margins().sha256)
    assert not Margins(kappa=0.5).declared_as(said)
    between = Margins().model_dump_json(exclude=LATER[0])  # with elsewhere, without student_...
    assert found.margins.declared_as(hashlib.sha256(between.encode()).hexdigest())
    assert not Margins(elsewhere=0.9).declared_as(Margins().sha256)
