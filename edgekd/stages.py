"""What is done with a run's student, one function a command: find the inputs, call the stage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import data, imaging, runs
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Fidelity,
    GateMissed,
    Spec,
    Timing,
    Track,
    make_folder,
    unknown,
    write_atomic,
)

if TYPE_CHECKING:
    from edgekd import report as page_module
    from edgekd.fidelity import Maps

MAPS = "maps.npz"  # name of a comparison -> (N, g, g) float32


@dataclass(frozen=True)
class Place:
    """A run that was begun before: where it is and what its stages share."""

    root: Path
    folder: Path
    run: runs.Run
    chosen: str  # how the run was chosen, to be said
    track: Track

    @classmethod
    def find(cls, root: Path, run: Path | None, profile: str | None, track: Track) -> Place:
        """The run in `run`, of `profile`, or the latest."""
        return cls(root, *runs.find(root, run, profile), track)

    def student(self) -> Artifact:
        """The run's finished student."""
        return Artifact.load(self.folder / "student")

    def dataset(self) -> data.Dataset:
        """The run's data, checked again; EdgeKDError if it is no longer what it was."""
        dataset = data.open_dataset(
            Path(self.run.data), seed=self.run.seed, split=self.run.split,
            allow_leakage=self.run.allow_leakage, track=self.track,
        )  # fmt: skip
        if dataset.fingerprint != self.student().data_fingerprint:
            raise EdgeKDError(
                f"{self.run.data} has changed since {self.folder}/student was trained on it: "
                "restore it, or distil again with another --run"
            )
        return dataset

    def student_onnx(self, dataset: data.Dataset, tolerance: float = 1e-3) -> Artifact:
        """The student's ONNX waist."""
        return runs.onnx_of(
            self.student(), self.folder / "onnx", dataset, self.track,
            tolerance=tolerance, rivals=self.rivals(dataset),
        )  # fmt: skip

    def rivals(self, dataset: data.Dataset, source: Artifact | None = None) -> list[Artifact]:
        """What a file is compared with image by image: the teacher, and an FP32 source."""
        found = [source] if source is not None else []
        if not self.run.teacher:
            return found
        teacher: Artifact | None = Artifact.load(Path(self.run.teacher))
        if teacher and teacher.evaluation is None:  # an earlier edgekd taught it: ask it now
            teacher = self.teacher_onnx(dataset)
        return [teacher, *found] if teacher else found

    def teacher_onnx(self, dataset: data.Dataset) -> Artifact | None:
        """The teacher's ONNX waist, kept beside the teacher; None in a run without one."""
        if not self.run.teacher:
            return None
        teacher = Artifact.load(Path(self.run.teacher))
        return runs.onnx_of(teacher, teacher.folder / "teacher-onnx", dataset, self.track)

    def candidates(self, dataset: data.Dataset) -> list[Artifact]:
        """Teacher, student and INT8 as files that a runtime loads: what is compared."""
        self.student_onnx(dataset)
        teacher = self.teacher_onnx(dataset)
        return [*([teacher] if teacher else []), *runs.exports(self.folder)]


def bench(place: Place, *, runtime: str | None, seconds: float) -> list[Timing]:
    """Every candidate timed in one runtime, interleaved, each in its own process."""
    from edgekd import bench as stopwatch
    from edgekd import runtimes

    dataset = place.dataset()
    candidates = place.candidates(dataset)
    profile, on_device = runs.host(place.run.profile, candidates[-1])
    if runtime is not None:
        module = runtimes.get(runtime)
        device = next(d for d in module.devices() if d.lower() == "cpu")
        profile = place.run.profile.model_copy(update={"runtime": runtime, "device": device})
        on_device = profile == place.run.profile
        candidates = [c for c in candidates if c.path.suffix in module.SUFFIXES]
        if not candidates:
            raise EdgeKDError(f"runtime {runtime} loads none of the files in {place.folder}")
    return stopwatch.bench(
        candidates, profile, place.folder / "bench",
        seconds=seconds, on_device=on_device, track=place.track,
    )  # fmt: skip


def check_budget(timings: list[Timing]) -> None:
    """GateMissed if the last (most compressed) candidate is over the profile's budget."""
    last = timings[-1]
    if last.over_budget and last.on_device:
        over = ", ".join(f"{k} {m:.1f} of {b:g}" for k, (m, b) in last.over_budget.items())
        raise GateMissed(f"{last.model} {last.precision} is over budget: {over}")


def explain(place: Place, *, images: int, variant: str) -> Fidelity:
    """Score-CAM of teacher, student and deployed file; written to `<run>/explain/`."""
    from edgekd import explain as cam
    from edgekd import fidelity, runtimes
    from edgekd.bench import machine
    from edgekd.records import versions

    if variant not in cam.VARIANTS:
        raise EdgeKDError(unknown("variant", variant, cam.VARIANTS))
    dataset = place.dataset()
    candidates = place.candidates(dataset)
    spec = candidates[0].spec
    samples = _spread(dataset.splits["test"], images)
    out = make_folder(place.folder / "explain")
    (out / Fidelity.FILE).unlink(missing_ok=True)
    labels: np.ndarray | None = None
    found: dict[str, Maps] = {}
    profiles = [runs.host(place.run.profile, c)[0] for c in candidates]
    for candidate, profile in zip(candidates, profiles, strict=True):
        session = runtimes.open_session(candidate, profile)
        own = candidate.spec  # a student may see smaller pictures than its teacher
        prepared = imaging.normalise(data.load_pixels(samples, own), own)
        if labels is None:  # every model is asked to explain the reference's answer
            labels = session(prepared).logits.argmax(1)
        name = f"{candidate.role} {candidate.precision}"
        found[name] = fidelity.explain_set(
            session, prepared, labels, variant=variant, track=place.track
        )
    assert labels is not None
    reference = next(iter(found.values()))
    cases = fidelity.Cases(
        images=[s.digest[:12] for s in samples],  # never a file name: it may hold a patient's id
        labels=[spec.classes[s.label] for s in samples],
        explained=[spec.classes[k] for k in labels],
        groups=[s.group for s in samples],
        masks=_masks(samples, spec),
    )
    comparisons = [
        fidelity.compare(name, c, p.runtime, cases, reference, maps, seed=place.run.seed)
        for (name, maps), c, p in zip(found.items(), candidates, profiles, strict=True)
    ]
    with io.BytesIO() as buffer:
        arrays: dict[str, Any] = {name: maps.maps for name, maps in found.items()}
        np.savez_compressed(buffer, **arrays)
        write_atomic(out / MAPS, buffer.getvalue())
    return Fidelity(
        reference=candidates[0].model,
        reference_sha256=candidates[0].sha256,
        variant=variant,
        grid=fidelity.GRID,
        data_fingerprint=dataset.fingerprint,
        split="test",
        comparisons=tuple(comparisons),
        mask_share=_mask_share(cases.masks),
        machine=machine(),
        versions=versions("numpy", "openvino", "onnxruntime"),
        seed=place.run.seed,
    ).save(out)


