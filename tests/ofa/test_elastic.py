"""The elastic network against the reference code (package `ofa`) on the same weights."""

import functools
import random
import re

import pytest
import torch
from torch import nn

from edgekd.models import checkpoints
from edgekd.ofa import spaces, supernet
from edgekd.ofa.supernet import Supernet

OFFICIAL = {
    "ofa-mbv3-w1.0": 7_678_880,  # parameters at 1000 classes
    "ofa-mbv3-w1.2": 10_715_752,
    "ofa-proxyless-w1.3": None,
}
LITE = "ofa-lite-w1.0"
CLASSES = 7


def reference(space, classes=CLASSES):
    """The reference code's supernet of a space, in eval mode."""
    zoo = pytest.importorskip("ofa.imagenet_classification.elastic_nn.networks")
    kind = zoo.OFAMobileNetV3 if "mbv3" in space else zoo.OFAProxylessNASNets
    return kind(
        n_classes=classes, dropout_rate=0, width_mult=float(space.rsplit("w", 1)[1]),
        ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4],
    ).eval()  # fmt: skip


def images(count):
    """Noise (count, 3, 64, 64), each image brighter and of more contrast than the last."""
    steps = torch.arange(1, count + 1).view(-1, 1, 1, 1)
    return torch.randn(count, 3, 64, 64) * steps + steps


@torch.no_grad()
def randomise(net, space, answer):
    """Random values in every tensor; statistics of random sub-nets, so that signals stay alive.

    `answer(net, image, arch)` runs the sub-net `arch`.
    """
    torch.manual_seed(0)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for name, value in net.state_dict().items():
        if name.endswith("_matrix"):
            value.copy_(torch.eye(len(value)) + 0.1 * torch.randn_like(value))
        elif ".bn." in name and name.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1:  # biases and running means
            value.normal_(0, 0.3)
        elif value.ndim:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    for m in norms:
        m.momentum = 0.3
    rng, net = random.Random(0), net.train()
    some = [spaces.sample(space, rng, [64]) for _ in range(6)]
    for arch in [*some, *[spaces.uniform(space, "max")] * 4]:
        answer(net, images(4), arch)
    for m in norms:
        m.momentum = 0.1
    return net.eval()


def of_reference(theirs, image, arch):
    """Logits of the reference's sub-net `arch`, which stays the active one."""
    theirs.set_active_subnet(ks=list(arch.kernel), e=list(arch.expand), d=list(arch.depth))
    return theirs(image)


@functools.cache
def pair(space):
    """The reference's supernet and ours with its weights. Not to be changed."""
    theirs = randomise(reference(space), space, of_reference)
    ours = Supernet(space, CLASSES, dropout=0).eval()
    checkpoints.fill_supernet(ours, checkpoints.normalised(theirs.state_dict()), "the ofa package")
    return theirs, ours


