"""A sub-net as the file that a device would load, made to be measured and not to be deployed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd import export
from edgekd.models import zoo
from edgekd.ofa import spaces
from edgekd.ofa.supernet import SubNet
from edgekd.quantize import ptq
from edgekd.records import Arch, Artifact, EdgeKDError, Spec

CALIBRATION = 8  # images: the ranges do not change the speed


def deployed(
    net: SubNet,
    arch: Arch,
    spec: Spec,
    precision: str,
    images: np.ndarray,
    out: Path,
    runtime: str = "openvino",
) -> Artifact:
    """`net` in `out` as ONNX (fp32) or as a quantised IR (int8), by the stages' own code.

    images: (n, 3, H, W) float32 at the Arch's resolution. runtime: that loads the file.
    """
    if precision not in ("fp32", "int8"):
        raise EdgeKDError(f"a sub-net can be tried in fp32 or int8 here, not in {precision}")
    params, macs = zoo.count(net, spec.size)
    trained = Artifact(
        kind="student",
        model=spaces.title(arch),
        files={zoo.WEIGHTS: "0" * 64},  # never written: these weights are only measured
        spec=spec,
        arch=arch,
        params=params,
        macs=macs,
    )
    waist = zoo.Waist(net, spec.size).eval()
    few = images[:CALIBRATION]
    onnx = export.to_onnx(waist, trained, few, out / f"{spaces.title(arch)}-fp32", tolerance=0.1)
    if precision == "fp32":
        return onnx
    engine = "nncf" if runtime == "openvino" else "ort"
    return ptq.quantize(
        onnx, few, out / f"{spaces.title(arch)}-int8", engine=engine, runtime=runtime
    )
