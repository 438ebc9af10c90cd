"""Which layer to explain, and what each layer sees: a network stage by stage.

The map of a deep layer knows the classes and is coarse; that of an early one is fine and knows
less. Which one explains the model is measured, not known: teacher and student are asked by one rule
(`choose`). Layer by layer, both side by side, is how arXiv 2502.15959 compares them.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgekd.explain.examine import rounded
from edgekd.explain.faithfulness import STEPS, faithfulness
from edgekd.explain.fidelity import localisation, pearson
from edgekd.explain.score_cam import ask, class_maps, random_head
from edgekd.records import Artifact, EdgeKDError, Track, make_folder, untracked, write_atomic
from edgekd.runtimes import Outputs, Session

if TYPE_CHECKING:
    from edgekd.models.zoo import Waist

CELLS = 4  # a side, at least, of a stage that is tried
DEEPEST = 4  # stages that are tried
IMAGES = 16  # of the validation split
CHANNELS = 32  # of a stage that are asked, at most: those that tell most of the map
REPEATED = 4  # of the images, that are moved by half a grey level
BATCH = 32  # masked images at a time
# Images that `choose` shows a network, at most: for maps, for what becomes of each, for maps again.
PASSES = DEEPEST * (IMAGES * (1 + CHANNELS + 2 * STEPS) + REPEATED * (1 + CHANNELS))
BLIND = 0.9  # r with a random head's map, at which a stage is out
UNDEFINED = 0.5  # share of images without a map, above which a stage is out
TERMS = ("faithful", "head", "repeatable", "inside")
RULE = 1  # version of `choose`: a choice that was kept by another one is made again


class Depth(NamedTuple):
    """One stage of a network on one image."""

    layer: str  # "stage3 40x16x16"
    average: np.ndarray  # (h, w) float32, mean of the stage's channels
    heat: np.ndarray | None  # (h, w) float32, Score-CAM of the class; None: undefined
    seconds: float  # for the Score-CAM map


class Choice(NamedTuple):
    """The stage that is explained, and what every candidate scored."""

    layer: str  # "stage3"
    scores: dict[str, dict[str, float]]  # "stage3 40x16x16" -> see `choose`


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


def choose(
    net: Waist,
    images: np.ndarray,
    masks: np.ndarray | None,
    std: tuple[float, ...],
    *,
    track: Track = untracked,
) -> Choice:
    """The stage whose maps explain the network best, by one rule for teacher and student.

    images: (n, 3, H, W) prepared by dividing by `std`. masks: (n, H, W) bool, of lesions; all False
    where an image has none, None where no image has one. Of each candidate `scores` holds:

    - faithful: insertion less deletion (blurred fill), [-1, 1], 0 is chance;
    - head: 1 - r with the map of a random head, [0, 1], 0: the map is blind to the classes, or no
      such head has a map; a mean over the images where both maps are defined;
    - repeatable: r with the map of the image moved by half a grey level, [0, 1];
    - inside: e / (e + a), [0, 1], 0.5 is chance, of the share e of the map that lies in the mask
      and the mask's share a of the area, both means over the images that have a mask, if any;
    - undefined: share of images that have no map; these count as 0 in the other terms;
    - score: the geometric mean of the terms, what is below 0 taken as 0;
    - out: 1 where more than half of the maps are undefined or r with the random head is BLIND or
      more. Such a stage is chosen only where all are out, and then its maps are not valid either.

    A geometric mean, since the terms have unlike scales: of a ResNet-18 on phantoms, insertion less
    deletion was 0.07 to 0.11 and r 1.00. A factor that all candidates share cancels in it, so that
    no term has to be scaled, and none makes up for another that is 0: a map of nothing in the image
    may be repeatable and change with the head. Inside is compared with the area, not cut off at
    chance, so that a network that finds no lesion anywhere is still judged by the rest. Of equals
    the deepest is taken.
    """
    scores: dict[str, dict[str, float]] = {}
    tried = candidates(net)
    for name in track(tried, "choosing the layer", len(tried)):
        found = _terms(net.at(name), images, masks, std)
        scores[net.title(name)] = {k: round(v, 4) for k, v in _scored(found).items()}
    best = max(scores, key=lambda k: (-scores[k]["out"], scores[k]["score"]))
    return Choice(best.partition(" ")[0], scores)


def _scored(found: dict[str, float]) -> dict[str, float]:
    """The terms of a candidate, its score, and whether it is out."""
    parts = [max(found[name], 0.0) for name in TERMS if name in found]
    out = found["undefined"] > UNDEFINED or 1 - found["head"] >= BLIND
    return found | {"score": float(np.prod(parts)) ** (1 / len(parts)), "out": float(out)}


def _terms(
    net: Waist, images: np.ndarray, masks: np.ndarray | None, std: tuple[float, ...]
) -> dict[str, float]:
    """TERMS and `undefined` of the stage that `net` explains, means over images."""
    session = session_of(net)
    share = min(1.0, CHANNELS / net.shapes[net.layer.partition(" ")[0]][0])
    found: dict[str, list[float]] = {name: [] for name in ("undefined", *TERMS)}
    areas: list[float] = []  # of the masks
    moved = set(np.linspace(0, len(images) - 1, REPEATED).astype(int))
    for i, image in enumerate(images):
        passes = ask(session, image, batch=BATCH, share=share)
        label = int(passes.logits.argmax())
        heat = class_maps(passes)[label]
        undefined = bool(np.isnan(heat).any())
        found["undefined"].append(float(undefined))
        found["faithful"].append(
            0.0 if undefined else faithfulness(session, image, heat, label, batch=BATCH)
        )
        if (r := pearson(heat, class_maps(random_head(passes, i))[label])) is not None:
            found["head"].append(1 - r)
        if i in moved:
            again = ask(session, rounded(image, std, i), batch=BATCH, share=share)
            found["repeatable"].append(pearson(heat, class_maps(again)[label]) or 0.0)
        if masks is not None and masks[i].any():
            found["inside"].append(_energy(heat, masks[i]))
            areas.append(float(masks[i].mean()))
    means = {name: float(np.mean(x)) for name, x in found.items() if x}
    # Cut off after the mean over images, each of which has a random head of its own.
    if areas:
        means["inside"] /= means["inside"] + float(np.mean(areas))
    return means | {"head": min(means.get("head", 0.0), 1.0)}


def _energy(heat: np.ndarray, mask: np.ndarray) -> float:
    """Share of a map (h, w) that lies in `mask` (H, W) bool; 0 where it is undefined."""
    energy = localisation(heat[None], mask[None])["energy"].item()
    return 0.0 if np.isnan(energy) else float(energy)


def kept_choice(
    trained: Artifact,
    images: np.ndarray,
    masks: np.ndarray | None,
    folder: Path,
    *,
    net: Waist | None = None,
    track: Track = untracked,
) -> Choice:
    """`choose` for a trained teacher or student, made once: it is kept in `folder`.

    folder: the network's own, usually. It is made anew for another network, other images or masks,
    and by another RULE. net: the network, if it is loaded already.
    """
    from edgekd.models import zoo

    digest = hashlib.sha256(f"{RULE} {trained.sha256} {trained.spec.model_dump_json()}".encode())
    digest.update(images.tobytes())
    digest.update(b"" if masks is None else masks.tobytes())
    path = folder / f"layer-{digest.hexdigest()[:16]}.json"
    if path.is_file():
        return Choice(**json.loads(path.read_text("utf-8")))
    found = choose(net or zoo.load(trained), images, masks, trained.spec.std, track=track)
    make_folder(folder)
    write_atomic(path, json.dumps(found._asdict(), indent=1) + "\n")
    return found


def by_earlier_rule(scores: object) -> bool:
    """Whether an artifact's `layer_scores` are of an edgekd that judged by faithfulness alone."""
    return isinstance(scores, dict) and any(isinstance(x, float) for x in scores.values())


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
