"""The page says what the records say, in the right order, and asks nobody outside."""

import re
import subprocess
import sys

import numpy as np
import pytest

from edgekd.records import (
    Agreement,
    Artifact,
    Budget,
    Calibration,
    Comparison,
    EdgeKDError,
    Evaluation,
    Fidelity,
    Machine,
    Metric,
    Profile,
    Spec,
    Timing,
)
from edgekd.report import page as report

MACHINE = Machine(name="m", cpu="CPU & co", cores=2, memory_gb=1, system="L", python="3.11")
PROFILE = Profile(name="cpu", runtime="openvino", device="CPU")
EVIL = "<script>alert(1)</script>"


def artifact(role, precision, accuracy, classes=("cyst", EVIL)):
    return Artifact(
        kind="onnx", model="resnet18", precision=precision, files={"m.onnx": role * 8},
        spec=Spec(classes=classes, size=(32, 32)), role=role, params=2_500_000, macs=104_000_000,
        metrics={"test_balanced_accuracy": {"value": accuracy, "low": 0.8, "high": 0.99}},
        per_class={c: {"recall": 0.5, "precision": 0.25, "f1": 1 / 3, "images": 4}
                   for c in classes},
        seed=5, parents={"onnx": "cafe"}, versions={"python": "3.11.7"},
        settings={"training": {"epochs": 7, "lr": 0.01}},
    )  # fmt: skip


class Sized(Artifact):
    @property
    def size_bytes(self):
        return 9_900_000


def rows(timed=True):
    found = []
    for role, precision, accuracy, ms in (
        ("teacher", "fp32", 0.951, 4),
        ("student", "int8", 0.912, 2),
    ):
        made = Sized(**artifact(role, precision, accuracy).model_dump())
        timing = Timing(
            model="resnet18", role=role, precision=precision, artifact_sha256="0",
            runtime="openvino", device="CPU", threads=1, warmup=5, load_ms=3,
            samples_ms=[ms] * 99 + [ms * 10],
            throughput_ips=500, throughput_batch=16, params=1, macs=1, size_bytes=1, peak_mb=120,
            machine=MACHINE, on_device=role == "teacher",
        )  # fmt: skip
        found.append(report.Row(f"{role} {precision}", made, timing if timed else None))
    return found


def fidelity(r=(0.9, 0.1, 0.5)):
    def comparison(name, values):
        return Comparison(
            name=name, artifact_sha256="0", precision="fp32", runtime="openvino", layer="l",
            seconds_per_map=0.25, undefined=0,
            aggregate={"pearson": {"value": np.mean(values), "low": 0.1, "high": 0.9, "null": 0.3,
                                   "n": 3}},
            images=[
                Agreement(image=f"hash{i}", label="cyst", explained="cyst", answer="cyst",
                          probability=0.7, figures={"pearson": v}, null={"pearson": 0.3})
                for i, v in enumerate(values)
            ],
        )  # fmt: skip

    return Fidelity(
        reference="resnet18", reference_sha256="0", variant="evidence", grid=14,
        data_fingerprint="f", split="test", machine=MACHINE, mask_share=0.031,
        comparisons=[comparison("teacher fp32", (1, 1, 1)), comparison("student int8", r)],
    )  # fmt: skip


def panels(r=(0.9, 0.1, None)):
    rng = np.random.default_rng(0)
    mask = np.zeros((32, 32), bool)
    mask[8:16, 8:16] = True
    for i, value in enumerate(r):
        heat = None if value is None else rng.random((32, 32), np.float32)
        yield report.Panel(
            image=f"hash{i}", label="cyst", pixels=rng.integers(0, 256, (32, 32, 3), np.uint8),
            mask=mask if i else None,
            maps={"teacher fp32": rng.random((32, 32), np.float32), "student int8": heat},
            answers={"teacher fp32": ("cyst", 0.9), "student int8": (EVIL, 0.514)},
            agreement={"teacher fp32": 1.0, "student int8": value},
        )  # fmt: skip


def page(out, **change):
    given = {
        "title": "Run " + EVIL, "rows": rows(), "fidelity": fidelity(), "panels": list(panels()),
        "profile": PROFILE, "notes": ["a note"], "command": "edgekd report",
    } | change  # fmt: skip
    return report.write(out, **given).read_text("utf-8")


def test_the_numbers_are_those_of_the_records(tmp_path):
    text = page(tmp_path).replace("\N{NO-BREAK SPACE}", " ").replace("&nbsp;", " ")
    for shown in (
        "0.951 [0.800, 0.990] (teacher fp32)", "0.912 [0.800, 0.990]",
        "2.50 M", "104 M", "9.9 MB", "120 MB",
        "500/s, batch 16", "3.1 %", "51 %",
        "2 classes, 8 test images", "CPU &amp; co", "not judged", "r = 0.10", "resnet18",
        "not on the profile&#39;s device (cpu: openvino on CPU)", "✗ wrong: &lt;script&gt;",
        "epochs 7, lr 0.01", "seed 5", "from onnx cafe", "python 3.11.7",
    ):  # fmt: skip
        assert shown in text, shown
    assert '<td class="first">0.500</td><td>0.250</td><td>0.333</td>' in text
    assert '<td class="first">0.50 [0.10, 0.90]</td><td class="null">0.30</td>' in text
    p95 = [float(np.percentile([ms] * 99 + [ms * 10], 95)) for ms in (4, 2)]
    assert f"<td>{p95[0]:.2f} ms</td><td>{p95[1]:.2f} ms</td>" in text


