"""`edgekd quantize`: the precision that the student is deployed in, chosen by measurement."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

from edgekd import data, runtimes
from edgekd.data import preprocess
from edgekd.pipeline import folders
from edgekd.pipeline.export import CANDIDATES, copied
from edgekd.quantize import candidates, engines, ptq
from edgekd.quantize.choice import Choice
from edgekd.records import Artifact, EdgeKDError, GateMissed, Training, make_folder
from edgekd.runtimes import machine

if TYPE_CHECKING:
    from edgekd.pipeline.run import Run

QAT = "qat"  # folder of the student after training in INT8


class Quantized(NamedTuple):
    """What `quantize` made, judged on the test split."""

    artifact: Artifact  # to deploy
    source: Artifact  # the student's FP32 ONNX
    choice: Choice | None  # None: the engine was named


def quantize(
    run: Run,
    *,
    engine: str,
    method: str | None,
    images: int,
    max_drop: float,
    seconds: float | None,
    exhaustive: bool,
    qat: int,
    force: bool,
) -> Quantized:
    """The file to deploy, judged on the test split.

    engine: one of edgekd/quantize/engines, which writes INT8, or auto: every candidate is measured,
    with `seconds` of calls in each round, as far as it may be chosen, or `exhaustive`: in full.
    qat: epochs of training in INT8 before; 0: none.
    """
    profile = run.record.profile
    if engine != "auto":
        engines.get(engine)
        if seconds is not None:
            raise EdgeKDError("--seconds is of timing candidates: leave it out, or --engine")
        if exhaustive:
            raise EdgeKDError("--exhaustive is of all candidates: leave it out, or --engine")
        if "int8" not in profile.precisions:
            raise EdgeKDError(f"profile {profile.name} does not allow int8")
    elif method is not None:
        raise EdgeKDError("--method is an engine's: name one with --engine")
    dataset = run.dataset()
    source = run.student_onnx(dataset)
    tuned = _tuned(run, dataset, qat, force=force) if qat else None
    if engine == "auto":
        choice = _choice(
            run, dataset, source, images, max_drop, tuned,
            seconds=seconds, exhaustive=exhaustive, force=force,
        )  # fmt: skip
        chosen = run.folder / CANDIDATES / choice.chosen
        made = _deployed(run, Artifact.load(chosen))
    else:
        choice = None
        (run.folder / CANDIDATES / "choice.json").unlink(missing_ok=True)
        made = _by_engine(run, dataset, tuned or source, engine, method, images, force=force)
    here, _ = runtimes.host(profile, made)
    rivals = run.rivals(dataset, source)
    judged = folders.judged(made, here, dataset, source, run.track, rivals=rivals)
    return Quantized(judged, source, choice)


def _choice(
    run: Run,
    dataset: data.Dataset,
    source: Artifact,
    images: int,
    max_drop: float,
    tuned: Artifact | None,
    *,
    seconds: float | None,
    exhaustive: bool,
    force: bool,
) -> Choice:
    """All candidates measured now, unless such a machine has done it before and was asked alike.

    What was measured in full answers those too who ask for the choice alone.
    """
    out = run.folder / CANDIDATES
    profile = run.record.profile
    seconds = candidates.SECONDS if seconds is None else seconds
    if (out / Choice.FILE).exists() and not force:
        old = Choice.load(out)
        asked = (source.sha256, tuned.sha256 if tuned else "", profile, max_drop,
                 min(images, len(dataset.splits["train"])), seconds)  # fmt: skip
        same = (old.source, old.tuned, old.profile, old.max_drop, old.images, old.seconds) == asked
        same = same and old.exhaustive >= exhaustive
        if same and old.machine.kind == machine.this().kind:
            return old
    if force:
        shutil.rmtree(out, ignore_errors=True)
    return candidates.choose(
        source, dataset, profile, out,
        images=images, max_drop=max_drop, tuned=tuned, seconds=seconds, exhaustive=exhaustive,
        seed=run.record.seed, track=run.track,
    )  # fmt: skip


def _tuned(run: Run, dataset: data.Dataset, epochs: int, *, force: bool) -> Artifact:
    """The student's FP32 ONNX after `epochs` in which it felt INT8, taught by itself as it was."""
    from edgekd.models import zoo
    from edgekd.train import distill

    student = run.student()
    before = Training(**student.settings["training"])
    gentle = {"epochs": epochs, "lr": before.lr / 10, "warmup_epochs": 0.5, "patience": 0}
    training = before.model_copy(update=gentle | {"int8": True, "alpha_hard": 0.3})
    origin = {"student": student.sha256}
    asked = distill.settings(dataset, student.model, student.spec, training, seed=run.record.seed,
                             teachers=[student], origin=origin)  # fmt: skip
    folder = run.folder / QAT / "student"
    trained = folders.finished(folder, asked, force=force)
    if trained is None:
        trained = distill.distill(
            dataset, [student], student.model, student.arch, student.spec, folder,
            training=training, net=zoo.load(student).net, origin=origin,
            replay=folders.shared(run.root, dataset), seed=run.record.seed, track=run.track,
        )  # fmt: skip
    return folders.onnx_of(
        trained, run.folder / QAT / "onnx", dataset, run.track, layer=run.layer(dataset)
    )


def _deployed(run: Run, chosen: Artifact) -> Artifact:
    """The chosen candidate as the run's file of its precision."""
    out = make_folder(run.folder / chosen.precision)
    if (out / Artifact.FILE).exists() and Artifact.load(out).sha256 == chosen.sha256:
        return Artifact.load(out)
    return copied(chosen, out)


def _by_engine(
    run: Run,
    dataset: data.Dataset,
    source: Artifact,
    engine: str,
    method: str | None,
    images: int,
    *,
    force: bool,
) -> Artifact:
    """INT8 by one engine, for the profile's runtime or, where that cannot be, the engine's own."""
    folder = run.folder / "int8"
    asked = {
        "engine": engine,
        "method": engines.method(engine, method),
        "calibration_images": min(images, len(dataset.splits["train"])),
    }
    if (folder / Artifact.FILE).exists() and not force:
        made = Artifact.load(folder)
        other = [k for k, v in asked.items() if made.settings.get(k) != v]
        if not other and made.parents.get("onnx") == source.sha256:
            return made
        what = "of an earlier student" if not other else f"with another {other[0]}"
        raise EdgeKDError(f"{folder} was made {what}: --force replaces it")
    chosen = ptq.pick_calibration(dataset.splits["train"], images, run.record.seed)
    pixels = data.load_pixels(chosen, source.spec, run.track)
    calibration = preprocess.normalise(pixels, source.spec)
    runtime = run.record.profile.runtime
    return ptq.quantize(
        source, calibration, folder, engine=engine, method=method,
        runtime=runtime if runtime in engines.get(engine).RUNTIMES else None,
        seed=run.record.seed,
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
