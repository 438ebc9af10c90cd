"""What a teacher says of the training images: asked once for each view of them, then replayed.

An image's augmentation depends on (seed, view, image) alone, and epochs take `views` views in turn.
So a teacher, which costs many times what its student does, need not be asked again for a view that
it has seen: its answers lie in memory-mapped arrays, beside those of other students' trainings on
the same data. They are computed in the images' own order and in batches of one size, so that they
do not depend on who asks.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from edgekd.data.augment import View
from edgekd.models import zoo
from edgekd.records import (
    AUGMENTATION,
    Artifact,
    EdgeKDError,
    Stored,
    Track,
    Training,
    disk,
    locked,
    make_folder,
    untracked,
)
from edgekd.train import distributed
from edgekd.train.masked import Draw, draw, masks, seen_through

CHUNK = 64  # images that the teacher is asked at once


class Said(NamedTuple):
    """A teacher's answers to n images."""

    logits: torch.Tensor  # (n, classes) float32
    attention: torch.Tensor | None = None  # (n, h, w) float32, of length 1 as a vector
    embedding: torch.Tensor | None = None  # (n, C) float32: its last map, averaged over space


class Kept(Stored):
    """What the arrays beside it are answers to."""

    FILE: ClassVar[str] = "targets.json"
    key: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of each array, views and images first


