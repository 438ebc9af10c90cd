"""What is written is what was trained: parity, metadata, and refusal."""

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from runtimes.test_runtimes import SPEC, Tiny, artifact, pictures

from edgekd import runtimes
from edgekd.export import onnx as export
from edgekd.records import Artifact, EdgeKDError, Profile, RuntimeUnavailable


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Tiny().eval()


def test_the_onnx_file_is_pinned_whole_and_describes_itself(module, tmp_path, capfd):
    made = export.to_onnx(module, artifact(), pictures(), tmp_path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "artifact.json", "golden.npz", "model.onnx", "model.pt2",
    ]  # fmt: skip
    model = onnx.load(made.path)
    assert model.ir_version == 10
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert [o.name for o in model.graph.output] == ["logits", "features"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    inside = {p.key: json.loads(p.value) for p in model.metadata_props if p.key[:7] == "edgekd."}
    assert inside["edgekd.classes"] == ["a", "b", "c"]
    assert inside["edgekd.size"] == [32, 32]
    assert inside["edgekd.mean"] == list(SPEC.mean)
    assert inside["edgekd.layer"] == "last 16x8x8"
    assert inside["edgekd.source"] == artifact().sha256
    assert made.metrics["parity_max_abs_logits"].value < 1e-5
    assert made.metrics["parity_agreement"].value == 1
    assert Artifact.load(tmp_path) == made


def test_no_path_of_this_machine_is_in_a_file(module, tmp_path):
    """Torch notes in whose folder each operation was written; a patient's site may be its name."""
    made = export.to_onnx(module, artifact(), pictures(), tmp_path)
    here = [str(Path(x).resolve()) for x in (__file__, export.__file__, torch.__file__)]
    with zipfile.ZipFile(tmp_path / "model.pt2") as program:
        inside = [program.read(name) for name in program.namelist()]
    for content in (made.path.read_bytes(), *inside):
        for path in here:
            assert path.encode() not in content
        assert str(Path(torch.__file__).parents[1]).encode() not in content


class Restless(Tiny):
    """Gives another answer each time, as a model left in training mode does."""

    calls = 0.0

    def forward(self, image):
        logits, features = super().forward(image)
        if not torch.compiler.is_compiling():
            self.calls += 1.0
            logits = logits + self.calls
        return logits, features


def test_a_file_that_answers_otherwise_is_refused(tmp_path):
    with pytest.raises(EdgeKDError, match=r"gives other logits: .* must not be used"):
        export.to_onnx(Restless().eval(), artifact(), pictures(), tmp_path)
    with pytest.raises(EdgeKDError, match="holds no artifact"):
        Artifact.load(tmp_path)


def test_a_refused_export_leaves_nothing_that_looks_finished(module, tmp_path):
    export.to_onnx(module, artifact(), pictures(), tmp_path)
    with pytest.raises(EdgeKDError, match="gives other logits"):
        export.to_onnx(Restless().eval(), artifact(), pictures(), tmp_path)
    with pytest.raises(EdgeKDError, match="holds no artifact"):
        Artifact.load(tmp_path)
    assert not list(tmp_path.glob(".making-*"))


def test_nan_is_refused_even_if_only_a_single_image_gives_it():
    right = runtimes.Outputs(np.zeros((4, 3), np.float32), np.zeros((4, 2, 1, 1), np.float32))

    def session(images):
        value = np.float32(np.nan if len(images) == 1 else 0)
        return runtimes.Outputs(*(x[: len(images)] + value for x in right))

    with pytest.raises(EdgeKDError, match="gives other logits: largest error nan"):
        export._parity(session, right, pictures(4), 1e-3, "x.onnx")


def test_one_image_is_enough_and_the_batch_stays_free(module, tmp_path):
    made = export.to_onnx(module, artifact(), pictures(1), tmp_path)
    here = export._cpu("onnxruntime")
    images = pictures(5)
    with torch.inference_mode():
        expected = module(torch.from_numpy(images))[0].numpy()
    np.testing.assert_allclose(
        runtimes.open_session(made, here)(images).logits, expected, atol=2e-5
    )
    with pytest.raises(EdgeKDError, match="got none"):
        export.to_onnx(module, artifact(), pictures(0), tmp_path)


def test_the_file_is_compared_in_openvino_without_onnxruntime(module, tmp_path, monkeypatch):
    real, absent = runtimes.get, {"onnxruntime"}

    def get(name):
        if name in absent:
            raise RuntimeUnavailable(f"runtime {name} needs {name}")
        return real(name)

    monkeypatch.setattr(runtimes, "get", get)
    made = export.to_onnx(module, artifact(), pictures(), tmp_path)
    assert made.settings["compared_in"] == "openvino"
    assert "openvino" in made.versions
    assert 0 <= made.metrics["parity_max_abs_logits"].value < 1e-5
    absent.add("openvino")
    with pytest.raises(RuntimeUnavailable, match=r"edgekd\[onnxruntime\]' \(or \[openvino\]"):
        export.to_onnx(module, artifact(), pictures(), tmp_path)


def test_a_file_in_use_is_replaced_not_written_over(module, tmp_path):
    # A mapped file that shrinks ends the process with SIGBUS.
    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    made = export.to_runtime(source, pictures(), tmp_path / "ir", "openvino")
    before = (tmp_path / "ir/model.bin").read_bytes()
    with torch.no_grad():
        module.head.weight.add_(1)
    with (tmp_path / "ir/model.bin").open("rb") as in_use:
        other = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
        again = export.to_runtime(other, pictures(), tmp_path / "ir", "openvino")
        assert in_use.read() == before
    assert again.files["model.bin"] != made.files["model.bin"]
    assert Artifact.load(tmp_path / "ir") == again


def test_an_export_does_not_replace_what_it_is_made_from(module, tmp_path):
    source = export.to_onnx(module, artifact(), pictures(), tmp_path)
    with pytest.raises(EdgeKDError, match="holds what is to be exported: choose another folder"):
        export.to_runtime(source, pictures(), tmp_path, "openvino")
    assert Artifact.load(tmp_path) == source


def test_a_tolerance_of_zero_refuses_rounding(module, tmp_path):
    with pytest.raises(EdgeKDError, match=r"--tolerance"):
        export.to_onnx(module, artifact(), pictures() * 3, tmp_path, tolerance=0)


def test_openvino_ir_carries_what_model_api_reads(module, tmp_path):
    from edgekd.runtimes import openvino

    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    made = export.to_runtime(source, pictures(), tmp_path / "ir", "openvino")
    assert made.kind == "openvino"
    assert made.parents == {"onnx": source.sha256}
    assert list(made.files) == ["model.xml", "model.bin", "golden.npz"]
    assert made.metrics["parity_max_abs_logits"].value < 1e-5
    model = openvino.read(made.path)
    info = {k: v.astype(str) for k, v in model.get_rt_info(["model_info"]).astype(dict).items()}
    assert info["model_type"] == "Classification"
    assert info["labels"].split() == ["a", "b", "c"]
    np.testing.assert_allclose(
        [float(x) for x in info["mean_values"].split()], 255 * np.array(SPEC.mean), rtol=1e-5
    )
    weights = [c for c in model.get_ops() if c.get_type_name() == "Constant"]
    assert not any(c.get_element_type().get_type_name() == "f16" for c in weights)


def test_what_cannot_be_written_is_said(module, tmp_path):
    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    with pytest.raises(EdgeKDError, match="no export to tflite: openvino, onnxruntime"):
        export.to_runtime(source, pictures(), tmp_path / "x", "tflite")


@pytest.mark.parametrize(("runtime", "file"), [("onnxruntime", "model.onnx"),
                                               ("openvino", "model.xml")])  # fmt: skip
def test_fp16_is_half_the_size_and_fp32_at_both_ends(tmp_path, runtime, file):
    torch.manual_seed(0)
    wide = Tiny()
    wide.body.extend([torch.nn.Conv2d(16, 512, 1), torch.nn.ReLU6(), torch.nn.Conv2d(512, 16, 1)])
    source = export.to_onnx(wide.eval(), artifact(), pictures(), tmp_path / "onnx")
    made = export.to_runtime(source, pictures(), tmp_path / "half", runtime, precision="fp16")
    assert made.precision == "fp16"
    assert next(iter(made.files)) == file
    assert 0 < made.metrics["parity_max_abs_logits"].value < export.TOLERANCE["fp16"]
    full = export.to_runtime(source, pictures(), tmp_path / "full", runtime)
    bulk = [(a.folder / {"model.xml": "model.bin"}.get(file, file)).stat() for a in (made, full)]
    assert bulk[0].st_size < 0.7 * bulk[1].st_size
    cpu = Profile(name="cpu", runtime="openvino", device="CPU")  # which computes in FP32
    opened = runtimes.open_session(made, cpu)(pictures()).logits
    np.testing.assert_allclose(opened, runtimes.open_session(full, cpu)(pictures()).logits,
                               atol=export.TOLERANCE["fp16"])  # fmt: skip
    if runtime == "onnxruntime":
        model = onnx.load(made.path)
        types = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        assert types == {onnx.TensorProto.FLOAT}
        assert any(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)


def test_what_has_lost_precision_does_not_get_it_back(module, tmp_path):
    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    half = export.to_runtime(source, pictures(), tmp_path / "h", "onnxruntime", precision="fp16")
    with pytest.raises(EdgeKDError, match="is fp16: no fp32 can be made of it"):
        export.to_runtime(half, pictures(), tmp_path / "x", "openvino", precision="fp32")
    with pytest.raises(EdgeKDError, match=r"runs no bf16 made from model\.onnx"):
        export.to_runtime(source, pictures(), tmp_path / "x", "onnxruntime", precision="bf16")


def test_a_static_profile_gets_a_static_file(module, tmp_path):
    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    npu = Profile(name="npu", runtime="openvino", device="NPU", static_batch=True)
    made = export.to_runtime(source, pictures(), tmp_path / "ir", "openvino", profile=npu)
    from edgekd.runtimes import openvino

    assert openvino.read(made.path).input(0).shape == [1, 3, 32, 32]
    one = export.to_runtime(
        source, pictures(1), tmp_path / "o", "onnxruntime",
        profile=npu.model_copy(update={"runtime": "onnxruntime"}),
    )  # fmt: skip
    shape = onnx.load(one.path).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 3, 32, 32]


