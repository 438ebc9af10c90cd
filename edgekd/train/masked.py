"""Images seen through a teacher's channels: a student learns what its teacher answers to them.

Score-CAM explains a network by its answers to masked images (Wang et al. 2020, arXiv 1910.01279).
A student that gives its teacher's answers under its teacher's masks weighs the parts of an image
as its teacher does; plain distillation passes on the answer and not the reason (Parchami-Araghi et
al., ECCV 2024, arXiv 2402.03119). Masks of random smooth hills (as in RISE, Petsiuk et al. 2018,
arXiv 1806.07421) can take the place of some channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from edgekd.explain.faithfulness import random_map
from edgekd.explain.score_cam import FLAT, gaussian
from edgekd.records import Training


class Draw(NamedTuple):
    """Which of N training images are shown masked in one view, and through what."""

    shown: np.ndarray  # (N,) bool
    channel: np.ndarray  # (N,) float64 in [0, 1): which of the live channels, as a share of them
    smooth: np.ndarray  # (N,) bool: through random hills instead
    seed: np.ndarray  # (N,) int64, of the hills


def draw(count: int, training: Training, seed: int, view: int) -> Draw:
    """Drawn from (seed, view) alone, so that every process and every run shows the same."""
    rng = np.random.default_rng((seed, 2, view))
    shown = rng.random(count) < training.masked_share
    channel, smooth = rng.random(count), rng.random(count) < training.masked_random
    return Draw(shown, channel, smooth, rng.integers(1 << 31, size=count))


def masks(features: torch.Tensor, drawn: Draw, chosen: np.ndarray) -> torch.Tensor:
    """(n, h, w) uint8: what images `chosen` are shown through, 255 where all of an image is seen.

    features: (n, C, h, w), the teacher's explained map of them. A channel is scaled to 0..255 after
    its negative part is cut off, as for evidence maps. An image without a live channel is hidden.
    """
    act = features.float().clamp_min(0)
    low, high = act.amin((2, 3)), act.amax((2, 3))  # (n, C)
    live = (high - low) > FLAT * act.amax((1, 2, 3))[:, None]
    found = torch.zeros(len(act), *act.shape[2:], dtype=torch.uint8)
    for i, index in enumerate(chosen):
        if drawn.smooth[index]:
            hills = random_map((act.shape[2], act.shape[3]), int(drawn.seed[index]))
            found[i] = torch.from_numpy(np.rint(255 * hills)).to(torch.uint8)
            continue
        alive = live[i].nonzero()[:, 0]
        if len(alive):
            k = alive[int(drawn.channel[index] * len(alive))]
            unit = (act[i, k] - low[i, k]) / (high[i, k] - low[i, k])
            found[i] = (255 * unit).round().to(torch.uint8)
    return found


def seen_through(images: torch.Tensor, outlines: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W): images seen through masks over their own blurred selves.

    outlines: (n, h, w) uint8, resampled linearly to the images' size.
    """
    if not len(images):
        return images
    unit = outlines.to(images.device, images.dtype)[:, None] / 255
    mask = F.interpolate(unit, images.shape[2:], mode="bilinear", align_corners=False)
    blurred = blur(images)
    found = torch.lerp(blurred, images, mask)
    return found.contiguous(memory_format=torch.channels_last)


def blur(images: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """(n, 3, H, W): each image as `score_cam.blur` makes it; sigma is `share` of the short side."""
    height, width = images.shape[2:]
    sigma = share * min(height, width)
    rows = torch.tensor(gaussian(height, sigma), device=images.device, dtype=images.dtype)
    columns = torch.tensor(gaussian(width, sigma), device=images.device, dtype=images.dtype)
    return rows @ images.contiguous() @ columns.T


def centred(logits: torch.Tensor) -> torch.Tensor:
    """(n, classes) less each row's mean: evidence for a class beyond the others."""
    return logits - logits.mean(1, keepdim=True)


def masked_loss(own: torch.Tensor, wished: torch.Tensor, expected: float) -> torch.Tensor:
    """Mean squared distance of centred answers (m, classes) to masked images, a class.

    expected: masked images that a batch of this size has on average. The sum is divided by that and
    not by m, so that parts of a batch in several processes add up to the whole.
    """
    apart = (centred(own) - centred(wished)).pow(2).mean(1)
    return apart.sum() / expected
