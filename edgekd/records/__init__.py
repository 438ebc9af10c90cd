"""What one stage hands to the next: frozen, plain data, stored as JSON. No arrays, no torch.

A stage writes one folder. The record's file is written last and atomically, so a folder that has
it is finished, and one that has not is unfinished, whatever else it holds.
"""

from typing import TYPE_CHECKING

from edgekd import lazy_exports

if TYPE_CHECKING:
    from edgekd.records.artifact import Arch as Arch
    from edgekd.records.artifact import Artifact as Artifact
    from edgekd.records.artifact import Kind as Kind
    from edgekd.records.artifact import Spec as Spec
    from edgekd.records.disk import check_room as check_room
    from edgekd.records.errors import EdgeKDError as EdgeKDError
    from edgekd.records.errors import GateMissed as GateMissed
    from edgekd.records.errors import NoRoom as NoRoom
    from edgekd.records.errors import RuntimeUnavailable as RuntimeUnavailable
    from edgekd.records.errors import unknown as unknown
    from edgekd.records.fidelity import Aggregate as Aggregate
    from edgekd.records.fidelity import Agreement as Agreement
    from edgekd.records.fidelity import Comparison as Comparison
    from edgekd.records.fidelity import Fidelity as Fidelity
    from edgekd.records.fidelity import Survived as Survived
    from edgekd.records.fidelity import Swayed as Swayed
    from edgekd.records.locks import first_process as first_process
    from edgekd.records.locks import locked as locked
    from edgekd.records.margins import Gate as Gate
    from edgekd.records.margins import Margins as Margins
    from edgekd.records.margins import State as State
    from edgekd.records.margins import Step as Step
    from edgekd.records.margins import Verdict as Verdict
    from edgekd.records.margins import held as held
    from edgekd.records.margins import worst as worst
    from edgekd.records.measured import Conditions as Conditions
    from edgekd.records.measured import Energy as Energy
    from edgekd.records.measured import Layer as Layer
    from edgekd.records.measured import Peak as Peak
    from edgekd.records.measured import Roofline as Roofline
    from edgekd.records.profile import Budget as Budget
    from edgekd.records.profile import Precision as Precision
    from edgekd.records.profile import Profile as Profile
    from edgekd.records.profile import shipped_profiles as shipped_profiles
    from edgekd.records.scores import Bin as Bin
    from edgekd.records.scores import Calibration as Calibration
    from edgekd.records.scores import Evaluation as Evaluation
    from edgekd.records.scores import Metric as Metric
    from edgekd.records.scores import Paired as Paired
    from edgekd.records.scores import Part as Part
    from edgekd.records.scores import Threshold as Threshold
    from edgekd.records.store import SCHEMA as SCHEMA
    from edgekd.records.store import Journal as Journal
    from edgekd.records.store import Record as Record
    from edgekd.records.store import Stored as Stored
    from edgekd.records.store import T as T
    from edgekd.records.store import Track as Track
    from edgekd.records.store import append as append
    from edgekd.records.store import make_folder as make_folder
    from edgekd.records.store import needing as needing
    from edgekd.records.store import read_text as read_text
    from edgekd.records.store import read_toml as read_toml
    from edgekd.records.store import sha256 as sha256
    from edgekd.records.store import untracked as untracked
    from edgekd.records.store import user_cache as user_cache
    from edgekd.records.store import user_state as user_state
    from edgekd.records.store import versions as versions
    from edgekd.records.store import write_atomic as write_atomic
    from edgekd.records.timing import Machine as Machine
    from edgekd.records.timing import Timing as Timing
    from edgekd.records.training import AUGMENTATION as AUGMENTATION
    from edgekd.records.training import Training as Training

__all__ = [
    "AUGMENTATION", "SCHEMA", "Aggregate", "Agreement", "Arch", "Artifact", "Bin", "Budget",
    "Calibration", "Comparison", "Conditions", "EdgeKDError", "Energy", "Evaluation", "Fidelity",
    "Gate", "GateMissed", "Journal", "Kind", "Layer", "Machine", "Margins", "Metric", "NoRoom",
    "Paired", "Part", "Peak", "Precision", "Profile", "Record", "Roofline", "RuntimeUnavailable",
    "Spec", "State", "Step", "Stored", "Survived", "Swayed", "T", "Threshold", "Timing", "Track",
    "Training", "Verdict", "append", "check_room", "first_process", "held", "locked",
    "make_folder", "needing", "read_text", "read_toml", "sha256", "shipped_profiles", "unknown",
    "untracked", "user_cache", "user_state", "versions", "worst", "write_atomic",
]  # fmt: skip
__getattr__ = lazy_exports(
    __name__,
    {
        "artifact": "Arch Artifact Kind Spec",
        "disk": "check_room",
        "errors": "EdgeKDError GateMissed NoRoom RuntimeUnavailable unknown",
        "fidelity": "Aggregate Agreement Comparison Fidelity Survived Swayed",
        "locks": "first_process locked",
        "margins": "Gate Margins State Step Verdict held worst",
        "measured": "Conditions Energy Layer Peak Roofline",
        "profile": "Budget Precision Profile shipped_profiles",
        "scores": "Bin Calibration Evaluation Metric Paired Part Threshold",
        "store": "SCHEMA Journal Record Stored T Track append make_folder needing read_text "
        "read_toml sha256 untracked user_cache user_state versions write_atomic",
        "timing": "Machine Timing",
        "training": "AUGMENTATION Training",
    },
)
