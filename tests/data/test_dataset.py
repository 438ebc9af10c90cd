"""Image folders: what is refused and why, who goes where, and what a model sees to the number."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd import data
from edgekd.data import preprocess
from edgekd.records import EdgeKDError, Spec

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LAYOUT = [f"{s}/{c}" for s in ("train", "val", "test") for c in ("a", "b")]


def spec(size=(4, 4), **more):
    return Spec(**{"classes": ("a", "b"), "size": size, **PLAIN, **more})


def save(path: Path, seed: int = 0, size=(20, 20), **options) -> Path:
    """A random grey image, the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """All three splits, two classes, three images each: no problem."""
    for n, folder in enumerate(LAYOUT):
        for i in range(3):
            save(tmp_path / folder / f"{i}.png", seed=10 * n + i)
    return tmp_path


def flat(root: Path, **images_of_class: int) -> Path:
    """Layout <class>/*."""
    for n, (label, images) in enumerate(images_of_class.items()):
        for i in range(images):
            save(root / label / f"{i:03d}.png", seed=1000 * n + i)
    return root


def manifest(root: Path, group_of, column="patient_id") -> None:
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    lines = [f"{n},{group_of(n)}" for n in names if "masks" not in n]
    (root / "manifest.csv").write_text("\n".join([f"file,{column}", *lines]) + "\n")


def problem(root: Path) -> str:
    """The only problem."""
    found = data.inspect(root)
    assert found.dataset is None
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def refused(root: Path, match: str) -> None:
    with pytest.raises(EdgeKDError, match=match) as e:
        data.open_dataset(root)
    assert "\n" not in str(e.value)


# --- a good folder ---


def test_good_folder(root):
    d = data.open_dataset(root)
    assert d.classes == ("a", "b")
    assert {s: len(v) for s, v in d.splits.items()} == {"train": 6, "val": 6, "test": 6}
    assert list(d.splits) == ["train", "val", "test"]
    first = d.splits["train"][0]
    digest = hashlib.sha256((root / "train/a/0.png").read_bytes()).hexdigest()
    assert first == data.Sample(root / "train/a/0.png", 0, digest, None, digest)
    assert [s.label for s in d.splits["val"]] == [0, 0, 0, 1, 1, 1]
    assert d.grey
    assert d.notes == ()
    assert d.split_rule == "Split folders train, val and test as they are."


def test_fingerprint_is_of_the_content(root, tmp_path_factory):
    d = data.open_dataset(root)
    lines = sorted(
        f"{s}\0{p.parent.name}\0{p.relative_to(root).as_posix()}\0"
        + hashlib.sha256(p.read_bytes()).hexdigest()
        for s in ("train", "val", "test")
        for p in (root / s).rglob("*.png")
    )
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert d.fingerprint == expected
    copy = tmp_path_factory.mktemp("copy") / "else"
    shutil.copytree(root, copy)
    assert data.open_dataset(copy, seed=5).fingerprint == expected
    save(copy / "val/b/0.png", seed=77)
    assert data.open_dataset(copy).fingerprint != expected


def test_split_names_in_any_case_and_form(root):
    for old, new in (("train", "Training"), ("val", "VALID"), ("test", "Testing")):
        (root / old).rename(root / new)
    assert {s: len(v) for s, v in data.open_dataset(root).splits.items()} == {
        "train": 6,
        "val": 6,
        "test": 6,
    }


def test_what_is_no_image_is_noted(root):
    (root / "README.md").write_text("x")
    (root / "extra").mkdir()
    (root / "train/a/list.txt").write_text("x")
    (root / "train/a/.DS_Store").write_text("x")
    (root / "train/a/deep").mkdir()
    shutil.copy(root / "train/a/0.png", root / "train/a/again.png")
    assert data.open_dataset(root).notes == (
        "1 file ignored: no JPEG, PNG or DICOM",
        "extra: not a split folder, ignored",
        "train/a: 1 file ignored: no JPEG, PNG or DICOM",
        "train/a: 1 folder in a class folder, ignored",
        "1 hidden, temporary or system file or folder passed over",
        "1 files are copies of another of the same class and split",
    )


