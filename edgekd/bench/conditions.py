"""What the machine was like while something was measured, and whether the figures suffer from it.

What a machine does not tell stays absent: a virtual machine has neither sensors nor a governor.
The rules are pyperf's (`pyperf check`), for single calls instead of means of many.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekd.metrics.latency import AGREE, ENOUGH, blocks, unstable
from edgekd.records import Conditions
from edgekd.runtimes.machine import clock_mhz, read

SPREAD = 0.10  # standard deviation, of the mean (pyperf)
OUTLIER = 0.50  # of a call from the mean (pyperf)
TAIL = 0.01  # of the calls: so many are slow on a quiet machine too (timers, page faults)
SHORT_MS = 0.1  # shorter calls hold a percent and more of the stopwatch and of Python's own call
STEAL = 0.02  # of CPU time
BUSY = 0.10  # CPUs
DRIFT = 0.05  # of the clock
WARMING = 10.0  # degrees C
FIX_CLOCK = "sudo cpupower frequency-set -g performance (on a Jetson: sudo jetson_clocks)"


class _Cpu(NamedTuple):
    """CPU time of the whole machine since it started, in ticks of SC_CLK_TCK; see proc(5)."""

    busy: int  # user, nice, system, irq, softirq
    steal: int
    total: int


def _cpu(root: Path) -> _Cpu | None:
    """CPU time until now; None where it is not told."""
    first = read(root / "proc/stat").partition("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    # what follows the eighth is time of guests, which is in user and nice already
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, first[1:9])
    busy = user + nice + system + irq + softirq
    return _Cpu(busy, steal, busy + idle + iowait + steal)


def _throttles(root: Path) -> dict[Path, int]:
    """Counter of throttling -> count: of heat (x86), of current (oc, NVIDIA Jetson)."""
    sys = root / "sys"
    paths = [
        *sys.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"),
        *sys.glob("class/hwmon/hwmon*/oc*_event_cnt"),
    ]
    return {p: int(count) for p in paths if (count := read(p).strip()).isdigit()}


def _hottest_c(root: Path) -> float | None:
    """Degrees C of the hottest sensor; None if there is none."""
    sys = root / "sys/class"
    paths = [*sys.glob("thermal/thermal_zone*/temp"), *sys.glob("hwmon/hwmon*/temp*_input")]
    told = [int(t) / 1e3 for p in paths if (t := read(p).strip()).lstrip("-").isdigit()]
    # A sensor of a part that is asleep says -256, one that is not connected 0 or 127.
    return max((t for t in told if 0 < t < 125), default=None)


def _governor(root: Path) -> str:
    """The clock's governor; several, if the cores differ; empty if there is none."""
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({name for p in paths if (name := read(p).strip())}))


