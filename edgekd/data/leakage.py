"""What a test split must not share with training: the same bytes, near-duplicates, the same group.

Near-duplicates have perceptual hashes (Zauner 2010, pHash: signs of the low frequencies) at most
`NEAR` of 255 bits apart and details that correlate by `ALIKE`, mirrored and turned by quarter turns
too. That finds copies saved again, halved or of another contrast, and tells neighbouring slices and
films of different patients apart (tests/test_leakage.py has the figures).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgekd.data.manifests import Entry
from edgekd.records import Track, untracked

NEAR = 24  # bits of 255
ALIKE = 0.975  # correlation of what is finer
_SIDE = 64  # pixels of the reduced image
_WAVES, _KEPT, _COARSE = 32, 16, 8  # frequencies a side: looked at, in the hash, common to all
_BLOCK = 1024  # images compared at a time
_PHASE = np.pi * (np.arange(_SIDE) + 0.5) / _SIDE
_COSINES = np.cos(np.arange(_WAVES)[:, None] * _PHASE).astype(np.float32)  # (32, 64) DCT-II


class Leak(NamedTuple):
    """Two images in two splits that must not be."""

    kind: str  # "same bytes", "near-duplicate" or "same group"
    a: Entry
    b: Entry

    def __str__(self) -> str:
        where = f"in splits {self.a.split} and {self.b.split}"
        if self.kind == "same bytes":
            return f"{self.b.shown}: same bytes as {self.a.shown}, {where}; keep one"
        if self.kind == "same group":
            return (
                f"{self.b.shown}: same patient or group as {self.a.shown}, {where}; move one, or, "
                "where the patient id stands for many, name them in column patient_id of a "
                "manifest.csv"
            )
        return f"{self.b.shown}: near-duplicate of {self.a.shown}, {where}; move one"


def waves(image: Image.Image) -> np.ndarray:
    """(32, 32) float16: the image's low frequencies (DCT-II), in units of those above the eighth.

    Without the mean, at (0, 0). All zero for an image without detail.
    """
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    found = _COSINES @ np.asarray(small, np.float32) @ _COSINES.T
    found[0, 0] = 0
    unit = np.linalg.norm(_detail(found))
    if unit < 1:  # rounding alone
        return np.zeros_like(found, np.float16)
    return np.clip(found / unit, -6e4, 6e4).astype(np.float16)


def _detail(waves: np.ndarray) -> np.ndarray:
    """(..., 32, 32) without the 8 x 8 lowest frequencies, which images of one organ share."""
    found = waves.copy()
    found[..., :_COARSE, :_COARSE] = 0
    return found


def _turned(waves: np.ndarray) -> Iterator[np.ndarray]:
    """(N, F, F) of the images as they are, mirrored and turned: 8 times, by signs alone."""
    odd = np.where(np.arange(waves.shape[-1]) % 2, -1, 1).astype(waves.dtype)
    for one in (waves, waves.transpose(0, 2, 1)):
        for rows in (1, odd[:, None]):
            for columns in (1, odd):
                yield one * rows * columns


def near_duplicates(entries: Sequence[Entry], track: Track = untracked) -> np.ndarray:
    """(P, 2) int: every pair i < j of entries that are near-duplicates, sorted."""
    if not entries:
        return np.empty((0, 2), np.int64)
    waves = np.array([e.waves for e in entries])  # (N, 32, 32) float16
    hashes = np.where(waves[:, :_KEPT, :_KEPT] < 0, -1, 1).astype(np.float32)
    hashes[:, 0, 0] = 0
    flat = hashes.reshape(len(waves), -1)  # (N, 256)
    least = 255 - 2 * NEAR  # the product of two hashes d apart is 255 - 2 d
    found = [np.empty((0, 2), np.int64)]
    blocks = list(itertools.combinations_with_replacement(range(0, len(waves), _BLOCK), 2))
    for i, j in track(blocks, "comparing images"):
        turned = (t.reshape(len(t), -1) for t in _turned(hashes[i : i + _BLOCK]))
        products = (t @ flat[j : j + _BLOCK].T for t in turned)
        best = functools.reduce(lambda a, b: np.maximum(a, b, out=a), products)
        if best.max() >= least:
            pairs = np.add(np.argwhere(best >= least), (i, j))
            found += [_alike(waves, p) for p in _pieces(pairs[pairs[:, 0] < pairs[:, 1]])]
    every = np.concatenate(found)
    return every[np.lexsort(every.T[::-1])]


def _pieces(pairs: np.ndarray) -> Iterator[np.ndarray]:
    """A few pairs at a time: their details are 8 kB."""
    for start in range(0, len(pairs), _BLOCK):
        yield pairs[start : start + _BLOCK]


def _alike(waves: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The pairs whose details correlate, as they are or turned."""
    a, b = (_detail(waves[pairs[:, k]].astype(np.float32)) for k in (0, 1))
    best = np.max([(turned * b).sum((1, 2)) for turned in _turned(a)], 0)
    return pairs[best >= ALIKE]


def across_splits(entries: Sequence[Entry], pairs: np.ndarray) -> list[Leak]:
    """Every leak between splits, the plainest reason for each pair of images once.

    `pairs` indexes `entries`. A group is told once, however many images it has.
    """
    leaks, told = [], set()
    first: dict[str, Entry] = {}
    for e in entries:
        if (other := first.setdefault(e.digest, e)).split != e.split:
            leaks.append(Leak("same bytes", other, e))
    for i, j in pairs.tolist():
        a, b = entries[i], entries[j]
        if a.split != b.split and a.digest != b.digest:
            leaks.append(Leak("near-duplicate", a, b))
    owned: dict[str, Entry] = {}
    for e in entries:
        if e.owner and (other := owned.setdefault(e.owner, e)).split != e.split:
            if e.owner not in told:
                leaks.append(Leak("same group", other, e))
            told.add(e.owner)
    return leaks


def summary(leaks: Sequence[Leak]) -> dict[str, int]:
    """How many of each kind; empty without any."""
    kinds = [leak.kind for leak in leaks]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
