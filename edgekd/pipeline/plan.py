"""A sentence before a training: what is made, from what, in how many minutes, and what is shorter.

The minutes are those of a few steps that are timed on this machine, of the plan's own networks,
batches and sizes. What is there already, a search and its timings do not count.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgekd.pipeline import folders
from edgekd.pipeline.workspace import Workspace
from edgekd.records import Artifact, Training

if TYPE_CHECKING:
    from edgekd.train.pace import Pace, Work

LOG = logging.getLogger(__name__)


class Network(NamedTuple):
    """A network that is to be trained."""

    what: str  # "teacher resnet18"
    pace: Callable[[], Pace]  # measures
    work: Work
    shorter: str  # options that make less of it
    times: int = 1  # so many alike


class Estimate(NamedTuple):
    """How long networks take to train on this machine."""

    seconds: tuple[float, ...]  # of each
    steps: int  # that were timed


def tell(
    work: Workspace,
    networks: Sequence[Network],
    *,
    teachers: Sequence[Artifact | Network] = (),
    asked: float = 0,
    search: bool = False,
) -> None:
    """Say what is made. Where nobody reads it, or several processes train, nothing is timed.

    teachers: those that the other networks learn from, each of `asked` images, see `questions`.
    search: the last network is found by one.
    """
    if not networks or not LOG.isEnabledFor(logging.INFO):
        return
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    found = _estimate(work, networks, teachers, asked) if alone else None
    before = [f"teacher {t.model} (there already)" for t in teachers if isinstance(t, Artifact)]
    LOG.info("%s", sentence(before, networks, found, search=search))


def sentence(
    before: Sequence[str],
    networks: Sequence[Network],
    found: Estimate | None,
    *,
    search: bool = False,
) -> str:
    """What `tell` says; before: what is there already."""
    *first, last = map(_epochs, networks)
    parts = [*before, *first, *(["search"] if search else []), last]
    told = f"to make: {', '.join(parts)}"
    if found is None:
        return told
    but = "; the search and its timings are not counted" if search else ""
    total = sum(found.seconds)
    told += f"; {minutes(total)} on this machine (from {found.steps} timed steps{but})"
    if total < 60:
        return told
    costly = sorted(zip(found.seconds, networks, strict=True), key=lambda x: -x[0])
    return f"{told}; shorter: {', '.join(n.shorter for _, n in costly)}"


def _epochs(network: Network) -> str:
    count = network.work.epochs
    several = f"{network.times} x " if network.times > 1 else ""
    return f"{network.what} ({several}{count} {'epoch' if count == 1 else 'epochs'})"


def minutes(seconds: float) -> str:
    """In words: to the minute under ten, to five beyond."""
    if seconds < 60:
        return "less than a minute"
    whole = round(seconds / 60)
    if whole >= 10:
        whole = 5 * round(seconds / 300)
    if whole < 120:
        return f"about {whole} min"
    return f"about {whole // 60} h {whole % 60} min" if whole % 60 else f"about {whole // 60} h"


def questions(work: Workspace, training: Training, teachers: Sequence[Artifact | Network]) -> float:
    """Images that each teacher has to answer for a first training with `training`.

    Every view of the training images once; masked ones twice more, since their masks are made of
    its maps first; and what it takes to choose the layer of these. What was asked before is kept.
    """
    from edgekd.models import feature_layers

    if training.alpha_hard == 1 and not (
        training.masked or training.attention or training.features
    ):
        return 0
    known = [t for t in teachers if isinstance(t, Artifact)]
    kept = folders.shared(work.root, work.dataset)
    if known and all(list(kept.glob(f"targets-{t.model}-{t.spec.size[0]}px-*")) for t in known):
        return 0
    each_epoch = training.ask_mixed or not training.views
    views = training.epochs if each_epoch else min(training.views, training.epochs)
    images = views * len(work.dataset.splits["train"])
    if not training.masked:
        return images
    return images * (1 + 2 * training.masked_share) + feature_layers.PASSES


def _estimate(
    work: Workspace,
    networks: Sequence[Network],
    teachers: Sequence[Artifact | Network],
    asked: float,
) -> Estimate | None:
    """Of each network, the teachers' answers counted with the first that asks; None: a network
    cannot be trained like this.
    """
    from edgekd.train import pace

    seconds: list[float] = []
    steps, image = 0, {}
    try:
        for network in work.track(networks, "timing a few steps", len(networks)):
            measured = network.pace()
            image[network.what] = measured.image
            seconds.append(network.times * network.work.seconds(measured))
            steps += measured.measured
        if asked:
            known = sum(pace.answers(t) for t in teachers if isinstance(t, Artifact))
            taught = sum(image[t.what] for t in teachers if isinstance(t, Network))
            seconds[sum(n in teachers for n in networks)] += asked * (known + taught)
    except Exception:  # whatever a network stumbles on: the preflight of its training says it
        return None
    return Estimate(tuple(seconds), steps)
