"""The roofline against numbers worked out by hand, and tiny real nets profiled in each runtime."""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd import runtimes
from edgekd.bench import roofline as r
from edgekd.records import Artifact, EdgeKDError, Peak, Profile, Spec, sha256
from edgekd.runtimes import NodeTime

PEAK = Peak(gflops={"int8": 400, "fp32": 100}, bandwidth_gbs=20, threads=1, how="by hand")
IMAGE = np.random.default_rng(0).normal(size=(1, 3, 32, 40)).astype(np.float32)
STEM = 3 * 3 * 3 * 16 * 16 * 20  # MACs: 3 x 3 kernels, 3 channels to 16, stride 2
DEPTHWISE = 3 * 3 * 16 * 16 * 20
HEAD = 16 * 3


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"pip install 'edgekd[{name}]'")


def here(name, **more):
    return Profile(name="test", runtime=name, device="CPU", threads=1, **more)


def net(path, quantised=False):
    """Convolution, depthwise convolution, pool, linear; quantised: Q/DQ before the first two."""
    onnx = pytest.importorskip("onnx")
    h, floats = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    constants = {
        "stem.weight": rng.normal(0, 0.2, (16, 3, 3, 3)).astype(np.float32),
        "depthwise.weight": rng.normal(0, 0.2, (16, 1, 3, 3)).astype(np.float32),
        "head.weight": rng.normal(0, 0.2, (16, 3)).astype(np.float32),
        "scale": np.float32(0.02),
        "zero": np.uint8(128),
        "plain_zero": np.int8(0),
    }
    nodes = []

    def rounded(name, zero):
        if not quantised:
            return name
        pair = (
            ("QuantizeLinear", name, f"{name}.q"),
            ("DequantizeLinear", f"{name}.q", f"{name}.dq"),
        )
        for kind, given, made in pair:
            nodes.append(h.make_node(kind, [given, "scale", zero], [made], name=f"{kind} {name}"))
        return f"{name}.dq"

    def convolve(given, layer, out, **more):
        inputs = [rounded(given, "zero"), rounded(f"{layer}.weight", "plain_zero")]
        nodes.append(h.make_node("Conv", inputs, [out], name=layer, pads=[1] * 4, **more))

    convolve("image", "stem", "halved", strides=[2, 2])
    convolve("halved", "depthwise", "mixed", group=16)
    nodes.append(h.make_node("Relu", [rounded("mixed", "zero")], ["features"], name="act"))
    nodes.append(h.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"))
    nodes.append(h.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    nodes.append(h.make_node("Gemm", ["flat", "head.weight"], ["logits"], name="head"))
    image, logits, features = (
        h.make_tensor_value_info(name, floats, ["N", *shape])
        for name, shape in (("image", (3, 32, 40)), ("logits", (3,)), ("features", (16, 16, 20)))
    )
    initial = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = h.make_graph(nodes, "net", [image], [logits, features], initial)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def artifact(folder, precision="fp32", layer="stage1 16x16x20"):
    folder.mkdir()
    net(folder / "model.onnx", precision == "int8")
    return Artifact(
        kind="onnx", model="net", precision=precision, layer=layer,
        files={"model.onnx": sha256(folder / "model.onnx")},
        spec=Spec(classes=("a", "b", "c"), size=(32, 40)),
        params=1, macs=STEM + DEPTHWISE + HEAD,
    ).save(folder)  # fmt: skip


# ---- by hand


def test_roofline_of_arithmetic():
    """2 * 50e6 operations at 400e9/s are 0.25 ms; 2e6 bytes at 20e9/s are 0.1 ms."""
    found = r.roofline(macs=50_000_000, moved_bytes=2_000_000, p50_ms=1.0, precision="int8",
                       peak=PEAK)  # fmt: skip
    assert found.ideal_ms == pytest.approx(0.25)
    assert found.fraction == pytest.approx(0.25)
    assert found.intensity == pytest.approx(50)
    assert (found.bound, found.precision, found.peak) == ("compute", "int8", PEAK)


def test_roofline_of_memory():
    """2 * 1e6 operations at 100e9/s are 0.02 ms; 16e6 bytes at 20e9/s are 0.8 ms."""
    found = r.roofline(macs=1_000_000, moved_bytes=16_000_000, p50_ms=1.6, precision="fp32",
                       peak=PEAK)  # fmt: skip
    assert found.ideal_ms == pytest.approx(0.8)
    assert (found.bound, found.fraction) == ("memory", pytest.approx(0.5))
    assert found.intensity == pytest.approx(0.125)


def test_no_roofline_without_a_peak_of_that_precision():
    given = {"macs": 1, "moved_bytes": 1, "p50_ms": 1.0, "peak": PEAK}
    assert r.roofline(precision="bf16", **given) is None
    assert r.roofline(precision="", **given) is None


@pytest.mark.parametrize(("layer", "features"), [("stage1 16x16x20", 16 * 16 * 20), ("", 0)])
def test_moved_bytes_by_hand(tmp_path, layer, features):
    """An IR's graph is read once; its weights, 1000 bytes, are moved for every image."""
    for name, size in (("model.xml", 300), ("model.bin", 1000), ("golden.npz", 50)):
        (tmp_path / name).write_bytes(bytes(size))
    art = Artifact(
        kind="openvino", model="net", layer=layer, params=1, macs=1,
        files={n: sha256(tmp_path / n) for n in ("model.xml", "model.bin", "golden.npz")},
        spec=Spec(classes=("a", "b", "c"), size=(32, 40)),
    ).save(tmp_path)  # fmt: skip
    assert r.moved_bytes(art) == 1000 + 4 * (3 * 32 * 40 + 3 + features)


def test_best_is_the_shortest_call_and_not_the_first(monkeypatch):
    """Calls of 1, 5, 4 and 3 s, when 10 s are asked for."""
    now, took = [0.0], iter([1, 5, 4, 3, 9])
    monkeypatch.setattr(r.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(took)

    assert r._best_s(call, 10) == 3


def fake(monkeypatch, **functions):
    runtime = SimpleNamespace(SUFFIXES=(".onnx",), **functions)
    monkeypatch.setattr(runtimes, "get", lambda name: runtime)


def test_peak_by_hand(monkeypatch):
    """Side 512: 0.268e9 operations. 10 ms a call are 26.8e9/s; of two forms the faster counts."""
    seconds = {"slow": 0.02, "fast": 0.01}
    forms = [("fp32", "slow"), ("int8", "fast"), ("fp32", "fast")]
    fake(monkeypatch, products=lambda profile, side: iter(forms))
    monkeypatch.setattr(r, "_best_s", lambda call, s: seconds[call])
    monkeypatch.setattr(r, "bandwidth", lambda threads, seconds: 7.0 * threads)
    found = r.peak("any", here("any").model_copy(update={"threads": 2}))
    assert found.gflops == pytest.approx({"fp32": 26.8435456, "int8": 26.8435456})
    assert (found.bandwidth_gbs, found.threads) == (14, 2)
    assert found.how == "any, matrix product 512 x 512 x 512"


def test_layers_by_hand(monkeypatch, tmp_path):
    """8 ms in all. 50e6 MACs in int8 take 0.25 ms at the peak, 1/20 of 5 ms."""
    nodes = [
        NodeTime("pool", "Pooling", "", 1.0, None, None),
        NodeTime("stem", "Convolution", "int8", 5.0, 50_000_000, 2_000_000),
        NodeTime("head", "FullyConnected", "bf16", 2.0, 7, 9),
    ]
    fake(monkeypatch, profiled=lambda *given: nodes)
    slowest, executed = r.layers(artifact(tmp_path / "a"), here("any"), IMAGE, most=2, peak=PEAK)
    assert executed == "int8"
    assert [(f.name, f.share, f.macs) for f in slowest] == [
        ("stem", 0.625, 50_000_000), ("head", 0.25, 7),
    ]  # fmt: skip
    assert slowest[0].fraction == pytest.approx(0.05)
    assert slowest[1].fraction is None  # no peak in bf16
    without, _ = r.layers(artifact(tmp_path / "b"), here("any"), IMAGE, most=1)
    assert without == [slowest[0].model_copy(update={"fraction": None})]


def test_executed_is_told_of_those_that_tell():
    silent, int8 = (NodeTime("a", "b", p, ms, None, None) for p, ms in (("", 9.0), ("int8", 1.0)))
    assert r.executed([silent, int8]) == "int8"
    assert r.executed([silent]) == r.executed([]) == ""


# ---- a runtime that does not tell


def test_a_runtime_that_does_not_tell(monkeypatch, tmp_path):
    fake(monkeypatch)
    assert r.layers(artifact(tmp_path / "a"), here("any"), IMAGE, peak=PEAK) == ([], "")
    assert r.peak("any", here("any")) is None


@pytest.mark.parametrize("device", ["NPU", "GPU", "cuda:0"])
def test_another_device_has_no_peak(monkeypatch, device):
    fake(monkeypatch, products=lambda profile, side: iter([("fp32", lambda: None)]))
    profile = here("any").model_copy(update={"device": device})
    assert r.peak("any", profile) is None


@needs("onnxruntime")
def test_onnxruntime_tells_of_the_cpu_alone(tmp_path):
    profile = here("onnxruntime").model_copy(update={"device": "CUDA"})
    assert r.layers(artifact(tmp_path / "a"), profile, IMAGE) == ([], "")


def test_an_image_of_another_size(monkeypatch, tmp_path):
    fake(monkeypatch, profiled=lambda *given: [])
    with pytest.raises(EdgeKDError, match=r"takes \(1, 3, 32, 40\) float32, got \(1, 3, 8, 8\)"):
        r.layers(artifact(tmp_path / "a"), here("any"), IMAGE[..., :8, :8])


# ---- real ones


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch"])
def test_peak(monkeypatch, name):
    """Of small matrices: what is asked is that every precision is one, and that all is finite."""
    pytest.importorskip(name)
    monkeypatch.setattr(r, "SIDE", 64)
    monkeypatch.setattr(r, "COPIED", 1 << 20)
    monkeypatch.setattr(r, "CACHES", r.Path("nowhere"))
    profile = here(name).model_copy(update={"device": runtimes.get(name).devices()[0]})
    found = r.peak(name, profile, seconds=0)
    assert "fp32" in found.gflops
    assert found.gflops.keys() <= {"fp32", "bf16", "fp16", "int8"}
    assert min(*found.gflops.values(), found.bandwidth_gbs) > 0
    assert found.threads == 1


@needs("onnxruntime")
def test_the_products_of_onnxruntime_are_products():
    """The files that are written byte by byte compute what numpy does."""
    ort = pytest.importorskip("edgekd.runtimes.onnxruntime")
    a = np.arange(16, dtype=np.uint8).reshape(4, 4)
    b = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    session = ort.ort.InferenceSession(ort._product("MatMulInteger", a, b, 6))
    np.testing.assert_array_equal(session.run(None, {"a": a})[0], a.astype(int) @ b.astype(int))
    assert [p for p, _ in ort.products(here("onnxruntime"), 8)] == ["fp32", "int8"]


@needs("openvino")
@needs("onnxruntime")
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_layers_of_a_real_net(tmp_path, name, precision):
    art = artifact(tmp_path / "a", precision)
    slowest, executed = r.layers(art, here(name), IMAGE, calls=3, peak=PEAK)
    assert 0 < len(slowest) <= 10
    assert [f.ms for f in slowest] == sorted((f.ms for f in slowest), reverse=True)
    assert sum(f.share for f in slowest) <= 1 + 1e-9
    known = {f.macs: f for f in slowest if f.macs is not None}
    assert set(known) >= {STEM, DEPTHWISE}
    assert {known[STEM].precision, known[DEPTHWISE].precision} == {precision}
    assert known[STEM].fraction > 0
    assert executed in {"fp32", precision}


@needs("openvino")
@needs("onnxruntime")
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_bytes_that_a_layer_moves(tmp_path, name):
    """In float32: image, 16 kernels of 27, and 16 channels of 16 x 20."""
    art = artifact(tmp_path / "a")
    nodes = runtimes.get(name).profiled(art.path, here(name), "fp32", IMAGE, 1)
    (stem,) = [n for n in nodes if n.macs == STEM]
    assert stem.moved_bytes == 4 * (3 * 32 * 40 + 16 * 27 + 16 * 16 * 20)
