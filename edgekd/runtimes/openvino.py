"""OpenVINO: Intel CPU, GPU and NPU. `device` is OpenVINO's own name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np

# openvino and nncf send usage data through this package where it is installed; a hospital's tool
# sends nothing. Blocked, it is absent as far as they can see, and they have a stub for that.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402
from openvino import opset13 as op  # noqa: E402

from edgekd.records import (  # noqa: E402
    EdgeKDError,
    Profile,
    RuntimeUnavailable,
    check_room,
    user_cache,
)
from edgekd.runtimes import NodeTime, Outputs, Session, StreamsDiffer, one_by_one  # noqa: E402

SUFFIXES = (".xml", ".onnx")
BROKEN = (RuntimeError, UnicodeDecodeError)  # what it raises, the latter for its own message
CHUNK = 8  # images a request where there are many
STREAMS_APART = 0.05  # of the largest value: roundings are, kernels that differ
# Without a hint a CPU with AVX512-BF16 or AMX runs an fp32 model in bfloat16.
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
# The end of a primitive's name ("brgconv_avx512_1x1_I8", "gemm_mlas_f32") is what it computes in.
# `runtimePrecision` is not: of INT8 weights that are unpacked and multiplied in f32 it says i8.
RAN = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}  # bytes
# Kind of node -> how many dimensions of its weights count outputs, as the first of (O, I, kh, kw),
# the first two of (G, O, I, kh, kw), the first of (O, I).
WEIGHTED = {
    "Convolution": 1, "GroupConvolution": 2, "FullyConnected": 1,
    "FullyConnectedQuantizedLegacy": 1,
}  # fmt: skip
WARMUP = 3
XML_BYTES = 1500  # an operator takes in model.xml, at most as a rule


@cache
def core() -> ov.Core:
    """The one of this process: where a driver is missing, a second one can crash it."""
    return ov.Core()


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """Convert to IR with FP32 weights; shapes stay as exported."""
    model = read(onnx)
    save(model, out / "model.xml")
    return [out / "model.xml", out / "model.bin"]


def save(model: ov.Model, path: Path, *, half: bool = False) -> None:
    """Write model.xml and model.bin; EdgeKDError where there is no room for them.

    OpenVINO itself says "iostream error" then, or nothing. half: FP16 weights.
    """
    ops = model.get_ops()
    weights = sum(op.data.nbytes for op in ops if op.get_type_name() == "Constant")
    check_room(path.parent, weights + XML_BYTES * len(ops))
    try:
        ov.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as e:
        raise EdgeKDError(f"openvino cannot write {path}: {_reason(e)}") from None


def read(path: Path) -> ov.Model:
    """The graph in `path`; EdgeKDError if OpenVINO cannot read it."""
    try:
        return core().read_model(path)
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
    config = _config(profile, wanted)
    if (asked := config["INFERENCE_PRECISION_HINT"]) != wanted:
        raise EdgeKDError(
            f"profile {profile.name} has the option INFERENCE_PRECISION_HINT {asked}: leave it "
            f"out, {path.name} is of {precision}"
        )
    try:
        model = core().compile_model(model, profile.device, config)
    except BROKEN as e:
        what = f"openvino cannot compile {path} for {profile.device}"
        raise EdgeKDError(f"{what}: {_reason(e)}") from None
    given = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if given != wanted:
        raise EdgeKDError(
            f"openvino computes {path.name} in {given} on {profile.device}, not {precision}"
        )
    return model


def _config(profile: Profile, hint: str) -> dict[str, str]:
    """What a model is compiled with."""
    config = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": profile.hint.upper(),
    }
    if profile.hint == "latency":
        config["NUM_STREAMS"] = "1"
    if profile.device.startswith(("NPU", "GPU")):  # drivers take their time: what they make is kept
        config["CACHE_DIR"] = str(user_cache() / "openvino")
    if profile.threads:
        config["INFERENCE_NUM_THREADS"] = str(profile.threads)
    return config | {k: str(v) for k, v in profile.options.items()}


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Compile for `profile.device`; a static batch without a number is run image by image."""
    model = compiled(path, profile, precision, batch)
    logits, features = model.output("logits"), model.output("features")
    if profile.hint == "throughput":
        streams = in_streams(model, batch or (1 if profile.static_batch else CHUNK))
        alone = profile.model_copy(update={"hint": "latency"})
        _check_streams(path, streams, load(path, alone, precision, batch), model)
        return streams

    def run(images: np.ndarray) -> Outputs:
        try:
            result = model(images, share_inputs=True)
        except BROKEN as e:
            raise EdgeKDError(f"openvino cannot run {path}: {_reason(e)}") from None
        return Outputs(np.array(result[logits]), np.array(result[features]))

    return one_by_one(run) if profile.static_batch and batch is None else run


