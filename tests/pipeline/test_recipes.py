"""Recipes: every step is a command that exists, and a small one runs from beginning to end."""

import json

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.models import zoo
from edgekd.ofa import spaces
from edgekd.pipeline.recipes import Recipe, shipped
from edgekd.records import EdgeKDError, Training


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_made_of_commands_that_exist(name, tmp_path):
    made = Recipe.read(name)
    assert any("T^2" in gap for gap in made.unknown)
    commands = get_command(app).commands
    runs = set()
    for words in made.commands(tmp_path / "data", tmp_path / "runs"):
        context = commands[words[0]].make_context(words[0], words[1:])
        given = context.params
        if words[0] == "distill":
            runs.add(given["run"])
            assert zoo.known(given["student"]) or spaces.named(given["student"])
            pairs = dict(pair.split("=") for pair in given["settings"] or [])
            assert Training.parse(pairs, name)
        elif words[0] == "teach":
            assert zoo.known(given["model"])
        else:
            assert given["run"] in runs  # it goes on from a student that there is


def test_a_recipe_runs_and_goes_on_where_it_was_stopped(phantoms, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text("""
        title = "small"
        source = "nowhere"
        data = "phantoms"
        unknown = ["everything"]
        steps = [
          "teach test_resnet --size 32 --epochs 1",
          "distill --student five-convolutions --size 32 --epochs 1 --run {runs}/a",
          "export --format onnx --run {runs}/a",
        ]
    """)
    words = ["run", path, "--data", phantoms, "--runs", tmp_path / "runs", "--json"]
    first = run(*words)
    assert first.exit_code == 0, first.output
    steps = json.loads(first.stdout)
    assert [s["result"]["kind"] for s in steps] == ["teacher", "student", "onnx"]
    assert steps[2]["result"]["parents"]["student"]
    assert json.loads(run(*words).stdout) == steps
    path.write_text(path.read_text().replace("--format onnx", "--format onyx"))
    assert run(*words).exit_code == 1


def test_what_a_recipe_says_before_it_runs():
    shown = run("run", "paper1-brain", "--show")
    assert shown.exit_code == 0
    assert "2502.15959" in shown.stdout
    asked = run("run", "paper1-brain")
    assert asked.exit_code == 1
    assert "needs --data: brain tumour MRI of Kaggle" in asked.stderr
    assert 'did you mean "paper1-brain"' in run("run", "paper1-brian").stderr


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "x.toml"
    with pytest.raises(EdgeKDError, match="cannot read"):
        Recipe.read(str(path))
    path.write_text("title = ")
    with pytest.raises(EdgeKDError, match="is not TOML"):
        Recipe.read(str(path))
    path.write_text('title = "x"\nsteps = []')
    with pytest.raises(EdgeKDError, match=r"x\.toml"):
        Recipe.read(str(path))
