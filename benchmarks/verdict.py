"""Does the verdict refuse what is broken, and let pass what is honest?

    python benchmarks/verdict.py [--quick] [--runs DIR] [--sets NAME ...] [--nets NAME ...]

Two students, one of the lite space (relu6), one of OFA's MobileNetV3 space (h-swish), on synthetic
chests, whose truth is known, on MRI slices and on children's chest films. Each student's FP32 file
is the reference. Honest: the same file, exported again, FP32 in each runtime, bfloat16, weights
alone in INT8, and the fastest INT8 that `edgekd quantize` would let pass. Broken: a random head,
permuted labels, a random network, INT8 calibrated on images of a third of their contrast, the other
student's file in its place, maps of another layer, pictures prepared without normalisation or as
BGR; and a student that was taught a marker, held against its teacher. Each is judged by the cpu
profile's margins on its 100 test images, and on 20 resamples of their patients. Half an hour for
each student of each set on 2 cores, and a quarter for each teacher; interrupted, it goes on where
it stopped; rows of students that are not asked for stay in the result. --quick (one set, one
network of one epoch, 12 images) keeps nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from workbench import (
    FLIP,
    RUNS,
    STUDENTS,
    TEACHER,
    arguments,
    data_folder,
    edgekd,
    keep,
    lite0_weights,
    phantoms_marked,
    result_of,
)

from edgekd import data, export, runtimes
from edgekd.data import phantom
from edgekd.explain import examine
from edgekd.metrics import evaluation
from edgekd.models import zoo
from edgekd.pipeline import explain, folders
from edgekd.pipeline.explain import Link, Question
from edgekd.pipeline.export import CANDIDATES
from edgekd.quantize import ptq as engines
from edgekd.quantize.choice import Choice
from edgekd.records import Artifact, Comparison, EdgeKDError, Margins, Profile, make_folder, sha256
from edgekd.runtimes import openvino as ov_runtime

SETS = ("phantoms", "brain_tumor_mri", "cxr_pneumonia")
NETS = {  # name -> how it is trained
    "lite": ["--student", STUDENTS["lite"], "--start", "tf_efficientnet_lite0",
             "--start-weights", lite0_weights(), "--epochs", 6, "--lr", 0.001],
    "mbv3": ["--student", STUDENTS["mbv3"], "--lr", 0.003],
}  # fmt: skip
FROM_SCRATCH = {"phantoms": 24, "brain_tumor_mri": 24, "cxr_pneumonia": 8}  # epochs of mbv3
REPEATS = 20
CPU = Profile.read("cpu")
ORT = CPU.model_copy(update={"runtime": "onnxruntime"})
TORCH = CPU.model_copy(update={"runtime": "torch", "device": "cpu"})


class Case(NamedTuple):
    """One file, and what its verdict should be."""

    name: str
    honest: bool
    make: Callable[[], tuple[Artifact, Profile]]


class Bench(NamedTuple):
    """One student on one set."""

    folder: Path  # of its run
    other: Path  # of the other student's
    dataset: data.Dataset
    onnx: Artifact
    student: Artifact

    def images(self, split: str, count: int) -> np.ndarray:
        """(n, 3, H, W) float32, prepared."""
        return folders.sample_images(self.dataset, self.onnx.spec, split, count)

    def exported(self, name: str, change: Callable[[Any], None]) -> tuple[Artifact, Profile]:
        """The trained network after `change`, as ONNX."""
        out = self.folder / "cases" / name
        if not (out / Artifact.FILE).exists():
            net = zoo.load(self.student)
            zoo.without_colour(net, self.student.spec)
            change(net)
            export.to_onnx(net.eval(), self.student, self.images("val", 8), out)
        return Artifact.load(out), CPU


def as_it_is(_: Any) -> None:
    pass


def random_head(net: Any) -> None:
    torch.manual_seed(1)
    last = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.weight.data = torch.randn_like(last.weight) * last.weight.std()
    last.bias.data.zero_()


def permuted(net: Any) -> None:
    last = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.weight.data = last.weight.data.roll(1, 0)
    last.bias.data = last.bias.data.roll(1, 0)


def random_network(net: Any) -> None:
    torch.manual_seed(1)
    for m in net.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()


def wrong_layer(net: Any) -> None:
    net.index = max(0, net.index - 1)


def bgr(net: Any) -> None:
    stem = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    stem.weight.data = stem.weight.data.flip(1)


def without_normalisation(b: Bench) -> tuple[Artifact, Profile]:
    """The file is right, but pictures in [0, 1] are handed to it as they are."""
    made, profile = b.exported("plain", as_it_is)
    spec = made.spec.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    out = b.folder / "cases" / "no-normalisation"
    if not (out / Artifact.FILE).exists():
        shutil.copytree(made.folder, out, ignore=shutil.ignore_patterns("maps", "artifact.json"))
        made.model_copy(update={"spec": spec, "evaluation": None}).save(out)
    return Artifact.load(out), profile


def to_openvino(b: Bench, precision: str) -> tuple[Artifact, Profile]:
    out = b.folder / "cases" / f"openvino-{precision}"
    if not (out / Artifact.FILE).exists():
        export.to_runtime(b.onnx, b.images("val", 8), out, "openvino", precision=precision,
                          profile=CPU)  # fmt: skip
    return Artifact.load(out), CPU


def weights_alone(b: Bench) -> tuple[Artifact, Profile]:
    """NNCF's INT8 weights; everything is computed in FP32."""
    import nncf

    out = b.folder / "cases" / "int8-weights"
    if not (out / Artifact.FILE).exists():
        source, _ = to_openvino(b, "fp32")
        model = nncf.compress_weights(ov_runtime.read(source.path),
                                      mode=nncf.CompressWeightsMode.INT8_ASYM)  # fmt: skip
        make_folder(out)
        ov_runtime.ov.save_model(model, out / "model.xml", compress_to_fp16=False)
        files = {f: sha256(out / f) for f in ("model.xml", "model.bin")}
        source.model_copy(update={"files": files, "evaluation": None}).save(out)
    return Artifact.load(out), CPU


