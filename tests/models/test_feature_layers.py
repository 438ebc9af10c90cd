"""The layer that is explained, chosen by one rule; and every layer by itself."""

import numpy as np
import pytest
import torch
from squares import CORNERS, squares

from edgekd.explain.examine import rounded
from edgekd.explain.faithfulness import faithfulness
from edgekd.explain.fidelity import energy_inside, pearson
from edgekd.explain.score_cam import ask as masked_scores
from edgekd.explain.score_cam import class_maps, random_head, resize, score_cam
from edgekd.models import feature_layers
from edgekd.models.zoo import Waist
from edgekd.records import Artifact, EdgeKDError

STD = (1.0, 1.0, 1.0)


class Staged(torch.nn.Module):
    """timm's interface; class k is the light in corner k. Stages: 12, 8, 6 and 4 cells a side.

    The first sees where the light is, beside noise; the second what changes with every rounding;
    the third the same ramp through all its channels, whatever head reads it. The last has one
    channel, of which nothing is left, less the mean of channels.
    """

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0  # images

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x, output_fmt="NCHW", intermediates_only=False):
        self.seen += len(x)
        x = x.mean(1, keepdim=True)
        light = (x - 1.5).clamp(min=0) + 0.05 * x.abs() + self.p  # blur leaves little of it
        pool = torch.nn.functional.adaptive_avg_pool2d
        dim = 2 * x.abs().clamp(max=0.3)  # which is everywhere, and of no class
        sees = torch.cat([pool(s, 12) * m for s in (light, dim) for m in self.masks(12)], 1)
        noise = torch.sin(pool(x, 8) * torch.tensor([9e4, 7e4, 5e4, 3e4])[:, None, None]) + 1
        ramp = torch.linspace(0, 1, 6).expand(1, 1, 6, 6)
        blind = torch.cat([10 * ramp + 0.3 * pool(light, 6), ramp.expand(len(x), 1, 6, 6),
                           ramp + 0.01 * pool(light, 6)], 1)  # fmt: skip
        final = pool(light, 4)
        found = [sees, noise, blind]
        return found if intermediates_only else (final, found)

    @staticmethod
    def masks(n):
        half = n // 2
        for top in (0, half):
            for left in (0, half):
                m = torch.zeros(1, 1, n, n)
                m[:, :, top : top + half, left : left + half] = 1
                yield m

    def forward_features(self, x):
        return self.forward_intermediates(x)[0]

    def forward_head(self, x):
        return 20 * torch.stack(
            [x[:, 0, a : a + 2, b : b + 2].mean((1, 2)) for a in (0, 2) for b in (0, 2)], 1
        )


@pytest.fixture(scope="module")
def staged():
    return Waist(Staged().eval(), (24, 24)).eval()


def test_stages_are_named(staged):
    assert staged.shapes == {"stage1": (8, 12, 12), "stage2": (4, 8, 8), "stage3": (3, 6, 6),
                             "head": (1, 4, 4)}  # fmt: skip
    assert staged.layer == "stage1 8x12x12"  # the deepest of 12 cells a side
    other = staged.at("stage2")
    assert (other.layer, staged.layer) == ("stage2 4x8x8", "stage1 8x12x12")
    assert other.net is staged.net
    x = torch.rand(2, 3, 24, 24)
    assert other(x)[1].shape == (2, 4, 8, 8)
    torch.testing.assert_close(other(x)[0], staged(x)[0])
    assert Waist(staged.net, (24, 24), "head").layer == "head 1x4x4"
    with pytest.raises(EdgeKDError, match='no layer "stage7"; did you mean'):
        Waist(staged.net, (24, 24), "stage7")


def lesions(labels):
    """(n, 24, 24) bool: the bright squares themselves."""
    masks = np.zeros((len(labels), 24, 24), bool)
    for mask, label in zip(masks, labels, strict=True):
        top, left = CORNERS[label]
        mask[top + 3 : top + 9, left + 3 : left + 9] = True
    return masks


