"""How long will a sub-net take on a device? From a table of its pieces, measured on that device.

Every distinct piece of a space (a block of one shape, kernel and expansion; stem; head) is timed
alone, as Once-for-All does (Cai et al. 2020). But a piece alone pays for getting its data in and
out, and lacks its neighbours, so the plain sum is wrong. Whole sub-nets are timed beside the pieces
(`calibrate`), and what the sum gets wrong is learnt from them, a little for each stage's kernels,
expansions and depths.

A device that is not here gets an estimate from its stated peak and bandwidth (the roofline of
Williams et al. 2009), which says so wherever it goes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from edgekd.metrics import classification
from edgekd.ofa import spaces
from edgekd.ofa.encoding import Figure, Genome
from edgekd.ofa.spaces import Piece
from edgekd.records import (
    Arch,
    EdgeKDError,
    Machine,
    Profile,
    Record,
    Stored,
    read_text,
    user_cache,
    versions,
)
from edgekd.runtimes import machine

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
STRENGTHS = np.geomspace(1e-4, 1e3, 30)  # of the ridge, to choose from


class Errors(Record):
    """Of predictions for whole sub-nets that the table has not seen."""

    mape: float  # percent
    within10: float  # share of predictions within 10 % (nn-Meter's statistic)
    kendall: float  # rank correlation, tau-b
    nets: int


class Table(Stored):
    """What is known of the speed of a space's sub-nets on one device."""

    FILE: ClassVar[str] = "latency.json"
    space: str
    resolutions: tuple[int, ...]
    classes: int
    runtime: str
    device: str
    precision: str
    threads: int
    estimated: bool  # from stated figures of a device that is not here
    pieces: dict[str, float]  # key of a Piece -> ms, alone
    scale: float = 1.0  # of the sum of pieces
    correction: dict[str, float] = Field(
        default_factory=dict
    )  # to add a block or network, ms at most pixels
    constant_ms: float = 0.0
    p95_ratio: float = 1.0  # p95 / p50 of whole sub-nets
    errors: Errors | None = None  # of nets left out in turn
    plain_errors: Errors | None = None  # of the sum of pieces alone, on the same nets
    nets: dict[str, float] = Field(default_factory=dict)  # whole ones that were measured, p50 ms
    machine: Machine | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    created: str = ""

    def predict(self, archs: Sequence[Arch]) -> np.ndarray:
        """(N,) float64 ms, median at batch 1, host to host."""
        lookup = tabulate(self)
        genome = lookup.genome
        return lookup.predict(*genome.split(genome.encode(archs)))


@dataclass(frozen=True)
class Lookup:
    """A Table as arrays: what every place adds for each choice. Tens of thousands in a moment."""

    genome: Genome
    ms: np.ndarray  # (resolutions, places, kernels, expands) of a block, corrected
    fixed_ms: np.ndarray  # (resolutions,) of stem, first block and head, and the constant

    def predict(
        self, kernel: np.ndarray, expand: np.ndarray, depth: np.ndarray, resolution: np.ndarray
    ) -> np.ndarray:
        """(N,) ms of index arrays (N, places), (N, places), (N, stages), (N,)."""
        places = np.arange(self.ms.shape[1])
        each = self.ms[resolution[:, None], places, kernel, expand]
        return (each * self.genome.used(depth)).sum(1) + self.fixed_ms[resolution]

    def over(self, resolutions: Sequence[int]) -> Figure:
        """`predict` for a search at some of the resolutions: indices into `resolutions`."""
        known = self.genome.resolutions
        missing = [r for r in resolutions if r not in known]
        if missing:
            raise EdgeKDError(
                f"the latency table knows {self.genome.name} at {known} px, not at {missing}: "
                "calibrate the profile with these resolutions"
            )
        place = np.array([known.index(r) for r in resolutions])
        return lambda k, e, d, r: self.predict(k, e, d, place[r])


def tabulate(table: Table) -> Lookup:
    """The table's arrays."""
    genome = Genome(table.space, table.resolutions)
    space = genome.space
    ms = np.zeros((len(table.resolutions), space.places, len(space.kernels), len(space.expands)))
    fixed = np.full(len(table.resolutions), table.constant_ms)
    for r, side in enumerate(table.resolutions):
        area = (side / max(table.resolutions)) ** 2
        fixed[r] += table.correction.get(f"{side}px", 0.0)
        for i, k in enumerate(space.kernels):
            for j, e in enumerate(space.expands):
                for place, found in enumerate(_blocks(table.space, side, k, e)):
                    learnt = sum(table.correction.get(n, 0.0) for n in _terms(space, place, k, e))
                    ms[r, place, i, j] = table.scale * table.pieces[key(found)] + area * learnt
        for piece in _others(table.space, side, table.classes):
            fixed[r] += table.scale * table.pieces[key(piece)]
    return Lookup(genome, ms, fixed)


