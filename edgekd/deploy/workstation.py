"""A bundle on a device, over the user's own OpenSSH: first install, upgrade, status, and back.

What can be refused is refused here, before anything is sent; the device checks all of it again
(`deploy_there`), and changes what is current last.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgekd.bundle import bundle
from edgekd.deploy.device_side import Answer, Request
from edgekd.deploy.versions import Deployed
from edgekd.pipeline import bench_remote
from edgekd.records import EdgeKDError, Track, read_text, sha256, untracked
from edgekd.remote import client
from edgekd.remote.ssh import Device, printable

FOLDER = "edgekd"  # in the home folder there
OPTION = "--python"
NEEDED = (*bench_remote.NEEDED, "typer", "rich")
SIGNED = "cryptography"
TARGET = re.compile(
    r"(?P<url>ssh://[^/]+)(?P<path>/.*)?|(?P<host>(?:[^@:]+@)?(?:\[[^\]]+\]|[^:\[\]]*))(?::(?P<dir>.*))?",
    re.DOTALL,
)
FOLDERS = re.compile(r"(~/)?[\w./+@,= -]+")  # that a unit of systemd takes, too


class Target(NamedTuple):
    """Where to deploy to."""

    host: str  # as ssh takes it
    folder: str  # from the home folder there, or absolute

    @classmethod
    def parse(cls, text: str) -> Target:
        """user@host, user@host:dir or ssh://user@host:port/dir; EdgeKDError if it is neither."""
        found = TARGET.fullmatch(text)
        if found is None:
            raise EdgeKDError(f'"{printable(text)}" is no HOST, HOST:DIR or ssh://HOST:PORT/DIR')
        host = found["url"] or found["host"].replace("[", "").replace("]", "")
        folder = (found["path"] if found["url"] else found["dir"]) or FOLDER
        if not FOLDERS.fullmatch(folder) or ".." in folder.split("/"):
            raise EdgeKDError(
                f'"{printable(folder)}" is no folder to deploy to: letters, digits, spaces and '
                "./+@,=-_ are, without .."
            )
        folder = posixpath.normpath(folder.removeprefix("~/"))
        if folder in (".", "/", "//"):
            raise EdgeKDError(f"deploy to a folder of its own, such as {host}:{FOLDER}")
        return cls(host, folder)

    def root(self, device: Device) -> str:
        """The folder there, absolute; EdgeKDError if the home folder there is not fit for it."""
        root = device.from_home(self.folder)
        if not FOLDERS.fullmatch(root):
            raise EdgeKDError(
                f"{self.host}: {printable(root)} has characters that a unit of systemd does not "
                f"take: give {self.host}:/DIR"
            )
        return root


def install(
    file: Path,
    target: Target,
    *,
    key: Path | None = None,
    python: str = "python3",
    wheelhouse: Path | None = None,
    track: Track = untracked,
) -> Answer:
    """Deploy a bundle; what is current there afterwards. EdgeKDError if anything is not right.

    key: file of the public key that must have signed it. python: a command there, or a path from
    its home folder. wheelhouse: folder of wheels, from which an environment is made there.
    """
    checked = bundle.check(file, key)
    digest = sha256(file)
    with Device(target.host) as device:
        root = target.root(device)
        python = client.at_home(device, python)
        if wheelhouse is None:
            runtime = checked.manifest.profile.runtime
            needed = (*NEEDED, SIGNED) if checked.signer else NEEDED

            def offline(there: client.Python) -> str:
                return f", or, for a device without a network, {pip_download(checked, there)}"

            client.check_python(device, python, needed, runtime, OPTION, offline)
            device.put_files(client.source(), ".")
        else:
            wheels = wheels_in(wheelhouse, checked)
            there = client.probe(device, python, ("venv", "ensurepip"), OPTION)
            if there.missing:
                raise EdgeKDError(
                    f"{python} on {device.host} makes no environments: apt install python3-venv "
                    f"there, or name another Python there with {OPTION}"
                )
            device.put_files(client.source(), ".")
            python = _environment(device, python, root, checked, there, wheels, track)
        text = read_text(key) if key is not None else ""
        request = Request(
            command="install", root=root, size=file.stat().st_size, sha256=digest, key=text
        )
        return _ask(device, python, request, track, [file])


