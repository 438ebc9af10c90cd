"""The layer that is explained, chosen by what its maps explain; and every layer by itself."""

import numpy as np
import pytest
import torch
from squares import squares

from edgekd.explain.score_cam import score_cam
from edgekd.models import feature_layers
from edgekd.models.zoo import Waist
from edgekd.records import EdgeKDError


class Staged(torch.nn.Module):
    """timm's interface; class k is the light in corner k. Stages: 12, 8 and 4 cells a side.

    The first sees where the light is; the second has nothing to do with the image.
    """

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))

    def forward_intermediates(self, x, output_fmt="NCHW", intermediates_only=False):
        x = x.mean(1, keepdim=True)
        light = (x - 1.5).clamp(min=0) + 0.05 * x.abs() + self.p  # blur leaves little of it
        fine = torch.nn.functional.adaptive_avg_pool2d(light, 12)
        many = torch.cat([fine * m for m in self.masks(12)], 1)
        generator = torch.Generator().manual_seed(0)
        wrong = torch.rand(1, 4, 8, 8, generator=generator).repeat(len(x), 1, 1, 1) + self.p
        final = torch.nn.functional.adaptive_avg_pool2d(light, 4)
        found = [many, wrong]
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
    assert staged.shapes == {"stage1": (4, 12, 12), "stage2": (4, 8, 8), "head": (1, 4, 4)}
    assert staged.layer == "stage1 4x12x12"  # the deepest of 12 cells a side
    other = staged.at("stage2")
    assert (other.layer, staged.layer) == ("stage2 4x8x8", "stage1 4x12x12")
    assert other.net is staged.net
    x = torch.rand(2, 3, 24, 24)
    assert other(x)[1].shape == (2, 4, 8, 8)
    torch.testing.assert_close(other(x)[0], staged(x)[0])
    assert Waist(staged.net, (24, 24), "head").layer == "head 1x4x4"
    with pytest.raises(EdgeKDError, match='no layer "stage7"; did you mean'):
        Waist(staged.net, (24, 24), "stage7")


def test_the_most_faithful_is_taken(staged):
    images, _ = squares(6, 1)
    best, scores = feature_layers.most_faithful(staged, images)
    assert best == "stage1"
    assert list(scores) == ["stage2 4x8x8", "stage1 4x12x12"]  # 4 cells a side are too few
    assert scores["stage1 4x12x12"] > 0.2
    assert scores["stage2 4x8x8"] < scores["stage1 4x12x12"] - 0.1
    # it is not the deepest, the first, or the rule's that is taken, but the best
    assert feature_layers.candidates(staged) == ["stage2", "stage1"]


def test_too_small_a_picture(staged):
    small = Waist(staged.net, (24, 24))
    small.shapes = {"head": (1, 4, 4)}
    with pytest.raises(EdgeKDError, match="7 cells a side"):
        feature_layers.candidates(small)


def test_layer_by_layer(staged):
    images, labels = squares(1, 2)
    found = feature_layers.by_depth(staged, images[0], int(labels[0]))
    assert [d.layer for d in found] == ["stage1 4x12x12", "stage2 4x8x8", "head 1x4x4"]
    with torch.no_grad():
        expected = staged(torch.from_numpy(images))[1][0].mean(0)
    np.testing.assert_allclose(found[0].average, expected, rtol=1e-6)
    heat = score_cam(feature_layers.session_of(staged), images[0], int(labels[0])).map
    np.testing.assert_array_equal(found[0].heat, heat)
    assert found[2].heat is None  # of one channel nothing is left, less the mean of channels
    assert all(d.seconds > 0 for d in found)
