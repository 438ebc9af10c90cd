"""What becomes of `edgekd serve` when it is abused: bombs, huge and slow bodies, tokens, fuzzing.

Exit 1 if it ever answered 500, said anything on stderr, let anyone in, wrote a file outside its
folder, took more memory than MOST_MB, or did not answer an honest client afterwards.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import http.client
import io
import json
import random
import select
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serving import Server, film, tiny
from workbench import arguments, keep

TOKEN = "a-token-for-the-abuse-benchmark"
MOST_MB = 2500  # two images of 32 megapixels at a time, the largest DICOM among them
TIMEOUT_S = 20
Told = tuple[int, bytes]


def ask(
    port: int, path: str, body: Any = None, kind: str = "image/png", *, method: str = "POST",
    token: str = TOKEN, **headers: str,
) -> Told:  # fmt: skip
    """(status, body) of one request on a connection of its own."""
    told = {"content-type": kind} | {k.replace("_", "-"): v for k, v in headers.items()}
    if token:
        told["authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, body, told)
        answer = connection.getresponse()
        return answer.status, answer.read()


# ---- bombs


def png_of(width: int, height: int, mode: str = "L") -> bytes:
    with io.BytesIO() as buffer:
        Image.new(mode, (width, height)).save(buffer, "PNG")
        return buffer.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG header alone."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x) - 4) + x + struct.pack(">I", zlib.crc32(x)) for x in (head, body)
    )


def jpeg_of_scans(side: int, scans: int) -> bytes:
    with io.BytesIO() as buffer:
        Image.new("L", (side, side), 100).save(buffer, "JPEG", progressive=True)
        data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def dicom_of(pixels: np.ndarray, stream: bytes = b"", syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    """A DICOM file of grey pixels, or of a compressed stream that says otherwise."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * pixels.dtype.itemsize
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation = bits - 1, 0
    ds.PixelData = encapsulate([stream]) if stream else pixels.tobytes()
    ds["PixelData"].VR = "OB" if stream or bits == 8 else "OW"
    ds["PixelData"].is_undefined_length = bool(stream)
    with io.BytesIO() as buffer:
        ds.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def deflated_bomb(gigabytes: float) -> bytes:
    data = dicom_of(np.zeros((64, 64), np.uint8), syntax="1.2.840.10008.1.2.1.99")
    at = 144 + struct.unpack_from("<I", data, 140)[0]
    pack, size = zlib.compressobj(9, zlib.DEFLATED, -15), int(gigabytes * 1e9)
    parts = [data[:at], pack.compress(zlib.decompress(data[at:], -15))]
    parts.append(pack.compress(struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"OB", 0, size)))
    parts += [pack.compress(bytes(10**6)) for _ in range(size // 10**6)]
    return b"".join([*parts, pack.flush()])


def bombs(quick: bool) -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    """(name, file, statuses that are right)."""
    side = 2000 if quick else 5600
    yield "PNG that says 60 000 x 60 000", png_that_says(60_000, 60_000), (422,)
    yield "PNG of 36 megapixels in 35 kB", png_of(6000, 6000), (422,)
    yield "PNG that says 5000 x 5000 and has a row", png_that_says(5000, 5000), (422,)
    yield "PNG with alpha, as large as may be", png_of(side, side, "RGBA"), (200,)
    yield "JPEG of 5000 scans", jpeg_of_scans(side, 5000), (422,)
    yield "JPEG of 90 scans", jpeg_of_scans(side, 84), (200, 504)
    grey = np.random.default_rng(0).integers(0, 4000, (side - 200, side - 200), np.uint16)
    yield "DICOM as large as may be", dicom_of(grey), (200,)
    yield "DICOM that inflates to gigabytes", deflated_bomb(0.5 if quick else 4), (422,)
    with io.BytesIO() as buffer:
        Image.new("L", (9000, 9000)).save(buffer, "JPEG2000", no_jp2=True)
        stream = buffer.getvalue()
    small = np.zeros((64, 64), np.uint8)
    bomb = dicom_of(small, stream, "1.2.840.10008.1.2.4.90")
    yield "DICOM of 64 x 64 with JPEG 2000 of 81 megapixels", bomb, (422,)


def at_once(count: int, call: Callable[[], Told]) -> collections.Counter[int]:
    """Statuses of as many calls at the same time; 0: the connection broke."""
    found: collections.Counter[int] = collections.Counter()

    def one() -> None:
        try:
            found[call()[0]] += 1
        except (OSError, http.client.HTTPException):
            found[0] += 1

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# ---- slow ones


def slow_loris(port: int, count: int, seconds: float) -> dict[str, float]:
    """Connections that send a byte a second, in the head or the body, beside an honest client."""
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
    head += f"authorization: Bearer {TOKEN}\r\n".encode()
    slow = []
    for i in range(count):
        s = socket.create_connection(("127.0.0.1", port), timeout=5)
        s.sendall(head + (b"content-length: 100000\r\n\r\n" if i % 2 else b""))
        s.setblocking(False)
        slow.append(s)
    end, ms, refused = time.monotonic() + seconds, [], 0
    data, opened, begun = film(1), len(slow), time.monotonic()
    cut_after = float("nan")
    while time.monotonic() < end:
        for s in list(slow):
            try:
                s.send(b"x")
                with contextlib.suppress(BlockingIOError):
                    if not s.recv(4096):
                        raise ConnectionResetError
            except BlockingIOError:
                continue
            except OSError:
                s.close()
                slow.remove(s)
        if not slow and cut_after != cut_after:
            cut_after = time.monotonic() - begun
        began = time.perf_counter()
        status, _ = ask(port, "/predict", data)
        ms.append((time.perf_counter() - began) * 1e3)
        refused += status != 200
        time.sleep(0.2)
    left = len(slow)
    for s in slow:
        s.close()
    return {"slow_opened": opened, "slow_left": left, "slow_cut_after_s": cut_after,
            "honest_asked": len(ms), "honest_refused": refused,
            "honest_p50_ms": float(np.median(ms)), "honest_max_ms": max(ms)}  # fmt: skip


# ---- fuzzing


def fuzz(port: int, wanted: int) -> collections.Counter[int]:
    """Statuses of requests that schemathesis makes up from the server's own OpenAPI."""
    try:
        import hypothesis
        import schemathesis
        from schemathesis.checks import CHECKS
    except ModuleNotFoundError as e:
        sys.exit(f"the fuzzing needs {e.name}: pip install schemathesis")
    url = f"http://127.0.0.1:{port}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: collections.Counter[int] = collections.Counter()
    operations = [r.ok() for r in schema.get_all_operations()]
    kinds = list(schemathesis.GenerationMode)
    checks = [
        check for name in ("not_a_server_error", "status_code_conformance",
                           "content_type_conformance", "response_schema_conformance")
        for check in CHECKS.get_by_names([name])
    ]  # fmt: skip
    share = -(-wanted // (len(operations) * len(kinds)))
    rounds = 0
    while found.total() < wanted and rounds < 50:
        rounds += 1
        for operation in operations:
            for kind in kinds:
                _fuzz_one(hypothesis, operation, kind, share, rounds, checks, found)
    return found


def _fuzz_one(
    hypothesis: Any, operation: Any, kind: Any, count: int, seed: int, checks: list[Any],
    found: collections.Counter[int],
) -> None:  # fmt: skip
    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None,
                         suppress_health_check=list(hypothesis.HealthCheck),
                         phases=[hypothesis.Phase.generate])  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=kind))
    def one(case: Any) -> None:
        if found.total() % 5:  # else what was made up for it
            made_up = dict(case.headers or {})
            rest = {k: v for k, v in made_up.items() if k.lower() != "authorization"}
            case.headers = rest | {"Authorization": f"Bearer {TOKEN}"}
        answer = case.call(timeout=60)
        found[answer.status_code] += 1
        if answer.status_code != 400:  # no HTTP at all: uvicorn's own answer
            case.validate_response(answer, checks=checks)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing of this kind to make
        one()