def _blocks(space: str, side: int, kernel: int, expand: int) -> list[Piece]:
    """The block of every place in the `deepest` network of this kernel and expansion."""
    arch = spaces.deepest(space, kernel, expand, side)
    return [p for p in spaces.pieces(arch, 1) if p.kind == "block"][1:]


def _others(space: str, side: int, classes: int) -> list[Piece]:
    """Stem, first block and head."""
    found = list(spaces.pieces(spaces.uniform(space, "min", side), classes))
    blocks = [p for p in found if p.kind == "block"][1:]
    return [p for p in found if p not in blocks]


def _terms(space: spaces.Space, place: int, kernel: int, expand: int) -> tuple[str, ...]:
    """Names of what is learnt about a block: of its stage, as the first or a later one."""
    at = 0
    for number, stage in enumerate(space.stages, 1):
        if place < at + stage.places:
            kind = f"stage{number}{'+' if place > at else ''}"
            return kind, f"stage{number} k{kernel}", f"stage{number} e{expand}"
        at += stage.places
    raise IndexError(place)


def key(piece: Piece) -> str:
    """A piece's name in a table: all that its speed depends on."""
    p = piece
    traits = "".join(t for t, on in ((" se", p.se), (" skip", p.skip)) if on)
    act = f" {p.act}" if p.act else ""
    return f"{p.kind} {p.size}px {p.cin}-{p.mid}-{p.cout} k{p.kernel} s{p.stride}{act}{traits}"


def distinct(space: str, resolutions: Sequence[int], classes: int) -> dict[str, Piece]:
    """Every piece that a sub-net of the space can have, by its key."""
    chosen = spaces.space_of(space)
    found: dict[str, Piece] = {}
    for side in resolutions:
        for k in chosen.kernels:
            for e in chosen.expands:
                found |= {key(p): p for p in _blocks(space, side, k, e)}
        found |= {key(p): p for p in _others(space, side, classes)}
    return found


# ---- what the sum gets wrong


def fitted(table: Table, archs: Sequence[Arch], ms: np.ndarray) -> Table:
    """The table with its correction, learnt from whole sub-nets that took (N,) `ms`."""
    plain = table.predict(archs)
    names, x = _features(table, archs)
    base = np.stack([plain, np.ones(len(ms))], 1)
    weights = 1 / ms  # relative errors count
    scale, constant, effect = _fit(base, x, ms, weights)
    left_out = np.empty(len(ms))
    for fold in range(10):
        out = np.arange(len(ms)) % 10 == fold
        if out.any() and not out.all():
            s, c, w = _fit(base[~out], x[~out], ms[~out], weights[~out])
            left_out[out] = base[out] @ [s, c] + x[out] @ w
    update = {
        "scale": scale, "constant_ms": constant,
        "correction": {n: float(w) for n, w in zip(names, effect, strict=True)},
        "errors": errors(left_out, ms), "plain_errors": errors(plain, ms),
    }  # fmt: skip
    return table.model_copy(update=update)


def _features(table: Table, archs: Sequence[Arch]) -> tuple[list[str], np.ndarray]:
    """(names, (N, names)): how much of each correction a sub-net gets."""
    space, largest = spaces.space_of(table.space), max(table.resolutions)
    counts: list[dict[str, float]] = []
    for arch in archs:
        count: dict[str, float] = {f"{arch.resolution}px": 1.0}
        area = (arch.resolution / largest) ** 2
        for place in spaces.used(arch):
            for name in _terms(space, place, arch.kernel[place], arch.expand[place]):
                count[name] = count.get(name, 0.0) + area
        counts.append(count)
    names = sorted({n for c in counts for n in c})
    return names, np.array([[c.get(n, 0.0) for n in names] for c in counts])


