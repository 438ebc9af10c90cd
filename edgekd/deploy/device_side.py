"""The device's side of `edgekd deploy`: check, unpack, test, then switch; or go back, or tell.

    DIR/current -> versions/NAME-HASH    switched by the rename of a new link, never before its test
    DIR/versions/NAME-HASH/              bundle.edgekd, src/, edgekd, deployed.json
    DIR/versions/NAME-HASH/previous      link to the version before: where `--rollback` goes
    DIR/versions/NAME-HASH/unpacked/     what is in the bundle, and what was built of it
    DIR/incoming/                        uploads that are not finished
    DIR/venv-KEY/, cache/, edgekd.service

A version is unpacked and tested under another name and gets its own by a rename: whatever ends
this process, a folder in versions/ is whole.
"""

from __future__ import annotations

import contextlib
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
from typing import Any, Literal

from pydantic import ValidationError

from edgekd import __version__
from edgekd.bundle import bundle, requirements
from edgekd.deploy import environment, selftest, systemd, versions
from edgekd.deploy.versions import BUNDLE, Deployed, Version
from edgekd.records import EdgeKDError, Record, RuntimeUnavailable, write_atomic
from edgekd.remote import protocol

SECONDS = 3600  # that a self-test may take: an engine is built in it
HALF = ".new-"  # what versions/ has under such a name is nobody's
ROOM = 3  # times the bundle's size: the file, its content, what is built of it


class Request(Record):
    """What is asked for."""

    command: Literal["install", "rollback", "status"]
    root: str  # absolute
    size: int = 0  # bytes of the bundle
    sha256: str = ""
    key: str = ""  # text of the public key that must have signed it; empty: any or none


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


def install(root: Path, request: Request, say: protocol.Say) -> Answer:
    """Deploy the bundle that stdin brings; nothing that is current changes before the last step."""
    _clean(root)
    key = Path("trusted.pub").resolve() if request.key else None
    if key is not None:
        key.write_text(request.key)
    name = _found(root, request, key)
    if name is not None:
        say(send=[request.size])  # nothing
        protocol.end_with_stdin()
        if name == versions.current(root):
            return _answered(root, changed=False)
        test(root / "versions" / name, root, sys.executable)
        return _switched(root, name)
    announced = environment.Sent(request.sha256, request.size, request.sha256)
    upload = root / environment.INCOMING / request.sha256
    environment.receive(upload.parent, [announced], say, needed=ROOM * request.size)
    protocol.end_with_stdin()
    with _full_is_told(root), _half(root) as half:
        whole = half / "whole"
        say(begin="deploying", total=2)
        found = bundle.extract(upload, whole / bundle.UNPACKED, key)
        name = _free(root, f"{_plain(found.manifest.name)}-{request.sha256[:12]}")
        _add(whole, upload, root / "versions" / name)
        say(step=1)
        tested = test(whole, root, sys.executable)
        _finish(whole, found, request.sha256, tested)
        say(step=1)
        say(end=True)
        whole.rename(root / "versions" / name)
        versions.sync(root / "versions")
    answer = _switched(root, name)
    upload.unlink()
    return answer


def _switched(root: Path, name: str) -> Answer:
    """A version that was tested becomes the current one; if the service does not start with it,
    what was current is so again. Nobody need listen any more: it is done to the end.
    """
    protocol.outlive_stdin()
    before = versions.current(root)
    with _full_is_told(root):
        steps = systemd.write(root, Deployed.load(root / "versions" / name).python)
        versions.switch(root, name)
    try:
        up = systemd.restart(root)
        if up is False and before is not None:
            raise EdgeKDError(
                f"the service does not start with {name}: {before} is current again; "
                f"journalctl -u {systemd.UNIT} there says why"
            )
    except BaseException:  # the device shuts down, too
        versions.back(root, before)
        systemd.restart(root)
        raise
    if up is None and not steps:
        steps = (f"sudo systemctl restart {systemd.UNIT}",)
    return _answered(root, changed=True, removed=versions.prune(root), steps=steps)


def rollback(root: Path) -> Answer:
    """Make the previous version current again, if it passes its test; the two change places."""
    now, then = versions.current(root), versions.previous(root)
    if then is None or then == now:
        raise EdgeKDError(f"there is no previous version in {root} to go back to")
    if wrong := versions.wrong(root / "versions" / then):
        raise EdgeKDError(f"the previous version {then} is damaged ({wrong}): it stays as it is")
    folder = root / "versions" / then
    test(folder, root, Deployed.load(folder).python)
    return _switched(root, then)