def test_the_worst_case_comes_first_and_an_undefined_map_before_all(tmp_path):
    order = re.findall(r"<code>(hash\d)</code>", page(tmp_path))
    assert order == ["hash2", "hash1", "hash0"]


def test_users_words_are_text(tmp_path):
    text = page(tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_page_asks_nobody_outside(tmp_path):
    text = page(tmp_path)
    for found in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert found.startswith(("data:image/png;base64,", "#")), found[:80]
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == set()


def test_every_picture_has_words(tmp_path):
    text = page(tmp_path)
    assert text.count("<img ") == len(re.findall(r'<img [^>]*alt="[^"]+"', text)) == 9
    alts = re.findall(r'role="img" aria-label="([^"]+)">\s*<svg', text)
    assert text.count("<svg") == len(alts) == 3
    assert "student int8: median 2.00 ms, p95 2.00 ms" in alts[0]
    assert "student int8: 0.912" in alts[1]
    assert "student int8: mean 0.50, strangers 0.30" in alts[2]


def test_the_same_records_give_the_same_bytes(tmp_path):
    assert page(tmp_path / "a") == page(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"fidelity": None, "panels": []}, "Do the explanations agree"),
        ({"rows": rows(timed=False)}, "Latency of one image"),
        ({"rows": rows(timed=False)}, "latency p50"),
        ({"rows": rows()[:1], "fidelity": None, "panels": []}, "student int8"),
    ],
)
def test_what_is_not_there_is_left_out(tmp_path, change, absent):
    assert absent in page(tmp_path / "whole")
    assert absent not in page(tmp_path / "part", **change)


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(EdgeKDError, match="run edgekd distill first"):
        page(tmp_path, rows=[])


def test_the_order_does_not_depend_on_that_of_the_panels(tmp_path):
    assert page(tmp_path / "a") == page(tmp_path / "b", panels=list(panels())[::-1])


def test_the_summary_is_made_of_the_numbers(tmp_path):
    big, small = rows()
    big = big._replace(artifact=big.artifact.model_copy(update={"params": 25_000_000}))
    text = page(tmp_path, rows=[big, small], fidelity=fidelity((0.9, 0.1, 0.8)))
    lead = re.search(r'<p class="lead">(.*?)</p>', text, re.S)[1]
    for said in (
        "has 10 times fewer parameters and as many multiply-accumulates",
        "in 2.00 ms (median; 95 % within 2.00 ms), 2 times as fast as teacher fp32 on this machine",
        "correlate 0.60 with teacher fp32&#39;s of the same image, and 0.30 with those of other",
    ):
        assert said in lead, said
    assert "In 2 of 3 images the map of student int8 agrees more" in text


def test_the_budget_is_judged_on_the_profiles_device_only(tmp_path):
    def judged(**change):
        timing = rows()[1].timing.model_copy(update=change)
        return report._budget(timing)

    limits = Budget(latency_ms=1.5, size_mb=25)
    over = {"latency_ms": (2.9, 1.5), "size_mb": (30.0, 25.0)}
    assert judged(over_budget=over, budget=limits) == "not judged"
    assert judged(on_device=True) == "no limits stated"
    assert judged(on_device=True, budget=limits) == "within"
    found = judged(on_device=True, budget=limits, over_budget=over)
    assert found == "over: latency 2.9 > 1.5 ms, size 30.0 > 25 MB"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_models_and_classes(tmp_path, count):
    classes = [f"class {i} " + "of a very long name " * 3 for i in range(2 * count)]
    name = [f"model {i}" for i in range(count)]
    made = Sized(**artifact("student", "fp32", 0.9, classes).model_dump())
    found = fidelity()
    own = [found.comparisons[0]] + [found.comparisons[1]] * (count - 1)
    own = [c.model_copy(update={"name": n}) for c, n in zip(own, name, strict=True)]
    text = page(
        tmp_path,
        rows=[report.Row(n, made, rows()[0].timing) for n in name],
        fidelity=found.model_copy(update={"comparisons": tuple(own), "mask_share": None}),
        panels=[p._replace(mask=None) for p in panels()],
    )
    assert f"{2 * count} classes, {8 * count} test images" in text
    assert "cyan outline" not in text
    assert "The masks cover" not in text


def test_maps_that_are_all_undefined_are_said_to_be(tmp_path):
    found = fidelity()
    flat = [
        c.model_copy(update={
            "aggregate": {}, "undefined": 3,
            "images": tuple(a.model_copy(update={"figures": {"pearson": None}}) for a in c.images),
        })
        for c in found.comparisons
    ]  # fmt: skip
    text = page(tmp_path, fidelity=found.model_copy(update={"comparisons": tuple(flat)}))
    assert "every map is undefined" in text
    assert "Histogram" not in text
    assert "no map: nothing speaks for this class" in text