@pytest.mark.parametrize(("space", "params"), OFFICIAL.items())
def test_as_large_as_the_official_supernets(space, params):
    with torch.device("meta"):
        net, theirs = Supernet(space, 1000), reference(space, 1000)
    count = sum(p.numel() for p in net.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    if params is not None:
        assert (count, len(net.state_dict())) == (params, 475)


@pytest.mark.parametrize("space", OFFICIAL)
@torch.no_grad()
def test_logits_of_random_sub_nets_are_the_references(space):
    theirs, ours = pair(space)
    rng, image = random.Random(1), images(2)
    ends = [spaces.uniform(space, end) for end in ("min", "max")]
    answers = []
    for arch in [*ends, *(spaces.sample(space, rng, [64]) for _ in range(20))]:
        answers.append(of_reference(theirs, image, arch))
        elastic = ours(image, arch)
        torch.testing.assert_close(elastic, answers[-1], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.extract(arch)(image), elastic)
    apart = torch.stack(answers).diff(dim=0).abs().amax((1, 2))
    assert apart.min() > 1e-3  # two sub-nets differ far more than the tolerance


@torch.no_grad()
def test_a_space_of_our_own_extracts_what_it_computes():
    net = randomise(Supernet(LITE, CLASSES), LITE, Supernet.__call__)
    rng, image = random.Random(2), images(2)
    answers = []
    for arch in [spaces.sample(LITE, rng, [64]) for _ in range(10)]:
        answers.append(net(image, arch))
        assert torch.equal(net.extract(arch)(image), answers[-1])
    assert len({a.sum().item() for a in answers}) == 10


@pytest.mark.parametrize("space", OFFICIAL)
def test_names_of_2019_and_todays_are_the_same_weights(space):
    theirs, ours = pair(space)
    old = {}
    for key, value in theirs.state_dict().items():
        key = re.sub(r"^(blocks\.\d+)\.conv\.", r"\1.mobile_inverted_conv.", key)
        old[key.replace("classifier.linear.", "classifier.linear.linear.")] = value
    assert sum(".mobile_inverted_conv." in k for k in old) > 400
    net = Supernet(space, CLASSES)
    checkpoints.fill_supernet(net, checkpoints.normalised(old), "old")
    assert same(net.state_dict(), ours.state_dict())


@torch.no_grad()
def test_shrinking_begins_with_a_plain_network():
    """`ofa_D4_E6_K7` is the reference's static MobileNetV3Large: no matrices in it."""
    networks = pytest.importorskip("ofa.imagenet_classification.networks")
    theirs = networks.MobileNetV3Large(CLASSES, ks=7, expand_ratio=6, depth_param=4).eval()
    ours = Supernet("ofa-mbv3-w1.0", CLASSES).eval()
    checkpoints.fill_supernet(ours, checkpoints.normalised(theirs.state_dict()), "ofa_D4_E6_K7")
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=1e-5)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("size", [5, 3])
def test_identity_matrices_crop_the_centre(size):
    net = Supernet("ofa-mbv3-w1.0", CLASSES)
    arch = spaces.uniform("ofa-mbv3-w1.0", "max").model_copy(update={"kernel": (size,) * 20})
    name = "blocks.6.conv.depth_conv.conv.weight"
    border = (7 - size) // 2
    whole = net.state_dict()[name][:, :, border : 7 - border, border : 7 - border]
    assert torch.equal(net.cut(arch)[name], whole)


@torch.no_grad()
def ranked(theirs):
    """Give each block's inner channels whole, distinct importances, shuffled.

    The reference adds -1e5 a tier to float32 importances, which rounds them to 1/64.
    """
    torch.manual_seed(5)
    for block in theirs.blocks[1:]:
        weight = block.conv.point_linear.conv.conv.weight
        target = torch.randperm(weight.shape[1]) + 1.0
        weight.mul_((target / weight.abs().sum((0, 2, 3))).view(1, -1, 1, 1))
    return theirs


@pytest.mark.parametrize(("stage", "trained"), [(0, ()), (1, (4, 6)), (2, (3, 4, 6))])
@pytest.mark.parametrize("space", ["ofa-mbv3-w1.0", "ofa-proxyless-w1.3"])
@torch.no_grad()
def test_sorted_channels_are_in_the_references_order(space, stage, trained):
    theirs = ranked(randomise(reference(space), space, of_reference))
    ours = Supernet(space, CLASSES).eval()
    checkpoints.fill_supernet(ours, checkpoints.normalised(theirs.state_dict()), "the ofa package")
    unsorted = {k: v.clone() for k, v in ours.state_dict().items()}
    theirs.re_organize_middle_weights(expand_ratio_stage=stage)
    ours.sort_channels(trained)
    assert same(ours.state_dict(), checkpoints.normalised(theirs.state_dict()))
    assert not same(ours.state_dict(), unsorted)


@pytest.mark.parametrize("space", OFFICIAL)
@torch.no_grad()
def test_sorting_keeps_what_the_largest_computes(space):
    net, image = Supernet(space, CLASSES).eval(), images(2)
    net.load_state_dict(pair(space)[1].state_dict())
    answer, small = net(image), net(image, spaces.uniform(space, "min"))
    net.sort_channels()
    torch.testing.assert_close(net(image), answer, atol=1e-5, rtol=1e-5)
    assert (net(image, spaces.uniform(space, "min")) - small).abs().max() > 1e-3


def a_pair_of_sub_nets(space):
    """A random sub-net of the reference and ours with its weights."""
    theirs, ours = pair(space)
    arch = spaces.sample(space, random.Random(3), [64])
    theirs.set_active_subnet(ks=list(arch.kernel), e=list(arch.expand), d=list(arch.depth))
    return theirs.get_active_subnet(preserve_weight=True).eval(), ours.extract(arch).eval()


