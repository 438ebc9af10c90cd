"""Which run, which device, and which gates: nothing is chosen without being said."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runtimes.test_runtimes import artifact, exported, profile  # noqa: F401
from typer.testing import CliRunner

from edgekd import data, runtimes
from edgekd.bench.compare import Against
from edgekd.cli import bench as command
from edgekd.cli.main import app
from edgekd.models import feature_layers
from edgekd.pipeline import bench, explain, folders, quantize
from edgekd.pipeline.run import Run
from edgekd.records import (
    Artifact,
    EdgeKDError,
    GateMissed,
    Machine,
    Metric,
    Profile,
    RuntimeUnavailable,
    Spec,
    Timing,
    untracked,
)
from edgekd.records.options import DistillOptions

MACHINE = Machine(name="m", cpu="c", cores=1, memory_gb=1, system="s", python="3")


def test_a_device_that_is_here_is_used(exported):  # noqa: F811
    here = profile("openvino")
    assert runtimes.host(here, exported[1]) == (here, True)


@pytest.mark.parametrize("name", ["jetson", "intel-npu"])
def test_a_stand_in_is_marked_as_one(exported, name):  # noqa: F811
    used, on_device = runtimes.host(Profile.read(name), exported[1])
    assert (used.runtime, used.device, on_device) == ("openvino", "CPU", False)


def test_a_misspelt_runtime_is_no_reason_for_a_stand_in(exported):  # noqa: F811
    wrong = Profile.read("cpu").model_copy(update={"runtime": "openvin"})
    with pytest.raises(EdgeKDError, match='no runtime "openvin"; did you mean "openvino"'):
        runtimes.host(wrong, exported[1])


def test_nothing_that_runs_the_file_is_exit_4():
    engine = artifact(files={"model.engine": ""})
    with pytest.raises(RuntimeUnavailable, match=r"nothing .* runs .*engine: .*tensorrt"):
        runtimes.host(Profile.read("jetson"), engine)


def timing(**change):
    given = {
        "model": "m", "role": "student", "precision": "int8", "artifact_sha256": "",
        "runtime": "openvino", "device": "CPU", "threads": 0, "samples_ms": [1.0], "warmup": 1,
        "load_ms": 1, "throughput_ips": 1, "throughput_batch": 1, "params": 1, "macs": 1,
        "size_bytes": 1, "peak_mb": 1, "machine": MACHINE, "on_device": True,
        "over_budget": {"latency_ms": (9.0, 8.0)},
    } | change  # fmt: skip
    return Timing.parse(given, "test")


def here():
    """A run of which nothing is read."""
    return Run(Path(), Path(), None, "", untracked)


def test_the_budget_judges_the_deployed_file_on_its_own_device():
    with pytest.raises(GateMissed, match=r"over budget: latency_ms 9\.0 of 8"):
        bench.check_budget([timing(over_budget={}), timing()])
    bench.check_budget([timing(), timing(over_budget={})])
    bench.check_budget([timing(on_device=False)])


@pytest.mark.parametrize(
    ("found", "options", "code"),
    [
        ({}, [], 3),  # over budget
        ({"stable": False}, [], 6),  # by figures that decide nothing
        ({"noise": ["others ran"]}, [], 3),
        ({"noise": ["others ran"]}, ["--strict"], 6),
        ({"over_budget": {}}, ["--strict"], 0),
    ],
)
def test_what_bench_ends_with(monkeypatch, found, options, code):
    monkeypatch.setattr(command, "opened", lambda *_: here())
    monkeypatch.setattr(bench, "bench", lambda *_, **__: [timing(**found)])
    monkeypatch.setattr(bench, "bench_page", lambda *_: "bench.html")
    assert CliRunner().invoke(app, ["bench", "--json", *options]).exit_code == code


@pytest.mark.parametrize(
    ("noise", "options", "code"),
    [((), ["--strict"], 0), (("others ran",), [], 0), (("others ran",), ["--strict"], 6)],
)
def test_a_noisy_comparison_can_be_refused(monkeypatch, noise, options, code):
    own = timing(noise=noise)
    found = Against(own=own, other=own, how="turns", rounds=1, times=1, low=1, high=1, tolerance=5,
                    state="pass", reason="no slower")  # fmt: skip
    monkeypatch.setattr(command, "opened", lambda *_: here())
    monkeypatch.setattr(bench, "bench_against", lambda *_, **__: found)
    asked = CliRunner().invoke(app, ["bench", "--against", "onnxruntime", *options])
    assert asked.exit_code == code


def test_int8_may_lose_so_much_and_no_more():
    def made(value):
        return artifact(metrics={"test_balanced_accuracy": Metric(value=value)})

    quantize.check_drop(made(0.901), made(0.91), 1.0)
    with pytest.raises(GateMissed, match=r"loses 2\.0 points .*, 1 allowed"):
        quantize.check_drop(made(0.89), made(0.91), 1.0)


def run(**change):
    given = {"profile": Profile.read("cpu"), "data": "d", "seed": 0,
             "spec": Spec(classes=("a", "b"), size=(32, 32))} | change  # fmt: skip
    return folders.RunRecord(**given)


def test_the_latest_run_is_gone_on_with_and_named(tmp_path):
    with pytest.raises(EdgeKDError, match=r"no run in .* yet: start one"):
        folders.find(tmp_path, None, None)
    folders.begin(tmp_path, tmp_path / "cpu", run())
    jetson = Profile.read("jetson")
    folders.begin(tmp_path, tmp_path / "jetson", run(profile=jetson))
    assert folders.find(tmp_path, None, None) == (
        tmp_path / "jetson", run(profile=jetson), f"the latest in {tmp_path}",
    )  # fmt: skip
    assert folders.find(tmp_path, None, "cpu")[0] == tmp_path / "cpu"
    assert folders.find(tmp_path, tmp_path / "cpu", None)[2] == "--run"


def test_a_folder_of_another_run_is_not_taken_over(tmp_path):
    folders.begin(tmp_path, tmp_path / "cpu", run())
    (tmp_path / "cpu" / "student").mkdir()
    folders.begin(tmp_path, tmp_path / "cpu", run())
    with pytest.raises(EdgeKDError, match=r"another data \(d\): choose another folder with --run"):
        folders.begin(tmp_path, tmp_path / "cpu", run(data="elsewhere"))


def test_an_earlier_run_keeps_its_layer(tmp_path):
    """Where none was named, an earlier edgekd wrote none: its runs keep the rule of that time."""
    assert DistillOptions().student.layer == "auto"
    begun = run(layer="auto", options=DistillOptions())
    begun.save(tmp_path)
    assert folders.RunRecord.load(tmp_path) == begun
    path = tmp_path / folders.RunRecord.FILE
    told = json.loads(path.read_text())
    told["layer"] = told["options"]["student"]["layer"] = ""
    path.write_text(json.dumps(told))
    assert folders.RunRecord.load(tmp_path).layer == ""
    del told["layer"]  # of an edgekd that knew of no other layer
    path.write_text(json.dumps(told))
    assert folders.RunRecord.load(tmp_path).layer == ""


def test_the_layer_is_chosen_on_validation_images_and_their_masks(tmp_path, monkeypatch, caplog):
    spec = Spec(classes=("a", "b"), size=(4, 4))
    samples = [data.Sample(tmp_path / f"{i}.png", i % 2, "", None, "") for i in range(40)]
    for i, sample in enumerate(samples):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(sample.path)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(mask)
    samples[39] = samples[39]._replace(mask=mask)
    asked = []

    def kept(trained, images, masks, folder, *, net, track):
        asked.append((images, masks, folder))
        return feature_layers.Choice("head", {"head 1x4x4": {"score": 0.1, "out": out}})

    monkeypatch.setattr(feature_layers, "kept_choice", kept)
    dataset = data.Dataset(tmp_path, ("a", "b"), {"val": tuple(samples)}, "f", "", True, ())
    trained = artifact(spec=spec, folder=tmp_path / "teacher")
    for out in (0.0, 1.0):
        assert folders.explained_layer(trained, dataset).layer == "head"
        assert ("no layer of" in caplog.text) == bool(out)
    images, masks, folder = asked[0]
    levels = (images[:, 0, 0, 0] * spec.std[0] + spec.mean[0]) * 255
    np.testing.assert_allclose(levels, np.linspace(0, 39, 16).astype(int), atol=1e-3)
    assert masks[:15].sum() == 0
    np.testing.assert_array_equal(masks[15], np.eye(4, dtype=bool))
    assert folder == tmp_path / "teacher"


def test_a_file_that_cannot_be_written_leaves_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeKDError, match="cannot write to folder"):
        folders.begin(tmp_path, tmp_path / "file" / "cpu", run())


def test_gallery_images_are_spread_over_classes():
    samples = [data.Sample(Path(str(i)), int(i >= 90), "", None, "") for i in range(100)]
    chosen = [int(s.path.name) for s in explain.spread(samples, 8)]
    assert [c for c in chosen if c >= 90] == [90, 93, 96, 99]
    assert chosen[:4] == [0, 29, 59, 89]


def stored(folder, content, **change):
    folder.mkdir(parents=True)
    (folder / "f.onnx").write_bytes(content)
    digest = folders.hashlib.sha256(content).hexdigest()
    return artifact(files={"f.onnx": digest}, **change).save(folder)


def test_files_of_an_earlier_student_are_passed_over(tmp_path):
    student = stored(tmp_path / "student", b"new")
    onnx = stored(tmp_path / "onnx", b"onnx", kind="onnx", parents={"student": student.sha256})
    old = {"kind": "openvino", "precision": "int8"}
    stored(tmp_path / "int8", b"old", parents={"onnx": "0" * 64}, **old)
    assert folders.exports(tmp_path) == [onnx]
    folders.shutil.rmtree(tmp_path / "int8")
    int8 = stored(tmp_path / "int8", b"new int8", parents={"onnx": onnx.sha256}, **old)
    assert folders.exports(tmp_path) == [onnx, int8]
    last = stored(tmp_path / "openvino-int8", b"ir", parents={"openvino": int8.sha256}, **old)
    assert folders.exports(tmp_path) == [onnx, last]


class Drawn:
    """Validation and test splits of random pictures, and a network that answers half right."""

    def __init__(self, monkeypatch):
        rng = np.random.default_rng(0)
        self.splits = {
            split: [
                data.Sample(Path(f"{split}{i}"), i % 3, f"{split}{i}", None, f"{split}{i:020}")
                for i in range(60)
            ]
            for split in ("train", "val", "test")
        }
        self.logits = rng.standard_normal((120, 3)).astype(np.float32)
        self.logits[np.arange(120), np.arange(120) % 3] += 1
        self.asked = 0
        monkeypatch.setattr(data, "load_pixels", lambda s, _: np.zeros((len(s), 2, 2, 3), np.uint8))
        monkeypatch.setattr(folders.runtimes, "open_session", lambda *_: None)
        monkeypatch.setattr(folders.classification, "answers", self.answers)

    def answers(self, session, images, track):
        self.asked += 1
        return self.logits[: len(images)] if self.asked % 2 else self.logits[-len(images) :]


def test_a_file_is_calibrated_on_its_own_answers(monkeypatch, tmp_path):
    """INT8 with logits twice as large: its temperature is twice as high, its figures the same."""
    drawn, here = Drawn(monkeypatch), profile("openvino")
    spec = artifact().spec.model_copy(update={"classes": ("a", "b", "c")})
    full = artifact(files={"m.onnx": "f" * 64}, spec=spec, folder=tmp_path / "fp32")
    small = artifact(files={"m.xml": "8" * 64}, spec=spec, folder=tmp_path / "int8",
                     precision="int8")  # fmt: skip
    for a in (full, small):
        a.folder.mkdir()
    full = folders.judged(full, here, drawn, full)
    drawn.logits = drawn.logits * 2
    inherited = small.model_copy(update={"calibration": full.calibration})
    small = folders.judged(inherited, here, drawn, full, rivals=[full])
    assert small.temperature == pytest.approx(2 * full.temperature, rel=1e-6)
    assert small.metrics["test_ece"].value == pytest.approx(full.metrics["test_ece"].value)
    assert small.evaluation.paired["student fp32"].mcnemar_p == 1
    assert drawn.asked == 4
    assert folders.judged(small, here, drawn, full, rivals=[full]) == small
    strict = folders.rejudged(full, drawn, 0.9)
    anew = folders.judged(small, here, drawn, strict, rivals=[full])
    assert anew.calibration.sensitivity == 0.9
    assert drawn.asked == 4  # from the logits that were kept
    (tmp_path / "fp32" / "m.onnx").write_bytes(b"")
    assert Artifact.parse(
        json.loads((tmp_path / "fp32" / "artifact.json").read_text()), "file"
    ).calibration.sensitivity == 0.9  # fmt: skip


def test_an_artifact_of_an_earlier_edgekd_stays_as_it_is():
    old = artifact()
    assert folders.rejudged(old, None, None) is old
    with pytest.raises(EdgeKDError, match="keeps no logits to choose thresholds from"):
        folders.rejudged(old, None, 0.9)
