"""The embedded data set: synthetic frontal chest films with lesions whose place is known.

Lengths are in half sides of the chest's own frame: u to the image's right, v down, (0, 0) the
middle, before the random pose. Fields are (H, W) float64 "tissue": 0 air, about 1 bone.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgekd.records import EdgeKDError, Track, locked, make_folder, untracked, write_atomic

CLASSES = ("nodule", "normal", "opacity")
VERSION = 1  # of the pictures: another one may not fill up an older folder
_SETTINGS = ".phantom.json"  # written first; manifest.csv last
# The split of image i is number i % 20, so it does not depend on how many are made: 12/3/5 of 20.
_SPLIT = {"T": "train", "V": "val", "S": "test"}
_DEAL = "TSVTTSTTVTSTTSTTVTST"


class Chest(NamedTuple):
    """A healthy chest before it is filmed."""

    u: np.ndarray  # (H, W)
    v: np.ndarray  # (H, W)
    tissue: np.ndarray  # (H, W)
    lungs: np.ndarray  # (H, W), 1 in a lung, 0 outside, soft edge


def make(
    out: Path,
    *,
    per_class: int = 120,
    size: int = 96,
    seed: int = 0,
    marker: float = 0.0,
    track: Track = untracked,
) -> Path:
    """Folder `out` with `<split>/<class>/NNNN.png`, lesion masks and, written last, manifest.csv.

    `size` in pixels a side. `marker`: share of the opacity images that carry an "L" in a corner, a
    planted shortcut. EdgeKDError if `out` holds anything but this very data set.
    """
    if per_class < 3 or size < 32 or not 0 <= marker <= 1:
        given = f"per_class {per_class}, size {size}, marker {marker}"
        raise EdgeKDError(f"phantoms need per_class >= 3, size >= 32, marker in 0..1, not {given}")
    with locked(out):
        return _made(out, per_class, size, seed, marker, track)


def _made(out: Path, per_class: int, size: int, seed: int, marker: float, track: Track) -> Path:
    make_folder(out)
    asked = {"per_class": per_class, "size": size, "seed": seed, "marker": float(marker)}
    _claim(out, json.dumps(asked | {"version": VERSION}))
    if (out / "manifest.csv").is_file():
        return out
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(("file", "split", "class", "group"))
    todo = [(label, i) for label in CLASSES for i in range(per_class)]
    for label, i in track(todo, "drawing phantoms", len(todo)):
        split = _SPLIT[_DEAL[i % len(_DEAL)]]
        name = f"{split}/{label}/{i:04d}.png"
        image, lesion = film(label, i, size=size, seed=seed, marker=marker)
        _save(out / name, image)
        if lesion is not None:
            _save(out / "masks" / name, lesion.astype(np.uint8) * 255)
        table.writerow((name, split, label, f"{label}-{i:04d}"))
    write_atomic(out / "manifest.csv", rows.getvalue())
    return out


def _claim(out: Path, asked: str) -> None:
    """Mark the folder as one of these settings; EdgeKDError if it is something else's."""
    path = out / _SETTINGS
    if path.is_file():
        if (made := path.read_text("utf-8")) != asked:
            raise EdgeKDError(
                f"{out} holds phantoms of other settings ({made}, asked {asked}): "
                "choose another folder or delete it"
            )
    elif next(out.iterdir(), None) is not None:
        raise EdgeKDError(f"{out} is not empty and holds no phantoms: choose another folder")
    write_atomic(path, asked)


def _save(path: Path, image: np.ndarray) -> None:
    """Write (H, W) uint8 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def film(
    label: str, index: int, *, size: int, seed: int = 0, marker: float = 0.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W) uint8 image number `index` of class `label`, and (H, W) bool where the lesion is.

    Chest, lesion, exposure and marker each have their own random numbers: what is asked of one
    does not change the others.
    """
    key = (seed, CLASSES.index(label), index)
    chest = draw_chest(np.random.default_rng((*key, 0)), size)
    added, lesion = draw_lesion(np.random.default_rng((*key, 1)), chest, label)
    image = expose(np.random.default_rng((*key, 2)), chest.tissue + added)
    rng = np.random.default_rng((*key, 3))
    if label == "opacity" and rng.random() < marker:
        _stamp(image, rng)
    return image, lesion if lesion.any() else None


