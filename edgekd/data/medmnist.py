"""MedMNIST `.npz` archives: six arrays, `{train,val,test}_{images,labels}`."""

from __future__ import annotations

import functools
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from edgekd.data.manifests import Entry, Log
from edgekd.records import EdgeKDError

_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver",
           "lung-left", "lung-right", "pancreas", "spleen")  # fmt: skip
NAMES = {  # file name -> classes in the order of their labels (Yang et al. 2023, medmnist 2.1)
    "pathmnist": ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
                  "normal colon mucosa", "cancer-associated stroma",
                  "colorectal adenocarcinoma epithelium"),
    "dermamnist": ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
                   "benign keratosis-like lesions", "dermatofibroma", "melanoma",
                   "melanocytic nevi", "vascular lesions"),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": ("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte",
                   "monocyte", "neutrophil", "platelet"),
    "tissuemnist": ("collecting duct, connecting tubule", "distal convoluted tubule",
                    "glomerular endothelial cells", "interstitial endothelial cells", "leukocytes",
                    "podocytes", "proximal tubule segments", "thick ascending limb"),
    "organamnist": _ORGANS, "organcmnist": _ORGANS, "organsmnist": _ORGANS,
}  # fmt: skip


def find(path: Path, log: Log) -> list[Entry]:
    """An entry for each image; problems go to `log`."""
    begin = re.match(r"[a-z]*", path.stem.casefold())  # of `pathmnist_224`, `PathMNIST (1)`
    known = NAMES.get(begin[0] if begin else "", ())
    entries: list[Entry] = []
    for split in ("train", "val", "test"):
        try:
            images, labels = (_array(path, f"{split}_{kind}") for kind in ("images", "labels"))
            _check(images, labels)
        except EdgeKDError as e:
            log.problems.append(f"{path.name}: {split}: {e}")
            continue
        for i, label in enumerate(labels.reshape(-1).tolist()):
            name = known[label] if 0 <= label < len(known) else str(label)
            inside = f"{split}_images/{i}"
            entries.append(Entry(path, inside, split, name, home=path.name, inside=inside))
    return entries


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    """EdgeKDError unless (N, H, W) or (N, H, W, 3) uint8 with one label an image."""
    shape = images.shape
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and shape[3] == 3)):
        raise EdgeKDError(f"images are {shape} {images.dtype}; expected (N, H, W[, 3]) uint8")
    if labels.size != len(images) or labels.ndim > 2 or labels.dtype.kind not in "ui":
        raise EdgeKDError(f"labels are {labels.shape} {labels.dtype}; expected one number an image")


@functools.lru_cache(maxsize=6)
def _array(path: Path, key: str) -> np.ndarray:
    try:
        if not zipfile.is_zipfile(path):
            raise EdgeKDError("not a MedMNIST archive (no zip file)")
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except KeyError:
        raise EdgeKDError(f"no array {key}; expected MedMNIST's six") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise EdgeKDError(f"not a MedMNIST archive ({type(e).__name__})") from None


def pixels(path: Path, inside: str) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8: the image at `inside`, e.g. "train_images/12"."""
    key, _, index = inside.partition("/")
    return _array(path, key)[int(index)]


def image(path: Path, inside: str) -> Image.Image:
    """The same as a picture, mode L or RGB."""
    return Image.fromarray(pixels(path, inside))
