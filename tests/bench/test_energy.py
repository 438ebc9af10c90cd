import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekd.bench import energy
from edgekd.records import Energy, RuntimeUnavailable


@pytest.fixture
def clock(monkeypatch):
    """A stopwatch that moves only when told, and by sleeping, in seconds; no thread looks."""
    now = [100.0]

    def sleep(seconds):
        now[0] += seconds

    fake = SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(energy, "time", fake)
    monkeypatch.setattr(energy, "PERIOD_S", 1000.0)
    return now


def zone(tree, number, name, uj, wraps=1_000_000):
    at = f"sys/class/powercap/intel-rapl:{number}"
    tree(f"{at}/name", name)
    tree(f"{at}/energy_uj", uj)
    tree(f"{at}/max_energy_range_uj", wraps)


def channel(tree, chip, n, label, mv, ma):
    at = f"sys/class/hwmon/hwmon{chip}"
    tree(f"{at}/name", "ina3221")
    tree(f"{at}/in{n}_label", label)
    tree(f"{at}/in{n}_input", mv)
    tree(f"{at}/curr{n}_input", ma)


@pytest.mark.parametrize("device", ["CPU", "GPU", "NPU"])
def test_a_machine_without_a_meter(tree, device):
    tree("sys/class/hwmon/hwmon0/name", "coretemp")
    zone(tree, "1", "psys", 5)
    assert energy.meter(device, tree.root) is None


def test_rapl_sums_packages_and_wraps_around(tree):
    zone(tree, "0", "package-0", 900_000)
    zone(tree, "0:0", "core", 1)
    zone(tree, "1", "package-1", 100_000)
    zone(tree, "2", "psys", 1)
    meter = energy.meter("CPU", tree.root)
    assert meter.source == "RAPL package-0 + package-1"
    assert meter.joules() == 0
    for number, name in (("0:0", "core"), ("2", "psys")):
        zone(tree, number, name, 999_999)
    zone(tree, "0", "package-0", 950_000)
    zone(tree, "1", "package-1", 300_000)
    assert meter.joules() == pytest.approx(0.05 + 0.2)
    zone(tree, "0", "package-0", 150_000)  # 50 000 up to the end, then 150 000
    assert meter.joules() == pytest.approx(0.25 + 0.2)
    meter.close()


def test_rapl_that_only_root_may_read(tree, monkeypatch):
    zone(tree, "0", "package-0", 1)
    read_text = Path.read_text

    def guarded(path, *given, **more):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *given, **more)

    monkeypatch.setattr(Path, "read_text", guarded)
    with pytest.raises(RuntimeUnavailable, match=r"only root may read .*: sudo chmod a\+r .*_uj"):
        energy.meter("CPU", tree.root)


@pytest.mark.parametrize("device", ["cuda:0", "CUDA", "Tensorrt"])  # TensorRT, ONNX Runtime
def test_a_card_is_not_what_rapl_counts(tree, monkeypatch, device):
    zone(tree, "0", "package-0", 1)
    monkeypatch.setattr(energy, "Nvml", lambda: "the card's")
    assert energy.meter(device, tree.root) == "the card's"


def test_a_jetson_has_one_rail_that_feeds_all(tree, clock):
    channel(tree, 1, 1, "VDD_IN", 5000, 2000)  # 10 W
    channel(tree, 1, 2, "VDD_CPU_GPU_CV", 5000, 1000)
    meter = energy.meter("cuda:0", tree.root)
    assert meter.source == "INA3221 VDD_IN"
    clock[0] += 2
    channel(tree, 1, 1, "VDD_IN", 5000, 4000)  # 20 W
    assert meter.joules() == pytest.approx(2 * (10 + 20) / 2)
    clock[0] += 0.5
    assert meter.joules() == pytest.approx(30 + 0.5 * 20)
    meter.close()


def test_a_jetson_without_such_a_rail(tree, clock):
    """AGX Orin: the memory's rail hangs on the system's; channels without a label, or off."""
    channel(tree, 3, 1, "VDD_GPU_SOC", 20_000, 100)  # 2 W
    channel(tree, 3, 2, "VDD_CPU_CV", 20_000, 50)  # 1 W
    channel(tree, 3, 3, "VIN_SYS_5V0", 5000, 800)  # 4 W
    channel(tree, 4, 1, "NC", 5000, 9000)
    channel(tree, 4, 2, "VDDQ_VDD2_1V8AO", 5000, 200)
    channel(tree, 4, 3, "VDD_OFF", 5000, 9000)
    tree("sys/class/hwmon/hwmon4/in3_enable", 0)
    tree("sys/class/hwmon/hwmon4/in7_label", "sum of shunt voltages")
    meter = energy.meter("CPU", tree.root)
    assert meter.source == "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    clock[0] += 3
    assert meter.joules() == pytest.approx(3 * 7)
    meter.close()


