"""A benchmark's tables and page say what was measured, where, and what was not."""

import csv
import io
import re

import numpy as np
import pytest
from rich.console import Console

from edgekd.bench import page, plots, tables
from edgekd.cli import console as show
from edgekd.pipeline import bench as pipeline
from edgekd.records import (
    Budget,
    Conditions,
    EdgeKDError,
    Energy,
    Layer,
    Machine,
    Metric,
    Peak,
    Roofline,
    Timing,
)

MACHINE = Machine(name="m", cpu="CPU & co", cores=2, memory_gb=1, system="L", python="3.11")
EVIL = "<script>alert(1)</script>|[x](http://evil) $"
PEAK = Peak(gflops={"fp32": 50.0, "int8": 160.0}, bandwidth_gbs=10.0, threads=2, how="MatMul 1024")


def timing(ms=4.0, samples=700, **change):
    """A bare reading: `samples` calls of about `ms`, eight turns, the fourth twice as slow."""
    noise = np.random.default_rng(0).lognormal(sigma=0.02, size=samples)
    given = {
        "model": "resnet18", "role": "teacher", "precision": "fp32", "artifact_sha256": "ab" * 32,
        "runtime": "openvino", "device": "CPU", "threads": 1, "warmup": 5, "load_ms": 31.0,
        "samples_ms": tuple(ms * noise),
        "block_medians_ms": tuple(ms * s for s in (1, 1, 1, 2, 1, 1, 1, 1)),
        "throughput_ips": 512, "throughput_batch": 16, "params": 11_700_000, "macs": 600_000_000,
        "size_bytes": 46_800_000, "peak_mb": 321.0, "machine": MACHINE, "on_device": True,
    } | change  # fmt: skip
    return Timing(**given)


def whole(**change):
    """A reading with everything that a stopwatch can tell."""
    given = {
        "role": "student", "precision": "int8", "executed": "int8", "first_ms": 17.0,
        "cold_ms": (801.0, 812.0, 833.0), "idle_ms": {"0.5": (2.5, 2.6, 2.9), "5": (3.1, 3.2, 9.0)},
        "prepare_ms": (1.25, 1.35, 1.45), "explain_ms": (210.0, 220.0), "whole_ms": (4.1, 4.2, 4.3),
        "resident_mb": 87.0, "cores_busy": 1.94,
        "energy": Energy(source="RAPL package-0", joules=0.0432, idle_watts=3.21),
        "layers": (
            Layer(name="head", kind="MatMul", precision="fp32", ms=0.2, share=0.1),
            Layer(name="conv1", kind="Convolution", precision="int8", ms=0.9, share=0.45,
                  macs=51_000_000, fraction=0.61),
        ),
        "roofline": Roofline(peak=PEAK, precision="int8", intensity=20.0, ideal_ms=0.75,
                             bound="compute", fraction=0.375),
        "accuracy": Metric(value=0.912, low=0.881, high=0.934),
        "conditions": Conditions(load_1min=0.25, steal=0.015, governor="powersave", throttled=2,
                                 clock_mhz=(2800, 2700), temperature_c=(61, 66)),
        "yardstick_ms": (5.0, 5.0, 6.0), "macs": 60_000_000,
        "budget": Budget(latency_ms=1.5, size_mb=12), "over_budget": {"latency_ms": (2.07, 1.5)},
        "versions": {"openvino": "2025.3"}, "noise": ("the clock fell by 12 %",),
    } | change  # fmt: skip
    return timing(2.0, **given)


def written(out, timings, **change):
    given = {"title": "Bench", "command": "edgekd bench"} | change
    path = page.write(out, timings, **given)
    return path.read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ")


def row(text, what):
    """Texts of the cells of a line of the page's table."""
    found = re.search(rf'<th scope="row">{re.escape(what)}</th>(.*?)</tr>', text)
    assert found, what
    return re.findall(r"<td[^>]*>(.*?)(?:<small>|</td>)", found[1])


def terminal(timings):
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(show.timings(timings))
    return console.export_text()


