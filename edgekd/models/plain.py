"""Students that are no sub-nets: five plain convolutions, or a teacher with fewer layers.

Both are of arXiv 2502.15959, which distils into "a CNN with five convolutional layers" and gives
neither widths nor pooling: ours double from 32 to 256 and halve the picture after each of the first
four. They have the methods of a timm network that the waist asks for.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from edgekd.records import EdgeKDError, unknown

WIDTHS = (32, 64, 128, 256, 256)
FEWER = re.compile(r"(.+):(\d+)")  # resnet34:3 is its first three stages


class Plain(nn.Module):
    """A classifier of stages, an average over space, and one linear layer."""

    def __init__(self, stages: list[nn.Module], width: int, classes: int):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def maps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(N, C, h, w) after each stage."""
        found, x = [], image
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward_features(self, image: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) after the last stage."""
        return self.maps(image)[-1]

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """(N, classes)."""
        return self.classifier(x.mean((2, 3)))

    def forward_intermediates(
        self, image: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As timm's: (after the last stage, after each)."""
        maps = self.maps(image)
        return maps[-1], maps

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.forward_head(self.forward_features(image))

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.classifier


class Fewer(Plain):
    """The first stages of a timm network."""

    def __init__(self, trunk: Any, classes: int):
        super().__init__([], trunk.feature_info.channels()[-1], classes)
        self.trunk = trunk

    def maps(self, image: torch.Tensor) -> list[torch.Tensor]:  # noqa: D102
        widths = self.trunk.feature_info.channels()
        return [x if x.shape[1] == w else x.permute(0, 3, 1, 2)
                for x, w in zip(self.trunk(image), widths, strict=True)]  # fmt: skip


def five_convolutions(classes: int) -> Plain:
    """3x3 convolution, batch norm, ReLU, five times; a pooling after each of the first four."""
    stages: list[nn.Module] = []
    before = 3
    for number, width in enumerate(WIDTHS, 1):
        layers = [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                  nn.ReLU(inplace=True)]  # fmt: skip
        stages.append(nn.Sequential(*layers, *[nn.MaxPool2d(2)] * (number < len(WIDTHS))))
        before = width
    return Plain(stages, before, classes)


def fewer_layers(name: str, stages: int, classes: int) -> Fewer:
    """The first `stages` of timm's network `name`, from scratch."""
    import timm

    if not timm.is_model(name):
        raise EdgeKDError(unknown("timm network", name, []))
    whole: Any = timm.create_model(name, features_only=True)
    known = len(whole.feature_info)
    if not 1 <= stages <= known:
        raise EdgeKDError(f"{name} has {known} stages, {name}:{stages} asks for {stages}")
    trunk = timm.create_model(name, features_only=True, out_indices=tuple(range(stages)))
    return Fewer(trunk, classes)
