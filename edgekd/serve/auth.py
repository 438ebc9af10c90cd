"""Who may come in, and what every answer carries: an ASGI layer around the server's paths."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import secrets
import stat
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from edgekd.serve.metrics import Meters

TOKEN = "EDGEKD_TOKEN"
SHORTEST = 16  # characters of a token
OPEN = ("/", "/page.css", "/page.js", "/health", "/openapi.json")  # without a token
PATHS = (*OPEN, "/predict", "/explain", "/model", "/metrics")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
RAW_HEADERS = [(k.encode(), v.encode()) for k, v in HEADERS.items()]


class Refusal(Exception):
    """A request that is not served: HTTP status, one line that says how to mend it, and a word for
    the meters. unread: the rest of its body is not waited for.
    """

    def __init__(self, status: int, message: str, reason: str, *, unread: bool = False) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason
        self.headers: dict[str, str] = {"connection": "close"} if unread else {}
        if status == 503:
            self.headers["retry-after"] = "1"
        if status == 401:
            self.headers["www-authenticate"] = 'Bearer realm="edgekd"'


def token(file: Path | None) -> str:
    """The token in the file's first line, or in the environment; empty: none is wanted."""
    told = os.environ.get(TOKEN, "")
    if file is None:
        return _fit(told, TOKEN) if told else ""
    if told:
        raise EdgeKDError(f"a token is in {TOKEN} and in --token-file {file}: give one of them")
    try:
        with file.open("rb") as f:
            if stat.S_IMODE(os.fstat(f.fileno()).st_mode) & 0o077:
                raise EdgeKDError(f"others may read {file}: chmod 600 {file}")
            text = f.read(4096)
    except OSError as e:
        raise EdgeKDError(f"cannot read --token-file {file}: {e.strerror}") from None
    first = text.decode(json.detect_encoding(text), "replace").partition("\n")[0]
    return _fit(first.strip(), str(file))


def _fit(given: str, source: str) -> str:
    plain = given.isascii() and given.isprintable() and " " not in given
    if len(given) < SHORTEST or not plain:
        raise EdgeKDError(
            f"the token in {source} is not {SHORTEST} or more plain characters without spaces: "
            "openssl rand -hex 24 makes one"
        )
    return given


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Door:
    """Refuses who may not come in; counts, dates and guards what goes out."""

    def __init__(self, app: ASGIApp, *, token: str, loopback: bool, meters: Meters) -> None:
        self.app, self.meters, self.loopback = app, meters, loopback
        self._wanted = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *RAW_HEADERS]}
            await send(message)

        try:
            self._judge(scope)
            await self.app(scope, receive, guarded)
        except Refusal as e:
            await self.refuse(e, guarded)
        except Exception as e:
            number = secrets.token_hex(4)
            _report(number, e)
            if status:  # too late to say so: the connection breaks
                raise RuntimeError(f"bug {number}, in the midst of an answer") from None
            bug = Refusal(500, f"a bug, {number}: see the server's log", "bug", unread=True)
            await self.refuse(bug, guarded)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.request_s.labels(path).observe(time.perf_counter() - began)

    def _judge(self, scope: Scope) -> None:
        """Refusal of who may not come in."""
        told: dict[bytes, bytes] = dict(scope["headers"])
        host = told.get(b"host", b"").decode("latin-1")
        if self.loopback and not is_loopback(_name(host)):
            # else a page of any site could reach this server by a name that it points here
            raise Refusal(403, "this server answers to localhost alone", "host", unread=True)
        origin = told.get(b"origin")
        # A proxy's scheme may differ, a foreign page's host and port must.
        if origin is not None and _origin(origin.decode("latin-1")) != host.lower():
            raise Refusal(403, "asked for by a page of another site", "origin", unread=True)
        if self._wanted and scope["path"] not in OPEN:
            given = told.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                message = "a token is wanted: send it as authorization: Bearer TOKEN"
                raise Refusal(401, message, "token", unread=True)

    async def refuse(self, why: Refusal, send: Send) -> None:
        """Send {"error": ...}."""
        self.meters.rejected.labels(why.reason).inc()
        body = json.dumps({"error": str(why)}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        raw = [(k.encode(), v.encode()) for k, v in (headers | why.headers).items()]
        await send({"type": "http.response.start", "status": why.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """The host in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _origin(origin: str) -> str:
    """Host and port of an Origin header; empty where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _report(number: str, error: BaseException) -> None:
    """A bug's place on stderr; not its message, which may quote what was sent."""
    lines = traceback.format_tb(error.__traceback__)
    sys.stderr.write(f"bug {number}: {type(error).__name__}\n{''.join(lines)}")
    sys.stderr.flush()
