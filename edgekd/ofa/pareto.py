"""What a search leaves behind: the sub-nets that none beats, as a record and as a drawing."""

from __future__ import annotations

import io
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from edgekd.records import Arch, Budget, EdgeKDError, Record, Stored, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by the colour-blind, and in grey by their marks
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8bcc4"
FAR = 2.0  # times the slowest that is drawn: a budget beyond would squeeze all else into a corner


class Member(Record):
    """A sub-net of the front, and what is predicted of it."""

    arch: Arch
    accuracy: float
    p50_ms: float
    p95_ms: float
    params: int  # exact
    size_bytes: int  # parameters x bytes of one


class Front(Stored):
    """The sub-nets within a budget that no other beats in both accuracy and latency."""

    FILE: ClassVar[str] = "search.json"
    method: Literal["nsga2", "random"]
    space: str
    resolutions: tuple[int, ...]
    classes: int
    budget: Budget  # memory_mb is not predicted: a file must be run
    members: tuple[Member, ...]  # from fast to slow, which is from less to more accurate
    winner: Member  # the most accurate
    evaluations: int
    generations: int
    population: int
    converged: bool  # the hypervolume had stopped growing, or there was nothing left to try
    hypervolume: float  # ms x accuracy, as far as `reference`
    reference: tuple[float, float]  # (p95 ms, accuracy); what is beyond either does not count
    cloud: tuple[tuple[float, float], ...]  # (p95 ms, accuracy) of some of all that were evaluated
    p95_ratio: float
    bytes_per_param: float
    seed: int
    seconds: float
    versions: dict[str, str]

    def spread(self, count: int) -> list[Member]:
        """Up to `count` of its members, evenly from the fastest to the winner."""
        places = np.unique(np.linspace(0, len(self.members) - 1, count).astype(int))
        return [self.members[i] for i in places]


def hypervolume(front: Front | Sequence[Member], reference: tuple[float, float]) -> float:
    """Area (ms x accuracy) that a front dominates, as far as `reference` (p95 ms, accuracy)."""
    members = front.members if isinstance(front, Front) else front
    points = np.array([(m.p95_ms, m.accuracy) for m in members], float).reshape(-1, 2)
    return area(points, reference)


def area(points: np.ndarray, reference: tuple[float, float]) -> float:
    """Area (ms x accuracy) that points (N, 2), p95 ms and accuracy, dominate up to `reference`."""
    from pymoo.indicators.hv import Hypervolume

    inside = points[(points[:, 0] < reference[0]) & (points[:, 1] > reference[1])]
    if not len(inside):
        return 0.0
    judge = Hypervolume(ref_point=np.array([reference[0], -reference[1]]))
    return float(judge(inside * [1, -1]))


def pareto(p95_ms: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Indices of those that no other beats or equals in both (N,), from fast to slow."""
    order = np.lexsort((-accuracy, p95_ms))
    best = np.maximum.accumulate(accuracy[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])] if len(order) else order


def plot(
    front: Front,
    path: Path,
    *,
    chosen: Member | None = None,
    candidates: np.ndarray | None = None,
    named: Mapping[str, tuple[float, float]] | None = None,
    measured: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Write a PNG of `front`: predicted accuracy against predicted p95, the budget as a line.

    chosen: the member to mark; without it, the most accurate.
    candidates: (N, 2) p95 ms and accuracy of what was evaluated; without it, the front's cloud.
    named: name -> (p95 ms, accuracy), as predicted. measured: the same as measured, joined to the
    named one of the same name by a thin line. Raises EdgeKDError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise EdgeKDError("the drawing needs matplotlib: pip install 'edgekd[report]'") from None
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    cloud = np.array(front.cloud if candidates is None else candidates, float).reshape(-1, 2)
    line = np.array([(m.p95_ms, m.accuracy) for m in front.members])
    axes.scatter(cloud[:, 0], cloud[:, 1], 5, color=GREY, linewidths=0, rasterized=True, zorder=1,
                 label="evaluated by prediction")  # fmt: skip
    axes.plot(*line.T, color=BLUE, marker="o", markersize=3, linewidth=1, zorder=3,
              label=f"front ({len(line)} sub-nets)")  # fmt: skip
    star = chosen or front.winner
    axes.plot(star.p95_ms, star.accuracy, marker="*", markersize=14, color=BLUE,
              markeredgecolor="white", linestyle="", zorder=5, label="chosen")  # fmt: skip
    shown = np.concatenate([line, *_points(axes, dict(named or {}), dict(measured or {}))])
    if limit := front.budget.latency_ms:
        near = limit < FAR * shown[:, 0].max()
        where = "" if near else ", far to the right"
        axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.2, zorder=2,
                     label=f"budget, {limit:g} ms{where}")  # fmt: skip
        shown = np.concatenate([shown, [[limit, line[-1, 1]]] if near else line[:0]])
    _limits(axes, shown)
    axes.set_xlabel("latency of one image, p95, ms")
    axes.set_ylabel("balanced accuracy, predicted")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    write_atomic(path, drawn.getvalue())


def _points(
    axes: Axes,
    named: dict[str, tuple[float, float]],
    measured: dict[str, tuple[float, float]],
) -> list[np.ndarray]:
    """Mark single sub-nets with letters that the legend explains; their places (n, 2)."""
    mark: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": "white"}
    corners = [(4, 4), (4, -10), (-10, 4), (-10, -10)]  # of the letters: neighbours differ
    for i, name in enumerate(dict.fromkeys([*named, *measured])):
        letter, label = string.ascii_letters[i % 52], f"{string.ascii_letters[i % 52]}  {name}"
        where = [points[name] for points in (named, measured) if name in points]
        axes.plot(*zip(*where, strict=True), color="black", linewidth=0.6, zorder=3)
        if name in named:
            axes.plot(*named[name], "s", color=GREEN, label=label, zorder=4, **mark)
        if name in measured:
            label = "_" if name in named else label
            axes.plot(*measured[name], "D", color=PURPLE, label=label, zorder=4, **mark)
        for x, y in where:
            axes.annotate(letter, (x, y), corners[i % 4], textcoords="offset points", fontsize=8,
                          zorder=6)  # fmt: skip
    if measured:
        axes.plot([], [], "D", color=PURPLE, label="measured", **mark)
    return [np.array([p], float) for p in (*named.values(), *measured.values())]


def _limits(axes: Axes, points: np.ndarray) -> None:
    """Show all of `points` (n, 2) with a margin; the cloud may go beyond."""
    low, high = points.min(0), points.max(0)
    room = np.maximum((high - low) * [0.08, 0.12], [0.05 * high[0], 0.005])
    axes.set_xlim(max(0.0, low[0] - room[0]), high[0] + room[0])
    axes.set_ylim(low[1] - room[1], high[1] + room[1])