@pytest.mark.parametrize("space", ["ofa-mbv3-w1.0", "ofa-proxyless-w1.3"])
def test_recalibrated_statistics_are_the_references(space):
    statistics = pytest.importorskip("ofa.imagenet_classification.elastic_nn.utils")
    theirs, ours = a_pair_of_sub_nets(space)
    batches = [images(4), images(2)]
    statistics.set_running_statistics(theirs, [(b, None) for b in batches])
    supernet.recalibrate(ours, batches)
    expected = checkpoints.normalised(theirs.state_dict())
    for name, value in ours.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)


def test_recalibration_by_hand():
    """Images, not batches, count equally; the variance is biased; momentum has no part."""
    _, net = a_pair_of_sub_nets("ofa-mbv3-w1.0")
    batches = [images(3), images(2)]
    with torch.no_grad():
        maps = [net.first_conv.conv(b) for b in batches]
    mean = sum(m.mean((0, 2, 3)) * len(m) for m in maps) / 5
    var = sum(m.var((0, 2, 3), unbiased=False) * len(m) for m in maps) / 5
    supernet.recalibrate(net, batches)
    torch.testing.assert_close(net.first_conv.bn.running_mean, mean)
    torch.testing.assert_close(net.first_conv.bn.running_var, var)
    assert not net.training
    assert all(not m.training for m in net.modules())


@pytest.fixture
def a_step():
    """One step in train mode of a small sub-net, in float64; (net, Arch, state before it)."""
    space = "ofa-mbv3-w1.0"
    net = Supernet(space, CLASSES, dropout=0).double().train()
    net.load_state_dict(pair(space)[1].state_dict())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    arch = spaces.uniform(space, "max").model_copy(
        update={"depth": (2,) * 5, "expand": (4,) * 20, "kernel": (5,) * 20}
    )
    torch.manual_seed(0)
    net(images(4).double(), arch).square().sum().backward()
    return net, arch, before


def test_a_step_touches_the_statistics_of_its_own_channels_alone(a_step):
    net, arch, before = a_step
    after, used = net.state_dict(), {f"blocks.{i + 1}." for i in spaces.used(arch)}
    for name, value in after.items():
        if not name.endswith(("running_mean", "running_var")):
            continue
        is_elastic = name.startswith("blocks.") and not name.startswith("blocks.0.")
        if is_elastic and not name.startswith(tuple(used)):
            assert torch.equal(value, before[name]), name
            continue
        sliced = is_elastic and "point_linear" not in name
        own = spaces.make_divisible(len(value) // 6 * 4) if sliced else len(value)
        assert (value[:own] != before[name][:own]).any(), name
        assert torch.equal(value[own:], before[name][own:]), name


def test_gradients_outside_the_slice_are_zero(a_step):
    net, _, _ = a_step
    first = net.blocks[1].conv  # 16 channels in: 96 inside, 64 of them used
    for weight in (first.inverted_bottleneck.conv.weight, first.depth_conv.conv.weight,
                   first.depth_conv.bn.bias):  # fmt: skip
        assert weight.grad[:64].abs().sum() > 0
        assert weight.grad[64:].abs().sum() == 0
    assert first.point_linear.conv.weight.grad[:, 64:].abs().sum() == 0
    assert first.depth_conv.conv.weight.grad[:, :, 0].abs().sum() == 0  # a 5x5 kernel of the 7x7
    matrices = dict(first.depth_conv.conv.named_parameters())
    assert matrices["7to5_matrix"].grad.abs().sum() > 0
    assert matrices["5to3_matrix"].grad is None
    assert all(p.grad is None for p in net.blocks[3].parameters())  # beyond its depth


def test_a_steps_gradients_and_statistics_are_the_references(a_step):
    net, arch, _ = a_step
    theirs = reference("ofa-mbv3-w1.0").double()
    theirs.load_state_dict(pair("ofa-mbv3-w1.0")[0].state_dict())
    torch.manual_seed(0)
    of_reference(theirs.train(), images(4).double(), arch).square().sum().backward()
    expected = checkpoints.normalised(theirs.state_dict())
    for name, value in net.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, expected[name])
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    grads = checkpoints.normalised(grads)
    ours = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, msg=name)
