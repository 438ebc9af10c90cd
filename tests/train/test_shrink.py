"""Shrinking: which sub-nets a step trains, what they learn from, that a stop changes nothing."""

import numpy as np
import pytest
import torch

from edgekd import data
from edgekd.models import zoo
from edgekd.ofa import spaces, supernet
from edgekd.records import Artifact, EdgeKDError, Spec, Training
from edgekd.train import shrink

SPACE = "ofa-lite-w1.0"


@pytest.fixture(scope="module")
def dataset(phantoms):
    return data.open_dataset(phantoms)


@pytest.fixture(scope="module")
def spec(dataset):
    return Spec(classes=dataset.classes, size=(32, 32), channels="grey")


def plan(schedule="sandwich", epochs=8, resolutions=(24, 32)):
    return shrink.Plan(SPACE, resolutions, schedule, epochs, 0)


def test_the_sandwich_trains_both_ends_and_two_between_at_one_resolution():
    seen = set()
    for step in range(30):
        archs = plan().archs(0, step)
        side = archs[0].resolution
        seen.add(side)
        assert archs[:2] == [spaces.uniform(SPACE, e, side) for e in ("max", "min")]
        assert len(archs) == 4
        assert all(a.resolution == side for a in archs)
        for arch in archs:
            spaces.check(arch)
    assert seen == {24, 32}
    assert plan().archs(0, 3) == plan().archs(0, 3)
    assert plan().archs(0, 3)[2:] != plan().archs(0, 4)[2:]


def test_progressive_shrinking_opens_one_dimension_after_the_other():
    """Of 121 epochs, OFA's shares: largest 36, kernels 25, depth 5 + 25, expansion 5 + 25."""
    p = plan("progressive", epochs=121)
    firsts = [e for e in range(121) if p.phase(e)[1]]
    assert firsts == [0, 36, 61, 66, 91, 96]
    drawn = {e: [a for s in range(40) for a in p.archs(e, s)] for e in firsts}
    values = {
        e: (
            {k for a in archs for k in a.kernel},
            {d for a in archs for d in a.depth[:-1]},
            {x for a in archs for x in a.expand},
        )
        for e, archs in drawn.items()
    }
    assert values == {
        0: ({7}, {4}, {6}),
        36: ({3, 5, 7}, {4}, {6}),
        61: ({3, 5, 7}, {3, 4}, {6}),
        66: ({3, 5, 7}, {2, 3, 4}, {6}),
        91: ({3, 5, 7}, {2, 3, 4}, {4, 6}),
        96: ({3, 5, 7}, {2, 3, 4}, {3, 4, 6}),
    }
    assert [len(p.archs(e, 0)) for e in firsts] == [1, 1, 2, 2, 4, 4]
    assert {a.depth[-1] for archs in drawn.values() for a in archs} == {1}


def objective(spec, schedule="sandwich", training=None, epochs=8):
    def images(size, epoch, chosen):
        torch.manual_seed(0)
        return torch.randn(len(chosen), 3, *size)

    labels = np.arange(12) % 3
    training = training or Training()
    return shrink.Shrinking(plan(schedule, epochs), images, labels, spec, training)


def test_small_sub_nets_learn_from_labels_and_the_largest(spec):
    torch.manual_seed(0)
    net = supernet.Supernet(SPACE, 3, dropout=0).train()
    losses = list(objective(spec).losses(net, 0, 0, np.arange(4)))
    assert losses[0].soft == 0
    assert losses[0].total.item() == pytest.approx(losses[0].hard / 4)
    for loss in losses[1:]:
        assert loss.soft > 0
        assert loss.total.item() == pytest.approx((0.3 * loss.hard + 0.7 * loss.soft) / 4)


def test_in_progressive_shrinking_the_largest_guides_without_being_trained(spec):
    net = supernet.Supernet(SPACE, 3, dropout=0).train()
    (loss,) = objective(spec, "progressive", epochs=121).losses(net, 40, 0, np.arange(4))
    assert loss.soft > 0
    (alone,) = objective(spec, "progressive", epochs=121).losses(net, 0, 0, np.arange(4))
    assert alone.soft == 0


def test_channels_are_sorted_before_a_phase_that_narrows(spec):
    net = supernet.Supernet(SPACE, 3).eval()
    o = objective(spec, "progressive", epochs=121)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = net(image)
        assert [e for e in range(121) if o.begin(net, e)] == [91, 96]
        torch.testing.assert_close(net(image), before, atol=1e-5, rtol=1e-4)
    weight = net.blocks[3].conv.point_linear.conv.weight.abs().sum((0, 2, 3))
    kept = spaces.make_divisible(24 * 4)
    assert (weight[:kept].diff() <= 0).all()
    assert (weight[kept:].diff() <= 0).all()


def small(dataset, spec, out, **change):
    net = zoo.supernet(SPACE, 3, seed=0)
    change = {"epochs": 2, "batch": 21, "ema": 0.9} | change
    return shrink.shrink(
        dataset, net, spec, out,
        resolutions=[24, 32], training=Training(**change), start={"start": "scratch"},
    )  # fmt: skip


def test_a_stop_changes_nothing(dataset, spec, tmp_path, monkeypatch):
    from edgekd.train import loop

    whole = small(dataset, spec, tmp_path / "whole")
    steps, real = [], loop._step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 4:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(dataset, spec, tmp_path / "cut")
    assert not (tmp_path / "cut" / Artifact.FILE).exists()
    cut = small(dataset, spec, tmp_path / "cut")
    assert cut.path.read_bytes() == whole.path.read_bytes()
    assert cut.metrics == whole.metrics


def test_a_supernet_is_judged_at_its_ends_and_loads_again(dataset, spec, tmp_path):
    made = small(dataset, spec, tmp_path / "net", epochs=1)
    assert made.kind == "supernet"
    assert made.params == 5_304_530 - 21 * (25**2 + 9**2) - 997 * 1281
    assert {"val_balanced_accuracy_min", "val_balanced_accuracy_max"} <= set(made.metrics)
    net = zoo.load_supernet(made)
    judge = shrink.judge_of(dataset, spec, Training(epochs=1, batch=21, ema=0.9), 0)
    again = judge(net, spaces.uniform(SPACE, "min", 32))
    assert again["loss"] == pytest.approx(made.metrics["val_loss_min"].value)
    student_arch = spaces.uniform(SPACE, "min", 32)
    student = zoo.student(student_arch, 3)
    assert (
        student.state_dict().keys()
        == net.extract(spaces.uniform(SPACE, "min", 32)).state_dict().keys()
    )
    with pytest.raises(EdgeKDError, match="holds a supernet file, not a trained network"):
        zoo.load(made)
