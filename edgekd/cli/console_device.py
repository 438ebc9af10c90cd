"""What a person sees of bundles and of answers at the bedside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape

from edgekd.cli.console import plain, table_of

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from edgekd.bundle.bundle import Checked, Manifest
    from edgekd.serve.model import Answer


def bundled(path: Path, made: Manifest, signer: str) -> Group:
    """What is in a bundle, and who vouches for it."""
    table = table_of("bundle", escape(path.name))
    table.add_row("model", f"{made.precision}, sha256 {made.model[:16]}")
    table.add_row(
        "profile", f"{made.profile.name}: {made.profile.runtime} on {made.profile.device}"
    )
    table.add_row("verdict", made.verdict.upper() or "not judged")
    if made.despite:
        table.add_row("bundled despite that", plain(made.despite))
    table.add_row("intended use", plain(made.intended_use))
    built = "yes, where its runtime takes that" if made.buildable else "no: it runs as it is"
    table.add_row("built on the device", built)
    table.add_row("needs", ", ".join(made.requirements))
    table.add_row("files", str(len(made.files)))
    if signer:
        table.add_row("signed by", signer)
    return Group(table, plain(str(path)))


def signer(found: Checked) -> str:
    """Who signed a bundle, in words."""
    if not found.signer:
        return "nobody: whoever could write to it could change it"
    return found.signer + ("" if found.trusted else ", a key that nobody asked for (--key)")


def answers(found: Sequence[tuple[str, Answer]]) -> Table:
    """What the model says of each file, and what is unusual of it."""
    table = table_of("file", "answer", "probabilities", "ms", "note")
    for name, a in found:
        by = sorted(a.probabilities.items(), key=lambda x: -x[1])
        table.add_row(
            plain(name), plain(a.label or "abstains"),
            plain(", ".join(f"{c} {p:.3f}" for c, p in by)), f"{a.ms:.0f}",
            plain("; ".join([*([a.abstained] if a.abstained else []), *a.warnings])),
        )  # fmt: skip
    return table
