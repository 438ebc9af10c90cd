"""The process that measures one file, made for nothing else: `python -m edgekd.bench.worker`.

It reads requests from stdin and answers on stdout, one JSON object a line:
  {"folder", "profile", "seed"}  -> {"load_ms", "first_ms", "resident_mb", "call_ms"}, always first
  {"runs": n}                    -> {"samples_ms": [n], "cores_busy", "yardstick_ms"}
  {"once": true}                 -> {"ms"}: one call, at once, after whatever pause
  {"memory": true}               -> {"peak_mb"}, of all until now
  {"throughput_s", "batches"}    -> {"throughput_ips", ..._batch, ..._hint, "absent"}
  {"stages_s"}                   -> {"prepare_ms", "whole_ms", "explain_ms"}
  {"energy_s"}                   -> {"energy": an Energy or null, "absent": why it is}
  {"layers": calls, "peak"}      -> {"layers", "executed"}
It waits, asleep, for the next line, and ends with its stdin.

`python -m edgekd.bench.worker FOLDER PROFILE.json IMAGE` answers one image file and ends: a cold
start.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekd import runtimes
from edgekd.bench import energy, roofline
from edgekd.bench.stopwatch import settle, time_ms, yardstick
from edgekd.records import Artifact, EdgeKDError, Peak, Profile, RuntimeUnavailable
from edgekd.runtimes import Session, machine, open_session

WARMUP = 5  # untimed calls before each block: the first after a pause take 1.5 times as long
FILM = 1024  # pixels a side of the image file that is prepared
UNAVAILABLE = 4  # exit code where the runtime or device is not here


class Opened(NamedTuple):
    """An artifact that is ready to be timed."""

    artifact: Artifact
    profile: Profile
    session: Session  # of batch 1
    image: np.ndarray  # (1, 3, H, W) float32, normal noise
    load_ms: float  # importing the runtime included
    first_ms: float


def open_file(folder: Path, profile: Profile, seed: int) -> Opened:
    """Load the artifact in `folder` for one image at a time, and ask it once."""
    artifact = Artifact.load(folder)
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((1, 3, *artifact.spec.size), np.float32)
    started = time.perf_counter()
    session = open_session(artifact, profile, 1)
    load_ms = (time.perf_counter() - started) * 1e3
    first_ms = time_ms(lambda: session(image), warmup=0, runs=1)[0]
    return Opened(artifact, profile, session, image, load_ms, float(first_ms))


def samples(opened: Opened, runs: int) -> dict[str, Any]:
    """Times in ms of `runs` calls, host to host, one image each; and how many cores that kept busy.

    The latter reads back how many threads a runtime really uses, whatever it was asked for.
    """
    time_ms(lambda: opened.session(opened.image), warmup=WARMUP, runs=0)
    used = time.process_time()
    ms = time_ms(lambda: opened.session(opened.image), warmup=0, runs=runs)
    busy = (time.process_time() - used) * 1e3 / float(ms.sum())
    return {"samples_ms": ms.tolist(), "cores_busy": busy}


def throughput(opened: Opened, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """Images/s at the best of the ways to ask for many.

    Each of `batches` at a time; and the largest in streams, where the runtime has them.
    """
    most = max(batches)
    alone = opened.profile.static_batch
    ways: list[tuple[str, int | None]] = [("latency", 1 if alone else n) for n in batches]
    if hasattr(runtimes.get(opened.profile.runtime), "in_streams"):
        ways.append(("throughput", None))
    ways = list(dict.fromkeys(ways))
    best: dict[str, Any] = {"throughput_ips": 0.0}
    absent = {}
    for hint, batch in ways:
        profile = opened.profile.model_copy(update={"hint": hint})
        try:
            session = open_session(opened.artifact, profile, batch)
        except runtimes.StreamsDiffer as e:  # fast, and wrong
            absent["throughput in streams"] = str(e)
            continue
        images = np.repeat(opened.image, batch or most, axis=0)
        call = partial(session, images)
        once = time_ms(call, warmup=1, runs=1)[0]
        runs = int(np.clip(seconds * 1e3 / len(ways) / once, 3, 1000))
        ms = np.median(time_ms(call, warmup=0, runs=runs))
        if (found := len(images) * 1e3 / ms) > best["throughput_ips"]:
            best = {"throughput_ips": float(found), "throughput_batch": len(images),
                    "throughput_hint": hint}  # fmt: skip
    return best | {"absent": absent}


def stages(opened: Opened, seconds: float) -> dict[str, list[float]]:
    """Times, in ms: an image file prepared; all from its bytes to an answer; a Score-CAM map."""
    from edgekd.data import preprocess
    from edgekd.explain import score_cam
    from edgekd.metrics.calibration import probabilities

    spec, film = opened.artifact.spec, film_bytes()
    streams, _ = runtimes.open_streams(opened.artifact, opened.profile)  # as `edgekd explain` asks

    def prepare() -> np.ndarray:
        return preprocess.prepare(film, spec)[None]

    def whole() -> np.ndarray:
        return probabilities(opened.session(prepare()).logits, opened.artifact)

    def explained() -> object:
        return score_cam.score_cam(streams, opened.image[0], 0)

    return {name: _for(call, seconds).tolist() for name, call in
            (("prepare_ms", prepare), ("whole_ms", whole), ("explain_ms", explained))}  # fmt: skip


def _for(call: Callable[[], object], seconds: float) -> np.ndarray:
    """Times, in ms, of as many calls as take about `seconds`, at least 3 and at most 200."""
    once = max(time_ms(call, warmup=1, runs=1)[0], 1e-3)  # a clock's tick
    return time_ms(call, warmup=0, runs=int(np.clip(seconds * 1e3 / once, 3, 200)))


def film_bytes() -> bytes:
    """A grey PNG of FILM x FILM pixels, 8 bits, as smooth and as noisy as a film: the same always.

    Nobody's: it is made here.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(40, 216, (16, 16), np.uint8))
    smooth = np.asarray(coarse.resize((FILM, FILM), Image.Resampling.BICUBIC), float)
    grey = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


