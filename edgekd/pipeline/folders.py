"""Where a run's folders are, and what each stage finds in them. The file system is the pipeline.

runs/latest                         name of the run worked on last
runs/phantoms-*/                    the embedded data set, made when --data is not given
runs/shared/<data>/teacher-*/       teachers, shared by all runs on that data
runs/shared/<data>/supernet-*/      supernets, and what is known of their sub-nets
runs/<run>/run.json                 profile, data and Spec of the run
runs/<run>/{student,onnx,int8,openvino-int8,bench,explain,...}/
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgekd import data, runtimes
from edgekd.data import preprocess
from edgekd.metrics import classification, evaluation
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Profile,
    RuntimeUnavailable,
    Spec,
    Stored,
    Track,
    first_process,
    locked,
    make_folder,
    untracked,
    write_atomic,
)
from edgekd.records.options import DistillOptions

if TYPE_CHECKING:
    from edgekd.bundle.out_of_distribution import Familiar
    from edgekd.models.feature_layers import Choice
    from edgekd.models.zoo import Waist

LOG = logging.getLogger(__name__)
LEARNT_FROM = 1000  # images of a split, at most, that tell what is usual
BATCH = 32
PHANTOMS = 360  # a class: enough to train a student from scratch in minutes
OTHER = "choose another with --runs or --run"
PARITY_IMAGES = 16  # validation images that an exported file is compared on


class RunRecord(Stored):
    """What all stages of a run share: `run.json`, written by the run's first stage."""

    FILE: ClassVar[str] = "run.json"
    profile: Profile
    data: str
    spec: Spec
    teacher: str = ""  # folder; empty: distilled without one
    seed: int = 0
    split: str | None = None  # how the data was asked to be split
    allow_leakage: bool = False
    # That is explained: a stage, auto, or, where an earlier edgekd was told of none, empty: see
    # onnx_of. What a run was begun with, it keeps.
    layer: str = ""
    options: DistillOptions | None = None  # as `distill` was asked; None: by an earlier edgekd


def find(root: Path, run: Path | None, profile: str | None) -> tuple[Path, RunRecord, str]:
    """(folder, record, how it was chosen): `run`, else `root`/<profile>, else the latest run."""
    if run is not None:
        return run, RunRecord.load(run), "--run"
    if profile is not None:
        folder = root / Profile.read(profile).name
        return folder, RunRecord.load(folder), "--profile"
    latest = root / "latest"
    if not latest.is_file():
        raise EdgeKDError(f"no run in {root} yet: start one with edgekd distill --profile cpu")
    folder = root / latest.read_text("utf-8").strip()
    return folder, RunRecord.load(folder), f"the latest in {root}"


def begin(root: Path, folder: Path, run: RunRecord) -> None:
    """Write run.json and make this the latest run; EdgeKDError if the folder is another run's."""
    make_folder(folder, OTHER)
    if (folder / RunRecord.FILE).exists():
        old = RunRecord.load(folder)
        for field in ("profile", "data", "spec", "teacher", "seed", "split", "allow_leakage"):
            if getattr(old, field) != getattr(run, field) and (folder / "student").exists():
                raise EdgeKDError(
                    f"{folder} is a run with another {field} ({_brief(getattr(old, field))}): "
                    "choose another folder with --run, or replace this one with --force"
                )
    run.save(folder)
    if folder.resolve().parent == root.resolve():
        write_atomic(root / "latest", folder.name + "\n")


def _brief(value: Any) -> str:
    text = value.model_dump_json() if hasattr(value, "model_dump_json") else str(value)
    return text if len(text) < 90 else text[:87] + "..."


def phantoms(root: Path, seed: int, track: Track = untracked) -> Path:
    """The embedded data set's folder under `root`, made if it is not there."""
    from edgekd.data import phantom

    return phantom.make(root / f"phantoms-s{seed}", per_class=PHANTOMS, seed=seed, track=track)


