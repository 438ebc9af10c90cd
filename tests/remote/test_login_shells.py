"""Login shells that are not sh, and what their files print."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from edgekd.records import EdgeKDError
from edgekd.remote import client, ssh

pytestmark = pytest.mark.slow

# As sshd calls them. pwsh is in no distribution: where it is installed, it is tested.
SHELLS = (
    "bash", "rbash", "dash", "busybox sh", "ksh", "mksh", "zsh", "csh", "tcsh", "fish", "pwsh"
)  # fmt: skip
ODD = ["a b", "it's", '"', "!x !! !", "~", "~root", "a\nb\n", "\\", "\\'", "$HOME`id`", "%s%d",
       "*", "{a,b}", "-n", "", "#", "ü;exit 3", "^a^b", "(x)", "\t", "&|<>", "\\041"]  # fmt: skip
NOISE = """echo '{"result": 1}'; echo now edgekd-begins; echo 'stty: no terminal' >&2
printf 'Hi! >'
"""
GO_ON = 'exec sh -c "$SSH_ORIGINAL_COMMAND"'


@pytest.mark.parametrize("shell", SHELLS)
def test_a_login_shell_passes_on_what_is_sent(shell, tmp_path):
    words = shell.split()
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]} here: apt install {words[0]}")
    script = 'for x; do printf "%s\\0" "$x"; done; cat; echo bad >&2; exit 7'
    done = subprocess.run(
        [*words, "-c", ssh.for_any_shell(["sh", "-c", script, "sh", *ODD])],
        input=b"\0given", capture_output=True, env=os.environ | {"HOME": str(tmp_path)},
        check=False,
    )  # fmt: skip
    begin, *said = done.stdout.split(b"\0")
    assert (begin + b"\0").startswith(ssh.BEGIN)
    assert [begin.removeprefix(ssh.BEGIN), *said[:-2]] == [x.encode() for x in ODD]
    assert (said[-1], done.stderr, done.returncode) == (b"given", b"bad\n", 7)


def test_what_a_login_shell_prints_is_no_answer(loopback, tmp_path):
    shell = next((s for s in ("tcsh", "fish", "zsh") if shutil.which(s)), "sh")
    home = tmp_path / "it's !1 ~"
    home.mkdir()
    loopback.log_in_with(
        f"{NOISE}cd {loopback.tmp}; HOME={shlex.quote(str(home))} PYTHONSAFEPATH=1 LC_ALL=C; "
        "TERM=odd TMPDIR=.; export HOME PYTHONSAFEPATH LC_ALL TERM TMPDIR\n"
        f'exec {shell} -c "$SSH_ORIGINAL_COMMAND"'
    )
    files = {"a !b\n~'": bytes(range(256)), "ours.py": b"import sys; print(sys.argv[1])"}
    with ssh.Device("shell") as device:
        assert device.home == str(home)
        device.put_files(files, ".")
        assert device.run(["cat", "a !b\n~'"]).stdout == files["a !b\n~'"]
        device.get("a !b\n~'", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == files["a !b\n~'"]
        found = client.probe(device, sys.executable, ["json", "not_there_at_all"], "--python")
        assert found.missing == ("not_there_at_all",)
        done = device.run([sys.executable, "-m", "ours", "ü"])
        assert done.stdout == "ü\n".encode()
    assert not loopback.left()


@pytest.mark.parametrize(
    ("login", "message"),
    [
        ("echo This account is currently not available.; exit 1",
         "^shell runs no sh: This account is currently not available.$"),
        ("false", "^shell runs no sh: exit code 1, nothing was said$"),
        ("echo Welcome; echo 'rbash: sh: command not found' >&2; exit 127",
         "^shell runs no sh: rbash: sh: command not found$"),
        ("echo Welcome; exec sleep 2", r"^shell begins no command within 0.5 s: .*\.bashrc"),
        (f"TMPDIR=/none/such; {GO_ON}",
         "^shell makes no temporary folder in its TMPDIR or /tmp: .*/none/such"),
    ],
)  # fmt: skip
def test_a_login_that_is_no_use(loopback, monkeypatch, login, message):
    monkeypatch.setattr(ssh, "ANSWER_SECONDS", 0.5 if "sleep" in login else 60)
    loopback.log_in_with(f"cd {shlex.quote(str(loopback.tmp))}\n{login}")
    with pytest.raises(EdgeKDError, match=message) as caught, ssh.Device("shell"):
        pass
    assert "\n" not in str(caught.value)
    assert not loopback.left()


@pytest.mark.parametrize("home", ["", "here", "/a\nb"])
def test_a_home_folder_that_is_none(loopback, home):
    loopback.log_in_with(f"HOME={shlex.quote(home)}; {GO_ON}")
    with ssh.Device("shell") as device:
        assert device.from_home("/opt/edgekd") == "/opt/edgekd"
        with pytest.raises(EdgeKDError, match=r"as your home folder, .*: give /DIR/edgekd"):
            device.from_home("edgekd")
