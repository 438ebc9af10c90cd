"""The front against brute force where that is possible; budgets, seeds, counts, a drawing."""

import itertools
import random

import numpy as np
import pytest
import torch

from edgekd.ofa import accuracy_predictor, nsga2, pareto, spaces, supernet
from edgekd.ofa.encoding import Genome
from edgekd.records import Arch, Budget, EdgeKDError

TINY = "tiny"  # 20 networks a stage, 2 stages, 2 resolutions: 800 that differ
PIXELS = (64, 96)


@pytest.fixture(autouse=True)
def tiny_space(monkeypatch):
    stages = tuple(spaces.Stage(w, 2, "relu6", depths=(1, 2), kernels=(3, 5)) for w in (16, 24))
    space = spaces.Space(8, 8, False, "relu6", "relu6", stages, 0, 64, True, 1e-5, (3, 6))
    monkeypatch.setitem(spaces.SPACES, TINY, space)


def every_tiny():
    """All networks of the tiny space, each once."""
    blocks = [(k, e) for k in (3, 5) for e in (3, 6)]
    stages = [c for d in (1, 2) for c in itertools.product(blocks, repeat=d)]
    for first, second, pixels in itertools.product(stages, stages, PIXELS):
        kernel, expand = [0] * 4, [0] * 4
        for start, chosen in ((0, first), (2, second)):
            for i, (k, e) in enumerate(chosen):
                kernel[start + i], expand[start + i] = k, e
        yield Arch(space=TINY, kernel=tuple(kernel), expand=tuple(expand),
                   depth=(len(first), len(second)), resolution=pixels)  # fmt: skip


def cost(space, resolutions):
    """ms that add up over places: kernel^2 x expansion x pixels, weighted by place."""
    genome = Genome(space, resolutions)
    kernels, expands = np.array(genome.space.kernels), np.array(genome.space.expands)
    pixels = np.array(resolutions) ** 2 / 1e4

    def ms(kernel, expand, depth, resolution):
        weight = 1 + np.arange(genome.space.places) % 3
        each = (kernels[kernel] ** 2 * expands[expand] + 10) * weight * genome.used(depth)
        return 0.2 + each.sum(1) * pixels[resolution] / 1000

    return ms


def worth(space, resolutions):
    """Accuracies with returns that diminish, other weights than the cost's."""
    genome = Genome(space, resolutions)
    gain = np.random.default_rng(3).uniform(0.5, 2, genome.space.places)

    def accuracy(kernel, expand, depth, resolution):
        each = (1 + 0.6 * kernel + 0.9 * expand) * gain * genome.used(depth)
        return 0.95 - 0.5 * np.exp(-each.sum(1) / 20) - 0.1 * (resolution == 0)

    return accuracy


def found(space=TINY, resolutions=PIXELS, budget=None, **more):
    options = {"classes": 3, "population": 40, "generations": 80} | more
    return nsga2.search(space, resolutions, worth(space, resolutions), cost(space, resolutions),
                         budget or Budget(), **options)  # fmt: skip


def test_the_front_is_the_one_of_brute_force():
    archs = list(every_tiny())
    assert len(set(archs)) == 800
    genome = Genome(TINY, PIXELS)
    genes = genome.split(genome.encode(archs))
    ms, accuracy = cost(TINY, PIXELS)(*genes) * 1.2, worth(TINY, PIXELS)(*genes)
    limit = float(np.median(ms))
    best = [i for i in range(800) if ms[i] <= limit and not any(
        (ms <= ms[i]) & (accuracy >= accuracy[i]) & ((ms < ms[i]) | (accuracy > accuracy[i])))
    ]  # fmt: skip
    truth = sorted((ms[i], accuracy[i]) for i in best)
    got = found(budget=Budget(latency_ms=limit), p95_ratio=1.2)
    np.testing.assert_allclose([(m.p95_ms, m.accuracy) for m in got.members], truth)
    assert got.winner == got.members[-1]
    assert got.winner.accuracy == accuracy[best].max()
    assert got.winner.p95_ms == pytest.approx(1.2 * got.winner.p50_ms)


