"""How good and how fast is the search? Its front against random search and published networks.

    python benchmarks/search.py [--quick] [--supernet DIR --table FILE] [--profile NAME] [--measure]

DIR holds `evaluated.jsonl`: sub-nets of the profile's space and their accuracies, from a trained
supernet; FILE is the latency table of the profile. Without either of them a stated formula stands
in for it, which shows speed and quality of the search alone, and no result file is written.
The latency limit is the profile's, or the median of random sub-nets where that is less: a limit
that everything is within asks nothing of a search.
--measure times, in OpenVINO, the chosen sub-net and the published ones. About 15 seconds; --quick
searches for a tenth as long.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekd import spaces
from edgekd.bench import bench, machine, percentiles
from edgekd.front import Front, hypervolume, plot
from edgekd.genes import Figure, Genome
from edgekd.predictor import AccuracyPredictor
from edgekd.records import (
    Arch,
    Artifact,
    Budget,
    Profile,
    Spec,
    make_folder,
    versions,
    write_atomic,
)
from edgekd.search import random_front, search

HERE = Path(__file__).parent
PUBLISHED = ("cpu_lat@", "tx2_")  # OFA's own nets for a CPU and a Jetson
CLASSES = 3
SEEDS = 3  # of the search, to say how much the ratio varies


def read_evaluated(path: Path) -> tuple[list[Arch], list[float]]:
    """Sub-nets and accuracies of an `evaluated.jsonl`."""
    lines = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
    return [Arch.parse(x["arch"], str(path)) for x in lines], [x["accuracy"] for x in lines]


def stand_in_accuracy(genome: Genome) -> Figure:
    """Returns that diminish with blocks, kernels, expansions and pixels; weights drawn once."""
    rng, places = np.random.default_rng(0), genome.space.places
    by_kernel, by_expand = (np.sort(rng.gamma(1, s, (places, 3)), axis=1) for s in (1, 1.5))
    by_block, pixels, at = rng.gamma(1, 1, places), np.array(genome.resolutions), np.arange(places)

    def accuracy(kernel, expand, depth, resolution):
        gain = (by_kernel[at, kernel] + by_expand[at, expand] + by_block) * genome.used(depth)
        return 0.95 - 0.4 * np.exp(-gain.sum(1) / 30) - 0.25 * np.exp(-pixels[resolution] / 45)

    return accuracy


def stand_in_latency(genome: Genome, profile: Profile) -> Figure:
    """A roofline: each piece costs its arithmetic or its memory traffic, and 10 us."""
    flops = (profile.peak_gflops or 150) * 1e6  # per ms
    traffic = (profile.bandwidth_gbs or 20) * 1e6

    def piece_ms(p: spaces.Piece) -> float:
        out = (p.size + p.stride - 1) // p.stride
        wide = p.mid or p.cout
        macs = p.size**2 * p.cin * wide * (p.mid != p.cin) + out**2 * (
            p.mid * (p.kernel**2 + p.cout) if p.kind == "block" else 0
        )
        moved = 4 * (p.size**2 * (p.cin + p.mid) + out**2 * (p.mid + p.cout))
        return max(2 * macs / flops, moved / traffic) + 0.01

    space = genome.space
    places, deepest = space.places, tuple(max(s.depths) for s in space.stages)
    table = np.zeros((len(genome.resolutions), places, len(space.kernels), len(space.expands)))
    fixed = np.zeros(len(genome.resolutions))
    for index in np.ndindex(len(fixed), len(space.kernels), len(space.expands)):
        r, k, e = index
        arch = Arch(space=genome.name, kernel=(space.kernels[k],) * places,
                    expand=(space.expands[e],) * places, depth=deepest,
                    resolution=genome.resolutions[r])  # fmt: skip
        costs = [(p.kind, piece_ms(p)) for p in spaces.pieces(arch, CLASSES)]
        blocks = [ms for kind, ms in costs if kind == "block"][1:]
        table[r, :, k, e] = blocks
        fixed[r] = sum(ms for _, ms in costs) - sum(blocks)
    at = np.arange(places)

    def ms(kernel, expand, depth, resolution):
        each = table[resolution[:, None], at, kernel, expand] * genome.used(depth)
        return fixed[resolution] + each.sum(1)

    return ms


def table_latency(path: Path) -> Figure:
    """What the measured table of a profile predicts."""
    from edgekd.latency import Table, tabulate

    return tabulate(Table.load(path)).predict


def published(genome: Genome) -> dict[str, Arch]:
    """The published nets' genes in our space, at the nearest resolution that is searched."""
    found = {}
    for name, arch in spaces.subnets().items():
        if name.startswith(PUBLISHED) and len(arch.kernel) == genome.space.places:
            nearest = min(genome.resolutions, key=lambda r: abs(r - arch.resolution))
            ours = arch.model_copy(update={"space": genome.name, "resolution": nearest})
            found[name.partition("_top1")[0]] = ours
    return found


