"""Opening a run for a command that goes on with it; `edgekd run`, a whole study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.options import RUNS, JsonOption, command, new_app, result

if TYPE_CHECKING:
    from edgekd.pipeline.run import Run
    from edgekd.records import Track

app = new_app()


def opened(root: Path, run: Path | None, profile: str | None, track: Track) -> Run:
    """The run to go on with; which one, and why that one, is said on stderr."""
    from edgekd.cli import console
    from edgekd.pipeline.run import Run

    found = Run.find(root, run, profile, track)
    console.say(f"run {found.folder} ({found.chosen}), profile {found.record.profile.name}")
    return found


@command(app, "run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .toml file.")],
    *,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Image folder.")] = None,
    runs: Annotated[Path | None, typer.Option("--runs", help="[default: runs/RECIPE]")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe, run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study to its end; stopped, the same command goes on.

    Examples:
    - `edgekd run paper1-brain --data scans`
    - `edgekd run paper2-covid --show`
    """
    from edgekd.cli import console, main
    from edgekd.pipeline.recipes import Recipe
    from edgekd.records import EdgeKDError

    made = Recipe.read(recipe)
    if show:
        result(as_json, made, console.recipe(made))
        return
    if data is None:
        raise EdgeKDError(f"{made.name} needs --data: {made.data}")
    line = typer.main.get_command(main.app)

    def call(words: list[str]) -> int:
        return line.main(words, standalone_mode=False) or 0

    root = runs or RUNS / made.name
    told, code = made.play(data, root, call, console.say, as_json=as_json)
    result(as_json, told, f"finished, see {root}")
    if code:
        raise typer.Exit(code)
