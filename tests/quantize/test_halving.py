"""Who is timed further, who is explained, and who is out, on times that the tests make up."""

import numpy as np
import pytest

from edgekd.quantize import halving
from edgekd.records import Timing

TURNS = 20


class Track:
    """Times of each file, with the file's own luck in each process; what was asked is kept."""

    def __init__(self, ms, *, lose=(), mendable=(), noise=0.02, process=0.02, seed=0):
        self.ms, self.lose, self.mendable = ms, set(lose), set(mendable)
        self.noise, self.process = noise, process
        self.rng = np.random.default_rng(seed)
        self.rounds, self.explained = [], []

    def measure(self, names, number):
        assert number == len(self.rounds)
        self.rounds.append(list(names))
        pace = np.exp(np.cumsum(self.rng.normal(0, 0.1, TURNS)))  # of the machine: all share it
        for n in names:
            luck = self.rng.lognormal(0, self.process)
            turns = self.ms[n] * luck * pace * self.rng.lognormal(0, self.noise, TURNS)
            yield Timing.model_construct(samples_ms=tuple(turns), block_medians_ms=tuple(turns),
                                         noise=(), yardstick_ms=())  # fmt: skip

    def holds(self, name):
        self.explained.append(name)
        return name not in self.lose

    def race(self):
        return halving.race(list(self.ms), self.measure, holds=self.holds,
                            counts=lambda n: n in self.mendable)  # fmt: skip


def test_what_is_slower_than_what_holds_is_out_after_the_first_turns_and_never_explained():
    track = Track({"fp32": 4.0, "a": 2.0, "b": 3.0, "c": 6.0})
    found = track.race()
    assert track.rounds == [["fp32", "a", "b", "c"]]
    assert track.explained == ["a"]
    assert set(found.late) == {"fp32", "b", "c"}
    assert found.late["c"].leader == "fp32"  # before anybody was explained
    late = found.late["b"]
    assert (late.leader, late.turns) == ("a", TURNS)
    assert 1.1 < late.low < late.times < late.high < 2
    assert str(late).startswith(f"{late.times:.2f} [{late.low:.2f}, {late.high:.2f}] x the time of")
    assert {n: len(r) for n, r in found.rounds.items()} == dict.fromkeys(track.ms, 1)


def test_the_fastest_that_does_not_hold_puts_nobody_out():
    track = Track({"fp32": 4.0, "a": 2.0, "b": 3.0, "c": 3.7}, lose=["a"])
    found = track.race()
    assert track.explained == ["a", "b"]
    assert set(found.late) == {"fp32", "c"}
    assert len(track.rounds) == 1


def test_what_is_near_takes_more_turns():
    track = Track({"fp32": 4.0, "a": 2.0, "b": 2.04, "c": 3.0})
    found = track.race()
    assert track.rounds[1:] == [["fp32", "a", "b"]] * halving.ROUNDS
    assert set(track.explained) == {"a", "b"}
    assert set(found.late) == {"fp32", "c"}
    assert halving.timed(found.rounds, "b", "fp32").turns == TURNS * (1 + halving.ROUNDS)
    assert halving.timed(found.rounds, "c", "fp32").turns == TURNS
    assert halving.timed(found.rounds, "b", "fp32").times == pytest.approx(0.51, rel=0.04)


def test_the_more_processes_the_less_is_left_of_the_margin():
    assert halving.margin(1) == pytest.approx(1.1)
    assert halving.margin(4) == pytest.approx(1.05)
    track = Track({"fp32": 4.0, "a": 2.0, "b": 2.0 * 1.09}, noise=0.005, process=0.001)
    found = track.race()
    assert len(track.rounds) == 2  # 9 % are not enough in one process, and are in two
    assert found.late["b"].turns == 2 * TURNS


def test_what_is_out_and_can_be_mended_is_timed_until_it_is_known_to_be_faster():
    fast = Track({"fp32": 4.0, "a": 2.0, "b": 3.0}, lose=["a"], mendable=["a"])
    found = fast.race()
    assert len(fast.rounds) == 1
    assert "a" not in found.late
    near = Track({"fp32": 4.0, "a": 2.9, "b": 3.0}, lose=["a"], mendable=["a"])
    near.race()
    assert near.rounds[1:] == [["fp32", "a", "b"]] * halving.ROUNDS
    useless = Track({"fp32": 4.0, "a": 2.9, "b": 3.0}, lose=["a"])
    useless.race()
    assert len(useless.rounds) == 1


def test_where_nothing_else_is_the_reference_is_left():
    track = Track({"fp32": 4.0})
    assert track.race().late == {}
    assert len(track.rounds) == 1


def chosen(ms, lose):
    """What an exhaustive run chooses of such times: the fastest, or an earlier as fast."""
    hold = [n for n in ms if n not in lose]
    best = min(ms[n] for n in hold)
    return {n for n in hold if ms[n] <= halving.CLEARLY * best}


def test_the_choice_is_the_exhaustive_ones():
    """Thirty made-up cases: whatever is the fastest that holds is never out."""
    rng = np.random.default_rng(1)
    rounds = explained = 0
    for seed in range(30):
        ms = {"fp32": 4.0} | {n: float(4 * rng.uniform(0.4, 1.6)) for n in "abcde"}
        lose = [n for n in "abcde" if rng.random() < 0.4]
        track = Track(ms, lose=lose, mendable=["a", "b"], seed=seed)
        found = track.race()
        assert not chosen(ms, lose) & set(found.late)
        asked = set(track.explained)
        assert chosen(ms, lose) <= asked | {"fp32"}
        rounds += sum(map(len, track.rounds))
        explained += len(track.explained)
    assert rounds < 0.6 * 30 * 6 * halving.ROUNDS
    assert explained < 0.5 * 30 * 6
