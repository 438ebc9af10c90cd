import os
import re

import numpy as np
import pytest

from edgekd.bench import conditions
from edgekd.bench.conditions import Watch, noise
from edgekd.records import Conditions

QUIET = Conditions()
TICKS = os.sysconf("SC_CLK_TCK")  # 100 on every Linux


@pytest.fixture
def clock(monkeypatch):
    """A stopwatch that moves only when told, in seconds."""
    now = [100.0]
    monkeypatch.setattr(conditions.time, "perf_counter", lambda: now[0])
    return now


def stat(**ticks):
    """First lines of /proc/stat; what is not given is 0."""
    names = [
        "user",
        "nice",
        "system",
        "idle",
        "iowait",
        "irq",
        "softirq",
        "steal",
        "guest",
        "guest_nice",
    ]
    return f"cpu  {' '.join(str(ticks.get(n, 0)) for n in names)}\ncpu0 1 2 3"


def test_nothing_told_is_absent(tree):
    watch = Watch(tree.root)
    watch.tick()
    assert watch.end(1.0) == Conditions()


def test_a_sandbox_that_tells_only_zeros(tree):
    tree("proc/stat", stat())
    watch = Watch(tree.root)
    assert (watch.end(0.0).steal, watch.end(0.0).busy) == (None, None)


def test_cpu_time_by_hand(tree, clock):
    tree("proc/loadavg", "0.25 1.00 2.00 1/98 4711")
    tree("proc/stat", stat(user=1000, idle=5000, guest=900))
    watch = Watch(tree.root)
    clock[0] += 10
    # 9 s of user (6 of them a guest's), 1 of each of the other four; 80 idle, 1 waiting, 6 stolen
    s = TICKS
    after = stat(user=1000 + 9 * s, nice=s, system=s, irq=s, softirq=s, idle=5000 + 80 * s,
                 iowait=s, steal=6 * s, guest=900 + 6 * s)  # fmt: skip
    tree("proc/stat", after)
    found = watch.end(own_cpu_s=8.0)
    assert found.load_1min == 0.25
    assert found.steal == pytest.approx(6 / 100)
    assert found.busy == pytest.approx((13 - 8) / 10)


def test_our_own_work_is_not_less_than_none_of_others(tree, clock):
    tree("proc/stat", stat(user=1))
    watch = Watch(tree.root)
    clock[0] += 1
    tree("proc/stat", stat(user=1 + TICKS))
    assert watch.end(own_cpu_s=1.01).busy == 0


def test_clock_and_temperature_of_each_block(tree):
    watch = Watch(tree.root)
    for mhz, zone, chip in ((3000, 51000, 49500), (2400, 60000, 72500)):
        tree("proc/cpuinfo", f"cpu MHz\t\t: {mhz}.5")
        tree("sys/class/thermal/thermal_zone0/temp", zone)
        tree("sys/class/thermal/thermal_zone1/temp", -256000)  # asleep
        tree("sys/class/hwmon/hwmon0/temp1_input", chip)
        tree("sys/class/hwmon/hwmon0/temp2_input", 127000)  # not connected
        tree("sys/class/hwmon/hwmon0/temp3_input", "")
        watch.tick()
    found = watch.end(0.0)
    assert found.clock_mhz == (3000.5, 2400.5)
    assert found.temperature_c == (51, 72.5)


