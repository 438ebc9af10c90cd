"""NNCF on OpenVINO's graph. Its ONNX backend writes depthwise networks that do not run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.quantize.engines import NARROW, How, quiet
from edgekd.records import EdgeKDError
from edgekd.runtimes import openvino  # before NNCF: it blocks telemetry

with quiet():
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
    )
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Ranges

METHODS = {
    "min-max": "ranges as seen, biases corrected a layer at a time",
    "percentile": "ranges without the outermost values",
    "histogram": "ranges of the least error",
    "bias-correction": "ranges as seen, biases corrected with what came before; slower",
    "smooth-quant": "outlying channels' scale moved from activations to weights first",
    NARROW: "ranges as seen, weights in 7 bits: for x86 processors without VNNI",
}
FILES = ("model.xml", "model.bin")
KIND = "openvino"
RUNTIMES = ("openvino",)
PACKAGES = ("nncf", "openvino")
KEEPS = True


def write(onnx: Path, images: np.ndarray, out: Path, how: How) -> dict[str, Any]:
    """An IR with FakeQuantize nodes and 8-bit weights."""
    model = openvino.converted(onnx)
    advanced = AdvancedQuantizationParameters()
    if how.method in ("percentile", "histogram"):
        name = {"percentile": "MEAN_QUANTILE", "histogram": "HISTOGRAM"}[how.method]
        advanced.activations_range_estimator_params = getattr(Ranges, name)
    if how.method == NARROW:
        advanced.overflow_fix = OverflowFix.ENABLE
    if how.method == "smooth-quant":
        advanced.smooth_quant_alphas = AdvancedSmoothQuantParameters(convolution=0.5)
    preset = nncf.QuantizationPreset
    with quiet():
        model = nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in images]),
            preset=preset.PERFORMANCE if how.symmetric else preset.MIXED,
            subset_size=len(images),
            fast_bias_correction=how.method != "bias-correction",
            ignored_scope=nncf.IgnoredScope(names=_named(model, how.keep), validate=True),
            advanced_parameters=advanced,
            model_type=nncf.ModelType.TRANSFORMER if how.method == "smooth-quant" else None,
        )
    openvino.save(model, out / FILES[0])
    found = sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    if not found:
        raise EdgeKDError(f"nncf found nothing to quantise in {onnx}")
    return {"quantised": found}


def _named(model: openvino.ov.Model, nodes: Sequence[str]) -> list[str]:
    """What OpenVINO calls `nodes` of the ONNX file; one with a bias becomes two operators."""
    known = {op.get_friendly_name() for op in model.get_ops()}
    found = {n: [x for x in (f"{n}/WithoutBiases", n) if x in known][:1] for n in nodes}
    lost = [n for n, names in found.items() if not names]
    if lost:
        raise EdgeKDError(f"nncf finds no layer {', '.join(lost)}: it cannot stay in fp32")
    return [name for names in found.values() for name in names]
