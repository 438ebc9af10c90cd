"""The one training loop: epochs of steps, a checkpoint after each, the best network kept.

What is learnt is the `Objective`'s: teaching, distilling and shrinking differ in nothing else.
Everything random is drawn from (seed, epoch, image) or (seed, step), so a training that is stopped
and started again goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgekd.data import preprocess
from edgekd.metrics import classification
from edgekd.records import EdgeKDError, Spec, Track, Training, untracked, write_atomic
from edgekd.runtimes import Outputs
from edgekd.train import distributed

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


class Loss(NamedTuple):
    """A loss to be minimised and what it is made of."""

    total: torch.Tensor  # 0-d, with its gradient
    hard: float
    soft: float


class Objective(Protocol):
    """What a network is to learn."""

    precision: str  # of forward passes, a name in compute.PRECISIONS

    def begin(self, net: nn.Module, epoch: int) -> bool:
        """Before an epoch; True if it reordered the network, so that no momentum fits it."""

    def losses(self, net: nn.Module, epoch: int, step: int, chosen: np.ndarray) -> Iterator[Loss]:
        """The losses of one step on the training images `chosen`, each to be differentiated."""


Judge = Callable[[nn.Module], dict[str, float]]  # figures of a network: loss, ...


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
    best_epoch: int = 0  # 0: as it began
    best: dict[str, torch.Tensor] | None = None
    precision: str = ""  # once it is chosen
    runner: Any = None  # the network as it is called, where it is compiled

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.net if self.average is None else self.average

    def forget(self, training: Training) -> None:
        """Begin anew with momentum and average: the network's channels have changed places."""
        fresh = _fresh(self.net, training)
        self.optimizer, self.average = fresh.optimizer, fresh.average


def train(
    net: nn.Module,
    objective: Objective,
    judge: Judge,
    labels: np.ndarray,
    out: Path,
    *,
    training: Training,
    asked: dict[str, Any],
    seed: int,
    learnt: bool = False,
    track: Track = untracked,
) -> State:
    """Train `net` (or go on training it) on images with `labels`; `state.best` is what to keep.

    learnt: it has learnt from these images already, and is kept as it is if no epoch is better.
    """
    place = distributed.here()
    distributed.synced(net.to(place.device), place)
    if place.world > training.batch // 2:
        raise EdgeKDError(f"{place.world} processes share a batch of {training.batch}: too many")
    state = _resume(out, net, training, asked)
    if not state.precision:
        state.precision = _precision(net, objective, labels, training)
    objective.precision = state.precision
    if learnt and state.epoch == 0:
        _judged(state, judge)
    if state.epoch < training.epochs and not _stale(state, training):
        _fit(state, objective, judge, labels, out, training, asked, seed, track)
    if state.best is None:
        raise EdgeKDError(f"no epoch of {out} had a finite validation loss: use a lower --lr")
    net.load_state_dict(state.best)
    net.cpu().eval()
    return state


def _precision(net: nn.Module, objective: Objective, labels: np.ndarray, training: Training) -> str:
    """That of the settings; for "auto", the one whose steps take the least time here."""
    if training.precision != "auto":
        return training.precision
    objective.begin(net, 0)
    trial, chosen = copy.deepcopy(net).train(), np.arange(min(training.batch, len(labels)))

    def step(precision: str) -> None:
        objective.precision = precision
        for loss in objective.losses(trial, 0, 0, chosen):
            loss.total.backward()
        trial.zero_grad(set_to_none=True)

    return distributed.fastest({name: partial(step, name) for name in distributed.PRECISIONS})


def _fit(
    state: State,
    objective: Objective,
    judge: Judge,
    labels: np.ndarray,
    out: Path,
    training: Training,
    asked: dict[str, Any],
    seed: int,
    track: Track,
) -> None:
    """Epochs from where `state` stands to the last; each ends with a checkpoint and a log line."""
    steps = steps_an_epoch(len(labels), training.batch)
    left = (training.epochs - state.epoch) * steps * training.batch
    batches = track(_batches(state.epoch, labels, training, seed), _what(out), left)
    began, sums, seen = time.perf_counter(), np.zeros(3), 0
    for epoch, index, chosen in _placed(batches, steps, state.epoch):
        if index == 0:
            if objective.begin(state.net, epoch):
                state.forget(training)
            torch.manual_seed(seed * 100_003 + epoch)  # dropout and drop path
            began, sums, seen = time.perf_counter(), np.zeros(3), 0
        rate = _learning_rate(state.step, steps, training)
        losses = _step(state, objective, epoch, chosen, rate)
        sums, seen = sums + np.array(losses) * len(chosen), seen + len(chosen)
        if index == steps - 1:
            line = {"epoch": epoch + 1, "lr": rate, "images_per_s": 0.0}
            line |= dict(zip(("loss", "hard", "soft"), (sums / seen).tolist(), strict=True))
            line["images_per_s"] = round(seen / (time.perf_counter() - began), 1)
            state.epoch = epoch + 1
            line |= _judged(state, judge)
            _checkpoint(out, state, asked, line)
            if _stale(state, training):
                return


def _what(out: Path) -> str:
    return f"training {out.name.split('-')[0]}"


