"""Before a training: what its last stages would stumble on, on a copy of the network."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import edgekd
from edgekd import DataOptions, RunOptions, StudentOptions, SupernetOptions, data
from edgekd.models import zoo
from edgekd.pipeline import distill as pipeline
from edgekd.records import EdgeKDError, Spec, Training
from edgekd.train import distill, preflight


def spec(side):
    return Spec(classes=("a", "b", "c"), size=(side, side), channels="grey")


@pytest.mark.parametrize(
    ("name", "side", "match"),
    [
        ("inception_v3", 64, "InceptionV3 does not take|InceptionV3 cannot be trained at 64 x 64"),
        ("halonet26t", 96, "ByobNet .* at 96 x 96 pixels"),
    ],
)
def test_a_size_that_a_network_does_not_take_is_said_before_a_step(name, side, match, tmp_path):
    net = zoo.classifier(name, 3, size=(side, side))
    with pytest.raises(EdgeKDError, match=match) as found:
        preflight.check(net, spec(side), tmp_path / "out", exported=False)
    assert "nothing was trained" in str(found.value)
    assert "\n" not in str(found.value)


def test_teach_trains_nothing_that_cannot_be_explained(phantoms, tmp_path, monkeypatch):
    dataset = data.open_dataset(phantoms)
    seen = Spec(classes=dataset.classes, size=(64, 64), channels="grey")
    monkeypatch.setattr(distill, "train", lambda *_, **__: pytest.fail("a step was made"))
    with pytest.raises(EdgeKDError, match="nothing was trained"):
        distill.teach(dataset, "inception_v3", seen, tmp_path, training=Training(epochs=1))


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "levit_128s"])
def test_a_network_and_what_is_drawn_stay_as_they_are(name, tmp_path):
    net = zoo.classifier(name, 3, size=(64, 64))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    preflight.check(net, spec(64), tmp_path / "out", exported=False)
    assert torch.equal(torch.rand(1), expected)
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert list((tmp_path / "out").iterdir()) == []


class Odd(nn.Module):
    """A network whose answers torch.export cannot follow."""

    def __init__(self):
        super().__init__()
        self.net = zoo.classifier("resnet10t", 3)

    def forward(self, x):
        return self.net(x) * (1 if x.mean().item() > -9 else 2)

    def forward_features(self, x):
        return self.net.forward_features(x)

    def forward_head(self, x):
        return self.net.forward_head(x) * (1 if x.mean().item() > -9 else 2)


def test_a_student_that_cannot_be_exported_is_not_trained(tmp_path):
    preflight.check(Odd(), spec(32), tmp_path, exported=False)
    with pytest.raises(EdgeKDError, match="Odd cannot be exported to ONNX at 32 x 32 pixels"):
        preflight.check(Odd(), spec(32), tmp_path, exported=True)


@pytest.mark.parametrize(
    ("layer", "match"),
    [("auto", "no stage has 4 cells a side at this size.*; nothing was trained"),
     ("stage9", "stage9.*; nothing was trained")],
)  # fmt: skip
def test_a_layer_that_is_not_there_is_said_before_a_step(layer, match, tmp_path):
    net = zoo.classifier("mixer_s32_224", 3, size=(64, 64))
    preflight.check(net, spec(64), tmp_path)
    with pytest.raises(EdgeKDError, match=match):
        preflight.check(net, spec(64), tmp_path, layer=layer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"student": StudentOptions(student="halonet26t")}, "ByobNet .* at 96 x 96 pixels"),
        ({"student": StudentOptions(student="resnet10t", layer="stage9")}, "stage9"),
        ({"supernet": SupernetOptions(schedule="hasty")}, "no schedule \"hasty\""),
        ({"supernet": SupernetOptions(start="tf_efficientnet_lite0",
                                      start_weights=Path("none.pth"))}, "none.pth"),
    ],
)  # fmt: skip
def test_distill_teaches_no_teacher_for_what_cannot_follow(
    options, match, phantoms, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "asked_teachers", lambda *_: pytest.fail("a teacher was taught"))
    with pytest.raises(EdgeKDError, match=match):
        edgekd.distill(
            data=DataOptions(data=phantoms, size=96), output=RunOptions(runs=tmp_path), **options
        )


def test_weights_that_do_not_come_back_are_said(tmp_path):
    net = zoo.classifier("resnet10t", 3)
    net.state_dict = lambda *_, **__: {"conv1.weight": torch.zeros(1)}
    with pytest.raises(EdgeKDError, match="ResNet cannot be saved and loaded"):
        preflight.check(net, spec(32), tmp_path, exported=False)


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EdgeKDError, match=r"cannot write to folder .*out: Not a directory"):
        preflight.check(nn.Identity(), spec(32), tmp_path / "file" / "out", exported=False)
