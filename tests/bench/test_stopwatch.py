"""Numbers of times against numbers worked out by hand."""

import itertools

import numpy as np
import pytest

from edgekd.bench import bench, stopwatch


def test_time_ms(clock):
    calls = []

    def call():
        calls.append(None)
        clock[0] += len(calls) * 500_000

    np.testing.assert_array_equal(stopwatch.time_ms(call, warmup=2, runs=3), [1.5, 2, 2.5])


def test_a_worker_computes_on_one_core_at_a_time(monkeypatch):
    """But for the runtime: numpy's own threads would be in the yardstick's way."""
    given = {}
    monkeypatch.setattr(bench.subprocess, "Popen", lambda *_, **kw: given.update(kw))
    bench.Worker(None).errors.close()
    assert stopwatch.QUIET.items() <= given["env"].items()


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
