"""The command line: one-line errors, exit codes, help, and JSON that is only JSON."""

import json

import numpy as np
import pytest
import typer
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.cli.options import given


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def commands(group, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


ALL = list(commands(get_command(app)))


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(p) for p, _ in ALL])
def test_every_command_has_help(path, command):
    assert command.help
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profiles", "show", "jetsen"], 'no profile "jetsen"; did you mean "jetson"?'),
        (["distill", "--profile", "jetsen"], 'no profile "jetsen"; did you mean "jetson"?'),
        (["distill", "--set", "epoch=3"], '--set: no key "epoch"; did you mean "epochs"?'),
        (["distill", "--set", "epochs"], '--set takes NAME=VALUE, got "epochs"'),
        (["distill", "--set", "epochs=-1"], "epochs: Input should be greater than or equal to 1"),
        (["distill", "--epochs", "2", "--set", "epochs=3"], "epochs is given twice"),
        (["distill", "--data", "nowhere"], "nowhere"),
        (["distill", "--student", "ofa-959"], 'no sub-net "ofa-959"; did you mean "ofa-595"?'),
        (["distill", "--runs", "/proc/edgekd"], "cannot write to folder /proc/edgekd"),
        (["teach", "resnet18", "--weights", "no.pth"], "no weights file no.pth"),
        (["quantize"], "no run in runs yet: start one with edgekd distill"),
        (["bench", "--profile", "cpu"], "holds no run.json"),
    ],
)
def test_a_fixable_error_is_one_line_and_exit_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_wrong_usage_is_exit_2():
    assert "Did you mean 'distill'?" in run("distil").stderr
    assert run("distill", "--no-such-option").exit_code == 2
    assert run("export").exit_code == 2


def test_profiles_as_json_and_as_a_table():
    found = json.loads(run("profiles", "--json").stdout)
    assert [p["name"] for p in found] == ["cpu", "intel-npu", "jetson"]
    assert "openvino" in run("profiles").stdout
    assert json.loads(run("profiles", "show", "jetson", "--json").stdout)["device"] == "cuda:0"
    assert len(json.loads(run("profiles", "students", "--json").stdout)) == 50


def test_data_check_reports_everything_wrong_at_once(phantoms, tmp_path):
    good = run("data", "check", phantoms, "--json")
    assert good.exit_code == 0
    found = json.loads(good.stdout)
    assert found["ok"]
    assert sum(sum(s.values()) for s in found["splits"].values()) == 72
    for split in ("train", "test"):
        for name in ("a", "b"):
            for i in range(4):
                folder = tmp_path / "bad" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                seed = int.from_bytes(f"{split[1]}{name}{i}".encode())
                pixels = np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "bad/train/a/empty.png").write_bytes(b"")
    whole = (tmp_path / "bad/train/a/0.png").read_bytes()
    (tmp_path / "bad/train/b/cut.png").write_bytes(whole[: len(whole) // 2])
    result = run("data", "check", tmp_path / "bad")
    assert result.exit_code == 1
    assert "empty.png" in result.stdout
    assert "cut.png" in result.stdout
    assert "2 problems" in result.stdout
    refused = run("distill", "--data", tmp_path / "bad", "--runs", tmp_path / "runs")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert not list((tmp_path / "runs" / "cpu").glob("[!.]*"))  # but its lock


def test_ctrl_c_is_130_and_says_how_to_go_on(phantoms, tmp_path, monkeypatch):
    from edgekd.train import loop

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_step", interrupted)
    result = run("distill", "--data", phantoms, "--size", 32, "--runs", tmp_path)
    assert result.exit_code == 130
    assert "the same command again goes on" in result.stderr


def test_a_gate_and_a_missing_runtime_have_their_own_exit_codes():
    from edgekd.cli.options import exit_code
    from edgekd.records import EdgeKDError, GateMissed, RuntimeUnavailable

    assert exit_code(EdgeKDError()) == 1
    assert exit_code(GateMissed()) == 3
    assert exit_code(RuntimeUnavailable()) == 4


def test_phantoms_can_be_written_with_a_shortcut(tmp_path):
    arguments = ["data", "phantoms", tmp_path / "p", "--per-class", 5, "--size", 32]
    result = run(*arguments, "--marker", 0.5)
    assert result.stdout.strip() == str(tmp_path / "p")
    assert len(list((tmp_path / "p").glob("*/*/*.png"))) == 15
    assert run(*arguments, "--marker", 0.5).exit_code == 0
    assert "error: " in run(*arguments, "--marker", 0).stderr


def test_what_was_given_can_be_given_again():
    app, told = typer.Typer(), []

    @app.command()
    def command(
        context: typer.Context,
        seconds: float = 1,
        quick: bool = False,
        name: str = "",
        run: str = "",
    ):
        told.append(given(context, "run"))

    for line in (["--run", "x"], ["--quick", "--name", "a b"], ["--seconds", "1"]):
        assert CliRunner().invoke(app, line).exit_code == 0
    assert told == ["", "--quick --name 'a b'", "--seconds 1.0"]
