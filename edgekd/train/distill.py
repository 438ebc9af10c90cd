"""teach() and distill(): a classifier learns from labels, and from what teachers say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgekd import data
from edgekd.data import preprocess
from edgekd.data.augment import View, mix, view
from edgekd.metrics import classification, evaluation, operating
from edgekd.models import zoo
from edgekd.ofa.supernet import recalibrate
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
from edgekd.train import distributed, preflight, qat
from edgekd.train.guided import Guide
from edgekd.train.loop import CHECKPOINT, Loss, as_session, classifier_judge, train
from edgekd.train.losses import Wanted, hybrid, wanted
from edgekd.train.masked import seen_through
from edgekd.train.soft_targets import Targets


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
    training = without_teacher(training)
    torch.manual_seed(seed)
    net = zoo.classifier(model, len(spec.classes), size=spec.size, weights=weights,
                         pretrained=pretrained)  # fmt: skip
    start = {"kind": "teacher", "model": model, "role": "teacher", "spec": spec}
    asked = settings(dataset, model, spec, training, seed=seed, weights=weights,
                     pretrained=pretrained)  # fmt: skip
    return _run(net, (), dataset, out, start, asked, training, seed, track,
                sensitivity=sensitivity)  # fmt: skip


def distill(
    dataset: data.Dataset,
    teachers: Sequence[Artifact],
    name: str,
    arch: Arch | None,
    spec: Spec,
    out: Path,
    *,
    training: Training,
    net: nn.Module | None = None,
    origin: dict[str, str] | None = None,
    replay: Path | None = None,
    layers: Sequence[str] = (),
    sensitivity: float | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Artifact:
    """Train a student on labels and `teachers`' soft targets (none: on labels alone).

    It is the sub-net `arch`, or the network `name` where that is None.

    What teachers say of a view of the images is kept under the folder `replay`, if it is given.
    layers: the stage of each teacher whose channels are masks; none: see zoo.Waist.

    sensitivity: what each class's threshold is to reach on val; None: Youden's J.
    It starts as `net`, cut out of a supernet (`origin` says which), with its batch norm
    recalibrated, and is judged so too ("cut_test_balanced_accuracy", ...), and is kept so if no
    epoch has a lower validation loss; else from scratch.
    """
    operating.check(sensitivity)
    training = without_teacher(training) if not teachers else training
    torch.manual_seed(seed)
    found: dict[str, Metric] = {}
    parents = parents_of(teachers)
    make_folder(out)
    origin = origin or {}
    if net is None:
        student = zoo.student(arch, len(spec.classes)) if arch else None
        trained = student or zoo.classifier(name, len(spec.classes), size=spec.size)
    else:
        trained = net
        parents |= {k: v for k, v in origin.items() if k in ("supernet", "student")}
        samples = dataset.splits["train"]
        images = view(samples, spec, training, seed)
        batches = zoo.calibration_batches(images, len(samples), spec.size)
        recalibrate(net, batches)
        for split in ("val", "test"):
            scores, _ = _scores(net, dataset, split, spec, seed)
            found |= {f"cut_{k}": v for k, v in scores.items()}
    start = {"kind": "student", "model": name, "role": "student", "spec": spec,
             "arch": arch, "parents": parents}  # fmt: skip
    asked = settings(dataset, name, spec, training, seed=seed, teachers=teachers, origin=origin,
                     layers=layers)  # fmt: skip
    return _run(trained, teachers, dataset, out, start, asked, training, seed, track, found,
                replay=replay, layers=layers, sensitivity=sensitivity)  # fmt: skip


def without_teacher(training: Training) -> Training:
    """The same settings with nothing that a teacher would have to say."""
    alone = {"alpha_hard": 1.0, "attention": 0.0, "features": 0.0, "masked": 0.0,
             "ask_mixed": False}  # fmt: skip
    return training.model_copy(update=alone)


def parents_of(teachers: Sequence[Artifact]) -> dict[str, str]:
    """The first is "teacher", the second "teacher2", ...: sha256, for what learnt from them."""
    return {f"teacher{i if i > 1 else ''}": t.sha256 for i, t in enumerate(teachers, 1)}


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
    """Labels, and what teachers say where there are any."""

    def __init__(
        self,
        images: View,
        labels: np.ndarray,
        spec: Spec,
        training: Training,
        teachers: Sequence[Targets] = (),
        seed: int = 0,
        guide: Guide | None = None,
    ):
        self.guide = guide
        self.images, self.spec, self.training, self.seed = images, spec, training, seed
        self.labels, self.teachers, self.precision = torch.from_numpy(labels), teachers, "fp32"
        self.place = distributed.here()
        if training.features and self.place.world > 1:
            raise EdgeKDError("features compare a whole batch: train with them in one process")
        self.weights = None
        if training.class_weights:
            count = self.labels.bincount(minlength=len(spec.classes)).clamp_min(1)
            self.weights = (len(labels) / (len(count) * count.float())).to(self.place.device)
        self._waist: zoo.Waist | None = None

    def begin(self, net: nn.Module, epoch: int) -> bool:  # noqa: ARG002
        """Nothing in the network changes between epochs; teachers are asked for what is new."""
        with self.place.first():
            for teacher in self.teachers:
                teacher.begin(self.training.view(epoch))
        return False

    def losses(self, net: nn.Module, epoch: int, step: int, chosen: np.ndarray) -> Iterator[Loss]:
        """The one loss of a step."""
        images, target = self.batch(self.spec.size, epoch, step, chosen)
        if not (target.attention or target.embedding):
            with self.place.autocast(self.precision):
                logits = net(images)
            yield hybrid(logits.float(), target, self.training, self.weights)
            return
        if self._waist is None or self._waist.net is not net:
            self._waist = zoo.Waist(net, self.spec.size)
        with self.place.autocast(self.precision):
            logits, features, last = self._waist.answers(images)
        n = len(target.labels)
        yield hybrid(logits.float(), target, self.training, self.weights, features[:n], last[:n])

    def batch(
        self, size: tuple[int, int], epoch: int, step: int, chosen: np.ndarray
    ) -> tuple[torch.Tensor, Wanted]:
        """The images of a step at a size, and what is wanted of them: this process's part.

        After the images themselves come those that are shown masked, or in part, as well.
        """
        view = self.training.view(epoch)
        images = self.images(size, view, chosen)
        mixed = mix(images, self.training, self.seed, step)
        if self.training.ask_mixed:
            said = [t.say(self._mixed(t.size, view, step, chosen)) for t in self.teachers]
        else:
            said = [t.of(view, chosen, images) for t in self.teachers]
        labels, classes = self.labels[chosen], len(self.spec.classes)
        target = wanted(labels, classes, said, self.training, mixed)
        part, device = self.place.part(len(chosen)), self.place.device
        shown = (images if mixed is None else mixed.images)[part].to(device)
        target = target.part(part, device)
        if self.training.masked and self.teachers:
            seen, logits = self._seen(view, step, chosen[part], images[part])
            target = target._replace(masked=logits.to(device))
        elif self.guide:
            truth = F.one_hot(labels[part], classes).float()
            seen, told = self.guide.shown(images[part], truth, view, chosen[part])
            target = target._replace(guided=told.to(device))
        else:
            return shown, target
        everything = torch.cat([shown, seen.to(device)])
        return everything.contiguous(memory_format=torch.channels_last), target

    def _seen(
        self, view: int, step: int, chosen: np.ndarray, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the images that are shown masked, and the logits of a teacher, in turn."""
        teacher = self.teachers[step % len(self.teachers)]
        few = np.flatnonzero(teacher.drawn(view).shown[chosen])
        outlines, logits = teacher.masked(view, chosen[few])
        return seen_through(images[few], outlines), logits

    def _mixed(
        self, size: tuple[int, int], view: int, step: int, chosen: np.ndarray
    ) -> torch.Tensor:
        """The same images at another size, mixed in the same shares."""
        mixed = mix(self.images(size, view, chosen), self.training, self.seed, step)
        assert mixed is not None  # ask_mixed asks for one or the other
        return mixed.images


