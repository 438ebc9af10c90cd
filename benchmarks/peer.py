"""Files side by side, each in a process of its own, as its runtime opens it: for latency_peers.py.

A file is a folder and a way: "edgekd", as EdgeKD opens it; "openvino", "openvino f32" (fp32.onnx)
and "openvino nncf" (nncf.xml); "ort" and "ort X" (fp32.onnx and X.onnx). No torch in here.

    python benchmarks/peer.py FOLDER WAY images.npy  # a request a line, an answer a line
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workbench import own_stdout

from edgekd import runtimes
from edgekd.bench.stopwatch import settle, time_ms
from edgekd.records import Artifact, Profile

ROUNDS, TURNS, CALLS, RESTS = 3, 40, 12, 5  # short turns: see TURNS in edgekd/bench.py
PAUSE_S = 2.0
CPU = Profile.read("cpu")
SHORT = {"f32": "fp32"}  # OpenVINO's names of precisions, ours otherwise
Answer = Callable[[np.ndarray], np.ndarray]  # (1, 3, H, W) -> (1, K) logits
File = tuple[Path, str]


def opened(folder: Path, way: str) -> tuple[Answer, str]:
    """How a file answers, and the precision that most of it runs in."""
    if way == "edgekd":
        artifact = Artifact.load(folder)
        session = runtimes.open_session(artifact, CPU, 1)
        return lambda x: session(x).logits, artifact.precision
    if way.startswith("openvino"):
        return _openvino(folder, way)
    import onnxruntime

    file = "fp32" if way == "ort" else way.removeprefix("ort ")
    own = onnxruntime.InferenceSession(str(folder / f"{file}.onnx"),
                                       providers=["CPUExecutionProvider"])  # fmt: skip
    precision = "fp32" if way == "ort" else "int8"
    return lambda x: own.run(["logits"], {"image": x})[0], precision


def _openvino(folder: Path, way: str) -> tuple[Answer, str]:
    """`opened`, of a file that OpenVINO runs."""
    runtimes.get("openvino")  # blocks its telemetry
    import openvino as ov

    quantised = way == "openvino nncf"
    config = {"PERFORMANCE_HINT": "LATENCY"}
    if way == "openvino f32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    file = "nncf.xml" if quantised else "fp32.onnx"
    compiled = ov.compile_model(ov.Core().read_model(folder / file), "CPU", config)
    rest = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return lambda x: compiled(x)[0], "int8" if quantised else SHORT.get(rest, rest)


def serve(folder: Path, way: str, images: Path) -> None:
    """Answer about one file until stdin ends."""
    answers = own_stdout()
    x = np.load(images, mmap_mode="r")
    answer, precision = opened(folder, way)
    first = np.array(x[:1])
    settle(lambda: answer(first))
    said: Any = {"precision": precision}
    print(json.dumps(said), file=answers, flush=True)
    for line in sys.stdin:
        asked = line.split()
        if asked[0] == "calls":
            said = time_ms(lambda: answer(first), warmup=5, runs=int(asked[1])).tolist()
        elif asked[0] == "once":  # the first call after a rest
            said = float(time_ms(lambda: answer(first), warmup=0, runs=1)[0])
        else:
            said = [answer(np.array(i[None]))[0].tolist() for i in x]
        print(json.dumps(said), file=answers, flush=True)


class Peer:
    """The process of one file."""

    def __init__(self, name: str, file: File, images: Path) -> None:
        self.name = name
        command = [sys.executable, __file__, str(file[0]), file[1], str(images)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)  # fmt: skip
        self.precision = str(self._answer()["precision"])

    def ask(self, request: str) -> Any:
        """Its answer to one line."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """No more questions."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} does not open, or has gone")
        return json.loads(line)


def answers(name: str, file: File, images: Path) -> list[list[float]]:
    """(images, classes) logits of one file."""
    peer = Peer(name, file, images)
    try:
        said: list[list[float]] = peer.ask("logits")
        return said
    finally:
        peer.stop()


def in_turns(files: dict[str, File], images: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """Of each file: "blocks", its medians in ms round by round; "rests", each the ms of a call
    after PAUSE_S in which it and the whole machine were at rest; "logits" and "precision".
    """
    found: dict[str, dict[str, Any]] = {n: {"blocks": [], "rests": []} for n in files}
    for number in range(1 if quick else ROUNDS):
        peers: list[Peer] = []
        try:
            for n, file in files.items():
                peers.append(Peer(n, file, images))
            for p in peers:
                found[p.name]["blocks"].append([])
                if not number:
                    found[p.name] |= {"precision": p.precision, "logits": p.ask("logits")}
            for turn in range(TURNS):
                for p in peers if turn % 2 else peers[::-1]:
                    block = float(np.median(p.ask(f"calls {CALLS}")))
                    found[p.name]["blocks"][-1].append(block)
            for rest in range(0 if number else RESTS):
                for p in peers if rest % 2 else peers[::-1]:
                    p.ask(f"calls {CALLS}")  # or it would have rested while all others took turns
                    time.sleep(PAUSE_S)
                    found[p.name]["rests"].append(p.ask("once"))
        finally:
            for p in peers:
                p.stop()
    return found


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
