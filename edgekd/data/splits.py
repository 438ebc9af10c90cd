"""Who goes where: splits as they are given, dealt by group, or, only if asked for, at random."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from edgekd.data.manifests import Entry
from edgekd.records import EdgeKDError, unknown

SPLITS = ("train", "val", "test")
HOW = ("given", "grouped", "random")
RANDOM = "RANDOM split of single images, as asked for"  # stands in every result
_DEAL = {"test": 0.2, "val": 0.1}  # share of a class's groups; the rest is train
_CARVE = {"val": 0.15}


def check(how: str | None) -> None:
    """EdgeKDError unless `how` is None or one of `HOW`."""
    if how is not None and how not in HOW:
        raise EdgeKDError(unknown("split", how, HOW))


def opaque(entries: Sequence[Entry], pairs: np.ndarray | None = None) -> list[Entry]:
    """The entries with `group` set: the least digest of all that belong together.

    That says nothing of the owner and is the same on every machine. Together are entries of one
    owner and of equal bytes, and with `pairs` (P, 2) near-duplicates.
    """
    parent = list(range(len(entries)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, e in enumerate(entries):
        for key in (f"owner {e.owner}" if e.owner else "", f"digest {e.digest}"):
            if key:
                parent[root(i)] = root(first.setdefault(key, i))
    for a, b in () if pairs is None else pairs.tolist():
        parent[root(a)] = root(b)
    least: dict[int, str] = {}
    for i, e in enumerate(entries):
        r = root(i)
        least[r] = min(least.get(r, e.digest), e.digest)
    return [e._replace(group=least[root(i)]) for i, e in enumerate(entries)]


def assign(
    entries: list[Entry],
    pairs: np.ndarray,
    *,
    known: str,
    given: set[str],
    how: str | None,
    seed: int,
) -> tuple[list[Entry], str]:
    """The entries, each with split and group; and the rule in a sentence.

    known: what the groups are, "" where none are. given: splits that the source has, "" among
    them if some image has none. how: None keeps what is given and deals the rest by group; grouped
    and random deal all. Near-duplicates (`pairs`) stay together wherever groups are dealt.
    """
    if how == "given" and given != set(SPLITS):
        has = ", ".join(sorted(given - {""})) or "none"
        raise EdgeKDError(f"--split given: the data has {has}, not train, val and test")
    if how == "random":
        entries = [
            e._replace(split=s) for e, s in zip(entries, _deal_images(entries, seed), strict=True)
        ]
        order = f"in the order of sha256('{seed}:<sha256 of its bytes>')"
        return opaque(entries), f"{RANDOM}: 70/10/20 % of each class's images, {order}."
    together = [known] if known else []
    order = f"in the order of sha256('{seed}:<group>'), rarest class first; groups: "
    if how == "grouped" or "" in given:
        entries = opaque(entries, pairs)
        split_of = _deal(entries, _DEAL, seed)
        start = (
            "All images dealt again" if how == "grouped" and "" not in given else "No split folders"
        )
        rule = f"{start}: 70/10/20 % of each class's groups are train/val/test, {order}"
        dealt = [e._replace(split=split_of[e.group]) for e in entries]
    elif "val" in given:
        return opaque(entries), "Split folders train, val and test as they are."
    else:
        train = [i for i, e in enumerate(entries) if e.split == "train"]
        place = {i: k for k, i in enumerate(train)}
        inside = [(place[a], place[b]) for a, b in pairs.tolist() if a in place and b in place]
        carved = opaque([entries[i] for i in train], np.array(inside, int).reshape(-1, 2))
        split_of = _deal(carved, _CARVE, seed)
        dealt = opaque(entries)
        for i, e in zip(train, carved, strict=True):
            dealt[i] = e._replace(split=split_of[e.group])
        rule = (
            f"Folders train and test as they are; val: 15 % of each train class's groups, {order}"
        )
    together.append("files of equal bytes and near-duplicates")
    return dealt, rule + " and ".join(together) + "."


def _deal_images(entries: Sequence[Entry], seed: int) -> list[str]:
    """Split of each entry, groups disregarded: shares of each class, by hash."""
    alone = [e._replace(group=f"{e.digest}{k}") for k, e in enumerate(entries)]
    split_of = _deal(alone, _DEAL, seed)
    return [split_of[e.group] for e in alone]


def _deal(entries: Sequence[Entry], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Split of each group: of every class at least one group to each share, the rest to train."""
    groups = {e.group for e in entries}
    shuffled = sorted(groups, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    rank = {g: r for r, g in enumerate(shuffled)}
    groups_of: dict[str, set[str]] = defaultdict(set)
    for e in entries:
        groups_of[e.label].add(e.group)
    split_of: dict[str, str] = {}
    for label in sorted(groups_of, key=lambda c: (len(groups_of[c]), c)):
        own = sorted(groups_of[label], key=rank.__getitem__)
        for split, share in shares.items():
            wanted = max(1, round(share * len(own))) - sum(split_of.get(g) == split for g in own)
            free = [g for g in own if g not in split_of]
            split_of |= dict.fromkeys(free[: max(0, wanted)], split)
        split_of |= {g: "train" for g in own if g not in split_of}
    return split_of