def asked_of(
    teachers: Sequence[Artifact],
    images: View,
    dataset: data.Dataset,
    spec: Spec,
    training: Training,
    seed: int,
    root: Path | None,
    track: Track = untracked,
    layers: Sequence[str] = (),
) -> list[Targets]:
    """What each teacher says of the training split; kept under folder `root` where there is one,
    unless each step shows it images that are mixed anew. layers: the stage of each whose channels
    are masks.
    """
    if training.alpha_hard == 1 and not (
        training.attention or training.features or training.masked
    ):
        return []
    for teacher in teachers:
        check_teacher(teacher, spec)
    seen = spec.model_dump(mode="json", exclude={"size", "classes"})
    key = {"data": dataset.fingerprint, "spec": seen, "seed": seed}
    count = len(dataset.splits["train"])
    root = None if training.ask_mixed else root
    stages = layers or [""] * len(teachers)
    return [Targets(t, images, count, training, key, root, track, stage)
            for t, stage in zip(teachers, stages, strict=True)]  # fmt: skip


def settings(
    dataset: data.Dataset,
    model: str,
    spec: Spec,
    training: Training,
    *,
    seed: int,
    weights: Path | None = None,
    pretrained: bool = False,
    teachers: Sequence[Artifact] = (),
    origin: dict[str, str] | None = None,
    layers: Sequence[str] = (),
) -> dict[str, Any]:
    """All that a training depends on, as plain data: equal settings, equal result."""
    asked: dict[str, Any] = {
        "model": model,
        "weights": sha256(weights) if weights else ("hub" if pretrained else "none"),
        "teacher": ",".join(t.sha256 for t in teachers) or "none",
        "data": dataset.fingerprint,
        "spec": spec.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "seed": seed,
    }
    if not training.guided:  # trainings of before this setting was there are the same
        del asked["training"]["guided"]
    if training.masked and any(layers):
        asked["mask_layers"] = list(layers)
    return asked | (origin or {})


