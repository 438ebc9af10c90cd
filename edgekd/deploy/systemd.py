"""The systemd unit that keeps `edgekd serve` of the current version running, without privileges."""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from edgekd.bundle.requirements import SERVE
from edgekd.records import write_atomic

UNIT = "edgekd.service"
INSTALLED = Path("/etc/systemd/system")
BACKOFF = 254  # systemd that waits longer after each failure; an older one says it does not know
UP_SECONDS = 120.0  # that it is given to say that it is ready
POLL_SECONDS = 0.5
FAILURES = 3  # times that it may fail at that
NEEDS = tuple(name.replace("-", "_") for name in SERVE)  # modules
GROUPS = ("video", "render")  # that own the device nodes of GPUs and NPUs
COMMAND = "edgekd"  # in a version's folder: its Python with its own source


def text(root: Path, *, python: str, user: str, systemd: int, groups: Sequence[str] = ()) -> str:
    """The unit of what is deployed in `root`. user: "" for one that systemd makes up, who is in
    `groups`; any other is in its own.

    Nothing is writable but the cache of compiled models and the audit log. No
    MemoryDenyWriteExecute: runtimes compile kernels in memory.
    """
    current = root / "current"
    cache = root / "cache"
    backoff = ["RestartSteps=8", "RestartMaxDelaySec=60"] if systemd >= BACKOFF else []
    # What it compiled in the self-test is in the cache already, so it need not be written to.
    writable = [f"ReadWritePaths={word(f'-{cache}')}"] if user else []
    # A user of no group is refused the GPU or NPU that root's self-test was passed on.
    among = [f"SupplementaryGroups={' '.join(groups)}"] if groups else []
    lines = [
        "[Unit]",
        "Description=EdgeKD: the current image classifier",
        "After=network.target",
        "StartLimitIntervalSec=0",  # it never gives up
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={word(current / COMMAND)} serve {word(current / 'bundle.edgekd')}",
        f"Environment={word(f'XDG_CACHE_HOME={cache}')} PYTHONDONTWRITEBYTECODE=1",
        # The audit log: /var/lib/edgekd/audit.jsonl, which the user's own `edgekd serve` has not.
        "Environment=XDG_STATE_HOME=/var/lib",
        "StateDirectory=edgekd",
        "StateDirectoryMode=0700",
        "Restart=always",
        "RestartSec=2",
        *backoff,
        "TimeoutStartSec=300",  # a driver may compile
        "WatchdogSec=60",
        *([f"User={user}"] if user else ["DynamicUser=yes", *among]),
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        *writable,
        f"ProtectHome={'read-only' if _in_a_home(root) or _in_a_home(Path(python)) else 'yes'}",
        "PrivateTmp=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectControlGroups=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=yes",
        "RestrictNamespaces=yes",
        "LockPersonality=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "UMask=0077",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def word(value: object) -> str:
    """One word of a unit's line; `deploy.Target` refuses what quotes do not keep."""
    return f'"{value}"'


def _in_a_home(root: Path) -> bool:
    return any(root.is_relative_to(home) for home in ("/home", "/root", "/run/user"))


def write(root: Path, python: str) -> tuple[str, ...]:
    """Write the unit into `root`; what the administrator has to do to install it, if it is not.

    python: that runs the current version.
    """
    user = "" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    found = re.match(r"systemd (\d+)", _systemctl("--version"))
    version = int(found[1]) if found else 0
    made = text(root, python=python, user=user, systemd=version, groups=device_groups())
    path = root / UNIT
    if not path.is_file() or path.read_text("utf-8") != made:
        write_atomic(path, made)
    try:
        if (INSTALLED / UNIT).read_text("utf-8") == made:
            return ()
    except OSError:  # there is none
        pass
    return (
        f"sudo install -m 644 {shlex.quote(str(path))} {INSTALLED}/",
        f"sudo systemctl daemon-reload && sudo systemctl enable --now {UNIT}",
    )


def device_groups() -> tuple[str, ...]:
    """Those of GROUPS that are here: systemd starts nothing in one that is not."""
    here = {g.gr_name for g in grp.getgrall()}
    return tuple(g for g in GROUPS if g in here)


def state() -> str:
    """What systemd says of the service: "active", "inactive", ...; "not installed"."""
    if not (INSTALLED / UNIT).is_file():
        return "not installed"
    return _shown().get("ActiveState", "unknown")


def restart(root: Path) -> bool | None:
    """Have the service take what is current; whether it is up again with it.

    It runs as we do: it is asked to end, and systemd starts it anew. No root is needed. None: it
    does not run, or is not ours to end.
    """
    before = _shown()
    pid = int(before.get("MainPID", "0"))
    try:
        command = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        if str(root / "current" / "bundle.edgekd").encode() not in command:
            return None
        os.kill(pid, signal.SIGTERM)
    except OSError:
        return None
    end = time.monotonic() + UP_SECONDS
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        now = _shown()
        if now.get("ActiveState") == "active" and now.get("MainPID") not in ("0", str(pid)):
            return True
        if int(now.get("NRestarts", "0")) - int(before.get("NRestarts", "0")) > FAILURES:
            return False
    return False


def _shown() -> dict[str, str]:
    """The unit's properties that count; empty without systemd."""
    said = _systemctl("show", UNIT, "--property=ActiveState,MainPID,NRestarts")
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    return {k: v for k, v in found.items() if k == "ActiveState" or v.isdecimal()}


def _systemctl(*words: str) -> str:
    """What it prints; nothing where there is none."""
    try:
        return subprocess.run(
            ["systemctl", *words], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def lacks() -> tuple[str, ...]:
    """Packages that serving takes and this Python has not."""
    return tuple(n.replace("_", "-") for n in NEEDS if importlib.util.find_spec(n) is None)


def readable_by_others(root: Path) -> bool:
    """Whether a made-up user gets at what is in `root`."""
    return all(p.stat().st_mode & 0o005 == 0o005 for p in (root, *root.parents))
