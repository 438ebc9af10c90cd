"""The commands beside the line: profiles and image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.options import (
    ForceOption,
    JsonOption,
    LeakageOption,
    SeedOption,
    SizeOption,
    SplitOption,
    command,
    new_app,
    result,
)
from edgekd.records import Profile, shipped_profiles, write_atomic

app = new_app()
profiles_app = new_app(invoke_without_command=True)
app.add_typer(profiles_app, name="profiles")
SourceArgument = Annotated[
    Path,
    typer.Argument(help="image or DICOM folder, .csv, .tsv or .parquet manifest, MedMNIST .npz"),
]
data_app = new_app(no_args_is_help=True)
app.add_typer(data_app, name="data")


@command(profiles_app, group=True)
def profiles(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """List device profiles: what a device runs and allows."""
    if ctx.invoked_subcommand is None:
        from edgekd.cli import console

        found = [Profile.read(name) for name in shipped_profiles()]
        result(as_json, [p.model_dump(mode="json") for p in found], console.profiles(found))


@command(profiles_app, "show")
def profiles_show(
    name: Annotated[str, typer.Argument(help="name or .toml file")], as_json: JsonOption = False
) -> None:
    """Print one profile with every setting.

    Example:
    - `edgekd profiles show jetson`
    """
    from edgekd.cli import console

    profile = Profile.read(name)
    result(as_json, profile, console.settings(profile.name, profile.model_dump(mode="json")))


@command(profiles_app, "students")
def profiles_students(as_json: JsonOption = False) -> None:
    """List the named OFA sub-nets that a profile's student may be."""
    from edgekd.cli import console
    from edgekd.ofa import spaces

    found = {n: a.model_dump(mode="json") for n, a in spaces.subnets().items()}
    result(as_json, found, console.students(found))


@command(profiles_app, "calibrate")
def profiles_calibrate(
    name: Annotated[str, typer.Argument(help="name or .toml file")],
    precision: Annotated[
        str | None, typer.Option("--precision", help="[default: the profile's first]")
    ] = None,
    size: SizeOption = None,
    classes: Annotated[
        int, typer.Option("--classes", min=2, max=10_000, help="Of the classifier.")
    ] = 3,
    nets: Annotated[
        int,
        typer.Option(
            "--nets", min=20, max=10_000, help="Whole sub-nets, to correct the sum of blocks."
        ),
    ] = 60,
    export: Annotated[
        Path | None, typer.Option("--export", help="Also write the table here, to travel.")
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every block of a profile's space on this device.

    From that the latency of any sub-net is predicted. The table is kept for this machine; a
    profile that says latency_table = "FILE" brings its own.

    Example:
    - `edgekd profiles calibrate jetson --export jetson-latency.json`
    """
    from edgekd.cli import console
    from edgekd.pipeline import search

    profile = Profile.read(name)
    if size is not None:
        profile = profile.model_copy(update={"resolutions": (size,)})
    with console.tracker() as track:
        table, folder = search.calibrated(
            profile, precision or profile.precisions[0], classes=classes, nets=nets, seed=seed,
            force=force, track=track,
        )  # fmt: skip
    if export is not None:
        write_atomic(export, table.model_dump_json(indent=1) + "\n")
    result(as_json, table, console.latency(table, export or folder))


@command(data_app, group=True)
def data() -> None:
    """Check, describe and prepare images."""


@command(data_app, "check")
def data_check(
    source: SourceArgument,
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Read every image; report splits, classes, leaks, bad files.

    Exit code 1 if anything is wrong.

    Example:
    - `edgekd data check scans`
    """
    from edgekd.cli import console
    from edgekd.data import dataset as images

    with console.tracker() as track:
        found = images.inspect(
            source, seed=seed, split=split, allow_leakage=allow_leakage, track=track
        )
    table = console.dataset_json(found)
    result(as_json, table, console.dataset(table))
    if found.problems:
        raise typer.Exit(1)


@command(data_app, "prepare")
def data_prepare(
    source: SourceArgument,
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a data set as plain PNG files without names, metadata or patient ids.

    Files are `<split>/<class>/<hash of the pixels>.png`; groups stay known, as opaque hashes.

    Example:
    - `edgekd data prepare archive.csv scans`
    """
    from edgekd.cli import console
    from edgekd.data import dataset as images
    from edgekd.data import deidentify

    with console.tracker() as track:
        dataset = images.open_dataset(
            source, seed=seed, split=split, allow_leakage=allow_leakage, track=track
        )
        made = deidentify.prepare(dataset, folder, track=track)
    for note in dataset.notes:
        console.say(f"note: {note}")
    result(as_json, made, str(folder))


@command(data_app, "phantoms")
def data_phantoms(
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    per_class: Annotated[
        int, typer.Option("--per-class", min=3, max=100_000, help="Images a class.")
    ] = 120,
    size: Annotated[int, typer.Option("--size", min=32, max=1024, help="Pixels a side.")] = 96,
    marker: Annotated[
        float,
        typer.Option("--marker", min=0, max=1, help="Share of opacities with an L in a corner."),
    ] = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Write synthetic chest films with lesion masks.

    --marker plants a shortcut that has to be caught.
    """
    from edgekd.cli import console
    from edgekd.data import phantom

    with console.tracker() as track:
        made = phantom.make(
            folder, per_class=per_class, size=size, seed=seed, marker=marker, track=track
        )
    result(False, {}, str(made))
