"""At the bedside: an image in, an answer out, with what a device has and no torch."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import edgekd
from edgekd import runtimes
from edgekd.bundle import bundle, out_of_distribution
from edgekd.cli.main import app
from edgekd.data import phantom, preprocess
from edgekd.explain import score_cam
from edgekd.metrics.calibration import probabilities
from edgekd.records import Artifact, EdgeKDError, Profile
from edgekd.serve import model as device

pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")
CPU = Profile(name="cpu", runtime="onnxruntime", device="CPU", threads=1)
TINY = Artifact.load(Path(edgekd.__file__).parent / "runtimes/tiny")


def films(n, first=0):
    """(n, side, side) uint8 phantoms of all classes."""
    return [phantom.film(phantom.CLASSES[i % 3], first + i, size=64)[0] for i in range(n)]


def png(film):
    with io.BytesIO() as buffer:
        Image.fromarray(film).save(buffer, "PNG")
        return buffer.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle that knows phantoms."""
    session = runtimes.open_session(TINY, CPU)
    pixels = np.stack([preprocess.pixels(Image.fromarray(f), TINY.spec) for f in films(90)])
    pooled = session(preprocess.normalise(pixels, TINY.spec)).features.mean((2, 3))
    usual = out_of_distribution.learnt(pooled[:60], pooled[60:], pixels)
    out = tmp_path_factory.mktemp("bundle") / "tiny.edgekd"
    bundle.make(out, bundle.Given(TINY, CPU, usual=usual), intended_use="tests")
    return out


def test_a_loaded_bundle_answers_and_explains(made, tmp_path):
    (tmp_path / "film.png").write_bytes(png(films(1)[0]))
    model = edgekd.load(made)
    answer = model.predict(tmp_path / "film.png")
    cam = model.explain(tmp_path / "film.png")
    assert cam.label == answer.foremost
    seen = model.see((tmp_path / "film.png").read_bytes())
    assert answer.probabilities == model.answer([seen])[0].probabilities
    np.testing.assert_array_equal(cam.map, model.why(seen, cam.label))
    assert cam.overlay().shape == (*TINY.spec.size, 3)
    other = model.explain(tmp_path / "film.png", phantom.CLASSES[2])
    assert other.label == phantom.CLASSES[2]
    flat = cam._replace(map=None)
    with pytest.raises(EdgeKDError, match="undefined: there is nothing to show"):
        flat.overlay()
    (tmp_path / "film.png").write_bytes(b"no image")
    with pytest.raises(EdgeKDError, match=r"film\.png: .*not a JPEG, PNG or DICOM image"):
        model.predict(tmp_path / "film.png")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def study(tmp_path):
    """Four films in a folder."""
    folder = tmp_path / "study"
    folder.mkdir()
    for i, film in enumerate(films(4, first=500)):
        (folder / f"{i}.png").write_bytes(png(film))
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)


def test_an_answer_is_the_files_own(made):
    model, data = device.open_bundle(made), png(films(1, first=700)[0])
    (answer,) = model.answer([model.see(data)])
    image = preprocess.prepare(data, TINY.spec)[None]
    said = runtimes.open_session(TINY, CPU)(image)
    expected = probabilities(said.logits, TINY)[0]
    assert list(answer.probabilities) == list(TINY.spec.classes)
    np.testing.assert_allclose(list(answer.probabilities.values()), expected, atol=1e-6)
    assert answer.label == TINY.spec.classes[expected.argmax()]
    assert answer.ms > 0
    heat = model.why(model.see(data), "normal")
    k = TINY.spec.classes.index("normal")
    wanted = score_cam.score_cam(runtimes.open_session(TINY, CPU), image[0], k).map
    np.testing.assert_allclose(heat, wanted, atol=1e-5)
    with pytest.raises(EdgeKDError, match='no class "flu": nodule, normal, opacity'):
        model.why(model.see(data), "flu")


