"""What the page says for machines: report.json, and cases.csv with a line a case and model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from edgekd.metrics.latency import claimed
from edgekd.records import SCHEMA, Artifact, Comparison, Fidelity, Profile, Timing

Models = Sequence[tuple[str, Artifact, Timing | None]]  # name as in the comparisons


def figures(
    title: str,
    models: Models,
    fidelity: Fidelity | None,
    profile: Profile,
    notes: Sequence[str],
    command: str,
) -> str:
    """The page's figures as JSON, the same bytes for the same records; nothing of single images.

    `explanations` is null where they were not checked, `verdict` where nothing was judged.
    """
    last = models[-1][1]
    found = {
        "schema_version": SCHEMA,
        "title": title,
        "command": command,
        "profile": profile.model_dump(mode="json"),
        "data": {
            "fingerprint": last.data_fingerprint,
            "split_rule": last.split_rule,
            "classes": list(last.spec.classes),
            "notes": list(notes),
        },
        "verdict": fidelity.verdict if fidelity else None,
        "reasons": list(fidelity.reasons) if fidelity else [],
        "models": [_model(*m) for m in models],
        "explanations": _explanations(fidelity) if fidelity else None,
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _model(name: str, made: Artifact, timing: Timing | None) -> dict[str, Any]:
    """One file: what it is, how good, how fast."""
    kept = made.model_dump(
        mode="json",
        include={"model", "role", "kind", "precision", "params", "macs", "layer", "metrics",
                 "per_class", "parents", "seed", "versions"},
    )  # fmt: skip
    found = {"name": name, "sha256": made.sha256, "size_bytes": made.size_bytes} | kept
    return found | {"timing": _timing(timing) if timing else None}


def _timing(t: Timing) -> dict[str, Any]:
    kept = t.model_dump(
        mode="json",
        include={"runtime", "device", "threads", "on_device", "throughput_ips",
                 "throughput_batch", "peak_mb", "budget", "over_budget", "machine"},
    )  # fmt: skip
    return kept | {"latency_ms": claimed(t.samples_ms), "samples": len(t.samples_ms)}


def _explanations(fidelity: Fidelity) -> dict[str, Any]:
    """The record of fidelity, less what is of single images: that is in cases.csv."""
    kept = fidelity.model_dump(
        mode="json", exclude={"schema_version", "verdict", "reasons", "comparisons", "survived"}
    )
    steps = [
        c.model_dump(mode="json", exclude={"images"}) | {"images": len(c.images)}
        for c in fidelity.comparisons
    ]
    return kept | {"comparisons": steps}


def card(last: Artifact, intended_use: str = "") -> Iterator[tuple[str, str]]:
    """A model card's fields that the records hold, of the file to be deployed."""
    spec = last.spec
    yield "intended use", intended_use or "not stated"
    yield "not for", "diagnosis, or any decision without a qualified reader"
    yield "model", f"{last.model.partition('_top1')[0]}, {last.precision}, sha256 {last.sha256}"
    yield "size", f"{last.params / 1e6:.2f} M parameters, {last.macs / 1e6:.0f} M MACs an image"
    yield "classes", ", ".join(spec.classes)
    yield "input", f"{spec.size[0]} × {spec.size[1]} pixels, {spec.channels}, {spec.resize}"
    yield "data", f"fingerprint {last.data_fingerprint or 'not stated'}"
    yield "split rule", last.split_rule or "not stated"
    for name in ("test_balanced_accuracy", "test_macro_auroc", "test_ece"):
        if m := last.metrics.get(name):
            spread = "" if m.low is None or m.high is None else f" [{m.low:.3f}, {m.high:.3f}]"
            yield name.removeprefix("test_").replace("_", " "), f"{m.value:.3f}{spread}"


def cases(fidelity: Fidelity) -> str:
    """CSV: a line a case and model. A case is named by the start of its file's hash alone.

    Of each figure (`pearson`) there is also the strangers' (`pearson_null`); undefined: empty.
    """
    shown = fidelity.comparisons
    keys, nulls = (
        list(dict.fromkeys(k for c in shown for a in c.images for k in getattr(a, which)))
        for which in ("figures", "null")
    )
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(["image", "label", "model", "compressed_from", "explained", "answer",
                    "probability", *keys, *(f"{k}_null" for k in nulls)])  # fmt: skip
    for c in shown:
        lines.writerows(_lines(c, keys, nulls))
    return buffer.getvalue()


def _lines(c: Comparison, keys: Sequence[str], nulls: Sequence[str]) -> list[list[Any]]:
    return [
        [a.image, a.label, c.name, c.reference, a.explained, a.answer, a.probability,
         *(a.figures.get(k) for k in keys), *(a.null.get(k) for k in nulls)]
        for a in c.images
    ]  # fmt: skip
