"""Which file is the fastest that keeps its answers? Every candidate made, judged, explained, timed.

INT8 is not faster by itself: on one runtime an engine's file runs twice as fast as FP32, on another
twice as slow. So each precision and engine that the profile allows is tried in the profile's own
runtime. What loses too much accuracy on the validation split, or explains its answers otherwise
than FP32 does, is out. Answers are cheap, a few turns of timing too, explanations are not: so all
are asked for answers, those that keep them are timed for a few turns, and are explained from the
fastest on, until what is left is slower than one that holds (`halving`). Where INT8 files that are
out are clearly faster than what is left, layers of one go back to FP32 until it holds, and it is
timed with the rest. The fastest is chosen, or what is more exact and as fast. The test split is not
looked at.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekd import data, export, runtimes
from edgekd.bench import bench
from edgekd.data import preprocess
from edgekd.explain import fidelity
from edgekd.metrics import paired
from edgekd.metrics.calibration import log_softmax
from edgekd.metrics.classification import answers
from edgekd.metrics.evaluation import Truth, truth
from edgekd.metrics.latency import ENOUGH
from edgekd.quantize import engines as quantizers
from edgekd.quantize import halving, ptq, sensitivity
from edgekd.quantize.choice import (
    SECONDS,
    Candidate,
    Choice,
    Judged,
    ranked,
    without_file,
)
from edgekd.quantize.engines import NARROW, Engine
from edgekd.quantize.halving import CLEARLY, ROUNDS, Timed
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Machine,
    Metric,
    NoRoom,
    Precision,
    Profile,
    RuntimeUnavailable,
    Timing,
    Track,
    make_folder,
    untracked,
)
from edgekd.runtimes import machine

QAT = "-qat"  # what the name of one that was trained in INT8 ends with
EXPLAINED = 32  # validation images whose maps are compared
FIRST = 4  # as much of a round are the first turns of all


class Bench(NamedTuple):
    """What all candidates of one choice share."""

    source: Artifact
    profile: Profile
    calibration: np.ndarray  # (n, 3, H, W) float32
    images: np.ndarray  # (N, 3, H, W) float32, the validation split
    truth: Truth
    log_p: np.ndarray  # (N, K) FP32's log probabilities
    cases: fidelity.Cases  # what is explained
    explained: np.ndarray  # (M,) which images that are
    maps: Callable[[], fidelity.Maps]  # FP32's, made when they are first asked for
    seed: int
    track: Track


def choose(
    source: Artifact,
    dataset: data.Dataset,
    profile: Profile,
    out: Path,
    *,
    images: int,
    max_drop: float,
    engines: Sequence[str] | None = None,
    tuned: Artifact | None = None,
    seconds: float = SECONDS,
    exhaustive: bool = False,
    seed: int = 0,
    track: Track = untracked,
) -> Choice:
    """The best file for `profile`, whose device must be here; all are kept in `out`.

    source: FP32 ONNX artifact. images: how many of the training split calibrate. max_drop: points
    of balanced accuracy. engines: to try for INT8; None: all that write for the profile's runtime.
    tuned: FP32 ONNX of the same network after training in INT8, to be quantised as well. seconds:
    of calls of each in each of up to ROUNDS processes. exhaustive: all are explained and timed in
    full, those that cannot be chosen too. EdgeKDError if FP32 itself does not run; what else does
    not is told in the Choice.
    """
    if profile.device not in runtimes.get(profile.runtime).devices():
        raise RuntimeUnavailable(
            f"--engine auto measures on the device, and {profile.runtime} sees no {profile.device} "
            f"here: run it there, or name an engine: {', '.join(quantizers.names())}"
        )
    (make_folder(out) / Choice.FILE).unlink(missing_ok=True)
    here = machine.this()
    wanted = tuple(engines) if engines is not None else writers(profile.runtime)
    ways = _ways(source, tuned, profile, out, wanted, here)
    shared = _shared(source, dataset, profile, images, seed, track)
    found, failed = _asked(ways, shared, explain=exhaustive)
    decide = _exhaustive if exhaustive else _halved
    rows = decide(found, shared, out, max_drop, seconds)
    return Choice(
        source=source.sha256, tuned=tuned.sha256 if tuned else "", profile=profile,
        max_drop=max_drop, images=len(shared.calibration), seconds=seconds, engines=wanted,
        exhaustive=exhaustive, chosen=next(r.name for r in rows if r.state == "chosen"),
        candidates=(*rows, *failed), machine=here,
    ).save(out)  # fmt: skip


def _asked(
    ways: Mapping[str, Make], shared: Bench, *, explain: bool
) -> tuple[list[Judged], list[Candidate]]:
    """(candidates with their answers, those that do not run); `explain`: with their maps."""
    judged: list[Judged] = []
    failed: list[Candidate] = []
    for name in shared.track(ways, "making candidates", len(ways)):
        try:
            made = ways[name](shared)
            judged.append(judge(name, made, shared) if explain else answered(name, made, shared))
        except NoRoom:
            raise
        except EdgeKDError as e:
            if name == "fp32":  # nothing to compare the rest with
                raise EdgeKDError(
                    f"FP32 itself does not run in {shared.profile.runtime}: {e}"
                ) from e
            failed.append(without_file(name, str(e)))
    return judged, failed


def _exhaustive(
    judged: list[Judged], shared: Bench, out: Path, max_drop: float, seconds: float
) -> list[Candidate]:
    """The rows of all, each of which was explained and is timed in full."""
    rows = ranked(judged, _timed(judged, shared, seconds), max_drop)
    small = _worth_mending(judged, rows, max_drop)
    found = mended(small, shared, out, max_drop) if small else None
    if isinstance(found, Judged):
        judged = [*judged, found]
        return ranked(judged, _timed(judged, shared, seconds), max_drop)
    return [*rows, *([found] if found else [])]


def _halved(
    judged: list[Judged], shared: Bench, out: Path, max_drop: float, seconds: float
) -> list[Candidate]:
    """The rows of all; explained and timed in full are those that may still be chosen."""
    field = {j.name: j for j in judged}

    def holds(name: str) -> bool:
        field[name] = _explained_if_needed(field[name], shared, max_drop)
        return not field[name].lost(max_drop)

    def raced(names: Sequence[str], seed: int) -> halving.Raced:
        def measure(running: Sequence[str], number: int) -> list[Timing]:
            runners = [bench.Runner(field[n].artifact, shared.profile, True) for n in running]
            how = _how(seconds, first=number == 0)
            return bench.measure(runners, how, seed=seed + number, track=shared.track)

        return halving.race(names, measure, holds=holds, counts=lambda n: _mendable(field[n]))

    first = [n for n, j in field.items() if not j.lost(max_drop) or _mendable(j)]
    found = raced(first, shared.seed)
    timed = {n: halving.timed(found.rounds, n, first[0]) for n in found.rounds}
    rows = ranked(list(field.values()), timed, max_drop, found.late)
    small = _worth_mending(list(field.values()), rows, max_drop)
    extra = mended(small, shared, out, max_drop) if small else None
    if not isinstance(extra, Judged):
        return [*rows, *([extra] if extra else [])]
    field[extra.name] = extra
    left = [n for n in first if n not in found.late and not field[n].lost(max_drop)]
    again = raced(list(dict.fromkeys((first[0], *left, extra.name))), shared.seed + 1 + ROUNDS)
    # What takes part again is told by these turns alone: those that it meets the new one in.
    timed |= {n: halving.timed(again.rounds, n, first[0]) for n in again.rounds}
    return ranked(list(field.values()), timed, max_drop, found.late | again.late)


def _how(seconds: float, *, first: bool) -> bench.How:
    """What is measured of a candidate: the first turns tell a 95th percentile, and no more."""
    if not first:
        return bench.short(seconds, throughput=False)
    how = bench.short(seconds / FIRST, throughput=False)
    return how.model_copy(update={"least": ENOUGH[95]})


def _explained_if_needed(j: Judged, shared: Bench, max_drop: float) -> Judged:
    """With its maps, unless it is FP32 or its answers are lost."""
    if j.agreement is not None or j.artifact.precision == "fp32" or j.lost(max_drop):
        return j
    return explained(j, shared)


def _mendable(j: Judged) -> bool:
    """Whether layers of it can go back to FP32."""
    return j.artifact.precision == "int8" and quantizers.get(j.artifact.settings["engine"]).KEEPS


def _worth_mending(
    judged: Sequence[Judged], rows: Sequence[Candidate], max_drop: float
) -> list[Judged]:
    """INT8 files that are out and clearly faster than what is chosen."""
    times = {r.name: r.times for r in rows}
    chosen = next(r for r in rows if r.state == "chosen")
    assert chosen.times is not None  # what is chosen was timed
    return [j for j in judged if j.artifact.precision == "int8" and j.lost(max_drop)
            and (own := times[j.name]) is not None and own < chosen.times / CLEARLY]  # fmt: skip


def _timed(judged: Sequence[Judged], shared: Bench, seconds: float) -> dict[str, Timed]:
    """All of them in turns on the profile's device, ROUNDS times."""
    runners = [bench.Runner(j.artifact, shared.profile, True) for j in judged]
    rounds = bench.in_rounds(
        runners, _how(seconds, first=False), rounds=ROUNDS, seed=shared.seed, track=shared.track
    )
    joined = [bench.joined(of_one) for of_one in rounds]
    return {j.name: halving.figures(t, joined[0]) for j, t in zip(judged, joined, strict=True)}


