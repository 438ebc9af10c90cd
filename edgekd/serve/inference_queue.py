"""One model, many askers: a bounded queue, images decoded aside, answers in small batches."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from edgekd.records import EdgeKDError
from edgekd.serve.model import Answer, Model, Seen

BATCH = 8  # images asked at once, at most
GATHER_S = 0.003  # that the first of a batch waits for those that are just being decoded
MAPS = 4  # one in so many of the images held may wait for a map: maps take a hundred times as long
DECODERS = 2  # images decoded at a time: what is bounded is memory


class Full(Exception):
    """As many images as may be held are held."""


class Unreadable(EdgeKDError):
    """What was sent is no image that can be read whole."""


class Abandoned(Exception):
    """Nobody waits for this map any more."""


class Told(NamedTuple):
    """What the model said of one image."""

    seen: Seen
    answer: Answer
    explained: str  # class that the map is of; empty: none was asked for
    heat: np.ndarray | None  # (h, w) float32; None: not asked for, or nothing to show


@dataclass
class _Job:
    data: bytes  # until it is decoded
    why: bool
    label: str  # to explain; empty: the foremost
    seen: Seen | None = None
    future: Future[Told] = field(default_factory=Future)


class Work:
    """A thread that owns the model, and those that decode for it."""

    def __init__(
        self,
        model: Model,
        record: Callable[[Sequence[Told]], None],
        *,
        limit: int,
        timed: Callable[[str, int, float], None],
    ) -> None:
        """Limit: images held at a time. record: called before the askers are told; what it raises
        they are told instead. timed: ("predict" or "explain", images, seconds) of each call.
        """
        self.model, self.limit = model, limit
        self.held = 0  # images accepted and not answered
        self._maps = 0  # of those, to be explained
        self.bytes = 0  # of those that are not decoded
        self._record, self._timed = record, timed
        self._turn = threading.Condition()
        self._interlude = threading.Lock()  # a map's threads answer others one after the other
        self._decoding = 0
        self._asks: deque[_Job] = deque()
        self._whys: deque[_Job] = deque()
        self._pulses: deque[Future[None]] = deque()
        self._closed = False
        self._since: float | None = None  # when what the model is at began; None: it is at rest
        height, width = model.artifact.spec.size
        self._blank = Seen("", np.zeros((height, width, 3), np.uint8), 0.0)
        # Daemons: an image that decodes for ever does not keep the process from ending.
        self._raw: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._decoders = [threading.Thread(target=self._decode, name=f"decoder {i}", daemon=True)
                          for i in range(DECODERS)]  # fmt: skip
        self._worker = threading.Thread(target=self._run, name="model", daemon=True)
        for thread in (*self._decoders, self._worker):
            thread.start()

    def ask(self, data: bytes, *, why: bool = False, label: str = "") -> Future[Told]:
        """The answer to an image file, to come; why: with a map of `label`, or of the foremost.

        It raises Unreadable, or what the model or `record` raised. Full if it is not accepted.
        """
        with self._turn:
            if self.full(why):
                raise Full
            self.held += 1
            self._maps += why
            self.bytes += len(data)
            self._decoding += 1
            job = _Job(data, why, label)
            self._raw.put(job)  # before `close` puts the decoders' ends behind it
        return job.future

    def pulse(self) -> Future[None]:
        """Done when the model has answered a blank image, before all others."""
        future: Future[None] = Future()
        with self._turn:
            self._pulses.append(future)
            self._turn.notify()
        return future

    def full(self, why: bool) -> bool:
        """Whether `ask` would raise Full."""
        maps = why and self._maps >= max(1, self.limit // MAPS)
        return self._closed or self.held >= self.limit or maps

    def busy_s(self) -> float:
        """Seconds that the model has been at one thing: a batch, or a part of a map."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def close(self, seconds: float) -> bool:
        """Accept nothing more; whether all that was accepted is answered within `seconds`."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        for _ in self._decoders:
            self._raw.put(None)
        end = time.monotonic() + seconds
        for thread in (*self._decoders, self._worker):
            thread.join(max(0.0, end - time.monotonic()))
        return not self._worker.is_alive()

    # ---- decoding

    def _decode(self) -> None:
        while (job := self._raw.get()) is not None:
            try:
                if not job.future.cancelled():
                    job.seen = self.model.see(job.data)
            except EdgeKDError as e:
                _fail([job], Unreadable(str(e).removeprefix("image: ")))
            except Exception as e:  # a bug: the asker's to report, this thread goes on
                _fail([job], e)
            with self._turn:
                self.bytes -= len(job.data)
                job.data = b""
                self._decoding -= 1
                if job.seen is not None:
                    (self._whys if job.why else self._asks).append(job)
                self._turn.notify()
            if job.seen is None:
                self._done([job])

    # ---- answering

    def _run(self) -> None:
        while True:
            with self._turn:
                while not (self._asks or self._whys or self._pulses):
                    if self._closed and not self._decoding:
                        return
                    self._turn.wait()
            self._since = time.monotonic()
            self._answer_waiting(GATHER_S)
            if self._whys:  # however many ask for answers: they get them between its batches
                self._since = time.monotonic()
                self._explain_next()
            self._since = None

    def _answer_waiting(self, patience_s: float = 0.0) -> None:
        """Answer what waits for an answer alone, at most BATCH images."""
        end = time.monotonic() + patience_s
        with self._turn:
            pulses = list(self._pulses)
            self._pulses.clear()
            while self._asks and len(self._asks) < BATCH and self._decoding:
                if not self._turn.wait(end - time.monotonic()):
                    break
            jobs = [self._asks.popleft() for _ in range(min(BATCH, len(self._asks)))]
        for pulse in pulses:
            self._pulse(pulse)
        if jobs:
            self._answer(jobs)

    def _pulse(self, future: Future[None]) -> None:
        try:
            self.model.answer([self._blank])
        except Exception as e:
            if future.set_running_or_notify_cancel():
                future.set_exception(e)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            live = [(j, j.seen) for j in jobs if j.seen and not j.future.cancelled()]
            if live:
                began = time.perf_counter()
                answers = self.model.answer([seen for _, seen in live])
                self._timed("predict", len(live), time.perf_counter() - began)
                told = [Told(s, a, "", None) for (_, s), a in zip(live, answers, strict=True)]
                self._tell([j for j, _ in live], told)
        except Exception as e:  # the askers' to know, this thread goes on
            _fail(jobs, e)
        finally:
            self._done(jobs)

    def _explain_next(self) -> None:
        with self._turn:
            job = self._whys.popleft()
        seen = job.seen
        try:
            if seen is None or job.future.cancelled():
                return
            began = time.perf_counter()
            (answer,) = self.model.answer([seen])
            label = job.label or answer.foremost
            heat = self.model.why(seen, label, before=lambda: self._between(job))
            self._timed("explain", 1, time.perf_counter() - began)
            self._tell([job], [Told(seen, answer, label, heat)])
        except Abandoned:
            return
        except Exception as e:  # the asker's to know, this thread goes on
            _fail([job], e)
        finally:
            self._done([job])

    def _between(self, job: _Job) -> None:
        """Called before each batch of a map: who waits for an answer alone waits for no map."""
        with self._interlude:
            if job.future.cancelled():
                raise Abandoned
            self._since = time.monotonic()
            self._answer_waiting()

    def _tell(self, jobs: list[_Job], told: list[Told]) -> None:
        self._record(told)
        for job, one in zip(jobs, told, strict=True):
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(one)

    def _done(self, jobs: Sequence[_Job]) -> None:
        with self._turn:
            self.held -= len(jobs)
            self._maps -= sum(job.why for job in jobs)


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
