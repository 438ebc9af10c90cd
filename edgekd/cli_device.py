"""What runs at the bedside: predict."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.options import JsonOption, result
from edgekd.records import EdgeKDError, make_folder, write_atomic

if TYPE_CHECKING:
    from edgekd.device.model import Answer, Model

IMAGES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", "")
STDIN = "-"
LARGEST = 512 << 20  # bytes of one file


def predict(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders of them, or - for one from stdin.")
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="A bundle.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key that must have signed it.")
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", help="Folder for what each answer looks at: PNG, by hash."),
    ] = None,
    abstain_below: Annotated[
        float | None,
        typer.Option("--abstain-below", min=0, max=1, help="Calibrated probability that an answer "
                     "needs. [default: the bundle's]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What a bundle's model says of images: label, probabilities, and what is unusual of them.

    Not for diagnosis. Exit 1 if a file could not be read; the others are answered all the same.

    Examples: edgekd predict film.png -m cpu.edgekd --explain maps · edgekd predict study/ -m
    cpu.edgekd --json
    """
    from edgekd import show, show_device
    from edgekd.device.model import open_bundle

    found: list[tuple[str, Answer]] = []
    failed = []
    with show.tracker() as track:
        files = list(_files(images))
        opened = open_bundle(model, key, abstain_below)
        if explain is not None:
            make_folder(explain)
        for name in track(files, "images", len(files)):
            try:
                found.append((name, _answered(opened, name, explain)))
            except EdgeKDError as e:
                failed.append((name, str(e)))
    told = [{"file": name, **a.model_dump(mode="json")} for name, a in found]
    told += [{"file": name, "error": why} for name, why in failed]
    result(as_json, told, show_device.answers(found))
    for name, why in failed:
        show.say(f"{name}: {why}")
    if failed:
        raise typer.Exit(1)


def _files(given: list[str]) -> Iterator[str]:
    """Each file once, those of a folder by name; EdgeKDError for what is not there."""
    for name in dict.fromkeys(given):
        path = Path(name)
        if name == STDIN or path.is_file():
            yield name
        elif path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
            images = [str(p) for p in inside if p.suffix.lower() in IMAGES]
            if not images:
                raise EdgeKDError(f"no image in {path}: JPEG, PNG and DICOM are read")
            yield from images
        else:
            raise EdgeKDError(f"no file {name}")


def _answered(model: Model, name: str, explain: Path | None) -> Answer:
    """The answer to one file; its overlay goes to folder `explain`."""
    from edgekd.device.model import overlay

    seen = model.see(_bytes(name))
    (answer,) = model.answer([seen])
    if explain is not None:
        label = answer.label or max(answer.probabilities, key=answer.probabilities.__getitem__)
        heat = model.why(seen, label)
        if heat is not None:
            write_atomic(explain / f"{answer.image[:12]}-{_plain(label)}.png", overlay(seen, heat))
    return answer


def _bytes(name: str) -> bytes:
    """A file's bytes, or stdin's."""
    try:
        if name == STDIN:
            data = sys.stdin.buffer.read(LARGEST + 1)
        else:
            with Path(name).open("rb") as f:
                data = f.read(LARGEST + 1)
    except OSError as e:
        raise EdgeKDError(f"cannot be read: {e.strerror}") from None
    if len(data) > LARGEST:
        raise EdgeKDError(f"more than {LARGEST >> 20} MB: no image is")
    return data


def _plain(label: str) -> str:
    """A class's name as a part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in label)
