"""What a person reads: rich tables on stdout, progress and notes on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from edgekd.cli import progress, streams
from edgekd.ofa.spaces import title as title_of
from edgekd.records import Artifact, Fidelity, Metric, Profile, T, Timing, Track, untracked

if TYPE_CHECKING:
    from edgekd.bench.compare import Against
    from edgekd.data.dataset import Findings
    from edgekd.export.device_checks import Outlook
    from edgekd.ofa.latency_table import Table as LatencyTable
    from edgekd.ofa.pareto import Front, Member
    from edgekd.pipeline.doctor import Check
    from edgekd.pipeline.recipes import Recipe
    from edgekd.pipeline.search import Sought
    from edgekd.quantize.choice import Choice
    from edgekd.runtimes.golden import Verified

WIDTH = 110  # columns where stdout is not a terminal


class Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:  # noqa: D102
        return Text(f"{task.speed:.0f}/s" if task.speed else "", style="dim")


@contextlib.contextmanager
def tracker() -> Iterator[Track]:
    """A Track that tells on stderr how far a stage is: bars on a terminal, lines elsewhere."""
    if streams.quiet():
        yield untracked
        return
    console = Console(stderr=True)
    if not (console.is_interactive and sys.stderr.isatty()):  # FORCE_COLOR makes no terminal
        with progress.lines(say) as track:
            yield track
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bars:

        def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
            if total is None and hasattr(items, "__len__"):
                total = len(items)  # type: ignore[arg-type]
            task = bars.add_task(what, total=total)
            try:
                for item in items:
                    yield item
                    bars.advance(task, getattr(item, "size", 1))
            finally:
                bars.remove_task(task)

        yield track


def say(text: str, *, needed: bool = False) -> None:
    """A line on stderr for the person who waits; never the result.

    needed: with --quiet as well, since it tells what failed or what is awaited.
    """
    if streams.quiet() and not needed:
        return
    # Not by rich, which ends the process where nobody listens.
    with contextlib.suppress(OSError):  # a terminal that was closed, a full disk
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def on_stdout(shown: Any) -> None:
    """Print a table or a group of them as the command's result."""
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, highlight=False).print(shown)


def table_of(*columns: str, title: str = "") -> Table:
    """An empty table; the first column to the left, numbers to the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def plain(value: object) -> Text:
    """Users' names are not markup."""
    return Text(str(value))


def profiles(found: list[Profile]) -> Table:
    """Name, runtime, device, student and budget of each."""
    table = table_of("profile", "runtime", "device", "precisions", "space", "px", "p95 budget")
    for p in found:
        limit = f"{p.budget.latency_ms:g} ms" if p.budget.latency_ms else "-"
        table.add_row(
            p.name,
            p.runtime,
            p.device,
            " ".join(p.precisions),
            p.student.partition("_top1")[0] or p.space,
            " ".join(map(str, p.resolutions)),
            limit,
        )
    return table


