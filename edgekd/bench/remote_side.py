"""The device's side of `edgekd bench --host`: timings of the artifacts that are asked for.

It needs numpy, pydantic and the profile's runtime. It ends with its stdin, so that nothing goes on
there when the connection is gone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekd import runtimes
from edgekd.bench import bench
from edgekd.export.on_device import build_artifact
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Profile,
    Record,
    RuntimeUnavailable,
    Timing,
    Track,
    make_folder,
)
from edgekd.remote import protocol


class Request(Record):
    """What is asked for: `bench.bench` of these folders, of what is built where it must be."""

    artifacts: tuple[str, ...]
    out: str
    profile: Profile
    how: bench.How


def serve(request: Request, track: Track) -> list[Timing]:
    """The timings that are asked for; RuntimeUnavailable if this is not the profile's device."""
    profile = request.profile
    if not runtimes.here(profile):
        seen = ", ".join(runtimes.get(profile.runtime).devices())
        raise RuntimeUnavailable(f"{profile.runtime} has no device {profile.device}, only {seen}")
    sent = [Artifact.load(Path(folder)) for folder in request.artifacts]
    ready = list(sent)
    todo = [i for i, a in enumerate(sent) if _must_be_built(a, profile)]
    for i in track(todo, "building", len(todo)) if todo else ():
        ready[i] = _built(sent[i], profile)
    timings = bench.bench(
        ready, profile, Path(request.out), request.how, on_device=True, track=track
    )  # fmt: skip
    return [t.model_copy(update={"artifact_sha256": a.sha256})
            for t, a in zip(timings, sent, strict=True)]  # fmt: skip


def _must_be_built(artifact: Artifact, profile: Profile) -> bool:
    """Whether it is ONNX of which this device makes what it loads."""
    return artifact.path.suffix == ".onnx" and runtimes.must_be_built(artifact, profile)


def _built(artifact: Artifact, profile: Profile) -> Artifact:
    """What this device makes of an ONNX file, beside it."""
    out = artifact.folder.with_name(f"{artifact.folder.name}-built")
    return build_artifact(artifact, artifact, profile, make_folder(out))


def _answer(line: bytes, say: protocol.Say) -> list[dict[str, Any]]:
    protocol.end_with_stdin()
    try:
        request = Request.model_validate_json(line)
    except ValidationError as e:  # cut off, or of another edgekd
        raise EdgeKDError(f"not a request: {e.error_count()} mistakes") from None
    return [t.model_dump(mode="json") for t in serve(request, protocol.telling(say))]


if __name__ == "__main__":
    sys.exit(protocol.answer(_answer, EdgeKDError, (RuntimeUnavailable,)))
