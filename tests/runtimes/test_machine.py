import socket
import subprocess
import sys

import numpy as np
import pytest

from edgekd.runtimes import machine


def test_machine():
    m = machine.this()
    assert m.cores >= 1
    assert m.memory_gb > 0.1
    assert m.python == sys.version.split()[0]
    host = socket.gethostname()
    assert host not in m.model_dump_json()


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("AMD EPYC", "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "intel-xeon-platinum-8375c-2c"),
        ("13th Gen Intel(R) Core(TM) i7-1365U", "intel-core-i7-1365u-2c"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "nvidia-jetson-orin-nano-2c"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "amd-ryzen-7-7840u-2c"),
        ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13-2c"),
        ("", "unknown-2c"),
    ],
)
def test_machine_name_fits_a_file_name(monkeypatch, cpu, name):
    monkeypatch.setattr(machine, "_cpu_model", lambda: cpu)
    monkeypatch.setattr(machine, "instructions", lambda: ())
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert machine.this().name == name


def test_a_name_tells_processors_of_one_brand_apart(monkeypatch):
    monkeypatch.setattr(machine, "_cpu_model", lambda: "AMD EPYC")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0}, raising=False)
    kinds = {}
    for isa in (("avx2",), ("avx2", "avx512f", "avx512_vnni")):
        monkeypatch.setattr(machine, "instructions", lambda isa=isa: isa)
        here = machine.this()
        kinds[here.name] = here.kind
        assert ", ".join(["AMD EPYC", "1 cores", " ".join(isa)]) in str(here)
    assert list(kinds) == ["amd-epyc-avx2-1c", "amd-epyc-avx512-vnni-1c"]
    assert len(set(kinds.values())) == 2


@pytest.mark.parametrize(
    ("told", "isa"),
    [
        ("flags\t\t: fpu avx f16c avx2 avx512f amx_tile avx512_vnni\n",
         ("avx2", "avx512f", "avx512_vnni")),
        ("Features\t: fp asimd asimddp bf16 i8mm\n", ("asimd", "asimddp", "i8mm", "bf16")),
        ("processor\t: 0\n", ()),
    ],
)  # fmt: skip
def test_instructions(tmp_path, told, isa):
    write(tmp_path / "proc/cpuinfo", told)
    assert machine.instructions(tmp_path) == isa


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_not_the_parents():
    ballast = np.ones(40_000_000)  # 320 MB
    code = (
        "from edgekd.runtimes.machine import peak_mb; import sys; sys.stdout.write(str(peak_mb()))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 5 < float(child.stdout) < 200 < ballast.nbytes / 1e6 < machine.peak_mb()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_comes_and_goes():
    before = machine.resident_mb()
    ballast = np.ones(40_000_000)  # 320 MB
    within = machine.resident_mb()
    assert ballast[-1] == 1
    del ballast
    assert within - before == pytest.approx(320, abs=20)
    assert machine.resident_mb() - before < 20
    assert machine.resident_mb() <= machine.peak_mb()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_clock_is_the_mean_of_the_cores(tmp_path):
    write(tmp_path / "proc/cpuinfo", "cpu MHz\t\t: 2000.5\nflags: x\ncpu MHz\t\t: 3000.5\n")
    assert machine.clock_mhz(tmp_path) == 2500.5


def test_clock_of_a_board_that_tells_it_elsewhere(tmp_path):
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\n")
    for core, khz in enumerate((1_500_000, 1_000_000)):
        at = f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"
        write(tmp_path / at, f"{khz}\n")
    assert machine.clock_mhz(tmp_path) == 1250


def test_no_clock_is_told(tmp_path):
    assert machine.clock_mhz(tmp_path) is None
