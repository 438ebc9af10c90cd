"""How a student is made, one function a command: teach, shrink, search, distill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgekd import data, runs, spaces
from edgekd.records import (
    Arch,
    Artifact,
    EdgeKDError,
    Profile,
    Spec,
    Track,
    Training,
    make_folder,
    sha256,
    unknown,
)

if TYPE_CHECKING:
    from edgekd.supernet import SubNet

DEFAULT_TEACHER = "resnet18"  # trains from scratch where there is no network and no checkpoint


@dataclass(frozen=True)
class Workplace:
    """A data set, opened and checked, and what every model made from it sees."""

    root: Path  # of all runs
    folder: Path
    dataset: data.Dataset
    spec: Spec
    seed: int
    track: Track
    split: str | None = None  # how it was asked to be split, see data.inspect
    allow_leakage: bool = False

    @classmethod
    def open(
        cls,
        root: Path,
        folder: Path | None,
        pixels: int,
        resize: str,
        seed: int,
        track: Track,
        *,
        split: str | None = None,
        allow_leakage: bool = False,
    ) -> Workplace:
        """The data in `folder` (None: the phantoms), `pixels` a side."""
        if folder is None:
            folder = _once(lambda: runs.phantoms(root, seed, track))
        dataset = data.open_dataset(
            folder, seed=seed, split=split, allow_leakage=allow_leakage, track=track
        )
        channels = "grey" if dataset.grey else "rgb"
        table = {"classes": dataset.classes, "size": (pixels, pixels), "resize": resize}
        spec = Spec.parse(table | {"channels": channels}, "--resize")
        return cls(root, folder, dataset, spec, seed, track, split, allow_leakage)


def _once(make: Callable[[], Path]) -> Path:
    """`make()`, by one of several processes before the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return make()
    from edgekd import compute

    with compute.here().first():
        return make()


def teach(
    work: Workplace,
    model: str,
    training: Training,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    sensitivity: float | None = None,
    force: bool = False,
) -> Artifact:
    """The teacher of these settings, trained now unless it is there already."""
    from edgekd import distill as loop

    if weights is not None and not weights.is_file():
        raise EdgeKDError(f"no weights file {weights}: give a .safetensors or .pth file")
    if weights is not None or pretrained:
        training = _gentler(training)
    training = loop.without_teacher(training)
    asked = loop.settings(
        work.dataset, model, work.spec, training,
        seed=work.seed, weights=weights, pretrained=pretrained,
    )  # fmt: skip
    folder = runs.own_folder(work.root, work.dataset, "teacher", model, work.spec, asked)
    if made := runs.finished(folder, asked, force=force):
        return runs.rejudged(made, work.dataset, sensitivity)
    return loop.teach(
        work.dataset, model, work.spec, folder, training=training, weights=weights,
        pretrained=pretrained, sensitivity=sensitivity, seed=work.seed, track=work.track,
    )  # fmt: skip


def _gentler(training: Training, *, lr: float = 7e-4, epochs: int = 8) -> Training:
    """For pretrained weights: fewer epochs and a lower rate, where the user named neither."""
    wanted = {"lr": lr, "epochs": epochs}
    update = {k: v for k, v in wanted.items() if k not in training.model_fields_set}
    return training.model_copy(update=update)


def find_teacher(
    work: Workplace,
    teacher: str | None,
    training: Training,
    *,
    weights: Path | None,
    pretrained: bool,
) -> Artifact:
    """The teacher to learn from: a folder, the one there is (of that name), or one taught now."""
    if teacher and (Path(teacher) / Artifact.FILE).exists():
        if weights or pretrained:
            raise EdgeKDError(f"{teacher} is a trained teacher: --teacher-weights has no place")
        return Artifact.load(Path(teacher))
    if weights is None and not pretrained and "epochs" not in training.model_fields_set:
        there = runs.made(work.root, work.dataset, "teacher", work.spec)
        there = [t for t in there if teacher in (None, t.model)]
        if len(there) > 1:
            names = ", ".join(str(t.folder) for t in there)
            raise EdgeKDError(f"{len(there)} teachers fit, name one with --teacher: {names}")
        if there:
            return there[0]
    name = teacher or DEFAULT_TEACHER
    return teach(work, name, training, weights=weights, pretrained=pretrained)


def find_teachers(
    work: Workplace,
    named: Sequence[str] | None,
    training: Training,
    *,
    weights: Path | None,
    pretrained: bool,
) -> list[Artifact]:
    """Every teacher that was named, as `find_teacher` finds one; one where none was."""
    if named and len(named) > 1 and weights:
        raise EdgeKDError(
            "--teacher-weights is the file of one teacher, several are named: "
            "edgekd teach each, and give their folders"
        )
    names: Sequence[str | None] = named or [None]
    found = [find_teacher(work, name, training, weights=weights, pretrained=pretrained)
             for name in names]  # fmt: skip
    if len({t.sha256 for t in found}) < len(found):
        raise EdgeKDError(f"the same teacher twice: {', '.join(t.model for t in found)}")
    return found


