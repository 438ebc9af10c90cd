"""teach() and distill(): one training loop, with or without a teacher's soft targets.

loss = alpha_hard * CE(y, z_s) + (1 - alpha_hard) * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))
(hybrid supervision of arXiv 2508.15251 and 2502.15959, alpha on the hard term; T^2 after Hinton et
al. 2015). Everything random is drawn from (seed, epoch, image), so a run that is stopped and
started again goes on as if nothing had happened.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgekd import data, imaging, metrics, models
from edgekd.records import (
    Arch,
    Artifact,
    EdgeKDError,
    Metric,
    Spec,
    Track,
    Training,
    make_folder,
    sha256,
    untracked,
    versions,
    write_atomic,
)
from edgekd.runtimes import Outputs

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass
class State:
    """What must survive a stop: everything that the next epoch depends on."""

    net: nn.Module
    average: (
        Any  # timm ModelEmaV3 or None: exponential moving average of net's weights and statistics
    )
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done
    step: int = 0
    best_loss: float = math.inf  # on the validation split
    best_epoch: int = 0
    best: dict[str, torch.Tensor] | None = None

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.net if self.average is None else self.average


def teach(
    dataset: data.Dataset,
    model: str,
    spec: Spec,
    out: Path,
    *,
    training: Training,
    weights: Path | None = None,
    pretrained: bool = False,
    seed: int = 0,
    track: Track = untracked,
) -> Artifact:
    """Train the timm network `model` on the labels alone; returns the teacher in folder `out`."""
    training = training.model_copy(update={"alpha_hard": 1.0})
    torch.manual_seed(seed)
    net = models.teacher(model, len(spec.classes), weights=weights, pretrained=pretrained)
    start = {"kind": "teacher", "model": model, "role": "teacher", "spec": spec}
    asked = settings(dataset, model, spec, training, seed=seed, weights=weights,
                     pretrained=pretrained)  # fmt: skip
    return _run(net, None, dataset, out, start, asked, training, seed, track)


def distill(
    dataset: data.Dataset,
    teacher: Artifact | None,
    name: str,
    arch: Arch,
    spec: Spec,
    out: Path,
    *,
    training: Training,
    seed: int = 0,
    track: Track = untracked,
) -> Artifact:
    """Train the sub-net `arch` on labels and `teacher`'s soft targets (None: on labels alone)."""
    if teacher is None:
        training = training.model_copy(update={"alpha_hard": 1.0})
    elif teacher.spec != spec:
        raise EdgeKDError(
            f"the teacher in {teacher.folder} sees {_difference(teacher.spec, spec)}: "
            "teacher and student must see the same images; teach one with these settings"
        )
    torch.manual_seed(seed)
    net = models.student(arch, len(spec.classes))
    parents = {} if teacher is None else {"teacher": teacher.sha256}
    start = {"kind": "student", "model": name, "role": "student", "spec": spec,
             "arch": arch, "parents": parents}  # fmt: skip
    asked = settings(dataset, name, spec, training, seed=seed, teacher=teacher)
    guide = None if teacher is None else models.load(teacher).net
    return _run(net, guide, dataset, out, start, asked, training, seed, track)


def settings(
    dataset: data.Dataset,
    model: str,
    spec: Spec,
    training: Training,
    *,
    seed: int,
    weights: Path | None = None,
    pretrained: bool = False,
    teacher: Artifact | None = None,
) -> dict[str, Any]:
    """All that a training depends on, as plain data: equal settings, equal result."""
    return {
        "model": model,
        "weights": sha256(weights) if weights else ("hub" if pretrained else "none"),
        "teacher": teacher.sha256 if teacher else "none",
        "data": dataset.fingerprint,
        "spec": spec.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "seed": seed,
    }


def _difference(a: Spec, b: Spec) -> str:
    """'size (96, 96), not (128, 128)': the first field in which two Specs differ."""
    field = next(f for f in Spec.model_fields if getattr(a, f) != getattr(b, f))
    return f"{field} {getattr(a, field)}, not {getattr(b, field)}"


