"""`edgekd shrink`: the supernet that every profile's student is cut out of, trained once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.pipeline import folders, plan
from edgekd.pipeline.teach import asked_teachers, mask_layers, planned_teachers
from edgekd.pipeline.workspace import (
    MASKED_SUPERNET,
    Start,
    Workspace,
    gentler,
    held,
    taught_reasons,
    unguided,
)
from edgekd.records import Artifact, EdgeKDError, Profile, Spec, Track, Training, unknown, untracked
from edgekd.records.options import (
    DataOptions,
    OutputOptions,
    SupernetOptions,
    TeacherOptions,
    TrainOptions,
)

LOG = logging.getLogger(__name__)


def shrink(
    profiles: Sequence[str] = ("cpu",),
    *,
    data: DataOptions = DataOptions(),  # noqa: B008 it is frozen
    teacher: TeacherOptions = TeacherOptions(),  # noqa: B008
    supernet: SupernetOptions = SupernetOptions(),  # noqa: B008
    train: TrainOptions = TrainOptions(),  # noqa: B008
    output: OutputOptions = OutputOptions(),  # noqa: B008
    track: Track = untracked,
) -> Artifact:
    """A supernet, trained once so that the student of every profile can be cut out of it.

    profiles: names or .toml files, all of one space. OFA's progressive shrinking or the sandwich
    rule (Cai et al. 2020, arXiv 1908.09791; Yu & Huang 2019, arXiv 1903.05134). The artifact lies
    in `<runs>/shared/<data>/`.
    """
    chosen = [Profile.read(name) for name in profiles]
    training = unguided(
        train.training(alpha_hard=teacher.alpha_hard, temperature=teacher.temperature)
    )
    work = Workspace.open(output.runs, data, data.size or max(p.pixels for p in chosen), track)
    start = Start.of(supernet)
    planned(chosen, work.spec, start, supernet.schedule)
    guides = planned_teachers(work, teacher)
    network, asked = planned_supernet(
        work, chosen, guides, training, start=start, schedule=supernet.schedule,
        shorter="--epochs N", force=output.force,
    )  # fmt: skip
    if network is not None:
        missing = [t for t in guides if isinstance(t, plan.Network)]
        plan.tell(work, [*missing, network], teachers=guides, asked=asked)
    teachers = asked_teachers(work, teacher)
    return made_supernet(
        work, chosen, teachers, training, start=start, schedule=supernet.schedule,
        force=output.force,
    )  # fmt: skip


def planned(
    profiles: Sequence[Profile], spec: Spec, start: Start, schedule: str
) -> tuple[str, list[int], Start]:
    """(space, resolutions, start with its files) of a supernet; EdgeKDError for what does not fit,
    so asked before a teacher is taught, too.
    """
    from edgekd.train import shrink as loop

    folders.alone("shrinking")
    if schedule not in loop.SCHEDULES:
        raise EdgeKDError(unknown("schedule", schedule, loop.SCHEDULES))
    space, resolutions = shared_space(profiles, spec)
    start = start.resolved(space)
    start.settings()
    return space, resolutions, start


def made_supernet(
    work: Workspace,
    profiles: Sequence[Profile],
    teachers: Sequence[Artifact],
    training: Training,
    *,
    start: Start,
    schedule: str,
    force: bool = False,
) -> Artifact:
    """The supernet of these settings, one for all `profiles`, trained now unless it is there."""
    from edgekd.models import zoo
    from edgekd.train import shrink as loop

    space, resolutions, start = planned(profiles, work.spec, start, schedule)
    training = supernet_training(training, start, taught=bool(teachers))
    folder, settings, asked = _asked(work, space, resolutions, start, schedule, training, teachers)
    with held(folder):
        if made := folders.finished(folder, settings, force=force):
            return made
        LOG.info("%s", start.told("the supernet", space))
        net = zoo.supernet(
            space, len(work.spec.classes), start=start.model, weights=start.weights,
            pretrained=start.pretrained, seed=work.seed,
        )  # fmt: skip
        return loop.shrink(
            work.dataset, net, work.spec, folder, training=training,
            replay=folders.shared(work.root, work.dataset), track=work.track, **asked,
        )  # fmt: skip


def _asked(
    work: Workspace,
    space: str,
    resolutions: list[int],
    start: Start,
    schedule: str,
    training: Training,
    teachers: Sequence[Artifact],
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(folder of a supernet, all that it depends on, what the loop is called with beside)."""
    from edgekd.train import shrink as loop

    asked: dict[str, Any] = {
        "resolutions": resolutions, "start": start.settings(), "schedule": schedule,
        "teachers": teachers, "layers": mask_layers(work, teachers, training), "seed": work.seed,
    }  # fmt: skip
    settings = loop.shrink_settings(work.dataset, space, work.spec, training, **asked)
    folder = folders.own_folder(work.root, work.dataset, "supernet", space, work.spec, settings)
    return folder, settings, asked


