"""Do the papers' claims hold on real images? A teacher, a student alone, the same one distilled.

    python benchmarks/papers.py [--quick] [--data DIR] [--runs DIR] [--sets NAME ...] [--seeds N]

For each of three sets: EfficientNet-Lite0 with ImageNet weights as the teacher (the papers' own
would need weights that are not at hand), the middle sub-net of `ofa-lite-w1.0` alone and distilled,
as many steps each, N seeds; parameters, MACs, latency, and the time to explain one image, teacher
against student. Runs the commands of the README, one process each. About an hour a set on 2 cores;
interrupted, it goes on where it stopped. --quick (one epoch, 64 pixels, one seed) writes no file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path

import numpy as np
from line import HERE, TEACHER, edgekd, lite0_weights

from edgekd.bench import machine, percentiles
from edgekd.records import Artifact, Fidelity, Timing, make_folder, versions, write_atomic

SETS = {  # name -> what may be mirrored in it, and how long a student learns
    "brain_tumor_mri": (["--set", "hflip=true"], 20),
    "lc25000_subset": (["--set", "hflip=true", "--set", "vflip=true"], 12),
    "cxr_pneumonia": ([], 30),
}
KEY = "test_balanced_accuracy"
VGG19_MACS_128 = 6_395_000_000  # timm's vgg19 at 128 px, convolutions and linear layers


def commands(data: Path, runs: Path, name: str, seeds: int, quick: bool) -> None:
    """Everything that is trained and measured of one set."""
    flip, epochs = SETS[name]
    at = ["--data", data, "--runs", runs, "--size", 64 if quick else 128]
    epochs = 1 if quick else epochs
    teacher = ["--epochs", 1] if quick else [*TEACHER[:4], *flip]
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *at, *teacher)
    student = ["--student", "ofa-lite-w1.0:mid", "--epochs", epochs, "--lr", 0.003, *flip]
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


def figures(runs: Path, name: str, seeds: int) -> tuple[dict[str, float], dict[str, object]]:
    """(figures, row) of one set."""
    (guide,) = runs.glob("shared/*/teacher-*")
    teacher = Artifact.load(guide)
    made = {kind: [Artifact.load(runs / f"{kind}-{s}" / "student") for s in range(seeds)]
            for kind in ("alone", "distilled")}  # fmt: skip
    reached = {k: [a.metrics[KEY].value for a in v] for k, v in made.items()}
    student = made["distilled"][0]
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
        "spread": {k: float(np.std(v)) for k, v in reached.items()},
        "params": {"teacher": teacher.params, "student": student.params},
        "macs": {"teacher": teacher.macs, "student": student.macs,
                 "vgg19_over_student": VGG19_MACS_128 / student.macs},
        "p50_ms": {f"{t.role} {t.precision}": percentiles(t.samples_ms)["p50"] for t in timings},
        "seconds_per_map": seconds, "split_rule": teacher.split_rule,
    }  # fmt: skip
    return found, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    shared = given.data or Path(os.environ.get("EDGEKD_DATA", HERE.parents[1] / "shared" / "data"))
    seeds = 1 if given.quick else given.seeds
    found: dict[str, float] = {}
    rows = []
    for name in given.sets:
        if not (shared / name).is_dir():
            print(f"skipped: no {shared / name}; set EDGEKD_DATA or give --data")
            continue
        runs = (given.runs or HERE.parent / "runs" / "papers") / name
        commands(shared / name, runs, name, seeds, given.quick)
        of_set, row = figures(runs, name, seeds)
        found |= of_set
        rows.append(row)
    here = machine()
    result = {
        "question": "papers",
        "machine": here.model_dump(),
        "versions": versions("torch", "timm", "openvino", "nncf"),
        "date": datetime.date.today().isoformat(),
        "seeds": seeds,
        "figures": {k: round(v, 4) for k, v in found.items()},
        "table": rows,
    }
    print(json.dumps(result, indent=1))
    if rows and not given.quick:
        path = make_folder(HERE / "results") / f"papers-{here.name}.json"
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
