"""What the accuracy predictor learns from a hundred sub-nets, and that it can be stopped."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edgekd.ofa import accuracy_predictor, spaces
from edgekd.ofa.accuracy_predictor import AccuracyPredictor, collect, imagenet, ranking, to_judge
from edgekd.ofa.encoding import Genome
from edgekd.records import Arch, EdgeKDError

SPACE, PIXELS = "ofa-mbv3-w1.2", (160, 192, 224)
BESIDE = Path(__file__).parents[3] / "shared" / "facts" / "ofa" / "acc_predictor.pth"
RELEASED = Path(os.environ.get("EDGEKD_OFA_PREDICTOR", BESIDE))
released = pytest.mark.skipif(
    not RELEASED.exists(), reason=f"no {RELEASED}: set EDGEKD_OFA_PREDICTOR to acc_predictor.pth"
)


def truth(archs):
    """Mostly additive over blocks, with returns that diminish, as real accuracies are."""
    found = []
    for arch in archs:
        used = spaces.used(arch)
        gain = sum((arch.kernel[i] / 3 + arch.expand[i]) * (1 + i % 4) for i in used)
        found.append(0.9 - 0.4 * np.exp(-gain / 100) - 3 / arch.resolution)
    return np.array(found)


@pytest.fixture(scope="module")
def fitted():
    archs = to_judge(SPACE, PIXELS, 100)
    y = truth(archs)
    noisy = y + 0.3 * y.std() * np.random.default_rng(0).standard_normal(len(y))
    return archs, noisy, AccuracyPredictor.fit(archs, noisy, PIXELS)


def test_unseen_sub_nets_are_ranked_and_the_promise_is_honest(fitted):
    _, _, model = fitted
    unseen = to_judge(SPACE, PIXELS, 300, seed=7)[9:]
    agreement = ranking(model.of(unseen), truth(unseen))
    assert agreement.kendall > 0.65
    assert agreement.rmse < 0.02
    promised = model.record.ranking  # against noisy accuracies, so not better than the truth
    assert (promised.samples, promised.folds) == (100, 5)
    assert 0.5 < promised.kendall <= agreement.kendall + 0.05
    assert promised.kendall < promised.spearman < 1


def test_the_same_pairs_and_seed_give_the_same_predictor(fitted, tmp_path):
    archs, accuracies, model = fitted
    again = AccuracyPredictor.fit(archs, accuracies, PIXELS)
    unseen = to_judge(SPACE, PIXELS, 50, seed=3)
    assert (again.of(unseen) == model.of(unseen)).all()
    record = model.save(tmp_path)
    assert set(record.files) == {"predictor.safetensors"}
    loaded = AccuracyPredictor.load(tmp_path)
    assert loaded.record == record
    assert (loaded.of(unseen) == model.of(unseen)).all()
    (tmp_path / "predictor.safetensors").write_bytes(b"other")
    with pytest.raises(EdgeKDError, match="is not the file that was saved"):
        AccuracyPredictor.load(tmp_path)


def test_places_without_a_block_and_the_order_of_resolutions_do_not_matter(fitted):
    model = fitted[2]
    genome = Genome(SPACE, (224, 160))
    rows = genome.sample(64, np.random.default_rng(0))
    over = model.over(SPACE, (224, 160))
    found = over(*genome.split(rows))
    np.testing.assert_allclose(found, over(*genome.split(genome.canonical(rows))))
    np.testing.assert_allclose(found, model.of(genome.decode(rows)))
    with pytest.raises(EdgeKDError, match=r"knows ofa-mbv3-w1.2 at 160, 192, 224 px, not .* 96,"):
        model.over(SPACE, (96, 160))


def test_the_perceptrons_count_as_far_as_they_predict(monkeypatch):
    """Whether a stage is deep matters only if another is not: no line can say that."""
    archs = to_judge(SPACE, PIXELS, 160)
    y = np.array([0.6 + 0.1 * ((a.depth[0] > 3) ^ (a.depth[4] > 3)) for a in archs])
    assert accuracy_predictor._share(np.array([1.0, -1.0]), np.array([0.5, -0.5])) == 0.5
    assert accuracy_predictor._share(np.array([1.0, -1.0]), np.array([-0.5, 0.5])) == 0.0
    monkeypatch.setattr(accuracy_predictor, "STEPS", 30)
    model = AccuracyPredictor.fit(archs, y, PIXELS)
    assert 0 < model.record.share <= 1
    assert np.corrcoef(model.of(archs), y)[0, 1] > 0.5


def test_agreement_by_hand():
    same = ranking(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3]))
    assert same.kendall == pytest.approx(4 / 6)
    assert same.spearman == pytest.approx(0.8)
    assert same.rmse == pytest.approx(0.5**0.5)
    assert ranking(np.ones(3), np.arange(3.0)).kendall == 0


@pytest.mark.parametrize(
    ("count", "value", "message"),
    [(5, 0.5, "at least 20"), (30, np.nan, "are no finite numbers")],
)
def test_what_cannot_be_learnt_from_is_refused(count, value, message):
    archs = to_judge(SPACE, PIXELS, count)
    with pytest.raises(EdgeKDError, match=message):
        AccuracyPredictor.fit(archs, [value] * count, PIXELS)


def uniform(kernel, expand, depth, resolution):
    return Arch(space=SPACE, kernel=(kernel,) * 20, expand=(expand,) * 20, depth=(depth,) * 5,
                resolution=resolution)  # fmt: skip


@released
def test_the_released_predictor_says_what_it_says_in_the_reference_code():
    ofa595 = spaces.named("ofa-595")[1]
    archs = [uniform(7, 6, 4, 224), uniform(3, 3, 2, 160), uniform(3, 6, 4, 224),
             uniform(5, 4, 3, 192), ofa595.model_copy(update={"resolution": 208}),
             ofa595.model_copy(update={"resolution": 224})]  # fmt: skip
    expected = [0.83593, 0.75312, 0.82842, 0.80593, 0.82953, 0.83213]
    np.testing.assert_allclose(imagenet(RELEASED, archs), expected, atol=1e-5)


@released
def test_the_released_predictor_is_a_prior(tmp_path, monkeypatch):
    """Accuracies like ImageNet's, measured with as much noise as there is signal."""
    archs, unseen = to_judge(SPACE, PIXELS, 60), to_judge(SPACE, PIXELS, 300, seed=7)
    y, there = imagenet(RELEASED, archs).astype(float), imagenet(RELEASED, unseen)
    y = 0.5 + 2 * y + 2 * y.std() * np.random.default_rng(0).standard_normal(len(y))
    monkeypatch.setattr(accuracy_predictor, "STEPS", 10)
    alone = AccuracyPredictor.fit(archs, y, PIXELS)
    helped = AccuracyPredictor.fit(archs, y, PIXELS, prior=RELEASED)
    gained = [ranking(m.of(unseen), there).kendall for m in (alone, helped)]
    assert gained[1] > gained[0] + 0.1
    helped.save(tmp_path)  # the prior travels with it
    assert (AccuracyPredictor.load(tmp_path).of(unseen) == helped.of(unseen)).all()
    others = to_judge("ofa-lite-w1.0", PIXELS, 30)
    with pytest.raises(EdgeKDError, match="leave the prior out"):
        AccuracyPredictor.fit(others, np.linspace(0, 1, 30), PIXELS, prior=RELEASED)


