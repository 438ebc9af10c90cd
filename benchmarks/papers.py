"""Do the papers' claims hold on real images? A teacher, a student alone, the same one distilled.

    python benchmarks/papers.py [--quick] [--data DIR] [--runs DIR] [--sets NAME ...] [--seeds N]

For each of three sets: EfficientNet-Lite0 with ImageNet weights as the teacher (the papers' own
would need weights that are not at hand); the middle sub-net of `ofa-lite-w1.0`, cut from the same
ImageNet weights, alone and distilled, as many steps each, N seeds; parameters, MACs, latency, and
the time to explain one image, teacher against student. Runs the commands of the README, one process
each. About two hours on 2 cores; interrupted, it goes on where it stopped. --quick (one epoch, 64
pixels, one seed) writes no file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from workbench import FLIP, RUNS, TEACHER, arguments, data_folder, edgekd, keep, lite0_weights

from edgekd.data.dataset import open_dataset
from edgekd.metrics import evaluation, paired
from edgekd.metrics.calibration import log_softmax
from edgekd.metrics.latency import percentiles
from edgekd.models import zoo
from edgekd.records import Artifact, Fidelity, Metric, Timing

SETS = {  # name -> what may be mirrored in it, and epochs of a student
    "brain_tumor_mri": (FLIP, 12),
    "lc25000_subset": ([*FLIP, "--set", "vflip=true"], 8),
    "cxr_pneumonia": ([], 8),
}
KEY = "test_balanced_accuracy"


def commands(data: Path, runs: Path, name: str, seeds: int, quick: bool) -> None:
    """Everything that is trained and measured of one set."""
    flip, epochs = SETS[name]
    at = ["--data", data, "--runs", runs, "--size", 64 if quick else 128]
    epochs = 1 if quick else epochs
    teacher = ["--epochs", 1] if quick else [*TEACHER[:4], *flip]
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *at, *teacher)
    student = ["--student", "ofa-lite-w1.0:mid", "--start", "tf_efficientnet_lite0",
               "--start-weights", lite0_weights(), "--epochs", epochs, "--lr", 0.001,
               *flip]  # fmt: skip
    (guide,) = runs.glob("shared/*/teacher-*")
    for seed in range(seeds):
        for kind in ("alone", "distilled"):
            soft = ["--no-teacher"] if kind == "alone" else ["--teacher", guide]
            run = ["--run", runs / f"{kind}-{seed}"]
            edgekd("distill", "-p", "cpu", *at, *student, *soft, "--seed", seed, *run)
    last = ["--run", runs / "distilled-0"]
    edgekd("quantize", *last)
    edgekd("bench", *last)
    edgekd("explain", "--images", 8 if quick else 24, *last)


def gain(distilled: list[Artifact], alone: list[Artifact], data: Path) -> Metric:
    """Balanced accuracy of distilled less alone, mean of the seeds; its interval draws patients."""
    truth = evaluation.truth(open_dataset(data).splits["test"])

    def log_p(made: list[Artifact]) -> np.ndarray:
        said = [evaluation.answers(a, "test", truth.images) for a in made]
        if any(x is None for x in said):
            raise SystemExit(f"{data} is not what {made[0].folder} was tested on")
        return np.concatenate([log_softmax(x) for x in said])

    seeds = len(alone)
    found = paired.compare(
        log_p(distilled), log_p(alone), np.tile(truth.labels, seeds), [*truth.groups] * seeds,
        alone[0],
    )  # fmt: skip
    return found.differences["balanced_accuracy"]


def figures(
    runs: Path, data: Path, name: str, seeds: int
) -> tuple[dict[str, float], dict[str, object]]:
    """(figures, row) of one set."""
    (guide,) = runs.glob("shared/*/teacher-*")
    teacher = Artifact.load(guide)
    made = {kind: [Artifact.load(runs / f"{kind}-{s}" / "student") for s in range(seeds)]
            for kind in ("alone", "distilled")}  # fmt: skip
    reached = {k: [a.metrics[KEY].value for a in v] for k, v in made.items()}
    student = made["distilled"][0]
    vgg19 = zoo.classifier("vgg19", len(teacher.spec.classes))
    _, vgg19_macs = zoo.count(vgg19, teacher.spec.size)
    fidelity = Fidelity.load(runs / "distilled-0" / "explain")
    seconds = {c.name: c.seconds_per_map for c in fidelity.comparisons}
    timings = [Timing.load(p.parent) for p in sorted(runs.glob("distilled-0/bench/*/timing.json"))]
    found = {
        f"{name}_teacher": teacher.metrics[KEY].value,
        f"{name}_alone": float(np.mean(reached["alone"])),
        f"{name}_distilled": float(np.mean(reached["distilled"])),
        f"{name}_explain_ratio": seconds["teacher fp32"] / seconds["student fp32"],
    }
    row = {
        "set": name, "teacher": teacher.metrics[KEY].model_dump(), **reached,
        "gain": gain(made["distilled"], made["alone"], data).model_dump(),
        "spread": {k: float(np.std(v)) for k, v in reached.items()},
        "params": {"teacher": teacher.params, "student": student.params},
        "macs": {"teacher": teacher.macs, "student": student.macs,
                 "vgg19_over_student": vgg19_macs / student.macs},
        "p50_ms": {f"{t.role} {t.precision}": percentiles(t.samples_ms)["p50"] for t in timings},
        "seconds_per_map": seconds, "split_rule": teacher.split_rule,
    }  # fmt: skip
    return found, row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    seeds = 1 if given.quick else given.seeds
    found: dict[str, float] = {}
    rows = []
    for name in given.sets:
        data = data_folder(given.data and given.data / name, name)
        runs = (given.runs or RUNS / "papers") / name
        commands(data, runs, name, seeds, given.quick)
        of_set, row = figures(runs, data, name, seeds)
        found |= of_set
        rows.append(row)
    keep(
        "papers", found, rows,
        packages=("torch", "timm", "openvino", "nncf"), quick=given.quick, seeds=seeds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
