"""Labelled images: folders, DICOM, splits, leakage, preprocessing, augmentation, phantoms."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.data.dataset import Dataset as Dataset
    from edgekd.data.dataset import Findings as Findings
    from edgekd.data.dataset import Sample as Sample
    from edgekd.data.dataset import inspect as inspect
    from edgekd.data.dataset import load_masks as load_masks
    from edgekd.data.dataset import load_pixels as load_pixels
    from edgekd.data.dataset import open_dataset as open_dataset
    from edgekd.data.dataset import pixels as pixels
    from edgekd.data.preprocess import normalise as normalise

__all__ = [
    "Dataset",
    "Findings",
    "Sample",
    "inspect",
    "load_masks",
    "load_pixels",
    "normalise",
    "open_dataset",
    "pixels",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "dataset": "Dataset Findings Sample inspect load_masks load_pixels open_dataset pixels",
        "preprocess": "normalise",
    },
)
