"""Which sub-net fits a profile's budget? Accuracy against latency by NSGA-II, both predicted.

Deb et al. 2002, by pymoo; mutation and crossover are much like those of Once-for-All's evolutionary
search (Cai et al. 2020, `nas/search_algorithm/evolution.py`). A search takes seconds and depends on
nothing but its seed and the two predictors, so one that was interrupted is simply run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgekd.ofa.accuracy_predictor import AccuracyPredictor, collect, judge_all
from edgekd.ofa.encoding import Figure, Genome
from edgekd.ofa.pareto import Front, Member, area, hypervolume, pareto
from edgekd.records import Arch, Budget, EdgeKDError, Track, untracked, versions

if TYPE_CHECKING:
    from pymoo.core.algorithm import Algorithm

MUTATION = 0.05  # of a block (kernel and expansion), of a stage's depth, of the resolution
BRIEF = 100  # generations of a search whose front is only to be learnt from
CHECK = 10  # generations between two looks at the hypervolume
PATIENCE = 100  # generations in which it has not grown by GROWTH: converged
GROWTH = 1e-4  # relative
CLOUD = 1000  # evaluated sub-nets that the record keeps, for the drawing
LIMITS = {  # of a Budget -> what a sub-net has too much of, how to say it, what to do
    "latency_ms": ("a predicted p95 of {:.3g} ms", "allow a lower resolution"),
    "params_m": ("{:.3g} M parameters", "choose a smaller space"),
    "size_mb": ("{:.3g} MB", "choose a lower precision or a smaller space"),
}


class Scores(NamedTuple):
    """What is known of N sub-nets."""

    accuracy: np.ndarray  # (N,)
    p95_ms: np.ndarray  # (N,)
    params: np.ndarray  # (N,) int64
    excess: np.ndarray  # (N, limits) figure / allowed - 1: above 0 it is over the budget

    def take(self, at: np.ndarray) -> Scores:
        """Those at the indices (or mask) `at`."""
        return Scores(*(x[at] for x in self))


@dataclass
class _Task:
    """What is searched for; every sub-net that was looked at."""

    genome: Genome
    accuracy: Figure
    latency: Figure
    budget: Budget
    p95_ratio: float
    bytes_per_param: float
    classes: int
    rows: list[np.ndarray] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)

    @property
    def limits(self) -> list[str]:
        """Those of the budget that are given and can be predicted."""
        return [name for name in LIMITS if getattr(self.budget, name) is not None]

    def p95_ms(self, rows: np.ndarray) -> np.ndarray:
        """(N,) predicted p95 of rows (N, n)."""
        return np.asarray(self.latency(*self.genome.split(rows)), float) * self.p95_ratio

    def figures(self, p95_ms: np.ndarray, params: np.ndarray) -> dict[str, np.ndarray]:
        """What each limit judges, in its unit."""
        size_mb = params * self.bytes_per_param / 1e6
        return {"latency_ms": p95_ms, "params_m": params / 1e6, "size_mb": size_mb}

    def evaluate(self, rows: np.ndarray) -> Scores:
        """Scores of rows (N, n); they are remembered."""
        params = self.genome.params(rows, self.classes)
        p95_ms = self.p95_ms(rows)
        accuracy = np.asarray(self.accuracy(*self.genome.split(rows)), float)
        found = self.figures(p95_ms, params)
        excess = [found[name] / getattr(self.budget, name) - 1 for name in self.limits]
        stacked = np.stack(excess, 1) if excess else np.zeros((len(rows), 0))
        scores = Scores(accuracy, p95_ms, params, stacked)
        self.rows.append(rows.astype(np.int8))
        self.scores.append(scores)
        return scores

    def seen(self, start: int = 0) -> tuple[np.ndarray, Scores]:
        """All that was evaluated, in order, from the batch `start` on."""
        parts = zip(*self.scores[start:], strict=True)
        return np.concatenate(self.rows[start:]), Scores(*(np.concatenate(p) for p in parts))


def search(
    space: str,
    resolutions: Sequence[int],
    accuracy: Figure,
    latency: Figure,
    budget: Budget,
    *,
    classes: int,
    p95_ratio: float = 1.0,
    bytes_per_param: float = 4.0,
    population: int = 100,
    generations: int = 500,
    seed: int = 0,
    track: Track = untracked,
) -> Front:
    """The front of `space` at `resolutions` within `budget`, by NSGA-II.

    accuracy, latency: index arrays as in `Genes` -> (N,) accuracies, (N,) median ms; p95_ratio
    turns the latter into p95, which the budget limits. Raises EdgeKDError if nothing fits.
    """
    started = time.perf_counter()
    task = _Task(Genome(space, tuple(resolutions)), accuracy, latency, budget, p95_ratio,
                 bytes_per_param, classes)  # fmt: skip
    start = _start(task, population, np.random.default_rng(seed))
    algorithm = _nsga2(task, start, seed)
    growth, done, converged = _Growth(task), 0, False
    for done in track(_evolve(algorithm, generations), "searching", generations):
        if done % CHECK == 0 and (converged := growth.ended(done)):
            break
    converged = converged or done < generations  # nothing new was left to try
    return _front(
        task, method="nsga2", generations=done, population=population, converged=converged,
        seed=seed, seconds=round(time.perf_counter() - started, 2),
        versions=versions("pymoo", "numpy"),
    )  # fmt: skip


def explore(
    space: str,
    resolutions: Sequence[int],
    latency: Figure,
    budget: Budget,
    judge: Callable[[Arch], float],
    out: Path,
    *,
    samples: int = 60,
    rounds: int = 3,
    each: int = 20,
    prior: Path | None = None,
    seed: int = 0,
    track: Track = untracked,
    **how: Any,
) -> tuple[AccuracyPredictor, Front]:
    """Search with accuracies learnt on the way: of `samples` sub-nets, then `each` of every front.

    A front is where a predictor errs most in its own favour: it has never seen such sub-nets, and
    the search picks its errors out. So what it finds is judged and the predictor fitted again,
    `rounds` times. judge: Arch -> accuracy; `out`: its memory, see `judge_all`; how: as `search`.
    A budget that nothing fits is refused before anything is judged.
    """
    genome, ratio = Genome(space, tuple(resolutions)), how.get("p95_ratio", 1.0)
    _fits_at_all(_Task(genome, latency, latency, budget, ratio, how.get("bytes_per_param", 4.0),
                       how["classes"]))  # fmt: skip
    pairs = dict(collect(space, resolutions, samples, judge, out, seed=seed, track=track))
    for done in range(rounds + 1):
        learnt = AccuracyPredictor.fit(list(pairs), list(pairs.values()), resolutions, prior=prior,
                                       seed=seed, track=track)  # fmt: skip
        last = done == rounds
        brief = {} if last else {"generations": min(BRIEF, how.get("generations", BRIEF))}
        found = search(space, resolutions, learnt.predict, latency, budget, seed=seed, track=track,
                       **how | brief)  # fmt: skip
        if not last:
            pairs |= judge_all([m.arch for m in found.spread(each)], judge, out, track=track)
    return learnt, found


def random_front(
    space: str,
    resolutions: Sequence[int],
    accuracy: Figure,
    latency: Figure,
    budget: Budget,
    *,
    classes: int,
    evaluations: int,
    p95_ratio: float = 1.0,
    bytes_per_param: float = 4.0,
    seed: int = 0,
) -> Front:
    """The front among as many random sub-nets: what a search has to beat."""
    started = time.perf_counter()
    task = _Task(Genome(space, tuple(resolutions)), accuracy, latency, budget, p95_ratio,
                 bytes_per_param, classes)  # fmt: skip
    rng = np.random.default_rng(seed)
    task.evaluate(_start(task, min(100, evaluations), rng))
    while (left := evaluations - sum(map(len, task.rows))) > 0:
        task.evaluate(task.genome.sample(min(left, 5000), rng))
    return _front(
        task, method="random", generations=0, population=0, converged=False, seed=seed,
        seconds=round(time.perf_counter() - started, 2), versions=versions("numpy"),
    )  # fmt: skip


# ---- NSGA-II


def _evolve(algorithm: Algorithm, generations: int) -> Iterator[int]:
    """1, 2, ...: generations done, until there are enough or nothing new to try."""
    for done in range(1, generations + 1):
        algorithm.next()
        yield done
        if not algorithm.has_next():
            return


def _nsga2(task: _Task, start: np.ndarray, seed: int) -> Algorithm:
    """NSGA-II of pymoo on the task, its generation 0 the rows `start`."""
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
    except ModuleNotFoundError:
        raise EdgeKDError("the search needs pymoo: pip install 'edgekd[train]'") from None
    from pymoo.config import Config
    from pymoo.core.duplicate import DefaultDuplicateElimination
    from pymoo.core.infill import InfillCriterion
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.termination.max_gen import MaximumGenerationTermination

    Config.warnings["not_compiled"] = False  # it would print
    options = task.genome.options

    class Subnets(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            scores = task.evaluate(x.astype(np.int64))
            out["F"] = np.stack([-scores.accuracy, scores.p95_ms], 1)
            out["G"] = scores.excess

    class Mating(InfillCriterion):  # whole arrays: pymoo's own operators go pair by pair
        def _do(self, _: Problem, pop: Population, n_offsprings: int, *, random_state: Any,
                **__: Any) -> Population:  # fmt: skip
            rows = pop.get("X").astype(np.int64)
            parents = _tournament(pop, (n_offsprings, 2), random_state)
            children = _cross(rows[parents], task.genome, random_state)
            return Population.new("X", _mutated(children, task.genome, random_state))

    same = DefaultDuplicateElimination(func=lambda pop: task.genome.canonical(
        pop.get("X").astype(np.int64)))  # fmt: skip
    algorithm = NSGA2(
        pop_size=len(start), sampling=start, mating=Mating(eliminate_duplicates=same),
        eliminate_duplicates=same, seed=seed,
    )  # fmt: skip
    problem = Subnets(n_var=len(options), n_obj=2, n_ieq_constr=len(task.limits), xl=0,
                      xu=options - 1, vtype=int)  # fmt: skip
    return algorithm.setup(problem, termination=MaximumGenerationTermination(10**9))


def _tournament(pop: Any, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Indices of `shape`: each the better of two drawn, by excess, rank, and then loneliness."""
    excess = pop.get("CV")[:, 0].astype(float)
    rank, crowding = (np.array([v if v is not None else 0 for v in pop.get(k)], float)
                      for k in ("rank", "crowding"))  # fmt: skip
    order = np.lexsort((-crowding, rank, excess))
    position = np.argsort(order)
    drawn = rng.integers(len(order), size=(2, *shape))
    return order[position[drawn].min(0)]


