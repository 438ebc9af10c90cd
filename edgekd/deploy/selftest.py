"""Does a bundle that was unpacked here answer, explain and hurry as it has to? Asked on the device.

`edgekd deploy` runs it in a process of its own, with the source and the Python that will serve:
what breaks the runtime then breaks no deployment. It needs no torch.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import runtimes
from edgekd.bench.stopwatch import settle, time_ms
from edgekd.bundle import bundle
from edgekd.data import preprocess
from edgekd.explain import fidelity, score_cam
from edgekd.export.on_device import build_artifact
from edgekd.metrics.latency import ENOUGH
from edgekd.records import Artifact, EdgeKDError, Profile, Record, RuntimeUnavailable
from edgekd.remote import protocol
from edgekd.runtimes import golden

# Pearson's r of a golden sample's map with the one in the bundle, at least. Other kernels round
# otherwise; another model, layer or preparation is far below (strangers' maps: 0.1 to 0.7).
LIKE = {"fp32": 0.99, "fp16": 0.98, "bf16": 0.95, "int8": 0.9}
ATTEMPTS = 3  # at the latency: the version that is running takes its share
SECONDS = 20.0  # of calls for one of them


class SelfTest(Record):
    """What a device found. An instance is a test that was passed."""

    runtime: str
    device: str
    built: bool  # the file was made on the device
    load_ms: float
    logits: float | None  # as golden.Verified
    features: float | None
    tolerance: float
    maps: tuple[float | None, ...]  # r of each golden sample's; None: undefined, as it has to be
    least: float  # r that is asked for
    p50_ms: float
    p95_ms: float | None  # None: too slow for as many calls as it takes
    calls: int
    budget_ms: float | None  # of the profile; None: it states none


def run(folder: Path) -> SelfTest:
    """The test of a bundle that is unpacked in `folder`; EdgeKDError, in one line, if it fails.

    RuntimeUnavailable if the profile's runtime or device is not here.
    """
    profile = bundle.Manifest.load(folder).profile
    if not runtimes.here(profile):
        seen = ", ".join(runtimes.get(profile.runtime).devices()) or "none at all"
        raise RuntimeUnavailable(f"{profile.runtime} has no device {profile.device}, only {seen}")
    if not (folder / bundle.BUILT).exists():
        build(folder, profile)
    artifact = bundle.loaded(folder)
    started = time.perf_counter()
    session = runtimes.open_session(artifact, profile)
    load_ms = 1e3 * (time.perf_counter() - started)
    said = golden.verify(artifact, session, profile.runtime, profile.device)
    if not said.ok:
        errors = ["NaN" if x is None else f"{x:.2g}" for x in (said.logits, said.features)]
        raise EdgeKDError(
            f"golden samples are answered otherwise: logits by {errors[0]}, features by "
            f"{errors[1]} of the largest ({said.tolerance:g} allowed), {said.predictions} other "
            "predictions"
        )
    least = LIKE[artifact.precision]
    maps = _maps(folder / bundle.EXPECTED, artifact, session, least)
    calls = _latency(artifact, profile)
    enough = len(calls) >= ENOUGH[95]
    return SelfTest(
        runtime=profile.runtime,
        device=profile.device,
        built=artifact.folder.name == bundle.BUILT,
        load_ms=load_ms,
        logits=said.logits,
        features=said.features,
        tolerance=said.tolerance,
        maps=maps,
        least=least,
        p50_ms=float(np.median(calls)),
        p95_ms=float(np.percentile(calls, 95)) if enough else None,
        calls=len(calls),
        budget_ms=profile.budget.latency_ms,
    )


def build(folder: Path, profile: Profile) -> None:
    """Make what this device loads, where the bundle cannot have it.

    It is made of ONNX in the model's own precision, or not at all.
    """
    runtime = runtimes.get(profile.runtime)
    model = Artifact.load(folder / "model")
    if not runtimes.must_be_built(model, profile):
        return
    source = bundle.source_of(model)
    if source is None:
        if model.path.suffix in runtime.SUFFIXES:
            return  # made for this very GPU, or opening it says what it was made for
        raise EdgeKDError(
            f"{profile.runtime} does not load {model.path.name}, and the bundle has no ONNX file "
            f"in {model.precision} to build from: bundle the ONNX file itself"
        )
    out = folder / bundle.BUILT
    half = folder / f".{bundle.BUILT}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    shutil.copy(model.folder / golden.FILE, half / golden.FILE)
    build_artifact(model, source, profile, half, golden.FILE)
    for path in (half, *half.iterdir()):  # `bundle.loaded` refuses what others can write to
        path.chmod(path.stat().st_mode & ~0o022)
    half.rename(out)


def _maps(
    expected: Path, artifact: Artifact, session: runtimes.Session, least: float
) -> tuple[float | None, ...]:
    """Pearson's r of each golden sample's map with the one that it has to be."""
    kept = golden.read(artifact)
    try:
        with np.load(expected, allow_pickle=False) as stored:
            maps, answers = stored["maps"], stored["answers"]
    except (OSError, ValueError, KeyError) as e:
        raise EdgeKDError(f"{expected.name} holds no maps: {' '.join(str(e).split())}") from None
    if len(maps) != len(kept.pixels) or len(answers) != len(maps):
        raise EdgeKDError(f"{expected.name} has {len(maps)} maps of {len(kept.pixels)} samples")
    images = preprocess.normalise(kept.pixels, artifact.spec)
    found: list[float | None] = []
    for i, (image, label) in enumerate(zip(images, answers, strict=True)):
        now = score_cam.score_cam(session, image, int(label)).map
        then = None if np.isnan(maps[i]).all() else maps[i]
        if now is None and then is None:
            found.append(None)
            continue
        r = alike(now, then)
        if not r >= least:
            raise EdgeKDError(
                f"golden sample {i} is explained otherwise: its map has r = {r:.3f} with the "
                f"bundle's, {least:g} is needed"
            )
        found.append(r)
    return tuple(found)


def alike(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Pearson's r of two maps; nan where there is none, or only one. Two flat ones are alike."""
    if a is None or b is None or a.shape != b.shape:
        return float("nan")
    if not np.ptp(a) and not np.ptp(b):
        return 1.0
    r = fidelity.pearson(a, b)
    return float("nan") if r is None else r


