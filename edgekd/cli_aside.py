"""The commands beside the line: profiles and image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.options import (
    ForceOption,
    Group,
    JsonOption,
    LeakageOption,
    SeedOption,
    SizeOption,
    SplitOption,
    result,
)
from edgekd.records import Profile, shipped_profiles, write_atomic

profiles_app = typer.Typer(cls=Group, help="Device profiles: what a device runs and allows.")
SourceArgument = Annotated[
    Path, typer.Argument(help="image or DICOM folder, .csv or .parquet manifest, MedMNIST .npz")
]
data_app = typer.Typer(cls=Group, no_args_is_help=True, help="Images: check, describe and prepare.")


@profiles_app.callback(invoke_without_command=True)
def profiles(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """List the profiles that come with edgekd."""
    if ctx.invoked_subcommand is None:
        from edgekd import show

        found = [Profile.read(name) for name in shipped_profiles()]
        result(as_json, [p.model_dump(mode="json") for p in found], show.profiles(found))


@profiles_app.command("show")
def profiles_show(
    name: Annotated[str, typer.Argument(help="name or .toml file")], as_json: JsonOption = False
) -> None:
    """Print one profile with every setting. Example: edgekd profiles show jetson."""
    from edgekd import show

    profile = Profile.read(name)
    result(as_json, profile, show.settings(profile.name, profile.model_dump(mode="json")))


@profiles_app.command("students")
def profiles_students(as_json: JsonOption = False) -> None:
    """List the named OFA sub-nets that a profile's `student` may name."""
    from edgekd import show, spaces

    found = {n: a.model_dump(mode="json") for n, a in spaces.subnets().items()}
    result(as_json, found, show.students(found))


@profiles_app.command("calibrate")
def profiles_calibrate(
    name: Annotated[str, typer.Argument(help="name or .toml file")],
    precision: Annotated[
        str | None, typer.Option("--precision", help="[default: the profile's first]")
    ] = None,
    size: SizeOption = None,
    classes: Annotated[int, typer.Option("--classes", min=2, help="Of the classifier.")] = 3,
    nets: Annotated[
        int, typer.Option("--nets", min=20, help="Whole sub-nets, to correct the sum of blocks.")
    ] = 60,
    export: Annotated[
        Path | None, typer.Option("--export", help="Also write the table here, to travel.")
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every block of a profile's space on this device, to predict any sub-net's latency.

    The table is kept for this machine; a profile that says latency_table = "FILE" brings its own.
    Example: edgekd profiles calibrate jetson --export jetson-latency.json
    """
    from edgekd import seek, show

    profile = Profile.read(name)
    if size is not None:
        profile = profile.model_copy(update={"resolutions": (size,)})
    with show.tracker() as track:
        table, folder = seek.calibrated(
            profile, precision or profile.precisions[0], classes=classes, nets=nets, seed=seed,
            force=force, track=track,
        )  # fmt: skip
    if export is not None:
        write_atomic(export, table.model_dump_json(indent=1) + "\n")
    result(as_json, table, show.latency(table, export or folder))


@data_app.command("check")
def data_check(
    source: SourceArgument,
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Read every image; report splits, classes, leaks and every bad file. Exit code 1 if any.

    Example: edgekd data check scans
    """
    from edgekd import data, show

    with show.tracker() as track:
        found = data.inspect(
            source, seed=seed, split=split, allow_leakage=allow_leakage, track=track
        )
    table = show.dataset_json(found)
    result(as_json, table, show.dataset(table))
    if found.problems:
        raise typer.Exit(1)


@data_app.command("prepare")
def data_prepare(
    source: SourceArgument,
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a data set as plain PNG files without names, metadata or patient ids.

    Files are <split>/<class>/<hash of the pixels>.png; groups stay known, as opaque hashes.
    Example: edgekd data prepare archive.csv scans
    """
    from edgekd import data, prepare, show

    with show.tracker() as track:
        dataset = data.open_dataset(
            source, seed=seed, split=split, allow_leakage=allow_leakage, track=track
        )
        made = prepare.prepare(dataset, folder, track=track)
    result(as_json, made, str(folder))


@data_app.command("phantoms")
def data_phantoms(
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    per_class: Annotated[int, typer.Option("--per-class", min=3, help="Images a class.")] = 120,
    size: Annotated[int, typer.Option("--size", min=32, max=1024, help="Pixels a side.")] = 96,
    marker: Annotated[
        float,
        typer.Option("--marker", min=0, max=1, help="Share of opacities with an L in a corner."),
    ] = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Write synthetic chest films with lesion masks; --marker plants a shortcut to be caught."""
    from edgekd import phantom, show

    with show.tracker() as track:
        made = phantom.make(
            folder, per_class=per_class, size=size, seed=seed, marker=marker, track=track
        )
    result(False, {}, str(made))
