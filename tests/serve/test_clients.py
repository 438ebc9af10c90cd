"""Reverse proxies before `edgekd serve`, and HTTP as clients speak it that are not the page."""

import contextlib
import gzip
import http.client
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from loopback import free_port
from serving import Client, film, in_thread, make, wait

from edgekd.serve import auth
from edgekd.serve import model as device

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="pip install 'edgekd[serve]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")
TOKEN = "0123456789abcdef-wanted"
PUBLIC = "edge.example:8443"
UNKNOWN = "if a proxy calls it so, start it with --allowed-host evil.example"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return device.open_bundle(make(folder / "tiny.edgekd"))


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with in_thread(model, tmp_path_factory.mktemp("plain"), max_bytes=100_000) as (found, _):
        yield found


@pytest.fixture(scope="module")
def proxied(model, tmp_path_factory):
    """A server that is ready for a proxy."""
    settings = {"token": TOKEN, "allowed_hosts": (PUBLIC, "other.example"), "root_path": "/edgekd"}
    with in_thread(model, tmp_path_factory.mktemp("proxied"), **settings) as (found, _):
        yield found


def said(client, data, *, then=b""):
    """(status, headers and body as text) of the answer to these bytes on a connection."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
        s.sendall(data)
        if then:
            time.sleep(0.05)
            s.sendall(then)
        answer = http.client.HTTPResponse(s)
        answer.begin()
        return answer.status, f"{answer.headers}{answer.read().decode()}"


# ---- clients


@pytest.mark.parametrize("path", ["/", "/page.js", "/health", "/model", "/metrics"])
def test_head_is_get_without_a_body(client, path):
    status, headers, body = client.call("HEAD", path)
    assert (status, body) in ((200, b""), (200, ""))
    assert headers["content-type"] == client.get(path)[1]["content-type"]
    assert int(headers["content-length"])


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("OPTIONS", "/predict", 204, "OPTIONS, POST"),
        ("OPTIONS", "/health", 204, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "*", 204, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/nowhere", 404, None),
        ("HEAD", "/predict", 405, "OPTIONS, POST"),
        ("DELETE", "/health", 405, "GET, HEAD, OPTIONS"),
        ("GE", "/health", 405, "GET, HEAD, OPTIONS"),
    ],
)
def test_what_a_path_may_be_asked_with(client, method, path, status, allow):
    found, headers, _ = client.call(method, path)
    assert (found, headers["allow"]) == (status, allow)
    preflight = client.call("OPTIONS", "/predict", origin="http://evil.example")
    assert (preflight[0], "access-control-allow-origin" in preflight[1]) == (403, False)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, br", "GZIP", "x"])
def test_a_compressed_body_is_refused_by_name(client, coding):
    body = gzip.compress(bytes(50_000))
    status, headers, told = client.post("/predict", body, content_encoding=coding)
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert told["error"].startswith(f"content encoding '{coding.lower()}': send the image as it is")
    assert client.post("/predict", film(), content_encoding="identity")[0] == 200
    assert client.post("/predict", bytes(100_001), content_encoding=coding)[0] == 415


@pytest.mark.parametrize("kind", ["image/jpg", "", "IMAGE/PNG ; x=y", "application/dicom;a=b"])
def test_kinds_that_are_meant_well(client, kind):
    assert client.post("/predict", film(), kind, content_type=kind, accept="text/html")[0] == 200


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", 200, '"ok"'),
        (b"OPTIONS / HTTP/1.0\r\n\r\n", 204, "allow: GET"),
        (b"GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", 200, '"ok"'),
        (b"GET /health HTTP/1.0\r\norigin: null\r\n\r\n", 403, "page of another site"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "no HTTP request: Missing mandatory Host: header"),
        (b"\x16\x03\x01\x02\r\n\r\n", 400, "this is no HTTP request: illegal request line"),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, "Found multiple Host:"),
        (b"GET /" + b"x" * 70_000, 431, "too long"),
        (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
         501, "Transfer-Encoding"),
        (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400,
         "bad Content-Length"),
        (b"GET http://LOCALHOST:80/health HTTP/1.1\r\nhost: evil.example\r\n\r\n", 200, '"ok"'),
        (b"GET http://evil.example/health HTTP/1.1\r\nhost: localhost\r\n\r\n", 403, UNKNOWN),
        (b"GET http://localhost HTTP/1.1\r\nhost: localhost\r\n\r\n", 200, "<!doctype html>"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc", 200, '"ok"'),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
         200, '"ok"'),
        (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
         b"\r\n", 422, "empty file"),
    ],
)  # fmt: skip
def test_requests_as_they_come(client, data, status, words):
    found, text = said(client, data)
    assert found == status, text
    assert words in text


def test_a_length_that_is_a_lie(client):
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as s:
        s.sendall(head % (len(film()) + 9) + film())
    status, text = said(client, head % (len(film()) - 400) + film())
    assert (status, "truncated" in text) == (422, True)
    chunked = head.replace(b"content-length: %d", b"transfer-encoding: chunked") + b"5\r\nhello\r\n"
    status, text = said(client, chunked, then=b"no number\r\n")
    assert (status, "this is no HTTP request" in text) == (400, True)
    assert client.post("/predict", film())[0] == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here: apt install curl")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["-H", "Expect: 100-continue", "--data-binary", "@{}", "-H", "content-type:"], 200),
        (["-H", "Transfer-Encoding: chunked", "--data-binary", "@{}", "-H", "content-type:"], 200),
        (["-0", "--data-binary", "@{}", "-H", "content-type: image/png", "-H", "host:"], 200),
        (["--http2", "--data-binary", "@{}", "-H", "content-type: image/png"], 200),
        (["--data-binary", "@{}"], 415),
        (["-F", 'it\'s;=@"{}";filename="a b;c.png"'], 415),
    ],
)
def test_curl(client, tmp_path, arguments, status):
    file = tmp_path / "a film !.png"
    file.write_bytes(film())
    words = [a.replace("{}", str(file)) for a in arguments]
    done = subprocess.run(
        ["curl", "-s", "-m", "10", "-w", "%{http_code}", *words, f"{client.url}/predict"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith(str(status)), done.stdout
    assert ("send the image itself as the body" in done.stdout) == (status == 415)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("LocalHost:1", 200), ("localhost.", 200), ("127.0.0.1.:80", 200), ("[::1]", 200),
        ("localhost:", 200), ("::1", 403), ("[::1]evil.example", 403), ("[10.0.0.1]", 403),
        ("localhost:80@evil.example", 403), ("localhost.evil.example", 403), ("evil.example.", 403),
    ],
)  # fmt: skip
def test_hosts(client, host, status):
    found, _, told = client.get("/health", host=host)
    assert found == status
    if status == 403:
        assert told["error"].startswith(f"this server answers to localhost alone, not to '{host}'")
        assert f"start it with --allowed-host {host}" in told["error"]


@pytest.mark.parametrize(
    "path", ["//health", "/health/", "/%68ealth", "/health?x=/..", "/./health"]
)
def test_paths(client, path):
    assert client.get(path)[0] == (404 if "/./" in path else 200)


# ---- proxies


@pytest.mark.parametrize("above", ["", "/edgekd", "/edgekd/", "//edgekd"])
def test_a_root_path_that_a_proxy_passes_on_or_not(proxied, above):
    for path in ("/", "/page.js", "/health", "/model"):
        assert proxied.get(above + path, host=PUBLIC)[0] == 200
    assert proxied.post(f"{above}/predict", film(), host=PUBLIC)[0] == 200
    assert proxied.get(f"{above}/nowhere", host=PUBLIC)[0] == 404
    assert proxied.call("GET", f"{above}/model", authorization="none")[0] == 401


def test_the_pages_links_stay_below_a_root_path(proxied):
    status, headers, _ = proxied.get("/edgekd")
    assert (status, headers["location"]) == (308, "/edgekd/")
    page = proxied.get("/edgekd/")[2].decode()
    links = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', page)
    calls = re.findall(r"call\([\"`]([^\"`]+)", proxied.get("/edgekd/page.js")[2].decode())
    assert links
    assert calls
    assert not [x for x in links + calls if x.startswith(("/", "http"))]
    assert proxied.get("/edgekd/openapi.json")[2]["servers"] == [{"url": "/edgekd"}]


def test_a_host_as_browsers_send_it():
    given = ("EDGE.example", "edge.example:443", "edge.example.", "edge.example:8443", "[::1]:80")
    assert [auth.allowed_host(x) for x in given] == [
        "edge.example", "edge.example", "edge.example", "edge.example:8443", "[::1]"
    ]  # fmt: skip
    assert [auth.root_path(x) for x in ("", "/", "/a/b.c/", "/a")] == ["", "", "/a/b.c", "/a"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": PUBLIC, "origin": f"https://{PUBLIC}"}, 200),
        ({"host": "EDGE.example", "origin": f"https://{PUBLIC.upper()}"}, 200),
        ({"origin": f"https://{PUBLIC}"}, 200),  # nginx sends its own name for us
        ({"host": "other.example.", "origin": "https://other.example"}, 200),
        ({"origin": "https://edge.example"}, 403),  # another port is another site
        ({"origin": "https://evil.example"}, 403),
        ({"host": "evil.example", "x_forwarded_host": PUBLIC}, 403),
        ({"host": "evil.example", "x_forwarded_host": "localhost", "forwarded": "host=a"}, 403),
        ({"x_forwarded_host": "evil.example", "x_forwarded_prefix": "/a"}, 200),
    ],
)
def test_a_proxys_name_for_it(proxied, headers, status):
    found, _, told = proxied.post("/predict", film(), **headers)
    assert found == status
    if status == 403:
        assert "--allowed-host" in told["error"]
        assert proxied.call("POST", "/predict", film(), **headers)[2]["error"] == told["error"]


def nginx(block, port, folder):
    """The command of an nginx that has this block, on a port."""
    config = f"""daemon off; master_process off; pid {folder}/pid; error_log stderr; events {{}}
