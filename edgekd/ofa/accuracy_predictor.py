"""How accurate is a sub-net that was never evaluated? Fitted on some that were.

Features are Once-for-All's (Cai et al. 2020, `nas/accuracy_predictor`): kernel and expansion of
every place one-hot, zeros where there is no block, and the resolution one-hot. A hundred samples do
not determine a network of 400 x 400 x 400 on them, so the first part is linear: a ridge regression
whose prior says that the places of a stage, and all places, are much alike; its strength is chosen
by leaving one out. OFA's multi-layer perceptron learns what that leaves, and counts as far as it
predicts sub-nets that it has not seen: with few samples not at all.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgekd.metrics import classification
from edgekd.ofa import spaces
from edgekd.ofa.encoding import Figure, Genes, Genome
from edgekd.records import (
    Arch,
    EdgeKDError,
    Record,
    Stored,
    Track,
    append,
    locked,
    make_folder,
    sha256,
    untracked,
    versions,
    write_atomic,
)

FOLDS = 5
FEWEST = 20  # samples: with fewer the folds say nothing
WIDTH = 400  # of the perceptron's three hidden layers, as OFA's
MEMBERS = 2  # perceptrons whose answers are averaged
STEPS = 50  # of AdamW on all samples at once: more only learns their noise
ALIKE = 3.0  # how much likelier is an effect that all places share than one of a place alone
STRENGTHS = np.geomspace(0.1, 1000, 25)  # of the ridge, to choose from
WEIGHTS = "predictor.safetensors"
PRIOR_SPACE = "ofa-mbv3-w1.2"  # of the predictor for ImageNet that OFA's authors released


class Ranking(Record):
    """How well sub-nets are predicted that were held out, fold after fold."""

    kendall: float  # tau-b with the accuracies that were measured
    spearman: float
    rmse: float  # in the unit of the accuracies
    samples: int
    folds: int


class Fitted(Stored):
    """What an AccuracyPredictor was fitted on, and how good it is."""

    FILE: ClassVar[str] = "predictor.json"
    space: str
    resolutions: tuple[int, ...]
    samples: int
    ranking: Ranking
    ridge: float  # strength that leaving one out chose
    share: float  # of the perceptrons' answer that is added, 0 to 1; 0: they are left out
    prior_sha256: str = ""  # of the file with OFA's predictor for ImageNet
    seed: int = 0
    seconds: float
    files: dict[str, str]  # name in the folder -> sha256
    versions: dict[str, str]


class AccuracyPredictor:
    """(N,) accuracies of sub-nets in plain numpy: 50,000 in well under a second."""

    def __init__(self, record: Fitted, weights: dict[str, np.ndarray]) -> None:
        self.record = record
        self.genome = Genome(record.space, record.resolutions)
        self._weights = weights

    def predict(
        self, kernel: np.ndarray, expand: np.ndarray, depth: np.ndarray, resolution: np.ndarray
    ) -> np.ndarray:
        """(N,) float64 of index arrays as in `Genes`, resolutions into the record's own."""
        x = _inputs(self.genome, Genes(kernel, expand, depth, resolution), self._weights)
        found = x @ self._weights["linear.weight"] + self._weights["linear.bias"]
        if self.record.share:
            layers = [self._weights[f"mlp.{i}"] for i in range(8)]
            found = found + self.record.share * _perceptrons(x, layers)
        return found.astype(np.float64)

    def of(self, archs: Sequence[Arch]) -> np.ndarray:
        """(N,) accuracies; EdgeKDError where an Arch is of another space or resolution."""
        return self.predict(*self.genome.split(self.genome.encode(archs)))

    def over(self, space: str, resolutions: Sequence[int]) -> Figure:
        """`predict` for a search: resolutions are indices into `resolutions`, a part of its own."""
        missing = set(resolutions) - set(self.record.resolutions)
        if space != self.record.space or missing:
            raise EdgeKDError(
                f"the accuracy predictor knows {self.record.space} at "
                f"{', '.join(map(str, self.record.resolutions))} px, not {space} at "
                f"{', '.join(map(str, resolutions))} px: evaluate sub-nets there and fit it again"
            )
        place = np.array([self.record.resolutions.index(r) for r in resolutions])
        return lambda k, e, d, r: self.predict(k, e, d, place[r])

    @classmethod
    def fit(
        cls,
        archs: Sequence[Arch],
        accuracies: Sequence[float],
        resolutions: Sequence[int],
        *,
        prior: Path | None = None,
        seed: int = 0,
        track: Track = untracked,
    ) -> AccuracyPredictor:
        """Fitted on (Arch, accuracy) pairs of one space; the same pairs and seed, the same answers.

        prior: OFA's `acc_predictor.pth`; what it says of a sub-net becomes one more feature.
        """
        started = time.perf_counter()
        y = _checked(archs, accuracies)
        genome = Genome(archs[0].space, tuple(resolutions))
        genes = genome.split(genome.encode(archs))
        weights = _prior(prior, genome, genes) if prior else {}
        x, pools = _inputs(genome, genes, weights), _pools(genome, "prior.scale" in weights)
        fold = np.random.default_rng(seed).permutation(len(y)) % FOLDS
        straight, rest = np.zeros(len(y)), np.zeros(len(y))  # each of the folds it is not in
        for k in track(range(FOLDS), "fitting the accuracy predictor", FOLDS):
            out, ours = fold == k, fold != k
            line = _ridge(x[ours], y[ours], pools)
            straight[out] = x[out] @ line[0] + line[1]
            left = y[ours] - x[ours] @ line[0] - line[1]
            rest[out] = _perceptrons(x[out], _train(x[ours], left, seed))
        share = _share(rest, y - straight)
        slope, bias, ridge = _ridge(x, y, pools)
        weights |= {"linear.weight": slope, "linear.bias": np.array(bias)}
        if share:
            layers = _train(x, y - x @ slope - bias, seed)
            weights |= {f"mlp.{i}": layer for i, layer in enumerate(layers)}
        record = Fitted(
            space=genome.name, resolutions=genome.resolutions, samples=len(y),
            ranking=ranking(straight + share * rest, y), ridge=ridge, share=share,
            prior_sha256=sha256(prior) if prior else "", seed=seed,
            seconds=round(time.perf_counter() - started, 2), files={},
            versions=versions("torch", "numpy"),
        )  # fmt: skip
        return cls(record, weights)

    def save(self, folder: Path) -> Fitted:
        """Write the weights and then predictor.json into `folder`."""
        from safetensors.numpy import save

        make_folder(folder)
        write_atomic(folder / WEIGHTS, save(self._weights))
        files = {WEIGHTS: sha256(folder / WEIGHTS)}
        self.record = self.record.model_copy(update={"files": files}).save(folder)
        return self.record

    @classmethod
    def load(cls, folder: Path) -> AccuracyPredictor:
        """The predictor in `folder`; EdgeKDError if it is unfinished or was changed."""
        from safetensors.numpy import load_file

        record, path = Fitted.load(folder), folder / WEIGHTS
        if not path.is_file() or sha256(path) != record.files.get(WEIGHTS):
            raise EdgeKDError(f"{path} is not the file that was saved: fit the predictor again")
        return cls(record, load_file(path))


