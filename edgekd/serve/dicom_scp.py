"""A DICOM node: it answers C-ECHO, takes images by C-STORE, and sends results on to another.

A C-STORE is answered when the results are made and have their place among those that are sent on,
so that an image that was taken is lost only with the process: until then the sender keeps it.
"""

from __future__ import annotations

import functools
import io
import logging
import socket
import sys
import threading
import time
from concurrent import futures
from typing import Any

from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID
from pynetdicom import AE, _config, evt

from edgekd.data import dicom
from edgekd.records import EdgeKDError
from edgekd.serve import dicom_results
from edgekd.serve.api import BODIES, Bench
from edgekd.serve.audit import AuditFailed, now
from edgekd.serve.dicom_limits import PDU, Gate, Server
from edgekd.serve.dicom_peers import Dicom
from edgekd.serve.dicom_sender import Delivery, Sender
from edgekd.serve.inference_queue import Full, Told, Unreadable

ASSOCIATIONS = 8  # at a time
ACSE_S = 10.0  # for an association to be asked for
VERIFICATION = "1.2.840.10008.1.1"
_STORAGE = "1.2.840.10008.5.1.4.1.1."
IMAGES = tuple(_STORAGE + x for x in (
    "1", "1.1", "1.2", "1.3",  # computed and digital radiography, mammography, intra-oral
    "2", "4", "6.1", "7", "12.1", "12.2", "128",  # CT, MR, US, SC, angiography, fluoroscopy, PET
    "77.1.1", "77.1.2", "77.1.4", "77.1.5.1", "77.1.5.2",  # endoscopy, microscopy, photographs, eye
))  # fmt: skip
TAKEN, FULL, UNLIKE, UNREADABLE, FAILED = 0x0000, 0xA700, 0xA900, 0xC000, 0x0110
_WRITER = "2.25.248216397212870634514093426301962012173"  # that puts what arrives into a file


@functools.cache
def silence() -> None:
    """The packages are told not to speak: what they say quotes a patient's values."""
    dicom_results.silence()
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    _config.LOG_HANDLER_LEVEL = "none"


