"""The workstation's end of a conversation with a device over ssh: bars move, then an answer.

What is sent beside the request is edgekd's own source. What a device says is not trusted.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from edgekd.records import EdgeKDError, Record, RuntimeUnavailable, Track
from edgekd.remote.protocol import READY
from edgekd.remote.ssh import Device, printable

OLDEST = (3, 10)
LARGEST = 64_000_000  # bytes of a line that is taken from a device
PIECE = 1 << 18  # bytes that are sent at a time
SOURCE = (".py", ".j2", ".json", ".toml", ".html", ".css", ".js")
# Any Python, even 2, can run it.
PROBE = """import platform, sys
print('edgekd-python %d %d %s' % (sys.version_info[:2] + (platform.machine(),)))
if sys.version_info >= (3, 10):
    from importlib.util import find_spec
    wanted = sys.argv[1:] + (['tomli'] if sys.version_info < (3, 11) else [])
    print('edgekd-missing ' + ' '.join(n for n in wanted if find_spec(n) is None))
"""


class Said(Record):
    """One line of a device's answer: a bar begins, moves or ends, bytes are wanted, or the last."""

    begin: str = ""
    total: int | None = None
    step: int | None = None
    end: bool = False
    send: tuple[int, ...] | None = None  # from which byte on each announced file is wanted
    error: str = ""
    unavailable: bool = False  # the error is a RuntimeUnavailable
    result: Any = None


class Python(NamedTuple):
    """An interpreter on a device."""

    version: str  # "3.11"
    machine: str  # "aarch64"
    missing: tuple[str, ...]  # of the modules that were asked about


def source() -> dict[str, Path | bytes]:
    """Files of the package itself, by their path in a folder that Python imports from."""
    package = Path(__file__).parents[1]
    return {
        f"edgekd/{path.relative_to(package).as_posix()}": path
        for path in sorted(package.rglob("*"))
        if path.suffix in SOURCE and path.is_file()
    }


def at_home(device: Device, python: str) -> str:
    """A command as it is, a path from the home folder there."""
    return device.from_home(python.removeprefix("~/")) if "/" in python else python


def probe(device: Device, python: str, modules: Sequence[str], option: str) -> Python:
    """The Python there; EdgeKDError unless it is new enough. option: that names another one."""
    done = device.run([python, "-c", PROBE, *modules])
    told = done.stdout.decode("utf-8", "replace")
    version = re.search(r"^edgekd-python (\d+) (\d+) ?(\w*)$", told, re.MULTILINE)
    other = f"or name another Python there with {option}"
    if version is None:
        words = printable(done.stderr.decode("utf-8", "replace")) or "it said nothing"
        raise EdgeKDError(f"{device.host} has no Python {python} ({words}): install it, {other}")
    number = f"{version[1]}.{version[2]}"
    if (int(version[1]), int(version[2])) < OLDEST:
        raise EdgeKDError(
            f"{python} on {device.host} is Python {number}, "
            f"{'.'.join(map(str, OLDEST))} is needed: install it, {other}"
        )
    found = re.search(r"^edgekd-missing(.*)$", told, re.MULTILINE)
    return Python(number, version[3], tuple(found[1].split() if found else modules))


def check_python(
    device: Device,
    python: str,
    needed: Sequence[str],
    runtime: str,
    option: str,
    more: Callable[[Python], str] = lambda _: "",
) -> Python:
    """The Python there; EdgeKDError unless it has what is needed, RuntimeUnavailable if it is the
    runtime that it has not. more: what else can be done about it.
    """
    found = probe(device, python, [*needed, runtime], option)
    if found.missing:
        kind = RuntimeUnavailable if runtime in found.missing else EdgeKDError
        packages = " ".join(found.missing).replace("PIL", "pillow")
        raise kind(
            f"{', '.join(needed)} and {runtime} are needed on {device.host}, "
            f"no {' and no '.join(found.missing)} is there: {python} -m pip install {packages} "
            f"there, or name another Python there with {option}{more(found)}"
        )
    return found


def ask(
    device: Device,
    command: Sequence[str],
    request: str,
    track: Track,
    files: Sequence[Path] = (),
    what: str = "measure",
) -> Said:
    """The last word of a command there that answers as `protocol.answer` does; bars move meanwhile.

    files: what it may ask for, each from some byte on.
    """
    with device.start(command) as (process, errors):
        assert process.stdin is not None  # pipes, both
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what did not listen has said why
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
        lines = Lines(process.stdout, device.host)
        said = follow(lines, track)
        if said is not None and said.send is not None:
            _feed(process.stdin, files, said.send, track)
            said = follow(lines, track)
        if said is None:
            raise device.failed(f"did not {what}", process, errors)
        return said


def _feed(stream: IO[bytes], files: Sequence[Path], begins: Sequence[int], track: Track) -> None:
    """Write each file from where it is wanted on; who stops listening has said why."""
    rest = sum(f.stat().st_size - at for f, at in zip(files, begins, strict=True))
    pieces = track(_pieces(files, begins), "copying, kB", rest // 1000)
    with contextlib.suppress(BrokenPipeError):
        for piece in pieces:
            stream.write(piece.data)
        stream.flush()


def _pieces(files: Sequence[Path], begins: Sequence[int]) -> Iterator[SimpleNamespace]:
    for path, at in zip(files, begins, strict=True):
        try:
            with path.open("rb") as f:
                f.seek(at)
                while data := f.read(PIECE):
                    yield SimpleNamespace(data=data, size=len(data) / 1000)
        except OSError as e:
            raise EdgeKDError(f"cannot read {path}: {e.strerror or e}") from None


def error(said: Said, text: str) -> EdgeKDError:
    """What a device's last word is raised as."""
    return (RuntimeUnavailable if said.unavailable else EdgeKDError)(text)


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
    """Show the bars that are told of; what comes after: files are wanted, the error or the result;
    None if nothing came.
    """
    for said in lines:
        if said.begin:
            for _ in track(_steps(lines), printable(said.begin), said.total):
                pass
        elif said.error or said.send is not None or said.result is not None:
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
