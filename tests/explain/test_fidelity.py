import numpy as np
import pytest
import scipy.stats

from edgekd.explain.fidelity import (
    Cases,
    Maps,
    beyond_chance,
    bootstrap,
    clopper_pearson,
    compare,
    energy_inside,
    explain_set,
    from_grid,
    iou_top,
    pearson,
    pointing_hit,
    spearman,
    to_grid,
)
from edgekd.explain.score_cam import resize
from edgekd.records import Artifact, Calibration, EdgeKDError, Spec, Threshold
from edgekd.runtimes import Outputs

NAN = np.full((4, 4), np.nan)
FLAT = np.full((4, 4), 0.1)


def artifact():
    return Artifact(
        kind="onnx",
        model="m",
        files={"model.onnx": "ab" * 32},
        spec=Spec(classes=("a", "b"), size=(28, 28)),
        layer="head",
        params=1,
        macs=1,
    )


def random_maps(n=24, g=4, seed=0):
    return np.random.default_rng(seed).random((n, g, g)).astype(np.float32)


def cases(n=24, masks=None):
    """n images of n / 2 patients, two each, all explained as "a" but the last four."""
    return Cases(
        images=[f"{i}.png" for i in range(n)],
        labels=["a"] * n,
        explained=["a"] * (n - 4) + ["b"] * 4,
        groups=[f"p{i // 2}" for i in range(n)],
        masks=masks,
    )


def maps(array):
    logits = np.tile(np.float32([2 * np.log(3), 0]), (len(array), 1))
    return Maps(np.asarray(array, np.float32), logits, 0.5)


def against(reference, other, **kw):
    n = len(reference)
    return compare("x", artifact(), "torch", cases(n, **kw), maps(reference), maps(other))


def test_correlations_are_scipys():
    a, b = random_maps(2).round(1).astype(float)  # rounded: ties
    assert pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a.ravel(), b.ravel())[0])
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a.ravel(), b.ravel())[0])
    assert pearson(a, 3 - 2 * a) == pytest.approx(-1)
    assert spearman(a, np.exp(9 * a)) == pytest.approx(1)


