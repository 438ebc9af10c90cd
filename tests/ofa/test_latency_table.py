"""What a latency table predicts, how it is measured, and that measuring can be stopped."""

import json
import os
import random
import re
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgekd import runtimes
from edgekd.ofa import calibrate, latency_table, proxy_graphs, spaces
from edgekd.ofa.latency_table import Table
from edgekd.records import Arch, EdgeKDError, Profile, RuntimeUnavailable

SPACE, PIXELS = "ofa-lite-w1.0", (96, 128)
PROFILE = Profile(
    name="box", runtime="openvino", device="CPU", precisions=("int8", "fp32"), threads=1,
    space=SPACE, resolutions=PIXELS, peak_gflops=100, bandwidth_gbs=10,
)  # fmt: skip
BESIDE = Path(__file__).parents[3] / "shared" / "facts" / "ofa"
NOTE10 = Path(os.environ.get("EDGEKD_OFA_TABLES", BESIDE))


def installed(name):
    return pytest.param(
        name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"pip install {name}")
    )


def some(count, space=SPACE, pixels=PIXELS):
    rng = random.Random(0)
    return [spaces.sample(space, rng, pixels) for _ in range(count)]


def table(space=SPACE, pixels=PIXELS, **more):
    """A table with a different number for every piece."""
    rng = np.random.default_rng(0)
    pieces = {k: rng.uniform(0.01, 0.1) for k in latency_table.distinct(space, pixels, 3)}
    known = {"runtime": "openvino", "device": "CPU", "precision": "int8", "threads": 1}
    return Table(space=space, resolutions=pixels, classes=3, estimated=False, pieces=pieces,
                 **(known | more))  # fmt: skip


def plain(made, arch):
    return sum(made.pieces[latency_table.key(p)] for p in spaces.pieces(arch, made.classes))


# ---- the pieces, by a table that others published


def note10_keys(arch):
    """The keys of a sub-net's pieces in the tables that OFA's authors measured on a Note 10."""
    for p in spaces.pieces(arch, 1000):
        out = (p.size + p.stride - 1) // p.stride
        shape = f"input:{p.size}x{p.size}x{p.cin}-output:{out}x{out}x{p.cout}"
        if p.kind == "block":
            yield (
                f"expanded_conv-{shape}-expand:{p.mid}-kernel:{p.kernel}-stride:{p.stride}"
                f"-idskip:{p.skip:d}-se:{p.se:d}-hs:{p.act == 'h_swish':d}"
            )
        elif p.kind == "classifier":
            yield f"Logits-input:1x1x{p.cin}-output:{p.cout}"
        else:
            yield f"{ {'stem': 'Conv', 'final_expand': 'Conv_1', 'mix': 'Conv_2'}[p.kind] }-{shape}"
        if p.kind == "final_expand":
            yield f"AvgPool2D-input:{out}x{out}x{p.cout}-output:1x1x{p.cout}"


def same_everywhere(kernel, expand, depth, pixels):
    return Arch(space="ofa-mbv3-w1.2", kernel=(kernel,) * 20, expand=(expand,) * 20,
                depth=(depth,) * 5, resolution=pixels)  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "ms"),
    [
        (same_everywhere(7, 6, 4, 224), 92.398),
        (same_everywhere(3, 3, 2, 160), 9.8903),
        (same_everywhere(5, 4, 3, 192), 27.8356),
        (same_everywhere(3, 6, 4, 224), 57.0819),
        (spaces.named("ofa-595")[1].model_copy(update={"resolution": 224}), 46.904),
    ],
)
def test_sums_of_the_published_table(arch, ms):
    path = NOTE10 / f"note10_{arch.resolution}.yaml"
    if not path.exists():
        pytest.skip(f"no {path}: set EDGEKD_OFA_TABLES to the folder of OFA's note10 tables")
    found = re.findall(r"^(\S+):\n(?:  .*\n)*?  mean: (\S+)", path.read_text(), re.MULTILINE)
    measured = {name: float(mean) for name, mean in found}
    assert sum(measured[k] for k in note10_keys(arch)) == pytest.approx(ms, rel=1e-4)


@pytest.mark.parametrize("space", spaces.SPACES)
def test_every_network_is_made_of_distinct_pieces(space):
    known = latency_table.distinct(space, PIXELS, 3)
    for arch in some(20, space):
        assert {latency_table.key(p) for p in spaces.pieces(arch, 3)} <= known.keys()
    assert all(latency_table.key(p) == name for name, p in known.items())


# ---- prediction


