"""Changes to an ONNX graph that leave what it computes as it is."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.records import EdgeKDError, Spec

MATRIX = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # nodes that are worth INT8


def layers(path: Path) -> list[str]:
    """Names of the nodes that multiply matrices, in order."""
    graph = onnx.load(path, load_external_data=False).graph
    return [node.name for node in graph.node if node.op_type in MATRIX]


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """In FP16 inside; inputs and outputs stay FP32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():  # of weights below the smallest FP16: parity tells
        warnings.simplefilter("ignore")
        changed = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False)
    del changed.graph.value_info[:]  # of types that are no longer so
    return onnx.shape_inference.infer_shapes(changed)


def of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    """For a batch of one image, which some devices want to know beforehand."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for value in (*changed.graph.input, *changed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del changed.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(changed, strict_mode=True)


def of_pixels(model: onnx.ModelProto, spec: Spec) -> onnx.ModelProto:
    """The same graph for pixels: uint8 (N, H, W, 3) in, RGB, already resized.

    Computes what `preprocess.normalise` does: (x / 255 - mean) / std.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    height, width = spec.size
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    for node in graph.node:
        node.input[:] = ["prepared" if name == "image" else name for name in node.input]
    values = {
        "pixels.255": np.array(255, np.float32),
        "pixels.mean": np.array(spec.mean, np.float32).reshape(1, 3, 1, 1),
        "pixels.std": np.array(spec.std, np.float32).reshape(1, 3, 1, 1),
    }
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    before = [
        helper.make_node("Transpose", ["image"], ["pixels.nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["pixels.nchw"], ["pixels.float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels.float", "pixels.255"], ["pixels.unit"]),
        helper.make_node("Sub", ["pixels.unit", "pixels.mean"], ["pixels.centred"]),
        helper.make_node("Div", ["pixels.centred", "pixels.std"], ["prepared"]),
    ]
    for node in before:
        node.name = f"node_{node.output[0]}"
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    wanted = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, height, width, 3])
    graph.input[0].CopyFrom(wanted)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def read(path: Path) -> onnx.ModelProto:
    """The model in `path`, which must hold all of its weights itself."""
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as e:  # protobuf's, onnx's and the checker's errors share no base class
        reason = " ".join(str(e).split())[:160]
        raise EdgeKDError(f"{path} is no ONNX file that can be read: {reason}") from None
    return model