def writers(runtime: str) -> tuple[str, ...]:
    """Engines whose files `runtime` loads, of those that are installed."""
    return _installed(quantizers.names(), lambda e: runtime in e.RUNTIMES)


def _installed(engines: Sequence[str], fits: Callable[[Engine], bool]) -> tuple[str, ...]:
    found = []
    for name in engines:
        with contextlib.suppress(EdgeKDError):
            if fits(quantizers.get(name)):
                found.append(name)
    return tuple(found)


Make = Callable[[Bench], Artifact]


def _ways(
    source: Artifact,
    tuned: Artifact | None,
    profile: Profile,
    out: Path,
    engines: Sequence[str],
    here: Machine,
) -> dict[str, Make]:
    """Name of each candidate and how it is made; FP32, that all are compared with, is one."""
    overflows = profile.device == "CPU" and machine.overflows(here.isa)
    narrow = _installed(engines, lambda e: NARROW in e.METHODS) if overflows else ()

    def whole(precision: Precision) -> Make:
        return lambda b: export.to_runtime(
            source, b.calibration[: export.COMPARED], out / precision, profile.runtime,
            precision=precision, profile=profile,
        )  # fmt: skip

    def small(engine: str, method: str | None, of: Artifact, name: str) -> Make:
        def make(b: Bench) -> Artifact:
            made = _finished(out / name, of, {"calibration_images": len(b.calibration), "keep": []})
            return made or ptq.quantize(
                of, b.calibration, out / name,
                engine=engine, method=method, runtime=profile.runtime, seed=b.seed,
            )  # fmt: skip

        return make

    def all_of(source: Artifact, ending: str) -> dict[str, Make]:
        tried: list[tuple[str, str | None, str]]
        tried = [(e, None, f"int8-{e}{ending}") for e in engines]
        tried += [(e, NARROW, f"int8-{e}-{NARROW}{ending}") for e in narrow]
        return {name: small(e, method, source, name) for e, method, name in tried}

    floats: dict[Precision, None] = dict.fromkeys(
        ("fp32", *(p for p in profile.precisions if p != "int8"))
    )
    found: dict[str, Make] = {p: whole(p) for p in floats}
    if "int8" in profile.precisions:
        found |= all_of(source, "") | (all_of(tuned, QAT) if tuned else {})
    return found