@pytest.mark.parametrize("space", spaces.SPACES)
def test_without_a_correction_a_prediction_is_the_sum(space):
    made = table(space)
    archs = some(30, space)
    np.testing.assert_allclose(made.predict(archs), [plain(made, a) for a in archs])


def test_a_correction_is_added_for_each_block():
    names = ["96px", "128px", "stage1", "stage1+", "stage3 k5", "stage6 e4"]
    correction = dict(zip(names, [0.5, 0.25, 0.01, 0.02, 0.04, 0.08], strict=True))
    made = table(scale=0.5, constant_ms=-1.0, correction=correction)
    arch = spaces.uniform(SPACE, "max", 96).model_copy(
        update={"kernel": (5,) * 21, "expand": (4,) * 21}
    )
    area = (96 / 128) ** 2  # corrections are ms at the most pixels
    blocks = 0.01 + 3 * 0.02 + 4 * 0.04 + 0.08
    wanted = 0.5 * plain(made, arch) - 1 + 0.5 + area * blocks
    assert made.predict([arch])[0] == pytest.approx(wanted)


def test_places_beyond_the_depth_cost_nothing():
    made = table()
    for arch in some(10):
        np.testing.assert_array_equal(made.predict([arch]), made.predict([spaces.canonical(arch)]))


def test_fifty_thousand_in_a_moment():
    made = latency_table.tabulate(table(correction={"stage1": 0.1}))
    rng = np.random.default_rng(0)
    rows = rng.integers(0, made.genome.options, (50_000, len(made.genome.options)))
    start = time.perf_counter()
    ms = made.predict(*made.genome.split(rows))
    assert time.perf_counter() - start < 5
    assert ms.shape == (50_000,)
    few = made.predict(*made.genome.split(rows[:7]))
    np.testing.assert_array_equal(few, ms[:7])


def test_a_search_at_some_of_the_resolutions():
    made = latency_table.tabulate(table())
    genes = made.genome.split(made.genome.encode([spaces.uniform(SPACE, "mid", 128)]))
    one = made.over([128])(*genes[:3], np.zeros(1, int))
    np.testing.assert_array_equal(one, made.predict(*genes))
    with pytest.raises(EdgeKDError, match=r"knows ofa-lite-w1.0 at \(96, 128\) px, not at \[64\]"):
        made.over([64])


# ---- what is learnt from whole networks


def test_a_fit_finds_what_the_sum_lacks():
    """Whole networks that cost 0.7 of the sum, more at one kernel, and a constant."""
    made, archs = table(), some(80)
    sums = np.array([plain(made, a) for a in archs])
    wide = np.array([sum(a.kernel[i] == 7 for i in spaces.used(a)) for a in archs])
    ms = 0.7 * sums + 0.004 * wide * np.array([(a.resolution / 128) ** 2 for a in archs]) + 0.3
    fit = latency_table.fitted(made, archs, ms)
    assert fit.plain_errors.mape == pytest.approx(100 * np.mean(np.abs(sums / ms - 1)))
    assert fit.errors.mape < 1.5 < fit.plain_errors.mape
    assert fit.errors.within10 == 1
    assert fit.errors.nets == 80
    unseen = some(120)[80:]
    near = [0.7 * plain(made, a) + 0.3 for a in unseen]
    assert np.abs(fit.predict(unseen) / near - 1).mean() < 0.06


def test_errors_by_hand():
    e = latency_table.errors(np.array([1.1, 2.0, 2.7]), np.array([1.0, 2.5, 3.0]))
    assert e.mape == pytest.approx((10 + 20 + 10) / 3)
    assert e.kendall == 1
    assert e.nets == 3
    assert latency_table.errors(np.array([3.0, 2, 1]), np.array([1.0, 2, 3])).kendall == -1
    assert latency_table.errors(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])).kendall == (
        pytest.approx(4 / 6)
    )


# ---- a device that is absent


def test_the_roofline_by_hand():
    made = latency_table.estimate(PROFILE, "int8", classes=3)
    assert made.estimated
    stem = 3 * 32 * 9
    macs, moved = stem * 64**2, 3 * 128**2 + 32 * 64**2 + stem
    key = "stem 128px 3-0-32 k3 s2 relu6"
    assert made.pieces[key] == pytest.approx(max(2 * macs / 100e6, moved / 10e6))
    # 24 -> 144 -> 24 channels at 32 pixels, kernel 5
    weights = 24 * 144 + 144 * 25 + 144 * 24
    macs = weights * 32**2
    moved = 32**2 * (24 + 4 * 144 + 24) + weights
    key = "block 32px 24-144-24 k5 s1 relu6 skip"
    assert made.pieces[key] == pytest.approx(max(2 * macs / 100e6, moved / 10e6))
    arch = spaces.uniform(SPACE, "min", 96)
    assert made.predict([arch])[0] == pytest.approx(plain(made, arch))


