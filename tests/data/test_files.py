"""What systems, archives and editors leave behind; every spelling of a name; one rule for all."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from edgekd import data
from edgekd.cli import device
from edgekd.data import files, preprocess
from edgekd.records import EdgeKDError, Profile

LITTER = (
    "__MACOSX/train/a/._0.png", "train/a/._0.png", "train/a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "train/a/SYNOPHOTO_THUMB_XL.jpg", "$RECYCLE.BIN/S-1/x.png", "#recycle/x.png",
    "System Volume Information/x.png", ".Trash-1000/files/x.png", "lost+found/x.png",
    "train/.ipynb_checkpoints/x.png", ".git/x.png", ".AppleDouble/x.png", ".snapshot/x.png",
    "train/a/~$0.png", "train/a/0.png~", "train/a/0.dcm.part", "train/a/0.crdownload",
    "train/a/0.dcm.tmp", "train/a/Thumbs.db", "train/a/DESKTOP.INI", "train/a/.DS_Store",
    "masks/train/a/._0.png", "FOUND.000/x.png", "train/@Recycle/x.png",
)  # fmt: skip
NFD = unicodedata.normalize("NFD", "bénin")
NFC = unicodedata.normalize("NFC", "bénin")


def save(path: Path, seed: int = 0, **options) -> Path:
    """A random grey image of 20 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """All three splits, two classes, three images each."""
    for n, split in enumerate(("train", "val", "test")):
        for k, label in enumerate("ab"):
            for i in range(3):
                save(tmp_path / split / label / f"{split}{i}.png", seed=100 * n + 10 * k + i)
    return tmp_path


def predicted(root: Path) -> set[str]:
    """What `predict` is going to answer."""
    return set(device._files([str(root)]))


def checked(root: Path) -> set[str]:
    """What is trained with."""
    return {str(s.path) for v in data.open_dataset(root).splits.values() for s in v}


def test_litter_is_passed_over_by_all_and_counted(root, capsys):
    for name in LITTER:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(128) + b"DICM" + b"Mac OS X")
    save(root / "masks/train/a/train0.png")
    found = data.open_dataset(root)
    assert sum(map(len, found.splits.values())) == 18
    (note,) = [n for n in found.notes if "passed over" in n]
    assert note == "24 hidden, temporary or system files and folders passed over"
    shutil.rmtree(root / "masks")
    assert predicted(root) == checked(root)
    assert "23 hidden, temporary or system files and folders passed over" in capsys.readouterr().err


@pytest.mark.parametrize("beside", ["__MACOSX/scans/._x.png", "Thumbs.db", ".DS_Store"])
def test_a_wrapped_folder_is_found_beside_litter(root, tmp_path_factory, beside):
    outer = tmp_path_factory.mktemp("outer")
    shutil.copytree(root, outer / "scans")
    (outer / beside).parent.mkdir(exist_ok=True, parents=True)
    (outer / beside).write_bytes(b"x")
    found = data.open_dataset(outer)
    assert found.notes[0] == "scans: the only folder, read as the data set"
    assert "1 hidden, temporary or system file or folder passed over" in found.notes


def test_pipes_sockets_and_loops_hang_nothing(root):
    os.mkfifo(root / "train/a/x.png")
    os.mkfifo(root / "train/a/pipe")
    (root / "train/a/null.png").symlink_to("/dev/zero")
    (root / "train/a/up").symlink_to(root / "train")
    (root / "self").symlink_to(root)
    with socket.socket(socket.AF_UNIX) as s:
        here = Path.cwd()
        os.chdir(root / "train/a")  # a socket's path has 108 bytes at most
        try:
            s.bind("s.png")
        finally:
            os.chdir(here)
        assert predicted(root) == checked(root)
    assert "6 hidden, temporary or system files and folders passed over" in (
        data.open_dataset(root).notes
    )
    with pytest.raises(EdgeKDError, match="not a file"):
        preprocess.decoded(root / "train/a/pipe")
    (root / "list.csv").write_text("path,label\ntrain/a/pipe,a\ntrain/b/train0.png,b\n")
    assert "list.csv row 2: no such file" in data.inspect(root / "list.csv").problems


