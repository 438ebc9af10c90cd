"""A server to talk to: in a thread, where a test may reach into it, or as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

import edgekd
from edgekd import runtimes
from edgekd.bundle import bundle, out_of_distribution
from edgekd.data import phantom, preprocess
from edgekd.records import Artifact, Profile

CPU = Profile(name="cpu", runtime="onnxruntime", device="CPU", threads=1)
TINY = Artifact.load(Path(edgekd.__file__).parent / "runtimes/tiny")


def png(pixels):
    with io.BytesIO() as buffer:
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()


def film(seed=700):
    """The bytes of a phantom."""
    return png(phantom.film(phantom.CLASSES[seed % 3], seed, size=64)[0])


def noise():
    """The bytes of an image like none that the model learnt from."""
    return png(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))


def make(out, **more):
    """A bundle that knows phantoms."""
    session = runtimes.open_session(TINY, CPU)
    films = [phantom.film(phantom.CLASSES[i % 3], i, size=64)[0] for i in range(60)]
    pixels = np.stack([preprocess.pixels(Image.fromarray(f), TINY.spec) for f in films])
    pooled = session(preprocess.normalise(pixels, TINY.spec)).features.mean((2, 3))
    usual = out_of_distribution.learnt(pooled[:40], pooled[40:], pixels)
    bundle.make(out, bundle.Given(TINY, CPU, usual=usual), **{"intended_use": "tests"} | more)
    return out


class Client:
    """Plain HTTP to one port; every call a connection of its own."""

    def __init__(self, port, token=""):
        self.port, self.token = port, token
        self.url = f"http://127.0.0.1:{port}"

    def call(self, method, path, body=None, kind="image/png", **headers):
        """(status, headers, body as JSON or bytes); header names with _ for -."""
        told = {k.replace("_", "-"): v for k, v in headers.items()}
        if body is not None and kind:
            told["content-type"] = kind
        if self.token:
            told.setdefault("authorization", f"Bearer {self.token}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, told)
            answer = connection.getresponse()
            data = answer.read()
        is_json = answer.headers.get("content-type") == "application/json"
        return answer.status, answer.headers, json.loads(data) if is_json and data else data

    def get(self, path, **headers):
        return self.call("GET", path, **headers)

    def post(self, path, body, kind="image/png", **headers):
        return self.call("POST", path, body, kind, **headers)


@contextlib.contextmanager
def in_thread(model, folder, **settings):
    """(client, bench) of a server in this process."""
    from edgekd.serve import api
    from edgekd.serve import server as serve
    from edgekd.serve.audit import Audit

    chosen = api.Settings(port=0, audit=folder / "audit.jsonl", **settings)
    audit = Audit(chosen.audit)
    bench = api.Bench(model, chosen, audit)
    with serve.listener(chosen) as listener:
        server = serve.Server(serve.config(api.app(bench), chosen), lambda: None)
        server.capture_signals = contextlib.nullcontext  # which the main thread alone may
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait(lambda: server.started)
            yield Client(listener.getsockname()[1], chosen.token), bench
        finally:
            server.should_exit = True
            thread.join(30)
            bench.work.close(5)
            audit.close()


class Process:
    """`edgekd serve` as a process of its own."""

    def __init__(self, file, folder, *arguments, **env):
        code = "from edgekd.cli.main import main; main()"
        command = [sys.executable, "-c", code, "serve", str(file), "--port", "0",
                   "--audit", str(folder / "audit.jsonl"), *map(str, arguments)]  # fmt: skip
        self.audit = folder / "audit.jsonl"
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | env
        )
        self.first = self.process.stderr.readline()
        found = re.match(r"(https?)://(.+):(\d+) answers with", self.first)
        if not found:
            self.stop()
            raise AssertionError(self.first)
        self.port = int(found[3])

    def records(self):
        return [json.loads(x) for x in self.audit.read_text().splitlines()]

    def stop(self):
        """What it said on stderr since; it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        with self.process.stderr as said:
            return said.read()


def wait(is_so, seconds=20.0):
    """Until it is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
