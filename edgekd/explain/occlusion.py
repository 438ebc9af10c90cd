"""What a model answers without the organ (or the lesion): an honest one can no longer tell.

Where an image has a mask, its inside is hidden, and then all else instead. A model that gives its
answer without the organ took it from elsewhere: from a film's border, or the hospital it is from.
Neither heat maps nor markers drawn on the film show this.

Hidden is what is replaced by a blur of the pixels that are left (`hide`). A blur of the whole image
would not do: a large lesion outlasts it, as most of its light is its own.

A model answers something to a film without an organ too, and often the same for every film, or by
the shape of the gap. So the same is hidden in films of other patients, and only answers that
survive more often than these films get them count (`EXCESS`).

Small networks reached an excess of 0.05 and 0.10 on chest films of one hospital without their
lungs, and of 0.90 where a strip along the border told the class; of 0.04 to 0.08 on phantoms
without their lesions (0.25 where a blur of the whole image stood for them), and of 0.66 and 0.69 on
brain scans without their tumours: where and how the brain was cut tells much of which tumour it is.
Hence two margins, one without the organ and a wider one without the lesion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgekd.data import preprocess
from edgekd.explain import kept
from edgekd.explain.fidelity import aggregate, clopper_pearson, exact, kappa
from edgekd.explain.score_cam import blur
from edgekd.metrics.calibration import softmax
from edgekd.records import (
    Aggregate,
    Artifact,
    Profile,
    Spec,
    Survived,
    Track,
    make_folder,
    untracked,
)
from edgekd.runtimes import Session

if TYPE_CHECKING:
    from edgekd.data import Sample

VERSION = 1  # of what is kept: another one asks again
EDGE = 0.02  # of the shorter side: sigma of the soft edge, which lies outside the mask
STRANGERS = 4  # films of other patients in which the same is hidden
LISTED = 3  # images of a model that the report lists
BATCH = 16
# The keys of Comparison.checks that come from here.
EXCESS = "elsewhere"  # surviving answers beyond chance: 0 needs the organ, 1 never looks at it
CHECKS = {
    EXCESS: "(share - chance) / (1 - chance) of answers that survive without the region",
    "survive_without": "share of answers that survive with the inside hidden (null: chance)",
    "survive_only": "share of answers that survive with all else hidden (null: chance)",
    "drop_without": "calibrated probability of the answer that is lost with the inside hidden",
    "drop_only": "calibrated probability of the answer that is lost with all else hidden",
}


class Regions(NamedTuple):
    """What is hidden in N images."""

    masks: np.ndarray  # (N, H, W) bool; all False where an image has none
    kinds: Sequence[str]  # N: "organ", "lesion", or "" where an image has none


class Hidden(NamedTuple):
    """What one model answers, as logits of K classes, of the n images that have a region."""

    at: np.ndarray  # (n,) int: their places among all N images
    kinds: Sequence[str]  # n: "organ" or "lesion"
    without: np.ndarray  # (n, K) with the region hidden
    only: np.ndarray  # (n, K) with all but the region hidden
    others_without: np.ndarray  # (n, S, K): strangers' images, this region and their own hidden
    others_only: np.ndarray  # (n, S, K): strangers' images, all but this region hidden

    @property
    def region(self) -> str:
        """In words: "organ", "lesion" or "organ or lesion"."""
        return " or ".join(sorted(set(self.kinds), reverse=True))


def regions(samples: Sequence[Sample], spec: Spec) -> Regions | None:
    """The organ of each image, else its lesion, as a model of `spec` sees it; None if none has."""
    masks = np.zeros((len(samples), *spec.size), bool)
    kinds = [""] * len(samples)
    for i, s in enumerate(samples):
        for kind, path in (("organ", s.organ), ("lesion", s.mask)):
            if path is not None and (mask := preprocess.mask(path, spec)).any():
                masks[i], kinds[i] = mask, kind
                break
    return Regions(masks, kinds) if any(kinds) else None


def soft(mask: np.ndarray) -> np.ndarray:
    """(H, W) float32 in [0, 1] of (H, W) bool: 1 inside, falling to 0 around it.

    The edge is soft as a hard one is an outline that is not in the image, and it lies outside so
    that nothing of the inside is left.
    """
    near = blur(mask[None].astype(np.float32), EDGE)[0]
    return np.asarray(np.maximum(mask, np.clip(2 * near, 0, 1)), np.float32)


def hide(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """(3, H, W) float32: a prepared image (3, H, W) less what is `hidden` (H, W) in [0, 1].

    In its place is a blur of what is left, which holds nothing of it; far from all that is left,
    its mean.
    """
    left = 1 - hidden  # (H, W)
    total = float(left.sum())
    if total == 0:
        return np.zeros_like(image)  # prepared: the mean colour is 0
    mean = (image * left).sum((1, 2), keepdims=True) / total  # (3, 1, 1)
    spread = blur(left[None])  # (1, H, W)
    fill = (blur(image * left) + 1e-3 * mean) / (spread + 1e-3)
    return np.asarray(image * left + fill * hidden, np.float32)


def strangers(groups: Sequence[str], at: np.ndarray, seed: int) -> np.ndarray:
    """(n, S) int: of each image `at` (n,), S other patients' images of all N; S is 0 if one has
    none, and else STRANGERS, or as many as each has.
    """
    names = np.asarray(groups)
    others = [np.flatnonzero(names != names[i]) for i in at]
    count = min(STRANGERS, *(len(o) for o in others))
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(o, count, replace=False) for o in others]).astype(int)


def examine(
    session: Session,
    artifact: Artifact,
    profile: Profile,
    pixels: np.ndarray,
    found: Regions,
    groups: Sequence[str],
    *,
    seed: int = 0,
    track: Track = untracked,
) -> Hidden:
    """Ask `session`, which runs `artifact` on `profile`, about `pixels` (N, H, W, 3) uint8.

    groups: N patients. Answers are kept with the model's file.
    """
    at = np.flatnonzero([bool(k) for k in found.kinds])
    chosen = strangers(groups, at, seed)
    kinds = [k for k in found.kinds if k]
    path = make_folder(artifact.folder / "maps") / (
        f"hidden-{_key(artifact, profile, pixels, found.masks, chosen)}.npz"
    )
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return Hidden(at, kinds, **stored)
    images = preprocess.normalise(pixels, artifact.spec)
    made: dict[str, list[np.ndarray]] = {k: [] for k in Hidden._fields[2:]}
    todo = track(range(len(at)), f"hiding, {artifact.role} {artifact.precision}", len(at))
    for n in todo:
        logits = _answers(session, _shown(images, found.masks, at[n], chosen[n]))
        half = len(logits) // 2
        made["without"].append(logits[0])
        made["only"].append(logits[half])
        made["others_without"].append(logits[1:half])
        made["others_only"].append(logits[half + 1 :])
    arrays = {k: np.stack(v) for k, v in made.items()}
    kept.write_arrays(path, arrays)
    return Hidden(at, kinds, **arrays)


def _shown(images: np.ndarray, masks: np.ndarray, i: int, others: np.ndarray) -> np.ndarray:
    """(2 + 2 * S, 3, H, W): image i and its strangers without region i, then with nothing else.

    A stranger's own region is hidden too where region i is, so that it tells its class no more.
    """
    inside = soft(masks[i])
    without = [hide(images[i], inside), *(hide(images[o], soft(masks[i] | masks[o]))
                                          for o in others)]  # fmt: skip
    only = [hide(images[o], 1 - inside) for o in (i, *others)]
    return np.stack(without + only)


def _answers(session: Session, images: np.ndarray) -> np.ndarray:
    """(n, K) float32 logits of (n, 3, H, W)."""
    parts = [session(images[i : i + BATCH]).logits for i in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def _key(
    artifact: Artifact, profile: Profile, pixels: np.ndarray, masks: np.ndarray, others: np.ndarray
) -> str:
    """Of everything that the answers depend on."""
    shown = [hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
             for x in (pixels, masks, others)]  # fmt: skip
    return kept.digest([VERSION, EDGE, *kept.identity(artifact, profile), shown])


# --- what it says ------------------------------------------------------------------------------


def checks(
    hidden: Hidden, logits: np.ndarray, artifact: Artifact, groups: Sequence[str], seed: int
) -> dict[str, Aggregate]:
    """The figures of CHECKS, and "survive_without: <class>" of the images answered so.

    logits: (N, K) of the whole images; groups: N patients. Shares and probabilities in [0, 1]. A
    figure of images of fewer than two patients is left out.
    """
    own = np.asarray(groups)[hidden.at]
    patients = len(set(own.tolist()))
    whole = logits[hidden.at]
    answers, rows = whole.argmax(1), np.arange(len(whole))
    before = softmax(whole, artifact.temperature)[rows, answers]
    found: dict[str, Aggregate | None] = {}
    for what, asked, others in (
        ("without", hidden.without, hidden.others_without),
        ("only", hidden.only, hidden.others_only),
    ):
        same = (asked.argmax(1) == answers).astype(float)
        chance = _chance(others, answers)
        share = aggregate(same, chance, own, seed)
        found[f"survive_{what}"] = exact(share, patients) if share else None
        drop = before - softmax(asked, artifact.temperature)[rows, answers]
        found[f"drop_{what}"] = aggregate(drop, np.full(len(rows), np.nan), own, seed)
        if what == "without" and share and not np.isnan(chance).any():
            found[EXCESS] = _excess(same, chance, own, seed)
        if what == "without":
            for k in np.unique(answers):
                at = answers == k
                part = aggregate(same[at], chance[at], own[at], seed)
                found[f"survive_without: {artifact.spec.classes[k]}"] = (
                    exact(part, len(set(own[at].tolist()))) if part else None
                )
    return {key: a for key, a in found.items() if a is not None}


def _chance(others: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(n,) share of strangers (n, S, K) that get the answer (n,); NaN if there are none."""
    if others.shape[1] == 0:
        return np.full(len(answers), np.nan)
    return np.asarray((others.argmax(2) == answers[:, None]).mean(1))