def test_plotting_leaves_no_cache_behind(tmp_path):
    code = "from edgekd.report import html; html.import_plotting(); import matplotlib.figure"
    env = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_mask_is_outlined_after_the_picture_is_resized():
    mask = np.zeros((1000, 500), bool)
    mask[300:600, 100:300] = True
    panel = report.Panel("i", "cyst", np.zeros((1000, 500, 3), np.uint8), mask, {}, {}, {})
    drawn = report._picture(panel, None)
    assert drawn.shape == (report.SIDE, report.SIDE // 2, 3)
    assert (drawn == (0, 220, 230)).all(2).sum() > 2 * (66 + 44)  # two pixels wide, all around


def test_the_outline_is_the_masks_edge():
    mask = np.zeros((10, 10), bool)
    mask[2:8, 2:8] = True
    drawn = report._outlined(np.zeros((10, 10, 3), np.uint8), mask)
    edge = (drawn == (0, 220, 230)).all(2)
    assert edge.sum() == 36 - 4
    assert not edge[4:6, 4:6].any()
    whole = report._outlined(np.zeros((10, 10, 3), np.uint8), np.ones((10, 10), bool))
    assert (whole == (0, 220, 230)).all(2).sum() == 100 - 36  # at the picture's own edge too


def evaluated(**change):
    """Rows whose last is judged: figures of which each is told from the others."""
    first, last = rows()

    def figure(value):
        return {"value": value, "low": value - 0.011, "high": value + 0.013}

    def part(base, **more):
        keys = ("auroc", "sensitivity", "specificity", "balanced_accuracy", "macro_auroc", "ece")
        found = {k: figure(base + 0.01 * i) for i, k in enumerate(keys)}
        return {"images": 31, "groups": 17, "metrics": found}

    bars = [{"low": 0.8, "high": 0.867, "images": 8, "confidence": 0.82, "accuracy": 0.75}]
    sure = [{"low": 0.933, "high": 1, "images": 8, "confidence": 0.97, "accuracy": 0.75}]
    at = {"probability": 0.321, "val_sensitivity": 0.987, "val_specificity": 0.654}
    evaluation = Evaluation.parse({
        "images": 8, "groups": 8, "bins": 15, "confusion": [[41, 12], [13, 44]],
        "classes": {"cyst": part(0.3), EVIL: part(0.5)}, "reliability": bars,
        "reliability_uncalibrated": sure, "answers_sha256": "0",
        "subgroups": {"sex " + EVIL: part(0.7)},
        "paired": {"teacher fp32": {
            "against": "resnet18", "sha256": "7", "images": 8, "groups": 8, "only_this_right": 21,
            "only_other_right": 33, "mcnemar_p": 0.0421,
            "differences": {"balanced_accuracy": figure(-0.123)},
        }},
    } | change, "test")  # fmt: skip
    calibration = Calibration.parse({"temperature": 1.618, "method": "nll", "sensitivity": 0.95,
                                     "thresholds": {"cyst": at, EVIL: at}}, "test")  # fmt: skip
    more = {"test_ece": Metric(value=0.0271), "test_ece_uncalibrated": Metric(value=0.0828)}
    made = last.artifact.model_copy(update={
        "evaluation": evaluation, "calibration": calibration,
        "metrics": last.artifact.metrics | more,
    })  # fmt: skip
    return [first, last._replace(artifact=made)]


def test_the_scores_are_those_of_the_record(tmp_path):
    text = page(tmp_path, rows=evaluated()).replace("\N{NO-BREAK SPACE}", " ")
    for shown in (
        "divided by 1.618", "0.083 before, 0.027 after", "for sensitivity 0.95",
        "<td><b>41</b></td><td>12</td>", "<td>13</td><td><b>44</b></td>",
        "<td>0.300 [0.289, 0.313]</td><td>0.321</td><td>0.987 / 0.654</td>",
        "<td>0.310 [0.299, 0.323]</td><td>0.320 [0.309, 0.333]</td><td>31</td>",
        "sex &lt;script&gt;", "<td>0.730 [0.719, 0.743]</td>", "31 / 17",
        "student int8 less teacher fp32", "-0.123 [-0.134, -0.110]",
        "<td>21</td><td>33</td><td>0.0421</td>",
        "before: 8 images at 0.97 are 0.75 right; calibrated: 8 images at 0.82 are 0.75 right",
    ):  # fmt: skip
        assert shown in text, shown
    assert "<script" not in text
    assert "some patients have several" not in text
    assert page(tmp_path / "a", rows=evaluated()) == page(tmp_path / "b", rows=evaluated())


def test_scores_that_are_not_there_are_left_out(tmp_path):
    assert "worth" not in page(tmp_path / "none")
    text = page(tmp_path, rows=evaluated(subgroups={}, paired={}, groups=3))
    assert "Subgroups" not in text
    assert "more than chance" not in text
    text = page(tmp_path, rows=evaluated(groups=3))
    assert "some patients have several" in text