def status(root: Path) -> Answer:
    """What is deployed, every byte of it checked."""
    if versions.current(root) is None:
        raise EdgeKDError(f"nothing is deployed in {root}: edgekd deploy BUNDLE HOST:DIR")
    return _answered(root, changed=False)


# ---- the steps


def _found(root: Path, request: Request, key: Path | None) -> str | None:
    """A version that is what is asked for, with this source and Python, and unharmed."""
    asked = (request.sha256, versions.source_sha256(_own_source()), sys.executable)
    for name in versions.names(root):
        folder = root / "versions" / name
        if versions.wrong(folder):
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
    for path in versions.sources(package):
        target = whole / "src" / "edgekd" / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = whole / systemd.COMMAND
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
            [python, "-m", "edgekd.deploy.selftest"], input=json.dumps(str(inside)) + "\n",
            cwd=root, capture_output=True, text=True, errors="replace", env=own,
            timeout=SECONDS, check=False,
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
        source_sha256=versions.source_sha256(whole / "src" / "edgekd"),
        python=sys.executable,
        signer=found.signer,
        trusted=found.trusted,
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        selftest=tested,
    ).save(whole)
    for folder, _, files in os.walk(whole):
        for name in files:
            versions.sync(Path(folder, name))
        versions.sync(Path(folder))


# ---- what is there


def _answered(
    root: Path, *, changed: bool, removed: tuple[str, ...] = (), steps: tuple[str, ...] = ()
) -> Answer:
    """What is there now, after all was done."""
    now, before = versions.current(root), versions.previous(root)
    assert now is not None  # it was looked for, or made
    current = versions.told(root, now)
    previous = versions.told(root, before) if before else None
    notes = []
    if os.geteuid() == 0 and not systemd.readable_by_others(root):
        notes.append(
            f"the service runs as a user of its own, who cannot read {root}: "
            "deploy as another user, or to a folder such as /opt/edgekd"
        )
    if not current.wrong and current.deployed.python == sys.executable:
        inside = root / "versions" / now / bundle.UNPACKED
        if other := requirements.others(bundle.Manifest.load(inside).requirements):
            notes.append(
                "the self-test was passed with other versions than those (in brackets) that the "
                f"bundle was made with: {', '.join(other)}"
            )
    if lacks := systemd.lacks():
        notes.append(
            f"edgekd predict works; the service needs {', '.join(lacks)} too: {sys.executable} -m "
            f"pip install {' '.join(lacks)}"
        )
    return Answer(
        root=str(root),
        changed=changed,
        current=current,
        previous=previous,
        others=tuple(v for v in versions.names(root) if v not in (now, before)),
        removed=removed,
        service=systemd.state(),
        next=steps,
        notes=tuple(notes),
    )


def _own_source() -> Path:
    return Path(__file__).parents[1]


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
    folder = root / "versions"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.startswith((HALF, versions.OLD)):
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
        with environment.full_is_refused(root):
            yield
    except EdgeKDError as e:
        if "No space left" in str(e) or "File too large" in str(e) or "quota" in str(e):
            raise EdgeKDError(f"no room in {root} ({e}): nothing was changed") from None
        raise


def _answer(line: bytes, say: protocol.Say) -> dict[str, Any]:
    """What is asked for on stdin."""
    try:
        request = Request.model_validate_json(line)
    except ValidationError as e:  # cut off, or of another edgekd
        raise EdgeKDError(f"not a request: {e.error_count()} mistakes") from None
    root = Path(request.root)
    try:
        if request.command == "status":
            protocol.end_with_stdin()
            found = status(root).model_copy(update={"busy": environment.busy(root)})
        else:
            with environment.locked(root):
                if request.command == "install":
                    found = install(root, request, say)
                else:
                    protocol.end_with_stdin()
                    found = rollback(root)
    except environment.Refused as e:
        raise EdgeKDError(str(e)) from None
    except PermissionError as e:
        raise EdgeKDError(f"cannot write in {root}: {e.strerror}: {e.filename}") from None
    return found.model_dump(mode="json")


if __name__ == "__main__":
    os.umask(os.umask(0o077) | 0o022)  # what is deployed is nobody else's to write to
    sys.exit(protocol.answer(_answer, EdgeKDError, (RuntimeUnavailable,)))
