import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from edgekd import bench as b
from edgekd import runtimes
from edgekd.records import (
    Artifact,
    Budget,
    EdgeKDError,
    Metric,
    Profile,
    RuntimeUnavailable,
    Spec,
    Timing,
    sha256,
)
from edgekd.runtimes import Outputs

PROFILE = Profile(name="test", runtime="onnxruntime", device="CPU", threads=1)
ort = pytest.mark.skipif(
    "onnxruntime" not in runtimes.names() or find_spec("onnxruntime") is None,
    reason="pip install 'edgekd[onnxruntime]'",
)


def save(folder, write, **more):
    """An artifact in `folder` whose model is what `write(path)` makes."""
    folder.mkdir(parents=True)
    write(folder / "model.onnx")
    return Artifact(
        kind="onnx",
        model="tiny",
        files={"model.onnx": sha256(folder / "model.onnx")},
        spec=Spec(classes=("a", "b", "c"), size=(32, 40)),
        params=7,
        macs=11,
        **more,
    ).save(folder)


def tiny(path):
    """Image -> features = relu(image), logits = their means; as `edgekd export` would write it."""
    onnx = pytest.importorskip("onnx")
    h = onnx.helper
    floats = onnx.TensorProto.FLOAT
    nodes = [
        h.make_node("Relu", ["image"], ["features"]),
        h.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        h.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    image = h.make_tensor_value_info("image", floats, ["N", 3, 32, 40])
    outputs = [
        h.make_tensor_value_info("logits", floats, ["N", 3]),
        h.make_tensor_value_info("features", floats, ["N", 3, 32, 40]),
    ]
    graph = h.make_graph(nodes, "tiny", [image], outputs)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


@pytest.fixture
def clock(monkeypatch):
    """A stopwatch that moves only when told, in ns."""
    now = [0]
    monkeypatch.setattr(b.time, "perf_counter_ns", lambda: now[0])
    return now


@pytest.fixture
def fake(monkeypatch, clock, tmp_path):
    """Folder of an artifact whose session takes 2 ms an image and 1 ms a call; batches opened."""
    opened = []

    def open_session(artifact, profile, batch=None):
        opened.append(batch)

        def run(images):
            assert images.shape == (batch, 3, 32, 40)
            assert images.dtype == np.float32
            clock[0] += 2_000_000 * len(images) + 1_000_000
            return Outputs(np.zeros((len(images), 3)), images)

        return run

    monkeypatch.setattr(b, "open_session", open_session)
    folder = tmp_path / "fake"
    save(folder, lambda p: p.write_bytes(b"x"))
    return folder, opened


def test_time_ms(clock):
    calls = []

    def call():
        calls.append(None)
        clock[0] += len(calls) * 500_000

    np.testing.assert_array_equal(b.time_ms(call, warmup=2, runs=3), [1.5, 2, 2.5])


def test_percentiles_by_hand():
    assert b.percentiles(range(1, 102)) == {"p50": 51, "p90": 91, "p95": 96, "p99": 100}
    assert b.percentiles([1, 2])["p90"] == pytest.approx(1.9)


def test_interval():
    x = np.random.default_rng(0).normal(10, 1, 400)
    low, high = b.interval(x, 50)
    assert low < np.median(x) < high
    # 1.25 sd / sqrt(n) is the standard error of a normal sample's median
    assert (high - low) / 2 == pytest.approx(1.96 * 1.25 / 20, rel=0.3)
    assert b.interval(x, 50) == (low, high) != b.interval(x, 50, seed=1)
    assert b.interval([3.0] * 7, 95) == (3, 3)


def test_interval_knows_slow_moments():
    """The same samples, once in any order and once the slow ones together."""
    x = np.repeat([1.0, 2.0], 200) + np.random.default_rng(0).normal(0, 0.01, 400)
    mixed = b.interval(np.random.default_rng(1).permutation(x), 40)
    together = b.interval(x, 40)
    assert together[1] - together[0] > 3 * (mixed[1] - mixed[0])


def test_unstable():
    assert b.unstable([2, 3, 4]) == pytest.approx(2 / 3)
    assert b.unstable([5.0]) == 0


def test_over_budget():
    measured = {"p95_ms": 12.0, "params": 6_000_000, "size_bytes": 30_000_000, "peak_mb": 99.0}
    budget = Budget(latency_ms=10, params_m=6, size_mb=25)
    over = {"latency_ms": (12, 10), "size_mb": (30, 25)}
    assert b.over_budget(budget, **measured) == over
    assert b.over_budget(Budget(), **measured) == {}
    assert b.over_budget(Budget(memory_mb=98), **measured) == {"memory_mb": (99, 98)}


def test_measure(fake):
    folder, opened = fake
    found = b.measure(folder, PROFILE, runs=5, throughput_batch=4, seconds=0.01)
    assert found["samples_ms"] == [3] * 5
    assert found["throughput_ips"] == pytest.approx(4 / 0.009)
    assert (found["throughput_batch"], opened) == (4, [1, 4])
    assert found.keys() < Timing.model_fields.keys()


def test_static_batch_has_a_throughput_of_one_image(fake):
    folder, opened = fake
    static = PROFILE.model_copy(update={"static_batch": True})
    found = b.measure(folder, static, runs=1, seconds=0)
    assert found["throughput_ips"] == pytest.approx(1 / 0.003)
    assert (found["throughput_batch"], opened) == (1, [1, 1])


def test_worker(fake):
    first = {"folder": str(fake[0]), "profile": PROFILE.model_dump(mode="json"), "seed": 0}
    more = [{"runs": 2}, {"runs": 1}, {"throughput_batch": 2, "seconds": 0}]
    answers = []
    b.worker([json.dumps(r) for r in (first, *more)], answers.append)
    assert answers[0].keys() == {"load_ms", "call_ms"}
    assert answers[0]["call_ms"] == 3
    assert answers[1:3] == [{"samples_ms": [3, 3]}, {"samples_ms": [3]}]
    assert answers[3].keys() == {"peak_mb", "throughput_ips", "throughput_batch"}


def test_the_same_seed_is_the_same_image(fake):
    one, same, other = (b._open(fake[0], PROFILE, seed).image for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert abs(one.std() - 1) < 0.05


@ort
def test_bench(tmp_path):
    accuracy = Metric(value=0.9, low=0.8, high=0.95)
    arts = [
        save(tmp_path / "m" / "one", tiny, metrics={"test_balanced_accuracy": accuracy}),
        save(tmp_path / "m" / "two", tiny, precision="int8", role="teacher"),
    ]
    profile = PROFILE.model_copy(update={"budget": Budget(memory_mb=1, params_m=1)})
    turns = []

    def track(items, what, total=None):
        turns.extend(items)
        return items

    timings = b.bench(
        arts, profile, tmp_path / "out", seconds=0.001, min_samples=20, on_device=True, track=track
    )
    assert turns == [0, 1, 1, 0] * 4
    for t, art in zip(timings, arts, strict=True):
        assert Timing.load(tmp_path / "out" / art.folder.name) == t
        assert len(t.samples_ms) >= 24  # 8 blocks of 3
        assert len(t.block_medians_ms) == 8
        assert min(t.samples_ms) > 0
        assert t.throughput_ips > 0
        assert 10 < t.peak_mb < 1000
        assert t.over_budget == {"memory_mb": (t.peak_mb, 1)}
        assert (t.artifact_sha256, t.size_bytes) == (art.sha256, art.size_bytes)
        assert (t.params, t.macs, t.threads, t.throughput_batch) == (7, 11, 1, 16)
        assert t.on_device
        assert "onnxruntime" in t.versions
    assert (timings[0].accuracy, timings[1].accuracy) == (accuracy, None)
    assert (timings[1].precision, timings[1].role) == ("int8", "teacher")


@ort
def test_a_file_that_does_not_load(tmp_path):
    good = save(tmp_path / "good", tiny)
    bad = save(tmp_path / "bad", lambda p: p.write_bytes(b"not a model"))
    with pytest.raises(EdgeKDError, match=r"measuring .*bad failed: \S"):
        b.bench([good, bad], PROFILE, tmp_path / "out", on_device=False)
    assert not list(tmp_path.glob("out/*/timing.json"))


def interpreter(monkeypatch, tmp_path, script):
    """Let a shell script stand in for the worker's Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("echo a >&2; echo no such thing >&2; exit 1", EdgeKDError, "failed: no such thing$"),
        ("echo device NPU is not here >&2; exit 4", RuntimeUnavailable, "device NPU is not here$"),
        ("kill -9 $$", EdgeKDError, "killed by signal 9, it said nothing"),
        ("read line; exit 7", EdgeKDError, "exit code 7, it said nothing"),
    ],
)
def test_a_worker_that_dies(monkeypatch, tmp_path, fake, script, error, words):
    art = Artifact.load(fake[0])
    interpreter(monkeypatch, tmp_path, script)
    with pytest.raises(EdgeKDError, match=words) as caught:
        b.bench([art], PROFILE, tmp_path / "out", on_device=False)
    assert type(caught.value) is error
    assert not (tmp_path / "out" / "fake" / "timing.json").exists()


def test_what_a_library_prints_is_no_answer():
    code = """if True:
        import os
        from edgekd import bench
        def noisy(requests, answer):
            print("printed", flush=True)
            os.write(1, b"written")
            answer({"n": len(list(requests))})
        bench.worker = noisy
        raise SystemExit(bench._main())"""
    run = subprocess.run(
        [sys.executable, "-c", code], input="1\n2\n", capture_output=True, text=True, check=True
    )
    assert run.stdout == '{"n": 2}\n'
    assert run.stderr == "printed\nwritten"


def test_two_of_one_name(tmp_path):
    arts = [save(tmp_path / d / "int8", lambda p: p.write_bytes(b"x")) for d in "ab"]
    with pytest.raises(EdgeKDError, match="two artifacts are called int8"):
        b.bench(arts, PROFILE, tmp_path / "out", on_device=False)
