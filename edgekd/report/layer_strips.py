"""What each layer of teacher and student saw, as pictures side by side (arXiv 2502.15959)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekd.explain.score_cam import drawn, magma, overlay, resize, unit

SIDE = 120  # pixels of a picture's side


class Cell(NamedTuple):
    """One layer."""

    layer: str  # "stage3 40x16x16"
    average: np.ndarray  # (SIDE, SIDE, 3) uint8, mean of the channels
    heat: np.ndarray | None  # (SIDE, SIDE, 3) uint8, Score-CAM over the image; None: undefined
    seconds: float  # that the Score-CAM map took


class Strip(NamedTuple):
    """One network on one image, from its first layer to its last."""

    role: str
    image: str  # start of its file's hash
    cells: list[Cell]


def images_of(path: Path) -> set[str]:
    """The images that were explained layer by layer."""
    with np.load(path, allow_pickle=False) as stored:
        return {key.split("|")[2] for key in stored.files}


def read(path: Path, pixels: Mapping[str, np.ndarray]) -> list[Strip]:
    """Of what `edgekd explain --layers` left in `path`; image by image, teacher before student.

    pixels: image -> (H, W, 3) uint8. An image that is not among them is left out.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    found: dict[tuple[str, str], dict[str, None]] = {}  # (image, role) -> layers in order
    for key in arrays:
        role, layer, image, _ = key.split("|")
        if image in pixels:
            found.setdefault((image, role), {})[layer] = None
    images = list(dict.fromkeys(image for image, _ in found))
    order = sorted(found, key=lambda k: (images.index(k[0]), k[1] != "teacher"))
    return [
        Strip(role, image, [_cell(arrays, f"{role}|{layer}|{image}", layer, pixels[image])
                            for layer in found[image, role]])
        for image, role in order
    ]  # fmt: skip


def _cell(arrays: Mapping[str, np.ndarray], key: str, layer: str, pixels: np.ndarray) -> Cell:
    size = (SIDE, SIDE)
    average = magma(unit(drawn(arrays[f"{key}|average"], size))).round().astype(np.uint8)
    heat = arrays.get(f"{key}|heat")
    shown = None
    if heat is not None:
        small = np.stack([resize(pixels[..., c].astype(np.float32), size) for c in range(3)], -1)
        shown = overlay(np.rint(np.clip(small, 0, 255)).astype(np.uint8), heat)
    return Cell(layer, average, shown, float(arrays[f"{key}|seconds"]))
