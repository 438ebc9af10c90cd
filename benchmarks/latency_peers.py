"""Is the file that EdgeKD chose faster than what one would deploy without it, and as accurate?

    python benchmarks/latency_peers.py [--quick] [--data DIR] [--runs DIR]

On real MRI slices of 96 pixels: the `cpu` profile's file, distilled from EfficientNet-Lite0 and
quantised (of three sub-nets that a search found, the fastest that gives up at most half a point of
validation as distilled), beside four networks of timm as they are taken today, in OpenVINO (as it
is, which is bfloat16 where the processor has it, and NNCF's defaults) and in ONNX Runtime (FP32,
its static quantisation, and Intel Neural Compressor's, Optimum's and Olive's); and VGG19 in FP32 in
the same runtime, untrained: its speed alone is asked. EfficientNet-Lite0 is fine-tuned from
ImageNet weights, which are at hand and from which the student comes as well; the other three begin
at random, for want of theirs. The teachers are Lite0 at 128 pixels and the peer itself. Student and
peers are trained for about as many epochs, seven or eight.

What one training of a network happens to be worth (some points) is more than what is asked, so the
student and Lite0 are trained three times each, by seeds, and quantised as often; the other three,
which are far behind, once. Accuracies are means over the trainings; the interval of their
difference draws trainings and images. Every file that is timed has a process of its own, in three
rounds; they take turns, call by call, and after two seconds of rest. All students are timed, of
Lite0 the first: the others are the same layers. The best peer is the fastest file whose balanced
accuracy is within a point of the most accurate peer's; as accuracy depends on where a network
begins, the fastest of all is told too. One and a half to three hours on 2 cores, most of it
training, two at a time, half of the cores each; interrupted, it goes on where it stopped.
--quick (two trainings of one epoch, 64 pixels) keeps nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

import elsewhere
import numpy as np
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from peer import CPU, File, answers, in_turns
from workbench import (
    FLIP,
    RUNS,
    TEACHER,
    arguments,
    data_folder,
    edgekd,
    keep,
    lite0_weights,
    untrained,
)

from edgekd import data, runtimes
from edgekd.bench import roofline
from edgekd.data import preprocess
from edgekd.metrics.latency import ratio_interval
from edgekd.models import zoo
from edgekd.pipeline import folders
from edgekd.quantize import ptq
from edgekd.records import Artifact, make_folder
from edgekd.runtimes import machine

PEERS = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "mobilenetv2_120d", "resnet18")
WAYS = ("openvino", "openvino nncf", "ort", "ort static", "ort inc", "ort optimum", "ort olive")
VGG = "vgg19 openvino f32"
FINALISTS = 3  # sub-nets of the front that are distilled, to choose between
GIVE_UP = 0.5  # points of balanced accuracy on the validation split, for the fastest of them
NEAR = 0.01  # of balanced accuracy: what the best peer may give up, being the fastest
# What a teacher says of images that it was trained on is little but their labels; of mixtures of
# them it tells more. On a quarter of the training split's patients, held out from a Lite0 of 96
# pixels: loss 0.61 by labels, 0.67 by a teacher's answers, 0.49 by its answers to mixtures.
MIXED = ["--set", "ask_mixed=true", "--alpha-hard", 0.1, "--temperature", 2]
CALIBRATION = 300
TRAININGS = 3  # of the student and of Lite0
SIDE, LARGER = 96, 128  # pixels: of all files, and of the larger of the two teachers


def commands(place: Path, root: Path, quick: bool, trainings: int) -> None:
    """Everything that is trained: two at a time, but for the search, which measures."""
    side, larger = (64, 80) if quick else (SIDE, LARGER)
    at = ["--data", place, "--runs", root]
    half = max(1, machine.cores() // 2)
    few = ["--subnets", 24, "--generations", 20] if quick else []
    start = ["--start", PEERS[0], "--start-weights", lite0_weights(), "--lr", 0.001]

    def epochs(n: int) -> list[object]:
        return ["--epochs", 1 if quick else n]

    def taught(mixup: float, *teachers: Artifact) -> list[object]:
        who = [x for t in teachers for x in ("--teacher", t.folder)]
        return [*who, *MIXED, "--set", f"mixup={mixup}", *FLIP]

    def teach(pixels: int, seed: int = 0) -> None:
        edgekd("teach", PEERS[0], "--weights", lite0_weights(), *at, "--size", pixels, *epochs(7),
               *TEACHER[2:], "--seed", seed, threads=half)  # fmt: skip

    def shrink() -> None:
        if not list((root / "shared").glob(f"*/supernet-*/{Artifact.FILE}")):
            edgekd("shrink", "-p", "cpu", *at, "--size", side, *start, *epochs(6),
                   *taught(1, lite0(root, larger)), threads=half)  # fmt: skip

    def cut() -> list[object]:
        (net,) = (root / "shared").glob("*/supernet-*")
        return ["-p", "cpu", *at, "--supernet", net, "--size", side]

    def distill(seed: int, threads: int | None = half) -> None:
        run = student(root, seed)
        if not (run / "search").exists():
            shutil.copytree(student(root, 0) / "search", run / "search")
        who = lite0(root, larger), lite0(root, side, seed)  # the peer is the second teacher
        edgekd("distill", *cut(), *few[:2], "--finalists", FINALISTS, "--give-up", GIVE_UP,
               *epochs(8), "--lr", 0.0005, *taught(0.2, *who), "--seed", seed, "--run", run,
               threads=threads)  # fmt: skip

    def alone(name: str) -> None:
        edgekd("distill", "-p", "cpu", *at, "--size", side, "--no-teacher", "--student", name,
               *epochs(8), "--lr", 0.002, "--set", "precision=auto", *FLIP, "--run", root / name,
               threads=half)  # fmt: skip

    def supernet() -> None:
        teach(larger)
        shrink()

    quickest, *others = (partial(alone, name) for name in PEERS[1:])
    seeds = range(trainings)
    together([supernet, *(partial(teach, side, s) for s in seeds), *others])
    edgekd("search", *cut(), *few, "--run", student(root, 0))
    distill(0, threads=None)  # chooses for all seeds
    together([*(partial(distill, s) for s in seeds[1:]), quickest])
    for seed in seeds:
        edgekd("quantize", *(["--max-drop", 100] if quick else []), "--run", student(root, seed))
        edgekd("export", "-f", "openvino", "--run", student(root, seed))


def together(jobs: Sequence[Callable[[], None]]) -> None:
    """All of these, two at a time, the next as soon as one is done."""
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(j) for j in jobs]
        try:
            for job in begun:
                job.result()
        finally:  # of one that failed, the others need not begin
            pool.shutdown(cancel_futures=True)


def student(root: Path, seed: int) -> Path:
    """The run of the student that is trained with this seed."""
    return root / f"chosen-{seed}"


def lite0(root: Path, side: int, seed: int = 0) -> Artifact:
    """EfficientNet-Lite0, as it was fine-tuned at `side` pixels."""
    records = (root / "shared").glob(f"*/teacher-{PEERS[0]}-{side}px-*/{Artifact.FILE}")
    made = [Artifact.load(r.parent) for r in records]
    return next(a for a in made if a.seed == seed)


def plain(waist: zoo.Waist, image: np.ndarray, path: Path) -> None:
    """An ONNX file of one image in and logits out, nothing else."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.waist = waist

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.waist(image)[0]

    make_folder(path.parent)
    torch.onnx.export(Plain().eval(), (torch.from_numpy(image),), str(path), dynamo=True,
                      external_data=False, input_names=["image"],
                      output_names=["logits"])  # fmt: skip


