"""Is the file that EdgeKD chose faster than what one would deploy without it, and as accurate?

    python benchmarks/latency_peers.py [--quick] [--data DIR] [--runs DIR]

On real MRI slices at 128 pixels: the `cpu` profile's file, chosen by search, distilled and
quantised, beside four networks of timm as they are taken today, in OpenVINO (as it is, which is
bfloat16 where the processor has it, and NNCF's defaults) and in ONNX Runtime (FP32, its static
quantisation, and Intel Neural Compressor's, Optimum's and Olive's); and VGG19 in FP32 in the same
runtime.
EfficientNet-Lite0 is fine-tuned from ImageNet weights, which are at hand; the other three begin at
random and get as many epochs more as they like (24). Every file has a process of its own, in three
rounds; they take turns, call by call, and after 2 seconds of rest. The best peer is the fastest
file whose balanced accuracy is within a point of the most accurate peer's. VGG19 is trained for one
epoch: its speed alone is asked. About three hours on 2 cores, nearly all of it training;
interrupted, it goes on where it stopped. --quick (one epoch, 64 pixels) keeps nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elsewhere
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
    own_stdout,
)

from edgekd import data, imaging, models, quantize, roofline, runs, runtimes
from edgekd.records import Artifact, Profile
from edgekd.stopwatch import ratio_interval, settle, time_ms

PEERS = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "mobilenetv2_120d", "resnet18")
WAYS = ("openvino", "openvino nncf", "ort", "ort static", "ort inc", "ort optimum", "ort olive")
ROUNDS, TURNS, CALLS, RESTS = 3, 8, 60, 5
PAUSE_S = 2.0
NEAR = 0.01  # of the most accurate peer
CALIBRATION = 300
CPU = Profile.read("cpu")
Answer = Callable[[np.ndarray], np.ndarray]  # (1, 3, H, W) -> (1, K) logits


def commands(place: Path, root: Path, quick: bool) -> None:
    """Everything that is trained."""
    size = ["--size", 64 if quick else 128]
    at = ["--data", place, "--runs", root]

    def epochs(n: int) -> list[object]:
        return ["--epochs", 1 if quick else n]

    guide = [*epochs(7), *TEACHER[2:]]
    edgekd("teach", PEERS[0], "--weights", lite0_weights(), *at, *size, *guide)
    start = ["--start", PEERS[0], "--start-weights", lite0_weights(), "--lr", 0.001]
    few = ["--subnets", 24, "--generations", 20] if quick else []
    edgekd("shrink", "-p", "cpu", *at, *(size if quick else []), *start, *epochs(8), *FLIP)
    (net,) = (root / "shared").glob("*/supernet-*")
    cut = ["--supernet", net, *(size if quick else [])]
    edgekd("search", "-p", "cpu", *at, *cut, *few, "--run", root / "chosen")
    edgekd("distill", "-p", "cpu", *at, *cut, *epochs(6), *FLIP, "--run", root / "chosen")
    edgekd("quantize", *(["--max-drop", 100] if quick else []), "--run", root / "chosen")
    edgekd("export", "-f", "openvino", "--run", root / "chosen")
    side = ["--size", Artifact.load(root / "chosen" / "student").spec.size[0]]
    for name in (*PEERS[1:], "vgg19"):
        more = epochs(1 if name == "vgg19" else 24)
        rate = 0.01 if name == "vgg19" else 0.002
        edgekd("distill", "-p", "cpu", *at, *side, "--no-teacher", "--student", name, *more,
               "--lr", rate, *FLIP, "--run", root / name)  # fmt: skip
    if side != size:  # the peer sees what the student sees
        edgekd("teach", PEERS[0], "--weights", lite0_weights(), *at, *side, *guide)


def trained(root: Path, name: str, dataset: data.Dataset, side: int) -> Artifact:
    """The trained network called `name`, at `side` pixels."""
    if name != PEERS[0]:
        return Artifact.load(root / name / "student")
    (found,) = runs.shared(root, dataset).glob(f"teacher-{PEERS[0]}-{side}px-*")
    return Artifact.load(found)


def peer_files(
    made: Artifact, folder: Path, calibration: np.ndarray, dataset: data.Dataset
) -> None:
    """What one would deploy: ONNX with logits alone, and what each quantiser's defaults make."""
    import nncf
    import onnx
    import openvino as ov
    import torch
    from onnxruntime import quantization as ort

    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    waist = models.load(made).eval()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.waist = waist

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.waist(image)[0]

    image = torch.from_numpy(calibration[:1])
    torch.onnx.export(Plain().eval(), (image,), str(folder / "fp32.onnx"), dynamo=True,
                      external_data=False, input_names=["image"],
                      output_names=["logits"])  # fmt: skip
    model = ov.convert_model(str(folder / "fp32.onnx"))
    images = nncf.Dataset([x[None] for x in calibration])
    ov.save_model(nncf.quantize(model, images), str(folder / "nncf.xml"))

    class Reader(ort.CalibrationDataReader):
        left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.left, None)
            return None if x is None else {"image": x[None]}

    ort.shape_inference.quant_pre_process(str(folder / "fp32.onnx"), str(folder / "ready.onnx"))
    ort.quantize_static(str(folder / "ready.onnx"), str(folder / "static.onnx"), Reader())
    onnx.checker.check_model(str(folder / "static.onnx"))
    whole = runs.onnx_of(made, folder / "whole", dataset)
    quantize.quantize(whole, calibration, folder / "inc", engine="inc", runtime="onnxruntime")
    for tool in elsewhere.PACKAGES:
        elsewhere.quantise(tool, folder.parent, folder / "fp32.onnx", calibration,
                           folder / f"{tool}.onnx")  # fmt: skip
    (folder / "done").touch()


