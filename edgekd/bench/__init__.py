"""One stopwatch for every file: latency, memory, energy, roofline; tables, plots and a page."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.bench.bench import How as How
    from edgekd.bench.bench import Runner as Runner
    from edgekd.bench.bench import short as short
    from edgekd.bench.compare import Against as Against
    from edgekd.bench.stopwatch import time_ms as time_ms

__all__ = ["Against", "How", "Runner", "short", "time_ms"]
__getattr__ = lazy_exports(
    __name__,
    {
        "bench": "How Runner short",
        "compare": "Against",
        "stopwatch": "time_ms",
    },
)
