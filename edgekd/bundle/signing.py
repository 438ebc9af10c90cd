"""Who vouches for a bundle: Ed25519 keys and signatures."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.records import EdgeKDError, Record, make_folder, read_text, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )


class Signature(Record):
    """Who vouches for a manifest."""

    algorithm: str = "ed25519"
    public_key: str  # base64 of its 32 bytes
    signature: str  # base64, of the bytes of bundle.json


def private_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 key in a PEM or OpenSSH file without a passphrase."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_ssh_private_key,
    )

    data = _key_bytes(path)
    load = load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key
    try:
        found = load(data, None)
    except (ValueError, TypeError) as e:
        raise EdgeKDError(f"{path} holds no private key that can be read: {e}") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise EdgeKDError(f"{path} is no Ed25519 key: edgekd bundle key makes one")
    return found


def public_key(path: Path) -> Ed25519PublicKey:
    """The Ed25519 key in a PEM or OpenSSH file ("ssh-ed25519 AAAA...")."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_public_key,
        load_ssh_public_key,
    )

    data = _key_bytes(path)
    load = load_ssh_public_key if data.startswith(b"ssh-") else load_pem_public_key
    try:
        found = load(data)
    except ValueError as e:
        raise EdgeKDError(f"{path} holds no public key: {e}") from None
    if not isinstance(found, Ed25519PublicKey):
        raise EdgeKDError(f"{path} is no Ed25519 key: edgekd bundle key makes one")
    return found


def new_key(path: Path) -> Path:
    """Write a new private key to `path`, readable by its owner alone, and `path`.pub beside it."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(f"{path.name}.pub")
    for there in (path, public):
        if there.exists():
            raise EdgeKDError(f"{there} is there already: a lost key cannot be had again")
    key = Ed25519PrivateKey.generate()
    make_folder(path.parent)
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(private)
    pem = s.PublicFormat.SubjectPublicKeyInfo
    write_atomic(public, key.public_key().public_bytes(s.Encoding.PEM, pem))
    return public


def fingerprint(key: Ed25519PublicKey) -> str:
    """As `ssh-keygen -l` tells it: "SHA256:..."."""
    from cryptography.hazmat.primitives import serialization as s

    line = key.public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _key_bytes(path: Path) -> bytes:
    try:
        return read_text(path).encode()
    except OSError as e:
        raise EdgeKDError(f"cannot read the key {path}: {e.strerror}") from None
    except UnicodeError:
        raise EdgeKDError(
            f"{path} holds no key: PEM is text, edgekd bundle key makes one"
        ) from None


def signed(data: bytes, key: Ed25519PrivateKey) -> Signature:
    """What vouches for `data`."""
    from cryptography.hazmat.primitives import serialization as s

    raw = key.public_key().public_bytes(s.Encoding.Raw, s.PublicFormat.Raw)
    made = key.sign(data)
    return Signature(public_key=base64.b64encode(raw).decode(),
                     signature=base64.b64encode(made).decode())  # fmt: skip


def verified(path: Path, data: bytes, told: Signature) -> str:
    """The fingerprint of the key that signed `data`, the manifest of the bundle at `path`;
    EdgeKDError if it did not.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if told.algorithm != "ed25519":
        raise EdgeKDError(f"{path} is signed with {told.algorithm}, ed25519 is known")
    try:
        raw = base64.b64decode(told.public_key, validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw)
        key.verify(base64.b64decode(told.signature, validate=True), data)
    except (InvalidSignature, ValueError, binascii.Error):
        raise EdgeKDError(
            f"{path}: its signature is not that of bundle.json: do not use it"
        ) from None
    return fingerprint(key)
