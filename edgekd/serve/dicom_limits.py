"""What may come in on one DICOM connection: pynetdicom itself has no bounds on size or patience.

To set them a Gate takes the place of what is pynetdicom 3's own, its socket's `recv`, its threads'
`run`, `_kill`, so pyproject.toml asks for a version below 4. The abuse in tests/test_node.py tells
whether another one will do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from socketserver import BaseServer
from typing import Any

from pynetdicom.transport import ThreadedAssociationServer

PDU = 256 << 10  # bytes of one protocol data unit, as we tell the other side
CONNECTIONS = 32  # open at a time, most of them not associated yet
OVERHEAD = 64 << 10  # bytes that an object may take besides itself


class Server(ThreadedAssociationServer):
    """pynetdicom's, with a bound on connections, which never prints a traceback."""

    daemon_threads = True

    def verify_request(self, *_: Any) -> bool:  # noqa: D102
        return len(self.active_associations) < CONNECTIONS

    def handle_error(self, *_: Any) -> None:  # noqa: D102
        pass  # the connection is closed; there is nothing to say of who it was

    def shutdown(self) -> None:  # noqa: D102
        BaseServer.shutdown(self)  # pynetdicom's wants a server that its AE started
        self.server_close()


class Gate:
    """What a connection has sent since it was last answered, and for how long it has been at it."""

    def __init__(self, event: Any, *, most: int, patience_s: float,
                 room: Callable[[], bool], broken: Callable[[], None],
                 ended: Callable[[], None]) -> None:  # fmt: skip
        """Most: bytes of one object. room: whether more may be held. broken: called when the
        connection ends in what pynetdicom did not expect; ended: when it ends, however it does.
        """
        self.held = 0  # bytes
        self._most, self._patience_s, self._room = most + OVERHEAD, patience_s, room
        self._began: float | None = None
        self._messages = 0  # not answered
        self._assoc = assoc = event.assoc
        self._transport = transport = assoc.dul.socket
        transport.recv = self._recv
        self._socket, self._ended = transport.socket, ended
        for thread in (assoc, assoc.dul):
            thread.daemon = True  # none of them keeps the process from ending
            thread.run = self._guarded(thread.run, broken)

    def answered(self) -> None:
        """Something was sent: it may begin anew."""
        self.held, self._messages, self._began = 0, 0, None

    def arrived(self) -> None:
        """A whole message is there."""
        self._messages += 1

    def left(self) -> None:
        """The connection is closed: who waits for its first words, as pynetdicom does, need not."""
        waiting = self._assoc.dul.to_user_queue
        if self._assoc.requestor.primitive is None and waiting.empty():
            waiting.put(None)

    def _recv(self, size: int) -> bytearray:
        """So many bytes, or fewer if the other side left; OSError ends the connection."""
        if self._began is None:
            self._began = time.monotonic()
        end = self._began + self._patience_s
        if size > PDU or self.held + size > self._most or self._messages > 1 or not self._room():
            raise OSError
        got = bytearray()
        while len(got) < size:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._transport.socket.settimeout(left)
            part = self._transport.socket.recv(min(size - len(got), 1 << 16))
            if not part:
                break
            got += part
            self.held += len(part)
        self._transport.socket.settimeout(self._patience_s)  # for what we send
        return got

    def _guarded(self, run: Callable[[], None], broken: Callable[[], None]) -> Callable[[], None]:
        """`run` of one of the connection's two threads, after which the other one ends too."""

        def guarded() -> None:
            try:
                run()
            except Exception:  # whatever some bytes make a parser raise
                broken()
                assoc = self._assoc
                assoc.is_aborted, assoc.is_established = True, False
                assoc._kill = True
                assoc.dul.kill_dul()
                if self._transport.socket is not None:
                    self._transport.close()
            finally:
                if threading.current_thread() is self._assoc.dul:
                    self._socket.close()  # pynetdicom leaves it to the collector if the other left
                    self.left()
                    self._ended()

        return guarded
