"""Once-for-All: spaces, elastic networks, warm starts, latency tables, predictors, search."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.ofa.accuracy_predictor import AccuracyPredictor as AccuracyPredictor
    from edgekd.ofa.latency_table import Table as Table
    from edgekd.ofa.pareto import Front as Front
    from edgekd.ofa.pareto import Member as Member
    from edgekd.ofa.spaces import Space as Space
    from edgekd.ofa.spaces import named as named
    from edgekd.ofa.spaces import subnets as subnets
    from edgekd.ofa.supernet import SubNet as SubNet
    from edgekd.ofa.supernet import Supernet as Supernet

__all__ = [
    "AccuracyPredictor",
    "Front",
    "Member",
    "Space",
    "SubNet",
    "Supernet",
    "Table",
    "named",
    "subnets",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "accuracy_predictor": "AccuracyPredictor",
        "latency_table": "Table",
        "pareto": "Front Member",
        "spaces": "Space named subnets",
        "supernet": "SubNet Supernet",
    },
)