def _run(
    net: nn.Module,
    teachers: Sequence[Artifact],
    dataset: data.Dataset,
    out: Path,
    start: dict[str, Any],
    asked: dict[str, Any],
    training: Training,
    seed: int,
    track: Track,
    found: dict[str, Metric] | None = None,
    *,
    replay: Path | None = None,
    layers: Sequence[str] = (),
    sensitivity: float | None = None,
) -> Artifact:
    """Train (or go on training), keep the best network, judge it once on the test split."""
    spec: Spec = start["spec"]
    preflight.check(net, spec, out)
    labels = np.array([s.label for s in dataset.splits["train"]])
    images = view(dataset.splits["train"], spec, training, seed, track)
    val = dataset.splits["val"]
    judge = classifier_judge(
        data.load_pixels(val, spec, track), np.array([s.label for s in val]), spec
    )
    said = asked_of(teachers, images, dataset, spec, training, seed, replay, track, layers)
    guide = Guide(dataset.splits["train"], spec, training, seed) if training.guided else None
    objective = Hybrid(images, labels, spec, training, said, seed, guide)
    if training.int8:
        qat.quantised(net)
    state = train(net, objective, judge, labels, out, training=training, asked=asked, seed=seed,
                  learnt="supernet" in asked, track=track)  # fmt: skip
    qat.plain(net)
    place = distributed.here()
    if not place.main:
        place.wait()
        return Artifact.load(out)
    splits = {split: dataset.splits[split] for split in evaluation.SPLITS}
    judged = evaluation.judge(
        out,
        {split: _logits(net, samples, spec) for split, samples in splits.items()},
        {split: evaluation.truth(samples) for split, samples in splits.items()},
        spec.classes,
        sensitivity=sensitivity,
        rivals=teachers,
        seed=seed,
    )
    judged["metrics"] = (found or {}) | judged["metrics"]
    zoo.save_weights(net, out / zoo.WEIGHTS)
    params, macs = zoo.count(net, spec.size)
    artifact = Artifact(
        **start,
        files={zoo.WEIGHTS: sha256(out / zoo.WEIGHTS)},
        layer=zoo.Waist(net, spec.size).layer,
        params=params,
        macs=macs,
        data_fingerprint=dataset.fingerprint,
        split_rule=dataset.split_rule,
        seed=seed,
        settings=asked | {"best_epoch": state.best_epoch, "epochs_run": state.epoch,
                          "device": place.name, "computed_in": state.precision},
        versions=versions("torch", "timm", "numpy", "scipy", "scikit-learn", "pillow"),
        **judged,
    ).save(out)  # fmt: skip
    (out / CHECKPOINT).unlink(missing_ok=True)
    place.wait()
    return artifact


def _scores(
    net: nn.Module, dataset: data.Dataset, split: str, spec: Spec, seed: int
) -> tuple[dict[str, Metric], dict[str, dict[str, float]]]:
    """Metrics of a classifier on a split, and each class's own figures."""
    samples = dataset.splits[split]
    logits = _logits(net, samples, spec)
    labels, groups = np.array([s.label for s in samples]), [s.group for s in samples]
    return classification.classification(
        logits, labels, groups, spec.classes, prefix=split, seed=seed
    )


def _logits(net: nn.Module, samples: Sequence[data.Sample], spec: Spec) -> np.ndarray:
    """(N, classes) float32 of a classifier."""
    images = preprocess.normalise(data.load_pixels(samples, spec), spec)
    return classification.answers(as_session(net.eval()), images)
