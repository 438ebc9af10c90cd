"""What a student is told, by hand: soft targets, several teachers, attention, likeness, mixing."""

import math

import pytest
import torch
from torch.nn import functional as F

from edgekd.data import augment
from edgekd.records import EdgeKDError, Training
from edgekd.train import losses
from edgekd.train.losses import hybrid, wanted
from edgekd.train.soft_targets import Said, attention

LN3 = math.log(3)
STUDENT, TEACHER = torch.tensor([[0.0, LN3]]), torch.tensor([[LN3, 0.0]])


def soft(student, *teachers, labels=(0,), **training):
    asked = Training(alpha_hard=0, **training)
    target = wanted(torch.tensor(labels), 2, [Said(t) for t in teachers], asked)
    return hybrid(student, target, asked).soft


def test_the_soft_loss_by_hand():
    """Teacher (3/4, 1/4), student (1/4, 3/4): KL = 1/2 ln 3 at T = 1."""
    assert soft(STUDENT, TEACHER, temperature=1) == pytest.approx(0.5 * LN3)
    assert soft(2 * STUDENT, 2 * TEACHER, temperature=2) == pytest.approx(4 * 0.5 * LN3)
    plain = soft(2 * STUDENT, 2 * TEACHER, temperature=2, t_squared=False)
    assert plain == pytest.approx(0.5 * LN3)


def test_several_teachers():
    """The second agrees with the student, so it adds nothing."""
    assert soft(STUDENT, TEACHER, STUDENT, temperature=1) == pytest.approx(0.25 * LN3)
    heavy = soft(STUDENT, TEACHER, STUDENT, temperature=1, teachers="3,1")
    assert heavy == pytest.approx(0.75 * 0.5 * LN3)
    # Of label 0 the first is 3/4 sure, the second 1/4: errors ln 4/3 and ln 4, so exp are 4/3, 4.
    sure = soft(STUDENT, TEACHER, STUDENT, temperature=1, teachers="confidence")
    assert sure == pytest.approx((1 - 1 / 4) * 0.5 * LN3)
    with pytest.raises(EdgeKDError, match="are 3 weights for 2 teachers"):
        soft(STUDENT, TEACHER, STUDENT, teachers="1,1,1")


def test_an_unknown_way_to_count_teachers():
    with pytest.raises(EdgeKDError, match="teachers"):
        Training.parse({"teachers": "best"}, "--set")


def test_labels_smoothed_and_weighted():
    """CE of (1/4, 3/4) with label 0 is ln 4, with label 1 ln 4/3."""
    target = wanted(torch.tensor([0]), 2, [], Training(label_smoothing=0.2))
    torch.testing.assert_close(target.labels, torch.tensor([[0.9, 0.1]]))
    loss = hybrid(STUDENT, target, Training())
    assert loss.total.item() == pytest.approx(0.9 * math.log(4) + 0.1 * math.log(4 / 3))
    whole = wanted(torch.tensor([0]), 2, [], Training())
    twice = hybrid(STUDENT, whole, Training(), weights=torch.tensor([2.0, 1.0]))
    assert twice.hard == pytest.approx(2 * math.log(4))


def test_attention_is_the_energy_over_channels():
    features = torch.zeros(1, 2, 1, 2)
    features[0, :, 0, 0] = torch.tensor([1.0, 1.0])  # energy 2
    features[0, 0, 0, 1] = -1.0  # energy 1
    expected = torch.tensor([[[2.0, 1.0]]]) / 5**0.5
    torch.testing.assert_close(attention(features), expected)
    assert losses.attention_loss(features, [expected]).item() == pytest.approx(0, abs=1e-6)
    elsewhere = features.flip(3)  # (1, 2) / sqrt 5 against (2, 1) / sqrt 5
    assert losses.attention_loss(elsewhere, [expected]).item() == pytest.approx(0.4)
    with pytest.raises(EdgeKDError, match="attention cannot be cut"):
        Training.parse({"attention": 1, "cutmix": 1}, "--set")