def spent(opened: Opened, seconds: float) -> dict[str, Any]:
    """What an image takes of the machine's energy, if it tells."""
    try:
        meter = energy.meter(opened.profile.device)
        if meter is None:
            return {"energy": None, "absent": {"energy": "this machine has no meter"}}
        with contextlib.closing(meter):
            found = energy.per_image(meter, lambda: opened.session(opened.image), seconds)
    except RuntimeUnavailable as e:  # it has one that cannot be read: that is no reason to stop
        return {"energy": None, "absent": {"energy": str(e)}}
    return {"energy": found.model_dump(mode="json"), "absent": {}}


def layers(opened: Opened, calls: int, peak: Peak | None) -> dict[str, Any]:
    """The slowest layers, and the precision that most of the time is spent in."""
    found, executed = roofline.layers(
        opened.artifact, opened.profile, opened.image, calls=calls, peak=peak
    )
    return {"layers": [x.model_dump(mode="json") for x in found], "executed": executed}


def serve(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Serve the requests described at the top of this file until there are no more."""
    opened = None
    for line in requests:
        request = json.loads(line)
        if opened is None:
            profile = Profile.model_validate(request["profile"])
            opened = open_file(Path(request["folder"]), profile, request["seed"])
            told = {"load_ms": opened.load_ms, "first_ms": opened.first_ms,
                    "resident_mb": machine.resident_mb()}  # fmt: skip
            last = settle(partial(opened.session, opened.image))
            answer(told | {"call_ms": float(np.median(last))})
        else:
            answer(_answered(opened, request))


def _answered(opened: Opened, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to any but the first request."""
    if "runs" in request:
        return samples(opened, request["runs"]) | {"yardstick_ms": yardstick(machine.cores())}
    if "once" in request:
        return {"ms": float(time_ms(lambda: opened.session(opened.image), warmup=0, runs=1)[0])}
    if "memory" in request:
        return {"peak_mb": machine.peak_mb()}
    if "throughput_s" in request:
        return throughput(opened, request["batches"], request["throughput_s"])
    if "stages_s" in request:
        return dict(stages(opened, request["stages_s"]))
    if "energy_s" in request:
        return spent(opened, request["energy_s"])
    if "layers" in request:
        peak = request["peak"] and Peak.model_validate(request["peak"])
        return layers(opened, request["layers"], peak)
    raise ValueError(f"no such request: {sorted(request)}")


def cold(folder: Path, profile: Profile, image: Path) -> np.ndarray:
    """(1, K) calibrated probabilities of one image file: all that a cold start is."""
    from edgekd.data import preprocess
    from edgekd.metrics.calibration import probabilities

    artifact = Artifact.load(folder)
    session = open_session(artifact, profile, 1)
    return probabilities(session(preprocess.prepare(image, artifact.spec)[None]).logits, artifact)


def main(arguments: list[str]) -> int:
    """Serve stdin, or answer one image; the exit code."""
    # Libraries print: what they say on stdout goes to stderr, and the answers keep their own line.
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)

        def answer(result: dict[str, Any]) -> None:
            stdout.write(json.dumps(result) + "\n")
            stdout.flush()

        try:
            if arguments:
                folder, profile, image = map(Path, arguments)
                known = Profile.model_validate_json(profile.read_text("utf-8"))
                answer({"probabilities": cold(folder, known, image).tolist()})
            else:
                serve(sys.stdin, answer)
        except EdgeKDError as e:
            sys.stderr.write(f"{e}\n")
            return UNAVAILABLE if isinstance(e, RuntimeUnavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
