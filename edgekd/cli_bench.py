"""The command that measures: bench."""

from __future__ import annotations

from typing import Annotated

import typer

from edgekd.options import (
    RUNS,
    JsonOption,
    ProfileOption,
    RunOption,
    RunsOption,
    given,
    place,
    result,
)
from edgekd.records import EdgeKDError


def bench(
    context: typer.Context,
    profile: ProfileOption = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Measure in this runtime on this CPU.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.1, help="Of calls of each file, unless p99 can be told."),
    ] = 10,
    duration: Annotated[
        float | None,
        typer.Option("--duration", min=1, help="Seconds of calls of each, all of them: is it the "
                     "same when the device is warm?"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Latency, memory and throughput alone, once.")
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
        typer.Option("--rounds", min=1, help="With --against: processes of each file; of two "
                     "files up to five times as many, where they do not decide."),
    ] = 5,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="With --against: percent slower that is allowed. "
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
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Latency, cold starts, pauses, size, memory, roofline of teacher, student and INT8, in turns.

    Exit 3: over the profile's budget, or slower than --against. Exit 6: the machine was not steady
    enough to say. --host copies the files and edgekd to a folder there that is removed at the end;
    the device needs Python 3.10, numpy, pydantic, Pillow and the profile's runtime.

    Examples: edgekd bench --quick · edgekd bench --against yesterday/timing.json ·
    edgekd bench --host pi@ward-3 --host-python venv/bin/python
    """
    from edgekd import show, stages
    from edgekd.bench import How, short

    if against is not None and host is not None:
        raise EdgeKDError("--against measures both files here: leave --host out")
    how = How(seconds=seconds)
    if quick or against:
        how = short(seconds, throughput=against is None)
    if duration is not None:
        how = how.model_copy(update={"seconds": duration, "enough": None, "attempts": 1})
    with show.tracker() as track:
        here = place(runs_folder, run, profile, track)
        if against is not None:
            found = stages.bench_against(
                here, how, against, runtime=runtime, rounds=rounds, tolerance=tolerance
            )
        else:
            timings = stages.bench(here, how, runtime=runtime, host=host, host_python=host_python)
            page = stages.bench_page(here, timings, given(context, "run", "runs_folder", "as_json"))
    if against is not None:
        result(as_json, found, show.against(found))
        if doubtful := stages.noisy([found.own], strict=strict):
            show.say(doubtful)
            raise typer.Exit(6)
        raise typer.Exit({"pass": 0, "fail": 3}.get(found.state, 6))
    result(as_json, [t.model_dump(mode="json") for t in timings], show.timings(timings))
    show.say(f"page {page}")
    if doubtful := stages.unsteady(timings) or stages.noisy(timings, strict=strict):
        show.say(doubtful)
        raise typer.Exit(6)
    stages.check_budget(timings)
