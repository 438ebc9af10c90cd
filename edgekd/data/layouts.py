"""Where the images of a data set lie: plain folders and the layouts of published data sets.

A layout is recognised by its own folder names and gives entries; what is in the files is `data`'s.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekd.data import files, manifests, medmnist
from edgekd.data.manifests import SPLIT_OF, Entry, Log

EXPECTED = "expected <split>/<class>/* or <class>/*"
OWN_FILES = ("manifest.csv", "prepared.json")
_LC25000 = {"colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"}
_EYES = {"cataract", "diabetic_retinopathy", "glaucoma", "normal"}
_AUGMENTED, _ORIGINAL = "AugmentedAlzheimerDataset", "OriginalDataset"


class Found(NamedTuple):
    """The entries of a data set, and what is known of who belongs together."""

    entries: list[Entry]
    groups: str = ""  # what an entry's owner is, in words; "": none is known
    leaky: str = ""  # why these images must not be dealt without knowing their groups


def find(root: Path, log: Log) -> Found:
    """Every image of the data set at `root`, a folder or a file; problems and notes go to `log`."""
    if root.is_file() and root.suffix.lower() == ".npz":
        return Found(medmnist.find(root, log))
    if root.is_file() and root.suffix.lower() in manifests.SUFFIXES:
        return Found(*manifests.find(root, log))
    if not root.is_dir():
        reason = "is a file" if root.exists() else "does not exist"
        kinds = f"{', '.join(manifests.SUFFIXES)} or .npz file"
        log.problems.append(f"{root} {reason}; expected a folder with {EXPECTED[9:]}, or a {kinds}")
        return Found([])
    base = _unwrapped(root, log)
    return (
        _covid_qu_ex(base, log) or _lc25000(base, log) or _alzheimer(base, log) or _plain(base, log)
    )


def _unwrapped(folder: Path, log: Log) -> Path:
    """`folder`, or the one that it wraps alone: archives are often unpacked into such a one."""
    while True:
        inside = [p for p in _visible(folder) if p.is_dir() or files.is_image(p)]
        lone = inside[0] if len(inside) == 1 else folder
        if folder.resolve().is_relative_to(lone.resolve()) or not lone.is_dir() or _split(lone):
            return folder
        if not any(p.is_dir() for p in _visible(lone)) or files.named(folder, "manifest.csv"):
            return folder
        log.notes.append(f"{lone.name}: the only folder, read as the data set")
        log.passed.append(sum(files.is_litter(p.name) for p in folder.iterdir()))
        folder = lone


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not files.is_litter(p.name))
    except OSError:
        return []


def _split(folder: Path) -> str:
    """The split that a folder is by its name, or ""."""
    return SPLIT_OF.get(folder.name.casefold(), "")


# --- <split>/<class>/* and <class>/* -----------------------------------------------------------


def _plain(root: Path, log: Log) -> Found:
    """Image folders, with the groups of manifest.csv where there is one."""
    entries = _walk(root, log)
    entries, groups = manifests.annotated(root, entries, log)
    if not groups and {e.label for e in entries} == _EYES and not any(e.split for e in entries):
        return _eyes(entries)
    if any(e.is_dicom for e in entries):
        groups = groups or "patients of the DICOM files"
    return Found(entries, groups)


def _walk(root: Path, log: Log) -> list[Entry]:
    """Every image file in a class folder; what lies elsewhere goes to the log."""
    folders, loose = _listing(root, root, log)
    beside = {f.name.casefold(): f for f in folders if f.name.casefold() in ("masks", "organs")}
    twins = {kind: _twins(beside.get(kind), log) for kind in ("masks", "organs")}
    folders = [f for f in folders if f not in beside.values()]
    split_folders = [f for f in folders if _split(f)]
    class_folders = [(f, "") for f in folders if not split_folders]
    for folder in folders if split_folders else ():
        if folder not in split_folders:
            log.notes.append(f"{folder.name}: not a split folder, ignored")
    empty = []
    for folder in split_folders:
        inner, images = _listing(folder, root, log)
        class_folders += [(f, _split(folder)) for f in inner]
        loose += images
        if not inner and not images:
            empty.append(f"{folder.name}: split folder without images; fill it or remove it")
    found: list[Entry] = []
    for folder, split in class_folders:
        found += _class_folder(folder, split, root, log)
    if not found and not loose:
        log.problems[:] = [f"{root} holds no JPEG, PNG or DICOM images; {EXPECTED}"]
    for path in loose:
        name = "a DICOM file" if files.is_dicom(path) else _name(path, root)
        log.problems.append(f"{name}: lies in no class folder; {EXPECTED}")
    if split_folders and found:
        check_split_folders(split_folders, log)
        log.problems.extend(empty)
    return _with_masks(found, twins, log)


def _class_folder(folder: Path, split: str, root: Path, log: Log) -> Iterator[Entry]:
    """A class's images; of DICOM studies, which archives export as trees, at any depth."""
    inner, images = _listing(folder, root, log)
    if not images and inner:
        images = [p for p in _below(folder, root, log) if files.is_dicom(p)]
        inner = [] if images else inner
    if inner:
        count = f"{len(inner)} folder{'s' if len(inner) > 1 else ''}"
        log.notes.append(f"{_name(folder, root)}: {count} in a class folder, ignored")
    if not images:
        log.problems.append(
            f"{_name(folder, root)}: class folder without JPEG, PNG or DICOM images"
        )
    for path in images:
        yield Entry(
            path, _name(path, root), split, files.nfc(folder.name), home=_name(folder, root),
            is_dicom=files.is_dicom(path),
        )  # fmt: skip


