"""INT8 by several engines, one file each, and layers put back where they cost too much."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.quantize.ptq import pick_calibration as pick_calibration
    from edgekd.quantize.ptq import quantize as quantize
    from edgekd.quantize.sensitivity import repair as repair

__all__ = ["pick_calibration", "quantize", "repair"]
__getattr__ = lazy_exports(
    __name__,
    {
        "ptq": "pick_calibration quantize",
        "sensitivity": "repair",
    },
)
