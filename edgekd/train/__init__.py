"""The one training loop, and what differs: distillation, shrinking, losses, soft targets, QAT."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.train.distill import teach as teach
    from edgekd.train.loop import Loss as Loss
    from edgekd.train.loop import State as State
    from edgekd.train.losses import hybrid as hybrid
    from edgekd.train.soft_targets import Targets as Targets

__all__ = ["Loss", "State", "Targets", "hybrid", "teach"]
__getattr__ = lazy_exports(
    __name__,
    {
        "distill": "teach",
        "loop": "Loss State",
        "losses": "hybrid",
        "soft_targets": "Targets",
    },
)
