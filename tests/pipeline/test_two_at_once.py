"""Two commands on the same runs at once: each finds what it would have found alone."""

import itertools
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from edgekd.data import phantom
from edgekd.ofa import accuracy_predictor, calibrate, latency_table, spaces
from edgekd.pipeline import distill, folders, search, teach
from edgekd.pipeline.run import Run
from edgekd.records import Artifact, Profile, make_folder, untracked
from edgekd.records.options import (
    DataOptions,
    RunOptions,
    StudentOptions,
    TeacherOptions,
    TrainOptions,
)
from edgekd.train import distill as training_loop

STAGES = {  # of a run: (module of the pipeline, what it is asked)
    "quantize": ("quantize.quantize", ()),
    "export": ("export.export", ("onnx",)),
    "verify": ("verify.verify", ()),
    "bench": ("bench.bench", ()),
    "compare": ("bench.bench_against", ("onnxruntime",)),
    "explain": ("explain.judge", ()),
    "report": ("report.report", ()),
    "bundle": ("bundle.bundle", ()),
}
PAIRS = list(itertools.combinations_with_replacement(STAGES, 2))


def at_once(*calls):
    """Every call in a thread of its own: a lock keeps threads apart as it does processes."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def at_work(monkeypatch):
    """The most stages that were at work at once."""
    inside, most, turn = [0], [0], threading.Lock()

    def working(*args, **named):
        with turn:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        with turn:
            inside[0] -= 1

    for place, _ in STAGES.values():
        monkeypatch.setattr(f"edgekd.pipeline.{place}", working)
    monkeypatch.setattr("edgekd.pipeline.bench.bench_page", lambda *args: None)
    monkeypatch.setattr(
        folders, "exports", lambda folder: [Artifact.model_construct(folder=folder)]
    )
    return most


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_stages_of_a_run_take_turns(tmp_path, at_work, pair):
    def called(stage):
        record = folders.RunRecord.model_construct()
        getattr(Run(tmp_path, tmp_path / "cpu", record, "", untracked), stage)(*STAGES[stage][1])

    at_once(*[lambda stage=stage: called(stage) for stage in pair])
    assert at_work == [1]


def distilled(runs, phantoms, run):
    """One student of a teacher, both made where they are not there."""
    distill.distill(
        data=DataOptions(data=phantoms, size=32),
        teacher=TeacherOptions(teacher=("test_resnet",), teacher_epochs=1),
        student=StudentOptions(student="five-convolutions"),
        train=TrainOptions(epochs=1, settings=("views=1",)),
        output=RunOptions(runs=runs, run=run),
    )


def in_processes(*calls):
    """Every (function, arguments) in a process of its own, all at once."""
    spawn = multiprocessing.get_context("spawn")  # a fork trains no more once this process has
    made = [spawn.Process(target=function, args=args) for function, *args in calls]
    for process in made:
        process.start()
    for process in made:
        process.join(300)
    assert [process.exitcode for process in made] == [0] * len(made)


@pytest.mark.slow
def test_two_commands_that_need_the_same_teacher_teach_it_once(tmp_path, phantoms):
    runs = tmp_path / "runs"
    in_processes(*[(distilled, runs, phantoms, runs / name) for name in ("a", "b")])
    assert len(list(runs.glob("shared/*/teacher-*"))) == 1
    assert len(list(runs.glob("shared/*/targets-*"))) == 1
    assert weights(runs / "a") == weights(runs / "b")
    log = next(runs.glob("shared/*/teacher-*/log.jsonl")).read_text()
    assert len(log.splitlines()) == 1


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def test_a_teacher_that_was_made_meanwhile_is_taken(tmp_path, phantoms, monkeypatch):
    made, trained = [], training_loop.teach

    def slow(*args, **named):
        time.sleep(0.2)
        made.append(1)
        return trained(*args, **named)

    monkeypatch.setattr(training_loop, "teach", slow)
    asked = {"data": DataOptions(data=phantoms, size=32), "train": TrainOptions(epochs=1),
             "output": RunOptions(runs=tmp_path)}  # fmt: skip
    found = []
    at_once(*[lambda: found.append(teach.teach("test_resnet", **asked))] * 2)
    assert made == [1]
    assert found[0].sha256 == found[1].sha256


def test_two_searches_evaluate_a_sub_net_once(tmp_path):
    archs = [spaces.uniform("ofa-lite-w1.0", end, 64) for end in ("min", "mid", "max")]
    judged, found = [], []

    def judge(arch):
        judged.append(arch)
        time.sleep(0.05)
        return 0.5 + 0.1 * len(judged)

    def searched():
        found.append(accuracy_predictor.judge_all(archs, judge, tmp_path / "evaluated.jsonl"))

    at_once(searched, searched)
    assert len(judged) == 3
    assert found[0] == found[1]


def test_two_that_measure_a_machine_do_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def slow(profile, precision, out, **asked):
        made.append(make_folder(out))
        time.sleep(0.1)
        return latency_table.estimate(profile, precision, classes=3).save(out)

    monkeypatch.setattr(calibrate, "calibrate", slow)
    profile = Profile.read("cpu")
    at_once(*[lambda: search.calibrated(profile, profile.precisions[0], classes=3)] * 2)
    assert len(made) == 1


def test_phantoms_are_drawn_once(tmp_path, monkeypatch):
    drawn, film = [], phantom.film

    def counted(*args, **named):
        drawn.append(args)
        return film(*args, **named)

    monkeypatch.setattr(phantom, "film", counted)
    at_once(*[lambda: phantom.make(tmp_path / "p", per_class=3, size=32)] * 3)
    assert len(drawn) == 9
