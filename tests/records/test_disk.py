"""Room is asked for before it is needed, and its lack is told in one line."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from edgekd.records import EdgeKDError, NoRoom, check_room, disk, user_cache, user_state
from edgekd.records.store import append, make_folder, write_atomic


def refuse(number):
    def refused(*args):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("number", [0, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_is_as_long_as_it_was_asked_for_and_keeps_what_it_held(
    tmp_path, monkeypatch, number
):
    if number:  # a file system that cannot: zeros are written
        monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    path = tmp_path / "f"
    with path.open("wb") as f:
        f.write(b"head")
        disk.allocate(f, 3 << 20)
    found = np.frombuffer(path.read_bytes(), np.uint8)
    assert len(found) == 3 << 20
    assert found[:4].tobytes() == b"head"
    assert not found[4:].any()
    assert path.stat().st_blocks * 512 >= 3 << 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_told_before_a_library_writes(tmp_path, monkeypatch, number):
    check_room(tmp_path, 1000)
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    with pytest.raises(NoRoom, match=r"cannot write 0.0 MB to .*there is no room"):
        check_room(tmp_path, 1000)
    assert not list(tmp_path.iterdir())


def test_a_line_that_finds_no_room_is_told():
    with pytest.raises(NoRoom, match="there is no room"):
        append(Path("/dev/full"), "x")


def test_a_whole_file_that_finds_no_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EDQUOT))
    with pytest.raises(NoRoom, match="quota"):
        write_atomic(tmp_path / "f", "x")
    assert not list(tmp_path.iterdir())


def test_a_bug_is_no_fault_of_the_machine():
    assert disk.told(FileNotFoundError(errno.ENOENT, "no such file")) is None
    assert disk.told(ValueError("x")) is None
    assert "ulimit -n" in str(disk.told(OSError(errno.EMFILE, "Too many open files", "x")))
    assert "--batch" in str(disk.told(MemoryError()))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError()))
    for folder in (user_cache, user_state):
        with pytest.raises(EdgeKDError, match=r"no home folder.*XDG_CACHE_HOME"):
            folder()


def test_a_cache_that_cannot_be_written_to_is_mended_by_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EdgeKDError, match="set XDG_CACHE_HOME to a folder"):
        make_folder(user_cache() / "latency")


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path):
    with pytest.raises(OSError, match="name too long") as found:
        (tmp_path / ("x" * 300)).stat()
    said = str(disk.told(found.value))
    assert said.endswith("...: File name too long: give another name or rights to it")
    assert len(said) < 150
