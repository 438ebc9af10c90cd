"""Where training runs: on which device, in which precision, in how many processes.

Several processes (`accelerate launch -m edgekd distill ...`, or torchrun) share every batch: each
works on its part, gradients are averaged, and batch norm sees the whole batch. So they do what one
process would do with the same batch, within float error.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import distributed, nn

from edgekd.records import EdgeKDError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """One of `world` processes, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """For people: the device by its own name."""
        found = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return found if self.world == 1 else f"{found}, process {self.rank + 1} of {self.world}"

    def part(self, count: int) -> slice:
        """What this process does of a batch of `count`."""
        return slice(self.rank, count, self.world)

    def weight(self, count: int) -> float:
        """What this part's mean loss counts, so that the average over processes is the batch's."""
        return len(range(count)[self.part(count)]) * self.world / count

    def average(self, net: nn.Module) -> None:
        """Make the gradients of all processes their mean."""
        if self.world == 1:
            return
        for p in net.parameters():
            if p.grad is not None:
                distributed.all_reduce(p.grad)
                p.grad /= self.world

    def mean(self, numbers: list[float]) -> list[float]:
        """The mean of numbers over processes."""
        if self.world == 1:
            return numbers
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(found)
        return (found / self.world).tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The main process goes first; the others find what it has made."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def autocast(self, precision: str) -> Any:
        """Forward passes in a precision of PRECISIONS."""
        dtype = PRECISIONS[precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)


@cache
def here() -> Place:
    """The place of this process: a GPU where there is one, and what the launcher says."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    device = torch.device("cpu")
    if torch.cuda.is_available() and not wanted:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(device, rank, world)


def of(net: nn.Module) -> torch.device:
    """The device of a network's weights."""
    return next(iter(net.parameters()), torch.empty(0)).device


def synced(net: nn.Module, place: Place) -> nn.Module:
    """`net` with batch norms that see the batches of all processes, in place."""
    if place.world > 1:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                kind: Any = type(module)
                module.__class__ = _synced_class(kind)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise EdgeKDError(
                    f"{type(module).__name__} cannot be shared by processes: train in one"
                )
    return net


@cache
def _synced_class(kind: type) -> type:
    """A BatchNorm2d, or timm's with its activation, whose statistics are of all processes."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.track_running_stats):
            return kind.forward(self, x)  # type: ignore[attr-defined]
        count = torch.tensor([float(x.numel() / x.shape[1])], device=x.device)
        # The gradient of a sum over processes is the sum of the processes' gradients.
        sums = _AllSum.apply(torch.cat([x.float().sum((0, 2, 3)), count]))
        n, mean = sums[-1], sums[:-1] / sums[-1]
        centred = x - mean[:, None, None]
        var = _AllSum.apply(centred.float().square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        x = centred * scale[:, None, None] + self.bias[:, None, None]
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x

    return type(f"Synced{kind.__name__}", (kind,), {"forward": forward})


class _AllSum(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        total = grad.clone()
        distributed.all_reduce(total)
        return total


def finish() -> None:
    """Wait until a GPU has done what it was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fastest(steps: dict[str, Callable[[], object]], rounds: int = 4) -> str:
    """Name of the quickest of `steps`, called in turns; the first must be beaten by 10 %."""
    took: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter_ns()
            step()
            finish()
            took[name].append(time.perf_counter_ns() - began)
    best = {name: min(times[1:]) for name, times in took.items()}
    first, *_ = best
    found = min(best, key=lambda n: best[n])
    return found if best[found] < 0.9 * best[first] else first
