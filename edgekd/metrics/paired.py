"""Is one model better than another on the same images? McNemar's test and a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.metrics.classification import bootstrap, calibration_figures, figures
from edgekd.records import Artifact, EdgeKDError, Paired


def mcnemar(this_right: np.ndarray, other_right: np.ndarray) -> tuple[int, int, float]:
    """(images only this has right, only the other, two-sided mid-p) of (N,) bool each.

    Mid-p McNemar (Fagerland, Lydersen, Laake 2013, doi 10.1186/1471-2288-13-91): the chance of a
    more uneven split of the discordant images, and half that of one as uneven. It keeps its level
    where the exact test is too strict and chi-square too lax. 1 if no image is discordant.
    """
    from scipy.stats import binom

    if len(this_right) != len(other_right):
        raise EdgeKDError(
            f"a paired test needs both answers of every image, got {len(this_right)} and "
            f"{len(other_right)}: judge both models on the same split"
        )
    this = int((this_right & ~other_right).sum())
    other = int((other_right & ~this_right).sum())
    n, least = this + other, min(this, other)
    if n == 0:
        return 0, 0, 1.0
    same = float(binom.pmf(least, n, 0.5))
    if this == other:
        return this, other, 1 - same / 2
    return this, other, 2 * float(binom.cdf(least, n, 0.5)) - same


def compare(
    log_p: np.ndarray,
    other_log_p: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    other: Artifact,
    *,
    seed: int = 0,
) -> Paired:
    """A model's (N, K) log probabilities beside `other`'s, on images with (N,) labels.

    Differences are this less the other, both drawn in the same resamples of whole groups.
    """
    right, other_right = log_p.argmax(1) == labels, other_log_p.argmax(1) == labels
    this, that, p = mcnemar(right, other_right)

    def measure(weight: np.ndarray) -> dict[str, np.ndarray]:
        a, b = (
            figures(x, labels, weight).overall | calibration_figures(x, labels, weight)
            for x in (log_p, other_log_p)
        )
        return {key: a[key] - b[key] for key in a}

    return Paired(
        against=other.model,
        sha256=other.sha256,
        images=len(labels),
        groups=len(set(groups)),
        only_this_right=this,
        only_other_right=that,
        mcnemar_p=p,
        differences=bootstrap(measure, groups, seed, exact=True),
    )
