"""Records -> what the report says of explanations: the verdict, its tables and its drawings.

Plain values for `verdict.html.j2` and `explanations.html.j2`. Nothing is judged here: a state comes
from a gate of the record, or is that of the method's own tests, by the same three answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edgekd.records import (
    Aggregate,
    Artifact,
    Comparison,
    Fidelity,
    Gate,
    Margins,
    State,
    Timing,
    Verdict,
    held,
    worst,
)
from edgekd.report import cases
from edgekd.report.drawings import COLOURS, Drawing, figure, svg

Models = Sequence[tuple[str, Artifact, Timing | None]]  # name as in the comparisons

SHOWN = 40  # changed answers in the page; cases.csv has all
MARKERS = "osD^v"
SIGNS: dict[State | None, tuple[str, str, str]] = {  # symbol, word, what it means
    "pass": ("✓", "PASS", "Every margin is kept by a bound of its 95 % interval, not by the mean "
             "alone."),
    "fail": ("✗", "FAIL", "At least one margin is missed by the whole of its 95 % interval."),
    "inconclusive": ("?", "INCONCLUSIVE", "No margin is missed for certain, but the images are too "
                     "few to say that all are kept."),
    "invalid": ("⊘", "INVALID", "The heat maps fail a test of the method itself on these models: "
                "they speak neither for nor against the compression."),
    None: ("–", "NOT JUDGED", "No step of compression was judged by margins."),
}  # fmt: skip
CHECKS = (  # key, what, what is asked of it
    ("random_head", "correlation with maps of a random head", "below 95 % of strangers"),
    ("other_class", "correlation with maps of the runner-up class", ""),
    ("above_random", "faithfulness beyond random maps'", "above 0"),
    ("repeatable", "kappa with maps of the image ± half a grey level", "at least {repeatable:g}"),
    ("undefined", "share of images without a map", "at most {undefined:g}"),
)


class Cell(NamedTuple):
    """A figure of one model."""

    text: str
    beside: str = ""
    state: State | None = None  # None: no margin asks for it


Line = tuple[str, list[Cell]]  # what, a cell for each model


class Told(NamedTuple):
    """One step of compression in the box."""

    title: str
    sign: tuple[str, str, str]
    state: State
    sentence: str
    decided: list[str]
    remedies: tuple[str, ...]
    file: str  # what was judged: its hash, precision, runtime


class Box(NamedTuple):
    """The head of the page."""

    state: State | None
    sign: tuple[str, str, str]
    steps: list[Told]
    facts: list[tuple[str, str]]
    hint: str  # what to do for a verdict; empty where there is one


class Testimony(NamedTuple):
    """What the template shows of explanations; empty where the records hold nothing."""

    names: list[str]
    chain: list[Line]
    valid: list[tuple[str, str, list[Cell]]]  # what, asked, cells
    blind: list[str]
    gates: list[tuple[str, tuple[str, str, str], list[list[str]]]]  # step, sign, rows
    margins: str
    shortcuts: list[tuple[str, list[Cell], list[Cell]]]  # marker, moved, flips
    dots: Drawing | None
    baselines: list[Line]
    parts: list[list[str]]
    changed: list[list[str]]
    more: int  # changed answers that are not shown
    closer: list[str]
    histogram: Drawing | None
    failures: list[str]  # known ones, for the model card
    captions: dict[tuple[str, str], str]  # (image, model) -> what a picture's caption adds


def of(models: Models, fidelity: Fidelity) -> Testimony:
    """All of it, from the records alone."""
    shown = fidelity.comparisons
    changed = list(cases.changed(shown))
    return Testimony(
        names=[c.name for c in shown],
        chain=list(_chain(models, fidelity)),
        valid=list(_valid(fidelity)),
        blind=[n for n, a in fidelity.published.items() if _against(a, a.null) == "fail"],
        gates=[(_title(c, v), SIGNS[v.state], [_gate(g) for g in v.gates])
               for c, v in _judged(shown)],
        margins=", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in fidelity.margins),
        shortcuts=list(_shortcuts(shown)),
        dots=_dots(shown, fidelity.margins),
        baselines=list(_baselines(fidelity)),
        parts=list(cases.parts(shown)),
        changed=changed[:SHOWN],
        more=max(0, len(changed) - SHOWN),
        closer=list(cases.closer(shown)),
        histogram=cases.histogram(shown),
        failures=failures(fidelity),
        captions=cases.captions(shown),
    )  # fmt: skip


# ---- the box


def box(fidelity: Fidelity | None) -> Box:
    """The verdict, each step in a sentence, and what the judgement rests on."""
    if fidelity is None:
        sign = ("–", "NOT CHECKED", "Explanations of these files were not checked.")
        return Box(None, sign, [], [], "Check them: edgekd explain, then edgekd report.")
    state = fidelity.verdict
    steps = [_told(c, v) for c, v in _judged(fidelity.comparisons)]
    facts = [("images", f"{len(fidelity.comparisons[0].images)} of the {fidelity.split} split, "
              f"data fingerprint {fidelity.data_fingerprint[:16]}"),
             ("maps", f"Score-CAM, {fidelity.variant}, of the class that is answered by the model "
              "which the file was compressed from")]  # fmt: skip
    if fidelity.margins_sha256:
        facts.append(("margins", "declared in the profile before the run, sha256 "
                      f"{fidelity.margins_sha256}"))  # fmt: skip
    hint = ""
    if state is None:
        alone = len(fidelity.comparisons) < 2
        hint = ("Nothing was compressed: there is one model." if alone else
                "An earlier edgekd made these maps. Judge them: edgekd explain.")  # fmt: skip
    return Box(state, SIGNS[state], steps, facts, hint)


def _judged(shown: Sequence[Comparison]) -> list[tuple[Comparison, Verdict]]:
    return [(c, c.verdict) for c in shown if c.verdict is not None]


def _title(c: Comparison, v: Verdict) -> str:
    return f"{v.step.capitalize()}: {v.reference} → {c.name}"


def _told(c: Comparison, v: Verdict) -> Told:
    decided = [deciding(g) for g in v.missed] or [deciding(g) for g in _nearest(v.gates)]
    if v.state == "inconclusive":
        decided.append(_enough(v, len(c.images)))
    file = f"sha256 {c.artifact_sha256}, {c.precision}, run by {c.runtime}"
    return Told(_title(c, v), SIGNS[v.state], v.state, v.sentence, decided, v.remedies, file)


def _nearest(gates: Sequence[Gate]) -> list[Gate]:
    """Of gates that all held the one nearest to its margin, in widths of its own interval."""

    def room(g: Gate) -> float:
        left = g.low - g.margin if g.least else g.margin - g.high
        return left / max(g.high - g.low, 1e-9)

    return [min(gates, key=room)] if gates else []


def deciding(g: Gate) -> str:
    """'kappa: 0.600 [0.520, 0.680]; even its upper bound, 0.680, misses the 0.8 asked'."""
    whole = g.state != "pass" and (g.high < g.margin if g.least else g.low > g.margin)
    bound = "upper" if g.least == whole else "lower"
    at = g.low if bound == "lower" else g.high
    even = "even its" if whole else "its"
    asked = f"the {g.margin:.3g} asked" if g.least else f"the {g.margin:.3g} allowed"
    verb = {True: ("misses", "keeps"), False: ("exceeds", "is within")}[g.least][g.state == "pass"]
    return f"{_what(g)}: {_found(g)}; {even} {bound} bound, {at:.3f}, {verb} {asked}"


def _what(g: Gate) -> str:
    """In words, and of which model where it is of one alone: "random_head of teacher fp32"."""
    key, _, model = g.name.partition(" of ")
    alone = model and key in {k for k, *_ in CHECKS}
    return f"{g.what}, {model}" if alone else g.what


def _enough(v: Verdict, images: int) -> str:
    """How many images would decide, in a sentence."""
    open_gates = [g for g in v.gates if g.state == "inconclusive"]
    needed = [g.needed for g in open_gates if g.needed is not None]
    if not needed:
        return f"how many images would decide is not known; these were {images}"
    unless = "" if len(needed) == len(open_gates) else ", for the gates of which it is known"
    return f"{max(needed)} images would decide if the values stay{unless}; these were {images}"


def failures(fidelity: Fidelity) -> list[str]:
    """Known ones: every gate that did not hold, and maps that are undefined."""
    found = [
        f"{c.name}, {SIGNS[g.state][1].lower()}: {deciding(g)}"
        for c, v in _judged(fidelity.comparisons)
        for g in v.gates
        if g.state != "pass"
    ]
    for c in fidelity.comparisons:
        if c.undefined:
            found.append(f"{c.name}: no map of {c.undefined} of {len(c.images)} images")
    return found


# ---- tables


def _found(a: Aggregate | Gate | None) -> str:
    """'0.600 [0.520, 0.680]'; the interval stays on one line."""
    if a is None:
        return "–"
    return f"{a.value:.3f} [{a.low:.3f},\N{NO-BREAK SPACE}{a.high:.3f}]"


def _null(a: Aggregate | None, what: str) -> str:
    return "" if a is None or a.null is None else f"{what} {a.null:.3f}"


def _gate(g: Gate) -> list[str]:
    """What, asked, found, the sign of its state, and how many images would decide."""
    symbol, word, _ = SIGNS[g.state]
    asked = f"at {'least' if g.least else 'most'} {g.margin:.3g}"
    return [_what(g), asked, _found(g), g.state, f"{symbol} {word.lower()}", str(g.needed or "–")]


def _state(c: Comparison, *names: str) -> State | None:
    """The worst that the step's gates of these names say; None if there is none."""
    gates = c.verdict.gates if c.verdict else ()
    also = "shortcut: " if "shortcut" in names else "\0"  # any marker's
    found = [g.state for g in gates if g.name in names or g.name.startswith(also)]
    return worst(found) if found else None


