"""Quantisers that do not live in this environment: Optimum and Olive, by their defaults for a CPU.

Optimum has settings by instructions; they are taken as its documentation tells for this processor.

Each gets an environment of its own that lies over this one, as their requirements contradict each
other; `quantise` asks there. Their packages must be installable: without them, what asked fails.

    python benchmarks/elsewhere.py optimum|olive fp32.onnx images.npy out.onnx avx2  # run there
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import numpy as np

FOR_VNNI, FOR_AVX2 = "avx512_vnni", "avx2"  # Optimum's own names
PACKAGES = {
    "optimum": ("optimum-onnx[onnxruntime]==0.1.0", "datasets==5.0.1"),
    "olive": ("olive-ai==0.13.0",),
}


def quantise(tool: str, root: Path, onnx: Path, images: np.ndarray, out: Path) -> None:
    """An ONNX file with INT8 weights and activations, calibrated with images (N, 3, H, W)."""
    python = environment(tool, root)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "images.npy")
        np.save(given, images)
        # Neither may ask a hub or tell its maker that it was used.
        silent = {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        command = [python, __file__, tool, onnx.resolve(), given, out.resolve(), settings()]
        subprocess.run(command, check=True, env=os.environ | silent, cwd=folder)


def settings() -> str:
    """Those of Optimum's that fit this processor."""
    from edgekd.runtimes import machine  # not at hand where the tools run

    return FOR_AVX2 if machine.overflows(machine.instructions()) else FOR_VNNI


def environment(tool: str, root: Path) -> Path:
    """The Python of `tool`'s environment, made under folder `root` the first time."""
    folder = root.absolute() / f"env-{tool}"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[tool]], check=True)
        (folder / "done").touch()
    return python


def optimum(onnx: Path, images: np.ndarray, out: Path, kind: str) -> None:
    """Optimum's settings for a kind of processor, its own defaults in all else."""
    from datasets import Dataset
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig

    shown = Dataset.from_dict({"image": list(images)}).with_format("numpy")
    quantizer = ORTQuantizer.from_pretrained(onnx.parent, file_name=onnx.name)
    settings = getattr(AutoQuantizationConfig, kind)(is_static=True)
    ranges = quantizer.fit(dataset=shown, calibration_config=AutoCalibrationConfig.minmax(shown),
                           operators_to_quantize=settings.operators_to_quantize)  # fmt: skip
    quantizer.quantize(settings, out.parent / "optimum", calibration_tensors_range=ranges)
    shutil.move(out.parent / "optimum" / f"{onnx.stem}_quantized.onnx", out)


def olive(onnx: Path, images: np.ndarray, out: Path, kind: str) -> None:  # noqa: ARG001
    """Olive's pass for static quantisation, which is the same for every processor."""
    from olive.data.config import DataConfig
    from olive.data.registry import Registry
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.quantization import OnnxStaticQuantization

    @Registry.register_dataset("calibration")
    def calibration(**_: object) -> list[tuple[dict[str, np.ndarray], int]]:
        return [({"image": x}, 0) for x in images]

    shown = DataConfig(name="calibration", load_dataset_config={"type": "calibration"})
    quantization = create_pass_from_dict(OnnxStaticQuantization, {"data_config": shown},
                                         disable_search=True)  # fmt: skip
    quantization.run(ONNXModelHandler(str(onnx)), str(out))


if __name__ == "__main__":
    _, tool, onnx, given, out, kind = sys.argv
    {"optimum": optimum, "olive": olive}[tool](Path(onnx), np.load(given), Path(out), kind)
