"""What the two benchmarks of the server share: a bundle, a server in a sandbox, its memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import edgekd
from edgekd import runtimes
from edgekd.bundle import bundle, out_of_distribution
from edgekd.data import phantom, preprocess
from edgekd.records import Artifact, Profile
from edgekd.runtimes import machine

CPU = Profile(name="cpu", runtime="onnxruntime", device="CPU", threads=1)


def film(seed: int, side: int = 256) -> bytes:
    """A phantom as PNG."""
    with io.BytesIO() as buffer:
        picture, *_ = phantom.film(phantom.CLASSES[seed % 3], seed, size=side)
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()


def tiny(folder: Path) -> Path:
    """A bundle of the network that comes with edgekd."""
    model = Artifact.load(Path(edgekd.__file__).parent / "runtimes/tiny")
    images = [preprocess.pixels(film(i, 64), model.spec) for i in range(60)]
    pixels = np.stack(images)
    session = runtimes.open_session(model, CPU)
    pooled = session(preprocess.normalise(pixels, model.spec)).features.mean((2, 3))
    usual = out_of_distribution.learnt(pooled[:40], pooled[40:], pixels)
    out = folder / "tiny.edgekd"
    bundle.make(out, bundle.Given(model, CPU, usual=usual), intended_use="benchmarks")
    return out


class Server:
    """`edgekd serve` in a folder of its own, and the memory that it takes."""

    def __init__(
        self,
        made: Path,
        sandbox: Path,
        *arguments: object,
        token: str = "",
        venv: Path | None = None,
    ) -> None:
        """venv: an environment that has edgekd; None: this one."""
        self.sandbox, self.audit = sandbox, sandbox / "audit" / "audit.jsonl"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "EDGEKD_"))}
        env |= {"HOME": str(sandbox), "TMPDIR": str(sandbox / "tmp")}
        env |= {"EDGEKD_TOKEN": token} if token else {}
        (sandbox / "tmp").mkdir(exist_ok=True)
        (sandbox / "work").mkdir(exist_ok=True)
        here, path = str(Path(edgekd.__file__).parents[1]), env.pop("PYTHONPATH", "")
        if not venv:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [here, path]))
        python = str(venv / "bin" / "python") if venv else sys.executable
        command = [python, "-m", "edgekd", "serve", str(made), "--port", "0",
                   "--audit", str(self.audit), *map(str, arguments)]  # fmt: skip
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=env, cwd=sandbox / "work"
        )
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        found = re.search(r":(\d+) answers with", first)
        if not found:
            sys.exit(f"the server did not start: {first}{self.process.stderr.read()}")
        self.port = int(found[1])
        self.said: list[str] = []
        self.memory: list[tuple[float, float]] = []  # (s, MB)
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._read, self._watch)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def _watch(self) -> None:
        began = time.monotonic()
        while self.process.poll() is None:
            told = machine.field(Path(f"/proc/{self.process.pid}/status"), "VmRSS")
            if told:
                self.memory.append((time.monotonic() - began, int(told.split()[0]) * 1024 / 1e6))
            time.sleep(0.2)

    @property
    def peak_mb(self) -> float:
        """Highest resident memory that was seen."""
        return max(mb for _, mb in self.memory)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(sig)
        code = self.process.wait(60)
        for thread in self._threads:
            thread.join(5)
        return code

    def records(self) -> Iterator[dict[str, object]]:
        """The audit log's, of all its files; what a kill tore is left out."""
        for path in sorted(self.audit.parent.iterdir()):
            for line in path.read_text("utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    yield json.loads(line)