def test_a_rail_is_looked_at_all_the_time(tree, monkeypatch):
    monkeypatch.setattr(energy, "PERIOD_S", 0.002)
    channel(tree, 1, 1, "VDD_IN", 5000, 2000)
    looks = []
    watts = energy._Rail.watts
    monkeypatch.setattr(energy._Rail, "watts", lambda r: looks.append(r.label) or watts(r))
    began = time.perf_counter()
    meter = energy.meter("cuda:0", tree.root)
    while len(looks) < 5 and time.perf_counter() - began < 10:
        time.sleep(0.01)
    took = time.perf_counter() - began
    assert 0 < meter.joules() <= 10 * (took + 1)
    meter.close()
    seen = len(looks)
    assert seen >= 5
    time.sleep(0.05)
    assert len(looks) == seen


def test_a_rail_that_breaks(tree, clock):
    channel(tree, 1, 1, "VDD_IN", 5000, 2000)
    meter = energy.meter("cuda:0", tree.root)
    (tree.root / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    with pytest.raises(RuntimeUnavailable, match=r"power of VDD_IN cannot be read: .*curr1_input"):
        meter.joules()
    meter.close()


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A made-up pynvml with one GPU that has taken 5 J."""
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        mj=5000,
        gpus=1,
        shut=[],
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: fake.gpus,
        nvmlDeviceGetHandleByIndex=lambda i: f"gpu {i}",
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: {"gpu 0": fake.mj}[gpu],
        nvmlShutdown=lambda: fake.shut.append(True),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_nvml(tree, nvml):
    zone(tree, "0", "package-0", 1)  # knows nothing of the card
    meter = energy.meter("cuda:0", tree.root)
    before = meter.joules()
    nvml.mj += 1250
    assert (meter.source, meter.joules() - before) == ("NVML", 1.25)
    meter.close()
    assert nvml.shut == [True]


def fails(*_):
    raise NVMLError("Not Supported")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nvmlInit": fails}, "NVML does not open the GPU: Not Supported"),
        ({"nvmlDeviceGetTotalEnergyConsumption": fails}, "not tell its energy: Not Supported"),
        ({"gpus": 2}, "NVML sees 2 GPUs"),
    ],
)
def test_nvml_that_does_not_tell(tree, nvml, change, words):
    vars(nvml).update(change)
    with pytest.raises(RuntimeUnavailable, match=words):
        energy.meter("cuda:0", tree.root)


def test_a_gpu_without_pynvml(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(RuntimeUnavailable, match="pip install nvidia-ml-py"):
        energy.meter("cuda:0", tree.root)


class Made:
    """A meter of 3 W, and 2 J more a call."""

    source = "made up"

    def __init__(self, clock):
        self.clock, self.calls, self.watts, self.each = clock, 0, 3.0, 2.0

    def call(self):
        self.calls += 1
        self.clock[0] += 0.25

    def joules(self):
        return self.watts * self.clock[0] + self.each * self.calls

    def close(self):
        pass


def test_energy_per_image(clock):
    """Of the call and of the 3 W that the machine takes anyhow, for the quarter second it lasts."""
    made = Made(clock)
    found = energy.per_image(made, made.call, seconds=2)
    assert found == Energy(source="made up", joules=2 + 3 * 0.25, idle_watts=3)
    assert made.calls == 1 + 8


def test_a_call_longer_than_the_time_is_measured_once(clock):
    made = Made(clock)
    assert energy.per_image(made, made.call, seconds=0.1).joules == pytest.approx(2.75)


def test_a_counter_that_stands_still(clock):
    made = Made(clock)
    made.watts = made.each = 0.0
    with pytest.raises(RuntimeUnavailable, match="made up did not move in 2 s"):
        energy.per_image(made, made.call, seconds=2)


def test_this_machine_is_asked():
    """Whatever it answers: a meter that counts, none, or why it may not be read."""
    try:
        meter = energy.meter("CPU")
    except RuntimeUnavailable as e:
        assert "sudo chmod" in str(e)  # noqa: PT017 either is right
        return
    if meter is not None:
        assert meter.joules() >= 0
        meter.close()
