"""Times of calls, and what may be said of them: percentiles, intervals, ratios. numpy only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Samples = Sequence[float] | np.ndarray  # ms

# How many samples a percentile takes before it may be claimed: MLPerf's early stopping
# (inference_rules.adoc), confidence 0.99, tolerance 0.
ENOUGH = {50: 1, 90: 64, 95: 130, 99: 662}
BLOCKS = 8
AGREE = 0.10  # block medians of one run are not further apart than that, or it is repeated
WINDOW, STEADY, PATIENCE = 10, 0.05, 20  # see `settle`
# The environment of a process that calls `yardstick`: no product of numpy's is shared out among
# cores.
QUIET = {"OPENBLAS_NUM_THREADS": "1"}
YARDSTICK = 2  # which piece of work it does: times of another say nothing of this one


def time_ms(call: Callable[[], object], *, warmup: int, runs: int) -> np.ndarray:
    """(runs,) float64 wall-clock milliseconds of `call`, after `warmup` untimed calls."""
    for _ in range(warmup):
        call()
    ticks = np.empty(runs + 1, np.int64)
    ticks[0] = time.perf_counter_ns()
    for i in range(runs):
        call()
        ticks[i + 1] = time.perf_counter_ns()
    return np.diff(ticks) / 1e6


def settle(call: Callable[[], object], seconds: float = 3.0) -> np.ndarray:
    """Call until calls are steady; of the last WINDOW the ms.

    Steady: their median is that of the WINDOW before, to STEADY. Gives up after PATIENCE windows or
    `seconds`, whichever comes first: a machine may never be steady, and what that means for the
    figures is told by their blocks.
    """
    started = time.perf_counter()
    before = time_ms(call, warmup=0, runs=WINDOW)
    for _ in range(PATIENCE):
        now = time_ms(call, warmup=0, runs=WINDOW)
        steady = abs(np.median(now) / np.median(before) - 1) <= STEADY
        if steady or time.perf_counter() - started > seconds:
            return now
        before = now
    return before


def percentiles(samples_ms: Samples) -> dict[str, float]:
    """p50, p90, p95 and p99 in ms, interpolated linearly."""
    return {f"p{q}": float(np.percentile(samples_ms, q)) for q in ENOUGH}


def claimed(samples_ms: Samples) -> dict[str, float | None]:
    """`percentiles`, and None for those that so few samples do not bear."""
    return {f"p{q}": float(np.percentile(samples_ms, q)) if len(samples_ms) >= n else None
            for q, n in ENOUGH.items()}  # fmt: skip


def interval(
    samples_ms: Samples, q: float, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Bootstrap 95 % interval of percentile `q`, in ms.

    Draws runs of sqrt(n) neighbouring samples (the end joined to the start), not single ones:
    a slow moment lasts for several calls.
    """
    x = np.asarray(samples_ms, float)
    length = math.isqrt(len(x))
    starts = np.random.default_rng(seed).integers(
        len(x), size=(resamples, math.ceil(len(x) / length))
    )
    at = (starts[..., None] + np.arange(length)) % len(x)
    drawn = x[at.reshape(resamples, -1)[:, : len(x)]]
    low, high = np.percentile(np.percentile(drawn, q, axis=1), [2.5, 97.5])
    return float(low), float(high)


def blocks(turns_ms: Samples) -> np.ndarray:
    """Medians of up to BLOCKS runs of neighbouring turns, which are too short to agree by one."""
    x = np.asarray(turns_ms, float)
    return np.array([np.median(part) for part in np.array_split(x, min(BLOCKS, len(x)))])


def unstable(turns_ms: Samples) -> float:
    """How far apart the `blocks` of some turns' medians are: (largest - smallest) / median."""
    found = blocks(turns_ms)
    return float(np.ptp(found) / np.median(found))


def ratio(blocks_ms: Samples, others_ms: Samples) -> float:
    """How many times as long as the other, of medians of blocks that took turns: each beside the
    other of its turn. What slows a machine down for a while slows both, and their ratio stays; a
    median over all turns may fall in another of its speeds for the one than for the other.
    """
    return float(np.median(np.asarray(blocks_ms, float) / np.asarray(others_ms, float)))


def ratio_interval(
    rounds: Sequence[Samples], others: Sequence[Samples], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """(`ratio`, low, high) of blocks that took turns in rounds, each with processes of its own.

    The ratio is the median of the rounds' ratios: one file is a few percent faster in one process
    than in the next. The 95 % interval draws whole rounds, then turns within them.
    """
    each = [np.divide(a, b) for a, b in zip(rounds, others, strict=True)]
    rng = np.random.default_rng(seed)
    low, high = np.percentile([redrawn(each, rng) for _ in range(resamples)], [2.5, 97.5])
    return float(np.median([np.median(x) for x in each])), float(low), float(high)


def redrawn(rounds: Sequence[np.ndarray], rng: np.random.Generator) -> float:
    """The median of rounds' medians, of rounds drawn anew and of turns drawn anew within each."""
    chosen = rng.integers(len(rounds), size=len(rounds))
    return float(np.median([np.median(rng.choice(rounds[i], len(rounds[i]))) for i in chosen]))


def yardstick(threads: int = 1, runs: int = 9) -> float:
    """How long a fixed piece of work takes on `threads` cores at once, in ms: the machine's pace
    just now. For a process with the environment QUIET.

    Small products, each of what another core has just written, as the layers of a network are. A
    virtual machine changes its pace by half, for seconds or minutes, and often only that of data on
    its way between two cores: what each core does for itself is then as fast as ever, a network on
    two cores no faster than on one. Times of different days are compared as multiples of this.
    """
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((128, 128), np.float32) / np.float32(128**0.5)
    both = [[rng.standard_normal((64, 128), np.float32) for _ in range(threads)] for _ in "ab"]
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter meanwhile

        def step(read: list[np.ndarray], write: list[np.ndarray]) -> None:
            def part(i: int) -> None:
                np.matmul(read[i - 1], weights, out=write[i])

            list(pool.map(part, range(threads)))

        def together() -> None:
            for _ in range(6):
                step(both[0], both[1])
                step(both[1], both[0])

        return float(np.median(time_ms(together, warmup=2, runs=runs)))
