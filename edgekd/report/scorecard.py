"""The report's part on what the answers are worth: tables and a drawing from the scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edgekd.records import Artifact, Bin, Calibration, Evaluation, Metric, Part
from edgekd.report.drawings import COLOURS, Drawing, figure, svg

PAIRED = {
    "balanced_accuracy": "balanced accuracy",
    "macro_auroc": "macro AUROC",
    "ece": "ECE",
}
SUBGROUP = ("balanced_accuracy", "macro_auroc", "macro_sensitivity", "macro_specificity", "ece")


class Card(NamedTuple):
    """What the template shows of the file to be deployed; empty where there is nothing."""

    name: str
    aim: str  # what the thresholds were chosen for
    temperature: float
    ece: tuple[str, str]  # before, after
    classes: list[tuple[str, list[str]]]  # class, cells
    confusion: list[tuple[str, list[int], int]]  # true class, counts, index of the right one
    subgroups: list[tuple[str, list[str]]]
    pairs: list[tuple[str, list[str]]]  # "a beside b", cells
    clustered: bool  # some patient has several test images
    reliability: Drawing


def of(models: Sequence[tuple[str, Artifact]]) -> Card | None:
    """The card of the last of (name, artifact), paired tests of all; None if it is not judged."""
    name, last = models[-1]
    found, calibration = last.evaluation, last.calibration
    if found is None or calibration is None:
        return None
    ece = (last.metrics.get("test_ece_uncalibrated"), last.metrics.get("test_ece"))
    classes = last.spec.classes
    return Card(
        name=name,
        aim=calibration.aim,
        temperature=calibration.temperature,
        ece=(metric(ece[0]), metric(ece[1])),
        classes=[(c, _class(found.classes[c], calibration, c)) for c in classes],
        confusion=[
            (c, list(row), i)
            for i, (c, row) in enumerate(zip(classes, found.confusion, strict=True))
        ],
        subgroups=[(n, _subgroup(part)) for n, part in found.subgroups.items()],
        pairs=list(_pairs(models)),
        clustered=found.groups < found.images,
        reliability=_reliability(found),
    )


def metric(m: Metric | None, form: str = ".3f") -> str:
    """'0.951 [0.912, 0.979]'; the interval stays on one line."""
    if m is None:
        return "–"
    if m.low is None or m.high is None:
        return f"{m.value:{form}}"
    return f"{m.value:{form}} [{m.low:{form}},\N{NO-BREAK SPACE}{m.high:{form}}]"


def _class(part: Part, calibration: Calibration, name: str) -> list[str]:
    """AUROC; the threshold and what it reached on val; what it reaches on test; images."""
    at = calibration.thresholds[name]
    return [
        metric(part.metrics.get("auroc")),
        f"{at.probability:.3f}",
        f"{at.val_sensitivity:.3f} / {at.val_specificity:.3f}",
        metric(part.metrics.get("sensitivity")),
        metric(part.metrics.get("specificity")),
        str(part.images),
    ]


def _subgroup(part: Part) -> list[str]:
    return [*(metric(part.metrics.get(k)) for k in SUBGROUP), f"{part.images} / {part.groups}"]


def _pairs(models: Sequence[tuple[str, Artifact]]) -> Iterator[tuple[str, list[str]]]:
    """A line for each model and each that it was compared with image by image."""
    for name, artifact in models:
        paired = artifact.evaluation.paired if artifact.evaluation else {}
        for other, p in paired.items():
            counts = [str(p.only_this_right), str(p.only_other_right), f"{p.mcnemar_p:.3g}"]
            yield (
                f"{name} less {other}",
                [
                    *(metric(p.differences.get(key), "+.3f") for key in PAIRED),
                    *counts,
                ],
            )


def _reliability(found: Evaluation) -> Drawing:
    """Accuracy against confidence, before and after calibration, and how many images are where."""
    drawn, axes = figure(4.4, 3.7)
    axes.plot([0, 1], [0, 1], color="#9aa3af", linewidth=1, linestyle="--")
    told = []
    shown = (("before", found.reliability_uncalibrated, COLOURS[0], "s", "none"),
             ("calibrated", found.reliability, COLOURS[1], "o", COLOURS[1]))  # fmt: skip
    for label, bars, colour, marker, face in shown:
        x, y = [b.confidence for b in bars], [b.accuracy for b in bars]
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        axes.scatter(x, y, [_area(b, found.images) for b in bars], marker=marker,
                     facecolors=face, edgecolors=colour, label=label, zorder=3)  # fmt: skip
        told.append(f"{label}: " + ", ".join(
            f"{b.images} images at {b.confidence:.2f} are {b.accuracy:.2f} right" for b in bars
        ))  # fmt: skip
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("confidence: probability of the answer")
    axes.set_ylabel("share that is right")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return svg(drawn), "Reliability. " + "; ".join(told)


def _area(b: Bin, images: int) -> float:
    """Of a bin's mark, in points: its share of the images."""
    return 14 + 160 * b.images / images
