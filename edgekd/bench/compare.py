"""Is it slower than it was? One file beside another, in turns; or beside what was measured before.

Beside another file both run now, turn by turn, so that what slows the machine slows both; where the
rounds do not decide, there are more of them. Beside a timing.json of another day both are told as
multiples of the machine's pace (`stopwatch.yardstick`), which each of them measured in every turn;
more rounds of today would not make that day surer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from edgekd.bench import bench
from edgekd.bench.bench import How, Runner
from edgekd.bench.stopwatch import YARDSTICK
from edgekd.metrics.latency import ratio_interval, redrawn
from edgekd.records import EdgeKDError, State, Stored, Timing, Track, held, untracked
from edgekd.runtimes import machine

ROUNDS = 5  # processes of each file: one is some percent faster in one process than in the next
MORE = 5  # times as many at most of two files, where they do not decide
TOLERANCE = {"turns": 5.0, "record": 10.0}  # percent slower that is no regression


class Against(Stored):
    """How many times as long as the other file this one takes, and whether that is too long."""

    FILE: ClassVar[str] = "against.json"
    own: Timing  # of all rounds
    other: Timing  # of all rounds, or the record
    how: Literal["turns", "record"]
    rounds: int
    times: float  # own / other
    low: float
    high: float  # bootstrap 95 %, over processes and turns
    tolerance: float  # percent
    state: State
    reason: str


def other_file(
    own: Runner,
    other: Runner,
    how: How,
    *,
    rounds: int = ROUNDS,
    tolerance: float | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Against:
    """`own` beside `other`, in turns, in `rounds` processes of each, or up to MORE times as many.

    tolerance: percent that it may be slower; None: TOLERANCE.
    """

    def judged(both: Sequence[Sequence[Timing]]) -> Against:
        blocks = [[t.block_medians_ms for t in x] for x in both]
        figures = ratio_interval(blocks[0], blocks[1], seed)
        return _judged("turns", both[0], bench.joined(both[1]), figures, tolerance)

    both = bench.in_rounds(
        [own, other], how, rounds=rounds, most=MORE * rounds,
        undecided=lambda found: judged(found).state == "inconclusive", seed=seed, track=track,
    )  # fmt: skip
    return judged(both)


def record(
    own: Runner,
    before: Timing,
    how: How,
    *,
    rounds: int = ROUNDS,
    tolerance: float | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Against:
    """`own`, measured now in `rounds` processes, beside what was measured `before` on this machine.

    EdgeKDError if that was another machine, or without its pace.
    """
    here = machine.this()
    if here.kind != before.machine.kind:
        raise EdgeKDError(
            f"that timing is of {before.machine.name}, this machine is {here.name}: times of two "
            "machines are no regression; measure both here, --against a folder"
        )
    told = (before.yardstick, before.yardstick_threads)
    if not before.yardstick_ms or told != (YARDSTICK, here.cores):
        raise EdgeKDError(
            "that timing does not tell the machine's pace as this edgekd measures it: run edgekd "
            "bench anew"
        )
    (now,) = bench.in_rounds([own], how, rounds=rounds, seed=seed, track=track)
    paces = [_pace(t) for t in now]
    return _judged("record", now, before, _apart(paces, _pace(before), seed), tolerance)


def _pace(t: Timing) -> np.ndarray:
    """(blocks,) times as multiples of the yardstick of their turn."""
    return np.asarray(t.block_medians_ms) / np.asarray(t.yardstick_ms)


def _apart(
    rounds: Sequence[np.ndarray], before: np.ndarray, seed: int, resamples: int = 2000
) -> tuple[float, float, float]:
    """(median of the rounds over that before, and its 95 % interval: rounds, then turns, drawn)."""
    rng = np.random.default_rng(seed)

    drawn = [redrawn(rounds, rng) / np.median(rng.choice(before, len(before)))
             for _ in range(resamples)]  # fmt: skip
    low, high = np.percentile(drawn, [2.5, 97.5])
    times = np.median([np.median(x) for x in rounds]) / np.median(before)
    return float(times), float(low), float(high)


def _judged(
    how: Literal["turns", "record"],
    rounds: Sequence[Timing],
    other: Timing,
    figures: tuple[float, float, float],
    tolerance: float | None,
) -> Against:
    """The three states of a margin: kept, missed, or not decided by these rounds."""
    allowed = TOLERANCE[how] if tolerance is None else tolerance
    times, low, high = figures
    state = held(low, high, 1 + allowed / 100, least=False)
    said = {"pass": "no slower", "fail": "slower", "inconclusive": "not decided: more --rounds"}
    return Against(
        own=bench.joined(rounds), other=other, how=how, rounds=len(rounds), times=times, low=low,
        high=high, tolerance=allowed, state=state,
        reason=f"{said[state]}: {times:.3f} [{low:.3f}, {high:.3f}] times as long, "
        f"{1 + allowed / 100:.2f} allowed",
    )  # fmt: skip
