"""Breaks that must not pass and honest files that must, on a network that has learnt something."""

import copy
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from explain.test_examine import CPU, SPEC, artifact, pictures
from squares import session, squares, trained

from edgekd import runtimes
from edgekd.data.preprocess import normalise
from edgekd.explain import examine, occlusion
from edgekd.explain.fidelity import localisation
from edgekd.export import onnx as export
from edgekd.metrics import evaluation
from edgekd.pipeline import explain
from edgekd.pipeline.explain import Link, Question
from edgekd.pipeline.run import Run
from edgekd.records import EdgeKDError, Margins
from edgekd.runtimes import Outputs

N = 48
MARGINS = Margins(lost=0.2)  # 48 images: none lost leaves an upper bound of 7 %
PIXELS, LABELS = pictures(N, 7)
DIGESTS = [hashlib.sha256(x.tobytes()).hexdigest() for x in PIXELS]


class Case:
    """What `evidence` wants of a sample."""

    def __init__(self, label, digest):
        self.label, self.digest, self.group, self.mask = int(label), digest, digest, None
        self.subgroup = ""


def question(n=N):
    samples = [Case(y, d) for y, d in zip(LABELS[:n], DIGESTS[:n], strict=True)]
    truth = evaluation.Truth(LABELS, DIGESTS, [d[:16] for d in DIGESTS], [""] * N)
    return Question(samples, truth, None, SPEC, 0)


def link(name, run, folder, n=N):
    """`name`: "student fp32"; the file answers as `run` does."""
    role, precision = name.split()
    made = artifact(folder / name.replace(" ", "-"), name=hashlib.sha256(name.encode()).hexdigest())
    made.folder.mkdir(parents=True)
    truth = question().truth
    logits = run(normalise(PIXELS, SPEC)).logits
    found = evaluation.judge(
        made.folder, {"val": logits, "test": logits}, {"val": truth, "test": truth}, SPEC.classes
    )
    update = {k: found[k] for k in ("metrics", "calibration", "evaluation")}
    made = made.model_copy(update=update | {"role": role, "precision": precision})
    got = examine.examine(run, made, CPU, PIXELS[:n], DIGESTS[:n], examine.Asked())
    return Link(name, made, CPU, got)


@pytest.fixture(scope="module")
def hard_swish():
    return trained(torch.nn.functional.hardswish)


@pytest.fixture(scope="module")
def whole(net, tmp_path_factory):
    return link("student fp32", session(net), tmp_path_factory.mktemp("whole"))


def judged(whole, run, folder, name="student int8", margins=MARGINS):
    other = link(name, run, folder)
    comparisons, maps = explain.chain([whole, other], question(), margins)
    assert list(maps) == [whole.name, name]
    assert comparisons[0].verdict is None
    return comparisons[1]


def noisy(net, amount, seed=0):
    """All weights times 1 + noise."""
    other = copy.deepcopy(net)
    generator = torch.manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p *= 1 + amount * torch.randn(p.shape, generator=generator)
    return session(other)


def test_the_same_file(net, whole, tmp_path):
    c = judged(whole, session(net), tmp_path)
    assert c.verdict.state == "pass", c.verdict.sentence
    assert c.reference == "student fp32"
    assert c.aggregate["kappa"].value == pytest.approx(1)
    assert c.aggregate["lost"].value == 0
    assert {k: a.value for k, a in c.paired.items()} == pytest.approx(
        {"accuracy_pt": 0, "answers": 1, "faithful": 0}
        | {k: 0 for k in c.paired if k.startswith("shortcut: ")}
    )


@pytest.mark.parametrize("scale", [0.25, 4])
def test_logits_of_another_scale(net, whole, tmp_path, scale):
    """What the temperature takes out again."""
    assert judged(whole, session(net, scale=scale), tmp_path).verdict.state == "pass"


def test_a_little_noise_passes(net, whole, tmp_path):
    c = judged(whole, noisy(net, 0.005), tmp_path)
    assert c.verdict.state == "pass", c.verdict.sentence


def test_kappa_falls_with_noise(net, whole, tmp_path):
    found = [judged(whole, noisy(net, a), tmp_path / str(a)).aggregate["kappa"].value
             for a in (0.01, 0.1, 0.4, 1.5)]  # fmt: skip
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.95
    assert found[-1] < 0.5


def random_head(net):
    other = copy.deepcopy(net)
    torch.manual_seed(3)
    other.head.reset_parameters()
    return session(other)


def permuted(net):
    def run(images):
        out = session(net)(images)
        return Outputs(np.roll(out.logits, 1, 1), out.features)

    return run


def random_network(net):
    torch.manual_seed(4)
    return session(type(net)().eval())