def _own_state(shown: Sequence[Comparison], key: str, name: str) -> State | None:
    """What any step's gates say of a check of one model alone."""
    own = [g.state for _, v in _judged(shown) for g in v.gates if g.name == f"{key} of {name}"]
    return worst(own) if own else None


def _chain(models: Models, fidelity: Fidelity) -> Iterator[Line]:
    """From the whole model to the files: what each kept."""
    shown = fidelity.comparisons
    made = {name: (artifact, timing) for name, artifact, timing in models}

    def line(cell: Callable[[Comparison], Cell]) -> list[Cell]:
        return [cell(c) for c in shown]

    def aggregate(key: str, what: str = "") -> Callable[[Comparison], Cell]:
        def cell(c: Comparison) -> Cell:
            a = c.aggregate.get(key)
            if c is shown[0]:
                return Cell("–")  # it is compared with itself
            return Cell(_found(a), _null(a, what) if what else "", _state(c, key))

        return cell

    yield "compressed from", line(lambda c: Cell(c.reference or "–"))
    yield "verdict of the step", line(_step)
    yield "balanced accuracy", line(lambda c: _accuracy(c, made))
    yield "answers alike", line(lambda c: Cell(_found(c.paired.get("answers")), "",
                                               _state(c, "answers")))  # fmt: skip
    yield "agreement of maps (r)", line(aggregate("pearson", "stranger"))
    yield "kappa: 0 stranger's map, 1 the same", line(aggregate("kappa"))
    yield "identification", line(aggregate("identification", "chance"))
    yield "share of maps lost", line(aggregate("lost"))
    if any("shared_kappa" in c.aggregate for c in shown):
        through = "through the same masks"
        yield f"agreement {through} (r)", line(aggregate("shared_pearson", "stranger"))
        yield f"kappa {through}", line(aggregate("shared_kappa"))
        yield f"identification {through}", line(aggregate("shared_identification", "chance"))
        yield f"share lost {through}", line(aggregate("shared_lost"))
    yield "faithfulness", line(_faithful)
    if any("energy" in c.aggregate for c in shown):
        yield "energy inside masks", line(_energy)
    yield "largest shortcut", line(_largest)
    yield "latency p95", line(lambda c: Cell(_p95(made[c.name][1]) if c.name in made else "–"))
    yield "file size", line(lambda c: Cell(
        f"{made[c.name][0].size_bytes / 1e6:.1f} MB" if c.name in made else "–"))  # fmt: skip


