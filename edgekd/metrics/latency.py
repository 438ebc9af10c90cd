"""What may be said of latency samples: percentiles, intervals, ratios. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Samples = Sequence[float] | np.ndarray  # ms

# How many samples a percentile takes before it may be claimed: MLPerf's early stopping
# (inference_rules.adoc), confidence 0.99, tolerance 0.
ENOUGH = {50: 1, 90: 64, 95: 130, 99: 662}
BLOCKS = 8
AGREE = 0.10  # block medians of one run are not further apart than that on a steady machine
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # t(0.975), of 1 to BLOCKS - 1


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


def turns_interval(turns_ms: Samples, others_ms: Samples) -> tuple[float, float, float]:
    """(`ratio`, low, high) of turns in one run of processes: 95 %, by batch means of its logarithm.

    Neighbouring turns meet the machine at the same pace, so that they know less than as many
    strangers. The `blocks` of neighbours are taken as independent instead, and as few as they are:
    Student's t of their medians. In simulations that end at the first two narrow looks, 90 % to
    96 % of these held the truth (73 % to 92 % where eight tenths of what disturbs a ratio are left
    in the next turn), and 72 % to 95 % of those of a bootstrap over turns. At least two turns.
    """
    logs = np.log(np.asarray(turns_ms, float) / np.asarray(others_ms, float))
    medians = blocks(logs)
    half = STUDENT[len(medians) - 2] * medians.std(ddof=1) / math.sqrt(len(medians))
    middle = float(np.median(logs))
    low, value, high = (math.exp(middle + x) for x in (-half, 0.0, half))
    return value, low, high


def width(found: tuple[float, float, float]) -> float:
    """Percent of the value that its interval is wide."""
    value, low, high = found
    return 100 * (high - low) / value


def part_percentiles(samples_ms: Samples, turns: int, q: float) -> np.ndarray:
    """Percentile `q` of each of the `blocks` of neighbouring turns, which took as many calls each.

    Where they are far apart, the percentile of all depends on when the machine was looked at.
    """
    x = np.asarray(samples_ms, float).reshape(turns, -1)
    return np.array([np.percentile(part, q) for part in np.array_split(x, min(BLOCKS, turns))])


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
    medians = []
    for i in rng.integers(len(rounds), size=len(rounds)):
        turns = rounds[i]
        medians.append(np.median(turns[rng.integers(len(turns), size=len(turns))]))
    return float(np.median(medians))