def peer_files(
    made: Artifact, folder: Path, calibration: np.ndarray, dataset: data.Dataset
) -> None:
    """What one would deploy: `plain`, and what each quantiser's defaults make of it."""
    runtimes.get("openvino")  # blocks its telemetry, and NNCF's
    import nncf
    import onnx
    import openvino as ov
    from onnxruntime import quantization as ort

    if (folder / "done").exists():
        return
    fp32 = folder / "fp32.onnx"
    plain(zoo.load(made).eval(), calibration[:1], fp32)
    images = nncf.Dataset([x[None] for x in calibration])
    ov.save_model(nncf.quantize(ov.convert_model(fp32), images), folder / "nncf.xml")

    class Reader(ort.CalibrationDataReader):
        left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.left, None)
            return None if x is None else {"image": x[None]}

    ort.shape_inference.quant_pre_process(str(fp32), str(folder / "ready.onnx"))
    ort.quantize_static(str(folder / "ready.onnx"), str(folder / "static.onnx"), Reader())
    whole = folders.onnx_of(made, folder / "whole", dataset)
    inc = ptq.quantize(whole, calibration, folder / "inc", engine="inc", runtime="onnxruntime")
    one = onnx.load(inc.path)
    make_dim_param_fixed(one.graph, one.graph.input[0].type.tensor_type.shape.dim[0].dim_param, 1)
    onnx.save(onnx.utils.Extractor(one).extract_model(["image"], ["logits"]), folder / "inc.onnx")
    for tool in elsewhere.PACKAGES:
        elsewhere.quantise(tool, folder.parent, fp32, calibration, folder / f"{tool}.onnx")
    (folder / "done").touch()