def test_pixels_in_give_what_prepared_images_give(module, tmp_path):
    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    made = export.of_pixels(source, pixels, tmp_path / "pixels")
    assert made.metrics["parity_max_abs_logits"].value < 1e-5
    graph = onnx.load(made.path).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    with pytest.raises(EdgeKDError, match=r"takes uint8 \(N, H, W, 3\): it is for other programs"):
        runtimes.open_session(made, export._cpu("onnxruntime"))


def test_the_torch_program_is_a_file_of_its_own(module, tmp_path):
    source = export.to_onnx(module, artifact(), pictures(), tmp_path / "onnx")
    made = export.to_runtime(source, pictures(), tmp_path / "torch", "torch")
    assert (made.kind, next(iter(made.files))) == ("torch", "model.pt2")
    assert made.metrics["parity_max_abs_logits"].value < 1e-5
    with pytest.raises(EdgeKDError, match="the torch runtime runs fp32"):
        export.to_runtime(source, pictures(), tmp_path / "x", "torch", precision="fp16")


def test_bfloat16_is_told_from_a_wrong_file_by_its_usual_error():
    """One value far astray is rounding; values that are another network's are not."""
    rng = np.random.default_rng(0)
    right = runtimes.Outputs(rng.standard_normal((1, 3)), rng.standard_normal((1, 5, 30, 30)))
    astray = right.features.copy()
    astray[0, 0, 0, 0] += 2 * np.abs(right.features).max()
    other = rng.standard_normal(right.features.shape)

    def parity(features, **more):
        said = right._replace(features=features)
        return export._parity(lambda _: said, right, pictures(1), 0.3, "x.onnx", **more)

    found = parity(astray, rough=True)
    expected = np.sqrt(np.square(astray - right.features).mean() / np.square(right.features).mean())
    assert found["parity_rms_features"].value == pytest.approx(expected)
    assert found["parity_max_abs_features"].value == pytest.approx(2)
    with pytest.raises(EdgeKDError, match=r"other features: root mean square error 1\.4"):
        parity(other, rough=True)
    with pytest.raises(EdgeKDError, match="other features: largest error 2 of that of the values"):
        parity(astray)