def mutated(port: int, wanted: int) -> collections.Counter[int]:
    """Statuses of real images with bytes flipped, cut and repeated."""
    rng = random.Random(0)
    with io.BytesIO() as buffer:
        Image.open(io.BytesIO(film(2, 64))).save(buffer, "JPEG", progressive=True)
        jpeg = buffer.getvalue()
    with io.BytesIO() as buffer:
        Image.new("L", (48, 48), 90).save(buffer, "JPEG2000", no_jp2=True)
        stream = buffer.getvalue()
    grey = np.arange(48 * 48, dtype=np.uint16).reshape(48, 48)
    whole = [film(1, 64), jpeg, dicom_of(grey),
             dicom_of(grey.astype(np.uint8), stream, "1.2.840.10008.1.2.4.90"),
             dicom_of(grey, syntax="1.2.840.10008.1.2.1.99")]  # fmt: skip
    found: collections.Counter[int] = collections.Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for i in range(wanted):
        data = bytearray(whole[i % len(whole)])
        for _ in range(rng.choice((1, 2, 8, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        headers = {"content-type": "image/png", "authorization": f"Bearer {TOKEN}"}
        connection.request("POST", "/predict", bytes(data), headers)
        answer = connection.getresponse()
        answer.read()
        found[answer.status] += 1
    connection.close()
    return found


# ---- all of it


def doors(port: int) -> collections.Counter[int]:
    """Statuses of who may not come in, and of paths that would lead elsewhere."""
    found: collections.Counter[int] = collections.Counter()
    for wrong in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "x" * 5000, " "):
        for path, method in (("/predict", "POST"), ("/explain", "POST"), ("/model", "GET"),
                             ("/metrics", "GET")):  # fmt: skip
            found[ask(port, path, film(1), method=method, token=wrong)[0]] += 1
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd",
                 "/page.css/../../../etc/passwd", "//etc/passwd", "/page.js%00.png"):  # fmt: skip
        status, body = ask(port, path, method="GET")
        found[status] += 1
        assert b"root:" not in body
    name = 'attachment; filename="../../../../tmp/owned.png"'
    found[ask(port, "/predict", film(1), content_disposition=name)[0]] += 1
    found[ask(port, "/explain?label=../../x", film(1))[0]] += 1
    return found


def pour(port: int, stated: bool) -> Told:
    """A body of 1 GB, sent until the server says something, as curl does."""
    how = b"content-length: 1073741824" if stated else b"transfer-encoding: chunked"
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer "
    chunk = bytes(1 << 20)
    piece = chunk if stated else b"100000\r\n" + chunk + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(head + TOKEN.encode() + b"\r\n" + how + b"\r\n\r\n")
        for _ in range(1024):
            if select.select([s], [], [], 0)[0]:
                break
            s.sendall(piece)
        said = s.recv(4096)
    return int(said.split()[1]), said


class Report:
    """What came of each attack."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.wrong: list[str] = []

    def note(self, what: str, statuses: collections.Counter[int], right: tuple[int, ...]) -> None:
        """Statuses of one attack, of which only the right ones may be there."""
        self.table.append({"what": what, "statuses": {str(k): n for k, n in statuses.items()}})
        print(what, dict(statuses), flush=True)
        if bad := set(statuses) - set(right):
            self.wrong.append(f"{what}: {sorted(bad)}")


def with_bombs(server: Server, report: Report, quick: bool) -> None:
    for name, data, right in bombs(quick):
        began = time.perf_counter()
        many = at_once(1 if quick else 6, functools.partial(ask, server.port, "/predict", data))
        took = time.perf_counter() - began
        report.note(f"{name} ({len(data)} bytes, {took:.1f} s)", many, (*right, 503))
    report.figures["memory_mb_after_bombs"] = server.peak_mb


def with_huge_bodies(server: Server, report: Report) -> None:
    for stated in (True, False):
        found = at_once(6, functools.partial(pour, server.port, stated))
        report.note(f"1 GB {'stated' if stated else 'in chunks'}", found, (413, 503))


def with_fuzz(server: Server, report: Report, quick: bool) -> None:
    began = time.perf_counter()
    many = mutated(server.port, 300 if quick else 3000)
    report.note("mutated images", many, (200, 422))
    fuzzed = fuzz(server.port, 300 if quick else 10_000)
    right = (200, 400, 401, 403, 404, 405, 408, 411, 413, 414, 415, 422, 431)
    report.note("fuzzed requests", fuzzed, right)
    report.figures |= {"fuzzed": fuzzed.total(), "fuzz_s": time.perf_counter() - began}


def honest_at_last(server: Server, report: Report) -> None:
    status, body = ask(server.port, "/predict", film(7))
    if status != 200 or "label" not in json.loads(body):
        report.wrong.append("no answer at last")
    report.figures["honest_status"] = status


def abused(made: Path, sandbox: Path, report: Report, quick: bool) -> Server:
    """The server that bore all of it, and was stopped."""
    server = Server(made, sandbox, "--timeout", TIMEOUT_S, token=TOKEN)
    report.note("doors and paths", doors(server.port), (200, 401, 404, 422))
    with_bombs(server, report, quick)
    with_huge_bodies(server, report)
    report.figures |= slow_loris(server.port, 40 if quick else 300, 24 if quick else 40)
    with_fuzz(server, report, quick)
    honest_at_last(server, report)
    report.figures["memory_mb_peak"] = server.peak_mb
    report.figures["audit_records"] = sum(1 for _ in server.records())
    report.figures["exit_code"] = server.stop()
    report.figures["lines_on_stderr"] = len(server.said)
    return server


def main() -> int:
    given = arguments(__doc__ or "").parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Path(folder)
        made = tiny(sandbox)
        before = outside()
        server = abused(made, sandbox, report, given.quick)
        written = [p.relative_to(sandbox) for p in sandbox.rglob("*") if p.is_file()]
        own = ("audit", ".cache", made.name)
        strange = [str(p) for p in written if p.parts[0] not in own]
        strange += sorted(outside() - before)
        text = server.audit.read_text("utf-8")
    figures = report.figures | {"files_outside": len(strange)}
    keep(
        "serve_abuse", figures, report.table, packages=("fastapi", "uvicorn", "schemathesis"),
        quick=given.quick,
    )  # fmt: skip
    wrong = report.wrong + [why for failed, why in (
        (server.said, "".join(server.said)), (strange, str(strange)),
        (figures["exit_code"], f"exit code {figures['exit_code']}"),
        (figures["memory_mb_peak"] > MOST_MB, "too much memory"),
        (figures["honest_refused"], "an honest client was refused"),
        (figures["slow_left"], "slow clients were not cut off"), (TOKEN in text, "token in log"),
    ) if failed]  # fmt: skip
    for why in wrong:
        print("WRONG:", why)
    return 1 if wrong else 0


def outside() -> set[str]:
    """Files where a traversal would put its own."""
    return {str(p) for d in ("/tmp", "/", str(Path.home())) for p in Path(d).glob("owned*")}


if __name__ == "__main__":
    sys.exit(main())
