"""How near is a file to what the machine can do? The roofline (Williams et al. 2009), measured.

The peak is what a large matrix product reaches in the same runtime with the same threads, and the
bandwidth that of a copy that no cache holds; neither is read from a data sheet. A network then
takes at least as long as its arithmetic at the peak, or as its bytes at the bandwidth. A runtime
that does not tell has no peak, and its files no roofline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np

from edgekd import runtimes
from edgekd.records import Artifact, EdgeKDError, Layer, Peak, Profile, Roofline
from edgekd.runtimes import NodeTime, Products, Profiled
from edgekd.runtimes.machine import cores

# Of the matrices: 0.27e9 operations, 1 MB each in float32. Twice the side reaches no more, and its
# calls are so long that on a busy machine none of them is left alone.
SIDE = 512
TURNS = 4  # of each product, one after the other: a slow moment of the machine is not one's alone
COPIED = 64 << 20  # bytes of the array that is copied, at least
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def peak(runtime: str, profile: Profile, *, seconds: float = 1.0) -> Peak | None:
    """What `runtime` reaches on this CPU with the profile's threads, of the best call.

    seconds: of each form of a product, and of copying. None where it cannot be told: the runtime
    has no `products`, or the profile's device is not the CPU.
    """
    products = cast("Products | None", getattr(runtimes.get(runtime), "products", None))
    if products is None or profile.device.upper() != "CPU":
        return None
    calls = list(products(profile, SIDE))
    gflops: dict[str, float] = {}
    for precision, call in calls * TURNS:
        reached = 2 * SIDE**3 / _best_s(call, seconds / TURNS) / 1e9
        gflops[precision] = max(reached, gflops.get(precision, 0.0))
    threads = profile.threads or cores()
    return Peak(
        gflops=gflops,
        bandwidth_gbs=bandwidth(threads, seconds=seconds),
        threads=threads,
        how=f"{runtime}, matrix product {SIDE} x {SIDE} x {SIDE}",
    )


def bandwidth(threads: int, *, seconds: float = 1.0) -> float:
    """1e9 bytes/s that `threads` threads read and write together, copying; the best of several."""
    size = max(COPIED, 4 * _largest_cache()) // 8
    source, target = np.ones(size), np.zeros(size)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter while it copies

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))

        return 2 * source.nbytes / _best_s(copy, seconds) / 1e9


def _best_s(call: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit, one at least; the first is not counted."""
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _largest_cache() -> int:
    """Bytes of the last-level cache; 0 if the system does not tell."""
    sizes = [p.read_text().strip() for p in CACHES.glob("index*/size")]  # "32768K"
    return max((int(s[:-1]) << 10 for s in sizes if s[:-1].isdigit() and s[-1] == "K"), default=0)


def moved_bytes(artifact: Artifact) -> int:
    """Bytes that one image moves at least: weights as they are stored, image, logits, features.

    Maps between the layers are left out: a cache may hold them. So are features whose grid the
    artifact does not know.
    """
    weights = artifact.size_bytes - sum(
        (artifact.folder / f).stat().st_size for f in artifact.files if f.endswith(".xml")
    )
    height, width = artifact.spec.size
    grid = artifact.layer.rpartition(" ")[2].split("x")  # "stage3 40x16x16"
    features = int(np.prod([int(n) for n in grid])) if len(grid) == 3 else 0
    return weights + 4 * (3 * height * width + len(artifact.spec.classes) + features)


def roofline(
    *, macs: int, moved_bytes: int, p50_ms: float, precision: str, peak: Peak
) -> Roofline | None:
    """How near `p50_ms` is to the least that the peak allows; None if it has no such precision."""
    if precision not in peak.gflops:
        return None
    compute_ms = 2 * macs / (peak.gflops[precision] * 1e6)
    memory_ms = moved_bytes / (peak.bandwidth_gbs * 1e6)
    ideal = max(compute_ms, memory_ms)
    return Roofline(
        peak=peak,
        precision=precision,
        intensity=2 * macs / moved_bytes,
        ideal_ms=ideal,
        bound="compute" if compute_ms >= memory_ms else "memory",
        fraction=ideal / p50_ms,
    )


def layers(
    artifact: Artifact,
    profile: Profile,
    image: np.ndarray,
    *,
    calls: int = 20,
    most: int = 10,
    peak: Peak | None = None,
) -> tuple[list[Layer], str]:
    """(the `most` slowest layers, the precision that most time was spent in); ([], "") if not told.

    image: (1, 3, H, W) float32. With a peak, each layer of known MACs gets its fraction: of its
    input, weights and output from and to memory. Above 1, they came from a cache.
    """
    runtime = runtimes.runtime_of(artifact, profile)
    profiled = cast("Profiled | None", getattr(runtime, "profiled", None))
    if profiled is None:
        return [], ""
    if image.shape != (1, 3, *artifact.spec.size) or image.dtype != np.float32:
        expected = (1, 3, *artifact.spec.size)
        raise EdgeKDError(f"a profile takes {expected} float32, got {image.shape} {image.dtype}")
    nodes = profiled(artifact.path, profile, artifact.precision, image, calls)
    total = sum(n.ms for n in nodes)
    slowest = sorted(nodes, key=lambda n: -n.ms)[:most]
    return [_layer(n, total, peak) for n in slowest], executed(nodes)


def executed(nodes: list[NodeTime]) -> str:
    """The precision that most time was spent in; empty if no node tells its own."""
    spent: dict[str, float] = {}
    for n in nodes:
        spent[n.precision] = spent.get(n.precision, 0.0) + n.ms
    spent.pop("", None)
    return max(spent, key=lambda p: spent[p], default="")


def _layer(node: NodeTime, total: float, peak: Peak | None) -> Layer:
    """The record of a node of a graph that took `total` ms."""
    found = None
    if peak and node.macs and node.moved_bytes and node.ms:
        found = roofline(macs=node.macs, moved_bytes=node.moved_bytes, p50_ms=node.ms,
                         precision=node.precision, peak=peak)  # fmt: skip
    return Layer(
        name=node.name,
        kind=node.kind,
        precision=node.precision,
        ms=node.ms,
        share=node.ms / total if total else 0.0,
        macs=node.macs,
        fraction=found.fraction if found else None,
    )