def settings(title: str, values: dict[str, Any]) -> Table:
    """Names and values, tables within tables as a.b."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    for key, value in _flat(values, ""):
        table.add_row(plain(key), plain(value))
    return table


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def students(found: dict[str, dict[str, Any]]) -> Table:
    """Every named sub-net with its space and depth."""
    table = table_of("sub-net", "space", "resolution", "depth")
    for name, arch in found.items():
        depth = "-".join(map(str, arch["depth"]))
        table.add_row(name, arch["space"], str(arch["resolution"]), depth)
    return table


def dataset_json(findings: Findings) -> dict[str, Any]:
    """What `edgekd data check` found, as plain data."""
    dataset, problems, leaks = findings
    found: dict[str, Any] = {"ok": not problems, "problems": list(problems), "leaks": leaks}
    if dataset is not None:
        found |= {
            "classes": list(dataset.classes),
            "splits": {
                split: {c: sum(s.label == i for s in samples)
                        for i, c in enumerate(dataset.classes)}
                for split, samples in dataset.splits.items()
            },
            "masks": {k: sum(s.mask is not None for s in v) for k, v in dataset.splits.items()},
            "groups": {k: len({s.group for s in v}) for k, v in dataset.splits.items()},
            "split_rule": dataset.split_rule,
            "fingerprint": dataset.fingerprint,
            "grey": dataset.grey,
            "notes": list(dataset.notes),
        }  # fmt: skip
    return found


def dataset(found: dict[str, Any]) -> Group:
    """Images of each class in each split, then every problem."""
    parts: list[Any] = []
    if "classes" in found:
        table = table_of("class", *found["splits"], "all")
        for c in found["classes"]:
            counts = [split[c] for split in found["splits"].values()]
            table.add_row(plain(c), *map(str, counts), str(sum(counts)))
        for name in ("groups", "masks"):
            counts = list(found[name].values())
            table.add_row(plain(name), *map(str, counts), str(sum(counts)), style="dim")
        parts += [table, plain(f"split: {found['split_rule']}")]
        parts += [plain(f"fingerprint: {found['fingerprint'][:16]}")]
        parts += [plain(f"note: {n}") for n in found["notes"]]
    for problem in found["problems"]:
        parts.append(Text(f"problem: {problem}", style="bold red"))
    if found["leaks"]:
        told = ", ".join(f"{n} {kind}" for kind, n in found["leaks"].items())
        parts.append(plain(f"leakage between splits: {told}"))
    elif "classes" in found:
        parts.append(plain("leakage between splits: none (bytes, near-duplicates, groups)"))
    parts.append(
        plain(f"{len(found['problems'])} problems" if found["problems"] else "no problems")
    )
    return Group(*parts)


def metric(m: Metric | None, scale: float = 1.0) -> str:
    """'0.953 [0.931, 0.970]', or '-'."""
    if m is None:
        return "-"
    interval = "" if m.low is None or m.high is None else f" [{m.low:.3f}, {m.high:.3f}]"
    return f"{m.value * scale:.3f}{interval}"


def artifact(made: Artifact, beside: Artifact | None = None) -> Group:
    """One artifact's figures (beside another's, its parent's), and its folder."""
    columns = [a for a in (beside, made) if a is not None]
    heads = [f"{a.role} {a.precision}" for a in columns]
    table = table_of("", *heads)
    table.add_row("model", *(plain(a.model.partition("_top1")[0]) for a in columns))
    for name in ("balanced_accuracy", "macro_f1", "macro_auroc"):
        row = [metric(a.metrics.get(f"test_{name}")) for a in columns]
        table.add_row(f"test {name.replace('_', ' ')}", *row)
    if any(a.calibration for a in columns):
        for what, cells in _calibration(columns):
            table.add_row(what, *cells)
    cut = [a.metrics.get("cut_test_balanced_accuracy") for a in columns]
    if any(cut):
        table.add_row("the same as cut", *map(metric, cut))
    table.add_row("parameters", *(f"{a.params / 1e6:.2f} M" for a in columns))
    table.add_row("MACs", *(f"{a.macs / 1e6:.0f} M" for a in columns))
    table.add_row("size", *(f"{a.size_bytes / 1e6:.1f} MB" for a in columns))
    for key in sorted({k for a in columns for k in a.metrics if k.startswith("parity")}):
        row = [f"{a.metrics[key].value:.2g}" if key in a.metrics else "-" for a in columns]
        table.add_row(key.replace("_", " "), *row)
    kept = "no epoch was better on the validation split than the sub-net as cut: it is kept"
    told = [kept] if made.settings.get("best_epoch") == 0 else []
    return Group(table, *map(plain, (*told, *_beside(made, beside), made.folder)))


def _calibration(columns: list[Artifact]) -> Iterator[tuple[str, list[str]]]:
    """(what, a cell for each artifact) of its probabilities and its operating point."""

    def figure(key: str) -> list[str]:
        return [metric(a.metrics.get(f"test_{key}")) for a in columns]

    yield "test ECE before calibration", figure("ece_uncalibrated")
    yield "test ECE", figure("ece")
    fitted = [a.calibration for a in columns]
    yield "temperature", [f"{c.temperature:.3f}" if c else "-" for c in fitted]
    yield "test sensitivity at threshold", figure("macro_sensitivity")
    yield "test specificity at threshold", figure("macro_specificity")
    yield "thresholds chosen for", [c.aim if c else "-" for c in fitted]


