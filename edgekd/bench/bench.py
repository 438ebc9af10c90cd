"""Every artifact under one stopwatch, whatever its runtime; size, memory, and what it all ran on.

Each artifact gets a fresh process (`worker`), since two runtimes in one process fight over threads,
and since peak memory can only be told of a process that did nothing else. The processes take turns
(A B B A A B ...), so that a machine that slows down for a while slows them all down. The turns end
when the ratio of each file to the first is known as well as was asked, or with the time for them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from edgekd.bench import conditions, roofline
from edgekd.bench.stopwatch import QUIET, YARDSTICK
from edgekd.bench.worker import UNAVAILABLE, WARMUP, film_bytes
from edgekd.metrics.latency import AGREE, ENOUGH, percentiles, turns_interval, unstable, width
from edgekd.records import (
    Artifact,
    Budget,
    EdgeKDError,
    Machine,
    Peak,
    Profile,
    Record,
    RuntimeUnavailable,
    Timing,
    Track,
    make_folder,
    untracked,
    versions,
    write_atomic,
)
from edgekd.runtimes import machine

# Turns of each artifact: short ones, so that the others meet the machine at the same pace. On two
# virtual cores the ratio of a file to itself varied by 2.6 % from run to run in 8, by 0.3 % in 40.
# Where turns end by what was found, fewer than 20 would end too early: by luck.
TURNS = (20, 40)
CALLS = 10  # in a turn, if there can be so many
TURN_S = 10.0  # seconds of one, at most
MORE = 4  # looks at the ratios are so many parts of the turns apart: each has a quarter more
LOOKS = 2  # in a row that have to find them narrow
WITHIN, QUICKLY = 5.0, 10.0  # percent
PAUSED = 4.0  # seconds of think time, about, that each gap of each file is tried for
LONG = 5.0  # seconds of think time; longer ones are those of the last file alone: it is deployed


class How(Record):
    """How long to look, and at what.

    Turns end as soon as the 95 % interval of each ratio to the first file is narrower than `within`
    at two looks in a row, none before `enough` calls. (To stop at a width, not at a value, leaves a
    ratio where it is and makes its interval a little too sure, the more so the fewer turns the
    first look has: Chow and Robbins 1965. So there are twenty at least, and a second look.)
    """

    seconds: float = 10.0  # of turns of each file, on the average; where `within` is None, of calls
    least: int = ENOUGH[95]  # calls of each, however long they take: a budget is of p95
    enough: int = ENOUGH[99]  # calls of each before it may end, as far as the seconds allow
    within: float | None = WITHIN  # percent of a ratio, or of one file's median; None: all seconds
    throughput: bool = True
    batches: tuple[int, ...] = (1, 4, 16)  # that the throughput is the best of
    idle_s: tuple[float, ...] = (0.5, 2.0, 10.0)  # think time between single studies
    cold: int = 3  # cold starts of each
    stages: bool = True  # preparing an image, a map, and all from file to answer
    layers: int = 20  # calls that are profiled; 0: none
    roofline: bool = True  # with the machine's peaks
    energy: bool = True


def short(seconds: float, *, throughput: bool = True) -> How:
    """Latency, memory and throughput alone, once; without throughput to choose between files."""
    return How(
        seconds=seconds, least=200, enough=200, within=None, throughput=throughput, idle_s=(),
        cold=0, stages=False, layers=0, roofline=False, energy=False,
    )  # fmt: skip


def over_budget(
    budget: Budget, *, p95_ms: float, params: int, size_bytes: int, peak_mb: float
) -> dict[str, tuple[float, float]]:
    """Limit -> (measured, allowed), for those that are exceeded."""
    measured = {
        "latency_ms": p95_ms,
        "params_m": params / 1e6,
        "size_mb": size_bytes / 1e6,
        "memory_mb": peak_mb,
    }
    allowed = {key: getattr(budget, key) for key in measured}
    return {k: (v, allowed[k]) for k, v in measured.items() if allowed[k] and v > allowed[k]}


class Worker:
    """A worker process of one artifact, as its parent sees it."""

    def __init__(self, artifact: Artifact, *arguments: str) -> None:
        self.artifact = artifact
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 closed in `close`; a pipe could fill up
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), root) if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgekd.bench.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | QUIET | {"PYTHONPATH": path},
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; EdgeKDError with its last words if it died."""
        stdin = self.process.stdin
        assert stdin is not None  # a pipe
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that the process says."""
        stdout = self.process.stdout
        assert stdout is not None  # a pipe
        line = stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> EdgeKDError:
        """Why the process ended."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        words = lines[-1].strip() if lines else f"{killed}, it said nothing"
        error = RuntimeUnavailable if code == UNAVAILABLE else EdgeKDError
        return error(f"measuring {self.artifact.folder} failed: {words}")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class Runner(NamedTuple):
    """A file and what runs it."""

    artifact: Artifact
    profile: Profile
    on_device: bool  # this machine and runtime are those that the file is meant for


