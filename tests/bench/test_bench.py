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
    assert turns == [0, 1, 1, 0] * 10
    for t, art in zip(timings, arts, strict=True):
        assert Timing.load(tmp_path / "out" / art.folder.name) == t
        assert len(t.samples_ms) >= 20  # 20 blocks of 1 or more
        assert len(t.block_medians_ms) == 20
        assert (t.within, t.width, t.ended) == (None, None, "")  # all the seconds were asked for
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
    how = b.How(seconds=0.01, least=100, enough=100, idle_s=(0.02,), cold=1, layers=2)
    monkeypatch.setattr(b, "PAUSED", 0.06)
    for t in b.bench(arts, PROFILE, tmp_path / "out", how, on_device=False):
        assert len(t.samples_ms) == 100
        assert len(t.yardstick_ms) == len(t.block_medians_ms) == 20
        assert t.ended == "cap"  # 20 ms are over before the second look
        assert list(t.idle_ms) == ["0.02"]
        assert len(t.idle_ms["0.02"]) == 3
        assert len(t.cold_ms) == 1
        assert t.cold_ms[0] > t.load_ms > 0
        assert 0.01 < t.cores_busy < 1.5  # of the one thread that it may use
        assert t.first_ms > 0
        assert 0 < t.resident_mb <= t.peak_mb
        assert min(len(x) for x in (t.prepare_ms, t.whole_ms, t.explain_ms)) >= 3
        assert t.roofline.ideal_ms > 0
        assert t.roofline.fraction == pytest.approx(
            t.roofline.ideal_ms / np.median(t.samples_ms), rel=1e-6
        )


class Paced:
    """A worker whose turns take what a function of their number says, on a clock of the test's."""

    def __init__(self, clock, ms):
        self.clock, self.ms, self.turns, self.runs = clock, ms, 0, []

    def ask(self, runs):
        took = self.ms(self.turns)
        self.turns += 1
        self.runs.append(runs)
        self.clock[0] += runs * took / 1e3
        return {"samples_ms": [took] * runs, "cores_busy": 1.0, "yardstick_ms": 1.0}


def taken(monkeypatch, how, *files, call_ms=None, track=lambda items, *_: items):
    """(what is found of each file, the workers) for turns that take as long as `files` say."""
    clock = [5.0]
    monkeypatch.setattr(b.time, "perf_counter", lambda: clock[0])
    workers = [Paced(clock, ms) for ms in files]
    found = [{"call_ms": ms} for ms in call_ms or [w.ms(0) for w in workers]]
    b._in_turns(workers, found, how, SimpleNamespace(tick=lambda: None), track)
    return found, workers


def wavering(ms, share, seed):
    """About `ms`, another time each turn; the logarithm's standard deviation is `share`."""
    drawn = ms * np.random.default_rng(seed).lognormal(0, share, 10_000)
    return lambda turn: float(drawn[turn])


def test_a_quiet_run_ends_at_the_second_look(monkeypatch):
    found, workers = taken(monkeypatch, b.How(), lambda _: 4.0, lambda _: 1.0)
    assert [w.turns for w in workers] == [50, 50]  # 40 before the first look, a quarter more
    assert [(f["width"], f["ended"], f["stable"]) for f in found] == [
        (None, "narrow", True), (0, "narrow", True),
    ]  # fmt: skip
    assert all(len(f["samples_ms"]) >= 662 for f in found)


def test_a_machine_that_changes_its_pace_for_all_is_no_reason_to_go_on(monkeypatch):
    """Twice as slow in the second half, and both are: the ratio is known, the pace is said."""
    pace = lambda turn: 1 + (turn >= 25)  # noqa: E731
    found, workers = taken(monkeypatch, b.How(), lambda t: 4.0 * pace(t), lambda t: 1.0 * pace(t))
    assert workers[1].turns == 50
    assert found[1]["width"] == 0
    assert b.unstable(found[1]["block_medians_ms"]) > 0.5


def test_turns_go_on_until_the_ratio_is_known(monkeypatch):
    """The more a file wavers, the more turns; a wider interval asks for fewer of them."""

    def turns(share, within):
        how = b.How(within=within, seconds=1e6, least=40, enough=40)
        found, workers = taken(monkeypatch, how, lambda _: 4.0, wavering(1.0, share, 3))
        assert found[1]["ended"] == "narrow"
        assert found[1]["width"] <= within
        return workers[0].turns

    assert turns(0.2, 5) > turns(0.1, 5) > turns(0.01, 5) == 25
    assert turns(0.1, 5) > turns(0.1, 10)


