"""OpenVINO: Intel CPU, GPU and NPU. `device` is OpenVINO's own name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

# openvino and nncf send usage data through this package where it is installed; a hospital's tool
# sends nothing. Blocked, it is absent as far as they can see, and they have a stub for that.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402

from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable, user_cache  # noqa: E402
from edgekd.runtimes import Outputs, Session, one_by_one  # noqa: E402

SUFFIXES = (".xml", ".onnx")
BROKEN = (RuntimeError, UnicodeDecodeError)  # what it raises, the latter for its own message
CHUNK = 8  # images a request where there are many
# Without a hint a CPU with AVX512-BF16 or AMX runs an fp32 model in bfloat16.
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """Convert to IR with FP32 weights; shapes stay as exported."""
    model = read(onnx)
    ov.save_model(model, out / "model.xml", compress_to_fp16=False)
    return [out / "model.xml", out / "model.bin"]


def read(path: Path) -> ov.Model:
    """The graph in `path`; EdgeKDError if OpenVINO cannot read it."""
    try:
        return ov.Core().read_model(path)
    except BROKEN as e:
        raise EdgeKDError(f"openvino cannot read {path}: {_reason(e)}") from None


def model_outputs(model: ov.Model) -> set[str]:
    """The names of a graph's outputs."""
    return {name for output in model.outputs for name in output.get_names()}


def fix_batch(model: ov.Model, batch: int) -> None:
    """Make the model's batch dimension static."""
    _, *image = model.input(0).partial_shape
    model.reshape({0: [batch, *(side.get_length() for side in image)]})


def converted(path: Path) -> ov.Model:
    """As `read`, with constants folded.

    Read as it is, the weights of a depthwise convolution are the reshape of a constant; quantised,
    OpenVINO then runs that convolution in FP32.
    """
    try:
        return ov.convert_model(path)
    except BROKEN as e:
        raise EdgeKDError(f"openvino cannot convert {path}: {_reason(e)}") from None


def _reason(error: Exception) -> str:
    """The last line: those before it say where in OpenVINO's source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no reason given"


def compiled(path: Path, profile: Profile, precision: str, batch: int | None) -> ov.CompiledModel:
    """The graph of `path` compiled for the profile's device in exactly this precision."""
    if profile.device not in devices():
        raise RuntimeUnavailable(
            f"openvino sees no device {profile.device} here, only {', '.join(devices())}"
        )
    model = read(path)
    if len(model.inputs) != 1 or {"logits", "features"} - model_outputs(model):
        raise EdgeKDError(f"{path} has not image in, logits and features out: export it again")
    if profile.static_batch or batch is not None:
        fix_batch(model, batch or 1)
    # On a CPU FP16 is how weights are stored: it computes in FP32, or if asked for f16 in bfloat16.
    wanted = "f32" if precision == "fp16" and profile.device == "CPU" else HINTS[precision]
    config = {
        "INFERENCE_PRECISION_HINT": wanted,
        "PERFORMANCE_HINT": profile.hint.upper(),
    }
    if profile.hint == "latency":
        config["NUM_STREAMS"] = "1"
    if profile.device.startswith(("NPU", "GPU")):  # drivers take their time: what they make is kept
        config["CACHE_DIR"] = str(user_cache() / "openvino")
    if profile.threads:
        config["INFERENCE_NUM_THREADS"] = str(profile.threads)
    config |= {k: str(v) for k, v in profile.options.items()}
    try:
        model = ov.Core().compile_model(model, profile.device, config)
    except BROKEN as e:
        what = f"openvino cannot compile {path} for {profile.device}"
        raise EdgeKDError(f"{what}: {_reason(e)}") from None
    given = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if given != wanted:
        raise EdgeKDError(f"openvino runs {path} in {given} on {profile.device}, not {precision}")
    return model


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Compile for `profile.device`; a static batch without a number is run image by image."""
    model = compiled(path, profile, precision, batch)
    logits, features = model.output("logits"), model.output("features")
    if profile.hint == "throughput":
        return in_streams(model, batch or (1 if profile.static_batch else CHUNK))

    def run(images: np.ndarray) -> Outputs:
        try:
            result = model(images, share_inputs=True)
        except BROKEN as e:
            raise EdgeKDError(f"openvino cannot run {path}: {_reason(e)}") from None
        return Outputs(np.array(result[logits]), np.array(result[features]))

    return one_by_one(run) if profile.static_batch and batch is None else run


def in_streams(model: ov.CompiledModel, chunk: int) -> Session:
    """Images in requests of `chunk`, as many at a time as the device likes."""
    queue = ov.AsyncInferQueue(model)
    names = ("logits", "features")

    def run(images: np.ndarray) -> Outputs:
        parts = [np.ascontiguousarray(images[i : i + chunk]) for i in range(0, len(images), chunk)]
        found: list[Outputs | None] = [None] * len(parts)

        def keep(request: ov.InferRequest, i: int) -> None:
            found[i] = Outputs(*(np.array(request.get_tensor(name).data) for name in names))

        queue.set_callback(keep)
        for i, part in enumerate(parts):
            queue.start_async({"image": part}, i, share_inputs=True)  # alive until all are done
        queue.wait_all()
        done = [x for x in found if x is not None]
        return Outputs(*(np.concatenate(x) for x in zip(*done, strict=True)))

    return run


def devices() -> list[str]:
    """What OpenVINO's plugins find here."""
    return list(ov.Core().available_devices)
