"""The command that measures: bench."""

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
    given,
    new_app,
    result,
)
from edgekd.cli.run import opened

app = new_app()


@command(app)
def bench(
    context: typer.Context,
    profile: ProfileOption = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Measure in this runtime on this CPU.")
    ] = None,
    within: Annotated[
        float | None,
        typer.Option("--within", min=0.1, max=100, metavar="PERCENT",
                     help="End when each ratio to the first file is known this well: the width of "
                     "its 95 % interval. [default: 5, with --quick 10]"),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.1, max=3600,
                     help="Of turns of each file at most; at least 130 calls of each are made "
                     "(--quick 200), and 662 where the seconds allow."),
    ] = 10,
    duration: Annotated[
        float | None,
        typer.Option("--duration", min=1, max=86_400,
                     help="Seconds of calls of each, all of them: is it the "
                     "same when the device is warm?"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Latency, memory and throughput alone.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 6 if the machine was noisy or throttled.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option("--against", help="A runtime, an artifact's folder or a timing.json: exit 3 "
                     "if the run's last file is slower."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option("--rounds", min=1, max=1000,
                     help="With --against: processes of each file; of two "
                     "files up to five times as many, where they do not decide."),
    ] = 5,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, max=1e6,
                     help="With --against: percent slower that is allowed. "
                     "[default: 5, or 10 beside a timing.json]"),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="The device: measure there, over ssh. USER@HOST as ssh has it"),
    ] = None,
    host_python: Annotated[
        str,
        typer.Option("--host-python", help="Python there: a command, or a path from its home."),
    ] = "python3",
    runs: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Time teacher, student and every file of a run in turns.

    It ends when the ratios are known. Latency, cold starts, pauses, size, memory, roofline. Exit 3:
    over the profile's budget, or slower than --against. Exit 6: the time was over before a ratio
    was known within what was asked, or the budget is kept at one pace of the machine and missed at
    another. --host copies the files and edgekd to a folder there that is removed at the end; the
    device needs Python 3.10, numpy, pydantic, Pillow and the profile's runtime.

    Examples:
    - `edgekd bench --quick`
    - `edgekd bench --against yesterday/timing.json`
    - `edgekd bench --host pi@ward-3 --host-python venv/bin/python`
    """
    from edgekd.cli import console
    from edgekd.pipeline import bench as pipeline

    pipeline.check_options(against=against, host=host, within=within, duration=duration)
    told = given(context, "run", "runs", "as_json")
    with console.tracker() as track:
        here = opened(runs, run, profile, track)
        if against is not None:
            found = here.compare(
                against, seconds=seconds, duration=duration, runtime=runtime, rounds=rounds,
                tolerance=tolerance,
            )  # fmt: skip
            timings = [found.own]
        else:
            timings = here.bench(
                within=within, seconds=seconds, duration=duration, quick=quick, runtime=runtime,
                host=host, host_python=host_python, given=told,
            )  # fmt: skip
    if against is not None:
        result(as_json, found, console.against(found))
        doubtful = pipeline.noisy(timings, strict=strict)
    else:
        table = [t.model_dump(mode="json") for t in timings]
        result(as_json, table, console.timings(timings))
        console.say(f"page {here.folder / 'bench' / 'bench.html'}")
        doubtful = pipeline.unsteady(timings) or pipeline.noisy(timings, strict=strict)
    if doubtful:
        console.say(doubtful)
        raise typer.Exit(6)
    if against is not None:
        raise typer.Exit({"pass": 0, "fail": 3}.get(found.state, 6))
    pipeline.check_budget(timings)