def _check_streams(path: Path, streams: Session, alone: Session, model: ov.CompiledModel) -> None:
    """StreamsDiffer unless both sessions answer alike.

    OpenVINO 2026.4 computes convolutions with weights in INT8 and activations in FP32 wrongly when
    there are several streams: features of 5e4 where they are of 1e1, and no error.
    """
    count, *sides = model.input(0).partial_shape
    shape = (count.get_length() if count.is_static else 2, *(s.get_length() for s in sides))
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    for one, other in zip(alone(images), streams(images), strict=True):
        if not np.abs(one - other).max() <= STREAMS_APART * np.abs(one).max():
            raise StreamsDiffer(
                f"openvino answers otherwise in streams than alone ({path.name}): a fault of its "
                'plugin; leave hint = "throughput" out'
            )


def in_streams(model: ov.CompiledModel, chunk: int) -> Session:
    """Images in requests of `chunk` or fewer, as many at a time as the device likes.

    Calls from several threads share the streams: what one leaves idle at its end the next one uses.
    """
    count = model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    pool = ThreadPoolExecutor(count)  # OpenVINO lets go of the interpreter while it works
    idle: SimpleQueue[ov.InferRequest] = SimpleQueue()
    for _ in range(count):
        idle.put(model.create_infer_request())

    def one(part: np.ndarray) -> Outputs:
        request = idle.get()
        try:
            request.infer({"image": part}, share_inputs=True)
            return Outputs(*(np.array(request.get_tensor(x).data) for x in ("logits", "features")))
        except BROKEN as e:
            raise EdgeKDError(f"openvino cannot run the model in streams: {_reason(e)}") from None
        finally:
            idle.put(request)

    def run(images: np.ndarray) -> Outputs:
        size = min(chunk, math.ceil(len(images) / count))
        parts = [np.ascontiguousarray(images[i : i + size]) for i in range(0, len(images), size)]
        return Outputs(*(np.concatenate(x) for x in zip(*pool.map(one, parts), strict=True)))

    return run


def profiled(
    path: Path, profile: Profile, precision: str, image: np.ndarray, calls: int
) -> list[NodeTime]:
    """Every node that was executed (runtimes.Profiled), by OpenVINO's own counters."""
    counted = profile.model_copy(update={"options": profile.options | {"PERF_COUNT": True}})
    model = compiled(path, counted, precision, 1)
    request = model.create_infer_request()
    found: dict[str, list[ov.ProfilingInfo]] = {}
    for call in range(WARMUP + calls):
        try:
            request.infer({"image": image}, share_inputs=True)
        except BROKEN as e:
            raise EdgeKDError(f"openvino cannot run {path}: {_reason(e)}") from None
        for info in request.profiling_info if call >= WARMUP else ():
            if info.status == ov.ProfilingInfo.Status.EXECUTED:
                found.setdefault(info.node_name, []).append(info)
    nodes = _executed(model)
    times = []
    for name, infos in found.items():
        ran = _ran(infos[0].exec_type)
        ms = sum(i.real_time.total_seconds() for i in infos) * 1e3 / calls
        kind = infos[0].node_type
        known = kind in WEIGHTED and name in nodes and ran
        cost = _cost(nodes[name], kind, ran) if known else (None, None)
        times.append(NodeTime(name, kind, ran, ms, *cost))
    return times


