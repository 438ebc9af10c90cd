"""Options of the commands that train, in frozen records: one line an option, for every use of it.

The command line, the keys of `--config`, the record of a run and the reference in the documentation
are all made from these fields: their names, types, defaults, limits and sentences.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from edgekd.records.errors import EdgeKDError
from edgekd.records.store import Record
from edgekd.records.training import MOST_EPOCHS, Training

RUNS = Path("runs")
INTENDED = (
    "Research use. Not a medical device: not for diagnosis, and not for any decision about a "
    "patient."
)


LARGEST_SEED = 2**32 - 1  # that scikit-learn and numpy take


class Options(Record):
    """Base of the groups. A field that is None, or an empty tuple, was not given."""

    PANEL: ClassVar[str]  # heading of the group


def option(
    default: Any, text: str, *flags: str, least: float | None = None, most: float | None = None
) -> Any:
    """A field of Options: what is taken where nothing is given, and one sentence on it.

    flags: how the command line calls it; by default as the field is called. least, most: limits of
    a number, both allowed.
    """
    return Field(
        default, ge=least, le=most, description=text, json_schema_extra={"flags": list(flags)}
    )


class DataOptions(Options):
    """Which images, and how they are split and shown."""

    PANEL: ClassVar[str] = "Data"
    data: Path | None = option(
        None, "Image folder. [default: synthetic chest phantoms]", "--data", "-d"
    )
    split: str | None = option(
        None, "given, grouped or random. [default: the data's own, the rest grouped]"
    )
    allow_leakage: bool = option(False, "Go on although splits share images; results say so.")
    size: int | None = option(
        None, "Pixels a side. [default: the profile's; teach: 128]", least=32, most=1024
    )
    resize: str = option("stretch", "stretch, crop or pad.")
    seed: int = option(0, "Fixes the result on a CPU.", least=0, most=LARGEST_SEED)


class TeacherOptions(Options):
    """Who teaches, and what its word weighs."""

    PANEL: ClassVar[str] = "Teacher"
    teacher: tuple[str, ...] = option(
        (),
        "timm name, or a folder that edgekd teach wrote; repeatable. [default: the one that is "
        "there, or what edgekd teach makes]",
    )
    teacher_weights: Path | None = option(None, "Local checkpoint to start it from.")
    pretrained: bool = option(False, "Teacher's weights from the hub (network).")
    no_teacher: bool = option(False, "Labels alone: the baseline to compare with.")
    teacher_epochs: int | None = option(
        None, "If it must be taught first.", least=1, most=MOST_EPOCHS
    )
    alpha_hard: float | None = option(None, "Weight of the labels. [default: 0.3]", least=0, most=1)
    temperature: float | None = option(
        None, "Of the soft targets. [default: 4]", "--temperature", "-T", least=0.01, most=1000
    )


class SupernetOptions(Options):
    """What a supernet, or a sub-net alone, begins as, and how it is shrunk."""

    PANEL: ClassVar[str] = "Supernet"
    start: str = option(
        "auto",
        "Begin as this timm network or official OFA checkpoint, from scratch, or auto: with the "
        "ImageNet weights that a package brings, where one is installed.",
    )
    start_weights: Path | None = option(None, "Local checkpoint of --start.")
    start_pretrained: bool = option(False, "Weights of --start from the hub (network).")
    schedule: str = option("sandwich", "sandwich or progressive.")


class StudentOptions(Options):
    """Which network is the student, and how it is judged."""

    PANEL: ClassVar[str] = "Student"
    student: str | None = option(
        None,
        "Trained alone: a named OFA sub-net, a folder with one, five-convolutions, a timm name, or "
        "NAME:K, its first K stages.",
    )
    shrink_epochs: int | None = option(
        None, "If the supernet must be shrunk first.", least=1, most=MOST_EPOCHS
    )
    finalists: int = option(1, "Sub-nets of the front to distil and compare.", least=1, most=1000)
    layer: str = option(
        "auto",
        "That is explained: auto (by one rule for teacher and student, on validation images), "
        "head, or a stage of the student such as stage3.",
    )
    sensitivity: float | None = option(
        None, "Of each class's threshold, on val. [default: Youden's J]", least=0.01, most=1
    )

    @field_validator("layer")
    @classmethod
    def _might_be_a_layer(cls, name: str) -> str:
        """Said before anything is trained; whether the student has it, is known afterwards."""
        # An earlier edgekd wrote an empty one where none was named.
        if name and not re.fullmatch(r"auto|head|stage[1-9]\d?", name):
            raise EdgeKDError(f'no layer "{name}": auto, head, or a stage such as stage3')
        return name


class SearchOptions(Options):
    """How the student's sub-net is found."""

    PANEL: ClassVar[str] = "Search"
    supernet: Path | None = option(None, "A folder that edgekd shrink wrote.")
    subnets: int = option(
        60, "To evaluate at random; then as many of the fronts.", least=20, most=100_000
    )
    generations: int = option(500, "At most, of 100 sub-nets each.", least=1, most=100_000)
    measure: int = option(6, "Sub-nets of the front to time for real.", least=0, most=1000)
    estimate: bool = option(False, "Latency from the profile's stated peak: measure nothing.")
    give_up: float = option(0.0, "Points of accuracy, for a faster student.", least=0, most=100)
    prior: Path | None = option(None, "OFA's acc_predictor.pth: what it says is learnt from, too.")


class TrainOptions(Options):
    """The training loop."""

    PANEL: ClassVar[str] = "Training"
    epochs: int | None = option(
        None,
        "Passes over the data. [default: 30; from learnt weights 8, a student 12]",
        least=1,
        most=MOST_EPOCHS,
    )
    lr: float | None = option(None, "Peak. [default: 0.002; a pretrained teacher 0.0007]", most=100)
    batch: int | None = option(None, "Images a step. [default: 32]", least=2, most=65_536)
    settings: tuple[str, ...] = option(
        (), "A training setting, NAME=VALUE; repeatable. See README.", "--set"
    )

    def training(self, **more: float | None) -> Training:
        """Every setting of the loop. more: settings of other groups; None: not given."""
        given = {"epochs": self.epochs, "lr": self.lr, "batch": self.batch, **more}
        table: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        for pair in self.settings:
            name, equals, value = pair.partition("=")
            if not equals:
                raise EdgeKDError(f'--set takes NAME=VALUE, got "{pair}"')
            if name in table:
                raise EdgeKDError(f"{name} is given twice, as an option and with --set")
            table[name] = value
        return Training.parse(table, "--set")


class OutputOptions(Options):
    """Where the result goes."""

    PANEL: ClassVar[str] = "Output"
    runs: Path = option(RUNS, "Folder of all runs.")
    force: bool = option(False, "Replace what was made before.")


class RunOptions(OutputOptions):
    """Where a run goes."""

    run: Path | None = option(None, "This run's folder. [default: RUNS/PROFILE]")


class DistillOptions(Record):
    """What `distill` was asked for: it stands in the record of the run."""

    data: DataOptions = DataOptions()
    teacher: TeacherOptions = TeacherOptions()
    student: StudentOptions = StudentOptions()
    supernet: SupernetOptions = SupernetOptions()
    search: SearchOptions = SearchOptions()
    train: TrainOptions = TrainOptions()