def supernet_training(training: Training, start: Start, *, taught: bool) -> Training:
    """As a supernet is trained that begins like this; taught: by a teacher."""
    if start.model != "scratch":
        training = gentler(training, lr=1e-3, epochs=12)
        if taught:
            training = taught_reasons(training, MASKED_SUPERNET)
    if training.attention or training.features:
        raise EdgeKDError("attention and features guide one student: leave them out of shrinking")
    return training


def planned_supernet(
    work: Workspace,
    profiles: Sequence[Profile],
    teachers: Sequence[Artifact | plan.Network],
    training: Training,
    *,
    start: Start,
    schedule: str,
    shorter: str,
    force: bool = False,
) -> tuple[plan.Network | None, float]:
    """(the supernet that `made_supernet` is to train, or None; what its teachers are asked)."""
    from edgekd.train import pace

    space, resolutions, start = planned(profiles, work.spec, start, schedule)
    training = supernet_training(training, start, taught=bool(teachers))
    done = 0
    known = [t for t in teachers if isinstance(t, Artifact)]
    begun = list(folders.shared(work.root, work.dataset).glob(f"supernet-{space}-*"))
    if begun and len(known) == len(teachers) and not force:
        folder, *_ = _asked(work, space, resolutions, start, schedule, training, known)
        if (folder / Artifact.FILE).exists():
            return None, 0
        done = pace.epochs_done(folder)
    begins = "random weights" if start.model == "scratch" else start.model
    samples = work.dataset.splits["train"]
    network = plan.Network(
        f"supernet {space} from {begins}",
        lambda: pace.supernet(space, resolutions, schedule, samples, work.spec, training),
        pace.supernet_work(work.dataset, training, done=done),
        shorter,
    )
    return network, plan.questions(work, training, teachers)


def shared_space(profiles: Sequence[Profile], spec: Spec) -> tuple[str, list[int]]:
    """The one space of the profiles, and all resolutions that they allow up to the spec's size."""
    if len({p.space for p in profiles}) > 1:
        named = ", ".join(f"{p.name} {p.space}" for p in profiles)
        raise EdgeKDError(f"profiles of several spaces share no supernet ({named}): one at a time")
    side = spec.size[0]
    found = sorted({r for p in profiles for r in p.resolutions if r <= side})
    return profiles[0].space, found if side in found else [side]


def find_supernet(work: Workspace, profile: Profile, folder: Path | None) -> Artifact | None:
    """The supernet to cut from: the one in `folder`, or the one that fits, or None."""
    if folder is not None:
        return _fitting(Artifact.load(folder), profile, work)
    there = folders.made(work.root, work.dataset, "supernet", work.spec)
    there = [s for s in there if s.model == profile.space]
    if len(there) > 1:
        names = ", ".join(str(s.folder) for s in there)
        raise EdgeKDError(f"{len(there)} supernets fit, name one with --supernet: {names}")
    return there[0] if there else None


def _fitting(supernet: Artifact, profile: Profile, work: Workspace) -> Artifact:
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
