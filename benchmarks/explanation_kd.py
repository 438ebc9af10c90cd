"""Does a student inherit its teacher's explanations, and what does it cost?

    python benchmarks/explanation_kd.py [--quick] [--runs DIR] [--sets NAME ...] [--nets NAME ...]
                                        [--seeds N] [--weight W]

Plain distillation against masked distillation (`--set masked=W`) at equal epochs, from one teacher
(EfficientNet-Lite0 from ImageNet): a student of the lite space from the same weights, and one of
OFA's MobileNetV3 space from scratch, both at default settings; on synthetic chests, MRI slices and
children's chest films, at 96 pixels. `edgekd explain` compares teacher and student on test images:
answers under the same masks, and the students' own maps. An epoch's time is the median over epochs,
of trainings that take turns. Rows of students that are not asked for stay in the result. Twenty
minutes for each student and seed on 2 cores; interrupted, it goes on where it stopped.
--quick (phantoms, lite, one epoch, 8 images) keeps nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from workbench import (
    FLIP,
    RUNS,
    STUDENTS,
    TEACHER,
    arguments,
    data_folder,
    edgekd,
    keep,
    lite0_weights,
    result_of,
)

from edgekd import data
from edgekd.data import phantom
from edgekd.metrics import evaluation, paired
from edgekd.metrics.calibration import log_softmax
from edgekd.pipeline import folders
from edgekd.records import Artifact, Comparison, Fidelity

SETS = ("phantoms", "brain_tumor_mri", "cxr_pneumonia")
START = ["--start", "tf_efficientnet_lite0", "--start-weights", lite0_weights()]
NETS = {"lite": (START, 12), "mbv3": ([], 30)}  # name -> (what it starts from, epochs): defaults
WAYS = ("plain", "masked")
IMAGES = 100


def compared(
    name: str, net: str, root: Path, seed: int, weight: float, quick: bool
) -> dict[str, Any]:
    """One student of one seed, distilled in both ways and explained."""
    if name == "phantoms":
        place = phantom.make(root / "phantoms", per_class=24 if quick else 360, size=96)
    else:
        place = data_folder(None, name)
    at = ["--data", place, "--runs", root, "--size", 48 if quick else 96]
    flip = [] if name != "brain_tumor_mri" else FLIP
    less = ["--epochs", 1] if quick else []
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *at, *TEACHER[:4], *flip,
           *less)  # fmt: skip
    dataset = data.open_dataset(place)
    (guide,) = folders.shared(root, dataset).glob("teacher-*")
    how, epochs = NETS[net]
    row: dict[str, Any] = {"set": name, "net": net, "seed": seed, "weight": weight}
    made: dict[str, Artifact] = {}
    for way in WAYS:
        folder = root / f"{name}-{net}-{way}-{seed}"
        masked = ["--set", f"masked={weight if way == 'masked' else 0}"]
        edgekd("distill", *at, "--teacher", guide, "--student", STUDENTS[net], *how, "--epochs",
               epochs, *flip, *masked, *less, "--seed", seed, "--run", folder)  # fmt: skip
        edgekd("explain", "--images", 8 if quick else IMAGES, "--runs", root, "--run", folder)
        made[way] = Artifact.load(folder / "student")
        row[way] = figures(Fidelity.load(folder / "explain"), made[way], folder)
    row["accuracy_gain_pt"] = gain(made["masked"], made["plain"], dataset)
    row["epoch_cost"] = row["masked"]["epoch_s"] / row["plain"]["epoch_s"]
    return row


def figures(found: Fidelity, student: Artifact, folder: Path) -> dict[str, Any]:
    """What is told of a student beside its teacher."""
    teacher, own = found.comparisons
    log = [
        json.loads(x) for x in (folder / "student" / "log.jsonl").read_text("utf-8").splitlines()
    ]
    told = {k: [a.value, a.low, a.high] for k, a in own.aggregate.items()}
    told |= {k: [a.value, a.low, a.high] for k, a in own.checks.items()
             if k in ("faithful", "random_head", "repeatable")}  # fmt: skip
    return {
        "accuracy": student.metrics["test_balanced_accuracy"].value,
        "verdict": found.verdict,
        "missed": [g.name for g in own.verdict.missed] if own.verdict else [],
        "layer": own.layer,
        "epoch_s": float(np.median([1 / e["images_per_s"] for e in log])),
        "energy_over_teacher": over(own, teacher, "energy"),
        "hit": told.get("hit"),
        "teacher_hit": [teacher.aggregate["hit"].value] if "hit" in teacher.aggregate else None,
        **told,
    }


def over(own: Comparison, teacher: Comparison, key: str) -> float | None:
    """A figure of the student's maps over that of the teacher's; None without masks."""
    if key not in own.aggregate or not teacher.aggregate[key].value:
        return None
    return own.aggregate[key].value / teacher.aggregate[key].value


def gain(masked: Artifact, plain: Artifact, dataset: data.Dataset) -> list[float]:
    """[mean, low, high] points of balanced accuracy of masked over plain, of the same images."""
    truth = evaluation.truth(dataset.splits["test"])
    both = [evaluation.answers(a, "test", truth.images) for a in (masked, plain)]
    a, b = (log_softmax(x, m.temperature) for x, m in zip(both, (masked, plain), strict=True))
    told = paired.compare(a, b, truth.labels, truth.groups, plain).differences["balanced_accuracy"]
    return [100 * (x or 0.0) for x in (told.value, told.low, told.high)]


def sum_up(rows: list[dict[str, Any]], quick: bool) -> None:
    """The worst set's means over seeds, and what masking costs."""

    def worst(way: str, key: str, pick: Any = min) -> float:
        by_set: dict[str, list[float]] = {}
        for r in rows:
            if (value := r[way].get(key)) is not None:
                by_set.setdefault(f"{r['set']} {r['net']}", []).append(
                    value[0] if isinstance(value, list) else value
                )
        return float(pick(np.mean(v) for v in by_set.values())) if by_set else float("nan")

    found = {
        "kappa_plain": worst("plain", "shared_kappa"),
        "kappa_masked": worst("masked", "shared_kappa"),
        "own_kappa_plain": worst("plain", "kappa"),
        "own_kappa_masked": worst("masked", "kappa"),
        "identification_masked": worst("masked", "shared_identification"),
        "lost_masked": worst("masked", "shared_lost", max),
        "accuracy_gain_pt": float(np.mean([r["accuracy_gain_pt"][0] for r in rows])),
        "accuracy_gain_low_pt": float(min(r["accuracy_gain_pt"][1] for r in rows)),
        "energy_over_teacher": worst("masked", "energy_over_teacher"),
        "epoch_cost": float(np.median([r["epoch_cost"] for r in rows])),
        "students": len(rows),
    }
    keep("explanation_kd", found, rows, packages=("torch", "timm", "onnxruntime", "openvino"),
         quick=quick)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weight", type=float, default=3.0)
    given = parser.parse_args()
    root = given.runs or RUNS / ("explanation-kd-quick" if given.quick else "explanation-kd")
    asked = [(s, n, k) for k in range(given.seeds) for n in given.nets for s in given.sets]
    asked = asked[:1] if given.quick else asked
    old = result_of("explanation_kd")
    kept = json.loads(old.read_text("utf-8"))["table"] if old.exists() and not given.quick else []
    rows = [r for r in kept if (r["set"], r["net"], r["seed"]) not in asked]
    for name, net, seed in asked:
        rows.append(compared(name, net, root, seed, given.weight, given.quick))
        sum_up(rows, given.quick)


if __name__ == "__main__":
    main()
