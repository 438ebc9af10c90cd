"""What the result files say: in short in the README, in full in benchmarks/README.md.

    python benchmarks/readme.py

Both are written by this script alone; a test fails if one is stale.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import answers

HERE = Path(__file__).parent
README, FULL = HERE.parent / "README.md", HERE / "README.md"
BESIDE = (
    "latency_peers", "verdict", "chain", "explanation_kd", "scorecam_speed", "papers",
    "once_for_all", "quantize", "latency_prediction", "search", "distill_speed", "stopwatch",
    "footprint", "unusual", "serve_load", "serve_abuse", "leakage",
    "dicom_headers", "folders",
)  # fmt: skip


def kept(question: str) -> list[dict]:
    """The results of a benchmark, one a machine, the newest first."""
    found = [
        json.loads(p.read_text("utf-8")) for p in sorted(HERE.glob(f"results/{question}-*.json"))
    ]
    return sorted(found, key=lambda r: r["date"], reverse=True)


def where(result: dict) -> str:
    """The machine."""
    machine = result["machine"]
    isa = machine.get("isa", [])[-1:]  # older results do not tell
    return ", ".join([machine["cpu"], *isa, f"{machine['cores']} cores"])


def told(question: str, result: dict) -> answers.Told:
    """The answer that this result is."""
    found: answers.Told = getattr(answers, question)(result)
    return found


def results() -> str:
    """In short: the whole line's table, and of everything else what it found."""
    lines = []
    for whole in kept("line"):
        short, more = told("line", whole)
        lines += [f"{where(whole)}, `benchmarks/line.py`. {short}", "", *more, ""]
    for question in BESIDE:
        found = kept(question)
        for result in found:
            on = f"{where(result)}: " if len(found) > 1 else ""
            lines.append(f"- {on}{told(question, result).short} (`{question}`)")
    return "\n".join(lines) + "\n"


def in_full() -> str:
    """benchmarks/README.md: a question each, and its answer."""
    lines = [
        "# Benchmarks",
        "",
        "One script a question. `make bench` runs those that take minutes, `make bench-long` those "
        "that train; each writes a file to `results/`, from which `readme.py` writes this page.",
    ]
    for question in ("line", *BESIDE):
        found = kept(question)
        if not found:
            continue
        doc = ast.get_docstring(ast.parse((HERE / f"{question}.py").read_text("utf-8")))
        assert doc  # every one says what it asks
        lines += ["", f"## {doc.splitlines()[0]}"]
        for result in found:
            short, more = told(question, result)
            lines += ["", f"`{question}.py`, {where(result)}, {result['date']}", "", short]
            lines += ["", *more] if more else []
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """`text` with the results between its marks."""
    marks = "<!-- results -->\n", "<!-- /results -->"
    return re.sub(
        re.escape(marks[0]) + ".*?" + re.escape(marks[1]),
        lambda _: marks[0] + results() + marks[1],
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
    FULL.write_text(in_full(), "utf-8")
