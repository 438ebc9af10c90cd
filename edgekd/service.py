"""The systemd unit that keeps `edgekd serve` of the current version running, without privileges."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from pathlib import Path

from edgekd.records import write_atomic

UNIT = "edgekd.service"
INSTALLED = Path("/etc/systemd/system")
BACKOFF = 254  # systemd that waits longer after each failure; an older one says it does not know
COMMAND = "edgekd"  # in a version's folder: its Python with its own source


def text(root: Path, *, user: str, systemd: int) -> str:
    """The unit of what is deployed in `root`. user: "" for one that systemd makes up.

    Nothing is writable but the cache of compiled models. No MemoryDenyWriteExecute: runtimes
    compile kernels in memory.
    """
    current = root / "current"
    cache = root / "cache"
    backoff = ["RestartSteps=8", "RestartMaxDelaySec=60"] if systemd >= BACKOFF else []
    # What it compiled in the self-test is in the cache already, so it need not be written to.
    writable = [f"ReadWritePaths={word(f'-{cache}')}"] if user else []
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
        "Restart=always",
        "RestartSec=2",
        *backoff,
        "TimeoutStartSec=300",  # a driver may compile
        "WatchdogSec=60",
        f"User={user}" if user else "DynamicUser=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        *writable,
        f"ProtectHome={'read-only' if _in_a_home(root) else 'yes'}",
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
    """One word of a unit's line; `there.place` refuses what quotes do not keep."""
    return f'"{value}"'


def _in_a_home(root: Path) -> bool:
    return root.parts[:2] in (("/", "home"), ("/", "root")) or root.parts[:3] == (
        "/",
        "run",
        "user",
    )


def write(root: Path) -> tuple[str, ...]:
    """Write the unit into `root`; what the administrator has to do, nothing if it is done."""
    user = "" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    made = text(root, user=user, systemd=systemd())
    path = root / UNIT
    if not path.is_file() or path.read_text("utf-8") != made:
        write_atomic(path, made)
    try:
        done = (INSTALLED / UNIT).read_text("utf-8") == made
    except OSError:
        done = False
    if done:
        return (f"sudo systemctl restart {UNIT}",)
    return (
        f"sudo install -m 644 {shell(path)} {INSTALLED}/",
        f"sudo systemctl daemon-reload && sudo systemctl enable --now {UNIT}",
    )


def shell(path: Path) -> str:
    """As a shell takes it."""
    import shlex

    return shlex.quote(str(path))


def systemd() -> int:
    """Version of this machine's systemd; 0: none that answers."""
    try:
        done = subprocess.run(
            ["systemctl", "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.match(r"systemd (\d+)", done.stdout)
    return int(found[1]) if found else 0


def state() -> str:
    """What systemd says of the service: "active", "inactive", ...; "absent" without a unit."""
    if not (INSTALLED / UNIT).is_file():
        return "absent"
    try:
        done = subprocess.run(
            ["systemctl", "is-active", UNIT], capture_output=True, text=True, timeout=10,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip()[:40] or "unknown"


def readable_by_others(root: Path) -> bool:
    """Whether a made-up user gets at what is in `root`."""
    return all(p.stat().st_mode & 0o005 == 0o005 for p in (root, *root.parents))
