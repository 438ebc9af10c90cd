"""Who may come in, and what every answer carries: an ASGI layer around the server's paths."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
import secrets
import stat
import sys
import time
import traceback
from collections.abc import Sequence
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
POSTED = ("/predict", "/explain")
PATHS = (*OPEN, *POSTED, "/model", "/metrics")
HOST = re.compile(
    r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\[\]]+))(?::\d*)?"
)  # of a Host header, in small letters
ROOT = re.compile(r"(/[\w.~-]*[\w~-])+", re.ASCII)
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
        if status == 415:
            self.headers["accept-encoding"] = "identity"
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


def allowed_host(given: str) -> str:
    """NAME or NAME:PORT as a browser sends it; EdgeKDError if it is none."""
    host = given.lower()
    if not HOST.fullmatch(host) or "*" in host or not host.isascii():
        raise EdgeKDError(
            f'--allowed-host "{given}" is no host: give the name that stands in the address of the '
            "page, as edge.example.org, edge.example.org:8443 or, for other letters, xn--..."
        )
    # Browsers leave out the port that is a scheme's own.
    return host.removesuffix(":443").removesuffix(":80").removesuffix(".")


def root_path(given: str) -> str:
    """The path without a slash at its end; EdgeKDError if it is none."""
    root = given.rstrip("/")
    if root and not ROOT.fullmatch(root):
        raise EdgeKDError(
            f'--root-path "{given}" is no path: give the one that the proxy serves this server at, '
            "as /edgekd"
        )
    return root


class Door:
    """Refuses who may not come in; counts, dates and guards what goes out.

    hosts: names that it answers to beside localhost; pages of them are ours. anyone: it answers to
    any name. root: path that a proxy serves it at and may leave in a request's path or not.
    """

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Sequence[str], anyone: bool, root: str,
        meters: Meters,
    ) -> None:  # fmt: skip
        self.app, self.meters, self.root = app, meters, root
        self.hosts, self.anyone = hosts, anyone
        self._names = {_name(host) for host in hosts}
        self._wanted = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host, given = _target(scope)
        path = _plain(given, self.root)
        method = scope["method"]
        # uvicorn leaves out the body of an answer to HEAD
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
        began, status = time.perf_counter(), 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *RAW_HEADERS]}
            await send(message)

        try:
            self._judge(scope, host)
            if given == self.root != "":  # or the page's own links would lead above it
                await _bare(guarded, 308, {"location": f"{self.root}/"})
            elif method == "OPTIONS" and path in (*PATHS, "*"):
                await _bare(guarded, 204, {"allow": _methods(path)})
            elif path in PATHS and method not in _methods(path).split(", "):
                wrong = Refusal(405, f"{path} does not take {method[:20]}: it takes "
                                f"{_methods(path)}", "method", unread=True)  # fmt: skip
                wrong.headers["allow"] = _methods(path)
                raise wrong
            else:
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
            label = path if path in PATHS else "other"
            self.meters.requests.labels(label, str(status)).inc()
            self.meters.request_s.labels(label).observe(time.perf_counter() - began)

    def _judge(self, scope: Scope, host: str) -> None:
        """Refusal of who may not come in."""
        told: dict[bytes, bytes] = dict(scope["headers"])
        # Else a page of any site could reach this server by a name that it points here. Every
        # browser names a host; HTTP/1.0 need not.
        name = _name(host)
        if not self.anyone and host and not (is_loopback(name) or name in self._names):
            ours = ", ".join(("localhost", *self.hosts))
            raise Refusal(403, f"this server answers to {ours} alone, not to {host[:80]!r}: "
                          f"{_if_ours(host)}", "host", unread=True)  # fmt: skip
        origin = told.get(b"origin")
        if origin is not None:
            page = _origin(origin.decode("latin-1"))
            # A proxy's scheme may differ, a foreign page's host and port must.
            if not page or page not in (host, *self.hosts):
                raise Refusal(403, f"asked for by a page of another site, {page[:80]!r}: "
                              f"{_if_ours(page)}", "origin", unread=True)  # fmt: skip
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
        await _bare(send, why.status, headers | why.headers, body)


async def _bare(send: Send, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    """Send an answer."""
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _methods(path: str) -> str:
    """What a path may be asked with."""
    return "OPTIONS, POST" if path in POSTED else "GET, HEAD, OPTIONS"


def _target(scope: Scope) -> tuple[str, str]:
    """(host, in small letters, path) that a request is for; the host is empty if it names none."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    path = scope["path"]
    if not path.lower().startswith(("http://", "https://")):
        return host, path
    # A client of a proxy names both in the target, and that host counts (RFC 9112, 3.2.2).
    _, _, rest = path.partition("://")
    host, slash, path = rest.partition("/")
    return host.lower(), slash + path or "/"


def _plain(path: str, root: str) -> str:
    """A path without `root`, doubled slashes and one at the end."""
    plain = "/".join(("", *filter(None, path.split("/")))) if path.startswith("/") else path
    if root and f"{plain}/".startswith(f"{root}/"):
        plain = plain.removeprefix(root)
    return plain or "/"


def _if_ours(host: str) -> str:
    """How to mend a refusal of that host."""
    return f"if a proxy calls it so, start it with --allowed-host {host[:80] or 'NAME'}"


def _name(host: str) -> str:
    """The host in a Host header, without its port; empty if it is none."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).removesuffix(".") if found else ""


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