def bench(
    artifacts: Sequence[Artifact],
    profile: Profile,
    out: Path,
    how: How = How(),  # noqa: B008 it is frozen
    *,
    on_device: bool,
    seed: int = 0,
    track: Track = untracked,
) -> list[Timing]:
    """Time every artifact on `profile`'s runtime; each Timing goes to `out`/<its folder's name>.

    on_device: this machine is the profile's device. EdgeKDError if a file does not run.
    """
    folders = places(artifacts, out)
    runners = [Runner(a, profile, on_device) for a in artifacts]
    timings = measure(runners, how, seed=seed, track=track)
    return [t.save(folder) for t, folder in zip(timings, folders, strict=True)]


def places(artifacts: Sequence[Artifact], out: Path) -> list[Path]:
    """The folder of each one's Timing, `out`/<its folder's name>; EdgeKDError for two of a name."""
    names = [a.folder.name for a in artifacts]
    if twice := [n for n in names if names.count(n) > 1]:
        raise EdgeKDError(f"two artifacts are called {twice[0]}: rename one of their folders")
    return [make_folder(out / name) for name in names]


def measure(
    runners: Sequence[Runner],
    how: How,
    *,
    seed: int = 0,
    track: Track = untracked,
) -> list[Timing]:
    """As `bench`, of files in whatever runtimes; nothing is written."""
    here = machine.this()  # before our own load
    watch, spent = conditions.Watch(), _cpu_s()
    workers: list[Worker] = []
    try:
        for r in runners:
            workers.append(Worker(r.artifact))
        found = [_opened(w, r, seed) for w, r in zip(workers, runners, strict=True)]
        _in_turns(workers, found, how, watch, track)
        _idle(workers, found, how, track)
        peaks = _peaks(runners, track) if how.roofline else {}
        for i in track(range(len(workers)), "throughput, stages, layers", len(workers)):
            _once_each(workers[i], runners[i], found[i], how, peaks.get(_where(runners[i])))
    finally:
        for w in workers:
            w.close()
    if how.cold:
        _cold(runners, found, how, track)
    told = watch.end(_cpu_s() - spent)
    return [_timing(r, f, here, told) for r, f in zip(runners, found, strict=True)]


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def in_rounds(
    runners: Sequence[Runner],
    how: How,
    *,
    rounds: int,
    most: int = 0,
    undecided: Callable[[list[list[Timing]]], bool] = lambda _: False,
    seed: int = 0,
    track: Track = untracked,
) -> list[list[Timing]]:
    """`measure` so many times, each with processes of its own: of each file its rounds.

    One file is some percent faster in one process than in the next. While what was found is
    `undecided`, there are more rounds, up to `most` in all.
    """
    each: list[list[Timing]] = []
    found: list[list[Timing]] = []
    while len(each) < rounds or (len(each) < most and undecided(found)):
        each.append(measure(runners, how, seed=seed + len(each), track=track))
        found = [list(x) for x in zip(*each, strict=True)]
    return found


def joined(rounds: Sequence[Timing]) -> Timing:
    """The first of some rounds of one file, with the samples, turns and noise of all."""
    return rounds[0].model_copy(
        update={
            "noise": tuple(dict.fromkeys(line for t in rounds for line in t.noise)),
            "samples_ms": tuple(x for t in rounds for x in t.samples_ms),
            "block_medians_ms": tuple(x for t in rounds for x in t.block_medians_ms),
            "yardstick_ms": tuple(x for t in rounds for x in t.yardstick_ms),
        }
    )


def _opened(worker: Worker, runner: Runner, seed: int) -> dict[str, Any]:
    """The worker's file loaded and warm; one after the other, so that each loads alone."""
    folder = str(runner.artifact.folder.resolve())
    return worker.ask(folder=folder, profile=runner.profile.model_dump(mode="json"), seed=seed)


