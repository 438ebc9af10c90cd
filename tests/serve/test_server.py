"""The server: answers that are the model's own, bounds that hold, and order in what it leaves."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from serving import TINY, Process, film, in_thread, make, noise, png, wait
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="pip install 'edgekd[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'edgekd[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'edgekd[serve]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")

from edgekd import runtimes
from edgekd.bundle import bundle
from edgekd.cli.main import app
from edgekd.explain import score_cam
from edgekd.records import Artifact
from edgekd.serve import api, auth, sd_notify, server, timeouts
from edgekd.serve import model as device
from edgekd.serve.audit import AuditFailed

TOKEN = "0123456789abcdef-wanted"
HEAD = b"POST /predict HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def made(folder):
    return make(folder / "tiny.edgekd")


@pytest.fixture(scope="module")
def model(made, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return device.open_bundle(made, most_pixels=1_000_000)


@pytest.fixture(scope="module")
def served(model, folder):
    with in_thread(model, folder, max_bytes=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served[0]


@pytest.fixture
def slow(model, monkeypatch):
    """An event that the model waits for, once it is cleared."""
    may, session = threading.Event(), model.session
    may.set()

    def waiting(images):
        assert may.wait(20)
        return session(images)

    monkeypatch.setattr(model, "session", waiting)
    yield may
    may.set()


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# ---- answers


def test_an_answer_is_the_models_own(client, model):
    data = film()
    status, headers, told = client.post("/predict", data)
    assert status == 200
    (own,) = model.answer([model.see(data)])
    assert told["model"] == TINY.sha256 == model.manifest.model
    assert told["image"] == own.image
    assert told["label"] == own.label
    assert told["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_what_is_unusual_is_said(client):
    _, _, told = client.post("/predict", noise())
    assert any(w.startswith("unlike") for w in told["warnings"])


def test_an_explanation_is_the_models_own(client, model):
    data = film()
    seen = model.see(data)
    (own,) = model.answer([seen])
    for label in ("", "normal"):
        status, _, told = client.post(f"/explain?label={label}", data)
        assert status == 200
        assert told["explained"] == (label or own.foremost)
        heat = model.why(seen, told["explained"])
        np.testing.assert_array_equal(decoded(told["picture"]), seen.pixels)
        veil = decoded(told["overlay"])
        np.testing.assert_array_equal(veil, score_cam.veil(heat, (32, 32)))
        # what the page lays over the picture at full strength is what predict draws
        share = veil[..., 3:] / 255
        mixed = seen.pixels * (1 - share) + veil[..., :3] * share
        assert abs(mixed - score_cam.overlay(seen.pixels, heat, 1.0)).max() <= 1.5


def test_an_undefined_map_is_said_to_be(client, model, monkeypatch):
    monkeypatch.setattr(model, "why", lambda *_, **__: None)
    status, _, told = client.post("/explain", film())
    assert (status, told["overlay"]) == (200, None)


def test_dicom(client):
    pytest.importorskip("pydicom", reason="pip install 'edgekd[dicom]'")
    from data.test_dicom import made as dicom_file

    status, _, told = client.post("/predict", dicom_file(), "application/dicom")
    assert status == 200
    assert sum(told["probabilities"].values()) == pytest.approx(1)


def test_the_model_and_its_health(client, model):
    _, _, told = client.get("/model")
    assert (told["sha256"], told["bundle"]) == (TINY.sha256, model.bundle)
    assert told["classes"] == list(TINY.spec.classes)
    assert (told["verdict"], told["latency"], told["signer"]) == ("", None, "")
    assert told["limits"]["max_bytes"] == 100_000
    assert told["limits"]["max_pixels"] == 1_000_000
    assert client.get("/health")[2]["status"] == "ok"


def test_the_meters_count(model, tmp_path):
    with in_thread(model, tmp_path) as (client, _):
        for _ in range(3):
            client.post("/predict", film())
        client.post("/predict", noise())
        client.post("/explain", film())
        client.post("/predict", b"torn")
        client.get("/nowhere")
        page = client.get("/metrics")[2].decode()
    lines = dict(x.rsplit(" ", 1) for x in page.splitlines() if not x.startswith("#"))
    assert lines['edgekd_requests_total{path="/predict",status="200"}'] == "4.0"
    assert lines['edgekd_requests_total{path="/predict",status="422"}'] == "1.0"
    assert lines['edgekd_requests_total{path="other",status="404"}'] == "1.0"
    assert lines['edgekd_rejected_total{reason="unreadable"}'] == "1.0"
    assert lines["edgekd_batch_images_sum"] == "4.0"
    assert lines['edgekd_model_seconds_count{kind="explain"}'] == "1.0"
    assert lines['edgekd_request_seconds_count{path="/explain"}'] == "1.0"
    assert lines["edgekd_warned_total"] == "1.0"
    assert lines["edgekd_queue_images"] == "0.0"
    assert f'sha256="{TINY.sha256}"' in page


def test_openapi_names_every_path_and_refusal(client):
    _, _, told = client.get("/openapi.json")
    assert set(told["paths"]) == {"/predict", "/explain", "/model", "/metrics", "/health"}
    codes = {"200", "403", "408", "413", "415", "422", "503", "504"}
    assert set(told["paths"]["/predict"]["post"]["responses"]) == codes
    assert client.get("/docs")[0] == 404  # it would ask a foreign site for its scripts


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "words"),
    [
        ("/predict", b"", "image/png", 422, "empty file"),
        ("/predict", b"GIF89a", "image/png", 422, "not a JPEG, PNG or DICOM image"),
        ("/predict", film()[:-400], "image/png", 422, "corrupt or truncated image"),
        ("/predict", film(), "multipart/form-data; boundary=x", 415, "send the image itself"),
        ("/predict", film(), "application/x-www-form-urlencoded", 415, "send the image itself"),
        ("/predict", bytes(100_001), "image/png", 413, "more than 0.1 MB: no image is"),
        ("/explain?label=flu", film(), "image/png", 422, "no class 'flu': nodule, normal, opacity"),
        ("/../../etc/passwd", None, "", 404, "Not Found: there is /,"),
        ("/page.html", None, "", 404, "Not Found"),
        ("/predict", None, "", 405, "/predict does not take GET: it takes OPTIONS, POST"),
    ],
)
def test_what_is_refused_is_told_in_one_line(client, path, body, kind, status, words):
    method = "GET" if body is None else "POST"
    found, headers, told = client.call(method, path, body, kind)
    assert (found, list(told)) == (status, ["error"])
    assert words in told["error"]
    assert "\n" not in told["error"]
    assert headers["x-content-type-options"] == "nosniff"


def test_an_image_of_too_many_pixels_is_not_decoded(client):
    with io.BytesIO() as buffer:
        Image.new("L", (1001, 1000)).save(buffer, "PNG")
        status, _, told = client.post("/predict", buffer.getvalue())
    assert status == 422
    assert told["error"] == "1001 x 1000 pixels, more than 1 megapixels; scale it down"


def test_a_body_that_does_not_say_its_length_is_cut_off(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
        s.sendall(
            b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        sent = 0
        try:
            for _ in range(200):
                s.sendall(b"2000\r\n" + bytes(0x2000) + b"\r\n")
                sent += 0x2000
        except OSError:
            pass
        answer = s.recv(1000)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_stated_length_that_is_too_much_is_answered_before_the_body_comes(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
        s.sendall(
            b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000\r\n\r\n"
        )
        assert s.recv(1000).startswith(b"HTTP/1.1 413 ")
        s.sendall(bytes(1_000_000))  # what is under way already is no reset
        s.settimeout(10)
        while s.recv(1000):
            pass


def test_who_is_gone_when_refused_is_no_bug():
    class Gone:
        done: ClassVar[list[str]] = []

        def write_eof(self):
            raise OSError(107, "Transport endpoint is not connected")

        def __getattr__(self, name):
            return lambda: self.done.append(name) or name == "can_write_eof"

    later = []
    transport = timeouts.Lingering(Gone(), SimpleNamespace(call_later=lambda *x: later.append(x)))
    transport.midst = True
    transport.close()
    transport.close()
    assert transport.is_closing()
    assert [seconds for seconds, _ in later] == [timeouts.LINGER_S]
    assert "close" not in Gone.done


def test_bodies_together_are_bounded(served, monkeypatch):
    client, bench = served
    for where, what in ((bench, "arriving"), (bench.work, "bytes")):
        monkeypatch.setattr(where, what, 4 * 100_000)
        status, headers, told = client.post("/predict", film())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "too many large images" in told["error"]
        monkeypatch.undo()
    for data in (film(), b"torn", bytes(100_001)):
        client.post("/predict", data)
        wait(lambda: bench.arriving == bench.work.bytes == 0)
    assert client.post("/predict", film())[0] == 200


def test_of_too_many_large_bodies_those_that_fit_arrive(served):
    """Six that come side by side, where four may: not one more is refused."""
    _, bench = served
    most, began = bench.settings.max_bytes, asyncio.Event()

    class Body:
        headers: ClassVar[dict[str, str]] = {}

        def __init__(self):
            self.state = SimpleNamespace(held=0)

        async def stream(self):
            yield bytes(most // 2)
            await began.wait()
            yield bytes(most // 2)

    async def one(body):
        try:
            return await api._within(time.monotonic() + 10, bench._body(body), TimeoutError())
        finally:
            bench._let_go(body)

    async def all_of_them():
        tasks = [asyncio.create_task(one(Body())) for _ in range(6)]
        await asyncio.sleep(0.01)
        began.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(all_of_them())
    assert sum(isinstance(x, bytes) and len(x) == most // 2 * 2 for x in found) == 4
    assert [x.status for x in found if not isinstance(x, bytes)] == [503, 503]
    assert bench.arriving == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[x"}, 403),
        ({"host": "localhost:8080", "origin": "http://localhost:8080"}, 200),
        ({"host": "localhost:8080", "origin": "http://localhost:8081"}, 403),
    ],
)
def test_other_sites_pages_are_kept_out(client, headers, status):
    assert client.post("/predict", film(), **headers)[0] == status


def test_a_token(model, tmp_path):
    with in_thread(model, tmp_path, token=TOKEN) as (client, _):
        assert client.post("/predict", film())[0] == 200
        client.token = ""
        for path in ("/", "/page.css", "/page.js", "/health", "/openapi.json"):
            assert client.get(path)[0] == 200
        for wrong in ("", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", TOKEN, "Bearer ü"):
            for path in ("/model", "/metrics", "/nowhere"):
                assert client.get(path, authorization=wrong.encode("latin-1"))[0] == 401
            status, headers, told = client.post("/predict", film(), authorization=wrong.encode())
            assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="edgekd"')
            assert TOKEN not in told["error"]
        described = client.get("/openapi.json")[2]
        assert described["paths"]["/predict"]["post"]["security"]


def test_a_full_queue(model, tmp_path, slow):
    with in_thread(model, tmp_path, queue=2) as (client, bench):
        slow.clear()
        found = []
        askers = [threading.Thread(target=lambda: found.append(client.post("/predict", film())[0]))
                  for _ in range(2)]  # fmt: skip
        for t in askers:
            t.start()
        wait(lambda: bench.work.held == 2)
        status, headers, told = client.post("/predict", film())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "too many images are waiting" in told["error"]
        slow.set()
        for t in askers:
            t.join(10)
        assert found == [200, 200]


def test_an_answer_that_takes_too_long(model, tmp_path, slow):
    with in_thread(model, tmp_path, timeout_s=0.5) as (client, bench):
        slow.clear()
        status, _, told = client.post("/predict", film())
        assert (status, told["error"][:20]) == (504, "no answer within 0.5")
        wait(lambda: client.get("/health")[0] == 503)
        assert client.get("/health")[2]["status"] == "the model does not answer"
        slow.set()
        wait(lambda: client.get("/health")[0] == 200)
        bench.settings = bench.settings._replace(timeout_s=30)  # a busy machine needs more
        assert client.post("/predict", film())[0] == 200


def test_for_who_leaves_no_map_is_made(model, tmp_path, monkeypatch):
    parts = []

    def why(seen, label, before):
        for i in range(1000):
            before()
            parts.append(i)
            time.sleep(0.01)

    monkeypatch.setattr(model, "why", why)
    data = film()
    head = f"POST /explain HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    with in_thread(model, tmp_path) as (client, bench):
        asked = [socket.create_connection(("127.0.0.1", client.port), timeout=10) for _ in range(3)]
        for s in asked:
            s.sendall(head.encode() + data)
        wait(lambda: bench.work.held == 3 and parts)
        for s in asked:
            s.close()
        wait(lambda: bench.work.held == 0, 5)
        assert len(parts) < 500
        assert client.post("/predict", data)[0] == 200
        assert 'edgekd_rejected_total{reason="left"} 3.0' in client.get("/metrics")[2].decode()
    events = [json.loads(x)["event"] for x in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert events == ["predict"]


def test_slow_senders_are_cut_off(model, tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "HEAD_S", 0.3)
    monkeypatch.setattr(timeouts, "READ_S", 0.3)
    head = HEAD + b"content-length: 1000\r\n"
    with in_thread(model, tmp_path, timeout_s=0.5) as (client, _):
        for start, answer in (
            (b"", b""),
            (b"POST /pre", b""),  # half a head
            (head, b""),
            (head + b"\r\nhalf a body", b"HTTP/1.1 408 "),
            (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he", b"HTTP/1.1 200 "),
        ):
            with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
                began = time.monotonic()
                s.sendall(start)
                said = b""
                while more := _received(s):
                    said += more
                assert said.startswith(answer)
                assert bool(said) == bool(answer)
                assert time.monotonic() - began < 5


def test_who_asks_and_never_reads_is_cut_off(model, tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "READ_S", 0.3)
    with in_thread(model, tmp_path, timeout_s=0.5) as (client, bench):
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
            asked = b"GET /page.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 500_000
            with pytest.raises(ConnectionError):
                s.sendall(asked)
        bench.settings = bench.settings._replace(timeout_s=30)  # a busy machine needs more
        assert client.post("/predict", film())[0] == 200


def test_connections_are_bounded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 3)
    asked = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with in_thread(model, tmp_path) as (client, _), contextlib.ExitStack() as opened:

        def connect():
            s = socket.create_connection(("127.0.0.1", client.port), timeout=10)
            return opened.enter_context(s)

        idle = [connect() for _ in range(3)]
        for _ in range(5):
            assert _received(connect()) == b""  # one too many is closed at once
        idle[2].sendall(asked)  # and who is in is served
        assert _received(idle[2]).startswith(b"HTTP/1.1 200 ")
        idle[0].close()
        wait(lambda: _answers(client))
        idle[1].sendall(asked)
        assert _received(idle[1]).startswith(b"HTTP/1.1 200 ")


def _answers(client):
    try:
        return client.post("/predict", film())[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_who_begins_a_handshake_and_waits_is_cut_off(model, tmp_path, monkeypatch):
    certificate(tmp_path)
    monkeypatch.setattr(timeouts, "HEAD_S", 0.3)
    pem = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    with in_thread(model, tmp_path, **pem) as (client, _):
        for start in (b"", b"\x16\x03\x01\x02\x00\x01"):
            with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
                began = time.monotonic()
                s.sendall(start)
                assert _received(s) == b""
                assert time.monotonic() - began < 5


def _received(s):
    try:
        return s.recv(10_000)
    except ConnectionResetError:
        return b""


def test_a_bug_is_a_number_and_tells_nothing_of_the_image(served, monkeypatch, capfd):
    client, bench = served
    name = "Roentgen^Wilhelm"

    def broken(_):
        raise ZeroDivisionError(name)

    monkeypatch.setattr(bench.model, "see", broken)
    status, _, told = client.post("/predict", film())
    assert status == 500
    number = told["error"].split(", ")[1][:8]
    said = capfd.readouterr().err
    assert f"bug {number}: ZeroDivisionError" in said
    assert "in broken" in said
    assert "Roentgen" not in said + told["error"]


def test_without_its_audit_log_it_answers_nothing(served, monkeypatch, capfd):
    client, bench = served

    def full(_):
        bench.audit.error = "No space left on device"
        raise AuditFailed("audit log /secret/place cannot be written")

    monkeypatch.setattr(bench.audit, "write", full)
    status, _, told = client.post("/predict", film())
    assert (status, "audit log cannot be written" in told["error"]) == (503, True)
    assert "/secret" not in told["error"]
    assert "/secret" in capfd.readouterr().err
    assert client.get("/health")[0] == 503
    monkeypatch.undo()
    assert client.post("/predict", film())[0] == 200
    assert client.get("/health")[0] == 200


# ---- the audit log


def test_every_answer_is_in_the_audit_log_and_nobodys_name(model, tmp_path):
    with in_thread(model, tmp_path) as (client, _):
        told = client.post("/predict?name=Roentgen", film(), x_patient="Roentgen")[2]
        why = client.post("/explain?label=normal", noise())[2]
    log = tmp_path / "audit.jsonl"
    assert "Roentgen" not in log.read_text()
    first, second = [json.loads(x) for x in log.read_text().splitlines()]
    assert first["time"].endswith("+00:00")
    assert first["event"] == "predict"
    assert (first["image"], first["answer"]) == (told["image"], told["label"])
    assert first["model"] == TINY.sha256
    assert first["bundle"] == second["bundle"] == model.bundle
    assert first["probabilities"] == pytest.approx(told["probabilities"], abs=1e-6)
    assert first["ms"] == pytest.approx(told["ms"], abs=1e-3)
    assert (second["event"], second["explained"], second["map"]) == ("explain", "normal", True)
    assert second["warnings"] == len(why["warnings"]) > 0


def test_who_answers_is_the_file_that_runs(made, tmp_path, monkeypatch):
    """A model that was built on the device, not the one that the bundle brought."""
    monkeypatch.setattr(runtimes, "must_be_built", lambda *_: True)
    there = tmp_path / "there" / bundle.UNPACKED
    bundle.extract(made, there)
    shutil.copy(made, there.parent / "tiny.edgekd")
    shutil.copytree(there / "model", there / bundle.BUILT)
    file = there / bundle.BUILT / TINY.path.name
    file.write_bytes(file.read_bytes() + runtimes.message((6, "built here")))  # its doc_string
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    brought = Artifact.load(there / "model")
    other = {"files": brought.files | {file.name: digest}, "parents": {"onnx": brought.sha256}}
    brought.model_copy(update=other).save(there / bundle.BUILT)
    with in_thread(device.open_bundle(there.parent / "tiny.edgekd"), tmp_path) as (client, bench):
        bench.audit.write([bench.event("start")])
        told = [client.post(path, film())[2]["model"] for path in ("/predict", "/explain")]
        told += [client.get("/model")[2]["sha256"]]
        assert f'sha256="{digest}"' in client.get("/metrics")[2].decode()
    told += [json.loads(x)["model"] for x in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert told == [digest] * 6


# ---- the process


def test_it_starts_answers_and_stops_in_order(made, tmp_path):
    p = Process(made, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    try:
        assert f"answers with tiny (fp32); audit log {tmp_path}/audit.jsonl" in p.first
        request = urllib.request.Request(
            f"http://127.0.0.1:{p.port}/predict", film(), {"content-type": "image/png"}
        )
        # a body under way when the signal comes is still answered
        with socket.create_connection(("127.0.0.1", p.port), timeout=20) as s:
            data = film()
            head = (
                f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
            )
            s.sendall(head.encode() + data[:100])
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200
            p.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError, match="refused"):
                urllib.request.urlopen(request, timeout=20)
            s.sendall(data[100:])
            assert s.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert p.process.wait(20) == 0
    finally:
        said = p.stop()
    assert said == ""
    assert [r["event"] for r in p.records()] == ["start", "predict", "predict", "stop"]


def test_a_kill_loses_no_answer_and_the_next_start_goes_on(made, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    p = Process(made, tmp_path, **env)
    told = []
    try:

        def ask(seed):
            data = film(seed)
            while True:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{p.port}/predict", data, {"content-type": "image/png"}
                )
                try:
                    with urllib.request.urlopen(request, timeout=20) as answer:
                        told.append(json.load(answer)["image"])
                except (OSError, http.client.HTTPException):  # cut off, in an answer's midst too
                    return

        askers = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for t in askers:
            t.start()
        wait(lambda: len(told) > 40)
        p.process.kill()
        for t in askers:
            t.join(20)
    finally:
        p.stop()
    again = Process(made, tmp_path, **env)
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(20) == 130
    again.stop()
    records = again.records()
    kept = [r["image"] for r in records if r["event"] == "predict"]
    for image in set(told):
        assert kept.count(image) >= told.count(image)
    assert [r["event"] for r in records if r["event"] != "predict"] == ["start", "start", "stop"]


def test_a_service_manager_is_told(made, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        p = Process(made, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"), **env)
        try:
            said = [manager.recv(100) for _ in range(4)]
            p.process.send_signal(signal.SIGTERM)
            while said[-1] != b"STOPPING=1":
                said.append(manager.recv(100))
            assert p.process.wait(20) == 0
        finally:
            p.stop()
    assert sorted(set(said)) == [b"READY=1", b"STOPPING=1", b"WATCHDOG=1"]


def test_a_watchdog_hears_nothing_of_a_model_that_hangs(model, tmp_path, slow, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    told = []
    monkeypatch.setattr(sd_notify, "tell", told.append)
    with in_thread(model, tmp_path):
        wait(lambda: len(told) >= 3)
        slow.clear()
        time.sleep(0.3)
        before = len(told)
        time.sleep(0.5)
        assert len(told) == before
        slow.set()
        wait(lambda: len(told) > before)


def test_watchdogs_of_others_are_none_of_ours(monkeypatch):
    for usec, pid, expected in (
        ("", "", None), ("0", "", None), ("x", "", None), ("3000000", "", 3.0),
        ("3000000", str(os.getpid()), 3.0), ("3000000", "1", None),
    ):  # fmt: skip
        monkeypatch.setenv("WATCHDOG_USEC", usec)
        monkeypatch.setenv("WATCHDOG_PID", pid)
        assert sd_notify.watched_s() == expected
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sd_notify.tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    assert not sd_notify.tell("READY=1")


def test_tls(made, tmp_path):
    certificate(tmp_path)
    p = Process(made, tmp_path, "--tls-cert", tmp_path / "cert.pem", "--tls-key",
                tmp_path / "key.pem", XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip
    try:
        assert p.first.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        request = urllib.request.Request(
            f"https://localhost:{p.port}/predict", film(), {"content-type": "image/png"}
        )
        with urllib.request.urlopen(request, timeout=20, context=trust) as answer:
            assert json.load(answer)["label"]
        big = urllib.request.Request(
            f"https://localhost:{p.port}/predict", bytes(70_000_000), {"content-type": "image/png"}
        )
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(big, timeout=20, context=trust)
        p.process.send_signal(signal.SIGTERM)
        assert p.process.wait(20) == 0
    finally:
        p.stop()


def certificate(folder):
    """cert.pem and key.pem for localhost."""
    import datetime

    pytest.importorskip("cryptography", reason="pip install 'edgekd[bundle]'")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    cert = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(cert.public_bytes(pem))
    private = serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, private, plain))


# ---- what it does not start with


def started(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--host", "0.0.0.0"],
            "can be reached from elsewhere, so a token is needed: --token-file",
        ),
        (["--host", "::"], "so a token is needed"),
        (["--tls-cert", "x.pem"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], "cannot use --tls-cert x.pem with"),
        (["--allowed-host", "edge.example"], "comes through a proxy, so a token is needed: --to"),
        (["--allowed-host", "https://edge.example/"], "is no host: give the name that stands in"),
        (["--allowed-host", "*"], '--allowed-host "*" is no host'),
        (["--allowed-host", "bürö.example"], "for other letters, xn--"),
        (["--root-path", "edgekd"], '--root-path "edgekd" is no path: give the one that the'),
        (["--root-path", "/a/../b"], '--root-path "/a/../b" is no path'),
        (["--token-file", "none"], "cannot read --token-file none: No such file"),
        (["--host", "nowhere.invalid", "--insecure-http"], "so a token is needed"),
    ],
)
def test_what_it_does_not_start_with(made, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(auth.TOKEN, raising=False)
    done = started(made, "--audit", tmp_path / "a" / "audit.jsonl", *arguments)
    assert done.exit_code == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_tokens(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\nsecond line\n")
    file.chmod(0o644)
    done = started("x.edgekd", "--token-file", file)
    assert f"others may read {file}: chmod 600" in done.stderr
    file.chmod(0o600)
    assert auth.token(file) == TOKEN
    for encoding in ("utf-16", "utf-8-sig"):  # as editors of Windows save it
        file.write_text(f"{TOKEN}\r\n", encoding)
        assert auth.token(file) == TOKEN
    monkeypatch.setenv(auth.TOKEN, TOKEN)
    assert auth.token(None) == TOKEN
    assert "give one of them" in started("x.edgekd", "--token-file", file).stderr
    monkeypatch.setenv(auth.TOKEN, "short")
    done = started("x.edgekd")
    assert "is not 16 or more plain characters" in done.stderr
    assert "short" not in done.stderr
    monkeypatch.setenv(auth.TOKEN, TOKEN)
    done = started("x.edgekd", "--host", "0.0.0.0")
    assert "would cross the network in the clear" in done.stderr


def test_a_port_that_is_taken(made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        done = started(made, "--port", port, "--audit", tmp_path / "audit.jsonl")
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in done.stderr


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_is_missing_is_named(made, missing):
    code = f"""import sys
sys.modules[{missing!r}] = None
from edgekd.cli.main import main
main()"""
    done = subprocess.run([sys.executable, "-c", code, "serve", str(made)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 4
    assert done.stderr == f"error: edgekd serve needs {missing}: pip install 'edgekd[serve]'\n"


def test_loopback():
    assert [auth.is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [
        True
    ] * 4
    assert not any(auth.is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "device", ""))


def test_a_grey_and_a_colour_png_are_alike_to_it(client):
    grey = np.asarray(Image.open(io.BytesIO(film())))
    one = client.post("/predict", png(grey))[2]
    three = client.post("/predict", png(np.dstack([grey] * 3)), "image/jpeg")[2]
    assert one["probabilities"] == pytest.approx(three["probabilities"], abs=1e-6)
