"""A file that answers otherwise than when it was made is noticed, on any machine."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from runtimes.test_runtimes import Tiny, artifact, exported, pictures, profile  # noqa: F401
from typer.testing import CliRunner

from edgekd import runtimes
from edgekd.cli.main import app
from edgekd.export import onnx as export
from edgekd.pipeline import doctor
from edgekd.records import Artifact, EdgeKDError, RuntimeUnavailable
from edgekd.runtimes import Outputs, golden


def call(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def ir(exported, tmp_path):  # noqa: F811
    return export.to_runtime(exported[1], pictures(), tmp_path / "ir", "openvino")


def test_golden_samples_are_drawn_and_answered(ir):
    kept = golden.read(ir)
    assert kept.pixels.shape == (3, 32, 32, 3)
    assert kept.pixels.dtype == np.uint8
    assert len(np.unique(kept.pixels)) > 50  # a picture, not a flat field
    assert kept.outputs.logits.shape == (3, 3)
    found = golden.verify(ir, runtimes.open_session(ir, profile("openvino")), "openvino", "CPU")
    assert found.ok
    assert found.logits < 1e-6
    assert found.predictions == 0


@pytest.mark.parametrize("change", [
    lambda o: Outputs(o.logits + 0.1, o.features),
    lambda o: Outputs(o.logits, o.features * 1.1),
    lambda o: Outputs(o.logits * np.nan, o.features),
    lambda o: Outputs(o.logits[:, ::-1], o.features),
], ids=["logits", "features", "nan", "classes"])  # fmt: skip
def test_other_answers_are_not_as_stored(ir, change):
    session = runtimes.open_session(ir, profile("openvino"))
    assert not golden.verify(ir, lambda x: change(session(x)), "openvino", "CPU").ok


def test_verify_sends_them_through_the_file(ir):
    told = json.loads(call("verify", ir.folder, "--json").stdout)
    assert told["ok"]
    assert told["runtime"] == "openvino"
    assert "as stored" in call("verify", ir.folder, "--profile", "cpu").stdout
    assert "sees no device NPU" in call("verify", ir.folder, "-p", "intel-npu", code=4).stderr


def test_a_file_with_another_files_golden_samples_fails(ir, tmp_path):
    import shutil

    import torch

    torch.manual_seed(7)
    other = export.to_onnx(Tiny().eval(), artifact(), pictures(), tmp_path / "other")
    shutil.copy(other.folder / golden.FILE, ir.folder / golden.FILE)
    refused = call("verify", ir.folder, code=1)
    assert "golden.npz is not the file that was saved: sha256 differs" in refused.stderr
    record = json.loads((ir.folder / "artifact.json").read_text())
    record["files"][golden.FILE] = other.files[golden.FILE]
    (ir.folder / "artifact.json").write_text(json.dumps(record))
    failed = call("verify", ir.folder, code=3)
    assert "does not answer on CPU as it did when it was made" in failed.stderr


def test_a_file_without_golden_samples_says_so(exported):  # noqa: F811
    bare = exported[1].model_copy(update={"files": {"model.onnx": "0" * 64}})
    with pytest.raises(EdgeKDError, match="no golden samples: export it again"):
        golden.read(bare)


def test_doctor_tries_every_runtime_and_says_what_is_absent():
    found = {c["what"]: c for c in json.loads(call("doctor", "--json").stdout)}
    for name in ("runtime onnxruntime on CPU", "runtime openvino on CPU", "runtime torch on cpu",
                 "engine nncf", "engine ort", "profile cpu"):  # fmt: skip
        assert found[name]["state"] == "PASS", found[name]
    npu = found["profile intel-npu"]
    assert (npu["state"], npu["detail"]) == ("ABSENT", "openvino sees no NPU here")
    assert all(c["fix"] for c in found.values() if c["state"] != "PASS")
    assert "PASS" in call("doctor").stdout


def test_doctor_finds_a_runtime_that_answers_wrongly(monkeypatch):
    runtime = runtimes.get("onnxruntime")
    real = runtime.load

    def wrong(*given):
        session = real(*given)
        return lambda x: Outputs(session(x).logits + 1, session(x).features)

    monkeypatch.setattr(runtime, "load", wrong)
    shown = call("doctor", code=1)
    assert "FAIL" in shown.stdout
    assert "runtime onnxruntime on CPU: see the fix above" in shown.stderr


def test_doctor_names_the_package_of_an_absent_runtime(monkeypatch):
    real = runtimes.get

    def get(name):
        if name == "openvino":
            raise RuntimeUnavailable(
                "runtime openvino needs openvino: pip install 'edgekd[openvino]'"
            )
        return real(name)

    monkeypatch.setattr(runtimes, "get", get)
    found = {c.what: c for c in doctor.examine()}
    assert found["runtime openvino"].state == "ABSENT"
    assert found["runtime openvino"].fix == "pip install 'edgekd[openvino]'"


def test_the_tiny_model_is_what_its_script_makes(tmp_path):
    from tiny_model import make

    make(tmp_path)
    made, shipped = Artifact.load(tmp_path), Artifact.load(doctor.TINY)
    assert made.sha256 == shipped.sha256
    assert made.params == shipped.params == 419


def test_onnxruntime_reports_to_nobody(tmp_path):
    """Its telemetry, where the wheel has it, leaves a session file in the temporary folder."""
    pytest.importorskip("onnxruntime")
    code = (
        "import edgekd\n"
        "from pathlib import Path\n"
        "from edgekd.records import Artifact, Profile\n"
        "from edgekd.runtimes import open_session\n"
        "cpu = Profile(name='ort', runtime='onnxruntime', device='CPU')\n"
        "open_session(Artifact.load(Path(edgekd.__file__).parent / 'runtimes/tiny'), cpu)"
    )
    own = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=own | {"TMPDIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())
