"""Another machine, reached over the user's own ssh."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.remote.client import ask as ask
    from edgekd.remote.client import check_python as check_python
    from edgekd.remote.ssh import Device as Device

__all__ = ["Device", "ask", "check_python"]
__getattr__ = lazy_exports(
    __name__,
    {
        "client": "ask check_python",
        "ssh": "Device",
    },
)
