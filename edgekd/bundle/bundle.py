"""One file with all that a device needs, that proves itself: `NAME.edgekd`.

A plain zip, stored without compression, so that the same input is the same bytes everywhere:

    bundle.json      the Manifest: what is inside, by SHA-256
    signature.json   Ed25519 over the bytes of bundle.json
    model/           what the profile's runtime loads, with artifact.json and golden samples
    onnx/            what it can be built from on a device
    expected.npz     the golden samples' maps, as the file gave them here
    familiar.npz     what images are usually like, for a warning of others
    timing.json, fidelity.json, report.html, card.md, requirements.txt, sbom.cdx.json

Nothing in it is of a patient: golden samples are drawn, the report has no pictures, and what is
said of single images stays here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from edgekd import __version__, runtimes
from edgekd.bundle import out_of_distribution, requirements, signing
from edgekd.bundle.out_of_distribution import Familiar
from edgekd.data import preprocess
from edgekd.explain import score_cam
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Fidelity,
    Profile,
    Record,
    Stored,
    Timing,
    make_folder,
    write_atomic,
)
from edgekd.report import machine_readable
from edgekd.runtimes import golden

R = TypeVar("R", bound=Record)
SUFFIX = ".edgekd"
SIGNATURE = "signature.json"
UNPACKED = "unpacked"  # folder, beside a bundle that was deployed, of all that is in it
BUILT = "built"  # folder, beside what is unpacked, of a model that was made on the device
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every entry
LARGEST = 2 << 30  # bytes of a bundle
MOST = 64  # entries
INSIDE = re.compile(r"(model|onnx)/\w[\w .+-]*")  # entries of an artifact
EXPECTED = "expected.npz"


class Manifest(Stored):
    """What is in a bundle."""

    FILE: ClassVar[str] = "bundle.json"
    name: str
    edgekd: str  # version that made it
    profile: Profile
    model: str  # sha256 of the file that the device loads
    precision: str
    classes: tuple[str, ...]
    temperature: float
    layer: str
    intended_use: str
    verdict: str  # of its explanations: "pass", "fail", ...; empty: not judged
    abstain_below: float  # calibrated probability: no answer is given under it; 0: always one
    despite: str  # why it was bundled although that is no pass; empty: it is
    buildable: bool  # has ONNX in the model's precision, for what must be built on the device
    requirements: tuple[str, ...]
    files: dict[str, str]  # path -> sha256


FILES = (Manifest.FILE, SIGNATURE, EXPECTED, out_of_distribution.FILE, Timing.FILE, Fidelity.FILE,
         "report.html", "card.md", "requirements.txt", "sbom.cdx.json")  # fmt: skip


class Checked(NamedTuple):
    """A bundle whose every byte is what its manifest says."""

    manifest: Manifest
    signer: str  # fingerprint of the key that signed it; empty: nobody did
    trusted: bool  # that key is the one that was asked for


# ---- making one


class Given(NamedTuple):
    """What is bundled."""

    model: Artifact
    profile: Profile  # the device's
    source: Artifact | None = None  # ONNX that says the same; None: `model` is, or there is none
    timing: Timing | None = None
    fidelity: Fidelity | None = None
    report: bytes = b""  # the page, without pictures
    usual: Familiar | None = None  # what images are usually like
    here: Profile | None = None  # that the file runs with on this machine; None: with the device's


def make(
    out: Path,
    given: Given,
    *,
    intended_use: str,
    abstain_below: float = 0.0,
    despite: str = "",
    key: Path | None = None,
) -> Manifest:
    """Write the bundle to file `out`, whole or not at all.

    key: PEM file of an Ed25519 private key; None: unsigned.
    """
    model, fidelity = given.model, given.fidelity
    if given.source is not None and not rebuilds(given.source, model):
        raise EdgeKDError(
            f"{given.source.path} is no ONNX in {model.precision}: {model.path} cannot be built "
            "from it; bundle it without"
        )
    profile = given.profile.model_copy(update={"latency_table": ""})  # a path of ours
    wanted = requirements.requirements(profile.runtime)
    content = dict(_contents(given, intended_use, wanted))
    manifest = Manifest(
        name=out.name.removesuffix(SUFFIX),
        edgekd=__version__,
        profile=profile,
        model=model.sha256,
        precision=model.precision,
        classes=model.spec.classes,
        temperature=model.temperature,
        layer=model.layer,
        intended_use=intended_use,
        verdict=(fidelity.verdict or "") if fidelity else "",
        abstain_below=abstain_below,
        despite=despite,
        buildable=given.source is not None or model.path.suffix == ".onnx",
        requirements=wanted,
        files={name: hashlib.sha256(data).hexdigest() for name, data in sorted(content.items())},
    )
    first = (manifest.model_dump_json(indent=1) + "\n").encode()
    whole = {Manifest.FILE: first}
    if key is not None:
        whole[SIGNATURE] = (
            signing.signed(first, signing.private_key(key)).model_dump_json() + "\n"
        ).encode()
    make_folder(out.parent)
    write_atomic(out, _zipped(whole | content))
    return manifest


def _contents(
    given: Given, intended_use: str, wanted: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of all but the manifest and its signature."""
    yield from _shipped(given.model, "model")
    if given.source is not None:
        yield from _shipped(given.source, "onnx")
    yield EXPECTED, expected(given.model, given.here or given.profile)
    if given.timing is not None:
        yield Timing.FILE, _json(given.timing)
    if given.fidelity is not None:
        steps = tuple(c.model_copy(update={"images": ()}) for c in given.fidelity.comparisons)
        bare = given.fidelity.model_copy(
            update={"comparisons": steps, "swayed": (), "survived": ()}
        )
        yield Fidelity.FILE, _json(bare)
    if given.usual is not None:
        yield out_of_distribution.FILE, out_of_distribution.packed(given.usual)
    if given.report:
        yield "report.html", given.report
    lines = (
        f"- {key}: {value}\n" for key, value in machine_readable.card(given.model, intended_use)
    )
    yield "card.md", "".join(("# Model card\n\n", *lines)).encode()
    yield "requirements.txt", "".join(f"{x}\n" for x in wanted).encode()
    yield "sbom.cdx.json", requirements.sbom(given.model, wanted)


