"""Room on the disk: asked for beforehand, and the reason in words where there is none."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from edgekd.records.errors import EdgeKDError, NoRoom

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HELP = {
    errno.ENOSPC: "there is no room; free some on that disk",
    errno.EDQUOT: "there is no room; free some of that quota",
    errno.EFBIG: "there is no room in one file; see ulimit -f, and what the file system allows",
    errno.EROFS: "choose another folder",
    errno.EMFILE: "raise ulimit -n",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close some programs",
    errno.EIO: "the disk may be broken; choose another",
}  # of what is the machine's, and no bug
NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


def words(error: OSError) -> str:
    """Why the system refused, and what helps."""
    why = error.strerror or str(error) or type(error).__name__
    return f"{why}: {HELP[error.errno]}" if error.errno in HELP else why


def refused(path: Path | str, error: OSError) -> EdgeKDError:
    """The error for a file that could not be written."""
    kind = NoRoom if error.errno in FULL else EdgeKDError
    return kind(f"cannot write {path}: {words(error)}")


def told(error: BaseException) -> EdgeKDError | None:
    """What ended a command, if it is the machine's and no bug: a full disk, no memory, ..."""
    if isinstance(error, OSError) and error.errno in HELP:
        return refused(error.filename2 or error.filename or "the output", error)
    if isinstance(error, OSError) and error.errno in NAMES and error.filename is not None:
        name = os.fsdecode(error.filename)
        shown = name if len(name) < 100 else f"{name[:60]}..."
        return EdgeKDError(f"{shown}: {error.strerror}: give another name or rights to it")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return EdgeKDError("no memory is left: a smaller --batch or --size, or fewer programs")
    return None


def allocate(file: BinaryIO, size: int) -> None:
    """Make an open file `size` bytes long, of zeros behind what it holds; OSError without room.

    A page of a mapped file that gets none when it is written ends the process (SIGBUS).
    """
    file.flush()
    held = os.fstat(file.fileno()).st_size
    if hasattr(os, "posix_fallocate"):  # a Mac has none
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                raise
    file.seek(held)
    for start in range(held, size, 1 << 20):
        file.write(bytes(min(1 << 20, size - start)))
    file.flush()


def check_room(folder: Path, size: int) -> None:
    """EdgeKDError unless `folder` takes a file of `size` bytes, before a library writes one.

    Some libraries end the process, or say only "iostream error", where there is no room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            allocate(file, size)
    except OSError as e:
        raise refused(f"{size / 1e6:.1f} MB to {folder}", e) from None
