"""What explanations must keep when a model is compressed, and what was found, as records.

Margins stand in the profile and are declared before anything is measured; their hash goes into the
result. Judged in `verdict`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from edgekd.records.store import Record

State = Literal["invalid", "fail", "inconclusive", "pass"]
STATES: tuple[State, ...] = ("invalid", "fail", "inconclusive", "pass")  # the worst first
Step = Literal["distillation", "quantisation"]

# Margins that an earlier edgekd did not have, the latest first.
LATER = (
    {"student_accuracy_pt", "student_faithfulness", "student_localisation"},
    {"elsewhere", "elsewhere_lesion"},
)


def worst(states: Sequence[State]) -> State:
    """Of several: invalid, fail, inconclusive, pass."""
    return min(states, key=STATES.index)


def held(low: float, high: float, margin: float, *, least: bool) -> State:
    """Pass if the whole interval is on the right side of the margin, fail if on the wrong one."""
    near, far = (low, high) if least else (-high, -low)
    limit = margin if least else -margin
    return "pass" if near >= limit else "fail" if far < limit else "inconclusive"


class Margins(Record):
    """What is asked of explanations: engineering defaults, to be justified by the risk file.

    A bound of the 95 % interval has to keep each, not the value alone. Those that begin with
    student_ or shared_ are of the step from teacher to student, where weights are not the same:
    they lie between students made with default settings and planted ones (benchmarks/chain.py). On
    100 images honest students reached shared_kappa 0.66 and 0.76 on phantoms; 0.56 a student from
    the same ImageNet weights that never met the teacher, and 0.51 one that was taught through other
    images' masks.
    """

    images: int = Field(default=100, ge=4)  # of the test split, by class; more decide more
    accuracy_pt: float = Field(default=2.0, ge=0)  # points of balanced accuracy that may be lost
    answers: float = Field(default=0.9, ge=0, le=1)  # share of test images answered alike
    kappa: float = Field(default=0.8, le=1)  # 0: as alike as strangers' maps, 1: the same map
    identification: float = Field(default=0.95, ge=0, le=1)  # own image's map before a stranger's
    lost: float = Field(default=0.25, ge=0, le=1)  # share of maps that could be a stranger's
    shared_kappa: float = Field(default=0.55, le=1)  # of student and teacher through the same masks
    shared_identification: float = Field(default=0.8, ge=0, le=1)
    shared_lost: float = Field(default=0.6, ge=0, le=1)
    faithfulness: float = Field(default=0.05, ge=0)  # insertion - deletion that may be lost
    localisation: float = Field(default=0.25, ge=0)  # share of energy inside masks that may be lost
    student_accuracy_pt: float = Field(default=5.0, ge=0)  # three of a student, by its teacher
    student_faithfulness: float = Field(default=0.15, ge=0)
    student_localisation: float = Field(default=0.4, ge=0)
    shortcut: float = Field(default=0.05, ge=0, le=1)  # what a marker may move the answer
    shortcut_more: float = Field(default=0.02, ge=0, le=1)  # beyond the reference, if that is more
    elsewhere: float = Field(default=0.4, ge=0, le=1)  # surviving without organ, beyond chance
    elsewhere_lesion: float = Field(
        default=0.8, ge=0, le=1
    )  # without the lesion: the organ is left
    undefined: float = Field(default=0.05, ge=0, le=1)  # share of images without a map
    repeatable: float = Field(default=0.5, le=1)  # kappa of maps with those of the image rounded
    reference_accuracy: float = Field(default=0.6, ge=0, le=1)  # balanced; worse explains nothing

    @property
    def sha256(self) -> str:
        """Of the margins as JSON: another one is another declaration."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def declared_as(self, said: str) -> bool:
        """Whether `said` is their hash, or was before there were some of them."""
        found, absent = {self.sha256}, set[str]()
        for added in LATER:
            absent |= added
            before = self.model_dump_json(exclude=absent)
            found.add(hashlib.sha256(before.encode()).hexdigest())
        return said in found


class Gate(Record):
    """One thing that was asked, what was found, and whether it holds."""

    name: str  # "kappa"
    what: str  # in words
    state: State
    value: float
    low: float
    high: float
    margin: float
    least: bool  # True: at least the margin is asked; False: at most
    needed: int | None = None  # images that would decide, if the value stays as it is


class Verdict(Record):
    """Of one step of compression: from `reference` to the file that the comparison is of."""

    step: Step
    reference: str  # name of what was compressed: "student fp32"
    state: State
    sentence: str  # what was found, for a reader who reads nothing else
    gates: tuple[Gate, ...]
    remedies: tuple[str, ...] = ()  # what to try, in this order; empty unless it failed

    @property
    def missed(self) -> tuple[Gate, ...]:
        """The gates that decided, unless all held."""
        return tuple(g for g in self.gates if g.state == self.state != "pass")
