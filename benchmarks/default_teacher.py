"""Which pretrained network teaches by default?

    python benchmarks/default_teacher.py [--quick] [--only NAME ...] [--runs DIR] [--seeds N]

Each network whose ImageNet weights a package brings is taught as `edgekd teach NAME` teaches it, by
default settings, on MRI slices, children's chest films and synthetic chests: EfficientNet-Lite0 at
the student's size and at a higher one, Lite1, Lite2, and ResNet-18 from scratch, the default until
now. Validation decides, test is reported. About an hour on 2 cores; interrupted, it goes on where
it stopped. --quick (one epoch at 64 pixels) writes no result file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from workbench import RUNS, arguments, data_folder, edgekd, keep

from edgekd.records import Artifact

SIZE, HIGHER = 128, 160
NETWORKS = {
    "resnet18": ("resnet18", SIZE),
    "lite0": ("tf_efficientnet_lite0", SIZE),
    "lite0-160": ("tf_efficientnet_lite0", HIGHER),
    "lite1": ("tf_efficientnet_lite1", SIZE),
    "lite2": ("tf_efficientnet_lite2", SIZE),
}
SETS = ("brain_tumor_mri", "cxr_pneumonia", "phantoms")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    runs = given.runs or RUNS / ("default_teacher" + ("-quick" if given.quick else ""))
    rows = []
    for name in SETS:
        data = [] if name == "phantoms" else ["--data", data_folder(None, name)]
        for seed in range(given.seeds):
            for net in given.only:
                model, size = NETWORKS[net]
                out = runs / f"{name}-{net}-{seed}"
                less = ["--epochs", 1, "--size", 64] if given.quick else ["--size", size]
                edgekd("teach", model, *data, *less, "--seed", seed, "--runs", out)
                (folder,) = out.glob("shared/*/teacher-*")
                made = Artifact.load(folder)
                found = {k: made.metrics[f"{k}_balanced_accuracy"].value for k in ("val", "test")}
                log = (folder / "log.jsonl").read_text("utf-8").splitlines()
                speed = np.median([json.loads(line)["images_per_s"] for line in log])
                rows.append({"data": name, "network": net, "seed": seed, "macs": made.macs}
                            | found | {"images_per_s": float(speed)})  # fmt: skip
    figures = {
        f"{name}_{net}_{kind}": float(np.mean([r[kind] for r in rows
                                               if (r["data"], r["network"]) == (name, net)]))
        for name in SETS for net in given.only for kind in ("val", "test", "images_per_s")
    }  # fmt: skip
    whole = set(given.only) == set(NETWORKS)
    keep("default_teacher", figures, rows, packages=("torch", "timm"),
         quick=given.quick or not whole, size=SIZE, higher=HIGHER)  # fmt: skip


if __name__ == "__main__":
    main()
