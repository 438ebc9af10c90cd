"""What a model's answers on the validation and test splits say of it: every figure in one place.

On the validation split a temperature is fitted and thresholds are chosen; the test split is then
judged with both, as the device will use them. The logits are kept beside the record, so that other
questions can be asked of them without the model.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekd.metrics import classification, operating, paired
from edgekd.metrics.calibration import BINS, fit_temperature, log_softmax, reliability
from edgekd.records import (
    Artifact,
    Calibration,
    EdgeKDError,
    Evaluation,
    Metric,
    Paired,
    Part,
    sha256,
    write_atomic,
)

ANSWERS = "answers.npz"  # <split>_logits (N, K) float32, _labels (N,), _images (N,) short digests
SPLITS = ("val", "test")
NO_SUBGROUP = "(none given)"


class Truth(NamedTuple):
    """What is known of the images of one split, in the order of their logits."""

    labels: np.ndarray  # (N,) int
    groups: Sequence[str]  # N patients; never stored
    images: Sequence[str]  # N digests of their bytes
    subgroups: Sequence[str]  # N; "" where the data set names none


def truth(samples: Sequence[Any]) -> Truth:
    """What the data set says of its `samples` (data.Sample)."""
    return Truth(
        labels=np.array([s.label for s in samples], int),
        groups=[s.group for s in samples],
        images=[s.digest[:16] for s in samples],
        subgroups=[s.subgroup for s in samples],
    )


def judge(
    out: Path,
    logits: Mapping[str, np.ndarray],
    truths: Mapping[str, Truth],
    classes: Sequence[str],
    *,
    sensitivity: float | None = None,
    rivals: Sequence[Artifact] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """The Artifact fields metrics, per_class, calibration and evaluation; logits kept in `out`.

    logits: (N, K) float32 of splits val and test. sensitivity: what each class's threshold is to
    reach on val; None: Youden's J. rivals: artifacts to be compared with; one whose logits of
    these very test images are not kept is passed over.
    """
    try:
        import sklearn  # noqa: F401  # and with it scipy
    except ModuleNotFoundError:
        raise EdgeKDError("figures need scikit-learn: pip install 'edgekd[train]'") from None
    for split in SPLITS:
        classification.check(logits[split], truths[split].labels, classes)
    temperature, method = fit_temperature(logits["val"], truths["val"].labels)
    log_p = {split: log_softmax(logits[split], temperature) for split in SPLITS}
    points = operating.thresholds(np.exp(log_p["val"]), truths["val"].labels, classes, sensitivity)
    calibration = Calibration.parse(
        {"temperature": temperature, "method": method, "sensitivity": sensitivity,
         "thresholds": {name: t.model_dump() for name, t in points.items()}}, "calibration",
    )  # fmt: skip
    found: dict[str, Metric] = {}
    for split in SPLITS:
        t = truths[split]
        own, per_class = classification.classification(
            logits[split], t.labels, t.groups, classes,
            prefix=split, temperature=temperature, seed=seed,
        )  # fmt: skip
        found |= own
    at = np.array([points[name].probability for name in classes])
    plain = log_softmax(logits["test"])
    overall, parts = _figures(log_p["test"], plain, truths["test"], classes, at, seed)
    t = truths["test"]
    evaluation = Evaluation(
        images=len(t.labels),
        groups=len(set(t.groups)),
        bins=BINS,
        confusion=classification.confusion(log_p["test"], t.labels),
        classes=parts,
        subgroups=_subgroups(log_p["test"], plain, t, classes, at, seed),
        reliability=reliability(np.exp(log_p["test"]), t.labels),
        reliability_uncalibrated=reliability(np.exp(plain), t.labels),
        paired=_paired(log_p["test"], t, rivals, seed),
        answers_sha256=_write_answers(out / ANSWERS, logits, truths),
    )
    return {
        "metrics": found | {f"test_{key}": m for key, m in overall.items()},
        "per_class": per_class,
        "calibration": calibration,
        "evaluation": evaluation,
    }


def again(
    artifact: Artifact,
    truths: Mapping[str, Truth],
    *,
    sensitivity: float | None,
    rivals: Sequence[Artifact] = (),
) -> Artifact:
    """`artifact` judged anew from its kept logits, for other thresholds or rivals; not saved."""
    logits = {split: answers(artifact, split, truths[split].images) for split in SPLITS}
    if any(x is None for x in logits.values()):
        raise EdgeKDError(
            f"{artifact.folder} was judged on other images: restore the data, or --force"
        )
    known = {split: x for split, x in logits.items() if x is not None}
    update = judge(
        artifact.folder, known, truths, artifact.spec.classes,
        sensitivity=sensitivity, rivals=rivals, seed=artifact.seed,
    )  # fmt: skip
    update["metrics"] = artifact.metrics | update["metrics"]
    return artifact.model_copy(update=update)


def answers(artifact: Artifact, split: str, images: Sequence[str]) -> np.ndarray | None:
    """(N, K) float32 logits that `artifact` gave for these `images`; None if it was not asked."""
    if artifact.evaluation is None:
        return None
    path = artifact.folder / ANSWERS
    if not path.is_file() or sha256(path) != artifact.evaluation.answers_sha256:
        raise EdgeKDError(
            f"{path} is missing or is not the file that was saved: run the stage that made "
            f"{artifact.folder} again (--force)"
        )
    with np.load(path, allow_pickle=False) as stored:
        if stored[f"{split}_images"].tolist() != list(images):
            return None
        return np.asarray(stored[f"{split}_logits"], np.float32)


def kept(artifact: Artifact, truths: Mapping[str, Truth]) -> bool:
    """Whether `artifact`'s logits of these very test images are kept."""
    return answers(artifact, "test", truths["test"].images) is not None


