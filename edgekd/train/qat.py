"""Training that feels INT8: convolutions and linear layers see and have values of 8 bits.

Inputs are rounded on 256 steps of their range so far (a moving average), weights on 255 symmetric
steps a channel; gradients pass as if nothing were rounded (Jacob et al. 2018, arXiv 1712.05877).
Batch norms stay as they are: folding one into its convolution scales a channel, and a symmetric
grid a channel scales along. The weights are what is kept; an engine then quantises them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from edgekd.records import EdgeKDError

INPUT, WEIGHT = "fake_input", "fake_weight"  # modules added to each layer


def quantised(net: nn.Module) -> nn.Module:
    """`net` itself, each of its nn.Conv2d and nn.Linear now between fake quantisers."""
    found: list[Any] = [m for m in net.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    if not found:
        raise EdgeKDError("nothing to train in int8: the network has no plain convolution")
    for layer in found:
        layer.add_module(INPUT, _fake(a_channel=False))
        layer.add_module(WEIGHT, _fake(a_channel=True))
        layer.get_submodule(WEIGHT)(layer.weight.detach())  # a scale a channel, from the start
        kind: Any = type(layer)
        layer.__class__ = _class(kind)
    return net


def plain(net: nn.Module) -> nn.Module:
    """`net` itself as it was before `quantised`, with the weights it has learnt."""
    layers: list[Any] = list(net.modules())
    for layer in layers:
        if hasattr(layer, WEIGHT):
            layer.__class__ = type(layer).__mro__[1]
            delattr(layer, INPUT)
            delattr(layer, WEIGHT)
    return net


@cache
def _class(kind: Any) -> Any:
    """Conv2d or Linear, but between fake quantisers."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for fake in (self.fake_input, self.fake_weight):
            fake.observer_enabled[0] = int(self.training)  # ranges are learnt in training alone
        x, weight = self.fake_input(x), self.fake_weight(self.weight)
        if kind is nn.Linear:
            return nn.functional.linear(x, weight, self.bias)
        return self._conv_forward(x, weight, self.bias)

    return type(f"Int8{kind.__name__}", (kind,), {"forward": forward})


def _fake(*, a_channel: bool) -> nn.Module:
    try:
        from torchao.quantization import pt2e
    except ModuleNotFoundError:
        raise EdgeKDError(
            "training in int8 needs torchao: pip install 'edgekd[quantize]'"
        ) from None
    if a_channel:  # the range of the weights as they are now
        return pt2e.FakeQuantize(
            pt2e.MovingAveragePerChannelMinMaxObserver, quant_min=-127, quant_max=127,
            dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0,
            averaging_constant=1.0,
        )  # fmt: skip
    return pt2e.FakeQuantize(
        pt2e.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.uint8,
        qscheme=torch.per_tensor_affine, averaging_constant=0.01,
    )  # fmt: skip
