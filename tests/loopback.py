"""A real OpenSSH server on this machine, for one user, on a port of its own: a device for tests."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVER = """
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/known.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv TMPDIR={folder}/tmp
Banner {folder}/banner
Port {port}
Port {shell}
Match LocalPort {shell}
  ForceCommand exec sh {folder}/login
"""
# Each host of this file is the same server, or none, met in another way.
CLIENT = """
Host device shell unknown-key changed-key
  IdentityFile {folder}/known
Host wrong-key
  IdentityFile {folder}/stranger
Host closed
  Port {closed}
Host shell
  Port {shell}
  HostKeyAlias [127.0.0.1]:{port}
Host unknown-key
  UserKnownHostsFile /dev/null
Host changed-key
  UserKnownHostsFile {folder}/changed
Host *
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {folder}/hosts
  GlobalKnownHostsFile /dev/null
"""


@dataclass(frozen=True)
class Loopback:
    """Where the server keeps its things."""

    folder: Path

    @property
    def tmp(self) -> Path:
        """The temporary folder of those who log in."""
        return self.folder / "tmp"

    def log_in_with(self, script: str) -> None:
        """What host `shell` runs instead of the user's login shell: a script of sh, which has the
        command that came in $SSH_ORIGINAL_COMMAND.
        """
        (self.folder / "login").write_text(script)

    def connections(self) -> int:
        """Logins until now."""
        return (self.folder / "log").read_text().count("Accepted publickey")

    def left(self, seconds: float = 8) -> list[str]:
        """What is left there of a login that is over: files and processes."""
        end = time.monotonic() + seconds
        while (found := self._found()) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _found(self) -> list[str]:
        found = [str(p) for p in self.tmp.iterdir()]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str((process / "cwd").readlink()).startswith(str(self.tmp)):
                    found.append((process / "cmdline").read_text())
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def _keys(folder: Path, port: int) -> None:
    for name in ("host", "known", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    for name, key in (("hosts", "host"), ("changed", "stranger")):
        kind, public, *_ = (folder / f"{key}.pub").read_text().split()
        (folder / name).write_text(f"[127.0.0.1]:{port} {kind} {public}\n")


@contextlib.contextmanager
def serving(folder: Path):
    """A Loopback, and on PATH an `ssh` that knows it and nothing else; a skip without OpenSSH."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    client = shutil.which("ssh")
    if not (server and client and shutil.which("ssh-keygen")):
        pytest.skip("no OpenSSH client and server here: apt install openssh-server")
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        Path("/run/sshd").mkdir(mode=0o755)  # as root it wants one, as its service makes it
    port = free_port()
    _keys(folder, port)
    (folder / "tmp").mkdir()
    # No words of a banner are why a login failed.
    (folder / "banner").write_text("Strangers: Host key verification failed\n")
    values = {"folder": folder, "port": port, "shell": free_port(), "closed": free_port(),
              "user": getpass.getuser()}  # fmt: skip
    (folder / "client").write_text(CLIENT.format(**values))
    config = folder / "server"
    # From 9.8 on it makes those wait who failed before, as tests do.
    config.write_text(SERVER.format(**values) + "PerSourcePenalties no\n")
    if subprocess.run([server, "-t", "-f", config], capture_output=True, check=False).returncode:
        config.write_text(SERVER.format(**values))
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {client} -F {folder}/client "$@"\n')
    wrapper.chmod(0o755)
    daemon = subprocess.Popen([server, "-D", "-f", config, "-E", folder / "log"])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if daemon.poll() is not None:
                pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield Loopback(folder)
    finally:
        daemon.terminate()
        daemon.wait()
