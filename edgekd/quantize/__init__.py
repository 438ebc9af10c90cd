"""INT8 by several engines, layers put back where they cost too much, and which file is deployed."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.quantize.candidates import choose as choose
    from edgekd.quantize.choice import Candidate as Candidate
    from edgekd.quantize.choice import Choice as Choice
    from edgekd.quantize.ptq import pick_calibration as pick_calibration
    from edgekd.quantize.ptq import quantize as quantize
    from edgekd.quantize.sensitivity import repair as repair

__all__ = ["Candidate", "Choice", "choose", "pick_calibration", "quantize", "repair"]
__getattr__ = lazy_exports(
    __name__,
    {
        "candidates": "choose",
        "choice": "Candidate Choice",
        "ptq": "pick_calibration quantize",
        "sensitivity": "repair",
    },
)
