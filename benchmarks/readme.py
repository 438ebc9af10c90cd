"""Fill the README's table of results from benchmarks/results; `make check` fails if it is stale."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def table() -> str:
    """The table of the newest result of benchmarks/line.py."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted(HERE.glob("results/line-*.json"))]
    if not found:
        return ""
    result = max(found, key=lambda r: r["date"])
    machine, rows = result["machine"], result["table"]
    lines = [
        f"Real MRI slices (three tumour classes, 488 test images, 128 px), {machine['cpu']}, "
        f"{machine['cores']} cores, {result['date']}, from `benchmarks/line.py`:",
        "",
        "| | network | balanced accuracy [95 %] | parameters | MACs | size | p50 | p95 | agreement "
        "(stranger's) | energy in tumour / its area |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a = row["balanced_accuracy"]
        cells = [
            row["model"], f"{row['name']} {row['precision']}",
            f"{a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]",
            f"{row['params'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M",
        ]  # fmt: skip
        if "p95_ms" in row:
            r, e = row["pearson"], row["enrichment"]
            cells += [
                f"{row['size_bytes'] / 1e6:.1f} MB", f"{row['p50_ms']:.2f} ms",
                f"{row['p95_ms']:.2f} ms", f"{r['value']:.2f} ({r['null']:.2f})",
                f"{e['value']:.1f} x ({e['null']:.1f} x)",
            ]  # fmt: skip
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Agreement: Pearson correlation with the teacher's map of the same image, and in brackets "
        "with that of another patient with the same answer; the last column likewise.",
    ]
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """`text` with the table between its marks."""
    marks = "<!-- results -->\n", "<!-- /results -->"
    return re.sub(
        re.escape(marks[0]) + ".*?" + re.escape(marks[1]),
        lambda _: marks[0] + table() + marks[1],
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
