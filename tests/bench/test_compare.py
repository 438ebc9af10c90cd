"""A slower file is caught, an equal one is not, and what cannot be compared is refused."""

import numpy as np
import pytest
from report.test_page import MACHINE

from edgekd.bench import compare
from edgekd.bench.bench import How, Runner
from edgekd.bench.stopwatch import YARDSTICK
from edgekd.records import EdgeKDError, Timing
from edgekd.runtimes import machine


def timing(blocks_ms, yardstick_ms=None, **more):
    blocks = [float(x) for x in blocks_ms]
    return Timing(
        model="m", role="student", precision="int8", artifact_sha256="0", runtime="openvino",
        device="CPU", threads=2, samples_ms=tuple(blocks), block_medians_ms=tuple(blocks),
        yardstick_ms=tuple(yardstick_ms or [1.0] * len(blocks)), warmup=5, load_ms=1,
        throughput_ips=1, throughput_batch=1, params=1, macs=1, size_bytes=1, peak_mb=1,
        on_device=True, yardstick_threads=machine.cores(), yardstick=YARDSTICK,
        **({"machine": machine.this()} | more),
    )  # fmt: skip


@pytest.fixture
def rounds(monkeypatch):
    """What `bench.in_rounds` gives."""
    made = []
    monkeypatch.setattr(compare.bench, "in_rounds", lambda *_, **__: made)
    return made


@pytest.fixture
def measured(monkeypatch):
    """Gives `bench.measure` a round after the other, and tells how many were taken."""
    taken = []

    def give(*each):
        def measure(runners, how, *, seed, track):
            taken.append(seed)
            return [x[seed] for x in each]

        monkeypatch.setattr(compare.bench, "measure", measure)
        return taken

    return give


RUNNER = Runner(None, None, on_device=True)


def paced(times, pace=(1, 1.5, 1, 1.5), seed=0):
    """Rounds of blocks of a machine with two paces; `times` as long as 2 ms, 2 % noise."""
    rng = np.random.default_rng(seed)
    return [timing(2 * times * np.repeat(p, 8) * rng.normal(1, 0.02, 8)) for p in pace]


@pytest.mark.parametrize(
    ("times", "state"), [(1.0, "pass"), (0.6, "pass"), (1.2, "fail"), (2.0, "fail")]
)
def test_in_turns(rounds, times, state):
    rounds += [paced(times, seed=1), paced(1.0, seed=2)]
    found = compare.other_file(RUNNER, RUNNER, How())
    assert found.state == state
    assert found.low < found.times < found.high
    assert found.times == pytest.approx(times, rel=0.03)
    assert (found.how, found.tolerance, found.rounds) == ("turns", 5, 4)
    assert len(found.own.samples_ms) == 32


def test_as_much_slower_as_is_allowed_is_not_decided(rounds):
    rounds += [paced(1.05, seed=1), paced(1.0, seed=2)]
    found = compare.other_file(RUNNER, RUNNER, How())
    assert found.state == "inconclusive"
    assert "--rounds" in found.reason
    more = compare.other_file(RUNNER, RUNNER, How(), tolerance=20)
    assert more.state == "pass"


def test_rounds_are_added_until_they_decide(measured):
    """In two of the first rounds the machine made the slow build look like the other."""
    slow, odd = paced(1.5, pace=[1] * 15, seed=1), paced(1.03, pace=[1] * 15, seed=3)
    taken = measured(odd[:2] + slow[2:], paced(1.0, pace=[1] * 15, seed=2))
    found = compare.other_file(RUNNER, RUNNER, How(), rounds=3)
    assert found.state == "fail"
    assert taken == list(range(found.rounds))
    assert 3 < found.rounds < 9
    assert len(found.own.samples_ms) == len(found.other.samples_ms) == 8 * found.rounds


@pytest.mark.parametrize(("times", "count"), [(1.0, 3), (1.5, 3), (1.05, 15)])
def test_no_more_rounds_than_it_takes(measured, times, count):
    taken = measured(paced(times, pace=[1] * 15, seed=1), paced(1.0, pace=[1] * 15, seed=2))
    found = compare.other_file(RUNNER, RUNNER, How(), rounds=3)
    assert len(taken) == found.rounds == count
    assert found.state == {1.0: "pass", 1.5: "fail", 1.05: "inconclusive"}[times]


def test_no_rounds_are_added_beside_another_day(measured):
    """The machine had another pace then than its yardstick told: rounds of now would be sure of
    what is wrong.
    """
    now = [timing(t.block_medians_ms) for t in paced(1.2, pace=[1] * 9)]
    taken = measured(now)
    before = timing(np.repeat([2.0, 2.4], [5, 3]))
    found = compare.record(RUNNER, before, How(), rounds=2)
    assert (found.state, len(taken)) == ("inconclusive", 2)


@pytest.mark.parametrize(("times", "state"), [(1.0, "pass"), (1.6, "fail")])
def test_beside_another_day(rounds, times, state):
    """Today the machine is at half its pace: the yardstick tells."""
    now = [timing([2 * times * 2 * x for x in t.block_medians_ms], [2.0] * 8)
           for t in paced(1.0, pace=(1, 1, 1))]  # fmt: skip
    rounds.append(now)
    before = timing(np.full(8, 4.0), [1.0] * 8)
    found = compare.record(RUNNER, before, How())
    assert found.state == state
    assert found.times == pytest.approx(times, rel=0.03)
    assert (found.how, found.tolerance) == ("record", 10)


def test_another_machine_is_no_regression(rounds):
    other = machine.this().model_copy(update={"isa": ("avx9",)})  # of the same name and cores
    for theirs in (MACHINE, other):
        with pytest.raises(EdgeKDError, match="times of two machines"):
            compare.record(RUNNER, timing([1.0], machine=theirs), How())
    for update in (
        {"yardstick_ms": ()}, {"yardstick_threads": None}, {"yardstick_threads": 99},
        {"yardstick": None}, {"yardstick": YARDSTICK - 1},
    ):  # fmt: skip
        old = timing([1.0]).model_copy(update=update)
        with pytest.raises(EdgeKDError, match="does not tell the machine's pace as"):
            compare.record(RUNNER, old, How())


def test_it_is_kept(rounds, tmp_path):
    rounds += [paced(1.0, seed=1), paced(1.0, seed=2)]
    found = compare.other_file(RUNNER, RUNNER, How()).save(tmp_path)
    assert compare.Against.load(tmp_path) == found
