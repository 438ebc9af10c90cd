"""Does each runtime work here, on each device? A tiny real model goes through all of them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from edgekd import runtimes
from edgekd.quantize import engines
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Profile,
    Record,
    RuntimeUnavailable,
    shipped_profiles,
    write_atomic,
)
from edgekd.runtimes import golden

TINY = (
    Path(runtimes.__file__).parent / "tiny"
)  # an artifact: one convolution, 32 pixels, three classes
WEIGHTS = "weights.npz"  # of the same, for torch


class Check(Record):
    """One thing that was tried."""

    what: str
    state: Literal["PASS", "FAIL", "ABSENT"]  # absent: not installed, or no such device here
    detail: str  # what was found, or why not
    fix: str = ""


def examine() -> list[Check]:
    """Every runtime on every device it sees, every engine, every shipped profile's own device."""
    found: list[Check] = []
    for name in runtimes.names():
        what = f"runtime {name}"
        try:
            devices = runtimes.get(name).devices()
        except RuntimeUnavailable as e:
            found.append(_absent(what, e))
            continue
        if not devices:
            found.append(Check(what=what, state="ABSENT", detail="it sees no device here",
                               fix="install the device's driver"))  # fmt: skip
        found += [_try(name, device) for device in devices]
    found += [_engine(name) for name in engines.names()]
    return found + [_profile(name) for name in shipped_profiles()]


def _absent(what: str, error: EdgeKDError) -> Check:
    reason, _, fix = str(error).partition(": ")
    return Check(what=what, state="ABSENT", detail=reason, fix=fix)


def _try(name: str, device: str) -> Check:
    """The tiny model in one runtime on one device, against its golden samples."""
    what = f"runtime {name} on {device}"
    tiny = Artifact.load(TINY)
    profile = Profile(name="doctor", runtime=name, device=device, static_batch=device == "NPU")
    precision = "fp16" if device == "NPU" else "fp32"
    try:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            session = runtimes.get(name).load(
                _loadable(name, tiny, Path(folder), profile), profile, precision, None
            )
            made = golden.verify(tiny, session, name, device)
    except EdgeKDError as e:
        fix = "update the device's driver and the runtime: they do not fit"
        return Check(what=what, state="FAIL", detail=str(e), fix=fix)
    far = ["NaN" if x is None else f"{x:.0e}" for x in (made.logits, made.features)]
    detail = f"differs by {far[0]}, {far[1]}"
    if made.ok:
        return Check(what=what, state="PASS", detail=detail)
    return Check(what=what, state="FAIL", detail=detail,
                 fix="deploy nothing on it: its answers are wrong; update its driver")  # fmt: skip


def _loadable(name: str, tiny: Artifact, folder: Path, profile: Profile) -> Path:
    """The tiny model as a file that the runtime loads."""
    if name == "torch":
        return _program(tiny, folder)
    if tiny.path.suffix in runtimes.get(name).SUFFIXES:
        return tiny.path
    return runtimes.get(name).build(tiny.path, folder, profile)[0]


def _program(tiny: Artifact, folder: Path) -> Path:
    """The tiny model as a torch program."""
    import torch
    from torch.nn import functional as F

    with np.load(tiny.folder / WEIGHTS, allow_pickle=False) as stored:
        weights = {name: torch.from_numpy(stored[name]) for name in stored.files}

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterDict(weights)

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            w = self.weights
            features = F.relu(F.conv2d(image, w["kernel"], w["offset"], stride=4, padding=1))
            return features.mean((2, 3)) @ w["matrix"] + w["bias"], features

    example = torch.zeros(golden.COUNT, 3, *tiny.spec.size)
    torch.export.save(torch.export.export(Tiny().eval(), (example,)), content := io.BytesIO())
    write_atomic(folder / "model.pt2", content.getvalue())
    return folder / "model.pt2"


def _engine(name: str) -> Check:
    what = f"engine {name}"
    try:
        engines.get(name)
    except EdgeKDError as e:
        return _absent(what, e)
    return Check(what=what, state="PASS", detail="installed")


def _profile(name: str) -> Check:
    """Whether a profile's own device is here, so that what is measured here is its own."""
    profile = Profile.read(name)
    what = f"profile {name}"
    try:
        if profile.device in runtimes.get(profile.runtime).devices():
            found = f"{profile.runtime} on {profile.device} is here"
            return Check(what=what, state="PASS", detail=found)
        reason = f"{profile.runtime} sees no {profile.device} here"
    except RuntimeUnavailable as e:
        reason = str(e)
    fix = "what is measured here is another machine's: run edgekd on the device"
    return Check(what=what, state="ABSENT", detail=reason, fix=fix)


def check(found: Sequence[Check]) -> None:
    """EdgeKDError that names what failed."""
    broken = [c.what for c in found if c.state == "FAIL"]
    if broken:
        raise EdgeKDError(f"{', '.join(broken)}: see the fix above")
