"""The commands that train: teach, shrink, search, distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.options import (
    JsonOption,
    ProfileOption,
    ProfilesOption,
    command,
    new_app,
    result,
    trains,
)
from edgekd.records.options import (
    DataOptions,
    OutputOptions,
    RunOptions,
    SearchOptions,
    StudentOptions,
    SupernetOptions,
    TeacherOptions,
    TrainOptions,
)

app = new_app()


@command(app)
def teach(
    model: Annotated[str, typer.Argument(help="timm name, or auto: a pretrained one")] = "auto",
    *,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Local checkpoint (.safetensors, .pth).")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Weights from the hub (needs a network).")
    ] = False,
    sensitivity: Annotated[
        float | None,
        typer.Option("--sensitivity", min=0.01, max=1,
                     help="Of each class's threshold, on val. [default: Youden's J]"),
    ] = None,
    data: DataOptions,
    train: TrainOptions,
    output: OutputOptions,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Train a teacher: any timm network, pretrained or from scratch.

    Example:
    - `edgekd teach tf_efficientnet_lite0 --weights lite0.pth --data scans --epochs 8`
    """
    trains()
    from edgekd.cli import console
    from edgekd.pipeline import teach as pipeline

    with console.tracker() as track:
        artifact = pipeline.teach(
            model, data=data, train=train, weights=weights, pretrained=pretrained,
            sensitivity=sensitivity, output=output, track=track,
        )  # fmt: skip
    result(as_json, artifact, console.artifact(artifact))


@command(app)
def shrink(
    profile: ProfilesOption = None,
    *,
    data: DataOptions,
    teacher: TeacherOptions,
    supernet: SupernetOptions,
    train: TrainOptions,
    output: OutputOptions,
    as_json: JsonOption = False,
) -> None:
    """Train a supernet once, for the students of several profiles.

    Example:
    - `edgekd shrink -p cpu -p jetson --data scans --start tf_efficientnet_lite0
      --start-weights lite0.pth`
    """
    trains()
    from edgekd.cli import console
    from edgekd.pipeline import shrink as pipeline

    with console.tracker() as track:
        artifact = pipeline.shrink(
            profile or ["cpu"], data=data, teacher=teacher, supernet=supernet, train=train,
            output=output, track=track,
        )  # fmt: skip
    result(as_json, artifact, console.supernet(artifact))


@command(app)
def search(
    profile: ProfilesOption = None,
    *,
    data: DataOptions,
    search: SearchOptions,
    output: RunOptions,
    as_json: JsonOption = False,
) -> None:
    """Find the sub-nets of a supernet that fit a profile's budget.

    Example:
    - `edgekd search -p cpu -p jetson --data scans`
    """
    trains()
    from edgekd.cli import console
    from edgekd.pipeline import search as pipeline

    with console.tracker() as track:
        found = pipeline.search(
            profile or ["cpu"], data=data, search=search, output=output, track=track
        )
    tables = [{"front": f.model_dump(mode="json"), "sought": s.model_dump(mode="json")}
              for f, s in found]  # fmt: skip
    result(as_json, tables, console.searches(found))


@command(app)
def distill(
    profile: ProfileOption = None,
    *,
    data: DataOptions,
    teacher: TeacherOptions,
    student: StudentOptions,
    search: SearchOptions,
    supernet: SupernetOptions,
    train: TrainOptions,
    output: RunOptions,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher into the profile's student, cut out of a supernet.

    What is missing is made first: teacher, supernet, search. With several finalists, the fastest
    is kept that gives up at most --give-up points as distilled, on validation.

    Examples:
    - `edgekd distill --profile jetson`
    - `edgekd distill --data scans --teacher tf_efficientnet_lite0 --teacher-weights w.pth`
    - `edgekd distill --data scans --student five-convolutions --epochs 20`
    - `edgekd distill --config run.toml`
    """
    trains()
    from edgekd.cli import console
    from edgekd.pipeline import distill as pipeline

    with console.tracker() as track:
        run = pipeline.distill(
            profile or "cpu", data=data, teacher=teacher, student=student, supernet=supernet,
            search=search, train=train, output=output, track=track,
        )  # fmt: skip
    artifact = run.student()
    result(as_json, artifact, console.artifact(artifact, *run.teachers()))
