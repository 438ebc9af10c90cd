"""Every engine passes the same tests. A new file in edgekd/quantizers needs no edit here."""

import errno
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from runtimes.test_runtimes import INT8, Tiny, artifact, exported, pictures, profile  # noqa: F401
from torch import nn

from edgekd import runtimes
from edgekd.export import graphs
from edgekd.export import onnx as export
from edgekd.models import zoo
from edgekd.quantize import engines, ptq
from edgekd.quantize.engines import NARROW
from edgekd.records import EdgeKDError, NoRoom, Profile

WAYS = [
    pytest.param(name, method, marks=() if method == NARROW else INT8)
    for name in engines.names()
    for method in engines.get(name).METHODS
]


def small(engine, source, out, **more):
    return ptq.quantize(source, pictures(32, seed=3), out, engine=engine, **more)


def distance(made, source, runtime):
    images = pictures(16, seed=4)
    got = runtimes.open_session(made, profile(runtime))(images)
    want = runtimes.open_session(source, profile("onnxruntime"))(images)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(("engine", "method"), WAYS)
def test_every_method_is_near_fp32(exported, tmp_path, engine, method):  # noqa: F811
    made = small(engine, exported[1], tmp_path, method=method)
    assert made.settings["engine"] == engine
    assert made.settings["method"] == method
    assert made.settings["quantised"] > 1
    assert made.kind == engines.get(engine).KIND
    for runtime in set(engines.get(engine).RUNTIMES) - {"tensorrt"}:
        assert all(0 < d < 0.2 for d in distance(made, exported[1], runtime))


@pytest.mark.parametrize("engine", engines.names())
def test_the_weights_are_stored_in_eight_bits(tmp_path, engine):
    torch.manual_seed(0)
    wide = Tiny()
    wide.body.extend([nn.Conv2d(16, 2048, 1), nn.ReLU6(), nn.Conv2d(2048, 16, 1)])
    source = export.to_onnx(wide.eval(), artifact(), pictures(), tmp_path / "onnx")
    made = small(engine, source, tmp_path / "int8")
    weights = 16 * 2048 * 2
    assert source.size_bytes > 4 * weights
    assert made.size_bytes < 2.2 * weights  # a byte a weight, biases, and the graph


@pytest.mark.parametrize("engine", engines.names())
def test_a_network_of_timms_is_quantised(tmp_path, engine):
    torch.manual_seed(0)
    waist = zoo.Waist(zoo.classifier("mobilenetv3_small_050", 3), (32, 32)).eval()
    source = export.to_onnx(waist, artifact(), pictures(), tmp_path / "onnx", tolerance=0.01)
    made = small(engine, source, tmp_path / "int8")
    assert made.settings["quantised"] > 20
    assert np.isfinite(distance(made, source, "openvino")).all()


@pytest.mark.parametrize("engine", engines.names())
def test_what_an_engines_library_raises_is_one_line(exported, tmp_path, monkeypatch, engine):  # noqa: F811
    def fails(*given):
        raise ValueError("Input partition has\nmore than one output node")

    monkeypatch.setattr(engines.get(engine), "write", fails)
    with pytest.raises(EdgeKDError) as told:
        small(engine, exported[1], tmp_path / "int8")
    assert f"engine {engine} fails on" in str(told.value)
    assert "ValueError: Input partition has more than one output node; another" in str(told.value)
    assert not list((tmp_path / "int8").iterdir())


@pytest.mark.parametrize("engine", engines.names())
def test_the_same_images_give_the_same_answers(exported, tmp_path, engine):  # noqa: F811
    images = pictures(8, seed=5)
    one, two = (
        runtimes.open_session(made, profile(engines.get(engine).RUNTIMES[0]))(images)
        for made in (small(engine, exported[1], tmp_path / x) for x in "ab")
    )
    np.testing.assert_array_equal(one.logits, two.logits)


@pytest.mark.parametrize("engine", [n for n in engines.names() if engines.get(n).KEEPS])
def test_a_layer_that_is_kept_is_not_quantised(exported, tmp_path, engine):  # noqa: F811
    names = graphs.layers(exported[1].path)
    every = small(engine, exported[1], tmp_path / "all", method=NARROW)
    fewer = small(engine, exported[1], tmp_path / "fewer", method=NARROW, keep=names[-2:])
    assert fewer.settings["keep"] == names[-2:]
    assert fewer.settings["quantised"] < every.settings["quantised"]
    runtime = engines.get(engine).RUNTIMES[0]
    assert distance(fewer, exported[1], runtime)[1] < distance(every, exported[1], runtime)[1]


def weights(made):
    """The largest of a file's 8-bit weights that are added up in pairs, and how many layers.

    Not of depthwise layers, one weight a channel at a place: NNCF knows it and leaves them.
    """
    if made.kind == "openvino":
        ops = runtimes.get("openvino").read(made.path).get_ops()
        held = [op.data for op in ops if op.get_type_name() == "Constant"]
    else:
        held = [onnx.numpy_helper.to_array(i) for i in onnx.load(made.path).graph.initializer]
    dense = [w for w in held if w.ndim > 1 and not (w.ndim > 3 and w.shape[-3] == 1)]
    found = [w for w in dense if w.dtype == np.int8]
    return max(int(abs(w.astype(int)).max()) for w in found), len(found)


