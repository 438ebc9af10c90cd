"""Do the explanations survive? The whole chain examined, each step compared and judged.

teacher -> student is the distillation; student -> each deployed file, the quantisation. Every file
is explained itself, in its own runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from edgekd import data, runtimes
from edgekd.data import preprocess
from edgekd.explain import examine, fidelity, kept, occlusion, score_cam, shared_masks
from edgekd.explain import verdict as verdicts
from edgekd.metrics import evaluation, paired
from edgekd.metrics.calibration import log_softmax, softmax
from edgekd.pipeline import folders
from edgekd.records import (
    Aggregate,
    Artifact,
    Comparison,
    EdgeKDError,
    Fidelity,
    Margins,
    Metric,
    Profile,
    Spec,
    State,
    Step,
    Survived,
    Swayed,
    make_folder,
    unknown,
    versions,
    worst,
)
from edgekd.runtimes import machine

if TYPE_CHECKING:
    from edgekd.pipeline.run import Run

MAPS = "maps.npz"  # name of a comparison -> (N, g, g) float32, see `chain`
THROUGH = "student through the teacher's masks"  # and (N, g, g) of it, beside those
LAYERS = "layers.npz"  # "teacher|stage3 40x16x16|<image>|average" (h, w), |heat, |seconds
CERTIFY = 8  # validation images on which fast maps are held against exact ones
SWAYED = 4  # images that the report shows with a marker
PUBLISHED = 24  # images whose published maps are made, for comparison


class Link(NamedTuple):
    """One file of the chain, examined."""

    name: str
    artifact: Artifact
    profile: Profile  # that it was run with here
    found: examine.Examined
    alone: str = ""  # why its masked images were not asked several at a time
    shared: np.ndarray | None = None  # (N, K, g, g): through the channels of what it is compared to
    hidden: occlusion.Hidden | None = None  # without the organ or the lesion; None: no masks


class Question(NamedTuple):
    """What is asked of every file: the same images."""

    samples: Sequence[data.Sample]
    truth: evaluation.Truth  # of the whole test split
    masks: np.ndarray | None  # (N, H, W) bool
    spec: Spec
    seed: int

    def cases(self, labels: np.ndarray) -> fidelity.Cases:
        """With (N,) `labels` explained. Names are hashes: a file name may hold a patient's id."""
        return fidelity.Cases(
            images=[s.digest[:12] for s in self.samples],
            labels=[self.spec.classes[s.label] for s in self.samples],
            explained=[self.spec.classes[k] for k in labels],
            groups=[s.group for s in self.samples],
            masks=self.masks,
            subgroups=[s.subgroup for s in self.samples],
        )


def judge(
    run: Run,
    *,
    images: int | None = None,
    variant: str = "evidence",
    fast: bool = False,
    depths: int = 0,
) -> Fidelity:
    """Score-CAM of teacher, student and deployed files, compared step by step and judged.

    images: of the test split, by class; None: as the profile's margins say. fast: the teacher's
    maps from as few channels as are certified to give the same map. depths: of so many images
    teacher and student are shown layer by layer, too. Written to `<run>/explain/`.
    """
    if variant not in score_cam.VARIANTS:
        raise EdgeKDError(unknown("variant", variant, score_cam.VARIANTS))
    if fast and not run.record.teacher:
        raise EdgeKDError("--fast is for a teacher's maps, and this run has none: leave it out")
    known = cast(score_cam.Variant, variant)
    margins = run.record.profile.margins
    dataset = run.dataset()
    candidates = run.candidates(dataset)
    samples = spread(dataset.splits["test"], images or margins.images)
    spec = candidates[0].spec
    ask = Question(samples, evaluation.truth(dataset.splits["test"]),
                   data.load_masks(samples, spec), spec, run.record.seed)  # fmt: skip
    out = make_folder(run.folder / "explain")
    (out / Fidelity.FILE).unlink(missing_ok=True)
    published: dict[str, Aggregate] = {}
    links = []
    reference: shared_masks.Model | None = None
    certified = score_cam.Fast(1.0, 1.0, 1.0)
    for candidate in candidates:
        quick = fast and candidate.role == "teacher"
        if quick:
            certified = _certified(run, candidate, dataset, known)
        asked = examine.Asked(known, certified.share if quick else 1.0, seed=run.record.seed)
        link, blind, model = _examined(run, candidate, ask, asked, reference)
        links.append(link)
        # What comes next is compared with the first, and from the student on with the student. The
        # maps of other variants than evidence are not of the kind that is made through masks.
        if known == "evidence" and (reference is None or reference.artifact.role == "teacher"):
            reference = model
        if blind is not None:
            published[link.name] = blind
    comparisons, maps = chain(links, ask, margins)
    kept.write_arrays(out / MAPS, maps, compressed=True)
    _layer_by_layer(run, ask, depths, out)
    steps = [c.verdict for c in comparisons if c.verdict]
    return Fidelity(
        reference=candidates[0].model,
        reference_sha256=candidates[0].sha256,
        variant=variant,
        grid=fidelity.GRID,
        data_fingerprint=dataset.fingerprint,
        split="test",
        comparisons=tuple(comparisons),
        verdict=worst([v.state for v in steps]) if steps else None,
        reasons=tuple(v.sentence for v in steps),
        margins=margins,
        margins_sha256=margins.sha256,
        fast=certified.share,
        fast_r=certified.worst,
        published=published,
        swayed=tuple(_swayed(links[-1], ask)),
        hidden=Counter(links[0].hidden.kinds) if links[0].hidden else {},
        survived=tuple(_survived(links, ask)),
        mask_share=_mask_share(ask.masks),
        machine=machine.this(),
        versions=versions("numpy", "openvino", "onnxruntime"),
        seed=run.record.seed,
    ).save(out)