def opened(folder: Path, way: str) -> Answer:
    """A file as its runtime opens it by default; or, for "edgekd", as EdgeKD does."""
    if way == "edgekd":
        artifact = Artifact.load(folder)
        session = runtimes.open_session(artifact, Profile.read("cpu"), 1)
        return lambda x: session(x).logits
    if way.startswith("openvino"):
        import openvino as ov

        file = "nncf.xml" if way.endswith("nncf") else "fp32.onnx"
        config = {"PERFORMANCE_HINT": "LATENCY"}
        if way == "openvino f32":
            config["INFERENCE_PRECISION_HINT"] = "f32"
        model = ov.Core().read_model(folder / file)
        model.reshape({0: [1, *(s.get_length() for s in list(model.input(0).partial_shape)[1:])]})
        compiled = ov.compile_model(model, "CPU", config)
        return lambda x: compiled(x)[0]
    import onnxruntime

    file = {"ort": "fp32.onnx", "ort inc": "inc/model.onnx"}.get(way, f"{way.split()[-1]}.onnx")
    session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"image": x})[0]


def serve(folder: Path, way: str, images: Path) -> None:
    """One file, in this process; a request a line."""
    x = np.load(images)["test"]
    answer = opened(folder, way)
    settle(lambda: answer(x[:1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = line.split()
        if asked[0] == "calls":
            said: Any = time_ms(lambda: answer(x[:1]), warmup=5, runs=int(asked[1])).tolist()
        elif asked[0] == "once":  # the first call after a rest
            said = float(time_ms(lambda: answer(x[:1]), warmup=0, runs=1)[0])
        else:
            said = [answer(i[None])[0].tolist() for i in x]
        print(json.dumps(said), file=answers, flush=True)


class Worker:
    """The process of one file."""

    def __init__(self, name: str, folder: Path, way: str, images: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), way, str(images)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        if not self.process.stdout.readline():
            sys.exit(f"{name} does not open")

    def ask(self, request: str) -> Any:
        """Its answer to one line."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def in_turns(files: dict[str, tuple[Path, str]], images: Path, quick: bool) -> dict[str, Any]:
    """Of each file: "blocks", its medians round by round; "rests" in ms; "logits"."""
    found: dict[str, Any] = {n: {"blocks": [], "rests": []} for n in files}
    for turn_round in range(1 if quick else ROUNDS):
        workers = [Worker(n, *f, images) for n, f in files.items()]
        try:
            for w in workers:
                found[w.name]["blocks"].append([])
                if not turn_round:
                    found[w.name]["logits"] = w.ask("logits")
            for turn in range(TURNS):
                for w in workers if turn % 2 else workers[::-1]:
                    block = np.median(w.ask(f"calls {CALLS}"))
                    found[w.name]["blocks"][-1].append(float(block))
            for _ in range(0 if turn_round else RESTS):
                time.sleep(PAUSE_S)
                for w in workers:  # each has rested since its last call, and a bit more
                    found[w.name]["rests"].append(w.ask("once"))
        finally:
            for w in workers:
                w.process.kill()
                w.process.communicate()
    return found


def rows_of(
    files: dict[str, tuple[Path, str]], found: dict[str, Any], labels: np.ndarray, classes: int
) -> list[dict[str, Any]]:
    """A row a file; times as a share of the chosen file's, turn by turn."""
    rows = []
    for name, told in found.items():
        times, low, high = ratio_interval(told["blocks"], found["chosen"]["blocks"])
        answers = np.array(told["logits"]).argmax(1)
        hits = [np.mean(answers[labels == k] == k) for k in range(classes)]
        rows.append({
            "file": name, "way": files[name][1], "balanced_accuracy": float(np.mean(hits)),
            "p50_ms": float(np.median(np.concatenate(told["blocks"]))), "times": times,
            "low": low, "high": high, "rest_ms": float(np.median(told["rests"])),
        })  # fmt: skip
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the chosen file is beside the best peer and VGG19."""
    ours = next(r for r in rows if r["file"] == "chosen")
    teacher = next(r for r in rows if r["file"].startswith("vgg19"))
    peers = [r for r in rows if r not in (ours, teacher)]
    top = max(r["balanced_accuracy"] for r in peers)
    best = min((r for r in peers if r["balanced_accuracy"] >= top - NEAR),
               key=lambda r: r["times"])  # fmt: skip
    print("best peer:", best["file"])
    return {
        "speedup_over_best_peer": best["times"],
        "speedup_over_fastest_peer": min(r["times"] for r in peers),
        "accuracy_minus_best_peer_pt":
            100 * (ours["balanced_accuracy"] - best["balanced_accuracy"]),
        "speedup_over_vgg19": teacher["times"],
        "idle_gap_ratio": ours["rest_ms"] / ours["p50_ms"],
        "idle_gap_ratio_best_peer": best["rest_ms"] / best["p50_ms"],
        "speedup_over_best_peer_after_rest": best["rest_ms"] / ours["rest_ms"],
        **rooflines(ours, best),
    }  # fmt: skip


def rooflines(ours: dict[str, Any], best: dict[str, Any]) -> dict[str, float]:
    """How near the two come to what this machine's matrix unit and memory do."""
    found = {}
    for name, row in (("roofline_fraction", ours), ("roofline_fraction_best_peer", best)):
        runtime = "onnxruntime" if row["way"].startswith("ort") else "openvino"
        device = CPU.model_copy(update={"runtime": runtime, "device": "CPU"})
        peak = roofline.peak(runtime, device)
        if peak is None:
            continue
        told = roofline.roofline(macs=row["macs"], moved_bytes=row["moved_bytes"],
                                 p50_ms=row["p50_ms"], precision=row["precision"],
                                 peak=peak)  # fmt: skip
        if told:
            found[name] = told.fraction
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    place = data_folder(given.data, "brain_tumor_mri")
    root = given.runs or RUNS / ("latency-peers-quick" if given.quick else "latency-peers")
    commands(place, root, given.quick)
    dataset = data.open_dataset(place)
    chosen = runs.exports(root / "chosen")[-1]
    spec = chosen.spec
    few = quantize.pick_calibration(dataset.splits["train"], CALIBRATION, 0)
    calibration = imaging.normalise(data.load_pixels(few, spec), spec)
    test = dataset.splits["test"][: 24 if given.quick else None]
    images = root / "test.npz"
    np.savez(images, test=imaging.normalise(data.load_pixels(test, spec), spec))
    files: dict[str, tuple[Path, str]] = {"chosen": (chosen.folder, "edgekd")}
    sizes: dict[str, dict[str, Any]] = {"chosen": size_of(chosen, chosen.precision)}
    for name in (*PEERS, "vgg19"):
        made = trained(root, name, dataset, spec.size[0])
        folder = root / "peers" / name
        peer_files(made, folder, calibration, dataset)
        for way in ("openvino f32",) if name == "vgg19" else WAYS:
            key = f"{name} {way}"
            files[key] = (folder, way)
            sizes[key] = size_of(made, PRECISIONS.get(way, "int8"))
    found = in_turns(files, images, given.quick)
    labels = np.array([s.label for s in test])
    rows = rows_of(files, found, labels, len(spec.classes))
    for r in rows:
        r |= sizes[r["file"]]
        print(
            f"{r['file']:40} {r['balanced_accuracy']:.3f} {r['p50_ms']:7.2f} ms "
            f"x {r['times']:.2f} [{r['low']:.2f}, {r['high']:.2f}] rest {r['rest_ms']:.1f} ms"
        )
    packages = ("openvino", "nncf", "onnxruntime", "neural-compressor-pt", "torch", "timm")
    keep("latency_peers", figures(rows), rows, packages=packages, quick=given.quick,
         chosen=chosen.model, size=spec.size[0])  # fmt: skip


PRECISIONS = {"openvino": "bf16", "openvino f32": "fp32", "ort": "fp32"}  # else int8


def size_of(made: Artifact, precision: str) -> dict[str, Any]:
    """MACs, and bytes that one image moves at least, with weights of this precision."""
    weights = made.params * {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    height, width = made.spec.size
    return {"precision": precision, "macs": made.macs,
            "moved_bytes": weights + 4 * (3 * height * width + len(made.spec.classes))}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        answers = own_stdout()
        serve(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        main()