def attention(features: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) -> (N, h, w): energy over channels, each map of length 1.

    Zagoruyko and Komodakis 2017, arXiv 1612.03928, eq. 1 with p = 2.
    """
    energy = features.float().pow(2).sum(1)
    return energy / energy.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]


class Targets:
    """One teacher's answers for the training split."""

    def __init__(
        self,
        teacher: Artifact,
        images: View,
        count: int,
        training: Training,
        key: dict[str, Any],
        root: Path | None,
        track: Track = untracked,
        layer: str = "",
    ):
        """Of `count` images; `key` is all that `images` depend on. Kept under folder `root`.

        layer: the teacher's stage whose channels are masks, see zoo.Waist.
        """
        self.teacher, self.images, self.count = teacher, images, count
        self.views, self.track = training.views, track
        self.kinds = ["logits"]
        self.kinds += ["attention"] * (training.attention > 0)
        self.kinds += ["embedding"] * (training.features > 0)
        self.size, self.training, self.layer = teacher.spec.size, training, layer
        self.seed: int = key["seed"]
        self._drawn: dict[int, Draw] = {}
        augmentation = {name: getattr(training, name) for name in AUGMENTATION}
        self.key = key | {"teacher": teacher.sha256, "views": self.views, "kinds": self.kinds,
                          "augmentation": augmentation, "chunk": CHUNK}  # fmt: skip
        if training.masked:
            self.key |= {"masked_share": training.masked_share,
                         "masked_random": training.masked_random, "layer": layer}  # fmt: skip
        self.folder = None
        if root is not None and self.views:
            text = json.dumps(self.key, sort_keys=True)
            name = hashlib.sha256(text.encode()).hexdigest()[:12]
            self.folder = root / f"targets-{teacher.model}-{self.size[0]}px-{name}"
        self._net: zoo.Waist | None = None
        self._arrays: dict[str, np.ndarray] = {}

    def begin(self, view: int) -> None:
        """Have the answers to a view ready; asks the teacher for what is not there."""
        if self.folder is None:
            return
        done = self._open()["done"][view]
        if done.all():
            return
        with locked(self.folder):  # whoever else learns from this teacher waits for its answers
            self._ask(view, np.flatnonzero(~done).tolist())

    def _ask(self, view: int, left: list[int]) -> None:
        """Chunk after chunk of a view that is `left` to be asked for."""
        what = f"asking {self.teacher.model}, view {view + 1} of {self.views}"
        for chunk in self.track(left, what, len(left)):
            chosen = np.arange(chunk * CHUNK, min(self.count, (chunk + 1) * CHUNK))
            images = self.images(self.size, view, chosen)
            said = self.say(images)
            for name in self.kinds:
                self._write(name, (view, chosen[0]), getattr(said, name).numpy())
            if self.training.masked:
                shown = self.drawn(view).shown[chosen]
                found = self._say_masked(view, chosen[shown], images[shown])
                for name, values in zip(("mask", "masked"), found, strict=True):
                    every = np.zeros((len(chosen), *values.shape[1:]), _dtype(name))
                    every[shown] = values.numpy()
                    self._write(name, (view, chosen[0]), every)
            self._write("done", (view, chunk), np.ones(1, bool))

    def _write(self, name: str, place: tuple[int, int], values: np.ndarray) -> None:
        """Into an array's file, from `place` on; EdgeKDError where there is no room.

        Not through its mapping: a page that gets no room on the disk ends the process (SIGBUS).
        """
        assert self.folder is not None
        array: Any = self._arrays[name]
        at = array.offset + place[0] * array.strides[0] + place[1] * array.strides[1]
        path = self.folder / f"{name}.npy"
        try:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(np.ascontiguousarray(values, array.dtype).tobytes())
        except OSError as e:
            raise disk.refused(path, e) from None

    def of(self, view: int, chosen: np.ndarray, images: torch.Tensor) -> Said:
        """The answers to images `chosen` in a view; `images` are those, at some size."""
        if self.folder is None:
            fits = tuple(images.shape[2:]) == self.size
            return self.say(images if fits else self.images(self.size, view, chosen))
        found = {name: torch.from_numpy(self._open()[name][view, chosen].astype(np.float32))
                 for name in self.kinds}  # fmt: skip
        return Said(**found)

    def drawn(self, view: int) -> Draw:
        """Which images are shown masked in a view, and through what."""
        if view not in self._drawn:
            self._drawn = {view: draw(self.count, self.training, self.seed, view)}
        return self._drawn[view]

    def masked(self, view: int, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """((m, h, w) uint8 masks, (m, classes) logits of the images seen through them).

        chosen: (m,) images that `drawn` shows masked in this view.
        """
        if self.folder is None:
            # Of a batch's last few images none may be shown masked, and none cannot be augmented.
            images = self.images(self.size, view, chosen) if len(chosen) else torch.empty(0)
            return self._say_masked(view, chosen, images)
        arrays = self._open()
        return (torch.from_numpy(arrays["mask"][view, chosen]),
                torch.from_numpy(arrays["masked"][view, chosen]))  # fmt: skip

    def _say_masked(
        self, view: int, chosen: np.ndarray, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of images `chosen`, and the answers to them; `images` are those, at our size."""
        net = self._teacher()
        if not len(chosen):
            classes = len(self.teacher.spec.classes)
            return torch.zeros(0, *net.grid, dtype=torch.uint8), torch.zeros(0, classes)
        with torch.inference_mode():
            images = images.to(distributed.here().device)
            outlines = masks(net(images)[1].cpu(), self.drawn(view), chosen)
            logits = net.net(seen_through(images, outlines))
        return outlines.clone(), logits.float().cpu().clone()

    def _teacher(self) -> zoo.Waist:
        if self._net is None:
            self._net = zoo.load(self.teacher, self.layer).to(distributed.here().device)
        return self._net

    def say(self, images: torch.Tensor) -> Said:
        """The answers to `images` (n, 3, *size), whatever they are; nothing is kept."""
        net, images = self._teacher(), images.to(distributed.here().device)
        with torch.inference_mode():
            if self.kinds == ["logits"]:
                return Said(net.net(images).cpu().clone())
            logits, features, last = net.answers(images)
            found = {"logits": logits.clone()}
            if "attention" in self.kinds:
                found["attention"] = attention(features)
            if "embedding" in self.kinds:
                found["embedding"] = last.float().mean((2, 3))
        return Said(**{k: v.cpu().clone() for k, v in found.items()})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each array, as the teacher answers one image."""
        said = self.say(self.images(self.size, 0, np.arange(1)))
        shapes = {name: (self.views, self.count, *getattr(said, name).shape[1:])
                  for name in self.kinds}  # fmt: skip
        if self.training.masked:
            shapes["mask"] = (self.views, self.count, *self._teacher().grid)
            shapes["masked"] = shapes["logits"]
        return shapes

    def _create(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        """The arrays without an answer in them, and the record, which comes last."""
        make_folder(folder)
        chunks = -(-self.count // CHUNK)
        try:
            for name, shape in (shapes | {"done": (self.views, chunks)}).items():
                _create(folder / f"{name}.npy", shape, _dtype(name))
            Kept(key=self.key, shapes=shapes).save(folder)
        except BaseException:  # what has no room leaves the room that it took
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _open(self) -> dict[str, np.ndarray]:
        """The memory-mapped arrays, made empty if they are not there."""
        if self._arrays or self.folder is None:
            return self._arrays
        if not (self.folder / Kept.FILE).exists():
            shapes = self._shapes()
            with locked(self.folder):
                if not (self.folder / Kept.FILE).exists():  # nobody was quicker
                    self._create(self.folder, shapes)
        kept = Kept.load(self.folder)
        for name in (*kept.shapes, "done"):
            path = self.folder / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as e:
                raise EdgeKDError(
                    f"cannot read {path} ({type(e).__name__}): delete {self.folder}, run again"
                ) from None
            if name != "done" and array.shape != kept.shapes[name]:
                raise EdgeKDError(
                    f"{path} has shape {array.shape}, not {kept.shapes[name]}: delete "
                    f"{self.folder}, run again"
                )
            self._arrays[name] = array
        return self._arrays


def _dtype(name: str) -> np.dtype:
    kinds = {"logits": np.float32, "masked": np.float32, "mask": np.uint8, "done": np.bool_}
    return np.dtype(kinds.get(name, np.float16))


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An array of zeros in a file that has all its room on the disk."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            disk.allocate(file, file.tell() + math.prod(shape) * dtype.itemsize)
    except OSError as e:
        raise disk.refused(path, e) from None
