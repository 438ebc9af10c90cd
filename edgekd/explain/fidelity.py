"""How much of the reference's explanations is found in another artifact's?

Every figure stands beside the same figure against strangers: maps of other patients' images with
the same class explained. A map that ignores the image (a centred blob, the anatomy) reaches a
Pearson of 0.3 to 0.7 and nothing beyond its strangers. No verdict is drawn here (see `verdict`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgekd.explain.score_cam import Variant, interpolation, score_cam
from edgekd.metrics.calibration import probabilities
from edgekd.records import Aggregate, Agreement, Artifact, Comparison, EdgeKDError, Track, untracked
from edgekd.runtimes import Session

GRID = 14  # cells a side on which maps are compared
RESAMPLES = 2000
FEW = 20  # patients of a class or subgroup below which nothing is said of it


class Maps(NamedTuple):
    """One artifact's maps of a set of images."""

    maps: np.ndarray  # (N, g, g) float32 >= 0, not normalised; a row of NaN where undefined
    logits: np.ndarray  # (N, K) float32, the artifact's own
    seconds: float  # wall clock for a map, mean


class Cases(NamedTuple):
    """What was explained: the same images and classes for every artifact."""

    images: Sequence[str]  # N names
    labels: Sequence[str]  # N true classes
    explained: Sequence[str]  # N classes that the maps are of
    groups: Sequence[str]  # N patients
    masks: np.ndarray | None = None  # (N, H, W) bool; all False where an image has none
    subgroups: Sequence[str] = ()  # N, "" where none is named; or none at all


def explain_set(
    session: Session,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    variant: Variant = "evidence",
    batch: int = 16,
    grid: int = GRID,
    track: Track = untracked,
) -> Maps:
    """Score-CAM maps of class `labels` (N,) of prepared `images` (N, 3, H, W), on a common grid."""
    if len(images) == 0:
        raise EdgeKDError("no images to explain: give at least one")
    maps = np.full((len(images), grid, grid), np.nan, np.float32)
    logits = []
    seconds = 0.0
    for i in track(range(len(images)), "explaining", len(images)):
        heat = score_cam(session, images[i], int(labels[i]), variant=variant, batch=batch)
        logits.append(heat.logits)
        seconds += heat.seconds
        if heat.map is not None:
            maps[i] = to_grid(heat.map, grid)
    return Maps(maps, np.stack(logits), seconds / len(images))


def to_grid(heat: np.ndarray, g: int = GRID) -> np.ndarray:
    """(g, g) float32: a map (h, w) averaged over cells, or bilinear along a side shorter than g."""
    h, w = heat.shape
    return np.asarray(_onto(h, g) @ heat.astype(np.float32) @ _onto(w, g).T, np.float32)


def from_grid(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) float32: the map of `size` (h, w) that `to_grid` brought to (g, g), up to rounding.

    Exact, since a map of no more cells than the grid was resampled without loss. A map that was
    finer along a side was averaged, so the grid's own resolution is what remains there.
    """
    (g, _), (h, w) = heat.shape, size
    back = [np.linalg.pinv(_onto(n, g)) if n < g else np.eye(g) for n in (h, w)]
    return np.asarray(back[0] @ heat @ back[1].T, np.float32)


def _onto(n: int, g: int) -> np.ndarray:
    """(g, n) matrix that takes n points to g cells; a point that straddles two is shared."""
    if n < g:
        return interpolation(n, g)
    edges = np.arange(g + 1) * (n / g)
    points = np.arange(n)
    overlap = np.minimum(edges[1:, None], points + 1) - np.maximum(edges[:-1, None], points)
    return np.asarray(np.clip(overlap, 0, None) * (g / n), np.float32)


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of two maps of one shape; None if one is flat or NaN."""
    return _only(_cross_pearson(_rows(a[None]), _rows(b[None])))


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of the ranks, ties sharing their average rank; None if one is flat or NaN."""
    return _only(_cross_pearson(_ranks(_rows(a[None])), _ranks(_rows(b[None]))))


def iou_top(a: np.ndarray, b: np.ndarray, share: float = 0.2) -> float | None:
    """Overlap (intersection over union) of the highest `share` of the cells of two maps.

    Among equals the first in reading order count as higher. None if one is flat or NaN.
    """
    return _only(_cross_iou(_rows(a[None]), _rows(b[None]), share))


def energy_inside(heat: np.ndarray, mask: np.ndarray) -> float | None:
    """Share of the map (H, W) >= 0 that lies in `mask` (H, W) bool; None if either is empty."""
    total = float(heat.sum())
    return float(heat[mask].sum()) / total if total > 0 and mask.any() else None


def pointing_hit(heat: np.ndarray, mask: np.ndarray) -> float | None:
    """1.0 if the map's peak (first of equals) is in `mask`, else 0.0; None if flat or empty."""
    if _flat(heat.reshape(1, -1)).any() or not mask.any():
        return None
    return float(mask.flat[heat.argmax()])


