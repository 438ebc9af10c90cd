"""A bundle on a device: the workstation's side, the device's side, versions, self-test, systemd."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.deploy.workstation import Target as Target
    from edgekd.deploy.workstation import install as install
    from edgekd.deploy.workstation import rollback as rollback
    from edgekd.deploy.workstation import status as status

__all__ = ["Target", "install", "rollback", "status"]
__getattr__ = lazy_exports(
    __name__,
    {
        "workstation": "Target install rollback status",
    },
)
