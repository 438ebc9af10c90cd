"""What training images go through: moved, turned, lit, noised and partly erased, by the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from edgekd.data import dataset
from edgekd.records import Spec, Track, Training, untracked

ERASED_AREA = (0.01, 0.1)  # of the picture
ERASED_ASPECT = math.log(20)


class View(Protocol):
    """The training split as a network of one size sees it."""

    def __call__(self, size: tuple[int, int], epoch: int, chosen: np.ndarray) -> torch.Tensor:
        """(n, 3, *size) float32, augmented and normalised; the same change at every size."""


def view(
    samples: Sequence[dataset.Sample],
    spec: Spec,
    training: Training,
    seed: int,
    track: Track = untracked,
) -> View:
    """A View of `samples`; each size is prepared from the files once and kept as uint8."""
    pixels: dict[tuple[int, int], np.ndarray] = {}

    def batch(size: tuple[int, int], epoch: int, chosen: np.ndarray) -> torch.Tensor:
        if size not in pixels:
            at_size = spec.model_copy(update={"size": size})
            pixels[size] = dataset.load_pixels(samples, at_size, track)
        images = augment(pixels[size][chosen], training, seed, epoch, chosen)
        return normalised(images, spec)

    return batch


def augment(
    pixels: np.ndarray, training: Training, seed: int, epoch: int, indices: np.ndarray
) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1]: moved, turned, lit, noised, erased.

    Each image's changes depend on (seed, epoch, its index) and on nothing else. What leaves the
    picture is replaced by its border. Turning and zooming resample, and so blur, as no test image
    is: only a share `warp` of the images is warped (on MRI, all warped cost 4 points of accuracy).
    A share `erase` of the images has a rectangle of one grey level (random erasing, arXiv
    1708.04896), thin ones too: what somebody puts on a film decides nothing.
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    drawn = _changes(pixels.shape[1:3], training, seed, epoch, indices)
    x = _moved(x, drawn.affine)
    shift, gain = torch.from_numpy(drawn.light)[:, :, None, None, None].unbind(1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * gain + mean + shift + training.noise * torch.from_numpy(drawn.noise)
    x.clamp_(0, 1)
    for image, erased in zip(x, drawn.erased, strict=True):
        if erased is not None:
            rows, columns, level = erased
            image[:, rows, columns] = level
    return x


def augment_masks(
    masks: np.ndarray, training: Training, seed: int, epoch: int, indices: np.ndarray
) -> torch.Tensor:
    """(N, H, W) bool -> (N, H, W) bool: masks moved and turned as `augment` does their images."""
    drawn = _changes(masks.shape[1:], training, seed, epoch, indices)
    return _moved(torch.from_numpy(masks)[:, None].float(), drawn.affine)[:, 0] >= 0.5


class Changes(NamedTuple):
    """What is done to n images of one size."""

    affine: np.ndarray  # (n, 2, 3) float32, for affine_grid
    light: np.ndarray  # (n, 2) float32: brightness added, contrast factor
    noise: np.ndarray  # (n, 1, h, w) float32, standard normal; zeros where none is asked for
    erased: list[tuple[slice, slice, float] | None]  # n: rows, columns, and the level in [0, 1]


def _changes(
    size: Sequence[int], training: Training, seed: int, epoch: int, indices: np.ndarray
) -> Changes:
    """The changes of images `indices` of `size`, each drawn from (seed, epoch, its index)."""
    n, (h, w) = len(indices), size
    affine = np.zeros((n, 2, 3), np.float32)
    light = np.zeros((n, 2), np.float32)
    noise = np.zeros((n, 1, h, w), np.float32)
    erased: list[tuple[slice, slice, float] | None] = []
    for i, index in enumerate(indices):
        rng = np.random.default_rng((seed, epoch, int(index)))
        u = rng.uniform(-1, 1, 6)
        flips, warped = rng.random(2), rng.random() < training.warp
        angle = math.radians(training.rotate_deg) * u[0] * warped
        scale = 1 + training.zoom * u[1] * warped
        mirror = np.array([-1.0 if training.hflip and flips[0] < 0.5 else 1.0,
                           -1.0 if training.vflip and flips[1] < 0.5 else 1.0])  # fmt: skip
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        affine[i, :, :2] = scale * turn * mirror
        affine[i, :, 2] = 2 * np.round(training.translate * u[2:4] * (w, h)) / (w, h)
        light[i] = training.brightness * u[4], 1 + training.contrast * u[5]
        if training.noise:
            noise[i, 0] = rng.standard_normal((h, w), np.float32)
        erased.append(_rectangle(rng, h, w) if rng.random() < training.erase else None)
    return Changes(affine, light, noise, erased)


def _rectangle(rng: np.random.Generator, h: int, w: int) -> tuple[slice, slice, float]:
    """Rows, columns and level of a rectangle of 1 to 10 % of the picture, anywhere in it.

    Its sides are to each other as 1 to 20 up to 20 to 1, as far as the picture goes.
    """
    area, aspect = rng.uniform(*ERASED_AREA) * h * w, math.exp(rng.uniform(-1, 1) * ERASED_ASPECT)
    tall = int(np.clip(round(math.sqrt(area * aspect)), 1, h))
    wide = int(np.clip(round(area / tall), 1, w))
    down, across, level = rng.random(3)
    top, left = round(down * (h - tall)), round(across * (w - wide))
    return slice(top, top + tall), slice(left, left + wide), float(level)


def _moved(x: torch.Tensor, affine: np.ndarray) -> torch.Tensor:
    """(n, C, H, W) resampled linearly; what leaves the picture is replaced by its border."""
    grid = F.affine_grid(torch.from_numpy(affine), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def normalised(x: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The same as preprocess.normalise, on pixels that are already in [0, 1]."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    x = (x - mean[:, None, None]) / std[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


class Mixed(NamedTuple):
    """A batch whose images are mixed with others of it."""

    images: torch.Tensor  # (n, 3, H, W)
    partner: torch.Tensor  # (n,) index in the batch of what was mixed in
    own: torch.Tensor  # (n,) share that is the image's own

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """(n, ...) targets of the images, mixed in the same shares."""
        own = self.own.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return own * x + (1 - own) * x[self.partner]


def mix(images: torch.Tensor, training: Training, seed: int, step: int) -> Mixed | None:
    """The batch by mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899); None where both are off.

    Shares and partners depend on (seed, step) alone. A rectangle covers the partner's share of the
    picture as far as it does not reach beyond the border; what it really covers counts.
    """
    if not (training.mixup or training.cutmix):
        return None
    n, _, h, w = images.shape
    rng = np.random.default_rng((seed, 1, step))
    partner = torch.from_numpy(rng.permutation(n))
    if training.mixup:
        share = rng.beta(training.mixup, training.mixup, n).astype(np.float32)
        own = torch.from_numpy(share)
        mixed = Mixed(images, partner, own)
        return mixed._replace(images=mixed.of(images))
    keep = torch.ones(n, 1, h, w)
    for i, share in enumerate(rng.beta(training.cutmix, training.cutmix, n)):
        tall, wide = (math.sqrt(1 - share) * side / 2 for side in (h, w))
        y, x = rng.uniform(0, h), rng.uniform(0, w)
        top, bottom = (int(np.clip(round(v), 0, h)) for v in (y - tall, y + tall))
        left, right = (int(np.clip(round(v), 0, w)) for v in (x - wide, x + wide))
        keep[i, 0, top:bottom, left:right] = 0
    pasted = keep * images + (1 - keep) * images[partner]
    return Mixed(pasted.contiguous(memory_format=torch.channels_last), partner,
                 keep.mean((1, 2, 3)))  # fmt: skip
