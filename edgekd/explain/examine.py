"""One model, image by image: its maps, and whether they explain it.

What is found is kept with the model's file, so a kill costs one image. Maps are of every class and
cost no more than of one. A random head's come with them, and say whether the method sees this
model at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgekd.data import preprocess
from edgekd.explain import kept, score_cam, shortcuts
from edgekd.explain.faithfulness import FILLS, faithfulness, random_map
from edgekd.explain.fidelity import (
    GRID,
    Cases,
    Maps,
    aggregate,
    beyond_chance,
    correlations,
    kappa,
    row_means,
    strangers,
    to_grid,
)
from edgekd.records import Aggregate, Artifact, Profile, Track, make_folder, untracked, write_atomic
from edgekd.runtimes import Session

VERSION = 1  # of what is kept: another one asks again
# What a model is asked of itself; the keys of Comparison.checks, with "shortcut: <marker>" and
# "flips: <marker>".
CHECKS = {
    "random_head": "its maps correlate with those of a random head (null: 95 % of strangers)",
    "other_class": "and with those of the runner-up class",
    "repeatable": "kappa of its maps with those of the image moved by half a grey level",
    "faithful": "insertion less deletion, blurred fill (null: of random smooth maps)",
    "faithful_mean": "the same, filled with the mean colour",
    "above_random": "faithful less that of the random maps",
    "undefined": "share of images that have no map",
}


class Asked(NamedTuple):
    """How maps are made: another answer to any of these, and they are made again."""

    variant: score_cam.Variant = "evidence"
    share: float = 1.0  # of the channels
    batch: int = 32
    seed: int = 0


class Examined(NamedTuple):
    """What was found of one model on N images, K classes; maps are >= 0 on a g x g grid."""

    logits: np.ndarray  # (N, K) float32
    maps: np.ndarray  # (N, K, g, g) float32, NaN where undefined
    head: np.ndarray  # (N, K, g, g): of a random head, variant as asked
    repeated: np.ndarray  # (N, K, g, g): of the image with each pixel moved by half a level at most
    faithful: np.ndarray  # (N, F): of its own answer's map, a column a fill; NaN if undefined
    random: np.ndarray  # (N, F): of random smooth maps
    marked: np.ndarray  # (N, 2 * M, K) logits with markers, then with flat patches
    seconds: np.ndarray  # (N,) wall clock for a map
    asked: np.ndarray  # (N,) masked images for it

    def of(self, labels: np.ndarray) -> Maps:
        """The maps of one class an image, (N,) `labels`."""
        rows = np.arange(len(labels))
        return Maps(self.maps[rows, labels], self.logits, float(self.seconds.mean()))


def examine(
    session: Session,
    artifact: Artifact,
    profile: Profile,
    pixels: np.ndarray,
    digests: Sequence[str],
    asked: Asked,
    *,
    track: Track = untracked,
) -> Examined:
    """Ask `session`, which runs `artifact` on `profile`, about `pixels` (N, H, W, 3) uint8.

    digests: of the images, under which answers are kept in the artifact's folder.
    """
    folder = make_folder(artifact.folder / "maps" / _key(artifact, profile, asked))
    found: list[dict[str, np.ndarray]] = []
    for i in track(range(len(pixels)), f"explaining {artifact.role} {artifact.precision}",
                   len(pixels)):  # fmt: skip
        path = folder / f"{digests[i][:16]}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                found.append(dict(stored))
            continue
        if not found:
            session(preprocess.normalise(pixels[:1], artifact.spec))  # its first call is slow
        seed = int(digests[i][:8], 16) if digests[i] else i
        found.append(_one(session, artifact, pixels[i], asked, seed + asked.seed))
        kept.write_arrays(path, found[-1])
    return Examined(*(np.stack([f[name] for f in found]) for name in Examined._fields))


def certified(
    session: Session,
    artifact: Artifact,
    profile: Profile,
    images: np.ndarray,
    variant: score_cam.Variant,
) -> score_cam.Fast:
    """How few channels give the maps of `session`, told by prepared images (N, 3, H, W).

    Kept with the model's file, as the maps are.
    """
    said = [_key(artifact, profile, Asked(variant)), score_cam.ALIKE, score_cam.SHARES,
            hashlib.sha256(images.tobytes()).hexdigest()]  # fmt: skip
    path = make_folder(artifact.folder / "maps") / f"fast-{kept.digest(said)}.json"
    if path.is_file():
        return score_cam.Fast(*json.loads(path.read_text("utf-8")))
    labels = session(images).logits.argmax(1)
    found = score_cam.fast_share(session, images, labels, variant=variant)
    write_atomic(path, json.dumps(found) + "\n")
    return found


def _key(artifact: Artifact, profile: Profile, asked: Asked) -> str:
    """Of everything that the answers depend on."""
    return kept.digest(
        [VERSION, GRID, artifact.sha256, artifact.temperature, artifact.precision,
         artifact.spec.model_dump(mode="json"), profile.runtime, profile.device,
         profile.options, asked]
    )  # fmt: skip


def _one(
    session: Session, artifact: Artifact, pixels: np.ndarray, asked: Asked, seed: int
) -> dict[str, np.ndarray]:
    """All of one image (H, W, 3) uint8."""
    spec, temperature = artifact.spec, artifact.temperature
    image = preprocess.normalise(pixels[None], spec)[0]
    started = time.perf_counter()
    own = score_cam.ask(session, image, variant=asked.variant, batch=asked.batch, share=asked.share)
    maps = score_cam.class_maps(own, asked.variant)
    seconds = time.perf_counter() - started
    head = score_cam.class_maps(score_cam.random_head(own, asked.seed), asked.variant)
    again = score_cam.ask(
        session, rounded(image, spec.std, seed), variant=asked.variant, batch=asked.batch,
        share=asked.share,
    )  # fmt: skip
    label = int(own.logits.argmax())
    heat, chance = maps[label], random_map(maps.shape[1:], seed)
    both = [
        [np.nan if np.isnan(h).any() else
         faithfulness(session, image, h, label, fill=fill, temperature=temperature)
         for fill in FILLS]
        for h in (heat, chance)
    ]  # fmt: skip
    marked = session(preprocess.normalise(shortcuts.marked(pixels), spec)).logits
    return {
        "logits": own.logits,
        "maps": _grids(maps),
        "head": _grids(head),
        "repeated": _grids(score_cam.class_maps(again, asked.variant)),
        "faithful": np.array(both[0]),
        "random": np.array(both[1]),
        "marked": marked,
        "seconds": np.array(seconds),
        "asked": np.array(own.asked),
    }


def rounded(image: np.ndarray, std: tuple[float, ...], seed: int) -> np.ndarray:
    """The prepared image (3, H, W) as it might have been before it was rounded to 256 levels.

    Each pixel is moved by up to half a grey level, its channels together: nobody could see it. A
    map that changes with it is not of what is on the film.
    """
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, image.shape[1:]) / 255
    return np.asarray(image + noise / np.array(std)[:, None, None], np.float32)


def _grids(maps: np.ndarray) -> np.ndarray:
    """(K, g, g) float32 of (K, h, w)."""
    return np.stack([to_grid(m) for m in maps])


def checks(found: Examined, cases: Cases, artifact: Artifact, seed: int) -> dict[str, Aggregate]:
    """The figures of CHECKS, of the maps of the model's own answers; what is undefined left out."""
    groups = np.asarray(cases.groups)
    answers = found.logits.argmax(1)
    rows = np.arange(len(answers))
    own, head = found.maps[rows, answers], found.head[rows, answers]
    second = np.argsort(-found.logits, axis=1, kind="stable")[:, 1]
    others = strangers(cases._replace(explained=[str(k) for k in answers]))
    limit = beyond_chance(correlations(own, own), others)[1]
    again = correlations(own, found.repeated[rows, answers])

    def diagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.diag(correlations(a, b))

    undefined = np.isnan(own).any((1, 2)).astype(float)
    nothing = np.full(len(rows), np.nan)
    faithful, chance = found.faithful, found.random
    made = {
        "random_head": aggregate(diagonal(own, head), np.full(len(rows), limit), groups, seed),
        "other_class": aggregate(
            diagonal(own, found.maps[rows, second]), np.full(len(rows), limit), groups, seed
        ),
        "repeatable": kappa(np.diag(again), row_means(again, others), groups, seed),
        "faithful": aggregate(faithful[:, 0], chance[:, 0], groups, seed),
        "faithful_mean": aggregate(faithful[:, 1], chance[:, 1], groups, seed),
        "above_random": aggregate(faithful[:, 0] - chance[:, 0], nothing, groups, seed),
        "undefined": aggregate(undefined, nothing, groups, seed),
    }
    made |= _shortcuts(found, artifact, groups, seed)
    return {key: a for key, a in made.items() if a is not None}


