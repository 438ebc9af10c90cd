"""Lines of progress where there is no terminal, by a clock that moves only when told; --quiet."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from edgekd.cli import console, main, progress, streams
from edgekd.cli.options import JsonOption, command, new_app, result
from edgekd.cli.progress import Lines, spent


@pytest.fixture
def told():
    """Lines, the list that they write to, and their clock's seconds in a list."""
    said, now = [], [1000.0]
    return SimpleNamespace(lines=Lines(said.append, lambda: now[0]), said=said, now=now)


def after(told, seconds):
    """What is written in the next seconds, a look a second as the thread has it."""
    before = len(told.said)
    for _ in range(seconds):
        told.now[0] += 1
        told.lines.remind()
    return told.said[before:]


def test_a_stage_has_a_line_at_its_start_one_a_minute_and_one_at_its_end(told):
    items = told.lines.track(range(200), "making candidates")
    got = []
    for i in items:
        got.append(i)
        after(told, 1)
    assert got == list(range(200))
    assert told.said == [
        "making candidates: begins, 200 to do",
        "making candidates: 60 of 200 (30 %), 1.0/s, about 2 min 22 s left",
        "making candidates: 120 of 200 (60 %), 1.0/s, about 1 min 21 s left",
        "making candidates: 180 of 200 (90 %), 1.0/s, about 20 s left",
        "making candidates: done, 200 in 3 min 20 s, 1.0/s",
    ]


def test_what_is_over_at_once_has_no_line(told):
    for _ in told.lines.track(range(1000), "searching"):
        told.now[0] += 0.0009
        told.lines.remind()
    after(told, 200)
    assert told.said == []


def test_an_item_of_many_minutes_is_told_of_meanwhile(told):
    for _ in told.lines.track(["int8"], "making candidates"):
        assert after(told, 130) == [
            "making candidates: begins, 1 to do",
            "making candidates: 0 of 1 (0 %)",
            "making candidates: 0 of 1 (0 %)",
        ]
    assert told.said[-1] == "making candidates: done, 1 in 2 min 10 s, 0.5/min"


def test_index_arrays_count_as_images(told):
    batches = (np.arange(32) for _ in range(50))
    for _ in told.lines.track(batches, "training student", 1600):
        after(told, 2)
    assert told.said[0] == "training student: begins, 1600 images to do"
    assert told.said[1] == (
        "training student: 960 of 1600 images (60 %), 16 images/s, about 41 s left"
    )
    assert told.said[-1] == "training student: done, 1600 images in 1 min 40 s, 16 images/s"


def test_stages_within_stages_each_have_their_minute(told):
    for _ in told.lines.track(range(1), "outer"):
        after(told, 30)
        for _ in told.lines.track(iter(range(2)), "inner"):
            after(told, 45)
    assert told.said == [
        "outer: begins, 1 to do",
        "inner: begins",
        "outer: 0 of 1 (0 %)",
        "inner: 1 in 1 min 1 s, 1.0/min",
        "inner: done, 2 in 1 min 30 s, 1.3/min",
        "outer: done, 1 in 2 min, 0.5/min",
    ]


def test_a_stage_that_is_left_early_says_how_far_it_came(told):
    items = told.lines.track([np.arange(8)] * 100, "training student", 800)
    for i, _ in enumerate(items):
        after(told, 10)
        if i == 9:
            break
    items.close()
    assert told.said[-1] == "training student: ended, 72 of 800 images in 1 min 40 s, 0.7 images/s"


def test_an_error_is_not_followed_by_lines(told):
    items = told.lines.track(range(3), "searching")
    next(items)
    after(told, 100)
    told.lines.close()
    items.close()
    assert after(told, 100) == []
    assert not [line for line in told.said if "ended" in line]


def test_a_name_moves_no_cursor(told):
    for _ in told.lines.track(range(1), "asking \x1b[2Jnet\r\n\u202eé"):
        after(told, 1)
    assert told.said == ["asking ?[2Jnet???é: begins, 1 to do"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (80, "1 min 20 s"), (3599.9, "1 h"),
     (3900, "1 h 5 min")],
)  # fmt: skip
def test_times_in_words(seconds, words):
    assert spent(seconds) == words


def test_the_thread_looks_each_second_and_ends_with_the_stages(monkeypatch):
    waits = []
    looked = threading.Event()

    def wait(seconds):
        waits.append(seconds)
        return len(waits) > 3

    progress._remind(SimpleNamespace(remind=looked.set), wait)
    assert waits == [progress.SHORT_S] * 4
    assert looked.is_set()
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        _divide(before)
    assert threading.active_count() == before


