"""TensorRT 10 or newer, or TensorRT-RTX where that is what is installed; `package` says which.

Networks are strongly typed: INT8 is what has Q/DQ nodes, FP16 what is FP16 in the ONNX file.
A plan fits one GPU and one version: it is built where it runs, and both are checked before it is
opened.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

try:
    import tensorrt as trt
except ModuleNotFoundError:
    import tensorrt_rtx as trt
from cuda.bindings import runtime as cuda

from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable, sha256, write_atomic
from edgekd.runtimes import NodeTime, Outputs, Session

SUFFIXES = (".plan",)
BUILT_FOR = "plan.json"  # beside a plan: what it was built for, and from
TIMINGS = "timing.cache"  # beside a plan: how fast each kernel was, for the next build
LARGEST = 16  # images a call; more are asked in turns
MATRIX = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")  # layers that are worth INT8
WARMUP = 3  # calls before those that are profiled
# What a plan calls the type of a tensor, in the words of its format; the first that is found.
FORMATS = {
    "int8": "int8",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float": "fp32",
}


def package() -> ModuleType:
    """`tensorrt` or `tensorrt_rtx`."""
    return trt


class _Log(trt.ILogger):
    """Keeps what is said of errors; TensorRT would print it."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(" ".join(message.split()))

    def reason(self) -> str:
        """The first error."""
        return self.errors[0][:200] if self.errors else "no reason given"


class Layer(NamedTuple):
    """One layer of a parsed network that multiplies matrices."""

    name: str
    kind: str
    precision: str  # int8, fp16 or fp32: what TensorRT will compute it in
    dla: bool | None  # whether a deep learning accelerator takes it; TensorRT-RTX knows of none


def parse(onnx: Path) -> list[Layer]:
    """The network as TensorRT's parser reads it, on any machine; EdgeKDError if it does not."""
    log = _Log()
    builder, network = _parsed(onnx, log)
    config = builder.create_builder_config()
    made_by = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for k in range(layer.num_outputs) if hasattr(layer, "num_outputs") else (0,):
            if layer.get_output(k) is not None:
                made_by[layer.get_output(k).name] = layer
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        if kind not in MATRIX:
            continue
        source = made_by.get(layer.get_input(0).name)
        whole = source is not None and source.type.name == "DEQUANTIZE"
        half = layer.get_output(0).dtype == trt.float16
        precision = "int8" if whole else "fp16" if half else "fp32"
        known = trt.__name__ == "tensorrt"
        dla = bool(config.can_run_on_DLA(layer)) if known else None
        found.append(Layer(layer.name, kind, precision, dla))
    return found


