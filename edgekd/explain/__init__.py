"""Score-CAM over any session: agreement, faithfulness, shortcuts, and the verdict on them."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.explain.examine import Asked as Asked
    from edgekd.explain.examine import Examined as Examined
    from edgekd.explain.fidelity import Cases as Cases
    from edgekd.explain.fidelity import Maps as Maps
    from edgekd.explain.fidelity import compare as compare
    from edgekd.explain.score_cam import Heat as Heat
    from edgekd.explain.score_cam import class_maps as class_maps
    from edgekd.explain.score_cam import overlay as overlay
    from edgekd.explain.verdict import judge as judge

__all__ = [
    "Asked",
    "Cases",
    "Examined",
    "Heat",
    "Maps",
    "class_maps",
    "compare",
    "judge",
    "overlay",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "examine": "Asked Examined",
        "fidelity": "Cases Maps compare",
        "score_cam": "Heat class_maps overlay",
        "verdict": "judge",
    },
)
