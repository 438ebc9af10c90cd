"""Records -> what the report says of answers that survive without the organ or the lesion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from edgekd.records import Aggregate, Comparison, Fidelity, State, Survived, worst
from edgekd.report.explanations import Cell, Line

SHARES = (  # key of Comparison.checks, what, what its null is
    ("survive_without", "answers that survive without the {}", "by chance"),
    ("elsewhere", "the same beyond chance: 0 needs the {}, 1 never looks at it", ""),
    ("drop_without", "probability that the answer loses without the {}", ""),
    ("survive_only", "answers that survive with nothing but the {}", "by chance"),
    ("drop_only", "probability that the answer loses with nothing but the {}", ""),
)


class Elsewhere(NamedTuple):
    """What the template shows."""

    region: str  # "organ", "lesion" or "organ or lesion"
    hidden: str  # in how many images: "84 images: the organ in 80, the lesion in 4"
    names: list[str]
    lines: list[Line]
    survived: list[list[str]]  # image, model, hidden, answer, before, after


def of(fidelity: Fidelity) -> Elsewhere | None:
    """None where nothing was hidden."""
    shown = [c for c in fidelity.comparisons if "survive_without" in c.checks]
    if not shown:
        return None
    counts = sorted(fidelity.hidden.items(), reverse=True)
    total = sum(fidelity.hidden.values())
    return Elsewhere(
        region=shown[0].region,
        hidden=f"{total} images: " + ", ".join(f"the {kind} in {n}" for kind, n in counts),
        names=[c.name for c in shown],
        lines=list(_lines(shown)),
        survived=[_told(s) for s in fidelity.survived],
    )


def _lines(shown: list[Comparison]) -> Iterator[Line]:
    for key, what, null in SHARES:
        cells = [_cell(c.checks.get(key), null, _state(c, shown) if key == "elsewhere" else None)
                 for c in shown]  # fmt: skip
        if any(c.text != "–" for c in cells):
            yield what.format(shown[0].region), cells
        if key == "survive_without":
            yield from _by_class(shown)


def _by_class(shown: list[Comparison]) -> Iterator[Line]:
    """Of the images that a model answers so: one class may be told from elsewhere, others not."""
    start = "survive_without: "
    for key in sorted({k for c in shown for k in c.checks if k.startswith(start)}):
        what = f"answers {key.removeprefix(start)} that survive without the {shown[0].region}"
        yield what, [_cell(c.checks.get(key), "by chance", None) for c in shown]


def _cell(a: Aggregate | None, null: str, state: State | None) -> Cell:
    if a is None:
        return Cell("–")
    beside = f"{null} {a.null:.3f}" if null and a.null is not None else ""
    text = f"{a.value:.3f} [{a.low:.3f},\N{NO-BREAK SPACE}{a.high:.3f}]"
    return Cell(text, beside, state)


def _state(c: Comparison, shown: list[Comparison]) -> State | None:
    """What the gate says that asks whether this model looks elsewhere; None if none asks."""
    own = [g.state for g in (c.verdict.gates if c.verdict else ()) if g.name == "elsewhere"]
    own += [g.state for x in shown if x.verdict for g in x.verdict.gates
            if g.name == f"elsewhere of {c.name}"]  # fmt: skip
    return worst(own) if own else None


def _told(s: Survived) -> list[str]:
    return [s.image, s.model, s.region, s.answer, f"{100 * s.before:.0f} %",
            f"{100 * s.after:.0f} %"]  # fmt: skip
