"""Image folders: every problem found at once, and splits that keep a patient's images together.

`inspect` reads each file once (hash and full decode of the same bytes).
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgekd import imaging
from edgekd.records import EdgeKDError, Spec, Track, untracked

SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "val", "test")
_SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val"}
_SPLIT_OF |= {"validation": "val", "test": "test", "testing": "test"}
_DEAL = {"test": 0.2, "val": 0.1}  # share of a class's groups; the rest is train
_CARVE = {"val": 0.15}
_EXPECTED = "expected <split>/<class>/* or <class>/*"


class Sample(NamedTuple):
    """One image of a data set."""

    path: Path
    label: int  # index into the data set's classes
    group: str  # never in two splits: the manifest's patient, else the digest
    mask: Path | None
    digest: str  # sha256 of the file's bytes


@dataclass(frozen=True)
class Dataset:
    """Images that passed every check."""

    root: Path
    classes: tuple[str, ...]  # sorted
    splits: dict[str, tuple[Sample, ...]]  # keys train, val, test; sorted by relative path
    fingerprint: str  # sha256 of every (split, class, relative path, digest)
    split_rule: str  # a sentence: how the splits came about
    grey: bool  # every image is
    notes: tuple[str, ...]  # what was ignored or is worth knowing


class _Log(NamedTuple):
    """What `inspect` gathers on its way."""

    problems: list[str]
    notes: list[str]


class _Image(NamedTuple):
    """An image file by its place, and then what its bytes and those of its mask say."""

    name: str  # path relative to the root, with /
    split: str  # "": to be dealt
    label: str  # class name
    group: str = ""
    digest: str = ""  # "": not usable
    grey: bool = True
    mask: Path | None = None
    problem: str = ""


def open_dataset(root: Path, *, seed: int = 0, track: Track = untracked) -> Dataset:
    """The data set in folder `root`; EdgeKDError with the first problems if it has any."""
    dataset, problems = inspect(root, seed=seed, track=track)
    if dataset is None:
        first = "; ".join(problems[:3])
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise EdgeKDError(f"data {root}: {count}: {first} (edgekd data check {root} lists all)")
    return dataset


def inspect(
    root: Path, *, seed: int = 0, track: Track = untracked
) -> tuple[Dataset | None, tuple[str, ...]]:
    """The data set in `root`, None if it has problems; and every problem, by path.

    `seed` orders the groups where splits have to be made; with all three split folders it is idle.
    """
    log = _Log([], [])
    if not root.is_dir():
        reason = "is a file" if root.exists() else "does not exist"
        return None, (f"{root} {reason}; expected a folder with <split>/<class>/* or <class>/*",)
    found = _walk(root, log)
    column, group_of = _read_manifest(root, {f.name for f in found}, log)
    images = _examine(root, found, group_of, log, track)
    images, rule = _deal_missing(images, column, seed, {f.split for f in found})
    _check_classes(found, images, log)
    _check_copies(images, log)
    _check_groups([i for i in images if i.name in group_of], log)
    if log.problems:
        return None, tuple(log.problems)
    return _assemble(root, images, rule, log), ()


def _assemble(root: Path, images: list[_Image], rule: str, log: _Log) -> Dataset:
    """The data set of images in which no problem was found."""
    classes = tuple(sorted({i.label for i in images}))
    splits: dict[str, list[Sample]] = {s: [] for s in SPLITS}
    for i in sorted(images, key=lambda i: i.name):
        sample = Sample(root / i.name, classes.index(i.label), i.group, i.mask, i.digest)
        splits[i.split].append(sample)
    fingerprint = hashlib.sha256()
    for line in sorted("\0".join((i.split, i.label, i.name, i.digest)) for i in images):
        fingerprint.update(line.encode("utf-8", "surrogateescape") + b"\n")
    if masks := sum(i.mask is not None for i in images):
        log.notes.append(f"masks: {masks} of {len(images)} images have one")
    return Dataset(
        root=root,
        classes=classes,
        splits={s: tuple(samples) for s, samples in splits.items()},
        fingerprint=fingerprint.hexdigest(),
        split_rule=rule,
        grey=all(i.grey for i in images),
        notes=tuple(log.notes),
    )


# --- what lies where ---------------------------------------------------------------------------


def _walk(root: Path, log: _Log) -> list[_Image]:
    """Every image file in a class folder; what lies elsewhere goes to the log."""
    folders, loose = _listing(root, root, log)
    folders = [f for f in folders if f.name != "masks"]
    split_folders = [f for f in folders if f.name.lower() in _SPLIT_OF]
    class_folders = [(f, "") for f in folders if not split_folders]
    for folder in folders if split_folders else ():
        if folder not in split_folders:
            log.notes.append(f"{folder.name}: not a split folder, ignored")
    for folder in split_folders:
        inner, images = _listing(folder, root, log)
        class_folders += [(f, _SPLIT_OF[folder.name.lower()]) for f in inner]
        loose += images
    found = []
    for folder, split in class_folders:
        inner, images = _listing(folder, root, log)
        log.notes.extend(f"{_name(f, root)}: a folder in a class folder, ignored" for f in inner)
        if not images:
            log.problems.append(f"{_name(folder, root)}: class folder without JPEG or PNG images")
        found += [_Image(_name(p, root), split, folder.name) for p in images]
    if not found and not loose:
        log.problems[:] = [f"{root} holds no JPEG or PNG images; {_EXPECTED}"]
    for path in loose:
        log.problems.append(f"{_name(path, root)}: lies in no class folder; {_EXPECTED}")
    if split_folders and found:
        _check_split_folders(split_folders, log)
    return found


def _check_split_folders(folders: list[Path], log: _Log) -> None:
    """Train and test are there, and no split twice."""
    names = defaultdict(list)
    for f in folders:
        names[_SPLIT_OF[f.name.lower()]].append(f.name)
    for split in ("train", "test"):
        if split not in names:
            has = ", ".join(f.name for f in folders)
            log.problems.append(f"{split}: no such split folder beside {has}; add it")
    for split, twice in names.items():
        if len(twice) > 1:
            log.problems.append(f"{' and '.join(twice)}: both are split {split}; merge them")


def _listing(folder: Path, root: Path, log: _Log) -> tuple[list[Path], list[Path]]:
    """Sub-folders and image files in `folder`, sorted; hidden ones left out, others noted."""
    try:
        paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as e:
        log.problems.append(f"{_name(folder, root)}: cannot be listed: {e.strerror}")
        return [], []
    folders = [p for p in paths if p.is_dir()]
    files = [p for p in paths if not p.is_dir()]
    other = [p.name for p in files if p.suffix.lower() not in SUFFIXES]
    if folder == root:
        other = [n for n in other if n != "manifest.csv"]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        what = f"ignored, not .jpg or .png: {', '.join(other[:3])}{more}"
        log.notes.append(what if folder == root else f"{_name(folder, root)}: {what}")
    return folders, [p for p in files if p.suffix.lower() in SUFFIXES]


def _name(path: Path, root: Path) -> str:
    """`path` relative to `root`, with forward slashes."""
    return path.relative_to(root).as_posix()


def _read_manifest(root: Path, names: set[str], log: _Log) -> tuple[str, dict[str, str]]:
    """The group column of manifest.csv ("": none) and the group of each image it speaks of."""
    path = root / "manifest.csv"
    if not path.is_file():
        return "", {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f)
            columns = reader.fieldnames or ()
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        log.problems.append(f"manifest.csv: cannot be read as UTF-8 CSV: {type(e).__name__}")
        return "", {}
    column = next((c for c in ("patient_id", "group") if c in columns), "")
    if not column:
        log.notes.append("manifest.csv: no column patient_id or group, so each image stands alone")
        return "", {}
    if "file" not in columns:
        log.problems.append("manifest.csv: no column file (path relative to this folder)")
        return "", {}
    group_of: dict[str, str] = {}
    for row in rows:
        name = PurePosixPath((row["file"] or "").strip().replace("\\", "/")).as_posix()
        group = (row[column] or "").strip()
        if group and name in names and group_of.setdefault(name, group) != group:
            log.problems.append(f"{name}: in manifest.csv twice, with different {column}")
    if alone := len(names) - len(group_of):
        log.notes.append(f"manifest.csv: no {column} for {alone} images, each stands alone")
    return column, group_of


# --- what the files say ------------------------------------------------------------------------


def _examine(
    root: Path, found: list[_Image], group_of: Mapping[str, str], log: _Log, track: Track
) -> list[_Image]:
    """The images that can be used; the problems of the others go to the log."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading, hashing, decoding free the GIL
        seen = pool.map(lambda f: _see(root, f), found)
        images = list(track(seen, "checking images", len(found)))
    log.problems.extend(i.problem for i in images if i.problem)
    return [i._replace(group=group_of.get(i.name, i.digest)) for i in images if i.digest]


