"""ONNX Runtime. `device` is an execution provider without its suffix: CPU, CUDA, OpenVINO."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable
from edgekd.runtimes import Outputs, Session, one_by_one

SUFFIXES = (".onnx",)
# Its exceptions share no base class.
BROKEN = (
    errors.EPFail, errors.Fail, errors.InvalidArgument, errors.InvalidGraph,
    errors.InvalidProtobuf, errors.NoModel, errors.NoSuchFile, errors.NotImplemented,
    errors.RuntimeException, RuntimeError, ValueError,
)  # fmt: skip


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """ONNX is what it loads."""
    return [Path(shutil.copy(onnx, out / "model.onnx"))]


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Open on the profile's provider alone: by itself ONNX Runtime falls back to the CPU."""
    if profile.device not in devices():
        raise RuntimeUnavailable(
            f"onnxruntime has no device {profile.device} here, only {', '.join(devices())}"
        )
    if precision == "bf16":  # fp16 and int8 are so in the graph
        raise EdgeKDError(f"onnxruntime runs {path} as it is written, not in {precision}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = profile.threads
    options.log_severity_level = 3
    for key, value in profile.options.items():
        # It knows "1" and "0": any other word is taken for 0, without an error.
        text = str(int(value)) if isinstance(value, bool) else str(value)
        options.add_session_config_entry(key, text)
    wanted = profile.device + "ExecutionProvider"
    # On CUDA convolutions run in TF32, with a mantissa of 10 bits, unless told not to.
    given = {"use_tf32": "0"} if profile.device == "CUDA" else {}
    try:
        # enable_fallback: by itself it prints, and tries other providers.
        session = ort.InferenceSession(
            path, options, providers=[(wanted, given)], enable_fallback=0
        )
    except BROKEN as e:
        reason = " ".join(str(e).split())[:160]
        raise EdgeKDError(f"onnxruntime cannot load {path}: {reason}") from None
    if session.get_providers()[0] != wanted:
        raise RuntimeUnavailable(f"onnxruntime opened {session.get_providers()[0]}, not {wanted}")

    def run(images: np.ndarray) -> Outputs:
        try:
            return Outputs(*session.run(["logits", "features"], {"image": images}))
        except BROKEN as e:
            reason = " ".join(str(e).split())[:160]
            raise EdgeKDError(f"onnxruntime cannot run {path}: {reason}") from None

    return one_by_one(run) if profile.static_batch and batch is None else run


def devices() -> list[str]:
    """Providers in this build, CPU first. Whether one really opens shows when it is opened."""
    found = {p.removesuffix("ExecutionProvider") for p in ort.get_available_providers()}
    return sorted(found - {"Azure"}, key=lambda d: (d != "CPU", d))
