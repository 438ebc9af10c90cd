"""A supernet that begins as a timm network computes what it computes."""

import pytest
import timm
import torch
from torch import nn

from edgekd.models import zoo
from edgekd.ofa import spaces, supernet, warmstart
from edgekd.records import EdgeKDError


def trained(name, classes=7):
    """A timm network whose every tensor, statistics too, is as after a training."""
    torch.manual_seed(1)
    net = timm.create_model(name, num_classes=classes).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.8, 1.2), (module.bias, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1), (module.running_var, 0.8, 1.2),
            ):  # fmt: skip
                nn.init.uniform_(tensor, low, high)
    return net


def count(net):
    return sum(p.numel() for p in net.parameters())


def answers(net, image, *arch):
    with torch.no_grad():
        return net(image, *arch)


@pytest.mark.parametrize(
    ("name", "space", "depth"),
    [
        ("efficientnet_lite0", "ofa-lite-w1.0", (2, 2, 3, 3, 4, 1)),
        ("efficientnet_lite0", "ofa-lite0", (2, 2, 3, 3, 4, 1)),
        ("efficientnet_lite1", "ofa-lite1", (3, 3, 4, 4, 5, 1)),
        ("efficientnet_lite2", "ofa-lite2", (3, 3, 4, 4, 5, 1)),
        ("mobilenetv3_large_100", "ofa-mbv3-w1.0", (2, 3, 4, 2, 3)),
    ],
)
def test_the_member_and_the_largest_sub_net_give_timms_logits(name, space, depth):
    source = trained(name)
    net = supernet.Supernet(space, 7, mix_bias="mbv3" in space).eval()
    arch = warmstart.fill(net, source)
    assert arch.depth == depth
    if not space.endswith("w1.0"):  # nothing in it is larger
        assert spaces.canonical(spaces.uniform(space, "max")) == arch
        assert count(net.extract(arch)) == count(source)
    image = torch.randn(2, 3, 64, 64)
    expected = answers(source, image)
    assert expected.std() > 0.01
    for one in ((arch,), ()):
        torch.testing.assert_close(answers(net, image, *one), expected, atol=1e-5, rtol=1e-5)
    plain = net.extract(arch)
    torch.testing.assert_close(answers(plain, image), expected, atol=1e-5, rtol=1e-5)
    net.sort_channels()  # what nothing reads goes last, so the member keeps what it has
    for one in ((arch,), ()):
        torch.testing.assert_close(answers(net, image, *one), expected, atol=1e-4, rtol=1e-4)


def test_tensorflows_padding_is_a_picture_turned_round():
    """The kernels turned by 180 degrees see, padded evenly, what TensorFlow's see of the turned."""
    source = trained("tf_efficientnet_lite0")
    net = supernet.Supernet("ofa-lite-w1.0", 7).eval()
    warmstart.fill(net, source)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(2, 3)
    image = torch.randn(2, 3, 64, 64)
    expected = answers(source, image.flip(2, 3))
    torch.testing.assert_close(answers(net, image), expected, atol=1e-5, rtol=1e-5)


def test_another_number_of_classes_gets_a_new_head():
    net = supernet.Supernet("ofa-lite-w1.0", 3)
    before = net.classifier.linear.weight.clone()
    warmstart.fill(net, trained("efficientnet_lite0"))
    assert torch.equal(net.classifier.linear.weight, before)
    assert not net.feature_mix_layer.bn.running_var.eq(1).all()


def test_what_cannot_start_a_supernet_is_refused():
    with pytest.raises(EdgeKDError, match="resnet18 is a member of no space here"):
        warmstart.check("ofa-lite0", "resnet18")
    warmstart.check("ofa-lite0", "tf_efficientnet_lite0")
    with pytest.raises(EdgeKDError, match="a member of ofa-lite1, not of ofa-lite0"):
        warmstart.check("ofa-lite0", "efficientnet_lite1")
    with pytest.raises(EdgeKDError, match="not of ofa-lite"):
        zoo.supernet("ofa-lite-w1.0", 3, start="mobilenetv3_large_100")
    with pytest.raises(EdgeKDError, match="mix_bias=True"):
        warmstart.fill(supernet.Supernet("ofa-mbv3-w1.0", 7), trained("mobilenetv3_large_100"))


def test_a_filled_supernet_survives_the_disk(tmp_path):
    net = zoo.supernet("ofa-mbv3-w1.0", 3, start="mobilenetv3_large_100", seed=3).eval()
    again = zoo.supernet("ofa-mbv3-w1.0", 3, start="mobilenetv3_large_100", seed=3).eval()
    image = torch.randn(1, 3, 64, 64)
    arch = spaces.uniform("ofa-mbv3-w1.0", "mid", 64)
    assert torch.equal(answers(net, image, arch), answers(again, image, arch))