def _groups(genome: Genome) -> np.ndarray:
    """(n,) which genes change together: kernel and expansion of a place do."""
    places = genome.space.places
    return np.concatenate([np.arange(places), np.arange(len(genome.options) - places)])


def _cross(parents: np.ndarray, genome: Genome, rng: np.random.Generator) -> np.ndarray:
    """(N, n) children of (N, 2, n): a half has each gene of either parent, a half is the first."""
    groups = _groups(genome)
    second = rng.random((len(parents), groups.max() + 1)) < 0.5
    second[rng.random(len(parents)) < 0.5] = False
    return np.where(second[:, groups], parents[:, 1], parents[:, 0])


def _mutated(rows: np.ndarray, genome: Genome, rng: np.random.Generator) -> np.ndarray:
    """Rows with some genes drawn anew."""
    groups = _groups(genome)
    anew = rng.random((len(rows), groups.max() + 1)) < MUTATION
    return np.where(anew[:, groups], genome.sample(len(rows), rng), rows)


class _Growth:
    """Watches the hypervolume of what fits the budget."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._points = np.zeros((0, 2))  # (p95 ms, accuracy) of the front until now
        self._batches = 0  # of the task's that are in it
        self._best, self._since = 0.0, 0

    def ended(self, generation: int) -> bool:
        """Has it not grown for PATIENCE generations?"""
        _, scores = self._task.seen(self._batches)
        self._batches = len(self._task.scores)
        fits = (scores.excess <= 0).all(1)
        new = np.stack([scores.p95_ms, scores.accuracy], 1)[fits]
        points = np.concatenate([self._points, new])
        self._points = points[pareto(*points.T)]
        volume = area(self._points, _reference(self._task))
        if volume > self._best * (1 + GROWTH):
            self._best, self._since = volume, generation
        return volume > 0 and generation - self._since >= PATIENCE


def _reference(task: _Task) -> tuple[float, float]:
    """(p95 ms, accuracy): slowest, but not beyond the limit, and worst of the first generation."""
    first = task.scores[0]
    limit = task.budget.latency_ms or float("inf")
    return min(limit, float(first.p95_ms.max())), float(first.accuracy.min())


# ---- what comes out


def _front(task: _Task, **how: Any) -> Front:
    """The record of a search that has ended; EdgeKDError where nothing that it saw fits."""
    rows, scores = task.seen()
    fits = np.flatnonzero((scores.excess <= 0).all(1))
    if not len(fits):
        raise EdgeKDError(_misfit(task, rows, scores))
    best = fits[pareto(scores.p95_ms[fits], scores.accuracy[fits])]
    archs = task.genome.decode(rows[best].astype(np.int64))
    members = tuple(
        Member(arch=arch, accuracy=a, p50_ms=ms / task.p95_ratio, p95_ms=ms, params=params,
               size_bytes=round(params * task.bytes_per_param))
        for arch, a, ms, params, _ in zip(archs, *scores.take(best), strict=True)
    )  # fmt: skip
    some = np.unique(np.linspace(0, len(rows) - 1, CLOUD).astype(int))
    cloud = zip(scores.p95_ms[some].round(4).tolist(), scores.accuracy[some].round(5).tolist(),
                strict=True)  # fmt: skip
    reference = _reference(task)
    return Front(
        space=task.genome.name, resolutions=task.genome.resolutions, classes=task.classes,
        budget=task.budget, members=members, winner=members[-1], evaluations=len(rows),
        hypervolume=hypervolume(members, reference), reference=reference, cloud=tuple(cloud),
        p95_ratio=task.p95_ratio, bytes_per_param=task.bytes_per_param, **how,
    )  # fmt: skip


def _start(task: _Task, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, n) rows, or fewer of a tiny space: the fastest, the ends, random ones."""
    rows = np.vstack([_fits_at_all(task), task.genome.ends(), task.genome.sample(3 * count, rng)])
    _, first = np.unique(task.genome.canonical(rows), axis=0, return_index=True)
    return rows[np.sort(first)[:count]]


