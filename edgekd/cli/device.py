"""What runs at the bedside: predict and serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.options import AbstainOption, JsonOption, KeyOption, command, new_app, result
from edgekd.records import EdgeKDError, RuntimeUnavailable, make_folder, needing, write_atomic

if TYPE_CHECKING:
    from edgekd.serve.model import Answer, Model

STDIN = "-"
app = new_app()
LARGEST = 512 << 20  # bytes of one file


@command(app)
def predict(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders of them, or - for one from stdin.")
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="A bundle.")],
    key: KeyOption = None,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", help="Folder for what each answer looks at: PNG, by hash."),
    ] = None,
    abstain_below: AbstainOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Answer image files with a bundle's model.

    Label, probabilities, and what is unusual of an image. Not for diagnosis. Exit 1 if a file
    could not be read; the others are answered all the same.

    Examples:
    - `edgekd predict film.png -m cpu.edgekd --explain maps`
    - `edgekd predict study/ -m cpu.edgekd --json`
    """
    from edgekd.cli import console, console_device
    from edgekd.data.files import printable
    from edgekd.serve.model import open_bundle

    found: list[tuple[str, Answer]] = []
    failed = []
    with console.tracker() as track:
        files = list(_files(images))
        opened = open_bundle(model, key, abstain_below)
        if explain is not None:
            make_folder(explain)
        for name in track(files, "images", len(files)):
            try:
                found.append((printable(name), _answered(opened, name, explain)))
            except EdgeKDError as e:
                failed.append((printable(name), str(e)))
    told = [{"file": name, **a.model_dump(mode="json")} for name, a in found]
    told += [{"file": name, "error": why} for name, why in failed]
    result(as_json, told, console_device.answers(found))
    for name, why in failed:
        console.say(f"{name}: {why}", needed=True)
    if failed:
        raise typer.Exit(1)


def _files(given: list[str]) -> Iterator[str]:
    """Each file once, those of a folder by name; EdgeKDError for what is not there."""
    from edgekd.cli import console
    from edgekd.data import files

    for name in dict.fromkeys(given):
        path = Path(name)
        if name == STDIN or path.is_file():
            yield name
        elif path.is_dir():
            try:
                found = files.walk(path)
            except OSError as e:
                raise EdgeKDError(f"folder {e.filename} cannot be listed: {e.strerror}") from None
            if not found.images:
                raise EdgeKDError(f"no image in {path}: JPEG, PNG and DICOM are read")
            if found.passed:
                console.say(f"{name}: {files.passed_over(found.passed)}")
            if found.other:
                console.say(f"{name}: {found.other} ignored: no JPEG, PNG or DICOM")
            yield from map(str, found.images)
        else:
            raise EdgeKDError(f"no file {name}")


def _answered(model: Model, name: str, explain: Path | None) -> Answer:
    """The answer to one file; its overlay goes to folder `explain`."""
    from edgekd.serve.model import overlay

    seen = model.see(_bytes(name))
    (answer,) = model.answer([seen])
    if explain is not None:
        label = answer.foremost
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
    """A class's name, or its beginning, as a part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in label)[:50]


@command(app)
def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    key: KeyOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8080,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="Its first line must be sent with each request; needed "
                     "off loopback. Or EDGEKD_TOKEN in the environment."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key, PEM.")] = None,
    insecure_http: Annotated[
        bool, typer.Option("--insecure-http", help="Off loopback without TLS.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME[:PORT]", help="What browsers call this server "
                     "by, through a reverse proxy, beside localhost; repeatable, wants a token."),
    ] = None,
    root_path: Annotated[
        str,
        typer.Option("--root-path", metavar="PATH", help="Where a reverse proxy serves it, as "
                     "/edgekd; whether the proxy passes it on or not."),
    ] = "",
    audit: Annotated[
        Path | None,
        typer.Option("--audit", help="Log of all answers; 16 files of 64 MB are kept. "
                     "[default: ~/.local/state/edgekd/audit.jsonl]"),
    ] = None,
    abstain_below: AbstainOption = None,
    queue: Annotated[
        int, typer.Option("--queue", min=1, max=10_000, help="Images held at a time, then 503.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.5, max=3600, help="Seconds for one request: 408 if "
                            "it does not arrive, 504 if it is not answered. As long to stop."),
    ] = 30.0,
    max_mb: Annotated[
        float, typer.Option("--max-mb", min=0.01, max=1000, help="Of one file, in 1e6 bytes: 413.")
    ] = 64.0,
    max_megapixels: Annotated[
        float, typer.Option("--max-megapixels", min=0.01, max=64, help="Of one image: 422.")
    ] = 32.0,
    dicom: Annotated[
        int | None,
        typer.Option("--dicom", min=0, max=65535, metavar="PORT", help="Take images by DICOM "
                     "C-STORE as well, at this port of --host; 0: any free one."),
    ] = None,
    aet: Annotated[
        str | None,
        typer.Option("--aet", metavar="NAME", help="AE title that it is called by. "
                     "[default: EDGEKD]"),
    ] = None,
    send_to: Annotated[
        str | None,
        typer.Option("--send-to", metavar="AET@HOST:PORT", help="DICOM node that gets each answer "
                     "as a Structured Report, and its map as a Secondary Capture."),
    ] = None,
    dicom_from: Annotated[
        list[str] | None,
        typer.Option("--dicom-from", metavar="AET", help="AE title whose images are taken; "
                     "repeatable, needed off loopback. [default: any]"),
    ] = None,
    insecure_dicom: Annotated[
        bool, typer.Option("--insecure-dicom", help="DICOM over a network, which nothing encrypts.")
    ] = False,
) -> None:  # fmt: skip
    """Answer images by HTTP, with a web page, and by DICOM.

    The page shows answers and maps. With --dicom images come by C-STORE too, and answers go to the
    node --send-to. Not for diagnosis. To this machine alone, unless --host says otherwise. Exit 0
    after SIGTERM, when what was accepted is answered.

    Examples:
    - `edgekd serve cpu.edgekd`
    - `edgekd serve cpu.edgekd --host 0.0.0.0 --token-file token --tls-cert cert.pem --tls-key
      key.pem`
    - `edgekd serve cpu.edgekd --dicom 11112 --send-to ARCHIVE@10.0.0.2:104 --insecure-dicom`
    """
    with needing(
        lambda lacks: RuntimeUnavailable(f"edgekd serve needs {lacks}: pip install 'edgekd[serve]'")
    ):
        from edgekd.serve import auth, server
        from edgekd.serve.api import Settings
    from edgekd.cli import console
    from edgekd.serve import dicom_peers
    from edgekd.serve.audit import default
    from edgekd.serve.model import open_bundle

    spoken = dicom_peers.chosen(dicom, aet, send_to, dicom_from or [], insecure_dicom)
    if spoken is not None:
        with needing(lambda _: RuntimeUnavailable(dicom_peers.INSTALL)):
            from edgekd.serve import dicom_scp  # noqa: F401
    settings = Settings(
        host=host, port=port, token=auth.token(token_file), tls_cert=tls_cert, tls_key=tls_key,
        insecure_http=insecure_http,
        allowed_hosts=tuple(auth.allowed_host(name) for name in allowed_host or ()),
        root_path=auth.root_path(root_path), audit=audit or default(),
        max_bytes=round(max_mb * 1e6), queue=queue, timeout_s=timeout, dicom=spoken,
    )  # fmt: skip
    server.check(settings)
    pixels = round(max_megapixels * 1e6)
    said = partial(console.say, needed=True)  # the address, and what was lost
    server.run(open_bundle(bundle, key, abstain_below, pixels), settings, said)
