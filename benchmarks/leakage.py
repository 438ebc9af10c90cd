"""What does a leak flatter? The same training, split by group and split by image.

    python benchmarks/leakage.py [--quick] [--data DIR] [--runs DIR] [--seeds N]

LC25000 holds about twenty turned copies of each of its tiles. EfficientNet-Lite0, from ImageNet
weights, learns its five classes twice a seed: dealt by tile cluster, and image by image, which
EdgeKD does only if asked to, and says in the result. The gap is what random splitting adds to the
reported accuracy. About 15 minutes on 2 cores; interrupted, it goes on where it stopped. --quick
(one epoch, one seed) writes no result file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from workbench import FLIP, RUNS, arguments, data_folder, edgekd, keep, lite0_weights

from edgekd.records import Artifact

SPLITS = ("grouped", "random")
PIXELS, EPOCHS = 64, 3
KEY = "test_balanced_accuracy"


def trained(data: Path, runs: Path, split: str, seed: int, epochs: int) -> Artifact:
    """A classifier of that split, trained unless it was."""
    out = runs / f"{split}-{seed}"
    leaky = ["--allow-leakage"] if split == "random" else []
    edgekd("teach", "tf_efficientnet_lite0", "--weights", lite0_weights(), "--data", data,
           "--runs", out, "--size", PIXELS, "--epochs", epochs, "--lr", 0.001, *FLIP,
           "--set", "vflip=true", "--split", split, *leaky, "--seed", seed)  # fmt: skip
    (folder,) = out.glob("shared/*/teacher-*")
    return Artifact.load(folder)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    data = data_folder(given.data, "lc25000_subset")
    runs = given.runs or RUNS / ("leakage-quick" if given.quick else "leakage")
    rows = []
    for seed in range(1 if given.quick else given.seeds):
        for split in SPLITS:
            made = trained(data, runs, split, seed, 1 if given.quick else EPOCHS)
            rows.append({"split": split, "seed": seed, "split_rule": made.split_rule}
                        | made.metrics[KEY].model_dump())  # fmt: skip
    mean = {s: float(np.mean([r["value"] for r in rows if r["split"] == s])) for s in SPLITS}
    found = {f"lc25000_{s}": v for s, v in mean.items()}
    found["lc25000_gap_pt"] = 100 * (mean["random"] - mean["grouped"])
    keep(
        "leakage", found, rows,
        packages=("torch", "timm"), quick=given.quick, pixels=PIXELS, epochs=EPOCHS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