def test_iou_by_hand():
    a = np.arange(10.0).reshape(2, 5)
    b = np.array([[0, 0, 0, 0, 9.0], [0, 0, 0, 0, 8]])
    assert iou_top(a, b) == pytest.approx(1 / 3)  # {8, 9} and {4, 9}
    assert iou_top(a, a) == 1
    assert iou_top(a, -a) == 0
    tied = np.array([[1.0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])  # the first two of the four
    assert iou_top(tied, np.array([[9.0, 8, 0, 0, 0], [0] * 5])) == 1
    tied = np.random.default_rng(0).integers(2, size=(14, 14))  # half of them highest
    first = np.zeros(196)
    first[np.flatnonzero(tied)[:39]] = 1
    assert iou_top(tied, first.reshape(14, 14)) == 1


@pytest.mark.parametrize("figure", [pearson, spearman, iou_top])
@pytest.mark.parametrize("nothing", [NAN, FLAT, FLAT + 1e-12 * random_maps(1)[0], FLAT * 0])
def test_nothing_to_say(figure, nothing):
    something = random_maps(1)[0]
    assert figure(something, nothing) is None
    assert figure(nothing, something) is None


def test_energy_and_hit_by_hand():
    heat = np.array([[1.0, 2.0], [5.0, 2.0]])
    mask = np.array([[True, False], [False, True]])
    assert energy_inside(heat, mask) == pytest.approx(0.3)
    assert (pointing_hit(heat, mask), pointing_hit(heat, ~mask)) == (0, 1)
    for h, m in [(heat * 0, mask), (heat * np.nan, mask), (heat, mask & False)]:
        assert energy_inside(h, m) is None
        assert pointing_hit(h, m) is None


def test_to_grid():
    heat = np.arange(16.0).reshape(4, 4)
    np.testing.assert_allclose(to_grid(heat, 2), [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_allclose(to_grid(heat, 4), heat)
    # three points on two cells: the middle one is shared
    np.testing.assert_allclose(to_grid(np.array([[3.0, 6, 9]] * 3), 2), [[4, 8]] * 2, rtol=1e-6)
    np.testing.assert_allclose(to_grid(heat, 14), resize(heat, (14, 14)))
    np.testing.assert_allclose(from_grid(to_grid(heat, 14), heat.shape), heat, atol=1e-5)
    assert to_grid(np.ones((3, 20)), 14).shape == (14, 14)
    np.testing.assert_allclose(to_grid(np.ones((3, 20)), 14), 1, rtol=1e-6)


def test_itself():
    c = against(random_maps(), random_maps())
    assert {k: a.value for k, a in c.aggregate.items()} == pytest.approx(
        {"pearson": 1, "spearman": 1, "iou20": 1, "kappa": 1, "identification": 1, "lost": 0}
    )
    assert (c.aggregate["pearson"].low, c.aggregate["pearson"].n) == (pytest.approx(1), 24)
    assert abs(c.aggregate["pearson"].null) < 0.1
    assert c.undefined == 0
    assert c.images[0].figures.keys() == {
        "pearson", "spearman", "iou20", "identification", "lost",
    }  # fmt: skip
    # none of 12 patients is lost: as many as 26 % may be (Clopper and Pearson)
    assert c.aggregate["lost"].high == pytest.approx(scipy.stats.beta.ppf(0.975, 1, 12))


def test_null_is_the_mean_over_strangers():
    """Another patient, the same class explained; never the patient's other image."""
    r, q = random_maps(), random_maps(seed=1)
    c = against(r, q)
    for key, figure in [("pearson", pearson), ("spearman", spearman), ("iou20", iou_top)]:
        assert c.images[3].figures[key] == pytest.approx(figure(r[3], q[3]))
        strangers = [i for i in range(20) if i not in (2, 3)]
        expected = np.mean([figure(r[3], q[i]) for i in strangers])
        assert c.images[3].null[key] == pytest.approx(expected)
        expected = np.mean([figure(r[20], q[i]) for i in (22, 23)])
        assert c.images[20].null[key] == pytest.approx(expected)


def test_anothers_maps_agree_no_better_than_the_null():
    r = random_maps(200, seed=2) + 2 * random_maps(1, seed=3)  # with an anatomy in common
    good, rolled = against(r, r + 0.05 * random_maps(200, seed=4)), against(r, np.roll(r, 2, 0))
    pearson = rolled.aggregate["pearson"]
    assert pearson.null > 0.5
    assert pearson.value == pytest.approx(pearson.null, abs=0.03)
    assert good.aggregate["pearson"].low > 0.95


def test_kappa_is_agreement_beyond_strangers():
    r = random_maps(60, seed=2) + 2 * random_maps(1, seed=3)  # with an anatomy in common
    q = r + 0.3 * random_maps(60, seed=4)
    c = against(r, q)
    own, null = c.aggregate["pearson"].value, c.aggregate["pearson"].null
    assert c.aggregate["kappa"].value == pytest.approx((own - null) / (1 - null))
    assert c.aggregate["kappa"].low < c.aggregate["kappa"].value < c.aggregate["kappa"].high
    assert against(r, np.roll(r, 2, 0)).aggregate["kappa"].value == pytest.approx(0, abs=0.1)
    assert against(r, 9 - r).aggregate["kappa"].high < -0.1


def test_identification_and_lost_by_hand():
    """Three patients of one class: of a's strangers one agrees less than its own map does."""
    cross = np.array([[0.5, 0.4, 0.9], [0.1, 0.8, 0.8], [0.2, np.nan, np.nan]])
    stranger = ~np.eye(3, dtype=bool)
    found, limit = beyond_chance(cross, stranger)
    np.testing.assert_allclose(found["identification"], [0.5, 0.75, np.nan])  # equals: a half
    assert limit == pytest.approx(np.quantile([0.4, 0.9, 0.1, 0.8, 0.2], 0.95))
    np.testing.assert_array_equal(found["lost"], [1, 1, 1])  # an undefined map is lost
    found, limit = beyond_chance(np.eye(3), stranger)
    np.testing.assert_array_equal(found["identification"], [1, 1, 1])
    np.testing.assert_array_equal(found["lost"], [0, 0, 0])
    found, limit = beyond_chance(np.eye(3), stranger & False)
    assert np.isnan(limit)
    assert np.isnan([*found["identification"], *found["lost"]]).all()


def test_one_map_for_all_identifies_nobody():
    r = random_maps(40, seed=2) + 2 * random_maps(1, seed=3)
    c = against(r, np.tile(r.mean(0), (40, 1, 1)))
    assert c.aggregate["pearson"].value > 0.5  # and means nothing
    assert c.aggregate["kappa"].value == pytest.approx(0, abs=1e-6)
    assert c.aggregate["identification"].value == pytest.approx(0.5)
    assert c.aggregate["lost"].value > 0.8


def test_anothers_maps_are_lost():
    r = random_maps(40, seed=2) + 2 * random_maps(1, seed=3)
    c = against(r, np.roll(r, 2, 0))
    assert c.aggregate["identification"].value == pytest.approx(0.5, abs=0.1)
    assert c.aggregate["lost"].value > 0.8


@pytest.mark.parametrize(("k", "n"), [(0, 80), (3, 80), (40, 100), (5, 5)])
def test_exact_intervals_are_scipys(k, n):
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="exact")
    assert clopper_pearson(k, n) == pytest.approx(tuple(expected), abs=1e-9)


def test_parts_are_of_their_images_alone():
    r = random_maps(80, seed=2)
    q = r + 0.3 * random_maps(80, seed=4)
    q[:40] = r[40:]  # the first class's maps are others'
    names = [f"{i}" for i in range(80)]
    given = Cases(names, ["a"] * 40 + ["b"] * 40, ["a"] * 80, names,
                  subgroups=["m"] * 10 + ["f"] * 69 + [""])  # fmt: skip
    found = compare("x", artifact(), "torch", given, maps(r), maps(q)).parts
    assert list(found) == ["class a", "class b", "subgroup f", "subgroup m"]
    assert found["subgroup m"] == {}  # 10 patients say nothing
    assert found["class a"]["kappa"].value == pytest.approx(0, abs=0.1)
    assert found["class b"]["kappa"].low > 0.8
    assert found["class a"]["lost"].value > 0.8
    assert found["class b"]["lost"].value == 0
    assert found["class b"]["lost"].high == pytest.approx(scipy.stats.beta.ppf(0.975, 1, 40))
    assert found["subgroup f"]["kappa"].n == 69


def test_copies_of_a_patient_say_nothing_new():
    """24 images of 12 patients, or 24 of 24: fewer patients, a wider interval."""
    r = random_maps(seed=2)
    q = r + 1.5 * random_maps(seed=4)
    twice = [np.repeat(x[:12], 2, 0) for x in (r, q)]
    pairs = against(*twice).aggregate["kappa"]
    alone = compare("x", artifact(), "torch", cases()._replace(groups=[str(i) for i in range(24)]),
                    maps(twice[0]), maps(twice[1])).aggregate["kappa"]  # fmt: skip
    assert pairs.high - pairs.low > 1.2 * (alone.high - alone.low)


def test_undefined_maps_are_counted_and_left_out():
    r, q = random_maps(), random_maps()
    q[:3] = np.nan
    c = against(r, q)
    assert c.undefined == 3
    assert c.aggregate["pearson"].n == 21
    assert c.images[0].figures["pearson"] is None
    assert c.images[0].null["pearson"] is not None  # its strangers' maps are defined
    assert c.aggregate["pearson"].value == pytest.approx(1)


def test_no_strangers_no_null():
    two = Cases(["0", "1"], ["a", "b"], ["a", "b"], ["p", "q"])
    m = maps(random_maps(2))
    c = compare("x", artifact(), "torch", two, m, m)
    assert c.aggregate["pearson"].null is None
    assert c.images[0].null["pearson"] is None
    assert "kappa" not in c.aggregate
    assert c.limit is None


def test_one_patient_has_no_interval():
    one = Cases(["0", "1"], ["a", "a"], ["a", "a"], ["p", "p"])
    m = maps(random_maps(2))
    c = compare("x", artifact(), "torch", one, m, m)
    assert c.aggregate == {}
    assert c.images[0].figures["pearson"] == pytest.approx(1)


def test_localisation_is_that_of_the_upsampled_map():
    rng = np.random.default_rng(5)
    masks = rng.random((24, 12, 20)) < 0.2
    masks[5] = False  # no mask
    q = random_maps(seed=6)
    q[7] = np.nan
    c = against(random_maps(), q, masks=masks)
    up = [resize(m, (12, 20)) for m in q]
    for i in (0, 9, 21):
        energy = energy_inside(up[i], masks[i])
        assert c.images[i].figures["energy"] == pytest.approx(energy, rel=1e-5)
        expected = energy / masks[i].mean()
        assert c.images[i].figures["enrichment"] == pytest.approx(expected, rel=1e-5)
        assert c.images[i].figures["hit"] == pointing_hit(up[i], masks[i])
    strangers = [o for o in range(20) if o not in (8, 9, 7)]
    expected = np.mean([energy_inside(up[o], masks[9]) for o in strangers])
    assert c.images[9].null["energy"] == pytest.approx(expected, rel=1e-5)
    expected = np.mean([pointing_hit(up[o], masks[9]) for o in strangers])
    assert c.images[9].null["hit"] == pytest.approx(expected)
    assert {c.images[i].figures["energy"] for i in (5, 7)} == {None}
    assert (c.images[5].figures["hit"], c.images[5].null["hit"]) == (None, None)
    assert c.images[5].figures["pearson"] is not None
    assert c.aggregate["energy"].n == 22


def test_energy_beats_its_null_if_the_maps_are_of_the_masks():
    rng = np.random.default_rng(7)
    q, masks = np.full((24, 4, 4), 0.05, np.float32), np.zeros((24, 16, 16), bool)
    for i, (row, column) in enumerate(rng.integers(4, size=(24, 2))):
        q[i, row, column] = 1
        masks[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    c = against(q, q, masks=masks)
    assert c.aggregate["hit"].value == 1
    assert c.aggregate["hit"].null < 0.3
    assert c.aggregate["enrichment"].low > 3
    assert c.aggregate["enrichment"].null == pytest.approx(1, abs=0.4)


def test_intervals_draw_patients():
    values = np.random.default_rng(8).normal(size=30)
    low, high = bootstrap(values, np.arange(30), 0)
    half = 1.96 * values.std() / np.sqrt(30)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    tenfold = np.repeat(values, 10)  # ten copies of each patient's image say nothing new
    assert bootstrap(tenfold, np.repeat(np.arange(30), 10), 0) == pytest.approx((low, high))
    narrow = bootstrap(tenfold, np.arange(300), 0)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)


def test_intervals_depend_on_the_seed_only():
    values, member = np.random.default_rng(9).normal(size=30), np.arange(30)
    assert bootstrap(values, member, 1) == bootstrap(values, member, 1)
    assert bootstrap(values, member, 1) != bootstrap(values, member, 2)


def blocks(images):
    """The image in 14x14 blocks, twice over; class 0 likes its left half light, class 1 dark."""
    n = len(images)
    light = images.mean(1).reshape(n, 14, 2, 14, 2).mean((2, 4))
    score = light[..., :7].sum((1, 2))
    return Outputs(np.stack([score, -score], 1), np.stack([light, light.max() - light], 1))


def test_explain_set():
    images = np.random.default_rng(10).random((3, 3, 28, 28)).astype(np.float32)
    images[2] = 0  # flat: undefined
    told = []

    def track(items, what, total=None):
        told.append((what, total))
        return items

    found = explain_set(blocks, images, np.array([0, 1, 0]), grid=7, track=track)
    assert found.maps.shape == (3, 7, 7)
    assert np.isnan(found.maps).any((1, 2)).tolist() == [False, False, True]
    assert found.logits.argmax(1).tolist() == [0, 0, 0]
    assert found.seconds > 0
    assert told == [("explaining", 3)]


def test_explain_set_of_nothing():
    with pytest.raises(EdgeKDError, match="no images to explain"):
        explain_set(blocks, np.zeros((0, 3, 28, 28), np.float32), np.zeros(0, int))


def test_answers_are_named():
    r = maps(random_maps(8))
    c = compare(
        "x", artifact(), "torch", cases(8), r, r._replace(logits=np.tile(np.eye(2), (4, 1)))
    )
    assert [a.answer for a in c.images] == list("abababab")
    assert (c.layer, c.precision, c.seconds_per_map) == ("head", "fp32", 0.5)


def test_the_probability_shown_is_calibrated():
    """Logits of 2 ln 3 and 0: 0.9 as trained, 0.75 at temperature 2."""
    r = maps(random_maps(8))
    at = {c: Threshold(probability=0.5, val_sensitivity=1, val_specificity=1) for c in "ab"}
    fitted = Calibration(temperature=2, method="nll", thresholds=at)
    for calibration, expected in ((None, 0.9), (fitted, 0.75)):
        made = artifact().model_copy(update={"calibration": calibration})
        shown = compare("x", made, "torch", cases(8), r, r).images
        assert [a.probability for a in shown] == pytest.approx([expected] * 8)
