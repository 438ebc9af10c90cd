"""What a command does, one function each: finds the folders of a run and calls the rooms below."""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.pipeline.options import DataOptions as DataOptions
    from edgekd.pipeline.options import OutputOptions as OutputOptions
    from edgekd.pipeline.options import RunOptions as RunOptions
    from edgekd.pipeline.options import SearchOptions as SearchOptions
    from edgekd.pipeline.options import StudentOptions as StudentOptions
    from edgekd.pipeline.options import SupernetOptions as SupernetOptions
    from edgekd.pipeline.options import TeacherOptions as TeacherOptions
    from edgekd.pipeline.options import TrainOptions as TrainOptions
    from edgekd.pipeline.run import Run as Run

__all__ = [
    "DataOptions", "OutputOptions", "Run", "RunOptions", "SearchOptions", "StudentOptions",
    "SupernetOptions", "TeacherOptions", "TrainOptions",
]  # fmt: skip
__getattr__ = lazy_exports(
    __name__,
    {
        "options": "DataOptions OutputOptions RunOptions SearchOptions StudentOptions "
        "SupernetOptions TeacherOptions TrainOptions",
        "run": "Run",
    },
)
