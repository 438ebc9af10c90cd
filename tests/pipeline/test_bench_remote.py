"""`edgekd bench --host` against a real OpenSSH server on this machine, see loopback.py."""

import json
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

import edgekd
from edgekd import runtimes
from edgekd.bench import remote_side
from edgekd.bench.bench import short
from edgekd.cli.options import exit_code
from edgekd.pipeline import bench, bench_remote
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Metric,
    Profile,
    RuntimeUnavailable,
    Timing,
    sha256,
)
from edgekd.remote import client, protocol

pytestmark = pytest.mark.slow

PROFILE = Profile(name="test", runtime="onnxruntime", device="CPU", threads=1)
TINY = Path(edgekd.__file__).parent / "runtimes/tiny"
ACCURACY = Metric(value=0.9, low=0.8, high=0.95)
QUICK = short(0.01).model_copy(update={"least": 8})
ort = pytest.mark.skipif(
    find_spec("onnxruntime") is None, reason="pip install 'edgekd[onnxruntime]'"
)


@pytest.fixture
def artifacts(tmp_path):
    """Two that can be timed, with what is nobody else's business beside them."""
    found = []
    for name, precision in (("one", "fp32"), ("two", "int8")):
        folder = tmp_path / "run" / name
        shutil.copytree(TINY, folder)
        (folder / "maps").mkdir()
        (folder / "maps" / "patient.png").write_text("PATIENT")
        update = {
            "precision": precision,
            "metrics": {"test_balanced_accuracy": ACCURACY, "parity_max": ACCURACY},
            "per_class": {"PATIENT": {"recall": 1.0}},
            "settings": {"data": "/home/PATIENT"},
            "data_fingerprint": "PATIENT",
        }
        found.append(Artifact.load(folder).model_copy(update=update).save(folder))
    return found


def python_there(tmp_path, probe="", module=""):
    """A Python on the device that answers the first questions, or measures, as told."""
    path = tmp_path / "python"
    real = f'exec {sys.executable} "$@"'
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then {probe or real}\nelse {module or real}\nfi\n'
    )
    path.chmod(0o755)
    return str(path)


def measure(artifacts, out, *, python=sys.executable, profile=PROFILE, **more):
    return bench_remote.bench("device", artifacts, profile, out, QUICK, python=python, **more)


@ort
def test_bench_over_ssh(loopback, artifacts, tmp_path):
    bars = []

    def track(items, what, total=None):
        bars.append([what, total, 0])
        for item in items:
            yield item
            bars[-1][2] += item.size

    timings = measure(artifacts, tmp_path / "out", track=track)
    assert [t.artifact_sha256 for t in timings] == [a.sha256 for a in artifacts]
    assert [t.precision for t in timings] == ["fp32", "int8"]
    assert bars
    assert all(total == done > 0 for _, total, done in bars)
    for timing, artifact in zip(timings, artifacts, strict=True):
        assert timing.on_device
        assert Timing.load(tmp_path / "out" / artifact.folder.name) == timing
        assert len(timing.samples_ms) >= 8
        assert timing.accuracy == ACCURACY
        assert timing.size_bytes == artifact.size_bytes
        assert timing.versions["edgekd"] == edgekd.__version__
        assert {"onnxruntime", "numpy"} <= timing.versions.keys()
    assert not loopback.left(0)


def test_what_is_sent(artifacts):
    files = bench_remote.sent(artifacts[0])
    assert files.keys() == {"artifact.json", "model.onnx"}
    assert b"PATIENT" not in files["artifact.json"]
    bare = Artifact.parse(json.loads(files["artifact.json"]), "sent")
    assert bare.sha256 == artifacts[0].sha256
    assert bare.metrics == {"test_balanced_accuracy": ACCURACY}
    source = client.source()
    assert {"edgekd/__init__.py", "edgekd/bench/remote_side.py", "edgekd/runtimes/openvino.py"} <= {
        *source
    }
    assert not [name for name in source if "__pycache__" in name]


@pytest.mark.parametrize(
    ("probe", "error", "message"),
    [
        ("echo no such thing >&2; exit 1", EdgeKDError,
         r"device has no Python \S+/python \(no such thing\): install it, or name another"),
        ("echo hello from .bashrc; echo edgekd-python 3 8", EdgeKDError,
         r"python on device is Python 3.8, 3.10 is needed"),
        ("echo edgekd-python 3 11; echo edgekd-missing numpy pydantic", EdgeKDError,
         r"numpy, pydantic, PIL and onnxruntime are needed on device, "
         r"no numpy and no pydantic is there: "
         r"\S+ -m pip install numpy pydantic there, or .*--host-python"),
        ("echo edgekd-python 3 11; echo edgekd-missing onnxruntime", RuntimeUnavailable,
         "no onnxruntime is there"),
    ],
)  # fmt: skip
def test_python_there_that_will_not_do(loopback, artifacts, tmp_path, probe, error, message):
    with pytest.raises(EdgeKDError, match=message) as caught:
        measure(artifacts, tmp_path / "out", python=python_there(tmp_path, probe))
    assert type(caught.value) is error
    assert not loopback.left(0)
    assert not list(tmp_path.glob("out/*/timing.json"))