def miscalibrated(b: Bench) -> tuple[Artifact, Profile]:
    out = b.folder / "cases" / "int8-miscalibrated"
    if not (out / Artifact.FILE).exists():
        engines.quantize(b.onnx, b.images("train", 64) / 3, out, engine="nncf", runtime="openvino")
    return Artifact.load(out), CPU


def passed_int8(b: Bench) -> tuple[Artifact, Profile]:
    """The fastest INT8 file that `edgekd quantize` did not refuse, repaired or not."""
    choice = Choice.load(b.folder / CANDIDATES)
    held = [c for c in choice.candidates
            if c.precision == "int8" and c.state in ("chosen", "slower", "no faster")
            and c.agreement is not None]  # fmt: skip
    if not held:
        why = "; ".join(f"{c.name}: {c.reason}" for c in choice.candidates if c.precision == "int8")
        raise EdgeKDError(f"quantize let no INT8 file pass: {why}")
    return Artifact.load(b.folder / CANDIDATES / held[0].name), CPU


def cases(b: Bench) -> Iterator[Case]:
    """Everything that is made of one student."""
    yield Case("identical", True, lambda: (b.onnx, CPU))
    yield Case("re-exported", True, lambda: b.exported("plain", as_it_is))
    yield Case("f32 onnxruntime", True, lambda: (b.onnx, ORT))
    yield Case("f32 openvino", True, lambda: to_openvino(b, "fp32"))
    yield Case("f32 torch", True, lambda: (_program(b), TORCH))
    yield Case("bf16", True, lambda: to_openvino(b, "bf16"))
    yield Case("int8 weights", True, lambda: weights_alone(b))
    yield Case("int8 that quantize lets pass", True, lambda: passed_int8(b))
    changes = {"random head": random_head, "permuted labels": permuted, "BGR": bgr,
               "random network": random_network, "wrong layer": wrong_layer}  # fmt: skip
    for name, change in changes.items():
        yield Case(name, False, lambda n=name, c=change: b.exported(n.replace(" ", "-"), c))
    yield Case("no normalisation", False, lambda: without_normalisation(b))
    yield Case("int8 miscalibrated", False, lambda: miscalibrated(b))
    yield Case("other student", False, lambda: (Artifact.load(b.other / "onnx"), CPU))


def _program(b: Bench) -> Artifact:
    """The torch program beside the ONNX file, as a file of its own."""
    out = b.folder / "cases" / "torch"
    if not (out / Artifact.FILE).exists():
        export.to_runtime(b.onnx, b.images("val", 8), out, "torch")
    return Artifact.load(out)


def link(name: str, artifact: Artifact, profile: Profile, b: Bench, ask: Question) -> Link:
    """Judged on both splits and examined, in this very runtime."""
    if artifact.evaluation is None:
        artifact = folders.judged(artifact, profile, b.dataset, b.student)
    session, _ = runtimes.open_streams(artifact, profile)  # as `edgekd explain` asks
    pixels = data.load_pixels(ask.samples, artifact.spec)
    digests = [s.digest for s in ask.samples]
    found = examine.examine(session, artifact, profile, pixels, digests, examine.Asked())
    return Link(name, artifact, profile, found)


