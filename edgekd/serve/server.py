"""The server at the bedside: it listens, tells a service manager, and leaves in good order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from edgekd.records import EdgeKDError
from edgekd.serve import dicom_peers, sd_notify, timeouts
from edgekd.serve.api import Bench, Settings, app
from edgekd.serve.audit import Audit
from edgekd.serve.auth import is_loopback
from edgekd.serve.model import Model

CONNECTIONS = 512  # open at a time
KEEP_ALIVE_S = 15
BACKLOG = 512


def check(settings: Settings) -> None:
    """EdgeKDError for what would serve strangers."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise EdgeKDError("--tls-cert and --tls-key belong together: give both, or none")
    if settings.dicom is not None:
        dicom_peers.check(settings.dicom, settings.host)
    if settings.allowed_hosts and not settings.token:
        raise EdgeKDError(
            f"--allowed-host {settings.allowed_hosts[0]} lets in who comes through a proxy, so a "
            "token is needed: --token-file FILE, or EDGEKD_TOKEN in the environment"
        )
    if is_loopback(settings.host):
        return
    if not settings.token:
        raise EdgeKDError(
            f"--host {settings.host} can be reached from elsewhere, so a token is needed: "
            "--token-file FILE, or EDGEKD_TOKEN in the environment"
        )
    if settings.tls_cert is None and not settings.insecure_http:
        raise EdgeKDError(
            f"--host {settings.host} can be reached from elsewhere, so images and the token would "
            "cross the network in the clear: give --tls-cert and --tls-key, or --insecure-http "
            "where something else encrypts"
        )


class Listener(socket.socket):
    """Has no more than CONNECTIONS open at a time, those in a TLS handshake included.

    uvicorn's `limit_concurrency` refuses requests, and leaves the connections open.
    """

    def __init__(self, *kind: int) -> None:
        super().__init__(*kind)
        self._accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """As any socket's; ConnectionAbortedError, which asyncio passes over, for one too many."""
        found, address = super().accept()
        if sum(s.fileno() >= 0 for s in self._accepted) >= CONNECTIONS:
            found.close()
            raise ConnectionAbortedError
        self._accepted.add(found)
        return found, address


class Server(uvicorn.Server):
    """uvicorn's, which tells a service manager, and leaves by itself when it was told to stop."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        """Ready: called when it listens."""
        super().__init__(config)
        self.told = 0  # the first signal that came
        self._ready = ready

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: D102
        self.told = self.told or sig
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: D102
        if self.config.is_ssl:  # asyncio waits a minute, and uvicorn has no setting for it
            loop = asyncio.get_running_loop()
            loop.create_server = functools.partial(  # type: ignore[method-assign]
                loop.create_server, ssl_handshake_timeout=timeouts.HEAD_S
            )
        await super().startup(sockets)
        sd_notify.tell("READY=1")
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: D102
        sd_notify.tell("STOPPING=1")
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:  # noqa: D102
        # uvicorn's raises them again, which would end the process before its work is.
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in kinds}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def run(model: Model, settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM; KeyboardInterrupt after Ctrl-C. What was accepted is answered first."""
    check(settings)
    with contextlib.ExitStack() as leaving:
        audit = Audit(settings.audit)
        leaving.callback(audit.close)
        sock = leaving.enter_context(listener(settings))
        bench = Bench(model, settings, audit)
        leaving.callback(bench.work.close, 0)
        node = None
        if settings.dicom is not None:
            from edgekd.serve.dicom_scp import Node

            node = Node(bench, settings.dicom)
            leaving.callback(node.shut)
        made = config(app(bench), settings)
        bench.work.pulse().result()  # the first call of a runtime takes longest
        audit.write([bench.event("start")])
        scheme = "http" if settings.tls_cert is None else "https"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        where = f"{scheme}://{host}:{sock.getsockname()[1]}"
        who = f"{model.manifest.name} ({model.manifest.precision})"
        ready = f"{where} answers with {who}; audit log {settings.audit}"
        if node is not None and settings.dicom is not None:
            ready += (
                f"\nDICOM: {settings.dicom.aet} on {settings.host} port {node.port}, not "
                f"encrypted; results go to {settings.dicom.to}"
            )
            node.start()
        server = Server(made, lambda: say(ready))
        server.run(sockets=[sock])
        end = time.monotonic() + settings.timeout_s
        if node is not None:
            node.shut()
        if not bench.work.close(settings.timeout_s):
            say(f"stopped with images unanswered: {settings.timeout_s:g} s were not enough")
        if node is not None and (lost := node.close(max(1.0, end - time.monotonic()))):
            say(f"stopped with results of {lost} images undelivered: the audit log has which")
        audit.write([bench.event("stop")])
    if server.told == signal.SIGINT:
        raise KeyboardInterrupt


def listener(settings: Settings) -> socket.socket:
    """A socket that is bound; EdgeKDError with the reason if it cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = Listener(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or e
        raise EdgeKDError(
            f"cannot listen on {settings.host} port {settings.port}: {why}; "
            "choose another --host or --port"
        ) from None
    return made


def config(served: Any, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves `served`; EdgeKDError if it cannot."""
    made = uvicorn.Config(
        served, http=timeouts.protocol(settings.timeout_s), ws="none", log_config=None,
        log_level="error", access_log=False, server_header=False, date_header=True,
        proxy_headers=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_S,
        loop="asyncio",  # uvloop would not ask a Listener
        h11_max_incomplete_event_size=16 << 10,
        timeout_graceful_shutdown=max(1, round(settings.timeout_s)),
        ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key, lifespan="on",
    )  # fmt: skip
    try:
        made.load()
    except (OSError, ssl.SSLError) as e:
        raise EdgeKDError(
            f"cannot use --tls-cert {settings.tls_cert} with --tls-key {settings.tls_key}: "
            f"{e.strerror or e}"
        ) from None
    return made
