"""Two models through the same masks: do they weigh the parts of an image alike?

Score-CAM masks each model by its own channels, so that the maps of a teacher and a student differ
in what was hidden from them before they differ in what they answered. Here both are shown the
reference's channels: M_f = ReLU(sum_k w_k(f) A_k), with A_k the reference's live channels, the
image seen through each over its blurred self, and w_k(f) the class-centred answers of model f less
their mean over k. M of the reference is its own evidence map. A model that cannot compute these
masks is given them, so that a student of another architecture, or a file in another runtime, can be
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgekd.data import preprocess
from edgekd.explain import kept, score_cam
from edgekd.explain.fidelity import (
    Cases,
    aggregate,
    beyond_chance,
    beyond_strangers,
    correlations,
    row_means,
    strangers,
    to_grid,
)
from edgekd.records import Aggregate, Artifact, Profile, Track, make_folder, untracked
from edgekd.runtimes import Session

VERSION = 1  # of what is kept: another one asks again
BATCH = 32


class Model(NamedTuple):
    """One file, and what answers for it."""

    artifact: Artifact
    profile: Profile
    session: Session
    pixels: np.ndarray  # (N, H, W, 3) uint8, the same images at this model's size


def shared_maps(
    model: Model, reference: Model, digests: Sequence[str], *, track: Track = untracked
) -> np.ndarray:
    """(N, K, g, g) float32 >= 0: `model`'s maps of every class through `reference`'s channels.

    NaN where a map is undefined. digests: of the images, under which maps are kept in the folder
    of the model's artifact.
    """
    told = [VERSION, *(kept.identity(m.artifact, m.profile) for m in (model, reference)),
            reference.artifact.layer]  # fmt: skip
    folder = make_folder(model.artifact.folder / "maps" / f"shared-{kept.digest(told)}")
    what = f"{model.artifact.role} {model.artifact.precision} through the same masks"
    found = []
    for i in track(range(len(digests)), what, len(digests)):
        path = folder / f"{digests[i][:16]}.npy"
        if not path.is_file():
            kept.write_array(path, _one(model, reference, i))
        found.append(np.load(path, allow_pickle=False))
    return np.stack(found)


def _one(model: Model, reference: Model, i: int) -> np.ndarray:
    """(K, g, g) maps of one image."""
    seen = preprocess.normalise(reference.pixels[i : i + 1], reference.artifact.spec)
    channels = score_cam.live_channels(reference.session(seen).features[0])
    image = preprocess.normalise(model.pixels[i : i + 1], model.artifact.spec)[0]
    passes = score_cam.ask_through(model.session, image, channels, batch=BATCH)
    return np.stack([to_grid(m) for m in score_cam.class_maps(passes)])


def agreement(
    reference: np.ndarray, other: np.ndarray, cases: Cases, *, seed: int = 0
) -> dict[str, Aggregate]:
    """How alike (N, g, g) maps through the same masks are, each beside another patient's.

    shared_pearson: mean correlation; null: with the map of another patient's image. shared_kappa:
    the same beyond chance, 1 for the same map. shared_identification: share of other patients'
    maps that agree less than the own one does (chance 0.5). shared_lost: share of maps that agree
    no better than 95 % of other patients' (chance 0.05). Intervals draw whole patients.
    """
    groups, others = np.asarray(cases.groups), strangers(cases)
    cross = correlations(reference, other)
    own, null = np.diag(cross), row_means(cross, others)
    told, _ = beyond_chance(cross, others)
    found = {"pearson": aggregate(own, null, groups, seed)}
    found |= beyond_strangers(own, null, told, groups, seed)
    return {f"shared_{key}": a for key, a in found.items() if a is not None}