def test_times_as_fast_are_taken_turn_by_turn():
    turns = np.ones(40)
    turns[20:] = 2  # the machine's pace
    odd = 2 * turns
    odd[3] = 9  # one turn of 40 is no news
    first, other = timing(block_medians_ms=4 * turns), timing(block_medians_ms=odd)
    assert tables.times_as_fast(first, other) == pytest.approx((2.0, 2.0, 2.0))
    odd[4] = 9  # two of the five that stand beside each other may be
    low, high = tables.times_as_fast(first, timing(block_medians_ms=odd))[1:]
    assert low == high == 2.0
    odd[2] = 9
    low, high = tables.times_as_fast(first, timing(block_medians_ms=odd))[1:]
    assert low < 1.7 < 2.3 < high
    assert tables.times_as_fast(first, timing(block_medians_ms=(2, 2))) is None
    few = [timing(block_medians_ms=(x, x)) for x in (6, 2)]
    assert tables.times_as_fast(*few) == (3.0, None, None)


def test_names_tell_candidates_apart():
    a, b = timing(), timing(model="other")
    assert tables.names([a, whole()]) == ["teacher fp32", "student int8"]
    assert tables.names([a, b]) == ["teacher fp32 resnet18", "teacher fp32 other"]
    assert len(set(tables.names([a, a, b]))) == 3


def test_the_numbers_are_those_of_the_records(tmp_path):
    text = written(tmp_path, [timing(), whole()])
    p99 = np.percentile(whole().samples_ms, 99)
    for what, said in (
        ("latency p99", f"{p99:.2f} ms"), ("times as fast as teacher fp32", "2.00"),
        ("throughput", "512/s"), ("call after 0.5 s idle", "2.60 ms"),
        ("call after 5 s idle", "3.20 ms"), ("cold start to first answer", "812 ms"),
        ("first call", "17.0 ms"), ("prepare", "1.35 ms"), ("explanation", "215 ms"),
        ("whole, without explanation", "4.20 ms"), ("parameters", "11.70 M"),
        ("MACs", "60 M"), ("file size", "46.8 MB"), ("resident memory", "87 MB"),
        ("peak memory", "321 MB"), ("energy of one image", "43.2 mJ"), ("power at rest", "3.2 W"),
        ("of the roofline", "38 %"), ("samples", "700"), ("turns apart", "100 %"),
        ("balanced accuracy", "0.912"), ("budget", "over"), ("executed precision", "int8"),
    ):  # fmt: skip
        assert row(text, what)[1] == said, what
    for shown in ("[0.881, 0.934]", "latency 2.1 &gt; 1.5 ms", "compute-bound, int8",
                  "CPU &amp; co", "RAPL package-0", "throttled 2 times",
                  "governor powersave", "openvino 2025.3",
                  "MatMul 1024, 2 threads", "the clock fell by 12 %", "p99 from 662"):  # fmt: skip
        assert shown in text, shown
    layers = re.findall(r'class="hash">(\w+)</th>', text)
    assert layers == ["conv1", "head"]  # the slowest first
    assert "<td>45.0 %</td><td>51.00 M</td><td>61 %</td>" in text
    assert '<td class="wrong">fp32</td>' in text  # a layer that is not int8


def test_what_was_not_measured_is_a_dash_with_a_reason(tmp_path):
    text = written(tmp_path, [timing(samples=100)])
    for what in ("latency p95", "latency p99", "call after idling", "cold start to first answer",
                 "first call", "prepare", "explanation", "whole, without explanation",
                 "resident memory", "energy of one image", "power at rest", "of the roofline",
                 "balanced accuracy", "executed precision"):  # fmt: skip
        assert row(text, what) == ["–"], what
    assert not re.search(r"<td>0(\.0+)?( \w+)?<", text)
    for said in (
        "latency p95 (claimed from 130 samples on)",
        "energy of one image, power at rest (this machine does not tell)",
    ):
        assert text.count(said) == 1, said
    for gone in ("Roofline</h2>", "Slowest layers", "Drift</h2>", "Accuracy against"):
        assert gone not in text
    fields = next(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    empty = {k for k, v in fields.items() if v == ""}
    assert {"latency_p95_ms", "first_ms", "energy_j", "roofline_fraction", "cold_p50_ms",
            "balanced_accuracy", "resident_mb", "executed"} <= empty  # fmt: skip


@pytest.mark.parametrize("on", [True, False])
def test_where_it_was_measured_is_everywhere(tmp_path, on):
    found = [timing(on_device=on), whole(on_device=on)]
    text = written(tmp_path, found)
    assert ("ON THE PROFILE&#39;S DEVICE" in text) == on
    assert ("NOT THE PROFILE&#39;S DEVICE" in text) != on
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    assert len(captions) == 5 + 4
    assert all(("On the profile's device" in c) == on for c in captions)
    assert row(text, "profile&#39;s device") == ["yes" if on else "NO"] * 2
    assert row(text, "budget")[1] == ("over" if on else "not judged")
    word = "the profile's runtime and device" if on else "NOT the profile's device"
    assert word in (tmp_path / "bench.md").read_text("utf-8")
    assert word in terminal(found)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text("utf-8"))))
    assert {r["on_profile_device"] for r in rows} == {str(on).lower()}


