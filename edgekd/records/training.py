"""Every setting of the one training loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgekd.records.store import Record

TEACHERS = r"^(equal|confidence|\d*\.?\d+(,\d*\.?\d+)*)$"
AUGMENTATION = ("hflip", "vflip", "warp", "rotate_deg", "translate", "zoom", "brightness",
                "contrast", "noise", "erase")  # fmt: skip


MOST_EPOCHS = 100_000
MOST_WEIGHT = 1e6  # of a part of the loss


class Training(Record):
    """How a network is trained: every setting of the one training loop."""

    epochs: int = Field(default=30, ge=1, le=MOST_EPOCHS)
    batch: int = Field(default=32, ge=2, le=65_536)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0, le=100)  # peak
    weight_decay: float = Field(default=0.02, ge=0, le=100)
    warmup_epochs: float = Field(default=1.0, ge=0, le=MOST_EPOCHS)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: what a short measurement prefers
    compile: bool = False  # torch.compile
    int8: bool = False  # convolutions and linear layers see and have 8-bit values meanwhile
    alpha_hard: float = Field(
        default=0.3, ge=0, le=1
    )  # weight of the labels; 1 - alpha_hard: the teacher
    temperature: float = Field(default=4.0, gt=0, le=1000)
    t_squared: bool = True  # soft loss times T^2 (Hinton et al. 2015); the papers do not say
    views: int = Field(
        default=8, ge=0, le=10_000
    )  # augmentations of an image, taken in turn; a teacher sees each once. 0: new every epoch
    teachers: str = Field(default="equal", pattern=TEACHERS)  # how several count
    attention: float = Field(
        default=0.0, ge=0, le=MOST_WEIGHT
    )  # weight of the teacher's spatial attention
    features: float = Field(
        default=0.0, ge=0, le=MOST_WEIGHT
    )  # weight of the likeness of images to each other
    masked: float = Field(
        default=0.0, ge=0, le=MOST_WEIGHT
    )  # weight of the teacher's answers to masked images
    masked_share: float = Field(
        default=0.5, gt=0, le=1
    )  # of a batch's images, shown masked as well
    masked_random: float = Field(default=0.0, ge=0, le=1)  # of the masks, hills and no channels
    guided: float = Field(
        default=0.0, ge=0, le=MOST_WEIGHT
    )  # teach: weight of answers with the organ alone, and without it
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: bool = False  # the labels' loss as if all classes were equally frequent
    mixup: float = Field(default=0.0, ge=0, le=1000)  # of Beta(mixup, mixup); 0: off
    cutmix: float = Field(default=0.0, ge=0, le=1000)  # the same, for rectangles
    ask_mixed: bool = False  # teachers see the mixed images; off: their answers are mixed instead
    ema: float = Field(default=0.99, ge=0, lt=1)  # decay a step of the averaged weights; 0: off
    patience: int = Field(
        default=0, ge=0, le=MOST_EPOCHS
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
    erase: float = Field(default=0.0, ge=0, le=1)  # share of images with a rectangle erased

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
