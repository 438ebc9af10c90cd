"""Percentiles, intervals and ratios of times against numbers worked out by hand."""

import numpy as np
import pytest

from edgekd.metrics import latency


def test_percentiles_by_hand():
    assert latency.percentiles(range(1, 102)) == {"p50": 51, "p90": 91, "p95": 96, "p99": 100}
    assert latency.percentiles([1, 2])["p90"] == pytest.approx(1.9)


def test_interval():
    x = np.random.default_rng(0).normal(10, 1, 400)
    low, high = latency.interval(x, 50)
    assert low < np.median(x) < high
    # 1.25 sd / sqrt(n) is the standard error of a normal sample's median
    assert (high - low) / 2 == pytest.approx(1.96 * 1.25 / 20, rel=0.3)
    assert latency.interval(x, 50) == (low, high) != latency.interval(x, 50, seed=1)
    assert latency.interval([3.0] * 7, 95) == (3, 3)


def test_interval_knows_slow_moments():
    """The same samples, once in any order and once the slow ones together."""
    x = np.repeat([1.0, 2.0], 200) + np.random.default_rng(0).normal(0, 0.01, 400)
    mixed = latency.interval(np.random.default_rng(1).permutation(x), 40)
    together = latency.interval(x, 40)
    assert together[1] - together[0] > 3 * (mixed[1] - mixed[0])


def test_unstable():
    assert latency.unstable([2, 3, 4]) == pytest.approx(2 / 3)
    assert latency.unstable([5.0]) == 0
    turns = [1.0, 1.4] * 8 + [1.0, 1.5] * 4  # of 24, three are a block
    assert latency.blocks(turns).tolist() == [1.0, 1.4, 1.0, 1.4, 1.0, 1.4, 1.0, 1.5]
    assert latency.unstable([1, 9, 1] * 8) == 0


def test_a_percentile_is_claimed_when_enough_samples_bear_it():
    """The counts are those of MLPerf's rules."""
    for count, missing in ((63, "p90 p95 p99"), (64, "p95 p99"), (130, "p99"), (662, "")):
        found = latency.claimed(np.arange(count))
        assert [k for k, v in found.items() if v is None] == missing.split()
    assert found["p50"] == 330.5
    assert set(latency.claimed([]).values()) == {None}


def test_ratio_is_of_neighbouring_turns():
    """A machine that doubles its pace halfway doubles both."""
    assert latency.ratio([2, 2, 4], [1, 1, 2]) == 2
    assert latency.ratio([2, 2, 4], [1, 2, 2]) == 2
    assert np.median([2, 2, 4]) / np.median([1, 2, 2]) == 1  # so a ratio of medians would have it


def test_a_ratio_of_rounds_and_its_interval():
    rng = np.random.default_rng(0)
    others = [rng.normal(10, 0.1, 8) for _ in range(5)]
    rounds = [1.5 * x * rng.normal(1, 0.01, 8) for x in others]
    times, low, high = latency.ratio_interval(rounds, others)
    assert low < times < high
    assert times == pytest.approx(1.5, abs=0.02)
    assert 0.002 < high - low < 0.05
    same = latency.ratio_interval([[3.0] * 8] * 2, [[2.0] * 8] * 2)
    assert same == (1.5, 1.5, 1.5)


def test_the_interval_knows_that_processes_differ():
    """Turns that agree within each process say little if the processes do not."""
    flat = [[1.0] * 8, [1.1] * 8, [0.9] * 8]
    times, low, high = latency.ratio_interval(flat, [[1.0] * 8] * 3)
    assert (times, low, high) == (1.0, 0.9, 1.1)


def test_the_interval_of_turns_is_students_t_of_eight_blocks():
    """Log ratios whose blocks of two have medians 0, 0, ..., 0.1, 0.1: by hand."""
    logs = np.repeat([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1], 2)
    half = 2.365 * np.sqrt(np.var([0] * 6 + [0.1] * 2) * 8 / 7) / np.sqrt(8)
    found = latency.turns_interval(3 * np.exp(logs), np.full(16, 2.0))
    assert found == pytest.approx((1.5, 1.5 * np.exp(-half), 1.5 * np.exp(half)), rel=1e-6)
    assert latency.width(found) == pytest.approx(100 * 2 * np.sinh(half))
    turned = latency.turns_interval(np.full(16, 2.0), 3 * np.exp(logs))
    assert latency.width(turned) == pytest.approx(latency.width(found))  # either way round


@pytest.mark.parametrize("turns", [5, 20, 40])
def test_intervals_of_turns_hold_the_truth_as_often_as_they_say(turns):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        _, low, high = latency.turns_interval(rng.lognormal(0, 0.05, turns), np.ones(turns))
        held += low <= 1 <= high
    assert 0.92 < held / 1000 < 0.98


def test_percentiles_of_parts():
    samples = np.concatenate([np.full(10, turn) for turn in range(16)])
    parts = latency.part_percentiles(samples, 16, 50)
    assert parts.tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]
