"""Explanations image by image: sentences, tables, captions and a drawing for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgekd.records import Aggregate, Agreement, Comparison
from edgekd.report.drawings import COLOURS, Drawing, svg


def _pairs(images: Sequence[Agreement]) -> np.ndarray:
    """(n, 2) float64: Pearson with the reference's map of the same image, and of strangers."""
    found = [(a.figures.get("pearson"), a.null.get("pearson")) for a in images]
    return np.array([p for p in found if None not in p], float).reshape(-1, 2)


def _whose(c: Comparison, shown: Sequence[Comparison]) -> str:
    return c.reference or shown[0].name


def held(shown: Sequence[Comparison]) -> list[str]:
    """The models whose maps have to be those that they are compared with: the worst of these is
    shown first. A student may explain itself otherwise than its teacher; if there is nothing else,
    all are meant.
    """
    quantised = [c.name for c in shown if c.verdict and c.verdict.step == "quantisation"]
    return quantised or [c.name for c in shown[1:]]


def closer(shown: Sequence[Comparison]) -> Iterator[str]:
    """How often is a map nearer to the reference's of its own image? A sentence for each model."""
    for c in shown[1:]:
        pairs = _pairs(c.images)
        if len(pairs):
            n = int((pairs[:, 0] > pairs[:, 1]).sum())
            yield (
                f"In {n} of {len(pairs)} images the map of {c.name} agrees more with that of "
                f"{_whose(c, shown)} of the same image than with those of strangers (their mean)."
            )


def parts(shown: Sequence[Comparison]) -> Iterator[list[str]]:
    """A line for each class, or subgroup, and compressed model: what its maps of these are like."""
    for name in dict.fromkeys(name for c in shown[1:] for name in c.parts):
        for c in shown[1:]:
            found = c.parts.get(name, {})
            said = [_interval(found.get(key)) for key in ("kappa", "identification", "lost")]
            n = found["kappa"].n if "kappa" in found else 0
            yield [name, c.name, f"{n}" if n else "too few to judge", *said]


def _interval(a: Aggregate | None) -> str:
    """'0.91 [0.85, 0.96]'; the interval stays on one line."""
    if a is None:
        return "–"
    return f"{a.value:.2f} [{a.low:.2f},\N{NO-BREAK SPACE}{a.high:.2f}]"


def changed(shown: Sequence[Comparison]) -> Iterator[list[str]]:
    """Each image that a model answers otherwise than what it was compressed from."""
    by_name = {c.name: c for c in shown}
    for c in shown[1:]:
        before = by_name.get(_whose(c, shown), shown[0])
        for a, b in zip(before.images, c.images, strict=True):
            if a.answer != b.answer:
                r = b.figures.get("pearson")
                yield [
                    b.image[:12], b.label, f"{a.answer} {100 * a.probability:.0f} %, {before.name}",
                    f"{b.answer} {100 * b.probability:.0f} %, {c.name}",
                    "undefined" if r is None else f"{r:.2f}",
                ]  # fmt: skip


def captions(shown: Sequence[Comparison]) -> dict[tuple[str, str], str]:
    """(image, model) -> 'nearer than 97 % of strangers', 'lowest r of cyst': below a picture."""
    found: dict[tuple[str, str], str] = {}
    asked = held(shown)
    for c in shown[1:]:
        seen: set[str] = set()
        for a in sorted(c.images, key=lowest):
            said = []
            share = a.figures.get("identification")
            if a.figures.get("lost") and c.name in asked:
                said.append("✗ lost: could be a stranger's")
            if a.explained != a.answer:  # a student shows what speaks for its own answer
                whose = "r" if c.verdict and c.verdict.step == "distillation" else "map and r"
                said.append(f"{whose} of {a.explained}")
            if share is not None:
                said.append(f"nearer than {100 * share:.0f} % of strangers")
            if a.label not in seen:
                said.append(f"lowest r of {a.label}")
            seen.add(a.label)
            found[a.image, c.name] = "; ".join(said)
    return found


def lowest(a: Agreement) -> tuple[float, str]:
    """Sorts images: an undefined map first, then the least agreement."""
    r = a.figures.get("pearson")
    return (-2.0 if r is None else r), a.image


def histogram(shown: Sequence[Comparison]) -> Drawing | None:
    """Agreement image by image, the strangers' behind it."""
    from matplotlib.figure import Figure

    chosen = [(c, p) for c in shown[1:] if len(p := _pairs(c.images))]
    if not chosen:
        return None
    across = min(2, len(chosen))
    down = -(-len(chosen) // across)
    drawn = Figure(figsize=(5.4 * across, 2.7 * down + 0.35), layout="constrained")
    low = min(-0.2, *(float(p.min()) for _, p in chosen))
    bins = np.linspace(np.floor(low * 10) / 10, 1, 37).tolist()
    told = []
    for place, (c, pairs) in enumerate(chosen):
        axes = drawn.add_subplot(down, across, place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        own, null = pairs.T
        axes.hist(null, bins, color="#b8bcc4", label="strangers' maps (mean of them)")
        axes.hist(own, bins, color=COLOURS[1], alpha=0.7, histtype="stepfilled",
                  edgecolor="#123c54", label="the same image's map")  # fmt: skip
        axes.axvline(null.mean(), color="#39424e", linestyle=":", linewidth=1.4,
                     label="strangers' mean")  # fmt: skip
        axes.axvline(own.mean(), color="#123c54", linestyle="--", linewidth=1.4,
                     label="the same image's mean")  # fmt: skip
        axes.set_title(f"{c.name} ({len(pairs)} images)", fontsize=10)
        axes.set_xlabel(f"Pearson correlation with the map of {_whose(c, shown)}")
        axes.set_ylabel("images")
        told.append(f"{c.name}: mean {own.mean():.2f}, strangers {null.mean():.2f}")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center",
                 ncols=2 * across, fontsize=8, frameon=False)  # fmt: skip
    return svg(drawn), "Agreement image by image. " + "; ".join(told)
