"""Do all commands see the same files of a folder, and does what `data check` passes train?

Makes folders and tables around what systems, archives and editors leave behind or write otherwise,
and around splits that are none. Exit 1 if anything ended in another error than one line of
EdgeKD's, hung, was seen by one command alone, or passed the check and could not be prepared or
trained.
"""

from __future__ import annotations

import collections
import io
import os
import signal
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from workbench import arguments, keep

from edgekd import data
from edgekd.cli import device
from edgekd.data import deidentify
from edgekd.records import EdgeKDError, Spec, Training

LIMIT_S = 60  # for one folder; what takes longer hangs
SPLITS = (("train", "val", "test"), ("Training", "VALID", "Testing"), ("train", "test"), ("train",))
CLASSES = ("normal", "tumour", "Normal", "b\xe9nin", "be\u0301nin", "gr\xfcn \u80ba", "x" * 250,
           "x" * 90 + "\xe9" * 90, "a b", "1", "a,b", "#1", "a\nb", "train", "..x")  # fmt: skip
SUFFIXES = (".png", ".png", ".PNG", ".jpg", ".JPEG", ".jpe", ".Jfif", ".jif", "", ".dcm", ".DIC")
LITTER = (
    "__MACOSX/{}", "@eaDir/{}/SYNOPHOTO_THUMB_M.jpg", ".Trash-1000/files/{}", "$RECYCLE.BIN/{}",
    "System Volume Information/{}", "#recycle/{}", ".AppleDouble/{}", ".snapshot/{}",
    "lost+found/{}", ".git/{}", ".ipynb_checkpoints/{}", "._{}", "Thumbs.db", "desktop.ini",
    ".DS_Store", "~${}", "{}~", "{}.part", "{}.crdownload", "{}.tmp", "{}.bak", ".{}.swp",
    "{}:Zone.Identifier", "SYNOPHOTO_THUMB_XL.jpg", "Icon\r", "README", "notes.txt", "DICOMDIR",
)  # fmt: skip
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252")
TRAINED = "test_efficientnet.r160_in1k"  # of timm, without weights


class Made(NamedTuple):
    """A folder or table, and what was drawn for it."""

    source: Path
    folder: Path
    said: tuple[str, ...]


class Drawn:
    """Choices of one seed, remembered."""

    def __init__(self, seed: int) -> None:
        self.rng, self.said = np.random.default_rng(seed), list[str]()

    def one(self, what: str, of: Any) -> Any:
        """One of `of`."""
        chosen = of[int(self.rng.integers(len(of)))]
        self.said.append(f"{what} {chosen!r}"[:80])
        return chosen

    def chance(self, p: float) -> bool:
        """True in a share `p` of cases."""
        return bool(self.rng.random() < p)


def picture(rng: np.random.Generator, suffix: str, patient: str) -> bytes:
    """An image file of 20 x 20 pixels."""
    pixels = rng.integers(0, 256, (20, 20), np.uint8)
    with io.BytesIO() as out:
        if suffix.lower() in (".dcm", ".dic"):
            return dicom(pixels, patient)
        kind = "PNG" if suffix.lower() in (".png", "") else "JPEG"
        Image.fromarray(pixels).save(out, kind)
        return out.getvalue()


def dicom(pixels: np.ndarray, patient: str) -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset

    ds, ds.file_meta = Dataset(), FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.PatientID, ds.PhotometricInterpretation, ds.SamplesPerPixel = patient, "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = pixels.tobytes()
    with io.BytesIO() as out:
        ds.save_as(out, enforce_file_format=True)
        return out.getvalue()


