"""The drawings of a benchmark's page, each as SVG and in words; None where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekd.bench.tables import Shown, number
from edgekd.records import Peak, Timing
from edgekd.report.drawings import COLOURS, Drawing, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT = "#a3243b"  # of a budget's line, as the page's --bad
MARKERS = "osD^v"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # so that a line ends at words
POINTS = 300  # of a curve: more are not seen and make the page long


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _plain(name: str) -> str:
    """`name` that matplotlib does not read as a formula."""
    return name.replace("$", r"\$")


def _legend(drawn: Figure, names: Sequence[str], width: float) -> None:
    """Below the axes, in as many columns as fit into `width` inches."""
    columns = max(1, min(3, int(width / (0.5 + 0.065 * max(map(len, names))))))
    drawn.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _budget(found: Sequence[Shown], limit: str) -> float | None:
    """The last one's limit."""
    allowed: float | None = getattr(found[-1].timing.budget, limit)
    return allowed


def spread(found: Sequence[Shown]) -> Drawing | None:
    """Share of calls answered within a time, logarithmic; p50 and p95 marked where claimed."""
    timed = [(i, s, np.sort(s.timing.samples_ms)) for i, s in enumerate(found)
             if s.timing.samples_ms]  # fmt: skip
    if not timed:
        return None
    drawn, axes = figure(6.0, 3.3)
    told, highest = [], 0.0
    for i, s, samples in timed:
        share = np.linspace(0, 1, min(POINTS, len(samples) + 1))
        axes.plot(np.quantile(samples, share), share, color=_colour(i), linewidth=1.6,
                  label=_plain(s.name))  # fmt: skip
        words = []
        for p, marker in (("p50", "o"), ("p95", "D")):
            if value := s.latency[p]:
                axes.plot(value[0], float(p[1:]) / 100, marker, color=_colour(i),
                          markersize=6, markeredgecolor="white", zorder=3)  # fmt: skip
                words.append(f"{p} {number(value[0])} ms")
        told.append(f"{s.name}: {', '.join(words)}")
        highest = max(highest, float(samples[-1]))
    limit = _budget(found, "latency_ms")
    if limit and limit <= 3 * highest:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log")
    _ticks(axes, "x")
    axes.set_xlabel("latency of one image, ms")
    axes.set_ylabel("share of calls within it")
    axes.set_ylim(0, 1.02)
    _legend(drawn, [s.name for _, s, _ in timed], 6.0)
    return svg(drawn), "Latency distribution. " + "; ".join(told)


def _ticks(axes: Axes, which: Literal["x", "y"]) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    # Over many decades 2 and 5 would stand in each other's way.
    subs = (1.0, 2.0, 5.0) if high < 2000 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def accuracy(found: Sequence[Shown]) -> Drawing | None:
    """Accuracy with its interval against the median, a bar to p95; dashed: the budget of p95."""
    both = [(i, s, m, p50) for i, s in enumerate(found)
            if (m := s.timing.accuracy) and (p50 := s.latency["p50"])]  # fmt: skip
    if not both:
        return None
    drawn, axes = figure(4.6, 3.3)
    told, right = [], 0.0
    for i, s, m, p50 in both:
        within = None
        if m.low is not None and m.high is not None:
            within = [[max(0.0, m.value - m.low)], [max(0.0, m.high - m.value)]]
        axes.errorbar(p50[0], m.value, yerr=within, marker=MARKERS[i % len(MARKERS)], capsize=3,
                      linestyle="", color=_colour(i), label=_plain(s.name))  # fmt: skip
        slow = s.latency["p95"]
        if slow:
            axes.plot([p50[0], slow[0]], [m.value] * 2, color=_colour(i), linewidth=1)
            axes.plot(slow[0], m.value, "|", color=_colour(i), markersize=7)
        right = max(right, (slow or p50)[0])
        told.append(f"{s.name}: {m.value:.3f} at {number(p50[0])} ms")
    limit = _budget(found, "latency_ms")
    if limit and limit <= 3 * right:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1, zorder=0)
        right = max(right, limit)
        told.append(f"budget of p95: {limit:g} ms")
    axes.set_xlim(0, 1.12 * right)
    axes.margins(y=0.15)
    axes.set_xlabel("latency of one image, ms: median to p95")
    axes.set_ylabel("balanced accuracy")
    _legend(drawn, [s.name for _, s, *_ in both], 4.6)
    return svg(drawn), "Accuracy against latency. " + "; ".join(told)


def size(found: Sequence[Shown]) -> Drawing:
    """The files' sizes, MB; dashed: the budget."""
    bars = [("file", lambda t: t.size_bytes / 1e6)]
    return _bars(found, bars, _budget(found, "size_mb"), "size of the file, MB")


def memory(found: Sequence[Shown]) -> Drawing:
    """Peak and resident memory, MB; dashed: the budget of the peak."""
    bars = [("peak", lambda t: t.peak_mb), ("resident", lambda t: t.resident_mb)]
    return _bars(found, bars, _budget(found, "memory_mb"), "memory of the process, MB")


Bar = tuple[str, Callable[[Timing], float | None]]


