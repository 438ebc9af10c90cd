"""The audit log: on the disk, nobody else's to read, whole lines whatever happened before."""

import json
import os
import stat
import subprocess
import sys

import pytest

from edgekd.serve import audit
from edgekd.serve.audit import Audit, AuditFailed


def lines(path):
    return path.read_text("utf-8").splitlines()


@pytest.fixture
def log(tmp_path):
    found = Audit(tmp_path / "logs" / "audit.jsonl")
    yield found
    found.close()


def test_a_record_is_one_write_and_on_the_disk_before_it_returns(log, monkeypatch):
    done = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, x: done.append(x) or write(fd, x))
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("on disk") or fsync(fd))
    log.write([{"a": 1}, {"b": "ü"}])
    assert done == [b'{"a": 1}\n', '{"b": "ü"}\n'.encode(), "on disk"]
    assert lines(log.path) == ['{"a": 1}', '{"b": "ü"}']


def test_nobody_else_may_read_it(log):
    log.path.chmod(0o644)  # as an older file may be
    log.close()
    again = Audit(log.path)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    again.close()


def test_a_line_that_a_kill_tore_stands_alone(log):
    log.write([{"n": 1}])
    log.close()
    with log.path.open("a") as f:
        f.write('{"n": 2, "answ')
    again = Audit(log.path)
    again.write([{"n": 3}])
    again.close()
    assert lines(log.path) == ['{"n": 1}', '{"n": 2, "answ', '{"n": 3}']


def test_no_record_is_lost_in_a_kill(tmp_path):
    """A process that is killed in the midst has on the disk all that it said it had."""
    code = f"""import sys, itertools
from pathlib import Path
from edgekd.serve.audit import Audit
log = Audit(Path({str(tmp_path / "audit.jsonl")!r}))
for n in itertools.count():
    log.write([{{"n": n}}])
    sys.stdout.write(f"{{n}}\\n"); sys.stdout.flush()"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    said = [child.stdout.readline() for _ in range(50)]
    child.kill()
    said += child.stdout.readlines()
    child.stdout.close()
    child.wait()
    log = Audit(tmp_path / "audit.jsonl")
    log.close()
    found = [json.loads(x)["n"] for x in lines(log.path)]
    last = int(said[-1] if said[-1].endswith("\n") else said[-2])
    assert found == list(range(len(found)))
    assert found[-1] >= last >= 49


def test_full_files_are_turned_over(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = Audit(path, largest=40, files=3)  # four lines of ten bytes
    for n in range(100, 122):
        log.write([{"n": n}])  # '{"n": 100}\n': 11 bytes
    log.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    kept = [json.loads(x)["n"] for n in reversed(names) for x in lines(tmp_path / n)]
    assert kept == list(range(kept[0], 122))
    assert len(kept) >= 7
    for n in names:
        assert (tmp_path / n).stat().st_size <= 40
        assert stat.S_IMODE((tmp_path / n).stat().st_mode) == 0o600


def test_a_full_disk_is_told_and_the_next_record_stands_alone(log, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, x: write(fd, x[:5]))
    with pytest.raises(AuditFailed, match="cannot be written: No space left on device"):
        log.write([{"n": 1}])
    assert log.error == "No space left on device"
    monkeypatch.undo()
    log.write([{"n": 2}])
    assert log.error == ""
    assert lines(log.path) == ['{"n":', '{"n": 2}']


def test_what_cannot_be_opened_again_is_told(log, tmp_path):
    """After a full file was turned over, or a record torn."""
    (tmp_path / "target").touch()
    log._close()
    log.path.unlink()
    log.path.symlink_to(tmp_path / "target")
    for _ in range(2):
        with pytest.raises(AuditFailed, match="cannot be written: Too many"):
            log.write([{"n": 1}])
        assert "symbolic links" in log.error
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(AuditFailed):
        log.write([{"n": 1}])
    assert log.error == "Is a directory"
    log.path.rmdir()
    log.write([{"n": 2}])
    assert (log.error, lines(log.path)) == ("", ['{"n": 2}'])


def test_two_may_not_write_one_file(log):
    with pytest.raises(AuditFailed, match="another edgekd serve writes it: choose another"):
        Audit(log.path)


def test_it_follows_no_link_and_writes_no_device(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(AuditFailed, match=r"link cannot be written: "):
        Audit(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AuditFailed, match="it is no plain file"):
        Audit(tmp_path / "pipe")


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert audit.default() == tmp_path / "edgekd" / "audit.jsonl"
