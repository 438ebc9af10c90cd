"""Can the stopwatch be believed? The same measurement five times, and slow builds planted.

    python benchmarks/stopwatch.py [--quick] [--only repeat|bench|planted] [--runs DIR]

Three files of one network with random weights (which the clock does not see): FP32 and INT8 of OFA-
lite's middle sub-net, and FP32 of its smallest. Repeated: the ratios between the three, and of the
INT8 file to itself, five times, each in fresh processes, and how far apart the five are; beside it
how far apart the INT8 file's own times are, which is the machine's doing. A repeat takes rounds
until the 95 % interval of each ratio is narrower than 3 %, five to fifteen.
Bench: `edgekd bench` of the three as it is without options, and with --quick, five times each: how
many seconds it takes, how often it ended by knowing the ratios, how far apart these are, and how
often the interval of one holds what the rounds above found (their median).
Planted: the INT8 file beside itself, beside itself on one thread, and beside FP32 in its place,
twenty tries each, as `edgekd bench --against` judges them, but from three rounds where the command
takes five: a file that runs now, and a timing.json of before. 40 minutes on 2 cores, or more where
the machine keeps changing its pace; --only does one of the three, and leaves the others as the kept
result has them. --quick (one repeat more than one, one try) keeps nothing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workbench import RUNS, arguments, keep, result_of

from edgekd import export
from edgekd.bench import bench, compare
from edgekd.bench.bench import Runner, short
from edgekd.metrics.latency import ratio_interval, turns_interval
from edgekd.models import zoo
from edgekd.ofa import spaces
from edgekd.pipeline.bench import how_of
from edgekd.quantize import ptq
from edgekd.records import Artifact, Profile, Spec, Timing

SIZE = 128
REPEATS, TRIES = 5, 20
WIDE = 0.03  # of a ratio: the interval that takes more rounds
MOST = 3  # times as many
CPU = Profile.read("cpu")
HOW = short(1.0, throughput=False)  # 1 s of calls of each file in each process


def made(folder: Path) -> dict[str, Artifact]:
    """The three files."""
    import torch

    files = {}
    for name in ("mid", "min"):
        if not (folder / name / "int8" / Artifact.FILE).exists():
            torch.manual_seed(0)
            spec = Spec(classes=("a", "b", "c"), size=(SIZE, SIZE))
            arch = spaces.uniform("ofa-lite-w1.0", name, SIZE)
            net = zoo.Waist(zoo.student(arch, 3).eval(), spec.size).eval()
            params, macs = zoo.count(net, spec.size)
            trained = Artifact(kind="student", model=name, spec=spec, params=params, macs=macs,
                               files={zoo.WEIGHTS: "0" * 64})  # fmt: skip
            images = np.random.default_rng(0).standard_normal((16, 3, SIZE, SIZE), np.float32)
            onnx = export.to_onnx(net, trained, images[:4], folder / name / "onnx")
            export.to_runtime(onnx, images[:4], folder / name / "fp32", "openvino")
            ptq.quantize(onnx, images, folder / name / "int8")
        files |= {f"{name} {p}": Artifact.load(folder / name / p) for p in ("fp32", "int8")}
    del files["min int8"]
    return files


def repeated(files: dict[str, Artifact], repeats: int, rounds: int) -> list[dict[str, Any]]:
    """Each pair's ratio, `repeats` times."""
    given = [*files.values(), files["mid int8"]]
    rows = []
    for repeat in range(repeats):
        each = bench.in_rounds([Runner(a, CPU, True) for a in given], HOW, rounds=rounds,
                               most=MOST * rounds, undecided=_vague,
                               seed=100 * repeat)  # fmt: skip
        rows += [{"what": "repeat", "repeat": repeat, "rounds": len(each[0])} | pair
                 for pair in _ratios([*files, "mid int8 again"], each)]  # fmt: skip
        print(*rows[-4:], sep="\n", flush=True)
    return rows


def _ratios(names: Sequence[str], each: Sequence[Sequence[Timing]]) -> list[dict[str, Any]]:
    """The ratio of each pair of files; `each` has the rounds of each file."""
    blocks = [[t.block_medians_ms for t in x] for x in each]
    found = []
    for i, j in ((0, 1), (0, 2), (1, 2), (3, 1)):
        times, low, high = ratio_interval(blocks[i], blocks[j])
        found.append({"pair": f"{names[i]} / {names[j]}", "times": times, "low": low, "high": high,
                      "p50_ms": float(np.median(np.concatenate(blocks[i])))})  # fmt: skip
    return found


def _vague(each: Sequence[Sequence[Timing]]) -> bool:
    """Some ratio's interval is wider than what is claimed of repeats."""
    return any(r["high"] - r["low"] > WIDE * r["times"] for r in _ratios(" " * len(each), each))