def test_grey_is_about_pixels_not_modes(root):
    with Image.open(root / "train/a/0.png") as image:
        rgb = image.convert("RGB")
    rgb.save(root / "train/a/0.png")
    assert data.open_dataset(root).grey
    rgb.putpixel((19, 19), (1, 2, 3))
    rgb.save(root / "train/a/0.png")
    assert not data.open_dataset(root).grey


def test_suffix_case_and_a_lying_suffix_do_not_matter(root):
    (root / "train/a/0.png").rename(root / "train/a/0.JPG")
    save(root / "train/a/x.JPEG", seed=99, format="JPEG")
    assert len(data.open_dataset(root).splits["train"]) == 7


def test_masks_are_found_beside(root):
    save(root / "masks/train/a/0.png")
    save(root / "train/b/x.jpg", seed=98)
    save(root / "masks/train/b/x.jpg")
    d = data.open_dataset(root)
    masks = [s.mask for s in d.splits["train"]]
    assert masks[0] == root / "masks/train/a/0.png"
    assert masks[-1] == root / "masks/train/b/x.jpg"
    assert masks[1:-1] == [None] * 5
    assert d.notes == ("masks: 2 of 19 images have one",)


# --- bad folders: every reason, by path ---


def test_all_problems_at_once_in_one_line(root):
    for n in range(5):
        (root / f"train/a/bad{n}.png").write_bytes(b"")
    problems = data.inspect(root).problems
    assert problems == tuple(f"train/a/bad{n}.png: empty file" for n in range(5))
    refused(root, r"5 problems: train/a/bad0.png: empty file; .*edgekd data check .* lists all")


