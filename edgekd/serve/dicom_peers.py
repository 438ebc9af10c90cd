"""Who speaks DICOM with a server: its own name, where results go, and whom it listens to."""

from __future__ import annotations

from typing import NamedTuple

from edgekd.records import EdgeKDError
from edgekd.serve.auth import is_loopback

INSTALL = "edgekd serve --dicom needs pynetdicom and highdicom: pip install 'edgekd[dicom]'"
AET = "EDGEKD"
LONGEST = 16  # characters of an AE title (PS3.5, 6.2)


class Peer(NamedTuple):
    """Another application entity."""

    aet: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}"


class Dicom(NamedTuple):
    """How images come and results go by DICOM."""

    port: int  # 0: any that is free
    to: Peer  # where results go
    aet: str = AET
    callers: tuple[str, ...] = ()  # AE titles that are accepted; empty: any
    insecure: bool = False  # may cross a network, which nothing encrypts


def chosen(
    port: int | None, aet: str | None, to: str | None, callers: list[str], insecure: bool = False
) -> Dicom | None:
    """What the command line asks for; None: no DICOM. EdgeKDError for what makes no sense."""
    if port is None:
        given = [("--aet", aet), ("--send-to", to), ("--dicom-from", callers),
                 ("--insecure-dicom", insecure)]  # fmt: skip
        if idle := [name for name, value in given if value]:
            raise EdgeKDError(f"{idle[0]} does nothing without --dicom: give --dicom PORT too")
        return None
    if not to:
        raise EdgeKDError(
            "--dicom needs --send-to AET@HOST:PORT: results go to a DICOM node, nowhere else"
        )
    names = tuple(_title(c, "--dicom-from") for c in callers)
    return Dicom(port, _peer(to), _title(aet or AET, "--aet"), names, insecure)


def check(dicom: Dicom, host: str) -> None:
    """EdgeKDError for what would take images from anyone, or show them to a network unasked."""
    if not is_loopback(host) and not dicom.callers:
        raise EdgeKDError(
            f"--host {host} can be reached from elsewhere and DICOM has no password, so say whose "
            "images are taken: --dicom-from AET, once for each"
        )
    far = [f"{option} {name}" for option, name in (("--host", host), ("--send-to", dicom.to.host))
           if not is_loopback(name)]  # fmt: skip
    if far and not dicom.insecure:
        raise EdgeKDError(
            f"DICOM is not encrypted here, and {' and '.join(far)} would take patients' names over "
            "a network: --insecure-dicom where that network is trusted, or something else encrypts"
        )


def _title(given: str, option: str) -> str:
    """An AE title; EdgeKDError if it is none."""
    made = given.strip(" ")
    plain = all(" " <= c <= "~" and c != "\\" for c in made)
    if not 1 <= len(made) <= LONGEST or not plain:
        raise EdgeKDError(
            f"{option} {given!r} is no AE title: 1 to {LONGEST} plain characters, no backslash"
        )
    return made


def _peer(given: str) -> Peer:
    """AET@HOST:PORT, the host of IPv6 in brackets; EdgeKDError if it is none."""
    aet, _, where = given.rpartition("@")
    host, _, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not (host and port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
        raise EdgeKDError(f"--send-to {given!r} is no AET@HOST:PORT, such as ARCHIVE@10.0.0.2:104")
    return Peer(_title(aet, "--send-to"), host, int(port))