def test_a_broken_link_is_a_missing_image_for_all(root):
    (root / "train/a/gone.png").symlink_to(root / "nowhere.png")
    assert data.inspect(root).problems == ("train/a/gone.png: broken link",)
    assert str(root / "train/a/gone.png") in predicted(root)


def test_linked_folders_are_read_once(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.move(root / "train/a", other / "a")
    (root / "train/a").symlink_to(other / "a")
    (other / "a/back").symlink_to(root)
    assert predicted(root) == checked(root)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".jpe", ".Jfif", ".jif", ".PNG", ".png;1", ""])
def test_every_usual_suffix(root, suffix):
    kind = "PNG" if suffix.lower().startswith(".png") else "JPEG"
    save(root / f"train/a/more{suffix}", seed=99, format=kind)
    (root / "train/a/LICENSE").write_text("no image")
    (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert predicted(root) == checked(root)
    assert len(checked(root)) == 19


def test_names_in_both_normal_forms_are_the_same(root):
    for split, form in (("train", NFC), ("val", NFD), ("test", NFD)):
        (root / split / "a").rename(root / split / form)
    first = root / "val" / NFD / "val0.png"
    first.rename(first.with_name(f"{NFD}.png"))
    save(root / "Masks/val" / NFC / f"{NFC}.PNG")
    save(root / "list/x.png")
    found = data.open_dataset(root)
    assert found.classes == ("b", NFC)
    assert "masks: 1 of 18 images have one" in found.notes
    (root / "Manifest.CSV").write_text(f"file,patient_id\nval/{NFC}/{NFC}.png,p\n")
    found = data.open_dataset(root)
    assert "manifest.csv: no patient_id for 17 images, each stands alone" in found.notes
    rows = [(p.relative_to(root).as_posix(), p.parts[-3]) for p in map(Path, checked(root))]
    with (root / "list.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(("path", "label", "split"))
        table.writerows((unicodedata.normalize("NFC", n), n.split("/")[1], s) for n, s in rows)
    found = data.open_dataset(root / "list.csv")
    assert found.classes == ("b", NFC)


def test_names_that_no_alphabet_has_do_not_break_messages(root):
    bad = os.fsencode(root / "train/a") + b"/\xfc\nber.png"
    Path(os.fsdecode(bad)).write_bytes(b"")
    (told,) = data.inspect(root).problems
    assert told == "train/a/\\udcfc\\nber.png: empty file"
    Path(os.fsdecode(bad)).unlink()
    for split in ("train", "val", "test"):
        (root / split / "b").rename(Path(os.fsdecode(os.fsencode(root / split) + b"/\xfc")))
    assert "has a line break or what is no character" in data.inspect(root).problems[0]


# --- tables ---


@pytest.fixture
def listed(root):
    """(root, rows of path, label) of all images."""
    return root, sorted((p.relative_to(root).as_posix(), p.parent.name)
                        for p in root.rglob("*.png"))  # fmt: skip


def written(listed, head="path,label", encoding="utf-8", end="\n", before="") -> Path:
    root, rows = listed
    delimiter = next((c for c in ";\t|" if c in head), ",")
    lines = [head, *(f"{n}{delimiter}{label}" for n, label in rows)]
    (root / "list.CSV").write_bytes((before + end.join(lines) + end).encode(encoding))
    return root / "list.CSV"


@pytest.mark.parametrize(
    ("form", "note"),
    [
        ({"encoding": "utf-8-sig", "end": "\r\n"}, ""),
        ({"encoding": "utf-16"}, ""),
        ({"encoding": "utf-16-le"}, ""),
        ({"head": "path;label"}, "list.CSV: its columns are separated by semicolons"),
        ({"head": "path\tlabel"}, "list.CSV: its columns are separated by tabs"),
        ({"head": "path;label", "before": "sep=;\n"}, "list.CSV: its columns are separated by"),
        ({"head": "Path, LABEL"}, "list.CSV: its columns are read as path, label"),
        ({"end": "\n\n", "before": "\n"}, ""),
    ],
)
def test_tables_as_programs_write_them(listed, form, note):
    found = data.open_dataset(written(listed, **form))
    assert sum(map(len, found.splits.values())) == 18
    assert [n for n in found.notes if n.startswith("list")] == [n for n in found.notes if note
                                                                and n.startswith(note)]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("x" * 256, "has 256 bytes, 255 are a folder's name at most"),
        ("ü" * 128, "has 256 bytes"),
        ('"a\nb"', r"label 'a\\nb' has a line break"),
        ("a,b", "3 values for 2 columns; put a value that holds the delimiter in quotes"),
    ],
)
def test_labels_that_prepare_cannot_write_are_found_by_check(listed, label, why):
    root, rows = listed
    (root / "list.csv").write_text(f"path,label\n\n\n{rows[0][0]},{label}\n,\n{rows[1][0]},b\n")
    with pytest.raises(EdgeKDError, match=f"list.csv row 4: .*{why}"):
        data.open_dataset(root / "list.csv")


