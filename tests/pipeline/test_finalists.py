"""Finalists: distilled alike, compared as distilled, the fastest as good is the run's student."""

import pytest
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.ofa import spaces
from edgekd.ofa.pareto import Front, Member
from edgekd.pipeline import finalists
from edgekd.pipeline.finalists import Finals
from edgekd.pipeline.folders import RunRecord
from edgekd.pipeline.search import Sought
from edgekd.pipeline.shrink import made_supernet
from edgekd.pipeline.workspace import Start, Workspace
from edgekd.records import Artifact, EdgeKDError, Metric, Profile, Training, untracked
from edgekd.records.options import DataOptions

SPACE = "ofa-lite-w1.0"
BOX = """name = "box"
runtime = "openvino"
device = "CPU"
precisions = ["fp32"]
space = "ofa-lite-w1.0"
resolutions = [32]
peak_gflops = 100
bandwidth_gbs = 10
"""


@pytest.fixture(scope="module")
def searched(phantoms, tmp_path_factory):
    """(root of runs, arguments of distilling in it), a supernet shrunk."""
    root = tmp_path_factory.mktemp("runs")
    profile = root / "box.toml"
    profile.write_text(BOX)
    work = Workspace.open(root, DataOptions(data=phantoms), 32, untracked)
    made_supernet(work, [Profile.read(str(profile))], [], Training(epochs=1, batch=16),
                     start=Start(), schedule="sandwich")  # fmt: skip
    return root, [
        "distill", "-p", profile, "--data", phantoms, "--runs", root, "--no-teacher",
        "--size", 32, "--epochs", 1, "--batch", 16, "--subnets", 20, "--estimate",
    ]  # fmt: skip


def told(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


def members(*ms):
    arch = spaces.uniform(SPACE, "min", 32)
    return [Member(arch=arch, accuracy=0.5, p50_ms=x, p95_ms=x, params=1, size_bytes=1)
            for x in ms]  # fmt: skip


def test_finalists_are_even_in_latency_with_both_ends():
    front = members(1.0, 1.1, 1.2, 1.3, 2.1, 3.0)
    assert [m.p50_ms for m in finalists.evenly(front, 3)] == [1.0, 2.1, 3.0]
    assert [m.p50_ms for m in finalists.evenly(front, 2)] == [1.0, 3.0]
    assert finalists.evenly(front[:1], 3) == front[:1]
    assert finalists.evenly(front, 60) == front


def test_the_student_is_the_fastest_finalist_that_is_as_good(searched):
    root, distil = searched
    run = root / "three"
    done = told(*distil, "--run", run, "--finalists", 3, "--give-up", 100)
    front, compared = Front.load(run / "search"), Finals.load(run / "search")
    names = [f.name for f in compared.finalists]
    assert 2 <= len(names) <= 3
    assert [f.p50_ms for f in compared.finalists] == sorted(f.p50_ms for f in compared.finalists)
    for f in compared.finalists:
        made = Artifact.load(run / "finalists" / f.name / "student")
        assert f.accuracy == made.metrics["val_balanced_accuracy"].value
        assert f"finalist {f.name}" in done.stderr
    # Whatever may be given up, the fastest is as good.
    assert compared.chosen == names[0] == spaces.title(front.members[0].arch)
    student = Artifact.load(run / "student")
    assert student.sha256 == compared.finalists[0].student
    assert RunRecord.load(run).seed == 0
    # A second time nothing is trained.
    before = (run / "student" / "model.safetensors").stat().st_mtime_ns
    told(*distil, "--run", run, "--finalists", 3, "--give-up", 100)
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == before
    # Giving up less chooses anew from what is known, and back again.
    weights = sorted(run.glob("finalists/*/student/model.safetensors"))
    kept = [p.stat().st_mtime_ns for p in weights]
    told(*distil, "--run", run, "--finalists", 3, "--give-up", 0)
    now = Finals.load(run / "search")
    best = max(f.accuracy for f in compared.finalists)
    assert now.finalists == compared.finalists
    assert now.chosen == next(f.name for f in now.finalists if f.accuracy == best)
    assert Artifact.load(run / "student").model == now.chosen
    told(*distil, "--run", run, "--finalists", 3, "--give-up", 100)
    assert Artifact.load(run / "student").sha256 == student.sha256
    assert [p.stat().st_mtime_ns for p in weights] == kept
    # Another count compares anew, which would replace the student.
    refused = told(*distil, "--run", run, "--finalists", 2, "--give-up", 100, code=1)
    assert "--force replaces it" in refused.output


def test_a_search_that_was_settled_settles_other_seeds(searched):
    root, distil = searched
    first = root / "first"
    told(*distil, "--run", first, "--finalists", 2)
    second = root / "second"
    second.mkdir()
    (second / "search").symlink_to(first / "search")
    told(*distil, "--run", second, "--finalists", 2, "--seed", 1)
    assert not (second / "finalists").exists()
    assert Artifact.load(second / "student").model == Finals.load(first / "search").chosen
    assert Artifact.load(second / "student").seed == 1


@pytest.mark.parametrize(("slack", "place"), [(0.0, 2), (0.005, 2), (0.011, 1), (0.2, 0)])
def test_what_may_be_given_up_is_of_accuracy_as_distilled(tmp_path, slack, place):
    accuracies = iter([0.80, 0.89, 0.90])
    front = Front.model_construct(members=tuple(
        m.model_copy(update={"arch": spaces.uniform(SPACE, end, 32)})
        for m, end in zip(members(1.0, 2.0, 3.0), ("min", "mid", "max"), strict=True)
    ))  # fmt: skip
    names = [spaces.title(m.arch) for m in front.members]
    sought = Sought.model_construct(chosen=names[2])
    for name in ("search/search.json", "student/checkpoint"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("one that was stopped")

    def distil(name, arch, folder):
        (folder / "student").mkdir(parents=True)
        (folder / "student" / "model").write_text(name)
        return Artifact.model_construct(
            files={"model": "0"}, metrics={"val_balanced_accuracy": Metric(value=next(accuracies))}
        )

    now, compared = finalists.settle(front, sought, tmp_path, distil, count=3, slack=slack)
    assert now.chosen == compared.chosen == names[place]
    assert [p.name for p in (tmp_path / "student").iterdir()] == ["model"]
    assert (tmp_path / "student" / "model").read_text() == names[place]


def test_finalists_are_of_a_search(searched):
    _, distil = searched
    refused = told(*distil, "--finalists", 2, "--student", "resnet18", code=1)
    assert "student resnet18 is none" in refused.output


def test_one_process_compares(searched, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    front = Front.model_construct(members=tuple(members(1.0)))
    monkeypatch.setattr(finalists, "sha256", lambda path: "0" * 64)
    with pytest.raises(EdgeKDError, match="comparing finalists runs in one process"):
        finalists.settle(front, Sought.model_construct(chosen=""), tmp_path, None, count=2,
                      slack=0)  # fmt: skip
