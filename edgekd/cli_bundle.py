"""`edgekd bundle`: one file for the device, and who vouches for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.options import (
    RUNS,
    Group,
    JsonOption,
    KeyOption,
    ProfileOption,
    RunOption,
    RunsOption,
    place,
    result,
)

bundle_app = typer.Typer(
    cls=Group, invoke_without_command=True, help="One file with all that a device needs."
)
INTENDED = (
    "Research use. Not a medical device: not for diagnosis, and not for any decision about a "
    "patient."
)


@bundle_app.callback()
def bundle(
    context: typer.Context,
    profile: ProfileOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file. [default: RUN/RUN's name.edgekd]"),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Private key that signs it: edgekd bundle key makes one."),
    ] = None,
    intended_use: Annotated[
        str, typer.Option("--intended-use", help="What it is for, and what not.")
    ] = INTENDED,
    abstain_below: Annotated[
        float,
        typer.Option("--abstain-below", min=0, max=1, help="Calibrated probability under which a "
                     "device gives no answer."),
    ] = 0.0,
    despite: Annotated[
        str,
        typer.Option("--despite", help="Why it is bundled although its verdict is no PASS."),
    ] = "",
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Pack the run's last file with its evidence into one file that verifies itself.

    It has to be measured and explained before. Exit 3: its explanations did not survive.
    Example: edgekd bundle --key release.pem · edgekd bundle verify cpu.edgekd --key release.pem.pub
    """
    if context.invoked_subcommand:
        return
    from edgekd import show, show_device, stages

    with show.tracker() as track:
        here = place(runs_folder, run, profile, track)
        path, made = stages.bundle(
            here, out, key=key, intended_use=intended_use, abstain_below=abstain_below,
            despite=despite,
        )  # fmt: skip
    told = made.model_dump(mode="json") | {"path": str(path)}
    result(as_json, told, show_device.bundled(path, made, ""))


@bundle_app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A bundle.")],
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is every byte what was bundled, and by whom? Exit 1 if not.

    Example: edgekd bundle verify cpu.edgekd --key release.pem.pub
    """
    from edgekd import bundle as bundles
    from edgekd import show_device

    found = bundles.check(file, key)
    told = {"manifest": found.manifest.model_dump(mode="json"), "signer": found.signer,
            "trusted": found.trusted}  # fmt: skip
    result(as_json, told, show_device.bundled(file, found.manifest, show_device.signer(found)))


@bundle_app.command("key")
def new_key(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub beside it.")],
) -> None:
    """Make a key pair. Who has the private key speaks for you.

    Example: edgekd bundle key release.pem
    """
    from edgekd import signing

    typer.echo(str(signing.new_key(file)))
