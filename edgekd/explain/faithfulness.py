"""Does a map explain this model? Show it more and more, or less and less, of what the map says.

Insertion and deletion (Petsiuk et al. 2018, arXiv 1806.07421): a map that is right raises the
class at once when its hottest pixels appear, and loses it at once when they go. Single images say
little (Tomsett et al. 2020): means over many, beside those of random maps, do.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from edgekd.explain.score_cam import blur, resize
from edgekd.metrics.calibration import softmax
from edgekd.runtimes import Session

STEPS = 16
CELLS = 5  # a side, of a random smooth map
Fill = Literal["blur", "mean"]  # what stands for pixels that are not shown
FILLS: tuple[Fill, ...] = get_args(Fill)


def faithfulness(
    session: Session,
    image: np.ndarray,
    heat: np.ndarray,
    label: int,
    *,
    fill: Fill = "blur",
    temperature: float = 1.0,
    batch: int = 16,
) -> float:
    """Insertion less deletion area of a map (h, w) of class `label`, in [-1, 1]; 0 is chance.

    image: (3, H, W) prepared. The areas are means, by the trapezoid rule, of the probability of
    the class as 0, 1/16, ..., 16/16 of the pixels are shown (or not), the hottest first and of
    equals the first in reading order.
    """
    shown = _shown(image, heat, fill)  # (2 * STEPS, 3, H, W)
    parts = [session(shown[i : i + batch]).logits for i in range(0, len(shown), batch)]
    p = softmax(np.concatenate(parts), temperature)[:, label]
    # both paths join nothing and all of the image, so they share their ends
    nothing, everything, rest = p[0], p[1], p[2:]
    inserted = np.concatenate([[nothing], rest[: STEPS - 1], [everything]])
    deleted = np.concatenate([[everything], rest[STEPS - 1 :], [nothing]])
    return _area(inserted) - _area(deleted)


def _area(p: np.ndarray) -> float:
    """Trapezoid rule over [0, 1] of (n,) values at even steps."""
    return float((p[1:] + p[:-1]).mean() / 2)


def _shown(image: np.ndarray, heat: np.ndarray, fill: Fill) -> np.ndarray:
    """(2 * STEPS, 3, H, W): no pixels, all, the hottest 1/16 ... 15/16, all but these."""
    base = blur(image) if fill == "blur" else np.zeros_like(image)  # prepared: the mean is 0
    order = np.argsort(-resize(heat, image.shape[1:]).ravel(), kind="stable")
    rank = np.argsort(order).reshape(image.shape[1:])  # of each pixel, 0 the hottest
    hottest = [rank < round(j / STEPS * rank.size) for j in range(1, STEPS)]
    masks = np.stack([rank < 0, rank >= 0, *hottest, *(~m for m in hottest)])
    return np.where(masks[:, None], image, base).astype(np.float32)


def random_map(size: tuple[int, int], seed: int) -> np.ndarray:
    """(h, w) float32 in [0, 1]: smooth hills in random places, what chance would explain."""
    coarse = np.random.default_rng(seed).random((CELLS, CELLS), np.float32)
    return resize(coarse, size)