def png(side: int, depth: int, colour: int) -> bytes:
    """A PNG file by hand; its pixels are those of 20 x 20, whatever side the header says."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    row = b"\0" + b"\1\2" * 20 * (3 if colour else 1)
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 20)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 90), np.uint8))
BAD = {
    "empty": (b"", "empty file"),
    "text": (b"hello", "not a JPEG, PNG or DICOM"),
    "gif": (encoded(NOISE, "GIF"), "not a JPEG, PNG or DICOM"),
    "tiff": (encoded(NOISE, "TIFF"), "not a JPEG, PNG or DICOM"),
    "cut png": (encoded(NOISE, "PNG")[:3000], "corrupt or truncated"),
    "cut jpeg": (encoded(NOISE, "JPEG")[:2000], "corrupt or truncated"),
    "header only": (encoded(NOISE, "PNG")[:20], "corrupt or truncated"),
    "magic only": (b"\xff\xd8", "corrupt or truncated"),
    "zeros": (encoded(NOISE, "PNG")[:400] + bytes(8000), "corrupt or truncated"),
    "16-bit grey": (png(20, 16, 0), "16-bit image: convert it to 8 bit with the window"),
    "16-bit colour": (png(20, 16, 2), "16-bit image: convert it to 8 bit with the window"),
    "thin": (encoded(NOISE.crop((0, 0, 15, 80)), "PNG"), r"15 x 80 pixels, a side is less than 16"),
    "huge": (png(8001, 8, 0), "8001 x 8001 pixels, more than 64 megapixels"),
    "bomb": (png(20000, 8, 0), "more than 64 megapixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_image(root, kind):
    content, reason = BAD[kind]
    (root / "val/b/bad.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problem(root).startswith("val/b/bad.png: ")
    refused(root, "1 problem: val/b/bad.png: .*" + reason)
    if kind != "thin":
        with pytest.raises(EdgeKDError, match=r"bad\.png: .*" + reason):
            preprocess.pixels(root / "val/b/bad.png", spec())
        with pytest.raises(EdgeKDError, match="image: .*" + reason):
            preprocess.prepare(io.BytesIO(content), spec())


def test_pillow_images_of_many_bits_are_refused():
    for mode in ("I", "F", "I;16"):
        with pytest.raises(EdgeKDError, match=f"mode {mode}, more than 8 bits"):
            preprocess.pixels(Image.new(mode, (20, 20)), spec())


def test_broken_links_and_unreadable_things(root):
    (root / "train/a/x.png").symlink_to(root / "nowhere.png")
    assert problem(root) == "train/a/x.png: broken link"
    (root / "train/a/x.png").unlink()
    (root / "train/a/x.png").symlink_to(root / "train/a/x.png")
    assert problem(root) == "train/a/x.png: broken link"


def test_a_link_that_leaves_the_folder_is_read(root, tmp_path_factory):
    outside = save(tmp_path_factory.mktemp("outside") / "o.png", seed=55)
    (root / "train/a/x.png").symlink_to(outside)
    assert len(data.open_dataset(root).splits["train"]) == 7


def test_same_bytes_in_two_splits_and_in_two_classes(root):
    shutil.copy(root / "test/a/1.png", root / "train/a/x.png")
    told = problem(root)
    assert "train/a/x.png" in told
    assert "test/a/1.png" in told
    assert "same bytes as" in told
    assert "splits test and train" in told
    (root / "train/a/x.png").unlink()
    shutil.copy(root / "train/a/1.png", root / "train/b/x.png")
    told = problem(root)
    assert told == "train/b/x.png: same bytes as train/a/1.png, in classes a and b; keep one"


def test_images_outside_class_folders(root):
    save(root / "lost.png", seed=500)
    save(root / "train/stray.jpg", seed=501)
    problems = data.inspect(root).problems
    assert len(problems) == 2
    refused(root, "lost.png: lies in no class folder; .*train/stray.jpg: lies in no class folder")


def test_class_folders(root):
    (root / "train/c").mkdir()
    assert problem(root).startswith("train/c: class folder without JPEG, PNG or DICOM images")
    save(root / "train/c/0.png", seed=502)
    problems = data.inspect(root).problems
    assert problems == (
        "test/c: no image of class c in split test",
        "val/c: no image of class c in split val",
    )


def test_split_folders(root):
    shutil.copytree(root / "val", root / "Validation")
    refused(root, "Validation and val: both are split val; merge them")
    shutil.rmtree(root / "Validation")
    shutil.rmtree(root / "test")
    assert problem(root) == "test: no such split folder beside train, val; add it"
    shutil.rmtree(root / "train")
    refused(root, "2 problems: train: no such split folder")


def test_one_class_or_none(tmp_path):
    nothing = r"holds no JPEG, PNG or DICOM images; expected <split>/<class>/\* or <class>/\*"
    refused(tmp_path, nothing)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("x")
    refused(tmp_path, nothing)
    flat(tmp_path, a=5)
    refused(tmp_path, r"one class \(a\); at least 2 are needed")


def test_root_is_a_folder(tmp_path):
    refused(tmp_path / "no", "no does not exist; expected a folder")
    (tmp_path / "f").write_text("x")
    refused(tmp_path / "f", "f is a file; expected a folder")


def test_masks_that_do_not_fit(root):
    path = save(root / "masks/train/a/0.png", size=(20, 21))
    reason = "mask of 21 x 20 pixels for an image of 20 x 20"
    assert problem(root) == f"masks/train/a/0.png: {reason}"
    path.write_bytes(b"nonsense")
    refused(root, "1 problem: masks/train/a/0.png: not a JPEG, PNG or DICOM")
    path.unlink()
    path.symlink_to("nowhere")
    refused(root, "1 problem: masks/train/a/0.png: broken link")


# --- splits ---


def test_groups_stay_together_and_reach_every_split(tmp_path):
    flat(tmp_path, a=40, b=40, c=3)
    # Patients 0-12 have four images each, of a and of b; c has three patients of its own.
    manifest(tmp_path, lambda n: n if n[0] == "c" else f"p{int(n[2:5]) % 13}")
    d = data.open_dataset(tmp_path)
    homes: dict[str, set[str]] = {}
    for split, samples in d.splits.items():
        for s in samples:
            homes.setdefault(s.group, set()).add(split)
        assert {s.label for s in samples} == {0, 1, 2}
    assert len(homes) == 16
    assert all(len(h) == 1 for h in homes.values())
    counts = {s: len({x.group for x in v if x.label < 2}) for s, v in d.splits.items()}
    assert counts == {"train": 9, "val": 1, "test": 3}  # 13 patients: round(2.6), round(1.3)
    assert "column patient_id of manifest.csv" in d.split_rule
    other = data.open_dataset(tmp_path, seed=1)
    assert other.fingerprint != d.fingerprint
    assert data.open_dataset(tmp_path, seed=0).splits == d.splits


def test_shares_and_order_without_manifest(tmp_path):
    flat(tmp_path, a=50, b=20)
    d = data.open_dataset(tmp_path, seed=3)
    counts = {s: [sum(x.label == k for x in v) for k in (0, 1)] for s, v in d.splits.items()}
    assert counts == {"train": [35, 14], "val": [5, 2], "test": [10, 4]}
    digests = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "a").iterdir()}
    rank = sorted(digests, key=lambda p: hashlib.sha256(f"3:{digests[p]}".encode()).hexdigest())
    assert {s.path for s in d.splits["test"] if s.label == 0} == set(rank[:10])
    assert {s.path for s in d.splits["val"] if s.label == 0} == set(rank[10:15])
    assert d.split_rule == (
        "No split folders: 70/10/20 % of each class's groups are train/val/test, in the order of "
        "sha256('3:<group>'), rarest class first; groups: files of equal bytes "
        "and near-duplicates."
    )


def test_too_few_groups_to_deal(tmp_path):
    flat(tmp_path, a=9, b=2)
    refused(tmp_path, r"train/b: no image of class b in split train \(2 groups are too few to deal")


def test_one_patient_in_given_splits_is_said_before_where(root):
    manifest(root, lambda n: "ANONYMOUS")
    first, second = data.inspect(root).problems
    assert first.startswith("all 18 images are of one group (column patient_id of manifest.csv)")
    assert "same patient or group as" in second
    assert "ANONYMOUS" not in first + second


def test_a_rule_names_only_groups_that_an_image_has(tmp_path):
    flat(tmp_path, a=12, b=12)
    manifest(tmp_path, lambda n: "")
    assert "patient_id" not in data.open_dataset(tmp_path).split_rule


def test_val_is_carved_out_of_train_by_group(root):
    shutil.rmtree(root / "val")
    for c, label in enumerate("ab"):
        for i in range(3, 40):
            save(root / f"train/{label}/{i}.png", seed=2000 + 100 * c + i)
    manifest(root, lambda n: n.replace("train/a/", "p").replace("train/b/", "p"), column="group")
    d = data.open_dataset(root)
    assert {s: len(v) for s, v in d.splits.items()} == {"train": 68, "val": 12, "test": 6}
    train, val = ({s.group for s in d.splits[k]} for k in ("train", "val"))
    assert not train & val
    assert len(val) == 6  # 15 % of 40 patients, who have an image of either class
    assert d.split_rule.startswith("Folders train and test as they are; val: 15 % of each train")
    assert "column group of manifest.csv" in d.split_rule


def test_a_patient_in_two_splits_is_a_problem_and_is_not_named(root):
    both = ("train/a/0.png", "test/b/2.png", "train/a/1.png")
    manifest(root, lambda n: "Smith^John" if n in both else n)
    told = problem(root)
    assert "Smith" not in told
    assert "train/a/0.png" in told
    assert "test/b/2.png" in told
    assert "same patient or group as" in told


def test_manifests_that_do_not_help(root):
    (root / "manifest.csv").write_text("file,age\ntrain/a/0.png,5\n")
    assert "no column patient_id or group" in data.open_dataset(root).notes[0]
    (root / "manifest.csv").write_text("file,group\ntrain/a/0.png,5\n,\n")
    assert data.open_dataset(root).notes == (
        "manifest.csv: no group for 17 images, each stands alone",
    )
    (root / "manifest.csv").write_text("place,group\ntrain/a/0.png,5\n")
    refused(root, r"manifest.csv: no column file \(path relative")
    (root / "manifest.csv").write_text("file,group\ntrain/a/0.png,5\ntrain/a/0.png,6\n")
    refused(root, "train/a/0.png: in manifest.csv twice, with different group")
    (root / "manifest.csv").write_bytes(b"file,group\n\xff\xfe\x00,5\n")
    refused(root, "manifest.csv: cannot be read as UTF-8 CSV")


# --- what a model sees ---


def test_prepare_by_hand():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 102, 0]]] * 2, np.uint8))
    s = spec((2, 2), mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 2.0))
    got = preprocess.prepare(image, s)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    expected = [[[-1, 1]] * 2, [[0, 2]] * 2, [[0.5, 0]] * 2]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_normalise_is_the_formula_and_leaves_its_input():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), np.uint8)
    before = pixels.copy()
    s = spec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = ((pixels / 255.0 - s.mean) / s.std).transpose(0, 3, 1, 2)
    got = preprocess.normalise(pixels, s)
    assert got.shape == (3, 3, 5, 4)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_array_equal(pixels, before)


def test_grey_is_luma_three_times():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (preprocess.pixels(image, spec(channels="grey")) == luma).all()
    assert (preprocess.pixels(image, spec()) == (200, 100, 50)).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path, turn):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8], upright[:8, 24:] = 255, 120
    undo = {  # how a camera that writes this tag stored the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(undo[turn])).save(tmp_path / "x.png", exif=exif)
    got = preprocess.pixels(tmp_path / "x.png", spec((16, 32)))
    np.testing.assert_array_equal(got[..., 0], upright)


def test_broken_exif_is_silent():
    out = io.BytesIO()
    NOISE.save(out, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    expected = np.asarray(Image.open(io.BytesIO(encoded(NOISE, "JPEG"))))
    np.testing.assert_array_equal(
        preprocess.pixels(out.getvalue(), spec((90, 90)))[..., 0], expected
    )


def test_transparent_is_black_and_every_mode_becomes_rgb():
    half = Image.new("RGBA", (4, 4), (255, 255, 255, 128))
    assert (preprocess.pixels(half, spec()) == 128).all()
    grey = Image.new("LA", (4, 4), (255, 0))
    assert (preprocess.pixels(grey, spec()) == 0).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (preprocess.pixels(palette, spec()) == (10, 20, 30)).all()
    palette.info["transparency"] = 1
    assert (preprocess.pixels(palette, spec()) == 0).all()
    assert (preprocess.pixels(Image.new("1", (4, 4), 1), spec()) == 255).all()
    cmyk = io.BytesIO(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    got = preprocess.pixels(cmyk, spec()).astype(int)
    np.testing.assert_allclose(got[0, 0], (255, 0, 0), atol=3)


def test_same_pixels_from_path_bytes_file_and_image(tmp_path):
    path = save(tmp_path / "x.png", size=(30, 40))
    content = path.read_bytes()
    expected = preprocess.pixels(path, spec((8, 8)))
    for source in (content, io.BytesIO(content), Image.open(io.BytesIO(content))):
        np.testing.assert_array_equal(preprocess.pixels(source, spec((8, 8))), expected)


def bands() -> np.ndarray:
    """(32, 64) four bands of 16 columns: 0, 255, 255, 0; the right half's lower half black."""
    image = np.zeros((32, 64), np.uint8)
    image[:, 16:48] = 255
    image[16:, 32:48] = 0
    return image


