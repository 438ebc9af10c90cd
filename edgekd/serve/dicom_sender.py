"""Results on their way to another DICOM node: kept in memory, tried again until they are there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pydicom.dataset import Dataset
from pynetdicom import AE, build_context
from pynetdicom.association import Association

from edgekd.serve.dicom_peers import Dicom

KEEP_S = 3600.0  # that results are tried for; then the audit log says that they are lost
REFUSALS = 5  # by a node that was reached, of the same results: then likewise
BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # between tries, the last one from then on
HURRY_S = 0.5  # the same, once a stop was asked for


@dataclass
class Delivery:
    """The results of one image."""

    image: str  # sha256
    left: list[Dataset]  # that the node does not have yet
    since: float = field(default_factory=time.monotonic)
    refusals: int = 0
    why: str = ""  # it is not there yet


class Sender:
    """A thread that sends results on, and the bounded room where they wait for it."""

    def __init__(self, settings: Dicom, told: Callable[[Delivery, bool], None], *, limit: int,
                 patience_s: float) -> None:  # fmt: skip
        """Told: called with each delivery that ended, and whether it is there. limit: of images."""
        self.to, self.limit = settings.to, limit
        self._told = told
        self._ae = AE(settings.aet)
        self._ae.acse_timeout = self._ae.dimse_timeout = patience_s
        self._ae.network_timeout = self._ae.connection_timeout = patience_s
        self._turn = threading.Condition()
        self._waiting: deque[Delivery] = deque()
        self._promised = 0  # places of images that are being answered
        self._until: float | None = None  # when a stop ends all; None: nobody wants one
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Images whose results are not there yet."""
        return len(self._waiting)

    @property
    def promised(self) -> int:
        """Images whose results are being made."""
        return self._promised

    def promise(self) -> bool:
        """Keep a place for the results of an image; False: there is none."""
        with self._turn:
            free = self._until is None and len(self._waiting) + self._promised < self.limit
            self._promised += free
            return free

    def take_back(self) -> None:
        """A place that was kept is not needed."""
        with self._turn:
            self._promised -= 1

    def put(self, image: str, results: list[Dataset]) -> None:
        """Send these, in the place that was kept for them."""
        with self._turn:
            self._promised -= 1
            self._waiting.append(Delivery(image, results))
            self._turn.notify()

    def close(self, seconds: float) -> int:
        """How many images' results were not delivered within so long; `told` has been told."""
        with self._turn:
            self._until = time.monotonic() + seconds
            self._turn.notify()
        self._thread.join(max(0.0, seconds))
        with self._turn:
            lost = list(self._waiting)
            self._waiting.clear()
        for one in lost:
            one.why = one.why or "the server stopped"
            self._told(one, False)
        return len(lost)

    def _run(self) -> None:
        tries = 0  # in vain, one after the other
        while True:
            with self._turn:
                while not self._waiting:
                    if self._until is not None:
                        return
                    self._turn.wait()
                one = self._waiting[0]
            reached = self._send(one)
            self._settle(one)
            tries = 0 if reached and not one.left else tries + 1
            if tries and not self._rest(BACK_OFF_S[min(tries, len(BACK_OFF_S)) - 1]):
                return

    def _rest(self, seconds: float) -> bool:
        """Wait before the next try; False: there will be none, as a stop allows no more time."""
        end = time.monotonic() + seconds
        with self._turn:
            while (left := end - time.monotonic()) > 0:
                if self._until is not None:
                    if time.monotonic() >= self._until:
                        return False
                    left = min(left, HURRY_S)
                    end = min(end, time.monotonic() + left)
                self._turn.wait(left)
        return True

    def _settle(self, one: Delivery) -> None:
        """A delivery ends, or goes behind the others if it was refused."""
        late = time.monotonic() - one.since > KEEP_S
        over = not one.left or late or one.refusals >= REFUSALS
        with self._turn:
            if not self._waiting or self._waiting[0] is not one:
                return  # a stop took it
            self._waiting.popleft()
            if not over:
                (self._waiting.append if one.refusals else self._waiting.appendleft)(one)
        if over:
            self._told(one, not one.left)

    def _send(self, one: Delivery) -> bool:
        """Whether the node could be asked; what it took is no longer left."""
        kinds = [build_context(r.SOPClassUID, r.file_meta.TransferSyntaxUID) for r in one.left]
        try:
            assoc = self._ae.associate(self.to.host, self.to.port, kinds, ae_title=self.to.aet)
        except (OSError, RuntimeError):  # no such host; no thread
            one.why = "the node cannot be reached"
            return False
        if not assoc.is_established:
            one.why = "the node refuses us" if assoc.is_rejected else "the node cannot be reached"
            return False
        try:
            for result in list(one.left):
                self._store(assoc, one, result)
        finally:
            if assoc.is_established:
                assoc.release()
        one.refusals += bool(one.left)
        return True

    def _store(self, assoc: Association, one: Delivery, result: Dataset) -> None:
        try:
            answer = assoc.send_c_store(result)
        except (ValueError, RuntimeError, AttributeError):  # no such context; the link is gone
            one.why = "the node does not take this kind of object, or left"
            return
        status = answer.get("Status")
        if status == 0x0000 or (status is not None and status >> 12 == 0xB):  # warnings: it is kept
            one.left.remove(result)
        else:
            one.why = "no answer" if status is None else f"the node answers 0x{status:04X}"