class Start(NamedTuple):
    """What weights a supernet, or a sub-net alone, has before it is trained."""

    model: str = "scratch"  # a timm network that is a member of the space, an official checkpoint,
    weights: Path | None = None  # or for a published sub-net "ofa"; the file of its weights,
    pretrained: bool = False  # or from the hub

    def settings(self) -> dict[str, str]:
        """As plain data; EdgeKDError where the weights are not there."""
        if self.weights is not None and not self.weights.is_file():
            raise EdgeKDError(f"no weights file {self.weights}: give a .safetensors or .pth file")
        if self.model == "scratch" and (self.weights or self.pretrained):
            raise EdgeKDError("--start-weights needs --start: the network that they are of")
        origin = sha256(self.weights) if self.weights else ("hub" if self.pretrained else "none")
        return {"start": self.model, "start_weights": origin}

    def official(self, name: str) -> Start:
        """With the file of OFA's checkpoint `name`: given, fetched before, or fetched now."""
        from edgekd import checkpoints

        file = self.weights or checkpoints.fetch(name, offline=not self.pretrained)
        return Start(self.model, file)

    def found(self) -> Start:
        """With the file of an official supernet, where it is one that is wanted."""
        from edgekd import checkpoints

        return self.official(self.model) if self.model in checkpoints.SUPERNETS else self


class Pupil(NamedTuple):
    """The student to be distilled, and where its weights come from."""

    name: str
    arch: Arch | None  # None: a network of that name, which is no sub-net
    supernet: Artifact | None = None
    start: Start = Start()


def shrink(
    work: Workplace,
    profiles: Sequence[Profile],
    teachers: Sequence[Artifact],
    training: Training,
    *,
    start: Start,
    schedule: str,
    force: bool = False,
) -> Artifact:
    """The supernet of these settings, one for all `profiles`, trained now unless it is there."""
    from edgekd import models
    from edgekd import shrink as loop

    runs.alone("shrinking")
    if schedule not in loop.SCHEDULES:
        raise EdgeKDError(unknown("schedule", schedule, loop.SCHEDULES))
    space, resolutions = shared_space(profiles, work.spec)
    start = start.found()
    if start.model != "scratch":
        training = _gentler(training, lr=1e-3, epochs=12)
    if training.attention or training.features:
        raise EdgeKDError("attention and features guide one student: leave them out of shrinking")
    asked = loop.shrink_settings(
        work.dataset, space, work.spec, training, resolutions=resolutions,
        start=start.settings(), schedule=schedule, teachers=teachers, seed=work.seed,
    )  # fmt: skip
    folder = runs.own_folder(work.root, work.dataset, "supernet", space, work.spec, asked)
    made = runs.finished(folder, asked, force=force)
    if made:
        return made
    net = models.supernet(
        space, len(work.spec.classes), start=start.model, weights=start.weights,
        pretrained=start.pretrained, seed=work.seed,
    )  # fmt: skip
    return loop.shrink(
        work.dataset, net, work.spec, folder,
        resolutions=resolutions, training=training, start=start.settings(), schedule=schedule,
        teachers=teachers, replay=runs.shared(work.root, work.dataset), seed=work.seed,
        track=work.track,
    )  # fmt: skip


def shared_space(profiles: Sequence[Profile], spec: Spec) -> tuple[str, list[int]]:
    """The one space of the profiles, and all resolutions that they allow up to the spec's size."""
    if len({p.space for p in profiles}) > 1:
        named = ", ".join(f"{p.name} {p.space}" for p in profiles)
        raise EdgeKDError(f"profiles of several spaces share no supernet ({named}): one at a time")
    side = spec.size[0]
    found = sorted({r for p in profiles for r in p.resolutions if r <= side})
    return profiles[0].space, found if side in found else [side]


def find_supernet(work: Workplace, profile: Profile, folder: Path | None) -> Artifact | None:
    """The supernet to cut from: the one in `folder`, or the one that fits, or None."""
    if folder is not None:
        return _fitting(Artifact.load(folder), profile, work)
    there = runs.made(work.root, work.dataset, "supernet", work.spec)
    there = [s for s in there if s.model == profile.space]
    if len(there) > 1:
        names = ", ".join(str(s.folder) for s in there)
        raise EdgeKDError(f"{len(there)} supernets fit, name one with --supernet: {names}")
    return there[0] if there else None


