"""The queue before the model: batches, order, bounds, and what happens to those who left."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from serving import wait

from edgekd.records import EdgeKDError
from edgekd.serve.inference_queue import Full, Unreadable, Work
from edgekd.serve.model import Answer, Seen


class Model:
    """Answers when it may; notes what it is asked."""

    def __init__(self):
        self.artifact = SimpleNamespace(spec=SimpleNamespace(size=(4, 4)))
        self.may, self.at_it = threading.Event(), threading.Event()
        self.may.set()
        self.asked = []

    def see(self, data):
        if data == b"torn":
            raise EdgeKDError("image: torn")
        if data == b"bug":
            raise ZeroDivisionError
        return Seen(data.decode(), np.zeros((4, 4, 3), np.uint8), time.perf_counter())

    def answer(self, seen):
        self.asked.append([s.sha256 for s in seen])
        self.at_it.set()
        assert self.may.wait(10)
        if any(s.sha256 == "nan" for s in seen):
            raise EdgeKDError("nan")
        p = {"a": 0.25, "b": 0.75}
        return [Answer(image=s.sha256, label="b", probabilities=p, abstained="", warnings=(), ms=1)
                for s in seen]  # fmt: skip

    def why(self, seen, label, before):
        for _ in range(6):
            before()
            self.asked.append([f"mask of {seen.sha256} {label}"])
            time.sleep(0.02)
        return np.ones((2, 2), np.float32)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def started(model):
    """(start a Work, what was recorded, what was timed)."""
    recorded, timed, made = [], [], []

    def start(limit=50, record=recorded.extend):
        made.append(Work(model, record, limit=limit, timed=lambda *x: timed.append(x)))
        return made[-1]

    yield start, recorded, timed
    model.may.set()
    for work in made:
        assert work.close(5)


def test_what_waits_is_asked_together(model, started):
    start, recorded, timed = started
    work = start()
    model.may.clear()
    first = work.ask(b"first")
    assert model.at_it.wait(5)
    rest = [work.ask(f"{i}".encode()) for i in range(11)]
    wait(lambda: work._decoding == 0)
    model.may.set()
    assert first.result(5).answer.image == "first"
    assert [f.result(5).answer.image for f in rest] == [str(i) for i in range(11)]
    assert [len(x) for x in model.asked] == [1, 8, 3]
    assert [r.answer.image for r in recorded] == ["first", *map(str, range(11))]
    assert [images for _, images, _ in timed] == [1, 8, 3]
    wait(lambda: work.held == 0)


def test_more_than_it_may_hold_is_refused(model, started):
    work = started[0](limit=3)
    model.may.clear()
    futures = [work.ask(b"x") for _ in range(3)]
    with pytest.raises(Full):
        work.ask(b"x")
    model.may.set()
    for f in futures:
        f.result(5)
    wait(lambda: work.held == 0)
    work.ask(b"x").result(5)


def test_maps_leave_room_for_answers(model, started):
    work = started[0](limit=8)
    model.may.clear()
    whys = [work.ask(b"x", why=True) for _ in range(2)]
    with pytest.raises(Full):
        work.ask(b"x", why=True)
    torn = work.ask(b"torn")
    futures = [work.ask(b"x") for _ in range(5)]
    model.may.set()
    for f in (*whys, *futures):
        f.result(5)
    assert torn.exception(5)
    wait(lambda: work.held == 0)
    for data in (b"torn", b"x", b"nan", b"bug") * 3:  # whatever became of them, they count no more
        work.ask(data, why=True).exception(5)
        wait(lambda: work.held == 0)


def test_what_is_not_decoded_yet_is_counted(model, started, monkeypatch):
    work = started[0]()
    may, see = threading.Event(), model.see
    monkeypatch.setattr(model, "see", lambda data: may.wait(10) and see(data))
    futures = [work.ask(x) for x in (b"12345", b"torn", b"123", b"bug")]
    assert work.bytes == 5 + 4 + 3 + 3
    futures[2].cancel()
    may.set()
    wait(lambda: work.held == 0)
    assert work.bytes == 0


def test_an_answer_waits_for_no_map(model, started):
    work = started[0]()
    why = work.ask(b"slow", why=True)
    wait(lambda: ["mask of slow b"] in model.asked)
    alone = work.ask(b"quick")
    assert alone.result(5).heat is None
    assert not why.done()
    told = why.result(5)
    assert (told.explained, told.answer.foremost) == ("b", "b")
    at = model.asked.index(["quick"])
    assert ["mask of slow b"] in model.asked[at:]


def test_a_map_is_made_however_many_ask_for_answers(model, started):
    work = started[0]()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            work.ask(b"x").result(5)

    askers = [threading.Thread(target=busy) for _ in range(3)]
    for t in askers:
        t.start()
    try:
        assert work.ask(b"why", why=True, label="a").result(5).explained == "a"
    finally:
        stop.set()
        for t in askers:
            t.join(5)


def test_who_left_is_not_answered_for(model, started):
    start, recorded, _ = started
    work = start()
    model.may.clear()
    work.ask(b"first")
    assert model.at_it.wait(5)
    left = work.ask(b"left")
    wait(lambda: work._decoding == 0)
    assert left.cancel()
    model.may.set()
    wait(lambda: work.held == 0)
    assert [r.answer.image for r in recorded] == ["first"]
    why = work.ask(b"map", why=True)
    wait(lambda: ["mask of map b"] in model.asked)
    assert why.cancel()
    wait(lambda: work.held == 0)
    assert model.asked.count(["mask of map b"]) < 6
    assert [r.answer.image for r in recorded] == ["first"]
    assert work.ask(b"on").result(5)


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"torn", Unreadable), (b"bug", ZeroDivisionError), (b"nan", EdgeKDError)],
)
def test_an_error_is_the_askers_and_the_next_is_answered(started, data, error):
    work = started[0]()
    for why in (False, True):
        with pytest.raises(error) as found:
            work.ask(data, why=why).result(5)
        assert str(found.value) == {b"torn": "torn", b"nan": "nan"}.get(data, "")
    assert work.ask(b"fine").result(5).answer.label == "b"
    wait(lambda: work.held == 0)


def test_what_cannot_be_recorded_is_not_told(started):
    def full(told):
        raise EdgeKDError("disk full")

    work = started[0](record=full)
    for why in (False, True):
        with pytest.raises(EdgeKDError, match="disk full"):
            work.ask(b"x", why=why).result(5)


def test_a_pulse_is_an_answer(model, started):
    start, recorded, _ = started
    work = start()
    work.pulse().result(5)
    assert (model.asked, recorded) == ([[""]], [])
    model.may.clear()
    work.ask(b"x")
    wait(lambda: work.busy_s() > 0.05)
    pulse = work.pulse()
    time.sleep(0.05)
    assert not pulse.done()
    model.may.set()
    pulse.result(5)
    wait(lambda: work.busy_s() == 0)


def test_what_is_accepted_as_it_closes_is_answered(started, monkeypatch):
    """The decoders' ends come behind it, however the threads take turns."""
    work = started[0]()
    put, waits, closed = work._raw.put, threading.Event(), []

    def slowly(job):
        if job is not None:
            waits.set()
            time.sleep(0.2)
        put(job)

    monkeypatch.setattr(work, "_raw", SimpleNamespace(put=slowly, get=work._raw.get))
    closer = threading.Thread(target=lambda: waits.wait(5) and closed.append(work.close(5)))
    closer.start()
    future = work.ask(b"x")
    closer.join(10)
    assert closed == [True]
    assert future.result(0)


def test_closing_answers_what_was_accepted_and_takes_no_more(model, started):
    work = started[0]()
    model.may.clear()
    futures = [work.ask(f"{i}".encode()) for i in range(5)]
    assert not work.close(0.1)
    with pytest.raises(Full):
        work.ask(b"late")
    model.may.set()
    assert work.close(5)
    assert all(f.result(0) for f in futures)