def _json(record: Record) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def shipped_record(artifact: Artifact) -> Artifact:
    """The artifact without what says how it was made here and how single images were judged."""
    kept = [*artifact.deployed, *(f for f in artifact.files if f == golden.FILE)]
    return artifact.model_copy(
        update={
            "files": {f: artifact.files[f] for f in kept},
            "evaluation": None,
            "settings": {k: v for k, v in artifact.settings.items() if k == "compared_in"},
            "data_fingerprint": "",
        }
    )


def _shipped(artifact: Artifact, folder: str) -> Iterator[tuple[str, bytes]]:
    """An artifact's files, as they are loaded from `folder` of the bundle."""
    bare = shipped_record(artifact)
    for name in bare.files:
        yield f"{folder}/{name}", (artifact.folder / name).read_bytes()
    yield f"{folder}/{Artifact.FILE}", _json(bare)


def expected(model: Artifact, profile: Profile) -> bytes:
    """The golden samples' maps (n, h, w), of the answers (n,), as .npz; EdgeKDError if it does not
    run here.
    """
    session = runtimes.open_session(model, profile)
    kept = golden.read(model)
    images = preprocess.normalise(kept.pixels, model.spec)
    answers = kept.outputs.logits.argmax(1)
    maps = [
        score_cam.score_cam(session, x, int(k)).map for x, k in zip(images, answers, strict=True)
    ]
    blank = np.full(kept.outputs.features.shape[2:], np.nan, np.float32)
    with io.BytesIO() as buffer:
        np.savez(buffer, maps=np.stack([blank if m is None else m for m in maps]), answers=answers)
        return buffer.getvalue()


def _zipped(content: Mapping[str, bytes]) -> bytes:
    """A zip of these entries, in this order for the first two and by name for the rest."""
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as whole:
            for name, data in content.items():
                info = zipfile.ZipInfo(name, EPOCH)
                info.external_attr = 0o644 << 16
                info.create_system = 3  # what made it shows nowhere
                whole.writestr(info, data)
        return buffer.getvalue()


# ---- reading one


def check(path: Path, key: Path | None = None) -> Checked:
    """The bundle's manifest, once every byte is found to be what it says.

    key: file of the public key that must have signed it, PEM or OpenSSH's. EdgeKDError if a byte,
    an entry or the signature is not right; without a key a signature is checked, but not whose.
    """
    return read(path, key)[0]


def read(path: Path, key: Path | None = None) -> tuple[Checked, dict[str, bytes]]:
    """As `check`, and every entry by its name."""
    content = _read(path)
    return _checked(path, content, key), content


def extract(path: Path, folder: Path, key: Path | None = None) -> Checked:
    """Check the bundle, then write its files into `folder`, which must not be there yet."""
    found, content = read(path, key)
    unpack(content, folder)
    return found


def unpack(content: Mapping[str, bytes], folder: Path) -> None:
    """Write what was read and checked into `folder`: it is there with all of it, or not at all."""
    if folder.exists():
        raise EdgeKDError(f"{folder} is there already: choose another folder")
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".extract-") as half:
        whole = Path(half, "whole")
        for name, data in content.items():
            make_folder((whole / name).parent)
            write_atomic(whole / name, data)
        whole.chmod(0o755)  # nobody else's to write to, whatever the umask
        try:
            whole.rename(folder)
        except OSError:  # another process was quicker
            raise EdgeKDError(f"{folder} is there already: choose another folder") from None


