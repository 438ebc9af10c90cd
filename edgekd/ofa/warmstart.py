"""A supernet that begins as an ImageNet network which is easy to get, and computes the same.

Official supernet checkpoints are seldom at hand; timm's MobileNetV3-Large and EfficientNet-Lite0
are, and each is a member of a space: narrower blocks are padded with channels that nothing reads,
smaller kernels with zeros around them, and blocks beyond its depth begin as identities (the last
batch norm's gain is zero). So the largest sub-net, too, computes what the network computes.

The `tf_` twins were trained with TensorFlow's padding: convolutions of stride 2 start one pixel
further right and down than those here. Their weights give the logits of the picture moved by 31
pixels, up to what happens at the border: on MRI at 224 pixels half of the top-1 answers stay, and
training goes on from there. Batch norm's other epsilon is folded in exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgekd.ofa import spaces
from edgekd.ofa.supernet import Supernet
from edgekd.records import Arch, EdgeKDError

_LITE = [(f"efficientnet_lite{i}", f"tf_efficientnet_lite{i}") for i in range(3)]
MEMBERS = {  # space -> timm networks that are members of it
    **{f"ofa-lite{i}": _LITE[i] for i in range(3)},
    "ofa-lite-w1.0": _LITE[0],
    "ofa-mbv3-w1.0": ("mobilenetv3_large_100", "tf_mobilenetv3_large_100"),
}


def check(space: str, model: str) -> None:
    """EdgeKDError where the timm network `model` is no member of `space`."""
    having = [s for s, members in MEMBERS.items() if model in members]
    if space in having:
        return
    if having:
        raise EdgeKDError(f"{model} is a member of {' and '.join(having)}, not of {space}")
    known = ", ".join(dict.fromkeys(m for members in MEMBERS.values() for m in members))
    raise EdgeKDError(
        f"{model} is a member of no space here; a supernet can start from {known}, or "
        "an official checkpoint (ofa_mbv3_d234_e346_k357_w1.0, ...)"
    )


def member(space: str, source: Any, resolution: int = 224) -> Arch:
    """The Arch of the timm network `source` in `space`."""
    stages = spaces.space_of(space).stages
    kernel, expand, depth = [], [], []
    for stage, blocks in zip(stages, _stages(source, stages), strict=True):
        depth.append(len(blocks))
        pad = [0] * (stage.places - len(blocks))
        kernel += [b.conv_dw.kernel_size[0] for b in blocks] + pad
        expand += [_expansion(space, b) for b in blocks] + pad
    return Arch(
        space=space,
        kernel=tuple(kernel),
        expand=tuple(expand),
        depth=tuple(depth),
        resolution=resolution,
    )


def _stages(source: Any, stages: tuple[spaces.Stage, ...]) -> list[list[Any]]:
    """The inverted residuals of each elastic stage; the first timm stage is block 0."""
    return [list(s) for s in source.blocks[1 : len(stages) + 1]]


def _expansion(space: str, block: Any) -> int:
    """The smallest expansion of the space that has all of the block's inner channels."""
    mid, cin = block.conv_dw.in_channels, block.conv_pw.in_channels
    for expand in spaces.space_of(space).expands:
        if spaces.make_divisible(round(cin * expand)) >= mid:
            return expand
    raise EdgeKDError(f"{space} has no block of {mid} channels on {cin}: not a member of it")


@torch.no_grad()
def fill(net: Supernet, source: Any) -> Arch:
    """Make `net` compute what the timm network `source` computes; returns source's Arch in it.

    `net` may have another number of classes: its own, new classifier then stays.
    """
    stages = spaces.space_of(net.space).stages
    arch = member(net.space, source)
    _layer(net.first_conv, source.conv_stem, source.bn1)
    first = source.blocks[0][0]
    _layer(net.blocks[0].conv.depth_conv, first.conv_dw, first.bn1)
    _layer(net.blocks[0].conv.point_linear, first.conv_pw, first.bn2)
    at = 1
    for stage, blocks in zip(stages, _stages(source, stages), strict=True):
        for i in range(stage.places):
            if i < len(blocks):
                _block(net.blocks[at], blocks[i])
            else:
                nn.init.zeros_(net.blocks[at].conv.point_linear.bn.weight)
                nn.init.zeros_(net.blocks[at].conv.point_linear.bn.bias)
            at += 1
    if net.mix_before_pool:
        _layer(net.feature_mix_layer, source.conv_head, source.bn2)
    else:
        last = source.blocks[-1][0]
        _layer(net.final_expand_layer, last.conv, last.bn1)
        _mix(net, source.conv_head)
    head: Any = net.classifier.linear
    if source.classifier.weight.shape == head.weight.shape:
        head.load_state_dict(source.classifier.state_dict())
    return arch


def _layer(layer: Any, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Copy a convolution and its batch norm into the first channels of `layer`."""
    _into(layer.conv.weight, conv.weight)
    _norm(layer.bn, norm)


def _norm(own: Any, norm: nn.BatchNorm2d) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _into(getattr(own, name), getattr(norm, name))
    own.running_var[: norm.num_features] += norm.eps - own.eps


def _into(own: torch.Tensor, weight: torch.Tensor) -> None:
    """Write `weight` over the first channels of `own`, a smaller kernel in the middle of zeros."""
    if any(a < b for a, b in zip(own.shape, weight.shape, strict=True)):
        raise EdgeKDError(f"a tensor {tuple(weight.shape)} does not fit in {tuple(own.shape)}")
    channels = tuple(slice(n) for n in weight.shape[:2])
    border = (own.shape[-1] - weight.shape[-1]) // 2 if weight.ndim == 4 else 0
    if border:
        weight = nn.functional.pad(weight, (border,) * 4)
    own[channels] = weight


def _block(block: Any, source: Any) -> None:
    """Copy an inverted residual; channels that it lacks keep their random weights, unread."""
    conv = block.conv
    _layer(conv.inverted_bottleneck, source.conv_pw, source.bn1)
    _layer(conv.depth_conv, source.conv_dw, source.bn2)
    nn.init.zeros_(conv.point_linear.conv.weight)
    _layer(conv.point_linear, source.conv_pwl, source.bn3)
    if hasattr(conv.depth_conv, "se"):
        own, gate = conv.depth_conv.se.fc, source.se
        for ours, theirs in ((own.reduce, gate.conv_reduce), (own.expand, gate.conv_expand)):
            ours.weight.zero_()  # the gate reads no channel that the source lacks
            _into(ours.weight, theirs.weight)
            _into(ours.bias, theirs.bias)


def _mix(net: Supernet, conv: nn.Conv2d) -> None:
    """Timm's conv_head has a bias where OFA's feature_mix_layer has none: it is carried."""
    own: Any = net.feature_mix_layer.conv
    own.weight.copy_(conv.weight)
    if own.bias is None:
        raise EdgeKDError("this network has a bias before its classifier: Supernet(mix_bias=True)")
    own.bias.copy_(conv.bias)