def resampled(ask: Question, found: examine.Examined, chosen: np.ndarray) -> Any:
    """(question, found) of these images alone, some more than once."""
    masks = None if ask.masks is None else ask.masks[chosen]
    part = ask._replace(samples=[ask.samples[i] for i in chosen], masks=masks)
    return part, examine.Examined(*(x[chosen] for x in found))


def judged(
    of: Link, links: list[Link], ask: Question, margins: Margins, step: str
) -> list[dict[str, Any]]:
    """A row a link: its verdict on all images, and how many resamples of patients gave each."""
    told = [explain.answered(x.artifact, of.artifact, ask) for x in links]
    accuracy = explain.accuracy_of(of.artifact, ask)

    def verdicts(chosen: np.ndarray) -> list[Comparison]:
        part, reference = resampled(ask, of.found, chosen)
        first = of._replace(found=reference)
        explained = reference.logits.argmax(1)
        base = explain.compared(first, first, explained, part)
        made = []
        for x, t in zip(links, told, strict=True):
            own = explain.compared(x._replace(found=resampled(ask, x.found, chosen)[1]), first,
                                    explained, part)  # fmt: skip
            made.append(explain.judged(own, base, step, t, margins, accuracy))  # type: ignore[arg-type]
        return made

    n = len(ask.samples)
    whole = verdicts(np.arange(n))
    patients = {g: [i for i, s in enumerate(ask.samples) if s.group == g]
                for g in dict.fromkeys(s.group for s in ask.samples)}  # fmt: skip
    rng = np.random.default_rng(0)
    states: list[list[str]] = [[] for _ in links]
    for _ in range(REPEATS):
        drawn = rng.choice(list(patients), len(patients))
        chosen = np.array([i for g in drawn for i in patients[g]])
        for own, c in zip(states, verdicts(chosen), strict=True):
            own.append(c.verdict.state if c.verdict else "")
    return [row(c, own) for c, own in zip(whole, states, strict=True)]


def row(c: Comparison, states: list[str]) -> dict[str, Any]:
    assert c.verdict is not None
    kept = {"kappa", "identification", "lost", "pearson", "energy", "enrichment", "hit"}
    figures = {k: [a.value, a.low, a.high, a.null] for k, a in c.aggregate.items() if k in kept}
    figures |= {k: [a.value, a.low, a.high, a.null] for k, a in c.checks.items()}
    return {
        "case": c.name, "state": c.verdict.state, "decided": [g.name for g in c.verdict.missed],
        "repeats": {s: states.count(s) for s in dict.fromkeys(states)},
        "undecided": sorted({g.name for g in c.verdict.gates if g.state == "inconclusive"}),
        "figures": figures,
        "paired": {k: [a.value, a.low, a.high] for k, a in c.paired.items()},
    }  # fmt: skip


def trained(name: str, net: str, root: Path, quick: bool) -> tuple[Path, Path]:
    """(the run's folder, its data's), distilled and quantised if it is not yet."""
    if name == "phantoms":
        place = phantom.make(root / "phantoms", per_class=24 if quick else 360, size=128)
    else:
        place = data_folder(None, name)
    at = ["--data", place, "--runs", root, "--size", 64 if quick else 128]
    flip = [] if name != "brain_tumor_mri" else FLIP
    epochs = ["--epochs", 1] if quick else []
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), *at, *TEACHER[:4], *flip,
           *epochs)  # fmt: skip
    dataset = data.open_dataset(place)
    (guide,) = folders.shared(root, dataset).glob("teacher-*")
    folder = root / f"{name}-{net}"
    edgekd("distill", "-p", "cpu", *at, "--teacher", guide, *asked(name, net), *epochs, *flip,
           "--run", folder)  # fmt: skip
    edgekd("quantize", "--exhaustive", "--max-drop", 100 if quick else 1, "--runs", root,
           "--run", folder)  # fmt: skip
    return folder, place


def asked(name: str, net: str) -> list[object]:
    """How a student of one set is trained."""
    more = ["--epochs", FROM_SCRATCH[name]] if net == "mbv3" else []
    return [*NETS[net], *more]


def marked(root: Path, net: str, quick: bool) -> Path:
    """A student of the phantoms that was taught an L."""
    place = phantoms_marked(root / "phantoms-marked", 24 if quick else 360, 128)
    folder = root / f"marked-{net}"
    size, less = (64, ["--epochs", 1]) if quick else (128, [])
    edgekd("distill", "-p", "cpu", "--data", place, "--runs", root, "--no-teacher", "--size", size,
           *asked("phantoms", net), *less, "--run", folder)  # fmt: skip
    edgekd("export", "-f", "onnx", "--precision", "fp32", "--runs", root, "--run", folder)
    return folder


