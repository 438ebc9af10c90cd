"""The versions of a device's folder: what each is, which one runs, and which one ran before.

DIR/current -> versions/NAME            switched by the rename of a new link
DIR/versions/NAME/previous -> ../OTHER  what it came after when it was made current
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from edgekd.bundle import bundle
from edgekd.deploy import selftest
from edgekd.records import EdgeKDError, Record, Stored, sha256

KEEP = 3  # versions, the current and the previous one among them
BUNDLE = "bundle.edgekd"
OLD = ".old-"  # what versions/ has under such a name is nobody's
CURRENT, PREVIOUS = "current", "previous"  # links


class Deployed(Stored):
    """A version that passed its self-test here."""

    FILE: ClassVar[str] = "deployed.json"
    name: str
    bundle_sha256: str
    model: str  # sha256 of the bundle's model
    profile: str
    precision: str
    edgekd: str  # version of the source beside it
    source_sha256: str
    python: str
    signer: str  # fingerprint; empty: nobody signed it
    trusted: bool  # the key was asked for
    at: str  # UTC
    selftest: selftest.SelfTest


class Version(Record):
    """A folder of versions/, as it is told of."""

    folder: str
    deployed: Deployed
    wrong: str = ""  # why it cannot be used; empty: all its bytes are right


def current(root: Path) -> str | None:
    """Name of the version that runs; None if there is none (any more)."""
    return _led(root / CURRENT, ("versions",))


def previous(root: Path) -> str | None:
    """Name of the version that the current one came after; None if there is none (any more)."""
    now = current(root)
    return None if now is None else _led(root / "versions" / now / PREVIOUS, ("..",))


def switch(root: Path, name: str) -> None:
    """Make a version current, and what was current the one before it.

    By one rename: what a version came after stands in its own folder, and is there first.
    """
    now = current(root)
    if now is not None and now != name:
        _point(root / "versions" / name / PREVIOUS, Path("..", now))
    _point(root / CURRENT, Path("versions", name))


def back(root: Path, name: str | None) -> None:
    """Make current again what was so, with what it came after."""
    if name is None:
        (root / CURRENT).unlink(missing_ok=True)
    else:
        _point(root / CURRENT, Path("versions", name))


def _point(link: Path, target: Path) -> None:
    """Have a link lead there: it is the old one or the new one, at any moment."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
    sync(link.parent)


def _led(link: Path, above: tuple[str, ...]) -> str | None:
    """Name of the version that a link leads to, by the folder `above` it."""
    try:
        target = link.readlink()
    except FileNotFoundError:
        return None
    except OSError:
        raise EdgeKDError(f"{link} is no link of ours: give another HOST:DIR") from None
    if target.parts[:-1] != above or target.name in (".", ".."):
        raise EdgeKDError(f"{link} leads to {target}, no version of ours: give another HOST:DIR")
    return target.name if (link / Deployed.FILE).is_file() else None


def prune(root: Path) -> tuple[str, ...]:
    """Remove all but KEEP versions, the oldest first, and environments that none of them uses."""
    held = [current(root), previous(root)]
    others = [v for v in names(root) if v not in held]
    gone = others[max(0, KEEP - len({*held} - {None})) :]
    for name in gone:  # renamed first: what is half removed is no version
        _remove(root / "versions" / name)
    used = {Path(sys.executable)}
    for name in names(root):
        with contextlib.suppress(EdgeKDError):
            used.add(Path(Deployed.load(root / "versions" / name).python))
    for venv in root.glob("venv-*"):
        if not any(venv in p.parents for p in used):
            shutil.rmtree(venv, ignore_errors=True)
    return tuple(gone)


def _remove(folder: Path) -> None:
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=OLD))
    folder.rename(old / "x")
    shutil.rmtree(old, ignore_errors=True)


def names(root: Path) -> list[str]:
    """Names of the versions, the newest first."""
    found = []
    for path in (root / "versions").glob("[!.]*"):
        at = ""  # of a damaged one: it is the first to go
        with contextlib.suppress(EdgeKDError):
            at = Deployed.load(path).at
        found.append((at, path.stat().st_mtime, path.name))
    return [name for _, _, name in sorted(found, reverse=True)]


def told(root: Path, name: str) -> Version:
    """A version, every byte of it checked."""
    folder = root / "versions" / name
    return Version(folder=name, deployed=Deployed.load(folder), wrong=wrong(folder))


def wrong(folder: Path) -> str:
    """What is not as it was deployed, in words; empty if nothing."""
    try:
        deployed = Deployed.load(folder)
        if sha256(folder / BUNDLE) != deployed.bundle_sha256:
            return f"{BUNDLE} was changed"
        inside = folder / bundle.UNPACKED
        for name, digest in bundle.Manifest.load(inside).files.items():
            if sha256(inside / name) != digest:
                return f"{name} was changed"
        bundle.loaded(inside)
        if source_sha256(folder / "src" / "edgekd") != deployed.source_sha256:
            return "edgekd's source was changed"
        if not Path(deployed.python).exists():
            return f"there is no {deployed.python}"
    except (OSError, EdgeKDError) as e:
        return str(e).replace(f"{folder}/", "")
    return ""


def sources(package: Path) -> list[Path]:
    """Files of a copy of edgekd."""
    return sorted(p for p in package.rglob("*") if p.is_file() and p.parent.name != "__pycache__")


def source_sha256(package: Path) -> str:
    """Of every file of a copy of edgekd, and where it lies."""
    found = hashlib.sha256()
    for path in sources(package):
        found.update(f"{path.relative_to(package).as_posix()} {sha256(path)}\n".encode())
    return found.hexdigest()


def sync(path: Path) -> None:
    """To the disk, a file or a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
