"""What a table says of an artifact's scores."""

import io

from report.test_explanations import fidelity
from report.test_page import evaluated, rows
from report.test_page import fidelity as unjudged
from rich.console import Console

from edgekd.cli import console


def shown(what):
    console = Console(width=200, file=io.StringIO())
    console.print(what)
    return " ".join(console.file.getvalue().split())


def test_the_headline_figures_stand_beside_the_teachers():
    teacher, student = (row.artifact for row in evaluated())
    text = shown(console.artifact(student, teacher))
    for line in (
        "test ECE before calibration - 0.083", "test ECE - 0.027", "temperature - 1.618",
        "thresholds chosen for - sensitivity 0.95",
        "beside teacher fp32, 8 images: only this right 21, only the other 33, McNemar mid-p "
        "0.0421; balanced accuracy -0.123 [-0.134, -0.110]",
    ):  # fmt: skip
        assert line in text, line


def test_what_was_not_compared_is_said():
    teacher, student = (row.artifact for row in rows())
    text = shown(console.artifact(student, teacher))
    assert "not compared image by image with teacher fp32: it keeps no answers" in text
    assert "ECE" not in text


def test_a_student_that_was_kept_as_cut_is_called_so():
    student = rows()[1].artifact
    kept = "no epoch was better on the validation split than the sub-net as cut: it is kept"
    for epoch, said in ((0, True), (1, False)):
        its = student.model_copy(update={"settings": {"best_epoch": epoch}})
        assert (kept in shown(console.artifact(its))) is said


def test_the_verdict_its_reasons_and_what_did_not_hold():
    text = shown(console.fidelity(fidelity("fail")))
    for line in (
        "kappa 0.86 [0.84, 0.88] (0.00) 0.85 [0.83, 0.87] (0.00) 0.66 [0.64, 0.68] (0.00)",
        "student int8: kappa of the maps fail at least 0.8 0.610 [0.590, 0.630] -",
        "verdict: FAIL a reason What fail means here.",
        "student int8, try 1: use bf16 <script>alert(1)</script>",
    ):
        assert line in text, line
    assert "lost of the maps" not in text  # it held
    text = shown(console.fidelity(fidelity("inconclusive")))
    assert "lost of the maps inconclusive at most 0.1 0.110 [0.090, 0.130] 234" in text
    assert "did not hold" not in shown(console.fidelity(fidelity("pass")))
    assert "verdict" not in shown(console.fidelity(unjudged()))
