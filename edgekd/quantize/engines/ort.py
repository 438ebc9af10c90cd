"""ONNX Runtime's static quantisation: Q/DQ nodes in an ONNX file that every runtime here loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx as format_
from onnxruntime import quantization as ort
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgekd.quantize.engines import NARROW, How, quiet
from edgekd.records import EdgeKDError, write_atomic

METHODS = {
    "min-max": "ranges as seen",
    "percentile": "ranges without the outermost 0.01 % of values",
    "entropy": "ranges of the least loss of information",
    NARROW: "ranges as seen, weights in 7 bits: for x86 processors without VNNI",
}
FILES = ("model.onnx",)
KIND = "onnx"
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
PACKAGES = ("onnxruntime", "onnx")
KEEPS = True
CHUNK = 16  # images whose activations are held in memory


class _Images(ort.CalibrationDataReader):
    """Images one at a time, in ranges: a calibrator keeps every tensor of a range in memory."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.turn: Iterator[np.ndarray] = iter(images)

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.turn = iter(self.images[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.turn, None)
        return None if image is None else {"image": image[None]}


def write(onnx: Path, images: np.ndarray, out: Path, how: How) -> dict[str, Any]:
    """Symmetric weights a channel; activations a tensor, asymmetric where that is understood."""
    if len(images) % CHUNK:  # a range must be whole: the last ones are asked again
        images = np.concatenate([images, images[: CHUNK - len(images) % CHUNK]])
    method = {"min-max": "MinMax", NARROW: "MinMax", "percentile": "Percentile",
              "entropy": "Entropy"}[how.method]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder, quiet():
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(onnx, ready, skip_symbolic_shape=True)
        ort.quantize_static(
            ready, out / FILES[0], _Images(images),
            quant_format=ort.QuantFormat.QDQ, per_channel=True, reduce_range=how.method == NARROW,
            activation_type=ort.QuantType.QInt8 if how.symmetric else ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, method),
            nodes_to_exclude=list(how.keep),
            extra_options={"ActivationSymmetric": how.symmetric, "CalibStridedMinMax": CHUNK,
                           "CalibPercentile": 99.99,
                           # TensorRT and OpenVINO fold an activation into its convolution, so
                           # Q/DQ pairs belong behind it
                           "QDQKeepRemovableActivations": how.symmetric,
                           "QuantizeBias": not how.symmetric},  # TensorRT wants them in FP32
        )  # fmt: skip
    model = format_.load(out / FILES[0])
    found = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not found:
        raise EdgeKDError(f"onnxruntime found nothing to quantise in {onnx}")
    tidy(model, onnx, out / FILES[0])
    return {"quantised": found}


def tidy(model: format_.ModelProto, source: Path, path: Path) -> None:
    """Save with the source's metadata and IR version, without operator sets that nothing uses."""
    before = format_.load(source, load_external_data=False)
    used = {node.domain for node in model.graph.node}
    opsets = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = before.ir_version
    del model.metadata_props[:]
    model.metadata_props.extend(before.metadata_props)
    format_.checker.check_model(model, full_check=True)
    write_atomic(path, model.SerializeToString())
