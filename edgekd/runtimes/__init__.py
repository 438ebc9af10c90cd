"""A runtime is one file in this folder. Its name is what a profile says in `runtime =`, the package
it imports, and the extra that installs it. Nothing else registers it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np

from edgekd.records import Artifact, EdgeKDError, Profile, RuntimeUnavailable, unknown


class Outputs(NamedTuple):
    """What every model answers, as host arrays that later calls leave alone."""

    logits: np.ndarray  # (N, classes) float32
    features: np.ndarray  # (N, C, h, w) float32: the map that is explained


# (N, 3, H, W) float32 -> Outputs. Synchronous: when it returns, the answer is in host memory, so
# one stopwatch around the call fits every runtime.
Session = Callable[[np.ndarray], Outputs]


class Runtime(Protocol):
    """What a file here defines."""

    SUFFIXES: tuple[str, ...]  # of the files that `load` opens, what `build` makes first

    def build(self, onnx: Path, out: Path, profile: Profile) -> list[Path]:
        """Make in folder `out` what the device loads; the first path is what `load` takes."""

    def load(self, path: Path, profile: Profile, precision: str, batch: int | None) -> Session:
        """Open a file; RuntimeUnavailable if `profile.device` is not here. batch None: any."""

    def devices(self) -> list[str]:
        """Devices seen on this machine, the plainest first."""


def names() -> list[str]:
    """Every runtime there is a file for."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> Runtime:
    """The runtime called `name`, imported now and not before."""
    check(name)
    try:
        return cast(Runtime, importlib.import_module(f"{__name__}.{name}"))
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("edgekd"):
            raise  # ours is missing: a bug, not an install
        raise RuntimeUnavailable(
            f"runtime {name} needs {e.name}: pip install 'edgekd[{name}]'"
        ) from e


def check(name: str) -> None:
    """EdgeKDError with the nearest name if no profile may say `name`."""
    if name not in names():
        raise EdgeKDError(unknown("runtime", name, names()))


def one_by_one(run: Session) -> Session:
    """For a file of a static batch of 1: any number of images, each asked alone."""

    def each(images: np.ndarray) -> Outputs:
        parts = [run(images[i : i + 1]) for i in range(len(images))]
        return Outputs(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    return each


def open_session(artifact: Artifact, profile: Profile, batch: int | None = None) -> Session:
    """Load `artifact` in `profile`'s runtime on its device. batch None: any number of images.

    The files' hashes were verified by `Artifact.load`. Every call's input is checked here, once
    for all runtimes: EdgeKDError unless (N, 3, H, W) float32 with the artifact's H and W.
    """
    runtime = get(profile.runtime)
    if artifact.path.suffix not in runtime.SUFFIXES:
        raise EdgeKDError(
            f"runtime {profile.runtime} loads {', '.join(runtime.SUFFIXES)} files, "
            f"not {artifact.path}: edgekd export makes them"
        )
    if "input" in artifact.settings:
        taken = artifact.settings["input"]
        raise EdgeKDError(f"{artifact.folder} takes {taken}: it is for other programs")
    run = runtime.load(artifact.path, profile, artifact.precision, batch)
    height, width = artifact.spec.size
    expected = ("N" if batch is None else str(batch)) + f", 3, {height}, {width}"

    def checked(images: np.ndarray) -> Outputs:
        fits = images.ndim == 4 and images.shape[1:] == (3, height, width) and len(images) > 0
        if not fits or images.dtype != np.float32 or (batch and len(images) != batch):
            raise EdgeKDError(
                f"model takes ({expected}) float32, got {images.shape} {images.dtype}"
            )
        return run(images)

    return checked
