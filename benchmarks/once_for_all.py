"""Once for all: does one supernet serve three profiles as well as three trainings, and for less?

    python benchmarks/once_for_all.py [--quick] [--data DIR] [--runs DIR]

On real MRI slices: a teacher, one supernet that begins as EfficientNet-Lite0 with ImageNet weights,
a search and a short fine-tuning for each of three profiles. Against them: each chosen Arch trained
alone, from the same ImageNet weights, for as many steps as shrinking and fine-tuning took; and the
same supernet shrunk from scratch. About 80 minutes on 2 cores; --quick (one epoch, 64 pixels, few
sub-nets) shows that it works and writes no result file. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from workbench import (
    FLIP,
    RUNS,
    TEACHER,
    arguments,
    data_folder,
    edgekd,
    keep,
    lite0_weights,
    minutes,
)

from edgekd import data as images
from edgekd.models import zoo
from edgekd.ofa import spaces
from edgekd.ofa.pareto import Front
from edgekd.pipeline.search import Sought
from edgekd.records import Artifact, Training
from edgekd.train import shrink

PROFILES = ("cpu", "jetson", "intel-npu")
SHRINK, TUNE = 8, 2  # epochs
ENDS = ("min", "mid", "max")
KEY = "test_balanced_accuracy"


def commands(data: Path, runs: Path, quick: bool) -> dict[str, Path]:
    """Everything that is trained; the folders of the two supernets."""
    at = ["--data", data, "--runs", runs, *(["--size", 64] if quick else [])]
    size = at if quick else [*at, "--size", 128]
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *size,
           *(["--epochs", 1] if quick else TEACHER))  # fmt: skip
    start = ["--start", "tf_efficientnet_lite0", "--start-weights", lite0_weights()]
    epochs = 1 if quick else SHRINK
    profiles = [x for p in PROFILES for x in ("-p", p)]
    folders = {}
    for name, more in (("warm", [*start, "--lr", 0.001]), ("scratch", ["--lr", 0.003])):
        edgekd("shrink", *profiles, *at, *more, "--epochs", epochs, *FLIP)
        folders[name] = supernet(runs, "tf_efficientnet_lite0" if name == "warm" else "scratch")
    tune = 1 if quick else TUNE
    few = ["--subnets", 24, "--generations", 20] if quick else []
    for p in PROFILES:
        edgekd("search", "-p", p, *at, "--supernet", folders["warm"], *few)
        edgekd("distill", "-p", p, *at, "--supernet", folders["warm"], "--epochs", tune,
               *FLIP)  # fmt: skip
        edgekd("distill", "-p", p, *at, *start, "--student", runs / p / "student",
               "--epochs", epochs + tune, "--lr", 0.001, *FLIP,
               "--run", runs / f"alone-{p}")  # fmt: skip
    return folders


def supernet(runs: Path, start: str) -> Path:
    """The folder of the finished supernet that began as `start`."""
    for folder in sorted((runs / "shared").glob("*/supernet-*")):
        if Artifact.load(folder).settings["start"] == start:
            return folder
    raise SystemExit(f"no supernet from {start} in {runs}")


def ends(folder: Path, dataset: images.Dataset, resolution: int) -> dict[str, float]:
    """Test balanced accuracy of the smallest, middle and largest sub-net as cut."""
    made = Artifact.load(folder)
    net = zoo.load_supernet(made)
    training = Training(**made.settings["training"])
    judge = shrink.judge_of(dataset, made.spec, training, made.seed, split="test")
    return {
        end: judge(net, spaces.uniform(made.model, end, resolution))["balanced_accuracy"]
        for end in ENDS
    }


def figures(
    folders: dict[str, Path], runs: Path, dataset: images.Dataset
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """(figures, table) read from what the commands wrote."""
    count = len(dataset.splits["train"])
    found: dict[str, float] = {}
    for name, folder in folders.items():
        side = Artifact.load(folder).spec.size[0]
        found |= {f"{name}_{e}": v for e, v in ends(folder, dataset, side).items()}
        found[f"shrink_{name}_minutes"] = minutes(folder, count)
    table, alone_minutes, tune_minutes = [], 0.0, 0.0
    for p in PROFILES:
        tuned = Artifact.load(runs / p / "student")
        alone = Artifact.load(runs / f"alone-{p}" / "student")
        sought, front = Sought.load(runs / p / "search"), Front.load(runs / p / "search")
        alone_minutes += minutes(alone.folder, count)
        tune_minutes += minutes(tuned.folder, count)
        table.append({
            "profile": p, "name": tuned.model, "params": tuned.params, "macs": tuned.macs,
            "resolution": tuned.spec.size[0], "estimated": sought.estimated,
            "predicted_p95_ms": next(m.p95_ms for m in front.members
                                     if spaces.title(m.arch) == sought.chosen),
            "cut": tuned.metrics[f"cut_{KEY}"].model_dump(),
            "finetuned": tuned.metrics[KEY].model_dump(),
            "alone": alone.metrics[KEY].model_dump(),
        })  # fmt: skip

    def gap(which: str) -> float:
        return 100 * float(np.mean([r["alone"]["value"] - r[which]["value"] for r in table]))

    found["cut_gap_pt"], found["finetuned_gap_pt"] = gap("cut"), gap("finetuned")
    search = sum(Sought.load(runs / p / "search").seconds for p in PROFILES) / 60
    once = found["shrink_warm_minutes"] + search + tune_minutes
    found |= {"once_minutes": once, "alone_minutes": alone_minutes, "search_minutes": search,
              "tune_minutes": tune_minutes, "cost_ratio": once / alone_minutes}  # fmt: skip
    return found, table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    data = data_folder(given.data, "brain_tumor_mri")
    name = "once_for_all-quick" if given.quick else "once_for_all"
    runs = given.runs or RUNS / name
    folders = commands(data, runs, given.quick)
    found, table = figures(folders, runs, images.open_dataset(data))
    keep(
        "once_for_all", found, table,
        packages=("torch", "timm", "openvino", "nncf", "pymoo"), quick=given.quick,
        data="brain_tumor_mri",
    )  # fmt: skip


if __name__ == "__main__":
    main()