GEOMETRY = {  # (8, 8) pixels that `bands` becomes
    "stretch": np.block([[np.zeros((8, 2)), np.full((8, 2), 255), np.zeros((8, 4))]]),
    "crop": np.full((8, 8), 255.0),  # columns 16 to 48 of the source
    "pad": np.zeros((8, 8)),  # rows 2 to 6 hold it all
}
GEOMETRY["stretch"][:4, 4:6] = 255
GEOMETRY["crop"][4:, 4:] = 0
GEOMETRY["pad"][2:6, 2:4] = 255
GEOMETRY["pad"][2:4, 4:6] = 255


@pytest.mark.parametrize("rule", GEOMETRY)
def test_resize_rules_treat_image_and_mask_alike(tmp_path, rule):
    Image.fromarray(bands()).save(tmp_path / "x.png")
    Image.fromarray(bands() // 255).save(tmp_path / "mask.png")  # 0 and 1
    s = spec((8, 8), resize=rule)
    inside = GEOMETRY[rule] > 0
    np.testing.assert_array_equal(preprocess.mask(tmp_path / "mask.png", s), inside)
    got = preprocess.pixels(tmp_path / "x.png", s)[..., 0]
    np.testing.assert_array_equal(got >= 128, inside)  # edges are soft: the filter is wide
    assert preprocess.mask(tmp_path / "mask.png", s).dtype == bool


def test_crop_of_tall_images_is_centred():
    image = np.zeros((64, 16), np.uint8)
    image[24:40] = 200
    got = preprocess.pixels(Image.fromarray(image), spec((16, 16), resize="crop"))
    np.testing.assert_array_equal(got, 200)


def test_a_block_scaled_up_by_hand():
    """Bilinear by two: weights 3/4 and 1/4, edges repeated."""
    image = Image.fromarray(np.array([[0, 160], [0, 160]], np.uint8))
    got = preprocess.pixels(image, spec((4, 4)))[..., 0]
    np.testing.assert_array_equal(got, [[0, 40, 120, 160]] * 4)


def test_mask_by_area_and_in_jpeg(tmp_path):
    share = np.zeros((16, 16), np.uint8)
    share[:9, :8] = 255  # 9 of 16 rows
    share[:7, 8:] = 255  # 7 of 16
    Image.fromarray(share).save(tmp_path / "m.png")
    np.testing.assert_array_equal(
        preprocess.mask(tmp_path / "m.png", spec((1, 2))), [[True, False]]
    )
    Image.fromarray(np.full((16, 16), 20, np.uint8)).save(tmp_path / "m.jpg")
    assert not preprocess.mask(tmp_path / "m.jpg", spec()).any()


def test_load_pixels_in_order(root):
    d = data.open_dataset(root)
    seen = []

    def track(items, what, total=None):
        for item in items:
            seen.append(total)
            yield item

    got = data.load_pixels(d.splits["train"], spec((10, 10)), track)
    assert seen == [6] * 6
    expected = [preprocess.pixels(s.path, spec((10, 10))) for s in d.splits["train"]]
    np.testing.assert_array_equal(got, expected)


# --- real data ---


def test_brain_tumor_mri(real_data):
    d = data.open_dataset(real_data("brain_tumor_mri"))
    assert {s: len(v) for s, v in d.splits.items()} == {"train": 2180, "val": 266, "test": 488}
    assert d.classes == ("glioma", "meningioma", "pituitary")
    assert d.grey
    assert "addon_no_tumor: not a split folder, ignored" in d.notes
    s = spec((64, 64))
    for sample in d.splits["test"][:3]:
        lesion = preprocess.mask(sample.mask, s)
        with Image.open(sample.mask) as full:
            np.testing.assert_allclose(lesion.mean(), np.asarray(full).mean(), rtol=0.15)


def test_cxr_pneumonia(real_data):
    d = data.open_dataset(real_data("cxr_pneumonia"))
    assert {s: len(v) for s, v in d.splits.items()} == {"train": 666, "val": 99, "test": 192}
    assert sum(s.mask is not None for v in d.splits.values() for s in v) == 901
    assert len({s.group for v in d.splits.values() for s in v}) == 729
