"""The server's paths: an image in, an answer or a map out, within stated bounds."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from edgekd import __version__
from edgekd.records import EdgeKDError, Record
from edgekd.serve import metrics as meters
from edgekd.serve import sd_notify
from edgekd.serve.audit import Audit, AuditFailed, now
from edgekd.serve.auth import PATHS, Door, Refusal, is_loopback
from edgekd.serve.dicom_peers import Dicom
from edgekd.serve.inference_queue import Full, Told, Unreadable, Work
from edgekd.serve.metrics import Meters
from edgekd.serve.model import Answer, Model, png, veil
from edgekd.serve.model_card import Facts, facts

Codes = dict[int | str, dict[str, Any]]  # status -> what OpenAPI says of it
TYPES = ("image/png", "image/jpeg", "application/dicom", "application/octet-stream")
ALIASES = {"": TYPES[-1], "image/jpg": TYPES[1]}
TOO_MANY = "too many images are waiting: ask again in a second"
BODIES = 4  # as many of the largest body may be in memory at a time
PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
        "/page.js": ("page.js", "text/javascript")}  # fmt: skip


class Settings(NamedTuple):
    """Where the server listens and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    token: str = ""  # empty: none is wanted
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure_http: bool = False
    allowed_hosts: tuple[str, ...] = ()  # that a proxy calls it by, as `auth.allowed_host` gives
    root_path: str = ""  # that a proxy serves it at, as `auth.root_path` gives it
    audit: Path = Path("audit.jsonl")
    max_bytes: int = 64 << 20  # of one image file
    queue: int = 64  # images held at a time
    timeout_s: float = 30.0  # for one request, from its head to its answer
    dicom: Dicom | None = None  # None: HTTP alone


class Reply(Answer):
    """What the model says of the image that was sent. Not for diagnosis."""

    model: str  # sha256 of the file that answered


class Explained(Reply):
    """The same, and why: a Score-CAM map."""

    explained: str  # class that the map is of
    picture: str  # base64 of a PNG: what the model saw
    overlay: str | None  # base64 of a PNG to lay over it; null: the map is undefined, it says
    # nothing about this class


class Health(Record):
    """Whether the server can answer."""

    status: str  # "ok", or what is wrong
    version: str


class Problem(Record):
    """Why there is no answer, in one line."""

    error: str


PROBLEMS = {
    401: "no token, or another one",
    403: "asked for by another site's page, or by another name than localhost",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is of another kind",
    422: "the body is no image that can be read, or no such class",
    503: "too much at a time, or no answer may be given: try again",
    504: "no answer in time",
}


