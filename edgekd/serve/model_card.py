"""What is known of the model that answers: for a page, or for whoever has to say what runs here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.metrics.latency import claimed
from edgekd.records import Record

if TYPE_CHECKING:
    from edgekd.serve.model import Model


class Latency(Record):
    """How long one answer took the model where it was measured."""

    p50_ms: float
    p95_ms: float | None  # null: too few calls to say
    machine: str
    on_device: bool  # that machine is the profile's device


class Facts(Record):
    """A model, its evidence and the server's limits."""

    name: str
    sha256: str  # of the file that answers
    bundle: str  # sha256 of its bundle.json, which names all that an answer depends on
    precision: str
    classes: tuple[str, ...]
    size: tuple[int, int]  # height, width in pixels that it sees
    profile: str
    runtime: str
    device: str
    intended_use: str
    verdict: str  # "pass", "fail", "inconclusive", "invalid"; empty: explanations not judged
    reasons: tuple[str, ...]  # of that verdict
    despite: str  # why it was bundled although that is no pass; empty: it is
    abstain_below: float
    knows_usual: bool  # it can say that an image is unlike what it learnt from
    latency: Latency | None  # null: not measured
    signer: str  # fingerprint of the key that signed it; empty: nobody did
    trusted: bool  # that key is the one that was asked for
    edgekd: str  # version that made it
    limits: dict[str, float]


def facts(model: Model, limits: dict[str, float]) -> Facts:
    """What a loaded bundle says of itself."""
    made, timing = model.manifest, model.timing
    latency = None
    if timing is not None:
        told = claimed(timing.samples_ms)
        latency = Latency(p50_ms=told["p50"] or 0.0, p95_ms=told["p95"],
                          machine=timing.machine.name, on_device=timing.on_device)  # fmt: skip
    return Facts(
        name=made.name, sha256=model.artifact.sha256, bundle=model.bundle,
        precision=made.precision, classes=made.classes, size=model.artifact.spec.size,
        profile=made.profile.name, runtime=made.profile.runtime,
        device=made.profile.device, intended_use=made.intended_use, verdict=made.verdict,
        reasons=model.fidelity.reasons if model.fidelity else (), despite=made.despite,
        abstain_below=model.abstain_below, knows_usual=model.usual is not None, latency=latency,
        signer=model.signer, trusted=model.trusted, edgekd=made.edgekd, limits=limits,
    )  # fmt: skip