def blindness(
    session: Session, images: np.ndarray, cases: Cases, *, seed: int = 0, track: Track = untracked
) -> Aggregate | None:
    """How *published* maps of the model's answers to images (N, 3, H, W) are like a random head's.

    Null: what 95 % of strangers' published maps stay under. A value above it: the published map
    cannot tell this model from one whose head has learnt nothing. None if all are undefined.
    """
    own: list[np.ndarray] = []
    head: list[np.ndarray] = []
    answers: list[str] = []
    for image in track(images, "published maps, for comparison", len(images)):
        found = score_cam.ask(session, image, variant="published")
        label = int(found.logits.argmax())
        answers.append(str(label))
        for of_all, passes in ((own, found), (head, score_cam.random_head(found, seed))):
            of_all.append(to_grid(score_cam.class_maps(passes, "published")[label]))
    others = strangers(cases._replace(explained=answers))
    mine = np.stack(own)
    limit = beyond_chance(correlations(mine, mine), others)[1]
    alike = np.diag(correlations(mine, np.stack(head)))
    return aggregate(alike, np.full(len(alike), limit), np.asarray(cases.groups), seed)


def excess(found: Examined, temperature: float) -> np.ndarray:
    """(N, M) what each marker moves the answer (total variation), less what its flat patch does."""
    tv, _ = shortcuts.moved(found.logits, found.marked, temperature)
    half = tv.shape[1] // 2
    return np.asarray(tv[:, :half] - tv[:, half:])


def names_of_markers(artifact: Artifact) -> list[str]:
    """In the order in which they were shown."""
    return [m.name for m in shortcuts.markers(*artifact.spec.size)]


def _shortcuts(
    found: Examined, artifact: Artifact, groups: np.ndarray, seed: int
) -> dict[str, Aggregate | None]:
    """Of each marker: what it moves beyond its patch, and the answers that it changes."""
    tv, flips = shortcuts.moved(found.logits, found.marked, artifact.temperature)
    half = tv.shape[1] // 2
    made = {}
    for i, name in enumerate(names_of_markers(artifact)):
        patch = half + i
        made[f"shortcut: {name}"] = aggregate(tv[:, i] - tv[:, patch], tv[:, patch], groups, seed)
        made[f"flips: {name}"] = aggregate(flips[:, i], flips[:, patch], groups, seed)
    return made
