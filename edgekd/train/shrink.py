"""shrink(): one supernet is trained so that each of its sub-nets works, then judged sub-net by one.

Sandwich sampling (Yu et al., BigNAS, ECCV 2020): each step trains the largest sub-net, the smallest
and two random ones. Progressive shrinking (Cai et al., Once-for-All, ICLR 2020): the largest first,
then elastic kernels, depths and expansions, one after the other. Either way the small ones learn
from the labels, from the teacher, and from the largest sub-net's soft targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd import data
from edgekd.data.augment import view
from edgekd.models import zoo
from edgekd.ofa import spaces
from edgekd.ofa.supernet import Supernet, recalibrate
from edgekd.records import (
    Arch,
    Artifact,
    Metric,
    Spec,
    Track,
    Training,
    make_folder,
    sha256,
    untracked,
    versions,
)
from edgekd.train import preflight
from edgekd.train.distill import Hybrid, asked_of, parents_of, settings
from edgekd.train.loop import CHECKPOINT, Judge, Loss, classifier_judge, train
from edgekd.train.losses import hybrid

JUDGED_ON = 512  # training images that batch norm is recalibrated on to judge a sub-net


@dataclass(frozen=True)
class Phase:
    """What may vary for a share of the epochs, and how many sub-nets a step trains.

    kernels, depths, expands: how many options of the space may be drawn, the largest ones.
    """

    share: float
    kernels: int = 3
    depths: int = 3
    expands: int = 3
    nets: int = 2  # random ones
    extremes: bool = False  # and the largest and the smallest
    sort: bool = False  # order channels by importance before it begins
    trained: tuple[int, ...] = ()  # expansions whose channels must stay the first


# Shares are OFA's epochs: 180 for the largest, then train_ofa_net.py's phases.
SCHEDULES: dict[str, tuple[Phase, ...]] = {
    "sandwich": (Phase(1, extremes=True),),
    "progressive": (
        Phase(180, kernels=1, depths=1, expands=1, nets=1),
        Phase(125, depths=1, expands=1, nets=1),
        Phase(25, depths=2, expands=1, nets=2),
        Phase(125, expands=1, nets=2),
        Phase(25, expands=2, nets=4, sort=True),
        Phase(125, nets=4, sort=True, trained=(4, 6)),
    ),
}


@dataclass(frozen=True)
class Plan:
    """Which sub-nets each step trains: drawn from (seed, step) alone."""

    space: str
    resolutions: tuple[int, ...]
    schedule: str
    epochs: int
    seed: int

    def phase(self, epoch: int) -> tuple[Phase, bool]:
        """The phase that `epoch` is in, and whether the epoch is its first."""
        phases = SCHEDULES[self.schedule]
        total, reached, last = sum(p.share for p in phases), 0.0, phases[-1]
        for p in phases:
            first = round(self.epochs * reached / total)
            reached += p.share
            if epoch < round(self.epochs * reached / total):
                return p, epoch == first
        return last, False

    def archs(self, epoch: int, step: int) -> list[Arch]:
        """The sub-nets of a step, all at one resolution; the largest first where it is trained."""
        phase, _ = self.phase(epoch)
        rng = random.Random(f"{self.seed} {step}")
        resolution = rng.choice(self.resolutions)
        drawn = [self._draw(phase, rng, resolution) for _ in range(phase.nets)]
        if not phase.extremes:
            return drawn
        ends = [spaces.uniform(self.space, end, resolution) for end in ("max", "min")]
        return [*ends, *drawn]

    def _draw(self, phase: Phase, rng: random.Random, resolution: int) -> Arch:
        space = spaces.space_of(self.space)
        return Arch(
            space=self.space,
            kernel=tuple(rng.choice(s.kernels[-phase.kernels :]) for s in space.stage_of_place),
            expand=tuple(rng.choice(space.expands[-phase.expands :]) for _ in range(space.places)),
            depth=tuple(rng.choice(s.depths[-phase.depths :]) for s in space.stages),
            resolution=resolution,
        )


class Shrinking(Hybrid):
    """Several sub-nets a step, each on labels and soft targets; their gradients add up."""

    def __init__(self, plan: Plan, *hybrid: Any):
        super().__init__(*hybrid)
        self.plan = plan

    def begin(self, net: nn.Module, epoch: int) -> bool:
        """Order the channels before a phase that narrows the blocks."""
        super().begin(net, epoch)
        phase, first = self.plan.phase(epoch)
        if not (phase.sort and first):
            return False
        assert isinstance(net, Supernet)
        net.sort_channels(phase.trained)
        return True

    def losses(self, net: nn.Module, epoch: int, step: int, chosen: np.ndarray) -> Iterator[Loss]:
        """One loss a sub-net; divided by their number, so that the rate means the same."""
        archs = self.plan.archs(epoch, step)
        largest = spaces.uniform(self.plan.space, "max", archs[0].resolution)
        images, alone = self.batch((largest.resolution,) * 2, epoch, step, chosen)
        target, t = alone, self.training.temperature
        if largest not in archs:
            with torch.no_grad(), self.place.autocast(self.precision):
                target = alone.joined(net(images).float(), t)
        for arch in archs:
            with self.place.autocast(self.precision):
                logits = net(images, arch).float()
            loss = hybrid(logits, target, self.training, self.weights)
            if arch == largest and len(archs) > 1:
                target = alone.joined(logits.detach(), t)
            yield loss._replace(total=loss.total / len(archs))


def judge_of(
    dataset: data.Dataset, spec: Spec, training: Training, seed: int, split: str = "val"
) -> Callable[[Supernet, Arch], dict[str, float]]:
    """(supernet, Arch) -> figures of that sub-net on a split, its batch norm recalibrated.

    On JUDGED_ON training images, not OFA's 2,000: hundreds of sub-nets are judged on a CPU.
    """
    train, val = dataset.splits["train"], dataset.splits[split]
    labels = np.array([s.label for s in val])
    images = view(train, spec, training, seed)
    kept: dict[int, tuple[list[torch.Tensor], Judge]] = {}

    def judge(net: Supernet, arch: Arch) -> dict[str, float]:
        side = arch.resolution
        if side not in kept:
            at_size = spec.model_copy(update={"size": (side, side)})
            batches = list(zoo.calibration_batches(images, len(train), at_size.size, JUDGED_ON))
            pixels = data.load_pixels(val, at_size)
            kept[side] = batches, classifier_judge(pixels, labels, at_size)
        subnet = net.extract(arch)
        recalibrate(subnet, kept[side][0])
        return kept[side][1](subnet.eval())

    return judge


def shrink(
    dataset: data.Dataset,
    net: Supernet,
    spec: Spec,
    out: Path,
    *,
    resolutions: Sequence[int],
    training: Training,
    start: dict[str, str],
    schedule: str = "sandwich",
    teachers: Sequence[Artifact] = (),
    layers: Sequence[str] = (),
    replay: Path | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Artifact:
    """Train all sub-nets of `net` at once; returns the supernet in folder `out`.

    `spec` is that of the largest resolution; `start` says what `net` was filled with; `layers`,
    the stage of each teacher whose channels are masks, see zoo.Waist. Every epoch
    the smallest and the largest sub-net are judged on the validation split.
    """
    make_folder(out)
    plan = Plan(net.space, tuple(sorted(resolutions)), schedule, training.epochs, seed)
    asked = shrink_settings(
        dataset, net.space, spec, training,
        resolutions=resolutions, start=start, schedule=schedule, teachers=teachers, layers=layers,
        seed=seed,
    )  # fmt: skip
    for end, side in (("min", min(resolutions)), ("max", spec.size[0])):
        at_size = spec.model_copy(update={"size": (side, side)})
        subnet = net.extract(spaces.uniform(net.space, end, side))
        preflight.check(subnet, at_size, out)
    samples = dataset.splits["train"]
    labels = np.array([s.label for s in samples])
    images = view(samples, spec, training, seed, track)
    judge_one = judge_of(dataset, spec, training, seed)

    def judge(trained: nn.Module) -> dict[str, float]:
        assert isinstance(trained, Supernet)
        ends = {e: judge_one(trained, spaces.uniform(net.space, e, spec.size[0]))
                for e in ("min", "max")}  # fmt: skip
        found = {f"{k}_{e}": v for e, figures in ends.items() for k, v in figures.items()}
        return {"loss": (found["loss_min"] + found["loss_max"]) / 2} | found

    said = asked_of(teachers, images, dataset, spec, training, seed, replay, track, layers)
    objective = Shrinking(plan, images, labels, spec, training, said, seed)
    torch.manual_seed(seed)
    state = train(
        net, objective, judge, labels, out, training=training, asked=asked, seed=seed, track=track
    )
    found = judge(net)
    zoo.save_weights(net, out / zoo.WEIGHTS)
    params, macs = zoo.count(net.extract(spaces.uniform(net.space, "max")), spec.size)
    artifact = Artifact(
        kind="supernet",
        model=net.space,
        role="student",
        files={zoo.WEIGHTS: sha256(out / zoo.WEIGHTS)},
        spec=spec,
        parents=parents_of(teachers),
        params=params,
        macs=macs,
        metrics={f"val_{k}": Metric(value=v) for k, v in found.items()},
        data_fingerprint=dataset.fingerprint,
        split_rule=dataset.split_rule,
        seed=seed,
        settings=asked
        | {
            "best_epoch": state.best_epoch,
            "epochs_run": state.epoch,
            "computed_in": state.precision,
        },
        versions=versions("torch", "timm", "numpy", "pillow"),
    ).save(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return artifact


def shrink_settings(
    dataset: data.Dataset,
    space: str,
    spec: Spec,
    training: Training,
    *,
    resolutions: Sequence[int],
    start: dict[str, str],
    schedule: str,
    teachers: Sequence[Artifact],
    seed: int,
    layers: Sequence[str] = (),
) -> dict[str, Any]:
    """All that a supernet depends on, as plain data."""
    asked = settings(dataset, space, spec, training, seed=seed, teachers=teachers, layers=layers)
    return asked | start | {"resolutions": sorted(resolutions), "schedule": schedule}
