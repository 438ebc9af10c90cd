"""Near-duplicates are found, and different patients are not taken for them."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edgekd import data
from edgekd.cli.main import app
from edgekd.data import leakage, phantom
from edgekd.data.manifests import Entry
from edgekd.records import EdgeKDError

FILM = Image.fromarray(phantom.film("nodule", 3, size=160)[0])


def entry(image: Image.Image, name: str = "", **more) -> Entry:
    return Entry(None, name, "", "", waves=leakage.waves(image), digest=name, **more)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out)


COPIES = {
    "jpeg": jpeg(FILM, 40),
    "half": FILM.resize((80, 80), Image.Resampling.BICUBIC),
    "double": FILM.resize((320, 320), Image.Resampling.BICUBIC),
    "gamma": FILM.point(lambda x: 255 * (x / 255) ** 0.8),
    "brighter": FILM.point(lambda x: 20 + 0.8 * x),
    "colour": FILM.convert("RGB"),
    "mirrored": FILM.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": FILM.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "turned": jpeg(FILM.transpose(Image.Transpose.ROTATE_90), 60),
    "turned and mirrored": FILM.transpose(Image.Transpose.TRANSVERSE),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(kind):
    others = [Image.fromarray(phantom.film("nodule", i, size=160)[0]) for i in (5, 6)]
    images = [others[0], FILM, others[1], COPIES[kind]]
    found = leakage.near_duplicates([entry(i) for i in images])
    np.testing.assert_array_equal(found, [[1, 3]])


def test_waves_by_hand():
    """A cosine of 5 half waves down and 3 across is one frequency; the mean is none."""
    y, x = np.mgrid[:64, :64] + 0.5
    wave = np.cos(np.pi * 12 * y / 64) * np.cos(np.pi * 9 * x / 64)
    got = leakage.waves(Image.fromarray((128 + 100 * wave).round().astype(np.uint8)))
    assert got[12, 9] == pytest.approx(1, abs=1e-3)
    got[12, 9] = 0
    assert abs(got).max() < 0.01


def test_films_of_different_chests_are_no_copies_and_flat_images_neither():
    films = [
        Image.fromarray(phantom.film(c, i, size=64)[0]) for c in phantom.CLASSES for i in range(40)
    ]
    flat = [Image.new("L", (64, 64), v) for v in (0, 0, 90)]
    found = leakage.near_duplicates([entry(i) for i in films + flat])
    assert found.shape == (0, 2)


def test_blocks_change_nothing(monkeypatch):
    images = [Image.fromarray(phantom.film("nodule", i, size=64)[0]) for i in (0, 1, 2, 3, 1, 0, 3)]
    entries = [entry(i) for i in images]
    whole = leakage.near_duplicates(entries)
    np.testing.assert_array_equal(whole, [[0, 5], [1, 4], [3, 6]])
    monkeypatch.setattr(leakage, "_BLOCK", 2)
    np.testing.assert_array_equal(leakage.near_duplicates(entries), whole)


def test_thousands_of_images_take_seconds():
    waves = np.random.default_rng(0).standard_normal((4000, 32, 32)).astype(np.float16)
    waves[17] /= np.linalg.norm(leakage._detail(waves[17]).astype(float))
    waves[3999] = waves[17]
    entries = [Entry(None, "", "", "", waves=w) for w in waves]
    start = time.process_time()
    found = leakage.near_duplicates(entries)
    assert time.process_time() - start < 20
    np.testing.assert_array_equal(found, [[17, 3999]])


def test_a_leak_is_told_once_by_its_plainest_reason():
    def one(name, split, owner="", digest=""):
        return Entry(None, name, split, "c", owner=owner, digest=digest or name)

    entries = [
        one("a", "train", "p"),
        one("b", "test", "p"),
        one("c", "test", "p"),
        one("d", "train", digest="x"),
        one("e", "val", digest="x"),
        one("f", "test"),
    ]
    pairs = np.array([[0, 5], [1, 5], [3, 4]])
    leaks = leakage.across_splits(entries, pairs)
    assert [(k.kind, k.a.name, k.b.name) for k in leaks] == [
        ("same bytes", "d", "e"),
        ("near-duplicate", "a", "f"),
        ("same group", "a", "b"),
    ]
    assert leakage.summary(leaks) == {"same bytes": 1, "near-duplicate": 1, "same group": 1}
    assert str(leaks[1]) == "f: near-duplicate of a, in splits train and test; move one"


# --- through data.inspect ---


@pytest.fixture
def leaky(phantoms, tmp_path):
    """Phantoms with a mirrored test film among the training films."""
    root = tmp_path / "leaky"
    shutil.copytree(phantoms, root)
    (root / "manifest.csv").unlink()
    with Image.open(next((root / "test/nodule").iterdir())) as film:
        mirrored = film.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(root / "train/nodule/zz.png")
    return root


def test_a_near_duplicate_fails_the_run_unless_allowed(leaky):
    assert data.inspect(leaky).leaks == {"near-duplicate": 1}
    with pytest.raises(EdgeKDError, match=r"train/nodule/zz.png: near-duplicate of test/nodule/.*"
                       "--split grouped deals anew, --allow-leakage goes on") as e:  # fmt: skip
        data.open_dataset(leaky)
    assert "\n" not in str(e.value)
    allowed = data.open_dataset(leaky, allow_leakage=True)
    assert "LEAKAGE between splits, allowed as asked for: 1 near-duplicate." in allowed.split_rule


def test_data_check_shows_leaks_and_exits_1(leaky):
    done = CliRunner().invoke(app, ["data", "check", str(leaky)])
    assert done.exit_code == 1
    assert "leakage between splits: 1 near-duplicate" in done.stdout
    assert "problem: train/nodule/zz.png: near-duplicate of test/nodule/" in done.stdout
    done = CliRunner().invoke(app, ["data", "check", str(leaky), "--allow-leakage", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["leaks"] == {"near-duplicate": 1}
    assert "LEAKAGE" in found["split_rule"]
    done = CliRunner().invoke(app, ["data", "check", str(leaky), "--split", "grouped"])
    assert done.exit_code == 0
    assert "leakage between splits: none" in done.stdout


@pytest.mark.parametrize("command", ["teach", "shrink", "search", "distill"])
def test_commands_that_open_data_refuse_a_leak(leaky, tmp_path, command):
    done = CliRunner().invoke(app, [command, "-d", str(leaky), "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 1
    assert "near-duplicate of test/nodule/" in done.stderr
    assert "--allow-leakage goes on" in done.stderr
    help_text = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "--split" in help_text
    assert "--allow-leakage" in help_text


def test_grouped_keeps_near_duplicates_together(leaky):
    for seed in range(3):
        dealt = data.open_dataset(leaky, split="grouped", seed=seed)
        assert dealt.split_rule.startswith("All images dealt again: 70/10/20 % of each class's")
        groups = [s.group for v in dealt.splits.values() for s in v]
        assert len(groups) - len(set(groups)) == 1


def test_random_is_asked_for_and_said(leaky):
    dealt = data.open_dataset(leaky, split="random", allow_leakage=True, seed=1)
    assert dealt.split_rule.startswith("RANDOM split of single images, as asked for: 70/10/20 %")
    sizes = {s: [sum(x.label == k for x in v) for k in range(3)] for s, v in dealt.splits.items()}
    assert sizes == {"train": [18, 17, 17], "val": [2, 2, 2], "test": [5, 5, 5]}


def test_given_needs_all_three_and_other_words_are_refused(leaky):
    shutil.rmtree(leaky / "val")
    with pytest.raises(EdgeKDError, match="--split given: the data has test, train, not"):
        data.open_dataset(leaky, split="given", allow_leakage=True)
    with pytest.raises(EdgeKDError, match=r'no split "group"; did you mean "grouped"\?'):
        data.open_dataset(leaky, split="group")


def test_lc25000_by_tile_and_at_random(real_data):
    root = real_data("lc25000_subset")
    with (root / "manifest.csv").open() as f:
        rows = list(csv.DictReader(f))
    given = data.open_dataset(root)
    tiles = {(r["class"], r["tile_cluster"]) for r in rows}
    groups = {s.group for v in given.splits.values() for s in v}
    assert len(groups) == len(tiles) == 1231
    found = data.inspect(root, split="random")
    assert found.dataset is None
    assert found.leaks["same group"] > 500
    assert found.leaks["same bytes"] == 5
    dealt = data.inspect(root, split="grouped")
    assert dealt.leaks == {}


def test_real_films_and_slices_of_different_patients_are_no_leak(real_data):
    for name in ("cxr_pneumonia", "brain_tumor_mri"):
        assert data.inspect(real_data(name)).leaks == {}


def test_pneumonia_mnist_as_found_leaks(real_data):
    path = real_data("medmnist") / "pneumoniamnist_varun19424.npz"
    assert data.inspect(path).leaks == {"same bytes": 8}
