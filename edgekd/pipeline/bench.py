"""`edgekd bench`: every file of a run timed side by side, here or on the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.records import Artifact, EdgeKDError, GateMissed, Profile, Timing

if TYPE_CHECKING:
    from edgekd.bench.bench import How
    from edgekd.bench.compare import Against
    from edgekd.pipeline.run import Run


def how_of(seconds: float, duration: float | None, *, quick: bool, within: float | None) -> How:
    """What is measured of each file, for how long at most, and how well ratios are to be known.

    within: percent; None: the usual. duration: seconds that are all taken.
    """
    from edgekd.bench.bench import QUICKLY, WITHIN, How, short

    how = short(seconds) if quick else How(seconds=seconds)
    if duration is not None:
        return how.model_copy(update={"seconds": duration, "within": None})
    return how.model_copy(update={"within": within or (QUICKLY if quick else WITHIN)})


def a_round(seconds: float, duration: float | None) -> How:
    """What is measured of each file in one of the rounds that compare two."""
    from edgekd.bench.bench import short

    return short(seconds if duration is None else duration, throughput=False)


def bench(
    run: Run,
    how: How,
    *,
    runtime: str | None,
    host: str | None = None,
    host_python: str = "python3",
) -> list[Timing]:
    """Every candidate timed in one runtime, interleaved, each in its own process.

    host: the profile's device, where ssh reaches it; runtime: on this CPU, so not with a host.
    """
    from edgekd.bench import bench as stopwatch

    if host is not None and runtime is not None:
        raise EdgeKDError("--runtime measures on this CPU, --host on a device: leave one out")
    if host is not None:
        from edgekd.pipeline import bench_remote

        return bench_remote.bench(
            host, run.candidates(run.dataset()), run.record.profile, run.folder / "bench",
            how, python=host_python, track=run.track,
        )  # fmt: skip
    candidates, profile, on_device = _measurable(run, runtime)
    return stopwatch.bench(
        candidates, profile, run.folder / "bench", how, on_device=on_device, track=run.track
    )


def bench_page(run: Run, timings: list[Timing], given: str) -> Path:
    """`<run>/bench/bench.html` of the timings, with bench.md and bench.csv beside it.

    given: the options of the command that took them, but for the run's.
    """
    from edgekd.bench import page

    return page.write(
        run.folder / "bench", timings, title=f"EdgeKD bench: {run.folder.name}",
        command=" ".join(x for x in ("edgekd bench", given, f"--run {run.folder}") if x),
    )  # fmt: skip


def _measurable(run: Run, runtime: str | None) -> tuple[list[Artifact], Profile, bool]:
    """(the files, the profile to run them with, whether this is its device)."""
    from edgekd import runtimes

    candidates = run.candidates(run.dataset())
    if runtime is None:
        return candidates, *runtimes.host(run.record.profile, candidates[-1])
    module = runtimes.get(runtime)
    profile = on_cpu(run.record.profile, runtime)
    held = [c for c in candidates if c.path.suffix in module.SUFFIXES]
    if not held:
        raise EdgeKDError(f"runtime {runtime} loads none of the files in {run.folder}")
    return held, profile, profile == run.record.profile


def on_cpu(profile: Profile, runtime: str) -> Profile:
    """The profile, in `runtime` on this CPU."""
    from edgekd import runtimes

    devices = runtimes.get(runtime).devices()
    cpu = next((d for d in devices if d.lower() == "cpu"), None)
    if cpu is None:
        raise EdgeKDError(f"runtime {runtime} runs on no CPU, only on {', '.join(devices)}")
    return profile.model_copy(update={"runtime": runtime, "device": cpu})


def bench_against(
    run: Run,
    how: How,
    other: str,
    *,
    runtime: str | None,
    rounds: int,
    tolerance: float | None,
) -> Against:
    """The run's last file beside `other`: a runtime, a folder of an artifact, or a timing.json.

    Written to `<run>/bench/against.json`.
    """
    from edgekd import runtimes
    from edgekd.bench import compare
    from edgekd.bench.bench import Runner

    candidates, profile, on_device = _measurable(run, runtime)
    own = Runner(candidates[-1], profile, on_device)
    given: dict[str, Any] = {"rounds": rounds, "tolerance": tolerance, "track": run.track}
    path = Path(other)
    if other in runtimes.names():
        module, named = runtimes.get(other), on_cpu(run.record.profile, other)
        meant = named == run.record.profile
        files = [c for c in candidates[::-1] if c.path.suffix in module.SUFFIXES
                 and c.role == own.artifact.role]  # fmt: skip
        if not files:
            raise EdgeKDError(f"runtime {other} loads no file of the student in {run.folder}")
        found = compare.other_file(own, Runner(files[0], named, meant), how, **given)
    elif (path / Artifact.FILE).is_file():
        beside = Artifact.load(path)
        used, meant = runtimes.host(profile, beside)
        found = compare.other_file(own, Runner(beside, used, on_device and meant), how, **given)
    elif path.name == Timing.FILE or (path / Timing.FILE).is_file():
        folder = path.parent if path.name == Timing.FILE else path
        found = compare.record(own, Timing.load(folder), how, **given)
    else:
        raise EdgeKDError(
            f"--against {other}: no runtime ({', '.join(runtimes.names())}), no folder with "
            f"{Artifact.FILE}, no {Timing.FILE}"
        )
    return found.save(run.folder / "bench")


def check_options(
    *, against: str | None, host: str | None, within: float | None, duration: float | None
) -> None:
    """EdgeKDError for options of `edgekd bench` that exclude each other."""
    if against is not None and host is not None:
        raise EdgeKDError("--against measures both files here: leave --host out")
    if within is not None and against is not None:
        raise EdgeKDError("--against ends by --rounds and --tolerance: leave --within out")
    if within is not None and duration is not None:
        raise EdgeKDError("--duration takes all of its seconds: leave --within out")


def check_budget(timings: list[Timing]) -> None:
    """GateMissed if the last (most compressed) candidate is over the profile's budget."""
    last = timings[-1]
    if last.over_budget and last.on_device:
        over = ", ".join(f"{k} {m:.1f} of {b:g}" for k, (m, b) in last.over_budget.items())
        raise GateMissed(f"{last.model} {last.precision} is over budget: {over}")


def unsteady(timings: list[Timing]) -> str:
    """Why figures decide nothing, in one line; empty if they do.

    A ratio is known too badly, or the last file keeps its latency budget at one pace that the
    machine had in this run and misses it at another.
    """
    from edgekd.bench import tables

    shown = tables.shown(timings)
    said = [f"{s.name} ({why})" for s in shown if (why := tables.too_wide(s.timing))]
    if said:
        return f"not steady: {', '.join(said)}; leave the machine alone or allow more --seconds"
    paces = tables.budget_at_paces(timings[-1])
    return f"not decided: {shown[-1].name}: {paces}; leave the machine alone" if paces else ""


def noisy(timings: list[Timing], *, strict: bool) -> str:
    """Why a `strict` user refuses these figures; empty if there is no noise."""
    noise = [line for t in timings for line in t.noise]
    return f"refused (--strict): {noise[0]}" if strict and noise else ""