def files_of(
    root: Path, students: Sequence[Artifact], dataset: data.Dataset
) -> tuple[dict[str, list[File]], dict[str, Artifact]]:
    """(Of each name the files of all its trainings, the record of one of them)."""
    spec = students[0].spec
    few = ptq.pick_calibration(dataset.splits["train"], CALIBRATION, 0)
    calibration = preprocess.normalise(data.load_pixels(few, spec), spec)
    files: dict[str, list[File]] = {"chosen": [(a.folder, "edgekd") for a in students]}
    sizes = {"chosen": students[0]}
    for name in PEERS:
        for seed in range(len(students) if name == PEERS[0] else 1):
            made = (lite0(root, spec.size[0], seed) if name == PEERS[0]
                    else Artifact.load(root / name / "student"))  # fmt: skip
            folder = root / "peers" / (f"{name}-{seed}" if seed else name)
            peer_files(made, folder, calibration, dataset)
            for way in WAYS:
                files.setdefault(f"{name} {way}", []).append((folder, way))
                sizes[f"{name} {way}"] = made
    vgg, sizes[VGG] = untrained("vgg19", spec)
    plain(vgg, calibration[:1], root / "peers" / "vgg19" / "fp32.onnx")
    files[VGG] = [(root / "peers" / "vgg19", "openvino f32")]
    return files, sizes


