"""Timings -> the lines of every table of a benchmark: terminal, page, Markdown; and CSV.

What was not measured is an en dash in a table and empty in CSV, never a zero. Times are medians in
ms unless a line says otherwise.
"""

from __future__ import annotations

import csv as csv_format
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgekd.metrics.latency import (
    AGREE,
    ENOUGH,
    claimed,
    interval,
    part_percentiles,
    ratio,
    turns_interval,
    unstable,
)
from edgekd.records import Timing

UNITS = {"ms": "ms", "m": "M", "mb": "MB"}  # last word of a budget's limit -> as it is written
FEW_TURNS = 5  # fewer tell no interval of their ratios


class Cell(NamedTuple):
    """A figure of one candidate."""

    text: str
    beside: str = ""  # its interval, or what it is of
    bad: bool = False

    def __str__(self) -> str:
        """In one line: '2.31 ms [2.28, 2.35]', '38 % (compute-bound, int8)'."""
        beside = self.beside if self.beside[:1] in ("", "[") else f"({self.beside})"
        return f"{self.text} {beside}".strip()


NONE = Cell("–")


class Line(NamedTuple):
    """One line of the table."""

    group: str
    what: str
    cells: list[Cell]


class Times(NamedTuple):
    """How many times as fast as the first, turn by turn; 95 % interval over turns."""

    value: float
    low: float | None = None
    high: float | None = None


class Shown(NamedTuple):
    """A candidate, with what takes a while to compute."""

    name: str  # "student int8"
    timing: Timing
    latency: dict[str, tuple[float, float, float] | None]  # "p50" -> ms, interval; None: too few
    times: Times | None  # None: it and the first took no turns beside each other


def shown(timings: Sequence[Timing], ratios: Sequence[Times | None] = ()) -> list[Shown]:
    """The candidates with their names, percentiles and ratios; `ratios` where the caller has them.

    Without them the ratio is that of the turns of `timings` themselves.
    """
    times = list(ratios) or [times_as_fast(timings[0], t) for t in timings]
    return [
        Shown(name, t, _latency(t), found)
        for name, t, found in zip(names(timings), timings, times, strict=True)
    ]


def names(timings: Sequence[Timing]) -> list[str]:
    """What each is called: role and precision, and as much more as tells them apart."""
    found = [f"{t.role} {t.precision}" for t in timings]
    for more in (
        [t.model.partition("_top1")[0] for t in timings],
        [f"{t.runtime} {t.device}" for t in timings],
        [t.artifact_sha256[:8] for t in timings],
        [str(i) for i in range(1, len(timings) + 1)],
    ):
        if len(set(found)) == len(found):
            break
        if len(set(more)) > 1:
            found = [f"{a} {b}" for a, b in zip(found, more, strict=True)]
    return found


def times_as_fast(first: Timing, other: Timing) -> Times | None:
    """How many times as fast as `first`; None unless they took turns on one machine."""
    if other is first:
        return Times(1.0)
    a, b = (np.asarray(t.block_medians_ms, float) for t in (first, other))
    if not len(a) or len(a) != len(b) or first.machine.kind != other.machine.kind:
        return None
    if len(a) < FEW_TURNS:
        return Times(ratio(a, b))
    return Times(*turns_interval(a, b))