def _finished(folder: Path, source: Artifact, settings: dict[str, Any]) -> Artifact | None:
    """What an interrupted choice had made of the same source in the same way."""
    if not (folder / Artifact.FILE).exists():
        return None
    made = Artifact.load(folder)
    same = all(made.settings.get(k) == v for k, v in settings.items())
    return made if same and source.sha256 in made.parents.values() else None


def _shared(
    source: Artifact,
    dataset: data.Dataset,
    profile: Profile,
    images: int,
    seed: int,
    track: Track,
) -> Bench:
    """FP32's answers and maps, by ONNX Runtime's or the profile's own runtime."""
    spec, samples = source.spec, dataset.splits["val"]

    def prepared(chosen: Sequence[data.Sample]) -> np.ndarray:
        return preprocess.normalise(data.load_pixels(chosen, spec, track), spec)

    calibration = prepared(ptq.pick_calibration(dataset.splits["train"], images, seed))
    pictures, known = prepared(samples), truth(samples)
    session = runtimes.open_session(source, runtimes.host(profile, source)[0])
    logits = answers(session, pictures, track=track)
    few = ptq.pick_calibration(samples, EXPLAINED, seed)
    place = {s.digest: i for i, s in enumerate(samples)}
    chosen = np.array([place[s.digest] for s in few])
    names = [spec.classes[k] for k in logits[chosen].argmax(1)]
    cases = fidelity.Cases(
        images=[known.images[i] for i in chosen],
        labels=[spec.classes[known.labels[i]] for i in chosen],
        explained=names,
        groups=[known.groups[i] for i in chosen],
    )

    @functools.cache
    def maps() -> fidelity.Maps:
        return fidelity.explain_set(
            session, pictures[chosen], logits[chosen].argmax(1), track=track
        )

    return Bench(source, profile, calibration, pictures, known, log_softmax(logits), cases, chosen,
                 maps, seed, track)  # fmt: skip