def test_tables_that_say_two_things(listed):
    root, rows = listed
    for text, why in (
        ("path,label,Label\nx,a,b\n", "column label is there twice"),
        (f"path,label\n{rows[0][0]},a\n./{rows[0][0]},b\n", "row 3: the same path as a row before"),
        ("", "list.csv is empty"),
    ):
        (root / "list.csv").write_text(text)
        assert any(why in p for p in data.inspect(root / "list.csv").problems), why
    text = "".join(f"{n},{label.upper() if '0' in n else label}\n" for n, label in rows)
    (root / "list.csv").write_text("path,label\n" + text)
    problems = data.inspect(root / "list.csv").problems
    assert "classes A and a differ in capitals; spell them alike" in problems


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_profiles_in_any_unicode(tmp_path, encoding):
    shipped = Profile.read("cpu").model_dump(mode="json")
    text = f'runtime = "{shipped["runtime"]}"\r\ndevice = "CPU"\r\n'
    (tmp_path / "own.toml").write_bytes(text.encode(encoding))
    assert Profile.read(str(tmp_path / "own.toml")).device == "CPU"


# --- what is in a good image besides its pixels ---


def test_a_png_with_much_text_or_a_large_profile_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("XML:com.adobe.xmp", "metadata " * 150_000, zip=True)
    save(tmp_path / "text.png", pnginfo=text)
    save(tmp_path / "profile.png", icc_profile=bytes(range(256)) * 4800)
    for name in ("text.png", "profile.png"):
        assert preprocess.decoded(tmp_path / name).size == (20, 20)
    whole = (tmp_path / "profile.png").read_bytes()
    body = b"iTXta\0\1\0\0\0" + zlib.compress(bytes(65 << 20))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(EdgeKDError, match="PNG of more than 64 MB of text: save it without"):
        preprocess.decode(whole[:33] + chunk + whole[33:])


def test_a_film_behind_a_jpeg_is_not_taken_for_scans(tmp_path):
    path = save(tmp_path / "x.jpg", format="JPEG")
    whole = path.read_bytes()
    metadata = b"\xff\xe5" + struct.pack(">H", 602) + b"\xff\xda" * 300
    assert preprocess.decode(whole[:2] + metadata + whole[2:] + b"\xff\xda" * 300).size == (20, 20)


# --- splits that are none ---


def flat(root: Path, group_of) -> Path:
    """<class>/* with a manifest."""
    rows = ["file,patient_id"]
    for k, label in enumerate("ab"):
        for i in range(8):
            save(root / label / f"{i}.png", seed=10 * k + i)
            rows.append(f"{label}/{i}.png,{group_of(i)}")
    (root / "manifest.csv").write_text("\n".join(rows))
    return root


def test_fewer_groups_than_splits_are_a_problem(tmp_path):
    flat(tmp_path, lambda i: f"p{i % 2}")
    (told,) = data.inspect(tmp_path).problems
    assert told.startswith("train: no image is in this split: 2 groups are too few to deal; name ")
    flat(tmp_path, lambda _: "anonymous")
    for told in data.inspect(tmp_path).problems:
        assert "all 16 images are of one group (column patient_id of manifest.csv)" in told
    assert len(data.inspect(tmp_path).problems) == 2