def measured_ms(archs: Sequence[Arch], profile: Profile, folder: Path) -> list[float]:
    """p95 ms of sub-nets with random weights, in OpenVINO on this CPU: weights do not matter."""
    import torch

    from edgekd import export, models

    host = Profile(name="host", runtime="openvino", device="CPU", threads=profile.threads)
    made: list[Artifact] = []
    for i, arch in enumerate(archs):
        size = (arch.resolution,) * 2
        out = folder / f"subnet-{i}"
        torch.manual_seed(0)
        net = models.Waist(models.student(arch, CLASSES), size).eval()
        params, macs = models.count(net.net, size)
        source = Artifact(
            kind="student", model=f"subnet-{i}", files={"untrained": "0" * 64}, arch=arch,
            spec=Spec(classes=tuple("abc"), size=size), params=params, macs=macs,
        )  # fmt: skip
        images = np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)
        written = export.to_onnx(net, source, images, out / "onnx")
        made.append(export.to_runtime(written, images, out / f"openvino-{i}", "openvino"))
    timings = bench(made, host, folder / "bench", seconds=1.0, on_device=True)
    return [percentiles(t.samples_ms)["p95"] for t in timings]


def limited(genome: Genome, latency: Figure, budget: Budget) -> Budget:
    """`budget` with a latency limit that half of all sub-nets are over."""
    rows = genome.sample(2000, np.random.default_rng(0))
    median = round(float(np.median(latency(*genome.split(rows)))), 3)
    return budget.model_copy(update={"latency_ms": min(median, budget.latency_ms or median)})


def run(
    genome: Genome, accuracy: Figure, latency: Figure, budget: Budget, quick: bool
) -> tuple[list[Front], list[float]]:
    """(searches with SEEDS seeds, their hypervolume as a multiple of random search's)."""
    fronts, ratios = [], []
    asked = (genome.name, genome.resolutions, accuracy, latency, budget)
    for seed in range(SEEDS):
        found = search(*asked, classes=CLASSES, seed=seed, generations=50 if quick else 500)
        chance = random_front(*asked, classes=CLASSES, seed=seed, evaluations=found.evaluations)
        volume = hypervolume(chance, found.reference)
        ratios.append(found.hypervolume / volume if volume else float("inf"))
        fronts.append(found)
    return fronts, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--supernet", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args()
    profile = Profile.read(given.profile)
    genome = Genome(profile.space, tuple(profile.resolutions))
    out = make_folder(HERE.parent / "runs" / "search-benchmark")
    seconds, fitted = {}, None
    started = time.perf_counter()
    if given.supernet:
        archs, values = read_evaluated(given.supernet / "evaluated.jsonl")
        fitted = AccuracyPredictor.fit(archs, values, genome.resolutions)
        accuracy = fitted.over(genome.name, genome.resolutions)
    else:
        accuracy = stand_in_accuracy(genome)
    seconds["predictor"] = time.perf_counter() - started
    latency = table_latency(given.table) if given.table else stand_in_latency(genome, profile)
    fronts, ratios = run(
        genome, accuracy, latency, limited(genome, latency, profile.budget), given.quick
    )
    best = fronts[0]
    named = {"chosen": best.winner.arch} | published(genome)
    genes = genome.split(genome.encode(list(named.values())))
    places = dict(zip(named, zip(latency(*genes), accuracy(*genes), strict=True), strict=True))
    real: dict[str, tuple[float, float]] = {}
    if given.measure:
        ms = measured_ms(list(named.values()), profile, out)
        real = {name: (t, places[name][1]) for name, t in zip(named, ms, strict=True)}
    plot(best, out / "front.png", named=places, measured=real)
    rows = [
        {"name": name, "p95_ms": ms, "accuracy": value, "resolution": arch.resolution,
         "measured_p95_ms": real.get(name, (None,))[0],
         "searched_at_its_latency": max((m.accuracy for m in best.members if m.p95_ms <= ms),
                                      default=None)}
        for (name, (ms, value)), arch in zip(places.items(), named.values(), strict=True)
    ]  # fmt: skip
    write(given, best, fronts, ratios, rows, seconds, fitted)


def write(given, best, fronts, ratios, rows, seconds, fitted) -> None:
    """Show the result; keep it where nothing in it is a stand-in."""
    here = machine()
    figures = {
        "search_s": max(f.seconds for f in fronts),
        "hypervolume_ratio_random": min(ratios),
        "evaluations": best.evaluations,
        "front": len(best.members),
        "chosen_accuracy": best.winner.accuracy,
        "chosen_p95_ms": best.winner.p95_ms,
    }
    if fitted:
        figures |= {"kendall": fitted.record.ranking.kendall,
                    "spearman": fitted.record.ranking.spearman}  # fmt: skip
    result = {
        "question": "search",
        "machine": here.model_dump(),
        "versions": versions("pymoo", "numpy", "torch"),
        "date": datetime.date.today().isoformat(),
        "accuracy": "predicted" if given.supernet else "a formula",
        "latency": "table" if given.table else "a roofline",
        "budget": best.budget.model_dump(),
        "figures": {k: round(float(v), 4) for k, v in figures.items()},
        "ratios": [round(r, 4) for r in ratios],
        "converged": [f.converged for f in fronts],
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "table": rows,
    }
    print(json.dumps(result, indent=1, default=float))
    if given.supernet and given.table and not given.quick:
        path = make_folder(HERE / "results") / f"search-{here.name}.json"
        write_atomic(path, json.dumps(result, indent=1, default=float) + "\n")
        print(path)


if __name__ == "__main__":
    main()
