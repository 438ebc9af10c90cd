"""One stopwatch for every runtime; size, memory, and the machine it was measured on.

Each artifact gets a fresh process, since two runtimes in one process fight over threads, and since
peak memory can only be told of a process that did nothing else. The processes take turns (A B B A
A B ...), so that a machine that slows down for a while slows them all down.

A worker process reads requests from stdin and answers on stdout, one JSON object a line:
  {"folder", "profile", "seed"}         -> {"load_ms", "call_ms"}     always the first
  {"runs": n}                           -> {"samples_ms": [n]}
  {"throughput_batch": b, "seconds": s} -> {"peak_mb", "throughput_ips", "throughput_batch"}
It waits, asleep, for the next line, and ends with its stdin.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekd.records import (
    Artifact,
    Budget,
    EdgeKDError,
    Machine,
    Profile,
    RuntimeUnavailable,
    Timing,
    Track,
    make_folder,
    untracked,
    versions,
)
from edgekd.runtimes import Session, open_session

WARMUP = 5  # untimed calls before each block: the first after a pause take 1.5 times as long
BLOCKS = 8  # turns of each artifact
# Samples that a percentile asks for: from so many on the second slowest bounds it with 99 %
# confidence (MLPerf's early stopping).
ENOUGH = {50: 1, 90: 64, 95: 130, 99: 662}
UNAVAILABLE = 4  # exit code of a worker whose runtime or device is not here


def time_ms(call: Callable[[], object], *, warmup: int, runs: int) -> np.ndarray:
    """(runs,) float64 wall-clock milliseconds of `call`, after `warmup` untimed calls."""
    for _ in range(warmup):
        call()
    ticks = np.empty(runs + 1, np.int64)
    ticks[0] = time.perf_counter_ns()
    for i in range(runs):
        call()
        ticks[i + 1] = time.perf_counter_ns()
    return np.diff(ticks) / 1e6


def percentiles(samples_ms: Sequence[float] | np.ndarray) -> dict[str, float]:
    """p50, p90, p95 and p99 in ms, interpolated linearly."""
    return {f"p{q}": float(np.percentile(samples_ms, q)) for q in (50, 90, 95, 99)}


def claimed(samples_ms: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """`percentiles`, and None for those that these samples are too few to claim (`ENOUGH`)."""
    n = len(samples_ms)
    found = percentiles(samples_ms) if n else {}
    return {f"p{q}": found[f"p{q}"] if n >= least else None for q, least in ENOUGH.items()}


def interval(
    samples_ms: Sequence[float] | np.ndarray, q: float, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Bootstrap 95 % interval of percentile `q`, in ms.

    Draws runs of sqrt(n) neighbouring samples (the end joined to the start), not single ones:
    a slow moment lasts for several calls.
    """
    x = np.asarray(samples_ms, float)
    length = math.isqrt(len(x))
    starts = np.random.default_rng(seed).integers(
        len(x), size=(resamples, math.ceil(len(x) / length))
    )
    at = (starts[..., None] + np.arange(length)) % len(x)
    drawn = x[at.reshape(resamples, -1)[:, : len(x)]]
    low, high = np.percentile(np.percentile(drawn, q, axis=1), [2.5, 97.5])
    return float(low), float(high)


def unstable(block_medians_ms: Sequence[float] | np.ndarray) -> float:
    """How far apart the blocks are: (largest - smallest) / median of their medians."""
    return float(np.ptp(block_medians_ms) / np.median(block_medians_ms))


def ratio(
    blocks_ms: Sequence[float] | np.ndarray, others_ms: Sequence[float] | np.ndarray
) -> float:
    """How many times as long as the other, of medians of blocks that took turns: each beside the
    other of its turn. What slows a machine down for a while slows both, and their ratio stays; a
    median over all turns may fall in another of its speeds for the one than for the other.
    """
    return float(np.median(np.asarray(blocks_ms, float) / np.asarray(others_ms, float)))


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


