"""INT8 that is really smaller, really runs in int8, and is near what it was made from."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runtimes.test_runtimes import INT8, Tiny, artifact, exported, pictures, profile  # noqa: F401

from edgekd import runtimes
from edgekd.data.dataset import Sample
from edgekd.export import onnx as export
from edgekd.quantize import ptq
from edgekd.records import Artifact, Calibration, EdgeKDError, Threshold


@pytest.fixture(scope="module")
def int8(exported, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("int8")
    return ptq.quantize(exported[1], pictures(64, seed=3), out), exported[1]


@INT8
def test_int8_is_near_fp32_but_not_it(int8):
    made, source = int8
    images = pictures(32, seed=4)
    here = profile("openvino")
    small = runtimes.open_session(made, here)(images).logits
    full = runtimes.open_session(source, here)(images).logits
    error = np.abs(small - full).max() / np.abs(full - full.mean()).max()
    assert 0 < error < 0.1


def test_int8_runs_in_int8(int8):
    from edgekd.runtimes import openvino

    made, _ = int8
    model = openvino.compiled(made.path, profile("openvino"), "int8", 1)
    ran = [
        op.get_rt_info()["runtimePrecision"].value
        for op in model.get_runtime_model().get_ops()
        if "Convolution" in op.get_rt_info()["layerType"].value
    ]
    assert ran
    assert {"i8", "u8"} & set(ran)
    assert made.settings["quantised"] > 0
    assert made.precision == "int8"
    assert made.parents == {"onnx": int8[1].sha256}


def test_int8_is_really_smaller(tmp_path):
    torch.manual_seed(0)
    wide = Tiny()
    wide.body.extend([torch.nn.Conv2d(16, 512, 1), torch.nn.ReLU6(), torch.nn.Conv2d(512, 16, 1)])
    source = export.to_onnx(wide.eval(), artifact(), pictures(), tmp_path / "onnx")
    full = export.to_runtime(source, pictures(), tmp_path / "ir", "openvino")
    made = ptq.quantize(source, pictures(16), tmp_path / "int8")
    small, big = ((a.folder / "model.bin").stat().st_size for a in (made, full))
    assert big > 4 * 16 * 512 * 2  # FP32 weights are not compressed to FP16
    assert small < 0.45 * big


def test_an_int8_file_is_exported_as_it_is(int8, tmp_path):
    from edgekd.runtimes import openvino

    made = export.to_runtime(int8[0], pictures(), tmp_path, "openvino")
    assert made.precision == "int8"
    assert made.parents == {"openvino": int8[0].sha256}
    assert made.metrics["parity_max_abs_logits"].value == 0
    assert made.metrics["parity_agreement"].value == 1
    info = openvino.read(made.path).get_rt_info(["model_info"]).astype(dict)
    assert info["model_type"].astype(str) == "Classification"


def test_the_same_images_give_the_same_file(int8, tmp_path):
    again = ptq.quantize(int8[1], pictures(64, seed=3), tmp_path)
    assert again.files["model.bin"] == int8[0].files["model.bin"]


def test_only_fp32_onnx_is_quantised(int8, tmp_path):
    with pytest.raises(EdgeKDError, match="is openvino int8, not fp32 ONNX"):
        ptq.quantize(int8[0], pictures(8), tmp_path)


def test_calibration_goes_from_file_to_file(int8, tmp_path):
    """Until a file is fitted on its own answers it has that of what it was made from."""
    at = {c: Threshold(probability=0.5, val_sensitivity=1, val_specificity=1) for c in "abc"}
    fitted = Calibration(temperature=2.5, method="nll", thresholds=at)
    module = Tiny().eval()
    network = artifact(calibration=fitted.model_dump())
    onnx = export.to_onnx(module, network, pictures(), tmp_path / "onnx")
    small = ptq.quantize(onnx, pictures(8), tmp_path / "int8")
    last = export.to_runtime(small, pictures(), tmp_path / "ir", "openvino")
    assert [a.temperature for a in (network, onnx, small, last)] == [2.5] * 4
    assert Artifact.load(tmp_path / "ir").calibration == fitted


def test_what_cannot_be_quantised_is_said_and_left_alone(int8, tmp_path):
    with pytest.raises(EdgeKDError, match="images to calibrate on, got none"):
        ptq.quantize(int8[1], pictures(0), tmp_path)
    with pytest.raises(EdgeKDError, match="holds what is to be quantised"):
        ptq.quantize(int8[1], pictures(8), int8[1].folder)
    assert Artifact.load(int8[1].folder) == int8[1]


def test_without_nncf_what_is_there_stays(int8, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.delitem(sys.modules, "edgekd.quantize.engines.nncf")
    with pytest.raises(EdgeKDError, match=r"needs nncf: pip install 'edgekd\[quantize\]'"):
        ptq.quantize(int8[1], pictures(8), int8[0].folder)
    assert Artifact.load(int8[0].folder) == int8[0]


def test_nothing_is_printed(int8, tmp_path, capfd):
    ptq.quantize(int8[1], pictures(8), tmp_path)
    assert capfd.readouterr() == ("", "")


def samples(*counts):
    return [
        Sample(Path(f"{label}-{i}"), label, "", None, "")
        for label, n in enumerate(counts)
        for i in range(n)
    ]


def test_calibration_takes_as_many_of_each_class():
    chosen = ptq.pick_calibration(samples(50, 5, 20), 24, seed=0)
    assert np.bincount([s.label for s in chosen]).tolist() == [10, 5, 9]
    assert chosen == ptq.pick_calibration(samples(50, 5, 20), 24, seed=0)
    assert chosen != ptq.pick_calibration(samples(50, 5, 20), 24, seed=1)
    assert len(ptq.pick_calibration(samples(3, 3), 100, seed=0)) == 6


TRAP = """
import os, socket
def trap(address):
    with open(os.environ["TRAP"], "a") as f:
        f.write(repr(address) + chr(10))
    raise OSError("refused")
