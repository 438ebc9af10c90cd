"""What runs at the bedside: a bundle's model, HTTP with a page, a DICOM node, the audit log."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.serve.model import Answer as Answer
    from edgekd.serve.model import Cam as Cam
    from edgekd.serve.model import Model as Model
    from edgekd.serve.model import load as load
    from edgekd.serve.model import open_bundle as open_bundle

__all__ = ["Answer", "Cam", "Model", "load", "open_bundle"]
__getattr__ = lazy_exports(
    __name__,
    {
        "model": "Answer Cam Model load open_bundle",
    },
)
