"""`edgekd teach`: the teacher, trained unless it is there already."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgekd.pipeline import folders, plan
from edgekd.pipeline.workspace import Workspace, gentler, held, once, random_weights
from edgekd.records import Artifact, EdgeKDError, Track, Training, untracked
from edgekd.records.options import DataOptions, OutputOptions, TeacherOptions, TrainOptions

LOG = logging.getLogger(__name__)
PRETRAINED = "tf_efficientnet_lite0"  # what `auto` is where a package or the hub has its weights,
SCRATCH = "resnet18"  # and elsewhere: it trains from random weights
PIXELS = 128  # a side, where no size is asked for


def teach(
    model: str = "auto",
    *,
    data: DataOptions = DataOptions(),  # noqa: B008 it is frozen
    train: TrainOptions = TrainOptions(),  # noqa: B008
    weights: Path | None = None,
    pretrained: bool = False,
    sensitivity: float | None = None,
    output: OutputOptions = OutputOptions(),  # noqa: B008
    track: Track = untracked,
) -> Artifact:
    """A teacher: any timm network, trained from a checkpoint, from the hub or from scratch.

    model: timm's name, or `auto`, see `chosen`. weights: local checkpoint (.safetensors, .pth).
    pretrained: weights from the hub. sensitivity: of each class's threshold, chosen on the
    validation split; None: Youden's J. The artifact lies in `<runs>/shared/<data>/`, where every
    run on these data finds it.
    """
    training = train.training()
    check_file(weights)
    work = Workspace.open(output.runs, data, data.size or PIXELS, track)
    asked = asked_teacher(work, model, training, weights=weights, pretrained=pretrained)
    if output.force or not (asked.folder / Artifact.FILE).exists():
        network = asked.network(work, "--epochs N, --size PIXELS", force=output.force)
        plan.tell(work, [network])
    return made_teacher(
        work, model, training, weights=weights, pretrained=pretrained, sensitivity=sensitivity,
        force=output.force,
    )  # fmt: skip


def chosen(model: str, weights: Path | None, *, pretrained: bool) -> tuple[str, Path | None, bool]:
    """(timm name, file of weights, weights of the hub?) of a teacher that is to be made.

    `auto` is PRETRAINED with the weights that an installed package brings, or the hub's where they
    are asked for; else SCRATCH. A network whose weights such a package brings begins from them.
    """
    from edgekd.models import checkpoints

    if model == "auto":
        if weights is not None:
            raise EdgeKDError("these weights are of which network? name it with --teacher")
        there = pretrained or checkpoints.packaged(PRETRAINED)
        model = PRETRAINED if there else SCRATCH
    if weights is None and not pretrained:
        weights = checkpoints.packaged(model)
    return model, weights, pretrained


def asked_teachers(work: Workspace, asked: TeacherOptions) -> list[Artifact]:
    """The teachers that are asked for, made where they are not there; none with no_teacher."""
    if asked.no_teacher:
        return []
    training = TrainOptions(epochs=asked.teacher_epochs).training()
    found = find_teachers(
        work, asked.teacher, training, weights=asked.teacher_weights, pretrained=asked.pretrained
    )
    for one in found:
        LOG.info("teacher %s, %s", one.model, one.folder)
    return found


def mask_layers(work: Workspace, teachers: Sequence[Artifact], training: Training) -> list[str]:
    """The stage of each teacher whose channels are masks to learn from; none are without.

    It is the one that the rule for explained layers chooses, whichever layer a run explains: to
    explain another one needs no other training.
    """
    if not training.masked:
        return [""] * len(teachers)
    return once(
        lambda: [folders.explained_layer(t, work.dataset, work.track).layer for t in teachers]
    )


class Asked(NamedTuple):
    """A teacher as it is asked for."""

    model: str  # timm's name
    weights: Path | None
    pretrained: bool  # weights of the hub
    training: Training
    settings: dict[str, Any]  # all that it depends on
    folder: Path

    def network(self, work: Workspace, shorter: str, *, force: bool = False) -> plan.Network:
        """As a network of a plan; `shorter` are the options that make its training so."""
        from edgekd.train import pace

        done = 0 if force else pace.epochs_done(self.folder)
        samples = work.dataset.splits["train"]
        hub = "weights of the hub" if self.pretrained else "random weights"
        return plan.Network(
            f"teacher {self.model} from {self.weights.name if self.weights else hub}",
            lambda: pace.classifier(self.model, None, samples, work.spec, self.training),
            pace.classifier_work(work.dataset, self.training, done=done),
            shorter,
        )


def check_file(weights: Path | None) -> None:
    """EdgeKDError unless a file of weights that is named is there."""
    if weights is not None and not weights.is_file():
        raise EdgeKDError(f"no weights file {weights}: give a .safetensors or .pth file")


def asked_teacher(
    work: Workspace, model: str, training: Training, *, weights: Path | None, pretrained: bool
) -> Asked:
    """The settings and the folder of a teacher."""
    from edgekd.train import distill as loop

    model, weights, pretrained = chosen(model, weights, pretrained=pretrained)
    check_file(weights)
    if weights is not None or pretrained:
        training = gentler(training)
    training = loop.without_teacher(training)
    settings = loop.settings(
        work.dataset, model, work.spec, training,
        seed=work.seed, weights=weights, pretrained=pretrained,
    )  # fmt: skip
    folder = folders.own_folder(work.root, work.dataset, "teacher", model, work.spec, settings)
    return Asked(model, weights, pretrained, training, settings, folder)


def made_teacher(
    work: Workspace,
    model: str,
    training: Training,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    sensitivity: float | None = None,
    force: bool = False,
) -> Artifact:
    """The teacher of these settings, trained now unless it is there already."""
    from edgekd.train import distill as loop

    asked = asked_teacher(work, model, training, weights=weights, pretrained=pretrained)
    model, weights, pretrained, training, settings, folder = asked
    with held(folder):
        if made := once(lambda: folders.finished(folder, settings, force=force)):
            return folders.rejudged(made, work.dataset, sensitivity)
        begins = f"weights {weights}" if weights else "weights of the hub"
        if not (weights or pretrained):
            begins = random_weights([PRETRAINED], "the teacher's name")
        LOG.info("teacher %s begins from %s", model, begins)
        return loop.teach(
            work.dataset, model, work.spec, folder, training=training, weights=weights,
            pretrained=pretrained, sensitivity=sensitivity, seed=work.seed, track=work.track,
        )  # fmt: skip


def find_teacher(
    work: Workspace,
    teacher: str | None,
    training: Training,
    *,
    weights: Path | None,
    pretrained: bool,
) -> Artifact | None:
    """The teacher that is there: in a folder, or the one there is (of that name)."""
    if teacher and (Path(teacher) / Artifact.FILE).exists():
        if weights or pretrained:
            raise EdgeKDError(f"{teacher} is a trained teacher: --teacher-weights has no place")
        return Artifact.load(Path(teacher))
    if weights is None and not pretrained and "epochs" not in training.model_fields_set:
        there = folders.made(work.root, work.dataset, "teacher", work.spec)
        there = [t for t in there if teacher in (None, t.model)]
        if len(there) > 1:
            names = ", ".join(str(t.folder) for t in there)
            raise EdgeKDError(f"{len(there)} teachers fit, name one with --teacher: {names}")
        if there:
            return there[0]
    return None


def planned_teachers(work: Workspace, asked: TeacherOptions) -> list[Artifact | plan.Network]:
    """As `asked_teachers`, but those that are not there are still to be made."""
    training = TrainOptions(epochs=asked.teacher_epochs).training()
    found: list[Artifact | plan.Network] = []
    for name in [] if asked.no_teacher else _names(asked.teacher, asked.teacher_weights):
        how: Any = {"weights": asked.teacher_weights, "pretrained": asked.pretrained}
        there = find_teacher(work, name, training, **how)
        if there is None:
            wanted = asked_teacher(work, name or "auto", training, **how)
            done = (wanted.folder / Artifact.FILE).exists()
            there = Artifact.load(wanted.folder) if done else None
        found.append(there or wanted.network(work, "--teacher-epochs N"))
    return found


def _names(named: Sequence[str] | None, weights: Path | None) -> Sequence[str | None]:
    """Of the teachers that are asked for; None: any."""
    if named and len(named) > 1 and weights:
        raise EdgeKDError(
            "--teacher-weights is the file of one teacher, several are named: "
            "edgekd teach each, and give their folders"
        )
    return named or [None]


def find_teachers(
    work: Workspace,
    named: Sequence[str] | None,
    training: Training,
    *,
    weights: Path | None,
    pretrained: bool,
) -> list[Artifact]:
    """Every teacher that was named, one where none was; taught now if it is not there."""
    how: Any = {"weights": weights, "pretrained": pretrained}
    found = [
        find_teacher(work, name, training, **how)
        or made_teacher(work, name or "auto", training, **how)
        for name in _names(named, weights)
    ]
    if len({t.sha256 for t in found}) < len(found):
        raise EdgeKDError(f"the same teacher twice: {', '.join(t.model for t in found)}")
    return found
