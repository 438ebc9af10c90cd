"""The whole line through the command line, on a few phantoms: every file that it promises."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.ofa.pareto import Front
from edgekd.pipeline.explain import CODES
from edgekd.pipeline.search import Sought
from edgekd.records import Artifact, Fidelity, Timing

pytestmark = pytest.mark.slow

# A pretrained student of two epochs on 42 images has logits near 0: FP16 is beyond the tolerance.
ONCE = ["--shrink-epochs", "1", "--subnets", "20", "--estimate", "--start", "scratch"]
SMALL = ["--size", "64", "--epochs", "2", "--batch", "16"]


UNSURE = (0, 6)  # a busy machine is not steady


def edgekd(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    fine = code if isinstance(code, tuple) else (code,)
    assert result.exit_code in fine or code is None, result.output
    return result


@pytest.fixture(scope="module")
def line(phantoms, tmp_path_factory):
    """A finished run: distilled, quantised, exported, timed, explained, reported."""
    runs = tmp_path_factory.mktemp("runs")
    edgekd("distill", "--data", phantoms, "--teacher", "test_resnet", "--teacher-epochs", "2",
           *ONCE, *SMALL, "--runs", runs)  # fmt: skip
    edgekd("quantize", "--engine", "nncf", "--calibration-images", "16", "--max-drop", "100",
           "--runs", runs)  # fmt: skip
    edgekd("export", "--format", "openvino", "--runs", runs)
    edgekd("export", "--format", "onnx", "--precision", "fp32", "--runs", runs)
    bench = edgekd("bench", "--quick", "--seconds", "0.5", "--runs", runs, "--json", code=UNSURE)
    assert (runs / "cpu" / "bench" / "bench.html").is_file()
    explain = edgekd("explain", "--images", "18", "--runs", runs, "--json", code=None)
    report = edgekd("report", "--runs", runs)
    return runs / "cpu", bench, explain, Path(report.stdout.strip())


def test_every_stage_leaves_its_record(line):
    run, *_ = line
    student = Artifact.load(run / "student")
    onnx = Artifact.load(run / "onnx")
    int8 = Artifact.load(run / "openvino-int8")
    assert onnx.parents == {"student": student.sha256}
    assert int8.precision == "int8"
    assert int8.size_bytes < 0.45 * Artifact.load(run / "onnx-fp32").path.stat().st_size
    teacher = json.loads((run / "run.json").read_text())["teacher"]
    assert Artifact.load(Path(teacher)).model == "test_resnet"
    assert set(student.parents) == {"teacher", "supernet"}
    assert student.metrics["cut_test_balanced_accuracy"].low is not None
    sought, front = Sought.load(run / "search"), Front.load(run / "search")
    assert student.model == sought.chosen
    assert sought.estimated
    assert student.arch in [m.arch for m in front.members]
    assert (run / "search" / "front.png").read_bytes().startswith(b"\x89PNG")
    for made in (student, onnx, int8):
        assert made.metrics["test_balanced_accuracy"].low is not None
        assert made.metrics["test_ece"].low is not None
        assert made.evaluation.paired["teacher fp32"].images == 18
        assert set(made.calibration.thresholds) == set(made.spec.classes)
    assert onnx.temperature == pytest.approx(student.temperature, rel=0.01)
    assert "student fp32" in int8.evaluation.paired
    assert onnx.metrics["parity_max_abs_logits"].value < 1e-3
    same = student.metrics["test_balanced_accuracy"].value
    assert onnx.metrics["test_balanced_accuracy"].value == pytest.approx(same)


def test_bench_prints_one_json_document_of_all_candidates(line):
    run, bench, *_ = line
    found = [Timing.parse(t, "stdout") for t in json.loads(bench.stdout)]
    assert [(t.role, t.precision) for t in found] == [
        ("teacher", "fp32"), ("student", "fp32"), ("student", "int8"),
    ]  # fmt: skip
    assert all(len(t.samples_ms) >= 200 and t.runtime == "openvino" for t in found)
    assert Timing.load(run / "bench" / "openvino-int8") == found[2]


def test_the_bundle_is_what_was_measured_and_tells_nothing_of_this_machine(line, tmp_path):
    pytest.importorskip("cryptography", reason="pip install 'edgekd[bundle]'")
    from edgekd.bundle import bundle

    run, _, explain, _ = line
    out, key = tmp_path / "x.edgekd", tmp_path / "k.pem"
    edgekd("bundle", "key", key)
    if explain.exit_code:  # networks of two epochs
        refused = edgekd("bundle", "--run", run, "--out", out, code=3)
        assert "--despite REASON" in refused.stderr
        assert not out.exists()
    edgekd("bundle", "--run", run, "--out", out, "--key", key, "--despite", "a test")
    found = bundle.extract(out, tmp_path / "there", tmp_path / "k.pem.pub")
    assert found.manifest.despite == "a test"
    int8 = Artifact.load(run / "openvino-int8")
    assert Artifact.load(tmp_path / "there" / "model").sha256 == int8.sha256
    assert not found.manifest.buildable  # NNCF's INT8 is in no ONNX file
    assert not (tmp_path / "there" / "onnx").exists()
    assert Timing.load(tmp_path / "there").artifact_sha256 == int8.sha256
    assert Fidelity.load(tmp_path / "there").verdict == Fidelity.load(run / "explain").verdict
    for name, data in bundle._read(out).items():
        assert str(run.parent).encode() not in data, name
        assert b"data:image" not in data, name


def test_explanations_stand_beside_strangers(line):
    run, _, explain, _ = line
    assert explain.exit_code in (0, 3, 6), explain.output
    found = Fidelity.parse(json.loads(explain.stdout), "stdout")
    assert found == Fidelity.load(run / "explain")
    teacher, student, int8 = found.comparisons
    assert "shared_kappa" not in teacher.aggregate
    for c in (student, int8):  # through its reference's channels, in its own runtime
        assert c.aggregate["shared_kappa"].value <= 1
        assert 0 <= c.aggregate["shared_lost"].value <= 1
    assert found.verdict in CODES
    assert explain.exit_code == CODES[found.verdict]  # networks of two epochs: whatever it is
    assert [c.reference for c in found.comparisons] == ["", "teacher fp32", "student fp32"]
    assert found.margins_sha256 == found.margins.sha256
    assert set(found.published) == {"student fp32", "student int8"}
    assert [c.name for c in found.comparisons] == ["teacher fp32", "student fp32", "student int8"]
    assert found.comparisons[0].aggregate["pearson"].value == pytest.approx(1)
    assert {"pearson", "spearman", "iou20", "energy"} <= set(found.comparisons[0].aggregate)
    assert found.mask_share is not None


def test_an_image_is_explained_once(line):
    run, _, explain, _ = line
    kept = sorted(run.glob("openvino-int8/maps/*/*.npz"))
    assert len(kept) == 18
    before = [p.stat().st_mtime_ns for p in kept]
    again = edgekd("explain", "--images", "18", "--run", run, "--json", code=None)
    assert [p.stat().st_mtime_ns for p in kept] == before
    a, b = (json.loads(x.stdout) for x in (explain, again))
    for found in (a, b):
        del found["machine"]
    assert a == b


def test_the_report_is_one_page_without_file_names(line, phantoms):
    *_, page = line
    text = page.read_text("utf-8")
    assert "student int8 less teacher fp32" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for image in phantoms.glob("test/*/*.png"):
        assert f"{image.parent.name}/{image.name}" not in text


def test_a_finished_stage_is_not_done_again(line, phantoms):
    run, *_ = line
    before = (run / "student" / "artifact.json").stat().st_mtime_ns
    edgekd("distill", "--data", phantoms, "--teacher", "test_resnet", "--teacher-epochs", "2",
           *ONCE, *SMALL, "--runs", run.parent)  # fmt: skip
    assert (run / "student" / "artifact.json").stat().st_mtime_ns == before
    other = edgekd("distill", "--data", phantoms, *ONCE, *SMALL, "--temperature", "2",
                   "--runs", run.parent, code=1)  # fmt: skip
    assert "was made with temperature 4.0, now asked for 2.0: --force replaces it" in other.stderr


def test_another_layer_is_explained_without_training_again(line, phantoms):
    run, *_ = line
    other, latest = run.parent / "layers", run.parent / "latest"
    named = latest.read_text()
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("bench", "explain", "*int8"))
    again = ["distill", "--data", phantoms, "--teacher", "test_resnet", "--teacher-epochs", "2",
             *ONCE, *SMALL, "--runs", run.parent, "--run", other]  # fmt: skip
    usual = Artifact.load(other / "onnx").layer
    trained = (other / "student" / "artifact.json").read_bytes()
    for layer in ("head", "auto"):  # auto is what is taken where none is named
        edgekd(*again, "--layer", layer)
        edgekd("export", "-f", "onnx", "--precision", "fp32", "--run", other)
        made, onnx = (Artifact.load(other / name) for name in ("onnx-fp32", "onnx"))
        assert made.settings["layer"] == made.layer.partition(" ")[0]
        assert (onnx.settings["layer"], onnx.layer) == (layer, made.layer)
        if layer == "head":
            assert made.layer.startswith("head ")
        else:
            scores = onnx.settings["layer_scores"]
            best = max(scores, key=lambda k: (-scores[k]["out"], scores[k]["score"]))
            assert best == made.layer == usual
    assert (other / "student" / "artifact.json").read_bytes() == trained
    refused = edgekd(*again, "--layer", "stag3", code=1)
    assert 'no layer "stag3": auto, head, or a stage such as stage3' in refused.stderr
    latest.write_text(named)


def test_export_refuses_what_it_cannot_do(line):
    run, *_ = line
    at = ["--runs", run.parent]
    assert (
        'no format "openvin"; did you mean' in edgekd("export", "-f", "openvin", *at, code=1).stderr
    )
    refused = edgekd("export", "-f", "onnx", "--precision", "int8", *at, code=1)
    assert "is engine nncf's and OpenVINO's alone: edgekd quantize --engine ort" in refused.stderr
    exact = edgekd("export", "-f", "onnx", "--precision", "fp32", "--tolerance", "0", "--run", run,
                   code=1)  # fmt: skip
    assert "tolerance" in exact.stderr


def test_auto_says_what_it_chose_from_and_export_follows(line):
    """In a run of its own place: what auto chose is what export writes without being told."""
    run, *_ = line
    other = run.parent / "auto"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("bench", "explain", "openvino-*"))
    made = json.loads(edgekd("quantize", "--calibration-images", "16", "--max-drop", "100",
                             "--seconds", "0.1", "--run", other, "--json").stdout)  # fmt: skip
    choice = made["choice"]
    chosen = next(c for c in choice["candidates"] if c["name"] == choice["chosen"])
    assert made["precision"] == chosen["precision"]
    names = {c["name"] for c in choice["candidates"]}
    assert {"fp32", "bf16", "int8-nncf", "int8-ort", "int8-inc"} <= names
    again = edgekd("quantize", "--calibration-images", "16", "--max-drop", "100",
                   "--seconds", "0.1", "--run", other)  # fmt: skip
    assert "chosen: the fastest that keeps accuracy and explanations" in " ".join(
        again.stdout.split()
    )
    exported = json.loads(edgekd("export", "-f", "openvino", "--run", other, "--json").stdout)
    assert exported["precision"] == chosen["precision"]


def test_one_engine_by_name_and_every_format(line):
    run, *_ = line
    at = ["--run", run.parent / "ort"]
    shutil.copytree(run, run.parent / "ort", ignore=shutil.ignore_patterns("bench", "explain"))
    odd = edgekd("quantize", "--engine", "ort", "--seconds", "1", *at, code=1)
    assert "--seconds is of timing candidates" in odd.stderr
    stale = edgekd("quantize", "--engine", "ort", *at, code=1)
    assert "int8 was made with another engine: --force replaces it" in stale.stderr
    edgekd("quantize", "--engine", "ort", "--method", "percentile", "--calibration-images", "16",
           "--max-drop", "100", "--force", *at)  # fmt: skip
    made = json.loads(edgekd("export", "-f", "all", "--precision", "fp32", *at, "--json").stdout)
    assert {a["kind"] for a in made} == {"onnx", "openvino", "torch"}
    half = json.loads(edgekd("export", "-f", "onnx", "--precision", "fp16", *at, "--json").stdout)
    assert half["precision"] == "fp16"
    pixels = json.loads(edgekd("export", "-f", "onnx", "--pixels", *at, "--json").stdout)
    assert pixels["settings"]["input"] == "uint8 (N, H, W, 3)"
    int8 = edgekd("export", "-f", "onnx", "--precision", "int8", *at)
    assert "student int8" in int8.stdout
    assert "as stored" in edgekd("verify", run.parent / "ort" / "onnx-int8").stdout
    wrong = edgekd("export", "-f", "tensorrt", "--precision", "int8", *at, code=1)
    assert "asymmetric activations, which TensorRT refuses" in wrong.stderr


def test_training_in_int8_before_gives_candidates_of_their_own(line):
    run, *_ = line
    other = run.parent / "qat"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("bench", "explain", "int8", "open*"))
    few = ["--calibration-images", "16", "--max-drop", "100", "--run", other]
    made = json.loads(edgekd("quantize", "--qat", "1", "-e", "ort", *few, "--json").stdout)
    trained = Artifact.load(other / "qat" / "student")
    assert trained.settings["training"]["int8"]
    assert trained.parents["student"] == Artifact.load(other / "student").sha256
    assert made["parents"]["onnx"] == Artifact.load(other / "qat" / "onnx").sha256
    timed = json.loads(
        edgekd("bench", "--quick", "--seconds", "0.2", "--run", other, "--json", code=UNSURE).stdout
    )
    assert [t["precision"] for t in timed if t["role"] == "student"] == ["fp32", "int8"]


def test_changed_data_is_noticed(line, phantoms):
    run, *_ = line
    extra = phantoms / "train" / "normal" / "9999.png"
    source = next((phantoms / "train" / "normal").glob("*.png"))
    try:
        from PIL import Image

        Image.open(source).rotate(90).save(extra)
        assert "has changed since" in edgekd("bench", "--run", run, code=1).stderr
    finally:
        extra.unlink()


def killed_when(there, command):
    """Start `edgekd command`; `kill -9` as soon as the file `there` exists."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(there()):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_kill_at_a_random_moment_and_again_gives_the_same_student(phantoms, tmp_path):
    """`kill -9` in the middle of training; the same command again ends with the same weights."""

    def command(runs):
        return [sys.executable, "-m", "edgekd", "distill", "--data", str(phantoms), "--no-teacher",
                "--student", "cpu_lat@10ms", "--size", "32", "--epochs", "3", "--batch", "16",
                "--runs", str(runs)]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    cut = tmp_path / "cut"
    killed_when(lambda: cut.glob("cpu/student/checkpoint.pt"), command(cut))
    assert not (cut / "cpu" / "student" / "artifact.json").exists()
    subprocess.run(command(cut), check=True, capture_output=True)
    weights = "cpu/student/model.safetensors"
    assert (cut / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_kill_and_again_gives_the_same_supernet_and_the_same_search(phantoms, tmp_path):
    def command(name, runs):
        at = ["--data", str(phantoms), "--size", "32", "--runs", str(runs)]
        more = {"shrink": ["--no-teacher", "--epochs", "2", "--batch", "16"],
                "search": ["--estimate", "--subnets", "20", "--generations", "20"]}  # fmt: skip
        return [sys.executable, "-m", "edgekd", name, *at, *more[name]]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for name in ("shrink", "search"):
        subprocess.run(command(name, whole), check=True, capture_output=True)
    killed_when(lambda: cut.glob("shared/*/supernet-*/checkpoint.pt"), command("shrink", cut))
    subprocess.run(command("shrink", cut), check=True, capture_output=True)
    killed_when(lambda: cut.glob("shared/*/supernet-*/evaluated.jsonl"), command("search", cut))
    assert not (cut / "cpu" / "search" / "sought.json").exists()
    subprocess.run(command("search", cut), check=True, capture_output=True)
    one, two = (next(runs.glob("shared/*/supernet-*/model.safetensors")) for runs in (whole, cut))
    assert one.read_bytes() == two.read_bytes()
    one, two = (Front.load(runs / "cpu" / "search") for runs in (whole, cut))
    assert one.members == two.members
    one, two = (Sought.load(runs / "cpu" / "search") for runs in (whole, cut))
    assert (one.chosen, one.ranking) == (two.chosen, two.ranking)
