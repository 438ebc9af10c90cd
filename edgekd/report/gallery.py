"""Which single images the report shows, and what is shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgekd.explain import shortcuts
from edgekd.explain.fidelity import correlations, from_grid
from edgekd.explain.score_cam import drawn, unit
from edgekd.records import Comparison, Swayed
from edgekd.report import cases

MEDIAN, BEST = 2, 1  # of each class


class Through(NamedTuple):
    """What a student weighs when it is shown the same parts of an image as its teacher."""

    heat: np.ndarray | None  # (H, W) float32 in [0, 1]; None: undefined
    r: float | None  # Pearson with the teacher's own map, which is made of the same masks


class Panel(NamedTuple):
    """One image of the gallery."""

    image: str  # start of the file's hash, never its name
    label: str
    pixels: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray | None  # (H, W) bool
    maps: dict[str, np.ndarray | None]  # name -> (H, W) float32 in [0, 1]; None: undefined
    answers: dict[str, tuple[str, float]]  # name -> (class, probability)
    agreement: dict[str, float | None]  # name -> Pearson with the reference's map
    why: str = "lowest agreement"  # it was chosen
    origin: dict[str, str] = {}  # noqa: RUF012 name -> of the model that it was compressed from
    through: Through | None = None  # of the student; None: no teacher


class Pair(NamedTuple):
    """An image without and with the marker that moved its answer."""

    told: Swayed
    label: str
    pixels: np.ndarray  # (2, H, W, 3) uint8


def chosen(shown: Sequence[Comparison], count: int) -> list[tuple[int, str]]:
    """(place of an image, why it is shown), by the lowest agreement of files that must agree.

    The `count` lowest of all, then of each class the lowest, MEDIAN about its median and its BEST;
    each image once. Nobody picks.
    """
    held = cases.held(shown)
    files = [c for c in shown if c.name in held]
    images = shown[0].images
    low = [min((cases.lowest(c.images[i])[0] for c in files), default=0.0)
           for i in range(len(images))]  # fmt: skip
    order = sorted(range(len(images)), key=lambda i: (low[i], images[i].image))
    found = dict.fromkeys(order[:count], "lowest agreement")
    for label in dict.fromkeys(a.label for a in images):
        own = [i for i in order if images[i].label == label]
        middle = max(0, (len(own) - MEDIAN) // 2)
        for what, some in (("lowest", own[:1]), ("median", own[middle : middle + MEDIAN]),
                           ("best", own[-BEST:])):  # fmt: skip
            for i in some:
                found.setdefault(i, f"{what} of {label}")
    return list(found.items())


def panel(
    i: int, why: str, shown: Sequence[Comparison], maps: Mapping[str, np.ndarray],
    pixels: np.ndarray, mask: np.ndarray | None, through: np.ndarray | None = None,
) -> Panel:  # fmt: skip
    """Image `i`, (H, W, 3) uint8 `pixels` and (H, W) bool `mask`, with every model's (N, g, g).

    through: (N, g, g) of the student, through the masks of the first model, its teacher.
    """
    case, size = shown[0].images[i], (pixels.shape[0], pixels.shape[1])
    own = {c.name: c.images[i] for c in shown}
    layers = {c.name: c.layer for c in shown}

    def heat(grid: np.ndarray, layer: str) -> np.ndarray | None:
        return None if np.isnan(grid).any() else unit(drawn(_cells(grid, layer), size))

    student = None
    if through is not None:
        r = correlations(maps[shown[0].name][i : i + 1], through[i : i + 1])[0, 0]
        student = Through(heat(through[i], shown[0].layer), None if np.isnan(r) else float(r))
    return Panel(
        image=case.image,
        label=case.label,
        pixels=pixels,
        mask=mask,
        maps={n: heat(m[i], layers.get(n, "")) for n, m in maps.items()},
        answers={n: (a.answer, a.probability) for n, a in own.items()},
        agreement={n: a.figures["pearson"] for n, a in own.items()},
        why=why,
        origin={c.name: c.reference or shown[0].name for c in shown[1:]},
        through=student,
    )  # fmt: skip


def _cells(heat: np.ndarray, layer: str) -> np.ndarray:
    """(h, w) float32: the cells of the layer, such as "stage4 80x6x6", of a map (g, g) of it."""
    shape = layer.rpartition(" ")[2].split("x")  # channels, rows, columns
    return from_grid(heat, (int(shape[1]), int(shape[2]))) if len(shape) == 3 else heat


def pair(told: Swayed, label: str, pixels: np.ndarray) -> Pair:
    """The image (H, W, 3) uint8 without and with its marker."""
    names = [m.name for m in shortcuts.markers(*pixels.shape[:2])]
    marked = shortcuts.marked(pixels)[names.index(told.marker)]
    return Pair(told, label, np.stack([pixels, marked]))


def difference(shown: Panel, name: str) -> np.ndarray | None:
    """(H, W, 3) uint8: blue where the map of `name` is colder than that of its origin, red where
    it is hotter, white where they are alike; each scaled to its own peak. None if one is undefined.
    """
    own, before = shown.maps.get(name), shown.maps.get(shown.origin.get(name, ""))
    if own is None or before is None:
        return None
    apart = np.clip(own - before, -1, 1)[..., None]  # (H, W, 1)
    end = np.where(apart > 0, np.array([178.0, 24, 43]), np.array([33.0, 102, 172]))
    return np.asarray(np.rint(255 + np.abs(apart) * (end - 255)), np.uint8)