def test_one_candidate_elsewhere_is_named(tmp_path):
    text = written(tmp_path, [timing(on_device=False), whole()])
    assert "NOT the profile&#39;s device for teacher fp32" in text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    assert all("Not the profile's device" in c for c in captions)


def test_users_words_are_text_and_nobody_outside_is_asked(tmp_path):
    layer = Layer(name=EVIL, kind="k", precision="", ms=1, share=1)
    found = [timing(model=EVIL), timing(model="b", noise=(EVIL,), layers=(layer,))]
    text = written(tmp_path, found, title=EVIL, command=EVIL)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert not re.search(r"url\((?!#)", text)
    markdown = (tmp_path / "bench.md").read_text("utf-8")
    assert "<" not in markdown
    assert "](" not in markdown


def test_every_drawing_has_words(tmp_path):
    text = written(tmp_path, [timing(), whole()])
    alts = re.findall(r'role="img" aria-label="([^"]+)">\s*<svg', text)
    assert text.count("<svg") == len(alts) == 9
    p95 = np.percentile(whole().samples_ms, 95)
    said = "\n".join(alts)
    for words in (
        f"student int8: p50 2.00 ms, p95 {p95:.2f} ms", "student int8: 0.912 at 2.00 ms",
        "budget of p95: 1.5 ms", "teacher fp32: file 46.8 MB", "budget: 12 MB",
        "student int8: peak 321 MB, resident 87.0 MB", "teacher fp32: peak 321 MB",
        "roof of int8: 160 GFLOP/s, 10.0 GB/s", "38 % of the int8 roof, compute-bound",
        "student int8: 2700 to 2800", "student int8: 61.0 to 66.0", "student int8: 1.00 to 1.20",
    ):  # fmt: skip
        assert words in said, words


def test_no_drift_is_drawn_where_the_machine_tells_nothing():
    assert plots.drift(tables.shown([timing()])) == []


def test_the_same_timings_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / name, [timing(), whole()])
    for file in ("bench.html", "bench.md", "bench.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_csv_has_a_row_a_candidate_and_units(tmp_path):
    written(tmp_path, [timing(), whole()])
    first, last = csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text("utf-8")))
    assert first.keys() == last.keys()
    assert None not in (*first.values(), *last.values())
    assert float(last["latency_p50_ms"]) == np.percentile(whole().samples_ms, 50)
    assert float(last["latency_p50_low_ms"]) < float(last["latency_p50_ms"])
    assert (last["times_as_fast"], last["energy_j"]) == ("2.0", "0.0432")
    assert (last["after_idle_0.5s_p50_ms"], first["after_idle_0.5s_p50_ms"]) == ("2.6", "")
    assert (last["over_budget"], first["name"]) == ("latency_ms 2.07 > 1.5", "teacher fp32")


def test_the_markdown_table_is_rectangular(tmp_path):
    written(tmp_path, [timing(model="a|b"), timing(model="b"), whole()])
    text = (tmp_path / "bench.md").read_text("utf-8")
    table = [x for x in text.splitlines() if x.startswith("|")]
    assert len(table) > 20
    assert {len(re.findall(r"(?<!\\)\|", x)) for x in table} == {5}
    assert "machine: CPU & co, 2 cores" in text
    assert "- noise: student int8" in text


def test_ratios_that_the_caller_knows_are_shown(tmp_path):
    given = [tables.Times(1.0), tables.Times(3.21, 3.01, 3.42)]
    text = written(tmp_path, [timing(), whole()], ratios=given)
    assert row(text, "times as fast as teacher fp32") == ["1", "3.21"]
    assert "[3.01, 3.42]" in text


def test_the_terminal_says_the_same_and_prints_the_noise():
    text = " ".join(terminal([timing(), whole(stable=False)]).split())
    for said in ("100 % (8 turns)", "noise: student int8: the clock fell by 12 %",
                 "noise: student int8: the turns do not agree within 10 %",
                 "balanced accuracy (not judged on the test split)",
                 "2.00 [2.00, 2.00]"):  # fmt: skip
        assert said in text, said
    bare = terminal([timing(samples=100)])
    assert not re.search(r"^(energy|prepare|latency p99)", bare, re.M)  # said below the table
    assert "latency p99 (claimed from 662 samples on)" in " ".join(bare.split())