def benched(files: dict[str, Artifact], repeats: int) -> list[dict[str, Any]]:
    """`edgekd bench` of the three, by default and quick: its seconds, ratios and their widths."""
    rows = []
    for repeat in range(repeats):
        for mode in ("default", "quick"):
            how = how_of(10, None, quick=mode == "quick", within=None)
            began = time.perf_counter()
            found = bench.measure([Runner(a, CPU, True) for a in files.values()], how, seed=repeat)
            seconds = time.perf_counter() - began
            first, *others = found
            for name, timing in zip(list(files)[1:], others, strict=True):
                times, low, high = turns_interval(first.block_medians_ms, timing.block_medians_ms)
                rows.append({"what": "bench", "mode": mode, "repeat": repeat, "seconds": seconds,
                             "pair": f"{next(iter(files))} / {name}", "times": times, "low": low,
                             "high": high, "width": timing.width, "ended": timing.ended,
                             "turns": len(timing.block_medians_ms)})  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def planted(files: dict[str, Artifact], tries: int) -> list[dict[str, Any]]:
    """What the gate says of an equal build and of two slow ones."""
    good = Runner(files["mid int8"], CPU, True)
    one_thread = good._replace(profile=CPU.model_copy(update={"threads": 1}))
    builds = {"equal": good, "one thread": one_thread,
              "fp32": good._replace(artifact=files["mid fp32"])}  # fmt: skip
    rows = []
    for attempt in range(tries):
        before = bench.measure([good], HOW, seed=attempt)[0]
        for name, build in builds.items():
            given: dict[str, Any] = {"rounds": 3, "seed": attempt}
            for found in (compare.other_file(build, good, HOW, **given),
                          compare.record(build, before, HOW, **given)):  # fmt: skip
                rows.append({"what": "planted", "build": name, "against": found.how,
                             "state": found.state, "times": found.times, "low": found.low,
                             "high": found.high})  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How far apart repeats are; what a bench takes; of each build the share that was caught."""
    repeats: dict[str, list[float]] = {}
    times: list[float] = []
    states: dict[str, list[str]] = {}
    for r in rows:
        if r["what"] == "repeat":
            repeats.setdefault(r["pair"], []).append(r["times"])
            if r["pair"].startswith("mid int8 again"):
                times.append(r["p50_ms"])
        elif r["what"] == "planted":
            key = f"{r['build'].replace(' ', '_')}_{r['against']}"
            states.setdefault(key, []).append(r["state"])
    apart = {k: max(v) / min(v) - 1 for k, v in repeats.items()}
    found = {"ratio_spread": max(apart.values()), "time_spread": max(times) / min(times) - 1}
    found |= {f"ratio_spread_{re.sub('[^a-z0-9]+', '_', k)}": v for k, v in apart.items()}
    for mode in ("default", "quick"):
        found |= _bench_figures([r for r in rows if r.get("mode") == mode], mode, repeats)
    for key, seen in states.items():
        found |= {f"caught_{key}": seen.count("fail") / len(seen),
                  f"undecided_{key}": seen.count("inconclusive") / len(seen)}  # fmt: skip
    return found


def _bench_figures(
    rows: list[dict[str, Any]], mode: str, repeats: dict[str, list[float]]
) -> dict[str, float]:
    """Of `edgekd bench` in one mode."""
    if not rows:
        return {}
    pairs = {r["pair"] for r in rows}
    each = {p: [r["times"] for r in rows if r["pair"] == p] for p in pairs}
    truth = {p: float(np.median(repeats[p])) for p in pairs if p in repeats}
    held = [r["low"] <= truth[r["pair"]] <= r["high"] for r in rows if r["pair"] in truth]
    return {
        f"bench_{mode}_s": max(r["seconds"] for r in rows),
        f"bench_{mode}_known": sum(r["ended"] == "narrow" for r in rows) / len(rows),
        f"bench_{mode}_ratio_spread": max(max(x) / min(x) - 1 for x in each.values()),
    } | ({f"bench_{mode}_held": sum(held) / len(held)} if held else {})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--only", choices=("repeat", "bench", "planted"))
    given = parser.parse_args()
    if given.only and not result_of("stopwatch").exists():
        parser.error("--only keeps the other parts of this machine's result, and there is none")
    files = made(given.runs or RUNS / "stopwatch")
    rows = []
    if given.only:
        before = json.loads(result_of("stopwatch").read_text("utf-8"))["table"]
        rows = [r for r in before if r["what"] != given.only]
    if given.only in (None, "repeat"):
        rows += repeated(files, 2 if given.quick else REPEATS, 1 if given.quick else compare.ROUNDS)
    if given.only in (None, "bench"):
        rows += benched(files, 1 if given.quick else REPEATS)
    if given.only in (None, "planted"):
        rows += planted(files, 1 if given.quick else TRIES)
    keep("stopwatch", figures(rows), rows, packages=("openvino", "numpy"), quick=given.quick)


if __name__ == "__main__":
    main()
