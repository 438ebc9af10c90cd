"""Records as one HTML page without outside requests, `report.json` and `cases.csv`."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.report.page import Row as Row
    from edgekd.report.page import write as write

__all__ = ["Row", "write"]
__getattr__ = lazy_exports(
    __name__,
    {
        "page": "Row write",
    },
)
