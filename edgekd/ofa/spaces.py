"""The Once-for-All spaces as data: what may vary, the pieces of a sub-net, the published ones.

Cai et al., Once-for-All, ICLR 2020 (arXiv 1908.09791). Plain Python: a device that measures the
blocks of a space needs no torch. `supernet.py` builds the networks.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgekd.records import Arch, EdgeKDError, unknown

KERNELS = (3, 5, 7)


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; the first carries the stride and the width's change."""

    width: int
    stride: int
    act: str  # relu | relu6 | h_swish
    se: bool = False
    depths: tuple[int, ...] = (2, 3, 4)
    kernels: tuple[int, ...] = KERNELS  # the first of KERNELS

    @property
    def places(self) -> int:
        """Entries that this stage has in an Arch, whatever its depth there."""
        return max(self.depths)


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
    expands: tuple[int, ...] = (3, 4, 6)

    @property
    def places(self) -> int:
        """Entries of an Arch's kernel and expand."""
        return sum(s.places for s in self.stages)

    @property
    def stage_of_place(self) -> list[Stage]:
        """The stage that each place is in."""
        return [stage for stage in self.stages for _ in range(stage.places)]

    @property
    def kernels(self) -> tuple[int, ...]:
        """All that any stage has."""
        return max((s.kernels for s in self.stages), key=len)


def _mobilenet_v3(stem: int, widths: tuple[int, ...], final: int, mix: int) -> Space:
    traits = [("relu", False, 2), ("relu", True, 2), ("h_swish", False, 2), ("h_swish", True, 1)]
    traits.append(("h_swish", True, 2))
    stages = tuple(Stage(w, s, a, se) for w, (a, se, s) in zip(widths, traits, strict=True))
    return Space(stem, stem, True, "h_swish", "relu", stages, final, mix, False, 1e-5)


def _mobilenet_v2(stem: int, first: int, widths: tuple[int, ...], mix: int, eps: float) -> Space:
    """ProxylessNAS-like: relu6, no squeeze-excite, a last stage of one block."""
    strides = (2, 2, 2, 1, 2, 1)
    stages = [Stage(w, s, "relu6") for w, s in zip(widths, strides, strict=True)]
    stages[-1] = Stage(widths[-1], 1, "relu6", depths=(1,))
    return Space(stem, first, False, "relu6", "relu6", tuple(stages), 0, mix, True, eps)