def alone(what: str) -> None:
    """EdgeKDError where a launcher has started several processes, for what one must do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EdgeKDError(f"{what} runs in one process: do that first, and launch what trains then")


def shared(root: Path, dataset: data.Dataset) -> Path:
    """Where what depends on the data alone is kept."""
    return root / "shared" / dataset.fingerprint[:12]


def own_folder(
    root: Path, dataset: data.Dataset, kind: str, name: str, spec: Spec, asked: dict[str, Any]
) -> Path:
    """Of a shared teacher or supernet: other settings, another folder, so none is overwritten."""
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return shared(root, dataset) / f"{kind}-{name}-{spec.size[0]}px-{key}"


def made(root: Path, dataset: data.Dataset, kind: str, spec: Spec) -> list[Artifact]:
    """Finished teachers or supernets of this data that see images as `spec` says."""
    folders = sorted(shared(root, dataset).glob(f"{kind}-*"))
    done = [Artifact.load(f) for f in folders if (f / Artifact.FILE).exists()]
    return [t for t in done if t.spec == spec]


def finished(folder: Path, asked: dict[str, Any], *, force: bool = False) -> Artifact | None:
    """The artifact in `folder` if it was made with settings `asked`; None if it must be made.

    One made with other settings is an EdgeKDError that names the first difference; `force`
    removes it, and an unfinished one.
    """
    if force and first_process():
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / Artifact.FILE).exists():
        return None
    artifact = Artifact.load(folder)
    for key, value in asked.items():
        if artifact.settings.get(key) != value:
            was, now = _first_difference(artifact.settings.get(key), value, key)
            raise EdgeKDError(
                f"{folder} was made with {was}, now asked for {now}: "
                "--force replaces it, --run DIR keeps both"
            )
    return artifact


def _first_difference(old: Any, new: Any, name: str) -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if old.get(key) != new[key]:
                return _first_difference(old.get(key), new[key], key)
    return f"{name} {_brief(old)}", f"{_brief(new)}"


def here(profile: Profile) -> bool:
    """Whether this machine has the profile's runtime and device."""
    try:
        return runtimes.here(profile)
    except RuntimeUnavailable:
        return False


def sample_images(dataset: data.Dataset, spec: Spec, split: str, count: int) -> np.ndarray:
    """(n, 3, H, W) float32: `count` prepared images spread evenly over a split."""
    samples = _evenly(dataset.splits[split], count)
    return preprocess.normalise(data.load_pixels(samples, spec), spec)


def _evenly(samples: Sequence[data.Sample], count: int) -> list[data.Sample]:
    """At most `count` of `samples`, spread evenly."""
    places = np.unique(np.linspace(0, len(samples) - 1, count).astype(int))
    return [samples[i] for i in places]


def explained_layer(
    trained: Artifact, dataset: data.Dataset, track: Track = untracked, *, net: Waist | None = None
) -> Choice:
    """The stage of a trained teacher or student that is explained where `--layer` is auto.

    Chosen once, on validation images and their lesion masks, and kept beside the network; whoever
    distils with the teacher's maps may ask for it before there is any ONNX file. net: the network,
    if it is loaded already.
    """
    from edgekd.models import feature_layers

    few = _evenly(dataset.splits["val"], feature_layers.IMAGES)
    images = preprocess.normalise(data.load_pixels(few, trained.spec), trained.spec)
    masks = data.load_masks(few, trained.spec)
    with locked(trained.folder):
        found = feature_layers.kept_choice(
            trained, images, masks, trained.folder, net=net, track=track
        )
    if all(scores["out"] for scores in found.scores.values()):
        LOG.warning("no layer of %s has maps that depend on what it learnt", trained.folder)
    return found