def make(seed: int, root: Path) -> Made:
    """The folder or table of a seed."""
    d = Drawn(seed)
    splits = d.one("splits", SPLITS) if d.chance(0.5) else ("",)
    count = d.one("classes", (1, 2, 2, 2, 3))
    plain = d.chance(0.5)
    classes = CLASSES[:2] if plain else tuple(d.one("class", CLASSES) for _ in range(count))
    suffix = d.one("suffix", SUFFIXES)
    most = d.one("images", (1, 2, 3, 5, 9))
    patients = d.one("patients", ("", "ANONYMOUS", "{}", "{}", "p{}"))
    images: list[Path] = []
    for split in splits:
        for label in classes:
            here = root / split / label
            try:
                here.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue  # a name that no folder has
            for _ in range(0 if d.chance(0.04) else most):
                n = len(images)
                name = d.one("name", ("{}", "{}", "{}", "\xdcb {}", "U\u0308b {}")).format(n)
                images.append(here / f"{name}{suffix}")
                images[-1].write_bytes(picture(d.rng, suffix, patients.format(n)))
    for _ in range(d.one("litter", (0, 0, 3, 8))):
        litter(d, images)
    if d.chance(0.15):
        strange(d, images, root)
    if d.chance(0.2):
        masks(d, images, root)
    source = root
    if d.chance(0.5) and images:
        source = table(d, images, root)
    return Made(source, root, tuple(d.said))


def litter(d: Drawn, images: list[Path]) -> None:
    if not images:
        return
    beside = images[int(d.rng.integers(len(images)))]
    path = beside.parents[d.one("depth", (0, 0, 1))] / d.one("litter", LITTER).format(beside.name)
    content = d.one("content", (b"", bytes(4) + b"Mac OS X", bytes(128) + b"DICM", None))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(d.rng, beside.suffix, "") if content is None else content)
    except OSError:
        return  # too long a name


def strange(d: Drawn, images: list[Path], root: Path) -> None:
    """What is no file."""
    kind = d.one("strange", ("pipe", "loop", "self", "gone", "device", "empty", "bytes", "locked"))
    where = images[0].parent if images else root
    suffix = d.one("suffix", (".png", "", ".dcm"))
    path = where / f"strange{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "self"):
        path.symlink_to(path if kind == "self" else root)
    elif kind in ("gone", "device"):
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    elif kind == "bytes":
        Path(os.fsdecode(os.fsencode(where) + b"/\xfc\n.png")).write_bytes(b"")
    else:
        path.write_bytes(b"")
        path.chmod(0o600 if kind == "empty" else 0)


def masks(d: Drawn, images: list[Path], root: Path) -> None:
    kind, form = d.one("masks", ("masks", "Masks", "organs")), d.one("form", ("NFC", "NFD"))
    for image in images[: d.one("masks", (1, 100))]:
        name = image.relative_to(root).with_suffix(d.one("suffix", (".png", ".PNG"))).as_posix()
        path = root / kind / unicodedata.normalize(form, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 255).save(path, "PNG")


