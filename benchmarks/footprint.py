"""What does a device have to carry, and how long does it wait for the first answer?

    python benchmarks/footprint.py [--quick] [--runs DIR]

Two environments are made as a device's are, one with edgekd[onnxruntime,serve,dicom] and one with
edgekd[openvino,serve]: what they weigh, and the memory and the time of `edgekd predict` and
`edgekd serve` in them. A cold answer, from the start of the process to its end, is told beside a
bare script's for the same file: numpy, Pillow and the runtime, nothing checked. They take turns.
The network is EfficientNet-Lite0 at 128 pixels, in FP32. Needs a package index for the
environments; three minutes on 2 cores. --quick (two turns) keeps nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from serving import Server, film
from workbench import HERE, RUNS, arguments, keep, lite0_weights, untrained

from edgekd import export, runtimes
from edgekd.bundle import bundle, out_of_distribution
from edgekd.data import phantom, preprocess
from edgekd.records import Profile, Spec, make_folder

EXTRAS = {"onnxruntime": "onnxruntime,serve,dicom", "openvino": "openvino,serve"}
NETWORK, SIDE = "tf_efficientnet_lite0", 128
TURNS = 20
# What one would write without us; the runtime's own two lines come with it.
BARE = """
import sys
import numpy as np
from PIL import Image
picture = Image.open(sys.argv[2]).convert("RGB").resize(({side}, {side}), Image.BILINEAR)
x = np.asarray(picture, np.float32) / 255
x = ((x - {mean}) / {std}).astype(np.float32).transpose(2, 0, 1)[None]
{runtime}
p = np.exp(logits - logits.max())
print(p / p.sum())
"""
OF_RUNTIME = {
    "onnxruntime": """import onnxruntime
logits = onnxruntime.InferenceSession(sys.argv[1]).run(None, {"image": x})[0]""",
    "openvino": """import openvino
logits = openvino.Core().compile_model(sys.argv[1], "CPU")(x)[0]""",
}
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class Place(NamedTuple):
    """An environment, and what is asked in it."""

    runtime: str
    venv: Path
    bundle: Path
    model: Path  # the file that is in the bundle
    script: Path  # the bare one

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.venv / "bin" / "python")

    def predict(self, image: Path, *more: object) -> list[str]:
        """The command for one image."""
        return [self.python, "-m", "edgekd", "predict", str(image), "-m", str(self.bundle),
                "--json", *map(str, more)]  # fmt: skip

    def bare(self, image: Path) -> list[str]:
        """The bare script's."""
        return [self.python, str(self.script), str(self.model), str(image)]


def environment(folder: Path, extras: str) -> Path:
    """With edgekd of this checkout and `extras`, from the package index."""
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        asked = f"{HERE.parent}[{extras}]"
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", asked], check=True)
        (folder / "done").touch()
    return folder


