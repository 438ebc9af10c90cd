"""EdgeKD: distil, quantise, measure and explain image classifiers for constrained hardware.

The line in Python: `run = edgekd.distill("cpu")`, then `run.quantize()`, `run.export("openvino")`,
`run.bench()`, `run.explain()`, `run.report()` and `run.bundle()`. On the device, without torch:
`model = edgekd.load(Path("cpu.edgekd"))`, then `model.predict(image)` and `model.explain(image)`.
"""

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.pipeline.distill import distill as distill
    from edgekd.pipeline.run import Run as Run
    from edgekd.pipeline.search import search as search
    from edgekd.pipeline.shrink import shrink as shrink
    from edgekd.pipeline.teach import teach as teach
    from edgekd.records import Arch as Arch
    from edgekd.records import Artifact as Artifact
    from edgekd.records import EdgeKDError as EdgeKDError
    from edgekd.records import Fidelity as Fidelity
    from edgekd.records import GateMissed as GateMissed
    from edgekd.records import Profile as Profile
    from edgekd.records import RuntimeUnavailable as RuntimeUnavailable
    from edgekd.records import Spec as Spec
    from edgekd.records import Timing as Timing
    from edgekd.records import Training as Training
    from edgekd.records.options import DataOptions as DataOptions
    from edgekd.records.options import OutputOptions as OutputOptions
    from edgekd.records.options import RunOptions as RunOptions
    from edgekd.records.options import SearchOptions as SearchOptions
    from edgekd.records.options import StudentOptions as StudentOptions
    from edgekd.records.options import SupernetOptions as SupernetOptions
    from edgekd.records.options import TeacherOptions as TeacherOptions
    from edgekd.records.options import TrainOptions as TrainOptions
    from edgekd.serve.model import Answer as Answer
    from edgekd.serve.model import Cam as Cam
    from edgekd.serve.model import Model as Model
    from edgekd.serve.model import load as load

# Read when numpy is first imported. OpenBLAS's threads wait for the next product by spinning, on
# the cores that the runtime wants: between numpy's masks a ResNet-18 took 1.8 times as long. What
# is multiplied here is small. Whoever wants more sets it before.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Read when onnxruntime is first imported: its wheel reports to its maker unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = [
    "Answer", "Arch", "Artifact", "Cam", "DataOptions", "EdgeKDError", "Fidelity", "GateMissed",
    "Model", "OutputOptions", "Profile", "Run", "RunOptions", "RuntimeUnavailable",
    "SearchOptions", "Spec", "StudentOptions", "SupernetOptions", "TeacherOptions", "Timing",
    "TrainOptions", "Training", "distill", "load", "search", "shrink", "teach",
]  # fmt: skip


def lazy_exports(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562): names, imported from their module when first asked for.

    modules: of each of the package's modules, the names that the package exports, with blanks
    between them. `import edgekd` so loads neither torch nor numpy, and a room only what is used.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}

    def exported(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return exported


__getattr__ = lazy_exports(
    __name__,
    {
        "pipeline.distill": "distill",
        "records.options": "DataOptions OutputOptions RunOptions SearchOptions StudentOptions "
        "SupernetOptions TeacherOptions TrainOptions",
        "pipeline.run": "Run",
        "pipeline.search": "search",
        "pipeline.shrink": "shrink",
        "pipeline.teach": "teach",
        "records": "Arch Artifact EdgeKDError Fidelity GateMissed Profile RuntimeUnavailable Spec "
        "Timing Training",
        "serve.model": "Answer Cam Model load",
    },
)
