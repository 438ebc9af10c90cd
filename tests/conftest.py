"""Data that many tests share: small phantoms, and the real folders where they are mounted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Tiny networks gain nothing from more threads, and on a busy machine lose a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any test imports openvino or nncf: no telemetry, in child processes too.
os.environ["CI"] = "true"
os.environ["NNCF_CI"] = "1"

from edgekd.data import phantom
from edgekd.records import Spec

if TYPE_CHECKING:
    from loopback import Loopback
    from torch import nn


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantoms a class, 64 px: 42 train, 12 val, 18 test. Not to be written to."""
    return phantom.make(tmp_path_factory.mktemp("phantoms"), per_class=24, size=64)


@pytest.fixture(scope="session")
def spec() -> Spec:
    """What a model of the phantoms sees."""
    return Spec(classes=phantom.CLASSES, size=(64, 64), channels="grey")


@pytest.fixture(scope="session")
def net() -> nn.Module:
    """Trained on `squares`; (N, 24, 6, 6) features, two of the channels dead. Not to be changed."""
    from squares import trained

    return trained()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """An OpenSSH server on this machine, or a skip."""
    from loopback import serving

    with serving(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture
def loopback(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    """That server, with an `ssh` on PATH that reaches it as `device`."""
    path = f"{server.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    return server


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("brain_tumor_mri")`: that folder of EDGEKD_DATA (or ../shared/data), or a skip."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("EDGEKD_DATA", beside))

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no {root / name}: set EDGEKD_DATA to the folder that holds {name}")
        return root / name

    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stopwatch that moves only when told, in ns."""
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    return now


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    """Write a file of a made-up system."""

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    write.root = tmp_path  # type: ignore[attr-defined]
    return write
