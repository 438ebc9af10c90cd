"""What the report says of explanations is what the records say, for each of the four verdicts."""

import csv
import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from report.test_page import EVIL, MACHINE, PROFILE, Sized, artifact, page, panels, rows
from typer.testing import CliRunner

from edgekd import data
from edgekd.cli import explain as command
from edgekd.cli import main
from edgekd.explain.fidelity import to_grid
from edgekd.explain.score_cam import resize, unit
from edgekd.pipeline import explain
from edgekd.pipeline import report as pipeline
from edgekd.pipeline.run import Run
from edgekd.records import (
    Aggregate,
    Agreement,
    Comparison,
    EdgeKDError,
    Fidelity,
    Gate,
    Margins,
    Survived,
    Swayed,
    Verdict,
    untracked,
)
from edgekd.report import cases, explanations, gallery, machine_readable
from edgekd.report import page as report

MODELS = ("teacher fp32", "student fp32", "student int8")
MARKERS = ("corner text", "border " + EVIL)
WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE", "invalid": "INVALID"}


def aggregate(value, half=0.02, null=None):
    return Aggregate(value=value, low=value - half, high=value + half, null=null, n=6)


def gate(name, state, value, margin, half=0.02, least=True, needed=None):
    return Gate(name=name, what=f"{name} of the maps", state=state, value=value, low=value - half,
                high=value + half, margin=margin, least=least, needed=needed)  # fmt: skip


GATES = {
    "pass": (gate("kappa", "pass", 0.95, 0.8), gate("lost", "pass", 0.05, 0.1, least=False)),
    "fail": (gate("kappa", "fail", 0.61, 0.8), gate("lost", "pass", 0.05, 0.1, least=False)),
    "inconclusive": (gate("kappa", "pass", 0.95, 0.8),
                     gate("lost", "inconclusive", 0.11, 0.1, least=False, needed=234)),
    "invalid": (gate("random_head of student int8", "invalid", 0.97, 0.83, least=False),
                gate("kappa", "fail", 0.61, 0.8)),
}  # fmt: skip


def images(r, answers=("cyst",) * 6, identification=0.75):
    return tuple(
        Agreement(
            image=f"hash{i}", label="cyst" if i < 3 else EVIL, explained="cyst", answer=answers[i],
            probability=0.51 + 0.01 * i, null={"pearson": 0.3},
            figures={"pearson": v, "identification": identification, "lost": float(v == min(r))},
        )
        for i, v in enumerate(r)
    )  # fmt: skip


def comparison(name, reference="", verdict=None, r=(1.0,) * 6, base=0.0, answers=("cyst",) * 6):
    own = {f"shortcut: {m}": aggregate(0.031 + base + 0.1 * i, null=0.011)
           for i, m in enumerate(MARKERS)}  # fmt: skip
    return Comparison(
        name=name, reference=reference, artifact_sha256=f"{name[:7]}-sha", precision="int8",
        runtime="openvino", layer="l", seconds_per_map=0.25, undefined=int(base > 0.1),
        aggregate={"pearson": aggregate(0.9 - base, null=0.3),
                   "kappa": aggregate(0.8571 - base, null=0.0),
                   "identification": aggregate(0.987, null=0.5), "lost": aggregate(0.043),
                   "energy": aggregate(0.222, null=0.111)},
        checks={"random_head": aggregate(0.312 + base, null=0.731),
                "other_class": aggregate(0.123), "above_random": aggregate(0.176),
                "faithful": aggregate(0.187, null=0.013), "repeatable": aggregate(0.741),
                "faithful_mean": aggregate(0.199, null=0.017), "undefined": aggregate(0.0)}
        | own | {f"flips: {MARKERS[0]}": aggregate(0.125, null=0.01)},
        paired={"answers": aggregate(0.975), "accuracy_pt": aggregate(-0.7, 0.5)} if reference
        else {},
        verdict=verdict, images=images(r, answers),
        parts={"class cyst": {"kappa": aggregate(0.8571 - base), "lost": aggregate(0.043)},
               f"class {EVIL}": {}},
    )  # fmt: skip


