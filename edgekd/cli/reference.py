"""The reference of all commands as Markdown, made from themselves: `docs/commands.md`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

from typer.models import OptionInfo

from edgekd.cli.main import COMMANDS

HEAD = """# Commands

Made from the code by `make reference`; do not edit. Every option is also a key of `--config FILE`,
a TOML file, without its dashes and with `_` between words (`epochs = 8`, `teacher = ["resnet34"]`).
A table with a command's name (`[quantize]`) holds keys of that command alone, so that one file
serves the whole line. The command line wins.
"""
TABLE = "| | option | takes | default | |\n|---|---|---|---|---|\n"


def reference() -> str:
    """A section for each command: what it does, and a table of its options by panel."""
    parts = [HEAD]
    for words, function in commands():
        parts.append(f"## `{' '.join(('edgekd', *words))}`\n\n{inspect.getdoc(function)}\n")
        if rows := list(options(function)):
            parts.append(TABLE + "".join(rows))
    return "\n".join(parts)


def commands() -> Iterator[tuple[tuple[str, ...], Callable[..., None]]]:
    """(words, function) of every command, those of a group after what the group itself does."""
    for name, entry in COMMANDS.items():
        app = importlib.import_module(f"edgekd.cli.{entry.module}").app
        for command in app.registered_commands:
            if (command.name or command.callback.__name__) == name:
                yield (name,), command.callback
        for group in app.registered_groups:
            if group.name == name:
                yield (name,), group.typer_instance.registered_callback.callback
                for command in group.typer_instance.registered_commands:
                    yield (name, command.name or command.callback.__name__), command.callback


def options(function: Callable[..., None]) -> Iterator[str]:
    """A row of the table for each argument and option; a panel's name stands beside its first."""
    panel = None
    for parameter in inspect.signature(function).parameters.values():
        if get_origin(parameter.annotation) is not Annotated:
            continue  # the context
        kind, told = get_args(parameter.annotation)
        if isinstance(told, OptionInfo):
            flags = [f for f in (told.default, *(told.param_decls or ())) if f is not ...]
            names = ", ".join(f"`{flag}`" for flag in flags)
        else:
            names = f"`{parameter.name.upper()}`"
        now = told.rich_help_panel or "Options"
        heading = f"**{now}**" if now != panel else ""
        value = parameter.default
        default = "" if value in (None, False, "", inspect.Parameter.empty) else f"`{value}`"
        text = (told.help or "").replace("|", "\\|")
        yield f"| {heading} | {names} | {_takes(kind, told)} | {default} | {text} |\n"
        panel = now


def _takes(kind: Any, told: Any) -> str:
    """The type of an option in a word, and its limits."""
    if told.metavar:
        return f"`{told.metavar}`"
    inner = [k for k in get_args(kind) if k is not type(None)] or [kind]
    many = get_origin(inner[0]) is list
    last = get_args(inner[0])[0] if many else inner[0]
    word = {"bool": "flag", "str": "text", "Path": "path", "int": "integer", "float": "number"}
    found = word[last.__name__] + (", repeatable" if many else "")
    low = "" if told.min is None else f"{told.min} ≤ "
    high = "" if told.max is None else f" ≤ {told.max}"
    return f"{found}, {low}x{high}" if low or high else found


if __name__ == "__main__":
    sys.stdout.write(reference())