class Watch:
    """Watches the machine from now on: `tick` between blocks of work, then `end`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._clocks: list[float] = []  # MHz
        self._temperatures: list[float] = []  # C
        load = read(root / "proc/loadavg").split()
        self._load = float(load[0]) if load else None
        self._throttles = _throttles(root)
        self._cpu = _cpu(root)
        self._began = time.perf_counter()

    def tick(self) -> None:
        """Read the clock and the hottest sensor: right after a block, before they fall."""
        if (clock := clock_mhz(self._root)) is not None:
            self._clocks.append(clock)
        if (hottest := _hottest_c(self._root)) is not None:
            self._temperatures.append(hottest)

    def end(self, own_cpu_s: float) -> Conditions:
        """What was seen. own_cpu_s: CPU seconds that our own processes took since we began."""
        after, seconds = _cpu(self._root), time.perf_counter() - self._began
        steal = busy = None
        if self._cpu and after and after.total > self._cpu.total:  # a sandbox may tell only zeros
            steal = (after.steal - self._cpu.steal) / (after.total - self._cpu.total)
            all_s = (after.busy - self._cpu.busy) / os.sysconf("SC_CLK_TCK")
            busy = max(0.0, (all_s - own_cpu_s) / seconds)  # ticks are coarser than own_cpu_s
        # Not their sum: each core counts for its siblings and for its package once more.
        rises = [n - self._throttles.get(p, n) for p, n in _throttles(self._root).items()]
        return Conditions(
            load_1min=self._load,
            steal=steal,
            busy=busy,
            governor=_governor(self._root),
            clock_mhz=tuple(self._clocks),
            temperature_c=tuple(self._temperatures),
            throttled=max(rises, default=None),
        )


def noise(
    samples_ms: Sequence[float] | np.ndarray,
    block_medians_ms: Sequence[float] | np.ndarray,
    conditions: Conditions,
) -> tuple[str, ...]:
    """What makes these figures doubtful, each with what to do about it; none: a quiet run.

    samples_ms: of every call, block_medians_ms: of each turn, both of one artifact. First what is
    seen in the figures, then what is known of the machine, which is often its cause.
    """
    found = [
        _spread(np.asarray(samples_ms, float), np.asarray(block_medians_ms, float)),
        _few(len(samples_ms)),
        _short(float(np.min(samples_ms))),
        _steal(conditions.steal),
        _busy(conditions.busy),
        _pace(conditions),
        _powersave(conditions.governor),
    ]
    return tuple(sentence for sentence in found if sentence)


def _spread(samples_ms: np.ndarray, block_medians_ms: np.ndarray) -> str | None:
    """Turns that differ, or else calls that do: the former make the latter."""
    apart, seen = unstable(block_medians_ms), blocks(block_medians_ms)
    if apart > AGREE:
        return (
            f"the turns' medians lie {apart:.0%} apart ({seen.min():.3g} to {seen.max():.3g} ms): "
            "the machine's pace changed; measure for longer or when it has nothing else to do"
        )
    calls = np.sort(samples_ms)[: len(samples_ms) - math.ceil(TAIL * len(samples_ms))]
    if len(calls) < 2:
        return None
    mean = calls.mean()
    deviation = calls.std(ddof=1) / mean
    if deviation < SPREAD and max(calls[-1] - mean, mean - calls[0]) < OUTLIER * mean:
        return None
    return (
        f"calls differ: standard deviation {deviation:.0%} of the mean ({mean:.3g} ms), from "
        f"{calls[0]:.3g} to {calls[-1]:.3g} ms without the slowest {TAIL:.0%}; stop what else runs "
        "and measure for longer"
    )


def _few(calls: int) -> str | None:
    """Too few calls for a tail."""
    if calls >= ENOUGH[95]:
        return None
    return f"{calls} calls do not tell a 95th percentile: measure at least {ENOUGH[95]}"


def _short(shortest_ms: float) -> str | None:
    """A call that the stopwatch is too slow for."""
    resolution_ms = time.get_clock_info("perf_counter").resolution * 1e3
    if shortest_ms >= max(SHORT_MS, resolution_ms * 1e3):
        return None
    return (
        f"the shortest call took {shortest_ms * 1e3:.3g} us, and a part of it is the stopwatch and "
        "Python's own call: compare throughput instead"
    )


def _steal(share: float | None) -> str | None:
    """CPU time that the host of a virtual machine gave to others."""
    if share is None or share <= STEAL:
        return None
    return (
        f"the host gave {share:.1%} of the CPU time to other virtual machines: measure on a "
        "machine that is not shared"
    )


def _busy(cpus: float | None) -> str | None:
    """Work that is not ours."""
    if cpus is None or cpus <= BUSY:
        return None
    return f"other processes kept {cpus:.2g} CPUs busy: stop them (top shows which)"


def _pace(c: Conditions) -> str | None:
    """A processor that throttled, changed its clock or was still warming up, in one sentence."""
    before_mhz, after_mhz = _ends(c.clock_mhz)
    cool, hot = _ends(c.temperature_c)
    drifted = abs(after_mhz - before_mhz) > DRIFT * max(before_mhz, after_mhz)
    warming = hot - cool >= WARMING
    seen = []
    if c.throttled:
        seen.append(f"the processor throttled {c.throttled} times")
    if drifted:
        seen.append(f"the clock went from {before_mhz:.0f} to {after_mhz:.0f} MHz")
    if warming:
        seen.append(f"the hottest sensor went from {cool:.0f} to {hot:.0f} C")
    if c.throttled or (drifted and warming):
        advice = "cool the device and check its power supply, or measure in a lower power mode"
    elif drifted:
        advice = f"fix the clock with {FIX_CLOCK}"
    else:
        advice = "measure for longer, to know the pace that it keeps"
    return f"{', '.join(seen)}: {advice}" if seen else None


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last fifth; 0 and 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0, 0.0
    fifth = max(1, len(values) // 5)
    return sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth


def _powersave(governor: str) -> str | None:
    """A clock that falls between calls."""
    if "powersave" not in governor.split(", "):
        return None
    return f"the clock's governor is powersave, so that it falls between calls: {FIX_CLOCK}"
