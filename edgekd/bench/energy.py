"""Joules an image, from the counters that the machine itself offers; none is estimated.

INA3221, the power monitor of an NVIDIA Jetson, sees the whole module. NVML tells of an NVIDIA GPU
(Volta and later): of that card alone, not of its host. RAPL tells of an Intel or AMD processor: of
its packages, with the graphics and the NPU in them, without memory and the rest of the board.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from edgekd.records import Energy, RuntimeUnavailable
from edgekd.runtimes.machine import read

PERIOD_S = 0.05  # between two looks at a power rail
IDLE_S = 1.0  # how long idle power is measured; NVML's counter moves every 0.1 s
INPUTS = ("VDD_IN", "POM_5V_IN")  # a Jetson's rail that feeds all others
FED = ("VDDQ_VDD2_1V8AO",)  # by VIN_SYS_5V0 (AGX Orin, which has no input rail): counted there


class Meter(Protocol):
    """Counts energy while it is open."""

    @property
    def source(self) -> str:
        """Of what: "RAPL package-0", "INA3221 VDD_IN", "NVML"."""

    def joules(self) -> float:
        """Until now; only the difference of two readings means something."""

    def close(self) -> None:
        """Stop counting."""


def meter(device: str, root: Path = Path("/")) -> Meter | None:
    """The meter that sees `device` (as a profile names it) work; None if this machine has none.

    RuntimeUnavailable: it has one, and it cannot be read; the message says what to do. Close it.
    """
    if rails := _rails(root):
        return Ina3221(rails)
    if device.lower().startswith(("cuda", "tensorrt")):  # RAPL knows nothing of a card
        return Nvml()
    if zones := _zones(root):
        return Rapl(zones)
    return None


def per_image(counted: Meter, call: Callable[[], object], seconds: float) -> Energy:
    """Energy of `call`, which answers one image, called back to back for `seconds`.

    joules: all that the source counts, divided by the images: what the machine takes when idle is
    in it, and idle_watts, measured before, says how much that is. RuntimeUnavailable if the
    counter stands still.
    """
    call()  # what only the first does
    before, began = counted.joules(), time.perf_counter()
    time.sleep(IDLE_S)
    idle = (counted.joules() - before) / (time.perf_counter() - began)
    images = 0
    before, began = counted.joules(), time.perf_counter()
    while not images or time.perf_counter() - began < seconds:
        call()
        images += 1
    joules = counted.joules() - before
    if joules <= 0 or idle <= 0:
        raise RuntimeUnavailable(
            f"{counted.source} did not move in {seconds:g} s: a virtual machine may show a counter "
            "that its host does not fill; measure on the device itself, or for longer"
        )
    return Energy(source=counted.source, joules=joules / images, idle_watts=idle)


class _Zone(NamedTuple):
    """A counter of the powercap framework."""

    name: str  # "package-0"
    counter: Path  # microjoules
    wraps_uj: int  # the counter starts again at 0 after so many


def _zones(root: Path) -> list[_Zone]:
    """The processor's packages."""
    # Not "psys", which holds them, nor what they hold ("core", "uncore"), nor intel-rapl-mmio,
    # which is the same once more.
    found = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = (folder / "name").read_text().strip()
        if name.startswith("package"):
            wraps = int((folder / "max_energy_range_uj").read_text())
            found.append(_Zone(name, folder / "energy_uj", wraps))
    return found


class Rapl:
    """Sums the packages' counters; ask it more often than one wraps around (minutes to hours)."""

    def __init__(self, zones: list[_Zone]) -> None:
        self.source = "RAPL " + " + ".join(z.name for z in zones)
        self._zones = zones
        self._last = [self._read(z) for z in zones]
        self._total_uj = 0

    def joules(self) -> float:
        """Of all packages."""
        now = [self._read(z) for z in self._zones]
        for zone, before, after in zip(self._zones, self._last, now, strict=True):
            self._total_uj += (after - before) % zone.wraps_uj
        self._last = now
        return self._total_uj / 1e6

    def close(self) -> None:
        """Nothing is open."""

    @staticmethod
    def _read(zone: _Zone) -> int:
        try:
            return int(zone.counter.read_text())
        except PermissionError:
            # Linux 5.10: who reads it finely enough reads another's keys (CVE-2020-8694).
            raise RuntimeUnavailable(
                f"only root may read {zone.counter}: sudo chmod a+r {zone.counter} until the next "
                "start, or measure as root"
            ) from None


class _Rail(NamedTuple):
    """A channel of a power monitor."""

    label: str  # "VDD_IN"
    voltage: Path  # mV
    current: Path  # mA

    def watts(self) -> float:
        """Now."""
        try:
            return int(self.voltage.read_text()) * int(self.current.read_text()) / 1e6
        except OSError as e:
            raise RuntimeUnavailable(f"power of {self.label} cannot be read: {e}") from e


def _rails(root: Path) -> list[_Rail]:
    """The rail that feeds the module, or else all that together do."""
    rails = []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if read(chip / "name").strip() != "ina3221":
            continue
        for n in (1, 2, 3):  # what else it has are voltages over the shunts, and sums
            label = read(chip / f"in{n}_label").strip()
            wired = label not in ("", "NC") and read(chip / f"in{n}_enable").strip() != "0"
            if wired:
                rails.append(_Rail(label, chip / f"in{n}_input", chip / f"curr{n}_input"))
    inputs = [r for r in rails if r.label in INPUTS]
    return inputs or [r for r in rails if r.label not in FED]


class Ina3221:
    """Adds up a Jetson's power, which a thread looks at every PERIOD_S seconds."""

    def __init__(self, rails: list[_Rail]) -> None:
        self.source = "INA3221 " + " + ".join(r.label for r in rails)
        self._rails = rails
        self._joules = 0.0
        self._watts, self._at = self._power(), time.perf_counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Of the rails, with the power between two looks on the line between them."""
        with self._lock:
            watts, at = self._power(), time.perf_counter()
            self._joules += (self._watts + watts) / 2 * (at - self._at)
            self._watts, self._at = watts, at
            return self._joules

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _power(self) -> float:
        return sum(rail.watts() for rail in self._rails)

    def _look(self) -> None:
        while not self._closed.wait(PERIOD_S):
            # The bus may be taken for a moment; who asks for joules is told if it stays so.
            with suppress(RuntimeUnavailable):
                self.joules()


class Nvml:
    """The counter of the only NVIDIA GPU."""

    source = "NVML"

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise RuntimeUnavailable(
                "the energy of a GPU needs pynvml: pip install nvidia-ml-py"
            ) from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            gpus = pynvml.nvmlDeviceGetCount()
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as e:
            raise RuntimeUnavailable(f"NVML does not open the GPU: {e}") from e
        if gpus != 1:  # its order is the bus's, CUDA's is by speed or as the environment says
            raise RuntimeUnavailable(
                f"NVML sees {gpus} GPUs and does not tell which of them is the profile's device"
            )
        self.joules()  # a GPU before Volta has no counter

    def joules(self) -> float:
        """Of the card."""
        try:
            millijoules: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        except self._nvml.NVMLError as e:
            raise RuntimeUnavailable(f"the GPU does not tell its energy: {e}") from e
        return millijoules / 1e3

    def close(self) -> None:
        """Let go of the driver."""
        self._nvml.nvmlShutdown()
