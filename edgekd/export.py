"""nn.Module -> the ONNX waist -> what a runtime loads. Each compared with what it was made from."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from edgekd import runtimes
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Metric,
    Profile,
    RuntimeUnavailable,
    make_folder,
    sha256,
    versions,
)
from edgekd.runtimes import Outputs

OPSET = 18  # read by every runtime here, and by JetPack 6's TensorRT 10.3
IR_VERSION = 10


def to_onnx(
    module: nn.Module,
    artifact: Artifact,
    images: np.ndarray,
    out: Path,
    *,
    tolerance: float = 1e-3,
) -> Artifact:
    """`out`/model.onnx, and model.pt2, the program it was made from, for the torch runtime.

    module: image -> (logits, features), in eval mode. images: (n, 3, H, W) float32, prepared; on
    them the file must give the module's outputs to within `tolerance` of the largest one (at
    least 1), alone and in a batch, or EdgeKDError and nothing that looks finished.
    """
    name, reference = _reference()
    layer = str(getattr(module, "layer", ""))
    with _making(out, artifact, images) as made:
        _write_onnx(module, images, made, _metadata(artifact, layer))
        with torch.inference_mode():
            expected = Outputs(*(x.numpy() for x in module(torch.from_numpy(images))))
        session = reference.load(made / "model.onnx", _cpu(name), "fp32", None)
        metrics = _parity(session, expected, images, tolerance, str(out / "model.onnx"))
    return Artifact(
        kind="onnx",
        files={f: sha256(out / f) for f in ("model.onnx", "model.pt2")},
        layer=layer,
        parents={artifact.kind: artifact.sha256},
        metrics=metrics,
        settings={"opset": OPSET, "tolerance": tolerance, "compared_in": name},
        versions=versions("torch", "onnx", "onnxscript", name),
        **_inherited(artifact),
    ).save(out)


def _write_onnx(
    module: nn.Module, images: np.ndarray, folder: Path, metadata: dict[str, str]
) -> None:
    """model.pt2 and, from the same program, model.onnx: one file, checked, any batch."""
    example = np.resize(images, (2, *images.shape[1:]))  # of one image torch fixes the batch at 1
    with _quiet():
        program = torch.export.export(
            module.eval(),
            (torch.from_numpy(example),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        )
        torch.export.save(program, folder / "model.pt2")
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
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model, full_check=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def to_runtime(
    source: Artifact,
    images: np.ndarray,
    out: Path,
    runtime: str,
    *,
    tolerance: float = 1e-3,
) -> Artifact:
    """What `runtime` loads, made from an ONNX file or a quantised IR and compared with it."""
    if runtime != "openvino":
        raise EdgeKDError(f"no export to {runtime}: openvino is what can be written")
    module = runtimes.get("openvino")
    cpu = _cpu("openvino")
    with _making(out, source, images) as made:
        _write_ir(source, made)
        expected = module.load(source.path, cpu, source.precision, None)(images)
        session = module.load(made / "model.xml", cpu, source.precision, None)
        metrics = _parity(session, expected, images, tolerance, str(out / "model.xml"))
    return Artifact(
        kind="openvino",
        precision=source.precision,
        files={f: sha256(out / f) for f in ("model.xml", "model.bin")},
        layer=source.layer,
        parents={source.kind: source.sha256},
        metrics=metrics,
        settings={"tolerance": tolerance},
        versions=versions("openvino"),
        **_inherited(source),
    ).save(out)


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


def _write_ir(source: Artifact, out: Path) -> None:
    """OpenVINO IR with the keys under which OpenVINO's Model API finds how to use it."""
    from edgekd.runtimes import openvino as runtime

    model = runtime.read(source.path)
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
    runtime.ov.save_model(model, out / "model.xml", compress_to_fp16=False)


def _inherited(parent: Artifact) -> dict:
    """What a file takes over from what it was made from."""
    fields = ("model", "spec", "arch", "role", "params", "macs", "calibration",
              "data_fingerprint", "split_rule", "seed")  # fmt: skip
    return {f: getattr(parent, f) for f in fields}


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
    return Profile(name="cpu", runtime=runtime, device="CPU")


def _parity(
    session: runtimes.Session,
    expected: Outputs,
    images: np.ndarray,
    tolerance: float,
    path: str,
) -> dict[str, Metric]:
    """Largest errors of `session` against `expected`, alone and in a batch; refused if too big."""
    alone = [session(images[i : i + 1]) for i in range(min(2, len(images)))]
    outputs = [session(images), Outputs(*map(np.concatenate, zip(*alone, strict=True)))]
    found: dict[str, Metric] = {}
    for name in ("logits", "features"):
        right = getattr(expected, name)
        scale = max(1.0, float(np.abs(right).max()))
        errors = [np.abs(getattr(o, name) - right[: len(o.logits)]).max() for o in outputs]
        error = float(np.max(errors)) / scale  # unlike max(), np.max keeps NaN wherever it is
        if not (np.isfinite(error) and error <= tolerance):
            raise EdgeKDError(
                f"{path} gives other {name}: largest error {error:.2g} of the largest value, "
                f"{tolerance:g} is the tolerance (--tolerance); the file must not be used"
            )
        found[f"parity_max_abs_{name}"] = Metric(value=error)
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