def table(d: Drawn, images: list[Path], root: Path) -> Path:
    """manifest.csv in the folder, which is the source then, or a list, which is one itself."""
    own = d.chance(0.5)
    delimiter, end = d.one("delimiter", ",,,;\t|"), d.one("end", ("\n", "\r\n", "\n\n", "\n,\n"))
    form, prefix = d.one("form", ("NFC", "NFD")), d.one("prefix", ("", "", "", "./", "above/"))
    group = d.one("group", ("", "{0}", "{0}", "p", "p{1}", "p{2}"))
    split = d.one("split", ("", "", "", "train", "Val", "unknown", "{3}", "{3}"))
    head = ["file" if own else "path", "label", "patient_id", "split"]
    head = [d.one("case", (str, str, str, str.upper, str.title))(x) for x in head]
    rows = [delimiter.join(head)]
    for n, image in enumerate(images):
        name = prefix + unicodedata.normalize(form, image.relative_to(root).as_posix())
        label = image.parent.name if d.rng.random() < 0.995 else d.one("label", ("", "x" * 300))
        dealt = ("train", "val", "test")[min(2, 3 * n % len(images) * 3 // len(images))]
        rest = [x.format(n, n % 2, n % 5, dealt) for x in (group, split)]
        name = name.replace("/", "\\") if d.rng.random() < 0.01 else name
        rows.append(delimiter.join(
            f'"{x}"' if delimiter in x or "\n" in x else x for x in (name, label, *rest)
        ))  # fmt: skip
    if d.chance(0.1):
        rows.append(rows[-1])
    encoding = d.one("encoding", ENCODINGS)
    path = root / (d.one("name", ("manifest.csv", "Manifest.CSV")) if own else "list.csv")
    path.write_bytes((end.join(rows) + end).encode(encoding, "replace"))
    return root if own else path


# ---- what must hold


def tried(seed: int, folder: Path) -> Iterator[str]:
    """What became of the folder of a seed: how far it came, and what was wrong."""
    made = make(seed, folder / "source")
    found = data.inspect(made.source)
    whole: data.Dataset | None = None
    try:
        whole = data.open_dataset(made.source)
    except EdgeKDError as e:
        if "\n" in str(e):
            yield "wrong: an error of several lines"
    if (whole is None) != bool(found.problems):
        yield "wrong: check and opening do not agree"
    seen: set[str] = set()
    try:
        seen = set(device._files([str(made.folder)]))
    except EdgeKDError:
        if whole is not None:
            yield "wrong: predict sees nothing"
    if whole is None:
        yield "refused"
        return
    used = {str(s.path) for v in whole.splits.values() for s in v}
    apart = {str(made.folder / k) for k in ("masks", "Masks", "organs")}
    seen = {s for s in seen if not any(s.startswith(f"{a}/") for a in apart)}
    if used - seen or (made.source == made.folder and seen - used):
        yield f"wrong: seen by one alone: {sorted(used ^ seen)[:3]}"
    yield "passed"
    prepared = folder / "prepared"
    told = deidentify.prepare(whole, prepared)
    again = data.open_dataset(prepared)
    counts = {s: len(v) for s, v in again.splits.items()}
    if again.classes != whole.classes or counts != told.images:
        yield "wrong: prepared otherwise"
    train(whole, folder / "teacher")
    yield "trained"


def train(dataset: data.Dataset, out: Path) -> None:
    """An epoch of two images a step, and every figure of validation and test."""
    from edgekd.train import distill

    spec = Spec(classes=dataset.classes, size=(32, 32), channels="rgb")
    distill.teach(dataset, TRAINED, spec, out, training=Training(epochs=1, batch=2))


def bounded(seed: int, folder: Path) -> list[str]:
    """`tried`, within LIMIT_S; any other error is wrong."""

    def hung(*_: object) -> None:
        raise TimeoutError(f"no end within {LIMIT_S} s")

    signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT_S)
    told: list[str] = []
    try:
        told.extend(tried(seed, folder))
    except EdgeKDError as e:
        told.append(f"wrong: passed the check, and then: {e}")
    except Exception:
        told.append(f"wrong: {traceback.format_exc()}")
    finally:
        signal.alarm(0)
    return told


def swept(seeds: range, say: Callable[[str], object] = print) -> collections.Counter[str]:
    """How many folders came how far; what was wrong is said."""
    counts: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            told = bounded(seed, Path(folder))
            for line in told:
                if line.startswith("wrong"):
                    with tempfile.TemporaryDirectory() as other:
                        say(f"seed {seed}: {line}\n  {make(seed, Path(other)).said}")
        counts.update({line.partition(":")[0] for line in told})
    return counts


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--count", type=int, default=500, help="folders")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    count = 20 if given.quick else given.count
    counts = swept(range(given.first, given.first + count))
    figures = {"folders": count} | {k: counts[k] for k in ("refused", "passed", "trained", "wrong")}
    packages = ("numpy", "pillow", "pydicom", "torch", "timm")
    keep("folders", figures, [], packages=packages, quick=given.quick)
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
