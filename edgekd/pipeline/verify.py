"""`edgekd verify`: does a file still answer as it did when it was made?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekd import runtimes
from edgekd.records import Artifact, GateMissed, Profile
from edgekd.runtimes import golden

if TYPE_CHECKING:
    from edgekd.runtimes.golden import Verified


def verify(folder: Path, profile: str | None = None) -> Verified:
    """The golden samples of the file in `folder`, sent through it on this machine.

    profile: where to run it; None: in the runtime and on the device that it was made for, or what
    stands in for them here.
    """
    artifact = Artifact.load(folder)
    golden.read(artifact)
    if profile is None:
        # INT8 of one file is rounded elsewhere by each runtime: the one that it was made in first.
        runtime, _, device = artifact.settings.get("compared_in", "openvino").partition(" ")
        wanted = Profile(name="here", runtime=runtime, device=device or "CPU")
        wanted = runtimes.host(wanted, artifact)[0]
    else:
        wanted = Profile.read(profile)
    session = runtimes.open_session(artifact, wanted)
    return golden.verify(artifact, session, wanted.runtime, wanted.device)


def check(folder: Path, found: Verified) -> None:
    """GateMissed unless the file in `folder` answered as it did."""
    if not found.ok:
        raise GateMissed(
            f"{Artifact.load(folder).path} does not answer on {found.device} as it did when it was "
            "made: do not deploy it here"
        )
