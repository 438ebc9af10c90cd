"""How a drawing of the report begins and ends: matplotlib in, inline SVG out."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4c566a", "#2a6f97", "#bc5090", "#7a9e3a", "#c77d12")  # told apart without red-green
Drawing = tuple[str, str]  # SVG, and its words for those who do not see it


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, and its axes without a box."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def svg(figure: Figure) -> str:
    """A matplotlib figure as inline SVG without outside names, the same bytes each time."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "edgekd", "svg.fonttype": "none"}):
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True
        )
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.S)
    found = re.sub(r' xmlns(:\w+)?="[^"]*"', "", found)  # HTML's own parser needs none
    found = re.sub(r'<g id="[^"]*"', "<g", found)  # "axes_1" in every drawing
    return found.replace("xlink:href", "href")
