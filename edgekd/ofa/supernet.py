"""The elastic network of a Once-for-All space, and the plain sub-nets that are cut out of it.

Cai et al., Once-for-All, ICLR 2020 (arXiv 1908.09791). Module and parameter names are those of the
reference code (mit-han-lab/once-for-all, static networks), so its specialised checkpoints fit.

A sub-net's weights are a slice of the supernet's (`Supernet.cut`). The elastic forward runs the
plain sub-net's own code on those slices, so that an extracted sub-net cannot differ from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from edgekd.ofa import spaces
from edgekd.ofa.spaces import Space, make_divisible, named, subnets, uniform
from edgekd.records import Arch

__all__ = ["Space", "SubNet", "Supernet", "build", "named", "recalibrate", "subnets"]


def build(arch: Arch, classes: int, *, dropout: float = 0.1, mix_bias: bool = False) -> SubNet:
    """The sub-net `arch` as a plain module with `classes` outputs, freshly initialised.

    Raises EdgeKDError where `arch` is no member of its space.
    """
    return SubNet(spaces.check(arch), arch, classes, dropout, mix_bias)


def _act(name: str) -> nn.Module:
    # nn.Hardswish is OFA's x * relu6(x + 3) / 6; it exports to one ONNX operator.
    acts = {"relu": nn.ReLU, "relu6": nn.ReLU6, "h_swish": nn.Hardswish}
    return acts[name](inplace=True)


class ConvLayer(nn.Sequential):
    """Convolution, [batch norm], [activation], [squeeze-excite]."""

    def __init__(
        self, cin, cout, kernel, *, stride=1, groups=1, act="", se=False, eps=1e-5, bias=False
    ):
        super().__init__()
        pad = kernel // 2
        self.conv = nn.Conv2d(cin, cout, kernel, stride, pad, groups=groups, bias=bias)
        if eps:
            self.bn = nn.BatchNorm2d(cout, eps=eps)
        if act:
            self.act = _act(act)
        if se:
            self.se = SqueezeExcite(cout)


class SqueezeExcite(nn.Module):
    """Channel gate with a quarter of the channels inside, hard sigmoid (Howard et al. 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        mid = make_divisible(channels // 4)
        self.fc = nn.Sequential()
        self.fc.reduce = nn.Conv2d(channels, mid, 1)
        self.fc.relu = nn.ReLU(inplace=True)
        self.fc.expand = nn.Conv2d(mid, channels, 1)
        self.fc.h_sigmoid = nn.Hardsigmoid(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True))


class Block(nn.Module):
    """Inverted residual: [1x1 expand], kxk depthwise, 1x1 linear, plus the input if it fits."""

    def __init__(self, cin, cout, kernel, expand, *, stride, act, se, eps, shortcut=True):
        super().__init__()
        mid = make_divisible(round(cin * expand)) if expand > 1 else cin
        self.conv = nn.Sequential()
        if expand > 1:
            self.conv.inverted_bottleneck = ConvLayer(cin, mid, 1, act=act, eps=eps)
        self.conv.depth_conv = ConvLayer(
            mid, mid, kernel, stride=stride, groups=mid, act=act, se=se, eps=eps
        )
        self.conv.point_linear = ConvLayer(mid, cout, 1, eps=eps)
        self.shortcut = shortcut and stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class SubNet(nn.Module):
    """One member of a space: image (N, 3, H, W) -> logits (N, classes)."""

    def __init__(
        self, space: Space, arch: Arch, classes: int, dropout: float, mix_bias: bool = False
    ):
        super().__init__()
        eps, width = space.bn_eps, space.first
        self.first_conv = ConvLayer(3, space.stem, 3, stride=2, act=space.act, eps=eps)
        blocks = [
            Block(space.stem, width, 3, 1, stride=1, act=space.first_act, se=False, eps=eps,
                  shortcut=space.first_shortcut)
        ]  # fmt: skip
        ends, places = [], iter(spaces.used(arch))
        for stage, depth in zip(space.stages, arch.depth, strict=True):
            for i in range(depth):
                place = next(places)
                blocks.append(
                    Block(width, stage.width, arch.kernel[place], arch.expand[place],
                          stride=stage.stride if i == 0 else 1, act=stage.act, se=stage.se,
                          eps=eps)
                )  # fmt: skip
                width = stage.width
            ends.append(len(blocks))
        self.blocks: Any = nn.ModuleList(blocks)
        self.ends = tuple(ends)  # number of blocks up to the end of each stage
        if space.final_expand:
            self.final_expand_layer = ConvLayer(
                width, space.final_expand, 1, act="h_swish", eps=eps
            )
            width = space.final_expand
        act = "relu6" if space.mix_before_pool else "h_swish"
        mix_eps = eps if space.mix_before_pool else 0.0
        self.feature_mix_layer = ConvLayer(width, space.mix, 1, act=act, eps=mix_eps, bias=mix_bias)
        self.mix_before_pool = space.mix_before_pool
        self.classifier = nn.Sequential()
        self.classifier.dropout = nn.Dropout(dropout)
        self.classifier.linear = nn.Linear(space.mix, classes)
        self.apply(_initialise)

    def maps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The output of every stage, (N, C, h, w) each; last the map that `head` pools."""
        x = self.first_conv(image)
        found = []
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in self.ends:
                found.append(x)
        x = self.feature_mix_layer(x) if self.mix_before_pool else self.final_expand_layer(x)
        return [*found, x]

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> logits (N, classes)."""
        x = features.mean((2, 3), keepdim=True)
        if not self.mix_before_pool:
            x = self.feature_mix_layer(x)
        return self.classifier(x.flatten(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.head(self.maps(image)[-1])


class Supernet(SubNet):
    """The largest sub-net of a space, and by shared weights every other: image, Arch -> logits.

    A sub-net takes the first blocks of a stage, the first channels of a block, and of a kernel the
    centre, through matrices of each block's own (7 -> 5 -> 3) that start as identities.
    """

    def __init__(self, space: str, classes: int, *, dropout: float = 0.1, mix_bias: bool = False):
        largest = uniform(space, "max")
        super().__init__(spaces.space_of(space), largest, classes, dropout, mix_bias)
        self.space, self.classes, self.dropout, self.mix_bias = space, classes, dropout, mix_bias
        for block in self.blocks[1:]:
            depthwise = block.conv.depth_conv.conv
            for big, small in _KERNEL_STEPS:
                if big > depthwise.kernel_size[0]:
                    continue
                matrix = nn.Parameter(torch.eye(small * small))
                depthwise.register_parameter(f"{big}to{small}_matrix", matrix)

    def forward(self, image: torch.Tensor, arch: Arch | None = None) -> torch.Tensor:
        """Logits (N, classes) of the sub-net `arch`; of the largest where it is None."""
        if arch is None:
            return super().forward(image)
        shell = self._shell(arch).train(self.training)
        return functional_call(shell, self._slices(arch, shell), image, strict=True)

    def extract(self, arch: Arch) -> SubNet:
        """The sub-net `arch` as a plain module with a copy of its weights."""
        net = build(arch, self.classes, dropout=self.dropout, mix_bias=self.mix_bias)
        net.load_state_dict(self._slices(arch, net))
        return net.train(self.training)

    def cut(self, arch: Arch) -> dict[str, torch.Tensor]:
        """The weights of the sub-net `arch` by its own names, as slices of this network's.

        Gradients flow back through them, and batch norm updates its statistics in them.
        """
        return self._slices(arch, self._shell(arch))

    def _shell(self, arch: Arch) -> SubNet:
        """The sub-net's code, without weights of its own."""
        with torch.device("meta"):
            return build(arch, self.classes, dropout=self.dropout, mix_bias=self.mix_bias)

    def _slices(self, arch: Arch, shell: SubNet) -> dict[str, torch.Tensor]:
        """What `cut` gives, in the shapes of `shell`, which is of `arch`."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        places = [0, *(i + 1 for i in spaces.used(arch))]  # of the sub-net's blocks in this one
        found = {}
        for name, wanted in shell.state_dict().items():
            source = name
            if name.startswith("blocks."):
                _, number, rest = name.split(".", 2)
                source = f"blocks.{places[int(number)]}.{rest}"
            weight = own[source]
            if name.endswith("depth_conv.conv.weight"):
                weight = self._shrunk(own, source.removesuffix("weight"), wanted.shape[-1])
            found[name] = weight[tuple(slice(n) for n in wanted.shape)]
        return found

    def _shrunk(self, own: dict[str, torch.Tensor], prefix: str, kernel: int) -> torch.Tensor:
        """The depthwise weight (C, 1, k, k) at `kernel`, by the chain of centre and matrix."""
        weight = own[f"{prefix}weight"]
        for big, small in _KERNEL_STEPS:
            if weight.shape[-1] != big or kernel > small:
                continue
            centre = weight[:, :, 1:-1, 1:-1].reshape(-1, small * small)
            matrix = own[f"{prefix}{big}to{small}_matrix"]
            weight = F.linear(centre, matrix).view(-1, 1, small, small)
        return weight

    @torch.no_grad()
    def sort_channels(self, trained: Sequence[int] = ()) -> None:
        """Order each block's inner channels by importance: the L1 norm of what reads them.

        The largest sub-net's function does not change; smaller ones keep the channels that matter.
        Channels that an expansion in `trained` has are kept before those it has not.
        """
        space, width = spaces.space_of(self.space), spaces.space_of(self.space).first
        for block, stage in zip(self.blocks[1:], space.stage_of_place, strict=True):
            weight = block.conv.point_linear.conv.weight
            importance = weight.abs().sum((0, 2, 3))
            rank = torch.zeros(len(importance))  # of tiers: 0 is the one of the smallest expansion
            for expand in trained:
                rank[make_divisible(round(width * expand)) :] += 1
            order = torch.argsort(importance, descending=True, stable=True)
            order = order[torch.argsort(rank[order], stable=True)]
            _permute(block, order)
            width = stage.width


_KERNEL_STEPS = ((7, 5), (5, 3))


def _permute(block: Any, order: torch.Tensor) -> None:
    """Reorder a block's inner channels; its function stays the same."""
    conv = block.conv
    for layer in (conv.inverted_bottleneck, conv.depth_conv):
        layer.conv.weight.copy_(layer.conv.weight[order])
        for tensor in (layer.bn.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var):
            tensor.copy_(tensor[order])
    conv.point_linear.conv.weight.copy_(conv.point_linear.conv.weight[:, order])
    if hasattr(conv.depth_conv, "se"):
        gate = conv.depth_conv.se.fc
        inner = torch.argsort(gate.expand.weight.abs().sum((0, 2, 3)), descending=True, stable=True)
        gate.reduce.weight.copy_(gate.reduce.weight[inner][:, order])
        gate.reduce.bias.copy_(gate.reduce.bias[inner])
        gate.expand.weight.copy_(gate.expand.weight[:, inner][order])
        gate.expand.bias.copy_(gate.expand.bias[order])


@torch.no_grad()
def recalibrate(net: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set the batch norm statistics of a sub-net to those of images (N, 3, H, W) a batch.

    Every sub-net has its own, and shared ones fit none. As OFA does it: each batch is normalised
    by its own mean and biased variance, and what is kept is their average over images.
    """
    norms: list[Any] = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    sums: dict[Any, list] = {
        m: [torch.zeros_like(m.running_mean), torch.zeros_like(m.running_var)] for m in norms
    }

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), unbiased=False)
        sums[module][0] += mean * len(inputs[0])
        sums[module][1] += var * len(inputs[0])

    training, images = net.training, 0
    hooks = [m.register_forward_pre_hook(add) for m in norms]
    net.eval()  # no dropout
    try:
        for m in norms:
            m.train()
        for batch in batches:
            net(batch.to(next(net.parameters()).device))
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
        net.train(training)
    for m, totals in sums.items():
        m.running_mean.copy_(totals[0] / images)
        m.running_var.copy_(totals[1] / images)


def _initialise(module: nn.Module) -> None:
    """`he_fout`, as OFA does: N(0, sqrt(2 / (k k out))) for convolutions."""
    weight = getattr(module, "weight", None)
    if weight is not None and weight.is_meta:
        return  # a shell has no values, and to fill it with none takes half the time of making it
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.groups > 1:  # OFA counts all output channels, not those of one group
            module.weight.data.div_(module.groups**0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
        nn.init.zeros_(module.bias)