def wrong_layer(net):
    """Features that have nothing to do with what is answered."""

    def run(images):
        out = session(net)(images)
        return Outputs(out.logits, out.features[:, :, ::-1, ::-1].copy())

    return run


def constant_map(net):
    def run(images):
        out = session(net)(images)
        centre = np.zeros_like(out.features)
        centre[:, :, 2:4, 2:4] = 1
        centre *= 1 + np.arange(centre.shape[1])[:, None, None]
        return Outputs(out.logits, centre)

    return run


def bgr_without_mean(net):
    return lambda images: session(net)(images[:, ::-1] * 0.16 + 0.5)


BREAKS = [random_head, permuted, random_network, wrong_layer, constant_map, bgr_without_mean]


@pytest.mark.parametrize("broken", BREAKS)
def test_no_break_passes(net, whole, tmp_path, broken):
    c = judged(whole, broken(net), tmp_path)
    assert c.verdict.state in ("fail", "invalid"), c.verdict.sentence
    assert c.verdict.missed


def calibrated(net, share):
    """INT8 activations whose range was measured on images of `share` of their contrast."""
    images = torch.from_numpy(normalise(pictures(64, 9)[0], SPEC))

    def low(x, ceiling):
        return (x.clamp(0, ceiling) * (255 / ceiling)).round() * (ceiling / 255)

    @torch.no_grad()
    def run(x):
        stem = low(net.activation(net.stem(torch.from_numpy(x))), ceilings[0])
        body = low(net.activation(net.body(stem)), ceilings[1])
        pooled = torch.nn.functional.avg_pool2d(body, 2).flatten(1)
        return Outputs(net.head(pooled).numpy(), body.numpy())

    with torch.no_grad():
        stem = net.activation(net.stem(images * share))
        ceilings = [float(stem.max()), float(net.activation(net.body(stem)).max())]
    return run


def test_a_wrong_calibration(net, whole, tmp_path):
    """Of images of their contrast it passes; the fainter they were, the worse."""
    found = [judged(whole, calibrated(net, s), tmp_path / str(s)) for s in (1, 0.5, 0.3)]
    kappa = [c.aggregate["kappa"].value for c in found]
    assert found[0].verdict.state == "pass", found[0].verdict.sentence
    assert kappa == sorted(kappa, reverse=True)
    assert found[1].verdict.state != "pass"
    assert found[2].verdict.state in ("fail", "invalid")


@pytest.mark.parametrize("broken", [random_head, permuted, random_network])
def test_nor_as_a_student(net, whole, tmp_path, broken):
    first = whole._replace(
        name="teacher fp32", artifact=whole.artifact.model_copy(update={"role": "teacher"})
    )
    student = link("student fp32", broken(net), tmp_path)
    comparisons, _ = explain.chain([first, student], question(), MARGINS)
    assert comparisons[1].verdict.step == "distillation"
    assert comparisons[1].verdict.state in ("fail", "invalid")


def test_maps_of_the_next_patient(whole, tmp_path):
    """The right answers with another patient's maps."""
    found = whole.found
    rolled = {k: np.roll(getattr(found, k), 1, 0) for k in ("maps", "head", "repeated")}
    other = whole._replace(name="student int8", found=found._replace(**rolled))
    comparisons, _ = explain.chain([whole, other], question(), MARGINS)
    c = comparisons[1]
    assert c.verdict.state == "fail"
    assert {"kappa", "identification", "lost"} <= {g.name for g in c.verdict.missed}


def test_maps_that_leave_small_masks(whole):
    """Of 0.05 of all energy most may be lost, and still it is less than 0.05."""
    found = whole.found
    answers = found.logits.argmax(1)
    own = found.of(answers).maps  # (N, 14, 14)
    cells = np.zeros_like(own, bool)
    order = own.reshape(N, -1).argsort(1)
    for i in range(N):
        cells[i].ravel()[order[i, 150:154]] = True  # of 196: warm, not hot
    weak = np.where(cells[:, None], 0.05 * found.maps, found.maps)
    other = whole._replace(name="student int8", found=found._replace(maps=weak))
    masks = cells.repeat(24, 1).repeat(24, 2)[:, ::14, ::14]
    ask = question()._replace(masks=masks)
    c = explain.chain([whole, other], ask, MARGINS)[0][1]
    assert c.aggregate["energy"].value < 0.05
    inside = [
        np.diag(localisation(x.of(answers).maps, masks)["energy"]) for x in (found, other.found)
    ]
    assert c.paired["energy"].value == pytest.approx(inside[1].mean() / inside[0].mean() - 1)
    (gate,) = [g for g in c.verdict.gates if g.name == "energy"]
    assert gate.state == "fail"
    assert gate.high < -0.25