def _twins(folder: Path | None, log: Log) -> dict[str, Path]:
    """Every image below masks/ (or organs/) by its place in it."""
    if folder is None:
        return {}
    return {_twin(p.relative_to(folder)): p for p in _below(folder, folder.parent, log)}


def _twin(place: Path) -> str:
    """What an image and its mask have in common, however they are spelt."""
    return files.nfc(place.with_suffix(place.suffix.lower()).as_posix())


def _with_masks(entries: list[Entry], twins: dict[str, dict[str, Path]], log: Log) -> list[Entry]:
    """The entries with their masks: the same path under masks/ or organs/, in PNG or as the image.

    Masks of which none belongs to an image were meant to.
    """
    found = []
    for e in entries:
        place = Path(e.name)
        names = [_twin(place.with_suffix(".png")), _twin(place)]
        mask, organ = (next((twins[k][n] for n in names if n in twins[k]), None)
                       for k in ("masks", "organs"))  # fmt: skip
        found.append(e._replace(mask=mask, organ=organ))
    for kind, used in (("masks", {e.mask for e in found}), ("organs", {e.organ for e in found})):
        spare = len(set(twins[kind].values()) - used)
        if spare and spare == len(twins[kind]):
            log.problems.append(f"{kind}: none of {spare} files belongs to an image; name them "
                                f"{kind}/<path of the image>, or move them away")  # fmt: skip
        elif spare:
            log.notes.append(f"{kind}: {spare} belong to no image, ignored")
    return found


def check_split_folders(folders: list[Path], log: Log) -> None:
    """Train and test are there, and no split twice."""
    names = defaultdict(list)
    for f in folders:
        names[_split(f)].append(f.name)
    for split in ("train", "test"):
        if split not in names:
            has = ", ".join(f.name for f in folders)
            log.problems.append(f"{split}: no such split folder beside {has}; add it")
    for split, twice in names.items():
        if len(twice) > 1:
            log.problems.append(f"{' and '.join(twice)}: both are split {split}; merge them")


def _listing(folder: Path, root: Path, log: Log) -> tuple[list[Path], list[Path]]:
    """Sub-folders and image files in `folder`, sorted; other files are counted in notes."""
    try:
        found = files.listing(folder)
    except OSError as e:
        log.problems.append(f"{_name(folder, root)}: cannot be listed: {e.strerror}")
        return [], []
    log.passed.append(found.passed)
    own = sum(files.named(folder, name) is not None for name in OWN_FILES) if folder == root else 0
    if other := found.other - own:  # never by name: notes reach the report
        what = f"{other} file{'s' if other > 1 else ''} ignored: no JPEG, PNG or DICOM"
        log.notes.append(what if folder == root else f"{_name(folder, root)}: {what}")
    return found.folders, found.images


def _below(folder: Path, root: Path, log: Log) -> list[Path]:
    """Image files at any depth in `folder`, sorted."""
    try:
        found = files.walk(folder)
    except OSError as e:
        log.problems.append(f"{_name(folder, root)}: cannot be listed: {e.strerror}")
        return []
    log.passed.append(found.passed)
    return found.images


def _name(path: Path, root: Path) -> str:
    """`path` relative to `root`, with forward slashes."""
    return path.relative_to(root).as_posix()


# --- published data sets -----------------------------------------------------------------------


def _covid_qu_ex(base: Path, log: Log) -> Found | None:
    """COVID-QU-Ex (Kaggle anasmohammedtahir/covidqu): lung masks for all, infection masks for some.

    `{Lung,Infection} Segmentation Data` (twice nested) / {Train,Val,Test} / <class> /
    {images,lung masks,infection masks}. The lung part is all of it; given the infection part
    alone, that is the data set.
    """
    lung, infection = (_nested(base / f"{k} Segmentation Data") for k in ("Lung", "Infection"))
    main = lung or infection or base
    if next(main.glob("*/*/lung masks"), None) is None:
        return None
    lesions = {}
    for part in filter(None, (infection, main)):
        for path in part.glob("*/*/infection masks/*"):
            lesions[files.nfc(path.parts[-3]), files.nfc(path.name)] = path
    entries = []
    folders = [f for f in _visible(main) if f.is_dir() and _split(f)]
    for images in sorted(p for f in folders for p in f.glob("*/images") if p.is_dir()):
        split, label = _split(images.parents[1]), files.nfc(images.parts[-2])
        for path in _listing(images, main, log)[1]:
            organ = images.parent / "lung masks" / path.name
            entries.append(
                Entry(
                    path,
                    _name(path, main),
                    split,
                    label,
                    home=_name(images.parent, main),
                    mask=lesions.get((label, files.nfc(path.name))),
                    organ=organ if organ.is_file() else None,
                )
            )
    check_split_folders(folders, log)
    log.notes.append("layout: COVID-QU-Ex, masks of infections; its images come from many sources")
    return Found(entries)


