"""Score-CAM over any Session: why did the model, or the very file that is deployed, say so?

Gradient-free (Wang et al. 2020, arXiv 1910.01279): show the model the image through each channel
of its own feature map, and add up the channels by how much of the class each one lets through.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from edgekd.metrics.calibration import softmax
from edgekd.records import EdgeKDError, unknown
from edgekd.runtimes import Outputs, Session

# evidence: our variant, which carries the verdict. Centring over classes and channels leaves what
# speaks for this class and not for others; without it a network with a random head agrees with the
# healthy one (r = 0.92). Logits + constant leave the map alone, logits * s only scale it.
# published: the authors' code (haofanwang/Score-CAM d312f14), but for its ReLU, applied here
# before upsampling.
# grad-cam, torchcam: pytorch-grad-cam 1.5.7's and torchcam 0.5.0's ScoreCAM to the last detail,
# for comparison.
Variant = Literal["evidence", "published", "grad-cam", "torchcam"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

FLAT = 1e-6  # a channel whose range is below this share of the largest value says nothing
ALIKE = 0.98  # r with the exact map that a fast one must have
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the channels, that are tried
NOISE = 1e-3  # of an answer, as a share of their variance
AHEAD = 2  # batches that the session has at a time: streams do not wait for the last of one
NOTHING = 1e-9  # a map whose peak is not above this is undefined
COARSE = 10  # cells a side, under which a map is drawn as its cells
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


class Passes(NamedTuple):
    """What a model said of an image and of the image as seen through channels of its own map."""

    act: np.ndarray  # (C, h, w) float32, the live channels; negative parts cut off for evidence
    masked: np.ndarray  # (C, K) float64 logits of the image seen through each
    pooled: np.ndarray  # (C, F) float32 mean over the map of each of its features, then
    logits: np.ndarray  # (K,) float32, of the whole image
    asked: int  # masked images that the model saw: C, or fewer where most were estimated


def score_cam(
    session: Session,
    image: np.ndarray,
    label: int,
    *,
    variant: Variant = "evidence",
    batch: int = 16,
    share: float = 1.0,
) -> Heat:
    """Score-CAM map of class `label` at feature resolution.

    image: (3, H, W) float32, prepared. The session is asked for 1 image, then for `batch` masked
    ones at a time (the last time for the rest). share: of the channels that are asked, 1: exact.
    EdgeKDError if there is no such class or variant.
    """
    started = time.perf_counter()
    found = ask(session, image, variant=variant, batch=batch, share=share)
    if not 0 <= label < len(found.logits):
        raise EdgeKDError(f"no class {label} to explain: the model has {len(found.logits)}")
    heat = class_maps(found, variant)[label]
    defined = not np.isnan(heat).any()
    return Heat(heat if defined else None, found.logits, time.perf_counter() - started)


def ask(
    session: Session,
    image: np.ndarray,
    *,
    variant: Variant = "evidence",
    batch: int = 16,
    share: float = 1.0,
) -> Passes:
    """Show the model the image (3, H, W), and through its channels: all that maps are made of.

    share: of the live channels, those whose answers tell most of the map (`telling`); the others'
    answers are estimated from theirs (`spread`). `fast_share` finds out how many are enough.
    """
    if variant not in VARIANTS:
        raise EdgeKDError(unknown("variant", variant, VARIANTS))
    logits, features = session(image[None])
    act = np.maximum(features[0], 0) if variant == "evidence" else features[0]  # (C, h, w)
    if variant not in LIBRARIES:  # which show the model a blank image for each flat channel
        act = _live(act)
    few = telling(act, share)
    masked, pooled = _masked(session, image, act[few], variant, batch, logits.shape[1])
    return _filled(act, few, masked, pooled, logits[0])


def live_channels(features: np.ndarray) -> np.ndarray:
    """(C, h, w) float32: the channels of one image's features that say anything, cut off at 0."""
    return _live(np.maximum(features, 0))


def _live(act: np.ndarray) -> np.ndarray:
    """Those of (C, h, w) channels that are not flat."""
    return act[np.ptp(act, axis=(1, 2)) > FLAT * np.abs(act).max()]


