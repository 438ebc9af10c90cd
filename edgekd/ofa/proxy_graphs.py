"""ONNX graphs that take as long as a sub-net or a piece of one, with weights that say nothing.

Speed does not depend on what the weights are, so a graph to be timed is written down directly: in
milliseconds, without torch, and also on a device. INT8 graphs carry Q/DQ nodes where NNCF puts its
own: once behind every convolution (and its activation), every addition, and the pooling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.ofa import spaces
from edgekd.ofa.spaces import Piece, make_divisible
from edgekd.records import Arch, EdgeKDError

OPSET, IR_VERSION = 18, 10  # as `export` writes them
MIN_GRID = 12  # cells a side of the explained map at least, as in `models`


def network(arch: Arch, classes: int, precision: str, seed: int = 0) -> bytes:
    """A whole sub-net with the waist's two outputs: `image` -> `logits`, `features`."""
    graph, x, pooled = _Graph(precision, seed), "image", False
    grids: dict[int, str] = {}  # cells a side -> the last map of that size
    for piece in spaces.pieces(arch, classes):
        narrows = piece.kind == "block" and piece.stride == 2
        if piece.size > 1 and (narrows or piece.kind in ("final_expand", "mix")):
            grids[piece.size] = x
        if piece.size == 1 and not pooled:
            x, pooled = graph.pool(x), True
        x = graph.piece(piece, x)
    fits = [side for side in grids if side >= MIN_GRID]
    explained = grids[min(fits) if fits else max(grids)]
    return graph.model(x, explained, arch.resolution, 3)


def piece(wanted: Piece, precision: str, seed: int = 0) -> bytes:
    """One piece alone: `image` (N, cin, size, size) -> `logits`, its output's mean; `features`."""
    graph = _Graph(precision, seed)
    x = graph.piece(wanted, "image")
    mean = x if wanted.size == 1 else graph.pool(x)
    return graph.model(mean, mean, wanted.size, wanted.cin)


class _Graph:
    """Nodes and tensors of a graph in the making."""

    def __init__(self, precision: str, seed: int):
        if precision not in ("fp32", "fp16", "bf16", "int8"):
            raise EdgeKDError(f"no graphs in {precision}: fp32, fp16, bf16 or int8")
        self.int8 = precision == "int8"
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.positive: set[str] = set()  # outputs that are never below zero
        self.known: dict[str, str] = {}  # output -> the same, quantised

    def piece(self, p: Piece, x: str) -> str:
        """Add a piece; the name of its output."""
        if p.kind == "classifier":
            return self.linear(x, p.cin, p.cout)
        if p.kind != "block":
            return self.conv(x, p.cin, p.cout, p.kernel, stride=p.stride, act=p.act)
        y = x
        if p.mid != p.cin:
            y = self.conv(y, p.cin, p.mid, 1, act=p.act)
        y = self.conv(y, p.mid, p.mid, p.kernel, stride=p.stride, groups=p.mid, act=p.act)
        if p.se:
            y = self.gate(y, p.mid)
        y = self.conv(y, p.mid, p.cout, 1, act="")
        if not p.skip:
            return y
        return self.node("Add", self.quantised(x), self.quantised(y))

    def conv(
        self,
        x: str,
        cin: int,
        cout: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: str,
    ) -> str:
        """Convolution with bias (batch norm is folded in), then the activation."""
        shape = (cout, cin // groups, kernel, kernel)
        pad = [kernel // 2] * 4
        inputs = [self.quantised(x, groups), self.weights(shape), self.bias(cout)]
        y = self.node("Conv", *inputs, kernel_shape=[kernel] * 2, pads=pad,
                      strides=[stride] * 2, group=groups)  # fmt: skip
        return self.activated(y, act)

    def linear(self, x: str, cin: int, cout: int) -> str:
        """(N, cin, 1, 1) -> (N, cout)."""
        weights = self.node("Transpose", self.weights((cout, cin)), perm=[1, 0])
        flat = self.node("Flatten", self.quantised(x))
        return self.node("Add", self.node("MatMul", flat, weights), self.bias(cout))

    def activated(self, x: str, act: str) -> str:
        """`x` after an activation of `spaces`."""
        if act == "relu6":
            limits = (self.tensor(np.float32(0)), self.tensor(np.float32(6)))
            x = self.node("Clip", x, *limits)
        elif act:
            x = self.node({"relu": "Relu", "h_swish": "HardSwish"}[act], x)
        if act in ("relu", "relu6"):
            self.positive.add(x)
        return x

    def gate(self, x: str, channels: int) -> str:
        """Squeeze-excite."""
        mid = make_divisible(channels // 4)
        y = self.conv(self.pool(x), channels, mid, 1, act="relu")
        y = self.conv(y, mid, channels, 1, act="")
        gate = self.node("HardSigmoid", y, alpha=1 / 6, beta=0.5)
        self.positive.add(gate)
        return self.node("Mul", self.quantised(x), self.quantised(gate))

    def pool(self, x: str) -> str:
        """Mean over the map, kept as (N, C, 1, 1)."""
        return self.node("ReduceMean", self.quantised(x), self.tensor(np.array([2, 3])),
                         keepdims=1)  # fmt: skip

    def quantised(self, x: str, channels: int = 1) -> str:
        """`x` through Q and DQ where the graph is INT8: once, for all that read it.

        What a depthwise convolution reads has a scale for each of its `channels`.
        """
        if not self.int8:
            return x
        if x not in self.known:
            shape = (channels,) if channels > 1 else ()
            axis = {"axis": 1} if shape else {}
            scale = self.rng.uniform(4, 6, shape) / 255
            zero = np.full(shape, 0 if x in self.positive else 125, np.uint8)
            at = self.tensor(np.asarray(scale, np.float32)), self.tensor(zero)
            short = self.node("QuantizeLinear", x, *at, **axis)
            self.known[x] = self.node("DequantizeLinear", short, *at, **axis)
        return self.known[x]

    def weights(self, shape: tuple[int, ...]) -> str:
        """Random weights that keep the size of activations; INT8 ones per output channel."""
        spread = (2 / np.prod(shape[1:])) ** 0.5
        if not self.int8:
            return self.tensor(self.rng.normal(0, spread, shape).astype(np.float32))
        values = self.rng.integers(-127, 128, shape, dtype=np.int8)
        scale = np.full(shape[0], spread / 64, np.float32)
        at = self.tensor(scale), self.tensor(np.zeros(shape[0], np.int8))
        return self.node("DequantizeLinear", self.tensor(values), *at, axis=0)

    def bias(self, channels: int) -> str:
        """A small one a channel."""
        return self.tensor(self.rng.normal(0, 0.1, channels).astype(np.float32))

    def tensor(self, value: np.ndarray | np.generic) -> str:
        """Add a constant; its name."""
        from onnx import numpy_helper

        name = f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator; the name of its output."""
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def model(self, logits: str, features: str, size: int, channels: int) -> bytes:
        """The finished file; logits (N, K, 1, 1) become (N, K)."""
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Flatten", [logits], ["logits"], axis=1))
        self.nodes.append(helper.make_node("Identity", [features], ["features"]))
        kind = TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "standin",
            [helper.make_tensor_value_info("image", kind, ["batch", channels, size, size])],
            [helper.make_tensor_value_info(n, kind, None) for n in ("logits", "features")],
            self.tensors,
        )
        opset = helper.make_opsetid("", OPSET)
        made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        return made.SerializeToString()
