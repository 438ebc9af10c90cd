"""A runtime is one file in this folder. Its name is what a profile says in `runtime =`, the package
it imports, and the extra that installs it. Nothing else registers it.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np

from edgekd.records import Artifact, EdgeKDError, Profile, RuntimeUnavailable, needing, unknown

__all__ = [
    "NEWEST", "NodeTime", "NotFinite", "Outputs", "Products", "Profiled", "Runtime", "Session",
    "StreamsDiffer", "check", "fields", "get", "here", "host", "message", "must_be_built", "names",
    "one_by_one", "open_session", "open_streams", "opset", "runtime_of",
]  # fmt: skip

BESIDE = ("golden", "machine")  # files of this folder that are no runtimes
NEWEST = 23  # operator set that is read; edgekd export writes 18


class StreamsDiffer(EdgeKDError):
    """Asked for several images at a time, the runtime answers otherwise than for one."""


class NotFinite(EdgeKDError):
    """A model answers nan or infinity."""


class Outputs(NamedTuple):
    """What every model answers, as host arrays that later calls leave alone."""

    logits: np.ndarray  # (N, classes) float32
    features: np.ndarray  # (N, C, h, w) float32: the map that is explained


# (N, 3, H, W) float32 -> Outputs. Synchronous: when it returns, the answer is in host memory, so
# one stopwatch around the call fits every runtime. Threads may share one: their calls wait for each
# other, or share the runtime's streams.
Session = Callable[[np.ndarray], Outputs]


class NodeTime(NamedTuple):
    """One node of the graph as a runtime executed it, at batch 1."""

    name: str
    kind: str  # in the runtime's own words
    precision: str  # "int8", "bf16", "fp16", "fp32"; empty: not told
    ms: float  # mean of the calls
    macs: int | None  # of a convolution or matrix product whose shapes are told
    moved_bytes: int | None  # of the same: input, weights and output, each once


# (path, profile, precision, image (1, 3, H, W) float32, calls) -> every node that took time, in
# order. A runtime's file may define it as `profiled`; empty where the device does not tell.
Profiled = Callable[[Path, Profile, str, np.ndarray, int], list[NodeTime]]

# (profile, side) -> (precision, a call that multiplies two (side, side) matrices in it), for each
# precision that the CPU really executes, once or in several forms. A runtime's file may define it
# as `products`.
Products = Callable[[Profile, int], Iterator[tuple[str, Callable[[], object]]]]


class Runtime(Protocol):
    """What a file here defines."""

    SUFFIXES: tuple[str, ...]  # of the files that `load` opens, what `build` makes first

    def build(self, onnx: Path, out: Path, profile: Profile) -> list[Path]:
        """Make in folder `out` what the device loads; the first path is what `load` takes."""

    def load(self, path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
        """Open a file; RuntimeUnavailable if `profile.device` is not here. batch None: any."""

    def devices(self) -> list[str]:
        """Devices seen on this machine, the plainest first."""


def names() -> list[str]:
    """Every runtime there is a file for."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in BESIDE)


def get(name: str) -> Runtime:
    """The runtime called `name`, imported now and not before."""
    check(name)
    with needing(
        lambda lacks: RuntimeUnavailable(
            f"runtime {name} needs {lacks}: pip install 'edgekd[{name}]'"
        )
    ):
        return cast(Runtime, importlib.import_module(f"{__name__}.{name}"))


def host(profile: Profile, artifact: Artifact) -> tuple[Profile, bool]:
    """(profile to run `artifact` with on this machine, whether that is the profile's own device).

    Where the profile's runtime or device is not here, a runtime on this CPU that loads the file
    stands in, and the caller says so: what is measured then is not the device's.
    """
    reason = f"{profile.runtime} does not load {artifact.path.name}"
    try:
        runtime = get(profile.runtime)
        if profile.device in runtime.devices() and artifact.path.suffix in runtime.SUFFIXES:
            return profile, True
        if profile.device not in runtime.devices():
            reason = f"{profile.runtime} sees no device {profile.device} here"
    except RuntimeUnavailable as e:
        reason = str(e)
    for name in ("openvino", "onnxruntime", "torch"):
        try:
            runtime = get(name)
        except RuntimeUnavailable:
            continue
        if artifact.path.suffix in runtime.SUFFIXES:
            cpu = "cpu" if name == "torch" else "CPU"
            stand_in: dict[str, object] = {"runtime": name, "device": cpu, "options": {}}
            return profile.model_copy(update=stand_in), False
    raise RuntimeUnavailable(f"nothing on this machine runs {artifact.path}: {reason}")


def here(profile: Profile) -> bool:
    """Whether this machine has the profile's device; RuntimeUnavailable if not even its runtime."""
    return profile.device in get(profile.runtime).devices()