def usual(made: Artifact, profile: Profile, dataset: data.Dataset, track: Track) -> Familiar:
    """What images are usually like, as this very file sees them."""
    from edgekd.bundle import out_of_distribution

    session, _ = runtimes.open_streams(made, profile)
    seen: list[np.ndarray] = []
    pooled: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        images = dataset.splits[split]
        every = -(-len(images) // LEARNT_FROM)
        pixels = data.load_pixels(images[::every], made.spec, track)
        batches = track(range(0, len(pixels), BATCH), f"what is usual: {split}")
        parts = [session(preprocess.normalise(pixels[i : i + BATCH], made.spec)) for i in batches]
        pooled[split] = np.concatenate([x.features.mean((2, 3)) for x in parts])
        seen.append(pixels)
    return out_of_distribution.learnt(pooled["train"], pooled["val"], np.concatenate(seen))


def judged(
    artifact: Artifact,
    profile: Profile,
    dataset: data.Dataset,
    parent: Artifact,
    track: Track = untracked,
    *,
    rivals: Sequence[Artifact] = (),
) -> Artifact:
    """`artifact` with its own figures, measured on the file itself in its runtime; saved.

    Its temperature and thresholds are fitted on its own validation answers: INT8 moves logits, and
    one rule for all files needs no trust in any. The wanted sensitivity is that of `parent`, which
    it was made from. One that has all this, because a stage was not interrupted before, is
    returned as it is.
    """
    wanted = None if parent.calibration is None else parent.calibration.sensitivity
    if artifact.evaluation is not None:
        return rejudged(artifact, dataset, wanted, rivals=rivals)
    truths = _truths(dataset)
    session = runtimes.open_session(artifact, profile)
    logits = {}
    for split in evaluation.SPLITS:
        pixels = data.load_pixels(dataset.splits[split], artifact.spec)
        images = preprocess.normalise(pixels, artifact.spec)
        logits[split] = classification.answers(session, images, track=track)
    update = evaluation.judge(
        artifact.folder, logits, truths, artifact.spec.classes,
        sensitivity=wanted, rivals=rivals, seed=artifact.seed,
    )  # fmt: skip
    update["metrics"] = artifact.metrics | update["metrics"]
    return artifact.model_copy(update=update).save(artifact.folder)


def rejudged(
    artifact: Artifact,
    dataset: data.Dataset,
    sensitivity: float | None,
    *,
    rivals: Sequence[Artifact] = (),
) -> Artifact:
    """`artifact` at thresholds of this `sensitivity` and beside these `rivals`; saved.

    From its kept logits, so nothing is run. One without any, made by an earlier edgekd, stays as
    it is, or is an EdgeKDError where a sensitivity is wanted.
    """
    found, calibration = artifact.evaluation, artifact.calibration
    if found is None or calibration is None:
        if sensitivity is None:
            return artifact
        raise EdgeKDError(
            f"{artifact.folder} keeps no logits to choose thresholds from: an earlier edgekd made "
            "it; --force makes it again"
        )
    beside = {p.sha256 for p in found.paired.values()}
    if calibration.sensitivity == sensitivity and all(
        r.sha256 in beside for r in rivals if evaluation.kept(r, _truths(dataset))
    ):
        return artifact
    anew = evaluation.again(artifact, _truths(dataset), sensitivity=sensitivity, rivals=rivals)
    return anew.save(artifact.folder)


def _truths(dataset: data.Dataset) -> dict[str, evaluation.Truth]:
    return {split: evaluation.truth(dataset.splits[split]) for split in evaluation.SPLITS}


def onnx_of(
    trained: Artifact,
    folder: Path,
    dataset: data.Dataset,
    track: Track = untracked,
    *,
    tolerance: float = 1e-3,
    rivals: Sequence[Artifact] = (),
    layer: str = "",
) -> Artifact:
    """The trained network's ONNX waist in `folder`, made (parity checked) if it is not there.

    layer: whose output is explained: a stage, "auto" for the one that `explained_layer` chooses,
    whose scores are kept, or empty, in runs of an earlier edgekd, for the deepest of a fine enough
    grid. A file whose layer an earlier edgekd chose by faithfulness alone stays for a student, of
    whose other files it is the parent; for a teacher, which several runs share, it is made again.
    """
    from edgekd import export
    from edgekd.models import feature_layers, zoo

    if (folder / Artifact.FILE).exists():
        made = Artifact.load(folder)
        earlier = feature_layers.by_earlier_rule(made.settings.get("layer_scores"))
        same = made.settings.get("layer", "") == layer
        same &= not (earlier and trained.kind == "teacher")
        if made.parents.get(trained.kind) == trained.sha256 and same:
            worst = max(m.value for k, m in made.metrics.items() if k.startswith("parity_max"))
            if worst > tolerance:
                raise EdgeKDError(
                    f"{made.path} differs by {worst:.2g} from the network it was made from, "
                    f"over the tolerance of {tolerance:g} (--tolerance)"
                )
            here = runtimes.host(_reference(), made)[0]
            return judged(made, here, dataset, trained, track, rivals=rivals)
    images = sample_images(dataset, trained.spec, "val", PARITY_IMAGES)
    net = zoo.load(trained, "" if layer == "auto" else layer)
    told: dict[str, Any] = {"layer": layer} if layer else {}
    if layer == "auto":
        chosen, told["layer_scores"] = explained_layer(trained, dataset, track, net=net)
        net = net.at(chosen)
    expected = export.outputs(net, images)
    zoo.without_colour(net, trained.spec)
    made = export.to_onnx(
        net, trained, images, folder, tolerance=tolerance, expected=expected, told=told
    )
    return judged(
        made, runtimes.host(_reference(), made)[0], dataset, trained, track, rivals=rivals
    )


def _reference() -> Profile:
    """FP32 on this machine's CPU in ONNX Runtime, the format's own runtime."""
    return Profile(name="reference", runtime="onnxruntime", device="CPU")


def exports(folder: Path) -> list[Artifact]:
    """The student's files that a runtime loads: one a precision, an export before what it is of.

    Files of an earlier student, left behind when it was replaced, are passed over.
    """
    family = {Artifact.load(folder / "student").sha256}
    found: dict[str, Artifact] = {}
    low = ("bf16", "fp16", "int8")
    for name in ("student", "onnx"):  # as trained in INT8: what is made of it is the student's
        if (folder / "qat" / name / Artifact.FILE).exists():
            artifact = Artifact.load(folder / "qat" / name)
            if family & set(artifact.parents.values()):
                family.add(artifact.sha256)
    exported = [f"{kind}-{p}" for p in ("fp32", *low) for kind in ("onnx", "openvino")]
    for name in ("onnx", *low, *exported):
        if (folder / name / Artifact.FILE).exists():
            artifact = Artifact.load(folder / name)
            if family & set(artifact.parents.values()):
                family.add(artifact.sha256)
                found[artifact.precision] = artifact
    return [found[p] for p in ("fp32", *low) if p in found]