def _executed(model: ov.CompiledModel) -> dict[str, ov.Node]:
    """Name -> node of the graph as the device runs it; empty if its plugin does not tell."""
    try:
        return {n.get_friendly_name(): n for n in model.get_runtime_model().get_ops()}
    except BROKEN:
        return {}


def _ran(primitive: str) -> str:
    """The precision at the end of a primitive's name; empty if there is none."""
    return RAN.get(primitive.rpartition("_")[2].lower(), "")


def _cost(node: ov.Node, kind: str, precision: str) -> tuple[int | None, int | None]:
    """(MACs, bytes of input, weights and output) of a node that is in WEIGHTED."""
    if len(node.inputs()) < 2:
        return None, None  # a plugin that keeps the weights out of its graph
    tensors = (node.input(0), node.input(1), node.output(0))
    image, weights, output = (math.prod(t.get_shape()) for t in tensors)
    each = math.prod(list(tensors[1].get_shape())[WEIGHTED[kind] :])
    # The graph has the weights as they were read; they are moved as they are multiplied.
    sizes = [t.get_element_type().size for t in tensors]
    return output * each, image * sizes[0] + weights * ITEM[precision] + output * sizes[2]


def products(profile: Profile, side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """A matrix product in each precision that this CPU executes (runtimes.Products), in two forms.

    Neither is always the faster: in f32 a convolution has better kernels than a MatMul, while in
    int8 its input is reordered first.
    """
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, hint in HINTS.items():
        if precision.upper() not in able:
            continue
        for shape in ((side, side), (1, side, side // 32, 32)):
            graph = _product(shape, precision == "int8")
            model = core().compile_model(graph, "CPU", _config(profile, hint))
            facts = [n.get_rt_info() for n in _executed(model).values()]
            ran = {_said(f, "layerType"): _ran(_said(f, "primitiveType")) for f in facts}
            # What is asked for is not always what is done.
            if precision in (ran.get("FullyConnected"), ran.get("Convolution")):
                given = np.random.default_rng(0).random(shape, np.float32)
                request = model.create_infer_request()
                yield precision, partial(request.infer, {0: given}, share_inputs=True)


def _said(facts: ov.RTMap, key: str) -> str:
    """One of the facts that the runtime graph tells of a node."""
    return str(facts[key].astype(str))


def _product(shape: tuple[int, ...], quantised: bool) -> ov.Model:
    """A constant square matrix times one of (rows, side), or a picture's (1, side, h, w) pixels.

    Quantised, both are of 8 bits, a tensor each.
    """

    def levels(x: ov.Node, low: float, high: float, count: int) -> ov.Node:
        ends = [op.constant(np.full((1,) * len(shape), end, np.float32)) for end in (low, high)]
        return op.fake_quantize(x, *ends, *ends, count)

    side = shape[1]
    values = np.random.default_rng(1).normal(0, 0.3, (side, side)).astype(np.float32)
    given = op.parameter(shape, np.float32)
    left, right = given, op.constant(values.reshape(side, side, *(1,) * (len(shape) - 2)))
    if quantised:
        left, right = levels(left, 0, 1, 256), levels(right, -1, 1, 255)
    if len(shape) == 2:
        out = op.matmul(left, right, False, True)
    else:
        out = op.convolution(left, right, [1, 1], [0, 0], [0, 0], [1, 1])
    return ov.Model([out], [given], "product")


def devices() -> list[str]:
    """What OpenVINO's plugins find here."""
    return list(core().available_devices)
