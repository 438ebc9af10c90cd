"""How good and how fast is the search? Its front against random search and published networks.

    python benchmarks/search.py [--quick] [--supernet DIR] [--profile NAME] [--measure]

DIR holds `evaluated.jsonl`: sub-nets of the profile's space and their accuracies, from a trained
supernet; without it, the one that benchmarks/once_for_all.py trained. The latency table is the
profile's, measured now if there is none. Where there is no supernet a stated formula stands in for
it, which shows speed and quality of the search alone, and no result file is written.
The latency limit is the profile's, or the median of random sub-nets where that is less: a limit
that everything is within asks nothing of a search.
--measure times the chosen sub-net and the published ones, made as they would be deployed. A minute,
with --measure five; --quick searches for a tenth as long.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from workbench import RUNS, arguments, keep

from edgekd.bench.bench import bench, short
from edgekd.metrics.latency import percentiles
from edgekd.ofa import spaces
from edgekd.ofa.accuracy_predictor import AccuracyPredictor
from edgekd.ofa.encoding import Figure, Genome
from edgekd.ofa.latency_table import Table, tabulate
from edgekd.ofa.nsga2 import random_front, search
from edgekd.ofa.pareto import Front, hypervolume, plot
from edgekd.pipeline.search import BYTES, latency_of
from edgekd.records import Arch, Artifact, Budget, Profile, Spec, make_folder

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


def supernet_folder(given: Path | None, space: str) -> Path | None:
    """The supernet to search in: the given one, or the warm one of benchmarks/once_for_all.py."""
    if given is not None:
        return given
    for folder in sorted(RUNS.glob("once_for_all/shared/*/supernet-*")):
        made = Artifact.load(folder)
        if made.model == space and made.settings["start"] != "scratch":
            return folder
    return None


def published(genome: Genome) -> dict[str, Arch]:
    """OFA's own nets for a CPU and a Jetson TX2, as they were published."""
    return {name.partition("_top1")[0]: arch for name, arch in spaces.subnets().items()
            if name.startswith(PUBLISHED) and len(arch.kernel) == genome.space.places}  # fmt: skip


def here(arch: Arch, genome: Genome) -> Arch:
    """The genes of a published net in our space, at the nearest resolution that is searched."""
    nearest = min(genome.resolutions, key=lambda r: abs(r - arch.resolution))
    return arch.model_copy(update={"space": genome.name, "resolution": nearest})


def measured_ms(
    archs: Sequence[Arch], profile: Profile, precision: str, folder: Path
) -> list[float]:
    """p95 ms of sub-nets with random weights, made as deployed: weights do not matter."""
    import torch

    from edgekd.ofa import supernet
    from edgekd.pipeline import trial

    made: list[Artifact] = []
    titles = [spaces.title(arch) for arch in archs]  # two published nets may be one of ours
    for arch in dict(zip(titles, archs, strict=True)).values():
        size = (arch.resolution,) * 2
        torch.manual_seed(0)
        net = supernet.build(arch, CLASSES).eval()
        images = np.random.default_rng(0).standard_normal((8, 3, *size), np.float32)
        # As in a trained network, or NNCF sees activations that are all but zero.
        supernet.recalibrate(net, [torch.from_numpy(images)])
        spec = Spec(classes=tuple("abc"), size=size)
        made.append(trial.deployed(net, arch, spec, precision, images, folder))
    timings = bench(made, profile, folder / "bench", short(2.0), on_device=True)
    ms = {t.model: percentiles(t.samples_ms)["p95"] for t in timings}
    return [ms[title] for title in titles]


def limited(genome: Genome, latency: Figure, p95_ratio: float, budget: Budget) -> Budget:
    """`budget` with a latency limit that half of all sub-nets are over."""
    rows = genome.sample(2000, np.random.default_rng(0))
    median = round(float(np.median(latency(*genome.split(rows)))) * p95_ratio, 3)
    return budget.model_copy(update={"latency_ms": min(median, budget.latency_ms or median)})


