"""The reference: the ONNX file's own PyTorch program, saved beside it by `edgekd export`."""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable
from edgekd.runtimes import Outputs, Session

SUFFIXES = (".pt2",)
# What torch.export.load raises for a file that is cut off, altered or something else.
BROKEN = (OSError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError)


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """Copy the exported program that lies beside the ONNX file."""
    source = onnx.with_suffix(".pt2")
    if not source.is_file():
        raise EdgeKDError(f"{source} is missing: edgekd export --format onnx writes it")
    return [Path(shutil.copy(source, out / "model.pt2"))]


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Run on the profile's device, in float32. Threads and TF32 are settings of the process."""
    if profile.device not in devices():
        raise RuntimeUnavailable(
            f"torch sees no device {profile.device} here, only {', '.join(devices())}"
        )
    if precision != "fp32":
        raise EdgeKDError(f"the torch runtime runs fp32, not {precision}")
    if profile.threads:
        torch.set_num_threads(profile.threads)
    if profile.device != "cpu":  # or convolutions run in TF32, with a mantissa of 10 bits
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with _quiet():
            program = torch.export.load(path).module()
    except BROKEN as e:
        reason = (str(e).splitlines() or [""])[0].partition(". ")[0][:120]
        raise EdgeKDError(
            f"torch cannot load {path}: {type(e).__name__}: {reason}; "
            "edgekd export --format onnx writes it again"
        ) from None
    model = program.to(profile.device)

    def run(images: np.ndarray) -> Outputs:
        # torch takes neither negative strides nor, without a warning, read-only memory
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        with torch.inference_mode():
            logits, features = model(pixels.to(profile.device))
        return Outputs(logits.cpu().numpy(), features.cpu().numpy())

    return run


def products(profile: Profile, side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The product in float32, which is all that `load` runs (runtimes.Products)."""
    if profile.threads:
        torch.set_num_threads(profile.threads)
    left, right, out = (torch.rand(side, side) for _ in range(3))
    yield "fp32", lambda: torch.mm(left, right, out=out)


def devices() -> list[str]:
    """The CPU and every CUDA device."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs its own traceback before it raises, and warns about itself."""
    log = logging.getLogger("torch.export")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before
