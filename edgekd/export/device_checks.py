"""Will a file run on a device that is not here? What shows on any machine, and what remains.

A Jetson's plan is built by TensorRT on the Jetson, an NPU's blob by the driver beside the NPU. Both
refuse things that show before: operators, types, shapes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgekd.records import Artifact, EdgeKDError, Profile, Record

# Operators whose output's size depends on the data: refused where shapes are static.
DATA_DEPENDENT = {"NonMaxSuppression", "MulticlassNms", "MatrixNms", "NonZero", "Unique", "Loop",
                  "If", "TensorIterator", "DetectionOutput", "Proposal"}  # fmt: skip
MATRIX = ("Convolution", "GroupConvolution", "MatMul")  # OpenVINO's operators that are worth INT8
NPU_TYPES = {"f32", "f16", "i8", "u8", "i32", "i64", "boolean"}  # i64: shapes alone


class Outlook(Record):
    """What was found out about one file for one device."""

    device: str
    checked_by: str  # package and version
    layers: dict[str, int]  # precision -> how many layers multiply matrices in it
    slow: tuple[str, ...] = ()  # layers that will be neither INT8 nor FP16
    off_dla: tuple[str, ...] = ()  # layers that a deep learning accelerator does not take
    problems: tuple[str, ...] = ()  # what the device would refuse
    remains: tuple[str, ...] = ()  # what is to be done on the device, in order


def tensorrt(artifact: Artifact) -> Outlook:
    """The ONNX file as TensorRT's own parser reads it; EdgeKDError if it does not."""
    from edgekd import runtimes

    module: Any = runtimes.get("tensorrt")
    layers = module.parse(artifact.path)
    package = module.package()
    return Outlook(
        device="TensorRT",
        checked_by=f"{package.__name__} {package.__version__}",
        layers=dict(Counter(x.precision for x in layers)),
        slow=tuple(x.name for x in layers if x.precision == "fp32"),
        off_dla=tuple(x.name for x in layers if not x.dla),
        remains=(
            f"copy {artifact.folder} to the device",
            "there: pip install 'edgekd[tensorrt]', beside JetPack's own TensorRT",
            f"there: edgekd export --format tensorrt --artifact {artifact.folder.name}",
            "which builds the plan, checks it against the golden samples, and tells its latency",
        ),
    )


def npu(artifact: Artifact, profile: Profile) -> Outlook:
    """The IR's shapes, operators and types, as an Intel NPU wants them."""
    from edgekd.runtimes import openvino

    model = openvino.read(artifact.path)
    if profile.static_batch:
        openvino.fix_batch(model, 1)
    problems = []
    for op in model.get_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        if kind in DATA_DEPENDENT:
            problems.append(f"{name}: {kind} has an output whose size depends on the data")
        for output in op.outputs():
            if output.get_partial_shape().is_dynamic:
                problems.append(f"{name}: shape {output.get_partial_shape()} is not static")
            if output.get_element_type().get_type_name() not in NPU_TYPES:
                problems.append(f"{name}: type {output.get_element_type().get_type_name()}")
    layers = [op for op in model.get_ops() if op.get_type_name() in MATRIX]
    small = sum(_quantised(op) for op in layers)
    return Outlook(
        device="NPU",
        checked_by=f"openvino {openvino.ov.get_version().partition('-')[0]}",
        layers={"int8": small, "fp16": len(layers) - small},
        problems=tuple(problems),
        remains=(
            f"copy {artifact.folder} to the device",
            f"there: edgekd verify {artifact.folder.name} --profile {profile.name}",
            "which lets the driver compile it, and compares its answers with the golden samples",
        ),
    )


def _quantised(op: Any) -> bool:
    """Whether what goes into the operator comes out of a FakeQuantize."""
    node = op.input_value(0).get_node()
    while node.get_type_name() in ("Reshape", "Transpose", "MaxPool"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def check_symmetric(artifact: Artifact) -> None:
    """EdgeKDError for an INT8 file whose zero points TensorRT would refuse."""
    if artifact.precision == "int8" and not artifact.settings.get("symmetric"):
        raise EdgeKDError(
            f"{artifact.folder} has asymmetric activations, which TensorRT refuses: quantise it "
            "for a profile whose runtime is tensorrt (edgekd quantize --engine ort --force)"
        )


def folder_of(artifact: Artifact) -> Path:
    """Where what is built of an exported file on the device goes: beside it."""
    return artifact.folder.with_name(f"{artifact.folder.name}-plan")