def verdict(state, step="quantisation", reference=MODELS[1]):
    remedies = ("use bf16 " + EVIL, "train for INT8") if state == "fail" else ()
    return Verdict(step=step, reference=reference, state=state, gates=GATES[state],
                   sentence=f"What {state} means here.", remedies=remedies)  # fmt: skip


def fidelity(state="pass", r=(0.9, 0.1, 0.5, 0.8, 0.7, 0.6), **change):
    margins = Margins()
    answers = ("cyst", EVIL, *["cyst"] * 4)
    first = verdict("pass", "distillation", MODELS[0])
    found = Fidelity(
        reference="resnet18", reference_sha256="0", variant="evidence", grid=14,
        data_fingerprint="fingerprint", split="test", machine=MACHINE, mask_share=0.031,
        comparisons=(
            comparison(MODELS[0]),
            comparison(MODELS[1], MODELS[0], first, (0.95, 0.9, 0.85, 0.8, 0.7, 0.6), 0.01),
            comparison(MODELS[2], MODELS[1], verdict(state), r, 0.2, answers),
        ),
        verdict=state, reasons=("a reason", f"What {state} means here."), margins=margins,
        margins_sha256=margins.sha256,
        published={MODELS[0]: aggregate(0.996, 0.001, null=0.951),
                   MODELS[1]: aggregate(0.4, null=0.95)},
    )  # fmt: skip
    return found.model_copy(update=change)


def models():
    first, last = rows()
    middle = Sized(**artifact("student", "fp32", 0.933).model_dump())
    return [first, report.Row(MODELS[1], middle, None), last]


def written(out, **change):
    return page(out, **({"rows": models(), "fidelity": fidelity(), "panels": []} | change))