def _beside(made: Artifact, beside: Artifact | None) -> Iterator[str]:
    """A line for each model that `made` was compared with, image by image."""
    paired = made.evaluation.paired if made.evaluation else {}
    for name, p in paired.items():
        yield (
            f"beside {name}, {p.images} images: only this right {p.only_this_right}, only the "
            f"other {p.only_other_right}, McNemar mid-p {p.mcnemar_p:.3g}; balanced accuracy "
            f"{difference(p.differences.get('balanced_accuracy'))}"
        )
    if beside is not None and not paired:
        yield (
            f"not compared image by image with {beside.role} {beside.precision}: it keeps no "
            "answers to these test images"
        )


def difference(m: Metric | None) -> str:
    """'+0.012 [-0.010, +0.034]', or '-'."""
    if m is None:
        return "-"
    interval = "" if m.low is None or m.high is None else f" [{m.low:+.3f}, {m.high:+.3f}]"
    return f"{m.value:+.3f}{interval}"


def supernet(made: Artifact) -> Group:
    """What the ends of a supernet reach on the validation split."""
    table = table_of("sub-net of " + made.model, "val balanced accuracy", "val loss")
    for end, name in (("min", "smallest"), ("max", "largest")):
        figures = [made.metrics[f"val_{k}_{end}"] for k in ("balanced_accuracy", "loss")]
        table.add_row(name, *map(metric, figures))
    return Group(table, plain(made.folder))


def searches(found: list[tuple[Front, Sought]]) -> Group:
    """The front of each profile, what was measured of it, and the choice."""
    parts: list[Any] = []
    for front, sought in found:
        how = "estimated" if sought.estimated else f"measured blocks, {sought.precision}"
        title = f"{sought.profile.name}: {front.space}, latency {how}"
        table = table_of("sub-net", "accuracy", "p95 ms", "parameters", "accuracy measured",
                       "p95 ms measured", "memory", title=title)  # fmt: skip
        measured = {m.predicted: m for m in sought.measured}
        chosen = next(m for m in front.members if title_of(m.arch) == sought.chosen)
        few = [m for m in front.members if m in measured or m == chosen]
        for m in few if measured else _some(front.members, chosen):
            real = measured.get(m)
            name = Text(title_of(m.arch), style="bold" if m == chosen else "")
            table.add_row(
                name, f"{m.accuracy:.3f}", f"{m.p95_ms:.3g}", f"{m.params / 1e6:.2f} M",
                f"{real.accuracy:.3f}" if real else "-", f"{real.p95_ms:.3g}" if real else "-",
                f"{real.peak_mb:.0f} MB" if real else "-",
            )  # fmt: skip
        r, rule = sought.ranking, "the most accurate within the budget"
        if sought.slack:
            rule = f"the fastest that gives up at most {100 * sought.slack:g} points"
        parts += [table, plain(
            f"{front.evaluations} sub-nets in {front.seconds:.1f} s; accuracy predicted from "
            f"{r.samples} evaluated ones: Kendall {r.kendall:.2f}, Spearman {r.spearman:.2f}, "
            f"error {r.rmse:.3f} on those held out; chosen in bold: {rule}"
        )]  # fmt: skip
    return Group(*parts)


def latency(table: LatencyTable, where: object) -> Group:
    """What a latency table covers, and how wrong it is on whole sub-nets."""
    made = "estimated" if table.estimated else "measured"
    head = table_of("latency", table.space)
    head.add_row("runtime", f"{table.runtime} on {table.device}, {table.precision}, {made}")
    head.add_row("resolutions", " ".join(map(str, table.resolutions)))
    head.add_row("blocks and other pieces", str(len(table.pieces)))
    for name, e in (("of whole sub-nets left out", table.errors),
                    ("of the plain sum of pieces", table.plain_errors)):  # fmt: skip
        if e is not None:
            said = f"{e.mape:.1f} %, {100 * e.within10:.0f} % within 10 %, Kendall {e.kendall:.3f}"
            head.add_row(f"error {name} ({e.nets})", said)
    head.add_row("p95 / p50", f"{table.p95_ratio:.3f}")
    return Group(head, plain(where))


