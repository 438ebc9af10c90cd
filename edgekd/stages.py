"""What is done with a run's student, one function a command: find the inputs, call the stage."""

from __future__ import annotations

import tempfile
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
    Profile,
    Timing,
    Track,
)

if TYPE_CHECKING:
    from edgekd import gallery as gallery_module
    from edgekd import strips as strips_module
    from edgekd.against import Against
    from edgekd.bench import How
    from edgekd.bundle import Manifest


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
            tolerance=tolerance, rivals=self.rivals(dataset), layer=self.run.layer,
        )  # fmt: skip

    def layer(self, dataset: data.Dataset) -> str:
        """The stage that the student's ONNX explains; empty where the run leaves it to the rule."""
        return self.student_onnx(dataset).layer.partition(" ")[0] if self.run.layer else ""

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
        # a stage that was named is the student's; its teacher may not have as many
        layer = self.run.layer if self.run.layer in ("auto", "head") else ""
        folder = teacher.folder / ("teacher-onnx" + (f"-{layer}" if layer else ""))
        return runs.onnx_of(teacher, folder, dataset, self.track, layer=layer)

    def candidates(self, dataset: data.Dataset) -> list[Artifact]:
        """Teacher, student and INT8 as files that a runtime loads: what is compared."""
        self.student_onnx(dataset)
        teacher = self.teacher_onnx(dataset)
        return [*([teacher] if teacher else []), *runs.exports(self.folder)]


def bench(
    place: Place,
    how: How,
    *,
    runtime: str | None,
    host: str | None = None,
    host_python: str = "python3",
) -> list[Timing]:
    """Every candidate timed in one runtime, interleaved, each in its own process.

    host: the profile's device, where ssh reaches it; runtime: on this CPU, so not with a host.
    """
    from edgekd import bench as stopwatch

    if host is not None and runtime is not None:
        raise EdgeKDError("--runtime measures on this CPU, --host on a device: leave one out")
    if host is not None:
        from edgekd import remote

        return remote.bench(
            host, place.candidates(place.dataset()), place.run.profile, place.folder / "bench",
            how, python=host_python, track=place.track,
        )  # fmt: skip
    candidates, profile, on_device = _measurable(place, runtime)
    return stopwatch.bench(
        candidates, profile, place.folder / "bench", how, on_device=on_device, track=place.track
    )


def bench_page(place: Place, timings: list[Timing], given: str) -> Path:
    """`<run>/bench/bench.html` of the timings, with bench.md and bench.csv beside it.

    given: the options of the command that took them, but for the run's.
    """
    from edgekd import bench_page as page

    return page.write(
        place.folder / "bench", timings, title=f"EdgeKD bench: {place.folder.name}",
        command=" ".join(x for x in ("edgekd bench", given, f"--run {place.folder}") if x),
    )  # fmt: skip


def _measurable(place: Place, runtime: str | None) -> tuple[list[Artifact], Profile, bool]:
    """(the files, the profile to run them with, whether this is its device)."""
    from edgekd import runtimes

    candidates = place.candidates(place.dataset())
    if runtime is None:
        return candidates, *runs.host(place.run.profile, candidates[-1])
    module = runtimes.get(runtime)
    profile = on_cpu(place.run.profile, runtime)
    held = [c for c in candidates if c.path.suffix in module.SUFFIXES]
    if not held:
        raise EdgeKDError(f"runtime {runtime} loads none of the files in {place.folder}")
    return held, profile, profile == place.run.profile


def on_cpu(profile: Profile, runtime: str) -> Profile:
    """The profile, in `runtime` on this CPU."""
    from edgekd import runtimes

    devices = runtimes.get(runtime).devices()
    cpu = next((d for d in devices if d.lower() == "cpu"), None)
    if cpu is None:
        raise EdgeKDError(f"runtime {runtime} runs on no CPU, only on {', '.join(devices)}")
    return profile.model_copy(update={"runtime": runtime, "device": cpu})