def told(text):
    """The page's words, as a reader sees them."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.S)
    words = html.unescape(re.sub(r"<(/?[a-z][^>]*)>", " ", text))
    return " ".join(words.split())


@pytest.mark.parametrize("state", list(WORDS))
def test_the_page_begins_with_the_verdict_and_the_gate_that_decided(tmp_path, state):
    text = written(tmp_path, fidelity=fidelity(state))
    box = text[text.index("<h1>") : text.index('<p class="lead">')]
    symbol = explanations.SIGNS[state][0]
    assert f'<section class="verdict {state}"' in box
    assert f'aria-hidden="true">{symbol}</span> {WORDS[state]}</div>' in box
    decided = {
        "pass": "nearest to its margin: lost of the maps: 0.050 [0.030, 0.070]; its upper bound, "
        "0.070, is within the 0.1 allowed",
        "fail": "kappa of the maps: 0.610 [0.590, 0.630]; even its upper bound, 0.630, misses "
        "the 0.8 asked",
        "inconclusive": "lost of the maps: 0.110 [0.090, 0.130]; its upper bound, 0.130, exceeds "
        "the 0.1 allowed 234 images would decide if the values stay; these were 6",
        "invalid": "random_head of student int8 of the maps, student int8: 0.970 [0.950, 0.990]; "
        "even its lower bound, 0.950, exceeds the 0.83 allowed",
    }
    shown = told(box)
    last = shown[shown.index("Quantisation: student fp32 → student int8") :]
    assert f"What {state} means here. {decided[state]}" in last
    for other in set(decided) - {state}:
        assert decided[other] not in last
    assert ("kappa of the maps" in last) == (state == "fail")
    assert ("use bf16 " + EVIL + " train for INT8" in shown) == (state == "fail")
    assert "sha256 student-sha, int8, run by openvino" in last
    assert f"declared in the profile before the run, sha256 {Margins().sha256}" in last
    assert "6 of the test split" in last


def test_a_step_that_nobody_can_decide_says_so():
    found = verdict("inconclusive").model_copy(
        update={"gates": (gate("kappa", "inconclusive", 0.8, 0.8),)}
    )
    assert (
        explanations._enough(found, 6) == "how many images would decide is not known; these were 6"
    )


def test_without_explanations_the_page_says_that_they_were_not_checked(tmp_path):
    shown = told(written(tmp_path, fidelity=None))
    assert "NOT CHECKED" in shown
    assert "were not checked. Check them: edgekd explain" in shown
    assert "PASS" not in shown.replace("a PASS is no reason", "")
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["explanations"] is None
    assert not (tmp_path / "cases.csv").exists()


def test_maps_of_an_earlier_edgekd_are_not_judged(tmp_path):
    bare = {"verdict": None, "reference": ""}
    own = tuple(c.model_copy(update=bare) for c in fidelity().comparisons)
    found = fidelity(verdict=None, margins_sha256="", comparisons=own)
    shown = told(written(tmp_path, fidelity=found))
    assert "NOT JUDGED" in shown
    assert "Judge them: edgekd explain." in shown
    assert "declared in the profile" not in shown


def test_what_failed_is_marked_where_it_stands(tmp_path):
    text = written(tmp_path, fidelity=fidelity("fail")).replace("\N{NO-BREAK SPACE}", " ")
    assert '<td class="fail"><b>✗ 0.657 [0.637, 0.677]</b><small>' not in text
    assert '<td class="fail"><b>✗ 0.657 [0.637, 0.677]</b></td>' in text  # kappa of the file
    assert "<td>0.847 [0.827, 0.867]</td>" in text  # kappa of the student
    assert '<td class="fail"><b>✗ fail</b></td><td>–</td>' in text
    assert "<td>0.043 [0.023, 0.063]</td>" in text
    clean = written(tmp_path / "b").replace("\N{NO-BREAK SPACE}", " ")
    assert '<td class="fail"><b>✗ 0.657' not in clean


def test_the_tables_hold_the_figures_of_the_records(tmp_path):
    shown = told(written(tmp_path))
    for line in (
        "compressed from – teacher fp32 student fp32",
        "-0.7 [-1.2, -0.2] points",
        "agreement of maps (r) – 0.890 [0.870, 0.910] stranger 0.300 0.700 [0.680, 0.720]",
        "faithfulness 0.187 [0.167, 0.207] random map 0.013",
        "largest shortcut 0.131 [0.111, 0.151] border " + EVIL,
        "correlation with maps of a random head below 95 % of strangers 0.312 [0.292, 0.332] "
        "95 % of strangers 0.731 0.322 [0.302, 0.342]",
        "grey level at least 0.5 0.741 [0.721, 0.761]",
        "faithfulness beyond random maps' above 0 0.176 [0.156, 0.196]",
        "corner text 0.031 [0.011, 0.051] flat patch 0.011 12.5 % flat patch 1.0 %",
        "insertion − deletion, mean colour: random smooth map 0.017 0.017 0.017",
        "an even map (area of the masks) 0.031 0.031 0.031",
        "kappa of the maps at least 0.8 0.950 [0.930, 0.970] ✓ pass –",
        "intended use not stated",
    ):
        assert line in shown, line


def looking(c, value, state=None, of=""):
    """A comparison with the figures of answers without the lesion, and a gate of them."""
    share, only = aggregate(0.71, null=0.4), aggregate(0.3, null=0.25)
    checks = {"elsewhere": aggregate(value), "survive_without": share, "survive_only": only,
              "drop_without": aggregate(0.123), f"survive_without: {EVIL}": only}  # fmt: skip
    change = {"checks": c.checks | checks, "region": "lesion"}
    if state:
        own = gate(f"elsewhere{of}", state, value, 0.4, least=False)
        change["verdict"] = c.verdict.model_copy(update={"gates": (*c.verdict.gates, own)})
    return c.model_copy(update=change)


def test_the_page_says_who_looks_elsewhere(tmp_path):
    first, student, last = fidelity("fail").comparisons
    shown = (looking(first, 0.52), looking(student, 0.52, "fail", f" of {MODELS[0]}"),
             looking(last, 0.11, "pass"))  # fmt: skip
    kept = Survived(image="hash2", model=MODELS[0], region="lesion", answer=EVIL, before=0.91,
                    after=0.88)  # fmt: skip
    found = fidelity("fail", comparisons=shown, hidden={"lesion": 6}, survived=(kept,))
    text = told(written(tmp_path, fidelity=found)).replace("\N{NO-BREAK SPACE}", " ")
    for line in (
        "Does the model look elsewhere? The lesion hidden",
        "in 6 images: the lesion in 6.",
        "answers that survive without the lesion 0.710 [0.690, 0.730] by chance 0.400 0.710",
        "never looks at it ✗ 0.520 [0.500, 0.540] 0.520 [0.500, 0.540] 0.110 [0.090, 0.130]",
        "the answer loses without the lesion 0.123 [0.103, 0.143]",
        f"answers {EVIL} that survive without the lesion 0.300 [0.280, 0.320] by chance 0.250",
        f"hash2 teacher fp32 the lesion {EVIL} 91 % 88 %",
    ):
        assert line in text, line
    assert "loses with nothing but the lesion" not in text  # no figure of it
    machines = json.loads((tmp_path / "report.json").read_text("utf-8"))["explanations"]
    assert "survived" not in machines  # single images
    assert machines["hidden"] == {"lesion": 6}
    assert "look elsewhere" not in told(written(tmp_path / "b"))


def test_a_check_is_marked_as_its_gate_says(tmp_path):
    shown = told(written(tmp_path, fidelity=fidelity("invalid")))
    line = shown[shown.index("correlation with maps of a random head below") :]
    assert "0.322 [0.302, 0.342] 95 % of strangers 0.731 ⊘ 0.512 [0.492, 0.532]" in line
    assert "⊘" not in told(written(tmp_path / "b")).replace("⊘ the method fails its own", "")


def test_the_published_map_is_shown_blind_where_it_is(tmp_path):
    shown = told(written(tmp_path))
    assert "Published Score-CAM is blind here (teacher fp32): its maps" in shown
    assert "✗ 0.996 [0.995, 0.997] 95 % of strangers 0.951 0.400 [0.380, 0.420]" in shown
    seeing = fidelity(published={MODELS[0]: aggregate(0.4, null=0.95)})
    assert "is blind here" not in told(written(tmp_path / "b", fidelity=seeing))


@pytest.mark.parametrize(
    ("low", "high", "least", "state"),
    [
        (0.51, 0.6, True, "pass"), (0.4, 0.6, True, "inconclusive"), (0.4, 0.49, True, "fail"),
        (0.4, 0.49, False, "pass"), (0.4, 0.6, False, "inconclusive"), (0.51, 0.6, False, "fail"),
    ],
)  # fmt: skip
def test_an_interval_beside_its_limit(low, high, least, state):
    a = Aggregate(value=0.5, low=low, high=high, n=6)
    assert explanations._against(a, 0.5, least) == state


def test_the_nearest_gate_is_measured_in_its_own_interval():
    near = gate("a", "pass", 0.85, 0.8, half=0.04)  # a quarter... of its width is left: 0.125
    far = gate("b", "pass", 0.85, 0.83, half=0.001)  # 9.5 widths
    assert explanations._nearest([far, near]) == [near]


def test_classes_and_changed_answers_are_counted(tmp_path):
    own = list(cases.parts(fidelity().comparisons))
    assert own == [
        ["class cyst", MODELS[1], "6", "0.85 [0.83,\xa00.87]", "–", "0.04 [0.02,\xa00.06]"],
        ["class cyst", MODELS[2], "6", "0.66 [0.64,\xa00.68]", "–", "0.04 [0.02,\xa00.06]"],
        [f"class {EVIL}", MODELS[1], "too few to judge", "–", "–", "–"],
        [f"class {EVIL}", MODELS[2], "too few to judge", "–", "–", "–"],
    ]
    changed = list(cases.changed(fidelity().comparisons))
    assert changed == [
        ["hash1", "cyst", "cyst 52 %, student fp32", EVIL + " 52 %, student int8", "0.10"]
    ]
    assert "<script" not in written(tmp_path)


def test_captions_say_lost_and_the_worst_of_each_class():
    found = cases.captions(fidelity().comparisons)
    near = "nearer than 75 % of strangers"
    lost = "✗ lost: could be a stranger's; map and r of cyst"  # it answers otherwise
    assert found["hash1", MODELS[2]] == f"{lost}; {near}; lowest r of cyst"
    assert found["hash0", MODELS[2]] == near
    assert found["hash5", MODELS[2]] == f"{near}; lowest r of {EVIL}"
    assert ("hash1", MODELS[0]) not in found


def test_a_student_of_another_opinion_shows_its_own_map():
    teacher, student, _ = fidelity().comparisons
    images = [a.model_copy(update={"explained": EVIL}) for a in student.images]
    found = cases.captions([teacher, student.model_copy(update={"images": images})])
    assert f"r of {EVIL}" in found["hash1", student.name].split("; ")


def test_the_gallery_keeps_its_order_with_and_without_pictures(tmp_path):
    judged = fidelity()
    judged = judged.model_copy(
        update={"comparisons": (judged.comparisons[0], judged.comparisons[2])}
    )
    shown = {"fidelity": judged, "rows": rows(), "panels": list(panels())}
    whole = page(tmp_path / "a", **shown)
    bare = page(tmp_path / "b", **shown, pictures=False)
    for text in (whole, bare):
        assert re.findall(r"<code>(hash\d)</code>", text) == ["hash2", "hash1", "hash0"]
        assert "✗ lost: could be a stranger&#39;s" in text
        assert "r = 0.10" in text
    assert whole.count("data:image") == 9
    assert "data:image" not in bare
    assert "<img" not in bare
    assert "Pictures were left out" in bare


def test_the_page_asks_nobody_outside_and_every_drawing_has_words(tmp_path):
    text = written(tmp_path, panels=list(panels()))
    for found in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert found.startswith(("data:image/png;base64,", "#")), found[:80]
    assert not re.search(r"https?://|@import|<script", text)
    alts = re.findall(r'role="img" aria-label="([^"]+)">\s*<svg', text)
    assert text.count("<svg") == len(alts) == 4
    assert "student int8, corner text: 0.231" in alts[2]
    assert "student int8: mean 0.60, strangers 0.30" in alts[3]
    assert text.count("<img ") == len(re.findall(r'<img [^>]*alt="[^"]+"', text))
    assert written(tmp_path / "a") == written(tmp_path / "b")


def test_no_word_is_claimed_that_no_heat_map_can_bear(tmp_path):
    shown = told(written(tmp_path)).lower()
    for word in ("explainable", "clinically validated", "fda"):
        assert word not in shown
    for author in ("Arun", "Jin", "Ghassemi"):
        assert author.lower() in shown


def test_report_json_holds_the_records_figures(tmp_path):
    written(tmp_path, fidelity=fidelity("fail"))
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert (found["schema_version"], found["verdict"]) == (1, "fail")
    assert found["reasons"] == ["a reason", "What fail means here."]
    last = found["models"][-1]
    assert last["metrics"]["test_balanced_accuracy"]["value"] == 0.912
    assert last["timing"]["latency_ms"]["p90"] == pytest.approx(np.percentile([2] * 99 + [20], 90))
    assert last["timing"]["latency_ms"]["p95"] is None  # 100 calls do not bear it
    told = found["explanations"]
    assert told["margins_sha256"] == Margins().sha256
    step = told["comparisons"][2]
    assert step["aggregate"]["kappa"]["value"] == pytest.approx(0.6571)
    assert step["verdict"]["gates"][0] == GATES["fail"][0].model_dump()
    assert step["checks"]["shortcut: corner text"]["value"] == pytest.approx(0.231)
    assert step["images"] == 6  # a count: single images are in cases.csv
    assert told["published"]["teacher fp32"]["null"] == 0.951


def test_cases_csv_has_a_line_a_case_and_model(tmp_path):
    written(tmp_path)
    with (tmp_path / "cases.csv").open(encoding="utf-8", newline="") as f:
        found = list(csv.DictReader(f))
    assert [(x["image"], x["model"]) for x in found] == [
        (f"hash{i}", m) for m in MODELS for i in range(6)
    ]
    line = found[13]
    assert (line["answer"], line["label"], line["explained"]) == (EVIL, "cyst", "cyst")
    assert line["compressed_from"] == "student fp32"
    numbers = [float(line[k]) for k in ("probability", "pearson", "pearson_null", "lost")]
    assert numbers == [0.52, 0.1, 0.3, 1.0]
    assert len(found[0]) == 11


def test_an_undefined_figure_is_an_empty_cell():
    one = comparison(MODELS[2])
    flat = one.images[0].model_copy(update={"figures": {"pearson": None}})
    text = machine_readable.cases(
        fidelity(comparisons=(one.model_copy(update={"images": (flat,)}),))
    )
    assert text.splitlines()[1] == "hash0,cyst,student int8,,cyst,cyst,0.51,,0.3"


def test_margins_that_were_changed_are_refused(tmp_path):
    edited = fidelity(margins=Margins(kappa=0.5))
    with pytest.raises(EdgeKDError, match="not those that were declared"):
        written(tmp_path, fidelity=edited)
    later = PROFILE.model_copy(update={"margins": Margins(kappa=0.5)})
    with pytest.raises(EdgeKDError, match="changed after edgekd explain judged"):
        written(tmp_path, profile=later)
    assert not (tmp_path / "report.html").exists()


def test_a_coarse_layer_is_shown_as_its_cells():
    """The maps that are compared are on a finer grid: the cells are found again."""
    cells = np.array([[0, 1, 2], [3, 8, 4]], np.float32)
    shown = [comparison(MODELS[0]).model_copy(update={"layer": "stage4 80x2x3"}),
             comparison(MODELS[1])]  # fmt: skip
    maps = {m: to_grid(cells)[None] for m in MODELS[:2]}
    pixels = np.zeros((28, 42, 3), np.uint8)
    found = gallery.panel(0, "", shown, maps, pixels, None).maps
    expected = np.repeat(np.repeat(cells / 8, 14, 0), 14, 1)
    np.testing.assert_allclose(found[MODELS[0]], expected, atol=1e-5)
    smooth = unit(resize(to_grid(cells), (28, 42)))  # of a layer that is not known
    np.testing.assert_array_equal(found[MODELS[1]], smooth)


def test_the_gallery_has_the_lowest_and_then_some_of_each_class(tmp_path, monkeypatch):
    found = fidelity(r=(0.1, 0.2, 0.3, 0.8, 0.7, 0.6))
    (tmp_path / "explain").mkdir()
    np.savez(tmp_path / "explain" / explain.MAPS, **{m: np.ones((6, 14, 14)) for m in MODELS})
    record = SimpleNamespace(spec=rows()[0].artifact.spec)
    run = SimpleNamespace(folder=tmp_path, record=record)
    samples = [SimpleNamespace(digest=f"hash{i}", mask=None, label=0) for i in range(6)]
    monkeypatch.setattr(data, "pixels", lambda *_: np.zeros((32, 32, 3), np.uint8))
    dataset = SimpleNamespace(splits={"test": samples})
    swayed = Swayed(image="hash4", model=MODELS[2], marker="L upper left", before=("cyst", 0.9),
                    after=(EVIL, 0.7), moved=0.6)  # fmt: skip
    found = found.model_copy(update={"swayed": (swayed,)})
    shown, pairs = pipeline._gallery(run, dataset, found, 2)
    assert [(p.image, p.why) for p in shown] == [
        ("hash0", "lowest agreement"), ("hash1", "lowest agreement"),
        ("hash2", "best of cyst"), ("hash5", f"lowest of {EVIL}"),
        ("hash4", f"median of {EVIL}"), ("hash3", f"best of {EVIL}"),
    ]  # fmt: skip
    assert len(pipeline._gallery(run, dataset, found, 12)[0]) == 6
    assert (pairs[0].pixels[0] == 0).all()
    assert (pairs[0].pixels[1] == 255).any()
    text = written(tmp_path, fidelity=found, panels=shown, swayed=pairs)
    assert 'alt="the same with the marker L upper left"' in text
    assert text.count('alt="difference of the maps of') == 6
    bare = written(tmp_path, fidelity=found, panels=shown, swayed=pairs, pictures=False)
    assert "L upper left" in bare
    assert "<img" not in bare


def test_a_student_is_shown_through_its_teachers_masks(tmp_path):
    """Beside its own map: what it weighs of the parts that its teacher was shown."""
    rng = np.random.default_rng(0)
    maps = {m: rng.random((2, 14, 14), np.float32) for m in MODELS}
    through = np.stack([2 * maps[MODELS[0]][0], np.full((14, 14), np.nan, np.float32)])
    pixels = np.zeros((28, 28, 3), np.uint8)
    found = fidelity(r=(0.1, 0.2, 0.3, 0.8, 0.7, 0.6))
    shown = [gallery.panel(i, "", found.comparisons, maps, pixels, None, through) for i in (0, 1)]
    same, undefined = (p.through for p in shown)
    assert same.r == pytest.approx(1)  # the teacher's map twice as high is the same map
    np.testing.assert_allclose(same.heat, shown[0].maps[MODELS[0]], atol=1e-5)
    assert undefined == (None, None)
    text = written(tmp_path, fidelity=found, panels=shown)
    assert text.count("student, the same masks</span>") == 2
    assert 'r = 1.00</span><br><span class="more">shown the parts' in text
    bare = gallery.panel(0, "", found.comparisons, maps, pixels, None)
    assert "the same masks" not in written(tmp_path, fidelity=found, panels=[bare])


def test_the_difference_is_red_where_the_file_is_hotter():
    low, high = np.zeros((2, 2), np.float32), np.array([[0, 1], [0, 0.5]], np.float32)
    maps, origin = {"a": low, "b": high, "c": None}, {"b": "a", "c": "a"}
    pixels = np.zeros((2, 2, 3), np.uint8)
    shown = gallery.Panel("i", "cyst", pixels, None, maps, {}, {}, origin=origin)
    red = gallery.difference(shown, "b")
    assert red[0].tolist() == [[255, 255, 255], [178, 24, 43]]
    assert red[1, 1].tolist() == [216, 140, 149]
    back = shown._replace(origin={"a": "b"})
    assert gallery.difference(back, "a")[0, 1].tolist() == [33, 102, 172]
    assert gallery.difference(shown, "c") is None
    assert gallery.difference(shown, "a") is None


@pytest.mark.parametrize(("options", "pictures"), [([], True), (["--no-images"], False)])
def test_the_command_takes_no_images(tmp_path, monkeypatch, options, pictures):
    asked = {}
    here = Run(tmp_path, tmp_path, None, "", untracked)
    monkeypatch.setattr(command, "opened", lambda *_: here)
    monkeypatch.setattr(pipeline, "report", lambda _, **more: asked.update(more) or tmp_path)
    shown = CliRunner().invoke(main.app, ["report", *options])
    assert shown.exit_code == 0, shown.output
    assert asked == {"cases": 12, "pictures": pictures}
