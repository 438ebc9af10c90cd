import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd import runtimes
from edgekd.bench import bench as b
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

QUICK = b.short(0.001).model_copy(update={"least": 20, "batches": (1, 16)})
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


def test_over_budget():
    measured = {"p95_ms": 12.0, "params": 6_000_000, "size_bytes": 30_000_000, "peak_mb": 99.0}
    budget = Budget(latency_ms=10, params_m=6, size_mb=25)
    over = {"latency_ms": (12, 10), "size_mb": (30, 25)}
    assert b.over_budget(budget, **measured) == over
    assert b.over_budget(Budget(), **measured) == {}
    assert b.over_budget(Budget(memory_mb=98), **measured) == {"memory_mb": (99, 98)}


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
        if what == "timing":
            turns.extend(items)
        return items

    timings = b.bench(arts, profile, tmp_path / "out", QUICK, on_device=True, track=track)
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
    less = QUICK.model_copy(update={"throughput": False})
    (bare,) = b.measure([b.Runner(arts[0], profile, True)], less)
    assert (bare.throughput_ips, bare.throughput_batch) == (None, None)
    assert 10 < bare.peak_mb < 1000
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
def test_a_worker_that_dies(monkeypatch, tmp_path, script, error, words):
    art = save(tmp_path / "fake", lambda p: p.write_bytes(b"x"))
    interpreter(monkeypatch, tmp_path, script)
    with pytest.raises(EdgeKDError, match=words) as caught:
        b.bench([art], PROFILE, tmp_path / "out", on_device=False)
    assert type(caught.value) is error
    assert not (tmp_path / "out" / "fake" / "timing.json").exists()


def test_what_a_library_prints_is_no_answer():
    code = """if True:
        import os
        from edgekd.bench import worker
        def noisy(requests, answer):
            print("printed", flush=True)
            os.write(1, b"written")
            answer({"n": len(list(requests))})
        worker.serve = noisy
        raise SystemExit(worker.main([]))"""
    run = subprocess.run(
        [sys.executable, "-c", code], input="1\n2\n", capture_output=True, text=True, check=True
    )
    assert run.stdout == '{"n": 2}\n'
    assert run.stderr == "printed\nwritten"


def test_two_of_one_name(tmp_path):
    arts = [save(tmp_path / d / "int8", lambda p: p.write_bytes(b"x")) for d in "ab"]
    with pytest.raises(EdgeKDError, match="two artifacts are called int8"):
        b.bench(arts, PROFILE, tmp_path / "out", on_device=False)


@ort
def test_all_that_a_bench_looks_at(tmp_path, monkeypatch):
    """Small amounts of everything: each figure is there, with as many samples as were asked."""
    arts = [save(tmp_path / n, tiny) for n in ("one", "two")]
    how = b.How(seconds=0.02, least=8, enough=16, attempts=1, idle_s=(0.02,), cold=1, layers=2)
    monkeypatch.setattr(b, "PAUSED", 0.06)
    for t in b.bench(arts, PROFILE, tmp_path / "out", how, on_device=False):
        assert 8 <= len(t.samples_ms) <= 24
        assert len(t.yardstick_ms) == len(t.block_medians_ms) == 8
        assert list(t.idle_ms) == ["0.02"]
        assert len(t.idle_ms["0.02"]) == 3
        assert len(t.cold_ms) == 1
        assert t.cold_ms[0] > t.load_ms > 0
        assert 0.01 < t.cores_busy < 1.5  # of the one thread that it may use
        assert t.first_ms > 0
        assert 0 < t.resident_mb <= t.peak_mb
        assert min(len(x) for x in (t.prepare_ms, t.whole_ms, t.explain_ms)) >= 3
        assert t.attempts == 1
        assert t.roofline.ideal_ms > 0
        assert t.roofline.fraction == pytest.approx(
            t.roofline.ideal_ms / np.median(t.samples_ms), rel=1e-6
        )


TURN = {"samples_ms": [1.0], "cores_busy": 1.0, "yardstick_ms": 1.0}


class Paced:
    """A worker whose blocks take what a list says, one after the other."""

    def __init__(self, *blocks_ms):
        self.left = list(blocks_ms)

    def ask(self, runs):
        ms = self.left.pop(0)
        return TURN | {"samples_ms": [ms] * runs}


def agreed(monkeypatch, attempts, *blocks_ms):
    monkeypatch.setattr(b, "TURNS", (2, 2))
    found = [{"call_ms": 1.0}]
    watch = SimpleNamespace(tick=lambda: None)
    how = b.How(seconds=0.01, least=4, enough=4, attempts=attempts)
    b._until_they_agree([Paced(*blocks_ms)], found, how, watch, lambda items, *_: items)
    return found[0]


def test_turns_are_taken_again_until_blocks_agree(monkeypatch):
    found = agreed(monkeypatch, 3, 1.0, 2.0, 1.0, 1.05, 9, 9)
    assert (found["attempts"], found["stable"]) == (2, True)
    assert found["block_medians_ms"] == [1, 1.05]


def test_the_attempt_that_agrees_best_is_kept(monkeypatch):
    found = agreed(monkeypatch, 3, 1.0, 2.0, 1.0, 1.2, 1.0, 1.5)
    assert (found["attempts"], found["stable"]) == (3, False)
    assert found["block_medians_ms"] == [1, 1.2]


@pytest.mark.parametrize(
    ("call_ms", "turns", "calls"),
    [(1, 40, 680), (20, 40, 520), (1000, 13, 130), (50, 20, 200)],
)  # 662; 10 s / 20 ms; at least 130; 10 s: each rounded up to whole turns, of 10 calls or more
def test_as_many_calls_as_p99_needs_or_ten_seconds_or_130(call_ms, turns, calls):
    asked = []
    worker = SimpleNamespace(ask=lambda runs: asked.append(runs) or TURN)
    watch = SimpleNamespace(tick=lambda: None)
    b._turns([worker], [call_ms], b.How(), watch, lambda items, *_: items, "")
    assert sum(asked) == calls
    assert len(asked) == turns


def test_a_long_watch_has_more_turns():
    asked = []
    worker = SimpleNamespace(ask=lambda runs: asked.append(runs) or TURN)
    watch = SimpleNamespace(tick=lambda: None)
    how = b.How(seconds=600, enough=None)
    b._turns([worker], [10.0], how, watch, lambda items, *_: items, "")
    assert len(asked) == 60
    assert sum(asked) == 60_000


def test_a_pause_is_a_pause_of_the_whole_machine(monkeypatch):
    """Two files, calls of 5 s, 6 s of think time: from an answer to whatever comes next."""
    now, asked = [100.0], []
    monkeypatch.setattr(b.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def worker(i):
        def ask(once):
            asked.append((i, now[0]))
            now[0] += 5
            return {"ms": 1.0}

        return SimpleNamespace(ask=ask)

    found = [{}, {}]
    b._idle([worker(0), worker(1)], found, b.How(idle_s=(6.0,)), lambda items, *_: items)
    assert [f["idle_ms"] for f in found] == [{"6": [1.0, 1.0]}] * 2
    began = [100.0, 127.0]  # a call, two pauses and calls; then the other file
    assert asked == [(i, began[i] + 11 * k) for i in range(2) for k in range(3)]
