"""Does a bundle notice an image that its model has no business with, and leave the others alone?

    python benchmarks/unusual.py [--quick] [--runs DIR]

EfficientNet-Lite0 from ImageNet weights on MRI slices and on children's chest films, 128 pixels, in
OpenVINO as `edgekd bundle` would pack it. Usual: its own test images, of other patients. Unusual:
the other set, histology, noise, and its own test images inverted, upside down, darkened, half
covered, and cut to their middle ninth. Told are the share that is warned of, and the AUROC of the
score beside that of one minus the calibrated probability, which is what one would look at without
it. A quarter of an hour for each network on 2 cores; --quick (one epoch, 64 pixels) keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workbench import FLIP, RUNS, TEACHER, arguments, data_folder, edgekd, keep, lite0_weights

from edgekd import data, runtimes
from edgekd.bundle import out_of_distribution
from edgekd.data import preprocess
from edgekd.metrics.calibration import probabilities
from edgekd.pipeline import folders
from edgekd.records import Artifact, Profile, untracked

OWN = {"brain_tumor_mri": FLIP, "cxr_pneumonia": []}  # what is learnt, and how it may be turned
OTHERS = (*OWN, "lc25000_subset")
IMAGES = 200  # of each kind
CPU = Profile.read("cpu")
Change = Callable[[np.ndarray], np.ndarray]  # (N, H, W, 3) uint8 -> the same


def middle(pixels: np.ndarray) -> np.ndarray:
    """The middle ninth, as large as the whole: another field of view."""
    third = pixels.shape[1] // 3
    inner = pixels[:, third : 2 * third, third : 2 * third]
    whole = inner.repeat(3, 1).repeat(3, 2)
    pad = [(0, 0), *((0, pixels.shape[i] - whole.shape[i]) for i in (1, 2)), (0, 0)]
    return np.pad(whole, pad, "edge")


def half(pixels: np.ndarray) -> np.ndarray:
    covered = pixels.copy()
    covered[:, :, : pixels.shape[2] // 2] = 0
    return covered


CHANGES: dict[str, Change] = {
    "inverted": lambda x: 255 - x,
    "upside down": lambda x: x[:, ::-1].copy(),
    "darkened": lambda x: x // 8,
    "half covered": half,
    "the middle ninth": middle,
    "noise": lambda x: np.random.default_rng(0).integers(0, 256, x.shape, np.uint8),
}


def learnt(name: str, root: Path, quick: bool) -> tuple[Artifact, data.Dataset]:
    """The network of one set as an ONNX file, and the set."""
    place = data_folder(None, name)
    size, guide = (64, ["--epochs", 1, *TEACHER[2:4]]) if quick else (128, TEACHER[:4])
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), "--data", place,
           "--runs", root, "--size", size, *guide, *OWN[name])  # fmt: skip
    dataset = data.open_dataset(place)
    (folder,) = folders.shared(root, dataset).glob(f"teacher-*-{size}px-*")
    return folders.onnx_of(Artifact.load(folder), folder / "teacher-onnx", dataset), dataset


def images_of(name: str, made: Artifact) -> np.ndarray:
    """(N, H, W, 3) uint8 test images of a set, as this network takes them."""
    test = data.open_dataset(data_folder(None, name)).splits["test"]
    return data.load_pixels(test[:: -(-len(test) // IMAGES)], made.spec)


def asked(
    made: Artifact, usual: out_of_distribution.Familiar, pixels: np.ndarray
) -> dict[str, np.ndarray]:
    """Of each image: whether it is warned of, the score, and how unsure the network is."""
    session, _ = runtimes.open_streams(made, CPU)
    said = [session(preprocess.normalise(pixels[i : i + 32], made.spec))
            for i in range(0, len(pixels), 32)]  # fmt: skip
    pooled = np.concatenate([x.features.mean((2, 3)) for x in said])
    p = probabilities(np.concatenate([x.logits for x in said]), made)
    warned = [bool(w) for w in out_of_distribution.warnings(usual, pixels, pooled)]
    return {
        "warned": np.array(warned),
        "score": out_of_distribution.score(usual, pooled),
        "unsure": 1 - p.max(1),
    }


def auroc(usual: np.ndarray, other: np.ndarray) -> float:
    """How often an unusual image has more of it than a usual one."""
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.zeros(len(usual)), np.ones(len(other))]
    return float(roc_auc_score(truth, np.r_[usual, other]))


def rows_of(name: str, root: Path, quick: bool) -> list[dict[str, Any]]:
    """A row a kind of image."""
    made, dataset = learnt(name, root, quick)
    usual = folders.usual(made, CPU, dataset, untracked)
    own = images_of(name, made)
    kinds = {"its own": own}
    kinds |= {other: images_of(other, made) for other in OTHERS if other != name}
    kinds |= {change: how(own) for change, how in CHANGES.items()}
    base = asked(made, usual, own)
    rows = []
    for kind, pixels in kinds.items():
        found = asked(made, usual, pixels)
        rows.append({
            "learnt": name, "kind": kind, "images": len(pixels),
            "warned": float(found["warned"].mean()),
            "auroc": auroc(base["score"], found["score"]),
            "auroc_unsure": auroc(base["unsure"], found["unsure"]),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    root = given.runs or RUNS / ("unusual-quick" if given.quick else "unusual")
    rows = [r for name in OWN for r in rows_of(name, root, given.quick)]
    own = [r for r in rows if r["kind"] == "its own"]
    others = [r for r in rows if r["kind"] in OTHERS]
    found = {
        "warned_own": max(r["warned"] for r in own),
        "warned_other_modality": min(r["warned"] for r in others),
        "auroc_other_modality": min(r["auroc"] for r in others),
        "auroc_other_modality_by_confidence": min(r["auroc_unsure"] for r in others),
    }
    keep("unusual", found, rows, packages=("openvino", "torch", "timm"), quick=given.quick)


if __name__ == "__main__":
    main()