def test_no_python_there(loopback, artifacts, tmp_path):
    with pytest.raises(EdgeKDError, match=r"device has no Python python0 \(.*not found\)"):
        measure(artifacts, tmp_path / "out", python="python0")
    with pytest.raises(EdgeKDError, match=f"no Python {Path.home()}/none/python0"):
        measure(artifacts, tmp_path / "out", python="~/none/python0")


def test_a_real_python_without_a_package(loopback, artifacts, tmp_path):
    """-S: no site-packages, as if nothing had been installed."""
    python = python_there(tmp_path, probe=f'exec {sys.executable} -S "$@"')
    with pytest.raises(RuntimeUnavailable, match="and no pydantic and no PIL and no onnxruntime"):
        measure(artifacts, tmp_path / "out", python=python)


@ort
def test_a_device_that_is_not_there(loopback, artifacts, tmp_path):
    profile = PROFILE.model_copy(update={"device": "Hexagon"})
    with pytest.raises(
        RuntimeUnavailable, match=r"^device: onnxruntime has no device Hexagon, only CPU"
    ) as caught:
        measure(artifacts, tmp_path / "out", profile=profile)
    assert exit_code(caught.value) == 4
    assert not loopback.left(0)


@ort
def test_a_file_that_was_changed(loopback, artifacts, tmp_path):
    path = artifacts[1].path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EdgeKDError, match=f"^device: {path} is not the file that was saved"):
        measure(artifacts, tmp_path / "out")
    assert not list(tmp_path.glob("out/*/timing.json"))


def test_what_a_device_must_build_is_built_there(artifacts, tmp_path, monkeypatch):
    """As TensorRT's plans are: of the ONNX that was sent, whose timing it is."""
    profile = PROFILE.model_copy(update={"runtime": "tensorrt", "device": "cuda:0"})

    def build(onnx, out, built_for):
        assert built_for == profile
        (out / "model.plan").write_bytes(onnx.read_bytes()[::-1])
        return [out / "model.plan"]

    timed = []

    def bench(ready, *_, **__):
        timed.extend(ready)
        ran = {"runtime": profile.runtime, "device": profile.device, "size_bytes": 1}
        return [Timing.parse(timing_of(a, **ran), "test") for a in ready]

    module = SimpleNamespace(devices=lambda: ["cuda:0"], build=build, SUFFIXES=(".plan",))
    monkeypatch.setattr(runtimes, "get", lambda _: module)
    monkeypatch.setattr(remote_side.bench, "bench", bench)
    request = remote_side.Request(artifacts=[str(a.folder) for a in artifacts], out="out",
                                  profile=profile, how=QUICK)  # fmt: skip
    told = remote_side.serve(request, lambda items, *_: items)
    assert [t.artifact_sha256 for t in told] == [a.sha256 for a in artifacts]
    for ready, sent in zip(timed, artifacts, strict=True):
        assert ready.path.name == "model.plan"
        assert ready.path.read_bytes() == sent.path.read_bytes()[::-1]
        assert (ready.kind, ready.parents) == ("tensorrt", {sent.kind: sent.sha256})
        assert Artifact.load(ready.folder) == ready
    said = client.Said(result=[json.loads(t.model_dump_json()) for t in told])
    assert len(bench_remote._checked("device", said, artifacts, profile)) == 2


def test_two_of_one_name(artifacts, tmp_path):
    with pytest.raises(EdgeKDError, match="two artifacts are called one"):
        measure([artifacts[0], artifacts[0]], tmp_path / "out")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("kill -9 $$", "device did not measure: exit code|lost"),
        (f"echo {protocol.READY}; echo '{{\"begin\":\"timing\"}}'; echo torn >&2; exit 3",
         "device did not measure: torn"),
        (f"echo noise; echo {protocol.READY}; echo hello", 'says "hello", not a line of'),
        (f"echo {protocol.READY}; echo '{{\"result\":[]}}'", "timed 0 files of 2"),
        (f"echo {protocol.READY}; echo '{{\"result\":[{{}},{{}}]}}'", "device: model: Field"),
        (f"echo {protocol.READY}; echo '{{\"error\":\"a\\u001b[2Jb\"}}'", r"^device: a \[2Jb$"),
    ],
)  # fmt: skip
def test_a_stopwatch_that_fails(loopback, artifacts, tmp_path, module, message):
    python = python_there(tmp_path, "echo edgekd-python 3 11; echo edgekd-missing ", module)
    with pytest.raises(EdgeKDError, match=message):
        measure(artifacts, tmp_path / "out", python=python)
    assert not list(tmp_path.glob("out/*/timing.json"))
    assert not loopback.left(0)


