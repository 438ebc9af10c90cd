"""Timings -> bench.html, bench.md and bench.csv; the page has no scripts and asks nobody outside.

Every table and drawing says whether its figures are from the profile's device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from edgekd.bench import plots, tables
from edgekd.bench.tables import Cell, Shown, Times, number
from edgekd.metrics.latency import ENOUGH
from edgekd.records import EdgeKDError, Timing, make_folder, write_atomic
from edgekd.report.drawings import Drawing
from edgekd.report.html import import_plotting, template

PAGE, TABLE, ROWS = "bench.html", "bench.md", "bench.csv"
DASH = tables.NONE.text


class Head(NamedTuple):
    """The box on top: the last candidate, the one to be deployed."""

    on_device: bool
    name: str
    facts: list[tuple[str, str]]


def write(
    out: Path,
    timings: Sequence[Timing],
    *,
    title: str,
    command: str,
    ratios: Sequence[Times | None] = (),
) -> Path:
    """Write `out`/bench.html, bench.md and bench.csv; returns the page's path.

    The first timing is what the others are compared with, the last is the file to be deployed.
    ratios: of each to the first, where the caller knows more than the turns of `timings`. The same
    timings give the same bytes. EdgeKDError without timings, jinja2 or matplotlib.
    """
    if not timings:
        raise EdgeKDError("nothing was timed: run edgekd bench first")
    import_plotting()
    found = tables.shown(timings, ratios)
    table = tables.lines(found)
    page = template("bench.html.j2", Path(__file__).parent).render(
        title=title,
        names=[s.name for s in found],
        head=_head(found[-1]),
        where=tables.where(found),
        on_device=all(t.on_device for t in timings),
        table=table,
        absent=tables.absent(table, found),
        doubts=tables.doubts(found),
        drawings=_drawings(found),
        drift=plots.drift(found),
        layers=list(_layers(found[-1].timing)),
        settings=list(_settings(found, command)),
        method=list(_method(found)),
    )
    path = make_folder(out) / PAGE
    write_atomic(out / TABLE, tables.markdown(found, table, title, command))
    write_atomic(out / ROWS, tables.csv(found))
    write_atomic(path, page)
    return path


def _head(last: Shown) -> Head:
    t = last.timing
    facts = [("file", f"{t.model.partition('_top1')[0]}, sha256 {t.artifact_sha256[:16]}")]
    for p in ("p50", "p95"):
        found = last.latency[p]
        few = f"{DASH} ({len(t.samples_ms)} samples, claimed from {ENOUGH[int(p[1:])]} on)"
        said = f"{number(found[0])} ms [{number(found[1])}, {number(found[2])}]" if found else few
        facts.append((p, said))
    facts.append(("on", f"{t.runtime} on {t.device}, {t.machine.cpu}"))
    return Head(t.on_device, last.name, facts)


def _drawings(found: Sequence[Shown]) -> dict[str, Drawing | None]:
    """Name in the template -> drawing; None where there is nothing to draw."""
    return {
        "spread": plots.spread(found),
        "accuracy": plots.accuracy(found),
        "size": plots.size(found),
        "memory": plots.memory(found),
        "roofline": plots.roofline(found),
    }


def _layers(t: Timing) -> Iterator[list[Cell]]:
    """Name, kind, precision, time, share, MACs and roofline of each layer, slowest first."""
    for layer in sorted(t.layers, key=lambda x: -x.ms):
        other = bool(layer.precision) and layer.precision != t.precision
        yield [
            Cell(layer.name),
            Cell(layer.kind),
            Cell(layer.precision or DASH, "", other),
            Cell(f"{number(layer.ms)} ms"),
            Cell(f"{100 * layer.share:.1f} %"),
            Cell(DASH if layer.macs is None else f"{layer.macs / 1e6:.2f} M"),
            Cell(DASH if layer.fraction is None else f"{100 * layer.fraction:.0f} %"),
        ]


def _settings(found: Sequence[Shown], command: str) -> Iterator[tuple[str, str]]:
    """Machine, its state meanwhile, versions and files."""
    yield "command", command
    for text in dict.fromkeys(str(s.timing.machine) for s in found):
        yield "machine", text
    for text in dict.fromkeys(_state(s.timing) for s in found):
        yield "meanwhile", text or f"{DASH} (this machine told nothing)"
    versions = dict.fromkeys(f"{k} {v}" for s in found for k, v in s.timing.versions.items())
    yield "versions", ", ".join(versions) or DASH
    for peak in dict.fromkeys(
        f"{r.peak.how}, {r.peak.threads} threads: "
        + ", ".join(f"{k} {number(g)} GFLOP/s" for k, g in r.peak.gflops.items())
        + f"; {number(r.peak.bandwidth_gbs)} GB/s"
        for s in found
        if (r := s.timing.roofline)
    ):
        yield "peak", peak
    for s in found:
        t = s.timing
        threads = f"threads: {t.threads}" if t.threads else "threads chosen by the runtime"
        yield s.name, f"{t.runtime} on {t.device}, {threads}, sha256 {t.artifact_sha256}"


def _state(t: Timing) -> str:
    """The machine while it was measured, as far as it tells."""
    c, told = t.conditions, []
    if c.governor:
        told.append(f"governor {c.governor}")
    if c.load_1min is not None:
        told.append(f"load before {c.load_1min:.2f}")
    if c.busy is not None:
        told.append(f"others' work {c.busy:.2f} CPUs")
    if c.steal is not None:
        told.append(f"{100 * c.steal:.1f} % of CPU time given to other guests of the host")
    if c.throttled is not None:
        told.append(f"throttled {c.throttled} times")
    return ", ".join(told)


def _method(found: Sequence[Shown]) -> Iterator[str]:
    """How it was measured, in sentences that hold for these records."""
    t = found[-1].timing
    yield "Each file has a process of its own, and one works at a time while the others sleep."
    turns = len(t.block_medians_ms)
    if turns:
        order = " (A B B A A B …)" if len(found) > 1 else ""
        yield (
            f"Samples are taken in {turns} turns{order}, each after {t.warmup} untimed calls, so "
            "that a machine that slows down for a while slows all of them."
        )
    else:
        yield f"Samples are taken after {t.warmup} untimed calls."
    yield "A call is one image, from host memory to host memory, at batch 1."
    asked = ", ".join(f"p{q} from {n}" for q, n in ENOUGH.items() if n > 1)
    yield (
        f"A percentile is claimed only from enough samples: {asked} (the counts of MLPerf's early "
        "stopping). Brackets: 95 % intervals, bootstrapped over runs of neighbouring samples."
    )
    if len(found) > 1:
        yield (
            "Times as fast: the median over turns of the first's median by the candidate's of the "
            "same turn; its 95 % interval is Student's t of the medians of eight runs of "
            "neighbouring turns. It is of these processes: in others the same file may be a few "
            "hundredths faster or slower (edgekd bench --against takes several)."
        )
    if t.within is not None:
        whose = "each ratio to the first" if len(found) > 1 else "the median"
        early = "with the time for them, before" if t.ended == "cap" else "when"
        yield (
            f"Turns ended {early} the interval of {whose} was at most {t.within:g} % wide at two "
            "looks in a row."
        )
    if any(s.timing.roofline for s in found):
        yield (
            "Roofline: the ideal time is the longer of all operations at the measured peak and "
            "weights, input and output moved once at the measured bandwidth; the share is that "
            "time by the median."
        )