def _fits_at_all(task: _Task) -> np.ndarray:
    """(1, n) the fastest sub-net; EdgeKDError where it or the smallest one is over the budget."""
    smallest = task.genome.ends()[:1]
    fastest = _fastest(task)
    p95_ms, params = task.p95_ms(fastest), task.genome.params(smallest, task.classes)
    pixels = task.genome.resolutions[task.genome.split(fastest).resolution[0]]
    for name, value in task.figures(p95_ms, params).items():
        allowed = getattr(task.budget, name)
        if allowed is not None and value[0] > allowed:
            said, advice = LIMITS[name]
            at = f" at {pixels} px" if name == "latency_ms" else ""
            raise EdgeKDError(
                f"the {'fastest' if at else 'smallest'} sub-net of {task.genome.name} has "
                f"{said.format(value[0])}{at}, the budget is {allowed:g}: raise {name}, or {advice}"
            )
    return fastest


def _fastest(task: _Task) -> np.ndarray:
    """(1, n) found by changing one gene at a time: exact where costs add up."""
    options = task.genome.options
    at = np.repeat(np.arange(len(options)), options)
    to = np.concatenate([np.arange(n) for n in options])
    row = task.genome.ends()[:1]
    ms = task.p95_ms(row)[0]
    while True:
        near = np.repeat(row, len(at), axis=0)
        near[np.arange(len(at)), at] = to
        found = task.p95_ms(near)
        if found.min() >= ms:
            return row
        row, ms = near[[found.argmin()]], found.min()


def _misfit(task: _Task, rows: np.ndarray, scores: Scores) -> str:
    """What is nearest to the budget, where each limit can be met but not all at once."""
    nearest = int(np.maximum(scores.excess, 0).sum(1).argmin())
    found = task.figures(scores.p95_ms[[nearest]], scores.params[[nearest]])
    said = [f"{LIMITS[n][0].format(found[n][0])} of {getattr(task.budget, n):g}"
            for n in task.limits]  # fmt: skip
    over = [n for n, x in zip(task.limits, scores.excess[nearest], strict=True) if x > 0]
    return (
        f"none of {len(rows)} sub-nets of {task.genome.name} is within all limits at once; the "
        f"nearest has {', '.join(said)}: raise {' or '.join(over)}"
    )