def test_a_hypervolume_by_hand():
    member = found(generations=2).members[0]
    points = [(1.0, 0.5), (2.0, 0.7), (5.0, 0.9)]
    members = [member.model_copy(update={"p95_ms": ms, "accuracy": a}) for ms, a in points]
    assert pareto.hypervolume(members, (4.0, 0.4)) == pytest.approx(3 * 0.1 + 2 * 0.2)
    assert pareto.hypervolume(members, (0.5, 0.4)) == 0
    assert pareto.pareto(np.array([2, 1, 1, 3]), np.array([0.7, 0.5, 0.6, 0.7])).tolist() == [2, 0]


def test_the_same_seed_finds_the_same_and_random_search_less():
    space, pixels, budget = "ofa-lite-w1.0", (96, 128), Budget(latency_ms=9, params_m=3)
    a, b, other = (found(space, pixels, budget, seed=s, generations=60) for s in (1, 1, 2))
    assert a.model_dump(exclude={"seconds"}) == b.model_dump(exclude={"seconds"})
    assert a.members != other.members
    assert a.evaluations == 60 * 40
    chance = nsga2.random_front(space, pixels, worth(space, pixels), cost(space, pixels), budget,
                                 classes=3, evaluations=a.evaluations)  # fmt: skip
    assert chance.evaluations == a.evaluations
    assert a.hypervolume > 1.02 * pareto.hypervolume(chance, a.reference)
    assert a.winner.accuracy > chance.winner.accuracy


def test_every_member_is_within_the_budget_and_counted_right():
    budget = Budget(latency_ms=9, params_m=2, size_mb=1.9, memory_mb=1)
    got = found("ofa-lite-w1.0", (96, 128), budget, bytes_per_param=1.0, generations=30)
    assert len(got.members) > 5
    for m in got.members:
        assert m.p95_ms <= 9
        assert m.params <= 1.9e6
        assert m.size_bytes == m.params
        assert m.arch == spaces.canonical(m.arch)
    with torch.device("meta"):
        net = supernet.build(got.winner.arch, 3)
    assert got.winner.params == sum(p.numel() for p in net.parameters())


def test_it_stops_when_there_is_nothing_more_to_find(monkeypatch):
    monkeypatch.setattr(nsga2, "PATIENCE", 30)
    got = found(generations=2000)
    assert got.converged
    assert got.generations < 1000
    assert not found(generations=10).converged


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"latency_ms": 0.01},
         r"the fastest sub-net of ofa-lite-w1.0 has a predicted p95 of [\d.]+ ms at 96 px, the "
         r"budget is 0.01: raise latency_ms, or allow a lower resolution"),
        ({"params_m": 0.5},
         r"the smallest sub-net of ofa-lite-w1.0 has 1.27 M parameters, the budget is 0.5: raise "
         r"params_m"),
        ({"size_mb": 5}, r"has 5.07 MB, the budget is 5: raise size_mb, or choose a lower preci"),
    ],
)  # fmt: skip
def test_a_budget_that_nothing_fits_says_what_to_do(budget, message):
    with pytest.raises(EdgeKDError, match=message):
        found("ofa-lite-w1.0", (96, 128), Budget(**budget))


def test_limits_that_cannot_be_met_together():
    """Larger is faster here, so what is fast enough has too many parameters."""
    genome = Genome(TINY, PIXELS)

    def inverse(*genes):
        return 1e6 / genome.params(np.column_stack(genes), 3)

    budget = Budget(latency_ms=111, params_m=0.007)
    with pytest.raises(EdgeKDError, match=r"within all limits at once; the nearest has .* raise"):
        nsga2.search(TINY, PIXELS, worth(TINY, PIXELS), inverse, budget, classes=3,
                      generations=5)  # fmt: skip


