"""Does the whole line hold on real images? Teacher, student, INT8, and a student taught alone.

    python benchmarks/line.py [--quick] [--data DIR] [--runs DIR]

Runs the very commands of the README, one process each, and a control: the same student for the same
number of steps without its teacher. About 45 minutes on 2 cores; --quick (one epoch, 64 pixels)
shows that it works and writes no result file. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

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

from edgekd.data.dataset import open_dataset
from edgekd.metrics.latency import percentiles
from edgekd.pipeline.folders import RunRecord
from edgekd.records import Artifact, Fidelity, Timing

STUDENT = ["--student", "cpu_lat@10ms", "--epochs", 24, "--lr", 0.003, *FLIP]


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
        "teacher": Path(RunRecord.load(runs / "cpu").teacher),
        "student": runs / "cpu" / "student",
        "student_alone": runs / "alone" / "student",
    }
    return {name: minutes(folder, images) for name, folder in folders.items()}


def figures(runs: Path) -> tuple[dict[str, float], list[dict[str, object]]]:
    """(figures, table) read from the files that the commands wrote."""
    main = runs / "cpu"
    teacher = Artifact.load(Path(RunRecord.load(main).teacher))
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
            "pearson": case.get("teacher_pearson", case["pearson"]).model_dump(),
            "enrichment": case["enrichment"].model_dump(),
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
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    data = data_folder(given.data, "brain_tumor_mri")
    runs = given.runs or RUNS / ("line-quick" if given.quick else "line")
    took = line(data, runs, given.quick)
    found, table = figures(runs)
    keep(
        "line", found, table,
        packages=("torch", "timm", "openvino", "nncf", "onnxruntime"), quick=given.quick,
        data="brain_tumor_mri",
        seconds={k: round(v, 1) for k, v in took.items()},  # near zero: it was done before
        training_minutes={k: round(v, 1) for k, v in training_minutes(data, runs).items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
