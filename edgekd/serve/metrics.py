"""What Prometheus is told of a server: counts and times, nothing of an image or of who sent it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgekd.serve.model import Answer, Model

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Meters:
    """The meters of one server, in a registry of their own."""

    def __init__(self, model: Model, held: Callable[[], float]) -> None:
        """Held: images accepted and not answered."""
        self.registry = CollectorRegistry()

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"edgekd_{name}", told, labels, registry=self.registry)

        def histogram(name: str, told: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"edgekd_{name}", told, labels, registry=self.registry,
                             buckets=buckets)  # fmt: skip

        self.requests = counter("requests", "Requests answered.", "path", "status")
        self.rejected = counter("rejected", "Requests refused, and why.", "reason")
        self.answers = counter("answers", "Images answered, by class; abstained.", "answer")
        self.warned = counter("warned", "Images of which something was unusual.")
        self.stored = counter("dicom_stores", "C-STOREs answered.", "status")
        self.delivered = counter("dicom_deliveries", "Images whose results were sent on, or lost.",
                                 "outcome")  # fmt: skip
        self.request_s = histogram(
            "request_seconds", "Head of a request to the end of its answer.", SECONDS, "path"
        )
        self.model_s = histogram(
            "model_seconds", "A batch answered, or an image explained.", SECONDS, "kind"
        )
        self.batch = histogram("batch_images", "Images answered at once.", (1, 2, 3, 4, 6, 8))
        Gauge("edgekd_queue_images", "Images accepted and not answered.",
              registry=self.registry).set_function(held)  # fmt: skip
        made = model.manifest
        facts = {"name": made.name, "sha256": model.artifact.sha256, "precision": made.precision,
                 "runtime": made.profile.runtime, "verdict": made.verdict}  # fmt: skip
        Gauge("edgekd_model_info", "The model that answers.", list(facts),
              registry=self.registry).labels(**facts).set(1)  # fmt: skip

    def waiting(self, held: Callable[[], float]) -> None:
        """Held: images whose results wait to be sent on."""
        Gauge("edgekd_dicom_waiting_images", "Images whose results wait to be sent on.",
              registry=self.registry).set_function(held)  # fmt: skip

    def timed(self, kind: str, images: int, seconds: float) -> None:
        """A batch was answered ("predict"), or an image explained."""
        self.model_s.labels(kind).observe(seconds)
        if kind == "predict":
            self.batch.observe(images)

    def said(self, answer: Answer) -> None:
        """An image was answered."""
        self.answers.labels(answer.label or "abstained").inc()
        if answer.warnings:
            self.warned.inc()

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
