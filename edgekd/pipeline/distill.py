"""`edgekd distill`: the profile's student, and all that it needs before, where that is missing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgekd.ofa import spaces
from edgekd.pipeline import finalists, folders, plan
from edgekd.pipeline import search as searches
from edgekd.pipeline.run import Run
from edgekd.pipeline.shrink import find_supernet, made_supernet, planned, planned_supernet
from edgekd.pipeline.teach import asked_teachers, mask_layers, planned_teachers
from edgekd.pipeline.workspace import (
    GENTLE,
    INHERITING,
    Start,
    Workspace,
    gentler,
    held,
    once,
    taught_reasons,
    unguided,
)
from edgekd.records import (
    Arch,
    Artifact,
    EdgeKDError,
    Profile,
    Track,
    Training,
    make_folder,
    untracked,
)
from edgekd.records.options import (
    DataOptions,
    DistillOptions,
    RunOptions,
    SearchOptions,
    StudentOptions,
    SupernetOptions,
    TeacherOptions,
    TrainOptions,
)

if TYPE_CHECKING:
    from edgekd.ofa.supernet import SubNet

LOG = logging.getLogger(__name__)


class StudentSpec(NamedTuple):
    """The student to be distilled, and where its weights come from."""

    name: str
    arch: Arch | None  # None: a network of that name, which is no sub-net
    supernet: Artifact | None = None
    start: Start = Start()


def distill(
    profile: str = "cpu",
    *,
    data: DataOptions = DataOptions(),  # noqa: B008 it is frozen
    teacher: TeacherOptions = TeacherOptions(),  # noqa: B008
    student: StudentOptions = StudentOptions(),  # noqa: B008
    supernet: SupernetOptions = SupernetOptions(),  # noqa: B008
    search: SearchOptions = SearchOptions(),  # noqa: B008
    train: TrainOptions = TrainOptions(),  # noqa: B008
    output: RunOptions = RunOptions(),  # noqa: B008
    track: Track = untracked,
) -> Run:
    """A run with the profile's student, distilled from a teacher.

    profile: a name or a .toml file. What is missing is made first: teacher, supernet, search; what
    is there already and was asked for alike is taken as it is. Hybrid supervision as in arXiv
    2508.15251: labels with weight alpha_hard, soft targets with the rest. With several finalists
    the fastest is kept that gives up at most `give_up` points as distilled, on validation.
    """
    chosen = Profile.read(profile)
    training = unguided(
        train.training(alpha_hard=teacher.alpha_hard, temperature=teacher.temperature)
    )
    named = student.student or chosen.student
    folder = output.run or output.runs / chosen.name
    check(chosen, student.student, folder)
    if student.finalists > 1 and named:
        raise EdgeKDError(f"--finalists are of a search, student {named} is none: leave one out")
    with held(folder, inside=True):
        work = Workspace.open(output.runs, data, data.size or chosen.pixels, track)
        LOG.info("run %s: %s, %d pixels", folder, work.folder, work.spec.size[0])
        asked = DistillOptions(
            data=data,
            teacher=teacher,
            student=student,
            supernet=supernet,
            search=search,
            train=train,
        )
        subnet = subnet_of(work, named, Start.of(supernet)) if named else None
        _try_before(work, chosen, subnet, folder, asked)
        if output.force or not (folder / "student" / Artifact.FILE).exists():
            _tell_plan(work, chosen, subnet, folder, training, asked, force=output.force)
        guides = asked_teachers(work, teacher)
        making = Making(work, chosen, guides, training, asked)
        if subnet:
            making.student(subnet, folder, force=output.force)
        else:
            _from_search(making, folder, force=output.force)
    return Run.find(output.runs, folder, None, track)


def _try_before(
    work: Workspace,
    profile: Profile,
    subnet: StudentSpec | None,
    folder: Path,
    asked: DistillOptions,
) -> None:
    """EdgeKDError at once for what would only be found after a teacher was taught."""
    from edgekd.models import zoo
    from edgekd.train import preflight

    if subnet is None:
        if not find_supernet(work, profile, asked.search.supernet):
            planned([profile], work.spec, Start.of(asked.supernet), asked.supernet.schedule)
        return
    subnet.start.settings()
    if subnet.arch:
        LOG.info("%s", subnet.start.told(f"student {subnet.name}", subnet.arch.space))
    out = folder / "student"
    if (out / Artifact.FILE).exists():
        return
    spec, classes = work.spec, len(work.spec.classes)
    net = (
        zoo.student(subnet.arch, classes)
        if subnet.arch
        else zoo.classifier(subnet.name, classes, size=spec.size)
    )
    known = subnet.arch is not None  # sub-nets of the spaces can be exported
    preflight.check(net, spec, out, exported=not known, layer=asked.student.layer)


def _tell_plan(
    work: Workspace,
    profile: Profile,
    subnet: StudentSpec | None,
    folder: Path,
    training: Training,
    asked: DistillOptions,
    *,
    force: bool,
) -> None:
    """Say what is made: teachers, a supernet, a search, the student, as far as they are missing."""
    from edgekd.train import pace

    guides = planned_teachers(work, asked.teacher)
    networks = [t for t in guides if isinstance(t, plan.Network)]
    questions = 0.0
    if subnet is None and not find_supernet(work, profile, asked.search.supernet):
        supernet, questions = planned_supernet(
            work, [profile], guides, _shrinking(training, asked),
            start=Start.of(asked.supernet), schedule=asked.supernet.schedule,
            shorter="--student NAME, --shrink-epochs N",
        )  # fmt: skip
        networks += [supernet] if supernet else []
    arch = spaces.uniform(profile.space, "mid", work.spec.size[0])  # which, is found by the search
    chosen = subnet or StudentSpec("student", arch)
    learning = student_training(training, chosen, taught=bool(guides), cut=subnet is None)
    done = 0 if force else pace.epochs_done(folder / "student")
    samples, spec = work.dataset.splits["train"], work.spec
    student = plan.Network(
        f"student {subnet.name} of {profile.name}" if subnet else f"student of {profile.name}",
        lambda: pace.classifier(chosen.name, chosen.arch, samples, spec, learning),
        pace.classifier_work(work.dataset, learning, done=done, cut=subnet is None),
        "--epochs N",
        times=asked.student.finalists,
    )
    questions = questions or plan.questions(work, learning, guides)
    plan.tell(work, [*networks, student], teachers=guides, asked=questions, search=subnet is None)


def _shrinking(training: Training, asked: DistillOptions) -> Training:
    """Of a supernet that is made for a student which is trained like this."""
    said = "masked" in training.model_fields_set  # for the supernet, too
    return TrainOptions(epochs=asked.student.shrink_epochs).training(
        masked=training.masked if said else None
    )


class Making(NamedTuple):
    """What every student of one command has in common."""

    work: Workspace
    profile: Profile
    teachers: Sequence[Artifact]
    training: Training
    asked: DistillOptions

    def student(self, chosen: StudentSpec, folder: Path, *, force: bool) -> Artifact:
        """One student, in the run `folder`."""
        return made_student(
            self.work, self.profile, folder, self.teachers, self.training, chosen,
            sensitivity=self.asked.student.sensitivity, layer=self.asked.student.layer,
            force=force, asked=self.asked,
        )  # fmt: skip


def _from_search(making: Making, folder: Path, *, force: bool) -> Artifact:
    """The student that a search finds in a supernet, which is shrunk now if there is none."""
    work, profile, teachers, training, asked = making
    base = find_supernet(work, profile, asked.search.supernet) or made_supernet(
        work, [profile], teachers, _shrinking(training, asked),
        start=Start.of(asked.supernet), schedule=asked.supernet.schedule,
    )  # fmt: skip
    LOG.info("supernet %s, %s", base.model, base.folder)
    several = asked.student.finalists > 1
    search = asked.search.model_copy(update={"give_up": 0.0}) if several else asked.search
    front, sought = searches.search_one(work, profile, base, folder, search)
    if not searches.told_apart(sought):
        LOG.info("all sub-nets are equally accurate: chosen for speed alone")
    if several:

        def one_of_them(name: str, arch: Arch, where: Path) -> Artifact:
            return making.student(StudentSpec(name, arch, base), where, force=force)

        sought, compared = finalists.settle(
            front, sought, folder, one_of_them, count=asked.student.finalists,
            slack=asked.search.give_up / 100, force=force,
        )  # fmt: skip
        for each in compared.finalists:
            LOG.info("finalist %s: predicted %.3g ms, distilled %.3f balanced accuracy on "
                     "validation", each.name, each.p50_ms, each.accuracy)  # fmt: skip
        force = False  # the student that is there is the chosen one's
    LOG.info("student %s", sought.chosen)
    arch = searches.chosen_of(front, sought).arch
    return making.student(StudentSpec(sought.chosen, arch, base), folder, force=force)


def subnet_of(work: Workspace, student: str, start: Start) -> StudentSpec:
    """What `student` names or the sub-net in that folder, at this size."""
    folder = Path(student)
    if not (folder / Artifact.FILE).exists():
        if not _is_subnet(student):
            if start != Start("auto") and start.model != "scratch":
                raise EdgeKDError(f"{student} begins from scratch: --start is for sub-nets")
            return StudentSpec(student, None)
        name, arch = spaces.named(student)
        start = start.official(name) if start.model == "ofa" else start.resolved(arch.space)
        return StudentSpec(
            name, arch.model_copy(update={"resolution": work.spec.size[0]}), None, start
        )
    made = Artifact.load(folder)
    if made.arch is None:
        raise EdgeKDError(f"{folder} holds no sub-net of a space: name one, or a student's folder")
    return StudentSpec(made.model, made.arch, None, start.resolved(made.arch.space))


def _is_subnet(student: str) -> bool:
    """Whether it names one; False for another network, EdgeKDError for neither."""
    try:
        spaces.named(student)
    except EdgeKDError:
        from edgekd.models import zoo

        if zoo.known(student):
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
    make_folder(folder, folders.OTHER)


def made_student(
    work: Workspace,
    profile: Profile,
    folder: Path,
    teachers: Sequence[Artifact],
    training: Training,
    chosen: StudentSpec,
    *,
    sensitivity: float | None = None,
    layer: str = "auto",
    force: bool,
    asked: DistillOptions | None = None,
) -> Artifact:
    """The run's student, trained now (or further) unless it is there already.

    layer: that its files will explain, see folders.onnx_of. asked: to be told in the run's record.
    """
    from edgekd.train import distill as loop

    spec = work.spec
    if chosen.arch is not None:
        spec = spec.model_copy(update={"size": (chosen.arch.resolution,) * 2})
    origin = _origin(chosen)
    training = student_training(training, chosen, taught=bool(teachers))
    stages = mask_layers(work, teachers, training)
    wanted = loop.settings(
        work.dataset, chosen.name, spec, training,
        seed=work.seed, teachers=teachers, origin=origin, layers=stages,
    )  # fmt: skip
    made = once(lambda: folders.finished(folder / "student", wanted, force=force))
    run = folders.RunRecord(
        profile=profile,
        data=str(work.folder.resolve()),
        spec=spec,
        teacher=str(teachers[0].folder.resolve()) if teachers else "",
        seed=work.seed,
        split=work.split,
        allow_leakage=work.allow_leakage,
        layer=layer,
        options=asked,
    )
    folders.begin(work.root, folder, run)
    if made:
        return folders.rejudged(made, work.dataset, sensitivity, rivals=teachers)
    net = _cut(work, chosen, chosen.arch) if origin and chosen.arch else None
    return loop.distill(
        work.dataset, teachers, chosen.name, chosen.arch, spec, folder / "student",
        training=training, net=net, origin=origin, layers=stages,
        replay=folders.shared(work.root, work.dataset), sensitivity=sensitivity,
        seed=work.seed, track=work.track,
    )  # fmt: skip


def _origin(chosen: StudentSpec) -> dict[str, str]:
    """Where the weights come from that a student begins with; empty: from scratch."""
    if chosen.supernet is not None:
        return {"supernet": chosen.supernet.sha256}
    return {} if chosen.start.model == "scratch" else chosen.start.settings()


def student_training(
    training: Training, chosen: StudentSpec, *, taught: bool, cut: bool = False
) -> Training:
    """As a student is trained that begins like this. taught: by a teacher; cut: out of a supernet
    that is not there yet.
    """
    from edgekd.train import distill as loop

    cut |= chosen.supernet is not None
    begun = cut or chosen.start.model != "scratch"
    if not taught:
        training = loop.without_teacher(training)
    elif begun:
        training = taught_reasons(training)
    epochs = INHERITING if training.masked else GENTLE
    if cut:  # at 7e-4, two epochs took back what shrinking had brought
        return gentler(training, lr=3e-4, epochs=epochs)
    return gentler(training, epochs=epochs) if begun else training


def _cut(work: Workspace, chosen: StudentSpec, arch: Arch) -> SubNet:
    """The student with its weights of a supernet, trained or just begun."""
    from edgekd.models import zoo

    if chosen.supernet is not None:
        return zoo.load_supernet(chosen.supernet).extract(arch)
    start = chosen.start
    if start.model == "ofa" and start.weights is not None:
        return zoo.published(arch, len(work.spec.classes), start.weights, work.seed)
    return zoo.supernet(
        arch.space, len(work.spec.classes), start=start.model, weights=start.weights,
        pretrained=start.pretrained, seed=work.seed,
    ).extract(arch)  # fmt: skip