def _excess(
    same: np.ndarray, chance: np.ndarray, groups: np.ndarray, seed: int
) -> Aggregate | None:
    """(share - chance) / (1 - chance) of surviving answers (n,), at least -1: Cohen's kappa of the
    answers to the whole and the hidden images.

    Its interval is at least that of the share by Clopper and Pearson: where no answer survives
    every resample says so, and an interval of no width would be believed.
    """
    found = kappa(same, chance, groups, seed)
    if found is None:
        return None
    n, null = len(set(groups.tolist())), float(chance.mean())
    exactly = [(x - null) / max(1 - null, 1e-9)
               for x in clopper_pearson(round(same.mean() * n), n)]  # fmt: skip
    bounds = {"value": found.value, "low": min(found.low, exactly[0]),
              "high": max(found.high, exactly[1])}  # fmt: skip
    return found.model_copy(update={k: float(np.clip(x, -1, 1)) for k, x in bounds.items()})


def survived(
    hidden: Hidden, logits: np.ndarray, artifact: Artifact, model: str, digests: Sequence[str]
) -> list[Survived]:
    """The images whose answer survives most confidently without the region, LISTED at most.

    logits: (N, K) of the whole images; digests: of N images. Surest first.
    """
    before = softmax(logits[hidden.at], artifact.temperature)
    after = softmax(hidden.without, artifact.temperature)
    answers, rows = before.argmax(1), np.arange(len(before))
    kept = after[rows, answers]  # (n,)
    same = np.flatnonzero(after.argmax(1) == answers)
    return [
        Survived(
            image=digests[hidden.at[i]][:12], model=model, region=hidden.kinds[i],
            answer=artifact.spec.classes[answers[i]], before=float(before[i, answers[i]]),
            after=float(kept[i]),
        )
        for i in same[np.argsort(-kept[same], kind="stable")][:LISTED]
    ]  # fmt: skip
