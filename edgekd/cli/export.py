"""The commands that make a student's files and check them: quantize, export, verify, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.options import (
    RUNS,
    ForceOption,
    JsonOption,
    ProfileOption,
    RunOption,
    RunsOption,
    command,
    new_app,
    result,
    trains,
)
from edgekd.cli.run import opened

app = new_app()


@command(app)
def quantize(
    profile: ProfileOption = None,
    engine: Annotated[
        str,
        typer.Option("--engine", "-e", help="auto: the fastest that holds; or nncf, ort, inc."),
    ] = "auto",
    method: Annotated[
        str | None, typer.Option("--method", help="Of that engine, such as percentile.")
    ] = None,
    calibration_images: Annotated[
        int,
        typer.Option("--calibration-images", min=8, max=100_000, help="From the training split."),
    ] = 300,
    qat: Annotated[
        int,
        typer.Option("--qat", min=0, max=10_000,
                     help="Epochs of training that feels INT8, before."),
    ] = 0,
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", min=0, max=100,
                     help="Points of balanced accuracy; else exit 3."),
    ] = 1.0,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.1, max=3600, help="Of calls of each candidate in each of "
                     "up to 3 rounds; of first turns a quarter. [default: 2]"),
    ] = None,
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="Explain and time every candidate in full, also those "
                     "that cannot be chosen: it takes longer and has all figures."),
    ] = False,
    runs: RunsOption = RUNS,
    run: RunOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Find the fastest precision that keeps the answers, by measurement.

    With auto every precision and INT8 engine that the profile allows is made and asked for its
    answers on this device. Those that keep them are timed for a few turns, and from the fastest on
    explained and timed further, until the rest is slower by a margin. The table, and choice.json in
    the folder of candidates, say of each why it went out, and when.

    Examples:
    - `edgekd quantize`
    - `edgekd quantize --engine ort --method percentile`
    """
    if qat:
        trains()
    from edgekd.cli import console
    from edgekd.pipeline.quantize import check_drop

    with console.tracker() as track:
        artifact, before, choice = opened(runs, run, profile, track).quantize(
            engine=engine, method=method, calibration_images=calibration_images, qat=qat,
            max_drop=max_drop, seconds=seconds, exhaustive=exhaustive, force=force,
        )  # fmt: skip
    told = artifact.model_dump(mode="json")
    if choice is not None:
        told["choice"] = choice.model_dump(mode="json")
    result(as_json, told, console.quantized(artifact, before, choice))
    check_drop(artifact, before, max_drop)


@command(app)
def export(
    format_name: Annotated[
        str, typer.Option("--format", "-f", help="onnx, openvino, tensorrt, torch or all.")
    ],
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp32, bf16, fp16 or int8. [default: as quantize chose]"),
    ] = None,
    pixels: Annotated[
        bool,
        typer.Option("--pixels", help="For other programs: uint8 (N, H, W, 3) in, as resized."),
    ] = False,
    artifact: Annotated[
        Path | None,
        typer.Option("--artifact", help="On the device: build what that exported folder is for."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, max=1e6, help="Largest error of an output, relative."),
    ] = None,
    profile: ProfileOption = None,
    runs: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the file that the device loads, compared on real images.

    Examples:
    - `edgekd export --format openvino`
    - `edgekd export -f onnx --precision fp16`
    """
    from edgekd.cli import console
    from edgekd.pipeline import export as pipeline

    if artifact is not None:
        plan = pipeline.build_here(artifact, format_name)
        result(as_json, plan, console.exported([plan], []))
        return
    with console.tracker() as track:
        made, notes = opened(runs, run, profile, track).export(
            format_name, precision=precision, pixels=pixels, tolerance=tolerance
        )
    told = [a.model_dump(mode="json") for a in made]
    result(as_json, told[0] if len(told) == 1 else told, console.exported(made, notes))


@command(app)
def verify(
    folder: Annotated[Path, typer.Argument(help="A file's folder, such as runs/cpu/int8.")],
    profile: Annotated[
        str | None,
        typer.Option("--profile", "-p", help="Where to run it. [default: as when it was made]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send a file's golden samples through it, on this machine.

    Exit 3: it answers otherwise than when it was made.

    Example:
    - `edgekd verify runs/cpu/openvino-int8 --profile cpu`
    """
    from edgekd.cli import console
    from edgekd.pipeline import verify as pipeline

    found = pipeline.verify(folder, profile)
    result(as_json, found, console.verified(found))
    pipeline.check(folder, found)


@command(app)
def doctor(as_json: JsonOption = False) -> None:
    """Run a tiny model in every runtime on every device here.

    What is missing is said, with what to do.
    """
    from edgekd.cli import console
    from edgekd.pipeline import doctor as checks

    found = checks.examine()
    result(as_json, [c.model_dump(mode="json") for c in found], console.checks(found))
    checks.check(found)
