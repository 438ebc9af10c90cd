"""Artifacts that were cut, swapped or edited: each refused with one line, none of them opened."""

import json
import shutil
import struct

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from runtimes.test_runtimes import artifact, exported, pictures  # noqa: F401
from typer.testing import CliRunner

from edgekd import runtimes
from edgekd.cli.main import app
from edgekd.export import onnx as export
from edgekd.records import Artifact, EdgeKDError, sha256

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture
def folder(exported, tmp_path):  # noqa: F811
    """A copy of an exported ONNX artifact, to be broken."""
    return shutil.copytree(exported[1].folder, tmp_path / "copy")


def resigned(folder):
    """As by someone who edits a file and its record: every hash fits again."""
    record = json.loads((folder / "artifact.json").read_text())
    record["files"] = {name: sha256(folder / name) for name in record["files"]}
    (folder / "artifact.json").write_text(json.dumps(record))
    return Artifact.load(folder)


def opened(made, runtime):
    cpu = export._cpu(runtime)
    return runtimes.open_session(made, cpu)(pictures(2))


def edit(folder, change):
    model = onnx.load(folder / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_a_file_that_is_not_the_one_saved_is_not_opened(folder):
    for damage in (lambda b: b[:-1], lambda b: b[:100], lambda b: b"", lambda b: b + b"x"):
        before = (folder / "model.onnx").read_bytes()
        (folder / "model.onnx").write_bytes(damage(before))
        with pytest.raises(EdgeKDError, match="is not the file that was saved: sha256 differs"):
            Artifact.load(folder)
        (folder / "model.onnx").write_bytes(before)
    assert Artifact.load(folder)


def test_swapped_files_are_noticed(folder):
    one, two = folder / "model.onnx", folder / "model.pt2"
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(EdgeKDError, match="sha256 differs"):
        Artifact.load(folder)


@pytest.mark.parametrize("change", [
    lambda r: r["spec"].update(classes=["a"]),
    lambda r: r["spec"].update(size=[32]),
    lambda r: r["spec"].update(mean=[0.5, None, 0.5]),
    lambda r: r.update(precision="int4"),
    lambda r: r.update(kind="pickle"),
    lambda r: r.update(files={}),
    lambda r: r.update(files={"../model.onnx": "0" * 64}),
    lambda r: r.update(files={"/etc/passwd": "0" * 64}),
    lambda r: r.update(extra="x"),
    lambda r: r.update(schema_version=999),
    lambda r: r.update(params="many"),
    lambda r: r.pop("spec"),
], ids=lambda change: f"line-{change.__code__.co_firstlineno}")  # fmt: skip
def test_an_edited_record_is_refused(folder, change):
    record = json.loads((folder / "artifact.json").read_text())
    change(record)
    (folder / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(EdgeKDError) as e:
        Artifact.load(folder)
    assert "artifact.json" in str(e.value)
    assert len(str(e.value)) < 500


def test_a_record_that_is_no_json_or_too_deep_is_refused(folder):
    for text in ("", "{", "[]", "null", '{"kind": NaN}', "[" * 100_000, "\x00"):
        (folder / "artifact.json").write_text(text)
        with pytest.raises(EdgeKDError, match=r"artifact\.json"):
            Artifact.load(folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_operator_set_of_the_future_is_refused(folder, runtime):
    edit(folder, lambda m: setattr(m.opset_import[0], "version", 999))
    with pytest.raises(EdgeKDError, match="is of operator set 999, read up to"):
        opened(resigned(folder), runtime)


def test_the_operator_set_is_read_as_onnx_writes_it(folder):
    data = (folder / "model.onnx").read_bytes()
    (said,) = [x.version for x in onnx.load_from_string(data).opset_import if not x.domain]
    assert runtimes.opset(data) == said == export.OPSET
    assert runtimes.opset(data[:-40]) in (0, said)
    assert runtimes.opset(b"") == runtimes.opset(b"\xff" * 20) == 0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_unknown_operator_is_refused(folder, runtime):
    edit(folder, lambda m: setattr(m.graph.node[0], "op_type", "Exec"))
    with pytest.raises(EdgeKDError, match=r"cannot (load|read|compile)"):
        opened(resigned(folder), runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_that_lie_outside_the_file_are_not_read(folder, runtime):
    """External data may name any path on the machine."""

    def outside(model):
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", "../../../../etc/passwd"),
            ("offset", "0"),
            ("length", "864"),
        ):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value

    edit(folder, outside)
    with pytest.raises(EdgeKDError, match=r"cannot (load|read|compile)"):
        opened(resigned(folder), runtime)


def nan(model):
    weight = model.graph.initializer[0]
    values = np.full_like(numpy_helper.to_array(weight), np.nan)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nan_weights_fail_verification_with_a_line(folder, runtime):
    edit(folder, nan)
    resigned(folder)
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 3
    assert "does not answer on CPU as it did when it was made" in done.stderr


def claim(folder):
    """A tensor whose header says two gigabytes, in a file of kilobytes."""
    data = bytearray((folder / "model.onnx").read_bytes())
    model = onnx.load(folder / "model.onnx")
    raw = model.graph.initializer[0].raw_data
    at = data.find(raw)
    assert at > 0
    data[at - 2 : at] = b"\x80\x80\x80\x80\x08"[:2]  # the length before it, now a larger one
    (folder / "model.onnx").write_bytes(bytes(data))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_header_that_claims_two_gigabytes_is_refused(folder, runtime):
    claim(folder)
    with pytest.raises(EdgeKDError, match=r"cannot (load|read|compile)"):
        opened(resigned(folder), runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dimensions_of_two_gigabytes_are_refused(folder, runtime):
    def huge(model):
        model.graph.initializer[0].dims[:] = [16, 3, 3, 4_000_000]

    edit(folder, huge)
    with pytest.raises(EdgeKDError, match=r"cannot (load|read|compile)"):
        opened(resigned(folder), runtime)


def test_golden_samples_that_claim_much_are_refused(folder):
    """A .npy header of a shape that does not fit its bytes."""
    path = folder / "golden.npz"
    import zipfile

    with zipfile.ZipFile(path) as old:
        kept = {n: old.read(n) for n in old.namelist()}
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (500000000,), }"
    header += b" " * (117 - len(header)) + b"\n"
    kept["logits.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w") as new:
        for name, content in kept.items():
            new.writestr(name, content)
    resigned(folder)
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1
    assert "golden.npz" in done.stderr
    assert "Traceback" not in done.output


def outcome(made, runtime):
    """The error's text, or what was answered."""
    try:
        return opened(made, runtime)
    except EdgeKDError as e:
        return str(e)


def test_random_damage_is_refused_or_harmless(folder):
    """Flipped bytes in a file whose hash was made to fit: one line of ours, or an answer."""
    rng = np.random.default_rng(0)
    before = (folder / "model.onnx").read_bytes()
    for _ in range(60):
        data = bytearray(before)
        for at in rng.integers(len(data), size=3):
            data[at] = rng.integers(256)
        (folder / "model.onnx").write_bytes(bytes(data))
        made = resigned(folder)
        for runtime in RUNTIMES:
            found = outcome(made, runtime)
            assert "\n" not in found if isinstance(found, str) else found.logits.shape == (2, 3)