def ask_through(
    session: Session, image: np.ndarray, channels: np.ndarray, *, batch: int = 16
) -> Passes:
    """Show the model the image (3, H, W), and through another model's channels (C, h, w).

    Score-CAM masks each model by its own channels, so that two maps differ already in what was
    hidden. Through the same masks they differ in what the models do: the `class_maps` of these
    passes are M_f = ReLU(sum_k w_k(f) A_k), A_k the other's `live_channels`, w_k(f) the answers of
    this model, class-centred, less their mean over k.
    """
    logits, _ = session(image[None])
    masked, pooled = _masked(session, image, channels, "evidence", batch, logits.shape[1])
    return Passes(channels, masked, pooled, logits[0], len(channels))


def fewer(found: Passes, share: float) -> Passes:
    """What `ask` finds at `share`, from all the answers: costs no pass."""
    few = telling(found.act, share)
    return _filled(found.act, few, found.masked[few], found.pooled[few], found.logits)


def _filled(
    act: np.ndarray, few: np.ndarray, masked: np.ndarray, pooled: np.ndarray, logits: np.ndarray
) -> Passes:
    """The answers of the channels `few`, and estimates of all others."""
    if len(few) < len(act):
        both = spread(act, few, np.concatenate([masked, pooled], 1))
        masked, pooled = both[:, : masked.shape[1]], both[:, masked.shape[1] :].astype(np.float32)
    return Passes(act, masked, pooled, logits, len(few))


class Fast(NamedTuple):
    """How many channels are enough, and what of the exact maps is kept then."""

    share: float  # 1: no fewer are, every map is exact
    worst: float  # Pearson's r of the fast map with the exact one, the lowest of any image
    mean: float


def fast_share(
    session: Session,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    variant: Variant = "evidence",
    batch: int = 16,
    least: float = ALIKE,
    shares: Sequence[float] = SHARES,
) -> Fast:
    """The least of `shares` at which the fast maps of `images` are certified, or 1.

    Certified: every image's map of its class in `labels` (N,) has an r of `least` or more with its
    exact map, which is made first. images: (N, 3, H, W) like those to come. An image whose exact
    map is undefined says nothing; without any other nothing is certified.
    """
    found = [ask(session, image, variant=variant, batch=batch) for image in images]
    exact = [class_maps(f, variant)[k] for f, k in zip(found, labels, strict=True)]
    for share in sorted(shares):
        fast = [class_maps(fewer(f, share), variant)[k] for f, k in zip(found, labels, strict=True)]
        r = [_alike(a, b) for a, b in zip(fast, exact, strict=True) if not np.isnan(b).any()]
        if r and min(r) >= least:
            return Fast(share, min(r), float(np.mean(r)))
    return Fast(1.0, 1.0, 1.0)


def _alike(fast: np.ndarray, exact: np.ndarray) -> float:
    """Pearson's r of two maps; -1 where there is none."""
    if np.isnan(fast).any() or not np.ptp(fast) or not np.ptp(exact):
        return -1.0
    return float(np.corrcoef(fast.ravel(), exact.ravel())[0, 1])


def class_maps(found: Passes, variant: Variant = "evidence") -> np.ndarray:
    """(K, h, w) float32 map of every class, >= 0, not normalised; NaN where it is undefined."""
    classes, (channels, h, w) = len(found.logits), found.act.shape
    if not channels:
        return np.full((classes, h, w), np.nan, np.float32)
    maps = np.tensordot(_weights(found.masked, variant), found.act.astype(np.float64), 1)
    maps = np.maximum(maps, 0).astype(np.float32)  # (K, h, w)
    maps[maps.max((1, 2)) <= NOTHING] = np.nan
    return maps


def random_head(found: Passes, seed: int = 0) -> Passes:
    """The same passes, answered by a linear head of random weights on the pooled features.

    Nothing of what the network learnt of the classes is in it: a map that stays as it was is blind
    to them (Adebayo et al. 2018). It costs no pass, and can be had of any file in any runtime. Its
    logits spread over the passes as the network's own do.
    """
    if not len(found.act):
        return found
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((found.pooled.shape[1], len(found.logits)))
    said = (found.pooled - found.pooled.mean(0)).astype(np.float64) @ weights
    spread_of = said.std() or 1.0
    return found._replace(masked=said * (found.masked.std() or 1.0) / spread_of)