def _see(root: Path, found: _Image) -> _Image:
    """The image with what reading and decoding it, and its mask if there is one, tells."""
    path = root / found.name
    try:
        data = imaging.read(path)
        image = imaging.decode(data)
        if min(image.size) < imaging.MIN_SIDE:
            raise EdgeKDError(
                f"{imaging.describe(image)} pixels, a side is less than {imaging.MIN_SIDE}"
            )
        found = found._replace(digest=hashlib.sha256(data).hexdigest(), grey=_is_grey(image))
        masks = (root / "masks" / found.name).with_suffix(".png"), root / "masks" / found.name
        for path in masks:
            if path.is_file() or path.is_symlink():
                mask_image = imaging.decode(imaging.read(path))
                if mask_image.size != image.size:
                    mine, own = imaging.describe(mask_image), imaging.describe(image)
                    raise EdgeKDError(f"mask of {mine} pixels for an image of {own}")
                return found._replace(mask=path)
    except EdgeKDError as e:
        return found._replace(problem=f"{_name(path, root)}: {e}")
    return found


def _is_grey(image: Image.Image) -> bool:
    """No pixel has a colour."""
    if image.mode == "L":
        return True
    rgb = np.asarray(image)  # (H, W, 3) uint8
    red = rgb[..., 0]
    return bool((red == rgb[..., 1]).all() and (red == rgb[..., 2]).all())