def _divide(threads):
    """A stage that an error ends, while one more thread runs."""
    with progress.lines(lambda _: None) as track:
        assert threading.active_count() == threads + 1
        for _ in track(range(3), "dividing"):
            _ = 1 / 0


@pytest.fixture
def slow(monkeypatch):
    """A command of one stage, whose line is written as soon as it begins, with a note."""
    app = new_app()

    @command(app)
    def count(as_json: JsonOption = False) -> None:
        """Count."""
        with console.tracker() as track:
            for _ in track(range(3), "counting"):
                time.sleep(0.05)
        console.say("a note")
        console.say("a failure", needed=True)
        result(as_json, [3], "3")

    @command(app, "again")
    def other() -> None:
        """Count by another command."""
        typer.main.get_command(app).main(["count"], standalone_mode=False)

    monkeypatch.setattr(progress, "SHORT_S", 0.001)
    monkeypatch.delenv("RANK", raising=False)
    return lambda *words: CliRunner().invoke(app, words)


def test_progress_and_notes_are_on_stderr_and_the_result_alone_on_stdout(slow):
    done = slow("count", "--json")
    assert json.loads(done.stdout) == [3]
    assert done.stderr.startswith("counting: begins, 3 to do\n")
    assert done.stderr.endswith("a note\na failure\n")


@pytest.mark.parametrize("words", [("count", "-q"), ("count", "--quiet"), ("again", "--quiet")])
def test_quiet_leaves_results_and_errors(slow, words):
    done = slow(*words)
    assert (done.stdout, done.stderr) == ("3\n", "a failure\n")
    assert "a note" in slow("count").stderr  # the next command is not quiet


def test_quiet_for_all_commands_and_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SHORT_S", 0.001)
    (tmp_path / "c.toml").write_text("quiet = true\n")
    target = tmp_path / "p"
    words = ["data", "phantoms", str(target), "--per-class", "5", "--size", "64"]
    options = ["--config", str(tmp_path / "c.toml")]
    for line in (["--quiet", *words], [*words, "-q"], ["data", "-q", *words[1:]], words + options):
        shutil.rmtree(target, ignore_errors=True)
        done = CliRunner().invoke(main.app, line)
        assert (done.exit_code, done.stderr) == (0, ""), line
    shutil.rmtree(target)
    assert "drawing phantoms: begins" in CliRunner().invoke(main.app, words).stderr
    assert CliRunner().invoke(main.app, ["-q", "verify", "nowhere"]).stderr.startswith("error: ")


def test_of_several_processes_the_first_alone_tells(slow, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert slow("count").stderr == "a failure\n"
    monkeypatch.setenv("RANK", "0")
    assert "counting" in slow("count").stderr


def test_lines_fit_any_encoding_and_a_reader_that_left_ends_nothing(monkeypatch):
    monkeypatch.setattr(progress, "SHORT_S", 0.001)

    def counted(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        streams.open_all()
        with console.tracker() as track:
            return sum(1 for _ in track((time.sleep(0.02) for _ in range(3)), "counting é"))

    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    assert counted(stream) == 3
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"counting ?: begins\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert counted(os.fdopen(writer, "w", closefd=False)) == 3
    os.close(writer)


SCRIPT = """
import time
from edgekd.cli import console, progress
progress.SHORT_S = 0.001
with console.tracker() as track:
    for _ in track(range(3), "counting"):
        time.sleep(0.1)
"""


def on_stderr(**more):
    """What SCRIPT writes to stderr, and whether that is a terminal."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "RANK", "TERM")}
    terminal = more.pop("terminal", False)
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=theirs, env=env | {"TERM": "xterm"} | more
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    except OSError:  # the terminal's other end was closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_a_terminal_has_bars_and_a_log_has_plain_lines():
    assert "\x1b[" in on_stderr(terminal=True)
    for env in ({}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}):
        told = on_stderr(**env)
        assert told.startswith("counting: begins, 3 to do\n"), env
        assert told.replace("\n", "").isprintable(), env
    dumb = on_stderr(terminal=True, TERM="dumb").replace("\r\n", "\n")
    assert dumb.startswith("counting: begins, 3 to do\n")
    assert "\x1b" not in dumb