def _spread(samples: Sequence[data.Sample], count: int) -> list[data.Sample]:
    """`count` samples, as many of each class as can be had, evenly spread over each class."""
    by_class: dict[int, list[data.Sample]] = {}
    for s in samples:
        by_class.setdefault(s.label, []).append(s)
    each = -(-count // len(by_class))
    chosen = []
    for label in sorted(by_class):
        places = np.linspace(0, len(by_class[label]) - 1, min(each, len(by_class[label])))
        chosen += [by_class[label][int(i)] for i in places]
    return chosen


def _masks(samples: Sequence[data.Sample], spec: Spec) -> np.ndarray | None:
    """(N, H, W) bool, all False where an image has no mask; None where none has one."""
    if not any(s.mask for s in samples):
        return None
    blank = np.zeros(spec.size, bool)
    return np.stack([blank if s.mask is None else imaging.mask(s.mask, spec) for s in samples])


def _mask_share(masks: np.ndarray | None) -> float | None:
    """Mean area of the masks that are not empty, as a share of the image."""
    if masks is None or not masks.any():
        return None
    return float(masks[masks.any((1, 2))].mean())


def report(place: Place, *, cases: int, pictures: bool = True) -> Path:
    """The run's page, `<run>/report.html`, of what is finished: models, timings, explanations.

    Beside it report.json and cases.csv. pictures: False leaves every pixel out.
    """
    from edgekd import report as page

    dataset = place.dataset()
    candidates = place.candidates(dataset)
    rows = []
    for c in candidates:
        folder = place.folder / "bench" / c.folder.name
        timing = Timing.load(folder) if (folder / Timing.FILE).exists() else None
        if timing and timing.artifact_sha256 != c.sha256:
            timing = None  # of an earlier file
        rows.append(page.Row(f"{c.role} {c.precision}", c, timing))
    explained = (place.folder / "explain" / Fidelity.FILE).exists()
    fidelity = Fidelity.load(place.folder / "explain") if explained else None
    if fidelity and {c.artifact_sha256 for c in fidelity.comparisons} != {
        c.sha256 for c in candidates
    }:
        raise EdgeKDError(f"{place.folder}/explain is of earlier files: run edgekd explain again")
    panels = _panels(place, dataset, fidelity, cases) if fidelity else []
    return page.write(
        place.folder,
        title=f"EdgeKD: {place.folder.name}",
        rows=rows,
        fidelity=fidelity,
        panels=panels,
        profile=place.run.profile,
        notes=list(dataset.notes),
        command=f"edgekd report --run {place.folder}" + ("" if pictures else " --no-images"),
        pictures=pictures,
    )


def _panels(
    place: Place, dataset: data.Dataset, fidelity: Fidelity, count: int
) -> list[page_module.Panel]:
    """The `count` images on which a file agrees least with its origin, and the worst of each class.

    With pixels and maps.
    """
    from edgekd import explain as cam
    from edgekd import report as page

    spec = place.run.spec
    samples = {s.digest[:12]: s for s in dataset.splits["test"]}
    with np.load(place.folder / "explain" / MAPS, allow_pickle=False) as stored:
        maps = {c.name: stored[c.name] for c in fidelity.comparisons}

    def lowest(i: int) -> float:
        r = [c.images[i].figures["pearson"] for c in fidelity.comparisons[1:]]
        return min((-2.0 if x is None else x for x in r), default=0.0)

    images = fidelity.comparisons[0].images
    order = sorted(range(len(images)), key=lambda i: (lowest(i), images[i].image))
    seen = {images[i].label for i in order[:count]}
    chosen = order[:count]
    for i in order[count:]:
        if images[i].label not in seen:
            chosen.append(i)
            seen.add(images[i].label)
    panels = []
    for i in chosen:
        own = {c.name: c.images[i] for c in fidelity.comparisons}
        case = fidelity.comparisons[0].images[i]
        sample = samples[case.image]
        heats = {
            name: None if np.isnan(m[i]).any() else cam.unit(cam.resize(m[i], spec.size))
            for name, m in maps.items()
        }
        panels.append(
            page.Panel(
                image=case.image,
                label=case.label,
                pixels=data.pixels(sample, spec),
                mask=imaging.mask(sample.mask, spec) if sample.mask else None,
                maps=heats,
                answers={n: (case.answer, case.probability) for n, case in own.items()},
                agreement={n: case.figures["pearson"] for n, case in own.items()},
            )
        )
    return panels