def _swayed(link: Link, ask: Question) -> Iterator[Swayed]:
    """The images whose answers markers moved most."""
    found, artifact = link.found, link.artifact
    names = examine.names_of_markers(artifact)
    beyond = examine.excess(found, artifact.temperature)

    def said(logits: np.ndarray) -> tuple[str, float]:
        p = softmax(logits[None], artifact.temperature)[0]
        return ask.spec.classes[p.argmax()], float(p.max())

    for i in np.argsort(-beyond.max(1), kind="stable")[:SWAYED]:
        m = beyond[i].argmax()
        yield Swayed(
            image=ask.samples[i].digest[:12], model=link.name, marker=names[m],
            before=said(found.logits[i]), after=said(found.marked[i, m]), moved=float(beyond[i, m]),
        )  # fmt: skip


def _survived(links: Sequence[Link], ask: Question) -> Iterator[Survived]:
    """Of each file the images whose answers survive most surely without the organ or lesion."""
    digests = [s.digest for s in ask.samples]
    for x in links:
        if x.hidden:
            yield from occlusion.survived(x.hidden, x.found.logits, x.artifact, x.name, digests)


def _certified(
    run: Run, teacher: Artifact, dataset: data.Dataset, variant: score_cam.Variant
) -> score_cam.Fast:
    """How few channels give the teacher's maps, told by validation images."""
    profile = runtimes.host(run.record.profile, teacher)[0]
    session, _ = runtimes.open_streams(teacher, profile)
    few = folders.sample_images(dataset, teacher.spec, "val", CERTIFY)
    return examine.certified(session, teacher, profile, few, variant)


def _layer_by_layer(run: Run, ask: Question, count: int, out: Path) -> None:
    """What every layer of the trained networks sees in `count` images: LAYERS, or no such file."""
    (out / LAYERS).unlink(missing_ok=True)
    if not count:
        return
    from edgekd.models import feature_layers, zoo

    trained = [run.student()]
    if run.record.teacher:
        trained.insert(0, Artifact.load(Path(run.record.teacher)))
    samples = spread(ask.samples, count)
    arrays: dict[str, np.ndarray] = {}
    for artifact in trained:
        net = zoo.load(artifact)
        pixels = preprocess.normalise(data.load_pixels(samples, artifact.spec), artifact.spec)
        label = feature_layers.session_of(net)(pixels).logits.argmax(1)
        todo = run.track(range(len(samples)), f"{artifact.role}, layer by layer", len(samples))
        for i in todo:
            for d in feature_layers.by_depth(net, pixels[i], int(label[i])):
                key = f"{artifact.role}|{d.layer}|{samples[i].digest[:12]}"
                arrays[f"{key}|average"] = d.average
                arrays[f"{key}|seconds"] = np.array(d.seconds)
                if d.heat is not None:
                    arrays[f"{key}|heat"] = d.heat
    kept.write_arrays(out / LAYERS, arrays, compressed=True)


