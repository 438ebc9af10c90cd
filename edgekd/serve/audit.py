"""Who was told what, when: one line of JSON an answer, on the disk before the answer is sent.

No pixels, no names: an image is its SHA-256. A full file becomes FILE.1, that one FILE.2, and so
on; the oldest goes.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.records import EdgeKDError, make_folder, user_state

LARGEST = 64 << 20  # bytes of one file
FILES = 16  # kept, the one that is written included: 1 GiB, some 2 million answers


class AuditFailed(EdgeKDError):
    """A record could not be written: what it tells of must not be sent."""


def default() -> Path:
    """$XDG_STATE_HOME/edgekd/audit.jsonl or ~/.local/state/edgekd/audit.jsonl."""
    return user_state() / "audit.jsonl"


class Audit:
    """A file that only grows. Threads may share one; two processes may not have the same file."""

    def __init__(self, path: Path, *, largest: int = LARGEST, files: int = FILES) -> None:
        self.path, self.largest, self.files = path, largest, files
        self.error = ""  # why the last record could not be written; empty: it was
        self._turn = threading.Lock()
        make_folder(path.parent, "choose another file with --audit, or set XDG_STATE_HOME")
        try:
            self._fd = self._open()
        except OSError as e:
            raise AuditFailed(f"audit log {path} cannot be written: {_why(e)}") from None

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append a line a record, each in one write; they are on the disk when this returns.

        AuditFailed if they are not.
        """
        with self._turn:
            try:
                if self._fd < 0:
                    self._fd = self._open()
                for record in records:
                    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
                    if self._size and self._size + len(line) > self.largest:
                        self._rotate()
                    self._append(line)
                os.fsync(self._fd)
            except OSError as e:
                # What was torn ends here: the next record opens the file anew, on a line of its own
                self._close()
                self.error = _why(e)
                raise AuditFailed(f"audit log {self.path} cannot be written: {self.error}") from e
            self.error = ""

    def close(self) -> None:
        """Let another process have the file."""
        with self._turn:
            self._close()

    def _append(self, line: bytes) -> None:
        written = os.write(self._fd, line)
        self._size += written
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> int:
        """The file, ours alone, ending in a whole line; OSError, whose reason names no path."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no plain file: choose another --audit")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(fd, 0o600)
            self._size = found.st_size
            if found.st_size and os.pread(fd, 1, found.st_size - 1) != b"\n":
                self._size += os.write(fd, b"\n")  # a kill tore the last line
            _sync(self.path.parent)
        except BlockingIOError as e:
            os.close(fd)
            why = "another edgekd serve writes it: choose another --audit"
            raise OSError(e.errno, why) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _rotate(self) -> None:
        """The file becomes .1, .1 becomes .2; the last one goes."""
        os.fsync(self._fd)
        for n in range(self.files - 1, 0, -1):
            older = self._numbered(n - 1)
            if older.exists():
                older.replace(self._numbered(n))
        self._close()
        self._fd = self._open()

    def _numbered(self, n: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{n}") if n else self.path

    def _close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd = -1


def now() -> str:
    """The time, UTC, to the millisecond."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def _why(e: OSError) -> str:
    return e.strerror or str(e)


def _sync(folder: Path) -> None:
    """A new file's name is on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