@pytest.mark.parametrize("masked", [False, True])
def test_the_stage_that_sees_the_light_is_chosen(staged, masked):
    images, labels = squares(6, 1)
    found = feature_layers.choose(staged, images, lesions(labels) if masked else None, STD)
    assert found.layer == "stage1"
    assert list(found.scores) == [
        "head 1x4x4", "stage3 3x6x6", "stage2 4x8x8", "stage1 8x12x12",
    ]  # fmt: skip
    nothing, blind, noise, sees = found.scores.values()
    assert (nothing["undefined"], nothing["out"], nothing["score"]) == (1, 1, 0)
    assert blind["head"] <= 0.1
    assert (blind["undefined"], blind["out"]) == (0, 1)
    assert noise["repeatable"] < 0.5
    assert noise["out"] == sees["out"] == 0
    assert sees["score"] > noise["score"] + 0.1
    for scores in found.scores.values():
        assert ("inside" in scores) == masked
    if masked:
        assert sees["inside"] > noise["inside"] + 0.2


def test_every_term_by_hand(staged):
    images, labels = squares(5, 3)
    masks = lesions(labels)
    masks[2] = False  # an image without a lesion says nothing of where it is
    net = staged.at("stage1")
    session = feature_layers.session_of(net)
    faithful, head, inside, repeatable = [], [], [], []
    for i, image in enumerate(images):
        passes = masked_scores(session, image)
        label = int(passes.logits.argmax())
        heat = class_maps(passes)[label]
        faithful.append(faithfulness(session, image, heat, label))
        head.append(pearson(heat, class_maps(random_head(passes, i))[label]))
        if masks[i].any():
            inside.append(energy_inside(resize(heat, (24, 24)), masks[i]))
        if i in (0, 1, 2, 4):  # four of five, spread evenly
            other = score_cam(session, rounded(image, STD, i), label).map
            repeatable.append(pearson(heat, other))
    head = [r for r in head if r is not None]
    energy, area = np.mean(inside), 36 / 576
    expected = {
        "faithful": np.mean(faithful), "head": min(1, 1 - np.mean(head)),
        "repeatable": np.mean(repeatable), "inside": energy / (energy + area),
        "undefined": 0, "out": 0,
    }  # fmt: skip
    expected["score"] = np.prod([expected[k] for k in feature_layers.TERMS]) ** 0.25
    scores = feature_layers.choose(staged, images, masks, STD).scores["stage1 8x12x12"]
    assert scores == pytest.approx(expected, abs=6e-5)  # they are kept to four digits


@pytest.mark.parametrize(
    ("terms", "score", "out"),
    [
        ({"faithful": 0.125, "head": 0.5, "repeatable": 1.0}, 0.0625 ** (1 / 3), 0),
        ({"faithful": 0.1, "head": 0.9, "repeatable": 0.9, "inside": 0.1}, 0.3, 0),
        ({"faithful": -0.1, "head": 1.0, "repeatable": 1.0}, 0, 0),  # worse than chance
        ({"faithful": 0.8, "head": 0.1, "repeatable": 0.8}, 0.4, 1),  # r of 0.9: blind
        ({"faithful": 0.8, "head": 0.125, "repeatable": 0.64}, 0.4, 0),
    ],
)
def test_the_score_is_a_geometric_mean(terms, score, out):
    found = feature_layers._scored(terms | {"undefined": 0.5})
    assert found["out"] == out
    assert found["score"] == pytest.approx(score)
    assert feature_layers._scored(terms | {"undefined": 0.51})["out"] == 1


def test_the_share_of_a_map_in_a_mask():
    heat = np.zeros((4, 4), np.float32)
    heat[:, :2] = 1
    mask = np.zeros((4, 4), bool)
    mask[:, 0] = True  # a quarter of the area, half of the map
    assert feature_layers._energy(heat, mask) == pytest.approx(0.5)
    assert feature_layers._energy(1 - heat, mask) == 0
    assert feature_layers._energy(np.full((4, 4), np.nan, np.float32), mask) == 0


