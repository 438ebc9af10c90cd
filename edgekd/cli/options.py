"""What all commands share: options that mean the same everywhere, `--config`, errors, results."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from edgekd.cli import streams

if TYPE_CHECKING:
    from edgekd.records import EdgeKDError, Record

RUNS = Path("runs")
OUTPUT = "Output"  # the panel that stands last


class Group(TyperGroup):
    """An EdgeKDError is one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: D102
        try:
            with streams.hushed(bool(ctx.params.get("quiet"))):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command again goes on from here", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as e:
            from edgekd.records import EdgeKDError, disk

            error = e if isinstance(e, EdgeKDError) else disk.told(e)
            if error is None:
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(exit_code(error)) from None


def new_app(**more: Any) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(cls=Group, rich_markup_mode="markdown", **more)


def exit_code(error: EdgeKDError) -> int:
    """Of a command that ends with `error`."""
    from edgekd.records import GateMissed, RuntimeUnavailable

    codes = {RuntimeUnavailable: 4, GateMissed: 3}
    return codes.get(type(error), 1)


def command(
    app: typer.Typer, name: str | None = None, *, group: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of `app`.

    A parameter that is a record of options (edgekd.records.options) becomes an option for each of
    its fields, in a panel of its own. Every command takes `--quiet` and `--config` as well. group:
    it is what `app` itself does where none of its commands is named.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups = {k: v for k, v in hints.items() if hasattr(v, "PANEL")}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in groups:
                parameters += _options_of(groups[parameter.name])
            else:
                parameters.append(parameter.replace(annotation=hints[parameter.name]))
        parameters.append(_parameter("quiet", QuietOption, False))
        parameters.append(_parameter("config", ConfigOption, None))
        last = [p for p in parameters if _panel(p) == OUTPUT]  # under one heading, at the end
        parameters = [p for p in parameters if p not in last] + last

        def called(config: None = None, quiet: bool = False, **given: Any) -> None:  # noqa: ARG001 it was read before
            for name, value in given.items():
                if isinstance(value, float) and not math.isfinite(value):  # no limit sees a NaN
                    raise _not_a_number(name, value)
            for group, kind in groups.items():
                values = {field: given.pop(field) for field in kind.model_fields}
                values = {k: v for k, v in values.items() if v is not None}
                given[group] = kind.parse(values, "options")
            with streams.hushed(quiet), _logs_shown():
                function(**given)

        functools.update_wrapper(called, function)
        del called.__wrapped__  # type: ignore[attr-defined]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        (app.callback() if group else app.command(name))(called)
        return function

    return register


def _not_a_number(name: str, value: float) -> EdgeKDError:
    from edgekd.records import EdgeKDError

    return EdgeKDError(f"--{name.replace('_', '-')} takes a finite number, got {value}")


class _Lines(logging.Handler):
    """What the pipeline says between its stages: a line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        from edgekd.cli import console

        console.say(record.getMessage())


@contextlib.contextmanager
def _logs_shown() -> Iterator[None]:
    """Meanwhile the pipeline knows whether anybody reads what it says, and need not find it out."""
    log = logging.getLogger("edgekd")
    if not any(isinstance(handler, _Lines) for handler in log.handlers):
        log.addHandler(_Lines())
    before = log.level
    log.setLevel(logging.CRITICAL if streams.quiet() else logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, annotation=annotation, default=default)


def _panel(parameter: inspect.Parameter) -> str | None:
    """The heading that an option stands under."""
    for told in get_args(parameter.annotation)[1:]:
        if found := getattr(told, "rich_help_panel", None):
            return found
    return None


def _options_of(kind: Any) -> Iterator[inspect.Parameter]:
    """A parameter for Typer of each field of a record of options."""
    hints = get_type_hints(kind)
    for name, field in kind.model_fields.items():
        limits: dict[str, Any] = {"min": None, "max": None}
        for rule in field.metadata:
            limits["min"] = getattr(rule, "ge", limits["min"])
            limits["max"] = getattr(rule, "le", limits["max"])
        flags = field.json_schema_extra["flags"] or ["--" + name.replace("_", "-")]
        told = typer.Option(*flags, help=field.description, rich_help_panel=kind.PANEL, **limits)
        annotation, default = hints[name], field.default
        if get_origin(annotation) is tuple:  # repeatable
            annotation, default = list[str] | None, None
        yield _parameter(name, Annotated[annotation, told], default)


def _read_config(context: typer.Context, path: Path | None) -> None:
    """Options from a TOML file as this command's defaults; what is given on the line wins.

    Keys are options without their dashes; a table with a command's name is for that command alone.
    EdgeKDError for a key that no option has, or a value that it does not take.
    """
    if path is None:
        return
    from edgekd.records import EdgeKDError, unknown
    from edgekd.records.store import read_toml

    table = read_toml(path, "configuration")
    named = context.info_name or ""
    others = context.parent.command.list_commands(context.parent) if context.parent else []  # type: ignore[attr-defined]
    mine = {k: v for k, v in table.items() if not (isinstance(v, dict) and k in others)}
    mine |= table.get(named, {})
    known = {max(p.opts, key=len).lstrip("-").replace("-", "_"): p for p in context.command.params}
    known = {k: p for k, p in known.items() if k not in ("config", "help")}
    found: dict[str, Any] = {}
    for key, value in mine.items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            raise EdgeKDError(f"{path}: {unknown(f'option of {named}', key, known)}")
        try:
            option.process_value(context, value)
        except (typer.BadParameter, TypeError, ValueError) as e:
            why = getattr(e, "message", str(e))
            raise EdgeKDError(f"{path}: {key} = {value!r}: {why}") from None
        found[option.name or ""] = value
    context.default_map = {**(context.default_map or {}), **found}


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=_read_config, metavar="FILE",
        rich_help_panel=OUTPUT,
        help="TOML file of options, such as epochs = 8; the command line wins.",
    ),
]  # fmt: skip
RunsOption = Annotated[
    Path, typer.Option("--runs", help="Folder of all runs.", rich_help_panel=OUTPUT)
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", help="This run's folder. [default: the latest]", rich_help_panel=OUTPUT),
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", "-p", help="Profile: a name or a .toml file.")
]
ProfilesOption = Annotated[
    list[str] | None, typer.Option("--profile", "-p", help="As many as share the supernet.")
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split", help="given, grouped or random. [default: the data's own, the rest grouped]"
    ),
]
LeakageOption = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Go on although splits share images; results say so."),
]
SizeOption = Annotated[
    int | None, typer.Option("--size", min=32, max=1024, help="Pixels a side. [default: profile's]")
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Fixes the result on a CPU.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Public key that must have signed the bundle.")
]
AbstainOption = Annotated[
    float | None,
    typer.Option("--abstain-below", min=0, max=1, help="Calibrated probability that an answer "
                 "needs. [default: the bundle's]"),
]  # fmt: skip
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", rich_help_panel=OUTPUT,
        help="No progress and no notes on stderr; results and errors as ever.",
    ),
]  # fmt: skip
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=OUTPUT)
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace what was made before.", rich_help_panel=OUTPUT)
]


def result(as_json: bool, data: Record | dict | list, shown: Any) -> None:
    """The result on stdout: one JSON document, or what a reader wants to see.

    Of several processes the first alone speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from edgekd.records import Record

    if as_json:
        content = data.model_dump(mode="json") if isinstance(data, Record) else data
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    elif isinstance(shown, str):
        sys.stdout.write(shown + "\n")
    else:
        from edgekd.cli import console

        console.on_stdout(shown)


def trains() -> None:
    """Called before torch is loaded: its threads sleep while they wait for each other.

    A core that another program takes then costs its share, not a step twenty times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def given(context: typer.Context, *but: str) -> str:
    """The options that were given, on the command line or by --config, as given on the line."""
    words: list[str] = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in (*but, "quiet", "config") or source is None:
            continue
        if source.name not in ("COMMANDLINE", "DEFAULT_MAP"):
            continue
        value = context.params[option.name or ""]
        if value is False:
            continue
        words.append(max(option.opts, key=len))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
