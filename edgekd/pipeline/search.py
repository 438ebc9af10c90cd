"""Which sub-net of a supernet for which profile? Evaluated, predicted, searched, measured."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from edgekd.metrics.latency import percentiles
from edgekd.ofa import spaces
from edgekd.ofa.accuracy_predictor import AccuracyPredictor, Ranking, check_prior, judge_all
from edgekd.ofa.latency_table import Table
from edgekd.ofa.pareto import Front, Member, plot
from edgekd.pipeline import folders
from edgekd.pipeline.shrink import find_supernet
from edgekd.pipeline.workspace import Workspace
from edgekd.records import (
    Arch,
    Artifact,
    Budget,
    EdgeKDError,
    Machine,
    Profile,
    Record,
    Stored,
    Track,
    Training,
    locked,
    make_folder,
    sha256,
    unknown,
    untracked,
)
from edgekd.records.options import DataOptions, RunOptions, SearchOptions
from edgekd.runtimes import machine

EVALUATED = "evaluated.jsonl"  # in the supernet's folder: sub-nets and their accuracy, for all
BYTES = {"fp32": 4.0, "bf16": 4.0, "fp16": 2.0, "int8": 1.1}  # a parameter; scales and biases too
SECONDS = 2.0  # of timing a measured sub-net


class Measured(Record):
    """A sub-net of the front, measured for real."""

    name: str
    predicted: Member
    p50_ms: float
    p95_ms: float
    peak_mb: float  # of a process that does nothing else
    accuracy: float  # on the validation split, as cut


class Sought(Stored):
    """What a search went by, and what its front turned out to be: beside search.json."""

    FILE: ClassVar[str] = "sought.json"
    supernet: str  # sha256
    profile: Profile
    precision: str
    subnets: int  # evaluated at random to begin with; then a third as many of three fronts
    prior: str = ""  # sha256 of OFA's accuracy predictor, where one was brought
    ranking: Ranking  # of sub-nets held out
    estimated: bool  # latency by the profile's stated peak, not measured
    chosen: str  # name of the sub-net to distil
    slack: float  # predicted accuracy that may be given up for speed
    measured: tuple[Measured, ...] = ()  # empty where the device is not here
    machine: Machine | None = None  # that measured
    seconds: float  # of all that: evaluating, measuring blocks where needed, searching


def search(
    profiles: Sequence[str] = ("cpu",),
    *,
    data: DataOptions = DataOptions(),  # noqa: B008 it is frozen
    search: SearchOptions = SearchOptions(),  # noqa: B008
    output: RunOptions = RunOptions(),  # noqa: B008
    track: Track = untracked,
) -> list[tuple[Front, Sought]]:
    """Of each profile, the front of sub-nets within its budget, and which of them was chosen.

    profiles: names or .toml files. The supernet has to be there: `shrink` makes it. Written to
    `<run>/search/`. NSGA-II over accuracy and latency (Cai et al. 2020, arXiv 1908.09791).
    """
    chosen = [Profile.read(name) for name in profiles]
    if output.run is not None and len(chosen) > 1:
        raise EdgeKDError("--run is one run's folder: give one --profile, or leave it out")
    pixels = data.size or max(p.pixels for p in chosen)
    work = Workspace.open(output.runs, data, pixels, track)
    found = []
    for one in chosen:
        base = find_supernet(work, one, search.supernet)
        if base is None:
            raise EdgeKDError(
                f"no supernet of {one.space} for {work.folder} at {pixels} px in "
                f"{output.runs}: run edgekd shrink first"
            )
        folder = output.run or output.runs / one.name
        with locked(folder, inside=True):
            found.append(search_one(work, one, base, folder, search, force=output.force))
    return found


def search_one(
    work: Workspace,
    profile: Profile,
    supernet: Artifact,
    folder: Path,
    asked_for: SearchOptions,
    *,
    force: bool = False,
) -> tuple[Front, Sought]:
    """The front of `supernet` for `profile`, in `folder`; not made again unless asked otherwise.

    Another `give_up` only chooses anew, and measures that member if it was not measured.

    What is evaluated is kept with the supernet, what is measured in the user's cache: the next
    profile starts from there. `front.winner` is the most accurate sub-net within the budget,
    `sought.chosen` the fastest that gives up at most `give_up` points of that. prior: OFA's
    `acc_predictor.pth`, for supernets of its space.
    """
    from edgekd.ofa import latency_table
    from edgekd.ofa import nsga2 as evolution

    subnets, prior, measure = asked_for.subnets, asked_for.prior, asked_for.measure
    estimate, slack = asked_for.estimate, asked_for.give_up / 100
    started = time.perf_counter()
    out = folder / "search"
    if prior is not None:
        check_prior(prior, supernet.model)
    asked: dict[str, Any] = {"supernet": supernet.sha256, "profile": profile, "subnets": subnets,
             "prior": sha256(prior) if prior else ""}  # fmt: skip
    old = None if force else Sought.kept(out, asked)
    if old and estimate and not old.estimated:
        old = None
    if old and old.slack == slack:
        return Front.load(out), old
    folders.alone("searching")
    resolutions = allowed(profile, supernet)
    estimate = estimate or (old is not None and old.estimated)
    table = latency_of(profile, len(work.spec.classes), resolutions, estimate, work.track)
    judge = judge_of(work, supernet)
    if old and (old.machine is None or old.machine.kind == machine.this().kind):
        predictor, front = AccuracyPredictor.load(out / "predictor"), Front.load(out)
    else:
        old = None
        make_folder(out)
        (out / Sought.FILE).unlink(missing_ok=True)
        predictor, front = evolution.explore(
            supernet.model, resolutions, latency_table.tabulate(table).over(resolutions),
            profile.budget, judge, supernet.folder / EVALUATED,
            classes=len(work.spec.classes), samples=subnets, each=max(6, subnets // 3),
            p95_ratio=table.p95_ratio, prior=prior,
            bytes_per_param=BYTES[table.precision], generations=asked_for.generations,
            seed=work.seed, track=work.track,
        )  # fmt: skip
        front.save(out)
        predictor.save(out / "predictor")
    chosen = fastest_within(front.members, slack)
    measured = list(old.measured) if old else []
    measured_on = old.machine if old else None
    if measure and not table.estimated and folders.here(profile):  # a table may come from a device

        def timed(members: Sequence[Member]) -> Machine:
            made, here = measure_front(
                work, profile, supernet, table.precision, members, judge, out
            )
            measured.extend(made)
            return here

        if not measured:
            few = front.spread(measure)
            measured_on = timed([m for m in front.members if m in few or m == chosen])
        chosen = settled(front.members, slack, profile.budget, measured, timed)
    sought = Sought(
        **asked, slack=slack, precision=table.precision,
        ranking=predictor.record.ranking, estimated=table.estimated,
        chosen=spaces.title(chosen.arch), measured=tuple(measured),
        machine=measured_on, seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    points = {m.name: (m.predicted.p95_ms, m.predicted.accuracy) for m in measured}
    marks = _landmarks(supernet.model, resolutions)
    archs = list(marks.values())
    ms = (table.predict(archs) * table.p95_ratio).tolist()
    points |= dict(zip(marks, zip(ms, predictor.of(archs).tolist(), strict=True), strict=True))
    real = {m.name: (m.p95_ms, m.accuracy) for m in measured}
    plot(front, out / "front.png", chosen=chosen, named=points, measured=real)
    return front, sought.save(out)


def told_apart(sought: Sought) -> bool:
    """Whether the evaluated sub-nets differed in accuracy at all."""
    return sought.ranking.rmse > 1e-9


def chosen_of(front: Front, sought: Sought) -> Member:
    """The member of the front that the search chose."""
    return next(m for m in front.members if spaces.title(m.arch) == sought.chosen)


def allowed(profile: Profile, supernet: Artifact) -> list[int]:
    """Resolutions that the profile allows and the supernet was trained at."""
    trained = supernet.settings["resolutions"]
    found = [r for r in sorted(profile.resolutions) if r in trained] or list(trained)
    if len(trained) > 1 and not set(found) & set(profile.resolutions):
        raise EdgeKDError(
            f"{supernet.folder} was trained at {trained} px, profile {profile.name} allows "
            f"{list(profile.resolutions)}: shrink one for it"
        )
    return found


def fastest_within(members: Sequence[Member], slack: float) -> Member:
    """The fastest of a front (from fast to slow) that is within `slack` of the most accurate."""
    best = members[-1].accuracy
    return next(m for m in members if m.accuracy >= best - slack)


def settled(
    members: Sequence[Member],
    slack: float,
    budget: Budget,
    measured: list[Measured],
    measure: Callable[[Sequence[Member]], object],
) -> Member:
    """The fastest within `slack` that keeps the budget when it is measured, too.

    `measure` adds to `measured`. What was measured too slow rules out all that are predicted to be
    slower. EdgeKDError where nothing is left, with what the fastest needs.
    """
    ms, mb = budget.latency_ms or math.inf, budget.memory_mb or math.inf
    while True:
        slow = min((m.predicted.p95_ms for m in measured if m.p95_ms > ms), default=math.inf)
        large = [m.predicted for m in measured if m.peak_mb > mb]
        left = [m for m in members if m.p95_ms < slow and m not in large]
        if not left or (members[0] in large and len(measured) == len(large)):
            first = min(measured, key=lambda m: m.p95_ms)
            limit = f"latency_ms {ms:g}" if first.p95_ms > ms else f"memory_mb {mb:g}"
            raise EdgeKDError(
                f"measured, the fastest sub-net of the front has a p95 of {first.p95_ms:.3g} ms "
                f"and takes {first.peak_mb:.0f} MB: over the budget's {limit}; raise it, or "
                "allow a lower resolution"
            )
        chosen = fastest_within(left, slack)
        if chosen in [m.predicted for m in measured]:
            return chosen
        measure([chosen])


def judge_of(work: Workspace, supernet: Artifact) -> Callable[[Arch], float]:
    """Arch -> balanced accuracy of that sub-net, as cut, on the validation split."""
    from edgekd.models import zoo
    from edgekd.train import shrink

    net = zoo.load_supernet(supernet)
    training = Training(**supernet.settings["training"])
    judge = shrink.judge_of(work.dataset, supernet.spec, training, supernet.seed)
    return lambda arch: judge(net, arch)["balanced_accuracy"]


def latency_of(
    profile: Profile,
    classes: int,
    resolutions: Sequence[int],
    estimate: bool,
    track: Track = untracked,
) -> Table:
    """The profile's latency table: its own, this machine's (measured now), or an estimate."""
    from edgekd.ofa import latency_table

    precision = profile.precisions[0]
    wanted = profile.model_copy(update={"resolutions": tuple(resolutions)})
    if estimate:
        return latency_table.estimate(wanted, precision, classes=classes)
    table = latency_table.find(wanted, precision)
    if table is not None:
        return table
    if not folders.here(profile):
        return latency_table.estimate(wanted, precision, classes=classes)
    return calibrated(wanted, precision, classes=classes, track=track)[0]


def calibrated(
    profile: Profile,
    precision: str,
    *,
    classes: int,
    nets: int | None = None,
    seed: int = 0,
    force: bool = False,
    track: Track = untracked,
) -> tuple[Table, Path]:
    """(latency table of a profile on this machine, its folder); measured now if there is none."""
    from edgekd.ofa import calibrate, latency_table

    if precision not in profile.precisions:
        raise EdgeKDError(unknown("precision", precision, profile.precisions))
    folder = latency_table.cached(profile, precision)
    with locked(folder):
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        if (folder / Table.FILE).exists():
            return Table.load(folder), folder
        made = calibrate.calibrate(
            profile, precision, folder, classes=classes, nets=nets or calibrate.NETS, seed=seed,
            track=track,
        )  # fmt: skip
    return made, folder


def measure_front(
    work: Workspace,
    profile: Profile,
    supernet: Artifact,
    precision: str,
    members: Sequence[Member],
    judge: Callable[[Arch], float],
    out: Path,
) -> tuple[tuple[Measured, ...], Machine]:
    """Members of the front made as they would be deployed, timed on the device, and judged."""
    from edgekd import data
    from edgekd.bench import bench
    from edgekd.data import preprocess
    from edgekd.models import zoo
    from edgekd.pipeline import trial

    net = zoo.load_supernet(supernet)
    artifacts = []
    for member in work.track(members, "making sub-nets of the front", len(members)):
        spec = supernet.spec.model_copy(update={"size": (member.arch.resolution,) * 2})
        samples = work.dataset.splits["train"][: trial.CALIBRATION]
        images = preprocess.normalise(data.load_pixels(samples, spec), spec)
        subnet = net.extract(member.arch)
        artifacts.append(
            trial.deployed(
                subnet, member.arch, spec, precision, images, out / "trials", profile.runtime
            )
        )
    # Most were evaluated to learn from: those are not judged again.
    judged = judge_all([m.arch for m in members], judge, supernet.folder / EVALUATED,
                       track=work.track)  # fmt: skip
    timings = bench.bench(
        artifacts, profile, out / "trials" / "bench", bench.short(SECONDS, throughput=False),
        on_device=True, track=work.track,
    )  # fmt: skip
    found = []
    for member, timing, (_, value) in zip(members, timings, judged, strict=True):
        ms = percentiles(timing.samples_ms)
        found.append(
            Measured(name=spaces.title(member.arch), predicted=member, p50_ms=ms["p50"],
                     p95_ms=ms["p95"], peak_mb=timing.peak_mb, accuracy=value)
        )  # fmt: skip
    return tuple(found), timings[0].machine


def _landmarks(space: str, resolutions: Sequence[int]) -> dict[str, Arch]:
    """Sub-nets with a name, to see the front beside: the ends, and published ones that fit."""
    found = {f"{space} {end}": spaces.uniform(space, end, max(resolutions))
             for end in ("min", "mid", "max")}  # fmt: skip
    for name, arch in spaces.subnets().items():
        if arch.space == space and arch.resolution in resolutions:
            found[name.partition("_top1")[0]] = arch
    return found
