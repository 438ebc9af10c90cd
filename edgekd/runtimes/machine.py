"""The machine we run on, and the memory we take of it, as far as the system tells."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekd.records import Machine

# What stands in a processor's name and does not tell it from others; its clock and graphics end it.
NO_NAME = r"\((r|tm)\)|\b(cpu|processor|\d+-core|developer kit|\d+th gen)\b|@.*| w/ .*| with .*"

# Instructions that decide what INT8 and BF16 cost, weakest first. A processor's name does not tell
# them: clouds hide it, and hypervisors hide instructions.
ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "sve", "i8mm", "bf16",
)  # fmt: skip


def this() -> Machine:
    """The machine we run on, as far as it can be read; nothing that tells whose it is."""
    cpu = _cpu_model()
    words = re.findall(r"[a-z0-9.]+", re.sub(NO_NAME, " ", cpu.lower()))
    name = "-".join(words[:4]) or "unknown"
    isa = instructions()
    strongest = f"{isa[-1].replace('_', '-')}-" if isa else ""
    clock = clock_mhz()
    gpus = [field(p, "Model") for p in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return Machine(
        name=f"{name}-{strongest}{cores()}c",
        cpu=cpu,
        cores=cores(),
        memory_gb=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        load_1min=round(os.getloadavg()[0], 2),
        clock_mhz=None if clock is None else round(clock),
        gpu=", ".join(gpus),
        isa=isa,
    )


def cores() -> int:
    """CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_model() -> str:
    """The processor's name, or the board's where (on ARM) only that is told."""
    board = read(Path("/proc/device-tree/model")).strip("\0\n ")
    named = field(Path("/proc/cpuinfo"), "model name") or board
    return named or platform.processor() or platform.machine()


def instructions(root: Path = Path("/")) -> tuple[str, ...]:
    """What this processor has of `ISA`; nothing where it is not told."""
    cpu = root / "proc/cpuinfo"
    told = f"{field(cpu, 'flags')} {field(cpu, 'Features')}".split()  # the latter on ARM
    return tuple(i for i in ISA if i in told)


def overflows(isa: Sequence[str]) -> bool:
    """Whether a processor with these instructions adds INT8 products up in 16 bits.

    A pair of 8-bit products needs 17 (AVX2's and AVX-512's vpmaddubsw saturates); VNNI and AMX add
    in 32. A pair with 7-bit weights fits.
    """
    wide = any("vnni" in i or i == "amx_int8" for i in isa)
    return "avx2" in isa and not wide


def clock_mhz(root: Path = Path("/")) -> float | None:
    """Mean clock of the cores now, in MHz; None where it is not told."""
    told = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read(root / "proc/cpuinfo"), re.MULTILINE)
    clocks = [float(c) for c in told]
    if not clocks:  # ARM
        at = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        clocks = [int(khz) / 1e3 for p in at if (khz := read(p))]
    return sum(clocks) / len(clocks) if clocks else None


def peak_mb() -> float:
    """Peak resident memory of this process until now, in 1e6 bytes."""
    # Not ru_maxrss where it can be helped: Linux hands the parent's peak on to it through exec.
    peak = _status_mb("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def resident_mb() -> float | None:
    """Resident memory of this process now, in 1e6 bytes; None where only its peak is told."""
    return _status_mb("VmRSS")


def _status_mb(key: str) -> float | None:
    """A size of this process that Linux tells in kB of 1024 bytes, in 1e6 bytes."""
    told = field(Path("/proc/self/status"), key)  # "455384 kB"
    return int(told.split()[0]) * 1024 / 1e6 if told else None


def field(path: Path, key: str) -> str:
    """The value of the first line `key: value` of a file of the system; empty if there is none."""
    found = re.search(rf"^{key}\s*:\s*(.+?)\s*$", read(path), re.MULTILINE)
    return found[1] if found else ""


def read(path: Path) -> str:
    """A small file of the system; empty where this system has none."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
