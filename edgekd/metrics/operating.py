"""Operating points: from what probability on is a class called? Chosen on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.records import EdgeKDError, Threshold


def thresholds(
    p: np.ndarray, labels: np.ndarray, classes: Sequence[str], sensitivity: float | None = None
) -> dict[str, Threshold]:
    """Each class's threshold against the rest, from (N, K) probabilities and (N,) labels."""
    found = {}
    for c, name in enumerate(classes):
        positive = labels == c
        if positive.all() or not positive.any():
            raise EdgeKDError(
                f"{int(positive.sum())} of {len(labels)} validation images are of class {name}: "
                "add some to the validation split, a threshold needs images of it and of others"
            )
        found[name] = threshold(p[:, c], positive, sensitivity)
    return found


def check(sensitivity: float | None) -> None:
    """EdgeKDError unless a threshold can be asked to reach this."""
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise EdgeKDError(
            f"a wanted sensitivity is above 0 and at most 1, such as 0.95; got {sensitivity:g} "
            "(--sensitivity)"
        )


def threshold(
    score: np.ndarray, positive: np.ndarray, sensitivity: float | None = None
) -> Threshold:
    """Where (N,) scores in [0, 1] call (N,) bool positives best: call if score >= threshold.

    sensitivity None: the largest Youden's J = sensitivity + specificity - 1 (Youden 1950), of
    equals the most sensitive. Else the highest threshold that reaches it. Half-way to the next
    score below, so that rounding in another runtime moves no image across.
    """
    from sklearn.metrics import roc_curve

    check(sensitivity)
    fpr, tpr, at = (x[1:] for x in roc_curve(positive, score, drop_intermediate=False))
    if sensitivity is None:
        j = tpr - fpr
        best = int(np.flatnonzero(j >= j.max() - 1e-12)[-1])
    else:
        best = int(np.flatnonzero(tpr >= sensitivity - 1e-12)[0])
    below = at[best + 1] if best + 1 < len(at) else 0.0
    middle = (at[best] + below) / 2
    return Threshold(
        probability=float(middle if middle > below else at[best]),
        val_sensitivity=float(tpr[best]),
        val_specificity=float(1 - fpr[best]),
    )
