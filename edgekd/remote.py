"""The stopwatch on another machine: edgekd and the files are copied there, timings come back.

What is sent is edgekd's own source and, of each artifact, the files that a device loads and what
timing them needs to know: no pictures, no evaluation, no path of ours.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from edgekd import __version__
from edgekd.bench import How, places
from edgekd.bench_there import READY, Request, Said
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Profile,
    RuntimeUnavailable,
    Timing,
    Track,
    untracked,
)
from edgekd.ssh import Device, printable

NEEDED = ("numpy", "pydantic", "PIL")  # there, beside the profile's runtime
OLDEST = (3, 10)
LARGEST = 64_000_000  # bytes of a line that is taken from a device
SOURCE = (".py", ".j2", ".json", ".toml")
ACCURACY = "test_balanced_accuracy"  # the one metric that a Timing repeats
# Any Python, even 2, can run it.
PROBE = """import sys
print('edgekd-python %d %d' % sys.version_info[:2])
if sys.version_info >= (3, 10):
    from importlib.util import find_spec
    print('edgekd-missing ' + ' '.join(n for n in sys.argv[1:] if find_spec(n) is None))
"""


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
        if "/" in python:
            python = posixpath.join(device.home, python.removeprefix("~/"))
        _check(device, python, profile)
        device.put_files(source(), ".")
        there = [f"files/{i:03}" for i in range(len(artifacts))]
        for artifact, folder in zip(artifacts, there, strict=True):
            device.put_files(sent(artifact), folder)
        request = Request(
            artifacts=tuple(there),
            out="out",
            profile=profile.model_copy(update={"latency_table": ""}),  # a path of ours
            how=how,
        )
        said = _ask(device, python, request, track)
        if said.error:
            error = RuntimeUnavailable if said.unavailable else EdgeKDError
            raise error(f"{host}: {_ours(said.error, device, there, artifacts)}")
        timings = _checked(host, said, artifacts, profile)
    return [t.save(folder) for t, folder in zip(timings, folders, strict=True)]


def source() -> dict[str, Path | bytes]:
    """Files of the package itself, by their path in a folder that Python imports from."""
    package = Path(__file__).parent
    return {
        f"edgekd/{path.relative_to(package).as_posix()}": path
        for path in sorted(package.rglob("*"))
        if path.suffix in SOURCE and path.is_file()
    }


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


def _check(device: Device, python: str, profile: Profile) -> None:
    """EdgeKDError unless the Python there is new enough and has what the stopwatch needs."""
    done = device.run([python, "-c", PROBE, *NEEDED, profile.runtime])
    told = done.stdout.decode("utf-8", "replace")
    version = re.search(r"^edgekd-python (\d+) (\d+)$", told, re.MULTILINE)
    other = "or name another Python there with --host-python"
    if version is None:
        words = printable(done.stderr.decode("utf-8", "replace")) or "it said nothing"
        raise EdgeKDError(f"{device.host} has no Python {python} ({words}): install it, {other}")
    if tuple(map(int, version.groups())) < OLDEST:
        raise EdgeKDError(
            f"{python} on {device.host} is Python {'.'.join(version.groups())}, "
            f"{'.'.join(map(str, OLDEST))} is needed: install it, {other}"
        )
    found = re.search(r"^edgekd-missing(.*)$", told, re.MULTILINE)
    missing = found[1].split() if found else [*NEEDED, profile.runtime]
    if missing:
        error = RuntimeUnavailable if profile.runtime in missing else EdgeKDError
        needed = ", ".join(NEEDED) + f" and {profile.runtime}"
        packages = " ".join(missing).replace("PIL", "pillow")
        install = f"{python} -m pip install {packages}"
        raise error(
            f"{needed} are needed on {device.host}, no {' and no '.join(missing)} is there: "
            f"{install} there, {other}"
        )


def _ask(device: Device, python: str, request: Request, track: Track) -> Said:
    """The last word of the stopwatch there; bars move meanwhile."""
    with device.start([python, "-m", "edgekd.bench_there"]) as (process, errors):
        assert process.stdin is not None  # pipes, both
        assert process.stdout is not None
        try:
            process.stdin.write(request.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise device.failed("does not measure", process, errors) from None
        said = follow(Lines(process.stdout, device.host), track)
        if said is None:
            raise device.failed("stopped measuring", process, errors)
        return said


class Lines:
    """What a device says, line by line; one that was read too early can be put back."""

    def __init__(self, stream: IO[bytes], host: str) -> None:
        self.stream, self.host = stream, host
        self.begun = False
        self.held: list[Said] = []

    def __iter__(self) -> Iterator[Said]:
        """Each line once; EdgeKDError for one that is not ours."""
        while self.held or (line := self.stream.readline(LARGEST)):
            if self.held:
                yield self.held.pop()
            elif self.begun:
                yield self._said(line)
            else:  # a login shell may have its say first
                self.begun = line.strip() == READY.encode()

    def _said(self, line: bytes) -> Said:
        try:
            return Said.model_validate(json.loads(line))
        except (ValueError, RecursionError):  # of JSON, Unicode and pydantic
            snippet = printable(line[:80].decode("utf-8", "replace"))
            raise EdgeKDError(f'{self.host} says "{snippet}", not a line of edgekd\'s') from None


def follow(lines: Lines, track: Track) -> Said | None:
    """Show the bars that are told of; the error or the timings at the end, None if none came."""
    for said in lines:
        if said.begin:
            for _ in track(_steps(lines), printable(said.begin), said.total):
                pass
        elif said.error or said.timings is not None:
            return said
    return None


def _steps(lines: Lines) -> Iterator[SimpleNamespace]:
    """An item, of a `size`, for each step of the bar that has begun."""
    for said in lines:
        if said.step is None:
            if not said.end:
                lines.held.append(said)
            return
        yield SimpleNamespace(size=said.step)


def _ours(text: str, device: Device, there: Sequence[str], artifacts: Sequence[Artifact]) -> str:
    """What was said there, with the names that the folders have here."""
    for folder, artifact in zip(there, artifacts, strict=True):
        for name in (posixpath.join(device.folder, folder), folder):
            text = text.replace(name, str(artifact.folder))
    return printable(text)


def _checked(
    host: str, said: Said, artifacts: Sequence[Artifact], profile: Profile
) -> list[Timing]:
    """The timings, if they are of our files: what another machine says is not trusted."""
    told = said.timings or ()
    if len(told) != len(artifacts):
        raise EdgeKDError(f"{host} timed {len(told)} files of {len(artifacts)}")
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
            "size_bytes": artifact.size_bytes,
            "accuracy": artifact.metrics.get(ACCURACY),
            "runtime": profile.runtime,
            "device": profile.device,
            "budget": profile.budget,
        }
        for field, ours in expected.items():
            if getattr(timing, field) != ours:
                raise EdgeKDError(f"{host} timed another file than {artifact.path}: its {field}")
        if not timing.samples_ms or not re.fullmatch(r"[a-z0-9.-]+", timing.machine.name):
            raise EdgeKDError(f"{host} answers with a timing that no stopwatch of ours writes")
        versions = timing.versions | {"edgekd": __version__}  # ours ran, whichever it has
        timings.append(timing.model_copy(update={"on_device": True, "versions": versions}))
    return timings
