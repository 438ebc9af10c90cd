"""The stopwatch on another machine: edgekd and the files are copied there, timings come back.

What is sent is edgekd's own source and, of each artifact, the files that a device loads and what
timing them needs to know: no pictures, no evaluation, no path of ours.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from edgekd import __version__
from edgekd.bench.bench import How, places
from edgekd.bench.remote_side import Request
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Profile,
    Timing,
    Track,
    untracked,
)
from edgekd.remote import client
from edgekd.remote.ssh import Device, printable

NEEDED = ("numpy", "pydantic", "PIL")  # there, beside the profile's runtime
ACCURACY = "test_balanced_accuracy"  # the one metric that a Timing repeats


def bench(
    host: str,
    artifacts: Sequence[Artifact],
    profile: Profile,
    out: Path,
    how: How = How(),  # noqa: B008 it is frozen
    *,
    python: str = "python3",
    track: Track = untracked,
) -> list[Timing]:
    """As `bench.bench`, on `host`: each Timing, on the device, goes to `out`/<its folder's name>.

    python: a command there, or a path, from the home folder there. RuntimeUnavailable if the
    profile's runtime or device is not there.
    """
    folders = places(artifacts, out)
    with Device(host) as device:
        python = client.at_home(device, python)
        client.check_python(device, python, NEEDED, profile.runtime, "--host-python")
        device.put_files(client.source(), ".")
        there = [f"files/{i:03}" for i in range(len(artifacts))]
        for artifact, folder in zip(artifacts, there, strict=True):
            device.put_files(sent(artifact), folder)
        request = Request(
            artifacts=tuple(there),
            out="out",
            profile=profile.model_copy(update={"latency_table": ""}),  # a path of ours
            how=how,
        )
        said = client.ask(
            device, [python, "-m", "edgekd.bench.remote_side"], request.model_dump_json(), track
        )
        if said.error:
            raise client.error(said, f"{host}: {_ours(said.error, device, there, artifacts)}")
        timings = _checked(host, said, artifacts, profile)
    return [t.save(folder) for t, folder in zip(timings, folders, strict=True)]


def sent(artifact: Artifact) -> dict[str, Path | bytes]:
    """What is sent of an artifact: what a device loads, and a record without what timing it does
    not need: how it was judged, image by image, and the folders it was made from.
    """
    bare = artifact.model_copy(
        update={
            "files": {f: artifact.files[f] for f in artifact.deployed},
            "metrics": {k: v for k, v in artifact.metrics.items() if k == ACCURACY},
            "per_class": {},
            "evaluation": None,
            "data_fingerprint": "",
            "split_rule": "",
            "settings": {k: v for k, v in artifact.settings.items() if k == "input"},
        }
    )
    files: dict[str, Path | bytes] = {f: artifact.folder / f for f in bare.files}
    return files | {Artifact.FILE: (bare.model_dump_json(indent=1) + "\n").encode()}


def _ours(text: str, device: Device, there: Sequence[str], artifacts: Sequence[Artifact]) -> str:
    """What was said there, with the names that the folders have here."""
    for folder, artifact in zip(there, artifacts, strict=True):
        for name in (posixpath.join(device.folder, folder), folder):
            text = text.replace(name, str(artifact.folder))
    return printable(text)


def _checked(
    host: str, said: client.Said, artifacts: Sequence[Artifact], profile: Profile
) -> list[Timing]:
    """The timings, if they are of our files: what another machine says is not trusted."""
    told = said.result
    if not isinstance(told, list) or len(told) != len(artifacts):
        count = len(told) if isinstance(told, list) else 0
        raise EdgeKDError(f"{host} timed {count} files of {len(artifacts)}")
    timings = []
    for data, artifact in zip(told, artifacts, strict=True):
        timing = Timing.parse(data, host)
        expected = {
            "artifact_sha256": artifact.sha256,
            "model": artifact.model,
            "role": artifact.role,
            "precision": artifact.precision,
            "params": artifact.params,
            "macs": artifact.macs,
            "accuracy": artifact.metrics.get(ACCURACY),
            "runtime": profile.runtime,
            "device": profile.device,
            "budget": profile.budget,
        }
        if profile.runtime != "tensorrt":  # what that loads is built there, of another size
            expected["size_bytes"] = artifact.size_bytes
        for field, ours in expected.items():
            if getattr(timing, field) != ours:
                raise EdgeKDError(f"{host} timed another file than {artifact.path}: its {field}")
        if not timing.samples_ms or not re.fullmatch(r"[a-z0-9.-]+", timing.machine.name):
            raise EdgeKDError(f"{host} answers with a timing that no stopwatch of ours writes")
        versions = timing.versions | {"edgekd": __version__}  # ours ran, whichever it has
        timings.append(timing.model_copy(update={"on_device": True, "versions": versions}))
    return timings