def examined(name: str, net: str, root: Path, quick: bool) -> list[dict[str, Any]]:
    """All cases of one student on one set."""
    folder, place = trained(name, net, root, quick)
    other, _ = trained(name, next(n for n in NETS if n != net), root, quick)
    dataset = data.open_dataset(place)
    here = Bench(folder, other, dataset, Artifact.load(folder / "onnx"),
                 Artifact.load(folder / "student"))  # fmt: skip
    margins = CPU.margins
    samples = explain.spread(dataset.splits["test"], 12 if quick else margins.images)
    ask = Question(samples, evaluation.truth(dataset.splits["test"]),
                   data.load_masks(samples, here.onnx.spec), here.onnx.spec, 0)  # fmt: skip
    reference = link("reference", here.onnx, CPU, here, ask)
    found, told, refused = [], [], []
    for case in cases(here):
        try:
            found.append(link(case.name, *case.make(), here, ask))
            told.append(case)
        except EdgeKDError as e:
            print(f"{name} {net} {case.name}: {e}", flush=True)
            if not case.honest:  # an honest file that cannot be had is not counted
                refused.append({"case": case.name, "state": "refused", "decided": [str(e)],
                                "repeats": {}, "figures": {}, "paired": {}, "undecided": [],
                                "honest": False, "step": "quantisation"})  # fmt: skip
    rows = judged(reference, found, ask, margins, "quantisation")
    for r, case in zip(rows, told, strict=True):
        r |= {"honest": case.honest, "step": "quantisation"}
    rows += refused
    guide = Artifact.load(next(folders.shared(root, dataset).glob("teacher-*")))
    whole = folders.onnx_of(guide, guide.folder / "teacher-onnx", dataset)
    first = link("teacher", whole, CPU, here, ask)
    students: list[Link] = [reference._replace(name="student")]
    which: list[bool | None] = [None]
    if name == "phantoms":
        onnx = Artifact.load(marked(root, net, quick) / "onnx")
        here_too = here._replace(student=Artifact.load(root / f"marked-{net}" / "student"))
        fresh = onnx.model_copy(update={"evaluation": None})  # it was judged on images of its own
        students.append(link("taught a marker", fresh, CPU, here_too, ask))
        which.append(False)
    steps = judged(first, students, ask, margins, "distillation")
    for r, honest in zip(steps, which, strict=True):
        r |= {"honest": honest, "step": "distillation"}
    shown = judged(first, [first._replace(name="teacher")], ask, margins, "distillation")[0]
    return [x | {"set": name, "net": net}
            for x in (*rows, *steps, shown | {"honest": None, "step": "none"})]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    given = parser.parse_args()
    root = given.runs or RUNS / ("verdict-quick" if given.quick else "verdict")
    pairs = [(s, n) for s in given.sets for n in given.nets][: 1 if given.quick else None]
    rows = [] if given.quick else [r for r in kept() if (r["set"], r["net"]) not in pairs]
    for s, n in pairs:
        rows += examined(s, n, root, given.quick)
        sum_up(rows, given.quick)


def kept() -> list[dict[str, Any]]:
    """The rows that were kept on this machine before: a student of a set may be examined alone."""
    path = result_of("verdict")
    return json.loads(path.read_text("utf-8"))["table"] if path.exists() else []


def sum_up(rows: list[dict[str, Any]], quick: bool) -> None:
    """Show and keep what there is."""
    for r in rows:
        print(f"{r['set']:16} {r['net']:5} {r['step']:12} {r['case']:28} {r['state']:12} "
              f"{r['repeats']} {r['decided']}")  # fmt: skip
    honest = [r for r in rows if r["honest"]]
    breaks = [r for r in rows if r["honest"] is False]
    counts = {"breaks_passed": sum(r["repeats"].get("pass", 0) + (r["state"] == "pass")
                                   for r in breaks),
              "honest_passed_share": sum(r["repeats"].get("pass", 0) for r in honest)
              / (REPEATS * len(honest)),
              "honest_passed_whole_share": np.mean([r["state"] == "pass" for r in honest]),
              "breaks": len(breaks), "honest": len(honest), "repeats": REPEATS}  # fmt: skip
    students = sorted({f"{r['set']} {r['net']}" for r in rows})
    keep("verdict", counts, rows, packages=("openvino", "nncf", "onnxruntime", "torch"),
         quick=quick, students=students, margins=CPU.margins.model_dump())  # fmt: skip


if __name__ == "__main__":
    main()
