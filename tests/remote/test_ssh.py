"""Against a real OpenSSH server on this machine, see loopback.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.records import EdgeKDError
from edgekd.remote import ssh

pytestmark = pytest.mark.slow


@pytest.fixture
def device(loopback):
    with ssh.Device("device") as found:
        yield found


def test_a_command_there(device, loopback):
    odd = ["a b", "$HOME", "it's", "-x", "", "*", "\\", "ü;exit 3"]
    script = 'for x; do printf "%s\\n" "$x"; done; pwd; cat; echo bad >&2; exit 7'
    done = device.run(["sh", "-c", script, "sh", *odd], stdin=b"given")
    assert done.returncode == 7
    *said, where, stdin = done.stdout.decode().split("\n")
    assert (said, stdin) == (odd, "given")
    assert where == device.folder
    assert done.stderr == b"bad\n"
    assert Path(device.home) == Path.home()
    folder = Path(device.folder)
    assert folder.parent == loopback.tmp
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_connection_and_nothing_left(loopback):
    before = loopback.connections()
    with ssh.Device("device") as device:
        for _ in range(3):
            assert device.run(["true"]).returncode == 0
        device.run(["sh", "-c", "mkdir deep; echo x > deep/file"])
        assert loopback.left(0)
    assert not loopback.left(0)
    assert loopback.connections() == before + 1


def test_nothing_is_left_after_an_error(loopback):
    def fail():
        with ssh.Device("device") as device:
            device.put_files({"a": b"b"}, ".")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not loopback.left(0)


def test_nothing_is_left_when_nobody_hears_where_the_folder_is(tmp_path):
    """The connection is cut as the folder is made: what tells of it meets a closed pipe."""
    away, listens = os.pipe()
    os.close(away)
    done = subprocess.run(
        ["sh", "-c", ssh.HOLD], stdin=subprocess.DEVNULL, stdout=listens, check=False,
        stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    os.close(listens)
    assert done.returncode
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_we_are_killed(loopback):
    code = (
        "from edgekd.remote import ssh; ssh.ORPHAN_SECONDS = 1\n"
        "with ssh.Device('device') as d: d.run(['sh', '-c', 'echo up > up; cat'], stdin=b''); "
        "print('up', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        assert loopback.left(0)
        process.send_signal(signal.SIGKILL)
    assert not loopback.left()


def test_folders_there_and_back(device, tmp_path):
    folder = tmp_path / "sent"
    (folder / "deep er").mkdir(parents=True)
    (folder / "deep er" / "data").write_bytes(bytes(range(256)) * 5000)
    (folder / "run").write_text("#!/bin/sh\necho ran")
    (folder / "run").chmod(0o755)
    device.put(folder, "there/it is")
    assert device.run(["there/it is/run"]).stdout == b"ran\n"
    device.get("there/it is", tmp_path / "back")
    files = {str(p.relative_to(tmp_path / "back")) for p in tmp_path.glob("back/**/*")}
    assert files == {"deep er", "deep er/data", "run"}
    data = (folder / "deep er" / "data").read_bytes()
    assert (tmp_path / "back" / "deep er" / "data").read_bytes() == data
    device.put(folder / "run", "-odd")
    device.get("-odd", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (folder / "run").read_bytes()


def test_no_link_is_followed(device, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    for path in (folder, folder / "link", tmp_path / "missing"):
        with pytest.raises(EdgeKDError, match="not sent"):
            device.put(path, "a")
    device.run(["sh", "-c", "mkdir d; ln -s /etc d/out"])
    with pytest.raises(EdgeKDError, match=r"device sends './d/out', no plain file"):
        device.get("d", tmp_path / "d")


def test_what_is_too_large_or_missing_there(device, tmp_path):
    device.put_files({"big": b"x" * 1000}, ".")
    with pytest.raises(EdgeKDError, match="more of big than"):
        device.get("big", tmp_path / "a", limit=999)
    device.get("big", tmp_path / "b", limit=1000)
    with pytest.raises(EdgeKDError, match=r"device sends no missing: tar: .*"):
        device.get("missing", tmp_path / "c")
    device.run(["sh", "-c", "echo x > file"])
    with pytest.raises(EdgeKDError, match=r"device takes no files: mkdir: "):
        device.put_files({"a": b"x"}, "file/below")


def test_a_command_that_takes_too_long(device, loopback):
    with pytest.raises(EdgeKDError, match=r"device: sleep took more than 0.2 s$"):
        device.run(["sleep", "1"], timeout=0.2)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("unknown-key", "host key of unknown-key is not known: run ssh unknown-key once"),
        ("changed-key", "changed-key shows another host key than the one known"),
        ("wrong-key", "wrong-key lets none of your keys in: ssh-copy-id wrong-key"),
        ("closed", "cannot reach closed: .*Connection refused"),
    ],
)
def test_no_connection(loopback, host, message):
    with pytest.raises(EdgeKDError, match=message) as caught, ssh.Device(host):
        pass
    assert "\n" not in str(caught.value)
    assert not loopback.left()


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b", "a\nb"])
def test_what_is_no_host(host):
    with pytest.raises(EdgeKDError, match="is no host"):
        ssh.Device(host)


def test_no_client_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EdgeKDError, match="no ssh here: install"), ssh.Device("device"):
        pass


def test_a_url_is_a_host(loopback):
    port = next(
        line.split()[1]
        for line in (loopback.folder / "client").read_text().splitlines()[::-1]
        if line.strip().startswith("Port")
    )
    with ssh.Device(f"ssh://device:{port}") as device:
        assert device.run(["echo", "hi"]).stdout == b"hi\n"


def test_what_is_said_stays_on_its_line():
    assert ssh.printable("a\x1b[2J\r\nb\x00 " + "c" * 900) == "c" * 500
    assert ssh.printable("a\x1b[2J\r\nb") == "a [2J b"
