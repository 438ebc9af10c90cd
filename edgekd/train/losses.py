"""What a student is told to come near to, and how far from it it is.

Labels and teachers' soft targets (Hinton et al. 2015, arXiv 1503.02531), a teacher's spatial
attention (Zagoruyko and Komodakis 2017, arXiv 1612.03928), and how alike it finds the images of a
batch (Tung and Mori 2019, arXiv 1907.09682). Nothing here has weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from edgekd.data.augment import Mixed
from edgekd.records import EdgeKDError, Training
from edgekd.train.guided import guided_loss
from edgekd.train.loop import Loss
from edgekd.train.masked import masked_loss
from edgekd.train.soft_targets import Said, attention


class Wanted(NamedTuple):
    """What is wanted of n images."""

    labels: torch.Tensor  # (n, classes) probabilities
    soft: tuple[torch.Tensor, ...] = ()  # a teacher each: (n, classes) log-probabilities at T
    shares: torch.Tensor | None = None  # (n, teachers), each row sums to 1
    attention: tuple[torch.Tensor, ...] = ()  # (n, h, w) of length 1
    embedding: tuple[torch.Tensor, ...] = ()  # (n, C)
    masked: torch.Tensor | None = None  # (m, classes) logits: of images shown masked, after the n
    guided: torch.Tensor | None = None  # (g, classes) probabilities: of images shown in part, last

    def part(self, part: slice, device: torch.device) -> Wanted:
        """Of some of the images, on a device."""

        def some(x: torch.Tensor) -> torch.Tensor:
            return x[part].to(device)

        share = None if self.shares is None else some(self.shares)
        soft, maps, rest = (tuple(map(some, x))
                            for x in (self.soft, self.attention, self.embedding))  # fmt: skip
        return Wanted(some(self.labels), soft, share, maps, rest)

    def joined(self, logits: torch.Tensor, temperature: float) -> Wanted:
        """With one more teacher, who counts as much as the others together."""
        logits = logits[: len(self.labels)]
        soft = (*self.soft, F.log_softmax(logits / temperature, 1))
        one = torch.ones(len(logits), 1, device=logits.device)
        if self.shares is None:
            return self._replace(soft=soft, shares=one)
        return self._replace(soft=soft, shares=torch.cat([self.shares / 2, one / 2], 1))


def wanted(
    labels: torch.Tensor,
    classes: int,
    said: Sequence[Said],
    training: Training,
    mixed: Mixed | None = None,
) -> Wanted:
    """Of images with (n,) int64 `labels` of which teachers `said` something.

    mixed: how the images were mixed; what teachers said is mixed likewise, unless they saw the
    mixed images themselves (Beyer et al. 2022, arXiv 2106.05237: "function matching").
    """
    truth = F.one_hot(labels, classes).float()
    if mixed is not None and training.ask_mixed:
        truth, mixed = mixed.of(truth), None
    t = training.temperature
    soft = [F.log_softmax(s.logits / t, 1) for s in said]
    share = shares([s.logits for s in said], truth, training.teachers) if said else None
    maps = [s.attention for s in said if s.attention is not None]
    embedding = [s.embedding for s in said if s.embedding is not None]
    if mixed is not None:
        truth = mixed.of(truth)
        soft = [mixed.of(s.exp()).clamp_min(1e-12).log() for s in soft]
        share = None if share is None else mixed.of(share)
        maps = [_unit(mixed.of(m)) for m in maps]
        embedding = [mixed.of(e) for e in embedding]
    smooth = training.label_smoothing
    truth = (1 - smooth) * truth + smooth / classes
    return Wanted(truth, tuple(soft), share, tuple(maps), tuple(embedding))


def shares(logits: Sequence[torch.Tensor], truth: torch.Tensor, how: str) -> torch.Tensor:
    """(n, K): how much each of K teachers counts for each image.

    truth: (n, classes) probabilities. how: "equal"; "confidence", by each teacher's own
    cross-entropy with the truth (Zhang, Chen and Wang 2022, arXiv 2201.00007, eq. 3); or K numbers.
    """
    count, n = len(logits), len(truth)
    if how == "confidence" and count > 1:
        errors = torch.stack([F.cross_entropy(x, truth, reduction="none") for x in logits], 1)
        return (1 - errors.softmax(1)) / (count - 1)
    if how in ("equal", "confidence"):
        return torch.full((n, count), 1 / count)
    numbers = torch.tensor([float(x) for x in how.split(",")])
    if len(numbers) != count or not numbers.sum() > 0:
        raise EdgeKDError(f"teachers={how} are {len(numbers)} weights for {count} teachers")
    return (numbers / numbers.sum()).repeat(n, 1)


def hybrid(
    logits: torch.Tensor,
    target: Wanted,
    training: Training,
    weights: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> Loss:
    """Hybrid supervision: alpha_hard on the labels, the rest on the soft targets; and the hints.

    loss = alpha_hard * CE(y, z_s) + (1 - alpha_hard) * T^2 * sum_k w_k KL(p_k || softmax(z_s / T))
    (arXiv 2508.15251 and 2502.15959). weights: (classes,) of the labels' loss. features, last: the
    student's maps (n, C, h, w) where attention or features count. logits: (n + m, classes), the m
    last of images that are shown masked, or in part.
    """
    logits, seen = logits[: len(target.labels)], logits[len(target.labels) :]
    hard = F.cross_entropy(logits, target.labels, weight=weights)
    total, soft = hard, torch.zeros(())
    if target.soft and target.shares is not None:
        own = F.log_softmax(logits / training.temperature, 1)
        apart = [F.kl_div(own, p, reduction="none", log_target=True).sum(1) for p in target.soft]
        soft = (torch.stack(apart, 1) * target.shares).sum(1).mean()
        soft = soft * training.temperature**2 if training.t_squared else soft
        total = training.alpha_hard * hard + (1 - training.alpha_hard) * soft
    if features is not None and target.attention:
        total = total + training.attention * attention_loss(features, target.attention)
    if last is not None and target.embedding:
        total = total + training.features * likeness_loss(last, target.embedding)
    if target.masked is not None:
        expected = training.masked_share * len(target.labels)
        total = total + training.masked * masked_loss(seen, target.masked, expected)
    if target.guided is not None:
        total = total + training.guided * guided_loss(seen, target.guided, len(target.labels))
    return Loss(total, hard.item(), soft.item())


def attention_loss(features: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared distance of unit maps: 0 where they are equal, 2 where they never meet."""
    found = []
    for wished in maps:
        own = attention(features)
        if own.shape != wished.shape:
            own = F.interpolate(own[:, None], wished.shape[1:], mode="bilinear")[:, 0]
        found.append((_unit(own) - wished).pow(2).sum((1, 2)).mean())
    return torch.stack(found).mean()


def likeness_loss(last: torch.Tensor, embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """Similarity-preserving loss, eq. 4: ||G_t - G_s||_F^2 / n^2, the rows of G of length 1."""
    own = _likeness(last.float().mean((2, 3)))
    return torch.stack([(_likeness(e) - own).pow(2).mean() for e in embeddings]).mean()


def _likeness(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x @ x.T, dim=1)


def _unit(maps: torch.Tensor) -> torch.Tensor:
    return maps / maps.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
