"""ONNX Runtime. `device` is an execution provider without its suffix: CPU, CUDA, OpenVINO."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable
from edgekd.runtimes import NodeTime, Outputs, Session, fields, message, one_by_one

SUFFIXES = (".onnx",)
# Its exceptions share no base class.
BROKEN = (
    errors.EPFail, errors.Fail, errors.InvalidArgument, errors.InvalidGraph,
    errors.InvalidProtobuf, errors.NoModel, errors.NoSuchFile, errors.NotImplemented,
    errors.RuntimeException, RuntimeError, ValueError,
)  # fmt: skip
Tensor = tuple[str, tuple[int, ...]]  # type in a trace's words, shape
TYPES = {1: "float", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16"}
RAN = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}
ITEM = {"float": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1, "int32": 4}  # bytes
# Operator -> which input its weights are.
WEIGHTS = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "QLinearConv": 3, "ConvInteger": 1,
    "Gemm": 1, "QGemm": 3, "MatMul": 1, "QLinearMatMul": 3, "MatMulInteger": 1,
}  # fmt: skip
KERNEL = "_kernel_time"  # ends the names of the events that are a node's execution
WARMUP = 3


def build(onnx: Path, out: Path, profile: Profile) -> list[Path]:
    """ONNX is what it loads."""
    return [Path(shutil.copy(onnx, out / "model.onnx"))]


def load(path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
    """Open on the profile's provider alone: by itself ONNX Runtime falls back to the CPU."""
    run = _run(_open(path, profile, precision, _options(profile)), path)
    return one_by_one(run) if profile.static_batch and batch is None else run


def _options(profile: Profile) -> ort.SessionOptions:
    """As the profile says."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = profile.threads
    options.log_severity_level = 3
    for key, value in profile.options.items():
        # It knows "1" and "0": any other word is taken for 0, without an error.
        text = str(int(value)) if isinstance(value, bool) else str(value)
        options.add_session_config_entry(key, text)
    return options


def _open(
    path: Path, profile: Profile, precision: str, options: ort.SessionOptions
) -> ort.InferenceSession:
    """The file on the profile's provider; RuntimeUnavailable if that is not here."""
    if profile.device not in devices():
        raise RuntimeUnavailable(
            f"onnxruntime has no device {profile.device} here, only {', '.join(devices())}"
        )
    if precision == "bf16":  # fp16 and int8 are so in the graph
        raise EdgeKDError(f"onnxruntime runs {path} as it is written, not in {precision}")
    wanted = profile.device + "ExecutionProvider"
    # On CUDA convolutions run in TF32, with a mantissa of 10 bits, unless told not to.
    given = {"use_tf32": "0"} if profile.device == "CUDA" else {}
    try:
        # enable_fallback: by itself it prints, and tries other providers.
        session = ort.InferenceSession(
            path, options, providers=[(wanted, given)], enable_fallback=0
        )
    except BROKEN as e:
        reason = " ".join(str(e).split())[:160]
        raise EdgeKDError(f"onnxruntime cannot load {path}: {reason}") from None
    if session.get_providers()[0] != wanted:
        raise RuntimeUnavailable(f"onnxruntime opened {session.get_providers()[0]}, not {wanted}")
    return session


def _run(session: ort.InferenceSession, path: Path) -> Session:
    """The file's session as what every runtime answers."""

    def run(images: np.ndarray) -> Outputs:
        try:
            return Outputs(*session.run(["logits", "features"], {"image": images}))
        except BROKEN as e:
            reason = " ".join(str(e).split())[:160]
            raise EdgeKDError(f"onnxruntime cannot run {path}: {reason}") from None

    return run


def profiled(
    path: Path, profile: Profile, precision: str, image: np.ndarray, calls: int
) -> list[NodeTime]:
    """Every node that was executed (runtimes.Profiled), from ONNX Runtime's trace.

    On the CPU alone: of other devices the trace tells how long it took to hand the work over.
    Convolutions in blocked layouts have their channels padded to whole blocks, and count so.
    """
    if profile.device != "CPU":
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = _options(profile)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "trace")
        # The trace leaves out constants that were packed for a kernel, which most weights are.
        options.optimized_model_filepath = str(folder / "executed.onnx")
        session = _open(path, profile, precision, options)
        run = _run(session, path)
        for _ in range(WARMUP + calls):
            run(image)
        trace = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        weights = _weights((folder / "executed.onnx").read_bytes())
    found: dict[str, list[dict[str, Any]]] = {}
    for event in trace:
        if event["cat"] == "Node" and event["name"].endswith(KERNEL):
            found.setdefault(event["args"]["node_index"], []).append(event)
    return [_node_time(events[-calls:], weights) for events in found.values()]


