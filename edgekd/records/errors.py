"""What the user can fix, and how it is said. Standard library alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgeKDError(Exception):
    """The user can fix this; the message says how, in one line. All else that escapes is a bug."""


class RuntimeUnavailable(EdgeKDError):
    """A runtime or device that is not on this machine (exit code 4)."""


class NoRoom(EdgeKDError):
    """A disk is full, or a quota or limit is reached: whatever was tried, it is not to blame."""


class GateMissed(EdgeKDError):
    """A stage finished and wrote its result, but the result is over a stated limit (exit 3)."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """'no profile "jetsen"; did you mean "jetson"? (known: cpu, intel-npu, jetson)'."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return f'no {what} "{name}"{hint} (known: {", ".join(known)})'