def collect(
    space: str,
    resolutions: Sequence[int],
    count: int,
    judge: Callable[[Arch], float],
    out: Path,
    *,
    seed: int = 0,
    track: Track = untracked,
) -> list[tuple[Arch, float]]:
    """`count` sub-nets of a space and what `judge` says of their accuracy, as by `judge_all`.

    The sub-nets are always the same for a seed, and a longer list begins with the shorter.
    """
    return judge_all(to_judge(space, resolutions, count, seed), judge, out, track=track)


def judge_all(
    archs: Sequence[Arch],
    judge: Callable[[Arch], float],
    out: Path,
    *,
    track: Track = untracked,
) -> list[tuple[Arch, float]]:
    """Each sub-net with what `judge` says of it, kept in the file `out`, a line of JSON each.

    What `out` holds is not judged again, so that this can be stopped anywhere, even as it writes.
    """
    asked = [spaces.canonical(a) for a in archs]
    with locked(out):  # another profile's search evaluates sub-nets of the same supernet
        known = _read(out, asked[0].space) if asked else {}
        for arch in track(asked, "evaluating sub-nets", len(asked)):
            if arch in known:
                continue
            value = float(judge(arch))
            if not math.isfinite(value):
                raise EdgeKDError(
                    f"a sub-net of {arch.space} has accuracy {value}, no finite number: the "
                    "supernet's weights are broken; train it again, with a lower --lr"
                )
            append(out, json.dumps({"arch": arch.model_dump(), "accuracy": value}))
            known[arch] = value
    return [(arch, known[arch]) for arch in asked]


def to_judge(space: str, resolutions: Sequence[int], count: int, seed: int = 0) -> list[Arch]:
    """Sub-nets to learn from: smallest, largest and middle at each resolution, then random ones."""
    ends = [spaces.uniform(space, end, r) for r in resolutions for end in ("min", "max", "mid")]
    found = dict.fromkeys(spaces.canonical(a) for a in ends)
    rng, misses = random.Random(seed), 0
    while len(found) < count and misses < 1000:  # a tiny space has no more
        before = len(found)
        found[spaces.canonical(spaces.sample(space, rng, resolutions))] = None
        misses = misses + 1 if len(found) == before else 0
    return list(found)[:count]