def _step(c: Comparison) -> Cell:
    if c.verdict is None:
        return Cell("–")
    return Cell(SIGNS[c.verdict.state][1], c.verdict.step, c.verdict.state)


def _p95(timing: Timing | None) -> str:
    return "–" if timing is None else f"{float(np.percentile(timing.samples_ms, 95)):.2f} ms"


def _accuracy(c: Comparison, made: dict[str, tuple[Artifact, Timing | None]]) -> Cell:
    """On the whole test split, beside the points lost or won."""
    m = made[c.name][0].metrics.get("test_balanced_accuracy") if c.name in made else None
    points = c.paired.get("accuracy_pt")
    beside = f"{points.value:+.1f} [{points.low:+.1f}, {points.high:+.1f}] points" if points else ""
    text = "–" if m is None else f"{m.value:.3f}"
    if m is not None and m.low is not None and m.high is not None:
        text += f" [{m.low:.3f},\N{NO-BREAK SPACE}{m.high:.3f}]"
    return Cell(text, beside, _state(c, "accuracy_pt"))


def _faithful(c: Comparison) -> Cell:
    a = c.checks.get("faithful")
    return Cell(_found(a), _null(a, "random map"), _state(c, "faithful"))


def _energy(c: Comparison) -> Cell:
    a = c.aggregate.get("energy")
    return Cell(_found(a), _null(a, "stranger"), _state(c, "energy"))


