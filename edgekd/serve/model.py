"""A bundle at work: an image file in, an answer out, and why."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgekd import runtimes
from edgekd.bundle import bundle, out_of_distribution
from edgekd.bundle.bundle import Checked, Manifest
from edgekd.bundle.out_of_distribution import Familiar
from edgekd.data import preprocess
from edgekd.explain import score_cam
from edgekd.metrics.calibration import probabilities
from edgekd.records import Artifact, EdgeKDError, Fidelity, Profile, Record, Timing, user_cache
from edgekd.runtimes import Outputs, Session


class Answer(Record):
    """What the model says of one image."""

    image: str  # sha256 of its bytes: nothing else of it is kept
    label: str  # the most probable class; empty: the model abstains
    probabilities: dict[str, float]  # calibrated
    abstained: str  # why; empty: it does not
    warnings: tuple[str, ...]  # what is unusual of the image
    ms: float  # from the file's bytes to the answer

    @property
    def foremost(self) -> str:
        """The most probable class, whether or not the model dares to say it."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


class Cam(NamedTuple):
    """A Score-CAM map of one image for one class (Wang et al. 2020, arXiv 1910.01279)."""

    label: str  # the class that is explained
    map: np.ndarray | None  # (h, w) float32, 0 or more, at feature resolution; None: undefined
    pixels: np.ndarray  # (H, W, 3) uint8, the image as the model saw it

    def overlay(self) -> np.ndarray:
        """(H, W, 3) uint8: the image, coloured where the map is high; EdgeKDError without a map."""
        if self.map is None:
            raise EdgeKDError(f"the map of {self.label} is undefined: there is nothing to show")
        return score_cam.overlay(self.pixels, self.map)


class Seen(NamedTuple):
    """An image file, prepared."""

    sha256: str
    pixels: np.ndarray  # (H, W, 3) uint8
    began: float  # time.perf_counter() when its bytes were there
    unusual: tuple[str, ...] = ()  # of the picture itself, whatever the model knows


class Model:
    """A bundle that was checked, and is loaded."""

    def __init__(
        self,
        folder: Path,
        checked: Checked,
        digest: str,
        *,
        abstain_below: float | None,
        most_pixels: int = preprocess.MAX_PIXELS,
    ) -> None:
        """Digest: sha256 of bundle.json, as it was checked."""
        self.bundle = digest
        self.manifest: Manifest = checked.manifest
        self.signer, self.trusted = checked.signer, checked.trusted
        self.artifact: Artifact = bundle.loaded(folder)
        self.profile: Profile = checked.manifest.profile
        self.abstain_below = (
            checked.manifest.abstain_below if abstain_below is None else abstain_below
        )
        inside = checked.manifest.files
        self.timing = Timing.load(folder) if Timing.FILE in inside else None
        self.fidelity = Fidelity.load(folder) if Fidelity.FILE in inside else None
        self.usual: Familiar | None = None
        if out_of_distribution.FILE in inside:
            self.usual = out_of_distribution.read(folder / out_of_distribution.FILE)
        self.most_pixels = most_pixels
        self.session: Session = runtimes.open_session(self.artifact, self.profile)

    def predict(self, image: Path) -> Answer:
        """What the model says of an image file: JPEG, PNG or DICOM; EdgeKDError if it is none."""
        (answer,) = self.answer([self._seen(image)])
        return answer

    def explain(self, image: Path, label: str = "") -> Cam:
        """Why: the Score-CAM map of class `label`, by default of the most probable one."""
        seen = self._seen(image)
        chosen = label or self.answer([seen])[0].foremost
        return Cam(chosen, self.why(seen, chosen), seen.pixels)

    def _seen(self, image: Path) -> Seen:
        try:
            return self.see(preprocess.read(image))
        except EdgeKDError as e:
            raise EdgeKDError(f"{image}: {e}") from None

    def see(self, data: bytes) -> Seen:
        """An image file's bytes, prepared; EdgeKDError if it cannot be read whole."""
        began = time.perf_counter()
        image = preprocess.decoded(data, self.most_pixels)
        pixels = preprocess.fitted(image, self.artifact.spec)
        unusual = (preprocess.FLAT,) if preprocess.is_flat(image) else ()
        return Seen(hashlib.sha256(data).hexdigest(), pixels, began, unusual)

    def answer(self, seen: Sequence[Seen]) -> list[Answer]:
        """One answer an image, all asked at once."""
        pixels = np.stack([s.pixels for s in seen])
        said = self.session(preprocess.normalise(pixels, self.artifact.spec))
        unusual = self._unusual(pixels, said)
        p = probabilities(said.logits, self.artifact)
        now = time.perf_counter()
        return [self._answer(*x, now) for x in zip(seen, p, unusual, strict=True)]

    def _unusual(self, pixels: np.ndarray, said: Outputs) -> list[tuple[str, ...]]:
        if self.usual is None:  # the bundle does not tell what is usual
            return [()] * len(pixels)
        return out_of_distribution.warnings(self.usual, pixels, said.features.mean((2, 3)))

    def _answer(self, seen: Seen, p: np.ndarray, unusual: tuple[str, ...], now: float) -> Answer:
        classes = self.artifact.spec.classes
        sure = float(p.max())
        why = ""
        if sure < self.abstain_below:
            most = math.floor(1000 * sure) / 1000  # rounded up, it might be what is needed
            why = f"{most:.3f} sure at most, an answer needs {self.abstain_below:g}"
        return Answer(
            image=seen.sha256,
            label="" if why else classes[int(p.argmax())],
            probabilities={c: float(x) for c, x in zip(classes, p, strict=True)},
            abstained=why,
            warnings=(*seen.unusual, *unusual),
            ms=(now - seen.began) * 1e3,
        )

    def why(
        self, seen: Seen, label: str, before: Callable[[], None] = lambda: None
    ) -> np.ndarray | None:
        """(h, w) float32 Score-CAM map of class `label`; None: there is nothing to show.

        before: called ahead of each batch of masked images, by whichever thread asks for it; what
        it raises ends the map.
        """
        classes = self.artifact.spec.classes
        if label not in classes:
            raise EdgeKDError(f'no class "{label}": {", ".join(classes)}')
        image = preprocess.normalise(seen.pixels[None], self.artifact.spec)[0]

        def asked(images: np.ndarray) -> Outputs:
            before()
            return self.session(images)

        return score_cam.score_cam(asked, image, classes.index(label)).map


