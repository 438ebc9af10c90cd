"""A supernet searched for a profile: what is kept, what is measured, what a kill costs."""

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.ofa import accuracy_predictor, latency_table, spaces
from edgekd.ofa import nsga2 as evolution
from edgekd.ofa.pareto import Front, Member
from edgekd.pipeline import search
from edgekd.pipeline.shrink import made_supernet
from edgekd.pipeline.workspace import Start, Workspace
from edgekd.records import Arch, Artifact, Budget, EdgeKDError, Profile, Training, untracked
from edgekd.records.options import DataOptions, SearchOptions

SPACE = "ofa-lite-w1.0"
BOX = Profile(name="box", runtime="openvino", device="CPU", precisions=("fp32",), threads=1,
              space=SPACE, resolutions=(32, 40), peak_gflops=100, bandwidth_gbs=10)  # fmt: skip
BRIEF = {"subnets": 20, "generations": 5}


@pytest.fixture(scope="module")
def work(phantoms, tmp_path_factory):
    return Workspace.open(
        tmp_path_factory.mktemp("runs"), DataOptions(data=phantoms), 40, untracked
    )


@pytest.fixture(scope="module")
def supernet(work):
    return made_supernet(work, [BOX], [], Training(epochs=1, batch=16), start=Start(),
                            schedule="sandwich")  # fmt: skip


@pytest.fixture
def judged(monkeypatch):
    """Accuracies by a formula, and how often one was asked for."""
    asked = []

    def judge(arch):
        asked.append(arch)
        width = np.mean([arch.expand[i] + arch.kernel[i] for i in spaces.used(arch)])
        return float(0.5 + 0.03 * width + 0.01 * len(spaces.used(arch)) + arch.resolution / 1000)

    monkeypatch.setattr(search, "judge_of", lambda *_: judge)
    return asked


def found(work, supernet, folder, **more):
    return search.search_one(
        work, BOX, supernet, folder, SearchOptions(**BRIEF | {"estimate": True} | more)
    )


def sought_again(work, supernet, folder):
    """The same search, in which the fastest will do."""
    brief = SearchOptions(**BRIEF, measure=2, give_up=100)
    return search.search_one(work, BOX, supernet, folder, brief)


def alone(supernet, folder):
    """The supernet in a folder of its own: nothing of it is evaluated yet."""
    folder.mkdir()
    for name in ("artifact.json", *supernet.files):
        shutil.copy(supernet.folder / name, folder / name)
    return Artifact.load(folder)