def _largest(c: Comparison) -> Cell:
    found = {k: a for k, a in c.checks.items() if k.startswith("shortcut: ")}
    if not found:
        return Cell("–")
    key = max(found, key=lambda k: found[k].value)
    return Cell(_found(found[key]), key.removeprefix("shortcut: "), _state(c, "shortcut"))


def _against(a: Aggregate, limit: float | None, least: bool = False) -> State | None:
    """What an interval says of a limit: 'pass' by its worse bound, 'fail' by both."""
    if limit is None:
        return None
    return held(a.low, a.high, limit, least=least)


def _valid(fidelity: Fidelity) -> Iterator[tuple[str, str, list[Cell]]]:
    """The method's own tests, model by model; then the published variant's."""
    shown, margins = fidelity.comparisons, fidelity.margins
    limits = {"above_random": (0.0, True), "repeatable": (margins.repeatable, True),
              "undefined": (margins.undefined, False)}  # fmt: skip

    def cell(c: Comparison, key: str) -> Cell:
        a = c.checks.get(key)
        if a is None:
            return Cell("–")
        limit, least = limits.get(key, (a.null, False))
        state = None if key == "other_class" else _against(a, limit, least)
        heads = key in ("random_head", "other_class")
        null = _null(a, "95 % of strangers") if heads else ""
        judged = _own_state(shown, key, c.name)
        return Cell(_found(a), null, judged or state)

    asked = margins.model_dump()
    for key, what, limit in CHECKS:
        if any(key in c.checks for c in shown):
            yield what, limit.format(**asked), [cell(c, key) for c in shown]
    if fidelity.published:
        found = [fidelity.published.get(c.name) for c in shown]
        yield (
            "published Score-CAM: correlation with maps of a random head",
            "below 95 % of strangers",
            [Cell(_found(a), _null(a, "95 % of strangers"), _against(a, a.null)) if a
             else Cell("–") for a in found],
        )  # fmt: skip


def _shortcuts(shown: Sequence[Comparison]) -> Iterator[tuple[str, list[Cell], list[Cell]]]:
    """Of each marker what it moves in each model, and the answers that it changes."""
    for name in _markers(shown):
        moved, flips = [], []
        for c in shown:
            tv, share = (c.checks.get(f"{k}: {name}") for k in ("shortcut", "flips"))
            state = _state(c, f"shortcut: {name}")
            moved.append(Cell(_found(tv), _null(tv, "flat patch"), state))
            text = "–" if share is None else f"{100 * share.value:.1f} %"
            null = None if share is None else share.null
            flips.append(Cell(text, "" if null is None else f"flat patch {100 * null:.1f} %"))
        yield name, moved, flips