def bundles(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(runtime, a bundle, its model's file) of the same network for each runtime."""
    spec = Spec(classes=phantom.CLASSES, size=(SIDE, SIDE))
    waist, record = untrained(NETWORK, spec, lite0_weights())
    pixels = np.stack([preprocess.pixels(film(i), spec) for i in range(60)])
    images = preprocess.normalise(pixels, spec)
    onnx = export.to_onnx(waist, record, images[:4], folder / "onnx")
    for runtime in EXTRAS:
        made = onnx if runtime == "onnxruntime" else export.to_runtime(
            onnx, images[:4], folder / runtime, runtime)  # fmt: skip
        profile = Profile(name="cpu", runtime=runtime, device="CPU")
        pooled = runtimes.open_session(made, profile)(images).features.mean((2, 3))
        usual = out_of_distribution.learnt(pooled[:40], pooled[40:], pixels)
        out = folder / f"{runtime}.edgekd"
        given = bundle.Given(made, profile, source=onnx, usual=usual)
        bundle.make(out, given, intended_use="benchmarks")
        yield runtime, out, made.path


def script(folder: Path, runtime: str) -> Path:
    """The bare script for one runtime."""
    spec = Spec(classes=phantom.CLASSES, size=(SIDE, SIDE))
    path = folder / f"bare_{runtime}.py"
    path.write_text(
        BARE.format(
            side=SIDE, mean=list(spec.mean), std=list(spec.std), runtime=OF_RUNTIME[runtime]
        )
    )
    return path


def weights(environment: Path) -> dict[str, float]:
    """MB of each package in it, largest first, pip left out: it is not needed."""
    (site,) = environment.glob("lib/python*/site-packages")
    found = {
        p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) / 1e6
        for p in site.iterdir()
        if p.is_dir() and not p.name.startswith(("pip", "setuptools"))
    }
    return dict(sorted(found.items(), key=lambda x: -x[1]))


def run(command: list[str], folder: Path) -> str:
    """What a process says; leaves if it fails."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HOME": str(folder)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, cwd=folder)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    return done.stdout


def peak_mb(command: list[str], folder: Path) -> float:
    """Resident memory at most. A small process must begin it: memory is counted from the fork."""
    return float(run([command[0], "-c", PEAK, *command], folder)) * 1024 / 1e6


def served(place: Place, sandbox: Path) -> dict[str, float]:
    """Memory and times of `edgekd serve` that is asked for ten answers and two maps."""
    make_folder(sandbox)
    server = Server(place.bundle, sandbox, venv=place.venv)
    time.sleep(1)
    told = {"serve_idle_mb": server.memory[-1][1]}
    for what, count in (("predict", 10), ("explain", 2)):
        took = []
        for i in range(count):
            request = urllib.request.Request(f"http://127.0.0.1:{server.port}/{what}", film(i),
                                             {"content-type": "image/png"})  # fmt: skip
            began = time.perf_counter()
            with urllib.request.urlopen(request) as answer:
                answer.read()
            took.append((time.perf_counter() - began) * 1e3)
        told[f"serve_{what}_ms"] = float(np.median(took))
    told["serve_peak_mb"] = server.peak_mb
    if server.stop():
        sys.exit("\n".join(server.said))
    return told


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    root = given.runs or RUNS / "footprint"
    figures: dict[str, float] = {}
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "film.png"
        image.write_bytes(film(0))
        for runtime, made, model in bundles(folder):
            own = environment(root / runtime, EXTRAS[runtime])
            place = Place(runtime, own, made, model, script(folder, runtime))
            told, more = looked_at(place, image, folder, 2 if given.quick else TURNS)
            figures |= {f"{k}_{runtime}": v for k, v in told.items()}
            table.append({"runtime": runtime, "extras": EXTRAS[runtime], **more})
    keep("footprint", figures, table, packages=("onnxruntime", "openvino"), quick=given.quick,
         network=NETWORK, size=SIDE)  # fmt: skip


def looked_at(
    place: Place, image: Path, folder: Path, turns: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(figures, what lies behind them) of one environment."""
    looked = [place.python, "-c", "import importlib.util as u; print(u.find_spec('torch'))"]
    if run(looked, folder) != "None\n":
        sys.exit("torch is installed")
    explained = place.predict(image, "--explain", folder / "maps" / place.runtime)
    run(explained, folder)
    if not list((folder / "maps" / place.runtime).glob("*.png")):
        sys.exit(f"no map in {place.runtime}")
    packages = weights(place.venv)
    ways = {"edgekd": place.predict(image), "bare": place.bare(image)}
    ms: dict[str, list[float]] = {k: [] for k in ways}
    for i in range(turns + 1):
        for way in ways if i % 2 else reversed(ways):
            began = time.perf_counter()
            run(ways[way], folder)
            if i:  # the first of each finds its files on the disk
                ms[way].append(1e3 * (time.perf_counter() - began))
    ratio = [a / b for a, b in zip(ms["edgekd"], ms["bare"], strict=True)]
    told = {
        "installed_mb": sum(packages.values()),
        "cold_ms": float(np.median(ms["edgekd"])),
        "cold_bare_ms": float(np.median(ms["bare"])),
        "cold_over_bare": float(np.median(ratio)),
        "predict_peak_mb": peak_mb(ways["edgekd"], folder),
        "bare_peak_mb": peak_mb(ways["bare"], folder),
        "explain_peak_mb": peak_mb(explained, folder),
        **served(place, folder / place.runtime / "served"),
    }
    largest = {k: round(v, 1) for k, v in list(packages.items())[:8]}
    return told, {"largest_packages_mb": largest, "cold_ms": ms, "ratio": ratio}


if __name__ == "__main__":
    main()