def _nested(folder: Path) -> Path | None:
    """`folder`, or the folder of the same name in it, as the archive has it; None if not there."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder if folder.is_dir() else None


def _lc25000(base: Path, log: Log) -> Found | None:
    """LC25000 (arXiv 1912.12142): `lung_colon_image_set/{lung,colon}_image_sets/<class>/*.jpeg`.

    Groups are the source tiles of GeorgeBatch/LC25000-clean, whose `annotations` folder or
    `lc25000_image_groups.csv` lies beside the images.
    """
    inner = base / "lung_colon_image_set"
    images = inner if inner.is_dir() else base
    folders = [f for f in images.glob("*_image_sets/*") if f.is_dir() and f.name in _LC25000]
    folders = folders or [f for f in _visible(images) if f.is_dir() and f.name in _LC25000]
    if not folders or any(map(_split, _visible(images))):
        return None
    if files.named(images, "manifest.csv"):
        return None
    tiles = _tiles(base, log)
    entries: list[Entry] = []
    for folder in sorted(folders):
        entries += _class_folder(folder, "", images, log)
    if not tiles:
        return Found(entries, leaky=(
            "LC25000 holds about 20 turned copies of each of 1,250 tiles: put folder annotations "
            "of GeorgeBatch/LC25000-clean beside the images, so that a tile's copies stay together"
        ))  # fmt: skip
    entries = [e._replace(owner=tiles.get((e.label, e.path.stem), "")) for e in entries]
    if lost := sum(not e.owner for e in entries):
        log.problems.append(f"{lost} images are in no tile of LC25000-clean: take the whole list")
    log.notes.append("layout: LC25000; patients are not known, only tiles")
    return Found(entries, "source tiles of LC25000-clean")


def _tiles(base: Path, log: Log) -> dict[tuple[str, str], str]:
    """Tile of each (class, file stem), from either form in which LC25000-clean publishes them."""
    tiles: dict[tuple[str, str], str] = {}
    around = (base, base.parent, base.parent.parent)
    for place in (p for a in around for p in (a, a / "LC25000-clean")):
        lists = sorted(place.glob("annotations/*/UNI/resize_only/final_clusters.csv"))
        for name in ("lc25000_image_groups.csv", "kaggle/lc25000_image_groups.csv"):
            lists += [place / name] if (place / name).is_file() else []
        for path in lists:
            for row in manifests.read(path, log).rows:
                file = Path(row.get("img_path") or row.get("filename") or "")
                label = row.get("label") or file.parent.name
                tile = row.get("cluster_label") or row.get("local_cluster_label") or ""
                tiles[label, file.stem] = f"{label}/{tile}" if tile else ""
        if tiles:
            return tiles
    return tiles


def _alzheimer(base: Path, log: Log) -> Found | None:
    """The Kaggle set uraninjo/augmented-alzheimer-mri-dataset: its original images.

    Augmented copies do not say what they are copies of, so they are never mixed with the others.
    """
    if base.resolve().name == _AUGMENTED:
        return Found(_walk(base, log), leaky=(
            f"{_AUGMENTED} holds copies of unknown sources: give {_ORIGINAL}"
        ))  # fmt: skip
    if not (base / _ORIGINAL).is_dir():
        return None
    if (base / _AUGMENTED).is_dir():
        log.notes.append(f"{_AUGMENTED}: copies of unknown sources, ignored")
    log.notes.append("layout: Alzheimer MRI; subjects are not known, so slices of one may be apart")
    return Found(_walk(base / _ORIGINAL, log))


def _eyes(entries: list[Entry]) -> Found:
    """The Kaggle set gunavenkatdoddi/eye-diseases-classification: two eyes are one patient.

    `<number>_left.jpg` and `<number>_right.jpg`; a number that two classes share stays together
    too, which is right for one of the set's sources and cautious for the others.
    """
    eye = re.compile(r"_?(\d+)_(?:left|right)")
    owners = [eye.fullmatch(e.path.stem) for e in entries]
    named = [e._replace(owner=m[1]) if m else e for e, m in zip(entries, owners, strict=True)]
    return Found(named, "left and right eye of one number" if any(owners) else "")


def one_patient_a_class(entries: Iterable[Entry]) -> bool:
    """Whether DICOM class folders look like patients' folders, whose names must go nowhere."""
    owners, homes = defaultdict(set), defaultdict(set)
    for e in entries:
        if not e.is_dicom or not e.owner:
            return False
        owners[e.label].add(e.owner)
        homes[e.owner].add(e.label)
    alone = [len(o) == 1 for o in owners.values()] + [len(h) == 1 for h in homes.values()]
    return len(owners) > 1 and bool(np.all(alone))
