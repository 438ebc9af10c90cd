"""What one stage hands to the next: frozen, plain data, stored as JSON. No arrays, no torch.

A stage writes one folder. The record's file is written last and atomically, so a folder that has
it is finished, and one that has not is unfinished, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.gates import Margins, State, Verdict
from edgekd.measured import Conditions, Energy, Layer, Peak, Roofline
from edgekd.scores import Calibration, Evaluation, Metric
from edgekd.stored import (
    SCHEMA,
    EdgeKDError,
    GateMissed,
    Journal,
    Record,
    RuntimeUnavailable,
    Stored,
    T,
    Track,
    make_folder,
    needing,
    sha256,
    unknown,
    untracked,
    user_cache,
    versions,
    write_atomic,
)

if sys.version_info >= (3, 11):
    from typing import Self

    import tomllib
else:
    import tomli as tomllib
    from typing_extensions import Self

__all__ = [  # one door: the others import these from here
    "SCHEMA", "Conditions", "EdgeKDError", "Energy", "GateMissed", "Journal", "Layer", "Metric",
    "Peak", "Record", "Roofline", "RuntimeUnavailable", "Stored", "T", "Track", "make_folder",
    "needing", "sha256", "unknown", "untracked", "user_cache", "versions", "write_atomic",
]  # fmt: skip


Kind = Literal["teacher", "supernet", "student", "onnx", "openvino", "torch", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]


class Budget(Record):
    """What the device allows; an absent limit is not judged."""

    latency_ms: float | None = Field(default=None, gt=0)  # p95 at batch 1, host to host
    params_m: float | None = Field(default=None, gt=0)
    size_mb: float | None = Field(default=None, gt=0)  # 1e6 bytes, of the deployed files
    memory_mb: float | None = Field(
        default=None, gt=0
    )  # 1e6 bytes, peak resident of a fresh process


Resolution = Annotated[int, Field(ge=32, le=1024)]


class Profile(Record):
    """A device and what it allows: `profiles/<name>.toml`, or any TOML file of this form."""

    name: str
    description: str = ""
    runtime: str  # a file in edgekd/runtimes
    device: str  # in the runtime's own words: "CPU", "NPU", "cuda:0"
    precisions: tuple[Precision, ...] = ("fp32",)
    space: str = "ofa-lite-w1.0"  # of the supernet that its student is cut from
    student: str = ""  # a named sub-net, trained alone; empty: searched for in the supernet
    resolutions: tuple[Resolution, ...] = Field(default=(128,), min_length=1)  # pixels a side
    static_batch: bool = False  # the runtime wants a fixed batch dimension
    threads: int = Field(default=0, ge=0)  # 0: the runtime chooses
    hint: Literal["latency", "throughput"] = "latency"  # throughput: many images, in streams
    options: dict[str, str | int | float | bool] = {}  # passed to the runtime as they are
    peak_gflops: float | None = Field(default=None, gt=0)  # at its fastest precision; 1 MAC = 2
    bandwidth_gbs: float | None = Field(default=None, gt=0)  # 1e9 bytes/s of its memory
    latency_table: str = ""  # a file of `edgekd profiles calibrate --export`, beside the profile
    budget: Budget = Budget()
    margins: Margins = Margins()  # of explanations

    @property
    def pixels(self) -> int:
        """The largest resolution: what teachers see, when --size is not given."""
        return max(self.resolutions)

    @classmethod
    def read(cls, name: str) -> Self:
        """The profile called `name`, or in the TOML file at path `name`."""
        shipped = shipped_profiles()
        is_path = name.endswith(".toml") or os.sep in name
        path = Path(name) if is_path else shipped.get(name)
        if path is None:
            raise EdgeKDError(unknown("profile", name, shipped) + " or a path to a .toml file")
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise EdgeKDError(f"cannot read profile {path}: {e}") from None
        except tomllib.TOMLDecodeError as e:
            raise EdgeKDError(f"{path} is not TOML: {e}") from None
        profile = cls.parse({"name": path.stem} | table, str(path))
        if not profile.latency_table:
            return profile
        beside = str(path.parent.resolve() / profile.latency_table)
        return profile.model_copy(update={"latency_table": beside})


def shipped_profiles() -> dict[str, Path]:
    """Name and file of every profile that comes with edgekd (in the wheel or beside the source)."""
    here = Path(__file__).parent
    folder = here / "profiles" if (here / "profiles").is_dir() else here.parent / "profiles"
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


class Spec(Record):
    """What the model sees and says; it travels in every artifact. `imaging.prepare` obeys it."""

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


TEACHERS = r"^(equal|confidence|\d*\.?\d+(,\d*\.?\d+)*)$"
AUGMENTATION = ("hflip", "vflip", "warp", "rotate_deg", "translate", "zoom", "brightness",
                "contrast", "noise")  # fmt: skip


class Training(Record):
    """How a network is trained: every setting of the one training loop."""

    epochs: int = Field(default=30, ge=1)
    batch: int = Field(default=32, ge=2)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)  # peak
    weight_decay: float = Field(default=0.02, ge=0)
    warmup_epochs: float = Field(default=1.0, ge=0)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: what a short measurement prefers
    compile: bool = False  # torch.compile
    int8: bool = False  # convolutions and linear layers see and have 8-bit values meanwhile
    alpha_hard: float = Field(
        default=0.3, ge=0, le=1
    )  # weight of the labels; 1 - alpha_hard: the teacher
    temperature: float = Field(default=4.0, gt=0)
    t_squared: bool = True  # soft loss times T^2 (Hinton et al. 2015); the papers do not say
    views: int = Field(
        default=8, ge=0
    )  # augmentations of an image, taken in turn; a teacher sees each once. 0: new every epoch
    teachers: str = Field(default="equal", pattern=TEACHERS)  # how several count
    attention: float = Field(default=0.0, ge=0)  # weight of the teacher's spatial attention
    features: float = Field(default=0.0, ge=0)  # weight of the likeness of images to each other
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: bool = False  # the labels' loss as if all classes were equally frequent
    mixup: float = Field(default=0.0, ge=0)  # of Beta(mixup, mixup); 0: off
    cutmix: float = Field(default=0.0, ge=0)  # the same, for rectangles
    ask_mixed: bool = False  # teachers see the mixed images; off: their answers are mixed instead
    ema: float = Field(default=0.99, ge=0, lt=1)  # decay a step of the averaged weights; 0: off
    patience: int = Field(
        default=0, ge=0
    )  # epochs without a better validation loss; 0: never stop early
    balanced: bool = False  # draw classes equally often
    hflip: bool = False  # off: it turns a left lung into a right one
    vflip: bool = False
    warp: float = Field(default=0.3, ge=0, le=1)  # share of images turned and zoomed, so blurred
    rotate_deg: float = Field(default=10.0, ge=0, le=180)
    translate: float = Field(default=0.06, ge=0, le=0.5)  # of the side, by whole pixels
    zoom: float = Field(default=0.1, ge=0, le=0.5)
    brightness: float = Field(default=0.1, ge=0, le=1)
    contrast: float = Field(default=0.1, ge=0, le=1)
    noise: float = Field(default=0.0, ge=0, le=1)  # standard deviation, pixels in [0, 1]

    def view(self, epoch: int) -> int:
        """Number of the augmentation that images have in an epoch."""
        return epoch % self.views if self.views else epoch

    @model_validator(mode="after")
    def _fits_together(self) -> Training:
        if self.cutmix and self.attention:
            raise ValueError("attention cannot be cut and pasted: set cutmix or attention to 0")
        if self.cutmix and self.mixup:
            raise ValueError("mixup and cutmix exclude each other: set one to 0")
        if self.ask_mixed and not (self.mixup or self.cutmix):
            raise ValueError("ask_mixed mixes nothing: set mixup or cutmix as well")
        return self


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


class Machine(Record):
    """Where something was measured."""

    name: str  # short, fit for a file name; no host name
    cpu: str
    cores: int
    memory_gb: float
    system: str
    python: str
    load_1min: float | None = None
    clock_mhz: float | None = None
    gpu: str = ""
    isa: tuple[str, ...] = ()  # what of vector and matrix instructions it has, weakest first

    @property
    def kind(self) -> tuple[str, tuple[str, ...], int, str]:
        """Times are compared between machines of one kind only."""
        return self.cpu, self.isa, self.cores, self.gpu

    def __str__(self) -> str:
        parts = (
            self.cpu, f"{self.cores} cores", " ".join(self.isa), f"{self.memory_gb:g} GB",
            self.system, f"Python {self.python}", f"GPU {self.gpu}" if self.gpu else "",
        )  # fmt: skip
        return ", ".join(filter(None, parts))


class Timing(Stored):
    """One stopwatch's reading of one artifact. Samples are stored; summaries are computed."""

    FILE: ClassVar[str] = "timing.json"
    model: str
    role: Literal["teacher", "student"]
    precision: str
    artifact_sha256: str
    runtime: str
    device: str
    threads: int  # asked for; 0: the runtime chooses
    cores_busy: float | None = None  # CPU seconds in a second of timed calls: what it chose
    batch: int = 1
    samples_ms: tuple[float, ...]
    block_medians_ms: tuple[float, ...] = ()  # of the turns the samples were taken in, in order
    warmup: int  # untimed calls before each turn, and before the first until they were steady
    attempts: int = 1  # runs of all turns: more than one where `stopwatch.blocks` did not agree
    stable: bool = True  # they agree within 10 % at last
    noise: tuple[str, ...] = ()  # what makes these figures doubtful, in words
    conditions: Conditions = Conditions()
    load_ms: float  # open the file to a session that can answer
    first_ms: float | None = None  # its first call
    cold_ms: tuple[float, ...] = ()  # process start to first answer, image file included
    idle_ms: dict[str, tuple[float, ...]] = {}  # seconds of think time ("0.5") -> calls after it
    prepare_ms: tuple[float, ...] = ()  # an image file's bytes to what the model is shown
    explain_ms: tuple[float, ...] = ()  # a Score-CAM map of one image
    whole_ms: tuple[float, ...] = ()  # an image file's bytes to a calibrated answer
    throughput_ips: float | None = None  # images per second at throughput_batch; None: not asked
    throughput_batch: int | None = None
    throughput_hint: str = "latency"  # of the session: "throughput" asks in streams
    params: int
    macs: int
    size_bytes: int
    peak_mb: float  # 1e6 bytes, peak resident memory of the fresh process that measured
    resident_mb: float | None = None  # the same at rest, with the file loaded and asked once
    energy: Energy | None = None  # None: this machine does not tell
    yardstick_ms: tuple[float, ...] = ()  # of each turn, a fixed piece of work: the machine's pace
    yardstick_threads: int | None = None  # that did it; None: an older edgekd's, of one core
    yardstick: int | None = None  # which piece of work: stopwatch.YARDSTICK; None: an older one
    executed: str = ""  # precision that most of the time was spent in, told by the runtime
    layers: tuple[Layer, ...] = ()  # the slowest; empty: not asked, or the runtime does not tell
    roofline: Roofline | None = None
    absent: dict[str, str] = {}  # what could not be measured -> why
    accuracy: Metric | None = None  # balanced, on the test split, of the file as it is
    machine: Machine
    versions: dict[str, str] = {}
    on_device: bool  # this machine and runtime are the profile's
    budget: Budget = Budget()
    over_budget: dict[str, tuple[float, float]] = {}  # limit -> (measured, allowed)