def test_together_is_as_alone(made):
    model = device.open_bundle(made)
    seen = [model.see(png(f)) for f in films(5)]
    for together, alone in zip(
        model.answer(seen), [model.answer([s])[0] for s in seen], strict=True
    ):
        assert together.image == alone.image
        assert together.label == alone.label
        assert together.probabilities == pytest.approx(alone.probabilities, abs=1e-6)


def test_what_is_unusual_is_said(made):
    model = device.open_bundle(made)
    usual = model.answer([model.see(png(f)) for f in films(60, first=1000)])
    assert sum(bool(a.warnings) for a in usual) <= 6  # of 60; the limit is that of 30 images
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    blank = np.full((64, 64), 90, np.uint8)
    for film, word in ((noise, "unlike"), (255 - films(1)[0], "unlike"), (blank, "blank")):
        (answer,) = model.answer([model.see(png(film))])
        assert any(w.startswith(word) for w in answer.warnings)


def test_it_abstains_where_it_is_told_to(made, tmp_path):
    data = png(films(1)[0])
    (sure,) = device.open_bundle(made).answer([device.open_bundle(made).see(data)])
    highest = max(sure.probabilities.values())
    for limit, abstains in ((highest - 1e-4, False), (highest + 1e-4, True)):
        out = tmp_path / f"{abstains}.edgekd"
        bundle.make(out, bundle.Given(TINY, CPU), intended_use="tests", abstain_below=limit)
        model = device.open_bundle(out)
        (answer,) = model.answer([model.see(data)])
        assert bool(answer.abstained) == (answer.label == "") == abstains
        if abstains:  # what is told is under what is needed, however near
            most, *_, needed = answer.abstained.split()
            assert float(most) < float(needed) == pytest.approx(limit, rel=1e-5)
        (answer,) = device.open_bundle(out, abstain_below=0).answer([model.see(data)])
        assert answer.label


def test_what_was_unpacked_and_changed_since_is_refused(made, cache):
    device.open_bundle(made)
    device.open_bundle(made)
    (file,) = cache.glob("edgekd/bundles/*/model/model.onnx")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(EdgeKDError, match="is not what was unpacked there: remove"):
        device.open_bundle(made)


def test_where_it_was_deployed_it_is_not_unpacked_again(made, tmp_path, cache):
    """And what claims to be built there runs only if something had to be."""
    there = tmp_path / "versions" / "tiny-1"
    bundle.extract(made, there / bundle.UNPACKED)
    shutil.copy(made, there / "bundle.edgekd")
    there /= bundle.UNPACKED
    (tmp_path / "current").symlink_to("versions/tiny-1")
    (there / "timing.json").write_text("{}")  # not the bundle's, and not read as such
    model = device.open_bundle(tmp_path / "current" / "bundle.edgekd")
    assert (model.artifact.folder, model.timing) == (there / "model", None)
    assert model.bundle == hashlib.sha256((there / "bundle.json").read_bytes()).hexdigest()
    assert not cache.exists()
    shutil.copytree(there / "model", there / bundle.BUILT)  # as a download with more than asked for
    built = Artifact.load(there / "model")
    other = built.spec.model_copy(update={"classes": built.spec.classes[::-1]})
    built.model_copy(update={"spec": other}).save(there / bundle.BUILT)
    with pytest.raises(EdgeKDError, match="built is there, but nothing is built of this bundle"):
        device.open_bundle(tmp_path / "current" / "bundle.edgekd")
    shutil.rmtree(there / bundle.BUILT)
    (there / "card.md").write_text("another")
    with pytest.raises(EdgeKDError, match=r"card\.md is not what was unpacked there"):
        device.open_bundle(tmp_path / "current" / "bundle.edgekd")


def test_predict_a_folder(made, study, tmp_path):
    done = run(study, "-m", made, "--json", "--explain", tmp_path / "maps")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [Path(t["file"]).name for t in told] == ["0.png", "1.png", "2.png", "3.png"]
    for t in told:
        assert sum(t["probabilities"].values()) == pytest.approx(1)
        with Image.open(tmp_path / "maps" / f"{t['image'][:12]}-{t['label']}.png") as drawn:
            assert drawn.size == (32, 32)
    shown = run(study / "0.png", "-m", made)
    assert told[0]["label"] in shown.stdout


