"""`edgekd export`: the files that a device loads, each compared with what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from edgekd import data, runtimes
from edgekd.data import preprocess
from edgekd.metrics.evaluation import ANSWERS
from edgekd.pipeline import folders
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Precision,
    Profile,
    locked,
    make_folder,
    unknown,
    write_atomic,
)

if TYPE_CHECKING:
    from edgekd.export.device_checks import Outlook
    from edgekd.pipeline.run import Run

FORMATS = {"onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt",
           "torch": "torch"}  # and what loads it  # fmt: skip
LOW = ("int8", "fp16", "bf16")  # precisions that quantize may have chosen
CANDIDATES = "candidates"  # folder of what `edgekd quantize` chose from


def copied(made: Artifact, out: Path) -> Artifact:
    """The same files in folder `out`; the record, which says that they are there, comes last."""
    (make_folder(out) / Artifact.FILE).unlink(missing_ok=True)
    for name in (*made.files, *([ANSWERS] if made.evaluation else [])):
        write_atomic(out / name, (made.folder / name).read_bytes())
    return made.save(out)


class Exported(NamedTuple):
    """What `export` wrote."""

    artifacts: list[Artifact]
    outlooks: list[Outlook]  # of devices that are not here: what is known already


def export(
    run: Run,
    format_name: str,
    precision: str | None,
    *,
    pixels: bool = False,
    tolerance: float | None = None,
) -> Exported:
    """Deployable files in `<run>/<format>-<precision>/`, and what is known of absent devices."""
    from edgekd.export import device_checks

    if format_name not in (*FORMATS, "all"):
        raise EdgeKDError(unknown("format", format_name, (*FORMATS, "all")))
    profile = run.record.profile
    dataset = run.dataset()
    source = run.student_onnx(dataset)
    if pixels:
        return Exported([_for_others(run, dataset, source, format_name)], [])
    formats = [f for f in FORMATS if f != "tensorrt"] if format_name == "all" else [format_name]
    made = [_exported(run, dataset, source, f, precision, tolerance) for f in formats]
    outlooks = []
    for artifact in made:
        if artifact.folder.name.startswith("tensorrt") and artifact.kind == "onnx":
            outlooks.append(device_checks.tensorrt(artifact))
        if artifact.kind == "openvino" and profile.device == "NPU" and not folders.here(profile):
            outlooks.append(device_checks.npu(artifact, profile))
    return Exported(made, outlooks)


def _for_others(run: Run, dataset: data.Dataset, source: Artifact, format_name: str) -> Artifact:
    from edgekd import export as exporter

    if format_name != "onnx":
        raise EdgeKDError("--pixels is for --format onnx")
    samples = dataset.splits["val"][: folders.PARITY_IMAGES]
    pictures = data.load_pixels(samples, source.spec)
    return exporter.of_pixels(source, pictures, run.folder / "onnx-fp32-pixels")


def _exported(
    run: Run,
    dataset: data.Dataset,
    source: Artifact,
    format_name: str,
    precision: str | None,
    tolerance: float | None,
) -> Artifact:
    """One format, judged on the test split itself."""
    from edgekd import export as exporter
    from edgekd.export import device_checks

    wanted = precision or _usual(run, format_name)
    if wanted not in ("fp32", *LOW):
        raise EdgeKDError(unknown("precision", wanted, ("fp32", *LOW)))
    images = folders.sample_images(dataset, source.spec, "val", folders.PARITY_IMAGES)
    out = run.folder / f"{format_name}-{wanted}"
    if format_name == "onnx" and wanted == "fp32":
        limit = exporter.TOLERANCE["fp32"] if tolerance is None else tolerance
        rivals = run.rivals(dataset)
        if not (out / Artifact.FILE).exists() or Artifact.load(out).sha256 != source.sha256:
            copied(source, out)  # what all other formats are made of, judged already
        return folders.onnx_of(
            run.student(), out, dataset, run.track, tolerance=limit, rivals=rivals,
            layer=run.layer(dataset),
        )  # fmt: skip
    rivals = run.rivals(dataset, None if wanted == "fp32" else source)
    runtime = FORMATS[format_name]
    if wanted == "int8":
        source = _small(run, source, runtime)
    if format_name == "tensorrt":
        device_checks.check_symmetric(source)
        runtime = "onnxruntime"  # the file that TensorRT's parser reads on the device
    written = exporter.to_runtime(
        source, images, out, runtime,
        precision=cast("Precision", wanted), profile=run.record.profile, tolerance=tolerance,
    )  # fmt: skip
    if format_name == "tensorrt" and folders.here(run.record.profile):
        written = exporter.to_runtime(written, images, device_checks.folder_of(written), "tensorrt",
                                      profile=run.record.profile)  # fmt: skip
    profile, _ = runtimes.host(run.record.profile, written)
    return folders.judged(written, profile, dataset, source, run.track, rivals=rivals)


def _usual(run: Run, format_name: str) -> str:
    """The precision that quantize chose, or made last."""
    from edgekd.quantize.choice import Choice

    if format_name == "torch":
        return "fp32"
    if (run.folder / CANDIDATES / Choice.FILE).exists():
        chosen = Choice.load(run.folder / CANDIDATES)
        return next(c.precision for c in chosen.candidates if c.name == chosen.chosen)
    made = [p for p in LOW if (run.folder / p / Artifact.FILE).exists()]
    return made[0] if made else "fp32"


def build_here(folder: Path, format_name: str = "tensorrt") -> Artifact:
    """A TensorRT plan of an exported file, for this machine's GPU, checked by golden samples."""
    if format_name != "tensorrt":
        raise EdgeKDError("--artifact builds a TensorRT plan: --format tensorrt")
    from edgekd import export as exporter
    from edgekd.export import device_checks
    from edgekd.runtimes import golden

    source = Artifact.load(folder)
    images = preprocess.normalise(golden.read(source).pixels, source.spec)
    profile = Profile(name="here", runtime="tensorrt", device="cuda:0")
    out = device_checks.folder_of(source)
    with locked(out):
        return exporter.to_runtime(source, images, out, "tensorrt", profile=profile)


def _small(run: Run, source: Artifact, runtime: str) -> Artifact:
    """The run's INT8 file, if `runtime` can load it or what is made of it."""
    folder = run.folder / "int8"
    if not (folder / Artifact.FILE).exists():
        raise EdgeKDError(f"{run.folder} has no int8 yet: run edgekd quantize first")
    small = Artifact.load(folder)
    if small.parents.get("onnx") != source.sha256:
        raise EdgeKDError(f"{folder} is of an earlier student: edgekd quantize --force")
    if small.kind == "openvino" and runtime != "openvino":
        engine = small.settings["engine"]
        raise EdgeKDError(
            f"{folder} is engine {engine}'s and OpenVINO's alone: "
            "edgekd quantize --engine ort --force makes one for every runtime"
        )
    return small
