"""Options from records and from a file: one definition for the command line, a file and Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edgekd.cli.main import COMMANDS, app
from edgekd.cli.options import JsonOption, command, new_app, result
from edgekd.cli.reference import commands, reference
from edgekd.records import EdgeKDError
from edgekd.records import options as records
from edgekd.records.options import DataOptions, TeacherOptions, TrainOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def told():
    """A command with options of two records, and what it was called with."""
    mine, told = new_app(), []

    @command(mine)
    def one(
        name: str = "n", *, data: DataOptions, teacher: TeacherOptions, as_json: JsonOption = False
    ) -> None:
        """One."""
        told.append((name, data, teacher))
        result(as_json, [1], "shown")

    @command(mine)
    def two(context: typer.Context, *, train: TrainOptions) -> None:
        """Two."""
        told.append((context.info_name, train))

    def call(*arguments, code=0):
        done = CliRunner().invoke(mine, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        return told[-1] if not code else done.stderr

    return call


def test_a_field_is_an_option(told):
    assert told("one") == ("n", DataOptions(), TeacherOptions())
    given = ["--name", "m", "-d", "scans", "--size", 64, "--allow-leakage", "-T", 2,
             "--teacher", "a", "--teacher", "b"]  # fmt: skip
    assert told("one", *given) == (
        "m",
        DataOptions(data=Path("scans"), size=64, allow_leakage=True),
        TeacherOptions(temperature=2, teacher=("a", "b")),
    )
    assert "greater than or equal to 32" in told("one", "--size", 31, code=2)
    assert told("two", "--set", "ema=0", "--lr", 0.1)[1].training().ema == 0


def test_options_from_a_file(told, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('data = "scans"\nsize = 64\nallow-leakage = true\nteacher = ["a", "b"]\n'
                    'temperature = 3\n[two]\nepochs = 5\nset = ["ema=0.5"]\n')  # fmt: skip
    expected = DataOptions(data=Path("scans"), size=64, allow_leakage=True)
    asked = TeacherOptions(teacher=("a", "b"), temperature=3)
    assert told("one", "--config", path) == ("n", expected, asked)
    # The command line wins.
    now = told("one", "--config", path, "--size", 96, "-T", 4)
    assert now[1] == expected.model_copy(update={"size": 96})
    assert now[2].temperature == 4
    path.write_text("[two]\nepochs = 5\nset = ['ema=0.5']\n[one]\nname = 'x'\n")
    assert told("two", "--config", path) == ("two", TrainOptions(epochs=5, settings=("ema=0.5",)))
    assert told("one", "--config", path)[0] == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise = 64", 'no option of one "sise"; did you mean "size"?'),
        ("size = 'large'", "size = 'large': Input should be a valid integer"),
        ("size = 20", "size = 20: Input should be greater than or equal to 32"),
        ("teacher = 'a'", "teacher = 'a'"),
        ("[three]\nsize = 64", 'no option of one "three"'),
        ("config = 'other.toml'", 'no option of one "config"'),
        ("size = ", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be(told, tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    said = told("one", "--config", tmp_path / "run.toml", code=1)
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_no_file(told, tmp_path):
    assert "cannot read configuration" in told("one", "--config", tmp_path / "none", code=1)


def test_a_file_for_a_real_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('profile = "jetsen"\n')
    said = CliRunner().invoke(app, ["distill", "--config", "run.toml"])
    assert said.exit_code == 1
    assert 'no profile "jetsen"; did you mean "jetson"?' in said.stderr
    Path("run.toml").write_text("show = true\n")
    told = CliRunner().invoke(app, ["run", "paper1-brain", "--config", "run.toml", "--json"])
    assert json.loads(told.stdout)["name"] == "paper1-brain"


def test_records_refuse_what_the_command_line_refuses():
    with pytest.raises(EdgeKDError, match="size"):
        DataOptions.parse({"size": 8}, "here")
    with pytest.raises(EdgeKDError, match='no key "teachr"; did you mean "teacher"'):
        TeacherOptions.parse({"teachr": ("a",)}, "here")


def test_no_option_stands_in_two_groups_of_a_command():
    groups = [records.DataOptions, records.TeacherOptions, records.StudentOptions,
              records.SearchOptions, records.SupernetOptions, records.TrainOptions,
              records.RunOptions]  # fmt: skip
    names = [name for group in groups for name in group.model_fields]
    assert len(names) == len(set(names))
    for group in groups:
        for name, field in group.model_fields.items():
            assert field.description, name


def test_the_list_of_commands_says_what_they_say():
    said = {words[0]: function.__doc__ for words, function in commands() if len(words) == 1}
    assert set(said) == set(COMMANDS)
    for name, entry in COMMANDS.items():
        first = said[name].strip().partition("\n")[0]
        assert first == entry.help
        assert len(first.split()) <= 12, f"{name}: {first}"


def test_the_reference_is_that_of_the_code():
    written = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert written == reference(), "make reference"
    for name in COMMANDS:
        assert f"## `edgekd {name}`" in written


@pytest.mark.parametrize("width", [80, 120])
def test_help_has_panels_and_an_example_a_line(width):
    done = subprocess.run(
        [sys.executable, "-m", "edgekd", "distill", "--help"], capture_output=True, text=True,
        env={"COLUMNS": str(width), "PATH": "", "TERMINAL_WIDTH": str(width)}, check=True,
    )  # fmt: skip
    panels = re.findall(r"─ (\w+) ─", done.stdout)
    assert panels == ["Options", "Data", "Teacher", "Student", "Search", "Supernet", "Training",
                      "Output"]  # fmt: skip
    examples = re.findall(r"^ +• edgekd .*$", done.stdout, re.M)
    assert len(examples) == 4
    assert max(map(len, done.stdout.splitlines())) <= width


def test_a_command_that_is_not_asked_for_is_not_loaded():
    code = ("import sys; from edgekd.cli.main import app\n"
            "try: app(['--help'])\n"
            "except SystemExit: pass\n"
            "print('LOADED', *[m for m in sys.modules if m.startswith('edgekd.')])")  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = shown.stdout.rpartition("LOADED")[2].split()
    names = ("", ".main", ".options", ".streams")
    assert sorted(loaded) == [f"edgekd.cli{name}" for name in names]
