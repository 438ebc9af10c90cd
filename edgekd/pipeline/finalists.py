"""Which sub-net of a front is the student? Several are distilled, the fastest as good is kept.

A search goes by the accuracy of sub-nets as they are cut. What distilling makes of them it does not
know: some points apart before, they may be equal after. So finalists, evenly from the fastest of
the front to the one that was sought, are distilled alike and compared on the validation split.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgekd.ofa import spaces
from edgekd.ofa.pareto import Front, Member
from edgekd.pipeline import folders, search
from edgekd.records import Arch, Artifact, EdgeKDError, Record, Stored, sha256

FOLDER = "finalists"  # in the run's: a run of each
Distil = Callable[[str, Arch, Path], Artifact]  # (name, sub-net, folder of a run) -> its student


class Finalist(Record):
    """A member of the front, distilled."""

    name: str
    p50_ms: float  # predicted, as of all the front
    accuracy: float  # balanced, on the validation split, as distilled
    student: str  # sha256


class Finals(Stored):
    """What became of the finalists: beside search.json."""

    FILE: ClassVar[str] = "finals.json"
    front: str  # sha256
    count: int  # that were asked for; fewer where the front has no more
    slack: float  # accuracy that the fastest may give up to the most accurate
    finalists: tuple[Finalist, ...]  # from fast to slow
    chosen: str


def settle(
    front: Front,
    sought: search.Sought,
    folder: Path,
    distil: Distil,
    *,
    count: int,
    slack: float,
    force: bool = False,
) -> tuple[search.Sought, Finals]:
    """(`sought` with the finalist that was chosen, how the finalists compare), kept in `folder`.

    folder: of the run. `count` of the front are distilled, and the chosen one's student becomes the
    run's; EdgeKDError if that has one of another making which this would replace, unless `force`.
    While front and count are the same, what search/finals.json tells is not made again: another
    slack only chooses anew.
    """
    search = folder / "search"
    asked: dict[str, Any] = {"front": sha256(search / Front.FILE), "count": count}
    found = None if force else Finals.kept(search, asked)
    ours = found is None or (folder / FOLDER).is_dir()  # not another seed's run with this search
    known = [f.student for f in found.finalists] if found else []
    if ours and not force and _own(folder) not in ("", *known):
        raise EdgeKDError(
            f"{folder} has a student that no finalists were compared with: --force replaces it, "
            "--run DIR keeps both"
        )
    if found is None or found.slack != slack:
        compared = found.finalists if found else _compared(front, sought, folder, distil, count)
        best = max(f.accuracy for f in compared)
        chosen = next(f.name for f in compared if f.accuracy >= best - slack)
        found = Finals(**asked, slack=slack, finalists=compared, chosen=chosen).save(search)
    if ours:
        _take(folder, found)
    return sought.model_copy(update={"chosen": found.chosen}), found


def _compared(
    front: Front, sought: search.Sought, folder: Path, distil: Distil, count: int
) -> tuple[Finalist, ...]:
    """Some of the front up to the member that was sought, each distilled."""
    folders.alone("comparing finalists")
    last = front.members.index(search.chosen_of(front, sought))
    found = []
    for member in evenly(front.members[: last + 1], count):
        name = spaces.title(member.arch)
        made = distil(name, member.arch, folder / FOLDER / name)
        accuracy = made.metrics["val_balanced_accuracy"].value
        found.append(
            Finalist(name=name, p50_ms=member.p50_ms, accuracy=accuracy, student=made.sha256)
        )
    return tuple(found)


def _own(folder: Path) -> str:
    """The sha256 of the run's finished student; empty: there is none."""
    student = folder / "student"
    return Artifact.load(student).sha256 if (student / Artifact.FILE).exists() else ""


def _take(folder: Path, finals: Finals) -> None:
    """The chosen finalist's student as the run's, unless it is that already."""
    student = folder / "student"
    if _own(folder) == next(f.student for f in finals.finalists if f.name == finals.chosen):
        return
    for old in (student, copy := folder / ".student"):
        shutil.rmtree(old, ignore_errors=True)
    (folder / folders.RunRecord.FILE).unlink(missing_ok=True)  # is written anew with the student
    shutil.copytree(folder / FOLDER / finals.chosen / "student", copy)
    copy.rename(student)


def evenly(members: Sequence[Member], count: int) -> list[Member]:
    """Up to `count` of `members` (from fast to slow) with both ends, evenly spaced in latency."""
    ms = np.array([m.p50_ms for m in members])
    wanted = np.linspace(ms[0], ms[-1], count)
    places = np.unique(np.abs(ms - wanted[:, None]).argmin(1))
    return [members[i] for i in places]
