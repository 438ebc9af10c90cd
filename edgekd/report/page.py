"""Records -> one self-contained HTML page: no scripts, no outside requests, fit to be printed."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from edgekd.explain.score_cam import overlay
from edgekd.metrics.latency import claimed, percentiles
from edgekd.records import (
    Aggregate,
    Artifact,
    EdgeKDError,
    Fidelity,
    Machine,
    Metric,
    Profile,
    Timing,
    make_folder,
    write_atomic,
)
from edgekd.report import cases, elsewhere, explanations, machine_readable, scorecard
from edgekd.report.drawings import COLOURS, Drawing, figure, svg
from edgekd.report.gallery import Pair, Panel, difference
from edgekd.report.html import import_plotting, template
from edgekd.report.layer_strips import Strip

PAGE, FIGURES, CASES = "report.html", "report.json", "cases.csv"
SIDE = 224  # pixels of a picture's longer side in the gallery
SCORES = {
    "test_balanced_accuracy": "balanced accuracy",
    "test_macro_f1": "macro F1",
    "test_macro_auroc": "macro AUROC",
    "test_ece": "ECE, calibrated",
}
UNITS = {"ms": "ms", "m": "M", "mb": "MB"}  # last word of a budget's limit -> as it is written


class Row(NamedTuple):
    """One model of the table; the first is the teacher, the last the file to be deployed."""

    name: str  # as in the comparisons: "teacher fp32"
    artifact: Artifact
    timing: Timing | None


def write(
    out: Path,
    *,
    title: str,
    rows: Sequence[Row],
    fidelity: Fidelity | None,
    panels: Sequence[Panel],
    profile: Profile,
    notes: Sequence[str],
    command: str,
    pictures: bool = True,
    strips: Sequence[Strip] = (),
    swayed: Sequence[Pair] = (),
    intended_use: str = "",
) -> Path:
    """Write `out`/report.html, report.json and cases.csv; returns the page's path.

    pictures: False leaves every pixel out, the numbers stay. The same records give the same bytes.
    """
    if not rows:
        raise EdgeKDError("nothing to report: run edgekd distill first")
    if fidelity:
        _check_margins(fidelity, profile)
    import_plotting()
    reference = fidelity.comparisons[0].name if fidelity else rows[0].name
    told = cases.held(fidelity.comparisons) if fidelity else []
    page = template("report.html.j2").render(
        title=title,
        rows=rows,
        summary=list(_summary(rows, fidelity)),
        tiles=list(_tiles(rows, fidelity)),
        models=[x for x in _models(rows) if any(cell != "–" for cell in x[1])],
        scores=scorecard.of([(r.name, r.artifact) for r in rows]),
        where=_where(rows, profile),
        latency=_latency(rows, profile),
        scatter=_scatter(rows),
        fidelity=fidelity,
        box=explanations.box(fidelity),
        testimony=explanations.of(rows, fidelity) if fidelity else None,
        elsewhere=elsewhere.of(fidelity) if fidelity else None,
        reference=reference,
        panels=sorted(panels, key=lambda p: _worst(p, told)),
        deepest=told[-1] if told else "",
        swayed=swayed,
        apart=_difference,
        pictures=pictures,
        strips=strips,
        png=_png,
        picture=lambda panel, heat: _png(_picture(panel, heat)),
        plain=lambda pixels: _png(_sized(pixels)),
        scale=_png(overlay(np.full((14, 160, 3), 120, np.uint8), np.linspace(0, 1, 160)[None])),
        settings=list(_settings(rows, profile, notes, command)),
        card=list(machine_readable.card(rows[-1].artifact, intended_use)),
    )
    path = make_folder(out) / PAGE
    write_atomic(
        out / FIGURES, machine_readable.figures(title, rows, fidelity, profile, notes, command)
    )
    if fidelity:
        write_atomic(out / CASES, machine_readable.cases(fidelity))
    else:
        (out / CASES).unlink(missing_ok=True)  # of maps that are no more
    write_atomic(path, page)
    return path


def _check_margins(fidelity: Fidelity, profile: Profile) -> None:
    """EdgeKDError if the margins are not those that were declared before the run."""
    said = fidelity.margins_sha256
    if said and not fidelity.margins.declared_as(said):
        raise EdgeKDError(
            "the margins in fidelity.json are not those that were declared (their sha256 "
            "differs): run edgekd explain again"
        )
    if said and not profile.margins.declared_as(said):
        raise EdgeKDError(
            f"the margins of profile {profile.name} were changed after edgekd explain judged by "
            "them: restore them, or run edgekd explain again"
        )


# ---- words and numbers


def _metric(m: Metric | None) -> str:
    """'0.951 [0.912, 0.979]'; the interval stays on one line."""
    if m is None or m.low is None or m.high is None:
        return "–" if m is None else f"{m.value:.3f}"
    return f"{m.value:.3f} [{m.low:.3f},\N{NO-BREAK SPACE}{m.high:.3f}]"


def _accuracy(row: Row) -> Metric | None:
    return row.artifact.metrics.get("test_balanced_accuracy")


def _aggregate(fidelity: Fidelity | None, key: str) -> Aggregate | None:
    """A figure of the file to be deployed."""
    deployed = fidelity.comparisons[1:] if fidelity else ()
    return deployed[-1].aggregate.get(key) if deployed else None


def _times(own: float, its: float) -> str:
    """'9.4 times fewer' or '1.6 times more' than `its`."""
    if not own or not its or f"{own / its:.2g}" == "1":
        return "as many"
    return f"{its / own:.2g} times fewer" if own < its else f"{own / its:.2g} times more"


def _pace(first: Row, last: Row) -> str:
    """Median latency beside the first model's, if one runtime, device and machine timed both."""
    a, b = first.timing, last.timing
    if not a or not b or a is b or (a.runtime, a.device, a.machine.kind) != (
        b.runtime, b.device, b.machine.kind
    ):  # fmt: skip
        return ""
    ratio = percentiles(a.samples_ms)["p50"] / percentiles(b.samples_ms)["p50"]
    return f", {ratio:.2g} times as fast as {first.name}"


