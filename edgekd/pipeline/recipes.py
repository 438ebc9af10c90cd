"""Recipes: a study as the commands that make it, with what its paper does not say."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from edgekd.records import EdgeKDError, Record, read_toml, unknown

SHIPPED = Path(__file__).with_name("recipes")
TAKE_DATA = ("teach", "shrink", "search", "distill")


class Recipe(Record):
    """A study that anyone can repeat."""

    name: str
    title: str
    source: str
    data: str  # what the folder must hold, and where it comes from
    unknown: tuple[str, ...] = Field(min_length=1)  # what the paper leaves open, and what we took
    steps: tuple[str, ...] = Field(min_length=1)  # edgekd's commands; {runs} is the folder of runs

    @classmethod
    def read(cls, name: str) -> Recipe:
        """A shipped recipe by name, or a .toml file."""
        path = Path(name)
        if path.suffix != ".toml":
            if name not in shipped():
                raise EdgeKDError(unknown("recipe", name, shipped()))
            path = SHIPPED / f"{name}.toml"
        table = read_toml(path, "recipe")
        return cls.parse({"name": path.stem} | table, str(path))

    def commands(self, data: Path, runs: Path) -> list[list[str]]:
        """The arguments of each step's command."""
        found = []
        for step in self.steps:
            words = [w.replace("{runs}", str(runs)) for w in shlex.split(step)]
            words += ["--runs", str(runs)]
            found.append([*words, *(["--data", str(data)] if words[0] in TAKE_DATA else [])])
        return found

    def play(
        self,
        data: Path,
        runs: Path,
        call: Callable[[list[str]], int],
        say: Callable[[str], None],
        *,
        as_json: bool,
    ) -> tuple[list[dict[str, Any]], int]:
        """Every step by `call`, which gives its exit code: (what each printed, exit code).

        Over a limit (3) or undecided (6), the study goes on, and ends with the first such code;
        any other ends it.
        """
        told: list[dict[str, Any]] = []
        over = 0
        for number, words in enumerate(self.commands(data, runs), 1):
            say(f"step {number} of {len(self.steps)}: edgekd {shlex.join(words)}")
            said = io.StringIO()
            with contextlib.redirect_stdout(said if as_json else sys.stdout):
                code = call([*words, *(["--json"] if as_json else [])])
            if code not in (0, 3, 6):
                return told, code
            if code:
                what = "over a limit" if code == 3 else "undecided"
                say(f"{what}: edgekd {self.steps[number - 1]}")
            over = over or code
            printed = json.loads(said.getvalue()) if as_json else None
            told.append({"step": self.steps[number - 1], "result": printed})
        return told, over


def shipped() -> Sequence[str]:
    """Names of the recipes that come with edgekd."""
    return sorted(p.stem for p in SHIPPED.glob("[!.]*.toml"))
