"""A data set, opened: every problem found at once, and no patient in two splits.

`inspect` reads each file once (hash, full decode and perceptual hash of the same bytes).
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgekd.data import dicom, files, layouts, leakage, medmnist, preprocess, splits
from edgekd.data.manifests import Entry, Log
from edgekd.records import EdgeKDError, Spec, Track, untracked

SPLITS = splits.SPLITS
_REMARKS = {  # said once, with how many images it is about
    "no window": "DICOM images state no window: shown from their darkest to their brightest value",
    "no patient": "DICOM images state no patient id: each stands alone",
    "unknown text": "DICOM images do not say whether text is burned in: look before you share them",
    "burned in": "DICOM images have text burned into their pixels (BurnedInAnnotation)",
    "flat": f"images have {preprocess.FLAT}",
}


class Sample(NamedTuple):
    """One image of a data set."""

    path: Path
    label: int  # index into the data set's classes
    group: str  # opaque: the least digest of all images of its patient, tile or duplicates
    mask: Path | None  # of the lesion
    digest: str  # sha256 of the file's bytes
    organ: Path | None = None  # mask of the organ
    subgroup: str = ""  # of patients, to be judged apart; "": not known
    inside: str = ""  # array and index where `path` is an .npz file


_NAME_PATIENTS = "name the patients in column patient_id of a manifest.csv"


@dataclass(frozen=True)
class Dataset:
    """Images that passed every check."""

    root: Path
    classes: tuple[str, ...]  # sorted
    splits: dict[str, tuple[Sample, ...]]  # keys train, val, test; sorted by relative path
    fingerprint: str  # sha256 of every (split, class, relative path, digest)
    split_rule: str  # sentences: how the splits came about, and what leaks if that is allowed
    grey: bool  # every image is
    notes: tuple[str, ...]  # what was ignored or is worth knowing
    burned_in: int = 0  # images whose pixels hold text, by their own word


class Findings(NamedTuple):
    """What `inspect` found."""

    dataset: Dataset | None  # None if there is a problem
    problems: tuple[str, ...]  # by path
    leaks: dict[str, int]  # kind -> how many between splits, allowed or not


def open_dataset(
    root: Path,
    *,
    seed: int = 0,
    split: str | None = None,
    allow_leakage: bool = False,
    track: Track = untracked,
) -> Dataset:
    """The data set at `root`, as `inspect` has it; EdgeKDError with the first problems if any."""
    found = inspect(root, seed=seed, split=split, allow_leakage=allow_leakage, track=track)
    if found.dataset is None:
        problems = found.problems
        first = "; ".join(problems[:3])
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        fix = f"edgekd data check {root} lists all"
        if found.leaks:
            told = ", ".join(f"{n} {kind}" for kind, n in found.leaks.items())
            fix += f"; between splits: {told}: --split grouped deals anew, --allow-leakage goes on"
        raise EdgeKDError(f"data {root}: {count}: {first} ({fix})")
    return found.dataset


def inspect(
    root: Path,
    *,
    seed: int = 0,
    split: str | None = None,
    allow_leakage: bool = False,
    track: Track = untracked,
) -> Findings:
    """The data set at `root` (image or DICOM folders, a manifest, a MedMNIST archive).

    seed: orders the groups where splits have to be made. split: given, grouped or random; None:
    what is given, and the rest by group. allow_leakage: leaks between splits are no problem, but
    are said in the split rule.
    """
    splits.check(split)
    log = Log([], [], [])
    found = layouts.find(root, log)
    if passed := sum(log.passed):
        log.notes.append(files.passed_over(passed))
    entries = _examine(found.entries, log, track)
    known = found.groups if any(e.owner for e in entries) else ""
    if layouts.one_patient_a_class(entries):
        return Findings(None, (f"each class folder of {root} holds one patient's images: are they "
                               f"patients' folders? {layouts.EXPECTED}",), {})  # fmt: skip
    pairs = leakage.near_duplicates(entries, track)
    given = {e.split for e in found.entries}
    if found.leaky and split != "random":
        log.problems.append(f"{found.leaky}; or ask for --split random")
    entries, rule = splits.assign(entries, pairs, known=known, given=given, how=split, seed=seed)
    anew = "" in given or split in ("grouped", "random")
    made = set(SPLITS) if anew else {"train", "val"} if given == {"train", "test"} else set()
    _check_classes(found.entries, entries, made, log)
    _check_splits(entries, made, known, log)
    _check_labels(entries, log)
    leaks = leakage.across_splits(entries, pairs)
    if leaks and not allow_leakage and (said := _one_group(entries, known)):
        log.problems.append(
            f"{said}: {_NAME_PATIENTS}, or --allow-leakage goes on and every result says so"
        )
    counts = leakage.summary(leaks)
    if leaks and allow_leakage:
        told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        rule += f" LEAKAGE between splits, allowed as asked for: {told}."
    else:
        log.problems.extend(map(str, leaks))
    if log.problems:
        return Findings(None, tuple(map(files.printable, log.problems)), counts)
    return Findings(_assemble(root, entries, rule, log), (), counts)


def _assemble(root: Path, entries: list[Entry], rule: str, log: Log) -> Dataset:
    """The data set of images in which no problem was found."""
    classes = tuple(sorted({e.label for e in entries}))
    kept: dict[str, list[Sample]] = {s: [] for s in SPLITS}
    for e in sorted(entries, key=lambda e: e.name):
        kept[e.split].append(
            Sample(e.path, classes.index(e.label), e.group, e.mask, e.digest, e.organ, e.subgroup,
                   e.inside)
        )  # fmt: skip
    fingerprint = hashlib.sha256()
    for line in sorted("\0".join((e.split, e.label, e.name, e.digest)) for e in entries):
        fingerprint.update(line.encode("utf-8", "surrogateescape") + b"\n")
    for kind, masks in (
        ("masks", [e.mask for e in entries]),
        ("organs", [e.organ for e in entries]),
    ):
        if there := sum(m is not None for m in masks):
            log.notes.append(f"{kind}: {there} of {len(entries)} images have one")
    remarks: dict[str, list[str]] = {}  # what -> the images that it is about
    for e in entries:
        for remark in filter(None, e.remark.split(";")):
            remarks.setdefault(remark, []).append(e.shown)
    for remark, about in sorted(remarks.items()):
        which = f"; the first is {about[0]}" if remark == "flat" else ""
        log.notes.append(f"{len(about)} {_REMARKS[remark]}{which}")
    return Dataset(
        root=root,
        classes=classes,
        splits={s: tuple(samples) for s, samples in kept.items()},
        fingerprint=fingerprint.hexdigest(),
        split_rule=rule,
        grey=all(e.grey for e in entries),
        notes=tuple(map(files.printable, log.notes)),
        burned_in=len(remarks.get("burned in", ())),
    )


# --- what the files say ------------------------------------------------------------------------


def _examine(found: list[Entry], log: Log, track: Track) -> list[Entry]:
    """The entries that can be used; the problems of the others go to the log."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading, hashing, decoding free the GIL
        entries = list(track(pool.map(_see, found), "checking images", len(found)))
    log.problems.extend(e.problem for e in entries if e.problem)
    return [e for e in entries if e.digest and not e.problem]