def _summary(rows: Sequence[Row], fidelity: Fidelity | None) -> Iterator[str]:
    """The page in a few sentences, each made from the numbers below."""
    first, last = rows[0], rows[-1]
    images = sum(int(c["images"]) for c in last.artifact.per_class.values())
    tested = f", {images} test images" if images else ""
    yield f"{len(last.artifact.spec.classes)} classes{tested}."
    scored = [f"{_metric(m)} ({r.name})" for r in rows if (m := _accuracy(r))]
    if scored:
        yield "Balanced accuracy " + ", ".join(scored) + "."
    if first is not last:
        own, its = last.artifact, first.artifact
        yield (
            f"Beside {first.name}, the deployed file ({last.name}) has "
            f"{_times(own.params, its.params)} parameters and "
            f"{_times(own.macs, its.macs)} multiply-accumulates."
        )
    if last.timing:
        q = percentiles(last.timing.samples_ms)
        where = "" if last.timing.on_device else " on this machine, not on the profile's device"
        yield (
            f"The file answers in {q['p50']:.2f} ms (median; 95 % within {q['p95']:.2f} ms)"
            f"{_pace(first, last)}{where}."
        )
    yield from _told(fidelity)


def _told(fidelity: Fidelity | None) -> Iterator[str]:
    """What the heat maps of the file to be deployed say, in sentences."""
    r, e, m = (_aggregate(fidelity, k) for k in ("pearson", "energy", "enrichment"))
    if fidelity and r:
        null = "" if r.null is None else f", and {r.null:.2f} with those of other patients"
        reference = fidelity.comparisons[-1].reference or fidelity.comparisons[0].name
        yield f"Its heat maps correlate {r.value:.2f} with {reference}'s of the same image{null}."
    if e and m:
        share, times = f"{100 * e.value:.0f} %", f"{m.value:.1f} times"
        yield f"They put {share} of their energy into the masks, {times} what even maps would."


def _tiles(rows: Sequence[Row], fidelity: Fidelity | None) -> Iterator[tuple[str, str, str]]:
    """(value, what, beside it): the few numbers that a reader looks for first."""
    first, last = rows[0], rows[-1]
    versus = f"{first.name} " if first is not last else ""
    m, t = _accuracy(last), _accuracy(first)
    if m and t:
        yield f"{m.value:.3f}", "balanced accuracy", versus and f"{versus}{t.value:.3f}"
    own, its = (f"{r.artifact.params / 1e6:.2f} M" for r in (last, first))
    yield own, "parameters", versus and versus + its
    if last.timing:
        q = percentiles(last.timing.samples_ms)
        beside = "on the profile's device" if last.timing.on_device else "not the profile's device"
        yield f"{q['p95']:.2f} ms", "latency p95", beside
    for key, what in (("pearson", "agreement of maps"), ("enrichment", "enrichment in masks")):
        if a := _aggregate(fidelity, key):
            beside = "" if a.null is None else f"stranger's {a.null:.2f}"
            yield f"{a.value:.2f}", what, beside


