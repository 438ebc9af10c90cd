"""How good are the answers? Balanced accuracy, macro F1, macro AUROC with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.records import Metric, Track, untracked
from edgekd.runtimes import Session

RESAMPLES = 1000


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
    seed: int = 0,
) -> tuple[dict[str, Metric], dict[str, dict[str, float]]]:
    """Metrics of (N, K) logits against (N,) labels, and each class's own figures.

    Intervals are the 2.5 and 97.5 percentiles of RESAMPLES bootstraps that draw whole groups
    (patients), since images of one patient are not independent.
    """
    everyone = np.ones(len(labels))
    point = _figures(logits, labels, everyone)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        drawn.append(_figures(logits, labels, times[member].astype(float)))
    metrics = {}
    for key, value in point.items():
        low, high = np.nanpercentile([d[key] for d in drawn], [2.5, 97.5])
        metrics[f"{prefix}_{key}"] = Metric(value=value, low=float(low), high=float(high))
    return metrics, _per_class(logits, labels, classes)


def _figures(logits: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """The four figures with each image counted `weight` times; classes that are absent drop out."""
    confusion = _confusion(logits, labels, weight)
    support, given = confusion.sum(1), confusion.sum(0)
    seen = support > 0
    right = np.diag(confusion)
    f1 = 2 * right[seen] / (support + given)[seen]
    return {
        "balanced_accuracy": float((right[seen] / support[seen]).mean()),
        "accuracy": float(right.sum() / support.sum()),
        "macro_f1": float(f1.mean()),
        "macro_auroc": _macro_auroc(logits, labels, weight),
    }


def _confusion(logits: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(K, K) weighted counts: rows are true classes, columns the answers."""
    k = logits.shape[1]
    flat = np.bincount(labels * k + logits.argmax(1), weights=weight, minlength=k * k)
    return flat.reshape(k, k)


def _macro_auroc(logits: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> float:
    """Mean one-against-rest area under the ROC curve, from softmax probabilities."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    areas = [_auroc(p[:, c], labels == c, weight) for c in range(p.shape[1])]
    areas = [a for a in areas if a == a]
    return float(np.mean(areas)) if areas else float("nan")


def _auroc(score: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> float:
    """Weighted probability that a positive outscores a negative, ties counting half."""
    values, place = np.unique(score, return_inverse=True)
    pos = np.bincount(place, weights=weight * positive, minlength=len(values))
    neg = np.bincount(place, weights=weight * ~positive, minlength=len(values))
    if pos.sum() == 0 or neg.sum() == 0:
        return float("nan")
    return float((pos * (np.cumsum(neg) - neg / 2)).sum() / (pos.sum() * neg.sum()))


def _per_class(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    confusion = _confusion(logits, labels, np.ones(len(labels)))
    table = {}
    for i, name in enumerate(classes):
        right, support, given = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
        table[name] = {
            "recall": right / support if support else 0.0,
            "precision": right / given if given else 0.0,
            "f1": 2 * right / (support + given) if support + given else 0.0,
            "images": support,
        }
    return table


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation tau-b of (N,) with (N,), in [-1, 1]; 0 where all of one are equal."""
    signs = [np.sign(np.subtract.outer(x, x)) for x in (a, b)]
    of = float(np.sqrt(np.prod([np.square(s).sum() for s in signs])))
    return float((signs[0] * signs[1]).sum() / of) if of else 0.0