LIBRARIES = ("grad-cam", "torchcam")  # whose eps and treatment of flat channels are their own


def _masked(
    session: Session,
    image: np.ndarray,
    act: np.ndarray,
    variant: Variant,
    batch: int,
    classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (C, K) float64 and pooled features (C, F) of the image seen through each of `act`.

    act: (C, h, w). Holds AHEAD + 1 times `batch` masked images: while the session looks at some,
    the next ones are made.
    """
    if not len(act):
        return np.zeros((0, classes)), np.zeros((0, 0), np.float32)
    side, corners = image.shape[1:], variant == "grad-cam"
    rows = interpolation(act.shape[1], side[0], corners)  # (H, h)
    columns = np.ascontiguousarray(interpolation(act.shape[2], side[1], corners).T)  # (w, W)
    base = blur(image) if variant == "evidence" else np.zeros_like(image)
    detail = image - base
    outlines = _outlines(act, rows, columns, variant)
    batches = -(-len(act) // batch)
    shown = [np.empty((min(batch, len(act)), *image.shape), np.float32)
             for _ in range(min(batches, AHEAD + 1))]  # fmt: skip
    logits: list[np.ndarray] = []
    pooled: list[np.ndarray] = []

    def keep(said: Outputs) -> None:
        logits.append(said.logits.astype(np.float64))
        pooled.append(said.features.mean((2, 3)))

    asked: deque[Future[Outputs]] = deque()
    with ThreadPoolExecutor(AHEAD) as others:
        for i in range(batches):
            few, free = outlines[i * batch : (i + 1) * batch], shown[i % len(shown)]
            for outline, seen in zip(few, free, strict=False):
                # One by one, a mask and what it makes stay in the cache.
                np.multiply(rows @ outline @ columns, detail, out=seen)
                seen += base
            if len(asked) == AHEAD:
                keep(asked.popleft().result())
            asked.append(others.submit(session, free[: len(few)]))
        for left in asked:
            keep(left.result())
    return np.concatenate(logits), np.concatenate(pooled)


def _outlines(
    act: np.ndarray, rows: np.ndarray, columns: np.ndarray, variant: Variant
) -> np.ndarray:
    """(C, h, w) float32 that, resampled by `rows` (H, h) and `columns` (w, W), are the masks.

    A mask goes from 0 to 1. Between four neighbours in a map the resampled one is bilinear, so
    that its ends are at the outermost points there: no others are looked at.
    """
    ends = act
    if variant != "torchcam":  # which scales the map itself, not what it becomes
        ends = rows[_outer(rows)] @ act @ columns[:, _outer(columns.T)]
    low = ends.min((1, 2), keepdims=True)
    high = ends.max((1, 2), keepdims=True)
    # only live channels come here in the other variants
    eps = np.float32(1e-8 if variant in LIBRARIES else 0)
    return np.asarray((act - low) / (high - low + eps), np.float32)


def _outer(matrix: np.ndarray) -> np.ndarray:
    """Indices of the rows of an (m, n) `interpolation` that are first or last between two points"""
    low = (matrix > 0).argmax(1)
    new = np.flatnonzero(np.diff(low))
    return np.union1d(np.union1d(new, new + 1), [0, len(low) - 1])


def _weights(logits: np.ndarray, variant: Variant) -> np.ndarray:
    """(K, C) weights of the channels, for each class, from the (C, K) logits of masked images."""
    if variant == "evidence":
        score = logits - logits.mean(1, keepdims=True)
        return (score - score.mean(0)).T
    if variant == "published":
        return softmax(logits).T
    return softmax(logits.T)  # torchcam takes off the whole image's logit first, which cancels


def telling(act: np.ndarray, share: float) -> np.ndarray:
    """The channels of (C, h, w) whose answers tell most of the map, sorted: `share` of all.

    By what the masks are like alone: one after the other, the channel whose answer, when it is
    known beside those taken before, leaves least of the map's variance. On trained networks a
    fifth of the channels told what took k-means' medoids two fifths.
    """
    if share >= 1 or len(act) < 3:
        return np.arange(len(act))
    left = _kernel(act)  # (C, C) covariance of the answers that is left
    shape = act - act.mean((1, 2), keepdims=True)  # r does not see a map's level
    of_map = shape.reshape(len(act), -1).T @ left  # (h * w, C) of the map with the answers
    few: list[int] = []
    for _ in range(max(2, round(share * len(act)))):
        variance = np.diag(left) + NOISE
        told = (of_map * of_map).sum(0) / variance
        told[few] = -1
        k = int(told.argmax())
        few.append(k)
        row = left[k] / variance[k]
        of_map -= np.outer(of_map[:, k], row)
        left -= np.outer(left[:, k], row)
    return np.sort(few)


def spread(act: np.ndarray, few: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(C, K) answers for all masks, estimated from those (n, K) of the channels `few`, kept exact.

    The mean of a Gaussian process over masks: what is alike is answered alike.
    """
    kernel = _kernel(act)[:, few]  # (C, n)
    mean = answers.mean(0)
    inner = kernel[few] + NOISE * np.eye(len(few))
    found = mean + kernel @ np.linalg.solve(inner, answers - mean)
    found[few] = answers
    return np.asarray(found)


def _kernel(act: np.ndarray) -> np.ndarray:
    """(C, C) float64 from 0 to 1: how alike masks are, at the map's own resolution.

    As wide as their median distance: other widths, a linear part, or what makes the answers most
    likely told no more of the maps on trained networks.
    """
    low = act.min((1, 2), keepdims=True)
    range_ = np.ptp(act, axis=(1, 2), keepdims=True)
    masks = ((act - low) / np.where(range_ > 0, range_, 1)).reshape(len(act), -1).astype(float)
    square = (masks * masks).sum(1)
    apart = np.maximum(square[:, None] + square - 2 * masks @ masks.T, 0)
    width = np.median(apart[~np.eye(len(apart), dtype=bool)])
    return np.asarray(np.exp(-apart / (2 * (width or 1.0))))


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
def gaussian(n: int, sigma: float) -> np.ndarray:
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
    return gaussian(height, sigma) @ image @ gaussian(width, sigma).T


def resize(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: an (h, w) map, bilinear with half-pixel centres (align_corners=False)."""
    (h, w), (height, width) = heat.shape, size
    up = interpolation(h, height) @ heat.astype(np.float32) @ interpolation(w, width).T
    return np.asarray(up, np.float32)


def drawn(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: an (h, w) map as pictures show it.

    One of fewer than COARSE cells along a side is shown as its cells, since a smooth hill would
    promise an outline that it does not have; a finer one is resampled as `resize` does.
    """
    (h, w), (height, width) = heat.shape, size
    if min(h, w) >= COARSE:
        return resize(heat, size)
    rows = np.minimum((np.arange(height) + 0.5) * h / height, h - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * w / width, w - 1).astype(int)
    return np.asarray(heat[np.ix_(rows, columns)], np.float32)


def unit(heat: np.ndarray) -> np.ndarray:
    """The map scaled to [0, 1], for pictures; a constant one becomes all zeros."""
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def overlay(picture: np.ndarray, heat: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """(H, W, 3) uint8: `picture` (H, W, 3) uint8 coloured where `heat` (h, w) is high.

    Opacity grows with the heat up to `strength`: where the map is cold the picture is untouched. A
    coarse map is shown as its cells, see `drawn`.
    """
    hot = unit(drawn(heat, (picture.shape[0], picture.shape[1])))[..., None]  # (H, W, 1)
    mixed = picture + strength * hot * (magma(hot[..., 0]) - picture.astype(np.float32))
    return np.asarray(np.rint(mixed), np.uint8)


def veil(heat: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W, 4) uint8: what `overlay` lays over a picture of `size` at full strength, alone."""
    hot = unit(drawn(heat, (size[0], size[1])))  # (H, W)
    return np.rint(np.dstack([magma(hot), 255 * hot])).astype(np.uint8)


def magma(x: np.ndarray) -> np.ndarray:
    """(..., 3) float64 colours in [0, 255] of values in [0, 1]."""
    table = np.array([list(bytes.fromhex(c)) for c in MAGMA.split()], float)  # (17, 3)
    steps = np.linspace(0, 1, len(table))
    return np.stack([np.interp(x, steps, table[:, i]) for i in range(3)], -1)