http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
server {{ listen 127.0.0.1:{port}; {block} }} }}"""
    (folder / "nginx.conf").write_text(config)
    return ["nginx", "-e", "stderr", "-c", folder / "nginx.conf"]


def caddy(block, port, folder):
    """The same of Caddy, without certificates."""
    plain = block.replace("edge.example.org", f"http://edge.example.org:{port}")
    (folder / "Caddyfile").write_text(f"{{\nadmin off\n}}\n{plain}")
    return ["caddy", "run", "--config", folder / "Caddyfile"]


@pytest.mark.parametrize("proxy", [nginx, caddy])
def test_the_readmes_proxies(proxy, model, tmp_path, monkeypatch):
    """A page's own requests, as a browser sends them, through the real programs."""
    name = proxy.__name__
    if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip(f"no {name} here: apt install {name}")
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (block,) = re.findall(rf"```{name}\n(.*?)```", readme, re.S)
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    settings = {"token": TOKEN, "allowed_hosts": ("edge.example.org",), "root_path": "/edgekd"}
    with in_thread(model, tmp_path, **settings) as (own, _), contextlib.ExitStack() as stack:
        port = free_port()
        command = proxy(block.replace("8080", str(own.port)), port, tmp_path)
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        stack.callback(process.terminate)
        client = Client(port, TOKEN)

        def listens():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True

        wait(listens)
        page = {"host": "edge.example.org", "origin": "https://edge.example.org"}
        assert b"page.js" in client.get("/edgekd/", host=page["host"])[2]
        assert client.call("HEAD", "/edgekd/health", host=page["host"])[0] == 200
        assert client.post("/edgekd/predict", film(), **page)[2]["label"]
        large = film() + bytes(2_000_000)  # after the image, where nobody looks
        assert client.post("/edgekd/predict", large, **page)[0] == 200
        evil = client.post("/edgekd/predict", film(), **page | {"origin": "https://evil.example"})
        assert (evil[0], UNKNOWN in evil[2]["error"]) == (403, True)