class Agreement(Record):
    """One image: how alike are the reference's and the artifact's maps of one class?"""

    image: str  # start of the hash of its file
    label: str
    explained: str  # the class explained: the reference's answer
    answer: str  # the artifact's answer
    probability: float  # that it gives this answer, calibrated
    figures: dict[str, float | None]  # pearson, spearman, iou20, ... None: undefined
    null: dict[str, float | None]  # the same against another image's map


class Aggregate(Record):
    """A figure's mean over images with its interval, beside the same figure of strangers' maps."""

    value: float
    low: float
    high: float
    null: float | None = None
    n: int


class Swayed(Record):
    """One image that a marker moved the answer to."""

    image: str  # start of the hash of its file
    model: str
    marker: str  # its name in shortcuts.markers
    before: tuple[str, float]  # answer, and its calibrated probability
    after: tuple[str, float]  # with the marker
    moved: float  # total variation, less what the flat patch in its place does


class Comparison(Record):
    """One artifact's explanations beside those of what it was compressed from."""

    name: str
    reference: str = ""  # name of what it is compared with; empty: the first, that is itself
    artifact_sha256: str
    precision: str
    runtime: str
    layer: str
    seconds_per_map: float
    asked_per_map: float | None = None  # masked images a map
    undefined: int  # maps that are flat: nothing to say
    remark: str = ""  # of the runtime, to be told beside the figures
    aggregate: dict[str, Aggregate]  # agreement with the reference; localisation of its own maps
    checks: dict[str, Aggregate] = {}  # of this model alone: see examine.CHECKS
    parts: dict[str, dict[str, Aggregate]] = {}  # "class x", "subgroup y"; empty: too few patients
    limit: float | None = None  # Pearson that 95 % of strangers' maps stay under
    paired: dict[str, Aggregate] = {}  # this less the reference, image by image
    verdict: Verdict | None = None  # None: the first, which nothing was compressed to
    images: tuple[Agreement, ...]


class Fidelity(Stored):
    """Do the explanations survive compression? Each step judged by the profile's margins."""

    FILE: ClassVar[str] = "fidelity.json"
    reference: str
    reference_sha256: str
    variant: str
    grid: int  # maps are compared after area-averaging to grid x grid
    data_fingerprint: str
    split: str
    comparisons: tuple[Comparison, ...]  # in the order of compression; the first is whole
    verdict: State | None = None  # the worst of the steps'; None: nothing was compressed
    reasons: tuple[str, ...] = ()  # a sentence a step
    margins: Margins = Margins()
    margins_sha256: str = ""
    fast: float = 1.0  # share of channels asked of the teacher; 1: all, its maps are exact
    fast_r: float = 1.0  # lowest correlation of a fast map with the exact one, where certified
    published: dict[str, Aggregate] = {}  # file -> agreement of published maps with a random head's
    swayed: tuple[Swayed, ...] = ()  # the images that markers moved most, of the last file
    mask_share: float | None = None  # mean area of the masks, share of the image
    machine: Machine
    versions: dict[str, str] = {}
    seed: int = 0
