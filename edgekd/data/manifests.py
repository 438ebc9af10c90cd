"""Tables of images, CSV or Parquet: where each image is, what it shows and of whom."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

SUFFIXES = (".csv", ".parquet")
SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLIT_OF |= {"validation": "val", "test": "test", "testing": "test"}
PATH = ("path", "file")  # a column's names, the first one there counts
LABEL = ("label", "class")
GROUP = ("patient_id", "group", "tile_cluster")
_IMAGES = (".jpg", ".jpeg", ".png")


class Log(NamedTuple):
    """What is gathered on the way through a data set."""

    problems: list[str]
    notes: list[str]


class Entry(NamedTuple):
    """An image by its place, and then what its bytes and those of its masks say."""

    path: Path  # the file
    name: str  # path relative to the root, with /
    split: str  # "": to be dealt
    label: str  # class name
    home: str = ""  # where it lies, in words that name no file
    owner: str = ""  # raw group: a patient, a tile; "": alone. Never shown, never written
    subgroup: str = ""  # of patients, to judge apart: a sex, a scanner
    mask: Path | None = None  # of the lesion
    organ: Path | None = None  # mask of the organ
    inside: str = ""  # array and index in an .npz file
    is_dicom: bool = False
    # known when the file has been read:
    digest: str = ""  # sha256 of its bytes; "": not usable
    group: str = ""  # opaque
    grey: bool = True
    waves: np.ndarray | None = None  # (32, 32) float16, see leakage.waves
    remark: str = ""  # what is worth knowing, counted over the data set
    problem: str = ""

    @property
    def shown(self) -> str:
        """A name for a message: a DICOM file's own may hold a patient's, so the hash stands in."""
        return f"{self.home} DICOM file {self.digest[:12]}" if self.is_dicom else self.name


def read(path: Path, log: Log) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """(columns, rows) of a table, every value as stripped text; problems go to `log`."""
    try:
        if path.suffix == ".parquet":
            try:
                import pyarrow.parquet as parquet
            except ModuleNotFoundError:
                fix = "pip install 'edgekd[parquet]', or save it as CSV"
                log.problems.append(f"{path.name} needs pyarrow: {fix}")
                return (), []
            table = parquet.read_table(path)
            columns, rows = tuple(table.column_names), table.to_pylist()
        else:
            with path.open(encoding="utf-8-sig", newline="") as f:
                reader = csv.DictReader(f)
                columns, rows = tuple(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as e:
        kind = "Parquet" if path.suffix == ".parquet" else "UTF-8 CSV"
        log.problems.append(f"{path.name}: cannot be read as {kind}: {type(e).__name__}")
        return (), []
    return columns, [{k: _text(v) for k, v in row.items() if k is not None} for row in rows]


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value).strip()  # NaN is not itself


def _column(columns: Iterable[str], names: tuple[str, ...]) -> str:
    """The first of `names` that is a column, or ""."""
    return next((n for n in names if n in columns), "")


def _owner(row: dict[str, str], column: str, label: str) -> str:
    """The row's group; tiles are numbered within their class, patients are not."""
    value = row.get(column, "")
    return f"{label}/{value}" if value and column == "tile_cluster" else value


def annotated(root: Path, entries: list[Entry], log: Log) -> tuple[list[Entry], str]:
    """The entries with group and subgroup of `root`/manifest.csv; and what the groups are."""
    path = root / "manifest.csv"
    if not path.is_file():
        return entries, ""
    columns, rows = read(path, log)
    column = _column(columns, GROUP)
    if not columns:
        return entries, ""
    if not column:
        log.notes.append("manifest.csv: no column patient_id or group, so each image stands alone")
    elif "file" not in columns:
        log.problems.append("manifest.csv: no column file (path relative to this folder)")
        return entries, ""
    by_name = {e.name: e for e in entries}
    owners: dict[str, str] = {}
    subgroups: dict[str, str] = {}
    for row in rows:
        name = PurePosixPath(row.get("file", "").replace("\\", "/")).as_posix()
        if name not in by_name:
            continue
        e = by_name[name]
        owner = _owner(row, column, e.label)
        if owner and owners.setdefault(name, owner) != owner:
            shown = f"{e.home} DICOM file" if e.is_dicom else name
            log.problems.append(f"{shown}: in manifest.csv twice, with different {column}")
        subgroups[name] = row.get("subgroup", "")
    if column and (alone := len(by_name) - len(owners)):
        log.notes.append(f"manifest.csv: no {column} for {alone} images, each stands alone")
    filled = [e._replace(owner=owners.get(e.name, ""), subgroup=subgroups.get(e.name, ""))
              for e in entries]  # fmt: skip
    return filled, f"column {column} of manifest.csv" if column else ""


def find(path: Path, log: Log) -> tuple[list[Entry], str]:
    """The images that a table lists; and what their groups are.

    Columns `path` (or `file`; relative to the table's folder), `label` (or `class`), and where
    there are any `split`, `patient_id` (or `group`), `subgroup`, `mask`.
    """
    from edgekd.data import dicom

    columns, rows = read(path, log)
    where, label_column, group = (_column(columns, n) for n in (PATH, LABEL, GROUP))
    if columns and not (where and label_column):
        has = ", ".join(columns)
        log.problems.append(f"{path.name} has columns {has}; path and label are expected")
    if not (where and label_column):
        return [], ""
    entries: dict[str, Entry] = {}
    for number, row in enumerate(rows, 2):  # as an editor numbers the lines
        name, label = row[where].replace("\\", "/"), row[label_column]
        file = path.parent / name
        mask = path.parent / row["mask"] if row.get("mask") else None
        is_dicom = file.suffix.lower() not in _IMAGES and dicom.looks_like(file)
        if wrong := _wrong(row, file, label, name in entries):
            log.problems.append(f"{path.name} row {number}: {wrong}")
            continue
        entries[name] = Entry(
            file, name, SPLIT_OF.get(row.get("split", "").lower(), ""), label,
            home=f"row {number}", owner=_owner(row, group, label),
            subgroup=row.get("subgroup", ""), mask=mask, is_dicom=is_dicom,
        )  # fmt: skip
    given = {e.split for e in entries.values()} - {""}
    if given and (lacking := {"train", "test"} - given):
        log.problems.append(f"{path.name}: no row has split {' or '.join(sorted(lacking))}")
    dealt = sum(not e.split for e in entries.values())
    if 0 < dealt < len(entries):
        log.problems.append(f"{path.name}: {dealt} rows have no split: give one to all or to none")
    if not rows:
        log.problems.append(f"{path.name} has no rows")
    dicoms = any(e.is_dicom for e in entries.values())
    known = f"column {group} of {path.name}" if group else "patients of the DICOM files"
    return list(entries.values()), known if group or dicoms else ""


def _wrong(row: dict[str, str], file: Path, label: str, again: bool) -> str:
    """What is wrong with a row, or ""; without the file's name, which may hold a patient's."""
    if not label:
        return "no label"
    if label.startswith(".") or "/" in label or "\\" in label:
        return f'label "{label}" cannot be a folder\'s name'
    if again:
        return "the same path as a row before"
    split = row.get("split", "")
    if split and split.lower() not in SPLIT_OF:
        return f'split "{split}"; expected train, val or test'
    return "" if file.is_file() else "no such file"
