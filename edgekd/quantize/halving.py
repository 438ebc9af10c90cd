"""Successive halving: a few turns of all candidates, more of those that may still be chosen.

A file that is slower than one that holds, by a margin, is out after a few interleaved turns, and is
never asked whether it holds itself. The margin is of what processes differ by: one file is a few
hundredths faster in one than in the next, and the more of them were timed, the less is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from edgekd.bench import bench
from edgekd.metrics.latency import percentiles, ratio, ratio_interval
from edgekd.records import Timing

ROUNDS = 3  # at most, after the first turns, each with processes of its own
RESAMPLES = 500  # of rounds and turns: an interval is asked for after every round
BEHIND = 0.10  # of the time of what holds: slower by that in one process, surely, is out
CLEARLY = 1.02  # times the fastest one's time: what is nearer is as fast

Rounds = Mapping[str, Sequence[Timing]]  # name -> its rounds: the first ones, then it was out


class Timed(NamedTuple):
    """What is told of a candidate's time."""

    times: float  # as long as the reference takes, turn by turn
    p50_ms: float
    p95_ms: float
    turns: int


class Late(NamedTuple):
    """Why a candidate was timed no more."""

    leader: str  # that holds
    times: float  # as long as the leader
    low: float
    high: float  # 95 %
    turns: int

    def __str__(self) -> str:
        return (
            f"{self.times:.2f} [{self.low:.2f}, {self.high:.2f}] x the time of {self.leader} "
            f"after {self.turns} turns"
        )


class Raced(NamedTuple):
    """The rounds of each candidate, and which are out by them."""

    rounds: Rounds
    late: dict[str, Late]


def margin(processes: int) -> float:
    """How many times as long as one that holds a candidate has to take to be out."""
    return 1 + BEHIND / math.sqrt(processes)


def race(
    names: Sequence[str],
    measure: Callable[[Sequence[str], int], Iterable[Timing]],
    *,
    holds: Callable[[str], bool],
    counts: Callable[[str], bool],
) -> Raced:
    """Rounds of turns until one candidate is left that may be chosen, ROUNDS and the first at most.

    names: the reference first, which holds and runs in every round. measure: (names, number of the
    round) -> their timings, in turns. holds: whether it may be chosen; asked as seldom as can be,
    the fastest first. counts: whether the time of one that may not be chosen matters still, as far
    as it is clearly faster than what may.
    """
    reference, *others = names
    rounds: dict[str, list[Timing]] = {n: [] for n in names}
    known: dict[str, bool] = {reference: True}
    late: dict[str, Late] = {}
    alive = list(names)
    ahead = ""  # whom the rest was compared with since the last round

    def drop() -> None:
        """Those that are behind the fastest one that holds."""
        nonlocal ahead
        leader = _leader(rounds, [n for n in alive if known.get(n)], reference)
        if leader == ahead:
            return
        ahead = leader
        for n in [n for n in alive if n != leader]:
            found = _beside(rounds, n, leader)
            if found.low > margin(len(rounds[n])):
                late[n] = found
                alive.remove(n)

    for number in range(1 + ROUNDS):
        running = [reference, *(n for n in others if n in alive)]
        for n, timing in zip(running, measure(running, number), strict=True):
            rounds[n].append(timing)
        ahead = ""
        drop()
        for n in sorted(alive, key=lambda n: timed(rounds, n, reference).times):
            if n not in alive or n in known:
                continue
            known[n] = holds(n)
            if not known[n] and not counts(n):
                alive.remove(n)
            drop()
        if _decided(rounds, alive, known):
            break
    return Raced({n: r for n, r in rounds.items() if r}, late)


def _leader(rounds: Rounds, holding: Sequence[str], reference: str) -> str:
    """The fastest of those that hold."""
    return min(holding, key=lambda n: timed(rounds, n, reference).times)


def _decided(rounds: Rounds, alive: Sequence[str], known: Mapping[str, bool]) -> bool:
    """Whether one alone is left that holds, and what else is timed is clearly faster than that."""
    holding = [n for n in alive if known[n]]
    if len(holding) > 1:
        return False
    faster = 1 / (CLEARLY * margin(len(rounds[holding[0]])))
    return all(_beside(rounds, n, holding[0]).high < faster for n in alive if not known[n])


def _beside(rounds: Rounds, own: str, other: str) -> Late:
    """How long it takes beside the other, in the rounds that both took part in."""
    both = list(zip(rounds[own], rounds[other], strict=False))
    mine, theirs = ([t[i].block_medians_ms for t in both] for i in (0, 1))
    return Late(other, *ratio_interval(mine, theirs, resamples=RESAMPLES), sum(map(len, mine)))


def timed(rounds: Rounds, name: str, reference: str) -> Timed:
    """What the rounds of a candidate tell, beside the reference in the same rounds."""
    own = bench.joined(rounds[name])
    theirs = bench.joined(rounds[reference][: len(rounds[name])])
    return figures(own, theirs)


def figures(own: Timing, reference: Timing) -> Timed:
    """What a timing tells beside the reference's of the same turns."""
    ms = percentiles(own.samples_ms)
    times = ratio(own.block_medians_ms, reference.block_medians_ms)
    return Timed(times, ms["p50"], ms["p95"], len(own.block_medians_ms))
