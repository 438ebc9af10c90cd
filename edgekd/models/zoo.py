"""From a name and a checkpoint to a network with the waist's two outputs, and back from disk."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from edgekd.data.augment import View
from edgekd.models import checkpoints, plain
from edgekd.ofa import spaces, warmstart
from edgekd.ofa.supernet import SubNet, Supernet, build
from edgekd.records import Arch, Artifact, EdgeKDError, Spec, unknown

MIN_GRID = 12  # cells a side: on MRI a 16x16 grid found tumours twice as well as 8x8 or 4x4
WEIGHTS = "model.safetensors"
CALIBRATED_ON = 2000  # training images for a sub-net's batch norm, as in OFA


class Waist(nn.Module):
    """A classifier with its explained feature map kept: image -> (logits, features).

    image (N, 3, H, W), logits (N, classes), features (N, C, h, w). `features` is the stage that
    `layer` names ("stage3", "head"), or the deepest whose grid has at least MIN_GRID cells a side
    at this input size.
    """

    def __init__(self, net: Any, size: tuple[int, int], layer: str = ""):
        """EdgeKDError if the network does not take this size, or cannot be explained."""
        super().__init__()
        self.net: Any = net  # timm networks have more methods than nn.Module declares
        training = net.training
        net.eval()
        with torch.no_grad():
            # timm's intermediates come with what the head wants, but not of every network.
            once = hasattr(net, "forward_intermediates")
            self._once = once and _gives_its_logits(net, size, once=True)
            if not self._once and not _gives_its_logits(net, size, once=False):
                raise EdgeKDError(
                    f"{type(net).__name__} answers otherwise than the head on its last feature map "
                    "does, so it cannot be explained: take another network"
                )
            _, maps = _final_and_maps(net, _noise(size), self._once)
        net.train(training)
        names = [*(f"stage{i + 1}" for i in range(len(maps) - 1)), "head"]
        self.shapes = {n: tuple(m.shape[1:]) for n, m in zip(names, maps, strict=True)}  # (C, h, w)
        fits = [i for i, m in enumerate(maps) if min(m.shape[2:]) >= MIN_GRID]
        if layer and layer not in names:
            raise EdgeKDError(unknown("layer", layer, names))
        self.index = names.index(layer) if layer else fits[-1] if fits else 0

    @property
    def layer(self) -> str:
        """Name and shape of what is explained: 'stage3 40x16x16'."""
        return self.title(list(self.shapes)[self.index])

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) cells of what is explained."""
        _, h, w = list(self.shapes.values())[self.index]
        return h, w

    def title(self, name: str) -> str:
        """Name and shape of a stage."""
        return f"{name} " + "x".join(map(str, self.shapes[name]))

    def at(self, name: str) -> Waist:
        """The same network, another stage explained."""
        other = copy.copy(self)  # a module's copy shares its parameters
        other.index = list(self.shapes).index(name)
        return other

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: D102
        logits, features, _ = self.answers(image)
        return logits, features

    def answers(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, the explained map, and the last map, which the head sees (N, C', h', w')."""
        final, maps = _final_and_maps(self.net, image, self._once)
        return _head(self.net, final), maps[self.index], maps[-1]


def _noise(size: tuple[int, int]) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1], always the same."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))


def _gives_its_logits(net: Any, size: tuple[int, int], *, once: bool) -> bool:
    """Whether the head gives the network's own logits of what `_final_and_maps` finds."""
    image = _noise(size)
    try:
        expected = net(image)
    except Exception as e:  # timm's networks raise whatever their layers stumble on
        height, width = size
        native = getattr(net, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
        raise EdgeKDError(
            f"{type(net).__name__} does not take images of {height} x {width} pixels "
            f"({first_line(e)}): give another --size (it was made for {native[0]}), or take "
            "another network"
        ) from None
    final, _ = _final_and_maps(net, image, once)
    try:
        logits = _head(net, final)
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return False
    least = 1e-4 * expected.abs().max() + 1e-6
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= least)


def first_line(e: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    words = str(e).strip().partition("\n")[0][:100]
    return f"{type(e).__name__}: {words}" if words else type(e).__name__


def _head(net: Any, final: Any) -> torch.Tensor:
    """(N, classes) logits of what `_final_and_maps` says the head wants."""
    return net.head(final) if isinstance(net, SubNet) else net.forward_head(final)


def _final_and_maps(net: Any, image: torch.Tensor, once: bool) -> tuple[Any, list[torch.Tensor]]:
    """(what the head wants, (N, C, h, w) of every stage, the one that the head sees last)."""
    if isinstance(net, SubNet):
        maps = net.maps(image)
        return maps[-1], maps
    if once:
        final, found = net.forward_intermediates(image, output_fmt="NCHW")
    else:
        final, found = net.forward_features(image), []
        if hasattr(net, "forward_intermediates"):
            found = net.forward_intermediates(image, output_fmt="NCHW", intermediates_only=True)
    if torch.is_tensor(final):
        return final, [*found, _as_nchw(net, final, found)]
    if not found:
        raise EdgeKDError(
            f"{type(net).__name__} gives no feature map, so it cannot be explained: take another "
            "network"
        )
    return final, list(found)  # branches: the head sees several, the last stage stands for them


def _as_nchw(net: Any, x: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
    """The final map of a timm network as (N, C, h, w): NHWC and token layouts are turned.

    found: maps of its stages. Tokens before those of the last one's grid are no places of the
    image; where there is no such grid it is square.
    """
    if x.ndim == 3:  # (N, prefix + h*w, C)
        tokens = x.shape[1] - getattr(net, "num_prefix_tokens", 0)
        h = w = round(tokens**0.5)
        if h * w != tokens and found:
            h, w = found[-1].shape[2:]
            tokens = h * w
        if h * w != tokens or tokens > x.shape[1]:
            raise EdgeKDError(
                f"{type(net).__name__} has {tokens} tokens, not a square grid, so it cannot be "
                "explained: take another network or --size"
            )
        return x[:, -tokens:].transpose(1, 2).reshape(len(x), -1, h, w)
    if x.ndim != 4:
        raise EdgeKDError(
            f"{type(net).__name__} has no feature map before its head, so it cannot be explained: "
            "take another network"
        )
    return x.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else x


ALIASES = {  # names of the papers -> timm's
    "autoformerv2-t": "swin_s3_tiny_224",
    "visformer-s": "visformer_small",
}
FIVE = "five-convolutions"


def known(name: str) -> bool:
    """Whether `classifier` makes a network of that name."""
    import timm

    fewer = plain.FEWER.fullmatch(name)
    base = fewer[1] if fewer else name
    return name == FIVE or timm.is_model(ALIASES.get(base, base))


def classifier(
    name: str,
    classes: int,
    *,
    size: tuple[int, int] | None = None,
    weights: Path | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A network by name: timm's, a paper's alias, `five-convolutions`, or `NAME:K`, its first K
    stages; the last two from scratch. size: as `teacher` has it.
    """
    fewer = plain.FEWER.fullmatch(name)
    if not (fewer or name == FIVE):
        name = ALIASES.get(name, name)
        return teacher(name, classes, size=size, weights=weights, pretrained=pretrained)
    if weights or pretrained:
        raise EdgeKDError(f"{name} begins from scratch: there are no weights of it")
    if fewer:
        return plain.fewer_layers(ALIASES.get(fewer[1], fewer[1]), int(fewer[2]), classes)
    return plain.five_convolutions(classes)


def teacher(
    name: str,
    classes: int,
    *,
    size: tuple[int, int] | None = None,
    weights: Path | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """The timm network `name` with `classes` outputs: from `weights`, the hub, or from scratch.

    size: (H, W) of its images, for networks that are built for one; None: timm's own.
    """
    import timm

    if not timm.is_model(name):
        raise EdgeKDError(_unknown_teacher(name, timm.list_models()))
    if weights and pretrained:
        raise EdgeKDError("give --teacher-weights or --pretrained, not both")
    try:
        fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
        side = size[0] if size and size[0] == size[1] else size
        built: dict[str, Any] = {"img_size": side} if size and fixed else {}
        net: Any = timm.create_model(name, pretrained=pretrained, num_classes=classes, **built)
    except Exception as e:  # of a size or a tag, whatever timm stumbles on
        if not pretrained:
            at = f" for images of {size[0]} x {size[1]} pixels" if size else ""
            raise EdgeKDError(
                f"{name} cannot be built{at} ({first_line(e)}): give another --size, or take "
                "another network"
            ) from None
        raise EdgeKDError(
            f"no pretrained weights for {name} ({str(e).splitlines()[0]}): "
            "give a local file with --teacher-weights"
        ) from None
    if not (hasattr(net, "get_classifier") and hasattr(net, "forward_head")):
        raise EdgeKDError(f"{name} is no classifier: take another network")
    if not pretrained or classes != net.pretrained_cfg["num_classes"]:
        _small_head(net)
    if weights:
        _fill(net, checkpoints.tensors(weights), weights)
    return net


def _small_head(net: Any) -> None:
    """A new classifier begins near zero: timm's grows as the classes get fewer (loss 2.2 of 3)."""
    for module in (m for head in _classifiers(net) for m in head.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _classifiers(net: Any) -> list[nn.Module]:
    """The last layers; distilled transformers have two."""
    found = net.get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _unknown_teacher(name: str, known: list[str]) -> str:
    """Timm has over a thousand names: the nearest, not all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return unknown("teacher", name, near).replace("(known:", "(timm has, among others:")


# lukemelas' EfficientNet-PyTorch names -> timm's; the first block has no expansion there.
EFFICIENTNET_PYTORCH = [
    (r"^_conv_stem\.", "conv_stem."),
    (r"^_bn0\.", "bn1."),
    (r"^_conv_head\.", "conv_head."),
    (r"^_bn1\.", "bn2."),
    (r"^_fc\.", "classifier."),
]


def _fill(net: Any, state: dict[str, torch.Tensor], source: Path) -> None:
    """Load `state` into `net`; only a classifier of another size may stay as it is initialised."""
    state = dict(checkpoints.without_prefix(state, net.state_dict(), source))
    if "_conv_stem.weight" in state:
        state = _rename_efficientnet(state, net)
    own = net.state_dict()
    if any(k not in state or own[k].shape != state[k].shape for k in own):
        # The authors' names, such as AutoFormerV2's (S3), and positions of another size of image.
        as_timms = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        with contextlib.suppress(Exception):  # of other names than these it raises anything
            state = as_timms(state, net) if as_timms else state
    last = {id(m) for head in _classifiers(net) for m in head.modules()}
    head_names = {n for n, m in net.named_modules() if id(m) in last}
    heads = {k for k in own if k.rpartition(".")[0] in head_names}
    usable = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    wrong = [k for k in own if k not in usable and k not in heads]
    wrong = [k for k in wrong if not k.endswith("num_batches_tracked")]
    if wrong:
        key = wrong[0]
        given = f"has shape {tuple(state[key].shape)} there" if key in state else "is not in it"
        raise EdgeKDError(
            f"{source} does not fit {type(net).__name__}: {key} {tuple(own[key].shape)} {given} "
            f"({len(wrong)} such tensors; names in it: {', '.join(list(state)[:2])}, ...): give "
            "the weights of this very network"
        )
    for key, value in usable.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise EdgeKDError(f"{source}: {key} is {value.dtype} there: give weights before INT8")
        if not torch.isfinite(value).all():
            raise EdgeKDError(f"{source}: {key} holds NaN or infinity: give another file")
    net.load_state_dict(usable, strict=False)


def _rename_efficientnet(state: dict[str, torch.Tensor], net: Any) -> dict:
    """Keys of EfficientNet-PyTorch (and the lite nets made from it) under timm's names."""
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(net.blocks) for b in range(len(stage))]
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    full = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3", "_se_reduce": "se.conv_reduce",
            "_se_expand": "se.conv_expand"}  # fmt: skip
    renamed = {}
    for key, value in state.items():
        m = re.match(r"_blocks\.(\d+)\.(\w+)\.(.*)", key)
        if m and int(m[1]) < len(places):
            names = full if f"_blocks.{m[1]}._expand_conv.weight" in state else plain
            key = f"{places[int(m[1])]}.{names.get(m[2], m[2])}.{m[3]}"
        for old, new in EFFICIENTNET_PYTORCH:
            key = re.sub(old, new, key)
        renamed[key] = value
    return renamed


def supernet(
    space: str, classes: int, *, start: str = "scratch", weights: Path | None = None,
    pretrained: bool = False, seed: int = 0,
) -> Supernet:  # fmt: skip
    """A supernet of `space`: from scratch, or with the weights of `start`.

    start: a timm network that is a member of the space, or an official supernet's checkpoint by
    its name, in the file `weights`.
    """
    torch.manual_seed(seed)
    if start == "scratch":
        return Supernet(space, classes)
    if start in checkpoints.SUPERNETS and weights is not None:
        net = Supernet(space, classes)
        checkpoints.fill_supernet(net, checkpoints.read(weights), weights)
        return net
    warmstart.check(space, start)
    source = teacher(start, classes, weights=weights, pretrained=pretrained).eval()
    torch.manual_seed(seed)
    net = Supernet(space, classes, mix_bias=not spaces.space_of(space).mix_before_pool)
    warmstart.fill(net, source)
    net.sort_channels()
    return net


def published(arch: Arch, classes: int, weights: Path, seed: int = 0) -> SubNet:
    """A sub-net with its official weights in a file; a head of 1000 classes is replaced."""
    torch.manual_seed(seed)
    net = build(arch, classes)
    checkpoints.fill_subnet(net, checkpoints.read(weights), weights)
    return net


def load_supernet(artifact: Artifact) -> Supernet:
    """The trained supernet of an artifact, in eval mode on the CPU."""
    if artifact.kind != "supernet":
        raise EdgeKDError(f"{artifact.folder} holds a {artifact.kind} file, not a supernet")
    state = safetensors.torch.load_file(artifact.folder / WEIGHTS)
    biased = "feature_mix_layer.conv.bias" in state
    net = Supernet(artifact.model, len(artifact.spec.classes), mix_bias=biased)
    net.load_state_dict(state)
    return net.eval()


def calibration_batches(
    images: View, count: int, size: tuple[int, int], wanted: int = CALIBRATED_ON
) -> Iterator[torch.Tensor]:
    """At most `wanted` of `count` training images, spread evenly, augmented, 200 a batch."""
    chosen = np.unique(np.linspace(0, count - 1, wanted).astype(int))
    for i in range(0, len(chosen), 200):
        yield images(size, 0, chosen[i : i + 200])


def student(arch: Arch, classes: int) -> SubNet:
    """The sub-net `arch`, from scratch."""
    return build(arch, classes)


def load(artifact: Artifact, layer: str = "") -> Waist:
    """The trained network of a teacher or student artifact, in eval mode on the CPU.

    layer: whose output is explained, see Waist.
    """
    if artifact.kind not in ("teacher", "student"):
        raise EdgeKDError(f"{artifact.folder} holds a {artifact.kind} file, not a trained network")
    classes = len(artifact.spec.classes)
    state = safetensors.torch.load_file(artifact.folder / WEIGHTS)
    net: nn.Module
    if artifact.arch:
        net = build(artifact.arch, classes, mix_bias="feature_mix_layer.conv.bias" in state)
    else:
        net = classifier(artifact.model, classes, size=artifact.spec.size)
        if any(k in state and state[k].shape != v.shape for k, v in net.state_dict().items()):
            net = classifier(artifact.model, classes)  # as edgekd built it before it gave the size
    net.load_state_dict(state)
    return Waist(net, artifact.spec.size, layer).eval()


def without_colour(net: nn.Module, spec: Spec) -> None:
    """Take out of the first convolution's weights what grey pictures cannot show it; exact.

    At every pixel, masked or padded ones too, the three channels of a prepared grey picture are
    u / std + v * mean / std: of a kernel's three weights there only their part in that plane
    counts. Filters for colours, which ImageNet's weights have, have large parts beside it that
    cancel; rounded to 8 bits they do not, and all layers after amplify what is left. On MRI slices
    INT8 lost 1.2 points of balanced accuracy instead of 3.1, and its maps agreed by 0.84, not 0.75.
    """
    stem: Any = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if spec.channels != "grey" or stem is None or stem.in_channels != 3 or stem.groups != 1:
        return
    plane = np.stack([np.ones(3), spec.mean], 1) / np.array(spec.std)[:, None]  # (3, 2)
    onto = torch.from_numpy(plane @ np.linalg.pinv(plane)).to(stem.weight)
    with torch.no_grad():
        stem.weight.copy_(torch.einsum("dc,ockl->odkl", onto, stem.weight))


def weights_of(net: nn.Module) -> bytes:
    """A network's tensors as safetensors."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    return safetensors.torch.save(state)


def save_weights(net: nn.Module, path: Path) -> None:
    """Write `weights_of` a network, whole or not at all."""
    from edgekd.records import write_atomic

    write_atomic(path, weights_of(net))


def count(net: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(parameters, multiply-accumulates of one image in convolutions and linear layers)."""
    macs = 0

    def add(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            kernel = module.weight[0].numel()  # (in / groups) * k * k
            macs += output.numel() * kernel
        elif isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, kinds)]
    training = net.training
    try:
        net.eval()
        with torch.no_grad():
            net(torch.zeros(1, 3, *size, device=next(net.parameters()).device))
    finally:
        net.train(training)
        for h in hooks:
            h.remove()
    return sum(p.numel() for p in net.parameters()), macs