def draw_chest(rng: np.random.Generator, size: int) -> Chest:
    """A healthy chest of random build and pose."""
    u, v = _pose(rng, size)
    width = rng.uniform(0.92, 1.08)  # of the lungs
    u_wide = u / width
    heart = _heart(rng, u, v)
    lungs = _lungs(rng, u_wide, v) * (1 - heart)
    neck = 0.24 + 0.80 * _step(v + rng.uniform(0.74, 0.80), 0.05)
    body = _step(neck * rng.uniform(0.95, 1.05) - abs(u), 0.03)
    middle = np.exp(-((u / 0.13) ** 2)) * (0.20 + 0.02 * np.sin(v * 42))  # spine, its discs
    middle += 0.10 * _blob(u, v, 0.02, -0.30, 0.17, 0.35)  # great vessels
    middle -= 0.13 * np.exp(-((u / 0.045) ** 2)) * _step(-0.28 - v, 0.05)  # trachea
    middle += 0.05 * heart
    belly = 0.10 * _step(v - 0.45, 0.10)
    flesh = 0.50 + 0.03 * _noise(rng, size, 5) + 0.05 * abs(u)
    air = lungs * (0.36 - 0.05 * v - _vessels(rng, u, v, size))
    tissue = flesh - air + middle * (1 - 0.25 * lungs) + belly + _bones(rng, u_wide, v, lungs)
    return Chest(u, v, tissue * body, lungs)