def _sub_nets_of_lite(width: float, depths: tuple[int, ...]) -> Space:
    """The sub-nets of an EfficientNet-Lite: as deep and as wide, with its kernels, or smaller.

    width: multiplier of the channels, depths: blocks of the stages; of a stage, half remain at
    least. Nothing in it is larger than a network whose ImageNet weights it begins with.
    """
    widths, kernels = (24, 40, 80, 112, 192, 320), (3, 5, 3, 5, 5, 3)
    strides = (2, 2, 2, 1, 2, 1)
    stages = tuple(
        Stage(make_divisible(w * width), s, "relu6", depths=tuple(range((d + 1) // 2, d + 1)),
              kernels=KERNELS[: KERNELS.index(k) + 1])
        for w, s, d, k in zip(widths, strides, depths, kernels, strict=True)
    )  # fmt: skip
    first = make_divisible(16 * width)
    return Space(32, first, False, "relu6", "relu6", stages, 0, 1280, True, 1e-5)


def make_divisible(value: float, divisor: int = 8) -> int:
    """`value` rounded to a multiple of `divisor`, never more than a tenth below it."""
    new = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return new + divisor if new < 0.9 * value else new


SPACES = {
    "ofa-mbv3-w1.0": _mobilenet_v3(16, (24, 40, 80, 112, 160), 960, 1280),
    "ofa-mbv3-w1.2": _mobilenet_v3(24, (32, 48, 96, 136, 192), 1152, 1536),
    "ofa-proxyless-w1.3": _mobilenet_v2(40, 24, (32, 56, 104, 128, 248, 416), 1664, 1e-3),
    # Not OFA's: EfficientNet-Lite0 is a member, so ImageNet weights for it are easy to get.
    "ofa-lite-w1.0": _mobilenet_v2(32, 16, (24, 40, 80, 112, 192, 320), 1280, 1e-5),
    # Shrunk, not grown: the largest member is the network whose ImageNet weights it begins with.
    "ofa-lite0": _sub_nets_of_lite(1.0, (2, 2, 3, 3, 4, 1)),
    "ofa-lite1": _sub_nets_of_lite(1.0, (3, 3, 4, 4, 5, 1)),
    "ofa-lite2": _sub_nets_of_lite(1.1, (3, 3, 4, 4, 5, 1)),
}


def space_of(name: str) -> Space:
    """The space called `name`; EdgeKDError with the nearest if there is none."""
    if name not in SPACES:
        raise EdgeKDError(unknown("space", name, SPACES))
    return SPACES[name]


def subnets() -> dict[str, Arch]:
    """The 50 sub-nets that OFA's authors published, by their own names (`net@...`)."""
    table = json.loads(Path(__file__).with_name("subnets.json").read_text("utf-8"))
    return {name: Arch(**arch) for name, arch in table.items()}


def named(name: str) -> tuple[str, Arch]:
    """Full name and Arch of a sub-net: a published name or the start of just one, or `ofa-595`.

    `SPACE:min`, `SPACE:mid`, `SPACE:max` are the smallest, middle and largest, at 224 pixels.
    """
    table = subnets()
    wanted = "flops@595M" if name.lower() == "ofa-595" else name
    space, _, end = wanted.partition(":")
    if end in ("min", "mid", "max"):
        return wanted, uniform(space, end)
    found = [n for n in table if n == wanted] or [n for n in table if n.startswith(wanted)]
    if len(found) == 1:
        return found[0], table[found[0]]
    if len(found) > 1:
        raise EdgeKDError(f'sub-net "{name}" could be any of {", ".join(found)}: say more of it')
    short = [n.partition("_top1")[0] for n in table]
    raise EdgeKDError(unknown("sub-net", name, [*short, "ofa-595"]))


def uniform(space: str, end: str, resolution: int = 224) -> Arch:
    """The smallest ("min"), middle ("mid") or largest ("max") sub-net of a space."""

    def pick(options: Sequence[int]) -> int:
        return options[{"min": 0, "mid": (len(options) - 1) // 2, "max": -1}[end]]

    chosen = space_of(space)
    return Arch(
        space=space,
        kernel=tuple(pick(s.kernels) for s in chosen.stage_of_place),
        expand=(pick(chosen.expands),) * chosen.places,
        depth=tuple(pick(s.depths) for s in chosen.stages),
        resolution=resolution,
    )


def deepest(space: str, kernel: int, expand: int, resolution: int = 64) -> Arch:
    """The sub-net with a block at every place, of this expansion and this kernel, or of its stage's
    largest where that is smaller.
    """
    chosen = space_of(space)
    return Arch(
        space=space,
        kernel=tuple(min(kernel, s.kernels[-1]) for s in chosen.stage_of_place),
        expand=(expand,) * chosen.places,
        depth=tuple(s.places for s in chosen.stages),
        resolution=resolution,
    )


def sample(space: str, rng: random.Random, resolutions: Sequence[int]) -> Arch:
    """A random member: every kernel, expansion, depth and resolution drawn on its own."""
    chosen = space_of(space)
    return Arch(
        space=space,
        kernel=tuple(rng.choice(s.kernels) for s in chosen.stage_of_place),
        expand=tuple(rng.choice(chosen.expands) for _ in range(chosen.places)),
        depth=tuple(rng.choice(s.depths) for s in chosen.stages),
        resolution=rng.choice(list(resolutions)),
    )


def title(arch: Arch) -> str:
    """A short name for a sub-net that has none: its space, resolution and a hash of the rest."""
    content = canonical(arch).model_dump_json().encode()
    return f"{arch.space}-{arch.resolution}px-{hashlib.sha256(content).hexdigest()[:6]}"


def check(arch: Arch) -> Space:
    """The space of `arch`; EdgeKDError where `arch` is no member of it."""
    space = space_of(arch.space)
    stages = len(space.stages)
    if len(arch.depth) != stages or {len(arch.kernel), len(arch.expand)} != {space.places}:
        raise EdgeKDError(
            f"an Arch of {arch.space} has {stages} depths and {space.places} kernels and "
            f"expansions, got {len(arch.depth)}, {len(arch.kernel)} and {len(arch.expand)}"
        )
    for stage, depth in zip(space.stages, arch.depth, strict=True):
        if depth not in stage.depths:
            raise EdgeKDError(f"{arch.space} has no stage of depth {depth}: {stage.depths}")
    stage_of = space.stage_of_place
    for i in used(arch):
        k, e = arch.kernel[i], arch.expand[i]
        if k not in stage_of[i].kernels or e not in space.expands:
            raise EdgeKDError(
                f"{arch.space} has no kernel {k} with expansion {e} there "
                f"(kernels {stage_of[i].kernels}, expansions {space.expands})"
            )
    return space


def used(arch: Arch) -> list[int]:
    """The places (indices into kernel and expand) that the sub-net has: those within its depths."""
    starts, at = [], 0
    for stage in space_of(arch.space).stages:
        starts.append(at)
        at += stage.places
    return [s + i for s, depth in zip(starts, arch.depth, strict=True) for i in range(depth)]


def canonical(arch: Arch) -> Arch:
    """`arch` with zeros at the places beyond its depths: equal networks, equal Archs."""
    keep = set(used(arch))
    zeroed = {
        field: tuple(v if i in keep else 0 for i, v in enumerate(getattr(arch, field)))
        for field in ("kernel", "expand")
    }
    return arch.model_copy(update=zeroed)


class Piece(NamedTuple):
    """One piece of a network in the order of the data: all that its speed depends on."""

    kind: str  # stem | block | final_expand | mix | classifier
    size: int  # pixels a side of its input (1 after pooling)
    cin: int
    mid: int  # channels of a block's depthwise convolution; 0 in other pieces
    cout: int  # of the classifier: classes
    kernel: int
    stride: int
    act: str  # "" in the classifier
    se: bool = False
    skip: bool = False  # the input is added to the output


def pieces(arch: Arch, classes: int) -> Iterator[Piece]:
    """The pieces of the sub-net `arch` at its own resolution, from stem to classifier.

    The pooling is part of what comes after it. Sizes are those of padding k // 2.
    """
    space = check(arch)
    yield Piece("stem", arch.resolution, 3, 0, space.stem, 3, 2, space.act)
    size, width = (arch.resolution + 1) // 2, space.first
    skip = space.first_shortcut and space.stem == width
    yield Piece("block", size, space.stem, space.stem, width, 3, 1, space.first_act, skip=skip)
    places = iter(used(arch))
    for stage, depth in zip(space.stages, arch.depth, strict=True):
        for i in range(depth):
            place = next(places)
            stride = stage.stride if i == 0 else 1
            mid = make_divisible(round(width * arch.expand[place]))
            yield Piece(
                "block", size, width, mid, stage.width, arch.kernel[place], stride, stage.act,
                se=stage.se, skip=stride == 1 and width == stage.width,
            )  # fmt: skip
            size, width = (size + stride - 1) // stride, stage.width
    if space.final_expand:
        yield Piece("final_expand", size, width, 0, space.final_expand, 1, 1, "h_swish")
        width = space.final_expand
    act = "relu6" if space.mix_before_pool else "h_swish"
    yield Piece("mix", size if space.mix_before_pool else 1, width, 0, space.mix, 1, 1, act)
    yield Piece("classifier", 1, space.mix, 0, classes, 1, 1, "")
