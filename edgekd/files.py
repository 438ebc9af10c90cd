"""How a run's student becomes files: the precision is chosen, each format written and judged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekd import data, imaging, machine, runs
from edgekd.evaluation import ANSWERS
from edgekd.records import (
    Artifact,
    EdgeKDError,
    GateMissed,
    Precision,
    Profile,
    Training,
    make_folder,
    unknown,
    write_atomic,
)

if TYPE_CHECKING:
    from edgekd import candidates, devices
    from edgekd.stages import Place

FORMATS = {"onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt",
           "torch": "torch"}  # and what loads it  # fmt: skip
LOW = ("int8", "fp16", "bf16")  # precisions that quantize may have chosen
QAT = "qat"  # folder of the student after training in INT8
CANDIDATES = "candidates"  # folder of what `edgekd quantize` chose from


def quantize(
    place: Place,
    *,
    engine: str,
    method: str | None,
    images: int,
    max_drop: float,
    seconds: float | None,
    qat: int,
    force: bool,
) -> tuple[Artifact, Artifact, candidates.Choice | None]:
    """(the file to deploy, the student's FP32 ONNX, the choice), judged on the test split.

    engine: one of edgekd/quantizers, which writes INT8, or auto: every candidate is measured, with
    `seconds` of calls in each round. qat: epochs of training in INT8 before; 0: none.
    """
    from edgekd import quantizers

    profile = place.run.profile
    if engine != "auto":
        quantizers.get(engine)
        if seconds is not None:
            raise EdgeKDError("--seconds is of timing candidates: leave it out, or --engine")
        if "int8" not in profile.precisions:
            raise EdgeKDError(f"profile {profile.name} does not allow int8")
    elif method is not None:
        raise EdgeKDError("--method is an engine's: name one with --engine")
    dataset = place.dataset()
    source = place.student_onnx(dataset)
    tuned = _tuned(place, dataset, qat, force=force) if qat else None
    if engine == "auto":
        choice = _choice(
            place, dataset, source, images, max_drop, tuned, seconds=seconds, force=force
        )
        chosen = place.folder / CANDIDATES / choice.chosen
        made = _deployed(place, Artifact.load(chosen))
    else:
        choice = None
        (place.folder / CANDIDATES / "choice.json").unlink(missing_ok=True)
        made = _by_engine(place, dataset, tuned or source, engine, method, images, force=force)
    here, _ = runs.host(profile, made)
    rivals = place.rivals(dataset, source)
    judged = runs.judged(made, here, dataset, source, place.track, rivals=rivals)
    return judged, source, choice


def _choice(
    place: Place,
    dataset: data.Dataset,
    source: Artifact,
    images: int,
    max_drop: float,
    tuned: Artifact | None,
    *,
    seconds: float | None,
    force: bool,
) -> candidates.Choice:
    """All candidates measured now, unless such a machine has done it before and was asked alike."""
    from edgekd import candidates

    out = place.folder / CANDIDATES
    profile = place.run.profile
    seconds = candidates.SECONDS if seconds is None else seconds
    if (out / candidates.Choice.FILE).exists() and not force:
        old = candidates.Choice.load(out)
        asked = (source.sha256, tuned.sha256 if tuned else "", profile, max_drop,
                 min(images, len(dataset.splits["train"])), seconds)  # fmt: skip
        same = (old.source, old.tuned, old.profile, old.max_drop, old.images, old.seconds) == asked
        if same and old.machine.kind == machine.this().kind:
            return old
    if force:
        shutil.rmtree(out, ignore_errors=True)
    return candidates.choose(
        source, dataset, profile, out,
        images=images, max_drop=max_drop, tuned=tuned, seconds=seconds, seed=place.run.seed,
        track=place.track,
    )  # fmt: skip


def _tuned(place: Place, dataset: data.Dataset, epochs: int, *, force: bool) -> Artifact:
    """The student's FP32 ONNX after `epochs` in which it felt INT8, taught by itself as it was."""
    from edgekd import distill, models

    student = place.student()
    before = Training(**student.settings["training"])
    gentle = {"epochs": epochs, "lr": before.lr / 10, "warmup_epochs": 0.5, "patience": 0}
    training = before.model_copy(update=gentle | {"int8": True, "alpha_hard": 0.3})
    origin = {"student": student.sha256}
    asked = distill.settings(dataset, student.model, student.spec, training, seed=place.run.seed,
                             teachers=[student], origin=origin)  # fmt: skip
    folder = place.folder / QAT / "student"
    trained = runs.finished(folder, asked, force=force)
    if trained is None:
        trained = distill.distill(
            dataset, [student], student.model, student.arch, student.spec, folder,
            training=training, net=models.load(student).net, origin=origin,
            replay=runs.shared(place.root, dataset), seed=place.run.seed, track=place.track,
        )  # fmt: skip
    return runs.onnx_of(
        trained, place.folder / QAT / "onnx", dataset, place.track, layer=place.layer(dataset)
    )


def _deployed(place: Place, chosen: Artifact) -> Artifact:
    """The chosen candidate as the run's file of its precision."""
    out = make_folder(place.folder / chosen.precision)
    if (out / Artifact.FILE).exists() and Artifact.load(out).sha256 == chosen.sha256:
        return Artifact.load(out)
    return _copied(chosen, out)


def _copied(made: Artifact, out: Path) -> Artifact:
    """The same files in folder `out`; the record, which says that they are there, comes last."""
    (make_folder(out) / Artifact.FILE).unlink(missing_ok=True)
    for name in (*made.files, *([ANSWERS] if made.evaluation else [])):
        write_atomic(out / name, (made.folder / name).read_bytes())
    return made.save(out)


def _by_engine(
    place: Place,
    dataset: data.Dataset,
    source: Artifact,
    engine: str,
    method: str | None,
    images: int,
    *,
    force: bool,
) -> Artifact:
    """INT8 by one engine, for the profile's runtime or, where that cannot be, the engine's own."""
    from edgekd import quantize as maker
    from edgekd import quantizers

    folder = place.folder / "int8"
    asked = {
        "engine": engine,
        "method": quantizers.method(engine, method),
        "calibration_images": min(images, len(dataset.splits["train"])),
    }
    if (folder / Artifact.FILE).exists() and not force:
        made = Artifact.load(folder)
        other = [k for k, v in asked.items() if made.settings.get(k) != v]
        if not other and made.parents.get("onnx") == source.sha256:
            return made
        what = "of an earlier student" if not other else f"with another {other[0]}"
        raise EdgeKDError(f"{folder} was made {what}: --force replaces it")
    chosen = maker.pick_calibration(dataset.splits["train"], images, place.run.seed)
    pixels = data.load_pixels(chosen, source.spec, place.track)
    calibration = imaging.normalise(pixels, source.spec)
    runtime = place.run.profile.runtime
    return maker.quantize(
        source, calibration, folder, engine=engine, method=method,
        runtime=runtime if runtime in quantizers.get(engine).RUNTIMES else None,
        seed=place.run.seed,
    )  # fmt: skip


def check_drop(after: Artifact, before: Artifact, max_drop: float) -> None:
    """GateMissed if INT8 lost over `max_drop` points of balanced accuracy on the test split."""
    key = "test_balanced_accuracy"
    drop = 100 * (before.metrics[key].value - after.metrics[key].value)
    if drop > max_drop:
        raise GateMissed(
            f"{after.precision} loses {drop:.1f} points of balanced accuracy, {max_drop:g} allowed "
            "(--max-drop); more --calibration-images may help, or deploy fp32"
        )


def export(
    place: Place,
    format_name: str,
    precision: str | None,
    *,
    pixels: bool = False,
    tolerance: float | None = None,
) -> tuple[list[Artifact], list[devices.Outlook]]:
    """(deployable files in `<run>/<format>-<precision>/`, what is known of absent devices)."""
    from edgekd import devices

    if format_name not in (*FORMATS, "all"):
        raise EdgeKDError(unknown("format", format_name, (*FORMATS, "all")))
    profile = place.run.profile
    dataset = place.dataset()
    source = place.student_onnx(dataset)
    if pixels:
        return [_for_others(place, dataset, source, format_name)], []
    formats = [f for f in FORMATS if f != "tensorrt"] if format_name == "all" else [format_name]
    made = [_exported(place, dataset, source, f, precision, tolerance) for f in formats]
    outlooks = []
    for artifact in made:
        if artifact.folder.name.startswith("tensorrt") and artifact.kind == "onnx":
            outlooks.append(devices.tensorrt(artifact))
        if artifact.kind == "openvino" and profile.device == "NPU" and not runs.here(profile):
            outlooks.append(devices.npu(artifact, profile))
    return made, outlooks


def _for_others(
    place: Place, dataset: data.Dataset, source: Artifact, format_name: str
) -> Artifact:
    from edgekd import export as exporter

    if format_name != "onnx":
        raise EdgeKDError("--pixels is for --format onnx")
    samples = dataset.splits["val"][: runs.PARITY_IMAGES]
    pictures = data.load_pixels(samples, source.spec)
    return exporter.of_pixels(source, pictures, place.folder / "onnx-fp32-pixels")


def _exported(
    place: Place,
    dataset: data.Dataset,
    source: Artifact,
    format_name: str,
    precision: str | None,
    tolerance: float | None,
) -> Artifact:
    """One format, judged on the test split itself."""
    from edgekd import devices
    from edgekd import export as exporter

    wanted = precision or _usual(place, format_name)
    if wanted not in ("fp32", *LOW):
        raise EdgeKDError(unknown("precision", wanted, ("fp32", *LOW)))
    images = runs.sample_images(dataset, source.spec, "val", runs.PARITY_IMAGES)
    out = place.folder / f"{format_name}-{wanted}"
    if format_name == "onnx" and wanted == "fp32":
        limit = exporter.TOLERANCE["fp32"] if tolerance is None else tolerance
        rivals = place.rivals(dataset)
        if not (out / Artifact.FILE).exists() or Artifact.load(out).sha256 != source.sha256:
            _copied(source, out)  # what all other formats are made of, judged already
        return runs.onnx_of(
            place.student(), out, dataset, place.track, tolerance=limit, rivals=rivals,
            layer=place.layer(dataset),
        )  # fmt: skip
    rivals = place.rivals(dataset, None if wanted == "fp32" else source)
    runtime = FORMATS[format_name]
    if wanted == "int8":
        source = _small(place, source, runtime)
    if format_name == "tensorrt":
        devices.check_symmetric(source)
        runtime = "onnxruntime"  # the file that TensorRT's parser reads on the device
    written = exporter.to_runtime(
        source, images, out, runtime,
        precision=cast("Precision", wanted), profile=place.run.profile, tolerance=tolerance,
    )  # fmt: skip
    if format_name == "tensorrt" and runs.here(place.run.profile):
        written = exporter.to_runtime(written, images, devices.folder_of(written), "tensorrt",
                                      profile=place.run.profile)  # fmt: skip
    profile, _ = runs.host(place.run.profile, written)
    return runs.judged(written, profile, dataset, source, place.track, rivals=rivals)


def _usual(place: Place, format_name: str) -> str:
    """The precision that quantize chose, or made last."""
    from edgekd.candidates import Choice

    if format_name == "torch":
        return "fp32"
    if (place.folder / CANDIDATES / Choice.FILE).exists():
        chosen = Choice.load(place.folder / CANDIDATES)
        return next(c.precision for c in chosen.candidates if c.name == chosen.chosen)
    made = [p for p in LOW if (place.folder / p / Artifact.FILE).exists()]
    return made[0] if made else "fp32"


def build_here(folder: Path) -> Artifact:
    """A TensorRT plan of an exported file, for this machine's GPU, checked by golden samples."""
    from edgekd import devices, golden
    from edgekd import export as exporter

    source = Artifact.load(folder)
    images = imaging.normalise(golden.read(source).pixels, source.spec)
    profile = Profile(name="here", runtime="tensorrt", device="cuda:0")
    return exporter.to_runtime(source, images, devices.folder_of(source), "tensorrt",
                               profile=profile)  # fmt: skip


def _small(place: Place, source: Artifact, runtime: str) -> Artifact:
    """The run's INT8 file, if `runtime` can load it or what is made of it."""
    folder = place.folder / "int8"
    if not (folder / Artifact.FILE).exists():
        raise EdgeKDError(f"{place.folder} has no int8 yet: run edgekd quantize first")
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
