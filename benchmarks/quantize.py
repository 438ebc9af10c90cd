"""Which precision and engine wins in which runtime, what does it cost, and does `auto` find it?

    python benchmarks/quantize.py [--quick] [--data DIR] [--runs DIR] [--nets NAME ...]

Three networks distilled from EfficientNet-Lite0 on real MRI slices: OFA-595 (h-swish, squeeze and
excitation), a sub-net of the lite space (relu6), and timm's MobileNetV3-Large. Each in FP32, BF16
and INT8 by every engine, in OpenVINO and in ONNX Runtime, each file in a process of its own, timed
in turns and compared turn by turn. Accuracy is of the test split: FP32's, that of the quantised
graph computed in FP32 (fake-quant), and that of the deployed file as it runs. `auto` chose before,
by the validation split and a timing of its own; its regret is what it is slower, in this run, than
the fastest file that it was allowed to take. It chose twice, by successive halving and
exhaustively, each time from the FP32 file alone and in a folder of its own: the seconds of either,
with making the files, and whether they chose alike. About two hours on 2 cores, most of it for
training; interrupted, it goes on where it stopped. --quick (one epoch, 64 pixels, one network)
writes no result file.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from workbench import FLIP, RUNS, TEACHER, arguments, data_folder, edgekd, keep, lite0_weights

import edgekd as api
from edgekd import data, runtimes
from edgekd.bench import bench
from edgekd.data import preprocess
from edgekd.metrics.classification import answers
from edgekd.metrics.latency import percentiles, ratio
from edgekd.pipeline.export import CANDIDATES
from edgekd.pipeline.folders import RunRecord
from edgekd.quantize import candidates
from edgekd.quantize.choice import Choice
from edgekd.records import Artifact, Profile, write_atomic

NETS = {  # name -> how it is trained
    "ofa595": ["--student", "ofa-595", "--epochs", 20, "--lr", 0.003],
    "lite": ["--student", "ofa-lite-w1.0:mid", "--start", "tf_efficientnet_lite0", "--epochs", 6,
             "--lr", 0.001],
    "mobilenetv3": ["--student", "mobilenetv3_large_100", "--epochs", 20, "--lr", 0.003],
}  # fmt: skip
PROFILES = {  # runtime -> what a file may be
    "openvino": Profile(name="openvino", runtime="openvino", device="CPU",
                        precisions=("int8", "bf16", "fp32")),
    "onnxruntime": Profile(name="onnxruntime", runtime="onnxruntime", device="CPU",
                           precisions=("int8", "fp32")),
}  # fmt: skip
ROUNDS, SECONDS = 5, 3.0  # processes that time a file, and how long each
IMAGES = 300  # that calibrate, as `edgekd quantize` has it
EXHAUSTIVE = "candidates-exhaustive"  # folder of the other choice; CANDIDATES has the usual one
TOOK = "seconds.json"


class Split(NamedTuple):
    """The test split as one network sees it."""

    images: np.ndarray  # (N, 3, H, W) float32
    labels: np.ndarray  # (N,)
    names: list[str]


def balanced(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall of the classes."""
    said = logits.argmax(1)
    return float(np.mean([(said[labels == c] == c).mean() for c in np.unique(labels)]))


