"""How good are the answers? Figures with bootstrap 95 % intervals that draw whole groups.

Every figure is computed for a thousand resamples at once, each a row of weights: that is what the
libraries, which serve as oracles in the tests, would take a minute for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgekd.metrics.calibration import BINS, bins_of, log_softmax
from edgekd.records import EdgeKDError, Metric, Track, untracked
from edgekd.runtimes import Session

RESAMPLES = 1000
AT_ONCE = 2_000_000  # weights held in memory


class Figures(NamedTuple):
    """Of R weightings of the same N images; NaN where a figure is not defined."""

    overall: dict[str, np.ndarray]  # name -> (R,)
    classes: dict[str, np.ndarray]  # name -> (R, K), each class against the rest


def answers(
    session: Session, images: np.ndarray, *, batch: int = 32, track: Track = untracked
) -> np.ndarray:
    """(N, classes) float32 logits of prepared images (N, 3, H, W), asked `batch` at a time."""
    parts = np.array_split(np.arange(len(images)), range(batch, len(images), batch))
    return np.concatenate(
        [session(images[part]).logits for part in track(parts, "evaluating", len(images))]
    )


def classification(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    *,
    prefix: str = "test",
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[dict[str, Metric], dict[str, dict[str, float]]]:
    """Metrics of (N, K) logits against (N,) labels, and each class's own figures.

    Intervals are the 2.5 and 97.5 percentiles of RESAMPLES bootstraps that draw whole groups
    (patients), since images of one patient are not independent.
    """
    check(logits, labels, classes)
    log_p = log_softmax(logits, temperature)
    found = bootstrap(lambda w: figures(log_p, labels, w).overall, groups, seed)
    own = figures(log_p, labels, np.ones((1, len(labels)))).classes
    per_class = {
        name: {key: float(np.nan_to_num(own[key][0, i])) for key in ("recall", "precision", "f1")}
        | {"images": float((labels == i).sum())}
        for i, name in enumerate(classes)
    }
    return {f"{prefix}_{key}": m for key, m in found.items()}, per_class


def check(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """EdgeKDError unless there is one row of finite logits, one for each class, for each label."""
    if logits.shape != (len(labels), len(classes)) or not len(labels):
        raise EdgeKDError(
            f"{len(labels)} labels of {len(classes)} classes need logits of shape "
            f"({len(labels)}, {len(classes)}) and at least one image, got {logits.shape}"
        )
    if bad := int((~np.isfinite(logits)).any(1).sum()):
        raise EdgeKDError(
            f"the model answers {bad} of {len(labels)} images with NaN or infinity: train again "
            "with a lower --lr, or deploy another precision"
        )


def figures(
    log_p: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    thresholds: np.ndarray | None = None,
) -> Figures:
    """Figures of (N, K) log probabilities and (N,) labels, image n counted weight[r, n] times.

    Recall (also sensitivity of the answer), precision and F1 as in scikit-learn with
    zero_division=0; AUROC by the Mann-Whitney statistic, ties counting half. With `thresholds`
    (K,) also sensitivity and specificity of calling class k wherever its probability reaches
    thresholds[k]. Macro figures are means over the classes that are there.
    """
    k = log_p.shape[1]
    truth, given, p = np.eye(k)[labels], np.eye(k)[log_p.argmax(1)], np.exp(log_p)
    support, answered, right = weight @ truth, weight @ given, weight @ (truth * given)
    total = weight.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        there = np.where(support > 0, 1.0, np.nan)
        own = {
            "recall": right / support,
            "precision": there * np.where(answered > 0, right / answered, 0),
            "f1": there * 2 * right / (support + answered),
            "auroc": np.stack([_auroc(p[:, c], labels == c, weight) for c in range(k)], 1),
        }
        if thresholds is not None:
            called = p >= thresholds
            own["sensitivity"] = weight @ (truth * called) / support
            own["specificity"] = weight @ ((1 - truth) * ~called) / (total - support)
    overall = {
        "balanced_accuracy": _macro(own["recall"]),
        "accuracy": right.sum(1) / total[:, 0],
        "macro_f1": _macro(own["f1"]),
        "macro_auroc": _macro(own["auroc"]),
    }
    if thresholds is not None:
        overall |= {f"macro_{key}": _macro(own[key]) for key in ("sensitivity", "specificity")}
    return Figures(overall, own)


def calibration_figures(
    log_p: np.ndarray, labels: np.ndarray, weight: np.ndarray
) -> dict[str, np.ndarray]:
    """(R,) ece and nll, for arguments as in `figures`.

    ECE: Guo et al. 2017 (arXiv 1706.04599, eq. 3), 15 equally wide bins of the top probability.
    NLL: mean of -log p of the true class.
    """
    top = np.exp(log_p.max(1))
    gap = (log_p.argmax(1) == labels) - top
    total = weight.sum(1)
    by_bin = weight @ (np.eye(BINS)[bins_of(top)] * gap[:, None])  # (R, BINS)
    true = log_p[np.arange(len(labels)), labels]
    return {"ece": np.abs(by_bin).sum(1) / total, "nll": -(weight @ true) / total}


def confusion(log_p: np.ndarray, labels: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """K rows of K counts: a row for each true class, a column for each answer."""
    k = log_p.shape[1]
    counts = np.bincount(labels * k + log_p.argmax(1), minlength=k * k).reshape(k, k)
    return tuple(tuple(int(c) for c in row) for row in counts)


def bootstrap(
    measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    groups: Sequence[str],
    seed: int,
    *,
    centred: Sequence[str] = (),
    exact: bool = False,
) -> dict[str, Metric]:
    """Each figure (R,) that `measure` gives for weights (R, N), with its 95 % percentile interval.

    An undefined figure is left out; below two groups there is no interval. Nor is there one where
    every resample gives the same figure, unless it is exact, such as the difference of two models
    that answer alike: that two of two are right leaves open what the next would be.
    The draws of figures >= 0 named in `centred` are moved so that their mean is the value: the ECE
    of a resample is biased upwards, since resampling itself makes bins uneven, and its percentiles
    would lie too high.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    point = {key: float(x[0]) for key, x in measure(np.ones((1, len(member)))).items()}
    drawn: dict[str, list[np.ndarray]] = {key: [] for key in point}
    rng = np.random.default_rng(seed)
    step = max(1, AT_ONCE // len(member))
    for first in range(0, RESAMPLES if len(names) > 1 else 0, step):
        times = np.stack([
            np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
            for _ in range(min(step, RESAMPLES - first))
        ])  # fmt: skip
        for key, x in measure(times[:, member].astype(float)).items():
            drawn[key].append(x)
    return {
        key: _metric(value, np.concatenate(drawn[key] or [np.empty(0)]), key in centred, exact)
        for key, value in point.items()
        if not np.isnan(value)
    }


def _metric(value: float, drawn: np.ndarray, centred: bool, exact: bool) -> Metric:
    """A value with the percentiles of the resamples where it is defined."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or not (exact or np.ptp(drawn) > 1e-12):
        return Metric(value=value)
    if centred:
        drawn = np.maximum(drawn - drawn.mean() + value, 0)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(value=value, low=float(low), high=float(high))


def _macro(own: np.ndarray) -> np.ndarray:
    """(R,) mean over the classes (R, K) that are defined; NaN if none is."""
    count = (~np.isnan(own)).sum(1)
    return np.nansum(own, 1) / np.where(count > 0, count, np.nan)


def _auroc(score: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(R,) weighted probability that a positive outscores a negative, ties counting half."""
    order = np.argsort(score, kind="stable")
    ends = np.flatnonzero(np.append(True, np.diff(score[order]) > 0))  # first of each tie
    pos = np.add.reduceat(weight[:, order] * positive[order], ends, axis=1)
    neg = np.add.reduceat(weight[:, order] * ~positive[order], ends, axis=1)
    pairs = pos.sum(1) * neg.sum(1)
    above = (pos * (np.cumsum(neg, 1) - neg / 2)).sum(1)
    return above / np.where(pairs > 0, pairs, np.nan)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation tau-b of (N,) with (N,), in [-1, 1]; 0 where all of one are equal."""
    signs = [np.sign(np.subtract.outer(x, x)) for x in (a, b)]
    of = float(np.sqrt(np.prod([np.square(s).sum() for s in signs])))
    return float((signs[0] * signs[1]).sum() / of) if of else 0.0
