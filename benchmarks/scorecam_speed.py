"""How long does Score-CAM take, on what is deployed, and beside the libraries?

    python benchmarks/scorecam_speed.py [--quick] [--data DIR] [--runs DIR] [--nets NAME ...]

Wall and CPU seconds an image at 224 pixels, of the same layer of the same network: grad-cam and
torchcam on torch with their defaults, EdgeKD's exact map on torch, ONNX Runtime and OpenVINO (f32,
bf16, INT8), and its fast one on the two small files, at the share of channels that is certified on
8 validation images. Each way has a process of its own; they take turns, image by image, and are
compared image by image. The limit is what the masked images would take at the file's throughput,
which is measured in the same turn, in the same process, at the same batch. The networks are trained
for two or three epochs on real MRI slices; VGG19, which is here for its size, has random weights.
About 50 minutes on 2 cores, a third of it for training; interrupted, it goes on where it stopped.
--quick (MobileNetV3 at 64 pixels, 2 images) writes no result file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workbench import (
    FLIP,
    RUNS,
    arguments,
    data_folder,
    edgekd,
    keep,
    own_stdout,
    untrained,
)

from edgekd import data, export, runtimes
from edgekd.data import preprocess
from edgekd.explain import fidelity, score_cam
from edgekd.models import zoo
from edgekd.quantize import ptq
from edgekd.records import Artifact, Profile, Spec

NETS = {  # name -> (student that is trained, epochs (0: random weights), images that count)
    "resnet18": ("resnet18", 2, 5),
    "mobilenetv3": ("mobilenetv3_large_100", 3, 8),
    "student": ("ofa-595", 2, 5),
    "vgg19": ("vgg19", 0, 1),  # a quarter of an hour
}
OPENVINO = Profile(name="openvino", runtime="openvino", device="CPU", hint="throughput")
WAYS = {  # of EdgeKD -> (file, profile, whether fast)
    "torch": ("torch", Profile(name="torch", runtime="torch", device="cpu"), False),
    "onnxruntime": ("onnx", Profile(name="ort", runtime="onnxruntime", device="CPU"), False),
    "openvino f32": ("openvino", OPENVINO, False),
    "openvino bf16": ("bf16", OPENVINO, False),
    "openvino int8": ("int8", OPENVINO, False),
    "openvino bf16 fast": ("bf16", OPENVINO, True),
    "openvino int8 fast": ("int8", OPENVINO, True),
}
LIBRARIES = ("grad-cam", "torchcam")
BATCH = 32  # masked images that EdgeKD shows at a time
CERTIFIED = 8  # validation images that a fast share is certified on
Explain = Callable[[np.ndarray, int], tuple[np.ndarray, int]]  # -> a map, passes that it took


def made(data_path: Path, folder: Path, net: str, quick: bool) -> None:
    """The network's files, and arrays.npz: images to explain, to certify on and to calibrate on."""
    if (folder / "arrays.npz").exists():  # written last
        return
    model, epochs, images = NETS[net]
    size = 64 if quick else 224
    splits = data.open_dataset(data_path).splits
    if epochs:
        edgekd("distill", "-p", "cpu", "--data", data_path, "--no-teacher", "--student", model,
               "--size", size, "--epochs", 1 if quick else epochs, "--lr", 0.002, *FLIP,
               "--run", folder)  # fmt: skip
        trained = Artifact.load(folder / "student")
        waist = zoo.load(trained)
    else:
        spec = Spec(classes=data.open_dataset(data_path).classes, size=(size, size))
        waist, trained = untrained(model, spec)
    spec = trained.spec

    def prepared(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        few = ptq.pick_calibration(splits[split], count, 0)
        pixels = data.load_pixels(few, spec)
        return preprocess.normalise(pixels, spec), np.array([s.label for s in few])

    calibration, _ = prepared("train", 64)
    onnx = export.to_onnx(waist, trained, calibration[:4], folder / "onnx", tolerance=1e-2)
    for name in ("torch", "openvino"):
        export.to_runtime(onnx, calibration[:4], folder / name, name)
    export.to_runtime(onnx, calibration[:4], folder / "bf16", "openvino", precision="bf16")
    ptq.quantize(onnx, calibration, folder / "int8")
    # One more than count: a process's first is not counted. Of VGG19 it would take too long.
    x, y = prepared("test", (2 if quick else images) + (net != "vgg19"))
    val_x, val_y = prepared("val", CERTIFIED)
    np.savez(folder / "arrays.npz", x=x, y=y, val_x=val_x, val_y=val_y)


def library(folder: Path, way: str) -> Explain:
    """A library's ScoreCAM of the network behind the files, hooked to the map that they give."""
    import torch

    class Hooked(torch.nn.Module):
        """Image -> logits; the explained map goes through `map`."""

        def __init__(self) -> None:
            super().__init__()
            self.waist, self.map = network(folder), torch.nn.Identity()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits, features = self.waist(image)
            self.map(features)
            return logits

    net = Hooked().eval()
    if way == "grad-cam":
        from pytorch_grad_cam import ScoreCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        cam = ScoreCAM(net, [net.map])

        def explain_one(image: np.ndarray, label: int) -> tuple[np.ndarray, int]:
            heat = cam(torch.from_numpy(image[None]), [ClassifierOutputTarget(label)])
            return heat[0], cam.activations_and_grads.activations[0].shape[1]
    else:
        from torchcam.methods import ScoreCAM as Cam

        own = Cam(net, "map", input_shape=(3, *Artifact.load(folder / "onnx").spec.size))

        def explain_one(image: np.ndarray, label: int) -> tuple[np.ndarray, int]:
            with torch.inference_mode():
                logits = net(torch.from_numpy(image[None]))
                heat = own(label, logits)[0]
            return heat[0].numpy(), own.hook_a[0].shape[1]

    with torch.inference_mode():  # the warm-up: a batch
        net(torch.zeros(16, 3, *Artifact.load(folder / "onnx").spec.size))
    return explain_one


def network(folder: Path) -> Any:
    """The Waist that the files were made from."""
    if (folder / "student").is_dir():
        return zoo.load(Artifact.load(folder / "student"))
    return untrained("vgg19", Artifact.load(folder / "onnx").spec)[0]


def serve(folder: Path, way: str) -> None:
    """One way, in this process: reads an image's number a line, and answers with a row each."""
    arrays = np.load(folder / "arrays.npz")
    x, y = arrays["x"], arrays["y"]
    session, row = None, {}
    if way in LIBRARIES:
        explain_one = library(folder, way)
    else:
        name, profile, fast = WAYS[way]
        session = runtimes.open_session(Artifact.load(folder / name), profile)
        session(np.repeat(x[:1], BATCH, 0))
        share = 1.0
        if fast:
            found = score_cam.fast_share(session, arrays["val_x"], arrays["val_y"], batch=BATCH)
            share, row = found.share, {"share": found.share, "certified_r": found.worst}

        def explain_one(image: np.ndarray, label: int) -> tuple[np.ndarray, int]:
            found = score_cam.ask(session, image, batch=BATCH, share=share)
            return score_cam.class_maps(found)[label], found.asked

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        i = int(line)
        began, cpu = time.perf_counter(), time.process_time()  # of all threads
        heat, asked = explain_one(x[i], int(y[i]))
        told = row | {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu,
                      "asked": asked}  # fmt: skip
        if session and profile is OPENVINO:
            told["limit_s"] = asked * throughput(session, x[i])
        if session:
            told["map"] = heat.tolist()
        print(json.dumps(told), file=answers, flush=True)


def throughput(session: runtimes.Session, image: np.ndarray) -> float:
    """Seconds an image, at the best of three batches."""
    images = np.repeat(image[None], BATCH, 0)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        session(images)
        took.append(time.perf_counter() - began)
    return min(took) / BATCH


def measured(folder: Path, journal: Path) -> list[dict[str, dict[str, Any]]]:
    """One turn an image: of each way its row. They take turns; whole ones are kept in `journal`."""
    turns = [json.loads(s) for s in journal.read_text("utf-8").splitlines()] \
        if journal.exists() else []  # fmt: skip
    net, count = folder.name, len(np.load(folder / "arrays.npz")["x"])
    first = int(net != "vgg19")
    if first + len(turns) == count:
        return turns
    ways = [*LIBRARIES, *(w for w in WAYS if net != "vgg19" or not WAYS[w][2])]
    workers = {}
    try:
        for way in ways:
            workers[way] = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(folder), way], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            if not workers[way].stdout.readline():  # one opens at a time
                sys.exit(f"{way} of {net} does not open")
        for i in [*range(first), *range(first + len(turns), count)]:
            turn = {}
            for way in ways if i % 2 else ways[::-1]:
                workers[way].stdin.write(f"{i}\n")
                workers[way].stdin.flush()
                turn[way] = json.loads(workers[way].stdout.readline())
                print(net, i, way, f"{turn[way]['wall_s']:.2f} s", flush=True)
            if i >= first:
                turns.append(turn)
                with journal.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(turn) + "\n")
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return turns