def run(
    genome: Genome, accuracy: Figure, table: Table, budget: Budget, quick: bool
) -> tuple[list[Front], list[float]]:
    """(searches with SEEDS seeds, their hypervolume as a multiple of random search's)."""
    fronts, ratios = [], []
    latency = tabulate(table).over(genome.resolutions)
    asked = (genome.name, genome.resolutions, accuracy, latency, budget)
    how = {"classes": CLASSES, "p95_ratio": table.p95_ratio,
           "bytes_per_param": BYTES[table.precision]}  # fmt: skip
    for seed in range(SEEDS):
        found = search(*asked, seed=seed, generations=50 if quick else 500, **how)
        chance = random_front(*asked, seed=seed, evaluations=found.evaluations, **how)
        volume = hypervolume(chance, found.reference)
        ratios.append(found.hypervolume / volume if volume else float("inf"))
        fronts.append(found)
    return fronts, ratios


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--supernet", type=Path)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args()
    profile = Profile.read(given.profile)
    genome = Genome(profile.space, tuple(profile.resolutions))
    out = make_folder(RUNS / "search-benchmark")
    trained = supernet_folder(given.supernet, profile.space)
    table = latency_of(profile, CLASSES, genome.resolutions, estimate=False)
    seconds, fitted = {}, None
    started = time.perf_counter()
    if trained:
        archs, values = read_evaluated(trained / "evaluated.jsonl")
        fitted = AccuracyPredictor.fit(archs, values, genome.resolutions)
        accuracy = fitted.over(genome.name, genome.resolutions)
    else:
        accuracy = stand_in_accuracy(genome)
    seconds["predictor"] = time.perf_counter() - started
    latency = tabulate(table).over(genome.resolutions)
    budget = limited(genome, latency, table.p95_ratio, profile.budget)
    fronts, ratios = run(genome, accuracy, table, budget, given.quick)
    best = fronts[0]
    theirs = published(genome)
    named = {"chosen": best.winner.arch} | {n: here(a, genome) for n, a in theirs.items()}
    genes = genome.split(genome.encode(list(named.values())))
    p95_ms = latency(*genes) * table.p95_ratio
    places = dict(zip(named, zip(p95_ms, accuracy(*genes), strict=True), strict=True))
    real: dict[str, float] = {}
    original: dict[str, float] = {}
    if given.measure and not table.estimated:
        ms = measured_ms([*named.values(), *theirs.values()], profile, table.precision, out)
        real = dict(zip(named, ms, strict=False))
        original = dict(zip(theirs, ms[len(named) :], strict=True))
    measured = {name: (t, places[name][1]) for name, t in real.items()}
    plot(best, out / "front.png", named=places, measured=measured)
    rows = [
        {"name": name, "p95_ms": ms, "accuracy": value, "resolution": arch.resolution,
         "measured_p95_ms": real.get(name), "as_published_p95_ms": original.get(name),
         "searched_at_its_latency": max((m.accuracy for m in best.members if m.p95_ms <= ms),
                                      default=None)}
        for (name, (ms, value)), arch in zip(places.items(), named.values(), strict=True)
    ]  # fmt: skip
    write(best, fronts, ratios, rows, seconds, fitted, table, given.quick)


def write(best, fronts, ratios, rows, seconds, fitted, table, quick) -> None:
    """Show the result; keep it where nothing in it is a stand-in."""
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
    keep(
        "search", figures, rows,
        packages=("pymoo", "numpy", "torch"), quick=quick or not fitted or table.estimated,
        accuracy="predicted" if fitted else "a formula",
        latency="estimated" if table.estimated else "a measured table",
        precision=table.precision,
        budget=best.budget.model_dump(),
        ratios=[round(r, 4) for r in ratios],
        converged=[f.converged for f in fronts],
        seconds={k: round(v, 2) for k, v in seconds.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
