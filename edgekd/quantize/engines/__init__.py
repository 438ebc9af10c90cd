"""An engine that writes INT8 files is one file in this folder; its name is what `--engine` says.

Nothing else registers it. Which engine's file is faster differs by network and runtime, so none is
the best: `edgekd.quantize.candidates` measures.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pkgutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from edgekd.records import EdgeKDError, Kind, needing, unknown

NARROW = "7-bit"  # a method of engines that can: for processors where `machine.overflows`


class How(NamedTuple):
    """What an engine is told beside the graph and the images."""

    method: str  # one of the engine's METHODS
    symmetric: bool = False  # activations around zero, the only kind that TensorRT knows
    keep: tuple[str, ...] = ()  # nodes of the ONNX file that stay in FP32


class Engine(Protocol):
    """What a file here defines."""

    METHODS: Mapping[str, str]  # name -> what it does; the first is the default
    FILES: tuple[str, ...]  # that `write` leaves; the first is the one that is loaded
    KIND: Kind  # of the artifact: what wrote the files' format
    RUNTIMES: tuple[str, ...]  # that load them
    PACKAGES: tuple[str, ...]  # whose versions are recorded
    KEEPS: bool  # whether it can leave chosen nodes in FP32

    def write(self, onnx: Path, images: np.ndarray, out: Path, how: How) -> dict[str, Any]:
        """Quantise the FP32 graph in `onnx`, calibrated on (n, 3, H, W) float32 images.

        Returns what is worth recording, at least how many `quantised` tensors there are.
        """


def names() -> list[str]:
    """Every engine there is a file for."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> Engine:
    """The engine called `name`, imported now and not before."""
    if name not in names():
        raise EdgeKDError(unknown("engine", name, [*names(), "auto"]))
    with (
        quiet(),
        _at_home(),
        needing(
            lambda lacks: EdgeKDError(f"quantize needs {lacks}: pip install 'edgekd[quantize]'")
        ),
    ):
        return cast(Engine, importlib.import_module(f"{__name__}.{name}"))


@contextlib.contextmanager
def _at_home() -> Iterator[None]:
    """A folder to write to for engines that want one as they are imported.

    Neural Compressor begins a log file, NNCF asks for the home folder of a user who may have none.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        wanted = {"HABANA_LOGS": folder}
        if os.path.expanduser("~") == "~":  # noqa: PTH111 Path.home() raises where there is none
            wanted["HOME"] = folder
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def method(engine: str, name: str | None) -> str:
    """The engine's method called `name`, or its default."""
    known = get(engine).METHODS
    if name is None:
        return next(iter(known))
    if name not in known:
        raise EdgeKDError(unknown(f"method of {engine}", name, known))
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Engines draw bars on stdout, log and warn; none of it is this tool's result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
