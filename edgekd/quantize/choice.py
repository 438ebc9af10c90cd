"""The record of a choice: what became of each candidate, and which file is deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from edgekd.quantize.halving import CLEARLY, Late, Timed
from edgekd.records import Artifact, Machine, Metric, Precision, Profile, Record, Stored

SECONDS = 2.0  # of timing a candidate in each round
EXACT: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")
WHY = Literal[
    "chosen", "slower", "no faster", "loses accuracy", "explains otherwise", "does not run"
]
STEP = Literal["making", "answers", "turns", "explanations", "timing"]  # turns: of `halving`
OUT_AT: dict[WHY, STEP] = {"loses accuracy": "answers", "explains otherwise": "explanations"}


class Candidate(Record):
    """One precision by one engine, and what became of it."""

    name: str  # of its folder: "fp32", "int8-nncf"
    precision: str
    engine: str = ""
    state: WHY
    reason: str
    out_at: STEP | None = None  # the step in which it went out; None: it is chosen, or an older
    # edgekd's
    artifact_sha256: str = ""  # empty: there is no file
    size_bytes: int = 0
    drop_pt: Metric | None = None  # points of balanced accuracy lost to FP32, validation, paired
    flips: int | None = None  # validation images that are answered otherwise than by FP32
    agreement: float | None = None  # of its maps; None: not asked, or they cannot be compared
    times: float | None = None  # as long as FP32 takes, turn by turn: what is decided by
    turns: int | None = None  # that this rests on; None: never timed, or an older edgekd's
    p50_ms: float | None = None
    p95_ms: float | None = None


class Choice(Stored):
    """All candidates, and which one is deployed."""

    FILE: ClassVar[str] = "choice.json"
    source: str  # sha256 of the FP32 ONNX file
    tuned: str = ""  # of the one trained in INT8; empty: none
    profile: Profile
    max_drop: float  # points
    images: int  # calibration
    seconds: float = SECONDS  # of calls of each in each round
    engines: tuple[str, ...]
    exhaustive: bool = False  # all were explained and timed in full
    chosen: str
    candidates: tuple[Candidate, ...]
    machine: Machine


class Judged(NamedTuple):
    """A file that ran, beside FP32 on the validation split."""

    name: str
    artifact: Artifact
    drop: Metric  # points
    flips: int
    agreement: float | None  # kappa of its maps with FP32's: 1 the same, 0 as alike as strangers'
    # maps; NaN: they cannot be compared; None: not asked
    asked: float  # that the profile's margins ask

    @property
    def alike(self) -> float | None:
        """The agreement as it is stored; None where no maps could be compared."""
        if self.agreement is None or not np.isfinite(self.agreement):
            return None
        return round(self.agreement, 4)

    def lost(self, max_drop: float) -> tuple[WHY, str] | None:
        """(state, reason) of one that is out; None of one that may be chosen, as FP32 always.

        One that keeps its answers is not out before its maps were asked for.
        """
        if self.artifact.precision == "fp32":
            return None
        if self.drop.value > max_drop:
            reason = f"{_points(self.drop)} lost on validation, {max_drop:g} allowed"
            return "loses accuracy", reason
        if self.agreement is not None and not self.agreement >= self.asked:
            return "explains otherwise", f"agreement {self.agreement:.2f}, under {self.asked:g}"
        return None


def ranked(
    judged: Sequence[Judged],
    timed: Mapping[str, Timed],
    max_drop: float,
    late: Mapping[str, Late] = {},
) -> list[Candidate]:
    """From fast to slow, then those that were never timed. late: those that time put out early."""
    order = sorted(judged, key=lambda j: timed[j.name].times if j.name in timed else np.inf)
    hold = [j for j in order if j.name in timed and j.name not in late and not j.lost(max_drop)]
    times = {n: t.times for n, t in timed.items()}
    as_fast = [j for j in hold if times[j.name] <= CLEARLY * times[hold[0].name]]
    chosen = min(as_fast, key=lambda j: EXACT.index(j.artifact.precision))

    def state_of(j: Judged) -> tuple[WHY, str, STEP | None]:
        if lost := j.lost(max_drop):
            return lost[0], lost[1] + _unasked(j, timed), OUT_AT[lost[0]]
        if j.name in late:
            return "slower", f"{late[j.name]}{_unasked(j, timed)}", "turns"
        if j is chosen:
            doubt = _doubt(j.drop, max_drop)
            return "chosen", f"the fastest that keeps accuracy and explanations{doubt}", None
        ratio = times[j.name] / times[chosen.name]
        beside = f"{ratio:.2f} x the time of {chosen.name}"
        if ratio > 1:
            return "slower", beside, "timing"
        return "no faster", f"{beside}, which is more exact", "timing"

    rows = []
    for j in order:
        a, t = j.artifact, timed.get(j.name)
        state, reason, out_at = state_of(j)
        rows.append(
            Candidate(
                name=j.name, precision=a.precision, engine=a.settings.get("engine", ""),
                state=state, reason=reason, out_at=out_at, artifact_sha256=a.sha256,
                size_bytes=a.size_bytes, drop_pt=j.drop, flips=j.flips, agreement=j.alike,
                **(t._asdict() if t else {}),
            )
        )  # fmt: skip
    return rows


def _unasked(j: Judged, timed: Mapping[str, Timed]) -> str:
    """What of a candidate nobody asked, since it was out before."""
    unasked = []
    if j.agreement is None and j.artifact.precision != "fp32":
        unasked.append("explained")
    if j.name not in timed:
        unasked.append("timed")
    if len(unasked) == 2:
        return "; neither explained nor timed"
    return f"; not {unasked[0]}" if unasked else ""


def _points(lost: Metric) -> str:
    """What was lost, with its interval where there is one."""
    if lost.low is None or lost.high is None:
        return f"{lost.value:.1f} points"
    return f"{lost.value:.1f} points [{lost.low:.1f}, {lost.high:.1f}]"


def _doubt(lost: Metric, max_drop: float) -> str:
    """Said of a chosen file whose validation images are too few to be sure."""
    if lost.high is None or lost.high <= max_drop:
        return ""
    return f"; {_points(lost)} lost: too few images to exclude more than {max_drop:g}"


def without_file(
    name: str, reason: str, last: Judged | None = None, lost: tuple[WHY, str] | None = None
) -> Candidate:
    """One of which there is no file. last, lost: of one that there was, and why it was out."""
    precision, engine, *_ = [*name.split("-"), ""]  # "fp32", "int8-ort", "int8-ort-repaired"
    return Candidate(
        name=name, precision=precision, engine=engine,
        state=lost[0] if lost else "does not run",
        reason=f"{lost[1]}; {reason}" if lost else reason,
        out_at=OUT_AT[lost[0]] if lost else "making",
        drop_pt=last.drop if last else None, flips=last.flips if last else None,
        agreement=last.alike if last else None,
    )  # fmt: skip