def _see(found: Entry) -> Entry:
    """The entry with what reading and decoding it, and its masks if it has any, tells."""
    shown = found.home + " DICOM file" if found.is_dicom else found.name
    try:
        data = _bytes(found)
        found = found._replace(digest=hashlib.sha256(data).hexdigest())
        shown = found.shown
        image = (
            medmnist.image(found.path, found.inside) if found.inside else preprocess.decode(data)
        )
        if min(image.size) < preprocess.MIN_SIDE:
            raise EdgeKDError(
                f"{preprocess.describe(image)} pixels, a side is less than {preprocess.MIN_SIDE}"
            )
        if found.is_dicom:
            found = _remarked(found, data)
        if preprocess.is_flat(image):
            found = found._replace(remark=";".join(filter(None, (found.remark, "flat"))))
        found = found._replace(grey=_is_grey(image), waves=leakage.waves(image))
        for path in filter(None, (found.mask, found.organ)):
            shown = f"mask of {found.shown}" if found.is_dicom else _mask_name(path, found)
            mask = preprocess.decode(preprocess.read(path))
            if mask.size != image.size:
                mine, own = preprocess.describe(mask), preprocess.describe(image)
                made = " (as shown, its pixels square)" if found.is_dicom else ""
                raise EdgeKDError(f"mask of {mine} pixels for an image of {own}{made}")
    except EdgeKDError as e:
        return found._replace(problem=f"{shown}: {e}")
    return found


def _bytes(entry: Entry) -> bytes:
    """What the digest of an entry is taken of."""
    if entry.inside:
        return medmnist.pixels(entry.path, entry.inside).tobytes()
    return preprocess.read(entry.path)