def bench_against(
    place: Place,
    how: How,
    other: str,
    *,
    runtime: str | None,
    rounds: int,
    tolerance: float | None,
) -> Against:
    """The run's last file beside `other`: a runtime, a folder of an artifact, or a timing.json.

    Written to `<run>/bench/against.json`.
    """
    from edgekd import against, runtimes
    from edgekd.bench import Runner

    candidates, profile, on_device = _measurable(place, runtime)
    own = Runner(candidates[-1], profile, on_device)
    given: dict[str, Any] = {"rounds": rounds, "tolerance": tolerance, "track": place.track}
    path = Path(other)
    if other in runtimes.names():
        module, named = runtimes.get(other), on_cpu(place.run.profile, other)
        meant = named == place.run.profile
        files = [c for c in candidates[::-1] if c.path.suffix in module.SUFFIXES
                 and c.role == own.artifact.role]  # fmt: skip
        if not files:
            raise EdgeKDError(f"runtime {other} loads no file of the student in {place.folder}")
        found = against.other_file(own, Runner(files[0], named, meant), how, **given)
    elif (path / Artifact.FILE).is_file():
        beside = Artifact.load(path)
        used, meant = runs.host(profile, beside)
        found = against.other_file(own, Runner(beside, used, on_device and meant), how, **given)
    elif path.name == Timing.FILE or (path / Timing.FILE).is_file():
        folder = path.parent if path.name == Timing.FILE else path
        found = against.record(own, Timing.load(folder), how, **given)
    else:
        raise EdgeKDError(
            f"--against {other}: no runtime ({', '.join(runtimes.names())}), no folder with "
            f"{Artifact.FILE}, no {Timing.FILE}"
        )
    return found.save(place.folder / "bench")


def check_budget(timings: list[Timing]) -> None:
    """GateMissed if the last (most compressed) candidate is over the profile's budget."""
    last = timings[-1]
    if last.over_budget and last.on_device:
        over = ", ".join(f"{k} {m:.1f} of {b:g}" for k, (m, b) in last.over_budget.items())
        raise GateMissed(f"{last.model} {last.precision} is over budget: {over}")


def unsteady(timings: list[Timing]) -> str:
    """Whose blocks did not agree, so that their figures decide nothing; empty if all did."""
    found = [t for t in timings if not t.stable]
    if not found:
        return ""
    names = ", ".join(f"{t.role} {t.precision}" for t in found)
    return f"not steady after {found[0].attempts} attempts: {names}; leave the machine alone"


def noisy(timings: list[Timing], *, strict: bool) -> str:
    """Why a `strict` user refuses these figures; empty if there is no noise."""
    noise = [line for t in timings for line in t.noise]
    return f"refused (--strict): {noise[0]}" if strict and noise else ""


def bundle(
    place: Place,
    out: Path | None,
    *,
    key: Path | None,
    intended_use: str,
    abstain_below: float,
    despite: str,
) -> tuple[Path, Manifest]:
    """The run's last file with its evidence, as one file; by default in the run's folder.

    abstain_below: calibrated probability under which a device gives no answer. despite: why, if its
    explanations did not pass. EdgeKDError if it was not measured or explained.
    """
    from edgekd import bundle as bundles

    dataset = place.dataset()
    candidates = place.candidates(dataset)
    last = candidates[-1]
    for folder, kind, command in (
        (place.folder / "bench" / last.folder.name, Timing, "bench"),
        (place.folder / "explain", Fidelity, "explain"),
    ):
        if not (folder / kind.FILE).is_file():
            raise EdgeKDError(f"{last.folder} has no evidence yet: run edgekd {command} first")
    timing = Timing.load(place.folder / "bench" / last.folder.name)
    fidelity = Fidelity.load(place.folder / "explain")
    if timing.artifact_sha256 != last.sha256:
        raise EdgeKDError(f"{last.folder} was measured before it changed: run edgekd bench again")
    if last.sha256 not in {c.artifact_sha256 for c in fidelity.comparisons}:
        raise EdgeKDError(f"{last.folder} was explained before it changed: edgekd explain again")
    if fidelity.verdict != "pass" and not despite:
        raise GateMissed(
            f"the verdict of its explanations is {(fidelity.verdict or 'absent').upper()}: "
            "--despite REASON bundles it all the same, and the reason stands in the bundle"
        )
    source = _source(place.folder, last)
    path = out or place.folder / f"{place.folder.name}{bundles.SUFFIX}"
    with tempfile.TemporaryDirectory() as empty:
        page = _page(
            place, dataset, candidates, cases=1, pictures=False, out=Path(empty),
            intended_use=intended_use,
        ).read_bytes()  # fmt: skip
    # The device's profile stands in the bundle, also where its runtime or device is not here: what
    # must be built there, and how fast it has to be, is the device's to say.
    here, _ = runs.host(place.run.profile, last)
    usual = runs.usual(last, here, dataset, place.track)
    given = bundles.Given(
        last, place.run.profile, source, timing, fidelity, page, usual=usual, here=here
    )
    made = bundles.make(
        path, given, intended_use=intended_use, abstain_below=abstain_below, despite=despite,
        key=key,
    )  # fmt: skip
    return path, made