def _placed(batches: Any, steps: int, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(epoch, number in the epoch, indices) for each batch."""
    for i, chosen in enumerate(batches):
        yield first + i // steps, i % steps, chosen


def steps_an_epoch(images: int, batch: int) -> int:
    """Optimiser steps of an epoch: a last batch under half size, or of one image, is dropped, as
    batch norm needs several.
    """
    steps = max(1, round(images / batch))
    return steps - 1 if steps > 1 and images - (steps - 1) * batch == 1 else steps


def _batches(first: int, labels: np.ndarray, training: Training, seed: int) -> Iterator[np.ndarray]:
    """Index arrays of all epochs from `first` on; each epoch is its own permutation."""
    for epoch in range(first, training.epochs):
        rng = np.random.default_rng((seed, epoch))
        if training.balanced:
            share = 1 / np.bincount(labels)[labels]
            order = rng.choice(len(labels), len(labels), p=share / share.sum())
        else:
            order = rng.permutation(len(labels))
        steps = steps_an_epoch(len(labels), training.batch)
        yield from (order[i * training.batch : (i + 1) * training.batch] for i in range(steps))


def _learning_rate(step: int, steps: int, training: Training) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm, total = training.warmup_epochs * steps, training.epochs * steps
    if step < warm:
        return training.lr * (step + 1) / warm
    return training.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, total - warm)))


def _step(
    state: State, objective: Objective, epoch: int, chosen: np.ndarray, rate: float
) -> tuple[float, float, float]:
    """One optimiser step; returns the mean loss and its hard and soft parts."""
    state.net.train()
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    parts = []
    place = distributed.here()
    weight = place.weight(len(chosen))
    for loss in objective.losses(state.runner or state.net, epoch, state.step, chosen):
        if not torch.isfinite(loss.total):
            raise EdgeKDError(
                f"the loss is {loss.total.item()} at step {state.step}: "
                f"use a lower --lr ({rate:.2g} now)"
            )
        (loss.total * weight if weight != 1 else loss.total).backward()
        parts.append((loss.total.item() * weight, loss.hard * weight, loss.soft * weight))
    place.average(state.net)
    nn.utils.clip_grad_norm_(state.net.parameters(), 5.0)
    state.optimizer.step()
    state.step += 1
    if state.average is not None:
        state.average.update(state.net, step=state.step)
    total, hard, soft = place.mean(np.mean(parts, axis=0).tolist())
    return total, hard, soft


def timed(
    net: nn.Module, objective: Objective, training: Training, clock: Callable[[], float]
) -> Callable[[int, np.ndarray], float]:
    """(epoch, images) -> seconds of such a step; at a rate of 0, so that nothing is learnt.

    `net` is not to be trained afterwards: its batch norms and the optimiser have seen the images.
    """
    state = _fresh(net.to(distributed.here().device), training)

    def seconds(epoch: int, chosen: np.ndarray) -> float:
        began = clock()
        _step(state, objective, epoch, chosen, 0.0)
        distributed.finish()
        return clock() - began

    return seconds


def as_session(net: nn.Module):
    """A torch classifier as a Session without a feature map, for metrics."""

    def run(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            logits = net(torch.from_numpy(images).to(distributed.of(net)))
            return Outputs(logits.float().cpu().numpy(), np.empty(0, np.float32))

    return run


def classifier_judge(val: np.ndarray, labels: np.ndarray, spec: Spec) -> Judge:
    """Loss and balanced accuracy on pixels (N, H, W, 3) uint8."""
    truth = torch.from_numpy(labels)

    def judge(net: nn.Module) -> dict[str, float]:
        logits = classification.answers(as_session(net), preprocess.normalise(val, spec))
        loss = F.cross_entropy(torch.from_numpy(logits), truth).item()
        right = torch.from_numpy(logits.argmax(1)) == truth
        recalls = [right[truth == c].float().mean().item() for c in truth.unique()]
        return {"loss": loss, "balanced_accuracy": float(np.mean(recalls))}

    return judge


def _judged(state: State, judge: Judge) -> dict[str, float]:
    """The judge's figures; remembers the network of the least validation loss."""
    net = state.judged.eval()
    net = getattr(net, "module", net)
    found = {f"val_{k}": v for k, v in judge(net).items()}
    if found["val_loss"] < state.best_loss:
        state.best_loss, state.best_epoch = found["val_loss"], state.epoch
        state.best = {k: v.detach().clone() for k, v in net.state_dict().items()}
    return found


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
    runner = torch.compile(net) if training.compile else None
    return State(net, average, optimizer, runner=runner)


def _checkpoint(out: Path, state: State, asked: dict[str, Any], line: dict[str, Any]) -> None:
    """Write the state and the log so far, each whole or not at all."""
    if not distributed.here().main:
        return
    log = out / LOG
    lines = log.read_text("utf-8").splitlines()[: state.epoch - 1] if log.exists() else []
    write_atomic(log, "\n".join([*lines, json.dumps(line)]) + "\n")
    content = {
        "asked": json.dumps(asked, sort_keys=True),
        "net": state.net.state_dict(),
        "average": None if state.average is None else state.average.module.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "best": state.best,
        "numbers": {
            k: getattr(state, k) for k in ("epoch", "step", "best_loss", "best_epoch", "precision")
        },
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
        saved = torch.load(path, map_location=distributed.of(net), weights_only=True)
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
