"""From a trained network to the ONNX waist, and from there to what a runtime loads."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.export.on_device import build_artifact as build_artifact
    from edgekd.export.onnx import COMPARED as COMPARED
    from edgekd.export.onnx import TOLERANCE as TOLERANCE
    from edgekd.export.onnx import of_pixels as of_pixels
    from edgekd.export.onnx import outputs as outputs
    from edgekd.export.onnx import to_onnx as to_onnx
    from edgekd.export.onnx import to_runtime as to_runtime

__all__ = [
    "COMPARED",
    "TOLERANCE",
    "build_artifact",
    "of_pixels",
    "outputs",
    "to_onnx",
    "to_runtime",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "on_device": "build_artifact",
        "onnx": "COMPARED TOLERANCE of_pixels outputs to_onnx to_runtime",
    },
)