def _examined(
    run: Run,
    candidate: Artifact,
    ask: Question,
    asked: examine.Asked,
    reference: shared_masks.Model | None,
) -> tuple[Link, Aggregate | None, shared_masks.Model]:
    """One file asked about all images in its own runtime; how blind its published maps are; and
    the file as it answers, for others to be compared with. reference: it is shown through its
    channels.
    """
    profile = runtimes.host(run.record.profile, candidate)[0]
    session, alone = runtimes.open_streams(candidate, profile)
    pixels = data.load_pixels(ask.samples, candidate.spec)
    digests = [s.digest for s in ask.samples]
    found = examine.examine(session, candidate, profile, pixels, digests, asked, track=run.track)
    model, shared = shared_masks.Model(candidate, profile, session, pixels), None
    if reference is not None:
        shared = shared_masks.shared_maps(model, reference, digests, track=run.track)
    hidden = None
    if shown := occlusion.regions(ask.samples, candidate.spec):
        hidden = occlusion.examine(
            session, candidate, profile, pixels, shown, [s.group for s in ask.samples],
            seed=run.record.seed, track=run.track,
        )  # fmt: skip
    name = f"{candidate.role} {candidate.precision}"
    link = Link(name, candidate, profile, found, alone, shared, hidden)
    if candidate.role == "teacher" or asked.variant == "published":
        return link, None, model
    few = np.unique(np.linspace(0, len(pixels) - 1, PUBLISHED).astype(int))
    cases = ask.cases(found.logits.argmax(1))
    some = cases._replace(groups=[cases.groups[i] for i in few])
    blind = examine.blindness(
        session, preprocess.normalise(pixels[few], candidate.spec), some,
        seed=run.record.seed, track=run.track,
    )  # fmt: skip
    return link, blind, model


def chain(
    links: Sequence[Link], ask: Question, margins: Margins
) -> tuple[list[Comparison], dict[str, np.ndarray]]:
    """Each link beside what it was compressed from, and judged; and maps to be shown, by name.

    The first is compared with itself. A student's files are compared with its first, FP32. Maps are
    of the class that the teacher answers, and from the student on, of the one that the student
    answers: what is shown of a file is what its student's is to be seen beside.
    """
    first = links[0]
    student = next((x for x in links if x.artifact.role == "student"), first)
    found: dict[str, Comparison] = {}
    maps: dict[str, np.ndarray] = {}
    for link in links:
        of = first if link in (first, student) else student
        explained = of.found.logits.argmax(1)
        own = link.found.logits.argmax(1) if link is student else explained
        maps[link.name] = link.found.of(own).maps
        if link is student and link.shared is not None:
            maps[THROUGH] = link.shared[np.arange(len(explained)), explained]
        comparison = compared(link, of, explained, ask)
        if link is not first:
            if of is not first:  # a file of the student, beside the teacher too
                comparison = _beside_teacher(comparison, link, first, explained, ask)
            step: Step = "distillation" if link is student else "quantisation"
            told = answered(link.artifact, of.artifact, ask)
            comparison = judged(comparison, found[of.name], step, told, margins,
                                accuracy_of(of.artifact, ask))  # fmt: skip
        found[link.name] = comparison
    return list(found.values()), maps


def _beside_teacher(
    comparison: Comparison, link: Link, teacher: Link, explained: np.ndarray, ask: Question
) -> Comparison:
    """With how its maps agree with the teacher's, as `teacher_pearson`."""
    cases = ask.cases(explained)
    cross = fidelity.correlations(teacher.found.of(explained).maps, link.found.of(explained).maps)
    null = fidelity.row_means(cross, fidelity.strangers(cases))
    own = fidelity.aggregate(np.diag(cross), null, np.asarray(cases.groups), ask.seed)
    if own is None:
        return comparison
    return comparison.model_copy(
        update={"aggregate": comparison.aggregate | {"teacher_pearson": own}}
    )


def judged(
    comparison: Comparison,
    reference: Comparison,
    step: Step,
    told: dict[str, Aggregate],
    margins: Margins,
    accuracy: Aggregate | None,
) -> Comparison:
    """With the verdict of the step from `reference`; told: what `answered` says of the two."""
    whole = comparison.model_copy(
        update={"paired": told | comparison.paired, "reference": reference.name}
    )
    given = verdicts.judge(step, reference, whole, margins, accuracy)
    return whole.model_copy(update={"verdict": given})


