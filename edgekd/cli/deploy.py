"""`edgekd deploy`: a bundle on a device, what runs there, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli.options import JsonOption, KeyOption, command, new_app, result
from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from edgekd.deploy.device_side import Answer
    from edgekd.deploy.versions import Version


app = new_app()


@command(app)
def deploy(
    what: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="Left out with --status and --rollback.")
    ],
    where: Annotated[
        str | None,
        typer.Argument(metavar="HOST[:DIR]", help="As ssh has it; DIR from its home folder, or "
                       "absolute. [default: edgekd]"),
    ] = None,
    key: KeyOption = None,
    python: Annotated[
        str | None,
        typer.Option("--python", help="Python there: a command, or a path from its home. "
                     "[default: python3, or the one that runs there]"),
    ] = None,
    wheelhouse: Annotated[
        Path | None,
        typer.Option("--wheelhouse", help="Folder of wheels: make an environment of them there."),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="What is deployed there, every byte checked.")
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Back to the version before, if it passes its test.")
    ] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Put a bundle on a device, tested there before it serves.

    It is copied, checked and tested, and only then made current. Over your own ssh. Whatever
    fails, or when the connection is cut, what runs there stays as it is; the same command goes on
    where it stopped. The device needs Python 3.10 and what the bundle says that it needs
    (--wheelhouse brings it), and neither root nor a network.

    Examples:
    - `edgekd deploy cpu.edgekd pi@ward-3 --key release.pem.pub`
    - `edgekd deploy --status pi@ward-3`
    - `edgekd deploy --rollback pi@ward-3`
    """
    from edgekd.cli import console
    from edgekd.deploy import workstation as deploys

    if status or rollback:
        if where is not None or (status and rollback) or key is not None or wheelhouse is not None:
            raise EdgeKDError("--status and --rollback take a HOST[:DIR], alone and each by itself")
        target = deploys.Target.parse(what)
        with console.tracker() as track:
            ask = deploys.status if status else deploys.rollback
            found = ask(target, python=python, track=track)
    elif where is None:
        raise EdgeKDError("edgekd deploy takes BUNDLE and HOST[:DIR]")
    else:
        target = deploys.Target.parse(where)
        with console.tracker() as track:
            found = deploys.install(
                Path(what), target, key=key, python=python or "python3", wheelhouse=wheelhouse,
                track=track,
            )  # fmt: skip
    result(
        as_json, found, console.settings(f"{target.host}:{found.root}", shown(found, told=status))
    )
    for note in found.notes:
        console.say(f"note: {note}")
    for step in found.next:
        console.say(f"next, there: {step}")
    if found.current.wrong:
        raise EdgeKDError(
            f"{target.host}: the current version is damaged ({found.current.wrong}): deploy it anew"
        )


def shown(found: Answer, *, told: bool) -> dict[str, Any]:
    """What is deployed, as names and values. told: nothing was to be changed."""
    what = "" if told else " (now)" if found.changed else " (as before: nothing to do)"
    rows: dict[str, Any] = {f"current{what}": _line(found.current)}
    deployed = found.current.deployed
    test = deployed.selftest
    by = deployed.signer or "nobody: whoever could write to it could change it"
    maps = ["undefined" if r is None else f"{r:.3f}" for r in test.maps]
    speed = f"p50 {test.p50_ms:.3g} ms"
    if test.p95_ms is not None:
        speed += f", p95 {test.p95_ms:.3g} ms"
    if test.budget_ms is not None:
        speed += f", of {test.budget_ms:g} ms"
    rows |= {
        "signed by": by + ("" if deployed.trusted or not deployed.signer else " (no --key given)"),
        "self-test": f"{test.runtime} on {test.device}: answers within {test.tolerance:g}, maps "
        f"r = {', '.join(maps)}; {speed}",
        "python": f"{deployed.python}, edgekd {deployed.edgekd}",
    }
    if test.built:
        rows["built there"] = "yes"
    if found.previous is not None:
        rows["previous"] = _line(found.previous)
    if found.others:
        rows["older"] = ", ".join(found.others)
    if found.removed:
        rows["removed"] = ", ".join(found.removed)
    if found.service:
        rows["service"] = found.service
    if found.busy:
        rows["just now"] = "somebody deploys"
    return rows


def _line(version: Version) -> str:
    deployed = version.deployed
    damaged = f" DAMAGED: {version.wrong}" if version.wrong else ""
    return f"{version.folder}, {deployed.precision} for {deployed.profile}, {deployed.at}{damaged}"