def found_of(files: dict[str, list[File]], images: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """As `in_turns`, with "logits" of all trainings; the students' rounds as if they were one's."""
    ours = {f"chosen {seed}": file for seed, file in enumerate(files["chosen"])}
    others = {name: each[0] for name, each in files.items() if name != "chosen"}
    said = {n: [answers(n, file, images) for file in files[n][1:]] for n in others}
    found = in_turns(ours | others, images, quick)
    for name in others:
        found[name]["logits"] = [found[name]["logits"], *said[name]]
    each = [found.pop(name) for name in ours]
    whole: dict[str, Any] = {k: [x for e in each for x in e[k]] for k in ("blocks", "rests")}
    whole |= {
        "logits": [e["logits"] for e in each],
        "precision": mode(e["precision"] for e in each),
    }
    return {"chosen": whole} | found


def rows_of(files: dict[str, list[File]], found: dict[str, Any], labels: np.ndarray,
            sizes: dict[str, Artifact]) -> list[dict[str, Any]]:  # fmt: skip
    """A row a file; times as a share of the chosen files', turn by turn."""
    rows = []
    ours = found["chosen"]["blocks"]
    for name, told in found.items():
        rounds = told["blocks"] * (len(ours) // len(told["blocks"]))
        times, low, high = ratio_interval(rounds, ours)
        made, precision = sizes[name], told["precision"]
        right = [] if name == VGG else balanced(right_of(told, labels), labels).tolist()
        rows.append({
            "file": name, "way": files[name][0][1], "precision": precision,
            "balanced_accuracy": float(np.mean(right)) if right else None, "trainings": right,
            "p50_ms": float(np.median(np.concatenate(told["blocks"]))), "times": times,
            "low": low, "high": high, "rest_ms": float(np.median(told["rests"])),
            "macs": made.macs, "moved_bytes": moved_bytes(made, precision),
        })  # fmt: skip
        print(rows[-1])
    return rows


def right_of(told: dict[str, Any], labels: np.ndarray) -> np.ndarray:
    """(trainings, images) bool."""
    return np.array(told["logits"]).argmax(2) == labels


def balanced(right: np.ndarray, labels: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """(trainings,) balanced accuracy; weight: (images,), how often each counts."""
    classes = [labels == k for k in np.unique(labels)]
    each = np.ones(len(labels)) if weight is None else weight
    return np.mean([right[:, k] @ each[k] / each[k].sum() for k in classes], axis=0)


def moved_bytes(made: Artifact, precision: str) -> int:
    """What one image moves at least: weights in this precision, itself and its logits."""
    weights = made.params * {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    height, width = made.spec.size
    return weights + 4 * (3 * height * width + len(made.spec.classes))


def best_of(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(The best peer, the fastest, the most accurate)."""
    peers = [r for r in rows if r["file"] not in ("chosen", VGG)]
    top = max(peers, key=lambda r: r["balanced_accuracy"])
    near = [r for r in peers if r["balanced_accuracy"] >= top["balanced_accuracy"] - NEAR]
    return min(near, key=lambda r: r["times"]), min(peers, key=lambda r: r["times"]), top


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the chosen file is beside the peers and VGG19."""
    own = {r["file"]: r for r in rows}
    ours, teacher = own["chosen"], own[VGG]
    best, fastest, top = best_of(rows)

    def more_accurate_than(peer: dict[str, Any]) -> float:
        return 100 * (ours["balanced_accuracy"] - peer["balanced_accuracy"])

    return {
        "speedup_over_best_peer": best["times"],
        "accuracy_minus_best_peer_pt": more_accurate_than(best),
        "accuracy_sd_pt": spread(ours["trainings"]),
        "accuracy_sd_best_peer_pt": spread(best["trainings"]),
        "accuracy_minus_most_accurate_peer_pt": more_accurate_than(top),
        "speedup_over_fastest_peer": fastest["times"],
        "accuracy_minus_fastest_peer_pt": more_accurate_than(fastest),
        "speedup_over_vgg19": teacher["times"],
        "idle_gap_ratio": ours["rest_ms"] / ours["p50_ms"],
        "idle_gap_ratio_best_peer": best["rest_ms"] / best["p50_ms"],
        "speedup_over_best_peer_after_rest": best["rest_ms"] / ours["rest_ms"],
        **dict(rooflines(ours, best)),
    }


def interval(
    ours: np.ndarray, theirs: np.ndarray, test: Sequence[data.Sample], resamples: int = 2000
) -> dict[str, float]:
    """How sure the difference in accuracy from the best peer is: trainings and images drawn anew.

    ours, theirs: (trainings, images) bool, of the same images.
    """
    rng = np.random.default_rng(0)
    labels = np.array([s.label for s in test])
    names, member = np.unique([s.group for s in test], return_inverse=True)
    apart = []
    for _ in range(resamples):
        groups = rng.integers(len(names), size=len(names))
        weight = np.bincount(groups, minlength=len(names))[member]
        own, other = (balanced(x[rng.integers(len(x), size=len(x))], labels, weight).mean()
                      for x in (ours, theirs))  # fmt: skip
        apart.append(100 * (own - other))
    low, high = np.percentile(apart, [2.5, 97.5])
    return {"accuracy_minus_best_peer_low_pt": low, "accuracy_minus_best_peer_high_pt": high}


def spread(accuracies: list[float]) -> float:
    """The standard deviation, in points; 0 of one."""
    return 100 * float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0


def rooflines(ours: dict[str, Any], best: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How near the two come to the most that this machine does in any runtime."""
    peaks = [roofline.peak(r, CPU.model_copy(update={"runtime": r, "device": "CPU"}))
             for r in ("openvino", "onnxruntime")]  # fmt: skip
    told = [p for p in peaks if p]
    reached = {k: max(p.gflops.get(k, 0.0) for p in told) for p in told for k in p.gflops}
    print("peak", reached, [p.bandwidth_gbs for p in told])
    peak = told[0].model_copy(
        update={"gflops": reached, "bandwidth_gbs": max(p.bandwidth_gbs for p in told)}
    )
    for name, row in (("roofline_fraction", ours), ("roofline_fraction_best_peer", best)):
        asked = {k: row[k] for k in ("macs", "moved_bytes", "p50_ms", "precision")}
        near = roofline.roofline(**asked, peak=peak)
        if near:
            yield name, near.fraction


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    place = data_folder(given.data, "brain_tumor_mri")
    root = given.runs or RUNS / ("latency-peers-quick" if given.quick else "latency-peers")
    trainings = 2 if given.quick else TRAININGS
    commands(place, root, given.quick, trainings)
    dataset = data.open_dataset(place)
    students = [folders.exports(student(root, s))[-1] for s in range(trainings)]
    spec = students[0].spec
    test = dataset.splits["test"][:: 20 if given.quick else 1]
    images = root / "test.npy"
    np.save(images, preprocess.normalise(data.load_pixels(test, spec), spec))
    files, sizes = files_of(root, students, dataset)
    found = found_of(files, images, given.quick)
    labels = np.array([s.label for s in test])
    rows = rows_of(files, found, labels, sizes)
    best, fastest, _ = best_of(rows)
    ours, theirs = (right_of(found[n], labels) for n in ("chosen", best["file"]))
    packages = ("openvino", "nncf", "onnxruntime", "neural-compressor-pt", "torch", "timm")
    keep("latency_peers", figures(rows) | interval(ours, theirs, test), rows, packages=packages,
         quick=given.quick, chosen=students[0].model, size=spec.size[0], best_peer=best["file"],
         fastest_peer=fastest["file"], elsewhere=elsewhere.PACKAGES)  # fmt: skip


if __name__ == "__main__":
    main()