def _bars(found: Sequence[Shown], bars: Sequence[Bar], limit: float | None, label: str) -> Drawing:
    """A bar a candidate and kind, its number beside it; one that was not measured has no bar."""
    drawn, axes = figure(5.0, 0.8 + (0.2 + 0.26 * len(bars)) * len(found))
    height, told, highest = 0.8 / len(bars), [], 0.0
    for i, s in enumerate(found):
        words = []
        for k, (what, read) in enumerate(bars):
            value = read(s.timing)
            if value is None:
                continue
            at = i + (k - (len(bars) - 1) / 2) * height
            axes.barh(at, value, height * 0.88, color=_colour(i), alpha=1 - 0.45 * k)
            text = f"{number(value)}" + (f" {what}" if len(bars) > 1 else "")
            axes.annotate(text, (value, at), (4, 0), va="center", fontsize=8,
                          textcoords="offset points", bbox=PAPER)  # fmt: skip
            words.append(f"{what} {number(value)} MB")
            highest = max(highest, value)
        told.append(f"{s.name}: {', '.join(words)}")
    if limit and limit <= 4 * highest:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1, zorder=2.5)
        highest = max(highest, limit)
    if limit:
        told.append(f"budget: {limit:g} MB")
    axes.set_yticks(range(len(found)), [_plain(s.name) for s in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * highest or 1)  # room for the words
    axes.set_xlabel(label)
    return svg(drawn), f"{label[0].upper()}{label[1:]}. " + "; ".join(told)


def roofline(found: Sequence[Shown]) -> Drawing | None:
    """Achieved operations/s against operations a byte, under the roofs that were measured."""
    known = [(i, s, s.timing.roofline, p50[0]) for i, s in enumerate(found)
             if s.timing.roofline and (p50 := s.latency["p50"])]  # fmt: skip
    if not known:
        return None
    drawn, axes = figure(6.0, 3.6)
    peaks: list[Peak] = []
    for _, _, r, _ in known:
        if r.peak not in peaks:
            peaks.append(r.peak)
    told, x = [], np.array([r.intensity for _, _, r, _ in known])
    ridges = [g / p.bandwidth_gbs for p in peaks for g in p.gflops.values()]
    left, right = min(*x, *ridges) / 4, max(*x, *ridges) * 4
    for k, (name, gflops, bandwidth) in enumerate(_roofs(peaks)):
        along = np.array([left, gflops / bandwidth, right])
        axes.plot(along, np.minimum(gflops, bandwidth * along), color="#56606e", linewidth=1.2,
                  linestyle=("-", "--", ":", "-.")[k % 4])  # fmt: skip
        axes.annotate(f"{name}: {number(gflops)} GFLOP/s", (right, gflops), (0, 3), ha="right",
                      fontsize=8, textcoords="offset points")  # fmt: skip
        told.append(f"roof of {name}: {number(gflops)} GFLOP/s, {number(bandwidth)} GB/s")
    for i, s, r, median in known:
        achieved = 2 * s.timing.macs * s.timing.batch / (median * 1e6)  # 1 MAC = 2 operations
        roof = 2 * s.timing.macs * s.timing.batch / (r.ideal_ms * 1e6)
        axes.plot([r.intensity] * 2, [achieved, roof], color=_colour(i), linewidth=0.8, alpha=0.6)
        label = _plain(f"{s.name}, {100 * r.fraction:.0f} %")
        axes.plot(r.intensity, achieved, MARKERS[i % len(MARKERS)], color=_colour(i), markersize=7,
                  markeredgecolor="white", label=label)  # fmt: skip
        told.append(
            f"{s.name}: {number(achieved)} GFLOP/s at {number(r.intensity)} operations a byte, "
            f"{100 * r.fraction:.0f} % of the {r.precision} roof, {r.bound}-bound"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    _ticks(axes, "x")
    _ticks(axes, "y")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    _legend(drawn, [s.name + ", 100 %" for _, s, *_ in known], 6.0)
    return svg(drawn), "Roofline. " + "; ".join(told)


def _roofs(peaks: Sequence[Peak]) -> Iterator[tuple[str, float, float]]:
    """(precision, GFLOP/s, GB/s) of each roof; with the threads where peaks differ."""
    for p in peaks:
        for precision, gflops in p.gflops.items():
            threads = f", {p.threads} threads" if len(peaks) > 1 else ""
            yield precision + threads, gflops, p.bandwidth_gbs


def drift(found: Sequence[Shown]) -> list[Drawing]:
    """Clock, temperature, pace and medians turn by turn; nothing where the machine tells nothing.

    Pace and medians are shares of their own median: 1.1 is a tenth slower.
    """
    kinds: list[tuple[str, Callable[[Timing], Sequence[float]]]] = [
        ("clock, MHz", lambda t: t.conditions.clock_mhz),
        ("temperature, °C", lambda t: t.conditions.temperature_c),
        ("fixed work, of its median", lambda t: _relative(t.yardstick_ms)),
    ]
    told = [d for label, read in kinds if (d := _turns(found, label, read))]
    if not told:
        return []
    medians = _turns(
        found, "turn's latency, of its median", lambda t: _relative(t.block_medians_ms)
    )
    return [*told, *([medians] if medians else [])]


def _relative(values: Sequence[float]) -> Sequence[float]:
    middle = float(np.median(values)) if values else 0.0
    return [v / middle for v in values] if middle else ()


def _turns(
    found: Sequence[Shown], label: str, read: Callable[[Timing], Sequence[float]]
) -> Drawing | None:
    """One quantity over the turns of each candidate."""
    known = [(i, s, values) for i, s in enumerate(found) if (values := read(s.timing))]
    if not known:
        return None
    drawn, axes = figure(4.6, 2.5)
    told = []
    for i, s, values in known:
        axes.plot(range(1, len(values) + 1), values, marker=MARKERS[i % len(MARKERS)],
                  markersize=4, linewidth=1.2, color=_colour(i), label=_plain(s.name))  # fmt: skip
        told.append(f"{s.name}: {number(min(values))} to {number(max(values))}")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set_xlabel("turn")
    axes.set_ylabel(label, fontsize=8.5)
    _legend(drawn, [s.name for _, s, _ in known], 4.6)
    return svg(drawn), f"Turn by turn: {label}. " + "; ".join(told)