@pytest.mark.parametrize("engine", [n for n in engines.names() if NARROW in engines.get(n).METHODS])
def test_weights_of_seven_bits_are_no_larger_than_64(exported, tmp_path, engine):  # noqa: F811
    """A pair of them, each times 255, is within 16 bits: 2 * 64 * 255 < 2**15."""
    narrow = small(engine, exported[1], tmp_path / "narrow", method=NARROW)
    wide = small(engine, exported[1], tmp_path / "wide")
    assert weights(narrow)[0] in (63, 64)
    assert weights(narrow)[1] == weights(wide)[1] == 3
    assert weights(wide)[0] >= 127


def test_mixed_precision_keeps_both_ends(exported, tmp_path):  # noqa: F811
    """Of four layers two have 8-bit weights; the classifier is in FP16, the answer in FP32."""
    made = small("inc", exported[1], tmp_path, method="mixed")
    graph = onnx.load(made.path).graph
    eight = [
        i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1
    ]
    assert len(eight) == 2
    to = [a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"]
    assert onnx.TensorProto.FLOAT16 in to
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_what_tensorrt_gets_is_symmetric(exported, tmp_path):  # noqa: F811
    made = small("ort", exported[1], tmp_path, runtime="tensorrt")
    assert made.settings["symmetric"]
    graph = onnx.load(made.path).graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    zeros = [values[n.input[2]] for n in graph.node if n.op_type.endswith("quantizeLinear")
             or n.op_type in ("QuantizeLinear", "DequantizeLinear")]  # fmt: skip
    assert zeros
    assert all(z.dtype == np.int8 and not z.any() for z in zeros)


def test_what_an_engine_cannot_do_is_said(exported, tmp_path):  # noqa: F811
    with pytest.raises(EdgeKDError, match='no engine "nnfc"; did you mean "nncf"'):
        small("nnfc", exported[1], tmp_path)
    with pytest.raises(EdgeKDError, match='no method of ort "histogram"'):
        small("ort", exported[1], tmp_path, method="histogram")
    with pytest.raises(EdgeKDError, match="engine nncf writes for openvino, not for onnxruntime"):
        small("nncf", exported[1], tmp_path, runtime="onnxruntime")
    with pytest.raises(EdgeKDError, match="it keeps no layers"):
        small("inc", exported[1], tmp_path, keep=["x"])
    assert not list(tmp_path.glob("artifact.json"))


def test_metadata_and_versions_are_those_of_the_source(exported, tmp_path):  # noqa: F811
    for engine in ("ort", "inc"):
        made = small(engine, exported[1], tmp_path / engine)
        model, before = onnx.load(made.path), onnx.load(exported[1].path)
        assert model.ir_version == before.ir_version
        assert {p.key: p.value for p in model.metadata_props} == {
            p.key: p.value for p in before.metadata_props
        }
        assert {o.domain for o in model.opset_import} <= {""}


def test_engines_print_nothing(exported, tmp_path, capfd):  # noqa: F811
    for engine in engines.names():
        small(engine, exported[1], tmp_path / engine)
    assert capfd.readouterr() == ("", "")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Hardswish(), nn.Conv2d(16, 16, 1))

    def forward(self, x):
        return x + self.body(x)


def test_int8_of_another_engine_is_compared_in_the_runtime_that_it_is_for(tmp_path):
    """ONNX Runtime rounds elsewhere than OpenVINO, by more than the tolerance."""
    torch.manual_seed(0)
    deep = Tiny()
    deep.body.extend([Residual() for _ in range(3)])
    source = export.to_onnx(deep.eval(), artifact(), pictures(), tmp_path / "onnx")
    made = small("ort", source, tmp_path / "int8", runtime="openvino")
    ir = export.to_runtime(made, pictures(), tmp_path / "ir", "openvino")
    assert ir.metrics["parity_max_abs_features"].value <= export.TOLERANCE["int8"]
    there, here = (runtimes.open_session(a, Profile(name="cpu", runtime=r, device="CPU"))
                   for r, a in (("onnxruntime", made), ("openvino", ir)))  # fmt: skip
    apart = np.abs(there(pictures()).features - here(pictures()).features).max()
    assert export.TOLERANCE["int8"] < apart < export.ELSEWHERE


@pytest.mark.parametrize("engine", ["nncf", "ort"])
def test_no_room_is_not_the_engines_fault(exported, tmp_path, monkeypatch, engine):  # noqa: F811
    def refused(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refused)  # asked for before OpenVINO writes
        patch.setattr(os, "fsync", refused)
        with pytest.raises(NoRoom, match="there is no room"):
            small(engine, exported[1], tmp_path)
    assert not list(tmp_path.rglob("model.*"))
    assert small(engine, exported[1], tmp_path).precision == "int8"


def test_engines_need_no_home_and_leave_nothing_in_it(tmp_path):
    """As in a container: a user that is in no list, or whose home is not there."""
    nobody = "import os, pwd; os.environ.pop('HOME'); pwd.getpwuid = {}.__getitem__; "
    asks = (
        "from edgekd.quantize import engines; engines.get('inc'); print(engines.get('nncf').KIND)"
    )
    for code, home in ((nobody + asks, ""), (asks, str(tmp_path)), (asks, str(tmp_path / "none"))):
        made = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HOME": home},
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert (made.returncode, made.stdout) == (0, "openvino\n"), made.stderr
    assert not list(tmp_path.iterdir())
