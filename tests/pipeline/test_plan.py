"""The sentence before a training, of a pace that is made up; what is there does not count."""

import logging

import pytest
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.models import feature_layers
from edgekd.pipeline import distill, plan
from edgekd.pipeline.plan import Estimate, Network, minutes, sentence
from edgekd.pipeline.run import Run
from edgekd.pipeline.workspace import Workspace
from edgekd.records import EdgeKDError, Training, untracked
from edgekd.records.options import DataOptions
from edgekd.train import pace
from edgekd.train.pace import Pace, Work

ONCE = ["--size", "32", "--epochs", "1", "--batch", "16"]


@pytest.fixture
def work(phantoms, tmp_path):
    return Workspace.open(tmp_path / "runs", DataOptions(data=phantoms), 32, untracked)


@pytest.fixture
def log(caplog):
    """The plans that were told."""
    caplog.set_level(logging.INFO, "edgekd")
    return lambda: [m for m in caplog.messages if m.startswith("to make")]


@pytest.fixture
def paced(monkeypatch):
    """Every network takes ten seconds a step and one an image; the calls."""
    calls = []

    def classifier(name, arch, *_):
        calls.append(name)
        return Pace(10, 1, 3)

    def supernet(space, *_):
        calls.append(space)
        return Pace(100, 2, 1)

    monkeypatch.setattr(pace, "classifier", classifier)
    monkeypatch.setattr(pace, "supernet", supernet)
    monkeypatch.setattr(pace, "answers", lambda teacher: 0.5)
    return calls


def network(what, epochs, seconds, *, shorter="--epochs N", times=1, measured=2):
    """One that takes `seconds` an epoch."""
    return Network(what, lambda: Pace(seconds, 0, measured), Work(epochs, 1, 0), shorter, times)


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "less than a minute"), (59, "less than a minute"), (61, "about 1 min"),
     (9.4 * 60, "about 9 min"), (11 * 60, "about 10 min"), (38.4 * 60, "about 40 min"),
     (116 * 60, "about 115 min"), (120 * 60, "about 2 h"), (204 * 60, "about 3 h 25 min")],
)  # fmt: skip
def test_minutes_in_words(seconds, words):
    assert minutes(seconds) == words


def test_the_sentence():
    networks = [
        network("teacher a", 8, 60, shorter="--teacher-epochs N"),
        network("supernet b from a", 1, 1200, shorter="--shrink-epochs N"),
        network("student of cpu", 12, 30, times=3),
    ]
    found = Estimate((480.0, 1200.0, 1080.0), 7)
    assert sentence((), networks, found, search=True) == (
        "to make: teacher a (8 epochs), supernet b from a (1 epoch), search, student of cpu (3 x "
        "12 epochs); about 45 min on this machine (from 7 timed steps; the search and its timings "
        "are not counted); shorter: --shrink-epochs N, --epochs N, --teacher-epochs N"
    )
    there = ["teacher a (there already)"]
    assert sentence(there, networks[2:], Estimate((59.0,), 3)) == (
        "to make: teacher a (there already), student of cpu (3 x 12 epochs); less than a minute on "
        "this machine (from 3 timed steps)"
    )
    assert sentence(there, networks[2:], None).endswith("student of cpu (3 x 12 epochs)")


def test_what_is_told_adds_up(work, log):
    teacher = Network("teacher a", lambda: Pace(60, 2, 2), Work(8, 1, 0), "--teacher-epochs N")
    student = network("student", 2, 60, times=2)
    plan.tell(work, [teacher, student], teachers=[teacher], asked=30)
    # 8 min; 2 x 2 min and 30 answers of 2 s
    assert log() == [
        "to make: teacher a (8 epochs), student (2 x 2 epochs); about 15 min on this machine (from "
        "4 timed steps); shorter: --teacher-epochs N, --epochs N"
    ]


def test_nothing_is_timed_where_nobody_reads_it(work, log, monkeypatch, caplog):
    def refused():
        raise AssertionError

    student = network("student", 2, 60)._replace(pace=refused)
    with caplog.at_level(logging.WARNING, "edgekd"):
        plan.tell(work, [student])
    plan.tell(work, [])
    assert log() == []
    monkeypatch.setenv("WORLD_SIZE", "2")  # each trains a part of a batch
    plan.tell(work, [student])
    assert log() == ["to make: student (2 epochs)"]


def test_a_network_that_cannot_be_trained_is_told_by_its_preflight(work, log):
    def stumbles():
        raise RuntimeError("shape")

    plan.tell(work, [network("student", 2, 60)._replace(pace=stumbles)])
    assert log() == ["to make: student (2 epochs)"]