def alike(turns: list[dict[str, Any]], one: str, other: str) -> list[float]:
    """Pearson's r of two ways' maps, image by image; -1 where it is undefined."""
    found = [fidelity.pearson(*(np.array(t[w]["map"]) for w in (one, other))) for t in turns]
    return [-1.0 if r is None else r for r in found]


def row(net: str, way: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the images, of times and of ratios taken image by image."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return float(np.median([value(t) for t in turns]))

    told: dict[str, Any] = {"net": net, "way": way, "images": len(turns)}
    for key in ("wall_s", "cpu_s", "asked"):
        told[key] = median(lambda t, key=key: t[way][key])
    for lib in LIBRARIES:
        told[f"over_{lib}"] = median(lambda t, lib=lib: t[lib]["wall_s"] / t[way]["wall_s"])
        told[f"cpu_over_{lib}"] = median(lambda t, lib=lib: t[lib]["cpu_s"] / t[way]["cpu_s"])
    if "limit_s" in turns[0][way]:
        told["limit_fraction"] = median(lambda t: t[way]["limit_s"] / t[way]["wall_s"])
    if "share" in turns[0][way]:
        r = alike(turns, way, way.removesuffix(" fast"))
        told |= {k: turns[-1][way][k] for k in ("share", "certified_r")}
        told |= {"r": float(np.mean(r)), "r_worst": min(r)}
    elif way in ("onnxruntime", "openvino f32"):
        told["r_with_torch"] = min(alike(turns, way, "torch"))
    return told | {"each_s": [round(t[way]["wall_s"], 4) for t in turns]}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Times as fast as the faster library; the fastest exact and fast file of each network."""
    found, limits, fast_r = {}, [], []
    for net in dict.fromkeys(r["net"] for r in rows):
        own = [r for r in rows if r["net"] == net and r["way"].startswith("openvino")]
        for kind, those in (("exact", [r for r in own if "share" not in r]),
                            ("fast", [r for r in own if "share" in r])):  # fmt: skip
            if those:
                best = max(those, key=lambda r: min(r[f"over_{lib}"] for lib in LIBRARIES))
                found[f"speedup_{kind}_{net}"] = min(best[f"over_{lib}"] for lib in LIBRARIES)
            if those and kind == "fast":
                found |= {f"fast_share_{net}": best["share"], f"fast_r_{net}": best["r"]}
                fast_r.append(best["r"])
            elif those:
                found[f"limit_fraction_{net}"] = best["limit_fraction"]
                limits.append(best["limit_fraction"])
    same = [r["r_with_torch"] for r in rows if "r_with_torch" in r]
    return found | {"fast_r": min(fast_r, default=1.0), "limit_fraction": min(limits),
                    "identical_f32_r": min(same)}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    given = parser.parse_args()
    folder = data_folder(given.data, "brain_tumor_mri")
    name = "scorecam-speed-quick" if given.quick else "scorecam-speed"
    runs = given.runs or RUNS / name
    rows = []
    for net in ["mobilenetv3"] if given.quick else given.nets:
        made(folder, runs / net, net, given.quick)
        turns = measured(runs / net, runs / net / "turns.jsonl")
        rows += [row(net, way, turns) for way in turns[0]]
    keep(
        "scorecam_speed", figures(rows), rows,
        packages=("openvino", "nncf", "onnxruntime", "torch", "timm", "grad-cam", "torchcam"),
        quick=given.quick or given.nets != list(NETS), data="brain_tumor_mri", batch=BATCH,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        answers = own_stdout()
        serve(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
