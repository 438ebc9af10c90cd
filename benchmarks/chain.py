"""Does the whole chain pass for honest students, and does no planted one?

    python benchmarks/chain.py [--quick] [--runs DIR] [--only NAME ...]

Honest: six students made with default settings, one of the lite space from ImageNet weights and one
of OFA's MobileNetV3 space from scratch, on synthetic chests, children's chest films and MRI slices
at 96 pixels, from an EfficientNet-Lite0 from ImageNet, `edgekd quantize` and `edgekd explain` after
them: teacher -> student -> deployed file. Planted: students whose answers or whose reasons are not
the recorded teacher's (taught without it, by another one, by its answers to other images, through
other images' masks), a student taught a marker, and students whose class comes with a border, an
exposure or a sharpness of its own, or whose teacher never saw the lungs. None of these may pass the
step of distillation. Guided: a student of a teacher that was taught from the lungs alone (`--set
guided=1`), which is what a verdict advises where a model looks elsewhere; it counts as neither. A
quarter of an hour a student on 2 cores; interrupted, it goes on where it stopped; rows that are not
asked for stay in the result. --quick (one honest and one planted student of one epoch, 8 images)
keeps nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFilter
from workbench import (
    RUNS,
    STUDENTS,
    arguments,
    data_folder,
    keep,
    lite0_weights,
    phantoms_marked,
    result_of,
)

import edgekd
from edgekd import data
from edgekd.data import phantom
from edgekd.explain.occlusion import hide, soft
from edgekd.pipeline.folders import RunRecord
from edgekd.records import Artifact, Fidelity
from edgekd.train.soft_targets import Said, Targets

SIZE = 96
LITE0 = "tf_efficientnet_lite0"
HONEST = tuple(f"{s} {n}" for s in ("phantoms", "cxr_pneumonia", "brain_tumor_mri")
               for n in STUDENTS)  # fmt: skip
AGAINST_A_TEACHER = (
    "no teacher",
    "another teacher",
    "other images' answers",
    "other images' masks",
)
SOURCES = ("border", "exposure", "sharpness")
PLANTED = (
    *(f"{s}: {kind}" for s in ("phantoms", "cxr_pneumonia") for kind in AGAINST_A_TEACHER),
    "phantoms: marker",
    *(f"cxr_pneumonia: {kind}" for kind in (*SOURCES, "teacher without lungs")),
)
GUIDED = "cxr_pneumonia lite, guided teacher"


class Bench(NamedTuple):
    """Where runs go and how long they take."""

    root: Path
    quick: bool

    def data_of(self, name: str) -> Path:
        """The folder of a set."""
        if name == "phantoms":
            each = 24 if self.quick else 360
            return phantom.make(self.root / "phantoms", per_class=each, size=SIZE)
        return data_folder(None, name)

    def train(self, *settings: str) -> edgekd.TrainOptions:
        """Default settings, and others named."""
        return edgekd.TrainOptions(epochs=1 if self.quick else None, settings=settings)

    def teacher(self, place: Path, *settings: str, seed: int = 0) -> Artifact:
        """An EfficientNet-Lite0 from ImageNet, taught on `place`."""
        return edgekd.teach(
            LITE0, data=edgekd.DataOptions(data=place, size=SIZE, seed=seed),
            train=self.train(*settings), weights=Path(lite0_weights()),
            output=edgekd.OutputOptions(runs=self.root),
        )  # fmt: skip

    def student(self, place: Path, net: str, folder: Path, teacher: Artifact | None) -> edgekd.Run:
        """A student in the run `folder`, distilled with default settings."""
        start = {"start": LITE0, "start_weights": Path(lite0_weights())} if net == "lite" else {}
        named = () if teacher is None else (str(teacher.folder),)
        return edgekd.distill(
            "cpu",
            data=edgekd.DataOptions(data=place, size=SIZE),
            teacher=edgekd.TeacherOptions(teacher=named, no_teacher=teacher is None),
            student=edgekd.StudentOptions(student=STUDENTS[net]),
            supernet=edgekd.SupernetOptions.model_validate(start),
            train=self.train(),
            output=edgekd.RunOptions(runs=self.root, run=folder),
        )  # fmt: skip

    def explained(self, run: edgekd.Run) -> Fidelity:
        """The verdict of a run, made now unless it is there."""
        return run.explain(images=8 if self.quick else None)


def honest(b: Bench, name: str) -> dict[str, Any]:
    """One student of default settings, its chain judged; of a guided teacher if it is `GUIDED`."""
    place, net = name.partition(",")[0].split()
    folder = b.data_of(place)
    teacher = b.teacher(folder, *(["guided=1"] if name == GUIDED else []))
    out = b.root / name.replace(",", "").replace(" ", "-")
    if (out / RunRecord.FILE).exists():
        of_record(edgekd.Run.open(out), teacher, folder)  # by the margins of now
    run = b.student(folder, net, out, teacher)
    if len(run.candidates(run.dataset())) < 3:  # teacher, student, and the file that was chosen
        run.quantize(seconds=0.5 if b.quick else 3, max_drop=100 if b.quick else 1)
    return row(b.explained(run), run) | {"name": name, "honest": None if name == GUIDED else True}


def planted(b: Bench, name: str) -> dict[str, Any]:
    """One student that must not pass, held against the teacher on record."""
    place, kind = name.split(": ")
    folder, out = b.data_of(place), b.root / name.replace(": ", "-").replace(" ", "-")
    if kind in SOURCES:
        folder = sourced(folder, b.root / f"{place}-{kind}", kind)
    teacher = b.teacher(folder)
    if not (out / "student" / Artifact.FILE).exists():
        if kind == "marker":
            each = 24 if b.quick else 360
            taught = phantoms_marked(b.root / "phantoms-marked", each, SIZE)
            b.student(taught, "lite", out, None)
        elif kind == "no teacher":
            b.student(folder, "lite", out, None)
        elif kind == "another teacher":
            b.student(folder, "lite", out, b.teacher(folder, seed=1))
        elif kind == "teacher without lungs":
            blind = b.teacher(without_lungs(folder, b.root / "no-lungs"))
            b.student(folder, "lite", out, blind)
        elif kind in AGAINST_A_TEACHER:
            with misled(kind, folder):
                b.student(folder, "lite", out, teacher)
        else:
            b.student(folder, "lite", out, teacher)
    if kind != "teacher without lungs":
        of_record(edgekd.Run.open(out), teacher, folder)
    run = edgekd.Run.open(out)
    return row(b.explained(run), run) | {"name": name, "honest": False}


def of_record(run: edgekd.Run, teacher: Artifact, place: Path) -> None:
    """Let the run say that its student was distilled from `teacher` on `place`."""
    if not (run.folder / "student" / Artifact.FILE).exists():
        return
    said = {"teacher": str(teacher.folder.resolve()), "data": str(place.resolve()),
            "profile": edgekd.Profile.read("cpu")}  # fmt: skip
    run.record.model_copy(update=said).save(run.folder)
    student = run.student()
    fingerprint = data.open_dataset(place).fingerprint
    if student.data_fingerprint != fingerprint:  # its answers were to the films it was taught
        student.model_copy(update={"data_fingerprint": fingerprint, "evaluation": None}).save(
            student.folder
        )


@contextlib.contextmanager
def misled(kind: str, place: Path) -> Iterator[None]:
    """While a student is trained: the teacher's answers, or its masks, are of other images.

    Answers are of another image of the same class, so that they are as right as before.
    """
    labels = np.array([s.label for s in data.open_dataset(place).splits["train"]])
    rng, partner = np.random.default_rng(0), np.arange(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        mixed = rng.permutation(own)
        partner[mixed] = np.roll(mixed, 1)
    of, masked = Targets.of, Targets.masked

    def others_answers(self: Targets, view: int, chosen: np.ndarray, images: torch.Tensor) -> Said:
        return of(self, view, partner[chosen], images)

    def others_masked(
        self: Targets, view: int, chosen: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outlines, logits = masked(self, view, chosen)
        if kind == "other images' masks":
            return outlines.roll(1, 0), logits
        return outlines, logits.roll(1, 0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Targets, "masked", others_masked))
        if kind == "other images' answers":
            stack.enter_context(mock.patch.object(Targets, "of", others_answers))
        yield


def copied(place: Path, out: Path, change: Callable[[Path, Image.Image], Image.Image]) -> Path:
    """A copy of a set in `out` whose images are changed."""
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(place, out)
        for path in sorted(p for split in ("train", "val", "test")
                           for p in (out / split).rglob("*.[jp][pn]g")):  # fmt: skip
            with Image.open(path) as image:
                new = change(path.relative_to(out), image.convert("L"))
            new.save(path, quality=95)
        (out / "done").touch()
    return out


def sourced(place: Path, out: Path, kind: str) -> Path:
    """A set whose pneumonias are each from a hospital of their own, and so are healthy films."""
    grade = {"normal": 0, "viral_pneumonia": 1, "bacterial_pneumonia": 2}

    def change(path: Path, image: Image.Image) -> Image.Image:
        k, side = grade[path.parts[1]], min(image.size)
        if kind == "sharpness":
            return image.filter(ImageFilter.GaussianBlur(k * side / 60))
        pixels = np.asarray(image, np.float32)
        if kind == "exposure":
            return Image.fromarray(np.uint8(255 * (pixels / 255) ** (0.6, 1.0, 1.6)[k]))
        width = max(1, round(side * 0.04 * k))
        if k:
            frame = np.full_like(pixels, 255 if k == 2 else 0)
            frame[width:-width, width:-width] = pixels[width:-width, width:-width]
            pixels = frame
        return Image.fromarray(np.uint8(pixels))

    return copied(place, out, change)


def without_lungs(place: Path, out: Path) -> Path:
    """A set whose films to learn from show everything but the lungs."""

    def change(path: Path, image: Image.Image) -> Image.Image:
        outline = place / "masks" / path.with_suffix(".png")
        if path.parts[0] == "test" or not outline.exists():
            return image
        with Image.open(outline) as mask:
            inside = np.asarray(mask.convert("L").resize(image.size)) > 0
        pixels = np.asarray(image, np.float32)[None].repeat(3, 0)
        return Image.fromarray(np.uint8(hide(pixels, soft(inside))[0].clip(0, 255)))

    return copied(place, out, change)


def row(found: Fidelity, run: edgekd.Run) -> dict[str, Any]:
    """A student's verdict, step by step, and the figures that its gates ask for."""
    steps = [(c, c.verdict) for c in found.comparisons if c.verdict]
    student, step = next((c, v) for c, v in steps if v.step == "distillation")
    gates = {
        f"{c.name}: {g.name}": [g.state, round(g.value, 4), round(g.low, 4), round(g.high, 4),
                                g.margin]
        for c, v in steps for g in v.gates
    }  # fmt: skip
    return {
        "verdict": found.verdict,
        "distillation": step.state,
        "files": {c.name: v.state for c, v in steps},
        "missed": [k for k, g in gates.items() if g[0] != "pass"],
        "accuracy": run.student().metrics["test_balanced_accuracy"].value,
        "layer": student.layer,
        "agreement": {k: [a.value, a.low, a.high] for k, a in student.aggregate.items()},
        "elsewhere": {
            c.name: [a.value, a.low, a.high]
            for c in found.comparisons if (a := c.checks.get("elsewhere"))
        },
        "gates": gates,
    }  # fmt: skip


