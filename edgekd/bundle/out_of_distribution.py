"""Is an image like those that a network learnt from? A network is as sure of what it never saw.

A score on the feature map (Mahalanobis' distance under probabilistic PCA, Tipping and Bishop 1999,
of its mean over the image), and two plain rules on the pixels that say what is wrong with an empty
one. What is kept are sums over many images: nothing of a single one. numpy only.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekd.records import EdgeKDError

FILE = "familiar.npz"
AXES = 32  # 8 to 64 told as much, on magnetic resonance and two networks
KNOWN = 0.99  # of images that are usual; of validation images that are under the limit
LEAST = 10  # images of each split, to say what is usual
MARGIN = 0.5  # half the contrast of the palest usual image is blank; half-way to all, saturated


class Familiar(NamedTuple):
    """What images are usually like, as the network sees them, and as they are."""

    mean: np.ndarray  # (C,) float32, of the feature map's mean over the image
    axes: np.ndarray  # (k, C) float32, orthonormal: where they differ most
    spread: np.ndarray  # (k,) float32 standard deviation along each axis
    rest: float  # standard deviation along each of the other C - k directions
    limit: float  # score that KNOWN of the validation images do not pass
    contrast: float  # grey levels, as of `looks`: less is blank
    ends: float  # share of pixels, as of `looks`: more is saturated


def learnt(features: np.ndarray, unseen: np.ndarray, pixels: np.ndarray) -> Familiar:
    """What is usual: from pooled features (N, C) of training images, their limit from (M, C) of
    validation images, and the pixels (P, H, W, 3) uint8 of some of both.
    """
    if len(features) < LEAST or len(unseen) < LEAST:
        raise EdgeKDError(
            f"{len(features)} training and {len(unseen)} validation images do not tell what is "
            f"usual: {LEAST} of each are needed"
        )
    mean = features.mean(0, dtype=np.float64)
    _, singular, axes = np.linalg.svd(features - mean, full_matrices=False)
    variance = singular**2 / (len(features) - 1)
    kept = min(AXES, len(features) // 4, len(mean) - 1)
    # A direction that no training image differs in would make any distance along it endless.
    least = 1e-6 * variance.sum() / len(mean) or 1e-12
    rest = max(variance[kept:].sum() / (len(mean) - kept), least)
    contrast, ends = looks(pixels)
    palest, endmost = np.quantile(contrast, 1 - KNOWN), np.quantile(ends, KNOWN)
    found = Familiar(
        mean=mean.astype(np.float32),
        axes=axes[:kept].astype(np.float32),
        spread=np.sqrt(np.maximum(variance[:kept], least)).astype(np.float32),
        rest=float(np.sqrt(rest)),
        limit=0.0,
        contrast=float(MARGIN * palest),
        ends=float(endmost + MARGIN * (1 - endmost)),
    )
    limit = np.quantile(score(found, unseen), KNOWN, method="higher")
    return found._replace(limit=float(limit))


def score(usual: Familiar, pooled: np.ndarray) -> np.ndarray:
    """(N,) distance of pooled features (N, C) from what is usual; about 1 for what is."""
    apart = pooled.astype(np.float64) - usual.mean
    along = apart @ usual.axes.T  # (N, k)
    beside = np.maximum((apart**2).sum(1) - (along**2).sum(1), 0)
    squares = ((along / usual.spread) ** 2).sum(1) + beside / usual.rest**2
    return np.asarray(np.sqrt(squares / pooled.shape[1]))


def looks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((N,) grey levels from the 1st to the 99th percentile, (N,) share that is black or white)."""
    flat = pixels.reshape(len(pixels), -1)
    low, high = np.percentile(flat, (1, 99), axis=1)
    return high - low, ((flat == 0) | (flat == 255)).mean(1)


def warnings(usual: Familiar, pixels: np.ndarray, pooled: np.ndarray) -> list[tuple[str, ...]]:
    """What is unusual of each image (N, H, W, 3) uint8 with pooled features (N, C), in words."""
    found = []
    for contrast, ends, far in zip(*looks(pixels), score(usual, pooled), strict=True):
        told = []
        if contrast < usual.contrast:
            told.append(f"blank: {contrast:.0f} grey levels, the model knows {usual.contrast:.0f} "
                        "and more")  # fmt: skip
        if ends > usual.ends:
            told.append(f"saturated: {ends:.0%} of it is black or white, the model knows up to "
                        f"{usual.ends:.0%}")  # fmt: skip
        if far > usual.limit:
            told.append(f"unlike what the model learnt from: {far:.1f}, {KNOWN:.0%} of images are "
                        f"under {usual.limit:.1f}; another kind of image, or prepared "
                        "otherwise")  # fmt: skip
        found.append(tuple(told))
    return found


def packed(usual: Familiar) -> bytes:
    """As .npz, the same bytes for the same numbers."""
    with io.BytesIO() as buffer:
        np.savez(buffer, **usual._asdict())
        return buffer.getvalue()


def read(path: Path) -> Familiar:
    """What `packed` wrote; EdgeKDError if it is not that."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            arrays = [kept[name] for name in ("mean", "axes", "spread")]
            found = Familiar(*arrays, *(float(kept[name]) for name in Familiar._fields[3:]))
        axes, channels = found.axes.shape
    except (OSError, TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise EdgeKDError(f"cannot read {path}: {e}") from None
    if found.mean.shape != (channels,) or found.spread.shape != (axes,):
        raise EdgeKDError(f"{path} does not tell what is usual: its arrays do not fit")
    return found
