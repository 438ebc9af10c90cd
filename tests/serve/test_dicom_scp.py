"""The DICOM node: results that are the answer, filed rightly; and whatever else a port is sent."""

import contextlib
import io
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from serving import CPU, TINY, Process, film, in_thread, make, wait
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="pip install 'edgekd[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'edgekd[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'edgekd[serve]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")
pytest.importorskip("pynetdicom", reason="pip install 'edgekd[dicom]'")
pytest.importorskip("highdicom", reason="pip install 'edgekd[dicom]'")

import highdicom
import pydicom
from data.test_dicom import made as dicom_file
from pydicom.uid import JPEG2000Lossless, RLELossless
from pynetdicom import AE, evt
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    ComputedRadiographyImageStorage,
    SecondaryCaptureImageStorage,
    Verification,
)

from edgekd.bundle import bundle
from edgekd.cli.main import app
from edgekd.explain import score_cam
from edgekd.records import Calibration, EdgeKDError
from edgekd.serve import dicom_limits, dicom_peers, dicom_results, dicom_sender
from edgekd.serve import model as device
from edgekd.serve.dicom_scp import Node
from edgekd.serve.inference_queue import Told

# pynetdicom leaves a socket that never was connected, as to a node that is away, to the collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SECRETS = ("Roentgen", "Wilhelm", "4711-Secret", "1.2.3.4")
STUDY, SERIES, INSTANCE = "1.2.3.4", "1.2.3.4.5", "1.2.3.4.5.6"
EXPLICIT = "1.2.840.10008.1.2.1"


def stored(seed=700, **elements):
    """A phantom as a DICOM file of a patient."""
    pixels = np.asarray(Image.open(io.BytesIO(film(seed))))
    uids = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES}
    data = dicom_file(pixels, **uids | elements)
    ds = pydicom.dcmread(io.BytesIO(data))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = INSTANCE
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    return ds


class Archive:
    """A node that results go to; it keeps them, and may be away."""

    def __init__(self):
        self.got, self.status, self.server = [], 0x0000, None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]

    def open(self):
        ae = AE("ARCHIVE")
        ae.require_called_aet = True
        for kind in (SecondaryCaptureImageStorage, ComprehensiveSRStorage):
            ae.add_supported_context(kind)
        handlers = [(evt.EVT_C_STORE, self.keep)]
        self.server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        return self

    def keep(self, event):
        if self.status == 0x0000:
            self.got.append(event.encoded_dataset())
        return self.status

    def close(self):
        if self.server is not None:
            self.server.shutdown()


@pytest.fixture
def archive():
    made = Archive().open()
    yield made
    made.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("node") / "tiny.edgekd")


