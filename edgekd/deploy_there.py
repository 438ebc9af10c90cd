"""The device's side of `edgekd deploy`: check, unpack, test, then switch; or go back, or tell.

    DIR/current -> versions/NAME-HASH    switched by the rename of a new link, never before its test
    DIR/previous -> versions/...         where `--rollback` goes
    DIR/versions/NAME-HASH/              bundle.edgekd, src/, edgekd, deployed.json
    DIR/versions/NAME-HASH/unpacked/     what is in the bundle, and what was built of it
    DIR/incoming/                        uploads that are not finished
    DIR/venv-KEY/, cache/, edgekd.service

A version is unpacked and tested under another name and gets its own by a rename: whatever ends
this process, a folder in versions/ is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from edgekd import __version__, bundle, deploy_env, selftest, service, there
from edgekd.records import EdgeKDError, Record, RuntimeUnavailable, Stored, sha256, write_atomic

KEEP = 3  # versions, the current and the previous one among them
SECONDS = 3600  # that a self-test may take: an engine is built in it
BUNDLE = "bundle.edgekd"
HALF, OLD = ".new-", ".old-"  # what versions/ has under such names is nobody's
ROOM = 3  # times the bundle's size: the file, its content, what is built of it


class Request(Record):
    """What is asked for."""

    command: Literal["install", "rollback", "status"]
    root: str  # absolute
    size: int = 0  # bytes of the bundle
    sha256: str = ""
    key: str = ""  # text of the public key that must have signed it; empty: any or none


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


class Answer(Record):
    """What is deployed now."""

    root: str
    changed: bool
    current: Version
    previous: Version | None = None
    others: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    busy: bool = False  # somebody deploys just now
    service: str = ""  # systemd's word
    next: tuple[str, ...] = ()  # commands for the administrator
    notes: tuple[str, ...] = ()


def install(root: Path, request: Request, say: there.Say) -> Answer:
    """Deploy the bundle that stdin brings; nothing that is current changes before the last step."""
    _clean(root)
    key = Path("trusted.pub").resolve() if request.key else None
    if key is not None:
        key.write_text(request.key)
    name = _found(root, request, key)
    if name is not None:
        say(send=[request.size])  # nothing
        there.end_with_stdin()
        if name == _linked(root, "current"):
            return _answered(root, changed=False)
        test(root / "versions" / name, root, sys.executable)
        return _switched(root, name)
    announced = deploy_env.Sent(request.sha256, request.size, request.sha256)
    upload = root / deploy_env.INCOMING / request.sha256
    deploy_env.receive(upload.parent, [announced], say, needed=ROOM * request.size)
    there.end_with_stdin()
    track = there.telling(say)
    with _full_is_told(root), _half(root) as half:
        whole = half / "whole"
        for step in track(("unpack", "test"), "deploying"):
            if step == "unpack":
                found = bundle.extract(upload, whole / bundle.UNPACKED, key)
                name = _free(root, f"{_plain(found.manifest.name)}-{request.sha256[:12]}")
                _add(whole, upload, root / "versions" / name)
            else:
                tested = test(whole, root, sys.executable)
        assert name is not None  # unpacked
        _finish(whole, found, request.sha256, tested)
        whole.rename(root / "versions" / name)
        _sync(root / "versions")
    answer = _switched(root, name)
    upload.unlink()
    return answer


def _switched(root: Path, name: str) -> Answer:
    """A version that was tested becomes the current one; if the service does not start with it,
    what was current is so again.
    """
    before = {link: _linked(root, link) for link in ("current", "previous")}
    with _full_is_told(root):
        steps = service.write(root, Deployed.load(root / "versions" / name).python)
        switch(root, name)
    up = service.restart(root)
    if up is False and before["current"] is not None:
        for link, old in before.items():
            if old is None:
                (root / link).unlink(missing_ok=True)
            else:
                _link(root, link, old)
        service.restart(root)
        raise EdgeKDError(
            f"the service does not start with {name}: {before['current']} is current again; "
            f"journalctl -u {service.UNIT} there says why"
        )
    if up is None and not steps:
        steps = (f"sudo systemctl restart {service.UNIT}",)
    return _answered(root, changed=True, removed=_prune(root), steps=steps)


def rollback(root: Path) -> Answer:
    """Make the previous version current again, if it passes its test; the two change places."""
    now, then = _linked(root, "current"), _linked(root, "previous")
    if then is None or then == now:
        raise EdgeKDError(f"there is no previous version in {root} to go back to")
    if wrong := _wrong(root / "versions" / then):
        raise EdgeKDError(f"the previous version {then} is damaged ({wrong}): it stays as it is")
    folder = root / "versions" / then
    test(folder, root, Deployed.load(folder).python)
    return _switched(root, then)


def status(root: Path) -> Answer:
    """What is deployed, every byte of it checked."""
    if _linked(root, "current") is None:
        raise EdgeKDError(f"nothing is deployed in {root}: edgekd deploy BUNDLE HOST:DIR")
    return _answered(root, changed=False)


# ---- the steps


def _found(root: Path, request: Request, key: Path | None) -> str | None:
    """A version that is what is asked for, with this source and Python, and unharmed."""
    asked = (request.sha256, source_sha256(_own_source()), sys.executable)
    for name in _versions(root):
        folder = root / "versions" / name
        if _wrong(folder):
            continue
        deployed = Deployed.load(folder)
        same = asked == (deployed.bundle_sha256, deployed.source_sha256, deployed.python)
        if same and bundle.check(folder / BUNDLE, key).trusted <= deployed.trusted:
            return name
    return None


def _add(whole: Path, upload: Path, final: Path) -> None:
    """The bundle's own file, edgekd's source, and the command that runs them once it is `final`."""
    try:
        os.link(upload, whole / BUNDLE)
    except OSError:  # a file system without links
        shutil.copyfile(upload, whole / BUNDLE)
    package = _own_source()
    for path in _sources(package):
        target = whole / "src" / "edgekd" / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = whole / service.COMMAND
    # Its own folder and not `current`: what runs still imports its own modules after a switch.
    words = f"PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(final / 'src'))}"
    line = f'{words} exec {shlex.quote(sys.executable)} -m edgekd "$@"'
    write_atomic(command, f"#!/bin/sh\n{line}\n")
    command.chmod(0o755)


def test(folder: Path, root: Path, python: str) -> selftest.SelfTest:
    """The self-test of a version, with its own source and Python; EdgeKDError if it fails."""
    inside = folder / bundle.UNPACKED
    cache = root / "cache"
    cache.mkdir(exist_ok=True)
    own = os.environ | {"PYTHONPATH": str(folder / "src"), "XDG_CACHE_HOME": str(cache)}
    try:
        done = subprocess.run(
            [python, "-m", "edgekd.selftest"], input=json.dumps(str(inside)) + "\n", cwd=root,
            capture_output=True, text=True, errors="replace", env=own, timeout=SECONDS, check=False,
        )  # fmt: skip
    except OSError as e:
        raise EdgeKDError(f"the self-test does not start: {python}: {e.strerror}") from None
    except subprocess.TimeoutExpired:
        raise EdgeKDError(f"the self-test took more than {SECONDS} s") from None
    try:
        last = json.loads("{" + done.stdout.rpartition("\n{")[2])
    except ValueError:
        words = " ".join(done.stderr.split())[-200:] or "nothing was said"
        raise EdgeKDError(f"the self-test ended with code {done.returncode}: {words}") from None
    if "error" in last:
        error = RuntimeUnavailable if last.get("unavailable") else EdgeKDError
        raise error(f"the self-test failed: {last['error'].replace(f'{inside}/', '')}")
    return selftest.SelfTest.parse(last["result"], "the self-test")


def _finish(whole: Path, found: bundle.Checked, digest: str, tested: selftest.SelfTest) -> None:
    """deployed.json, and all of it on the disk."""
    manifest = found.manifest
    Deployed(
        name=manifest.name,
        bundle_sha256=digest,
        model=manifest.model,
        profile=manifest.profile.name,
        precision=manifest.precision,
        edgekd=__version__,
        source_sha256=source_sha256(whole / "src" / "edgekd"),
        python=sys.executable,
        signer=found.signer,
        trusted=found.trusted,
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        selftest=tested,
    ).save(whole)
    for folder, _, files in os.walk(whole):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def switch(root: Path, name: str) -> None:
    """Make a version current, and what was current the previous one."""
    now = _linked(root, "current")
    if now is not None and now != name:
        _link(root, "previous", now)
    _link(root, "current", name)


def _link(root: Path, link: str, name: str) -> None:
    """Point a link to a version: it is the old one or the new one, at any moment."""
    new = root / f".{link}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(Path("versions", name))
    new.replace(root / link)
    _sync(root)


def _prune(root: Path) -> tuple[str, ...]:
    """Remove all but KEEP versions, the oldest first, and environments that none of them uses."""
    held = [_linked(root, link) for link in ("current", "previous")]
    others = [v for v in _versions(root) if v not in held]
    gone = others[max(0, KEEP - len({*held} - {None})) :]
    for name in gone:  # renamed first: what is half removed is no version
        _remove(root / "versions" / name)
    used = {Path(sys.executable)}
    for name in _versions(root):
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


# ---- what is there


def _versions(root: Path) -> list[str]:
    """Names of the versions, the newest first."""
    found = []
    for path in (root / "versions").glob("[!.]*"):
        at = ""  # of a damaged one: it is the first to go
        with contextlib.suppress(EdgeKDError):
            at = Deployed.load(path).at
        found.append((at, path.stat().st_mtime, path.name))
    return [name for _, _, name in sorted(found, reverse=True)]


def _linked(root: Path, link: str) -> str | None:
    """Name of the version that a link leads to; None if there is none (any more)."""
    path = root / link
    try:
        target = path.readlink()
    except FileNotFoundError:
        return None
    except OSError:
        raise EdgeKDError(f"{path} is no link of ours: give another HOST:DIR") from None
    if len(target.parts) != 2 or target.parts[0] != "versions" or target.parts[1] in (".", ".."):
        raise EdgeKDError(f"{path} leads to {target}, no version of ours: give another HOST:DIR")
    return target.name if (path / Deployed.FILE).is_file() else None


def _version(root: Path, link: str) -> Version | None:
    name = _linked(root, link)
    if name is None:
        return None
    folder = root / "versions" / name
    return Version(folder=name, deployed=Deployed.load(folder), wrong=_wrong(folder))


def _wrong(folder: Path) -> str:
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


def _answered(
    root: Path, *, changed: bool, removed: tuple[str, ...] = (), steps: tuple[str, ...] = ()
) -> Answer:
    """What is there now, after all was done."""
    current, previous = _version(root, "current"), _version(root, "previous")
    assert current is not None  # it was looked for, or made
    shown = {current.folder, previous.folder if previous else ""}
    notes = []
    if os.geteuid() == 0 and not service.readable_by_others(root):
        notes.append(
            f"the service runs as a user of its own, who cannot read {root}: "
            "deploy as another user, or to a folder such as /opt/edgekd"
        )
    if lacks := service.lacks():
        notes.append(
            f"edgekd predict works; the service needs {', '.join(lacks)} too: {sys.executable} -m "
            f"pip install {' '.join(lacks)}"
        )
    return Answer(
        root=str(root),
        changed=changed,
        current=current,
        previous=previous,
        others=tuple(v for v in _versions(root) if v not in shown),
        removed=removed,
        service=service.state(),
        next=steps,
        notes=tuple(notes),
    )


def _own_source() -> Path:
    return Path(__file__).parent


def _sources(package: Path) -> list[Path]:
    return sorted(p for p in package.rglob("*") if p.is_file() and p.parent.name != "__pycache__")


def source_sha256(package: Path) -> str:
    """Of every file of a copy of edgekd, and where it lies."""
    found = hashlib.sha256()
    for path in _sources(package):
        found.update(f"{path.relative_to(package).as_posix()} {sha256(path)}\n".encode())
    return found.hexdigest()


def _plain(name: str) -> str:
    """A bundle's name as a folder's: it was written by others."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:40] or "bundle"


