"""The Once-for-All spaces as data, the 50 published sub-nets by name, and `extract`.

Cai et al., Once-for-All, ICLR 2020 (arXiv 1908.09791). Module and parameter names are those of the
reference code (mit-han-lab/once-for-all, static networks), so its specialised checkpoints fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgekd.records import Arch, EdgeKDError, unknown

BLOCKS = 4  # places for blocks in a stage of any space; an Arch always has an entry for each


@dataclass(frozen=True)
class Stage:
    """Up to BLOCKS blocks of one width; the first carries the stride and the width's change."""

    width: int
    stride: int
    act: str  # relu | relu6 | h_swish
    se: bool = False
    depths: tuple[int, ...] = (2, 3, 4)

    @property
    def places(self) -> int:
        """Entries that this stage has in an Arch."""
        return 1 if self.depths == (1,) else BLOCKS


@dataclass(frozen=True)
class Space:
    """What is fixed in a family of networks; kernels, expansions and depths are the Arch's."""

    stem: int
    first: int  # width of block 0: kernel 3, expansion 1, never elastic
    first_shortcut: bool
    act: str  # of the stem
    first_act: str
    stages: tuple[Stage, ...]
    final_expand: int  # channels of the 1x1 convolution before pooling; 0: there is none
    mix: int  # channels of feature_mix_layer
    mix_before_pool: bool  # with batch norm before pooling (ProxylessNAS), or bare after it
    bn_eps: float
    kernels: tuple[int, ...] = (3, 5, 7)
    expands: tuple[int, ...] = (3, 4, 6)


def _mobilenet_v3(stem: int, widths: tuple[int, ...], final: int, mix: int) -> Space:
    traits = [("relu", False, 2), ("relu", True, 2), ("h_swish", False, 2), ("h_swish", True, 1)]
    traits.append(("h_swish", True, 2))
    stages = tuple(Stage(w, s, a, se) for w, (a, se, s) in zip(widths, traits, strict=True))
    return Space(stem, stem, True, "h_swish", "relu", stages, final, mix, False, 1e-5)


SPACES = {
    "ofa-mbv3-w1.0": _mobilenet_v3(16, (24, 40, 80, 112, 160), 960, 1280),
    "ofa-mbv3-w1.2": _mobilenet_v3(24, (32, 48, 96, 136, 192), 1152, 1536),
    "ofa-proxyless-w1.3": Space(
        stem=40,
        first=24,
        first_shortcut=False,
        act="relu6",
        first_act="relu6",
        stages=(
            Stage(32, 2, "relu6"),
            Stage(56, 2, "relu6"),
            Stage(104, 2, "relu6"),
            Stage(128, 1, "relu6"),
            Stage(248, 2, "relu6"),
            Stage(416, 1, "relu6", depths=(1,)),
        ),
        final_expand=0,
        mix=1664,
        mix_before_pool=True,
        bn_eps=1e-3,
    ),
}


def subnets() -> dict[str, Arch]:
    """The 50 sub-nets that OFA's authors published, by their own names (`net@...`)."""
    table = json.loads(Path(__file__).with_name("subnets.json").read_text("utf-8"))
    return {name: Arch(**arch) for name, arch in table.items()}


def named(name: str) -> tuple[str, Arch]:
    """Full name and Arch of a sub-net: a published name or the start of just one, or `ofa-595`.

    `SPACE:min`, `SPACE:max` are the smallest and largest of a space, at 224 pixels.
    """
    table = subnets()
    wanted = "flops@595M" if name.lower() == "ofa-595" else name
    space, _, end = wanted.partition(":")
    if end in ("min", "max"):
        return wanted, _uniform(space, end)
    found = [n for n in table if n == wanted] or [n for n in table if n.startswith(wanted)]
    if len(found) == 1:
        return found[0], table[found[0]]
    if len(found) > 1:
        raise EdgeKDError(f'sub-net "{name}" could be any of {", ".join(found)}: say more of it')
    short = [n.partition("_top1")[0] for n in table]
    raise EdgeKDError(unknown("sub-net", name, [*short, "ofa-595"]))


