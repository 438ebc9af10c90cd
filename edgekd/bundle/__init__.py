"""One file with all that a device needs, which proves itself: pack, sign, verify."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.bundle.bundle import Checked as Checked
    from edgekd.bundle.bundle import Given as Given
    from edgekd.bundle.bundle import Manifest as Manifest
    from edgekd.bundle.bundle import check as check
    from edgekd.bundle.bundle import make as make
    from edgekd.bundle.bundle import unpack as unpack
    from edgekd.bundle.out_of_distribution import Familiar as Familiar
    from edgekd.bundle.signing import new_key as new_key

__all__ = ["Checked", "Familiar", "Given", "Manifest", "check", "make", "new_key", "unpack"]
__getattr__ = lazy_exports(
    __name__,
    {
        "bundle": "Checked Given Manifest check make unpack",
        "out_of_distribution": "Familiar",
        "signing": "new_key",
    },
)
