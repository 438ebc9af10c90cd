"""Sub-nets as rows of indices: thousands are coded, told apart and weighed at once.

A row of genes has a kernel and an expansion for every place of a space, a depth for every stage and
a resolution, each as an index into its options. Places beyond a stage's depth have genes, too; they
say nothing, and rows that differ only there are one network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from edgekd.ofa import spaces
from edgekd.ofa.spaces import Piece, Space, make_divisible
from edgekd.records import Arch, EdgeKDError

# (N, places), (N, places), (N, stages) and (N,) indices, as in Genes -> (N,) figures
Figure = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Genes(NamedTuple):
    """N sub-nets by indices into the options of their space."""

    kernel: np.ndarray  # (N, places) into Space.kernels
    expand: np.ndarray  # (N, places) into Space.expands
    depth: np.ndarray  # (N, stages) into each Stage's depths
    resolution: np.ndarray  # (N,) into the resolutions


@dataclass(frozen=True)
class Genome:
    """What the genes of a space mean. Rows are (N, n) int64: kernel, expand, depth, resolution."""

    name: str
    resolutions: tuple[int, ...]  # pixels a side

    def __post_init__(self) -> None:
        if not self.resolutions or len(set(self.resolutions)) != len(self.resolutions):
            raise EdgeKDError(
                f"resolutions {list(self.resolutions)}: give at least one, and each only once"
            )

    @cached_property
    def space(self) -> Space:
        """EdgeKDError if there is none of that name."""
        return spaces.space_of(self.name)

    @cached_property
    def options(self) -> np.ndarray:
        """(n,) number of options of each gene."""
        space = self.space
        depths = [len(s.depths) for s in space.stages]
        kernels = [len(s.kernels) for s in space.stage_of_place]
        expands = [len(space.expands)] * space.places
        return np.array([*kernels, *expands, *depths, len(self.resolutions)])

    @cached_property
    def stage_of_place(self) -> np.ndarray:
        """(places,) index of the stage that each place is in."""
        return np.repeat(np.arange(len(self.space.stages)), [s.places for s in self.space.stages])

    @cached_property
    def _order_in_stage(self) -> np.ndarray:
        """(places,) how many places of the same stage come before."""
        return np.concatenate([np.arange(s.places) for s in self.space.stages])

    @cached_property
    def _depths(self) -> np.ndarray:
        """(stages, options) blocks; the last option repeated where a stage has fewer."""
        most = max(len(s.depths) for s in self.space.stages)
        return np.array([np.resize(s.depths, most) for s in self.space.stages])

    def split(self, rows: np.ndarray) -> Genes:
        """Rows (N, n) by what they stand for."""
        places, stages = self.space.places, len(self.space.stages)
        ends = np.cumsum([places, places, stages])
        kernel, expand, depth, resolution = np.split(rows, ends, axis=1)
        return Genes(kernel, expand, depth, resolution[:, 0])

    def used(self, depth: np.ndarray) -> np.ndarray:
        """(N, places) bool, is there a block? of depth indices (N, stages)."""
        blocks = self._depths[np.arange(depth.shape[1]), depth]
        return self._order_in_stage < blocks[:, self.stage_of_place]

    def canonical(self, rows: np.ndarray) -> np.ndarray:
        """Rows with 0 where there is no block: equal networks, equal rows."""
        genes = self.split(rows)
        used = self.used(genes.depth)
        tail = rows[:, 2 * used.shape[1] :]
        return np.hstack([genes.kernel * used, genes.expand * used, tail])

    def one_hot(self, genes: Genes) -> np.ndarray:
        """(N, places x kernels + places x expands + resolutions) float32; no block: zeros."""
        used, parts = self.used(genes.depth), []
        for index, choices in (
            (genes.kernel, self.space.kernels), (genes.expand, self.space.expands),
        ):  # fmt: skip
            rows = np.eye(len(choices) + 1, len(choices), dtype=np.float32)  # the last: no block
            parts.append(rows[np.where(used, index, len(choices))].reshape(len(used), -1))
        parts.append(np.eye(len(self.resolutions), dtype=np.float32)[genes.resolution])
        return np.hstack(parts)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, n) rows, every gene drawn on its own."""
        return rng.integers(0, self.options, size=(count, len(self.options)))

    def ends(self) -> np.ndarray:
        """(2 x resolutions, n) rows: smallest and largest sub-net at each resolution."""
        low, high = np.zeros_like(self.options), self.options - 1
        rows = np.repeat([low, high], len(self.resolutions), axis=0)
        rows[:, -1] = np.tile(np.arange(len(self.resolutions)), 2)
        return rows

    def encode(self, archs: Sequence[Arch]) -> np.ndarray:
        """(N, n) canonical rows; EdgeKDError where an Arch is of another space or resolution."""
        rows = np.zeros((len(archs), len(self.options)), np.int64)
        for row, arch in zip(rows, archs, strict=True):
            if arch.space != self.name or arch.resolution not in self.resolutions:
                raise EdgeKDError(
                    f"a sub-net of {arch.space} at {arch.resolution} px is not one of {self.name} "
                    f"at {', '.join(map(str, self.resolutions))} px: give the space and every "
                    "resolution that it is to be compared at"
                )
            space, places = spaces.check(arch), self.space.places
            for i in spaces.used(arch):
                row[i] = space.kernels.index(arch.kernel[i])
                row[places + i] = space.expands.index(arch.expand[i])
            depths = [s.depths.index(d) for s, d in zip(space.stages, arch.depth, strict=True)]
            row[2 * places :] = [*depths, self.resolutions.index(arch.resolution)]
        return rows

    def decode(self, rows: np.ndarray) -> list[Arch]:
        """The sub-nets of rows (N, n), 0 as kernel and expansion where there is no block."""
        genes = self.split(rows)
        used = self.used(genes.depth)
        kernel = np.array(self.space.kernels)[genes.kernel] * used
        expand = np.array(self.space.expands)[genes.expand] * used
        depth = self._depths[np.arange(genes.depth.shape[1]), genes.depth]
        fields = zip(kernel, expand, depth, genes.resolution, strict=True)
        return [
            Arch(space=self.name, kernel=tuple(k.tolist()), expand=tuple(e.tolist()),
                 depth=tuple(d.tolist()), resolution=self.resolutions[r])
            for k, e, d, r in fields
        ]  # fmt: skip

    def params(self, rows: np.ndarray, classes: int) -> np.ndarray:
        """(N,) int64 parameters of the sub-nets of rows (N, n) with `classes` outputs."""
        fixed, table = self._params_table
        genes = self.split(rows)
        blocks = table[np.arange(self.space.places), genes.kernel, genes.expand]
        head = (self.space.mix + 1) * classes
        return fixed + head + (blocks * self.used(genes.depth)).sum(1)

    @cached_property
    def _params_table(self) -> tuple[int, np.ndarray]:
        """Parameters outside the elastic blocks and the classifier; (places, kernels, expands)."""
        space = self.space
        table = np.zeros((space.places, len(space.kernels), len(space.expands)), np.int64)
        fixed = 0
        for k, kernel in enumerate(space.kernels):
            for e, expand in enumerate(space.expands):
                arch = spaces.deepest(self.name, kernel, expand)
                parts = list(spaces.pieces(arch, 0))
                blocks = [i for i, p in enumerate(parts) if p.kind == "block"][1:]
                table[:, k, e] = [_params(parts[i]) for i in blocks]
                fixed = sum(_params(p) for i, p in enumerate(parts) if i not in blocks)
        return fixed, table


def _params(piece: Piece) -> int:
    """Weights, biases and batch norms of a piece; of the classifier none: that is the caller's."""
    if piece.kind == "classifier":
        return 0
    if piece.kind != "block":
        bare = piece.kind == "mix" and piece.size == 1  # after pooling it has no batch norm
        return piece.cin * piece.cout * piece.kernel**2 + (0 if bare else 2 * piece.cout)
    mid = piece.mid
    widths = [piece.cin, mid, piece.cout] if mid != piece.cin else [mid, piece.cout]
    total = sum(a * b + 2 * b for a, b in pairwise(widths))
    total += mid * piece.kernel**2 + 2 * mid
    if piece.se:
        inner = make_divisible(mid // 4)
        total += 2 * mid * inner + mid + inner
    return total
