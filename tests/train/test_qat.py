"""Training that feels INT8, and leaves the network as it was but for what it has learnt."""

import copy

import numpy as np
import pytest
import torch
from runtimes.test_runtimes import INT8, Tiny, artifact, pictures, profile

from edgekd import data, runtimes
from edgekd.export import onnx as export
from edgekd.quantize import ptq
from edgekd.records import Spec, Training
from edgekd.train import distill, qat


class Plain(torch.nn.Module):
    """Two layers whose rounding can be done by hand."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 1, bias=False)
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_weights_and_inputs_are_rounded_as_by_hand():
    net = qat.quantised(Plain())
    with torch.no_grad():
        net.conv.weight.copy_(torch.tensor([1.27, -0.5]).reshape(2, 1, 1, 1))
    net.train()
    x = torch.tensor([0.0, 0.3, 2.55]).reshape(3, 1, 1, 1)
    with torch.no_grad():
        got = net.conv(x).flatten(1)
    # weights: 1.27 is 127 steps of 0.01; -0.5 is -127 steps of 0.5/127. Inputs: steps of 0.01.
    want = torch.tensor([0.0, 0.3, 2.55])[:, None] * torch.tensor([1.27, -0.5])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with torch.no_grad():
        net.conv.weight[0] = 1.274  # a step is 1.274/127 now: -> as it is; 0.004 is not
        between = net.eval().conv(torch.tensor([0.004]).reshape(1, 1, 1, 1))
    assert between.abs().max() == 0  # under half a step of the input


def test_ranges_are_learnt_in_training_alone():
    net = qat.quantised(Plain()).train()
    net(torch.ones(2, 1, 2, 2))
    before = net.conv.fake_input.scale.clone()
    net.eval()(100 * torch.ones(2, 1, 2, 2))
    assert net.conv.fake_input.scale == before
    net.train()(100 * torch.ones(2, 1, 2, 2))
    assert net.conv.fake_input.scale > before


def test_gradients_pass_through():
    net = qat.quantised(Plain()).train()
    net(torch.rand(4, 1, 3, 3)).square().sum().backward()
    assert net.conv.weight.grad.abs().sum() > 0


def test_plain_again_is_the_network_it_was():
    torch.manual_seed(0)
    net = Tiny().eval()
    keys, kinds = list(net.state_dict()), [type(m) for m in net.modules()]
    x = torch.from_numpy(pictures(2))
    before = net(x)[0].detach()
    changed = qat.quantised(copy.deepcopy(net))
    changed.train()(x)
    assert not torch.equal(changed.eval()(x)[0], before)
    back = qat.plain(copy.deepcopy(changed))
    assert list(back.state_dict()) == keys
    assert [type(m) for m in back.modules()] == kinds
    changed = qat.plain(changed)
    assert torch.equal(changed.head.weight, net.head.weight)


def test_a_copy_is_independent():
    """An average of the network is a deep copy: it must not share ranges."""
    net = qat.quantised(Plain()).train()
    other = copy.deepcopy(net)
    net(50 * torch.ones(2, 1, 2, 2))
    assert other.conv.fake_input.scale != net.conv.fake_input.scale


@pytest.mark.parametrize("int8", [True, False])
def test_a_student_trained_in_int8_is_an_ordinary_student(phantoms, tmp_path, int8):
    dataset = data.open_dataset(phantoms)
    spec = Spec(classes=dataset.classes, size=(32, 32), channels="grey")
    made = distill.distill(
        dataset, (), "test_resnet", None, spec, tmp_path,
        training=Training(epochs=2, batch=16, int8=int8, lr=1e-3),
    )  # fmt: skip
    from safetensors.numpy import load_file

    from edgekd.models import zoo

    names = load_file(made.path)
    assert not any("fake" in n for n in names)
    assert zoo.load(made)(torch.zeros(2, 3, 32, 32))[0].shape == (2, 3)
    assert made.settings["training"]["int8"] is int8


@INT8
def test_a_network_that_int8_ruins_is_mended_by_training_in_int8(tmp_path):
    """One giant channel a layer: rounded, the others vanish. Training finds weights that stand."""
    torch.manual_seed(0)
    teacher = Tiny().eval()
    with torch.no_grad():
        teacher.body[5].weight[:, 0] *= 60
    x = torch.from_numpy(pictures(64, seed=1))
    right = teacher(x)[0].detach()

    def error(net, out):
        source = export.to_onnx(net.eval(), artifact(), pictures(4), tmp_path / f"{out}-fp32")
        made = ptq.quantize(source, x.numpy(), tmp_path / out, engine="ort")
        said = runtimes.open_session(made, profile("onnxruntime"))(x.numpy()).logits
        return float(np.square(said - right.numpy()).mean())

    before = error(copy.deepcopy(teacher), "before")
    net = qat.quantised(copy.deepcopy(teacher)).train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (net(x)[0] - right).square().mean().backward()
        optimizer.step()
    assert error(qat.plain(net), "after") < 0.7 * before
