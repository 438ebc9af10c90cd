"""What TensorRT can be asked without a GPU: parse, build for others, refuse to run."""

import contextlib
import json
import types

import pytest
import torch
from runtimes.test_runtimes import Tiny, artifact, exported, pictures  # noqa: F401

from edgekd import runtimes
from edgekd.export import device_checks
from edgekd.export import onnx as export
from edgekd.quantize import ptq
from edgekd.records import EdgeKDError, Profile, RuntimeUnavailable

trt = pytest.importorskip("edgekd.runtimes.tensorrt", reason="no TensorRT and no CUDA bindings")
JETSON = Profile(name="jetson", runtime="tensorrt", device="cuda:0", precisions=("int8", "fp16"))
rtx = pytest.mark.skipif(trt.package().__name__ != "tensorrt_rtx", reason="TensorRT builds here")


@pytest.fixture(scope="module")
def int8(exported, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("int8")
    return ptq.quantize(exported[1], pictures(16), out, engine="ort", runtime="tensorrt")


def test_the_parser_says_in_what_each_layer_runs(exported, int8, tmp_path):  # noqa: F811
    assert {x.precision for x in trt.parse(exported[1].path)} == {"fp32"}
    assert {x.precision for x in trt.parse(int8.path)} == {"int8"}
    half = export.to_runtime(exported[1], pictures(), tmp_path, "onnxruntime", precision="fp16")
    found = trt.parse(half.path)
    assert {x.precision for x in found} == {"fp16"}
    assert len(found) == 4
    assert sorted({x.kind for x in found}) == ["CONVOLUTION", "MATRIX_MULTIPLY"]


def test_every_engine_that_writes_for_tensorrt_is_parsed(exported, tmp_path):  # noqa: F811
    for engine in ("ort", "inc"):
        made = ptq.quantize(exported[1], pictures(16), tmp_path / engine, engine=engine,
                                 runtime="tensorrt")  # fmt: skip
        assert {x.precision for x in trt.parse(made.path)} == {"int8"}


def test_asymmetric_int8_is_refused_before_the_device_refuses_it(exported, tmp_path):  # noqa: F811
    made = ptq.quantize(exported[1], pictures(16), tmp_path, engine="ort")
    with pytest.raises(EdgeKDError, match="has asymmetric activations, which TensorRT refuses"):
        device_checks.check_symmetric(made)
    with pytest.raises(EdgeKDError, match="cannot parse"):
        trt.parse(made.path)


def test_no_onnx_is_one_line(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(EdgeKDError, match="cannot parse") as e:
        trt.parse(tmp_path / "x.onnx")
    assert "\n" not in str(e.value)


@rtx
@pytest.mark.parametrize("capability", ["SM86", "SM89"])
def test_a_plan_is_built_for_a_gpu_that_is_not_here(int8, tmp_path, capability):
    plan = trt.serialised(int8.path, JETSON, tmp_path / trt.TIMINGS, capability)
    assert len(plan) > 5000
    (tmp_path / "model.plan").write_bytes(plan)


def test_what_remains_for_the_device_is_told(int8, exported):  # noqa: F811
    found = device_checks.tensorrt(int8)
    assert found.layers == {"int8": 4}
    assert found.slow == ()
    assert found.checked_by.startswith("tensorrt")
    assert any("edgekd export --format tensorrt --artifact" in step for step in found.remains)
    assert len(device_checks.tensorrt(exported[1]).slow) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_pretends_to_run(int8, tmp_path):
    assert trt.devices() == []
    with pytest.raises(RuntimeUnavailable, match="no GPU at all: build and run the plan"):
        trt.build(int8.path, tmp_path, JETSON)
    (tmp_path / "model.plan").write_bytes(b"plan")
    with pytest.raises(RuntimeUnavailable, match="no GPU at all"):
        trt.load(tmp_path / "model.plan", JETSON, "int8", None)


def test_a_plan_of_another_gpu_or_version_is_refused(tmp_path):
    here = {"package": "tensorrt", "version": "10.3.0", "gpu": "Orin", "capability": "8.7"}
    path = tmp_path / "model.plan"
    with pytest.raises(EdgeKDError, match=r"plan.json is missing or broken: export the plan again"):
        trt._check_built_for(path, here)
    (tmp_path / trt.BUILT_FOR).write_text(json.dumps(here))
    trt._check_built_for(path, here)
    for key, value in (("version", "10.16.2"), ("gpu", "RTX A2000")):
        with pytest.raises(EdgeKDError, match=f"built for {key} .*, here it is {value}"):
            trt._check_built_for(path, here | {key: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_plan_answers_as_the_file_it_was_built_from(exported, tmp_path):  # noqa: F811
    made = export.to_runtime(exported[1], pictures(), tmp_path, "tensorrt", profile=JETSON)
    session = runtimes.open_session(made, JETSON)
    assert session(pictures(21)).logits.shape == (21, 3)  # more than a call takes


CONVOLUTION = {
    "Name": "conv + relu", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
    "Inputs": [{"Name": "a", "Dimensions": [1, 8, 16, 16],
                "Format/Datatype": "Four wide channel vectorized row major Int8 format"}],
    "Outputs": [{"Name": "b", "Dimensions": [1, 16, 8, 8], "Format/Datatype": "Row major FP32"}],
    "Kernel": [3, 3], "OutMaps": 16, "Groups": 2, "Weights": {"Type": "Int8", "Count": 576},
}  # fmt: skip


class Plan:
    """Stands for `_Buffers`: of two layers, that tells of one; slow at first."""

    def __init__(self):
        self.calls, self.engine, self.context = 0, self, types.SimpleNamespace(profiler=None)

    def __call__(self, image):
        self.calls += 1
        if self.context.profiler is not None:
            self.context.profiler.report_layer_time("conv + relu", 0.25 * self.calls)
            self.context.profiler.report_layer_time("pool", 0.5)

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, form):
        assert form == trt.package().LayerInformationFormat.JSON
        assert self.execution_context is self.context
        return json.dumps({"Layers": [CONVOLUTION, "pool"], "Bindings": ["image"]})


def test_layers_are_told_as_the_plan_ran_them(monkeypatch, tmp_path):
    plan = Plan()
    monkeypatch.setattr(trt, "_open", lambda path, profile, most: (0, plan))
    monkeypatch.setattr(trt, "_current", lambda device: contextlib.nullcontext())
    conv, pool = trt.profiled(tmp_path, JETSON, "int8", pictures(1), 2)
    assert plan.calls == trt.WARMUP + 2
    assert conv.ms == pytest.approx(0.25 * (4 + 5) / 2)  # the three that warm up are left out
    assert (conv.name, conv.kind, conv.precision) == ("conv + relu", "CaskConvolution", "int8")
    assert conv.macs == 16 * 8 * 8 * (8 // 2) * 3 * 3
    assert pool == ("pool", "", "", 0.5, None, None)


@pytest.mark.parametrize(("said", "precision"), [
    ("Row major linear FP16 format", "fp16"), ("Half", "fp16"), ("Float", "fp32"),
    ("Row major linear BFloat16 format", "bf16"), ("N/A due to dynamic shapes", ""),
])  # fmt: skip
def test_a_format_tells_its_precision(said, precision):
    told = {"Inputs": [{"Format/Datatype": said}, {"Format/Datatype": "Int8"}]}
    assert trt._node_time("x", 1.0, told).precision == precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_profile_of_a_plan_covers_its_layers(int8, tmp_path):
    made = export.to_runtime(int8, pictures(), tmp_path, "tensorrt", profile=JETSON)
    nodes = trt.profiled(made.path, JETSON, "int8", pictures(1), 5)
    assert "int8" in {n.precision for n in nodes}
    assert all(n.ms >= 0 for n in nodes)


def static_ir(source, out, static=True):
    npu = Profile(name="npu", runtime="openvino", device="NPU", static_batch=static)
    return export.to_runtime(source, pictures(), out, "openvino", profile=npu), npu


def test_an_npu_gets_static_shapes_and_known_types(exported, tmp_path):  # noqa: F811
    made, npu = static_ir(exported[1], tmp_path / "ir")
    found = device_checks.npu(made, npu)
    assert found.problems == ()
    assert found.layers == {"int8": 0, "fp16": 4}
    assert f"edgekd verify ir --profile {npu.name}" in found.remains[1]
    free, loose = static_ir(exported[1], tmp_path / "free", static=False)
    assert any("is not static" in p for p in device_checks.npu(free, loose).problems)


def test_an_npu_file_says_what_runs_in_int8(exported, tmp_path):  # noqa: F811
    small = ptq.quantize(exported[1], pictures(16), tmp_path / "int8")
    npu = Profile(name="npu", runtime="openvino", device="NPU", static_batch=True)
    made = export.to_runtime(small, pictures(), tmp_path / "ir", "openvino", profile=npu)
    assert device_checks.npu(made, npu).layers["int8"] >= 3
