"""nn.Module -> the ONNX waist -> what a runtime loads. Each compared with what it was made from."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from edgekd import runtimes
from edgekd.data import preprocess
from edgekd.export import graphs
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Kind,
    Metric,
    Precision,
    Profile,
    RuntimeUnavailable,
    make_folder,
    sha256,
    versions,
    write_atomic,
)
from edgekd.runtimes import Outputs, golden

OPSET = 18  # read by every runtime here, and by JetPack 6's TensorRT 10.3
IR_VERSION = 10
COMPARED = 16  # images are enough to compare two files on
# Largest error of an output, of the largest one: rounding of FP32, and of 10 bits a layer. An INT8
# file is compared with the INT8 file it was made from, in the same runtime. With 7 bits, or where
# another runtime rounds INT8 elsewhere, single values go far astray in a right file, too: there it
# is the root mean square error that tells a wrong one; whether a right one is good enough, accuracy
# and maps say.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 0.3, "int8": 1e-3}
ELSEWHERE = 0.3
PIXELS = "uint8 (N, H, W, 3)"  # what a file for other programs takes
CONVERSIONS = {("fp32", "bf16"), ("fp32", "fp16")}


def to_onnx(
    module: nn.Module,
    artifact: Artifact,
    images: np.ndarray,
    out: Path,
    *,
    tolerance: float = 1e-3,
    expected: Outputs | None = None,
    told: Mapping[str, Any] | None = None,
) -> Artifact:
    """`out`/model.onnx, and model.pt2, the program it was made from, for the torch runtime.

    module: image -> (logits, features), in eval mode. images: (n, 3, H, W) float32, prepared; on
    them the file must give the `expected` outputs, by default the module's, to within `tolerance`
    of the largest one (at least 1), alone and in a batch, or EdgeKDError and nothing that looks
    finished. told: more settings, to be kept with the artifact.
    """
    name, reference = _reference()
    layer = str(getattr(module, "layer", ""))
    with _making(out, artifact, images) as made:
        write(module, images, made, _metadata(artifact, layer))
        expected = expected or outputs(module, images)
        session = reference.load(made / "model.onnx", _cpu(name), "fp32", None)
        metrics = _parity(session, expected, images, tolerance, str(out / "model.onnx"))
        names = ["model.onnx", "model.pt2", golden.write(made, session, artifact.spec, "fp32")]
    return Artifact(
        kind="onnx",
        files={f: sha256(out / f) for f in names},
        layer=layer,
        parents={artifact.kind: artifact.sha256},
        metrics=metrics,
        settings={"opset": OPSET, "tolerance": tolerance, "compared_in": name, **(told or {})},
        versions=versions("torch", "onnx", "onnxscript", name),
        **_inherited(artifact),
    ).save(out)


def outputs(module: nn.Module, images: np.ndarray) -> Outputs:
    """Of a network in eval mode, on images (N, 3, H, W)."""
    with torch.inference_mode():
        return Outputs(*(x.numpy() for x in module(torch.from_numpy(images))))


def write(module: nn.Module, images: np.ndarray, folder: Path, metadata: dict[str, str]) -> None:
    """model.pt2 and, from the same program, model.onnx: one file, checked, any batch."""
    example = np.resize(images, (2, *images.shape[1:]))  # of one image torch fixes the batch at 1
    with _quiet():
        program = torch.export.export(
            module.eval(),
            (torch.from_numpy(example),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        )
        for node in program.graph.nodes:  # where in whose files it was written
            node.meta.pop("stack_trace", None)
        # To memory first: on a full disk torch's own writer ends the process.
        torch.export.save(program, content := io.BytesIO())
        write_atomic(folder / "model.pt2", content.getvalue())
        written = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits", "features"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
    assert written is not None
    model = written.model_proto
    model.ir_version = IR_VERSION
    for node in model.graph.node:
        del node.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model, full_check=True)
    write_atomic(folder / "model.onnx", model.SerializeToString())


def to_runtime(
    source: Artifact,
    images: np.ndarray,
    out: Path,
    runtime: str,
    *,
    precision: Precision | None = None,
    profile: Profile | None = None,
    tolerance: float | None = None,
) -> Artifact:
    """What `runtime` loads, made from an ONNX file or a quantised IR and compared with it.

    precision: of the file; by default the source's. FP32 sources become bf16 (the same file, run
    in bfloat16) and fp16 (FP16 weights, FP32 in and out), too. profile: whose device and static
    batch it is for; without one, or where its device is not here, it is compared on this CPU.
    """
    wanted = precision or source.precision
    if wanted != source.precision and (source.precision, wanted) not in CONVERSIONS:
        raise EdgeKDError(f"{source.folder} is {source.precision}: no {wanted} can be made of it")
    if runtime not in WRITERS:
        raise EdgeKDError(f"no export to {runtime}: {', '.join(WRITERS)} can be written")
    writer = WRITERS[runtime]
    with _making(out, source, images) as made:
        files = writer(source, made, wanted, profile is not None and profile.static_batch)
        compared = _compared_in(runtime, profile)
        own = _own_runtime(source, compared.runtime)
        expected = _answers(source, images, own)
        elsewhere = wanted == "int8" and own != compared.runtime
        usual = ELSEWHERE if elsewhere else TOLERANCE[wanted]
        limit = usual if tolerance is None else tolerance
        module = runtimes.get(compared.runtime)
        session = module.load(made / files[0], compared, wanted, None)
        metrics = _parity(session, expected, images, limit, str(out / files[0]),
                          rough=elsewhere or wanted == "bf16")  # fmt: skip
        files.append(golden.write(made, session, source.spec, wanted))
    return Artifact(
        kind=KINDS[runtime],
        precision=wanted,
        files={f: sha256(out / f) for f in files},
        layer=source.layer,
        parents={source.kind: source.sha256},
        metrics=metrics,
        settings={"tolerance": limit, "compared_in": f"{compared.runtime} {compared.device}"},
        versions=versions(*PACKAGES[runtime]),
        **_inherited(source),
    ).save(out)


def _own_runtime(source: Artifact, other: str) -> str:
    """Where what a file is made from runs; INT8 where the new file will, if that loads both."""
    if source.kind == "openvino" or (source.precision == "int8" and other == "openvino"):
        return "openvino"
    return _reference()[0]


def _answers(source: Artifact, images: np.ndarray, runtime: str) -> Outputs:
    """Of what a file is made from, on this CPU."""
    return runtimes.get(runtime).load(source.path, _cpu(runtime), source.precision, None)(images)


def _compared_in(runtime: str, profile: Profile | None) -> Profile:
    """Where a new file is run: on the profile's device if that is here, or on this CPU."""
    if runtime == "tensorrt":
        return Profile(name="build", runtime=runtime, device="cuda:0")
    if profile is not None and profile.runtime == runtime:
        with contextlib.suppress(RuntimeUnavailable):
            if profile.device in runtimes.get(runtime).devices():
                return profile
    static = profile is not None and profile.static_batch
    return _cpu(runtime).model_copy(update={"static_batch": static})


