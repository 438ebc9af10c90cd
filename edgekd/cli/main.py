"""The command line: every command by its name, loaded when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from edgekd import __version__
from edgekd.cli import streams
from edgekd.cli.options import Group, QuietOption


class Entry(NamedTuple):
    """A command as the list of all shows it, so that the list loads none of them."""

    module: str  # in this room; its `app` has the command
    panel: str
    help: str  # the first sentence of the command's own


MAKE, PROVE, USE, BESIDE = "Make a student", "Measure and prove", "At the bedside", "Beside"
COMMANDS = {
    "teach": Entry("train", MAKE, "Train a teacher: any timm network, pretrained or from scratch."),
    "shrink": Entry("train", MAKE, "Train a supernet once, for the students of several profiles."),
    "search": Entry("train", MAKE, "Find the sub-nets of a supernet that fit a profile's budget."),
    "distill": Entry("train", MAKE, "Distil a teacher into the profile's student, cut out of a "
                     "supernet."),
    "quantize": Entry("export", MAKE, "Find the fastest precision that keeps the answers, by "
                      "measurement."),
    "export": Entry("export", MAKE, "Write the file that the device loads, compared on real "
                    "images."),
    "bench": Entry("bench", PROVE, "Time teacher, student and every file of a run in turns."),
    "explain": Entry("explain", PROVE, "Do explanations survive? Score-CAM on the deployed file, "
                     "judged."),
    "report": Entry("explain", PROVE, "Write one self-contained HTML page: verdict, models, "
                    "timing, explanations."),
    "verify": Entry("export", PROVE, "Send a file's golden samples through it, on this machine."),
    "bundle": Entry("bundle", USE, "Pack one file with all that a device needs."),
    "deploy": Entry("deploy", USE, "Put a bundle on a device, tested there before it serves."),
    "predict": Entry("device", USE, "Answer image files with a bundle's model."),
    "serve": Entry("device", USE, "Answer images by HTTP, with a web page, and by DICOM."),
    "run": Entry("run", BESIDE, "Run a study to its end; stopped, the same command goes on."),
    "data": Entry("data", BESIDE, "Check, describe and prepare images."),
    "profiles": Entry("data", BESIDE, "List device profiles: what a device runs and allows."),
    "doctor": Entry("export", BESIDE, "Run a tiny model in every runtime on every device here."),
}  # fmt: skip


class Loaded(Mapping[str, Any]):
    """Every command by its name, imported when it is looked up."""

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __getitem__(self, name: str) -> Any:
        module = importlib.import_module(f"edgekd.cli.{COMMANDS[name].module}")
        return typer.main.get_group(module.app).commands[name]


class Commands(Group):
    """The commands of COMMANDS."""

    listing = False  # whether only their first sentences are wanted

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Loaded()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002, D102
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: D102
        if self.listing:
            entry = COMMANDS[cmd_name]
            return TyperCommand(cmd_name, help=entry.help, rich_help_panel=entry.panel)
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: D102
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # Markdown, which the commands have, costs the list time to load
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Distil, quantise, measure and explain image classifiers for bedside devices.

    The line: distill, quantize, export, bench, explain, report. Each goes on from the one before.
    """


def main() -> None:
    """Entry point of the `edgekd` script."""
    streams.open_all()
    try:
        app()
    except SystemExit as e:
        streams.close(e.code)
    except KeyboardInterrupt:  # before a command had begun, or after its end
        streams.close(130)
    except OSError as e:  # a help page that could not be written
        streams.refuse(e)