def test_an_estimate_needs_its_figures():
    bare = PROFILE.model_copy(update={"peak_gflops": None})
    with pytest.raises(EdgeKDError, match="set peak_gflops and bandwidth_gbs"):
        latency_table.estimate(bare, "int8", classes=3)


# ---- where tables are


def test_a_table_is_found_where_it_was_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert latency_table.find(PROFILE, "int8") is None
    folder = latency_table.cached(PROFILE, "int8")
    assert tmp_path in folder.parents
    folder.mkdir(parents=True)
    made = table().save(folder)
    assert latency_table.find(PROFILE, "int8") == made
    other = [
        (PROFILE, "fp32"),
        *(
            (PROFILE.model_copy(update={field: value}), "int8")
            for field, value in {
                "threads": 2, "resolutions": (96,), "space": "ofa-mbv3-w1.0",
                "runtime": "onnxruntime", "options": {"a": 1},
            }.items()
        ),
    ]  # fmt: skip
    folders = {latency_table.cached(*x) for x in other}
    assert len(folders | {folder}) == 7


def test_a_table_that_travels_with_the_profile(tmp_path):
    made = table().save(tmp_path)
    theirs = PROFILE.model_copy(update={"latency_table": str(tmp_path / Table.FILE)})
    assert latency_table.find(theirs, "int8") == made

    def refused(words, precision="int8", **changes):
        with pytest.raises(EdgeKDError, match=words):
            latency_table.find(theirs.model_copy(update=changes), precision)

    refused("for precision int8, profile box has fp32", precision="fp32")
    refused("for space ofa-lite-w1.0, profile box has ofa-mbv3-w1.0", space="ofa-mbv3-w1.0")
    refused("for runtime openvino, profile box has onnxruntime", runtime="onnxruntime")
    refused("has no 112 px", resolutions=(96, 112))
    refused("cannot read", latency_table=str(tmp_path / "none.json"))
    (tmp_path / "torn.json").write_text('{"schema')
    refused("cannot read", latency_table=str(tmp_path / "torn.json"))


# ---- measuring


@pytest.fixture
def stopwatch(monkeypatch):
    """A worker whose every reading is fixed by the graph's name and the turn; turns asked of it."""
    asked = []

    def worker(request):
        profile = Profile.model_validate(request["profile"])
        pieces = latency_table.distinct(profile.space, profile.resolutions, request["classes"])
        archs = calibrate._whole(profile, request["nets"], request["seed"])
        for turn in range(request["first"], request["rounds"]):
            asked.append(turn)
            fastest = {k: random.Random(f"{k} {turn}").uniform(0.01, 0.02) for k in pieces}
            whole = {
                spaces.title(a): len(spaces.used(a)) * random.Random(f"{a} {turn}").uniform(1, 1.1)
                for a in archs
            }
            yield json.dumps({"min": fastest, "p50": whole, "p95": 1.1})

    monkeypatch.setattr(calibrate, "_worker", worker)
    return asked


def measured(out, **more):
    made = calibrate.calibrate(PROFILE, "int8", out, **({"classes": 3, "nets": 24} | more))
    return made.model_copy(update={"machine": None})


def test_stopped_and_resumed_is_as_undisturbed(stopwatch, tmp_path):
    pytest.importorskip("openvino")
    whole = measured(tmp_path / "whole")
    assert (tmp_path / "whole" / Table.FILE).exists()
    assert stopwatch == list(range(calibrate.ROUNDS))
    assert whole.p95_ratio == pytest.approx(1.1)
    assert len(whole.nets) == whole.errors.nets == 24
    stopwatch.clear()

    def killed(items, what, total=None):
        for i, item in enumerate(items):
            if i == 3:
                raise KeyboardInterrupt
            yield item

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        measured(out, track=killed)
    assert not (out / Table.FILE).exists()
    with (out / calibrate.LOG).open("a") as f:
        f.write('{"min": {"stem 96px 3-0-')  # torn
    stopwatch.clear()
    assert measured(out) == whole
    assert stopwatch == list(range(3, calibrate.ROUNDS))


def test_another_request_starts_afresh(stopwatch, tmp_path):
    pytest.importorskip("openvino")

    def first(items, what, total=None):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, track=first)
    stopwatch.clear()
    measured(tmp_path, seed=1)
    assert stopwatch == list(range(calibrate.ROUNDS))