def test_a_search_is_kept_and_not_made_again(work, supernet, judged, tmp_path, monkeypatch):
    mine = alone(supernet, tmp_path / "supernet")
    front, sought = found(work, mine, tmp_path)
    assert sought.estimated
    assert sought.measured == ()
    assert sought.chosen == spaces.title(front.winner.arch)
    assert len(judged) == len(set(judged)) >= 20
    assert (tmp_path / "search" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert accuracy_predictor.AccuracyPredictor.load(tmp_path / "search" / "predictor")
    with monkeypatch.context() as closed:
        closed.setattr(evolution, "explore", None)
        assert found(work, mine, tmp_path) == (front, sought)
    # The next profile learns from what was evaluated for this one.
    judged.clear()
    other = BOX.model_copy(update={"budget": Budget(latency_ms=0.65)})
    search.search_one(work, other, mine, tmp_path / "other", SearchOptions(**BRIEF, estimate=True))
    assert len(judged) < 20
    monkeypatch.setattr(evolution, "explore", None)
    # What may be given up only chooses anew, from the same front.
    now = found(work, mine, tmp_path, give_up=2)
    assert now[0] == front
    best = front.members[-1].accuracy
    fastest = next(m for m in front.members if m.accuracy >= best - 0.02)
    assert now[1].chosen == spaces.title(fastest.arch) != sought.chosen
    assert found(work, mine, tmp_path, give_up=2) == now
    assert found(work, mine, tmp_path)[1].chosen == sought.chosen
    with pytest.raises(TypeError):  # another question is another search
        found(work, mine, tmp_path, subnets=21)


def test_killed_and_run_again_it_finds_the_same(work, supernet, judged, tmp_path, monkeypatch):
    whole = found(work, alone(supernet, tmp_path / "a"), tmp_path / "whole")
    mine, judge = alone(supernet, tmp_path / "b"), search.judge_of()
    left = [7, 13, 9]

    def dying(arch):
        if left and not left[0]:
            del left[0]
            raise KeyboardInterrupt
        if left:
            left[0] -= 1
        return judge(arch)

    monkeypatch.setattr(search, "judge_of", lambda *_: dying)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            found(work, mine, tmp_path / "cut")
        with (mine.folder / search.EVALUATED).open("a") as f:
            f.write('{"arch": {"spa')  # torn
        assert not (tmp_path / "cut" / "search" / "sought.json").exists()
    again = found(work, mine, tmp_path / "cut")
    assert again[0].members == whole[0].members
    assert again[1].chosen == whole[1].chosen
    assert again[1].ranking == whole[1].ranking


@pytest.mark.slow
def test_the_front_is_measured_on_the_device_as_deployed(work, supernet, tmp_path, monkeypatch):
    made = latency_table.estimate(BOX, "fp32", classes=3).model_copy(update={"estimated": False})
    monkeypatch.setattr(latency_table, "find", lambda *_: made)
    monkeypatch.setattr(search, "SECONDS", 0.05)
    front, sought = search.search_one(
        work, BOX, supernet, tmp_path, SearchOptions(**BRIEF, measure=2)
    )
    assert not sought.estimated
    assert {m.predicted for m in sought.measured} >= {front.members[0], front.members[-1]}
    assert sought.chosen in [m.name for m in sought.measured]
    assert sought.machine is not None
    judge = search.judge_of(work, supernet)
    for m in sought.measured:
        assert 0 < m.p50_ms <= m.p95_ms
        assert m.peak_mb > 1
        assert m.accuracy == judge(m.predicted.arch)
    # Another choice stands beside the same times; where it was not measured, it is added.
    monkeypatch.setattr(evolution, "explore", None)
    again = search.search_one(
        work, BOX, supernet, tmp_path, SearchOptions(**BRIEF, measure=2, give_up=100)
    )[1]
    assert again.measured == sought.measured
    assert again.chosen == spaces.title(front.members[0].arch)
    fewer = sought.model_copy(update={"measured": sought.measured[1:]}).save(tmp_path / "search")
    added = search.search_one(
        work, BOX, supernet, tmp_path, SearchOptions(**BRIEF, measure=2, give_up=100)
    )[1]
    assert added.measured[:-1] == fewer.measured
    assert added.chosen == added.measured[-1].name == spaces.title(front.members[0].arch)
    # Times of another kind of machine are no such company.
    fewer.model_copy(update={"machine": sought.machine.model_copy(update={"cpu": "another"})}).save(
        tmp_path / "search"
    )
    with pytest.raises(TypeError):
        search.search_one(
            work, BOX, supernet, tmp_path, SearchOptions(**BRIEF, measure=2, give_up=100)
        )


def test_a_device_that_is_not_here_is_not_measured(work, supernet, tmp_path, monkeypatch):
    """Its latency table came from it, exported."""
    made = latency_table.estimate(BOX, "fp32", classes=3).model_copy(update={"estimated": False})
    monkeypatch.setattr(latency_table, "find", lambda *_: made)
    npu = BOX.model_copy(update={"device": "NPU"})
    _, sought = search.search_one(work, npu, supernet, tmp_path, SearchOptions(**BRIEF, measure=2))
    assert (sought.measured, sought.machine, sought.estimated) == ((), None, False)


def member(ms, accuracy):
    return Member(arch=spaces.uniform(SPACE, "min", 32), accuracy=accuracy, p50_ms=ms, p95_ms=ms,
                  params=1, size_bytes=1)  # fmt: skip


def test_the_fastest_that_gives_up_no_more_than_it_may():
    front = [member(1, 0.90), member(2, 0.93), member(3, 0.95), member(4, 0.96)]
    assert search.fastest_within(front, 0.03).p95_ms == 2
    assert search.fastest_within(front, 0.0).p95_ms == 4
    assert search.fastest_within(front, 1.0).p95_ms == 1


def test_the_choice_keeps_the_budget_when_it_is_measured():
    front = [member(1, 0.90), member(2, 0.93), member(3, 0.95), member(4, 0.96)]
    truth = {1: (1.1, 50), 2: (2.2, 50), 3: (3.6, 70), 4: (4.9, 60)}  # p95 ms, MB
    asked = []

    def settled(slack, measured=(), **budget):
        asked.clear()
        found = []

        def measure(members):
            asked.extend(m.p95_ms for m in members)
            found.extend(
                search.Measured(name="x", predicted=m, p50_ms=1, p95_ms=truth[m.p95_ms][0],
                              peak_mb=truth[m.p95_ms][1], accuracy=m.accuracy)
                for m in members
            )  # fmt: skip

        measure([front[i] for i in measured])
        asked.clear()
        return search.settled(front, slack, Budget(**budget), found, measure).p95_ms

    assert settled(0.03, measured=(1, 3)) == 2
    assert asked == []
    assert settled(0, latency_ms=4.5) == 3  # 4 was measured at 4.9, 3 at 3.6
    assert asked == [4, 3]
    assert settled(0, measured=(3,), latency_ms=3.5) == 2
    assert asked == [3, 2]
    assert settled(0.01, measured=(2,), memory_mb=65) == 4
    with pytest.raises(EdgeKDError, match=r"p95 of 1\.1 ms.*over the budget's latency_ms 1"):
        settled(0, measured=(0, 3), latency_ms=1)
    with pytest.raises(EdgeKDError, match=r"takes 50 MB: over the budget's memory_mb 40"):
        settled(0, measured=(0, 3), memory_mb=40)


def test_resolutions_of_the_profile_that_were_trained(supernet):
    def at(*resolutions):
        return search.allowed(BOX.model_copy(update={"resolutions": resolutions}), supernet)

    assert at(40, 32, 64) == [32, 40]
    assert at(40) == [40]
    with pytest.raises(EdgeKDError, match=r"trained at \[32, 40\] px, profile box allows \[64\]"):
        at(64)


def test_a_prior_is_refused_where_it_says_nothing(work, supernet, tmp_path):
    with pytest.raises(EdgeKDError, match=r"of ofa-mbv3-w1\.2, the sub-nets are of ofa-lite"):
        found(work, supernet, tmp_path, prior=tmp_path / "acc_predictor.pth")
    other = supernet.model_copy(update={"model": "ofa-mbv3-w1.2"})
    with pytest.raises(EdgeKDError, match="is not there"):
        found(work, other, tmp_path, prior=tmp_path / "acc_predictor.pth")


def test_a_budget_that_nothing_meets_names_the_fastest(work, supernet, judged, tmp_path):
    tight = BOX.model_copy(update={"budget": Budget(latency_ms=0.001)})
    mine = alone(supernet, tmp_path / "supernet")
    with pytest.raises(EdgeKDError, match=r"latency_ms"):
        search.search_one(work, tight, mine, tmp_path, SearchOptions(**BRIEF, estimate=True))
    assert judged == []
    assert not (tmp_path / "search" / "sought.json").exists()


def test_the_command_says_what_is_missing(phantoms, tmp_path):
    def error(*more):
        at = ["search", "--data", str(phantoms), "--size", "32", "--runs", str(tmp_path)]
        result = CliRunner().invoke(app, [*at, *more])
        assert result.exit_code == 1
        return result.stderr

    assert "run edgekd shrink first" in error("-p", "cpu")
    assert "give one --profile" in error("-p", "cpu", "-p", "jetson", "--run", str(tmp_path / "a"))


def test_landmarks_are_the_ends_and_what_was_published():
    ends = search._landmarks(SPACE, [96, 128])
    assert list(ends) == [f"{SPACE} {e}" for e in ("min", "mid", "max")]
    assert all(isinstance(a, Arch) and a.resolution == 128 for a in ends.values())
    assert "flops@595M" in search._landmarks("ofa-mbv3-w1.2", [224, 236])


def test_fronts_can_be_read_back(work, supernet, judged, tmp_path):
    front, sought = found(work, alone(supernet, tmp_path / "s"), tmp_path)
    assert Front.load(tmp_path / "search") == front
    assert search.chosen_of(front, sought) in front.members
