"""Times of calls in ms, and the machine's pace meanwhile. numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

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