def sum_up(rows: list[dict[str, Any]], quick: bool) -> None:
    for r in rows:
        kind = {True: "honest", False: "planted", None: "guided"}[r["honest"]]
        print(f"{kind:8} {r['name']:40} {r['distillation']:12} "
              f"{r['files']} {r['missed']}")  # fmt: skip
    good, bad = ([r for r in rows if r["honest"] is x] for x in (True, False))
    figures = {
        "chain_passed": sum(r["verdict"] == "pass" for r in good),
        "chain_failed": sum(r["verdict"] in ("fail", "invalid") for r in good),
        "students_passed": sum(r["distillation"] == "pass" for r in good),
        "students": len(good),
        "planted_students_passed": sum(r["distillation"] == "pass" for r in bad),
        "planted_students": len(bad),
    }
    margins = edgekd.Profile.read("cpu").margins.model_dump()
    keep("chain", figures, rows, packages=("torch", "timm", "openvino", "onnxruntime", "nncf"),
         quick=quick, margins=margins)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*HONEST, *PLANTED, GUIDED])
    given = parser.parse_args()
    b = Bench(given.runs or RUNS / ("chain-quick" if given.quick else "chain"), given.quick)
    asked = given.only or ([HONEST[0], PLANTED[0]] if given.quick else [*HONEST, *PLANTED, GUIDED])
    for name in asked:
        made = (planted if name in PLANTED else honest)(b, name)
        old = result_of("chain")  # read again: another process may have written it
        kept = json.loads(old.read_text("utf-8"))["table"] if old.exists() and not b.quick else []
        sum_up([*(r for r in kept if r["name"] != name), made], given.quick)


if __name__ == "__main__":
    main()