# --- who goes where ----------------------------------------------------------------------------


def _deal_missing(
    images: list[_Image], column: str, seed: int, given: set[str]
) -> tuple[list[_Image], str]:
    """The images, each in a split, and the rule in a sentence. `given`: splits of the folders."""
    by = f"column {column} of manifest.csv" if column else "files of equal bytes"
    order = f"in the order of sha256('{seed}:<group>'), rarest class first; groups: {by}"
    if "" in given:
        split_of = _deal(images, _DEAL, seed)
        rule = f"No split folders: 70/10/20 % of each class's groups are train/val/test, {order}."
        return [i._replace(split=split_of[i.group]) for i in images], rule
    if "val" in given:
        return images, "Split folders train, val and test as they are."
    split_of = _deal([i for i in images if i.split == "train"], _CARVE, seed)
    rule = f"Folders train and test as they are; val: 15 % of each train class's groups, {order}."
    return [i._replace(split=split_of[i.group]) if i.split == "train" else i for i in images], rule


def _deal(images: list[_Image], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Split of each group: of every class at least one group to each share, the rest to train."""
    groups = {i.group for i in images}
    shuffled = sorted(groups, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    rank = {g: r for r, g in enumerate(shuffled)}
    groups_of: dict[str, set[str]] = defaultdict(set)
    for i in images:
        groups_of[i.label].add(i.group)
    split_of: dict[str, str] = {}
    for label in sorted(groups_of, key=lambda c: (len(groups_of[c]), c)):
        own = sorted(groups_of[label], key=rank.__getitem__)
        for split, share in shares.items():
            wanted = max(1, round(share * len(own))) - sum(split_of.get(g) == split for g in own)
            free = [g for g in own if g not in split_of]
            split_of |= dict.fromkeys(free[: max(0, wanted)], split)
        split_of |= {g: "train" for g in own if g not in split_of}
    return split_of


def _check_classes(found: list[_Image], images: list[_Image], log: _Log) -> None:
    """At least two classes, each in every split that was given or made."""
    classes = sorted({f.label for f in found})
    if len(classes) == 1:
        log.problems.append(f"one class ({classes[0]}); at least 2 are needed, {_EXPECTED}")
    there = {(i.split, i.label) for i in images}
    there |= {(f.split, f.label) for f in found}  # an unreadable image is a problem already
    for split, label in itertools.product(sorted({s for s, _ in there} - {""}), classes):
        if (split, label) not in there:
            dealt = split not in {f.split for f in found}
            groups = len({i.group for i in images if i.label == label})
            why = f" ({groups} groups are too few to deal)" if dealt else ""
            log.problems.append(f"{split}/{label}: no image of class {label} in split {split}{why}")


def _check_copies(images: list[_Image], log: _Log) -> None:
    """No file's bytes are in two splits or two classes."""
    first: dict[str, _Image] = {}
    spare = 0
    for i in images:
        other = first.setdefault(i.digest, i)
        if other.split != i.split:
            where = f"splits {other.split} and {i.split}"
        elif other.label != i.label:
            where = f"classes {other.label} and {i.label}"
        else:
            spare += other is not i
            continue
        log.problems.append(f"{i.name}: same bytes as {other.name}, in {where}; keep one")
    if spare:
        log.notes.append(f"{spare} files are copies of another of the same class and split")


def _check_groups(images: list[_Image], log: _Log) -> None:
    """No group of the manifest is in two splits. Groups are patients: never named."""
    first: dict[str, _Image] = {}
    told = set()
    for i in images:
        other = first.setdefault(i.group, i)
        if other.split != i.split and i.group not in told:
            told.add(i.group)
            what = f"same patient or group as {other.name}, in splits {other.split} and {i.split}"
            log.problems.append(f"{i.name}: {what}; move one")


def load_pixels(samples: Sequence[Sample], spec: Spec, track: Track = untracked) -> np.ndarray:
    """(N, H, W, 3) uint8: `pixels` of every sample, in order."""
    stack = np.empty((len(samples), *spec.size, 3), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read: Iterable[np.ndarray] = pool.map(lambda s: imaging.pixels(s.path, spec), samples)
        for i, one in enumerate(track(read, "reading images", len(samples))):
            stack[i] = one
    return stack
