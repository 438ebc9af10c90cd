"""Every runtime passes the same tests. A new file in edgekd/runtimes needs no edit here."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import runtimes
from edgekd.export import onnx as export
from edgekd.records import Artifact, EdgeKDError, Profile, RuntimeUnavailable, Spec
from edgekd.runtimes import Outputs, machine

ISA = machine.instructions()
INT8 = pytest.mark.xfail(  # but for engines' 7-bit method
    machine.overflows(ISA),
    reason="known: INT8 sums overflow on a CPU without VNNI",
    raises=AssertionError, strict=False,  # some files hold by chance
)  # fmt: skip
SPEC = Spec(classes=("a", "b", "c"), size=(32, 32))


class Tiny(nn.Module):
    """Depthwise, relu6 and a linear head: image -> (logits, features)."""

    layer = "last 16x8x8"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.ReLU6(), nn.Conv2d(16, 16, 1),
        )  # fmt: skip
        self.head = nn.Linear(16, 3)

    def forward(self, image):
        features = self.body(image)
        return self.head(features.mean((2, 3))), features


def artifact(**change):
    given = {"kind": "student", "model": "tiny", "files": {"w": "0" * 64}, "spec": SPEC,
             "params": 1, "macs": 1} | change  # fmt: skip
    return Artifact.parse(given, "test")


def pictures(n=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = Tiny().eval()
    out = tmp_path_factory.mktemp("onnx")
    return module, export.to_onnx(module, artifact(), pictures(), out)


def profile(runtime, **change):
    device, *_ = runtimes.get(runtime).devices() or ["none"]
    return Profile(name="test", runtime=runtime, device=device, threads=1, **change)  # fmt: skip


@pytest.fixture(params=runtimes.names())
def opened(request, exported, tmp_path):
    """(session, its file, its profile) of each runtime that is installed."""
    try:
        runtime = runtimes.get(request.param)
    except RuntimeUnavailable as e:
        pytest.skip(str(e))
    here = profile(request.param)
    if here.device == "none":
        pytest.skip(f"{request.param} sees no device here")
    path, *_ = runtime.build(exported[1].path, tmp_path, here)
    made = artifact(kind="onnx", files={path.name: "0" * 64}).model_copy(
        update={"folder": tmp_path}
    )
    return runtimes.open_session(made, here), made, here


@pytest.mark.parametrize("n", [1, 3])
def test_agrees_with_the_module_it_was_made_from(opened, exported, n):
    images = pictures(n, seed=1)
    with torch.inference_mode():
        expected = exported[0](torch.from_numpy(images))
    for got, want in zip(opened[0](images), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5, rtol=1e-4)
        assert got.dtype == np.float32


def test_same_in_same_out_and_input_untouched(opened):
    images = pictures(2)
    before = images.copy()
    np.testing.assert_array_equal(opened[0](images).logits, opened[0](images).logits)
    np.testing.assert_array_equal(images, before)


def read_only(images):
    images.flags.writeable = False
    return images


@pytest.mark.parametrize(
    "same",
    [
        lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        lambda x: read_only(x.copy()),
    ],
    ids=["transposed", "flipped", "read-only"],
)
def test_how_an_array_lies_in_memory_does_not_matter(opened, same):
    images = pictures(2)
    np.testing.assert_array_equal(opened[0](same(images)).logits, opened[0](images).logits)


def asked_by_threads(session):
    """What two threads are told that ask four times each, and what one is told that asks alone."""
    batches = [pictures(5, seed=i) for i in range(8)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(session, batches)), [session(x) for x in batches]


def test_threads_may_share_a_session(opened):
    for got, want in zip(*asked_by_threads(opened[0]), strict=True):
        np.testing.assert_array_equal(got.logits, want.logits)
        np.testing.assert_array_equal(got.features, want.features)


def test_earlier_outputs_are_not_overwritten(opened):
    first = opened[0](pictures(2))
    kept = first.features.copy()
    opened[0](pictures(2, seed=5) * 2)
    np.testing.assert_array_equal(first.features, kept)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 3, 16, 16), np.float32),
        np.zeros((1, 3, 32, 32)),
        np.zeros((3, 32, 32), np.float32),
        np.zeros((0, 3, 32, 32), np.float32),
    ],
)
def test_wrong_input_is_refused(opened, bad):
    with pytest.raises(EdgeKDError, match=r"model takes \(N, 3, 32, 32\) float32, got"):
        opened[0](bad)


def test_a_fixed_batch_is_that_batch(opened):
    _, made, here = opened
    session = runtimes.open_session(made, here, batch=2)
    assert session(pictures(2)).logits.shape == (2, 3)
    with pytest.raises(EdgeKDError, match=r"model takes \(2, 3, 32, 32\)"):
        session(pictures(3))


def test_an_absent_device_is_said(opened):
    _, made, here = opened
    absent = here.model_copy(update={"device": "NPU9"})
    with pytest.raises(RuntimeUnavailable, match="no device NPU9 here, only"):
        runtimes.open_session(made, absent)


@pytest.mark.parametrize(
    "broken",
    [
        lambda b: b"",
        lambda b: b[:100],
        lambda b: b[: len(b) // 2],
        lambda b: b[:-200],
        lambda b: b"not a model",
    ],
    ids=["empty", "start", "half", "end", "text"],
)
def test_a_broken_file_is_one_line_without_a_traceback(opened, broken, capfd, caplog):
    _, made, here = opened
    damaged = broken(made.path.read_bytes())
    made.path.write_bytes(damaged)
    with pytest.raises(EdgeKDError, match=r"cannot (load|read|compile)") as e:
        runtimes.open_session(made, here)
    assert "\n" not in str(e.value)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err  # C++ in OpenVINO's front ends may say something else there
    assert not caplog.records


def test_a_missing_file_is_said(opened):
    _, made, here = opened
    made.path.unlink()
    with pytest.raises(EdgeKDError, match=r"cannot (load|read) .*model\."):
        runtimes.open_session(made, here)


def test_a_file_of_another_runtime_is_refused(opened):
    _, made, here = opened
    other = made.model_copy(update={"files": {"model.engine": ""}})
    with pytest.raises(EdgeKDError, match=r"loads .* files, not .*model\.engine"):
        runtimes.open_session(other, here)


def test_unknown_and_uninstalled_runtimes(monkeypatch):
    with pytest.raises(EdgeKDError, match='no runtime "openvin"; did you mean "openvino"'):
        runtimes.get("openvin")

    def absent(name):
        raise ModuleNotFoundError(name="openvino")

    monkeypatch.setattr(runtimes.importlib, "import_module", absent)
    with pytest.raises(
        RuntimeUnavailable, match=r"needs openvino: pip install 'edgekd\[openvino\]"
    ):
        runtimes.get("openvino")


def executed(model):
    """Precision in which each convolution really ran."""
    return {
        op.get_rt_info()["runtimePrecision"].value
        for op in model.get_runtime_model().get_ops()
        if "Convolution" in op.get_rt_info()["layerType"].value
    }


@pytest.mark.parametrize(("precision", "ran"), [("fp32", "f32"), ("bf16", "bf16")])
def test_openvino_runs_in_the_precision_asked_for(exported, precision, ran):
    openvino = pytest.importorskip("edgekd.runtimes.openvino")
    here = profile("openvino")
    # With AVX-512 oneDNN computes in bfloat16 also without the instructions, by emulation.
    if precision == "bf16" and not {"avx512f", "amx_bf16"} & set(ISA):
        with pytest.raises(EdgeKDError, match="in f32 on CPU, not bf16"):
            openvino.compiled(exported[1].path, here, precision, 1)
        return
    model = openvino.compiled(exported[1].path, here, precision, 1)
    assert executed(model) == {ran}


def test_other_precisions_are_refused_where_they_cannot_be_had(exported):
    with pytest.raises(EdgeKDError, match="not in bf16"):
        runtimes.get("onnxruntime").load(exported[1].path, profile("onnxruntime"), "bf16", None)
    with pytest.raises(EdgeKDError, match="runs fp32, not int8"):
        runtimes.get("torch").load(exported[1].path, profile("torch"), "int8", None)


def test_openvino_is_set_as_the_profile_says(exported):
    openvino = pytest.importorskip("edgekd.runtimes.openvino")
    here = profile("openvino", options={"ENABLE_CPU_PINNING": False})
    model = openvino.compiled(exported[1].path, here, "fp32", 1)
    assert model.get_property("INFERENCE_NUM_THREADS") == 1
    assert int(model.get_property("NUM_STREAMS")) == 1
    assert model.get_property("ENABLE_CPU_PINNING") is False
    loose = profile("openvino", options={"INFERENCE_PRECISION_HINT": "bf16"})
    with pytest.raises(EdgeKDError, match=r"leave it out, model.* is of fp32"):
        openvino.compiled(exported[1].path, loose, "fp32", 1)
    wrong = profile("openvino", options={"NO_SUCH": 1})
    with pytest.raises(EdgeKDError, match=r"cannot compile .* Unsupported property NO_SUCH"):
        openvino.compiled(exported[1].path, wrong, "fp32", 1)


@pytest.mark.parametrize(("value", "text"), [(True, "1"), (False, "0"), ("0", "0")])
def test_onnxruntime_options_are_in_its_own_words(exported, monkeypatch, value, text):
    runtime = pytest.importorskip("edgekd.runtimes.onnxruntime")
    real, seen = runtime.ort.InferenceSession, []
    monkeypatch.setattr(
        runtime.ort,
        "InferenceSession",
        lambda path, options, **more: seen.append(options) or real(path, options, **more),
    )
    key = "session.intra_op.allow_spinning"
    runtime.load(exported[1].path, profile("onnxruntime", options={key: value}), "fp32", None)
    assert seen[0].get_session_config_entry(key) == text


def test_onnxruntime_does_not_print_and_try_again(exported, tmp_path, capfd):
    runtime = pytest.importorskip("edgekd.runtimes.onnxruntime")
    broken = tmp_path / "model.onnx"
    # An operator's name that is no UTF-8 makes its error one that its own retry catches.
    broken.write_bytes(exported[1].path.read_bytes().replace(b"Conv", b"\xff\xfe\xff\xfe"))
    with pytest.raises(EdgeKDError, match="onnxruntime cannot load"):
        runtime.load(broken, profile("onnxruntime"), "fp32", None)
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_falling_back_to_the_cpu_is_refused(exported, monkeypatch):
    runtime = pytest.importorskip("edgekd.runtimes.onnxruntime")
    real, seen = runtime.ort.InferenceSession, []

    def falls_back(path, options, **more):
        seen.append(more)
        return real(path, options, providers=["CPUExecutionProvider"])

    found = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: found)
    monkeypatch.setattr(runtime.ort, "InferenceSession", falls_back)
    here = profile("onnxruntime").model_copy(update={"device": "CUDA"})
    with pytest.raises(RuntimeUnavailable, match="opened CPUExecutionProvider, not CUDA"):
        runtime.load(exported[1].path, here, "fp32", None)
    wanted = [("CUDAExecutionProvider", {"use_tf32": "0"})]  # fp32 is not TF32
    assert seen == [{"providers": wanted, "enable_fallback": 0}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_torch_on_cuda_is_fp32_not_tf32(exported):
    here = profile("torch").model_copy(update={"device": "cuda:0"})
    path = exported[1].path.with_suffix(".pt2")
    images = pictures(3)
    with torch.inference_mode():
        expected = exported[0](torch.from_numpy(images))
    for got, want in zip(
        runtimes.get("torch").load(path, here, "fp32", None)(images), expected, strict=True
    ):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5, rtol=1e-4)


def test_a_static_profile_runs_a_batch_image_by_image(exported):
    static = profile("openvino", static_batch=True)
    images = pictures(3)
    with torch.inference_mode():
        expected = exported[0](torch.from_numpy(images))[0].numpy()
    got = runtimes.open_session(exported[1], static)(images).logits
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_threads_share_the_streams(exported):
    two = profile("openvino", hint="throughput").model_copy(update={"threads": 2})
    streams = runtimes.open_session(exported[1], two)
    for got, want in zip(*asked_by_threads(streams), strict=True):
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
        np.testing.assert_allclose(got.features, want.features, atol=1e-5)


@pytest.mark.parametrize("n", [1, 8, 21])
def test_streams_give_the_same_answers_in_the_same_order(exported, n):
    images = pictures(n, seed=6)
    plain = runtimes.open_session(exported[1], profile("openvino"))(images)
    many = runtimes.open_session(exported[1], profile("openvino", hint="throughput"))
    for got, want in zip(many(images), plain, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    first = many(images).logits
    many(pictures(3))
    np.testing.assert_array_equal(first, many(images).logits)


def test_what_an_npu_compiled_is_kept(exported, monkeypatch, tmp_path):
    openvino = pytest.importorskip("edgekd.runtimes.openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = {}

    real = openvino.core

    class Core:
        available_devices = ("NPU",)

        def read_model(self, path):
            return real().read_model(path)

        def compile_model(self, model, device, config):
            seen.update(config)
            raise RuntimeError("no driver")

    monkeypatch.setattr(openvino, "core", Core)
    with pytest.raises(EdgeKDError, match=r"cannot compile .* for NPU: no driver"):
        openvino.compiled(exported[1].path, profile("openvino", static_batch=True)
                          .model_copy(update={"device": "NPU"}), "fp16", None)  # fmt: skip
    assert seen["CACHE_DIR"] == str(tmp_path / "edgekd" / "openvino")
    assert seen["INFERENCE_PRECISION_HINT"] == "f16"


def test_streams_that_answer_otherwise_are_refused(exported, tmp_path, monkeypatch):
    """As OpenVINO's do of some weights in INT8: the device's own way is taken, and it is said."""
    openvino = runtimes.get("openvino")
    made = export.to_runtime(exported[1], pictures(), tmp_path / "ir", "openvino")
    cpu = profile("openvino")
    session, why = runtimes.open_streams(made, cpu)
    assert not why
    expected = runtimes.open_session(made, cpu)(pictures(20))
    np.testing.assert_allclose(session(pictures(20)).logits, expected.logits, atol=1e-5)
    real = openvino.in_streams

    def wrong(model, chunk):
        return lambda images: real(model, chunk)(images)._replace(
            features=1e3 * np.ones((len(images), 16, 8, 8), np.float32)
        )

    monkeypatch.setattr(openvino, "in_streams", wrong)
    with pytest.raises(runtimes.StreamsDiffer, match="otherwise in streams than alone"):
        runtimes.open_session(made, cpu.model_copy(update={"hint": "throughput"}))
    session, why = runtimes.open_streams(made, cpu)
    assert "a fault of its plugin" in why
    np.testing.assert_allclose(session(pictures()).logits, expected.logits[:8], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_an_error(monkeypatch, bad):
    module = Tiny().eval()
    with torch.no_grad():
        module.head.bias[1] = bad

    class Module:
        @staticmethod
        def load(*_):
            def run(images):
                with torch.no_grad():
                    out = module(torch.from_numpy(images))
                return Outputs(*(x.numpy() for x in out))

            return run

    fresh = artifact(files={"model.pt2": "0" * 64})
    monkeypatch.setattr(runtimes, "runtime_of", lambda *_: Module)
    with pytest.raises(EdgeKDError, match="answers nan or infinity in torch"):
        runtimes.open_session(fresh, profile("torch"))(pictures())
