"""`edgekd bundle`: the run's last file with its evidence, as one file for the device."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd import runtimes
from edgekd.bundle import bundle as bundles
from edgekd.pipeline import folders, report
from edgekd.records import Artifact, EdgeKDError, Fidelity, GateMissed, Timing

if TYPE_CHECKING:
    from edgekd.bundle.bundle import Manifest
    from edgekd.pipeline.run import Run


def bundle(
    run: Run,
    out: Path | None,
    *,
    key: Path | None,
    intended_use: str,
    abstain_below: float,
    despite: str,
) -> tuple[Path, Manifest]:
    """The run's last file with its evidence, as one file; by default in the run's folder.

    abstain_below: calibrated probability under which a device gives no answer. despite: why, if its
    explanations did not pass. EdgeKDError if it was not measured or explained.
    """
    dataset = run.dataset()
    candidates = run.candidates(dataset)
    last = candidates[-1]
    for folder, kind, command in (
        (run.folder / "bench" / last.folder.name, Timing, "bench"),
        (run.folder / "explain", Fidelity, "explain"),
    ):
        if not (folder / kind.FILE).is_file():
            raise EdgeKDError(f"{last.folder} has no evidence yet: run edgekd {command} first")
    timing = Timing.load(run.folder / "bench" / last.folder.name)
    fidelity = Fidelity.load(run.folder / "explain")
    if timing.artifact_sha256 != last.sha256:
        raise EdgeKDError(f"{last.folder} was measured before it changed: run edgekd bench again")
    if last.sha256 not in {c.artifact_sha256 for c in fidelity.comparisons}:
        raise EdgeKDError(f"{last.folder} was explained before it changed: edgekd explain again")
    if fidelity.verdict != "pass" and not despite:
        raise GateMissed(
            f"the verdict of its explanations is {(fidelity.verdict or 'absent').upper()}: "
            "--despite REASON bundles it all the same, and the reason stands in the bundle"
        )
    source = _source(run.folder, last)
    path = out or run.folder / f"{run.folder.name}{bundles.SUFFIX}"
    with tempfile.TemporaryDirectory() as empty:
        page = report.page_of(
            run, dataset, candidates, cases=1, pictures=False, out=Path(empty),
            intended_use=intended_use,
        ).read_bytes()  # fmt: skip
    # The device's profile stands in the bundle, also where its runtime or device is not here: what
    # must be built there, and how fast it has to be, is the device's to say.
    here, _ = runtimes.host(run.record.profile, last)
    usual = folders.usual(last, here, dataset, run.track)
    given = bundles.Given(
        last, run.record.profile, source, timing, fidelity, page, usual=usual, here=here
    )
    made = bundles.make(
        path, given, intended_use=intended_use, abstain_below=abstain_below, despite=despite,
        key=key,
    )  # fmt: skip
    return path, made


def _source(folder: Path, made: Artifact) -> Artifact | None:
    """The run's ONNX that `made` says the same as, in its precision; None: it is, or has none."""
    if made.path.suffix == ".onnx":
        return None
    for name in ("onnx", made.precision):
        if (folder / name / Artifact.FILE).is_file():
            source = Artifact.load(folder / name)
            if source.sha256 in made.parents.values() and bundles.rebuilds(source, made):
                return source
    return None  # NNCF's INT8, or FP16: no ONNX of the run has those weights
