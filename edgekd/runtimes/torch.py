"""The reference: the ONNX file's own PyTorch program, saved beside it by `edgekd export`."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable
from edgekd.runtimes import Outputs, Session

SUFFIXES = (".pt2",)


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """Copy the exported program that lies beside the ONNX file."""
    source = onnx.with_suffix(".pt2")
    if not source.is_file():
        raise EdgeKDError(f"{source} is missing: edgekd export --format onnx writes it")
    return [Path(shutil.copy(source, out / "model.pt2"))]


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Run on the profile's device, in float32."""
    if profile.device not in devices():
        raise RuntimeUnavailable(
            f"torch sees no device {profile.device} here, only {', '.join(devices())}"
        )
    if precision != "fp32":
        raise EdgeKDError(f"the torch runtime runs fp32, not {precision}")
    if profile.threads:
        torch.set_num_threads(profile.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.export.load(path).module().to(profile.device)
    except Exception as e:  # a broken archive raises a dozen kinds
        reason = (str(e).splitlines() or [""])[0][:120]
        raise EdgeKDError(f"torch cannot load {path}: {type(e).__name__}: {reason}") from None

    def run(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            logits, features = model(torch.from_numpy(images).to(profile.device))
        return Outputs(logits.cpu().numpy(), features.cpu().numpy())

    return run


def devices() -> list[str]:
    """The CPU and every CUDA device."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
