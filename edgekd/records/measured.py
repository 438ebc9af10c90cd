"""What a stopwatch reads beside the time of a call, as records: parts of a Timing."""

from __future__ import annotations

from pydantic import Field

from edgekd.records.store import Record


class Conditions(Record):
    """The machine while something was measured; a value that it does not tell is absent."""

    load_1min: float | None = None  # before our own
    steal: float | None = Field(default=None, ge=0, le=1)  # of CPU time: the host gave it to others
    busy: float | None = Field(default=None, ge=0)  # CPUs' worth of others' work meanwhile
    governor: str = ""  # of the clock: "powersave", "performance"
    clock_mhz: tuple[float, ...] = ()  # mean of the cores, of each block
    temperature_c: tuple[float, ...] = ()  # of the hottest sensor, of each block
    throttled: int | None = None  # times that the processor was, meanwhile


class Energy(Record):
    """What answering took, of the whole device or package as `source` says."""

    source: str  # "RAPL package-0", "INA3221 VDD_IN", "NVML"
    joules: float  # an image, at batch 1, back to back
    idle_watts: float  # with the file loaded and nothing asked


class Layer(Record):
    """One node of the graph as the runtime executed it, at batch 1."""

    name: str
    kind: str  # in the runtime's own words: "Convolution", "Conv", "Eltwise"
    precision: str  # that it really ran in: "int8", "bf16", "fp32"; empty: not told
    ms: float  # mean of the calls that were profiled
    share: float = Field(ge=0, le=1)  # of the time of all
    macs: int | None = None  # None: not told by the graph
    fraction: float | None = None  # of its roofline


class Peak(Record):
    """What this machine reached when it was asked for nothing else, in the same run."""

    gflops: dict[str, float]  # precision -> 1e9 operations/s of a matrix product; 1 MAC = 2
    bandwidth_gbs: float  # 1e9 bytes/s: read and written
    threads: int
    how: str  # "openvino MatMul 1024 x 1024 x 1024"


class Roofline(Record):
    """How near a file comes to what the machine can do (Williams et al. 2009)."""

    peak: Peak
    precision: str  # whose peak is asked
    intensity: float  # operations a byte: of MACs, weights, input and output, each moved once
    ideal_ms: float  # at the peak or at full bandwidth, whichever takes longer
    bound: str  # "compute" or "memory": which of the two it is
    fraction: float  # ideal_ms / the median