def _fitting(supernet: Artifact, profile: Profile, work: Workplace) -> Artifact:
    if supernet.kind != "supernet":
        raise EdgeKDError(f"{supernet.folder} holds a {supernet.kind}, not a supernet")
    if supernet.model != profile.space:
        raise EdgeKDError(
            f"{supernet.folder} is of space {supernet.model}, profile {profile.name} wants "
            f"{profile.space}: shrink another, or change the profile"
        )
    if supernet.data_fingerprint != work.dataset.fingerprint or supernet.spec != work.spec:
        raise EdgeKDError(f"{supernet.folder} was trained on other data or at another size")
    return supernet


def pupil(work: Workplace, student: str, start: Start) -> Pupil:
    """What `student` names or the sub-net in that folder, at this size."""
    folder = Path(student)
    if not (folder / Artifact.FILE).exists():
        if not _is_subnet(student):
            if start.model != "scratch":
                raise EdgeKDError(f"{student} begins from scratch: --start is for sub-nets")
            return Pupil(student, None)
        name, arch = spaces.named(student)
        start = start.official(name) if start.model == "ofa" else start.found()
        return Pupil(name, arch.model_copy(update={"resolution": work.spec.size[0]}), None, start)
    made = Artifact.load(folder)
    if made.arch is None:
        raise EdgeKDError(f"{folder} holds no sub-net of a space: name one, or a student's folder")
    return Pupil(made.model, made.arch, None, start.found())


def _is_subnet(student: str) -> bool:
    """Whether it names one; False for another network, EdgeKDError for neither."""
    try:
        spaces.named(student)
    except EdgeKDError:
        from edgekd import models

        if models.known(student):
            return False
        raise
    return True


def check(profile: Profile, student: str | None, folder: Path) -> None:
    """EdgeKDError at once for what would only be found after a teacher was taught."""
    from edgekd import runtimes

    runtimes.check(profile.runtime)
    named = student or profile.student
    if named and not Path(named).is_dir():
        _is_subnet(named)
    spaces.space_of(profile.space)
    make_folder(folder)


def distill(
    work: Workplace,
    profile: Profile,
    folder: Path,
    teachers: Sequence[Artifact],
    training: Training,
    pupil: Pupil,
    *,
    sensitivity: float | None = None,
    layer: str = "",
    force: bool,
) -> Artifact:
    """The run's student, trained now (or further) unless it is there already.

    layer: that its files will explain, see runs.onnx_of.
    """
    from edgekd import distill as loop

    spec = work.spec
    if pupil.arch is not None:
        spec = spec.model_copy(update={"size": (pupil.arch.resolution,) * 2})
    origin: dict[str, str] = {}
    if pupil.supernet is not None:
        origin = {"supernet": pupil.supernet.sha256}
    elif pupil.start.model != "scratch":
        origin = pupil.start.settings()
    if pupil.supernet is not None:  # at 7e-4, two epochs took back what shrinking had brought
        training = _gentler(training, lr=3e-4)
    elif origin:
        training = _gentler(training)
    training = training if teachers else loop.without_teacher(training)
    asked = loop.settings(
        work.dataset, pupil.name, spec, training, seed=work.seed, teachers=teachers, origin=origin
    )
    made = runs.finished(folder / "student", asked, force=force)
    run = runs.Run(
        profile=profile,
        data=str(work.folder.resolve()),
        spec=spec,
        teacher=str(teachers[0].folder.resolve()) if teachers else "",
        seed=work.seed,
        split=work.split,
        allow_leakage=work.allow_leakage,
        layer=layer,
    )
    runs.begin(work.root, folder, run)
    if made:
        return runs.rejudged(made, work.dataset, sensitivity, rivals=teachers)
    return loop.distill(
        work.dataset, teachers, pupil.name, pupil.arch, spec, folder / "student",
        training=training, net=_cut(work, pupil, pupil.arch) if origin and pupil.arch else None,
        origin=origin, replay=runs.shared(work.root, work.dataset),
        sensitivity=sensitivity, seed=work.seed, track=work.track,
    )  # fmt: skip


def _cut(work: Workplace, pupil: Pupil, arch: Arch) -> SubNet:
    """The pupil with its weights of a supernet, trained or just begun."""
    from edgekd import models

    if pupil.supernet is not None:
        return models.load_supernet(pupil.supernet).extract(arch)
    start = pupil.start
    if start.model == "ofa" and start.weights is not None:
        return models.published(arch, len(work.spec.classes), start.weights, work.seed)
    return models.supernet(
        arch.space, len(work.spec.classes), start=start.model, weights=start.weights,
        pretrained=start.pretrained, seed=work.seed,
    ).extract(arch)  # fmt: skip
