"""teach() and distill(): a classifier learns from labels, and from a teacher's soft targets.

loss = alpha_hard * CE(y, z_s) + (1 - alpha_hard) * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))
(hybrid supervision of arXiv 2508.15251 and 2502.15959, alpha on the hard term; T^2 after Hinton et
al. 2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgekd import data, evaluation, imaging, metrics, models, operating
from edgekd.augment import View, view
from edgekd.records import (
    Arch,
    Artifact,
    EdgeKDError,
    Metric,
    Spec,
    Track,
    Training,
    make_folder,
    sha256,
    untracked,
    versions,
)
from edgekd.supernet import SubNet, recalibrate
from edgekd.training import CHECKPOINT, Loss, as_session, classifier_judge, soft_loss, train


def teach(
    dataset: data.Dataset,
    model: str,
    spec: Spec,
    out: Path,
    *,
    training: Training,
    weights: Path | None = None,
    pretrained: bool = False,
    sensitivity: float | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Artifact:
    """Train the timm network `model` on the labels alone; returns the teacher in folder `out`.

    sensitivity: what each class's threshold is to reach on val; None: Youden's J.
    """
    operating.check(sensitivity)
    training = training.model_copy(update={"alpha_hard": 1.0})
    torch.manual_seed(seed)
    net = models.teacher(model, len(spec.classes), weights=weights, pretrained=pretrained)
    start = {"kind": "teacher", "model": model, "role": "teacher", "spec": spec}
    asked = settings(dataset, model, spec, training, seed=seed, weights=weights,
                     pretrained=pretrained)  # fmt: skip
    return _run(net, None, dataset, out, start, asked, training, seed, track,
                sensitivity=sensitivity)  # fmt: skip


def distill(
    dataset: data.Dataset,
    teacher: Artifact | None,
    name: str,
    arch: Arch,
    spec: Spec,
    out: Path,
    *,
    training: Training,
    net: SubNet | None = None,
    origin: dict[str, str] | None = None,
    sensitivity: float | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Artifact:
    """Train the sub-net `arch` on labels and `teacher`'s soft targets (None: on labels alone).

    sensitivity: what each class's threshold is to reach on val; None: Youden's J.
    It starts as `net`, cut out of a supernet (`origin` says which), with its batch norm
    recalibrated, and is judged so too ("cut_test_balanced_accuracy", ...); else from scratch.
    """
    operating.check(sensitivity)
    if teacher is None:
        training = training.model_copy(update={"alpha_hard": 1.0})
    else:
        check_teacher(teacher, spec)
    torch.manual_seed(seed)
    found: dict[str, Metric] = {}
    parents = {} if teacher is None else {"teacher": teacher.sha256}
    make_folder(out)
    origin = origin or {}
    if net is None:
        net = models.student(arch, len(spec.classes))
    else:
        parents |= {k: v for k, v in origin.items() if k == "supernet"}
        samples = dataset.splits["train"]
        images = view(samples, spec, training, seed)
        batches = models.calibration_batches(images, len(samples), spec.size)
        recalibrate(net, batches)
        for split in ("val", "test"):
            scores, _ = _scores(net, dataset, split, spec, seed)
            found |= {f"cut_{k}": v for k, v in scores.items()}
    start = {"kind": "student", "model": name, "role": "student", "spec": spec,
             "arch": arch, "parents": parents}  # fmt: skip
    asked = settings(dataset, name, spec, training, seed=seed, teacher=teacher, origin=origin)
    return _run(net, teacher, dataset, out, start, asked, training, seed, track, found,
                sensitivity=sensitivity)  # fmt: skip


def check_teacher(teacher: Artifact, spec: Spec) -> None:
    """EdgeKDError unless teacher and student see the same images, be it at different sizes."""
    as_student = teacher.spec.model_copy(update={"size": spec.size})
    if as_student != spec:
        field = next(f for f in Spec.model_fields if getattr(as_student, f) != getattr(spec, f))
        raise EdgeKDError(
            f"the teacher in {teacher.folder} sees {field} {getattr(teacher.spec, field)}, not "
            f"{getattr(spec, field)}: teacher and student must see the same images; teach one "
            "with these settings"
        )


class Hybrid:
    """Labels, and the soft targets of a teacher where there is one."""

    def __init__(
        self,
        images: View,
        labels: np.ndarray,
        spec: Spec,
        training: Training,
        teacher: Artifact | None,
    ):
        self.images, self.labels, self.spec, self.training = images, labels, spec, training
        self.teacher = None
        if teacher is not None and training.alpha_hard < 1:
            self.teacher, self.teacher_size = models.load(teacher).net, teacher.spec.size

    def begin(self, net: nn.Module, epoch: int) -> bool:  # noqa: ARG002
        """Nothing changes between epochs."""
        return False

    def losses(
        self,
        net: nn.Module,
        epoch: int,
        step: int,  # noqa: ARG002
        chosen: np.ndarray,
    ) -> Iterator[Loss]:
        """The one loss of a step."""
        images = self.images(self.spec.size, epoch, chosen)
        soft_targets = self.soft_targets(images, epoch, chosen)
        yield self.loss(net(images), chosen, [] if soft_targets is None else [soft_targets])

    def soft_targets(
        self, images: torch.Tensor, epoch: int, chosen: np.ndarray
    ) -> torch.Tensor | None:
        """The teacher's logits of the same images, at its own size; None without a teacher."""
        if self.teacher is None:
            return None
        if tuple(images.shape[2:]) != self.teacher_size:
            images = self.images(self.teacher_size, epoch, chosen)
        with torch.inference_mode():
            logits = self.teacher(images)
        return logits.clone()

    def loss(
        self, logits: torch.Tensor, chosen: np.ndarray, soft_targets: list[torch.Tensor]
    ) -> Loss:
        """Hybrid supervision; several soft targets count equally, none leaves the labels alone."""
        hard = F.cross_entropy(logits, torch.from_numpy(self.labels[chosen]))
        if not soft_targets:
            return Loss(hard, hard.item(), 0.0)
        soft = torch.stack([soft_loss(logits, t, self.training) for t in soft_targets]).mean()
        alpha = self.training.alpha_hard
        return Loss(alpha * hard + (1 - alpha) * soft, hard.item(), soft.item())


