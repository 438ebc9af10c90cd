"""The commands that give evidence: explain and report."""

from __future__ import annotations

from typing import Annotated

import typer

from edgekd.cli.options import (
    RUNS,
    JsonOption,
    ProfileOption,
    RunOption,
    RunsOption,
    command,
    new_app,
    result,
)
from edgekd.cli.run import opened

app = new_app()


@command(app)
def explain(
    profile: ProfileOption = None,
    *,
    images: Annotated[
        int | None,
        typer.Option(
            "--images", min=4, max=1_000_000, help="Test images, by class. [default: the profile's]"
        ),
    ] = None,
    variant: Annotated[
        str, typer.Option("--variant", help="evidence, published, grad-cam or torchcam.")
    ] = "evidence",
    fast: Annotated[
        bool,
        typer.Option("--fast", help="The teacher's maps from fewer channels, if as good."),
    ] = False,
    layers: Annotated[
        int,
        typer.Option(
            "--layers", min=0, max=10_000, help="Images shown layer by layer in the report."
        ),
    ] = 0,
    runs: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do explanations survive? Score-CAM on the deployed file, judged.

    Judged by the margins that the profile declares. Exit 3: they do not, or cannot be judged by
    maps at all; 6: too few images to say.

    Example:
    - `edgekd explain --images 200`
    """
    from edgekd.cli import console
    from edgekd.pipeline.explain import CODES

    with console.tracker() as track:
        found = opened(runs, run, profile, track).explain(
            images=images, variant=variant, fast=fast, layers=layers
        )
    result(as_json, found, console.fidelity(found))
    if code := CODES[found.verdict]:
        raise typer.Exit(code)


@command(app)
def report(
    profile: ProfileOption = None,
    *,
    cases: Annotated[
        int, typer.Option("--cases", min=1, max=10_000, help="Images in the gallery.")
    ] = 12,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Leave every picture out; the numbers stay.")
    ] = False,
    runs: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: verdict, models, timing, explanations.

    Beside it report.json and cases.csv.

    Example:
    - `edgekd report --no-images`
    """
    from edgekd.cli import console

    with console.tracker() as track:
        page = opened(runs, run, profile, track).report(cases=cases, pictures=not no_images)
    result(as_json, {"report": str(page)}, str(page))