class Bench:
    """What the paths share: the work, its meters and its audit log."""

    def __init__(self, model: Model, settings: Settings, audit: Audit) -> None:
        self.model, self.settings, self.audit = model, settings, audit
        # The model's file alone does not tell: its temperature may be another in another bundle.
        self.ran = {"model": model.artifact.sha256, "bundle": model.bundle}
        self.meters = Meters(model, lambda: self.work.held)
        self.work = Work(model, self.record, limit=settings.queue, timed=self.meters.timed)
        self.arriving = 0  # bytes of bodies

    def event(self, what: str) -> dict[str, Any]:
        """A line of the audit log about the server itself."""
        made = self.model.manifest
        return {"time": now(), "event": what, **self.ran, "name": made.name,
                "signer": self.model.signer, "edgekd": __version__}  # fmt: skip

    def record(self, told: Sequence[Told]) -> None:
        """Answers into the audit log, before anyone is told."""
        lines = []
        for one in told:
            a, why = one.answer, {}
            if one.explained:
                why = {"explained": one.explained, "map": one.heat is not None}
            lines.append({
                "time": now(), "event": "explain" if why else "predict", "image": a.image,
                **self.ran, "answer": a.label,
                "probabilities": {k: round(p, 6) for k, p in a.probabilities.items()},
                "abstained": bool(a.abstained), "warnings": len(a.warnings),
                "ms": round(a.ms, 3),
            } | why)  # fmt: skip
        self.audit.write(lines)
        for one in told:
            self.meters.said(one.answer)

    @property
    def health(self) -> str:
        """Why no answer may be expected, or "ok"."""
        if self.audit.error:
            return f"the audit log cannot be written: {self.audit.error}"
        return "ok" if self.work.busy_s() < self.settings.timeout_s else "the model does not answer"

    async def asked(self, request: Request, *, why: bool = False, label: str = "") -> Told:
        """The answer to the image in a request's body; Refusal if there will be none in time."""
        end = time.monotonic() + self.settings.timeout_s
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if ALIASES.get(kind, kind) not in TYPES:
            raise Refusal(415, f"content type {kind[:80]!r}: send the image itself as the body, "
                          f"with content-type {', '.join(TYPES[:-1])} or {TYPES[-1]}", "type",
                          unread=True)  # fmt: skip
        coding = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
        if coding not in ("", "identity"):
            raise Refusal(415, f"content encoding {coding[:80]!r}: send the image as it is, "
                          "without content-encoding", "encoding", unread=True)  # fmt: skip
        classes = self.model.artifact.spec.classes
        if label and label not in classes:
            raise Refusal(422, f"no class {label[:80]!r}: {', '.join(classes)}", "label",
                          unread=True)  # fmt: skip
        if self.work.full(why):
            raise Refusal(503, TOO_MANY, "queue", unread=True)
        request.state.held = 0
        try:
            late = Refusal(408, f"the image did not arrive within {self.settings.timeout_s:g} s",
                           "slow body", unread=True)  # fmt: skip
            data = await _within(end, self._body(request), late)
            try:
                future = self.work.ask(data, why=why, label=label)
            except Full:
                raise Refusal(503, TOO_MANY, "queue") from None
        finally:
            self._let_go(request)
        return await self._told(request, future, end)

    def _let_go(self, request: Request) -> None:
        """Its body no longer counts as arriving."""
        self.arriving -= request.state.held
        request.state.held = 0

    async def _told(self, request: Request, future: Future[Told], end: float) -> Told:
        """What comes of it before `end`; nothing more is done for who leaves or waits too long."""
        late = Refusal(504, f"no answer within {self.settings.timeout_s:g} s: ask again, or with a "
                       "smaller image", "slow answer")  # fmt: skip
        answer, left = asyncio.wrap_future(future), asyncio.create_task(_left(request))
        try:
            await asyncio.wait((answer, left), timeout=max(0.0, end - time.monotonic()),
                               return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            if answer.done():
                return answer.result()
            raise Refusal(408, "nobody waits for the answer", "left") if left.done() else late
        except Unreadable as e:
            raise Refusal(422, str(e), "unreadable") from None
        except AuditFailed as e:
            sys.stderr.write(f"{e}\n")
            raise Refusal(503, "the audit log cannot be written, so no answer may be given",
                          "audit") from None  # fmt: skip
        except EdgeKDError as e:  # nan, or a runtime that gave up: its message names our files
            sys.stderr.write(f"{e}\n")
            raise Refusal(503, "the model gives no answer: see the server's log", "model") from None
        finally:
            left.cancel()
            answer.cancel()

    async def _body(self, request: Request) -> bytes:
        """The whole body, which counts as arriving until the caller is done with it."""
        most = self.settings.max_bytes
        too_large = Refusal(413, f"more than {most / 1e6:g} MB: no image is", "large", unread=True)
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > most:
            raise too_large
        parts = []
        try:
            async for part in request.stream():
                request.state.held += len(part)
                self.arriving += len(part)
                if request.state.held > most:
                    raise too_large
                if self.arriving + self.work.bytes > BODIES * most:
                    self._let_go(request)  # at once, or all of them would be refused
                    raise Refusal(503, "too many large images at a time: ask again in a second",
                                  "memory", unread=True)  # fmt: skip
                parts.append(part)
        except ClientDisconnect:  # nobody reads this
            raise Refusal(408, "the image did not arrive whole", "left", unread=True) from None
        return b"".join(parts)


async def _left(request: Request) -> None:
    """Done when whoever asked is no longer there; the body has come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _within(end: float, result: Any, late: Refusal) -> Any:
    """What `result` awaits, before time.monotonic() is `end`; else `late` is raised."""
    try:
        return await asyncio.wait_for(result, max(0.0, end - time.monotonic()))
    except asyncio.TimeoutError:
        raise late from None


def app(bench: Bench) -> FastAPI:
    """The paths, behind their door."""
    settings = bench.settings
    made = bench.model.manifest

    @contextlib.asynccontextmanager
    async def alive(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(_watch(bench.work))
        yield
        watch.cancel()

    api = FastAPI(
        title=f"edgekd serve: {made.name}", version=__version__, lifespan=alive,
        description=made.intended_use, docs_url=None, redoc_url=None, redirect_slashes=False,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
    )  # fmt: skip
    anyone = not is_loopback(settings.host) and not settings.allowed_hosts
    api.add_middleware(Door, token=settings.token, hosts=settings.allowed_hosts, anyone=anyone,
                       root=settings.root_path, meters=bench.meters)  # fmt: skip
    locked = [Depends(HTTPBearer(auto_error=False))] if settings.token else []  # Door judges it
    problems: Codes = {c: {"model": Problem, "description": w} for c, w in PROBLEMS.items()}
    few: Codes = {c: problems[c] for c in ((401, 403) if settings.token else (403,))}
    asks: dict[str, Any] = {
        "dependencies": locked,
        "responses": few | {c: p for c, p in problems.items() if c != 401},
        "openapi_extra": {"requestBody": {"required": True, "content": {
            kind: {"schema": {"type": "string", "format": "binary"}} for kind in TYPES}}},
    }  # fmt: skip

    @api.post("/predict", response_model=Reply, **asks)
    async def predict(request: Request) -> Response:
        """What the model says of the image in the body: JPEG, PNG or DICOM."""
        told = await bench.asked(request)
        return _json(Reply(**told.answer.model_dump(), model=bench.model.artifact.sha256))

    @api.post("/explain", response_model=Explained, **asks)
    async def explain(request: Request, label: str = "") -> Response:
        """The same, with a Score-CAM map of class `label`, or of the most probable."""
        told = await bench.asked(request, why=True, label=label)
        picture, overlay = await asyncio.to_thread(_drawn, told)
        return _json(
            Explained(
                **told.answer.model_dump(),
                model=bench.model.artifact.sha256,
                explained=told.explained,
                picture=picture,
                overlay=overlay,
            )
        )

    @api.get("/model", response_model=Facts, dependencies=locked, responses=few)
    async def model() -> Response:
        """What answers here, and what is known of it."""
        limits = {"max_bytes": settings.max_bytes, "max_pixels": bench.model.most_pixels,
                  "queue": settings.queue, "timeout_s": settings.timeout_s}  # fmt: skip
        return _json(facts(bench.model, limits))

    told_as_text: Codes = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @api.get("/metrics", dependencies=locked, response_class=Response,
             responses=few | told_as_text)  # fmt: skip
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(bench.meters.page(), headers={"content-type": meters.CONTENT_TYPE})

    not_well: Codes = {503: {"model": Health, "description": "no answers"}}

    @api.get("/health", response_model=Health, responses=not_well | {403: problems[403]})
    async def health() -> Response:
        """Whether answers may be expected; open to all."""
        state = bench.health
        return _json(Health(status=state, version=__version__), 200 if state == "ok" else 503)

    for path, (name, kind) in PAGE.items():
        _file(api, path, (Path(__file__).parent / name).read_bytes(), kind)

    @api.exception_handler(RequestValidationError)
    async def not_valid(_: Request, e: RequestValidationError) -> Response:
        first = e.errors()[0]
        raise Refusal(422, f"{first['loc'][-1]}: {first['msg']}", "query", unread=True)

    @api.exception_handler(HTTPException)
    async def not_here(_: Request, e: HTTPException) -> Response:
        where = ", ".join(PATHS)
        refused = Refusal(e.status_code, f"{e.detail}: there is {where}", "path", unread=True)
        refused.headers |= dict(e.headers or {})
        raise refused

    return api


def _file(api: FastAPI, path: str, content: bytes, kind: str) -> None:
    """A file of the page, from memory: no name that is sent ever reaches the disk."""

    @api.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8")


def _json(record: Record, status: int = 200) -> Response:
    return Response(record.model_dump_json(), status, media_type="application/json")


def _drawn(told: Told) -> tuple[str, str | None]:
    """Base64 of what the model saw and of what to lay over it."""
    picture = base64.b64encode(png(told.seen.pixels)).decode()
    if told.heat is None:
        return picture, None
    return picture, base64.b64encode(veil(told.seen, told.heat)).decode()


async def _watch(work: Work) -> None:
    """Tell a watchdog that the model answers, at half the time that it allows."""
    allowed_s = sd_notify.watched_s()
    while allowed_s:
        with contextlib.suppress(asyncio.TimeoutError, EdgeKDError):  # then it is not told
            await asyncio.wait_for(asyncio.wrap_future(work.pulse()), allowed_s / 2)
            sd_notify.tell("WATCHDOG=1")
        await asyncio.sleep(allowed_s / 2)
