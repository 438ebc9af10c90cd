"""`edgekd report`: the run's page, of what is finished: models, timings, explanations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd import data
from edgekd.data import preprocess
from edgekd.records import Artifact, EdgeKDError, Fidelity, Timing

if TYPE_CHECKING:
    from edgekd.pipeline.run import Run
    from edgekd.report import gallery as gallery_module
    from edgekd.report import layer_strips as strips_module


def report(run: Run, *, cases: int, pictures: bool = True) -> Path:
    """The run's page, `<run>/report.html`, of what is finished: models, timings, explanations.

    Beside it report.json and cases.csv. pictures: False leaves every pixel out.
    """
    dataset = run.dataset()
    return page_of(run, dataset, run.candidates(dataset), cases=cases, pictures=pictures)


def page_of(
    run: Run,
    dataset: data.Dataset,
    candidates: list[Artifact],
    *,
    cases: int,
    pictures: bool,
    out: Path | None = None,
    intended_use: str = "",
) -> Path:
    """As `report`; out: another folder than the run's."""
    from edgekd.report import page

    rows = []
    for c in candidates:
        folder = run.folder / "bench" / c.folder.name
        timing = Timing.load(folder) if (folder / Timing.FILE).exists() else None
        if timing and timing.artifact_sha256 != c.sha256:
            timing = None  # of an earlier file
        rows.append(page.Row(f"{c.role} {c.precision}", c, timing))
    explained = (run.folder / "explain" / Fidelity.FILE).exists()
    fidelity = Fidelity.load(run.folder / "explain") if explained else None
    if fidelity and {c.artifact_sha256 for c in fidelity.comparisons} != {
        c.sha256 for c in candidates
    }:
        raise EdgeKDError(f"{run.folder}/explain is of earlier files: run edgekd explain again")
    told = fidelity.comparisons if fidelity else ()
    remarks = [f"{c.name}: {c.remark}" for c in told if c.remark]
    panels, swayed = _gallery(run, dataset, fidelity, cases) if fidelity else ([], [])
    return page.write(
        out or run.folder,
        title=f"EdgeKD: {run.folder.name}",
        rows=rows,
        fidelity=fidelity,
        panels=panels,
        swayed=swayed,
        profile=run.record.profile,
        notes=[*dataset.notes, *remarks],
        command="edgekd report"
        + (f" --run {run.folder}" if out is None else "")
        + ("" if pictures else " --no-images"),
        pictures=pictures,
        strips=_strips(run, dataset) if fidelity and pictures else [],
        intended_use=intended_use,
    )


def _gallery(
    run: Run, dataset: data.Dataset, fidelity: Fidelity, count: int
) -> tuple[list[gallery_module.Panel], list[gallery_module.Pair]]:
    """What the report shows of single images."""
    from edgekd.pipeline.explain import MAPS, THROUGH
    from edgekd.report import gallery

    with np.load(run.folder / "explain" / MAPS, allow_pickle=False) as stored:
        maps = {c.name: stored[c.name] for c in fidelity.comparisons}
        through = stored.get(THROUGH)  # None: without a teacher, or by an earlier edgekd
    samples = {s.digest[:12]: s for s in dataset.splits["test"]}
    spec, shown = run.record.spec, fidelity.comparisons
    panels = []
    for i, why in gallery.chosen(shown, count):
        sample = samples[shown[0].images[i].image]
        mask = preprocess.mask(sample.mask, spec) if sample.mask else None
        pixels = data.pixels(sample, spec)
        panels.append(gallery.panel(i, why, shown, maps, pixels, mask, through))
    pairs = []
    for told in fidelity.swayed:
        sample = samples[told.image]
        pairs.append(gallery.pair(told, spec.classes[sample.label], data.pixels(sample, spec)))
    return panels, pairs


def _strips(run: Run, dataset: data.Dataset) -> list[strips_module.Strip]:
    """What was explained layer by layer; nothing if that was not asked for."""
    from edgekd.pipeline.explain import LAYERS
    from edgekd.report import layer_strips

    path = run.folder / "explain" / LAYERS
    if not path.is_file():
        return []
    shown = layer_strips.images_of(path)
    samples = [s for s in dataset.splits["test"] if s.digest[:12] in shown]
    spec = run.record.spec
    return layer_strips.read(path, {s.digest[:12]: data.pixels(s, spec) for s in samples})
