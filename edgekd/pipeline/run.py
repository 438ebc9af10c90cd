"""A run: the folder that a student's stages share. Its methods are the rest of the line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from edgekd import data
from edgekd.pipeline import folders
from edgekd.records import Artifact, EdgeKDError, Fidelity, Timing, Track, locked, untracked
from edgekd.records.options import INTENDED

if TYPE_CHECKING:
    from edgekd.bench.compare import Against
    from edgekd.bundle.bundle import Manifest
    from edgekd.pipeline.export import Exported
    from edgekd.pipeline.quantize import Quantized
    from edgekd.runtimes.golden import Verified


F = TypeVar("F", bound=Callable[..., Any])


def _alone(stage: F) -> F:
    """A stage that waits until no other command is at work on its run."""

    @functools.wraps(stage)
    def waited(run: Run, *given: Any, **named: Any) -> Any:
        with locked(run.folder, inside=True):
            return stage(run, *given, **named)

    return cast("F", waited)


@dataclass(frozen=True)
class Run:
    """A run that was begun by `distill`: its folder, and what all its stages share.

    Every method finds its inputs in the folder, writes one folder there and returns its record.
    Each is kept: asked alike again, it is not made again.
    """

    root: Path  # of all runs, with the teachers and supernets that they share
    folder: Path
    record: folders.RunRecord  # run.json
    chosen: str  # how the run was chosen, to be said
    track: Track

    @classmethod
    def open(cls, folder: Path, *, track: Track = untracked) -> Run:
        """The run in `folder`, such as runs/cpu; EdgeKDError if there is none."""
        return cls.find(folder.parent, folder, None, track)

    @classmethod
    def find(cls, root: Path, run: Path | None, profile: str | None, track: Track) -> Run:
        """The run in `run`, of `profile` in `root`, or where neither is given, the latest there."""
        return cls(root, *folders.find(root, run, profile), track)

    # ---- the line

    @_alone
    def quantize(
        self,
        *,
        engine: str = "auto",
        method: str | None = None,
        calibration_images: int = 300,
        qat: int = 0,
        max_drop: float = 1.0,
        seconds: float | None = None,
        exhaustive: bool = False,
        force: bool = False,
    ) -> Quantized:
        """The file in the fastest precision that keeps the student's answers, measured here.

        engine: "auto" makes, judges and times every precision and INT8 engine that the profile
        allows; nncf, ort or inc write INT8. method: of that engine. calibration_images: of the
        training split. qat: epochs of training in INT8 before. max_drop: points of balanced
        accuracy that may be lost. seconds: of calls of each candidate in each of up to 3 rounds.
        exhaustive: all are explained and timed in full, those that cannot be chosen too.
        """
        from edgekd.pipeline import quantize

        return quantize.quantize(
            self, engine=engine, method=method, images=calibration_images, max_drop=max_drop,
            seconds=seconds, exhaustive=exhaustive, qat=qat, force=force,
        )  # fmt: skip

    @_alone
    def export(
        self,
        format_name: str,
        *,
        precision: str | None = None,
        pixels: bool = False,
        tolerance: float | None = None,
    ) -> Exported:
        """The files that a device loads, in `<run>/<format>-<precision>/`, compared on real images.

        format_name: onnx, openvino, tensorrt, torch or all. precision: fp32, bf16, fp16 or int8;
        None: as `quantize` chose. pixels: for other programs, uint8 (N, H, W, 3) in. tolerance:
        largest relative error of an output; EdgeKDError beyond it.
        """
        from edgekd.pipeline import export

        return export.export(self, format_name, precision, pixels=pixels, tolerance=tolerance)

    @_alone
    def verify(self) -> Verified:
        """The last file's golden samples, sent through it once more on this machine."""
        from edgekd.pipeline import verify

        return verify.verify(folders.exports(self.folder)[-1].folder)

    @_alone
    def bench(
        self,
        *,
        seconds: float = 10,
        within: float | None = None,
        duration: float | None = None,
        quick: bool = False,
        runtime: str | None = None,
        host: str | None = None,
        host_python: str = "python3",
        given: str = "",
    ) -> list[Timing]:
        """Teacher, student and every file timed in turns; `<run>/bench/` keeps records and a page.

        within: percent that the 95 % interval of each ratio to the first file may be wide, which
        ends it; None: 5, quick 10. seconds: of turns of each file at most. duration: all of them,
        is it the same when the device is warm? quick: latency, memory and throughput alone.
        runtime: on this CPU. host: the device, over ssh, with its Python host_python. given:
        options to be told on the page.
        """
        from edgekd.pipeline import bench

        how = bench.how_of(seconds, duration, quick=quick, within=within)
        timings = bench.bench(self, how, runtime=runtime, host=host, host_python=host_python)
        bench.bench_page(self, timings, given)
        return timings

    @_alone
    def compare(
        self,
        other: str,
        *,
        seconds: float = 10,
        duration: float | None = None,
        runtime: str | None = None,
        rounds: int = 5,
        tolerance: float | None = None,
    ) -> Against:
        """The run's last file timed beside `other`: a runtime, an artifact's folder, a timing.json.

        rounds: processes of each file. tolerance: percent slower that is allowed.
        """
        from edgekd.pipeline import bench

        how = bench.a_round(seconds, duration)
        return bench.bench_against(
            self, how, other, runtime=runtime, rounds=rounds, tolerance=tolerance
        )

    @_alone
    def explain(
        self,
        *,
        images: int | None = None,
        variant: str = "evidence",
        fast: bool = False,
        layers: int = 0,
    ) -> Fidelity:
        """Score-CAM of teacher, student and deployed files, compared step by step and judged.

        images: of the test split, by class; None: as the profile's margins say. fast: the teacher's
        maps from as few channels as are certified to give the same map. layers: of so many images
        teacher and student are shown layer by layer, too.
        """
        from edgekd.pipeline import explain

        return explain.judge(self, images=images, variant=variant, fast=fast, depths=layers)

    @_alone
    def report(self, *, cases: int = 12, pictures: bool = True) -> Path:
        """`<run>/report.html`, of what is finished, with report.json and cases.csv beside it.

        cases: images in the gallery. pictures: False leaves every pixel out.
        """
        from edgekd.pipeline import report

        return report.report(self, cases=cases, pictures=pictures)

    @_alone
    def bundle(
        self,
        out: Path | None = None,
        *,
        key: Path | None = None,
        intended_use: str = INTENDED,
        abstain_below: float = 0.0,
        despite: str = "",
    ) -> tuple[Path, Manifest]:
        """(the bundle's file, what it holds): the last file with its evidence, for the device.

        key: private key that signs it. abstain_below: calibrated probability under which a device
        gives no answer. despite: why, if its explanations did not pass. EdgeKDError if it was not
        measured or explained, GateMissed if its explanations did not pass.
        """
        from edgekd.pipeline import bundle

        return bundle.bundle(
            self, out, key=key, intended_use=intended_use, abstain_below=abstain_below,
            despite=despite,
        )  # fmt: skip

    # ---- what the stages find in the folder

    def teachers(self) -> list[Artifact]:
        """The student's first teacher; none in a run without one."""
        return [Artifact.load(Path(self.record.teacher))] if self.record.teacher else []

    def student(self) -> Artifact:
        """The run's finished student."""
        return Artifact.load(self.folder / "student")

    def dataset(self) -> data.Dataset:
        """The run's data, checked again; EdgeKDError if it is no longer what it was."""
        dataset = data.open_dataset(
            Path(self.record.data), seed=self.record.seed, split=self.record.split,
            allow_leakage=self.record.allow_leakage, track=self.track,
        )  # fmt: skip
        if dataset.fingerprint != self.student().data_fingerprint:
            raise EdgeKDError(
                f"{self.record.data} has changed since {self.folder}/student was trained on it: "
                "restore it, or distil again with another --run"
            )
        return dataset

    def student_onnx(self, dataset: data.Dataset, tolerance: float = 1e-3) -> Artifact:
        """The student's ONNX waist."""
        return folders.onnx_of(
            self.student(), self.folder / "onnx", dataset, self.track,
            tolerance=tolerance, rivals=self.rivals(dataset), layer=self.record.layer,
        )  # fmt: skip

    def layer(self, dataset: data.Dataset) -> str:
        """The stage that the student's ONNX explains; empty in an earlier edgekd's runs of none."""
        return self.student_onnx(dataset).layer.partition(" ")[0] if self.record.layer else ""

    def rivals(self, dataset: data.Dataset, source: Artifact | None = None) -> list[Artifact]:
        """What a file is compared with image by image: the teacher, and an FP32 source."""
        found = [source] if source is not None else []
        if not self.record.teacher:
            return found
        teacher: Artifact | None = Artifact.load(Path(self.record.teacher))
        if teacher and teacher.evaluation is None:  # an earlier edgekd taught it: ask it now
            teacher = self.teacher_onnx(dataset)
        return [teacher, *found] if teacher else found

    def teacher_onnx(self, dataset: data.Dataset) -> Artifact | None:
        """The teacher's ONNX waist, kept beside the teacher; None in a run without one."""
        if not self.record.teacher:
            return None
        teacher = Artifact.load(Path(self.record.teacher))
        # a stage that was named is the student's; its teacher may not have as many
        layer = self.record.layer if self.record.layer in ("auto", "head") else ""
        folder = teacher.folder / ("teacher-onnx" + (f"-{layer}" if layer else ""))
        with locked(folder):  # other runs have the same teacher
            return folders.onnx_of(teacher, folder, dataset, self.track, layer=layer)

    def candidates(self, dataset: data.Dataset) -> list[Artifact]:
        """Teacher, student and INT8 as files that a runtime loads: what is compared."""
        self.student_onnx(dataset)
        teacher = self.teacher_onnx(dataset)
        return [*([teacher] if teacher else []), *folders.exports(self.folder)]
