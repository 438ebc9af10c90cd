"""One command at a time: who comes second waits, and finds what the first has made."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from edgekd.records.disk import words
from edgekd.records.errors import EdgeKDError

LOG = logging.getLogger(__name__)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def first_process() -> bool:
    """Whether this is the only process of its command, or the first of those of a launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def locked(path: Path, *, inside: bool = False) -> Iterator[None]:
    """Keep a file or folder from other commands; where one of them has it, wait for its end.

    The kernel holds the lock, on the file .NAME.lock beside `path`, or .lock inside a folder that
    is never removed; so it ends with its process, however that ends. Within itself it can be taken
    again. A folder that cannot be written to needs no lock. Of several processes of a launcher the
    first alone takes it.
    """
    with contextlib.ExitStack() as stack:
        if first_process():
            path = path.resolve()
            file = path / ".lock" if inside else path.with_name(f".{path.name}.lock")
            _take(path, file, stack)
        yield


def _take(path: Path, file: Path, stack: contextlib.ExitStack) -> None:
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, mode=0o664, is_singleton=True)
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            LOG.warning("another edgekd is at work on %s: waiting until it is done", path)
            stack.enter_context(lock.acquire(timeout=-1, poll_interval=0.1))
    except OSError as e:
        if e.errno not in READ_ONLY:
            raise EdgeKDError(
                f"cannot lock {path}: {words(e)}; or choose a folder of another disk"
            ) from None