@pytest.mark.parametrize("space", spaces.SPACES)
def test_parameters_are_counted_as_the_network_has_them(space):
    rng, genome = random.Random(1), Genome(space, (96, 128))
    archs = [spaces.sample(space, rng, (96, 128)) for _ in range(6)]
    archs += [spaces.uniform(space, end, 96) for end in ("min", "max")]
    rows = genome.encode(archs)
    with torch.device("meta"):
        nets = [supernet.build(a, 5) for a in archs]
    counted = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert genome.params(rows, 5).tolist() == counted
    assert genome.decode(rows) == [spaces.canonical(a) for a in archs]


def test_rows_that_differ_where_there_is_no_block_are_one_network():
    genome = Genome(TINY, PIXELS)
    rows = genome.sample(200, np.random.default_rng(0))
    other = rows.copy()
    beyond = ~genome.used(genome.split(rows).depth)
    assert beyond.any()
    other[:, : 2 * beyond.shape[1]] ^= np.hstack([beyond, beyond])
    assert (genome.canonical(rows) == genome.canonical(other)).all()
    assert genome.decode(rows) == genome.decode(other)
    got = found(generations=40)
    assert len({m.arch for m in got.members}) == len(got.members)


def test_a_sub_net_of_elsewhere_has_no_genes():
    arch = spaces.uniform("ofa-lite-w1.0", "min", 64)
    with pytest.raises(EdgeKDError, match=r"at 64 px is not one of ofa-lite-w1.0 at 96 px"):
        Genome("ofa-lite-w1.0", (96,)).encode([arch])
    with pytest.raises(EdgeKDError, match="give at least one, and each only once"):
        Genome("ofa-lite-w1.0", (96, 96))


def test_fronts_are_learnt_from(tmp_path, monkeypatch):
    """Judged on the way, the winner is better and what is promised of it nearer to the truth."""
    monkeypatch.setattr(accuracy_predictor, "STEPS", 2)
    space, pixels, asked = "ofa-lite-w1.0", (96, 128), []
    genome, true = Genome(space, pixels), worth(space, pixels)

    def judge(arch):
        asked.append(arch)
        return float(true(*genome.split(genome.encode([arch])))[0])

    def explored(name, **more):
        return nsga2.explore(space, pixels, cost(space, pixels), Budget(latency_ms=9), judge,
                              tmp_path / name, classes=3, population=40, **more)  # fmt: skip

    once, front_once = explored("a.jsonl", samples=40, rounds=0, generations=30)
    assert len(asked) == len(set(asked)) == 40
    learnt, got = explored("b.jsonl", samples=25, rounds=2, each=8, generations=30)
    assert 40 < len(asked) <= 40 + 25 + 16
    assert once.record.samples == 40
    assert learnt.record.samples == len(asked) - 40
    gaps = [abs(f.winner.accuracy - judge(f.winner.arch)) for f in (front_once, got)]
    assert gaps[1] < gaps[0]
    asked.clear()
    again = explored("b.jsonl", samples=25, rounds=2, each=8, generations=30)[1]
    assert again.members == got.members
    assert not asked  # all of it was in the file


def test_the_record_is_kept_and_drawn(tmp_path):
    got = found(budget=Budget(latency_ms=3), generations=20).save(tmp_path)
    assert nsga2.Front.load(tmp_path) == got
    path = tmp_path / "front.png"
    named = {"published": (2.0, 0.6), "other": (2.5, 0.7)}
    pareto.plot(got, path, named=named, measured={"other": (2.7, 0.69), "third": (2.2, 0.7)})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = path.read_bytes()
    pareto.plot(got, path, named=named, measured={"other": (2.7, 0.69), "third": (2.2, 0.7)})
    assert path.read_bytes() == first
    pareto.plot(got.model_copy(update={"budget": Budget()}), path, candidates=np.ones((4, 2)))