def _run(
    net: nn.Module,
    guide: nn.Module | None,
    dataset: data.Dataset,
    out: Path,
    start: dict[str, Any],
    asked: dict[str, Any],
    training: Training,
    seed: int,
    track: Track,
) -> Artifact:
    """Train (or go on training), keep the best network, judge it once on the test split."""
    make_folder(out)
    spec: Spec = start["spec"]
    state = _resume(out, net, training, asked)
    if state.epoch < training.epochs and not _stale(state, training):
        train = data.load_pixels(dataset.splits["train"], spec, track)
        val = data.load_pixels(dataset.splits["val"], spec, track)
        _fit(state, guide, dataset, spec, train, val, out, training, asked, seed, track)
    if state.best is None:
        raise EdgeKDError(f"no epoch of {out} had a finite validation loss: use a lower --lr")
    net.load_state_dict(state.best)
    net.eval()
    found: dict[str, Metric] = {}
    per_class: dict[str, dict[str, float]] = {}
    for split in ("val", "test"):
        samples = dataset.splits[split]
        logits = metrics.answers(
            _as_session(net), imaging.normalise(data.load_pixels(samples, spec), spec)
        )
        labels, groups = np.array([s.label for s in samples]), [s.group for s in samples]
        scores, per_class = metrics.classification(
            logits, labels, groups, spec.classes, prefix=split, seed=seed
        )
        found |= scores
    models.save_weights(net, out / models.WEIGHTS)
    params, macs = models.count(net, spec.size)
    artifact = Artifact(
        **start,
        files={models.WEIGHTS: sha256(out / models.WEIGHTS)},
        layer=models.Waist(net, spec.size).layer,
        params=params,
        macs=macs,
        metrics=found,
        per_class=per_class,
        data_fingerprint=dataset.fingerprint,
        split_rule=dataset.split_rule,
        seed=seed,
        settings=asked | {"best_epoch": state.best_epoch, "epochs_run": state.epoch},
        versions=versions("torch", "timm", "numpy", "pillow"),
    ).save(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return artifact


def _fit(
    state: State,
    guide: nn.Module | None,
    dataset: data.Dataset,
    spec: Spec,
    train: np.ndarray,
    val: np.ndarray,
    out: Path,
    training: Training,
    asked: dict[str, Any],
    seed: int,
    track: Track,
) -> None:
    """Epochs from where `state` stands to the last; each ends with a checkpoint and a log line."""
    labels = np.array([s.label for s in dataset.splits["train"]])
    val_labels = torch.tensor([s.label for s in dataset.splits["val"]])
    steps = _steps(len(labels), training.batch)
    left = (training.epochs - state.epoch) * steps * training.batch
    batches = track(_batches(state.epoch, labels, training, seed), _what(out), left)
    began, sums, seen = time.perf_counter(), np.zeros(3), 0
    for epoch, index, chosen in _placed(batches, steps, state.epoch):
        if index == 0:
            torch.manual_seed(seed * 100_003 + epoch)  # dropout and drop path
            began, sums, seen = time.perf_counter(), np.zeros(3), 0
        images = augment(train[chosen], training, seed, epoch, chosen)
        rate = _learning_rate(state.step, steps, training)
        losses = _step(state, guide, _normalised(images, spec), labels[chosen], rate, training)
        sums, seen = sums + np.array(losses) * len(chosen), seen + len(chosen)
        if index == steps - 1:
            line = {"epoch": epoch + 1, "lr": rate, "images_per_s": 0.0}
            line |= dict(zip(("loss", "hard", "soft"), (sums / seen).tolist(), strict=True))
            line["images_per_s"] = round(seen / (time.perf_counter() - began), 1)
            state.epoch = epoch + 1
            line |= _validate(state, val, val_labels, spec)
            _checkpoint(out, state, asked, line)
            if _stale(state, training):
                return


def _what(out: Path) -> str:
    return f"training {out.name.split('-')[0]}"


def _placed(batches: Any, steps: int, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(epoch, number in the epoch, indices) for each batch."""
    for i, chosen in enumerate(batches):
        yield first + i // steps, i % steps, chosen


def _steps(images: int, batch: int) -> int:
    """Optimiser steps of an epoch: a last batch under half size is dropped (batch norm)."""
    return max(1, round(images / batch))


def _batches(first: int, labels: np.ndarray, training: Training, seed: int) -> Iterator[np.ndarray]:
    """Index arrays of all epochs from `first` on; each epoch is its own permutation."""
    for epoch in range(first, training.epochs):
        rng = np.random.default_rng((seed, epoch))
        if training.balanced:
            share = 1 / np.bincount(labels)[labels]
            order = rng.choice(len(labels), len(labels), p=share / share.sum())
        else:
            order = rng.permutation(len(labels))
        steps = _steps(len(labels), training.batch)
        yield from (order[i * training.batch : (i + 1) * training.batch] for i in range(steps))


def _learning_rate(step: int, steps: int, training: Training) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm, total = training.warmup_epochs * steps, training.epochs * steps
    if step < warm:
        return training.lr * (step + 1) / warm
    return training.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, total - warm)))


def _step(
    state: State,
    guide: nn.Module | None,
    images: torch.Tensor,
    labels: np.ndarray,
    rate: float,
    training: Training,
) -> tuple[float, float, float]:
    """One optimiser step; returns the loss and its hard and soft parts."""
    state.net.train()
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    teacher = None
    if guide is not None and training.alpha_hard < 1:
        with torch.inference_mode():
            teacher = guide(images)
        teacher = teacher.clone()
    logits = state.net(images)
    hard = F.cross_entropy(logits, torch.from_numpy(labels))
    soft = torch.zeros(()) if teacher is None else soft_loss(logits, teacher, training)
    loss = training.alpha_hard * hard + (1 - training.alpha_hard) * soft
    if not torch.isfinite(loss):
        raise EdgeKDError(
            f"the loss is {loss.item()} at step {state.step}: use a lower --lr ({training.lr} now)"
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.net.parameters(), 5.0)
    state.optimizer.step()
    state.step += 1
    if state.average is not None:
        state.average.update(state.net, step=state.step)
    return loss.item(), hard.item(), soft.item()


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, training: Training) -> torch.Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)), mean over images, times T^2 where asked."""
    t = training.temperature
    kl = F.kl_div(
        F.log_softmax(student / t, 1), F.log_softmax(teacher / t, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return kl * t * t if training.t_squared else kl


def augment(
    pixels: np.ndarray, training: Training, seed: int, epoch: int, indices: np.ndarray
) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1]: moved, turned, lit and noised.

    Each image's changes depend on (seed, epoch, its index) and on nothing else. What leaves the
    picture is replaced by its border. Turning and zooming resample, and so blur, as no test image
    is: only a share `warp` of the images is warped (on MRI, all warped cost 4 points of accuracy).
    """
    n, h, w, _ = pixels.shape
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    affine = np.zeros((n, 2, 3), np.float32)
    light = np.zeros((n, 2), np.float32)
    noise = np.zeros((n, 1, h, w), np.float32)
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
    grid = F.affine_grid(torch.from_numpy(affine), [n, 3, h, w], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    shift, gain = torch.from_numpy(light)[:, :, None, None, None].unbind(1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * gain + mean + shift + training.noise * torch.from_numpy(noise)
    return x.clamp_(0, 1)


def _normalised(x: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The same as imaging.normalise, on pixels that are already in [0, 1]."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    x = (x - mean[:, None, None]) / std[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


def _as_session(net: nn.Module):
    """A torch classifier as a Session without a feature map, for metrics."""

    def run(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            return Outputs(net(torch.from_numpy(images)).numpy(), np.empty(0, np.float32))

    return run


def _validate(state: State, val: np.ndarray, labels: torch.Tensor, spec: Spec) -> dict[str, float]:
    """Loss and balanced accuracy on the validation split; remembers the best network."""
    net = state.judged.eval()
    logits = metrics.answers(_as_session(getattr(net, "module", net)), imaging.normalise(val, spec))
    loss = F.cross_entropy(torch.from_numpy(logits), labels).item()
    right = torch.from_numpy(logits.argmax(1)) == labels
    recalls = [right[labels == c].float().mean().item() for c in labels.unique()]
    if loss < state.best_loss:
        state.best_loss, state.best_epoch = loss, state.epoch
        kept = getattr(net, "module", net).state_dict()
        state.best = {k: v.detach().clone() for k, v in kept.items()}
    return {"val_loss": loss, "val_balanced_accuracy": float(np.mean(recalls))}


def _stale(state: State, training: Training) -> bool:
    """Early stopping: `patience` epochs have brought no better validation loss."""
    return bool(training.patience) and state.epoch - state.best_epoch >= training.patience


def _fresh(net: nn.Module, training: Training) -> State:
    """Optimiser and average for a network at step 0; no weight decay on norms and biases."""
    from timm.optim import param_groups_weight_decay
    from timm.utils import ModelEmaV3

    net.to(memory_format=torch.channels_last)
    groups = param_groups_weight_decay(net, training.weight_decay)
    if training.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=training.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=training.lr, momentum=0.9, nesterov=True)
    average = ModelEmaV3(net, decay=training.ema, use_warmup=True) if training.ema else None
    return State(net, average, optimizer)


def _checkpoint(out: Path, state: State, asked: dict[str, Any], line: dict[str, Any]) -> None:
    """Write the state and the log so far, each whole or not at all."""
    log = out / LOG
    lines = log.read_text("utf-8").splitlines()[: state.epoch - 1] if log.exists() else []
    write_atomic(log, "\n".join([*lines, json.dumps(line)]) + "\n")
    content = {
        "asked": json.dumps(asked, sort_keys=True),
        "net": state.net.state_dict(),
        "average": None if state.average is None else state.average.module.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "best": state.best,
        "numbers": {k: getattr(state, k) for k in ("epoch", "step", "best_loss", "best_epoch")},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(out / CHECKPOINT, buffer.getvalue())


def _resume(out: Path, net: nn.Module, training: Training, asked: dict[str, Any]) -> State:
    """The state at the last finished epoch of these very settings, or a fresh one."""
    state = _fresh(net, training)
    path = out / CHECKPOINT
    if not path.exists():
        (out / LOG).unlink(missing_ok=True)
        return state
    try:
        saved = torch.load(path, weights_only=True)
    except Exception as e:
        raise EdgeKDError(
            f"cannot read {path} ({type(e).__name__}): delete it, run again"
        ) from None
    if saved["asked"] != json.dumps(asked, sort_keys=True):
        raise EdgeKDError(
            f"{out} holds an unfinished training with other settings: repeat those to resume, "
            "or give --force to start anew"
        )
    net.load_state_dict(saved["net"])
    if state.average is not None:
        state.average.module.load_state_dict(saved["average"])
    state.optimizer.load_state_dict(saved["optimizer"])
    return replace(state, best=saved["best"], **saved["numbers"])