def _fit(
    base: np.ndarray, x: np.ndarray, ms: np.ndarray, weights: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Scale and constant of the sum freely, the rest by ridge, its strength by leaving one out."""
    b, y = base * weights[:, None], ms * weights
    free = np.linalg.lstsq(b, y, rcond=None)[0]
    unit = np.median(ms) / len(ms) ** 0.5  # corrections are small against a network
    a = x * weights[:, None] * unit
    # What base explains is taken out of both sides, so that the ridge does not touch it.
    project = np.eye(len(y)) - b @ np.linalg.pinv(b)
    ra, ry = project @ a, project @ y
    u, d, vt = np.linalg.svd(ra, full_matrices=False)
    best, effect = math.inf, np.zeros(x.shape[1])
    for strength in STRENGTHS:
        shrink = d**2 / (d**2 + strength)
        fit = u @ (shrink * (u.T @ ry))
        leverage = (u**2) @ shrink + np.diag(b @ np.linalg.pinv(b))
        loo = float(np.mean(((ry - fit) / np.maximum(1 - leverage, 1e-3)) ** 2))
        if loo < best:
            best, effect = loo, vt.T @ (d / (d**2 + strength) * (u.T @ ry)) * unit
    free = np.linalg.lstsq(b, y - (x * weights[:, None]) @ effect, rcond=None)[0]
    return float(free[0]), float(free[1]), effect


def errors(predicted: np.ndarray, measured: np.ndarray) -> Errors:
    """How far (N,) predictions are from (N,) measurements."""
    off = np.abs(predicted / measured - 1)
    return Errors(mape=100 * float(off.mean()), within10=float((off <= 0.1).mean()),
                  kendall=classification.kendall(predicted, measured),
                  nets=len(measured))  # fmt: skip


# ---- a table from stated figures


def estimate(profile: Profile, precision: str, *, classes: int) -> Table:
    """The roofline: a piece takes as long as its arithmetic or its data, whichever is longer.

    2 operations a MAC against `peak_gflops`; weights, input and output once against
    `bandwidth_gbs`. Overheads are unknown, so this is what no device of the kind will beat.
    """
    if not (profile.peak_gflops and profile.bandwidth_gbs):
        raise EdgeKDError(
            f"profile {profile.name}: {profile.runtime} {profile.device} is not here; set "
            "peak_gflops and bandwidth_gbs for an estimate, or bring a table with latency_table"
        )
    pieces = distinct(profile.space, profile.resolutions, classes)
    flops, bandwidth = profile.peak_gflops * 1e6, profile.bandwidth_gbs * 1e6  # a ms
    table = {}
    for name, piece in pieces.items():
        macs, moved = cost(piece)
        table[name] = max(2 * macs / flops, moved * BYTES[precision] / bandwidth)
    return Table(
        space=profile.space, resolutions=tuple(sorted(profile.resolutions)), classes=classes,
        runtime=profile.runtime, device=profile.device, precision=precision,
        threads=profile.threads, estimated=True, pieces=table,
        created=date.today().isoformat(),
    )  # fmt: skip


def cost(piece: Piece) -> tuple[int, int]:
    """(multiply-accumulates, values moved: input, output and weights) of a piece."""
    p = piece
    before, after = p.size**2, ((p.size + p.stride - 1) // p.stride) ** 2
    if p.kind != "block":
        weights = p.cin * p.cout * p.kernel**2
        return weights * after, p.cin * before + p.cout * after + weights
    expand = p.cin * p.mid if p.mid != p.cin else 0
    depthwise, project = p.mid * p.kernel**2, p.mid * p.cout
    gate = 2 * p.mid * spaces.make_divisible(p.mid // 4) if p.se else 0
    macs = expand * before + (depthwise + project) * after + gate
    moved = p.cin * before + 2 * p.mid * (before + after) + p.cout * after
    return macs, moved + expand + depthwise + project + gate


# ---- where tables are kept


def cached(profile: Profile, precision: str) -> Path:
    """The folder for this machine's table of a profile, in the user's cache."""
    here = machine.this()
    fingerprint = {
        "space": profile.space, "resolutions": sorted(profile.resolutions),
        "runtime": profile.runtime, "device": profile.device, "precision": precision,
        "threads": profile.threads, "options": profile.options,
        "machine": here.kind, "versions": versions(profile.runtime),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    return user_cache() / "latency" / f"{profile.space}-{profile.runtime}-{name}"


def find(profile: Profile, precision: str) -> Table | None:
    """The table that travels with the profile, else this machine's own, else None."""
    if not profile.latency_table:
        folder = cached(profile, precision)
        return Table.load(folder) if (folder / Table.FILE).exists() else None
    path = Path(profile.latency_table)
    try:
        table = Table.parse(json.loads(read_text(path)), str(path))
    except (OSError, ValueError) as e:
        raise EdgeKDError(f"cannot read the profile's latency_table {path}: {e}") from None
    wanted = {"space": profile.space, "runtime": profile.runtime, "precision": precision}
    for field, value in wanted.items():
        if getattr(table, field) != value:
            raise EdgeKDError(
                f"{path} is a table for {field} {getattr(table, field)}, profile {profile.name} "
                f"has {value}: calibrate again on the device"
            )
    if missing := set(profile.resolutions) - set(table.resolutions):
        raise EdgeKDError(
            f"{path} has no {', '.join(f'{r} px' for r in sorted(missing))}, which profile "
            f"{profile.name} allows: calibrate again, or remove them from the profile"
        )
    return table