def _mask_name(path: Path, entry: Entry) -> str:
    """A mask's path relative to the data set's root."""
    root = entry.path.parents[len(Path(entry.name).parts) - 1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _remarked(entry: Entry, data: bytes) -> Entry:
    """A DICOM entry with its patient as owner, unless a table named one, and what to know of it."""
    with preprocess.quiet:
        facts = dicom.facts(data)
    said = {
        "no window": not facts.has_window,
        "no patient": not (entry.owner or facts.patient),
        "unknown text": not facts.burned_in,
        "burned in": facts.burned_in == "YES",
    }
    remark = ";".join(k for k, true in said.items() if true)
    return entry._replace(owner=entry.owner or facts.patient, remark=remark)


def _is_grey(image: Image.Image) -> bool:
    """No pixel has a colour."""
    if image.mode == "L":
        return True
    rgb = np.asarray(image)  # (H, W, 3) uint8
    red = rgb[..., 0]
    return bool((red == rgb[..., 1]).all() and (red == rgb[..., 2]).all())


# --- what must hold of all of them -------------------------------------------------------------


def _check_classes(found: list[Entry], entries: list[Entry], made: set[str], log: Log) -> None:
    """At least two classes, each in every split that was given or made."""
    classes = sorted({f.label for f in found})
    log.problems.extend(
        f"class folder {wrong}" for wrong in map(files.wrong_class, classes) if wrong
    )
    spelt: dict[str, str] = {}
    for label in classes:
        if (other := spelt.setdefault(label.casefold(), label)) != label:
            log.problems.append(f"classes {other} and {label} differ in capitals; spell them alike")
    if len(classes) == 1:
        expected = layouts.EXPECTED
        log.problems.append(f"one class ({classes[0]}); at least 2 are needed, {expected}")
    there = {(e.split, e.label) for e in entries}
    read = {e.name for e in entries}  # an image that is not is a problem already
    there |= {(f.split, f.label) for f in found if f.name not in read}
    for split, label in itertools.product(sorted({s for s, _ in there} - {""}), classes):
        if (split, label) not in there:
            groups = {e.group for e in entries if e.label == label and e.split in made}
            why = f" ({_too_few(len(groups))})" if split in made else ""
            log.problems.append(f"{split}/{label}: no image of class {label} in split {split}{why}")


def _check_splits(entries: list[Entry], made: set[str], known: str, log: Log) -> None:
    """Every split has an image; what else is wrong may be why a given one has none."""
    empty = [s for s in SPLITS if entries and not any(e.split == s for e in entries)]
    why = _too_few(len({e.group for e in entries}))
    if same := _one_group(entries, known):
        why = f"{same}, and one group cannot be dealt"
    for split in empty:
        if split in made:
            fix = f"{_NAME_PATIENTS}, or give split folders"
            log.problems.append(f"{split}: no image is in this split: {why}; {fix}")
        elif not log.problems:
            log.problems.append(f"{split}: no image is in this split; add some")


def _one_group(entries: Sequence[Entry], known: str) -> str:
    """That all images are of one patient, who may be several without names; "" if they are not."""
    if not known or len({e.owner for e in entries}) > 1:
        return ""
    dicoms = known.startswith("patients of the DICOM")
    same = "state the same patient id" if dicoms else f"are of one group ({known})"
    return f"all {len(entries)} images {same}"


def _too_few(groups: int) -> str:
    return f"{groups} group{' is' if groups == 1 else 's are'} too few to deal"


def _check_labels(entries: list[Entry], log: Log) -> None:
    """No file's bytes are in two classes."""
    first: dict[str, Entry] = {}
    spare = 0
    for e in entries:
        other = first.setdefault(e.digest, e)
        if other.label != e.label:
            where = f"classes {other.label} and {e.label}"
            log.problems.append(f"{e.shown}: same bytes as {other.shown}, in {where}; keep one")
        elif other.split == e.split:  # else it is a leak
            spare += other is not e
    if spare:
        log.notes.append(f"{spare} files are copies of another of the same class and split")


# --- pixels ------------------------------------------------------------------------------------


def pixels(sample: Sample, spec: Spec) -> np.ndarray:
    """(H, W, 3) uint8: the sample as a model of `spec` sees it (`preprocess.pixels`)."""
    return preprocess.pixels(source(sample), spec)


def source(sample: Sample) -> Path | Image.Image:
    """What `imaging` takes: the file, or the picture out of an archive."""
    return medmnist.image(sample.path, sample.inside) if sample.inside else sample.path


def load_pixels(samples: Sequence[Sample], spec: Spec, track: Track = untracked) -> np.ndarray:
    """(N, H, W, 3) uint8: `pixels` of every sample, in order."""
    stack = np.empty((len(samples), *spec.size, 3), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read: Iterable[np.ndarray] = pool.map(lambda s: pixels(s, spec), samples)
        for i, one in enumerate(track(read, "reading images", len(samples))):
            stack[i] = one
    return stack


def load_masks(samples: Sequence[Sample], spec: Spec) -> np.ndarray | None:
    """(N, H, W) bool, all False where an image has no lesion mask; None where none has one."""
    if not any(s.mask for s in samples):
        return None
    blank = np.zeros(spec.size, bool)
    return np.stack([blank if s.mask is None else preprocess.mask(s.mask, spec) for s in samples])