def _read(path: Path, space: str) -> dict[Arch, float]:
    """What an interrupted `collect` wrote; a line that it did not finish is removed."""
    make_folder(path.parent)
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomic(path, whole)
    found = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            arch, value = Arch.parse(entry["arch"], f"{path}:{number}"), float(entry["accuracy"])
        except (ValueError, KeyError, TypeError):
            raise EdgeKDError(
                f"{path}:{number} is not an evaluated sub-net: remove the line"
            ) from None
        if arch.space != space:
            raise EdgeKDError(f"{path} has sub-nets of {arch.space}, not {space}: move it away")
        found[spaces.canonical(arch)] = value
    return found


def ranking(predicted: np.ndarray, measured: np.ndarray) -> Ranking:
    """Agreement of (N,) predictions with (N,) measurements; ties count half (tau-b)."""
    # Smaller ones less larger ones: mean ranks, moved.
    ranks = [np.sign(np.subtract.outer(x, x)).sum(1) for x in (predicted, measured)]
    same = [float(np.ptp(r)) == 0 for r in ranks]
    return Ranking(
        kendall=classification.kendall(predicted, measured),
        spearman=0.0 if any(same) else float(np.corrcoef(*ranks)[0, 1]),
        rmse=float(np.sqrt(np.mean((predicted - measured) ** 2))),
        samples=len(measured),
        folds=FOLDS,
    )


def imagenet(path: Path, archs: Sequence[Arch]) -> np.ndarray:
    """(N,) ImageNet accuracies in [0, 1] of sub-nets of ofa-mbv3-w1.2 by OFA's own predictor.

    path: its `acc_predictor.pth`. It knows 112 to 224 pixels in steps of 16; the nearest is taken.
    """
    genome = Genome(PRIOR_SPACE, tuple(dict.fromkeys(a.resolution for a in archs)))
    return _imagenet(_released(path), genome, genome.split(genome.encode(archs)))


# ---- features


def _inputs(genome: Genome, genes: Genes, weights: dict[str, np.ndarray]) -> np.ndarray:
    """(N, features) float32: one-hot; last, if there is a prior, its answer standardised."""
    x = genome.one_hot(genes)
    if "prior.scale" not in weights:
        return x
    mean, deviation = weights["prior.scale"]
    told = (_imagenet(weights, genome, genes) - mean) / deviation
    return np.hstack([x, told[:, None].astype(np.float32)])


def _pools(genome: Genome, prior: bool) -> np.ndarray:
    """(features, pools): what is the same effect at several places, or of every resolution.

    Ridge on features and pools together is ridge on the features with effects that correlate.
    """
    places, stages = genome.space.places, len(genome.space.stages)
    stage = np.eye(stages)[genome.stage_of_place] / 2  # (places, stages)
    together = np.hstack([stage, np.full((places, 1), 1 / 4)])
    blocks = [np.kron(together, np.eye(len(o))) for o in (genome.space.kernels,
                                                          genome.space.expands)]  # fmt: skip
    pixels = np.array(genome.resolutions, float)
    blocks.append(((pixels - pixels.mean()) / max(np.ptp(pixels) / 2, 1))[:, None])
    if prior:
        blocks.append(np.array([[ALIKE]]))  # hardly held back: the data say what it is worth
    at = np.cumsum([[0, 0], *(b.shape for b in blocks)], axis=0)
    pools = np.zeros(tuple(at[-1]))
    for (row, column), block in zip(at, blocks, strict=False):
        pools[row : row + block.shape[0], column : column + block.shape[1]] = block
    return pools * ALIKE


# ---- the two parts


