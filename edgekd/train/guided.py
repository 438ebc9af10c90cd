"""A teacher is guided by masks: its answer comes from the organ (or the lesion), and only from it.

Beside each image that has a mask the network is shown two more: one with all but the region hidden,
which keeps the image's label, and one with the region hidden, which tells no class (as models are
guided by boxes and masks in Rao et al., ICCV 2023, arXiv 2303.11932; here by answers, since
Score-CAM explains by answers). A student that learns from it inherits where its teacher looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from edgekd.data.augment import augment_masks
from edgekd.data.dataset import Sample
from edgekd.explain import occlusion
from edgekd.records import EdgeKDError, Spec, Training
from edgekd.train.masked import blur


class Guide:
    """The regions of the training images, and what is wanted of an image without them."""

    def __init__(self, samples: Sequence[Sample], spec: Spec, training: Training, seed: int):
        found = occlusion.regions(samples, spec)
        if found is None:
            raise EdgeKDError(
                "guided needs masks of organs or lesions, and no training image has one: "
                "put them under masks/ or organs/, or leave guided out"
            )
        self.masks, self.training, self.seed = found.masks, training, seed

    def shown(
        self, images: torch.Tensor, labels: torch.Tensor, epoch: int, chosen: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(2m, 3, H, W) and (2m, K): with the region alone, then without it, and what they tell.

        images: (n, 3, H, W), augmented and prepared; labels: (n, K) probabilities; chosen: (n,)
        their indices. m of them have a region.
        """
        masks = augment_masks(self.masks[chosen], self.training, self.seed, epoch, chosen)
        there = masks.flatten(1).any(1)
        images, labels = images[there], labels[there]
        inside = soft(masks[there])
        nothing = torch.full_like(labels, 1 / labels.shape[1])
        shown = torch.cat([hide(images, 1 - inside), hide(images, inside)])
        return shown, torch.cat([labels, nothing])


def guided_loss(logits: torch.Tensor, told: torch.Tensor, images: int) -> torch.Tensor:
    """KL(told || answer) of 2m shown images, summed and divided by the `images` of the step.

    0 where the region alone gives its label and the rest gives every class alike.
    """
    apart = F.kl_div(F.log_softmax(logits, 1), told, reduction="none").sum(1)
    return apart.sum() / images


def soft(masks: torch.Tensor) -> torch.Tensor:
    """(n, H, W) float32 of (n, H, W) bool, as `occlusion.soft`."""
    inside = masks.float()
    near = blur(inside[:, None], occlusion.EDGE)[:, 0]
    return torch.maximum(inside, (2 * near).clamp(0, 1))


def hide(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W): prepared images less what is `hidden` (n, H, W), as `occlusion.hide`."""
    left = 1 - hidden[:, None]
    total = left.sum((2, 3), keepdim=True)
    mean = (images * left).sum((2, 3), keepdim=True) / total.clamp_min(1e-6)
    fill = (blur(images * left) + 1e-3 * mean) / (blur(left) + 1e-3)
    found = images * left + fill * hidden[:, None]
    return found.contiguous(memory_format=torch.channels_last)