def test_governors(tree):
    for core, name in enumerate(("schedutil", "performance", "schedutil")):
        tree(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor", name)
    assert Watch(tree.root).end(0.0).governor == "performance, schedutil"


def test_throttling_is_counted_once(tree):
    """Two cores of a package, each of which counts for both."""
    at = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
    for core in (0, 1):
        tree(at.format(core, "core"), 5)
        tree(at.format(core, "package"), 9)
    watch = Watch(tree.root)
    assert watch.end(0.0).throttled == 0
    for core in (0, 1):
        tree(at.format(core, "core"), 7)
        tree(at.format(core, "package"), 12)
    assert watch.end(0.0).throttled == 3


def test_throttling_of_a_jetson(tree):
    tree("sys/class/hwmon/hwmon3/oc1_event_cnt", 0)
    tree("sys/class/hwmon/hwmon3/oc3_event_cnt", 40)
    watch = Watch(tree.root)
    tree("sys/class/hwmon/hwmon3/oc3_event_cnt", 44)
    assert watch.end(0.0).throttled == 4


def calls(n=200, **slow):
    """(n,) ms near 10; slow: `share` of them `times` as long."""
    ms = np.random.default_rng(0).normal(10, 0.2, n)
    if slow:
        ms[: round(slow["share"] * n)] *= slow["times"]
    return ms


STEADY = (10.0, 10.1, 9.9, 10.0)


def test_a_quiet_run():
    told = Conditions(
        load_1min=0.1, steal=0.01, busy=0.05, governor="performance", throttled=0,
        clock_mhz=(3000, 2990, 3010, 2980), temperature_c=(60, 62, 64, 66),
    )  # fmt: skip
    assert noise(calls(), STEADY, QUIET) == noise(calls(), STEADY, told) == ()


def test_a_tail_of_a_few_calls_is_natural():
    assert noise(calls(share=0.01, times=9), STEADY, QUIET) == ()


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.tile([8.0, 12.0], 100), "standard deviation 20% of the mean"),
        (calls(share=0.03, times=1.7), "standard deviation .* to 1[678].* ms without the slowest"),
        (calls(share=0.02, times=0.3), "standard deviation .* from [23]"),
    ],
)
def test_calls_that_differ(samples, words):
    (found,) = noise(samples, STEADY, QUIET)
    assert re.search(words, found), found
    assert "measure for longer" in found


def test_turns_that_differ_are_one_cause():
    """Half of the turns at half the pace: the calls differ too, of course."""
    (found,) = noise(np.repeat([10.0, 20.0], 100), (10.0, 20.0, 20.0, 20.0), QUIET)
    assert found.startswith("the turns' medians lie 50% apart (10 to 20 ms)")
    assert noise(calls(), (10.0, 10.9), QUIET) == ()


def test_too_few_calls():
    (found,) = noise(calls(129), STEADY, QUIET)
    assert found == "129 calls do not tell a 95th percentile: measure at least 130"
    assert noise(calls(130), STEADY, QUIET) == ()


def test_calls_too_short_for_the_stopwatch():
    (found,) = noise(calls() / 200, STEADY, QUIET)
    assert found.startswith("the shortest call took 47")
    assert "us" in found
    assert noise(calls() / 80, STEADY, QUIET) == ()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"steal": 0.041}, "the host gave 4.1% of the CPU time"),
        ({"busy": 0.42}, "other processes kept 0.42 CPUs busy"),
        ({"governor": "powersave"}, "governor is powersave"),
        ({"throttled": 3}, "the processor throttled 3 times: cool the device"),
        ({"clock_mhz": (3000, 2800)}, "the clock went from 3000 to 2800 MHz: fix the clock with"),
        (
            {"temperature_c": (50, 61)},
            "the hottest sensor went from 50 to 61 C: measure for longer",
        ),
        (
            {"clock_mhz": (3000, 2400), "temperature_c": (55, 82), "throttled": 7},
            "the processor throttled 7 times, the clock went from 3000 to 2400 MHz, the hottest "
            "sensor went from 55 to 82 C: cool the device",
        ),
    ],
)
def test_what_the_machine_tells(told, words):
    (found,) = noise(calls(), STEADY, Conditions(**told))
    assert words in found


@pytest.mark.parametrize(
    "told",
    [
        {"steal": 0.02},
        {"busy": 0.1},
        {"governor": "schedutil"},
        {"throttled": 0},
        {"clock_mhz": (3000, 2860)},
        {"clock_mhz": (3000,)},
        {"temperature_c": (50, 59)},
        {"temperature_c": (70, 50)},
    ],
)
def test_what_is_no_noise(told):
    assert noise(calls(), STEADY, Conditions(**told)) == ()


def test_drift_is_between_the_first_fifth_and_the_last():
    """One odd reading of ten is averaged with its neighbour."""
    steady = (3000, 2800, *[3000] * 8)
    assert noise(calls(), STEADY, Conditions(clock_mhz=steady)) == ()
    drifted = (3000, 3000, *[2900] * 6, 2800, 2700)
    (found,) = noise(calls(), STEADY, Conditions(clock_mhz=drifted))
    assert "from 3000 to 2750 MHz" in found


def test_this_machine_is_watched():
    watch = Watch()
    watch.tick()
    found = watch.end(0.0)
    assert all(20 < mhz < 10_000 for mhz in found.clock_mhz)
    assert all(0 < c < 125 for c in found.temperature_c)