def _source(folder: Path, made: Artifact) -> Artifact | None:
    """The run's ONNX that `made` says the same as, in its precision; None: it is, or has none."""
    from edgekd import bundle as bundles

    if made.path.suffix == ".onnx":
        return None
    for name in ("onnx", made.precision):
        if (folder / name / Artifact.FILE).is_file():
            source = Artifact.load(folder / name)
            if source.sha256 in made.parents.values() and bundles.rebuilds(source, made):
                return source
    return None  # NNCF's INT8, or FP16: no ONNX of the run has those weights


def report(place: Place, *, cases: int, pictures: bool = True) -> Path:
    """The run's page, `<run>/report.html`, of what is finished: models, timings, explanations.

    Beside it report.json and cases.csv. pictures: False leaves every pixel out.
    """
    dataset = place.dataset()
    return _page(place, dataset, place.candidates(dataset), cases=cases, pictures=pictures)


def _page(
    place: Place,
    dataset: data.Dataset,
    candidates: list[Artifact],
    *,
    cases: int,
    pictures: bool,
    out: Path | None = None,
    intended_use: str = "",
) -> Path:
    """As `report`; out: another folder than the run's."""
    from edgekd import report as page

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
    told = fidelity.comparisons if fidelity else ()
    remarks = [f"{c.name}: {c.remark}" for c in told if c.remark]
    panels, swayed = _gallery(place, dataset, fidelity, cases) if fidelity else ([], [])
    return page.write(
        out or place.folder,
        title=f"EdgeKD: {place.folder.name}",
        rows=rows,
        fidelity=fidelity,
        panels=panels,
        swayed=swayed,
        profile=place.run.profile,
        notes=[*dataset.notes, *remarks],
        command="edgekd report"
        + (f" --run {place.folder}" if out is None else "")
        + ("" if pictures else " --no-images"),
        pictures=pictures,
        strips=_strips(place, dataset) if fidelity and pictures else [],
        intended_use=intended_use,
    )


def _gallery(
    place: Place, dataset: data.Dataset, fidelity: Fidelity, count: int
) -> tuple[list[gallery_module.Panel], list[gallery_module.Pair]]:
    """What the report shows of single images."""
    from edgekd import gallery
    from edgekd.evidence import MAPS

    with np.load(place.folder / "explain" / MAPS, allow_pickle=False) as stored:
        maps = {c.name: stored[c.name] for c in fidelity.comparisons}
    samples = {s.digest[:12]: s for s in dataset.splits["test"]}
    spec, shown = place.run.spec, fidelity.comparisons
    panels = []
    for i, why in gallery.chosen(shown, count):
        sample = samples[shown[0].images[i].image]
        mask = imaging.mask(sample.mask, spec) if sample.mask else None
        panels.append(gallery.panel(i, why, shown, maps, data.pixels(sample, spec), mask))
    pairs = []
    for told in fidelity.swayed:
        sample = samples[told.image]
        pairs.append(gallery.pair(told, spec.classes[sample.label], data.pixels(sample, spec)))
    return panels, pairs


def _strips(place: Place, dataset: data.Dataset) -> list[strips_module.Strip]:
    """What was explained layer by layer; nothing if that was not asked for."""
    from edgekd import strips
    from edgekd.evidence import LAYERS

    path = place.folder / "explain" / LAYERS
    if not path.is_file():
        return []
    shown = strips.images_of(path)
    samples = [s for s in dataset.splits["test"] if s.digest[:12] in shown]
    spec = place.run.spec
    return strips.read(path, {s.digest[:12]: data.pixels(s, spec) for s in samples})
