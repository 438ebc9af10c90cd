"""How does `edgekd serve` bear 200 clients at a time for a minute, and a kill in their midst?

All on one machine: the clients take a part of its cores. An answer that a client got must be in the
audit log, whatever happened to the server. Exit 1 if one is not, or if the server fell over.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from serving import Server, film, tiny
from workbench import arguments, keep

EVERY = 20  # one request in so many asks for a map


class Tally:
    """What the clients saw."""

    def __init__(self) -> None:
        self.status: collections.Counter[str] = collections.Counter()
        self.ms: dict[str, list[float]] = {"predict": [], "explain": []}
        self.told: collections.Counter[tuple[str, str]] = collections.Counter()


async def client(number: int, port: int, images: list[bytes], end: float, tally: Tally) -> None:
    """Ask, wait for the answer, ask again; after a refusal when the server says."""
    reader = writer = None
    rng = np.random.default_rng(number)
    while time.monotonic() < end:
        what = "explain" if rng.random() < 1 / EVERY else "predict"
        data = images[int(rng.integers(len(images)))]
        head = (f"POST /{what} HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
                f"content-length: {len(data)}\r\n\r\n")  # fmt: skip
        began = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + data)
            await writer.drain()
            status, headers, body = await answer(reader)
        except (OSError, asyncio.IncompleteReadError, IndexError):
            tally.status["no connection"] += 1
            if writer is not None:
                writer.close()
            writer = None
            await asyncio.sleep(0.2)
            continue
        tally.status[status] += 1
        if status == "200":
            tally.ms[what].append((time.perf_counter() - began) * 1e3)
            tally.told[what, json.loads(body)["image"]] += 1
        else:
            await asyncio.sleep(float(headers.get("retry-after", 0.1)))
        if headers.get("connection") == "close":
            writer.close()
            writer = None
    if writer is not None:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    """(status, headers, body)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(x.lower().split(": ", 1) for x in head[1:] if x)
    return head[0].split()[1], headers, await reader.readexactly(int(headers["content-length"]))


async def crowd(clients: int, server: Server, images: list[bytes], seconds: float,
                kill_after: float | None = None) -> Tally:  # fmt: skip
    """All clients at once; with `kill_after` the server is killed in their midst."""
    tally, end = Tally(), time.monotonic() + seconds
    asked = [client(i, server.port, images, end, tally) for i in range(clients)]
    if kill_after is not None:
        asyncio.get_running_loop().call_later(
            kill_after, server.process.send_signal, signal.SIGKILL
        )
    await asyncio.gather(*asked)
    return tally


def missing(told: collections.Counter[tuple[str, str]], server: Server) -> int:
    """Answers that a client got and the audit log has not."""
    kept = collections.Counter((str(r["event"]), str(r.get("image"))) for r in server.records())
    return sum(max(0, n - kept[key]) for key, n in told.items())


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--bundle", type=Path, help="[default: the network that edgekd brings]")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    seconds = 4.0 if given.quick else given.seconds
    images = [film(i) for i in range(40)]
    with tempfile.TemporaryDirectory() as name:
        sandbox = Path(name)
        made = given.bundle.resolve() if given.bundle else tiny(sandbox)
        server = Server(made, sandbox)
        time.sleep(0.5)
        before = server.memory[-1][1]
        tally = asyncio.run(crowd(given.clients, server, images, seconds))
        lost = missing(tally.told, server)
        code = server.stop()
        killed = Server(made, sandbox)
        midst = asyncio.run(crowd(given.clients, killed, images, 4, kill_after=2))
        killed.stop(signal.SIGKILL)
        again = Server(made, sandbox)  # the log must open, and go on
        lost_by_kill = missing(tally.told + midst.told, again)
        after = asyncio.run(crowd(4, again, images, 1))
        code_again = again.stop()
        digest = hashlib.sha256(made.read_bytes()).hexdigest()[:16]
    half = len(server.memory) // 2
    early = max(mb for _, mb in server.memory[:half])
    late = max(mb for _, mb in server.memory[half:])
    answered = {k: np.array(v) for k, v in tally.ms.items()}
    figures: dict[str, float] = {
        "clients": given.clients, "seconds": seconds, "answers": sum(map(len, answered.values())),
        "answers_per_s": sum(map(len, answered.values())) / seconds,
    }  # fmt: skip
    for what, ms in answered.items():
        for q in (50, 99):
            figures[f"{what}_p{q}_ms"] = float(np.percentile(ms, q)) if len(ms) else float("nan")
    figures |= {f"status_{s.replace(' ', '_')}": n for s, n in sorted(tally.status.items())}
    figures |= {
        "memory_mb_before": before, "memory_mb_first_half": early, "memory_mb_second_half": late,
        "answers_missing_in_audit": lost, "answers_before_kill": sum(midst.told.values()),
        "answers_missing_after_kill": lost_by_kill,
        "answers_after_restart": sum(after.told.values()),
        "exit_code": code, "exit_code_restarted": code_again,
    }  # fmt: skip
    keep(
        "serve_load", figures, [], packages=("fastapi", "uvicorn", "onnxruntime", "openvino"),
        quick=given.quick, bundle=given.bundle.name if given.bundle else "tiny", sha256=digest,
    )  # fmt: skip
    said = [line for s in (server, killed, again) for line in s.said]
    if said:
        print("the server said:", *said, sep="\n")
    fell = code or code_again or said or tally.status["no connection"] or tally.status["500"]
    return 1 if lost or lost_by_kill or fell or not after.told else 0


if __name__ == "__main__":
    sys.exit(main())