def machine() -> Machine:
    """The machine we run on, as far as it can be read; nothing that tells whose it is."""
    cpu = _cpu_model()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\d+th gen|@.*", " ", cpu.lower())
    name = "-".join(re.findall(r"[a-z0-9.]+", words)[:2]) or "unknown"
    clocks = [float(c) for c in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"))]
    governed = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")  # kHz
    if not clocks and governed:
        clocks = [int(governed) / 1e3]
    gpus = [_field(str(p), "Model") for p in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return Machine(
        name=f"{name}-{cores}c",
        cpu=cpu,
        cores=cores,
        memory_gb=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        load_1min=round(os.getloadavg()[0], 2),
        clock_mhz=round(sum(clocks) / len(clocks)) if clocks else None,
        gpu=", ".join(gpus),
    )


def _cpu_model() -> str:
    """The processor's name, or the board's where (on ARM) only that is told."""
    board = _read("/proc/device-tree/model").strip("\0\n ")
    named = _field("/proc/cpuinfo", "model name") or board
    return named or platform.processor() or platform.machine()


def _field(path: str, key: str) -> str:
    """The value of the first line `key: value` of a file of the system; empty if there is none."""
    found = re.search(rf"^{key}\s*:\s*(.+?)\s*$", _read(path), re.MULTILINE)
    return found[1] if found else ""


def _read(path: str) -> str:
    """A small file of the system; empty where this system has none."""
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""


def peak_mb() -> float:
    """Peak resident memory of this process until now, in 1e6 bytes."""
    # Not ru_maxrss where it can be helped: Linux hands the parent's peak on to it through exec.
    peak = _field("/proc/self/status", "VmHWM")  # "455384 kB"
    if peak:
        return int(peak.split()[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class _Opened(NamedTuple):
    """An artifact that is ready to be timed."""

    artifact: Artifact
    profile: Profile
    session: Session  # of batch 1
    image: np.ndarray  # (1, 3, H, W) float32, normal noise
    load_ms: float  # importing the runtime included


def _open(folder: Path, profile: Profile, seed: int) -> _Opened:
    """Load the artifact in `folder` for one image at a time."""
    artifact = Artifact.load(folder)
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((1, 3, *artifact.spec.size), np.float32)
    started = time.perf_counter()
    session = open_session(artifact, profile, 1)
    return _Opened(artifact, profile, session, image, (time.perf_counter() - started) * 1e3)


def _samples(opened: _Opened, runs: int) -> np.ndarray:
    """(runs,) ms, host to host, one image a call."""
    return time_ms(lambda: opened.session(opened.image), warmup=WARMUP, runs=runs)


def _throughput(opened: _Opened, batch: int, seconds: float) -> dict[str, float]:
    """Peak memory of all until now, then images/s at `batch` (1 if the profile wants it static)."""
    peak = peak_mb()  # first: a bedside device answers one image at a time
    batch = 1 if opened.profile.static_batch else batch
    session = open_session(opened.artifact, opened.profile, batch)
    images = np.repeat(opened.image, batch, axis=0)
    once = time_ms(lambda: session(images), warmup=1, runs=1)[0]  # ms
    runs = int(np.clip(seconds * 1e3 / once, 3, 1000))
    ms = np.median(time_ms(lambda: session(images), warmup=0, runs=runs))
    return {"peak_mb": peak, "throughput_ips": batch * 1e3 / ms, "throughput_batch": batch}


def measure(
    folder: Path,
    profile: Profile,
    *,
    runs: int = 200,
    throughput_batch: int = 16,
    seconds: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """What a worker measures, in this process and in one block; for a process made for it.

    Keys as in Timing: samples_ms, load_ms, peak_mb, throughput_ips, throughput_batch.
    """
    opened = _open(folder, profile, seed)
    samples = _samples(opened, runs)
    result = {"samples_ms": samples.tolist(), "load_ms": opened.load_ms}
    return result | _throughput(opened, throughput_batch, seconds)


def worker(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Serve the requests described at the top of this file until there are no more."""
    opened = None
    for line in requests:
        request = json.loads(line)
        if opened is None:
            profile = Profile.model_validate(request["profile"])
            opened = _open(Path(request["folder"]), profile, request["seed"])
            call_ms = float(np.median(_samples(opened, 3)))
            answer({"load_ms": opened.load_ms, "call_ms": call_ms})
        elif "runs" in request:
            answer({"samples_ms": _samples(opened, request["runs"]).tolist()})
        else:
            answer(_throughput(opened, request["throughput_batch"], request["seconds"]))


class _Worker:
    """A worker process of one artifact, as its parent sees it."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 closed in `close`; a pipe could fill up
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), root) if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgekd.bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; EdgeKDError with its last words if it died."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None  # pipes, both
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
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


def bench(
    artifacts: Sequence[Artifact],
    profile: Profile,
    out: Path,
    *,
    seconds: float = 5.0,
    min_samples: int = 200,
    throughput_batch: int = 16,
    on_device: bool,
    seed: int = 0,
    track: Track = untracked,
) -> list[Timing]:
    """Time every artifact on `profile`'s runtime; each Timing goes to `out`/<its folder's name>.

    Each gets at least `min_samples` calls and `seconds` of them, warm-up not counted.
    """
    names = [a.folder.name for a in artifacts]
    if twice := [n for n in names if names.count(n) > 1]:
        raise EdgeKDError(f"two artifacts are called {twice[0]}: rename one of their folders")
    folders = [make_folder(out / name) for name in names]
    here = machine()  # before our own load
    workers: list[_Worker] = []
    try:
        for artifact in artifacts:
            workers.append(_Worker(artifact))
        answers = _take_turns(workers, profile, seconds, min_samples, seed, track)
        timings = []
        for w, found in zip(workers, answers, strict=True):
            found |= w.ask(throughput_batch=throughput_batch, seconds=seconds / 5)
            timings.append(_timing(w.artifact, profile, found, here, on_device))
    finally:
        for w in workers:
            w.close()
    return [t.save(folder) for t, folder in zip(timings, folders, strict=True)]


def in_rounds(
    artifacts: Sequence[Artifact],
    profile: Profile,
    out: Path,
    *,
    rounds: int,
    seed: int = 0,
    **given: Any,
) -> list[Timing]:
    """`bench` so many times, each with processes of its own, in `out`/0, `out`/1 and so on.

    Of each artifact all samples and turns, the rest of the first. given: to `bench`, as it is.
    """
    found = [bench(artifacts, profile, out / str(i), seed=seed + i, **given) for i in range(rounds)]
    return [
        one[0].model_copy(
            update={
                "samples_ms": tuple(x for t in one for x in t.samples_ms),
                "block_medians_ms": tuple(x for t in one for x in t.block_medians_ms),
            }
        )
        for one in zip(*found, strict=True)
    ]


def _take_turns(
    workers: Sequence[_Worker],
    profile: Profile,
    seconds: float,
    min_samples: int,
    seed: int,
    track: Track,
) -> list[dict[str, Any]]:
    """load_ms, samples_ms and block_medians_ms of each worker; one works, the others sleep."""
    answers: list[dict[str, Any]] = []
    runs = []  # of each worker in one block
    for w in workers:
        folder = str(w.artifact.folder.resolve())
        opened = w.ask(folder=folder, profile=profile.model_dump(mode="json"), seed=seed)
        wanted = max(min_samples, seconds * 1e3 / opened.pop("call_ms"))
        runs.append(math.ceil(wanted / BLOCKS))
        answers.append(opened | {"samples_ms": [], "block_medians_ms": []})
    order = list(range(len(workers)))
    turns = [i for block in range(BLOCKS) for i in (order[::-1] if block % 2 else order)]
    for i in track(turns, "timing", len(turns)):
        block = workers[i].ask(runs=runs[i])["samples_ms"]
        answers[i]["samples_ms"] += block
        answers[i]["block_medians_ms"].append(float(np.median(block)))
    return answers


def _timing(
    artifact: Artifact, profile: Profile, found: dict[str, Any], here: Machine, on_device: bool
) -> Timing:
    """The record of one artifact from what its worker `found`."""
    over = over_budget(
        profile.budget,
        p95_ms=percentiles(found["samples_ms"])["p95"],
        params=artifact.params,
        size_bytes=artifact.size_bytes,
        peak_mb=found["peak_mb"],
    )
    return Timing(
        model=artifact.model,
        role=artifact.role,
        precision=artifact.precision,
        artifact_sha256=artifact.sha256,
        runtime=profile.runtime,
        device=profile.device,
        threads=profile.threads,
        warmup=WARMUP,
        params=artifact.params,
        macs=artifact.macs,
        size_bytes=artifact.size_bytes,
        accuracy=artifact.metrics.get("test_balanced_accuracy"),
        machine=here,
        versions=versions("numpy", profile.runtime),
        on_device=on_device,
        budget=profile.budget,
        over_budget=over,
        **found,
    )


def _main() -> int:
    """Serve stdin as a worker; the exit code."""
    # Libraries print: what they say on stdout goes to stderr, and the answers keep their own line.
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)

        def answer(result: dict[str, Any]) -> None:
            stdout.write(json.dumps(result) + "\n")
            stdout.flush()

        try:
            worker(sys.stdin, answer)
        except EdgeKDError as e:
            sys.stderr.write(f"{e}\n")
            return UNAVAILABLE if isinstance(e, RuntimeUnavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
