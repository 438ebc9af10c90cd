"""The device's end of what a workstation asks over ssh: a request on stdin, answers on stdout.

JSON, a line each. Standard library alone: it runs before anything is installed there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.records import T, Track

READY = "edgekd-there"  # the first line of ours: a login shell may print before it
KILL_SECONDS = 5  # that what runs here is given to end in order
ENDS = threading.RLock()  # whoever has it says whether we end with stdin; it is never given back

# A line of the answer. begin, total, step, end: a bar begins, moves or ends; send: from where on
# the files that were announced are wanted; error, result: the last.
Say = Callable[..., None]


def answer(
    serve: Callable[[bytes, Say], Any],
    fixable: type[Exception],
    unavailable: tuple[type[Exception], ...] = (),
) -> int:
    """Serve the request on stdin; the exit code. `fixable` errors are answers, too.

    unavailable: those of them that say that a runtime or device is not here.
    """
    # Libraries print: what they say on stdout goes to stderr, and the answers keep their own line.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)

        def say(**fields: Any) -> None:
            stdout.write(json.dumps(fields) + "\n")
            stdout.flush()

        stdout.write(READY + "\n")
        stdout.flush()
        try:
            line = sys.stdin.buffer.readline()
            say(result=serve(line, say))
        except fixable as e:
            say(error=str(e) or "?", unavailable=isinstance(e, unavailable))
        except (KeyboardInterrupt, BrokenPipeError):  # nobody listens any more
            return 130
    return 0


def telling(say: Say) -> Track:
    """A Track that tells of its bar; of bars within bars, the outermost."""
    shown = False

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        nonlocal shown
        if shown:
            yield from items
            return
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        shown = True
        try:
            say(begin=what, total=total)
            for item in items:
                yield item
                say(step=getattr(item, "size", 1))
            say(end=True)
        finally:
            shown = False

    return track


def end_with_stdin() -> None:
    """Stop this process and those that it started when stdin ends: the connection is gone."""

    def watch() -> None:
        while os.read(0, 1 << 16):  # not sys.stdin: its lock would be held when Python ends
            pass
        ENDS.acquire()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(KILL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # so that what is open is closed

    with contextlib.suppress(PermissionError):  # it leads a group already
        os.setsid()
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()


def outlive_stdin() -> None:
    """From now on go on to the end, though the connection be gone; stop if it is already."""
    ENDS.acquire()
