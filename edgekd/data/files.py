"""Which files of a folder are images: one rule for every command; and names as systems vary them.

Operating systems, NAS boxes, archives and editors leave files behind that have an image's suffix
and are none of the user's. They are passed over by name, and counted.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from edgekd.data import dicom

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp")
SUFFIXES = (*JPEG, ".png")
OWN = (".phantom.json",)  # hidden files of edgekd itself: nobody need hear of them
LONGEST = 255  # bytes of a name on every common file system
_HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # of files without a suffix
_DIRECTORY = "dicomdir"  # lists the images of a medium, is none
_LITTER = re.compile(
    r"\.|~\$|~syncthing~|:2e|synophoto_|synoindex_|"  # hidden; Office; netatalk; Synology
    r"thumbs\.db|ehthumbs|desktop\.ini$|icon\r$|"
    r"(__macosx|__pycache__|resource\.frk|lost\+found|system volume information|"
    r"\$recycle\.bin|recycle[rd]|found\.\d{3}|network trash folder|temporary items|"
    r"thevolumesettingsfolder|[@#]recycle|@eadir|@tmp|[#~]snapshot|@recently-snapshot|"
    r"@appdata|@sharebin|\$extend|lost\.dir|msocache)$|"
    r".*(~|:zone\.identifier|@syno\w+|\.(part|partial|filepart|crdownload|download|opdownload|"
    r"aria2|!ut|!qb|sb-\w{8}-\w{6}|tmp|temp|bak|orig|sw[op]|icloud|lnk))$"
)


class Listing(NamedTuple):
    """What lies in a folder, by name."""

    folders: list[Path]
    images: list[Path]  # broken links among them: an image is missing
    other: int  # files that are no image
    passed: int  # litter, link loops, pipes, sockets and devices


def listing(folder: Path) -> Listing:
    """What lies in `folder`; OSError if it cannot be listed. No pipe or device is opened."""
    found, other, passed = Listing([], [], 0, 0), 0, 0
    with os.scandir(folder) as inside:
        entries = sorted(inside, key=lambda e: e.name)
    for entry in entries:
        path = Path(entry.path)
        at = path if entry.is_symlink() else entry  # only Path is calm about a link to itself
        if is_litter(entry.name):
            passed += entry.name not in OWN
        elif at.is_dir():
            if at is path and folder.resolve().is_relative_to(path.resolve()):
                passed += 1  # a link to a folder that it lies in
            else:
                found.folders.append(path)
        elif at.is_file():
            if is_image(path):
                found.images.append(path)
            else:
                other += 1
        elif at is path and not path.exists() and _known(path):
            found.images.append(path)
        else:
            passed += 1
    return found._replace(other=other, passed=passed)


def walk(folder: Path) -> Listing:
    """The images at any depth, no folder twice whatever links say; OSError as `listing`."""
    images, other, passed = [], 0, 0
    todo, seen = [folder], {folder.resolve()}
    while todo:
        here = listing(todo.pop())
        images += here.images
        fresh = [f for f in here.folders if not f.is_symlink() or f.resolve() not in seen]
        seen.update(f.resolve() for f in fresh)
        todo += fresh
        other += here.other
        passed += here.passed + len(here.folders) - len(fresh)
    return Listing([], sorted(images), other, passed)


def is_there(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes is none, and no error."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_litter(name: str) -> bool:
    """Whether a file or folder of that name is a system's or an editor's own."""
    return bool(_LITTER.match(name.lower()))


def is_image(path: Path) -> bool:
    """Whether a file is one, by its suffix; by its first bytes where the suffix says nothing."""
    if path.name.lower().partition(";")[0] == _DIRECTORY:
        return False
    if _known(path):
        return True
    try:
        with path.open("rb") as f:
            head = f.read(132)
    except OSError:
        return False
    return dicom.is_dicom(head) or (not path.suffix and head.startswith(_HEADS))


def is_dicom(path: Path) -> bool:
    """Whether an image's suffix or first bytes say DICOM."""
    return not _plain(path) and dicom.looks_like(path)


def _known(path: Path) -> bool:
    return _plain(path) or path.suffix.lower() in dicom.SUFFIXES


def _plain(path: Path) -> bool:
    """Whether the suffix is of JPEG or PNG; some drivers show `x.png;1` of a CD."""
    return path.suffix.lower().partition(";")[0] in SUFFIXES


def passed_over(count: int) -> str:
    """What a note says of litter."""
    things = "file or folder" if count == 1 else "files and folders"
    return f"{count} hidden, temporary or system {things} passed over"


# --- names -------------------------------------------------------------------------------------


def nfc(name: str) -> str:
    """A name as tables spell it: macOS unpacks archives with accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def named(folder: Path, name: str) -> Path | None:
    """The file in `folder` that is called `name` in any case; None if there is none."""
    exact = folder / name
    if exact.is_file():
        return exact
    try:
        inside = [p for p in folder.iterdir() if nfc(p.name).casefold() == name.casefold()]
    except OSError:
        return None
    return next((p for p in sorted(inside) if p.is_file()), None)


def on_disk(path: Path, known: dict[Path, dict[str, Path]]) -> Path:
    """`path`, or the one whose names differ from it by their normal form alone.

    known: folders listed before, filled here.
    """
    if os.path.lexists(path) or path == path.parent or path.name == "..":
        return path
    folder = on_disk(path.parent, known)
    if folder not in known:
        try:
            known[folder] = {nfc(p.name): p for p in folder.iterdir()}
        except OSError:
            known[folder] = {}
    return known[folder].get(nfc(path.name), folder / path.name)


def wrong_class(label: str) -> str:
    """Why a class cannot be called that, or "": prepared images lie in a folder of its name."""
    if not label:
        return "no label"
    if label.startswith(".") or "/" in label or "\\" in label:
        return f'label "{label}" cannot be a folder\'s name'
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in label):
        return f"label {label!r} has a line break or what is no character: write it on one line"
    if (size := len(label.encode())) > LONGEST:
        return f'label "{label[:40]}..." has {size} bytes, {LONGEST} are a folder\'s name at most'
    return ""


def printable(text: str) -> str:
    """`text` on one line: names of files may hold line breaks and bytes of no alphabet."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in text
    )
