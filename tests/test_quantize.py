"""INT8 that is really smaller, really runs in int8, and is near what it was made from."""

import subprocess
import sys

import numpy as np
import pytest
from test_runtimes import exported, pictures, profile  # noqa: F401

from edgekd import quantize, runtimes
from edgekd.data import Sample
from edgekd.records import EdgeKDError


@pytest.fixture(scope="module")
def int8(exported, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("int8")
    return quantize.quantize(exported[1], pictures(64, seed=3), out), exported[1]


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
    assert made.settings["fake_quantize_nodes"] > 0
    assert made.precision == "int8"
    assert made.parents == {"onnx": int8[1].sha256}


def test_the_same_images_give_the_same_file(int8, tmp_path):
    again = quantize.quantize(int8[1], pictures(64, seed=3), tmp_path)
    assert again.files["model.bin"] == int8[0].files["model.bin"]


def test_only_fp32_onnx_is_quantised(int8, tmp_path):
    with pytest.raises(EdgeKDError, match="is openvino int8, not fp32 ONNX"):
        quantize.quantize(int8[0], pictures(8), tmp_path)


def test_nothing_is_printed(int8, tmp_path, capfd):
    quantize.quantize(int8[1], pictures(8), tmp_path)
    assert capfd.readouterr() == ("", "")


def samples(*counts):
    return [
        Sample(quantize.Path(f"{label}-{i}"), label, "", None, "")
        for label, n in enumerate(counts)
        for i in range(n)
    ]


def test_calibration_takes_as_many_of_each_class():
    chosen = quantize.pick_calibration(samples(50, 5, 20), 24, seed=0)
    assert np.bincount([s.label for s in chosen]).tolist() == [10, 5, 9]
    assert chosen == quantize.pick_calibration(samples(50, 5, 20), 24, seed=0)
    assert chosen != quantize.pick_calibration(samples(50, 5, 20), 24, seed=1)
    assert len(quantize.pick_calibration(samples(3, 3), 100, seed=0)) == 6


def test_no_socket_is_opened(int8):
    """openvino and nncf bring telemetry; a connection attempt is an error here."""
    source = int8[1]
    code = f"""
import os, socket, sys, threading
for name in ("CI", "NNCF_CI", "PYTEST_CURRENT_TEST"):
    os.environ.pop(name, None)
tried = []
def refuse(self, address, *rest):
    tried.append(address)
    raise OSError("refused")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: tried.append(a) or (_ for _ in ()).throw(OSError("refused"))
from pathlib import Path
import numpy as np, tempfile
from edgekd import quantize
from edgekd.records import Artifact
images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
with tempfile.TemporaryDirectory() as out:
    quantize.quantize(Artifact.load(Path({str(source.folder)!r})), images, Path(out))
for t in threading.enumerate():
    if t is not threading.main_thread():
        t.join(3)
assert "openvino" in sys.modules and "nncf" in sys.modules
print("tried", tried)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tried []"
