"""What a device needs before anything is installed on it: the lock, uploads that go on where they
stopped, and an environment made from wheels. Standard library alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgekd.remote import protocol

SILENCE_SECONDS = 120  # without a byte: whoever sends is gone, and the lock is another's
PIECE = 1 << 18  # bytes
SPARE = 16 << 20  # bytes that a device's disk keeps
LOCK = ".lock"
INCOMING = "incoming"
MADE = "edgekd-made"  # in an environment that is whole


class Refused(Exception):
    """The user can fix this; the message says how, in one line."""


class Sent(NamedTuple):
    """A file that the workstation announces."""

    name: str  # within the folder of uploads
    size: int  # bytes
    sha256: str


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Nobody else deploys to `root` meanwhile; Refused if somebody does.

    The kernel lets go of it when the process ends, however it does: a lock is never stale.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise Refused(f"cannot write to {root}: {e.strerror}; give another HOST:DIR") from None
    try:
        if os.fstatvfs(file).f_flag & os.ST_NOEXEC:
            raise Refused(
                f"nothing in {root} may be run (its file system is mounted noexec): give another "
                "HOST:DIR"
            )
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                raise Refused(f"{root} cannot be locked: {e.strerror}") from None
            who = os.read(file, 100).decode("utf-8", "replace").strip() or "no number known"
            raise Refused(
                f"another deployment to {root} is under way ({who}): wait for it, or end that "
                "process there"
            ) from None
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} since {time.strftime('%H:%M:%S')}\n".encode())
        yield
    finally:
        os.close(file)


def busy(root: Path) -> bool:
    """Whether somebody deploys to `root` just now."""
    try:
        file = os.open(root / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def receive(folder: Path, files: Sequence[Sent], say: protocol.Say, needed: int = 0) -> None:
    """Have all `files` in `folder`, from stdin as far as they are not there yet.

    An upload that was cut off goes on; what is there of others is removed. needed: bytes that must
    be free beside it. Refused if the disk is full, or for a file that is not what was announced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other.is_file() and other.name.removesuffix(".part") not in {f.name for f in files}:
            other.unlink()
    begins = [_here(folder, f) for f in files]
    rest = sum(f.size - at for f, at in zip(files, begins, strict=True))
    free = shutil.disk_usage(folder).free
    if free < rest + needed + SPARE:
        raise Refused(
            f"no room in {folder.parent}: {(rest + needed + SPARE) / 1e6:.0f} MB are needed, "
            f"{free / 1e6:.0f} MB are free"
        )
    say(send=begins)
    for file, at in zip(files, begins, strict=True):
        _receive(folder / file.name, file, at)


def _here(folder: Path, file: Sent) -> int:
    """How many bytes of a file are there."""
    whole, part = folder / file.name, folder / f"{file.name}.part"
    if whole.is_file() and whole.stat().st_size == file.size:
        return file.size
    whole.unlink(missing_ok=True)
    if part.is_file() and part.stat().st_size <= file.size:
        return part.stat().st_size
    part.unlink(missing_ok=True)
    return 0


def _receive(path: Path, file: Sent, at: int) -> None:
    """The rest of one file; it has its name once its hash is right."""
    part = path.with_name(f"{path.name}.part")
    if not path.is_file():
        with full_is_refused(path.parent, part), part.open("ab", buffering=0) as out:
            left = file.size - at
            while left:
                left -= _all(out, _bytes(min(left, PIECE)))
            os.fsync(out.fileno())
    here = path if path.is_file() else part
    if digest(here) != file.sha256:
        here.unlink()
        raise Refused(
            f"what arrived of {file.name[:40]} is not what was sent (sha256 differs) and was "
            "removed: the same command sends it again"
        )
    here.replace(path)


def _all(out: Any, data: bytes) -> int:
    """Write all of it, which a file without a buffer may do in parts."""
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
    return len(data)


def _bytes(most: int) -> bytes:
    """Some bytes of stdin; Refused if none come any more."""
    ready, _, _ = select.select([0], [], [], SILENCE_SECONDS)
    data = os.read(0, most) if ready else b""
    if not data:
        raise Refused("the connection ended before all was copied: the same command goes on")
    return data


@contextlib.contextmanager
def full_is_refused(where: Path, part: Path | None = None) -> Iterator[None]:
    """A full disk within is Refused, and `part` removed: what runs here needs the room."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if part is not None:
            part.unlink(missing_ok=True)
        raise Refused(f"no room in {where} ({e.strerror}): nothing was changed") from None


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def environment(
    root: Path, key: str, wheels: Sequence[Sent], wanted: str, say: protocol.Say, *, system: bool
) -> str:
    """The Python of `root`/venv-`key`, which has the packages `wanted`; made if it is not there.

    wanted: lines of a requirements.txt. Without a network: from `wheels` alone. system: it sees
    what the device came with, too, as JetPack's TensorRT.
    """
    folder = root / f"venv-{key}"
    python = folder / "bin" / "python"
    if (folder / MADE).is_file():
        say(send=[w.size for w in wheels])  # nothing
        return str(python)
    house = root / INCOMING / "wheels"
    receive(house, wheels, say, needed=4 * sum(w.size for w in wheels))  # unpacked, as a rule
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    say(begin="environment", total=None)
    with full_is_refused(root):
        with_system = ["--system-site-packages"] if system else []
        _run([sys.executable, "-m", "venv", *with_system, str(folder)], "makes no environment")
        (folder / "wanted.txt").write_text(wanted)
        pip = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        offline = ["--no-index", "--find-links", str(house)]
        _run([*pip, *offline, "-r", str(folder / "wanted.txt")], "cannot install the wheels")
        os.sync()
        (folder / MADE).touch()
    shutil.rmtree(house)
    say(end=True)
    return str(python)


def _run(command: list[str], failed: str) -> None:
    """Refused with its last words if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [x.strip() for x in done.stdout.splitlines() if x.strip()]
        said = next((x for x in lines if x.startswith("ERROR:")), lines[-1] if lines else "?")
        raise Refused(f"{sys.executable} {failed}: {said[:300]}")


def _answer(line: bytes, say: protocol.Say) -> str:
    """The path of the environment's Python; once the wheels are here it needs no connection."""
    try:
        asked = json.loads(line)
        wheels = [Sent(*w) for w in asked["wheels"]]
        root, key, wanted = Path(asked["root"]), asked["key"], asked["wanted"]
        system = bool(asked["system"])
    except (ValueError, KeyError, TypeError):  # cut off, or of another edgekd
        raise Refused("not a request") from None
    with locked(root):
        return environment(root, key, wheels, wanted, say, system=system)


if __name__ == "__main__":
    sys.exit(protocol.answer(_answer, Refused))