def test_a_chain_of_three(net, whole, tmp_path):
    """INT8 is held against the student that it was made of; what the teacher says is told."""
    teacher = link("teacher fp32", noisy(net, 0.02), tmp_path)
    teacher = teacher._replace(artifact=teacher.artifact.model_copy(update={"role": "teacher"}))
    low = link("student int8", noisy(net, 0.003, 1), tmp_path)
    comparisons, _ = explain.chain([teacher, whole, low], question(), MARGINS)
    assert [c.reference for c in comparisons] == ["", "teacher fp32", "student fp32"]
    assert [c.verdict and c.verdict.step for c in comparisons] == [
        None, "distillation", "quantisation",
    ]  # fmt: skip
    # the teacher is of another opinion: INT8 shows what its student does
    other = teacher._replace(found=teacher.found._replace(logits=-teacher.found.logits))
    _, maps = explain.chain([other, whole, low], question(), MARGINS)
    answers = whole.found.logits.argmax(1)
    assert (answers != other.found.logits.argmax(1)).all()
    np.testing.assert_array_equal(maps[whole.name], whole.found.of(answers).maps)
    np.testing.assert_array_equal(maps[low.name], low.found.of(answers).maps)
    assert "teacher_pearson" in comparisons[2].aggregate
    assert "teacher_pearson" not in comparisons[1].aggregate
    assert comparisons[2].aggregate["pearson"].value > comparisons[2].aggregate[
        "teacher_pearson"].value  # fmt: skip


def test_a_student_is_asked_through_its_teachers_masks(net, whole, tmp_path):
    """The same answers pass; a student that weighs the parts of another image fails."""
    teacher = whole._replace(
        name="teacher fp32", artifact=whole.artifact.model_copy(update={"role": "teacher"})
    )
    student = link("student fp32", session(net), tmp_path)
    given = {}
    for name, shared in (("same", whole.found.maps), ("rolled", np.roll(whole.found.maps, 1, 0))):
        (_, c), _ = explain.chain([teacher, student._replace(shared=shared)], question(), MARGINS)
        assert c.verdict.step == "distillation"
        given[name] = {g.name: g.state for g in c.verdict.gates if g.name.startswith("shared")}
        if name == "same":
            assert c.aggregate["shared_kappa"].value == pytest.approx(1)
            assert "weighs them as teacher fp32 does" in c.verdict.sentence
    assert set(given["same"].values()) == {"pass"}
    assert set(given["rolled"].values()) == {"fail"}
    (_, c), _ = explain.chain([teacher, student], question(), MARGINS)  # nothing to judge by
    assert not [g for g in c.verdict.gates if g.name.startswith("shared")]


def test_too_few_images_do_not_decide(net, tmp_path):
    n = 8
    first = link("student fp32", session(net), tmp_path, n)
    other = link("student int8", noisy(net, 0.005), tmp_path, n)
    comparisons, _ = explain.chain([first, other], question(n), MARGINS)
    given = comparisons[1].verdict
    assert given.state == "inconclusive", given.sentence
    assert max(g.needed or 0 for g in given.missed) > n
    assert "images would decide" in given.sentence


def test_the_images_that_markers_moved_most(whole):
    marked = whole.found.marked.copy()
    marked[5, 2] = marked[5, 2][::-1]  # the answer to image 5 is another with the third marker
    marked[5, 2, 3] += 9
    other = whole._replace(found=whole.found._replace(marked=marked))
    found = list(explain._swayed(other, question()))
    assert len(found) == 4
    assert (found[0].image, found[0].marker) == (DIGESTS[5][:12], "R upper left")
    assert found[0].after[0] == "d"
    assert found[0].before[0] == SPEC.classes[LABELS[5]]
    assert [s.moved for s in found] == sorted((s.moved for s in found), reverse=True)