def _node_time(events: list[dict[str, Any]], weights: dict[str, Tensor | None]) -> NodeTime:
    """What a trace's events of one node say together."""
    facts = events[0]["args"]
    name, kind = events[0]["name"].removesuffix(KERNEL), facts["op_name"]
    inputs = [_tensor(t) for t in facts["input_type_shape"]]
    outputs = [_tensor(t) for t in facts["output_type_shape"]]
    ms = sum(e["dur"] for e in events) / 1e3 / len(events)  # dur: us
    macs = moved = None
    if kind in WEIGHTS and name in weights:
        weight = weights[name] or inputs[WEIGHTS[kind]]
        each = math.prod(weight[1][1:]) if "Conv" in kind else inputs[0][1][-1]
        macs = math.prod(outputs[0][1]) * each
        moved = sum(ITEM[t] * math.prod(shape) for t, shape in (inputs[0], weight, outputs[0]))
    return NodeTime(name, kind, RAN.get(inputs[0][0], "") if inputs else "", ms, macs, moved)


def _tensor(told: dict[str, list[int]]) -> Tensor:
    """A trace's {"float": [1, 3, 8, 8]}."""
    [(kind, shape)] = told.items()
    return kind, tuple(shape)


def _weights(data: bytes) -> dict[str, Tensor | None]:
    """Name -> weights of every node of an ONNX file that has some; None: made as it runs.

    A ModelProto's field 7 is the graph, whose fields 1 and 5 are nodes and constants.
    """
    graph = next(v for number, v in fields(data) if number == 7 and isinstance(v, bytes))
    nodes: list[tuple[str, str, list[str]]] = []
    constants: dict[str, Tensor] = {}
    for number, value in fields(graph):
        if number not in (1, 5) or not isinstance(value, bytes):
            continue
        said: dict[int, list[Any]] = {}
        for k, v in fields(value):
            said.setdefault(k, []).append(v)
        if number == 1:  # NodeProto: inputs 1, name 3, operator 4
            words = {k: [v.decode() for v in said.get(k, [b""])] for k in (1, 3, 4)}
            nodes.append((words[3][0], words[4][0], words[1]))
        else:  # TensorProto: shape 1, type 2, name 8
            shape = tuple(int(v) for v in said.get(1, []))
            constants[said[8][0].decode()] = TYPES.get(said[2][0], ""), shape
    return {
        name: constants.get(inputs[WEIGHTS[kind]])
        for name, kind, inputs in nodes
        if kind in WEIGHTS
    }


def products(profile: Profile, side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """MatMul in float32 and MatMulInteger in 8 bits (runtimes.Products); the CPU has no others.

    The files are written byte by byte: a device need not have the onnx package.
    """
    rng = np.random.default_rng(0)
    floats = rng.random((2, side, side), np.float32)
    left = rng.integers(0, 256, (side, side), np.uint8)
    right = rng.integers(-127, 128, (side, side), np.int8)
    for precision, operator, a, b, out in (
        ("fp32", "MatMul", floats[0], floats[1], 1),
        ("int8", "MatMulInteger", left, right, 6),
    ):
        session = ort.InferenceSession(
            _product(operator, a, b, out), _options(profile), providers=["CPUExecutionProvider"]
        )
        yield precision, partial(session.run, None, {"a": a})


def _product(operator: str, a: np.ndarray, b: np.ndarray, out: int) -> bytes:
    """An ONNX file of one operator: a of a's shape times the constant b, to a tensor of type out.

    The constant is the weights: packed once, as those of a network are.
    """
    numbers = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3}

    def value(name: str, kind: int) -> bytes:  # ValueInfoProto
        sides = [(1, message((1, n))) for n in a.shape]
        tensor = message((1, kind), (2, message(*sides)))
        return message((1, name), (2, message((1, tensor))))

    sides = [(1, n) for n in b.shape]
    constant = message(*sides, (2, numbers[b.dtype]), (8, "b"), (9, b.tobytes()))
    node = message((1, "a"), (1, "b"), (2, "c"), (4, operator))
    graph = message((1, node), (2, "product"), (5, constant),
                    (11, value("a", numbers[a.dtype])), (12, value("c", out)))  # fmt: skip
    return message((1, 8), (7, graph), (8, message((2, 13))))  # IR 8, operator set 13


def devices() -> list[str]:
    """Providers in this build, CPU first. Whether one really opens shows when it is opened."""
    found = {p.removesuffix("ExecutionProvider") for p in ort.get_available_providers()}
    return sorted(found - {"Azure"}, key=lambda d: (d != "CPU", d))
