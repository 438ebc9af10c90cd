"""A data set written anew as plain PNG files that say nothing but their pixels.

Everything is written into `<folder>.part`, which becomes `<folder>` when it is whole. A file's name
is the hash of its pixels, so what an interrupted run left behind is right wherever it is.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from edgekd.data import dataset, preprocess
from edgekd.records import (
    EdgeKDError,
    Stored,
    Track,
    locked,
    make_folder,
    untracked,
    versions,
    write_atomic,
)

_CLAIM = ".source"  # holds the source's fingerprint while the folder is not finished
_NAME = 32  # hex digits of a sha256 that name a file


class Prepared(Stored):
    """What a prepared folder holds and how it came about: `prepared.json`, written last."""

    FILE: ClassVar[str] = "prepared.json"
    classes: tuple[str, ...]
    images: dict[str, int]  # split -> how many
    groups: int
    source_fingerprint: str  # of the data set that was read
    split_rule: str
    versions: dict[str, str]


class _Row(NamedTuple):
    """An image of the manifest."""

    file: str  # <split>/<class>/<hash>.png
    split: str
    label: str
    group: str
    subgroup: str


def prepare(dataset: dataset.Dataset, folder: Path, *, track: Track = untracked) -> Prepared:
    """Write the data set to `folder`: images, masks, organs, manifest.csv and prepared.json.

    Done before from the same source, it is kept. EdgeKDError if the folder is something else's, or
    if images say that text is burned into their pixels.
    """
    if dataset.burned_in:
        raise EdgeKDError(
            f"{dataset.burned_in} DICOM images have text burned in (BurnedInAnnotation YES), maybe "
            "a name: blank it and state NO, or leave them out"
        )
    with locked(folder):
        return _made(dataset, folder) or _written(dataset, folder, track)


def _written(dataset: dataset.Dataset, folder: Path, track: Track) -> Prepared:
    """The folder, written under another name, which it goes on with, and then renamed."""
    part = folder.with_name(folder.name + ".part")
    _claim(dataset, part)
    todo = [(split, s) for split, samples in dataset.splits.items() for s in samples]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = pool.map(lambda one: _write(part, dataset.classes, *one), todo)
        rows = sorted(set(track(written, "writing images", len(todo))))
    rows = list({r.file: r for r in reversed(rows)}.values())[::-1]  # copies: one file, one row
    with io.StringIO() as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("file", "split", "class", "group", "subgroup"))
        writer.writerows(rows)
        write_atomic(part / "manifest.csv", table.getvalue())
    (part / _CLAIM).unlink()
    prepared = Prepared(
        classes=dataset.classes,
        images={s: sum(r.split == s for r in rows) for s in dataset.splits},
        groups=len({r.group for r in rows}),
        source_fingerprint=dataset.fingerprint,
        split_rule=dataset.split_rule,
        versions=versions("numpy", "pillow", "pydicom", "pylibjpeg"),
    ).save(part)
    if folder.exists():
        folder.rmdir()  # empty, as was seen at the start
    part.rename(folder)
    return prepared


def _made(dataset: dataset.Dataset, folder: Path) -> Prepared | None:
    """The finished folder's record; None if there is no folder, or an empty one."""
    if (folder / Prepared.FILE).is_file():
        made = Prepared.load(folder)
        if made.source_fingerprint == dataset.fingerprint:
            return made
        raise EdgeKDError(f"{folder} was prepared from other data or splits: choose a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EdgeKDError(f"{folder} is not empty: choose a new folder")
    return None


def _claim(dataset: dataset.Dataset, part: Path) -> None:
    """Begin or go on with `part`; EdgeKDError if it was begun from other data."""
    mark = make_folder(part) / _CLAIM
    if mark.is_file() and mark.read_text("utf-8") != dataset.fingerprint:
        raise EdgeKDError(f"{part} was begun from other data: delete it, or choose another folder")
    if not mark.is_file() and any(part.iterdir()):
        raise EdgeKDError(f"{part} is not a prepared folder that was begun: move it away")
    write_atomic(mark, dataset.fingerprint)


def _write(part: Path, classes: tuple[str, ...], split: str, sample: dataset.Sample) -> _Row:
    """Write one image and its masks, those that are not there yet."""
    image = preprocess.decoded(dataset.source(sample))
    shape = f"{image.mode} {image.width} {image.height} "
    name = hashlib.sha256(shape.encode() + image.tobytes()).hexdigest()[:_NAME]
    label = classes[sample.label]
    file = f"{split}/{label}/{name}.png"
    _save(part / file, image)
    for kind, path in (("masks", sample.mask), ("organs", sample.organ)):
        if path is not None:
            inside = preprocess.inside(path).astype(np.uint8) * 255
            _save(part / kind / file, Image.fromarray(inside))
    return _Row(file, split, label, sample.group[:16], sample.subgroup)


def _save(path: Path, image: Image.Image) -> None:
    """Write a PNG of the pixels alone: no EXIF, no colour profile, no text."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as content:
        Image.fromarray(np.asarray(image)).save(content, "PNG")
        write_atomic(path, content.getvalue())
