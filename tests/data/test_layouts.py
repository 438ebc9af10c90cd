"""Published layouts on trees of their own folder and file names; manifests; MedMNIST."""

from __future__ import annotations

import csv
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd import data
from edgekd.records import EdgeKDError


def save(path: Path, seed: int | None = None, size=(20, 20)) -> Path:
    """A random grey image, of the path unless a seed is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = [ord(c) for c in path.name + path.parent.name + path.parts[-4]] if seed is None else seed
    Image.fromarray(np.random.default_rng(key).integers(0, 256, size, np.uint8)).save(path)
    return path


def counts(d: data.Dataset) -> dict[str, list[int]]:
    return {s: [sum(x.label == k for x in v) for k in range(len(d.classes))]
            for s, v in d.splits.items()}  # fmt: skip


# --- COVID-QU-Ex ---


@pytest.fixture
def covid(tmp_path):
    for kind, count in (("Lung", 4), ("Infection", 2)):
        top = tmp_path / f"{kind} Segmentation Data/{kind} Segmentation Data"
        for split in ("Train", "Val", "Test"):
            for label in ("COVID-19", "Non-COVID", "Normal"):
                for i in range(count):
                    name = f"{label.lower()}_{split}_{i}.png"
                    seed = zlib.crc32(f"{split}{label}{i}".encode())
                    save(top / split / label / "images" / name, seed)
                    save(top / split / label / "lung masks" / name, 1)
                    if kind == "Infection":
                        save(top / split / label / "infection masks" / name, 2)
    return tmp_path


def test_covid_qu_ex(covid):
    d = data.open_dataset(covid)
    assert d.classes == ("COVID-19", "Non-COVID", "Normal")
    assert counts(d) == {s: [4, 4, 4] for s in ("train", "val", "test")}
    assert d.split_rule == "Split folders train, val and test as they are."
    for s in d.splits["test"]:
        assert s.organ is not None
        assert s.organ.parent.name == "lung masks"
        assert s.organ.name == s.path.name
        assert (s.mask is not None) == (s.path.stem[-1] in "01")
    masked = next(s.mask for s in d.splits["val"] if s.mask)
    assert masked.parent.name == "infection masks"
    assert masked.parts[-6:-4] == ("Infection Segmentation Data", "Infection Segmentation Data")
    assert "masks: 18 of 36 images have one" in d.notes
    assert "organs: 36 of 36 images have one" in d.notes


def test_covid_qu_ex_infection_part_alone(covid):
    for root in (covid / "Infection Segmentation Data",
                 covid / "Infection Segmentation Data/Infection Segmentation Data"):  # fmt: skip
        d = data.open_dataset(root)
        assert counts(d)["train"] == [2, 2, 2]
        assert all(s.mask and s.organ for v in d.splits.values() for s in v)


def test_a_lung_mask_that_does_not_fit_is_a_problem(covid):
    top = covid / "Lung Segmentation Data/Lung Segmentation Data/Test/Normal"
    save(top / "lung masks/normal_Test_3.png", size=(20, 21))
    assert data.inspect(covid).problems == (
        "Test/Normal/lung masks/normal_Test_3.png: mask of 21 x 20 pixels for an image of 20 x 20",
    )


# --- LC25000 ---

LC = {"colon_aca": "colonca", "colon_n": "colonn", "lung_aca": "lungaca", "lung_n": "lungn",
      "lung_scc": "lungscc"}  # fmt: skip


@pytest.fixture
def lc25000(tmp_path):
    for label, stem in LC.items():
        part = f"lung_colon_image_set/{label.split('_')[0]}_image_sets/{label}"
        for i in range(1, 25):
            save(tmp_path / part / f"{stem}{i}.jpeg")
    return tmp_path


def tiles(root: Path, form: str) -> None:
    """Six tiles of four copies in each class, in a form in which LC25000-clean has them."""
    if form == "groups":
        rows = [
            f"{s}{i},{s}{i}.jpeg,{c},x,{i % 6},{i % 6}" for c, s in LC.items() for i in range(1, 25)
        ]
        head = "stem,filename,label,tissue,local_cluster_label,group_id"
        (root / "lc25000_image_groups.csv").write_text("\n".join([head, *rows]))
        return
    for label, stem in LC.items():
        path = root / f"annotations/{label}/UNI/resize_only/final_clusters.csv"
        path.parent.mkdir(parents=True)
        rows = [f"{i % 6},./LC25000/{label}/{stem}{i}.jpeg" for i in range(1, 25)]
        path.write_text("\n".join(["cluster_label,img_path", *rows]))


@pytest.mark.parametrize("form", ["annotations", "groups"])
def test_lc25000_tiles_stay_together(lc25000, form):
    tiles(lc25000, form)
    d = data.open_dataset(lc25000)
    assert d.classes == tuple(LC)
    assert counts(d) == {"train": [16] * 5, "val": [4] * 5, "test": [4] * 5}
    assert "groups: source tiles of LC25000-clean and" in d.split_rule
    home: dict[tuple[str, int], set[str]] = {}
    for split, samples in d.splits.items():
        for s in samples:
            number = int("".join(filter(str.isdigit, s.path.stem)))
            home.setdefault((s.path.parent.name, number % 6), set()).add(split)
    assert len(home) == 30
    assert all(len(h) == 1 for h in home.values())


def test_lc25000_without_tiles_is_refused_unless_random(lc25000):
    with pytest.raises(
        EdgeKDError, match=r"20 turned copies of each of 1,250 tiles.*--split random"
    ):
        data.open_dataset(lc25000)
    d = data.open_dataset(lc25000, split="random")
    assert d.split_rule.startswith("RANDOM")
    tiles(lc25000, "annotations")
    three = data.open_dataset(lc25000 / "lung_colon_image_set/lung_image_sets")
    assert three.classes == ("lung_aca", "lung_n", "lung_scc")
    assert "source tiles" in three.split_rule


def test_lc25000_lists_that_lack_images(lc25000):
    tiles(lc25000, "groups")
    save(lc25000 / "lung_colon_image_set/lung_image_sets/lung_n/lungn99.jpeg")
    with pytest.raises(EdgeKDError, match="1 images are in no tile of LC25000-clean"):
        data.open_dataset(lc25000)


# --- Kaggle's ---


def test_brain_tumour(tmp_path):
    for split, n in (("Training", 10), ("Testing", 3)):
        for label, stem in (
            ("glioma", "gl"),
            ("meningioma", "me"),
            ("notumor", "no"),
            ("pituitary", "pi"),
        ):
            for i in range(n):
                save(tmp_path / split / label / f"T{split[:2]}-{stem}_{i:04d}.jpg")
    d = data.open_dataset(tmp_path)
    assert d.classes == ("glioma", "meningioma", "notumor", "pituitary")
    assert counts(d) == {"train": [8] * 4, "val": [2] * 4, "test": [3] * 4}


def test_eyes_of_one_patient_stay_together(tmp_path):
    for label in ("cataract", "diabetic_retinopathy", "glaucoma", "normal"):
        suffix = ".jpeg" if label == "diabetic_retinopathy" else ".jpg"
        for i in range(12):
            for side in ("left", "right"):
                save(tmp_path / "dataset" / label / f"{i + 100 * len(label)}_{side}{suffix}")
        save(tmp_path / "dataset" / label / f"_{len(label)}_4015166.jpg")
    d = data.open_dataset(tmp_path)
    assert d.notes == ("dataset: the only folder, read as the data set",)
    assert "groups: left and right eye of one number and" in d.split_rule
    home: dict[str, set[str]] = {}
    for split, samples in d.splits.items():
        for s in samples:
            if not s.path.stem.startswith("_"):
                home.setdefault(s.path.stem.split("_")[0], set()).add(split)
    assert all(len(h) == 1 for h in home.values())
    assert {len(v) for v in d.splits.values()} != {0}


def test_alzheimer_takes_the_originals(tmp_path):
    for part, n in (("OriginalDataset", 10), ("AugmentedAlzheimerDataset", 12)):
        for label in ("MildDemented", "ModerateDemented", "NonDemented", "VeryMildDemented"):
            for i in range(n):
                save(tmp_path / part / label / f"{label[:6]}{part[:1]}{i}.jpg")
    d = data.open_dataset(tmp_path)
    assert sum(map(len, d.splits.values())) == 40
    assert "AugmentedAlzheimerDataset: copies of unknown sources, ignored" in d.notes
    with pytest.raises(EdgeKDError, match="give OriginalDataset; or ask for --split random"):
        data.open_dataset(tmp_path / "AugmentedAlzheimerDataset")
    assert data.open_dataset(tmp_path / "AugmentedAlzheimerDataset", split="random")


# --- manifests ---

COLUMNS = ("path", "label", "split", "patient_id", "subgroup", "mask")


def table(root: Path, rows: list[tuple], columns=COLUMNS, kind="csv") -> Path:
    path = root / f"list.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([columns, *rows])
        return path
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    return path


@pytest.fixture
def rows(tmp_path):
    found = []
    for i in range(18):
        save(tmp_path / f"images/{i}.png")
        save(tmp_path / f"masks/{i}.png", 3)
        split = ("train", "Validation", "test")[i % 3]
        mask = f"masks/{i}.png" if i < 6 else None
        found.append((f"images/{i}.png", i // 3 % 2, split, f"p{i}", "FM"[i % 2], mask))
    return found


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest(tmp_path, rows, kind):
    d = data.open_dataset(table(tmp_path, rows, kind=kind))
    assert d.classes == ("0", "1")
    assert counts(d) == {s: [3, 3] for s in ("train", "val", "test")}
    first = d.splits["train"][0]
    assert first.path == tmp_path / "images/0.png"
    assert (first.subgroup, first.mask) == ("F", tmp_path / "masks/0.png")
    assert "masks: 6 of 18 images have one" in d.notes
    assert not any(g.startswith("p") for g in (s.group for v in d.splits.values() for s in v))


def test_manifest_without_splits_is_dealt_by_patient(tmp_path, rows):
    short = [(path, label, f"p{i % 9}") for i, (path, label, *_) in enumerate(rows)]
    d = data.open_dataset(table(tmp_path, short, ("file", "class", "group")))
    assert "groups: column group of list.csv and" in d.split_rule
    assert len({s.group for v in d.splits.values() for s in v}) == 9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({2: "x"}, 'list.csv row 2: split "x"; expected train, val or test'),
        ({1: ""}, "list.csv row 2: no label"),
        ({1: "../x"}, 'row 2: label "../x" cannot be a folder'),
        ({0: "images/nobody.png"}, "list.csv row 2: no such file"),
        ({0: "images/1.png"}, "list.csv row 3: the same path as a row before"),
        ({2: ""}, "list.csv: 1 rows have no split: give one to all or to none"),
    ],
)
def test_bad_rows(tmp_path, rows, change, reason):
    rows[0] = tuple(change.get(i, v) for i, v in enumerate(rows[0]))
    with pytest.raises(EdgeKDError, match=reason.replace("(", r"\(")):
        data.open_dataset(table(tmp_path, rows))


def test_a_manifest_with_splits_has_train_and_test(tmp_path, rows):
    kept = [r for r in rows if r[2] != "test"]
    with pytest.raises(EdgeKDError, match=r"list\.csv: no row has split test"):
        data.open_dataset(table(tmp_path, kept))


def test_bad_manifests(tmp_path, rows, monkeypatch):
    with pytest.raises(EdgeKDError, match="has columns a, b; path and label are expected"):
        data.open_dataset(table(tmp_path, [("1", "2")], ("a", "b")))
    with pytest.raises(EdgeKDError, match=r"list\.csv has no rows"):
        data.open_dataset(table(tmp_path, []))
    (tmp_path / "list.parquet").write_bytes(b"no")
    with pytest.raises(EdgeKDError, match=r"list\.parquet: cannot be read as Parquet"):
        data.open_dataset(tmp_path / "list.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(EdgeKDError, match=r"needs pyarrow: pip install 'edgekd\[parquet\]'"):
        data.open_dataset(tmp_path / "list.parquet")


# --- MedMNIST ---


def archive(path: Path, **changes) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 2)[:, None].astype(np.uint8)
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_medmnist(tmp_path, spec):
    path = archive(tmp_path / "pneumoniamnist_64.npz")
    d = data.open_dataset(path)
    assert d.classes == ("normal", "pneumonia")
    assert counts(d) == {"train": [4, 4], "val": [2, 2], "test": [2, 2]}
    small = spec.model_copy(update={"size": (28, 28)})
    with np.load(path) as arrays:
        expected = arrays["train_images"]
    got = data.load_pixels(d.splits["train"], small)[..., 0]
    order = [int(s.inside.split("/")[1]) for s in d.splits["train"]]
    np.testing.assert_array_equal(got, expected[order])
    assert data.open_dataset(archive(tmp_path / "other.npz")).classes == ("0", "1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"val_labels": None}, "other.npz: val: no array val_labels; expected MedMNIST's six"),
        (
            {"train_labels": np.zeros((8, 14), np.uint8)},
            r"train: labels are \(8, 14\) uint8; expected",
        ),
        (
            {"test_images": np.zeros((4, 28, 28, 28), np.uint8)},
            r"test: images are \(4, 28, 28, 28\)",
        ),
        ({"test_images": np.zeros((4, 28, 28))}, "float64; expected"),
    ],
)
def test_bad_archives(tmp_path, changes, reason):
    with pytest.raises(EdgeKDError, match=reason):
        data.open_dataset(archive(tmp_path / "other.npz", **changes))


def test_what_is_no_archive(tmp_path):
    whole = archive(tmp_path / "x.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(4))
    for content in (b"no", whole[: len(whole) // 2], (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "y.npz").write_bytes(content)
        with pytest.raises(EdgeKDError, match="not a MedMNIST archive"):
            data.open_dataset(tmp_path / "y.npz")
    whole = bytearray(whole)
    whole[200:400] = bytes(200)  # within an array
    (tmp_path / "y.npz").write_bytes(whole)
    with pytest.raises(EdgeKDError, match="not a MedMNIST archive"):
        data.open_dataset(tmp_path / "y.npz")


def test_pneumonia_mnist_as_found(real_data):
    path = real_data("medmnist") / "pneumoniamnist_balanced_aksufatih.npz"
    d = data.open_dataset(path, allow_leakage=True)
    assert {s: len(v) for s, v in d.splits.items()} == {"train": 2428, "val": 270, "test": 468}
    assert "3 same bytes" in d.split_rule