def _ridge(x: np.ndarray, y: np.ndarray, pools: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(slope (features,), bias, strength), the strength with the least leave-one-out error."""
    mean, middle = x.mean(0, dtype=float), y.mean()
    a, r = np.hstack([x - mean, (x - mean) @ pools]), y - middle
    values, vectors = np.linalg.eigh(a @ a.T)
    values = np.maximum(values, 0)
    seen = vectors.T @ r
    errors = []
    for strength in STRENGTHS:
        kept = values / (values + strength)
        leverage = (vectors**2 @ kept) + 1 / len(y)
        left = r - vectors @ (kept * seen)
        errors.append(np.mean((left / np.maximum(1 - leverage, 1e-6)) ** 2))
    strength = float(STRENGTHS[int(np.argmin(errors))])
    effect = a.T @ (vectors @ (seen / (values + strength)))
    slope = effect[: x.shape[1]] + pools @ effect[x.shape[1] :]
    return slope, float(middle - mean @ slope), strength


def _train(x: np.ndarray, y: np.ndarray, seed: int) -> list[np.ndarray]:
    """Perceptrons fitted to y (N,): weights (M, in, out) and biases (M, 1, out), in turn."""
    try:
        import torch
    except ModuleNotFoundError:
        raise EdgeKDError("fitting needs torch: pip install 'edgekd[train]'") from None
    drawn = torch.Generator().manual_seed(seed)
    scale = float(y.std()) or 1.0
    inputs = torch.from_numpy(x).expand(MEMBERS, *x.shape)
    wanted = torch.from_numpy(y / scale).float()
    sizes = [x.shape[1], WIDTH, WIDTH, WIDTH, 1]
    layers = []
    for cin, cout in pairwise(sizes):
        deviation = math.sqrt(2 / cin) if cout > 1 else 0.1 / math.sqrt(cin)
        layers += [torch.randn(MEMBERS, cin, cout, generator=drawn) * deviation,
                   torch.zeros(MEMBERS, 1, cout)]  # fmt: skip
    for tensor in layers:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(layers, lr=1e-3, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        h = torch.baddbmm(layers[1], inputs, layers[0])
        for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
            h = torch.baddbmm(bias, h.relu(), weight)
        loss = (h[..., 0] - wanted).square().mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = [tensor.detach().numpy() for tensor in layers]
    return [*found[:-2], found[-2] * scale, found[-1] * scale]


def _perceptrons(x: np.ndarray, layers: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) mean answer of the members to x (N, features)."""
    h = x @ layers[0] + layers[1]
    for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
        h = np.maximum(h, 0) @ weight + bias
    return h[..., 0].mean(0)


def _share(predicted: np.ndarray, left: np.ndarray) -> float:
    """How much of a held-out prediction (N,) of what is left (N,) is right, in least squares."""
    share = float(predicted @ left / max(predicted @ predicted, 1e-30))
    return round(min(share, 1.0), 2) if share > 0.05 else 0.0


# ---- OFA's predictor for ImageNet


def _released(path: Path) -> dict[str, np.ndarray]:
    """Layers of `acc_predictor.pth` as {"prior.0.weight": (400, 128), ...}."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {f"prior.{k}": v.numpy() for k, v in state.items()}
        shapes = [found[f"prior.{i}.weight"].shape for i in (0, 2, 4, 6)]
    except FileNotFoundError:
        raise EdgeKDError(f"{path} is not there: give OFA's acc_predictor.pth") from None
    except Exception as e:
        raise EdgeKDError(f"{path} is not OFA's acc_predictor.pth ({type(e).__name__})") from None
    if shapes != [(400, 128), (400, 400), (400, 400), (1, 400)]:
        raise EdgeKDError(f"{path} has layers {shapes}: not those of OFA's acc_predictor.pth")
    return found


def _imagenet(weights: dict[str, np.ndarray], genome: Genome, genes: Genes) -> np.ndarray:
    """(N,) ImageNet accuracies in [0, 1] by the weights of `_released`."""
    nearest = np.clip(np.round((np.array(genome.resolutions) - 112) / 16), 0, 7).astype(int)
    blocks = genome.one_hot(genes)[:, : -len(genome.resolutions)]
    x = np.hstack([blocks, np.eye(8, dtype=np.float32)[nearest[genes.resolution]]])
    for i in (0, 2, 4, 6):
        x = x @ weights[f"prior.{i}.weight"].T + weights[f"prior.{i}.bias"]
        x = np.maximum(x, 0) if i < 6 else x
    return x[:, 0]


def check_prior(path: Path, space: str) -> None:
    """EdgeKDError if OFA's `acc_predictor.pth` is not there, or says nothing of this space."""
    if space != PRIOR_SPACE:
        raise EdgeKDError(
            f"OFA's acc_predictor.pth is of {PRIOR_SPACE}, the sub-nets are of {space}: "
            "leave the prior out"
        )
    if not path.is_file():
        raise EdgeKDError(f"{path} is not there: give OFA's acc_predictor.pth")


def _prior(path: Path, genome: Genome, genes: Genes) -> dict[str, np.ndarray]:
    """The released weights, and mean and deviation of what they say of these sub-nets."""
    check_prior(path, genome.name)
    weights = _released(path)
    told = _imagenet(weights, genome, genes)
    return weights | {"prior.scale": np.array([told.mean(), told.std() or 1.0])}


def _checked(archs: Sequence[Arch], accuracies: Sequence[float]) -> np.ndarray:
    """(N,) float64 accuracies that can be learnt from; EdgeKDError where they cannot.

    They may all be equal, as after a training that came to nothing: then all are predicted so.
    """
    y = np.asarray(accuracies, float)
    if len(archs) != len(y) or len(y) < FEWEST:
        raise EdgeKDError(
            f"{len(archs)} sub-nets and {len(y)} accuracies: the predictor needs as many of each, "
            f"and at least {FEWEST}"
        )
    if not np.isfinite(y).all():
        raise EdgeKDError(f"{np.sum(~np.isfinite(y))} of {len(y)} accuracies are no finite numbers")
    return y
