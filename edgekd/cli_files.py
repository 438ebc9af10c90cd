"""The commands that make a student's files and check them: quantize, export, verify, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.options import (
    RUNS,
    ForceOption,
    JsonOption,
    ProfileOption,
    RunOption,
    RunsOption,
    place,
    result,
    trains,
)
from edgekd.records import Artifact, EdgeKDError, GateMissed, Profile


def quantize(
    profile: ProfileOption = None,
    engine: Annotated[
        str,
        typer.Option("--engine", "-e", help="auto: the fastest that holds; or nncf, ort, inc."),
    ] = "auto",
    method: Annotated[
        str | None, typer.Option("--method", help="Of that engine, such as percentile.")
    ] = None,
    images: Annotated[
        int, typer.Option("--calibration-images", min=8, help="From the training split.")
    ] = 300,
    qat: Annotated[
        int, typer.Option("--qat", min=0, help="Epochs of training that feels INT8, before.")
    ] = 0,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0, help="Points of balanced accuracy; else exit 3.")
    ] = 1.0,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.1, help="Of calls of each candidate in each of 3 rounds. "
                     "[default: 2]"),
    ] = None,
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Find the fastest precision that keeps the student's answers, measured on this device.

    With auto every precision and INT8 engine that the profile allows is made, judged and timed.
    Example: edgekd quantize · edgekd quantize --engine ort --method percentile
    """
    if qat:
        trains()
    from edgekd import files, show

    with show.tracker() as track:
        here = place(runs_folder, run, profile, track)
        artifact, before, choice = files.quantize(
            here, engine=engine, method=method, images=images, max_drop=max_drop,
            seconds=seconds, qat=qat, force=force,
        )  # fmt: skip
    told = artifact.model_dump(mode="json")
    if choice is not None:
        told["choice"] = choice.model_dump(mode="json")
    result(as_json, told, show.quantized(artifact, before, choice))
    files.check_drop(artifact, before, max_drop)


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
        typer.Option("--tolerance", min=0, help="Largest error of an output, relative."),
    ] = None,
    profile: ProfileOption = None,
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the file that the device loads, compared with what it was made from on real images.

    Example: edgekd export --format openvino · edgekd export -f onnx --precision fp16
    """
    from edgekd import files, show

    if artifact is not None:
        if format_name != "tensorrt":
            raise EdgeKDError("--artifact builds a TensorRT plan: --format tensorrt")
        plan = files.build_here(artifact)
        result(as_json, plan, show.exported([plan], []))
        return
    with show.tracker() as track:
        here = place(runs_folder, run, profile, track)
        made, notes = files.export(here, format_name, precision, pixels=pixels, tolerance=tolerance)
    told = [a.model_dump(mode="json") for a in made]
    result(as_json, told[0] if len(told) == 1 else told, show.exported(made, notes))


def verify(
    folder: Annotated[Path, typer.Argument(help="A file's folder, such as runs/cpu/int8.")],
    profile: Annotated[
        str | None,
        typer.Option("--profile", "-p", help="Where to run it. [default: as when it was made]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send a file's golden samples through it, on this machine. Exit 3: it answers otherwise.

    Example: edgekd verify runs/cpu/openvino-int8 --profile cpu
    """
    from edgekd import golden, runs, runtimes, show

    artifact = Artifact.load(folder)
    golden.read(artifact)
    if profile is None:
        # INT8 of one file is rounded elsewhere by each runtime: the one that it was made in first.
        runtime, _, device = artifact.settings.get("compared_in", "openvino").partition(" ")
        wanted = Profile(name="here", runtime=runtime, device=device or "CPU")
        wanted = runs.host(wanted, artifact)[0]
    else:
        wanted = Profile.read(profile)
    session = runtimes.open_session(artifact, wanted)
    found = golden.verify(artifact, session, wanted.runtime, wanted.device)
    result(as_json, found, show.verified(found))
    if not found.ok:
        raise GateMissed(
            f"{artifact.path} does not answer on {wanted.device} as it did when it was made: "
            "do not deploy it here"
        )


def doctor(as_json: JsonOption = False) -> None:
    """Run a tiny model in every runtime on every device of this machine; say what is missing."""
    from edgekd import doctor as checks
    from edgekd import show

    found = checks.examine()
    result(as_json, [c.model_dump(mode="json") for c in found], show.checks(found))
    broken = [c.what for c in found if c.state == "FAIL"]
    if broken:
        raise EdgeKDError(f"{', '.join(broken)}: see the fix above")