def fake_quantised(artifact: Artifact, profile: Profile, split: Split) -> np.ndarray:
    """(N, K) logits of the quantised graph with every operator computed in FP32."""
    if artifact.path.suffix == ".onnx":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(artifact.path, options, providers=["CPUExecutionProvider"])
        parts = np.array_split(split.images, -(-len(split.images) // 16))
        return np.concatenate([session.run(["logits"], {"image": x})[0] for x in parts])
    # Without these passes OpenVINO rounds as the graph says and computes in FP32.
    rounded = profile.model_copy(update={"options": {"LP_TRANSFORMS_MODE": "NO"}})
    return answers(runtimes.open_session(artifact, rounded), split.images)


def trained(data_path: Path, runs: Path, net: str, quick: bool) -> None:
    """The network, distilled once, as a run for each runtime."""
    at = ["--data", data_path, "--runs", runs, "--size", 64 if quick else 128]
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *at, *TEACHER,
           *(["--epochs", 1] if quick else []))  # fmt: skip
    (guide,) = runs.glob("shared/*/teacher-*")
    how = [*NETS[net], *(["--epochs", 1] if quick else [])]
    more = ["--start-weights", lite0_weights()] if "--start" in how else []
    first = runs / f"{net}-openvino"
    if not (first / "student" / Artifact.FILE).exists():  # a finished one has its own profile
        edgekd("distill", "-p", "cpu", *at, "--teacher", guide, *how, *more, *FLIP, "--run", first)
    for runtime, profile in PROFILES.items():
        own = runs / f"{net}-{runtime}"
        if not (own / "student" / Artifact.FILE).exists():
            shutil.copytree(first / "student", own / "student")
        RunRecord.load(first).model_copy(update={"profile": profile}).save(own)


def choose(folder: Path, modes: Sequence[str], max_drop: float) -> dict[str, float]:
    """Seconds that each choice took in the run in `folder`; one that was made is not made again."""
    run = api.Run.open(folder)
    dataset = run.dataset()
    source = run.student_onnx(dataset)
    took = {}
    for mode in modes:
        out = folder / mode
        if not ((out / Choice.FILE).exists() and (out / TOOK).exists()):
            shutil.rmtree(out, ignore_errors=True)
            began = time.perf_counter()
            candidates.choose(
                source, dataset, run.record.profile, out, images=IMAGES, max_drop=max_drop,
                exhaustive=mode == EXHAUSTIVE, seed=run.record.seed,
            )  # fmt: skip
            write_atomic(out / TOOK, json.dumps(time.perf_counter() - began))
        took[mode] = json.loads((out / TOOK).read_text("utf-8"))
        print(f"{folder.name}/{mode}: {took[mode]:.0f} s", flush=True)
    return took


def measured(
    runs: Path, net: str, runtime: str, split: Split, took: dict[str, float]
) -> list[dict[str, Any]]:
    """One row a candidate: size, three accuracies, flips, agreement, latency; and the choices."""
    folders = [runs / f"{net}-{runtime}" / mode for mode in (CANDIDATES, EXHAUSTIVE)]
    usual, full = map(Choice.load, folders)
    profile = PROFILES[runtime]
    made = {
        c.name: Artifact.load(folder / c.name)
        for folder, choice in zip(folders[::-1], (full, usual), strict=True)
        for c in choice.candidates
        if c.artifact_sha256
    }
    exhaustive = {c.name: c for c in full.candidates}
    both = {c.name: c for c in (*full.candidates, *usual.candidates)}
    rounds = bench.in_rounds(
        [bench.Runner(a, profile, True) for a in made.values()], bench.short(SECONDS),
        rounds=ROUNDS, seed=1,
    )  # fmt: skip
    timed = dict(zip(made, map(bench.joined, rounds), strict=True))
    ms = {name: percentiles(t.samples_ms) for name, t in timed.items()}
    turns = {name: t.block_medians_ms for name, t in timed.items()}
    times = {name: ratio(own, turns["fp32"]) for name, own in turns.items()}
    logits = {n: answers(runtimes.open_session(a, profile), split.images) for n, a in made.items()}
    rows = []
    for c in both.values():
        other = exhaustive.get(c.name)
        row: dict[str, Any] = {
            "net": net, "runtime": runtime, "candidate": c.name, "state": c.state,
            "reason": c.reason, "out_at": c.out_at, "turns": c.turns,
            "exhaustive": other and other.state, "choice_s": took[CANDIDATES],
            "choice_s_exhaustive": took[EXHAUSTIVE],
        }  # fmt: skip
        if c.name in made:
            flips = np.flatnonzero(logits[c.name].argmax(1) != logits["fp32"].argmax(1))
            fake = fake_quantised(made[c.name], profile, split) if c.precision == "int8" else None
            row |= {
                "size_bytes": made[c.name].size_bytes,
                "fp32": balanced(logits["fp32"], split.labels),
                "fake_quant": None if fake is None else balanced(fake, split.labels),
                "deployed": balanced(logits[c.name], split.labels),
                "flips": len(flips), "flipped": [split.names[i] for i in flips],
                "agreement": other.agreement if other else c.agreement, "p50_ms": ms[c.name]["p50"],
                "p95_ms": ms[c.name]["p95"], "times": times[c.name],
                "turns_ms": [round(x, 4) for x in turns[c.name]],
            }  # fmt: skip
        rows.append(row)
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Regret of each choice, what it took beside the exhaustive one, what INT8 brings and costs."""
    found: dict[str, float] = {}
    regrets, over_fp32, alike = [], [], []
    seconds = {"choice_s": 0.0, "choice_s_exhaustive": 0.0}
    for net, runtime in dict.fromkeys((r["net"], r["runtime"]) for r in rows):
        own = [r for r in rows if (r["net"], r["runtime"]) == (net, runtime) and "p50_ms" in r]
        chosen = next(r for r in own if r["state"] == "chosen")
        allowed = ("chosen", "slower", "no faster")  # told by the one that explained them all
        best = min(r["times"] for r in own if r["exhaustive"] in allowed)
        alike.append(chosen["exhaustive"] == "chosen")
        for key in seconds:
            seconds[key] += own[0][key]
        regrets.append(chosen["times"] / best - 1)
        over_fp32.append(chosen["times"])
        small = [r for r in own if r["candidate"].startswith("int8")]
        if small and runtime == "openvino":
            fastest = min(small, key=lambda r: r["times"])
            found[f"int8_speedup_{runtime}_{net}"] = 1 / fastest["times"]
            found[f"int8_drop_pt_{net}"] = 100 * (fastest["fp32"] - fastest["deployed"])
            found[f"flips_{net}"] = fastest["flips"]
    choices = {"choices_alike": sum(alike), "choices": len(alike)} | seconds
    return {"auto_regret": max(regrets), "auto_over_fp32": max(over_fp32)} | choices | found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    given = parser.parse_args()
    folder = data_folder(given.data, "brain_tumor_mri")
    runs = given.runs or RUNS / ("quantize-quick" if given.quick else "quantize")
    nets = given.nets[-1:] if given.quick else given.nets
    samples = data.open_dataset(folder).splits["test"]
    rows = []
    modes = [CANDIDATES, EXHAUSTIVE]  # each as often the first: the machine changes its pace
    for net in nets:
        trained(folder, runs, net, given.quick)
        spec = Artifact.load(runs / f"{net}-openvino" / "onnx").spec
        pixels = data.load_pixels(samples, spec)
        split = Split(preprocess.normalise(pixels, spec), np.array([s.label for s in samples]),
                      [f"{s.path.parent.name}/{s.path.name}" for s in samples])  # fmt: skip
        for runtime in PROFILES:
            modes.reverse()
            took = choose(runs / f"{net}-{runtime}", modes, 100 if given.quick else 1)
            rows += measured(runs, net, runtime, split, took)
    keep(
        "quantize", figures(rows), rows,
        packages=("openvino", "nncf", "onnxruntime", "neural-compressor-pt", "torch"),
        quick=given.quick, data="brain_tumor_mri",
    )  # fmt: skip


if __name__ == "__main__":
    main()