class Turns:
    """What was taken in turns until now: one worker works, the others sleep."""

    def __init__(
        self, workers: Sequence[Worker], runs: Sequence[int], watch: conditions.Watch
    ) -> None:
        self._workers, self._runs, self._watch = workers, runs, watch
        self._busy: list[list[float]] = [[] for _ in workers]
        self.taken: list[dict[str, Any]] = [
            {"samples_ms": [], "block_medians_ms": [], "yardstick_ms": []} for _ in workers
        ]

    @property
    def count(self) -> int:
        """Turns of each file."""
        return len(self.taken[0]["block_medians_ms"])

    def take(self, count: int, what: str, track: Track) -> None:
        """So many turns more of each, every other one in the reverse order."""
        order = list(range(len(self._workers)))
        turns = range(self.count, self.count + count)
        todo = [i for turn in turns for i in (order[::-1] if turn % 2 else order)]
        for i in track(todo, what, len(todo)):
            block = self._workers[i].ask(runs=self._runs[i])
            self.taken[i]["samples_ms"] += block["samples_ms"]
            self.taken[i]["block_medians_ms"].append(float(np.median(block["samples_ms"])))
            self.taken[i]["yardstick_ms"].append(block["yardstick_ms"])
            self._busy[i].append(block["cores_busy"])
            self._watch.tick()

    def widths(self) -> list[float | None]:
        """Percent that the interval of each ratio to the first file is wide; None: it is the first.

        Of a file alone: its own median's.
        """
        first, *others = (t["block_medians_ms"] for t in self.taken)
        if not others:
            return [width(turns_interval(first, np.ones(len(first))))]
        return [None, *(width(turns_interval(first, x)) for x in others)]

    def told(self) -> list[dict[str, Any]]:
        """Of each file its samples, turns, yardsticks and how many cores it kept busy."""
        return [t | {"cores_busy": float(np.median(b))}
                for t, b in zip(self.taken, self._busy, strict=True)]  # fmt: skip


def _in_turns(
    workers: Sequence[Worker],
    found: Sequence[dict[str, Any]],
    how: How,
    watch: conditions.Watch,
    track: Track,
) -> None:
    """Fill in samples and turns, how well the ratios are known, and why the turns ended."""
    count, runs = _plan([f.pop("call_ms") for f in found], how)
    turns = Turns(workers, runs, watch)
    began = time.perf_counter()
    turns.take(count, "timing", track)
    if how.within is None:
        for f, told in zip(found, turns.told(), strict=True):
            f |= told | {"stable": unstable(told["block_medians_ms"]) <= AGREE}
        return
    ended = _until_known(turns, how.within, how.seconds * len(workers), began, track)
    for f, told, wide in zip(found, turns.told(), turns.widths(), strict=True):
        stable = wide is None or wide <= how.within
        f |= told | {"within": how.within, "width": wide, "ended": ended, "stable": stable}


