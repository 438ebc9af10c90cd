"""Progress where no terminal draws bars: plain lines, when a stage begins, each minute, at its end.

They are for a log that is read later, or meanwhile: `nohup`, Slurm, CI.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from edgekd.records import T, Track

SHORT_S = 1.0  # a stage that is over sooner is worth no line
EVERY_S = 60.0


@dataclass
class Stage:
    """What is in progress."""

    what: str
    total: float | None
    began: float  # seconds of the clock
    told: float | None = None  # when its last line was written
    done: float = 0
    unit: str = ""  # "images" where index arrays are counted

    def line(self, now: float) -> str:
        """How far it is, how fast, and how long it has still to go."""
        if self.told is None:
            to_do = f", {self.total:.0f}{self._of()} to do" if self.total else ""
            return f"{self.what}: begins{to_do}"
        parts = [f"{self.done:.0f}{self._of()} in {spent(now - self.began)}"]
        if self.total:
            share = 100 * self.done / self.total
            parts = [f"{self.done:.0f} of {self.total:.0f}{self._of()} ({share:.0f} %)"]
        if self.done:
            parts.append(self._rate(now))
        if self.done and self.total and self.done <= self.total:
            left = (self.total - self.done) * (now - self.began) / self.done
            parts.append(f"about {spent(left)} left")
        return f"{self.what}: {', '.join(parts)}"

    def last(self, now: float, *, whole: bool) -> str:
        """That it is over. whole: to its end, not stopped before."""
        of = f" of {self.total:.0f}" if self.total and not whole else ""
        parts = [f"{self.done:.0f}{of}{self._of()} in {spent(now - self.began)}"]
        if self.done:
            parts.append(self._rate(now))
        return f"{self.what}: {'done' if whole else 'ended'}, {', '.join(parts)}"

    def _of(self) -> str:
        return f" {self.unit}" if self.unit else ""

    def _rate(self, now: float) -> str:
        rate, per = self.done / (now - self.began), "s"
        if rate < 0.1:
            rate, per = 60 * rate, "min"
        return f"{rate:.{0 if rate >= 10 else 1}f}{self._of()}/{per}"


class Lines:
    """A Track that writes lines; `remind`, called now and then, writes those that are due."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.write, self.clock = write, clock
        self.stages: list[Stage] = []  # the outermost first
        self.lock = threading.Lock()
        self.closed = False

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """The same items, counted."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        plain = "".join(c if c.isprintable() else "?" for c in what)
        stage, whole = Stage(plain, total, self.clock()), False
        with self.lock:
            self.stages.append(stage)
        try:
            for item in items:
                if hasattr(item, "shape"):
                    stage.unit = "images"
                yield item
                stage.done += getattr(item, "size", 1)
            whole = True
        finally:
            self._end(stage, whole=whole)

    def remind(self) -> None:
        """A line for each stage that has begun, or has gone on for a minute since its last."""
        with self.lock:
            now = self.clock()
            for stage in self.stages:
                since = stage.began if stage.told is None else stage.told
                if now - since >= (SHORT_S if stage.told is None else EVERY_S):
                    self.write(stage.line(now))
                    stage.told = now

    def close(self) -> None:
        """Write nothing more: what is still open was stopped by an error, which is told."""
        with self.lock:
            self.closed = True
            self.stages.clear()

    def _end(self, stage: Stage, *, whole: bool) -> None:
        with self.lock:
            if self.closed:
                return
            self.stages.remove(stage)
            now = self.clock()
            if now - stage.began > EVERY_S:
                self.write(stage.last(now, whole=whole))


def spent(seconds: float) -> str:
    """'42 s', '5 min 20 s', '1 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


@contextlib.contextmanager
def lines(write: Callable[[str], None]) -> Iterator[Track]:
    """A Track whose lines `write` gets, from a thread of their own: one item may take minutes."""
    made, over = Lines(write), threading.Event()
    thread = threading.Thread(target=_remind, args=(made, over.wait), daemon=True)
    thread.start()
    try:
        yield made.track
    finally:
        over.set()
        thread.join()
        made.close()


def _remind(made: Lines, wait: Callable[[float], bool]) -> None:
    while not wait(SHORT_S):
        made.remind()
