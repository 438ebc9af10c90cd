"""`edgekd bundle`: one file for the device, and who vouches for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.options import (
    RUNS,
    JsonOption,
    KeyOption,
    ProfileOption,
    RunOption,
    RunsOption,
    command,
    new_app,
    result,
)
from edgekd.cli.run import opened
from edgekd.records.options import INTENDED

app = new_app()
bundle_app = new_app(invoke_without_command=True)
app.add_typer(bundle_app, name="bundle")


@command(bundle_app, group=True)
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
    runs: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Pack one file with all that a device needs.

    The run's last file with its evidence, in a file that verifies itself. It has to be measured
    and explained before. Exit 3: its explanations did not survive.

    Examples:
    - `edgekd bundle --key release.pem`
    - `edgekd bundle verify cpu.edgekd --key release.pem.pub`
    """
    if context.invoked_subcommand:
        return
    from edgekd.cli import console, console_device

    with console.tracker() as track:
        path, made = opened(runs, run, profile, track).bundle(
            out, key=key, intended_use=intended_use, abstain_below=abstain_below, despite=despite
        )
    told = made.model_dump(mode="json") | {"path": str(path)}
    result(as_json, told, console_device.bundled(path, made, ""))


@command(bundle_app)
def verify(
    file: Annotated[Path, typer.Argument(help="A bundle.")],
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a bundle, and by whom it was made.

    Exit 1 if it is not what was bundled.

    Example:
    - `edgekd bundle verify cpu.edgekd --key release.pem.pub`
    """
    from edgekd.bundle import bundle as bundles
    from edgekd.cli import console_device

    found = bundles.check(file, key)
    told = {"manifest": found.manifest.model_dump(mode="json"), "signer": found.signer,
            "trusted": found.trusted}  # fmt: skip
    result(
        as_json, told, console_device.bundled(file, found.manifest, console_device.signer(found))
    )


@command(bundle_app, "key")
def new_key(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub beside it.")],
) -> None:
    """Make a key pair. Who has the private key speaks for you.

    Example:
    - `edgekd bundle key release.pem`
    """
    from edgekd.bundle import signing

    typer.echo(str(signing.new_key(file)))
