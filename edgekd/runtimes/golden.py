"""Golden samples: pictures kept with a file, and what it answered when it was made.

On another machine the same file in the same precision must say the same to within rounding. The
pictures are drawn, no patient's. Needs no torch.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekd.data import preprocess
from edgekd.records import Artifact, EdgeKDError, Record, Spec, write_atomic
from edgekd.runtimes import NotFinite, Outputs, Session

FILE = "golden.npz"  # pixels (n, H, W, 3) uint8, logits, features, tolerance
COUNT = 3
LARGEST = 256_000_000  # bytes, unpacked
# Largest difference of an output, of the largest value: another machine's kernels add up in another
# order, and one rounding that falls the other way is one step of the precision.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 5e-2}


class Verified(Record):
    """How a file's answers to its golden samples differ here from those it was stored with."""

    runtime: str
    device: str
    logits: float | None  # largest difference, of the largest logit (at least 1); None: NaN
    features: float | None
    predictions: int  # samples that are answered otherwise
    tolerance: float
    ok: bool


class Golden(NamedTuple):
    """What is in the file."""

    pixels: np.ndarray
    outputs: Outputs
    tolerance: float


def pictures(spec: Spec) -> np.ndarray:
    """(COUNT, H, W, 3) uint8: phantoms of each kind, as `spec` wants them."""
    from PIL import Image

    from edgekd.data import phantom

    side = max(spec.size)
    drawn = [phantom.film(label, i, size=side, seed=0)[0] for i, label in
             enumerate(phantom.CLASSES)]  # fmt: skip
    return np.stack([preprocess.pixels(Image.fromarray(x), spec) for x in drawn[:COUNT]])


def write(folder: Path, session: Session, spec: Spec, precision: str) -> str:
    """Ask the finished file; returns the name of what was written into `folder`."""
    pixels = pictures(spec)
    said = session(preprocess.normalise(pixels, spec))
    with io.BytesIO() as buffer:
        np.savez_compressed(
            buffer, pixels=pixels, logits=said.logits, features=said.features,
            tolerance=np.float64(TOLERANCE[precision]),
        )  # fmt: skip
        write_atomic(folder / FILE, buffer.getvalue())
    return FILE


def read(artifact: Artifact) -> Golden:
    """The artifact's golden samples, whose hash was checked when it was loaded."""
    if FILE not in artifact.files:
        raise EdgeKDError(f"{artifact.folder} has no golden samples: export it again")
    path = artifact.folder / FILE
    try:
        with zipfile.ZipFile(path) as parts:
            size = sum(p.file_size for p in parts.infolist())
        if size > LARGEST:
            raise EdgeKDError(f"{path} unpacks to {size} bytes, over {LARGEST}: export it again")
        with np.load(path, allow_pickle=False) as stored:
            outputs = Outputs(stored["logits"], stored["features"])
            return Golden(stored["pixels"], outputs, float(stored["tolerance"]))
    except (OSError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split())[:120]
        raise EdgeKDError(f"{path} holds no golden samples: {reason}; export it again") from None


def verify(artifact: Artifact, session: Session, runtime: str, device: str) -> Verified:
    """The file's golden samples through `session`, which has it open."""
    kept = read(artifact)
    try:
        said = session(preprocess.normalise(kept.pixels, artifact.spec))
    except NotFinite:
        other = len(kept.pixels)
        return Verified(runtime=runtime, device=device, logits=None, features=None,
                        predictions=other, tolerance=kept.tolerance, ok=False)  # fmt: skip
    errors = []
    for now, then in zip(said, kept.outputs, strict=True):
        if now.shape != then.shape:
            raise EdgeKDError(f"{artifact.path} answers {now.shape}, stored is {then.shape}")
        errors.append(float(np.abs(now - then).max()) / max(1.0, float(np.abs(then).max())))
    other = int((said.logits.argmax(1) != kept.outputs.logits.argmax(1)).sum())
    ok = all(e <= kept.tolerance for e in errors) and other == 0  # NaN is not <=
    logits, features = (e if np.isfinite(e) else None for e in errors)
    return Verified(runtime=runtime, device=device, logits=logits, features=features,
                    predictions=other, tolerance=kept.tolerance, ok=ok)  # fmt: skip
