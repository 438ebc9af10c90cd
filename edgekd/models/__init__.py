"""timm networks and checkpoints as networks with the waist's two outputs; plain students."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.models.zoo import Waist as Waist
    from edgekd.models.zoo import classifier as classifier
    from edgekd.models.zoo import count as count
    from edgekd.models.zoo import load as load
    from edgekd.models.zoo import load_supernet as load_supernet
    from edgekd.models.zoo import published as published
    from edgekd.models.zoo import student as student
    from edgekd.models.zoo import supernet as supernet
    from edgekd.models.zoo import teacher as teacher

__all__ = [
    "Waist",
    "classifier",
    "count",
    "load",
    "load_supernet",
    "published",
    "student",
    "supernet",
    "teacher",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "zoo": "Waist classifier count load load_supernet published student supernet teacher",
    },
)
