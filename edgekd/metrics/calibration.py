"""How sure is an answer? Logits to calibrated probabilities: the one place where that is done.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2): one positive number divides
all logits, so the order of the classes, and with it the answer, stays what it was.
"""

from __future__ import annotations

import numpy as np

from edgekd.records import Artifact, Bin, EdgeKDError

BINS = 15  # equally wide, (m - 1) / 15 < confidence <= m / 15, as in Guo et al.
COOLEST, HOTTEST = 0.01, 100.0  # bounds of the search for a temperature


def probabilities(logits: np.ndarray, artifact: Artifact) -> np.ndarray:
    """(..., K) float64 in [0, 1]: what `artifact`'s logits (..., K) mean, at its temperature."""
    return softmax(logits, artifact.temperature)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(..., K) float64 over the last axis, of the logits divided by `temperature`."""
    return np.exp(log_softmax(logits, temperature))


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(..., K) float64: the logarithm of `softmax`, finite for finite logits."""
    z = np.asarray(logits, np.float64)
    z = (z - z.max(-1, keepdims=True)) / temperature
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[float, str]:
    """(temperature, method) of least negative log-likelihood of (N, K) logits, (N,) labels.

    The NLL is convex in 1 / temperature, so a bounded scalar search finds its minimum. It has none
    where every image is answered right (the temperature would go to 0): there, and there alone,
    the targets are (N + 1) / (N + K) for the true class and 1 / (N + K) for each other
    ("nll-smoothed"; Laplace's rule of succession, as Platt 1999 has it for two classes).
    """
    from scipy.optimize import minimize_scalar

    n, k = logits.shape
    if n == 0:
        raise EdgeKDError("a temperature is fitted on validation images, got none: add some")
    targets, method = np.eye(k)[labels], "nll"
    if (logits[np.arange(n), labels] >= logits.max(1)).all():
        targets, method = (n * targets + 1) / (n + k), "nll-smoothed"

    def nll(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits, np.exp(log_temperature))).sum() / n)

    found = minimize_scalar(
        nll, bounds=np.log([COOLEST, HOTTEST]), method="bounded", options={"xatol": 1e-8}
    )
    return float(np.exp(found.x)), method


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """(N,) int in 0..14: the bin of each confidence (N,) in [0, 1]."""
    return np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)


def reliability(p: np.ndarray, labels: np.ndarray) -> tuple[Bin, ...]:
    """The bins that hold images, of (N, K) probabilities and (N,) labels.

    Their ECE is the mean of |accuracy - confidence| over bins, weighted by images.
    """
    edges, confidence = np.linspace(0, 1, BINS + 1), p.max(1)
    right, place = p.argmax(1) == labels, bins_of(p.max(1))
    return tuple(
        Bin(
            low=float(edges[m]),
            high=float(edges[m + 1]),
            images=int((place == m).sum()),
            confidence=float(confidence[place == m].mean()),
            accuracy=float(right[place == m].mean()),
        )
        for m in np.unique(place)
    )
