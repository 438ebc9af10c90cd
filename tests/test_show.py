"""What a table says of an artifact's scores."""

import io

from rich.console import Console
from test_report import evaluated, rows

from edgekd import show


def shown(what):
    console = Console(width=200, file=io.StringIO())
    console.print(what)
    return " ".join(console.file.getvalue().split())


def test_the_headline_figures_stand_beside_the_teachers():
    teacher, student = (row.artifact for row in evaluated())
    text = shown(show.artifact(student, teacher))
    for line in (
        "test ECE before calibration - 0.083", "test ECE - 0.027", "temperature - 1.618",
        "thresholds chosen for - sensitivity 0.95",
        "beside teacher fp32, 8 images: only this right 21, only the other 33, McNemar mid-p "
        "0.0421; balanced accuracy -0.123 [-0.134, -0.110]",
    ):  # fmt: skip
        assert line in text, line


def test_what_was_not_compared_is_said():
    teacher, student = (row.artifact for row in rows())
    text = shown(show.artifact(student, teacher))
    assert "not compared image by image with teacher fp32: it keeps no answers" in text
    assert "ECE" not in text