def compared(link: Link, of: Link, explained: np.ndarray, ask: Question) -> Comparison:
    """The figures of one link beside those of what it was compressed from, image by image."""
    artifact, seed = link.artifact, ask.seed
    cases = ask.cases(explained)
    comparison = fidelity.compare(
        link.name, artifact, link.profile.runtime, cases, of.found.of(explained),
        link.found.of(explained), seed=seed,
    )  # fmt: skip
    own = examine.checks(link.found, cases, artifact, seed)
    if link.hidden:
        own |= occlusion.checks(link.hidden, link.found.logits, artifact, cases.groups, seed)
    update: dict[str, Any] = {"checks": own, "asked_per_map": float(link.found.asked.mean()),
                              "remark": link.alone,
                              "region": link.hidden.region if link.hidden else ""}  # fmt: skip
    if link is not of:
        update["paired"] = _paired(link, of, explained, ask)
    if link.shared is not None:
        through = link.shared[np.arange(len(explained)), explained]
        alike = shared_masks.agreement(of.found.of(explained).maps, through, cases, seed=seed)
        update["aggregate"] = comparison.aggregate | alike
    return comparison.model_copy(update=update)


def _paired(link: Link, of: Link, explained: np.ndarray, ask: Question) -> dict[str, Aggregate]:
    """What `link` has less what `of`, that it was compressed from, has, image by image.

    energy: as a share of the mean of `of`, as masks may be small: of 0.04 not 0.05 can be lost.
    """
    groups, seed = np.asarray([s.group for s in ask.samples]), ask.seed
    nothing = np.full(len(groups), np.nan)
    made: dict[str, Aggregate] = {}
    differences = {"faithful": (link.found.faithful - of.found.faithful)[:, 0]}
    if ask.masks is not None:
        inside = [np.diag(fidelity.localisation(x.found.of(explained).maps, ask.masks)["energy"])
                  for x in (link, of)]  # fmt: skip
        usual = inside[1][~np.isnan(inside[1])]
        if usual.any():
            differences["energy"] = (inside[0] - inside[1]) / usual.mean()
    moved = [examine.excess(x.found, x.artifact.temperature) for x in (link, of)]
    for i, name in enumerate(examine.names_of_markers(link.artifact)):
        differences[f"shortcut: {name}"] = moved[0][:, i] - moved[1][:, i]
    for key, values in differences.items():
        if a := fidelity.aggregate(values, nothing, groups, seed):
            made[key] = a
    return made


def answered(own: Artifact, other: Artifact, ask: Question) -> dict[str, Aggregate]:
    """What the answers to the whole test split say: both were judged on it before."""
    t = ask.truth
    logits = [evaluation.answers(a, "test", t.images) for a in (own, other)]
    if logits[0] is None or logits[1] is None:
        late = own if logits[0] is None else other
        raise EdgeKDError(f"{late.folder} was judged on other test images: --force makes it again")
    a, b = log_softmax(logits[0], own.temperature), log_softmax(logits[1], other.temperature)
    lost = paired.compare(a, b, t.labels, t.groups, other, seed=ask.seed)
    made = {"accuracy_pt": _of(lost.differences["balanced_accuracy"], len(t.labels), 100)}
    alike = (a.argmax(1) == b.argmax(1)).astype(float)
    groups = np.asarray(t.groups)
    if share := fidelity.aggregate(alike, np.full(len(alike), np.nan), groups, ask.seed):
        made["answers"] = fidelity.exact(share, len(set(t.groups)))
    return made


def _of(m: Metric, n: int, scale: float = 1.0) -> Aggregate:
    """A metric as an aggregate; without an interval nothing is known of it."""
    low, high = (m.value if x is None else x for x in (m.low, m.high))
    return Aggregate(value=m.value * scale, low=low * scale, high=high * scale, n=n)


def accuracy_of(first: Artifact, ask: Question) -> Aggregate | None:
    """Balanced accuracy of the whole model on the test split."""
    m = first.metrics.get("test_balanced_accuracy")
    return None if m is None else _of(m, len(ask.truth.labels))


def spread(samples: Sequence[data.Sample], count: int) -> list[data.Sample]:
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


def _mask_share(masks: np.ndarray | None) -> float | None:
    """Mean area of the masks that are not empty, as a share of the image."""
    if masks is None or not masks.any():
        return None
    return float(masks[masks.any((1, 2))].mean())


CODES: dict[State | None, int] = {None: 0, "pass": 0, "fail": 3, "invalid": 3, "inconclusive": 6}
