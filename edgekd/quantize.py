"""Post-training INT8 by NNCF, of the OpenVINO graph: the file counts when it has run there."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from edgekd import runtimes
from edgekd.data import Sample
from edgekd.records import Artifact, EdgeKDError, Profile, make_folder, sha256, versions

FILES = ("model.xml", "model.bin")  # the first is the one that is loaded


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


def quantize(source: Artifact, calibration: np.ndarray, out: Path, *, seed: int = 0) -> Artifact:
    """INT8 IR of an FP32 ONNX artifact, calibrated on (n, 3, H, W) float32 prepared images.

    Raises EdgeKDError if there is nothing to calibrate on, or if the quantised graph does not run
    or answers nothing finite; then nothing that looks finished is left in `out`.
    """
    nncf = _nncf()
    if source.kind != "onnx" or source.precision != "fp32":
        raise EdgeKDError(f"{source.folder} is {source.kind} {source.precision}, not fp32 ONNX")
    if not len(calibration):
        raise EdgeKDError("quantize needs images to calibrate on, got none: give at least one")
    if out.resolve() == source.folder.resolve():
        raise EdgeKDError(f"{out} holds what is to be quantised: choose another folder")
    make_folder(out)
    (out / Artifact.FILE).unlink(missing_ok=True)
    fake = _write_int8(nncf, source, calibration, out)
    inherited = ("model", "spec", "arch", "layer", "role", "params", "macs", "calibration",
                 "data_fingerprint", "split_rule")  # fmt: skip
    return Artifact(
        kind="openvino",
        precision="int8",
        files={f: sha256(out / f) for f in FILES},
        parents={"onnx": source.sha256},
        seed=seed,
        settings={
            "engine": "nncf",
            "preset": "mixed",
            "calibration_images": len(calibration),
            "fake_quantize_nodes": fake,
        },
        versions=versions("nncf", "openvino"),
        **{f: getattr(source, f) for f in inherited},
    ).save(out)


def _nncf() -> ModuleType:
    """NNCF, imported after the OpenVINO runtime, which blocks telemetry."""
    runtimes.get("openvino")
    try:
        with _quiet():
            import nncf
    except ModuleNotFoundError as e:
        raise EdgeKDError(f"quantize needs {e.name}: pip install 'edgekd[quantize]'") from None
    return nncf


def _write_int8(nncf: ModuleType, source: Artifact, calibration: np.ndarray, out: Path) -> int:
    """Write model.xml and model.bin into `out` once they have run; how many FakeQuantize nodes."""
    from edgekd.runtimes import openvino

    model = openvino.converted(source.path)
    with _quiet():
        model = nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in calibration]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            fast_bias_correction=True,
        )
    fake = sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    if not fake:
        raise EdgeKDError(f"nncf found nothing to quantise in {source.path}")
    cpu = Profile(name="cpu", runtime="openvino", device="CPU")
    # A session may have the old file mapped: it is replaced by rename, never written over.
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as made:
        openvino.ov.save_model(model, Path(made) / FILES[0], compress_to_fp16=False)
        answer = openvino.load(Path(made) / FILES[0], cpu, "int8", None)(calibration[:4])
        if not all(np.isfinite(x).all() for x in answer):
            raise EdgeKDError(f"{source.path} in int8 answers nothing finite: deploy fp32 instead")
        for name in FILES:
            (Path(made) / name).replace(out / name)
    return fake


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws bars on stdout and logs; neither is this tool's result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
