"""Standard output and error: closed, full, in an encoding that lacks a sign, or to be quiet."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

REFUSALS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_hushed = False


def quiet() -> bool:
    """Whether this process tells neither progress nor notes; of several the first alone does."""
    return _hushed or os.environ.get("RANK", "0") != "0"


@contextlib.contextmanager
def hushed(asked: bool) -> Iterator[None]:
    """Quiet meanwhile if that is asked, or if the command is one that a quiet one runs."""
    global _hushed
    before = _hushed
    _hushed = before or asked
    try:
        yield
    finally:
        _hushed = before


def open_all() -> None:
    """No stream is missing, and what its encoding lacks is written as a question mark."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file opened would get its number
            number = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def close(code: str | int | None) -> NoReturn:
    """End with this exit code, or where nobody takes what is left to write, with 1 and one line."""
    try:
        sys.stdout.flush()
    except OSError as e:
        _forget()
        if not code:
            refuse(e)
    sys.exit(code)


def refuse(error: OSError) -> NoReturn:
    """End because the output could not be written; quietly where its reader has had enough."""
    if error.filename is not None or error.errno not in REFUSALS:
        raise error  # of something else: a bug
    _forget()
    if not isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: cannot write the output: {error.strerror}\n")
    sys.exit(1)


def _forget() -> None:
    """Python itself flushes once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
