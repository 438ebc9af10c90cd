"""Every runtime passes the same tests. A new file in edgekd/runtimes needs no edit here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import export, runtimes
from edgekd.records import Artifact, EdgeKDError, Profile, RuntimeUnavailable, Spec

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
    device = runtimes.get(runtime).devices()[0]
    return Profile(name="test", runtime=runtime, device=device, student="ofa-595",
                   resolution=32, threads=1, **change)  # fmt: skip


@pytest.fixture(params=runtimes.names())
def opened(request, exported, tmp_path):
    """(session, its file, its profile) of each runtime that is installed."""
    try:
        runtime = runtimes.get(request.param)
    except RuntimeUnavailable as e:
        pytest.skip(str(e))
    here = profile(request.param)
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


def test_a_broken_file_is_one_line(opened):
    _, made, here = opened
    made.path.write_bytes(made.path.read_bytes()[:100])
    with pytest.raises(EdgeKDError, match=r"cannot (load|read)") as e:
        runtimes.open_session(made, here)
    assert "\n" not in str(e.value)


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
    flags = Path("/proc/cpuinfo").read_text()
    if precision == "bf16" and "avx512_bf16" not in flags and "amx_bf16" not in flags:
        pytest.skip("this CPU has no bfloat16")
    here = profile("openvino")
    model = openvino.compiled(exported[1].path, here, precision, 1)
    assert executed(model) == {ran}


def test_other_precisions_are_refused_where_they_cannot_be_had(exported):
    with pytest.raises(EdgeKDError, match="not in bf16"):
        runtimes.get("onnxruntime").load(exported[1].path, profile("onnxruntime"), "bf16", None)
    with pytest.raises(EdgeKDError, match="runs fp32, not int8"):
        runtimes.get("torch").load(exported[1].path, profile("torch"), "int8", None)


def test_a_static_profile_runs_a_batch_image_by_image(exported):
    static = profile("openvino", static_batch=True)
    images = pictures(3)
    with torch.inference_mode():
        expected = exported[0](torch.from_numpy(images))[0].numpy()
    got = runtimes.open_session(exported[1], static)(images).logits
    np.testing.assert_allclose(got, expected, atol=2e-5)