def settings(
    dataset: data.Dataset,
    model: str,
    spec: Spec,
    training: Training,
    *,
    seed: int,
    weights: Path | None = None,
    pretrained: bool = False,
    teacher: Artifact | None = None,
    origin: dict[str, str] | None = None,
) -> dict[str, Any]:
    """All that a training depends on, as plain data: equal settings, equal result."""
    asked = {
        "model": model,
        "weights": sha256(weights) if weights else ("hub" if pretrained else "none"),
        "teacher": teacher.sha256 if teacher else "none",
        "data": dataset.fingerprint,
        "spec": spec.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "seed": seed,
    }
    return asked | (origin or {})


def _run(
    net: nn.Module,
    teacher: Artifact | None,
    dataset: data.Dataset,
    out: Path,
    start: dict[str, Any],
    asked: dict[str, Any],
    training: Training,
    seed: int,
    track: Track,
    found: dict[str, Metric] | None = None,
    *,
    sensitivity: float | None = None,
) -> Artifact:
    """Train (or go on training), keep the best network, judge it once on the test split."""
    make_folder(out)
    spec: Spec = start["spec"]
    labels = np.array([s.label for s in dataset.splits["train"]])
    images = view(dataset.splits["train"], spec, training, seed, track)
    val = dataset.splits["val"]
    judge = classifier_judge(
        data.load_pixels(val, spec, track), np.array([s.label for s in val]), spec
    )
    objective = Hybrid(images, labels, spec, training, teacher)
    state = train(
        net, objective, judge, labels, out, training=training, asked=asked, seed=seed, track=track
    )
    splits = {split: dataset.splits[split] for split in evaluation.SPLITS}
    judged = evaluation.judge(
        out,
        {split: _logits(net, samples, spec) for split, samples in splits.items()},
        {split: evaluation.truth(samples) for split, samples in splits.items()},
        spec.classes,
        sensitivity=sensitivity,
        rivals=[] if teacher is None else [teacher],
        seed=seed,
    )
    judged["metrics"] = (found or {}) | judged["metrics"]
    models.save_weights(net, out / models.WEIGHTS)
    params, macs = models.count(net, spec.size)
    artifact = Artifact(
        **start,
        files={models.WEIGHTS: sha256(out / models.WEIGHTS)},
        layer=models.Waist(net, spec.size).layer,
        params=params,
        macs=macs,
        data_fingerprint=dataset.fingerprint,
        split_rule=dataset.split_rule,
        seed=seed,
        settings=asked | {"best_epoch": state.best_epoch, "epochs_run": state.epoch},
        versions=versions("torch", "timm", "numpy", "scipy", "scikit-learn", "pillow"),
        **judged,
    ).save(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return artifact


def _scores(
    net: nn.Module, dataset: data.Dataset, split: str, spec: Spec, seed: int
) -> tuple[dict[str, Metric], dict[str, dict[str, float]]]:
    """Metrics of a classifier on a split, and each class's own figures."""
    samples = dataset.splits[split]
    logits = _logits(net, samples, spec)
    labels, groups = np.array([s.label for s in samples]), [s.group for s in samples]
    return metrics.classification(logits, labels, groups, spec.classes, prefix=split, seed=seed)


def _logits(net: nn.Module, samples: Sequence[data.Sample], spec: Spec) -> np.ndarray:
    """(N, classes) float32 of a classifier."""
    images = imaging.normalise(data.load_pixels(samples, spec), spec)
    return metrics.answers(as_session(net.eval()), images)
