"""How well does a latency table predict networks that it has not seen?

    python benchmarks/latency_prediction.py [--quick] [--runs DIR] [--threads N]

50 random sub-nets of the cpu profile's space are made as they would be deployed (SubNet -> ONNX ->
NNCF), timed in OpenVINO in FP32 and INT8, and predicted. The tables are calibrated first, by the
same code that a user runs, if DIR has none. About 30 minutes, most of them for making the files.
Interrupted, it goes on where it stopped; --quick (4 sub-nets, a small calibration) shows that it
works and writes no result file. The plain sum is Once-for-All's: pieces timed alone, added up.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from workbench import RUNS, arguments, keep

from edgekd import runtimes
from edgekd.bench.stopwatch import time_ms
from edgekd.ofa import calibrate, latency_table, spaces
from edgekd.ofa.latency_table import Table
from edgekd.records import Arch, Artifact, Profile, make_folder, write_atomic

CLASSES = ("a", "b", "c")
PRECISIONS = ("fp32", "int8")
TURN_MS = 40.0  # of timed calls of a sub-net in a turn


def shown(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """Progress on stderr, ten lines in all."""
    for i, item in enumerate(items):
        if total and i * 10 // total > (i - 1) * 10 // total:
            print(f"{what}: {i} of {total}", file=sys.stderr, flush=True)
        yield item


def table_of(profile: Profile, precision: str, runs: Path, quick: bool) -> tuple[Table, float]:
    """The calibrated table, and the seconds that it took."""
    folder = runs / f"table-{precision}"
    clock = folder / "seconds.json"
    if not clock.exists():
        few = {"nets": 12, "rounds": 2} if quick else {}
        start = time.perf_counter()
        calibrate.calibrate(profile, precision, folder, classes=len(CLASSES), track=shown, **few)
        write_atomic(clock, json.dumps(time.perf_counter() - start))
    return Table.load(folder), float(json.loads(clock.read_text("utf-8")))


def unseen(profile: Profile, count: int, tables: Sequence[Table]) -> list[Arch]:
    """`count` random members of the profile's space that no table was fitted to."""
    rng, found = random.Random("latency_prediction"), {}
    while len(found) < count:
        arch = spaces.canonical(spaces.sample(profile.space, rng, profile.resolutions))
        if not any(spaces.title(arch) in t.nets for t in tables):
            found[spaces.title(arch)] = arch
    return list(found.values())


def make(arch: Arch, folder: Path) -> None:
    """The deployed files of `arch` with random weights: `folder`/<title>-fp32 and -int8."""
    name = folder / spaces.title(arch)
    if (Path(f"{name}-int8") / Artifact.FILE).exists():
        return
    import torch

    from edgekd.ofa import supernet
    from edgekd.pipeline import trial
    from edgekd.records import Spec

    torch.manual_seed(0)
    side = arch.resolution
    images = np.random.default_rng(0).standard_normal((8, 3, side, side), np.float32)
    net = supernet.build(arch, len(CLASSES)).eval()
    # As in a trained network, or NNCF sees activations that are all but zero.
    supernet.recalibrate(net, [torch.from_numpy(images)])
    spec = Spec(classes=CLASSES, size=(side, side))
    trial.deployed(net, arch, spec, "int8", images, folder)


def timed(folders: Sequence[Path], profile: Profile, rounds: int) -> list[dict[str, float]]:
    """p50_ms and p95_ms of each, for a process of its own; in another order in each round.

    p50_ms is the median of the calmest round: what else a machine does only adds.
    """
    calls = []
    for folder in folders:
        artifact = Artifact.load(folder)
        image = np.random.default_rng(1).standard_normal((1, 3, *artifact.spec.size), np.float32)
        calls.append((runtimes.open_session(artifact, profile, 1), image))
    p50, p95 = np.zeros((2, rounds, len(calls)))
    order = list(range(len(calls)))
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for i in order:
            session, image = calls[i]
            once = time_ms(lambda s=session, x=image: s(x), warmup=3, runs=3).min()
            runs = int(np.clip(TURN_MS / once, 15, 100))
            ms = time_ms(lambda s=session, x=image: s(x), warmup=2, runs=runs)
            p50[turn, i], p95[turn, i] = np.percentile(ms, [50, 95])
    calmest = p50.min(0), p95.min(0)
    return [{"p50_ms": float(a), "p95_ms": float(b)} for a, b in zip(*calmest, strict=True)]


def in_own_process(folders: Sequence[Path], profile: Profile, rounds: int) -> list[dict]:
    """`timed` where nothing else was loaded."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(timed, folders, profile, rounds).result()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--threads", type=int, help="instead of the profile's own")
    given = parser.parse_args()
    name = "latency-quick" if given.quick else "latency"
    runs = make_folder(given.runs or RUNS / name)
    profile = Profile.read("cpu")
    if given.threads is not None:
        profile = profile.model_copy(update={"threads": given.threads})
    tables, took = {}, {}
    for precision in PRECISIONS:
        tables[precision], took[precision] = table_of(profile, precision, runs, given.quick)
    archs = unseen(profile, 4 if given.quick else 50, list(tables.values()))
    for arch in shown(archs, "making sub-nets", len(archs)):
        make(arch, runs)
    found: dict[str, float] = {}
    rows = [{"arch": spaces.title(a)} for a in archs]
    for precision, table in tables.items():
        folders = [runs / f"{spaces.title(a)}-{precision}" for a in archs]
        times = in_own_process(folders, profile, 2 if given.quick else 16)
        measured = np.array([t["p50_ms"] for t in times])
        predicted = table.predict(archs)
        error = latency_table.errors(predicted, measured)
        plain = table.model_copy(update={"scale": 1.0, "constant_ms": 0.0, "correction": {}})
        found |= {
            f"mape_{precision}": error.mape,
            f"kendall_{precision}": error.kendall,
            f"within10_{precision}": error.within10,
            f"calibrate_s_{precision}": took[precision],
            f"bias_{precision}": 100 * float(np.mean(predicted / measured - 1)),
            f"mape_plain_sum_{precision}": latency_table.errors(
                plain.predict(archs), measured
            ).mape,
            f"mape_left_out_{precision}": table.errors.mape if table.errors else 0.0,
        }
        for row, t, p in zip(rows, times, predicted, strict=True):
            row[precision] = t | {"predicted_ms": float(p)}
    found["calibrate_s"] = max(took.values())
    keep(
        "latency_prediction", found, rows,
        packages=("torch", "openvino", "nncf"), quick=given.quick,
        profile=profile.model_dump(mode="json"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
