"""Output that nobody takes, and numbers that no command means: one line, or it works."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgekd.cli import main

TOP = typer.main.get_command(main.app)


def commands(group: Any = TOP, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its name, those of groups as (group, name)."""
    for name in group.list_commands(None):
        one = group.get_command(None, name)
        yield (*path, name), one
        if hasattr(one, "list_commands"):
            yield from commands(one, (*path, name))


COMMANDS = dict(commands())
NUMBERS = [
    (path, max(option.opts, key=len), option.type_descriptor.annotation)
    for path, one in COMMANDS.items()
    for option in one.params
    if getattr(getattr(option, "type_descriptor", None), "annotation", None) in (int, float)
]


def told(monkeypatch, words, stream):
    """(exit code, stderr) of a command whose output goes to `stream`."""
    monkeypatch.setattr(sys, "argv", ["edgekd", *words])
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", errors := io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit) as ended:
        main.main()
    errors.flush()
    return ended.value.code or 0, errors.buffer.getvalue().decode()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_full_disk_or_a_reader_that_left_is_no_traceback(path, monkeypatch):
    with Path("/dev/full").open("w") as full:
        code, said = told(monkeypatch, [*path, "--help"], full)
    assert code == 1
    assert said.startswith("error: cannot write the output: No space left on device")
    assert said.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        code, said = told(monkeypatch, [*path, "--help"], pipe)
    assert said == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_encoding_takes_the_help(path, encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    assert told(monkeypatch, [*path, "--help"], stream) == (0, "")
    assert b"Usage" in stream.buffer.getvalue()


def test_a_name_that_the_encoding_lacks_is_shown_with_a_question_mark(tmp_path, monkeypatch):
    profile = tmp_path / "p\u0142uco.toml"
    profile.write_text('runtime = "onnxruntime"\ndevice = "CPU"\n')
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    assert told(monkeypatch, ["profiles", "show", str(profile)], stream) == (0, "")
    assert b"p?uco" in stream.buffer.getvalue()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_traceback(closed):
    line = f"{sys.executable} -m edgekd profiles {closed}"
    made = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    assert ("jetson" in made.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EIO, errno.EROFS])
def test_what_the_machine_refuses_is_one_line(number, monkeypatch):
    def refused(*args):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("edgekd.cli.console.profiles", refused)
    made = CliRunner().invoke(main.app, ["profiles"])
    assert made.exit_code == 1
    assert made.stderr.startswith(f"error: cannot write some/file: {os.strerror(number)}: ")
    assert made.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def missing(*args):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr("edgekd.cli.console.profiles", missing)
    assert isinstance(CliRunner().invoke(main.app, ["profiles"]).exception, FileNotFoundError)


@pytest.mark.parametrize("wrong", ["-1", str(-(2**63)), str(2**63), "nan", "inf", "x"])
def test_numbers_outside_their_range_are_refused_by_every_command(wrong):
    for path, option, kind in NUMBERS:
        needed = [str(Path("nowhere"))] * sum(
            p.required for p in COMMANDS[path].params if p.param_type_name == "argument"
        )
        made = CliRunner().invoke(main.app, [*path, *needed, option, wrong])
        assert made.exit_code in (1, 2), (path, option, kind)
        assert isinstance(made.exception, SystemExit), (path, option, made.exception)
