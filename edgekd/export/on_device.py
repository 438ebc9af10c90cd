"""What a device makes of an ONNX file by itself, where a runtime compiles for one device alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd import runtimes
from edgekd.records import Artifact, Kind, Profile, sha256

KINDS: dict[str, Kind] = {"openvino": "openvino", "onnxruntime": "onnx", "torch": "torch",
                          "tensorrt": "tensorrt"}  # fmt: skip


def build_artifact(
    model: Artifact, source: Artifact, profile: Profile, out: Path, *more: str
) -> Artifact:
    """`model` as the profile's device loads it, built here of the ONNX `source` into folder `out`.

    more: files in `out` that belong to it, too.
    """
    files = [p.name for p in runtimes.get(profile.runtime).build(source.path, out, profile)]
    update: dict[str, Any] = {
        "kind": KINDS[profile.runtime],
        "files": {name: sha256(out / name) for name in (*files, *more)},
        "parents": {source.kind: source.sha256},
    }
    return model.model_copy(update=update).save(out)