def overlay(seen: Seen, heat: np.ndarray) -> bytes:
    """PNG: what the model saw, coloured where the map (h, w) is high."""
    return png(score_cam.overlay(seen.pixels, heat))


def veil(seen: Seen, heat: np.ndarray) -> bytes:
    """PNG to lay over `seen.pixels`: the map's colours, the more opaque the higher it is."""
    return png(score_cam.veil(heat, seen.pixels.shape[:2]))


def png(pixels: np.ndarray) -> bytes:
    """PNG of (H, W, 3 or 4) uint8."""
    with io.BytesIO() as buffer:
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()


def open_bundle(
    path: Path,
    key: Path | None = None,
    abstain_below: float | None = None,
    most_pixels: int = preprocess.MAX_PIXELS,
) -> Model:
    """The model in a bundle, once every byte of it was checked.

    It is unpacked beside what else holds for this machine, once; where `edgekd deploy` put it, it
    lies unpacked beside the file, with what was built for this device. key: file of the public key
    that must have signed it. abstain_below: in the place of the bundle's own. most_pixels: of an
    image.
    """
    checked, content = bundle.read(path, key)
    digest = hashlib.sha256(content[Manifest.FILE]).hexdigest()
    folder = path.resolve().parent / bundle.UNPACKED
    if not (folder / Manifest.FILE).is_file():
        folder = user_cache() / "bundles" / digest
    if not folder.exists():
        try:
            bundle.unpack(content, folder)
        except EdgeKDError:
            if not folder.exists():  # else another process was quicker
                raise
    for name, data in content.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != data:
            raise EdgeKDError(f"{folder / name} is not what was unpacked there: remove {folder}")
    return Model(folder, checked, digest, abstain_below=abstain_below, most_pixels=most_pixels)


def load(path: Path, key: Path | None = None, abstain_below: float | None = None) -> Model:
    """The model in a bundle such as cpu.edgekd, once every byte of it was checked; needs no torch.

    key: file of the public key that must have signed it. abstain_below: calibrated probability
    under which it gives no answer, in the place of the bundle's own. EdgeKDError if the bundle is
    not what was bundled, RuntimeUnavailable if its runtime or device is not here.
    """
    return open_bundle(path, key, abstain_below)
