"""Records -> one self-contained HTML page: no scripts, no outside requests, fit to be printed."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from edgekd.bench import percentiles
from edgekd.explain import overlay
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Fidelity,
    Metric,
    Profile,
    Timing,
    make_folder,
    write_atomic,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
SIDE = 176  # pixels of a picture in the gallery
COLOURS = ("#4c566a", "#2a6f97", "#bc5090", "#7a9e3a", "#c77d12")  # told apart without red-green
NAMES = {
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "iou20": "overlap of the top 20 %",
    "energy": "energy inside the mask",
    "enrichment": "energy inside / area of the mask",
    "hit": "peak inside the mask",
}


class Row(NamedTuple):
    """One model of the table."""

    name: str  # as in the comparisons: "teacher fp32"
    artifact: Artifact
    timing: Timing | None


class Panel(NamedTuple):
    """One image of the gallery."""

    image: str  # start of the file's hash, never its name
    label: str
    pixels: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray | None  # (H, W) bool
    maps: dict[str, np.ndarray | None]  # name -> (H, W) float32 in [0, 1]; None: undefined
    answers: dict[str, tuple[str, float]]  # name -> (class, probability)
    agreement: dict[str, float | None]  # name -> Pearson with the reference's map


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
) -> Path:
    """Write `out`/report.html and return its path. The same records give the same bytes."""
    if not rows:
        raise EdgeKDError("nothing to report: run edgekd distill first")
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError:
        raise EdgeKDError("the report needs jinja2: pip install 'edgekd[report]'") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reference = fidelity.comparisons[0].name if fidelity else ""
    page = environment.get_template("report.html.j2").render(
        title=title,
        summary=_summary(rows, fidelity),
        names=[r.name for r in rows],
        models=list(_models(rows)),
        per_class=_per_class(rows),
        classes=rows[0].artifact.spec.classes,
        plots=_plots(rows),
        where=_where(rows, profile),
        fidelity=fidelity,
        agreement=list(_agreement(fidelity)) if fidelity else [],
        histogram=_histogram(fidelity) if fidelity else "",
        panels=[_shown(p, reference) for p in sorted(panels, key=lambda p: _worst(p, reference))],
        settings=list(_settings(rows, profile, notes, command)),
        reference=reference,
    )
    return _write(make_folder(out) / PAGE, page)


def _write(path: Path, text: str) -> Path:
    write_atomic(path, text)
    return path


def _worst(panel: Panel, reference: str) -> float:
    """Lowest agreement of any model but the reference; an undefined map comes first."""
    found = [r for name, r in panel.agreement.items() if name != reference]
    return min((-2.0 if r is None else r for r in found), default=0.0)


def _accuracy(artifact: Artifact) -> Metric | None:
    return artifact.metrics.get("test_balanced_accuracy")


def _summary(rows: Sequence[Row], fidelity: Fidelity | None) -> list[str]:
    """The page in a few sentences, each made from the numbers below."""
    first, last = rows[0], rows[-1]
    images = sum(int(c["images"]) for c in last.artifact.per_class.values())
    lines = [f"{len(last.artifact.spec.classes)} classes, {images} test images."]
    a, b = _accuracy(first.artifact), _accuracy(last.artifact)
    if a and b and first is not last:
        lines.append(
            f"The deployed file ({last.name}) reaches a balanced accuracy of {b.value:.3f}"
            f"{_interval(b)}, the teacher {a.value:.3f}{_interval(a)}."
        )
    if first is not last:
        own, its = (
            f"{a.params / 1e6:.2f} M parameters in {a.size_bytes / 1e6:.1f} MB"
            for a in (last.artifact, first.artifact)
        )
        lines.append(f"It has {own}, the teacher {its}.")
    if first.timing and last.timing:
        p, q = (percentiles(t.samples_ms) for t in (first.timing, last.timing))
        lines.append(
            f"It answers in {q['p50']:.2f} ms (median; 95 % within {q['p95']:.2f} ms), "
            f"the teacher in {p['p50']:.2f} ms in the same runtime."
        )
    r = fidelity.comparisons[-1].aggregate.get("pearson") if fidelity else None
    if r and r.null is not None:
        lines.append(
            f"Its heat maps correlate {r.value:.2f} with the teacher's of the same image, and "
            f"{r.null:.2f} with the teacher's of another patient."
        )
    e = fidelity.comparisons[-1].aggregate.get("enrichment") if fidelity else None
    if e:
        lines.append(
            f"They put {e.value:.1f} times as much energy into the masks as even maps would."
        )
    return lines


def _interval(m: Metric | None) -> str:
    return "" if m is None or m.low is None or m.high is None else f" [{m.low:.3f}, {m.high:.3f}]"


def _metric(m: Metric | None) -> str:
    return "–" if m is None else f"{m.value:.3f}{_interval(m)}"


def _models(rows: Sequence[Row]) -> Iterable[tuple[str, list[str]]]:
    """Lines of the model table: (what, a cell for each model)."""
    made = [r.artifact for r in rows]
    timings = [r.timing for r in rows]

    def timed(show: Any) -> list[str]:
        return ["–" if t is None else show(t) for t in timings]

    yield "network", [a.model.partition("_top1")[0] for a in made]
    yield "precision", [a.precision for a in made]
    for key in ("balanced_accuracy", "macro_f1", "macro_auroc"):
        yield f"test {key.replace('_', ' ')}", [_metric(a.metrics.get(f"test_{key}")) for a in made]
    yield "parameters", [f"{a.params / 1e6:.2f} M" for a in made]
    yield "multiply-accumulates", [f"{a.macs / 1e6:.0f} M" for a in made]
    yield "file size", [f"{a.size_bytes / 1e6:.1f} MB" for a in made]
    for p in ("p50", "p90", "p95", "p99"):
        yield f"latency {p}", timed(lambda t, p=p: f"{percentiles(t.samples_ms)[p]:.2f} ms")
    yield (
        "throughput",
        timed(lambda t: f"{t.throughput_ips:.0f}/s in batches of {t.throughput_batch}"),
    )
    yield "peak memory", timed(lambda t: f"{t.peak_mb:.0f} MB")
    yield "explained layer", [a.layer for a in made]
    yield "budget", timed(_budget)


def _budget(t: Timing) -> str:
    if not t.on_device:
        return "not judged"
    over = ", ".join(f"{k} {m:.1f} > {b:g}" for k, (m, b) in t.over_budget.items())
    return f"over: {over}" if over else "within"


def _where(rows: Sequence[Row], profile: Profile) -> str:
    """Where the timings are from, in a sentence."""
    timing = next((r.timing for r in rows if r.timing), None)
    if timing is None:
        return "Not timed yet: edgekd bench."
    m = timing.machine
    count = len(timing.samples_ms)
    text = f"{timing.runtime} on {timing.device}: {m.cpu}, {m.cores} cores, {count} samples"
    if m.load_1min is not None:
        text += f", load {m.load_1min:.1f}"
    if timing.on_device:
        return text + f". This is the runtime and kind of device of profile {profile.name}."
    return text + f". Measured on this machine, NOT on the device of profile {profile.name}."


def _per_class(rows: Sequence[Row]) -> list[tuple[str, list[dict[str, float]]]]:
    """(class, figures of each model)."""
    classes = rows[0].artifact.spec.classes
    return [(c, [r.artifact.per_class.get(c, {}) for r in rows]) for c in classes]


def _agreement(fidelity: Fidelity) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """(figure, (value with interval, the null's) of each comparison)."""
    keys = dict.fromkeys(k for c in fidelity.comparisons for k in c.aggregate)
    for key in keys:
        cells = []
        for c in fidelity.comparisons:
            a = c.aggregate.get(key)
            null = "" if a is None or a.null is None else f"{a.null:.2f}"
            cells.append(("–" if a is None else f"{a.value:.2f} [{a.low:.2f}, {a.high:.2f}]", null))
        yield NAMES.get(key, key), cells


def _settings(
    rows: Sequence[Row], profile: Profile, notes: Sequence[str], command: str
) -> Iterable[tuple[str, str]]:
    """What is needed to make this page again."""
    last = rows[-1].artifact
    yield "command", command
    yield "profile", f"{profile.name}: {profile.runtime} on {profile.device}"
    yield "data", f"fingerprint {last.data_fingerprint[:16]}; {last.split_rule}"
    for note in notes:
        yield "data note", note
    size, spec = last.spec.size, last.spec
    yield "input", f"{size[0]} x {size[1]}, {spec.channels}, resize: {spec.resize}"
    yield "seed", str(last.seed)
    for row in rows:
        made = row.artifact
        parents = ", ".join(f"{k} {v[:12]}" for k, v in made.parents.items())
        yield row.name, f"sha256 {made.sha256[:16]}" + (f", from {parents}" if parents else "")
        yield f"{row.name} made with", ", ".join(f"{k} {v}" for k, v in made.versions.items())


def _svg(figure: Figure) -> str:
    """A matplotlib figure as inline SVG, the same bytes each time."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "edgekd", "svg.fonttype": "none"}):
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)  # names outside addresses
    return svg.replace("xlink:href", "href")


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plots(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(SVG, caption): the spread of latency, and accuracy against it."""
    timed = [(r, np.array(r.timing.samples_ms)) for r in rows if r.timing]
    if not timed:
        return []
    figure, axes = _figure(6.2, 0.7 + 0.55 * len(timed))
    for i, (_row, samples) in enumerate(timed):
        colour = COLOURS[i % len(COLOURS)]
        box = axes.boxplot(samples, positions=[-i], orientation="horizontal", widths=0.55,
                           whis=(1, 99), showfliers=False, patch_artist=True)  # fmt: skip
        box["boxes"][0].set(facecolor=colour, alpha=0.55)
        box["medians"][0].set(color="black")
        axes.plot(np.percentile(samples, 95), -i, "|", color="black", markersize=16, mew=2)
    axes.set_yticks([-i for i in range(len(timed))], [r.name for r, _ in timed])
    axes.set_xlim(left=0)
    axes.set_xlabel("latency of one image, ms")
    caption = "Latency: box from the 25th to the 75th percentile, whiskers 1st to 99th, bar at p95."
    plots = [(_svg(figure), caption)]
    figure, axes = _figure(4.2, 2.6)
    for i, (row, samples) in enumerate(timed):
        m = _accuracy(row.artifact)
        if m is None:
            continue
        spread = None
        if m.low is not None and m.high is not None:
            spread = [[max(0, m.value - m.low)], [max(0, m.high - m.value)]]
        axes.errorbar(np.median(samples), m.value, yerr=spread, marker="o", capsize=3,
                      color=COLOURS[i % len(COLOURS)], label=row.name, linestyle="")  # fmt: skip
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("balanced accuracy")
    axes.legend(fontsize=8, frameon=False)
    return [
        *plots,
        (_svg(figure), "Accuracy (95 % interval) against latency: up and left is better."),
    ]


def _histogram(fidelity: Fidelity) -> str:
    """Agreement image by image, the strangers' behind it."""
    others = fidelity.comparisons[1:]
    if not others:
        return ""
    figure, _ = _figure(9.2, 0.1)
    figure.clear()
    figure.set_size_inches(4.6 * len(others), 2.5)
    bins = np.linspace(-1, 1, 41).tolist()
    for i, c in enumerate(others):
        axes = figure.add_subplot(1, len(others), i + 1)
        axes.spines[["top", "right"]].set_visible(False)
        own = [x for a in c.images if (x := a.figures.get("pearson")) is not None]
        null = [x for a in c.images if (x := a.null.get("pearson")) is not None]
        axes.hist(null, bins, color="#b8bcc4", label="another patient's map (mean)")
        axes.hist(own, bins, color=COLOURS[i + 1], alpha=0.75, label="the same image's map")
        axes.set_title(c.name, fontsize=10)
        axes.set_xlabel("Pearson correlation with the reference's map")
        axes.set_ylabel("images")
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    return _svg(figure)


def _shown(panel: Panel, reference: str) -> dict[str, Any]:
    """A panel as the template takes it: pictures embedded, answers judged."""
    columns = []
    for name, heat in panel.maps.items():
        answer, probability = panel.answers[name]
        picture = None if heat is None else _outlined(overlay(panel.pixels, heat), panel.mask)
        r = panel.agreement[name]
        columns.append({
            "name": name,
            "src": None if picture is None else _png(picture),
            "alt": f"heat map of {name}, image {panel.image}, class {panel.label}",
            "answer": answer,
            "probability": f"{100 * probability:.0f} %",
            "wrong": answer != panel.label,
            "r": "" if name == reference else ("undefined" if r is None else f"r = {r:.2f}"),
        })  # fmt: skip
    return {
        "image": panel.image,
        "label": panel.label,
        "src": _png(_outlined(panel.pixels, panel.mask)),
        "columns": columns,
    }


def _outlined(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`pixels` (H, W, 3) with the mask's edge in cyan."""
    if mask is None or not mask.any():
        return pixels
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    drawn = pixels.copy()
    drawn[mask & ~inner] = (0, 220, 230)
    return drawn


def _png(pixels: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data: address, SIDE pixels high."""
    h, w = pixels.shape[:2]
    picture = Image.fromarray(pixels).resize((round(SIDE * w / h), SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