def _models(rows: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """Lines of the model table: (what, a cell for each model)."""
    made = [r.artifact for r in rows]

    def timed(show: Any) -> list[str]:
        return ["–" if r.timing is None else show(r.timing) for r in rows]

    yield "network", [a.model.partition("_top1")[0] for a in made]
    yield "precision", [a.precision for a in made]
    for key, what in SCORES.items():
        yield what, [_metric(a.metrics.get(key)) for a in made]
    yield "parameters", [f"{a.params / 1e6:.2f} M" for a in made]
    yield "multiply-accumulates", [f"{a.macs / 1e6:.0f} M" for a in made]
    yield "file size", [f"{a.size_bytes / 1e6:.1f} MB" for a in made]
    for p in ("p50", "p95", "p99"):
        yield f"latency {p}", timed(lambda t, p=p: _ms(claimed(t.samples_ms)[p]))
    yield (
        "throughput",
        timed(
            lambda t: (
                f"{t.throughput_ips:.0f}/s, batch {t.throughput_batch}"
                if t.throughput_ips
                else "not asked"
            )
        ),
    )
    yield "peak memory", timed(lambda t: f"{t.peak_mb:.0f} MB")
    yield "explained layer", [a.layer or "–" for a in made]
    yield "runtime", timed(lambda t: f"{t.runtime} on {t.device}")
    yield "profile's device", timed(lambda t: "yes" if t.on_device else "no: this machine")
    yield "budget", timed(_budget)


def _ms(value: float | None) -> str:
    return "too few calls" if value is None else f"{value:.2f} ms"


def _budget(t: Timing) -> str:
    if not t.on_device:
        return "not judged"
    if not any(v is not None for _, v in t.budget):
        return "no limits stated"
    over = []
    for limit, (measured, allowed) in t.over_budget.items():
        what, _, unit = limit.rpartition("_")
        over.append(f"{what} {measured:.1f} > {allowed:g} {UNITS.get(unit, unit)}")
    return f"over: {', '.join(over)}" if over else "within"


def _machine(m: Machine) -> str:
    return f"{m}" + (f", load {m.load_1min:.1f}" if m.load_1min is not None else "")


def _where(rows: Sequence[Row], profile: Profile) -> str:
    """Where the timings are from, in a sentence or two."""
    timings = [r.timing for r in rows if r.timing]
    if not timings:
        return "Not timed yet: edgekd bench."
    machines = " and ".join(dict.fromkeys(f"{t.machine.cpu}" for t in timings))
    fewest = min(len(t.samples_ms) for t in timings)
    text = f"Timed on {machines}, one image at a time, at least {fewest} samples a model. "
    if all(t.on_device for t in timings):
        return text + f"This is the runtime and kind of device of profile {profile.name}."
    return text + (
        "Measured on this machine, not on the profile's device "
        f"({profile.name}: {profile.runtime} on {profile.device}), where the table says so."
    )


def _settings(
    rows: Sequence[Row], profile: Profile, notes: Sequence[str], command: str
) -> Iterator[tuple[str, str]]:
    """What is needed to make this page again."""
    last = rows[-1].artifact
    yield "command", command
    yield "profile", f"{profile.name}: {profile.runtime} on {profile.device}"
    yield "data", f"fingerprint {last.data_fingerprint[:16]}; {last.split_rule}"
    for note in notes:
        yield "note", note
    size, spec = last.spec.size, last.spec
    yield "input", f"{size[0]} × {size[1]}, {spec.channels}, resize: {spec.resize}"
    for text in dict.fromkeys(_machine(r.timing.machine) for r in rows if r.timing):
        yield "timed on", text
    for row in rows:
        made = row.artifact
        parents = ", ".join(f"{k} {v[:12]}" for k, v in made.parents.items())
        lineage = f"sha256 {made.sha256[:16]}, seed {made.seed}"
        yield row.name, lineage + (f", from {parents}" if parents else "")
        yield f"{row.name} made with", ", ".join([*_flat(made.settings), *_flat(made.versions)])


def _flat(settings: Mapping[str, Any]) -> Iterator[str]:
    """'epochs 20', 'lr 0.002', ...: nested settings in line, digests short."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            text = str(value)
            yield f"{key} {text[:16] if re.fullmatch('[0-9a-f]{64}', text) else text}"


# ---- drawings


def _latency(rows: Sequence[Row], profile: Profile) -> Drawing | None:
    """The spread of latency of each model that was timed, on a logarithmic axis."""
    timed = [(i, r.name, np.array(r.timing.samples_ms)) for i, r in enumerate(rows) if r.timing]
    if not timed:
        return None
    from matplotlib.ticker import LogLocator

    drawn, axes = figure(6.0, 0.9 + 0.62 * len(timed))
    told, seen = [], []
    for y, (i, name, samples) in enumerate(timed):
        low, q25, q50, q75, q95, high = np.percentile(samples, (1, 25, 50, 75, 95, 99)).tolist()
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([low, high], [-y, -y], color=colour, linewidth=1.5)
        axes.barh(-y, q75 - q25, left=q25, height=0.5, color=colour, alpha=0.6)
        axes.plot([q50, q50], [-y - 0.25, -y + 0.25], color="black", linewidth=1.5)
        axes.plot(q95, -y, "D", color=colour, markersize=6, markeredgecolor="white")
        axes.annotate(f"{q50:.2f}, p95 {q95:.2f}", (high, -y), (7, 0), va="center", fontsize=8,
                      textcoords="offset points", backgroundcolor="white")  # fmt: skip
        told.append(f"{name}: median {q50:.2f} ms, p95 {q95:.2f} ms")
        seen += [low, high]
    limit = profile.budget.latency_ms
    if limit and limit <= 3 * max(seen):
        axes.axvline(limit, color="#a3243b", linestyle="--", linewidth=1, zorder=0)
        seen.append(limit)
    axes.set_yticks([-y for y in range(len(timed))], [name for _, name, _ in timed])
    axes.set_ylim(-len(timed) + 0.45, 0.65)
    low, high = max(min(seen), 1e-4), max(*seen, 1e-4)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, 1.3 * high * (high / low) ** 0.35)  # room for the last words
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("latency of one image, ms")
    return svg(drawn), "Latency. " + "; ".join(told)


def _scatter(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy against latency of each model that has both."""
    both = [(i, r, r.timing, m) for i, r in enumerate(rows) if r.timing and (m := _accuracy(r))]
    if not both:
        return None
    drawn, axes = figure(4.4, 3.1)
    told = []
    for i, row, timing, m in both:
        q50 = percentiles(timing.samples_ms)["p50"]
        spread = None
        if m.low is not None and m.high is not None:
            spread = [[max(0, m.value - m.low)], [max(0, m.high - m.value)]]
        axes.errorbar(q50, m.value, yerr=spread, marker="o", capsize=3, linestyle="",
                      color=COLOURS[i % len(COLOURS)], label=row.name)  # fmt: skip
        told.append(f"{row.name}: {_metric(m)} at {q50:.2f} ms")
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("balanced accuracy")
    longest = max(len(r.name) for _, r, *_ in both)
    columns = max(1, min(3, int(4.4 / (0.5 + 0.065 * longest))))  # inches
    drawn.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return svg(drawn), "Accuracy against latency. " + "; ".join(told)


# ---- gallery


def _worst(panel: Panel, told: Sequence[str]) -> tuple[float, str]:
    """Lowest agreement of these models; an undefined map comes first."""
    found = [panel.agreement[name] for name in told if name in panel.agreement]
    return min((-2.0 if r is None else r for r in found), default=0.0), panel.image


def _picture(panel: Panel, heat: np.ndarray | None) -> np.ndarray:
    """(h, w, 3) uint8, its longer side SIDE: the image, heat over it, the mask's outline on top."""
    picture = _sized(panel.pixels)
    if heat is not None:
        picture = overlay(picture, heat)
    if panel.mask is None or not panel.mask.any():
        return picture
    size = picture.shape[1::-1]
    mask = Image.fromarray(panel.mask).resize(size, Image.Resampling.NEAREST)
    return _outlined(picture, np.asarray(mask))


def _sized(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 of (H, W, 3), its longer side SIDE."""
    h, w = pixels.shape[:2]
    size = (max(1, round(SIDE * w / max(h, w))), max(1, round(SIDE * h / max(h, w))))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _difference(panel: Panel, name: str) -> str:
    """`gallery.difference` as a data: address; empty where there is none."""
    found = difference(panel, name)
    return "" if found is None else _png(_sized(found))


def _outlined(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`pixels` (H, W, 3) uint8 with the edge of `mask` (H, W) bool in cyan, two pixels wide."""
    drawn = pixels.copy()
    drawn[mask & ~_eroded(_eroded(mask))] = (0, 220, 230)
    return drawn


def _eroded(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels of `mask` whose four neighbours are in it too."""
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _png(pixels: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
