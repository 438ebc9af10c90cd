"""The device's side of `edgekd bench --host`: a request from stdin, progress and timings to stdout.

JSON, a line each. It needs numpy, pydantic and the profile's runtime. It ends with its stdin, so
that nothing goes on there when the connection is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekd import bench, runtimes
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Profile,
    Record,
    RuntimeUnavailable,
    T,
    Timing,
    Track,
)

READY = "edgekd-bench-there"  # the first line of ours: a login shell may print before it
KILL_SECONDS = 5  # that the stopwatch is given to end its workers


class Request(Record):
    """What is asked for: `bench.bench` of these folders."""

    artifacts: tuple[str, ...]
    out: str
    profile: Profile
    how: bench.How


class Said(Record):
    """One line of the answer: a bar begins, moves or ends, or it is the last: timings or error."""

    begin: str = ""
    total: int | None = None
    step: int | None = None
    end: bool = False
    error: str = ""
    unavailable: bool = False  # the error is a RuntimeUnavailable
    timings: tuple[dict[str, Any], ...] | None = None


Say = Callable[[Said], None]


def serve(request: Request, say: Say) -> list[Timing]:
    """The timings that are asked for; RuntimeUnavailable if this is not the profile's device."""
    profile = request.profile
    if not runtimes.here(profile):
        seen = ", ".join(runtimes.get(profile.runtime).devices())
        raise RuntimeUnavailable(f"{profile.runtime} has no device {profile.device}, only {seen}")
    artifacts = [Artifact.load(Path(folder)) for folder in request.artifacts]
    return bench.bench(
        artifacts, profile, Path(request.out), request.how, on_device=True, track=_telling(say)
    )  # fmt: skip


def _telling(say: Say) -> Track:
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
            say(Said(begin=what, total=total))
            for item in items:
                yield item
                say(Said(step=getattr(item, "size", 1)))
            say(Said(end=True))
        finally:
            shown = False

    return track


def _end_with_stdin() -> None:
    """Stop this process and its workers when stdin ends."""

    def watch() -> None:
        while os.read(0, 1 << 16):  # not sys.stdin: its lock would be held when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(KILL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # so that what is open is closed

    with contextlib.suppress(PermissionError):  # it leads a group already
        os.setsid()
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Serve the request on stdin; the exit code. Errors of ours are answers, too."""
    # Libraries print: what they say on stdout goes to stderr, and the answers keep their own line.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)

        def say(said: Said) -> None:
            stdout.write(said.model_dump_json(exclude_defaults=True) + "\n")
            stdout.flush()

        stdout.write(READY + "\n")
        stdout.flush()
        line = sys.stdin.buffer.readline()
        _end_with_stdin()
        try:
            timings = serve(Request.model_validate_json(line), say)
            say(Said(timings=tuple(t.model_dump(mode="json") for t in timings)))
        except EdgeKDError as e:
            say(Said(error=str(e) or "?", unavailable=isinstance(e, RuntimeUnavailable)))
        except ValidationError as e:  # cut off, or of another edgekd
            say(Said(error=f"not a request: {e.error_count()} mistakes"))
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