def test_one_narrow_look_may_be_luck(monkeypatch):
    """The ratio seems known at the first look, and is not at the second."""
    jumps = lambda turn: 1.0 if turn < 20 else 1.0 + turn % 7  # noqa: E731
    how = b.How(seconds=1.0, least=40, enough=40)
    found, workers = taken(monkeypatch, how, lambda _: 1.0, jumps)
    assert workers[0].turns > 25
    assert (found[1]["ended"], found[1]["stable"]) == ("cap", False)


def test_turns_end_with_the_seconds_however_little_is_known(monkeypatch):
    how = b.How(seconds=3.0)
    what = []

    def track(items, said, total):
        what.append((said, total))
        return items

    files = [wavering(2.0, 0.8, 1), wavering(1.0, 0.8, 2), lambda _: 1.0]
    found, workers = taken(monkeypatch, how, *files, call_ms=[2.0, 1.0, 1.0], track=track)
    spent = sum(sum(f["samples_ms"]) for f in found) / 1e3
    assert 8.0 < spent <= 9.5  # three seconds a file; the last turns were planned by the pace
    assert {f["ended"] for f in found} == {"cap"}
    assert [f["stable"] for f in found] == [True, False, False]
    assert found[1]["width"] > 5
    assert what[0] == ("timing", 120)
    assert what[1][0].startswith("timing on, ratios known within ")
    assert what[1][0].endswith(" % (5 % asked)")
    assert len({w.turns for w in workers}) == 1


def test_of_one_file_the_median_is_to_be_known(monkeypatch):
    how = b.How(seconds=2.0, least=40, enough=40)
    (quiet,), _ = taken(monkeypatch, how, wavering(1.0, 0.02, 1))
    assert (quiet["ended"], quiet["stable"]) == ("narrow", True)
    assert 0 < quiet["width"] <= 5
    (two,), _ = taken(monkeypatch, how, lambda turn: 1.0 + (turn // 9) % 2)
    assert (two["ended"], two["stable"]) == ("cap", False)


@pytest.mark.parametrize(
    ("call_ms", "turns", "calls"),
    [(1, 40, 680), (20, 40, 520), (1000, 20, 140), (50, 20, 200)],
)  # 662; 10 s / 20 ms; at least 130; 10 s: each rounded up to whole turns, of 10 calls or more
def test_as_many_calls_as_p99_needs_or_ten_seconds_or_130(call_ms, turns, calls):
    count, (runs,) = b._plan([call_ms], b.How())
    assert (count, count * runs) == (turns, calls)


def test_all_the_seconds_where_nothing_is_asked_of_the_ratio(monkeypatch):
    """A long watch has more turns; blocks that differ are not steady, as in the rounds of two."""
    assert b._plan([10.0], b.How(seconds=600, within=None)) == (60, [1000])
    pace = lambda turn: 1.0 + (turn >= 20)  # noqa: E731
    found, _ = taken(monkeypatch, b.short(1.0), pace, lambda _: 1.0)
    assert [f["stable"] for f in found] == [False, True]
    assert [len(f["samples_ms"]) for f in found] == [1000, 1000]
    assert "width" not in found[0]


def test_a_pause_is_a_pause_of_the_whole_machine(monkeypatch):
    """Two files, calls of 5 s, 4 s of think time: from an answer to whatever comes next."""
    monkeypatch.setattr(b, "PAUSED", 12.0)
    now, asked = [100.0], []
    monkeypatch.setattr(b.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def worker(i):
        def ask(once):
            asked.append((i, now[0]))
            now[0] += 5
            return {"ms": 1.0}

        return SimpleNamespace(ask=ask)

    found = [{}, {}]
    b._idle([worker(0), worker(1)], found, b.How(idle_s=(4.0,)), lambda items, *_: items)
    assert [f["idle_ms"] for f in found] == [{"4": [1.0, 1.0, 1.0]}] * 2
    began = [100.0, 132.0]  # a call, three pauses and calls; then the other file
    assert asked == [(i, began[i] + 9 * k) for i in range(2) for k in range(4)]


def test_long_pauses_are_for_the_file_that_is_deployed(monkeypatch):
    slept = []
    monkeypatch.setattr(b.time, "sleep", slept.append)
    worker = SimpleNamespace(ask=lambda once: {"ms": 1.0})
    found = [{}, {}, {}]
    b._idle([worker] * 3, found, b.How(), lambda items, *_: items)
    assert [list(f["idle_ms"]) for f in found] == [["0.5", "2"], ["0.5", "2"], ["0.5", "2", "10"]]
    assert sum(slept) <= 30  # of the two minutes for three files
