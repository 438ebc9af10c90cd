"""Numbers of times against numbers worked out by hand."""

import itertools

import numpy as np
import pytest

from edgekd import bench, stopwatch


def test_time_ms(clock):
    calls = []

    def call():
        calls.append(None)
        clock[0] += len(calls) * 500_000

    np.testing.assert_array_equal(stopwatch.time_ms(call, warmup=2, runs=3), [1.5, 2, 2.5])


def test_percentiles_by_hand():
    assert stopwatch.percentiles(range(1, 102)) == {"p50": 51, "p90": 91, "p95": 96, "p99": 100}
    assert stopwatch.percentiles([1, 2])["p90"] == pytest.approx(1.9)


def test_interval():
    x = np.random.default_rng(0).normal(10, 1, 400)
    low, high = stopwatch.interval(x, 50)
    assert low < np.median(x) < high
    # 1.25 sd / sqrt(n) is the standard error of a normal sample's median
    assert (high - low) / 2 == pytest.approx(1.96 * 1.25 / 20, rel=0.3)
    assert stopwatch.interval(x, 50) == (low, high) != stopwatch.interval(x, 50, seed=1)
    assert stopwatch.interval([3.0] * 7, 95) == (3, 3)


def test_interval_knows_slow_moments():
    """The same samples, once in any order and once the slow ones together."""
    x = np.repeat([1.0, 2.0], 200) + np.random.default_rng(0).normal(0, 0.01, 400)
    mixed = stopwatch.interval(np.random.default_rng(1).permutation(x), 40)
    together = stopwatch.interval(x, 40)
    assert together[1] - together[0] > 3 * (mixed[1] - mixed[0])


def test_a_worker_computes_on_one_core_at_a_time(monkeypatch):
    """But for the runtime: numpy's own threads would be in the yardstick's way."""
    given = {}
    monkeypatch.setattr(bench.subprocess, "Popen", lambda *_, **kw: given.update(kw))
    bench.Worker(None).errors.close()
    assert stopwatch.QUIET.items() <= given["env"].items()


def test_unstable():
    assert stopwatch.unstable([2, 3, 4]) == pytest.approx(2 / 3)
    assert stopwatch.unstable([5.0]) == 0
    turns = [1.0, 1.4] * 8 + [1.0, 1.5] * 4  # of 24, three are a block
    assert stopwatch.blocks(turns).tolist() == [1.0, 1.4, 1.0, 1.4, 1.0, 1.4, 1.0, 1.5]
    assert stopwatch.unstable([1, 9, 1] * 8) == 0


def test_a_percentile_is_claimed_when_enough_samples_bear_it():
    """The counts are those of MLPerf's rules."""
    for count, missing in ((63, "p90 p95 p99"), (64, "p95 p99"), (130, "p99"), (662, "")):
        found = stopwatch.claimed(np.arange(count))
        assert [k for k, v in found.items() if v is None] == missing.split()
    assert found["p50"] == 330.5
    assert set(stopwatch.claimed([]).values()) == {None}


@pytest.mark.parametrize(("times_ms", "calls"), [([5] * 400, 20), ([9] * 10 + [5] * 400, 30)])
def test_settle_ends_when_two_windows_agree(clock, monkeypatch, times_ms, calls):
    left = iter(times_ms)
    seen = []

    def call():
        seen.append(next(left))
        clock[0] += seen[-1] * 1_000_000

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0] / 1e9)
    found = stopwatch.settle(call)
    assert found.tolist() == [5] * 10
    assert len(seen) == calls


def test_settle_gives_up(clock, monkeypatch):
    """Ever slower: it ends after its seconds, and says what it saw last."""

    def call():
        clock[0] = int(clock[0] * 1.1) + 10_000_000

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0] / 1e9)
    assert stopwatch.settle(call, seconds=3).min() > 100


def test_ratio_is_of_neighbouring_turns():
    """A machine that doubles its pace halfway doubles both."""
    assert stopwatch.ratio([2, 2, 4], [1, 1, 2]) == 2
    assert stopwatch.ratio([2, 2, 4], [1, 2, 2]) == 2
    assert np.median([2, 2, 4]) / np.median([1, 2, 2]) == 1  # so a ratio of medians would have it


def test_a_ratio_of_rounds_and_its_interval():
    rng = np.random.default_rng(0)
    others = [rng.normal(10, 0.1, 8) for _ in range(5)]
    rounds = [1.5 * x * rng.normal(1, 0.01, 8) for x in others]
    times, low, high = stopwatch.ratio_interval(rounds, others)
    assert low < times < high
    assert times == pytest.approx(1.5, abs=0.02)
    assert 0.002 < high - low < 0.05
    same = stopwatch.ratio_interval([[3.0] * 8] * 2, [[2.0] * 8] * 2)
    assert same == (1.5, 1.5, 1.5)


def test_the_interval_knows_that_processes_differ():
    """Turns that agree within each process say little if the processes do not."""
    flat = [[1.0] * 8, [1.1] * 8, [0.9] * 8]
    times, low, high = stopwatch.ratio_interval(flat, [[1.0] * 8] * 3)
    assert (times, low, high) == (1.0, 0.9, 1.1)


def test_the_yardstick_is_of_all_cores_at_once(monkeypatch):
    """As often as it is asked, in as many threads."""
    at_once = []

    class Pool(stopwatch.ThreadPoolExecutor):
        def map(self, work, items):
            at_once.append(len(items))
            return super().map(work, items)

    monkeypatch.setattr(stopwatch, "ThreadPoolExecutor", Pool)
    assert stopwatch.yardstick(2, runs=3) > 0
    assert at_once == [2] * 12 * 5  # two of them untimed


def test_the_yardstick_hands_on_what_it_computes(monkeypatch):
    """Every product but the first is of what another core wrote the step before."""
    made = []  # (what was written, of what)
    matmul = np.matmul

    def spy(a, b, out):
        made.append((id(out), id(a)))
        return matmul(a, b, out=out)

    monkeypatch.setattr(stopwatch.np, "matmul", spy)
    stopwatch.yardstick(3, runs=1)
    steps = [dict(made[i : i + 3]) for i in range(0, len(made), 3)]
    assert len(steps) == 12 * 3
    for before, now in itertools.pairwise(steps):
        assert set(now.values()) == set(before)
        assert all(before[read] != written for written, read in now.items())