def test_predict_passes_over_litter_and_reads_any_name(made, tmp_path):
    film = png(films(1)[0])
    name = os.fsdecode(b"\xfcber\n.png")  # as an old archive has it
    (tmp_path / name).write_bytes(film)
    (tmp_path / "__MACOSX").mkdir()
    for litter in ("__MACOSX/._x.png", "._x.png", ".DS_Store", "x.png.part"):
        (tmp_path / litter).write_bytes(film)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    done = run(tmp_path, "-m", made)
    assert done.exit_code == 1
    assert "gone.png: cannot be read: No such file or directory" in done.stderr
    assert "5 hidden, temporary or system files and folders passed over" in done.stderr
    assert "\\udcfcber\\n.png" in done.stdout


def test_a_folder_of_dicom_files_of_any_name(made, tmp_path):
    pytest.importorskip("pydicom", reason="pip install 'edgekd[dicom]'")
    from data.test_dicom import made as dicom_file

    names = ["1.2.840.10008.5.123", "IM0001", "b.IMA", "c.dcm"]
    for name in names:
        (tmp_path / name).write_bytes(dicom_file())
    (tmp_path / "DICOMDIR").write_bytes(dicom_file())  # an index, which has no pixels
    (tmp_path / "notes.1").write_text("no image")
    done = run(tmp_path, "-m", made, "--json")
    assert done.exit_code == 0, done.output
    assert [Path(t["file"]).name for t in json.loads(done.stdout)] == names


def test_predict_says_hardly_any_contrast_of_any_file(made, tmp_path):
    """The words of data check and data prepare; serve has them of the same answer."""
    dicom_file = pytest.importorskip("data.test_dicom", reason="pip install 'edgekd[dicom]'").made
    flat = np.random.default_rng(0).integers(100, 104, (64, 64)).astype(np.uint8)
    (tmp_path / "flat.png").write_bytes(png(flat))
    (tmp_path / "flat.dcm").write_bytes(dicom_file(flat))
    (tmp_path / "film.png").write_bytes(png(films(1)[0]))
    done = run(tmp_path, "-m", made, "--json")
    assert done.exit_code == 0, done.stderr
    said = {Path(a["file"]).name: a["warnings"] for a in json.loads(done.stdout)}
    assert said["flat.png"][0] == said["flat.dcm"][0] == preprocess.FLAT
    assert not [w for w in said["film.png"] if "contrast" in w]
    shown = run(tmp_path / "flat.png", "-m", made)
    assert "almost no contrast" in " ".join(shown.stdout.split())


def test_predict_stdin_and_abstain(made, study):
    data = (study / "1.png").read_bytes()
    (told,) = json.loads(run("-", "-m", made, "--json", "--abstain-below", "1", stdin=data).stdout)
    assert told["label"] == ""
    assert told["abstained"].endswith(" sure at most, an answer needs 1")
    assert "abstains" in run("-", "-m", made, "--abstain-below", "1", stdin=data).stdout


def test_what_cannot_be_read_does_not_stop_the_rest(made, study):
    (study / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    done = run(study, "-m", made, "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert len(told) == 4
    assert [Path(t["file"]).name for t in told if "error" in t] == ["2.png"]
    assert "2.png: image: corrupt or truncated image" in done.stderr


@pytest.mark.parametrize(
    ("image", "message"),
    [("none.png", "no file none.png"), (".", "no image in .: JPEG, PNG and DICOM are read")],
)
def test_bad_input_is_one_line(made, tmp_path, monkeypatch, image, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = run(image, "-m", made)
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines() == [f"error: {message}"]


def test_a_device_needs_no_torch(made, study):
    """With torch and its friends hidden, in a fresh process."""
    code = f"""import sys
for name in ("torch", "timm", "onnx", "sklearn", "scipy", "matplotlib", "pyarrow"):
    sys.modules[name] = None
from edgekd.cli.main import app
app(["predict", {str(study / "0.png")!r}, "-m", {str(made)!r}, "--json"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["label"]