def test_a_stage_that_is_out_is_chosen_only_where_all_are(staged, monkeypatch):
    images, _ = squares(2, 1)
    told = {
        "head": {"faithful": 0.9, "head": 0.05, "repeatable": 1.0, "undefined": 0.0},
        "stage3": {"faithful": 0.5, "head": 0.5, "repeatable": 1.0, "undefined": 0.6},
        "stage2": {"faithful": 0.2, "head": 0.2, "repeatable": 0.2, "undefined": 0.0},
        "stage1": {"faithful": 0.1, "head": 0.1, "repeatable": 0.1, "undefined": 0.6},
    }
    monkeypatch.setattr(feature_layers, "_terms", lambda net, *_: told[net.layer.split()[0]])
    assert feature_layers.choose(staged, images, None, STD).layer == "stage2"
    told["stage2"]["undefined"] = 1.0
    assert feature_layers.choose(staged, images, None, STD).layer == "stage3"


def test_few_channels_are_asked(staged, monkeypatch):
    """Of each image the map, 32 passes of insertion and deletion; of four the map once more."""
    assert feature_layers.PASSES == 4 * (16 * (1 + 32 + 32) + 4 * (1 + 32))
    images, _ = squares(6, 1)
    monkeypatch.setattr(feature_layers, "candidates", lambda net: ["stage1"])
    for most, asked in ((32, 8), (4, 4)):
        monkeypatch.setattr(feature_layers, "CHANNELS", most)
        staged.net.seen = 0
        feature_layers.choose(staged, images, None, STD)
        assert staged.net.seen == 6 * (1 + asked + 32) + 4 * (1 + asked)


def test_a_choice_is_made_once(staged, tmp_path):
    images, labels = squares(3, 1)
    spec = {"classes": ("a", "b", "c", "d"), "size": (24, 24), "mean": (0,) * 3, "std": STD}
    trained = Artifact.parse(
        {"kind": "teacher", "model": "m", "files": {"w": "0" * 64}, "spec": spec, "params": 1,
         "macs": 1}, "test",
    )  # fmt: skip
    folder = tmp_path / "teacher"

    def chosen(trained=trained, masks=None):
        staged.net.seen = 0
        found = feature_layers.kept_choice(trained, images, masks, folder, net=staged)
        return found, staged.net.seen > 0

    first, asked = chosen()
    assert asked
    assert first == feature_layers.choose(staged, images, None, STD)
    assert chosen() == (first, False)
    with_masks, asked = chosen(masks=lesions(labels))
    assert asked  # where lesions are, counts
    assert "inside" in with_masks.scores["stage1 8x12x12"]
    assert chosen() == (first, False)  # and both are kept
    assert chosen(trained.model_copy(update={"files": {"w": "1" * 64}}))[1]  # another network
    assert len(list(folder.glob("layer-*.json"))) == 3


def test_scores_of_an_earlier_edgekd_are_known():
    assert feature_layers.by_earlier_rule({"stage3 40x16x16": 0.2, "stage2 24x32x32": 0.1})
    assert not feature_layers.by_earlier_rule({"stage3 40x16x16": {"score": 0.2}})
    assert not feature_layers.by_earlier_rule(None)


def test_too_small_a_picture(staged):
    small = Waist(staged.net, (24, 24))
    small.shapes = {"head": (1, 3, 3)}
    with pytest.raises(EdgeKDError, match="4 cells a side"):
        feature_layers.candidates(small)


def test_layer_by_layer(staged):
    images, labels = squares(1, 2)
    found = feature_layers.by_depth(staged, images[0], int(labels[0]))
    assert [d.layer for d in found] == ["stage1 8x12x12", "stage2 4x8x8", "stage3 3x6x6",
                                        "head 1x4x4"]  # fmt: skip
    with torch.no_grad():
        expected = staged(torch.from_numpy(images))[1][0].mean(0)
    np.testing.assert_allclose(found[0].average, expected, rtol=1e-6)
    heat = score_cam(feature_layers.session_of(staged), images[0], int(labels[0])).map
    np.testing.assert_array_equal(found[0].heat, heat)
    assert found[3].heat is None  # of one channel nothing is left, less the mean of channels
    assert all(d.seconds > 0 for d in found)