@pytest.mark.parametrize("runtime", [installed("onnxruntime"), installed("openvino")])
def test_a_real_calibration(runtime, tmp_path):
    small = PROFILE.model_copy(update={"runtime": runtime, "resolutions": (32,)})
    turns = []

    def track(items, what, total=None):
        turns.append(total)
        return items

    made = calibrate.calibrate(small, "int8", tmp_path, classes=3, nets=12, rounds=2, track=track)
    assert turns == [2]
    assert Table.load(tmp_path) == made
    assert made.pieces.keys() == latency_table.distinct(SPACE, (32,), 3).keys()
    assert min(made.pieces.values()) > 0
    assert not made.estimated
    assert made.p95_ratio >= 1
    ends = [spaces.uniform(SPACE, end, 32) for end in ("min", "max")]
    low, high = made.predict(ends)
    assert 0 < low < high < 1000
    assert runtime in made.versions


def test_a_device_that_is_not_here(tmp_path):
    pytest.importorskip("openvino")
    absent = PROFILE.model_copy(update={"device": "NPU7"})
    with pytest.raises(RuntimeUnavailable, match=r"openvino sees no device NPU7 here, only .*CPU"):
        calibrate.calibrate(absent, "int8", tmp_path, classes=3)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in")
def test_a_worker_that_dies_is_told(monkeypatch, tmp_path):
    pytest.importorskip("openvino")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    python.chmod(0o755)
    monkeypatch.setattr(calibrate.sys, "executable", str(python))
    with pytest.raises(EdgeKDError, match="measuring failed: out of memory"):
        calibrate.calibrate(PROFILE, "int8", tmp_path / "out", classes=3)


# ---- the graphs that stand in


@pytest.mark.parametrize("space", spaces.SPACES)
def test_a_stand_in_has_the_waist_of_its_network(space, tmp_path):
    """Outputs have the shapes of the torch network's, and there are as many weights."""
    torch, onnx = pytest.importorskip("torch"), pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from edgekd.models import zoo
    from edgekd.ofa import supernet

    here = PROFILE.model_copy(update={"runtime": "onnxruntime"})
    for arch in some(2, space, (64, 160)):
        size = (arch.resolution,) * 2
        waist = zoo.Waist(supernet.build(arch, 3), size).eval()
        path = tmp_path / "model.onnx"
        path.write_bytes(proxy_graphs.network(arch, 3, "fp32"))
        image = np.zeros((1, 3, *size), np.float32)
        given = runtimes.get("onnxruntime").load(path, here, "fp32", 1)(image)
        with torch.inference_mode():
            wanted = waist(torch.from_numpy(image))
        assert [x.shape for x in given] == [tuple(x.shape) for x in wanted]
        graph = onnx.load(path).graph
        weights = sum(np.prod(t.dims) for t in graph.initializer if len(t.dims) > 1)
        assert weights == sum(v.numel() for v in waist.net.parameters() if v.ndim > 1)


def test_a_stand_in_runs_as_the_deployed_file_does(tmp_path):
    """OpenVINO compiles both to the same kernels in the same precisions."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("nncf")
    from edgekd.ofa import supernet
    from edgekd.pipeline import trial
    from edgekd.records import Spec
    from edgekd.runtimes import openvino

    arch = spaces.uniform(SPACE, "min", 64)
    images = np.random.default_rng(0).standard_normal((8, 3, 64, 64), np.float32)
    net = supernet.build(arch, 3).eval()
    supernet.recalibrate(net, [torch.from_numpy(images)])
    spec = Spec(classes=("a", "b", "c"), size=(64, 64))
    for_ort = trial.deployed(net, arch, spec, "int8", images, tmp_path / "ort", "onnxruntime")
    assert for_ort.path.suffix == ".onnx"
    real = trial.deployed(net, arch, spec, "int8", images, tmp_path)
    stand_in = tmp_path / "standin.onnx"
    stand_in.write_bytes(proxy_graphs.network(arch, 3, "int8"))

    def ran(path):
        graph = openvino.compiled(path, PROFILE, "int8", 1).get_runtime_model()
        told = [op.get_rt_info() for op in graph.get_ops()]
        heavy = ("Convolution", "GroupConvolution")
        return Counter(
            (kind, t["runtimePrecision"].value)
            for t in told
            if (kind := t["layerType"].value) in heavy
        )

    assert ran(stand_in) == ran(real.path)
    assert {precision for _, precision in ran(real.path)} <= {"i8", "u8"}


def test_no_graph_in_an_unknown_precision():
    with pytest.raises(EdgeKDError, match="no graphs in int4: fp32, fp16, bf16 or int8"):
        proxy_graphs.network(spaces.uniform(SPACE, "min"), 3, "int4")
