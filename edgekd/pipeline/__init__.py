"""What a command does, one function each: finds the folders of a run and calls the rooms below."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.pipeline.run import Run as Run

__all__ = ["Run"]
__getattr__ = lazy_exports(__name__, {"run": "Run"})