def test_a_file_that_is_not_the_released_predictor(tmp_path):
    for content, message in ((b"no", "is not OFA's"), (None, "is not there")):
        path = tmp_path / f"{message}.pth"
        if content:
            path.write_bytes(content)
        with pytest.raises(EdgeKDError, match=message):
            imagenet(path, [uniform(3, 3, 2, 160)])


# ---- collecting


def test_the_list_is_the_same_begins_with_the_ends_and_only_grows():
    short, long = to_judge(SPACE, PIXELS, 20), to_judge(SPACE, PIXELS, 40)
    assert long[:20] == short
    assert len(set(long)) == 40
    assert short[0] == spaces.canonical(spaces.uniform(SPACE, "min", 160))
    assert spaces.canonical(spaces.uniform(SPACE, "max", 224)) in short[:9]
    assert to_judge(SPACE, PIXELS, 40, seed=1)[9:] != long[9:]


def test_collecting_goes_on_after_a_torn_line(tmp_path):
    out, asked = tmp_path / "new" / "evaluated.jsonl", []

    def judge(arch):
        asked.append(arch)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return len(asked) / 100

    with pytest.raises(KeyboardInterrupt):
        collect(SPACE, PIXELS, 10, judge, out)
    assert len(out.read_text().splitlines()) == 6
    out.write_bytes(out.read_bytes()[:-9])  # killed while it wrote the sixth
    pairs = collect(SPACE, PIXELS, 10, judge, out)
    assert [a for a, _ in pairs] == to_judge(SPACE, PIXELS, 10)
    assert [v for _, v in pairs[:5]] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert len(asked) == 7 + 5
    assert all(json.loads(x) for x in out.read_text().splitlines())
    assert collect(SPACE, PIXELS, 10, judge, out) == pairs
    assert collect(SPACE, PIXELS, 4, judge, out) == pairs[:4]
    assert len(asked) == 12


def test_a_list_of_something_else_is_refused(tmp_path):
    out = tmp_path / "evaluated.jsonl"
    collect(SPACE, PIXELS, 3, lambda a: 0.5, out)
    with pytest.raises(EdgeKDError, match=r"not ofa-lite-w1.0: move it away"):
        collect("ofa-lite-w1.0", PIXELS, 3, lambda a: 0.5, out)
    out.write_text("[]\n" + out.read_text())
    with pytest.raises(EdgeKDError, match="jsonl:1 is not an evaluated sub-net"):
        collect(SPACE, PIXELS, 3, lambda a: 0.5, out)
    with pytest.raises(EdgeKDError, match="has accuracy nan"):
        collect(SPACE, PIXELS, 3, lambda a: float("nan"), tmp_path / "other.jsonl")