def _free(root: Path, name: str) -> str:
    """A name that no version has: one that is there is never touched."""
    taken = {p.name for p in (root / "versions").glob("*")}
    return next(
        n for i in range(1, 10_000) if (n := name if i == 1 else f"{name}.{i}") not in taken
    )


def _clean(root: Path) -> None:
    """Remove what earlier attempts left that were killed; the lock says that none is at work."""
    versions = root / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    for path in versions.iterdir():
        if path.name.startswith((HALF, OLD)):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _half(root: Path) -> Iterator[Path]:
    """A folder that is no version yet, removed at the end."""
    folder = Path(tempfile.mkdtemp(dir=root / "versions", prefix=HALF))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _full_is_told(root: Path) -> Iterator[None]:
    """A full disk is an error that can be fixed."""
    try:
        with deploy_env.full_is_refused(root):
            yield
    except EdgeKDError as e:
        if "No space left" in str(e) or "File too large" in str(e) or "quota" in str(e):
            raise EdgeKDError(f"no room in {root} ({e}): nothing was changed") from None
        raise


def _sync(path: Path) -> None:
    """To the disk, a file or a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _answer(line: bytes, say: there.Say) -> dict[str, Any]:
    """What is asked for on stdin."""
    try:
        request = Request.model_validate_json(line)
    except ValidationError as e:  # cut off, or of another edgekd
        raise EdgeKDError(f"not a request: {e.error_count()} mistakes") from None
    root = Path(request.root)
    try:
        if request.command == "status":
            there.end_with_stdin()
            found = status(root).model_copy(update={"busy": deploy_env.busy(root)})
        else:
            with deploy_env.locked(root):
                if request.command == "install":
                    found = install(root, request, say)
                else:
                    there.end_with_stdin()
                    found = rollback(root)
    except deploy_env.Refused as e:
        raise EdgeKDError(str(e)) from None
    except PermissionError as e:
        raise EdgeKDError(f"cannot write in {root}: {e.strerror}: {e.filename}") from None
    return found.model_dump(mode="json")


if __name__ == "__main__":
    os.umask(os.umask(0o077) | 0o022)  # what is deployed is nobody else's to write to
    sys.exit(there.answer(_answer, EdgeKDError, (RuntimeUnavailable,)))