def test_a_teacher_that_answers_without_the_organ_stops_the_chain(whole, net, tmp_path):
    """Its answers survive, its student's do not: the step fails, and says whose fault it is."""
    own = whole.found.logits
    four = np.repeat(own[:, None], 4, 1)
    strange = np.stack([np.roll(own, k, 0) for k in (1, 2, 3, 4)], 1)
    at = np.arange(N)
    kinds = ["organ"] * N
    blind = occlusion.Hidden(at, kinds, own, own, strange, strange)
    seeing = occlusion.Hidden(at, kinds, np.roll(own, 1, 1), own, np.roll(four, 1, 2), strange)
    role = whole.artifact.model_copy(update={"role": "teacher"})
    teacher = whole._replace(name="teacher fp32", artifact=role)
    student = whole._replace(hidden=seeing)
    for hidden, state in ((blind, "fail"), (seeing, "pass"), (None, "pass")):
        first = teacher._replace(hidden=hidden)
        c = explain.chain([first, student], question(), MARGINS)[0]
        assert c[1].verdict.state == state, c[1].verdict.sentence
        assert c[0].region == ("organ" if hidden else "")
        names = [g.name for g in c[1].verdict.gates if g.name.startswith("elsewhere")]
        assert names == ["elsewhere of teacher fp32", "elsewhere"][0 if hidden else 1 :]
        if hidden is blind:
            assert c[0].checks["elsewhere"].value == pytest.approx(1)
            assert c[1].checks["survive_without"].value == 0
            assert c[1].verdict.sentence.startswith("teacher fp32 looks elsewhere")
            told = list(explain._survived([first, student], question()))
            assert [s.model for s in told] == ["teacher fp32"] * 3
            assert {s.image for s in told} <= {d[:12] for d in DIGESTS}
    plain = explain.chain([teacher, whole], question(), MARGINS)[0]
    assert not [k for k in plain[1].checks if k in occlusion.CHECKS]


def test_fast_is_for_a_teacher(tmp_path):
    run = Run(tmp_path, tmp_path, SimpleNamespace(teacher=""), "", None)
    with pytest.raises(EdgeKDError, match="--fast is for a teacher's maps"):
        explain.judge(run, fast=True)


def test_an_inverted_map(whole):
    """It agrees with nothing, and explains the opposite."""
    found = whole.found
    maps = np.nanmax(found.maps, (2, 3), keepdims=True) - found.maps
    other = whole._replace(
        name="student int8", found=found._replace(maps=maps, faithful=-found.faithful)
    )
    comparisons, _ = explain.chain([whole, other], question(), MARGINS)
    assert comparisons[1].verdict.state == "invalid"
    assert comparisons[1].aggregate["pearson"].value == pytest.approx(-1)
    missed = [g.name for g in comparisons[1].verdict.missed]
    assert "above_random of student int8" in missed


def test_the_published_variant_is_blind_and_says_so(net, tmp_path):
    """With weights that are nearly alike its maps of a random head are those of the network."""
    folder, asked = tmp_path / "a", examine.Asked(variant="published")
    made = link("student fp32", session(net, scale=0.02), folder)
    found = examine.examine(session(net, scale=0.02), made.artifact, CPU, PIXELS, DIGESTS, asked)
    first = made._replace(found=found)
    other = first._replace(name="student int8")
    comparisons, _ = explain.chain([first, other], question(), MARGINS)
    given = comparisons[1].verdict
    assert given.state == "invalid"
    assert any(g.name.startswith("random_head") for g in given.missed)
    assert comparisons[1].aggregate["pearson"].value == pytest.approx(1)  # and would have passed


def test_maps_of_hard_swish(hard_swish, tmp_path):
    """What is below zero is no mask: evidence is above chance, and hears more of the head than
    the published map, which is the sum of activations on such a network too.
    """
    run, alike = session(hard_swish), {}
    made = link("student fp32", run, tmp_path)
    for variant in ("evidence", "published"):
        asked = examine.Asked(variant=variant)
        found = examine.examine(run, made.artifact, CPU, PIXELS, DIGESTS, asked)
        own = examine.checks(found, question().cases(LABELS), made.artifact, 0)
        alike[variant] = own["random_head"].value
        assert own["above_random"].low > 0
    assert alike["evidence"] < alike["published"] - 0.3


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_maps_are_the_same_in_each_runtime(net, whole, tmp_path, runtime):
    """f32: the largest difference is under a thousandth of the peak, r over 0.9999."""

    class Both(torch.nn.Module):
        layer = "body 24x6x6"

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x), self.net.features(x)

    trained = artifact(tmp_path / "t", name="t").model_copy(update={"kind": "student"})
    made = export.to_onnx(Both().eval(), trained, normalise(PIXELS[:4], SPEC), tmp_path / "onnx")
    cpu = CPU.model_copy(update={"runtime": runtime, "device": "CPU"})
    run = runtimes.open_session(made, cpu)
    found = examine.examine(run, made, cpu, PIXELS[:12], DIGESTS[:12], examine.Asked())
    exact = examine.Examined(*(x[:12] for x in whole.found))
    for own, right in zip(found.maps.reshape(-1, 196), exact.maps.reshape(-1, 196), strict=True):
        np.testing.assert_allclose(own, right, atol=1e-3 * np.nanmax(right))
        assert np.corrcoef(own, right)[0, 1] > 0.9999


def test_squares_are_what_they_were():
    images, labels = squares(N, 7)
    np.testing.assert_array_equal(labels, LABELS)
    assert np.abs(normalise(PIXELS, SPEC) - images).mean() < 0.05