def timing_of(artifact, **more):
    """As a stopwatch would write it."""
    machine = {"name": "cpu-1c", "cpu": "", "cores": 1, "memory_gb": 1, "system": "", "python": ""}
    return Timing.parse(
        {
            "model": artifact.model, "role": artifact.role, "precision": artifact.precision,
            "artifact_sha256": artifact.sha256, "runtime": "onnxruntime", "device": "CPU",
            "threads": 1, "samples_ms": (1.0,), "warmup": 1, "load_ms": 1, "throughput_ips": 1,
            "throughput_batch": 1, "params": artifact.params, "macs": artifact.macs,
            "size_bytes": artifact.size_bytes, "peak_mb": 1, "accuracy": ACCURACY,
            "machine": machine, "on_device": True, **more,
        },
        "test",
    ).model_dump(mode="json")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"artifact_sha256": "0" * 64}, r"device timed another file than \S+: its artifact_sha256"),
        ({"accuracy": None}, "its accuracy"),
        ({"device": "GPU"}, "its device"),
        ({"samples_ms": []}, "no stopwatch of ours"),
    ],
)
def test_what_a_device_says_is_checked(artifacts, more, message):
    good, bad = (timing_of(artifacts[0], **m) for m in ({}, more))
    said = client.Said(result=[good])
    assert bench_remote._checked("device", said, artifacts[:1], PROFILE)[0].on_device
    with pytest.raises(EdgeKDError, match=message):
        bench_remote._checked("device", client.Said(result=[bad]), artifacts[:1], PROFILE)


def test_bars():
    """Nested ones are not told of; one that was left early ends with what comes next."""
    told = []
    track = protocol.telling(lambda **fields: told.append(fields))
    for _ in track(range(2), "outer"):
        list(track("ab", "inner"))
    for _ in track(iter("xyz"), "left", 3):
        break
    told.append({"result": []})
    sent = "".join(json.dumps(s) + "\n" for s in told)
    shown = []

    def local(items, what, total):
        shown.append((what, total, [i.size for i in items]))
        return []

    lines = client.Lines(BytesIO(f"noise\n{protocol.READY}\n{sent}".encode()), "device")
    assert client.follow(lines, local).result == []
    assert shown == [("outer", 2, [1, 1]), ("left", 3, [])]


@ort
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_what_runs_there_ends_with_us(loopback, artifacts, tmp_path, stop):
    # Who runs the tests in the background may have told them to ignore Ctrl-C.
    code = f"""if True:
        import signal
        import sys
        from pathlib import Path
        from edgekd.bench.bench import How
        from edgekd.pipeline import bench_remote
        from edgekd.remote import ssh
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from edgekd.records import Artifact, Profile
        ssh.ORPHAN_SECONDS = 1
        def track(items, what, total=None):
            print("begun", flush=True)
            return items
        profile = Profile(name="test", runtime="onnxruntime", device="CPU", threads=1)
        artifacts = [Artifact.load(Path({str(artifacts[0].folder)!r}))]
        bench_remote.bench("device", artifacts, profile, Path({str(tmp_path / "out")!r}),
                     How(seconds=600, within=None), python=sys.executable, track=track)"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        begun = process.stdout.readline()
        running = loopback.left(0)
        process.send_signal(stop)
        said = process.communicate(timeout=30)[1]
    assert begun == b"begun\n", said
    assert len(running) >= 3  # a folder, the stopwatch and its worker
    if stop == signal.SIGINT:
        assert b"KeyboardInterrupt" in said
        assert not loopback.left(0)
    assert not loopback.left()
    assert not list(tmp_path.glob("out/*/timing.json"))


@ort
def test_the_stage(loopback, artifacts, tmp_path):
    run = SimpleNamespace(
        dataset=lambda: None, candidates=lambda _: artifacts, folder=tmp_path,
        record=SimpleNamespace(profile=PROFILE), track=lambda items, *_: items,
    )  # fmt: skip
    timings = bench.bench(run, short(0.1), runtime=None, host="device", host_python=sys.executable)
    assert [t.on_device for t in timings] == [True, True]
    assert Timing.load(tmp_path / "bench" / "one") == timings[0]
    with pytest.raises(EdgeKDError, match="leave one out"):
        bench.bench(run, short(1), runtime="onnxruntime", host="device")


def test_hashes_are_of_what_is_sent(artifacts):
    for name, content in bench_remote.sent(artifacts[0]).items():
        if isinstance(content, Path):
            assert sha256(content) == artifacts[0].files[name]