class Node:
    """An application entity that shares a server's work, audit log and meters."""

    def __init__(self, bench: Bench, settings: Dicom) -> None:
        """It is bound, and answers from `start` on; EdgeKDError if it cannot be bound."""
        silence()
        dicom_results.quieten()
        self.bench, self.settings = bench, settings
        self._gates: dict[int, Gate] = {}  # by the identity of their association
        self._turn = threading.Lock()
        patience_s = bench.settings.timeout_s
        ae = AE(settings.aet)
        ae.maximum_associations, ae.maximum_pdu_size = ASSOCIATIONS, PDU
        ae.require_called_aet, ae.require_calling_aet = True, list(settings.callers)
        # An answer may take `patience_s`, in which nothing comes in: only then it is idle.
        ae.acse_timeout, ae.dimse_timeout = ACSE_S, patience_s
        ae.network_timeout = 2 * patience_s
        syntaxes = dicom.syntaxes()
        for kind in IMAGES:
            ae.add_supported_context(kind, syntaxes)
        ae.add_supported_context(VERIFICATION)
        self._server = self._bound(ae)
        self._thread = threading.Thread(target=self._server.serve_forever, name="DICOM",
                                        kwargs={"poll_interval": 0.1}, daemon=True)  # fmt: skip
        self.sender = Sender(settings, self._delivered, limit=bench.settings.queue,
                             patience_s=patience_s)  # fmt: skip
        bench.meters.waiting(lambda: self.sender.held)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def shut(self) -> None:
        """Take no more associations."""
        if self._thread.is_alive():
            self._server.shutdown()
        else:
            self._server.server_close()

    def close(self, seconds: float) -> int:
        """Send on what waits; how many images' results could not be delivered in so long."""
        end = time.monotonic() + seconds
        while self._busy() and time.monotonic() < end:
            time.sleep(0.02)
        lost = self.sender.close(max(0.0, end - time.monotonic()))
        for assoc in self._server.active_associations:
            assoc.abort()
        return lost

    def _busy(self) -> bool:
        """Whether a C-STORE is under way; those that only begin are not waited for."""
        return self.sender.promised > 0

    def _bound(self, ae: AE) -> Server:
        host = self.bench.settings.host
        handlers: Any = [
            (evt.EVT_C_STORE, self._stored), (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_REJECTED, self._refused), (evt.EVT_PDU_SENT, self._sent),
            (evt.EVT_DIMSE_RECV, self._arrived), (evt.EVT_FSM_TRANSITION, self._moved),
        ]  # fmt: skip
        try:
            found = socket.getaddrinfo(host, self.settings.port, type=socket.SOCK_STREAM)[0]
            address: Any = found[4]
            made: Any = ae.make_server(address, evt_handlers=handlers, server_class=Server)
        except (OSError, OverflowError) as e:
            why = getattr(e, "strerror", None) or e
            raise EdgeKDError(
                f"cannot listen on {host} port {self.settings.port}: {why}; choose another --dicom"
            ) from None
        bound: Server = made
        return bound

    # ---- connections

    def _opened(self, event: Any) -> None:
        key = id(event.assoc)

        def ended() -> None:
            with self._turn:
                self._gates.pop(key, None)

        gate = Gate(event, most=self.bench.settings.max_bytes, room=self._room, ended=ended,
                    patience_s=self.bench.settings.timeout_s, broken=self._broken)  # fmt: skip
        with self._turn:
            self._gates[key] = gate

    def _sent(self, event: Any) -> None:
        self._gates[id(event.assoc)].answered()

    def _arrived(self, event: Any) -> None:
        self._gates[id(event.assoc)].arrived()

    def _moved(self, event: Any) -> None:
        if event.next_state == "Sta1":  # idle (PS3.8, 9.2): nobody is connected
            self._gates[id(event.assoc)].left()

    def _refused(self, _: Any) -> None:
        self.bench.meters.rejected.labels("dicom association").inc()

    def _broken(self) -> None:
        self.bench.meters.rejected.labels("dicom malformed").inc()

    def _room(self) -> bool:
        """Whether what all connections hold leaves room for more."""
        with self._turn:
            held = sum(gate.held for gate in self._gates.values())
        return held + self.bench.work.bytes <= BODIES * self.bench.settings.max_bytes

    # ---- images

    def _stored(self, event: Any) -> int:
        """The status of a C-STORE."""
        try:
            status = self._answered(event)
        except Exception as e:  # a bug; its message might quote a value, its name does not
            sys.stderr.write(f"a C-STORE failed: {type(e).__name__}\n")
            status = FAILED
        self.bench.meters.stored.labels(f"0x{status:04X}").inc()
        return status

    def _answered(self, event: Any) -> int:
        if not self.sender.promise():
            return FULL
        kept = False
        try:
            if event.request.DataSet is None:
                return UNREADABLE
            data = as_file(event)
            origin = dicom_results.source(data)
            request = event.request
            if (origin.keys["SOPInstanceUID"], origin.keys["SOPClassUID"]) != (
                request.AffectedSOPInstanceUID, request.AffectedSOPClassUID
            ):  # fmt: skip
                return UNLIKE
            told = self._told(self.bench.work.ask(data, why=True))
            made = dicom_results.made(origin, told, self.bench.model)
            self.sender.put(told.answer.image, made)
            kept = True
            return TAKEN
        except dicom_results.Unfit:
            return UNLIKE
        except Full:
            return FULL
        except (AuditFailed, Silent) as e:
            sys.stderr.write(f"{e}\n")
            return FAILED
        except EdgeKDError:
            return UNREADABLE
        finally:
            if not kept:
                self.sender.take_back()

    def _told(self, future: futures.Future[Told]) -> Told:
        """The answer within the time that one request has; Unreadable, AuditFailed or Silent."""
        seconds = self.bench.settings.timeout_s
        try:
            return future.result(seconds)
        except futures.TimeoutError:
            if not future.cancel() and not future.cancelled():
                return future.result()  # it has just come
            raise Silent(f"a C-STORE had no answer within {seconds:g} s") from None
        except (Unreadable, AuditFailed):
            raise
        except EdgeKDError as e:  # nan, or a runtime that gave up
            raise Silent(str(e)) from None

    # ---- results

    def _delivered(self, one: Delivery, arrived: bool) -> None:
        """Results are with the other node, or never will be: the audit log says so."""
        self.bench.meters.delivered.labels("sent" if arrived else "lost").inc()
        line: dict[str, Any] = {
            "time": now(), "event": "sent" if arrived else "not sent", "image": one.image,
            **self.bench.ran, "to": str(self.settings.to),
        }  # fmt: skip
        if not arrived:
            line["why"] = one.why
            sys.stderr.write(f"results of image {one.image} were not delivered: {one.why}\n")
        try:
            self.bench.audit.write([line])
        except AuditFailed as e:
            sys.stderr.write(f"{e}\n")


class Silent(EdgeKDError):
    """The model gives no answer."""


def as_file(event: Any) -> bytes:
    """What was stored, as a DICOM file: the same data set is the same bytes, whoever sent it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = event.request.AffectedSOPClassUID
    meta.MediaStorageSOPInstanceUID = event.request.AffectedSOPInstanceUID
    meta.TransferSyntaxUID = event.context.transfer_syntax
    meta.ImplementationClassUID = UID(_WRITER)
    meta.ImplementationVersionName = "EDGEKD"
    out = io.BytesIO()
    out.write(bytes(128) + b"DICM")
    write_file_meta_info(out, meta)  # type: ignore[arg-type]
    out.write(event.request.DataSet.getvalue())
    return out.getvalue()