def compare(
    name: str,
    artifact: Artifact,
    runtime: str,
    cases: Cases,
    reference: Maps,
    other: Maps,
    *,
    seed: int = 0,
) -> Comparison:
    """How alike `reference`'s maps and `other`'s, those of `artifact`, are, image by image.

    Figures: pearson, spearman, iou20 (top fifth); with masks also energy (share of the artifact's
    map inside), enrichment (energy over the mask's share of the area) and hit (peak inside). Of
    pearson: kappa, identification and lost (see `beyond_chance`).
    Aggregates are means over the images where a figure is defined. Their 95 % intervals resample
    whole groups; a figure that is defined for one group only has no interval and is left out.
    """
    table = _similarities(reference.maps, other.maps)
    if cases.masks is not None:
        table |= localisation(other.maps, cases.masks)
    groups = np.asarray(cases.groups)
    stranger = strangers(cases)
    own = {key: np.diag(cross) for key, cross in table.items()}
    null = {key: row_means(cross, stranger) for key, cross in table.items()}
    found = {key: aggregate(own[key], null[key], groups, seed) for key in table}
    told, least = beyond_chance(table["pearson"], stranger)
    found |= beyond_strangers(own["pearson"], null["pearson"], told, groups, seed)
    parts = _parts(cases, own["pearson"], null["pearson"], told, seed)
    own |= told
    null |= {key: np.full(len(groups), np.nan) for key in told}
    return Comparison(
        name=name,
        artifact_sha256=artifact.sha256,
        precision=artifact.precision,
        runtime=runtime,
        layer=artifact.layer,
        seconds_per_map=other.seconds,
        undefined=int(np.isnan(other.maps).any((1, 2)).sum()),
        aggregate={key: a for key, a in found.items() if a is not None},
        parts=parts,
        limit=_number(least),
        images=_agreements(cases, artifact, other, own, null),
    )


def _agreements(
    cases: Cases,
    artifact: Artifact,
    maps: Maps,
    own: dict[str, np.ndarray],
    null: dict[str, np.ndarray],
) -> tuple[Agreement, ...]:
    """One record an image, from each figure's (N,) values and nulls."""
    answers, p = maps.logits.argmax(1), probabilities(maps.logits, artifact)
    return tuple(
        Agreement(
            image=cases.images[i],
            label=cases.labels[i],
            explained=cases.explained[i],
            answer=artifact.spec.classes[answers[i]],
            probability=float(p[i, answers[i]]),
            figures={key: _number(values[i]) for key, values in own.items()},
            null={key: _number(values[i]) for key, values in null.items()},
        )
        for i in range(len(cases.images))
    )


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) Pearson of each of (N, g, g) maps with each of (M, g, g); NaN where one is flat."""
    return _cross_pearson(_rows(a), _rows(b))


def _similarities(reference: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure as (N, N): row i the reference's map i, column o the other's map o."""
    r, q = _rows(reference), _rows(other)
    return {
        "pearson": _cross_pearson(r, q),
        "spearman": _cross_pearson(_ranks(r), _ranks(q)),
        "iou20": _cross_iou(r, q, 0.2),
    }


