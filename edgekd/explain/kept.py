"""What was asked of a model is kept beside its file: names by what it depends on, whole or not."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.records import Artifact, Profile, write_atomic


def digest(told: Any) -> str:
    """16 hex digits of plain data, for the name of a file or folder."""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def identity(artifact: Artifact, profile: Profile) -> list[Any]:
    """Of a model that is asked: everything about it that its answers depend on."""
    return [artifact.sha256, artifact.precision, artifact.spec.model_dump(mode="json"),
            profile.runtime, profile.device, profile.options]  # fmt: skip


def write_arrays(path: Path, arrays: dict[str, np.ndarray], *, compressed: bool = False) -> None:
    """Write arrays as .npz, whole or not at all."""
    write = np.savez_compressed if compressed else np.savez
    with io.BytesIO() as buffer:
        write(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy, whole or not at all."""
    with io.BytesIO() as buffer:
        np.save(buffer, array)
        write_atomic(path, buffer.getvalue())