def loaded(folder: Path) -> Artifact:
    """What an unpacked bundle runs: its own file, or what had to be built of it on this device.

    No signature covers what was built: EdgeKDError unless it is of this bundle, and nobody but us
    and root can have put it there.
    """
    model = Artifact.load(folder / "model")
    built = folder / BUILT
    if not built.exists():
        return model
    needed = runtimes.must_be_built(model, Manifest.load(folder).profile)
    source = source_of(model) if needed else None
    if source is None:
        raise EdgeKDError(f"{built} is there, but nothing is built of this bundle: remove it")
    for path in (folder, built, *built.iterdir()):
        status = path.lstat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise EdgeKDError(
                f"others can write to {path}, and no signature covers what was built on a device: "
                "chmod or chown it, if you know where it is from, or deploy the bundle anew"
            )
    found = Artifact.load(built)
    own = {name: getattr(model, name) for name in ("folder", "kind", "files", "parents")}
    same = found.model_copy(update=own) == model and found.parents == {source.kind: source.sha256}
    if not same or found.files.get(golden.FILE) != model.files[golden.FILE]:
        raise EdgeKDError(
            f"{built} was not built of this bundle: remove it, deploy the bundle anew"
        )
    return found


def source_of(model: Artifact) -> Artifact | None:
    """The ONNX that a bundle's model can be built from, itself or in onnx/; None: there is none."""
    beside = model.folder.parent / "onnx"
    if model.path.suffix == ".onnx" or not (beside / Artifact.FILE).is_file():
        return model if model.path.suffix == ".onnx" else None
    source = Artifact.load(beside)
    return source if rebuilds(source, model) else None


def rebuilds(source: Artifact, model: Artifact) -> bool:
    """Whether `source` is ONNX in the model's precision: in another it would be another model."""
    return source.path.suffix == ".onnx" and source.precision == model.precision


def _checked(path: Path, content: Mapping[str, bytes], key: Path | None) -> Checked:
    """As `check`, of what was read."""
    manifest = _manifest(path, content)
    signer = ""
    if SIGNATURE in content:
        signature = _parsed(signing.Signature.parse, content[SIGNATURE], f"{path}: {SIGNATURE}")
        signer = signing.verified(path, content[Manifest.FILE], signature)
    if key is not None:
        wanted = signing.fingerprint(signing.public_key(key))
        if not signer:
            raise EdgeKDError(f"{path} is not signed: make it again with --key")
        if signer != wanted:
            raise EdgeKDError(f"{path} is signed by {signer}, not by {wanted} ({key})")
    return Checked(manifest, signer, key is not None)


def _read(path: Path) -> dict[str, bytes]:
    """Every entry; EdgeKDError for anything that `make` does not write."""
    try:
        if path.stat().st_size > LARGEST:
            raise EdgeKDError(f"{path} is over {LARGEST >> 20} MB: no bundle is")
        with zipfile.ZipFile(path) as whole:
            entries = whole.infolist()
            names = [e.filename for e in entries]
            if len(entries) > MOST or len(set(names)) < len(names):
                raise EdgeKDError(f"{path} has too many entries, or two of one name: no bundle")
            for e in entries:
                # By name, for it is unpacked beside source that runs, and records that are ours.
                if e.filename not in FILES and not INSIDE.fullmatch(e.filename):
                    raise EdgeKDError(f"{path} has an entry {e.filename!r}: no bundle has")
                if e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1:
                    raise EdgeKDError(f"{path}: {e.filename} is compressed or locked: no bundle is")
            return {e.filename: whole.read(e) for e in entries}
    except OSError as e:
        raise EdgeKDError(f"cannot read {path}: {e.strerror or e}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as e:
        raise EdgeKDError(f"{path} is no bundle, or a broken one: {e}") from None


def _manifest(path: Path, content: Mapping[str, bytes]) -> Manifest:
    """The manifest, if the other entries are those that it names."""
    if Manifest.FILE not in content:
        raise EdgeKDError(f"{path} has no {Manifest.FILE}: it is no bundle")
    manifest = _parsed(Manifest.read, content[Manifest.FILE], f"{path}: {Manifest.FILE}")
    others = content.keys() - {Manifest.FILE, SIGNATURE}
    if missing := manifest.files.keys() - others:
        raise EdgeKDError(f"{path} lacks {min(missing)}: copy it again")
    if more := others - manifest.files.keys():
        raise EdgeKDError(f"{path} has {min(more)}, which its manifest does not name")
    for name, digest in manifest.files.items():
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise EdgeKDError(f"{path}: {name} is not what was bundled: sha256 differs")
    return manifest


def _parsed(parse: Callable[[Any, str], R], data: bytes, source: str) -> R:
    """A record from JSON of unknown making."""
    try:
        return parse(json.loads(data), source)
    except (ValueError, RecursionError) as e:
        raise EdgeKDError(f"{source} is no JSON: {e}") from None