def test_what_a_teacher_is_asked(work):
    def asked(**settings):
        return plan.questions(work, Training.model_validate(settings), [])

    assert asked(epochs=30) == 8 * 42
    assert asked(epochs=3) == 3 * 42
    assert asked(epochs=30, views=0) == 30 * 42
    assert asked(epochs=30, mixup=0.2, ask_mixed=True) == 30 * 42
    assert asked(epochs=3, masked=1, masked_share=0.25) == 3 * 42 * 1.5 + feature_layers.PASSES
    assert asked(epochs=3, alpha_hard=1) == 0
    assert asked(epochs=3, alpha_hard=1, features=1) == 3 * 42


def test_distill_tells_of_all_that_is_missing(phantoms, tmp_path, paced, monkeypatch):
    def enough(*_, **__):
        raise EdgeKDError("enough")

    monkeypatch.setattr(distill, "asked_teachers", enough)
    words = ["distill", "-d", phantoms, "--size", 32, "--runs", tmp_path, "--shrink-epochs", 2]
    told = run(*words).stderr
    assert paced == ["tf_efficientnet_lite0", "ofa-lite0", "student"]
    (line,) = [x for x in told.splitlines() if x.startswith("to make")]
    assert line.startswith(
        "to make: teacher tf_efficientnet_lite0 from efficientnet-lite0-57934424.pth (8 epochs), "
        "supernet ofa-lite0 from tf_efficientnet_lite0 (2 epochs), search, student of cpu (12 "
        "epochs); about "
    )
    assert line.endswith("; shorter: --student NAME, --shrink-epochs N, --epochs N, "
                         "--teacher-epochs N")  # fmt: skip
    paced.clear()
    told = run(*words, "--no-teacher", "--student", "five-convolutions", "--epochs", 5).stderr
    assert "enough" in told
    assert "to make: student five-convolutions of cpu (5 epochs); about 2 min" in told
    assert paced == ["five-convolutions"]
    assert "to make" not in run(*words, "--quiet").stderr
    assert paced == ["five-convolutions"]


def test_shrink_counts_what_its_teacher_is_asked(phantoms, tmp_path, paced, monkeypatch):
    def enough(*_, **__):
        raise EdgeKDError("enough")

    monkeypatch.setattr("edgekd.pipeline.shrink.asked_teachers", enough)
    words = ["shrink", "-d", phantoms, "--size", 32, "--runs", tmp_path, "--epochs", 2]
    told = run(*words, "--teacher", "test_resnet", "--set", "masked=0", "--batch", 42).stderr
    each = 12 + 42 * pace.RECALIBRATED
    shrinking = 2 * (100 + 2 * each) + 2 * each + 2 * 42  # steps, judgements, two views asked
    teaching = 30 * (10 + 12) + 30  # 42 images are a batch of 32 and less than half of one
    assert minutes(shrinking + teaching) in told


def test_what_is_there_is_not_made(phantoms, tmp_path, paced):
    words = ["-d", phantoms, "--runs", tmp_path, *ONCE]
    first = run("teach", "test_resnet", *words)
    assert "to make: teacher test_resnet from random weights (1 epoch)" in first.stderr
    assert "to make" not in run("teach", "test_resnet", *words).stderr
    assert "to make: teacher" in run("teach", "test_resnet", *words, "--force").stderr
    alone = ["distill", "--student", "ofa-lite-w1.0:min", "--start", "scratch", *words]
    told = run(*alone).stderr
    assert ("to make: teacher test_resnet (there already), student ofa-lite-w1.0:min of cpu (1 "
            "epoch)") in told  # fmt: skip
    assert "to make" not in run(*alone).stderr


@pytest.mark.slow
def test_the_result_is_the_same_whether_it_was_timed_before_or_not(phantoms, tmp_path):
    """For real: the steps draw random numbers, and those of the training are its own."""
    words = ["distill", "-d", phantoms, *ONCE, "--student", "ofa-lite-w1.0:min"]
    made = []
    for name, more in (("told", []), ("quiet", ["--quiet"])):
        root = tmp_path / name
        done = run(*words, "--teacher", "test_resnet", "--teacher-epochs", 1, "--runs", root, *more)
        assert done.exit_code == 0, done.output
        assert ("to make" in done.stderr) == (name == "told")
        made.append(Run.find(root, None, None, untracked).student().sha256)
    assert made[0] == made[1]
