"""Every gate, on both sides of its margin and astride of it."""

import pytest

from edgekd.explain.verdict import judge
from edgekd.records import Aggregate, Agreement, Comparison, Margins, worst

MARGINS = Margins()


def of(value, half=0.01, null=None, n=100):
    return Aggregate(value=value, low=value - half, high=value + half, null=null, n=n)


GOOD = {
    "aggregate": {"kappa": of(0.9), "identification": of(0.98), "lost": of(0.02)},
    "checks": {"random_head": of(0.1, null=0.7), "above_random": of(0.2), "repeatable": of(0.9),
               "undefined": of(0.0, 0), "shortcut: L upper left": of(0.02)},
    "paired": {"accuracy_pt": of(0.1), "answers": of(0.97), "faithful": of(0.0),
               "energy": of(0.01), "shortcut: L upper left": of(0.0)},
}  # fmt: skip


def comparison(name="student int8", **change):
    parts = {k: dict(v) for k, v in GOOD.items()}
    for key, value in change.items():
        part, _, figure = key.partition("__")
        figure = figure.replace("_L", ": L upper left")
        parts[part] |= {figure: value}
    case = Agreement(image="h", label="a", explained="a", answer="a", probability=0.9,
                     figures={}, null={})  # fmt: skip
    return Comparison(name=name, artifact_sha256="0", precision="int8", runtime="openvino",
                      layer="l", seconds_per_map=0.1, undefined=0, images=[case] * 50,
                      **parts)  # fmt: skip


RIGHT = of(0.9)


def verdict(step="quantisation", reference=None, accuracy=RIGHT, margins=MARGINS, **change):
    before = reference or comparison("student fp32")
    return judge(step, before, comparison(**change), margins, accuracy)


def test_all_held():
    found = verdict()
    assert (found.state, found.missed, found.remedies) == ("pass", (), ())
    assert "In 49 of 50 images the map of student int8 agrees with student fp32's" in found.sentence
    assert {g.state for g in found.gates} == {"pass"}


# what is changed, on the right side, astride, on the wrong side
CASES = [
    ("aggregate__kappa", 0.82, 0.8, 0.7),
    ("aggregate__identification", 0.97, 0.95, 0.5),
    ("aggregate__lost", 0.22, 0.25, 0.4),
    ("paired__accuracy_pt", -1.9, -2.0, -5),
    ("paired__answers", 0.92, 0.9, 0.4),
    ("paired__faithful", -0.03, -0.05, -0.2),
    ("paired__energy", -0.2, -0.25, -0.6),
]


@pytest.mark.parametrize(("key", "held", "astride", "missed"), CASES)
def test_a_gate(key, held, astride, missed):
    assert verdict(**{key: of(held)}).state == "pass"
    undecided = verdict(**{key: of(astride + 0.001, 0.01)})
    assert undecided.state == "inconclusive"
    assert undecided.missed[0].name == key.partition("__")[2]
    # 100 images, a half width of 0.01 that must shrink to 0.001
    assert undecided.missed[0].needed == pytest.approx(100 * 100, abs=2)
    failed = verdict(**{key: of(missed)})
    assert failed.state == "fail"
    assert [g.name for g in failed.missed] == [key.partition("__")[2]]
    assert failed.remedies[0].startswith("take a more exact precision")


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("checks__random_head", of(0.9, null=0.7)),
        ("checks__above_random", of(-0.1)),
        ("checks__repeatable", of(0.2)),
        ("checks__undefined", of(0.06, 0.03)),
    ],
)
@pytest.mark.parametrize("which", ["reference", "other"])
def test_a_method_that_cannot_be_used(key, bad, which):
    if which == "reference":
        found = verdict(reference=comparison("student fp32", **{key: bad}))
    else:
        found = verdict(**{key: bad})
    assert found.state == "invalid"
    assert found.missed[0].name.startswith(key.partition("__")[2])
    assert "Maps cannot be used to judge" in found.sentence
    assert found.remedies == ()  # it says nothing of compression


def test_a_reference_that_knows_nothing():
    assert verdict(accuracy=of(0.4)).state == "invalid"
    assert verdict(accuracy=None).state == "pass"


def test_invalid_comes_before_fail_and_fail_before_too_few():
    assert verdict(checks__above_random=of(-0.1), aggregate__kappa=of(0.1)).state == "invalid"
    assert verdict(aggregate__lost=of(0.1), aggregate__kappa=of(0.1)).state == "fail"
    assert worst(["pass", "inconclusive", "pass"]) == "inconclusive"


def test_a_marker():
    moved = of(0.3)
    assert verdict(checks__shortcut_L=moved, paired__shortcut_L=of(0.28)).state == "fail"
    # the reference is moved as much: not this step's doing
    assert verdict(checks__shortcut_L=moved, paired__shortcut_L=of(0.005)).state == "pass"
    assert verdict(checks__shortcut_L=of(0.05), paired__shortcut_L=of(0.02)).state == "inconclusive"


def test_a_student_may_explain_itself_otherwise():
    """Two students of one recipe agree with each other no better: kappa is not asked."""
    low = {"aggregate__kappa": of(0.1), "aggregate__identification": of(0.6),
           "aggregate__lost": of(0.8), "paired__answers": of(0.8)}  # fmt: skip
    found = verdict("distillation", **low)
    assert found.state == "pass"
    assert "explains itself faithfully" in found.sentence
    assert verdict(**low).state == "fail"
    assert verdict("distillation", paired__faithful=of(-0.2)).state == "fail"
    assert verdict("distillation", paired__accuracy_pt=of(-6, 0.5)).state == "fail"


@pytest.mark.parametrize(
    ("where", "student", "file"),
    [
        ("paired__accuracy_pt", -4, -1.5),
        ("paired__faithful", -0.1, -0.02),
        ("paired__energy", -0.35, -0.2),
    ],
)
def test_a_student_may_lose_more_than_a_file_of_it(where, student, file):
    """Weights are not the same in the first step, and are in the second."""
    assert verdict("distillation", **{where: of(student, 0.02)}).state == "pass"
    assert verdict("quantisation", **{where: of(student, 0.02)}).state == "fail"
    assert verdict("quantisation", **{where: of(file, 0.02)}).state == "pass"


def test_margins_are_declared():
    lax = MARGINS.model_copy(update={"kappa": 0.4})
    assert verdict(aggregate__kappa=of(0.5)).state == "fail"
    assert verdict(aggregate__kappa=of(0.5), margins=lax).state == "pass"
    assert lax.sha256 != MARGINS.sha256
    assert Margins().sha256 == MARGINS.sha256


def test_no_more_images_help_where_the_value_is_the_margin():
    assert verdict(aggregate__kappa=of(0.8)).missed[0].needed is None