def _latency(t: Timing) -> dict[str, tuple[float, float, float] | None]:
    """Each percentile that the samples are enough for, with its interval, ms."""
    # Many samples need fewer resamples, and a thousand of them would fill the memory.
    resamples = min(1000, max(200, 2_000_000 // max(1, len(t.samples_ms))))
    return {
        p: None if value is None
        else (value, *interval(t.samples_ms, float(p[1:]), resamples=resamples))
        for p, value in claimed(t.samples_ms).items()
    }  # fmt: skip


# ---- numbers in words


def number(x: float) -> str:
    """About three digits: '0.042', '2.31', '14.5', '145'."""
    places = sum(abs(x) < limit for limit in (1, 10, 100))
    return f"{x:.{places}f}"


def _between(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"[{number(low)},\N{NO-BREAK SPACE}{number(high)}]"


def _median(ms: Sequence[float], what: str) -> Cell:
    """The median of a few calls, and how many there were."""
    if not ms:
        return NONE
    spread = f"{number(min(ms))}–{number(max(ms))}, " if len(ms) > 1 else ""
    return Cell(f"{number(float(np.median(ms)))} ms", f"{spread}{len(ms)} {what}")


def _unit(value: float | None, unit: str, digits: int = 0, beside: str = "") -> Cell:
    return NONE if value is None else Cell(f"{value:.{digits}f} {unit}", beside)


def _percentile(s: Shown, p: str) -> Cell:
    found = s.latency[p]
    return NONE if found is None else Cell(f"{number(found[0])} ms", _between(*found[1:]))


def _times(s: Shown) -> Cell:
    if s.times is None:
        return NONE
    text = "1" if s.times == Times(1.0) else number(s.times.value)
    return Cell(text, _between(s.times.low, s.times.high))


def _accuracy(s: Shown) -> Cell:
    m = s.timing.accuracy
    if m is None:
        return NONE
    return Cell(f"{m.value:.3f}", "" if m.low is None or m.high is None
                else f"[{m.low:.3f},\N{NO-BREAK SPACE}{m.high:.3f}]")  # fmt: skip


def _executed(s: Shown) -> Cell:
    t = s.timing
    if not t.executed:
        return NONE
    other = t.executed != t.precision
    return Cell(t.executed, f"the file is {t.precision}" if other else "", other)


def _roofline(s: Shown) -> Cell:
    r = s.timing.roofline
    if r is None:
        return NONE
    return Cell(f"{100 * r.fraction:.0f} %", f"{r.bound}-bound, {r.precision}")


def _energy(s: Shown) -> Cell:
    e = s.timing.energy
    return NONE if e is None else Cell(f"{number(1e3 * e.joules)} mJ", e.source)


def _agree(s: Shown) -> Cell:
    """How far apart the turns are."""
    t = s.timing
    if not t.block_medians_ms:
        return NONE
    apart = unstable(t.block_medians_ms)
    return Cell(f"{100 * apart:.0f} %", f"{len(t.block_medians_ms)} turns", apart > AGREE)


ENDED = {"narrow": "ended by that", "cap": "the time was over"}


def _known(s: Shown) -> Cell:
    """How wide the interval is that the turns were to make narrow, and why they ended."""
    t = s.timing
    if t.within is None:
        return NONE
    if t.width is None:
        return Cell("the first")
    beside = f"{t.within:g} % asked, {ENDED[t.ended]}" if t.ended else f"{t.within:g} % asked"
    return Cell(f"{t.width:.1f} %", beside, not t.stable)


def too_wide(t: Timing) -> str:
    """Why its figures are not steady; empty if they are."""
    if t.stable:
        return ""
    if t.within is None or t.width is None:
        return "the turns do not agree within 10 %"
    return f"known within {t.width:.1f} %, {t.within:g} % asked, when the time was over"


def budget_at_paces(t: Timing) -> str:
    """How its p95 keeps the budget in some parts of the run and misses it in others; empty if it
    does not. Only of a machine that changed its pace: on a steady one parts differ by chance.
    """
    allowed = t.budget.latency_ms
    turns = len(t.block_medians_ms)
    if not allowed or not t.on_device or not turns or len(t.samples_ms) % turns:
        return ""
    if unstable(t.block_medians_ms) <= AGREE:
        return ""
    found = part_percentiles(t.samples_ms, turns, 95)
    low, high = found.min(), found.max()
    if not low <= allowed < high:
        return ""
    return f"p95 was {number(low)} to {number(high)} ms as the pace changed, {allowed:g} allowed"


def _budget(s: Shown) -> Cell:
    t = s.timing
    if not t.on_device:
        return Cell("not judged")
    if not any(v is not None for _, v in t.budget):
        return Cell("no limits stated")
    over = []
    for limit, (measured, allowed) in t.over_budget.items():
        what, _, unit = limit.rpartition("_")
        over.append(f"{what} {measured:.1f} > {allowed:g} {UNITS.get(unit, unit)}")
    return Cell("over", ", ".join(over), True) if over else Cell("within")


# ---- the table


def lines(found: Sequence[Shown]) -> list[Line]:
    """The table, a cell for each candidate in each line; lines that nobody has are dashes."""
    return [
        Line(group, what, [cell(s) for s in found])
        for group, some in (
            ("what it is", _made(found)),
            ("one image a call, back to back", _calls(found)),
            ("less often", _seldom(found)),
            ("one image, from its file to an answer", _whole()),
            ("size, memory, energy", _sizes()),
            ("how far to trust it", _trust(found)),
        )
        for what, cell in some
    ]


Cells = Iterator[tuple[str, Callable[[Shown], Cell]]]  # what, and how a candidate says it


def _made(found: Sequence[Shown]) -> Cells:
    yield "model", lambda s: Cell(s.timing.model.partition("_top1")[0])
    yield "precision", lambda s: Cell(s.timing.precision)
    yield "executed precision", _executed
    yield "cores kept busy", _busy
    if len({(s.timing.runtime, s.timing.device) for s in found}) > 1:
        yield "runtime", lambda s: Cell(f"{s.timing.runtime} on {s.timing.device}")
    yield "profile's device", lambda s: Cell("yes") if s.timing.on_device else Cell("NO", "", True)
    yield "balanced accuracy", _accuracy


def _busy(s: Shown) -> Cell:
    if s.timing.cores_busy is None:
        return NONE
    asked = f"{s.timing.threads} threads asked for" if s.timing.threads else "threads: its choice"
    return Cell(f"{s.timing.cores_busy:.1f}", asked)


def _calls(found: Sequence[Shown]) -> Cells:
    for q in ENOUGH:
        yield f"latency p{q}", lambda s, q=q: _percentile(s, f"p{q}")  # type: ignore[misc]
    yield f"times as fast as {found[0].name}", _times
    yield "throughput", _throughput


def _throughput(s: Shown) -> Cell:
    if s.timing.throughput_ips is None:
        return NONE
    beside = f"batch {s.timing.throughput_batch}, for {s.timing.throughput_hint}"
    return Cell(f"{s.timing.throughput_ips:.0f}/s", beside)


def _seldom(found: Sequence[Shown]) -> Cells:
    gaps = sorted({g for s in found for g in s.timing.idle_ms}, key=float)
    for gap in gaps:
        yield f"call after {gap} s idle", lambda s, gap=gap: _median(  # type: ignore[misc]
            s.timing.idle_ms.get(gap, ()), "calls")  # fmt: skip
    if not gaps:
        yield "call after idling", lambda _: NONE
    yield "cold start to first answer", lambda s: _median(s.timing.cold_ms, "processes")
    yield "load", lambda s: Cell(f"{number(s.timing.load_ms)} ms")
    yield (
        "first call",
        lambda s: NONE if s.timing.first_ms is None else Cell(f"{number(s.timing.first_ms)} ms"),
    )


def _whole() -> Cells:
    yield "prepare", lambda s: _median(s.timing.prepare_ms, "images")
    yield "inference (p50)", lambda s: Cell(_percentile(s, "p50").text)
    yield "explanation", lambda s: _median(s.timing.explain_ms, "maps")
    yield "whole, without explanation", lambda s: _median(s.timing.whole_ms, "images")


def _sizes() -> Cells:
    yield "parameters", lambda s: _unit(s.timing.params / 1e6, "M", 2)
    yield "MACs", lambda s: _unit(s.timing.macs / 1e6, "M")
    yield "file size", lambda s: _unit(s.timing.size_bytes / 1e6, "MB", 1)
    yield "resident memory", lambda s: _unit(s.timing.resident_mb, "MB", beside="at rest, loaded")
    yield "peak memory", lambda s: _unit(s.timing.peak_mb, "MB")
    yield "energy of one image", _energy
    yield (
        "power at rest",
        lambda s: NONE if s.timing.energy is None else _unit(s.timing.energy.idle_watts, "W", 1),
    )
    yield "of the roofline", _roofline


def _trust(found: Sequence[Shown]) -> Cells:
    yield "samples", lambda s: Cell(str(len(s.timing.samples_ms)))
    yield "turns apart", _agree
    yield "ratio known within" if len(found) > 1 else "median known within", _known
    yield "budget", _budget


WHY = {  # line -> why it may be absent
    "executed precision": "not asked, or the runtime does not tell",
    "cores kept busy": "an older edgekd timed it",
    "balanced accuracy": "not judged on the test split",
    "energy of one image": "this machine does not tell",
    "power at rest": "this machine does not tell",
    "of the roofline": "the machine's peak was not measured",
    "turns apart": "no turns were kept",
} | {f"latency p{q}": f"claimed from {n} samples on" for q, n in ENOUGH.items()}


ABSENT = {"energy of one image": "energy", "power at rest": "energy"}  # line -> in Timing.absent


def absent(table: Sequence[Line], shown: Sequence[Shown]) -> list[str]:
    """'latency p99 (claimed from 662 samples on)': lines with a dash, by reason."""
    tried = {what: why for s in shown for what, why in s.timing.absent.items()}
    found: dict[str, list[str]] = {}
    for line in table:
        if NONE in line.cells:
            ratios = line.what.startswith("times as fast")
            why = "no turns beside the first" if ratios else WHY.get(line.what, "not asked")
            if line.what.startswith("call after") and any(c != NONE for c in line.cells):
                why = "asked of the last file alone"
            why = tried.get(ABSENT.get(line.what, ""), why)
            found.setdefault(why, []).append(line.what)
    return [f"{', '.join(what)} ({why})" for why, what in found.items()]


def doubts(found: Sequence[Shown]) -> list[str]:
    """What makes the figures doubtful, a sentence each, and whose they are unless all share it."""
    whose: dict[str, list[str]] = {}
    for s in found:
        t = s.timing
        for text in dict.fromkeys(filter(None, (*t.noise, too_wide(t), budget_at_paces(t)))):
            whose.setdefault(text, []).append(s.name)
    return [
        text if len(who) == len(found) > 1 else f"{', '.join(who)}: {text}"
        for text, who in whose.items()
    ]


def where(found: Sequence[Shown]) -> str:
    """On what the figures were measured, and whether that is the profile's device."""
    places = dict.fromkeys(
        f"{s.timing.runtime} on {s.timing.device}, {s.timing.machine.cpu}" for s in found
    )
    not_on = [s.name for s in found if not s.timing.on_device]
    if not not_on:
        said = "the profile's runtime and device"
    elif len(not_on) == len(found):
        said = "NOT the profile's device: its budget is not judged"
    else:
        said = f"NOT the profile's device for {', '.join(not_on)}"
    return f"{' and '.join(places)}: {said}"


# ---- for other programs


def markdown(found: Sequence[Shown], table: Sequence[Line], title: str, command: str) -> str:
    """The table for an issue or a README, with the machine; lines that nobody has are left out."""
    rows = [["", *(s.name for s in found)], ["---", *("---:" for _ in found)]]
    for line in table:
        if any(c != NONE for c in line.cells):
            cells = map(str, line.cells)
            rows.append([line.what, *cells])
    text = [f"**{_escaped(title)}**", "", f"Measured on {_escaped(where(found))}.", ""]
    text += [f"- machine: {_escaped(m)}" for m in dict.fromkeys(
        str(s.timing.machine) for s in found)]  # fmt: skip
    text += [f"- command: {_escaped(command)}", ""]
    text += ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    text += ["", *(f"- noise: {_escaped(d)}" for d in doubts(found))]
    if missing := absent(table, found):
        text.append(f"- –: not measured: {_escaped('; '.join(missing))}")
    return "\n".join(text) + "\n"


def _escaped(text: str) -> str:
    """`text` that opens no cell, tag, picture or link in Markdown."""
    text = " ".join(text.replace("\\", "\\\\").split())
    for sign, said in (("|", "\\|"), ("<", "&lt;"), ("](", "]\\("), ("`", "\\`")):
        text = text.replace(sign, said)
    return text


def csv(found: Sequence[Shown]) -> str:
    """A row a candidate; headers name the unit. What was not measured is empty."""
    gaps = sorted({g for s in found for g in s.timing.idle_ms}, key=float)
    rows = [dict(_fields(s, gaps)) for s in found]
    buffer = io.StringIO()
    writer = csv_format.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _fields(s: Shown, gaps: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(header, value) of one candidate; None: an empty field."""
    t = s.timing
    yield "name", s.name
    for key in ("model", "role", "precision", "executed", "artifact_sha256", "runtime", "device",
                "threads", "cores_busy", "batch"):  # fmt: skip
        yield key, getattr(t, key)
    yield "on_profile_device", str(t.on_device).lower()
    yield "machine", str(t.machine)
    yield from _metric("balanced_accuracy", t.accuracy)
    for p, value in s.latency.items():
        for which, x in zip(("", "_low", "_high"), value or (None,) * 3, strict=True):
            yield f"latency_{p}{which}_ms", x
    yield from _metric("times_as_fast", s.times)
    for key in ("throughput_ips", "throughput_batch", "throughput_hint"):
        yield key, getattr(t, key)
    for gap in gaps:
        yield f"after_idle_{gap}s_p50_ms", _middle(t.idle_ms.get(gap, ()))
    for key in ("cold", "prepare", "explain", "whole"):
        yield f"{key}_p50_ms", _middle(getattr(t, f"{key}_ms"))
    for key in ("load_ms", "first_ms", "params", "macs", "size_bytes", "resident_mb", "peak_mb"):
        yield key, getattr(t, key)
    yield "energy_j", t.energy and t.energy.joules
    yield "idle_w", t.energy and t.energy.idle_watts
    yield "energy_source", t.energy and t.energy.source
    yield "roofline_fraction", t.roofline and t.roofline.fraction
    yield "intensity_ops_per_byte", t.roofline and t.roofline.intensity
    yield "samples", len(t.samples_ms)
    yield "turns", len(t.block_medians_ms)
    yield "turns_apart", unstable(t.block_medians_ms) if t.block_medians_ms else None
    yield "ratio_asked_percent", t.within
    yield "ratio_width_percent", t.width
    yield "ended", t.ended
    yield "stable", str(t.stable).lower()
    yield "noise", "; ".join(t.noise)
    over = "; ".join(f"{k} {m:g} > {b:g}" for k, (m, b) in t.over_budget.items())
    yield "over_budget", over if t.on_device else None


def _metric(name: str, found: Any) -> Iterator[tuple[str, float | None]]:
    """A figure and its interval."""
    yield name, found and found.value
    yield f"{name}_low", found and found.low
    yield f"{name}_high", found and found.high


def _middle(ms: Sequence[float]) -> float | None:
    return float(np.median(ms)) if ms else None
