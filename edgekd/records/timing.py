"""What the stopwatch read of one artifact, and the machine that it was read on."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgekd.records.measured import Conditions, Energy, Layer, Roofline
from edgekd.records.profile import Budget
from edgekd.records.scores import Metric
from edgekd.records.store import Record, Stored


class Machine(Record):
    """Where something was measured."""

    name: str  # short, fit for a file name; no host name
    cpu: str
    cores: int
    memory_gb: float
    system: str
    python: str
    load_1min: float | None = None
    clock_mhz: float | None = None
    gpu: str = ""
    isa: tuple[str, ...] = ()  # what of vector and matrix instructions it has, weakest first

    @property
    def kind(self) -> tuple[str, tuple[str, ...], int, str]:
        """Times are compared between machines of one kind only."""
        return self.cpu, self.isa, self.cores, self.gpu

    def __str__(self) -> str:
        parts = (
            self.cpu, f"{self.cores} cores", " ".join(self.isa), f"{self.memory_gb:g} GB",
            self.system, f"Python {self.python}", f"GPU {self.gpu}" if self.gpu else "",
        )  # fmt: skip
        return ", ".join(filter(None, parts))


class Timing(Stored):
    """One stopwatch's reading of one artifact. Samples are stored; summaries are computed."""

    FILE: ClassVar[str] = "timing.json"
    model: str
    role: Literal["teacher", "student"]
    precision: str
    artifact_sha256: str
    runtime: str
    device: str
    threads: int  # asked for; 0: the runtime chooses
    cores_busy: float | None = None  # CPU seconds in a second of timed calls: what it chose
    batch: int = 1
    samples_ms: tuple[float, ...]
    block_medians_ms: tuple[float, ...] = ()  # of the turns the samples were taken in, in order
    warmup: int  # untimed calls before each turn, and before the first until they were steady
    attempts: int = 1  # an older edgekd's: runs of all turns; one since, which ends when it knows
    within: float | None = None  # percent that the ratio was to be known within; None: not asked
    width: float | None = None  # percent that its 95 % interval is wide, to the first file turn by
    # turn; of a file alone, of its own median; None: it is the first, or nothing was asked
    ended: Literal["", "narrow", "cap"] = ""  # why the turns did: all as narrow as asked, or time
    stable: bool = True  # narrow as asked; where nothing was asked: its blocks agree within 10 %
    noise: tuple[str, ...] = ()  # what makes these figures doubtful, in words
    conditions: Conditions = Conditions()
    load_ms: float  # open the file to a session that can answer
    first_ms: float | None = None  # its first call
    cold_ms: tuple[float, ...] = ()  # process start to first answer, image file included
    idle_ms: dict[str, tuple[float, ...]] = {}  # seconds of think time ("0.5") -> calls after it
    prepare_ms: tuple[float, ...] = ()  # an image file's bytes to what the model is shown
    explain_ms: tuple[float, ...] = ()  # a Score-CAM map of one image
    whole_ms: tuple[float, ...] = ()  # an image file's bytes to a calibrated answer
    throughput_ips: float | None = None  # images per second at throughput_batch; None: not asked
    throughput_batch: int | None = None
    throughput_hint: str = "latency"  # of the session: "throughput" asks in streams
    params: int
    macs: int
    size_bytes: int
    peak_mb: float  # 1e6 bytes, peak resident memory of the fresh process that measured
    resident_mb: float | None = None  # the same at rest, with the file loaded and asked once
    energy: Energy | None = None  # None: this machine does not tell
    yardstick_ms: tuple[float, ...] = ()  # of each turn, a fixed piece of work: the machine's pace
    yardstick_threads: int | None = None  # that did it; None: an older edgekd's, of one core
    yardstick: int | None = (
        None  # which piece of work: bench.stopwatch.YARDSTICK; None: an older one
    )
    executed: str = ""  # precision that most of the time was spent in, told by the runtime
    layers: tuple[Layer, ...] = ()  # the slowest; empty: not asked, or the runtime does not tell
    roofline: Roofline | None = None
    absent: dict[str, str] = {}  # what could not be measured -> why
    accuracy: Metric | None = None  # balanced, on the test split, of the file as it is
    machine: Machine
    versions: dict[str, str] = {}
    on_device: bool  # this machine and runtime are the profile's
    budget: Budget = Budget()
    over_budget: dict[str, tuple[float, float]] = {}  # limit -> (measured, allowed)
