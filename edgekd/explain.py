"""Score-CAM over any Session: why did the model, or the very file that is deployed, say so?

Gradient-free (Wang et al. 2020, arXiv 1910.01279): show the model the image through each channel
of its own feature map, and add up the channels by how much of the class each one lets through.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from edgekd.confidence import softmax
from edgekd.records import EdgeKDError, unknown
from edgekd.runtimes import Session

# evidence: our variant, which carries the figures. Centring over classes and channels leaves what
# speaks for this class and not for others; without it a network with a random head agrees with the
# healthy one (r = 0.92). Logits + constant leave the map alone, logits * s only scale it.
# published: the authors' code (haofanwang/Score-CAM d312f14), but for its ReLU, applied here
# before upsampling.
# grad-cam: pytorch-grad-cam 1.5.7's ScoreCAM to the last detail, for comparison.
Variant = Literal["evidence", "published", "grad-cam"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

FLAT = 1e-6  # a channel whose range is below this share of the largest value says nothing
NOTHING = 1e-9  # a map whose peak is not above this is undefined
# matplotlib's magma at 17 even steps (perceptually uniform); linear in between: 1 % off at most
MAGMA = (
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961"
    " fea772 fec488 fde2a3 fcfdbf"
)


class Heat(NamedTuple):
    """One explanation, and what the model said of the whole image."""

    map: np.ndarray | None  # (h, w) float32 >= 0, not normalised; None: undefined, nothing to say
    logits: np.ndarray  # (K,) float32
    seconds: float  # wall clock for the map


def score_cam(
    session: Session,
    image: np.ndarray,
    label: int,
    *,
    variant: Variant = "evidence",
    batch: int = 16,
) -> Heat:
    """Score-CAM map of class `label` at feature resolution.

    image: (3, H, W) float32, prepared. The session is asked for 1 image, then for `batch` masked
    ones at a time (the last time for the rest). EdgeKDError if there is no such class or variant.
    """
    if variant not in VARIANTS:
        raise EdgeKDError(unknown("variant", variant, VARIANTS))
    started = time.perf_counter()
    logits, features = session(image[None])
    if not 0 <= label < logits.shape[1]:
        raise EdgeKDError(f"no class {label} to explain: the model has {logits.shape[1]}")
    act = np.maximum(features[0], 0) if variant == "evidence" else features[0]  # (C, h, w)
    if variant != "grad-cam":  # which shows the model a blank image for each flat channel
        act = act[np.ptp(act, axis=(1, 2)) > FLAT * np.abs(act).max()]
    heat = None
    if len(act):
        weights = _weights(_masked_logits(session, image, act, variant, batch), label, variant)
        heat = np.maximum(np.tensordot(weights, act.astype(np.float64), 1), 0)  # (h, w)
    if heat is not None:
        heat = heat.astype(np.float32) if heat.max() > NOTHING else None
    return Heat(heat, logits[0], time.perf_counter() - started)


def _masked_logits(
    session: Session, image: np.ndarray, act: np.ndarray, variant: Variant, batch: int
) -> np.ndarray:
    """(C, K) float64 logits of the image seen through each channel of `act` (C, h, w).

    Holds `batch` masked images at a time, in one buffer.
    """
    side, corners = image.shape[1:], variant == "grad-cam"
    rows = interpolation(act.shape[1], side[0], corners)  # (H, h)
    columns = interpolation(act.shape[2], side[1], corners).T  # (w, W)
    base = blur(image) if variant == "evidence" else np.zeros_like(image)
    detail = image - base
    shown = np.empty((min(batch, len(act)), *image.shape), np.float32)  # (B, 3, H, W)
    parts = []
    for first in range(0, len(act), batch):
        masks = rows @ act[first : first + batch] @ columns  # (B, H, W) float32
        masks -= masks.min((1, 2), keepdims=True)
        # the 1e-8 is pytorch-grad-cam's; only live channels come here in the other variants
        masks /= masks.max((1, 2), keepdims=True) + np.float32(1e-8 if corners else 0)
        seen = shown[: len(masks)]
        np.multiply(masks[:, None], detail, out=seen)
        np.add(seen, base, out=seen)
        parts.append(session(seen).logits.astype(np.float64))
    return np.concatenate(parts)


def _weights(logits: np.ndarray, label: int, variant: Variant) -> np.ndarray:
    """(C,) weights of the channels from the (C, K) logits of the masked images."""
    if variant == "evidence":
        score = logits[:, label] - logits.mean(1)
        return score - score.mean()
    if variant == "published":
        return softmax(logits)[:, label]
    return softmax(logits[:, label])


@lru_cache(maxsize=32)
def interpolation(n: int, m: int, align_corners: bool = False) -> np.ndarray:
    """(m, n) float32 matrix that resamples n points linearly at m, as torch's `interpolate` does.

    Cached, so read-only.
    """
    if align_corners:
        at = np.arange(m) * ((n - 1) / max(m - 1, 1))
    else:
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), n - 1)
    share = at - low
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m), low), 1 - share)
    np.add.at(matrix, (np.arange(m), np.minimum(low + 1, n - 1)), share)
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=8)
def _gaussian(n: int, sigma: float) -> np.ndarray:
    """(n, n) float32 matrix that blurs n points; beyond the ends they are mirrored (cba|abc|cba).

    Cut off at 4 sigma: scipy.ndimage.gaussian_filter's defaults.
    """
    reach = int(4 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    at = (np.arange(n)[:, None] + offsets) % (2 * n)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], np.minimum(at, 2 * n - 1 - at)), weights)
    matrix = (matrix / weights.sum()).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def blur(image: np.ndarray, share: float = 0.1) -> np.ndarray:
    """(3, H, W) float32: the image with all detail gone; sigma is `share` of the shorter side."""
    height, width = image.shape[1:]
    sigma = share * min(height, width)
    return _gaussian(height, sigma) @ image @ _gaussian(width, sigma).T


def resize(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: an (h, w) map, bilinear with half-pixel centres (align_corners=False)."""
    (h, w), (height, width) = heat.shape, size
    up = interpolation(h, height) @ heat.astype(np.float32) @ interpolation(w, width).T
    return np.asarray(up, np.float32)


def unit(heat: np.ndarray) -> np.ndarray:
    """The map scaled to [0, 1], for pictures; a constant one becomes all zeros."""
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def overlay(picture: np.ndarray, heat: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """(H, W, 3) uint8: `picture` (H, W, 3) uint8 coloured where `heat` (h, w) is high.

    Opacity grows with the heat up to `strength`: where the map is cold the picture is untouched.
    """
    hot = unit(resize(heat, picture.shape[:2]))[..., None]  # (H, W, 1)
    mixed = picture + strength * hot * (magma(hot[..., 0]) - picture.astype(np.float32))
    return np.asarray(np.rint(mixed), np.uint8)


def magma(x: np.ndarray) -> np.ndarray:
    """(..., 3) float64 colours in [0, 255] of values in [0, 1]."""
    table = np.array([list(bytes.fromhex(c)) for c in MAGMA.split()], float)  # (17, 3)
    steps = np.linspace(0, 1, len(table))
    return np.stack([np.interp(x, steps, table[:, i]) for i in range(3)], -1)
