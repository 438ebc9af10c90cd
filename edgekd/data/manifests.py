"""Tables of images, CSV or Parquet: where each image is, what it shows and of whom."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekd.data import files
from edgekd.records import read_text

SUFFIXES = (".csv", ".tsv", ".parquet")
SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLIT_OF |= {"validation": "val", "test": "test", "testing": "test"}
# A column's names, the first one there counts; as `read` has them: `Patient ID` is patient_id.
PATH = ("path", "file", "filename", "file_name", "image", "image_path", "image_file")
LABEL = ("label", "class")
GROUP = ("patient_id", "patientid", "patient", "subject_id", "subject", "group", "tile_cluster")
_DELIMITERS = ",;\t|"


class Log(NamedTuple):
    """What is gathered on the way through a data set."""

    problems: list[str]
    notes: list[str]
    passed: list[int]  # hidden, temporary and system files, by folder


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


class Table(NamedTuple):
    """A table's text."""

    columns: tuple[str, ...] = ()  # in small letters, words joined by _
    rows: tuple[dict[str, str], ...] = ()
    lines: tuple[int, ...] = ()  # where each row begins, as an editor numbers them


def read(path: Path, log: Log) -> Table:
    """A table, every value as stripped text in NFC; problems go to `log`, and then it is empty."""
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "UTF-8 CSV"
    try:
        rows = list(_parquet(path) if kind == "Parquet" else _csv(path, log))
    except ModuleNotFoundError:
        fix = "pip install 'edgekd[parquet]', or save it as CSV"
        log.problems.append(f"{path.name} needs pyarrow: {fix}")
        return Table()
    except (OSError, UnicodeError, csv.Error, ValueError) as e:
        why, fix = type(e).__name__, "save it as CSV UTF-8 again"
        log.problems.append(f"{path.name}: cannot be read as {kind}: {why}; {fix}")
        return Table()
    if not rows:
        return Table()
    written = [_text(c) for c in rows[0][1]]
    columns = [re.sub(r"[\s-]+", "_", c.casefold()) for c in written]
    if columns != written:
        log.notes.append(f"{path.name}: its columns are read as {', '.join(filter(None, columns))}")
    if twice := sorted({c for c in columns if c and columns.count(c) > 1}):
        log.problems.append(f"{path.name}: column {twice[0]} is there twice; remove one")
        return Table()
    kept = [(n, [_text(v) for v in values]) for n, values in rows[1:]]
    kept = [(n, values) for n, values in kept if any(values)]
    for n, values in kept:
        if any(values[len(columns) :]):
            log.problems.append(
                f"{path.name} row {n}: {len(values)} values for {len(columns)} columns; put a "
                "value that holds the delimiter in quotes"
            )
    full = [dict(zip(columns, [*values, *[""] * len(columns)], strict=False)) for _, values in kept]
    return Table(tuple(columns), tuple(full), tuple(n for n, _ in kept))


def _csv(path: Path, log: Log) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of each row that is not blank, the header first."""
    text = read_text(path)
    head = text.lstrip("\r\n").partition("\n")[0]
    told = head[4:5] if head.lower().startswith("sep=") else ""  # a line that Excel understands
    try:
        delimiter = told or csv.Sniffer().sniff(head, _DELIMITERS).delimiter
    except csv.Error:
        delimiter = ","
    if delimiter != ",":
        name = {"\t": "tabs", ";": "semicolons"}.get(delimiter, f'"{delimiter}"')
        log.notes.append(f"{path.name}: its columns are separated by {name}")
    reader, began, first = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 1, True
    for values in reader:
        if values and not (first and told):
            yield began, values
        first, began = first and not values, reader.line_num + 1


def _parquet(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """The same of a Parquet file, the first row of values being 2."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    yield 1, list(table.column_names)
    columns = [c.to_pylist() for c in table.columns]
    yield from ((n, list(values)) for n, values in enumerate(zip(*columns, strict=True), 2))


def _text(value: object) -> str:
    missing = value is None or value != value  # NaN is not itself
    return "" if missing else files.nfc(str(value)).strip()


def _column(columns: Iterable[str], names: tuple[str, ...]) -> str:
    """The first of `names` that is a column, or ""."""
    return next((n for n in names if n in columns), "")


def _owner(row: dict[str, str], column: str, label: str) -> str:
    """The row's group; tiles are numbered within their class, patients are not."""
    value = row.get(column, "")
    return f"{label}/{value}" if value and column == "tile_cluster" else value


