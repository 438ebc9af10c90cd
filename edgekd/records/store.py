"""What a record is: frozen, plain data, stored as JSON; the errors; files written whole or not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgekd.records.disk import refused, words
from edgekd.records.errors import EdgeKDError, unknown

if sys.version_info >= (3, 11):
    from typing import Self

    import tomllib
else:
    import tomli as tomllib
    from typing_extensions import Self

T = TypeVar("T")
SCHEMA = 1  # of every JSON file written here; a reader refuses any other


class Track(Protocol):
    """How a long stage shows its progress: iterate over `track(items, "what", total)`."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """The same items, counted; an item with a `size` (an index array) counts as that many."""


def untracked(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:  # noqa: ARG001
    """The default: no progress shown."""
    return items


class Record(BaseModel):
    """Base of all records: frozen, unknown keys rejected with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str) -> Self:
        """A record from plain data; EdgeKDError naming `source` if a key or value is wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise EdgeKDError(f"{source}: {_first_mistake(e, cls)}") from None


def _first_mistake(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first error of pydantic's list as a sentence with what was given and expected."""
    mistake = error.errors(include_url=False)[0]
    *parents, key = mistake["loc"] or ("",)
    where = "".join(f"{p}." for p in parents)
    if mistake["type"] == "extra_forbidden":
        known: Iterable[str] = cls.model_fields
        for p in parents:
            inner = getattr(known, "get", lambda _: None)(p) if isinstance(known, dict) else None
            inner = getattr(inner, "annotation", None)
            known = getattr(inner, "model_fields", {})
        return where + unknown("key", str(key), [k for k in known if k != "schema_version"])
    if not mistake["loc"]:  # of the record as a whole
        return mistake["msg"].removeprefix("Value error, ")
    given = "" if mistake["type"] == "missing" else f", got {mistake['input']!r}"
    return f"{where}{key}: {mistake['msg']}{given}"


class Stored(Record):
    """A record with a file of its own in the folder that its stage writes."""

    FILE: ClassVar[str]
    schema_version: int = SCHEMA

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The record in `folder`; EdgeKDError if the stage never finished or it is not ours."""
        path = folder / cls.FILE
        try:
            data = json.loads(read_text(path))
        except FileNotFoundError:
            raise EdgeKDError(f"{folder} holds no {cls.FILE}: run that stage (again)") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise EdgeKDError(f"{path} is not JSON ({e}): delete {folder}, run again") from None
        return cls.read(data, str(path))

    @classmethod
    def read(cls, data: Any, source: str) -> Self:
        """The record of a file's JSON; EdgeKDError if it is of another version, too."""
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA:
            raise EdgeKDError(
                f"{source} has schema version {version}, this edgekd reads {SCHEMA}: "
                "use the edgekd that wrote it, or run the stage again"
            )
        return cls.parse(data, source)

    @classmethod
    def kept(cls, folder: Path, asked: Mapping[str, Any]) -> Self | None:
        """The record in `folder` if there is one whose fields are as `asked`."""
        if not (folder / cls.FILE).exists():
            return None
        old = cls.load(folder)
        return old if all(getattr(old, name) == value for name, value in asked.items()) else None

    def save(self, folder: Path) -> Self:
        """Write the record's file into `folder`, atomically; to be called last by a stage."""
        write_atomic(folder / self.FILE, self.model_dump_json(indent=1) + "\n")
        return self


def read_text(path: Path) -> str:
    """A text file in UTF-8, UTF-16 or UTF-32, with a byte order mark or without, as editors save
    it; line ends as they are. OSError, UnicodeError.
    """
    data = path.read_bytes()
    return data.decode(json.detect_encoding(data))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; EdgeKDError if it cannot be read. what: it is, for the message."""
    try:
        return tomllib.loads(read_text(path))
    except (OSError, UnicodeError) as e:
        raise EdgeKDError(f"cannot read {what} {path}: {e}") from None
    except tomllib.TOMLDecodeError as e:
        raise EdgeKDError(f"{path} is not TOML: {e}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each package that is installed, without importing it."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for p in ("edgekd", *packages):
        try:
            found[p] = metadata.version(p)
        except metadata.PackageNotFoundError:
            continue
    return found


def make_folder(path: Path, other: str = "") -> Path:
    """Create `path` and prove that it can be written to; EdgeKDError with the reason if not.

    other: which option names another folder, for the message.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as e:
        why = f"{words(e)}; {other or _elsewhere(path)}"
        raise EdgeKDError(f"cannot write to folder {path}: {why}") from None


@contextlib.contextmanager
def needing(error: Callable[[str], EdgeKDError]) -> Iterator[None]:
    """A package that is imported within and is not installed is `error`, made of its name."""
    try:
        yield
    except ModuleNotFoundError as e:
        name = e.name or ""
        if name.startswith("edgekd"):
            raise  # ours is missing: a bug, not an install
        raise error(name) from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: temporary file in the same folder, fsync, rename."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as e:
        raise refused(path, e) from None
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as e:
        Path(temporary).unlink(missing_ok=True)
        raise refused(path, e) from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """Add a line to a file; EdgeKDError with the reason if that cannot be."""
    try:
        with path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
    except OSError as e:
        raise refused(path, e) from None


class Journal:
    """What a long stage has done so far, a line of JSON each: a kill costs the one at work."""

    def __init__(self, path: Path, asked: Mapping[str, Any]):
        """`done` is what the file at `path` has of the same question; of another one, nothing."""
        self.path = path
        self.done: list[Any] = []
        question = json.dumps(asked, sort_keys=True)
        text = path.read_text("utf-8") if path.exists() else ""
        lines = text.split("\n")[:-1]  # what a kill tore does not end: 0.11 may be left of 0.114
        if lines and lines[0] == question:
            with contextlib.suppress(json.JSONDecodeError):
                self.done.extend(json.loads(line) for line in lines[1:])
        write_atomic(path, "\n".join([question, *map(json.dumps, self.done)]) + "\n")

    def add(self, item: Any) -> None:
        """Plain data, in the file before the next is begun."""
        self.done.append(item)
        append(self.path, json.dumps(item))


def user_cache() -> Path:
    """Where what holds for this machine is kept: $XDG_CACHE_HOME/edgekd or ~/.cache/edgekd."""
    return _of_user("XDG_CACHE_HOME", ".cache")


def user_state() -> Path:
    """Where what is to last is kept: $XDG_STATE_HOME/edgekd or ~/.local/state/edgekd."""
    return _of_user("XDG_STATE_HOME", ".local/state")


def _elsewhere(path: Path) -> str:
    """How another folder is named in the place of `path`."""
    for folder, variable in ((user_cache, "XDG_CACHE_HOME"), (user_state, "XDG_STATE_HOME")):
        with contextlib.suppress(EdgeKDError):
            if path.is_relative_to(folder()):
                return f"set {variable} to a folder that can be written to"
    return "choose another folder"


def _of_user(variable: str, usual: str) -> Path:
    """EdgeKDError where neither the variable nor the user has a folder: in a container, say."""
    if named := os.environ.get(variable):
        return Path(named) / "edgekd"
    try:
        return Path.home() / usual / "edgekd"
    except RuntimeError:
        raise EdgeKDError(
            f"this user has no home folder for {usual}: set HOME, or XDG_CACHE_HOME and "
            "XDG_STATE_HOME, to folders that can be written to"
        ) from None