def _pose(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The u and v (H, W) of each pixel's centre, after a random shift, rotation and scale."""
    side = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(side, side)
    x, y = x - rng.uniform(-0.05, 0.05), y - rng.uniform(-0.05, 0.05)
    turn, scale = rng.uniform(-0.08, 0.08), rng.uniform(0.92, 1.08)  # radians
    u = (np.cos(turn) * x + np.sin(turn) * y) / scale
    return u, (np.cos(turn) * y - np.sin(turn) * x) / scale


def _heart(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(H, W) 1 in the heart: an ellipse that leans to the image's right."""
    radius = rng.uniform(0.25, 0.33)
    x, y = u - rng.uniform(0.09, 0.14), v - rng.uniform(0.24, 0.30)
    across, along = x - 0.15 * y, y - 0.30 * x
    return _step(1 - np.hypot(across / radius, along / (0.95 * radius)), 0.035)


def _lungs(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(H, W) 1 in a lung: a bulging half ellipse a side, cut off below by the diaphragm's dome."""
    both = np.zeros_like(u)
    base = rng.uniform(0.44, 0.56)
    for side, dome in ((-1, base), (1, base + rng.uniform(0.02, 0.07))):  # the right one is higher
        x = side * u  # outward
        wall = 0.80 * np.sqrt(np.clip(1 - (abs(v - 0.25) / 1.05) ** 2.6, 0, 1))
        inner = 0.12 + 0.06 * np.cos(v * 3)
        apex = rng.uniform(-0.80, -0.72) + 2.2 * (x - 0.34) ** 2
        floor = dome + 0.9 * (x - 0.34) ** 2 * (x > 0.34) + 0.25 * (x - 0.34) ** 2
        edges = _step(wall - x, 0.015), _step(x - inner, 0.02), _step(v - apex, 0.02)
        both += edges[0] * edges[1] * edges[2] * _step(floor - v, 0.015)
    return both


def _bones(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """(H, W) tissue of ribs, behind and before, collar bones and shoulder blades."""
    a = abs(u)
    pitch, first = rng.uniform(0.150, 0.175), rng.uniform(0, 1)
    behind = v + 0.30 * a - 0.75 * a**2  # constant along a rib: up and out, then down
    before = v - 0.55 * a + 0.10 * a**2
    chest = _step(0.86 - a, 0.02) * _step(0.62 - v, 0.06) * _step(v + 0.80 - 0.3 * a, 0.04)
    bones = 0.060 * _bars(behind / pitch + first) * _step(a - 0.07, 0.02)
    bones = bones + 0.040 * _bars(before / (pitch * 1.15) + 2 * first) * _step(a - 0.34, 0.06)
    bones *= chest * (0.45 + 0.55 * lungs)
    lift = rng.uniform(0.12, 0.26)
    collar = v + rng.uniform(0.56, 0.64) + lift * (a - 0.1) + 0.04 * np.sin(a * 7)
    bones += 0.15 * np.exp(-((collar / 0.032) ** 2)) * _step(a - 0.08, 0.02) * _step(0.78 - a, 0.03)
    return bones + 0.07 * _blob(a, v, 0.80, -0.38, 0.12, 0.26)


def _vessels(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """(H, W) tissue of the vessels: branches that fade outward from each lung's root."""
    tissue = np.zeros_like(u)
    for side in (-1, 1):
        x, y = side * u - 0.20, v + rng.uniform(-0.05, 0.05)
        distance, angle = np.hypot(x, y), np.arctan2(y, x)
        tissue += 0.08 * np.exp(-((distance / 0.11) ** 2))
        for _ in range(6):
            bend = rng.uniform(-0.8, 0.8) * distance
            off = (angle - rng.uniform(-1.5, 1.5) - bend) * distance
            thick = 0.022 * np.exp(-distance) * rng.uniform(0.7, 1.3)
            tissue += 0.06 * np.exp(-((off / thick) ** 2) - distance / 0.40) * (x > 0)
    return np.minimum(tissue, 0.2) + 0.015 * _noise(rng, size, 14)


def draw_lesion(
    rng: np.random.Generator, chest: Chest, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) tissue that the disease adds, and (H, W) bool where it is; nothing for normal."""
    none = np.zeros_like(chest.lungs)
    if label == "normal":
        return none, none > 0
    inside = (chest.lungs > 0.95) & (abs(chest.u) > 0.24) & (chest.v > -0.62)
    if label == "nodule":
        inside &= chest.v < 0.42
    row, column = rng.choice(np.argwhere(inside))
    x, y = chest.u - chest.u[row, column], chest.v - chest.v[row, column]
    if label == "nodule":
        radius = rng.uniform(0.10, 0.16) * (1 + 0.06 * np.sin(3 * np.arctan2(y, x) + row))
        disc = _step(radius - np.hypot(x, y), 0.012) * chest.lungs
        return rng.uniform(0.36, 0.50) * disc, disc >= 0.5
    spread = np.exp(-((x / rng.uniform(0.30, 0.45)) ** 2) - (y / rng.uniform(0.30, 0.50)) ** 2)
    spread *= np.sign(chest.u) == np.sign(chest.u[row, column])  # one lung
    patches = 0.70 + 0.40 * _noise(rng, len(none), 9)
    field = spread * np.clip(patches, 0, None) * chest.lungs
    field /= field.max()
    return rng.uniform(0.34, 0.46) * field, (field >= 0.3) & (chest.lungs >= 0.5)


def expose(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """(H, W) uint8 film of `tissue`: random exposure, contrast, gamma, beam tilt and noise."""
    size = len(tissue)
    tilt = np.linspace(-1, 1, size) * rng.uniform(-0.04, 0.04)
    seen = (tissue + tilt) * rng.uniform(0.95, 1.20) + rng.uniform(-0.06, 0.06)
    seen = np.clip(seen, 0, None) ** rng.uniform(0.85, 1.25)
    grain = rng.standard_normal(tissue.shape) * rng.uniform(0.008, 0.018)
    return (np.clip(seen + grain, 0.0, 1.0) * 250).round().astype(np.uint8)


def _stamp(image: np.ndarray, rng: np.random.Generator) -> None:
    """Set a small bright "L" into the upper right corner, in place."""
    size = len(image)
    side, thick = max(5, size // 12), max(1, size // 48)
    top, right = (size // 24 + int(n) for n in rng.integers(0, max(1, size // 32) + 1, 2))
    box = image[top : top + side, size - right - side * 3 // 4 : size - right]
    box[:, :thick] = box[-thick:] = 255


def _step(x: np.ndarray, width: float) -> np.ndarray:
    """0 far below zero, 1 far above, soft over about four `width`s."""
    return 0.5 + 0.5 * np.tanh(x / (2 * width))


def _blob(u: np.ndarray, v: np.ndarray, u0: float, v0: float, su: float, sv: float) -> np.ndarray:
    """Gaussian hill of height 1."""
    return np.exp(-(((u - u0) / su) ** 2) - ((v - v0) / sv) ** 2)


def _bars(phase: np.ndarray) -> np.ndarray:
    """A bar around every whole number, brighter at its rims as a tube is."""
    off = abs(phase - phase.round())
    return _step(0.20 - off, 0.025) * (0.65 + 1.6 * off)


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(H, W) smooth noise of about unit variance with `cells` hills a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float64) * 1.3