ASKED = {"within": 5.0, "width": 3.2, "ended": "narrow"}
WIDE = {"within": 5.0, "width": 12.3, "ended": "cap", "stable": False}


@pytest.mark.parametrize(
    ("told", "cell", "noise", "method"),
    [(ASKED, "3.2 % (5 % asked, ended by that)", None, "Turns ended when the interval of each"),
     (WIDE, "12.3 % (5 % asked, the time was over)",
      "student int8: known within 12.3 %, 5 % asked, when the time was over",
      "Turns ended with the time for them, before the interval of each ratio to the first was at "
      "most 5 % wide at two looks in a row")],
)  # fmt: skip
def test_how_well_ratios_are_known_and_why_turns_ended(tmp_path, told, cell, noise, method):
    both = [timing(within=5.0, ended=told["ended"]), whole(**told)]
    text = written(tmp_path, both)
    assert row(text, "ratio known within") == ["the first", f"{told['width']} %"]
    assert method in " ".join(text.split())
    said = " ".join(terminal(both).split())
    assert cell in said
    assert (noise is None) == ("asked, when the time was over" not in said)
    if noise:
        assert f"noise: {noise}" in said
    last = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text("utf-8"))))[-1]
    assert (last["ratio_width_percent"], last["ended"]) == (str(told["width"]), told["ended"])
    assert row(written(tmp_path, [whole(**told)]), "median known within") == [f"{told['width']} %"]


def paced(allowed, *paces, on_device=True):
    """100 calls a turn, 5 % of them twice as slow; a turn at each pace."""
    call = np.where(np.arange(100) < 90, 1.0, 2.0)
    return timing(samples_ms=tuple(np.concatenate([p * call for p in paces])),
                  block_medians_ms=tuple(map(float, paces)), on_device=on_device,
                  budget=Budget(latency_ms=allowed))  # fmt: skip


def test_a_budget_that_is_kept_at_one_pace_only_is_not_decided():
    changed = np.repeat([1.0, 1.5], 10)  # p95 2 ms, then 3
    assert tables.budget_at_paces(paced(2.5, *changed)) == (
        "p95 was 2.00 to 3.00 ms as the pace changed, 2.5 allowed"
    )
    for allowed in (1.9, 3.1):  # missed at any pace, kept at any
        assert tables.budget_at_paces(paced(allowed, *changed)) == ""
    assert tables.budget_at_paces(paced(2.0, *np.tile([1.0, 1.01], 10))) == ""  # a steady machine
    assert tables.budget_at_paces(paced(2.5, *changed, on_device=False)) == ""
    told = [timing(), paced(2.5, *changed)]
    assert pipeline.unsteady(told).startswith("not decided: teacher fp32 2: p95 was 2.00 to 3.00 ")
    assert "p95 was 2.00 to 3.00 ms" in " ".join(terminal(told).split())


def test_what_is_not_steady_is_said_in_one_line():
    assert pipeline.unsteady([timing(within=5.0, ended="narrow"), whole(**ASKED)]) == ""
    assert pipeline.unsteady([timing(within=5.0, ended="cap"), whole(**WIDE)]) == (
        "not steady: student int8 (known within 12.3 %, 5 % asked, when the time was over); leave "
        "the machine alone or allow more --seconds"
    )
    assert "the turns do not agree within 10 %" in pipeline.unsteady([whole(stable=False)])


def test_noise_that_all_share_is_said_once():
    found = tables.shown([timing(noise=("loud",)), whole(noise=("loud", "hot"))])
    assert tables.doubts(found) == ["loud", "student int8: hot"]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_number_of_candidates(tmp_path, count):
    text = written(tmp_path, [whole(model=f"m{i}") for i in range(count)])
    assert len(row(text, "samples")) == count


def test_nothing_timed_is_an_error(tmp_path):
    with pytest.raises(EdgeKDError, match="run edgekd bench first"):
        page.write(tmp_path, [], title="t", command="c")


def test_why_energy_is_absent_is_what_the_worker_said():
    locked = timing(absent={"energy": "RAPL is for root alone"})
    found = tables.shown([locked])
    said = tables.absent(tables.lines(found), found)
    assert "energy of one image, power at rest (RAPL is for root alone)" in said