def rollback(target: Target, *, python: str | None = None, track: Track = untracked) -> Answer:
    """Make the previous version there current again, if it passes its self-test."""
    return _again("rollback", target, python, track)


def status(target: Target, *, python: str | None = None, track: Track = untracked) -> Answer:
    """What is deployed there, every byte of it checked."""
    return _again("status", target, python, track)


def _again(command: Any, target: Target, python: str | None, track: Track) -> Answer:
    """Ask the Python that runs what is current, unless another one is named."""
    with Device(target.host) as device:
        root = target.root(device)
        if python is None:
            done = device.run(["cat", "--", posixpath.join(root, "current", Deployed.FILE)])
            try:
                python = str(json.loads(done.stdout)["python"])
            except (ValueError, KeyError, TypeError):
                raise EdgeKDError(
                    f"nothing is deployed in {root} on {device.host}: edgekd deploy BUNDLE "
                    f"{target.host}:{target.folder} does it"
                ) from None
        python = client.at_home(device, python)
        there = client.probe(device, python, NEEDED, OPTION)
        if there.missing:
            raise EdgeKDError(
                f"{python} on {device.host} has no {' and no '.join(there.missing)}: name another "
                f"Python there with {OPTION}"
            )
        device.put_files(client.source(), ".")
        return _ask(device, python, Request(command=command, root=root), track)


def _ask(
    device: Device, python: str, request: Request, track: Track, files: Sequence[Path] = ()
) -> Answer:
    """What the device says after it did what is asked for."""
    command = [python, "-m", "edgekd.deploy.device_side"]
    said = client.ask(device, command, request.model_dump_json(), track, files, request.command)
    if said.error:
        raise client.error(said, f"{device.host}: {printable(said.error)}")
    return Answer.parse(said.result, device.host)


# ---- wheels


def wanted(checked: bundle.Checked) -> tuple[str, ...]:
    """The packages that a device needs, as lines of a requirements.txt."""
    signed = [f"{SIGNED}>=42"] if checked.signer else []
    return (*checked.manifest.requirements, *signed, 'tomli>=2; python_version < "3.11"')


def pip_download(checked: bundle.Checked, there: client.Python) -> str:
    """How to make a wheelhouse for that Python, in words."""
    machine = there.machine or "aarch64"
    platforms = " ".join(f"--platform {p}_{machine}" for p in ("manylinux2014", "manylinux_2_28"))
    packages = " ".join(f"'{w}'" if " " in w or ">" in w else w for w in wanted(checked))
    return (
        f"pip download -d wheelhouse --only-binary=:all: --python-version {there.version} "
        f"{platforms} {packages} here, and then --wheelhouse wheelhouse"
    )


def wheels_in(folder: Path, checked: bundle.Checked) -> list[Path]:
    """The wheels of a folder; EdgeKDError if it is none."""
    found = sorted(p for p in folder.glob("[!.]*.whl") if p.is_file()) if folder.is_dir() else []
    if not found:
        blank = client.Python("3.10", "", ())
        raise EdgeKDError(f"{folder} holds no wheels: {pip_download(checked, blank)}")
    return found


def _environment(
    device: Device,
    python: str,
    root: str,
    checked: bundle.Checked,
    there: client.Python,
    wheels: Sequence[Path],
    track: Track,
) -> str:
    """The Python of an environment there that has what the bundle needs."""
    system = checked.manifest.profile.runtime == "tensorrt"  # which JetPack brings
    lines = "".join(f"{line}\n" for line in wanted(checked))
    what = f"{python} {there.version} {system}\n{lines}"
    request = {
        "root": root,
        "key": hashlib.sha256(what.encode()).hexdigest()[:12],
        "wheels": [(p.name, p.stat().st_size, sha256(p)) for p in wheels],
        "wanted": lines,
        "system": system,
    }
    command = [python, "-m", "edgekd.deploy.environment"]
    text = json.dumps(request)
    said = client.ask(device, command, text, track, wheels, "make an environment")
    if said.error:
        raise client.error(said, f"{device.host}: {printable(said.error)}")
    if not isinstance(said.result, str) or not said.result.startswith("/"):
        raise EdgeKDError(f"{device.host} names no Python of an environment")
    return said.result
