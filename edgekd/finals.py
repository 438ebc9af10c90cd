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

from edgekd import runs, seek, spaces
from edgekd.front import Front, Member
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
    sought: seek.Sought,
    folder: Path,
    distil: Distil,
    *,
    count: int,
    slack: float,
    force: bool = False,
) -> tuple[seek.Sought, Finals]:
    """(`sought` with the finalist that was chosen, how the finalists compare), kept in `folder`.

    folder: of the run. Its search/finals.json is used again while front, count and slack are the
    same. Otherwise `count` of the front are distilled, and the chosen one's student becomes the
    run's; EdgeKDError if that has one which this would replace, unless `force`.
    """
    student = folder / "student"
    asked: dict[str, Any] = {
        "front": sha256(folder / "search" / Front.FILE), "count": count, "slack": slack,
    }  # fmt: skip
    if not force and (found := Finals.kept(folder / "search", asked)):
        return sought.model_copy(update={"chosen": found.chosen}), found
    if not force and (student / Artifact.FILE).exists():
        raise EdgeKDError(
            f"{folder} has a student that no finalists were compared with: --force replaces it, "
            "--run DIR keeps both"
        )
    runs.alone("comparing finalists")
    last = front.members.index(seek.chosen_of(front, sought))
    compared = []
    for member in evenly(front.members[: last + 1], count):
        name = spaces.title(member.arch)
        made = distil(name, member.arch, folder / FOLDER / name)
        accuracy = made.metrics["val_balanced_accuracy"].value
        compared.append(
            Finalist(name=name, p50_ms=member.p50_ms, accuracy=accuracy, student=made.sha256)
        )
    best = max(f.accuracy for f in compared)
    chosen = next(f for f in compared if f.accuracy >= best - slack)
    finals = Finals(**asked, finalists=tuple(compared), chosen=chosen.name).save(folder / "search")
    for old in (student, copy := folder / ".student"):
        shutil.rmtree(old, ignore_errors=True)
    (folder / runs.Run.FILE).unlink(missing_ok=True)  # is written anew with the student
    shutil.copytree(folder / FOLDER / chosen.name / "student", copy)
    copy.rename(student)
    return sought.model_copy(update={"chosen": chosen.name}), finals


def evenly(members: Sequence[Member], count: int) -> list[Member]:
    """Up to `count` of `members` (from fast to slow) with both ends, evenly spaced in latency."""
    ms = np.array([m.p50_ms for m in members])
    wanted = np.linspace(ms[0], ms[-1], count)
    places = np.unique(np.abs(ms - wanted[:, None]).argmin(1))
    return [members[i] for i in places]