def test_attention_at_another_grid_is_resized():
    features = torch.rand(2, 3, 8, 8)
    wished = F.avg_pool2d(attention(features), 2)
    wished = wished / wished.flatten(1).norm(dim=1)[:, None, None]
    assert losses.attention_loss(features, [wished]).item() < 0.02


def test_likeness_by_hand():
    """G of unit rows e1, e1, e2: (1, 1, 0) / sqrt 2 twice and (0, 0, 1)."""
    last = torch.eye(2)[[0, 0, 1]][:, :, None, None]
    assert losses.likeness_loss(last, [torch.eye(2)[[0, 0, 1]] * 7]).item() == pytest.approx(0)
    # Told that all are alike, each row (1, 1, 1) / sqrt 3.
    a, b = 1 / 2**0.5, 1 / 3**0.5
    by_hand = (2 * (2 * (a - b) ** 2 + b**2) + 2 * b**2 + (1 - b) ** 2) / 9
    assert losses.likeness_loss(last, [torch.ones(3, 1)]).item() == pytest.approx(by_hand)


def test_mixup_mixes_images_labels_and_soft_targets_alike():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    asked = Training(mixup=0.4)
    mixed = augment.mix(images, asked, seed=0, step=5)
    for i in range(4):
        share, other = mixed.own[i].item(), mixed.partner[i].item()
        expected = share * i + (1 - share) * other
        assert mixed.images[i].mean().item() == pytest.approx(expected, abs=1e-5)
    target = wanted(torch.arange(4), 4, [Said(50 * torch.eye(4))], asked, mixed)
    torch.testing.assert_close(target.labels @ torch.arange(4.0), mixed.images[:, 0, 0, 0])
    sure = wanted(torch.arange(4), 4, [Said(500 * torch.eye(4))], asked, mixed)
    torch.testing.assert_close(sure.soft[0].exp(), target.labels, atol=1e-5, rtol=0)
    again = augment.mix(images, asked, seed=0, step=5)
    assert torch.equal(again.images, mixed.images)
    assert not torch.equal(augment.mix(images, asked, 0, 6).images, mixed.images)
    assert augment.mix(images, Training(), 0, 5) is None


def test_a_teacher_that_saw_the_mixed_images_is_believed_as_it_is():
    """Its answers are not mixed again, and how sure it is counts by the mixed label."""
    images = torch.zeros(2, 3, 4, 4)
    mixed = augment.Mixed(images, torch.tensor([1, 0]), torch.tensor([0.75, 1.0]))
    training = Training(mixup=1, ask_mixed=True, temperature=1, teachers="confidence")
    told = [Said(TEACHER.repeat(2, 1)), Said(STUDENT.repeat(2, 1))]
    target = wanted(torch.tensor([0, 1]), 2, told, training, mixed)
    torch.testing.assert_close(target.labels, torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    torch.testing.assert_close(target.soft[0].exp(), torch.tensor([[0.75, 0.25]] * 2))
    # Errors of (3/4, 1/4): 3/4 ln 4/3 + 1/4 ln 4, and 3/4 ln 4 + 1/4 ln 4/3.
    apart = math.exp(0.5 * LN3)  # exp of their difference
    assert target.shares[0, 0].item() == pytest.approx(apart / (1 + apart))
    with pytest.raises(EdgeKDError, match="ask_mixed mixes nothing"):
        Training.parse({"ask_mixed": True}, "--set")


def test_cutmix_counts_what_is_covered():
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 10, 10)
    mixed = augment.mix(images, Training(cutmix=1.0), seed=1, step=0)
    for i in range(8):
        own = (mixed.images[i, 0] == i).float().mean().item()
        if mixed.partner[i] != i:
            assert mixed.own[i].item() == pytest.approx(own)
            assert set(mixed.images[i].unique().tolist()) <= {float(i), float(mixed.partner[i])}
    assert 0.05 < mixed.own.mean() < 0.95