def _parsed(onnx: Path, log: _Log) -> tuple[Any, Any]:
    builder = trt.Builder(log)
    if builder is None:
        raise RuntimeUnavailable(f"{trt.__name__} cannot start: {log.reason()}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx.read_bytes()):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        reason = " ".join(said[0].split())[:200] if said else log.reason()
        raise EdgeKDError(f"{trt.__name__} cannot parse {onnx}: {reason}")
    return builder, network


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """`out`/model.plan for the profile's GPU, which must be here, and what it was built for."""
    device = _device(profile)
    with _current(device):
        plan = serialised(onnx, profile, out / TIMINGS)
    write_atomic(out / "model.plan", bytes(plan))
    write_atomic(out / BUILT_FOR, json.dumps(_here(device) | {"onnx_sha256": sha256(onnx)}))
    return [out / "model.plan", out / BUILT_FOR]


def serialised(
    onnx: Path, profile: Profile, timings: Path | None = None, capability: str | None = None
) -> bytes:
    """A plan for this machine's GPU or, TensorRT-RTX alone, for a `capability` such as "SM89"."""
    log = _Log()
    builder, network = _parsed(onnx, log)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # by default FP32 is multiplied with 10 bits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # `profiled` reads the layers
    _, *image = network.get_input(0).shape
    shapes = builder.create_optimization_profile()
    most = 1 if profile.static_batch else LARGEST
    shapes.set_shape("image", (1, *image), (1, *image), (most, *image))
    config.add_optimization_profile(shapes)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    cache = None
    if timings is not None and trt.__name__ == "tensorrt":  # TensorRT-RTX has no use for one
        known = timings.read_bytes() if timings.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is not None:
            config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EdgeKDError(f"{trt.__name__} cannot build {onnx}: {log.reason()}")
    if timings is not None and cache is not None:
        write_atomic(timings, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Open a plan on the profile's GPU; it must have been built for this GPU and version."""
    device, buffers = _open(path, profile, batch or (1 if profile.static_batch else LARGEST))

    def run(images: np.ndarray) -> Outputs:
        most = buffers.most
        with _current(device):
            parts = [buffers(images[i : i + most]) for i in range(0, len(images), most)]
        return Outputs(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    return run


def _open(path: Path, profile: Profile, most: int) -> tuple[int, _Buffers]:
    """(the profile's GPU, the plan with memory on it for `most` images)."""
    device = _device(profile)
    _check_built_for(path, _here(device))
    log = _Log()
    with _current(device):
        engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EdgeKDError(f"{trt.__name__} cannot open {path}: {log.reason()}")
        return device, _Buffers(engine, most)


def profiled(
    path: Path, profile: Profile, precision: str, image: np.ndarray, calls: int
) -> list[NodeTime]:
    """Every layer of the plan (runtimes.Profiled), from TensorRT's own profiler.

    It waits for each layer before it starts the next: together they take longer than a call.
    """
    device, buffers = _open(path, profile, 1)
    times = _Times()
    with _current(device):
        for call in range(WARMUP + calls):
            if call == WARMUP:
                buffers.context.profiler = times
            buffers(image)
        inspector = buffers.engine.create_engine_inspector()
        inspector.execution_context = buffers.context  # the shapes of the call, not -1
        told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    known = {x["Name"]: x for x in json.loads(told)["Layers"] if isinstance(x, dict)}
    return [_node_time(name, ms / calls, known.get(name, {})) for name, ms in times.ms.items()]


class _Times(trt.IProfiler):
    """Adds up the ms that each layer takes, in the order in which they run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.ms: dict[str, float] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Called by TensorRT."""
        self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms


def _node_time(name: str, ms: float, told: dict[str, Any]) -> NodeTime:
    """A layer and what the plan tells of it: nothing if it was built without details."""
    taken = [str(t.get("Format/Datatype", "")).lower() for t in told.get("Inputs", [])[:1]]
    precision = next((p for word, p in FORMATS.items() if word in "".join(taken)), "")
    macs = None
    if told.get("ParameterType") == "Convolution" and told.get("OutMaps"):
        each = told["Weights"]["Count"] // told["OutMaps"]
        macs = math.prod(told["Outputs"][0]["Dimensions"]) * each
    return NodeTime(name, told.get("LayerType", ""), precision, ms, macs, None)


class _Buffers:
    """An engine's memory on the GPU, given back when the session is dropped."""

    def __init__(self, engine: Any, most: int) -> None:
        self.most, self.engine = most, engine
        self.context = engine.create_execution_context()
        self.stream = _ok(cuda.cudaStreamCreate())
        self.place: dict[str, int] = {}
        for name in ("image", "logits", "features"):
            shape = (most, *tuple(engine.get_tensor_shape(name))[1:])
            if engine.get_tensor_dtype(name) != trt.float32:
                raise EdgeKDError(f"the plan's {name} is not float32: edgekd export makes it so")
            self.place[name] = _ok(cuda.cudaMalloc(4 * int(np.prod(shape))))
            self.context.set_tensor_address(name, self.place[name])

    def __call__(self, images: np.ndarray) -> Outputs:
        pixels = np.ascontiguousarray(images)
        self.context.set_input_shape("image", pixels.shape)
        to, back = (getattr(cuda.cudaMemcpyKind, f"cudaMemcpy{way}")
                    for way in ("HostToDevice", "DeviceToHost"))  # fmt: skip
        image = self.place["image"]
        _ok(cuda.cudaMemcpyAsync(image, pixels.ctypes.data, pixels.nbytes, to, self.stream))
        if not self.context.execute_async_v3(self.stream):
            raise EdgeKDError(f"{trt.__name__} did not run the plan on {pixels.shape}")
        answers = []
        for name in ("logits", "features"):
            host = np.empty(tuple(self.context.get_tensor_shape(name)), np.float32)
            _ok(cuda.cudaMemcpyAsync(host.ctypes.data, self.place[name], host.nbytes, back,
                                     self.stream))  # fmt: skip
            answers.append(host)
        _ok(cuda.cudaStreamSynchronize(self.stream))
        return Outputs(*answers)

    def __del__(self) -> None:
        for place in getattr(self, "place", {}).values():
            cuda.cudaFree(place)
        if hasattr(self, "stream"):
            cuda.cudaStreamDestroy(self.stream)


def devices() -> list[str]:
    """Every GPU that CUDA's driver sees."""
    error, count = cuda.cudaGetDeviceCount()
    return [f"cuda:{i}" for i in range(count)] if error == cuda.cudaError_t.cudaSuccess else []


def _device(profile: Profile) -> int:
    """Number of the profile's GPU."""
    if profile.device not in devices():
        seen = ", ".join(devices()) or "no GPU at all"
        raise RuntimeUnavailable(
            f"{trt.__name__} has no device {profile.device} here, only {seen}: "
            "build and run the plan on the device"
        )
    return int(profile.device.partition(":")[2])


@contextlib.contextmanager
def _current(device: int) -> Iterator[None]:
    """As long as this lasts the thread's GPU is `device`."""
    before = _ok(cuda.cudaGetDevice())
    _ok(cuda.cudaSetDevice(device))
    try:
        yield
    finally:
        _ok(cuda.cudaSetDevice(before))


def _here(device: int) -> dict[str, str]:
    """What a plan must have been built for to run here."""
    gpu = _ok(cuda.cudaGetDeviceProperties(device))
    return {"package": trt.__name__, "version": trt.__version__, "gpu": gpu.name.decode(),
            "capability": f"{gpu.major}.{gpu.minor}"}  # fmt: skip


def _check_built_for(path: Path, here: dict[str, str]) -> None:
    """EdgeKDError unless the plan was built for this GPU by this version."""
    beside = path.with_name(BUILT_FOR)
    try:
        built = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError):
        raise EdgeKDError(f"{beside} is missing or broken: export the plan again") from None
    for key, value in here.items():
        if built.get(key) != value:
            raise EdgeKDError(
                f"{path} was built for {key} {built.get(key)}, here it is {value}: "
                "run edgekd export --format tensorrt on this device"
            )


def _ok(answer: tuple[Any, ...]) -> Any:
    """What a CUDA call returned beside its error; EdgeKDError for an error."""
    error, *rest = answer
    if error != cuda.cudaError_t.cudaSuccess:
        raise EdgeKDError(f"CUDA says {error.name}")
    return rest[0] if rest else None
