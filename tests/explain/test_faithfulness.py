"""Insertion and deletion on a model whose probabilities are known shares of what it is shown."""

import numpy as np
import pytest

from edgekd.explain.faithfulness import faithfulness, random_map
from edgekd.runtimes import Outputs


def lit(images):
    """p(class 0) is the share of the light that is shown: 32 bright pixels in all."""
    p = np.clip(images[:, 0].astype(float).sum((1, 2)) / 32, 1e-12, 1 - 1e-12)
    logits = np.stack([np.log(p / (1 - p)), np.zeros(len(p))], 1).astype(np.float32)
    return Outputs(logits, images[:, :1])


IMAGE = np.zeros((3, 8, 8), np.float32)
IMAGE[:, :, :4] = 1  # the left half, 32 of 64 pixels
LEFT = np.zeros((8, 8), np.float32)
LEFT[:, :4] = 1


@pytest.mark.parametrize(
    ("heat", "expected"),
    [
        (LEFT, 0.75 - 0.25),  # p rises to 1 at half of the pixels, falls to 0 there
        (1 - LEFT, 0.25 - 0.75),
        (
            np.tile(LEFT.T[:1] * 0, (8, 1)),
            2 * (0.5 + 8 / 16 / 16) - 1,
        ),  # row by row, lit first
    ],
)
def test_by_hand(heat, expected):
    assert faithfulness(lit, IMAGE, heat, 0, fill="mean") == pytest.approx(expected, abs=1e-6)
    # of the other class the same pixels say the opposite
    assert faithfulness(lit, IMAGE, heat, 1, fill="mean") == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_batches_change_nothing(batch):
    heat = random_map((4, 4), 3)
    whole = faithfulness(lit, IMAGE, heat, 0)
    assert faithfulness(lit, IMAGE, heat, 0, batch=batch) == pytest.approx(whole, abs=1e-7)


def test_what_is_not_shown_is_blurred_or_grey():
    seen = []

    def spy(images):
        seen.append(images)
        return lit(images)

    faithfulness(spy, IMAGE, LEFT, 0, fill="mean")
    faithfulness(spy, IMAGE, LEFT, 0, fill="blur")
    grey, blurred = np.concatenate(seen[:2]), np.concatenate(seen[2:])
    assert len(grey) == len(blurred) == 32
    assert (grey[0] == 0).all()
    np.testing.assert_array_equal(grey[1], IMAGE)
    assert 0.05 < blurred[0, 0, 0, 4] < 0.95  # at the edge
    for shown in (grey, blurred):  # the hottest 1/16, the rest
        np.testing.assert_array_equal(shown[2][:, 0, :4], IMAGE[:, 0, :4])
        np.testing.assert_array_equal(shown[17][:, 1:], IMAGE[:, 1:])


def test_random_maps_explain_nothing():
    found = [
        faithfulness(lit, IMAGE, random_map((8, 8), seed), 0, fill="mean") for seed in range(60)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(60)
    assert np.std(found) > 0.02
    np.testing.assert_array_equal(random_map((8, 8), 1), random_map((8, 8), 1))


def test_a_hot_temperature_flattens():
    """Both areas go to a half."""
    plain = faithfulness(lit, IMAGE, LEFT, 0, fill="mean")
    flat = faithfulness(lit, IMAGE, LEFT, 0, fill="mean", temperature=50)
    assert plain == pytest.approx(0.5)
    assert 0 < flat < 0.3
