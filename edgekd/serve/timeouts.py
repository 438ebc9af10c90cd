"""Connections that do not wait for ever: uvicorn has no limit for slow heads, bodies or readers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # for a request's line and headers
READ_S = 10.0  # for reading the answer, beside the time that the request may take
LINGER_S = 2.0  # that a refused body is still read and thrown away


class Lingering:
    """A transport that, closed in the midst of a body, lets the other side read why.

    Closed at once, the system answers what still comes with a reset, and the refusal is lost.
    """

    def __init__(self, real: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._real, self._loop = real, loop
        self.midst = False  # a body is not yet whole
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_closing(self) -> bool:
        """Whether nothing more is to be written."""
        return self.lingers or self._real.is_closing()

    def close(self) -> None:
        """Close, at once or when the other side has had LINGER_S to see what was written."""
        if self.is_closing():
            return
        if not self.midst:
            self._real.close()
            if self._real.get_write_buffer_size():  # which close() waits for
                self._loop.call_later(READ_S, self._real.abort)
            return
        self.lingers = True
        if self._real.can_write_eof():
            with contextlib.suppress(OSError):  # the other side is gone already
                self._real.write_eof()
        self._real.resume_reading()
        self._loop.call_later(LINGER_S, self._real.abort)


def protocol(request_s: float) -> type[H11Protocol]:
    """What uvicorn speaks HTTP with: a request has HEAD_S for its head, then `request_s` in all and
    READ_S to be read; a connection that takes longer is cut.
    """

    class Patient(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        heard = False  # the head of the request that is at work

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(Lingering(transport, self.loop))  # type: ignore[arg-type]
            self._cut_in(HEAD_S)

        def data_received(self, data: bytes) -> None:
            if self.transport.lingers:  # type: ignore[attr-defined]
                return
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            self.heard = False
            self._cut_in(None)
            super().on_response_complete()  # may begin with a request that came meanwhile
            self._watch()

        def send_400_response(self, msg: str) -> None:
            # uvicorn calls it where it caught the reason, and does not tell it
            why = sys.exc_info()[1]
            status = getattr(why, "error_status_hint", 400)
            body = json.dumps({"error": f"this is no HTTP request: {why or msg}"}).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)),
                       "connection": "close"}  # fmt: skip
            answer = h11.Response(status_code=status, headers=list(headers.items()))
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cut_in(None)
            super().connection_lost(exc)

        def _watch(self) -> None:
            state = self.conn.their_state
            self.transport.midst = state is h11.SEND_BODY  # type: ignore[attr-defined]
            at_work = self.cycle is not None and not self.cycle.response_complete
            if at_work and not self.heard:
                self.heard = True
                self._cut_in(request_s + READ_S)
                return
            # half a head, or what is left of a body that was not wanted
            more = state is h11.SEND_BODY or self.conn.trailing_data[0]
            if not at_work and self.timer is None and more:
                self._cut_in(HEAD_S)

        def _cut_in(self, seconds: float | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None
            if seconds is not None:
                self.timer = self.loop.call_later(seconds, self.transport.abort)

    return Patient
