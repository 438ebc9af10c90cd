"""Does a model answer to a marker that somebody put on the film? Put one on and see.

A map does not tell: a network that answers to a marker alone kept 80 % of its map's energy outside
the lungs, a clean one 83 %. The counterfactual does: with the marker the answer must stay what it
was. A flat patch in the same place is the control: what it does is not the marker's doing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgekd.metrics.calibration import softmax

# 5 rows of 4 pixels each
GLYPHS = {"L": "1000 1000 1000 1000 1111", "R": "1110 1001 1110 1010 1001"}


class Marker(NamedTuple):
    """Where something is drawn, and what."""

    name: str
    box: tuple[slice, slice]  # rows and columns
    ink: np.ndarray  # (h, w) bool: what is white; the rest of the box is left as it is


def markers(height: int, width: int) -> list[Marker]:
    """Letters in the upper corners, a box in a lower one, a strip along the left border."""
    side = max(5, round(min(height, width) / 12))
    gap = max(1, round(min(height, width) / 24))
    found = []
    for name, glyph in GLYPHS.items():
        ink = _glyph(glyph, side)
        rows = slice(gap, gap + side)
        wide = ink.shape[1]
        found += [
            Marker(f"{name} upper left", (rows, slice(gap, gap + wide)), ink),
            Marker(f"{name} upper right", (rows, slice(width - gap - wide, width - gap)), ink),
        ]
    low = (slice(height - gap - side, height - gap), slice(gap, gap + side))
    found.append(Marker("box lower left", low, np.ones((side, side), bool)))
    strip = max(2, round(width / 32))
    found.append(
        Marker("strip left", (slice(0, height), slice(0, strip)), np.ones((height, strip), bool))
    )
    return found


def _glyph(rows: str, side: int) -> np.ndarray:
    """(side, 3/4 side) bool: a letter of 5 x 4 pixels, nearest neighbour."""
    small = np.array([[c == "1" for c in row] for row in rows.split()])  # (5, 4)
    wide = max(4, side * 3 // 4)
    down, across = np.arange(side) * 5 // side, np.arange(wide) * 4 // wide
    return np.asarray(small[down][:, across])


def marked(pixels: np.ndarray) -> np.ndarray:
    """(2 * M, H, W, 3) uint8 of one picture (H, W, 3): each marker, then each flat patch.

    The patch has the shape of the marker and the mean of what it covers.
    """
    found = markers(*pixels.shape[:2])
    shown = np.repeat(pixels[None], 2 * len(found), 0)
    for i, m in enumerate(found):
        shown[i][m.box][m.ink] = 255
        patch = shown[len(found) + i][m.box]  # a view
        patch[m.ink] = patch[m.ink].mean(0).round()
    return shown


def moved(
    logits: np.ndarray, logits_marked: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """(total variation, whether the answer changed), (N, 2 * M) each.

    logits: (N, K); logits_marked: (N, 2 * M, K). Total variation is in [0, 1]: half the sum of
    how far the probabilities moved.
    """
    p, q = softmax(logits, temperature)[:, None], softmax(logits_marked, temperature)
    return np.abs(q - p).sum(-1) / 2, (q.argmax(-1) != p.argmax(-1)).astype(float)
