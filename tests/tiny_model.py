"""Makes edgekd/tiny, the model that `edgekd doctor` sends through every runtime.

python tests/tiny_model.py
"""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd import runtimes
from edgekd.pipeline.doctor import TINY, WEIGHTS
from edgekd.records import Artifact, Profile, Spec, sha256
from edgekd.runtimes import golden

SPEC = Spec(classes=("nodule", "normal", "opacity"), size=(32, 32), channels="grey")


def weights():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, 3, 4, 4), "offset": (8,), "matrix": (8, 3), "bias": (3,)}
    return {k: rng.normal(0, 0.5, s).astype(np.float32) for k, s in shapes.items()}


def model(values):
    nodes = [
        helper.make_node("Conv", ["image", "kernel", "offset"], ["sum"], strides=[4, 4],
                         pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["sum"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["logits"]),
    ]  # fmt: skip
    shapes = {"image": ["batch", 3, 32, 32], "logits": ["batch", 3], "features": ["batch", 8, 8, 8]}
    image, logits, features = (
        helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()
    )
    graph = helper.make_graph(
        nodes, "tiny", [image], [logits, features],
        [numpy_helper.from_array(v, k) for k, v in values.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def make(out):
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    values = weights()
    (out / "model.onnx").write_bytes(model(values).SerializeToString())
    with io.BytesIO() as buffer:
        np.savez(buffer, **values)
        (out / WEIGHTS).write_bytes(buffer.getvalue())
    cpu = Profile(name="cpu", runtime="onnxruntime", device="CPU")
    session = runtimes.get("onnxruntime").load(out / "model.onnx", cpu, "fp32", None)
    names = ["model.onnx", WEIGHTS, golden.write(out, session, SPEC, "fp32")]
    Artifact(kind="onnx", model="tiny", spec=SPEC, layer="conv 8x8x8", params=419, macs=24600,
             files={n: sha256(out / n) for n in names}).save(out)  # fmt: skip


if __name__ == "__main__":
    make(TINY if len(sys.argv) == 1 else Path(sys.argv[1]))