def recipe(made: Recipe) -> Group:
    """What a study does, and what its paper leaves open."""
    head = table_of(made.name, made.title)
    head.add_row("source", plain(made.source))
    head.add_row("data", plain(made.data))
    for place, gap in enumerate(made.unknown):
        head.add_row("not in the paper" if place == 0 else "", plain(gap))
    return Group(head, *(plain(f"edgekd {step}") for step in made.steps))


def _some(members: tuple[Member, ...], chosen: Member, count: int = 8) -> list[Member]:
    """A few of a front, from fast to slow, the chosen one among them."""
    step = max(1, len(members) // count)
    return [m for i, m in enumerate(members) if i % step == 0 or m == chosen]


def timings(found: list[Timing]) -> Group:
    """Candidates side by side, what makes their figures doubtful, and what was not measured."""
    from edgekd.bench import tables

    shown = tables.shown(found)
    lines = tables.lines(shown)
    table = table_of("", *(escape(s.name) for s in shown), title=escape(tables.where(shown)))
    group = ""
    for line in lines:
        if all(c == tables.NONE for c in line.cells):
            continue  # said below
        if group not in ("", line.group):
            table.add_section()
        group = line.group
        # What stands beside a figure has room beside three columns only.
        cells = [str(c) if len(found) <= 3 else c.text for c in line.cells]
        table.add_row(line.what, *(plain(c) for c in cells))
    noise = [Text(f"noise: {d}", style="yellow") for d in tables.doubts(shown)]
    missing = tables.absent(lines, shown)
    dashes = [Text(f"–: not measured: {'; '.join(missing)}", style="dim")] if missing else []
    return Group(table, *noise, *dashes)


def against(found: Against) -> Group:
    """One file beside another, and whether it is slower."""
    from edgekd.metrics.latency import percentiles

    table = table_of("", "this file", "against", title=f"bench --against, {found.rounds} processes")
    pair = found.own, found.other
    table.add_row("model", *(plain(t.model.partition("_top1")[0]) for t in pair))
    table.add_row("precision", *(t.precision for t in pair))
    table.add_row("runtime", *(f"{t.runtime} on {t.device}" for t in pair))
    table.add_row("median", *(f"{percentiles(t.samples_ms)['p50']:.2f} ms" for t in pair))
    table.add_row("profile's device", *("yes" if t.on_device else "NO" for t in pair))
    how = {"turns": "in turns", "record": "each in multiples of the machine's pace, that day"}
    verdict = f"{found.state.upper()}, {how[found.how]}: {found.reason}"
    return Group(table, plain(verdict))


def fidelity(found: Fidelity) -> Group:
    """Agreement of each file's maps with the reference's, each beside its null."""
    names = [c.name for c in found.comparisons]
    table = table_of("mean [95 %] (null)", *names, title=f"Score-CAM, {found.variant}: "
                   "maps of each file against those of what it was compressed from")  # fmt: skip
    keys = list(dict.fromkeys(k for c in found.comparisons for k in c.aggregate))
    for key in keys:
        cells = []
        for c in found.comparisons:
            a = c.aggregate.get(key)
            null = "" if a is None or a.null is None else f" ({a.null:.2f})"
            cells.append("-" if a is None else f"{a.value:.2f} [{a.low:.2f}, {a.high:.2f}]{null}")
        table.add_row(key, *cells)
    table.add_row("undefined maps", *(str(c.undefined) for c in found.comparisons))
    table.add_row("seconds a map", *(f"{c.seconds_per_map:.2f}" for c in found.comparisons))
    table.add_row("explained layer", *(plain(c.layer) for c in found.comparisons))
    lines = ["null: the same figure against another patient's map of the same class"]
    if found.mask_share is not None:
        lines.append(f"masks cover {100 * found.mask_share:.1f} % of their images")
    return Group(table, *(plain(line) for line in lines), *_judged(found))


def _judged(found: Fidelity) -> Iterator[Any]:
    """The verdict, a reason a step, and the gates that did not hold."""
    yield from (plain(f"{c.name}: {c.remark}") for c in found.comparisons if c.remark)
    if found.verdict is None:
        return
    colours = {"invalid": "bold magenta", "fail": "bold red", "inconclusive": "bold yellow",
               "pass": "bold green"}  # fmt: skip
    table = table_of("did not hold", "", "asked", "found [95 %]", "images that would decide")
    for c in found.comparisons:
        for g in c.verdict.gates if c.verdict else ():
            if g.state != "pass":
                table.add_row(
                    plain(f"{c.name}: {g.what}"), Text(g.state, style=colours[g.state]),
                    f"at {'least' if g.least else 'most'} {g.margin:.3g}",
                    f"{g.value:.3f} [{g.low:.3f}, {g.high:.3f}]", str(g.needed or "-"),
                )  # fmt: skip
    if table.row_count:
        yield table
    yield Text(f"verdict: {found.verdict.upper()}", style=colours[found.verdict])
    yield from map(plain, found.reasons)
    for c in found.comparisons:
        for place, remedy in enumerate(c.verdict.remedies if c.verdict else (), 1):
            yield plain(f"{c.name}, try {place}: {remedy}")


def quantized(made: Artifact, before: Artifact, choice: Choice | None) -> Group:
    """The candidates, where there was a choice, and the file to deploy beside what it is of."""
    parts: list[Any] = [candidates(choice), plain("")] if choice else []
    return Group(*parts, artifact(made, before))


def candidates(choice: Choice) -> Table:
    """From fast to slow, each with why it was or was not chosen."""
    table = table_of(
        "candidate", "p50 ms", "x FP32", "p95 ms", "MB", "points lost", "flips", "maps", ""
    )
    for c in choice.candidates:
        ms = ["-" if x is None else f"{x:.2f}" for x in (c.p50_ms, c.times, c.p95_ms)]
        size = f"{c.size_bytes / 1e6:.1f}" if c.size_bytes else "-"
        flips, maps = ("-" if x is None else f"{x:.3g}" for x in (c.flips, c.agreement))
        drop = "-" if c.drop_pt is None else f"{c.drop_pt.value:+.1f}"
        style = "bold" if c.state == "chosen" else "dim"
        table.add_row(c.name, *ms, size, drop, flips, maps, plain(f"{c.state}: {c.reason}"),
                      style=style)  # fmt: skip
    return table


def exported(made: list[Artifact], outlooks: list[Outlook]) -> Group:
    """Every file, and what is to be done for a device that is not here."""
    parts: list[Any] = [artifact(a) for a in made]
    for o in outlooks:
        layers = ", ".join(f"{n} in {p}" for p, n in o.layers.items())
        parts.append(plain(f"{o.device}, by {o.checked_by}: layers that multiply: {layers}"))
        for what, names in (("neither INT8 nor FP16", o.slow), ("not on a DLA", o.off_dla)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(plain(f"{what}: {', '.join(names[:5])}{more}"))
        parts += [Text(f"problem: {p}", style="bold red") for p in o.problems]
        parts += [plain(f"{i}. {step}") for i, step in enumerate(o.remains, 1)]
    return Group(*parts)


def verified(found: Verified) -> Table:
    """How far a file's answers are from those it was stored with."""
    table = table_of("golden samples", "logits", "features", "other predictions", "tolerance", "")
    errors = ["NaN" if x is None else f"{x:.2g}" for x in (found.logits, found.features)]
    table.add_row(
        f"{found.runtime} on {found.device}", *errors,
        str(found.predictions), f"{found.tolerance:g}",
        "as stored" if found.ok else "NOT as stored",
    )  # fmt: skip
    return table


def checks(found: list[Check]) -> Table:
    """What works here, what does not, and what to do about it."""
    colours = {"PASS": "green", "FAIL": "bold red", "ABSENT": "dim"}
    table = table_of("", "", "", "fix")
    for column in table.columns[1:]:
        column.justify = "left"
    for c in found:
        table.add_row(c.what, Text(c.state, style=colours[c.state]), plain(c.detail), plain(c.fix))
    return table
