"""Which layers of an INT8 file cost the most? They go back to FP32 until the file holds.

A layer's cost is what is won by sparing it alone: the file is made once more with that layer in
FP32, and its answers and feature maps are compared with FP32's. That is a file a layer, so minutes,
and it is done only where an INT8 file that is out would be the fastest.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from edgekd import runtimes
from edgekd.export import graphs
from edgekd.metrics.calibration import log_softmax
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Journal,
    NoRoom,
    Profile,
    Track,
    make_folder,
    untracked,
)
from edgekd.runtimes import Outputs, Session

IMAGES = 32  # that files are compared on
CALIBRATION = 32  # images for the files that are only compared
MOST = 0.5  # share of the layers in FP32 beyond which INT8 is not worth it
NAMED = 5  # costly layers of a file that could not be mended
COSTS = "costs.jsonl"  # of layers, as they are found

T = TypeVar("T")
Make = Callable[[Sequence[str], np.ndarray, Path], Artifact]  # (layers kept, images, folder)


class Cost(NamedTuple):
    """Of one layer in INT8: what the file's error would be without it."""

    layer: str
    left: float  # error of the file that spares it; lower: it costs more


def repair(
    source: Artifact,
    profile: Profile,
    make: Make,
    holds: Callable[[Artifact], T | None],
    images: np.ndarray,
    calibration: np.ndarray,
    out: Path,
    *,
    track: Track = untracked,
) -> T:
    """What `holds` says of the first file in `out` that does; EdgeKDError if none of them does.

    source: FP32 ONNX. make: an INT8 file with some layers kept. images, calibration: (n, 3, H, W)
    float32. 1, 2, 4, ... of the layers are kept, those that cost the most first.
    """
    costs = sensitivity(
        source, profile, make, images, calibration, make_folder(out) / COSTS, track=track
    )
    count = 1
    while count <= MOST * len(costs):
        made = make([c.layer for c in costs[:count]], calibration, out)
        found = holds(made)
        if found is not None:
            return found
        count *= 2
    (out / Artifact.FILE).unlink(missing_ok=True)
    worst = ", ".join(c.layer for c in costs[:NAMED])
    raise EdgeKDError(
        f"not mended by {count // 2} of {len(costs)} layers in FP32; those that cost most: {worst}"
    )


def sensitivity(
    source: Artifact,
    profile: Profile,
    make: Make,
    images: np.ndarray,
    calibration: np.ndarray,
    log: Path,
    *,
    track: Track = untracked,
) -> list[Cost]:
    """Every layer of the ONNX file, the one whose INT8 costs the most first.

    log: where what is found is kept, layer by layer; an interrupted search goes on from there.
    """
    names = graphs.layers(source.path)
    few, calibration = images[:IMAGES], calibration[:CALIBRATION]
    digest = hashlib.sha256(few.tobytes() + calibration.tobytes()).hexdigest()
    journal = Journal(log, {"source": source.sha256, "images": digest,
                            "profile": profile.model_dump(mode="json")})  # fmt: skip
    reference = Profile(name="reference", runtime="onnxruntime", device="CPU")
    right = _whole(runtimes.open_session(source, reference), few)
    left = names[len(journal.done) :]
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        for name in track(left, "finding costly layers", len(left)):
            try:
                made = make([name], calibration, Path(folder) / "one")
            except NoRoom:
                raise
            except EdgeKDError:  # an engine that cannot spare this one
                journal.add(None)
                continue
            session = runtimes.open_session(made, profile)
            journal.add(error(right, _whole(session, few)))
    found = [Cost(n, x) for n, x in zip(names, journal.done, strict=True) if x is not None]
    return sorted(found, key=lambda c: c.left)


def _whole(session: Session, images: np.ndarray) -> Outputs:
    parts = [session(images[i : i + 8]) for i in range(0, len(images), 8)]
    return Outputs(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def error(right: Outputs, other: Outputs) -> float:
    """Kullback-Leibler divergence of the answers plus the features' relative squared error."""
    p, q = log_softmax(right.logits), log_softmax(other.logits)
    divergence = float((np.exp(p) * (p - q)).sum(1).mean())
    power = float(np.square(right.features).mean())
    noise = float(np.square(right.features - other.features).mean())
    return divergence + (noise / power if power else 0.0)