def annotated(root: Path, entries: list[Entry], log: Log) -> tuple[list[Entry], str]:
    """The entries with group and subgroup of `root`/manifest.csv; and what the groups are."""
    path = files.named(root, "manifest.csv")
    if path is None or not entries:
        return entries, ""
    columns, rows, _ = read(path, log)
    column, where = _column(columns, GROUP), _column(columns, PATH)
    if not columns:
        return entries, ""
    if not column:
        log.notes.append("manifest.csv: no column patient_id or group, so each image stands alone")
    elif not where:
        log.problems.append("manifest.csv: no column file (path relative to this folder)")
        return entries, ""
    by_name = {files.nfc(e.name): e for e in entries}
    owners: dict[str, str] = {}
    subgroups: dict[str, str] = {}
    elsewhere = 0  # rows with another split than the folder's
    for row in rows:
        name = _place(row.get(where, ""))
        if name not in by_name:
            continue
        e = by_name[name]
        owner = _owner(row, column, e.label)
        if owner and owners.setdefault(name, owner) != owner:
            shown = f"{e.home} DICOM file" if e.is_dicom else name
            log.problems.append(f"{shown}: in manifest.csv twice, with different {column}")
        subgroups[name] = row.get("subgroup", "")
        elsewhere += SPLIT_OF.get(row.get("split", "").casefold(), e.split) != e.split
    if where and not subgroups:
        log.problems.append(
            f"manifest.csv: none of its {len(rows)} rows names an image; column {where} is the "
            "path relative to this folder, such as <class>/<image>"
        )
        return entries, ""
    if lost := sum(_place(row.get(where, "")) not in by_name for row in rows):
        log.notes.append(f"manifest.csv: {lost} of {len(rows)} rows name no image, ignored")
    if elsewhere:
        log.notes.append(f"manifest.csv: {elsewhere} rows have another split than the folders, "
                         "which count; its own would if it were given instead")  # fmt: skip
    if column and (alone := len(by_name) - len(owners)):
        log.notes.append(f"manifest.csv: no {column} for {alone} images, each stands alone")
    filled = []
    for e in entries:
        name = files.nfc(e.name)
        owner, subgroup = owners.get(name, ""), subgroups.get(name, "")
        filled.append(e._replace(owner=owner, subgroup=subgroup))
    return filled, f"column {column} of manifest.csv" if owners else ""


def _place(path: str) -> str:
    """A path of a table as `Entry.name` has it, in NFC."""
    return posixpath.normpath(path.replace("\\", "/"))


def find(path: Path, log: Log) -> tuple[list[Entry], str]:
    """The images that a table lists; and what their groups are.

    Columns `path` (or `file`; relative to the table's folder), `label` (or `class`), and where
    there are any `split`, `patient_id` (or `group`), `subgroup`, `mask`.
    """
    columns, rows, lines = read(path, log)
    where, label_column, group = (_column(columns, n) for n in (PATH, LABEL, GROUP))
    if columns and not (where and label_column):
        has = ", ".join(columns)
        log.problems.append(f"{path.name} has columns {has}; path and label are expected")
    if not (where and label_column):
        if not (columns or log.problems):
            log.problems.append(f"{path.name} is empty; columns path and label are expected")
        return [], ""
    entries: dict[str, Entry] = {}
    known: dict[Path, dict[str, Path]] = {}
    for number, row in zip(lines, rows, strict=True):
        name, label = _place(row[where]), row[label_column]
        file = files.on_disk(path.parent / name, known)
        mask = files.on_disk(path.parent / _place(row["mask"]), known) if row.get("mask") else None
        if wrong := _wrong(row, file, label, name in entries):
            log.problems.append(f"{path.name} row {number}: {wrong}")
            continue
        entries[name] = Entry(
            file, name, SPLIT_OF.get(row.get("split", "").casefold(), ""), label,
            home=f"row {number}", owner=_owner(row, group, label),
            subgroup=row.get("subgroup", ""), mask=mask, is_dicom=files.is_dicom(file),
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
    used = group and any(e.owner for e in entries.values())
    known_as = f"column {group} of {path.name}" if used else "patients of the DICOM files"
    return list(entries.values()), known_as if used or dicoms else ""


def _wrong(row: dict[str, str], file: Path, label: str, again: bool) -> str:
    """What is wrong with a row, or ""; without the file's name, which may hold a patient's."""
    if wrong := files.wrong_class(label):
        return wrong
    if again:
        return "the same path as a row before"
    split = row.get("split", "")
    if split and split.casefold() not in SPLIT_OF:
        return f'split "{split}"; expected train, val or test'
    return "" if files.is_there(file) else "no such file"