def of_pixels(source: Artifact, pixels: np.ndarray, out: Path) -> Artifact:
    """The FP32 ONNX file for other programs: uint8 (N, H, W, 3) RGB in, resized by the Spec's rule.

    Compared with the source on `pixels`. edgekd's own runtimes do not load it: they prepare.
    """
    if source.kind != "onnx" or source.precision != "fp32":
        raise EdgeKDError(f"--pixels is made of fp32 ONNX, {source.folder} is {source.precision}")
    import onnxruntime

    expected = _answers(source, preprocess.normalise(pixels, source.spec), "onnxruntime")
    with _making(out, source, pixels) as made:
        model = graphs.of_pixels(graphs.read(source.path), source.spec)
        write_atomic(made / "model.onnx", model.SerializeToString())
        session = onnxruntime.InferenceSession(made / "model.onnx",
                                               providers=["CPUExecutionProvider"])  # fmt: skip
        metrics = _parity(
            lambda x: Outputs(*session.run(["logits", "features"], {"image": x})),
            expected, pixels, TOLERANCE["fp32"], str(out / "model.onnx"),
        )  # fmt: skip
    return Artifact(
        kind="onnx",
        files={"model.onnx": sha256(out / "model.onnx")},
        layer=source.layer,
        parents={source.kind: source.sha256},
        metrics=metrics,
        settings={"input": PIXELS},
        versions=versions("onnx", "onnxruntime"),
        **_inherited(source),
    ).save(out)


def _write_onnx_file(source: Artifact, out: Path, precision: str, static: bool) -> list[str]:
    """ONNX as it is, or in FP16 inside; for a static batch, of one image."""
    if source.kind != "onnx" or precision == "bf16":
        raise EdgeKDError(f"onnxruntime runs no {precision} made from {source.path.name}")
    model = graphs.read(source.path)
    model = model if precision == source.precision else graphs.half(model)
    model = graphs.of_one(model) if static else model
    write_atomic(out / "model.onnx", model.SerializeToString())
    return ["model.onnx"]


def _write_program(source: Artifact, out: Path, precision: str, static: bool) -> list[str]:
    """The torch program beside the ONNX file."""
    if precision != "fp32" or static:
        raise EdgeKDError(f"the torch runtime runs fp32 and any batch, not static {precision}")
    return [p.name for p in runtimes.get("torch").build(source.path, out, _cpu("torch"))]