def must_be_built(artifact: Artifact, profile: Profile) -> bool:
    """Whether a device makes what it loads of an artifact: TensorRT's plan fits one GPU."""
    if profile.runtime == "tensorrt":
        return True
    return artifact.path.suffix not in get(profile.runtime).SUFFIXES


def check(name: str) -> None:
    """EdgeKDError with the nearest name if no profile may say `name`."""
    if name not in names():
        raise EdgeKDError(unknown("runtime", name, names()))


def one_by_one(run: Session) -> Session:
    """For a file of a static batch of 1: any number of images, each asked alone."""

    def each(images: np.ndarray) -> Outputs:
        parts = [run(images[i : i + 1]) for i in range(len(images))]
        return Outputs(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    return each


def opset(data: bytes) -> int:
    """The operator set that an ONNX file says it is of; 0 if it says none that can be read.

    OpenVINO takes any number for the newest that it knows. A ModelProto's field 8 is an
    OperatorSetIdProto, whose field 2 is the version; its field 1, the domain, is empty for ONNX's.
    """
    found = 0
    try:
        for number, value in fields(data):
            if number == 8 and isinstance(value, bytes):
                said = dict(fields(value))
                version = said.get(2, 0)
                if not said.get(1) and isinstance(version, int):
                    found = max(found, version)
    except (IndexError, ValueError):
        return 0  # torn: the runtime will say how
    return found


def message(*pairs: tuple[int, int | str | bytes]) -> bytes:
    """A protobuf message of (number, value): what `fields` reads, for numbers below 16."""

    def varint(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    made = []
    for number, value in pairs:
        if isinstance(value, int):
            made.append(varint(number << 3) + varint(value))
        else:
            data = value.encode() if isinstance(value, str) else value
            made.append(varint(number << 3 | 2) + varint(len(data)) + data)
    return b"".join(made)


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protobuf message that are varints or bytes.

    ValueError or IndexError where the data is torn or is something else.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a varint of more than 64 bits")

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            length = varint()
            if at + length > len(data):
                raise ValueError("a field longer than its message")
            yield key >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError("a wire type that ONNX does not use at the top")


def open_session(artifact: Artifact, profile: Profile, batch: int | None = None) -> Session:
    """Load `artifact` in `profile`'s runtime on its device. batch None: any number of images.

    The files' hashes were verified by `Artifact.load`. Every call's input is checked here, once
    for all runtimes: EdgeKDError unless (N, 3, H, W) float32 with the artifact's H and W. So is
    every answer: NotFinite unless its logits are.
    """
    runtime = runtime_of(artifact, profile)
    run = runtime.load(artifact.path, profile, artifact.precision, batch)
    height, width = artifact.spec.size
    shared = profile.hint == "throughput" and hasattr(runtime, "in_streams")
    turn = contextlib.nullcontext() if shared else threading.Lock()
    expected = ("N" if batch is None else str(batch)) + f", 3, {height}, {width}"

    def checked(images: np.ndarray) -> Outputs:
        fits = images.ndim == 4 and images.shape[1:] == (3, height, width) and len(images) > 0
        if not fits or images.dtype != np.float32 or (batch and len(images) != batch):
            raise EdgeKDError(
                f"model takes ({expected}) float32, got {images.shape} {images.dtype}"
            )
        with turn:
            found = run(images)
        if not np.isfinite(found.logits).all():
            raise NotFinite(
                f"{artifact.path} answers nan or infinity in {profile.runtime}: its weights are "
                f"broken, or too large for {artifact.precision}; make it again in FP32"
            )
        return found

    return checked


def open_streams(artifact: Artifact, profile: Profile) -> tuple[Session, str]:
    """(a session for images by the dozen, why they are not asked several at a time).

    In streams where the runtime has them and answers as it does for one; else as the device asks.
    """
    try:
        return open_session(artifact, profile.model_copy(update={"hint": "throughput"})), ""
    except StreamsDiffer as e:
        return open_session(artifact, profile.model_copy(update={"hint": "latency"})), str(e)


def runtime_of(artifact: Artifact, profile: Profile) -> Runtime:
    """The profile's runtime; EdgeKDError if the artifact's file is not one that it runs."""
    runtime = get(profile.runtime)
    if artifact.path.suffix not in runtime.SUFFIXES:
        raise EdgeKDError(
            f"runtime {profile.runtime} loads {', '.join(runtime.SUFFIXES)} files, "
            f"not {artifact.path}: edgekd export makes them"
        )
    onnx = artifact.path.suffix == ".onnx" and artifact.path.is_file()  # else the runtime says so
    if onnx and (found := opset(artifact.path.read_bytes())) > NEWEST:
        raise EdgeKDError(
            f"{artifact.path} is of operator set {found}, read up to {NEWEST}: export it again"
        )
    if "input" in artifact.settings:
        taken = artifact.settings["input"]
        raise EdgeKDError(f"{artifact.folder} takes {taken}: it is for other programs")
    return runtime
