"""Who comes second waits for the first, however the first one ends."""

import errno
import subprocess
import sys
import threading
import time

import filelock
import pytest

from edgekd.records import EdgeKDError, locked

HOLDER = """
import sys, time
from pathlib import Path
from edgekd.records import locked
with locked(Path(sys.argv[1]), inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_killed_command_lets_the_next_one_in(tmp_path, where, caplog):
    folder = tmp_path / "teacher"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), where],
                             stdout=subprocess.PIPE)  # fmt: skip
    assert first.stdout.readline() == b"held\n"
    inside = threading.Event()

    def second():
        with locked(folder, inside=where == "inside"):
            inside.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not inside.wait(0.5)
    assert f"another edgekd is at work on {folder}: waiting" in caplog.text
    first.kill()
    assert inside.wait(10)
    thread.join()
    first.communicate()


def test_one_command_takes_it_twice_and_others_wait_until_it_leaves_for_good(tmp_path):
    order = []

    def other():
        with locked(tmp_path / "x"):
            order.append("other")

    with locked(tmp_path / "x"):
        with locked(tmp_path / "x"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_to_needs_no_lock(tmp_path, monkeypatch, number):
    refuse(monkeypatch, number)
    with locked(tmp_path / "x"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.ENOLCK)
    with pytest.raises(EdgeKDError, match=r"cannot lock .*another disk"), locked(tmp_path / "x"):
        pass


def refuse(monkeypatch, number):
    def acquire(*args, **named):
        raise OSError(number, "refused")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


def test_of_several_processes_the_first_alone_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "x"):
        assert not list(tmp_path.iterdir())