def _latency(artifact: Artifact, profile: Profile) -> np.ndarray:
    """Times of calls with one image, ms; EdgeKDError if p95 is over the budget at each attempt.

    Where a model is too slow for as many calls as p95 takes, the median is judged.
    """
    session = runtimes.open_session(artifact, profile, 1)
    height, width = artifact.spec.size
    image = np.random.default_rng(0).standard_normal((1, 3, height, width), np.float32)
    limit = profile.budget.latency_ms
    worst = []
    for _ in range(ATTEMPTS):
        once = float(np.median(settle(lambda: session(image))))
        runs = int(np.clip(SECONDS * 1e3 / once, 10, ENOUGH[95]))
        calls = time_ms(lambda: session(image), warmup=0, runs=runs)
        q, name = (95, "p95") if len(calls) >= ENOUGH[95] else (50, "the median")
        judged = float(np.percentile(calls, q))
        if limit is None or judged <= limit:
            return calls
        worst.append(judged)
    raise EdgeKDError(
        f"too slow: {name} {min(worst):.3g} ms at the best of {ATTEMPTS} attempts, the budget of "
        f"profile {profile.name} is {limit:g} ms"
    )


def _answer(line: bytes, _: protocol.Say) -> dict[str, Any]:
    """The test of the folder that stdin names, as JSON."""
    return run(Path(json.loads(line))).model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(protocol.answer(_answer, EdgeKDError, (RuntimeUnavailable,)))
