"""Students that are no sub-nets, and the papers' teachers by the papers' names."""

import itertools

import pytest
import timm
import torch

from edgekd import data
from edgekd.export import onnx as export
from edgekd.models import plain, zoo
from edgekd.pipeline.distill import subnet_of
from edgekd.pipeline.workspace import Start
from edgekd.records import Artifact, EdgeKDError, Spec, Training
from edgekd.train import distill


def test_five_convolutions_counted_by_hand():
    net = zoo.classifier("five-convolutions", 4)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 5
    widths = [3, *plain.WIDTHS]
    kernels = sum(9 * a * b for a, b in itertools.pairwise(widths))
    expected = kernels + 2 * sum(plain.WIDTHS) + 256 * 4 + 4
    assert zoo.count(net, (64, 64))[0] == expected == 980_260
    maps = net.maps(torch.zeros(2, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (256, 4, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "stages"), [("resnet18", 3), ("vgg11", 2), ("densenet121", 2)])
def test_fewer_layers_are_the_first_of_the_whole(name, stages):
    torch.manual_seed(0)
    net = zoo.classifier(f"{name}:{stages}", 3).eval()
    whole = timm.create_model(name, features_only=True).eval()
    own = net.trunk.state_dict()
    whole.load_state_dict(whole.state_dict() | own)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole(image)[stages - 1]
        torch.testing.assert_close(net.forward_features(image), expected)
        waist = zoo.Waist(net, (64, 64)).eval()
        torch.testing.assert_close(waist(image)[0], net(image))
    assert zoo.count(net, (64, 64))[0] < sum(p.numel() for p in whole.parameters())


def test_names_that_cannot_be():
    with pytest.raises(EdgeKDError, match=r"resnet18 has 5 stages, resnet18:6 asks for 6"):
        zoo.classifier("resnet18:6", 3)
    with pytest.raises(EdgeKDError, match="begins from scratch"):
        zoo.classifier("five-convolutions", 3, pretrained=True)
    assert not zoo.known("five-convolution")
    assert zoo.known("autoformerv2-t")
    assert zoo.known("visformer-s:2")


def test_the_authors_names_of_autoformer_v2_load(tmp_path):
    """`layers.S.downsample` is the next stage's beginning in timm, `head` is `head.fc`."""
    torch.manual_seed(1)
    net = timm.create_model("swin_s3_tiny_224", num_classes=1000)
    official = {}
    for key, value in net.state_dict().items():
        name = key.replace("head.fc.", "head.")
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        official[name] = value
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save({"model": official}, tmp_path / "S3-T.pth")
    got = zoo.classifier("autoformerv2-t", 3, weights=tmp_path / "S3-T.pth")
    key = "layers.2.downsample.reduction.weight"
    assert torch.equal(got.state_dict()[key], net.state_dict()[key])
    assert got.get_classifier().out_features == 3


@pytest.mark.parametrize("name", ["five-convolutions", "test_resnet", "resnet18:2"])
def test_such_a_student_is_distilled_kept_and_exported(name, phantoms, tmp_path):
    dataset = data.open_dataset(phantoms)
    spec = Spec(classes=dataset.classes, size=(32, 32), channels="grey")
    made = distill.distill(dataset, [], name, None, spec, tmp_path / "student",
                           training=Training(epochs=1, batch=16))  # fmt: skip
    assert made.arch is None
    again = zoo.load(Artifact.load(tmp_path / "student"))
    images = torch.randn(2, 3, 32, 32)
    onnx = export.to_onnx(again, made, images.numpy(), tmp_path / "onnx")
    assert onnx.model == name
    assert onnx.metrics["parity_max_abs_logits"].value < 1e-3


def test_a_student_is_a_sub_net_or_one_of_these():
    class Place:
        spec = Spec(classes=("a", "b"), size=(40, 40))

    assert subnet_of(Place, "resnet18:2", Start()) == ("resnet18:2", None, None, Start())
    assert subnet_of(Place, "ofa-595", Start()).arch.resolution == 40
    with pytest.raises(EdgeKDError, match="--start is for sub-nets"):
        subnet_of(Place, "five-convolutions", Start("tf_efficientnet_lite0"))
    with pytest.raises(EdgeKDError, match='no sub-net "five-convolution"'):
        subnet_of(Place, "five-convolution", Start())
