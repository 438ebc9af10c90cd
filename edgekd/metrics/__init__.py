"""Figures with intervals: classification, calibration, operating points, paired tests, latency."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.metrics.calibration import fit_temperature as fit_temperature
    from edgekd.metrics.calibration import probabilities as probabilities
    from edgekd.metrics.calibration import softmax as softmax
    from edgekd.metrics.classification import Figures as Figures
    from edgekd.metrics.classification import bootstrap as bootstrap
    from edgekd.metrics.classification import figures as figures
    from edgekd.metrics.classification import kendall as kendall
    from edgekd.metrics.latency import percentiles as percentiles
    from edgekd.metrics.paired import mcnemar as mcnemar

__all__ = [
    "Figures",
    "bootstrap",
    "figures",
    "fit_temperature",
    "kendall",
    "mcnemar",
    "percentiles",
    "probabilities",
    "softmax",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "calibration": "fit_temperature probabilities softmax",
        "classification": "Figures bootstrap figures kendall",
        "latency": "percentiles",
        "paired": "mcnemar",
    },
)