def _until_known(
    turns: Turns, within: float, cap_s: float, began: float, track: Track
) -> Literal["narrow", "cap"]:
    """Take turns until the ratios are known, or for `cap_s` since `began`; which of the two."""
    narrow = 0
    while True:
        widest = max(w for w in turns.widths() if w is not None)
        narrow = narrow + 1 if widest <= within else 0
        if narrow == LOOKS:
            return "narrow"
        spent = time.perf_counter() - began
        left = int((cap_s - spent) / spent * turns.count)  # turns, at the pace so far
        if left < 1:
            return "cap"
        what = f"timing on, ratios known within {widest:.1f} % ({within:g} % asked)"
        turns.take(min(left, max(1, turns.count // MORE)), what, track)


def _plan(call_ms: Sequence[float], how: How) -> tuple[int, list[int]]:
    """(turns of each file before the first look, calls of each in one turn)."""
    calls = [how.seconds * 1e3 / ms for ms in call_ms]
    if how.within is not None:
        calls = [min(c, how.enough) for c in calls]
    calls = [max(c, how.least) for c in calls]
    count = int(np.clip(min(calls) // CALLS, *TURNS))
    if how.within is None:
        count = max(count, math.ceil(how.seconds / TURN_S))
    return count, [math.ceil(c / count) for c in calls]


def _idle(
    workers: Sequence[Worker], found: Sequence[dict[str, Any]], how: How, track: Track
) -> None:
    """Single calls after a pause, as a bedside device is asked: nobody warms it up.

    One file after the other, so that the whole machine rests from one answer to the next question.
    """
    for f in found:
        f["idle_ms"] = {}
    for gap in how.idle_s:
        count = int(np.clip(PAUSED / gap, 1, 5))
        files = range(len(workers)) if gap <= LONG else [len(workers) - 1]
        asked = [i for i in files for _ in range(count)]
        for i in track(asked, f"after {gap:g} s of think time", len(asked)):
            calls = found[i]["idle_ms"].setdefault(f"{gap:g}", [])
            if not calls:  # it begins the first pause
                workers[i].ask(once=True)
            time.sleep(gap)
            calls.append(workers[i].ask(once=True)["ms"])


Where = tuple[str, str, int]


def _where(runner: Runner) -> Where:
    """What a peak depends on."""
    return runner.profile.runtime, runner.profile.device, runner.profile.threads


def _peaks(runners: Sequence[Runner], track: Track) -> dict[Where, Peak | None]:
    """What the machine reaches, in each runtime, while the workers sleep."""
    wanted = {_where(r): r.profile for r in runners}
    return {w: roofline.peak(p.runtime, p)
            for w, p in track(wanted.items(), "the machine's peaks", len(wanted))}  # fmt: skip


def _once_each(
    worker: Worker, runner: Runner, found: dict[str, Any], how: How, peak: Peak | None
) -> None:
    """What is not taken in turns. Memory comes first: until then it is that of single studies."""
    requests: list[dict[str, Any]] = [{"memory": True}]
    if how.throughput:
        requests.append({"throughput_s": how.seconds / 10, "batches": how.batches})
    if how.energy:
        requests.append({"energy_s": min(how.seconds, 3.0)})
    if how.stages:
        requests.append({"stages_s": how.seconds / 10})
    if how.layers:
        told = peak.model_dump(mode="json") if peak else None
        requests.append({"layers": how.layers, "peak": told})
    found["absent"] = {}
    for request in requests:
        answer = worker.ask(**request)
        found["absent"] |= answer.pop("absent", {})
        found |= answer
    found["roofline"] = _roofline(runner.artifact, found, peak)


def _roofline(artifact: Artifact, found: dict[str, Any], peak: Peak | None) -> Any:
    """How near the file comes to the machine's peak; None where that is not known."""
    if peak is None:
        return None
    return roofline.roofline(
        macs=artifact.macs, moved_bytes=roofline.moved_bytes(artifact),
        p50_ms=percentiles(found["samples_ms"])["p50"], precision=artifact.precision, peak=peak,
    )  # fmt: skip


def _cold(
    runners: Sequence[Runner], found: Sequence[dict[str, Any]], how: How, track: Track
) -> None:
    """Process start to the answer to one image file, of each in turns."""
    with tempfile.TemporaryDirectory() as folder:
        image, profile = Path(folder, "film.png"), Path(folder, "profile.json")
        write_atomic(image, film_bytes())
        for f in found:
            f["cold_ms"] = []
        todo = [i for _ in range(how.cold) for i in range(len(runners))]
        for i in track(todo, "cold starts", len(todo)):
            write_atomic(profile, runners[i].profile.model_dump_json())
            began = time.perf_counter()
            artifact = runners[i].artifact
            worker = Worker(artifact, str(artifact.folder.resolve()), str(profile), str(image))
            try:
                worker.answer()
                found[i]["cold_ms"].append((time.perf_counter() - began) * 1e3)
            finally:
                worker.close()


def _timing(
    runner: Runner,
    found: dict[str, Any],
    here: Machine,
    told: conditions.Conditions,
) -> Timing:
    """The record of one artifact from what its worker `found`."""
    artifact, profile, on_device = runner
    over = over_budget(
        profile.budget,
        p95_ms=percentiles(found["samples_ms"])["p95"],
        params=artifact.params,
        size_bytes=artifact.size_bytes,
        peak_mb=found["peak_mb"],
    )
    return Timing.model_validate(
        {
            "model": artifact.model,
            "role": artifact.role,
            "precision": artifact.precision,
            "artifact_sha256": artifact.sha256,
            "runtime": profile.runtime,
            "device": profile.device,
            "threads": profile.threads,
            "warmup": WARMUP,
            "params": artifact.params,
            "macs": artifact.macs,
            "size_bytes": artifact.size_bytes,
            "accuracy": artifact.metrics.get("test_balanced_accuracy"),
            "machine": here,
            "yardstick_threads": here.cores,
            "yardstick": YARDSTICK,
            "versions": versions("numpy", profile.runtime),
            "on_device": on_device,
            "budget": profile.budget,
            "over_budget": over,
            "conditions": told,
            "noise": conditions.noise(found["samples_ms"], found["block_medians_ms"], told),
        }
        | found
    )