socket.socket.connect = socket.socket.connect_ex = lambda self, address: trap(address)
socket.getaddrinfo = lambda *address, **more: trap(address)
"""

QUANTIZE = """
import multiprocessing, sys, threading, urllib.request
from pathlib import Path
import numpy as np
{first}
from edgekd import quantize
from edgekd.records import Artifact
images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
if __name__ == "__main__":
    quantize.quantize(Artifact.load(Path(sys.argv[1])), images, Path(sys.argv[2]))
    for t in threading.enumerate():
        if t is not threading.main_thread():
            t.join(3)
    assert "openvino" in sys.modules and "nncf" in sys.modules
    child = multiprocessing.Process(target=urllib.request.urlopen, args=["http://canary.invalid"])
    child.start()
    child.join()
"""


@pytest.mark.parametrize("first", ["", "import openvino_telemetry"], ids=["absent", "imported"])
def test_nothing_is_sent_nor_written_home(int8, tmp_path, first):
    """openvino and nncf bring telemetry, sent from child processes: the trap is in those too."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "sitecustomize.py").write_text(TRAP)
    script = tmp_path / "script.py"
    script.write_text(QUANTIZE.format(first=first))
    path = os.pathsep.join([str(tmp_path), str(Path(ptq.__file__).parents[1])])
    off = ("CI", "NNCF_CI", "PYTEST_CURRENT_TEST")  # each would switch the telemetry off
    environment = {k: v for k, v in os.environ.items() if k not in off}
    environment |= {"HOME": str(home), "TRAP": str(tmp_path / "trap"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script), str(int8[1].folder), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tried = (tmp_path / "trap").read_text().splitlines()
    assert [t for t in tried if "canary.invalid" not in t] == []
    assert len(tried) == 1  # the trap works: it caught the canary, in a child
    assert not list(home.rglob("*"))
