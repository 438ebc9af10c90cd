"""How long a training will take on this machine: a few of its steps, timed beforehand.

They are steps of the same loop on the first training images, at a learning rate of 0, by networks
that begin at random: what a step costs does not depend on what was learnt. Whoever trains
afterwards finds torch's random numbers as they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from edgekd import data
from edgekd.data.augment import view
from edgekd.models import zoo
from edgekd.ofa import spaces
from edgekd.ofa.supernet import Supernet
from edgekd.records import Arch, Artifact, Spec, Training
from edgekd.train import distributed, loop, qat
from edgekd.train.distill import Hybrid, without_teacher
from edgekd.train.shrink import JUDGED_ON, Plan, Shrinking

FEW, LEAST = 2, 4  # images of the two steps before those that are timed, and of these
SHARES = (0.5, 0.9, 0.1)  # of the epochs, where a step each is timed: a schedule may have phases
SECONDS = 3.0  # of a network, after which no further step is timed
LONGEST = 8.0  # seconds of a timed step, by what an image of a small one takes
ASKED_AT_ONCE = 32  # images that a network is shown without gradients
RECALIBRATED = (
    4  # answers' time of an image for batch norm; 2.4 to 4.6 on an EPYC, see `recalibrate`
)

Clock = Callable[[], float]


class Pace(NamedTuple):
    """Seconds that a network needs here."""

    step: float  # to learn from one batch
    image: float  # to judge one image
    measured: int  # steps


class Work(NamedTuple):
    """What a training has to do."""

    epochs: int
    steps: int  # an epoch
    judged: int  # images, an epoch
    once: int = 0  # images, beside all epochs

    def seconds(self, pace: Pace) -> float:
        """That all this takes."""
        return self.epochs * (self.steps * pace.step + self.judged * pace.image) + (
            self.once * pace.image
        )


def classifier_work(
    dataset: data.Dataset, training: Training, *, done: int = 0, cut: bool = False
) -> Work:
    """Of a teacher or a student of which `done` epochs are behind it.

    cut: out of a supernet, so that it is judged as it was cut, too.
    """
    train, val, test = (len(dataset.splits[s]) for s in ("train", "val", "test"))
    once = val + test
    if cut:
        once += val + test + RECALIBRATED * min(train, zoo.CALIBRATED_ON)
    steps = loop.steps_an_epoch(train, training.batch)
    return Work(max(0, training.epochs - done), steps, val, once)


def supernet_work(dataset: data.Dataset, training: Training, *, done: int = 0) -> Work:
    """Of a supernet, whose ends are judged each epoch with their batch norm recalibrated."""
    train, val = len(dataset.splits["train"]), len(dataset.splits["val"])
    judged = val + RECALIBRATED * min(train, JUDGED_ON)
    steps = loop.steps_an_epoch(train, training.batch)
    return Work(max(0, training.epochs - done), steps, judged, judged)


def epochs_done(folder: Path) -> int:
    """Of the unfinished training in `folder`."""
    if not (folder / loop.CHECKPOINT).exists():
        return 0
    return len((folder / loop.LOG).read_text("utf-8").splitlines())


def classifier(
    name: str,
    arch: Arch | None,
    samples: Sequence[data.Sample],
    spec: Spec,
    training: Training,
    clock: Clock = time.perf_counter,
) -> Pace:
    """Of the sub-net `arch`, or of the network `name`, that learns from `samples`."""
    with undisturbed():
        classes = len(spec.classes)
        net = zoo.student(arch, classes) if arch else zoo.classifier(name, classes, size=spec.size)
        step, count = _step_seconds(net, Hybrid, samples, spec, training, clock)
        return Pace(step, _image_seconds([net], spec, clock), count)


def supernet(
    space: str,
    resolutions: Sequence[int],
    schedule: str,
    samples: Sequence[data.Sample],
    spec: Spec,
    training: Training,
    clock: Clock = time.perf_counter,
) -> Pace:
    """Of a supernet of `space` that is shrunk by `schedule`; both its ends are judged."""
    plan = Plan(space, tuple(sorted(resolutions)), schedule, training.epochs, 0)

    def shrinking(*hybrid: object) -> Shrinking:
        return Shrinking(plan, *hybrid)

    with undisturbed():
        net = Supernet(space, len(spec.classes))
        step, count = _step_seconds(net, shrinking, samples, spec, training, clock)
        ends = [net.extract(spaces.uniform(space, end, spec.size[0])) for end in ("min", "max")]
        return Pace(step, _image_seconds(ends, spec, clock), count)


def answers(teacher: Artifact, clock: Clock = time.perf_counter) -> float:
    """Seconds in which a teacher that is there answers one image."""
    with undisturbed():
        net = zoo.load(teacher).net.to(distributed.here().device)
        return _image_seconds([net], teacher.spec, clock)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Torch's random numbers are afterwards as they were before."""
    device = distributed.here().device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def shown(training: Training) -> float:
    """Images that a network is shown in a step, of each image of the batch."""
    if training.guided:
        return 3.0
    return 1 + training.masked_share if training.masked else 1.0


def _step_seconds(
    net: nn.Module,
    objective: Callable[..., Hybrid],
    samples: Sequence[data.Sample],
    spec: Spec,
    training: Training,
    clock: Clock,
) -> tuple[float, int]:
    """(seconds of a step on a batch, steps that were timed); the teachers' answers are there."""
    alone = without_teacher(training).model_copy(update={"guided": 0.0, "compile": False})
    whole = max(FEW, round(min(training.batch, len(samples)) * shown(training)))
    few = samples[:whole]
    labels = np.array([s.label for s in few])
    wanted = objective(view(few, spec, alone, 0), labels, spec, alone)
    wanted.precision = "fp32" if training.precision == "auto" else training.precision
    if training.int8:
        qat.quantised(net)
    seconds = loop.timed(net, wanted, alone, clock)
    indices = np.arange(whole) % len(few)
    first, *epochs = (int(training.epochs * share) for share in (0, *SHARES))
    seconds(first, indices[:FEW])
    small = seconds(first, indices[:FEW])
    images = fitting(small / FEW, whole)
    took: list[float] = []
    while len(took) < len(epochs) and sum(took) < SECONDS:
        took.append(seconds(epochs[len(took)], indices[:images]))
    return scaled(small, sum(took) / len(took), images, whole), len(took)


def fitting(seconds: float, whole: int) -> int:
    """Images of a timed step where one takes `seconds`: `whole`, or what there is time for."""
    return min(whole, max(LEAST, int(LONGEST / max(seconds, 1e-9))))


def scaled(small: float, large: float, images: int, whole: int) -> float:
    """Seconds of a step of `whole` images: those of FEW and of `images`, on a line."""
    if images == whole:
        return large
    return small + max(0.0, large - small) * (whole - FEW) / (images - FEW)


def _image_seconds(nets: Sequence[nn.Module], spec: Spec, clock: Clock) -> float:
    """Of one image that all of `nets` are shown, without gradients."""
    device = distributed.here().device
    images = torch.rand(ASKED_AT_ONCE, 3, *spec.size, device=device)
    total = 0.0
    for net in nets:
        net.to(device).eval()
        with torch.inference_mode():
            net(images[:FEW])
            began = clock()
            net(images)
            distributed.finish()
            total += (clock() - began) / len(images)
    return total