def _uniform(space: str, end: str) -> Arch:
    stages = _space(space).stages
    pick = min if end == "min" else max
    places = sum(s.places for s in stages)
    return Arch(
        space=space,
        kernel=(pick(_space(space).kernels),) * places,
        expand=(pick(_space(space).expands),) * places,
        depth=tuple(pick(s.depths) for s in stages),
        resolution=224,
    )


def _space(name: str) -> Space:
    if name not in SPACES:
        raise EdgeKDError(unknown("space", name, SPACES))
    return SPACES[name]


def extract(arch: Arch, classes: int, *, dropout: float = 0.1) -> SubNet:
    """The sub-net `arch` as a plain module with `classes` outputs, freshly initialised.

    Raises EdgeKDError where `arch` is no member of its space.
    """
    space = _space(arch.space)
    places = [s.places for s in space.stages]
    if len(arch.depth) != len(places) or {len(arch.kernel), len(arch.expand)} != {sum(places)}:
        raise EdgeKDError(
            f"an Arch of {arch.space} has {len(places)} depths and {sum(places)} kernels and "
            f"expansions, got {len(arch.depth)}, {len(arch.kernel)} and {len(arch.expand)}"
        )
    return SubNet(space, arch, classes, dropout)


def make_divisible(value: float, divisor: int = 8) -> int:
    """`value` rounded to a multiple of `divisor`, never more than a tenth below it."""
    new = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return new + divisor if new < 0.9 * value else new


def _act(name: str) -> nn.Module:
    # nn.Hardswish is OFA's x * relu6(x + 3) / 6; it exports to one ONNX operator.
    acts = {"relu": nn.ReLU, "relu6": nn.ReLU6, "h_swish": nn.Hardswish}
    return acts[name](inplace=True)


class ConvLayer(nn.Sequential):
    """Convolution without bias, [batch norm], [squeeze-excite after the activation]."""

    def __init__(self, cin, cout, kernel, *, stride=1, groups=1, act="", se=False, eps=1e-5):
        super().__init__()
        pad = kernel // 2
        self.conv = nn.Conv2d(cin, cout, kernel, stride, pad, groups=groups, bias=False)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return x + self.conv(x) if self.shortcut else self.conv(x)


class SubNet(nn.Module):
    """One member of a space: image (N, 3, H, W) -> logits (N, classes)."""

    def __init__(self, space: Space, arch: Arch, classes: int, dropout: float):
        super().__init__()
        eps, width = space.bn_eps, space.first
        self.first_conv = ConvLayer(3, space.stem, 3, stride=2, act=space.act, eps=eps)
        blocks = [
            Block(space.stem, width, 3, 1, stride=1, act=space.first_act, se=False, eps=eps,
                  shortcut=space.first_shortcut)
        ]  # fmt: skip
        ends, start = [], 0
        for stage, depth in zip(space.stages, arch.depth, strict=True):
            if depth not in stage.depths:
                raise EdgeKDError(f"{arch.space} has no stage of depth {depth}: {stage.depths}")
            for i in range(start, start + depth):
                k, e = arch.kernel[i], arch.expand[i]
                if k not in space.kernels or e not in space.expands:
                    raise EdgeKDError(
                        f"{arch.space} has no kernel {k} with expansion {e} "
                        f"(kernels {space.kernels}, expansions {space.expands})"
                    )
                stride = stage.stride if i == start else 1
                blocks.append(
                    Block(width, stage.width, k, e, stride=stride, act=stage.act, se=stage.se,
                          eps=eps)
                )  # fmt: skip
                width = stage.width
            ends.append(len(blocks))
            start += stage.places
        self.blocks = nn.ModuleList(blocks)
        self.ends = tuple(ends)  # number of blocks up to the end of each stage
        if space.final_expand:
            self.final_expand_layer = ConvLayer(
                width, space.final_expand, 1, act="h_swish", eps=eps
            )
            width = space.final_expand
        act = "relu6" if space.mix_before_pool else "h_swish"
        mix_eps = eps if space.mix_before_pool else 0.0
        self.feature_mix_layer = ConvLayer(width, space.mix, 1, act=act, eps=mix_eps)
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


def _initialise(module: nn.Module) -> None:
    """`he_fout`, as OFA does: N(0, sqrt(2 / (k k out))) for convolutions."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.groups > 1:  # OFA counts all output channels, not those of one group
            module.weight.data.div_(module.groups**0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
        nn.init.zeros_(module.bias)