def judge(name: str, artifact: Artifact, shared: Bench) -> Judged:
    """The file itself in the profile's runtime, beside FP32: its answers and its maps."""
    return explained(answered(name, artifact, shared), shared)


def answered(name: str, artifact: Artifact, shared: Bench) -> Judged:
    """The file's answers in the profile's runtime, beside FP32's."""
    session = runtimes.open_session(artifact, shared.profile)
    log_p = log_softmax(answers(session, shared.images, track=shared.track))
    found = paired.compare(
        log_p, shared.log_p, shared.truth.labels, shared.truth.groups, shared.source,
        seed=shared.seed,
    ).differences["balanced_accuracy"]  # fmt: skip
    drop = Metric(value=-100 * found.value, low=_less(found.high), high=_less(found.low))
    flips = int((log_p.argmax(1) != shared.log_p.argmax(1)).sum())
    return Judged(name, artifact, drop, flips, None, shared.profile.margins.kappa)


def explained(j: Judged, shared: Bench) -> Judged:
    """The same with how alike its maps and FP32's are, of FP32's answers."""
    session = runtimes.open_session(j.artifact, shared.profile)
    asked = shared.log_p[shared.explained].argmax(1)
    maps = fidelity.explain_set(session, shared.images[shared.explained], asked,
                                track=shared.track)  # fmt: skip
    own = fidelity.compare(
        j.name, j.artifact, shared.profile.runtime, shared.cases, shared.maps(), maps,
        seed=shared.seed,
    ).aggregate.get("kappa")  # fmt: skip
    return j._replace(agreement=float("nan") if own is None else own.value)


def _less(points: float | None) -> float | None:
    return None if points is None else -100 * points


def mended(
    small: Sequence[Judged], shared: Bench, out: Path, max_drop: float
) -> Judged | Candidate | None:
    """The nearest to holding of INT8 files that are out, with layers put back to FP32.

    A Candidate that is out, with the account of it, if that takes too many of them; None if no
    engine of theirs can spare a layer.
    """
    can = [j for j in small if _mendable(j)]
    if not can:
        return None
    best = _nearest(can, shared, max_drop)
    engine, method = best.artifact.settings["engine"], best.artifact.settings["method"]
    name = f"{best.name.removesuffix(QAT)}-repaired"  # it is made of the student itself

    def made(keep: Sequence[str], calibration: np.ndarray, folder: Path) -> Artifact:
        return ptq.quantize(
            shared.source, calibration, folder,
            engine=engine, method=method, runtime=shared.profile.runtime, keep=keep,
            seed=shared.seed,
        )  # fmt: skip

    last: Judged | None = None

    def holds(artifact: Artifact) -> Judged | None:
        nonlocal last
        last = _explained_if_needed(answered(name, artifact, shared), shared, max_drop)
        return None if last.lost(max_drop) else last

    try:
        return sensitivity.repair(
            shared.source, shared.profile, made, holds, shared.images, shared.calibration,
            out / name, track=shared.track,
        )  # fmt: skip
    except NoRoom:
        raise
    except EdgeKDError as e:
        return without_file(name, str(e), last, last.lost(max_drop) if last else None)


def _nearest(can: Sequence[Judged], shared: Bench, max_drop: float) -> Judged:
    """The one that loses the least beyond what it may; of equals the one with the nearest maps."""

    def beyond(j: Judged) -> float:
        return max(0.0, j.drop.value - max_drop)

    equal = [j for j in can if beyond(j) == min(map(beyond, can))]
    if len(equal) > 1:  # those that are out by their answers were not asked for maps
        equal = [explained(j, shared) if j.agreement is None else j for j in equal]
    return max(equal, key=lambda j: -1.0 if j.alike is None else j.alike)