def _figures(
    log_p: np.ndarray,
    plain: np.ndarray,
    t: Truth,
    classes: Sequence[str],
    at: np.ndarray,
    seed: int,
) -> tuple[dict[str, Metric], dict[str, Part]]:
    """Figures over all images and each class's against the rest.

    log_p, plain: (N, K) log probabilities, calibrated and not. at: (K,) thresholds.
    """

    def measure(weight: np.ndarray) -> dict[str, np.ndarray]:
        found = classification.figures(log_p, t.labels, weight, at)
        own = {f"{c}/{key}": x[:, c] for key, x in found.classes.items() for c in range(len(at))}
        before = classification.calibration_figures(plain, t.labels, weight)
        after = classification.calibration_figures(log_p, t.labels, weight)
        return found.overall | after | {f"{k}_uncalibrated": x for k, x in before.items()} | own

    found = classification.bootstrap(measure, t.groups, seed, centred=("ece", "ece_uncalibrated"))
    found = classification.widened(found, t.labels, t.groups)
    groups = np.asarray(t.groups)
    parts = {
        name: Part(
            images=int((t.labels == c).sum()),
            groups=len(np.unique(groups[t.labels == c])),
            metrics={
                key.partition("/")[2]: m for key, m in found.items() if key.startswith(f"{c}/")
            },
        )
        for c, name in enumerate(classes)
    }
    return {key: m for key, m in found.items() if "/" not in key}, parts


def _subgroups(
    log_p: np.ndarray,
    plain: np.ndarray,
    t: Truth,
    classes: Sequence[str],
    at: np.ndarray,
    seed: int,
) -> dict[str, Part]:
    """The overall figures of each subgroup's images alone; none where the data set names none."""
    if not any(t.subgroups):
        return {}
    named = np.array([s or NO_SUBGROUP for s in t.subgroups])
    found = {}
    for name in np.unique(named).tolist():
        chosen = np.flatnonzero(named == name)
        own = Truth(t.labels[chosen], [t.groups[i] for i in chosen.tolist()], (), ())
        overall, _ = _figures(log_p[chosen], plain[chosen], own, classes, at, seed)
        found[name] = Part(images=len(chosen), groups=len(set(own.groups)), metrics=overall)
    return found


def _paired(
    log_p: np.ndarray, t: Truth, rivals: Sequence[Artifact], seed: int
) -> dict[str, Paired]:
    """Beside each rival that answered these very images, at its own temperature."""
    found = {}
    for rival in rivals:
        theirs = answers(rival, "test", t.images)
        if theirs is not None:
            other = log_softmax(theirs, rival.temperature)
            found[f"{rival.role} {rival.precision}"] = paired.compare(
                log_p, other, t.labels, t.groups, rival, seed=seed
            )
    return found


def _write_answers(
    path: Path, logits: Mapping[str, np.ndarray], truths: Mapping[str, Truth]
) -> str:
    """Write the logits as .npz, the same bytes each time; returns the file's sha256."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for split in SPLITS:
            t = truths[split]
            arrays = {"logits": logits[split].astype(np.float32), "labels": t.labels,
                      "images": np.array(t.images)}  # fmt: skip
            for name, array in arrays.items():
                entry = zipfile.ZipInfo(f"{split}_{name}.npy")  # its date is fixed: 1980
                with file.open(entry, "w") as f:
                    np.lib.format.write_array(f, np.ascontiguousarray(array), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()