@pytest.fixture(scope="module")
def model(made, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return device.open_bundle(made, most_pixels=1_000_000)


@contextlib.contextmanager
def listening(model, folder, archive, callers=(), **settings):
    """(node, client) of a server that speaks both."""
    to = dicom_peers.Peer("ARCHIVE", "127.0.0.1", archive.port)
    with in_thread(model, folder, **settings) as (client, bench):
        node = Node(bench, dicom_peers.Dicom(0, to, callers=callers))
        node.start()
        try:
            yield node, client
        finally:
            node.shut()
            node.close(1)


@contextlib.contextmanager
def asked(
    node, called="EDGEKD", calling="MODALITY", kinds=(ComputedRadiographyImageStorage,),
    syntax=EXPLICIT,
):  # fmt: skip
    """An association with the node."""
    ae = AE(calling)
    for kind in kinds:
        ae.add_requested_context(kind, syntax)
    ae.add_requested_context(Verification, EXPLICIT)
    assoc = ae.associate("127.0.0.1", node.port, ae_title=called)
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def status(node, ds, **how):
    with asked(node, **how) as assoc:
        assert assoc.is_established
        return assoc.send_c_store(ds).get("Status")


def echoes(node):
    with asked(node) as assoc:
        return assoc.is_established and assoc.send_c_echo().Status == 0


def read(archive):
    """(Secondary Capture, report) that came last."""
    wait(lambda: len(archive.got) >= 2)
    kinds = {pydicom.dcmread(io.BytesIO(x)).Modality: x for x in archive.got[-2:]}
    return pydicom.dcmread(io.BytesIO(kinds["OT"])), highdicom.sr.srread(io.BytesIO(kinds["SR"]))


def comments(report):
    (group,) = report.content.get_image_measurement_groups()
    return [str(x.TextValue) for x in group[0].ContentSequence
            if x.ConceptNameCodeSequence[0].CodeMeaning == "Comment"]  # fmt: skip


# ---- results


def test_an_image_comes_back_as_a_map_and_a_report(model, tmp_path, archive, capfd):
    ds = stored(BurnedInAnnotation="NO", PatientOrientation=["L", "F"], PatientBirthDate="18450327")
    with listening(model, tmp_path, archive) as (node, client):
        assert status(node, ds) == 0x0000
        capture, report = read(archive)
        out = io.BytesIO()
        ds.save_as(out, enforce_file_format=True)
        code, _, told = client.post("/predict", out.getvalue(), "application/dicom")
        assert code == 200
        assert status(node, ds) == 0x0000
        wait(lambda: len(archive.got) == 4)
        again = read(archive)
        metrics = client.get("/metrics")[2].decode()
        wait(lambda: (tmp_path / "audit.jsonl").read_text().count('"sent"') == 2)
    for result in (capture, report):
        assert (str(result.PatientName), result.PatientID) == ("Roentgen^Wilhelm", "4711-Secret")
        assert (result.StudyInstanceUID, result.PatientBirthDate) == (STUDY, "18450327")
        assert result.PatientSex == result.AccessionNumber == ""  # type 2: there, and empty
        assert result.SeriesInstanceUID.startswith("2.25.")
        assert result.SeriesInstanceUID not in (SERIES, STUDY)
        assert "not for diagnosis" in result.SeriesDescription
    assert capture.SeriesInstanceUID != report.SeriesInstanceUID
    assert [x.SOPInstanceUID for x in again] == [capture.SOPInstanceUID, report.SOPInstanceUID]

    # what is drawn is the map of what the model saw
    image = ds.pixel_array
    with io.BytesIO() as buffer:
        Image.fromarray(image).save(buffer, "PNG")
        seen = model.see(buffer.getvalue())
    (own,) = model.answer([seen])
    heat = model.why(seen, own.foremost)
    np.testing.assert_array_equal(capture.pixel_array, score_cam.overlay(seen.pixels, heat))
    assert (capture.BurnedInAnnotation, capture.PatientOrientation) == ("NO", ["L", "F"])
    assert TINY.sha256 in capture.DerivationDescription
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == INSTANCE

    # what is reported is HTTP's answer
    (group,) = report.content.get_image_measurement_groups()
    numbers = {x.name.meaning: x.value for x in group.get_measurements()}
    expected = {f"Probability of {k}": v for k, v in told["probabilities"].items()}
    assert numbers == pytest.approx(expected, abs=1e-9)
    words = comments(report)
    assert f"Answer: {told['label']}" in words
    assert "Research use, not for diagnosis. Intended use: tests" in words
    assert "Verdict on explanations of this model: not judged" in words
    assert report.get_evidence() == [(STUDY, SERIES, INSTANCE, ComputedRadiographyImageStorage)]
    assert TINY.sha256 in report.to_json()
    assert model.bundle in report.to_json()
    assert model.bundle in capture.DerivationDescription
    assert report.PreliminaryFlag == "PRELIMINARY"
    assert report.VerificationFlag == "UNVERIFIED"

    # and nothing of the patient is anywhere else
    assert 'edgekd_dicom_stores_total{status="0x0000"} 2.0' in metrics
    kept = (tmp_path / "audit.jsonl").read_text() + metrics + "".join(capfd.readouterr())
    assert not [x for x in SECRETS if x in kept]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_a_compressed_image_has_the_answer_of_its_pixels(model, tmp_path, archive, syntax):
    plain, packed = stored(), stored()
    packed.compress(syntax, generate_instance_uid=False)
    with listening(model, tmp_path, archive) as (node, _):
        assert status(node, plain) == 0
        capture, report = read(archive)
        assert status(node, packed, syntax=syntax) == 0
        wait(lambda: len(archive.got) == 4)
        other_capture, other_report = read(archive)
    np.testing.assert_array_equal(capture.pixel_array, other_capture.pixel_array)
    assert comments(report)[:-1] == comments(other_report)[:-1]
    assert capture.SOPInstanceUID != other_capture.SOPInstanceUID  # other bytes came


def test_uids_are_of_the_image_the_model_and_its_settings(model):
    assert (
        dicom_results.uid("a", "b")
        == dicom_results.uid("a", "b")
        != dicom_results.uid("ab")
        != dicom_results.uid("b")
    )
    number = int(dicom_results.uid("a").removeprefix("2.25."))
    assert 0 <= number < 2**128
    assert len(dicom_results.uid("a")) <= 64


@pytest.mark.parametrize("change", ["temperature", "intended use", "threshold"])
def test_another_answer_is_another_object(model, tmp_path, monkeypatch, change):
    """The same weights with another temperature are another bundle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hot = Calibration(temperature=3, method="nll", thresholds={})
    tiny = TINY.model_copy(update={"calibration": hot}) if change == "temperature" else TINY
    use = "others" if change == "intended use" else "tests"
    file = tmp_path / "other.edgekd"
    bundle.make(file, bundle.Given(tiny, CPU), intended_use=use)
    limit = 0.9 if change == "threshold" else None
    other = device.open_bundle(file, abstain_below=limit)
    assert other.artifact.sha256 == model.artifact.sha256
    dicom_results.silence()
    dicom_results.quieten()
    with io.BytesIO() as buffer:
        stored().save_as(buffer, enforce_file_format=True)
        data = buffer.getvalue()
    found = []
    for one in (model, model, other):
        seen = one.see(data)
        (answer,) = one.answer([seen])
        heat = np.zeros((32, 32), np.float32)
        told = Told(seen, answer, answer.foremost, heat)
        found.append(
            [
                str(x.SOPInstanceUID)
                for x in dicom_results.made(dicom_results.source(data), told, one)
            ]
        )
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_an_abstention_and_an_undefined_map_are_said(model, tmp_path, archive, monkeypatch):
    monkeypatch.setattr(model, "abstain_below", 1.0)
    monkeypatch.setattr(model, "why", lambda *_, **__: None)
    with listening(model, tmp_path, archive) as (node, _):
        assert status(node, stored()) == 0
        wait(lambda: archive.got)
    (one,) = archive.got
    report = highdicom.sr.srread(io.BytesIO(one))
    words = comments(report)
    assert any(w.startswith("No answer: ") and "an answer needs 1" in w for w in words)
    assert not any(w.startswith("Answer") for w in words)
    assert any(w.endswith("is undefined") for w in words)


@pytest.mark.parametrize(
    ("name", "charset"), [("Röntgen^Wilhelm", "ISO_IR 100"), ("山田^太郎", "ISO_IR 192")]
)
def test_names_of_any_alphabet_arrive(name, charset, model):
    dicom_results.silence()
    dicom_results.quieten()
    ds = stored(SpecificCharacterSet=charset)
    ds.PatientName = name
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    of = dicom_results.source(out.getvalue())
    assert of.said["PatientName"] == name


# ---- what is not taken


def test_what_cannot_be_read_or_filed_is_refused(model, tmp_path, archive, capfd):
    torn, homeless, other = stored(), stored(), stored()
    torn.PixelData = torn.PixelData[:100]
    del homeless.StudyInstanceUID
    with listening(model, tmp_path, archive) as (node, client):
        assert status(node, torn) == 0xC000
        assert status(node, homeless) == 0xA900
        other.Rows = 5000
        other.Columns = 5000
        assert status(node, other) == 0xC000
        ds = stored()
        message = SimpleNamespace(AffectedSOPClassUID=ds.SOPClassUID, AffectedSOPInstanceUID="1.9",
                                  DataSet=io.BytesIO(encode(ds, False, True)))  # fmt: skip
        event = SimpleNamespace(
            request=message, context=SimpleNamespace(transfer_syntax=pydicom.uid.UID(EXPLICIT))
        )
        assert node._stored(event) == 0xA900
        message.AffectedSOPInstanceUID = ds.SOPInstanceUID
        assert node._stored(event) == 0
        assert node.bench.work.held == 0
        assert node.sender.promised == 0
        page = client.get("/metrics")[2].decode()
        assert 'edgekd_dicom_stores_total{status="0xC000"} 2.0' in page
        assert 'edgekd_dicom_stores_total{status="0xA900"} 2.0' in page
    assert "".join(capfd.readouterr()) == ""


def test_no_more_is_taken_than_may_be_held(model, tmp_path, archive, monkeypatch):
    may, session = threading.Event(), model.session
    monkeypatch.setattr(model, "session", lambda x: may.wait(20) and session(x))
    statuses = []
    with listening(model, tmp_path, archive, queue=4) as (node, _):
        first = threading.Thread(target=lambda: statuses.append(status(node, stored())))
        first.start()
        wait(lambda: node.bench.work.held == 1)
        assert status(node, stored(701)) == 0xA700
        may.set()
        first.join(20)
        assert statuses == [0]


def test_no_answer_in_time_is_a_failure(model, tmp_path, archive, monkeypatch):
    may, session = threading.Event(), model.session
    monkeypatch.setattr(model, "session", lambda x: may.wait(20) and session(x))
    with listening(model, tmp_path, archive, timeout_s=0.5) as (node, _):
        assert status(node, stored()) == 0x0110
        may.set()
        wait(lambda: node.bench.work.held == 0)
        node.bench.settings = node.bench.settings._replace(timeout_s=30)  # on a busy machine
        assert status(node, stored()) == 0
        wait(lambda: len(archive.got) == 2)


def test_only_who_calls_it_by_its_name_and_is_expected(model, tmp_path, archive):
    with listening(model, tmp_path, archive, callers=("CT1", "MR1")) as (node, client):
        for called, calling, expected in (
            ("EDGEKD", "CT1", True), ("EDGEKD", "MR1", True), ("EDGEKD", "STRANGER", False),
            ("OTHER", "CT1", False),
        ):  # fmt: skip
            with asked(node, called, calling) as assoc:
                assert assoc.is_established == expected
                assert assoc.is_rejected != expected
        assert 'reason="dicom association"} 2.0' in client.get("/metrics")[2].decode()


def test_an_object_that_is_too_large_ends_the_association(model, tmp_path, archive):
    with listening(model, tmp_path, archive, max_bytes=100_000) as (node, _):
        ds = stored()
        ds.ImageComments = "x" * 300_000
        with asked(node) as assoc:
            assert not assoc.send_c_store(ds)
            wait(lambda: not assoc.is_established)
        assert echoes(node)
        assert node.bench.work.held == 0


# ---- results on their way


def test_what_the_other_node_missed_it_gets_later(model, tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_sender, "BACK_OFF_S", (0.05, 0.1))
    archive = Archive()  # away
    with listening(model, tmp_path, archive) as (node, client):
        assert status(node, stored()) == 0
        assert status(node, stored(701)) == 0
        time.sleep(0.3)
        assert node.sender.held == 2
        assert "edgekd_dicom_waiting_images 2.0" in client.get("/metrics")[2].decode()
        archive.open()
        try:
            wait(lambda: len(archive.got) == 4)
            wait(lambda: node.sender.held == 0)
        finally:
            archive.close()
    assert (tmp_path / "audit.jsonl").read_text().count('"event": "sent"') == 2


def test_what_is_lost_is_said(model, tmp_path, archive, monkeypatch, capfd):
    monkeypatch.setattr(dicom_sender, "BACK_OFF_S", (0.01,))
    archive.status = 0xA700
    with listening(model, tmp_path, archive) as (node, client):
        assert status(node, stored()) == 0
        wait(lambda: node.sender.held == 0)
        wait(lambda: "0xA700" in (tmp_path / "audit.jsonl").read_text())
        page = client.get("/metrics")[2].decode()
        assert 'edgekd_dicom_deliveries_total{outcome="lost"} 1.0' in page
    said = capfd.readouterr().err
    assert "were not delivered: the node answers 0xA700" in said
    assert not [x for x in SECRETS if x in said]


def test_no_image_is_taken_whose_results_have_no_place(model, tmp_path):
    away = Archive()
    with listening(model, tmp_path, away, queue=1) as (node, _):
        assert status(node, stored()) == 0
        assert status(node, stored(701)) == 0xA700
    lines = (tmp_path / "audit.jsonl").read_text()
    assert lines.count('"event": "not sent"') == 1
    assert "cannot be reached" in lines


# ---- abuse


def talk(node, *parts):
    """What comes back to the last of these bytes; the connection ends."""
    back, to = b"", ("127.0.0.1", node.port)
    with socket.create_connection(to, timeout=2) as s, contextlib.suppress(OSError):
        for part in parts:
            back = b""
            s.sendall(part)
            back = s.recv(1 << 16)
    return back


def request():
    """The bytes of an A-ASSOCIATE-RQ and of a C-ECHO on it, as pynetdicom sends them."""
    sent, server = [], socket.create_server(("127.0.0.1", 0))

    def listen():
        s, _ = server.accept()
        with s:
            sent.append(s.recv(1 << 16))

    thread = threading.Thread(target=listen)
    thread.start()
    ae = AE("MODALITY")
    ae.acse_timeout = 2
    ae.add_requested_context(Verification)
    ae.add_requested_context(ComputedRadiographyImageStorage)
    ae.associate("127.0.0.1", server.getsockname()[1], ae_title="EDGEKD")
    thread.join(10)
    server.close()
    return sent[0]


def test_whatever_bytes_come_it_still_answers(model, tmp_path, archive, capfd):
    rng = random.Random(7)
    good = request()
    told = ((0x0002, b"1.2.840.10008.1.1\0"), (0x0100, b"\x30\0"), (0x0110, b"\1\0"),
            (0x0800, b"\1\1"))  # fmt: skip
    command = b"".join(struct.pack("<HHI", 0, tag, len(v)) + v for tag, v in told)
    command = struct.pack("<HHII", 0, 0, 4, len(command)) + command
    fragment = (len(command) + 2).to_bytes(4, "big") + b"\x01\x03" + command
    echo = b"\x04\x00" + len(fragment).to_bytes(4, "big") + fragment
    with listening(model, tmp_path, archive, timeout_s=0.5) as (node, _):
        assert talk(node, good)[:1] == b"\x02"  # what is mutated below is right as it stands
        assert talk(node, good, echo)[:1] == b"\x04"
        huge = b"\x01\x00\xff\xff\xff\xff" + good[6:]
        for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), huge, b"\x04\x00\x7f\xff\xff\xff",
                     b"\x07", b"", b"\x16\x03\x01\x02\x00"):  # fmt: skip
            talk(node, junk)
        for i in range(50):
            start, follow = bytearray(good), bytearray(echo)
            changed = start if i % 2 else follow
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            cut = rng.randrange(6, len(changed)) if i % 5 == 0 else len(changed)
            talk(node, bytes(start), bytes(follow[:cut] if changed is follow else follow))
        assert echoes(node)
        wait(lambda: not node._gates)
    assert "".join(capfd.readouterr()) == ""


def test_who_sends_slowly_is_cut_off(model, tmp_path, archive):
    with listening(model, tmp_path, archive, timeout_s=0.5) as (node, _):
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as s:
            s.sendall(b"\x01\x00\x00\x00\x01\x00")  # 256 bytes are to come
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while s.recv(100):
                    pass
            assert time.monotonic() - began < 5
        assert echoes(node)


def test_connections_are_bounded(model, tmp_path, archive, monkeypatch):
    monkeypatch.setattr(dicom_limits, "CONNECTIONS", 3)
    with listening(model, tmp_path, archive) as (node, _), contextlib.ExitStack() as idle:
        for _ in range(3):
            idle.enter_context(socket.create_connection(("127.0.0.1", node.port), timeout=10))
        wait(lambda: len(node._server.active_associations) == 3)
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as s:
            assert s.recv(10) == b""
        idle.close()
        wait(lambda: not node._server.active_associations, 5)  # it does not wait for who left
        assert echoes(node)


# ---- the process, and a foreign client


def dcmtk(name):
    """A program of dcmtk's; pynetdicom may have installed one of the same name."""
    for folder in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin"):
        found = shutil.which(name, path=folder)
        if found:
            return found
    pytest.skip(f"no dcmtk {name}")


def test_a_foreign_client_and_a_stop_in_order(made, tmp_path, archive):
    echoscu, storescu = dcmtk("echoscu"), dcmtk("storescu")
    file = tmp_path / "image.dcm"
    stored().save_as(file, enforce_file_format=True)
    (tmp_path / "torn.dcm").write_bytes(file.read_bytes()[:-2000])
    p = Process(made, tmp_path, "--dicom", 0, "--aet", "BEDSIDE", "--send-to",
                f"ARCHIVE@127.0.0.1:{archive.port}", "--dicom-from", "MODALITY", "--timeout", 10,
                XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip
    try:
        second = p.process.stderr.readline()
        assert second.startswith("DICOM: BEDSIDE on 127.0.0.1 port ")
        port = second.split("port ")[1].split(",")[0]

        def call(program, *rest, aet="MODALITY"):
            command = [program, "-aet", aet, "-aec", "BEDSIDE", "127.0.0.1", port, *rest]
            return subprocess.run(command, capture_output=True, timeout=30).returncode

        assert call(echoscu) == 0
        assert call(echoscu, aet="STRANGER") != 0
        assert call(storescu, str(file)) == 0
        capture, report = read(archive)
        assert (capture.PatientID, report.PatientID) == ("4711-Secret", "4711-Secret")
        report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
        shown = subprocess.run([dcmtk("dsrdump"), str(tmp_path / "report.dcm")], timeout=30,
                               capture_output=True, text=True, check=True)  # fmt: skip
        assert shown.stdout.count("contains NUM:") == 3
        assert "E: " not in shown.stderr
        assert call(storescu, str(tmp_path / "torn.dcm")) != 0
        p.process.send_signal(signal.SIGTERM)
        assert p.process.wait(20) == 0
    finally:
        said = p.stop()
    assert said == ""
    assert [r["event"] for r in p.records()] == ["start", "explain", "sent", "stop"]
    assert not [x for x in SECRETS if x in p.audit.read_text()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dicom", "11112"], "--dicom needs --send-to AET@HOST:PORT"),
        (["--aet", "ME"], "--aet does nothing without --dicom"),
        (["--send-to", "A@b:1"], "--send-to does nothing without --dicom"),
        (["--dicom-from", "CT"], "--dicom-from does nothing without --dicom"),
        (["--dicom", "0", "--send-to", "ARCHIVE"], "'ARCHIVE' is no AET@HOST:PORT"),
        (["--dicom", "0", "--send-to", "A@b:99999"], "is no AET@HOST:PORT"),
        (["--dicom", "0", "--send-to", "A@b:104", "--aet", "x" * 17], "is no AE title"),
        (["--dicom", "0", "--send-to", "A@b:104", "--dicom-from", "a\\b"], "is no AE title"),
        (
            ["--dicom", "0", "--send-to", "A@b:104", "--host", "0.0.0.0"],
            "so say whose images are taken: --dicom-from AET",
        ),
        (
            ["--dicom", "0", "--send-to", "A@[::1]:104", "--host", "0.0.0.0", "--dicom-from", "CT"],
            "not encrypted here, and --host 0.0.0.0 would",
        ),
        (
            ["--dicom", "0", "--send-to", "A@10.0.0.2:104"],
            "and --send-to 10.0.0.2 would take patients' names over a network: --insecure-dicom",
        ),
        (["--insecure-dicom"], "--insecure-dicom does nothing without --dicom"),
    ],
)
def test_what_it_does_not_start_with(made, arguments, words):
    done = CliRunner().invoke(app, ["serve", str(made), *arguments])
    assert done.exit_code == 1
    (line,) = done.stderr.strip().splitlines()
    assert words in line


def test_a_port_that_is_taken(model, tmp_path, archive):
    to = dicom_peers.Peer("ARCHIVE", "127.0.0.1", archive.port)
    with (
        in_thread(model, tmp_path) as (_, bench),
        pytest.raises(EdgeKDError, match="Address already in use; choose another --dicom"),
    ):
        Node(bench, dicom_peers.Dicom(archive.port, to))


def test_addresses():
    found = dicom_peers.chosen(104, None, "ARCHIVE@[::1]:104", ["CT 1"])
    assert found == dicom_peers.Dicom(
        104, dicom_peers.Peer("ARCHIVE", "::1", 104), "EDGEKD", ("CT 1",)
    )
    assert dicom_peers.chosen(None, None, None, []) is None


def test_a_network_that_is_trusted():
    far = dicom_peers.chosen(104, None, "ARCHIVE@10.0.0.2:104", ["CT"], insecure=True)
    dicom_peers.check(far, "0.0.0.0")


@pytest.mark.parametrize("missing", ["pynetdicom", "highdicom"])
def test_what_is_missing_is_named(made, missing):
    import sys

    code = f"""import sys
sys.modules[{missing!r}] = None
from edgekd.cli.main import main
main()"""
    command = [sys.executable, "-c", code, "serve", str(made), "--dicom", "0", "--send-to", "A@b:1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert done.stderr == f"error: {dicom_peers.INSTALL}\n"
    command[-4:] = ["--port", "0", "--audit", "/dev/null"]  # without --dicom: not needed
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "pynetdicom" not in done.stderr
    assert "audit log /dev/null cannot be written: it is no plain file" in done.stderr
