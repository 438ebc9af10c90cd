"""What the commands share: options that mean the same everywhere, errors, results on stdout."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from edgekd.records import (
    EdgeKDError,
    GateMissed,
    Record,
    RuntimeUnavailable,
    Track,
    Training,
)

if TYPE_CHECKING:
    from edgekd.stages import Place


class Group(TyperGroup):
    """An EdgeKDError is one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: D102
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command again goes on from here", err=True)
            raise typer.Exit(130) from None
        except EdgeKDError as e:
            typer.echo(f"error: {' '.join(str(e).split())}", err=True)
            raise typer.Exit(exit_code(e)) from None


def exit_code(error: EdgeKDError) -> int:
    """Of a command that ends with `error`."""
    codes = {RuntimeUnavailable: 4, GateMissed: 3}
    return codes.get(type(error), 1)


def known_layer(name: str) -> str:
    """`name`, if a network might have such a layer: said before anything is trained."""
    if name and not re.fullmatch(r"auto|head|stage[1-9]\d?", name):
        raise EdgeKDError(f'no layer "{name}": auto, head, or a stage such as stage3')
    return name


RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", help="This run's folder. [default: RUNS/PROFILE]")
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", "-p", help="Profile: a name or a .toml file.")
]
ProfilesOption = Annotated[
    list[str] | None, typer.Option("--profile", "-p", help="As many as share the supernet.")
]
SupernetOption = Annotated[
    Path | None, typer.Option("--supernet", help="A folder that edgekd shrink wrote.")
]
SubnetsOption = Annotated[
    int,
    typer.Option("--subnets", min=20, help="To evaluate at random; then as many of the fronts."),
]
EstimateOption = Annotated[
    bool,
    typer.Option("--estimate", help="Latency from the profile's stated peak: measure nothing."),
]
GiveUpOption = Annotated[
    float,
    typer.Option("--give-up", min=0, help="Points of accuracy, for a faster student."),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", "-d", help="Image folder. [default: synthetic chest phantoms]"),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split", help="given, grouped or random. [default: the data's own, the rest grouped]"
    ),
]
LeakageOption = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Go on although splits share images; results say so."),
]
SizeOption = Annotated[
    int | None, typer.Option("--size", min=32, max=1024, help="Pixels a side. [default: profile's]")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Fixes the result on a CPU.")]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Public key that must have signed the bundle.")
]
AbstainOption = Annotated[
    float | None,
    typer.Option("--abstain-below", min=0, max=1, help="Calibrated probability that an answer "
                 "needs. [default: the bundle's]"),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what was made before.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A training setting, NAME=VALUE; repeatable. See README."),
]
EpochsOption = Annotated[
    int | None,
    typer.Option(
        "--epochs", min=1, help="Passes over the data. [default: 30; a pretrained teacher 8]"
    ),
]
LrOption = Annotated[
    float | None, typer.Option("--lr", help="Peak. [default: 0.002; a pretrained teacher 0.0007]")
]
BatchOption = Annotated[
    int | None, typer.Option("--batch", min=2, help="Images a step. [default: 32]")
]
StudentOption = Annotated[
    str | None,
    typer.Option(
        "--student",
        help="Trained alone: a named OFA sub-net, a folder with one, five-convolutions, a timm "
        "name, or NAME:K, its first K stages.",
    ),
]
TeachersOption = Annotated[
    list[str] | None,
    typer.Option("--teacher", help="timm name, or a folder that edgekd teach wrote; repeatable."),
]
TeacherWeightsOption = Annotated[
    Path | None, typer.Option("--teacher-weights", help="Local checkpoint to start it from.")
]
TeacherEpochsOption = Annotated[
    int | None, typer.Option("--teacher-epochs", min=1, help="If it must be taught first.")
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Teacher's weights from the hub (network).")
]
NoTeacherOption = Annotated[
    bool, typer.Option("--no-teacher", help="Labels alone: the baseline to compare with.")
]
StartOption = Annotated[
    str,
    typer.Option("--start", help="Begin as this timm network or official OFA checkpoint."),
]
StartWeightsOption = Annotated[
    Path | None, typer.Option("--start-weights", help="Local checkpoint of --start.")
]
StartPretrainedOption = Annotated[
    bool, typer.Option("--start-pretrained", help="Weights of --start from the hub (network).")
]
ScheduleOption = Annotated[str, typer.Option("--schedule", help="sandwich or progressive.")]
AlphaOption = Annotated[
    float | None,
    typer.Option("--alpha-hard", min=0, max=1, help="Weight of the labels. [default: 0.3]"),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", "-T", min=0.01, help="Of the soft targets. [default: 4]"),
]
LayerOption = Annotated[
    str,
    typer.Option(
        "--layer",
        callback=known_layer,
        help="That is explained: auto (the most faithful on validation images), head, or a stage"
        " of the student such as stage3. [default: the deepest of 12 cells a side]",
    ),
]
SensitivityOption = Annotated[
    float | None,
    typer.Option(
        "--sensitivity",
        min=0.01,
        max=1,
        help="Of each class's threshold, on val. [default: Youden's J]",
    ),
]
ResizeOption = Annotated[str, typer.Option(help="stretch, crop or pad.")]
RUNS = Path("runs")


def training_of(settings: list[str] | None, **flags: Any) -> Training:
    """A Training from --set NAME=VALUE pairs and flags; a flag that is None was not given."""
    table = {k: v for k, v in flags.items() if v is not None}
    for pair in settings or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise EdgeKDError(f'--set takes NAME=VALUE, got "{pair}"')
        if name in table:
            raise EdgeKDError(f"{name} is given twice, as an option and with --set")
        table[name] = value
    return Training.parse(table, "--set")


def place(root: Path, run: Path | None, profile: str | None, track: Track) -> Place:
    """The run to go on with; which one, and why that one, is said on stderr."""
    from edgekd import show, stages

    here = stages.Place.find(root, run, profile, track)
    show.say(f"run {here.folder} ({here.chosen}), profile {here.run.profile.name}")
    return here


def result(as_json: bool, data: Record | dict | list, shown: Any) -> None:
    """The result on stdout: one JSON document, or what a reader wants to see.

    Of several processes the first alone speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        content = data.model_dump(mode="json") if isinstance(data, Record) else data
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    elif isinstance(shown, str):
        sys.stdout.write(shown + "\n")
    else:
        from edgekd import show

        show.on_stdout(shown)


def trains() -> None:
    """Called before torch is loaded: its threads sleep while they wait for each other.

    A core that another program takes then costs its share, not a step twenty times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def given(context: typer.Context, *but: str) -> str:
    """The options that were given on the command line, as they would be given again."""
    words: list[str] = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in but or source is None or source.name != "COMMANDLINE":
            continue
        words.append(max(option.opts, key=len))
        if (value := context.params[option.name or ""]) is not True:
            words.append(str(value))
    return shlex.join(words)
