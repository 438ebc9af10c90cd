"""Which layer to explain, and what each layer sees: a network stage by stage.

The map of a deep layer knows the classes and is coarse; that of an early one is fine and knows
less. Which one explains the model is measured, not known. Layer by layer, teacher and student side
by side, is how arXiv 2502.15959 compares them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgekd.explain.faithfulness import faithfulness
from edgekd.explain.score_cam import ask, class_maps
from edgekd.records import EdgeKDError, Track, untracked
from edgekd.runtimes import Outputs, Session

if TYPE_CHECKING:
    from edgekd.models.zoo import Waist

CELLS = 7  # a side, at least: a coarser map cannot point at a lesion
DEEPEST = 4  # stages that are tried
IMAGES = 16  # of the validation split


class Depth(NamedTuple):
    """One stage of a network on one image."""

    layer: str  # "stage3 40x16x16"
    average: np.ndarray  # (h, w) float32, mean of the stage's channels
    heat: np.ndarray | None  # (h, w) float32, Score-CAM of the class; None: undefined
    seconds: float  # for the Score-CAM map


def session_of(net: Waist) -> Session:
    """A network in eval mode as what Score-CAM asks."""
    import torch

    def run(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            return Outputs(*(x.numpy() for x in net(torch.from_numpy(images))))

    return run


def candidates(net: Waist) -> list[str]:
    """The deepest stages of at least CELLS cells a side, the deepest first."""
    fits = [name for name, (_, h, w) in net.shapes.items() if min(h, w) >= CELLS]
    if not fits:
        raise EdgeKDError(f"no stage has {CELLS} cells a side at this size: a larger --size has")
    return fits[::-1][:DEEPEST]


def most_faithful(
    net: Waist, images: np.ndarray, *, track: Track = untracked
) -> tuple[str, dict[str, float]]:
    """(the layer whose maps explain the model best, every candidate's score).

    images: (n, 3, H, W) prepared. Score: mean insertion less deletion (blurred fill) of the
    evidence map of the network's own answer; an undefined map scores 0, as a random one does.
    """
    scores: dict[str, float] = {}
    for name in track(candidates(net), "choosing the layer", len(candidates(net))):
        session = session_of(net.at(name))
        found = []
        for image in images:
            passes = ask(session, image)
            label = int(passes.logits.argmax())
            heat = class_maps(passes)[label]
            undefined = bool(np.isnan(heat).any())
            found.append(0.0 if undefined else faithfulness(session, image, heat, label))
        scores[net.title(name)] = round(float(np.mean(found)), 4)
    best = max(scores, key=lambda k: scores[k])
    return best.partition(" ")[0], scores


def by_depth(net: Waist, image: np.ndarray, label: int) -> list[Depth]:
    """Every stage on one image (3, H, W), the earliest first: average map, Score-CAM, time."""
    made = []
    for name in net.shapes:
        session = session_of(net.at(name))
        average = session(image[None]).features[0].mean(0)
        started = time.perf_counter()
        heat = class_maps(ask(session, image))[label]
        seconds = time.perf_counter() - started
        shown = None if np.isnan(heat).any() else heat
        made.append(Depth(net.title(name), average.astype(np.float32), shown, seconds))
    return made