def test_a_manifest_that_matches_nothing_is_a_problem_and_rules_name_what_was_used(tmp_path):
    flat(tmp_path, lambda i: i)
    assert "column patient_id of manifest.csv" in data.open_dataset(tmp_path).split_rule
    table = tmp_path / "manifest.csv"
    table.write_text(table.read_text() + "\na/gone.png,1\n")
    assert "manifest.csv: 1 of 17 rows name no image, ignored" in data.open_dataset(tmp_path).notes
    flat(tmp_path, lambda _: "")
    assert "manifest.csv" not in data.open_dataset(tmp_path).split_rule
    table.write_text(table.read_text().replace("a/", "up/a/").replace("b/", "up/b/"))
    (told,) = data.inspect(tmp_path).problems
    assert told.startswith("manifest.csv: none of its 16 rows names an image")


def test_empty_split_folders_and_masks_of_nothing(root):
    for split in ("val", "test"):
        shutil.rmtree(root / split)
        (root / split).mkdir()
    assert data.inspect(root).problems[:2] == (
        "test: split folder without images; fill it or remove it",
        "val: split folder without images; fill it or remove it",
    )


def test_validation_does_not_take_a_class_out_of_training(root):
    shutil.rmtree(root / "val")
    for i in (1, 2):
        (root / f"train/a/train{i}.png").unlink()
    (told,) = data.inspect(root).problems
    assert told == "train/a: no image of class a in split train (1 group is too few to deal)"


def test_masks_that_belong_to_no_image_are_a_problem(root):
    save(root / "masks/train/a/nobody.png")
    (told,) = data.inspect(root).problems
    assert told.startswith("masks: none of 1 files belongs to an image; name them masks/<path")
    save(root / "masks/train/a/train0.png")
    assert "masks: 1 belong to no image, ignored" in data.open_dataset(root).notes


@pytest.mark.parametrize(
    "header", ["file,Patient ID", "Image File,Patient-ID", "path,PatientID", "Filename,Subject"]
)
def test_columns_as_people_and_dicom_name_them(tmp_path, header):
    flat(tmp_path, lambda i: i)
    table = tmp_path / "manifest.csv"
    table.write_text(header + "\n" + table.read_text().partition("\n")[2])
    assert "of manifest.csv" in data.open_dataset(tmp_path).split_rule


def test_a_path_that_no_file_system_takes_is_a_row_without_a_file(listed):
    root, rows = listed
    (root / "list.csv").write_text(f"path,label\n{'x' * 400}.png,a\n{rows[1][0]},b\n")
    with pytest.raises(EdgeKDError, match=r"list\.csv row 2: no such file"):
        data.open_dataset(root / "list.csv")


@pytest.mark.parametrize(
    "name",
    ["$Extend", "@appdata", "@sharebin", "LOST.DIR", "MSOCache", "x.png.sb-1a2b3c4d-AbCdEf",
     "x.dcm.aria2", "x.png.!ut"],
)  # fmt: skip
def test_more_that_systems_leave_behind(name):
    assert files.is_litter(name)


@pytest.mark.parametrize("name", ["recycler study", "x.png", "extend", "lost.dirt", "sb-1.png"])
def test_what_only_looks_like_it(name):
    assert not files.is_litter(name)


def test_a_text_beside_the_one_folder_of_an_archive(root, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    shutil.copytree(root, outer / "scans")
    (outer / "README.txt").write_text("x")
    found = data.open_dataset(outer)
    assert "scans: the only folder, read as the data set" in found.notes
    assert {s: len(v) for s, v in found.splits.items()} == {
        s: len(v) for s, v in data.open_dataset(root).splits.items()
    }


@pytest.mark.parametrize("name", ["BreastMNIST.NPZ", "breastmnist_224 (1).npz"])
def test_a_medmnist_archive_keeps_its_classes_under_any_name(tmp_path, name):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 255, (6, 28, 28)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1]] * 3)
    with (tmp_path / name).open("wb") as f:
        np.savez(f, **arrays)
    assert data.open_dataset(tmp_path / name).classes == ("malignant", "normal, benign")
