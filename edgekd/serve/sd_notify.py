"""What a service manager is told: systemd's sd_notify(3), by the standard library alone."""

from __future__ import annotations

import os
import socket


def tell(state: str) -> bool:
    """Send "READY=1", "WATCHDOG=1" or "STOPPING=1"; False where nobody asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # a name without a file
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            s.sendto(state.encode(), address)
        except OSError:  # whoever asked is gone
            return False
    return True


def watched_s() -> float | None:
    """Seconds within which a sign of life is due; None: nobody watches this process."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 1e6
