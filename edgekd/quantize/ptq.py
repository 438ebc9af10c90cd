"""Post-training INT8 by one of the engines; the file counts when it has run in a runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekd import runtimes
from edgekd.data.dataset import Sample
from edgekd.quantize import engines
from edgekd.quantize.engines import How
from edgekd.records import Artifact, EdgeKDError, Profile, disk, make_folder, sha256, versions
from edgekd.runtimes import Session, golden


def pick_calibration(samples: Sequence[Sample], n: int, seed: int) -> list[Sample]:
    """`n` samples, the same number of each class as far as they go; fixed by `seed`."""
    rng = np.random.default_rng(seed)
    by_class: dict[int, list[Sample]] = {}
    for i in rng.permutation(len(samples)):
        by_class.setdefault(samples[i].label, []).append(samples[i])
    chosen: list[Sample] = []
    for turn in range(max(map(len, by_class.values()), default=0)):
        for label in sorted(by_class):
            if turn < len(by_class[label]) and len(chosen) < n:
                chosen.append(by_class[label][turn])
    return chosen


def quantize(
    source: Artifact,
    calibration: np.ndarray,
    out: Path,
    *,
    engine: str = "nncf",
    method: str | None = None,
    runtime: str | None = None,
    keep: Sequence[str] = (),
    seed: int = 0,
) -> Artifact:
    """INT8 file of an FP32 ONNX artifact, calibrated on (n, 3, H, W) float32 prepared images.

    engine: a file in edgekd/quantize/engines. method: one of its METHODS, by default its first.
    runtime: that the file is for; TensorRT wants symmetric activations. keep: names of nodes of
    the ONNX file that stay in FP32. Raises EdgeKDError if there is nothing to calibrate on, or
    if the file does not run or answers nothing finite; then nothing that looks
    finished is left in `out`.
    """
    module = engines.get(engine)
    runtime = runtime or module.RUNTIMES[0]
    if runtime not in module.RUNTIMES:
        loads = ", ".join(module.RUNTIMES)
        raise EdgeKDError(f"engine {engine} writes for {loads}, not for {runtime}")
    how = How(engines.method(engine, method), runtime == "tensorrt", tuple(keep))
    if source.kind != "onnx" or source.precision != "fp32":
        raise EdgeKDError(f"{source.folder} is {source.kind} {source.precision}, not fp32 ONNX")
    if not len(calibration):
        raise EdgeKDError("quantize needs images to calibrate on, got none: give at least one")
    if out.resolve() == source.folder.resolve():
        raise EdgeKDError(f"{out} holds what is to be quantised: choose another folder")
    make_folder(out)
    (out / Artifact.FILE).unlink(missing_ok=True)
    # A session may have the old file mapped: it is replaced by rename, never written over.
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        made = Path(folder)
        try:
            found = module.write(source.path, calibration, made, how)
        except EdgeKDError:
            raise
        except Exception as e:  # engines raise whatever the libraries below them do
            if machine := disk.told(e):
                raise machine from None
            said = " ".join(str(e).split()) or "no reason given"
            raise EdgeKDError(
                f"engine {engine} fails on {source.path}: {type(e).__name__}: {said:.200}; "
                "another engine may not (--engine)"
            ) from e
        # TensorRT is not on a CPU: there ONNX Runtime reads the same Q/DQ nodes.
        ran_in = "onnxruntime" if runtime == "tensorrt" else runtime
        session = _run_once(made / module.FILES[0], ran_in, calibration[:4], source.path)
        names = [*module.FILES, golden.write(made, session, source.spec, "int8")]
        for name in names:
            (made / name).replace(out / name)
    inherited = ("model", "spec", "arch", "layer", "role", "params", "macs", "calibration",
                 "data_fingerprint", "split_rule")  # fmt: skip
    settings = {"engine": engine, "method": how.method, "symmetric": how.symmetric,
                "compared_in": f"{ran_in} CPU"}  # fmt: skip
    return Artifact(
        kind=module.KIND,
        precision="int8",
        files={f: sha256(out / f) for f in names},
        parents={"onnx": source.sha256},
        seed=seed,
        settings=settings | {"keep": list(keep), "calibration_images": len(calibration)} | found,
        versions=versions(*module.PACKAGES),
        **{f: getattr(source, f) for f in inherited},
    ).save(out)


def _run_once(path: Path, runtime: str, images: np.ndarray, source: Path) -> Session:
    """The file, open; EdgeKDError unless it answers something finite in `runtime` on this CPU."""
    cpu = Profile(name="cpu", runtime=runtime, device="CPU")
    session = runtimes.get(runtime).load(path, cpu, "int8", None)
    if not all(np.isfinite(x).all() for x in session(images)):
        raise EdgeKDError(f"{source} in int8 answers nothing finite: deploy fp32 instead")
    return session
