"""A model in a folder: what it sees and says, its files, and where it came from."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.records.profile import Precision
from edgekd.records.scores import Calibration, Evaluation, Metric
from edgekd.records.store import EdgeKDError, Record, Stored, sha256

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self


Kind = Literal["teacher", "supernet", "student", "onnx", "openvino", "torch", "tensorrt"]


class Spec(Record):
    """What the model sees and says; it travels in every artifact. `preprocess.prepare` obeys it."""

    classes: tuple[str, ...] = Field(min_length=2)
    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of pixels in [0, 1]: ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    channels: Literal["grey", "rgb"] = "rgb"  # grey: luma, repeated three times


class Arch(Record):
    """A sub-net of an OFA space. Tuples have 4 entries a stage; those beyond depth are ignored."""

    space: str
    kernel: tuple[int, ...]
    expand: tuple[int, ...]
    depth: tuple[int, ...]
    resolution: int  # pixels a side


class Artifact(Stored):
    """A model in a folder, with all that is needed to use it and to say where it came from."""

    FILE: ClassVar[str] = "artifact.json"
    folder: Path = Field(default=Path(), exclude=True)  # where it was loaded from; not stored

    kind: Kind
    model: str  # timm name, or the name of the sub-net
    precision: Precision = "fp32"
    files: dict[str, str]  # name in the folder -> sha256; the first is the one that is loaded
    spec: Spec
    arch: Arch | None = None
    layer: str = ""  # whose output `features` is, and its grid; set when exported
    role: Literal["teacher", "student"] = "student"
    parents: dict[str, str] = {}  # kind of the parent -> sha256 of its first file
    params: int
    macs: int  # multiply-accumulates of one image, convolutions and linear layers
    metrics: dict[str, Metric] = {}  # "test_balanced_accuracy": ..., "parity_max_abs_logits": ...
    per_class: dict[str, dict[str, float]] = {}  # class -> recall, precision, f1, images
    calibration: Calibration | None = None  # None: not fitted, probabilities are as trained
    evaluation: Evaluation | None = None  # of the test split; None: not judged yet
    data_fingerprint: str = ""
    split_rule: str = ""
    seed: int = 0
    settings: dict[str, Any] = {}  # what the stage was asked for; asked again, it is not redone
    versions: dict[str, str] = {}

    @property
    def path(self) -> Path:
        """The file that a runtime loads."""
        return self.folder / next(iter(self.files))

    @property
    def sha256(self) -> str:
        """Of the file that a runtime loads; of the sums of several, as weights may lie beside."""
        sums = [self.files[f] for f in self.deployed]
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    @property
    def temperature(self) -> float:
        """What its logits are divided by before the softmax; 1 where none was fitted."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def deployed(self) -> list[str]:
        """What a device loads: not the torch program and golden samples kept beside it."""
        first = next(iter(self.files))
        return [f for f in self.files if f == first or not f.endswith((".pt2", ".npz"))]

    @property
    def size_bytes(self) -> int:
        """Of what a device loads."""
        return sum((self.folder / f).stat().st_size for f in self.deployed)

    @model_validator(mode="after")
    def _plain_names(self) -> Self:
        """A file lies in the artifact's own folder, wherever its JSON came from."""
        for f in self.files:
            if f in ("", ".", "..") or Path(f).name != f:
                raise ValueError(f"file name {f!r} is not a plain name")
        if not self.files:
            raise ValueError("an artifact has at least one file")
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The artifact in `folder`; EdgeKDError if unfinished or if a file was changed."""
        art = super().load(folder).model_copy(update={"folder": folder})
        for name, digest in art.files.items():
            path = folder / name
            if not path.is_file():
                raise EdgeKDError(f"{path} is missing: run the stage that made it again")
            if sha256(path) != digest:
                raise EdgeKDError(f"{path} is not the file that was saved: sha256 differs")
        return art

    def save(self, folder: Path) -> Self:
        """Write artifact.json into `folder`; returns the artifact as it would be loaded."""
        return super().save(folder).model_copy(update={"folder": folder})