def _markers(shown: Sequence[Comparison]) -> list[str]:
    keys = (k for c in shown for k in c.checks if k.startswith("shortcut: "))
    return list(dict.fromkeys(k.removeprefix("shortcut: ") for k in keys))


def _baselines(fidelity: Fidelity) -> Iterator[Line]:
    """What maps reach that do not explain: each figure beside those of simpler maps."""
    shown = fidelity.comparisons
    chosen = (  # what, of which figure, and of whom
        ("agreement (r): the same image's map", "pearson", False),
        ("agreement (r): a stranger's map", "pearson", True),
        ("top fifth (IoU): the same image's map", "iou20", False),
        ("top fifth (IoU): a stranger's map", "iou20", True),
        ("energy inside masks: own map", "energy", False),
        ("energy inside masks: a stranger's map", "energy", True),
        ("insertion − deletion, blurred: own map", "faithful", False),
        ("insertion − deletion, blurred: random smooth map", "faithful", True),
        ("insertion − deletion, mean colour: own map", "faithful_mean", False),
        ("insertion − deletion, mean colour: random smooth map", "faithful_mean", True),
        ("kappa: the image ± half a grey level, the same model", "repeatable", False),
    )

    def cell(c: Comparison, key: str, null: bool) -> Cell:
        if c is shown[0] and key in ("pearson", "iou20"):
            return Cell("–")
        a = (c.aggregate | c.checks).get(key)
        if not null:
            return Cell(_found(a))
        return Cell("–" if a is None or a.null is None else f"{a.null:.3f}")

    for what, key, null in chosen:
        line = [cell(c, key, null) for c in shown]
        if any(x.text != "–" for x in line):
            yield what, line
        if (key, null) == ("energy", True) and fidelity.mask_share is not None:
            even = f"{fidelity.mask_share:.3f}"
            yield "energy inside masks: an even map (area of the masks)", [Cell(even) for _ in line]


# ---- drawing


def _dots(shown: Sequence[Comparison], margins: Margins) -> Drawing | None:
    """What each marker moves, a mark a model, and the margin."""
    names = _markers(shown)
    if not names:
        return None
    drawn, axes = figure(6.4, 1.2 + (0.22 + 0.16 * len(shown)) * len(names))
    step = 0.7 / len(shown)
    told = []
    for i, c in enumerate(shown):
        rows = [(y, a) for y, n in enumerate(names) if (a := c.checks.get(f"shortcut: {n}"))]
        if not rows:
            continue
        x = [a.value for _, a in rows]
        spread = [[max(0, a.value - a.low) for _, a in rows],
                  [max(0, a.high - a.value) for _, a in rows]]  # fmt: skip
        places = [-y - step * (i - (len(shown) - 1) / 2) for y, _ in rows]
        axes.errorbar(x, places, xerr=spread, linestyle="", marker=MARKERS[i % len(MARKERS)],
                      markersize=5, capsize=2, color=COLOURS[i % len(COLOURS)],
                      label=c.name)  # fmt: skip
        told += [f"{c.name}, {names[y]}: {a.value:.3f}" for y, a in rows]
    axes.axvline(margins.shortcut, color="#a3243b", linestyle="--", linewidth=1.2,
                 label=f"margin {margins.shortcut:g}")  # fmt: skip
    axes.axvline(0, color="#9aa3af", linewidth=0.8, zorder=0)
    axes.set_yticks([-y for y in range(len(names))], names)
    axes.set_xlabel("probability moved by the marker beyond a flat patch (total variation)")
    columns = max(1, min(4, int(6.4 / (0.6 + 0.08 * max(len(c.name) for c in shown)))))
    drawn.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return svg(drawn), "Shortcuts. " + "; ".join(told)
