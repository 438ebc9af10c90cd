"""How good a model's answers are, as records: what an artifact says of itself.

Computed in `evaluation`. Every interval is a bootstrap 95 % interval that draws whole groups.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgekd.records.store import Record


class Metric(Record):
    """A number with its bootstrap 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Threshold(Record):
    """From what probability on a class is called present, the others being the rest."""

    probability: float = Field(ge=0, le=1)  # calibrated
    val_sensitivity: float  # on the validation split, where it was chosen
    val_specificity: float


class Calibration(Record):
    """How logits become probabilities and calls; fitted on the validation split, used everywhere.

    A file made from another inherits it until it is fitted on that file's own answers.
    """

    temperature: float = Field(gt=0)  # probabilities are softmax(logits / temperature)
    method: Literal["nll", "nll-smoothed"]  # see calibration.fit_temperature
    sensitivity: float | None = None  # wanted of each class; None: Youden's J
    thresholds: dict[str, Threshold]  # of each class

    @property
    def aim(self) -> str:
        """What the thresholds were chosen for, in words."""
        return "Youden's J" if self.sensitivity is None else f"sensitivity {self.sensitivity:g}"


class Bin(Record):
    """A bar of a reliability diagram: images of confidence in (low, high]."""

    low: float
    high: float
    images: int
    confidence: float  # mean
    accuracy: float  # share that is answered right


class Part(Record):
    """Figures of a part of the images: those of one subgroup, or one class against the rest."""

    images: int
    groups: int  # patients
    metrics: dict[str, Metric]  # what is undefined for this part is left out


class Paired(Record):
    """Two models on the same images: positive differences mean that this one's figure is higher."""

    against: str  # its model
    sha256: str  # of its file
    images: int
    groups: int
    only_this_right: int  # images that this model answers right and the other wrong
    only_other_right: int
    mcnemar_p: float  # mid-p, two-sided; takes images as independent
    differences: dict[str, Metric]  # this less the other, drawn in pairs


class Evaluation(Record):
    """All that the test split says of a model, beside the figures in `Artifact.metrics`."""

    images: int
    groups: int
    bins: int  # of ECE, equally wide
    confusion: tuple[tuple[int, ...], ...]  # a row for each true class, a column for each answer
    classes: dict[str, Part]  # recall, precision, f1, auroc; sensitivity, specificity at threshold
    subgroups: dict[str, Part] = {}
    reliability: tuple[Bin, ...]  # of the calibrated probabilities; bins without images left out
    reliability_uncalibrated: tuple[Bin, ...]
    paired: dict[str, Paired] = {}  # "teacher fp32" -> this model beside that one
    answers_sha256: str  # of the file with the logits, beside the record
