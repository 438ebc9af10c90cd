"""A few of the made-up folders of benchmarks/folders.py: no traceback, and what passes trains."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydicom", reason="pip install 'edgekd[dicom]'")


def test_what_check_passes_is_seen_by_all_and_trains(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import folders

    wrong: list[str] = []
    counts = folders.swept(range(20), wrong.append)
    assert not wrong
    assert counts["refused"] + counts["passed"] == 20
    assert counts["trained"] == counts["passed"] > 3
