"""What every HTML page begins with: its template, and matplotlib without traces."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent


def template(name: str, folder: Path = HERE) -> Template:
    """The template `name` of `folder` or this one, every value escaped; drawings alone are safe.

    EdgeKDError where jinja2 is absent.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError:
        raise EdgeKDError("the report needs jinja2: pip install 'edgekd[report]'") from None
    loader = FileSystemLoader([folder, HERE])
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return found.get_template(name)


def import_plotting() -> None:
    """Import matplotlib so that it leaves no font cache behind (unless MPLCONFIGDIR is set).

    EdgeKDError where it is absent.
    """
    with tempfile.TemporaryDirectory() as folder:
        chosen = os.environ.setdefault("MPLCONFIGDIR", folder)
        try:
            import matplotlib.figure  # noqa: F401
        except ModuleNotFoundError:
            raise EdgeKDError("the report needs matplotlib: pip install 'edgekd[report]'") from None
        finally:
            if chosen == folder:
                del os.environ["MPLCONFIGDIR"]