def localisation(maps: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure as (N, N): row i the mask of image i, column o map o, upsampled to the mask.

    NaN where mask or map is empty. Upsampling is linear, so it is the masks that are brought to
    the grid (by the transpose), once each, instead of every map to the pixels.
    """
    height, width = masks.shape[1:]
    up, across = interpolation(maps.shape[1], height), interpolation(maps.shape[2], width)
    on_grid = _rows(up.T @ masks.astype(np.float32) @ across)  # (N, g * g)
    whole = np.outer(up.sum(0), across.sum(0)).ravel().astype(float)  # (g * g,)
    q = _rows(maps)
    total = q @ whole  # (N,)
    area = masks.mean((1, 2))  # (N,)
    energy = on_grid @ q.T / np.where(total > 0, total, np.nan)
    energy[area == 0] = np.nan
    hit = np.full(energy.shape, np.nan)
    for o in np.flatnonzero(~_flat(q)):
        peak = np.unravel_index((up @ maps[o] @ across.T).argmax(), (height, width))
        hit[area > 0, o] = masks[area > 0, peak[0], peak[1]]
    enrichment = energy / np.where(area > 0, area, np.nan)[:, None]
    return {"energy": energy, "enrichment": enrichment, "hit": hit}


def _rows(maps: np.ndarray) -> np.ndarray:
    """(N, h, w) as (N, h * w) float64."""
    return maps.reshape(len(maps), -1).astype(np.float64)


def _flat(rows: np.ndarray) -> np.ndarray:
    """(N,) bool: this row holds NaN, or one value only but for rounding."""
    spread = np.ptp(rows, axis=1)
    return ~(spread > 1e-9 * np.abs(rows).max(1))  # `not above` also holds for NaN


def _cross_pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) correlation of each row of `a` with each of `b`; NaN for flat rows."""

    def standard(x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        centred[_flat(x)] = np.nan
        return centred / np.linalg.norm(centred, axis=1, keepdims=True)

    return np.clip(standard(a) @ standard(b).T, -1, 1)


def _ranks(rows: np.ndarray) -> np.ndarray:
    """Each row's values replaced by their ranks from 1, ties by their mean; NaN for flat rows."""
    ranks = np.full(rows.shape, np.nan)
    for i in np.flatnonzero(~_flat(rows)):
        _, place, count = np.unique(rows[i], return_inverse=True, return_counts=True)
        ranks[i] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _cross_iou(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """(N, M) overlap of the top `share` of the cells of each row of `a` with each of `b`."""
    count = max(1, round(share * a.shape[1]))

    def top(x: np.ndarray) -> np.ndarray:
        chosen = np.zeros(x.shape)
        order = np.argsort(-x, axis=1, kind="stable")[:, :count]
        np.put_along_axis(chosen, order, 1, axis=1)
        chosen[_flat(x)] = np.nan
        return chosen

    common = top(a) @ top(b).T
    return common / (2 * count - common)


def row_means(cross: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(N,) mean of the chosen entries of each row that are defined; NaN if there are none."""
    chosen = chosen & ~np.isnan(cross)
    count = chosen.sum(1)
    return np.where(chosen, cross, 0).sum(1) / np.where(count > 0, count, np.nan)


def _parts(
    cases: Cases, own: np.ndarray, null: np.ndarray, told: dict[str, np.ndarray], seed: int
) -> dict[str, dict[str, Aggregate]]:
    """Kappa, identification and lost of each class's and subgroup's images alone.

    own, null: (N,) Pearson. Empty where there are fewer than FEW patients.
    """
    groups = np.asarray(cases.groups)
    found: dict[str, dict[str, Aggregate]] = {}
    for what, names in (("class", cases.labels), ("subgroup", cases.subgroups)):
        for name in sorted(set(names) - {""}):
            at = np.flatnonzero(np.asarray(names) == name)
            n = len(set(groups[at].tolist()))
            if n < FEW:
                found[f"{what} {name}"] = {}
                continue
            part = {"kappa": kappa(own[at], null[at], groups[at], seed)}
            for key, values in told.items():
                chance = np.full(len(at), np.nan)
                part[key] = aggregate(values[at], chance, groups[at], seed)
            if lost := part["lost"]:
                part["lost"] = exact(lost, n)
            found[f"{what} {name}"] = {k: a for k, a in part.items() if a is not None}
    return found


def strangers(cases: Cases) -> np.ndarray:
    """(N, N) bool: image o is another patient's, with the same class explained as image i."""
    groups, explained = np.asarray(cases.groups), np.asarray(cases.explained)
    return np.asarray((explained[:, None] == explained) & (groups[:, None] != groups))


def beyond_chance(cross: np.ndarray, stranger: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """({identification, lost} of (N,) each, the limit) from the (N, N) correlations of maps.

    identification: share of strangers whose map agrees less with the reference's than the image's
    own does, equals counting half; 0.5 by chance. lost: 1 where the own map agrees no better than
    the limit, which 95 % of all strangers' stay under; an undefined map is lost. NaN where the
    reference has no map or nobody is a stranger.
    """
    own = np.diag(cross)
    known = stranger & ~np.isnan(cross)
    limit = float(np.quantile(cross[known], 0.95)) if known.any() else float("nan")
    count = known.sum(1)
    below = np.where(known, (cross < own[:, None]) + 0.5 * (cross == own[:, None]), 0).sum(1)
    found = below / np.where(count > 0, count, np.nan)
    found[np.isnan(own)] = np.nan
    asked = ~np.isnan(cross).all(1)  # the reference has a map, and some other one has
    lost = np.where(np.isnan(own) | (own <= limit), 1.0, 0.0)
    lost[~asked | np.isnan(limit)] = np.nan
    return {"identification": found, "lost": lost}, limit


def beyond_strangers(
    own: np.ndarray, null: np.ndarray, told: dict[str, np.ndarray], groups: np.ndarray, seed: int
) -> dict[str, Aggregate | None]:
    """Kappa of Pearson's r (N,) and its nulls, and the means of what `beyond_chance` told."""
    found = {"kappa": kappa(own, null, groups, seed)}
    for key, chance in (("identification", 0.5), ("lost", 0.05)):
        one = aggregate(told[key], np.full(len(groups), chance), groups, seed)
        found[key] = exact(one, len(set(groups.tolist()))) if one and key == "lost" else one
    return found


def kappa(own: np.ndarray, null: np.ndarray, groups: np.ndarray, seed: int) -> Aggregate | None:
    """Agreement beyond strangers', (mean own - mean null) / (1 - mean null): 1 is the same map.

    own, null: (N,). Both means are drawn anew in each resample of whole groups. None below two
    groups.
    """
    defined = ~np.isnan(own) & ~np.isnan(null)
    names, member = np.unique(groups[defined], return_inverse=True)
    if len(names) < 2:
        return None
    values = np.stack([own[defined], null[defined]])

    def of(means: np.ndarray) -> np.ndarray:
        return (means[0] - means[1]) / np.maximum(1 - means[1], 1e-9)

    drawn = of(np.stack([_means(v, member, seed) for v in values]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Aggregate(value=float(of(values.mean(1))), low=float(low), high=float(high), null=0.0,
                     n=int(defined.sum()))  # fmt: skip


def exact(share: Aggregate, n: int) -> Aggregate:
    """A share whose interval is at least that of Clopper and Pearson (1934) for n patients.

    Where no image is lost every resample says so, and an interval of no width would be believed.
    """
    low, high = clopper_pearson(round(share.value * n), n)
    return share.model_copy(update={"low": min(share.low, low), "high": max(share.high, high)})


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of which k in n were seen."""

    def tail(p: float, upper: bool) -> float:  # P(X <= k) or P(X >= k)
        terms = range(k + 1) if upper else range(k, n + 1)
        return math.fsum(
            math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                     + i * math.log(p) + (n - i) * math.log1p(-p))
            for i in terms
        )  # fmt: skip

    def bound(upper: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            wide = tail(middle, upper) > (1 - level) / 2
            low, high = (middle, high) if wide == upper else (low, middle)
        return low

    return (0.0 if k == 0 else bound(False)), (1.0 if k == n else bound(True))


def aggregate(
    values: np.ndarray, null: np.ndarray, groups: np.ndarray, seed: int
) -> Aggregate | None:
    """Mean of (N,) values with its interval beside the mean null; None below two groups."""
    defined = ~np.isnan(values)
    names, member = np.unique(groups[defined], return_inverse=True)
    if len(names) < 2:
        return None
    low, high = bootstrap(values[defined], member, seed)
    nulls = null[defined & ~np.isnan(null)]
    return Aggregate(
        value=float(values[defined].mean()),
        low=low,
        high=high,
        null=float(nulls.mean()) if len(nulls) else None,
        n=int(defined.sum()),
    )


def bootstrap(values: np.ndarray, member: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of (N,) values, drawing whole groups.

    member: (N,) int, the group of each value. Values of one group are not independent.
    """
    low, high = np.percentile(_means(values, member, seed), [2.5, 97.5])
    return float(low), float(high)


def _means(values: np.ndarray, member: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES,) means of (N,) values over groups drawn with replacement."""
    size = np.bincount(member)  # images of each group
    total = np.bincount(member, weights=values)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(size), size=(RESAMPLES, len(size)))
    return np.asarray(total[drawn].sum(1) / size[drawn].sum(1))


def _only(cross: np.ndarray) -> float | None:
    """The one entry of a (1, 1) table, None for NaN."""
    return _number(cross[0, 0])


def _number(x: float) -> float | None:
    """A plain float, None for NaN."""
    return None if np.isnan(x) else float(x)