@contextlib.contextmanager
def _making(out: Path, source: Artifact, images: np.ndarray) -> Iterator[Path]:
    """A folder inside `out` whose files replace `out`'s when all went well.

    By rename: written over, a model.bin that a session has mapped ends the process (SIGBUS).
    """
    if not len(images):
        raise EdgeKDError("export compares outputs on images, got none: give at least one")
    if out.resolve() == source.folder.resolve():
        raise EdgeKDError(f"{out} holds what is to be exported: choose another folder")
    make_folder(out)
    (out / Artifact.FILE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as made:
        yield Path(made)
        for path in Path(made).iterdir():
            path.replace(out / path.name)


def _write_ir(source: Artifact, out: Path, precision: str, static: bool) -> list[str]:
    """OpenVINO IR with the keys under which OpenVINO's Model API finds how to use it."""
    from edgekd.runtimes import openvino as runtime

    model = runtime.read(source.path)
    if static:
        runtime.fix_batch(model, 1)
    spec = source.spec
    info = {
        "model_type": "Classification",
        "task_type": "classification",
        "labels": " ".join(c.replace(" ", "_") for c in spec.classes),
        "mean_values": " ".join(f"{255 * v:.6g}" for v in spec.mean),
        "scale_values": " ".join(f"{255 * v:.6g}" for v in spec.std),
        "resize_type": {"stretch": "standard", "crop": "crop", "pad": "fit_to_window_letterbox"}[
            spec.resize
        ],
        "reverse_input_channels": "True",  # Model API hands BGR pictures to the graph
        "output_raw_scores": "True",
    }
    for key, value in info.items():
        model.set_rt_info(value, ["model_info", key])
    model.set_rt_info(json.dumps(spec.model_dump(mode="json")), ["edgekd", "spec"])
    runtime.save(model, out / "model.xml", half=precision == "fp16")
    return ["model.xml", "model.bin"]


def _inherited(parent: Artifact) -> dict:
    """What a file takes over from what it was made from."""
    fields = ("model", "spec", "arch", "role", "params", "macs", "calibration",
              "data_fingerprint", "split_rule", "seed")  # fmt: skip
    return {f: getattr(parent, f) for f in fields}


def _write_plan(source: Artifact, out: Path, precision: str, static: bool) -> list[str]:
    """A TensorRT plan for the GPU of this machine."""
    if precision != source.precision:
        raise EdgeKDError(
            f"TensorRT builds what the file says, {source.precision}, not {precision}"
        )
    profile = Profile(name="build", runtime="tensorrt", device="cuda:0", static_batch=static)
    return [p.name for p in runtimes.get("tensorrt").build(source.path, out, profile)]


WRITERS = {"openvino": _write_ir, "onnxruntime": _write_onnx_file, "torch": _write_program,
           "tensorrt": _write_plan}  # fmt: skip
KINDS: dict[str, Kind] = {"openvino": "openvino", "onnxruntime": "onnx", "torch": "torch",
                          "tensorrt": "tensorrt"}  # fmt: skip
PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx"), "torch": ("torch",),
            "tensorrt": ("tensorrt", "tensorrt-rtx")}  # fmt: skip


def _metadata(artifact: Artifact, layer: str) -> dict[str, str]:
    """Key -> JSON, kept inside the ONNX file: it can be used when artifact.json is lost."""
    values = {**artifact.spec.model_dump(mode="json"), "layer": layer, "source": artifact.sha256}
    return {f"edgekd.{k}": json.dumps(v) for k, v in values.items()}


def _reference() -> tuple[str, runtimes.Runtime]:
    """Name and runtime that an ONNX file is compared in: its own, or else OpenVINO in f32."""
    for name in ("onnxruntime", "openvino"):
        try:
            return name, runtimes.get(name)
        except RuntimeUnavailable:
            continue
    raise RuntimeUnavailable(
        "export runs the ONNX file to compare it: pip install 'edgekd[onnxruntime]' (or [openvino])"
    )


def _cpu(runtime: str) -> Profile:
    """The plain reference: this machine's CPU."""
    return Profile(name="cpu", runtime=runtime, device="cpu" if runtime == "torch" else "CPU")


def _parity(
    session: runtimes.Session,
    expected: Outputs,
    images: np.ndarray,
    tolerance: float,
    path: str,
    *,
    rough: bool = False,
) -> dict[str, Metric]:
    """Errors of `session` against `expected`, alone and in a batch; refused if over `tolerance`.

    The largest, of the largest value (at least 1), or if `rough` the root mean square, of that of
    the values.
    """
    alone = [session(images[i : i + 1]) for i in range(min(2, len(images)))]
    outputs = [session(images), Outputs(*map(np.concatenate, zip(*alone, strict=True)))]
    found: dict[str, Metric] = {}
    for name in ("logits", "features"):
        right = getattr(expected, name)
        scale = max(1.0, float(np.abs(right).max()))
        apart = [getattr(o, name) - right[: len(o.logits)] for o in outputs]
        # unlike max(), np.max keeps NaN wherever it is
        largest = float(np.max([np.abs(d).max() for d in apart])) / scale
        power = float(np.square(right).mean())
        rms = float(np.sqrt(np.max([np.square(d).mean() for d in apart]) / (power or 1.0)))
        error, what = (rms, "root mean square") if rough else (largest, "largest")
        if not (np.isfinite(error) and error <= tolerance):
            raise EdgeKDError(
                f"{path} gives other {name}: {what} error {error:.2g} of that of the values, "
                f"{tolerance:g} is the tolerance (--tolerance); the file must not be used"
            )
        found |= {f"parity_max_abs_{name}": Metric(value=largest),
                  f"parity_rms_{name}": Metric(value=rms)}  # fmt: skip
    same = outputs[0].logits.argmax(1) == expected.logits.argmax(1)
    return found | {"parity_agreement": Metric(value=float(same.mean()))}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter prints and warns about itself; errors still come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
