"""A latency table of the device that this runs on: every piece of a space, and whole sub-nets.

All are graphs with meaningless weights (`standin`), timed in the profile's runtime, precision and
threads, in turns, in a process of their own. Of a piece the fastest call of all turns counts, of a
sub-net the median of its calmest turn, since what slows a machine for a while only ever adds.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

from edgekd import runtimes
from edgekd.bench.stopwatch import time_ms
from edgekd.bench.worker import UNAVAILABLE
from edgekd.ofa import latency_table, proxy_graphs, spaces
from edgekd.records import (
    Arch,
    EdgeKDError,
    Journal,
    Profile,
    RuntimeUnavailable,
    Track,
    make_folder,
    untracked,
    versions,
)
from edgekd.runtimes import machine

ROUNDS = 12  # turns of everything
CALLS_MS = 4.0  # a piece is called for as long in a turn, at least 4 times
SETTLED_MS = 10.0  # a sub-net likewise, after as long uncounted: threads that slept are slow
NETS = 120  # whole sub-nets, to learn what the sum gets wrong
LOG = "rounds.jsonl"


def calibrate(
    profile: Profile,
    precision: str,
    out: Path,
    *,
    classes: int,
    nets: int = NETS,
    rounds: int = ROUNDS,
    seed: int = 0,
    track: Track = untracked,
) -> latency_table.Table:
    """Measure the profile's space on its device; the table in folder `out`.

    Every finished turn is kept, so that a calibration that was stopped goes on. Raises
    RuntimeUnavailable where the profile's runtime or device is not here.
    """
    _check_here(profile)
    make_folder(out)
    pieces = latency_table.distinct(profile.space, profile.resolutions, classes)
    archs = _whole(profile, nets, seed)
    titles = [spaces.title(a) for a in archs]
    turns = _turns(profile, precision, classes, nets, seed, rounds, out, track)
    alone = {n: round(min(turn["min"][n] for turn in turns), 6) for n in pieces}
    whole = np.array([min(turn["p50"][t] for turn in turns) for t in titles])
    slow = np.median([turn["p95"] for turn in turns])
    table = latency_table.Table(
        space=profile.space, resolutions=tuple(sorted(profile.resolutions)), classes=classes,
        runtime=profile.runtime, device=profile.device, precision=precision,
        threads=profile.threads, estimated=False, pieces=alone, p95_ratio=float(slow),
        nets=dict(zip(titles, whole.round(6).tolist(), strict=True)),
        machine=machine.this(), versions=versions("numpy", profile.runtime),
        created=date.today().isoformat(),
    )  # fmt: skip
    table = latency_table.fitted(table, archs, whole)
    table.save(out)
    (out / LOG).unlink(missing_ok=True)
    return table


def _check_here(profile: Profile) -> None:
    devices = runtimes.get(profile.runtime).devices()
    if profile.device not in devices:
        raise RuntimeUnavailable(
            f"{profile.runtime} sees no device {profile.device} here, only {', '.join(devices)}: "
            "calibrate on the device (edgekd profiles calibrate --export), or use --estimate"
        )


def _whole(profile: Profile, count: int, seed: int) -> list[Arch]:
    """Whole sub-nets to time: the ends at each resolution, then random ones."""
    rng = random.Random(f"latency {seed}")
    sides = sorted(profile.resolutions)
    ends = [spaces.uniform(profile.space, e, r) for r in sides for e in ("min", "max")]
    found = {spaces.title(a): a for a in ends[:count]}
    while len(found) < count:
        arch = spaces.canonical(spaces.sample(profile.space, rng, sides))
        found[spaces.title(arch)] = arch
    return list(found.values())


def _turns(
    profile: Profile,
    precision: str,
    classes: int,
    nets: int,
    seed: int,
    rounds: int,
    out: Path,
    track: Track,
) -> list[dict]:
    """The turns that are there, and those that a worker process adds."""
    asked = {"profile": profile.model_dump(mode="json"), "precision": precision,
             "classes": classes, "nets": nets, "seed": seed, "rounds": rounds}  # fmt: skip
    journal = Journal(out / LOG, asked)
    left = rounds - len(journal.done)
    if left > 0:
        what = f"measuring {profile.space} in {profile.runtime} {precision}"
        for line in track(_worker(asked | {"first": len(journal.done)}), what, left):
            journal.add(json.loads(line))
    return journal.done


def _worker(request: dict) -> Iterator[str]:
    """One line of JSON a turn, from a process that does nothing else."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), root) if p)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgekd.ofa.calibrate", json.dumps(request)],
            stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield line.strip()
            if code := process.wait():
                errors.seek(0)
                words = errors.read().decode("utf-8", "replace").strip().splitlines()
                error = RuntimeUnavailable if code == UNAVAILABLE else EdgeKDError
                raise error(f"measuring failed: {words[-1] if words else f'exit code {code}'}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def measure(request: dict) -> Iterator[dict]:
    """Turn after turn: the fastest ms of each piece; medians of sub-nets, and p95 to those."""
    profile = Profile.model_validate(request["profile"])
    precision, classes = request["precision"], request["classes"]
    pieces = latency_table.distinct(profile.space, profile.resolutions, classes)
    archs = _whole(profile, request["nets"], request["seed"])
    graphs = {n: (proxy_graphs.piece(p, precision), (p.cin, p.size)) for n, p in pieces.items()}
    graphs |= {
        spaces.title(a): (proxy_graphs.network(a, classes, precision), (3, a.resolution))
        for a in archs
    }
    runtime = runtimes.get(profile.runtime)
    rng = np.random.default_rng(0)
    calls: dict[str, tuple[runtimes.Session, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (graph, (channels, side)) in graphs.items():
            path = Path(folder) / f"{len(calls)}.onnx"
            path.write_bytes(graph)
            session = runtime.load(path, profile, precision, 1)
            image = rng.standard_normal((1, channels, side, side)).astype(np.float32)
            calls[name] = (session, image)
        order = list(calls)
        for number in range(request["first"], request["rounds"]):
            np.random.default_rng((request["seed"], number)).shuffle(order)
            fastest, p50, p95 = {}, {}, []
            for name in order:
                session, image = calls[name]
                ms = _times(session, image, settled=name not in pieces)
                if name in pieces:
                    fastest[name] = float(ms.min())
                else:
                    p50[name] = float(np.median(ms))
                    p95.append(np.percentile(ms, 95) / p50[name])
            yield {"min": fastest, "p50": p50, "p95": float(np.median(p95))}


def _times(session: runtimes.Session, image: np.ndarray, *, settled: bool) -> np.ndarray:
    """(n,) ms of calls in a row, after two that are not counted, or after more if `settled`."""

    def call() -> object:
        return session(image)

    once = time_ms(call, warmup=1, runs=1)[0]
    length, least, most = (SETTLED_MS, 5, 25) if settled else (CALLS_MS, 4, 50)
    runs = int(np.clip(math.ceil(length / once), least, most))
    return time_ms(call, warmup=runs if settled else 1, runs=runs)


def _main() -> int:
    """Serve one request as a worker; the exit code."""
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # libraries print
        try:
            for turn in measure(json.loads(sys.argv[1])):
                stdout.write(json.dumps(turn) + "\n")
                stdout.flush()
        except EdgeKDError as e:
            sys.stderr.write(f"{e}\n")
            return UNAVAILABLE if isinstance(e, RuntimeUnavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
